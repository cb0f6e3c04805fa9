"""A client of an OpenAI-compatible server (vLLM, SGLang): streamed completions, timed as they come.

Letters: B requests, S tokens.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from moe.errors import GraftError

_SHOWN = 300  # characters of a server's own message


@dataclass(frozen=True)
class Server:
    """Address of a server.

    Attributes:
        url: Up to ``/v1``, with it or without.
        model: Name of the model on the server.
        device: Name of one of its devices, as from ``torch.cuda.get_device_name``; None if unknown.
        devices: Number of devices that hold the model.
        key: Key for the authorisation header; None for none.
        records: Whether its workers record their passes (`recipes.cap.engine`).
        timeout: Seconds without a byte after which a request has failed.
    """

    url: str
    model: str
    device: str | None = None
    devices: int = 1
    key: str | None = field(default=None, repr=False)
    records: bool = False
    timeout: float = 600.0

    def request(self, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
        """Returns the request of a path, such as ``/v1/completions``."""
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        root = self.url.rstrip("/").removesuffix("/v1")
        return urllib.request.Request(root + path, json.dumps(body).encode(), headers)


class ServerError(GraftError):
    """A server did not answer, or not as it should."""


@dataclass
class Reply:
    """Outcome of one request.

    Attributes:
        sent: Time of sending, by `time.perf_counter`.
        arrived: Arrival time of each chunk of text.
        prompt_tokens: Tokens read, counted by the server; None if it reports none.
        tokens: Tokens written, counted by the server; None if it reports none.
        error: Reason of the failure; None if there was none.
    """

    sent: float = 0.0
    arrived: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    tokens: int | None = None
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrived[0] - self.sent

    @property
    def each(self) -> float:
        """Mean seconds per further token; a chunk may hold several."""
        assert self.tokens is not None and self.tokens > 1, self
        return (self.arrived[-1] - self.arrived[0]) / (self.tokens - 1)


def ask(server: Server, ids: Sequence[int], new: int) -> Reply:
    """Sends token ids and reads the stream; a reply that differs from the request has an error."""
    body = {
        "model": server.model,
        "prompt": list(ids),
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = server.request("/v1/completions", body)
    reply = Reply(sent=time.perf_counter())
    try:
        with urllib.request.urlopen(request, timeout=server.timeout) as stream:
            for line in stream:
                _take(reply, line, time.perf_counter())
    except (OSError, HTTPException, ValueError) as error:
        reply.error = _words(error)
    if reply.error is None:
        reply.error = _wrong(reply, len(ids), new)
    return reply


def call(server: Server, path: str, body: Mapping[str, Any]) -> Any:
    """Sends a request and returns the JSON of the answer.

    Raises:
        ServerError: The server does not answer, or with an error.
    """
    try:
        with urllib.request.urlopen(server.request(path, body), timeout=server.timeout) as stream:
            return json.load(stream)
    except (OSError, HTTPException, ValueError) as error:
        raise ServerError(f"{path}: {_words(error)}") from None


def _words(error: Exception) -> str:
    """Returns what went wrong, with the server's own words if it has any."""
    if isinstance(error, urllib.error.HTTPError):
        message = " ".join(error.read(_SHOWN).decode(errors="replace").split())
        return f"HTTP {error.code}: {message or error.reason}"
    return f"{type(error).__name__}: {error}"


def _take(reply: Reply, line: bytes, now: float) -> None:
    """Reads one line of the stream.

    Raises:
        ValueError: It is not JSON, or an error that the server sends inside it.
    """
    text = line.decode(errors="replace").strip()
    if not text.startswith("data:") or text == "data: [DONE]":
        return
    event: Any = json.loads(text.removeprefix("data:"))
    if not isinstance(event, dict) or event.get("error"):
        raise ValueError(f"the server replied {str(event)[:_SHOWN]}")
    if event.get("choices"):
        reply.arrived.append(now)
    usage = event.get("usage")
    if usage:
        reply.prompt_tokens = usage.get("prompt_tokens")
        reply.tokens = usage.get("completion_tokens")


def _wrong(reply: Reply, prompt: int, new: int) -> str | None:
    """Returns the difference between reply and request; None if there is none."""
    if not reply.arrived:
        return "no token came"
    if reply.tokens is None:
        return "the server does not report how many tokens it wrote (stream_options.include_usage)"
    if reply.tokens != new:
        return f"it wrote {reply.tokens} tokens instead of {new}: it does not know ignore_eos, or has a limit"
    if reply.prompt_tokens not in (None, prompt):
        return f"it read {reply.prompt_tokens} tokens instead of {prompt}: its tokenizer adds some, or cuts"
    return None


def ask_together(server: Server, prompts: Sequence[Sequence[int]], new: int) -> list[Reply]:
    """Sends all at once, a thread each, and waits for all."""
    replies: list[Reply | None] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts))

    def run(index: int) -> None:
        barrier.wait()
        replies[index] = ask(server, prompts[index], new)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [reply or Reply(error="the request ended without a reply") for reply in replies]


def together(replies: Sequence[Reply]) -> float:
    """Returns the mean number of requests that decoded at once, over the time in which any did."""
    spans = [(reply.arrived[0], reply.arrived[-1]) for reply in replies]
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return sum(end - begin for begin, end in spans) / whole if whole > 0 else float(len(spans))


def most_together(replies: Sequence[Reply]) -> int:
    """Returns the largest number of requests that decoded at one time."""
    events = [(time, step) for one in replies for time, step in ((one.arrived[0], 1), (one.arrived[-1], -1))]
    # Where one ends as another begins, both decoded.
    return max(itertools.accumulate(step for _, step in sorted(events, key=lambda e: (e[0], -e[1]))))
