"""Stand-ins for what runs on GPUs alone: TransformerEngine's grouped product, and DeepEP's buffers.

They keep the contracts that megatron-core calls by, written plainly over torch and gloo, and stand where
megatron-core looks for the packages. All above them is Megatron's own: its wrappers of TransformerEngine, its
``TEGroupedMLP``, its flex dispatcher with both managers, its autograd functions around DeepEP.

What they cannot show: that the packages keep these contracts, and that their kernels are right.

Letters: T tokens, E experts of all ranks, L of one, K slots a token, R rows received, D width, W ranks.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """For ``transformer_engine.pytorch.GroupedLinear``: a product for each of several groups of rows."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not (bias or return_bias or fuse_wgrad_accumulation) and tp_size == 1
        self.num_gemms = num_gemms
        for i in range(num_gemms):
            weight = torch.empty(out_features, in_features, device=device, dtype=params_dtype)
            setattr(self, f"weight{i}", nn.Parameter(weight))

    def forward(self, rows: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        """Group after group, so many rows each."""
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms, m_splits
        assert rows.dtype == self.weight0.dtype, (rows.dtype, self.weight0.dtype)
        groups = enumerate(rows.split(m_splits))
        return torch.cat([F.linear(group, getattr(self, f"weight{i}")) for i, group in groups])


class Event:
    """For ``EventHandle`` and ``EventOverlap``: everything has happened already."""

    def __init__(self, event: Any = None) -> None:
        pass

    def current_stream_wait(self) -> None:
        """Nothing to wait for."""


class _Size:
    """Of memory to send through."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        """Bytes."""
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        """Bytes."""
        return 0


def _travel(tensor: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """An all-to-all of rows; counts by rank."""
    out = tensor.new_empty(sum(received), *tensor.shape[1:])
    dist.all_to_all_single(out, tensor.contiguous(), received, sent, group=group)
    return out


class _Route:
    """Which tokens go to which ranks, a token once to each; its reverse adds up what comes back."""

    def __init__(self, goes_TW: Tensor, group: Any) -> None:
        self.group = group
        self.tokens = len(goes_TW)
        # By rank, and within it by token.
        self.ids = torch.cat([goes.nonzero()[:, 0] for goes in goes_TW.unbind(1)])
        mine_W = goes_TW.sum(0)
        theirs_WW = [torch.empty_like(mine_W) for _ in range(group.size())]
        dist.all_gather(theirs_WW, mine_W, group=group)
        self.sent = mine_W.tolist()
        self.received = [int(counts[group.rank()]) for counts in theirs_WW]

    def there(self, rows: Tensor) -> Tensor:
        return _travel(rows, self.sent, self.received, self.group)

    def back(self, rows: Tensor) -> Tensor:
        home = _travel(rows, self.received, self.sent, self.group)
        return rows.new_zeros(self.tokens, *rows.shape[1:]).index_add(0, self.ids, home)


class Buffer:
    """For ``deep_ep.Buffer``."""

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(count: int) -> None:
        """An even number of multiprocessors."""
        assert count % 2 == 0, count

    @staticmethod
    def get_dispatch_config(ranks: int) -> _Size:
        """For groups of some sizes."""
        assert ranks in (2, 4, 8), f"Unsupported number of EP ranks: {ranks}"
        return _Size()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **asynchronous: Any) -> tuple[Any, ...]:
        """Counts of tokens by rank and expert, and which token goes to which rank."""
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        ranks = self.group.size()
        chosen_TE = torch.zeros(len(topk_idx), num_experts + 1, dtype=torch.bool)
        # What is -1 falls into a column past the last.
        chosen_TE.scatter_(1, topk_idx.where(topk_idx >= 0, num_experts), True)
        chosen_TE = chosen_TE[:, :num_experts]
        goes_TW = chosen_TE.unflatten(1, (ranks, -1)).any(2)
        return goes_TW.sum(0), None, chosen_TE.sum(0), goes_TW, Event()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Any, ...]:
        """Rows, indices among the experts of this rank (-1: of others), weights, counts."""
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return handle.there(x[handle.ids]), None, None, None, None, Event()
        assert topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        assert topk_weights.dtype == torch.float32 and num_tokens_per_expert is not None
        route = _Route(is_token_in_rank, self.group)
        own = len(num_tokens_per_expert) // self.group.size()
        to_R = torch.arange(self.group.size()).repeat_interleave(torch.tensor(route.sent))
        local_RK = topk_idx[route.ids] - own * to_R[:, None]
        held_RK = (local_RK >= 0) & (local_RK < own) & (topk_idx[route.ids] >= 0)
        idx_RK = route.there(local_RK.where(held_RK, -1))
        weights_RK = route.there(topk_weights[route.ids].where(held_RK, 0.0))
        counts = [int((idx_RK == expert).sum()) for expert in range(own)]
        return route.there(x[route.ids]), idx_RK, weights_RK, counts, route, Event()

    def combine(
        self, x: Tensor, handle: _Route, topk_weights: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None, Event]:
        """Sums over ranks, of rows and of weights."""
        return handle.back(x), None if topk_weights is None else handle.back(topk_weights), Event()


class HybridEPBuffer:
    """For ``deep_ep.HybridEPBuffer``: rows arrive sorted by expert, one for each pair."""

    def __init__(self, group: Any, num_local_experts: int, **sizes: Any) -> None:
        self.group, self.own = group, num_local_experts

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        scaling_factor: None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        handle: Any = None,
        **unused: Any,
    ) -> tuple[Any, ...]:
        """Rows, weights, no scales, counts of this rank's experts, and what leads back."""
        if handle is None:
            assert routing_map is not None and probs is not None and probs.dtype == torch.float32
            route = _Route(routing_map.unflatten(1, (self.group.size(), self.own)).any(2), self.group)
            mine_RE = route.there(routing_map[route.ids].to(torch.uint8)).bool()
            handle = (route, self._own(mine_RE))
        route, map_RL = handle
        expert, row = map_RL.t().nonzero().unbind(1)
        rows = route.there(hidden[route.ids])[row]
        weights = None if probs is None else self._own(route.there(probs[route.ids]))[row, expert]
        return rows, weights, None, map_RL.sum(0), handle

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None = None, handle: Any, pad_multiple: None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over experts and ranks; weights become a matrix of tokens by experts again."""
        route, map_RL = handle
        expert, row = map_RL.t().nonzero().unbind(1)
        rows = hidden.new_zeros(len(map_RL), *hidden.shape[1:]).index_add(0, row, hidden)
        if probs is None:
            return route.back(rows), None
        weights_RE = probs.new_zeros(len(map_RL), self.group.size() * self.own)
        weights_RE[row, expert + self.own * self.group.rank()] = probs
        return route.back(rows), route.back(weights_RE)

    def _own(self, values_RE: Tensor) -> Tensor:
        return values_RE[:, self.own * self.group.rank() : self.own * (self.group.rank() + 1)]


@contextmanager
def standing_in(engine: Mapping[str, Any]) -> Iterator[None]:
    """While open, megatron-core finds what an engine of these settings asks for.

    What it would compile is run as it is written.
    """
    with ExitStack() as stack:
        if engine.get("experts") == "te":
            stack.enter_context(_transformer_engine())
        if engine.get("dispatcher") in ("deepep", "hybridep"):
            stack.enter_context(_deep_ep())
        with torch.compiler.set_stance("force_eager"):
            yield


@contextmanager
def _transformer_engine() -> Iterator[None]:
    """Megatron's wrappers as it defines them where TransformerEngine is installed, over the stand-in."""
    # Before: all else in it is to find that there is none.
    others = ("transformer.attention", "transformer.transformer_layer", "transformer.moe.moe_layer")
    for name in ("distributed", "models.gpt", "optimizer", "pipeline_parallel", *others):
        importlib.import_module(f"megatron.core.{name}")
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine as wrappers

    package = MagicMock(__version__="2.4.0")
    package.pytorch.GroupedLinear = GroupedLinear
    modules = {"": package, ".pytorch": package.pytorch, ".pytorch.fp8": package.pytorch.fp8}
    found = {f"transformer_engine{name}": module for name, module in modules.items()}
    with patch.dict(sys.modules, found), patch.object(utils, "_te_version", None):
        assert wrappers.__file__ is not None
        spec = importlib.util.spec_from_file_location("megatron_wrappers", wrappers.__file__)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        names = ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")
        with patch.multiple(wrappers, **{name: getattr(copy, name) for name in names}):
            yield


@contextmanager
def _deep_ep() -> Iterator[None]:
    """Megatron's functions as it defines them where DeepEP is installed, over the stand-ins."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    package, events = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.__dict__.update(Buffer=Buffer, HybridEPBuffer=HybridEPBuffer, utils=events)
    events.__dict__.update(EventHandle=Event, EventOverlap=Event)
    names = ("fused_dispatch", "fused_combine", "set_deepep_num_sms")
    names += ("hybrid_ep_dispatch", "hybrid_ep_combine")
    try:
        with patch.dict(sys.modules, {"deep_ep": package, "deep_ep.utils": events}):
            importlib.reload(fused_a2a)
            with patch.multiple(token_dispatcher, **{name: getattr(fused_a2a, name) for name in names}):
                yield
    finally:
        importlib.reload(fused_a2a)
