"""The export in llama.cpp: converted by its own converter to a GGUF file in fp32.

Its perplexity program writes the log-probabilities of the second half of each sequence, in steps of
16 / 65535 down to 16 below the largest. It does not tell the experts of a token.

Letters: N sequences, S tokens of one, V vocabulary.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from pathlib import Path

import numpy as np

from moe.errors import Mistake
from recipes.cap.certify.base import Consumer, ConsumerError
from recipes.cap.certify.observation import Observation, Request, SequenceObservation
from recipes.cap.certify.vllm_consumer import run_program
from recipes.data.tokenizer import load_tokenizer

_MAGIC = b"_logits_"
_CONVERTER = "convert_hf_to_gguf.py"


class LlamaCppConsumer(Consumer):
    """llama.cpp, by its converter and its perplexity program."""

    name = "llama.cpp"
    tells_experts = False

    def check(self) -> Mistake | None:
        """Requires the converter and the programs."""
        folder = self.places.llama_cpp
        if folder is None:
            rule = "llama.cpp is a program of its own"
            return Mistake("--in", self.name, rule, "Name its folder: --llama-cpp DIR.")
        for path in (folder / _CONVERTER, self._program("llama-perplexity")):
            if not path.is_file():
                remedy = "Build llama.cpp (target llama-perplexity); --llama-cpp-bin names another folder."
                return Mistake("--llama-cpp", str(folder), f"{path} is missing", remedy)
        return None

    def observe(self, folder: Path, request: Request, scratch: Path) -> Observation:
        """See `Consumer.observe`. Its tokens are its own tokenizer's, of the text of the sequences."""
        model, text, saved = scratch / "model.gguf", scratch / "text.txt", scratch / "log_probs.bin"
        self._convert(folder, model)
        text.write_text(_text(folder, request, self.places.trust_remote_code), encoding="utf-8")
        length = len(request.sequences[0])
        command = [str(self._program("llama-perplexity")), "-m", str(model), "-f", str(text)]
        command += ["-c", str(length), "-b", str(length), "--chunks", str(len(request.sequences))]
        self._run([*command, "--save-all-logits", str(saved), "-t", str(os.cpu_count())])
        printed = self._run([str(self._program("llama-perplexity")), "--version"])
        version = re.search(r"version: (.+)", printed)
        return read_log_probs(saved, f"llama.cpp {version[1] if version else '(no version told)'}")

    def _run(self, command: list[str]) -> str:
        return run_program(command, self.name, self.places.seconds)

    def _program(self, name: str) -> Path:
        folder = self.places.llama_cpp_bin or (self.places.llama_cpp or Path()) / "build" / "bin"
        return folder / name

    def _convert(self, folder: Path, out: Path) -> None:
        assert self.places.llama_cpp is not None, "checked"
        env = os.environ | {"PYTHONPATH": str(self.places.llama_cpp / "gguf-py"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(self.places.llama_cpp / _CONVERTER), str(folder.absolute())]
        command += ["--outtype", "f32", "--outfile", str(out)]
        run_program(command, f"{self.name}'s converter", self.places.seconds, env)


def _text(folder: Path, request: Request, trust: bool) -> str:
    """Returns the text of the sequences, with more behind it than is read."""
    tokenizer = load_tokenizer(folder, append_eos=False, trust_remote_code=trust)
    tokens = [token for sequence in request.sequences for token in sequence]
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    # It wants two sequences at least, and tokens at seams may join.
    return text + text


def read_log_probs(path: Path, version: str) -> Observation:
    """Reads the file that llama-perplexity writes.

    Raises:
        ConsumerError: It is not such a file.
    """
    with path.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ConsumerError(
                "llama.cpp wrote a file of another format: is its version newer than Graft knows?"
            )
        length, vocabulary, count = struct.unpack("<Iii", stream.read(12))
        tokens_NS = np.fromfile(stream, np.int32, count * length).reshape(count, length)
        first = length // 2
        width = 2 * ((vocabulary + 1) // 2) + 4
        rows = np.fromfile(stream, np.uint16).reshape(count, length - 1 - first, width)
    found = [SequenceObservation(first, *_log_probs(part, vocabulary)) for part in rows]
    return Observation(version, tokens_NS.tolist(), found)


def _log_probs(rows: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns fp32 log-probabilities and their floor: a row begins with the size of a step, and the floor."""
    head = rows[:, :4].copy().view(np.float32)
    steps = rows[:, 4 : 4 + vocabulary].astype(np.float32)
    return head[:, 1:2] + head[:, :1] * steps, head[:, 1]
