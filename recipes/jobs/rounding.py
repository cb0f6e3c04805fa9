"""Measures what the dtype of an export costs: losses, expert choices, and changes that do not survive.

Letters: B samples, S sequence length, V vocabulary, T tokens, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moe.errors import GraftError
from moe.upcycle.equivalence import logit_drift
from recipes.checkpoint.shard_layout import place
from recipes.models.export.placement import Placement
from recipes.models.hf.state_dict_map import StateDictMap
from recipes.upcycling.sharded.mixture_model import MixtureWeights
from recipes.upcycling.sharded.upcycled_weights import UpcycledWeights

if TYPE_CHECKING:
    from moe.types import Routing
    from recipes.models.export import Exporter
    from recipes.models.export.spec import ModelSpec
    from recipes.models.families.source_mixture import SourceMixture
    from recipes.models.hf.deferred_init import WeightSource
    from recipes.models.hf.hf_model import HFModel
    from recipes.runtime.safetensors_codec import TensorSpec
    from recipes.upcycling.convert.moe_plan import MoEPlan, StoredModel

# Of the weights that training changed, at least so many should still be others in the files.
_MOST = 0.5


@dataclass(frozen=True)
class Survival:
    """Count of the changes of a training that rounding leaves.

    Attributes:
        changed: Weights whose fp32 value is not that of step 0.
        survived: Share of them that are still others than at step 0 once both are rounded; None for none.
        left_out: Reason why some or all weights were not compared; None where all were.
    """

    changed: int
    survived: float | None
    left_out: str | None = None

    def words(self) -> str:
        """Returns a clause for people."""
        besides = "" if self.left_out is None else f" ({self.left_out})"
        if self.survived is None:
            return f"no weights that training changed were found{besides}"
        return f"{self.survived:.1%} of the {self.changed:,} weights that training changed survive{besides}"


@dataclass(frozen=True)
class RoundingCost:
    """Cost of a dtype of files with fewer bits than the trained weights.

    Attributes:
        dtype: The dtype.
        kl: Mean KL divergence of the rounded from the trained model's predictions, in nats a token.
        loss_trained: Loss of the trained model on the tokens of the check, in fp32.
        loss_rounded: Loss of the rounded model on the same tokens.
        choices_changed: Share of expert choices that are others after rounding.
        survival: What is left of the training.
    """

    dtype: str
    kl: float
    loss_trained: float
    loss_rounded: float
    choices_changed: float
    survival: Survival

    @property
    def loses_most(self) -> bool:
        """Tells whether rounding undoes most of the training."""
        return self.survival.survived is not None and self.survival.survived < _MOST

    def row(self) -> dict[str, Any]:
        """Returns the figures for programs."""
        return asdict(self)

    def words(self, option: str, text: str = "the tokens of the check") -> str:
        """Returns a sentence for people.

        Args:
            option: Option that keeps what was trained, the remedy.
            text: What the losses are of.
        """
        lost = "most of what was trained is lost; " if self.loses_most else ""
        return (
            f"the files hold {self.dtype}: {lost}{self.survival.words()}; rounding moves the loss from "
            f"{self.loss_trained:.4f} to {self.loss_rounded:.4f} on {text} (KL {self.kl:.1e}, "
            f"{self.choices_changed:.1%} of expert choices change); {option} keeps what was trained"
        )


class Start(Protocol):
    """Weights of a model before its first step."""

    def read(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Returns a tensor in fp32; None for one that is not known."""


class MixtureStart:
    """Weights of a mixture before its first step: those of its files."""

    def __init__(self, mixture: SourceMixture) -> None:
        """Reads nothing yet."""
        self._weights = MixtureWeights(mixture)
        self._live = StateDictMap(mixture.spec)
        self._routers = {moe.index: moe.router for moe in mixture.spec.moe_blocks}
        self._state = mixture.names.state

    def read(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """See `Start.read`."""
        if router := self._live.router(name):
            tensor: Tensor = self._routers[router.layer].state_dict()[router.key]
            return tensor.float()
        if self._live.pieces(name) is None and name not in self._state:
            return None
        return _filled(self._weights, name, shape)


class StepZero:
    """Weights of a model before its first step, made again from the dense files one tensor at a time."""

    def __init__(self, model: StoredModel, plan: MoEPlan | None = None, *, routers: bool = True) -> None:
        """Reads nothing yet.

        Args:
            model: The dense checkpoints.
            plan: What became of them; None for the dense model itself.
            routers: Whether the plan's routers are those that the run began with.
        """
        self._state = model.names.state
        self._weights = UpcycledWeights(model, plan)
        self._plan = plan
        self._live = None if plan is None else StateDictMap(plan.spec)
        self._routers = routers

    def read(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Makes a tensor in fp32; None for one that the dense files and the plan do not say."""
        if self._live is None or self._plan is None:
            return self._fill(name, shape) if name in self._state else None
        if router := self._live.router(name):
            state = self._plan.routers[router.layer].state_dict()
            return state[router.key].float() if self._routers else None
        parts = self._live.pieces(name)
        scaled = self._plan.method.aligns_outputs and any(part.piece.matrix == "down" for part in parts or ())
        return None if scaled or (parts is None and name not in self._state) else self._fill(name, shape)

    def _fill(self, name: str, shape: Sequence[int]) -> Tensor:
        return _filled(self._weights, name, shape)


def _filled(weights: WeightSource, name: str, shape: Sequence[int]) -> Tensor:
    tensor = torch.empty(tuple(shape))
    weights.fill({name: place(name, tensor)})
    return tensor


class SurvivalCount:
    """Counts, tensor by tensor, what rounding leaves of a training."""

    def __init__(self, begin: Callable[[], Start]) -> None:
        """Counts nothing yet.

        Args:
            begin: Opens the weights at step 0, once they are needed.
        """
        self._begin = begin
        self._start: Start | None = None
        self._changed = self._survived = 0
        self._left_out: list[str] = []
        self._reason: str | None = None

    def see(self, name: str, trained: Tensor, rounded: Tensor, dtype: torch.dtype) -> None:
        """Counts a tensor, as it was trained and as the files have it."""
        if not trained.is_floating_point() or self._reason is not None:
            return
        try:
            self._start = self._start or self._begin()
            begun = self._start.read(name, trained.shape)
        except (GraftError, OSError) as error:
            self._reason = f"the dense model cannot be read any more: {str(error).splitlines()[0]}"
            return
        if begun is None:
            self._left_out.append(name)
            return
        moved = trained.cpu() != begun
        kept = moved & (rounded.cpu() != begun.to(dtype).to(rounded.dtype))
        self._changed += int(moved.sum())
        self._survived += int(kept.sum())

    def result(self) -> Survival:
        """Returns the counts."""
        reason = self._reason
        if reason is None and self._left_out:
            reason = (
                f"without {len(self._left_out)} tensors whose start is not known, {self._left_out[0]} first"
            )
        return Survival(self._changed, self._survived / self._changed if self._changed else None, reason)


def written_dtypes(
    spec: ModelSpec, kept: Sequence[TensorSpec], exporter: Exporter, dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Returns the dtype that each tensor of a model has in the files of a format."""
    live = StateDictMap(spec)
    placement = Placement(spec, exporter, kept, dtype)
    written = {tensor.name: tensor.dtype for tensor in placement.specs}
    found = {tensor.name: written[placement.kept(tensor.name)] for tensor in kept}
    for name in live.names():
        router, parts = live.router(name), live.pieces(name)
        place = placement.router(router.layer, router.key) if router else placement.slot(parts[0].piece).name
        if place is not None:
            found[name] = written[place]
    return found


def loses_bits(dtypes: Collection[torch.dtype]) -> bool:
    """Tells whether fp32 weights lose bits in files of some dtypes."""
    return any(kind.is_floating_point and kind.itemsize < 4 for kind in dtypes)


def rounded(
    tensors: Iterator[tuple[str, Tensor]],
    dtypes: Mapping[str, torch.dtype],
    count: SurvivalCount | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Rounds tensors as the files of an export do, and counts what that leaves."""
    for name, tensor in tensors:
        dtype = dtypes.get(name, tensor.dtype)
        value = tensor.to(dtype).to(tensor.dtype)
        if count is not None:
            count.see(name, tensor, value, dtype)
        yield name, value


def rounding_cost(
    dtype: torch.dtype,
    trained: tuple[Tensor, list[Tensor]],
    rounded: tuple[Tensor, list[Tensor]],
    tokens_BS: Tensor,
    survival: Survival,
) -> RoundingCost:
    """Compares logits and choices, as `run_model` returns them, before and after rounding."""
    (ours, our_choices), (theirs, their_choices) = trained, rounded
    kept = [_kept(mine, other) for mine, other in zip(our_choices, their_choices, strict=True)]
    return RoundingCost(
        str(dtype).removeprefix("torch."),
        logit_drift(ours, theirs).kl,
        _loss(ours, tokens_BS),
        _loss(theirs, tokens_BS),
        1 - sum(kept) / len(kept) if kept else 0.0,
        survival,
    )


def run_model(model: HFModel, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns logits in fp32 on the CPU, and the experts chosen in each layer."""
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
    return float((ours_TK[:, :, None] == theirs_TK[:, None, :]).any(-1).float().mean())


def _loss(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    logits_TV, targets_T = logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten().cpu()
    return float(functional.cross_entropy(logits_TV, targets_T))
