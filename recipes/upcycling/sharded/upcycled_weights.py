"""Makes a rank's part of a model out of dense files: its boxes, and one matrix at a time.

Tensors are made by the same code as the converter's, block of rows by block of rows, so that a weight is the
same bit for bit whichever rank makes it.

Letters: D model width, E experts, F width of the dense network or of an expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe.experts.weights import FFNWeights
from moe.upcycle.dense_shape import Matrix
from moe.upcycle.expert_rows import DenseMatrix, expert_bias, expert_rows
from moe.upcycle.layer_plan import Draws, ExpertPlan
from recipes.checkpoint.shard_layout import Box, Piece, Placed
from recipes.models.hf.deferred_init import WeightSource
from recipes.models.hf.state_dict_map import StateDictMap, StateDictPiece
from recipes.upcycling.convert.conversion_plan import ExpertWork, expert_work
from recipes.upcycling.sharded.align import scale_down

if TYPE_CHECKING:
    from recipes.models.hf.ffn_names import FFNNames, MatrixName
    from recipes.models.safetensors.dense_files import DenseFiles
    from recipes.upcycling.convert.moe_plan import MoEPlan, StoredModel

# Elements that are read of a tensor at a time: 16 MiB in fp32.
_BLOCK_ELEMENTS = 1 << 22
# Layer, dense checkpoint, matrix, whether its bias.
_Key = tuple[int, int, Matrix, bool]


class StoredMatrix(DenseMatrix):
    """Matrix in files, whose rows are read as they are asked for, in fp32 where all are needed."""

    def __init__(self, files: DenseFiles, where: MatrixName, shape: tuple[int, int]) -> None:
        self._files = files
        self._where = where
        self._shape = shape
        self._last: tuple[slice, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self._shape

    def rows(self, rows: slice) -> Tensor:
        """Reads rows in the dtype of the files. Every copy asks for the same ones."""
        if self._last is None or self._last[0] != rows:
            self._last = (rows, self._files.read_rows(self._where, rows))
        return self._last[1]

    @cached_property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Reads the whole matrix in fp32, as a loaded model has it."""
        return self._files.read_matrix(self._where).float()


@dataclass(frozen=True)
class _Target:
    """Part of an expert's matrix or bias that this rank holds.

    Attributes:
        expert: Index; None for the shared expert.
        plan: Plan of the expert.
        rows: Rows of the expert's matrix.
        columns: Columns of the matrix; all of a bias.
        view: The memory.
    """

    expert: int | None
    plan: ExpertPlan
    rows: slice
    columns: slice
    view: Tensor


class UpcycledWeights(WeightSource):
    """Weights of a dense model, or of an MoE model that is made of it, read and made box by box."""

    def __init__(
        self,
        model: StoredModel,
        moe: MoEPlan | None = None,
        gains: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Stores the plan; reads nothing yet.

        Args:
            model: The dense checkpoints.
            moe: What becomes of them; None for the dense model itself.
            gains: Factors of the down projections of MoE layers, see `scale_down`, by block.
        """
        self._model = model
        self._moe = moe
        self._gains = gains
        self._averaged = (0,) if moe is None else moe.method.averaged

    @property
    def buffers(self) -> Collection[str]:
        """See `WeightSource.buffers`."""
        return self._model.names.state

    @torch.no_grad()
    def fill(self, held: Mapping[str, Placed]) -> None:
        """See `WeightSource.fill`."""
        try:
            filled = self._keep(held) + self._make(held)
        finally:
            self._model.close()
        elements = sum(piece.box.numel for placed in held.values() for piece in placed.pieces)
        assert filled == elements, f"{filled} of {elements} elements were filled"

    def _keep(self, held: Mapping[str, Placed]) -> int:
        """Fills the tensors that are carried over; returns the number of elements."""
        filled = 0
        for name, placed in held.items():
            if name in self._model.names.state:
                for piece in placed.pieces:
                    self._read(name, placed.shape, piece)
                    filled += piece.box.numel
        return filled

    def _read(self, name: str, shape: tuple[int, ...], piece: Piece) -> None:
        """Reads a box of a carried tensor, some of its first axis' rows at a time."""
        if not shape:
            piece.tensor.copy_(self._mean(name, 0, 1)[0])
            return
        width = torch.Size(shape[1:]).numel()
        step = max(1, _BLOCK_ELEMENTS // max(1, width))
        first, count = piece.box.offset[0], piece.box.size[0]
        within = piece.box.within(Box((first, *(0 for _ in shape[1:])), (count, *shape[1:])))[1:]
        for start in range(0, count, step):
            stop = min(count, start + step)
            run = self._mean(name, (first + start) * width, (first + stop) * width)
            piece.tensor[start:stop].copy_(run.view(stop - start, *shape[1:])[(slice(None), *within)])

    def _mean(self, name: str, start: int, stop: int) -> Tensor:
        """Reads a range of elements, the mean of all checkpoints that count."""
        model = self._model
        runs = [model.files[s].read_run(model.stored[s][name], start, stop) for s in self._averaged]
        return runs[0] if len(runs) == 1 else torch.stack([run.float() for run in runs]).mean(0)

    def _make(self, held: Mapping[str, Placed]) -> int:
        """Makes this rank's parts of experts, one dense matrix after the other."""
        moe = self._moe
        if moe is None:
            return 0
        targets = _targets(moe, held)
        for work in expert_work(moe.ffns, self._model):
            mine = targets.get((work.ffn.layer, work.source, work.matrix, work.bias), [])
            if mine and work.bias:
                self._make_biases(work, mine)
            elif mine:
                self._make_matrices(work, mine, Draws(moe.request.seed, work.ffn.layer))
        self._scale(moe, held)
        return sum(target.view.numel() for found in targets.values() for target in found)

    def _scale(self, moe: MoEPlan, held: Mapping[str, Placed]) -> None:
        if self._gains is None:
            return
        live = StateDictMap(moe.spec)
        for name, placed in held.items():
            if parts := live.pieces(name):
                scale_down(name, placed, self._gains[parts[0].piece.layer])

    def _make_matrices(self, work: ExpertWork, targets: list[_Target], draws: Draws) -> None:
        F, D = work.ffn.shape.width, work.ffn.shape.model_width
        shape = (D, F) if work.matrix == "down" else (F, D)
        dense = StoredMatrix(self._model.files[work.source], work.where, shape)
        for target in targets:
            generator = draws.of_matrix(target.expert, work.matrix)
            filled = 0
            for row, block in expert_rows(target.plan, work.matrix, dense, generator, target.rows):
                start = row - target.rows.start
                target.view[start : start + len(block)].copy_(block[:, target.columns])
                filled += len(block)
            assert filled == len(target.view), (work.key, target.expert, filled, len(target.view))

    def _make_biases(self, work: ExpertWork, targets: list[_Target]) -> None:
        dense = self._model.files[work.source].read_matrix(work.where).float()
        for target in targets:
            target.view.copy_(expert_bias(target.plan, work.matrix, dense)[target.rows])


def _targets(moe: MoEPlan, held: Mapping[str, Placed]) -> dict[_Key, list[_Target]]:
    """Groups this rank's parts of experts by the dense matrix that they are made of."""
    live = StateDictMap(moe.spec)
    found: dict[_Key, list[_Target]] = {}
    for name, placed in held.items():
        for part in live.pieces(name) or ():
            plan = moe.plans[part.piece.layer]
            expert = plan.shared if part.expert is None else plan.experts[part.expert]
            assert expert is not None, f"{name} is of a shared expert that nobody has planned"
            key = (part.piece.layer, expert.source, part.piece.matrix, part.piece.bias)
            found.setdefault(key, []).extend(_overlaps(part, expert, placed))
    return found


def _overlaps(part: StateDictPiece, plan: ExpertPlan, placed: Placed) -> Iterator[_Target]:
    """Locates the parts of a box that this rank holds."""
    lead = 0 if part.expert is None else 1
    start, stop, _ = part.rows.indices(placed.shape[lead])
    outer = () if part.expert is None else (part.expert,)
    more = placed.shape[lead + 1 :]
    box = Box((*outer, start, *(0 for _ in more)), (*(1 for _ in outer), stop - start, *more))
    for piece in placed.pieces:
        common = piece.box.overlap(box)
        if common is None:
            continue
        view = piece.tensor[common.within(piece.box)]
        inner = common.within(box)[lead:]
        columns = inner[1] if len(inner) > 1 else slice(None)
        yield _Target(part.expert, plan, inner[0], columns, view[0] if lead else view)


def read_network(model: StoredModel, ffn: FFNNames, device: torch.device) -> FFNWeights:
    """Reads a dense feed-forward network, whole, in fp32, to compare its MoE layer with."""

    def read(names: Mapping[Matrix, MatrixName], matrix: Matrix) -> Tensor | None:
        if matrix not in names:
            return None
        return model.files[0].read_matrix(model.where(0, names[matrix])).to(device, torch.float32)

    up_FD, down_DF = read(ffn.matrices, "up"), read(ffn.matrices, "down")
    assert up_FD is not None and down_DF is not None, ffn
    return FFNWeights(
        up_FD=up_FD,
        down_DF=down_DF,
        activation=ffn.shape.activation,
        gate_FD=read(ffn.matrices, "gate"),
        b_gate_F=read(ffn.biases, "gate"),
        b_up_F=read(ffn.biases, "up"),
        b_down_D=read(ffn.biases, "down"),
    )
