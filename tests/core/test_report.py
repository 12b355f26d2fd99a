"""The page: what it says, that it needs nothing from outside, that text stays text, that writing is all or nothing."""

import dataclasses
import os
import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest

from volvelle.core.errors import UserError
from volvelle.core.report import ArmData, Sample, render_report, write_report
from volvelle.core.statistics import verdict

STEPS = [0, 10, 20]
EVIL = "<script>alert('x')</script></div><!-- & \"q\" -->"


def arm(name, shift=0.0, **changes):
    final = np.array([0.50, 0.52, 0.48, 0.51, 0.49]) + shift
    data = ArmData(
        name,
        seeds=[0, 1, 2, 3, 4],
        final={"pass@1": final},
        curves={"pass@1": (STEPS, np.stack([final - 0.2, final - 0.1, final], 1))},
        samples=[
            Sample("2 + 2 =", "4", True, 1.0),
            Sample("2 + 2 =", EVIL, False, -0.5),
            Sample("Write.", "some text"),
        ],
        config={"recipe": name, "updates": {"learning_rate": 1e-6, "epochs": 2}, "stages": [1, 2]},
    )
    return dataclasses.replace(data, **changes)


def two():
    noise = np.array([0.001, -0.001, 0.002, 0, -0.002])
    b = arm("ngrpo", 0.1)
    return [arm("grpo"), dataclasses.replace(b, final={"pass@1": b.final["pass@1"] + noise})]


def page(arms=None, **what):
    return render_report("A title", arms or two(), **what)


class Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def words(text):
    """The visible text, white space collapsed."""
    body = text[text.index("<body>") :]
    return " ".join(" ".join(Reader(body).text).split())


def test_says_what_was_compared_and_found():
    arms = two()
    outcome = verdict("ngrpo > grpo on pass@1", {a.name: a.final for a in arms})
    text = words(
        page(
            arms,
            setting={"task": "countdown", "model": "tiny", "steps": 200},
            says="learns more",
            outcomes=[outcome],
            units={"pass@1": "share"},
            environment={"torch": "2.9", "git": {"revision": "abc"}},
        )
    )
    for said in (
        "A title",
        "Claim: learns more",
        "Reproduced",
        "ngrpo > grpo on pass@1",
        "task countdown model tiny steps 200 arms grpo, ngrpo seeds 5 (0, 1, 2, 3, 4)",
        "pass@1 (share)",
        "torch 2.9 git.revision abc",
        "learning_rate: 1.0e-06",
    ):
        assert said in text, said


def test_table_holds_mean_interval_and_paired_difference():
    # grpo: mean 0.5, sd sqrt(0.00025), half-width 2.776445 * sqrt(0.00025 / 5) = 0.019632
    # difference: mean 0.1, sd 0.0015811, half-width 2.776445 * sqrt(2.5e-6 / 5) = 0.0019632
    text = words(page())
    row = text[text.index("pass@1 grpo 0.5") :]
    assert row.startswith("pass@1 grpo 0.500 0.480 to 0.520 – – 5 ngrpo 0.600 ")
    assert "+0.100 +0.098 to +0.102 5" in row
    assert "pass@1 grpo 0.500 0.520 0.480 0.510 0.490 ngrpo 0.601 0.619 0.582 0.610 0.588" in text


def test_differences_pair_by_seed_not_by_position():
    a, b = two()
    order = [3, 0, 4, 1, 2]
    shuffled = dataclasses.replace(
        b, seeds=[b.seeds[i] for i in order], final={"pass@1": b.final["pass@1"][order]}, curves={}
    )
    assert "+0.100 +0.098 to +0.102" in words(page([a, shuffled]))


def test_different_seeds_are_not_paired_and_it_says_so():
    a, b = two()
    text = words(page([a, dataclasses.replace(b, seeds=[5, 6, 7, 8, 9])]))
    assert "ngrpo and grpo ran on different seeds: no paired difference." in text
    assert "difference from" not in text and "5 (5, 6, 7, 8, 9) for ngrpo" in text


@pytest.mark.parametrize("seeds", [1, 5])
def test_one_arm(seeds):
    a = arm("grpo")
    a = dataclasses.replace(
        a,
        seeds=a.seeds[:seeds],
        final={"pass@1": a.final["pass@1"][:seeds]},
        curves={"pass@1": (STEPS, a.curves["pass@1"][1][:seeds])},
    )
    text = words(page([a]))
    assert "What the policy wrote" in text and "difference" not in text.lower() and "differ" not in text
    assert ("One seed gives no interval." in text) == (seeds == 1)
    assert ("0.480 to 0.520" in text) == (seeds == 5)


def test_an_empty_arm_makes_a_page():
    assert "Learning curves" not in page([ArmData("a", [0])])


def test_needs_nothing_from_outside():
    text = page(outcomes=[verdict("ngrpo > grpo on pass@1", {a.name: a.final for a in two()})])
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"} & set(read.tags)
    for name, value in read.attributes:
        assert not name.startswith("on") and name not in {"src", "href", "action"}
        assert not name.endswith("href") or value.startswith("#")
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= namespaces
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", text)) and "@import" not in text


def test_everything_given_is_shown_as_text():
    a = arm(EVIL, config={EVIL: EVIL})
    text = page(
        [a, arm("b")], setting={EVIL: EVIL}, says=EVIL, units={"pass@1": EVIL}, environment={EVIL: EVIL}, x=EVIL
    )
    read = Reader(text)
    assert "script" not in read.tags and "<script" not in text.lower() and "<!-- &" not in text
    assert "".join(read.text).count("alert('x')") > 8
    assert EVIL in "".join(read.text)


def test_hidden_characters_are_made_visible():
    text = page([arm("a", samples=[Sample("p", "a\x00b\x1b[31m\u202ec\ud83d\n\td")])])
    assert "a␀b␛[31m[U+202E]c�\n\td" in text
    text.encode("utf-8")


def test_samples_stand_side_by_side_and_are_marked():
    a, b = two()
    text = page([a, dataclasses.replace(b, samples=[Sample("2 + 2 =", "four", True), Sample("other", "x", False)])])
    seen = words(text)
    assert "2 + 2 = grpo ✓ correct , reward 1 4 ✗ wrong , reward −0.5" in seen
    assert "ngrpo ✓ correct four" in seen
    assert "Write. grpo some text ngrpo No completion of this prompt." in seen
    assert text.count('class="completion correct"') == 2 and text.count('class="completion wrong"') == 2
    assert text.count('class="completion "') == 1  # not judged, not marked


def test_what_is_left_out_is_counted():
    many = [Sample(f"prompt {i}", f"text {j}", j == 0) for i in range(9) for j in range(4)]
    text = words(page([arm("a", samples=many)], prompts=3, completions=2))
    assert "3 of 9 prompts." in text and text.count("2 of 4 completions shown; 1 of 4 correct.") == 3
    assert "prompt 2" in text and "prompt 3" not in text and "text 2" not in text


def test_prompts_that_more_arms_answered_come_first():
    alone, shared = Sample("alone", "x"), Sample("shared", "y")
    text = words(page([arm("a", samples=[alone, shared]), arm("b", samples=[shared])], prompts=1))
    assert "1 of 2 prompts" in text and "shared" in text and "alone" not in text


def test_differing_fields_are_named():
    a, b = two()
    b = dataclasses.replace(
        b, config={"recipe": "grpo", "updates": {"learning_rate": 2e-6, "clip": None}, "stages": [1, 2]}
    )
    text = words(page([a, b]))
    assert "The arms differ in updates.learning_rate , updates.epochs , updates.clip ." in text
    assert "updates.epochs 2 – updates.clip – None" in text
    assert "The arms have the same configuration." in words(page([a, dataclasses.replace(b, config=a.config)]))


def test_configuration_is_collapsible_yaml():
    text = page()
    assert text.count("<details><summary>") == 2
    assert "<pre>recipe: grpo\nupdates:\n  learning_rate: 1.0e-06\n  epochs: 2\n" in text


def test_same_data_same_bytes():
    assert page() == page()


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert write_report(path, "A title", two()) == path
    assert path.read_text(encoding="utf-8") == page() and [p.name for p in path.parent.iterdir()] == ["report.html"]
    os.link(path, tmp_path / "kept")
    write_report(path, "Another title", two())
    assert (tmp_path / "kept").read_text(encoding="utf-8") == page()  # replaced by a rename, never written over
    path.write_text("old")
    with pytest.raises(UserError):
        write_report(path, "A title", [])
    taken = tmp_path / "folder.html"
    taken.mkdir()
    with pytest.raises(OSError):  # the rename fails: the temporary file goes
        write_report(taken, "A title", two())
    assert path.read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {"new", "folder.html", "kept"}


def test_template_is_in_the_package():
    assert (files("volvelle.core") / "templates" / "report.html.j2").is_file()


@pytest.mark.parametrize(
    "arms, named",
    [
        ([], "no arms"),
        ([arm("a"), arm("a")], "two arms of one name in a, a"),
        ([arm("a", seeds=[0, 1, 2, 3, 3])], "a has seeds [0, 1, 2, 3, 3]"),
        ([arm("a", seeds=[])], "a has seeds []"),
        ([arm("a", final={"m": [1, 2]})], "m of a is [1, 2]"),
        ([arm("a", final={"m": [1, 2, 3, 4, np.nan]})], "one finite number per seed"),
        ([arm("a", curves={"m": (STEPS, np.zeros((2, 3)))})], "curve m of a has shape [2, 3]"),
        ([arm("a", config={"x": object()})], "config of a holds more than plain values"),
    ],
)
def test_refusals(arms, named):
    with pytest.raises(UserError) as e:
        render_report("t", arms)
    assert named in str(e.value) and "\n" not in str(e.value)
