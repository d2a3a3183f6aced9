"""Model classes: each family's own, with ASEntmax attention. Importing this module registers them with ``Auto``.

Each is the family's class with :class:`~hf_asentmax.model_mixin.ASEntmaxModelMixin` before it; what they add is told
there and in the config.
"""

from __future__ import annotations

import transformers
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
)
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
)
from transformers.models.granite.modeling_granite import (
    GraniteForCausalLM,
    GraniteModel,
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
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2ForCausalLM,
    Olmo2ForSequenceClassification,
    Olmo2Model,
)
from transformers.models.phi3.modeling_phi3 import (
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
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
    CONFIG_CLASSES,
    ASEntmaxGemma2Config,
    ASEntmaxGemma3TextConfig,
    ASEntmaxGraniteConfig,
    ASEntmaxLlamaConfig,
    ASEntmaxMistralConfig,
    ASEntmaxOlmo2Config,
    ASEntmaxPhi3Config,
    ASEntmaxQwen2Config,
    ASEntmaxQwen3Config,
    ASEntmaxSmolLM3Config,
)
from .model_mixin import ASEntmaxModelMixin
from .patches.gemma2 import ASEntmaxGemma2Attention  # noqa: F401  (registers itself)
from .patches.gemma3_text import ASEntmaxGemma3TextAttention  # noqa: F401  (registers itself)
from .patches.granite import ASEntmaxGraniteAttention  # noqa: F401  (registers itself)
from .patches.llama import ASEntmaxLlamaAttention  # noqa: F401  (registers itself)
from .patches.mistral import ASEntmaxMistralAttention  # noqa: F401  (registers itself)
from .patches.olmo2 import ASEntmaxOlmo2Attention  # noqa: F401  (registers itself)
from .patches.phi3 import ASEntmaxPhi3Attention  # noqa: F401  (registers itself)
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


class ASEntmaxGemma2Model(ASEntmaxModelMixin, Gemma2Model):
    """`Gemma2Model` with ASEntmax attention."""

    config_class = ASEntmaxGemma2Config


class ASEntmaxGemma2ForCausalLM(ASEntmaxModelMixin, Gemma2ForCausalLM):
    """`Gemma2ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxGemma2Config


class ASEntmaxGemma2ForSequenceClassification(ASEntmaxModelMixin, Gemma2ForSequenceClassification):
    """`Gemma2ForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxGemma2Config


class ASEntmaxGemma2ForTokenClassification(ASEntmaxModelMixin, Gemma2ForTokenClassification):
    """`Gemma2ForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxGemma2Config


class ASEntmaxGemma3TextModel(ASEntmaxModelMixin, Gemma3TextModel):
    """`Gemma3TextModel` with ASEntmax attention."""

    config_class = ASEntmaxGemma3TextConfig


class ASEntmaxGemma3TextForCausalLM(ASEntmaxModelMixin, Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxGemma3TextConfig


class ASEntmaxGemma3TextForSequenceClassification(ASEntmaxModelMixin, Gemma3TextForSequenceClassification):
    """`Gemma3TextForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxGemma3TextConfig


class ASEntmaxGraniteModel(ASEntmaxModelMixin, GraniteModel):
    """`GraniteModel` with ASEntmax attention."""

    config_class = ASEntmaxGraniteConfig


class ASEntmaxGraniteForCausalLM(ASEntmaxModelMixin, GraniteForCausalLM):
    """`GraniteForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxGraniteConfig


class ASEntmaxOlmo2Model(ASEntmaxModelMixin, Olmo2Model):
    """`Olmo2Model` with ASEntmax attention."""

    config_class = ASEntmaxOlmo2Config


class ASEntmaxOlmo2ForCausalLM(ASEntmaxModelMixin, Olmo2ForCausalLM):
    """`Olmo2ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxOlmo2Config


class ASEntmaxOlmo2ForSequenceClassification(ASEntmaxModelMixin, Olmo2ForSequenceClassification):
    """`Olmo2ForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxOlmo2Config


class ASEntmaxPhi3Model(ASEntmaxModelMixin, Phi3Model):
    """`Phi3Model` with ASEntmax attention."""

    config_class = ASEntmaxPhi3Config


class ASEntmaxPhi3ForCausalLM(ASEntmaxModelMixin, Phi3ForCausalLM):
    """`Phi3ForCausalLM` with ASEntmax attention."""

    config_class = ASEntmaxPhi3Config


class ASEntmaxPhi3ForSequenceClassification(ASEntmaxModelMixin, Phi3ForSequenceClassification):
    """`Phi3ForSequenceClassification` with ASEntmax attention."""

    config_class = ASEntmaxPhi3Config


class ASEntmaxPhi3ForTokenClassification(ASEntmaxModelMixin, Phi3ForTokenClassification):
    """`Phi3ForTokenClassification` with ASEntmax attention."""

    config_class = ASEntmaxPhi3Config


def register_auto_classes() -> None:
    """Makes ``AutoConfig`` and the ``AutoModel`` classes know every class of this module."""
    for config in CONFIG_CLASSES.values():
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, name in config.class_names().items():
            getattr(transformers, auto).register(config, globals()[name], exist_ok=True)


register_auto_classes()
