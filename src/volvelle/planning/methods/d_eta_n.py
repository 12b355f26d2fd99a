"""D-eta-N: deep Q-learning of return distributions with the stock in the state (arXiv 2501.13028).

Problem: optimise a functional of the whole return (hit a requested return, the worst share of returns, a threshold) where states are too many for tables.
Idea: the state shows the stock c, what the rewards so far are worth now (task stock:...). A network gives N quantiles of the return to go for every action,
q_i(s, c, a). Acting, and the choice of the next action in the target, maximise the utility of stock plus return instead of the mean:

    a = argmax_a  mean_i f(c + q_i(s, c, a)),        y_j = r + discount q_j(s', c', a'),   a' = argmax_a mean_i f(c' + q_i(s', c', a))

The loss is quantile regression as in QR-DQN; f stands nowhere in it. Dynamics and rewards do not depend on c, so a transition teaches for any other stock
too: a share of every batch gets stocks drawn afresh. One network then serves all start stocks, that is all targets or budgets.
Several reward components (homeostasis, a cost budget): the quantiles are those of every component by itself, and the loss is summed over them. The law of one
component is all that a utility needs which is a sum over components, f(x) = sum_i f_i(x_i); others are refused (the tables of distributional-dp take them).
Pick it for risk, targets or thresholds with discrete actions when the start stock can be chosen. Not for the plain mean (use qr-dqn).
CVaR is reached through the start stock that looks best at the start of an episode once the network is learnt: evaluation plays from there.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from volvelle.control.buffers import Uniform
from volvelle.control.envs import Envs, each, numbers_for
from volvelle.control.evaluation import Evaluation
from volvelle.control.losses import mean_over_rows
from volvelle.control.methods.dqn import QAgent, QLearning, QNetwork, dqn
from volvelle.control.methods.qr_dqn import qr_dqn
from volvelle.control.networks import MLP
from volvelle.control.offpolicy import OffPolicyLearner
from volvelle.control.policy import as_tensors
from volvelle.control.slots import Relabel
from volvelle.control.stacked import Streams
from volvelle.control.valueheads import Quantile, ValueHead
from volvelle.core.claims import Arm, Claim
from volvelle.core.errors import UserError
from volvelle.core.parts import method, part
from volvelle.core.trainable import Adam

from ..functionals import PROBES, ExpectedUtility, require_conditions
from ..objectives import Cvar, Homeostasis, ReturnObjective, Shortfall, Target
from ..stock import next_stock
from ..tasks import TwoResources
from .played import Played, Stock

Share = Annotated[float, Field(ge=0, le=1)]


def stock_of(observations: Any, components: int = 1) -> Tensor:
    """The stock [..., m] of observations [..., D] (or of their vector, where there are images too); [...] for one component."""
    vector = observations["vector"] if isinstance(observations, dict) else observations
    return vector[..., -1] if components == 1 else vector[..., -components:]


def with_stock(observations: Any, stock: Tensor, components: int = 1) -> Any:
    """The observations with another stock, shaped as `stock_of` gives it."""
    if isinstance(observations, dict):
        return {**observations, "vector": with_stock(observations["vector"], stock, components)}
    return torch.cat([observations[..., :-components], stock.view(*observations.shape[:-1], components)], -1)


def rewards_of(batch, components: int) -> Tensor:
    """[S, B], or [S, B, m] for several components."""
    return batch["rewards"] if components == 1 else torch.stack([batch[f"reward_{i}"] for i in range(components)], -1)


def expected_utility(utility, stock: Tensor, quantiles: Tensor) -> Tensor:
    """mean_i f(c + q_i): stock [...], quantiles [..., actions, N] -> [..., actions], without gradient."""
    ends = stock[..., None, None] + quantiles.detach()
    values = np.asarray(utility(ends.double().cpu().numpy().ravel()), float)
    return torch.from_numpy(values).view(ends.shape).mean(-1).to(quantiles)


def by_component(utility, components: int) -> list:
    """f_i(x) = f(x e_i) - f(0) (1 - 1 / m), which sum to f if it is a sum over components: maps [n] -> [n]. UserError if it is not."""
    zero = float(utility(np.zeros((1, components)))[0])

    made = [lambda x, unit=unit: utility(x[:, None] * unit) - zero * (1 - 1 / components) for unit in np.eye(components)]
    probes = np.stack([np.roll(PROBES, 5 * i) for i in range(components)], -1)
    if not np.allclose(utility(probes), sum(f(probes[:, i]) for i, f in enumerate(made))):
        raise UserError("objective: its utility is no sum over components of the stock; accepted: such as homeostasis with order=1, or constrained")
    return made


def summed_utility(utilities: list, stock: Tensor, quantiles: Tensor) -> Tensor:
    """sum_k mean_i f_k(c_k + q_ki): stock [..., m], quantiles [..., actions, m, N] -> [..., actions], without gradient."""
    return sum(expected_utility(f, stock[..., k], quantiles[..., k, :]) for k, f in enumerate(utilities))


@part("restock")
class Restock(Relabel):
    """A share of every sampled batch gets stocks drawn uniformly from low to high (None: the task's range), and next stocks to match."""

    share: Share = 0.5
    low: float | None = None
    high: float | None = None

    def start(self, run):
        return _Restock(self, run)


class _Restock:
    when = "sample"

    def __init__(self, part: Restock, run):
        task, recipe = run.config.task, run.config.recipe
        self.part, self.gamma, self.m, self.streams = part, recipe.gamma, recipe.components, Streams(run, "restock", recipe.seeds)
        self.low, self.high = task.low if part.low is None else part.low, task.high if part.high is None else part.high
        self.info = tuple(f"reward_{i}" for i in range(self.m)) if self.m > 1 else ()

    def __call__(self, batch):
        old, m = stock_of(batch["obs"], self.m), self.m
        chosen = (torch.from_numpy(self.streams.uniform(old.shape[1])).to(old.device) < self.part.share).view(*old.shape[:2], *[1] * (m > 1))
        drawn = torch.from_numpy(self.streams.uniform(*old.shape[1:])).to(old.device) * (self.high - self.low) + self.low
        stock = torch.where(chosen, drawn, old)
        following = torch.where(chosen, next_stock(stock, rewards_of(batch, m), self.gamma), stock_of(batch["next_obs"], m))
        return {**batch, "obs": with_stock(batch["obs"], stock, m), "next_obs": with_stock(batch["next_obs"], following, m)}


@part("d-eta-n")
class DEtaN(QLearning):
    """objective: as in distributional-dp, with a scalar stock; its own start stock plays no part, the task's does. scale: stocks are divided by it, and squash:
    passed through sign(c) log(1 + |c|), before the network sees them. components: of the reward, as the task's."""

    value: ValueHead = Quantile(quantiles=32)
    objective: ReturnObjective = Target()
    scale: Annotated[float, Field(gt=0)] = 1.0
    squash: bool = False
    components: Annotated[int, Field(gt=0)] = 1

    def validate(self, task=None):
        super().validate(task)
        if not isinstance(task, Stock) or not task.shown:
            raise UserError(f"d-eta-n: task {task.label()} shows no stock; accepted: stock:..., for example stock:{task.label()}")
        if task.discount != self.gamma:
            raise UserError(f"task.discount={task.discount}: the stock must be discounted as the learner does; expected gamma={self.gamma}")
        if not isinstance(self.value, Quantile):
            raise UserError(f"value={self.value.part_name}: utilities are taken over quantiles of the return; accepted: quantile")
        if self.normalise_observations or self.replay.n_step != 1:
            raise UserError("d-eta-n: the stock must stay what it is, step by step; expected normalise_observations=false and replay.n_step=1")
        functional, m = self.objective.functional(), self.components
        if task.components != m or task.pays != "reward":
            raise UserError(f"task.components={task.components}, task.pays={task.pays}: expected components={m} as the recipe says, and pays=reward")
        if not isinstance(functional, ExpectedUtility) or np.size(functional.start_stock) != m or (m == 1 and np.ndim(functional.start_stock)):
            accepted = "one number: mean, target, shortfall, surplus, above or cvar" if m == 1 else f"{m} numbers, such as homeostasis"
            raise UserError(f"objective={self.objective.part_name}: expected the expected utility of {accepted}")
        if m > 1:
            by_component(functional.utility, m)
            if not any(isinstance(r, Restock) for r in self.relabels.values()):
                raise UserError("relabels: several components need relabels.stock, which stores their rewards (relabels.stock.share=0 leaves stocks alone)")
        require_conditions(functional, self.gamma, None if m == 1 else m, None)

    def actor(self, spec, seeds):
        return StockNetwork(self, spec, seeds)

    def agent(self, run, spec):
        return StockAgent(run, self, spec)

    def start(self, run):
        return StockLearner(run, self)


class StockNetwork(QNetwork):
    """Quantiles [S, B, actions * m * N]; its values are utilities of stock plus return."""

    def __init__(self, recipe: DEtaN, spec, seeds):
        self.m, self.n = recipe.components, recipe.value.quantiles
        super().__init__(recipe.replace(value=recipe.value.replace(quantiles=self.m * self.n)), spec, seeds)
        self.scale, self.squash = recipe.scale, recipe.squash
        self.utility = recipe.objective.functional().utility
        self.parts = by_component(self.utility, self.m) if self.m > 1 else []

    def forward(self, x):
        shown = stock_of(x, self.m) / self.scale
        return self.net(with_stock(x, shown.sign() * shown.abs().log1p() if self.squash else shown, self.m))

    def utilities(self, outputs: Tensor, stock: Tensor) -> Tensor:
        """[S, B, actions] of outputs."""
        if self.m == 1:
            return expected_utility(self.utility, stock, outputs.unflatten(-1, (self.actions, -1)))
        return summed_utility(self.parts, stock, outputs.unflatten(-1, (self.actions, self.m, self.n)))

    def values(self, x):
        return self.utilities(self(x), stock_of(x, self.m))


class StockAgent(QAgent):
    def loss(self, batch):
        part, following, m = self.part, batch["next_obs"], self.part.components
        with torch.no_grad():
            theirs = self.target.module(following)
            choosing = self.module(following) if part.double else theirs
            best = self.module.pick(theirs, self.module.utilities(choosing, stock_of(following, m)).argmax(-1))
            target = part.value.backup(self.apart(best), rewards_of(batch, m), batch["discounts"] if m == 1 else batch["discounts"].unsqueeze(-1))
        outputs = self.module.pick(self.module(batch["obs"]), batch["actions"])
        losses = part.value.loss(self.apart(outputs), target)
        losses = losses if m == 1 else losses.sum(-1)
        return mean_over_rows(losses, batch.get("weights")), {"losses": losses, "outputs": outputs, "target": target}

    def apart(self, outputs):
        return outputs if self.module.m == 1 else outputs.unflatten(-1, (self.module.m, -1))  # [S, B, N], or [S, B, m, N]


class StockLearner(OffPolicyLearner):
    def start_stock(self, task: Stock, candidates: int = 64) -> float:
        """CVaR's outer choice: the start stock c_0 that maximises -c_0 + E min(c_0 + G, 0) / tau, by the network's quantiles at first observations."""
        envs = Envs(task, 1, 16)
        raw = envs.reset(numbers_for(self.run.seed, 0, 16, "start stock"))
        first = as_tensors(each(lambda x: np.repeat(x[None], self.part.seeds, 0), raw), self.device)
        stocks = np.linspace(task.low, task.high, candidates)
        with torch.no_grad():
            values = [float(self.agent.module.values(with_stock(first, torch.full_like(stock_of(first), c))).amax(-1).mean()) for c in stocks]
        return float(stocks[int(np.argmax(self.part.objective.outer(stocks, np.array(values))))])

    def evaluate(self, task=None):
        if not isinstance(self.part.objective, Cvar):
            return super().evaluate(task)
        task = self.run.config.task if task is None else task
        start = self.start_stock(task)
        return super().evaluate(task.replace(starts=(start,))) | {"start_stock": start}


shared: dict[str, Any] = dict(
    period=500, warmup=500, every=1, replay=Uniform(capacity=20_000, batch=64), copy_every=500, gamma=1.0, epsilon_end=0.1, network=MLP(hidden=(64, 64), activation="relu"),
    optimiser=Adam(lr=5e-4, clip=None), value=Quantile(quantiles=32))
recipe = DEtaN(**shared, relabels={"stock": Restock()})
requests = Stock(base=Played(), low=-10.0, high=5.0, starts=tuple(range(-10, 1)))  # eleven requested returns, 10 to 0, on one grid of lotteries
judged: dict[str, Any] = dict(evaluation=Evaluation(episodes=550))
claim = Claim(
    says="one network that sees the stock brings about whichever of eleven returns is requested (f = -|x|), or keeps above it (f = min(x, 0)); a network of the "
         "same quantiles without a stock does one thing for all",
    arms={"target": recipe(**judged), "shortfall": recipe(objective=Shortfall(), **judged), "qr-dqn": Arm(qr_dqn(**shared, **judged), task=requests.replace(shown=False))},
    task=requests, steps=30, seeds=5, equal="environment steps", minutes=8, quick={"steps": 2, "seeds": 2}, run={"checkpoint_every": 0},
    expects=("target < 1 on miss", "qr-dqn > 5 on miss", "target < qr-dqn on miss", "shortfall > qr-dqn on shortfall"))

d_eta_n = method("d-eta-n", recipe, title="Optimise a functional of the return distribution, by deep Q-learning with the stock", source="arXiv 2501.13028", claim=claim)

resources = Stock(base=Played(base=TwoResources(horizon=8)), low=-6.0, high=3.0, components=2)
dqn_of: dict[str, Any] = {k: v for k, v in shared.items() if k != "value"} | judged | {"every": 2}
regulating = recipe(objective=Homeostasis(), components=2, every=2, **judged)
homeostasis = Claim(
    says="two resources that are used up end nearer their set points (f = -||x||_1) than with Q-learning on a shaped reward: minus the deviation at every step, or "
         "its fall without a stock to see",
    arms={"d-eta-n": regulating, "deviation": Arm(dqn(**dqn_of), task=resources.replace(pays="deviation")), "drive": Arm(dqn(**dqn_of), task=resources.replace(pays="drive")),
          "blind": Arm(dqn(**dqn_of), task=resources.replace(pays="drive", shown=False))},
    task=resources, steps=30, seeds=10, first_seed=10, equal="environment steps", minutes=8, quick={"steps": 2, "seeds": 2}, run={"checkpoint_every": 0},
    expects=("d-eta-n < deviation on miss", "d-eta-n < blind on miss", "d-eta-n <= drive + 0.25 on miss"))

method("d-eta-n-homeostasis", regulating, title="Keep several quantities at their set points, by deep Q-learning with the stock", source="arXiv 2501.13028", claim=homeostasis)
