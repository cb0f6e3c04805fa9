"""Megatron's GPT model of the shape of a host, with the host's own routers and experts in its slots."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.layer import MoELayer
from recipes.engines.megatron.gpt_shape import GPTShape, read_shape
from recipes.engines.megatron.rank_groups import ParallelDims, Places
from recipes.engines.megatron.settings import Settings
from recipes.engines.megatron.slots import Attention, Norm, RouterSlot, SharedSlot
from recipes.engines.megatron.stages import blocks_of_stages, megatron_layout
from recipes.models.hf.hf_model import HFModel


def build_gpt(model: HFModel, layout: ParallelDims, places: Places, settings: Settings) -> Any:
    """This rank's stage of a GPT model, its weights not set yet; routers and shared experts are the host's.

    Its ``expert_kind`` tells which of the host's tensors the parameters of its experts are.

    Args:
        model: Of one of the families, dense or with mixtures; experts are cut to this rank's already.
        layout: The groups, joined already.
        places: Of this rank.
        settings: Of the engine.
    """
    from megatron.core.models.gpt import GPTModel

    shape = read_shape(model.config.to_dict())
    config = _transformer_config(model, shape, layout, settings)
    blocks = blocks_of_stages(shape.layers, layout.pipeline)[places.stage]
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=_block_spec(model, shape, blocks, settings),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.max_positions,
        pre_process=places.stage == 0,
        post_process=places.stage == layout.pipeline - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.theta,
    ).to(settings.device)
    gpt.expert_kind = settings.kind
    return gpt


def keep_padding(gpt: Any, model: HFModel, layout: ParallelDims, places: Places) -> None:
    """Leaves the embedding of padding as it is where the host does: it gets no gradient."""
    padding = model.module.get_input_embeddings().padding_idx
    if padding is None or not gpt.pre_process:
        return

    def detach(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        padded = args[0] == padding
        if layout.sequence:
            padded = padded.t().chunk(layout.tensor)[places.tensor]
        return torch.where(padded[..., None], out.detach(), out)

    gpt.embedding.word_embeddings.register_forward_hook(detach)


def _transformer_config(model: HFModel, shape: GPTShape, layout: ParallelDims, settings: Settings) -> Any:
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
    more |= _moe_fields(model, shape, layout, settings)
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
        tensor_model_parallel_size=layout.tensor,
        expert_tensor_parallel_size=1,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_model_parallel_layout=megatron_layout(shape.layers, layout.pipeline),
        pipeline_dtype=settings.dtype,
        # What the next stage has received is needed here for its graph alone.
        deallocate_pipeline_outputs=layout.pipeline > 1,
        finalize_model_grads_func=finalize_model_grads,
        params_dtype=settings.dtype,
        bf16=settings.dtype == torch.bfloat16,
        # The weights are the host's: drawing others first would only take time.
        perform_initialization=False,
        use_cpu_initialization=settings.device.type == "cpu",
        **more,
    )


def _moe_fields(model: HFModel, shape: GPTShape, layout: ParallelDims, settings: Settings) -> dict[str, Any]:
    """What the config says of mixtures; routing and balance are our routers'."""
    moe_blocks = dict(model.moe_layers())
    if not moe_blocks:
        return {}
    first = next(iter(moe_blocks.values()))
    sends = settings.sends.fields(first.router.num_experts, _largest_top_k(model, first))
    return {
        "expert_model_parallel_size": layout.expert,
        "num_moe_experts": first.router.num_experts,
        "moe_layer_freq": [int(i in moe_blocks) for i in range(shape.layers)],
        "moe_ffn_hidden_size": first.experts.w_down_EDF.shape[-1],
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": first.shared and first.shared.w_down_DF.shape[-1],
        **sends,
        **settings.kind.fields(),
    }


def _largest_top_k(model: HFModel, layer: MoELayer) -> int:
    """That a layer's router is asked for in the course of the run."""
    of_phases = () if model.schedule is None else model.schedule.top_k
    return max([layer.router.top_k, *(k for phase in of_phases for k in phase.values())])


def _block_spec(model: HFModel, shape: GPTShape, blocks: range, settings: Settings) -> Any:
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


def _moe_spec(model: HFModel, layer: MoELayer, settings: Settings) -> Any:
    import megatron.core
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
    from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoE
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    most = settings.sends.most_experts(layer.router.num_experts, _largest_top_k(model, layer))

    def make_router(config: Any, pg_collection: Any = None) -> RouterSlot:
        if not config.sequence_parallel:
            return RouterSlot(layer, most=most)
        gather = partial(gather_from_sequence_parallel_region, group=pg_collection.tp)
        return RouterSlot(layer, pg_collection.tp.size(), pg_collection.tp.rank(), gather, most)

    version = tuple(int(part) for part in megatron.core.__version__.split(".")[:3])
    shared = None if layer.shared is None else ModuleSpec(module=SharedSlot, params={"layer": layer})
    submodules = MoESubmodules(
        router=make_router, experts=settings.kind.slot(layer, version), shared_experts=shared
    )
    return ModuleSpec(module=MegatronMoE, submodules=submodules)
