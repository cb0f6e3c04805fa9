"""MoE tax: time of a training step of an MoE over a dense model with the same active parameters.

The models hold the same weights: transformers' own Mixtral, and a Llama whose feed-forward networks are our
layers; their logits are compared before anything is timed. Ours pays for what a training run has on:
balance loss, z-loss and statistics.

Letters: B samples, S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.bench.timing import Timing, interleave, median_ratio, summarise
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.types import LayerContext, RouterContext

# Theirs under each implementation of the experts.
_THEIRS = ("grouped_mm", "eager")


@dataclass(frozen=True)
class StepShape:
    """Shape of an MoE and its batch.

    Attributes:
        num_experts: E.
        top_k: K.
        expert_width: F; the dense model is K times as wide.
        hidden_size: D.
        num_layers: Blocks.
        vocab_size: Vocabulary of embedding and head.
        batch_size: B.
        seq_len: S.
    """

    num_experts: int
    top_k: int
    expert_width: int
    hidden_size: int = 256
    num_layers: int = 4
    vocab_size: int = 2048
    batch_size: int = 8
    seq_len: int = 256

    @property
    def label(self) -> str:
        """Label in tables."""
        return f"{self.num_experts}x top-{self.top_k} F={self.expert_width}"


#: The two shapes of the project's speed goal: few large experts, many small ones.
GOALS = (StepShape(8, 2, 512), StepShape(64, 8, 128))


@dataclass(frozen=True)
class StepResult:
    """Measurements of one model.

    Attributes:
        model: ``dense``, ``graft``, or ``transformers <implementation>``.
        seconds: Seconds of a step.
        tax: Ratio to the dense model, round by round.
        logit_error: Largest difference from transformers' eager logits, relative to the largest; None
            for the dense model, which is another function.
    """

    model: str
    seconds: Timing
    tax: Timing
    logit_error: float | None


def _common(shape: StepShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": shape.seq_len,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_cache": False,
    }


def _dense(shape: StepShape) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=shape.top_k * shape.expert_width, **_common(shape)))


def _mixtral(shape: StepShape, implementation: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        intermediate_size=shape.expert_width,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        **_common(shape),
    )
    config._experts_implementation = implementation
    return MixtralForCausalLM(config)


def _graft(shape: StepShape, theirs: Any, backend: str) -> nn.Module:
    """Builds a Llama with the weights of their Mixtral and our layers."""
    ours: Any = _dense(shape)
    context = RouterContext()
    for index, (block, other) in enumerate(zip(ours.model.layers, theirs.model.layers, strict=True)):
        bank = ExpertBank(
            w_up_EUD=other.mlp.experts.gate_up_proj.detach().clone(),
            w_down_EDF=other.mlp.experts.down_proj.detach().clone(),
            activation="silu",
            gated=True,
        )
        config = TopKConfig(top_k=shape.top_k, balance_coef=0.01, z_coef=0.001)
        router = TopKRouter(config, shape.hidden_size, shape.num_experts)
        router.weight_ED.data.copy_(other.mlp.gate.weight)
        block.mlp = MoELayer(router, LocalDispatcher(), Experts(bank, backend), LayerContext(context, index))
    weights = {k: v for k, v in theirs.state_dict().items() if ".mlp." not in k}
    ours.load_state_dict(weights, strict=False)
    return ours


def _step(
    model: nn.Module, tokens_BS: Tensor, optimizer: torch.optim.Optimizer | None
) -> Callable[[], object]:
    def run() -> None:
        logits = model(input_ids=tokens_BS, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return run


def measure_step(shape: StepShape, rounds: int, backend: str, *, with_optimizer: bool) -> list[StepResult]:
    """Checks that the models compute the same, then times them interleaved.

    Args:
        shape: MoE and batch.
        rounds: Timed rounds.
        backend: Back end of our experts.
        with_optimizer: If True, include a fused AdamW step, which touches all experts.

    Returns:
        The results, the dense model first.
    """
    torch.manual_seed(0)
    tokens_BS = torch.randint(0, shape.vocab_size, (shape.batch_size, shape.seq_len))
    models = {"dense": _dense(shape)}
    reference = _mixtral(shape, "eager")
    models["graft"] = _graft(shape, reference, backend)
    for implementation in _THEIRS:
        model = _mixtral(shape, implementation)
        model.load_state_dict(reference.state_dict())
        models[f"transformers {implementation}"] = model
    errors = _logit_errors(models, reference, tokens_BS)
    steps = {}
    for name, model in models.items():
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if with_optimizer else None
        steps[name] = _step(model, tokens_BS, optimizer)
    seconds = interleave(steps, rounds)
    return [
        StepResult(name, summarise(values), median_ratio(values, seconds["dense"]), errors.get(name))
        for name, values in seconds.items()
    ]


@torch.no_grad()
def _logit_errors(models: dict[str, nn.Module], reference: nn.Module, tokens_BS: Tensor) -> dict[str, float]:
    expected = reference.eval()(input_ids=tokens_BS, use_cache=False).logits
    errors = {}
    for name, model in models.items():
        if name != "dense":
            logits = model.eval()(input_ids=tokens_BS, use_cache=False).logits
            errors[name] = float((logits - expected).abs().max() / expected.abs().max())
            assert errors[name] < 1e-4, f"{name} computes something else: logits differ by {errors[name]:.1e}"
    return errors
