"""Speed and memory of a conversion against ``cp`` of its output on the same disk, over model sizes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.runtime.atomic import sync_path
from recipes.runtime.source_root import child_environment


@dataclass(frozen=True)
class DenseSize:
    """A Llama of random weights, in bf16.

    Attributes:
        hidden_size: D.
        intermediate_size: F.
        num_layers: Blocks.
        vocab_size: Vocabulary of embedding and head, which are not tied.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int = 32000

    @property
    def largest_tensor_bytes(self) -> int:
        """Bytes of the largest tensor in bf16."""
        return 2 * self.hidden_size * max(self.vocab_size, self.intermediate_size)


#: 75, 300 and 880 million parameters: four and three times apart.
SIZES = (DenseSize(512, 1408, 13), DenseSize(1024, 2816, 20), DenseSize(2048, 5632, 15))


@dataclass(frozen=True)
class ConversionTiming:
    """One conversion and one copy of what it wrote.

    Attributes:
        seconds: Seconds of the conversion, from its first tensor until everything is on the disk.
        start_seconds: Seconds of the process before and after that.
        peak_bytes: Largest resident set of the process.
        output_bytes: Bytes of the written tensors.
        copy_seconds: Seconds of ``cp -r``.
        copy_sync_seconds: Seconds of ``cp -r`` until everything is on the disk.
    """

    seconds: float
    start_seconds: float
    peak_bytes: int
    output_bytes: int
    copy_seconds: float
    copy_sync_seconds: float


def make_dense(size: DenseSize, folder: Path) -> int:
    """Writes a checkpoint of that size; returns its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = size.hidden_size // 64
    config = LlamaConfig(
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=size.vocab_size,
        dtype="bfloat16",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="2GB")
    return sum(parameter.numel() for parameter in model.parameters())


def measure_conversion(
    dense: Path, folder: Path, method: str, experts: int, rounds: int
) -> Iterator[ConversionTiming]:
    """Converts and copies in turn, each time anew."""
    for number in range(rounds):
        out = folder / f"moe-{number}"
        started = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "tools.upcycle",
            "--no-verify",
            "--dense",
            str(dense),
            "--out",
            str(out),
        ]
        command += ["--no-verify", "--method", method, "--experts", str(experts), "--json", "-"]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        done = subprocess.run(command, env=child_environment(), check=True, **quiet)
        total = time.monotonic() - started
        figures: dict[str, Any] = json.loads(done.stdout)
        copy_seconds, copy_sync_seconds = _copy(out, folder / "copy")
        shutil.rmtree(folder / "copy")
        shutil.rmtree(out)
        yield ConversionTiming(
            seconds=figures["seconds"],
            start_seconds=total - figures["seconds"],
            peak_bytes=figures["peak_memory_bytes"],
            output_bytes=figures["total_bytes"],
            copy_seconds=copy_seconds,
            copy_sync_seconds=copy_sync_seconds,
        )


def _copy(source: Path, target: Path) -> tuple[float, float]:
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.monotonic() - started
    for path in target.rglob("*"):
        if path.is_file():
            sync_path(path)
    return copied, time.monotonic() - started


def draw_memory(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws peak memory against the size of the output, with the bound that conversions must meet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    output = [row["output_bytes"] / 2**30 for row in rows]
    peak = [row["peak_bytes"] / 2**30 for row in rows]
    bound = [1 + row["largest_tensor_bytes"] / 2**30 for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    axes.plot(output, output, color="#9aa0a6", linestyle=":", label="the whole output")
    axes.plot(output, bound, color="#d95f02", linestyle="--", label="bound: 1 GiB + the largest tensor")
    axes.plot(output, peak, color="#1b6ca8", marker="o", label="peak memory")
    for x, y in zip(output, peak, strict=True):
        axes.annotate(f"{y:.2f}", (x, y), textcoords="offset points", xytext=(0, -14), ha="center")
    axes.set_xlabel("size of the MoE, GiB")
    axes.set_ylabel("memory, GiB")
    axes.set_ylim(0, max(2.0, 1.3 * max(bound)))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
