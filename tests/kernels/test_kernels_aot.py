"""The Triton kernels compile for four generations of GPUs, none of which is here."""

from __future__ import annotations

import pytest

from kernels.aot import SHARED_LIMITS, Report, compile_all, compile_variant, limit_failures
from kernels.triton.aot_variants import ADDED, REPRESENTATIVE, Variant, all_variants, candidate_variants
from tests.forked_commands import run_module

WELL = Report(Variant("up"), 90, registers=128, stack=0, shared=1024, instruction="wgmma", failures=())


@pytest.mark.slow
@pytest.mark.parametrize("capability", list(SHARED_LIMITS))
def test_kernels_pass_the_gates(capability: int) -> None:
    reports = list(compile_all((*REPRESENTATIVE, *ADDED), [capability]))
    wrong = {f"{report.variant}": report.failures for report in reports if report.failures}
    assert not wrong
    assert {report.variant.kernel for report in reports} == {variant.kernel for variant in all_variants()}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_tuned_from_passes_the_gates(capability: int) -> None:
    # The widest of each kernel; all of them by ``python -m kernels.aot --candidates``.
    widest: dict[str, Variant] = {}
    for variant in candidate_variants(capability):
        best = widest.setdefault(variant.kernel, variant)
        if variant.blocks is not None and best.blocks is not None and variant.blocks.n > best.blocks.n:
            widest[variant.kernel] = variant
    assert set(widest) == {"up", "down", "dh", "dw_up"}
    reports = list(compile_all(widest.values(), [capability]))
    assert not {f"{report.variant}": report.failures for report in reports if report.failures}


@pytest.mark.parametrize(
    ("kernel", "rank"), dict.fromkeys((v.kernel, v.rank // 16) for v in (*REPRESENTATIVE, *ADDED))
)
def test_sizes_of_one_compile(kernel: str, rank: int) -> None:
    compile_variant(Variant(kernel, bias=True, ones=True, rank=rank), 90)


def test_hopper_multiplies_by_wgmma() -> None:
    assert compile_variant(Variant("dw_down"), 90).instruction == "wgmma"


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of registers spilled"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, above 232448"),
        ({"instruction": ""}, "no wgmma in the code"),
        ({"instruction": "", "variant": Variant("up", height=32)}, None),
        ({"instruction": "", "variant": Variant("up", dtype="fp32", height=64)}, None),
        ({"instruction": "", "variant": Variant("combine")}, None),
    ],
)
def test_the_gates_see_what_they_look_for(change: dict[str, object], failure: str | None) -> None:
    report = Report(**{**vars(WELL), **change})  # type: ignore[arg-type]
    assert list(limit_failures(report)) == ([] if failure is None else [failure])


def test_the_command_prints_a_table_and_refuses_unknown_capabilities() -> None:
    command = ["kernels.aot", "--kernel", "combine", "--capability"]
    done = run_module(*command, "80")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split()[:2] == ["combine", "bf16"]
    done = run_module(*command, "75")
    assert done.code == 2 and "75" in done.err
