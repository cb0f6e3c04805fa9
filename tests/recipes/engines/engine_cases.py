"""Trains a tiny MoE model under an engine, and reports everything that must not depend on the ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from moe.attention.attention_config import AttentionConfig
from moe.dispatch.local import LocalDispatcher
from moe.experts.lora import DRAWN, FACTOR_NAMES
from moe.experts.lora_config import LoraConfig
from moe.layer import moe_layers
from moe.metrics import LoadReport
from moe.routers.configs.topk_config import TopKConfig
from moe.routers.topk import TopKRouter
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.copies import Copy
from recipes.config.schema import TrainConfig
from recipes.engines.base import TrainModule
from recipes.engines.native.native_engine import NativeConfig, NativeEngine
from recipes.engines.optim.config import OptimConfig
from recipes.engines.optim.lr_schedule import ScheduleConfig
from recipes.models.hf import token_losses
from recipes.models.hf.attention_blocks import swap_attention
from recipes.models.hf.hf_model import HFModel
from recipes.models.lora_model import add_low_rank
from recipes.runtime.interrupt import StopRequest
from recipes.tracking.step_costs import Costs
from recipes.training.callbacks.base import Callback, StageInfo
from recipes.training.training_loop import Loop, Stage
from tests.conftest import random_model
from tests.recipes.models.whole_surgery import Surgery, swap

SEQ_LEN = 12
GLOBAL_BATCH = 8
VOCABULARY = 64
EXPERTS = 4
# With eps=1 AdamW is nearly momentum SGD: it does not blow up rounding where gradients are 0.
SGD = OptimConfig(
    lr=0.5, eps=1.0, weight_decay=0.0, clip_norm=None, schedule=ScheduleConfig("constant", warmup_steps=0)
)


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        engine: Fields of `NativeConfig`.
        micro: Samples of a forward pass on one rank.
        router: Fields of `TopKConfig`.
        router_weights: ``random``, or ``equal``: then every token has the same first choices.
        optim: The optimizer.
        steps: Optimizer steps.
        model: Fields of the host's config.
        family: Of the host.
        eval_samples: Validation samples.
        eval_every: Steps between validations; 0 for one before the first step and one behind the last.
        attention: Whether key-value heads are experts as well, two of four a token.
        by_rows: Whether logits exist for some tokens at a time alone.
        lora: Rank of factors beside the experts' weights; those that begin as zeros are drawn, so that the
            gradients of the others are none.
    """

    engine: dict[str, Any] = field(default_factory=dict)
    micro: int = GLOBAL_BATCH
    router: dict[str, Any] = field(default_factory=lambda: {"balance_coef": 0.5, "z_coef": 0.1})
    router_weights: str = "random"
    optim: OptimConfig = SGD
    steps: int = 2
    model: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    eval_samples: int = 5
    eval_every: int = 0
    attention: bool = False
    lora: int = 0
    by_rows: bool = False

    @contextmanager
    def memory(self) -> Iterator[None]:
        """While open, a batch has as many logits as the case says."""
        rows = (lambda *_: 5) if self.by_rows else token_losses.rows_at_once
        with (
            patch("recipes.models.hf.head_losses.rows_at_once", rows),
            patch("recipes.engines.megatron.position_losses.rows_at_once", rows),
        ):
            yield


@dataclass
class Outcome:
    """What came of it, the same on all ranks.

    Attributes:
        rows: What the loop reported, by step.
        loads: Layer by expert, the share of the slots, of every step.
        grads: Gradients of the first step in full, by name.
        weights: Model after the last step in full, by name.
        tokens: What the statistics of each layer counted in the first step, over all ranks.
        logits: Of two samples, after training.
        notes: What else a case looks at.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    loads: list[Any] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    tokens: list[float] = field(default_factory=list)
    logits: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> list[float]:
        """A figure over the steps."""
        return [row[name] for row in self.rows if name in row]


def make_model(case: Case) -> HFModel:
    """The same weights in every process."""
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    model = HFModel(random_model(case.family, **small | case.model), Path(), torch.float32)
    config = TopKConfig(**{"init_std": 0.3} | case.router)
    surgery = Surgery(
        # Noise makes experts that differ: otherwise it would not matter which token goes where.
        method=Copy(CopyConfig(num_experts=EXPERTS, noise_std=0.5)),
        make_router=lambda width, experts: TopKRouter(config, width, experts),
        make_dispatcher=LocalDispatcher,
        backend="auto",
        seed=0,
    )
    swap(model, surgery)
    if case.attention:
        heads = TopKConfig(init_std=0.3, balance_coef=0.5)
        swap_attention(model, AttentionConfig(router=heads), seed=0)
    if case.lora:
        add_low_rank(model, LoraConfig(case.lora, alpha=2.0 * case.lora), seed=0)
        for index, layer in model.moe_layers():
            for name in sorted(FACTOR_NAMES - DRAWN):
                factor = getattr(layer.experts, name)
                generator = torch.Generator().manual_seed(index)
                factor.data.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    if case.router_weights == "equal":
        for _, layer in moe_layers(model.module):
            layer.router.weight_ED.data.zero_()
    return model


def tokens(first: int, count: int) -> Any:
    """``[count, S + 1]`` ids of samples that depend on their number alone."""
    rows = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 + number)
        rows.append(torch.randint(VOCABULARY, (SEQ_LEN + 1,), generator=generator))
    return torch.stack(rows).numpy()


def make_data() -> Any:
    """Stands in for `TrainData`; validation are samples that training does not reach."""
    return SimpleNamespace(
        files=(),
        sources=(),
        train=SimpleNamespace(
            seq_len=SEQ_LEN,
            batch=tokens,
            metadata=lambda first, count: None,
            num_counted=lambda first, count: count * SEQ_LEN,
        ),
        validation=SimpleNamespace(
            samples_per_epoch=100,
            batch=lambda first, count: tokens(500 + first, count),
            metadata=lambda first, count: None,
        ),
    )


def make_stage(case: Case, train_module: TrainModule, checkpoints: Path) -> Stage:
    """Training as the job does it."""
    train = TrainConfig(
        steps=case.steps,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=case.micro,
        eval_every=case.eval_every or case.steps,
        eval_samples=case.eval_samples,
        save_every=0,
    )
    return Stage(
        name="moe",
        title="moe",
        train=train,
        optim=case.optim,
        data=make_data(),
        train_module=train_module,
        costs=Costs(0, 0, None, None, None),
        checkpoints=checkpoints,
    )


class _Record(Callback):
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def on_row(self, stage: StageInfo, row: Mapping[str, float], load: LoadReport | None) -> None:
        self.outcome.rows.append(dict(row))
        if load is not None:
            self.outcome.loads.append(load.load)


def full(tensor: Tensor) -> Tensor:
    """A copy of all of it, on every rank."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def _look_before_first_step(train_module: Any, outcome: Outcome, engine: NativeEngine) -> None:
    """Keeps gradients and statistics of the first step: the step itself clears them."""
    original = train_module.step

    def step(lr_factor: float, norm_limit: float) -> Tensor:
        if not outcome.grads:
            named = train_module.model.module.named_parameters()
            outcome.grads = {name: full(p.grad) for name, p in named if p.grad is not None}
            counts = [
                sum(float(sums[-4]) for sums in layer.stats.sums.values())
                for _, layer in train_module.model.moe_layers()
            ]
            total = torch.tensor(counts)
            torch.distributed.all_reduce(total, group=engine.data_group)
            outcome.tokens = total.tolist()
        return original(lr_factor, norm_limit)

    train_module.step = step


def open_engine(**config: Any) -> NativeEngine:
    """An engine on the process group that is open already."""
    engine = NativeEngine(NativeConfig(**{"device": "cpu", "threads": 1} | config))
    with patch("torch.distributed.init_process_group"):
        engine.open()
    return engine


def train(case: Case) -> Outcome:
    """Runs a case on this rank."""
    outcome = Outcome()
    engine = open_engine(**case.engine)
    train_module = engine.prepare(make_model(case), case.optim)
    _look_before_first_step(train_module, outcome, engine)
    with tempfile.TemporaryDirectory() as folder:
        folder = engine.broadcast(folder)
        stage = make_stage(case, train_module, Path(folder))
        with case.memory():
            Loop(engine, [_Record(outcome)], StopRequest()).run(stage)
        engine.barrier()
    outcome.weights = {name: full(tensor) for name, tensor in train_module.full_tensors()}
    outcome.logits = train_module.logits(torch.from_numpy(tokens(900, 2))[:, :-1])
    outcome.notes = look(train_module)
    return outcome


def look(train_module: Any) -> dict[str, Any]:
    """What is where after an evaluation and at the end."""
    sharded = {name: isinstance(t, DTensor) for name, t in train_module.checkpoint_tensors().items()}
    dtypes: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Tensor, ...], out: Any) -> None:
        dtypes["router_weight"] = module.weight_ED.dtype
        dtypes["router_input"] = args[0].dtype
        dtypes["router_logits"] = out.logits_TE.dtype
        dtypes["combine_weights"] = out.weights_TK.dtype

    def keep_experts(module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        dtypes["expert_weight"] = module.w_up_EUD.dtype
        dtypes["expert_output"] = out.dtype

    _, layer = train_module.model.moe_layers()[0]
    handles = [layer.router.register_forward_hook(keep), layer.experts.register_forward_hook(keep_experts)]
    train_module.token_losses(torch.from_numpy(tokens(0, 1)))
    for handle in handles:
        handle.remove()
    again = {name: isinstance(t, DTensor) for name, t in train_module.checkpoint_tensors().items()}
    masters = {name: p.dtype for name, p in train_module.model.module.named_parameters()}
    return {"sharded": sharded, "sharded_after_eval": again, "dtypes": dtypes, "masters": masters}


def run_cases(cases: dict[str, Case]) -> dict[str, Outcome]:
    """Trains all cases on this rank, one after the other."""
    # Recomputation goes to the end of each block, past where statistics are written, and not only to the last
    # tensor that is needed: which one that is depends on the model.
    with set_checkpoint_early_stop(False):
        return {name: train(case) for name, case in cases.items()}
