"""Checkpoint files: what goes in comes out bit for bit, nothing is unpickled, anything else is refused by its path."""

import ast
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SOURCE
from hypothesis import given, settings
from hypothesis import strategies as st

from volvelle.core.errors import UserError
from volvelle.core.state import encode_rng, fingerprint, load_state, restore_rng, save_state

NUMPY = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
TORCH = [torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
shapes = st.sampled_from([(), (0,), (3,), (2, 0), (2, 3), (1, 2, 2)])


def equal(a, b) -> bool:
    """Same types, same shapes, same bits (any NaN equals any other, -0.0 differs from 0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)) \
            if a.numel() else a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b] and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float):
        return (a != a and b != b) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(TORCH)), draw(shapes)
    raw = draw(st.lists(st.integers(0, 1 if dtype == torch.bool else 100), min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(raw, dtype=dtype).reshape(shape)


@st.composite
def arrays(draw):
    shape = draw(shapes)
    raw = draw(st.lists(st.integers(0, 100), min_size=math.prod(shape), max_size=math.prod(shape)))
    return np.array(raw).astype(draw(st.sampled_from(NUMPY))).reshape(shape)


keys = st.text("ab/$#1", max_size=4) | st.integers(-3, 3)
leaves = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=6) | tensors() | arrays())
states = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=4),
                      max_leaves=12)


@settings(max_examples=60)
@given(st.dictionaries(keys, states, max_size=4))
def test_any_state_comes_back_bit_for_bit(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, state)
    again = load_state(folder)
    assert equal(again, state)
    assert fingerprint(again) == fingerprint(state)


def test_special_values(tmp_path):
    state = {"nan": math.nan, "inf": [math.inf, -math.inf], "keys": {1: "a", "1": "b", -2: torch.ones(1)}, "blob": b"\x00\xff", "zero": np.array(3.0),
             "tiny": 5e-324, "big": 2**200, "slash": {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1)}, "f32": np.float32(0.1), "word": "\ud83d \n\u2028",
             "strided": torch.arange(6).reshape(2, 3).T, "tuple": (1, (2,))}
    save_state(tmp_path, state)
    assert equal(load_state(tmp_path), state | {"f32": float(np.float32(0.1))})


def test_views_and_gradients_are_copied(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    save_state(tmp_path, {"a": weight, "b": weight[:, 0]})
    assert load_state(tmp_path)["b"].equal(torch.ones(2)) and not load_state(tmp_path)["a"].requires_grad


class Odd:
    pass


@pytest.mark.parametrize("value", [Odd(), {1, 2}, print, np.array(["a"]), np.array([Odd()], dtype=object), {(1, 2): 3}, {1.5: 2}, np.datetime64("2020"),
                                   np.array([1 + 2j]), torch.tensor([1j]), torch.nn.Linear(1, 1), range(3), np.zeros(2, dtype=np.longdouble)],
                         ids=lambda v: type(v).__name__)
def test_anything_else_is_refused_by_its_path(tmp_path, value):
    with pytest.raises(UserError) as error:
        save_state(tmp_path, {"run": {"live": {"sampler": [0, value]}}})
    assert "/run/live/sampler/1" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_every_bit():
    base = {"a": torch.zeros(3), "n": 0.0, "l": [1, 2]}
    other = [{**base, "a": torch.tensor([0.0, 0.0, -0.0])}, {**base, "n": -0.0}, {**base, "l": (1, 2)}, {**base, "a": torch.zeros(3, 1)},
             {**base, "a": torch.zeros(3, dtype=torch.float64)}, {**base, "a": np.zeros(3, np.float32)}, {**base, "l": [2, 1]}, {**base, "n": False}]
    assert len({fingerprint(s) for s in [base, *other]}) == 1 + len(other)
    assert fingerprint({"a": torch.zeros(3), "l": [1, 2], "n": 0.0}) == fingerprint(base)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(tmp_path, file):
    save_state(tmp_path, {"a": torch.zeros(1)})
    (tmp_path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(Exception):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_source_unpickles_nothing():
    """No module imports a pickling library or calls torch.load, np.load(allow_pickle) or yaml.load with an unsafe loader."""
    found = []
    for path in (SOURCE / "volvelle").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{path}: {n}" for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")]
            if isinstance(node, ast.Call):
                text = ast.unparse(node)
                if text.startswith("torch.load(") or "allow_pickle=True" in text or (text.startswith("yaml.load(") and "BaseLoader" not in text
                                                                                    and "SafeLoader" not in text):
                    found.append(f"{path}: {text}")
    assert found == []


def test_random_generators_go_on_where_they_were():
    for make, draw in ((lambda: np.random.default_rng(3), lambda g: g.normal(size=5).tobytes()),
                       (lambda: torch.Generator().manual_seed(3), lambda g: torch.rand(5, generator=g).numpy().tobytes())):
        one, other = make(), make()
        draw(one)
        saved = json.loads(json.dumps(encode_rng(one)))
        expected = draw(one)
        restore_rng(other, saved)
        assert draw(other) == expected
