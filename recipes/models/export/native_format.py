"""A native format of transformers whose experts are named ``mlp.experts.E.{gate,up,down}_proj``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from moe.upcycle.layer_plan import Matrix
from recipes.models.export.base import Exporter, Layout
from recipes.models.export.read_back import NativeUnread, Unread
from recipes.models.export.spec import MoESpec


class NativeExporter(Exporter):
    """What Qwen2-MoE, Qwen3-MoE, FlexOlmo and GLM-4-MoE have in common.

    Attributes:
        router_keys: Name on disk below ``mlp.gate`` by the key in the router's state.
        shared_module: What the shared expert is called below ``mlp``; empty where there is none.
    """

    is_native = True
    layouts: ClassVar[tuple[Layout, ...]] = ("per_expert", "fused")
    router_keys: ClassVar[dict[str, str]] = {"weight_ED": "weight"}
    shared_module: ClassVar[str] = ""

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """One tensor for each matrix of each expert."""
        assert not bias, f"{self.name} has no biases; its refusal says so"
        return f"{moe.site}.experts.{expert}.{matrix}_proj.weight"

    def fused_name(self, moe: MoESpec, matrix: Literal["up", "down"]) -> str:
        """As transformers 5 holds them; parameters, so that there is no ``.weight``."""
        return f"{moe.site}.experts.{'gate_up_proj' if matrix == 'up' else 'down_proj'}"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """Below ``mlp.gate``."""
        return f"{moe.site}.gate.{self.router_keys[key]}"

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """A plain feed-forward network."""
        assert self.shared_module and not bias, f"{self.name}: its refusal says so"
        return f"{moe.site}.{self.shared_module}.{matrix}_proj.weight"

    def open(self, folder: Path) -> Unread:
        """By transformers' own loader."""
        return NativeUnread(folder)
