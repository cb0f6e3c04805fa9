"""Compiles the Triton kernels for GPUs that are not here: ``python -m kernels.aot --help``.

It proves that the kernels compile with the blocks of `kernels.triton.triton_blocks`, how many registers and
how much shared memory they take, and that they use the matrix unit. It proves neither that they are right nor
fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.triton.aot_variants import (
    ADDED,
    PRODUCTLESS,
    REPRESENTATIVE,
    Variant,
    all_variants,
    candidate_variants,
    launch_constants,
)

#: Shared memory that a program may take, in bytes, by compute capability times ten.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: What shows that the matrix unit is used.
_MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# What is pointed at, where it is not the experts' own dtype.
_POINTERS = {
    **dict.fromkeys(("token_ptr", "slot_ptr", "row_ptr", "counts_ptr", "ids_ptr", "totals_ptr"), "*i64"),
    **dict.fromkeys(("tiles_ptr", "ends_ptr", "blocks_ptr"), "*i32"),
    "mask_ptr": "*i1",
    **dict.fromkeys(("weights_ptr", "dots_ptr"), "*fp32"),
}
# Sizes that need not be multiples of anything.
_ANY = {"num_tiles", "num_experts", "num_rows", "T", "scale", "num_slots", "num_blocks", "width"}
# Those that are the rank, or may be.
_OF_RANK = {"N", "Q", "b_k", "b_n", "factor_r", "factor_n", "right_r", "out_p", "out_q"}


@dataclass(frozen=True)
class Report:
    """What came out.

    Attributes:
        variant: What was compiled.
        capability: For which GPU, ``major * 10 + minor``.
        registers: Of a thread.
        stack: Bytes of a thread that do not fit into registers.
        shared: Bytes of a program.
        instruction: The matrix instruction found, or an empty string.
        failures: The gates that it fails; empty when all is well.
    """

    variant: Variant
    capability: int
    registers: int
    stack: int
    shared: int
    instruction: str
    failures: tuple[str, ...]


def compile_variant(variant: Variant, capability: int) -> Report:
    """Compiles one kernel for one GPU and holds it to the gates.

    Raises:
        RuntimeError: Under TRITON_INTERPRET=1, where kernels cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, build = launch_constants(variant, capability)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter's kernels cannot be compiled")
    names = kernel.arg_names
    if variant.ones:
        sizes = [name for name in names if name not in constants and not name.endswith("_ptr")]
        constants |= dict.fromkeys(sizes, 1)
    signature = {name: _type_of(name, constants, variant) for name in names}
    loose = _ANY | (_OF_RANK if variant.rank % 16 else set())
    aligned = [n for n in names if n not in constants and n not in loose]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build)
    registers, stack = _resources(built.asm["cubin"])
    instruction = _MATRIX[capability] if _MATRIX[capability] in built.asm["ptx"] else ""
    report = Report(variant, capability, registers, stack, built.metadata.shared, instruction, ())
    return Report(**{**vars(report), "failures": tuple(limit_failures(report))})


def _type_of(name: str, constants: Mapping[str, Any], variant: Variant) -> str:
    if name in constants:
        return "constexpr"
    if name == "out_ptr" and variant.accumulates:
        return "*fp32"
    if name.endswith("_ptr"):
        return _POINTERS.get(name, f"*{variant.dtype}")
    return "fp32" if name == "scale" else "i32"


def limit_failures(report: Report) -> Iterator[str]:
    """Which gates a report fails, as clauses."""
    if report.stack:
        yield f"{report.stack} bytes of registers spilled"
    limit = SHARED_LIMITS[report.capability]
    if report.shared > limit:
        yield f"{report.shared} bytes of shared memory, above {limit}"
    # True fp32 has no matrix unit, and tiles of 16 rows are below what Hopper's takes.
    variant = report.variant
    few = variant.height < 64 and report.capability in (90, 100)
    is_exempt = variant.kernel in PRODUCTLESS or variant.dtype == "fp32" or few
    if not report.instruction and not is_exempt:
        yield f"no {_MATRIX[report.capability]} in the code"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of a thread, as the toolkit in Triton's wheel reads them."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump printed {text!r}"
    return int(found[1]), int(found[2])


def compile_all(variants: Iterable[Variant], capabilities: Iterable[int]) -> Iterator[Report]:
    """One report after the other."""
    targets = list(capabilities)
    for variant in dict.fromkeys(variants):
        for capability in targets:
            yield compile_variant(variant, capability)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot",
        description="Compiles the Triton kernels ahead of time, without a GPU, and checks that no register "
        "is spilled, shared memory is within the limit, and the matrix unit is used.",
    )
    parser.add_argument(
        "--capability",
        type=int,
        nargs="+",
        default=list(SHARED_LIMITS),
        choices=list(SHARED_LIMITS),
        help="compute capability times ten (default: all four)",
    )
    parser.add_argument("--kernel", nargs="+", default=None, help="only these kernels (default: all)")
    parser.add_argument("--all", action="store_true", help="every dtype, tile height, activation and bias")
    parser.add_argument("--candidates", action="store_true", help="what kernels.tune chooses from, instead")
    parser.add_argument("--json", metavar="PATH", default=None, help="write the reports; - for stdout")
    return parser.parse_args()


def main() -> int:
    """Compiles, prints a table, and returns 1 when a gate fails."""
    arguments = _parse()
    variants = dict.fromkeys(all_variants() if arguments.all else (*REPRESENTATIVE, *ADDED))
    print(f"{'kernel':10}{'dtype':6}{'rows':>5}  {'function':22}{'sm':>4}{'regs':>6}{'stack':>7}{'KiB':>7}  ")
    reports = []
    pairs = [(variant, capability) for variant in variants for capability in arguments.capability]
    if arguments.candidates:
        pairs = [(one, target) for target in arguments.capability for one in candidate_variants(target)]
    if arguments.kernel is not None:
        pairs = [pair for pair in pairs if pair[0].kernel in arguments.kernel]
    for report in (compile_variant(*pair) for pair in pairs):
        v = report.variant
        function = f"{v.activation}{' gated' if v.gated else ''}{' biased' if v.bias else ''}"
        function += f"{f' r{v.rank}' if v.rank else ''}{' +=' if v.accumulates else ''}"
        if v.blocks is not None:
            function = f"{v.blocks.m}x{v.blocks.n}x{v.blocks.k} w{v.blocks.warps} s{v.blocks.stages}"
        verdict = "; ".join(report.failures) or report.instruction
        print(
            f"{v.kernel:10}{v.dtype:6}{v.height:5}  {function:22}{report.capability:4}{report.registers:6}"
            f"{report.stack:7}{report.shared / 1024:7.1f}  {verdict}",
            flush=True,
        )
        reports.append(report)
    text = json.dumps([asdict(report) for report in reports], indent=1)
    if arguments.json == "-":
        print(text)
    elif arguments.json is not None:
        write_text(Path(arguments.json), text)
    return 1 if any(report.failures for report in reports) else 0


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name, flushes to disk, renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
