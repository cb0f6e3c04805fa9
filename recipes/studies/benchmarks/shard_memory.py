"""Memory of each rank while an MoE is made, over model sizes and numbers of ranks."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe.errors import GraftError
from recipes.runtime.source_root import child_environment, torchrun
from recipes.studies.benchmarks.conversion_speed import DenseSize, make_dense
from recipes.studies.benchmarks.shard_rank import RankMemory, RankTask

#: MoEs of 8 experts with 23, 168 and 868 million parameters.
SIZES = (DenseSize(256, 704, 4, 4096), DenseSize(512, 1408, 8, 8192), DenseSize(1024, 2816, 12, 16384))
TINY = DenseSize(128, 128, 2, 256)


@dataclass(frozen=True)
class Layout:
    """Layout of an MoE over ranks.

    Attributes:
        ranks: Their number.
        expert_parallel: Ranks that share the experts of a layer.
        whole: True if every rank makes the whole MoE before it keeps its shard.
        engine: Its name.
        options: Fields of its config, and their values.
    """

    ranks: int
    expert_parallel: int = 1
    whole: bool = False
    engine: str = "native"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the engine's config."""
        return {"name": self.engine, "expert_parallel": self.expert_parallel} | dict(self.options)


class RankFailedError(GraftError):
    """A rank of the measurement has not come to its end."""


def write_dense(sizes: Sequence[DenseSize], folder: Path) -> tuple[Path, list[Path]]:
    """Writes random checkpoints in bf16; returns the folder of the tiny one, and those of all sizes."""
    folders = [folder / f"dense-{size.hidden_size}" for size in sizes]
    for size, path in zip((TINY, *sizes), (folder / "tiny", *folders), strict=True):
        make_dense(size, path)
    return folder / "tiny", folders


def measure_layout(
    dense: Path, tiny: Path, layout: Layout, method: str = "copy", experts: int = 8
) -> list[RankMemory]:
    """Starts the ranks, one process each, and returns their memory by rank.

    Args:
        dense: The dense checkpoint.
        tiny: A small one of the same family.
        layout: Layout of the ranks.
        method: Name of an upcycling method that needs no options.
        experts: Experts of each layer.

    Raises:
        RankFailedError: A rank failed; the message ends with its output.
    """
    with tempfile.TemporaryDirectory() as out:
        task = RankTask(str(dense), str(tiny), out, method, experts, layout.fields, layout.whole)
        program = ["-m", "recipes.studies.benchmarks.shard_rank", json.dumps(asdict(task))]
        command = [*torchrun(layout.ranks), *program]
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
        if done.returncode:
            raise RankFailedError(f"a rank of {layout} has failed:\n{done.stderr[-4000:]}")
        files = [Path(out) / f"rank-{rank}.json" for rank in range(layout.ranks)]
        return [RankMemory(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
