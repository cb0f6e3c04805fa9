"""Cost of a router in a whole training step of a small MoE decoder with fixed weights.

Letters: B samples, S sequence length, T tokens, E experts, D model width, F expert width.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.bench.timing import Timing, interleave, median_ratio, summarise
from moe.dispatch.local import LocalDispatcher
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer, moe_layers
from moe.routers.configs import RouterConfig
from moe.routers.configs.ssr_config import SSRConfig
from moe.types import LayerContext, RouterContext
from recipes.studies.benchmarks.moe_tax import StepShape
from recipes.studies.benchmarks.router_candidates import (
    Candidate,
    Shape,
    batch_context,
    make_router,
    router_pass,
)
from recipes.tracking.measure_peaks import synchronise

#: Few large experts and many small ones. How many a token uses is the routers' own.
STEP_SHAPES = (StepShape(8, 2, 512), StepShape(64, 2, 128))
_RESAMPLES = 2000


@dataclass(frozen=True)
class RouterStep:
    """A training step under one router.

    Attributes:
        router: Label.
        seconds: Seconds of forward, backward, AdamW and the router's own update.
        ratio: To the baseline, round by round.
        ratio_interval: 95 % bootstrap interval of the median ratio.
        alone: Seconds of the router's own forward and backward passes, all layers.
        refused: Reason to reject so many experts; all else is None then.
    """

    router: str
    seconds: Timing | None = None
    ratio: Timing | None = None
    ratio_interval: tuple[float, float] | None = None
    alone: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Expected:
    """Mean cost of Selective Sinkhorn Routing, whose rare expensive steps no median shows.

    Attributes:
        router: Label of the router that transports rarely.
        probability: p of transport in a step and layer.
        ratio: Ratio of its mean step to the baseline's: (1 - p) ordinary steps and p transporting ones.
        ratio_by_share: The same if a step changed by what the routers take alone and by nothing else, which
            holds where the experts' load does not change it. By far the steadier one on a busy machine.
    """

    router: str
    probability: float
    ratio: float
    ratio_by_share: float


class Decoder:
    """Llama with MoE layers and its optimizer; weights from fixed seeds."""

    def __init__(self, config: RouterConfig, shape: StepShape, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(5)
        size = (shape.batch_size, shape.seq_len)
        self.tokens_BS = torch.randint(0, shape.vocab_size, size, generator=generator).to(device)
        self.context = batch_context(config, self.tokens_BS, shape.num_experts)
        self.model = _model(config, shape, self.context, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        """Runs one training step, as the training loop does."""
        tokens_BS: Tensor = self.tokens_BS
        logits = self.model(input_ids=tokens_BS, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.context.step += 1
        for _, layer in moe_layers(self.model):
            layer.router.after_optimizer_step(layer.context)
            layer.stats.clear()


def batch_shape(shape: StepShape) -> Shape:
    """Returns the batch as one router sees it."""
    return Shape(shape.batch_size * shape.seq_len, shape.num_experts, shape.hidden_size)


def _model(config: RouterConfig, shape: StepShape, context: RouterContext, device: torch.device) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.top_k * shape.expert_width,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=shape.seq_len,
            use_cache=False,
        )
    )
    generator = torch.Generator().manual_seed(7)
    E, D, F_ = shape.num_experts, shape.hidden_size, shape.expert_width
    for index, block in enumerate(model.model.layers):
        w_up_EUD = torch.randn(E, 2 * F_, D, generator=generator) * D**-0.5
        w_down_EDF = torch.randn(E, D, F_, generator=generator) * F_**-0.5
        experts = Experts(ExpertBank(w_up_EUD, w_down_EDF, "silu", True))
        router = make_router(config, batch_shape(shape), torch.device("cpu"))
        block.mlp = MoELayer(router, LocalDispatcher(), experts, LayerContext(context, index))
    made: nn.Module = model.train().to(device)
    return made


def measure_steps(
    candidates: Sequence[Candidate], shape: StepShape, rounds: int, device: torch.device
) -> list[RouterStep]:
    """Times the training steps of all routers interleaved, then the routers alone, in the same way.

    Args:
        candidates: Routers; the first is the baseline. Solvers are not part of a model and are left out.
        shape: Decoder and batch.
        rounds: Timed rounds.
        device: Where.
    """
    refused = {
        r.label: why for r in candidates if (why := r.unsupported_reason(shape.num_experts)) is not None
    }
    routers = {r.label: r.config for r in candidates if r.config is not None and r.label not in refused}

    def time(made: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        return interleave(made, rounds, synchronise=lambda: synchronise(device))

    steps = time({label: Decoder(config, shape, device).step for label, config in routers.items()})
    batch = batch_shape(shape)
    alone = time({label: router_pass(config, batch, device).run for label, config in routers.items()})
    found = [RouterStep(label, refused=why) for label, why in refused.items()]
    base = next(iter(steps.values()), [])
    for label, values in steps.items():
        routing = shape.num_layers * statistics.median(alone[label])
        interval = bootstrap_interval(values, base)
        found.append(RouterStep(label, summarise(values), median_ratio(values, base), interval, routing))
    return found


def bootstrap_interval(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the median ratio by resampling rounds, with a fixed seed."""
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[round(0.025 * (_RESAMPLES - 1))], medians[round(0.975 * (_RESAMPLES - 1))]


def expected_costs(candidates: Sequence[Candidate], steps: Sequence[RouterStep]) -> list[Expected]:
    """Returns the mean cost of every SSR router whose twin with probability 1 was measured as well."""
    measured = {step.router: step for step in steps if step.ratio is not None}
    twins = {
        candidate.config: measured[candidate.label] for candidate in candidates if candidate.label in measured
    }
    found = []
    for candidate in candidates:
        config, rare = candidate.config, measured.get(candidate.label)
        if not isinstance(config, SSRConfig) or config.probability == 1 or rare is None:
            continue
        always = twins.get(dataclasses.replace(config, probability=1.0))
        if always is not None:
            base = next(iter(measured.values()))
            found.append(_expected(config.probability, rare, always, base))
    return found


def _expected(p: float, rare: RouterStep, always: RouterStep, base: RouterStep) -> Expected:
    """Computes the mean cost; layers draw on their own, which has the same mean as drawing together."""
    ratios, shares = [], []
    for step in (rare, always):
        assert step.ratio is not None and step.alone is not None, step
        ratios.append(step.ratio.median)
        shares.append(step.alone)
    assert base.alone is not None and base.seconds is not None, base
    mean, more = (1 - p) * ratios[0] + p * ratios[1], (1 - p) * shares[0] + p * shares[1] - base.alone
    return Expected(rare.router, p, mean, 1 + more / base.seconds.median)


def verdict(step: RouterStep, bound: float) -> str:
    """Judges a ratio against a bound by the interval of its median."""
    assert step.ratio_interval is not None, step
    low, high = step.ratio_interval
    if high <= bound:
        return "yes"
    return "no" if low > bound else "the interval holds both"


def render_steps(steps: Sequence[RouterStep], expected: Sequence[Expected], bound: float) -> str:
    """Formats the steps as a table, with the mean cost of SSR."""
    width = max(len(step.router) for step in steps)
    head = f"{'ms':>9}{'p10':>9}{'p90':>9}{'x':>8}{'95 % of x':>16}{'p10':>8}{'p90':>8}{'router':>8}"
    lines = [f"  {'':{width}}{head}"]
    for step in steps:
        if step.seconds is None or step.ratio is None or step.ratio_interval is None or step.alone is None:
            lines.append(f"  {step.router:{width}}  refused: {step.refused}.")
            continue
        s, r, (low, high) = step.seconds, step.ratio, step.ratio_interval
        times = "".join(f"{1e3 * value:9.1f}" for value in (s.median, s.p10, s.p90))
        ratios = f"{r.median:8.3f}{f'{low:.3f}-{high:.3f}':>16}{r.p10:8.3f}{r.p90:8.3f}"
        lines.append(f"  {step.router:{width}}{times}{ratios}{step.alone / s.median:8.1%}")
    by_label = {step.router: step for step in steps}
    for mean in expected:
        held = verdict(by_label[mean.router], bound)
        lines.append(
            f"{mean.router}: {mean.ratio:.4f} x {steps[0].router} in the mean ({mean.ratio_by_share:.4f} by "
            f"the routers alone), with {mean.probability:.2%} of steps that transport. "
            f"Ordinary steps within {bound - 1:.0%}: {held}."
        )
    return "\n".join(lines)
