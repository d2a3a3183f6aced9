"""The sparse losses of the output layer: values, gradients, the Trainer's means, and the scripts' --loss."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, random_tokens, tiny_model
from safetensors.torch import load_file
from torch import Tensor
from training_setup import arguments, rows, tiny_texts, write_model, write_texts

from hf_asentmax import losses, patch_model
from hf_asentmax.losses import LOSSES, output_loss
from hf_asentmax.training import ASEntmaxTrainer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
ALPHAS = {"entmax15": 1.5, "sparsemax": 2.0}


def entmax_by_bisection(z: Tensor, alpha: float) -> Tensor:
    """Entmax of the last axis, float64."""
    z = (alpha - 1) * z
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(200):
        tau = (low + high) / 2
        above = (z - tau).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    return (z - low).clamp(min=0).pow(1 / (alpha - 1))


def fenchel_young(z: Tensor, y: int, alpha: float) -> tuple[float, Tensor]:
    """The loss of one row of logits, p.(z - z_y) + (1 - sum p^alpha) / (alpha (alpha - 1)), and its gradient."""
    z = z.double()
    p = entmax_by_bisection(z, alpha)
    loss = p @ (z - z[y]) + (1 - p.pow(alpha).sum()) / (alpha * (alpha - 1))
    p[y] -= 1
    return loss.item(), p


def loss_of(name: str, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    function = output_loss(name)
    assert function is not None
    return function(SimpleNamespace(logits=logits), labels, **options)


def some_labels(batch: int, length: int, vocabulary: int) -> Tensor:
    """Random labels, about a third of them left out, the last one not."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.35] = -100
    labels[-1, -1] = 0
    return labels


@pytest.mark.parametrize("name", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocabulary", "spread"), [(2, 1.0), (63, 0.01), (400, 0.003), (400, 4.0)])
def test_loss_and_gradient_are_those_of_the_formula(
    name: str, dtype: torch.dtype, vocabulary: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK", 5 * vocabulary)  # five rows at once: the last chunk is smaller
    generator = torch.Generator().manual_seed(0)
    logits = (spread * torch.randn(3, 12, vocabulary, dtype=torch.float64, generator=generator)).to(dtype)
    labels = some_labels(3, 12, vocabulary)
    expected, gradient = 0.0, torch.zeros(3, 12, vocabulary, dtype=torch.float64)
    for b, t in (labels[:, 1:] != -100).nonzero().tolist():
        value, gradient[b, t] = fenchel_young(logits[b, t], int(labels[b, t + 1]), ALPHAS[name])
        expected += value
    count = int((labels[:, 1:] != -100).sum())
    assert count % 5

    logits.requires_grad_()
    loss = loss_of(name, logits, labels)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[torch.promote_types(dtype, torch.float32)]  # of 16 bits only the gradient is rounded
    torch.testing.assert_close(loss.item(), expected / count, **tolerance)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double() * count, gradient, **TOLERANCE[dtype])
    assert (logits.grad[gradient == 0] == 0).all()  # no label, the last position, or outside the support


@pytest.mark.parametrize("name", ALPHAS)
def test_loss_gradient_is_that_of_its_values(name: str) -> None:
    logits = torch.randn(2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = some_labels(2, 6, 7)
    assert torch.autograd.gradcheck(lambda logits: loss_of(name, logits, labels), logits)


@pytest.mark.parametrize("name", ALPHAS)
def test_loss_takes_the_count_of_the_trainer(name: str) -> None:
    logits, labels = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0)), some_labels(2, 6, 7)
    count = int((labels[:, 1:] != -100).sum())
    loss = loss_of(name, logits, labels)
    for given in (2 * count, torch.tensor(2 * count)):
        torch.testing.assert_close(loss_of(name, logits, labels, num_items_in_batch=given), loss / 2)
    nothing = torch.full_like(labels, -100)
    logits.requires_grad_()
    empty = loss_of(name, logits, nothing, num_items_in_batch=torch.tensor(count))  # as within an accumulated batch
    empty.backward()
    assert empty.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_loss_is_float32_under_autocast() -> None:
    logits, labels = torch.randn(2, 6, 70, generator=torch.Generator().manual_seed(0)), some_labels(2, 6, 70)
    expected = loss_of("entmax15", logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of("entmax15", logits, labels), expected)


def test_loss_of_another_name_is_refused() -> None:
    assert output_loss("cross_entropy") is None
    assert set(LOSSES) == {"cross_entropy", *ALPHAS}
    with pytest.raises(ValueError, match="loss must be one of cross_entropy, entmax15, sparsemax, got 'entmax'"):
        output_loss("entmax")


def sgd_trainer(folder: Path, **options: Any) -> ASEntmaxTrainer:
    """Two steps of plain gradient descent on rows of which some have few labels."""
    data = [dict(rows()[i]) for i in range(12)]
    for row, labels in enumerate(item["labels"] for item in data):
        labels[: 5 * (row % 4)] = -100
    plain: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "max_steps": 2}
    args = arguments(folder, learning_rate=0.5, logging_steps=1, save_strategy="no", **plain, **options)
    model = patch_model(tiny_model("llama"))
    return ASEntmaxTrainer(
        model, args, train_dataset=data, eval_dataset=data[:5], compute_loss_func=output_loss("entmax15")
    )


def test_trainer_accumulates_as_it_would_train_on_a_larger_batch(tmp_path: Path) -> None:
    whole = sgd_trainer(tmp_path / "a", per_device_train_batch_size=4)
    parts = sgd_trainer(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    start = {name: x.clone() for name, x in whole.model.named_parameters()}
    for trainer in (whole, parts):
        trainer.train()
    weights = dict(parts.model.named_parameters())
    for name, x in whole.model.named_parameters():
        torch.testing.assert_close(weights[name], x, **TOLERANCE[torch.float32])
    assert max((x - start[name]).abs().max() for name, x in weights.items()) > 0.01
    for one, other in zip(whole.state.log_history[:2], parts.state.log_history[:2], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_trainer_evaluates_with_the_loss_it_trains_with(tmp_path: Path) -> None:
    trainer = sgd_trainer(tmp_path, per_device_eval_batch_size=5)
    data = [trainer.eval_dataset[i] for i in range(5)]
    inputs = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "position_ids", "labels")}
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = loss_of("entmax15", trainer.model(**inputs).logits, labels).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_trainer_with_several_devices_in_one_process_takes_the_same_mean(tmp_path: Path) -> None:
    trainer = sgd_trainer(tmp_path)
    tokens = random_tokens(4, 9)
    found = []
    for devices in (1, 2):  # DataParallel gathers the outputs, so that one call sees the labels of all devices
        trainer.args._n_gpu = devices
        inputs = {"input_ids": tokens, "labels": tokens.clone()}
        count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        found.append(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=count).mean().item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_trainer_refuses_smoothed_labels(tmp_path: Path) -> None:
    for model, loss in ((patch_model(tiny_model("llama")), "cross_entropy"), (tiny_model("llama"), "sparsemax")):
        with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0 .*got 0\.1; leave it out"):
            ASEntmaxTrainer(
                model,
                arguments(tmp_path, label_smoothing_factor=0.1),
                train_dataset=rows(),
                compute_loss_func=output_loss(loss),
            )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model with its tokenizer in native/, and texts in a.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "native")
    write_texts(folder / "a.jsonl", tiny_texts(20))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, script: str, output: Path, *options: str) -> dict[str, Any]:
    shared = ["--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true", "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", [script, *shared, *options])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    results: dict[str, Any] = json.loads((output / "results.json").read_text("utf-8"))
    return results


@pytest.mark.parametrize("kind", ["pretrain entmax15", "finetune sparsemax", "finetune entmax15 adapter"])
def test_scripts_train_with_the_loss(
    kind: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, loss, *adapter = kind.split()
    source = ["--model", str(inputs / "native")]
    if script == "pretrain":
        source = ["--config", str(inputs / "native" / "config.json"), "--tokenizer", str(inputs / "native")]
    data = ["--data", str(inputs / "a.jsonl"), "--eval_data", str(inputs / "a.jsonl"), "--sequence_length", "16"]
    steps = ["--max_steps", "12", "--save_steps", "6", "--learning_rate", "2e-2", "--per_device_train_batch_size", "8"]
    options = [*source, *data, *steps, *(["--lora_r", "2"] if adapter else [])]
    results = run(monkeypatch, f"{script}.py", tmp_path, *options, "--loss", loss)
    assert results["settings"]["loss"] == loss
    first = results["log"][0]["loss"]
    assert first < 1.5  # cross entropy would begin at log 64 = 4.2
    assert results["eval_loss"] < 0.97 * first
    assert "perplexity" not in results  # that of cross entropy, which this is not
    assert "eval_loss" in capsys.readouterr().out
    assert list(tmp_path.glob("*model.safetensors"))
    with pytest.raises(ValueError, match=f"loss '{loss}' then, 'cross_entropy' now"):
        run(monkeypatch, f"{script}.py", tmp_path, *options)


def test_train_synthetic_trains_with_the_loss_and_refuses_a_wrong_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--task", "max_retrieval", "--task_options", '{"priorities": 8, "values": 3}', "--sizes", "1", "32", "2"]
    sizes = ["64", "--min_length", "4", "--max_length", "8", "--lengths", "8", "--samples", "5"]
    steps = ["--max_steps", "30", "--per_device_train_batch_size", "64", "--learning_rate", "1e-2"]
    weights = {}
    for loss in LOSSES:
        results = run(monkeypatch, "train_synthetic.py", tmp_path / loss, *task, *sizes, *steps, "--loss", loss)
        logged = [entry["loss"] for entry in results["log"] if "loss" in entry]
        assert sum(logged[-5:]) < 0.9 * sum(logged[:5])
        weights[loss] = load_file(tmp_path / loss / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(weights["entmax15"], weights["sparsemax"])
    assert not torch.equal(weights["entmax15"], weights["cross_entropy"])
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "train_synthetic.py", tmp_path / "typo", "--loss", "entmax1.5")
    assert "invalid choice: 'entmax1.5'" in capsys.readouterr().err
