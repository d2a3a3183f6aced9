"""The ladder: what counts as right, and that neither samples nor results depend on how they are run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from retrieval_setup import constant_model

from hf_asentmax import patch_model
from hf_asentmax.evaluation import wilson_interval
from hf_asentmax.ladder import synthetic_ladder, teacher_forced_hits
from hf_asentmax.samples import draw_chunk, to_dataset
from hf_asentmax.tasks import build_task

RECALL = {"keys": 8, "values": 4, "key_tokens": 2, "value_tokens": 2, "queries": 2, "fillers": 4}


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


def test_teacher_forced_hits_equal_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny_model("llama"))
    input_ids = random_tokens(6, 40)
    with torch.no_grad():
        best = model(input_ids).logits.argmax(-1)
    generator = torch.Generator().manual_seed(0)
    asked = torch.rand(6, 40, generator=generator) < torch.tensor([0.1, 0.1, 0.3, 0.5, 0.9, 1.0])[:, None]
    asked[:, 5] = True
    wrong = torch.rand(6, 40, generator=generator) < torch.tensor([0.0, 0.3, 0.0, 0.1, 0.5, 0.0])[:, None]
    labels = torch.where(asked, (best.roll(1, 1) + wrong) % 64, -100)  # the first token is never asked for
    monkeypatch.setattr("hf_asentmax.ladder.HEAD_POSITIONS", 7)
    sizes: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        exact, tokens = teacher_forced_hits(model, input_ids, labels)
    asked[:, 0] = False
    shares = [(~wrong[row][asked[row]]).float().mean().item() for row in range(6)]
    assert tokens.tolist() == pytest.approx(shares)
    assert exact.tolist() == [share == 1 for share in shares]
    assert len(set(shares)) >= 3
    assert max(sizes) <= 7  # no logits but of the answers, and few at once
    assert sum(sizes) == asked.sum()


def test_teacher_forced_hits_and_the_loss_take_classes_at_their_tokens() -> None:
    task = build_task("two_back", symbols=16)
    input_ids, labels = draw_chunk(task, range(4), 20, stream="test", seed=0)
    source, blank = input_ids[:, 1:-1], task.vocab_size - 1
    classes = torch.cat([torch.full((4, 2), blank), source[:, :-2]], 1)
    model = tiny_model("llama")
    output = model(input_ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, 1:-1].flatten(0, 1), classes.flatten())
    torch.testing.assert_close(output.loss, expected)
    predicted = torch.nn.functional.pad(classes, (1, 1))
    predicted[1, 1] = predicted[2, 20] = 0  # wrong at the first token of a source, or at the last
    oracle: Any = SimpleNamespace(
        device=labels.device,
        base_model=lambda **_: SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(predicted)),
        get_output_embeddings=lambda: lambda hidden: hidden,
    )
    exact, tokens = teacher_forced_hits(oracle, input_ids, labels)
    assert exact.tolist() == [True, False, False, True]
    assert tokens.tolist() == pytest.approx([1, 0.95, 0.95, 1])


@pytest.mark.parametrize("task", [build_task("flip_flop"), build_task("associative_recall", **RECALL)], ids=str)
def test_teacher_forced_hits_add_no_wait_for_the_device(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A meta tensor has no values: an `.item()`, a nonzero, or a mask as an index, raises. The layers are left out:
    # there Transformers waits once, before the first one, to know whether documents are packed.
    model = tiny_model("llama").to("meta")

    def forward(input_ids: torch.Tensor, *, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=model.model.embed_tokens(input_ids))

    monkeypatch.setattr(model.model, "forward", forward)
    input_ids, labels = draw_chunk(task, range(3), 32, stream="test", seed=0)
    with torch.no_grad():
        exact, tokens = teacher_forced_hits(model, input_ids, labels)
    assert exact.shape == tokens.shape == (3,)
    assert exact.device.type == "meta"


def test_ladder_counts_what_a_constant_model_gets_right() -> None:
    task = build_task("max_retrieval", priorities=8, values=2)
    answer = 1  # the first value's token
    rows = synthetic_ladder(constant_model(answer), task, [4, 32], samples=40, seed=3)
    for row, length in zip(rows, [4, 32], strict=True):
        labels = to_dataset(task, 40, length, stream="test", seed=3)["labels"]
        right = sum(one[-1] == answer for one in labels)
        assert 0 < right < 40
        low, high = wilson_interval(right, 40)
        assert row == pytest.approx({
            "task": "max_retrieval", "method": "softmax", "positions": None, "stream": "test", "seed": 3,
            "length": length, "accuracy": 100 * right / 40, "low": low, "high": high, "samples": 40,
            "beyond_context": False, "token_accuracy": 100 * right / 40,
        })  # fmt: skip


def test_ladder_rows_say_the_method_and_its_positions() -> None:
    model = patch_model(tiny_model("llama"), positions="nape")
    (row,) = synthetic_ladder(model, build_task("copy"), [4], samples=2, stream="validation")
    assert (row["method"], row["positions"], row["stream"]) == ("asentmax", "nape", "validation")


def test_ladder_needs_every_answer_token_right() -> None:
    task = build_task("associative_recall", **RECALL)
    (row,) = synthetic_ladder(constant_model(1 + 4 + 8), task, [32], samples=30)
    assert row["accuracy"] < row["token_accuracy"]
    assert 5 < row["token_accuracy"] < 60  # one value of four


def test_ladder_evaluates_the_exported_samples_at_any_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_asentmax.samples.CHUNK_TOKENS", 64)  # 2 samples
    task = build_task("associative_recall", **RECALL)
    model, batches = constant_model(1 + 4 + 8), []

    def recorded(model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        batches.append(input_ids)
        return teacher_forced_hits(model, input_ids, labels)

    monkeypatch.setattr("hf_asentmax.ladder.teacher_forced_hits", recorded)
    exported = to_dataset(task, 7, 32, stream="test", seed=0)["input_ids"][:]
    found = []
    for batch_tokens, sizes in ((1 << 15, [7]), (130, [3, 3, 1]), (1, [1] * 7)):
        found.append(synthetic_ladder(model, task, [32], samples=7, batch_tokens=batch_tokens))
        assert [len(batch) for batch in batches] == sizes
        assert torch.cat(batches).tolist() == exported
        batches.clear()
    assert found[0] == found[1] == found[2]


def test_ladder_takes_fewer_samples_of_long_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_asentmax.ladder.LONG", 8)
    task = build_task("max_retrieval", priorities=4, values=2)
    for samples, beyond, expected in ((5, 3, [5, 3]), (2, 3, [2, 2])):
        rows = synthetic_ladder(constant_model(1), task, [8, 9], samples=samples, samples_beyond=beyond)
        assert [row["samples"] for row in rows] == expected


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


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ([8, 7], {}, "flip_flop length must be even, got 7"),
        ([], {}, "lengths must be positive"),
        ([8, -1], {}, r"lengths must be positive, got \[8, -1\]"),
        ([8], {"samples": 0}, "samples must be positive"),
        ([8], {"samples_beyond": 0}, "samples_beyond must be positive"),
        ([8], {"batch_tokens": 0}, "batch_tokens must be positive"),
        ([8], {"stream": "tset"}, "stream must be one of"),
    ],
)
def test_ladder_refuses_bad_input_before_it_computes(
    lengths: list[int], settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_asentmax.ladder.teacher_forced_hits", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        synthetic_ladder(constant_model(1), build_task("flip_flop"), lengths, **settings)
