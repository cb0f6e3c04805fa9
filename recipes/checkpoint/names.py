"""Names of the files and folders of checkpoints."""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
INDEX = "index.json"
STATE = "state.json"
TEMPORARY = ".tmp-"

_STEP = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of the folder that holds the checkpoint of ``step``."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a checkpoint folder's name, or None when it is not one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def rank_file(rank: int) -> str:
    """Name of the file that ``rank`` wrote."""
    return f"rank-{rank:05d}.safetensors"


def expected_files(world_size: int) -> set[str]:
    """Names of all files of a checkpoint but the manifest. No other name is ever opened."""
    return {INDEX, STATE, *(rank_file(rank) for rank in range(world_size))}
