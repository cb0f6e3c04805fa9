"""Writes a trained model into a folder that others load, and proves that it loads as the same function."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.errors import ExactnessError
from moe.upcycle.check import MAX_KL, TOLERANCES, LogitDrift, agree, logit_drift
from recipes.atomic import atomic_write_json, fsync_folder
from recipes.hosts.exporters.base import Exporter
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.hosts.inspection import INDEX_NAME, SINGLE_NAME

_MAX_FILE_BYTES = 5 * 10**9
# What travels with a checkpoint besides weights and config.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "tekken.json",
)


class TensorFiles:
    """Collects tensors into safetensors files of limited size; memory holds one file at a time."""

    def __init__(self, folder: Path, max_bytes: int = _MAX_FILE_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy: tensors that share storage are refused by the format."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self._total += size

    def _flush(self) -> None:
        path = self.folder / f"part-{len(self._files):05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._files.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> None:
        """Writes what is left, gives the files their names, and the index where there are several."""
        if self._pending:
            self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self.folder / SINGLE_NAME)
            return
        weight_map = {}
        for number, (path, names) in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            path.rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        atomic_write_json(self.folder / INDEX_NAME, index)


def export(
    host: HuggingFaceHost,
    exporter: Exporter,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    *,
    writes: bool,
) -> None:
    """Writes the model. A folder that exists is replaced at the end, by a rename.

    Args:
        host: What the tensors belong to; gives config and tokenizer.
        exporter: The format.
        tensors: Names and full tensors, by a generator that all ranks must exhaust together.
        folder: Where to.
        dtype: Of the floating-point weights in the files.
        writes: Whether this rank writes (rank 0); the others only take part in gathering.
    """
    tied = _tied_names(host)
    temporary = folder.with_name(f".tmp-{folder.name}")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    files = TensorFiles(temporary)
    for name, tensor in tensors:
        if writes and name not in tied:
            for new_name, part in exporter.rename(name, tensor):
                kept = exporter.keeps_dtype(name) or not part.is_floating_point()
                files.add(new_name, part if kept else part.to(dtype))
    if writes:
        files.finish()
        config = exporter.config(host) | _dtype_keys(dtype)
        atomic_write_json(temporary / "config.json", config)
        _copy_companions(host.folder, temporary)
        _sync(temporary)
        _replace(temporary, folder)


def _dtype_keys(dtype: torch.dtype) -> dict[str, str]:
    """Under the name of today and under the one that readers before transformers 4.56 look for."""
    return dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))


def _tied_names(host: HuggingFaceHost) -> set[str]:
    """Names that a tied model must not write: the same parameter under its second name."""
    every = {name for name, _ in host.model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in host.model.named_parameters()}


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how it compares after reloading.

    Attributes:
        format: Name of the format.
        is_native: Whether plain transformers loads it.
        path: The folder.
        logits: Drift of the reloaded model's logits from the trained model's, on real tokens.
        sample: A continuation that the reloaded model generated.
    """

    format: str
    is_native: bool
    path: Path
    logits: LogitDrift
    sample: str


@torch.no_grad()
def verify_export(
    exporter: Exporter, folder: Path, tokens_BS: Tensor, logits_BSV: Tensor, dtype: torch.dtype
) -> ExportReport:
    """Reloads what was exported as its users would, compares logits, and generates.

    Args:
        exporter: The format it was written in.
        folder: Where.
        tokens_BS: Real tokens.
        logits_BSV: The trained model's logits on them.
        dtype: The lower of the precisions of files and engine, for the tolerance.

    Raises:
        ExactnessError: The reloaded model computes something else.
    """
    model = exporter.load(folder).float().eval()
    drift = logit_drift(logits_BSV.cpu(), model(input_ids=tokens_BS.cpu()).logits)
    if not agree(drift, dtype):
        allowed = f"KL {MAX_KL:.0e}" if dtype.itemsize == 2 else f"{TOLERANCES[dtype]:.0e} of the largest"
        raise ExactnessError(
            f"the model exported to {folder} as {exporter.name} does not compute what was trained: logits "
            f"differ by {drift.relative:.2e} of the largest, KL {drift.kl:.1e}, and at most {allowed} is "
            f"allowed for {dtype}. The checkpoints are whole"
        )
    return ExportReport(exporter.name, exporter.is_native, folder, drift, _sample(model, folder, tokens_BS))


def _sample(model: Any, folder: Path, tokens_BS: Tensor) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt_1S = tokens_BS[:1, : min(32, tokens_BS.shape[1])].cpu()
    out = model.generate(
        prompt_1S,
        attention_mask=torch.ones_like(prompt_1S),
        max_new_tokens=32,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return json.dumps({"prompt": tokenizer.decode(prompt_1S[0]), "text": tokenizer.decode(out[0])})
