"""Two levers of speed: torch.compile where there is a compiler, and a process that keeps the memory it has freed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import sys
from collections.abc import Callable


@functools.cache
def keep_freed_memory() -> None:
    """Tell the C library to keep freed blocks instead of returning them to the kernel (glibc only, for this process).

    Tensors of a few hundred kilobytes are otherwise mapped anew for every operation, and the page faults cost a third of an update's time.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD
            mallopt(-1, 1 << 29)  # M_TRIM_THRESHOLD


def compiled(run, function: Callable) -> Callable:
    """`function`, compiled if the run asks for it (run.compile=true, --compile) and the machine can."""
    if not run.config.compile:
        return function
    if run.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        run.reporter("note: compile=true, but there is no C++ compiler here; running uncompiled")
        return function
    import torch

    fast, broken = torch.compile(function, dynamic=False), []

    def call(*arguments):
        if broken:
            return function(*arguments)
        try:
            return fast(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            broken.append(True)
            run.reporter(f"note: compiling failed ({type(error).__name__}); running uncompiled")
            return function(*arguments)

    return call
