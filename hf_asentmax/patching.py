"""From softmax to ASEntmax and back, on one model: :func:`patch_model`, :func:`unpatch_model`, :func:`set_alpha`.

Patching changes the class of a model's attention modules and of the models around them, and adds the parameters of the
query scale. The constructors of our own model classes do the same to themselves, so a patched model *is* one of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .attention import ATTENTION_NAME, REPLACEMENTS, ASEntmaxMixin
from .configuration_asentmax import CONFIG_CLASSES, ASEntmaxConfigMixin
from .methods import method_settings
from .model_mixin import PATCH_RECORD, ASEntmaxModelMixin, swap_classes
from .scaling import NEUTRAL_DELTA, QueryScale


@dataclass
class Patch:
    """What :func:`unpatch_model` restores: the configs by module name, and where the model came from."""

    configs: dict[str, PreTrainedConfig]
    name_or_path: str | None


def patch_model(
    model: PreTrainedModel,
    *,
    method: str = "asentmax",
    alpha: float | None = None,
    query_scaling: str | None = None,
    positions: str = "rope",
    alpha_learned: bool | None = None,
    attention_top_k: int | None = None,
    query_scale_delta: float | None = None,
    query_scale_gamma_range: float = 2.0,
    query_scale_gamma_center: float = 0.0,
    query_scale_length: int | None = None,
) -> PreTrainedModel:
    """Replaces the softmax attention of a model by ASEntmax, in place.

    The weights stay as they are; each attention layer gains the parameters of its query scale. The model becomes an
    ``ASEntmax<Family>...`` model: it saves, loads, generates and trains as one. Other models are left alone.

    Args:
        model: a Transformers causal LM, base model, or classifier of sequences or tokens, of a supported family. Patch
            the outermost model, since an unpatched one around it would not save as ASEntmax; patch before adapters are
            added.
        method: a key of :data:`hf_asentmax.METHODS`, whose values hold where the next arguments are left out.
        alpha: from 1 (softmax) to 2 (sparsemax).
        query_scaling: "none", "log" (SSMax), "static" or "adaptive" (ASEntmax).
        positions: "rope" keeps the family's own; "nope", "alibi" or "nape" replace them (and need training).
        alpha_learned: learn one alpha a head, starting from ``alpha``.
        attention_top_k: softmax over so many keys a query.
        query_scale_delta: the constant part of r; by default 1 - ln 2, so that r = 1 everywhere at the start.
        query_scale_gamma_range: how far the exponent of log n may go from its center.
        query_scale_gamma_center: where the exponent starts; with another than 0, r isn't 1 at the start.
        query_scale_length: the length at which "log" starts with r = 1; the model's context length by default.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: the model or a setting isn't supported. The model is then as it was.

    Reference: arXiv 2506.16640.
    """
    attentions = _check_patchable(model)
    given = {
        "entmax_alpha": alpha,
        "entmax_alpha_learned": alpha_learned,
        "query_scaling": query_scaling,
        "attention_top_k": attention_top_k,
    }
    settings = method_settings(method) | {name: value for name, value in given.items() if value is not None}
    settings |= {
        "positions": positions,
        "query_scale_delta": NEUTRAL_DELTA if query_scale_delta is None else query_scale_delta,
        "query_scale_gamma_range": query_scale_gamma_range,
        "query_scale_gamma_center": query_scale_gamma_center,
        "query_scale_length": query_scale_length,
    }
    originals = {
        name: m.config for name, m in model.named_modules() if isinstance(m.__dict__.get("config"), PreTrainedConfig)
    }
    converted = {id(config): _entmax_config(config, settings) for config in originals.values()}
    hooks = {name: module._hf_hook for name, module in attentions.items() if hasattr(module, "_hf_hook")}
    scales = {
        name: QueryScale(converted[id(module.config)])
        .to(device=_working_device(module), dtype=model.dtype)
        .train(module.training)
        for name, module in attentions.items()
    }

    # Nothing below can fail.
    patch = Patch(originals, model.name_or_path)
    _set_hooks(attentions, hooks, remove=True)
    for module in attentions.values():
        module.__dict__.pop("forward", None)  # the softmax class's own, bound; hooks leave it behind
    for name, module in model.named_modules():
        if name in originals:
            module.config = converted[id(originals[name])]
    swap_classes(model, scales)
    _set_hooks(attentions, hooks, remove=False)
    model.name_or_path = ""  # the softmax checkpoint is not where this model can be loaded from
    model.__dict__[PATCH_RECORD] = patch
    return model


def _check_patchable(model: Any) -> dict[str, Any]:
    """The attention modules by name; raises where the model isn't one that can be patched."""
    if hasattr(model, "peft_config") or (
        isinstance(model, nn.Module) and any(hasattr(module, "adapter_layer_names") for module in model.modules())
    ):
        raise TypeError(
            "model must be patched before PEFT wraps it, got a model with adapters; call patch_model(base), "
            'base.save_pretrained(folder), then get_peft_model(base, LoraConfig(..., modules_to_save=["query_scale"]))'
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a Transformers model, got {type(model).__name__}; "
            "patch it before torch.compile, DDP, FSDP or another wrapper takes it"
        )
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise TypeError(
            f"model must be patched before its weights are shared out to several processes, got {type(model).__name__} "
            "with sharded weights; patch it, save_pretrained(folder) in one process, and load that sharded"
        )
    if isinstance(model, ASEntmaxModelMixin):
        raise ValueError(
            f"model must use softmax attention, got {type(model).__name__}; call unpatch_model(model) first"
        )
    if type(model) not in REPLACEMENTS:
        supported = sorted(cls.__name__ for cls in REPLACEMENTS if issubclass(cls, PreTrainedModel))
        raise ValueError(
            f"model must be one of {', '.join(supported)}, got {type(model).__name__}; open an issue to add it"
        )
    attentions = {
        name: module
        for name, module in model.named_modules()
        if type(module) in REPLACEMENTS and not isinstance(module, PreTrainedModel)
    }
    if len(attentions) != model.config.num_hidden_layers:
        raise ValueError(
            f"model must have one attention module a layer ({model.config.num_hidden_layers}), "
            f"found {len(attentions)} to replace; another package has replaced some of them, undo that first"
        )
    for name, module in attentions.items():
        own = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            raise ValueError(
                f"{name}.forward must be the class's own, got one set on the instance, which would keep softmax; "
                "undo what replaced it first"
            )
    return attentions


def _working_device(attention: Any) -> torch.device:
    """Where an attention module computes: the new parameters stay there even if the rest is offloaded."""
    device: torch.device = next(attention.o_proj.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(attention.o_proj, "_hf_hook", None) or getattr(attention, "_hf_hook", None)
    working = getattr(hook, "execution_device", None)
    return device if hook is None else torch.device("cpu" if working is None else working)


def _set_hooks(attentions: dict[str, Any], hooks: dict[str, Any], remove: bool) -> None:
    """accelerate's hooks keep the forward that a module had when they were added: off before a swap, on after it."""
    if hooks:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        for name, hook in hooks.items():
            if remove:
                remove_hook_from_module(attentions[name])
                attentions[name].__dict__.pop("forward", None)  # accelerate puts the bound one of the old class back
            else:
                add_hook_to_module(attentions[name], hook)


def _entmax_config(config: PreTrainedConfig, settings: dict[str, Any]) -> ASEntmaxConfigMixin:
    converted: Any = copy.deepcopy(config)
    converted.__class__ = CONFIG_CLASSES[config.model_type]
    for name, value in settings.items():
        setattr(converted, name, value)
    if converted.query_scale_length is None:
        converted.query_scale_length = converted.max_position_embeddings
    converted._attn_implementation = ATTENTION_NAME
    converted._name_or_path = ""
    converted.validate_entmax()
    return converted


def _native_config(config: Any) -> PreTrainedConfig:
    native = copy.deepcopy(config)
    native.__class__ = type(config).__bases__[-1]
    for field in fields(ASEntmaxConfigMixin):
        native.__dict__.pop(field.name, None)
    native.__dict__.pop("auto_map", None)
    native._attn_implementation = None
    return native


def _keep_changes(config: Any, original: PreTrainedConfig) -> PreTrainedConfig:
    """The config of before, with what else was changed since (an embedding resized, a padding token set)."""
    ours = {field.name for field in fields(ASEntmaxConfigMixin)} | {"auto_map", "architectures", "_name_or_path"}
    ours |= {name for name in vars(config) if name.startswith("_attn_implementation")}
    vars(original).update({name: value for name, value in vars(config).items() if name not in ours})
    return original


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Turns an ASEntmax model into the family's own softmax model, in place: the parameters of the query scale are
    dropped and every other weight stays. A model patched by :func:`patch_model` becomes exactly what it was, but for
    what has been changed since.

    Raises:
        TypeError: the model isn't an ASEntmax model, or has adapters.
    """
    if not isinstance(model, ASEntmaxModelMixin) or hasattr(model, "peft_config"):
        raise TypeError(
            f"model must be an ASEntmax model without adapters, got {type(model).__name__}; "
            "merge_and_unload() adapters first"
        )
    patch = model.__dict__.pop(PATCH_RECORD, None)
    configs = {} if patch is None else patch.configs
    derived: dict[int, PreTrainedConfig] = {}
    native = {ours: original for original, ours in REPLACEMENTS.items()}
    attentions: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, ASEntmaxMixin)}
    hooks = {name: module._hf_hook for name, module in attentions.items() if hasattr(module, "_hf_hook")}
    _set_hooks(attentions, hooks, remove=True)
    for module in attentions.values():
        del module.query_scale
        module.__dict__.pop("scheduled_alpha", None)
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        if isinstance(config, ASEntmaxConfigMixin):
            if name not in configs:
                configs[name] = derived.setdefault(id(config), _native_config(config))
            elif id(config) not in derived:
                derived[id(config)] = _keep_changes(config, configs[name])
            module.config = configs[name]
        module.__class__ = native.get(type(module), type(module))
    _set_hooks(attentions, hooks, remove=False)
    if patch is None:
        model.config._attn_implementation_internal = model._check_and_adjust_attn_implementation(None)
    else:
        model.name_or_path = patch.name_or_path
    return model


def set_alpha(model: nn.Module, alpha: float, *, as_tensor: bool = False) -> None:
    """Changes the alpha that a model computes with, and ``config.entmax_alpha`` with it.

    Args:
        model: an ASEntmax model, also inside PEFT, DDP or another wrapper.
        alpha: from 1 to 2.
        as_tensor: hand alpha to the operators as a tensor, so that a schedule that moves it every step does not make
            ``torch.compile`` compile every step. A float (the default) gets the faster, specialised code.

    Raises:
        ValueError: alpha is out of range, no layer is ASEntmax, or alpha is learned.
    """
    layers: list[Any] = []
    configs: dict[int, Any] = {}  # a model around ours may hold another than the layers
    for module in model.modules():
        if isinstance(module, ASEntmaxMixin):
            layers.append(module)
        held = module.__dict__.get("config")
        if isinstance(held, PreTrainedConfig) and id(held) not in configs:
            for own in (held, *(getattr(held, name, None) for name in held.sub_configs)):
                configs[id(own)] = own
    if not layers:
        raise ValueError(
            f"model must have ASEntmax attention layers, got {type(model).__name__}; call patch_model first"
        )
    config = layers[0].config
    if config.entmax_alpha_learned:
        raise ValueError("alpha must not be set where it is learned (entmax_alpha_learned=True); patch without that")
    trial = copy.copy(config)
    trial.entmax_alpha = alpha
    trial.validate_entmax()
    scheduled: dict[torch.device, Tensor] = {}
    for own in configs.values():
        if isinstance(own, ASEntmaxConfigMixin):
            own.entmax_alpha = float(alpha)
    for layer in layers:
        device = layer.o_proj.weight.device
        if as_tensor and device not in scheduled:
            scheduled[device] = torch.tensor(float(alpha), device=device)
        layer.scheduled_alpha = scheduled.get(device)
