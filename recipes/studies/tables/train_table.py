"""Training of a model under one router, seed and learning rate, with early stopping.

Letters: N rows, J tasks, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.errors import at_least, require
from moe.metrics import LayerStats, report_load
from moe.types import Config, Routing
from recipes.studies.tables.auc import roc_auc
from recipes.studies.tables.generate import TASKS, Rows, TableConfig
from recipes.studies.tables.table_model import ModelConfig, TableModel, TableMoE

_EVAL_BATCH = 4096


@dataclass(frozen=True)
class FitConfig(Config):
    """The budget of a run, the same under every router."""

    epochs: int = 20
    """At most."""
    patience: int = 4
    """Epochs without a better validation AUC before a run stops."""
    batch_size: int = 1024

    def __post_init__(self) -> None:
        names = ("epochs", "patience", "batch_size")
        require(self, *at_least(self, 1, *names))

    def max_steps(self, rows: int) -> int:
        """Returns the optimizer steps of a run that is not stopped early."""
        return self.epochs * -(-rows // self.batch_size)


@dataclass(frozen=True)
class Measured:
    """Measurements of a model on a split.

    Attributes:
        auc: AUC by task.
        experts_per_example: Mean over rows and tasks.
        load_cv: Deviation of the experts' load over its mean, mean over tasks.
        dead_experts: Experts without a row, mean over tasks.
    """

    auc: tuple[float, ...]
    experts_per_example: float
    load_cv: float
    dead_experts: float

    @property
    def mean_auc(self) -> float:
        """Mean over tasks, by which models and learning rates are chosen on validation."""
        return sum(self.auc) / len(self.auc)


@torch.no_grad()
def measure(model: TableModel, rows: Rows) -> Measured:
    """Scores a split in evaluation mode; routing is counted as it is then."""
    model.eval()
    stats = [LayerStats() for _ in model.layers]
    logits: list[Tensor] = []

    def count(task: int, routing: Routing) -> None:
        stats[task].record(len(logits), routing, None)

    hooks = [
        layer.router.register_forward_hook(lambda _module, _inputs, out, task=task: count(task, out))
        for task, layer in enumerate(model.layers)
    ]
    try:
        for index_N in torch.arange(len(rows)).split(_EVAL_BATCH):
            logits.append(model(rows.take(index_N)))
    finally:
        for hook in hooks:
            hook.remove()
    logits_NJ = torch.cat(logits)
    labels_NJ = rows.labels_NJ.numpy()
    used = sum(_used(layer_stats) for layer_stats in stats) / len(stats)
    report = report_load(list(enumerate(stats)))
    assert report is not None, "no router was called"
    load = report.means()
    return Measured(
        auc=tuple(roc_auc(labels_NJ[:, j], logits_NJ[:, j].double().numpy()) for j in range(len(TASKS))),
        experts_per_example=used / len(rows),
        load_cv=load["load_cv"],
        dead_experts=load["dead_experts"],
    )


def _used(stats: LayerStats) -> float:
    """Counts the used slots of all batches; vectors end with rows, slots and unused slots."""
    return float(sum(vector[-3] - vector[-2] for vector in stats.sums.values()))


def train_run(
    splits: dict[str, Rows],
    table: TableConfig,
    config: ModelConfig,
    moe: TableMoE,
    fit: FitConfig,
    seed: int,
    lr: float,
) -> dict[str, Any]:
    """Trains with Adam on the sum of the tasks' losses; the epoch that validates best is what is tested.

    A loss that is not finite ends the run: what was best before counts.

    Returns:
        The result as JSON.
    """
    began = time.perf_counter()
    # Routers that sample, and dropout, draw from torch's own generator.
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = TableModel(config, moe, table, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history = [measure(model, splits["validation"])]
    best, kept, finite = 0, model.snapshot(), True
    while finite and len(history) <= fit.epochs and len(history) - 1 - best < fit.patience:
        finite = _epoch(model, optimizer, splits["train"], fit.batch_size, order)
        if not finite:
            break
        history.append(measure(model, splits["validation"]))
        if history[-1].mean_auc > history[best].mean_auc:
            best, kept = len(history) - 1, model.snapshot()
    model.load_state_dict(kept)
    tested = measure(model, splits["test"])
    return {
        "validation_auc": history[best].auc,
        "test_auc": tested.auc,
        "experts_per_example": tested.experts_per_example,
        "load_cv": tested.load_cv,
        "dead_experts": tested.dead_experts,
        "best_epoch": best,
        "is_finite": finite,
        "history": [
            {"validation_auc": h.mean_auc, "experts_per_example": h.experts_per_example} for h in history
        ],
        "seconds": time.perf_counter() - began,
    }


def _epoch(
    model: TableModel, optimizer: torch.optim.Optimizer, rows: Rows, batch_size: int, order: torch.Generator
) -> bool:
    """Trains one epoch in random order; returns True if every loss was finite."""
    model.train()
    for index_N in torch.randperm(len(rows), generator=order).split(batch_size):
        batch = rows.take(index_N)
        logits_NJ = model(batch)
        losses_NJ = F.binary_cross_entropy_with_logits(logits_NJ, batch.labels_NJ, reduction="none")
        loss = losses_NJ.sum(1).mean()
        if not torch.isfinite(loss):
            return False
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        model.after_optimizer_step()
    return True
