"""Invented conversations and a template for runs on chat data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_chat(folder: Path, name: str, seed: int, rows: int = 60) -> str:
    """Conversations of one to three turns of unequal length; returns the file."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 5))) for _ in range(30)]

    def log(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    lines = []
    for _ in range(rows):
        messages = [{"role": "system", "content": log(1, 2)}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": log(1, 6)})
            messages.append({"role": "assistant", "content": log(1, 12)})
        lines.append(json.dumps({"messages": messages}))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return str(path)


def chat_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a tiny run on the conversations of ``general`` in a folder."""
    return {
        "data": "chat",
        "data.path": str(folder / "general.jsonl"),
        "data.chat_template": str(folder / "template.jinja"),
        "data.seq_len": 48,
        **changes,
    }


def two_stage_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a tiny run of both stages; the method, since two layers have no inner one, on all layers."""
    return {
        "+recipe": "llama_moe_v2",
        **chat_options(folder),
        "upcycle.layers": "all",
        "upcycle.num_experts": 3,
        "upcycle.cluster_tokens": 32,
        "calibration.samples": 6,
        "calibration.batch_size": 3,
        "stage2.path": str(folder / "maths.jsonl"),
        "stage2.steps": 4,
        "stage2.lr": 1e-3,
        "stage2.warmup_steps": 1,
        "optim.lr": 1e-3,
        "train.steps": 4,
        **changes,
    }
