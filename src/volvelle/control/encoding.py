"""From any Gymnasium space to what networks take: one vector, images, codes; and actions back again."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from volvelle.core.errors import UserError

from .spaces import Actions, Layout, Spec

LARGEST = 4096  # one-hot columns of a single discrete observation


class Vocabulary:
    """Codes of strings seen in observations, in the order of their first appearance; unknown ones are -1 once it is closed."""

    def __init__(self, words: list[str] = (), closed: bool = False):
        self.codes, self.closed = {w: i for i, w in enumerate(words)}, closed

    def __call__(self, word: str) -> int:
        if word not in self.codes and not self.closed:
            self.codes[word] = len(self.codes)
        return self.codes.get(word, -1)

    def copy(self) -> Vocabulary:
        return Vocabulary(list(self.codes), closed=True)


class Coded(spaces.MultiDiscrete):
    """Whole numbers that name categories. They are encoded as codes, in `categorical` columns, instead of one-hot."""


def _leaves(space: gym.Space, name: str, what: str) -> list[tuple[str, gym.Space]]:
    if isinstance(space, spaces.Dict):
        return [leaf for k, s in space.spaces.items() for leaf in _leaves(s, f"{name}/{k}".lstrip("/"), what)]
    if isinstance(space, spaces.Tuple):
        return [leaf for k, s in enumerate(space.spaces) for leaf in _leaves(s, f"{name}/{k}".lstrip("/"), what)]
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text)):
        raise UserError(f"{what} space {type(space).__name__}{f' ({name})' if name else ''} is not supported; "
                        "accepted: Box, Discrete, MultiDiscrete, MultiBinary, Text, and Dict and Tuple of these")
    return [(name or "all", space)]


def _values(space: gym.Space, value: Any) -> list[Any]:
    """The leaves of a value, in the order of `_leaves`."""
    if isinstance(space, spaces.Dict):
        return [leaf for k, s in space.spaces.items() for leaf in _values(s, value[k])]
    if isinstance(space, spaces.Tuple):
        return [leaf for s, v in zip(space.spaces, value, strict=True) for leaf in _values(s, v)]
    return [value]


def image_shape(space: gym.Space) -> tuple[tuple[int, int, int], bool] | None:
    """(channels, height, width) and whether the channels are last, for boxes with three axes and byte boxes with two."""
    if not isinstance(space, spaces.Box):
        return None
    if len(space.shape) == 2 and space.dtype == np.uint8:
        return (1, *space.shape), False
    if len(space.shape) != 3:
        return None
    a, b, c = space.shape
    return ((c, a, b), True) if c <= a else ((a, b, c), False)


class EncodeObservation(gym.ObservationWrapper):
    """Numbers, codes and one-hot columns in one float32 vector; images channels first under their own names."""

    def __init__(self, env: gym.Env, vocabulary: Vocabulary):
        super().__init__(env)
        self.space, self.vocabulary = env.observation_space, vocabulary
        self.leaves = _leaves(self.space, "", "observation")
        self.images = {name: found for name, s in self.leaves if (found := image_shape(s))}
        if "vector" in self.images and len(self.leaves) > 1:
            raise UserError("an image observation is called 'vector', the name of the flat part; give it another name")
        sizes, self.categorical, place = [], [], 0
        for name, leaf in self.leaves:
            if name in self.images:
                sizes.append(0)
                continue
            coded = isinstance(leaf, (spaces.Text, Coded))
            size = (1 if isinstance(leaf, spaces.Text) else int(leaf.nvec.size)) if coded else spaces.flatdim(leaf)
            if not coded and isinstance(leaf, (spaces.Discrete, spaces.MultiDiscrete)) and size > LARGEST:
                raise UserError(f"observation {name!r} has {size} discrete values; one-hot columns are made up to {LARGEST}: encode it as numbers")
            if coded:
                self.categorical.extend(range(place, place + size))
            sizes.append(size)
            place += size
        self.sizes, self.width = sizes, place
        found = {"vector": spaces.Box(-np.inf, np.inf, (place,), np.float32)} if place else {}
        for name, (shape, _) in self.images.items():
            dtype = dict(self.leaves)[name].dtype
            dtype = np.dtype(np.float32) if dtype.kind == "f" else dtype
            found[name] = spaces.Box(0, 1 if dtype == bool else 255, shape, dtype) if dtype.kind != "f" else spaces.Box(-np.inf, np.inf, shape, dtype)
        self.single = not place and len(self.images) == 1 or not self.images
        self.observation_space = next(iter(found.values())) if self.single else spaces.Dict(found)

    def observation(self, observation):
        vector, found, place = np.empty(self.width, np.float32), {}, 0
        for (name, leaf), size, value in zip(self.leaves, self.sizes, _values(self.space, observation), strict=True):
            if name in self.images:
                shape, last = self.images[name]
                found[name] = np.moveaxis(np.asarray(value), -1, 0) if last else np.asarray(value).reshape(shape)
            elif isinstance(leaf, spaces.Text):
                vector[place] = self.vocabulary(value)
            elif isinstance(leaf, (spaces.Box, Coded)):
                vector[place : place + size] = np.asarray(value).reshape(-1)
            else:
                vector[place : place + size] = spaces.flatten(leaf, value)
            place += size
        if self.single:
            return next(iter(found.values())) if found else vector
        return ({"vector": vector} if self.width else {}) | found


class DecodeAction(gym.ActionWrapper):
    """Codes and numbers back to the environment's own action. Continuous numbers come first, codes last."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.space = env.action_space
        self.leaves = _leaves(self.space, "", "action")
        low, high, codes = [], [], []
        for name, leaf in self.leaves:
            if isinstance(leaf, spaces.Box) and leaf.dtype.kind == "f":
                low += leaf.low.reshape(-1).tolist()
                high += leaf.high.reshape(-1).tolist()
            elif isinstance(leaf, (spaces.Box, spaces.Text)):
                raise UserError(f"action {name!r} is a {leaf}; accepted: Box of real numbers, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these")
            else:
                codes += _codes(leaf)
        self.numbers = len(low)
        plain = isinstance(self.space, spaces.Discrete)
        self.actions = Actions(tuple(codes), tuple(low), tuple(high), plain)
        if plain:
            self.action_space = spaces.Discrete(codes[0])
        elif not low:
            self.action_space = spaces.MultiDiscrete(codes)
        else:
            self.action_space = spaces.Box(np.array(low + [0] * len(codes), np.float32), np.array(high + [c - 1 for c in codes], np.float32))

    def action(self, action):
        place, code = 0, self.numbers
        flat = np.atleast_1d(action)
        found = []
        for _, leaf in self.leaves:
            if isinstance(leaf, spaces.Box):
                size = int(np.prod(leaf.shape))
                found.append(flat[place : place + size].reshape(leaf.shape).astype(leaf.dtype))
                place += size
            else:
                size = len(_codes(leaf))
                part = np.rint(flat[code : code + size]).astype(np.int64)
                code += size
                if isinstance(leaf, spaces.Discrete):
                    found.append(int(part[0] + leaf.start))
                elif isinstance(leaf, spaces.MultiDiscrete):
                    found.append((part.reshape(leaf.shape) + leaf.start).astype(leaf.dtype))
                else:
                    found.append(part.reshape(leaf.shape).astype(leaf.dtype))
        return _rebuild(self.space, iter(found))


def _codes(leaf: gym.Space) -> list[int]:
    if isinstance(leaf, spaces.Discrete):
        return [int(leaf.n)]
    if isinstance(leaf, spaces.MultiDiscrete):
        return [int(n) for n in leaf.nvec.reshape(-1)]
    return [2] * int(np.prod(leaf.shape))


def _rebuild(space: gym.Space, parts):
    if isinstance(space, spaces.Dict):
        return {k: _rebuild(s, parts) for k, s in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_rebuild(s, parts) for s in space.spaces)
    return next(parts)


def encoded(env: gym.Env, vocabulary: Vocabulary | None = None) -> tuple[gym.Env, Spec]:
    """The environment with encoded observations and actions, and what agents must know of it. Simple ones are left unwrapped.

    An environment whose `goal_width` is g commands a goal by the last g numbers of its observation.
    """
    goal = getattr(env, "goal_width", 0)
    observations, actions = env.observation_space, env.action_space
    categorical: tuple[int, ...] = ()
    if not (isinstance(observations, spaces.Box) and len(observations.shape) == 1):
        env = EncodeObservation(env, vocabulary if vocabulary is not None else Vocabulary())
        categorical = tuple(env.categorical)
    layout = Layout.of(env.observation_space)
    simple = (isinstance(actions, spaces.Discrete) and actions.start == 0) or (
        isinstance(actions, spaces.Box) and len(actions.shape) == 1 and actions.dtype == np.float32) or (
        isinstance(actions, spaces.MultiDiscrete) and actions.nvec.ndim == 1 and not actions.start.any())
    if simple:
        kind = Actions.of(actions)
    else:
        env = DecodeAction(env)
        kind = env.actions
    return env, Spec(Layout(layout.vector, layout.images, layout.dtypes, categorical, goal), kind)


class _Shown(gym.Env):
    """An environment with an observation space and nothing else, so that recorded observations are encoded as played ones are."""

    def __init__(self, space: gym.Space):
        self.observation_space, self.action_space = space, spaces.Discrete(1)


def encode_rows(space: gym.Space, rows: Any) -> Any:
    """Recorded observations of a space, all rows at once, as `EncodeObservation` encodes single ones; with rows=None the encoded space.

    rows: [n, ...], or a nest of such. -> [n, size] float32, or a dict of parts. UserError for text.
    """
    plain = isinstance(space, spaces.Box) and len(space.shape) == 1
    encoder = None if plain else EncodeObservation(_Shown(space), Vocabulary())
    if encoder is not None and encoder.categorical:
        raise UserError("recorded observations of text are not supported; encode them as numbers")
    if rows is None:
        return spaces.Box(-np.inf, np.inf, space.shape, np.float32) if plain else encoder.observation_space
    if plain:
        return np.asarray(rows, np.float32)
    vectors, found = [], {}
    for (name, leaf), value in zip(encoder.leaves, _values(space, rows), strict=True):
        value = np.asarray(value)
        if name in encoder.images:
            shape, last = encoder.images[name]
            image = np.moveaxis(value, -1, 1) if last else value.reshape(-1, *shape)
            found[name] = image.astype(np.float32) if image.dtype == np.float64 else image
        elif isinstance(leaf, spaces.Discrete):
            vectors.append(np.eye(leaf.n, dtype=np.float32)[value - leaf.start])
        elif isinstance(leaf, spaces.MultiDiscrete):
            codes = (value - leaf.start).reshape(len(value), -1)
            vectors += [np.eye(n, dtype=np.float32)[codes[:, i]] for i, n in enumerate(leaf.nvec.reshape(-1))]
        else:
            vectors.append(value.reshape(len(value), -1).astype(np.float32))
    if encoder.single:
        return np.concatenate(vectors, -1) if vectors else next(iter(found.values()))
    return ({"vector": np.concatenate(vectors, -1)} if vectors else {}) | found
