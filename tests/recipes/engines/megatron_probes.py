"""One probe for each thing that megatron-core takes for granted on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recipes.engines.megatron.cpu_patches import PATCHES, cuda_type_names, on_cpu
from recipes.engines.megatron.rank_groups import MegatronDims, leave


def _config(**more: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**fields | more)


def _dispatcher() -> Any:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    config = _config(
        num_moe_experts=2, moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none"
    )
    return MoEAlltoAllTokenDispatcher(2, [0, 1], config, get_default_pg_collection())


def _communication() -> None:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    part = torch.full((1,), float(dist.get_rank()))
    assert gather_from_sequence_parallel_region(part, group=dist.group.WORLD).tolist() == [0.0, 1.0]


def _layers() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    config = _config(sequence_parallel=True, tensor_model_parallel_size=2)
    layer = ColumnParallelLinear(8, 4, config=config, init_method=lambda x: x, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.ones(2, 1, 8, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad is not None and set(x.grad.flatten().tolist()) == {4.0}


def _random() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        torch.rand(1)


def _recomputes() -> None:
    from megatron.core.tensor_parallel import checkpoint

    waiting = len(torch.cuda._queued_calls)
    x = torch.full((1,), 3.0, requires_grad=True)
    checkpoint(torch.square, False, x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [6.0]
    assert len(torch.cuda._queued_calls) == waiting, "a call for CUDA waits"


def _rotary() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert RotaryEmbedding(4, 1.0, use_cpu_initialization=True)(3).device.type == "cpu"


def _dispatches() -> None:
    dispatcher = _dispatcher()
    map_TE = torch.tensor([[True, False], [True, True]])
    rows, probs = dispatcher.dispatch_preprocess(torch.ones(2, 1, 8), map_TE, map_TE.float())
    assert (len(rows), probs.tolist()) == (3, [1.0, 1.0, 1.0])


def _splits() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    rank = dist.get_rank()
    splits = torch.tensor([[1, 2], [3, 4]])
    moved = token_dispatcher.all_to_all(
        dist.group.WORLD, torch.full((int(splits[rank].sum()),), float(rank)), splits[:, rank], splits[rank]
    )
    assert moved.tolist() == [[0.0] * 1 + [1.0] * 3, [0.0] * 2 + [1.0] * 4][rank]


class _Stage(torch.nn.Linear):
    """As much of a model as the schedule asks for."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.config, self.model_type = _config(), None

    def set_input_tensor(self, tensors: Any) -> None:
        """There is no stage before."""


def _schedule() -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    stage = _Stage()
    losses = get_forward_backward_func()(
        forward_step_func=lambda _, model: (model(torch.ones(2)).sum(), lambda out: (out, 3.0)),
        data_iterator=None,
        model=[stage],
        num_microbatches=1,
        seq_length=1,
        micro_batch_size=1,
    )
    assert losses == [3.0] and stage.weight.grad is not None and stage.weight.grad.tolist() == [[1.0] * 2] * 2


def _stages() -> None:
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    communicator = P2PCommunicator(dist.group.WORLD, _config(pipeline_dtype=torch.float32))
    mine, ring = torch.full((1, 1, 2), float(dist.get_rank())), {"tensor_send_prev": None, "recv_next": False}
    got, _, _ = communicator._communicate(
        tensor_send_next=mine, recv_prev=True, tensor_shape=mine.shape, **ring
    )
    assert got.tolist() == [[[1.0 - dist.get_rank()] * 2]]


def _tied() -> None:
    from megatron.core.models.common.language_module.language_module import LanguageModule

    first = dist.get_rank() == 0
    module = LanguageModule(
        _config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32, num_layers=2)
    )
    module.pre_process, module.post_process = first, not first
    module.share_embeddings_and_output_weights = True
    module.embedding = SimpleNamespace(word_embeddings=torch.nn.Linear(2, 2))
    module.output_layer = torch.nn.Linear(2, 2)
    module.setup_embeddings_and_output_layer()
    assert module.shared_embedding_or_output_weight().shared_embedding


def _wrapped(distributed: bool) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    return DistributedDataParallel(_config(), settings, torch.nn.Linear(2, 2))


def _gradients() -> None:
    assert _wrapped(False).buffers[0].grad_data.device.type == "cpu"


def _optimizer(distributed: bool = False) -> None:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=distributed)
    assert get_megatron_optimizer(config, [_wrapped(distributed)]).get_loss_scale().tolist() == [1.0]


def _norm() -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    group = dist.group.WORLD
    assert get_grad_norm_fp32([torch.ones(8)], grad_stats_parallel_group=group) == pytest.approx(4.0)


PROBES: dict[str, Callable[[], None]] = {
    "communication": _communication,
    "layers": _layers,
    "random": _random,
    "random state": _recomputes,
    "random restored": _recomputes,
    "rotary": _rotary,
    "dispatcher": _dispatches,
    "stream": _dispatches,
    "splits": _splits,
    "schedule": _schedule,
    "stages": _stages,
    "tied": _tied,
    "gradients": _gradients,
    "optimizer": _optimizer,
    "norm": _norm,
    "sums": _norm,
}


def probe() -> dict[str, tuple[str | None, str | None]]:
    """What goes wrong on two ranks without each patch, and what with all of them."""
    found = {}
    for name, work in PROBES.items():
        # Where nothing is cut but by its own probe.
        cut, stages = 2 if name == "layers" else 1, 2 if name == "tied" else 1
        MegatronDims(tp=cut, pp=stages, sequence_parallel=cut > 1).join()
        with on_cpu([other for other in PATCHES if other != name]):
            without = _trouble(work)
        with on_cpu():
            found[name] = (without, _trouble(work))
    MegatronDims().join()
    with on_cpu():
        without = _trouble(lambda: _optimizer(distributed=True))
        with cuda_type_names():
            found["type names"] = (without, _trouble(lambda: _optimizer(distributed=True)))
    leave()
    return found


def _trouble(work: Callable[[], None]) -> str | None:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
