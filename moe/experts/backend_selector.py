"""Choice of the back end that computes a layer's experts, cached by device, dtype and size of the batch."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from kernels.backend import Workload
from kernels.expert_mlp import Choice, choose_backend, few_products

_LOG = logging.getLogger("graft.experts")


class BackendSelector:
    """Back ends chosen for the experts of one layer.

    Attributes:
        backend: A name of `kernels.expert_mlp.BACKENDS`, or ``auto``.
        last: The latest choice, with its reason; None before the first.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.last: Choice | None = None
        self._choices: dict[tuple[torch.device, torch.dtype, bool], Choice] = {}
        self._accumulates: dict[tuple[torch.device, torch.dtype], bool] = {}

    def choose(self, work: Workload) -> Choice:
        """Returns the back end for a workload."""
        key = (work.device, work.dtype, few_products(work))
        if key not in self._choices:
            choice = self._choices[key] = choose_backend(work, self.backend)
            # Only at debug level: the run logs the choice of its first layer once, at info level.
            if not torch.compiler.is_compiling():
                _LOG.debug("experts run on %s: %s", choice.backend.name, choice.reason)
        self.last = self._choices[key]
        return self.last

    def accumulates(self, work: Workload) -> bool:
        """Returns True if the chosen back end can add gradients to buffers; the choice ignores this."""
        key = (work.device, work.dtype)
        if key not in self._accumulates:
            reason = self.choose(work).backend.unsupported_reason(replace(work, accumulates=True))
            self._accumulates[key] = reason is None
            if reason is not None:
                _LOG.debug("gradients of experts are returned, not added in fp32: %s", reason)
        return self._accumulates[key]
