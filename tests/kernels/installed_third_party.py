"""Checks installed libraries against fp64: ``python -m pytest tests/kernels/installed_third_party.py``.

Not collected by default, since most machines lack them. On a GPU each runs every dtype it has; on a
CPU those whose kernels are Triton run in fp32 and fp16 with ``TRITON_INTERPRET=1`` (Liger also needs
``LIGER_FUSED_MOE_AUTOTUNE=0``, as nothing can be tuned there).

Letters: T tokens, K slots a token.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
import torch

from kernels.third_party import THIRD_PARTY
from tests.kernels.expert_reference import (
    DEVICES,
    Sizes,
    errors,
    make_inputs,
    run_backend,
    run_reference,
    workload,
)
from tests.kernels.test_kernels_third_party import CASES, fits, with_mask
from tests.kernels.third_party_stand_ins import RECORDED

# Multiples of what every library asks for, several tiles of rows, and a ragged last one.
WIDE = {"wide": Sizes(T=150, E=3, D=192, F=128), "wide, slots masked": Sizes(T=150, E=3, K=3, D=192, F=128)}
INSTALLED = [name for name, backend in THIRD_PARTY.items() if backend.missing() is None]


def _runs(name: str, sizes: Sizes, device: str, dtype: torch.dtype) -> bool:
    if device == "cpu" and dtype == torch.bfloat16:
        return False  # the interpreter multiplies wrongly in bf16
    return fits(name, sizes) and THIRD_PARTY[name].unsupported_reason(workload(sizes, dtype, device)) is None


REAL = [
    pytest.param(name, sizes, "masked" in case, device, dtype, id=f"{name}-{case}-{device}-{str(dtype)[6:]}")
    for name in INSTALLED
    for device in DEVICES
    for dtype in THIRD_PARTY[name].dtypes
    for case, sizes in (CASES | WIDE).items()
    if _runs(name, sizes, device, dtype)
]


def test_something_is_installed_and_runs() -> None:
    assert REAL, {name: backend.missing() for name, backend in THIRD_PARTY.items()}


@pytest.mark.parametrize(("name", "sizes", "masked", "device", "dtype"), REAL)
def test_output_and_gradients(name: str, sizes: Sizes, masked: bool, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(sizes)
    inputs = (with_mask(inputs) if masked else inputs).to(dtype, device)
    clean = dataclasses.replace(inputs, tensors={n: v.nan_to_num() for n, v in inputs.tensors.items()})
    reference = run_reference(clean.to(torch.float64))
    found = errors(run_backend(name, inputs), reference)
    print({n: f"{error / norm if norm else error:.1e}" for n, (error, norm) in found.items()})
    # Some round where we do not (combine weights and their gradient to the dtype of x): 8 rounding steps.
    wrong = {n: (e, norm) for n, (e, norm) in found.items() if not e <= 8 * torch.finfo(dtype).eps * norm}
    assert not wrong, f"{name} in {dtype}, (error, norm) by name: {wrong}"


@pytest.mark.parametrize("name", [name for name in INSTALLED if name in RECORDED])
def test_signatures_are_those_that_were_read(name: str) -> None:
    for module, function, stand_in in RECORDED[name]:
        real = inspect.signature(getattr(importlib.import_module(module), function)).parameters
        recorded = inspect.signature(stand_in).parameters
        assert list(real)[: len(recorded)] == list(recorded)
