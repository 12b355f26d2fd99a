"""The world-action transformer: causality, the cache, dreams, labels, tokenisers, segments, optimiser groups."""

import numpy as np
import pytest
import torch
from offline_data import counting

from volvelle.control.stacked import Streams
from volvelle.control.valueheads import C51
from volvelle.core.errors import UserError
from volvelle.core.trainable import AdamW
from volvelle.offline.gridgames import GridGames, GridScript
from volvelle.offline.samplers import Table
from volvelle.offline.tasks import Generated
from volvelle.offline.worlds import VQVAE, Body, Cells, Grouped, Segments, own_numbers, reset, reward_class

T, L, A = 4, 4, 5


def body_of(seed=0, **options):
    made = Body(**{"tokens": T, "codes": 7, "games": 2, "actions": A, "steps": L, "layers": 2, "heads": 2, "width": 16, "dropout": 0.0, "value": C51(low=-2.0, high=4.0, bins=13),
                   "q_heads": 2, "q_hidden": 16, **options})
    reset(made, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in made.trunk.parameters():
            p.mul_(5)                                    # far from the almost linear start, so that differences show
    return made.eval()


def drawn(n=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(7, (n, L, T), generator=g), torch.randint(A, (n, L), generator=g), torch.randint(2, (n,), generator=g)


def test_later_tokens_never_change_earlier_outputs():
    body, (tokens, actions, game) = body_of(), drawn()
    x = body(tokens, actions, game).flatten(1, 2)
    for place in range(1, L * (T + 1) - 1):
        changed, acted = tokens.clone(), actions.clone()
        step, token = divmod(place, T + 1)
        after = torch.arange(L * (T + 1)).view(L, T + 1) >= place
        changed[:, after[:, :T]] = (changed[:, after[:, :T]] + 3) % 7
        acted[:, after[:, T]] = (acted[:, after[:, T]] + 1) % A
        y = body(changed, acted, game).flatten(1, 2)
        assert torch.allclose(x[:, :place], y[:, :place], atol=1e-5) and not torch.allclose(x[:, place], y[:, place], atol=1e-3)


def test_the_cache_gives_what_a_full_pass_gives():
    body, (tokens, actions, game) = body_of(), drawn()
    x = body(tokens, actions, game)
    node, frames, acted = body.begin(tokens[:, :2], actions[:, :2], torch.full((3,), 2), game), tokens[:, :2], actions[:, :1]
    assert torch.allclose(node.q, body.expected(body.mixture(body.q_outputs(x)))[:, 1], atol=1e-5)
    for rows, action in ((torch.tensor([2, 0, 2]), torch.tensor([1, 4, 0])), (torch.tensor([1, 1, 0]), torch.tensor([3, 2, 2]))):
        node, rewards = body.advance(node, rows, action)
        frames, acted, game = torch.cat([frames[rows], node.tokens[:, None]], 1), torch.cat([acted[rows], action[:, None]], 1), game[rows]
        full = body(frames, torch.cat([acted, acted[:, :1]], 1), game)
        assert torch.allclose(node.q, body.expected(body.mixture(body.q_outputs(full)))[:, -1], atol=1e-4)
        assert torch.equal(rewards, (body.reward(full[:, -2, T]).argmax(-1) - 1).float())
        likeliest = torch.cat([body.frame(full[:, -2, T:]), body.frame(full[:, -1, : T - 1])], 1).argmax(-1)
        assert torch.equal(node.tokens, likeliest)


def test_padding_at_the_left_changes_nothing():
    body, (tokens, actions, game) = body_of(), drawn()
    counts = torch.tensor([1, 3, 2])
    together = body.begin(tokens[:, :3], actions[:, :3], counts, game)
    moved, _ = body.advance(together, torch.arange(3), actions[:, 2])
    for i, n in enumerate(counts.tolist()):
        alone = body.begin(tokens[i : i + 1, 3 - n : 3], actions[i : i + 1, 3 - n : 3], torch.tensor([n]), game[i : i + 1])
        assert torch.allclose(together.q[i], alone.q[0], atol=1e-5)
        there, _ = body.advance(alone, torch.arange(1), actions[i : i + 1, 2])
        assert torch.equal(moved.tokens[i], there.tokens[0]) and torch.allclose(moved.q[i], there.q[0], atol=1e-4)


def test_dreams_can_be_drawn():
    body, (tokens, actions, game) = body_of(), drawn()
    node = body.begin(tokens[:, :1], actions[:, :1], torch.ones(3, dtype=torch.long), game)
    rows = torch.zeros(40, dtype=torch.long)
    some, _ = body.advance(node, rows, rows, Streams.fixed("dreams", [0]))
    same, _ = body.advance(node, rows, rows, Streams.fixed("dreams", [0]))
    assert torch.equal(some.tokens, same.tokens) and len(some.tokens.unique(dim=0)) > 10
    assert len(body.advance(node, rows, rows)[0].tokens.unique(dim=0)) == 1


class Oracle(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def test_labels_of_the_world():
    """A head that knows the next token at every place gives no loss; the place before an action is never asked."""
    body, tokens = body_of(), drawn()[0]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    rewards, ended = torch.tensor([[3.0, 0, -0.5, 0]] * 3), torch.zeros(3, L, dtype=torch.bool)
    ended[1, 2] = True
    sequence = torch.cat([tokens, torch.full((3, L, 1), -1)], 2).flatten(1)
    following = torch.cat([sequence[:, 1:], torch.full((3, 1), -1)], 1)
    following = torch.where(sequence == -1, torch.cat([tokens[:, 1:, 0], torch.full((3, 1), -1)], 1).repeat_interleave(T + 1, 1), following)
    x = following.view(3, L, T + 1, 1).expand(-1, -1, -1, 16).float()        # the trunk as an oracle
    asked = []
    body.frame = Oracle(lambda p: asked.append(p.shape) or 50 * torch.nn.functional.one_hot(p[..., 0].long().clamp(min=0), 7).float())
    body.reward = Oracle(lambda p: 50 * torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 1, 0]]).expand(3, -1, -1))
    body.end = Oracle(lambda p: 50 * torch.stack([(~ended).float(), ended.float()], -1))
    found = body.world_loss(x, tokens, rewards, ended, mask)
    assert asked == [(3, L, T, 16)] and all(v.item() == pytest.approx(0, abs=1e-6) for v in found.values())
    body.frame = Oracle(lambda p: torch.zeros(3, L, T, 7))
    worse = body.world_loss(x, tokens, rewards, ended, mask)["frames"]
    assert worse.item() == pytest.approx(np.log(7), rel=1e-5)


def test_reward_classes():
    assert reward_class(torch.tensor([3.0, -0.5, 0.0])).tolist() == [2, 0, 1] and (reward_class(torch.tensor([3.0])) - 1).tolist() == [1]


def test_probabilities_of_heads_are_mixed_not_logits():
    body = body_of()
    outputs = torch.zeros(1, 2, A, 13)
    outputs[0, 0, :, 0], outputs[0, 1, :, 12] = 100.0, 100.0
    mixed = body.mixture(outputs)
    assert mixed[0, 0, 0].item() == pytest.approx(0.5) and body.expected(mixed)[0, 0].item() == pytest.approx(1.0)
    assert body.expected(body.mixture(outputs, torch.tensor([0.25, 0.75])))[0, 0].item() == pytest.approx(-0.5 + 3.0)


# ---- tokenisers

def test_cells_are_tokens():
    made = Cells(codes=5).build((1, 2, 3))
    assert made.encode(torch.arange(6, dtype=torch.uint8).clamp(max=4).view(1, 1, 2, 3)).tolist() == [[0, 1, 2, 3, 4, 4]]
    with pytest.raises(UserError, match="codes=5: a frame holds 9"):
        made.encode(torch.full((1, 1, 2, 3), 9, dtype=torch.uint8))
    with pytest.raises(UserError, match="accepted: vq-vae"):
        Cells().build((3, 8, 8))


def test_the_vq_vae_learns_to_show_frames():
    made = reset(VQVAE(codes=32, width=16, strides=(2,)).build((1, 6, 6)), torch.Generator().manual_seed(0))
    assert made.tokens == 9
    frames = (torch.rand(64, 1, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.5).repeat_interleave(2, 2).repeat_interleave(2, 3)
    error = lambda: (made.decode(made.encode(frames), 3) - made.scaled(frames)).abs().mean().item()  # noqa: E731
    before, optimiser = error(), torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 3e-3)
    sight = made.sight[0].weight.clone()
    for _ in range(200):
        optimiser.zero_grad()
        made.loss(frames).backward()
        optimiser.step()
    assert error() < 0.2 * before and len(made.encode(frames).unique()) >= 2 and torch.equal(sight, made.sight[0].weight)
    x = made.scaled(frames)
    assert made.distance(x, x).item() == 0 and made.distance(x, -x).item() > 0
    with pytest.raises(UserError, match="cannot be divided by 4"):
        VQVAE(strides=(2, 2)).build((1, 6, 6))


def test_the_vq_vae_loss_by_hand():
    made = reset(VQVAE(codes=3, width=4, strides=(1,), commitment=0.5, perceptual=2.0).build((1, 2, 2)), torch.Generator().manual_seed(0))
    frames = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).view(1, 1, 2, 2)
    x = made.scaled(frames)
    assert x.flatten().tolist() == pytest.approx([-1, 1, -0.6, 0.6])
    z = made.encoder(x)
    far = (z.movedim(1, -1).unsqueeze(-2) - made.codebook.weight).square().sum(-1)
    code = made.codebook(far.argmin(-1)).movedim(-1, 1)
    shown = made.decoder(code)
    wanted = (x - shown).abs().mean() + 1.5 * (z - code).square().mean() + 2 * made.distance(x, shown)
    assert made.loss(frames).item() == pytest.approx(wanted.item(), rel=1e-5)


# ---- segments, numbers, groups

def test_segments_are_padded_at_the_right():
    data = counting(lengths=(3, 6))
    sampler = Segments(length=4, offset=2).build(Table(data), Streams.fixed("x", [0]), 64, 0.9)
    assert sampler.starts.tolist() == [[0, 3], [2, 3], [4, 10], [6, 10], [8, 10]]
    batch = sampler.draw()
    assert batch["obs"].shape[:3] == batch["actions"].shape[:3] == (1, 64, 4) and set(batch["mask"][0].sum(-1).tolist()) == {1, 2, 3, 4}
    assert (batch["mask"][..., :-1] >= batch["mask"][..., 1:]).all()
    steps = batch["obs"][0, ..., 1]
    assert ((steps[:, 1:] - steps[:, :-1])[batch["mask"][0, :, 1:]] == 1).all()


def test_dropout_draws_from_given_numbers_only():
    torch.manual_seed(3)
    before, numbers = torch.get_rng_state(), torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        with own_numbers(numbers, torch.device("cpu")):
            made.append(torch.rand(4))
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(*made)


def test_matrices_decay_and_the_heads_have_a_rate_of_their_own():
    body = body_of()
    net = Grouped("body", body, AdamW(lr=1.0, weight_decay=0.1, clip=None), "cpu", scale=0.5)
    decayed, plain, own = net.optimiser.param_groups
    assert sum(len(g["params"]) for g in net.optimiser.param_groups) == len(list(body.parameters()))
    assert decayed["weight_decay"] == own["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    kept = {id(p) for p in plain["params"]}
    assert id(body.frame_codes.weight) in kept and id(body.trunk.wpe.weight) in kept and id(body.trunk.ln_f.weight) in kept
    assert id(body.trunk.h[0].attn.c_attn.weight) in {id(p) for p in decayed["params"]} and id(body.q.heads[0][0].bias) in {id(p) for p in own["params"]}
    body.trunk.wpe.weight.sum().backward()
    net.step()
    assert [g["lr"] for g in net.optimiser.param_groups] == [1.0, 1.0, 0.5]


def test_grid_games_by_their_rules():
    env = GridGames(game="door").make()
    for seed in range(30):
        env.reset(seed=seed)
        total = 0.0
        script = GridScript(careless=0.0).pilot(GridGames(game="door"), env, None, np.random.default_rng(seed))
        over = cut = False
        while not (over or cut):
            _, reward, over, cut, told = env.step(script(None))
            total += reward
        assert told["earned"] == total
        if total == 2.0:
            assert over                                                          # the door ends it
            break
    else:
        raise AssertionError("no door was ever opened")
    before = env.reset(seed=1)[0]["grid"]
    assert np.array_equal(env.step(4)[0]["grid"], before) and np.array_equal(GridGames(game="coins").make().reset(seed=1)[0]["game"], 0)
    games = GridGames().make()
    games.reset(seed=0)
    assert sorted(games.reset()[0]["game"] for _ in range(3)) == [0, 1, 2]


def test_mixed_data_hold_legal_actions_only():
    data = Generated(env=GridGames(), behaviour=GridScript(), quality="mixed", steps=600).dataset()
    game, actions = data.fields["obs/vector"].argmax(-1)[data.rows], data.fields["actions"][data.rows]
    for i, legal in enumerate(GridGames.legal):
        assert set(actions[game == i]) == set(legal)
