"""Layout of the ranks for Megatron, and the process groups that follow from it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

ShardAxis: TypeAlias = Literal["none", "tensor", "expert"]


@dataclass(frozen=True)
class MegatronDims:
    """Sizes of Megatron's groups.

    Attributes:
        tp: Tensor-parallel ranks, over which the matrices of a layer are sharded.
        ep: Expert-parallel ranks, over which the experts of a layer are sharded.
        pp: Pipeline stages of consecutive blocks.
        sequence_parallel: Whether the ``tp`` ranks also shard sequences, between sharded matrices.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    sequence_parallel: bool = False

    def join(self) -> RankGroups:
        """Makes Megatron's groups in the process group that is open. Collective."""
        from megatron.core import parallel_state as state

        leave()
        state.initialize_model_parallel(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            expert_model_parallel_size=self.ep,
            # Each expert stays whole: experts are stacked and many, and sharded over ``ep`` alone.
            expert_tensor_parallel_size=1,
        )
        return RankGroups(
            tp_rank=state.get_tensor_model_parallel_rank(),
            ep_rank=state.get_expert_model_parallel_rank(),
            stage=state.get_pipeline_model_parallel_rank(),
            tp_group=state.get_tensor_model_parallel_group(),
            ep_group=state.get_expert_model_parallel_group(),
            dp_group=state.get_data_parallel_group(),
            expert_dp_group=state.get_expert_data_parallel_group(),
            stage_group=state.get_tensor_and_data_parallel_group(),
            pp_group=state.get_pipeline_model_parallel_group(),
        )


@dataclass(frozen=True)
class RankGroups:
    """Groups of this rank, and its place in them.

    Attributes:
        tp_rank: Index of its shard of the matrices.
        ep_rank: Index of its slice of the experts.
        stage: Index of its pipeline stage.
        tp_group: Ranks that together hold one copy of the matrices.
        ep_group: Ranks that together hold one copy of the experts.
        dp_group: Ranks that hold the same shard of the matrices.
        expert_dp_group: Ranks that hold the same experts.
        stage_group: Ranks of its stage.
        pp_group: Ranks that together hold all blocks, in order.
    """

    tp_rank: int
    ep_rank: int
    stage: int
    tp_group: Any
    ep_group: Any
    dp_group: Any
    expert_dp_group: Any
    stage_group: Any
    pp_group: Any

    def holders(self, sharded_over: ShardAxis, sharded: bool) -> list[Any]:
        """Returns the groups of ranks that together hold a tensor of this stage.

        Args:
            sharded_over: Axis of ranks over which it is sharded.
            sharded: Whether the ranks that hold the same shard have divided it further.
        """
        groups = [self.expert_dp_group if sharded_over == "expert" else self.dp_group] * sharded
        return groups + {"none": [], "tensor": [self.tp_group], "expert": [self.ep_group]}[sharded_over]


def leave() -> None:
    """Destroys Megatron's groups. Collective, unless an exception ends the run.

    Megatron itself forgets its groups and leaves them open: some fifty a layout, each with threads.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    made = dict.fromkeys(parallel_state._global_process_group_list or ())
    parallel_state.destroy_model_parallel()
    # After an error the other ranks may never get here.
    if dist.is_initialized() and sys.exc_info()[0] is None:
        dist.barrier()
        known = dist.distributed_c10d._world.pg_map
        for group in made:
            # The groups of other ranks are not known here, and the group of all ranks was there before.
            if group in known and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def seed_gpu() -> None:
    """Seeds the random states from which Megatron draws dropout on GPUs."""
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)
