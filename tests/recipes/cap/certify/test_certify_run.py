"""A run that ends by certifying its export, and what keeps it from that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.tracking.report import build_report
from tests.recipes.jobs.job_runs import job, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_ends_with_certificates_and_a_failing_program_costs_nothing(tmp_path: Path) -> None:
    given = {"run.name": "a", "compare.cpt": "false", "train.steps": 3, "data.seq_len": 32}
    given |= {"data.path": write_text(tmp_path / "text"), "certify.programs": "[transformers,vllm]"}
    # A program that ends with an error, in the place of an interpreter.
    done = job(tmp_path, given | {"certify.vllm": "/bin/false"})
    assert done.code == 0, done.err
    run = tmp_path / "outputs" / "a"
    content = json.loads((run / "hf" / "certificate.json").read_text())
    assert content["reference"] == "graft, step 3"
    verdicts = {one["name"]: (one["certified"], one["reason"]) for one in content["results"]}
    assert verdicts == {
        "transformers": (True, ""),
        "vllm": (False, "vllm failed: it said nothing, and its exit code is 1"),
    }
    assert "certify: vllm: not certified: vllm failed" in done.out
    card, page = (run / "hf" / "README.md").read_text(), build_report(run).read_text()
    assert "trained since, in the run a" in card and "| transformers 5." in card and "| vllm | no |" in card
    assert "Certificates" in page and "its exit code is 1" in page


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"certify.programs": "[sglang]"}, "certify.programs='sglang': there is no such program"),
        ({"certify.programs": "[vllm]"}, "Name its interpreter: certify.vllm=ENV/bin/python"),
        ({"certify.programs": "[vllm]", "certify.vllm": "/none"}, "certify.vllm='/none'"),
        ({"certify.time_limit_s": "0"}, "certify.time_limit_s=0.0"),
    ],
)
def test_a_program_that_is_not_there_is_found_before_the_run(
    tmp_path: Path, given: dict[str, str], words: str
) -> None:
    done = job(tmp_path, {"data.path": write_text(tmp_path / "text"), **given})
    assert done.code == 2 and words in done.err, done.err
    assert not (tmp_path / "outputs").exists()
