"""Everything that workers, ranks, jobs and commands import: once, in the process they are forked from."""

import importlib
import os
import pkgutil
import sys
import warnings

from recipes.config.compose import compose_config
from tests import thrift, yaml_cache
from tests.recipes.jobs.composed_once import composed_once

# It looks for a device when it is imported, and says that it has found none.
os.environ["DS_ACCELERATOR"] = "cpu"

_LIBRARIES = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "torch.profiler",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron.core.distributed",
    "megatron.core.fusions.fused_bias_dropout",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.transformer.attention",
)
_OURS = ("kernels", "moe", "recipes")
# What changes a library when it is imported, and is imported by those who want that.
_REGISTER = ("recipes.models.auto",)
# What the ranks of most tests run.
_CASES = (
    "tests.distributed_helper",
    "tests.forked_python",
    "tests.recipes.engines.deepspeed_cases",
    "tests.recipes.engines.expert_parallel_cases",
    "tests.recipes.engines.megatron_cases",
    "tests.recipes.jobs.job_runs",
)


def preload() -> None:
    """Imports the libraries, and all modules of ours but those whose library is not installed."""
    # DeepSpeed imports it. It makes a folder, which the first process that ends would delete for all others.
    sys.modules["wandb"] = None  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LIBRARIES:
            importlib.import_module(name)
        for package in _OURS:
            found = importlib.import_module(package)
            for module in pkgutil.walk_packages(found.__path__, f"{package}."):
                if not module.name.endswith("__main__") and module.name not in _REGISTER:
                    _import_ours(module.name)
        for name in _CASES:
            importlib.import_module(name)
    del sys.modules["wandb"]
    yaml_cache.install()
    thrift.install()
    # Composed once for all jobs that are forked: most differ in values alone.
    with composed_once():
        for choices in ([], ["engine=deepspeed"], ["engine=megatron"]):
            compose_config(["+recipe=upcycle", *choices])


def _import_ours(name: str) -> None:
    """Imports a module of ours whose library is installed: torch for CPUs alone brings no triton."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _OURS:
            raise
