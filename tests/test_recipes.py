"""recipes/*.sh: their commands fit the scripts, what is done is not done again, and a run in miniature."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import HfArgumentParser

from hf_asentmax import cli
from hf_asentmax.haystack import filler_sentences
from hf_asentmax.text_tasks import DEPTH_TASKS, TASKS
from hf_asentmax.tokenization import tokenize_sources, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
# In place of Python: writes down what it was given, makes a training's folder, fails where it is told to.
STAND_IN = """#!{python}
import json, os, pathlib, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
if "--output_dir" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]).mkdir(parents=True, exist_ok=True)
sys.exit(os.environ.get("FAIL", "nothing") in sys.argv[1])
"""


def recipe(*words: object, script: str = "language_models", **variables: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    words = ("bash", ROOT / "recipes" / f"{script}.sh", *words)
    return subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable, calls=str(tmp_path / "calls")), encoding="utf-8")
    path.chmod(0o755)
    return path


def calls(stand_in: Path) -> list[list[str]]:
    file = stand_in.parent / "calls"
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


class Parsed(BaseException):
    """The arguments fit."""


def check_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give words to their script, as far as its arguments."""
    original = HfArgumentParser.parse_args_into_dataclasses

    def parse(self: HfArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(original(self, *args, **kwargs))

    def execute(chosen: Any) -> None:
        arguments = chosen.command.arguments
        raise Parsed(arguments(**{field.name: getattr(chosen, field.name) for field in fields(arguments)}))

    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse)
    monkeypatch.setattr(cli, "_execute", execute)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.chdir(ROOT)
    by_module = words[0] == "-m"
    with pytest.raises(Parsed):
        cli.main(words[2:]) if by_module else runpy.run_path(words[0], run_name="__main__")


@pytest.mark.parametrize("run", ["softmax-rope-0", "asentmax-rope-1", "entmax-nape-1"])
def test_commands_fit_the_scripts(run: str, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"TRAIN_OPTIONS": "--use_cpu true", "TUNE_OPTIONS": "--use_cpu true"}  # bf16 there needs no GPU
    for words in (["data", "prose.parquet", "code.parquet"], [run]):
        done = recipe(*words, PYTHON=stand_in, RUNS=tmp_path / "runs", DATA=tmp_path / "data", **options)
        assert done.returncode == 0, done.stderr
    found = calls(stand_in)
    for folder in ("prose", "code", "tokens"):  # the stand-in has made what must be new
        (tmp_path / "data" / folder).rmdir()
    scripts = [words[0].removeprefix("scripts/") for words in found]
    assert scripts == [
        *["hold_out.py"] * 2, "tokenize_data.py", "-m", "-m", "pretrain.py", *["evaluate_perplexity.py"] * 4,
        *["evaluate_retrieval.py"] * 2, "-m", "finetune.py", *["evaluate_retrieval.py"] * 2,
    ]  # fmt: skip
    for words in found:
        if words[:2] != ["-m", "lm_eval"]:
            check_arguments(words, monkeypatch)
    (train,) = (words for words in found if "scripts/pretrain.py" in words)
    assert ("--positions" in train) != (run == "softmax-rope-0")
    ropes = {word for words in found for word in words if word.startswith("yarn")}
    factor = "" if run == "softmax-rope-0" else ":1"
    stretched = {f"yarn:{times}{factor}" for times in (8, 16, 32)}
    assert ropes == (stretched | {"yarn:1:1.3"} if "rope" in run else set())


CONVERSIONS = [
    "annealed",
    "sooner",
    "jump",
    "no-scale",
    "scale-faster",
    "lora",
    "twin",
    "scale-faster-1e-3",
    "twin-1e-3",
]


def test_commands_of_the_conversion_fit_the_scripts(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [["data"], *(["tune", run, "20"] for run in CONVERSIONS), ["measure", "annealed", "twin", "20"]]
    where = {"PYTHON": stand_in, "RUNS": tmp_path / "runs", "DATA": tmp_path / "data"}
    for words in commands:
        done = recipe(*words, script="conversion", **where, TUNE_OPTIONS="--use_cpu true")
        assert done.returncode == 0, done.stderr
    found = calls(stand_in)
    (tmp_path / "data" / "tokens-smollm2").rmdir()  # the stand-in has made what must be new
    for words in found:
        check_arguments(words, monkeypatch)
    tuned = [words for words in found if "scripts/finetune.py" in words]
    assert len({tuple(words[:-1]) for words in tuned}) == len(CONVERSIONS)
    assert {words[-1] for words in tuned} == {str(tmp_path / "runs" / f"smollm2-{run}-20") for run in CONVERSIONS}


def test_what_is_done_is_not_done_again(stand_in: Path, tmp_path: Path) -> None:
    where = {"PYTHON": stand_in, "RUNS": tmp_path / "runs", "DATA": tmp_path / "data"}
    failed = recipe("ssmax-nape-1", **where, FAIL="evaluate_retrieval")
    assert failed.returncode != 0
    assert [words[0] for words in calls(stand_in)][-1] == "scripts/evaluate_retrieval.py"
    again = recipe("ssmax-nape-1", "train", "retrieval", **where)
    assert again.returncode == 0
    assert "ssmax-nape-1 train: done before" in again.stdout
    assert [words[0] for words in calls(stand_in)] == ["scripts/evaluate_retrieval.py"] * 2  # whole, in blocks


def test_a_finished_fine_tuning_is_kept_where_its_evaluation_failed(stand_in: Path, tmp_path: Path) -> None:
    where = {"PYTHON": stand_in, "RUNS": tmp_path / "runs", "DATA": tmp_path / "data"}
    assert recipe("ssmax-nape-1", "train", "tune", **where, FAIL="evaluate_retrieval").returncode != 0
    (tmp_path / "runs" / "ssmax-nape-1-tuned" / "results.json").touch()
    calls(stand_in)
    assert recipe("ssmax-nape-1", "tune", **where).returncode == 0
    assert {words[0] for words in calls(stand_in)} == {"scripts/evaluate_retrieval.py"}


def test_a_report_takes_what_runs_have(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    for folder in ("asentmax-nape-0", "asentmax-nape-1", "softmax-rope-1-tuned/retrieval"):
        measure = "perplexity-prose" if "nape" in folder else "passkey"
        (runs / folder / measure).mkdir(parents=True)
        (runs / folder / measure / "results.json").touch()
    done = recipe("report", "asentmax-nape-0", "asentmax-nape-1", "softmax-rope-1", PYTHON=stand_in, RUNS=runs)
    assert done.returncode == 0, done.stderr
    found = calls(stand_in)
    for words in found:
        check_arguments(words, monkeypatch)
    assert [words[5:-2] for words in found] == [
        [str(runs / f"asentmax-nape-{seed}" / "perplexity-prose") for seed in (0, 1)]
        + ["--method", "asentmax-nape", "asentmax-nape", "--title", "perplexity-prose"],
        [str(runs / "softmax-rope-1-tuned" / "retrieval" / "passkey")]
        + ["--method", "softmax-rope", "--title", "tuned/retrieval/passkey"],
    ]


@pytest.mark.parametrize(
    ("script", "words", "rule"),
    [
        ("language_models", ["asentmax-nope"], "RUN must be METHOD-POSITIONS-SEED"),
        ("language_models", ["asentmax-sinus-1"], "RUN must be METHOD-POSITIONS-SEED"),
        ("language_models", ["asentmax-nape-1", "train", "perplexities"], "STEP must be one of train perplexity"),
        ("language_models", ["data", "prose.parquet"], "data must have two corpora"),
        ("language_models", ["report"], "report must have the runs to put side by side"),
        ("conversion", ["tune", "annealed"], "the words must be data, or tune RUN STEPS"),
        ("conversion", ["measure", "jump", "twin", "20", "heads"], "PART must be one of prose code sparsity"),
        ("conversion", ["tune", "softmax", "20"], "RUN must be one of those that --help names, got softmax"),
        ("conversion", ["tune", "softmax-1e-3", "20"], "RUN must be one of those that --help names, got softmax"),
    ],
)
def test_wrong_words_are_refused(script: str, words: list[str], rule: str, stand_in: Path, tmp_path: Path) -> None:
    refused = recipe(*words, script=script, PYTHON=stand_in, RUNS=tmp_path / "runs")
    assert refused.returncode == 2
    assert rule in refused.stderr
    assert calls(stand_in) == []


@pytest.mark.slow
def test_a_run_in_miniature(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "runs" / "asentmax-nape-1"
    sentences = filler_sentences()[:600]
    texts = [" ".join(sentences[i : i + 30]) for i in range(0, len(sentences), 30)]
    for corpus in ("prose", "code"):
        (data / corpus).mkdir(parents=True)
        datasets.Dataset.from_dict({"text": texts[:2]}).to_parquet(data / corpus / "short.parquet")
        datasets.Dataset.from_dict({"text": [" ".join(texts)] * 2}).to_parquet(data / corpus / "long.parquet")
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save_pretrained(data / "tokens")
    tokenize_sources([str(data / "prose" / "long.parquet")], tokenizer).save_to_disk(data / "tokens")
    cli.main(["write", "cloze", "--data", str(data / "prose" / "long.parquet"), "--output_dir", str(data / "cloze")])
    samples = ["--tokenizer", str(data / "tokens"), "--samples", "8", "--output", str(data / "retrieval.jsonl")]
    cli.main(["write", "retrieval", "--length", "1024", *samples])
    config = json.loads((ROOT / "recipes" / "llama-42m.json").read_text(encoding="utf-8"))
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | small), encoding="utf-8")
    brief = "--max_steps 2 --use_cpu true --torch_compile false"
    brief += " --per_device_train_batch_size 1 --per_device_eval_batch_size 1"

    done = recipe(
        out.name,
        PYTHON=sys.executable,
        RUNS=out.parent,
        DATA=data,
        TRAIN_OPTIONS=f"--config {tmp_path / 'config.json'} {brief}",
        TUNE_OPTIONS=brief,
        LENGTHS="1024 2600",
        RETRIEVAL_LENGTHS="1024",
        SAMPLES=1,
    )

    assert done.returncode == 0, done.stderr
    steps = ["train", "perplexity", "retrieval", "cloze", "tune"]
    assert sorted(path.stem for path in out.glob("*.done")) == sorted(steps)
    for corpus in ("prose", "code"):
        rows = []
        for way in (out, out / "blocks"):
            found = json.loads((way / f"perplexity-{corpus}" / "results.json").read_text(encoding="utf-8"))
            rows += found["by_length"]
        assert [row["length"] for row in rows] == [1024, 2600] * 2
        assert [row["method"] for row in rows[1:3]] == ["asentmax", "asentmax, blocks:1024"]
        assert rows[0]["perplexity"] == pytest.approx(rows[2]["perplexity"])
        assert rows[1]["perplexity"] != rows[3]["perplexity"]
    found = {path.parent.relative_to(out.parent).as_posix() for path in out.parent.glob("**/results.json")}
    tuned = ("depths/needle", "depths/multikey", *(f"retrieval/{task}" for task in TASKS if task not in DEPTH_TASKS))
    read = ("perplexity-prose", "perplexity-code", "retrieval/needle", "retrieval/passkey")
    assert found == {
        *(out.name, f"{out.name}-tuned"),
        *(f"{out.name}/{way}{measure}" for way in ("", "blocks/") for measure in read),
        *(f"{out.name}-tuned/{path}" for path in tuned),
    }
    assert list((out / "cloze").glob("**/results*.json"))
