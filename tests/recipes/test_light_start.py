"""Help, configs and mistakes of options are told without torch, scipy or transformers."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.paths import ROOT
from tests.patience import patience

COMMANDS = {
    "--help": 0,
    "--help train.steps": 0,
    "--list router": 0,
    "--cfg +recipe=upcycle": 0,
    "--cfg +recipe=upcycle router=permuted upcycle=drop engine=megatron attention=moe": 0,
    "+recipe=upcycle router=topkk": 2,
    "+recipe=upcycle train.stepz=3": 2,
    "+recipe=upcycle train.steps=-1 data.path=/no/such.txt dense=/no/such": 2,
    "--cfg router=topk": 0,
    "job=null": 2,
}
CODE = """
import json, sys
from recipes.launch import main
codes = {command: main(command.split()) for command in json.loads(sys.argv[1])}
heavy = [name for name in ("torch", "scipy", "transformers", "triton") if name in sys.modules]
print(json.dumps([codes, heavy]))
"""


def test_no_command_without_a_model_imports_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(list(COMMANDS))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [COMMANDS, []]
