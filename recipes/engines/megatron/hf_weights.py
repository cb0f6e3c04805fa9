"""Weights of a transformers model in Megatron's GPT model, and back.

Megatron stores several tensors of the transformers model in one parameter (queries, keys and values of a
group side by side, gate above up), and shards them over ranks. A `RowBlock` maps rows of a parameter to a
block of a tensor; everything that goes in or out is described by such blocks. Names are always those of
transformers.

Letters: E experts, U rows of an expert's up projection, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch.all_to_all import AllToAllDispatcher
from moe.layer import MoELayer, moe_layers
from recipes.checkpoint import LocalBlocks, LocalShard
from recipes.checkpoint.shard_layout import Placed, place
from recipes.engines.megatron.expert_kinds import ExpertKind
from recipes.engines.megatron.gpt_shape import GPTShape, read_shape
from recipes.engines.megatron.rank_groups import MegatronDims, RankGroups, ShardAxis
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.ranks import Ranks

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a Megatron parameter that are a block of one tensor.

    Attributes:
        name: Name of the tensor.
        shape: Full shape of the tensor.
        offset: Where the block begins in the tensor.
        size: Shape of the block.
        start: First row of the block in the parameter.
        rows: Number of rows of the parameter; 1 for a parameter without axes.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    rows: int

    def of(self, parameter: Tensor) -> Tensor:
        """Returns the block as a view of a tensor that is shaped like the parameter."""
        whole = parameter if parameter.ndim else parameter.view(1)
        return whole[self.start : self.start + self.rows].view(self.size)


@dataclass(frozen=True, eq=False)
class LocalParameter:
    """Parameter or buffer of this rank, and the blocks of tensors that it consists of.

    Attributes:
        tensor: The live parameter.
        blocks: Blocks that cover all of its rows.
        sharded_over: Axis of ranks over which the tensors are sharded; ``none`` if each rank holds all of it.
    """

    tensor: Tensor
    blocks: tuple[RowBlock, ...]
    sharded_over: ShardAxis = "none"


def shard_experts(
    layer: MoELayer, groups: RankGroups, dims: MegatronDims, device: torch.device, dtype: torch.dtype
) -> None:
    """Replaces a layer's experts by this rank's slice, unfilled, and sends their tokens by all-to-all."""
    allocate(layer.experts, device, dtype, layer.router.num_experts // dims.ep)
    if dims.ep > 1:
        layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, groups.ep_group))


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype, rows: int | None = None) -> None:
    """Allocates the parameters of a module, unfilled.

    Args:
        module: A module without children.
        device: Device of the new parameters.
        dtype: Dtype of the new parameters.
        rows: Their size along the first axis; None keeps it.
    """
    for name, whole in list(module.named_parameters()):
        shape = whole.shape if rows is None else (rows, *whole.shape[1:])
        part = torch.empty(shape, device=device, dtype=dtype)
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def mark_parameters(local: Sequence[LocalParameter], dims: MegatronDims) -> None:
    """Marks parameters for Megatron's reductions of gradients and norms, as its own layers mark theirs."""
    for each in local:
        tensor: Any = each.tensor
        # The norm counts all others on the first tensor-parallel rank alone.
        tensor.tensor_model_parallel = each.sharded_over != "none"
        tensor.sequence_parallel = dims.sequence_parallel and each.sharded_over == "none"
        if each.sharded_over == "expert":
            # Its gradient is reduced over the expert-data-parallel group.
            tensor.allreduce = dims.ep == dims.tp == 1


def empty_model(model: HFModel, live: Sequence[Tensor]) -> None:
    """Frees the weights of the transformers model, except those that the GPT model uses itself.

    Names and shapes stay.
    """
    kept = {id(tensor) for tensor in live}
    # Tied parameters stay one.
    emptied = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.module.parameters()
        if id(p) not in kept
    }
    for module in model.module.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in emptied:
                module._parameters[name] = emptied[id(parameter)]


@dataclass(frozen=True, eq=False)
class LocalTensor:
    """Shards that this rank holds of a tensor, which may be none.

    Attributes:
        shape: Full shape of the tensor.
        like: A tensor of its dtype and device.
        sharded_over: See `LocalParameter`.
        sharded: Whether the ranks that hold the same parameters have divided them further.
        shards: The shards, with their places in the tensor.
    """

    shape: tuple[int, ...]
    like: Tensor
    sharded_over: ShardAxis
    sharded: bool
    shards: tuple[LocalShard, ...]


def placed(blocks: Mapping[str, LocalTensor]) -> dict[str, Placed]:
    """Converts tensors to the form of checkpoints and weight sources; without those that have no shard."""
    local = {name: LocalBlocks(own.shape, own.shards) for name, own in blocks.items() if own.shards}
    return {name: place(name, value) for name, value in local.items()}


def live_tensors(local: Sequence[LocalParameter]) -> dict[str, LocalTensor]:
    """Returns the tensors whose shards are the memory of parameters and buffers, by name."""
    found: dict[str, LocalTensor] = {}
    for each in local:
        data = each.tensor.data
        for block in each.blocks:
            shard = LocalShard(block.of(data), block.shape, block.offset)
            before = found[block.name].shards if block.name in found else ()
            found[block.name] = LocalTensor(block.shape, data, each.sharded_over, False, (*before, shard))
    return found


@torch.no_grad()
def gathered(
    blocks: Mapping[str, LocalTensor], groups: RankGroups, names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors in full on every rank, in the order of ``names``. Collective."""
    stages, pipeline = locate(blocks, groups), groups.pp_group
    for name in names:
        where = stages[name]
        if where.stage == groups.stage:
            whole = _assembled(blocks[name], groups)
        else:
            whole = torch.empty(where.shape, dtype=where.dtype, device=device)
        if pipeline.size() > 1:
            source = torch.distributed.get_global_rank(pipeline, where.stage)
            torch.distributed.broadcast(whole, source, group=pipeline)
        yield name, whole


def _assembled(own: LocalTensor, groups: RankGroups) -> Tensor:
    """Returns a tensor that the ranks of this stage hold, in full. Collective among them."""
    whole = torch.zeros(own.shape, dtype=own.like.dtype, device=own.like.device)
    for shard in own.shards:
        box(whole, shard.offset, shard.tensor.shape).copy_(shard.tensor)
    # One rank of a group holds each element: all others add 0.
    for group in groups.holders(own.sharded_over, own.sharded):
        if group.size() > 1:
            torch.distributed.all_reduce(whole, group=group)
    return whole


@dataclass(frozen=True)
class StageTensor:
    """Shape and dtype of a tensor, and the first pipeline stage that holds it."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate(blocks: Mapping[str, LocalTensor], groups: RankGroups) -> dict[str, StageTensor]:
    """Finds the stage of every tensor, by name. Collective.

    Args:
        blocks: The tensors of this rank's stage.
        groups: Groups of this rank.
    """
    own = {name: [list(each.shape), str(each.like.dtype)] for name, each in blocks.items()}
    found: dict[str, StageTensor] = {}
    for stage, tensors in enumerate(Ranks(groups.pp_group).gather(own)):
        for name, (shape, dtype) in tensors.items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            found.setdefault(name, StageTensor(stage, tuple(shape), kind))
    return found


def box(tensor: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """Returns a block of a tensor as a view."""
    axes = zip(offset, size, strict=True)
    return tensor[tuple(slice(low, low + length) for low, length in axes)]


def local_parameters(
    gpt: Any, kind: ExpertKind, model: HFModel, groups: RankGroups, dims: MegatronDims
) -> list[LocalParameter]:
    """Maps every parameter of this rank's stage of a GPT model to blocks of tensors.

    Args:
        gpt: From `recipes.engines.megatron.gpt_model.build_gpt`.
        kind: The kind of its experts.
        model: The model that it was built from; its weights may be freed already.
        groups: Groups of this rank.
        dims: Layout of the ranks.
    """
    shape = read_shape(model.config.to_dict())
    sharding = _Sharding(shape, groups.tp_rank, dims.tp)
    local = []
    if gpt.pre_process:
        local.append(sharding.rows(gpt.embedding.word_embeddings.weight, _EMBEDDING, shape.vocabulary))
    moe_blocks = {layer.context.layer_index: (name, layer) for name, layer in moe_layers(model.module)}
    for block in gpt.decoder.layers:
        index = block.layer_number - 1
        prefix = f"model.layers.{index}"
        local += sharding.attention(block.self_attention, f"{prefix}.self_attn")
        if index in moe_blocks:
            local += _moe(block.mlp, kind, *moe_blocks[index], groups, dims)
        else:
            local += sharding.network(block.mlp, f"{prefix}.mlp")
        local.append(_single(block.input_layernorm.weight, f"{prefix}.input_layernorm.weight"))
        local.append(_single(block.pre_mlp_layernorm.weight, f"{prefix}.post_attention_layernorm.weight"))
    if gpt.post_process:
        local.append(_single(gpt.decoder.final_layernorm.weight, "model.norm.weight"))
    if gpt.post_process and not (shape.tied and gpt.pre_process):
        # The last stage has a copy of a tied embedding of the first.
        name = _EMBEDDING if shape.tied else "lm_head.weight"
        local.append(sharding.rows(gpt.output_layer.weight, name, shape.vocabulary))
    return local


def _single(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...] | None = None,
    axis: int = 0,
    first: int = 0,
    sharded_over: ShardAxis = "none",
) -> LocalParameter:
    """Maps a parameter that is one block of a tensor, or all of it.

    Args:
        tensor: The parameter.
        name: Name of the tensor.
        shape: Full shape of the tensor; None for that of the parameter. With one axis more than the parameter
            has, the parameter is a single row.
        axis: Axis along which the tensor is sharded.
        first: Where the block begins along this axis.
        sharded_over: See `LocalParameter`.
    """
    own = tuple(tensor.shape)
    full = own if shape is None else shape
    size = own if len(full) == len(own) else (1, *own)
    offset = tuple(first if i == axis else 0 for i in range(len(size)))
    block = RowBlock(name, full, offset, size, 0, own[0] if own else 1)
    return LocalParameter(tensor, (block,), sharded_over)


@dataclass(frozen=True)
class _Sharding:
    """Tensor-parallel sharding of the matrices of a shape: part ``rank`` of ``ranks``."""

    shape: GPTShape
    rank: int
    ranks: int

    def rows(self, tensor: Tensor, name: str, total: int) -> LocalParameter:
        """Maps a matrix that is sharded by rows."""
        rows, *rest = tensor.shape
        assert rows * self.ranks == total, (name, rows, self.ranks, total)
        return _single(tensor, name, (total, *rest), 0, rows * self.rank, "tensor")

    def columns(self, tensor: Tensor, name: str) -> LocalParameter:
        """Maps a matrix that is sharded by columns."""
        rows, columns = tensor.shape
        return _single(tensor, name, (rows, columns * self.ranks), 1, columns * self.rank, "tensor")

    def _block(self, name: str, whole: tuple[int, ...], offset: int, rows: int, start: int) -> RowBlock:
        rest = whole[1:]
        return RowBlock(name, whole, (offset, *(0 for _ in rest)), (rows, *rest), start, rows)

    def attention(self, module: Any, prefix: str) -> list[LocalParameter]:
        """Maps the projections, and the norms of queries and keys."""
        kinds = ["weight"] + ["bias"] * self.shape.qkv_bias
        local = [self._qkv(getattr(module.linear_qkv, kind), prefix, kind) for kind in kinds]
        local.append(self.columns(module.linear_proj.weight, f"{prefix}.o_proj.weight"))
        if self.shape.qk_norm:
            local.append(_single(module.q_layernorm.weight, f"{prefix}.q_norm.weight"))
            local.append(_single(module.k_layernorm.weight, f"{prefix}.k_norm.weight"))
        return local

    def _qkv(self, tensor: Tensor, prefix: str, kind: str) -> LocalParameter:
        """Maps the joint projection, which has the queries, the key and the value of each group in turn."""
        width, rest = self.shape.head_dim, tuple(tensor.shape[1:])
        queries = self.shape.heads // self.shape.kv_heads
        groups = self.shape.kv_heads // self.ranks
        parts = []
        for group in range(groups):
            whole_group = self.rank * groups + group
            start = group * (queries + 2) * width
            for letter, heads, behind in (("q", queries, 0), ("k", 1, queries), ("v", 1, queries + 1)):
                whole = (self.shape.kv_heads * heads * width, *rest)
                name, rows = f"{prefix}.{letter}_proj.{kind}", heads * width
                parts.append(self._block(name, whole, whole_group * rows, rows, start + behind * width))
        return LocalParameter(tensor, tuple(parts), "tensor")

    def network(self, module: Any, prefix: str) -> list[LocalParameter]:
        """Maps a dense feed-forward network, with gate above up."""
        up = module.linear_fc1.weight
        rows, total = up.shape[0] // 2, self.shape.ffn_width
        whole = (total, up.shape[1])
        names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        parts = tuple(
            self._block(name, whole, rows * self.rank, rows, rows * i) for i, name in enumerate(names)
        )
        return [
            LocalParameter(up, parts, "tensor"),
            self.columns(module.linear_fc2.weight, f"{prefix}.down_proj.weight"),
        ]


def _moe(
    module: Any, kind: ExpertKind, prefix: str, layer: Any, groups: RankGroups, dims: MegatronDims
) -> list[LocalParameter]:
    """Maps router, experts and shared expert of a layer."""
    local = [_single(p, f"{prefix}.router.{name}") for name, p in layer.router.named_parameters()]
    every = {name for name, _ in layer.router.named_parameters()}
    buffers = {k: v for k, v in layer.router.state_dict(keep_vars=True).items() if k not in every}
    local += [_single(buffer, f"{prefix}.router.{name}") for name, buffer in buffers.items()]
    count = layer.router.num_experts // dims.ep
    first = count * groups.ep_rank
    for each in kind.tensors(module.experts):
        rest = each.tensor.shape[1:] if each.stacked else each.tensor.shape
        name, shape = f"{prefix}.experts.{each.name}", (layer.router.num_experts, *rest)
        local.append(_single(each.tensor, name, shape, 0, first + each.first, "expert"))
    if layer.shared is not None:
        local += [_single(p, f"{prefix}.shared.{name}") for name, p in layer.shared.named_parameters()]
    return local
