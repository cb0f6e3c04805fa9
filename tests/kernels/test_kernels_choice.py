"""Which back end runs: chosen with a reason, or forced, or refused by name."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from kernels.expert_mlp import BACKENDS, BackendError, choose_backend
from tests.kernels.expert_reference import (
    DTYPES,
    NAMES,
    Sizes,
    assert_agrees,
    make_inputs,
    run_reference,
    runs,
    workload,
)

SWEEP = [
    Sizes(T=3, E=2, D=D, F=F, gated=gated, b_up=up, b_down=down)
    for D, F, gated, (up, down) in itertools.product(
        (1, 2, 3, 4, 8, 12), (2, 4, 8), (True, False), ((False, False), (True, True), (False, True))
    )
]


def test_names_are_the_keys() -> None:
    assert {name: backend.name for name, backend in BACKENDS.items()} == {name: name for name in BACKENDS}
    assert "auto" not in BACKENDS


def test_unknown_back_end_is_refused_with_the_list() -> None:
    with pytest.raises(
        BackendError, match="no back end is called 'cuda_magic'; there are: auto, cpu, "
    ) as caught:
        choose_backend(workload(Sizes(), torch.float32), "cuda_magic")
    assert all(name in str(caught.value) for name in BACKENDS)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_what_is_forced_is_either_what_runs_or_refused_by_name(name: str) -> None:
    for sizes, dtype, device in itertools.product(SWEEP[::5], DTYPES, ("cpu", "meta")):
        work = workload(sizes, dtype, device)
        clause = BACKENDS[name].unsupported_reason(work)
        if clause is None:
            choice = choose_backend(work, name)
            assert choice.backend is BACKENDS[name] and "forced" in choice.reason
            continue
        assert clause.strip() and not clause.endswith("."), clause
        with pytest.raises(BackendError) as caught:
            choose_backend(work, name)
        assert str(caught.value) == f"the back end {name!r} cannot run this: {clause}"


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "device", "message"),
    [
        ("cpu", Sizes(), torch.float16, "cpu", r"'cpu' cannot run this: .*not torch\.float16"),
        ("cpu", Sizes(), torch.float32, "meta", "'cpu' cannot run this: .*the weights are on meta"),
        ("grouped_mm", Sizes(), torch.float64, "cpu", r"'grouped_mm' cannot .*not torch\.float64"),
        ("grouped_mm", Sizes(b_up=True), torch.float32, "cpu", "'grouped_mm' cannot .*takes no bias"),
        ("grouped_mm", Sizes(b_down=True), torch.float32, "cpu", "'grouped_mm' cannot .*takes no bias"),
        ("grouped_mm", Sizes(D=6), torch.float32, "cpu", "model width 6 is not a multiple of 16 bytes"),
        ("triton", Sizes(), torch.float64, "cpu", r"'triton' cannot run this: .*not torch\.float64"),
        ("triton", Sizes(E=4097), torch.bfloat16, "cpu", "'triton' cannot .*up to 4096 experts, not 4097"),
        ("triton", Sizes(), torch.bfloat16, "meta", "'triton' cannot run this: .*the weights are on meta"),
        ("grouped_mm", Sizes(F=4), torch.bfloat16, "cpu", "expert width 4 is not a multiple of 16 bytes"),
    ],
)
def test_refusals_say_why(name: str, sizes: Sizes, dtype: torch.dtype, device: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        choose_backend(workload(sizes, dtype, device), name)


def test_triton_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload(Sizes(), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="only under Triton's interpreter, with TRITON_INTERPRET=1"):
        choose_backend(work, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend(work, "triton").backend.name == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="'triton' cannot run this: the package triton is not installed"):
        choose_backend(work, "triton")


def test_auto_always_finds_one_that_does_not_refuse() -> None:
    for sizes, dtype, device in itertools.product(SWEEP, DTYPES, ("cpu", "meta")):
        work = workload(sizes, dtype, device)
        choice = choose_backend(work)
        assert choice.backend.unsupported_reason(work) is None and choice.reason
        assert "forced" not in choice.reason


@pytest.mark.parametrize(
    ("sizes", "dtype", "chosen", "reason"),
    [
        (Sizes(), torch.float32, "cpu", "fused path for torch.float32 on CPU"),
        (Sizes(b_up=True, D=7), torch.bfloat16, "cpu", "fused path for torch.bfloat16"),
        (Sizes(F=16), torch.float16, "grouped_mm", "takes torch.float16 on cpu"),
        (Sizes(F=16, b_down=True), torch.float16, "loop", "takes no bias"),
    ],
)
def test_auto_gives_its_reason(sizes: Sizes, dtype: torch.dtype, chosen: str, reason: str) -> None:
    choice = choose_backend(workload(sizes, dtype))
    assert choice.backend.name == chosen and reason in choice.reason


@pytest.mark.parametrize(
    ("rows", "dtype", "experts", "chosen"),
    [
        # 64 x (2 * 32 + 32) / 2 multiplications a row: 50 million are 16,276 rows.
        (None, torch.float32, 8, "cpu"),
        (16_276, torch.float32, 8, "grouped_mm"),
        (16_277, torch.float32, 8, "cpu"),
        (0, torch.float32, 8, "grouped_mm"),
        # Padded batches of small experts win in bf16, but for so few experts that there is nothing to batch.
        (16, torch.bfloat16, 8, "cpu"),
        (4, torch.bfloat16, 8, "grouped_mm"),
        (64, torch.bfloat16, 4, "grouped_mm"),
        (4, torch.float64, 8, "cpu"),
        # One token: each expert has one row at most, and a batch needs no padding.
        (1, torch.float32, 8, "cpu"),
    ],
)
def test_few_rows_on_a_cpu_are_left_to_torch(
    rows: int | None, dtype: torch.dtype, experts: int, chosen: str
) -> None:
    work = dataclasses.replace(workload(Sizes(E=experts, D=64, F=32), dtype), rows=rows, tokens=rows)
    assert choose_backend(work).backend.name == chosen
    assert choose_backend(work, "cpu").backend.name == "cpu"
    for refused in ({"has_bias": True}, {"accumulates": True}, {"model_width": 63}):
        assert choose_backend(dataclasses.replace(work, **refused)).backend.name == "cpu"  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in BACKENDS if runs(name, Sizes())])
def test_what_is_not_refused_runs(name: str) -> None:
    ran = 0
    for sizes in SWEEP:
        for device, dtype in runs(name, sizes, DTYPES[:2]):
            inputs = make_inputs(sizes).to(dtype, device)
            # Sums of one to three terms may cancel: what matters here is that it runs.
            assert_agrees(name, inputs, run_reference(inputs.to(torch.float64)), NAMES, slack=16.0)
            ran += 1
    assert ran
