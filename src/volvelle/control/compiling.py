"""torch.compile where there is a compiler; otherwise a note and the plain function."""

from __future__ import annotations

import shutil
from collections.abc import Callable


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
