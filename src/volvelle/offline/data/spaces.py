"""Gymnasium spaces as plain data, in the words of Minari's metadata."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space, spaces

from volvelle.core.errors import UserError


def space_data(space: Space) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), "low": space.low.tolist(), "high": space.high.tolist()}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "dtype": "int64", "start": int(space.start), "n": int(space.n)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "dtype": str(space.dtype), "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "subspaces": {k: space_data(s) for k, s in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "subspaces": [space_data(s) for s in space.spaces]}
    raise UserError(f"a {type(space).__name__} space cannot be written; accepted: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple")


def restore_space(data: dict[str, Any]) -> Space:
    kind = data.get("type")
    if kind == "Box":
        return spaces.Box(np.array(data["low"], data["dtype"]), np.array(data["high"], data["dtype"]), tuple(data["shape"]), data["dtype"])
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data.get("start", 0))
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(data["nvec"], dtype=data.get("dtype", "int64"), start=data.get("start"))
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["n"])
    if kind == "Dict":
        return spaces.Dict({k: restore_space(s) for k, s in data["subspaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([restore_space(s) for s in data["subspaces"]])
    if kind == "Text":
        return spaces.Text(data["max_length"], min_length=data["min_length"], charset=data["charset"])
    raise UserError(f"space of type {kind!r} in the metadata; accepted: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple, Text")
