"""Compares the client of ``graft cap --server`` with that of ``vllm bench serve`` on one server, in turns.

``PYTHONPATH=. ENV/bin/python tests/recipes/cap/engine/beside_vllm_bench.py URL MODEL FOLDER``: in every round
each client sends requests at once, the one that begins alternates, and no prompt comes twice.

Letters: B requests of each client, R rounds.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path
from typing import Any

from recipes.cap.server import Server, ask_together

PROMPT, NEW, ROUNDS = 64, 24, 20


class _VLLMClient:
    """vLLM's client, with one session for all rounds as it has one for a benchmark."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._session: Any = None

    def __call__(self, url: str, model: str, prompts: list[list[int]]) -> list[tuple[float, float]]:
        """Returns TTFT and TPOT of each request in seconds, as vllm.benchmarks.serve computes them."""
        done = self._loop.run_until_complete(self._ask(url, model, prompts))
        assert all(one.success for one in done), done
        return [(one.ttft, (one.latency - one.ttft) / (one.output_tokens - 1)) for one in done]

    async def _ask(self, url: str, model: str, prompts: list[list[int]]) -> list[Any]:
        import aiohttp
        from vllm.benchmarks.lib import endpoint_request_func as vllm_client

        self._session = self._session or aiohttp.ClientSession()
        inputs = [
            vllm_client.RequestFuncInput(
                prompt=prompt,
                api_url=f"{url}/v1/completions",
                prompt_len=PROMPT,
                output_len=NEW,
                model=model,
                extra_body={"temperature": 0},
                ignore_eos=True,
            )
            for prompt in prompts
        ]
        sent = (vllm_client.async_request_openai_completions(one, self._session) for one in inputs)
        return await asyncio.gather(*sent)


def _by_graft(url: str, model: str, prompts: list[list[int]]) -> list[tuple[float, float]]:
    """Does the same with the client of ``graft cap``."""
    done = ask_together(Server(url, model), prompts, NEW)
    assert not any(one.error for one in done), done
    return [(one.first, one.each) for one in done]


def main(url: str, model: str, folder: str) -> None:
    """Prints the median TTFT and TPOT of both."""
    from transformers import AutoTokenizer

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md")))
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    prompts = iter([ids[i : i + PROMPT] for i in range(0, len(ids) - PROMPT, PROMPT)])
    clients = {"graft": _by_graft, "vllm bench": _VLLMClient()}
    for size in (1, 4):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
        for number in range(1 + ROUNDS):
            for name in sorted(clients, reverse=number % 2 == 1):
                times = clients[name](url, model, [next(prompts) for _ in range(size)])
                found[name] += times if number else []  # the first is to warm up
        for place, title in enumerate(("TTFT", "TPOT")):
            medians = {name: statistics.median(one[place] for one in times) for name, times in found.items()}
            words = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in medians.items())
            print(f"batch {size}, {title}, median: {words}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
