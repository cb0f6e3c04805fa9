"""Apple's scaling law of parameters against FLOPs, Abnar et al. (arXiv 2501.12370, eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.scaling_laws.base import Law, Parameter, Preset, log_sum


class Apple(Law):
    """Law of Chinchilla's form in all parameters, with two terms in which sparsity helps and hurts."""

    name = "apple"
    source = "Abnar et al., Parameters vs FLOPs, arXiv 2501.12370, eq. 6 and table 3"
    formula = "L = a / N^alpha + b / D^beta + c / (1-S)^lambda + d / ((1-S)^delta N^gamma) + e"
    inputs = {"params": "N: all parameters", "tokens": "D", "sparsity": "S = 1 - K / E"}
    parameters = (
        Parameter("a", "weight of the size term", (1e2, 1e6)),
        Parameter("alpha", "exponent of the size", (0.2, 1.0)),
        Parameter("b", "weight of the data term", (1e2, 1e5)),
        Parameter("beta", "exponent of the data", (0.2, 0.8)),
        Parameter("c", "weight of the sparsity term", (0.05, 3.0)),
        Parameter("lambda", "exponent of the active share; negative: sparsity helps", (-0.6, 0.2), None),
        Parameter("d", "weight of the term of sparsity and size", (1.0, 100.0)),
        Parameter("delta", "exponent of the active share in it", (0.02, 0.6), None),
        Parameter("gamma", "exponent of the size in it", (0.02, 0.6)),
        Parameter("e", "loss that nothing removes", (0.1, 2.5)),
    )
    presets = (
        Preset(
            "abnar-2025",
            "2501.12370, table 3",
            {
                "a": 16612.50,
                "alpha": 0.5962,
                "b": 5455.67,
                "beta": 0.3954,
                "c": 0.4598,
                "lambda": -0.1666,
                "d": 17.26,
                "delta": 0.1603,
                "gamma": 0.1595,
                "e": 0.94,
            },
            {"sparsity": (0.0, 0.98)},
            "3e19 to 1e21 FLOPs, RedPajama, whole experts, none shared",
            "the ranges of N and D were not read: compare 6 N (1-S) D with 3e19 to 1e21; R2 is 99 % on the "
            "fitted runs, 68 % on the held-out S = .98; at equal loss sparser models read worse",
        ),
    )

    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """See `Law.log_loss`."""
        active, size = (-x["sparsity"]).log1p(), x["params"].log()
        terms = [
            p["a"].log() - p["alpha"] * size,
            p["b"].log() - p["beta"] * x["tokens"].log(),
            p["c"].log() - p["lambda"] * active,
            p["d"].log() - p["delta"] * active - p["gamma"] * size,
            p["e"].log(),
        ]
        return log_sum(terms)
