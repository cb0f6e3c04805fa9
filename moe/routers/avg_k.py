"""Avg-K: an expert's gate is the mean of its own keys; routing needs no parameters and no loss.

Source: Liu et al., "Towards A Unified View of Sparse Feed-Forward Network in Pretraining Large Language
Model" (arXiv 2305.13999), Section 4. Reconstructed: that the dot product is raw, and that a gated expert's
keys are its gate rows.

Identical experts have identical gates: after plain copying the router cannot tell the copies apart, and every
token would go to the same ones for ever. The router warns, and refuses to train.

Letters: T tokens, D model width, E experts, K experts a token, F expert width, U = 2F when gated, else F.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from moe.errors import ConfigError
from moe.routers.base import Router
from moe.routers.configs.avg_k_config import AvgKConfig
from moe.types import LayerContext, Routing

if TYPE_CHECKING:
    from moe.experts.experts import Experts

_LOG = logging.getLogger("graft.avg_k")
_RULE = "the experts' mean keys are all the same, so that it cannot tell the experts apart"
_REMEDY = (
    "Make experts that differ (upcycle.noise_std above 0, or a method that splits), or choose another router."
)


class AvgKRouter(Router[AvgKConfig]):
    """Router to the K experts with the largest ``x . mean of keys``; only the experts train the keys."""

    name = "avg_k"
    config_class = AvgKConfig
    host_syncs = "once, before the first training pass, to learn whether the experts differ"
    compile_unsupported_reason = (
        "its first training pass reads whether the experts differ. Run one before compiling"
    )

    def create_parameters(self) -> None:
        """Registers nothing: the experts' weights are the gates."""
        # A plain attribute would make the experts a submodule, which is saved and trained twice.
        self._attached: tuple[Experts, ...] = ()
        self._differ = False

    @property
    def weights_sum_to_one(self) -> bool:
        """True if weights are a softmax, or the only expert weighs 1."""
        return self.config.weights == "softmax" or self.top_k == 1

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Does nothing: there are no parameters."""
        return

    def attach(self, experts: Experts) -> None:
        """Keeps the experts whose keys it reads; warns if they are all the same."""
        self._attached, self._differ = (experts,), False
        # Experts with deferred weights are compared in the first training pass.
        if not experts.w_up_EUD.is_meta and self._are_same(self.mean_keys()):
            _LOG.warning("router=%s: %s. Training will be refused. %s", self.name, _RULE, _REMEDY)

    @torch.no_grad()
    def mean_keys(self) -> Tensor:
        """Returns ``[E, D]``: the mean of each expert's gate rows (of its up rows, if it is not gated)."""
        assert len(self._attached) == 1, "call attach() before routing: the experts' weights are the gates"
        (experts,) = self._attached
        w_up_EUD = experts.w_up_EUD
        keys_EFD = w_up_EUD.chunk(2, dim=1)[0] if experts.gated else w_up_EUD
        keys_ED = keys_EFD.mean(1, dtype=torch.promote_types(keys_EFD.dtype, torch.float32))
        return F.normalize(keys_ED, dim=-1) if self.config.normalise else keys_ED

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Routes by the present keys.

        Raises:
            ConfigError: Training would begin with experts that are all the same.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            keys_ED = self.mean_keys()
            if self.training and not self._differ:
                self._refuse_same(keys_ED)
            dtype = torch.promote_types(x_TD.dtype, keys_ED.dtype)
            logits_TE = x_TD.to(dtype) @ keys_ED.to(dtype).t()
            top_TK, ids_TK = logits_TE.topk(self.top_k, dim=-1)
            weights_TK = top_TK.softmax(-1) if self.config.weights == "softmax" else torch.ones_like(top_TK)
        return Routing(
            ids_TK, weights_TK, self.num_experts, scores_TE=logits_TE.softmax(-1), logits_TE=logits_TE
        )

    def _are_same(self, keys_ED: Tensor) -> bool:
        return self.num_experts > 1 and bool((keys_ED == keys_ED[:1]).all())

    def _refuse_same(self, keys_ED: Tensor) -> None:
        if self._are_same(keys_ED):
            raise ConfigError.one("router.name", self.name, _RULE, _REMEDY)
        # Experts that differ stay different. The host waits for the answer, so it is read once.
        self._differ = True
