"""The command line: each command does what the script or function of the same name does, and says what is wrong."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_config, tiny_model
from processes import run_python
from retrieval_setup import VOCABULARY, byte_tokenizer
from safetensors.torch import load_file, save_file
from training_setup import tiny_texts, write_model, write_texts
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import hf_asentmax
from hf_asentmax import METHODS, patch_model
from hf_asentmax.cli import COMMANDS, main
from hf_asentmax.conversion import convert_checkpoint
from hf_asentmax.perplexity import perplexity_by_length
from hf_asentmax.retrieval import training_samples
from hf_asentmax.tasks import build_task, save_task

ROOT = Path(__file__).resolve().parent.parent
NAMES = [" ".join(name) for name in COMMANDS]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `hf-asentmax` with words in this process; gives what it printed."""
    monkeypatch.setattr(sys, "argv", ["hf-asentmax"])

    def run(*words: object) -> str:
        capsys.readouterr()
        main([*map(str, words)])
        return capsys.readouterr().out

    return run


def table(printed: str) -> dict[str, str]:
    """The first table's rows: what stands before the first bar, and what after it."""
    rows = [line.strip("| ").split(" | ") for line in printed.split("\n\n")[0].splitlines()]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


def scales(printed: str) -> list[list[str]]:
    """The cells of the second table, a list a layer."""
    lines = printed.split("\n\n")[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# The doors


def test_entry_point_is_the_command_line() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (module, name) = re.findall(r'^hf-asentmax = "(\S+):(\S+)"$', text, flags=re.MULTILINE)[0]
    assert getattr(import_module(module), name) is main


def test_module_runs_as_the_command_line(checkpoint: Path) -> None:
    """`python -m hf_asentmax`: its own name in the usage, the exit status of a damaged checkpoint."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = run_python("-m", "hf_asentmax", "inspect", checkpoint)
    assert done.returncode == 1
    assert "ASEntmaxLlamaForCausalLM" in done.stdout
    assert done.stderr.strip().endswith("download or save it again")
    assert "Traceback" not in done.stderr


def test_reader_that_leaves_early_gets_no_error(checkpoint: Path) -> None:
    words = [sys.executable, "-m", "hf_asentmax", "inspect", str(checkpoint)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 1
    assert "pipe" not in said.lower()


@pytest.mark.parametrize("name", ["", "evaluate", *NAMES])
def test_help_teaches(command: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as done:
        command(*name.split(), "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    _, examples = text.split("examples:\n")
    assert f"  hf-asentmax {name}".rstrip() in examples
    assert "%(prog)s" not in text
    for line in text.splitlines():
        assert line == line.rstrip()


def test_help_lists_every_command(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measures = [name for name in NAMES if name.startswith("evaluate ")]
    for words, expected in (([], ["convert", "inspect", "evaluate", "write", "plot"]), (["evaluate"], measures)):
        with pytest.raises(SystemExit):
            command(*words, "--help")
        listed = re.findall(r"^    (\w+)\b", capsys.readouterr().out, flags=re.MULTILINE)
        assert listed == [name.split()[-1] for name in expected]


@pytest.mark.parametrize("words", [[], ["evaluate"], ["train"], ["evaluate", "loss"], ["convert", "--model", "x"]])
def test_wrong_words_get_the_usage(command: Any, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command(*words)
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hf-asentmax")


def test_missing_extra_is_named(
    command: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"error: matplotlib must be installed .* pip install 'hf_asentmax\[eval\]'"):
        command("plot", "--figures", "alpha", "--output_dir", tmp_path)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit, match="error: accelerate must be installed"):
        command("evaluate", "synthetic", "--model", checkpoint, "--task", "copy")


# convert, evaluate, plot


def test_convert_writes_what_the_function_writes(command: Any, tmp_path: Path) -> None:
    native = save(tiny_model("qwen3"), tmp_path / "native")
    options = ["--method", "ssmax", "--positions", "nape"]
    printed = command("convert", "--model", native, "--output_dir", tmp_path / "ours", *options)
    convert_checkpoint(native, tmp_path / "theirs", method="ssmax", positions="nape")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
        assert file in printed
    assert f"Load {tmp_path / 'ours'} with AutoModelForCausalLM, " in printed
    with pytest.raises(SystemExit, match="error: .* must be a new or empty folder"):
        command("convert", "--model", native, "--output_dir", tmp_path / "ours")


def test_convert_names_the_auto_class_of_what_it_wrote(command: Any, tmp_path: Path) -> None:
    native = save(AutoModelForTokenClassification.from_config(tiny_config("llama")), tmp_path / "native")
    printed = command("convert", "--model", native, "--output_dir", tmp_path / "ours")
    assert f"Load {tmp_path / 'ours'} with AutoModelForTokenClassification, " in printed


def test_evaluate_perplexity_gives_the_functions_numbers(command: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "letters")
    write_texts(tmp_path / "texts.jsonl", tiny_texts(20))
    words = ["--model", tmp_path / "letters", "--data", tmp_path / "texts.jsonl", "--lengths", 12, "--buckets", 0]
    printed = command("evaluate", "perplexity", *words, "--scored_tokens", 8, "--output_dir", tmp_path / "out")
    letters = AutoModelForCausalLM.from_pretrained(tmp_path / "letters")
    documents = [[4 + ord(letter) - ord("a") for letter in text] for text in tiny_texts(20) if len(text) >= 12]
    (expected,) = perplexity_by_length(letters, documents, [12], scored=8)
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["by_length"]
    assert row["losses"] == pytest.approx(expected.pop("losses"))
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert f"{expected['perplexity']:.2f}" in printed


def test_evaluate_synthetic_writes_what_it_prints(command: Any, checkpoint: Path, tmp_path: Path) -> None:
    save_task(build_task("copy", symbols=5), checkpoint)
    words = ["--model", checkpoint, "--lengths", 8, "--samples", 2, "--output_dir", tmp_path / "out"]
    printed = command("evaluate", "synthetic", *words)
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8").strip() in printed
    for measure in ("synthetic", "retrieval"):
        with pytest.raises(SystemExit, match="error: method must name each of the 1 models, got .*name them all"):
            command("evaluate", measure, "--model", checkpoint, "--method", "a", "b")


def test_written_samples_are_trained_on_and_evaluated(command: Any, tmp_path: Path) -> None:
    """From prompts to a model that has seen them, as the command's help says."""
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    samples = tmp_path / "new" / "train.jsonl"
    words = ["--tokenizer", tmp_path / "model", "--task", "needle", "frequent_words", "--length", 400]
    printed = command("write", "retrieval", *words, "--samples", 4, "--seed", 2, "--output", samples)
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    assert rows == list(training_samples(byte_tokenizer(), ["needle", "frequent_words"], 400, 4, seed=2))
    assert f"python scripts/finetune.py --data {samples} --sequence_length 400" in printed
    train = f"--data {samples} --sequence_length 400 --model {tmp_path / 'model'} --output_dir {tmp_path / 'tuned'}"
    options = "--max_steps 1 --per_device_train_batch_size 2 --use_cpu --report_to none --save_strategy no"
    done = run_python(ROOT / "scripts" / "finetune.py", *train.split(), *options.split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| asentmax |" in command(
        "evaluate", "retrieval", "--model", tmp_path / "tuned", "--lengths", 400, "--samples", 1
    )
    with pytest.raises(SystemExit, match=r"error: output must end in .jsonl, got 'a.csv'; rename it"):
        command("write", "retrieval", *words, "--output", "a.csv")


def test_write_cloze_says_how_to_run_it(command: Any, tmp_path: Path) -> None:
    text = (
        "Far away a lantern burned. "
        + "So they walked through the rain on and on. " * 5
        + "Then somebody saw the lantern."
    )
    write_texts(tmp_path / "texts.jsonl", [text, "short"], column="book")
    words = ["--data", tmp_path / "texts.jsonl", "--output_dir", tmp_path / "prose"]
    printed = command("write", "cloze", *words, "--text_column", "book")
    assert "1 passages" in printed
    assert f"--include_path {tmp_path / 'prose'} --tasks prose" in printed
    assert sorted(path.name for path in (tmp_path / "prose").iterdir()) == ["prose.jsonl", "prose.yaml"]
    (tmp_path / "texts.jsonl").write_text(json.dumps({"input_ids": [4, 5]}), encoding="utf-8")
    with pytest.raises(SystemExit, match="error: text_column of .* a passage is cut from text, not from tokens"):
        command("write", "cloze", *words)


def test_plot_draws_the_figure_that_is_named(command: Any, tmp_path: Path) -> None:
    printed = command("plot", "--figures", "alpha", "--output_dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"alpha.png", "results.json"}
    assert "alpha.png" in printed
    with pytest.raises(SystemExit, match="error: figures must be of formulas where no model is given"):
        command("plot", "--figures", "heads", "--output_dir", tmp_path / "out")


# inspect


def test_inspect_says_what_a_checkpoint_is(command: Any, shards: Path) -> None:
    files = len(list(shards.glob("*.safetensors")))
    model = AutoModelForCausalLM.from_pretrained(shards)
    rows = table(command("inspect", shards))
    query_scale = sum(p.numel() for name, p in model.named_parameters() if ".query_scale." in name)
    assert rows.pop("query scale").startswith("adaptive: r = 0.307 + softplus(b + w x) log(1 + n)^(2 tanh(d + u x))")
    del rows["-" * 11]
    assert rows == {
        "checkpoint": str(shards),
        "class": "ASEntmaxLlamaForCausalLM",
        "family": "llama",
        "method": "asentmax",
        "alpha": "1.5",
        "positions": "rope",
        "context": "512 tokens",
        "parameters": f"{model.num_parameters():,}, of the query scale {query_scale:,}; F32",
        "remote code": "yes, modeling_asentmax_llama.py",
        "safetensors": f"yes, {files} files, whole",
    }


@pytest.mark.parametrize("method", METHODS)
def test_inspect_names_every_method(command: Any, tmp_path: Path, method: str) -> None:
    folder = save(patch_model(tiny_model("qwen2"), method=method), tmp_path / method)
    printed = command("inspect", folder)
    assert table(printed)["method"].split(",")[0] == method
    learns = {"ssmax", "learned_alpha", "asentmax_static", "asentmax", "asentmax_learned_alpha"}
    assert ("| layer" in printed) == (method in learns)
    assert ("r at n" in printed) == (method in learns - {"learned_alpha"})


@pytest.mark.parametrize("query_scaling", ["log", "static", "adaptive"])
@pytest.mark.parametrize("positions", ["rope", "nape"])
@torch.no_grad()
def test_inspect_gives_the_learned_scale(command: Any, tmp_path: Path, query_scaling: str, positions: str) -> None:
    """r written out, of the heads that have one; with "adaptive" the weights, random here, have no part in it."""
    model = patch_model(tiny_model("llama"), query_scaling=query_scaling, positions=positions)
    generator = torch.Generator().manual_seed(1)
    expected = []
    for layer in model.model.layers:
        scale = layer.self_attn.query_scale
        for parameter in scale.parameters():
            parameter.normal_(std=0.3, generator=generator)
        n = torch.tensor([64.0, 1024.0, 65536.0])
        if query_scaling == "log":
            r = scale.log_scale[:, None] * (1 + n).log()
        else:
            b, d = (x.bias if query_scaling == "adaptive" else x for x in (scale.beta, scale.gamma))
            r = 1 - math.log(2) + (1 + b.exp()).log()[:, None] * (1 + n).log() ** (2 * d.tanh()[:, None])
        expected.append(r[2:] if positions == "nape" else r)
    printed = command("inspect", save(model, tmp_path))
    found = [
        [[*map(float, re.findall(r"-?[\d.]+(?:e[+-]\d+)?", cell))] for cell in line[1:]] for line in scales(printed)
    ]
    for r, cells in zip(expected, found, strict=True):
        wanted = torch.stack([r.mean(0), r.amin(0), r.amax(0)], dim=1)
        torch.testing.assert_close(torch.tensor(cells), wanted, rtol=6e-3, atol=1e-6)
    assert ("biases b and d alone" in printed) == (query_scaling == "adaptive")
    assert ("NoPE heads" in printed) == (positions == "nape")


def test_inspect_gives_each_heads_learned_alpha(command: Any, tmp_path: Path) -> None:
    model = patch_model(tiny_model("llama"), method="learned_alpha").to(torch.bfloat16)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.query_scale.alpha_logit.copy_(torch.tensor([-1.0, 0.0, 1.0, float(number)]))
    printed = command("inspect", save(model, tmp_path))
    alphas = [[1.01 + 0.99 / (1 + math.exp(-x)) for x in (-1, 0, 1, number)] for number in (0, 1)]
    expected = [[str(number), " ".join(f"{a:.3f}" for a in alpha)] for number, alpha in enumerate(alphas)]
    assert scales(printed) == expected
    assert table(printed)["alpha"] == "learned, one a head, from 1.5"
    assert table(printed)["parameters"].endswith("of the query scale 8; BF16")


def test_inspect_takes_other_heads_tied_weights_and_windows(command: Any, tmp_path: Path) -> None:
    tagger = patch_model(AutoModelForTokenClassification.from_config(tiny_config("mistral")))
    rows = table(command("inspect", save(tagger, tmp_path / "tagger")))
    assert rows["class"] == "ASEntmaxMistralForTokenClassification"
    assert rows["context"] == "512 tokens; a window of 8 on 2 of 2 layers"
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    tied = patch_model(tiny_model("qwen3", tie_word_embeddings=True, **window))
    printed = command("inspect", save(tied, tmp_path / "tied"))
    assert table(printed)["context"] == "512 tokens; a window of 4 on 1 of 2 layers"
    assert table(printed)["safetensors"] == "yes, 1 file, whole"
    base = save(tied.model, tmp_path / "base")
    assert scales(command("inspect", base)) == scales(printed)


def test_inspect_takes_a_softmax_checkpoint(command: Any, tmp_path: Path) -> None:
    rows = table(command("inspect", save(tiny_model("llama"), tmp_path)))
    assert (rows["class"], rows["method"], rows["family"]) == ("LlamaForCausalLM", "softmax", "llama")
    assert not {"alpha", "query scale", "remote code"} & set(rows)


def test_inspect_shows_and_fails_where_something_is_missing(
    command: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "modeling_asentmax_llama.py").unlink()
    rows = table(command("inspect", checkpoint))
    assert rows["remote code"] == "NO, modeling_asentmax_llama.py is missing"
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    lost = "model.layers.1.self_attn.query_scale.beta.bias"
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"error: .* must hold every weight of ASEntmaxLlamaForCausalLM.*{lost}"):
        command("inspect", checkpoint)
    printed = capsys.readouterr().out
    assert table(printed)["safetensors"].startswith("NOT WHOLE: ")
    assert "| layer" not in printed
    weights.unlink()
    with pytest.raises(SystemExit, match="error: .* must hold model.safetensors or model.safetensors.index.json"):
        command("inspect", checkpoint)
    assert table(capsys.readouterr().out)["method"] == "asentmax"


def test_inspect_fails_where_config_and_weights_differ(command: Any, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for changed, what in (({"intermediate_size": 65}, "mlp.*"), ({"query_scaling": "static"}, "query_scale.*")):
        (checkpoint / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
        with pytest.raises(SystemExit, match=rf"error: \S*{what} must have shape|but lacks \S*{what}"):
            command("inspect", checkpoint)


def test_inspect_names_what_is_no_checkpoint(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="error: .*absent must be a checkpoint folder"):
        command("inspect", tmp_path / "absent")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: .*this is an adapter"):
        command("inspect", tmp_path)
    assert capsys.readouterr().out == ""


def test_inspect_runs_no_code_of_the_folder(command: Any, checkpoint: Path) -> None:
    (checkpoint / "modeling_asentmax_llama.py").write_text("raise RuntimeError('ran')", encoding="utf-8")
    assert table(command("inspect", checkpoint))["class"] == hf_asentmax.ASEntmaxForCausalLM.__name__
