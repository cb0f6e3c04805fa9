"""Measures how models use the hardware: ``python -m tools.cap FOLDER [FOLDER ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import ConfigError, Mistake
from tools.command import check_json_target, log_beside, read_numbers, run_command, tool_parser, write_json

if TYPE_CHECKING:
    from recipes.cap.radar import Anchors
    from recipes.cap.request import Request
    from recipes.cap.server import Server


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "cap",
        "Prefill and greedy decoding of local checkpoints: time to the first token, time per "
        "output token, memory, energy, and the sparsity-aware shares of bandwidth and compute of MoE-CAP "
        "(arXiv 2412.07067), with the experts that every pass touched. Figures that cannot be measured are "
        "null, with the reason.",
        example="moe=MOE dense=DENSE --batch-sizes 1,4 --dtype bf16 --out cap",
    )
    add = parser.add_argument
    add(
        "folders",
        nargs="*",
        metavar="[NAME=]FOLDER",
        help="checkpoint of transformers, export of Graft, run of Graft (its MoE), RUN/dense, RUN/cpt",
    )
    add("--compare", nargs="+", metavar="JSON", help="measure nothing; put these reports beside each other")
    work = parser.add_argument_group("what is run").add_argument
    work("--batch-sizes", default="1,4,16", metavar="B,B,...", help="sequences at once")
    work("--prompt", type=int, default=128, metavar="N", help="tokens of a prompt")
    work("--new", type=int, default=32, metavar="N", help="tokens to write")
    work("--rounds", type=int, default=3, metavar="N", help="timed repetitions")
    work("--device", default="cpu", help="cpu, cuda, cuda:1")
    work("--dtype", help="fp32, bf16 or fp16 (default: as in the files)")
    work("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    work(
        "--backend",
        choices=("eager", "batched_mm", "grouped_mm"),
        help="transformers' implementation of experts (default: its choice)",
    )
    work("--text", metavar="PATH", help="text of prompts and perplexity (default: Python's standard library)")
    work("--tokenizer", metavar="DIR", help="tokenizer of all systems (default: each one's own)")
    work("--trust-remote-code", action="store_true", help="run code that the folders bring (auto_map)")
    work("--overhead", action="store_true", help="also measure the overhead of watching the experts")
    _add_more(parser)
    return parser


def _add_more(parser: argparse.ArgumentParser) -> None:
    good = parser.add_argument_group("accuracy").add_argument
    good(
        "--perplexity",
        type=int,
        default=0,
        metavar="N",
        help="perplexity on N samples of the text (default: none)",
    )
    good("--perplexity-length", type=int, default=256, metavar="N", help="tokens of a sample")
    good("--choices", metavar="JSONL", help='lines of {"question": ..., "choices": [...], "answer": 0}')
    good("--answers", metavar="JSONL", help='lines of {"prompt": ..., "answer": ...}, decoded greedily')
    good("--answer-tokens", type=int, default=64, metavar="N", help="most tokens of an answer")
    good("--lm-eval", metavar="TASK,...", help="tasks of lm-evaluation-harness, which must be installed")
    good("--lm-eval-dir", metavar="DIR", help="further task files for it")
    good("--lm-eval-limit", type=int, metavar="N", help="questions of each task (default: all)")
    _add_server(parser)
    _add_costs(parser)


def _add_server(parser: argparse.ArgumentParser) -> None:
    far = parser.add_argument_group("a server (speed alone; FOLDER gives config and tokenizer)").add_argument
    far("--server", metavar="URL", help="OpenAI-compatible: vLLM, SGLang; streams /v1/completions")
    far("--model", default="", metavar="NAME", help="name of the model on the server")
    far(
        "--server-device",
        metavar="NAME",
        help="name of its device, as 'NVIDIA H100 80GB HBM3', for peaks and prices",
    )
    far("--server-devices", type=int, default=1, metavar="N", help="devices that hold the model")
    far("--server-key", metavar="VARIABLE", help="environment variable that holds the key (default: no key)")
    far(
        "--server-experts",
        action="store_true",
        help="its workers record their passes by Graft's extension (docs/cap.md): exact S-MBU",
    )
    top = parser.add_argument_group("peaks").add_argument
    top("--peaks", default="measured", help="measured now, or from the table")
    top("--peak-bandwidth", type=float, metavar="GB/S", help="your own bandwidth, in 10^9 bytes per second")
    top(
        "--peak-flops",
        type=float,
        metavar="GFLOP/S",
        help="your own dense FLOP/s in the dtype of the weights",
    )
    top(
        "--tier",
        action="append",
        default=[],
        metavar="NAME=GB/S[:PART=SHARE,...]",
        help="a memory that the system reads from; the first holds what the others leave (as tools.describe)",
    )


def _add_costs(parser: argparse.ArgumentParser) -> None:
    cost = parser.add_argument_group("cost").add_argument
    cost("--price-usd", type=float, metavar="USD", help="purchase price (default: the table's, else none)")
    cost(
        "--power-watts",
        type=float,
        metavar="W",
        help="power where energy is not measured (default: the table's)",
    )
    cost("--usd-per-kwh", type=float, metavar="USD", help="price of electricity (default: the table's)")
    cost("--pue", type=float, default=1.2, help="power usage effectiveness of the building")
    cost("--life-years", type=float, default=4.0, metavar="Y", help="years until it is written off")
    cost("--busy", type=float, default=0.5, metavar="SHARE", help="share of its life in which it works")
    out = parser.add_argument_group("output").add_argument
    out("--out", metavar="DIR", help="folder for cap.json, cap.html, curves.png and radar.png")
    out("--radar", choices=("fixed", "min-max"), default="fixed", help="ends of the axes")
    out(
        "--radar-batch",
        type=int,
        metavar="B",
        help="batch size of the radar (default: the largest that all systems reached)",
    )
    out(
        "--anchors",
        nargs="+",
        default=[],
        metavar="AXIS=WORSE:BETTER",
        help="ends of an axis, such as tpot_s=1:0.001",
    )


def main(argv: list[str] | None = None) -> int:
    """Measures or compares; returns 0.

    Raises:
        ConfigError: A flag or a file cannot be used.
    """
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from recipes.cap.radar import parse_anchors

    anchors, mistakes = parse_anchors(args.anchors)
    mistakes += check_json_target(args.json)
    if args.out is not None and Path(args.out).is_file():
        mistakes.append(Mistake("--out", args.out, "is a file", "Name a folder."))
    if bool(args.folders) == bool(args.compare):
        remedy = "Name checkpoints to measure, or --compare reports."
        mistakes.append(Mistake("FOLDER", args.folders, "either folders or --compare is needed", remedy))
    report = _compared(args, mistakes) if args.compare else _measured(args, mistakes)
    _show(args, report, anchors)
    return 0


def _measured(args: argparse.Namespace, mistakes: list[Mistake]) -> dict[str, Any]:
    import torch

    from recipes.cap.cap_report import measure
    from recipes.cap.request import check_request

    request, wrong = _request(args)
    if args.threads is not None and args.threads < 1:
        wrong.append(Mistake("--threads", args.threads, "it must be 1 or more", "Raise it."))
    mistakes = [*mistakes, *wrong, *check_request(request)]
    if mistakes:
        raise ConfigError(mistakes)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return measure(request, partial(print, file=sys.stderr))


def _request(args: argparse.Namespace) -> tuple[Request, list[Mistake]]:
    """Returns the request, and the mistakes in the flags that it was read from."""
    from moe.accounting.tiers import Tier, read_tiers
    from recipes.cap.cost import Prices
    from recipes.cap.measure import Workload
    from recipes.cap.request import Accuracy, Request, name_systems

    sizes, mistakes = read_numbers("--batch-sizes", args.batch_sizes)
    accuracy = Accuracy(
        args.perplexity,
        args.perplexity_length,
        _path(args.choices),
        _path(args.answers),
        args.answer_tokens,
        tuple(filter(None, (args.lm_eval or "").split(","))),
        _path(args.lm_eval_dir),
        args.lm_eval_limit,
    )
    tiers: tuple[Tier, ...] = ()
    try:
        tiers = read_tiers(args.tier)
    except ConfigError as error:
        mistakes += error.mistakes
    request = Request(
        systems=name_systems(args.folders),
        work=Workload(tuple(sizes) or (1,), args.prompt, args.new, args.rounds),
        device=args.device,
        dtype=args.dtype,
        experts=args.backend,
        trust_remote_code=args.trust_remote_code,
        text=args.text,
        tokenizer=_path(args.tokenizer),
        accuracy=accuracy,
        origin=args.peaks,
        peak_bytes_per_s=None if args.peak_bandwidth is None else 1e9 * args.peak_bandwidth,
        peak_flops=None if args.peak_flops is None else 1e9 * args.peak_flops,
        tiers=tiers,
        prices=Prices(
            args.price_usd, args.power_watts, args.usd_per_kwh, args.pue, args.life_years, args.busy
        ),
        overhead=args.overhead,
        server=_server(args, mistakes),
    )
    return request, mistakes


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _server(args: argparse.Namespace, mistakes: list[Mistake]) -> Server | None:
    """Returns the server; its other flags without ``--server`` are mistakes."""
    from recipes.cap.server import Server

    given = {"--model": args.model, "--server-device": args.server_device, "--server-key": args.server_key}
    given |= {"--server-experts": args.server_experts}
    if args.server is None:
        rule, remedy = "it is of a server, and none is named", "Give --server URL, or leave it out."
        mistakes += [Mistake(flag, value, rule, remedy) for flag, value in given.items() if value]
        return None
    key = None
    if args.server_key is not None:
        key = os.environ.get(args.server_key)
        if not key:
            rule = "there is no such environment variable"
            mistakes.append(Mistake("--server-key", args.server_key, rule, "Set it, or leave it out."))
    server = Server(args.server, args.model, args.server_device, args.server_devices, key)
    return replace(server, records=args.server_experts)


def _compared(args: argparse.Namespace, mistakes: list[Mistake]) -> dict[str, Any]:
    from recipes.cap.join_reports import RATIO_HEAD, differences, join_reports, ratio_rows, read_reports
    from recipes.tracking.report.formats import aligned

    if mistakes:
        raise ConfigError(mistakes)
    paths = [Path(path).expanduser() for path in args.compare]
    reports = read_reports(paths)
    report = join_reports(reports, [path.stem for path in paths])
    log = log_beside(args.json)
    for line in differences(reports):
        log(f"note: {line}")
    log(f"{aligned(RATIO_HEAD, ratio_rows(report))}\n")
    return report


def _show(args: argparse.Namespace, report: dict[str, Any], anchors: dict[str, Anchors]) -> None:
    """Prints the table and writes the requested files."""
    from recipes.cap.cap_table import text_of
    from recipes.cap.radar import make_radar

    log = log_beside(args.json)
    log(text_of(report))
    write_json(args.json, report)
    if args.out is not None:
        from recipes.cap.cap_page import write_report

        radar = make_radar(report, anchors, args.radar, args.radar_batch)
        log(f"\npage: {write_report(Path(args.out).expanduser(), report, radar)}")


if __name__ == "__main__":
    run_command(main)
