"""A model small enough for its memory and time to be worked by hand, and where it is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe.accounting.shape import shape_from_config
from moe.planning.assumptions import Assumptions
from moe.planning.cluster import GPUS, Cluster
from moe.planning.layout import Job

# Width 8, two layers of 2 heads of 4 over 1 of keys and values, 4 experts of width 16, 2 for a token.
SMALL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
#: Parameters that leave the bare arithmetic: every share is 1, nothing is hidden, reserved or waited for.
BARE = Assumptions(
    products_16=1,
    products_8=1,
    products_4=1,
    attention=1,
    power=0,
    rows_half=0,
    traffic=0,
    casts=0,
    launch_s=0,
    exchange_hidden=0.5,
    exposed=1,
    links=1,
    reduce_hidden=0,
    reserved=0,
)


def small_job(**changes: Any) -> Job:
    """Eight sequences of four tokens a step."""
    return replace(Job(shape_from_config(SMALL), seq_len=4, global_batch=8), **changes)


def small_cluster(gpus: int = 4, **gpu: Any) -> Cluster:
    """H100s, a domain of two."""
    return Cluster(replace(GPUS["h100"], domain=2, **gpu), gpus)
