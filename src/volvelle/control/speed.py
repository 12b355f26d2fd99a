"""Levers of speed: torch.compile where there is a compiler, and a process that keeps the memory it has freed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .stacked import Stacked


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


def compiled(run, function: Callable, instead: Callable | None = None) -> Callable:
    """`function`, compiled, if the run asks for it (run.compile=true, --compile) and the machine can; else `instead`, or the function as it is."""
    plain = function if instead is None else instead
    if not run.config.compile:
        return plain
    run.compiles = True
    if run.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        run.reporter("note: compile=true, but there is no C++ compiler here; running uncompiled")
        return plain
    fast, broken = torch.compile(function, dynamic=False), []

    def call(*arguments):
        if broken:
            return plain(*arguments)
        try:
            return fast(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            broken.append(True)
            run.reporter(f"note: compiling failed ({type(error).__name__}); running uncompiled")
            return plain(*arguments)

    return call


def descent(run, net: Stacked, function: Callable, through: bool = False, compilable: bool = True) -> Callable:
    """A call that adds to `net` the gradient of what `function` gives for the same arguments, and gives it back without gradient.

    function: to a loss per seed [S], or to (loss, a dict of tensors). through: the loss goes through other networks that learn, and they get no gradient
    (as a policy's loss goes through critics). Compiled (see `compiled`), forward and backward pass are one graph; compilable: the function draws no random
    numbers and changes nothing, not even which parameters take gradients.
    """

    def backward(*arguments):
        loss, more = _parted(function(*arguments))
        net.backward(loss, only=through)
        return _freed(loss, more)

    def graph(gradient: Tensor, *arguments):
        loss, more = _parted(function(*arguments))
        found = torch.autograd.grad(loss.sum(), net.parameters, allow_unused=True, materialize_grads=True)
        gradient.add_(torch.cat([g.flatten() for g in found]))
        return _freed(loss, more)

    if run.config.compile and compilable:
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # before torch 2.11 the two passes are compiled apart
            torch._dynamo.config.trace_autograd_ops = True
        made = compiled(run, graph, lambda gradient, *arguments: backward(*arguments))
        return lambda *arguments: made(net.flat.grad, *arguments)
    return backward


def _parted(found: Tensor | tuple[Tensor, dict]) -> tuple[Tensor, dict | None]:
    return (found, None) if isinstance(found, Tensor) else found


def _freed(loss: Tensor, more: dict | None):
    return loss.detach() if more is None else (loss.detach(), {k: v.detach() for k, v in more.items()})
