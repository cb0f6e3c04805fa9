"""What libraries keep of a CPU's memory beside the tensors, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

from recipes.runtime.cpu_memory import _CACHES, give_back_memory
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
    # Engines of other tests have set them in this process.
    environment = {name: value for name, value in os.environ.items() if name not in _CACHES}
    line, limit = [sys.executable, "-c", code], patience(120)
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_what_was_freed_among_what_is_held_goes_back_to_the_system() -> None:
    kept, gone, again = printed(_FRAGMENTED)
    assert 300 < kept < 600 and gone > 200
    assert again >= 0
    assert give_back_memory() >= 0


def test_kernels_of_shapes_that_do_not_come_back_are_not_kept() -> None:
    (low,), (plain,) = printed(_PRODUCTS.format(low=True)), printed(_PRODUCTS.format(low=False))
    assert low < 0.75 * plain, (low, plain)
