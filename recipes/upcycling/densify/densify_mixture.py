"""Makes a mixture dense: the mean of each layer's experts is its network; the rest has the source's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.experts.shared import SharedExpert
from moe.experts.weights import FFNWeights
from moe.upcycle.gates import observe
from recipes.checkpoint import require_space
from recipes.models.export.output_folder import output_folder
from recipes.models.export.read_back import DenseUnread
from recipes.models.export.spec import MoESpec
from recipes.models.export.write_export import write_companions
from recipes.models.families.open_mixture import open_mixture
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.ffn_names import FFNNames, MatrixName, ModelNames
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.upcycling.convert.folder_check import load_any
from recipes.upcycling.densify.dense_counterpart import dense_counterpart
from recipes.upcycling.densify.shares import all_shares
from recipes.upcycling.reduce.expert_sums import ExpertSums
from recipes.upcycling.reduce.mix_experts import Weights, mix_experts, read_expert
from recipes.upcycling.reduce.text_look import TextLook, TextRequest, look_at_text
from recipes.upcycling.sharded.mixture_model import mixture_model
from recipes.upcycling.sharded.sharded_models import materialize


@dataclass(frozen=True)
class Densified:
    """A mixture that was made dense.

    Attributes:
        out: Folder that was written.
        architecture: Its class.
        weight_sums: By block, the sum of a token's weights that its network is multiplied by.
        residuals: By block, squared distance of experts from the first over the first's square: as they are,
            and once neurons are in one order.
        loss_before: Loss of the source on held-out text, in nats a token.
        loss_after: Loss of what was written.
        total_bytes: Bytes of its tensors.
    """

    out: Path
    architecture: str
    weight_sums: dict[int, float]
    residuals: dict[int, tuple[float, float]]
    loss_before: float
    loss_after: float
    total_bytes: int


def densify(
    source: TextRequest, method: str, cache: Path, out: Path, log: Callable[[str], None] = lambda line: None
) -> Densified:
    """Makes a mixture dense, in a folder.

    Args:
        source: The mixture, and text to look at.
        method: Name of the experts' shares.
        cache: Folder of token files.
        out: Folder to write.
        log: Takes lines on the progress.

    Raises:
        ModelError: It has no dense counterpart, or does not fit into memory.
        ExactnessError: What was written does not compute what it should.
    """
    mixture = open_mixture(source.model, trust_remote_code=source.trust_remote_code)
    names, content = dense_counterpart(mixture)
    if carried := sorted(mixture.placement.constants):
        log(f"left out: {len(carried)} tensors that the mixture's class does not read, {carried[0]} first")
    look = look_at_text(source, mixture, cache, log)
    work = _Work(mixture, names, look.sums, method)
    after: list[float] = []
    with output_folder(out) as temporary:
        specs = list(work.specs())
        total = sum(spec.num_bytes for spec in specs)
        require_space(out, total, "the model")
        files = TensorFiles(temporary, specs)
        work.write(files)
        files.finish()
        write_companions(temporary, content, source.model, trust_remote_code=source.trust_remote_code)
        after.append(_checked_loss(look, mixture, names, temporary, source.trust_remote_code))
    return Densified(out, names.architecture, work.weight_sums, work.residuals, look.loss, after[0], total)


class _Work:
    """Tensors of the dense model, and their making."""

    def __init__(
        self, mixture: SourceMixture, names: ModelNames, sums: Mapping[int, ExpertSums], method: str
    ) -> None:
        self._mixture, self._names, self._sums = mixture, names, sums
        self._shares = all_shares()[method]
        self._blocks = {moe.index: moe for moe in mixture.spec.moe_blocks}
        self._networks = [ffn for ffn in names.ffns if ffn.layer in self._blocks]
        self._made = {
            where.tensor: ffn.layer
            for ffn in self._networks
            for where in (*ffn.matrices.values(), *ffn.biases.values())
        }
        self.weight_sums: dict[int, float] = {}
        self.residuals: dict[int, tuple[float, float]] = {}

    def specs(self) -> Iterator[TensorSpec]:
        """Yields all tensors of the dense model."""
        tensors, placement = self._mixture.files.tensors, self._mixture.placement
        experts = {key.layer: slot.name for key, slot in placement.slots.items() if key.expert is not None}
        for name, shape in self._names.state.items():
            made = name in self._made
            source = experts[self._made[name]] if made else self._mixture.stored[name]
            own = tensors[source].spec
            yield TensorSpec(name, own.dtype, shape) if made else replace(own, name=name)

    def write(self, files: TensorFiles) -> None:
        """Copies what is outside the experts, and mixes these layer by layer."""
        source = self._mixture.files
        for name in self._names.state:
            if name not in self._made:
                stored = source.tensors[self._mixture.stored[name]]
                files.copy(name, source.handle(stored.file), stored.start)
        for ffn in self._networks:
            for where, tensor in self._network(ffn):
                part, number = where.part
                run = tensor.T.contiguous() if where.transposed else tensor
                assert number == 1 or not where.transposed, where
                files.write(where.tensor, run, part * run.numel())
        source.close()

    def _network(self, ffn: FFNNames) -> Iterator[tuple[MatrixName, Tensor]]:
        """Yields a layer's matrices and biases, and their places."""
        moe, sums = self._blocks[ffn.layer], self._sums[ffn.layer]
        shares = self._shares.shares_E(sums).tolist()
        experts = (read_expert(self._mixture, moe, expert) for expert in range(moe.num_experts))
        mixed = mix_experts(experts, shares, aligns=True)
        self.residuals[moe.index] = mixed.before, mixed.after
        factor = self.weight_sums[moe.index] = _weight_sum(moe, sums)
        for (matrix, bias), tensor in mixed.weights.items():
            if matrix == "down" and factor != 1:
                tensor = (tensor.double() * factor).to(tensor.dtype)
            yield (ffn.biases if bias else ffn.matrices)[matrix], tensor


def _weight_sum(moe: MoESpec, sums: ExpertSums) -> float:
    """Returns the sum of a token's weights; of a router whose tokens differ in it, the text's mean."""
    if moe.router.weights_sum_to_one:
        return 1.0
    gates = observe(moe.router.config, moe.num_experts)
    if gates.constant and gates.total is not None:
        return gates.total
    return float(sums.weights_E.sum()) / sums.tokens


@torch.no_grad()
def _checked_loss(
    look: TextLook, mixture: SourceMixture, names: ModelNames, folder: Path, trust: bool
) -> float:
    """Compares files with the mixture's model, its layers replaced by their networks; returns their loss.

    The model is the mixture's own, so that a dense class that computes anything else otherwise shows.

    Raises:
        ExactnessError: They compute different things.
    """
    model, files = materialize(mixture_model(mixture)).module, DenseFiles(folder)
    blocks = {moe.index: moe for moe in mixture.spec.moe_blocks}
    for ffn in names.ffns:
        if ffn.layer in blocks:
            parent, _, child = blocks[ffn.layer].site.rpartition(".")
            setattr(model.get_submodule(parent), child, SharedExpert(_weights(ffn, files)))
    files.close()
    look.require_same(model, DenseUnread(folder, trust_remote_code=trust))
    del model
    return look.loss_of(load_any(folder, trust_remote_code=trust).float())


def _weights(ffn: FFNNames, files: DenseFiles) -> FFNWeights:
    read: Weights = {
        (matrix, bias): files.read_matrix(where).float()
        for bias, places in ((False, ffn.matrices), (True, ffn.biases))
        for matrix, where in places.items()
    }
    found: dict[str, Any] = {f"b_{m}_{'D' if m == 'down' else 'F'}": t for (m, b), t in read.items() if b}
    gate = read.get(("gate", False))
    return FFNWeights(
        up_FD=read["up", False],
        down_DF=read["down", False],
        activation=ffn.shape.activation,
        gate_FD=gate,
        **found,
    )
