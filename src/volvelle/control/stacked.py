"""Training several seeds as one model: their random numbers, and the Trainable that clips and steps them together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from volvelle.core.errors import RunStopped
from volvelle.core.run import Run
from volvelle.core.trainable import Optimiser, Trainable
from volvelle.core.schedule import at

from .heads import Distribution
from .networks import reset


# what torch.optim's fused Adam and AdamW call themselves; without them, the optimisers are used as they are
_FUSED = {kind: getattr(torch, name) for kind, name in ((torch.optim.Adam, "_fused_adam_"), (torch.optim.AdamW, "_fused_adamw_")) if hasattr(torch, name)}


class Streams:
    """Random numbers of S seeds, `first` ... `first + S - 1`: each seed draws what it would draw in a run of its own.

    Everything comes back with a leading seed axis. All streams are checkpointed by the run.
    """

    def __init__(self, run: Run, name: str, seeds: int, first: int | None = None):
        first = run.seed if first is None else first
        self.generators = [run.rng(name, first + i) for i in range(seeds)]

    @classmethod
    def fixed(cls, name: str, numbers: Sequence[int]) -> Streams:
        """Streams outside any run, from plain numbers: for evaluation, which must leave the run's numbers alone."""
        made = cls.__new__(cls)
        made.generators = [np.random.default_rng([*name.encode(), n]) for n in numbers]
        return made

    def _each(self, draw) -> np.ndarray:
        generators = self.generators
        return draw(generators[0])[None] if len(generators) == 1 else np.stack([draw(g) for g in generators])

    def normal(self, *shape: int) -> np.ndarray:
        return self._each(lambda g: g.standard_normal(shape, np.float32))

    def uniform(self, *shape: int) -> np.ndarray:
        return self._each(lambda g: g.random(shape, np.float32))

    def gumbel(self, *shape: int) -> np.ndarray:
        return -np.log(self._each(lambda g: g.standard_exponential(shape, np.float32)) + 1e-20)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        """Whole numbers below `high` < 2^53, as int64; scaled uniforms, which numpy draws ten times as fast as integers between other work."""
        return self._each(lambda g: (g.random(shape) * high).astype(np.int64))

    def permutations(self, n: int) -> np.ndarray:
        return self._each(lambda g: g.permutation(n))

    def noise(self, head: Distribution, *shape: int) -> Tensor:
        """A block of what `head.sample` needs: [S, *shape, noise_width]."""
        if head.noise == "mixed":
            rest = head.noise_width - head.normals
            return torch.from_numpy(np.concatenate([self.normal(*shape, head.normals), self.gumbel(*shape, rest)], -1))
        return torch.from_numpy(getattr(self, head.noise)(*shape, head.noise_width))


class Stacked(Trainable):
    """A Trainable whose parameters have a leading axis of copies, `seeds` times some members.

    All learnt parameters live in one flat tensor, so that clipping, the optimiser and clearing are one operation each. The gradient norm
    is bounded for every seed on its own.
    """

    def __init__(self, name: str, module: torch.nn.Module, optimiser: Optimiser | None, device, seeds: int):
        super().__init__(name, module, None, device)
        self.seeds, self.part = seeds, optimiser
        if optimiser is None:
            return
        module.requires_grad_(True).train()
        self.parameters = list(module.parameters())
        self.flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.flat.grad = torch.zeros_like(self.flat)
        place, self._grads = 0, []
        for p in self.parameters:
            piece = slice(place, place := place + p.numel())
            p.data = self.flat.data[piece].view(p.shape)
            p.grad = self.flat.grad[piece].view(p.shape)
            self._grads.append(p.grad.view(seeds, -1))
        self.optimiser = optimiser.build([self.flat])
        self._ones = torch.ones(seeds, device=self.flat.device)

    def backward(self, loss: Tensor, only: bool = False) -> None:
        """Add the gradient of a loss per seed [S] (their sum: seeds share nothing), or of one number; only: no other network gets one."""
        if loss.requires_grad:
            loss.backward(self._ones if loss.numel() > 1 else None, inputs=self.parameters if only else None)

    def step(self, scale: float = 1.0) -> float:
        """Clip, move the parameters with `scale` times the learning rate, clear. Returns the largest norm among the seeds."""
        clip = self.part.clip
        if self.seeds == 1:
            norm = float(torch.linalg.vector_norm(self.flat.grad))
            if clip is not None and norm > clip:
                self.flat.grad.mul_(clip / (norm + 1e-6))
        else:
            norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in self._grads]).norm(dim=0)
            norm = float(norms.max())
            if clip is not None and norm > clip:
                factors = (clip / (norms + 1e-6)).clamp(max=1.0).unsqueeze(1)
                for grad in self._grads:
                    grad.mul_(factors)
        if not math.isfinite(norm):
            which = "" if self.seeds == 1 else f" of seed {int(norms.isfinite().int().argmin())} (counted from the run's seed)"
            self.flat.grad.zero_()
            raise RunStopped(f"the gradient norm of {self.name}{which} is {norm}")
        rise = min(1.0, (self.steps + 1) / self.part.warmup) if self.part.warmup else 1.0
        self._move(at(self.part.lr, self.steps) * rise * scale)
        self.flat.grad.zero_()
        self.steps += 1
        return norm

    @torch.no_grad()
    def _move(self, lr: float) -> None:
        """The optimiser's step. Adam's, once its state exists, is called without the optimiser's bookkeeping, which costs more than the step.

        Meanwhile numbers below 1e-38 count as 0: the moments of dead units decay into them, and CPUs take many times as long over them.
        """
        optimiser, group = self.optimiser, self.optimiser.param_groups[0]
        group["lr"] = lr
        state = optimiser.state.get(self.flat)
        kind = _FUSED.get(type(optimiser))
        if not state or kind is None:
            optimiser.step()
            return
        state["step"] += 1
        torch.set_flush_denormal(True)
        kind([self.flat], [self.flat.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], lr=lr, beta1=group["betas"][0],
             beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False)
        torch.set_flush_denormal(False)

    def reset_optimiser(self) -> None:
        self.optimiser, self.steps = self.part.build([self.flat]), 0


def make(run: Run, name: str, module: torch.nn.Module, optimiser: Optimiser | None, seeds: int, members: int = 1) -> Stacked:
    """Draw the initial weights of every seed from its own stream, and register the module with the run."""
    generators = [run.torch_rng(f"{name}/initial", run.seed + i) for i in range(seeds) for _ in range(members)]
    return run.register(name, Stacked(name, reset(module, generators), optimiser, run.device, seeds))


def joint(run: Run, name: str, parts: dict[str, tuple[torch.nn.Module, int]], optimiser: Optimiser, seeds: int) -> Stacked:
    """Several networks under one optimiser: name -> (module, members per seed). Each draws its initial weights from streams of its own."""
    for key, (module, members) in parts.items():
        reset(module, [run.torch_rng(f"{name}.{key}/initial", run.seed + i) for i in range(seeds) for _ in range(members)])
    return run.register(name, Stacked(name, torch.nn.ModuleDict({k: m for k, (m, _) in parts.items()}), optimiser, run.device, seeds))
