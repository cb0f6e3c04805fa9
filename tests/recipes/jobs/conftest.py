"""Runs that several tests of the job look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes.jobs.job_runs import Ended, job, write_text


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``text``, and the outputs and the cache that the runs below it share."""
    folder = tmp_path_factory.mktemp("job")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="session")
def text(workplace: Path) -> str:
    """The pattern of the text files."""
    return str(workplace / "text" / "*.txt")


@pytest.fixture(scope="session")
def first_run(workplace: Path, text: str) -> Ended:
    """An uninterrupted run of everything, in ``outputs/first``; the embedded default is trained in it."""
    return job(workplace, {"data.path": text, "run.name": "first", "export.try_first": True}, full=True)


@pytest.fixture(scope="session")
def spread_options(workplace: Path, text: str, first: Path) -> dict[str, Any]:
    """Of a run whose losses do not show how a batch is cut over ranks: none are of a micro-batch."""
    # What the first run has trained: an embedded default is of the engine that trained it.
    (dense,) = (workplace / "cache").glob("dense-*/hf")
    return {
        "dense": dense,
        "data.path": text,
        "router.balance_coef": 0.0,
        "train.micro_batch_size": 1,
        "compare.cpt": False,
    }


@pytest.fixture(scope="session")
def first(workplace: Path, first_run: Ended) -> Path:
    """Its directory."""
    assert first_run.code == 0, first_run.err
    return workplace / "outputs" / "first"
