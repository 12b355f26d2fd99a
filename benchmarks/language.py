"""GRPO steps here and in TRL's GRPOTrainer: the same model, prompts, group size, lengths, one update per batch, float32.

    python benchmarks/language.py [--model tiny|smollm2] [--rounds 3] [--threads 1,2]

TRL gets an environment of its own (made on the first call, under the user's cache). The two sides run in turn, each in fresh processes, at
every thread count given; each side's best thread count is reported. Prints completion tokens per second of whole steps (sampling,
scoring, update), peak memory, and the ratios. Every completion has exactly `--tokens` tokens on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRL = "trl==1.16.0"


def cache() -> Path:
    return Path(os.environ.get("VOLVELLE_CACHE") or Path.home() / ".cache" / "volvelle")


def trl_python() -> Path:
    """The interpreter of TRL's own environment."""
    home = cache() / "benchmark-trl"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "torch==2.13.0", TRL, "transformers", "accelerate", "datasets"], check=True)
        (home / "ready").touch()
    return python


def base_model(kind: str) -> Path:
    """A folder that both sides load: a random 4-layer, 256-wide Llama over characters, or SmolLM2-135M."""
    from volvelle.language.models import SmolLM2, Tiny

    if kind == "smollm2":
        return SmolLM2().folder()
    return Tiny(layers=4, width=256, heads=4, context=512, warmup=0).build(None)


def prompts(folder: Path, tokens: int, count: int) -> list[str]:
    """`count` different prompts of exactly `tokens` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for i in range(count):
        text = " ".join(str((37 * j + 11 * i) % 97) for j in range(tokens))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        text = tokenizer.decode(ids)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != tokens:
            raise SystemExit("the prompt does not survive the round trip through the tokenizer")
        made.append(text)
    return made


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--threads", default="1,2")
    ask.add_argument("--steps", type=int, default=None, help="timed steps per process")
    ask.add_argument("--prompts", type=int, default=None)
    ask.add_argument("--group", type=int, default=8)
    ask.add_argument("--prompt-tokens", type=int, default=256)
    ask.add_argument("--tokens", type=int, default=64)
    ask.add_argument("--json", type=Path)
    args = ask.parse_args()
    steps = args.steps or (6 if args.model == "tiny" else 2)
    count = args.prompts or (4 if args.model == "tiny" else 1)
    folder = base_model(args.model)
    job = {"folder": str(folder), "prompts": prompts(folder, args.prompt_tokens, count), "group": args.group, "tokens": args.tokens, "steps": steps}
    sides = {"volvelle": [sys.executable, str(HERE / "_grpo_volvelle.py")], "trl": [str(trl_python()), str(HERE / "_grpo_trl.py")]}
    found: dict[tuple[str, int], list[dict]] = {}
    for round_ in range(args.rounds):
        for threads in map(int, args.threads.split(",")):
            for side in (list(sides) if round_ % 2 == 0 else list(sides)[::-1]):
                env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
                done = subprocess.run([*sides[side], json.dumps(job | {"threads": threads})], env=env, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
                row = json.loads(done.stdout.strip().splitlines()[-1])
                found.setdefault((side, threads), []).append(row)
                print(f"round {round_ + 1}  {side:9} {threads} threads  {row['tokens_per_second']:8.1f} tokens/s  {row['peak_mb']:7.0f} MB", flush=True)
    best = {}
    for side in sides:
        speeds = {t: statistics.median(r["tokens_per_second"] for r in rows) for (s, t), rows in found.items() if s == side}
        threads = max(speeds, key=speeds.get)
        best[side] = {"threads": threads, "tokens_per_second": speeds[threads], "peak_mb": statistics.median(r["peak_mb"] for r in found[side, threads])}
        print(f"{side:9} best at {threads} threads: {speeds[threads]:.1f} tokens/s, {best[side]['peak_mb']:.0f} MB")
    ratio = best["volvelle"]["tokens_per_second"] / best["trl"]["tokens_per_second"]
    memory = best["volvelle"]["peak_mb"] / best["trl"]["peak_mb"]
    print(f"{args.model}: {ratio:.2f}x TRL's tokens per second, {memory:.2f}x its peak memory")
    if args.json:
        args.json.write_text(json.dumps({"job": {k: v for k, v in job.items() if k != "prompts"} | {"model": args.model, "prompts": count}, "best": best, "ratio": ratio, "memory": memory,
                                         "runs": [{"side": s, "threads": t, **r} for (s, t), rows in found.items() for r in rows]}, indent=2))


if __name__ == "__main__":
    main()
