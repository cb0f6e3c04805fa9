"""Measures whether a model keeps the documents packed in a sample apart, before anything expensive starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import Mistake, ModelError, UserError
from recipes.data.config import DataConfig
from recipes.data.samples import begins_document
from recipes.models.hf.config_file import library_reads, load_config, trusts
from recipes.models.hf.document_inputs import document_inputs
from recipes.models.hf.ffn_names import narrow

_PATH, _OFF = (
    "data.document_mask",
    "Set data.document_mask=false to let the documents of a sample see one another.",
)
# Documents of several lengths in two rows, with boundaries at different places.
_LENGTHS = ((3, 4, 1), (2, 1, 5))
_SMALL = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def check_documents(data: DataConfig, dense: Path, *, trust_remote_code: bool = False) -> list[Mistake]:
    """Checks that a model keeps documents apart if it is to; runs a few blocks of it with random weights.

    Args:
        data: The data config.
        dense: The dense checkpoint, of which ``config.json`` is read.
        trust_remote_code: Whether it may run code of its own.
    """
    if not data.document_mask:
        return []
    try:
        model = _few_blocks(dense, trust_remote_code)
        name, attention = model.config.model_type, model.config._attn_implementation or "its own"
        if "flash" not in attention:  # which runs on a GPU alone
            _require_finite(model, dense)
    except UserError as error:
        return list(error.mistakes)
    if "flash" in attention:
        rule = f"{attention} attention of {name} knows documents in batches of one sample only"
    elif not keeps_apart(model):
        rule = f"with {attention} attention a token of {name} sees the other documents of its sample"
    else:
        return []
    return [Mistake(_PATH, True, rule, _OFF)]


def _require_finite(model: Any, dense: Path) -> None:
    """Checks that a config has numbers with which a model of small random weights computes numbers.

    Raises:
        ModelError: Its logits are infinite, or none.
    """
    ids_BS, positions_BS = _documents()
    try:
        logits_BSV = _run(model, ids_BS, document_inputs(model, positions_BS))[0]
    except (TypeError, ValueError):
        return  # the comparison says what it does not take
    if not logits_BSV.isfinite().all():
        rule = "with its config.json even small weights give logits that are not finite"
        remedy = "Correct it (rms_norm_eps, rope_theta): give the one that the model was published with."
        raise ModelError.one("dense", str(dense), rule, remedy)


def keeps_apart(model: Any) -> bool:
    """Returns True if documents are exactly nothing to one another, and each is computed as when it is alone.

    Of every document in a batch of two samples, the gradient of its logits by the embeddings of all other
    tokens must be 0.0, and that by its own must not.

    Args:
        model: A decoder of transformers, with its weights. They get no gradients.
    """
    ids_BS, positions_BS = _documents()
    try:
        logits_BSV, embedded_BSD = _run(model, ids_BS, document_inputs(model, positions_BS))
        number_BS = begins_document(positions_BS).flatten().cumsum(0).view_as(ids_BS)
        return all(
            _is_alone(model, ids_BS, number_BS == number, logits_BSV, embedded_BSD)
            for number in number_BS.unique()
        )
    except (TypeError, ValueError):
        return False  # it takes no positions, or no mask


def _documents() -> tuple[Tensor, Tensor]:
    """Returns ids and positions of two samples of several documents."""
    positions_BS = torch.tensor([[i for n in row for i in range(n)] for row in _LENGTHS])
    return torch.arange(positions_BS.numel()).view_as(positions_BS) % _SMALL["vocab_size"], positions_BS


def _is_alone(model: Any, ids_BS: Tensor, own_BS: Tensor, logits_BSV: Tensor, embedded_BSD: Tensor) -> bool:
    out_TV = logits_BSV[own_BS]
    (grad_BSD,) = torch.autograd.grad(out_TV.square().sum(), embedded_BSD, retain_graph=True)
    alone_TV = _run(model, ids_BS[own_BS][None], {})[0][0]
    same = torch.allclose(alone_TV, out_TV, rtol=1e-4, atol=1e-4 * float(out_TV.detach().abs().max()))
    return same and bool((grad_BSD[~own_BS] == 0).all() and (grad_BSD[own_BS] != 0).any())


def _run(model: Any, ids_BS: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the logits of tokens and their embeddings, by which the logits have gradients."""
    found: list[Tensor] = []

    def begin(module: Any, args: Any, out: Tensor) -> Tensor:
        found.append(out.detach().requires_grad_())
        return found[0]

    hook = model.get_input_embeddings().register_forward_hook(begin)
    try:
        logits_BSV = model(input_ids=ids_BS, use_cache=False, **inputs).logits
    finally:
        hook.remove()
    return logits_BSV, found[0]


def _few_blocks(folder: Path, trust_remote_code: bool) -> Any:
    """Builds the model, narrow, with a small vocabulary and blocks of all the kinds that it has."""
    from transformers import AutoModelForCausalLM

    small = load_config(folder, trust_remote_code=trust_remote_code)
    text = small.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["all alike"]
    narrow(text, 1 + max(kinds.index(kind) for kind in set(kinds)))
    for key, value in _SMALL.items():
        if isinstance(getattr(text, key, None), int):
            setattr(text, key, value)
    trust, remedy = trusts(folder, trust_remote_code), "Check config.json, and the version of transformers."
    with library_reads("dense", folder, remedy, "build it"), torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small, trust_remote_code=trust, dtype=torch.float32).eval()
