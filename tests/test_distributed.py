"""Two processes on the CPU compute what one does: data parallel by the script, fully sharded by torch's FSDP2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_model
from processes import run_processes, run_python
from safetensors.torch import load_file
from training_setup import tiny_texts, write_model, write_texts
from transformers import AutoModelForCausalLM

from hf_asentmax import patch_model

ROOT = Path(__file__).resolve().parent.parent

SHARDED = """
import sys
import torch
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from hf_asentmax.training import current_alpha

folder, output = sys.argv[1:]
init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(folder)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
assert all(isinstance(x, DTensor) for x in model.parameters())
tokens = torch.load(f"{folder}/tokens.pt")[get_rank() :: 2]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(3):
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
alpha = current_alpha(model)
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if get_rank() == 0:
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.load_state_dict(whole)
    assert alpha == current_alpha(again) and len(alpha) == 9, alpha
    again.save_pretrained(output)
destroy_process_group()
"""


def two_processes(*arguments: str | Path) -> None:
    """A program and its arguments, in two processes of one group; the test fails if one of them does."""
    for done in run_processes(2, *arguments):
        assert done.returncode == 0, done.stderr[-3000:]


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(weights[name], x, rtol=0, atol=2e-5)


def test_finetune_in_two_processes_equals_one(tmp_path: Path) -> None:
    model, data = write_model(tmp_path / "native"), write_texts(tmp_path / "a.jsonl", tiny_texts())
    options = "--sequence_length 16 --max_steps 3 --learning_rate 1e-2 --save_strategy no --use_cpu true"
    shared = [ROOT / "scripts" / "finetune.py", "--model", model, "--data", data, *options.split()]
    for name, batch in (("one", "4"), ("two", "2")):
        given = [*shared, "--per_device_train_batch_size", batch, "--output_dir", tmp_path / name]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = [*launch, *map(str, given)]
        done = run_python(*given) if name == "one" else subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "two", load_file(tmp_path / "one" / "model.safetensors"))


def test_finetune_in_processes_that_the_trainer_does_not_join_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on a GPU it joins them
    model, data = write_model(tmp_path / "native"), write_texts(tmp_path / "a.jsonl", tiny_texts())
    given = ["--model", model, "--data", data, "--sequence_length", "16", "--max_steps", "1"]
    with pytest.raises(AssertionError, match="add --use_cpu true"):
        two_processes(ROOT / "scripts" / "finetune.py", *given, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fully_sharded_training_equals_one_process(tmp_path: Path) -> None:
    model = patch_model(tiny_model("llama"), alpha_learned=True)
    torch.nn.init.normal_(model.model.layers[0].self_attn.query_scale.beta.weight, std=0.1)
    folder = tmp_path / "converted"
    model.save_pretrained(folder)
    tokens = torch.randint(5, 30, (4, 20))
    torch.save(tokens, folder / "tokens.pt")
    (tmp_path / "sharded.py").write_text(SHARDED, encoding="utf-8")
    two_processes(tmp_path / "sharded.py", folder, tmp_path / "sharded")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(tmp_path / "sharded", model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert type(again).__name__ == "ASEntmaxLlamaForCausalLM"


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.to_dict().items() >= given.items()
    assert f"--config_file scripts/accelerate/{path.name}" in path.read_text(encoding="utf-8")
