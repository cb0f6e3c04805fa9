"""Every choice of ``conf/router`` goes through the whole job: surgery, training, export, reloading."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.compose import CONF
from tests.jobs.job_runs import job, summary, write_text

pytestmark = pytest.mark.slow

ROUTERS = sorted(path.stem for path in (CONF / "router").glob("*.yaml"))
# Without keys in the batch there is nothing to route by, and no recipe sets them yet.
NEEDS_KEYS = ("keyed",)
# Gates read from the experts' own keys say nothing among identical copies.
NEEDS_DIFFERENT_EXPERTS = ("avg_k",)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that the dense model is trained once."""
    return tmp_path_factory.mktemp("routers")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_trains(router: str, workplace: Path) -> None:
    options = {"router": router, "run.name": router, "data.path": write_text(workplace / "text")}
    if router in NEEDS_DIFFERENT_EXPERTS:
        options["upcycle.noise_std"] = "0.1"
    ended = job(
        workplace, options | {"compare.cpt": False, "train.steps": 2, "optim.schedule.warmup_steps": 0}
    )
    if router in NEEDS_KEYS:
        assert ended.code != 0
        assert "keys" in ended.err
        return
    assert ended.code == 0, ended.err
    found = summary(workplace / "outputs" / router)
    assert found["export"]["relative"] < 1e-4
    assert [row["model"] for row in found["results"]] == ["dense", "moe"]
