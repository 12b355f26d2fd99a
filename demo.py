"""`make demo`: GRPO on SmolLM2-135M learns to find greatest common divisors, in about ten minutes on two cores."""

import sys
from pathlib import Path

import volvelle
from volvelle.cli import progress, show_metrics

with progress("GRPO on gcd") as tell:
    made = volvelle.train("grpo", task="gcd-easy", model="smollm2", steps=int(sys.argv[1]) if len(sys.argv) > 1 else 30, dtype="bfloat16", checkpoint_every=0, progress=tell,
                          overrides=["prompts=8", "updates.optimiser.lr=3e-6", "evaluation.prompts=40", "evaluation.samples=4"])
page = volvelle.report(made.folder)
show_metrics(made.result["metrics"], "held-out questions, before and after", made.result["start"])
low, high = made.result["start"]["pass@1_high"], made.result["metrics"]["pass@1_low"]
print(f"accuracy on held-out questions: {made.result['start']['pass@1']:.3f} -> {made.result['metrics']['pass@1']:.3f}")
print(f"the policy: {made.folder / 'policy'} (transformers' from_pretrained reads it)\nreport: {Path(page).resolve()}")
