"""Gathers a method's statistics outside a run: by one process, into a folder that it goes on from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from moe.errors import ConfigError
from moe.upcycle import upcycle_method
from recipes.config.schema import RunConfig
from recipes.data.build_data import load_data
from recipes.engines import engine_classes
from recipes.engines.console import RankConsole
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.packed_attention import check_documents
from recipes.runtime.interrupt import StopRequest
from recipes.upcycling.calibration.gather import Calibration, LayerTensors


def calibrate_alone(config: RunConfig, model: HFModel, folder: Path) -> LayerTensors | None:
    """Gathers the statistics that the config's method asks for.

    Args:
        config: Names the method, the text and how much of it.
        model: The dense decoder.
        folder: Where state and result are kept: a second call goes on, or reads.

    Returns:
        By layer and name; None when it was asked to stop, with the state saved.
    """
    method = upcycle_method(config.upcycle).for_router(config.router)
    if not method.statistics:
        return {}
    trust = config.trust_remote_code
    if mistakes := check_documents(config.data, model.folder, trust_remote_code=trust):
        raise ConfigError(mistakes)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = int(model.config.get_text_config().vocab_size)
    cache = Path(config.cache_dir).expanduser().absolute() / "tokens"
    engine = engine_classes()[config.engine.name](config.engine)
    engine.open()
    try:
        load = partial(load_data, log=lambda line: None, trust_remote_code=trust)
        data = load(config.data, model.folder, cache, vocab_size)
        with StopRequest(verbose=True) as stop:
            return Calibration(config, RankConsole(engine), stop, folder, model, method, data).run()
    finally:
        engine.close()
