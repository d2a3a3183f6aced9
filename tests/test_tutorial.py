"""The pages that show code say what it prints: the tutorial and the README, run block by block as a reader would."""

from __future__ import annotations

import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from processes import run_python

from hf_asentmax import patch_model
from hf_asentmax.cli import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|shell|text)\n(.*?)^```$", re.M | re.S)
# In a claimed text: anything; a rule of a table; spaces; a measured number, which other machines round otherwise.
LOOSE = re.compile(r"(?P<anything>\.\.\.)|(?P<rule>-{3,})|(?P<space>\s+)|(?P<number>\d+\.\d+|\d+(?=%))")
PATTERN = {"anything": r".*?", "rule": r"-{3,}", "space": r"\s+", "number": r"(\d+(?:\.\d+)?)"}
TOLERANCE = {"rel": 0.2, "abs": 0.02}


def run_shell(command: str) -> str:
    """What a command prints. The package's own commands run in this process, which has imported what they need."""
    program, *words = shlex.split(command)
    if program == "python" and words[0] == "-c":
        done = run_python(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout
    with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        if program == "hf-asentmax":
            main(words)
        else:
            assert (program, Path(words[0]).parent) == ("python", Path("scripts")), command
            patch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return printed.getvalue()


def check_claim(claimed: str, printed: str) -> None:
    """The text matches what was printed: words and whole numbers exactly, measured numbers within the tolerance."""
    pattern, numbers, end = "", [], 0
    for part in LOOSE.finditer(claimed.strip()):
        pattern += re.escape(claimed.strip()[end : part.start()]) + PATTERN[str(part.lastgroup)]
        numbers += [float(part["number"])] if part["number"] else []
        end = part.end()
    found = re.fullmatch(pattern + re.escape(claimed.strip()[end:]), printed.strip(), re.S)
    assert found, f"the page claims\n{claimed}\nbut this was printed\n{printed}"
    assert [float(x) for x in found.groups()] == pytest.approx(numbers, **TOLERANCE), printed


@pytest.mark.parametrize(
    "printed", ["loss 0.5 at step 20", "loss 0.25 at step 21", "lost 0.25 at step 20", "", "loss 0.25"]
)
def test_wrong_claim_is_found(printed: str) -> None:
    check_claim("loss 0.25 at ... 20", "loss 0.26   at step 20\n")
    with pytest.raises(AssertionError):
        check_claim("loss 0.25 at ... 20", printed)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The models are so small that several threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_page_prints_what_it_claims(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    printed, claims = "", 0
    for kind, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if kind == "python":
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(text, page, "exec"), namespace)
            printed = out.getvalue()
        elif kind == "shell":
            printed = run_shell(text)
        else:
            check_claim(text, printed)
            claims += 1
    assert claims >= 2


def test_what_the_results_say_of_reading_in_blocks_runs() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (code,) = (text for kind, text in BLOCK.findall(page) if kind == "python")
    model = patch_model(tiny_model("llama", eos_token_id=None), positions="nape").eval()
    namespace: dict[str, Any] = {"model": model, "input_ids": random_tokens(1, 1500)}
    exec(code, namespace)
    assert namespace["cache"].get_seq_length() >= 1500 - 1024
    assert namespace["written"].shape == (1, 1540)
    assert torch.equal(namespace["written"][:, :1500], namespace["input_ids"])
