"""Retrieval: what counts as right, what prompts hold, and that samples don't depend on how they are run."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from retrieval_setup import VOCABULARY, Reader, byte_tokenizer

from hf_asentmax import patch_model
from hf_asentmax.haystack import PASSKEY_FILLER, filler_sentences, read_sentences
from hf_asentmax.retrieval import (
    method_name,
    needle,
    passkey,
    results_table,
    synthetic_ladder,
    teacher_forced_hits,
    wilson_interval,
)
from hf_asentmax.tasks import build_task, sample_batch

RECALL = {"keys": 8, "values": 4, "key_tokens": 2, "value_tokens": 2, "queries": 2, "fillers": 4}


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


@pytest.mark.parametrize(
    ("alpha", "scaling", "name"),
    [
        (1.0, "none", "softmax"),
        (1.0, "log", "ssmax"),
        (1.0, "adaptive", "softmax-adaptive"),
        (1.5, "none", "entmax"),
        (1.5, "static", "asentmax_static"),
        (1.3, "none", "entmax1.3"),
        (2.0, "none", "sparsemax"),
        (1.5, "adaptive", "asentmax"),
        (2.0, "adaptive", "asentmax"),
    ],
)
def test_method_name_follows_the_config(alpha: float, scaling: str, name: str) -> None:
    assert method_name(patch_model(tiny_model("llama"), alpha=alpha, query_scaling=scaling).config) == name


def test_method_name_of_a_native_model_is_softmax() -> None:
    assert method_name(tiny_model("llama").config) == "softmax"


@pytest.mark.parametrize(
    ("correct", "samples", "low", "high"), [(8, 10, 49.02, 94.33), (0, 10, 0, 27.75), (10, 10, 72.25, 100)]
)
def test_wilson_interval_equals_published_values(correct: int, samples: int, low: float, high: float) -> None:
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("settings", [{}, {"alpha": 1.0, "query_scaling": "none"}])
def test_teacher_forced_hits_agree_with_greedy_generation(settings: dict[str, Any]) -> None:
    model = patch_model(tiny_model("llama"), **settings)
    prompt = random_tokens(8, 20)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, eos_token_id=None
    )
    answers = output[:, 20:].clone()
    answers[::4, 0] += 1  # a wrong first token,
    answers[1::4, 2] += 1  # or a wrong last one
    input_ids = torch.cat([prompt, answers % 64], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, 20:] = input_ids[:, 20:]
    with torch.no_grad():
        exact, tokens = teacher_forced_hits(model, input_ids, labels)
    assert exact.tolist() == [False, False, True, True] * 2
    assert exact.tolist() == (output == input_ids).all(1).tolist()
    torch.testing.assert_close(tokens[1::4], torch.full((2,), 2 / 3))
    assert tokens[2] == 1


def test_ladder_counts_what_a_constant_model_gets_right() -> None:
    task = build_task("max_retrieval", priorities=8, values=2)
    answer = 1  # the first value's token
    rows = synthetic_ladder(constant_model(answer), task, [4, 32], samples=40, seed=3)
    for row, length in zip(rows, [4, 32], strict=True):
        answers = [sample_batch(task, 1, length, stream="test", seed=3, index=i)["labels"][0, -1] for i in range(40)]
        right = sum(int(value) == answer for value in answers)
        assert 0 < right < 40
        low, high = wilson_interval(right, 40)
        assert row == pytest.approx({
            "task": "max_retrieval", "method": "softmax", "seed": 3, "length": length, "accuracy": 100 * right / 40,
            "low": low, "high": high, "samples": 40, "beyond_context": False, "token_accuracy": 100 * right / 40,
        })  # fmt: skip


def test_ladder_needs_every_answer_token_right() -> None:
    task = build_task("associative_recall", **RECALL)
    (row,) = synthetic_ladder(constant_model(1 + 4 + 8), task, [32], samples=30)
    assert row["accuracy"] < row["token_accuracy"]
    assert 5 < row["token_accuracy"] < 60  # one value of four


def test_ladder_does_not_depend_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build_task("associative_recall", **RECALL)
    model, sizes = constant_model(1 + 4 + 8), []

    def counted(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        sizes.append(input_ids.numel())
        return teacher_forced_hits(model, input_ids, labels)

    monkeypatch.setattr("hf_asentmax.retrieval.teacher_forced_hits", counted)
    together = synthetic_ladder(model, task, [32], samples=7)
    assert len(sizes) == 1
    assert synthetic_ladder(model, task, [32], samples=7, batch_tokens=130) == together
    assert max(sizes[1:]) <= 130
    assert len(sizes) == 1 + 3
    assert synthetic_ladder(model, task, [32], samples=7, batch_tokens=1) == together


def test_ladder_streams_and_seeds_are_different_samples() -> None:
    task = build_task("max_retrieval", priorities=8, values=2)
    model = constant_model(1)
    found = [
        synthetic_ladder(model, task, [4, 5, 6, 7], samples=50, seed=seed, stream=stream)
        for seed, stream in [(0, "test"), (1, "test"), (0, "validation")]
    ]
    accuracies = [tuple(row["accuracy"] for row in rows) for rows in found]
    assert len(set(accuracies)) == 3


def test_ladder_says_where_it_leaves_the_context_and_the_model_as_it_was() -> None:
    model = constant_model(1, max_position_embeddings=10).train()
    rows = synthetic_ladder(model, build_task("max_retrieval", priorities=4, values=2), [8, 9], samples=2)
    assert [row["beyond_context"] for row in rows] == [False, True]  # query and answer come on top
    assert model.training
    assert torch.is_grad_enabled()


def test_ladder_refuses_a_task_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocabulary of max_retrieval must be at most the model's 64 tokens, got 651"):
        synthetic_ladder(constant_model(1), build_task("max_retrieval"), [8])


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
        (lambda r: synthetic_ladder(r, build_task("max_retrieval"), [-1]), "lengths must be positive"),
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


def test_results_table_notes_lengths_beyond_the_context() -> None:
    reader = Reader(limit=550)
    table = results_table(needle(reader, reader.tokenizer, [500, 1600], [25], samples=2))
    assert "| softmax |    0 |     500 |  25 % |       100.0 | 34.2 to 100.0 |       2 |" in table
    assert "| 1,600 * |" in table
    assert table.endswith("config states (max_position_embeddings); not cut.")
    assert "max_position_embeddings" not in results_table(passkey(reader, reader.tokenizer, [400], samples=2))
