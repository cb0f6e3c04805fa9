"""Parameters of the model of time and memory: few, named, the same for every model and cluster.

docs/plan.md explains each. Those in `FITTED` were fitted to the published rows of `moe.planning.published` by
``python -m tools.plan --fit``; the others were set beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from moe.errors import ConfigError, Mistake

FITTED = (
    "products_16",
    "products_8",
    "products_4",
    "power",
    "traffic",
    "casts",
    "launch_s",
    "exchange_hidden",
)


@dataclass(frozen=True)
class Assumptions:
    """Parameters of the model.

    Attributes:
        products_16: Share of the peak that large bf16 products reach.
        products_8: The same of 8-bit products.
        products_4: The same of 4-bit products.
        attention: Share of the bf16 peak that attention reaches.
        rows_half: Rows at which a product reaches half of its share.
        power: Exponent with which a GPU's speed rises with its watts.
        traffic: Number of times that activations kept for backward cross the memory bus in a training step.
        casts: Additional crossings by operands of products with fewer than 16 bits.
        launch_s: Seconds that an expert layer waits for the host in a micro-batch, unless the step is one
            graph.
        exchange_hidden: Share of the exchange that overlaps with products, if the layout overlaps it.
        exposed: Share of the time of tensor, context and stage communication that is not hidden.
        links: Share of the links' bandwidth that communication reaches.
        reduce_hidden: Share of a micro-batch that hides the reduction of gradients and gathering of weights.
        imbalance: Rows of the fullest rank over the mean, due to routing.
        logit_bytes: Bytes that head and loss keep per logit: 16 bits and fp32, fewer if they are fused.
        reserved: Bytes that contexts, libraries and fragmentation take.
    """

    products_16: float = 0.415
    products_8: float = 0.641
    products_4: float = 0.513
    attention: float = 0.6
    rows_half: float = 100.0
    power: float = 1.51
    traffic: float = 12.2
    casts: float = 10.9
    launch_s: float = 0.00209
    exchange_hidden: float = 0.749
    exposed: float = 0.25
    links: float = 0.8
    reduce_hidden: float = 0.5
    imbalance: float = 1.0
    logit_bytes: float = 6.0
    reserved: float = 6e9


def with_settings(base: Assumptions, settings: Sequence[str]) -> Assumptions:
    """Applies ``NAME=VALUE`` settings.

    Raises:
        ConfigError: A name is unknown or a value is no positive number; all mistakes at once.
    """
    known = [field.name for field in fields(Assumptions)]
    values: dict[str, float] = {}
    mistakes = []
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if name not in known:
            rule = "it is no parameter of the model"
            mistakes.append(Mistake("--set", setting, rule, f"Choose of {', '.join(known)}."))
        elif not 0 <= value < float("inf"):
            mistakes.append(Mistake("--set", setting, "its value must be a number, 0 or more", "Correct it."))
        else:
            values[name] = value
    mistakes += [
        Mistake("--set", f"{name}={values[name]:g}", "a share is above 0", "Raise it.")
        for name in ("products_16", "products_8", "products_4", "attention", "links")
        if values.get(name, 1.0) <= 0
    ]
    if mistakes:
        raise ConfigError(mistakes)
    return replace(base, **values)
