"""What attention does: statistics against the dense maps, fits, pictures, and scripts/analyze.py."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_tokens, tiny_model
from retrieval_setup import VOCABULARY, byte_tokenizer
from test_plots import png_size

from hf_asentmax import analysis, patch_model
from hf_asentmax.analysis import attention_maps, attention_statistics, head_rows, join_statistics
from hf_asentmax.analysis_plots import plot_heads, plot_learned_alpha, plot_maps, plot_scale, spread_evenly
from hf_asentmax.analysis_report import AnalysisArguments, head_kinds, load_model, run_analysis
from hf_asentmax.analysis_tables import summary_table
from hf_asentmax.formula_plots import FORMULA_FIGURES, _position_scores, dispersion_rows, normal_scores
from hf_asentmax.scale_fits import LINEAR, LOG, POWER, SCALE_LAWS, fit_scale, scale_law, scale_points
from hf_asentmax.tasks import build_task, sample_batch, save_task

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "analyze.py"
TOKENS = 150  # three blocks, the last one cut

CASES: dict[str, dict[str, Any]] = {
    "asentmax": {"query_scaling": "static"},
    "adaptive": {},
    "float64": {},
    "nape": {"positions": "nape"},
    "alibi": {"positions": "alibi", "query_scaling": "static"},
    "softmax": {"method": "softmax"},
    "ssmax": {"method": "ssmax"},
    "top-k": {"method": "top_k", "attention_top_k": 5},
    "learned alpha": {"method": "learned_alpha", "positions": "nape"},
    "window": {"query_scaling": "static"},
    "packed": {"positions": "nape"},
    "left-padded": {},
    "right-padded": {"query_scaling": "static"},
}


def sharp_model(case: str = "", **options: Any) -> Any:
    """A patched model with weights of every size, and exact zeros where its method gives them."""
    sizes = {"sliding_window": 40} if case == "window" else {}
    model = patch_model(tiny_model("mistral" if case == "window" else "llama", **sizes), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(300.0)
            if ".query_scale." in name:
                parameter.normal_()
    return model.double() if case == "float64" else model


def inputs_of(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of two sequences, and which keys each query may see, (B, T, T); none for padding."""
    inputs = {"input_ids": random_tokens(2, TOKENS)}
    visible = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool).tril()
    if case == "window":
        visible &= ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-40)
    if case == "packed":
        bounds = [[70, 1, 79], [150]]
        inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in bounds])
        document = torch.tensor([[0] * 70 + [1] + [2] * 79, [0] * TOKENS])
        visible &= document[:, :, None] == document[:, None]
    if case.endswith("padded"):
        padding = slice(66) if case.startswith("left") else slice(TOKENS - 66, None)
        inputs["attention_mask"] = torch.ones(2, TOKENS, dtype=torch.int64)
        inputs["attention_mask"][0, padding] = 0
        visible[0, :, padding] = visible[0, padding] = False
    return inputs, visible


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_dense_weights(case: str) -> None:
    model = sharp_model(case, **CASES[case])
    inputs, visible = inputs_of(case)
    found = attention_statistics(model, **inputs)
    attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    assert len(found) == len(attentions) == 2
    for layer, weights in zip(found, attentions, strict=True):
        p = weights.double() * visible[:, None]
        n = visible.sum(-1)
        assert torch.equal(layer.n, n)
        assert torch.equal(layer.support, (p > 0).sum(-1))
        torch.testing.assert_close(layer.largest, p.amax(-1).float(), rtol=1e-5, atol=1e-6)
        entropy = -(p * p.clamp_min(1e-300).log()).sum(-1) / n[:, None].log()
        seen = (n >= 2)[:, None].expand_as(entropy)
        assert torch.equal(layer.entropy.isnan(), ~seen)
        torch.testing.assert_close(layer.entropy[seen], entropy[seen].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.block_sparsity, brute_block_sparsity(p, visible))


def test_statistics_of_top_k_are_of_the_selection() -> None:
    layer = attention_statistics(sharp_model(**CASES["top-k"]), random_tokens(1, 20))[0]
    assert torch.equal(layer.support, layer.n.clamp(max=5)[:, None].expand(1, 4, 20))


def brute_block_sparsity(p: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """(B, H), counted block by block."""
    starts = range(0, TOKENS, 64)
    blocks = [(slice(i, i + 64), slice(j, j + 64)) for i in starts for j in starts]
    found = torch.zeros(p.shape[:2])
    for row in range(p.shape[0]):
        seen = [(i, j) for i, j in blocks if visible[row, i, j].any()]
        for head in range(p.shape[1]):
            found[row, head] = sum(not (p[row, head, i, j] > 0).any() for i, j in seen) / len(seen)
    return found


def test_the_cases_have_blocks_with_and_without_support() -> None:
    for case in ("nape", "packed"):
        inputs, _ = inputs_of(case)
        share = attention_statistics(sharp_model(case, **CASES[case]), **inputs)[0].block_sparsity
        assert 0.0 < share[:, :2].mean() < 1.0  # ALiBi heads see what is near
        assert share[:, 2:].mean() < share[:, :2].mean()


@pytest.mark.parametrize("queries", [1, 5, 64, 200])
def test_statistics_do_not_depend_on_how_many_queries_are_taken_at_once(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = sharp_model(positions="nape"), random_tokens(1, 300)
    positions = torch.cat([torch.arange(126), torch.arange(174)])[None]  # the second document begins within a block
    whole = attention_statistics(model, tokens, position_ids=positions)
    monkeypatch.setattr(analysis, "_CHUNK_WEIGHTS", {"cpu": 4 * 300 * queries})
    for one, other in zip(whole, attention_statistics(model, tokens, position_ids=positions), strict=True):
        assert torch.equal(one.support, other.support)
        assert torch.equal(one.block_sparsity, other.block_sparsity)
        torch.testing.assert_close(one.entropy, other.entropy, equal_nan=True)


def test_scale_and_alpha_are_those_of_the_layer() -> None:
    model, tokens = sharp_model(positions="nape", query_scaling="static"), random_tokens(2, 20)
    layer = attention_statistics(model, tokens)[1]
    own = model.model.layers[1].self_attn.query_scale
    r, _ = own(torch.zeros(2, 20, 32), torch.arange(1, 21)[None])
    assert torch.equal(layer.query_scale[:, 2:], r[:, 2:].detach())
    assert torch.equal(layer.query_scale[:, :2], torch.ones(2, 2, 20))  # ALiBi heads
    assert torch.equal(layer.alpha, torch.full((2, 4), 1.5))
    learned = sharp_model(method="learned_alpha")
    expected = 1.01 + 0.99 * learned.model.layers[0].self_attn.query_scale.alpha_logit.detach().sigmoid()
    torch.testing.assert_close(attention_statistics(learned, tokens)[0].alpha, expected.expand(2, 4))
    assert torch.equal(attention_statistics(sharp_model(**CASES["top-k"]), tokens)[0].alpha, torch.ones(2, 4))


def test_a_model_is_left_as_it_was_even_by_a_failure() -> None:
    model = sharp_model().train()
    model.model.layers[0].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}

    def fail() -> None:
        raise KeyboardInterrupt

    for progress in (None, fail):
        try:
            attention_statistics(model, random_tokens(1, 8), progress=progress)
        except KeyboardInterrupt:
            assert progress is fail
        assert modes == {name: module.training for name, module in model.named_modules()}
        assert all(layer.self_attn.observer is None for layer in model.model.layers)
    with pytest.raises(RuntimeError, match='LlamaForCausalLM must give attention weights.*method="softmax"'):
        attention_statistics(tiny_model("llama"), random_tokens(1, 8))


def test_rows_average_over_queries_and_name_the_final_ones() -> None:
    model, tokens = sharp_model(query_scaling="static"), random_tokens(2, 12)
    parts = [attention_statistics(model, one[None]) for one in tokens]
    layers = [join_statistics(pair) for pair in zip(*parts, strict=True)]
    final = torch.zeros(2, 12, dtype=torch.bool)
    final[0, -1] = final[1, -2] = True
    rows = head_rows(layers, final)
    assert [(row["layer"], row["head"]) for row in rows] == [(i, j) for i in range(2) for j in range(4)]
    p = model(tokens, output_attentions=True, use_cache=False).attentions[1][:, 2]
    row = rows[6]
    assert row["support_size"] == pytest.approx((p > 0).sum().item() / 24)
    assert row["zero_share"] == pytest.approx(1 - (p > 0).sum().item() / (2 * 78))
    assert row["final_n"] == 11.5
    assert row["final_largest"] == pytest.approx((p[0, -1].max() + p[1, -2].max()).item() / 2)
    assert head_rows(layers)[6]["final_largest"] == pytest.approx(p.amax(-1).mean().item())


def test_maps_are_the_dense_weights_of_the_heads() -> None:
    model, tokens = sharp_model(positions="nape"), random_tokens(1, 20)
    maps = attention_maps(model, tokens, [(1, 3), (0, 0)])
    attentions = model(tokens, output_attentions=True, use_cache=False).attentions
    assert list(maps) == [(1, 3), (0, 0)]
    for (layer, head), p in maps.items():
        torch.testing.assert_close(p, attentions[layer][0, head].detach())


@pytest.mark.parametrize(
    ("law", "fit"),
    [
        (LINEAR, {"beta": 0.02, "delta": 0.0, "gamma": 0.0}),
        (LOG, {"beta": 0.7, "delta": 1.0, "gamma": 1.0}),
        (POWER, {"beta": 0.3, "delta": 1.5, "gamma": 2.3742}),
        (POWER, {"beta": 2.0, "delta": -0.5, "gamma": -1.2345}),
    ],
)
def test_fits_recover_what_the_points_were_made_from(law: str, fit: dict[str, float]) -> None:
    n = torch.logspace(0.5, 4, 30, dtype=torch.float64)
    fits = fit_scale(n, scale_law(law, fit, n))
    assert list(fits) == list(SCALE_LAWS)
    assert {name: fits[law][name] for name in fit} == pytest.approx(fit, rel=1e-4, abs=1e-4)
    assert fits[law]["r2"] == pytest.approx(1.0, abs=1e-9)
    assert fits[POWER]["r2"] >= fits[LOG]["r2"] - 1e-12
    assert all(fits[other]["r2"] < 0.999 for other in SCALE_LAWS if other not in (law, POWER))


def test_r2_says_how_far_a_fit_is_off() -> None:
    n = torch.tensor([4.0, 16.0, 64.0, 256.0])
    r = torch.tensor([1.0, 2.0, 2.0, 3.0])  # about log_4 n: the best line leaves 0.2 of a spread of 2
    assert fit_scale(n, r)[LOG]["r2"] == pytest.approx(0.9)
    assert fit_scale(n, r)[LINEAR]["r2"] < 0.0
    assert math.isnan(fit_scale(n, torch.full((4,), 1.5))[LOG]["r2"])


@pytest.mark.parametrize(
    ("n", "r", "message"),
    [
        ([2, 4], [1, 2], "at least 3 numbers"),
        ([1, 2, 4], [1, 2, 3], "from 2 on"),
        ([4, 4, 4], [1, 2, 3], "not all equal"),
        ([2, 4, 8], [1, 2], "as many as r has"),
        ([2, 4, 8], [1, math.nan, 2], "r must be finite"),
    ],
)
def test_fits_refuse_what_has_no_answer(n: list[float], r: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_scale(torch.tensor(n).float(), torch.tensor(r).float())


def test_scale_points_are_means_in_bins() -> None:
    n = torch.arange(1, 41).expand(2, 40)
    scale = torch.stack([n.float(), torch.full((2, 40), 3.0)], 1)
    points = scale_points(n, scale, bins=4)
    assert len(points["n"]) == 4
    assert points["r"][0] == pytest.approx(points["n"])  # r is n in the first head
    assert points["r"][1] == [3.0] * 4
    assert points["n"][0] == 10.0  # the mean of 8 .. 12, which lie below 8 * (41 / 8) ** (1 / 4) = 12.04
    with pytest.raises(ValueError, match="n must hold queries that see 8 keys, got 7 at most"):
        scale_points(n[:, :7], scale[:, :, :7])


def test_dispersion_rows_say_what_the_formulas_say() -> None:
    rows = {(row["method"], row["n"]): row for row in dispersion_rows()}
    scores = torch.cat([torch.tensor([6.0], dtype=torch.float64), normal_scores(4095)])
    assert rows["softmax", 4096]["weight"] == pytest.approx(scores.softmax(0)[0].item())
    assert rows["softmax", 262144]["entropy"] > 0.95
    assert rows["softmax", 4096]["support"] == 4096
    assert rows["softmax of the top 8", 4096]["support"] == 8
    # No other key comes within 2 of it: it keeps all the weight, exactly.
    assert scores[1] < 4
    assert rows["entmax, alpha 1.5", 4096]["weight"] == 1.0
    assert rows["entmax, alpha 1.5", 262144]["weight"] < 1.0


def test_position_scores_are_those_of_the_schemes() -> None:
    distance = torch.arange(4, dtype=torch.float64)
    scores = _position_scores(distance)
    assert scores["ALiBi"]["head 1, slope 1/2"].tolist() == [0.0, -0.5, -1.0, -1.5]
    assert scores["NAPE"]["head 4, slope 1/4"].tolist() == [0.0, -0.25, -0.5, -0.75]
    assert scores["NAPE"]["head 8, slope 0 (NoPE)"].abs().max() == 0.0
    assert scores["RoPE"]["score 4"][0] == 4.0
    assert scores["RoPE"]["score 4"][1] < 4.0


@pytest.mark.parametrize("heads", [1, 17])
def test_pictures_of_models_of_any_size_are_drawn(heads: int, tmp_path: Path) -> None:
    fits = fit_scale(torch.tensor([2.0, 8.0, 64.0]), torch.tensor([1.0, 1.5, 2.0]))
    scales = [{"layer": 0, "head": i, "n": [2.0, 8.0, 64.0], "r": [1.0, 1.5, 2.0], "fits": fits} for i in range(heads)]
    assert png_size(plot_scale(scales, tmp_path / "scale.png", train_length=16))[0] > 500
    rows = [
        {"layer": 0, "head": i, "length": length, "support_size": 3.0, "block_sparsity": 0.5, "alpha": 1.4}
        for i in range(heads)
        for length in range(16, 64, 16)
    ]
    assert png_size(plot_heads(rows, tmp_path / "heads.png"))[0] > 500
    assert png_size(plot_learned_alpha(rows, tmp_path / "alpha.png"))[0] > 400
    maps = {"a": {(0, i): torch.eye(8) for i in range(min(heads, 4))}, "b": {(0, 0): torch.eye(8)}}
    assert png_size(plot_maps(maps, tmp_path / "map.png"))[0] > 300


def test_items_are_spread_evenly() -> None:
    assert spread_evenly(range(3), 4) == [0, 1, 2]
    assert spread_evenly(range(10), 4) == [0, 3, 6, 9]
    assert spread_evenly(range(5), 1) == [0]


def test_map_leaves_exact_zeros_white(tmp_path: Path) -> None:
    from matplotlib.image import imread

    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # the one visible zero is a quarter of the picture's square
    white, grey = (torch.tensor(colour) for colour in ((1.0, 1.0, 1.0), (0xD9 / 255,) * 3))

    def shares(weights: torch.Tensor) -> tuple[float, float]:
        pixels = torch.from_numpy(imread(plot_maps({"m": {(0, 0): weights}}, tmp_path / "map.png"))[..., :3].copy())
        return tuple((pixels - colour).abs().amax(-1).lt(0.01).float().mean().item() for colour in (white, grey))

    zero, dense = shares(p), shares(torch.tensor([[1.0, 0.0], [1e-9, 1.0]]))
    assert zero[0] > dense[0] + 0.05  # a weight of 1e-9 is not zero
    assert zero[1] > 0.05  # what is hidden is grey
    assert zero[1] == pytest.approx(dense[1], abs=0.02)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints on a generated task: ASEntmax, learned alpha; and a native softmax model over bytes."""
    folder = tmp_path_factory.mktemp("models")
    task = build_task("max_retrieval", priorities=8, values=2)
    for name, options in (("asentmax", {"positions": "nape"}), ("learned", {"method": "learned_alpha"})):
        model = sharp_model(**options)
        model.save_pretrained(folder / name)
        save_task(task, folder / name)
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(folder / "native")
    byte_tokenizer().save_pretrained(folder / "native")
    return folder


def analyze(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, options), "--device", "cpu"])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_draws_all_that_the_models_allow(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = ["--model", models / "asentmax", models / "learned"]
    options = ["--lengths", 16, 80, "--samples", 2, "--seed", 3, "--map_length", 12, "--output_dir", tmp_path / "out"]
    analyze(monkeypatch, *sources, *options)
    names = ["scale_asentmax", "learned_alpha_learned_alpha", "heads_asentmax", "heads_learned_alpha"]
    names += [*FORMULA_FIGURES, "model_dispersion", "sparsity", "map"]
    pictures = list((tmp_path / "out").glob("*.png"))
    assert {path.stem for path in pictures} == set(names)
    assert all(min(png_size(path)) > 300 for path in pictures)

    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    task = build_task("max_retrieval", priorities=8, values=2)
    model = load_model(str(models / "asentmax"), device="cpu")
    parts = []
    for index in range(2):
        batch = sample_batch(task, 1, 80, stream="validation", seed=3, index=index)
        parts.append(attention_statistics(model, batch["input_ids"]))
    layers = [join_statistics(pair) for pair in zip(*parts, strict=True)]
    final = torch.zeros(2, 82, dtype=torch.bool)
    final[:, 80] = True  # the query token, whose next token is the answer
    kinds = ["ALiBi", "ALiBi", "NoPE", "NoPE"] * 2
    expected = [
        {"model": "asentmax", "length": 80, "kind": kind} | row
        for kind, row in zip(kinds, head_rows(layers, final), strict=True)
    ]
    assert [row for row in results["heads"] if (row["model"], row["length"]) == ("asentmax", 80)] == expected
    assert [row["final_n"] for row in expected] == [81.0] * 8
    assert len(results["heads"]) == 2 * 2 * 8
    assert [(row["layer"], row["head"]) for row in results["scale"]] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert all(list(row["fits"]) == list(SCALE_LAWS) for row in results["scale"])
    printed = capsys.readouterr().out
    assert summary_table(results["heads"]) in printed
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert table.count("\n| asentmax ") == 4 + 4 + 16  # kinds x lengths; fits; heads x lengths


def test_script_reads_texts_and_native_softmax_models(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("A text of many words. " * 40, encoding="utf-8")
    asked = ["--figures", "sparsity", "map", "--heads", "1:3", "0:0", "--output_dir", tmp_path / "out"]
    analyze(monkeypatch, "--model", models / "native", "--text", tmp_path / "text.txt", "--lengths", 100, *asked)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "results.md",
        "sparsity.png",
        "map.png",
    }
    (row, *_) = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["heads"]
    assert (row["model"], row["kind"], row["support_size"], row["final_n"]) == ("softmax", "RoPE", 50.5, 68.5)
    assert "| softmax | 100 " in capsys.readouterr().out


def test_heads_that_were_cut_are_left_out(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(heads: list[tuple[int, int]]) -> Path:
        model = load_model(str(models / "learned"), device="cpu")
        with torch.no_grad():
            for layer, head in heads:
                attention = model.model.layers[layer].self_attn
                attention.o_proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
        model.save_pretrained(tmp_path / "cut")
        shutil.copy(models / "learned" / "task.json", tmp_path / "cut")
        return tmp_path / "cut"

    options = ["--lengths", 16, "--samples", 1, "--map_length", 12, "--output_dir", tmp_path / "out"]
    figures = ["heads", "learned_alpha", "map", "sparsity", "model_dispersion"]
    analyze(monkeypatch, "--model", models / "learned", *options, "--figures", *figures)
    whole = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["heads"]
    assert "cut and left out" not in capsys.readouterr().out
    analyze(monkeypatch, "--model", cut([(1, 0), (1, 3)]), *options, "--figures", *figures)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["cut"] == {"learned_alpha": [[1, 0], [1, 3]]}
    assert "learned_alpha: 2 heads are cut and left out" in capsys.readouterr().out
    first = [row for row in whole if row["layer"] == 0]
    assert results["heads"][:4] == first  # what a cut head would have written is read in the second layer only
    assert [(row["layer"], row["head"]) for row in results["heads"][4:]] == [(1, 1), (1, 2)]

    with pytest.raises(SystemExit, match="all 8 cut"):
        analyze(monkeypatch, "--model", cut([(i, j) for i in range(2) for j in range(4)]), *options)


def test_script_measures_documents_at_their_ends(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same final tokens at every length, of the documents that hold the longest."""
    documents = [random_tokens(length, seed=length).tolist() for length in (150, 20, 130, 140)]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    words = ["--data", tmp_path / "tokens.jsonl", "--lengths", 30, 120, "--samples", 2, "--figures", "heads"]
    analyze(monkeypatch, "--model", models / "asentmax", *words, "--output_dir", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["heads"]
    model = load_model(str(models / "asentmax"), device="cpu")
    for length in (30, 120):
        parts = [attention_statistics(model, torch.tensor([documents[i][-length:]])) for i in (0, 2)]
        layers = [join_statistics(pair) for pair in zip(*parts, strict=True)]
        final = (torch.arange(length) >= length - 64).expand(2, -1)
        own = [row for row in rows if row["length"] == length]
        for row, expected in zip(own, head_rows(layers, final), strict=True):
            assert {name: row[name] for name in expected} == expected


def test_script_draws_formulas_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    analyze(monkeypatch, "--figures", "alpha", "--output_dir", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"alpha.png", "results.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"figures": ["map"]}, "figures must be of formulas where no model is given, got .'map'.; give --model"),
        ({"model": ["learned"], "figures": ["scale"]}, "figures must be of what a model has, got 'scale'"),
        ({"model": ["asentmax"], "figures": ["learned_alpha"]}, "got 'learned_alpha' of .'asentmax'."),
        ({"model": ["asentmax", "asentmax"]}, "method must name each model differently"),
        ({"model": ["asentmax"], "method": ["a", "b"]}, "method must name each of the 1 models"),
        ({"model": ["asentmax"], "lengths": [8]}, r"lengths must be at least 16, got \[8\]"),
        ({"model": ["asentmax"], "lengths": []}, r"lengths must be at least 16, got \[\]"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"model": ["asentmax"], "heads": ["2:0"]}, r"heads must be layer:head up to 1:3, got \['2:0'\]"),
        (
            {"model": ["native"]},
            "text must be given for .*native, which has no task.json, got None; give --text or --data",
        ),
        ({"model": ["native"], "text": "a", "data": "b"}, "text must be None where --data is given, got 'a'"),
        (
            {"model": ["native"], "data": "docs.jsonl", "lengths": [20]},
            "samples must be at most the 1 documents of 2 that hold 20 tokens, got 4",
        ),
        ({"model": ["native"], "text": "short.txt"}, "text must hold samples x length = 256 tokens, got 6 in"),
    ],
)
def test_bad_arguments_are_named(
    options: dict[str, Any], message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("A text", encoding="utf-8")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "long " * 5}) + "\n" + json.dumps({"text": "short"}))
    options["model"] = [str(models / name) for name in options.get("model", [])]
    options = {"figures": ["sparsity", "map"] if options["model"] else ["alpha"], "map_length": 4} | options
    with pytest.raises(ValueError, match=message):
        list(run_analysis(AnalysisArguments(device="cpu", output_dir=str(tmp_path / "out"), **options)))


def test_script_says_errors_in_one_line_and_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="error: figures must be of formulas"):
        analyze(monkeypatch, "--figures", "heads", "--output_dir", tmp_path)
    with pytest.raises(SystemExit) as done:
        analyze(monkeypatch, "--help")
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "python scripts/analyze.py --model" in text


@pytest.mark.parametrize(
    ("positions", "kinds"),
    [("rope", ["RoPE"] * 4), ("nope", ["NoPE"] * 4), ("nape", ["ALiBi"] * 2 + ["NoPE"] * 2), ("alibi", ["ALiBi"] * 4)],
)
def test_kinds_of_heads_follow_the_positions(positions: str, kinds: list[str]) -> None:
    assert head_kinds(patch_model(tiny_model("llama"), positions=positions).config) == kinds
