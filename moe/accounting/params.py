"""Exact parameter counts of a live module or of a shape.

Letters: E experts of a layer, K experts a token uses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from moe.accounting.attention_experts import AttentionExpertsShape
from moe.accounting.layers import DenseFFNShape, ModelShape
from moe.attention.routed_attention import AttentionExperts
from moe.errors import ConfigError

# Parameters with two axes that are no matrices: a state-space model's decay, a router's balancing bias.
ELEMENTWISE = frozenset({"A_log", "e_score_correction_bias"})


@dataclass(frozen=True)
class ParameterCount:
    """Counts of a model's parameters, each shared tensor counted once.

    Attributes:
        total: All parameters.
        active: Parameters that a token uses: K in E of the routed experts, and all others. Embeddings and
            head are included; published counts differ in this (Mixtral counts both, DeepSeek and gpt-oss only
            one).
        embedding: Input embeddings, of which a token uses one row. A tied one also serves as the head.
        matmul: Parameters that a token is multiplied by: active weights with two or more axes, without an
            embedding that is only looked up. Two FLOPs each.
        routed: All routed experts together, those of attention included.
        per_expert: One routed expert of the first MoE network; 0 without one.
        router: Matrices of the routers.
        looked_up: Embeddings that are only looked up: 0 if the one embedding is tied to the head.
        frozen: Part of ``matmul`` without gradient.
        head: The head, with its bias; only the bias if it is tied. None if a module does not tell which part
            the head is.
    """

    total: int
    active: int
    embedding: int
    matmul: int
    routed: int = 0
    per_expert: int = 0
    router: int = field(default=0, compare=False)
    looked_up: int = field(default=0, compare=False)
    frozen: int = field(default=0, compare=False)
    head: int | None = field(default=None, compare=False)

    @property
    def active_without_input_embedding(self) -> int:
        """Parameters that a decode step reads in full for one token, including a tied table as the head.

        DeepSeek and gpt-oss publish this; Mixtral, Qwen and OLMoE publish ``active``.
        """
        return self.active - self.looked_up

    @property
    def active_without_embeddings(self) -> int | None:
        """Active parameters of the layers and the last norm; None if the head is unknown."""
        return None if self.head is None else self.active - self.embedding - self.head


@dataclass(frozen=True)
class ExpertModule:
    """Routed experts of one layer.

    Attributes:
        name: Name of ``experts`` in the model.
        experts: Module with parameters stacked ``[E, ...]``, or a `torch.nn.ModuleList` of E equal modules.
        num_experts: E.
        top_k: K; the mean, where it varies from token to token.
        router: The router; None if the layer has no child of that name.
    """

    name: str
    experts: nn.Module
    num_experts: int
    top_k: int
    router: nn.Module | None = None


def expert_modules(model: nn.Module) -> Iterator[ExpertModule]:
    """Finds the routed experts of a model by the structure of their layers.

    An MoE block is a module with a child ``experts`` and a child ``router`` (in transformers: ``gate``), or
    one that holds stacked experts beside its router (JetMoE). ``num_experts`` and ``top_k`` are read from the
    router, else the module, else ``experts``.

    Raises:
        ValueError: A module has ``experts`` but does not tell how many of them a token uses.
        ConfigError: A token's active parameters do not follow from the module: some of the experts that it
            chooses compute nothing (LongCat), or experts are rows of embeddings (Doge).
    """
    for name, module in model.named_modules():
        _reject_uncountable(name, module)
    for name, module in model.named_modules():
        experts = module if _holds_stacks(module) else getattr(module, "experts", None)
        if not isinstance(experts, nn.Module) or (experts is not module and _holds_stacks(experts)):
            continue
        router = getattr(module, "router", getattr(module, "gate", None))
        places = (router, module, experts)
        num_experts, top_k = _first_int(places, "num_experts"), _first_int(places, "top_k")
        if num_experts is None or top_k is None:
            raise ValueError(
                f"{name or 'the model'} has experts, but its router has no num_experts and top_k, so "
                "active parameters cannot be counted. Give the router these two attributes."
            )
        router = router if isinstance(router, nn.Module) else None
        path = name if experts is module else f"{name}.experts".lstrip(".")
        yield ExpertModule(path, experts, num_experts, top_k, router)


def _holds_stacks(module: nn.Module) -> bool:
    """Returns True for a router with stacked experts beside it, not in a child ``experts``."""
    router = getattr(module, "router", None)
    E = getattr(router, "num_experts", None)
    if not isinstance(E, int) or not isinstance(router, nn.Module) or hasattr(module, "experts"):
        return False
    return any(param.ndim == 3 and len(param) == E for param in module.parameters())


def _reject_uncountable(name: str, module: nn.Module) -> None:
    remedy = "Take the active parameters that its authors publish."
    idle = getattr(module, "zero_expert_num", None)
    if idle:
        rule = "tokens also choose experts that compute nothing, so that the number of the others varies"
        raise ConfigError.one(f"{name}.zero_expert_num", idle, rule, remedy)
    if hasattr(module, "top_k") and any(isinstance(child, nn.Embedding) for child in module.children()):
        rule = "its experts are rows of embeddings, which cannot be told from other embeddings"
        raise ConfigError.one(name, type(module).__name__, rule, remedy)


def _first_int(places: tuple[object, ...], key: str) -> int | None:
    values = (getattr(place, key, None) for place in places)
    return next((value for value in values if isinstance(value, int)), None)


def count_parameters(model: nn.Module, top_k: Mapping[str, int] | None = None) -> ParameterCount:
    """Counts the parameters of a live module, on any device (meta too), sharded or not.

    A DTensor counts in full. Experts that are sharded without DTensor must be counted before.

    Args:
        model: The module.
        top_k: Experts per token by `ExpertModule.name`, where it differs from the router's number.

    Raises:
        ValueError: The experts of a layer cannot be separated: see `expert_modules`, or one of their
            parameters is not stacked over all E.
    """
    looked_up = _embeddings_only_looked_up(model)
    embeddings = _embeddings(model)
    shares: dict[int, _Share] = {}
    routers: set[int] = set()
    per_expert = 0
    for found in expert_modules(model):
        shares |= _shares(replace(found, top_k=(top_k or {}).get(found.name, found.top_k)))
        routers |= set() if found.router is None else {id(param) for param in found.router.parameters()}
        if not isinstance(found.experts, AttentionExperts) and "attention" not in found.name:
            size = sum(param.numel() for param in found.experts.parameters() if id(param) in shares)
            per_expert = per_expert or size // found.num_experts
    sums = dict.fromkeys(
        ("total", "active", "embedding", "matmul", "routed", "router", "looked_up", "frozen"), 0
    )
    for name, param in model.named_parameters():  # each shared tensor once
        share = shares.get(id(param), _Share())
        size, used = param.numel(), param.numel() // share.of * share.used
        is_matrix = param.ndim - share.stacked >= 2 and name.rpartition(".")[2] not in ELEMENTWISE
        sums["total"] += size
        sums["active"] += used
        sums["routed"] += size if id(param) in shares else 0
        sums["embedding"] += size if id(param) in embeddings else 0
        sums["looked_up"] += size if id(param) in looked_up else 0
        sums["matmul"] += used if is_matrix and id(param) not in looked_up else 0
        sums["frozen"] += used if is_matrix and not param.requires_grad and id(param) not in looked_up else 0
        sums["router"] += size if is_matrix and id(param) in routers else 0
    return ParameterCount(**sums, per_expert=per_expert, head=_head(model, embeddings))


def _head(model: nn.Module, embeddings: set[int]) -> int | None:
    """Returns the elements of the head beside a tied embedding, for models that tell which part it is."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if not isinstance(head, nn.Module):
        return None
    return sum(param.numel() for param in head.parameters() if id(param) not in embeddings)


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _embeddings_only_looked_up(model: nn.Module) -> set[int]:
    """Returns the embeddings that only embeddings hold; those tied to a head are multiplied, too."""
    holders: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            holders[id(param)].append(module)
    return {key for key, modules in holders.items() if all(isinstance(m, nn.Embedding) for m in modules)}


class _Share(NamedTuple):
    """Share ``used`` / ``of`` of a parameter that a token uses; ``stacked`` if it has an axis of experts."""

    used: int = 1
    of: int = 1
    stacked: bool = False


def _shares(found: ExpertModule) -> dict[int, _Share]:
    """Returns the share of each of a layer's expert parameters by ``id``."""
    E, K = found.num_experts, found.top_k
    if isinstance(found.experts, nn.ModuleList):
        sizes = {sum(p.numel() for p in expert.parameters()) for expert in found.experts}
        if len(found.experts) != E or len(sizes) != 1:
            raise ValueError(
                f"{found.name} holds {len(found.experts)} experts of {len(sizes)} sizes, its router knows "
                f"{E}. Count the model before its experts are sharded over ranks."
            )
        # all are equal, so that any K of them will do
        return {
            id(param): _Share(used=index < K)
            for index, expert in enumerate(found.experts)
            for param in expert.parameters()
        }
    routers = set() if found.router is None else {id(param) for param in found.router.parameters()}
    stacks = [param for param in found.experts.parameters() if id(param) not in routers]
    if _holds_stacks(found.experts):
        stacks = [param for param in stacks if param.ndim == 3]  # one bias is added for all
    for param in stacks:
        if param.ndim == 0 or param.shape[0] != E:
            raise ValueError(
                f"{found.name} has a parameter of shape {tuple(param.shape)}, which is not stacked over its "
                f"router's {E} experts. Count the model before its experts are sharded over ranks."
            )
    return {id(param): _Share(K, E, stacked=True) for param in stacks}


def count_from_shape(shape: ModelShape) -> ParameterCount:
    """Computes the result of `count_parameters` from the shape alone."""
    width = shape.hidden_size
    head_bias = shape.head_bias * shape.vocab_size
    vectors = shape.final_norms * width + head_bias
    matmul, unused, routed, per_expert, router = shape.embedding, 0, 0, 0, 0  # the head
    for layer in shape.layers:
        matmul += layer.attention.matrix_parameters(width)
        vectors += layer.attention.vector_parameters(width) + layer.norm_parameters(width)
        unused += layer.attention.idle_parameters(width)
        if isinstance(layer.attention, AttentionExpertsShape):
            mixer = layer.attention
            heads = mixer.expert_matrix_parameters(width) + mixer.expert_vector_parameters(width)
            routed += mixer.num_experts * heads
            router += mixer.router_matrix
        ffn = layer.ffn
        if isinstance(ffn, DenseFFNShape):
            matmul += ffn.matrix_parameters(width)
            vectors += ffn.vector_parameters(width)
            continue
        one_matrix, one_vector = ffn.expert.matrix_parameters(width), ffn.expert.vector_parameters(width)
        matmul += ffn.always_matrix_parameters(width) + ffn.top_k * one_matrix
        vectors += ffn.always_vector_parameters(width) + ffn.top_k * one_vector
        unused += (ffn.num_experts - ffn.top_k) * (one_matrix + one_vector)
        routed += ffn.num_experts * (one_matrix + one_vector)
        router += ffn.router_matrix_parameters(width)
        per_expert = per_expert or one_matrix + one_vector
    looked_up = 0 if shape.tied_embeddings else shape.embedding
    active = matmul + vectors + looked_up
    return ParameterCount(
        total=active + unused,
        active=active,
        embedding=shape.embedding,
        matmul=matmul,
        routed=routed,
        per_expert=per_expert,
        router=router,
        looked_up=looked_up,
        head=head_bias + looked_up,
    )
