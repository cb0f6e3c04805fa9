"""Every back end computes what a per-token loop in fp64 computes: output, and gradients by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.activations import ACTIVATIONS
from kernels.backend import MainGrads
from kernels.expert_mlp import BACKENDS
from kernels.third_party import THIRD_PARTY
from tests.kernels.expert_reference import (
    DEVICES,
    EVERY,
    FACTORS,
    NAMES,
    ON_VALUE,
    Inputs,
    Sizes,
    assert_agrees,
    call,
    make_inputs,
    run_backend,
    run_reference,
    widest,
)

Edit = Callable[[Inputs], Inputs]


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _ids(choose: Callable[[Tensor, int], Tensor]) -> Edit:
    return lambda inputs: replace(inputs, ids_TK=choose(inputs.ids_TK, inputs.sizes.E))


def _weights(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda inputs: replace(
        inputs, tensors={**inputs.tensors, "weights": change(inputs.tensors["weights"])}
    )


def _mask(choose: Callable[[Tensor], Tensor]) -> Edit:
    return lambda inputs: replace(inputs, mask_TK=choose(inputs.ids_TK))


def _all_experts(ids_TK: Tensor, num_experts: int) -> Tensor:
    return torch.stack([torch.arange(num_experts).roll(t) for t in range(len(ids_TK))])


def _checkerboard(ids_TK: Tensor) -> Tensor:
    T, K = ids_TK.shape
    mask_TK = (torch.arange(T)[:, None] + torch.arange(K)) % 3 > 0
    mask_TK[T // 2] = False  # one token with no expert at all
    return mask_TK


def _transposed(inputs: Inputs) -> Inputs:
    def swap(value: Tensor) -> Tensor:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)

    tensors = {name: swap(value) for name, value in inputs.tensors.items()}
    assert not any(value.is_contiguous() for value in tensors.values())
    return replace(
        inputs,
        tensors=tensors,
        ids_TK=swap(inputs.ids_TK),
        grad_TD=inputs.grad_TD[:, :1].expand_as(inputs.grad_TD),
    )


def _strided(inputs: Inputs) -> Inputs:
    every_second = {n: v.repeat_interleave(2, dim=-1)[..., ::2] for n, v in inputs.tensors.items()}
    small = {n: v if n in ("w_up", "w_down") else every_second[n] for n, v in inputs.tensors.items()}
    return replace(inputs, tensors=small)


def _shared(inputs: Inputs) -> Inputs:
    """All experts are one piece of memory; the gradients must not be."""
    weights = {n: v[:1].expand_as(v) for n, v in inputs.tensors.items() if n not in ("x", "weights")}
    return replace(inputs, tensors={**inputs.tensors, **weights})


CASES: dict[str, tuple[Sizes, Edit]] = {
    "standard": (Sizes(), _same),
    "ungated": (Sizes(gated=False), _same),
    "no tokens": (Sizes(T=0), _same),
    "no tokens, masked": (Sizes(T=0), _mask(lambda ids: torch.zeros_like(ids, dtype=torch.bool))),
    "one token": (Sizes(T=1), _same),
    "one slot": (Sizes(K=1), _same),
    "one expert in the layer": (Sizes(E=1, K=1), _same),
    "every token to every expert": (Sizes(K=5), _ids(_all_experts)),
    "all tokens to one expert": (Sizes(), _ids(lambda ids, E: torch.full_like(ids, 2))),
    "first and last expert empty": (Sizes(), _ids(lambda ids, E: ids.clamp(1, E - 2))),
    "more experts than rows": (Sizes(T=3, E=40), _same),
    "the same expert in all slots of a token": (
        Sizes(K=3),
        _ids(lambda ids, E: ids[:, :1].expand(-1, 3)),
    ),
    "odd sizes": (Sizes(T=11, K=3, E=7, D=7, F=5), _same),
    "width one": (Sizes(D=1, F=1), _same),
    "up wider than the model": (Sizes(D=4, F=64), _same),
    "zero weights": (Sizes(), _weights(torch.zeros_like)),
    "one weight zero": (Sizes(), _weights(lambda w: w * torch.tensor([1.0, 0.0]))),
    "negative weights": (Sizes(), _weights(lambda w: w - 1)),
    "slots masked": (Sizes(K=3), _mask(_checkerboard)),
    "mask of ones": (Sizes(), _mask(lambda ids: torch.ones_like(ids, dtype=torch.bool))),
    "all slots masked": (Sizes(), _mask(lambda ids: torch.zeros_like(ids, dtype=torch.bool))),
    "one slot, masked": (Sizes(K=1), _mask(_checkerboard)),
    "transposed storage": (Sizes(), _transposed),
    "strided storage": (Sizes(), _strided),
    "one storage for all experts": (Sizes(), _shared),
    "up bias": (Sizes(b_up=True), _same),
    "down bias": (Sizes(b_down=True), _same),
    "both biases": (Sizes(b_up=True, b_down=True), _same),
    "both biases, ungated": (Sizes(gated=False, b_up=True, b_down=True), _same),
    "both biases, odd, masked": (Sizes(D=7, F=5, K=3, b_up=True, b_down=True), _mask(_checkerboard)),
    "biases and empty experts": (
        Sizes(b_up=True, b_down=True),
        _ids(lambda ids, E: ids.clamp(1, E - 2)),
    ),
    "low rank": (Sizes(rank=4), _same),
    "low rank, ungated": (Sizes(rank=4, gated=False), _same),
    "low rank, drelu": (Sizes(rank=4, activation="drelu"), _same),
    "low rank wider than the experts": (Sizes(rank=16, D=8, F=4), _same),
    "low rank, more experts than rows": (Sizes(T=3, E=40, rank=4), _same),
    "rank one, odd sizes, biased, masked": (
        Sizes(D=7, F=5, K=3, b_up=True, b_down=True, rank=1),
        _mask(_checkerboard),
    ),
    "low rank, no tokens": (Sizes(T=0, rank=4), _same),
    "low rank, first and last expert empty": (Sizes(rank=4), _ids(lambda ids, E: ids.clamp(1, E - 2))),
    "low rank, transposed storage": (Sizes(rank=4), _transposed),
    "low rank, wide enough for several groups": (Sizes(T=60, E=3, D=64, F=8192, rank=4), _same),
    # 98 KB a row in fp32: more than any cache-sized group of rows holds.
    "wide enough for several groups": (Sizes(T=60, E=3, D=64, F=8192), _same),
    **{f"{act}, gated": (Sizes(activation=act), _same) for act in ACTIVATIONS},
    **{
        f"{act}, ungated": (Sizes(activation=act, gated=False), _same)
        for act in ACTIVATIONS
        if act not in ON_VALUE
    },
}
RUNNABLE = [
    pytest.param(name, case, device, dtype, id=f"{name}-{case}-{device}-{str(dtype)[6:]}")
    for name in BACKENDS
    for case, (sizes, _) in CASES.items()
    for device, dtype in widest(name, sizes)
]
STANDARD = [
    pytest.param(name, device, dtype, id=f"{name}-{device}-{str(dtype)[6:]}")
    for name in BACKENDS
    for device, dtype in widest(name, Sizes())
]
LOW_RANK = [
    pytest.param(name, device, dtype, id=f"{name}-{device}-{str(dtype)[6:]}")
    for name in BACKENDS
    for device, dtype in widest(name, Sizes(rank=4))
]
ACCUMULATING = [
    pytest.param(name, device, dtype, id=f"{name}-{device}-{str(dtype)[6:]}")
    for name in BACKENDS
    for device, dtype in widest(name, Sizes(), accumulates=True)
]


def test_every_backend_is_compared_somewhere() -> None:
    compared = {str(param.values[0]) for param in STANDARD}
    # Without a GPU, a back end for GPUs alone has nothing to run on.
    expected = set(BACKENDS) - set(THIRD_PARTY) if "cuda" in DEVICES else {"cpu", "grouped_mm", "loop"}
    assert expected <= compared, f"run the standard case on no device: {expected - compared}"


@pytest.mark.parametrize(("name", "case", "device", "dtype"), RUNNABLE)
def test_output_and_gradients_equal_the_token_loop(
    name: str, case: str, device: str, dtype: torch.dtype
) -> None:
    sizes, edit = CASES[case]
    # The edit comes last where it is about storage: `to` keeps strides.
    inputs = edit(make_inputs(sizes)).to(dtype, device)
    assert_agrees(name, inputs, run_reference(inputs.to(torch.float64)), EVERY)


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
def test_experts_without_rows_get_exactly_zero(name: str, device: str, dtype: torch.dtype) -> None:
    every = [Sizes(b_up=True, b_down=True), Sizes(), Sizes(rank=4)]
    for sizes in [each for each in every if (device, dtype) in widest(name, each)]:
        inputs = make_inputs(sizes).to(dtype, device)
        inputs = replace(inputs, ids_TK=torch.where(inputs.ids_TK == 3, 1, inputs.ids_TK))
        # Freed memory full of NaN is what an uninitialised buffer would show.
        junk = [torch.full_like(v, float("nan")) for v in inputs.tensors.values() for _ in range(4)]
        del junk
        grads = run_backend(name, inputs)
        for weight in [n for n in EVERY[2:] if n in grads]:
            assert torch.equal(grads[weight][3], torch.zeros_like(grads[weight][3])), weight
            assert grads[weight][1].abs().sum() > 0, weight


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
@pytest.mark.parametrize("biased", [False, True])
def test_any_subset_may_be_frozen(name: str, device: str, dtype: torch.dtype, biased: bool) -> None:
    sizes = Sizes(T=5, D=4, F=4, b_up=biased, b_down=biased)
    if (device, dtype) not in widest(name, sizes):
        pytest.skip("no bias in this back end")
    inputs = make_inputs(sizes).to(dtype, device)
    inputs = replace(inputs, mask_TK=_checkerboard(inputs.ids_TK.cpu()).to(device))
    reference = run_reference(inputs.to(torch.float64))
    names = list(inputs.tensors)
    for size in range(len(names) + 1):
        for wanted in itertools.combinations(names, size):
            assert_agrees(name, inputs, reference, wanted)


@pytest.mark.parametrize(("name", "device", "dtype"), LOW_RANK)
def test_factors_train_beside_frozen_weights(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(rank=4)).to(dtype, device)
    reference = run_reference(inputs.to(torch.float64))
    for wanted in [
        (*FACTORS, "x", "weights"),
        FACTORS,
        *((factor,) for factor in FACTORS),
        ("w_up",),
        ("x",),
    ]:
        assert_agrees(name, inputs, reference, wanted)


@pytest.mark.parametrize(("name", "device", "dtype"), LOW_RANK)
def test_factors_of_zero_change_nothing(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(rank=4)).to(dtype, device)
    zero = {n: torch.zeros_like(v) if n.startswith("low_b") else v for n, v in inputs.tensors.items()}
    plain = run_backend(name, replace(inputs, sizes=replace(inputs.sizes, rank=0)), NAMES)
    found = run_backend(name, replace(inputs, tensors=zero), NAMES)
    for key, value in plain.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("name", "device", "dtype"), ACCUMULATING)
@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_of_weights_are_added_to_fp32_buffers(
    name: str, device: str, dtype: torch.dtype, rank: int
) -> None:
    inputs = make_inputs(Sizes(rank=rank)).to(dtype, device)
    inputs = replace(inputs, ids_TK=torch.where(inputs.ids_TK == 3, 1, inputs.ids_TK))
    expected = run_reference(inputs.to(torch.float64))
    start = {n: torch.full_like(inputs.tensors[n], 0.5, dtype=torch.float32) for n in ("w_up", "w_down")}
    main = MainGrads(start["w_up"].clone(), start["w_down"].clone())
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.tensors.items()}
    plain = run_backend(name, inputs)
    names = [n for n in leaves if n not in start]
    for passes in (1, 2):
        out_TD = call(name, inputs, leaves, main)
        grads = torch.autograd.grad(out_TD, list(leaves.values()), inputs.grad_TD, allow_unused=True)
        found = dict(zip(leaves, grads, strict=True))
        assert found["w_up"] is None and found["w_down"] is None
        assert all(torch.equal(found[n], plain[n]) for n in names)
        for n, buffer in (("w_up", main.w_up_EUD), ("w_down", main.w_down_EDF)):
            wanted = 0.5 + passes * expected[n]
            # fp32 sums of some ten terms, of operands that are rounded to fp32 at most.
            torch.testing.assert_close(buffer.double().cpu(), wanted, rtol=1e-5, atol=1e-5, msg=n)
            assert (buffer[3] == 0.5).all(), f"{n}: an expert without rows was written to"


@pytest.mark.parametrize(("name", "device", "dtype"), ACCUMULATING)
def test_frozen_weights_add_nothing_to_buffers(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes()).to(dtype, device)
    main = MainGrads(*(torch.zeros_like(inputs.tensors[n], dtype=torch.float32) for n in ("w_up", "w_down")))
    leaves = {n: v.clone().requires_grad_(n == "x") for n, v in inputs.tensors.items()}
    call(name, inputs, leaves, main).backward(inputs.grad_TD)
    assert main.w_up_EUD.count_nonzero() == 0 and main.w_down_EDF.count_nonzero() == 0


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
def test_inputs_are_left_alone_and_backward_repeats(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes()).to(dtype, device)
    leaves = {n: v.clone().requires_grad_() for n, v in inputs.tensors.items()}
    grad_TD = inputs.grad_TD.clone()
    out_TD = call(name, inputs, leaves)
    kept_TD = out_TD.detach().clone()
    first = torch.autograd.grad(out_TD, list(leaves.values()), grad_TD, retain_graph=True)
    first = tuple(g.clone() for g in first)
    second = torch.autograd.grad(out_TD, list(leaves.values()), grad_TD)
    for n, a, b in zip(leaves, first, second, strict=True):
        assert torch.equal(a, b), f"d {n} changed in the second backward pass"
        assert torch.equal(leaves[n], inputs.tensors[n]), f"{n} was written to"
    assert torch.equal(grad_TD, inputs.grad_TD), "the gradient from above was written to"
    assert torch.equal(out_TD, kept_TD), "backward wrote to the output"


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
def test_without_autograd_the_output_is_the_same(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes()).to(dtype, device)
    expected_TD = run_backend(name, inputs)["out"]
    assert torch.equal(run_backend(name, inputs, wanted=())["out"], expected_TD)
    with torch.inference_mode():
        out_TD = call(name, inputs, inputs.tensors)
    assert torch.equal(out_TD, expected_TD) and out_TD.dtype == dtype and out_TD.shape == expected_TD.shape


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
def test_what_stands_in_an_unused_slot_has_no_effect(name: str, device: str, dtype: torch.dtype) -> None:
    clean = make_inputs(Sizes(K=3)).to(dtype, device)
    mask_TK = _checkerboard(clean.ids_TK.cpu()).to(device)
    clean = replace(clean, mask_TK=mask_TK)
    junk_ids_TK = torch.where(mask_TK, clean.ids_TK, torch.tensor([10**6, -7, 5], device=device))
    junk = {**clean.tensors, "weights": torch.where(mask_TK, clean.tensors["weights"], 1e30)}
    expected = run_backend(name, clean)
    found = run_backend(name, replace(clean, ids_TK=junk_ids_TK, tensors=junk))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert torch.equal(found["weights"][~mask_TK], torch.zeros_like(found["weights"][~mask_TK]))


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
def test_nan_in_a_token_without_experts_goes_nowhere(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(K=3)).to(dtype, device)
    mask_TK = _checkerboard(inputs.ids_TK.cpu()).to(device)
    lonely = inputs.sizes.T // 2
    inputs = replace(inputs, mask_TK=mask_TK)
    expected = run_backend(name, inputs)
    assert torch.equal(expected["out"][lonely], torch.zeros_like(expected["out"][lonely]))
    x_TD, grad_TD = inputs.tensors["x"].clone(), inputs.grad_TD.clone()
    x_TD[lonely] = grad_TD[lonely] = float("nan")
    found = run_backend(name, replace(inputs, tensors={**inputs.tensors, "x": x_TD}, grad_TD=grad_TD))
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("name", "device", "dtype"), STANDARD)
def test_nan_stays_with_its_token_and_its_experts(name: str, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(Sizes(b_up=False)).to(dtype, device)
    ids_TK = inputs.ids_TK.clone()
    ids_TK[4] = torch.tensor([0, 3], device=device)
    inputs = replace(inputs, ids_TK=ids_TK)
    expected = run_backend(name, inputs)
    x_TD = inputs.tensors["x"].clone()
    x_TD[4] = float("nan")
    found = run_backend(name, replace(inputs, tensors={**inputs.tensors, "x": x_TD}))
    others_T = torch.arange(inputs.sizes.T) != 4
    for key in ("out", "x", "weights"):
        assert found[key][4].isnan().all(), key
        assert torch.equal(found[key][others_T], expected[key][others_T]), key
    for key in ("w_up", "w_down"):
        assert found[key][[0, 3]].isnan().any(), key
        assert torch.equal(found[key][[1, 2, 4]], expected[key][[1, 2, 4]]), key
