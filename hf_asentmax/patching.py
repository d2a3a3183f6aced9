"""From softmax to ASEntmax and back, on one model: :func:`patch_model`, :func:`unpatch_model`, :func:`set_alpha`.

Patching changes the class of a model's attention modules and of the models around them, and adds the parameters of the
query scale. The constructors of our own model classes do the same to themselves, so a patched model *is* one of them.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention import ATTENTION_NAME, REPLACEMENTS, ASEntmaxMixin
from .configuration_asentmax import CONFIG_CLASSES, ASEntmaxConfigMixin
from .saving import staged
from .scaling import NEUTRAL_DELTA, QueryScale, QueryScaleLinear


class ASEntmaxModelMixin(PreTrainedModel):
    """Mixed in before a family's model class: attention is ASEntmax, and nothing else can be had by accident."""

    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False  # no serving engine may put its own attention in

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if ASEntmaxModelMixin in cls.__bases__:
            REPLACEMENTS[cls.__bases__[-1]] = cls
            # Transformers notes a class's recordable outputs when one is constructed, which a swapped one never was.
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # A classifier builds its base model through AutoModel, which must know the class of this very config.
        native: Any = AutoModel._model_mapping.get(type(config).__bases__[-1], None)
        if native in REPLACEMENTS:
            AutoModel.register(type(config), REPLACEMENTS[native], exist_ok=True)
        super().__init__(config, *args, **kwargs)
        _swap_classes(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QueryScaleLinear):
            initialization.zeros_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, QueryScale):
            module.reset_parameters(initialization)
        else:
            super()._init_weights(module)

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, ATTENTION_NAME):
            raise ValueError(
                f'attn_implementation must be "{ATTENTION_NAME}" for {type(self).__name__}, '
                f"got {attn_implementation!r}; leave it out, or call unpatch_model(model) to return to softmax"
            )
        return ATTENTION_NAME

    def get_correct_attn_implementation(self, requested_attention: Any, *args: Any, **kwargs: Any) -> str:
        return self._check_and_adjust_attn_implementation(requested_attention)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever, but all files or none. A model patched in memory is from then on known by this folder."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        with (
            nullcontext(save_directory)
            if distributed or kwargs.get("push_to_hub")
            else staged(save_directory) as target
        ):
            super().save_pretrained(target, *args, **kwargs)
        if not self.name_or_path:
            self.name_or_path = str(save_directory)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT saves an adapter with the name of its base. A base that exists nowhere would be looked for under the
        # name of the softmax checkpoint it was made from.
        adapters = getattr(self, "peft_config", {})
        if str(kwargs.get("prefix", "")).startswith("base_model.") and not all(
            adapter.base_model_name_or_path for adapter in adapters.values()
        ):
            raise RuntimeError(
                "an adapter must be saved with the name of its converted base, got a base that was patched in memory "
                "only; call model.save_pretrained(folder) on the patched model before get_peft_model"
            )
        return super().state_dict(*args, **kwargs)


def _swap_classes(model: nn.Module) -> None:
    for module in model.modules():
        replacement = REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
            if isinstance(module, ASEntmaxMixin):
                module.add_query_scale()


_RECORD = "_asentmax_patch"


@dataclass
class Patch:
    """What :func:`unpatch_model` restores: the configs by module name, and where the model came from."""

    configs: dict[str, PreTrainedConfig]
    name_or_path: str | None


def patch_model(
    model: PreTrainedModel,
    *,
    alpha: float = 1.5,
    query_scaling: str = "adaptive",
    positions: str = "rope",
    alpha_learned: bool = False,
    query_scale_delta: float | None = None,
    query_scale_gamma_range: float = 2.0,
    query_scale_length: int | None = None,
) -> PreTrainedModel:
    """Replaces the softmax attention of a model by ASEntmax, in place.

    The weights stay as they are; each attention layer gains the parameters of its query scale. The model becomes an
    ``ASEntmax<Family>...`` model: it saves, loads, generates and trains as one. Other models are left alone.

    Args:
        model: a Transformers causal LM, base model or sequence classifier of a supported family.
        alpha: from 1 (softmax) to 2 (sparsemax).
        query_scaling: "none", "log" (SSMax), "static" or "adaptive" (ASEntmax).
        positions: "rope" keeps the family's own; "nope", "alibi" or "nape" replace them (and need training).
        alpha_learned: learn one alpha a head, starting from ``alpha``.
        query_scale_delta: the constant part of r; by default 1 - ln 2, so that r = 1 everywhere at the start.
        query_scale_gamma_range: bound of the exponent of log n.
        query_scale_length: the length at which "log" starts with r = 1; the model's context length by default.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: the model or a setting isn't supported. The model is then as it was.

    Reference: arXiv 2506.16640.
    """
    attentions = _check_patchable(model)
    settings = {
        "entmax_alpha": alpha,
        "entmax_alpha_learned": alpha_learned,
        "query_scaling": query_scaling,
        "positions": positions,
        "query_scale_delta": NEUTRAL_DELTA if query_scale_delta is None else query_scale_delta,
        "query_scale_gamma_range": query_scale_gamma_range,
        "query_scale_length": query_scale_length,
    }
    originals = {
        name: m.config for name, m in model.named_modules() if isinstance(m.__dict__.get("config"), PreTrainedConfig)
    }
    converted = {id(config): _entmax_config(config, settings) for config in originals.values()}
    hooks = {name: module._hf_hook for name, module in attentions.items() if hasattr(module, "_hf_hook")}
    weights = {name: next(module.q_proj.parameters()) for name, module in attentions.items()}
    float_dtype = model.dtype

    patch = Patch(originals, model.name_or_path)
    _set_hooks(attentions, hooks, remove=True)
    for name, module in model.named_modules():
        if name in originals:
            module.config = converted[id(originals[name])]
    _swap_classes(model)
    for name, module in attentions.items():
        device = weights[name].device
        if device.type == "meta" and name in hooks:  # offloaded: the new parameters are small and stay at work
            device = hooks[name].execution_device or torch.device("cpu")
        module.query_scale.to(device=device, dtype=float_dtype)
    _set_hooks(attentions, hooks, remove=False)
    model.name_or_path = ""  # the softmax checkpoint is not where this model can be loaded from
    model.__dict__[_RECORD] = patch
    return model


def _check_patchable(model: Any) -> dict[str, Any]:
    """The attention modules by name; raises where the model isn't one that can be patched."""
    if hasattr(model, "peft_config"):
        raise TypeError(
            "model must be patched before PEFT wraps it, got a model with adapters; call patch_model(base), "
            'base.save_pretrained(folder), then get_peft_model(base, LoraConfig(..., modules_to_save=["query_scale"]))'
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a Transformers model, got {type(model).__name__}; "
            "patch it before torch.compile, DDP, FSDP or another wrapper takes it"
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
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name}.forward must be the class's own, got one set on the instance, which would keep softmax; "
                "undo what replaced it first"
            )
    return attentions


def _set_hooks(attentions: dict[str, Any], hooks: dict[str, Any], remove: bool) -> None:
    """accelerate's hooks keep the forward that a module had when they were added: off before a swap, on after it."""
    if hooks:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        for name, hook in hooks.items():
            if remove:
                remove_hook_from_module(attentions[name])
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


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Turns an ASEntmax model into the family's own softmax model, in place: the parameters of the query scale are
    dropped and every other weight stays. A model patched by :func:`patch_model` becomes exactly what it was.

    Raises:
        TypeError: the model isn't an ASEntmax model, or has adapters.
    """
    if not isinstance(model, ASEntmaxModelMixin) or hasattr(model, "peft_config"):
        raise TypeError(
            f"model must be an ASEntmax model without adapters, got {type(model).__name__}; "
            "merge_and_unload() adapters first"
        )
    patch = model.__dict__.pop(_RECORD, None)
    configs = {} if patch is None else patch.configs
    derived: dict[int, PreTrainedConfig] = {}
    native = {ours: original for original, ours in REPLACEMENTS.items()}
    attentions: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, ASEntmaxMixin)}
    hooks = {name: module._hf_hook for name, module in attentions.items() if hasattr(module, "_hf_hook")}
    _set_hooks(attentions, hooks, remove=True)
    for module in attentions.values():
        del module.query_scale
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        if isinstance(config, ASEntmaxConfigMixin):
            module.config = configs.get(name) or derived.setdefault(id(config), _native_config(config))
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
    layers: list[Any] = [module for module in model.modules() if isinstance(module, ASEntmaxMixin)]
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
    for layer in layers:
        layer.config.entmax_alpha = float(alpha)
        device = layer.o_proj.weight.device
        if as_tensor and device not in scheduled:
            scheduled[device] = torch.tensor(float(alpha), device=device)
        layer.scheduled_alpha = scheduled.get(device)
