"""Compiles the Triton kernels for GPUs that are not here: ``python -m kernels.aot --help``.

It proves that the kernels compile with the blocks of `kernels.triton_blocks`, how many registers and how much
shared memory they take, and that they use the matrix unit. It proves neither that they are right nor fast.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels.triton_blocks import (
    Blocks,
    Target,
    bucket,
    candidates,
    rank_block,
    row_blocks,
    rows_options,
    weight_blocks,
    weight_options,
    with_factor,
)

#: Shared memory that a program may take, in bytes, by compute capability times ten.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: What shows that the matrix unit is used.
_MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What is pointed at, where it is not the experts' own dtype.
_POINTERS = {
    **dict.fromkeys(("token_ptr", "slot_ptr", "row_ptr", "counts_ptr", "ids_ptr", "totals_ptr"), "*i64"),
    **dict.fromkeys(("tiles_ptr", "ends_ptr", "blocks_ptr"), "*i32"),
    "mask_ptr": "*i1",
    **dict.fromkeys(("weights_ptr", "dots_ptr"), "*fp32"),
}
# Sizes that need not be multiples of anything.
_ANY = {"num_tiles", "num_experts", "num_rows", "T", "scale", "num_slots", "num_blocks", "width"}
# Kernels that multiply no matrices.
_PRODUCTLESS = ("combine", "tiles", "histogram", "scan", "place")
# Those that are the rank, or may be.
_OF_RANK = {"N", "Q", "b_k", "b_n", "factor_r", "factor_n", "right_r", "out_p", "out_q"}
# A layer's widths, far above every block.
_WIDTH = 2048
# Kernels with rows -> the strides that are 1 where the weights and factors are stored as they come.
_ROWS = {
    "up": {"x_d": 1, "w_d": 1, "bias_u": 1, "factor_r": 1},
    "down": {"b_k": 1, "bias_n": 1, "factor_r": 1},
    "dx": {"b_n": 1, "bias_n": 1, "factor_n": 1},
    "dh": {"grad_d": 1, "w_f": 1, "bias_d": 1, "factor_n": 1},
}
# Kernels whose blocks are tuned -> kind of blocks.
_KINDS = {"up": "up", "down": "rows", "dh": "dh", "dw_up": "dw"}
# The first product of low-rank factors: with x, with A, and of the gradients of both.
_LOW = {
    "low_up": {"GATHER": True, "a_k": 1, "b_k": 1},
    "low_down": {"GATHER": False, "a_k": 1, "b_k": 1},
    "low_dy": {"GATHER": True, "a_k": 1, "b_n": 1},
    "low_dh": {"GATHER": False, "a_k": 1, "b_n": 1},
}
# Gradients of weights.
_WEIGHTS = {
    "dw_up": {"GATHER_LEFT": False, "GATHER_RIGHT": True, "out_q": 1},
    "dw_down": {"GATHER_LEFT": True, "GATHER_RIGHT": False, "out_q": 1},
}
# Gradients of factors A, written transposed, and of factors B.
_FACTORS = {
    "da_up": {"GATHER_LEFT": True, "GATHER_RIGHT": False, "out_p": 1},
    "db_up": {"GATHER_LEFT": False, "GATHER_RIGHT": False, "out_q": 1},
    "da_down": {"GATHER_LEFT": False, "GATHER_RIGHT": False, "out_p": 1},
    "db_down": {"GATHER_LEFT": True, "GATHER_RIGHT": False, "out_q": 1},
}


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is launched.

    Attributes:
        kernel: ``up``, ``down`` (rows times weight), ``dx`` (the same along other strides), ``dh``,
            ``dw_up``, ``dw_down``, ``combine``, ``tiles``, ``histogram``, ``scan`` or ``place``; of low-rank
            factors: ``low_up``, ``low_down``, ``low_dy``, ``low_dh``, ``da_up``, ``db_up``, ``da_down`` or
            ``db_down``.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        height: Rows of a tile; what has no tiles ignores it.
        gated: Whether the expert is gated.
        bias: Whether it has biases.
        activation: A name inside the kernels.
        ones: Whether every size is 1: Triton makes such arguments constants, which are no tensors.
        rank: Of low-rank factors; 0: there are none.
        accumulates: Whether a weight's gradient is added to an fp32 buffer.
        blocks: Other blocks than the table's.
    """

    kernel: str
    dtype: str = "bf16"
    height: int = 128
    gated: bool = True
    bias: bool = False
    activation: str = "silu"
    ones: bool = False
    rank: int = 0
    accumulates: bool = False
    blocks: Blocks | None = None


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


#: One of each kernel as it runs in pre-training.
REPRESENTATIVE = tuple(
    Variant(kernel) for kernel in ("up", "down", "dx", "dh", "dw_up", "dw_down", *_PRODUCTLESS)
)

#: Each kernel that low-rank factors, fp32 accumulation or dReLU change, as it runs in fine-tuning.
ADDED = (
    *(Variant(kernel, rank=16) for kernel in (*_ROWS, *_LOW, *_FACTORS)),
    Variant("dw_up", accumulates=True),
    Variant("dh", activation="drelu"),
)


def all_variants() -> Iterator[Variant]:
    """Every dtype, tile height, gating, bias, the costliest activations, and low ranks."""
    yield from REPRESENTATIVE
    yield from ADDED
    yield from (Variant(kernel, rank=r) for kernel in (*_ROWS, *_LOW, *_FACTORS) for r in (4, 64, 128))
    for dtype, height in (("bf16", 64), ("bf16", 16), ("fp16", 128), ("fp32", 64)):
        yield from (Variant(kernel, dtype, height, rank=16) for kernel in (*_ROWS, *_LOW))
    for dtype in ("fp16", "fp32"):
        yield from (Variant(kernel, dtype, accumulates=True) for kernel in ("dw_up", "dw_down"))
    yield from (Variant(k, accumulates=True, bias=True) for k in ("dw_up", "dw_down"))
    yield from (Variant(kernel, activation="drelu", rank=16, bias=True) for kernel in ("up", "dh"))
    for dtype, heights in (("bf16", (128, 64, 32, 16)), ("fp16", (128,)), ("fp32", (64, 32, 16))):
        for height in heights:
            yield from (Variant(kernel, dtype, height) for kernel in ("up", "down", "dx", "dh"))
        yield from (Variant(kernel, dtype, bias=True) for kernel in ("dw_up", "dw_down"))
    for kernel in ("up", "dh"):
        yield from (Variant(kernel, activation=name, bias=True) for name in ("gelu", "gelu_tanh"))
        yield from (Variant(kernel, activation=name, gated=False) for name in ("relu", "relu2"))


def _constants(variant: Variant, capability: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel, its constants and its build options."""
    from kernels import triton_backward, triton_forward, triton_low_rank, triton_route, triton_tiles

    target = _target(variant, capability)
    arithmetic = {"PRECISION": "ieee", "RAISE": False}
    if variant.kernel == "tiles":
        blocks = {"BLOCK_M": 128, "BLOCK_E": 128, "BLOCK_G": 64}
        return triton_tiles.tiles_kernel, blocks, {"num_warps": 8}
    if variant.kernel in triton_route.KERNELS:
        return triton_route.KERNELS[variant.kernel], *triton_route.options(variant.kernel, 128, True)
    if variant.kernel == "combine":
        blocks = {"WEIGHTED": True, "RAISE": False, "BLOCK_T": 4, "BLOCK_D": 512}
        return triton_forward.combine_kernel, blocks, {"num_warps": 4}
    if variant.kernel in {**_WEIGHTS, **_FACTORS}:
        options = weight_options(weight_blocks(_WIDTH, variant.rank or _WIDTH, target))
        return _split(triton_backward.dw_kernel, {**_product(variant), **arithmetic}, options)
    if variant.kernel in _LOW:
        options = rows_options(row_blocks("rows", variant.height, variant.rank, _WIDTH, target), _WIDTH)
        return _split(triton_low_rank.low_kernel, {**_LOW[variant.kernel], **arithmetic}, options)
    kind = "rows" if variant.kernel in ("down", "dx") else variant.kernel
    found = row_blocks(kind, variant.height, _WIDTH, _WIDTH, target)
    if kind == "rows":
        found = with_factor(found, 1 if "factor_n" in _ROWS[variant.kernel] else variant.rank)
    own = {**_ROWS[variant.kernel], "BIAS": variant.bias, **_term(variant, found.k), **arithmetic}
    if kind != "rows":
        activation = "relu" if variant.activation == "drelu" else variant.activation
        own |= {"ACT": activation, "GATED": variant.gated, "ON_VALUE": variant.activation == "drelu"}
    if kind == "up":
        own["KEEP_H"] = True
    kernels = {
        "up": triton_forward.up_kernel,
        "rows": triton_forward.rows_kernel,
        "dh": triton_backward.dh_kernel,
    }
    return _split(kernels[kind], own, rows_options(found, _WIDTH))


def candidate_variants(capability: int) -> Iterator[Variant]:
    """Every candidate that `kernels.tune` may choose on a GPU besides the table's blocks."""
    target = Target(capability, torch.bfloat16)
    for kernel, kind in _KINDS.items():
        for height in (0,) if kind == "dw" else (128, 64, 32, 16):
            for blocks in candidates(kind, height, target)[1:]:
                yield Variant(kernel, height=height or 128, blocks=blocks)


def _target(variant: Variant, capability: int) -> Target:
    target = Target(capability, _DTYPES[variant.dtype])
    if variant.blocks is None:
        return target
    kind = _KINDS[variant.kernel]
    place = bucket(kind, 0 if kind == "dw" else variant.height, _WIDTH, _WIDTH)
    return replace(target, tuned={place: variant.blocks})


def _product(variant: Variant) -> dict[str, Any]:
    """The constants of a weight's or factor's gradient; what a launch leaves out is None."""
    scales = variant.bias and variant.kernel == "dw_down"
    flags = {"BIAS": variant.bias, "SCALE_BIAS": scales, "ACCUMULATE": variant.accumulates}
    absent = ([] if scales else ["slot_ptr", "weights_ptr"]) + ([] if variant.bias else ["bias_ptr"])
    sides = {**_WEIGHTS, **_FACTORS}[variant.kernel]
    return {**sides, "left_p": 1, "right_q": 1, **flags, **dict.fromkeys(absent)}


def _term(variant: Variant, block_k: int) -> dict[str, Any]:
    """The constants of what low-rank factors add, as `kernels.triton_launch.term_arguments` has them."""
    if variant.rank:
        return {"RANK": variant.rank, "BLOCK_L": rank_block(variant.rank, block_k)}
    return {"low_ptr": None, "factor_ptr": None, "RANK": 0, "BLOCK_L": 16}


def _split(
    kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    build = {name: value for name, value in options.items() if name.startswith("num_")}
    blocks = {name: value for name, value in options.items() if name not in build}
    return kernel, {**constants, **blocks}, build


def compile_variant(variant: Variant, capability: int) -> Report:
    """Compiles one kernel for one GPU and holds it to the gates.

    Raises:
        RuntimeError: Under TRITON_INTERPRET=1, where kernels cannot be compiled.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, build = _constants(variant, capability)
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
    return Report(**{**vars(report), "failures": tuple(gate_failures(report))})


def _type_of(name: str, constants: Mapping[str, Any], variant: Variant) -> str:
    if name in constants:
        return "constexpr"
    if name == "out_ptr" and variant.accumulates:
        return "*fp32"
    if name.endswith("_ptr"):
        return _POINTERS.get(name, f"*{variant.dtype}")
    return "fp32" if name == "scale" else "i32"


def gate_failures(report: Report) -> Iterator[str]:
    """Which gates a report fails, as clauses."""
    if report.stack:
        yield f"{report.stack} bytes of registers spilled"
    limit = SHARED_LIMITS[report.capability]
    if report.shared > limit:
        yield f"{report.shared} bytes of shared memory, above {limit}"
    # True fp32 has no matrix unit, and tiles of 16 rows are below what Hopper's takes.
    variant = report.variant
    few = variant.height < 64 and report.capability in (90, 100)
    is_exempt = variant.kernel in _PRODUCTLESS or variant.dtype == "fp32" or few
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
