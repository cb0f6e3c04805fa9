"""Names of a checkpoint's feed-forward networks, found from its config alone.

The model is built without memory, its networks are found as in a loaded model, and one of them is tested at a
small width, so that a family whose network computes something else is rejected before anything is written.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.errors import ModelError
from moe.upcycle.dense_shape import FFNShape, Matrix
from recipes.models.hf.config_file import library_reads, load_config, trusts
from recipes.models.hf.ffn_blocks import FFNSite, find_ffns, is_conv1d, linear_names
from recipes.models.hf.tied_weights import unlike_pairs
from recipes.runtime.machine_memory import require_address_space

# Addresses that transformers' models map when they are imported (torch 2.13, scipy 1.17: 386 MiB). An
# OpenBLAS among them asks for memory again and again, without end, where a limit gives it none.
_IMPORT_BYTES = 448 << 20
# Width of the network that is tested.
_TRIAL_WIDTH = 64
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class MatrixName:
    """Place of a matrix of a network.

    Attributes:
        tensor: Name of the tensor in the model's state dict.
        part: Its run of rows, as (index, number of equal runs in the tensor).
        transposed: Stored as ``[in, out]`` (GPT-2's Conv1D).
    """

    tensor: str
    part: tuple[int, int] = (0, 1)
    transposed: bool = False


@dataclass(frozen=True)
class FFNNames:
    """Names of one feed-forward network.

    Attributes:
        layer: Index of the block.
        site: Module path.
        shape: Shape of the network.
        matrices: Place of each matrix.
        biases: Place of each bias.
    """

    layer: int
    site: str
    shape: FFNShape
    matrices: Mapping[Matrix, MatrixName]
    biases: Mapping[Matrix, MatrixName]


@dataclass(frozen=True)
class ModelNames:
    """Names and shapes of a model's tensors, known from its config.

    Attributes:
        config: transformers' config.
        architecture: Name of its class.
        ffns: Its feed-forward networks, in order.
        state: Name -> shape of all tensors in its state dict, tied ones once.
        tied: Second name -> first name of tied tensors.
        in_state: Maps a name in checkpoint files to that in the state dict; transformers has renamed some,
            and some files omit the prefix of the base model.
        ignored: Regular expressions of names that transformers does not read.
        whole: Names of the tensors of whole numbers.
    """

    config: Any
    architecture: str
    ffns: tuple[FFNNames, ...]
    state: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]
    in_state: Callable[[str], str]
    ignored: tuple[str, ...]
    whole: frozenset[str] = frozenset()

    def is_float(self, name: str) -> bool:
        """Tells whether the model computes with a tensor, rather than counts by it."""
        return name not in self.whole


def read_names(folder: Path, *, config: Any = None, trust_remote_code: bool = False) -> ModelNames:
    """Finds the names in the model whose ``config.json`` is in a folder.

    Args:
        folder: The checkpoint.
        config: transformers' config of another model that the folder's tensors are to be; None for its own.
        trust_remote_code: Whether the model may run its own code.

    Raises:
        ModelError: transformers does not know the model, or its networks are not recognised.
    """
    config = config or load_config(folder, trust_remote_code=trust_remote_code)
    model, doubled = model_as_stored(folder, config, trust_remote_code)
    _try_out(folder, config, trusts(folder, trust_remote_code))
    sites = find_ffns(model, config, verify=False)
    state = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in doubled}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return ModelNames(
        config=config,
        architecture=type(model).__name__,
        ffns=tuple(_names(model, site) for site in sites),
        state=state,
        tied=doubled,
        in_state=renaming(model),
        ignored=tuple(ignored),
        whole=frozenset(n for n, t in model.state_dict().items() if not t.is_floating_point()),
    )


def model_as_stored(folder: Path, config: Any, trust_remote_code: bool) -> tuple[Any, dict[str, str]]:
    """Builds a model without memory that ties what its files hold alike.

    Args:
        folder: The checkpoint.
        config: transformers' config; unties its embeddings where the files do.
        trust_remote_code: Whether the model may run its own code.

    Returns:
        The model, and the second names of its tied parameters, each with the first.

    Raises:
        ModelError: transformers does not know the model, or ties what the files hold unlike.
    """
    trust = trusts(folder, trust_remote_code)
    model = _build(folder, config, trust)
    doubled = _doubled(model)
    if differing := unlike_pairs(folder, doubled, renaming(model)):
        # As transformers does: where the files hold two tensors that differ, the config is wrong.
        config.tie_word_embeddings = False
        model = _build(folder, config, trust)
        doubled = _doubled(model)
        if still := sorted(set(differing) & set(doubled)):
            rule = f"its model ties {still[0]} to {doubled[still[0]]}, and its files hold both, unlike"
            remedy = "Delete one of the two from its files, or give the config.json of these weights."
            raise ModelError.one("dense", str(folder), rule, remedy)
    return model, doubled


def _build(folder: Path, config: Any, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    if "transformers.modeling_utils" not in sys.modules:
        require_address_space(_IMPORT_BYTES, "importing the models of transformers")
    remedy = "Check config.json, and that this version of transformers knows the model."
    with library_reads("dense", folder, remedy, "build it"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def require_runs(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Checks that a model computes logits, by shapes alone: some configs that build it contradict themselves.

    Raises:
        ModelError: transformers raises over its config.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    trust = trusts(folder, trust_remote_code)
    remedy = "Give the config.json that the model was published with."
    with library_reads("dense", folder, remedy, "run it"), FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits  # noqa: B018
        except (UnsupportedFakeTensorException, NotImplementedError):
            return  # it needs values, or an operation that has no shapes: the check with weights tells


def _doubled(model: nn.Module) -> dict[str, str]:
    """Returns the second names of tied parameters, each with the first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def renaming(model: Any) -> Callable[[str], str]:
    """Returns transformers' own renaming of tensors that it reads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [
        rule for rule in get_model_conversion_mapping(model) or () if isinstance(rule, WeightRenaming)
    ]
    prefix, state = model.base_model_prefix, model.state_dict()

    def in_state(name: str) -> str:
        renamed: str = rename_source_key(name, renamings, [], prefix, state)[0]
        return renamed

    return in_state


def narrow(config: Any, blocks: int) -> None:
    """Leaves a config of transformers the first blocks alone, with narrow networks."""
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        with suppress(AttributeError):  # some configs compute them from the number of layers
            config.layer_types = config.layer_types[:blocks]
    for key in _WIDTH_KEYS:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, _TRIAL_WIDTH)


def _try_out(folder: Path, config: Any, trust: bool) -> None:
    """Verifies the network of a narrow block of the family, on random weights."""
    small = copy.deepcopy(config)
    narrow(small, 1)
    model = _build(folder, small, trust)
    generator = torch.Generator().manual_seed(0)
    for site in find_ffns(model, small, verify=False):
        network = model.get_submodule(site.name).to_empty(device="cpu")
        for parameter in network.parameters():
            with torch.no_grad():
                parameter.normal_(std=0.02, generator=generator)
    find_ffns(model, small)


def _names(model: nn.Module, site: FFNSite) -> FFNNames:
    network = model.get_submodule(site.name)
    gate, up, down = linear_names(network)
    weights = site.weights
    shape = FFNShape(
        width=weights.width,
        model_width=weights.model_width,
        gated=gate is not None,
        activation=weights.activation,
        up_bias=weights.b_up_F is not None,
        down_bias=weights.b_down_D is not None,
    )
    matrices, biases = {}, {}
    for matrix, linear, part in _parts(gate, up, down):
        module = network.get_submodule(linear)
        matrices[matrix] = MatrixName(f"{site.name}.{linear}.weight", part, is_conv1d(module))
        if module.bias is not None:
            biases[matrix] = MatrixName(f"{site.name}.{linear}.bias", part)
    return FFNNames(site.layer, site.name, shape, matrices, biases)


def _parts(gate: str | None, up: str, down: str) -> Iterator[tuple[Matrix, str, tuple[int, int]]]:
    fused = gate == up
    if gate is not None:
        yield "gate", gate, (0, 2) if fused else (0, 1)
    yield "up", up, (1, 2) if fused else (0, 1)
    yield "down", down, (0, 1)
