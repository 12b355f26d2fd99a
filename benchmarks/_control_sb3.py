"""Stable-Baselines3's side of benchmarks/control.py: one process, one job, one JSON line."""

import json
import sys
import time

import torch

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])

from stable_baselines3 import DQN, PPO, SAC  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402

PPO_SETTINGS = {"n_steps": 256, "batch_size": 64, "n_epochs": 10, "device": "cpu"}


def timed(function, count: int) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": count / wall, "per_cpu_second": count / cpu}


def ppo_speed() -> dict:
    model = PPO("MlpPolicy", make_vec_env(job["env"], 8), seed=0, **PPO_SETTINGS)
    model.learn(2048)
    return timed(lambda: model.learn(job["count"]), job["count"])


def update_speed(kind) -> dict:
    model = kind("MlpPolicy", job["env"], learning_starts=1000, seed=0, device="cpu")
    model.learn(1020)
    model.train(20, 256)
    return timed(lambda: model.train(job["count"], 256), job["count"])


def score() -> dict:
    started = time.perf_counter()
    if job["method"] == "ppo":
        model = PPO("MlpPolicy", make_vec_env(job["env"], 8, seed=job["seed"]), seed=job["seed"], **PPO_SETTINGS)
    elif job["method"] == "dqn":
        model = DQN("MlpPolicy", job["env"], seed=job["seed"], device="cpu", learning_rate=1e-3, buffer_size=50_000, learning_starts=1000, batch_size=64,
                    train_freq=4, target_update_interval=250, exploration_fraction=0.3, exploration_final_eps=0.04)
    else:
        model = SAC("MlpPolicy", job["env"], seed=job["seed"], device="cpu", learning_starts=1000)
    model.learn(job["count"])
    seconds = time.perf_counter() - started
    mean, _ = evaluate_policy(model, make_vec_env(job["env"], 1, seed=1000 + job["seed"]), n_eval_episodes=20, deterministic=True)
    return {"return": float(mean), "seconds": seconds}


if job["what"] == "score":
    found = score()
else:
    found = ppo_speed() if job["method"] == "ppo" else update_speed({"sac": SAC, "dqn": DQN}[job["method"]])
print(json.dumps(found))
