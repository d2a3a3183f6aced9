"""Retrieval from text: what counts as right, and what prompts hold."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from retrieval_setup import VOCABULARY, Reader, byte_tokenizer

from hf_asentmax import patch_model
from hf_asentmax.haystack import Prompt, build_prompt, filler_sentences, read_sentences
from hf_asentmax.retrieval import SPARE_TOKENS, retrieve, training_samples
from hf_asentmax.text_tasks import PASSKEY_FILLER, TASKS


def test_passkey_is_right_for_a_model_that_reads() -> None:
    reader = Reader(limit=500)
    rows = retrieve(reader, reader.tokenizer, "passkey", [400, 600], samples=5)
    assert [(row["length"], row["accuracy"], row["samples"]) for row in rows] == [(400, 100, 5), (600, 100, 5)]
    assert [row["beyond_context"] for row in rows] == [False, True]
    assert reader.training
    places = set()
    for prompt, room in zip(reader.prompts, reader.room, strict=True):
        length = 400 if len(prompt) < 400 else 600
        longest = max(map(len, PASSKEY_FILLER)) + 1
        assert length - longest < len(prompt) + room <= length  # one token a byte
        places.add(prompt.index("The pass key is"))
    assert len(places) > 3


@pytest.mark.parametrize("answer", [" {}7", " 7{}", " none", "", " 123 {}"])
def test_passkey_is_wrong_unless_the_first_number_is_the_key(answer: str) -> None:
    reader = Reader(answer)
    (row,) = retrieve(reader, reader.tokenizer, "passkey", [400], samples=3)
    assert (row["accuracy"], row["low"]) == (0, 0)


def test_needle_is_right_for_a_model_that_reads_and_wrong_for_another() -> None:
    reader = Reader(" well, {}")
    rows = retrieve(reader, reader.tokenizer, "needle", [500, 600], depths=[0, 50], samples=2)
    assert [(row["length"], row["depth"], row["accuracy"]) for row in rows] == [
        (500, 0, 100), (500, 50, 100), (600, 0, 100), (600, 50, 100),
    ]  # fmt: skip
    assert all(row["samples"] == 2 for row in rows)
    blind = Reader(" 1234567")
    assert [
        row["accuracy"] for row in retrieve(blind, blind.tokenizer, "needle", [500], depths=[0, 50], samples=2)
    ] == [0, 0]


@pytest.mark.parametrize("depth", [0, 30, 75, 100])
def test_needle_stands_at_its_depth_between_two_sentences(depth: float) -> None:
    reader = Reader()
    retrieve(reader, reader.tokenizer, "needle", [4000], depths=[depth], samples=3)
    for prompt, room in zip(reader.prompts, reader.room, strict=True):
        before, text, question = prompt.split("\n")
        assert "magic numbers" in before
        assert re.search(
            r"What is the magic number of (\w+) in the text\? The magic number of \1 in the text is$", question
        )
        assert 4000 - 100 < len(prompt) + room <= 4000
        hidden = re.search(r"A magic number of \w+ is \d{7}\.", text)
        assert hidden is not None
        head, tail = text[: hidden.start()].rstrip(), text[hidden.end() :].lstrip()
        assert head == "" or head.endswith(".")
        assert tail == "" or tail[0].isupper()
        assert len(head) / (len(head) + len(tail)) == pytest.approx(depth / 100, abs=0.02)


def test_prompts_are_the_same_for_every_model_and_differ_by_seed() -> None:
    def prompts(seed: int) -> list[str]:
        reader = Reader()
        retrieve(reader, reader.tokenizer, "needle", [600], depths=[0, 50], samples=2, seed=seed)
        retrieve(reader, reader.tokenizer, "passkey", [400], samples=2, seed=seed)
        return reader.prompts

    assert prompts(1) == prompts(1)
    assert not set(prompts(1)) & set(prompts(2))
    assert len(set(prompts(1))) == 6


def test_haystack_file_is_used_and_repeated(tmp_path: Path) -> None:
    file = tmp_path / "hay.txt"
    file.write_text("It rained. Did it stop?\n\nNo! " + "word " * 90, encoding="utf-8")
    sentences = read_sentences(str(file))
    assert sentences[:3] == ["It rained.", "Did it stop?", "No!"]
    assert [len(sentence.split()) for sentence in sentences[3:]] == [40, 40, 10]
    reader = Reader()
    retrieve(reader, reader.tokenizer, "needle", [2000], depths=[50], samples=1, haystack=str(file))
    (prompt,) = reader.prompts
    assert prompt.count("Did it stop?") >= 2
    places = [match.start() for match in re.finditer("It rained. Did it stop? No!", prompt.replace("\n", " "))]
    assert all(b > a for a, b in pairwise(places))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "haystack must be a text file"),
        (b" \n", ValueError, "haystack must hold words"),
        (b"\xff\xfe\x00", ValueError, "haystack must be UTF-8 text"),
    ],
)
def test_haystack_file_that_cannot_serve_is_refused(
    tmp_path: Path, content: bytes | None, error: type[Exception], message: str
) -> None:
    file = tmp_path / "hay.txt"
    if content is not None:
        file.write_bytes(content)
    reader = Reader()
    with pytest.raises(error, match=message):
        retrieve(reader, reader.tokenizer, "needle", [600], depths=[50], haystack=str(file))
    assert reader.prompts == []


def test_filler_holds_no_numbers_and_varies() -> None:
    sentences = filler_sentences()
    assert not any(re.search(r"\d", sentence) for sentence in [*sentences, *PASSKEY_FILLER])
    assert len(set(sentences)) > 500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: retrieve(r, r.tokenizer, "passkey", []), "lengths must be positive"),
        (lambda r: retrieve(r, r.tokenizer, "passkey", [600], samples=0), "samples must be positive"),
        (
            lambda r: retrieve(r, r.tokenizer, "passkey", [50]),
            "length must be at least .* tokens for the question alone, got 50",
        ),
        (lambda r: retrieve(r, r.tokenizer, "needle", [50], depths=[0]), "length must be at least .* got 50"),
        (lambda r: retrieve(r, r.tokenizer, "needle", [600], depths=[0, 101]), "depths must be percentages"),
        (lambda r: retrieve(r, r.tokenizer, "needle", [600], depths=[]), "depths must be percentages"),
        (lambda r: retrieve(r, r.tokenizer, "multiquery", [900], depths=[0]), "depths must be None for multiquery"),
        (lambda r: retrieve(r, r.tokenizer, "niah", [900]), "task must be one of needle, passkey, .*, got 'niah'"),
        (lambda r: retrieve(r, r.tokenizer, "passkey", [600], batch_size=0), "batch_size must be positive"),
    ],
)
def test_retrieval_refuses_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Reader())


def test_retrieval_generates_with_a_real_model(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(tiny_model("llama", vocab_size=VOCABULARY))
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20
    )  # as instruction-tuned checkpoints have it
    rows = [retrieve(model, byte_tokenizer(), "passkey", [400], samples=2) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][0]["method"] == "asentmax"
    assert caplog.records == []


def prompt(task: str, length: int = 1200, *, number: int = 0, depth: float | None = None) -> Prompt:
    identity = f"{task} {number}"
    about: dict[str, Any] = {"identity": identity, "spare": SPARE_TOKENS, "sentences": filler_sentences()}
    return build_prompt(task, byte_tokenizer(), length, depth=depth, **about)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_the_length_and_hold_every_answer(task: str, number: int) -> None:
    for length in (1200, 3000):
        made = prompt(task, length, number=number)
        assert made.input_ids == byte_tokenizer()(made.text)["input_ids"]
        assert length - 110 < len(made.input_ids) + made.room <= length
        assert made.room == len(", ".join(made.answers)) + 1 + SPARE_TOKENS
        assert len(set(made.answers)) == len(made.answers)
        assert all(answer in made.text for answer in made.answers)
        question = made.text.rsplit("\n")[-1]
        assert not any(answer in question for answer in made.answers)
        assert made == prompt(task, length, number=number)
        assert made.text != prompt(task, length, number=number + 1).text


def facts(made: Prompt) -> list[tuple[str, str]]:
    """The names and numbers in the text, in order."""
    return re.findall(r"A magic number of (\w+) is (\d{7})\.", made.text)


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_multikey_asks_for_one_of_four_at_its_depth(depth: float) -> None:
    made = prompt("multikey", 4000, depth=depth)
    found = facts(made)
    assert len(dict(found)) == len(found) == 4
    (asked,) = set(re.findall(r"magic number of (\w+) in the text", made.text))
    assert made.answers == (dict(found)[asked],)
    text = made.text.split("\n")[1]
    place = text.index(f"A magic number of {asked} is")
    assert place / (len(text) - 200) == pytest.approx(depth / 100, abs=0.06)


def test_multivalue_asks_for_all_numbers_of_one_name() -> None:
    made = prompt("multivalue")
    assert len({name for name, _ in facts(made)}) == 1
    assert sorted(made.answers) == sorted(number for _, number in facts(made))
    assert len(made.answers) == 4


def test_multiquery_asks_for_the_numbers_in_the_order_of_the_names() -> None:
    made = prompt("multiquery")
    asked = re.search(r"The magic numbers of (.*) in the text are$", made.text)
    assert asked is not None
    names = asked[1].replace(" and ", ", ").split(", ")
    assert made.answers == tuple(dict(facts(made))[name] for name in names)
    assert len(names) == 4


@pytest.mark.parametrize("number", range(4))
def test_variables_of_one_value_are_asked_for(number: int) -> None:
    """Resolved in one pass: what a variable is set to has been set before."""
    made = prompt("variables", number=number)
    value = re.search(r"The variables that stand for (\d+) are VAR$", made.text)
    assert value is not None
    values: dict[str, str] = {}
    for name, what in re.findall(r"VAR (\w+) = (\w+)\.", made.text):
        values[name] = what if what.isdigit() else values[what]
    assert len(values) == 10
    assert sorted(made.answers) == sorted(name for name, what in values.items() if what == value[1])
    assert len(made.answers) == 5


@pytest.mark.parametrize("length", [600, 3000])
def test_common_words_stand_six_times_and_the_others_once(length: int) -> None:
    made = prompt("common_words", length)
    (listed,) = re.findall(r"once: (.*)\.\n", made.text)
    counts = Counter(listed.split(", "))
    assert {word for word, count in counts.items() if count == 6} == set(made.answers)
    assert sorted(set(counts.values())) == [1, 6]
    assert len(made.answers) == 5


@pytest.mark.parametrize("length", [450, 3000])
def test_frequent_words_are_the_three_most_frequent(length: int) -> None:
    made = prompt("frequent_words", length)
    (listed,) = re.findall(r"than others: (.*)\.\n", made.text)
    ranked = Counter(listed.split(", ")).most_common()
    assert tuple(word for word, _ in ranked[:3]) == made.answers
    counts = [count for _, count in ranked]
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert counts[0] / counts[1] == pytest.approx(4, rel=0.3)


def test_several_answers_are_scored_by_their_share() -> None:
    reader = Reader()  # repeats the first number, which is one of four
    (row,) = retrieve(reader, reader.tokenizer, "multivalue", [1000], samples=3)
    assert (row["accuracy"], row["samples"]) == (25, 3)
    assert row["low"] < 25 < row["high"]
    (row,) = retrieve(reader, reader.tokenizer, "frequent_words", [1000], samples=2)
    assert row["accuracy"] == 0


def test_prompts_in_a_batch_are_answered_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a model whose scores are far apart, so that what it writes doesn't hang on the last bits."""
    model = patch_model(tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=600))
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    written: list[str] = []

    def with_more_room(*args: Any, **options: Any) -> Prompt:
        """As with a usual tokenizer, which cuts one answer into more tokens than another."""
        made = build_prompt(*args, **options)
        return replace(made, room=made.room + 2 * int(options["identity"][-1]))

    monkeypatch.setattr("hf_asentmax.retrieval.build_prompt", with_more_room)
    monkeypatch.setattr("hf_asentmax.retrieval._share", lambda text, answers: written.append(text) or 0.0)
    for batch_size in (1, 2, 3):
        retrieve(model, byte_tokenizer(), "multikey", [500], samples=3, batch_size=batch_size)
    assert written[:3] == written[3:6] == written[6:]
    assert len(set(written)) > 1


def test_training_samples_end_where_evaluation_asks_and_differ_from_it() -> None:
    tokenizer, tasks = byte_tokenizer(), list(TASKS)
    samples = list(training_samples(tokenizer, tasks, 1200, 2 * len(tasks)))
    assert [sample["task"] for sample in samples] == tasks * 2
    for sample in samples:
        total = len(tokenizer(sample["prompt"] + sample["completion"])["input_ids"])
        assert 1200 - 120 < total < 1200
        assert sample["completion"].startswith(" ")
        assert all(answer in sample["prompt"] for answer in sample["completion"].strip(" .").split(", "))
    assert samples == list(training_samples(tokenizer, tasks, 1200, 2 * len(tasks)))
    assert len({sample["prompt"] for sample in samples}) == len(samples)


def test_training_samples_are_never_the_evaluations() -> None:
    reader = Reader()
    for seed in (0, 1):
        retrieve(reader, reader.tokenizer, "needle", [600], samples=20, seed=seed)
    samples = [
        sample for seed in (0, 1) for sample in training_samples(reader.tokenizer, ["needle"], 600, 20, seed=seed)
    ]
    numbers = [set(re.findall(r"\d{7}", " ".join(texts))) for texts in (reader.prompts, [s["prompt"] for s in samples])]
    assert [len(found) for found in numbers] == [40, 40]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize(
    ("tasks", "samples", "message"),
    [
        (["niah"], 4, "task must be one of"),
        ([], 4, "tasks must be positive"),
        (["needle"], 0, "samples must be positive"),
    ],
)
def test_training_samples_refuse_bad_input(tasks: list[str], samples: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(training_samples(byte_tokenizer(), tasks, 600, samples))
