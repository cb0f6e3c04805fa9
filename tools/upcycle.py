"""Converts a dense checkpoint into an MoE: ``python -m tools.upcycle --dense DIR --out DIR``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError, Mistake
from tools.command import (
    check_format,
    check_json_target,
    log_beside,
    run_command,
    stream_beside,
    tool_parser,
    write_json,
)
from tools.verify import describe_equivalence, equivalence_figures

if TYPE_CHECKING:
    from collections.abc import Callable

    from recipes.config.schema import RunConfig
    from recipes.upcycling.calibration.gather import LayerTensors
    from recipes.upcycling.convert.conversion import ConversionResult
    from recipes.upcycling.convert.conversion_plan import Conversion, ConversionRequest
    from recipes.upcycling.convert.folder_check import EquivalenceReport

_DTYPES = ("source", "fp32", "bf16", "fp16")


def _parse() -> argparse.Namespace:
    parser = tool_parser(
        "upcycle",
        "Converts a dense Hugging Face checkpoint into an MoE, tensor by tensor: no "
        "GPU, no training, memory for one matrix. An interrupted conversion goes on when it is run again.",
        epilog="Further OPTION=VALUE are those of graft train, for method and router: upcycle.ratio=0.5, "
        "upcycle.layers=every:2, router.top_k=4, ...",
        example="--dense MODEL --out MOE --experts 8 --top-k 2",
    )
    add = parser.add_argument
    add("options", nargs="*", metavar="OPTION=VALUE", help="options of the method (upcycle.*) and router.*")
    add("--dense", required=True, metavar="DIR", help="the dense checkpoint")
    add("--out", metavar="DIR", help="folder of the MoE; must not exist")
    add(
        "--compare",
        metavar="METHODS",
        help="write nothing, measure the drift of several methods on real text: "
        "copy,drop[ratio=0.25],snake[router=one_plus], ...",
    )
    add("--method", default="copy", help="a choice of conf/upcycle")
    add("--router", default="topk", help="a choice of conf/router")
    add("--experts", type=int, metavar="E", help="routed experts of a layer (default: the method's)")
    add("--top-k", type=int, metavar="K", help="experts per token (default: the router's)")
    add("--seed", type=int, default=0, help="seed of routers and of random methods")
    add(
        "--dtype",
        choices=_DTYPES,
        default="source",
        help="dtype of the output (default source: as the input)",
    )
    add("--target", default="auto", metavar="FORMAT", help="format of the output (default: the best exact)")
    add(
        "--layout",
        choices=("per_expert", "fused"),
        default="per_expert",
        help="layout of the experts' tensors",
    )
    add("--untie", action="store_true", help="write the head although it is tied to the embeddings")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="load both afterwards, as transformers does, and compare their logits on real text "
        "(default: where the method is exact)",
    )
    add("--text", metavar="PATH", help="text for measurements (default: Python's standard library)")
    return parser.parse_intermixed_args()


def main() -> int:
    """Checks the flags, plans, converts, and verifies when asked to."""
    arguments = _parse()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = _config(arguments)
    mistakes = _check(arguments, config)
    if mistakes:
        raise ConfigError(mistakes)
    if arguments.compare is not None:
        return _compare(arguments, config)

    from recipes.runtime.claim import claim, lock_beside
    from recipes.runtime.machine_memory import peak_resident_bytes
    from recipes.upcycling.convert.conversion_plan import plan_conversion
    from recipes.upcycling.convert.conversion_statistics import calibration_folder, discard_statistics

    out = Path(arguments.out).expanduser().absolute()
    # Figures on stdout are for programs: nothing else goes there.
    stream = stream_beside(arguments.json)
    with claim(lock_beside(calibration_folder(out)), "--out", out):
        conversion = plan_conversion(_request(arguments, config), _statistics(config, out))
        print(_describe(conversion), file=stream)
        result = _convert(conversion, out, log_beside(arguments.json))
        discard_statistics(out)
    peak = peak_resident_bytes()
    print(_conclude(conversion, result, peak), file=stream)
    check = _verify(arguments, config, conversion, out)
    print(describe_equivalence(check) if check is not None else _unverified(conversion), file=stream)
    write_json(arguments.json, _figures(conversion, result, peak, check))
    return 0 if check is None or check.agrees or not conversion.claims_exact else 1


def _compare(arguments: argparse.Namespace, config: RunConfig) -> int:
    from recipes.models.hf.config_file import context_length, read_config
    from recipes.studies.compare_methods import compare_methods, drift_figures, drift_table, parse_candidates
    from recipes.upcycling.convert.folder_check import real_tokens

    candidates = parse_candidates(arguments.compare)
    dense = Path(arguments.dense).expanduser().absolute()
    length = min(128, context_length(read_config(dense)) or 128)
    trust = config.trust_remote_code
    tokens = real_tokens(dense, config.data, samples=8, length=length, trust_remote_code=trust)
    stream = stream_beside(arguments.json)
    print(
        f"{tokens.numel()} tokens of real text. Relative error, cosine and gain of each layer's output, "
        "mean over the layers; load: entropy over that of even load",
        file=stream,
    )
    # The progress of calibration is for people as well.
    with contextlib.redirect_stdout(sys.stderr):
        results = compare_methods(
            dense, candidates, _overrides(arguments), tokens, lambda label, _: print(f"measured {label}")
        )
    print(drift_table(results), file=stream)
    write_json(arguments.json, drift_figures(results))
    return 0 if any(hasattr(result, "logits") for result in results.values()) else 1


def _statistics(config: RunConfig, out: Path) -> LayerTensors | None:
    """Returns the statistics of real text that the method needs; None where it needs none."""
    from recipes.upcycling.convert.conversion_statistics import gather_statistics, needs_statistics

    if not needs_statistics(config):
        return None
    # The progress of calibration is for people.
    with contextlib.redirect_stdout(sys.stderr):
        found = gather_statistics(config, out)
    if found is None:
        raise KeyboardInterrupt
    return found


def _config(arguments: argparse.Namespace) -> RunConfig:
    """Reads method and router from the same options, with the same checks, as a training run."""
    from recipes.config.compose import compose_config
    from recipes.config.schema import parse_config

    chosen = [f"upcycle={arguments.method}", f"router={arguments.router}", *_overrides(arguments)]
    values = compose_config(["+recipe=upcycle", *chosen]) | {"dense": arguments.dense}
    return parse_config(values)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags as overrides of train.py."""
    from recipes.config.compose import quoted

    overrides = [f"seed={arguments.seed}"]
    if arguments.experts is not None:
        overrides.append(f"upcycle.num_experts={arguments.experts}")
    if arguments.top_k is not None:
        overrides.append(f"router.top_k={arguments.top_k}")
    if arguments.text is not None:
        overrides.append(f"data.path={quoted(arguments.text)}")
    return [*overrides, *arguments.options]


def _check(arguments: argparse.Namespace, config: RunConfig) -> list[Mistake]:
    """Returns the mistakes that options and files show; models are looked at only where these are right."""
    from recipes.config.places import check_folder
    from recipes.data.sources import check_paths
    from recipes.jobs.option_rules import check_router
    from recipes.models.hf.inspection import check_dense

    mistakes = check_json_target(arguments.json) + check_router(config)
    mistakes += check_dense(arguments.dense, trust_remote_code=config.trust_remote_code)
    if arguments.out is not None:
        mistakes += check_folder("--out", str(Path(arguments.out).expanduser().absolute().parent))
        if Path(arguments.out).expanduser().exists():
            mistakes.append(
                Mistake("--out", arguments.out, "it exists already", "Give another, or delete it.")
            )
    elif arguments.compare is None:
        mistakes.append(Mistake("--out", None, "it names the folder of the MoE", "Give it, or --compare."))
    if config.attention is not None:
        remedy = "Leave attention=none, or run graft train with attention=moe train.steps=0."
        mistakes.append(Mistake("attention", config.attention.name, "only networks are converted", remedy))
    if arguments.verify is not False or arguments.compare is not None:
        mistakes += check_paths(config.data)
    return mistakes or _check_models(arguments, config)


def _check_models(arguments: argparse.Namespace, config: RunConfig) -> list[Mistake]:
    from moe.upcycle import upcycle_method
    from recipes.data.sources import check_paths
    from recipes.jobs.preflight import check_opens
    from recipes.models.export import exporters
    from recipes.upcycling.convert.conversion_statistics import needs_statistics
    from recipes.upcycling.prompts.prompt_rows import check_prompts

    mistakes = check_prompts(config) + check_opens(config) + check_format(arguments.target, exporters())
    if upcycle_method(config.upcycle).aligns_outputs:
        remedy = "Leave it false, or run graft train with train.steps=0."
        mistakes.append(Mistake("upcycle.align_outputs", True, "a converter sees no outputs", remedy))
    if arguments.verify is False and needs_statistics(config):
        mistakes += check_paths(config.data)
    return mistakes


def _request(arguments: argparse.Namespace, config: RunConfig) -> ConversionRequest:
    import torch

    from recipes.upcycling.convert.conversion_plan import ConversionRequest

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return ConversionRequest(
        dense=Path(arguments.dense).expanduser().absolute(),
        method=config.upcycle,
        router=config.router,
        seed=config.seed,
        dtype=dtypes.get(arguments.dtype),
        target=arguments.target,
        layout=arguments.layout,
        untie=arguments.untie,
        trust_remote_code=config.trust_remote_code,
    )


def _convert(conversion: Conversion, out: Path, log: Callable[[str], None]) -> ConversionResult:
    from recipes.runtime.progress import Progress
    from recipes.upcycling.convert.conversion import convert

    with Progress("writing", conversion.total_bytes, "B", log) as progress:
        return convert(conversion, out, progress.update)


def _verify(
    arguments: argparse.Namespace, config: RunConfig, conversion: Conversion, out: Path
) -> EquivalenceReport | None:
    """Compares both folders; None where the user or the method leaves it out."""
    from recipes.upcycling.convert.folder_check import compare_folders, telling_tokens

    dense = Path(arguments.dense).expanduser()
    if not (conversion.claims_exact if arguments.verify is None else arguments.verify):
        return None
    trust = config.trust_remote_code
    tokens = telling_tokens(dense, config.data, trust_remote_code=trust)
    return compare_folders(dense, out, tokens, trust_remote_code=trust)


def _unverified(conversion: Conversion) -> str:
    claim = "exact by construction, not verified" if conversion.claims_exact else "not compared"
    return f"{claim}: python -m tools.verify --dense DENSE --moe OUT compares the two"


def _describe(conversion: Conversion) -> str:
    spec, first = conversion.spec, conversion.spec.moe_blocks[0]
    shared = f" and a shared one {first.shared_width} wide" if first.shared_width else ""
    dense_width = conversion.names.ffns[0].shape.width
    lines = [
        f"dense:   {spec.architecture}, {spec.num_layers} layers, networks {dense_width} wide",
        f"MoE:     {conversion.request.method.name}, {len(spec.moe_blocks)} layers with {first.num_experts} "
        f"experts {first.expert.width} wide{shared}, router {first.router.name}, top {first.router.top_k}",
        f"format:  {conversion.exporter.name}, exact in {', '.join(conversion.exact_in)}",
        f"size:    {_size(conversion.total_bytes)}",
    ]
    if not conversion.exporter.is_native:
        lines.append(f"         in Graft's own format, since {'; '.join(conversion.unsupported_reasons)}")
    if conversion.skipped:
        skipped = conversion.skipped
        lines.append(f"skipped: {len(skipped)} tensors that readers compute anew, such as {skipped[0]}")
    return "\n".join(lines)


def _conclude(conversion: Conversion, result: ConversionResult, peak: int) -> str:
    rate = result.bytes_written / max(result.seconds, 1e-9) / 2**20
    went_on = f", going on from {result.resumed} finished tensors" if result.resumed else ""
    if result.lost:
        went_on += f" ({result.lost} more were damaged, and made again)"
    claim = "exact" if conversion.claims_exact else "another function than the dense model"
    return (
        f"wrote {_size(result.bytes_written)} in {result.seconds:.1f} s ({rate:.0f} MiB/s), flushed to "
        f"disk{went_on}; peak memory {_size(peak)}\nat step 0 it is {claim}: {result.path}"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _figures(
    conversion: Conversion, result: ConversionResult, peak: int, check: EquivalenceReport | None
) -> dict[str, Any]:
    return {
        "format": conversion.exporter.name,
        "exact_in": conversion.exact_in,
        "claims_exact": conversion.claims_exact,
        "total_bytes": conversion.total_bytes,
        "bytes_written": result.bytes_written,
        "seconds": result.seconds,
        "peak_memory_bytes": peak,
        "equivalence": None if check is None else equivalence_figures(check),
    }


if __name__ == "__main__":
    run_command(main)
