"""Reading answers out of responses, reading arithmetic without running it, and telling whether an answer is right."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volvelle.language.expressions import arithmetic, harmless, numbers_used
from volvelle.language.extract import boxed, first_block, first_line, last_number, lenient, marked, section, tagged
from volvelle.language.matching import exact, mathematics, number


@pytest.mark.parametrize("text, found", [
    ("so 7 + 5 = 12.", "12"), ("1,234 in all", "1234"), ("x is -3.5", "-3.5"), ("7-5", "5"), ("(2)-4", "4"), ("= -4", "-4"), ("+6", "6"),
    (".5 of it", ".5"), ("1e3", "1e3"), ("1,2,3", "3"), ("none", None), ("", None), ("v2", None), ("12,34", "34"), ("5.", "5"), ("2x", None),
    ("3/4", "4"), ("3:45", "45"), ("1,000,000.5", "1000000.5"),
])
def test_last_number(text, found):
    assert last_number(text) == found


@given(st.integers(-10**9, 10**9), st.sampled_from(["{}", "it is {}.", "1 and 2, so {}", "{}\n", "= {} ", "{:,} apples"]))
def test_last_number_finds_whole_numbers(value, frame):
    assert int(last_number(frame.format(value))) == value


@pytest.mark.parametrize("text, found", [
    (r"\boxed{5}", "5"), (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{2} and \boxed{3", "2"), (r"\boxed {a\}b}", r"a\}b"),
    ("no box", None), (r"\boxed{}", ""),
])
def test_boxed(text, found):
    assert boxed(text) == found


def test_tagged_takes_the_last_closed_pair():
    assert tagged("<answer>1</answer> no, <answer> 2\n</answer>") == "2"
    assert tagged("<answer>1</answer> <answer>2") == "1"
    assert tagged("<answer>1 <answer>2</answer>") == "2"
    assert tagged("<answer>1") is None
    assert tagged("<think>a</think>", "think") == "a"


def test_marked_prefers_the_later_mark():
    assert marked(r"\boxed{1} <answer>2</answer>") == "2"
    assert marked(r"<answer>2</answer> \boxed{1}") == "1"
    assert marked(r"<answer>it is \boxed{3}</answer>") == "3"
    assert marked("2") is None


def test_lenient():
    assert lenient("The sum is 12.", numeric=True) == "12"
    assert lenient("<answer>x = 4</answer> or 5", numeric=True) == "4"
    assert lenient(" apple, pear ") == "apple, pear"
    assert lenient("no idea", numeric=True) == "no idea"


def test_lines_and_blocks():
    assert first_line(" 5 \n6") == "5"
    assert first_line("\n5") == ""
    assert first_block("1 2\n3 4\n\nQuestion: x") == "1 2\n3 4"
    assert first_block("\n1 2\n3 4\n") == "1 2\n3 4"


def test_section():
    text = "<think>p</think> <response> A </response> junk"
    assert section(text, "<response>", "</response>") == "A"
    assert section(text, "</think>") == "<response> A </response> junk"
    assert section("plain", "<response>", "</response>") == "plain"
    assert section("plain", "<response>", "</response>", strict=True) is None
    assert section("<response> A", "<response>", "</response>", strict=True) is None
    assert section("a B c B d", "B", None) == "c B d"


@pytest.mark.parametrize("text, value", [
    ("1+2*3", 7), ("(1+2)*3", 9), ("7-8-9", -10), ("1/3", Fraction(1, 3)), ("-4", -4), ("2**3", None), ("1/0", None), ("__import__('os')", None),
    ("a+1", None), ("5!", None), ("1+", None), ("3 # 4", None), ("1_0", None), ("0x10", None), ("1.5", None), ("9" * 500, None),
    ("(" * 100 + "1" + ")" * 100, 1), ("", None),
])
def test_arithmetic(text, value):
    assert arithmetic(text) == value


def test_numbers_used():
    assert numbers_used("3*(2+7)-3") == [2, 3, 3, 7]
    assert numbers_used("3*") == []


@pytest.mark.parametrize("text", ["x**3/3 + C", "exp(2*x)*sin(x)", "log(Abs(x))/2", "3*x**2*y - 4.5", "x**(1/2)", "E**(2*x)", "sqrt(x**2+1)"])
def test_harmless_lets_mathematics_through(text):
    assert harmless(text)


@pytest.mark.parametrize("text", [
    "__import__('os').system('x')", "x.__class__", "9**9**9", "(9**99)**99", "2**(99*99*99+x-x)", "factorial(99999)", "5!", "exec('1')", "[x]",
    "lambda: 1", "f(x)", "x if x else x", "'a'*9", "exp(x, x)", "2x",
])
def test_harmless_stops_what_would_run_or_never_end(text):
    assert not harmless(text)


def test_matches():
    assert exact(" Paris ", "Paris") and exact("so <answer>Paris</answer>.", "Paris") and not exact("paris", "Paris")
    assert number("It is 1,234.0.", "1234") and number(r"\boxed{5} of 6", "#### 5") and not number("six", "6") and not number("5 or 6", "5")
    assert mathematics(r"thus \boxed{\frac{1}{2}}", "0.5") and mathematics("<answer>0.5</answer>", r"\frac12")
    assert mathematics(r"\boxed{x^2+2x+1}", r"(x+1)^2") and not mathematics(r"\boxed{x^2+1}", r"(x+1)^2")
    assert mathematics("The answer is 12.", "12") and not mathematics("The answer is 13.", "12") and not mathematics("no idea", "12")
    with pytest.raises(ValueError, match="holds no number"):
        number("5", "five")


def test_mathematics_works_outside_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(mathematics, "it is 3/4", "0.75").result()
