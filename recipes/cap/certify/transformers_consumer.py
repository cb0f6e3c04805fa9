"""The export in transformers, loaded as anybody loads it.

Letters: S tokens of a sequence, K experts a token.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.cap.certify.base import Consumer
from recipes.cap.certify.observation import (
    Observation,
    Request,
    SequenceObservation,
    log_softmax,
    read_routing,
)
from recipes.cap.hooks import Site, find_sites
from recipes.models.hf.config_file import library_reads, trusts

_Routing = Mapping[int, tuple[np.ndarray, np.ndarray]]


class TransformersConsumer(Consumer):
    """transformers, in this environment."""

    name = "transformers"

    def observe(self, folder: Path, request: Request, scratch: Path) -> Observation:
        """See `Consumer.observe`."""
        import transformers

        remedy = "Does this version of transformers have its class?"
        with library_reads("MODEL", folder, remedy, "load the export"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=trusts(folder, self.places.trust_remote_code),
            ).eval()
        return observe_module(model, request, f"transformers {transformers.__version__}")


@torch.no_grad()
def observe_module(model: Any, request: Request, version: str) -> Observation:
    """Returns what a module with transformers' interface computes.

    Args:
        model: The module, in evaluation mode.
        request: The tokens.
        version: Name of what it is.
    """
    sites = [site for site in find_sites(model) if site.kind in ("indices", "plan")]
    found, greedy = [], []
    for number, tokens in enumerate(request.sequences):
        pinned = {} if request.pinned is None else read_routing(request.pinned, number)
        with _watched(model, sites, pinned) as routing:
            logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
        experts = {layer: ids for layer, (ids, _) in routing.items()}
        weights = {layer: weights for layer, (_, weights) in routing.items()}
        found.append(SequenceObservation(0, log_softmax(logits.float().numpy()), None, experts, weights))
        if request.new_tokens:
            greedy.append(_greedy(model, tokens[: request.prompt_length], request.new_tokens))
    return Observation(version, request.sequences, found, greedy)


def _greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@contextmanager
def _watched(
    model: Any, sites: Sequence[Site], pinned: _Routing
) -> Iterator[dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Yields the routing of the passes made while it is open, by block; pins some if told to."""
    routing: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    handles = [_watch(model, site, pinned, routing) for site in sites]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def _watch(
    model: Any, site: Site, pinned: _Routing, routing: dict[int, tuple[np.ndarray, np.ndarray]]
) -> Any:
    layer = int(re.findall(r"\.(\d+)\.", site.name)[0])
    if site.kind == "plan":
        router = model.get_submodule(site.name.rpartition(".")[0]).router
        return router.register_forward_hook(lambda module, args, out: _keep(routing, layer, *_of_graft(out)))
    names = list(inspect.signature(type(site.module).forward).parameters)[1:]
    ids_name = next(name for name in names if name in ("top_k_index", "router_indices"))
    weights_name = next(name for name in names if name in ("top_k_weights", "routing_weights"))

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if layer in pinned:
            ids, weights = (torch.from_numpy(array) for array in pinned[layer])
            given |= {ids_name: ids.to(given[ids_name]), weights_name: weights.to(given[weights_name])}
        _keep(routing, layer, given[ids_name], given[weights_name])
        return (), given

    return site.module.register_forward_pre_hook(see, with_kwargs=True)


def _of_graft(routing: Any) -> tuple[Tensor, Tensor]:
    return routing.expert_ids_TK, routing.weights_TK


def _keep(
    routing: dict[int, tuple[np.ndarray, np.ndarray]], layer: int, ids_TK: Tensor, weights_TK: Tensor
) -> None:
    routing[layer] = ids_TK.cpu().numpy().copy(), weights_TK.float().cpu().numpy().copy()
