"""The benchmark: shapes, floors, and that what computes something else is not timed.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import bench
from kernels.backend import ExpertTensors
from kernels.bench_figure import Bar, bars_svg
from kernels.bench_layer import Case, measure_layer
from kernels.bench_products import ProductShape, measure_products
from kernels.bench_shapes import H200, ROUTINGS, SHAPES, expert_ids, floor_seconds
from kernels.loop import LoopBackend
from kernels.plan import RowPlan

CPU = torch.device("cpu")
TINY = dataclasses.replace(SHAPES["olmoe"].divided(64), experts=6, slots=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads that wait for each other on a busy machine take a hundred times as long.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Milliseconds from the model of the survey (H200, bf16): forward, and forward + backward.
@pytest.mark.parametrize(
    ("name", "tokens", "forward", "both"),
    [
        ("olmoe", 4096, 0.557, 1.636),
        ("olmoe", 16384, 2.228, 6.544),
        ("mixtral", 16384, 14.707, 44.029),
        ("qwen3-30b", 4096, 0.433, 1.276),
        ("qwen3-30b", 16384, 1.706, 4.978),
        ("deepseek-v3", 4096, 5.615, 16.687),
        ("sigma-tiny", 4096, 0.176, 0.524),
        ("sigma-tiny", 65536, 0.681, 1.970),
    ],
)
def test_floors_are_those_of_the_survey(name: str, tokens: int, forward: float, both: float) -> None:
    found = [1e3 * floor_seconds(SHAPES[name], tokens, H200, backward=backward) for backward in (False, True)]
    assert found == pytest.approx([forward, both], abs=0.0015)


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_are_what_they_say(name: str, routing: str) -> None:
    shape, T = SHAPES[name], 600
    ids_TK = expert_ids(shape, T, routing)
    assert ids_TK.shape == (T, shape.slots) and int(ids_TK.min()) >= 0 and int(ids_TK.max()) < shape.experts
    ordered_TK = ids_TK.sort(1).values
    assert (ordered_TK[:, 1:] > ordered_TK[:, :-1]).all(), "an expert twice in a token"
    counts_E = ids_TK.flatten().bincount(minlength=shape.experts)
    if routing == "balanced":
        assert int(counts_E.max() - counts_E.min()) <= 1
    else:
        assert int(counts_E.argmax()) == 0
    if routing == "hot":
        assert int(counts_E[0]) == T
    assert torch.equal(ids_TK, expert_ids(shape, T, routing))


def test_a_layer_is_measured() -> None:
    results = measure_layer(Case(TINY, 12, "zipf", torch.float32, CPU), ["cpu", "triton", "loop"], rounds=2)
    assert [(r.backend, r.passes) for r in results] == [
        (name, which) for which in ("forward", "forward+backward") for name in ("cpu", "triton", "loop")
    ]
    for r in results:
        if r.backend == "triton":
            assert r.seconds is None and "TRITON_INTERPRET" in r.why_not
            continue
        assert r.seconds is not None and r.seconds.rounds == 2 and r.error is not None and r.error < 1e-6
        assert r.is_auto == (r.backend == "cpu") and r.floor_share is None
    # 24 rows of 2 F = 32 values in fp32: the pre-activation alone.
    kept = next(r.saved_bytes for r in results if r.backend == "cpu" and r.passes != "forward")
    assert kept == 24 * 2 * TINY.expert_width * 4


def test_a_wrong_back_end_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoopBackend.run

    def wrong(self: LoopBackend, x: Tensor, weights: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        return right(self, x, weights, plan, experts) * 1.001

    monkeypatch.setattr(LoopBackend, "run", wrong)
    results = measure_layer(Case(TINY, 12, "hot", torch.float32, CPU), ["cpu", "loop"], rounds=1)
    for r in results:
        assert (r.seconds is None) == (r.backend == "loop")
        assert r.backend == "cpu" or "its output is wrong: relative error 1.0e-03" in r.why_not


def test_products_are_measured() -> None:
    results = measure_products(ProductShape(3, 8, 16, 32, torch.bfloat16), rounds=2)
    assert [r.rival for r in results] == ["dense", "mm", "bmm", "grouped_mm"]
    assert results[0].share.median == 1.0 and all(r.gflops > 0 for r in results)


def test_the_command_writes_table_figures_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.svg"
    options = ["--device", "cpu", "--part", "layer", "--shape", "sigma-tiny", "--routing", "balanced"]
    size = ["--tokens", "8", "--divide", "96"]
    found = bench.main([*options, *size, "--rounds", "1", "--json", str(data), "--figure", str(picture)])
    assert found == 0
    printed = capsys.readouterr().out
    assert "sigma-tiny/96 8 balanced fp32" in printed and "cpu*" in printed
    figures = json.loads(data.read_text())
    assert [row["case"] for row in figures["layers"]] == [
        f"sigma-tiny/96 8 balanced {dtype}" for dtype in ("fp32", "bf16")
    ]
    assert figures["machine"]["torch"] == torch.__version__
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.svg", "new"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds 0: it must be above 0"),
        (["--tokens", "4", "-1", "--divide", "0"], "--tokens -1: it must be above 0; --divide 0"),
        (["--device", "cuda", "--part", "products"], "choose layer, or --device cpu"),
        (["--shape", "gpt-9"], "olmoe"),
    ],
)
def test_mistakes_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_bars_are_to_scale_and_names_are_escaped() -> None:
    bars = [Bar("a <b>", "x&y", 1.0, 0.5, 2.0, "1 ms"), Bar("a <b>", "z", 2.0, 2.0, 2.0, "2 ms")]
    root = ElementTree.fromstring(bars_svg("t", bars))
    widths = [
        float(r.attrib["width"]) for r in root if r.tag.endswith("rect") and "%" not in r.attrib["width"]
    ]
    assert widths[1] == 2 * widths[0] > 0
    assert {"a <b>", "x&y", "z", "1 ms"} <= {t.text for t in root if t.tag.endswith("text")}
