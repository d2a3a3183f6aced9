"""Model cards, and the way to the Hub and back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from clean_environment import run_clean
from helpers import random_tokens, tiny_model
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_setup import tiny_tokenizer
from transformers import AutoModelForCausalLM

import hf_asentmax
from hf_asentmax import ASEntmaxConfig
from hf_asentmax.hub import check_asentmax_checkpoint, plan_upload, push, write_model_card
from hf_asentmax.synthetic import build_synthetic_model
from hf_asentmax.tasks import TASKS, build_task, save_task

WEIGHTS = "model.safetensors"


def test_only_an_asentmax_checkpoint_with_its_code_is_pushed(tmp_path: Path, checkpoint: Path) -> None:
    assert check_asentmax_checkpoint(checkpoint)["model_type"] == "asentmax_llama"
    tiny_model("llama").save_pretrained(tmp_path / "softmax")
    with pytest.raises(ValueError, match=r"must be that of an ASEntmax model, got 'llama'; convert"):
        push(tmp_path / "softmax", "me/softmax")
    with pytest.raises(ValueError, match="got 'llama'; convert"):
        write_model_card(tmp_path / "softmax")
    assert not (tmp_path / "softmax" / "README.md").exists()
    (checkpoint / "modeling_asentmax_llama.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"modeling_asentmax_llama.py must be there.*save it again"):
        push(checkpoint, "me/tiny")


def test_plan_leaves_a_training_run_at_home(checkpoint: Path) -> None:
    kept = ["config.json", "tokenizer.json", "pictures/needle.png"]
    left = [
        "checkpoint-10/model.safetensors", "checkpoint-10/optimizer.pt", "runs/now/events", "training_args.bin",
        "rng_state.pth", "trainer_state.json", "__pycache__/x.pyc", ".git/config", "optimizer.pt",
        "README.md.unfinished",
    ]  # fmt: skip
    for name in [*kept[1:], *left]:
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"12345")
    plan = plan_upload(checkpoint)
    assert set(kept) < plan.keys()
    assert not plan.keys() & set(left)
    assert plan["tokenizer.json"] == 5
    assert plan[WEIGHTS] == (checkpoint / WEIGHTS).stat().st_size


RESULTS: list[dict[str, Any]] = [
    {"method": "asentmax", "task": "passkey", "seed": 0, "length": 1024, "accuracy": 0.9, "samples": 64},
    {"method": "asentmax", "task": "passkey", "seed": 1, "length": 1024, "accuracy": 0.8, "samples": 64},
    {"method": "softmax", "task": "passkey", "seed": 0, "length": 1024, "accuracy": 0.25, "samples": 64},
    {"method": "asentmax", "task": "passkey", "seed": 0, "length": 64, "accuracy": 1, "samples": 64},
    {"method": "asentmax", "task": "prose", "length": 512, "metric": "perplexity", "perplexity": 12.345},
]


@pytest.mark.parametrize(
    ("head", "pipeline"),
    [("", "feature-extraction"), ("ForSequenceClassification", "text-classification")]
    + [("ForTokenClassification", "token-classification")],
)
def test_card_is_of_the_model_s_class(head: str, pipeline: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    config = ASEntmaxConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    auto = getattr(transformers, f"AutoModel{head}")
    auto.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(tmp_path))
    assert card.data.to_dict()["pipeline_tag"] == pipeline
    assert f"model = AutoModel{head}.from_pretrained(folder, trust_remote_code=True)" in card.text
    assert "print(model(**inputs)[0].shape)" in card.text
    assert "generate" not in card.text


def test_card_holds_what_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "needle.png"
    picture.write_bytes(b"\x89PNG")
    path = write_model_card(
        checkpoint,
        base_model="someone/base",
        datasets=["someone/books"],
        results=RESULTS,
        pictures=[picture],
        title="Tiny",
        name="me/tiny",
        training="Trained on a laptop.",
    )
    assert path == checkpoint / "README.md"
    assert (checkpoint / "needle.png").read_bytes() == picture.read_bytes()
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"asentmax", "entmax", "sparse-attention", "long-context", "arxiv:2506.16640"} <= set(data["tags"])
    assert data["base_model"] == "someone/base"
    assert data["datasets"] == ["someone/books"]
    assert data["license"] == "apache-2.0"
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert measured == {
        ("passkey, 64 tokens", "accuracy"): 1.0,
        ("passkey, 1024 tokens", "accuracy"): 0.85,
        ("prose, 512 tokens", "perplexity"): 12.345,
    }
    text = card.text
    assert "# Tiny\n" in text
    assert "| length | asentmax | softmax | samples |" in text
    assert "| 1,024 | 0.85 (0.8 to 0.9, 2 runs) | 0.25 | 64 |" in text
    assert "| 512 | 12.35 | not given |" in text
    assert "![needle.png](needle.png)" in text
    assert 'folder = "me/tiny"' in text
    assert "trust_remote_code=True" in text
    assert "| alpha (1 is softmax, 2 is sparsemax) | 1.5 |" in text
    parameters = sum(tensor.numel() for tensor in load_file(checkpoint / WEIGHTS).values())
    assert f"| parameters | {parameters:,} |" in text
    assert "Trained on a laptop." in text
    assert "https://arxiv.org/abs/2506.16640" in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize("name", sorted(TASKS))
def test_card_of_a_generated_task_has_an_example_that_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = build_task(name)
    build_synthetic_model(task, "asentmax", sizes=(1, 32, 2, 64)).save_pretrained(tmp_path)
    save_task(task, tmp_path)
    text = write_model_card(tmp_path, name=str(tmp_path)).read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(example, {})
    assert capsys.readouterr().out in ("True\n", "False\n")
    assert "\n\n\n" not in text


def test_card_asks_whether_there_is_a_tokenizer(checkpoint: Path) -> None:
    assert "okenizer" not in write_model_card(checkpoint).read_text(encoding="utf-8")
    tiny_tokenizer().save_pretrained(checkpoint)
    save_task(build_task("copy"), checkpoint)  # as the demo's: the tokenizer writes the task's symbols
    text = write_model_card(checkpoint).read_text(encoding="utf-8")
    assert "tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)" in text
    assert "no tokenizer" not in text


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_card_tells_a_delta_of_zero(delta: float, tmp_path: Path) -> None:
    config = ASEntmaxConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, query_scale_delta=delta)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text(encoding="utf-8")
    assert f"| delta | {delta} |" in text
    assert "| alpha learned per head |" not in text


def test_card_without_results_claims_none(checkpoint: Path) -> None:
    card = ModelCard.load(write_model_card(checkpoint))
    assert card.data.eval_results is None
    assert "model-index" not in card.content
    assert "Measured results" not in card.text
    assert "## Training" not in card.text
    assert "# tiny-asentmax\n" in card.text


def test_card_does_not_average_a_model_read_in_two_ways(checkpoint: Path) -> None:
    rows = [
        {"method": f"ASEntmax{way}", "task": "prose", "metric": "perplexity", "length": length, "perplexity": value}
        for way, length, value in (("", 64, 9.0), (", in blocks", 64, 8.0), (", in blocks", 128, 7.0))
    ]
    card = ModelCard.load(write_model_card(checkpoint, results=[*rows, rows[1] | {"perplexity": 8.5}]))
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("prose, 64 tokens", "perplexity, ASEntmax"): 9.0,
        ("prose, 64 tokens", "perplexity, ASEntmax, in blocks, mean of 2 runs"): 8.25,
        ("prose, 128 tokens", "perplexity, ASEntmax, in blocks"): 7.0,
    }


def test_card_is_written_again_from_its_own_pictures(checkpoint: Path) -> None:
    (checkpoint / "needle.png").write_bytes(b"\x89PNG")
    first = write_model_card(checkpoint, pictures=[checkpoint / "needle.png"]).read_text()
    assert write_model_card(checkpoint, pictures=[checkpoint / "needle.png"]).read_text() == first
    assert (checkpoint / "needle.png").read_bytes() == b"\x89PNG"


@pytest.mark.parametrize(
    ("about", "error", "message"),
    [
        ({"base_model": "/tmp/local/base"}, ValueError, "base_model must be an id on the Hub"),
        ({"datasets": ["my books"]}, ValueError, "datasets must be an id on the Hub"),
        ({"results": [{"method": "asentmax", "length": 64}]}, ValueError, "result 0 must have .* lacks accuracy"),
        ({"results": [RESULTS[0], {"accuracy": 1.0}]}, ValueError, "result 1 must have .* lacks method, length"),
        ({"results": [RESULTS[0] | {"accuracy": float("nan")}]}, ValueError, "accuracy of result 0 must be a finite"),
        ({"results": [RESULTS[0] | {"accuracy": "90 %"}]}, ValueError, "accuracy of result 0 must be a finite"),
        ({"pictures": ["absent.png"]}, FileNotFoundError, "absent.png must be a picture, but is missing"),
        ({"pictures": [__file__]}, ValueError, "must be a picture .*got '.py'"),
    ],
)  # fmt: skip
def test_card_refuses_what_it_can_not_say(
    checkpoint: Path, about: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = sorted(checkpoint.iterdir())
    with pytest.raises(error, match=message):
        write_model_card(checkpoint, **about)
    assert sorted(checkpoint.iterdir()) == before


def test_card_refuses_two_pictures_of_one_name(checkpoint: Path, tmp_path: Path) -> None:
    pictures = [tmp_path / "a" / "map.png", tmp_path / "b" / "map.png"]
    for picture in pictures:
        picture.parent.mkdir()
        picture.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="pictures must have names of their own"):
        write_model_card(checkpoint, pictures=pictures)


PUSH = """
import sys
from transformers import AutoModelForCausalLM
from hf_asentmax.hub import push
folder = sys.argv[1]
print(push(folder, "me/tiny", private=True))
print(push(folder, "me/tiny"))
AutoModelForCausalLM.from_pretrained(folder).push_to_hub("me/direct")
"""

PULL = """
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
tokens = torch.load(folder + "/tokens.pt")
with torch.no_grad():
    logits = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()(tokens).logits
              for name in ("me/tiny", "me/direct")]
torch.save(logits, out + "/logits.pt")
print(snapshot_download("me/tiny"))
"""


def test_push_and_load_again_byte_for_byte(shards: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(shards).eval()
        for name, parameter in model.named_parameters():
            if ".query_scale." in name:
                parameter.normal_(std=0.3)
        model.save_pretrained(shards, max_shard_size="20KB")
        tokens = random_tokens(2, 12)
        expected = model(tokens).logits
    torch.save(tokens, tmp_path / "tokens.pt")
    (shards / "optimizer.pt").write_bytes(b"stays at home")
    with HubStandIn() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        root = str(Path(hf_asentmax.__file__).parent.parent)
        pushed = subprocess.run(
            [sys.executable, "-c", PUSH, str(shards)],
            env={**os.environ, **online, "PYTHONPATH": root},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert pushed.returncode == 0, pushed.stderr
        addresses = pushed.stdout.split()
        assert addresses[0].startswith(f"{hub.url}/me/tiny/commit/")
        printed = run_clean(PULL, tmp_path, tmp_path, folder=tmp_path / "environment", environment=online)
        assert [request for request in hub.unknown if "me/" in request] == []
        there = hub.files("me/tiny")
        assert hub.repositories["me/tiny"].private
    sent = {name: (shards / name).read_bytes() for name in plan_upload(shards)}
    assert "README.md" in sent
    assert {name: content for name, content in there.items() if name != ".gitattributes"} == sent
    assert set(hub.lfs.values()) >= {content for name, content in sent.items() if name.endswith(".safetensors")}
    snapshot = Path(printed.split()[-1])
    assert {name: (snapshot / name).read_bytes() for name in there} == there
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


TRAIN = """
import sys
from training_setup import arguments, rows
from transformers import AutoModelForCausalLM
from hf_asentmax.training import ASEntmaxTrainer
source, output = sys.argv[1:]
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    args = arguments(f"{output}/{strategy}", push_to_hub=True, hub_model_id=f"me/{strategy}", hub_strategy=strategy)
    trainer = ASEntmaxTrainer(AutoModelForCausalLM.from_pretrained(source), args, train_dataset=rows())
    trainer.train()
    trainer.push_to_hub()
    trainer.save_model(f"{output}/{strategy}-model")
"""


def test_trainer_pushes_a_model_that_loads_by_its_own_code(checkpoint: Path, tmp_path: Path) -> None:
    with HubStandIn() as hub:
        root = Path(hf_asentmax.__file__).parent.parent
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
        online["PYTHONPATH"] = os.pathsep.join([str(root), str(Path(__file__).parent)])
        trained = subprocess.run(
            [sys.executable, "-c", TRAIN, str(checkpoint), str(tmp_path)],
            env={**os.environ, **online},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert trained.returncode == 0, trained.stderr
        assert [request for request in hub.unknown if "me/" in request] == []
        strategies = ("end", "every_save", "checkpoint", "all_checkpoints")
        pushed = {strategy: hub.files(f"me/{strategy}") for strategy in strategies}
    for strategy, files in pushed.items():
        model = tmp_path / f"{strategy}-model"
        for name in ("config.json", "model.safetensors", "modeling_asentmax_llama.py"):
            assert files[name] == (model / name).read_bytes(), (strategy, name)
    for strategy, folder in (("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")):
        resumable = {name.split("/")[1] for name in pushed[strategy] if name.startswith(f"{folder}/")}
        assert resumable >= {"optimizer.pt", "trainer_state.json", "model.safetensors", "modeling_asentmax_llama.py"}
