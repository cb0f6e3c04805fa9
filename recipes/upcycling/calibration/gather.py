"""Gathers the statistics that a method asks for, on all ranks together; stopped, it goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe.errors import CheckpointError, ConfigError
from moe.upcycle.base import UpcycleMethod
from moe.upcycle.build_experts import ffn_shape
from moe.upcycle.layer_plan import Draws
from moe.upcycle.statistics.layer_statistics import (
    LayerStatistics,
    Wanted,
    needs_gradient,
    reads_text,
    statistic_bytes,
)
from recipes.config.schema import RunConfig
from recipes.config.sections.calibration_config import CalibrationConfig
from recipes.data.build_data import TrainData, load_data
from recipes.data.samples import Samples, TokenMetadata
from recipes.engines.console import RankConsole
from recipes.models.hf.ffn_blocks import FFNSite, chosen_sites
from recipes.models.hf.hf_model import HFModel
from recipes.runtime.interrupt import StopRequest
from recipes.runtime.progress import Progress
from recipes.tracking.metrics_log import Metric, reduce_metrics
from recipes.upcycling.calibration.observe import Observer
from recipes.upcycling.calibration.statistics_files import (
    CalibrationFolder,
    Stored,
    checkpoint_fingerprint,
    read_stored,
    require_identity,
    write_stored,
)

LayerTensors = Mapping[int, Mapping[str, Tensor]]


class Calibration:
    """Calibration of one model for one method."""

    def __init__(
        self,
        config: RunConfig,
        console: RankConsole,
        stop: StopRequest,
        folder: Path,
        model: HFModel,
        method: UpcycleMethod[Any],
        data: TrainData,
    ) -> None:
        """Prepares the calibration.

        Args:
            config: Config of the run.
            console: Its ranks.
            stop: Asks for an early end.
            folder: Where state and result are kept.
            model: The dense decoder.
            method: Names the statistics.
            data: The run's data, which is calibrated on where ``calibration.path`` names no other.
        """
        self.run_config = config
        self.console = console
        self.engine = console.engine
        self.stop = stop
        self.model = model
        self.method = method
        self.wanted = Wanted(tuple(method.statistics), method.statistic_options)
        self.config = config.section(CalibrationConfig)
        self.folder = CalibrationFolder.of_run(folder)
        self.text, text_fingerprint = self._text(data)
        self.identity = self._identity(text_fingerprint)

    def run(self) -> LayerTensors | None:
        """Gathers them, or reads what an earlier process of the run has gathered.

        Returns:
            By layer and name; None when the run was asked to stop, with the state saved.

        Raises:
            ConfigError: They take more memory than ``calibration.max_gib``.
            CheckpointError: What lies in the run's directory is of another model, text or option.
        """
        kept = read_statistics(self.folder)
        if kept is not None:
            require_identity(self.folder.statistics, kept, self.identity)
            return kept.by_layer()
        started = time.monotonic()
        device = self.engine.device
        self.model.module.to(device)
        try:
            # Found again: on another device the weights are other tensors.
            sites = chosen_sites(self.model, self.method.config)
            self._require_memory(sites)
            finished = self._gather(sites)
        finally:
            self.model.module.to("cpu")
        if not finished:
            return None
        self.console.log(
            f"calibration: {', '.join(self.wanted.names)} of {len(sites)} layers on "
            f"{self.config.samples * self.text.seq_len:,} tokens took {time.monotonic() - started:.0f} s"
        )
        kept = read_statistics(self.folder)
        assert kept is not None, self.folder.statistics
        return kept.by_layer()

    def _text(self, data: TrainData) -> tuple[Samples, str]:
        path = self.config.path
        if path is None:
            return data.train, data.fingerprint
        run, console = self.run_config, self.console
        # Both sides of the split: all of it is calibrated on, none held out.
        own = run.data.of(path, path)
        cache = Path(run.cache_dir).expanduser().absolute() / "tokens"
        vocab_size = int(self.model.config.get_text_config().vocab_size)

        def load(log: Any) -> TrainData:
            trust = run.trust_remote_code
            return load_data(own, self.model.folder, cache, vocab_size, log, trust_remote_code=trust)

        console.on_rank_zero(lambda: load(console.lines).fingerprint)
        loaded = load(lambda line: None)
        return loaded.train, loaded.fingerprint

    def _identity(self, text_fingerprint: str) -> dict[str, Any]:
        """Returns the values that the statistics depend on, by config path where there is one."""
        config = self.run_config
        layers = [site.layer for site in chosen_sites(self.model, self.method.config)]
        dense = self.console.on_rank_zero(lambda: checkpoint_fingerprint(self.model.folder))
        return {
            "calibration.samples": self.config.samples,
            "calibration.batch_size": self.config.batch_size,
            "calibration text": text_fingerprint,
            "data.seq_len": config.data.seq_len,
            "dense weights": dense,
            "seed": config.seed,
            "statistics": self.wanted.describe(),
            "upcycle.layers": layers,
        }

    def _require_memory(self, sites: list[FFNSite]) -> None:
        by_name: dict[str, int] = {}
        for site in sites:
            for name, size in statistic_bytes(ffn_shape(site.weights), self.wanted).items():
                by_name[name] = by_name.get(name, 0) + size
        total = sum(by_name.values()) / 2**30
        if total > self.config.max_gib:
            largest = max(by_name, key=lambda name: by_name[name])
            rule = (
                f"the statistics of {len(sites)} layers take {total:.1f} GiB, most of it for {largest} "
                f"({by_name[largest] / 2**30:.1f} GiB)"
            )
            remedy = "Raise it, upcycle fewer layers, or choose a method or split that needs less."
            raise ConfigError.one("calibration.max_gib", self.config.max_gib, rule, remedy)

    def _gather(self, sites: list[FFNSite]) -> bool:
        seed = self.run_config.seed
        layers = {
            site.layer: LayerStatistics(site.weights, self.wanted, Draws(seed, site.layer)) for site in sites
        }
        observer = Observer(self.model, sites, layers, self.engine.compute_dtype)
        first_pass, first_batch = self._load(layers)
        passes = next(iter(layers.values())).passes
        for number in range(first_pass, len(passes)):
            if first_batch == 0:
                for statistics in layers.values():
                    statistics.begin(number)
            if reads_text(passes[number]) and not self._pass(observer, number, len(passes), first_batch):
                return False
            first_batch = 0
            for statistics in layers.values():
                statistics.finish(number, self._group)
        tensors = {
            f"{index}/{name}": value
            for index, statistics in layers.items()
            for name, value in statistics.asked_for().items()
        }
        self.console.on_rank_zero(lambda: self._conclude(tensors))
        return True

    @property
    def _group(self) -> ProcessGroup | None:
        return self.engine.data_group if self.engine.world_size > 1 else None

    def _pass(self, observer: Observer, number: int, count: int, first_batch: int) -> bool:
        """Passes over the text once; returns False when asked to stop before its end."""
        size = self.config.batch_size
        batches = -(-self.config.samples // size)
        gradient = needs_gradient(observer.layers[observer.sites[0].layer].passes[number])
        label = "calibration" if count == 1 else f"calibration, pass {number + 1} of {count}"
        shown = self.console.log if self.console.is_rank0 else None
        with (
            observer.watching(gradient),
            Progress(label, batches, "batches", shown, done=first_batch) as progress,
        ):
            for batch in range(first_batch, batches):
                self._batch(observer, batch, gradient)
                self.console.heartbeat.progress()
                progress.update()
                done = batch + 1
                stopping = self._asked_to_stop()
                due = self.config.save_every > 0 and done % self.config.save_every == 0
                if done < batches and (stopping or due) or stopping:
                    self._save(observer.layers, number, done)
                if stopping:
                    return False
        return True

    def _batch(self, observer: Observer, batch: int, gradient: bool) -> None:
        """Deals the samples of a batch out to the ranks; a rank without any does nothing."""
        engine, size = self.engine, self.config.batch_size
        every = range(batch * size, min(self.config.samples, (batch + 1) * size))
        own = every[engine.rank :: engine.world_size]
        if own:
            tokens_BS1 = torch.stack([torch.from_numpy(self.text.sample(n)) for n in own])
            first_index_B = torch.tensor(own) * self.text.seq_len
            observer.show(tokens_BS1, first_index_B, gradient, self._metadata(own))

    def _metadata(self, own: range) -> TokenMetadata | None:
        return TokenMetadata.together([self.text.metadata(n, 1) for n in own])

    def _asked_to_stop(self) -> bool:
        """Returns True on all ranks when it is asked on one."""
        requested = {"stop": Metric(float(self.stop.requested), "max")}
        return reduce_metrics(requested, self.engine.data_group)["stop"] > 0

    def _save(self, layers: Mapping[int, LayerStatistics], number: int, done: int) -> None:
        tensors = {
            f"{index}/{key}": value
            for index, statistics in layers.items()
            for key, value in statistics.state(self._group).items()
        }
        stored = Stored(tensors, self.identity, (number, done))
        self.console.on_rank_zero(lambda: write_stored(self.folder.state, stored))

    def _load(self, layers: Mapping[int, LayerStatistics]) -> tuple[int, int]:
        """Resumes from a state; returns the pass and the number of its batches that are done."""
        stored = read_stored(self.folder.state)
        if stored is None:
            return 0, 0
        require_identity(self.folder.state, stored, self.identity)
        number, done = stored.place
        for index, statistics in layers.items():
            statistics.load(number, stored.layer(index), takes_sums=self.console.is_rank0)
        self.console.log(f"calibration: going on from batch {done} of pass {number + 1}")
        return number, done

    def _conclude(self, tensors: Mapping[str, Tensor]) -> None:
        write_stored(self.folder.statistics, Stored(tensors, self.identity))
        self.folder.state.unlink(missing_ok=True)


def read_statistics(folder: CalibrationFolder) -> Stored | None:
    """Reads the finished statistics of a run; None where there are none."""
    return read_stored(folder.statistics)


def kept_statistics(console: RankConsole, run_dir: Path, source: Path) -> LayerTensors:
    """Reads the statistics by which the experts of a checkpoint were planned.

    A run that goes on from another run's checkpoint gets a file of its own.

    Args:
        console: The ranks of the run.
        run_dir: Its directory.
        source: The checkpoint.

    Raises:
        CheckpointError: They are not there.
    """
    origin, own = (CalibrationFolder.of_run(path) for path in (source.parent.parent, run_dir))
    stored = read_statistics(origin)
    if stored is None:
        rule = "the experts were planned by statistics, and their file is missing"
        remedy = "Restore it from the run, or start a new run."
        raise CheckpointError.one("resume", str(origin.statistics), rule, remedy)
    if own != origin:
        console.on_rank_zero(lambda: write_stored(own.statistics, stored))
    return stored.by_layer()
