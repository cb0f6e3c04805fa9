"""What the ranks have seen, each number of ranks started once: starting takes longer than looking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import MakeCheckpoint
from tests.distributed_helper import run_ranks
from tests.recipes.upcycling.sharded.case_list import families, methods, spread
from tests.recipes.upcycling.sharded.gate_cases import look
from tests.recipes.upcycling.sharded.online_cases import Case

LookOnRanks = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def branches(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of models that have been trained on from one."""
    from transformers import AutoModelForCausalLM

    folders = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        folders.append(tmp_path_factory.mktemp("branch"))
        model.save_pretrained(folders[-1])
    return [str(folder) for folder in folders]


@pytest.fixture(scope="session")
def look_on_ranks(make_checkpoint: MakeCheckpoint, branches: list[str]) -> LookOnRanks:
    """By number of ranks: what each rank has seen of every case."""
    make, done = make_checkpoint, dict[int, list[dict[str, Any]]]()

    def cases(world_size: int) -> dict[str, Case]:
        few, every = families(make, branches, few=True), families(make, branches, few=False)
        if world_size == 1:
            return every | methods(make, branches)
        if world_size == 2:
            return every | spread(make, 2)
        # Four experts over pairs of ranks that FSDP2 cuts once more, and over all four.
        return few | spread(make, 2) | spread(make, 4, "noise")

    def run(world_size: int) -> list[dict[str, Any]]:
        if world_size not in done:
            dense, other = make("llama", tied=True, dtype="bfloat16"), make("gpt2", tied=True)
            folders: tuple[Path, Path] = (dense, other)
            done[world_size] = run_ranks(look, world_size, cases(world_size), *folders, timeout=500.0)
        return done[world_size]

    return run
