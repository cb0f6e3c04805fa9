"""Exact parameter counts: of a live module, and of a shape.

Letters: E experts of a layer, K experts a token uses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from moe.accounting.shape import DenseFFNShape, ModelShape


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, each shared tensor counted once.

    Attributes:
        total: All.
        active: Those a token uses: of the routed experts K in E, and all others. Embeddings and head are
            included; published counts differ in this (Mixtral counts both, DeepSeek and gpt-oss only one).
        embedding: Input embeddings, of which a token uses one row. A tied one serves as the head as well.
        matmul: Those a token is multiplied by: active weights with two or more axes, without an embedding
            that is only looked up. Two FLOPs each.
        routed: All routed experts together.
        per_expert: One routed expert of the first mixture of experts; 0 in a dense model.
    """

    total: int
    active: int
    embedding: int
    matmul: int
    routed: int = 0
    per_expert: int = 0


@dataclass(frozen=True)
class ExpertModule:
    """The routed experts of one layer.

    Attributes:
        name: Name of ``experts`` in the model.
        experts: Holds parameters stacked ``[E, ...]``, or is a `torch.nn.ModuleList` of E like modules.
        num_experts: E.
        top_k: K, as a mean where it varies from token to token.
    """

    name: str
    experts: nn.Module
    num_experts: int
    top_k: int


def expert_modules(model: nn.Module) -> Iterator[ExpertModule]:
    """Finds the routed experts of a model by what their layers look like.

    A mixture of experts is a module with a child ``experts`` and a child ``router`` (in transformers:
    ``gate``). ``num_experts`` and ``top_k`` are looked for on the router, then the module, then ``experts``.

    Raises:
        ValueError: A module has ``experts`` but says not how many of them a token uses.
    """
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        router = getattr(module, "router", getattr(module, "gate", None))
        places = (router, module, experts)
        num_experts, top_k = _first_int(places, "num_experts"), _first_int(places, "top_k")
        if num_experts is None or top_k is None:
            raise ValueError(
                f"{name or 'the model'} has experts, but its router has no num_experts and top_k, so "
                "active parameters cannot be counted. Give the router these two attributes."
            )
        yield ExpertModule(f"{name}.experts".lstrip("."), experts, num_experts, top_k)


def _first_int(places: tuple[object, ...], key: str) -> int | None:
    values = (getattr(place, key, None) for place in places)
    return next((value for value in values if isinstance(value, int)), None)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a live module, on any device (meta too), sharded or not.

    A DTensor counts in full. Experts that are spread over ranks without DTensor must be counted before.

    Raises:
        ValueError: The experts of a layer cannot be told apart: see `expert_modules`, or a parameter of them
            is not stacked over all E.
    """
    looked_up = _embeddings_only_looked_up(model)
    embeddings = _embeddings(model)
    shares: dict[int, _Share] = {}
    per_expert = 0
    for found in expert_modules(model):
        shares |= _shares(found)
        per_expert = per_expert or sum(p.numel() for p in found.experts.parameters()) // found.num_experts
    total = active = embedding = matmul = routed = 0
    for param in model.parameters():  # each shared tensor once
        share = shares.get(id(param), _Share())
        size, used = param.numel(), param.numel() // share.of * share.used
        total += size
        active += used
        routed += size if id(param) in shares else 0
        embedding += size if id(param) in embeddings else 0
        if id(param) not in looked_up and param.ndim - share.stacked >= 2:
            matmul += used
    return ParameterCount(total, active, embedding, matmul, routed, per_expert)


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _embeddings_only_looked_up(model: nn.Module) -> set[int]:
    """Embeddings that no module but embeddings holds: what is tied to a head is multiplied as well."""
    holders: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            holders[id(param)].append(module)
    return {key for key, modules in holders.items() if all(isinstance(m, nn.Embedding) for m in modules)}


class _Share(NamedTuple):
    """A token uses ``used`` in ``of`` of a parameter, which is or is not ``stacked`` over experts."""

    used: int = 1
    of: int = 1
    stacked: bool = False


def _shares(found: ExpertModule) -> dict[int, _Share]:
    """By the ``id`` of each of a layer's expert parameters."""
    E, K = found.num_experts, found.top_k
    if isinstance(found.experts, nn.ModuleList):
        sizes = {sum(p.numel() for p in expert.parameters()) for expert in found.experts}
        if len(found.experts) != E or len(sizes) != 1:
            raise ValueError(
                f"{found.name} holds {len(found.experts)} experts of {len(sizes)} sizes, its router knows "
                f"{E}. Count the model before its experts are spread over ranks."
            )
        # all are alike, so that any K of them will do
        return {
            id(param): _Share(used=index < K)
            for index, expert in enumerate(found.experts)
            for param in expert.parameters()
        }
    for param in found.experts.parameters():
        if param.ndim == 0 or param.shape[0] != E:
            raise ValueError(
                f"{found.name} has a parameter of shape {tuple(param.shape)}, which is not stacked over its "
                f"router's {E} experts. Count the model before its experts are spread over ranks."
            )
    return {id(param): _Share(K, E, stacked=True) for param in found.experts.parameters()}


def count_from_shape(shape: ModelShape) -> ParameterCount:
    """Counts what `count_parameters` counts, from the shape alone."""
    width = shape.hidden_size
    embedding = shape.vocab_size * width
    vectors = width  # the last norm
    matmul, unused, routed, per_expert = embedding, 0, 0, 0  # the head
    for layer in shape.layers:
        matmul += layer.attention.matrix_parameters(width)
        vectors += layer.attention.vector_parameters(width) + layer.num_norms * width
        ffn = layer.ffn
        if isinstance(ffn, DenseFFNShape):
            matmul += ffn.matrix_parameters(width)
            vectors += ffn.vector_parameters(width)
            continue
        one_matrix, one_vector = ffn.expert.matrix_parameters(width), ffn.expert.vector_parameters(width)
        matmul += ffn.always_matrix_parameters(width) + ffn.top_k * one_matrix
        vectors += ffn.top_k * one_vector
        unused += (ffn.num_experts - ffn.top_k) * (one_matrix + one_vector)
        routed += ffn.num_experts * (one_matrix + one_vector)
        per_expert = per_expert or one_matrix + one_vector
    active = matmul + vectors + (0 if shape.tied_embeddings else embedding)
    return ParameterCount(active + unused, active, embedding, matmul, routed, per_expert)
