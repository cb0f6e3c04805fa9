"""Gathers a method's statistics outside a run: by one process, into a folder that it goes on from."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.upcycle import upcycle_methods
from recipes.calibration.gather import Calibration, LayerTensors
from recipes.data.build import load_data
from recipes.engines import engine_classes
from recipes.hosts.huggingface import HuggingFaceHost
from recipes.interrupt import StopRequest
from recipes.jobs.base import Session
from recipes.loop import Loop
from recipes.packed_attention import fit_attention
from recipes.run_dir import RunDir
from recipes.schema import RunConfig
from recipes.tracking import RunLogger, TrackerConfig, start


def calibrate_alone(
    config: RunConfig, values: Mapping[str, Any], host: HuggingFaceHost, folder: Path
) -> LayerTensors | None:
    """The statistics that the config's method asks for.

    Args:
        config: Names the method, the text and how much of it.
        values: The same as composed.
        host: The dense decoder.
        folder: Where state and result are kept: a second call goes on, or reads.

    Returns:
        By layer and name; None when it was asked to stop, with the state saved.
    """
    method = upcycle_methods()[config.upcycle.name](config.upcycle).for_router(config.router)
    if not method.statistics:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = int(host.config.get_text_config().vocab_size)
    cache = Path(config.cache_dir).expanduser().absolute() / "tokens"
    engine = engine_classes()[config.engine.name](config.engine)
    engine.open()
    # Nothing is charted: there are no steps.
    quiet = dataclasses.replace(config.tracker, mode="disabled")
    assert isinstance(quiet, TrackerConfig)
    logger = RunLogger(folder, start(quiet, folder, folder.name, {}, say=lambda line: None))
    try:
        data = load_data(config.data, host.folder, cache, vocab_size, lambda line: None)
        data = fit_attention(data, host.model, print)
        with StopRequest(speaks=True) as stop:
            run_dir = RunDir(folder, resumed=True)
            session = Session(
                config, values, engine, run_dir, stop, logger, Loop(engine, [], stop), time.time()
            )
            return Calibration(session, host, method, data).run()
    finally:
        logger.finish()
        engine.close()
