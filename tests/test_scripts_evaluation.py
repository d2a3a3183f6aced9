"""scripts/evaluate_perplexity.py, evaluate_retrieval.py and evaluate_synthetic.py as a user runs them."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from peft import AutoPeftModelForCausalLM, PromptTuningConfig, get_peft_model
from processes import run_processes
from retrieval_setup import VOCABULARY, byte_tokenizer, constant_model
from training_setup import tiny_texts, write_model, write_texts
from transformers import AutoModelForCausalLM

from hf_asentmax import ladder, patch_model
from hf_asentmax.adapters import add_lora, load_causal_model
from hf_asentmax.ladder import synthetic_ladder
from hf_asentmax.perplexity import perplexity_by_length
from hf_asentmax.retrieval import retrieve
from hf_asentmax.tasks import build_task, save_task

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
PNG = b"\x89PNG"
TASK = build_task("max_retrieval", priorities=8, values=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Softmax and ASEntmax models over bytes, one that always says token 1, a model over letters, and texts."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("softmax", "asentmax"):
        model = tiny_model("llama", vocab_size=VOCABULARY)
        (patch_model(model) if name == "asentmax" else model).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    constant_model(1).save_pretrained(folder / "constant")
    for name in ("constant", "asentmax"):
        save_task(TASK, folder / name)
    write_model(folder / "letters")
    write_texts(folder / "texts.jsonl", tiny_texts(20))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: object) -> None:
    path = str(SCRIPTS / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *map(str, options)])
    runpy.run_path(path, run_name="__main__")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_evaluate_perplexity_writes_what_it_prints(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", inputs / "texts.jsonl", "--lengths", 12, 24, "--scored_tokens", 8, "--buckets", 3]
    run(monkeypatch, "evaluate_perplexity", "--model", inputs / "letters", *data, "--output_dir", tmp_path / "new")
    results, printed = read(tmp_path / "new" / "results.json"), capsys.readouterr().out
    assert [row["length"] for row in results["by_length"]] == [12, 24]
    assert [(row["first"], row["last"]) for row in results["by_position"]] == [(1, 8), (9, 15), (16, 23)]
    assert results["settings"]["scored_tokens"] == 8
    enough = sum(len(text) >= 24 for text in tiny_texts(20))  # a letter is a token
    assert {row["documents"] for row in results["by_length"] + results["by_position"]} == {enough}
    assert f"{enough} documents, the same at every length: of 20 read, those of at least 24 tokens" in printed
    assert (tmp_path / "new" / "results.md").read_text(encoding="utf-8").strip() in printed
    assert "of the first model's" not in printed
    assert "of its own at 12" in printed
    for row in results["by_length"]:
        assert f"{row['perplexity']:.2f}" in printed
        assert f"{row['growth_low']:.3f} to {row['growth_high']:.3f}" in printed
        assert row["growth"] == pytest.approx(row["perplexity"] / results["by_length"][0]["perplexity"])
    assert (tmp_path / "new" / "perplexity.png").read_bytes().startswith(PNG)


def test_an_adapter_is_evaluated_with_all_that_it_trained(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_lora(AutoModelForCausalLM.from_pretrained(inputs / "asentmax"), str(tmp_path), r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
                assert ".lora_" in name or ".query_scale." in name, name
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tokens = [random_tokens(40, seed=i).tolist() for i in range(3)]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
    data = ["--data", tmp_path / "tokens.jsonl", "--lengths", 16, 32, "--scored_tokens", 8, "--buckets", 0]
    models = ["--model", tmp_path, inputs / "asentmax", "--method", "adapter", "base"]
    run(monkeypatch, "evaluate_perplexity", *models, *data, "--output_dir", tmp_path / "out")
    rows = read(tmp_path / "out" / "results.json")["by_length"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    found = [row["losses"] for row in rows if row["method"] == "adapter"]
    for length, losses in zip((16, 32), found, strict=True):
        ids = torch.tensor([row[-length:] for row in tokens])
        scores = loaded(ids).logits[:, -9:-1].double().log_softmax(-1)
        expected = -scores.gather(-1, ids[:, -8:, None]).mean((1, 2))
        torch.testing.assert_close(torch.tensor(losses).double(), expected, rtol=1e-5, atol=1e-5)
    assert found[1] != pytest.approx(rows[-1]["losses"], rel=1e-3)  # the base
    run(monkeypatch, "evaluate_retrieval", "--model", tmp_path, "--lengths", 400, "--samples", 1)
    prompts = get_peft_model(load_causal_model(str(tmp_path)), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    prompts.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(SystemExit, match="must be one that merges into the weights, such as LoRA, got PROMPT_TUNING"):
        run(monkeypatch, "evaluate_retrieval", "--model", tmp_path / "prompts", "--lengths", 400, "--samples", 1)
    picture = ["--model", tmp_path, "--figures", "scale", "--data", tmp_path / "tokens.jsonl", "--samples", 1]
    run(monkeypatch, "analyze", *picture, "--lengths", 16, 32, "--output_dir", tmp_path / "pictures")
    assert list((tmp_path / "pictures").glob("scale*.png"))


def test_evaluate_perplexity_compares_models_on_the_same_tokens(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [random_tokens(600 + i, seed=i).tolist() for i in range(3)]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in tokens))
    models = ["--model", inputs / "softmax", inputs / "softmax", inputs / "constant"]  # the last has no tokenizer
    data = ["--data", tmp_path / "tokens.jsonl", "--lengths", 40, 520, "--scored_tokens", 8, "--max_documents", 2]
    options = ["--rope", "none", "yarn:2", "none", "--bf16", "--buckets", 2, "--output_dir", tmp_path]
    run(monkeypatch, "evaluate_perplexity", *models, *data, *options)
    rows, printed = read(tmp_path / "results.json")["by_length"], capsys.readouterr().out
    assert [(row["method"], row["length"]) for row in rows] == [
        (method, length) for method in ("softmax", "softmax, yarn:2", "softmax") for length in (40, 520)
    ]
    assert [row["beyond_context"] for row in rows] == [False, True] * 3
    assert "2 documents, the same at every length: of 2 read" in printed
    model = AutoModelForCausalLM.from_pretrained(inputs / "softmax")
    with torch.autocast("cpu", torch.bfloat16):
        expected = perplexity_by_length(model, tokens[:2], [40, 520], scored=8)
    assert [row["losses"] for row in rows[:2]] == [row["losses"] for row in expected]
    assert rows[2]["losses"] != rows[0]["losses"]
    assert [row["ratio"] for row in rows[:2]] == [1, 1]
    assert rows[5]["ratio"] == pytest.approx(rows[5]["perplexity"] / rows[1]["perplexity"])
    assert f"{rows[5]['ratio_low']:.3f} to {rows[5]['ratio_high']:.3f}" in printed


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["softmax", "letters"], [], "models must share one tokenizer to be compared by token"),
        (["softmax", "asentmax"], ["--rope", "yarn:1", "none", "none"], "rope must be given once or for each of the 2"),
        (["softmax"], ["--rope", "ntk"], "rope must be none, yarn:FACTOR.* or dynamic:FACTOR"),
        (["softmax", "asentmax"], ["--method", "one"], "method must name each of the 2 models"),
        (["softmax"], ["--data", "tokens"], "tokens of the documents must be below the 258 of .*, got 300"),
        (
            ["softmax"],
            ["--data", "tokens", "--lengths", 50],
            "documents must hold one of at least 50 tokens, the longest of 1 has 40",
        ),
    ],
)
def test_evaluate_perplexity_refuses_what_cannot_be_compared(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: list[str], options: list[Any], message: str
) -> None:
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"input_ids": [300] * 40}))
    words = ["--data", inputs / "texts.jsonl", "--lengths", 12, "--scored_tokens", 8, *options]
    words = [tmp_path / "tokens.jsonl" if word == "tokens" else word for word in words]
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run(monkeypatch, "evaluate_perplexity", "--model", *(inputs / name for name in models), *words)


def test_evaluate_perplexity_names_the_remedy_where_documents_are_short(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="error: .*lower the lengths or give longer documents"):
        run(monkeypatch, "evaluate_perplexity", "--model", inputs / "letters", "--data", inputs / "texts.jsonl")


def test_evaluate_retrieval_compares_models_by_depth_and_length(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = ["--lengths", 500, 520, "--depths", 0, 100, "--samples", 1]
    models = ["--model", inputs / "softmax", inputs / "asentmax"]
    run(monkeypatch, "evaluate_retrieval", *models, "--task", "needle", *cells, "--output_dir", tmp_path / "out")
    rows = read(tmp_path / "out" / "results.json")
    assert [(row["method"], row["length"], row["depth"]) for row in rows] == [
        (method, length, depth) for method in ("softmax", "asentmax") for length in (500, 520) for depth in (0, 100)
    ]
    assert [row["beyond_context"] for row in rows] == [False, False, True, True] * 2
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert table.strip() in capsys.readouterr().out
    assert "520 *" in table
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(PNG)


def test_evaluate_retrieval_gives_each_task_a_folder(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", inputs / "softmax", inputs / "softmax", "--method", "bare", "YaRN", "--rope", "none", "yarn:2"]
    words += ["--task", "multikey", "frequent_words", "--lengths", 700, "--depths", 50, "--samples", 2]
    run(monkeypatch, "evaluate_retrieval", *words, "--batch_size", 2, "--bf16", "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    for task, picture in (("multikey", "heatmap.png"), ("frequent_words", "ladder.png")):
        rows = read(tmp_path / task / "results.json")
        assert [(row["method"], row["model"]) for row in rows] == [
            ("bare", f"{inputs / 'softmax'}"), ("YaRN", f"{inputs / 'softmax'}, yarn:2")
        ]  # fmt: skip
        assert (tmp_path / task / picture).read_bytes().startswith(PNG)
        assert f"{task}\n\n{(tmp_path / task / 'results.md').read_text(encoding='utf-8').strip()}" in printed


def test_evaluate_retrieval_that_is_stopped_leaves_the_tasks_it_has_done(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", inputs / "softmax", "--task", "passkey", "variables", "--lengths", 300, "--samples", 1]
    with pytest.raises(SystemExit, match="error: length must be at least"):  # variables has a longer question
        run(monkeypatch, "evaluate_retrieval", *words, "--output_dir", tmp_path)
    assert [row["length"] for row in read(tmp_path / "passkey" / "results.json")] == [300]
    assert not (tmp_path / "variables").exists()


@pytest.mark.parametrize("name", ["evaluate_perplexity", "evaluate_synthetic"])
def test_evaluation_that_is_stopped_leaves_the_models_it_has_done(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(inputs / "constant", damaged, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"input_ids": random_tokens(1, 12, vocab_size=60)[0].tolist()}))
    words = {
        "evaluate_perplexity": ["--lengths", 12, "--scored_tokens", 8, "--data", tmp_path / "tokens.jsonl"],
        "evaluate_synthetic": ["--lengths", 12, "--samples", 3],
    }[name]
    with pytest.raises(SystemExit, match="error: .*damaged"):
        run(monkeypatch, name, "--model", inputs / "constant", damaged, *words, "--output_dir", tmp_path / "out")
    results = read(tmp_path / "out" / "results.json")
    assert len(results["by_length"] if name == "evaluate_perplexity" else results) == 1


def test_evaluate_synthetic_compares_models_on_the_task_they_name(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--model", inputs / "constant", inputs / "asentmax", "--dtype", "bfloat16", "--method", "one", "two"]
    options = ["--lengths", 8, 16, "--samples", 20, "--seed", 3, "--stream", "validation", "--output_dir", tmp_path]
    run(monkeypatch, "evaluate_synthetic", *models, *options)
    expected = []
    for folder, name in (("constant", "one"), ("asentmax", "two")):
        model = AutoModelForCausalLM.from_pretrained(inputs / folder, dtype=torch.bfloat16)
        rows = synthetic_ladder(model, TASK, [8, 16], samples=20, seed=3, stream="validation")
        expected += [row | {"model": str(inputs / folder), "method": name} for row in rows]
    assert 0 < expected[0]["accuracy"] < 100
    assert read(tmp_path / "results.json") == expected
    assert (tmp_path / "results.md").read_text(encoding="utf-8").strip() in capsys.readouterr().out
    assert (tmp_path / "ladder.png").read_bytes().startswith(PNG)


def test_evaluate_synthetic_computes_as_training_did(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, bool, torch.dtype]] = []

    def spy(model: Any, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        seen.append((model.dtype, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return synthetic_ladder(model, *arguments, **options)

    monkeypatch.setattr(ladder, "synthetic_ladder", spy)
    options = ["--lengths", 8, "--samples", 2, "--output_dir", tmp_path]
    run(monkeypatch, "evaluate_synthetic", "--model", inputs / "asentmax", "--bf16", *options)
    run(monkeypatch, "evaluate_synthetic", "--model", inputs / "asentmax", *options)
    assert seen == [(torch.float32, True, torch.bfloat16), (torch.float32, False, torch.bfloat16)]


def test_evaluate_synthetic_takes_another_task(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ["--task", "copy", "--task_options", '{"symbols": 5}', "--lengths", 8, "--samples", 2]
    run(monkeypatch, "evaluate_synthetic", "--model", inputs / "asentmax", *task, "--output_dir", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(inputs / "asentmax")
    (expected,) = synthetic_ladder(model, build_task("copy", symbols=5), [8], samples=2)
    (row,) = read(tmp_path / "results.json")
    assert row == expected | {"model": str(inputs / "asentmax")}
    assert (row["task"], row["method"], row["samples"]) == ("copy", "asentmax", 2)


def test_evaluate_synthetic_asks_for_the_task_before_it_evaluates(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_asentmax.ladder.synthetic_ladder", lambda *_, **__: pytest.fail("evaluated"))
    with pytest.raises(SystemExit, match="error: task must be named where .*letters.*task.json is missing"):
        run(monkeypatch, "evaluate_synthetic", "--model", inputs / "asentmax", inputs / "letters")


def test_evaluation_shared_among_processes_gives_the_same_results(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "both.py").write_text(
        "import runpy, sys\n"
        "for options in open(sys.argv[1], encoding='utf-8').read().splitlines():\n"
        "    sys.argv = options.split('|')\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n",
        encoding="utf-8",
    )
    texts = [SCRIPTS / "evaluate_perplexity.py", "--model", inputs / "letters", "--data", inputs / "texts.jsonl"]
    texts += ["--lengths", 12, "--scored_tokens", 8, "--buckets", 0, "--output_dir", tmp_path / "perplexity"]
    keys = [SCRIPTS / "evaluate_retrieval.py", "--model", inputs / "asentmax", "--task", "passkey"]
    keys += ["--lengths", 400, "--samples", 3, "--output_dir", tmp_path / "passkey"]
    task = [SCRIPTS / "evaluate_synthetic.py", "--model", inputs / "constant", "--lengths", 8, 3000, "--samples", 5]
    task += ["--seed", 2, "--output_dir", tmp_path / "task"]  # 1 chunk, so one process has nothing to do, then 3
    lines = ["|".join(map(str, options)) for options in (texts, keys, task)]
    (tmp_path / "runs.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run_processes(2, tmp_path / "both.py", tmp_path / "runs.txt")
    assert [process.returncode for process in done] == [0, 0], done
    assert [process.stdout.count("95 % interval") for process in done] == [3, 0]  # one process prints

    model = AutoModelForCausalLM.from_pretrained(inputs / "asentmax")
    passkey = retrieve(model, byte_tokenizer(), "passkey", [400], samples=3)
    own = {"model": str(inputs / "asentmax")}
    assert read(tmp_path / "passkey" / "results.json") == [row | own for row in passkey]
    constant = inputs / "constant"
    ladder = synthetic_ladder(AutoModelForCausalLM.from_pretrained(constant), TASK, [8, 3000], samples=5, seed=2)
    assert all(0 < row["accuracy"] < 100 for row in ladder)
    assert read(tmp_path / "task" / "results.json") == [row | {"model": str(constant)} for row in ladder]
    letters = AutoModelForCausalLM.from_pretrained(inputs / "letters")
    documents = [[4 + ord(letter) - ord("a") for letter in text] for text in tiny_texts(20) if len(text) >= 12]
    (found,) = read(tmp_path / "perplexity" / "results.json")["by_length"]
    (expected,) = perplexity_by_length(letters, documents, [12], scored=8)
    assert found["losses"] == pytest.approx(expected["losses"])


@pytest.mark.parametrize("script", ["evaluate_perplexity", "evaluate_retrieval", "evaluate_synthetic"])
def test_evaluation_help_teaches(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, script, "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"python scripts/{script}.py --model" in text
    assert "accelerate launch" in text
