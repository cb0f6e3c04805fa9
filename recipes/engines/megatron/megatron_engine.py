"""The engine of megatron-core: its GPT model, parallelism and optimizers, with our routers in its layers.

megatron-core is imported when a run opens the engine, and not before.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe.dispatch.local import LocalDispatcher
from moe.errors import Mistake, ModelError, Rule
from moe.routers import RouterConfig, router_class
from recipes.engines.example_layouts import EngineLayout
from recipes.engines.megatron.dispatchers import Spread, dispatchers, free_buffers
from recipes.engines.megatron.expert_kinds import expert_kinds
from recipes.engines.optim.optimizer import OptimConfig
from recipes.engines.process import ProcessConfig, ProcessEngine
from recipes.engines.run_options import DefaultModelShape, RunOptions
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.inspection import check_dense, read_config

if TYPE_CHECKING:
    from recipes.engines.megatron.megatron_train_module import MegatronTrainModule
    from recipes.engines.megatron.rank_groups import ParallelDims, Places


@dataclass(frozen=True)
class MegatronConfig(ProcessConfig):
    """Config of `MegatronEngine`."""

    name: Literal["megatron"] = "megatron"
    tensor_parallel: int = 1
    """Neighbouring ranks that cut every matrix but the experts' between them, and see the same samples."""
    sequence_parallel: bool = True
    """Whether they cut sequences as well where matrices are whole, as Megatron's mixtures need."""
    pipeline_parallel: int = 1
    """Stages of consecutive blocks, the first ranks holding the first; micro-batches pass through them."""
    experts: str = "graft"
    """``graft``: our stacked experts and their kernels; ``megatron``: its own, one after the other; ``te``:
    those of TransformerEngine, in grouped products."""
    dispatcher: str = "alltoall"
    """How tokens reach the ranks of their experts: ``alltoall``, ``allgather``, or with DeepEP ``deepep`` or
    ``hybridep``."""
    distributed_optimizer: bool = True
    """Whether each data-parallel rank keeps the optimizer's state of a part of the parameters alone."""

    def rules(self) -> list[Rule]:
        """Returns the rules of the fields."""
        return [
            *super().rules(),
            (
                self.tensor_parallel >= 1,
                "tensor_parallel",
                "must be at least 1",
                "Give 1 for whole matrices.",
            ),
            (
                self.tensor_parallel == 1 or self.sequence_parallel,
                "sequence_parallel",
                "must be true with tensor_parallel above 1: Megatron's MoE models do not train without",
                "Set it to true.",
            ),
            (self.pipeline_parallel >= 1, "pipeline_parallel", "must be at least 1", "Give 1 for one stage."),
            _known("experts", self.experts, expert_kinds()),
            _known("dispatcher", self.dispatcher, dispatchers()),
        ]


class MegatronEngine(ProcessEngine[MegatronConfig]):
    """megatron-core over torch.distributed."""

    name = "megatron"
    config_class = MegatronConfig
    compared = tuple(
        EngineLayout(
            2, ("engine=megatron", f"engine.tensor_parallel={cut}", f"engine.expert_parallel={spread}")
        )
        for cut, spread in ((1, 1), (1, 2), (2, 1), (2, 2))
    ) + (EngineLayout(2, ("engine=megatron", "engine.pipeline_parallel=2")),)

    def __init__(self, config: MegatronConfig) -> None:
        super().__init__(config)
        self._open = ExitStack()
        self._places: Places | None = None

    @classmethod
    def model_parallel_size(cls, config: MegatronConfig) -> int:
        """Ranks that cut matrices between them, and the stages of a pipeline, see the same samples."""
        return config.tensor_parallel * config.pipeline_parallel

    @property
    def data_rank(self) -> int:
        """See `Engine.data_rank`; stages are counted outermost: their ranks are not neighbours."""
        in_stage = self.world_size // self.config.pipeline_parallel
        return self.rank % in_stage // self.config.tensor_parallel

    @classmethod
    def check_dims(cls, config: MegatronConfig, world_size: int) -> Mistake | None:
        """The ranks must divide into stages, and those of a stage into groups of the other kinds."""
        stages = config.pipeline_parallel
        if world_size % stages:
            rule = f"{world_size} ranks do not divide into stages"
            remedy = f"Set a divisor of {world_size}, or start a multiple of {stages} ranks."
            return Mistake("pipeline_parallel", stages, rule, remedy)
        ranks = world_size // stages
        those = f"{ranks} ranks" if stages == 1 else f"the {ranks} ranks of each of {stages} stages"
        for name in ("tensor_parallel", "expert_parallel"):
            value = getattr(config, name)
            if ranks % value:
                rule = f"{those} do not divide into groups of so many"
                remedy = f"Set a divisor of {ranks}, or start a multiple of {value * stages} ranks."
                return Mistake(name, value, rule, remedy)
        return None

    @classmethod
    def check_moe(cls, config: MegatronConfig, num_experts: int, router: RouterConfig) -> list[Mistake]:
        """The experts must divide over the ranks, and the routing be a map of tokens to experts."""
        mistakes = super().check_moe(config, num_experts, router)
        mistakes += dispatchers()[config.dispatcher].route_mistakes(num_experts, router)
        kind = router_class(router.name)
        remedy = "Set engine=native, or choose another router."
        if kind.mixes_tokens:
            rule = "its experts see mixtures of tokens, and Megatron's layer sends tokens as they are"
            mistakes.append(Mistake("router.name", router.name, rule, remedy))
        elif kind.reads_experts(router):
            rule = "it reads the weights of the experts, which Megatron's layer does not show it"
            mistakes.append(Mistake("router.name", router.name, rule, remedy))
        return mistakes

    @classmethod
    def check_optimizer(cls, config: MegatronConfig, optim: OptimConfig) -> list[Mistake]:
        """Megatron's optimizers are AdamW."""
        if optim.name == "adamw":
            return []
        rule = "the Megatron engine has AdamW alone"
        return [Mistake("optim.name", optim.name, rule, "Set adamw, or engine=native.")]

    @classmethod
    def check_run(cls, config: MegatronConfig, run: RunOptions) -> list[Mistake]:
        """The dense model must be of a family that Megatron computes, and the rest of the run fit."""
        from recipes.engines.megatron.gpt_shape import family_mistakes

        mistakes = []
        if run.attention is not None:
            rule = "the Megatron engine has no experts of attention"
            mistakes.append(
                Mistake("attention", run.attention.name, rule, "Set attention=none, or engine=native.")
            )
        kind = expert_kinds()[config.experts]
        if run.experts.lora.rank and not kind.keeps_ours:
            rule = f"{kind.told} have no low-rank factors"
            remedy = "Set engine.experts=graft, or experts.lora.rank=0."
            mistakes.append(Mistake("experts.lora.rank", run.experts.lora.rank, rule, remedy))
        mistakes += kind.mistakes(config.device_type())
        spread = Spread(config.device_type(), config.precision, config.expert_parallel)
        mistakes += dispatchers()[config.dispatcher].mistakes(spread)
        if run.dense is not None and not check_dense(run.dense):
            dense = read_config(Path(run.dense).expanduser())
            mistakes += family_mistakes(dense, run.dense, run.data.seq_len) or _cut_mistakes(dense, config)
        if run.dense is None:
            mistakes += _cut_mistakes(_default_config(run.model), config)
        if run.data.seq_len % config.tensor_parallel:
            rule = f"samples of {run.data.seq_len} tokens do not divide over so many ranks"
            remedy = "Set a divisor of data.seq_len, or 1."
            mistakes.append(Mistake("engine.tensor_parallel", config.tensor_parallel, rule, remedy))
        return mistakes

    def describe(self) -> str:
        """See `Engine.describe`."""
        experts, sends = expert_kinds()[self.config.experts], dispatchers()[self.config.dispatcher]
        return f"megatron: experts={experts.name} ({experts.told}), dispatcher={sends.name} ({sends.told})"

    @property
    def layout(self) -> ParallelDims:
        """How the ranks are laid out."""
        from recipes.engines.megatron.rank_groups import ParallelDims

        tensor = self.config.tensor_parallel
        return ParallelDims(
            tensor=tensor,
            expert=self.config.expert_parallel,
            pipeline=self.config.pipeline_parallel,
            sequence=tensor > 1,
        )

    def open(self) -> None:
        """Joins the process group, and makes Megatron's groups in it."""
        if self.config.tensor_parallel > 1:
            # With one queue to a GPU, communication starts before the products that it is to overlap with.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        super().open()
        self.join()

    def join(self) -> None:
        """Makes Megatron's groups in the process group that is open. Collective."""
        from recipes.engines.megatron.cpu_patches import on_cpu
        from recipes.engines.megatron.rank_groups import seed_gpu

        self._open.enter_context(warnings.catch_warnings())
        _quiet()
        if self.config.device_type() == "cpu":
            self._open.enter_context(on_cpu())
        self._places = self.layout.join()
        if self.config.device_type() == "cuda":
            seed_gpu()

    def prepare(self, model: HFModel, optim: OptimConfig) -> MegatronTrainModule:
        """Builds the GPT model of a host, gives it the host's weights, and builds its optimizer.

        Raises:
            ModelError: Megatron's GPT model cannot compute what the host computes.
        """
        from recipes.engines.megatron.gpt_shape import family_mistakes
        from recipes.engines.megatron.prepare import prepare
        from recipes.engines.megatron.settings import Settings

        assert self._places is not None, "open() comes before prepare()"
        dense = model.config.to_dict()
        if mistakes := family_mistakes(dense, str(model.folder)) or _cut_mistakes(dense, self.config):
            raise ModelError(mistakes)
        for _, layer in model.moe_layers():
            # What `check_moe` refuses is not built; wrapped routers may bring a dispatcher all the same.
            kind = type(layer.dispatcher)
            assert kind is LocalDispatcher, f"{layer.router.name} sends by {kind.__name__}"
        settings = Settings(
            device=self.device,
            dtype=self.compute_dtype,
            experts=self.config.experts,
            dispatcher=self.config.dispatcher,
            distributed=self.config.distributed_optimizer,
            recomputes=self.config.activation_checkpointing,
        )
        train_module = prepare(model, optim, self.layout, self._places, settings)
        # Other stages have other routers.
        model.context.group = self._places.stage_group
        return train_module

    def leave(self) -> None:
        """Takes Megatron's groups apart, and undoes what computing on CPUs needs."""
        from recipes.engines.megatron.rank_groups import leave

        if sys.exc_info()[0] is None:
            free_buffers()
        leave()
        self._open.close()

    def close(self) -> None:
        """Leaves the process group."""
        self.leave()
        super().close()


def _cut_mistakes(dense: Mapping[str, Any], config: MegatronConfig) -> list[Mistake]:
    """Why a decoder of a family that Megatron computes cannot be cut as configured."""
    from recipes.engines.megatron.gpt_shape import split_mistakes
    from recipes.engines.megatron.stages import stage_mistakes

    return split_mistakes(dense, config.tensor_parallel) + stage_mistakes(dense, config.pipeline_parallel)


def _known(field: str, value: str, names: Iterable[str]) -> Rule:
    """Returns the rule that a value is one of some names."""
    return value in names, field, "there is none of this name", f"Choose {', '.join(names)}."


def _quiet() -> None:
    """Megatron's advice on what is not installed, and torch's on what Megatron calls, would drown ours."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # The distributed optimizer puts gradients on views of parameters.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)


def _default_config(model: DefaultModelShape) -> dict[str, Any]:
    """What the embedded default's ``config.json`` will hold of its shape."""
    return {
        "model_type": "llama",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": 0,
        "rms_norm_eps": 0.0,
    }
