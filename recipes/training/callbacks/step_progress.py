"""Progress on the console: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from moe.metrics import LoadReport
from recipes.runtime.progress import open_bar
from recipes.training.callbacks.base import Callback, StageInfo


class Progress(Callback):
    """Callback for rank 0 that shows loss, tokens/s, utilisation, load imbalance and the time left."""

    def __init__(self, log_every: int) -> None:
        """Prints a line every ``log_every`` steps if there is no terminal."""
        self.log_every = log_every
        self._bar: Any = None
        self._started = 0.0
        self._val_loss: float | None = None

    def on_stage_start(self, stage: StageInfo) -> None:
        """Opens the bar."""
        self._started = time.perf_counter()
        self._val_loss = None
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = open_bar(stage.title, stage.total_steps, "step", done=stage.first_step, bar_format=shape)

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        """Moves the bar or prints a line."""
        self._val_loss = row.get("val_loss", self._val_loss)
        step = int(row["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(row), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        last = step == stage.total_steps
        if step == stage.first_step or last or step % self.log_every == 0 or "val_loss" in row:
            print(
                f"{stage.title} {step}/{stage.total_steps}  {self._figures(row)}{self._eta(stage, step)}",
                flush=True,
            )

    def _figures(self, row: Mapping[str, float]) -> str:
        parts = []
        if "loss" in row:
            parts.append(f"loss {row['loss']:.3f}")
        if self._val_loss is not None:
            parts.append(f"val {self._val_loss:.3f}")
        if "tokens_per_s" in row:
            parts.append(f"{row['tokens_per_s']:,.0f} tok/s")
        if "mfu" in row:
            parts.append(f"mfu {100 * row['mfu']:.1f}%")
        if "router/maxvio" in row:
            parts.append(f"maxvio {row['router/maxvio']:.2f}")
        return "  ".join(parts)

    def _eta(self, stage: StageInfo, step: int) -> str:
        done = step - stage.first_step
        if done <= 0 or step >= stage.total_steps:
            return ""
        seconds = (time.perf_counter() - self._started) / done * (stage.total_steps - step)
        return f"  eta {int(seconds // 60)}:{int(seconds % 60):02d}"

    def on_stage_end(self, stage: StageInfo) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
