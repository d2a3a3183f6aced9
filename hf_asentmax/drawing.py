"""What the generated tasks draw and label with. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

IGNORED = -100  # the label that the loss of Transformers skips
SPECIAL = ("<bos>", "<eos>", "<sep>")  # the first tokens of the paper's tasks; those without a target have no <sep>
BOS, EOS, SEP = range(3)


def check_at_least(owner: str, least: int, **values: int) -> None:
    """Raise ValueError unless every value is an integer of at least `least`; the message begins with the owner."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{owner} {name} must be an integer of at least {least}, got {value!r}; correct it")


def randint(high: int, *size: int, generator: torch.Generator) -> torch.Tensor:
    """Integers in [0, high), int64, on the generator's device."""
    return torch.randint(high, size, generator=generator, device=generator.device)


def rand(*size: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers in [0, 1), float32, on the generator's device."""
    return torch.rand(size, generator=generator, device=generator.device)


def distinct(count: int, high: int, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    """In each of `batch_size` rows `count` distinct integers in [0, high), in random order."""
    return rand(batch_size, high, generator=generator).topk(count).indices


def framed(tokens: torch.Tensor) -> torch.Tensor:
    """Return `<bos> tokens <eos>`, (B, T + 2), of tokens (B, T)."""
    return pad(pad(tokens, (1, 0), value=BOS), (0, 1), value=EOS)


def tail_labels(input_ids: torch.Tensor, answer: int) -> torch.Tensor:
    """Labels for sequences (B, T) that end in an answer of `answer` tokens."""
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -answer:] = input_ids[:, -answer:]
    return labels


def source_to_target(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `<bos> source <sep> target <eos>` and its labels, those of the target and `<eos>`.

    Args:
        source: (B, S), int64.
        target: (B, T), int64.

    Returns:
        `(input_ids, labels)`, both (B, S + T + 3), int64.
    """
    input_ids = framed(torch.cat([pad(source, (0, 1), value=SEP), target], 1))
    return input_ids, tail_labels(input_ids, target.shape[1] + 1)


def token_classes(source: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `<bos> source <eos>` and the labels by which each token of the source predicts its own class.

    The loss of a causal language model compares the prediction at place t with the label at t + 1, so the class of a
    token stands one place behind it.

    Args:
        source: (B, S), int64.
        classes: (B, S), int64, as token ids.

    Returns:
        `(input_ids, labels)`, both (B, S + 2), int64.
    """
    return framed(source), pad(classes, (2, 0), value=IGNORED)
