"""The benchmark: shapes, floors, and that what computes something else is not timed.

Letters: T tokens, D model width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.bench import run_bench as bench
from kernels.bench.bench_case import Case, make_layer
from kernels.bench.bench_check import checked_error
from kernels.bench.bench_device import ColdTimer, clocks, read_clocks
from kernels.bench.bench_figure import Bar, bars_svg
from kernels.bench.bench_layer import PASSES, least_bytes, measure_decode, measure_layer
from kernels.bench.bench_products import ProductShape, measure_products
from kernels.bench.bench_shapes import H200, ROUTINGS, SHAPES, expert_ids, floor_seconds
from kernels.expert_mlp import BACKENDS
from kernels.plan.row_plan import RowPlan
from kernels.third_party import THIRD_PARTY
from kernels.torch.expert_loop import LoopBackend

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
    results = measure_layer(
        Case(TINY, 12, "zipf", torch.float32, CPU), ["cpu", "triton", "grouped_mm"], rounds=2
    )
    assert [(r.backend, r.passes) for r in results] == [
        (name, which) for which in ("forward", "forward+backward") for name in ("cpu", "triton", "grouped_mm")
    ]
    for r in results:
        if r.backend == "triton":
            assert r.seconds is None and "TRITON_INTERPRET" in r.why_not
            continue
        assert r.seconds is not None and r.seconds.rounds == 2 and r.error is not None and r.error < 1e-6
        assert r.is_auto == (r.backend == "grouped_mm") and r.floor_share is None
    for which in PASSES:
        ran = {r.backend: r.seconds.median for r in results if r.passes == which and r.seconds is not None}
        assert [r.backend for r in results if r.passes == which and r.is_fastest] == [
            min(ran, key=ran.__getitem__)
        ]
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


@pytest.mark.parametrize("which", ["x", "the combine weights", "w_up", "w_down"])
def test_a_wrong_gradient_is_not_timed(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 1.01

    right = LoopBackend.run

    def wrong(self: LoopBackend, x: Tensor, weights: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        bent = {
            "x": x,
            "the combine weights": weights,
            "w_up": experts.w_up_EUD,
            "w_down": experts.w_down_EDF,
        }
        bent[which] = Scaled.apply(bent[which])
        changed = dataclasses.replace(experts, w_up_EUD=bent["w_up"], w_down_EDF=bent["w_down"])
        return right(self, bent["x"], bent["the combine weights"], plan, changed)

    layer = make_layer(Case(TINY, 12, "zipf", torch.float32, CPU))
    assert checked_error(layer, "loop", backward=True) < 1e-6
    monkeypatch.setattr(LoopBackend, "run", wrong)
    assert checked_error(layer, "loop", backward=False) < 1e-6
    with pytest.raises(RuntimeError, match=f"its gradient of {which} is wrong: relative error 1.0e-02"):
        checked_error(layer, "loop", backward=True)


def test_a_gradient_for_an_expert_without_rows_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoopBackend.run

    def wrong(self: LoopBackend, x: Tensor, weights: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        out_TD = right(self, x, weights, plan, experts)
        leak = experts.w_down_EDF[5].sum()
        return out_TD + (leak - leak.detach())

    layer = make_layer(Case(TINY, 2, "balanced", torch.float32, CPU))
    assert 5 not in layer.ids_TK
    monkeypatch.setattr(LoopBackend, "run", wrong)
    with pytest.raises(RuntimeError, match="its gradient of w_down is wrong"):
        checked_error(layer, "loop", backward=True)


def test_a_few_tokens_are_measured_against_the_loop() -> None:
    case = Case(TINY, 99, "balanced", torch.bfloat16, CPU)
    results = measure_decode(case, [1, 3], ["cpu", "triton"], rounds=2)
    assert [(r.tokens, r.backend) for r in results] == [
        (T, name) for T in (1, 3) for name in ("cpu", "triton", "loop")
    ]
    for r in results:
        assert r.is_auto == (r.backend == "cpu") and r.bandwidth_share is None
        if r.backend == "triton":
            assert r.seconds is None and "TRITON_INTERPRET" in r.why_not and not r.is_fastest
            continue
        assert r.seconds is not None and r.over_loop is not None and r.error is not None and r.error < 0.05
        assert r.backend != "loop" or r.over_loop.median == 1.0
    assert sum(r.is_fastest for r in results) == 2
    # One token has 2 of the 6 experts: 2 x 3 matrices, a row in and a row out, 2 bytes each.
    layer = make_layer(case).first(1)
    assert least_bytes(layer, 1) == 2 * (2 * 3 * TINY.width * TINY.expert_width + 2 * TINY.width)


def test_the_cache_is_cold_and_the_gpu_has_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is asked of the GPU; on one, the figures themselves show it."""
    asked: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    properties = type("Properties", (), {"L2_cache_size": 3 * 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("idle"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = ColdTimer(CPU)
    timer._buffer.fill_(1)
    assert timer(lambda: asked.append(f"run over {int(timer._buffer.sum())}")) == 0.002
    assert asked == ["idle", "record", "run over 0", "record", "wait"]
    assert timer._buffer.nbytes == 2 * 3 * 2**20


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 1980, 2619, 1980, 41, 612.50", {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "watts": 612.5}),
        ("echo 1980, 2619, 1980, 41, '[N/A]'", {"sm_mhz": 1980.0, "memory_mhz": 2619.0}),
        ("echo no such gpu >&2; exit 6", {"unknown": "nvidia-smi: no such gpu"}),
    ],
)
def test_clocks_are_read(
    script: str, expected: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clocks(CPU) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_clocks("GPU-1") == {"unknown": "nvidia-smi is not on the path"}
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ "$1" = --id=GPU-1 ] || exit 9\n{script}\n')
    tool.chmod(0o755)
    found = read_clocks("GPU-1")
    assert expected.items() <= found.items() and ("watts" in expected or "watts" not in found)


def test_products_are_measured() -> None:
    results = measure_products(ProductShape(3, 8, 16, 32, torch.bfloat16), rounds=2)
    assert [r.name for r in results] == ["dense", "mm", "bmm", "grouped_mm"]
    assert results[0].share.median == 1.0 and all(r.gflops > 0 for r in results)


def test_the_command_writes_table_figures_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {requirement.module for backend in THIRD_PARTY.values() for requirement in backend.requirements}
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else real(name))
    data, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.svg"
    options = ["--device", "cpu", "--part", "layer", "decode", "--shape", "sigma-tiny"]
    options += ["--routing", "balanced"]
    size = ["--tokens", "8", "--decode-tokens", "1", "4", "--divide", "96"]
    found = bench.main([*options, *size, "--rounds", "1", "--json", str(data), "--figure", str(picture)])
    assert found == 0
    printed = capsys.readouterr().out
    assert "sigma-tiny/96 8 balanced fp32" in printed and "cpu*" in printed
    # What is not installed is said once, and so is what cannot run here.
    assert printed.count("without scattermoe: the package scattermoe is not installed") == 1
    assert printed.count("scattermoe") == 3  # its name, its package, and where to get it
    assert printed.count("only under Triton's interpreter") == 2
    assert printed.count(" of 4") >= 2 and "fastest: " in printed
    figures = json.loads(data.read_text())
    assert [row["case"] for row in figures["layers"]] == [
        f"sigma-tiny/96 8 balanced {dtype}" for dtype in ("fp32", "bf16")
    ]
    assert [row["case"] for row in figures["decode"]] == [
        f"sigma-tiny/96 balanced {dtype}" for dtype in ("fp32", "bf16")
    ]
    assert {r["tokens"] for r in figures["decode"][0]["results"]} == {1, 4}
    assert set(figures["missing"]) == set(THIRD_PARTY) and figures["clocks_at_the_end"] == {}
    assert figures["machine"]["torch"] == torch.__version__
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.svg", "new"]


def _made_up_seconds(runners: Iterable[str], rounds: int, measure: object) -> dict[str, list[float]]:
    return {name: [1.0 if name == "liger" else 2.0] * rounds for name in runners}


def test_another_library_that_wins_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its adapter runs our own path here, and the seconds are made up: this is about the marks.
    liger = THIRD_PARTY["liger"]
    monkeypatch.setattr(type(liger), "unsupported_reason", lambda self, work: None)
    monkeypatch.setattr(type(liger), "missing", lambda self: None)
    monkeypatch.setattr(type(liger), "run", BACKENDS["cpu"].run)
    monkeypatch.setattr("kernels.bench.bench_layer.interleave", _made_up_seconds)
    size = ["--shape", "sigma-tiny", "--tokens", "4", "--decode-tokens", "4", "--divide", "96"]
    size += ["--dtype", "fp32", "--rounds", "3"]
    options = ["--part", "layer", "decode", "--routing", "balanced", "--backend", "liger", "loop"]
    assert bench.main(["--device", "cpu", *options, *size]) == 0
    printed = capsys.readouterr().out
    assert printed.count("liger <<") == 3, printed
    assert "fastest: liger 2 of 2" in printed and "fastest: liger 1 of 1" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds 0: it must be above 0"),
        (["--tokens", "4", "-1", "--divide", "0"], "--tokens -1: it must be above 0; --divide 0"),
        (["--device", "cuda", "--part", "products"], "choose layer or decode, or --device cpu"),
        (["--shape", "gpt-9"], "olmoe"),
        (["--decode-tokens", "0"], "--decode-tokens 0: it must be above 0"),
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
