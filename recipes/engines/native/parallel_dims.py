"""Layout of the native engine's ranks: replicas, data parallelism, expert and tensor parallelism.

The ranks form ``replicas`` groups, one after the other, that each hold a whole model. Within a group FSDP2
shards everything but experts and attention over all ranks. Experts are sharded over ``ep`` neighbours, and
each slice over the ranks that hold the same one; likewise attention heads over ``tp`` neighbours, which see
the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from recipes.engines.native.expert_parallel import ExpertMeshes
from recipes.engines.native.tensor_parallel import AttentionMeshes


@dataclass(frozen=True)
class Meshes:
    """Device meshes over which a model is sharded.

    Attributes:
        weights: Mesh of everything but experts and attention: (dp), or (replica, dp).
        experts: Meshes of the experts; None without expert parallelism.
        attention: Meshes of the attention; None without tensor parallelism.
    """

    weights: DeviceMesh
    experts: ExpertMeshes | None
    attention: AttentionMeshes | None


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

    def meshes(self, device_type: str) -> Meshes:
        """Builds the device meshes. Collective."""
        weights = self._mesh(device_type, (self.group,), ("dp",))
        ep, tp = self.expert_parallel, self.tensor_parallel
        experts = None if ep == 1 else ExpertMeshes(*self._inner(device_type, ep, "ep"))
        attention = None if tp == 1 else AttentionMeshes(*self._inner(device_type, tp, "tp"))
        return Meshes(weights, experts, attention)

    def _inner(self, device_type: str, size: int, name: str) -> tuple[DeviceMesh, DeviceMesh]:
        """Builds the mesh of the ranks that hold the same slice, and that of ``size`` neighbours."""
        outer = f"{name}_dp"
        mesh = self._mesh(device_type, (self.group // size, size), (outer, name))
        return mesh[outer if self.replicas == 1 else ("replica", outer)], mesh[name]

    def _mesh(self, device_type: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """Builds a mesh, whose first axis are the replicas if there are several."""
        if self.replicas > 1:
            shape, names = (self.replicas, *shape), ("replica", *names)
        return init_device_mesh(device_type, shape, mesh_dim_names=names)
