"""Records what a refactoring must not change: losses and exports of small jobs, to the last bit.

``python -m tests.golden OUT.json`` runs every job and writes, for each, its 20 losses and the SHA-256 of what
it exports. ``--against BEFORE.json`` also compares with an earlier record and names each job that differs.
Record both on one machine: another processor rounds otherwise. Jobs run as users run them, in processes of
their own, so that the script needs no module of the project and reads the same in every layout of its code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MAIN = (
    "tracker.mode=disabled engine.threads=1 engine.device=cpu model.vocab_size=300 model.hidden_size=32 "
    "model.intermediate_size=48 model.num_layers=2 model.num_heads=4 model.num_kv_heads=2 model.steps=6 "
    "model.warmup_steps=1 data.seq_len=16 data.validation_fraction=0.2 upcycle.num_experts=4 "
    "optim.schedule.warmup_steps=2 train.steps=20 train.global_batch_size=4 train.micro_batch_size=1 "
    "train.eval_every=10 train.eval_samples=8 train.save_every=20 train.log_every=20 data.document_mask=false"
)
_CHAT = (
    "data=chat data.path={place}/general.jsonl data.chat_template={place}/template.jinja data.seq_len=48 "
    "upcycle.layers=all upcycle.num_experts=3 upcycle.cluster_tokens=32 calibration.samples=6 "
    "calibration.batch_size=3 data.document_mask=true "
    "stage2.path={place}/maths.jsonl stage2.steps=20 stage2.warmup_steps=1"
)
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_WORDS = ["".join(random.Random(n).choices("abcdefghij", k=2 + n % 6)) for n in range(60)]


@dataclass(frozen=True)
class Job:
    """One command whose results are recorded.

    Attributes:
        options: Of ``train.py``, or of ``tools.upcycle`` where it begins with ``--``.
        ranks: Processes.
    """

    options: str
    ranks: int = 1


JOBS = {
    "upcycle": Job("+recipe=upcycle compare.cpt=true"),
    "upcycle_2_ranks": Job("+recipe=upcycle compare.cpt=true", 2),
    "native_ep": Job("+recipe=upcycle engine.expert_parallel=2", 2),
    "native_tp": Job("+recipe=upcycle engine.tensor_parallel=2", 2),
    "deepspeed_ep": Job("+recipe=upcycle engine=deepspeed engine.expert_parallel=2", 2),
    "megatron_ep": Job("+recipe=upcycle engine=megatron engine.expert_parallel=2", 2),
    "megatron_tp": Job("+recipe=upcycle engine=megatron engine.tensor_parallel=2", 2),
    "megatron_pp": Job("+recipe=upcycle engine=megatron engine.pipeline_parallel=2", 2),
    "lora": Job("+recipe=upcycle experts.lora.rank=2 experts.lora.alpha=4"),
    "attention": Job("+recipe=upcycle attention=moe compare.cpt=false"),
    "llama_moe_v2": Job(f"+recipe=llama_moe_v2 {_CHAT}"),
    "pretrain": Job("+recipe=pretrain model.steps=0"),
    "upcycle_vs_cpt": Job("+recipe=upcycle_vs_cpt optim.schedule.decay_fraction=0.2"),
    "convert_copy": Job("--experts 4 --top-k 2"),
    "convert_drop": Job("--experts 4 --top-k 2 --method drop upcycle.ratio=0.25"),
    "convert_llama_moe": Job("--experts 4 --top-k 2 --method llama_moe"),
}


def _write_texts(place: Path) -> None:
    """Ten documents and two files of conversations, of invented words."""
    draw = random.Random(0)

    def log(count: int) -> str:
        return " ".join(draw.choices(_WORDS, k=count))

    (place / "text").mkdir()
    for number in range(10):
        (place / "text" / f"{number}.txt").write_text(log(400), encoding="utf-8")
    for name in ("general", "maths"):
        lines = []
        for _ in range(60):
            turns = range(draw.randint(1, 3))
            pairs = [(("user", draw.randint(1, 6)), ("assistant", draw.randint(1, 12))) for _ in turns]
            messages = [{"role": role, "content": log(count)} for pair in pairs for role, count in pair]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (place / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "template.jinja").write_text(_TEMPLATE, encoding="utf-8")


def _command(job: Job, name: str, place: Path) -> list[str]:
    """The whole command line of a job."""
    python = Path(sys.executable)
    if job.options.startswith("--"):
        # Of the job `upcycle`, which is the first to train one.
        made = [path.parent for path in place.glob("cache/**/config.json")]
        dense = min((f for f in made if any(f.glob("*.safetensors"))), key=lambda f: f.stat().st_mtime_ns)
        out = place / "outputs" / name / "hf"
        tool = [str(python), "-m", "tools.upcycle", "--dense", str(dense), "--out", str(out)]
        return [*tool, *job.options.split()]
    launcher = [str(python)]
    if job.ranks > 1:
        launcher = [str(python.with_name("torchrun")), "--standalone", f"--nproc-per-node={job.ranks}"]
    own = job.options.format(place=place).split()
    places = [f"run.name={name}", f"output_dir={place}/outputs", f"cache_dir={place}/cache"]
    main = [option for option in _MAIN.split() if option.split("=")[0] not in {o.split("=")[0] for o in own}]
    text = [] if "data=chat" in own else [f"data.path={place}/text/*.txt"]
    return [*launcher, str(ROOT / "train.py"), own[0], *main, *text, *places, *own[1:]]


def _losses(run_dir: Path) -> dict[str, list[str]]:
    """The exact losses of each stage of a run, step by step."""
    found: dict[str, list[str]] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row: dict[str, Any] = json.loads(line)
        losses = [float(row[key]).hex() for key in ("loss", "val_loss") if key in row]
        found.setdefault(row.get("stage") or row["leg"], []).extend(losses)
    return found


def _exported(folder: Path, place: Path) -> dict[str, str]:
    """SHA-256 of every file of weights and of the config, without the folder in which the record is made."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    assert files, f"nothing is exported to {folder}"
    contents = {file.name: file.read_bytes().replace(str(place).encode(), b"") for file in files}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def run(name: str, place: Path) -> dict[str, Any]:
    """Runs a job below a folder.

    Raises:
        RuntimeError: The command failed; with the end of what it printed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = _command(JOBS[name], name, place)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
    run_dir = place / "outputs" / name
    folder = run_dir / "hf"
    return {"losses": _losses(run_dir), "export": _exported(folder, place)}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One line for each job and part of it that two records do not agree on."""
    found = []
    for name in sorted(ours.keys() & theirs.keys()):
        for part in ("losses", "export"):
            if ours[name][part] != theirs[name][part]:
                keys = sorted(
                    key
                    for key in ours[name][part].keys() | theirs[name][part].keys()
                    if ours[name][part].get(key) != theirs[name][part].get(key)
                )
                found.append(f"{name}: {part} differ in {', '.join(keys)}")
    return found


def main() -> int:
    """Records, and compares; 1 where a record differs or a job failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an earlier record to compare with")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    arguments = parser.parse_args()
    chosen = list(
        dict.fromkeys(["upcycle", *(arguments.only or JOBS)])
    )  # the converters read its dense model
    record: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        place = Path(folder)
        _write_texts(place)
        for name in chosen:
            started = time.perf_counter()
            try:
                record[name] = run(name, place)
            except (RuntimeError, AssertionError) as error:
                failed = True
                print(error, flush=True)
                continue
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.against is None:
        return int(failed)
    found = differences(record, json.loads(arguments.against.read_text(encoding="utf-8")))
    print("\n".join(found) or f"equal to the bit: {len(record)} jobs")
    return int(failed or bool(found))


if __name__ == "__main__":
    sys.exit(main())
