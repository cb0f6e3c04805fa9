"""Generated recommendation set of two tasks whose true probabilities are known.

Users u are of one of G groups, items i of one of H kinds; each pair of group and kind is under one of R
regimes r, drawn once, so that neither group nor kind alone says which. A row is a user, an item and a context
c. Task 0 is *watched*; task 1 is *liked*, which needs watching:

    z_j = bias_j + o_uj + o_ij + s (p_u' A_rj q_i + v_rj' c)      j = 0, 1
    P(watched) = sigmoid(z_0),   P(liked) = sigmoid(z_0) sigmoid(z_1)

with tastes ``p_u``, properties ``q_i`` and contexts ``c`` standard normal; ``A_rj`` and ``v_rj`` normal, so
that ``p'Aq`` and ``v'c`` have variance 1; offsets ``o`` of deviation 0.5, ``s`` 1.25. ``A_r1`` and ``v_r1``
are ``rho`` times those of task 0 plus an independent part: tasks that are related and not the same.

A model sees the ids, a segment of the user (its group, or with probability 0.1 any), the item's kind and the
context; neither tastes, properties nor regimes. Users and items are drawn by log-normal popularity, rows are
split at random. What ranks best on any sample is the true probability: its AUC is the ceiling.

Letters: N rows, C context width, J tasks, U users, I items, G groups, H kinds, R regimes, L latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from moe.errors import at_least, require
from moe.types import Config
from recipes.studies.tables.auc import roc_auc

TASKS = ("watched", "liked")
SPLITS = ("train", "validation", "test")

_OFFSET, _SCALE, _POPULARITY, _WRONG_SEGMENT = 0.5, 1.25, 0.5, 0.1
_BIAS_J = (-0.5, 0.5)
_SHARES = {"train": 0.6, "validation": 0.1}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TableConfig(Config):
    """Sizes of the set, and its seed."""

    num_rows: int = 50_000
    """Interactions; 60% train, 10% validate, 30% test."""
    num_users: int = 600
    num_items: int = 200
    num_groups: int = 4
    num_kinds: int = 4
    num_regimes: int = 6
    latent_width: int = 4
    """Width of the vectors of tastes (of users) and properties (of items)."""
    context_width: int = 6
    task_correlation: float = 0.6
    """rho: of the tasks' regimes."""
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("num_users", "num_items", "num_groups", "num_kinds", "num_regimes")
        sizes += ("latent_width", "context_width")
        require(
            self,
            *at_least(self, 1, *sizes),
            *at_least(self, 1000, "num_rows"),
            (self.seed >= 0, "seed", "must be 0 or more", "Raise it."),
            (
                -1 <= self.task_correlation <= 1,
                "task_correlation",
                "must be in [-1, 1]",
                "0.6 is the default.",
            ),
        )

    def split_sizes(self) -> dict[str, int]:
        """Returns the number of rows of each split."""
        sizes = {name: int(share * self.num_rows) for name, share in _SHARES.items()}
        return sizes | {"test": self.num_rows - sizes["train"] - sizes["validation"]}


@dataclass(frozen=True)
class Rows:
    """Rows of the set, the true probabilities with them.

    Attributes:
        users_N: ``[N]`` int64 ids.
        items_N: ``[N]`` int64 ids.
        segments_N: ``[N]`` int64, the user's group as far as it is observed.
        kinds_N: ``[N]`` int64.
        context_NC: ``[N, C]`` fp32.
        labels_NJ: ``[N, J]`` fp32, 0 or 1, by the order of `TASKS`.
        probs_NJ: ``[N, J]`` fp64, not for models.
    """

    users_N: Tensor
    items_N: Tensor
    segments_N: Tensor
    kinds_N: Tensor
    context_NC: Tensor
    labels_NJ: Tensor
    probs_NJ: Tensor

    def __len__(self) -> int:
        return len(self.users_N)

    def take(self, index_N: Tensor) -> Rows:
        """Returns the rows of an index."""
        return Rows(**{name: values[index_N] for name, values in vars(self).items()})

    def ceilings(self) -> tuple[float, ...]:
        """Computes the AUC of the true probabilities by task: no ranking does better except by luck."""
        return tuple(
            roc_auc(self.labels_NJ[:, j].numpy(), self.probs_NJ[:, j].numpy()) for j in range(len(TASKS))
        )


def generate(config: TableConfig) -> dict[str, Rows]:
    """Generates the rows of every split by name, the same for the same config."""
    rng = np.random.default_rng(config.seed)
    users_N = _draw_popular(rng, config.num_users, config.num_rows)
    items_N = _draw_popular(rng, config.num_items, config.num_rows)
    context_NC = rng.standard_normal((config.num_rows, config.context_width))
    group_U = rng.integers(config.num_groups, size=config.num_users)
    kind_I = rng.integers(config.num_kinds, size=config.num_items)
    regime_GH = rng.integers(config.num_regimes, size=(config.num_groups, config.num_kinds))
    regime_N = regime_GH[group_U[users_N], kind_I[items_N]]
    logits_NJ = _logits(rng, config, users_N, items_N, regime_N, context_NC)
    chances_NJ = 1 / (1 + np.exp(-logits_NJ))
    # Liked needs watched: product of the chances, and product of the draws.
    probs_NJ = np.cumprod(chances_NJ, axis=1)
    labels_NJ = np.cumprod(rng.random(chances_NJ.shape) < chances_NJ, axis=1)
    wrong_U = rng.random(config.num_users) < _WRONG_SEGMENT
    segment_U = np.where(wrong_U, rng.integers(config.num_groups, size=config.num_users), group_U)
    rows = Rows(
        users_N=torch.from_numpy(users_N),
        items_N=torch.from_numpy(items_N),
        segments_N=torch.from_numpy(segment_U[users_N]),
        kinds_N=torch.from_numpy(kind_I[items_N]),
        context_NC=torch.from_numpy(context_NC).float(),
        labels_NJ=torch.from_numpy(labels_NJ).float(),
        probs_NJ=torch.from_numpy(probs_NJ),
    )
    order_N = torch.from_numpy(rng.permutation(config.num_rows))
    sizes = config.split_sizes()
    parts = order_N.split([sizes[name] for name in SPLITS])
    return {name: rows.take(part) for name, part in zip(SPLITS, parts, strict=True)}


def _draw_popular(rng: Generator, number: int, rows: int) -> NDArray[np.int64]:
    """Draws ids by log-normal popularity."""
    weights = np.exp(_POPULARITY * rng.standard_normal(number))
    return rng.choice(number, size=rows, p=weights / weights.sum()).astype(np.int64)


def _logits(
    rng: Generator,
    config: TableConfig,
    users_N: NDArray[np.int64],
    items_N: NDArray[np.int64],
    regime_N: NDArray[np.int64],
    context_NC: Floats,
) -> Floats:
    """Computes ``z``, ``[N, J]``, term by term."""
    tastes_UL = rng.standard_normal((config.num_users, config.latent_width))
    properties_IL = rng.standard_normal((config.num_items, config.latent_width))
    offset_UJ = _OFFSET * rng.standard_normal((config.num_users, len(TASKS)))
    offset_IJ = _OFFSET * rng.standard_normal((config.num_items, len(TASKS)))
    L, C, R = config.latent_width, config.context_width, config.num_regimes
    matching_JRLL = _related(rng, config.task_correlation, (R, L, L)) / L
    reaction_JRC = _related(rng, config.task_correlation, (R, C)) / C**0.5
    logits_NJ = offset_UJ[users_N] + offset_IJ[items_N] + np.array(_BIAS_J)
    tastes_NL, properties_NL = tastes_UL[users_N], properties_IL[items_N]
    for task in range(len(TASKS)):
        match_N = np.einsum("nl,nlm,nm->n", tastes_NL, matching_JRLL[task][regime_N], properties_NL)
        reaction_N = (reaction_JRC[task][regime_N] * context_NC).sum(1)
        logits_NJ[:, task] += _SCALE * (match_N + reaction_N)
    return logits_NJ


def _related(rng: Generator, correlation: float, shape: tuple[int, ...]) -> Floats:
    """Draws ``[2, *shape]`` standard normals; the second correlates with the first."""
    first, own = rng.standard_normal((2, *shape))
    return np.stack([first, correlation * first + (1 - correlation**2) ** 0.5 * own])
