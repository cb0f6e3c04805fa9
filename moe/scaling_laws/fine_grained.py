"""Scaling law of fine-grained MoEs, Krajewski, Ludziejewski et al. (arXiv 2402.07871)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.scaling_laws.base import Law, Parameter, Preset, log_sum


class FineGrained(Law):
    """Law of Chinchilla's form with a size term that falls with granularity, at a fixed expansion rate."""

    name = "fine_grained"
    source = "Krajewski, Ludziejewski et al., Scaling Laws for Fine-Grained MoE, arXiv 2402.07871, eq. 9"
    formula = "L = (g / G^gamma + a) / N^alpha + b / D^beta + c"
    inputs = {
        "active_params": "N: active, outside of the embeddings",
        "tokens": "D",
        "granularity": "G",
    }
    parameters = (
        Parameter("a", "weight of the size term at infinite granularity", (1.0, 1e3)),
        Parameter("alpha", "exponent of the size", (0.05, 0.5)),
        Parameter("b", "weight of the data term", (1.0, 1e3)),
        Parameter("beta", "exponent of the data", (0.05, 0.5)),
        Parameter("g", "weight of the granularity", (0.1, 30.0)),
        Parameter("gamma", "exponent of the granularity", (0.1, 2.0)),
        Parameter("c", "loss that nothing removes", (0.1, 2.0)),
    )
    presets = (
        Preset(
            "krajewski-2024",
            "2402.07871, the fit at expansion 64 (RMSE .015)",
            {"a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147, "g": 2.1, "gamma": 0.58, "c": 0.47},
            {"granularity": (1.0, 16.0)},
            "64 times as many expert parameters as dense, C4",
            "the ranges of N and D were not read; at other expansion rates it says nothing",
        ),
    )

    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """See `Law.log_loss`."""
        shrink = -p["alpha"] * x["active_params"].log()
        fine = p["g"].log() - p["gamma"] * x["granularity"].log() + shrink
        data = p["b"].log() - p["beta"] * x["tokens"].log()
        return log_sum([fine, p["a"].log() + shrink, data, p["c"].log()])
