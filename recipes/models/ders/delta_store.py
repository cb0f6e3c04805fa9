"""Converts a checkpoint to base and deltas, and back, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ModelError
from moe.experts.deltas import DeltaCodec, QuantisedDelta, SparseDelta
from recipes.checkpoint import require_space
from recipes.models.ders.expert_groups import ExpertGroup, find_groups
from recipes.models.export.output_folder import output_folder
from recipes.models.export.write_export import write_companions
from recipes.models.hf.config_file import read_config
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.safetensors_codec import CODES, DTYPES, TensorSpec
from recipes.runtime.user_json import read_json_object

# Files of a folder of base and deltas; the config is not called config.json, so that no other reader loads
# it.
RECORD, CONFIG = "ders.json", "moe_config.json"
_VERSION = 1
# Nothing is run: a checkpoint is stored with all that it brings.
_AS_IT_IS = True
_CODECS: dict[str, type[DeltaCodec]] = {"sparse": SparseDelta, "quantised": QuantisedDelta}
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Compression:
    """Result of a compression.

    Attributes:
        source_bytes: Bytes of the checkpoint's tensors.
        stored_bytes: Bytes of base, deltas and the other tensors.
        relative_error: Error of the experts, ``|W' - W| / |W|`` over all of them.
        delta_share: Distance of the experts from their base, ``|W - base| / |W|`` over all of them.
        groups: Number of expert matrices.
    """

    source_bytes: int
    stored_bytes: int
    relative_error: float
    delta_share: float
    groups: int


def compress(source: Path, out: Path, codec: DeltaCodec, progress: Progress = lambda n: None) -> Compression:
    """Writes an MoE checkpoint as base and deltas.

    Args:
        source: A checkpoint folder of transformers or in Graft's own format.
        out: The folder to write; it must not exist.
        codec: Encoding of the differences.
        progress: Called with the number of bytes read.

    Raises:
        ConfigError: ``out`` exists.
        ModelError: There are no experts in the source, or its files are damaged.
        DiskError: There is no room.
    """
    files = DenseFiles(source)
    specs = [stored.spec for stored in files.tensors.values()]
    groups = find_groups(specs)
    if not groups:
        rule = "it has no experts: no tensors are named ...experts.N..., nor stacked as ...experts.NAME"
        raise ModelError.one("SOURCE", str(source), rule, "Give an MoE checkpoint.")
    taken = {group.member(e) for group in groups for e in range(group.num_experts)}
    kept = [spec for spec in specs if spec.name not in taken]
    stored = [*kept, *(spec for group in groups for spec in _stored_specs(group, codec))]
    with output_folder(out, "OUT") as temporary:
        target = _lay_out(out, temporary, stored)
        for spec in kept:
            target.write(spec.name, files.read(spec.name))
            progress(spec.num_bytes)
        totals = torch.zeros(3, dtype=torch.float64)
        for group in groups:
            for sums in _compress_group(group, files, target, codec):
                totals += sums
                progress(group.dtype.itemsize * torch.Size(group.shape).numel())
        target.finish()
        files.close()
        atomic_write_json(temporary / RECORD, _record(groups, specs, codec))
        write_companions(temporary, read_config(source), source, trust_remote_code=_AS_IT_IS)
        (temporary / "config.json").rename(temporary / CONFIG)
    wrong, apart, whole = totals.tolist()
    return Compression(
        source_bytes=sum(spec.num_bytes for spec in specs),
        stored_bytes=target.total_bytes,
        relative_error=(wrong / max(whole, 1e-300)) ** 0.5,
        delta_share=(apart / max(whole, 1e-300)) ** 0.5,
        groups=len(groups),
    )


def expand(source: Path, out: Path, progress: Progress = lambda n: None) -> int:
    """Restores the checkpoint that base and deltas were made from; returns its bytes.

    Args:
        source: A folder that `compress` wrote.
        out: The folder to write; it must not exist.
        progress: Called with the number of bytes written.

    Raises:
        ConfigError: ``out`` exists.
        ModelError: The source is no such folder, or is damaged.
        DiskError: There is no room.
    """
    codec, groups, specs = _read_record(source)
    files = DenseFiles(source)
    _require_whole(source, files, codec, groups, specs)
    with output_folder(out, "OUT") as temporary:
        target = _lay_out(out, temporary, specs)
        for spec in specs:
            if spec.name in files.tensors:
                target.write(spec.name, files.read(spec.name))
                progress(spec.num_bytes)
        for group in groups:
            for expert, matrix in _expanded(group, files, codec):
                offset = expert * matrix.numel() if group.stacked else 0
                progress(target.write(group.member(expert), matrix, offset) * group.dtype.itemsize)
        target.finish()
        files.close()
        config = read_json_object(source / CONFIG)
        write_companions(temporary, config, source, trust_remote_code=_AS_IT_IS)
    return target.total_bytes


def _expanded(group: ExpertGroup, files: DenseFiles, codec: DeltaCodec) -> Iterator[tuple[int, Tensor]]:
    """Yields the matrices of a group's experts, each base and difference together."""
    base = files.read(f"{group.stem}.base").float()
    for expert in range(group.num_experts):
        parts = {
            part: files.read(f"{group.stem}.{expert}.{part}")
            for part in codec.parts(group.shape, group.dtype)
        }
        yield expert, base + codec.decode(parts, group.shape, group.key(expert))


def _require_whole(
    source: Path, files: DenseFiles, codec: DeltaCodec, groups: list[ExpertGroup], specs: list[TensorSpec]
) -> None:
    taken = {group.member(e) for group in groups for e in range(group.num_experts)}
    wanted = {spec.name for spec in specs} - taken
    wanted |= {spec.name for group in groups for spec in _stored_specs(group, codec)}
    if missing := sorted(wanted - set(files.tensors)):
        rule = f"{len(missing)} tensors are missing from its files, {missing[0]} the first"
        raise ModelError.one("SOURCE", str(source), rule, "Restore its files, or compress again.")


def _lay_out(out: Path, temporary: Path, specs: list[TensorSpec]) -> TensorFiles:
    require_space(out, sum(spec.num_bytes for spec in specs), "the result")
    return TensorFiles(temporary, specs)


def _stored_specs(group: ExpertGroup, codec: DeltaCodec) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{group.stem}.base", group.dtype, group.shape)
    for expert in range(group.num_experts):
        for part, (dtype, shape) in codec.parts(group.shape, group.dtype).items():
            yield TensorSpec(f"{group.stem}.{expert}.{part}", dtype, shape)


def _compress_group(
    group: ExpertGroup, files: DenseFiles, target: TensorFiles, codec: DeltaCodec
) -> Iterator[Tensor]:
    """Writes one group; yields the sums of squared errors, differences and weights, expert by expert."""
    # In fp64, so that the mean of equal matrices is that matrix.
    total = torch.zeros(group.shape, dtype=torch.float64)
    for expert in range(group.num_experts):
        total += _read(group, files, expert)
    # Rounded as stored, so that the differences include the base's rounding error.
    base = (total / group.num_experts).to(group.dtype)
    target.write(f"{group.stem}.base", base)
    for expert in range(group.num_experts):
        matrix = _read(group, files, expert)
        delta = matrix - base.float()
        kinds = codec.parts(group.shape, group.dtype)
        parts = {p: v.to(kinds[p][0]) for p, v in codec.encode(delta, group.key(expert)).items()}
        for part, tensor in parts.items():
            target.write(f"{group.stem}.{expert}.{part}", tensor)
        again = (base.float() + codec.decode(parts, group.shape, group.key(expert))).to(group.dtype).float()
        yield torch.stack([(again - matrix).double().square().sum(), delta.double().square().sum(),
                           matrix.double().square().sum()])  # fmt: skip


def _read(group: ExpertGroup, files: DenseFiles, expert: int) -> Tensor:
    if not group.stacked:
        return files.read(group.member(expert)).float()
    count = torch.Size(group.shape).numel()
    return files.read_run(group.name, expert * count, (expert + 1) * count).view(group.shape).float()


def _record(groups: list[ExpertGroup], specs: list[TensorSpec], codec: DeltaCodec) -> dict[str, Any]:
    (name,) = (name for name, kind in _CODECS.items() if isinstance(codec, kind))
    return {
        "format_version": _VERSION,
        "codec": {"name": name, **asdict(codec)},  # type: ignore[call-overload]
        "groups": [asdict(group) | {"dtype": CODES[group.dtype]} for group in groups],
        "tensors": [[spec.name, CODES[spec.dtype], list(spec.shape)] for spec in specs],
    }


def _read_record(source: Path) -> tuple[DeltaCodec, list[ExpertGroup], list[TensorSpec]]:
    try:
        content = read_json_object(source / RECORD)
    except (OSError, ValueError) as error:
        rule = f"it has no {RECORD} that can be read"
        raise ModelError.one("SOURCE", str(source), rule, "Give a folder of tools.ders compress.") from error
    if content.get("format_version") != _VERSION:
        rule = f"its format has version {content.get('format_version')}, this reads {_VERSION}"
        raise ModelError.one("SOURCE", str(source), rule, "Take the version of Graft that wrote it.")
    try:
        options = dict(content["codec"])
        codec = _CODECS[options.pop("name")](**options)
        groups = [
            ExpertGroup(**entry | {"shape": tuple(entry["shape"]), "dtype": DTYPES[entry["dtype"]]})
            for entry in content["groups"]
        ]
        specs = [TensorSpec(name, DTYPES[dtype], tuple(shape)) for name, dtype, shape in content["tensors"]]
    except (KeyError, TypeError, ValueError) as error:
        rule = f"its {RECORD} is damaged ({type(error).__name__}: {error})"
        raise ModelError.one("SOURCE", str(source), rule, "Compress the model again.") from error
    return codec, groups, specs
