"""Retrieval from text: what counts as right, and what prompts hold."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model
from retrieval_setup import VOCABULARY, Reader, byte_tokenizer

from hf_asentmax import patch_model
from hf_asentmax.haystack import PASSKEY_FILLER, filler_sentences, read_sentences
from hf_asentmax.retrieval import needle, passkey


def test_passkey_is_right_for_a_model_that_reads() -> None:
    reader = Reader(limit=500)
    rows = passkey(reader, reader.tokenizer, [400, 600], samples=5)
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
    (row,) = passkey(reader, reader.tokenizer, [400], samples=3)
    assert (row["accuracy"], row["low"]) == (0, 0)


def test_needle_is_right_for_a_model_that_reads_and_wrong_for_another() -> None:
    reader = Reader(" well, {}")
    rows = needle(reader, reader.tokenizer, [500, 600], [0, 50], samples=2)
    assert [(row["length"], row["depth"], row["accuracy"]) for row in rows] == [
        (500, 0, 100), (500, 50, 100), (600, 0, 100), (600, 50, 100),
    ]  # fmt: skip
    assert all(row["samples"] == 2 for row in rows)
    blind = Reader(" 1234567")
    assert [row["accuracy"] for row in needle(blind, blind.tokenizer, [500], [0, 50], samples=2)] == [0, 0]


@pytest.mark.parametrize("depth", [0, 30, 75, 100])
def test_needle_stands_at_its_depth_between_two_sentences(depth: float) -> None:
    reader = Reader()
    needle(reader, reader.tokenizer, [4000], [depth], samples=3)
    for prompt, room in zip(reader.prompts, reader.room, strict=True):
        before, text, question = prompt.split("\n")
        assert "special magic number" in before
        assert question.endswith("mentioned in the provided text is")
        assert 4000 - 100 < len(prompt) + room <= 4000
        hidden = re.search(r"One of the special magic numbers for \w+ is: \d{7}\.", text)
        assert hidden is not None
        head, tail = text[: hidden.start()].rstrip(), text[hidden.end() :].lstrip()
        assert head == "" or head.endswith(".")
        assert tail == "" or tail[0].isupper()
        assert len(head) / (len(head) + len(tail)) == pytest.approx(depth / 100, abs=0.02)


def test_prompts_are_the_same_for_every_model_and_differ_by_seed() -> None:
    def prompts(seed: int) -> list[str]:
        reader = Reader()
        needle(reader, reader.tokenizer, [600], [0, 50], samples=2, seed=seed)
        passkey(reader, reader.tokenizer, [400], samples=2, seed=seed)
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
    needle(reader, reader.tokenizer, [2000], [50], samples=1, haystack=str(file))
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
        needle(reader, reader.tokenizer, [600], [50], haystack=str(file))
    assert reader.prompts == []


def test_filler_holds_no_numbers_and_varies() -> None:
    sentences = filler_sentences()
    assert not any(re.search(r"\d", sentence) for sentence in [*sentences, *PASSKEY_FILLER])
    assert len(set(sentences)) > 500


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: passkey(r, r.tokenizer, []), "lengths must be positive"),
        (lambda r: passkey(r, r.tokenizer, [600], samples=0), "samples must be positive"),
        (lambda r: passkey(r, r.tokenizer, [50]), "length must be at least .* tokens for the question alone, got 50"),
        (lambda r: needle(r, r.tokenizer, [50], [0]), "length must be at least .* got 50"),
        (lambda r: needle(r, r.tokenizer, [600], [0, 101]), "depths must be percentages"),
        (lambda r: needle(r, r.tokenizer, [600], []), "depths must be percentages"),
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
    rows = [passkey(model, byte_tokenizer(), [400], samples=2) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][0]["method"] == "asentmax"
    assert caplog.records == []
