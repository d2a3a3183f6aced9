"""scripts/evaluate_perplexity.py, evaluate_retrieval.py and evaluate_synthetic.py as a user runs them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from retrieval_setup import VOCABULARY, byte_tokenizer, constant_model
from training_setup import tiny_texts, write_model, write_texts
from transformers import AutoModelForCausalLM

from hf_asentmax import ladder, patch_model
from hf_asentmax.ladder import synthetic_ladder
from hf_asentmax.perplexity import perplexity_by_length
from hf_asentmax.retrieval import passkey
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
    output = tmp_path / "new" / "perplexity.json"
    data = ["--data", inputs / "texts.jsonl", "--lengths", 12, 24, "--scored_tokens", 8, "--buckets", 3]
    run(monkeypatch, "evaluate_perplexity", "--model", inputs / "letters", *data, "--output", output)
    results, printed = read(output), capsys.readouterr().out
    assert [row["length"] for row in results["by_length"]] == [12, 24]
    assert [(row["first"], row["last"]) for row in results["by_position"]] == [(1, 8), (9, 15), (16, 23)]
    assert results["settings"]["scored_tokens"] == 8
    documents = {row["documents"] for row in results["by_length"] + results["by_position"]}
    assert documents == {sum(len(text) + 1 >= 24 for text in tiny_texts(20))}  # each is closed by one more token
    for row in results["by_length"]:
        assert f"{row['length']} " in printed
        assert f"{row['perplexity']:.2f}" in printed


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


def test_evaluation_shared_among_processes_gives_the_same_results(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text(
        "import runpy, sys\n"
        "for options in open(sys.argv[1], encoding='utf-8').read().splitlines():\n"
        "    sys.argv = options.split('|')\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n",
        encoding="utf-8",
    )
    texts = [SCRIPTS / "evaluate_perplexity.py", "--model", inputs / "letters", "--data", inputs / "texts.jsonl"]
    texts += ["--lengths", 12, "--scored_tokens", 8, "--buckets", 0, "--output", tmp_path / "perplexity.json"]
    keys = [SCRIPTS / "evaluate_retrieval.py", "--model", inputs / "asentmax", "--task", "passkey"]
    keys += ["--lengths", 400, "--samples", 3, "--output_dir", tmp_path / "passkey"]
    task = [SCRIPTS / "evaluate_synthetic.py", "--model", inputs / "constant", "--lengths", 8, 3000, "--samples", 5]
    task += ["--seed", 2, "--output_dir", tmp_path / "task"]  # 1 chunk, so one process has nothing to do, then 3
    lines = ["|".join(map(str, options)) for options in (texts, keys, task)]
    (tmp_path / "runs.txt").write_text("\n".join(lines), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "both.py"), str(tmp_path / "runs.txt")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("95 % interval") == 2  # one process prints

    model = AutoModelForCausalLM.from_pretrained(inputs / "asentmax")
    assert read(tmp_path / "passkey" / "results.json") == passkey(model, byte_tokenizer(), [400], samples=3)
    constant = inputs / "constant"
    ladder = synthetic_ladder(AutoModelForCausalLM.from_pretrained(constant), TASK, [8, 3000], samples=5, seed=2)
    assert all(0 < row["accuracy"] < 100 for row in ladder)
    assert read(tmp_path / "task" / "results.json") == [row | {"model": str(constant)} for row in ladder]
    letters = AutoModelForCausalLM.from_pretrained(inputs / "letters")
    documents = [[4 + ord(letter) - ord("a") for letter in text] + [1] for text in tiny_texts(20) if len(text) >= 11]
    (found,) = read(tmp_path / "perplexity.json")["by_length"]
    assert found == pytest.approx(perplexity_by_length(letters, documents, [12], scored=8)[0])


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
