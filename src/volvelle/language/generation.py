"""Items of a reasoning-gym dataset that depend on nothing but its name, configuration and seed.

A few generators look at the order of a set of strings, which differs from process to process. For those this file is run as a program
of its own with a fixed hash seed (it therefore imports nothing of volvelle). Others draw from the global generators of `random` and
NumPy: these are seeded for every item and put back afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import subprocess
import sys

import numpy as np

CHUNK = 256  # items of one generator object; some generators lay out all their items when they are made
HASH_DEPENDENT = frozenset({"intermediate_integration", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note",
                            "word_ladder"})  # measured by comparing processes with different hash seeds


@contextlib.contextmanager
def quiet(seed: int):
    """Global generators seeded inside and restored after; what the generator prints is swallowed."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@functools.lru_cache(maxsize=16)
def _chunk(name: str, config: str, seed: int):
    import reasoning_gym

    with quiet(seed):
        return reasoning_gym.create_dataset(name, seed=seed, size=CHUNK, **build_config(name, json.loads(config)))


def build_config(name: str, plain: dict) -> dict:
    """Plain values as the types of the dataset's configuration class."""
    from pydantic import TypeAdapter

    hints = config_types(name)
    return {k: TypeAdapter(hints[k]).validate_python(v) for k, v in plain.items()}


@functools.cache
def config_types(name: str) -> dict:
    """Field name -> type of a dataset's difficulty parameters."""
    import dataclasses
    import typing

    from reasoning_gym.factory import DATASETS

    cls = DATASETS[name][1]
    hints = typing.get_type_hints(cls)
    return {f.name: _open_tuple(hints[f.name]) for f in dataclasses.fields(cls) if f.name not in ("seed", "size")}


def _open_tuple(hint):
    """`tuple[str]` (one string), where several are meant, as `tuple[str, ...]`."""
    import typing

    args = typing.get_args(hint)
    return tuple[args[0], ...] if typing.get_origin(hint) is tuple and len(args) == 1 else hint


def generate(name: str, config: dict, seed: int, first: int, count: int) -> list[dict]:
    """Items `first` to `first + count` (of one chunk of the endless sequence) with question, answer and metadata."""
    if name in HASH_DEPENDENT and os.environ.get("PYTHONHASHSEED") != "0":
        request = json.dumps([name, config, seed, first, count])
        done = subprocess.run([sys.executable, "-P", __file__], input=request, capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONHASHSEED": "0"})
        if done.returncode:
            raise RuntimeError(f"generating {name} failed: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout)
    chunk, start = divmod(first, CHUNK)
    dataset = _chunk(name, json.dumps(config, sort_keys=True), seed + chunk * CHUNK)
    items = []
    for i in range(start, start + count):
        with quiet(seed + first - start + i):
            item = dataset[i]
        items.append({k: item[k] for k in ("question", "answer", "metadata")})
    return items


def scorer(name: str, config: dict):
    """A dataset object to score answers with."""
    return _chunk(name, json.dumps(config, sort_keys=True), 0)


if __name__ == "__main__":
    print(json.dumps(generate(*json.load(sys.stdin))))
