"""Family of mixtures: how a class of transformers routes, and what its tensors are called on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from moe.routers.configs import RouterConfig
from moe.routers.configs.deepseek_v3_config import DeepSeekV3Config
from moe.routers.configs.topk_config import TopKConfig
from moe.upcycle.dense_shape import Matrix

_Order = Literal["score_then_topk", "topk_then_score"]


class MoEFamily(ABC):
    """Family of mixtures of transformers. It is found by being defined in a module of this package.

    Names on disk are below that of the block, such as ``model.layers.3``.

    Attributes:
        name: Its ``model_type`` in ``config.json``.
        title: Name in messages.
        block_class: Class of transformers whose modules are its MoE layers.
        stored_site: Name on disk of an MoE layer below its block.
        matrices: Names on disk of a routed expert's gate, up and down projection, below ``experts.E``.
        fused: Names on disk of all experts' gate and up, and down projections where they are stacked,
            ``[E, 2F, D]`` and ``[E, D, F]``, below the MoE layer.
        router_keys: Key in the state of Graft's router -> name on disk, below the MoE layer.
        shared: Name of the shared expert, in the module and on disk; empty if there is none.
        shared_gate: Name on disk of the row that scales the shared expert's output; empty if there is none.
        fp32: Ends of names on disk whose tensors stay fp32 in files of any dtype.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    block_class: ClassVar[str]
    stored_site: ClassVar[str] = "mlp"
    matrices: ClassVar[Mapping[Matrix, str]] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    fused: ClassVar[tuple[str, str]] = ("experts.gate_up_proj", "experts.down_proj")
    router_keys: ClassVar[Mapping[str, str]] = {"weight_ED": "gate.weight"}
    shared: ClassVar[str] = ""
    shared_gate: ClassVar[str] = ""
    fp32: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def router(self, config: Any, layers: int) -> RouterConfig:
        """Returns the router that computes exactly what the class of transformers does.

        Args:
            config: transformers' config of the model, with its defaults.
            layers: Number of its MoE layers.

        Raises:
            FieldError: Graft's router has no such form.
        """

    def left_out(self, config: Any) -> list[str]:
        """Lists, as clauses, what the class does in training alone and Graft does not."""
        noise = getattr(config, "router_jitter_noise", 0.0)
        return [f"its router's inputs get no jitter (router_jitter_noise={noise})"] if noise else []


def softmax_top_k(
    config: Any,
    layers: int,
    *,
    renormalise: bool,
    order: _Order = "score_then_topk",
) -> TopKConfig:
    """Returns a top-k router over a softmax, with the balance loss that the config asks for.

    transformers pools the layers' loads: its loss counts choices per token, which sum to K and not to 1, and
    takes the mean over L layers. Of each layer alone, K / L times the coefficient has the same gradient.

    Args:
        config: transformers' config.
        layers: L, the number of MoE layers.
        renormalise: Whether a token's weights are divided by their sum.
        order: See `TopKConfig.order`.
    """
    K = config.num_experts_per_tok
    coef = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) * K / layers
    return TopKConfig(top_k=K, renormalise=renormalise, order=order, balance_coef=coef)


def grouped_sigmoid(config: Any) -> DeepSeekV3Config:
    """Returns DeepSeek-V3's router, with its own balance loss and update of the bias (arXiv 2412.19437).

    Args:
        config: transformers' config.
    """
    return DeepSeekV3Config(
        top_k=config.num_experts_per_tok,
        renormalise=config.norm_topk_prob,
        routed_scaling=float(config.routed_scaling_factor),
        num_groups=config.n_group,
        top_groups=config.topk_group,
    )
