"""An environment family small enough for tests: act as the context says."""

import gymnasium as gym
import numpy as np

from volvelle.curriculum.families import Family

SMALL = ["envs=8", "length=16", "epochs=1", "minibatches=1", "network.hidden=[8]", "evaluation.episodes=2"]


class Signpost(gym.Env):
    """One step; the reward is minus the distance between the action and the context."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self):
        self.place = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), -abs(float(action[0]) - self.place), True, False, {}


class Told(Signpost):
    """The same, told its context by a method."""

    def set_context(self, context):
        self.place = context["far"] / 100


SIGNPOST = Family(base=lambda: Signpost(), ranges={"place": (-1.0, 1.0)}, points=5)
