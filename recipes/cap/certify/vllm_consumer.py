"""The export in vLLM, which has an environment of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from moe.errors import Mistake
from recipes.cap.certify import vllm_worker
from recipes.cap.certify.base import Consumer, ConsumerError
from recipes.cap.certify.observation import Observation, Request, read_worker_output


class VLLMConsumer(Consumer):
    """vLLM, by a worker that its interpreter runs."""

    name = "vllm"

    def check(self) -> Mistake | None:
        """Requires the interpreter of an environment with vLLM."""
        python = self.places.vllm
        if python is None:
            rule = "vLLM needs an environment of its own"
            return Mistake("--in", self.name, rule, "Name its interpreter: --vllm ENV/bin/python.")
        if not python.is_file():
            rule = "there is no such interpreter"
            return Mistake("--vllm", str(python), rule, "Name python in the environment that has vLLM.")
        return None

    def observe(self, folder: Path, request: Request, scratch: Path) -> Observation:
        """See `Consumer.observe`."""
        wanted = {
            "model": str(folder.absolute()),
            "dtype": "float32",
            "out": str(scratch),
            "sequences": [list(tokens) for tokens in request.sequences],
            "prompt_length": request.prompt_length,
            "new_tokens": request.new_tokens,
            "pinned": None if request.pinned is None else str(request.pinned),
        }
        path = scratch / "request.json"
        path.write_text(json.dumps(wanted), encoding="utf-8")
        run_program([str(self.places.vllm), vllm_worker.__file__, str(path)], self.name, self.places.seconds)
        return read_worker_output(scratch, request.sequences)


def run_program(command: list[str], name: str, seconds: float, env: dict[str, str] | None = None) -> str:
    """Runs another program; returns what it prints, errors included.

    Raises:
        ConsumerError: It fails, and the last line that says why is in the error; or it takes too long.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise ConsumerError(f"{name} took longer than {seconds:g} s (--time-limit)") from None
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        # A loader's reason comes before the lines of those that called it.
        lines = [line for line in lines if "error" in line.lower()] or lines
        said = lines[-1] if lines else f"it said nothing, and its exit code is {done.returncode}"
        raise ConsumerError(f"{name} failed: {said}")
    return done.stdout + done.stderr
