"""The dual methods and smore resume bit for bit, several seeds side by side."""

import pytest
from helpers import stop_at

import volvelle
from volvelle.core.state import fingerprint, load_state
from volvelle.core.trainer import checkpoints
from volvelle.offline.behaviours import Walker
from volvelle.offline.commands import Maze
from volvelle.offline.tasks import Generated

PENDULUM = Generated(quality="medium", steps=600)
MAZE = Generated(env=Maze(maze="small"), behaviour=Walker(), quality="navigate", steps=2000)
SMALL = ["network.hidden=[32]", "value_network.hidden=[32]", "batch=16", "period=2", "evaluation.episodes=1", "seeds=2"]
EXPERT = "sampler.expert=pendulum-expert"


@pytest.mark.parametrize("method, task, words", [
    ("dual-rl", PENDULUM, ["random_actions=2", "noise=0.1", "value_updates=2"]), ("recoil", PENDULUM, [EXPERT]), ("dual-q-imitation", PENDULUM, [EXPERT]),
    ("dual-v-imitation", PENDULUM, [EXPERT]), ("smore", MAZE, ["form=discriminator"])], ids=lambda v: v if isinstance(v, str) else None)
def test_resumes_exactly(method, task, words, tmp_path):
    options = dict(task=task, overrides=[*SMALL, *words], steps=4, checkpoint_every=2)
    volvelle.train(method, folder=tmp_path / "whole", strict=True, **options)
    with pytest.raises(KeyboardInterrupt):
        volvelle.train(method, folder=tmp_path / "broken", progress=stop_at(3), strict=True, **options)
    volvelle.train(resume=tmp_path / "broken")
    assert fingerprint(load_state(checkpoints(tmp_path / "whole")[-1])) == fingerprint(load_state(checkpoints(tmp_path / "broken")[-1]))
