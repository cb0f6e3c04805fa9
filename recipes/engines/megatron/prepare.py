"""From a host to what Megatron trains."""

from __future__ import annotations

from recipes.engines.megatron.gpt_model import build_gpt, keep_padding
from recipes.engines.megatron.gpt_shape import read_shape
from recipes.engines.megatron.hf_weights import (
    cut_experts,
    empty_model,
    find_parts,
    make_room,
    mark_parameters,
    model_tensors,
)
from recipes.engines.megatron.megatron_optimizer import build_adamw, rules_of
from recipes.engines.megatron.megatron_train_module import MegatronTrainModule
from recipes.engines.megatron.rank_groups import ParallelDims, Places
from recipes.engines.megatron.settings import Settings
from recipes.engines.megatron.stages import blocks_of_stages
from recipes.engines.optim.optimizer import OptimConfig
from recipes.models.hf.deferred_init import PresentWeights, drop_memory, stand_in
from recipes.models.hf.hf_model import HFModel
from recipes.models.hf.skeleton import empty_copy


def prepare(
    model: HFModel, optim: OptimConfig, layout: ParallelDims, places: Places, settings: Settings
) -> MegatronTrainModule:
    """Builds the model and its optimizer. Collective.

    Args:
        model: Afterwards names, routers and statistics are left of it.
        optim: Of AdamW.
        layout: Of the ranks.
        places: Of this rank.
        settings: Of the engine.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    skeleton = empty_copy(model)
    weights = PresentWeights(model_tensors(model), model.weights)
    model.weights = None
    stand_in(model.module, settings.device)
    rules = rules_of(model, optim)
    blocks = blocks_of_stages(read_shape(model.config.to_dict()).layers, layout.pipeline)[places.stage]
    own = [layer for index, layer in model.moe_layers() if index in blocks]
    for _, layer in model.moe_layers():
        layer.experts.ranks = layout.expert
        # An expert is read once for the tokens of all of these ranks, or of those beside them in its stage.
        layer.stats.readers = places.expert_group if layout.expert > 1 else None
    for layer in own:
        layer.router.to(settings.device)
        if layer.shared is not None:
            make_room(layer.shared, settings.device, settings.dtype)
        if settings.kind.keeps_ours:
            cut_experts(layer, places, layout, settings.device, settings.dtype)
    gpt = build_gpt(model, layout, places, settings)
    held = find_parts(gpt, model, places, layout)
    mark_parameters(held, layout)
    keep_padding(gpt, model, layout, places)
    empty_model(model, [each.tensor for each in held])
    if settings.distributed:
        # It gives what it updates other memory, in one piece.
        drop_memory((p for p in gpt.parameters() if p.requires_grad), settings.device)
    wrapped = DistributedDataParallel(
        gpt.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=settings.distributed,
            overlap_grad_reduce=False,
        ),
        gpt,
    )
    for layer in own:
        # Megatron has hung the buffers on the weights just now.
        layer.experts.adds_to_main_grads = settings.kind.keeps_ours
    optimizer = build_adamw(wrapped, held, rules, optim, settings)
    train_module = MegatronTrainModule(
        model, skeleton, wrapped, optimizer, rules, optim, layout, places, settings.device
    )
    # Now that everything lies where it stays.
    train_module.take(weights)
    return train_module
