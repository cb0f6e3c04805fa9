"""The doctor's findings: what is wrong is told with a remedy, what is right is told as well."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from recipes.runtime import environment
from recipes.runtime import machine_memory as memory
from recipes.runtime.environment import (
    Finding,
    check_communication,
    check_compiler,
    check_cpu,
    check_disk,
    check_engines,
    check_gpus,
    check_kernels_clash,
    check_memory,
    check_python,
    check_ranges,
    check_threads,
    check_wandb,
    inspect_environment,
)
from tools import doctor

VERSIONS = {"torch": "2.13.0+cu128", "wandb": "0.1", "pydantic": "2.14.1"}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Installed packages, to be edited."""
    found = dict(VERSIONS)
    monkeypatch.setattr(environment, "installed_version", found.get)
    return found


def test_ranges(tmp_path: Path, versions: dict[str, str | None]) -> None:
    path = tmp_path / "pyproject.toml"
    path.write_text(
        '[project]\ndependencies = ["torch>=2.10.0,<=2.13.0", "pydantic>=2.10,<=2.14", "numpy>=2.1"]\n'
        '[project.optional-dependencies]\nzero = ["deepspeed>=0.18.9,<=0.19.8"]\ncharts = ["wandb>=0.24"]\n'
    )
    right, *wrong = check_ranges(path)
    assert right == Finding("packages", "ok", "1 as tested: torch 2.13.0+cu128")
    assert [(finding.name, finding.status) for finding in wrong] == [
        ("pydantic", "warn"),  # newer than what is tested
        ("numpy", "bad"),  # not there, and everything needs it
        ("wandb", "warn"),  # older; deepspeed is not there, and an extra
    ]
    assert wrong[0].text == "2.14.1 is installed, Graft is tested with <=2.14,>=2.10"
    assert 'pip install "pydantic<=2.14,>=2.10"' in wrong[0].remedy


@pytest.mark.usefixtures("versions")
def test_ranges_where_graft_is_not_installed(tmp_path: Path) -> None:
    (finding,) = check_ranges(tmp_path / "pyproject.toml")
    assert finding.status == "warn"


def test_the_ranges_of_an_installed_package(
    tmp_path: Path, versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions["graft-moe"] = "0.1.0"
    ranges = ["torch<=2.13.0,>=2.10.0", "wandb>=0.24; extra == 'wandb'", "ruff==0.17.5; extra == 'dev'"]
    monkeypatch.setattr(environment.metadata, "requires", lambda name: ranges)
    right, wrong = check_ranges(tmp_path / "pyproject.toml")
    assert right.text.startswith("1 as tested") and wrong.name == "wandb"


def test_the_pypi_package_kernels_must_not_be_installed(versions: dict[str, str | None]) -> None:
    assert check_kernels_clash()[0].status == "ok"
    versions["kernels"] = "0.5.0"
    (finding,) = check_kernels_clash()
    assert finding.status == "bad" and "pip uninstall kernels" in finding.remedy


def test_kernels_must_be_our_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "SOURCE_ROOT", tmp_path)
    (finding,) = check_kernels_clash()
    assert finding.status == "bad" and str(tmp_path) in finding.remedy


def test_transformers_does_not_take_our_folder_for_that_package() -> None:
    from transformers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()


def test_python() -> None:
    assert check_python()[0].status == "ok"
    assert check_python((3, 10))[0].status == "bad"


@pytest.mark.parametrize(
    ("flags", "machine", "status", "words"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 amx_bf16", "x86_64", "ok", "AVX2, AVX-512, BF16, AMX"),
        ("flags : fpu avx2", "x86_64", "ok", "bf16 is emulated"),
        ("flags : fpu sse2", "x86_64", "warn", "no wide vectors"),
        ("Features : asimd bf16", "aarch64", "ok", "has BF16"),
    ],
)
def test_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, machine: str, status: str, words: str
) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\n{flags}\n\nprocessor : 1\n{flags}\n")
    (finding,) = check_cpu(path)
    assert finding.status == status and words in finding.text
    assert check_cpu(tmp_path / "none")[0].status == "ok"


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    monkeypatch.setattr(memory, "memory_limits", lambda: [(2 * total, 0), (total // 2, total // 2 - 2**30)])
    (finding,) = check_memory()
    assert finding.status == "warn" and f"of {total / 2 / 2**30:.1f} GiB" in finding.text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "not" / "yet"
    for free, status in ((100, "ok"), (5, "warn"), (0.5, "bad")):
        usage = type("Usage", (), {"free": free * 2**30, "total": 200 * 2**30})
        monkeypatch.setattr(environment.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert check_disk("cache", missing).status == status
    monkeypatch.setattr(environment.os, "access", lambda path, mode: False)
    assert check_disk("cache", missing).text == f"{tmp_path} cannot be written"


def fake_gpu(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int, arches: list[str]) -> None:
    fields = {"name": name, "major": major, "minor": minor, "total_memory": 80 * 2**30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("Properties", (), fields))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arches)


@pytest.mark.parametrize(
    ("name", "capability", "arches", "status", "words"),
    [
        ("NVIDIA H200", (9, 0), ["sm_80", "sm_90"], "ok", "capability 9.0, 80 GiB, bf16 peak 989 TFLOP/s"),
        ("NVIDIA Odd", (8, 9), ["sm_80"], "ok", "its peak is measured"),
        ("NVIDIA B200", (10, 0), ["sm_80", "sm_90"], "bad", "built for [80, 90] only"),
        ("Tesla V100", (7, 0), ["sm_70"], "warn", "no bf16"),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    arches: list[str],
    status: str,
    words: str,
) -> None:
    fake_gpu(monkeypatch, name, *capability, arches)
    (finding,) = check_gpus()
    assert finding.status == status and words in finding.text


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert check_gpus()[0].status == "ok"
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = check_gpus()
    assert finding.status == "bad" and "CPU build" in finding.text


def test_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_communication()[0].status == "ok"

    def fail(name: str) -> str:
        raise OSError(name)

    monkeypatch.setattr(environment.socket, "gethostbyname", fail)
    assert [f.status for f in check_communication()] == ["ok", "warn"]
    monkeypatch.setattr(environment.dist, "is_gloo_available", lambda: False)
    assert check_communication()[0].status == "bad"


def test_compiler(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert [f.status for f in check_compiler()] == ["warn", "warn"]
    versions["triton"] = "3.5"
    assert check_compiler()[1] == Finding("triton", "ok", "3.5")


@pytest.mark.parametrize(
    ("value", "status"), [(None, "ok"), ("1", "ok"), ("100000", "warn"), ("0", "warn"), ("many", "warn")]
)
def test_threads(value: str | None, status: str) -> None:
    assert check_threads({} if value is None else {"OMP_NUM_THREADS": value})[0].status == status


def test_engines(versions: dict[str, str | None]) -> None:
    versions["megatron-core"] = "0.16.1"
    assert [f.status for f in check_engines()] == ["ok", "warn", "ok"]


def test_wandb(tmp_path: Path, versions: dict[str, str | None]) -> None:
    login = tmp_path / "netrc"
    nobody = {"NETRC": str(login)}
    assert check_wandb(nobody)[0].status == "warn"
    assert check_wandb({**nobody, "WANDB_MODE": "offline"})[0].status == "ok"
    (finding,) = check_wandb({**nobody, "WANDB_API_KEY": "secret-key"})
    assert finding.status == "ok" and "secret-key" not in finding.text
    login.write_text("machine api.wandb.ai login user password secret-key\n")
    (finding,) = check_wandb(nobody)
    assert finding.status == "ok" and "secret-key" not in finding.text
    assert check_wandb({**nobody, "WANDB_BASE_URL": "https://our.host"})[0].status == "warn"
    login.write_text("machine\n")
    assert check_wandb(nobody)[0].status == "warn"
    versions["wandb"] = None
    assert check_wandb(nobody)[0].status == "warn"


def test_what_is_not_ok_has_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    findings = inspect_environment(tmp_path)
    assert {"python", "packages", "kernels", "cpu", "memory", "cache", "engine native"} <= {
        finding.name for finding in findings
    }
    for finding in findings:
        assert bool(finding.remedy) == (finding.status != "ok"), finding


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "check_memory", lambda: 1 / 0)
    assert any("ZeroDivisionError" in finding.text for finding in inspect_environment(tmp_path))


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("bad", 1)])
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: int
) -> None:
    finding = Finding("disk", status, "as found", "" if status == "ok" else "Do this.")  # type: ignore[arg-type]
    monkeypatch.setattr(environment, "inspect_environment", lambda cache_dir: [finding])
    assert doctor.main(["--json", "-"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["findings"][0]["status"] == status
    assert "disk: as found" in err
    assert ("-> Do this." in err) == (status != "ok")
