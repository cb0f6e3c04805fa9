"""A report from beginning to end: one system after the other, figures as JSON.

Letters: B sequences, S tokens.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.accounting.params import count_from_shape
from moe.accounting.peaks import device_name
from moe.errors import ConfigError
from recipes.cap.accuracy import multiple_choice, perplexity, read_questions
from recipes.cap.cost import find_rates
from recipes.cap.loading import DTYPES, System, counted_weights, load_system
from recipes.cap.measure import measure_overhead, measure_point
from recipes.cap.peaks import Ceilings, find_ceilings
from recipes.cap.plan import Request, check_request
from recipes.data.config import DataConfig
from recipes.data.tokenizer import load_tokenizer

SCHEMA, SCHEMA_VERSION = "graft.cap", 1
_OVERHEAD_ROUNDS = 9
Figures = dict[str, Any]
Log = Callable[[str], None]


def measure(request: Request, log: Log = lambda line: None) -> Figures:
    """Measures every system; returns the report.

    Args:
        request: What is asked for.
        log: Told of progress.

    Raises:
        ConfigError: The request has mistakes, all of them, before a model is loaded.
        HostError: A system cannot be loaded, or ran otherwise than asked.
    """
    mistakes = check_request(request)
    if mistakes:
        raise ConfigError(mistakes)
    device = torch.device(request.device)
    rates = find_rates(device_name(device), request.prices)
    report: Figures = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "workload": {**asdict(request.work), "text": request.text or "Python's standard library"},
        "cost_assumptions": rates.figures(),
        "systems": [],
    }
    report["workload"]["batch_sizes"] = list(request.work.batch_sizes)
    texts = [_texts(folder, request) for _, folder in request.systems]
    ceilings: dict[torch.dtype, Ceilings] = {}
    for (name, folder), (prompt_BS, scored_BS) in zip(request.systems, texts, strict=True):
        dtype = None if request.dtype is None else DTYPES[request.dtype]
        system = load_system(name, folder, device, dtype, request.experts)
        if system.dtype not in ceilings:
            ceilings[system.dtype] = _ceilings(request, system, log)
        figures = describe_system(system) | {"peaks": ceilings[system.dtype].figures(), "points": []}
        for size in request.work.batch_sizes:
            machine = ceilings[system.dtype].machine
            point = measure_point(system, prompt_BS[:size], request.work, machine, rates)
            figures["points"].append(point)
            log(_progress(name, point))
        figures["overhead"] = _overhead(request, system, prompt_BS, log)
        figures["accuracy"] = _accuracy(request, system, scored_BS)
        report["systems"].append(figures)
        del system
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def environment(device: torch.device) -> Figures:
    """What the figures were measured on."""
    import transformers

    return {
        "device": device_name(device),
        "device_type": device.type,
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
    """What a system is, before anything is timed."""
    shape = system.shape
    count = None if shape is None else count_from_shape(shape)
    return {
        "name": system.name,
        "folder": str(system.folder),
        "model_type": system.config.get("model_type"),
        "parameters": sum(parameter.numel() for parameter in system.model.parameters()),
        "active_parameters": None if count is None else count.active,
        "mixtures": len(system.sites),
        "experts": [site.num_experts for site in system.sites],
        "top_k": None if shape is None else [ffn.top_k for ffn in shape.moe],
        "dtype": str(system.dtype).removeprefix("torch."),
        "bits": {**asdict(system.bits), "from": system.bits_source},
        "weights": {"held_bytes": system.weights_in_memory, "counted_bytes": counted_weights(system)},
        "experts_implementation": _implementation(system),
        "accounting_reason": system.shape_reason,
    }


def _implementation(system: System) -> str | None:
    """How the experts are computed; None for a dense model."""
    if not system.sites:
        return None
    if any(site.kind == "plan" for site in system.sites):
        return "graft"
    return getattr(system.model.config, "_experts_implementation", None)


def _texts(folder: Path, request: Request) -> tuple[Tensor, Tensor | None]:
    """Prompts of the largest batch, and the text of perplexity."""
    from recipes.convert.gate import real_tokens

    data, source = DataConfig(path=request.text), request.tokenizer or folder
    prompt_BS = real_tokens(source, data, max(request.work.batch_sizes), request.work.prompt)
    asked = request.accuracy
    return prompt_BS, real_tokens(source, data, asked.samples, asked.length) if asked.samples else None


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
    return f"{name}, batch {point['batch_size']}: {1e3 * point['tpot_s']['mean']:.1f} ms a token"


def _overhead(request: Request, system: System, prompt_BS: Tensor, log: Log) -> Figures | None:
    if not request.overhead:
        return None
    size = min(request.work.batch_sizes)
    return measure_overhead(system, prompt_BS[:size], request.work.new, _OVERHEAD_ROUNDS, log)


def _accuracy(request: Request, system: System, scored_BS: Tensor | None) -> Figures:
    """None for what was not asked for."""
    found: Figures = {"perplexity": None, "choices": None}
    path = request.accuracy.choices
    if scored_BS is None and path is None:
        return found
    tokenizer = load_tokenizer(request.tokenizer or system.folder, append_eos=False)
    if scored_BS is not None:
        found["perplexity"] = perplexity(system.model, tokenizer, scored_BS.to(system.device))
    if path is not None:
        questions, _ = read_questions(path)
        longest = system.max_length
        found["choices"] = multiple_choice(system.model, tokenizer, questions, system.device, longest)
    return found
