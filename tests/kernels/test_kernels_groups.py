"""Groups of experts on a CPU: worked by hand, and batches against one product for each expert.

Letters: E experts, R rows, K, N, P, Q any widths.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu.cpu_groups import GroupRows, RowGroup, row_groups, rows_times, weight_gradient

CASES = {
    "even": [3, 3, 3, 3],
    "uneven": [4, 1, 3, 2],
    "empty between": [2, 0, 3, 0, 0, 1],
    "empty at the ends": [0, 2, 3, 0],
    "small and large": [2, 3, 400, 500, 1, 2],
    "one expert": [5],
    "no rows": [0, 0],
    "steep": [64, 32, 16, 8, 4, 2, 1, 1, 1, 1],
}


def test_worked_by_hand() -> None:
    # bf16 batches up to 6e6 multiplications: at 1e5 a row, experts of up to 60 rows. Padding is free up to
    # 2e6, so 20 rows. Experts 0 and 2 need 3 * 30 rows for 50, less than twice: one batch, with expert 1
    # inside. Expert 3 is large, and so is 4: a group without a batch. Expert 5 stands alone.
    counts = [30, 0, 20, 70, 61, 5]
    groups = list(row_groups(counts, row_bytes=1, work_a_row=1e5, element_size=2))
    assert [(g.start, g.stop, g.height) for g in groups] == [(0, 50, 30), (50, 181, 0), (181, 186, 0)]
    assert groups[0].spans == ((0, 0, 30), (2, 30, 50)) and groups[0].experts == slice(0, 3)
    # Rows 30 to 49 are those of the third expert of the batch, which begin at place 60.
    assert groups[0].place_n is not None
    assert groups[0].place_n.tolist() == [*range(30), *range(60, 80)]


def test_padding_is_limited() -> None:
    # 40 rows and then 5 times 1: two experts need 80 places for 41 rows, one below twice 41; three need 120,
    # above twice 42 and above 42 + 20. The ones go on among themselves.
    groups = list(row_groups([40, 1, 1, 1, 1, 1], row_bytes=1, work_a_row=1e5, element_size=2))
    assert [(g.start, g.stop, g.height) for g in groups] == [(0, 41, 40), (41, 45, 1)]


def test_a_group_fits_the_cache() -> None:
    # 8 MiB over 2^20 bytes a row: 8 rows.
    groups = list(row_groups([4, 4, 1, 9, 2], row_bytes=2**20, work_a_row=1.0, element_size=4))
    assert [(g.start, g.stop) for g in groups] == [(0, 8), (8, 9), (9, 18), (18, 20)]


def _cut(counts: list[int]) -> tuple[list[RowGroup], list[tuple[int, int, int]]]:
    groups = list(row_groups(counts, row_bytes=64, work_a_row=1e3, element_size=4))
    return groups, [span for group in groups for span in group.spans]


@pytest.mark.parametrize("case", list(CASES))
def test_every_row_is_in_one_group(case: str) -> None:
    groups, spans = _cut(CASES[case])
    row, expected = 0, []
    for expert, count in enumerate(CASES[case]):
        if count:
            expected.append((expert, row, row + count))
        row += count
    assert spans == expected
    for group in groups:
        assert (group.start, group.stop) == (group.spans[0][1], group.spans[-1][2])
        if group.height and group.place_n is not None:
            places = group.place_n.tolist()
            assert len(set(places)) == len(places) == group.stop - group.start
            owners = [place // group.height + group.experts.start for place in places]
            assert owners == [e for e, a, b in group.spans for _ in range(a, b)]


@pytest.mark.parametrize("case", list(CASES))
def test_batches_equal_one_product_for_each_expert(case: str) -> None:
    counts, g = CASES[case], torch.Generator().manual_seed(0)
    E, R, K, N = len(counts), sum(counts), 6, 5
    groups, spans = _cut(counts)
    assert case in ("one expert", "no rows") or any(group.height for group in groups)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    rows_RK, weight_ENK, other_RN = normal(R, K), normal(E, N, K), normal(R, N)
    out_RN = torch.full((R, N), torch.nan, dtype=torch.float64)
    # Uninitialised where an expert between two others has no rows.
    grad_ENK = torch.full((E, N, K), torch.nan, dtype=torch.float64)
    for group in groups:
        part = slice(group.start, group.stop)
        rows_times(GroupRows(rows_RK[part], group), weight_ENK.transpose(1, 2), out_RN[part])
        left, right = GroupRows(other_RN[part], group), GroupRows(rows_RK[part], group)
        weight_gradient(left, right, grad_ENK)
    for e, a, b in spans:
        torch.testing.assert_close(out_RN[a:b], rows_RK[a:b] @ weight_ENK[e].t(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(grad_ENK[e], other_RN[a:b].t() @ rows_RK[a:b], rtol=1e-13, atol=1e-13)
    owners = {e for e, _, _ in spans}
    inside = {e for group in groups if group.height for e in range(E)[group.experts]} - owners
    assert all(torch.equal(grad_ENK[e], torch.zeros_like(grad_ENK[e])) for e in inside)
