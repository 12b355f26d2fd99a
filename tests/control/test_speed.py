"""descent and compile=true: the same steps, gradients for one network only, and a note where nothing can be compiled."""

import pytest
import torch

from volvelle.control.networks import Linear
from volvelle.control.speed import descent
from volvelle.control.stacked import Stacked
from volvelle.core.trainable import Adam
from volvelle.core.trainer import start
from volvelle.core.verbs import configure
from volvelle.offline.behaviours import Walker
from volvelle.offline.commands import Maze
from volvelle.offline.tasks import Generated

PENDULUM = Generated(quality="medium", steps=1000)
MAZE = Generated(env=Maze(maze="small"), behaviour=Walker(), quality="navigate", steps=1000)
SMALL = ["network.hidden=[16,16]", "seeds=2"]
ONLINE = [*SMALL, "replay.capacity=500", "replay.batch=8", "warmup=16", "period=20", "every=4"]
CASES = {
    "control/sac": ("Pendulum-v1", [*ONLINE, "delay=1"]), "control/td3": ("Pendulum-v1", ONLINE), "control/sac-discrete": ("CartPole-v1", ONLINE),
    "control/dqn": ("CartPole-v1", ["replay=prioritised", *ONLINE]),
    "offline/iql": (PENDULUM, [*SMALL, "batch=8", "period=3", "value_network.hidden=[16]"]),
    "offline/cql": (PENDULUM, [*SMALL, "batch=8", "period=3", "samples=2", "threshold=1.0"]),
    "offline/td3-bc": (PENDULUM, [*SMALL, "batch=8", "period=3"]), "offline/awac": (PENDULUM, [*SMALL, "batch=8", "period=3"]),
    "offline/gcivl": (MAZE, [*SMALL, "batch=8", "period=3", "value_network.hidden=[16]"])}


def learner(method, folder, reporter=None, **fields):
    task, words = CASES[method]
    return start(configure(method, task, overrides=words, **fields), folder, reporter)


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_a_compiled_step_is_the_plain_one(method, tmp_path):
    weights, notes = [], []
    for compile in (False, True):
        torch.compiler.reset()
        run, live = learner(method, tmp_path / str(compile), notes.append, compile=compile)
        first = torch.cat([m.flat.detach().clone() for m in run.models.values() if isinstance(m, Stacked) and m.part is not None])
        for _ in range(3 if "offline" in method else 1):
            live.learn() if "offline" in method else live.step()
        weights.append(torch.cat([m.flat.detach() for m in run.models.values() if isinstance(m, Stacked) and m.part is not None]))
    plain, fast = weights
    assert not [n for n in notes if "compil" in n] and (plain != first).float().mean() > 0.3  # the rest are dead units
    assert torch.allclose(plain, fast, atol=1e-6), float((plain - fast).abs().max())


def test_descent_gives_gradients_to_one_network_only(tmp_path):
    run, _ = learner("control/td3", tmp_path)
    one, other = (Stacked(name, Linear(2, 3, 1), Adam(clip=None), "cpu", 2) for name in "ab")
    for net in (one, other):
        torch.nn.init.ones_(net.module.weight)
    x = torch.randn(2, 4, 3)
    down = descent(run, one, lambda x: (other.module(one.module(x).expand(-1, -1, 3)).mean((-1, -2)), {"made": one.module(x)}), through=True)
    loss, more = down(x)
    assert loss.shape == (2,) and not loss.requires_grad and not more["made"].requires_grad
    assert torch.allclose(one.module.weight.grad.squeeze(-1), 3 * x.mean(1)) and other.flat.grad.abs().max() == 0
    down(x)
    assert torch.allclose(one.module.weight.grad.squeeze(-1), 6 * x.mean(1))  # gradients add up until the step


def test_what_cannot_be_compiled_is_said(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setenv("PATH", "")
    _, live = learner("control/dqn", tmp_path, notes.append, compile=True)
    assert notes == ["note: compile=true, but there is no C++ compiler here; running uncompiled"]
    live.step()
    notes.clear()
    start(configure("offline/crl", MAZE, compile=True), tmp_path, notes.append)
    assert notes[-1] == "note: compile=true changes nothing: contrastive has no compiled form"
