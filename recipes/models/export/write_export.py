"""Writes a trained model into a folder that other programs load, and verifies that it computes the same."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ExactnessError
from moe.upcycle.equivalence import TOLERANCES, LogitDrift, agree, logit_drift
from recipes.data.tokenizer import load_tokenizer, spelled
from recipes.models.export.base import Exporter, Layout
from recipes.models.export.companions import copy_companions
from recipes.models.export.output_folder import output_folder
from recipes.models.export.placement import Placement
from recipes.models.export.read_back import ReadBack
from recipes.models.export.spec import describe_model
from recipes.models.hf.config_file import read_config
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.state_dict_map import StateDictMap, kept_specs, tied_names
from recipes.models.lora_model import factors_of, model_lora, without_factors
from recipes.models.safetensors.tensor_files import TensorFiles
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.heartbeat import Heartbeat


def export(
    model: HFModel,
    exporter: Exporter,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtype: torch.dtype,
    *,
    writes: bool,
    layout: Layout | None = None,
    heartbeat: Heartbeat | None = None,
) -> None:
    """Writes a model. An existing folder is replaced at the end, by a rename.

    Args:
        model: The model that the tensors belong to; gives config and tokenizer.
        exporter: The format.
        tensors: Names and full tensors, from a generator that all ranks must exhaust together.
        folder: The folder to write.
        dtype: Dtype of the floating-point weights in the files.
        writes: True on rank 0, which writes; the other ranks only take part in gathering.
        layout: One of the exporter's layouts; None for the first.
        heartbeat: Notified of each tensor.

    Raises:
        ModelError: A tensor or expert is missing or was given twice, or the files do not hold what was
            written.
    """
    heartbeat = heartbeat or Heartbeat()
    spec, live = describe_model(model), StateDictMap(describe_model(model))
    placement = Placement(spec, exporter, kept_specs(model, live), dtype, layout)
    merged = heartbeat.each(without_factors(tensors, factors_of(spec, model_lora(model)), computes=writes))
    if not writes:
        collections.deque(merged, maxlen=0)
        return
    with output_folder(folder, "export", replaces=True) as temporary:
        files = TensorFiles(temporary, placement.specs)
        _write_all(files, merged, live, placement, tied_names(model))
        files.finish(heartbeat)
        config = exporter.written_config(spec, dtype)
        write_companions(temporary, config, model.folder, trust_remote_code=model.trust_remote_code)


def _write_all(
    files: TensorFiles,
    tensors: Iterable[tuple[str, Tensor]],
    live: StateDictMap,
    placement: Placement,
    tied: Collection[str],
) -> None:
    for name, tensor in tensors:
        if name not in tied:
            write_live(files, name, tensor.detach(), live, placement)
    for name, constant in placement.constants.items():
        files.write(name, constant)


def write_live(
    files: TensorFiles, name: str, tensor: Tensor, live: StateDictMap, placement: Placement
) -> None:
    """Writes one of the model's tensors to its place in the files."""
    router, parts = live.router(name), live.pieces(name)
    if router is not None:
        if (place := placement.router(router.layer, router.key)) is not None:
            files.write(place, tensor)
    elif parts is None:
        for each in (placement.kept(name), *placement.seconds(name)):
            files.write(each, tensor)
    else:
        for part in parts:
            slot = placement.slot(part.piece)
            values = part.of(tensor)
            files.write(slot.name, values if slot.factor == 1.0 else values * slot.factor, slot.offset)


def write_companions(
    folder: Path, config: dict[str, Any], source: Path, *, trust_remote_code: bool = False
) -> None:
    """Writes ``config.json`` and copies the tokenizer and other files that accompany a checkpoint.

    A config that names a model's own code (``auto_map``) says that it is trusted: the code is copied, too.

    Args:
        folder: Where to.
        config: Content of ``config.json``.
        source: The checkpoint.
        trust_remote_code: Whether a tokenizer's own code is trusted, and copied.
    """
    atomic_write_json(folder / "config.json", config)
    code = "auto_map" in (config.get("dense_config") or config)
    copy_companions(source, folder, code=code, trust_remote_code=trust_remote_code)


def dtype_keys(dtype: torch.dtype) -> dict[str, str]:
    """Returns config keys for the dtype, also under the name that transformers before 4.56 reads."""
    return dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class ExportReport:
    """Outcome of an export: its format, and how it compares after reloading.

    Attributes:
        format: Name of the format.
        is_native: Whether plain transformers loads it.
        path: The exported folder.
        logits: Drift of the reloaded model's logits from the trained model's, on real tokens.
        sample: A continuation that the reloaded model generated; None if none was asked for, or if it was
            read block by block, since every token would read all blocks again.
    """

    format: str
    is_native: bool
    path: Path
    logits: LogitDrift
    sample: str | None


@torch.no_grad()
def verify_export(
    exporter: Exporter,
    folder: Path,
    tokens_BS: Tensor,
    logits_BSV: Tensor,
    memory_bytes: float = math.inf,
    heartbeat: Heartbeat | None = None,
    *,
    trust_remote_code: bool = False,
    sampled: int = 32,
) -> ExportReport:
    """Reads an export back as its users would, compares logits, and generates.

    Args:
        exporter: The format it was written in.
        folder: The export.
        tokens_BS: Real tokens.
        logits_BSV: Logits of the trained weights on them, rounded as in the files and computed in fp32.
        memory_bytes: A model that takes more in fp32 is read one block at a time.
        heartbeat: Notified of each block.
        trust_remote_code: Whether the model's and the tokenizer's own code, which was copied, may run.
        sampled: Tokens to generate; 0 for no sample.

    Raises:
        ExactnessError: The reloaded model computes something else.
        ModelError: The files lack a tensor, or hold one that does not fit.
    """
    read = ReadBack(exporter.open(folder, trust_remote_code=trust_remote_code), memory_bytes, heartbeat)
    drift = require_written(read, folder, tokens_BS, logits_BSV)
    sample = None
    if read.stays and sampled:
        sample = _sample(read.model, folder, tokens_BS, sampled, trust_remote_code)
    return ExportReport(exporter.name, exporter.is_native, folder, drift, sample)


@torch.no_grad()
def require_written(read: ReadBack, folder: Path, tokens_BS: Tensor, logits_BSV: Tensor) -> LogitDrift:
    """Compares a model that was read back with the logits that it must have.

    Args:
        read: The model.
        folder: Its folder, for the message.
        tokens_BS: See `verify_export`.
        logits_BSV: See `verify_export`.

    Raises:
        ExactnessError: It computes something else.
    """
    drift = logit_drift(logits_BSV.cpu(), read.model(input_ids=tokens_BS.cpu()).logits)
    if not agree(drift, torch.float32):
        kind = read_config(folder, "export")["model_type"]
        raise ExactnessError(
            f"the model exported to {folder} as {kind} does not compute what was trained: logits "
            f"differ by {drift.relative:.2e} of the largest, KL {drift.kl:.1e}, and at most "
            f"{TOLERANCES[torch.float32]:.0e} is allowed"
        )
    return drift


def _sample(model: Any, folder: Path, tokens_BS: Tensor, number: int, trust: bool) -> str:
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust)
    prompt_1S = tokens_BS[:1, : min(32, tokens_BS.shape[1])].cpu()
    out = model.generate(
        prompt_1S,
        attention_mask=torch.ones_like(prompt_1S),
        max_new_tokens=number,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    prompt, text = (spelled(tokenizer, ids_1S[0].tolist()) for ids_1S in (prompt_1S, out))
    return json.dumps({"prompt": prompt, "text": text})
