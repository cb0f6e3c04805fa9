"""Router rows from the hidden states of a dense model on prompts.

Letters: S tokens of a prompt, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moe.errors import ConfigError, Mistake
from moe.upcycle.gates import observe
from moe.upcycle.router_start import GIVEN_ROWS
from recipes.config.schema import RunConfig
from recipes.config.sections.prompts_config import PromptsConfig
from recipes.data.tokenizer import encode_texts, load_tokenizer
from recipes.models.hf.ffn_blocks import FFNSite, chosen_sites
from recipes.models.hf.hf_model import HFModel
from recipes.upcycling.prompts.prompt_file import ExpertPrompts, check_prompt_file, read_prompts

LayerTensors = Mapping[int, Mapping[str, Tensor]]
_ROUNDING = 1e-5


def check_prompts(config: RunConfig) -> list[Mistake]:
    """Checks the prompts and that the router, as it runs, has rows that they could set."""
    mistakes = check_prompt_file(config)
    asked = config.section(PromptsConfig).path is not None
    if asked and not observe(config.router, config.upcycle.num_experts).has_rows:
        rule = "it has no row for each expert that prompts could set"
        remedy = "Choose one that has, such as topk, or set prompts.path=null."
        mistakes.append(Mistake("router.name", config.router.name, rule, remedy))
    return mistakes


def with_prompt_rows(known: LayerTensors, config: RunConfig, model: HFModel) -> LayerTensors:
    """Adds the router rows of each layer to its statistics; nothing where the config names no prompts.

    Args:
        known: Statistics by layer.
        config: Config of the run or conversion.
        model: The dense decoder, not yet changed.

    Raises:
        ConfigError: The file cannot be used.
    """
    prompts = config.section(PromptsConfig)
    if prompts.path is None:
        return known
    sites = chosen_sites(model, config.upcycle)
    rows = prompt_rows(
        model, sites, read_prompts(prompts.path), prompts, trust_remote_code=config.trust_remote_code
    )
    return {layer: {**known.get(layer, {}), GIVEN_ROWS: rows_ED} for layer, rows_ED in rows.items()}


@torch.no_grad()
def prompt_rows(
    model: HFModel,
    sites: Sequence[FFNSite],
    prompts: Sequence[ExpertPrompts],
    config: PromptsConfig,
    *,
    trust_remote_code: bool = False,
) -> dict[int, Tensor]:
    """Computes the rows of every layer: ``[E, D]`` fp32, each of length ``config.scale``.

    A row is the mean over its positive prompts less that over its negative ones, of what each layer's network
    reads; each prompt passes by itself, so that there is no padding.

    Raises:
        ConfigError: Two experts would get rows that cannot be told apart.
    """
    tokenizer = load_tokenizer(model.folder, append_eos=False, trust_remote_code=trust_remote_code)
    training = model.module.training
    model.module.eval()
    means: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    with _inputs(model.module, sites) as inputs:
        for expert in prompts:
            positive = _mean(model, tokenizer, expert.positive, inputs, config)
            negative = _mean(model, tokenizer, expert.negative, inputs, config) if expert.negative else {}
            for layer, mean_D in positive.items():
                left_D = mean_D - negative[layer] if negative else mean_D
                _require_more_than_rounding(left_D.norm() / mean_D.norm(), layer, config)
                means[layer].append(normalize(left_D, dim=0))
    model.module.train(training)
    return {layer: _rows(torch.stack(means_D), layer, config) for layer, means_D in means.items()}


def _rows(means_ED: Tensor, layer: int, config: PromptsConfig) -> Tensor:
    centred_ED = means_ED - means_ED.mean(0) if config.centre and len(means_ED) > 1 else means_ED
    _require_more_than_rounding(centred_ED.norm(dim=-1).min(), layer, config)
    rows_ED = normalize(centred_ED, dim=-1)
    alike_EE = (rows_ED @ rows_ED.mT - torch.eye(len(rows_ED))).tril(-1)
    if len(rows_ED) > 1 and float(alike_EE.max()) > 0.9999:
        first, second = divmod(int(alike_EE.argmax()), len(rows_ED))
        rule = (
            f"experts {second} and {first} get the same row in layer {layer}: the router could not part them"
        )
        raise ConfigError.one("prompts.path", config.path, rule, "Give them prompts that differ more.")
    return config.scale * rows_ED


def _require_more_than_rounding(left: Tensor, layer: int, config: PromptsConfig) -> None:
    """Rejects a difference of unit vectors that is no more than rounding: the row would be noise."""
    if not float(left) > _ROUNDING:
        rule = f"prompts cancel out in layer {layer}, and leave nothing for a row"
        raise ConfigError.one("prompts.path", config.path, rule, "Give them prompts that differ more.")


def _mean(
    model: HFModel,
    tokenizer: Any,
    texts: Sequence[str],
    inputs: dict[int, Tensor],
    config: PromptsConfig,
) -> dict[int, Tensor]:
    total: dict[int, Tensor] = {}
    for text in texts:
        ids_1S = torch.tensor(
            encode_texts(tokenizer, [text], special_tokens=True), device=model.module.device
        )
        model.module.base_model(input_ids=ids_1S, use_cache=False)
        for layer, x_SD in inputs.items():
            vector_D = x_SD[-1] if config.take == "last" else x_SD.mean(0)
            total[layer] = total.get(layer, 0) + vector_D / len(texts)
    return total


@contextmanager
def _inputs(model: nn.Module, sites: Sequence[FFNSite]) -> Iterator[dict[int, Tensor]]:
    """Records the input of each network in the last pass while open: ``[S, D]`` fp32."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[layer] = args[0].detach().flatten(0, -2).float().cpu()

        return hook

    handles = [model.get_submodule(site.name).register_forward_pre_hook(keep(site.layer)) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
