"""Random little causal models of several architectures, and their log-probs by the longest way round: one unpadded forward pass each."""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from volvelle.language.models import character_tokenizer
from volvelle.language.policies import CausalPolicy
from volvelle.language.records import Prompt


def random_model(seed: int, kind: str = "llama", heads: int = 4, shared: int = 2, tie: bool = False, context: int = 96, **fields):
    """A model whose weights are large enough that every path through it shows. shared: key-value heads."""
    tokenizer = character_tokenizer(length=context)
    config = dict(vocab_size=len(tokenizer), hidden_size=8 * heads, intermediate_size=24, num_hidden_layers=2, num_attention_heads=heads,
                  num_key_value_heads=shared, max_position_embeddings=context, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                  pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=tie) | fields
    cls, configuration = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(configuration(**config)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.35)
                elif "bias" in name:
                    parameter.normal_(0, 0.2)
    return model, tokenizer


def policy_and_plain(seed: int = 0, **options):
    """A policy, and an independent copy of its model that attends with transformers' own attention."""
    model, tokenizer = random_model(seed, **options)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    policy = CausalPolicy(model, tokenizer)
    assert plain.config._attn_implementation == "sdpa" and policy.model.config._attn_implementation != "sdpa"
    return policy, plain


@torch.no_grad()
def full_logits(plain, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[T, V] logits that predict each response token: a forward pass over prompt and response alone, with neither padding nor cache."""
    ids = torch.tensor([prompt + response])
    return plain(input_ids=ids[:, :-1] if len(response) else ids, use_cache=False).logits[0, len(prompt) - 1:].float()


def prompts(rng, count: int, longest: int = 20) -> list[Prompt]:
    letters = list("abcdefghijklmnopqrstuvwxyz ")
    return [Prompt(f"p{i}", text="".join(rng.choice(letters, size=rng.integers(1, longest))), row={"index": i}) for i in range(count)]


def reload(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
