"""`make demo`: GRPO on SmolLM2-135M learns sums and differences of digits, in under ten minutes on two cores."""

import sys
from pathlib import Path

import volvelle
from volvelle.cli import progress, show_metrics

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20

with progress("GRPO on chain sums") as tell:
    made = volvelle.train("grpo", task="chain-sum-easy", model="smollm2", steps=STEPS, checkpoint_every=0, progress=tell,
                          overrides=["prompts=16", "updates.optimiser.lr=3e-6", "evaluation.split=test", "evaluation.prompts=48", "evaluation.samples=4"])
page = volvelle.report(made.folder)
show_metrics(made.result["metrics"], "held-out questions, before and after", made.result["start"])
print(f"accuracy on held-out questions: {made.result['start']['pass@1']:.3f} -> {made.result['metrics']['pass@1']:.3f}")
print(f"the policy: {made.folder / 'policy'} (transformers' from_pretrained reads it)\nreport: {Path(page).resolve()}")
