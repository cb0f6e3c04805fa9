"""Equivalence check at step 0: compares an MoE with the dense network that it was made from.

A method that claims to be exact must match layer by layer and in the logits; for other methods the drift is
reported.

Letters: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import ExactnessError

#: Largest difference allowed for an exact method, relative to the largest value, by dtype of the model.
#: fp32: the bound of the equivalence check; bf16: eight times its rounding step of 2^-8, as errors add up
#: over the layers.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@dataclass(frozen=True)
class LayerDrift:
    """Difference between an MoE layer and its dense network on the same input.

    Attributes:
        layer: Index of the layer in the model.
        relative_error: ``|moe - dense| / |dense|`` (L2 norms over all tokens).
        cosine: Cosine similarity of the two outputs, flattened.
        gain: ``|moe| / |dense|``.
        max_relative: Largest absolute difference over the largest absolute dense output.
    """

    layer: int
    relative_error: float
    cosine: float
    gain: float
    max_relative: float


@dataclass(frozen=True)
class LogitDrift:
    """Difference between the logits of two models on real tokens.

    Attributes:
        max_diff: Largest absolute difference.
        max_logit: Largest absolute dense logit.
        kl: Mean over tokens of KL(dense || moe), in nats.
        argmax_agreement: Share of tokens with the same most likely next token.
    """

    max_diff: float
    max_logit: float
    kl: float
    argmax_agreement: float

    @property
    def relative(self) -> float:
        """``max_diff / max_logit``."""
        return self.max_diff / max(self.max_logit, 1e-30)


#: Mean KL divergence in nats up to which 16-bit models agree. In 16 bits a rounding step in the router's
#: logits can send single tokens to another expert, so that the largest difference means nothing.
MAX_KL = 1e-3


def agree(logits: LogitDrift, dtype: torch.dtype) -> bool:
    """Returns True if two models compute the same function, within the precision of a dtype.

    Args:
        logits: Measured on real tokens.
        dtype: The lower of the models' precisions. 16 bits are judged by `MAX_KL`, others by `TOLERANCES`.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return logits.kl <= MAX_KL
    return logits.relative <= TOLERANCES[dtype]


def layer_drift(layer: int, dense_TD: Tensor, moe_TD: Tensor) -> LayerDrift:
    """Compares a layer's outputs, both ``[..., D]``."""
    dense, moe = dense_TD.double().flatten(), moe_TD.double().flatten()
    difference = moe - dense
    norm = float(dense.norm().clamp_min(1e-30))
    cosine = torch.dot(dense, moe) / (dense.norm() * moe.norm()).clamp_min(1e-30)
    return LayerDrift(
        layer=layer,
        relative_error=float(difference.norm()) / norm,
        cosine=float(cosine),
        gain=float(moe.norm()) / norm,
        max_relative=float(difference.abs().max() / dense.abs().max().clamp_min(1e-30)),
    )


def logit_drift(dense_TV: Tensor, moe_TV: Tensor) -> LogitDrift:
    """Compares logits, both ``[..., V]``."""
    dtype = torch.promote_types(dense_TV.dtype, torch.float32)
    dense, moe = dense_TV.to(dtype), moe_TV.to(dtype)
    log_dense, log_moe = dense.log_softmax(-1), moe.log_softmax(-1)
    kl = (log_dense.exp() * (log_dense - log_moe)).sum(-1).mean()
    return LogitDrift(
        max_diff=float((dense - moe).abs().max()),
        max_logit=float(dense.abs().max()),
        kl=float(kl),
        argmax_agreement=float((dense.argmax(-1) == moe.argmax(-1)).float().mean()),
    )


def require_exact(method: str, logits: LogitDrift, layers: Sequence[LayerDrift], dtype: torch.dtype) -> None:
    """Verifies the claim of a method to be exact.

    Args:
        method: Name of the method, for the message.
        logits: Measured on real tokens.
        layers: Measured on the input of each dense network.
        dtype: Dtype of the compared models.

    Raises:
        ExactnessError: A layer or the logits differ by more than `TOLERANCES`; the message names the
            layers, the worst first.
    """
    tolerance = TOLERANCES[dtype]
    bad = [d for d in layers if not d.max_relative <= tolerance]
    bad.sort(key=lambda d: -math.inf if math.isnan(d.max_relative) else -d.max_relative)
    if not bad and logits.relative <= tolerance:
        return
    where = ", ".join(f"layer {d.layer} (by {d.max_relative:.2e})" for d in bad[:8])
    raise ExactnessError(
        f"upcycling by {method!r} claims to keep the function and does not: logits differ by "
        f"{logits.max_diff:.3e}, {logits.relative:.2e} of the largest logit {logits.max_logit:.3f}, and at "
        f"most {tolerance:.1e} is allowed for {dtype}. "
        + (f"Differing: {where}." if bad else "Each single layer agrees; the model changed elsewhere.")
    )
