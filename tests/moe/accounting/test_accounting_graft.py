"""Graft's own config: counted as the model that it rebuilds, with every router."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe.accounting.params import count_from_shape, count_parameters
from moe.accounting.shape import attention_from_config, shape_from_config
from moe.dispatch.local import LocalDispatcher
from moe.errors import ConfigError
from moe.experts.experts import Experts
from moe.experts.shared import SharedExpert
from moe.experts.weights import ExpertBank, FFNWeights
from moe.layer import MoELayer
from moe.routers import router_class, router_classes
from moe.types import LayerContext, RouterContext
from tests.moe.accounting.family_cases import SMALL

D, F, E, SHARED = 24, 14, 4, 10


def dense_config(family: str = "llama") -> dict[str, Any]:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **SMALL).to_dict()


def entry(index: int, router: str = "topk", shared: int = 0, bias: bool = False) -> dict[str, Any]:
    """One layer as the exporter writes it."""
    shapes = {"w_up_EUD": [E, 2 * F, D], "w_down_EDF": [E, D, F]}
    if bias:
        shapes |= {"b_up_EU": [E, 2 * F], "b_down_ED": [E, D]}
    return {
        "index": index,
        "name": f"model.layers.{index}.mlp",
        "router": dataclasses.asdict(router_class(router).config_class(name=router)),
        "activation": "silu",
        "gated": True,
        "shapes": shapes,
        "shared_width": shared,
    }


def content(*layers: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {
        "model_type": "graft_moe",
        "format_version": 2,
        "dense_config": dense_config(),
        "moe_layers": list(layers),
        **change,
    }


def moe(given: dict[str, Any]) -> MoELayer:
    """The live layer of an entry."""
    shapes = given["shapes"]
    names = ("w_up_EUD", "w_down_EDF", "b_up_EU", "b_down_ED")
    tensors = {name: torch.empty(shapes[name]) if name in shapes else None for name in names}
    bank = ExpertBank(activation="silu", gated=True, **tensors)  # type: ignore[arg-type]
    cls = router_class(given["router"]["name"])
    router = cls(cls.config_class(**given["router"]), D, E)
    biases = [torch.empty(size) if "b_up_EU" in shapes else None for size in (SHARED, SHARED, D)]
    weights = FFNWeights(
        up_FD=torch.empty(SHARED, D),
        down_DF=torch.empty(D, SHARED),
        activation="silu",
        gate_FD=torch.empty(SHARED, D),
        b_gate_F=biases[0],
        b_up_F=biases[1],
        b_down_D=biases[2],
    )
    shared = SharedExpert(weights) if given["shared_width"] else None
    context = LayerContext(RouterContext(), given["index"])
    return MoELayer(router, LocalDispatcher(), Experts(bank), context, shared)


def live(config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    for given in config["moe_layers"]:
        model.model.layers[given["index"]].mlp = moe(given)
    return model


@pytest.mark.parametrize("router", sorted(router_classes()))
def test_every_router_is_counted_as_it_is(router: str) -> None:
    config = content(entry(1, router), entry(3, router))
    shape = shape_from_config(config)
    assert asdict(count_from_shape(shape)) == asdict(count_parameters(live(config)))
    assert len(shape.moe) == 2 and len(shape.layers) == 5


@pytest.mark.parametrize("bias", [False, True])
def test_shared_experts_and_biases(bias: bool) -> None:
    config = content(entry(0, shared=SHARED, bias=bias), entry(1, bias=bias))
    count = count_from_shape(shape_from_config(config))
    assert asdict(count) == asdict(count_parameters(live(config)))
    # 3*24*14, and 2*14 + 24 with biases
    assert count.per_expert == 1008 + (52 if bias else 0)


def test_the_first_format_has_no_shared_experts() -> None:
    old = entry(0)
    del old["shared_width"]
    first, second = content(old, format_version=1), content(entry(0))
    assert shape_from_config(first) == shape_from_config(second)


def test_attention_is_that_of_the_dense_model() -> None:
    config = content(entry(0))
    assert attention_from_config(config) == attention_from_config(config["dense_config"])


def test_what_the_exporter_writes_is_read(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from recipes.models.export.graft_format import GraftExporter
    from recipes.models.export.spec import describe_model
    from recipes.models.hf.hf_model import HFModel

    module = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    for index in (0, 2):
        module.model.layers[index].mlp = moe(entry(index, shared=SHARED))
    model = HFModel(module=module, folder=tmp_path, source_dtype=torch.float32)
    written = GraftExporter().config(describe_model(model))
    assert asdict(count_from_shape(shape_from_config(written))) == asdict(count_parameters(module))


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (content(entry(0), format_version=9), "format_version"),
        (content(entry(0), moe_layers=None), "moe_layers"),
        (content(entry(0), dense_config=None), "dense_config"),
        (content(entry(0), dense_config={"model_type": "gpt2"}), "model_type"),
        (content(entry(7)), "moe_layers[0].index"),
        (content(entry(0) | {"gated": None}), "gated"),
        (content(entry(0) | {"new_part": 1}), "moe_layers[0]"),
        (content(entry(0) | {"router": {"name": "nobody"}}), "moe_layers[0].router.name"),
        (content(entry(0) | {"router": {"name": "topk", "nothing": 1}}), "moe_layers[0].router"),
        (
            content(entry(0) | {"shapes": {**entry(0)["shapes"], "b_up_EU": [E, 2 * F]}}),
            "moe_layers[0].shapes",
        ),
    ],
)
def test_other_content_is_refused(config: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_config(config)
    assert caught.value.mistakes[0].path == path
