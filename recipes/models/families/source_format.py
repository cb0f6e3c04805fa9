"""Format of a mixture that was read: its own names, dtypes, ``config.json``, and unused tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moe.errors import ModelError
from moe.upcycle.dense_shape import Matrix
from recipes.models.export.base import Layout
from recipes.models.export.read_back import NativeUnread, Unread
from recipes.models.export.spec import ModelSpec, MoESpec
from recipes.models.families.base import MoEFamily
from recipes.models.families.source_mixture import SourceExporter
from recipes.models.hf.config_file import read_config
from recipes.runtime.safetensors_codec import TensorLocation, TensorSpec


class SourceFormat(SourceExporter):
    """Names and dtypes of a checkpoint, so that what is not trained is written back bit for bit.

    It belongs to one checkpoint and is not among those that are chosen from.
    """

    is_native = True

    def __init__(
        self,
        family: MoEFamily,
        folder: Path,
        tensors: Mapping[str, TensorLocation],
        sites: Mapping[int, str],
        layout: Layout,
        fused: tuple[str, str],
        dtype: torch.dtype,
    ) -> None:
        """Describes the files; `keep` adds the tensors outside the MoE layers.

        Args:
            family: The family.
            folder: The checkpoint.
            tensors: Its tensors, by their names in the files.
            sites: By block, the name in the files of its MoE layer.
            layout: Layout of its experts.
            fused: Names of stacked experts below the MoE layer.
            dtype: Dtype of most weights: files asked for in it have every tensor in its own dtype.
        """
        self.name = family.name  # type: ignore[misc]
        self.title = family.title  # type: ignore[misc]
        self.layouts = (layout,)  # type: ignore[misc]
        self.dtype = dtype
        self._family = family
        self._folder = folder
        self._tensors = tensors
        self._sites = sites
        self._fused = fused
        self._kept: Mapping[str, str] = {}
        self._seconds: Mapping[str, tuple[str, ...]] = {}
        self._carried: tuple[str, ...] = ()

    def keep(self, stored: Mapping[str, str], tied: Mapping[str, str]) -> None:
        """Sets the names of the tensors outside the MoE layers.

        Args:
            stored: Name in the model -> name in the files.
            tied: Second name -> first name in the files, of tied tensors that the files hold twice.
        """
        self._kept = stored
        firsts = set(tied.values())
        self._seconds = {name: tuple(s for s, f in tied.items() if f == name) for name in firsts}

    def carry(self, names: tuple[str, ...]) -> None:
        """Sets the tensors that the model does not compute with, and that are copied as bytes."""
        self._carried = names

    def unsupported_reason_of_its_models(self, spec: ModelSpec) -> str | None:
        """See `Exporter`; it holds the checkpoint that it was made of."""
        return None

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        """Returns the source's own content, every key of it."""
        return read_config(self._folder)

    def written_config(self, spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
        """See `Exporter.written_config`; in the source's dtype nothing is changed."""
        return self.config(spec) if dtype == self.dtype else super().written_config(spec, dtype)

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.expert_name`."""
        assert not bias, f"{self.name} has no biases"
        return f"{self._sites[moe.index]}.experts.{expert}.{self._family.matrices[matrix]}.weight"

    def fused_name(self, moe: MoESpec, matrix: Literal["up", "down"]) -> str:
        """See `Exporter.fused_name`."""
        return f"{self._sites[moe.index]}.{self._fused[0 if matrix == 'up' else 1]}"

    def router_name(self, moe: MoESpec, key: str) -> str | None:
        """See `Exporter.router_name`; a family without a selection bias has routers whose bias stays 0."""
        name = self._family.router_keys.get(key)
        return None if name is None else f"{self._sites[moe.index]}.{name}"

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.shared_name`."""
        assert self._family.shared and not bias, self.name
        return f"{self._sites[moe.index]}.{self._family.shared}.{matrix}_proj.weight"

    def shared_gate_name(self, moe: MoESpec) -> str:
        """Returns the name in the files of the row that scales the shared expert's output."""
        return f"{self._sites[moe.index]}.{self._family.shared_gate}"

    def kept_name(self, name: str) -> str:
        """See `Exporter.kept_name`."""
        return self._kept[name]

    def second_names(self, name: str) -> tuple[str, ...]:
        """See `Exporter.second_names`."""
        return self._seconds.get(name, ())

    def keeps_dtype(self, name: str) -> bool:
        """Returns True for what the family keeps in fp32, and for what is carried."""
        return name.endswith(self._family.fp32) or name in self._carried

    def written(self, tensor: TensorSpec, wanted: torch.dtype | None) -> TensorSpec:
        """See `Exporter.written`; shapes, and in the source's dtype all dtypes, are those of the source."""
        own = self.own(tensor)
        if wanted == self.dtype or tensor.name in self._carried:
            return own
        return replace(super().written(tensor, wanted), shape=own.shape)

    def own(self, tensor: TensorSpec) -> TensorSpec:
        """Returns a tensor, named as in the files, as they have it.

        Raises:
            ModelError: They do not hold it, or in another shape.
        """
        if tensor.name not in self._tensors:
            remedy = "Download the checkpoint again."
            raise ModelError.one("dense", str(self._folder), f"no file holds {tensor.name}", remedy)
        own = self._tensors[tensor.name].spec
        computes = tensor.name not in self._carried
        if computes and own.dtype.is_floating_point != tensor.dtype.is_floating_point:
            rule = f"{tensor.name} is of {own.dtype} in its files, which its class does not compute with"
            raise ModelError.one("dense", str(self._folder), rule, "Dequantise it first (graft dequantize).")
        if [n for n in own.shape if n > 1] != [n for n in tensor.shape if n > 1]:
            rule = f"{tensor.name} is {list(own.shape)} in its files and {list(tensor.shape)} by config.json"
            raise ModelError.one("dense", str(self._folder), rule, "Give the config.json of these weights.")
        return own

    def constants(self, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
        """Yields what is carried, mapped from the files instead of read."""
        for name in self._carried:
            yield name, _mapped(self._tensors[name])

    def exact_in(self, spec: ModelSpec, layout: Layout = "per_expert") -> list[str]:
        """Lists transformers, whose own class it is."""
        return ["transformers"]

    def open(self, folder: Path, *, trust_remote_code: bool = False) -> Unread:
        """See `Exporter.open`; uses transformers' own loader and class, whatever code was copied."""
        return SourceUnread(folder)


class SourceUnread(NativeUnread):
    """Export of a mixture that was read: what its source's class has no place for is there again."""

    refuses_more = False


def _mapped(stored: TensorLocation) -> Tensor:
    """Maps a tensor's bytes into memory; the system reads them when they are written."""
    shape, count = stored.spec.shape, stored.spec.num_bytes
    if not count:
        return torch.empty(shape, dtype=stored.spec.dtype)
    content = np.memmap(stored.file, np.uint8, mode="c", offset=stored.start, shape=(count,))
    return torch.from_numpy(content).view(stored.spec.dtype).view(shape)
