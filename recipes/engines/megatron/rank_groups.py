"""How the ranks of a run are laid out for Megatron."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Over: TypeAlias = Literal["none", "tensor", "expert"]


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of Megatron's groups.

    Attributes:
        tensor: Ranks that cut the matrices of a layer between them.
        expert: Ranks that hold the experts of a layer between them.
        pipeline: Stages of consecutive blocks; each is held by as many ranks.
        sequence: Whether those of `tensor` cut the sequence as well, where matrices are not cut.
    """

    tensor: int = 1
    expert: int = 1
    pipeline: int = 1
    sequence: bool = False

    def join(self) -> Places:
        """Makes Megatron's groups over the process group that is open; where this rank is. Collective."""
        from megatron.core import parallel_state as state

        leave()
        state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            expert_model_parallel_size=self.expert,
            # Experts are whole: stacked and many, they are spread and never cut.
            expert_tensor_parallel_size=1,
        )
        return Places(
            tensor=state.get_tensor_model_parallel_rank(),
            expert=state.get_expert_model_parallel_rank(),
            data=state.get_data_parallel_rank(),
            data_ranks=state.get_data_parallel_world_size(),
            stage=state.get_pipeline_model_parallel_rank(),
            tensor_group=state.get_tensor_model_parallel_group(),
            expert_group=state.get_expert_model_parallel_group(),
            data_group=state.get_data_parallel_group(),
            expert_data_group=state.get_expert_data_parallel_group(),
            stage_group=state.get_tensor_and_data_parallel_group(),
            pipeline_group=state.get_pipeline_model_parallel_group(),
        )


@dataclass(frozen=True)
class Places:
    """This rank's place in each group.

    Attributes:
        tensor: Which part of the cut matrices it holds.
        expert: Which slice of the experts it holds.
        data: Which samples it sees.
        data_ranks: How many ranks see samples of their own.
        stage: Which of the pipeline's stages it is in.
        tensor_group: The ranks that hold one copy of the matrices between them.
        expert_group: The ranks that hold one copy of the experts between them.
        data_group: The ranks that hold the same part of the matrices.
        expert_data_group: The ranks that hold the same experts.
        stage_group: The ranks that hold the same blocks, or parts of them.
        pipeline_group: The ranks that hold all blocks between them, in order.
    """

    tensor: int
    expert: int
    data: int
    data_ranks: int
    stage: int
    tensor_group: Any
    expert_group: Any
    data_group: Any
    expert_data_group: Any
    stage_group: Any
    pipeline_group: Any

    def holders(self, over: Over, sharded: bool) -> list[Any]:
        """The groups of ranks that hold a tensor between them.

        Args:
            over: Which ranks hold other parts of it.
            sharded: Whether those that hold the same part have divided it between them.
        """
        groups = [self.expert_data_group if over == "expert" else self.data_group] * sharded
        return groups + {"none": [], "tensor": [self.tensor_group], "expert": [self.expert_group]}[over]


def leave() -> None:
    """Takes Megatron's groups apart. Collective, but while an exception ends the run.

    Megatron forgets its groups and leaves them open: some fifty a layout, with threads each.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    made = dict.fromkeys(parallel_state._global_process_group_list or ())
    parallel_state.destroy_model_parallel()
    # Where something has gone wrong the other ranks may never come.
    if dist.is_initialized() and sys.exc_info()[0] is None:
        dist.barrier()
        known = dist.distributed_c10d._world.pg_map
        for group in made:
            # Not those of other ranks, nor the one of all that the run was opened with.
            if group in known and group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def seed_gpu() -> None:
    """Megatron draws dropout on GPUs from states of its own, which must have a seed."""
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(torch.initial_seed() % 2**31)
