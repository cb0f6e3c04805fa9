"""Reference of an export: the trained weights in the files' dtypes, run in fp32 on any engine.

Engines compute in bf16 at will, and files may hold fewer bits than what was trained. The check of an export
is about neither, so both are taken out of it; what the files' dtype costs is measured apart.

Letters: B samples, S sequence length, V vocabulary, T tokens, K experts a token.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from moe.upcycle.equivalence import logit_drift
from recipes.models.export.placement import Placement
from recipes.models.export.spec import describe_model
from recipes.models.hf.deferred_init import refill
from recipes.models.hf.state_dict_map import StateDictMap, kept_specs
from recipes.models.lora_model import factors_of, model_lora, without_factors

if TYPE_CHECKING:
    from moe.types import Routing
    from recipes.engines import Engine, TrainModule
    from recipes.models.export import Exporter
    from recipes.models.hf.hf_model import HFModel


@dataclass(frozen=True)
class RoundingCost:
    """Cost of a dtype of files with fewer bits than the trained weights.

    Attributes:
        dtype: The dtype.
        kl: Mean KL divergence of the rounded from the trained model's predictions, in nats a token.
        loss_trained: Loss of the trained model on the tokens of the check, in fp32.
        loss_rounded: Loss of the rounded model on the same tokens.
        choices_changed: Share of expert choices that are others after rounding.
    """

    dtype: str
    kl: float
    loss_trained: float
    loss_rounded: float
    choices_changed: float

    def row(self) -> dict[str, Any]:
        """Returns the figures for ``summary.json``."""
        return asdict(self)

    def words(self) -> str:
        """Returns a sentence for people, with the remedy."""
        return (
            f"the files hold {self.dtype}: rounding the trained weights moves the loss from "
            f"{self.loss_trained:.4f} to {self.loss_rounded:.4f} on the tokens of the check "
            f"(KL {self.kl:.1e}, {self.choices_changed:.1%} of expert choices change); "
            "export.dtype=fp32 keeps what was trained"
        )


@torch.no_grad()
def reference_logits(
    engine: Engine[Any],
    blank: HFModel,
    train_module: TrainModule,
    exporter: Exporter,
    dtype: torch.dtype,
    tokens_BS: Tensor,
) -> tuple[Tensor, RoundingCost | None]:
    """Computes what the export of a trained model must compute. All ranks call it together.

    Args:
        engine: The open engine.
        blank: A model of its shapes with any weights, without low-rank factors; sharded in fp32 and filled.
        train_module: The trained model.
        exporter: The format, which keeps the dtype of some tensors.
        dtype: Dtype of the other tensors in the files.
        tokens_BS: ``[B, S]`` real tokens, the same on all ranks.

    Returns:
        The ``[B, S, V]`` logits in fp32 on the CPU, and what rounding costs; None for files in fp32.
    """
    dtypes = _dtypes(train_module.skeleton, exporter, dtype)
    blank.context.step = train_module.model.context.step
    engine.shard_for_eval(blank)
    refill(blank.module, _merged(train_module))
    trained, choices = _run(blank, tokens_BS.to(engine.device))
    if all(kind in (torch.float32, torch.float64) for kind in dtypes.values() if kind.is_floating_point):
        return trained, None
    refill(blank.module, _rounded(_merged(train_module), dtypes))
    rounded, others = _run(blank, tokens_BS.to(engine.device))
    gc.collect()
    kept = [_kept(ours, theirs) for ours, theirs in zip(choices, others, strict=True)]
    return rounded, RoundingCost(
        str(dtype).removeprefix("torch."),
        logit_drift(trained, rounded).kl,
        _loss(trained, tokens_BS),
        _loss(rounded, tokens_BS),
        1 - sum(kept) / max(1, len(kept)),
    )


def _merged(train_module: TrainModule) -> Iterator[tuple[str, Tensor]]:
    """Yields the trained tensors, with low-rank factors merged into their weights."""
    model = train_module.skeleton
    factors = factors_of(describe_model(model), model_lora(model))
    return without_factors(train_module.full_tensors(), factors, computes=True)


def _dtypes(model: HFModel, exporter: Exporter, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the dtype that each tensor of the model has in the files."""
    spec = describe_model(model)
    live = StateDictMap(spec)
    kept = kept_specs(model, live)
    placement = Placement(spec, exporter, kept, dtype)
    written = {tensor.name: tensor.dtype for tensor in placement.specs}
    found = {tensor.name: written[placement.kept(tensor.name)] for tensor in kept}
    for name in live.names():
        router, parts = live.router(name), live.pieces(name)
        place = placement.router(router.layer, router.key) if router else placement.slot(parts[0].piece).name
        found[name] = written[place]
    return found


def _rounded(
    tensors: Iterator[tuple[str, Tensor]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.to(dtypes.get(name, tensor.dtype)).to(tensor.dtype)


def _run(model: HFModel, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns logits, and the experts chosen in each layer."""
    model.module.eval()
    with _choices(model) as choices:
        logits_BSV = model.module(input_ids=tokens_BS).logits
    return logits_BSV.float().cpu(), choices


@contextmanager
def _choices(model: HFModel) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def keep(module: Any, args: Any, routing: Routing) -> None:
        found.append(routing.expert_ids_TK)

    handles = [layer.router.register_forward_hook(keep) for layer in model.routed_layers()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _kept(ours_TK: Tensor, theirs_TK: Tensor) -> float:
    """Returns the share of choices that are made again."""
    if ours_TK.shape != theirs_TK.shape:
        return 0.0
    return float((ours_TK[:, :, None] == theirs_TK[:, None, :]).any(-1).float().mean())


def _loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    logits_TV, targets_T = logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten().cpu()
    return float(functional.cross_entropy(logits_TV, targets_T))
