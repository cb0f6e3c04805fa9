"""Peaks: the table is of dense numbers and matches whole names; what it does not know is measured."""

from __future__ import annotations

import re

import pytest
import torch

from moe.accounting import device_peaks as peaks
from moe.accounting.device_peaks import TABLE, math_mode, measure_peak_flops, peak_for, table_peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_names_as_torch_gives_them(name: str, tera: float) -> None:
    assert table_peak(name, "bf16") == tera * 1e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 NVL", "Tesla T4"],
)
def test_other_variants_are_not_taken_for_these(name: str) -> None:
    assert table_peak(name, "bf16") is None


def test_a_column_that_is_left_out_is_unknown() -> None:
    assert table_peak("NVIDIA B200", "fp32") is None


# Makers' numbers with 2:4 sparsity, TFLOP/s.
SPARSE = {
    "NVIDIA A100-SXM4-80GB": 624,
    "NVIDIA H100 80GB HBM3": 1979,
    "NVIDIA H200": 1979,
    "NVIDIA L40S": 733,
}


def test_the_table_is_dense() -> None:
    for name, tera in SPARSE.items():
        listed = table_peak(name, "bf16")
        assert listed is not None and listed < 0.6 * tera * 1e12
    for pattern, columns in TABLE.items():
        re.compile(pattern)
        assert columns["bf16"] > columns.get("tf32", columns.get("fp32", 0)) >= columns.get("fp32", 0)


def test_peak_for_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "device_name", lambda device: "NVIDIA H200")
    listed = peak_for(torch.device("cuda"), torch.bfloat16)
    assert (listed.value, listed.source, listed.dtype) == (989e12, "datasheet-dense", "bfloat16")
    assert listed.median == listed.value and not listed.noisy


def test_lowered_fp32_has_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert math_mode(cuda, torch.float32) == "fp32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert math_mode(cuda, torch.float32) == "tf32"
    assert math_mode(CPU, torch.float32) == "fp32"
    assert math_mode(CPU, torch.float64) is None


def test_an_unknown_device_is_measured() -> None:
    peak = peak_for(CPU, torch.float32)
    assert peak.source == "measured" and peak.dtype == "float32"
    assert peak.value >= peak.median > 1e8
    assert peak.noisy == (peak.median < 0.75 * peak.value)


def test_the_best_of_several_tries_counts_and_says_so() -> None:
    def tries(*values: float) -> peaks.Peak:
        given = iter(values)

        def measure() -> peaks.Peak:
            value = next(given)
            return peaks.Peak(value, "measured", "cpu", "float32", "a product", value)

        found = peaks.best_of_tries(measure)
        assert list(given) == []
        return found

    quiet = tries(12.0, 10.0, 11.0)
    assert (quiet.value, quiet.median, quiet.noisy) == (12.0, 11.0, False)
    assert quiet.detail == "a product, best of 3 tries"
    # Another program took most of the machine at first: more tries.
    busy = tries(12.0, 13.0, 139.0, 138.0, 137.0)
    assert (busy.value, busy.noisy) == (139.0, False) and busy.detail.endswith("best of 5 tries")
    shared = tries(12.0, 139.0, 12.0, 13.0, 14.0, 15.0)
    assert (shared.value, shared.noisy) == (139.0, True) and shared.detail.endswith("best of 6 tries")


def test_no_time_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds=0"):
        measure_peak_flops(CPU, torch.float32, seconds=0)
