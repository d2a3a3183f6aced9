"""Models that learn a generated task from scratch: their sizes, and data drawn on the device that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_asentmax import CONFIG_CLASSES
from .methods import method_settings
from .tasks import RetrievalTask, sample_training_batch

# Layers, width, heads and width of the MLP in arXiv 2506.16640; of the tasks that it does not list, the smallest.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "mqmtar": (4, 512, 16, 1024),
    "reverse": (6, 256, 8, 1024),
    "sort": (2, 256, 8, 1024),
    "copy": (2, 256, 16, 1024),
}
DEFAULT_SIZES = (2, 256, 8, 1024)


class TaskStream(IterableDataset):
    """Batches of a task's training stream, whole, on the device; the Trainer takes them as they are.

    Batch i of process p is batch ``i * processes + p`` of the stream, so that a resumed run goes on with the data that
    it would have had.

    Args:
        task: what to draw.
        batch_size: sequences a batch.
        lengths: of the source, (low, high): one is drawn for each batch.
        seed: of the experiment.
        device: where the sequences live.
        process, processes: this process among all.
    """

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
        self.task, self.batch_size, self.lengths = task, batch_size, lengths
        self.seed, self.device = seed, device
        self.process, self.processes = process, processes
        self.begin: Callable[[], int] = lambda: 0  # the Trainer says how many batches a resumed run has had

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        index = self.begin()
        while True:
            number = index * self.processes + self.process
            yield sample_training_batch(
                self.task, self.batch_size, self.lengths, seed=self.seed, index=number, device=self.device
            )
            index += 1


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

    Args:
        task: whose tokens it reads and writes.
        method: a key of :data:`hf_asentmax.METHODS`.
        positions: "nape", "rope", "nope" or "alibi".
        family: "llama", or "qwen3" for queries and keys that are normalised.
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
    config = CONFIG_CLASSES[family](**values | method_settings(method) | settings)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
