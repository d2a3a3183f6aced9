"""The generated tasks: right answers, streams that stay apart, and settings that survive a file."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_asentmax.recall_tasks import CrowdedRecall, MultiTokenRecall, _words
from hf_asentmax.symbol_tasks import FlipFlop, LocalCount
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

# Options that make a vocabulary small enough to be seen whole in a few thousand tokens.
SMALL = {
    "associative_recall": {"keys": 40, "values": 5},
    "flip_flop": {},
    "max_retrieval": {"priorities": 4, "values": 3},
    "mqmtar": {"symbols": 8, "words": 30},
    "local_count": {"symbols": 4, "longest_run": 5},
}

# The answer to a source by its definition, both as written tokens.
TARGETS = {
    "copy": lambda source: source,
    "reverse": lambda source: [source[-1 - place] for place in range(len(source))],
    "sort": lambda source: sorted(source, key=lambda symbol: int(symbol[1:])),
}
CLASSES = {
    "local_count": lambda source: [str(count) for _, run in groupby(source) for count, _ in enumerate(run)],
    "two_back": lambda source: ["_" if place < 2 else source[place - 2] for place in range(len(source))],
}


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


def assert_symbols(source: list[str], symbols: int) -> None:
    assert all(token.startswith("s") and int(token[1:]) < symbols for token in source)


@pytest.mark.parametrize("name", sorted(TARGETS))
@given(symbols=st.integers(2, 40), length=st.integers(1, 60), seed=st.integers(0, 1 << 30))
def test_targets_follow_their_source_by_their_definition(name: str, symbols: int, length: int, seed: int) -> None:
    task = build_task(name, symbols=symbols)
    batch = sample_batch(task, 3, length, seed=seed)
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        tokens = render(task, row).split()
        source = tokens[1 : 1 + length]
        assert_symbols(source, symbols)
        assert tokens == ["<bos>", *source, "<sep>", *TARGETS[name](source), "<eos>"]
        assert labels.tolist() == [IGNORED] * (length + 2) + row[length + 2 :].tolist()


@pytest.mark.parametrize("name", sorted(CLASSES))
@given(symbols=st.integers(2, 40), length=st.integers(1, 60), seed=st.integers(0, 1 << 30))
def test_classes_are_predicted_at_their_tokens_by_their_definition(
    name: str, symbols: int, length: int, seed: int
) -> None:
    task = build_task(name, symbols=symbols, **({"longest_run": 6} if name == "local_count" else {}))
    batch = sample_batch(task, 3, length, seed=seed)
    names = task.vocabulary()
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        bos, *source, eos = render(task, row).split()
        assert (bos, eos) == ("<bos>", "<eos>")
        assert len(source) == length
        assert_symbols(source, symbols)
        # A causal language model predicts at place t what stands at t + 1 of the labels; here at the source's t.
        assert labels[:2].tolist() == [IGNORED] * 2
        assert [names[token] for token in labels[2:].tolist()] == CLASSES[name](source)


def test_local_count_draws_run_lengths_and_symbols_evenly() -> None:
    ids = sample_batch(LocalCount(symbols=3, longest_run=5), 3000, 40)["input_ids"][:, 1:-1]
    runs = [[(symbol, len(list(run))) for symbol, run in groupby(row)] for row in ids.tolist()]
    # Only the first runs: later ones are the more likely to be seen whole the shorter they are. Neighbours of one
    # symbol would make a run of more than 5.
    first, second, third = (Counter(row[place] for row in runs) for place in range(3))
    for drawn in (first, second, third):
        assert set(drawn) == {(symbol, count) for symbol in (2, 3, 4) for count in (2, 3, 4, 5)}
        assert 185 < min(drawn.values()) < max(drawn.values()) < 315  # 250 expected, 4 standard deviations are 61
    assert {len(row) for row in runs} != {len(runs[0])}
    assert {row[-1][1] for row in runs} == {1, 2, 3, 4, 5}  # the end cuts the last one


@given(
    symbols=st.integers(4, 12),
    words=st.integers(8, 16),
    queries=st.integers(1, 4),
    fill=st.floats(0.3, 1.0),
    length=st.integers(1, 120),
    crowd=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
def test_mqmtar_asks_for_words_of_its_source(
    symbols: int, words: int, queries: int, fill: float, length: int, crowd: int, seed: int
) -> None:
    task = MultiTokenRecall(symbols=symbols, words=words, queries=queries, fill=fill)
    if crowd > 1:
        task = CrowdedRecall(**vars(task), share=0.7, crowd=crowd)
    expected = int(fill * length) // 6
    if not 1 <= expected <= words:
        with pytest.raises(ValueError, match=f"got {expected} at length {length}"):
            sample_batch(task, 2, length, seed=seed)
        return
    batch = sample_batch(task, 2, length, seed=seed)
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        bos, *tokens = render(task, row).split()
        assert bos == "<bos>"
        source, asked, target = tokens[:length], tokens[length:][: 3 * queries], tokens[length + 3 * queries :]
        pairs = {}
        for number in range(expected):
            slot = source[number * length // expected : (number + 1) * length // expected]
            before = next(place for place, token in enumerate(slot) if token != "_")
            k1, k2, colon, v1, v2, *after = slot[before:]
            assert_symbols([k1, k2, v1, v2], symbols)
            assert colon == ":"
            assert set(after) == {"_"}  # and so at least one
            pairs[k1, k2] = (v1, v2)
        assert len(pairs) == len(set(pairs.values())) == expected
        keys = list(zip(asked[1::3], asked[2::3], strict=True))
        assert asked == [token for key in keys for token in ("?", *key)]
        assert target == ["<sep>", *(token for key in keys for token in ("?", *pairs[key])), "<eos>"]
        assert labels.tolist() == [IGNORED] * (2 + length + 3 * queries) + row[2 + length + 3 * queries :].tolist()


def test_associative_recall_spreads_pairs_and_queries_evenly() -> None:
    task = AssociativeRecall(keys=12, values=3, key_tokens=1, value_tokens=2, queries=2, fill=0.5, fillers=1)
    ids = sample_batch(task, 4000, 30)["input_ids"]
    # 5 pairs and 15 fillers: 1 sequence of 4 begins with a pair, and 1 of 4 ends with one; 4 standard deviations: 0.03.
    for place in (0, 29):
        assert 0.22 < (ids[:, place] != 1).float().mean() < 0.28
    is_key = (ids[:, :30] >= 2) & (ids[:, :30] < 14)
    keys = ids[:, :30][is_key].view(4000, 5)
    asked = torch.stack([(keys == ids[:, at, None]).long().argmax(1) for at in (31, 35)], 1)
    counts = Counter(map(tuple, asked.tolist()))
    assert len(counts) == 5 * 4  # ordered pairs of different queries
    assert 145 < min(counts.values()) < max(counts.values()) < 255  # 200 expected, 4 standard deviations are 55


def test_mqmtar_words_depend_on_their_own_seed_alone() -> None:
    def words(word_seed: int, **request: object) -> tuple[set, set]:
        # With fill = 1 and a length of 6, one pair and its blank, then what asks for it and answers.
        task = MultiTokenRecall(symbols=16, words=20, queries=1, fill=1.0, word_seed=word_seed)
        rows = sample_batch(task, 1000, 6, **request)["input_ids"].tolist()
        return {tuple(row[8:10]) for row in rows}, {tuple(row[12:14]) for row in rows}

    keys, values = words(0)
    assert len(keys) == len(values) == 20
    assert keys != values
    assert words(0, stream="test", seed=5, index=9) == (keys, values)
    assert not {frozenset(found) for found in words(1)} & {frozenset(keys), frozenset(values)}


def test_mqmtar_spreads_pairs_words_and_queries_evenly() -> None:
    ids = sample_batch(MultiTokenRecall(symbols=8, words=30, queries=2), 4000, 39)["input_ids"]
    source, colon = ids[:, 1:40], 4
    colons = (source == colon).nonzero()[:, 1].view(4000, 5)
    # 5 slots, the first of 7 tokens with 2 places for a pair, the others of 8 with 3.
    starts = [Counter(column) for column in (colons - 2 - torch.tensor([0, 7, 15, 23, 31])).T.tolist()]
    for places, drawn in zip((2, 3, 3, 3, 3), starts, strict=True):
        assert set(drawn) == set(range(places))
        assert max(abs(count - 4000 / places) for count in drawn.values()) < 127  # 4 standard deviations of the first
    key, value = (
        8 * source.gather(1, colons + place) + source.gather(1, colons + place + 1) for place in (-2, 1)
    )  # one number a word
    for word in (key, value):
        counts = Counter(word.flatten().tolist())
        assert len(counts) == 30
        assert 560 < min(counts.values()) < max(counts.values()) < 775  # 667 expected, 4 standard deviations are 95
    assert len(set(zip(key.flatten().tolist(), value.flatten().tolist(), strict=True))) == 30 * 30
    asked = torch.stack([(key == 8 * ids[:, [at]] + ids[:, [at + 1]]).long().argmax(1) for at in (41, 44)], 1)
    counts = Counter(map(tuple, asked.tolist()))
    assert len(counts) == 5 * 5  # ordered pairs of queries, the same one twice included
    assert 110 < min(counts.values()) < max(counts.values()) < 210  # 160 expected, 4 standard deviations are 50


def test_crowded_mqmtar_draws_a_share_of_its_sequences_from_few_symbols() -> None:
    shape = {"symbols": 64, "words": 1024}  # a quarter of all words: some 16 are made of 8 symbols alone

    def crowded(share: float) -> int:
        ids = sample_batch(CrowdedRecall(**shape, share=share, crowd=8), 4000, 40)["input_ids"]
        colons = (ids == 4).nonzero()[:, 1].view(4000, 5, 1)
        words = [
            ids[:, None].expand(-1, 5, -1).gather(2, colons + torch.tensor(places)) for places in ((-2, -1), (1, 2))
        ]
        for drawn, vocabulary in zip(words, _words(64, 1024, 0, ids.device), strict=True):
            assert set(map(tuple, drawn.flatten(0, 1).tolist())) == set(map(tuple, (6 + vocabulary).tolist()))
        return sum(len(row.unique()) <= 8 for row in torch.cat(words, 1).flatten(1))

    assert 1084 < crowded(0.3) < 1316  # 1200 expected, 4 standard deviations are 116
    assert crowded(0.0) == 0  # of five keys and values made of 64 symbols


def test_mqmtar_asks_more_often_than_it_has_pairs() -> None:
    ids = sample_batch(MultiTokenRecall(queries=7), 2, 8)["input_ids"]  # of one pair
    assert ids.shape == (2, 1 + 8 + 21 + 1 + 21 + 1)
    asked = ids[:, 9:30].view(2, 7, 3)
    assert torch.equal(asked, asked[:, :1].expand(-1, 7, -1))


@given(pairs=st.integers(2, 40), write_share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 1 << 30))
def test_flip_flop_reads_the_bit_last_written(pairs: int, write_share: float, seed: int) -> None:
    task = FlipFlop(write_share=write_share)
    batch = sample_batch(task, 3, 2 * pairs, seed=seed)
    for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        bos, *tokens, eos = render(task, row).split()
        assert (bos, eos) == ("<bos>", "<eos>")
        *instructions, last = tokens[::2]
        *bits, answer = tokens[1::2]
        assert (len(instructions), len(bits), instructions[0], last) == (pairs - 1, pairs - 1, "w", "r")
        assert set(instructions) <= {"w", "i"}
        assert set(bits) <= {"0", "1"}
        written = [bit for instruction, bit in zip(instructions, bits, strict=True) if instruction == "w"]
        assert answer == written[-1]
        assert labels.tolist() == [IGNORED] * (2 * pairs) + row[-2:].tolist()


def test_flip_flop_draws_instructions_and_bits_in_their_shares() -> None:
    ids = sample_batch(FlipFlop(), 500, 42)["input_ids"][:, 1:-1].view(500, 21, 2)
    instruction, bit = ids[:, 1:-1].unbind(2)
    # 9500 pairs: 4 standard deviations are 0.013 of a share of 0.1, and 0.021 of a half.
    assert (instruction == 2).float().mean().item() == pytest.approx(0.1, abs=0.013)
    assert (instruction == 3).float().mean().item() == pytest.approx(0.9, abs=0.013)
    assert (bit[instruction == 3] == 6).float().mean().item() == pytest.approx(0.5, abs=0.023)
    assert (bit[instruction == 2] == 6).float().mean().item() == pytest.approx(0.5, abs=0.07)
    assert (ids[:, -1, 1] == 6).float().mean().item() == pytest.approx(0.5, abs=0.09)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tokens_stay_within_the_vocabulary_and_use_all_of_it(name: str) -> None:
    task = build_task(name, **SMALL.get(name, {}))
    names = task.vocabulary()
    assert len(names) == task.vocab_size == len(set(names))
    assert not any(" " in token for token in names)
    seen = torch.cat(list(sample_batch(task, 200, 40).values())).unique()
    assert seen.tolist() == [IGNORED, *range(task.vocab_size)]


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
    task = build_task(name, **SMALL.get(name, {}))  # with the longest runs two sequences may well be the same
    drawn = {
        (stream, seed, index): sample_batch(task, 4, 64, stream=stream, seed=seed, index=index)["input_ids"]
        for stream in STREAMS
        for seed in range(3)
        for index in range(10)
    }
    again = sample_batch(task, 4, 64, stream="test", seed=1, index=3)["input_ids"]
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
    for name in TARGETS:
        assert sample_batch(build_task(name), 1, 65536)["labels"].shape == (1, 2 * 65536 + 3)
    for name in (*CLASSES, "flip_flop"):
        assert sample_batch(build_task(name), 1, 65536)["labels"].shape == (1, 65538)


def test_mqmtar_draws_a_long_source_in_time() -> None:
    begin = time.perf_counter()
    ids = sample_batch(MultiTokenRecall(), 1, 65536)["input_ids"]
    assert time.perf_counter() - begin < 5
    assert ids.shape == (1, 65536 + 24 + 3)
    colons = (ids[0] == 4).nonzero()[:, 0]
    assert len(colons) == 8738
    assert len(torch.stack([ids[0, colons - 2], ids[0, colons - 1]]).unique(dim=1)[0]) == 8738


@pytest.mark.parametrize("name", sorted(TASKS))
def test_drawing_never_waits_for_the_device(name: str) -> None:
    task = build_task(name)
    sample_batch(task, 2, 64)  # fills the cache of words
    # A fake tensor has no values: an `.item()`, or a mask as an index, raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids, labels = task.sample(2, 64, torch.Generator())
    assert ids.shape == labels.shape


def test_settings_survive_a_file(tmp_path: Path) -> None:
    task = MaxRetrieval(priorities=7, values=3)
    save_task(task, tmp_path)
    assert load_task("max_retrieval", tmp_path) == task
    assert load_task("max_retrieval", tmp_path, {"values": 4}) == MaxRetrieval(values=4)
    assert load_task("max_retrieval", tmp_path / "nowhere") == load_task("max_retrieval") == MaxRetrieval()
    assert build_task(**task_settings(task)) == task


def test_the_task_file_names_the_task(tmp_path: Path) -> None:
    task = MaxRetrieval(priorities=7, values=3)
    save_task(task, tmp_path)
    assert load_task(None, tmp_path) == task
    assert load_task(None, tmp_path, {"values": 4}) == MaxRetrieval(values=4)
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="task must be named where .*task.json is missing, got None"):
            load_task(None, folder)


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
        ("copy", {"symbols": 1}, "copy symbols .* at least 2, got 1"),
        ("reverse", {"symbols": 2.5}, "reverse symbols .* got 2.5"),
        ("sort", {"symbols": True}, "sort symbols .* got True"),
        ("two_back", {"symbols": 0}, "two_back symbols .* got 0"),
        ("local_count", {"symbols": 1}, "local_count symbols .* got 1"),
        ("local_count", {"longest_run": 1}, "longest_run .* at least 2, got 1"),
        ("flip_flop", {"write_share": -0.5}, "write_share .* got -0.5"),
        ("mqmtar", {"symbols": 99}, "at most .* 9801, got 10000"),
        ("mqmtar", {"symbols": 1}, "mqmtar symbols .* got 1"),
        ("mqmtar", {"words": 0}, "words .* got 0"),
        ("mqmtar", {"queries": 0}, "queries .* got 0"),
        ("mqmtar", {"fill": 0.0}, "fill .* got 0.0"),
        ("mqmtar", {"word_seed": -1}, "word_seed .* got -1"),
    ],
)
def test_wrong_settings_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"share must be in \[0, 1\] .* got 1.5"),
        ({"crowd": 257}, "symbols=256, .* 257"),
        ({"crowd": 1}, "crowd .* got 1"),
    ],
)
def test_wrong_crowds_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrowdedRecall(**options)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="stream"):
        sample_batch(MaxRetrieval(), 2, 8, stream="tset")
    with pytest.raises(ValueError, match="length"):
        sample_batch(MaxRetrieval(), 2, 0)
    with pytest.raises(ValueError, match="key_tokens"):
        sample_batch(AssociativeRecall(), 2, 4096)


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [
        ("copy", 0, "copy length .* got 0"),
        ("local_count", -3, "local_count length .* got -3"),
        ("flip_flop", 2, "at least 4, got 2"),
        ("flip_flop", 7, "even, got 7"),
        ("mqmtar", 7, "between 1 and words=10000, got 0 at length 7"),
        ("mqmtar", 80000, "words=10000, got 10666 at length 80000"),
    ],
)
def test_wrong_lengths_are_refused(name: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_batch(build_task(name), 2, length)
