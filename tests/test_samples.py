"""The samples of an evaluation: of the stream, in chunks, whoever asks for how many."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from hf_asentmax.samples import CHUNK_TOKENS, draw_chunk, sample_chunks, to_dataset
from hf_asentmax.symbol_tasks import Copy, FlipFlop
from hf_asentmax.tasks import sample_batch


@pytest.mark.parametrize(("samples", "length"), [(1000, 64), (1000, 4096), (200, 65536), (3, 1), (1, 1 << 20)])
def test_chunks_hold_each_sample_once_and_are_few(samples: int, length: int) -> None:
    chunks = sample_chunks(samples, length)
    assert [number for chunk in chunks for number in chunk] == list(range(samples))
    size = max(1, CHUNK_TOKENS // length)
    assert {len(chunk) for chunk in chunks[:-1]} <= {size}
    assert len(chunks) == -(-samples // size)


def test_a_sample_does_not_depend_on_how_many_are_asked_for() -> None:
    length = CHUNK_TOKENS // 4
    few, many = (to_dataset(FlipFlop(), samples, length, stream="test", seed=1) for samples in (6, 11))
    assert few.to_dict() == many.select(range(6)).to_dict()


def test_drawing_leaves_the_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        draw_chunk(Copy(), range(2), 8, stream="test", seed=0)
        with pytest.raises(ValueError, match="'tset'"):
            draw_chunk(Copy(), range(2), 8, stream="tset", seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_dataset_holds_the_stream_and_survives_a_file(tmp_path: Path) -> None:
    task, length = FlipFlop(), CHUNK_TOKENS // 4
    to_dataset(task, 10, length, stream="validation", seed=3).save_to_disk(tmp_path)
    dataset = datasets.load_from_disk(tmp_path)
    assert dataset.column_names == ["input_ids", "labels"]
    assert all(row.dtype == torch.int64 for row in dataset.with_format("torch")[0].values())
    batches = [sample_batch(task, 4, length, stream="validation", seed=3, index=index) for index in range(3)]
    for name in ("input_ids", "labels"):
        assert dataset[name][:] == torch.cat([batch[name] for batch in batches])[:10].tolist()


def test_wrong_datasets_are_refused() -> None:
    with pytest.raises(ValueError, match="samples .* got 0"):
        to_dataset(Copy(), 0, 8, stream="test", seed=0)
    with pytest.raises(ValueError, match="length .* got -1"):
        to_dataset(Copy(), 3, -1, stream="test", seed=0)
    with pytest.raises(ValueError, match="'tset'"):
        to_dataset(Copy(), 3, 8, stream="tset", seed=0)
