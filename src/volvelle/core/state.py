"""Checkpoints without pickle: tensors go to safetensors, everything else to JSON.

A state is a nest of dicts, lists and tuples over tensors, NumPy arrays, bytes (foreign blobs), numbers, strings,
booleans and None. Anything else is refused by its path.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .errors import UserError


def _pack(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    def keep(kind: str, tensor: torch.Tensor) -> dict[str, str]:
        if tensor.is_complex():
            raise UserError(f"state {path!r}: complex numbers cannot be checkpointed; store real and imaginary parts")
        name = path if path not in tensors else f"{path}#{len(tensors)}"  # {"a": {"b": x}, "a/b": y} spell one path
        tensors[name] = tensor
        return {kind: name}

    if isinstance(value, torch.Tensor):
        return keep("$tensor", value.detach().cpu().contiguous().clone())
    if isinstance(value, np.ndarray):
        try:
            return keep("$array", torch.from_numpy(value.copy(order="C")))
        except (TypeError, ValueError):
            raise UserError(f"state {path!r}: an array of dtype {value.dtype} cannot be checkpointed; use numbers or booleans") from None
    if isinstance(value, (bytes, bytearray)):
        return keep("$bytes", torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.zeros(0, dtype=torch.uint8))
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _pack(v, f"{path}/{k}", tensors) for k, v in value.items()}
        if all(isinstance(k, (int, str)) for k in value):
            return {"$items": [[k, _pack(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
        raise UserError(f"state {path!r}: dictionary keys must be strings or integers")
    if isinstance(value, tuple):
        return {"$tuple": [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"state {path!r}: a {type(value).__name__} cannot be checkpointed; "
                    "accepted: tensors, arrays, bytes, numbers, strings, booleans, None, and dicts, lists and tuples of these")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, inner), = value.items()
        if key == "$tensor":
            return tensors[inner]
        if key == "$array":
            return tensors[inner].numpy()
        if key == "$bytes":
            return bytes(tensors[inner].numpy().tobytes())
        if key == "$items":
            return {k: _unpack(v, tensors) for k, v in inner}
        if key == "$tuple":
            return tuple(_unpack(v, tensors) for v in inner)
        if key == "$float":
            return float(inner)
    return {k: _unpack(v, tensors) for k, v in value.items()}


def save_state(folder: Path, state: dict) -> None:
    """Write `state` into `folder` as tensors.safetensors and state.json."""
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(state, "", tensors)
    text = json.dumps(structure, allow_nan=False)
    save_file(tensors, str(folder / "tensors.safetensors"))
    (folder / "state.json").write_text(text, encoding="utf-8")


def load_state(folder: Path) -> dict:
    """Read what `save_state` wrote. Nothing is unpickled."""
    tensors = load_file(str(folder / "tensors.safetensors"))
    return _unpack(json.loads((folder / "state.json").read_text(encoding="utf-8")), tensors)


def fingerprint(state: Any) -> str:
    """A digest of a state, equal exactly when the states are bit for bit equal."""
    import hashlib

    tensors: dict[str, torch.Tensor] = {}
    hasher = hashlib.sha256(json.dumps(_pack(state, "", tensors), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))  # one number expanded has stride 0
        hasher.update(flat.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def encode_rng(generator: torch.Generator | np.random.Generator) -> dict:
    if isinstance(generator, torch.Generator):
        return {"torch": base64.b64encode(generator.get_state().numpy().tobytes()).decode()}
    state = generator.bit_generator.state
    return {"numpy": json.dumps(state, sort_keys=True)}


def restore_rng(generator: torch.Generator | np.random.Generator, state: dict) -> None:
    if isinstance(generator, torch.Generator):
        raw = bytearray(base64.b64decode(state["torch"]))
        generator.set_state(torch.frombuffer(raw, dtype=torch.uint8).clone())
    else:
        generator.bit_generator.state = json.loads(state["numpy"])


@contextlib.contextmanager
def own_numbers(generators: dict[str, torch.Generator | np.random.Generator], rank: int, count: int):
    """Each of `count` processes gets numbers of its own from the named generators; afterwards all have moved on by one draw, alike."""
    if count == 1:
        yield
        return
    after = {}
    for name, generator in generators.items():
        if isinstance(generator, torch.Generator):
            seed = int(torch.randint(2**62, (), generator=generator))
            after[name] = encode_rng(generator)
            generator.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]))
        else:
            seed = int(generator.integers(2**62))
            after[name] = encode_rng(generator)
            generator.bit_generator.state = type(generator.bit_generator)([seed, rank]).state
    yield
    if new := set(generators) - set(after):
        raise RuntimeError(f"the generator {sorted(new)[0]!r} was first asked for while work was dealt out; ask for it in start()")
    for name, state in after.items():
        restore_rng(generators[name], state)
