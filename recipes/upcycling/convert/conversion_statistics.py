"""Statistics on text that a conversion needs, kept beside the output until that is whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from moe.errors import CheckpointError
from moe.upcycle import upcycle_method
from recipes.config.schema import RunConfig
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.models.hf.hf_model import load_model
from recipes.upcycling.calibration.calibrate_alone import calibrate_alone
from recipes.upcycling.calibration.gather import LayerTensors
from recipes.upcycling.prompts.prompt_rows import with_prompt_rows


def calibration_folder(out: Path) -> Path:
    """Returns the folder of a conversion's statistics until ``out`` is done."""
    return out.with_name(f".calibration-{out.name}")


def needs_statistics(config: RunConfig) -> bool:
    """Tells if the config's method reads text, or if its router's rows come from prompts."""
    method = upcycle_method(config.upcycle).for_router(config.router)
    return bool(method.statistics) or config.section(PromptsConfig).path is not None


def gather_statistics(config: RunConfig, out: Path) -> LayerTensors | None:
    """Runs the dense model, whole in memory in fp32, over the config's text.

    Args:
        config: Names the dense model, the method and the text.
        out: The conversion's output; a second call for it goes on where the first was stopped.

    Returns:
        By layer and name; None when it was asked to stop, with its state saved.

    Raises:
        ModelError: The dense model cannot be loaded.
        CheckpointError: The statistics beside the output are damaged, or of something else.
    """
    assert config.dense is not None, "a conversion has a dense model"
    folder = calibration_folder(out)
    model = load_model(Path(config.dense).expanduser(), trust_remote_code=config.trust_remote_code)
    try:
        found = calibrate_alone(config, model, folder)
        return None if found is None else with_prompt_rows(found, config, model)
    except CheckpointError as error:
        remedy = f"Set it back to go on, or delete {folder}."
        raise CheckpointError([replace(mistake, remedy=remedy) for mistake in error.mistakes]) from error


def discard_statistics(out: Path) -> None:
    """Removes the statistics when the output is whole."""
    shutil.rmtree(calibration_folder(out), ignore_errors=True)
