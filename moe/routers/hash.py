"""Hash layers: a fixed table sends every token id to its experts. Nothing is learned; nothing can collapse.

Source: Roller et al., "Hash Layers For Large Sparse Models" (arXiv 2106.04426): random and balanced tables,
weight 1, several hashes. Reconstructed: the weight of several experts (1/K), and the frequencies that a
balanced table starts from.

Letters: T tokens, E experts, K experts a token, V token ids.
"""

from __future__ import annotations

import heapq

import torch
from torch import Generator, Tensor

from moe.errors import ConfigError
from moe.routers.base import Router
from moe.routers.configs.hash_config import HashConfig
from moe.types import LayerContext, Routing


class HashRouter(Router[HashConfig]):
    """Router by token id alone, without parameters or gradient.

    Attributes:
        table_VK: ``[V, K]`` int32 experts of each id, all different; saved with the model.
    """

    name = "hash"
    config_class = HashConfig
    table_VK: Tensor

    def create_parameters(self) -> None:
        """Registers the table."""
        shape = (self.config.table_size, self.config.top_k)
        self.register_buffer("table_VK", torch.zeros(shape, dtype=torch.int32))

    @property
    def weights_sum_to_one(self) -> bool:
        """True: each of K experts weighs 1/K."""
        return True

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Fills the table.

        A balanced table assumes that the frequency of an id falls as 1 / (id + 1), roughly as in tokenizers
        that merge the most frequent pair first; `balance` takes counted frequencies instead.
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
        """Fills the table so that ids of these frequencies load all experts evenly.

        Args:
            frequencies_V: ``[V]`` frequency of each id, on any scale.
            generator: Permutes the experts, so that layers differ.
        """
        assert frequencies_V.shape == self.table_VK.shape[:1], (frequencies_V.shape, self.table_VK.shape)
        table_VK = balanced_table(frequencies_V, self.top_k, self.num_experts)
        self.table_VK.copy_(torch.randperm(self.num_experts, generator=generator)[table_VK])

    def forward(self, x_TD: Tensor, ctx: LayerContext) -> Routing:
        """Looks the tokens' experts up.

        Raises:
            ConfigError: The model did not pass the ids of these tokens.
        """
        ids = ctx.run.token_ids
        if ids is None or ids.numel() != len(x_TD):
            given = "no token ids" if ids is None else f"{ids.numel()} token ids for {len(x_TD)} tokens"
            raise ConfigError.one(
                "router.name",
                self.name,
                f"it routes by token id, and the model passed {given}",
                "Call the model with input_ids and not with inputs_embeds, or choose another router.",
            )
        row_T = ids.reshape(-1).to(self.table_VK.device) % self.config.table_size
        ids_TK = self.table_VK[row_T].to(torch.int64)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=dtype, device=x_TD.device)
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK, num_experts=self.num_experts)


def random_table(rows: int, top_k: int, num_experts: int, generator: Generator | None = None) -> Tensor:
    """Returns ``[V, K]`` int64: for each row K different experts, all choices equally likely."""
    columns: list[Tensor] = []
    for k in range(top_k):
        # An index among the experts not yet taken, shifted past each taken one, the lowest first.
        drawn_V = torch.randint(num_experts - k, (rows,), generator=generator)
        if columns:
            for taken_V in torch.stack(columns).sort(dim=0).values:
                drawn_V += drawn_V >= taken_V
        columns.append(drawn_V)
    return torch.stack(columns, dim=1)


def balanced_table(frequencies_V: Tensor, top_k: int, num_experts: int) -> Tensor:
    """Returns ``[V, K]`` int64: ids in order of frequency, each assigned to the K least loaded experts."""
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
