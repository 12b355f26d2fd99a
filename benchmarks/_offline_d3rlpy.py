"""d3rlpy's side of benchmarks/offline.py: one process, one job, one JSON line."""

import json
import sys
import time
import warnings

warnings.simplefilter("ignore")

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])

import structlog  # noqa: E402

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

import d3rlpy  # noqa: E402
from d3rlpy.algos import AWACConfig, BCConfig, CQLConfig, IQLConfig, TD3PlusBCConfig  # noqa: E402
from d3rlpy.algos.utility import build_scalers_with_transition_picker  # noqa: E402
from d3rlpy.models.encoders import VectorEncoderFactory  # noqa: E402
from d3rlpy.preprocessing import MinMaxActionScaler, StandardObservationScaler  # noqa: E402

saved = np.load(job["data"], allow_pickle=False)
dataset = d3rlpy.dataset.MDPDataset(saved["observations"], saved["actions"], saved["rewards"], saved["terminals"], saved["timeouts"],
                                    action_space=d3rlpy.ActionSpace.CONTINUOUS)
scaler = MinMaxActionScaler(minimum=saved["low"], maximum=saved["high"])
small = job.get("small")  # {"hidden": ..., "batch": ..., "lr": ...} instead of the defaults
two, three = (VectorEncoderFactory(small["hidden"] if small else layers) for layers in ([256, 256], [256, 256, 256]))
both = {"action_scaler": scaler, "actor_encoder_factory": two, "critic_encoder_factory": two}
CONFIG = {
    "bc": lambda: BCConfig(action_scaler=scaler, encoder_factory=two),
    "iql": lambda: IQLConfig(**both, value_encoder_factory=two),
    "td3-bc": lambda: TD3PlusBCConfig(**both, observation_scaler=StandardObservationScaler()),
    "awac": lambda: AWACConfig(**both),
    "cql": lambda: CQLConfig(action_scaler=scaler, actor_encoder_factory=three, critic_encoder_factory=three, actor_learning_rate=1e-4, temp_learning_rate=1e-4,
                             alpha_learning_rate=0.0, alpha_threshold=0.0, conservative_weight=10.0),
}


def algorithm(seed: int):
    d3rlpy.seed(seed)
    config = CONFIG[job["method"]]()
    for name in ("learning_rate", "actor_learning_rate", "critic_learning_rate", "temp_learning_rate"):
        if small and hasattr(config, name):
            setattr(config, name, small["lr"])
    made = config.create(device="cpu:0")
    build_scalers_with_transition_picker(made, dataset)
    made.build_with_dataset(dataset)
    return made


def updates(algo, count: int) -> None:
    """What d3rlpy's fit does in every step, without its logging and progress bar."""
    for _ in range(count):
        algo.update(dataset.sample_transition_batch(small["batch"] if small else 256))


def timed(function, count: int) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": count / wall, "per_cpu_second": count / cpu}


def speed() -> dict:
    algo = algorithm(0)
    updates(algo, 20)
    return timed(lambda: updates(algo, job["count"]), job["count"])


def score() -> dict:
    started = time.perf_counter()
    algo = algorithm(job["seed"])
    updates(algo, job["count"])
    seconds = time.perf_counter() - started
    env, returns = gymnasium.make(job["env"]), []
    for episode in range(20):
        obs, over, total = env.reset(seed=1000 * (1 + job["seed"]) + episode)[0], False, 0.0
        while not over:
            obs, reward, terminated, truncated, _ = env.step(algo.predict(obs[None].astype(np.float32))[0])
            over, total = terminated or truncated, total + float(reward)
        returns.append(total)
    return {"return": float(np.mean(returns)), "seconds": seconds}


print(json.dumps(score() if job["what"] == "score" else speed()))
