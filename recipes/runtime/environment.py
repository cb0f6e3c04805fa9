"""Checks of the machine: hardware, packages, disks and network, each with a remedy.

Nothing heavy is imported and nothing is changed.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import platform
import re
import shutil
import socket
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from moe.accounting.device_peaks import table_peak
from recipes.runtime.extras import DISTRIBUTION, install_line, installed_version
from recipes.runtime.machine_memory import free_and_total_bytes
from recipes.runtime.source_root import SOURCE_ROOT

Status = Literal["ok", "warn", "bad"]
GIB = 2**30
LOW_DISK, NO_DISK = 20 * GIB, GIB
LOW_MEMORY = 4 * GIB


@dataclass(frozen=True)
class Finding:
    """Outcome of a check.

    Attributes:
        name: What was looked at, in a word or two.
        status: ``ok``; ``warn``: works, but slower or not all of it; ``bad``: something will fail.
        text: What was found.
        remedy: What to do, as a sentence; empty when nothing is to be done.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""


def inspect_environment(cache_dir: str | Path = "~/.cache/graft") -> list[Finding]:
    """Runs all checks. A check that raises becomes a finding, so that the others are still reported.

    Args:
        cache_dir: Where a run keeps its caches (``cache_dir`` of the config).
    """
    checks: list[Callable[[], list[Finding]]] = [
        check_python,
        check_ranges,
        check_kernels_clash,
        check_cpu,
        check_memory,
        lambda: [check_disk("working folder", Path.cwd()), check_disk("cache", Path(cache_dir).expanduser())],
        check_gpus,
        check_communication,
        check_compiler,
        check_threads,
        check_engines,
        check_wandb,
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # one odd machine must not hide the other findings
            name = getattr(check, "__name__", "check").removeprefix("check_")
            findings.append(Finding(name, "bad", f"could not be checked: {error!r}", "Report this as a bug."))
    return findings


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> list[Finding]:
    """Checks that Python is new enough."""
    text = f"{platform.python_version()} at {sys.executable}, {platform.platform()}"
    if version >= (3, 11):
        return [Finding("python", "ok", text)]
    return [
        Finding("python", "bad", text, "Use Python 3.11 or newer: make PYTHON=/path/to/python3.11 setup.")
    ]


def check_ranges(pyproject: Path = SOURCE_ROOT / "pyproject.toml") -> list[Finding]:
    """Checks that the installed packages are in the ranges that the project is tested with.

    A build tag after the version (``+cu128``) does not count. Packages that are right share one finding;
    those of extras need not be there.
    """
    required = _required(pyproject)
    if required is None:
        text = f"{pyproject} is missing, and {DISTRIBUTION} is not installed"
        return [Finding("packages", "warn", text, "Install it with pip, or run from a checkout.")]
    findings, right = [], []
    for needed in map(Requirement, required):
        name, extra = needed.name, needed.marker is not None
        found = installed_version(name)
        if found is None and extra:
            continue
        if found is not None and needed.specifier.contains(found, prereleases=True):
            right.append(f"{name} {found}")
            continue
        remedy = f'Run `make setup`, or pip install "{name}{needed.specifier}".'
        tested = f"Graft is tested with {needed.specifier}"
        text = f"not installed, {tested}" if found is None else f"{found} is installed, {tested}"
        findings.append(Finding(name, "warn" if found else "bad", text, remedy))
    return [Finding("packages", "ok", f"{len(right)} as tested: {', '.join(right)}"), *findings]


def _required(pyproject: Path) -> list[str] | None:
    """Returns the requirements, those of extras with a marker: a checkout's, else the installed package's."""
    if not pyproject.is_file():
        return None if installed_version(DISTRIBUTION) is None else metadata.requires(DISTRIBUTION) or []
    content = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = content.get("optional-dependencies", {})
    return [
        *content.get("dependencies", ()),
        *(f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines),
    ]


def check_kernels_clash() -> list[Finding]:
    """Checks that ``import kernels`` finds this project's folder, not the PyPI package of that name.

    Transformers takes any import named ``kernels`` for that package when its metadata is installed.
    """
    version = installed_version("kernels")
    if version is not None:
        text = f"the PyPI package kernels {version} is installed and has the name of Graft's own"
        return [Finding("kernels", "bad", text, "Run pip uninstall kernels, and install Graft again.")]
    spec = importlib.util.find_spec("kernels")
    origin = None if spec is None else spec.origin
    if origin is None or SOURCE_ROOT not in Path(origin).resolve().parents:
        text = f"import kernels finds {origin}, not the folder in {SOURCE_ROOT}"
        remedy = f"Run from {SOURCE_ROOT}, or from a folder that holds no kernels."
        return [Finding("kernels", "bad", text, remedy)]
    return [Finding("kernels", "ok", "import kernels is the project's own folder")]


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[Finding]:
    """Reports the cores this process may use, and relevant vector instructions."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch_width = torch.backends.cpu.get_cpu_capability()
    text = f"{usable} usable of {os.cpu_count()} cores, {platform.machine()}, torch runs {torch_width}"
    if not cpuinfo.is_file():
        return [Finding("cpu", "ok", text)]
    content = cpuinfo.read_text(encoding="utf-8", errors="replace")
    flags = set(re.findall(r"\w+", "".join(re.findall(r"(?mi)^(?:flags|features)\s*:(.*)$", content)[:1])))
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "BF16", "amx_bf16": "AMX", "bf16": "BF16"}
    present = [label for flag, label in known.items() if flag in flags]
    text += f", has {', '.join(present) or 'no wide vectors'}"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return [Finding("cpu", "warn", text, "Use a CPU with AVX2; training on this one is very slow.")]
    if not {"avx512_bf16", "amx_bf16", "bf16"} & flags:
        text += "; bf16 is emulated and slower than fp32"
    return [Finding("cpu", "ok", text)]


def check_memory() -> list[Finding]:
    """Checks that enough main memory is free, under the container's limit if there is one."""
    free, total = free_and_total_bytes()
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LOW_MEMORY:
        return [Finding("memory", "warn", text, "Stop other programs, or train a smaller model.")]
    return [Finding("memory", "ok", text)]


def check_disk(name: str, folder: Path) -> Finding:
    """Checks free space where ``folder`` is or would be made, and that it can be written."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    usage = shutil.disk_usage(place)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {folder}"
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(name, "bad", f"{place} cannot be written", f"Make it writable: chmod u+w {place}.")
    if usage.free < LOW_DISK:
        status: Status = "bad" if usage.free < NO_DISK else "warn"
        return Finding(name, status, text, "Free some space: a checkpoint takes 12 bytes a parameter.")
    return Finding(name, "ok", text)


def check_gpus() -> list[Finding]:
    """Reports each GPU with its compute capability and memory, and whether torch can use it."""
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
        if driver is None:
            return [Finding("gpu", "ok", "none: everything runs on the CPU")]
        text = f"{driver} is there, but torch {torch.__version__} sees no GPU"
        build = (
            "is a CPU build"
            if torch.version.cuda is None
            else f"needs a driver for CUDA {torch.version.cuda}"
        )
        return [Finding("gpu", "bad", f"{text}; it {build}", "Install the torch build for your driver.")]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    peak = table_peak(properties.name, "bf16")
    speed = "its peak is measured" if peak is None else f"bf16 peak {peak / 1e12:g} TFLOP/s"
    memory = f"{properties.total_memory / GIB:.0f} GiB"
    text = f"{properties.name}, capability {major}.{minor}, {memory}, {speed}"
    name = f"gpu {index}"
    built = {int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)}
    # Binaries run on later minor versions of their own major version.
    if built and not any(arch // 10 == major and arch % 10 <= minor for arch in built):
        remedy = "Install a torch build for this GPU."
        return Finding(name, "bad", f"{text}; torch is built for {sorted(built)} only", remedy)
    if torch.version.hip is None and major < 8:
        return Finding(name, "warn", f"{text}; it has no bf16", "Train in fp32 on this GPU.")
    return Finding(name, "ok", text)


def check_communication() -> list[Finding]:
    """Checks that ranks can communicate: gloo on CPUs, nccl on GPUs, and a host name that resolves."""
    if not dist.is_available():
        text = "torch is built without torch.distributed"
        return [Finding("communication", "bad", text, "Install a torch from pytorch.org.")]
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in backends.items())
    gpus = torch.cuda.device_count()
    if not backends["gloo"] or (gpus > 1 and not backends["nccl"]):
        return [Finding("communication", "bad", text, "Install a torch from pytorch.org; it has both.")]
    findings = [Finding("communication", "ok", text)]
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        text = f"the host name {socket.gethostname()} does not resolve; gloo may find no interface"
        remedy = "Set GLOO_SOCKET_IFNAME=lo on one machine, or add the name to /etc/hosts."
        findings.append(Finding("host name", "warn", text, remedy))
    return findings


def check_compiler() -> list[Finding]:
    """Checks the needs of ``engine.compile=true``: a C++ compiler, Python's headers, triton on GPUs."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["g++", "clang++", "c++"]
    compiler = next((path for path in map(shutil.which, candidates) if path), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        text = f"none of {', '.join(candidates)} is on the PATH; torch.compile does not work"
        first = Finding(
            "compiler", "warn", text, "Install g++ (apt install g++), or leave engine.compile=false."
        )
    elif not header.is_file():
        text = f"{compiler}, but {header} is missing; torch.compile does not work on the CPU"
        first = Finding("compiler", "warn", text, "Install the headers (apt install python3-dev).")
    else:
        first = Finding("compiler", "ok", f"{compiler} for torch.compile")
    version = installed_version("triton")
    if version is not None:
        return [first, Finding("triton", "ok", version)]
    if torch.cuda.is_available():
        text = "not installed; torch.compile does not work on the GPU"
        return [first, Finding("triton", "warn", text, "Install the torch build for CUDA: it brings triton.")]
    return [first, Finding("triton", "ok", "not installed; only GPUs use it")]


def check_threads(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Checks OMP_NUM_THREADS. It is best unset: the native engine divides the cores among its ranks."""
    value, cores = environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if value is None:
        return [
            Finding("threads", "ok", "OMP_NUM_THREADS is not set; a run shares the cores among its ranks")
        ]
    remedy = f"Unset OMP_NUM_THREADS, or set it to at most {cores} divided by the ranks."
    if not value.isdigit() or int(value) < 1:
        return [Finding("threads", "warn", f"OMP_NUM_THREADS={value!r} is no number of threads", remedy)]
    if int(value) > cores:
        return [Finding("threads", "warn", f"OMP_NUM_THREADS={value}, but there are {cores} cores", remedy)]
    return [Finding("threads", "ok", f"OMP_NUM_THREADS={value}")]


def check_engines() -> list[Finding]:
    """Reports which engines can run."""
    findings = [Finding("engine native", "ok", "part of this project")]
    for engine, package in (("deepspeed", "deepspeed"), ("megatron", "megatron-core")):
        version = installed_version(package)
        if version is None:
            remedy = f"For engine={engine}: {install_line(engine)}."
            findings.append(Finding(f"engine {engine}", "warn", f"{package} is not installed", remedy))
        else:
            findings.append(Finding(f"engine {engine}", "ok", f"{package} {version}"))
    return findings


def check_wandb(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Checks that runs can be sent to Weights & Biases. Keys are never shown."""
    version = installed_version("wandb")
    if version is None:
        return [Finding("wandb", "warn", "not installed", f"For charts: {install_line('wandb')}.")]
    mode = environ.get("WANDB_MODE")
    if mode:
        return [Finding("wandb", "ok", f"{version}, WANDB_MODE={mode}")]
    model = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE") or _in_netrc(model, environ):
        return [Finding("wandb", "ok", f"{version}, logged in to {model}")]
    text = f"{version}, no login for {model}: runs are kept on disk only"
    return [Finding("wandb", "warn", text, "Run wandb login, or leave it and use metrics.jsonl.")]


def _in_netrc(model: str, environ: Mapping[str, str]) -> bool:
    names = [environ["NETRC"]] if environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in names):
        try:
            if path.is_file() and netrc.netrc(path).authenticators(model):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
