"""Tokenises documents into a Megatron ``.bin``/``.idx`` pair: ``python -m tools.tokenize --help``.

Run it as a module. As a script (``python tools/tokenize.py``) it would hide the standard library's own
``tokenize``, which Python itself imports.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from moe.errors import DataError, Mistake
from tools.command import check_json_target, log_beside, run_command, tool_parser, write_json

INPUT_HELP = (
    "files or globs (quote them; ** reaches into folders) of one kind: text (a file is a document), .jsonl, "
    ".json (each also .gz or .zst) or .parquet"
)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the flags."""
    parser = tool_parser(
        "tokenize",
        "Tokenises documents into PREFIX.bin and PREFIX.idx, Megatron's format, for training.",
        example="--input 'text/*.jsonl' --tokenizer MODEL --out corpus",
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help=INPUT_HELP)
    add("--tokenizer", required=True, metavar="DIR", help="local folder of a Hugging Face tokenizer")
    add("--out", required=True, metavar="PREFIX", help="path of the pair, without .bin; must not exist yet")
    add("--text-key", default="text", metavar="KEY", help="field or column of the text (default: text)")
    add("--no-eos", action="store_true", help="do not close each document with the end-of-sequence token")
    add(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="whether each document begins with the beginning-of-sequence token <bos> (default: auto, as the "
        "tokenizer does by itself)",
    )
    add("--trust-remote-code", action="store_true", help="run code that the tokenizer brings (auto_map)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Writes the pair and returns 0.

    Raises:
        GraftError: The pair cannot be written.
    """
    args = build_parser().parse_args(argv)
    from recipes.data.config import DataConfig
    from recipes.data.repeats import describe_repeats
    from recipes.data.sources import check_paths
    from recipes.data.tokenise import tokenise
    from recipes.data.tokenizer import check_tokenizer
    from recipes.data.unfinished_pair import discard_unfinished, require_no_files
    from recipes.runtime.claim import claim, lock_beside

    if not args.text_key:
        raise DataError.one("--text-key", args.text_key, "is empty", "Name the field that holds the text.")
    bos = {"auto": "auto", "yes": True, "no": False}[args.bos]
    cfg = DataConfig(path=args.input, text_key=args.text_key, append_eos=not args.no_eos, prepend_bos=bos)
    mistakes = [Mistake("--input", m.value, m.rule, m.remedy) for m in check_paths(cfg)]
    trust = args.trust_remote_code
    mistakes += check_tokenizer(args.tokenizer, where="--tokenizer", trust_remote_code=trust)
    mistakes += check_json_target(args.json)
    if mistakes:
        raise DataError(mistakes)
    log, prefix = log_beside(args.json), Path(args.out)
    if twice := describe_repeats(cfg):
        log(twice)
    require_no_files(prefix, "--out")
    with claim(lock_beside(prefix), "--out", args.out):
        require_no_files(prefix, "--out")
        discard_unfinished(prefix)
        counts = tokenise(cfg, args.tokenizer, prefix, log, trust_remote_code=trust)
    rate = counts.tokens / max(counts.seconds, 1e-9)
    if counts.begin:
        log(f"each document begins with {counts.begin} (--bos)")
    if counts.empty_documents:
        log(f"{counts.empty_documents} empty documents left out")
    log(
        f"{counts.documents} documents, {counts.tokens} tokens, {counts.text_bytes} bytes of text "
        f"in {counts.seconds:.1f} s, {rate:.0f} tokens/s: {args.out}.bin and .idx"
    )
    write_json(args.json, {"output": args.out, **asdict(counts), "tokens_per_second": rate})
    return 0


if __name__ == "__main__":
    run_command(main)
