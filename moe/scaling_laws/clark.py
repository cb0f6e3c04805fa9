"""Scaling law of Clark et al. (arXiv 2202.01169): loss by size and experts, at a fixed token count."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from moe.scaling_laws.base import Law, Parameter, Preset, effective_experts

# Converts the paper's logarithms, which are to base 10.
_LN10 = math.log(10.0)
_RANGES = {"active_params": (15e6, 1.3e9), "num_experts": (1.0, 512.0)}


def _preset(name: str, values: tuple[float, float, float, float, float, float]) -> Preset:
    names = ("a", "b", "c", "d", "E_start", "E_max")
    return Preset(
        name,
        "2202.01169, table 3",
        dict(zip(names, values, strict=True)),
        _RANGES,
        "130e9 tokens of MassiveText, one expert a token in every other layer",
        "says nothing about other token counts: the more tokens, the more experts are worth",
    )


class Clark(Law):
    """Law that is bilinear in the logarithms of size and of experts, whose number saturates at both ends."""

    name = "clark"
    source = "Clark et al., Unified Scaling Laws for Routed Language Models, arXiv 2202.01169, eq. 1 and 7"
    formula = "log10 L = a log10 N + b log10 Ehat + c log10 N log10 Ehat + d"
    inputs = {
        "active_params": "N: parameters of the dense model that a token meets",
        "num_experts": "E, 1 for dense",
    }
    parameters = (
        Parameter("a", "exponent of the size", (-0.3, 0.0), None),
        Parameter("b", "exponent of the experts", (-0.4, 0.0), None),
        Parameter("c", "how experts lose their worth with size", (-0.03, 0.03), None),
        Parameter("d", "log10 of the loss at N = Ehat = 1", (0.0, 3.0), None),
        Parameter("E_start", "effective experts of a dense model", (0.3, 4.0), 1.0),
        Parameter("E_max", "effective experts at most", (50.0, 1000.0), "E_start"),
    )
    presets = (
        _preset("s-base", (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478)),
        _preset("rl-r", (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982)),
        _preset("hash", (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741)),
    )

    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """See `Law.log_loss`."""
        size = x["active_params"].log10()
        experts = effective_experts(x["num_experts"], p["E_start"], p["E_max"]).log10()
        return _LN10 * (p["a"] * size + p["b"] * experts + p["c"] * size * experts + p["d"])
