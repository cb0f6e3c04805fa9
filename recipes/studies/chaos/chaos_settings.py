"""Settings of the job and of its kills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Aim = Literal["anywhere", "saves", "start", "mixed"]
AIMS: tuple[Aim, ...] = ("mixed", "anywhere", "saves", "start")

# A step takes hundredths of a second: the experiment tests processes and files, not arithmetic.
_TINY = {
    "tracker.mode": "disabled",
    "engine.device": "cpu",
    "engine.threads": "1",
    "model.vocab_size": "300",
    "model.hidden_size": "32",
    "model.intermediate_size": "48",
    "model.num_layers": "2",
    "model.num_heads": "4",
    "model.num_kv_heads": "2",
    "model.steps": "0",
    "data.seq_len": "32",
    "upcycle.num_experts": "4",
    "compare.cpt": "false",
    "optim.schedule.warmup_steps": "2",
    "train.global_batch_size": "8",
    "train.eval_samples": "8",
    "train.log_every": "50",
}


@dataclass(frozen=True)
class ChaosSettings:
    """A job and its kills.

    Attributes:
        folder: Folder of cache, logs and both runs.
        kills: Number of ranks to kill, one after the other.
        ranks: Processes of the job.
        steps: Optimizer steps of the job.
        save_every: Steps between checkpoints.
        aim: ``anywhere``: at moments uniform over the steps; ``saves``: while a checkpoint is being written,
            of saves uniform over the run; ``start``: while a restart is starting up; ``mixed``: half, a third
            and a sixth of them.
        seed: Seed of moments and victims.
        disk_mib_s: MiB per second of each rank's simulated disk; None for the real disk.
        async_save: ``train.async_save`` of the job.
        patience_s: Seconds without a step after which training counts as not going on.
        program: Command line for torchrun, before the overrides; empty for ``train.py``.
        options: Further overrides of ``train.py``, which win over all others.
    """

    folder: Path
    kills: int = 50
    ranks: int = 2
    steps: int = 1000
    save_every: int = 20
    aim: Aim = "mixed"
    seed: int = 0
    disk_mib_s: float | None = None
    async_save: bool = True
    patience_s: float = 180.0
    program: Sequence[str] = ()
    options: Sequence[str] = ()

    def run_dir(self, name: str) -> Path:
        """Returns the directory of a run."""
        return self.folder / "outputs" / name

    def overrides(self, name: str | None) -> list[str]:
        """Returns the command line of ``train.py``, without options that make it resume.

        Args:
            name: Name of the run; None leaves it to the job.
        """
        values = _TINY | {
            "output_dir": str(self.folder / "outputs"),
            "cache_dir": str(self.folder / "cache"),
            "train.steps": str(self.steps),
            "train.save_every": str(self.save_every),
            "train.eval_every": str(5 * self.save_every),
            "train.async_save": str(self.async_save).lower(),
        }
        if name is not None:
            values["run.name"] = name
        values |= dict(option.split("=", 1) for option in self.options if "=" in option)
        return ["+recipe=upcycle", *(f"{key}={value}" for key, value in values.items())]
