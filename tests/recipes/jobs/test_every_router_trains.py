"""Every choice of ``conf/router`` goes through the whole job: surgery, training, export, reloading."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.config.compose import CONF
from tests.recipes.jobs.job_runs import job, summary, write_text

pytestmark = pytest.mark.slow

ROUTERS = sorted(path.stem for path in (CONF / "router").glob("*.yaml"))
# What a router needs besides its defaults to route four experts over 300 ids.
ALSO = {
    # Gates read from the experts' own keys say nothing among identical copies.
    "avg_k": {"upcycle.noise_std": "0.1"},
    # What is known of a token in a run is its id: five ranges, of which expert 0 has two.
    "keyed": {
        "router.key": "token_ids",
        "router.edges": "[90,120,160,220]",
        "router.experts": "[0,1,2,0,3]",
    },
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that the dense model is trained once."""
    return tmp_path_factory.mktemp("routers")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_trains(router: str, workplace: Path) -> None:
    options = {"router": router, "run.name": router, "data.path": write_text(workplace / "text")}
    options |= {"compare.cpt": False, "train.steps": 2, "optim.schedule.warmup_steps": 0}
    ended = job(workplace, options | ALSO.get(router, {}))
    assert ended.code == 0, ended.err
    found = summary(workplace / "outputs" / router)
    assert found["export"]["relative"] < 1e-4
    assert [row["model"] for row in found["results"]] == ["dense", "moe"]
