"""Scaling law of Hoffmann et al. (arXiv 2203.15556, eq. 10), also of later papers at fixed sparsity."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moe.scaling_laws.base import Law, Parameter, Preset, log_sum

# m, mu, n, nu of arXiv 2502.05172, table 4, by number of experts; c is the same for all.
_JOINT_TABLE_4 = {
    1: (30.3640, -0.1817, 53.9838, -0.1965),
    2: (27.7982, -0.1780, 66.8401, -0.2065),
    4: (24.8462, -0.1731, 87.7022, -0.2192),
    8: (21.8330, -0.1676, 119.9126, -0.2338),
    16: (19.0159, -0.1617, 167.5073, -0.2494),
    32: (16.5424, -0.1557, 234.6726, -0.2652),
}
_JOINT_RANGES = {"params": (79e6, 2.7e9), "tokens": (5e8, 8e10)}
# The parts that we could read do not give sizes and tokens of the runs: these are orders of magnitude, from
# the released 1B model (74e9 tokens, then 37e9 upcycled) and the abstract.
_LIEW_RANGES = {"params": (1e7, 1e9), "tokens": (1e9, 1e11)}
_LIEW_MOE_RANGES = {**_LIEW_RANGES, "num_experts": (8.0, 8.0), "top_k": (2.0, 2.0)}
_LIEW = "2502.03009 (Liew et al., ICML 2025), table 2"
_LIEW_CAUTION = "the ranges are ours: the paper's grid was not read; D for A and N for B are swapped there"


def _coefficients(A: float, alpha: float, B: float, beta: float, E: float) -> dict[str, float]:
    return {"A": A, "alpha": alpha, "B": B, "beta": beta, "E": E}


def _joint_presets() -> tuple[Preset, ...]:
    return tuple(
        Preset(
            f"joint-e{experts}",
            f"2502.05172 (Ludziejewski et al.), table 4, E = {experts}",
            _coefficients(m, -mu, n, -nu, 1.3637),
            _JOINT_RANGES,
            "top-1 MoEs on FineWeb-Edu; params are the active ones, both embeddings included",
        )
        for experts, (m, mu, n, nu) in _JOINT_TABLE_4.items()
    )


class Chinchilla(Law):
    """Law of two power laws and a floor, for dense models or MoEs that differ only in size and tokens."""

    name = "chinchilla"
    source = "Hoffmann et al., Training Compute-Optimal Large Language Models, arXiv 2203.15556, eq. 10"
    formula = "L = A / N^alpha + B / D^beta + E"
    inputs = {
        "params": "N; for MoEs the kind of size that you will plan by, the same for all runs",
        "tokens": "D",
    }
    parameters = (
        Parameter("A", "weight of the size term", (1.0, 1e4)),
        Parameter("alpha", "exponent of the size", (0.05, 0.8)),
        Parameter("B", "weight of the data term", (1.0, 1e4)),
        Parameter("beta", "exponent of the data", (0.05, 0.8)),
        Parameter("E", "loss that no size or data removes", (0.1, 3.0)),
    )
    presets = (
        Preset(
            "hoffmann-2022",
            "2203.15556, eq. 10, approach 3",
            _coefficients(406.4, 0.34, 410.7, 0.28, 1.69),
            {"params": (44e6, 16e9), "tokens": (5e9, 5e11)},
            "dense, MassiveText",
            "rounded exponents and a fit stopped early: 2404.10102 shows that it misses the paper's own runs",
        ),
        Preset(
            "besiroglu-2024",
            "2404.10102 (Besiroglu et al.), refit of 240 runs read off the figures of 2203.15556",
            _coefficients(482.01, 0.3478, 2085.43, 0.3658, 1.8172),
            {"params": (44e6, 16e9), "tokens": (5e9, 5e11)},
            "dense, MassiveText",
            "standard errors in the paper: A 124.58, B 1293.23, E 0.03, alpha 0.02, beta 0.02",
        ),
        Preset(
            "krajewski-2024-dense",
            "2402.07871 (Krajewski et al.), the dense law",
            _coefficients(16.3, 0.126, 26.7, 0.127, 0.47),
            {},
            "dense, C4; params are those outside of the embeddings",
            "the range of the dense runs was not read",
        ),
        Preset(
            "liew-2025-dense",
            f"{_LIEW}, row dense",
            _coefficients(12.3, 0.116, 8.83, 0.088, 0.165),
            _LIEW_RANGES,
            "dense, SlimPajama",
            _LIEW_CAUTION,
        ),
        Preset(
            "liew-2025-moe",
            f"{_LIEW}, row MoE",
            _coefficients(7.05, 0.080, 32.0, 0.161, 0.165),
            _LIEW_MOE_RANGES,
            "8 experts, top-2, from scratch, SlimPajama; params are those of the DENSE model of its shape",
            _LIEW_CAUTION,
        ),
        *_joint_presets(),
    )

    def log_loss(self, p: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> Tensor:
        """See `Law.log_loss`."""
        size = p["A"].log() - p["alpha"] * x["params"].log()
        data = p["B"].log() - p["beta"] * x["tokens"].log()
        return log_sum([size, data, p["E"].log()])
