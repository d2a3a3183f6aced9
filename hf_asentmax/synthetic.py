"""Models that learn a generated task from scratch: their sizes, and data drawn on the device that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, cast

import torch
from torch.nn.functional import pad
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_asentmax import CONFIG_CLASSES
from .methods import method_settings
from .tasks import IGNORED, RetrievalTask, sample_batch, stream_seed

# Layers, width, heads and width of the MLP in arXiv 2506.16640; of the tasks that it does not list, the smallest.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "mqmtar": (4, 512, 16, 1024),
    "reverse": (6, 256, 8, 1024),
    "sort": (2, 256, 8, 1024),
    "copy": (2, 256, 16, 1024),
}
DEFAULT_SIZES = (2, 256, 8, 1024)
QUERY_NORM = 0.2  # where the weights of a model's query norm start
# Gemma 2's layers as the paper has them: no soft cap, scores over 16 whatever the head dim.
GEMMA2: dict[str, Any] = {"final_logit_softcapping": None, "query_pre_attn_scalar": 256}


class TaskStream(IterableDataset):
    """Batches of a task's training stream, whole, on the device; the Trainer takes them as they are.

    Each row draws its length from the range. All are filled up at their end to the longest, so that every batch has one
    shape (and a compiled model one graph); with causal attention the tokens of a row don't see what follows them, and
    no loss is taken there. A resumed run goes on with the data that it would have had.

    Args:
        task: what to draw.
        batch_size: sequences a batch.
        lengths: of the source, (low, high), both included. Of a task whose lengths go up in steps (`length_step`, 2 for
            flip-flop) those that low and steps reach.
        seed: of the experiment.
        device: where the sequences are drawn and live.
        process: this process among all; each has sequences of its own.
        processes: how many there are.

    Raises:
        ValueError: the lengths are not such a pair, or the task refuses one of them.
    """

    POOL = 64  # batches drawn at once: one call a length, however many batches

    def __init__(
        self,
        task: RetrievalTask,
        batch_size: int,
        lengths: tuple[int, int],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise ValueError(
                f"training lengths must be a pair (low, high) of 1 <= low <= high, got {lengths!r}; give two integers"
            )
        self.task, self.batch_size = task, batch_size
        self.lengths = range(lengths[0], lengths[1] + 1, getattr(task, "length_step", 1))
        self.seed, self.device = seed, device
        self.process, self.processes = process, processes
        self.begin: Callable[[], int] = lambda: 0  # the Trainer says how many batches a resumed run has had
        self.tokens = max(sample_batch(task, 1, length)["labels"].shape[1] for length in self.lengths)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rows: dict[str, torch.Tensor] = {}
        for index in count(self.begin()):
            pool, batch = divmod(index, self.POOL)
            if batch == 0 or not rows:
                rows = self._draw(pool * self.processes + self.process)
            own = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield {name: x[own] for name, x in rows.items()}

    def _draw(self, pool: int) -> dict[str, torch.Tensor]:
        """The rows of some batches, in random order."""
        seed = stream_seed(self.task, "lengths", self.seed, pool, self.lengths)
        chosen = torch.randint(
            len(self.lengths), (self.POOL * self.batch_size,), generator=torch.Generator().manual_seed(seed)
        )
        drawn = [
            sample_batch(self.task, rows, length, seed=self.seed, index=pool, device=self.device)
            for length, rows in zip(self.lengths, chosen.bincount(minlength=len(self.lengths)).tolist(), strict=True)
            if rows
        ]
        generator = torch.Generator(device=self.device).manual_seed(seed)  # not on the CPU: a copy waits for the device
        order = torch.randperm(len(chosen), generator=generator, device=self.device)

        def joined(name: str, filler: int) -> torch.Tensor:
            rows = [pad(batch[name], (0, self.tokens - batch[name].shape[1]), value=filler) for batch in drawn]
            return torch.cat(rows)[order]

        return {"input_ids": joined("input_ids", 0), "labels": joined("labels", IGNORED)}


def build_synthetic_model(
    task: RetrievalTask,
    method: str,
    *,
    positions: str = "nape",
    family: str = "llama",
    length: int = 64,
    sizes: tuple[int, int, int, int] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A model from scratch over a task's vocabulary, float32.

    Its input embeddings are drawn from N(0, 1), `torch.nn.Embedding`'s own distribution, not with the config's
    `initializer_range`: symbols that are nearly orthogonal from the start are told apart sooner (docs/recipe-log.md).
    Where queries are normalised, that norm's weights start at ``QUERY_NORM``, not 1: attention starts almost even.
    Gemma 2's layers are the paper's instead: scores over 16, no soft cap, no window, embeddings as the config says.

    Args:
        task: whose tokens it reads and writes.
        method: a key of :data:`hf_asentmax.METHODS`.
        positions: "nape", "rope", "nope" or "alibi".
        family: "llama", "qwen3" for queries and keys that are normalised, "gemma2" for norms before and after each
            part of a layer.
        length: the longest source in training; at its end the query scale "log" starts with r = 1.
        sizes: layers, width, heads, width of the MLP; those of the task in ``SIZES`` by default.
        **settings: other configuration values.

    Raises:
        ValueError: an unknown method or family, or a setting or length that the config or the task refuses.
    """
    if family not in CONFIG_CLASSES:
        raise ValueError(f"family must be one of {', '.join(CONFIG_CLASSES)}, got {family!r}")
    layers, width, heads, hidden = sizes or SIZES.get(task.name, DEFAULT_SIZES)
    tokens = task.sample(1, length, torch.Generator())[0].shape[1]
    values = {
        "vocab_size": task.vocab_size,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "intermediate_size": hidden,
        "max_position_embeddings": tokens,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "positions": positions,
        "query_scale_length": tokens,
    }
    if family == "gemma2":
        values |= GEMMA2 | {"layer_types": ["full_attention"] * layers}
    config = CONFIG_CLASSES[family](**values | method_settings(method) | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family != "gemma2":  # which multiplies them by the root of the width
        torch.nn.init.normal_(cast(torch.nn.Embedding, model.get_input_embeddings()).weight)
    for name, parameter in model.named_parameters():
        if name.endswith(".q_norm.weight"):
            torch.nn.init.constant_(parameter, QUERY_NORM)
    return model
