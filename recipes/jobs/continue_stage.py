"""Stage of a mixture that goes on training: it is read, compared with transformers' own, and written back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moe.errors import ConfigError, ExactnessError, FieldError, Mistake, UserError
from moe.routers.configs import RouterConfig
from moe.upcycle.configs.copies_config import CopyConfig
from moe.upcycle.equivalence import TOLERANCES, agree, logit_drift
from recipes.config.schema import RunConfig
from recipes.config.sections.continue_config import ContinueConfig
from recipes.data.chat_tokens import check_first_row
from recipes.data.tokenizer import check_tokenizer
from recipes.jobs.expert_rules import check_backend
from recipes.jobs.export_stage import check_export_early, export_moe
from recipes.jobs.memory_check import foresee_memory
from recipes.jobs.option_rules import check_engine_options
from recipes.jobs.preflight import check_engine
from recipes.jobs.rounding import MixtureStart
from recipes.jobs.stage_run import Built, StageParts, StageRun
from recipes.models.export.companions import check_carried_tokenizer, check_companions
from recipes.models.export.read_back import ReadBack
from recipes.models.families.open_mixture import open_mixture, source_router
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.config_file import trusts, vocabulary_size
from recipes.models.hf.drift import SurgeryReport, describe_surgery, summarise_surgery
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.packed_attention import check_documents
from recipes.models.lora_model import add_low_rank, require_rank
from recipes.runtime.machine_memory import collect
from recipes.tracking.results import stage_label
from recipes.training.stage import Stage, StageResult
from recipes.upcycling.convert.folder_check import describe_tokens, telling_rows
from recipes.upcycling.sharded.mixture_model import mixture_model

_LOADER = "its class's own loader, block by block"


def of_mixture(config: RunConfig) -> RunConfig:
    """Returns the config with the mixture's own router and number of experts.

    Raises:
        ModelError: The mixture's family is not known, or its router is not Graft's.
        ConfigError: ``continue`` has an option that this router does not.
    """
    folder, own = Path(config.dense or "").expanduser(), config.section(ContinueConfig)
    router, num_experts, stores_bias = source_router(folder)
    changes = {key: value for key, value in vars(own).items() if value is not None}
    for key, value in changes.items():
        if not hasattr(router, key) or (key == "bias_rate" and not stores_bias):
            rule = f"this mixture's router, {router.name}, has no such option"
            raise ConfigError.one(f"continue.{key}", value, rule, "Leave it out.")
    return replace(config, router=replace(router, **changes), upcycle=CopyConfig(num_experts=num_experts))


def check_mixture(config: RunConfig) -> list[Mistake]:
    """Checks the mixture, its files and tokenizer, the engine and the experts' library."""
    folder, trust = Path(config.dense or "").expanduser(), config.trust_remote_code
    try:
        found = of_mixture(config)
        mixture = open_mixture(folder, trust_remote_code=trust)
    except (UserError, FieldError) as error:
        return list(error.mistakes)
    path, runs_code = config.dense or "", mixture.runs_code
    vocab_size = vocabulary_size(folder, trust_remote_code=runs_code)
    mistakes = check_tokenizer(path, vocab_size, "dense", trust_remote_code=trust)
    mistakes += check_backend(found, mixture.spec.moe_blocks[0].expert) + check_engine(found)
    mistakes += check_engine_options(found)
    mistakes += check_companions(path, code=trusts(folder, trust), trust_remote_code=trust)
    mistakes = mistakes or check_carried_tokenizer(path, trust_remote_code=trust)
    mistakes = mistakes or check_documents(config.data, folder, trust_remote_code=runs_code)
    return mistakes or check_first_row(config.data, path, trust_remote_code=trust)


def open_tuned(folder: Path, config: RunConfig) -> SourceMixture:
    """Opens a mixture whose routers train by a run's options, as `of_mixture` returns them."""
    mixture = open_mixture(folder, trust_remote_code=config.trust_remote_code)
    for moe in mixture.spec.moe_blocks:
        moe.router.config = config.router
    return mixture


def build_mixture(run: StageRun, source: Path | None) -> Built:
    """Builds the mixture on the ranks, each of which reads its own part.

    Args:
        run: The stage.
        source: Checkpoint that it goes on from.
    """
    config = run.config
    mixture = open_tuned(run.inputs.folder, config)
    run.log(f"{run.name}: {mixture.title}, {_words(config.router)}")
    for note in mixture.notes:
        run.log(f"{run.name}: {note}")
    require_rank(mixture.spec, config.experts.lora)
    blank = partial(_model, run, mixture, reads=False)
    foresee_memory(run, _trained(run, blank()))
    begin, begun = partial(check_export_early, run), partial(MixtureStart, mixture)
    if source is not None:
        return Built(_trained(run, blank()), {}, begin, blank=blank, begun=begun, format=mixture.format)
    run.beat("the equivalence check at step 0")
    report = _measure(run, mixture)
    run.log(describe_surgery(report))
    state = {"exactness": summarise_surgery(report)}
    model = _trained(run, _model(run, mixture, reads=True))
    return Built(model, state, begin, blank=blank, begun=begun, format=mixture.format)


def _words(router: RouterConfig) -> str:
    options = [f"{key}={value}" for key, value in vars(router).items() if key not in ("name", "init_std")]
    return f"router {router.name}: {', '.join(options)}"


def _model(run: StageRun, mixture: SourceMixture, *, reads: bool) -> HFModel:
    """Returns the mixture without memory."""
    model = mixture_model(mixture, run.config.experts.backend, reads=reads)
    # Its tokenizer's code may be trusted though a class of transformers computes it.
    model.trust_remote_code = run.config.trust_remote_code
    return model


def _trained(run: StageRun, model: HFModel) -> HFModel:
    add_low_rank(model, run.config.experts.lora, run.config.seed)
    return model


@torch.no_grad()
def _measure(run: StageRun, mixture: SourceMixture) -> SurgeryReport:
    """Compares the mixture on real tokens with what transformers' own loading and layers make of it."""
    console, engine, folder = run.inputs.console, run.engine, run.inputs.folder
    trust = run.config.trust_remote_code
    tokens_BS = telling_rows(folder, run.data.validation)

    kept: list[torch.Tensor] = []

    def theirs() -> None:
        # Block by block: no rank needs to hold the whole mixture.
        unread = mixture.format.open(folder, trust_remote_code=trust)
        kept.append(ReadBack(unread, 0, console.heartbeat).model(input_ids=tokens_BS).logits)

    console.on_rank_zero(theirs)
    model = _model(run, mixture, reads=True)
    engine.shard_for_eval(model)
    logits = model.module(input_ids=tokens_BS.to(engine.device)).logits.cpu()
    released = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    del model
    collect(released)
    drift = console.on_rank_zero(lambda: logit_drift(kept[0], logits))
    if not agree(drift, torch.float32):
        raise ExactnessError(
            f"Graft does not compute {folder} as transformers does: logits differ by {drift.relative:.2e} of "
            f"the largest, and at most {TOLERANCES[torch.float32]:.0e} is allowed. Nothing was trained"
        )
    indices, words = tuple(moe.index for moe in mixture.spec.moe_blocks), describe_tokens(folder, tokens_BS)
    return SurgeryReport(None, indices, True, drift, (), (), _LOADER, words)


def report_mixture(run: StageRun, stage: Stage, result: StageResult) -> None:
    """Reports exactness, and exports the mixture in its own format."""
    run.results.put("exactness", stage.state["exactness"])
    label = stage_label("mixture")
    run.results.put_stage("mixture", label, result.first_val_loss, 0, stage.costs, None)
    export_moe(run, stage)


CONTINUED = StageParts("moe", build_mixture, report_mixture, label="MoE (continued)")
