"""Multi-gate MoE over table rows: embeddings, shared experts, a router and a tower for each task.

Source: the model of COMET's recommendation runs (arXiv 2306.02824 and its released configs): embeddings of
user and item concatenated, one set of experts, one gate and one head per task. Ours differs where Graft's
layer does: an expert has two matrices and keeps the width of its input. Further columns join the embeddings.

Letters: T rows of a batch, D width of the concatenated columns, E experts, F expert width, C context width,
J tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from moe.dispatch.local import LocalDispatcher
from moe.errors import at_least, require
from moe.experts.experts import Experts
from moe.experts.weights import ExpertBank
from moe.layer import MoELayer
from moe.routers import router_class
from moe.routers.configs import RouterConfig
from moe.types import Config, LayerContext, RouterContext
from recipes.studies.tables.generate import TASKS, Rows, TableConfig


@dataclass(frozen=True)
class ModelConfig(Config):
    """Widths, the same under every router."""

    id_width: int = 32
    """Width of the embeddings of user and item."""
    code_width: int = 8
    """Width of the embeddings of segment and kind."""
    num_experts: int = 16
    top_k: int = 2
    """Experts per row, for routers that have the option."""
    expert_width: int = 32
    tower_width: int = 32
    dropout: float = 0.3
    """Probability of dropout on the columns and on the inputs of a tower."""

    def __post_init__(self) -> None:
        sizes = ("id_width", "code_width", "num_experts", "top_k", "expert_width", "tower_width")
        require(
            self,
            *at_least(self, 1, *sizes),
            (0 <= self.dropout < 1, "dropout", "must be in [0, 1)", "0 is none."),
        )


@dataclass(frozen=True)
class TableMoE:
    """Router with the sizes of its layer.

    Attributes:
        router: Its config.
        num_experts: E.
        expert_width: F.
    """

    router: RouterConfig
    num_experts: int
    expert_width: int


class TableModel(nn.Module):
    """Model from rows to logits ``[T, J]``.

    Everything but the routers is drawn from a generator of its own, so that models of one seed differ in
    their routers alone.

    Attributes:
        context: Context of the routers; token ids are the users'.
        layers: A layer for each task: routers of their own around the same experts.
    """

    def __init__(self, config: ModelConfig, moe: TableMoE, table: TableConfig, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.user = nn.Embedding(table.num_users, config.id_width)
        self.item = nn.Embedding(table.num_items, config.id_width)
        self.segment = nn.Embedding(table.num_groups, config.code_width)
        self.kind = nn.Embedding(table.num_kinds, config.code_width)
        for embedding in (self.user, self.item, self.segment, self.kind):
            nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5, generator=generator)
        width = 2 * config.id_width + 2 * config.code_width + table.context_width
        self.dropout = nn.Dropout(config.dropout)
        towers = [_tower(width, config.tower_width, generator) for _ in TASKS]
        experts = Experts(_expert_bank(width, moe, generator))
        self.context = RouterContext()
        layers = []
        for task in range(len(TASKS)):
            router = router_class(moe.router.name)(moe.router, width, moe.num_experts)
            router.reset_parameters(torch.Generator().manual_seed(seed * len(TASKS) + task))
            layers.append(MoELayer(router, LocalDispatcher(), experts, LayerContext(self.context, task)))
        self.layers = nn.ModuleList(layers)
        self.towers = nn.ModuleList(towers)

    def forward(self, rows: Rows) -> Tensor:
        """Scores the rows for every task."""
        columns = (
            self.user(rows.users_N),
            self.item(rows.items_N),
            self.segment(rows.segments_N),
            self.kind(rows.kinds_N),
            rows.context_NC,
        )
        x_TD = self.dropout(torch.cat(columns, -1))
        self.context.token_ids = rows.users_N[None]
        logits = [
            tower(self.dropout(layer(x_TD))) for layer, tower in zip(self.layers, self.towers, strict=True)
        ]
        return torch.cat(logits, -1)

    def after_optimizer_step(self) -> None:
        """Counts the step and notifies the routers."""
        self.context.step += 1
        for layer in self.layers:
            layer.router.after_optimizer_step(layer.context)

    def snapshot(self) -> Mapping[str, Tensor]:
        """Returns a copy of the state dict."""
        return {name: value.clone() for name, value in self.state_dict().items()}


def _tower(width: int, hidden: int, generator: Generator) -> nn.Sequential:
    tower = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    for layer in (tower[0], tower[2]):
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return tower


def _expert_bank(width: int, moe: TableMoE, generator: Generator) -> ExpertBank:
    """Draws experts that differ from the start: nothing is upcycled here."""
    E, F = moe.num_experts, moe.expert_width
    return ExpertBank(
        w_up_EUD=torch.randn(E, F, width, generator=generator) * (2 / width) ** 0.5,
        w_down_EDF=torch.randn(E, width, F, generator=generator) * F**-0.5,
        activation="relu",
        gated=False,
        b_up_EU=torch.zeros(E, F),
        b_down_ED=torch.zeros(E, width),
    )
