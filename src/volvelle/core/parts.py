"""Parts and recipes: frozen descriptions that print, compare, hash and round-trip through YAML.

A *part* describes one exchangeable piece; its fields are its hyper-parameters. A *slot* is the base class of parts that can stand
in for one another. A *recipe* is a part whose fields are parts. Mutable state lives in what `start(run)` returns, never in a part.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Union

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from .errors import UserError, unknown
from .files import digest, to_yaml
from .registry import Method, registry

NEEDS = frozenset({"old", "behaviour", "reference", "entropy", "mean_logp", "values", "groups", "advantages", "binary_rewards",
                   "stepwise", "support", "images", "scalar_head"})
permitted: ContextVar[Callable[[str, str], None] | None] = ContextVar("permitted", default=lambda module, target: None)
"""Called with (module, target) before a function is imported by name; raises where that is not allowed. None while a configuration is only looked
at: functions then stay names (see run.read_config)."""


class Part:
    """A frozen description. Subclass a slot, decorate with `@part("name")`, give fields with defaults.

    needs: what the part asks the loop for, from the closed vocabulary `NEEDS`; gives: what a sampler or task provides.
    """

    slot: ClassVar[str | None] = None
    call: ClassVar[tuple[str, ...] | None] = None  # positional parameters of a plain function that can stand in this slot
    part_name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def start(self, run) -> Any:
        """The live object that the loop calls. A stateless part is its own live object."""
        return self

    def check(self, recipe: "Recipe") -> None:
        """Raise UserError for facts across parts that make the recipe meaningless."""

    def __post_init__(self):
        for name, annotation in annotations_of(type(self)).items():
            object.__setattr__(self, name, coerce(annotation, getattr(self, name), name))

    def __eq__(self, other):
        return isinstance(other, Part) and type(self) is type(other) and self.digest == other.digest

    def __hash__(self):
        return hash(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        return digest(to_yaml(to_config(self)))

    def replace(self, **changes) -> "Part":
        """A copy with some fields changed; field values may be parts, names of parts, functions or numbers."""
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise unknown("field", name, known, f" of {self.part_name or type(self).__name__}")
        return dataclasses.replace(self, **changes)

    def override(self, *words: str, **paths) -> "Part":
        """A copy with dotted overrides applied: `override("advantage=ngrpo", "advantage.max_reward=1")`."""
        given = parse_overrides(words)
        if both := set(given) & set(paths):
            raise UserError(f"override {min(both)} is given twice")
        return apply_overrides(self, given | paths)


class Recipe(Part):
    """A part made of parts that can be trained: `start(run)` returns a Learner (see core/trainer.py)."""

    slot: ClassVar[str] = "recipe"
    wing: ClassVar[str] = ""

    def __call__(self, **changes) -> "Recipe":
        return self.replace(**changes)

    def validate(self, task=None) -> None:
        """Every check that can be made before a run directory exists."""
        for _, value in walk(self):
            value.check(self)


def walk(value: Any, path: str = ""):
    """Yield (path, part) for every part below and including `value`."""
    if isinstance(value, Part):
        yield path, value
        for f in fields(value):
            yield from walk(getattr(value, f.name), f"{path}.{f.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, f"{path}.{key}".lstrip("."))


def slot_of(cls: type) -> type:
    """The slot a part class belongs to: the class that declared `slot`."""
    for base in cls.__mro__:
        if base is not Part and "slot" in base.__dict__:
            return base
    raise TypeError(f"{cls.__name__} subclasses no slot")


def part(name: str):
    """Class decorator: make a frozen dataclass and register it under `name` in its slot."""

    def wrap(cls):
        cls = dataclass(frozen=True, eq=False)(cls)
        cls.part_name = name
        stray = {word for words in (cls.needs, cls.gives) if isinstance(words, frozenset) for word in words} - NEEDS
        if stray:
            raise TypeError(f"{cls.__name__}: {sorted(stray)} are not in the vocabulary of needs")
        registry.add_part(slot_of(cls), name, cls)
        return cls

    return wrap


def preset(name: str, value: Part) -> Part:
    """Register a part value under a further name in its slot."""
    registry.add_part(slot_of(type(value)), name, value)
    return value


def method(name: str, recipe: Recipe, *, title: str, source: str, claim: Any = None, module: str | None = None) -> Recipe:
    """Register a recipe as a named method of its wing; returns the recipe."""
    module = module or inspect.currentframe().f_back.f_globals["__name__"]
    registry.add_method(Method(name, recipe.wing, recipe, title, source, module, claim))
    return recipe


# ---------------------------------------------------------------------------------------------- annotations and coercion

@functools.cache
def annotations_of(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls)}


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    return [annotation]


def slots_in(annotation: Any) -> list[type]:
    """The slots that an annotation admits (`Critic | None` -> [Critic])."""
    return [m for m in _members(annotation) if isinstance(m, type) and issubclass(m, Part)]


def slots_in_dict(annotation: Any) -> list[type]:
    """The slots that the values of a `dict[str, Slot]` annotation admit."""
    for member in _members(annotation):
        if typing.get_origin(member) is dict:
            return slots_in(typing.get_args(member)[1])
    return []


@functools.cache
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))


def describe(annotation: Any) -> str:
    """An annotation as a user would say it."""
    words = []
    for member in _members(annotation):
        if member is type(None):
            words.append("none")
        elif isinstance(member, type) and issubclass(member, Part):
            words.append(f"a {member.slot} part ({', '.join(sorted(registry.table(member)))})")
        elif typing.get_origin(member) is typing.Literal:
            words.append(" | ".join(map(str, typing.get_args(member))))
        elif typing.get_origin(member) is typing.Annotated:
            base, *extra = typing.get_args(member)
            limits = [str(m) for e in extra for m in getattr(e, "metadata", [e])]
            words.append(f"{describe(base)} with {', '.join(limits)}")
        elif typing.get_origin(member):
            words.append(str(member).replace("typing.", ""))
        else:
            words.append(getattr(member, "__name__", str(member)))
    return " or ".join(words)


def coerce(annotation: Any, value: Any, path: str) -> Any:
    """`value` as the annotation wants it: parts from names or functions, numbers from text. UserError names the path."""
    members = _members(annotation)
    slots = slots_in(annotation)
    if isinstance(value, str) and type(None) in members and value.lower() in ("none", "null"):
        return None
    if isinstance(value, Part) and slots:
        if any(isinstance(value, s) for s in slots) or (isinstance(value, Call) and any(s.call is not None for s in slots)):
            return value.bound(next(s for s in slots if s.call is not None)) if isinstance(value, Call) else value
        raise UserError(f"{path}: a {type(value).slot} part ({value.part_name}) does not fit; expected {describe(annotation)}")
    if slots:
        plain = [m for m in members if m not in slots]
        if isinstance(value, Mapping) and ("part" in value or "call" in value):
            return from_config(annotation, value, path)
        if callable(value) and not isinstance(value, type):
            for s in slots:
                if s.call is not None:
                    return Call(value).bound(s)
        if plain and not (plain == [type(None)] and value is not None):
            try:
                return coerce(Union[tuple(plain)], value, path)
            except UserError as error:
                if not isinstance(value, str) or not any(value in registry.table(s) for s in slots):
                    raise UserError(str(error).replace(describe(Union[tuple(plain)]), describe(annotation))) from None
        if isinstance(value, str):
            return build(slots, value, {}, path)
        for s in slots:
            if (made := getattr(s, "from_object", lambda value: None)(value)) is not None:
                return made
        raise UserError(f"{path}={value!r}: expected {describe(annotation)}")
    if inner := slots_in_dict(annotation):
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={value!r}: expected a mapping from names to {inner[0].slot} parts")
        value_annotation = typing.get_args(next(m for m in members if typing.get_origin(m) is dict))[1]
        return {k: coerce(value_annotation, v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, str) and value[:1] in "[{" and not any(m is str for m in members):
        try:
            value = yaml.load(value, Loader=yaml.BaseLoader)  # every scalar stays text; the annotation decides its type
        except yaml.YAMLError as error:
            raise UserError(f"{path}={value!r}: not a YAML list or mapping") from error
    try:
        return _adapter(annotation).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}={value!r}: expected {describe(annotation)} ({first['msg'].lower()})") from None


# ---------------------------------------------------------------------------------------------- plain functions as parts

@dataclass(frozen=True, eq=False)
class Call(Part):
    """A plain function as a part. `target` is a function or "module:function"; keyword-only parameters are its fields."""

    target: Any = None
    kwargs: dict = dataclasses.field(default_factory=dict)
    for_slot: Any = None
    slot: ClassVar[str] = "call"

    def __post_init__(self):
        pass

    @property
    def part_name(self) -> str:
        return self.name

    @functools.cached_property
    def function(self) -> Callable:
        if callable(self.target):
            return self.target
        module, _, name = self.target.partition(":")
        permitted.get()(module, self.target)
        try:
            found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except ModuleNotFoundError as error:
            raise UserError(f"function {self.target!r}: no module named {error.name!r}") from error
        except AttributeError:
            raise UserError(f"function {self.target!r}: module {module!r} has no {name!r}") from None
        if not callable(found):
            raise UserError(f"function {self.target!r}: is a {type(found).__name__}, not a function")
        return found

    @property
    def name(self) -> str:
        if isinstance(self.target, str):
            return self.target
        named = self.target if hasattr(self.target, "__qualname__") else type(self.target)
        return f"{named.__module__}:{named.__qualname__}"

    @functools.cached_property
    def portable(self) -> bool:
        """Whether the name leads back to this very function, in another program too."""
        if isinstance(self.target, str):
            return True
        module, _, name = self.name.partition(":")
        try:
            return module != "__main__" and functools.reduce(getattr, name.split("."), sys.modules[module]) is self.target
        except (AttributeError, KeyError):
            return False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(getattr(self.function, "needs", ()))

    def bound(self, slot: type[Part]) -> "Call":
        """Check the function's parameters against the slot's signature and its keywords against its annotations."""
        if permitted.get() is None:
            return Call(self.target, self.kwargs, slot)
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:
            raise UserError(f"function {self.name!r}: its signature cannot be read; wrap it in a Python function") from None
        positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                      and p.default is p.empty]
        if tuple(positional) != slot.call:
            raise UserError(f"function {self.name!r} takes ({', '.join(positional)}); a {slot.slot} function takes ({', '.join(slot.call)})")
        free = {p.name: p for p in parameters.values() if p.kind == p.KEYWORD_ONLY}
        named = inspect.unwrap(getattr(self.function, "func", self.function))  # inside functools.partial
        described = named if inspect.isroutine(named) else named.__init__ if isinstance(named, type) else type(named).__call__
        hints = typing.get_type_hints(described) if self.kwargs else {}
        kwargs = {}
        for key, value in self.kwargs.items():
            if key not in free:
                raise unknown("field", key, free, f" of function {self.name!r}")
            kwargs[key] = coerce(hints.get(key, Any), value, key)
        return Call(self.target, kwargs, slot)

    def start(self, run):
        return self.for_slot.from_function(functools.partial(self.function, **self.kwargs), self)

    def replace(self, **changes) -> "Call":
        return Call(self.target, {**self.kwargs, **changes}).bound(self.for_slot)


# ---------------------------------------------------------------------------------------------- YAML

def to_config(value: Any) -> Any:
    """Plain data (dicts, lists, numbers, strings) from which `from_config` rebuilds the value."""
    if isinstance(value, Call):
        if value.portable:
            return {"call": value.name, **{k: to_config(v) for k, v in value.kwargs.items()}}
        try:
            source = inspect.getsource(getattr(value.target, "func", value.target))
        except (OSError, TypeError):
            source = repr(value.target).partition(" at 0x")[0]
        return {"call": value.name, "unportable": True, "source": source}
    if isinstance(value, Part):
        return {"part": value.part_name or type(value).__name__.lower(), **{f.name: to_config(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {k: to_config(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_config(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "__fspath__"):
        return str(value)
    raise UserError(f"a {type(value).__name__} cannot be written to a configuration file")


def from_config(annotation: Any, data: Any, path: str = "") -> Any:
    """Rebuild a value of the annotated type from what `to_config` wrote."""
    slots = slots_in(annotation)
    if slots and isinstance(data, Mapping):
        data = dict(data)
        if "call" in data:
            if data.get("unportable") and permitted.get() is None:
                data = {"call": data["call"]}
            if data.get("unportable"):
                raise UserError(f"{path}: the function {data['call']!r} was defined inside a program and cannot be found again; "
                                "resume from that program with train(recipe, resume=path)")
            return coerce(annotation, Call(data.pop("call"), data), path)
        if "part" not in data:
            raise UserError(f"{path}: expected a mapping with a 'part' key")
        return build(slots, data.pop("part"), data, path)
    return coerce(annotation, data, path)


def build(slots: list[type], name: str, values: Mapping[str, Any], path: str) -> Part:
    """The part called `name` in one of the slots, with some of its fields given."""
    found = next((registry.table(s)[name] for s in slots if name in registry.table(s)), None)
    if found is None and ":" in name and (callable_slot := next((s for s in slots if s.call is not None), None)):
        return Call(name, dict(values)).bound(callable_slot)
    if found is None:
        reader = next((s for s in slots if hasattr(s, "from_text")), None)
        if reader is None:
            raise _no_part(slots, name, path)
        found = reader.from_text(name, path)
    cls = found if isinstance(found, type) else type(found)
    hints = annotations_of(cls)
    given = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown("field", f"{path}.{key}".lstrip("."), [f"{path}.{h}".lstrip(".") for h in hints], f" of {name}")
        given[key] = from_config(hints[key], value, f"{path}.{key}".lstrip("."))
    if not isinstance(found, type):
        return dataclasses.replace(found, **given)
    missing = [f.name for f in fields(cls) if f.init and f.default is MISSING and f.default_factory is MISSING and f.name not in given]
    if missing:
        raise UserError(f"{path}={name}: needs {', '.join(f'{path}.{m}' for m in missing)}")
    return cls(**given)


def _no_part(slots: list[type], name: str, path: str) -> UserError:
    elsewhere = sorted({s.slot for s, table in registry.parts.items() if name in table})
    names = {n for s in slots for n in registry.table(s)}
    where = f" for {path}" + (f" ({name!r} is a {' and a '.join(elsewhere)} part)" if elsewhere else "")
    extra = ["module:function"] if any(s.call is not None for s in slots) else []
    return unknown(f"{slots[0].slot} part", name, [*names, *extra], where)


# ---------------------------------------------------------------------------------------------- overrides

def parse_overrides(words: typing.Iterable[str]) -> dict[str, str]:
    """`["a.b=1", "c=x"]` -> {"a.b": "1", "c": "x"}; a path given twice is refused."""
    paths: dict[str, str] = {}
    for word in words:
        path, sign, value = word.partition("=")
        path = path.strip()
        if not sign or not path:
            raise UserError(f"override {word!r}: expected path=value, for example updates.lr=1e-5")
        if path in paths:
            raise UserError(f"override {path} is given twice: {paths[path]!r} and {value!r}")
        paths[path] = value
    return paths


class _Node(dict):
    """One point of the tree of overrides: its own value, and those below it by field name."""

    value: Any = MISSING


def apply_overrides(root: Part, paths: Mapping[str, Any]) -> Part:
    """Apply dotted overrides in any order: at every point a swap comes before the fields below it."""
    tree = _Node()
    for path, value in paths.items():
        node = tree
        for step in path.split("."):
            node = node.setdefault(step, _Node())
        node.value = value
    return _apply(root, tree, "")


def _apply(current: Part, node: _Node, path: str) -> Part:
    if isinstance(current, Call):
        return current.replace(**{k: n.value for k, n in node.items()})
    hints = annotations_of(type(current))
    changes = {}
    for key, child in node.items():
        here = f"{path}.{key}".lstrip(".")
        if key not in hints:
            raise unknown("field", here, [f"{path}.{h}".lstrip(".") for h in hints], f" of {current.part_name or type(current).__name__}")
        changes[key] = _change(hints[key], getattr(current, key), child, here)
    try:
        return dataclasses.replace(current, **changes) if changes else current
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from None


def _change(annotation: Any, old: Any, node: _Node, path: str) -> Any:
    inner = slots_in_dict(annotation)
    if inner or (isinstance(old, Mapping) and node):
        new = dict(old or {}) if node.value is MISSING else coerce(annotation, node.value, path)
        for key, child in node.items():
            if inner:
                made = _change(Union[(*inner, type(None))], new.get(key), child, f"{path}.{key}")
            else:
                made = child.value if not child else _change(Any, new.get(key, {}), child, f"{path}.{key}")
                made = yaml.safe_load(made) if isinstance(made, str) else made
            if made is None and inner:
                new.pop(key, None)
            else:
                new[key] = made
        return coerce(annotation, new, path)
    if not slots_in(annotation):
        if node:
            raise UserError(f"{path}.{next(iter(node))}: {path} is a {describe(annotation)} and has no fields")
        return coerce(annotation, node.value, path)
    if node.value is not MISSING:
        value = node.value
        if isinstance(value, str) and node and not (value.lower() in ("none", "null")):
            leaves = {k: n.value for k, n in node.items() if not n and n.value is not MISSING}
            deeper = _Node({k: n for k, n in node.items() if k not in leaves})
            made = build(slots_in(annotation), value, leaves, path)
            return _apply(made, deeper, path) if deeper else made
        old = coerce(annotation, value, path)
    if node:
        if not isinstance(old, Part):
            raise UserError(f"{path}.{next(iter(node))}: {path} is {'empty' if old is None else old}; "
                            f"choose a part first, {path}=…: expected {describe(annotation)}")
        return _apply(old, node, path)
    return old
