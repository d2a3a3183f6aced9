"""The generated tasks: right answers, streams that stay apart, and settings that survive a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_asentmax.tasks import (
    IGNORED,
    STREAMS,
    TASKS,
    AssociativeRecall,
    MaxRetrieval,
    build_task,
    load_task,
    render,
    sample_batch,
    save_task,
    task_settings,
)


@given(
    priorities=st.integers(2, 40), values=st.integers(2, 5), length=st.integers(1, 70), index=st.integers(0, 1 << 30)
)
def test_max_retrieval_asks_for_the_value_of_the_one_highest_item(
    priorities: int, values: int, length: int, index: int
) -> None:
    task = MaxRetrieval(priorities=priorities, values=values)
    batch = sample_batch(task, 3, length, index=index)
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        *items, query, answer = render(task, row).split()
        assert len(items) == length
        assert query == "?"
        found = [tuple(item.split(":")) for item in items]
        highest = max(int(priority) for priority, _ in found)
        assert [value for priority, value in found if int(priority) == highest] == [answer]
        assert labels.tolist() == [IGNORED] * (length + 1) + [int(row[-1])]


@given(
    keys=st.integers(6, 30),
    key_tokens=st.integers(1, 2),
    value_tokens=st.integers(1, 3),
    queries=st.integers(1, 3),
    fill=st.floats(0.5, 1.0),
    index=st.integers(0, 1 << 30),
)
def test_associative_recall_asks_for_pairs_of_its_source(
    keys: int, key_tokens: int, value_tokens: int, queries: int, fill: float, index: int
) -> None:
    task = AssociativeRecall(
        keys=keys, values=9, key_tokens=key_tokens, value_tokens=value_tokens, queries=queries, fill=fill, fillers=3
    )
    length = 30 if key_tokens + value_tokens > 4 else 12 * key_tokens + 4
    if task.pairs(length) < queries or task.pairs(length) > keys**key_tokens:
        with pytest.raises(ValueError, match="distinct keys"):
            sample_batch(task, 2, length, index=index)
        return
    batch = sample_batch(task, 2, length, index=index)
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        tokens = render(task, row).split()
        source, tail = tokens[:length], tokens[length:]
        pairs = {}
        place = 0
        while place < length:
            if source[place].startswith("f"):
                place += 1
                continue
            key = tuple(source[place : place + key_tokens])
            value = source[place + key_tokens : place + key_tokens + value_tokens]
            assert key not in pairs
            assert all(token.startswith("k") for token in key)
            assert all(token.startswith("v") for token in value)
            pairs[key] = value
            place += key_tokens + value_tokens
        assert len(pairs) == task.pairs(length)
        width = 1 + key_tokens + value_tokens
        assert len(tail) == queries * width
        asked = [tail[start : start + width] for start in range(0, len(tail), width)]
        assert len({tuple(query[1 : 1 + key_tokens]) for query in asked}) == queries
        for query in asked:
            assert query[0] == "?"
            assert pairs[tuple(query[1 : 1 + key_tokens])] == query[1 + key_tokens :]
        answers = [length + start * width + 1 + key_tokens + i for start in range(queries) for i in range(value_tokens)]
        assert (labels != IGNORED).nonzero().flatten().tolist() == answers
        assert torch.equal(labels[answers], row[answers])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tokens_stay_within_the_vocabulary_and_use_all_of_it(name: str) -> None:
    options = {"priorities": 4, "values": 3} if name == "max_retrieval" else {"keys": 40, "values": 5}
    task = build_task(name, **options)
    names = task.vocabulary()
    assert len(names) == task.vocab_size == len(set(names))
    assert not any(" " in token for token in names)
    seen = sample_batch(task, 200, 40)["input_ids"].unique()
    assert seen.tolist() == list(range(task.vocab_size))


def test_max_retrieval_draws_priorities_and_winning_places_evenly() -> None:
    task = MaxRetrieval(priorities=8, values=2)
    ids = sample_batch(task, 4000, 10)["input_ids"][:, :10]
    priority = (ids - 3) // 2
    places = Counter(priority.argmax(1).tolist())
    assert min(places.values()) > 320  # 400 expected, 4 standard deviations are 76
    # The lower priorities, which no draw for uniqueness touches, keep a tenth each of the items they had.
    assert 0.9 < (priority == 0).float().mean() / (priority == 1).float().mean() < 1.15


@pytest.mark.parametrize("name", sorted(TASKS))
def test_batches_repeat_and_streams_share_none(name: str) -> None:
    task = build_task(name)
    drawn = {
        (stream, seed, index): sample_batch(task, 4, 16, stream=stream, seed=seed, index=index)["input_ids"]
        for stream in STREAMS
        for seed in range(3)
        for index in range(10)
    }
    again = sample_batch(task, 4, 16, stream="test", seed=1, index=3)["input_ids"]
    assert torch.equal(drawn["test", 1, 3], again)
    rows = [tuple(row.tolist()) for ids in drawn.values() for row in ids]
    assert len(set(rows)) == len(rows)


def test_batches_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    sample_batch(MaxRetrieval(), 2, 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_long_sources_are_drawn() -> None:
    recall = AssociativeRecall(key_tokens=2)
    assert sample_batch(recall, 1, 65536)["input_ids"].shape == (1, 65536 + 4 * 4)
    assert sample_batch(MaxRetrieval(), 1, 65536)["labels"].shape == (1, 65538)


def test_settings_survive_a_file(tmp_path: Path) -> None:
    task = MaxRetrieval(priorities=7, values=3)
    save_task(task, tmp_path)
    assert load_task("max_retrieval", tmp_path) == task
    assert load_task("max_retrieval", tmp_path, {"values": 4}) == MaxRetrieval(values=4)
    assert load_task("max_retrieval", tmp_path / "nowhere") == load_task("max_retrieval") == MaxRetrieval()
    assert build_task(**task_settings(task)) == task


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "as save_task writes it"), ("[]", "as save_task writes it"), ("{}", "as save_task writes it")],
)
def test_a_damaged_task_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task("max_retrieval", tmp_path)


def test_the_task_file_of_another_task_is_refused(tmp_path: Path) -> None:
    save_task(AssociativeRecall(), tmp_path)
    with pytest.raises(ValueError, match="'associative_recall'"):
        load_task("max_retrieval", tmp_path)
    settings = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps(settings | {"colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        load_task("associative_recall", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("needle", {}, "associative_recall"),
        ("max_retrieval", {"levels": 3}, "levels"),
        ("max_retrieval", {"priorities": 1}, "at least 2"),
        ("max_retrieval", {"values": "10"}, "integer"),
        ("associative_recall", {"queries": 0}, "queries"),
        ("associative_recall", {"fill": 1.5}, "fill"),
    ],
)
def test_wrong_settings_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(name, **options)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="stream"):
        sample_batch(MaxRetrieval(), 2, 8, stream="tset")
    with pytest.raises(ValueError, match="length"):
        sample_batch(MaxRetrieval(), 2, 0)
    with pytest.raises(ValueError, match="key_tokens"):
        sample_batch(AssociativeRecall(), 2, 4096)
