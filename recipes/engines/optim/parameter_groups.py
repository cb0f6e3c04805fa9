"""Groups of parameters by their purpose, which decides how the optimizer treats them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn


def group_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Sorts the parameters that require gradients into groups, by their purpose.

    A module declares the purpose of its parameters, and of those below it, by an attribute
    ``parameter_role``: ``router``, ``expert`` (stacks ``[E, out, in]`` and biases ``[E, out]``) or ``head``.
    Input embeddings are recognised by `torch.nn.Embedding`, the head of a transformers model by
    ``get_output_embeddings``. The rest is sorted by its number of axes: ``vectors`` (norms, biases),
    ``matrices`` and ``tensors`` (more axes). A tied embedding counts as an embedding.

    Returns:
        Names of the parameters by group, each parameter once.

    Raises:
        ValueError: A ``parameter_role`` that is none of the three.
    """
    roles: dict[int, str] = {}
    embeddings: set[int] = set()
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if isinstance(head, nn.Module):
        roles.update((id(param), "head") for param in head.parameters())
    for name, module in model.named_modules():
        role = getattr(module, "parameter_role", None)
        if role not in (None, "router", "expert", "head"):
            raise ValueError(f"{name}.parameter_role={role!r} must be router, expert or head. Correct it.")
        if role is not None:
            roles.update((id(param), role) for param in module.parameters())
        if isinstance(module, nn.Embedding):
            embeddings.add(id(module.weight))
    groups: dict[str, list[str]] = defaultdict(list)
    for name, param in model.named_parameters():
        if param.requires_grad:
            groups[_group_of(param, roles.get(id(param)), id(param) in embeddings)].append(name)
    return dict(groups)


def _group_of(param: Tensor, role: str | None, is_embedding: bool) -> str:
    if role == "router":
        return "router"
    if role == "expert":
        return "experts" if param.ndim >= 3 else "expert_biases"
    if param.ndim <= 1:
        return "vectors"
    if is_embedding:
        return "embeddings"
    if role == "head":
        return "head"
    return "matrices" if param.ndim == 2 else "tensors"


def fused_rows(model: nn.Module) -> dict[int, int]:
    """Finds parameters that store equal matrices one above the other, e.g. gate above up projection.

    A module declares them by an attribute ``fused_rows``, which maps the name of one of its own parameters to
    the number of matrices in it. Muon orthogonalises them separately.

    Returns:
        Number of matrices by ``id`` of the parameter.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        declared = getattr(module, "fused_rows", None)
        if isinstance(declared, Mapping):
            found |= {id(getattr(module, name)): count for name, count in declared.items()}
    return found
