"""How the ranks of the native engine are laid out: which cut what between them, and which hold copies.

The ranks form groups that hold the same weights (``replicas``), one behind the other. Everything but the
experts is cut over all ranks of a group; the experts are spread over neighbours (``ep``), and what each of
these has is cut over those that have the same. So are the heads of attention (``tp``), whose ranks see the
same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import Mistake
from recipes.engines.native.expert_parallel import ExpertMeshes
from recipes.engines.native.tensor_parallel import AttentionMeshes


@dataclass(frozen=True)
class ParallelDims:
    """How many ranks do what.

    Attributes:
        world_size: All of them.
        replicas: Groups that hold the same weights.
        expert_parallel: Neighbours that hold the experts of a layer between them.
        tensor_parallel: Neighbours that hold the heads of attention between them, and see the same samples.
    """

    world_size: int
    replicas: int = 1
    expert_parallel: int = 1
    tensor_parallel: int = 1

    @property
    def group(self) -> int:
        """Ranks that hold the model between them."""
        return self.world_size // self.replicas

    def check(self) -> Mistake | None:
        """Returns the dimension that the ranks do not divide by; None when they divide by all."""
        ranks, copies = self.world_size, self.replicas
        if ranks % copies:
            rule = f"{ranks} ranks do not divide into so many groups"
            remedy = f"Set a divisor of {ranks}, or start a multiple of {copies} ranks."
            return Mistake("replicas", copies, rule, remedy)
        whose = f"{ranks} ranks" if copies == 1 else f"the {self.group} ranks of each of {copies} replicas"
        for name in ("expert_parallel", "tensor_parallel"):
            value = getattr(self, name)
            if self.group % value:
                rule = f"{whose} do not divide into groups of so many"
                remedy = f"Set a divisor of {self.group}, or start a multiple of {copies * value} ranks."
                return Mistake(name, value, rule, remedy)
        return None

    def weight_mesh(self, kind: str) -> DeviceMesh:
        """Over which everything but experts is cut: (dp), or (replica, dp) with copies along the first axis.

        Args:
            kind: Of the devices. Collective.
        """
        if self.replicas == 1:
            return init_device_mesh(kind, (self.group,), mesh_dim_names=("dp",))
        return init_device_mesh(kind, (self.replicas, self.group), mesh_dim_names=("replica", "dp"))

    def expert_meshes(self, kind: str) -> ExpertMeshes | None:
        """Over which experts are spread and cut; None where they are as everything else.

        Args:
            kind: Of the devices. Collective.
        """
        if self.expert_parallel == 1:
            return None
        return ExpertMeshes(*self._inner(kind, self.expert_parallel, "ep"))

    def attention_meshes(self, kind: str) -> AttentionMeshes | None:
        """Over which heads are spread and cut; None where they are as everything else.

        Args:
            kind: Of the devices. Collective.
        """
        if self.tensor_parallel == 1:
            return None
        return AttentionMeshes(*self._inner(kind, self.tensor_parallel, "tp"))

    def _inner(self, kind: str, ways: int, name: str) -> tuple[DeviceMesh, DeviceMesh]:
        """The ranks that have the same of something that so many neighbours share, and those neighbours."""
        shape, outer = (self.group // ways, ways), f"{name}_dp"
        if self.replicas == 1:
            mesh = init_device_mesh(kind, shape, mesh_dim_names=(outer, name))
            return mesh[outer], mesh[name]
        mesh = init_device_mesh(kind, (self.replicas, *shape), mesh_dim_names=("replica", outer, name))
        return mesh["replica", outer], mesh[name]
