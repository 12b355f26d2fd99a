"""Policies over tokens. `Policy` is the protocol; `CausalPolicy` wraps any Hugging Face causal language model.

A policy encodes and decodes, steps through text (`stepper`), and scores a batch (`score`). Its weights belong to a Trainable of the run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from volvelle.core.errors import RunStopped, UserError
from volvelle.core.trainable import Optimiser, Trainable

from .packing import pack
from .records import Batch, Prompt, Scores
from .sampling import Stops
from .stepping import CausalStepper

CHUNK = 1 << 24  # logits held at once while scoring, in numbers


class Policy:
    """What every kind of policy has in common.

    vocabulary: number of token ids; context: longest prompt plus response; end_ids: tokens that end a response;
    module: the torch module; trainable: set once the run has taken the module in; steps_exactly: stepping and scoring give the same
    log-probs (to rounding of float32), so that what the sampler recorded need not be computed again.
    """

    vocabulary: int
    context: int
    end_ids: tuple[int, ...] = ()
    module: torch.nn.Module
    trainable: Trainable | None = None
    steps_exactly: bool = True
    complete_at: int | None = None  # length at which a response is complete without an end token

    def own(self, run, optimiser: Optimiser | None) -> "Policy":
        """Hand the weights to the run, which places, steps and checkpoints them."""
        self.trainable = run.model("policy", self.module, optimiser)
        return self

    def encode(self, prompt: Prompt) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def encode_text(self, text: str) -> list[int]: ...

    def pieces(self) -> list[str]:
        """The text of every token id by itself."""
        return [self.decode([i]) for i in range(self.vocabulary)]

    def stops(self, stop: tuple[str, ...]) -> Stops:
        cache = self.__dict__.setdefault("_stops", {})
        if stop not in cache:
            cache[stop] = Stops(self, stop)
        return cache[stop]

    def stepper(self, prompts: list[list[int]], members: list[int], max_tokens: int): ...

    def score(self, batch: Batch, keep: torch.Tensor, needs: frozenset[str] = frozenset(), temperature: float = 1.0) -> Scores: ...

    def twin(self) -> "Policy":
        """A frozen copy that shares no weights with this policy."""
        twin = copy.copy(self)
        twin.__dict__.pop("_stops", None)
        twin.trainable = None
        twin.module = copy.deepcopy(self.module).requires_grad_(False).eval()
        return twin

    def frozen_copy(self) -> "Policy":
        """The policy as it is now, for ever, able to score."""
        return self.twin()

    def lagged(self, run, every: int | None = None, tau: float | None = None) -> "Policy":
        """A frozen twin that follows this policy; `.follow` is the Lagged (refresh(), update()), checkpointed under the asking part's path."""
        twin = self.twin()
        twin.follow = run.lagged(self.trainable, every, tau, twin.module)
        return twin

    def backward(self, loss: torch.Tensor) -> None:
        self.trainable.backward(loss)

    def step(self) -> float:
        return self.trainable.step()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def save(self, folder: Path) -> None: ...

    def read(self, folder: Path) -> None:
        """Take over the weights that `save` wrote."""


def body_of(model) -> torch.nn.Module:
    """The part of a transformers model that makes hidden states."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model


def statistics(logits: torch.Tensor, target: torch.Tensor, needs: frozenset[str]) -> tuple[torch.Tensor, ...]:
    """From logits [M, V]: log-prob of the target [M], and on request the entropy and the mean log-prob over the vocabulary, each [M]."""
    total = logits.logsumexp(-1)
    out = [logits.gather(1, target[:, None]).squeeze(1) - total]
    if "entropy" in needs:
        out.append(total - ((logits - total[:, None]).exp() * logits).sum(-1))
    if "mean_logp" in needs:
        out.append(logits.mean(-1) - total)
    return tuple(out)


def scores_from(flat: dict[str, torch.Tensor], shape: torch.Size, rows: torch.Tensor, cols: torch.Tensor) -> Scores:
    """Put [M] results back to where their tokens stand in [N, T]; elsewhere 0."""
    made = {k: torch.zeros(shape, dtype=v.dtype, device=v.device).index_put((rows, cols), v) for k, v in flat.items()}
    return Scores(**made)


class CausalPolicy(Policy):
    """A Hugging Face causal language model with its tokenizer.

    dtype "bfloat16": weights stay float32, passes run under autocast. Raises UserError if the tokenizer has no end token.
    """

    def __init__(self, module: torch.nn.Module, tokenizer: Any, dtype: str = "float32", compiled: bool = False):
        self.module, self.tokenizer, self.dtype = module, tokenizer, dtype
        self.steps_exactly = dtype == "float32"
        config = self.model.config
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 20
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = ends if ends is not None else tokenizer.eos_token_id
        if ends is None:
            raise UserError("the model's tokenizer has no end-of-text token; set tokenizer.eos_token")
        self.end_ids = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
        self.width = config.get_text_config(decoder=True).hidden_size
        self.backbone = body_of(self.model)
        accepted = inspect.signature(self.backbone.forward).parameters
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"
        register_attention(self.model)
        self._refuse()
        if compiled:
            self.backbone.compile(dynamic=True)

    @property
    def model(self):
        """The transformers model itself, inside LoRA's wrapper if there is one."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    @torch.no_grad()
    def _refuse(self) -> None:
        """UserError for models that shared prefixes and branches would get wrong: attention that is not full, logits that are not head(hidden)."""
        from transformers import DynamicCache

        if odd := {type(layer).__name__ for layer in DynamicCache(config=self.model.config).layers} - {"DynamicLayer"}:
            raise UserError(f"this model keeps {', '.join(sorted(odd))}, which is not supported; accepted: models with full attention in every layer")
        device = next(self.module.parameters()).device
        ids = torch.tensor([[1 % self.vocabulary, 2 % self.vocabulary]], device=device)
        training, _ = self.module.training, self.module.eval()
        whole = self.model(input_ids=ids, use_cache=False).logits
        parts = self.model.get_output_embeddings()(self.backbone(input_ids=ids, use_cache=False).last_hidden_state)
        self.module.train(training)
        if not torch.allclose(whole.float(), parts.float(), atol=1e-4):
            raise UserError("this model changes its logits after the output layer (scaling or capping), which is not supported yet; "
                            "accepted: models whose logits are the output layer of the last hidden state")

    def autocast(self):
        if self.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(next(self.module.parameters()).device.type, dtype=torch.bfloat16)

    def encode(self, prompt):
        if prompt.messages is not None:
            if self.tokenizer.chat_template is None:
                raise RunStopped(f"prompt {prompt.id!r} is a conversation, and the model's tokenizer has no chat template")
            text = self.tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(prompt.text)["input_ids"]

    def encode_text(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def pieces(self):
        return self.tokenizer.batch_decode([[i] for i in range(self.vocabulary)], clean_up_tokenization_spaces=False)

    def forward(self, ids, positions, mask, cache=None) -> torch.Tensor:
        """Hidden states [R, L, H] under an explicit additive mask [R, 1, L, keys]."""
        extra = {self.cache_name: cache, "use_cache": True} if cache is not None else {"use_cache": False}
        return self.backbone(input_ids=ids, position_ids=positions, attention_mask=mask, **extra).last_hidden_state

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states [M, H], float32."""
        return self.model.get_output_embeddings()(hidden).float()

    def stepper(self, prompts, members, max_tokens):
        return CausalStepper(self, prompts, members)

    def hidden(self, batch: Batch, keep: torch.Tensor):
        """States [M, H] that predict the kept tokens, with their rows and columns in [N, T]."""
        layout = pack(batch, keep, self.width, torch.bfloat16 if self.dtype == "bfloat16" else torch.float32)
        states = self.forward(layout.ids, layout.positions, layout.mask)
        return states.flatten(0, 1)[layout.source], layout.rows, layout.cols

    def score(self, batch, keep, needs=frozenset(), temperature=1.0):
        """Scores of the tokens marked in keep [N, T]; logits are divided by `temperature`. Elsewhere 0."""
        with self.autocast():
            states, rows, cols = self.hidden(batch, keep)
            target = batch.ids[rows, cols]

            def part(states, target):
                logits = self.head(states)
                return statistics(logits if temperature == 1.0 else logits / temperature, target, needs)

            size = max(1, CHUNK // self.vocabulary)
            pieces = []
            for at in range(0, max(1, len(target)), size):  # at least one piece: rows that are all muted may come alone
                piece = (states[at:at + size], target[at:at + size])
                again = len(target) > size and torch.is_grad_enabled()
                pieces.append(checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) if again else part(*piece))
        names = ["logps"] + [n for n in ("entropy", "mean_logp") if n in needs]
        flat = {n: torch.cat([p[i] for p in pieces]) for i, n in enumerate(names)}
        return scores_from(flat, keep.shape, rows, cols)

    def frozen_copy(self):
        return _WithoutAdapter(self) if hasattr(self.module, "disable_adapter") else self.twin()

    def twin(self):
        twin = super().twin()
        twin.backbone = body_of(twin.model)
        return twin

    def value_module(self) -> torch.nn.Module:
        return _ValueModel(self)

    def save(self, folder):
        """A folder that transformers' from_pretrained reads; LoRA weights are merged in, and kept beside it under adapter/."""
        model = self.module
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(Path(folder) / "adapter")
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def read(self, folder):
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        if hasattr(self.module, "merge_and_unload"):
            set_peft_model_state_dict(self.module, load_file(Path(folder) / "adapter" / "adapter_model.safetensors"))
        else:
            self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


class _WithoutAdapter(Policy):
    """The base model under a LoRA policy: the same weights, scored with the adapter switched off."""

    def __init__(self, policy: CausalPolicy):
        self.policy, self.module = policy, policy.module

    def score(self, batch, keep, needs=frozenset(), temperature=1.0):
        with self.module.disable_adapter():
            return self.policy.score(batch, keep, needs, temperature)


class _ValueModel(torch.nn.Module):
    """The policy's body with a scalar head that starts at zero. `forward(batch, keep)` -> values [N, T] of the states before each token."""

    def __init__(self, policy: CausalPolicy):
        super().__init__()
        twin = policy.twin()
        self.body = twin.backbone.requires_grad_(True)
        self.value = torch.nn.utils.skip_init(torch.nn.Linear, policy.width, 1)  # the usual start would draw global random numbers
        torch.nn.init.zeros_(self.value.weight)
        torch.nn.init.zeros_(self.value.bias)
        self._policy = [twin]  # in a list: its output layer is not part of this module

    def forward(self, batch, keep):
        policy = self._policy[0]
        with policy.autocast():
            states, rows, cols = policy.hidden(batch, keep)
            return scores_from({"logps": self.value(states).squeeze(-1).float()}, keep.shape, rows, cols).logps


def grouped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Scaled-dot-product attention that never copies keys and values for grouped heads: query heads join their keys' rows."""
    batch, heads, length, width = query.shape
    repeat = heads // key.shape[1]
    if repeat > 1:
        query = query.reshape(batch, key.shape[1], repeat * length, width)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat(1, 1, repeat, 1)
        elif length > 1:
            causal = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - length)
            attention_mask = causal.repeat(repeat, 1)[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling,
        is_causal=attention_mask is None and length > 1)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register("volvelle", grouped_attention)
    AttentionMaskInterface.register("volvelle", sdpa_mask)


def register_attention(model) -> None:
    """Use grouped_attention where the model would use transformers' scaled-dot-product attention."""
    if model.config._attn_implementation == "sdpa":
        _register()
        model.set_attn_implementation("volvelle")
