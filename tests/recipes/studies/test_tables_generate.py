"""The generated set: repeatable, as documented, and with a ceiling that is one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from recipes.studies.tables.auc import roc_auc
from recipes.studies.tables.generate import SPLITS, TASKS, Rows, TableConfig, _logits, _related, generate

SMALL = TableConfig(num_rows=4000, num_users=60, num_items=30)


def joined(splits: dict[str, Rows]) -> Rows:
    """All rows."""
    return Rows(
        *(torch.cat(parts) for parts in zip(*(vars(s).values() for s in splits.values()), strict=True))
    )


def same(one: Rows, other: Rows) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_the_seed_decides_everything() -> None:
    first, again = generate(SMALL), generate(SMALL)
    other = generate(dataclasses.replace(SMALL, seed=1))
    assert list(first) == list(SPLITS)
    assert all(same(first[name], again[name]) for name in SPLITS)
    assert not any(same(first[name], other[name]) for name in SPLITS)


def test_splits_share_no_row() -> None:
    splits = generate(SMALL)
    assert {name: len(rows) for name, rows in splits.items()} == SMALL.split_sizes()
    assert list(SMALL.split_sizes().values()) == [2400, 400, 1200]
    # Contexts are drawn anew for every row.
    assert len(joined(splits).context_NC.unique(dim=0)) == SMALL.num_rows


def test_columns_belong_to_users_and_items() -> None:
    rows = joined(generate(SMALL))
    for ids_N, codes_N in ((rows.users_N, rows.segments_N), (rows.items_N, rows.kinds_N)):
        for one in ids_N.unique():
            assert len(codes_N[ids_N == one].unique()) == 1


def test_labels_are_drawn_from_the_probabilities() -> None:
    rows = joined(generate(dataclasses.replace(SMALL, num_rows=40_000)))
    watched_N, liked_N = rows.labels_NJ.t()
    assert bool((liked_N <= watched_N).all()), "what is not watched is not liked"
    assert bool((rows.probs_NJ[:, 1] <= rows.probs_NJ[:, 0]).all())
    for task in range(len(TASKS)):
        p_N, y_N = rows.probs_NJ[:, task], rows.labels_NJ[:, task].double()
        for low in (0.0, 0.2, 0.4, 0.6, 0.8):
            part = (p_N >= low) & (p_N < low + 0.2)
            deviation = (p_N[part] * (1 - p_N[part])).sum().sqrt()
            # 4 standard deviations of a sum of Bernoulli draws.
            assert abs(float((y_N - p_N)[part].sum())) <= 4 * float(deviation), (task, low)


def test_logits_row_by_row() -> None:
    # The same draws in the same order, and then one row after another by the formula.
    config = dataclasses.replace(SMALL, num_users=5, num_items=4, latent_width=2, context_width=3)
    rng = np.random.default_rng(7)
    users, items, regimes = rng.integers(5, size=20), rng.integers(4, size=20), rng.integers(6, size=20)
    context = rng.standard_normal((20, 3))
    found = _logits(np.random.default_rng(1), config, users, items, regimes, context)
    draws = np.random.default_rng(1)
    p, q = draws.standard_normal((5, 2)), draws.standard_normal((4, 2))
    offset_u, offset_i = 0.5 * draws.standard_normal((5, 2)), 0.5 * draws.standard_normal((4, 2))
    a = _related(draws, 0.6, (6, 2, 2)) / 2
    v = _related(draws, 0.6, (6, 3)) / 3**0.5
    for n, (u, i, r) in enumerate(zip(users, items, regimes, strict=True)):
        for j, bias in enumerate((-0.5, 0.5)):
            match = sum(p[u, s] * a[j, r, s, t] * q[i, t] for s in range(2) for t in range(2))
            reaction = sum(v[j, r, c] * context[n, c] for c in range(3))
            expected = bias + offset_u[u, j] + offset_i[i, j] + 1.25 * (match + reaction)
            assert found[n, j] == pytest.approx(expected, abs=1e-13)


def test_the_second_task_is_related() -> None:
    first, second = _related(np.random.default_rng(0), 0.6, (50_000,))
    # Deviation of a correlation: (1 - 0.36) / sqrt(50,000) = 0.003.
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.6, abs=0.012)
    assert second.std() == pytest.approx(1, abs=0.013)
    assert np.array_equal(*_related(np.random.default_rng(0), 1.0, (9,)))


def test_nothing_ranks_better_than_the_truth() -> None:
    rows = generate(dataclasses.replace(SMALL, num_rows=40_000))["test"]
    ceilings = rows.ceilings()
    rng = np.random.default_rng(0)
    for task, ceiling in enumerate(ceilings):
        labels_N, p_N = rows.labels_NJ[:, task].numpy(), rows.probs_NJ[:, task].numpy()
        assert 0.75 < ceiling < 0.95
        assert ceiling == roc_auc(labels_N, p_N)
        logit_N = np.log(p_N / (1 - p_N))
        for noise in (0.5, 1, 2):
            assert roc_auc(labels_N, logit_N + noise * rng.standard_normal(len(logit_N))) < ceiling
    # The other task's probabilities rank, but not as well.
    crossed = roc_auc(rows.labels_NJ[:, 1].numpy(), rows.probs_NJ[:, 0].numpy())
    assert 0.6 < crossed < ceilings[1]


def test_mistakes_in_sizes_are_told_together() -> None:
    with pytest.raises(ValueError, match=r"num_users=0(.|\n)*num_rows=3(.|\n)*task_correlation=2"):
        TableConfig(num_users=0, num_rows=3, task_correlation=2)
