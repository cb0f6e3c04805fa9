"""Other libraries' entry points in plain torch: the semantics their sources document, none of their kernels.

They prove that an adapter passes the right things in the right layout and that gradients come back by the
right name. They prove nothing about the libraries. Each checks what its library demands of its arguments.

Letters: T tokens, D model width, E experts, K slots a token, N rows; I and O any widths in and out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16


def _per_expert(rows_NI: Tensor, w_EOI: Tensor, sizes: list[int]) -> Tensor:
    """``[N, O]``: every expert's rows times its matrix."""
    assert len(sizes) == len(w_EOI) and sum(sizes) == len(rows_NI), (sizes, w_EOI.shape, rows_NI.shape)
    return torch.cat([part @ w.t() for part, w in zip(rows_NI.split(sizes), w_EOI, strict=True)])


def _sizes(ends_E: Tensor) -> list[int]:
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """ScatterMoE: rows are in expert order where grouped, else in slot order; gates sum over slots."""
    assert len(sorted_scattered_idxs) == len(sorted_expert_idxs) == len(inputs) * k
    sizes = _sizes(expert_offsets)
    assert sorted_expert_idxs.bincount(minlength=len(expert_weights)).tolist() == sizes
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    out = _per_expert(rows, expert_weights.transpose(1, 2), sizes)
    if expert_biases is not None:
        out = out + expert_biases[sorted_expert_idxs]
    if grouped_out:
        return out
    out = torch.zeros_like(out).index_copy(0, sorted_scattered_idxs, out)
    if gates is None:
        return out
    assert gates.dtype == out.dtype
    return torch.einsum("tk,tkd->td", gates, out.view(*gates.shape, -1))


class LigerFusedMoEFunction:
    """Liger: gate rows first, ids of every slot in int32, SwiGLU."""

    @staticmethod
    def apply(
        x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Slot by slot."""
        assert top_k_index.dtype == torch.int32 and top_k_index.shape == top_k_weights.shape
        out = torch.zeros_like(x)
        for k in range(top_k_index.shape[1]):
            ids = top_k_index[:, k].long()
            gate, up = torch.einsum("td,tud->tu", x, gate_up_proj[ids]).chunk(2, dim=1)
            y = torch.einsum("tf,tdf->td", F.silu(gate) * up, down_proj[ids])
            out = out + top_k_weights[:, k, None].to(x.dtype) * y
        return out


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """grouped_gemm: rows per expert as int64 on the host; contiguous operands."""
    assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64 and batch_sizes.ndim == 1
    assert a.is_contiguous() and b.is_contiguous()
    return _per_expert(a, b if trans_b else b.transpose(1, 2), batch_sizes.tolist())


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """MegaBlocks: tokens to expert order; indices are flat slots, bins the ends of experts."""
    assert x.is_contiguous() and len(indices) == len(bin_ids) == len(x) * top_k == int(bins[-1])
    assert {indices.dtype, bin_ids.dtype, bins.dtype} == {torch.int32}
    return x[indices.long() // top_k]


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """MegaBlocks: back to slots, each times its weight, and summed over the slots of a token."""
    assert len(indices) == len(bin_ids) == len(weights) == len(x) == int(bins[-1])
    slots = torch.zeros_like(x).index_copy(0, indices.long(), x) * weights[:, None].to(x.dtype)
    return slots.view(-1, top_k, x.shape[1]).sum(1)


class ActivationType(Enum):
    """SonicMoE's gated activations, as far as its kernels have them."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int,
    activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """SonicMoE: pairs of token and expert, tokens ascending; weights ``[out, in, E]`` over our memory."""
    assert b1 is None and b2 is None and concat_layout and router_scores.dtype == torch.float32
    assert (token_indices.diff() >= 0).all() and w1.shape[2] == w2.shape[2] == E
    assert w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
    expert, token = expert_indices.long(), token_indices.long()
    gate, up = torch.einsum("nd,udn->nu", x[token], w1[:, :, expert]).chunk(2, dim=1)
    is_silu = activation_type is ActivationType.SWIGLU
    hidden = (F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")) * up
    y = torch.einsum("nf,dfn->nd", hidden, w2[:, :, expert]) * router_scores[:, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, y), expert.bincount(minlength=E)


def _spans(grouped_layout: Tensor) -> list[tuple[int, int, int]]:
    """First row, end and expert of every stretch of `ALIGNMENT` rows; padding stands behind rows alone."""
    spans = []
    assert len(grouped_layout) % ALIGNMENT == 0 and grouped_layout.dtype == torch.int32
    for start in range(0, len(grouped_layout), ALIGNMENT):
        part = grouped_layout[start : start + ALIGNMENT].tolist()
        used = [expert for expert in part if expert >= 0]
        assert used and len(set(used)) == 1 and part[: len(used)] == used, part
        spans.append((start, start + ALIGNMENT, used[0]))
    return spans


def m_grouped_bf16_gemm_nt_contiguous(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor) -> None:
    """DeepGEMM: padded rows times ``[E, O, I]``, into d."""
    for start, end, expert in _spans(grouped_layout):
        d[start:end] = a[start:end] @ b[expert].t()


def m_grouped_bf16_gemm_nn_contiguous(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor) -> None:
    """DeepGEMM: the same with ``[E, I, O]``."""
    m_grouped_bf16_gemm_nt_contiguous(a, b.transpose(1, 2), d, grouped_layout)


def k_grouped_bf16_gemm_tn_contiguous(
    a: Tensor, b: Tensor, d: Tensor, ks_cpu: list[int], grouped_layout: Tensor, c: Tensor
) -> None:
    """DeepGEMM: ``d[e] = c[e] + a[rows of e].T @ b[rows of e]`` in fp32, padding included."""
    assert c.data_ptr() == d.data_ptr() and d.dtype == torch.float32 and d.is_contiguous()
    assert a.is_contiguous() and b.is_contiguous() and grouped_layout.tolist() == ks_cpu
    assert all(k % ALIGNMENT == 0 for k in ks_cpu) and sum(ks_cpu) == len(a) == len(b)
    for e, (left, right) in enumerate(zip(a.split(ks_cpu), b.split(ks_cpu), strict=True)):
        d[e] += (left.t() @ right).float()


#: Import name -> what stands in for it.
STAND_INS: Mapping[str, Any] = {
    "scattermoe": SimpleNamespace(parallel_linear=parallel_linear),
    "liger_kernel.ops": SimpleNamespace(LigerFusedMoEFunction=LigerFusedMoEFunction),
    "grouped_gemm.ops": SimpleNamespace(gmm=gmm),
    "megablocks.ops": SimpleNamespace(gather=gather, scatter=scatter),
    "sonicmoe": SimpleNamespace(moe_general_routing_inputs=moe_general_routing_inputs),
    "sonicmoe.enums": SimpleNamespace(ActivationType=ActivationType),
    "deep_gemm": SimpleNamespace(
        m_grouped_bf16_gemm_nt_contiguous=m_grouped_bf16_gemm_nt_contiguous,
        m_grouped_bf16_gemm_nn_contiguous=m_grouped_bf16_gemm_nn_contiguous,
        k_grouped_bf16_gemm_tn_contiguous=k_grouped_bf16_gemm_tn_contiguous,
        get_mk_alignment_for_contiguous_layout=lambda: ALIGNMENT,
    ),
}

#: Adapter -> import name, function, and its parameters as they were read in the library's source. What is
#: compiled, or takes its arguments through autograd's `apply`, has no signature that could be asked for.
RECORDED: Mapping[str, tuple[tuple[str, str, Callable[..., Any]], ...]] = {
    "scattermoe": (("scattermoe", "parallel_linear", parallel_linear),),
    "grouped_gemm": (("grouped_gemm.ops", "gmm", gmm),),
    "megablocks": (("megablocks.ops", "scatter", scatter),),
    "sonicmoe": (("sonicmoe", "moe_general_routing_inputs", moe_general_routing_inputs),),
}
