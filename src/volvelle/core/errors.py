"""The two ways a run may end early: a mistake of the user, or a stop with a named cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the caller, told in one line: the thing, the value, what would be accepted. Exit code 2."""


class RunStopped(Exception):
    """A run that cannot go on (NaN loss, failing reward, full disk). Says the step and the cause. Exit code 1.

    intact: what has been trained so far is sound (an environment failed, say), so the trainer keeps it in a last checkpoint.
    """

    def __init__(self, message: str, intact: bool = False):
        super().__init__(message)
        self.intact = intact


def unknown(kind: str, name: str, accepted: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not in a list: nearest names first, then the whole list when it is short."""
    options = sorted(set(map(str, accepted)))
    near = difflib.get_close_matches(str(name), options, n=3, cutoff=0.5)
    listed = ", ".join(options) if len(options) <= 40 else ", ".join(options[:40]) + f", … ({len(options)} in all)"
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(f"unknown {kind} {str(name)!r}{where}; {hint}accepted: {listed or 'none'}")
