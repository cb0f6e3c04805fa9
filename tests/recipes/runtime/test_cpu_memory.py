"""What libraries keep of a CPU's memory beside the tensors, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

from recipes.runtime.cpu_memory import give_back_memory
from tests.paths import ROOT
from tests.patience import patience

# Arrays below glibc's threshold for mappings of their own, every other one freed, so that the rest stays.
_FRAGMENTED = """
import ctypes
import psutil
from recipes.runtime.cpu_memory import give_back_memory, keep_memory_low
keep_memory_low()
held = [ctypes.create_string_buffer(100_000) for _ in range(8000)]
for block in held:
    ctypes.memset(block, 1, 100_000)
del block
held = held[::2]
before = psutil.Process().memory_info().rss
kept = give_back_memory()
print(kept >> 20, (before - psutil.Process().memory_info().rss) >> 20)
print(give_back_memory() >> 20)
"""
_PRODUCTS = """
import psutil, torch
from recipes.runtime.cpu_memory import keep_memory_low
if {low}:
    keep_memory_low()
torch.set_num_threads(1)
weight, before = torch.ones(256, 128, dtype=torch.bfloat16), psutil.Process().memory_info().rss
for rows in range(20, 320):
    torch.ones(rows, 128, dtype=torch.bfloat16) @ weight.T
print((psutil.Process().memory_info().rss - before) >> 20)
"""


def printed(code: str) -> list[int]:
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=patience(120), check=True)
    return [int(word) for word in done.stdout.split()]


def test_what_was_freed_among_what_is_held_goes_back_to_the_system() -> None:
    kept, gone, again = printed(_FRAGMENTED)
    assert 300 < kept < 600 and gone > 200
    assert again >= 0
    assert give_back_memory() >= 0


def test_kernels_of_shapes_that_do_not_come_back_are_not_kept() -> None:
    (low,), (plain,) = printed(_PRODUCTS.format(low=True)), printed(_PRODUCTS.format(low=False))
    assert low < max(60, plain // 2), (low, plain)
