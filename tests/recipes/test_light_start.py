"""Help, configs and mistakes of options are told without torch, scipy or transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    # What the job's own check finds.
    "+recipe=upcycle router.top_k=99": 2,
    "+recipe=upcycle router=deepseek_v3 router.num_groups=3": 2,
    "+recipe=upcycle router=permuted router.inner.top_k=99": 2,
    "+recipe=upcycle train.global_batch_size=6 train.micro_batch_size=4": 2,
    "+recipe=upcycle upcycle=virtual_group upcycle.num_experts=7": 2,
    "+recipe=upcycle upcycle=partition upcycle.num_experts=7": 2,
    "+recipe=upcycle upcycle.layers=[9]": 2,
    "+recipe=upcycle experts.lora.rank=4000": 2,
    "+recipe=upcycle optim.start_from=/no/such": 2,
    "+recipe=upcycle optim.schedule.warmup_steps=9999": 2,
    "+recipe=upcycle attention=moe attention.router.top_k=99": 2,
    "+recipe=upcycle engine.expert_parallel=3": 2,
    "+recipe=upcycle engine=megatron engine.pipeline_parallel=2": 2,
    "+recipe=upcycle engine=deepspeed optim=muon": 2,
    "+recipe=upcycle resume=/no/such": 2,
    "+recipe=pretrain experts.lora.rank=2": 2,
    "+recipe=llama_moe_v2 train.steps=0": 2,
    "+recipe=continue dense=conf engine.expert_parallel=3": 2,
    "+recipe=upcycle_vs_cpt optim.schedule.kind=cosine": 2,
    "+recipe=upcycle dense=/no/such": 2,
    "+recipe=upcycle job=nope": 2,
    "-m +recipe=upcycle router=topk,sigmoid router.top_k=99": 2,
    # Names of what is torch code itself.
    "+recipe=upcycle router.name=topkk": 2,
    "+recipe=upcycle attention=moe attention.router.name=nope": 2,
    "+recipe=upcycle upcycle.name=nope": 2,
    "+recipe=upcycle engine.name=nope": 2,
    "+recipe=upcycle experts.backend=tritn": 2,
    "+recipe=upcycle experts.backend=triton router.top_k=99": 2,
    "+recipe=upcycle engine=megatron engine.experts=nope": 2,
    "+recipe=upcycle engine=megatron engine.dispatcher=nope": 2,
    "+recipe=upcycle certify.programs=[nope]": 2,
    "-m +recipe=upcycle router.name=topk,nope": 2,
    "-m +recipe=upcycle certify.programs=[nope] seed=0,1": 2,
    # What files and options say of experts, heads and prompts.
    "+recipe=upcycle engine=megatron engine.device=cpu engine.experts=te": 2,
    "+recipe=upcycle engine=megatron engine.experts=megatron experts.lora.rank=2": 2,
    "+recipe=upcycle --nproc 3 train.global_batch_size=3 engine.tensor_parallel=3": 2,
    "+recipe=upcycle prompts.path=/no/such": 2,
    "+recipe=upcycle prompts.path=README.md upcycle=cmoe": 2,
}
CODE = """
import json, sys
from recipes.launch import main
codes = {command: main(command.split()) for command in json.loads(sys.argv[1])}
heavy = [name for name in ("torch", "scipy", "transformers", "triton") if name in sys.modules]
print(json.dumps([codes, heavy]))
"""


def test_no_command_without_a_model_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"identity": {"router.top_k": 4}}', encoding="utf-8")
    commands = {**COMMANDS, f"+recipe=upcycle output_dir={tmp_path} run.name=mine resume=auto": 2}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(list(commands))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [commands, []]
