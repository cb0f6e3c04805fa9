"""Measures a report from beginning to end: one system after the other, figures as JSON.

Letters: B sequences, S tokens.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.accounting.device_peaks import device_name
from moe.accounting.params import count_from_shape
from moe.errors import ConfigError, Mistake
from recipes.cap.accuracy import multiple_choice, perplexity, read_questions
from recipes.cap.cost import Rates, find_rates
from recipes.cap.efficiency import compression
from recipes.cap.folders import Source, find_source, read_config
from recipes.cap.generation import read_prompts, written_answers
from recipes.cap.harness import run_harness
from recipes.cap.loading import DTYPES, Known, System, counted_weights, known_from_config, load_system
from recipes.cap.measure import measure_overhead, measure_point
from recipes.cap.request import Request, check_request
from recipes.cap.served import measure_served
from recipes.cap.server import Server
from recipes.data.config import DataConfig
from recipes.data.tokenizer import load_tokenizer
from recipes.tracking.ceilings import Ceilings, find_ceilings, served_ceilings
from recipes.upcycling.convert.folder_check import real_tokens

UNKNOWN_DEVICE = "a server's device, not named"
NO_ACCURACY: Mapping[str, None] = {"perplexity": None, "choices": None, "answers": None, "harness": None}
SCHEMA, SCHEMA_VERSION = "graft.cap", 1
_OVERHEAD_ROUNDS = 9
Figures = dict[str, Any]
Log = Callable[[str], None]


def measure(request: Request, log: Log = lambda line: None) -> Figures:
    """Measures every system; returns the report.

    Args:
        request: Systems and measurements.
        log: Takes lines of progress.

    Raises:
        ConfigError: The request has mistakes, all of them, before a model is loaded.
        ModelError: A system cannot be loaded, or ran otherwise than asked.
    """
    mistakes = check_request(request)
    if mistakes:
        raise ConfigError(mistakes)
    sources = [(name, _source(folder)) for name, folder in request.systems]
    report = _begin(request)
    if request.server is not None:
        report["systems"].append(_served(request, request.server, *sources[0], log))
    else:
        texts = [_texts(source, request) for _, source in sources]
        ceilings: dict[torch.dtype, Ceilings] = {}
        for (name, source), text in zip(sources, texts, strict=True):
            report["systems"].append(_system(request, name, source, text, ceilings, log))
    for system, rate in zip(report["systems"], compression(report["systems"]), strict=True):
        system["efficientllm"] = rate
    return report


def _source(folder: Path) -> Source:
    found = find_source(folder)
    if isinstance(found, Mistake):
        raise ConfigError([found])
    return found


def _begin(request: Request) -> Figures:
    """Returns the report without its systems."""
    text = request.text or "Python's standard library"
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(torch.device(request.device), request.server),
        "workload": {**asdict(request.work), "batch_sizes": list(request.work.batch_sizes), "text": text},
        "cost_assumptions": _rates(request).figures(),
        "systems": [],
    }


def _rates(request: Request) -> Rates:
    server = request.server
    if server is None:
        return find_rates(device_name(torch.device(request.device)), request.prices)
    return find_rates(server.device or UNKNOWN_DEVICE, request.prices, server.devices)


def _system(
    request: Request,
    name: str,
    source: Source,
    text: tuple[Tensor, Tensor | None],
    ceilings: dict[torch.dtype, Ceilings],
    log: Log,
) -> Figures:
    """Loads one system, measures it and releases it."""
    prompt_BS, scored_BS = text
    device, rates = torch.device(request.device), _rates(request)
    dtype = None if request.dtype is None else DTYPES[request.dtype]
    trust = request.trust_remote_code
    system = load_system(name, source, device, dtype, request.experts, trust_remote_code=trust)
    if system.dtype not in ceilings:
        ceilings[system.dtype] = _ceilings(request, system, log)
    peaks = ceilings[system.dtype]
    figures = describe_system(system) | {"devices": 1, "peaks": peaks.figures(), "points": []}
    for size in request.work.batch_sizes:
        machine = replace(peaks.machine, tiers=request.tiers)
        point = measure_point(system, prompt_BS[:size], request.work, machine, rates)
        figures["points"].append(point)
        log(_progress(name, point))
    figures["overhead"] = _overhead(request, system, prompt_BS, log)
    figures["accuracy"] = _accuracy(request, system, scored_BS)
    del system
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def _served(request: Request, server: Server, name: str, source: Source, log: Log) -> Figures:
    """Measures the system behind a server; its folder gives config and tokenizer."""
    config = read_config(source)
    if isinstance(config, Mistake):
        raise ConfigError([config])
    known, dtype = known_from_config(config, request.dtype)
    peaks = served_ceilings(server.device, dtype, request.peak_bytes_per_s, request.peak_flops)
    machine = replace(peaks.machine, devices=server.devices, tiers=request.tiers)
    figures = describe_served(name, source, config, known, dtype)
    figures |= {"devices": server.devices, "peaks": peaks.figures(), "points": []}
    work = request.work
    tokenizer, data = request.tokenizer or source.folder, DataConfig(path=request.text)
    # no prompt twice: a server keeps what it has read
    counts = [(1 + work.rounds) * size for size in work.batch_sizes]
    trust = request.trust_remote_code
    pools = real_tokens(tokenizer, data, sum(counts), work.prompt, trust_remote_code=trust).split(counts)
    for size, pool in zip(work.batch_sizes, pools, strict=True):
        prompts_RBS = pool.view(1 + work.rounds, size, work.prompt)
        point = measure_served(server, known, prompts_RBS, work, machine, _rates(request))
        figures["points"].append(point)
        log(_progress(name, point))
    return figures | {"overhead": None, "accuracy": NO_ACCURACY}


def environment(device: torch.device, server: Server | None = None) -> Figures:
    """Describes the machine that the figures were measured on; with a server, the client's."""
    import transformers

    return {
        "device": device_name(device) if server is None else server.device or UNKNOWN_DEVICE,
        "device_type": device.type if server is None else "server",
        "devices": 1 if server is None else server.devices,
        "server": None if server is None else server.url,
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def describe_system(system: System) -> Figures:
    """Describes a system before anything is timed."""
    return {
        **_described(system.name, system.source, system.config, system, system.dtype),
        "parameters": sum(parameter.numel() for parameter in system.model.parameters()),
        "mixtures": len(system.sites),
        "experts": [site.num_experts for site in system.sites],
        "weights": {"held_bytes": system.weights_in_memory, "counted_bytes": counted_weights(system)},
        "experts_implementation": _implementation(system),
    }


def describe_served(
    name: str, source: Source, config: Mapping[str, Any], known: Known, dtype: torch.dtype
) -> Figures:
    """Describes a model behind a server, from its config."""
    shape = known.shape
    return {
        **_described(name, source, config, known, dtype),
        "parameters": None if shape is None else count_from_shape(shape).total,
        "mixtures": None if shape is None else len(shape.moe),
        "experts": [] if shape is None else [ffn.num_experts for ffn in shape.moe],
        "weights": {"held_bytes": None, "counted_bytes": counted_weights(known)},
        "experts_implementation": "server",
    }


def _described(
    name: str, source: Source, config: Mapping[str, Any], known: Known, dtype: torch.dtype
) -> Figures:
    shape = known.shape
    return {
        "name": name,
        "folder": str(source.given),
        "model_type": config.get("model_type"),
        "active_parameters": None if shape is None else count_from_shape(shape).active,
        "top_k": None if shape is None else [ffn.top_k for ffn in shape.moe],
        "dtype": str(dtype).removeprefix("torch."),
        "bits": {**asdict(known.bits), "from": known.bits_source},
        "accounting_reason": known.shape_reason,
    }


def _implementation(system: System) -> str | None:
    """Returns the implementation of the experts; None for a dense model."""
    if not system.sites:
        return None
    if any(site.kind == "plan" for site in system.sites):
        return "graft"
    return getattr(system.model.config, "_experts_implementation", None)


def _texts(system: Source, request: Request) -> tuple[Tensor, Tensor | None]:
    """Returns the prompts of the largest batch, and the text of perplexity."""
    data, source = DataConfig(path=request.text), request.tokenizer or system.folder
    tokens = partial(real_tokens, source, data, trust_remote_code=request.trust_remote_code)
    prompt_BS = tokens(max(request.work.batch_sizes), request.work.prompt)
    asked = request.accuracy
    return prompt_BS, tokens(asked.samples, asked.length) if asked.samples else None


def _ceilings(request: Request, system: System, log: Log) -> Ceilings:
    found = find_ceilings(
        system.device, system.dtype, request.origin, request.peak_bytes_per_s, request.peak_flops
    )
    for words, unit, peak in (("bandwidth", "GB/s", found.bytes_per_s), ("compute", "GFLOP/s", found.flops)):
        value = "not known" if peak.value is None else f"{peak.value / 1e9:,.2f} {unit}"
        log(f"peak {words}: {value}, {peak.source or 'no source'} ({peak.detail})")
    return found


def _progress(name: str, point: Figures) -> str:
    if point["reason"] is not None:
        return f"{name}, batch {point['batch_size']}: {point['reason']}"
    return f"{name}, batch {point['batch_size']}: {1e3 * point['tpot_s']['mean']:.1f} ms per token"


def _overhead(request: Request, system: System, prompt_BS: Tensor, log: Log) -> Figures | None:
    if not request.overhead:
        return None
    size = min(request.work.batch_sizes)
    return measure_overhead(system, prompt_BS[:size], request.work.new, _OVERHEAD_ROUNDS, log)


def _accuracy(request: Request, system: System, scored_BS: Tensor | None) -> Figures:
    """Measures the accuracies that were asked for; the others are None."""
    asked = request.accuracy
    if not asked.asked:
        return dict(NO_ACCURACY)
    found: Figures = dict(NO_ACCURACY)
    folder, trust = request.tokenizer or system.source.folder, request.trust_remote_code
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust)
    if scored_BS is not None:
        found["perplexity"] = perplexity(system.model, tokenizer, scored_BS.to(system.device))
    if asked.choices is not None:
        questions, _ = read_questions(asked.choices)
        longest = system.max_length
        found["choices"] = multiple_choice(system.model, tokenizer, questions, system.device, longest)
    if asked.answers is not None:
        prompts, _ = read_prompts(asked.answers)
        limits = (asked.answer_tokens, system.max_length)
        found["answers"] = written_answers(system.model, tokenizer, prompts, system.device, limits)
    if asked.tasks:
        found["harness"] = run_harness(
            system.model, tokenizer, asked.tasks, asked.task_folder, asked.task_limit
        )
    return found
