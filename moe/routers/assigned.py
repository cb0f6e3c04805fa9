"""What routers that balance by assignment have in common: one linear map, and no balance loss.

Letters: E experts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from moe.routers.projection import ProjectionConfig, ProjectionRouter


@dataclass(frozen=True)
class AssignedConfig(ProjectionConfig):
    """Config that every router of this kind has. There is no balance loss to set: assignment replaces it."""


AssignedConfigT = TypeVar("AssignedConfigT", bound=AssignedConfig)


class AssignedRouter(ProjectionRouter[AssignedConfigT], Generic[AssignedConfigT]):
    """A linear router that has no other parameters."""

    def __init__(self, config: AssignedConfigT, model_width: int, num_experts: int) -> None:
        super().__init__(config, model_width, num_experts)
        self.reset_parameters()
