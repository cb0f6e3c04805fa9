"""Parts of what the ranks see, each run once in a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeCheckpoint
from tests.recipes.upcycling.sharded.case_list import families, methods, spread
from tests.recipes.upcycling.sharded.engine_online_cases import see
from tests.recipes.upcycling.sharded.gate_cases import COPY, measured, resumed, unsupported_reason
from tests.recipes.upcycling.sharded.online_cases import Case, compare_all
from tests.recipes.upcycling.sharded.row_cases import train_by_rows
from tests.shared_runs import Lazily, on_ranks, once, shared_folder

LookOnRanks = Callable[[int], list[Mapping[str, Any]]]


@pytest.fixture(scope="session")
def branches(make_checkpoint: MakeCheckpoint) -> list[str]:
    """Folders of models that have been trained on from one."""
    return once(_branches, make_checkpoint("llama"))


def _branches(dense: Path) -> list[str]:
    from transformers import AutoModelForCausalLM

    folders = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(dense)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        folders.append(shared_folder(f"branch-{seed}"))
        model.save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


@pytest.fixture(scope="session")
def look_on_ranks(make_checkpoint: MakeCheckpoint, branches: list[str]) -> LookOnRanks:
    """By number of ranks: what each rank sees; each part is run when a test first asks for it."""
    make = make_checkpoint

    def cases(world_size: int) -> dict[str, Case]:
        few, every = families(make, branches, few=True), families(make, branches, few=False)
        if world_size == 1:
            return every | methods(make, branches)
        if world_size == 2:
            return every | spread(make, 2)
        # Four experts over pairs of ranks that FSDP2 cuts once more, and over all four.
        return few | spread(make, 2) | spread(make, 4, "noise")

    def run(world_size: int) -> list[Mapping[str, Any]]:
        dense, gpt2 = make("llama", tied=True, dtype="bfloat16"), make("gpt2", tied=True)
        parts: dict[str, Callable[[], list[Any]]] = {
            "differences": lambda: on_ranks(world_size, compare_all, cases(world_size)),
            "engines": lambda: on_ranks(world_size, see, world_size, dense),
            "measured": lambda: on_ranks(world_size, measured, dense, gpt2, world_size),
            "unsupported_reason": lambda: on_ranks(world_size, unsupported_reason, Case(dense, COPY)),
            "resumed": lambda: on_ranks(world_size, resumed, Case(dense, replace(COPY, noise_std=0.3))),
            "rows": lambda: on_ranks(world_size, train_by_rows, world_size),
        }
        return [Lazily(parts, lambda name, rank=rank: parts[name]()[rank]) for rank in range(world_size)]

    return run
