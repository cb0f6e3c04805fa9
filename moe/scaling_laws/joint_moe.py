"""Joint scaling law of dense models and MoEs, Ludziejewski et al. (arXiv 2502.05172, eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.scaling_laws.base import Law, Parameter, Preset, effective_experts, log_sum


class JointMoe(Law):
    """Law of Chinchilla's form whose weights and exponents all depend on the number of experts.

    The Greek letters are the exponents themselves, negative where the loss falls: with opposite signs, as
    some secondary sources print them, the loss would rise with experts.
    """

    name = "joint_moe"
    source = "Ludziejewski et al., Joint MoE Scaling Laws, arXiv 2502.05172, eq. 6"
    formula = "L = a Ehat^delta N^(alpha + gamma ln Ehat) + b Ehat^omega D^(beta + zeta ln Ehat) + c"
    inputs = {
        "active_params": "N: active, both embeddings included",
        "tokens": "D",
        "num_experts": "E, 1 for dense",
    }
    parameters = (
        Parameter("a", "weight of the size term", (5.0, 500.0)),
        Parameter("alpha", "exponent of the size", (-0.5, -0.05), None),
        Parameter("delta", "exponent of the experts in the size term", (-0.5, 0.5), None),
        Parameter("gamma", "how the size's exponent moves with ln Ehat", (-0.05, 0.05), None),
        Parameter("b", "weight of the data term", (5.0, 500.0)),
        Parameter("beta", "exponent of the data", (-0.5, -0.05), None),
        Parameter("omega", "exponent of the experts in the data term", (-0.5, 0.5), None),
        Parameter("zeta", "how the data's exponent moves with ln Ehat", (-0.05, 0.05), None),
        Parameter("c", "loss that nothing removes", (0.3, 2.5)),
        Parameter("E_start", "effective experts of a dense model", (0.3, 4.0), 1.0),
        Parameter("E_max", "effective experts at most", (50.0, 1000.0), "E_start"),
    )
    presets = (
        Preset(
            "ludziejewski-2025",
            "2502.05172, table 3 (Huber .01 on the logarithm; RMSE of the logarithm .0062, held out .0039)",
            {
                "a": 35.91,
                "alpha": -0.1889,
                "delta": -0.2285,
                "gamma": 0.0098,
                "b": 35.98,
                "beta": -0.1775,
                "omega": 0.5529,
                "zeta": -0.0259,
                "c": 1.3637,
                "E_start": 2.0732,
                "E_max": 290.4521,
            },
            {
                "active_params": (79e6, 2.7e9),
                "tokens": (5e8, 8e10),
                "num_experts": (1.0, 32.0),
                "top_k": (1.0, 1.0),
            },
            "one expert a token (Switch), every layer an MoE layer, FineWeb-Edu, 280 runs",
            "the paper's table 4 follows from E_start 2.0832, not from the 2.0732 printed in its table 3; "
            "losses differ by less than 0.1 %",
        ),
    )

    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """See `Law.log_loss`."""
        experts = effective_experts(x["num_experts"], p["E_start"], p["E_max"]).log()
        size = p["a"].log() + p["delta"] * experts
        size = size + (p["alpha"] + p["gamma"] * experts) * x["active_params"].log()
        data = p["b"].log() + p["omega"] * experts
        data = data + (p["beta"] + p["zeta"] * experts) * x["tokens"].log()
        return log_sum([size, data, p["c"].log()])
