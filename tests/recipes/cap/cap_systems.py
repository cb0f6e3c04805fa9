"""Systems that tests run: every mixture of transformers, Graft's own; and who reads their experts.

Letters: B sequences, S tokens, E experts, K experts a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.routers import router_class
from moe.upcycle.configs.copies_config import CopyConfig
from recipes.cap.folders import Source
from recipes.cap.loading import System, load_system
from recipes.upcycling.convert.conversion import convert
from recipes.upcycling.convert.conversion_plan import ConversionRequest, plan_conversion
from tests.conftest import MakeCheckpoint

CPU = torch.device("cpu")
_MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# Widths that grouped products take: multiples of 16 bytes.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "gpt_oss": {**_MIXTRAL, "head_dim": 8, "sliding_window": 3},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": {**_QWEN, "decoder_sparse_step": 2, "head_dim": 8},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v2": {**_DEEPSEEK, **_LATENT, "n_shared_experts": 2},
    "deepseek_v3": {**_DEEPSEEK, **_LATENT, "n_shared_experts": 1},
    "glm4_moe": {**_DEEPSEEK, "n_shared_experts": 1, "head_dim": 8},
    "llama4_text": {
        **_MIXTRAL,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
    },
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 3,
        "mamba_dt_rank": 4,
    },
}


def some_ids(sequences: int, length: int, seed: int = 0) -> Tensor:
    """``[B, S]`` ids."""
    return torch.randint(3, 300, (sequences, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, **options: Any) -> System:
    """A folder on the CPU."""
    return load_system(folder.name, Source(folder, folder), CPU, **options)


def graft_moe(
    make_checkpoint: MakeCheckpoint, out: Path, router: str = "topk", target: str = "graft"
) -> Path:
    """Copies of a Llama under a router, written as the converter does."""
    dense = make_checkpoint("llama")
    config = router_class(router).config_class(name=router)
    request = ConversionRequest(dense=dense, method=CopyConfig(num_experts=4), router=config, target=target)
    convert(plan_conversion(request), out)
    return out


class ReadExperts(TorchDispatchMode):
    """Which matrices of stacked experts are operands of products, by where they lie in memory."""

    def __init__(self, stacks: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._stacks = {p.untyped_storage().data_ptr(): (name, p) for name, p in stacks.items()}
        self.read: dict[str, set[int]] = {name: set() for name in stacks}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if all(operand.numel() for operand in operands):
                self._note(operands)
        return func(*args, **(kwargs or {}))

    def _note(self, operands: list[Tensor]) -> None:
        for operand in operands:
            name, stack = self._stacks.get(operand.untyped_storage().data_ptr(), ("", None))
            if stack is not None and operand.dim() == 2 and operand.numel() == stack[0].numel():
                self.read[name].add(operand.storage_offset() // stack[0].numel())

    def bytes(self) -> int:
        """Of all that were read, each once."""
        sizes = {name: stack[0].numel() * stack.element_size() for name, stack in self._stacks.values()}
        return sum(len(experts) * sizes[name] for name, experts in self.read.items())
