"""Our side of benchmarks/language.py: one process, some GRPO steps, one JSON line."""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])

from volvelle.core.parts import part  # noqa: E402
from volvelle.core.run import Run, RunConfig  # noqa: E402
from volvelle.core.trainable import AdamW  # noqa: E402
from volvelle.language.fittings import Updates  # noqa: E402
from volvelle.language.methods.grpo import grpo  # noqa: E402
from volvelle.language.models import Pretrained  # noqa: E402
from volvelle.language.records import Prompt  # noqa: E402
from volvelle.language.samplers import Plain  # noqa: E402
from volvelle.language.slots import LanguageTask  # noqa: E402


@part("benchmark")
class Benchmark(LanguageTask):
    def split(self, name):
        return [Prompt(str(i), text=t) for i, t in enumerate(job["prompts"])]


def reward(prompt, response):
    return float(sum(map(ord, response)) % 7)


recipe = grpo(prompts=len(job["prompts"]), sampler=Plain(group=job["group"], max_tokens=job["tokens"]), reward=reward, updates=Updates(optimiser=AdamW(lr=1e-6)))
run = Run(RunConfig(recipe=recipe, task=Benchmark(), model=Pretrained(job["folder"]), device="cpu"), Path(tempfile.mkdtemp()))
learner = recipe.start(run)
learner.policy.end_ids = ()  # every completion has its full length, as on the other side
learner.step()
began, tokens = time.perf_counter(), 0
for _ in range(job["steps"]):
    tokens += learner.step()["tokens"]
seconds = time.perf_counter() - began
print(json.dumps({"tokens_per_second": tokens / seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "tokens": tokens, "seconds": seconds}))
