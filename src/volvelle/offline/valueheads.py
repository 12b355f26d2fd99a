"""A value loss that the offline methods add to those of the control wing."""

from __future__ import annotations

from volvelle.control.learner import Positive
from volvelle.control.valueheads import ValueHead
from volvelle.core.parts import part

from .losses import huber


@part("wide-huber")
class WideHuber(ValueHead):
    """Huber's loss in its usual scale: 0.5 e^2 up to `delta`, then a line of slope delta."""

    delta: Positive = 20.0

    def loss(self, outputs, target):
        return huber(outputs.squeeze(-1) - target, self.delta)
