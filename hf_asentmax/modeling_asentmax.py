"""Model classes: each family's own, with ASEntmax attention. Importing this module registers them with ``Auto``.

Each is the family's class with :class:`~hf_asentmax.model_mixin.ASEntmaxModelMixin` before it; what they add is told
there and in the config.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.mistral.modeling_mistral import (
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
)
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3ForCausalLM,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)

from .configuration_asentmax import (
    ASEntmaxLlamaConfig,
    ASEntmaxMistralConfig,
    ASEntmaxQwen2Config,
    ASEntmaxQwen3Config,
    ASEntmaxSmolLM3Config,
)
from .model_mixin import ASEntmaxModelMixin
from .patches.llama import ASEntmaxLlamaAttention  # noqa: F401  (registers itself)
from .patches.mistral import ASEntmaxMistralAttention  # noqa: F401  (registers itself)
from .patches.qwen2 import ASEntmaxQwen2Attention  # noqa: F401  (registers itself)
from .patches.qwen3 import ASEntmaxQwen3Attention  # noqa: F401  (registers itself)
from .patches.smollm3 import ASEntmaxSmolLM3Attention  # noqa: F401  (registers itself)


class ASEntmaxLlamaModel(ASEntmaxModelMixin, LlamaModel):
    """`LlamaModel` with ASEntmax attention."""

    config_class = ASEntmaxLlamaConfig


class ASEntmaxLlamaForCausalLM(ASEntmaxModelMixin, LlamaForCausalLM):
    """`LlamaForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxLlamaConfig


class ASEntmaxLlamaForSequenceClassification(ASEntmaxModelMixin, LlamaForSequenceClassification):
    """`LlamaForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxLlamaConfig


class ASEntmaxLlamaForTokenClassification(ASEntmaxModelMixin, LlamaForTokenClassification):
    """`LlamaForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxLlamaConfig


class ASEntmaxMistralModel(ASEntmaxModelMixin, MistralModel):
    """`MistralModel` with ASEntmax attention."""

    config_class = ASEntmaxMistralConfig


class ASEntmaxMistralForCausalLM(ASEntmaxModelMixin, MistralForCausalLM):
    """`MistralForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxMistralConfig


class ASEntmaxMistralForSequenceClassification(ASEntmaxModelMixin, MistralForSequenceClassification):
    """`MistralForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxMistralConfig


class ASEntmaxMistralForTokenClassification(ASEntmaxModelMixin, MistralForTokenClassification):
    """`MistralForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxMistralConfig


class ASEntmaxQwen2Model(ASEntmaxModelMixin, Qwen2Model):
    """`Qwen2Model` with ASEntmax attention."""

    config_class = ASEntmaxQwen2Config


class ASEntmaxQwen2ForCausalLM(ASEntmaxModelMixin, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxQwen2Config


class ASEntmaxQwen2ForSequenceClassification(ASEntmaxModelMixin, Qwen2ForSequenceClassification):
    """`Qwen2ForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxQwen2Config


class ASEntmaxQwen2ForTokenClassification(ASEntmaxModelMixin, Qwen2ForTokenClassification):
    """`Qwen2ForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxQwen2Config


class ASEntmaxQwen3Model(ASEntmaxModelMixin, Qwen3Model):
    """`Qwen3Model` with ASEntmax attention."""

    config_class = ASEntmaxQwen3Config


class ASEntmaxQwen3ForCausalLM(ASEntmaxModelMixin, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxQwen3Config


class ASEntmaxQwen3ForSequenceClassification(ASEntmaxModelMixin, Qwen3ForSequenceClassification):
    """`Qwen3ForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxQwen3Config


class ASEntmaxQwen3ForTokenClassification(ASEntmaxModelMixin, Qwen3ForTokenClassification):
    """`Qwen3ForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxQwen3Config


class ASEntmaxSmolLM3Model(ASEntmaxModelMixin, SmolLM3Model):
    """`SmolLM3Model` with ASEntmax attention."""

    config_class = ASEntmaxSmolLM3Config


class ASEntmaxSmolLM3ForCausalLM(ASEntmaxModelMixin, SmolLM3ForCausalLM):
    """`SmolLM3ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxSmolLM3Config


class ASEntmaxSmolLM3ForSequenceClassification(ASEntmaxModelMixin, SmolLM3ForSequenceClassification):
    """`SmolLM3ForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxSmolLM3Config


class ASEntmaxSmolLM3ForTokenClassification(ASEntmaxModelMixin, SmolLM3ForTokenClassification):
    """`SmolLM3ForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxSmolLM3Config


def register_auto_classes() -> None:
    """Makes ``AutoConfig`` and the ``AutoModel`` classes know every class of this module."""
    AutoConfig.register(ASEntmaxLlamaConfig.model_type, ASEntmaxLlamaConfig, exist_ok=True)
    AutoModel.register(ASEntmaxLlamaConfig, ASEntmaxLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(ASEntmaxLlamaConfig, ASEntmaxLlamaForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        ASEntmaxLlamaConfig, ASEntmaxLlamaForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(ASEntmaxLlamaConfig, ASEntmaxLlamaForTokenClassification, exist_ok=True)
    AutoConfig.register(ASEntmaxMistralConfig.model_type, ASEntmaxMistralConfig, exist_ok=True)
    AutoModel.register(ASEntmaxMistralConfig, ASEntmaxMistralModel, exist_ok=True)
    AutoModelForCausalLM.register(ASEntmaxMistralConfig, ASEntmaxMistralForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        ASEntmaxMistralConfig, ASEntmaxMistralForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(
        ASEntmaxMistralConfig, ASEntmaxMistralForTokenClassification, exist_ok=True
    )
    AutoConfig.register(ASEntmaxQwen2Config.model_type, ASEntmaxQwen2Config, exist_ok=True)
    AutoModel.register(ASEntmaxQwen2Config, ASEntmaxQwen2Model, exist_ok=True)
    AutoModelForCausalLM.register(ASEntmaxQwen2Config, ASEntmaxQwen2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        ASEntmaxQwen2Config, ASEntmaxQwen2ForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(ASEntmaxQwen2Config, ASEntmaxQwen2ForTokenClassification, exist_ok=True)
    AutoConfig.register(ASEntmaxQwen3Config.model_type, ASEntmaxQwen3Config, exist_ok=True)
    AutoModel.register(ASEntmaxQwen3Config, ASEntmaxQwen3Model, exist_ok=True)
    AutoModelForCausalLM.register(ASEntmaxQwen3Config, ASEntmaxQwen3ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        ASEntmaxQwen3Config, ASEntmaxQwen3ForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(ASEntmaxQwen3Config, ASEntmaxQwen3ForTokenClassification, exist_ok=True)
    AutoConfig.register(ASEntmaxSmolLM3Config.model_type, ASEntmaxSmolLM3Config, exist_ok=True)
    AutoModel.register(ASEntmaxSmolLM3Config, ASEntmaxSmolLM3Model, exist_ok=True)
    AutoModelForCausalLM.register(ASEntmaxSmolLM3Config, ASEntmaxSmolLM3ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        ASEntmaxSmolLM3Config, ASEntmaxSmolLM3ForSequenceClassification, exist_ok=True
    )
    AutoModelForTokenClassification.register(
        ASEntmaxSmolLM3Config, ASEntmaxSmolLM3ForTokenClassification, exist_ok=True
    )


register_auto_classes()
