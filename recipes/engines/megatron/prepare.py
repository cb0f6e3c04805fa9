"""From a host to what Megatron trains."""

from __future__ import annotations

from recipes.engines.megatron.gpt_model import build_gpt, keep_padding
from recipes.engines.megatron.gpt_shape import read_shape
from recipes.engines.megatron.hf_weights import (
    cut_experts,
    empty_host,
    find_parts,
    host_tensors,
    make_room,
    mark_parameters,
)
from recipes.engines.megatron.megatron_optimizer import build_adamw, rules_of
from recipes.engines.megatron.megatron_train_module import MegatronTrainable
from recipes.engines.megatron.rank_groups import Layout, Places
from recipes.engines.megatron.settings import Settings
from recipes.engines.megatron.stages import blocks_of_stages
from recipes.engines.optim.optimizer import OptimConfig
from recipes.models.hf.deferred_init import PresentWeights, drop_memory, stand_in
from recipes.models.hf.hf_model import HuggingFaceHost
from recipes.models.hf.skeleton import empty_copy


def prepare(
    host: HuggingFaceHost, optim: OptimConfig, layout: Layout, places: Places, settings: Settings
) -> MegatronTrainable:
    """Builds the model and its optimizer. Collective.

    Args:
        host: Afterwards names, routers and statistics are left of it.
        optim: Of AdamW.
        layout: Of the ranks.
        places: Of this rank.
        settings: Of the engine.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    skeleton = empty_copy(host)
    weights = PresentWeights(host_tensors(host), host.weights)
    host.weights = None
    stand_in(host.model, settings.device)
    rules = rules_of(host, optim)
    blocks = blocks_of_stages(read_shape(host.config.to_dict()).layers, layout.pipeline)[places.stage]
    own = [layer for index, layer in host.moe_layers() if index in blocks]
    for _, layer in host.moe_layers():
        layer.experts.ranks = layout.expert
        # An expert is read once for the tokens of all of these ranks, or of those beside them in its stage.
        layer.stats.readers = places.expert_group if layout.expert > 1 else None
    for layer in own:
        layer.router.to(settings.device)
        if layer.shared is not None:
            make_room(layer.shared, settings.device, settings.dtype)
        if settings.kind.keeps_ours:
            cut_experts(layer, places, layout, settings.device, settings.dtype)
    gpt = build_gpt(host, layout, places, settings)
    held = find_parts(gpt, host, places, layout)
    mark_parameters(held, layout)
    keep_padding(gpt, host, layout, places)
    empty_host(host, [each.tensor for each in held])
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
    trainable = MegatronTrainable(
        host, skeleton, wrapped, optimizer, rules, optim, layout, places, settings.device
    )
    # Now that everything lies where it stays.
    trainable.take(weights)
    return trainable
