"""What planning runs make: named arrays and numbers that save themselves."""

from __future__ import annotations

from volvelle.core.state import load_state, save_state


class Tables(dict):
    """Arrays and numbers by name; `save(folder)` writes tensors.safetensors and state.json, `load(folder)` reads them."""

    def save(self, folder) -> None:
        save_state(folder, dict(self))

    @classmethod
    def load(cls, folder) -> Tables:
        return cls(load_state(folder))
