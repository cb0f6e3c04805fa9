"""Progress on the console: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from moe.metrics import LoadReport
from recipes.runtime.progress import open_bar
from recipes.training.callbacks.base import Callback, StageInfo

# Steps that tell how long a run takes; those before them are slower than the rest.
_WARM_STEPS, _TELLING_STEPS = 1, 5
# A bar has less room than a line.
_ON_A_BAR = ("loss", "tokens_per_s", "mfu", "router/maxvio")
# A stage trains the model of another: it is as fast.
_AS_FAST_AS = {"cpt": "dense"}


class Progress(Callback):
    """Callback for rank 0 that shows means since its last line, and the time that is left."""

    def __init__(self, log_every: int) -> None:
        """Prints a line every ``log_every`` steps if there is no terminal."""
        self.log_every = log_every
        self._bar: Any = None
        self._window = _Window(0)
        self._val_loss: float | None = None
        self._first: _Window | None = None
        self._step_s: dict[str, float] = {}

    def on_stage_start(self, stage: StageInfo) -> None:
        """Opens the bar."""
        self._window = _Window(stage.first_step)
        # A stage may end before its first steps have told anything.
        self._first = self._val_loss = None
        shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = open_bar(stage.title, stage.total_steps, "step", done=stage.first_step, bar_format=shape)

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        """Moves the bar or prints a line."""
        step = int(row["step"])
        self._window.add(row)
        self._tell_length(stage, step)
        if self._bar is not None:
            self._val_loss = row.get("val_loss", self._val_loss)
            few = {name: row[name] for name in _ON_A_BAR if name in row}
            self._bar.set_postfix_str(_figures(few, few, self._val_loss), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        last = step == stage.total_steps
        if step == stage.first_step or last or step % self.log_every == 0 or "val_loss" in row:
            figures = _figures(row, self._window.means(), row.get("val_loss"))
            place = f"{time.strftime('%H:%M:%S')} {stage.title} {step}/{stage.total_steps}"
            print(f"{place}  {figures}{self._eta(stage, step)}", flush=True)
            self._window = _Window(step)

    def _tell_length(self, stage: StageInfo, step: int) -> None:
        """Says once, after a few steps, how long the run takes if it has more stages than this one."""
        if not self._step_s and stage.later and step == stage.first_step + _WARM_STEPS:
            self._first = _Window(step)
        if self._first is None or step != stage.first_step + _WARM_STEPS + _TELLING_STEPS:
            return
        self._step_s[stage.name] = self._first.seconds_a_step(step)
        self._first = None
        stages = {stage.name: stage.total_steps - step} | dict(stage.later)
        left = ", ".join(f"{name} {steps}" for name, steps in stages.items())
        line = f"about {_clock(self._left(stage, step))} to go at the speed of the first steps ({left} steps)"
        print(line, flush=True) if self._bar is None else self._bar.write(line)

    def _eta(self, stage: StageInfo, step: int) -> str:
        if step > self._window.first:
            self._step_s[stage.name] = self._window.seconds_a_step(step)
        if stage.name not in self._step_s or step >= stage.total_steps:
            return ""
        own = _clock((stage.total_steps - step) * self._step_s[stage.name])
        return f"  eta {own}" + (f", run ~{_clock(self._left(stage, step))}" if stage.later else "")

    def _left(self, stage: StageInfo, step: int) -> float:
        """Returns the seconds of all stages to go; a model not measured yet counts as fast as this one."""
        here = self._step_s[stage.name]
        seconds = (stage.total_steps - step) * here
        for name, steps in stage.later.items():
            seconds += steps * self._step_s.get(_AS_FAST_AS.get(name, name), here)
        return seconds

    def on_stage_end(self, stage: StageInfo) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Window:
    """Steps since a line of progress: their mean loss and speed, and the time with all that was between."""

    def __init__(self, first: int) -> None:
        self.first = first
        self._began = time.perf_counter()
        self._losses: list[float] = []
        self._seconds_a_token: list[float] = []

    def add(self, row: Mapping[str, float]) -> None:
        """Adds a step; the loss of one that is skipped does not count."""
        if "skipped" not in row and math.isfinite(row.get("loss", math.nan)):
            self._losses.append(row["loss"])
        if row.get("tokens_per_s"):
            self._seconds_a_token.append(1 / row["tokens_per_s"])

    def means(self) -> dict[str, float]:
        """Returns the mean loss, and the tokens of all steps over their seconds."""
        row = {}
        if self._losses:
            row["loss"] = sum(self._losses) / len(self._losses)
        if self._seconds_a_token:
            row["tokens_per_s"] = len(self._seconds_a_token) / sum(self._seconds_a_token)
        return row

    def seconds_a_step(self, step: int) -> float:
        """Returns the seconds of a step, validation and saving included."""
        return (time.perf_counter() - self._began) / (step - self.first)


def _figures(row: Mapping[str, float], means: Mapping[str, float], val_loss: float | None) -> str:
    """Returns the figures of a row in words, loss and speed from the means."""
    parts = []
    if "loss" in means:
        parts.append(f"loss {means['loss']:.3f}")
    if val_loss is not None:
        parts.append(f"val {val_loss:.3f}")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.2g}")
    if "grad_norm" in row:
        parts.append(f"grad {row['grad_norm']:.2g}")
    if "tokens_per_s" in means:
        parts.append(f"{means['tokens_per_s']:,.0f} tok/s")
    if "mfu" in row:
        parts.append(f"mfu {100 * row['mfu']:.1f}%")
    if "router/maxvio" in row:
        parts.append(f"maxvio {row['router/maxvio']:.2f}")
    if "memory_bytes" in row:
        parts.append(f"mem {row['memory_bytes'] / 2**30:.2f} GiB")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    """Returns minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
