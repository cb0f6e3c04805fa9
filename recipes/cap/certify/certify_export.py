"""Finds what a certificate is about: the export of a run, its trainer, and text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moe.errors import ConfigError
from recipes.cap.certify.base import Consumer, Places
from recipes.cap.certify.certificate import Certificate, certify
from recipes.cap.certify.observation import Observation, Request
from recipes.cap.certify.observed_module import observe_module
from recipes.cap.certify.transformers_consumer import TransformersConsumer
from recipes.cap.folders import Source, find_source
from recipes.data.config import DataConfig
from recipes.jobs.export_run import ExportRequest, trained_model
from recipes.models.export.model_card import replace_certificates
from recipes.models.hf.config_file import load_config
from recipes.models.hf.hf_model import source_dtype
from recipes.runtime.atomic import atomic_write_json
from recipes.runtime.user_json import UserJsonError, read_json_file
from recipes.tracking.report import build_report
from recipes.tracking.report.build_report import REPORT_FILE
from recipes.tracking.report.certificates import CERTIFICATE_FILE, HEADER, certificate_rows
from recipes.upcycling.convert.folder_check import real_tokens


def certify_export(
    model: Path,
    consumers: Sequence[Consumer],
    *,
    text: Path | None,
    sequences: int,
    length: int,
    new_tokens: int,
    log: Callable[[str], None],
    trust_remote_code: bool = False,
) -> Certificate:
    """Certifies an export, and writes the certificate into its folder.

    Args:
        model: A run, whose newest checkpoint is the trainer; or an export alone, which is compared with what
            transformers computes.
        consumers: The programs.
        text: Text file; None for Python's standard library.
        sequences: Sequences of tokens.
        length: Tokens of each.
        new_tokens: Tokens to generate after half of each.
        log: Takes a line on what is done.
        trust_remote_code: Whether code that the export brings may run.

    Raises:
        ConfigError: The folder is neither.
        ModelError: The text is too short.
    """
    source = find_source(model)
    if not isinstance(source, Source):
        raise ConfigError([source])
    data = DataConfig() if text is None else DataConfig(path=str(text))
    tokens_BS = real_tokens(source.folder, data, sequences, length, trust_remote_code=trust_remote_code)
    request = Request(tokens_BS.tolist(), length // 2, new_tokens)
    with _reference(model, source.folder, log, trust_remote_code) as (reference, name):
        results = certify(source.folder, reference, consumers, request, log)
    words = "Python's standard library" if text is None else text.name
    found = Certificate(source.folder.name, name, words, sequences * length, results)
    content = with_others(found, source.folder / CERTIFICATE_FILE)
    atomic_write_json(source.folder / CERTIFICATE_FILE, content)
    replace_certificates(source.folder, _card(content))
    if (model / REPORT_FILE).is_file():
        build_report(model)
    return found


def _card(content: Mapping[str, Any]) -> str:
    """Returns the certificates as a table of Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *certificate_rows(content)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"Compared with {content['reference']} on {content['tokens']} tokens of {content['text']}:\n\n{table}"
    )


def with_others(found: Certificate, path: Path) -> dict[str, Any]:
    """Returns a certificate with what an earlier one on the same tokens says of other programs."""
    content = found.content()
    try:
        earlier = read_json_file(path)
        same = all(earlier[key] == content[key] for key in ("reference", "text", "tokens", "limits"))
        names = {result.name for result in found.results}
        others = [result for result in earlier["results"] if result["name"] not in names] if same else []
    except (UserJsonError, KeyError, TypeError):
        others = []  # there is none, or what somebody else has written
    return content | {"results": [*others, *content["results"]]}


@contextmanager
def _reference(
    model: Path, folder: Path, log: Callable[[str], None], trust: bool
) -> Iterator[tuple[Callable[[Request], Observation], str]]:
    """Yields what computes as the trainer does, and its name."""
    if model == folder:
        log("reference: transformers, as there is no run to compare with")
        consumer = TransformersConsumer(Places(trust_remote_code=trust), log)
        yield partial(consumer.observe, folder, scratch=folder), "transformers"
        return
    dtype = source_dtype(load_config(folder, trust_remote_code=trust))
    with trained_model(ExportRequest(model, dtype=dtype)) as trained:
        name = f"graft, step {trained.context.step}"
        log(f"reference: the trainer's own layers and weights ({name}), rounded as in the export")
        yield partial(observe_module, trained.module, version=name), name
