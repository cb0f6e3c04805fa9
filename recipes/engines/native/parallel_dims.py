"""Layout of the native engine's ranks: replicas, data parallelism, expert and tensor parallelism.

The ranks form ``replicas`` groups, one after the other, that each hold a whole model. Within a group FSDP2
shards everything but experts and attention over all ranks. Experts are sharded over ``ep`` neighbours, and
each slice over the ranks that hold the same one; likewise attention heads over ``tp`` neighbours, which see
the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import Mistake
from recipes.engines.native.expert_parallel import ExpertMeshes
from recipes.engines.native.tensor_parallel import AttentionMeshes


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the groups of ranks.

    Attributes:
        world_size: Number of ranks.
        replicas: Groups that each hold a whole model.
        expert_parallel: Neighbouring ranks that together hold the experts of a layer.
        tensor_parallel: Neighbouring ranks that together hold the attention heads, and see the same samples.
    """

    world_size: int
    replicas: int = 1
    expert_parallel: int = 1
    tensor_parallel: int = 1

    @property
    def group(self) -> int:
        """Number of ranks that together hold one model."""
        return self.world_size // self.replicas

    def check(self) -> Mistake | None:
        """Returns the dimension that the ranks do not divide by; None when they divide by all."""
        ranks, copies = self.world_size, self.replicas
        if ranks % copies:
            rule = f"{ranks} ranks do not divide into {copies} groups"
            remedy = f"Set a divisor of {ranks}, or start a multiple of {copies} ranks."
            return Mistake("replicas", copies, rule, remedy)
        whose = f"{ranks} ranks" if copies == 1 else f"the {self.group} ranks of each of {copies} replicas"
        for name in ("expert_parallel", "tensor_parallel"):
            value = getattr(self, name)
            if self.group % value:
                rule = f"{whose} do not divide into groups of {value}"
                remedy = f"Set a divisor of {self.group}, or start a multiple of {copies * value} ranks."
                return Mistake(name, value, rule, remedy)
        return None

    def weight_mesh(self, device_type: str) -> DeviceMesh:
        """Builds the mesh of everything but experts and attention: (dp), or (replica, dp). Collective."""
        if self.replicas == 1:
            return init_device_mesh(device_type, (self.group,), mesh_dim_names=("dp",))
        return init_device_mesh(device_type, (self.replicas, self.group), mesh_dim_names=("replica", "dp"))

    def expert_meshes(self, device_type: str) -> ExpertMeshes | None:
        """Builds the meshes of the experts; None without expert parallelism. Collective."""
        if self.expert_parallel == 1:
            return None
        return ExpertMeshes(*self._inner(device_type, self.expert_parallel, "ep"))

    def attention_meshes(self, device_type: str) -> AttentionMeshes | None:
        """Builds the meshes of the attention; None without tensor parallelism. Collective."""
        if self.tensor_parallel == 1:
            return None
        return AttentionMeshes(*self._inner(device_type, self.tensor_parallel, "tp"))

    def _inner(self, device_type: str, size: int, name: str) -> tuple[DeviceMesh, DeviceMesh]:
        """Builds the mesh of the ranks that hold the same slice, and that of ``size`` neighbours."""
        shape, outer = (self.group // size, size), f"{name}_dp"
        if self.replicas == 1:
            mesh = init_device_mesh(device_type, shape, mesh_dim_names=(outer, name))
            return mesh[outer], mesh[name]
        mesh = init_device_mesh(device_type, (self.replicas, *shape), mesh_dim_names=("replica", outer, name))
        return mesh["replica", outer], mesh[name]
