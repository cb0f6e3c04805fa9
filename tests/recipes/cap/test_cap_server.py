"""Speed behind a server, against a tiny one in this process that streams as vLLM does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe.errors import ModelError
from recipes.cap.served import _apart
from recipes.cap.server import Reply, Server, ask, ask_together, most_together, together
from recipes.cap.server import _take as take_line
from tests.conftest import MakeCheckpoint
from tests.patience import patience
from tests.recipes.cap.cap_systems import MIXTURES
from tests.recipes.jobs.job_runs import write_text
from tools.cap import main

STEP = 2.0**-6  # exact in floats


class Turns:
    """Time of server and clients: each token takes `STEP`, and the next is written when it has been read."""

    def __init__(self) -> None:
        self._now = 0.0
        self._turn, self._read = threading.Lock(), threading.Event()

    def perf_counter(self) -> float:
        """Stands in for that of `time`."""
        return self._now

    def token(self, write: Callable[[], None]) -> None:
        """Writes a token."""
        with self._turn:
            self._now += STEP
            self._read.clear()
            write()
            assert self._read.wait(patience(30)), "nobody has read the token"

    def take(self, reply: Reply, line: bytes, now: float) -> None:
        """Stands in for the function of the client that takes a line."""
        before = len(reply.arrived)
        take_line(reply, line, now)
        if len(reply.arrived) > before:
            self._read.set()


class Handler(BaseHTTPRequestHandler):
    """Writes tokens as the server's fields say."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, body, self.headers.get("Authorization")))
            fails = server.failing > 0
            server.failing -= 1
        if fails:
            self.send_error(503, "too busy")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if server.barrier is not None:
            server.barrier.wait(timeout=patience(30))
        with server.slots:
            for number in range(body["max_tokens"] // server.together):
                event = {"choices": [{"index": 0, "text": f"t{number}"}], "usage": None}
                server.turns.token(partial(self._send, event))
        written = body["max_tokens"] - server.short
        if server.counts:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": written}
            self._send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f": comment\n\ndata: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server whose behaviour a test sets."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.slots, server.barrier = threading.Lock(), threading.Semaphore(64), None
    server.asked, server.failing, server.short, server.counts, server.together = [], 0, 0, True, 1
    server.turns = Turns()
    monkeypatch.setattr("recipes.cap.server.time", server.turns)
    monkeypatch.setattr("recipes.cap.server._take", server.turns.take)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_request_is_timed_piece_by_piece(fake: Any) -> None:
    reply = ask(Server(f"{fake.url}/v1/", "m", key="secret"), [1, 2, 3], 4)
    assert reply.error is None and (reply.prompt_tokens, reply.tokens, len(reply.arrived)) == (3, 4, 4)
    assert (reply.first, reply.each) == pytest.approx((STEP, STEP))
    ((path, body, key),) = fake.asked
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert body["prompt"] == [1, 2, 3] and body["ignore_eos"] and body["stream_options"]["include_usage"]
    assert "secret" not in repr(Server("http://x", "m", key="secret"))


def test_pieces_of_several_tokens_are_counted_by_the_server(fake: Any) -> None:
    fake.together = 2
    reply = ask(Server(fake.url, "m"), [1], 6)
    assert len(reply.arrived) == 3 and reply.tokens == 6
    # Two of the three pieces come after the first, and five of the six tokens.
    assert reply.each == pytest.approx(2 * STEP / 5)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"failing": 1}, "HTTP 503"),
        ({"short": 1}, "it wrote 3 tokens instead of 4"),
        ({"counts": False}, "does not report how many tokens"),
        ({"together": 100}, "no token came"),
    ],
)
def test_a_reply_that_is_not_what_was_asked(fake: Any, fault: dict[str, Any], words: str) -> None:
    for name, value in fault.items():
        setattr(fake, name, value)
    reply = ask(Server(fake.url, "m"), [1], 4)
    assert reply.error is not None and words in reply.error


def test_nobody_listens() -> None:
    reply = ask(Server("http://127.0.0.1:9", "m"), [1], 4)
    assert reply.error is not None and "refused" in reply.error


def test_how_many_decode_at_once_by_hand() -> None:
    # From 0 to 4, and from 2 to 6: 8 seconds of requests in 6
    replies = [Reply(arrived=[0.0, 4.0]), Reply(arrived=[2.0, 6.0])]
    assert together(replies) == pytest.approx(8 / 6)
    assert together([Reply(arrived=[1.0]), Reply(arrived=[1.0])]) == 2.0
    assert (
        most_together([Reply(arrived=[0.0, 3.0]), Reply(arrived=[1.0, 2.0]), Reply(arrived=[2.5, 4.0])]) == 2
    )
    assert most_together([Reply(arrived=[0.0, 1.0]), Reply(arrived=[1.0, 2.0])]) == 2
    assert most_together([Reply(arrived=[0.0, 1.0]), Reply(arrived=[1.5, 2.0])]) == 1


def test_what_is_said_of_requests_that_did_not_decode_at_once() -> None:
    # Prefill one after the other: all decode together in the end, whatever the server's largest batch.
    staggered = [Reply(arrived=[float(start), 4.0 + start]) for start in range(3)]
    assert _apart([staggered], 3, 2.0) == (
        "2.0 of 3 requests decoded at once on average, and 3 at most: first tokens came up to 2 s apart, "
        "so ask for more tokens (--new)"
    )
    queued = [Reply(arrived=[float(start), 0.5 + start]) for start in range(3)]
    said = _apart([queued], 3, 1.0)
    assert "and 1 at most; first tokens came up to 2 s apart (a smaller batch on the server, or its" in said


def test_all_are_sent_at_once(fake: Any) -> None:
    fake.barrier = threading.Barrier(3)  # none is answered before all have come
    replies = ask_together(Server(fake.url, "m"), [[1]] * 3, 5)
    assert [reply.error for reply in replies] == [None] * 3


def report(folder: Path, fake: Any, out: Path, *more: str) -> dict[str, Any]:
    text = write_text(out.parent / "text")
    work = ["--batch-sizes", "1,3", "--prompt", "6", "--new", "4", "--rounds", "2", "--text", text]
    flags = ["--server", fake.url, "--model", "m", "--json", str(out)]
    assert main([f"served={folder}", *work, *flags, *more]) == 0
    content: dict[str, Any] = json.loads(out.read_text())
    return content


@pytest.fixture
def however_few_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has utilisations computed for however few requests that decode at once."""
    monkeypatch.setattr("recipes.cap.served._TOGETHER", 0.0)


def test_a_report(
    make_checkpoint: MakeCheckpoint, fake: Any, tmp_path: Path, capsys: Any, however_few_overlap: None
) -> None:
    folder = make_checkpoint("mixtral", **MIXTURES["mixtral"])
    name = "NVIDIA H100 80GB HBM3"
    options = ["--server-device", name, "--server-devices", "2", "--dtype", "bf16"]
    found = report(folder, fake, tmp_path / "a.json", *options)
    assert found["environment"]["device"] == name and found["environment"]["server"] == fake.url
    (system,) = found["systems"]
    assert system["peaks"]["bytes_per_s"]["value"] == 3350e9 and system["peaks"]["flops"]["value"] == 989e12
    assert system["weights"]["held_bytes"] is None and system["devices"] == 2
    for point, size in zip(system["points"], (1, 3), strict=True):
        assert point["requests"] == {"attempted": 3 * size, "failed": 0}
        assert 0 < point["reached_batch_size"] <= size + 1e-9
        assert point["tpot_s"]["mean"] >= STEP and point["ttft_s"]["mean"] >= STEP
        assert point["tokens_per_s"] == pytest.approx(1 / STEP)
        decode = point["decode"]
        # never called a trace: 6 (1 - (1 - 2/6)^B) experts of a layer
        assert decode["distinct"]["source"] == "estimated-uniform-upper-bound"
        assert decode["distinct"]["mean"] == pytest.approx(6 * (1 - (2 / 3) ** size))
        assert decode["s_mbu"] == pytest.approx(decode["bytes_per_s"] / (2 * 3350e9))
        assert point["prefill"]["s_mbu"] is None and "not recorded" in point["prefill"]["utilisation_reason"]
        assert point["memory"]["peak_bytes"] is point["energy"]["joules"] is None
        assert point["cost"]["usd_per_mtok"] > 0 and found["cost_assumptions"]["price_usd"] == 2 * 38_000
    prompts = [tuple(body["prompt"]) for _, body, _ in fake.asked]
    assert len(prompts) == len(set(prompts)) == 3 + 9, "no prompt twice: a server keeps what it has read"
    out = capsys.readouterr().out
    assert "<=2.0/6" in out and f"2 x {name}" in out


def test_a_server_with_fewer_slots_has_no_utilisation(
    make_checkpoint: MakeCheckpoint, fake: Any, tmp_path: Path, capsys: Any
) -> None:
    fake.slots = threading.Semaphore(1)
    folder = make_checkpoint("mixtral", **MIXTURES["mixtral"])
    (system,) = report(folder, fake, tmp_path / "a.json", "--peak-bandwidth", "1", "--peak-flops", "1")[
        "systems"
    ]
    alone, three = system["points"]
    assert alone["decode"]["s_mbu"] > 0
    # Each decodes for three steps, one after the other: 9 steps of requests in 11.
    assert three["reached_batch_size"] == pytest.approx(9 / 11)
    assert (
        three["decode"]["s_mbu"] is None
        and "of 3 requests decoded at once" in (three["decode"]["utilisation_reason"])
    )
    assert "requests decoded at once" in capsys.readouterr().out


def test_failed_requests_are_counted_and_void_the_point(
    make_checkpoint: MakeCheckpoint, fake: Any, tmp_path: Path, however_few_overlap: None
) -> None:
    fake.failing = 1
    folder = make_checkpoint("mixtral", **MIXTURES["mixtral"])
    (system,) = report(folder, fake, tmp_path / "a.json")["systems"]
    assert system["points"][0]["requests"] == {"attempted": 3, "failed": 1}
    assert (
        system["points"][0]["tpot_s"] is None
        and "1 of 3 requests failed: HTTP 503" in (system["points"][0]["reason"])
    )
    assert system["points"][1]["reason"] is None
    assert system["points"][1]["decode"]["utilisation_reason"] == "the peak bandwidth and FLOP/s is not known"


def test_a_server_that_only_refuses_is_a_mistake(
    make_checkpoint: MakeCheckpoint, fake: Any, tmp_path: Path
) -> None:
    fake.failing = 10**6
    with pytest.raises(ModelError, match=r"--server='http.*every request failed: HTTP 503"):
        report(make_checkpoint("llama"), fake, tmp_path / "a.json")
