"""What every ASEntmax model class adds to its family's: attention that is ASEntmax, and no way round it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention import ATTENTION_NAME, REPLACEMENTS, ASEntmaxMixin
from .saving import check_adapter_base, staged
from .scaling import QueryScale, QueryScaleLinear, tensor_parallel_plan
from .validation import check_checkpoint

PATCH_RECORD = "_asentmax_patch"  # where a model patched in memory keeps what unpatch_model restores


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
        config = copy.copy(config)  # its own: set_alpha must not reach another model
        config.base_model_tp_plan = {**(config.base_model_tp_plan or {}), **tensor_parallel_plan(config)}
        super().__init__(config, *args, **kwargs)
        for module in self.modules():
            if type(module.__dict__.get("config")) is type(config):
                # One for all: a base model inside, built by this method too, has made its own.
                module.config = config  # type: ignore[assignment]
        swap_classes(self)
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

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses: the paged cache of ``generate_batch`` and ``transformers serve`` brings a softmax of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"continuous batching must run a softmax model, got {type(self).__name__}, whose attention it would "
            "replace; call model.generate on a batch padded on the left, which computes each row as on its own"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As ever, but from safetensors only, unless ``use_safetensors=False``: a pickle can hold code. A truncated or
        corrupt file of a local checkpoint is named.

        Raises:
            OSError: the checkpoint has no safetensors.
            ValueError: a weight file is not whole.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError:
            if pretrained_model_name_or_path is not None and Path(pretrained_model_name_or_path).is_dir():
                check_checkpoint(pretrained_model_name_or_path)
            raise

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever, but all files or none. A model patched in memory is known by the folder it was last saved in."""
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if adapter:
            check_adapter_base(self.name_or_path, self.config.entmax_alpha)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        with (
            nullcontext(save_directory)
            if distributed or kwargs.get("push_to_hub")
            else staged(save_directory) as target
        ):
            super().save_pretrained(target, *args, **kwargs)
        if PATCH_RECORD in self.__dict__ and not adapter:
            # PEFT and Transformers read the model's, TRL (for the reference of DPO) the config's.
            self.name_or_path = self.config._name_or_path = str(save_directory)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT saves an adapter with the name of its base, and takes the weights through here.
        if str(kwargs.get("prefix", "")).startswith("base_model."):
            for adapter in getattr(self, "peft_config", {}).values():
                check_adapter_base(adapter.base_model_name_or_path, self.config.entmax_alpha)
        return super().state_dict(*args, **kwargs)


def swap_classes(model: nn.Module, scales: dict[str, QueryScale] | None = None) -> None:
    """Turns a native model, built or loaded, into ours: classes change in place, parameters of the scale are added.

    Args:
        model: the model.
        scales: the query scale of each attention module by its name; new ones where there is none.
    """
    for name, module in model.named_modules():
        replacement = REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
            if isinstance(module, ASEntmaxMixin):
                module.query_scale = QueryScale(module.config) if scales is None else scales[name]
