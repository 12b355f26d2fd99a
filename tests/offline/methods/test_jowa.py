"""jowa: its targets and losses by hand, what moves what, two stages, dreams, acting with memory, resume, saving and refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import stop_at
import torch

import volvelle
from volvelle.control.policy import Policy
from volvelle.control.valueheads import C51
from volvelle.core.errors import UserError
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints, start
from volvelle.core.verbs import configure
from volvelle.offline.gridgames import GridGames, GridScript
from volvelle.offline.methods.jowa import atoms_target, conservative, rows_with_target
from volvelle.offline.tasks import Generated

GAMES = Generated(env=GridGames(size=4), behaviour=GridScript(), quality="mixed", steps=600)
SMALL = ["layers=1", "width=16", "heads=2", "q_hidden=16", "batch=8", "period=2", "world_steps=2", "evaluation.episodes=3"]
ATOMS = C51(low=-10.0, high=30.0, bins=51)


def agent_of(*overrides, task=GAMES):
    """(agent, a batch) of a freshly started run."""
    config = configure("jowa", task, overrides=[*[w for w in SMALL if w.partition("=")[0] not in {o.partition("=")[0] for o in overrides}], *overrides], device="cpu")
    _, learner = start(config, Path("nowhere"))
    return learner.agent, learner.sampler.draw()


def rows_of(agent, batch):
    """The arguments of `losses` for a batch."""
    mask, obs = batch["mask"][0], batch["obs"]
    tokens = agent.module.tokeniser.encode(obs["grid"][0].flatten(0, 1)).unflatten(0, mask.shape)
    return [tokens, batch["actions"][0], batch["rewards"][0], batch["terminated"][0].bool() & mask, mask, obs["vector"][0, :, 0].argmax(-1)]


# ---- numbers

def test_the_terminal_target_by_hand():
    following = torch.rand(1, 3, 51).softmax(-1)
    made = atoms_target(ATOMS, following, torch.ones(1, 3, dtype=torch.bool), torch.tensor([1.0]), torch.tensor([True]), 0.99)[0]
    assert made[13].item() == pytest.approx(0.25, abs=1e-5) and made[14].item() == pytest.approx(0.75, abs=1e-5)
    assert made.sum().item() == pytest.approx(1, abs=1e-5) and (made * ATOMS.support(made)).sum().item() == pytest.approx(1, abs=1e-5)


def test_projection_keeps_mass_and_mean():
    g = torch.Generator().manual_seed(0)
    following = torch.zeros(40, 4, 51)
    following[:, :, 10:40] = torch.rand(40, 4, 30, generator=g)
    following /= following.sum(-1, keepdim=True)
    rewards, legal = torch.randn(40, generator=g), torch.ones(40, 4, dtype=torch.bool)
    made = atoms_target(ATOMS, following, legal, rewards, torch.zeros(40, dtype=torch.bool), 0.9)
    best = (following * ATOMS.support(following)).sum(-1).amax(-1)
    assert torch.allclose(made.sum(-1), torch.ones(40), atol=1e-5)
    assert torch.allclose((made * ATOMS.support(made)).sum(-1), rewards + 0.9 * best, atol=1e-4)


def test_the_conservative_term_by_hand():
    q, mask = torch.tensor([[[1.0, 2.0, 0.0]]]), torch.ones(1, 1, dtype=torch.bool)
    assert conservative(q, q[..., 0], mask, 0.1).item() == pytest.approx(0.1 * (math.log(math.e + math.e**2 + 1) - 1), abs=1e-6)
    assert conservative(q, q[..., 0], mask, 0.1).item() == pytest.approx(0.14076, abs=1e-5)
    assert conservative(torch.full((1, 1, 7), 3.0), torch.full((1, 1), 3.0), mask, 0.1).item() == pytest.approx(0.1 * math.log(7), abs=1e-6)
    two, both = torch.tensor([[[1.0, 2.0, 0.0]], [[4.0, 0.0, 0.0]]]), torch.ones(2, 1, dtype=torch.bool)
    combo = conservative(two, two[..., 0], both, 1.0, real=1).item()
    assert combo == pytest.approx(two.logsumexp(-1).mean().item() - 1.0, abs=1e-6)


def test_which_steps_have_a_target():
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    ended = torch.zeros(1, 4, dtype=torch.bool)
    assert rows_with_target(mask, ended).tolist() == [[True, True, False, False]]
    ended[0, 2] = True
    assert rows_with_target(mask, ended).tolist() == [[True, True, True, False]]
    q = torch.arange(12.0).view(1, 4, 3)
    q[0, 3] = torch.nan                                                       # padding is never averaged; three steps are, whatever ends
    assert conservative(q, q[..., 0], mask, 1.0).item() == pytest.approx((q.logsumexp(-1) - q[..., 0])[0, :3].mean().item())


def test_illegal_actions_are_no_target_but_count_in_the_logsumexp():
    following = torch.zeros(1, 3, 51)
    following[0, 0, 20], following[0, 1, 50], following[0, 2, 10] = 1, 1, 1
    legal = torch.tensor([[True, False, True]])
    made = atoms_target(ATOMS, following, legal, torch.zeros(1), torch.zeros(1, dtype=torch.bool), 1.0)
    assert (made * ATOMS.support(made)).sum().item() == pytest.approx(-10 + 0.8 * 20, abs=1e-4)
    agent, batch = agent_of()
    rows = rows_of(agent, batch)
    body, seen = agent.module.body, []
    assert body.legal.tolist() == [[True] * 4 + [False] * 2, [False, False, True, True, True, False], [True] * 4 + [False, True]]
    expected = body.expected
    body.expected = lambda mixed: seen.append(made := expected(mixed)) or made
    lost = agent.losses(*rows, len(rows[0]))["conservative"]
    q, mask = seen[0], rows[4]
    assert q.shape[-1] == 6
    by_hand = 0.1 * (q.logsumexp(-1) - q.gather(-1, rows[1][..., None]).squeeze(-1))[mask].mean()
    assert lost.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("value", ["c51", "mse"])
def test_the_td_loss_by_hand(value):
    agent, batch = agent_of(f"value={value}", "q_heads=2", *(["value.low=-2", "value.high=4", "value.bins=13"] if value == "c51" else []))
    with torch.no_grad():
        for p in agent.target.module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tokens, actions, rewards, ended, mask, game = rows_of(agent, batch)
    body, part, total, count = agent.module.body, agent.part, 0.0, 0
    body.eval()
    assert ended.any()
    x = body(tokens, actions, game)
    online, target = body.mixture(body.q_outputs(x)), body.mixture(body.q_outputs(x, agent.target.module))
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            if not mask[b, t] or (not ended[b, t] and (t + 1 == mask.shape[1] or not mask[b, t + 1])):
                continue
            count += 1
            r, legal = rewards[b, t].item(), body.legal[game[b]]
            if value == "mse":
                y = r + (0 if ended[b, t] else part.gamma * target[b, t + 1, legal].max().item())
                total += 0.5 * (online[b, t, actions[b, t], 0].item() - y) ** 2
                continue
            z, m = torch.linspace(-2, 4, 13), torch.zeros(13)
            worth = (target[b, t + 1] * z).sum(-1) if t + 1 < mask.shape[1] else torch.zeros(6)
            best = max(torch.nonzero(legal).flatten().tolist(), key=lambda a: worth[a].item())
            for i in range(13):
                at, p = (r, 1 / 13) if ended[b, t] else (r + part.gamma * z[i].item(), target[b, t + 1, best, i].item())
                m += (1 - (min(max(at, -2), 4) - z).abs() / 0.5).clamp(0, 1) * p
            total -= (m * (online[b, t, actions[b, t]] + 1e-8).log()).sum().item()
    found = agent.value_losses(x, actions, rewards, ended, mask, game, len(mask))["values"]
    assert found.item() == pytest.approx(total / count, rel=1e-4)


def test_the_target_head_is_apart_and_values_reach_the_trunk_unless_detached():
    for detach in (False, True):
        agent, batch = agent_of(f"detach={str(detach).lower()}")
        rows = rows_of(agent, batch)
        body = agent.module.body.eval()
        before = body.q_outputs(body(*rows[:2], rows[5])).detach()
        found = agent.losses(*rows, len(rows[0]))["values"]
        with torch.no_grad():
            for p in agent.target.module.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        assert torch.equal(before, body.q_outputs(body(*rows[:2], rows[5])))
        moved = agent.losses(*rows, len(rows[0]))["values"]
        assert moved.item() != found.item()
        moved.backward()
        trunk = sum(p.grad.abs().sum().item() for p in body.trunk.parameters() if p.grad is not None)
        assert (trunk == 0) is detach and sum(p.grad.abs().sum().item() for p in body.q.parameters()) > 0
        assert all(p.grad is None for p in agent.target.module.parameters())


def test_dreams_never_enter_the_loss_of_the_world():
    agent, batch = agent_of()
    rows = rows_of(agent, batch)
    agent.module.body.eval()
    plain = agent.losses(*rows, len(rows[0]))
    more = [torch.cat([r, r.flip(0)]) for r in rows]
    more[0][len(rows[0]) :] = (more[0][len(rows[0]) :] + 1) % 12
    joined = agent.losses(*more, len(rows[0]))
    for k in ("frames", "rewards", "ends"):
        assert joined[k].item() == pytest.approx(plain[k].item(), rel=1e-5)
    assert joined["values"].item() != pytest.approx(plain["values"].item(), rel=1e-5)


# ---- the two stages

def test_the_first_stage_learns_the_world_alone_and_the_second_begins_anew():
    agent, batch = agent_of("optimiser.lr=1e-3")
    q, body = [p.detach().clone() for p in agent.module.body.q.parameters()], agent.module.body
    made = agent.update(batch)
    assert "loss/values" not in made and all(torch.equal(a, b) for a, b in zip(q, body.q.parameters()))
    agent.update(batch)
    first = agent.net.optimiser
    made = agent.update(batch)
    assert agent.net.optimiser is not first and agent.net.steps == 1 and agent.net.optimiser.param_groups[0]["lr"] < 1e-3     # it warms up again
    assert "loss/values" in made and not all(torch.equal(a, b) for a, b in zip(q, body.q.parameters())) and int(body.age) == 3


def test_beta_weighs_the_world_and_the_target_is_copied():
    agent, batch = agent_of("beta=0.0", "world_steps=0", "target_every=3", "optimiser.weight_decay=0")
    heads = [p.detach().clone() for p in agent.module.body.frame.parameters()]
    for i in range(3):
        agent.update(batch)
        same = all(torch.equal(a, b) for a, b in zip(agent.target.module.parameters(), agent.module.body.q.parameters()))
        assert same is (i == 2)
    assert all(torch.equal(a, b) for a, b in zip(heads, agent.module.body.frame.parameters()))


def test_the_random_mixture_is_one_for_online_and_target():
    agent, batch = agent_of("q_heads=3", "random_mixture=true")
    seen, body = [], agent.module.body
    mixture = body.mixture
    body.mixture = lambda outputs, weights=None: seen.append(weights) or mixture(outputs, weights)
    agent.losses(*rows_of(agent, batch), 8)
    assert len(seen) == 2 and torch.equal(*seen) and seen[0].sum().item() == pytest.approx(1) and seen[0].std() > 0


def test_dreams_continue_full_segments():
    agent, batch = agent_of("imagination=imagination", "imagination.after=0", "imagination.rows=5", "imagination.capacity=6")
    rows = rows_of(agent, batch)
    made = agent.imagined.dream(agent.module, tuple(rows), 0.95)
    full = torch.nonzero(rows[4].all(1)).flatten()
    assert 0 < len(full) == len(made[0]) and made[0].shape == rows[0][full].shape and not made[3].any()
    assert torch.equal(made[0][:, :2], rows[0][full][:, :2]) and torch.equal(made[1][:, :1], rows[1][full][:, :1]) and torch.equal(made[1][:, 2], made[1][:, 3])
    legal = agent.module.body.legal[made[5]]
    assert legal.gather(1, made[1][:, 1:]).all() and set(made[2].unique().tolist()) <= {-1.0, 0.0, 1.0}
    joined = agent.imagined.joined(agent.module, tuple(rows), 0, 0.95)
    assert len(joined[0]) == 8 + 5 and len(agent.imagined.kept[0]) <= 6 and torch.equal(joined[0][:8], rows[0])
    waiting, batch = agent_of("imagination=imagination", "imagination.after=9")
    assert len(waiting.imagined.joined(waiting.module, tuple(rows), 8, 0.95)[0]) == 8
    for _ in range(3):
        assert math.isfinite(agent.update(batch)["gradient_norm"])


# ---- acting

def test_a_player_remembers_its_episode_and_forgets_it():
    agent, batch = agent_of("context=2", "planner=null", "randomness=0.0")
    player = agent.module
    g = np.random.default_rng(0)
    obs = [{"vector": torch.eye(3)[[0, 1, 2]][None], "grid": torch.from_numpy(g.integers(0, 12, (1, 3, 1, 4, 4)).astype(np.uint8))} for _ in range(4)]
    memory, roots, begin = None, [], player.body.begin
    player.body.begin = lambda *a: roots.append(begin(*a)) or roots[-1]
    for o in obs[:3]:
        actions, memory = player.remember(o, memory, False, None)
    assert memory.count.tolist() == [2, 2, 2] and roots[-1].tokens.tolist() == obs[2]["grid"][0].flatten(1).tolist()
    memory = player.forget(memory, 1)
    assert memory.count.tolist() == [2, 0, 2]
    player.remember(obs[3], memory, False, None)
    fresh = player.remember(obs[3], None, False, None) and roots[-1]
    assert torch.allclose(roots[-2].q[1], fresh.q[1], atol=1e-5) and not torch.allclose(roots[-2].q[0][:4], fresh.q[0][:4], atol=1e-7)


def test_random_actions_are_legal():
    agent, _ = agent_of("randomness=1.0", "planner=null")
    obs = {"vector": torch.eye(3).repeat(50, 1)[None], "grid": torch.zeros(1, 150, 1, 4, 4, dtype=torch.uint8)}
    policy = Policy(agent.module, agent.part, None, 1)
    actions = policy.act(obs).actions[0].view(50, 3)
    for game, legal in enumerate(GridGames.legal):
        assert set(actions[:, game].tolist()) == set(legal)


def test_it_trains_plays_saves_and_loads_elsewhere(tmp_path):
    made = volvelle.train("jowa", task=GAMES, folder=tmp_path / "run", overrides=SMALL, steps=2, seed=1, device="cpu")
    found = made.result["metrics"]
    assert {"return", "unplanned_return", "planning_gain", "score"} <= set(found) and {"coins_return", "falling_return", "door_return"} & set(found)
    assert found["planning_gain"] == pytest.approx(found["return"] - found["unplanned_return"])
    assert volvelle.evaluate(tmp_path / "run")["return"] == found["return"]
    plain = volvelle.evaluate(tmp_path / "run", overrides=["planner=null"])
    assert plain["return"] == plain["unplanned_return"] == found["unplanned_return"] and plain["planning_gain"] == 0
    assert math.isfinite(volvelle.evaluate(tmp_path / "run", overrides=["planner=mcts"])["return"])
    policy = Policy.load(tmp_path / "run" / "policy")
    assert torch.equal(policy.module.body.legal, made.learner.agent.module.body.legal)
    obs = {"vector": np.eye(3, dtype=np.float32)[None], "grid": np.ones((1, 3, 1, 4, 4), np.uint8)}
    assert torch.equal(policy.act(obs).actions, made.learner.policy().act(obs).actions)


@pytest.mark.parametrize("more", [["dropout=0.2", "imagination=imagination", "imagination.after=3", "imagination.rows=4", "q_heads=2", "random_mixture=true"],
                                  ["tokeniser=vq-vae", "tokeniser.codes=8", "tokeniser.width=8", "tokeniser.strides=[2]", "planner=mcts", "world_steps=5"]], ids=["dreams", "vq-vae"])
def test_resumes_exactly(more, tmp_path):
    options = dict(task=GAMES, overrides=[*[w for w in SMALL if w.partition("=")[0] not in {m.partition("=")[0] for m in more}], *more], steps=4, checkpoint_every=2, device="cpu")
    volvelle.train("jowa", folder=tmp_path / "whole", strict=True, **options)
    with pytest.raises(KeyboardInterrupt):
        volvelle.train("jowa", folder=tmp_path / "broken", progress=stop_at(3), strict=True, **options)
    volvelle.train(resume=tmp_path / "broken")
    assert fingerprint(load_state(checkpoints(tmp_path / "whole")[-1])) == fingerprint(load_state(checkpoints(tmp_path / "broken")[-1]))


def test_cloning_on_the_same_trunk(tmp_path):
    agent, batch = agent_of("values=cloning", "value=mse", "world_steps=0", "beta=0.0", "optimiser.lr=1e-2")
    losses = [float(agent.update(batch)["loss/values"]) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("overrides, told", [
    (["seeds=2"], "one seed at a time"), (["sampler=transitions"], "accepted: segments"), (["value=quantile"], "accepted: c51, mse"), (["values=cloning"], "accepted: mse"),
    (["context=4"], "more steps than sampler.length=4"), (["heads=3"], "multiple of heads=3"), (["tokeniser.codes=3"], "codes=3: a frame holds"),
    (["imagination=imagination", "imagination.planner=mcts"], "accepted: beam"), (["tokeniser=vq-vae"], "cannot be divided")])
def test_what_makes_no_sense_is_told_in_one_line(overrides, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        volvelle.train("jowa", task=GAMES, folder=tmp_path / "run", overrides=[*[w for w in SMALL if w.partition("=")[0] not in {o.partition("=")[0] for o in overrides}], *overrides],
                       steps=1, device="cpu")
    assert "\n" not in str(error.value)


def test_frames_and_discrete_actions_are_needed(tmp_path):
    with pytest.raises(UserError, match="jowa needs discrete actions"):
        volvelle.train("jowa", task=Generated(quality="medium", steps=1000), folder=tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="jowa reads frames"):
        volvelle.train("jowa", task="cartpole-random", folder=tmp_path / "run", steps=1)
