"""Weights of a host in Megatron's GPT model, and back under the host's names.

Megatron stores several of the host's tensors in one parameter (queries, keys and values of a group side by
side, gate above up), and cuts them over ranks. A `Part` says which rows of a parameter are which block of
which of the host's tensors; everything that goes in or out is written in those terms.

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
from recipes.engines.megatron.rank_groups import Over, ParallelDims, Places
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.ranks import Ranks

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a parameter that are a block of one of the host's tensors.

    Attributes:
        name: Of the host's tensor.
        shape: Of all of it.
        offset: Where the block begins in it.
        size: Of the block.
        start: The parameter's first row of the block.
        rows: How many rows of the parameter it takes; the last block of a parameter without axes is 1.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    start: int
    rows: int

    def of(self, parameter: Tensor) -> Tensor:
        """The block, as a view of the memory of something shaped like the parameter."""
        whole = parameter if parameter.ndim else parameter.view(1)
        return whole[self.start : self.start + self.rows].view(self.size)


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter or buffer that this rank holds, and what it is made of.

    Attributes:
        tensor: Live.
        parts: Of all of its rows.
        over: The ranks that hold all of it between them: those of ``tensor`` cut it, those of ``expert`` hold
            other experts, and of ``none`` each holds all.
    """

    tensor: Tensor
    parts: tuple[Part, ...]
    over: Over = "none"


def model_tensors(model: HFModel) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that are part of the state, by name."""
    tensors: dict[str, Tensor] = {name: p.data for name, p in model.module.named_parameters()}
    every = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    return tensors | {k: v for k, v in model.module.state_dict().items() if k not in every}


def cut_experts(
    layer: MoELayer, places: Places, layout: ParallelDims, device: torch.device, dtype: torch.dtype
) -> None:
    """Leaves one of the host's layers room for this rank's slice of the experts, and lets tokens travel."""
    make_room(layer.experts, device, dtype, layer.router.num_experts // layout.expert)
    if layout.expert > 1:
        layer.set_dispatcher(AllToAllDispatcher(layer.router.num_experts, places.expert_group))


def make_room(module: nn.Module, device: torch.device, dtype: torch.dtype, rows: int | None = None) -> None:
    """Gives a module parameters of its own, that are not filled yet.

    Args:
        module: Without children.
        device: Of what is made.
        dtype: Of what is made.
        rows: Of the first axis of each; None for all.
    """
    for name, whole in list(module.named_parameters()):
        shape = whole.shape if rows is None else (rows, *whole.shape[1:])
        part = torch.empty(shape, device=device, dtype=dtype)
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def mark_parameters(held: Sequence[Held], layout: ParallelDims) -> None:
    """Tells Megatron which gradients are summed over which ranks, where its own layers do not."""
    for each in held:
        tensor: Any = each.tensor
        # The norm counts the rest on the first tensor-parallel rank alone.
        tensor.tensor_model_parallel = each.over != "none"
        tensor.sequence_parallel = layout.sequence and each.over == "none"
        if each.over == "expert":
            # Ranks that hold the same expert are those of the expert-data-parallel group.
            tensor.allreduce = layout.expert == layout.tensor == 1


def empty_model(model: HFModel, live: Sequence[Tensor]) -> None:
    """Frees the host's own weights; names and shapes stay, and so does what the GPT model uses itself."""
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
class Blocks:
    """What this rank holds of one of the host's tensors, which may be nothing.

    Attributes:
        shape: Of all of it.
        like: A tensor of its dtype and device.
        over: See `Held`.
        sharded: Whether the ranks that hold the same parameters have divided them between them as well.
        shards: Where what is held lies, and its memory.
    """

    shape: tuple[int, ...]
    like: Tensor
    over: Over
    sharded: bool
    shards: tuple[LocalShard, ...]


def placed(blocks: Mapping[str, Blocks]) -> dict[str, Placed]:
    """The same in the words of checkpoints and sources of weights; without what this rank has nothing of."""
    held = {name: LocalBlocks(own.shape, own.shards) for name, own in blocks.items() if own.shards}
    return {name: place(name, value) for name, value in held.items()}


def live_blocks(held: Sequence[Held]) -> dict[str, Blocks]:
    """The memory of parameters and buffers, by the host's names."""
    found: dict[str, Blocks] = {}
    for each in held:
        for part in each.parts:
            shard = LocalShard(part.of(each.tensor.data), part.shape, part.offset)
            before = found[part.name].shards if part.name in found else ()
            found[part.name] = Blocks(part.shape, each.tensor.data, each.over, False, (*before, shard))
    return found


@torch.no_grad()
def gathered(
    blocks: Mapping[str, Blocks], places: Places, names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the host in full, on every rank, in the order of their names. Collective."""
    stages, pipeline = whereabouts(blocks, places), places.pipeline_group
    for name in names:
        where = stages[name]
        if where.stage == places.stage:
            whole = _assembled(blocks[name], places)
        else:
            whole = torch.empty(where.shape, dtype=where.dtype, device=device)
        if pipeline.size() > 1:
            source = torch.distributed.get_global_rank(pipeline, where.stage)
            torch.distributed.broadcast(whole, source, group=pipeline)
        yield name, whole


def _assembled(own: Blocks, places: Places) -> Tensor:
    """All of a tensor that the ranks of this stage hold. Collective among them."""
    whole = torch.zeros(own.shape, dtype=own.like.dtype, device=own.like.device)
    for shard in own.shards:
        box(whole, shard.offset, shard.tensor.shape).copy_(shard.tensor)
    # Each element is held by one rank of a group: all others add 0.
    for group in places.holders(own.over, own.sharded):
        if group.size() > 1:
            torch.distributed.all_reduce(whole, group=group)
    return whole


@dataclass(frozen=True)
class Whereabouts:
    """The stage that holds one of the host's tensors, the first of several, and what it is."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def whereabouts(blocks: Mapping[str, Blocks], places: Places) -> dict[str, Whereabouts]:
    """Where every tensor is, by name. Collective.

    Args:
        blocks: What this rank's stage holds.
        places: Of this rank.
    """
    own = {name: [list(each.shape), str(each.like.dtype)] for name, each in blocks.items()}
    found: dict[str, Whereabouts] = {}
    for stage, held in enumerate(Ranks(places.pipeline_group).gather(own)):
        for name, (shape, dtype) in held.items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            found.setdefault(name, Whereabouts(stage, tuple(shape), kind))
    return found


def box(tensor: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """A block of a tensor, as a view."""
    axes = zip(offset, size, strict=True)
    return tensor[tuple(slice(low, low + length) for low, length in axes)]


def find_parts(gpt: Any, model: HFModel, places: Places, layout: ParallelDims) -> list[Held]:
    """What every parameter of this rank's stage of a GPT model is made of.

    Args:
        gpt: From `recipes.engines.megatron.gpt_model.build_gpt`.
        model: The same that it was built from; its weights may be emptied already.
        places: Of this rank.
        layout: Of all.
    """
    shape = read_shape(model.config.to_dict())
    cut = _Cut(shape, places.tensor, layout.tensor)
    held = []
    if gpt.pre_process:
        held.append(cut.rows(gpt.embedding.word_embeddings.weight, _EMBEDDING, shape.vocabulary))
    moe_blocks = {layer.context.layer_index: (name, layer) for name, layer in moe_layers(model.module)}
    for block in gpt.decoder.layers:
        index = block.layer_number - 1
        prefix = f"model.layers.{index}"
        held += cut.attention(block.self_attention, f"{prefix}.self_attn")
        if index in moe_blocks:
            held += _moe(block.mlp, gpt.expert_kind, *moe_blocks[index], places, layout)
        else:
            held += cut.network(block.mlp, f"{prefix}.mlp")
        held.append(_same(block.input_layernorm.weight, f"{prefix}.input_layernorm.weight"))
        held.append(_same(block.pre_mlp_layernorm.weight, f"{prefix}.post_attention_layernorm.weight"))
    if gpt.post_process:
        held.append(_same(gpt.decoder.final_layernorm.weight, "model.norm.weight"))
    if gpt.post_process and not (shape.tied and gpt.pre_process):
        # The last stage has a copy of an embedding that is tied and lies in the first.
        name = _EMBEDDING if shape.tied else "lm_head.weight"
        held.append(cut.rows(gpt.output_layer.weight, name, shape.vocabulary))
    return held


def _same(tensor: Tensor, name: str) -> Held:
    """A tensor that is the host's, whole."""
    size = tuple(tensor.shape)
    return Held(tensor, (Part(name, size, (0,) * len(size), size, 0, size[0] if size else 1),))


@dataclass(frozen=True)
class _Cut:
    """How the matrices of a shape are cut: part ``rank`` of ``ranks``."""

    shape: GPTShape
    rank: int
    ranks: int

    def rows(self, tensor: Tensor, name: str, total: int) -> Held:
        """A matrix whose rows are cut."""
        rows, *rest = tensor.shape
        assert rows * self.ranks == total, (name, rows, self.ranks, total)
        return Held(tensor, (self._block(name, (total, *rest), rows * self.rank, rows, 0),), "tensor")

    def columns(self, tensor: Tensor, name: str) -> Held:
        """A matrix whose columns are cut."""
        rows, columns = tensor.shape
        whole = (rows, columns * self.ranks)
        part = Part(name, whole, (0, columns * self.rank), (rows, columns), 0, rows)
        return Held(tensor, (part,), "tensor")

    def _block(self, name: str, whole: tuple[int, ...], offset: int, rows: int, start: int) -> Part:
        rest = whole[1:]
        return Part(name, whole, (offset, *(0 for _ in rest)), (rows, *rest), start, rows)

    def attention(self, module: Any, prefix: str) -> list[Held]:
        """Projections, and the norms of queries and keys."""
        kinds = ["weight"] + ["bias"] * self.shape.qkv_bias
        held = [self._qkv(getattr(module.linear_qkv, kind), prefix, kind) for kind in kinds]
        held.append(self.columns(module.linear_proj.weight, f"{prefix}.o_proj.weight"))
        if self.shape.qk_norm:
            held.append(_same(module.q_layernorm.weight, f"{prefix}.q_norm.weight"))
            held.append(_same(module.k_layernorm.weight, f"{prefix}.k_norm.weight"))
        return held

    def _qkv(self, tensor: Tensor, prefix: str, kind: str) -> Held:
        """Group by group: its queries, its key, its value."""
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
        return Held(tensor, tuple(parts), "tensor")

    def network(self, module: Any, prefix: str) -> list[Held]:
        """A dense feed-forward network: gate above up."""
        up = module.linear_fc1.weight
        rows, total = up.shape[0] // 2, self.shape.ffn_width
        whole = (total, up.shape[1])
        names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        parts = tuple(
            self._block(name, whole, rows * self.rank, rows, rows * i) for i, name in enumerate(names)
        )
        return [
            Held(up, parts, "tensor"),
            self.columns(module.linear_fc2.weight, f"{prefix}.down_proj.weight"),
        ]


def _moe(
    module: Any, kind: ExpertKind, prefix: str, layer: Any, places: Places, layout: ParallelDims
) -> list[Held]:
    """Router, experts and shared expert of a layer."""
    held = [_same(p, f"{prefix}.router.{name}") for name, p in layer.router.named_parameters()]
    every = {name for name, _ in layer.router.named_parameters()}
    buffers = {k: v for k, v in layer.router.state_dict(keep_vars=True).items() if k not in every}
    held += [_same(buffer, f"{prefix}.router.{name}") for name, buffer in buffers.items()]
    count = layer.router.num_experts // layout.expert
    first = count * places.expert
    for each in kind.tensors(module.experts):
        at = (f"{prefix}.experts.{each.name}", first + each.first, layer.router.num_experts)
        held.append(_slice(each.tensor, *at) if each.stacked else _one_expert(each.tensor, *at))
    if layer.shared is not None:
        held += [_same(p, f"{prefix}.shared.{name}") for name, p in layer.shared.named_parameters()]
    return held


def _slice(tensor: Tensor, name: str, first: int, total: int) -> Held:
    """Some experts of a stack."""
    count, *rest = tensor.shape
    zeros = (0,) * len(rest)
    part = Part(name, (total, *rest), (first, *zeros), (count, *rest), 0, count)
    return Held(tensor, (part,), over="expert")


def _one_expert(tensor: Tensor, name: str, index: int, total: int) -> Held:
    """An expert that is a matrix of its own."""
    rows, columns = tensor.shape
    part = Part(name, (total, rows, columns), (index, 0, 0), (1, rows, columns), 0, rows)
    return Held(tensor, (part,), over="expert")
