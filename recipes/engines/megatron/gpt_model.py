"""Megatron's GPT model in the shape of a transformers model, with Graft's modules in its slots."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layer import MoELayer
from recipes.engines.megatron.build_settings import BuildSettings
from recipes.engines.megatron.gpt_shape import GPTShape, blocks_of_stages, megatron_layout, read_shape
from recipes.engines.megatron.layer_slots import Attention, Norm, RouterSlot, SharedSlot
from recipes.engines.megatron.rank_groups import MegatronDims, RankGroups
from recipes.models.hf.hf_model import HFModel


def build_gpt(model: HFModel, dims: MegatronDims, groups: RankGroups, settings: BuildSettings) -> Any:
    """Builds this rank's stage of a GPT model, its weights unfilled, with the model's routers.

    Args:
        model: A dense or MoE model of one of the families; its experts are sharded already.
        dims: Layout of the ranks.
        groups: Groups of this rank.
        settings: Settings of the model.
    """
    from megatron.core.models.gpt import GPTModel

    shape = read_shape(model.config.to_dict())
    config = _transformer_config(model, shape, dims, settings)
    blocks = blocks_of_stages(shape.layers, dims.pp)[groups.stage]
    return GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(model, shape, blocks, settings),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.max_positions,
        pre_process=groups.stage == 0,
        post_process=groups.stage == dims.pp - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.theta,
    ).to(settings.device)


def keep_padding(gpt: Any, model: HFModel, dims: MegatronDims, groups: RankGroups) -> None:
    """Keeps the embedding of padding fixed, as transformers does: it gets no gradient."""
    padding = model.module.get_input_embeddings().padding_idx
    if padding is None or not gpt.pre_process:
        return

    def detach(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        padded = args[0] == padding
        if dims.sequence_parallel:
            padded = padded.t().chunk(dims.tp)[groups.tp_rank]
        return torch.where(padded[..., None], out.detach(), out)

    gpt.embedding.word_embeddings.register_forward_hook(detach)


def _transformer_config(model: HFModel, shape: GPTShape, dims: MegatronDims, settings: BuildSettings) -> Any:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    # Each of these needs kernels of APEX or TransformerEngine.
    fused = ("gradient_accumulation", "masked_softmax", "bias_activation", "bias_dropout")
    more: dict[str, Any] = {f"{name}_fusion": False for name in fused} | {"apply_rope_fusion": False}
    if settings.recomputes:
        more |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    more |= _moe_fields(model, shape, dims, settings)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        ffn_hidden_size=shape.ffn_width,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=shape.attention_dropout,
        tensor_model_parallel_size=dims.tp,
        expert_tensor_parallel_size=1,
        sequence_parallel=dims.sequence_parallel,
        pipeline_model_parallel_size=dims.pp,
        pipeline_model_parallel_layout=megatron_layout(shape.layers, dims.pp),
        pipeline_dtype=settings.dtype,
        # After sending, only the graph of an output is needed.
        deallocate_pipeline_outputs=dims.pp > 1,
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16,
        # The weights are filled later: drawing others first would only take time.
        perform_initialization=False,
        use_cpu_initialization=settings.device.type == "cpu",
        **more,
    )


def _moe_fields(
    model: HFModel, shape: GPTShape, dims: MegatronDims, settings: BuildSettings
) -> dict[str, Any]:
    """Returns the fields of the config for MoE layers; routing and balance are those of our routers."""
    moe_blocks = dict(model.moe_layers())
    if not moe_blocks:
        return {}
    first = next(iter(moe_blocks.values()))
    return {
        "expert_model_parallel_size": dims.ep,
        "num_moe_experts": first.router.num_experts,
        "moe_layer_freq": [int(i in moe_blocks) for i in range(shape.layers)],
        "moe_ffn_hidden_size": first.experts.w_down_EDF.shape[-1],
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": first.shared and first.shared.w_down_DF.shape[-1],
        **settings.dispatcher.fields(first.router.num_experts, _largest_top_k(model, first)),
        **settings.experts.fields(),
    }


def _largest_top_k(model: HFModel, layer: MoELayer) -> int:
    """Returns the largest K that a layer's router uses in the course of the run."""
    phases = () if model.schedule is None else model.schedule.top_k
    return max([layer.router.top_k, *(k for phase in phases for k in phase.values())])


def _block_spec(model: HFModel, shape: GPTShape, blocks: range, settings: BuildSettings) -> Any:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    moe_blocks = dict(model.moe_layers())
    networks = {
        i: _moe_spec(model, moe_blocks[i], settings) if i in moe_blocks else _dense_spec() for i in blocks
    }
    layers = [_layer_spec(shape, networks[i]) for i in blocks]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)


def _layer_spec(shape: GPTShape, mlp: Any) -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    norm = Norm if shape.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=Attention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _dense_spec() -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=MLP, submodules=submodules)


def _moe_spec(model: HFModel, layer: MoELayer, settings: BuildSettings) -> Any:
    import megatron.core
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoE
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    most = settings.dispatcher.most_experts(layer.router.num_experts, _largest_top_k(model, layer))

    def make_router(config: Any, pg_collection: Any = None) -> RouterSlot:
        if not config.sequence_parallel:
            return RouterSlot(layer, most=most)
        gather = partial(gather_from_sequence_parallel_region, group=pg_collection.tp)
        return RouterSlot(layer, pg_collection.tp.size(), pg_collection.tp.rank(), gather, most)

    version = tuple(int(part) for part in megatron.core.__version__.split(".")[:3])
    shared = None if layer.shared is None else ModuleSpec(module=SharedSlot, params={"layer": layer})
    submodules = MoESubmodules(
        router=make_router, experts=settings.experts.slot(layer, version), shared_experts=shared
    )
    return ModuleSpec(module=MegatronMoE, submodules=submodules)
