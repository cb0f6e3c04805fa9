"""The engine of megatron-core: its GPT model, parallelism and optimizers, with Graft's routers in its layers.

megatron-core is imported when a run opens the engine, and not before.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import ExitStack

from moe.dispatch.local import LocalDispatcher
from moe.errors import Mistake, ModelError
from recipes.engines.base import EngineLayout, HeldShares
from recipes.engines.megatron.build_settings import BuildSettings
from recipes.engines.megatron.config import MegatronConfig
from recipes.engines.megatron.cpu_patches import on_cpu
from recipes.engines.megatron.dispatchers import dispatchers, free_buffers
from recipes.engines.megatron.expert_kinds import expert_kinds
from recipes.engines.megatron.gpt_shape import family_mistakes
from recipes.engines.megatron.megatron_train_module import MegatronTrainModule, prepare
from recipes.engines.megatron.rank_groups import MegatronDims, RankGroups, leave, seed_gpu
from recipes.engines.optim.config import OptimConfig
from recipes.engines.process import ProcessEngine
from recipes.engines.run_options import RunOptions
from recipes.models.hf.hf_model import HFModel

__all__ = ["MegatronConfig", "MegatronEngine"]


class MegatronEngine(ProcessEngine[MegatronConfig]):
    """Engine of megatron-core."""

    name = "megatron"
    config_class = MegatronConfig
    compared = tuple(
        EngineLayout(2, ("engine=megatron", f"engine.tensor_parallel={tp}", f"engine.expert_parallel={ep}"))
        for tp, ep in ((1, 1), (1, 2), (2, 1), (2, 2))
    ) + (EngineLayout(2, ("engine=megatron", "engine.pipeline_parallel=2")),)

    def __init__(self, config: MegatronConfig) -> None:
        super().__init__(config)
        self._open = ExitStack()
        self._groups: RankGroups | None = None

    @property
    def data_rank(self) -> int:
        """See `Engine.data_rank`; the ranks of different pipeline stages are not neighbours."""
        in_stage = self.world_size // self.config.pipeline_parallel
        return self.rank % in_stage // self.config.tensor_parallel

    @classmethod
    def held_shares(cls, config: MegatronConfig, world_size: int, *, accumulates: bool) -> HeldShares:
        """Cuts by stages, tensor and expert parallelism, and the optimizer's state over replicas."""
        stages, tp, ep = config.pipeline_parallel, config.tensor_parallel, config.expert_parallel
        held = (1 / (stages * tp), 1 / (stages * ep))
        state = (1 / world_size, 1 / world_size) if config.distributed_optimizer else held
        # In bf16 the optimizer has fp32 weights besides the model's, which take half of them.
        low = config.precision == "bf16"
        weights = (held[0] / 2, held[1] / 2) if low else held
        return HeldShares(weights, held, state, copies=state if low else (0.0, 0.0))

    @classmethod
    def check_run(cls, config: MegatronConfig, run: RunOptions) -> list[Mistake]:
        """Requires experts and a dispatcher that this machine's GPUs can use, too."""
        mistakes = super().check_run(config, run)
        return mistakes if config.is_on_cpu() else mistakes + config.device_mistakes(config.device_type())

    def describe(self) -> str:
        """See `Engine.describe`."""
        kind, sends = expert_kinds()[self.config.experts], dispatchers()[self.config.dispatcher]
        return f"megatron: experts={kind.name} ({kind.summary}), dispatcher={sends.name} ({sends.summary})"

    @property
    def dims(self) -> MegatronDims:
        """Layout of the ranks."""
        config = self.config
        tp, ep, pp = config.tensor_parallel, config.expert_parallel, config.pipeline_parallel
        return MegatronDims(tp, ep, pp, sequence_parallel=tp > 1)

    def open(self) -> None:
        """Joins the process group, and makes Megatron's groups in it."""
        if self.config.tensor_parallel > 1:
            # With a single queue to the GPU, communication starts before the products that it overlaps with.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        super().open()
        self.join()

    def join(self) -> None:
        """Makes Megatron's groups in the process group that is open. Collective."""
        self._open.enter_context(warnings.catch_warnings())
        _quiet()
        if self.config.device_type() == "cpu":
            self._open.enter_context(on_cpu())
        self._groups = self.dims.join()
        if self.config.device_type() == "cuda":
            seed_gpu()

    def prepare(self, model: HFModel, optim: OptimConfig) -> MegatronTrainModule:
        """Builds the GPT model of a transformers model with its weights, and its optimizer.

        Raises:
            ModelError: Megatron's GPT model cannot compute what the model computes.
        """
        assert self._groups is not None, "open() comes before prepare()"
        dense = model.config.to_dict()
        if mistakes := family_mistakes(dense, str(model.folder)) or self.config.cut_mistakes(dense):
            raise ModelError(mistakes)
        for _, layer in model.moe_layers():
            # `check_moe` rejects routers with dispatchers of their own, but does not see wrapped ones.
            kind = type(layer.dispatcher)
            assert kind is LocalDispatcher, f"{layer.router.name} brings a {kind.__name__}"
        settings = BuildSettings(
            device=self.device,
            dtype=self.compute_dtype,
            experts=expert_kinds()[self.config.experts](),
            dispatcher=dispatchers()[self.config.dispatcher],
            distributed=self.config.distributed_optimizer,
            recomputes=self.config.activation_checkpointing,
        )
        train_module = prepare(model, optim, self.dims, self._groups, settings)
        # The routers of other stages are others.
        model.context.group = self._groups.stage_group
        return train_module

    def leave(self) -> None:
        """Destroys Megatron's groups, and undoes the patches for CPUs."""
        if sys.exc_info()[0] is None:
            free_buffers()
        leave()
        self._open.close()

    def close(self) -> None:
        """Leaves the process group."""
        self.leave()
        super().close()


def _quiet() -> None:
    """Silences Megatron's advice on optional packages, and torch's on Megatron's calls."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # The distributed optimizer puts gradients on views of parameters.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
