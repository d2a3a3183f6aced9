"""Alpha's schedule, the Trainer, and support statistics."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from training_setup import arguments, rows, tiny_tokenizer
from transformers import TrainerCallback, TrainerState

from hf_asentmax import patch_model
from hf_asentmax.adapters import add_lora
from hf_asentmax.analysis import attention_support
from hf_asentmax.training import AlphaSchedule, ASEntmaxTrainer, current_alpha


def sparse_model(family: str = "llama", **options: Any) -> Any:
    """A patched model whose attention has exact zeros."""
    model = patch_model(tiny_model(family), **{"query_scaling": "static", **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(300.0)
            if ".query_scale." in name:
                parameter.normal_()
    return model


def test_schedule_holds_then_rises_linearly_to_exactly_the_target() -> None:
    schedule = AlphaSchedule(1.7, start=1.1, hold=0.2, fraction=0.4)
    alphas = [schedule.alpha_at(step, 10) for step in range(11)]
    assert alphas[:3] == [1.1] * 3
    assert alphas[6:] == [1.7] * 5
    assert alphas[2:7] == pytest.approx([1.1, 1.25, 1.4, 1.55, 1.7], abs=1e-12)
    assert AlphaSchedule(1.5, fraction=0.0).alpha_at(0, 10) == 1.5
    assert AlphaSchedule(1.5, fraction=1.0).alpha_at(9, 10) == pytest.approx(1.45)
    assert AlphaSchedule(1.2, start=1.8, fraction=1.0).alpha_at(5, 10) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 2.5}, r"target must be in \[1, 2\], got 2\.5"),
        ({"start": 0.5}, r"start must be in \[1, 2\], got 0\.5"),
        ({"hold": 0.6, "fraction": 0.6}, "together at most 1, got 0.6 and 0.6"),
        ({"hold": -0.1}, "together at most 1, got -0.1"),
    ],
)
def test_schedule_refuses_what_it_cannot_follow(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlphaSchedule(**options)


class Watch(TrainerCallback):
    """Notes what the model computes with at each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layer = kwargs["model"].model.layers[-1].self_attn
        tensor = layer.scheduled_alpha
        alpha = kwargs["model"].config.entmax_alpha if tensor is None else tensor.item()
        assert alpha == pytest.approx(kwargs["model"].config.entmax_alpha)
        self.seen.append((round(alpha, 6), tensor is not None))


def test_schedule_moves_alpha_in_training_and_each_checkpoint_says_which(tmp_path: Path) -> None:
    model, watch = patch_model(tiny_model("llama"), alpha=1.0), Watch()
    schedule = AlphaSchedule(1.5, start=1.0, fraction=1.0)
    trainer = ASEntmaxTrainer(
        model, arguments(tmp_path, save_steps=1), train_dataset=rows(), callbacks=[schedule, watch]
    )
    trainer.train()
    assert watch.seen == [(1.0, True), (1.125, True), (1.25, True), (1.375, True)]
    assert model.config.entmax_alpha == 1.5
    assert model.model.layers[0].self_attn.scheduled_alpha is None
    for step, alpha in ((1, 1.0), (3, 1.25), (4, 1.375)):
        config = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text(encoding="utf-8"))
        assert config["entmax_alpha"] == alpha
    again = Watch()
    resumed = patch_model(tiny_model("llama"), alpha=1.0)
    trainer = ASEntmaxTrainer(
        resumed, arguments(tmp_path / "b"), train_dataset=rows(), callbacks=[AlphaSchedule(fraction=1.0), again]
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.seen == watch.seen[2:]


def test_schedule_stopped_early_leaves_the_alpha_of_the_moment() -> None:
    model = patch_model(tiny_model("llama"), alpha=1.0)
    AlphaSchedule(fraction=1.0).settle(model, TrainerState(global_step=5, max_steps=10))
    assert model.config.entmax_alpha == pytest.approx(1.25)


@pytest.mark.parametrize("case", ["plain", "packed", "left-padded", "window"])
def test_attention_support_counts_what_the_weights_say(case: str) -> None:
    model = sparse_model("mistral" if case == "window" else "llama")
    tokens = random_tokens(2, 20)
    visible = torch.ones(2, 20, 20, dtype=torch.bool).tril()
    inputs: dict[str, torch.Tensor] = {}
    if case == "packed":
        lengths = [[7, 1, 12], [20]]
        inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        for row, bounds in enumerate(lengths):
            document = torch.cat([torch.full((n,), i) for i, n in enumerate(bounds)])
            visible[row] &= document[:, None] == document[None]
    if case == "left-padded":
        inputs["attention_mask"] = torch.ones_like(tokens)
        inputs["attention_mask"][0, :6] = 0
        visible[0, :, :6] = visible[0, :6] = False
    if case == "window":
        visible &= ~torch.ones(20, 20, dtype=torch.bool).tril(-model.config.sliding_window)
    found = attention_support(model, tokens, **inputs)
    attentions = model(tokens, output_attentions=True, use_cache=False, **inputs).attentions
    queries = visible.any(-1).sum().item() * 4
    for layer, weights in enumerate(attentions):
        used = ((weights > 0) & visible[:, None]).sum().item()
        assert found.support_size[layer] == pytest.approx(used / queries)
        assert found.zero_share[layer] == pytest.approx(1 - used / (4 * visible.sum().item()))
        assert 0.01 < found.zero_share[layer] < 0.99
    assert found.means() == {
        "support_size": pytest.approx(sum(found.support_size) / 2),
        "zero_share": pytest.approx(sum(found.zero_share) / 2),
    }


def test_attention_support_of_softmax_is_every_visible_key() -> None:
    model = sparse_model(query_scaling="none", alpha=1.0)
    for parameter in model.parameters():
        parameter.data.mul_(0.01)
    found = attention_support(model, random_tokens(1, 9))
    assert found.support_size == (5.0, 5.0)
    assert found.zero_share == (0.0, 0.0)


def test_attention_support_leaves_modes_gradients_and_random_state_alone() -> None:
    model = sparse_model()
    model.train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state, python_state = torch.get_rng_state(), random.getstate()
    attention_support(model, random_tokens(1, 8))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert random.getstate() == python_state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_support_needs_weights() -> None:
    with pytest.raises(RuntimeError, match="must give attention weights"):
        attention_support(tiny_model("llama"), random_tokens(1, 8))


def test_trainer_gives_the_query_scale_its_own_group(tmp_path: Path) -> None:
    model = patch_model(tiny_model("llama"))
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3)
    trainer = ASEntmaxTrainer(model, args, train_dataset=rows(), query_scale_learning_rate=5e-2)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = [group for group in groups if group["lr"] == 5e-2]
    assert len(scale) == 1
    assert scale[0]["weight_decay"] == 0.0
    assert sorted(names[id(p)] for p in scale[0]["params"]) == sorted(n for n in names.values() if ".query_scale." in n)
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    assert {group["lr"] for group in groups} == {1e-3, 5e-2}
    trainer.create_scheduler(num_training_steps=4)
    assert trainer.create_optimizer() is trainer.optimizer


def test_trainer_without_a_rate_or_a_scale_keeps_the_usual_groups(tmp_path: Path) -> None:
    for name, model in (("none", patch_model(tiny_model("llama"))), ("native", tiny_model("llama"))):
        rate = None if name == "none" else 1.0
        trainer = ASEntmaxTrainer(
            model, arguments(tmp_path / name), train_dataset=rows(), query_scale_learning_rate=rate
        )
        assert len(trainer.create_optimizer().param_groups) == 2
        trainer.train()
        assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_logs_tokens_a_second_since_the_line_before(
    accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 104.0, 112.0])  # the first batch, and each line of the log
    monkeypatch.setattr("hf_asentmax.training.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    args = arguments(tmp_path, gradient_accumulation_steps=accumulated)
    trainer = ASEntmaxTrainer(tiny_model("llama"), args, train_dataset=rows())
    trainer.train()
    tokens = 2 * accumulated * 2 * 16  # steps, batches, rows, tokens of a row
    logged = [entry["tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [tokens / 4.0, tokens / 8.0]


def test_trainer_logs_support_into_the_history_and_trains_as_without_it(tmp_path: Path) -> None:
    weights, history = [], []
    for tokens in (0, 256):
        torch.manual_seed(0)
        model = sparse_model()
        args = arguments(tmp_path / str(tokens), eval_strategy="steps", eval_steps=2)
        trainer = ASEntmaxTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), support_tokens=tokens)
        trainer.train()
        weights.append(model.state_dict())
        history.append(trainer.state.log_history)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any("support_size" in entry for entry in history[0])
    logged = [entry for entry in history[1] if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["entmax_alpha"] == 1.5
        assert 1.0 <= entry["support_size"] < 8.5
        assert 0.0 < entry["zero_share"] < 1.0


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_trainer_logs_the_learned_alpha_of_each_head_and_layer(kind: str, tmp_path: Path) -> None:
    model: Any = sparse_model(query_scaling="none", alpha_learned=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.query_scale.alpha_logit.copy_(torch.linspace(-1, 1, 4))
    started = current_alpha(model)
    if kind == "adapter":
        model = add_lora(model, str(tmp_path), r=2)
    args = arguments(tmp_path / "run", learning_rate=0.1, logging_steps=1, save_strategy="no")
    trainer = ASEntmaxTrainer(model, args, train_dataset=rows(), support_tokens=0)
    trainer.train()
    layers = (model.get_base_model() if kind == "adapter" else model).model.layers
    hidden, n = torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.int64)
    expected = {
        f"alpha/layer{i}/head{h}": alpha
        for i, layer in enumerate(layers)
        for h, alpha in enumerate(layer.self_attn.query_scale(hidden, n)[1].tolist())  # what attention computes with
    }
    assert len(set(expected.values())) == 8
    assert min(abs(expected[name] - started[name]) for name in expected) > 1e-3
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {name: alpha for name, alpha in logged[-1].items() if name.startswith("alpha/")} == expected
    assert logged[-1]["entmax_alpha"] == pytest.approx(sum(expected.values()) / 8)
    assert all(logged[0][name] != logged[-1][name] for name in expected)


def test_trainer_trains_in_mixed_precision(tmp_path: Path) -> None:
    model = patch_model(tiny_model("llama"))
    args = arguments(tmp_path, bf16=True, gradient_checkpointing=True, max_steps=2, save_strategy="no")
    trainer = ASEntmaxTrainer(model, args, train_dataset=rows())
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["ssmax", "learned_alpha", "asentmax_static", "asentmax"])
def test_weight_decay_leaves_the_start_of_every_query_scale_alone(method: str, tmp_path: Path) -> None:
    model = patch_model(tiny_model("llama"), method=method)
    trainer = ASEntmaxTrainer(model, arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    scale = {name for name in decayed if ".query_scale." in name}
    assert {name.rpartition(".")[2] for name in scale} == ({"weight"} if method == "asentmax" else set())
    assert any("q_proj" in name for name in decayed)
    assert {names[id(p)] for group in groups for p in group["params"]} == set(names.values())


def test_best_model_at_the_end_has_the_alpha_it_was_evaluated_with(tmp_path: Path) -> None:
    steps = {"max_steps": 8, "eval_steps": 2, "save_steps": 2, "eval_strategy": "steps", "save_strategy": "steps"}
    args = arguments(tmp_path, **steps, learning_rate=0.5, load_best_model_at_end=True)  # it only gets worse
    model = sparse_model()
    schedule = AlphaSchedule(2.0, start=1.0, fraction=1.0)
    trainer = ASEntmaxTrainer(model, args, train_dataset=rows(), eval_dataset=rows(), callbacks=[schedule])
    trainer.train()
    best = trainer.state.best_model_checkpoint
    config = json.loads((Path(best) / "config.json").read_text(encoding="utf-8"))
    assert config["entmax_alpha"] == model.config.entmax_alpha < 2.0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_trainer_that_only_evaluates_keeps_packed_documents_apart(tmp_path: Path) -> None:
    losses = [
        ASEntmaxTrainer(
            tiny_model("llama"), arguments(tmp_path), eval_dataset=rows(), processing_class=tiny_tokenizer(), **train
        ).evaluate()["eval_loss"]
        for train in ({}, {"train_dataset": rows()})
    ]
    assert losses[0] == losses[1]
