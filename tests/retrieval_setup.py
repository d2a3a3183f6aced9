"""A tokenizer for any text, a stand-in for a model that reads its prompt, and a model that always says the same."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from helpers import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>"]
VOCABULARY = len(SPECIAL) + 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; adds nothing by itself."""
    vocabulary = {symbol: i for i, symbol in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def constant_model(token: int, **overrides: Any) -> Any:
    """A model that always foretells `token`."""
    model = tiny_model("llama", **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1
    return model


class Reader:
    """Answers with the first number of its prompt, which is the one hidden there; keeps the prompts that it was given.

    Args:
        answer: what it writes; {} stands for the number.
        limit: max_position_embeddings.
    """

    def __init__(self, answer: str = " {}.", *, limit: int = 600) -> None:
        self.answer, self.tokenizer = answer, byte_tokenizer()
        self.config = SimpleNamespace(max_position_embeddings=limit)
        self.device, self.training = torch.device("cpu"), True
        self.prompts: list[str] = []
        self.room: list[int] = []

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool) -> None:
        self.training = mode

    def generate(
        self, input_ids: torch.Tensor, *, attention_mask: torch.Tensor, generation_config: Any
    ) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert not generation_config.do_sample
        assert attention_mask.shape == input_ids.shape
        prompt = self.tokenizer.decode(input_ids[0])
        self.prompts.append(prompt)
        self.room.append(generation_config.max_new_tokens)
        (number, *_) = re.findall(r"\d+", prompt)
        ids = self.tokenizer(self.answer.format(number))["input_ids"][: generation_config.max_new_tokens]
        return torch.cat([input_ids, torch.tensor([ids])], dim=1)
