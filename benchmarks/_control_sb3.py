"""Stable-Baselines3's side of benchmarks/control.py: one process, one job, one JSON line."""

import importlib
import json
import sys
import time

import gymnasium
import numpy as np
import torch

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])

from sb3_contrib import QRDQN  # noqa: E402
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.noise import NormalActionNoise  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402

PPO_SETTINGS = {"n_steps": 256, "batch_size": 64, "n_epochs": 10}


def timed(function, count: int) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": count / wall, "per_cpu_second": count / cpu}


def ppo_speed() -> dict:
    model = PPO("MlpPolicy", make_vec_env(job["env"], 8), seed=0, device="cpu", **PPO_SETTINGS)
    model.learn(2048)
    return timed(lambda: model.learn(job["count"]), job["count"])


def update_speed(kind) -> dict:
    model = kind("MlpPolicy", job["env"], learning_starts=1000, seed=0, device="cpu")
    model.learn(1020)
    model.train(20, 256)
    return timed(lambda: model.train(job["count"], 256), job["count"])


def score() -> dict:
    started = time.perf_counter()
    common = {"seed": job["seed"], "device": "cpu"}
    if job["method"] == "ppo":
        model = PPO("MlpPolicy", make_vec_env(job["env"], 8, seed=job["seed"]), **common | PPO_SETTINGS)
    elif job["method"] == "a2c":
        model = A2C("MlpPolicy", make_vec_env(job["env"], 16, seed=job["seed"]), **common)
    elif job["method"] in ("dqn", "qr-dqn"):
        breakout = {"learning_rate": 2.5e-4, "buffer_size": 100_000, "batch_size": 32, "target_update_interval": 1000, "exploration_fraction": 0.1,
                    "exploration_final_eps": 0.01, "policy_kwargs": {"net_arch": [128]}} if "Breakout" in job["env"] else {}
        kind, same = (DQN, {}) if job["method"] == "dqn" else (QRDQN, {"policy_kwargs": {"n_quantiles": 50}, "max_grad_norm": 10})
        model = kind("MlpPolicy", job["env"], **common | same | {"learning_rate": 1e-3, "buffer_size": 50_000, "learning_starts": 1000, "batch_size": 64, "train_freq": 4,
                                                       "target_update_interval": 250, "exploration_fraction": 0.3, "exploration_final_eps": 0.04} | breakout)
    elif job["method"] == "td3":
        size = gymnasium.make(job["env"]).action_space.shape
        model = TD3("MlpPolicy", job["env"], learning_starts=1000, learning_rate=1e-3, policy_kwargs={"net_arch": [256, 256]},
                    action_noise=NormalActionNoise(np.zeros(size), np.full(size, 0.1)), **common)
    else:
        model = SAC("MlpPolicy", job["env"], learning_starts=1000, **common)
    model.learn(job["count"])
    seconds = time.perf_counter() - started
    mean, _ = evaluate_policy(model, make_vec_env(job["env"], 1, seed=1000 + job["seed"]), n_eval_episodes=20, deterministic=True)
    return {"return": float(mean), "seconds": seconds}


if job["env"].startswith("MinAtar"):
    importlib.import_module("minatar.gym").register_envs()
if job["what"] == "score":
    found = score()
else:
    found = ppo_speed() if job["method"] == "ppo" else update_speed({"sac": SAC, "dqn": DQN}[job["method"]])
print(json.dumps(found))
