"""Where systems stand on the radar: fixed anchors, min-max, what was not measured; and the drawings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from recipes.cap.cap_curves import curves_figure
from recipes.cap.radar import DEFAULTS, Anchors, draw_radar, make_radar, parse_anchors, shown
from recipes.tracking.report import canvas
from recipes.tracking.report.colours import DARK, LIGHT

PNG = b"\x89PNG"


def system(
    name: str,
    tpot: float | None,
    usd: float | None,
    right: float | None = None,
    sizes: tuple[int, ...] = (1,),
) -> dict[str, Any]:
    """As far as radar and curves look at one."""
    phase = {"s_mbu": 0.4, "mbu": 0.9, "s_mfu": 0.1, "flops_per_s": 1e9, "flops_per_byte": 2.0}
    distinct = {"mean": 3.0, "source": "traced", "uniform_bound": 3.5}
    return {
        "name": name,
        "dtype": "float32",
        "devices": 1,
        "experts": [8],
        "peaks": {"bytes_per_s": {"value": 1e9}, "flops": {"value": 4e9}},
        "accuracy": {"choices": None if right is None else {"accuracy": right}, "perplexity": None},
        "points": [
            {
                "batch_size": size,
                "reason": None if tpot is not None else "out of memory",
                "tpot_s": None if tpot is None else {"mean": tpot},
                "cost": {"usd_per_mtok": usd},
                "decode": {**phase, "distinct": distinct},
                "prefill": phase,
            }
            for size in sizes
        ],
    }


def places(report: dict[str, Any], **options: Any) -> dict[str, list[float | None]]:
    return {name: [c.place for c in corners] for name, corners in make_radar(report, **options).systems}


def test_anchors_by_hand() -> None:
    # 100 ms between 1 s and 1 ms: a third of the way in ratios; 0.2 + 0.8 / 3
    assert DEFAULTS["tpot_s"].place(0.1) == pytest.approx(0.2 + 0.8 / 3)
    assert DEFAULTS["tpot_s"].place(1.0) == 0.2 and DEFAULTS["tpot_s"].place(0.001) == pytest.approx(1.0)
    assert DEFAULTS["tpot_s"].place(50.0) == 0.2, "beyond the worse end"
    assert DEFAULTS["accuracy"].place(0.5) == pytest.approx(0.6)
    assert DEFAULTS["bits_per_byte"].place(2.0) == pytest.approx(0.8)
    assert Anchors(1, 1, False).place(1) == 1.0
    assert DEFAULTS["tpot_s"].covers(0.5) and not DEFAULTS["tpot_s"].covers(2.0)


def test_fixed_anchors_do_not_depend_on_the_company() -> None:
    a, b = system("a", 0.1, 1.0, 0.5), system("b", 0.01, 10.0, 0.9)
    alone, both = places({"systems": [a]}), places({"systems": [a, b]})
    assert alone["a"] == both["a"] and None not in alone["a"]


def test_min_max_spans_the_systems() -> None:
    a, b, c = system("a", 0.1, 1.0, 0.5), system("b", 0.05, 3.0, 0.9), system("c", 0.075, 2.0, 0.7)
    found = places({"systems": [a, b, c]}, scale="min-max")
    assert found["a"] == pytest.approx([0.2, 1.0, 0.2]) and found["b"] == pytest.approx([1.0, 0.2, 1.0])
    assert found["c"] == pytest.approx([0.6, 0.6, 0.6])
    assert places({"systems": [a]}, scale="min-max")["a"] == [1.0, 1.0, 1.0], "nothing is divided by zero"


def test_what_was_not_measured_has_no_place() -> None:
    radar = make_radar({"systems": [system("a", 0.1, None), system("b", None, None)]})
    assert radar.batch_size is None, "no size was measured for both"
    assert [corner.place for _, corners in radar.systems for corner in corners] == [None] * 6
    one = make_radar({"systems": [system("a", 0.1, None)]})
    assert [corner.value for corner in one.systems[0][1]] == [0.1, None, None]


def test_the_largest_common_batch_is_taken() -> None:
    a, b = system("a", 0.1, 1.0, sizes=(1, 4, 16)), system("b", 0.1, 1.0, sizes=(1, 4))
    assert make_radar({"systems": [a, b]}).batch_size == 4
    assert make_radar({"systems": [a, b]}, batch_size=1).batch_size == 1


def test_anchors_are_read() -> None:
    found, mistakes = parse_anchors(["tpot_s=2:0.01", "accuracy=0.25:1"])
    assert mistakes == [] and found["tpot_s"] == Anchors(2, 0.01, True)
    assert found["accuracy"] == Anchors(0.25, 1, False) and found["usd_per_mtok"] == DEFAULTS["usd_per_mtok"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("speed=1:2", "AXIS=WORSE:BETTER"),
        ("tpot_s=1", "AXIS=WORSE:BETTER"),
        ("tpot_s=1:inf", "AXIS=WORSE:BETTER"),
        ("tpot_s=1:1", "the two ends are one"),
        ("tpot_s=0:1", "logarithmic"),
    ],
)
def test_wrong_anchors_are_named(text: str, rule: str) -> None:
    (mistake,) = parse_anchors([text])[1]
    assert (mistake.path, mistake.value) == ("--anchors", text) and rule in mistake.rule


def test_values_as_people_read_them() -> None:
    assert [shown("tpot_s", 0.0123), shown("usd_per_mtok", 1.5)] == ["12.3 ms", "$1.5"]
    assert [shown("accuracy", 0.25), shown("bits_per_byte", 4.0)] == ["25.0 %", "4 bits/byte"]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.usefixtures("rendered")
def test_it_is_drawn_whatever_is_missing(theme: Any) -> None:
    full = [system(str(i), 0.1 / (i + 1), 1.0 + i, 0.5, (1, 4)) for i in range(8)]
    for systems in (full, full[:1], [system("a", 0.1, None)], [system("a", None, None)]):
        assert canvas.png(draw_radar(make_radar({"systems": systems}), theme)).startswith(PNG)
        figure = curves_figure({"systems": systems}, theme)
        assert figure is not None and canvas.png(figure).startswith(PNG)


def test_no_curves_without_utilisations() -> None:
    one = system("a", 0.1, 1.0)
    for point in one["points"]:
        for phase in ("decode", "prefill"):
            point[phase] = dict.fromkeys(point[phase])
    assert curves_figure({"systems": [one]}, LIGHT) is None
    assert not math.isnan(DEFAULTS["accuracy"].better)
