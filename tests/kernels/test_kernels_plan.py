"""The plan: worked by hand, and its invariants on random ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.backend import ExpertTensors
from kernels.expert_mlp import BACKENDS, expert_mlp
from kernels.plan.row_plan import RowPlan, make_plan, route
from kernels.torch.combine import combine_rows
from tests.kernels.expert_reference import NAMES, Sizes, make_inputs, workload


def test_worked_by_hand() -> None:
    # flat slot:       0  1    2  3    4  5
    # expert:          2  0    0  2    1  1     token: slot // 2
    # expert 0 has slots 1, 2; expert 1 has 4, 5; expert 2 has 0, 3; expert 3 has none.
    plan = make_plan(torch.tensor([[2, 0], [0, 2], [1, 1]]), 4)
    assert plan.slot_R.tolist() == [1, 2, 4, 5, 0, 3]
    assert plan.token_R.tolist() == [0, 1, 2, 2, 0, 1]
    assert plan.row_TK.tolist() == [[4, 0], [1, 5], [2, 3]]
    assert plan.counts_E.tolist() == [2, 2, 2, 0]
    assert (plan.num_rows, plan.num_experts, plan.has_unused) == (6, 4, False)


def test_worked_by_hand_with_unused_slots() -> None:
    # Used are slots 0 (expert 2), 2 (expert 0), 3 (expert 2) and 5 (expert 1); R = 4 marks the others,
    # whose ids are nonsense and must not matter.
    mask_TK = torch.tensor([[True, False], [True, True], [False, True]])
    plan = make_plan(torch.tensor([[2, 999], [0, 2], [-5, 1]]), 4, mask_TK)
    assert plan.slot_R.tolist() == [2, 5, 0, 3]
    assert plan.token_R.tolist() == [1, 2, 0, 1]
    assert plan.row_TK.tolist() == [[2, 4], [0, 3], [4, 1]]
    assert plan.counts_E.tolist() == [1, 1, 2, 0]
    assert (plan.num_rows, plan.has_unused) == (4, True)


@pytest.mark.parametrize("num_experts", [1, 3, 32766, 32767, 32768, 40000])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_are_in_expert_order_and_find_back(num_experts: int, K: int, masked: bool) -> None:
    g = torch.Generator().manual_seed(num_experts + K)
    # Few distinct experts, the last among them: both sorts (16-bit radix, comparison) see ties and ends.
    ids_TK = num_experts - 1 - torch.randint(0, min(3, num_experts), (17, K), generator=g)
    mask_TK = torch.rand(17, K, generator=g) < 0.6 if masked else None
    plan = make_plan(ids_TK, num_experts, mask_TK)
    used = range(17 * K) if mask_TK is None else mask_TK.flatten().nonzero().flatten().tolist()
    flat = ids_TK.flatten().tolist()
    expected = sorted(used, key=lambda slot: (flat[slot], slot))
    assert plan.slot_R.tolist() == expected
    assert plan.token_R.tolist() == [slot // K for slot in expected]
    rows = {slot: row for row, slot in enumerate(expected)}
    assert plan.row_TK.flatten().tolist() == [rows.get(slot, len(rows)) for slot in range(17 * K)]
    assert plan.counts_E.tolist() == [sum(flat[s] == e for s in used) for e in range(num_experts)]
    assert {t.dtype for t in (plan.slot_R, plan.token_R, plan.row_TK, plan.counts_E)} == {torch.int64}


def _padded(ids_TK: Tensor, num_experts: int, mask_TK: Tensor) -> RowPlan:
    """What a GPU gets, where nobody counts."""
    slot_R, token_R, row_TK, counts_E = route(ids_TK, mask_TK, num_experts, ids_TK.numel())
    return RowPlan(token_R, slot_R, row_TK, counts_E, has_unused=True, is_padded=True)


def test_a_padded_plan_worked_by_hand() -> None:
    # The masked example above with room for all six slots: the unused ones, 1 and 4, come last, and R = 6.
    mask_TK = torch.tensor([[True, False], [True, True], [False, True]])
    plan = _padded(torch.tensor([[2, 999], [0, 2], [-5, 1]]), 4, mask_TK)
    assert plan.slot_R.tolist() == [2, 5, 0, 3, 1, 4]
    assert plan.token_R.tolist() == [1, 2, 0, 1, 0, 2]
    assert plan.row_TK.tolist() == [[2, 6], [0, 3], [6, 1]]
    assert plan.counts_E.tolist() == [1, 1, 2, 0]
    assert plan.is_used_R1()[:, 0].tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("name", ["cpu", "grouped_mm", "loop"])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_pad_a_plan_change_nothing(name: str, biased: bool) -> None:
    sizes = Sizes(b_up=biased, b_down=biased, gated=not biased)
    if BACKENDS[name].unsupported_reason(workload(sizes, torch.float32, "cpu")) is not None:
        pytest.skip("it does not run these here")
    inputs = make_inputs(sizes).to(torch.float32)
    mask_TK = torch.arange(sizes.T * sizes.K).view(sizes.T, -1) % 3 > 0
    found = []
    plans = (make_plan(inputs.ids_TK, sizes.E, mask_TK), _padded(inputs.ids_TK, sizes.E, mask_TK))
    for plan in plans:
        leaves = {n: v.detach().clone().requires_grad_() for n, v in inputs.tensors.items()}
        x_TD, weights_TK, *others = (leaves.get(n) for n in NAMES)
        experts = ExpertTensors(*others[:2], sizes.activation, sizes.gated, *others[2:])
        out_TD = expert_mlp(x_TD, weights_TK, plan, experts, BACKENDS[name])
        found.append([out_TD, *torch.autograd.grad(out_TD, list(leaves.values()), inputs.grad_TD)])
    assert plans[1].num_rows > plans[0].num_rows
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_known_number_of_rows_is_checked_on_a_cpu() -> None:
    ids_TK, mask_TK = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[True, False], [True, True]])
    assert torch.equal(make_plan(ids_TK, 3, mask_TK, 3).slot_R, make_plan(ids_TK, 3, mask_TK).slot_R)
    with pytest.raises(ValueError, match="a plan of 2 rows, and 3 slots are used"):
        make_plan(ids_TK, 3, mask_TK, 2)
    with pytest.raises(IndexError, match="out of bounds: there are 2 experts"):
        make_plan(ids_TK, 2, mask_TK)


@pytest.mark.parametrize("masked", [False, True])
def test_the_plan_is_an_operator(masked: bool) -> None:
    ids_TK = torch.tensor([[2, 0], [0, 2], [1, 1]])
    mask_TK = torch.tensor([[True, False], [True, True], [False, True]]) if masked else None
    torch.library.opcheck(route, (ids_TK, mask_TK, 4, 6))
    compiled = torch.compile(make_plan, fullgraph=True, backend="aot_eager")
    found = compiled(ids_TK, 4, mask_TK)
    expected = _padded(ids_TK, 4, mask_TK) if mask_TK is not None else make_plan(ids_TK, 4)
    assert (found.has_unused, found.is_padded) == (masked, masked)
    for name in ("slot_R", "token_R", "row_TK", "counts_E"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_id_out_of_range_is_not_counted_elsewhere(bad: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        make_plan(torch.tensor([[0, 1], [2, bad]]), 3)


def test_ids_are_left_alone() -> None:
    ids_TK, mask_TK = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[True, False], [True, True]])
    kept_TK, kept_mask_TK = ids_TK.clone(), mask_TK.clone()
    make_plan(ids_TK, 3, mask_TK)
    assert torch.equal(ids_TK, kept_TK) and torch.equal(mask_TK, kept_mask_TK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_combine_worked_by_hand(dtype: torch.dtype) -> None:
    # Rows in expert order: expert 0 holds token 1, expert 1 token 0, and slot 1 of token 1 is unused.
    plan = make_plan(torch.tensor([[1, 0], [0, 7]]), 2, torch.tensor([[True, True], [True, False]]))
    assert plan.row_TK.tolist() == [[2, 0], [1, 3]]
    rows_RD = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [0.0, 0.0]], dtype=dtype)
    # token 0: 0.5 * row 2 - 2 * row 0 = [8 - 2, 16 - 4];  token 1: 0.25 * row 1 + 9 * zero row = [1, 2]
    out_TD = combine_rows(rows_RD, plan, torch.tensor([[0.5, -2.0], [0.25, 9.0]]))
    assert out_TD.dtype == dtype and out_TD.tolist() == [[6.0, 12.0], [1.0, 2.0]]
    # Unweighted: row 2 + row 0, and row 1 alone.
    assert combine_rows(rows_RD, plan, None).tolist() == [[17.0, 34.0], [4.0, 8.0]]


@pytest.mark.parametrize("weighted", [True, False])
def test_combine_adds_up_in_fp32(weighted: bool) -> None:
    # bf16 holds even numbers alone above 256: added in bf16, 256 + 1 + 1 stays 256.
    plan = make_plan(torch.tensor([[0, 1, 2]]), 3)
    rows_RD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert combine_rows(rows_RD, plan, torch.ones(1, 3) if weighted else None).item() == 258.0


def test_combine_weighs_in_fp32() -> None:
    # 1.001 * 256 - 256 = 0.256; with weights rounded to bf16 it would be 0.
    plan = make_plan(torch.tensor([[0, 1]]), 2)
    rows_RD = torch.tensor([[256.0], [-256.0]], dtype=torch.bfloat16)
    found = combine_rows(rows_RD, plan, torch.tensor([[1.001, 1.0]])).item()
    assert found == pytest.approx(0.256, rel=2**-8)


def test_combine_without_tokens() -> None:
    plan = make_plan(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert combine_rows(torch.zeros(0, 4), plan, torch.zeros(0, 2)).shape == (0, 4)
