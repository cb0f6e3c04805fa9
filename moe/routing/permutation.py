"""Learned permutation of the experts: COMET's local search, for any router.

A hard gate has no gradient towards experts that it does not use, but relabelling its experts is still
possible; a soft permutation, hardened on a schedule, learns the labels.

Source: Ibrahim et al., COMET (KDD 2023, arXiv 2306.02824), section on local search and released settings.

Letters: E experts; rows are the router's choices, columns the experts that they lead to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor

from moe.routing.permutation_config import PermutationConfig

#: Half-width of the uniform initial scores.
_INIT = 0.05
#: Weight of the scores where Sinkhorn's matrix leaves assignments equal.
_TIE_BREAK = 1e-6


def log_sinkhorn(scores_EE: Tensor, tau: float, iterations: int) -> Tensor:
    """Returns the ``[E, E]`` log of exp(scores/tau), scaled to row and then column sums of 1 repeatedly.

    Computed in fp64: scores of 0.05 at tau 1e-7 are 5e5, which fp32 resolves only to 0.03.
    """
    log_p_EE = scores_EE.double() / tau
    for _ in range(iterations):
        log_p_EE = log_p_EE - log_p_EE.logsumexp(1, keepdim=True)
        log_p_EE = log_p_EE - log_p_EE.logsumexp(0, keepdim=True)
    return log_p_EE


@torch.no_grad()
def harden(log_p_EE: Tensor, scores_EE: Tensor) -> Tensor:
    """Returns ``[E]`` int64: each row's column in the permutation that holds most of ``exp(log_p_EE)``.

    It uses the Hungarian algorithm. At low temperatures Sinkhorn leaves rows whose entries all round to 0;
    scores weighed 1e-6 break these ties.
    """
    from scipy.optimize import linear_sum_assignment

    scores_EE = scores_EE.double()
    spread = (scores_EE.max() - scores_EE.min()).clamp_min(torch.finfo(torch.float64).tiny)
    value_EE = log_p_EE.exp() + _TIE_BREAK * (scores_EE - scores_EE.min()) / spread
    _, columns = linear_sum_assignment(-value_EE.cpu().numpy())
    return torch.from_numpy(columns).to(scores_EE.device, torch.int64)


@dataclass(frozen=True)
class SoftPermutation:
    """Permutation that is still being learned.

    Attributes:
        matrix_EE: ``[E, E]`` fp64 with row sums of 1; also column sums, if Sinkhorn has converged.
        entropy: Sum over columns of their entropy, plus sum over rows of theirs, in nats. As released: with
            E experts it is up to ``2 E ln E``.
    """

    matrix_EE: Tensor
    entropy: Tensor


class PermutationSearch(nn.Module):
    """Learned scores and the permutation that they currently represent.

    Attributes:
        scores_EE: ``[E, E]`` parameter.
        column_E: ``[E]`` int64 buffer: the hardened permutation, updated after each step of the search.
        is_frozen: bool buffer: True once the search is over, whatever the step of a later run is.
    """

    scores_EE: nn.Parameter
    column_E: Tensor
    is_frozen: Tensor

    def __init__(self, config: PermutationConfig, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.scores_EE = nn.Parameter(torch.empty(num_experts, num_experts))
        self.register_buffer("column_E", torch.arange(num_experts))
        self.register_buffer("is_frozen", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Draws scores from +-0.05 and restarts the search."""
        nn.init.uniform_(self.scores_EE, -_INIT, _INIT, generator=generator)
        self.is_frozen.fill_(False)
        self._renew(0)

    def is_searching(self, step: int) -> bool:
        """Returns True if the training step with this number uses the soft permutation."""
        # The buffer is read only where it matters, as reading makes the host wait for the device.
        return step < self.config.steps and not bool(self.is_frozen)

    def soft(self, step: int) -> SoftPermutation:
        """Returns the soft permutation of a step, with its gradient."""
        log_p_EE = log_sinkhorn(self.scores_EE, self.config.temperature(step), self.config.iterations(step))
        log_rows_EE = log_p_EE.log_softmax(1)
        matrix_EE = log_rows_EE.exp()
        entropy = -(log_p_EE.exp() * log_p_EE).sum() - (matrix_EE * log_rows_EE).sum()
        return SoftPermutation(matrix_EE, entropy)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Updates the hardened permutation after a step, and freezes it after the last step of the search."""
        if bool(self.is_frozen):
            return
        self._renew(step)
        self.is_frozen.fill_(step >= self.config.steps)

    def _renew(self, step: int) -> None:
        scores_EE = self.scores_EE.detach()
        if isinstance(scores_EE, DTensor):
            scores_EE = scores_EE.full_tensor()
        log_p_EE = log_sinkhorn(scores_EE, self.config.temperature(step), self.config.iterations(step))
        self.column_E.copy_(harden(log_p_EE, scores_EE))
