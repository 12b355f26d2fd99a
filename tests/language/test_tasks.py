"""Tasks: splits that never overlap, verifiers that are right, and mistakes told in one line."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.parts import coerce, from_config, to_config
from volvelle.core.registry import registry
from volvelle.core.tasks import Task
from volvelle.language import generation
from volvelle.language.models import ALPHABET
from volvelle.language.records import Prompt
from volvelle.language.slots import LanguageTask
from volvelle.language.tasks.reasoning_gym import ReasoningGym, graded
from volvelle.language.tasks.text import CountdownText, TextTask, expressions

SPLITS = ("train", "validation", "test")
SMALL = {"train": 12, "validation": 4, "test": 6}
TEXT = ["digit-sum", "sort-digits", "reverse", "modular", "countdown-text", "pause"]
SIX = ["gcd", "chain_sum", "letter_counting", "countdown", "sudoku", "graph_color"]


def task(text, *overrides, **changes) -> LanguageTask:
    return coerce(Task, text, "task").override(*overrides).replace(**changes)


def message(call) -> str:
    """The one line of the UserError that `call` raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def disjoint(found: LanguageTask) -> bool:
    texts = {name: {p.text or json.dumps(p.messages) for p in found.split(name)} for name in SPLITS}
    return all(texts[a].isdisjoint(texts[b]) for a in SPLITS for b in SPLITS if a < b)


def presets() -> list[str]:
    return sorted(n for n, v in registry.table(Task).items() if isinstance(v, type) and issubclass(v, ReasoningGym) and n != "rg")


# ----------------------------------------------------------------------------------------------------- what holds for every task

@pytest.mark.parametrize("name", [*presets(), *TEXT])
def test_splits_never_overlap_and_solutions_are_right(name):
    found = task(name, *(["right_short=1", "right_long=1"] if name == "pause" else []))  # which else teaches slips on purpose
    assert disjoint(found)
    rng = np.random.default_rng(0)
    ids = [p.id for split in SPLITS for p in found.split(split)]
    assert len(set(ids)) == len(ids)
    for split in SPLITS:
        prompts = found.split(split)
        assert len(prompts) == getattr(found, split) == len({p.text for p in prompts})
        assert all(found.score(p, found.demonstration(p, rng)) == 1.0 for p in prompts[:20])


@pytest.mark.parametrize("name", [*presets(), *TEXT, "tree", "rg:countdown", "file:x.jsonl"])
def test_tasks_rebuild_from_their_configuration(name):
    found = task(name)
    again = from_config(Task, to_config(found))
    assert again == found and type(again) is type(found) and hash(again) == hash(found)


@pytest.mark.parametrize("name", ["gcd-easy", "digit-sum"])
def test_data_seed_decides_the_questions(name):
    texts = [[p.text for p in task(name, data_seed=s).split("test")] for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_splits_are_alike_where_questions_repeat():
    """Of the 400 gcd questions up to 20 the generator draws some far more often; each split must hold its share of them (cut off in
    order, coprime pairs are 69 % of train and 28 % of test). The bound is four standard deviations of a random split."""
    made = task("gcd-easy")
    shares = {s: [p.row["answer"] == "1" for p in made.split(s)] for s in ("train", "test")}
    everyone = shares["train"] + shares["test"]
    p = sum(everyone) / len(everyone)
    spread = (p * (1 - p) * (1 / len(shares["train"]) + 1 / len(shares["test"]))) ** 0.5
    assert abs(sum(shares["train"]) / len(shares["train"]) - sum(shares["test"]) / len(shares["test"])) < 4 * spread


def test_unknown_split_and_empty_split():
    for name in ("digit-sum", "gcd-easy", "tree"):
        assert "accepted: test, train, validation" in message(lambda name=name: task(name).split("dev"))
    for name in ("digit-sum", "gcd-easy"):
        assert "validation split is empty" in message(lambda name=name: task(name, validation=0).split("validation"))


# -------------------------------------------------------------------------------------------------------------------- reasoning-gym

@pytest.mark.parametrize("name", SIX)
def test_reasoning_gym_dataset(name):
    found = task(f"rg:{name}", binary=False, shots=2, **SMALL)
    assert disjoint(found)
    shown = found.split("train")[0].text
    assert shown.count("Question: ") >= 3 and shown.endswith("\nAnswer:")
    for prompt in found.split("test"):
        assert prompt.domain == name and prompt.text.rpartition("Question: ")[2].startswith(prompt.row["question"])
        assert found.score(prompt, found.demonstration(prompt, None) + ("" if "\n" in found.answer(prompt.row) else "\nQuestion: more")) == 1.0
        assert found.score(prompt, "") < 1.0


def test_worked_examples_are_no_prompts():
    found = task("gcd-easy")
    examples = [q.split("\nAnswer:")[0] for q in found.split("test")[0].text.split("Question: ")[1:-1]]
    asked = {p.row["question"] for s in SPLITS for p in found.split(s)}
    assert len(examples) == 4 and not asked & set(examples)


def test_plain_and_chat_formats():
    plain, chat = task("rg:gcd", **SMALL), task("rg:gcd", format="chat", shots=1, **SMALL)
    p, c = plain.split("test")[0], chat.split("test")[0]
    right = p.row["answer"]
    assert plain.stop == ("\n",) and chat.stop == () and plain.override("stop_at=[x]").stop == ("x",)
    assert plain.score(p, f" {right}\nQuestion: 8") == 1.0 and plain.score(p, f"\n{right}") == 0.0
    assert p.messages is None and c.text is None and [t["role"] for t in c.messages] == ["user", "assistant", "user"]
    right = c.row["answer"]
    for text in (f"The answer is {right}.", f"<answer>{right}</answer>", rf"I get \boxed{{{right}}} of 7", chat.demonstration(c, None)):
        assert chat.score(c, text) == 1.0
    assert chat.score(c, f"{right} and then 123456789") == 0.0
    assert task("rg:sudoku", **SMALL).stop == ("\n\n", "\nQuestion:")


def test_binary_or_graded():
    binary, graded_task = task("rg:countdown", **SMALL), task("rg:countdown", binary=False, **SMALL)
    prompt = binary.split("test")[0]
    numbers = "+".join(map(str, prompt.row["metadata"]["numbers"])) + "+0"
    assert binary.score(prompt, numbers) == 0.0 and graded_task.score(prompt, numbers) == 0.05
    assert binary.gives == {"binary_rewards"} and graded_task.gives == frozenset()


def test_overrides_and_mistakes():
    assert task("rg:countdown", "config.max_value=20").config == {"max_value": 20}
    assert task("rg:basic_arithmetic", "config.operators=[+,-]").config == {"operators": ["+", "-"]}
    assert "did you mean gcd" in message(lambda: task("rg:gdc"))
    assert "unknown reasoning-gym dataset 'composite'" in message(lambda: task("rg:composite"))
    assert "did you mean config.max_value" in message(lambda: task("rg:gcd", "config.max_valu=3"))
    assert "config.max_value='x': expected int" in message(lambda: task("rg:gcd", "config.max_value=x"))
    assert "max_value must be > min_value" in message(lambda: task("rg:gcd", "config.max_value=0"))
    assert "data_seed" in message(lambda: task("rg:gcd", "config.seed=0"))
    assert "train, validation and test" in message(lambda: task("rg:gcd", "config.size=9"))
    assert "needs task.dataset" in message(lambda: task("rg"))
    assert "no worked answers" in message(lambda: task("rg:boxnet", shots=1, **SMALL).split("test"))


def test_a_small_space_says_how_many_questions_there_are():
    found = task("rg:count_bits", "config.max_n=15", shots=2, train=20, validation=3, test=4)
    assert "only 15 distinct questions" in message(lambda: found.split("train")) and "train=6 would fit" in message(lambda: found.split("train"))
    assert len(found.replace(train=6).split("train")) == 6


def test_splits_are_lazy():
    found = task("rg:futoshiki", train=100_000, validation=1, test=1)
    assert len(found.split("test")) == 1


def test_generation_leaves_the_global_generators_alone_and_does_not_listen_to_them():
    before = random.getstate(), np.random.get_state()[1].tolist()
    texts = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed)
        state = random.getstate(), np.random.get_state()[1].tolist()
        found = task("rg:list_functions", data_seed=5 + seed, **SMALL)  # different seeds: no cache in between
        found.split("train"), task("rg:pool_matrix", data_seed=5 + seed, **SMALL).split("train")
        assert (random.getstate(), np.random.get_state()[1].tolist()) == state
        texts.append(found.replace(data_seed=9, test=7 + seed).split("test")[0].text)
    assert texts[0] == texts[1]
    random.setstate(before[0])


def _other_process(names: list[str], hash_seed: str) -> dict[str, list]:
    """Questions and answers as a process with that hash seed makes them."""
    code = ("import json, runpy, sys; make = runpy.run_path(sys.argv[1])['generate'];"
            "print(json.dumps({n: [(x['question'], x['answer']) for x in make(n, {}, 11, 0, 6)] for n in sys.argv[2:]}))")
    done = subprocess.run([sys.executable, "-c", code, generation.__file__, *names], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONHASHSEED": hash_seed})
    return json.loads(done.stdout)


def test_questions_do_not_depend_on_the_process():
    assert _other_process(["ransom_note"], "1") == _other_process(["ransom_note"], "2")


def test_what_a_scorer_would_accept_wrongly_is_refused():
    assert graded("complex_arithmetic", {}, "nan", {"question": "", "answer": "1 + i", "metadata": {"result": (1.0, 1.0)}}) == 0.0
    assert graded("coin_flip", {}, "0", {"question": "", "answer": "0.234375", "metadata": {}}) == 0.0
    assert graded("coin_flip", {}, "15/64", {"question": "", "answer": "0.234375", "metadata": {}}) == 1.0
    assert graded("game_of_life_halting", {}, "maybe", {"question": "", "answer": "False", "metadata": {}}) == 0.0


@pytest.mark.parametrize("name", ["countdown", "puzzle24", "simple_integration", "polynomial_multiplication", "string_insertion", "n_queens"])
def test_what_the_model_wrote_is_never_run(name, tmp_path):
    found, trace = task(f"rg:{name}", binary=False, **SMALL), tmp_path / "ran"
    prompt = found.split("test")[0]
    for text in (f"__import__('pathlib').Path('{trace}').touch()", f"[open('{trace}', 'w')]", f"print(open('{trace}','w'))", "9**9**9**9**9"):
        assert found.score(prompt, text) < 1.0
    assert not trace.exists()


@pytest.mark.slow
def test_every_dataset_of_reasoning_gym():
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite"})
    assert len(names) == 105
    junk = ["", "x", "nan", "1/0", "-1", "[]", "[[1,2],[3]]", "{}", "None", "()", "A B C", "1e999", "1 2 3\n4 5 6", '{"a":1}', "\\frac12", "∞"]
    for name in names:
        found = task(f"rg:{name}", binary=False, train=2, validation=1, test=2)
        assert disjoint(found), name
        for prompt in found.split("train"):
            if name not in ("boxnet", "rush_hour"):
                assert found.score(prompt, found.demonstration(prompt, None)) == 1.0, name
            for text in junk:
                assert 0.0 <= found.score(prompt, text) <= 1.0, (name, text)


@pytest.mark.slow
def test_no_dataset_depends_on_the_process():
    from reasoning_gym.factory import DATASETS

    names = sorted(set(DATASETS) - {"composite", "futoshiki", "knight_swap", "zebra_puzzles", "sokoban"})  # the four are slow
    one, two = _other_process(names, "1"), _other_process(names, "2")
    assert [n for n in names if one[n] != two[n]] == []


# ------------------------------------------------------------------------------------------------------------------ character tasks

@pytest.mark.parametrize("name", [n for n in TEXT if n != "pause"])
def test_character_tasks_are_short_and_writable(name):
    found, rng = task(name), np.random.default_rng(0)
    for prompt in found.split("train"):
        solution, slip = found.solution(prompt.row["question"], rng), found.slip(prompt.row["question"], rng)
        assert len(prompt.text) < 24 and 0 < len(solution) < 32 and 0 < len(slip) < 32
        assert set(prompt.text + solution + slip) <= set(ALPHABET)
        assert found.score(prompt, solution) == 1.0 and found.score(prompt, slip) == 0.0
        assert found.score(prompt, found.right(prompt.row["question"])) == 1.0


@pytest.mark.parametrize("name", [n for n in TEXT if n != "pause"])
def test_noise_is_the_share_of_wrong_demonstrations(name):
    found, rng = task(name, noise=0.3), np.random.default_rng(1)
    prompts = found.split("train")
    wrong = 1 - np.mean([found.score(p, found.demonstration(p, rng)) for p in prompts])
    assert abs(wrong - 0.3) < 4.5 * (0.21 / len(prompts)) ** 0.5  # false alarm once in 100,000 runs of the five


def test_score_reads_the_answer_after_the_working():
    found = task("modular")
    prompt = Prompt("x", text="17*23 mod 7:", row={"question": [17, 23, 7]})
    assert [found.score(prompt, t) for t in ("391>6", "6", ">6", "1>6 ", "391>5", "6>391", "06", "")] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_countdown_text_accepts_any_right_expression_and_nothing_else():
    found = task("countdown-text")
    prompt = Prompt("x", text="2 3 7=13:", row={"question": [[2, 3, 7], 13]})
    right = ["3*2+7", "7+2*3", "2*3+7", "(2*3)+7", " 7+3*2"]
    wrong = ["7+6", "13", "3*2+7+0", "3*2+7-7+7", "3*(2+7)", "7+3*2=13", "7+3*2#", "", "2+3+7", "7--6"]
    assert [found.score(prompt, t) for t in right + wrong] == [1.0] * len(right) + [0.0] * len(wrong)


def test_expressions_are_complete_and_true():
    from volvelle.language.expressions import arithmetic

    found = dict(expressions((2, 3, 7)))
    assert found["2*3+7"] == 13 and found["2-(3-7)"] == 6 and found["(2+3)*7"] == 35
    assert set(found.values()) >= {2 + 3 + 7, 2 * 3 * 7, 7 * (3 - 2), 2 * (7 - 3), 3 * (2 - 7), 7 - 2 * 3, 2 - 3 - 7}
    assert all(arithmetic(text) == value for text, value in expressions((2, 3, 7, 7)))


def test_text_task_mistakes():
    assert "expected min <= max" in message(lambda: task("digit-sum", min_digits=5, max_digits=4))
    assert "distinct questions" in message(lambda: task("modular", max_factor=3).split("train"))
    assert isinstance(CountdownText(), TextTask)


# ------------------------------------------------------------------------------------------------------------------------------ tree

def test_tree_scores_paths_and_nothing_else():
    found = task("tree", prompts=5, vocabulary=3, depth=2, winners=2)
    assert found.winning.shape == (5, 2) and found.max_tokens == 2 and found.stop == ()
    for prompt in found.split("train"):
        wins = [found.path(leaf) for leaf in range(9) if found.score(prompt, found.path(leaf))]
        assert [found.leaf(w) for w in wins] == found.winning[prompt.row["index"]].tolist()
        assert found.demonstration(prompt, np.random.default_rng(0)) in wins
    assert [found.leaf(t) for t in ("0 1", "2 2", "1", "0 1 2", "3 0", "a b", "-1 0", "")] == [1, 8] + [None] * 6


def test_tree_says_that_its_splits_are_one():
    found = task("tree")
    assert found.shares_prompts and found.label() == "tree-on-train"
    assert [p.id for p in found.split("train")] == [p.id for p in found.split("test")]
    assert "512 leaves" in message(lambda: task("tree", winners=513))


def test_tree_pass_at_k_is_exact():
    found = task("tree", prompts=2, vocabulary=2, depth=1, winners=1)
    leaf = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    assert found.exact_pass_at_k(leaf, (1, 2)) == pytest.approx({"pass@1": 0.5, "pass@2": 0.75, "distinct_winners": 1.0, "solved": 0.0})
    sure = torch.zeros(2, 2).scatter(1, found.winning, 1.0)
    assert found.exact_pass_at_k(sure, (4,)) == pytest.approx({"pass@4": 1.0, "distinct_winners": 1.0, "solved": 1.0})


def test_tree_pass_at_k_agrees_with_sampling():
    found = task("tree", prompts=3, vocabulary=4, depth=2, winners=3)
    rng = np.random.default_rng(0)
    leaf = rng.dirichlet(np.ones(16), size=3)
    hits = np.zeros(4000)
    for i in range(3):
        draws = rng.choice(16, size=(4000, 5), p=leaf[i])
        hits += np.isin(draws, found.winning[i].numpy()).any(1) / 3
    exact = found.exact_pass_at_k(torch.from_numpy(leaf), (5,))["pass@5"]
    assert abs(hits.mean() - exact) < 4.5 * hits.std() / 4000**0.5  # false alarm below 1 in 100,000


# ------------------------------------------------------------------------------------------------------------------------------ file

ROWS = [{"prompt": f"What is {i}+{i}?", "answer": str(2 * i), "domain": "sum" if i % 2 else "double"} for i in range(40)]


def write(folder, name, rows=ROWS) -> str:
    path = folder / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif name.endswith("json"):
        path.write_text(json.dumps(rows))
    elif name.endswith("csv"):
        path.write_text("prompt,answer,domain\n" + "".join(f'"{r["prompt"]}",{r["answer"]},{r["domain"]}\n' for r in rows))
    else:
        import datasets

        table = datasets.Dataset.from_list(rows)
        table.to_parquet(str(path)) if name.endswith("parquet") else table.save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "folder"])
def test_file_kinds(name, tmp_path):
    found = task(f"file:{write(tmp_path, name)}", domain="domain", template="Q: {prompt}\nA:")
    sizes = {s: len(found.split(s)) for s in SPLITS}
    assert sizes == {"train": 32, "validation": 4, "test": 4} and disjoint(found)
    prompt = found.split("train")[0]
    assert prompt.text.startswith("Q: What is ") and prompt.text.endswith("\nA:") and prompt.domain in ("sum", "double")
    assert found.score(prompt, f" {prompt.row['answer']} ") == 1.0 and found.score(prompt, "x") == 0.0
    assert found.demonstration(prompt, None) == prompt.row["answer"]


@pytest.mark.parametrize("split_by", ["share", "hash"])
def test_file_rows_with_the_same_prompt_stay_together(split_by, tmp_path):
    found = task(f"file:{write(tmp_path, 'a.jsonl', [dict(r, answer=str(k)) for r in ROWS for k in range(3)])}", split_by=split_by, test=0.3)
    assert disjoint(found) and sum(len(found.split(s)) for s in SPLITS) == 120
    assert len(found.split("test")) == 36 if split_by == "share" else 0 < len(found.split("test")) < 120


def test_file_hash_split_moves_no_old_row(tmp_path):
    few = {p.text for p in task(f"file:{write(tmp_path, 'few.jsonl', ROWS[:30])}", split_by="hash", test=0.3).split("test")}
    all_ = {p.text for p in task(f"file:{write(tmp_path, 'all.jsonl')}", split_by="hash", test=0.3).split("test")}
    assert few == {t for t in all_ if t in {r["prompt"] for r in ROWS[:30]}}


def test_file_splits_of_their_own(tmp_path):
    train, test = write(tmp_path, "a.jsonl", ROWS[:30]), write(tmp_path, "b.csv", ROWS[30:])
    found = task(f"file:{train}", test=test, validation=0)
    assert len(found.split("train")) == 30 and len(found.split("test")) == 10
    overlapping = task(f"file:{train}", test=write(tmp_path, "c.jsonl", ROWS[29:]), validation="0")
    assert "also stands in another split" in message(lambda: overlapping.split("test"))


def test_file_messages_and_chat(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    path = write(tmp_path, "a.jsonl", [{"turns": turns, "answer": 2}])
    prompt = task(f"file:{path}", messages="turns", validation=0, test=0).split("train")[0]
    assert prompt.messages == turns and prompt.text is None
    prompt = task(f"file:{write(tmp_path, 'b.jsonl')}", format="chat").split("train")[0]
    assert prompt.messages[0]["role"] == "user"
    bad = write(tmp_path, "c.jsonl", [{"turns": "hello", "answer": 2}])
    assert "row 1: column 'turns' must be a list of turns" in message(lambda: task(f"file:{bad}", messages="turns").split("train"))


@pytest.mark.parametrize("match, right, wrong", [
    ("exact", ["0.5", "<answer>0.5</answer>"], ["1/2", "it is 0.5"]),
    ("number", ["it is 0.5.", "0.50"], ["1/2", "0.5 or 0.6", ""]),
    ("math", ["1/2", r"\boxed{\frac{1}{2}}", "it is 0.5"], ["2", "no idea"]),
])
def test_file_matches(match, right, wrong, tmp_path):
    found = task(f"file:{write(tmp_path, 'a.jsonl', [{'prompt': 'half?', 'answer': '0.5'}])}", match=match, validation=0, test=0)
    prompt = found.split("train")[0]
    assert [found.score(prompt, t) for t in right + wrong] == [1.0] * len(right) + [0.0] * len(wrong)


def test_file_mistakes(tmp_path):
    def split(path, **changes):
        return message(lambda: task(f"file:{path}", **changes).split("train"))

    assert "does not exist" in split(tmp_path / "none.jsonl")
    assert "holds no rows" in split(write(tmp_path, "empty.jsonl", []))
    assert "holds no rows" in split(write(tmp_path, "empty.json", []))
    assert "holds no rows" in split(write(tmp_path, "empty.csv", []))
    assert "no column 'question' (task.prompt); there are: prompt, answer, domain" in split(write(tmp_path, "a.jsonl"), prompt="question")
    assert "unknown kind '.xlsx'" in split(write(tmp_path, "a.json").replace("a.json", "") + _touch(tmp_path / "b.xlsx"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": 1}\n\n{"prompt": "b", \n')
    assert "broken.jsonl line 3: not JSON" in split(tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    assert "line 1: a list; expected an object" in split(tmp_path / "list.jsonl")
    (tmp_path / "cells.csv").write_text("prompt,answer\na,1\nb,2,3\n")
    assert "cells.csv line 3: 3 cells; the header has 2" in split(tmp_path / "cells.csv")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in split(tmp_path / "bytes.jsonl")
    assert "row 2: column 'answer' is missing" in split(write(tmp_path, "hole.jsonl", [ROWS[0], {"prompt": "b"}]))
    assert "row 2: column 'answer' is empty" in split(write(tmp_path, "null.jsonl", [ROWS[0], {"prompt": "b", "answer": None}]))
    assert "row 1: column 'prompt' must be text, and is 5" in split(write(tmp_path, "int.jsonl", [{"prompt": 5, "answer": 1}]))
    assert "no rows for train (2 rows" in split(write(tmp_path, "two.jsonl", ROWS[:2]))
    assert "must hold {prompt}" in message(lambda: task("file:a.jsonl", template="Q:"))
    assert "leave no rows to train on" in message(lambda: task("file:a.jsonl", validation=0.5, test=0.5))
    (tmp_path / "bad.parquet").write_text("no parquet")
    assert "bad.parquet' cannot be read" in split(tmp_path / "bad.parquet")


def _touch(path) -> str:
    path.write_text("")
    return path.name


def test_file_csv_cells_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer\n"a, ""b""\nc",007\n')
    prompt = task(f"file:{tmp_path / 'a.csv'}", validation=0, test=0).split("train")[0]
    assert prompt.text == 'a, "b"\nc' and prompt.row["answer"] == "007"


def test_file_without_answers(tmp_path):
    found = task(f"file:{write(tmp_path, 'a.jsonl', [{'prompt': 'Write a poem.'}])}", "answer=none", validation=0, test=0)
    prompt = found.split("train")[0]
    with pytest.raises(RunStopped, match="no answers"):
        found.score(prompt, "x")
    assert found.gives == frozenset() and "no demonstrations" in message(lambda: found.demonstration(prompt, None))


def test_file_number_match_on_words_names_the_prompt(tmp_path):
    found = task(f"file:{write(tmp_path, 'a.jsonl', [{'prompt': 'x', 'answer': 'five'}])}", match="number", validation=0, test=0)
    with pytest.raises(RunStopped, match="prompt 'a/1': the answer 'five' holds no number"):
        found.score(found.split("train")[0], "5")


def test_file_is_read_again_when_it_changes(tmp_path):
    path = write(tmp_path, "a.jsonl", ROWS[:10])
    assert len(task(f"file:{path}", test=0, validation=0).split("train")) == 10
    write(tmp_path, "a.jsonl", ROWS)
    assert len(task(f"file:{path}", test=0, validation=0).split("train")) == 40
