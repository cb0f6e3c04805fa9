"""Native formats of transformers whose experts are named ``mlp.experts.E.{gate,up,down}_proj``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from moe.upcycle.layer_plan import Matrix
from recipes.models.export.base import Exporter, Layout
from recipes.models.export.read_back import NativeUnread, Unread
from recipes.models.export.spec import MoESpec


class NativeExporter(Exporter):
    """Base of Qwen2-MoE, Qwen3-MoE, FlexOlmo and GLM-4-MoE.

    Attributes:
        router_keys: Key in the router's state -> name on disk below ``mlp.gate``.
        shared_module: Name of the shared expert below ``mlp``; empty if there is none.
    """

    is_native = True
    layouts: ClassVar[tuple[Layout, ...]] = ("per_expert", "fused")
    router_keys: ClassVar[dict[str, str]] = {"weight_ED": "weight"}
    shared_module: ClassVar[str] = ""

    def expert_name(self, moe: MoESpec, expert: int, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.expert_name`; each matrix of each expert has a tensor of its own."""
        assert not bias, f"{self.name} has no biases; its unsupported_reason says so"
        return f"{moe.site}.experts.{expert}.{matrix}_proj.weight"

    def fused_name(self, moe: MoESpec, matrix: Literal["up", "down"]) -> str:
        """See `Exporter.fused_name`; in transformers 5 they are parameters, without ``.weight``."""
        return f"{moe.site}.experts.{'gate_up_proj' if matrix == 'up' else 'down_proj'}"

    def router_name(self, moe: MoESpec, key: str) -> str:
        """See `Exporter.router_name`."""
        return f"{moe.site}.gate.{self.router_keys[key]}"

    def shared_name(self, moe: MoESpec, matrix: Matrix, bias: bool) -> str:
        """See `Exporter.shared_name`; it is a plain feed-forward network."""
        assert self.shared_module and not bias, f"{self.name}: its unsupported_reason says so"
        return f"{moe.site}.{self.shared_module}.{matrix}_proj.weight"

    def open(self, folder: Path) -> Unread:
        """See `Exporter.open`; uses transformers' own loader."""
        return NativeUnread(folder)
