"""Base class of third-party back ends: required libraries, supported workloads, and the call.

Libraries are imported when they run, by the names in `Requirement`; none is a dependency of the project.

Letters: T tokens, D model width, E experts, K slots a token, R routed rows, F expert width, U = 2F when
gated, else F.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.backend import ExpertTensors, Workload
from kernels.plan.row_plan import RowPlan
from kernels.torch.expert_loop import LoopBackend


class ThirdPartyLimitError(RuntimeError):
    """A batch has more rows than a library can address, which is known only once it is routed."""


@dataclass(frozen=True)
class Requirement:
    """A library and the range of versions whose source an adapter was written from.

    Attributes:
        module: Import name.
        distribution: Name of the package.
        at_least: First supported version.
        below: First version that is not supported.
        install: How to install it.
    """

    module: str
    distribution: str
    at_least: tuple[int, ...]
    below: tuple[int, ...]
    install: str

    @property
    def versions(self) -> str:
        """The range of versions, for messages."""
        return f">={_dotted(self.at_least)},<{_dotted(self.below)}"

    def unsupported_reason(self) -> str | None:
        """Returns why the library cannot be used, as a clause: it is missing, or of another version."""
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.distribution} is not installed ({self.install})"
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return (
                f"{self.module} can be imported, but no package {self.distribution} is installed that would "
                f"tell its version ({self.install})"
            )
        release = re.match(r"\d+(\.\d+)*", version)
        numbers = tuple(int(part) for part in release.group().split(".")) if release else ()
        if not self.at_least <= numbers < self.below:
            return f"{self.distribution} {version} is installed, and the adapter is for {self.versions}"
        return None

    def load(self, submodule: str = "") -> Any:
        """Imports the library, or a module inside it."""
        return importlib.import_module(f"{self.module}.{submodule}" if submodule else self.module)


class ThirdPartyBackend(ABC):
    """Back end that another library computes.

    Attributes:
        name: The value of ``experts.backend`` that forces it.
        requirements: Libraries that must be installed.
        dtypes: Dtypes of its products.
        activations: Our name -> its name, for gated experts; None: all, as torch computes the activation.
        least_capability: Least compute capability of the GPU.
        capabilities: Major compute capabilities that it has kernels for; empty: all from the least.
        multiple: Both widths must be multiples of it.
        ungated: Whether it runs experts without a gate.
        biased: Whether it takes biases.
        rounds_fp32: Whether its fp32 products are TF32.
        interpretable: Whether its kernels are Triton, so that the interpreter runs them on CPU tensors.
    """

    name: ClassVar[str]
    requirements: ClassVar[tuple[Requirement, ...]]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)
    activations: ClassVar[Mapping[str, str] | None] = None
    least_capability: ClassVar[tuple[int, int]] = (8, 0)
    capabilities: ClassVar[tuple[int, ...]] = ()
    multiple: ClassVar[int] = 1
    ungated: ClassVar[bool] = True
    biased: ClassVar[bool] = False
    rounds_fp32: ClassVar[bool] = False
    interpretable: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Returns why its libraries cannot be used, as a clause; None when they can."""
        found = (requirement.unsupported_reason() for requirement in self.requirements)
        return next((why for why in found if why is not None), None)

    def unsupported_reason(self, work: Workload) -> str | None:
        """See `kernels.backend.Backend.unsupported_reason`; a missing library is reported first."""
        if (why := self.missing()) is not None:
            return why
        for reason in (
            self._kind_unsupported_reason,
            self._width_unsupported_reason,
            self._device_unsupported_reason,
        ):
            if (why := reason(work)) is not None:
                return why
        return None

    def run(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """See `kernels.backend.Backend.run`.

        Raises:
            ThirdPartyLimitError: There are more rows than the library can address.
        """
        if plan.num_rows == 0:
            # Some libraries cannot launch an empty grid; the loop returns zeros that have gradients.
            return LoopBackend().run(x_TD, weights_TK, plan, experts)
        return self._compute(x_TD, weights_TK, plan, experts)

    @abstractmethod
    def _compute(self, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, experts: ExpertTensors) -> Tensor:
        """Computes the same for at least one row."""

    def _kind_unsupported_reason(self, work: Workload) -> str | None:
        if work.dtype not in self.dtypes:
            return f"it runs {', '.join(_short(dtype) for dtype in self.dtypes)}, not {work.dtype}"
        if work.low_rank:
            return "it has no low-rank factors"
        if work.accumulates:
            return "it returns gradients and adds them to no buffer"
        if work.has_bias and not self.biased:
            return "it takes no bias"
        if not work.gated and not self.ungated:
            return "it runs gated experts only"
        if self.activations is not None and work.activation not in self.activations:
            return f"it has no activation {work.activation!r}; it has {', '.join(self.activations)}"
        return None

    def _width_unsupported_reason(self, work: Workload) -> str | None:
        for name, width in (("model width", work.model_width), ("expert width", work.expert_width)):
            if width % self.multiple:
                return f"the {name} {width} is not a multiple of {self.multiple}"
        return None

    def _device_unsupported_reason(self, work: Workload) -> str | None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if work.device.type == "cpu" and self.interpretable:
            return None if interpreted else "it runs on GPUs; on a CPU only with TRITON_INTERPRET=1"
        if work.device.type != "cuda":
            return f"it runs on GPUs, and the weights are on {work.device.type}"
        if interpreted and self.interpretable:
            return "TRITON_INTERPRET=1 runs kernels on CPU tensors, and the weights are on cuda"
        if torch.version.hip is not None:
            return "its adapter was written for NVIDIA GPUs"
        if self.rounds_fp32 and work.dtype == torch.float32 and _wants_true_fp32():
            return (
                "its fp32 products are TF32, and torch.get_float32_matmul_precision() asks for true fp32 "
                "(torch.set_float32_matmul_precision('high') allows TF32)"
            )
        return self._capability_unsupported_reason(torch.cuda.get_device_capability(work.device))

    def _capability_unsupported_reason(self, capability: tuple[int, int]) -> str | None:
        here = _dotted(capability)
        if capability < self.least_capability:
            return f"it needs compute capability {_dotted(self.least_capability)}, and this GPU has {here}"
        if self.capabilities and capability[0] not in self.capabilities:
            has = " and ".join(f"{major}.x" for major in self.capabilities)
            return f"it has kernels for compute capability {has}, and this GPU has {here}"
        return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wants_true_fp32() -> bool:
    return torch.get_float32_matmul_precision() == "highest"
