"""World-action models: frames as tokens, and one causal transformer for what comes next and for what actions are worth.

A step is a block of T frame tokens and one action token. At the last frame token the state is known and the action is not: there the action values
are read. At the action token the reward, the end and the first token of the next frame are predicted, at every other token the token after it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from volvelle.control.learner import Count, NonNegative
from volvelle.control.spaces import Layout
from volvelle.control.stacked import Streams
from volvelle.control.valueheads import ValueHead
from volvelle.core.errors import UserError
from volvelle.core.parts import Part, part
from volvelle.core.trainable import Optimiser, Trainable

from .samplers import BatchSampler, Table

IGNORED = -100  # the label that cross_entropy leaves out


# ---------------------------------------------------------------------------------------------- frames as tokens

class FrameTokeniser(Part):
    """Slot: `build(shape)` gives a module with `tokens` per frame, `codes` in all, encode(frames [B, C, H, W]) -> int64 [B, tokens], and loss(frames)."""

    slot: ClassVar[str] = "tokeniser"

    def build(self, shape: tuple[int, int, int]) -> nn.Module:
        raise NotImplementedError


@part("cells")
class Cells(FrameTokeniser):
    """Every cell of a grid of whole numbers is a token; nothing is learnt. codes: how many symbols there are."""

    codes: Count = 16

    def build(self, shape):
        if shape[0] != 1:
            raise UserError(f"tokeniser=cells takes one whole number per cell; the frames are {'x'.join(map(str, shape))}; accepted: vq-vae")
        return _Cells(self.codes, shape)


class _Cells(nn.Module):
    def __init__(self, codes: int, shape):
        super().__init__()
        self.codes, self.tokens = codes, shape[1] * shape[2]

    def encode(self, frames: Tensor) -> Tensor:
        if frames.is_floating_point() or int(frames.max()) >= self.codes:
            raise UserError(f"tokeniser.codes={self.codes}: a frame holds {frames.max().item()}; accepted: whole numbers below codes")
        return frames.flatten(1).long()


@part("vq-vae")
class VQVAE(FrameTokeniser):
    """Convolutions, the nearest of `codes` vectors per place, and back (arXiv 1711.00937). strides: of the convolutions, each as wide as its stride; the
    default takes 84x84 to 6x6. perceptual: weight of the distance of features, in LPIPS' form, on frozen random convolutions (those of LPIPS are
    trained on photographs and have to be downloaded)."""

    codes: Count = 2048
    width: Count = 64
    strides: tuple[Count, ...] = (2, 7)
    commitment: NonNegative = 1.0
    perceptual: NonNegative = 1.0

    def build(self, shape):
        factor = math.prod(self.strides)
        if shape[1] % factor or shape[2] % factor:
            raise UserError(f"tokeniser.strides={self.strides}: frames of {shape[1]}x{shape[2]} cannot be divided by {factor}")
        return Quantised(self, shape)


class Quantised(nn.Module):
    """The vq-vae tokeniser."""

    def __init__(self, part: VQVAE, shape: tuple[int, int, int]):
        super().__init__()
        self.part, self.codes, width, factor = part, part.codes, part.width, math.prod(part.strides)
        self.tokens = shape[1] * shape[2] // factor**2
        down: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1)]
        up: list[nn.Module] = []
        for stride in part.strides:
            down += [nn.ReLU(), nn.Conv2d(width, width, stride, stride)]
            up = [nn.ConvTranspose2d(width, width, stride, stride), nn.ReLU(), *up]
        self.encoder = nn.Sequential(*down, nn.ReLU(), nn.Conv2d(width, width, 1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, shape[0], 3, padding=1))
        self.codebook = nn.Embedding(part.codes, width)
        self.sight = nn.ModuleList(nn.Conv2d(i, 16, 3, padding=1) for i in (shape[0], 16)).requires_grad_(False)

    def scaled(self, frames: Tensor) -> Tensor:
        """To [-1, 1]: bytes from [0, 255], all else from [0, 1]."""
        return frames.float() / (127.5 if frames.dtype == torch.uint8 else 0.5) - 1

    def nearest(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] to the number of the nearest code, [B, h, w]."""
        flat = z.movedim(1, -1)
        far = flat.square().sum(-1, keepdim=True) - 2 * flat @ self.codebook.weight.T + self.codebook.weight.square().sum(-1)
        return far.argmin(-1)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        return self.nearest(self.encoder(self.scaled(frames))).flatten(1)

    def decode(self, tokens: Tensor, side: int) -> Tensor:
        """Tokens [B, T] to frames [B, C, H, W] in [-1, 1]; side: rows of the grid of tokens."""
        return self.decoder(self.codebook(tokens.unflatten(-1, (side, -1))).movedim(-1, 1))

    def loss(self, frames: Tensor) -> Tensor:
        """Mean absolute error + perceptual distance + codes to outputs + commitment of outputs to codes."""
        x = self.scaled(frames)
        z = self.encoder(x)
        code = self.codebook(self.nearest(z)).movedim(-1, 1)
        shown = self.decoder(z + (code - z).detach())
        made = (x - shown).abs().mean() + (code - z.detach()).square().mean() + self.part.commitment * (z - code.detach()).square().mean()
        return made + self.part.perceptual * self.distance(x, shown) if self.part.perceptual else made

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared distance of features of unit length, summed over layers."""
        total = x.new_zeros(())
        for layer in self.sight:
            x, y = F.relu(layer(x)), F.relu(layer(y))
            total = total + (F.normalize(x, dim=1, eps=1e-6) - F.normalize(y, dim=1, eps=1e-6)).square().sum(1).mean()
        return total


# ---------------------------------------------------------------------------------------------- batches

@part("segments")
class Segments(BatchSampler):
    """Pieces of `length` steps that begin every `offset` steps of an episode, padded at the right.

    The batch: obs and actions, rewards, terminated, all [1, B, length, ...], and `mask`, true where there is a step.
    """

    length: Annotated[int, Field(ge=2)] = 8
    offset: Count = 4

    def build(self, table, rng, batch, gamma):
        table.data.require("this method", "rewards")
        return _Segments(table, rng, batch, self)


class _Segments:
    def __init__(self, table: Table, rng: Streams, batch: int, part: Segments):
        self.table, self.rng, self.batch, self.length, data = table, rng, batch, part.length, table.data
        starts = [np.stack([at := np.arange(0, steps, part.offset), np.full_like(at, steps)], 1) + first for first, steps in zip(data.firsts, data.lengths)]
        self.starts = np.concatenate(starts)  # [pieces, 2]: first row, and the episode's last row

    def draw(self) -> dict[str, Any]:
        picked = self.starts[self.rng.integers(len(self.starts), self.batch)]
        rows = picked[..., :1] + np.arange(self.length)
        mask = rows < picked[..., 1:]
        rows = np.minimum(rows, picked[..., 1:] - 1)
        return self.table.take(rows, ("actions", "rewards", "terminated")) | {"obs": self.table.states(rows), "mask": torch.from_numpy(mask).to(self.table.device)}


def frames_and_games(observations: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Observations with axes [...] as frames [..., C, H, W] and numbers of games [...] (0 if they do not tell)."""
    if isinstance(observations, dict):
        name, = layout.images
        return observations[name], observations["vector"].argmax(-1)
    return observations, torch.zeros(observations.shape[:-3], dtype=torch.long, device=observations.device)


# ---------------------------------------------------------------------------------------------- the transformer

@dataclass
class Imagined:
    """M situations, real or dreamt: keys and values of every layer, which places count [M, n], the next place [M], game [M], the newest frame's
    tokens [M, T], and what actions are worth, [M, A], -inf where illegal."""

    cache: list[tuple[Tensor, Tensor]]
    mask: Tensor
    place: Tensor
    game: Tensor
    tokens: Tensor
    q: Tensor


class ActionValues(nn.Module):
    """An ensemble of heads, each two hidden layers: [..., D] -> [..., heads, actions, width]."""

    def __init__(self, width: int, hidden: int, heads: int, actions: int, outputs: int):
        super().__init__()
        self.actions = actions
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Linear(width, hidden), nn.Dropout(0.01), nn.LayerNorm(hidden), nn.Mish(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.Mish(), nn.Linear(hidden, actions * outputs)) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self.heads], -2).unflatten(-1, (self.actions, -1))


class Body(nn.Module):
    """Embeddings, GPT-2 blocks, and the heads for frames, rewards, ends and action values. legal [games, actions]: which actions exist in which game."""

    def __init__(self, *, tokens: int, codes: int, games: int, actions: int, steps: int, layers: int, heads: int, width: int, dropout: float,
                 value: ValueHead, q_heads: int, q_hidden: int):
        from transformers import GPT2Config, GPT2Model  # seconds to import: only where it is used

        super().__init__()
        self.tokens, self.steps, self.value = tokens, steps, value
        self.cache_word = "cache" if "cache" in inspect.signature(GPT2Model.forward).parameters else "past_key_values"  # its name in older versions
        config = GPT2Config(vocab_size=1, n_positions=steps * (tokens + 1), n_embd=width, n_layer=layers, n_head=heads, activation_function="gelu", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
                            bos_token_id=None, eos_token_id=None)
        with torch.random.fork_rng():  # the library's own initial weights; `reset` draws those that count
            self.trunk = GPT2Model(config)
            self.trunk.wte = nn.Identity()
            self.frame_codes, self.action_codes = nn.Embedding(codes, width), nn.Embedding(actions, width)
            self.frame_game, self.action_game = nn.Embedding(games, width), nn.Embedding(games, width)
            self.frame, self.reward, self.end = (nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n)) for n in (codes, 3, 2))
            self.q = ActionValues(width, q_hidden, q_heads, actions, value.width)
        self.register_buffer("legal", torch.ones(games, actions, dtype=torch.bool))
        self.register_buffer("age", torch.zeros((), dtype=torch.long))  # gradient steps

    def embedded(self, tokens: Tensor, actions: Tensor, game: Tensor) -> Tensor:
        """tokens [B, L, T], actions [B, L], game [B] -> [B, L, T + 1, D]; the trunk adds places."""
        frames = self.frame_codes(tokens) + self.frame_game(game)[:, None, None]
        return torch.cat([frames, (self.action_codes(actions) + self.action_game(game)[:, None]).unsqueeze(2)], 2)

    def forward(self, tokens: Tensor, actions: Tensor, game: Tensor) -> Tensor:
        """The trunk's outputs, [B, L, T + 1, D]; every token sees those before it."""
        x = self.embedded(tokens, actions, game)
        return self.trunk(inputs_embeds=x.flatten(1, 2), use_cache=False).last_hidden_state.view(x.shape)

    def world_loss(self, x: Tensor, tokens: Tensor, rewards: Tensor, ended: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Cross-entropies of next frame tokens, of the reward's sign and of the end, each the mean over what is not padding."""
        following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        first = torch.cat([tokens[:, 1:, :1], tokens[:, :1, :1]], 1)
        labels = torch.cat([tokens[:, :, 1:], first], 2)
        there = torch.cat([mask.unsqueeze(-1).expand_as(tokens[:, :, 1:]), following.unsqueeze(-1)], 2)
        places = torch.cat([x[:, :, : self.tokens - 1], x[:, :, self.tokens :]], 2)       # the last frame token is followed by an action, not by a token
        classes = reward_class(rewards)

        def mean(logits: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, -2).float(), wanted.masked_fill(~valid, IGNORED).flatten(), ignore_index=IGNORED)

        acting = x[:, :, self.tokens]
        return {"frames": mean(self.frame(places), labels, there), "rewards": mean(self.reward(acting), classes, mask), "ends": mean(self.end(acting), ended.long(), mask)}

    def q_outputs(self, x: Tensor, target: nn.Module | None = None) -> Tensor:
        """Outputs of the value head (or of a copy of it) on the trunk's outputs: [B, L, heads, A, width], float32."""
        return (target if target is not None else self.q)(x[:, :, self.tokens - 1]).float()

    def mixture(self, outputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """Heads [..., heads, A, width] mixed with weights [heads] (None: evenly): probabilities of atoms (not logits), or plain numbers. -> [..., A, width]."""
        each = outputs if self.value.scalar else self.value.logits(outputs).softmax(-1)
        return each.mean(-3) if weights is None else (each * weights[:, None, None]).sum(-3)

    def expected(self, mixed: Tensor) -> Tensor:
        """[..., A, width] -> [..., A]."""
        return mixed.squeeze(-1) if self.value.scalar else (mixed * self.value.support(mixed)).sum(-1)

    # ---- dreaming, with keys and values kept

    def _run(self, x: Tensor, cache: list | None, mask: Tensor, places: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        kept = DynamicCache(cache) if cache else DynamicCache(config=self.trunk.config)
        out = self.trunk(inputs_embeds=x, attention_mask=mask, position_ids=places, use_cache=True, **{self.cache_word: kept}).last_hidden_state
        return out, [(layer.keys, layer.values) for layer in kept.layers]

    def _q(self, x: Tensor, game: Tensor) -> Tensor:
        return self.expected(self.mixture(self.q(x).float())).masked_fill(~self.legal[game], -math.inf)

    @torch.no_grad()
    def begin(self, tokens: Tensor, actions: Tensor, count: Tensor, game: Tensor) -> Imagined:
        """Read the last `count` [N] of C steps, tokens [N, C, T], actions [N, C] (the last is not looked at); what is older is padding at the left."""
        mask = (torch.arange(tokens.shape[1], device=count.device) >= tokens.shape[1] - count[:, None]).repeat_interleave(self.tokens + 1, 1)[:, :-1].long()
        places = (mask.cumsum(1) - 1).clamp(min=0)
        x, cache = self._run(self.embedded(tokens, actions, game).flatten(1, 2)[:, :-1], None, mask, places)
        return Imagined(cache, mask, places[:, -1] + 1, game, tokens[:, -1], self._q(x[:, -1], game))

    @torch.no_grad()
    def advance(self, node: Imagined, rows: Tensor, actions: Tensor, streams: Streams | None = None) -> tuple[Imagined, Tensor]:
        """Take actions [M] in situations `rows` [M] of a node: the situations that follow, and their rewards [M] in {-1, 0, 1}.

        The likeliest reward; the likeliest tokens, or sampled ones where `streams` are given. A predicted end cuts nothing.
        """
        cache = [(k[rows], v[rows]) for k, v in node.cache]
        mask, place, game = node.mask[rows], node.place[rows], node.game[rows]
        x, rewards, found = self.action_codes(actions) + self.action_game(game), None, []
        for _ in range(self.tokens + 1):
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            out, cache = self._run(x.unsqueeze(1), cache, mask, place.unsqueeze(1))
            place = place + 1
            rewards = self.reward(out[:, 0]).argmax(-1) - 1 if rewards is None else rewards
            if len(found) < self.tokens:
                logits = self.frame(out[:, 0])
                if streams is not None:
                    logits = logits + torch.from_numpy(streams.gumbel(*logits.shape)[0]).to(logits.device)
                found.append(logits.argmax(-1))
                x = self.frame_codes(found[-1]) + self.frame_game(game)
        return Imagined(cache, mask, place, game, torch.stack(found, 1), self._q(out[:, 0], game)), rewards.float()


def reward_class(rewards: Tensor) -> Tensor:
    """The sign of a reward as a class: 0, 1 or 2."""
    return rewards.sign().long() + 1


def reset(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw a module's weights: embeddings and GPT-2's layers normal of deviation 1/sqrt(inputs), those that end a residual branch smaller by the root of
    the number of layers; PyTorch's uniform one elsewhere. Places of the same token in different steps start alike: a learnt table finds within
    hundreds of steps what an unordered one needs thousands for, namely that a frame resembles the one before it."""
    with torch.no_grad():
        for name, child in module.named_modules():
            weight, bias = getattr(child, "weight", None), getattr(child, "bias", None)
            if not isinstance(weight, nn.Parameter) or isinstance(child, nn.LayerNorm):
                continue
            if isinstance(child, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                bound = 1 / math.sqrt(weight[0].numel())
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)
            else:
                weight.normal_(0, 1 / math.sqrt(weight.shape[1 if isinstance(child, nn.Embedding) else 0]), generator=generator)
                if bias is not None:
                    bias.zero_()
        for body in (m for m in module.modules() if isinstance(m, Body)):
            for block in body.trunk.h:
                for layer in (block.attn.c_proj, block.mlp.c_proj):
                    layer.weight /= math.sqrt(len(body.trunk.h))
            places = body.trunk.wpe.weight
            tokens = torch.empty(1, body.tokens + 1, places.shape[1]).normal_(0, 2 / math.sqrt(places.shape[1]), generator=generator)
            places.copy_((tokens.to(places.device) + places.view(body.steps, 1, body.tokens + 1, -1)[:, :, 0]).flatten(0, 1))
    return module


@contextlib.contextmanager
def own_numbers(generator: torch.Generator, device: torch.device):
    """Dropout draws from torch's global numbers: run it on numbers of ours, and leave the global ones as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


class Grouped(Trainable):
    """A Trainable whose weight matrices decay, and whose biases, normalisations and embeddings do not; parameters under `apart` take `scale` times the
    learning rate. `restart` begins a stage with another optimiser."""

    def __init__(self, name: str, module: nn.Module, optimiser: Optimiser, device, apart: str = "q", scale: float = 1.0):
        self.apart, self.scale = apart, scale
        super().__init__(name, module, optimiser, device)
        self.reset_optimiser()

    def reset_optimiser(self) -> None:
        decayed, plain, own = [], [], []
        still = {p for m in self.module.modules() if isinstance(m, (nn.LayerNorm, nn.Embedding)) for p in m.parameters(recurse=False)}
        for name, p in self.module.named_parameters():
            (own if name.startswith(f"{self.apart}.") else plain if p in still or name.endswith("bias") else decayed).append(p)
        self.optimiser, self.steps = self.part.build([{"params": decayed}, {"params": plain, "weight_decay": 0.0}, {"params": own, "share": self.scale}]), 0

    def restart(self, optimiser: Optimiser) -> None:
        self.part = optimiser
        self.reset_optimiser()
