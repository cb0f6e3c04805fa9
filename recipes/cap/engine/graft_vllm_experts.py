"""Extension of vLLM's workers that records forward passes: their requests, and the experts of every layer.

It runs in vLLM's own environment, without Graft. Start the server with this folder on PYTHONPATH,
``--worker-extension-cls graft_vllm_experts.ExpertRecorder``, ``--enforce-eager`` and VLLM_SERVER_DEV_MODE=1,
which opens the endpoint ``/collective_rpc``: keep such a server to yourself.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class ExpertRecorder:
    """Methods that vLLM adds to its worker; a reply has ``error`` where it cannot record."""

    def graft_begin_record(self) -> dict[str, Any]:
        """Begins to record, and forgets what was recorded; tells the experts of every MoE layer."""
        worker: Any = self
        record = getattr(worker, "_graft_record", None)
        if record is None:
            found = _Record(worker)
            if found.error is not None:
                return {"error": found.error}
            worker._graft_record = record = found
            record.install()
        record.passes.clear()
        return {"layers": record.layers, "experts": record.experts}

    def graft_end_record(self) -> dict[str, Any]:
        """Ends the record and returns its passes, in order.

        A pass has the time of its start in seconds, its requests, each with its name, the tokens before the
        pass and those in it, and the experts of each layer: bits of a hexadecimal number.
        """
        record = getattr(self, "_graft_record", None)
        if record is None:
            return {"error": "no record was begun"}
        record.uninstall()
        del self._graft_record
        return {"passes": [_described(one) for one in record.passes]}


class _Pass:
    """A forward pass: its start, its requests, and a row of marks for each layer."""

    def __init__(self, requests: list[list[Any]], layers: int, experts: int, device: Any) -> None:
        self.start = time.perf_counter()
        self.requests = requests
        self.tokens = sum(tokens for _, _, tokens in requests)
        self.marks_LE = torch.zeros(layers, experts, dtype=torch.uint8, device=device)
        self.rows = [0] * layers

    def mark(self, layer: int, ids_TK: torch.Tensor) -> None:
        """Marks the experts of a layer; rows behind the tokens of the pass are padding."""
        real_TK = ids_TK[: max(0, self.tokens - self.rows[layer])]
        self.rows[layer] += ids_TK.shape[0]
        self.marks_LE[layer].index_fill_(0, real_TK.reshape(-1).long(), 1)


class _Record:
    """Record of a worker's passes."""

    def __init__(self, worker: Any) -> None:
        self.runner = worker.model_runner
        self.routers = [
            (_block(name), module.router)
            for name, module in self.runner.get_model().named_modules()
            if hasattr(getattr(module, "router", None), "set_capture_fn")
        ]
        self.layers = [block for block, _ in self.routers]
        self.experts = [router.global_num_experts for _, router in self.routers]
        self.passes: list[_Pass] = []
        self._current: _Pass | None = None
        self.error = self._unfit(worker.vllm_config)

    def _unfit(self, config: Any) -> str | None:
        parallel = config.parallel_config
        if not config.model_config.enforce_eager:
            return "compiled passes do not call it; start the server with --enforce-eager"
        if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
            return "pipeline or data-parallel ranks divide its passes; serve with tensor parallelism alone"
        if not self.routers:
            return "the model has no MoE layer whose router it knows"
        if any(router.capture_fn is not None for _, router in self.routers):
            return "something else reads the routers (--enable-return-routed-experts); leave it out"
        return None

    def install(self) -> None:
        """Sees every pass of the runner from now on."""
        compute, device = self.runner.execute_model, next(self.runner.get_model().parameters()).device

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            self._current = None
            if scheduled.total_num_scheduled_tokens:
                self._current = _Pass(_requests(scheduled), len(self.layers), max(self.experts), device)
                self.passes.append(self._current)
            return compute(scheduled, *args, **kwargs)

        self.runner.execute_model = execute_model
        for place, (_, router) in enumerate(self.routers):
            router.set_capture_fn(lambda ids_TK, place=place: self._mark(place, ids_TK))

    def uninstall(self) -> None:
        """Leaves the runner as it was."""
        del self.runner.execute_model
        for _, router in self.routers:
            router.set_capture_fn(None)

    def _mark(self, place: int, ids_TK: torch.Tensor) -> None:
        if self._current is not None:
            self._current.mark(place, ids_TK)


def _block(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _requests(scheduled: Any) -> list[list[Any]]:
    """Returns name, tokens before the pass and tokens in it of every request."""
    cached = scheduled.scheduled_cached_reqs
    before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    before |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    return [[name, before[name], tokens] for name, tokens in scheduled.num_scheduled_tokens.items()]


def _described(one: _Pass) -> dict[str, Any]:
    rows = one.marks_LE.flip(1).cpu().tolist()
    seen = min(one.rows) >= one.tokens
    masks = [f"{int(''.join(map(str, row)), 2):x}" for row in rows] if seen else None
    return {"start": one.start, "requests": one.requests, "experts": masks}
