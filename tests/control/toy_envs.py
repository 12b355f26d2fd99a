"""Small environments with known behaviour, and broken ones, for the tests of the control wing."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counter(gym.Env):
    """The observation is (step, episode, row tag); the reward is the step. Terminates after `length` steps if `ends`, else is cut there."""

    def __init__(self, length=3, ends=True, tag=0.0):
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, (3,), np.float32), spaces.Discrete(2)
        self.length, self.ends, self.tag, self.episode, self.t = length, ends, tag, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1 if seed is None else 0, 0
        return self._observation(), {}

    def _observation(self):
        return np.array([self.t, self.episode, self.tag], np.float32)

    def step(self, action):
        self.t += 1
        over = self.t >= self.length
        return self._observation(), float(self.t), over and self.ends, over and not self.ends, {"factor": 10.0 * self.t, "chosen": action}


class Target(gym.Env):
    """One step; the reward is 1 for the action shown by the observation (one-hot), else 0. Any learner must solve it."""

    def __init__(self):
        self.observation_space, self.action_space, self.right = spaces.Discrete(3), spaces.Discrete(3), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right = int(self.np_random.integers(3))
        return self.right, {}

    def step(self, action):
        return self.right, float(action == self.right), True, False, {}


class Reach(gym.Env):
    """One step; the reward is -(action - observation)^2 for an action in [-1, 1]."""

    def __init__(self):
        self.observation_space, self.action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = self.np_random.uniform(-0.8, 0.8)
        return np.array([self.goal], np.float32), {}

    def step(self, action):
        return np.array([self.goal], np.float32), -float((action[0] - self.goal) ** 2), True, False, {}


class Zoo(gym.Env):
    """Every kind of observation and action at once; the last action is kept for the test to look at."""

    def __init__(self):
        self.observation_space = spaces.Dict({
            "numbers": spaces.Box(-1, 1, (2, 2), np.float64), "choice": spaces.Discrete(3, start=1), "pair": spaces.MultiDiscrete([2, 3]),
            "bits": spaces.MultiBinary(2), "camera": spaces.Box(0, 255, (6, 5, 3), np.uint8), "word": spaces.Text(10),
            "nested": spaces.Tuple((spaces.Box(0, 1, ()), spaces.Discrete(2)))})
        self.action_space = spaces.Dict({"move": spaces.Box(-2, 2, (2,), np.float32), "press": spaces.Discrete(3, start=5), "keys": spaces.MultiBinary(2)})
        self.last, self.t = None, 0

    def _observation(self):
        return {"numbers": np.array([[1, 2], [3, 4.0]]), "choice": np.int64(2), "pair": np.array([1, 2]), "bits": np.array([0, 1], np.int8),
                "camera": np.arange(90, dtype=np.uint8).reshape(6, 5, 3), "word": ["red", "blue"][self.t % 2], "nested": (np.array(0.5), 1)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.last, self.t = action, self.t + 1
        return self._observation(), 1.0, self.t >= 4, False, {}


class Faulty(Counter):
    """Goes wrong at step 2 of the third episode, in the way that `fault` names."""

    def __init__(self, fault, at=(2, 2)):
        super().__init__()
        self.fault, self.at = fault, at

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if (self.episode, self.t) == self.at:
            if self.fault == "nan observation":
                observation[1] = np.nan
            elif self.fault == "inf reward":
                reward = float("inf")
            elif self.fault == "no reward":
                reward = None
            elif self.fault == "shape":
                observation = np.zeros(4, np.float32)
            elif self.fault == "raises":
                raise ValueError("the motor\nis on fire")
        return observation, reward, terminated, truncated, info


class Endless(Counter):
    """Never ends."""

    def __init__(self):
        super().__init__(length=10**9)


def make_counter(*, length: int = 3):
    return Counter(length)
