"""The benchmark: inputs of the sparsity asked for, nothing timed that is wrong, results kept, tables and picture.

How fast anything is, no test says.
"""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dense_reference import dense_attention
from test_plots import png_size
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_asentmax import entmax_attention, patch_model
from hf_asentmax.analysis import attention_support
from hf_asentmax.benchmark.cases import benchmark_case
from hf_asentmax.benchmark.command import BenchmarkArguments
from hf_asentmax.benchmark.decoding import DecodeCase, benchmark_decoding
from hf_asentmax.benchmark.generation import CACHES, GenerationCase, benchmark_generation
from hf_asentmax.benchmark.implementations import (
    IMPLEMENTATIONS,
    Implementation,
    Inputs,
    causal_block_mask,
    expected_results,
    relative_errors,
    verdict,
)
from hf_asentmax.benchmark.inputs import BAND, BLOCK, CASES, Case, make_inputs, measure_support
from hf_asentmax.benchmark.models import (
    SIZES,
    CheckpointCase,
    ModelCase,
    benchmark_checkpoint,
    benchmark_model,
    build_model,
    model_support,
)
from hf_asentmax.benchmark.report import crossings, decoding_table, generation_table, models_table
from hf_asentmax.ops import reference

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark_attention.py"
CPU = torch.device("cpu")
SMALL = Case("small", 2, 4, 2, 200, 32, 0.3)
TINY_MODEL = SIZES | {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def run_script(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def weights_of(case: Case) -> Tensor:
    """Dense weights (B, H, N, N) of a case's queries and keys, in float32."""
    query, key, *_ = make_inputs(case, seed=0, device=CPU)
    key = key.repeat_interleave(case.heads // case.kv_heads, 1)
    scores = query.float() @ key.float().transpose(-1, -2) * case.head_dim**-0.5
    hidden = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)
    return reference.entmax_forward(scores.masked_fill(hidden, -torch.inf), 1.5)


@pytest.mark.parametrize("asked", [0.0, 0.5, 0.7, 0.9])
def test_inputs_have_the_block_sparsity_asked_for(asked: float) -> None:
    query, key, *_ = make_inputs(Case("case", 1, 4, 4, 2048, 64, asked), seed=0, device=CPU)
    support = measure_support(query, key)
    assert abs(support.block_sparsity - asked) < 0.04
    assert 10 < support.mean_support < 60  # keys compete, as in trained models
    assert support.zero_share > 0.95


def test_inputs_with_sink_and_band_support_the_first_block_and_the_last_ones() -> None:
    case = Case("case", 1, 2, 1, 2048, 64, 0.5, "sink_band")
    blocks = (weights_of(case)[0] > 0).unflatten(-1, (-1, BLOCK)).any(-1).unflatten(1, (-1, BLOCK)).any(2)
    assert blocks[:, :, 0].float().mean() > 0.98
    for distance in range(BAND // BLOCK + 1):
        assert blocks.diagonal(-distance, 1, 2).float().mean() > 0.95
    far = blocks[:, :, 1:].float().tril(-(BAND // BLOCK + 4))
    assert 0.1 < far.sum() / torch.ones_like(far).tril(-(BAND // BLOCK + 4)).sum() < 0.5


def test_inputs_follow_the_seed() -> None:
    first, again, other = (make_inputs(SMALL, seed=seed, device=CPU) for seed in (0, 0, 1))
    for x, same, different in zip(first, again, other, strict=True):
        assert torch.equal(x, same)
        assert not torch.equal(x, different)


@pytest.mark.parametrize("pattern", ["topics", "sink_band"])
@pytest.mark.parametrize("queries", [1, 70])
def test_last_queries_alone_ask_as_they_do_among_all(queries: int, pattern: str) -> None:
    case = Case("case", 8, 8, 2, 1000, 32, 0.3, pattern)

    def support(count: int | None) -> tuple[float, float]:
        """Keys with a weight, and the share of blocks with one, of the last queries."""
        query, key, value, grad = make_inputs(case, seed=0, device=CPU, queries=count)
        assert query.shape == grad.shape == (8, 8, count or 1000, 32)
        assert key.shape == value.shape == (8, 2, 1000, 32)
        last = torch.arange(1000 - queries + 1, 1001, dtype=torch.int32)[None]
        query, key = query[:, :, -queries:].float(), key.float()
        weights = reference.attention_weights(query, key, torch.zeros_like(last), last, None, None, 1.5, 32**-0.5) > 0
        blocks = F.pad(weights, (0, -1000 % BLOCK)).unflatten(-1, (-1, BLOCK)).any(-1)
        return weights.sum(-1).float().mean().item(), blocks.float().mean().item()

    for found, expected in zip(support(queries), support(None), strict=True):
        assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_sparsity": 0.99}, r"block_sparsity must be between 0 and 0\.\d+ .*got 0.99; ask for less"),
        ({"block_sparsity": -0.1}, "block_sparsity must be"),
        ({"heads": 3}, "heads must be a multiple of kv_heads = 2, got 3"),
        ({"head_dim": 12}, "head_dim must be"),
        ({"tokens": 0}, "tokens must be positive, got 0"),
        ({"pattern": "random"}, "pattern must be one of topics, sink_band, got 'random'"),
    ],
)
def test_case_refuses_what_can_not_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("tokens", [1, 63, 111, 200])
def test_support_is_counted_as_the_dense_weights_say(tokens: int) -> None:
    query, key = torch.randn(2, 4, tokens, 16), torch.randn(2, 2, tokens, 16)
    scale, slopes = 1 + torch.rand(2, 4, tokens), torch.tensor([1.0, 0.1, 0.0, 0.0])
    last = torch.arange(1, tokens + 1, dtype=torch.int32)[None]
    weights = reference.attention_weights(query, key, torch.zeros_like(last), last, scale, slopes, 1.5, 0.5)
    support = measure_support(query, key, query_scale=scale, alibi_slopes=slopes, scaling=0.5)
    assert support.mean_support == pytest.approx((weights > 0).sum(-1).float().mean().item())
    assert support.zero_share == pytest.approx(1 - (weights > 0).sum().item() / (8 * tokens * (tokens + 1) / 2))
    blocks = -(-tokens // BLOCK)
    padded = F.pad(weights, (0, blocks * BLOCK - tokens, 0, blocks * BLOCK - tokens))
    filled = F.max_pool2d(padded, BLOCK) > 0
    assert support.block_sparsity == pytest.approx(1 - filled.sum().item() / (8 * blocks * (blocks + 1) / 2))
    assert measure_support(query, key, max_scores=3 * tokens**2).heads == 3


@pytest.mark.parametrize("nape", [False, True], ids=["plain", "nape"])
@pytest.mark.parametrize("computes", ["entmax", "softmax"])
def test_expected_results_are_those_of_dense_attention(computes: str, nape: bool) -> None:
    case = replace(SMALL, nape=nape)
    inputs = Inputs(*make_inputs(case, seed=0, device=CPU, dtype=torch.float64))
    slopes = case.slopes(CPU)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    alpha = {"entmax": 1.5, "softmax": 1.0}[computes]
    out = dense_attention(*leaves, alpha=alpha, alibi_slopes=None if slopes is None else slopes.double())
    grads = torch.autograd.grad(out, leaves, inputs.grad)
    found = {"output": out.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    expected = expected_results(inputs, slopes, computes)
    assert len(expected.pairs) == 4
    assert max(relative_errors(found, expected).values()) < 1e-6  # generated in float32
    few = expected_results(inputs, slopes, computes, max_scores=2 * 2 * 200**2)
    assert few.pairs == [(0, 0), (1, 0)]


def test_flex_block_mask_is_causal() -> None:
    mask = causal_block_mask(300, CPU)
    assert torch.equal(mask.to_dense()[0, 0].bool(), torch.ones(3, 3, dtype=torch.bool).tril())
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2]


class WrongKeyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor) -> Tensor:
        return key.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.1


def raises(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise AssertionError("head dim too large\nmore")


@pytest.mark.parametrize(
    ("attention", "status"),
    [
        (lambda q, k, v: 1.05 * entmax_attention(q, k, v), "wrong: relative error of output 5.0e-02, dq 5.0e-02"),
        (lambda q, k, v: entmax_attention(q, WrongKeyGradient.apply(k), v), "wrong: relative error of dk 1.0e-01"),
        (lambda q, k, v: entmax_attention(q, k, v) * torch.nan, "wrong: relative error of output nan"),
        (lambda q, k, v: entmax_attention(q, k, v, is_causal=False), "wrong: relative error of output"),
        (raises, "failed: AssertionError: head dim too large"),
    ],
    ids=["scaled", "gradient", "nan", "not-causal", "raises"],
)
def test_wrong_implementation_is_not_timed(attention: Any, status: str) -> None:
    wrong = Implementation("wrong", "entmax", lambda case, device: attention)
    rows = benchmark_case(SMALL, [wrong, IMPLEMENTATIONS["asentmax"]], seed=0, device=CPU)
    assert rows[0]["status"].startswith(status)
    assert not {"forward", "backward", "forward_backward"} & set(rows[0])
    assert rows[1]["status"] == "ok"
    assert rows[1]["forward_backward"]["low"] <= rows[1]["forward_backward"]["median"]


def test_softmax_is_wrong_where_entmax_is_meant() -> None:
    impostor = replace(IMPLEMENTATIONS["sdpa_math"], computes="entmax")
    (row,) = benchmark_case(SMALL, [impostor], seed=0, device=CPU)
    assert row["status"].startswith("wrong")


def test_peers_say_why_they_are_left_out() -> None:
    nape = replace(SMALL, nape=True)
    assert "slopes" in (IMPLEMENTATIONS["sdpa_cudnn"].obstacle(nape) or "")
    assert IMPLEMENTATIONS["flex"].obstacle(nape) is None
    assert IMPLEMENTATIONS["adasplash"].obstacle(SMALL) is not None  # not installed here, or 200 tokens
    assert verdict({"output": 1e-3, "dq": 1.9e-2}) is None


def test_arguments_choose_cases() -> None:
    names = [case.name for case in BenchmarkArguments().chosen_cases()]
    assert names == [name for name in CASES if name != "huge"]
    args = BenchmarkArguments(
        cases=["short"], nape=True, sweep=["lengths", "sparsity"], lengths=[4096], sparsities=[0.5]
    )
    assert [case.name for case in args.chosen_cases()] == ["short", "short_nape", "lengths_4096", "sparsity_0.5"]
    models = BenchmarkArguments(models=True, contexts=[2048])
    assert not models.chosen_cases()
    assert len(models.chosen_models()) == 6
    generation = BenchmarkArguments(generation=True, prompts=[4096], caches=["static"])
    assert not generation.chosen_cases()
    assert [case.name for case in generation.chosen_generation()] == ["static_4096"] * 3


def test_crossing_lies_where_the_ratio_is_one() -> None:
    assert crossings([0.5, 2.0, 3.0]) == [(0, 0.5)]
    assert crossings([2.0, 0.5]) == [(0, 0.5)]
    assert crossings([1.5, 2.0]) == []


def test_script_measures_keeps_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--device", "cpu", "--dtype", "float32", "--heads", 2, "--kv_heads", 1, "--head_dim", 16, "--tokens", 192]
    small += ["--block_sparsity", 0.2, "--output_dir", tmp_path]
    run_script(monkeypatch, *small, "--cases", "custom", "--nape")
    printed = capsys.readouterr().out
    assert "custom: B 1, H 2/1, N 192, D 16, topics; block sparsity" in printed
    assert "of the time without" in printed
    assert not (tmp_path / "benchmark.png").exists()
    run_script(monkeypatch, *small, "--sweep", "lengths", "sparsity", "--lengths", 128, 192, "--sparsities", 0, 0.2)
    results = json.loads((tmp_path / "results.json").read_text())
    names = ["custom", "custom_nape", "lengths_128", "lengths_192", "sparsity_0", "sparsity_0.2"]
    assert list(dict.fromkeys(row["case"] for row in results["rows"])) == names
    assert {row["status"] for row in results["rows"]} == {"ok", "left out: has no slopes without an N x N bias"}
    assert [row["run"] for row in results["rows"]] == [0] * 4 + [1] * 8
    assert [run["seed"] for run in results["runs"]] == [0, 0]
    assert "benchmark_attention.py --device cpu" in results["runs"][0]["command"]
    tables = (tmp_path / "results.md").read_text()
    assert all(f"\n{name}: B 1" in tables for name in names)

    (tmp_path / "benchmark.png").unlink()
    run_script(monkeypatch, "--plot", tmp_path / "results.json")
    assert png_size(tmp_path / "benchmark.png")[0] > 1500


def test_script_times_decoding_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(monkeypatch, "--device", "cpu", "--decode", 64, 200, "--batch", 2, "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["decoding"]
    names = ["decode_2x64", "decode_2x64_ragged", "decode_2x200", "decode_2x200_ragged"]
    assert list(dict.fromkeys(row["case"] for row in rows)) == names
    assert {row["status"] for row in rows} == {"ok"}
    assert capsys.readouterr().out.count("| asentmax ") == 4
    assert "us, as a graph" in (tmp_path / "results.md").read_text()


def test_script_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: device must be .* an NVIDIA GPU, .* --plot"):
        run_script(monkeypatch, "--output_dir", tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(SystemExit, match="error: .*results.json must hold runs and rows"):
        run_script(monkeypatch, "--plot", tmp_path / "results.json")
    with pytest.raises(SystemExit, match="error: results must hold a timed sweep"):
        run_script(monkeypatch, "--plot", tmp_path / "none.json")


def test_script_compiles_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--device", "cpu", "--tokens", 64, "--heads", 2, "--kv_heads", 2, "--head_dim", 16, "--block_sparsity", 0]
    run_script(monkeypatch, *small, "--cases", "custom", "--compile_only", "--output_dir", tmp_path / "out")
    assert "asentmax" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention", ["asentmax_nape", "asentmax_rope", "softmax_sdpa"])
@pytest.mark.parametrize("setting", ["fresh", "topics"])
def test_models_are_trained_and_timed(attention: str, setting: str) -> None:
    case = ModelCase(attention, 192, setting, block_sparsity=0.3, step_tokens=384)
    row = benchmark_model(case, seed=0, device=CPU, sizes=TINY_MODEL)
    assert row["case"] == f"{setting}_192"
    assert row["tokens_per_s"]["low"] > 0
    assert (row["support"] is None) == (attention == "softmax_sdpa")


def write_trained(folder: Path) -> list[str]:
    """A learned-alpha and a softmax checkpoint, and documents for them."""
    torch.manual_seed(0)
    for name in ("learned", "softmax"):
        model: Any = LlamaForCausalLM(LlamaConfig(**TINY_MODEL, initializer_range=0.2))
        if name == "learned":
            patch_model(model, method="learned_alpha", positions="nape")
            for layer in model.model.layers:  # heads from almost softmax to almost sparsemax
                layer.self_attn.query_scale.alpha_logit.data = torch.tensor([-3.0, -1.0, 1.0, 3.0])
        model.save_pretrained(folder / name)
    Dataset.from_dict({"input_ids": [[i * i % 127 for i in range(n)] for n in (150, 300, 500)]}).to_parquet(
        folder / "long.parquet"
    )
    return [str(folder / name) for name in ("learned", "softmax", "long.parquet")]


def test_checkpoints_train_on_their_documents(tmp_path: Path) -> None:
    learned, softmax, data = write_trained(tmp_path)
    rows = [
        benchmark_checkpoint(CheckpointCase(source, 192, data, step_tokens=576), device=CPU) | {"run": 0}
        for source in (learned, softmax)
    ]
    assert [row["implementation"] for row in rows] == [learned, softmax]
    model = AutoModelForCausalLM.from_pretrained(learned)
    own = attention_support(model, torch.tensor([[i * i % 127 for i in range(192)]]))
    assert rows[0]["support"]["mean_support"] == pytest.approx(own.means()["support_size"], rel=0.05)  # bfloat16
    assert rows[1]["support"] is None
    lines = [[cell.strip() for cell in line.split("|")] for line in models_table(rows).splitlines()[2:]]
    assert [(line[1], line[2], line[3]) for line in lines] == [(source, "192", "text") for source in (learned, softmax)]
    share = rows[0]["tokens_per_s"]["median"] / rows[1]["tokens_per_s"]["median"]
    assert [line[5] for line in lines] == [f"{share:.2f}", "1.00"]


def test_checkpoints_need_documents_long_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, _, data = write_trained(tmp_path)
    options = ["--device", "cpu", "--output_dir", tmp_path / "out", "--contexts", 16384, "--checkpoints", learned]
    with pytest.raises(SystemExit, match="error: data must name the documents .* give --data"):
        run_script(monkeypatch, *options)
    with pytest.raises(SystemExit, match="error: documents must hold one of at least 16384 tokens"):
        run_script(monkeypatch, *options, "--data", data)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"data must hold 4 parts of 192 tokens, none of two documents, got 3 in .*"):
        benchmark_checkpoint(CheckpointCase(learned, 192, data, step_tokens=768), device=CPU)
    with pytest.raises(ValueError, match="context must be between 1 and step_tokens = 768, got 1024"):
        CheckpointCase(learned, 1024, data, step_tokens=768)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["softmax_sdpa", "asentmax_nape"])
def test_generation_is_timed_token_by_token(attention: str, cache: str) -> None:
    case = GenerationCase(attention, 96, cache, new_tokens=3, block_sparsity=0.3)
    row = benchmark_generation(case, seed=0, device=CPU, sizes=TINY_MODEL | {"num_key_value_heads": 2})
    assert row["case"] == f"{cache}_96"
    assert row["prefill_ms"]["low"] > 0
    assert row["tokens_per_s"]["low"] > 0
    assert (row["support"] is None) == (attention == "softmax_sdpa")
    cells = generation_table([row | {"run": 0}]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:4]] == [attention, "96", cache]


def test_decoding_steps_are_checked_and_timed() -> None:
    case = DecodeCase(2, 300, ragged=True)
    chosen = [IMPLEMENTATIONS[name] for name in ("asentmax", "sdpa_math", "sdpa_flash", "adasplash")]
    rows = [row | {"run": 0} for row in benchmark_decoding(case, chosen, seed=0, device=CPU)]
    assert [row["status"].split(":")[0] for row in rows] == ["ok", "ok", "left out", "left out"]
    assert all(row["wall"]["low"] > 0 for row in rows[:2])
    query, key, *_ = make_inputs(case.inputs, seed=0, device=CPU, queries=1)
    first, last = torch.tensor([[0], [150]], dtype=torch.int32), torch.tensor([[300]] * 2, dtype=torch.int32)
    weights = reference.attention_weights(query.float(), key.float(), first, last, None, None, 1.5, 128**-0.5)
    tiles = F.max_pool1d(F.pad(weights.unflatten(1, (8, 4))[..., 0, :].amax(2).flatten(0, 1), (0, 20)), BLOCK).gt(0)
    assert rows[0]["support"] == pytest.approx(tiles.sum().item() / (8 * 5 + 8 * 3))  # 150 keys before 2 * 64 + 22
    lines = decoding_table(rows).splitlines()
    assert [line.split("|")[5].strip() for line in lines[2:]] == [x.name for x in chosen]
    assert "takes no padding" in lines[4]


def test_decoding_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *_, **__: query)
    (row,) = benchmark_decoding(DecodeCase(1, 128), [IMPLEMENTATIONS["sdpa_math"]], seed=0, device=CPU)
    assert row["status"].startswith("wrong: relative error of output")
    assert "wall" not in row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache": "paged"}, "cache must be one of dynamic, static, got 'paged'"),
        ({"attention": "flash"}, "attention must be one of softmax_sdpa"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
    ],
)
def test_generation_case_refuses_what_can_not_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GenerationCase("softmax_sdpa", 96, "static"), **change)


def test_model_support_is_that_of_its_attention_weights() -> None:
    model, input_ids = build_model(ModelCase("asentmax_nape", 96, step_tokens=96), seed=0, device=CPU, sizes=TINY_MODEL)
    found, weights = model_support(model, input_ids), attention_support(model, input_ids)
    assert found.mean_support == pytest.approx(
        weights.means()["support_size"], rel=0.02
    )  # weights are cast to bfloat16
    softmax, _ = build_model(ModelCase("softmax_sdpa", 96, step_tokens=96), seed=0, device=CPU, sizes=TINY_MODEL)
    with pytest.raises(RuntimeError, match="must run ASEntmax attention"):
        model_support(softmax, input_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("nape", [False, True], ids=["plain", "nape"])
def test_benchmark_on_a_gpu(nape: bool) -> None:
    case = Case("case", 2, 4, 2, 512, 64, 0.5, nape=nape)
    chosen = [IMPLEMENTATIONS[name] for name in ("asentmax", "sdpa_flash", "flex")]
    rows = benchmark_case(case, chosen, seed=0, device=torch.device("cuda"))
    assert [row["status"][:8] for row in rows] == ["ok", "left out" if nape else "ok", "ok"]
    for row in (row for row in rows if row["status"] == "ok"):
        assert row["peak_mib"] >= row["results_mib"] > 0
        assert row["forward"]["wall"]["median"] > 0
