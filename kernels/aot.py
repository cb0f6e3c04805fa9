"""Compiles the Triton kernels for GPUs without having one: ``python -m kernels.aot --help``.

It proves that the kernels compile with the blocks of `kernels.triton.triton_blocks`, how many registers and
how much shared memory they take, and that they use the matrix unit; neither correctness nor speed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.text_file import write_text
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
#: Instruction of the matrix unit.
_MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
# Element types of pointers, where they are not the experts' own dtype.
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
    """Outcome of one compilation.

    Attributes:
        variant: The launch that was compiled.
        capability: ``major * 10 + minor`` of the GPU.
        registers: Registers of a thread.
        stack: Bytes that a thread spills from registers.
        shared: Bytes of shared memory of a program.
        instruction: The matrix instruction found, or an empty string.
        failures: The limits that it exceeds; empty when all is well.
    """

    variant: Variant
    capability: int
    registers: int
    stack: int
    shared: int
    instruction: str
    failures: tuple[str, ...]


def compile_variant(variant: Variant, capability: int) -> Report:
    """Compiles one kernel for one GPU and checks the limits.

    Raises:
        RuntimeError: Under TRITON_INTERPRET=1, where kernels cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, build = launch_constants(variant, capability)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 is set: the interpreter's kernels cannot be compiled")
    loose = _ANY | (_OF_RANK if variant.rank % 16 else set())
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def describe(path: tuple[int, ...], name: str, value: object) -> str:
        """Notes the value or the alignment of one argument, and returns its type."""
        if value == name and variant.ones and not name.endswith("_ptr"):
            value = 1
        if value != name:
            values[path] = value
            return "constexpr"
        if name not in loose:
            attributes[path] = [["tt.divisibility", 16]]
        return _type_of(name, variant)

    for i, name in enumerate(kernel.arg_names):
        value = constants.get(name, name)
        if isinstance(value, tuple):
            signature[name] = tuple(
                describe((i, j), one if isinstance(one, str) else "", one) for j, one in enumerate(value)
            )
        else:
            signature[name] = describe((i,), name, value)
    source = ASTSource(kernel, signature, values, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=build)
    registers, stack = _resources(built.asm["cubin"])
    instruction = _MATRIX[capability] if _MATRIX[capability] in built.asm["ptx"] else ""
    report = Report(variant, capability, registers, stack, built.metadata.shared, instruction, ())
    return Report(**{**vars(report), "failures": tuple(limit_failures(report))})


def _type_of(name: str, variant: Variant) -> str:
    if name == "out_ptr" and variant.accumulates:
        return "*fp32"
    if name.endswith("_ptr"):
        return _POINTERS.get(name, f"*{variant.dtype}")
    return "fp32" if name == "scale" else "i32"


def limit_failures(report: Report) -> Iterator[str]:
    """Yields the limits that a report exceeds, as clauses."""
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
    """Returns registers and stack of a thread, read by the toolkit in Triton's wheel."""
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
    """Yields the report of every variant on every GPU."""
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
    parser.add_argument("--candidates", action="store_true", help="the choices of kernels.tune instead")
    parser.add_argument("--json", metavar="PATH", default=None, help="write the reports; - for stdout")
    return parser.parse_args()


def main() -> int:
    """Compiles, prints a table, and returns 1 when a limit is exceeded."""
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


if __name__ == "__main__":
    sys.exit(main())
