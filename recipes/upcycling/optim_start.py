"""Starts the optimizer of copied experts with the state of the dense model's own training.

Each expert begins with the moments of the network that it copies, every other parameter with its own, and the
routers with none. Sparse Upcycling (arXiv 2212.05055, appendix B.6) found that it helps in vision and changes
nothing in language. An expert then sees K/E of the tokens, so that second moments are too large for about
``1 / (1 - beta_2)`` steps, which makes the first steps smaller.

Letters: D model width, E experts, F width of the network, U = 2F when gated, else F.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import CheckpointError, Mistake, UserError
from recipes.checkpoint import GlobalTensor, global_shape
from recipes.checkpoint.manifest import read_manifest
from recipes.checkpoint.reader import CheckpointTensors, open_checkpoint
from recipes.checkpoint.shard_layout import place
from recipes.config.schema import RunConfig
from recipes.models.export.spec import ModelSpec
from recipes.models.hf.ffn_names import MatrixName, ModelNames, read_names
from recipes.models.hf.state_dict_map import StateDictMap, StateDictPiece

PATH = "optim.start_from"
_STATE, _WEIGHTS = "optim.", "model."
_SHOWN = 3
# Weights that were rounded to bf16 on the way differ by this much at most.
_ROUNDED = 2.0**-7


def check_optim_start(config: RunConfig) -> list[Mistake]:
    """Checks that the checkpoint with that state is there."""
    given = config.optim.start_from
    if given is None:
        return []
    try:
        read_manifest(Path(given).expanduser())
    except UserError as error:
        remedy = "Give a folder such as outputs/RUN/cpt/checkpoints/step-00000600."
        return [Mistake(PATH, given, f"{each.rule} ({each.path})", remedy) for each in error.mistakes]
    return []


def start_optimizer(
    tensors: Mapping[str, GlobalTensor],
    spec: ModelSpec,
    dense: Path,
    given: Path,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Fills the optimizer state of an MoE model of copies in place; each rank reads what it holds.

    Args:
        tensors: Weights and optimizer state of this rank under global names, see
            `recipes.engines.TrainModule.checkpoint_tensors`. The weights are the MoE model's already.
        spec: Shape of the MoE model.
        dense: Folder of the dense model.
        given: Folder of the checkpoint that its training has left.
        trust_remote_code: Whether the dense model may run its own code.

    Returns:
        Optimizer steps that the dense model's training had done.

    Raises:
        CheckpointError: The checkpoint lacks state of a parameter, was left by another optimizer, or is of
            another model.
    """
    with open_checkpoint(given) as files:
        state = DenseState(files, read_names(dense, trust_remote_code=trust_remote_code), spec)
        wanted = [name for name in tensors if name.startswith(_STATE)]
        lost = sorted(name for name in wanted if not state.is_new(name) and not state.has(name))
        if lost:
            rule = f"it lacks {len(lost)} tensors of this optimizer, such as {', '.join(lost[:_SHOWN])}"
            remedy = "Give a checkpoint of this dense model that the same optimizer has left."
            raise CheckpointError.one(PATH, str(given), rule, remedy)
        _check_same(tensors, state, given)
        for name in wanted:
            if not state.is_new(name):
                _fill(name, tensors[name], state)
        return files.step


@torch.no_grad()
def _fill(name: str, value: GlobalTensor, state: DenseState) -> None:
    whole = state.read(name)
    for piece in place(name, value).pieces:
        box = tuple(slice(o, o + s) for o, s in zip(piece.box.offset, piece.box.size, strict=True))
        piece.tensor.copy_(whole[box])


def _check_same(tensors: Mapping[str, GlobalTensor], state: DenseState, given: Path) -> None:
    """Checks that the weights beside the moments are the MoE model's, by the first box of each."""
    for name, value in tensors.items():
        if not name.startswith(_WEIGHTS) or state.is_new(name) or not state.has(name):
            continue
        whole = state.read(name)
        if tuple(whole.shape) != global_shape(value):
            rule = f"its {name} is {tuple(whole.shape)}, here it is {global_shape(value)}"
            raise CheckpointError.one(PATH, str(given), rule, "Give the checkpoint of this dense model.")
        for piece in place(name, value).pieces[:1]:
            box = tuple(slice(o, o + s) for o, s in zip(piece.box.offset, piece.box.size, strict=True))
            theirs = whole[box].to(piece.tensor)
            if (theirs - piece.tensor).norm() > _ROUNDED * theirs.norm():
                rule = f"its {name} is not that of the dense model: its moments are of other weights"
                remedy = "Export that very checkpoint: python -m tools.export RUN --stage cpt --step N."
                raise CheckpointError.one(PATH, str(given), rule, remedy)


class DenseState:
    """Tensors of a dense training, by their names in the MoE model of its copies."""

    def __init__(self, files: CheckpointTensors, names: ModelNames, spec: ModelSpec) -> None:
        self._files = files
        self._there = set(files.names(""))
        self._networks = {network.layer: network for network in names.ffns}
        self._live = StateDictMap(spec)

    def is_new(self, name: str) -> bool:
        """Tells if a tensor is a router's, which no dense model has."""
        return self._live.router(_parameter(name)) is not None

    def has(self, name: str) -> bool:
        """Tells if all parts of a tensor are there."""
        return all(source in self._there for source in self._sources(name))

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor; that of experts is a view that repeats one network E times."""
        pieces = self._live.pieces(_parameter(name))
        if pieces is None:
            return self._files.read(name)
        one = [piece for piece in pieces if piece.expert == pieces[0].expert]
        if _is_scalar(name):
            return self._files.read(self._sources(name)[0])
        parts = [self._part(name, piece) for piece in sorted(one, key=lambda piece: piece.rows.start or 0)]
        joined, experts = torch.cat(parts), {piece.expert for piece in pieces}
        return joined if None in experts else joined.expand(len(experts), *joined.shape)

    def _sources(self, name: str) -> list[str]:
        pieces = self._live.pieces(_parameter(name))
        if pieces is None:
            return [name]
        return sorted({_renamed(name, self._place(piece).tensor) for piece in pieces})

    def _place(self, live: StateDictPiece) -> MatrixName:
        network, piece = self._networks[live.piece.layer], live.piece
        return (network.biases if piece.bias else network.matrices)[piece.matrix]

    def _part(self, name: str, live: StateDictPiece) -> Tensor:
        """Reads one matrix ``[out, in]`` or bias ``[out]``."""
        where = self._place(live)
        whole = self._files.read(_renamed(name, where.tensor))
        part, number = where.part
        run = len(whole) // number
        whole = whole[part * run : (part + 1) * run]
        return whole.t() if where.transposed else whole


def _parameter(name: str) -> str:
    """Returns NAME of ``model.NAME`` or ``optim.NAME.KEY``."""
    if name.startswith(_STATE):
        return name.removeprefix(_STATE).rpartition(".")[0]
    return name.removeprefix(_WEIGHTS)


def _renamed(name: str, parameter: str) -> str:
    if name.startswith(_STATE):
        return f"{_STATE}{parameter}.{name.rpartition('.')[2]}"
    return f"{_WEIGHTS}{parameter}"


def _is_scalar(name: str) -> bool:
    return name.startswith(_STATE) and name.rpartition(".")[2] == "step"
