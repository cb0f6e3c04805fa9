"""Base of the routers whose logits are one linear map of the token, and the scores that are made of logits.

Letters: T tokens, D model width, E experts, K experts a token, N of either.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from moe.routers.base import Router
from moe.routers.configs.projection_config import ProjectionConfig

Score = Literal["softmax", "sigmoid"]


ProjectionConfigT = TypeVar("ProjectionConfigT", bound=ProjectionConfig)


class ProjectionRouter(Router[ProjectionConfigT], Generic[ProjectionConfigT]):
    """Router whose logits are ``x W^T``, computed in at least fp32 whatever the model's dtype is.

    Attributes:
        weight_ED: ``[E, D]``.
    """

    @property
    def num_rows(self) -> int:
        """Experts that the projection has a row for."""
        return self.num_experts

    def create_parameters(self) -> None:
        """Registers the projection."""
        self.weight_ED = nn.Parameter(torch.empty(self.num_rows, self.model_width))

    def rows_ED(self) -> Tensor | None:
        """Returns the projection."""
        return self.weight_ED

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws the projection, normal with ``init_std``."""
        nn.init.normal_(self.weight_ED, std=self.config.init_std, generator=generator)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Returns the ``[T, E]`` logits in at least fp32; call it with autocast off."""
        return linear_logits(x_TD, self.weight_ED)


def linear_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Returns ``x W^T``, ``[T, E]``, in at least fp32; call it with autocast off."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(dtype) @ weight_ED.to(dtype).t()


def score_logits(logits_TN: Tensor, score: Score) -> Tensor:
    """Returns the scores of logits: their softmax over the last axis, or their sigmoid."""
    return logits_TN.softmax(-1) if score == "softmax" else logits_TN.sigmoid()


def log_scores(logits_TN: Tensor, score: Score) -> Tensor:
    """Returns the logarithms of the scores, up to a constant per token; small scores do not round to 0."""
    return logits_TN if score == "softmax" else F.logsigmoid(logits_TN)


def normalise_scores(logits_TN: Tensor, score: Score) -> Tensor:
    """Returns the scores divided by their sum, computed in log space."""
    return log_scores(logits_TN, score).softmax(-1)


def select_top_k(
    logits_TE: Tensor, scores_TE: Tensor, top_k: int, score: Score = "softmax", *, renormalise: bool
) -> tuple[Tensor, Tensor]:
    """Returns ids and weights ``[T, K]`` of the experts with the largest logits.

    Both score functions are monotonic, and logits tie less often than scores.

    Args:
        logits_TE: ``[T, E]``.
        scores_TE: ``[T, E]`` scores of the logits, which are the weights unless renormalised.
        top_k: K.
        score: The score function.
        renormalise: Divides the selected scores by their sum.
    """
    top_TK, ids_TK = logits_TE.topk(top_k, dim=-1, sorted=False)
    if renormalise:
        return ids_TK, normalise_scores(top_TK, score)
    return ids_TK, scores_TE.gather(-1, ids_TK)
