"""Published training speeds, with their layouts.

Source: the tables of NVIDIA's Megatron-Bridge, ``docs/performance-summary.md`` (26.08, page of 2026-08-11)
and ``docs/performance-summary-archive.md`` of github.com/NVIDIA-NeMo/Megatron-Bridge at v0.6.0 (2026-08-19).
Settings missing there (recomputation, graphs, overlap, offloading, bytes of states) are from the recipes of
the same releases: v0.2.0 for 25.11, v0.4.2 for 26.04.01, v0.5.0 for 26.06, v0.6.0 for 26.08.

Every pre-training row of 26.08 whose model `moe.accounting.shape` can express is here, and of 26.06, 26.04.01
and 25.11 those with a setting (model, GPU, precision, layout, graphs) that no later release repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe.accounting.memory import ElementBytes
from moe.accounting.shape import shape_from_config
from moe.planning.assumptions import Assumptions
from moe.planning.cluster import GPUS, Cluster, Precision
from moe.planning.layout import Job, Layout

# The recipes use 16-bit gradients. Kimi K2 ran under Muon, with one state per element.
_ADAM = ElementBytes(gradients=2)
_MUON = ElementBytes(gradients=2, optimizer=4)

NOT_EXPRESSED: Mapping[str, str] = {
    "DeepSeek-V4 Flash (2 rows of 26.08)": "its sparse attention is no family of moe.accounting",
    "Nemotron 3 Nano, Super, Ultra and 3.5 Lightning (8 rows of 26.08)": (
        "their Mamba-2 layers and latent experts are no family of moe.accounting"
    ),
}


def _config(family: str, width: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


def _llama(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {**_config("llama", width, layers, heads, 8, 128256), "intermediate_size": inner}


def _qwen3(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    return {
        **_config("qwen3_moe", width, layers, heads, 4, 151936),
        "head_dim": 128,
        "intermediate_size": 8 * inner,
        "moe_intermediate_size": inner,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }


def _deepseek(heads: int, experts: int, vocab: int, dense: int, further: int) -> dict[str, Any]:
    return {
        **_config("deepseek_v3", 7168, 61, heads, heads, vocab),
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": dense,
        "num_nextn_predict_layers": further,
    }


#: The models' ``config.json``, as far as their shape depends on it.
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "DeepSeek-V3": _deepseek(128, 256, 129280, 3, 1),
    "DeepSeek-V3 (no MTP)": _deepseek(128, 256, 129280, 3, 0),
    "Kimi-K2": _deepseek(64, 384, 163840, 1, 0),
    "gpt-oss-120b": {
        **_config("gpt_oss", 2880, 36, 64, 8, 201088),
        "head_dim": 64,
        "sliding_window": 128,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    "Qwen3-30B-A3B": _qwen3(2048, 48, 32, 768),
    "Qwen3-235B-A22B": _qwen3(4096, 94, 64, 1536),
    "Llama-3-8B": _llama(4096, 32, 32, 14336),
    "Llama-3-70B": _llama(8192, 80, 64, 28672),
    "Llama-3.1-405B": _llama(16384, 126, 128, 53248),
}


@dataclass(frozen=True)
class Row:
    """Published row.

    Attributes:
        release: Release of the container.
        model: Key of `CONFIGS`.
        gpu: Key of `moe.planning.cluster.GPUS`.
        gpus: Number of GPUs.
        precision: Precision of products.
        seq_len: Tokens of a sequence.
        global_batch: Sequences of a step.
        layout: Layout over the GPUs.
        tokens: Published tokens per second and GPU.
        tflops: Published model TFLOP/s of a GPU.
    """

    release: str
    model: str
    gpu: str
    gpus: int
    precision: Precision
    seq_len: int
    global_batch: int
    layout: Layout
    tokens: float
    tflops: float

    @property
    def name(self) -> str:
        """Label in tables."""
        return f"{self.model} {self.gpu} x{self.gpus} {self.precision}"

    @property
    def job(self) -> Job:
        """The job that ran."""
        shape = shape_from_config(CONFIGS[self.model])
        return Job(shape, self.seq_len, self.global_batch, self.precision)

    @property
    def cluster(self) -> Cluster:
        """The cluster that it ran on."""
        return Cluster(GPUS[self.gpu], self.gpus)

    @property
    def sizes(self) -> ElementBytes:
        """Bytes per element of master weights, gradients and states."""
        return _MUON if self.model == "Kimi-K2" else _ADAM


# Columns: release, model, GPU, GPUs, precision, tokens of a sequence, sequences of a step, of a micro-batch,
# TP PP CP VP EP, tokens/s/GPU, TFLOP/s/GPU, and letters: s selective recomputation, g the whole step as one
# graph, o overlapped exchange, f fully sharded weights, h20 activations of 20 layers of a rank on the host.
_TABLE = """
26.08    DeepSeek-V3     gb300 256 mxfp8 4096 4096 1  1 2 1 8 32   6288 1635  go
26.08    DeepSeek-V3     gb200 256 mxfp8 4096 4096 1  1 4 1 4 64   4912 1276  sgo
26.08    gpt-oss-120b    gb300 64  mxfp8 4096 1280 4  1 1 1 1 16  33024 1077  go
26.08    gpt-oss-120b    gb200 64  mxfp8 4096 1280 4  1 1 1 1 64  28672  934  go
26.08    Qwen3-30B-A3B   gb300 8   mxfp8 4096 512  8  1 1 1 1 8   44544 1029  go
26.08    Qwen3-30B-A3B   gb200 8   mxfp8 4096 512  4  1 1 1 1 8   39936  923  go
26.08    Qwen3-235B-A22B gb300 256 mxfp8 4096 8192 2  1 4 1 12 32  8816 1306  go
26.08    Qwen3-235B-A22B gb200 256 mxfp8 4096 8192 1  1 8 1 3 32   7280 1077  go
26.06    Llama-3.1-405B  gb300 256 fp8   8192 1536 1  4 8 1 4 1    1048 2646  -
26.06    Llama-3.1-405B  gb300 256 mxfp8 8192 1536 1  2 8 2 4 1     952 2403  -
26.06    Llama-3.1-405B  gb300 256 nvfp4 8192 1536 1  4 8 1 4 1    1413 3575  -
26.06    Llama-3.1-405B  gb200 256 fp8   8192 1536 1  4 16 1 4 1    843 2129  -
26.06    Llama-3.1-405B  gb200 256 mxfp8 8192 1536 1  4 16 1 8 1    783 1976  -
26.06    Llama-3.1-405B  gb200 256 nvfp4 8192 1536 1  4 16 1 8 1   1166 2944  -
26.06    Llama-3.1-405B  h100 1024 fp8   8192 1536 1  8 8 2 8 1     326  822  -
26.06    DeepSeek-V3     gb300 256 mxfp8 4096 15360 1 1 2 1 8 32   6422 1670  go
26.06    DeepSeek-V3     b300  256 mxfp8 4096 4096 2  1 8 1 1 8    3541  920  s
26.06    gpt-oss-120b    b300  64  mxfp8 4096 1280 4  1 1 1 1 8   18534  604  -
26.06    Qwen3-30B-A3B   b300  8   mxfp8 4096 512  8  1 1 1 1 8   40769  938  go
26.06    Qwen3-30B-A3B   h100  16  fp8   4096 1024 1  1 1 1 1 16   8826  203  -
26.06    Kimi-K2         gb300 256 mxfp8 4096 4096 2  1 4 1 4 64   5372 1099  s
26.04.01 Llama-3-70B     gb300 64  fp8   8192 256  2  1 1 1 1 1    5248 2348  fh20
26.04.01 Llama-3-70B     gb300 64  mxfp8 8192 256  1  1 4 1 5 1    4864 2186  -
26.04.01 Llama-3-70B     gb300 64  nvfp4 8192 256  1  1 4 1 5 1    7296 3253  -
26.04.01 Llama-3-70B     gb200 64  fp8   8192 256  2  1 1 1 1 1    4224 1892  fh40
26.04.01 Llama-3-70B     gb200 64  mxfp8 8192 256  1  2 4 1 5 1    3712 1664  -
26.04.01 Llama-3-70B     gb200 64  nvfp4 8192 256  1  2 4 1 5 1    4864 2202  -
26.04.01 Llama-3-70B     h100  64  fp8   8192 256  1  4 8 1 5 1    1664  731  -
26.04.01 DeepSeek-V3     gb300 256 mxfp8 4096 4096 2  1 2 1 8 32   4992 1298  s
26.04.01 DeepSeek-V3     gb200 256 mxfp8 4096 4096 1  1 4 1 4 64   4256 1106  s
26.04.01 DeepSeek-V3     b200  256 mxfp8 4096 4096 1  1 8 1 2 32   3328  864  so
26.04.01 gpt-oss-120b    gb300 64  bf16  4096 1280 4  1 1 1 1 64  19200  523  -
26.04.01 gpt-oss-120b    gb200 64  bf16  4096 1280 4  1 1 1 1 64  16640  452  so
26.04.01 gpt-oss-120b    b300  64  bf16  4096 1280 4  1 1 1 1 8   15232  414  -
26.04.01 gpt-oss-120b    b200  64  bf16  4096 1280 4  1 1 1 1 8   13568  369  s
26.04.01 gpt-oss-120b    h100  64  bf16  4096 1280 1  1 4 1 1 8    5824  158  s
26.04.01 Qwen3-30B-A3B   gb300 8   mxfp8 4096 512  8  1 1 1 1 8   31744  729  -
26.04.01 Qwen3-30B-A3B   gb200 8   mxfp8 4096 512  4  1 1 1 1 8   26112  599  -
26.04.01 Qwen3-30B-A3B   b300  8   mxfp8 4096 512  8  1 1 1 1 8   30720  704  -
26.04.01 Qwen3-30B-A3B   b200  8   mxfp8 4096 512  4  1 1 1 1 8   27136  619  -
26.04.01 Qwen3-235B-A22B gb300 256 mxfp8 4096 8192 2  1 4 1 12 32  6944 1029  -
26.04.01 Qwen3-235B-A22B gb200 256 mxfp8 4096 8192 1  1 8 1 3 32   5680  840  -
26.04.01 Qwen3-235B-A22B b300  256 mxfp8 4096 8192 2  1 8 1 1 8    5936  878  -
26.04.01 Qwen3-235B-A22B b200  256 mxfp8 4096 8192 1  1 8 1 1 8    3776  560  -
26.04.01 Qwen3-235B-A22B h100  256 fp8   4096 8192 1  2 8 1 4 32   1712  253  o
25.11    Llama-3-8B      gb300 8   fp8   8192 128  2  1 1 1 1 1   37556 1933  g
25.11    Llama-3-8B      gb300 8   mxfp8 8192 128  2  1 1 1 1 1   36108 1858  g
25.11    Llama-3-8B      gb200 8   fp8   8192 128  2  1 1 1 1 1   31508 1622  g
25.11    Llama-3-8B      gb200 8   mxfp8 8192 128  2  1 1 1 1 1   29789 1533  g
25.11    Llama-3-8B      b200  8   fp8   8192 128  2  1 1 1 1 1   30624 1576  g
25.11    Llama-3-8B      b200  8   mxfp8 8192 128  2  1 1 1 1 1   29521 1519  g
25.11    Llama-3-8B      h100  8   fp8   8192 128  1  1 1 1 1 1   14451  744  f
25.11    DeepSeek-V3_(no_MTP) gb300 256 bf16 4096 4096 1 1 2 1 4 32 3848 961  s
25.11    DeepSeek-V3_(no_MTP) gb200 256 bf16 4096 4096 1 1 4 1 4 64 3139 782  s
25.11    Qwen3-235B-A22B gb300 256 bf16  4096 8192 2  1 4 1 12 16  6131  907  -
25.11    Qwen3-235B-A22B gb200 256 bf16  4096 8192 1  1 8 1 3 32   4916  728  -
"""


def as_measured(assumed: Assumptions) -> Assumptions:
    """Returns the parameters for all recipes: their loss is fused, and keeps logits and their gradient."""
    return replace(assumed, logit_bytes=4.0)


def published_rows() -> tuple[Row, ...]:
    """Returns all rows, newest release first."""
    return tuple(_row(line.split()) for line in _TABLE.strip().splitlines())


def _row(cells: list[str]) -> Row:
    release, model, gpu, gpus, precision = cells[:5]
    seq_len, batch, micro, tensor, pipeline, context, chunks, expert = map(int, cells[5:13])
    letters = cells[15]
    kinds: dict[str, Precision] = {"bf16": "bf16", "fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
    layout = Layout(
        tensor,
        context,
        pipeline,
        chunks,
        expert,
        micro,
        recompute="selective" if "s" in letters else "none",
        sharding="full" if "f" in letters else "optimizer",
        overlap="o" in letters,
        graphed="g" in letters,
        offloaded=int(letters.partition("h")[2] or 0),
    )
    return Row(
        release,
        model.replace("_", " "),
        gpu,
        int(gpus),
        kinds[precision],
        seq_len,
        batch,
        layout,
        float(cells[13]),
        float(cells[14]),
    )
