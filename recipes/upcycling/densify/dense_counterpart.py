"""Finds the dense class of a mixture: the one whose export into the mixture's class gives its config back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe.errors import ModelError
from recipes.models.export import exporters
from recipes.models.export.native_format import NativeExporter, with_old_rope_keys
from recipes.models.export.spec import ModelSpec, MoESpec
from recipes.models.families.source_mixture import SourceMixture
from recipes.models.hf.config_file import read_config
from recipes.models.hf.ffn_names import FFNNames, ModelNames, read_names
from recipes.upcycling.reduce.mix_experts import read_expert

# Not about what a dense model computes: bookkeeping, losses in training, and which layers have experts of
# which width, which the files tell.
_NOT_COMPUTED = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("model_type", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise"),
    *("intermediate_size", "mlp_only_layers", "decoder_sparse_step", "initializer_range"),
}


def dense_counterpart(mixture: SourceMixture) -> tuple[ModelNames, dict[str, Any]]:
    """Returns the names in the dense model, and the content of its ``config.json``.

    Raises:
        ModelError: No dense class computes what is outside the experts, or they are no whole networks.
    """
    folder, trust = mixture.files.folder, mixture.runs_code
    if isinstance(inner := read_config(folder).get("dense_config"), dict):
        names, content = read_names(folder, trust_remote_code=trust), inner
    else:
        names = _of_family(mixture)
        content = with_old_rope_keys(names.config.to_dict())
    networks = {ffn.layer: ffn for ffn in names.ffns}
    for moe in mixture.spec.moe_blocks:
        _require_whole(mixture, moe, networks[moe.index])
    _require_same_tensors(mixture, names)
    dtype = str(mixture.format.dtype).removeprefix("torch.")
    return names, content | dict.fromkeys(("dtype", "torch_dtype"), dtype)


def _of_family(mixture: SourceMixture) -> ModelNames:
    kind = mixture.spec.config.model_type
    known = {name: one for name, one in exporters().items() if isinstance(one, NativeExporter)}
    folder = mixture.files.folder
    if kind not in known:
        rule = f"Graft knows no dense class that computes the rest of a {mixture.title}"
        remedy = f"It knows those of {', '.join(known)} and of its own format; graft prune or merge leaves "
        raise ModelError.one("MODEL", str(folder), rule, f"{remedy}fewer experts in any class.")
    reasons = []
    for dense in known[kind].models:
        config = _dense_config(mixture, dense)
        if (reason := _lost(mixture, known[kind], config)) is None:
            return read_names(folder, config=config)
        reasons.append(f"{dense} cannot hold {reason}")
    rule, remedy = "; ".join(reasons), "graft prune or merge leaves fewer experts in the class that it has."
    raise ModelError.one("MODEL", str(folder), rule, remedy)


def _dense_config(mixture: SourceMixture, dense: str) -> Any:
    """Returns a dense class's config with the mixture's values under all keys that both declare."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    declared, source = AutoConfig.for_model(dense).to_dict(), mixture.spec.config.to_dict()
    own = ("model_type", "architectures", "dtype", "transformers_version")
    values = {key: value for key, value in source.items() if key in declared and key not in own}
    values["intermediate_size"] = _width(mixture)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[dense]
    return AutoConfig.for_model(dense, **values, architectures=[architecture])


def _width(mixture: SourceMixture) -> int:
    """Returns the width of dense networks: the recorded one of a class that has two, else the experts'."""
    config, own = mixture.spec.config, mixture.spec.moe_blocks[0].expert.width
    names_both = getattr(config, "moe_intermediate_size", None) is not None
    return int(config.intermediate_size) if names_both else own


def _lost(mixture: SourceMixture, exporter: NativeExporter, config: Any) -> str | None:
    """Returns what an export of the dense model would have otherwise than the mixture; None if nothing."""
    spec = ModelSpec(config, config.architectures[0], mixture.spec.moe_blocks)
    if reason := exporter.model_reason(spec):
        return f"it ({reason})"
    want, have = exporter.config(spec), mixture.spec.config.to_dict()
    declared = type(config)().to_dict()
    for key in sorted(want.keys() & have.keys() - declared.keys() - _NOT_COMPUTED):
        if want[key] != have[key]:
            return f"{key}={have[key]!r} of its config.json"
    return None


def _require_whole(mixture: SourceMixture, moe: MoESpec, dense: FFNNames) -> None:
    """Refuses experts that are parts of a network, and shared experts that compute something."""
    if replace(moe.expert, width=dense.shape.width) != dense.shape:
        rule = f"the experts of layer {moe.index} are of another kind than the dense networks of its class"
        remedy = "graft prune or merge leaves fewer experts in the class that it has."
    elif moe.expert.width != dense.shape.width:
        rule = f"its experts in layer {moe.index} are {moe.expert.width} wide and its dense networks "
        rule += f"{dense.shape.width}: they are parts of a network, whose mean is none"
        remedy = "Take a mixture of whole copies, or graft prune or merge for fewer experts."
    elif _shares_rows(moe):
        rule = f"experts of layer {moe.index} share a router row: they are the parts of a virtual group, "
        rule, remedy = f"{rule}whose mean is no network", "Take a mixture of whole copies."
    elif moe.shared_width and not _shared_is_idle(mixture, moe):
        rule = f"layer {moe.index} has a shared expert beside the others, for which a dense network of "
        rule += f"{dense.shape.width} neurons has no room"
        remedy = "graft prune or merge leaves fewer experts, and the shared one as it is."
    else:
        return
    raise ModelError.one("MODEL", str(mixture.files.folder), rule, remedy)


def _shares_rows(moe: MoESpec) -> bool:
    rows_ED = moe.router.rows_ED()
    return rows_ED is not None and bool(rows_ED.any()) and bool(len(rows_ED.unique(dim=0)) < len(rows_ED))


def _shared_is_idle(mixture: SourceMixture, moe: MoESpec) -> bool:
    """Tells whether a shared expert adds nothing, as exports have it whose class needs one."""
    return not any(
        tensor.any() for (matrix, _), tensor in read_expert(mixture, moe, None).items() if matrix == "down"
    )


def _require_same_tensors(mixture: SourceMixture, names: ModelNames) -> None:
    """Checks that the dense model's tensors outside those layers are the mixture's, in name and shape."""
    sites = tuple(f"{moe.site}." for moe in mixture.spec.moe_blocks)
    want = {name: shape for name, shape in names.state.items() if not name.startswith(sites)}
    gates = {moe.shared_gate_name for moe in mixture.spec.moe_blocks if moe.shared_gate}
    have = {name: shape for name, shape in mixture.names.state.items() if name not in gates}
    differing = sorted(set(want.items()) ^ set(have.items()))
    if differing:
        rule = f"{differing[0][0]} is not alike in it and in its dense class, {names.architecture}"
        raise ModelError.one("MODEL", str(mixture.files.folder), rule, "graft prune leaves fewer experts.")
