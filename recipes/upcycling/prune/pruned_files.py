"""Writes a mixture with some of its experts, tensor by tensor, in the class that it has.

Letters: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe.errors import ConfigError, ModelError
from recipes.checkpoint import require_space
from recipes.models.export.output_folder import output_folder
from recipes.models.export.placement import ExpertTensorKey, pieces
from recipes.models.export.spec import MoESpec
from recipes.models.export.write_export import write_companions
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.config_file import read_config
from recipes.models.hf.inspection import EXPERT_COUNT_KEYS
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.safetensors_codec import TensorSpec
from recipes.upcycling.reduce.mix_experts import Weights, expert_key

#: Block -> experts that are kept, ascending.
Kept = Mapping[int, Sequence[int]]
#: Layer and expert -> weights that it gets instead of its own; None for its own.
Mixed = Callable[[MoESpec, int], Weights | None]


def require_prunable(mixture: SourceMixture, kept: int) -> None:
    """Checks that the mixture's class and router can have so many experts.

    Raises:
        ModelError: The router has weights that are not one row for each expert.
        ConfigError: Its groups or its number of experts a token need others.
    """
    folder, moe = str(mixture.files.folder), mixture.spec.moe_blocks[0]
    E, config = moe.num_experts, moe.router.config
    odd = [key for key, tensor in moe.router.state_dict().items() if not tensor.dim() or tensor.shape[0] != E]
    if odd or config.mixes_tokens:
        rule = f"its router, {config.name}, has no row for each expert that could be left out"
        raise ModelError.one("MODEL", folder, rule, "Give a mixture with a linear router.")
    groups = getattr(config, "num_groups", 1)
    rule = None
    if not 0 < kept <= E:
        rule, remedy = f"there are {E}", f"Set 1 to {E}."
    elif kept < config.experts_per_token:
        rule = f"a token uses {config.experts_per_token}"
        remedy = f"Keep {config.experts_per_token} or more, or make it dense with graft densify."
    elif groups > 1 and (kept % groups or kept < 2 * groups):
        rule = f"its router chooses among {groups} groups of one size, of two experts at least"
        remedy = f"Keep a multiple of {groups}, {2 * groups} or more."
    elif groups > 1 and config.top_groups * (kept // groups) < config.experts_per_token:
        rule = f"{config.top_groups} of {groups} groups would hold less than {config.experts_per_token}"
        remedy = f"Keep {groups * -(-config.experts_per_token // config.top_groups)} or more."
    if rule is not None:
        raise ConfigError.one("--keep", kept, rule, remedy)


def write_pruned(
    mixture: SourceMixture,
    kept: Kept,
    out: Path,
    check: Callable[[Path], None] = lambda folder: None,
    mixed: Mixed = lambda moe, expert: None,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Writes the mixture with the experts that are kept; returns the bytes of the tensors.

    Every other tensor has the bytes that it has in the source. Memory holds one matrix.

    Args:
        mixture: The source.
        kept: Experts that are kept, of every MoE layer the same number.
        out: Folder to write; it must not exist.
        check: Tries the files before the folder gets its name.
        mixed: Gives weights of an expert that is kept, other than its own.
        trust_remote_code: Whether a tokenizer's own code is trusted, and copied.
    """
    plan = _Plan(mixture, kept)
    total = sum(spec.num_bytes for spec in plan.specs)
    with output_folder(out) as temporary:
        require_space(out, total, "the model")
        files = TensorFiles(temporary, plan.specs)
        plan.write(files, mixed)
        files.finish()
        number = len(next(iter(kept.values())))
        config, source = pruned_config(mixture, number), mixture.files.folder
        write_companions(temporary, config, source, trust_remote_code=trust_remote_code)
        check(temporary)
    return total


def pruned_config(mixture: SourceMixture, number: int) -> dict[str, Any]:
    """Returns the source's ``config.json`` with another number of experts, under every key that has it."""
    content, E = read_config(mixture.files.folder), mixture.spec.moe_blocks[0].num_experts
    for part in (content, content.get("text_config") or {}):
        part.update({key: number for key in EXPERT_COUNT_KEYS if part.get(key) == E})
    for entry in content.get("moe_layers", []):
        entry["shapes"] = {name: [number, *shape[1:]] for name, shape in entry["shapes"].items()}
    return content


class _Plan:
    """Tensors of the pruned files, and the runs of the source's that they are made of."""

    def __init__(self, mixture: SourceMixture, kept: Kept) -> None:
        self._mixture = mixture
        self._files = mixture.files
        self._kept = kept
        # Name in the source -> name, rows of the source's first axis; None for a tensor as it is.
        self._made: dict[str, tuple[str, list[int] | None]] = {}
        dropped: set[str] = set()
        for moe in mixture.spec.moe_blocks:
            dropped |= set(self._add(moe, list(kept[moe.index])))
        names = [name for name in self._files.tensors if name not in dropped]
        self._made |= {name: (name, None) for name in names if name not in self._made}
        self.specs = [self._spec(name) for name in names]

    def _add(self, moe: MoESpec, kept: list[int]) -> Iterator[str]:
        """Places a layer's tensors; yields the names of those that are dropped."""
        placement = self._mixture.placement
        for key in moe.router.state_dict():
            if (name := placement.router(moe.index, key)) is not None:
                self._made[name] = name, kept
        for piece, _ in pieces(moe):
            if piece.expert is None:
                continue
            name = placement.slot(piece).name
            if placement.layout == "fused":
                self._made[name] = name, kept
            elif piece.expert in kept:
                self._made[name] = self._renamed(piece, kept.index(piece.expert)), None
            else:
                yield name

    def _renamed(self, piece: ExpertTensorKey, expert: int) -> str:
        return self._mixture.placement.slot(replace(piece, expert=expert)).name

    def _spec(self, name: str) -> TensorSpec:
        spec, (new, rows) = self._files.tensors[name].spec, self._made[name]
        if rows is None:
            return replace(spec, name=new)
        axis = _axis(spec)
        return replace(spec, name=new, shape=(*spec.shape[:axis], len(rows), *spec.shape[axis + 1 :]))

    def write(self, files: TensorFiles, mixed: Mixed) -> None:
        """Copies every tensor, or the rows of it that are kept; mixed experts have theirs written."""
        done = {place for moe in self._mixture.spec.moe_blocks for place in self._mix(files, moe, mixed)}
        for name, (new, rows) in self._made.items():
            stored = self._files.tensors[name]
            if (name, None) in done:
                continue
            if rows is None:
                files.copy(new, self._files.handle(stored.file), stored.start)
                continue
            width = torch.Size(stored.spec.shape).numel() // stored.spec.shape[_axis(stored.spec)]
            for place, row in enumerate(rows):
                if (name, row) in done:
                    continue
                run = self._files.read_run(name, row * width, (row + 1) * width)
                files.write(new, run, place * width)
        self._files.close()

    def _mix(self, files: TensorFiles, moe: MoESpec, mixed: Mixed) -> Iterator[tuple[str, int | None]]:
        """Writes a layer's mixed experts; yields the tensors, or rows, of the source that they replace."""
        for place, expert in enumerate(self._kept[moe.index]):
            for key, tensor in (mixed(moe, expert) or {}).items():
                slot = self._mixture.placement.slot(expert_key(moe, expert, key))
                new, rows = self._made[slot.name]
                if rows is None:
                    files.write(new, tensor)
                    yield slot.name, None
                    continue
                width = torch.Size(self._files.tensors[slot.name].spec.shape[1:]).numel()
                files.write(new, tensor, slot.offset + (place - expert) * width)
                yield slot.name, expert


def _axis(spec: TensorSpec) -> int:
    """Returns the axis of the experts: the first, or that of a bias that is stored as one row."""
    return next(number for number, size in enumerate(spec.shape) if size > 1)
