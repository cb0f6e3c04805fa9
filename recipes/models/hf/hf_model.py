"""A transformers decoder as a run uses it: loading, its routed layers, and the context that routers see.

Attention, norms, embeddings and generation stay transformers' own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.attention.routed_attention import AttentionMoE, attention_layers
from moe.errors import ModelError
from moe.layer import MoELayer, moe_layers
from moe.routing.top_k_schedule import TopKSchedule
from moe.types import RouterContext
from recipes.models.hf.config_file import library_reads, load_config, trusts
from recipes.models.hf.deferred_init import WeightSource
from recipes.models.hf.finite_weights import require_finite

# Left over from versions of transformers that saved them; every reader computes them anew.
_LEFTOVERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def is_leftover(name: str) -> bool:
    """Tells whether a tensor in files is one that old versions saved and every reader computes anew."""
    return _LEFTOVERS.search(name) is not None


@dataclass
class HFModel:
    """Decoder of transformers with the state that routers and engines need.

    Attributes:
        module: The decoder; its feed-forward networks may have become `MoELayer`s.
        folder: The checkpoint it was loaded from.
        source_dtype: Dtype of that checkpoint's weights.
        context: The run as routers see it; filled before every forward pass.
        schedule: Schedule of the number of experts per token; None if it is constant.
        weights: Source of deferred parameters; None if all parameters have memory.
        trust_remote_code: Whether the checkpoint's code may run, so that an export carries it.
    """

    module: Any
    folder: Path
    source_dtype: torch.dtype
    context: RouterContext = field(default_factory=RouterContext)
    schedule: TopKSchedule | None = None
    weights: WeightSource | None = None
    trust_remote_code: bool = False
    _real_BS: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.module.register_forward_pre_hook(self._fill_context, with_kwargs=True)

    @property
    def config(self) -> Any:
        """The config of the decoder."""
        return self.module.config

    def moe_layers(self) -> list[tuple[int, MoELayer]]:
        """Returns block index and MoE layer, in order."""
        return [(layer.context.layer_index, layer) for _, layer in moe_layers(self.module)]

    def attention_layers(self) -> list[tuple[int, AttentionMoE]]:
        """Returns block index and layer of attention experts, in order."""
        return [(layer.context.layer_index, layer) for _, layer in attention_layers(self.module)]

    def routed_layers(self) -> list[MoELayer | AttentionMoE]:
        """Returns all layers with a router."""
        moe_blocks: list[MoELayer | AttentionMoE] = [layer for _, layer in self.moe_layers()]
        return moe_blocks + [layer for _, layer in self.attention_layers()]

    @contextmanager
    def padded(self, real_BS: Tensor | None) -> Iterator[None]:
        """While open, forward passes take their padding from a mask, and not from the attention mask.

        Args:
            real_BS: ``[B, S]`` bool, True where a token is real; None leaves it to the attention mask.
        """
        self._real_BS = real_BS
        try:
            yield
        finally:
            self._real_BS = None

    def _fill_context(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.schedule is not None:
            self.context.top_k = self.schedule.at(self.context.step)
        self.context.token_ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask") if self._real_BS is None else self._real_BS
        self.context.padding_mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def source_dtype(config: Any) -> torch.dtype:
    """Returns the dtype that a config of transformers names, fp32 where it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def load_model(folder: Path, *, trust_remote_code: bool = False) -> HFModel:
    """Loads a decoder in fp32 on the CPU: master weights are fp32; lower precision is up to the engine.

    Raises:
        ModelError: transformers does not know the model, or the files lack some of its weights.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    remedy = "Check that the folder is complete and that this version of transformers knows the model."
    with library_reads("dense", folder, remedy, "load it"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=trusts(folder, trust_remote_code),
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        rule = f"{len(missing)} weights are missing from its files, {missing[0]} the first"
        raise ModelError.one("dense", str(folder), rule, "Download the checkpoint again.")
    unexpected = sorted(name for name in info["unexpected_keys"] if not is_leftover(name))
    if unexpected:
        rule = (
            f"its files hold {len(unexpected)} weights that config.json has no place for, {unexpected[0]} the"
        )
        raise ModelError.one("dense", str(folder), f"{rule} first", "Give the config.json of these weights.")
    require_finite(model, folder, "dense")
    model.config.use_cache = False
    dtype = source_dtype(config)
    return HFModel(module=model, folder=folder, source_dtype=dtype, trust_remote_code=trust_remote_code)


def empty_copy(model: HFModel) -> HFModel:
    """Returns a copy of a model whose tensors have shapes but no memory."""
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
        for param in model.module.parameters()
    }
    if model.weights is not None:
        # A skeleton is never filled.
        memo[id(model.weights)] = None
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.module.buffers()}
    return copy.deepcopy(model, memo)
