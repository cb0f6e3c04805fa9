"""Ranks that were given another config, or run other code, are refused by name before anything starts."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore

from recipes.runtime.agreement import (
    DisagreementError,
    Facts,
    facts_of_this_rank,
    require_agreement,
    source_hashes,
)
from tests.forked_python import interpreter
from tests.paths import ROOT
from tests.patience import patience
from tests.recipes.runtime import odd_rank


@pytest.fixture
def facts() -> Facts:
    return facts_of_this_rank(
        {"seed": 0, "cache_dir": "/a", "router": {"name": "topk", "top_k": 2}, "tags": []}
    )


def meet(everyone: Sequence[Facts | None], patience_s: float | None = None) -> list[str | None]:
    """What each rank raises; None of `everyone` is a rank that does not come. Rank 0 comes last."""
    limit_s = patience(60) if patience_s is None else patience_s
    store = HashStore()
    found: list[str | None] = [None] * len(everyone)

    def come(rank: int, facts: Facts) -> None:
        try:
            require_agreement(store, rank, len(everyone), facts, patience_s=limit_s)
        except DisagreementError as error:
            found[rank] = str(error)

    coming = {rank: facts for rank, facts in enumerate(everyone) if facts is not None}
    threads = [threading.Thread(target=come, args=one, daemon=True) for one in coming.items()]
    for thread in threads[1:]:
        thread.start()
    store.wait([f"hash/{rank}" for rank in coming if rank], timedelta(seconds=patience(60)))
    threads[0].start()
    for thread in threads:
        thread.join(patience(60))
        assert not thread.is_alive()
    return found


def test_ranks_that_agree_start(facts: Facts) -> None:
    assert meet([facts, copy.deepcopy(facts), facts, facts]) == [None] * 4
    require_agreement(HashStore(), 0, 1, facts)


def test_another_value_is_named_with_its_ranks(facts: Facts) -> None:
    other = copy.deepcopy(facts)
    other["config"]["router.top_k"] = 4
    del other["config"]["seed"]
    found = meet([facts, facts, other, other])
    start = "Start all ranks with the same command."
    assert set(found) == {
        f"router.top_k=4: this is what ranks 2, 3 have, and rank 0 has 2. {start}\n"
        f"seed=None: this is what ranks 2, 3 have, and rank 0 has 0. {start}"
    }


def test_other_packages_and_another_source_are_named(facts: Facts) -> None:
    other = copy.deepcopy(facts)
    other["versions"]["torch"] = "1.0"
    other["code"]["recipes/training/training_loop.py"] = "0"
    del other["code"]["recipes/launch.py"]
    [text] = set(meet([facts, other, facts]))
    assert text is not None
    version = facts["versions"]["torch"]
    assert f"torch='1.0': this is what rank 1 has, and rank 0 has '{version}'. Install the same" in text
    differing = "code='recipes/launch.py, recipes/training/training_loop.py'"
    assert f"{differing}: the source of rank 1 differs from that of rank 0 in 2 files" in text


def test_a_rank_that_does_not_come_is_named(facts: Facts) -> None:
    found = meet([facts, None, facts, None], patience_s=0.05)
    assert found[0] == found[2]
    assert found[0] is not None and "ranks='1, 3': they have not come within 0.05 s" in found[0]


def test_a_cache_of_the_machine_may_differ() -> None:
    assert facts_of_this_rank({"cache_dir": "/a"}) == facts_of_this_rank({"cache_dir": "/b"})


def test_the_source_is_what_runs(tmp_path: Path) -> None:
    ours = source_hashes(ROOT)
    assert {"recipes/training/training_loop.py", "moe/layer.py", "kernels/expert_mlp.py"} <= ours.keys()
    for name in ("recipes/training/training_loop.py", "moe/layer.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert source_hashes(tmp_path).items() <= ours.items()
    with (tmp_path / "moe/layer.py").open("a") as file:
        file.write("# another\n")
    changed = {name for name, found in source_hashes(tmp_path).items() if found != ours[name]}
    assert changed == {"moe/layer.py"}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_is_refused_before_a_process_group_is_made(tmp_path: Path) -> None:
    # The ranks would even make different groups: they would wait for each other for half an hour.
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    command += [
        odd_rank.__file__,
        "engine.expert_parallel=2",
        "upcycle.num_experts=4",
        "--",
        "+recipe=upcycle",
    ]
    command += [f"output_dir={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}", "engine.device=cpu"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON_EXEC": interpreter(tmp_path)},
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert done.returncode != 0
    assert "error: engine.expert_parallel=2: this is what rank 1 has, and rank 0 has 1." in done.stderr
    assert "error: upcycle.num_experts=4: this is what rank 1 has, and rank 0 has 8." in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    assert f"{ROOT}/recipes/" not in done.stderr, "a traceback of ours"


def test_own_sources_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = facts_of_this_rank({"seed": 1})
    monkeypatch.setattr("recipes.runtime.agreement.source_hashes", None)
    again = facts_of_this_rank({"seed": 2})
    assert again["code"] == first["code"] == source_hashes(ROOT)
    assert again["config"] != first["config"]
