"""Numbers that change with the step."""

import math

import pytest

from volvelle.core.errors import UserError
from volvelle.core.schedule import Cosine, Linear, Table, at


def test_linear():
    s = Linear(start=1.0, end=3.0, steps=4)
    assert [s.at(t) for t in (0, 1, 2, 4, 9)] == [1.0, 1.5, 2.0, 3.0, 3.0]


def test_cosine():
    s = Cosine(start=1.0, end=0.0, period=4)
    assert [s.at(t) for t in (0, 2, 4, 6)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert s.at(1) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert [s.replace(restart=True).at(t) for t in (0, 2, 4, 6)] == pytest.approx([1.0, 0.5, 1.0, 0.5])


def test_table():
    s = Table(steps=(0, 3, 10), values=(1.0, 2.0, 3.0))
    assert [s.at(t) for t in (0, 2, 3, 9, 10, 99)] == [1, 1, 2, 2, 3, 3]
    for wrong in (dict(steps=(1,), values=(1.0,)), dict(steps=(0, 0), values=(1.0, 2.0)), dict(steps=(0, 2), values=(1.0,)), dict(steps=(), values=()),
                  dict(steps=(0, 3, 2), values=(1.0, 2.0, 3.0))):
        with pytest.raises(UserError, match="steps"):
            Table(**wrong)


def test_at_takes_numbers_and_schedules():
    assert at(0.5, 7) == 0.5 and at(Linear(0.0, 1.0, 10), 5) == 0.5
