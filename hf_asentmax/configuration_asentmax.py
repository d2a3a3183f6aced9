"""Config classes: each family's own config with the settings of ASEntmax, and a model type of its own.

The own model type keeps ``Auto`` classes from building a softmax model out of an ASEntmax checkpoint; the saved
``attn_implementation`` does the same for a native class that is pointed at the folder by hand.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from .positions import POSITIONS
from .saving import modeling_source
from .scaling import LEARNED_ALPHA_RANGE, QUERY_SCALINGS

AUTO_CLASSES = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}


def auto_class(architecture: str) -> str:
    """The Auto class that builds a model class of this package, both by name."""
    return next(auto for auto, suffix in AUTO_CLASSES.items() if architecture.endswith(suffix))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _extend_peft_defaults(model_type: str, family: str) -> None:
    """PEFT's default target modules of a family hold for our model type too, in the tables of all its methods.

    Does nothing where PEFT isn't imported, or has no default for the family.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in () if constants is None else list(vars(constants).items()):
        if name.endswith("_MODULES_MAPPING") and family in table:
            table.setdefault(model_type, table[family])


@dataclass(kw_only=True, repr=False)
class ASEntmaxConfigMixin:
    """The settings of ASEntmax, beside those of the family.

    Args:
        entmax_alpha: from 1 (softmax) to 2 (sparsemax). What the model computes now; where alpha is learned, its start.
        entmax_alpha_learned: learn one alpha a head, within (1.01, 2).
        query_scaling: "none", "log" (SSMax), "static" or "adaptive" (ASEntmax); see :class:`hf_asentmax.QueryScale`.
        positions: "rope" (the family's own), "nope", "alibi" or "nape" (half of the heads ALiBi, half NoPE).
        query_scale_delta: the constant part of r; 1 from scratch, 1 - ln 2 for r = 1 at the start of a converted model.
        query_scale_gamma_range: c; the exponent of log n is within c of its center.
        query_scale_gamma_center: m, from which the exponent starts; with m = c = 1 r never falls as n grows.
        query_scale_length: the training length, at which SSMax starts with r = 1, and the others with r = delta + ln 2;
            ``max_position_embeddings`` if None.
        attention_top_k: softmax over the so many largest scores of each query; None for all. Needs ``entmax_alpha`` 1.
        adaptive_temperature: softmax that sharpens where a query's weights spread, in eval mode only: it has no
            gradient (arXiv 2410.01104). Needs ``entmax_alpha`` 1.

    Each method of the papers is a choice of these values: :data:`hf_asentmax.METHODS`.

    Reference: arXiv 2506.16640.
    """

    without: ClassVar[tuple[str, ...]] = ()  # the Auto classes for which Transformers has no class of the family

    entmax_alpha: float | int = 1.5
    entmax_alpha_learned: bool = False
    query_scaling: str = "adaptive"
    positions: str = "rope"
    query_scale_delta: float | int = 1.0
    query_scale_gamma_range: float | int = 2.0
    query_scale_gamma_center: float | int = 0.0
    query_scale_length: int | None = None
    attention_top_k: int | None = None
    adaptive_temperature: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.query_scale_length is None:
            self.query_scale_length = self.max_position_embeddings  # type: ignore[attr-defined]
        if getattr(self, "_attn_implementation", None) is None:
            self.__setattr__("_attn_implementation", "asentmax")
        self.validate_entmax()

    def validate_entmax(self) -> None:
        """Raises ValueError for a setting outside its rule."""
        alpha, (low, high) = self.entmax_alpha, LEARNED_ALPHA_RANGE
        if not _is_number(alpha) or not 1.0 <= alpha <= 2.0:
            raise ValueError(f"entmax_alpha must be between 1 (softmax) and 2 (sparsemax), got {alpha!r}; try 1.5")
        for name in ("query_scale_delta", "query_scale_gamma_range", "query_scale_gamma_center"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}; try the default")
        for name in ("entmax_alpha_learned", "adaptive_temperature"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        k = self.attention_top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"attention_top_k must be a positive number of keys or None, got {k!r}; try 64")
        if k is not None and self.adaptive_temperature:
            raise ValueError(f"attention_top_k must be None with adaptive_temperature, got {k!r}; choose one of them")
        if (k is not None or self.adaptive_temperature) and (alpha != 1.0 or self.entmax_alpha_learned):
            what = "attention_top_k" if k is not None else "adaptive_temperature"
            raise ValueError(f"entmax_alpha must be 1, not learned, with {what}, which is softmax; got {alpha!r}")
        if self.entmax_alpha_learned and not low < alpha < high:
            raise ValueError(
                f"entmax_alpha must start between {low} and {high} where it is learned, got {alpha!r}; start at 1.5"
            )
        for name, value, allowed in (
            ("query_scaling", self.query_scaling, QUERY_SCALINGS),
            ("positions", self.positions, POSITIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.query_scale_gamma_range <= 0:
            raise ValueError(f"query_scale_gamma_range must be positive, got {self.query_scale_gamma_range!r}; try 2")
        length = self.query_scale_length
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"query_scale_length must be a positive number of tokens, got {length!r}; pass the training length"
            )
        if getattr(self, "attention_dropout", 0.0):
            raise ValueError(
                f"attention_dropout must be 0 for ASEntmax, got {self.attention_dropout!r}; "  # type: ignore[attr-defined]
                "dropping weights of a sparse map is not defined in the papers; set it to 0"
            )
        if getattr(self, "attn_logit_softcapping", None) is not None:
            raise ValueError(
                f"attn_logit_softcapping must be None for ASEntmax, got {self.attn_logit_softcapping!r}; "  # type: ignore[attr-defined]
                "entmax of capped scores is not defined in the papers. Load the model, or write its config.json, with "
                "None, which uncaps the scores, and fine-tune"
            )
        if getattr(self, "use_bidirectional_attention", False):
            raise ValueError(
                "use_bidirectional_attention must be False for ASEntmax, which is causal, got True; "
                "use a model that was trained with causal attention"
            )

    @property
    def family(self) -> str:
        """The native model type, such as ``llama``."""
        return self.model_type.removeprefix("asentmax_")  # type: ignore[attr-defined]

    @classmethod
    def class_names(cls) -> dict[str, str]:
        """The names of the family's model classes, by the Auto class that builds each."""
        prefix = cls.__name__.removesuffix("Config")
        return {auto: prefix + suffix for auto, suffix in AUTO_CLASSES.items() if auto not in cls.without}

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """As the family's, with the modeling code beside config.json, which names it in ``auto_map``. Every model
        and Trainer checkpoint is saved through here."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        code = directory / f"modeling_asentmax_{self.family}.py"
        code.write_text(modeling_source(self.family), encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As the family's, with what a loader must know: the attention implementation, and where the code lies."""
        # PEFT takes the model type from here each time that it looks up a default: whichever was imported first.
        _extend_peft_defaults(self.model_type, self.family)  # type: ignore[attr-defined]
        output = super().to_dict()  # type: ignore[misc]
        classes = {"AutoConfig": type(self).__name__} | self.class_names()
        output["attn_implementation"] = "asentmax"
        output["auto_map"] = {auto: f"modeling_asentmax_{self.family}.{name}" for auto, name in classes.items()}
        return output


class ASEntmaxLlamaConfig(ASEntmaxConfigMixin, LlamaConfig):
    """`LlamaConfig` with the settings of ASEntmax."""

    model_type = "asentmax_llama"


class ASEntmaxMistralConfig(ASEntmaxConfigMixin, MistralConfig):
    """`MistralConfig` with the settings of ASEntmax."""

    model_type = "asentmax_mistral"


class ASEntmaxQwen2Config(ASEntmaxConfigMixin, Qwen2Config):
    """`Qwen2Config` with the settings of ASEntmax."""

    model_type = "asentmax_qwen2"


class ASEntmaxQwen3Config(ASEntmaxConfigMixin, Qwen3Config):
    """`Qwen3Config` with the settings of ASEntmax."""

    model_type = "asentmax_qwen3"


class ASEntmaxSmolLM3Config(ASEntmaxConfigMixin, SmolLM3Config):
    """`SmolLM3Config` with the settings of ASEntmax."""

    model_type = "asentmax_smollm3"


class ASEntmaxGemma2Config(ASEntmaxConfigMixin, Gemma2Config):
    """`Gemma2Config` with the settings of ASEntmax, and scores that are not capped."""

    model_type = "asentmax_gemma2"
    attn_logit_softcapping: float | None = None


class ASEntmaxGemma3TextConfig(ASEntmaxConfigMixin, Gemma3TextConfig):
    """`Gemma3TextConfig` with the settings of ASEntmax."""

    model_type = "asentmax_gemma3_text"
    without = ("AutoModelForTokenClassification",)


class ASEntmaxGraniteConfig(ASEntmaxConfigMixin, GraniteConfig):
    """`GraniteConfig` with the settings of ASEntmax."""

    model_type = "asentmax_granite"
    without = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")


class ASEntmaxOlmo2Config(ASEntmaxConfigMixin, Olmo2Config):
    """`Olmo2Config` with the settings of ASEntmax."""

    model_type = "asentmax_olmo2"
    without = ("AutoModelForTokenClassification",)


class ASEntmaxPhi3Config(ASEntmaxConfigMixin, Phi3Config):
    """`Phi3Config` with the settings of ASEntmax."""

    model_type = "asentmax_phi3"


CONFIG_CLASSES = {
    config.model_type.removeprefix("asentmax_"): config
    for config in (
        ASEntmaxLlamaConfig,
        ASEntmaxMistralConfig,
        ASEntmaxQwen2Config,
        ASEntmaxQwen3Config,
        ASEntmaxSmolLM3Config,
        ASEntmaxGemma2Config,
        ASEntmaxGemma3TextConfig,
        ASEntmaxGraniteConfig,
        ASEntmaxOlmo2Config,
        ASEntmaxPhi3Config,
    )
}
