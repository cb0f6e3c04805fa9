"""Request for a report, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moe.accounting.tiers import Tier
from moe.errors import Mistake
from recipes.cap.accuracy import read_questions
from recipes.cap.cost import Prices
from recipes.cap.folders import find_source, read_config
from recipes.cap.generation import read_prompts
from recipes.cap.harness import check_harness
from recipes.cap.loading import DTYPES, whole_number
from recipes.cap.measure import Workload
from recipes.cap.server import Server
from recipes.data.config import DataConfig
from recipes.data.sources import check_paths
from recipes.data.tokenizer import check_tokenizer
from recipes.tracking.ceilings import ORIGINS, Origin


@dataclass(frozen=True)
class Accuracy:
    """Accuracies to measure; none by default.

    Attributes:
        samples: Samples of text for perplexity; 0 for none.
        length: Tokens of each.
        choices: A file of questions; None for none.
        answers: A file of prompts whose answers the model writes; None for none.
        answer_tokens: New tokens of each at most.
        tasks: Tasks of lm-evaluation-harness.
        task_folder: Folder of further tasks; None for none.
        task_limit: Questions of each task; None for all.
    """

    samples: int = 0
    length: int = 256
    choices: Path | None = None
    answers: Path | None = None
    answer_tokens: int = 64
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None

    @property
    def asked(self) -> bool:
        """True if any accuracy is asked for."""
        return bool(self.samples or self.choices or self.answers or self.tasks)


@dataclass(frozen=True)
class Request:
    """A report.

    Attributes:
        systems: Name and folder of each.
        work: Workload of all systems.
        device: Device, such as ``cpu`` or ``cuda``.
        dtype: A key of `DTYPES`; None as in the files.
        experts: transformers' implementation of experts; None is its own choice.
        trust_remote_code: Whether the systems may run code of their own.
        text: Source of prompts and of the text of perplexity; None for Python's standard library.
        tokenizer: A folder for all systems; None is each one's own.
        accuracy: Accuracies to measure.
        origin: Origin of the peaks.
        peak_bytes_per_s: The user's own.
        peak_flops: The user's own.
        tiers: Memories that weights and cache lie in; none for one.
        prices: Costs given by the user.
        overhead: If True the overhead of watching is measured.
        server: Server of the one system; None runs the systems here.
    """

    systems: tuple[tuple[str, Path], ...]
    work: Workload = field(default_factory=Workload)
    device: str = "cpu"
    dtype: str | None = None
    experts: str | None = None
    trust_remote_code: bool = False
    text: str | None = None
    tokenizer: Path | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)
    origin: Origin = "measured"
    peak_bytes_per_s: float | None = None
    peak_flops: float | None = None
    tiers: tuple[Tier, ...] = ()
    prices: Prices = field(default_factory=Prices)
    overhead: bool = False
    server: Server | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is run."""
        scored = self.accuracy.length if self.accuracy.samples else 0
        written = self.accuracy.answer_tokens + 1 if self.accuracy.answers else 0
        return max(self.work.prompt + self.work.new, scored, written)


def name_systems(given: Iterable[str]) -> tuple[tuple[str, Path], ...]:
    """Parses ``NAME=FOLDER``, or ``FOLDER``, whose name is then that of the folder."""
    systems = []
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).expanduser().exists():
            name, rest = Path(text).expanduser().resolve().name, text
        systems.append((name, Path(rest).expanduser()))
    return tuple(systems)


def check_request(request: Request) -> list[Mistake]:
    """Returns every mistake that shows from flags and small files."""
    mistakes = [*_check_numbers(request), *_check_choices(request), *_check_server(request)]
    names = [name for name, _ in request.systems]
    for name in sorted({name for name in names if names.count(name) > 1}):
        remedy = "Name them apart: NAME=FOLDER OTHER=FOLDER."
        mistakes.append(Mistake("FOLDER", name, "two systems have this name", remedy))
    for _, folder in request.systems:
        mistakes += _check_folder(folder, request)
    mistakes += [replace(wrong, path="--text") for wrong in check_paths(DataConfig(path=request.text))]
    asked = request.accuracy
    if asked.choices is not None:
        mistakes += read_questions(asked.choices)[1]
    if asked.answers is not None:
        mistakes += read_prompts(asked.answers)[1]
    return mistakes + check_harness(asked.tasks, asked.task_folder)


def _check_server(request: Request) -> list[Mistake]:
    server = request.server
    if server is None:
        return []
    mistakes = []
    if not server.url.startswith(("http://", "https://")):
        rule = "it is not an http or https address"
        mistakes.append(Mistake("--server", server.url, rule, "Give http://HOST:PORT."))
    if not server.model:
        rule = "a server needs the name that it gives the model"
        mistakes.append(Mistake("--model", server.model, rule, "Look at URL/v1/models."))
    if server.devices < 1:
        mistakes.append(Mistake("--server-devices", server.devices, "it must be 1 or more", "Raise it."))
    if len(request.systems) != 1:
        rule = "a server holds one model, whose config and tokenizer are in one folder"
        mistakes.append(Mistake("FOLDER", [name for name, _ in request.systems], rule, "Name one."))
    not_there: dict[str, Any] = {
        "--perplexity": request.accuracy.samples,
        "--choices": request.accuracy.choices,
        "--answers": request.accuracy.answers,
        "--lm-eval": request.accuracy.tasks,
        "--overhead": request.overhead,
        "--backend": request.experts,
        "--trust-remote-code": request.trust_remote_code,
    }
    for flag, value in not_there.items():
        if value:
            rule = "it needs the model itself, and a server gives its speed alone"
            mistakes.append(Mistake(flag, str(value), rule, "Leave it out, or leave --server out."))
    return mistakes


def _check_numbers(request: Request) -> list[Mistake]:
    work, prices = request.work, request.prices
    whole: list[tuple[str, Any, int]] = [
        *(("--batch-sizes", size, 1) for size in work.batch_sizes),
        ("--prompt", work.prompt, 1),
        ("--new", work.new, 2),
        ("--rounds", work.rounds, 1),
        ("--perplexity", request.accuracy.samples, 0),
        ("--perplexity-length", request.accuracy.length, 2),
        ("--answer-tokens", request.accuracy.answer_tokens, 1),
        *((("--lm-eval-limit", request.accuracy.task_limit, 1),) if request.accuracy.task_limit else ()),
    ]
    mistakes = [
        Mistake(flag, value, f"it must be {least} or more", "Raise it.")
        for flag, value, least in whole
        if value < least
    ]
    if len(set(work.batch_sizes)) < len(work.batch_sizes):
        mistakes.append(
            Mistake("--batch-sizes", list(work.batch_sizes), "one stands there twice", "Drop it.")
        )
    above = {
        "--peak-bandwidth": request.peak_bytes_per_s,
        "--peak-flops": request.peak_flops,
        "--price-usd": prices.price_usd,
        "--power-watts": prices.power_watts,
        "--usd-per-kwh": prices.usd_per_kwh,
        "--life-years": prices.life_years,
    }
    for flag, value in above.items():
        if value is not None and not value > 0:
            mistakes.append(Mistake(flag, value, "it must be above 0", "Leave it out if it is not known."))
    if not prices.pue >= 1:
        mistakes.append(Mistake("--pue", prices.pue, "a building draws what its machines do", "Give 1.2."))
    if not 0 < prices.busy <= 1:
        mistakes.append(Mistake("--busy", prices.busy, "a share lies above 0 and at most at 1", "Give 0.5."))
    return mistakes


def _check_choices(request: Request) -> list[Mistake]:
    mistakes = []
    named: list[tuple[str, Any, Mapping[str, Any] | tuple[str, ...]]] = [
        ("--dtype", request.dtype, DTYPES),
        ("--peaks", request.origin, ORIGINS),
    ]
    for flag, value, known in named:
        if value is not None and value not in known:
            mistakes.append(Mistake(flag, value, "it is not known", f"Choose from: {', '.join(known)}."))
    try:
        device = torch.device(request.device)
    except RuntimeError:
        mistakes.append(
            Mistake("--device", request.device, "torch knows no such device", "Give cpu or cuda.")
        )
        return mistakes
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        rule = f"torch sees {torch.cuda.device_count()} GPUs"
        mistakes.append(Mistake("--device", request.device, rule, "Give cpu, or a GPU that is there."))
    return mistakes


def _check_folder(folder: Path, request: Request) -> list[Mistake]:
    source = find_source(folder)
    if isinstance(source, Mistake):
        return [source]
    config = read_config(source)
    if isinstance(config, Mistake):
        return [config]
    longest, mistakes = whole_number(config, "max_position_embeddings"), []
    if longest is not None and request.longest > longest:
        rule = f"{folder} takes {longest} tokens, and {request.longest} are asked for"
        remedy = "Lower --prompt, --new, --perplexity-length or --answer-tokens."
        mistakes.append(Mistake("--prompt", request.work.prompt, rule, remedy))
    tokenizer = request.tokenizer or source.folder
    where = "FOLDER" if request.tokenizer is None else "--tokenizer"
    vocab_size, trust = whole_number(config, "vocab_size"), request.trust_remote_code
    return mistakes + check_tokenizer(tokenizer, vocab_size, where, trust_remote_code=trust)
