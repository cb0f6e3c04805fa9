"""Hash layers: a fixed table sends every token id to its experts. Nothing is learned, and nothing can
collapse.

Source: Roller et al., "Hash Layers For Large Sparse Models" (arXiv 2106.04426): random and balanced tables,
weight 1, several hashes. Reconstructed: what the weight of several experts is (1/K), and the frequencies
that a balanced table starts from.

Letters: T tokens, E experts, K experts a token, V token ids.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from moe.errors import ConfigError, require
from moe.routers.base import Router, RouterConfig
from moe.types import LayerContext, Routing


@dataclass(frozen=True)
class HashConfig(RouterConfig):
    """Config of `HashRouter`."""

    name: Literal["hash"] = "hash"
    top_k: int = 1
    """Hashes: different experts a token."""
    table: Literal["random", "balanced", "modulo"] = "random"
    """How ids get experts: drawn; the most frequent first, to the least loaded expert; or id modulo E."""
    table_size: int = 131072
    """Entries of the table. Ids beyond it share the entries of id modulo this."""

    def __post_init__(self) -> None:
        require(
            self,
            (self.top_k >= 1, "top_k", "a token needs at least one expert", "Set it to 1 or more."),
            (
                self.table_size >= 1,
                "table_size",
                "a table has at least one entry",
                "Set it to the size of the vocabulary.",
            ),
        )


class HashRouter(Router[HashConfig]):
    """Routes by the id of a token alone. Has no parameters and gives no gradient.

    Attributes:
        table_VK: ``[V, K]`` int32 experts of each id, all different; saved with the model.
    """

    name = "hash"
    config_class = HashConfig
    table_VK: Tensor

    def __init__(self, config: HashConfig, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        shape = (config.table_size, config.top_k)
        self.register_buffer("table_VK", torch.zeros(shape, dtype=torch.int32))
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """K."""
        return self.config.top_k

    @property
    def weights_sum_to_one(self) -> bool:
        """True: each of K experts weighs 1/K."""
        return True

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Fills the table.

        A balanced one is made for ids whose frequency falls as 1 / (id + 1), roughly as in tokenizers that
        merge the most frequent pair first; `balance` makes it for counted frequencies.
        """
        V, K = self.table_VK.shape
        if self.config.table == "random":
            table_VK = random_table(V, K, self.num_experts, generator)
        elif self.config.table == "modulo":
            table_VK = (torch.arange(V)[:, None] + torch.arange(K)) % self.num_experts
        else:
            self.balance(1 / torch.arange(1, V + 1, dtype=torch.float64), generator)
            return
        self.table_VK.copy_(table_VK)

    @torch.no_grad()
    def balance(self, frequencies_V: Tensor, generator: Generator | None = None) -> None:
        """Fills the table so that ids of these frequencies load all experts alike.

        Args:
            frequencies_V: ``[V]`` how often each id occurs, on any scale.
            generator: Names the experts, so that layers differ.
        """
        assert frequencies_V.shape == self.table_VK.shape[:1], (frequencies_V.shape, self.table_VK.shape)
        table_VK = balanced_table(frequencies_V, self.top_k, self.num_experts)
        self.table_VK.copy_(torch.randperm(self.num_experts, generator=generator)[table_VK])

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Looks the tokens up.

        Raises:
            ConfigError: The host did not tell the ids of these tokens.
        """
        ids = ctx.run.token_ids
        if ids is None or ids.numel() != len(x_TD):
            told = "no token ids" if ids is None else f"{ids.numel()} token ids for {len(x_TD)} tokens"
            raise ConfigError.one(
                "router.name",
                self.name,
                f"it routes by token id, and the host told it {told}",
                "Call the model with input_ids and not with inputs_embeds, or choose another router.",
            )
        row_T = ids.reshape(-1).to(self.table_VK.device) % self.config.table_size
        ids_TK = self.table_VK[row_T].to(torch.int64)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=dtype, device=x_TD.device)
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK, num_experts=self.num_experts)


def random_table(rows: int, top_k: int, num_experts: int, generator: Generator | None = None) -> Tensor:
    """``[V, K]`` int64: for each row K different experts, all choices alike in probability."""
    columns: list[Tensor] = []
    for k in range(top_k):
        # One of the experts that are left, counted without those taken: from the lowest taken one upwards.
        drawn_V = torch.randint(num_experts - k, (rows,), generator=generator)
        if columns:
            for taken_V in torch.stack(columns).sort(dim=0).values:
                drawn_V += drawn_V >= taken_V
        columns.append(drawn_V)
    return torch.stack(columns, dim=1)


def balanced_table(frequencies_V: Tensor, top_k: int, num_experts: int) -> Tensor:
    """``[V, K]`` int64: ids in the order of their frequency, each to the K least loaded experts."""
    loads = [(0.0, expert) for expert in range(num_experts)]
    table_VK = torch.zeros(len(frequencies_V), top_k, dtype=torch.int64)
    order = frequencies_V.argsort(descending=True, stable=True).tolist()
    values, rows = frequencies_V.tolist(), []
    for token in order:
        least = [heapq.heappop(loads) for _ in range(top_k)]
        rows.append([expert for _, expert in least])
        for load, expert in least:
            heapq.heappush(loads, (load + values[token], expert))
    if rows:
        table_VK[order] = torch.tensor(rows)
    return table_VK
