"""What tests of several ranks import: done once, in the process that ranks are forked from."""

import os
import warnings

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import recipes.engines.native.native_engine
import recipes.training.training_loop

# It looks for a device when it is imported, and says that it has found none.
os.environ["DS_ACCELERATOR"] = "cpu"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer

__all__ = ["AutoModelForCausalLM", "deepspeed", "megatron", "modeling_llama", "recipes", "torch"]
