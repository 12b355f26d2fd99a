"""Tabular agents, the update rule and the meta-gradient: worked numbers, what flows where, and what does not."""

import numpy as np
import pytest
import torch

from volvelle.core.errors import UserError
from volvelle.core.run import RunConfig
from volvelle.core.trainer import start
from volvelle.curriculum.gridtasks import Grids, RandomGrids
from volvelle.curriculum.lpg import LPG, agent_loss, ask, load_rule, tabular_update
from volvelle.curriculum.metalearning import MetaGradient, MetaTraining
from volvelle.curriculum.tabular import Experience, Tabular, Values, actor_critic, descend, draw, kl, look, play, returns, spread
from volvelle.curriculum.gridworlds import Worlds, optimal_returns

TINY = MetaTraining(rule=LPG(hidden=8, embed=4), agent=Tabular(width=3, workers=4, length=5), outer=MetaGradient(updates=2), lifetimes=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seen(states, actions, rewards=None, done=None, times=None):
    """Experience of one agent and one copy."""
    T = len(actions)
    return Experience(torch.tensor([[states]]), torch.tensor([[times or [0] * (T + 1)]]), torch.tensor([[actions]]), torch.tensor([[rewards or [0.0] * T]]),
                      torch.tensor([[done or [False] * T]]))


def test_an_update_by_hand():
    """3 states, 2 actions, everything 0; (s0, a0, pi_hat -1), (s1, a1, pi_hat 2); y_hat (.5, .5), (.9, .1); step 1, no clip, alpha .5."""
    agent = Tabular(actor_lr=1.0, bootstrap_lr=1.0, clip=None, width=2)
    actor = bootstrap = torch.zeros(1, 4, 2)
    pi_hat, y_hat = torch.tensor([[[-1.0, 2.0]]]), torch.tensor([[[[0.5, 0.5], [0.9, 0.1]]]])
    actor, bootstrap, _ = tabular_update(agent, actor, bootstrap, ((), ()), seen([0, 1, 2], [0, 1]), pi_hat, y_hat)
    assert actor[0].flatten().tolist() == pytest.approx([0.25, -0.25, 0.5, -0.5, 0, 0, 0, 0], abs=1e-6)
    assert bootstrap[0].flatten().tolist() == pytest.approx([0, 0, 0.137327, -0.137327, 0, 0, 0, 0], abs=1e-6)
    y = torch.full((2, 2), 0.5)
    assert float(kl(y, y_hat[0, 0]).mean()) == pytest.approx(0.255413, abs=1e-6)
    assert float((pi_hat**2).mean()) == 2.5 and float((y_hat**2).sum(-1).mean()) == pytest.approx(0.66)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_written_out_gradients_are_those_of_the_loss(clip):
    """Against autograd on the loss of any agent, with times and states met twice, and clipping as torch does it."""
    g = generator()
    agent = Tabular(actor_lr=1.0, bootstrap_lr=1.0, clip=clip, width=3)
    actor, bootstrap = torch.randn(1, 5, 4, generator=g).double(), torch.randn(1, 5, 3, generator=g).double()
    met = seen([0, 1, 1, 3, 0], [0, 3, 2, 1], times=[0, 300, 700, 900, 0])
    pi_hat, y_hat = torch.randn(1, 1, 4, generator=g).double(), torch.randn(1, 1, 4, 3, generator=g).double().softmax(-1)
    a, b = actor.clone().requires_grad_(), bootstrap.clone().requires_grad_()
    agent_loss(met.rows(a), met.rows(b), met.actions, pi_hat, y_hat, agent.alpha).backward()
    if clip:
        assert a.grad.norm() > clip
        torch.nn.utils.clip_grad_norm_([a], clip)
        torch.nn.utils.clip_grad_norm_([b], clip)
    new_actor, new_bootstrap, _ = tabular_update(agent, actor, bootstrap, ((), ()), met, pi_hat, y_hat)
    assert torch.allclose(actor - new_actor, a.grad, atol=1e-5 if clip else 1e-12)
    assert torch.allclose(bootstrap - new_bootstrap, b.grad, atol=1e-5 if clip else 1e-12)


def test_what_the_rule_says_is_constant_to_the_agent():
    """Inputs and outputs of the rule pass no gradient to the agent's own parameters."""
    logits, prediction = torch.randn(2, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    pi_hat = (logits**2).sum(-1)
    agent_loss(logits, prediction, torch.tensor([0, 1]), pi_hat, prediction.softmax(-1), 0.5).backward()
    first = logits.grad.clone()
    logits.grad = prediction.grad = None
    agent_loss(logits, prediction, torch.tensor([0, 1]), pi_hat.detach(), prediction.softmax(-1).detach(), 0.5).backward()
    assert (logits.grad == first).all()


def test_look_and_spread_are_transposes():
    g = generator()
    table, rows = torch.randn(3, 7, 2, generator=g).double(), torch.randn(3, 4, 5, 2, generator=g).double()
    states, times = torch.randint(6, (3, 4, 5), generator=g), torch.randint(1000, (3, 4, 5), generator=g)
    assert float((look(table, states, times) * rows).sum()) == pytest.approx(float((table * spread(rows, states, times, 7)).sum()))


def test_adam_of_tables_is_torchs():
    table = torch.randn(1, 4, 2, generator=generator())
    twin, moments = torch.nn.Parameter(table.clone()), (torch.zeros_like(table), torch.zeros_like(table), torch.zeros(1, 1, 1))
    adam = torch.optim.Adam([twin], lr=0.1)
    for step in range(5):
        gradient = torch.randn(1, 4, 2, generator=generator(step))
        table, moments = descend(table, gradient, moments, 0.1)
        twin.grad = gradient
        adam.step()
    assert torch.allclose(table, twin, atol=1e-5)


def test_generalised_advantages_by_hand():
    values = Values(1, 4, 0.1, gamma=0.9, lam=0.8)
    values.table = torch.tensor([0.5, -0.2, 0.8, 0.3, 0.0]).view(1, 5, 1)
    advantages, found = values.advantages(seen([0, 1, 2, 3], [0, 0, 0], [1.0, 0.0, 2.0], [False, True, False]))
    assert advantages.flatten().tolist() == pytest.approx([0.464, 0.2, 1.47]) and found.flatten().tolist() == pytest.approx([0.5, -0.2, 0.8])


def test_actions_are_drawn_as_often_as_they_should():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(40000, 4)
    counts = torch.bincount(draw(p, torch.rand(40000, generator=generator())), minlength=4) / 40000
    assert counts[1] == 0 and (counts - p[0]).abs().max() < 0.013  # 5 standard deviations
    assert draw(p[:1], torch.tensor([0.9999999])).item() == 3


# ---- the network

def inputs(T=6, n=3):
    g = generator(5)
    return [torch.randn(2, T, generator=g), torch.zeros(2, T, dtype=torch.bool), torch.rand(2, T, generator=g), *(torch.rand(2, T, n, generator=g) for _ in range(2)),
            torch.tensor([3.0, 4.0]), torch.tensor([10.0, 10.0])]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_rule_reads_the_future_up_to_an_end(cell):
    rule = LPG(cell=cell, hidden=8, embed=4).build(3, generator())

    def moved(done_at=None):
        x = inputs()
        if done_at is not None:
            x[1][:, done_at] = True
        before = rule(*x)
        x[0] = x[0].clone()
        x[0][:, 3] += 1.0
        return [(a != b).flatten(2).any(-1).any(0).tolist() if a.ndim == 3 else (a != b).any(0).tolist() for a, b in zip(before, rule(*x))]

    assert moved() == [[True] * 4 + [False] * 2] * 2                     # r_3 alters t <= 3
    assert moved(1) == [[False] * 2 + [True] * 2 + [False] * 2] * 2      # an end at 1: what lies behind it does not reach 0 and 1
    assert moved(3) == [[True] * 4 + [False] * 2] * 2                    # an end at 3 itself: r_3 is still part of the episode


def test_the_prediction_after_an_end_is_not_read():
    rule, x = LPG(hidden=8, embed=4).build(3, generator()), inputs()
    x[1][:, 2] = True
    before = rule(*x)[0]
    x[4] = x[4].clone()
    x[4][:, 2] = torch.tensor([0.9, 0.05, 0.05])
    assert (rule(*x)[0] == before).all()


@pytest.mark.parametrize("part, reads", [(LPG(hidden=8), False), (LPG(hidden=8, conditioned=True), True)])
def test_the_age_is_read_only_if_asked_for(part, reads):
    rule, x = part.build(3, generator()), inputs()
    before = rule(*x)[0]
    x[5] = x[5] + 5
    assert bool((rule(*x)[0] != before).all()) is reads


def test_a_rule_is_saved_and_read(tmp_path):
    rule = LPG(cell="lstm", hidden=8, conditioned=True, discount=True).build(3, generator())
    rule.save(tmp_path)
    assert all((a == b).all() for a, b in zip(rule(*inputs()), load_rule(tmp_path)(*inputs())))
    with pytest.raises(UserError, match="no update rule there"):
        load_rule(tmp_path / "nowhere")


# ---- the meta-gradient

def learner(levels=RandomGrids(), **changes):
    return start(RunConfig(recipe=TINY.replace(**changes), task=Grids(levels=levels)), "/nowhere")[1]


FREE = {"policy_entropy": 0.0, "prediction_entropy": 0.0, "policy_norm": 0.0, "prediction_norm": 0.0}


def meta_gradients(outer, ready=lambda live: None):
    live = learner(outer=outer)
    ready(live)
    loss, _ = outer.loss(live)
    names = ("policy_weight", "prediction_weight", "read_weight")
    if not loss.requires_grad:
        return dict.fromkeys(names, 0.0)
    found = torch.autograd.grad(loss, [getattr(live.rule.module, n) for n in names], allow_unused=True)
    return {n: 0.0 if g is None else float(g.abs().sum()) for n, g in zip(names, found)}


def test_the_meta_gradient_reaches_both_outputs():
    assert all(v > 1e-6 for v in meta_gradients(MetaGradient(updates=2)).values())
    alone = meta_gradients(MetaGradient(updates=2, **FREE))
    assert alone["policy_weight"] > 1e-6 and alone["prediction_weight"] == 0.0  # the stopped inputs: only the regularisers teach predictions
    through = meta_gradients(MetaGradient(updates=3, through_inputs=True, **FREE))
    assert through["policy_weight"] > 1e-6 and through["prediction_weight"] > 1e-9


@pytest.mark.parametrize("weight, sign", [("policy_entropy", -1), ("prediction_entropy", -1), ("policy_norm", 1), ("prediction_norm", 1)])
def test_each_term_of_the_outer_loss_has_its_sign_and_weight(weight, sign):
    """Two learners that differ in one weight make the same experience on the way to their first loss."""
    plain, _ = MetaGradient(updates=2, **FREE).loss(learner())
    more, metrics = MetaGradient(updates=2, **FREE | {weight: 0.3}).loss(learner())
    assert float((more - plain).detach()) == pytest.approx(sign * 0.3 * metrics[weight], rel=1e-3) and metrics[weight] > 1e-4


def test_the_outer_loss_raises_what_had_more_advantage_than_usual():
    """Without regularisers L_out = -mean(log pi A), A normalised: recomputed by hand from what the learner kept."""
    live, twin = (learner(RandomGrids(size=(3, 3), walls=0, limit=(5, 10)), outer=MetaGradient(updates=1, **FREE, critic=False)) for _ in range(2))
    loss, _ = live.part.outer.loss(live)
    twin.update(twin.rule)
    met = play(twin.actor.detach(), twin.worlds, 5, twin.playing)
    expected = 0.0
    for i in range(3):
        found = torch.stack([_by_hand(met.rewards[i, w], met.done[i, w]) for w in range(4)])
        logp = met.rows(twin.actor).log_softmax(-1).gather(-1, met.actions.unsqueeze(-1))[i, ..., 0]
        expected -= float((logp * (found - found.mean()) / (found.std(unbiased=False) + 1e-8)).mean().detach()) / 3
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-6


def _by_hand(rewards, done):
    """With a critic of nothing: sums of rewards discounted by .99 * .95 up to the episode's end."""
    out, total = [], 0.0
    for r, d in zip(rewards.flip(0), done.flip(0)):
        total = float(r) + 0.99 * 0.95 * total * (not d)
        out.append(total)
    return torch.tensor(out[::-1])


def test_without_updates_there_is_no_meta_gradient():
    def old(live):
        live.age[:] = live.worlds.levels.lifetime

    assert set(meta_gradients(MetaGradient(updates=2, **FREE), old).values()) == {0.0}


def test_the_meta_gradient_is_the_slope_of_the_loss():
    """Central differences along one direction, in double precision; sampling is held fixed by the same random numbers."""
    outer = MetaGradient(updates=2, through_inputs=True)

    def loss_at(shift, direction=None):
        live = learner(outer=outer)
        live.rule.module.double()
        for name in ("actor", "bootstrap"):
            setattr(live, name, getattr(live, name).double())
        if direction is not None:
            with torch.no_grad():
                for p, d in zip(live.rule.module.parameters(), direction):
                    p += shift * d
        return live, outer.loss(live)[0]

    live, loss = loss_at(0.0)
    gradients = torch.autograd.grad(loss, list(live.rule.module.parameters()))
    direction = [g / sum((x**2).sum() for x in gradients).sqrt() for g in gradients]
    slope = ((loss_at(1e-5, direction)[1] - loss_at(-1e-5, direction)[1]) / 2e-5).detach()
    assert float(slope) == pytest.approx(float(sum((g * d).sum() for g, d in zip(gradients, direction))), rel=1e-3)


def test_updates_after_the_end_of_a_lifetime_are_discarded():
    live = learner()
    live.age[1] = live.worlds.levels.lifetime[1]
    before = live.actor.clone()
    live.update(live.rule)
    assert (live.actor[1] == before[1]).all() and (live.actor[0] != before[0]).any() and live.age.tolist() == [1, 60, 1]


def test_the_critic_learns_unless_told_not_to():
    for critic in (True, False):
        live = learner(outer=MetaGradient(updates=2, critic=critic))
        live.values.table[:] = 0.3
        live.step()
        assert bool((live.values.table != 0.3).any()) is critic


def test_actor_critic_learns_grid_worlds():
    """All 16 levels together: above 80 % of the optimum, from below 40 %."""
    levels = Grids(tests=16).held_out()
    best, agent = float(optimal_returns(levels).mean()), Tabular(workers=16, length=10)
    trained = {k: returns(levels, actor_critic(levels, agent, 40, generator(), **more), 64, generator()).mean() / best for k, more in
               {"a2c": {}, "ppo": {"epochs": 4, "ratio": 0.2}}.items()}
    assert float(returns(levels, agent.fresh(16, levels.states, 5), 64, generator()).mean()) < 0.4 * best
    assert min(trained.values()) > 0.8, trained


def test_play_uses_only_the_given_numbers():
    levels = Grids(tests=3).held_out()
    a, b = (play(torch.zeros(3, levels.states + 1, 5), Worlds(levels, 4), 6, generator(1)) for _ in range(2))
    assert (a.actions == b.actions).all() and a.states.shape == (3, 4, 7) and a.rewards.shape == (3, 4, 6)


def test_the_time_is_seen():
    """A last row that says "stay" as soon as an episode has begun: random on the first step of an episode, staying afterwards."""
    levels = Grids(tests=3).held_out()
    actor = torch.zeros(3, levels.states + 1, 5)
    actor[:, -1, 4] = 1e5
    met = play(actor, Worlds(levels, 16), 6, generator(1))
    assert (met.actions[met.times[..., :-1] > 0] == 4).all() and len(set(met.actions[..., 0].flatten().tolist())) == 5


def test_asking_for_a_batch_is_asking_one_by_one():
    levels, rule = Grids(tests=3).held_out(), LPG(hidden=8, conditioned=True).build(3, generator())
    met = play(torch.zeros(3, levels.states + 1, 5), Worlds(levels, 4), 6, generator(1))
    p, y = torch.full((3, 4, 6, 5), 0.2), torch.rand(3, 4, 7, 3, generator=generator())
    together = ask(rule, met, p, y, torch.tensor([1, 2, 3]), levels.lifetime)[0]
    alone = rule(met.rewards[1], met.done[1], torch.full((4, 6), 0.2), y[1, :, :-1], y[1, :, 1:], torch.full((4,), 2.0), levels.lifetime[1].float().expand(4))[0]
    assert np.allclose(together[1].detach(), alone.detach(), atol=1e-6)
