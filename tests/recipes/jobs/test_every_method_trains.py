"""Every choice of ``conf/upcycle`` goes through the whole job: surgery, training, export, reloading."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe.upcycle import upcycle_method
from recipes.config.compose import CONF, compose_config
from recipes.config.schema import parse_config
from tests.moe.routers.routing_cases import method_case
from tests.recipes.jobs.job_runs import job, summary, write_text

pytestmark = pytest.mark.slow

METHODS = sorted(path.stem for path in (CONF / "upcycle").glob("*.yaml"))
CASES = {method: method_case(method) for method in METHODS}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all, so that the dense model is trained once."""
    folder = tmp_path_factory.mktemp("methods")
    write_text(folder / "text")
    return folder


def options(workplace: Path, method: str) -> dict[str, object]:
    """A run of two steps."""
    return {
        "upcycle": method,
        "run.name": method,
        "data.path": str(workplace / "text" / "*.txt"),
        "compare.cpt": False,
        "train.steps": 2,
        "optim.schedule.warmup_steps": 0,
        "calibration.samples": 16,
    } | dict(CASES[method].job)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, workplace: Path) -> None:
    chosen = options(workplace, method)
    if method == "branch_train_mix":
        # The embedded default itself, from the cache, as a branch.
        assert job(workplace, options(workplace, "copy") | {"run.name": "seed"}).code == 0
        (branch,) = (workplace / "cache").glob("dense-*/hf")
        chosen["upcycle.sources"] = f"[{branch}]"
    ended = job(workplace, chosen)
    unsupported_reason = CASES[method].unsupported_reason
    if unsupported_reason is not None:
        assert ended.code == 2
        assert unsupported_reason in ended.err
        return
    assert ended.code == 0, ended.err
    found = summary(workplace / "outputs" / method)
    assert found["exactness"]["claimed_exact"] == CASES[method].exact, found["exactness"]
    assert found["export"]["relative"] < 1e-4
    assert [row["model"] for row in found["results"]] == ["dense", "moe"]
    if method == "branch_train_mix":
        # A branch that is the seed makes copies, though that is not claimed.
        assert found["exactness"]["relative"] < 1e-5


@pytest.mark.parametrize("method", [method for method, case in CASES.items() if case.sums])
def test_a_method_that_sums_says_so_to_a_router_that_averages(method: str, workplace: Path) -> None:
    config = parse_config(compose_config(["+recipe=upcycle", f"upcycle={method}", "router=topk"]))
    found = upcycle_method(config.upcycle).check(config.router, None)
    assert "router.name" in [mistake.path for mistake in found]
    if method == "snake":
        ended = job(workplace, options(workplace, method) | {"router": "topk", "run.name": "refused"})
        assert ended.code == 2 and "router.name='topk'" in ended.err
