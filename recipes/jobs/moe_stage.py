"""The upcycled model: made, trained and exported."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.errors import ConfigError
from moe.upcycle import UpcycleMethod
from moe.upcycle.equivalence import TOLERANCES
from recipes.config.schema import RunConfig
from recipes.config.sections.export_config import ExportConfig
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.data.chat_template import carry_template
from recipes.jobs.top_k_schedules import model_schedule, schedule_of, summarise_phases
from recipes.jobs.trained_stage import TrainedStage
from recipes.models.export import choose_exporter
from recipes.models.export.spec import describe_model
from recipes.models.export.write_export import export, verify_export
from recipes.models.hf.attention_blocks import (
    describe_attention,
    summarise_attention,
    swap_attention,
    upcycle_attention,
)
from recipes.models.hf.branches import check_sources
from recipes.models.hf.drift import describe_surgery, summarise_surgery
from recipes.models.hf.ffn_surgery import swap, upcycle
from recipes.models.hf.hf_model import HFModel, load_model
from recipes.models.lora_model import add_low_rank, require_rank
from recipes.tracking.results import stage_label
from recipes.training.model_costs import measure_costs
from recipes.training.stage import Stage, StageResult
from recipes.training.validation import validation_loss
from recipes.upcycling.calibration.gather import Calibration, LayerTensors, kept_statistics
from recipes.upcycling.convert.moe_plan import MoEPlan, MoERequest, plan_moe
from recipes.upcycling.optim_start import start_optimizer
from recipes.upcycling.prompts.prompt_rows import with_prompt_rows
from recipes.upcycling.sharded.sharded_check import measure_shards
from recipes.upcycling.sharded.sharded_models import moe_model
from recipes.upcycling.surgery import make_surgery

# Real tokens of the step-0 gate and of the comparison after export.
_CHECK_SAMPLES = 8
_CHECK_LENGTH = 512


class MoEStage(TrainedStage):
    """The upcycled model."""

    name = "moe"

    def _build(self, source: Path | None) -> Stage | None:
        self._fit_attention()
        method = make_surgery(self.config).method
        statistics = self._statistics(method, source)
        if statistics is None:
            return None
        if reason := self._whole_reason():
            if method.aligns_outputs:
                rule = f"it is measured on models in parts, and {reason}"
                raise ConfigError.one("upcycle.align_outputs", True, rule, "Set attention=none.")
            self.session.log(f"{self.name}: every rank makes the whole mixture at first: {reason}")
            return self._build_whole(source, statistics)
        return self._build_shards(source, statistics)

    def _whole_reason(self) -> str | None:
        """Why no rank can make its part alone; None where each can."""
        return None if self.config.attention is None else "experts of attention are made of whole models"

    def _build_shards(self, source: Path | None, statistics: LayerTensors) -> Stage:
        """Each rank makes what it holds, and nothing is ever whole."""
        plan = self._plan(source, statistics)
        require_rank(plan.spec, self.config.experts.lora)
        backend, schedule = self.config.experts.backend, schedule_of(self.config, list(plan.plans))
        model, state = moe_model(plan, backend), {}
        model.schedule = schedule
        if source is None:
            self._beat("the step-0 gate")
            # Exactness was measured when the run began: a checkpoint's weights need not be made.
            report, model.weights = measure_shards(
                self.session.engine, plan, self._check_tokens(), backend, schedule
            )
            self.session.log(describe_surgery(report))
            state = {"exactness": summarise_surgery(report)}
        return self._begun(self._moe_stage(model, state), source)

    def _moe_stage(self, model: HFModel, state: dict[str, Any]) -> Stage:
        """The leg, with low-rank factors beside the experts where they are asked for."""
        lora = self.config.experts.lora
        require_rank(describe_model(model), lora)
        add_low_rank(model, lora, self.config.seed)
        if lora.rank:
            instead = "train in the place of the experts' weights"
            self.session.log(f"{self.name}: low-rank factors of rank {lora.rank} {instead}")
        return self._stage(model, state)

    def _begun(self, stage: Stage, source: Path | None) -> Stage:
        """With the optimizer state of the dense model's training, where a run that begins is given one."""
        given = self.config.optim.start_from
        if given is not None and source is None:
            folder, spec = Path(given).expanduser(), describe_model(stage.train_module.skeleton)
            done = start_optimizer(stage.train_module.checkpoint_tensors(), spec, self.folder, folder)
            self.session.log(f"{self.name}: optimizer state of step {done} of {folder}, none for the routers")
        return stage

    def _plan(self, source: Path | None, statistics: LayerTensors) -> MoEPlan:
        config, trust = self.config, self.config.trust_remote_code
        request = MoERequest(self.folder, config.upcycle, config.router, config.seed, trust)
        branches = make_surgery(config).method.sources if source is None else ()
        # The preflight knows no embedded default to compare them with.
        if mistakes := check_sources(branches, str(self.folder), trust_remote_code=trust):
            raise ConfigError(mistakes)
        return plan_moe(request, statistics, reads=source is None)

    def _build_whole(self, source: Path | None, statistics: LayerTensors) -> Stage:
        model = self._load(self.folder)
        surgery = make_surgery(self.config)
        model.schedule = model_schedule(self.config, model, surgery.method)
        if source is not None:
            # The weights come from the checkpoint: exactness was measured when the run began.
            swap(model, surgery, [model] * len(surgery.method.sources), statistics)
            if self.config.attention is not None:
                swap_attention(model, self.config.attention, self.config.seed)
            return self._moe_stage(model, {})
        self._beat("the step-0 gate")
        sources = [self._load(Path(folder).expanduser()) for folder in surgery.method.sources]
        report = upcycle(model, surgery, self._check_tokens(), sources, statistics)
        self.session.log(describe_surgery(report))
        state = {"exactness": summarise_surgery(report)}
        if self.config.attention is not None:
            cut = upcycle_attention(model, self.config.attention, self.config.seed, self._check_tokens())
            self.session.log(describe_attention(cut))
            state["attention"] = summarise_attention(cut)
        return self._begun(self._moe_stage(model, state), source)

    def _load(self, folder: Path) -> HFModel:
        """A dense model, whole."""
        return load_model(folder, trust_remote_code=self.config.trust_remote_code)

    def _statistics(self, method: UpcycleMethod[Any], source: Path | None) -> LayerTensors | None:
        """What the method must be told of the dense model; None when the run was asked to stop meanwhile."""
        if source is not None:
            return (
                kept_statistics(self.session.console, self.session.run_dir.path, source)
                if method.statistics
                else {}
            )
        if not method.statistics and self.config.section(PromptsConfig).path is None:
            return {}
        self._beat("calibration")
        self.session.log(f"{self.name}: every rank loads the whole dense model, to look at text with it")
        model = self._load(self.folder)
        found: LayerTensors | None = {}
        if method.statistics:
            found = Calibration(
                self.config,
                self.session.console,
                self.session.stop,
                self.session.run_dir.path,
                model,
                method,
                self.data,
            ).run()
        known = None if found is None else with_prompt_rows(found, self.config, model)
        self._beat("making the model")
        del model
        gc.collect()
        return known

    def _check_tokens(self) -> Tensor:
        batch = self.data.validation.batch(0, _CHECK_SAMPLES)
        return torch.from_numpy(batch[:, : min(self.data.train.seq_len, _CHECK_LENGTH)])

    def _finish(self, stage: Stage, result: StageResult) -> None:
        self.results.put("exactness", stage.state["exactness"])
        if "attention" in stage.state:
            self.results.put("attention", stage.state["attention"])
        if stage.scheduled_costs:
            self.results.put(
                "top_k_schedule", summarise_phases(stage.train_module.model.schedule, stage.scheduled_costs)
            )
        self._put_dense(stage, result)
        self._export(stage)
        self._log_backend(stage)

    def _put_dense(self, stage: Stage, result: StageResult) -> None:
        """The row of the dense model that everything is compared with."""
        self._beat("evaluating the dense model")
        model = self._dense()
        costs = measure_costs(model, self.config.data.seq_len, None)
        train_module = self.session.engine.prepare(model, self.config.optim)
        engine, heartbeat = self.session.engine, self.session.heartbeat
        loss = validation_loss(engine, train_module, self.data, self.config.train, heartbeat)
        self.results.put_stage("dense", stage_label("dense"), loss, 0, costs, None)

    def _log_backend(self, stage: Stage) -> None:
        _, layer = stage.train_module.model.moe_layers()[0]
        choice = layer.experts.backend_choice()
        if choice is not None:
            self.results.put("experts", {"backend": choice.backend.name, "reason": choice.reason})

    def _export(self, stage: Stage) -> None:
        session, model = self.session, stage.train_module.skeleton
        exporter, unsupported_reasons = choose_exporter(describe_model(model))
        dtype = _export_dtype(self.config, model)
        if not exporter.is_native:
            session.log(f"export: in Graft's own format, since {'; '.join(unsupported_reasons)}")
        self._beat("the export")
        tensors, heartbeat = stage.train_module.full_tensors(), session.heartbeat
        export(
            model,
            exporter,
            tensors,
            session.run_dir.export,
            dtype,
            writes=session.is_rank0,
            heartbeat=heartbeat,
        )
        self._beat("checking the export")
        tokens = self._check_tokens()
        logits = stage.train_module.logits(tokens)
        loosest = max((dtype, session.engine.compute_dtype), key=lambda kind: TOLERANCES[kind])
        session.on_rank_zero(lambda: carry_template(self.config.data, session.run_dir.export))
        memory, folder = self.config.section(ExportConfig).memory_gib * 2**30, session.run_dir.export
        report = session.on_rank_zero(
            lambda: verify_export(exporter, folder, tokens, logits, loosest, memory, heartbeat)
        )
        session.log(
            f"export: {report.format} in {report.path}; reloaded, its logits differ by "
            f"{report.logits.max_diff:.2e} ({report.logits.relative:.1e} of the largest)"
        )
        self.results.put(
            "export",
            {
                "format": report.format,
                "native": report.is_native,
                "path": session.run_dir.export.name,
                "relative": report.logits.relative,
                "max_diff": report.logits.max_diff,
                "kl": report.logits.kl,
                "argmax_agreement": report.logits.argmax_agreement,
                "sample": report.sample,
            },
        )


def _export_dtype(config: RunConfig, model: HFModel) -> torch.dtype:
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "source": model.source_dtype}
    return named[config.section(ExportConfig).dtype]
