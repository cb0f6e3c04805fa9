"""Equivalence check of two folders: do dense model and MoE model compute the same on real text?

Letters: B samples, S sequence length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ModelError
from moe.upcycle.equivalence import LogitDrift, agree, logit_drift
from recipes.data.config import DataConfig
from recipes.data.samples import Samples
from recipes.data.sources import read_documents
from recipes.data.tokenizer import encode_texts, load_tokenizer
from recipes.models.export.graft_format import MODEL_TYPE, GraftUnread, load_graft
from recipes.models.export.read_back import DenseUnread, ReadBack
from recipes.models.hf.config_file import (
    context_length,
    library_reads,
    load_config,
    longest_window,
    read_config,
    trusts,
)
from recipes.models.hf.finite_weights import require_finite
from recipes.models.hf.weight_files import weight_files
from recipes.models.safetensors.dense_files import DenseFiles
from recipes.runtime.machine_memory import spare_bytes

# Tokens that are compared, of samples at least so long, and how far these reach beyond a window.
_TOKENS, _LEAST_LENGTH, _BEYOND = 1024, 256, 64
# Longer windows are not reached: attention masks of so many tokens take a GiB.
_MOST_LENGTH = 16384
_ACTIVATIONS = 1 << 30
WHOLE = "transformers' from_pretrained"
BY_BLOCK = "transformers' own loader, block by block, as memory is short"
# Logits, gradients by name, the lowest precision of the weights.
_Evaluated = tuple[Tensor, dict[str, Tensor], torch.dtype]


@dataclass(frozen=True)
class EquivalenceReport:
    """Difference of two models.

    Attributes:
        logits: On real tokens.
        gradients: Largest difference of a shared parameter's gradient over the largest gradient of
            that parameter, by name, worst first; None when not asked for.
        dtype: The lower precision of the two folders' weights.
        tokens: Compared.
        loader: Code that has loaded the dense model, for people.
    """

    logits: LogitDrift
    gradients: dict[str, float] | None
    dtype: torch.dtype
    tokens: int
    loader: str = WHOLE

    @property
    def agrees(self) -> bool:
        """True when both compute the same function, within the rounding of the dtype."""
        return agree(self.logits, self.dtype)


def real_tokens(
    folder: Path, data: DataConfig, samples: int, length: int, *, trust_remote_code: bool = False
) -> Tensor:
    """Returns ids ``[samples, length]`` of real text under a checkpoint's tokenizer.

    Raises:
        ModelError: The text is too short.
    """
    ids = _ids(folder, data, samples * length, trust_remote_code)
    if len(ids) == samples * length:
        return torch.tensor(ids).view(samples, length)
    rule = f"it has {len(ids)} tokens, and {samples} samples of {length} are wanted"
    raise ModelError.one("--text", data.path, rule, "Give more text, or fewer or shorter samples.")


def telling_tokens(folder: Path, data: DataConfig, *, trust_remote_code: bool = False) -> Tensor:
    """Returns real tokens ``[B, S]`` on which models of a folder that differ anywhere show it.

    They reach beyond every window of attention that the config names, as far as the model takes them.

    Raises:
        ModelError: There is no text.
    """
    there = torch.tensor(_ids(folder, data, telling_number(folder), trust_remote_code))
    if len(there) < 2:
        raise ModelError.one("--text", data.path, "it has fewer than two tokens", "Give more text.")
    return telling_samples(folder, there)


def telling_number(folder: Path) -> int:
    """Returns the number of tokens that `telling_samples` makes use of."""
    return max(_telling_length(folder), _TOKENS)


def telling_samples(folder: Path, tokens_T: Tensor) -> Tensor:
    """Cuts running text into samples ``[B, S]`` as `telling_tokens` does."""
    length = min(_telling_length(folder), len(tokens_T))
    samples = min(len(tokens_T), telling_number(folder)) // length
    return tokens_T[: samples * length].view(samples, length)


def telling_rows(folder: Path, samples: Samples) -> Tensor:
    """Returns the first tokens of a run's samples as `telling_tokens` does.

    Args:
        folder: The dense checkpoint.
        samples: Samples of the run that are not shuffled.
    """
    length = samples.seq_len
    number = min(samples.samples_per_epoch, -(-telling_number(folder) // length))
    return telling_samples(folder, torch.from_numpy(samples.batch(0, number)[:, :length]).flatten())


def describe_tokens(folder: Path, tokens_BS: Tensor) -> str:
    """Describes samples for people, with the windows that they do not reach."""
    samples, length = tokens_BS.shape
    window = longest_window(read_config(folder))
    beyond = "" if length > window else f", none beyond the window of {window}"
    return f"{samples * length} tokens in samples of {length}{beyond}"


def _telling_length(folder: Path) -> int:
    config = read_config(folder)
    length = max(_LEAST_LENGTH, longest_window(config) + _BEYOND)
    return min(_LEAST_LENGTH if length > _MOST_LENGTH else length, context_length(config) or length)


def fits(*folders: Path) -> bool:
    """Tells whether each of some folders fits into free memory in fp32, with what loading it takes."""
    largest = max(sum(file.stat().st_size for file in weight_files(folder)) for folder in folders)
    # In fp32 beside the files' own dtype, and activations.
    return 3 * largest + _ACTIVATIONS < spare_bytes()


def _ids(folder: Path, data: DataConfig, number: int, trust: bool) -> list[int]:
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust)
    ids: list[int] = []
    for document in read_documents(data, lambda line: None):
        ids += encode_texts(tokenizer, [document.text], special_tokens=True)[0]
        if len(ids) >= number:
            break
    return ids[:number]


def compare_folders(
    dense: Path, moe: Path, tokens_BS: Tensor, *, gradients: bool = False, trust_remote_code: bool = False
) -> EquivalenceReport:
    """Loads both in fp32, one after the other, and compares them; by block where they do not fit into memory.

    Args:
        dense: The dense checkpoint.
        moe: The MoE model: a native class of transformers or Graft's own format.
        tokens_BS: Real tokens.
        gradients: Whether to compare the gradients of the parameters that both have, too.
        trust_remote_code: Whether the models may run code of their own.
    """
    whole = gradients or fits(dense, moe)
    evaluate = partial(_evaluate, gradients=gradients) if whole else _evaluate_by_block
    dense_logits, dense_grads, dense_dtype = evaluate(dense, tokens_BS, trust=trust_remote_code)
    moe_logits, moe_grads, moe_dtype = evaluate(moe, tokens_BS, trust=trust_remote_code)
    if dense_logits.shape != moe_logits.shape:
        rule = f"their vocabularies have {dense_logits.shape[-1]} and {moe_logits.shape[-1]} entries"
        raise ModelError.one("--moe", str(moe), rule, "Give the dense checkpoint that it was made from.")
    lower = max(dense_dtype, moe_dtype, key=lambda dtype: -dtype.itemsize)
    return EquivalenceReport(
        logits=logit_drift(dense_logits, moe_logits),
        gradients=_gradient_drift(dense_grads, moe_grads) if gradients else None,
        dtype=lower,
        tokens=tokens_BS.numel(),
        loader=WHOLE if whole else BY_BLOCK,
    )


def load_any(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a folder as its users do: Graft's own format, or one that transformers knows."""
    from transformers import AutoModelForCausalLM

    if read_config(folder, "checkpoint").get("model_type") == MODEL_TYPE:
        return load_graft(folder, trust_remote_code=trust_remote_code).module.eval()
    config = load_config(folder, trust_remote_code=trust_remote_code, option="checkpoint")
    with library_reads("checkpoint", folder, "Give a complete checkpoint.", "load it"):
        # Not by our reader, which is what is judged.
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=trusts(folder, trust_remote_code),
        ).eval()


@torch.no_grad()
def _evaluate_by_block(folder: Path, tokens_BS: Tensor, *, trust: bool) -> _Evaluated:
    native = read_config(folder, "checkpoint").get("model_type") != MODEL_TYPE
    opened = DenseUnread if native else GraftUnread
    model = ReadBack(opened(folder, trust_remote_code=trust), 0).model
    stored = [each.spec for each in DenseFiles(folder).tensors.values() if each.spec.dtype.is_floating_point]
    dtype = min((spec.dtype for spec in stored if len(spec.shape) > 1), key=lambda d: d.itemsize)
    return model(input_ids=tokens_BS).logits, {}, dtype


def _evaluate(folder: Path, tokens_BS: Tensor, *, gradients: bool, trust: bool) -> _Evaluated:
    model = load_any(folder, trust_remote_code=trust)
    require_finite(model, folder, "checkpoint")
    dtype = min((p.dtype for p in model.parameters() if p.dim() > 1), key=lambda d: d.itemsize)
    model = model.float()
    found: dict[str, Tensor] = {}
    rows = []
    with torch.set_grad_enabled(gradients):
        for row in tokens_BS.split(1):
            logits = model(input_ids=row, use_cache=False).logits
            rows.append(logits.detach())
            if gradients:
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:])
                (loss / len(tokens_BS)).backward()
    if gradients:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(rows), found, dtype


def _gradient_drift(dense: dict[str, Tensor], moe: dict[str, Tensor]) -> dict[str, float]:
    common = [name for name in dense if name in moe and dense[name].shape == moe[name].shape]
    drift = {
        name: float((dense[name] - moe[name]).abs().max() / dense[name].abs().max().clamp_min(1e-30))
        for name in common
    }
    return dict(sorted(drift.items(), key=lambda item: -item[1]))
