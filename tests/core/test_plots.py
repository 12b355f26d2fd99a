"""Charts: what is drawn, that it is safe and steady SVG, and what is refused."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from volvelle.core import plots
from volvelle.core.errors import UserError
from volvelle.core.statistics import Interval, paired

STEPS = np.arange(0, 50, 10)
VALUES = np.array([[0, 1, 2, 3, 4.0], [0, 2, 3, 4, 6], [0, 1, 1, 2, 5]])
HOSTILE = '<script>alert("x")</script> & $x_1$'


def rng():
    return np.random.default_rng(0)


def charts():
    finals = {"grpo": VALUES[:, -1], HOSTILE: VALUES[:, -1] + [1, 2, 3]}
    return [
        plots.learning_curves({"grpo": (STEPS, VALUES), HOSTILE: (STEPS, VALUES[:1])}, metric="pass@1", rng=rng()),
        plots.final_values(finals, metric="return", unit="points", title=HOSTILE),
        plots.differences({HOSTILE: paired(finals[HOSTILE], finals["grpo"])}, metric="return", base="grpo"),
        plots.heat_map([[1, 2.5], [math.nan, -4]], ["a", HOSTILE], ["c", "d"], value="payoff", centre=0),
        plots.heat_map(
            np.arange(3000.0).reshape(60, 50), list(map(str, range(60))), list(map(str, range(50))), value="v"
        ),
    ]


def texts(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_svg_is_well_formed_sized_and_holds_names_as_text():
    for svg in charts():
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and root.attrib["width"] == "700" and root.attrib["aria-label"]
        assert not [e for e in root.iter() if e.tag.endswith("script")]
    assert all(HOSTILE in " ".join(texts(svg)).replace("\n", "") for svg in charts()[:2])


def test_nothing_is_loaded_from_elsewhere_and_ids_do_not_clash():
    ids = []
    for svg in charts():
        root = ElementTree.fromstring(svg)
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(v.startswith(("#", "data:image/png;base64,")) for v in links)
        ids += {e.attrib["id"]: ElementTree.tostring(e) for e in root.iter() if "id" in e.attrib}.items()
    assert len({i for i, _ in ids}) == len(set(ids))  # the same id only for the same thing


def test_same_data_same_bytes_in_another_process_and_without_pyplot():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_plots as t, hashlib; c = t.charts(); "
        "assert 'matplotlib.pyplot' not in sys.modules; print(hashlib.sha256(''.join(c).encode()).hexdigest())"
    )
    folder = str(__import__("pathlib").Path(__file__).parent)
    made = [
        subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert made[0] == made[1]


def test_users_matplotlib_settings_neither_matter_nor_change():
    want = charts()
    with mpl.rc_context({"lines.linewidth": 9, "xtick.labelsize": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert charts() == want
        assert dict(mpl.rcParams) == before


def test_learning_curves_draw_the_mean_and_a_band_only_over_seeds():
    one = plots.learning_curves({"a": (STEPS, VALUES[:1])}, metric="m", rng=rng())
    three = plots.learning_curves({"a": (STEPS, VALUES)}, metric="m", rng=rng())
    assert one.count("fill-opacity") == 0 and three.count("fill-opacity") == 1
    assert one.count(f"stroke: {plots.COLOURS[0].lower()}") == three.count(f"stroke: {plots.COLOURS[0].lower()}") == 1
    same = plots.learning_curves({"a": (STEPS, VALUES[:1]), "b": (STEPS, VALUES[[0, 0]])}, metric="m", rng=rng())
    assert line(same) == line(same, 1) and line(one) != line(three)
    heights = line(one)[1::2]
    assert np.diff(heights) == pytest.approx([np.diff(heights)[0]] * 4) and heights[0] > heights[-1]  # 0, 1, 2, 3, 4


def line(svg, arm=0):
    """x, y, x, y, ... of one arm's line."""
    stroke = f"fill: none; stroke: {plots.COLOURS[arm].lower()}"
    path = next(e for e in ElementTree.fromstring(svg).iter() if stroke in e.get("style", ""))
    return [float(word) for word in path.get("d").replace("M", "").replace("L", "").split()]


def test_learning_curves_label_arms_unit_and_axis():
    said = texts(
        plots.learning_curves({"a": (STEPS * 1e5, VALUES), "b": (STEPS, VALUES)}, metric="m", unit="s", rng=rng())
    )
    assert {"a", "b", "m (s)", "training step", "4M"} <= set(said)
    said = texts(
        plots.learning_curves({"a": ([1, 2, 8], VALUES[:, :3])}, metric="pass@k", rng=rng(), x="k", log2_x=True)
    )
    assert {"1", "2", "8", "k"} <= set(said) and "a" not in said


def test_labels_are_moved_apart_but_no_further():
    assert plots._apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert plots._apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert plots._apart([0.4, 0.5, 0.52], 0.1) == pytest.approx([0.4 - 0.08 / 3, 0.5 - 0.08 / 3 + 0, 0.6 - 0.08 / 3])


def test_rows_say_their_numbers():
    said = texts(plots.final_values({"a": [1, 2, 3, 4, 5], "b": [2.0]}, metric="m", unit="points"))
    assert {"a", "b", "m (points)", "3.0 [1.0, 5.0]", "2.0"} <= set(said)
    said = texts(plots.differences({"b": Interval(0.12, -0.04, 0.28, 5)}, metric="m", base="a"))
    assert {"b", "difference in m from a", "+0.12 [−0.04, +0.28]"} <= set(said)


def test_heat_map_says_values_and_missing_ones():
    said = texts(plots.heat_map([[1, 2.5], [math.nan, -4]], ["a", "b"], ["c", "d"], value="payoff", x="to", y="from"))
    assert {"1.00", "2.50", "–", "−4.00", "a", "d", "payoff", "to", "from"} <= set(said)
    root = ElementTree.fromstring(plots.heat_map([[1], [2]], ["upper", "lower"], ["c"], value="v"))
    at = {e.text: float(e.get("y")) for e in root.iter() if e.text in ("upper", "lower", "1.00", "2.00") and e.get("y")}
    assert at["upper"] < at["lower"] and at["1.00"] < at["2.00"]
    assert texts(plots.heat_map([[2, 2]], ["a"], ["c", "d"], value="v")).count("2.00") >= 2


@pytest.mark.parametrize(
    "value, decimals, signed, want",
    [
        (0.5, 2, False, "0.50"),
        (-0.5, 1, False, "−0.5"),
        (-0.001, 2, False, "0.00"),
        (0.001, 2, True, "0.00"),
        (3, 0, True, "+3"),
        (-3, 0, True, "−3"),
        (1.5e-6, None, False, "1.5e−6"),
        (1e9, None, True, "+1e9"),
        (math.nan, 2, True, "–"),
    ],
)
def test_number(value, decimals, signed, want):
    assert plots.number(value, decimals, signed) == want


def test_places_follow_the_interval_then_the_value():
    assert plots.places([0.5], [Interval(0.5, 0.44, 0.56, 5)]) == 3  # half-width 0.060
    assert plots.places([500], [Interval(500, 488, 512, 5)]) == 0  # half-width 12
    assert plots.places([0.123]) == 3 and plots.places([123.4]) == 0 and plots.places([0]) == 2
    assert plots.places([1e-6]) is None and plots.places([1e9]) is None


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: plots.learning_curves({}, metric="m", rng=rng()), "nothing to draw"),
        (
            lambda: plots.learning_curves({"a": ([1, 2], VALUES)}, metric="m", rng=rng()),
            "m, a: steps [2], values [3, 5]",
        ),
        (
            lambda: plots.learning_curves({"a": (STEPS, VALUES * math.nan)}, metric="m", rng=rng()),
            "not all numbers are finite",
        ),
        (lambda: plots.learning_curves({"a": (STEPS[::-1], VALUES)}, metric="m", rng=rng()), "increasing"),
        (lambda: plots.learning_curves({"a": (STEPS, VALUES)}, metric="m", rng=rng(), log2_x=True), "positive"),
        (lambda: plots.final_values({"a": [1, math.inf]}, metric="m"), "final values of a"),
        (lambda: plots.differences({}, metric="m", base="a"), "nothing to draw"),
        (lambda: plots.heat_map([[1]], ["a", "b"], ["c"], value="v"), "shape [1, 1] with 2 row and 1 column names"),
        (lambda: plots.heat_map([[math.nan]], ["a"], ["c"], value="v"), "at least one"),
    ],
)
def test_refusals(call, named):
    with pytest.raises(UserError) as e:
        call()
    assert named in str(e.value) and "\n" not in str(e.value)
