"""TRL's side of benchmarks/language.py: one process, some GRPO steps, one JSON line."""

import json
import resource
import sys
import tempfile
import time

import torch

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(job["folder"])
model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
clock, tokens = [], [0]


class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        clock.append((time.perf_counter(), tokens[0]))


def reward(prompts, completions, completion_ids, **kwargs):
    tokens[0] += sum(map(len, completion_ids))
    return [float(sum(map(ord, c)) % 7) for c in completions]


rows = len(job["prompts"]) * job["group"]
config = GRPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, num_generations=job["group"], max_completion_length=job["tokens"],
                    gradient_accumulation_steps=1, num_iterations=1, beta=0.0, temperature=1.0, learning_rate=1e-6, max_steps=job["steps"] + 1, bf16=False, fp16=False,
                    use_cpu=True, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=0,
                    generation_kwargs={"min_new_tokens": job["tokens"]})
data = Dataset.from_list([{"prompt": p} for p in job["prompts"]] * 64)
GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()
(start, before), (end, after) = clock[0], clock[-1]
print(json.dumps({"tokens_per_second": (after - before) / (end - start), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "tokens": after - before,
                  "seconds": end - start}))
