"""Scaling law of upcycling, Liew et al. (arXiv 2502.03009, eq. 12)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.scaling_laws.base import Law, Parameter, Preset, log_sum


class Liew(Law):
    """Law with a product of powers of both token counts, whose exponents interact, and a size term.

    The more tokens the dense model has seen, the less the tokens after the conversion are worth. The form has
    no limit as these go to zero: it does not give the loss of the dense model there.
    """

    name = "liew"
    source = "Liew, Kato, Takase, Scaling Laws for Upcycling MoE Language Models, arXiv 2502.03009, eq. 12"
    formula = "L = A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N1^-beta + E"
    inputs = {"dense_params": "N1", "dense_tokens": "D1", "tokens": "D2: after the conversion"}
    parameters = (
        Parameter("A", "weight of the data term", (1.0, 1e3)),
        Parameter("alpha1", "exponent of the dense tokens", (0.005, 0.3)),
        Parameter("alpha2", "exponent of the upcycled tokens", (0.01, 0.4)),
        Parameter("alpha3", "how dense tokens lower the worth of upcycled ones", (-0.005, 0.01), None),
        Parameter("B", "weight of the size term", (1.0, 1e3)),
        Parameter("beta", "exponent of the size", (0.03, 0.5)),
        Parameter("E", "loss that nothing removes", (0.02, 2.0)),
    )
    presets = (
        Preset(
            "liew-2025",
            "2502.03009, table 2, row upcycled",
            {
                "A": 16.3,
                "alpha1": 0.043,
                "alpha2": 0.085,
                "alpha3": 7.98e-4,
                "B": 8.53,
                "beta": 0.112,
                "E": 0.165,
            },
            {
                "dense_params": (1e7, 1e9),
                "dense_tokens": (1e9, 1e11),
                "tokens": (1e9, 1e11),
                "num_experts": (8.0, 8.0),
                "top_k": (2.0, 2.0),
            },
            "8 experts, top-2, copies of the dense feed-forward network, SlimPajama",
            "natural logarithm inferred (base 10 would make upcycling beat from-scratch at a tenth of its "
            "tokens); ranges are ours, the paper's grid was not read; wrong below about 1e9 tokens",
        ),
    )

    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """See `Law.log_loss`."""
        first, second = x["dense_tokens"].log(), x["tokens"].log()
        data = p["A"].log() - p["alpha1"] * first + (-p["alpha2"] + p["alpha3"] * first) * second
        return log_sum([data, p["B"].log() - p["beta"] * x["dense_params"].log(), p["E"].log()])
