"""Where parts, methods, tasks and models are found by name.

Names live in tables: parts by (slot, name), methods by (wing, name). volvelle's own wings enter through the same
entry-point groups as anybody else's package: `volvelle.methods`, `volvelle.tasks`, `volvelle.parts`. Each entry names a module;
if the module is a package, every module in it is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from .errors import UserError, unknown

if TYPE_CHECKING:
    from .parts import Recipe

GROUPS = ("volvelle.parts", "volvelle.tasks", "volvelle.methods")
WINGS = ("language", "control", "offline", "planning", "preference", "curriculum", "multimodal")


@dataclass(frozen=True)
class Method:
    """A named recipe with where it comes from and, if it has one, its claim."""

    name: str
    wing: str
    recipe: "Recipe"
    title: str
    source: str
    module: str
    claim: Any = None

    @property
    def key(self) -> str:
        return f"{self.wing}/{self.name}"


@dataclass
class Registry:
    parts: dict[type, dict[str, Any]] = field(default_factory=dict)
    methods: dict[tuple[str, str], Method] = field(default_factory=dict)
    loaded: bool = False
    trusted: set[str] = field(default_factory=lambda: {"volvelle"})

    def load(self) -> None:
        """Import every module named by the entry points, once."""
        if self.loaded:
            return
        self.loaded = True
        for group in GROUPS:
            for entry in sorted(entry_points(group=group), key=lambda e: (e.name, e.value)):
                try:
                    module = importlib.import_module(entry.module)
                    self.trusted.add(entry.module.split(".")[0])
                    for child in pkgutil.iter_modules(getattr(module, "__path__", ())):
                        importlib.import_module(f"{entry.module}.{child.name}")
                except ModuleNotFoundError as error:
                    if (error.name or "").split(".")[0] != entry.module.split(".")[0]:
                        raise UserError(f"entry point {group}:{entry.name} needs the package {error.name!r}, "
                                        "which is not installed") from error
                    raise UserError(f"entry point {group}:{entry.name}: the module {error.name!r} does not exist") from error

    def add_part(self, slot: type, name: str, value: Any) -> None:
        table = self.parts.setdefault(slot, {})
        old = table.get(name)
        same = isinstance(old, type) == isinstance(value, type) and (_origin(old) == _origin(value) if isinstance(value, type) else old == value)
        if old is not None and not same:
            raise UserError(f"{slot.slot} part {name!r} is registered twice: by {_origin(old)} and {_origin(value)}")
        table[name] = value

    def part(self, slot: type, name: str) -> Any:
        """The part class or preset registered under `name` for `slot`."""
        self.load()
        table = self.table(slot)
        if name not in table:
            raise unknown(f"{slot.slot}", name, table)
        return table[name]

    def table(self, slot: type) -> dict[str, Any]:
        self.load()
        return self.parts.get(slot, {})

    def add_method(self, method: Method) -> None:
        old = self.methods.get((method.wing, method.name))
        if old is not None and old.module != method.module:
            raise UserError(f"method {method.key} is registered twice: by {old.module} and {method.module}")
        self.methods[method.wing, method.name] = method

    def find(self, name: str) -> list[Method]:
        """Every method of that name; `wing/name` picks one."""
        self.load()
        wing, _, short = name.rpartition("/")
        found = [m for m in self.methods.values() if m.name == short and wing in ("", m.wing)]
        if not found:
            names = {m.name for m in self.methods.values()} | ({m.key for m in self.methods.values()} if wing else set())
            raise unknown("method", name, names)
        return sorted(found, key=lambda m: m.key)

    def method(self, name: str, wing: str | None = None) -> Method:
        """One method; a name that several wings have is settled by `wing` (that of the task)."""
        found = self.find(name)
        if len(found) > 1:
            found = [m for m in found if m.wing == wing] or found
        if len(found) > 1:
            raise UserError(f"method {name!r} exists in several wings; say which: {', '.join(m.key for m in found)}")
        return found[0]


def _origin(value: Any) -> str:
    cls = value if isinstance(value, type) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}"


registry = Registry()


def wing_methods(wing: str, spelled: dict[str, str] | None = None):
    """A module's `__getattr__` that finds the recipes of a wing by name (`-` written as `_`, and the spellings given)."""

    def find(name: str):
        if not name.startswith("_"):
            registry.load()
            found = registry.methods.get((wing, (spelled or {}).get(name, name.replace("_", "-"))))
            if found is not None:
                return found.recipe
        raise AttributeError(f"module 'volvelle.{wing}' has no attribute {name!r}")

    return find
