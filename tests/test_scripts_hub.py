"""The command lines that convert and push."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tiny_model
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from hf_asentmax import ASEntmaxForCausalLM, patch_model
from hf_asentmax.hub import plan_upload

Script = Callable[..., str]
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script in this process; gives what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    patch_model(tiny_model("llama")).save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    monkeypatch.setattr(HfApi, "upload_folder", refuse)


@pytest.mark.parametrize("name", ["convert.py", "push_to_hub.py"])
def test_script_help_has_an_example(script: Script, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        script(name, "--help")
    assert exit_info.value.code == 0
    assert f"python scripts/{name} --model" in capsys.readouterr().out


def test_convert_script_converts(script: Script, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "native")
    printed = script("convert.py", "--model", tmp_path / "native", "--output_dir", tmp_path / "out", "--alpha", 1.25)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, ASEntmaxForCausalLM)
    assert model.config.entmax_alpha == 1.25
    assert f"{(tmp_path / 'out' / 'model.safetensors').stat().st_size:,}" in printed
    assert "modeling_asentmax_llama.py" in printed


def test_convert_script_says_what_is_wrong(script: Script, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: source must be a checkpoint folder or a Hub id"):
        script("convert.py", "--model", tmp_path / "absent", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_what_would_go_and_does_nothing(
    script: Script, no_network: None, checkpoint: Path, tmp_path: Path
) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "map.png"
    results.write_text(json.dumps([{"method": "asentmax", "length": 64, "accuracy": 1.0, "seed": 0, "samples": 8}]))
    picture.write_bytes(b"\x89PNG")
    before = sorted(checkpoint.iterdir())
    arguments = ["--model", checkpoint, "--repo_id", "me/tiny", "--results", results, "--pictures", picture]
    printed = script("push_to_hub.py", *arguments, "--dry-run")
    assert sorted(checkpoint.iterdir()) == before
    rows = dict(line.rsplit(maxsplit=1) for line in printed.splitlines() if line.count("  ") and "bytes" not in line)
    sizes = {name: f"{size:,}" for name, size in plan_upload(checkpoint).items()}
    assert sizes.items() <= rows.items()
    assert rows["map.png"] == "4"
    assert "README.md" in rows
    assert "Nothing was sent or written." in printed


def test_push_script_writes_the_card_and_pushes(
    script: Script, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, training = tmp_path / "results.json", tmp_path / "training.md"
    results.write_text(json.dumps([{"method": "asentmax", "length": 64, "accuracy": 0.75}]))
    training.write_text("On a *laptop*.")
    calls = []
    # the round trip over HTTP is in test_hub.py
    monkeypatch.setattr("hf_asentmax.hub.push", lambda *args, **kwargs: calls.append((args, kwargs)) or "https://there")
    arguments = [
        "--model",
        checkpoint,
        "--repo_id",
        "me/tiny",
        "--results",
        results,
        "--training",
        training,
        "--private",
    ]
    printed = script("push_to_hub.py", *arguments)
    assert printed.endswith("https://there\n")
    assert calls == [((str(checkpoint), "me/tiny"), {"private": True, "revision": None})]
    card = (checkpoint / "README.md").read_text()
    assert "# tiny\n" in card
    assert "| 64 | 0.75 | not given |" in card
    assert "On a *laptop*." in card
    (checkpoint / "README.md").write_text("by hand")
    script("push_to_hub.py", "--model", checkpoint, "--repo_id", "me/tiny", "--keep_card")
    assert (checkpoint / "README.md").read_text() == "by hand"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "results.json must be JSON"),
        ("{}", "results.json must hold a list"),
        ("[{}]", "result 0 must have method"),
    ],
)
def test_push_script_refuses_bad_results(
    script: Script, no_network: None, checkpoint: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        script("push_to_hub.py", "--model", checkpoint, "--repo_id", "me/tiny", "--results", tmp_path / "results.json")
    assert not (checkpoint / "README.md").exists()


def test_push_script_refuses_a_damaged_checkpoint_and_a_bad_name(
    script: Script, no_network: None, checkpoint: Path
) -> None:
    with pytest.raises(SystemExit, match="error: Repo id must"):
        script("push_to_hub.py", "--model", checkpoint, "--repo_id", "not/a/name")
    assert not (checkpoint / "README.md").exists()
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="error: .*model.safetensors must be a complete safetensors file"):
        script("push_to_hub.py", "--model", checkpoint, "--repo_id", "me/tiny")
