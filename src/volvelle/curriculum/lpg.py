"""The learned policy gradient: a network that reads what an agent met, backwards in time, and says how its policy and its predictions shall move.

For every step it gives pi_hat (a number) and y_hat (a distribution). An agent with policy pi and prediction vector y, both made from its own
parameters, descends

    mean[ log pi(a|s) pi_hat ] + alpha mean[ KL(y(s) || y_hat) ]

with pi_hat and y_hat as constants (arXiv 2007.08794, in the sign of arXiv 2310.02782's code: pi_hat plays minus the advantage).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from volvelle.core.errors import UserError
from volvelle.core.parts import Part, from_config, part, to_config
from volvelle.core.state import load_state, save_state
from volvelle.core.trainable import copy_weights

from .tabular import EPS, Experience, Tabular, kl, kl_gradient, logp_gradient, softmax


@part("lpg")
class LPG(Part):
    """The network's shape.

    cell: gru (as the code of arXiv 2310.02782) or lstm (as both papers); hidden, embed: units of the cell and of the net that sums up a prediction vector
    in one number; conditioned: it also reads how many updates the agent has had and how many it will have; discount: it also reads the discount .99.
    """

    slot: ClassVar[str] = "update-rule"
    cell: Literal["gru", "lstm"] = "gru"
    hidden: Annotated[int, Field(gt=0)] = 256
    embed: Annotated[int, Field(gt=0)] = 16
    conditioned: bool = False
    discount: bool = False

    def build(self, width: int, generator: torch.Generator) -> UpdateRule:
        return UpdateRule(self, width, generator)


class UpdateRule(nn.Module):
    """width: entries of the prediction vector."""

    def __init__(self, part: LPG, width: int, generator: torch.Generator):
        super().__init__()
        self.part, self.width = part, width
        gates = {"gru": 3, "lstm": 4}[part.cell]
        inputs = 4 + 2 * part.conditioned + part.discount + 1
        shapes = {"embed": (part.embed, width), "sum": (1, part.embed), "read": (gates * part.hidden, inputs), "keep": (gates * part.hidden, part.hidden),
                  "policy": (1, part.hidden), "prediction": (width, part.hidden)}
        for name, shape in shapes.items():
            bound = 1 / math.sqrt(part.hidden if name in ("read", "keep") else shape[1])
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                self.register_parameter(f"{name}_{kind}", nn.Parameter(bound * (2 * torch.rand(size, generator=generator) - 1)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))

    def forward(self, rewards: Tensor, done: Tensor, chosen: Tensor, y: Tensor, y_next: Tensor, age: Tensor, lifetime: Tensor) -> tuple[Tensor, Tensor]:
        """rewards, done, chosen (probability of the action taken) [B, T]; y, y_next [B, T, width]; age, lifetime (in updates) [B].

        Returns (pi_hat [B, T], y_hat [B, T, width]).
        """
        done, T = done.to(rewards.dtype), rewards.shape[-1]

        def embed(v):
            return self._linear("sum", F.relu(self._linear("embed", v)))[..., 0]

        seen = [rewards, done, chosen, embed(y), embed(y_next) * (1 - done)]
        if self.part.conditioned:
            seen += [(age / lifetime)[..., None].expand_as(rewards), torch.log(lifetime)[..., None].expand_as(rewards)]
        if self.part.discount:
            seen.append(torch.full_like(rewards, 0.99))
        read = self._linear("read", torch.stack(seen, -1)).unbind(-2)
        h = torch.zeros_like(read[0][..., : self.part.hidden])
        c, out, open_ = h, [], (1 - done).unsqueeze(-1).unbind(-2)
        for t in range(T - 1, -1, -1):
            going = open_[t]
            h = h * going
            kept = self._linear("keep", h)
            if self.part.cell == "gru":
                (r, z, n), (kr, kz, kn) = read[t].chunk(3, -1), kept.chunk(3, -1)
                z = torch.sigmoid(z + kz)
                h = (1 - z) * torch.tanh(n + torch.sigmoid(r + kr) * kn) + z * h
            else:
                i, f, g, o = (read[t] + kept).chunk(4, -1)
                c = torch.sigmoid(f) * c * going + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        features = F.relu(torch.stack(out[::-1], -2))
        return self._linear("policy", features)[..., 0], softmax(self._linear("prediction", features))

    def save(self, folder: Path) -> None:
        save_state(Path(folder), {"weights": {k: v.detach() for k, v in self.named_parameters()}, "part": to_config(self.part), "width": self.width})


def load_rule(folder: str | Path) -> UpdateRule:
    """Read an update rule that a run has saved (RUN/rule). UserError if there is none."""
    folder = Path(folder)
    state = load_state(folder) if (folder / "state.json").is_file() else {}
    if "part" not in state or state["part"].get("part") != "lpg":
        raise UserError(f"{folder}: no update rule there; expected the folder rule of a groove or lpg run")
    rule = UpdateRule(from_config(LPG, state["part"], "rule"), state["width"], torch.Generator())
    copy_weights(state["weights"], dict(rule.named_parameters()), f"rule {folder}")
    return rule.requires_grad_(False)


def ask(rule, seen: Experience, p: Tensor, y: Tensor, age: Tensor, lifetime: Tensor) -> tuple[Tensor, Tensor]:
    """(pi_hat [L, W, T], y_hat [L, W, T, n]) for a batch of tabular agents with policies p [L, W, T, A] and predictions y [L, W, T + 1, n]."""
    chosen, W = p.gather(-1, seen.actions.unsqueeze(-1))[..., 0], seen.rewards.shape[1]
    ages, lives = (x.to(seen.rewards.dtype)[:, None].expand(-1, W) for x in (age, lifetime))
    return rule(seen.rewards, seen.done, chosen, y[..., :-1, :], y[..., 1:, :], ages, lives)


def tabular_update(agent: Tabular, actor: Tensor, bootstrap: Tensor, moments: tuple, seen: Experience, pi_hat: Tensor, y_hat: Tensor,
                   going: Tensor | None = None) -> tuple[Tensor, Tensor, tuple]:
    """One step of tabular agents on the loss above. actor, bootstrap: tables; moments: of both. Differentiable in pi_hat, y_hat and the old tables."""
    p, y = softmax(seen.rows(actor)), softmax(seen.rows(bootstrap))
    steps = seen.rewards[0].numel()
    rows = logp_gradient(p, seen.actions) * pi_hat.unsqueeze(-1) / steps
    actor, first = agent.move(actor, seen.grow(rows, actor.shape[1]), moments[0], agent.actor_lr, going)
    rows = agent.alpha * kl_gradient(y, y_hat) / steps
    bootstrap, second = agent.move(bootstrap, seen.grow(rows, bootstrap.shape[1]), moments[1], agent.bootstrap_lr, going)
    return actor, bootstrap, (first, second)


def agent_loss(logits: Tensor, prediction: Tensor, actions: Tensor, pi_hat: Tensor, y_hat: Tensor, alpha: float) -> Tensor:
    """The loss of any agent: logits [..., A] and prediction logits [..., n] from its parameters, the rest constants. Scalar."""
    chosen = logits.softmax(-1).gather(-1, actions.unsqueeze(-1))[..., 0]
    return (torch.log(chosen + EPS) * pi_hat.detach()).mean() + alpha * kl(prediction.softmax(-1), y_hat.detach()).mean()
