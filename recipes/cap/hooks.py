"""Counts the distinct experts of every layer and pass on the device, without synchronising.

Hooks read the input of the experts: the top-k indices of transformers' classes, the plan of Graft's layer.
They see the experts that compute, after capacity, masks and groups. Every layer of a pass marks its
experts in one buffer; the buffer is read once, at the end.

Letters: P passes, L MoE layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe.accounting.attention_experts import moe_blocks
from moe.accounting.distinct import DistinctExperts, traced_distinct
from moe.accounting.layers import ModelShape
from moe.attention.routed_attention import AttentionMoE, by_expert
from moe.errors import ModelError
from moe.layer import MoELayer

_INDEX_NAMES = ("top_k_index", "router_indices")


@dataclass(frozen=True)
class Site:
    """Module at which the experts of one MoE layer can be watched.

    Attributes:
        name: Name of the watched module.
        module: That module.
        num_experts: E.
        kind: ``indices`` (transformers' experts, given top-k indices), ``scores`` (Llama 4's router, whose
            zeros are experts not chosen), ``plan`` (Graft's experts) or ``routing`` (a router of Graft's
            attention experts).
    """

    name: str
    module: nn.Module
    num_experts: int
    kind: str


def find_sites(model: nn.Module) -> list[Site]:
    """Finds every MoE layer of a model, of transformers or Graft: networks first, then attention."""
    sites, heads = [], []
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, AttentionMoE):
            inside = f"{name}."
            heads.append(Site(f"{name}.router", module.router, module.router.num_experts, "routing"))
            continue
        if isinstance(module, MoELayer):
            inside = f"{name}."
            sites.append(Site(f"{name}.experts", module.experts, module.router.num_experts, "plan"))
            continue
        num_experts = getattr(module, "num_experts", None)
        if not isinstance(num_experts, int):
            continue
        if set(_INDEX_NAMES) & set(inspect.signature(type(module).forward).parameters):
            sites.append(Site(name, module, num_experts, "indices"))
        elif type(module).__name__ == "Llama4Router":
            sites.append(Site(name, module, num_experts, "scores"))
    return sites + heads


def check_sites(sites: Sequence[Site], shape: ModelShape, folder: str) -> None:
    """Checks that the MoE layers that can be watched are those that the accounting knows.

    Raises:
        ModelError: They differ; counts would be assigned to the wrong layers.
    """
    found, known = [site.num_experts for site in sites], [one.num_experts for one in moe_blocks(shape)]
    if found != known:
        rule = f"its modules have MoE layers of {found} experts, its config describes {known}"
        raise ModelError.one("FOLDER", folder, rule, "Watch it with a class that recipes/cap/hooks.py knows.")


class ExpertTrace:
    """Marks which experts of which layer a pass used, while it is entered.

    Usage: ``with ExpertTrace(sites, passes, device) as trace``, `next_pass` before every forward pass,
    `distinct` after the last.
    """

    def __init__(self, sites: Sequence[Site], passes: int, device: torch.device) -> None:
        self.sites = tuple(sites)
        most = max((site.num_experts for site in sites), default=0)
        # One place past the last expert: what transformers' routers give slots of another rank.
        self._used_PLE = torch.zeros(passes, len(sites), most + 1, dtype=torch.uint8, device=device)
        self._rows: tuple[Tensor, ...] = ()
        self._pass = -1
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Registers the hooks."""
        for layer, site in enumerate(self.sites):
            self._handles.append(self._register(layer, site))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def next_pass(self) -> None:
        """Marks the start of a forward pass."""
        self._pass += 1
        self._rows = self._used_PLE[self._pass].unbind(0)

    def distinct(self) -> list[DistinctExperts]:
        """Returns the distinct experts of every pass so far, in one copy from the device."""
        used_PLE = self._used_PLE[: self._pass + 1].cpu()
        limits = [site.num_experts for site in self.sites]
        return [
            traced_distinct([row[:most].tolist() for row, most in zip(used_LE, limits, strict=True)])
            for used_LE in used_PLE
        ]

    def _register(self, layer: int, site: Site) -> RemovableHandle:
        if site.kind == "scores":
            return site.module.register_forward_hook(
                lambda module, args, output: self._mark_used(layer, output[0].flatten(0, -2).gt(0).any(0))
            )
        if site.kind == "routing":
            return site.module.register_forward_hook(
                lambda module, args, output: self._mark_used(layer, by_expert(output)[1].any(0))
            )
        if site.kind == "plan":
            return site.module.register_forward_pre_hook(
                lambda module, args: self._mark_used(layer, args[0].plan.counts_E > 0)
            )
        names = tuple(inspect.signature(type(site.module).forward).parameters)
        name = next(name for name in _INDEX_NAMES if name in names)
        place = names.index(name) - 1  # without self

        def mark(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            ids_TK = args[place] if len(args) > place else kwargs[name]
            self._rows[layer].scatter_(0, ids_TK.reshape(-1), 1)

        return site.module.register_forward_pre_hook(mark, with_kwargs=True)

    def _mark_used(self, layer: int, used_E: Tensor) -> None:
        self._rows[layer][: used_E.shape[0]].copy_(used_E)
