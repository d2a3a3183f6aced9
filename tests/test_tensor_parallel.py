"""Tensor parallel on two CPU processes: each has its heads' scale, slopes and alpha, together they are one model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, random_tokens
from safetensors.torch import load_file
from test_distributed import two_processes
from test_patching import FOUND, attention_modules, entmax_model, native_model
from transformers import AutoModelForCausalLM

# Every parameter that is split by heads, slopes that are not the same on both, and each family's own plan.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, {}, {}) for family in FOUND},
    "nape": ("llama", {}, {"positions": "nape", "alpha_learned": True}),
    "alibi-log": ("mistral", {"sliding_window": 4}, {"positions": "alibi", "query_scaling": "log"}),
    "static": ("qwen3", {"tie_word_embeddings": True}, {"query_scaling": "static", "alpha_learned": True}),
    "none": ("llama", {}, {"query_scaling": "none", "positions": "alibi", "alpha": 2.0}),
}
TOKENS = random_tokens(2, 9)
WHOLE = ("olmo2", "phi3")  # whose plans gather the queries of all heads before attention
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

PARALLEL = """
import sys
from pathlib import Path
import torch
from torch.distributed import destroy_process_group, get_rank
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import hf_asentmax

def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x

out = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    tokens = torch.load(folder / "tokens.pt")
    split = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split).eval()
    if folder.name == "softmax":
        try:
            hf_asentmax.patch_model(model)
        except TypeError as error:
            out["refusal"] = str(error)
        continue
    result = model(tokens, labels=tokens)
    result.loss.backward()
    here = {name: tuple(getattr(x, "to_local", lambda: x)().shape) for name, x in model.named_parameters()}
    grads = {name: whole(x.grad) for name, x in model.named_parameters()}
    generated = model.generate(tokens, **GREEDY)
    model.save_pretrained(Path(sys.argv[2]) / folder.name)
    out[folder.name] = {"logits": result.logits.detach(), "grads": grads, "here": here, "generated": generated}
torch.save(out, Path(sys.argv[2]) / f"{get_rank()}.pt")
destroy_process_group()
"""


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Where two processes saved the variants again, and what each of them computed."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in VARIANTS:
        build(name).save_pretrained(folder / "models" / name)
        torch.save(TOKENS, folder / "models" / name / "tokens.pt")
    native_model("llama").save_pretrained(folder / "models" / "softmax")
    torch.save(TOKENS, folder / "models" / "softmax" / "tokens.pt")
    (folder / "out").mkdir()
    (folder / "parallel.py").write_text(PARALLEL.replace("GREEDY", repr(GREEDY)), encoding="utf-8")
    two_processes(folder / "parallel.py", folder / "models", folder / "out")
    return folder / "out", [torch.load(folder / "out" / f"{rank}.pt") for rank in (0, 1)]


def build(name: str) -> Any:
    family, config, settings = VARIANTS[name]
    return entmax_model(family, config, **settings)


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_parallel_computes_what_one_process_does(name: str, parallel: tuple[Path, list[Any]]) -> None:
    model, nudged = build(name), build(name)
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    generated = model.generate(TOKENS, **GREEDY)
    # Sums in another order round otherwise, and a key at the edge of the support makes more of that (Gemma 3 here a
    # hundred times more than Llama): as much as a change of the weights by half a bit.
    with torch.no_grad():
        for x in nudged.parameters():
            x.mul_(1 + 2**-24 * (torch.randint(2, x.shape) * 2 - 1))
    nudged(TOKENS, labels=TOKENS).loss.backward()
    for rank in parallel[1]:
        found = rank[name]
        torch.testing.assert_close(found["logits"], output.logits, **TOLERANCE[torch.float32])
        assert torch.equal(found["generated"], generated)
        for (parameter, x), y in zip(model.named_parameters(), nudged.parameters(), strict=True):
            error, allowed = (found["grads"][parameter] - x.grad).norm(), 2 * (y.grad - x.grad).norm()
            assert error <= allowed + 2e-6 * x.grad.norm(), f"{parameter}: {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_parallel_splits_all_that_is_learned_by_heads(name: str, parallel: tuple[Path, list[Any]]) -> None:
    scales = {n: tuple(x.shape) for n, x in build(name).named_parameters() if ".query_scale." in n}
    assert bool(scales) == (name != "none")
    for rank in parallel[1]:
        share = 1 if name in WHOLE else 2
        assert {n: rank[name]["here"][n] for n in scales} == {n: (s[0] // share, *s[1:]) for n, s in scales.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_tensor_parallel_saves_the_whole_model(name: str, parallel: tuple[Path, list[Any]]) -> None:
    build(name).save_pretrained(parallel[0] / "one" / name)
    one, two = (load_file(folder / name / "model.safetensors") for folder in (parallel[0] / "one", parallel[0]))
    assert two.keys() - one.keys() <= {"lm_head.weight"}  # Transformers unties what it gathers
    assert all(torch.equal(two[parameter], one[parameter]) for parameter in one)
    again = AutoModelForCausalLM.from_pretrained(parallel[0] / name)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, build(name)(TOKENS).logits)
    assert (parallel[0] / name / f"modeling_asentmax_{VARIANTS[name][0]}.py").is_file()


def test_tensor_parallel_softmax_model_is_not_patched(parallel: tuple[Path, list[Any]]) -> None:
    for rank in parallel[1]:
        assert re.search("must be patched before its weights are shared out", rank["refusal"])


def test_tensor_parallel_uneven_heads_are_refused() -> None:
    module = attention_modules(entmax_model(positions="alibi"))[0]
    with pytest.raises(ValueError, match="4 heads must be shared evenly .*, got 3 here; use a tp_size that divides"):
        module._own_slopes(torch.zeros(1, 3, 5, 8), torch.zeros(1, 1, 5, 2))
