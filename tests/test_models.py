"""The model classes of every family: saved and loaded, trained, compiled, in every setting and dtype."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import entmax as oracle
import pytest
import torch
from accelerate.utils import compile_regions
from helpers import CLASSES, TOLERANCE, WINDOWS, auto_classes, random_tokens, tiny_config
from processes import run_python
from test_patching import FOUND, attention_modules, entmax_model, native_model, randomize_scale
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)

import hf_asentmax
import hf_asentmax.attention
from hf_asentmax import ASEntmaxForCausalLM, patch_model, set_alpha, unpatch_model

CLOSE = TOLERANCE[torch.float32]
# The others: the first layer full, the second with a window.
WINDOW_BY_LAYER = {
    **dict.fromkeys(("llama", "granite", "olmo2"), [99, 99]),
    **dict.fromkeys(("mistral", "phi3"), [4, 4]),
    **dict.fromkeys(("gemma2", "gemma3_text"), [4, 99]),
}
SETTINGS = list(
    itertools.product(("rope", "nope", "alibi", "nape"), ("none", "log", "static", "adaptive"), (False, True))
)


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(2, 13)


def padded(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows with padding before the first one's tokens, as a batch with labels."""
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    return {
        "input_ids": tokens.where(mask.bool(), 0),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        # The first token of a row has no other before it that could predict it.
        "labels": tokens.where(mask.bool() & (mask.cumsum(-1) > 1), -100),
    }


def settings_of(config: Any) -> dict[str, Any]:
    """A config's fields without where it came from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


# Saving and loading


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_model_reloads_with_identical_logits(family: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = entmax_model(family, WINDOWS.get(family), alpha=1.3, alpha_learned=True)
    logits, hidden = model(tokens).logits, model.model(tokens).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values())
        assert type(again) is type(model)
        assert settings_of(again.config) == settings_of(model.config)
        assert torch.equal(again(tokens).logits, logits)
        base = AutoModel.from_pretrained(tmp_path / folder)
        assert torch.equal(base(tokens).last_hidden_state, hidden)
    again.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors", f"modeling_asentmax_{family}.py"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_model_with_tied_embeddings_reloads(family: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    model = entmax_model(family, {"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    unpatch_model(again)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize(("family", "auto"), CLASSES)
@torch.no_grad()
def test_model_base_and_classifiers_reload(family: str, auto: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    config = patch_model(native_model(family)).config
    model = randomize_scale(auto.from_config(config)).eval()
    model.save_pretrained(tmp_path)
    again, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(again) is type(model) is getattr(hf_asentmax, type(model).__name__)
    assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("family", FOUND)
@torch.no_grad()
def test_model_copies_compute_the_same(family: str, tokens: torch.Tensor) -> None:
    model = entmax_model(family)
    logits = model(tokens).logits
    loaded = AutoModelForCausalLM.from_config(model.config).eval()
    loaded.load_state_dict(model.state_dict())
    with torch.device("meta"):
        assigned = AutoModelForCausalLM.from_config(model.config).eval()
    # Only buffers that no state dict holds, such as rotary frequencies, are left to be made anew.
    for name, buffer in model.named_buffers():
        module, _, own = name.rpartition(".")
        assigned.get_submodule(module).register_buffer(own, buffer.clone(), persistent=False)
    assigned.load_state_dict(model.state_dict(), assign=True)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, assigned, model.share_memory()):
        assert type(again) is type(model)
        assert torch.equal(again(tokens).logits, logits)
    assert torch.equal(model.double().float()(tokens).logits, logits)


def test_model_unpickles_in_a_fresh_process(tmp_path: Path, tokens: torch.Tensor) -> None:
    models = {family: entmax_model(family) for family in FOUND}
    with torch.no_grad():
        for family, model in models.items():
            output = copy.deepcopy(model)(tokens, output_attentions=True)  # which adds hooks that nothing can pickle
            torch.save((model, tokens, output.logits, output.attentions), tmp_path / f"{family}.pt")
    code = """
import pathlib, sys, torch
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.pt")):
    model, tokens, logits, attentions = torch.load(file, weights_only=False)
    with torch.no_grad():
        output = model(tokens, output_attentions=True)
    assert torch.equal(output.logits, logits), file
    assert len(output.attentions) == len(attentions) == 2, file
    assert all(map(torch.equal, output.attentions, attentions)), file
    print(file.stem)
"""
    done = run_python("-c", code, tmp_path)
    assert done.stdout.split() == FOUND, done.stderr


@torch.no_grad()
def test_model_loads_in_another_dtype(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = entmax_model()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(again(tokens).logits.float(), model(tokens).logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("settings", [{}, {"query_scaling": "log"}, {"query_scaling": "static"}], ids=str)
@torch.no_grad()
def test_model_starts_neutral_from_a_checkpoint_without_the_scale(
    settings: dict[str, Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    """The missing parameters get their start values when a softmax checkpoint is loaded."""
    native_model("llama").save_pretrained(tmp_path)
    model = patch_model(native_model("llama"), alpha=1.4, alpha_learned=True, **settings)
    config = AutoConfig.from_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert report["missing_keys"] == {name for name, _ in model.named_parameters() if ".query_scale." in name}
    assert config.model_type == "llama"
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_model_from_config_has_the_initial_weights_of_its_softmax_twin() -> None:
    for family in FOUND:
        native = native_model(family, seed=5)
        config = patch_model(copy.deepcopy(native)).config
        torch.manual_seed(5)
        twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = twin.state_dict()
        assert all(torch.equal(state[name], weight) for name, weight in native.state_dict().items()), family
        extra = {name: x for name, x in state.items() if ".query_scale." in name}
        assert extra
        assert not any(x.any() for x in extra.values()), family


@pytest.mark.parametrize("query_scaling", ["log", "static", "adaptive"])
@torch.no_grad()
def test_model_initialisation_of_one_module_needs_no_other(query_scaling: str) -> None:
    """As under DeepSpeed's ZeRO-3: constructors see empty weights, then each module is initialised on its own."""
    model = entmax_model(query_scaling=query_scaling, alpha_learned=True)
    neutral = patch_model(native_model("llama"), query_scaling=query_scaling, alpha_learned=True)
    with torch.device("meta"):
        bare = type(model)(model.config)
    bare.to_empty(device="cpu")
    for module in reversed(list(bare.modules())):
        own = dict(module.named_parameters(recurse=False))
        for parameter in own.values():
            parameter.fill_(torch.nan)
        if own:
            bare._init_weights(module)
    scales = {name: x for name, x in neutral.named_parameters() if ".query_scale." in name}
    found = dict(bare.named_parameters())
    assert len(scales) == 2 * {"log": 2, "static": 3, "adaptive": 5}[query_scaling]
    for name, expected in scales.items():
        assert torch.equal(found[name], expected), name


def test_model_config_round_trip(tmp_path: Path) -> None:
    for family in FOUND:
        config = patch_model(
            native_model(family), alpha=1, query_scaling="log", positions="nape", query_scale_length=77
        ).config
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert type(again) is type(config)
        assert settings_of(again) == settings_of(config) == settings_of(type(config)(**config.to_dict()))
        saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert saved["attn_implementation"] == "asentmax"
        classes = [name.split(".")[1] for name in saved["auto_map"].values()]
        assert set(classes) == {name for name in hf_asentmax.__all__ if name.startswith(type(config).__name__[:-6])}


# What attention computes


def query_scale(module: Any, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """r (H, T) of the module's input (T, hidden), written out."""
    scale, config = module.query_scale, module.config
    if config.query_scaling == "none":
        return torch.ones(config.num_attention_heads, len(n))
    if config.query_scaling == "log":
        return scale.log_scale[:, None] * (1 + n).log()
    if config.query_scaling == "static":
        beta, gamma = scale.beta[:, None], scale.gamma[:, None]
    else:
        beta = (x @ scale.beta.weight.T + scale.beta.bias).T
        gamma = (x @ scale.gamma.weight.T + scale.gamma.bias).T
    exponent = config.query_scale_gamma_center + config.query_scale_gamma_range * gamma.tanh()
    return config.query_scale_delta + nn.functional.softplus(beta) * (1 + n).log() ** exponent


def recompute(module: Any, arguments: dict[str, Any], window: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and output of one attention layer of row 0, from its own projections and the `entmax` package."""
    x = arguments["hidden_states"][:1]
    length, config = x.shape[1], module.config
    shape = (1, length, -1, module.head_dim)
    if hasattr(module, "qkv_proj"):
        heads, kv_heads = config.num_attention_heads * module.head_dim, config.num_key_value_heads * module.head_dim
        q, k, v = module.qkv_proj(x).split([heads, kv_heads, kv_heads], dim=-1)
    else:
        q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    if hasattr(module, "q_norm"):  # of a head, or of all of them
        per_head = len(module.q_norm.weight) == module.head_dim
        q, k = (t.view(shape) if per_head else t for t in (q, k))
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
    if config.positions == "rope" and getattr(module, "use_rope", True):
        rotate = inspect.getmodule(type(module).__bases__[-1]).apply_rotary_pos_emb  # type: ignore[union-attr]
        q, k = rotate(q, k, *(table[:1] for table in arguments["position_embeddings"]))
    k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
    i = torch.arange(length)
    seen = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < window) & (i[None, :] >= padding)
    n = seen.sum(-1).clamp(min=1).float()
    r = query_scale(module, x[0], n)
    if config.positions == "nape":  # ALiBi on the first half of the heads, which keep r = 1
        slopes = torch.tensor([1.0, 1 / 2, 0.0, 0.0])
        r = torch.where(slopes[:, None] > 0, 1.0, r)
    else:
        slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]) * (config.positions == "alibi")
    scaling = getattr(config, "query_pre_attn_scalar", module.head_dim) ** -0.5
    scores = (q @ k.transpose(-1, -2)) * getattr(config, "attention_multiplier", scaling) * r[None, :, :, None]
    scores = scores - slopes[:, None, None] * (i[:, None] - i[None, :])
    weights = torch.zeros_like(scores)
    visible = seen.any(-1)
    masked = scores.masked_fill(~seen, -torch.inf)[:, :, visible]
    weights[:, :, visible] = oracle.entmax_bisect(masked, alpha=config.entmax_alpha, dim=-1, n_iter=80)
    return weights, module.o_proj((weights @ v).transpose(1, 2).reshape(1, length, -1))


def check_formula(model: Any, tokens: torch.Tensor, padding: int, windows: list[int]) -> None:
    """Weights and outputs of every layer against `recompute`, and nothing outside causality, windows and padding."""
    batch = padded(tokens)
    if not padding:
        batch["attention_mask"] = torch.ones_like(tokens)
        batch.pop("position_ids")
    seen: list[tuple[Any, dict[str, Any], torch.Tensor]] = []
    for module in attention_modules(model):
        module.register_forward_hook(lambda m, _, kwargs, out: seen.append((m, kwargs, out[0])), with_kwargs=True)
    attentions = model(**batch, output_attentions=True).attentions
    assert len(seen) == len(attentions) == 2
    distance = torch.arange(13)[:, None] - torch.arange(13)
    for (module, kwargs, output), found, window in zip(seen, attentions, windows, strict=True):
        weights, expected = recompute(module, kwargs, window, padding)
        torch.testing.assert_close(found[:1], weights, **CLOSE)
        torch.testing.assert_close(output[:1], expected, **CLOSE)
        assert (found[..., distance >= window] == 0).all()
        assert (found[..., distance < 0] == 0).all()
        assert (found[..., distance >= 0] == 0).any()
        sums = found.sum(-1)
        assert (sums[0, :, :padding] == 0).all()
        torch.testing.assert_close(sums[0, :, padding:], torch.ones(4, 13 - padding), **CLOSE)


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("padding", [0, 5], ids=["full", "left-padded"])
@torch.no_grad()
def test_model_attention_is_the_formula(family: str, padding: int, tokens: torch.Tensor) -> None:
    model = entmax_model(family, WINDOWS.get(family), alpha=1.6)
    check_formula(model, tokens, padding, WINDOW_BY_LAYER.get(family, [99, 4]))


@pytest.mark.parametrize("positions", ["rope", "nope", "alibi", "nape"])
@pytest.mark.parametrize("query_scaling", ["none", "log", "static", "adaptive"])
@pytest.mark.parametrize("kv_heads", [1, 4], ids=["one-kv-head", "kv-heads"])
@torch.no_grad()
def test_model_settings_are_the_formula(
    positions: str, query_scaling: str, kv_heads: int, tokens: torch.Tensor
) -> None:
    settings = {
        "positions": positions,
        "query_scaling": query_scaling,
        "query_scale_gamma_range": 1.5,
        "query_scale_gamma_center": 0.5,
    }
    model = entmax_model("mistral", {"sliding_window": 6, "num_key_value_heads": kv_heads}, alpha=1.3, **settings)
    check_formula(model, tokens, 5, [6, 6])


@torch.no_grad()
def test_model_attention_weights_are_exact_zeros_in_the_dtype_of_the_model(tokens: torch.Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights = entmax_model(alpha=2.0).to(dtype)(tokens, output_attentions=True).attentions[0]
        assert weights.dtype == dtype
        causal = torch.ones(13, 13, dtype=torch.bool).tril()
        assert (weights[..., causal] == 0).any()
        assert (weights >= 0).all()


@torch.no_grad()
def test_model_attention_weights_have_a_size_limit(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = entmax_model()
    monkeypatch.setattr(hf_asentmax.attention, "MAX_DENSE_WEIGHTS", 2 * 4 * 13 * 13 - 1)
    with pytest.raises(ValueError, match=r"output_attentions must .* at most 1351 .* got 1352; use shorter"):
        model(tokens, output_attentions=True)
    assert model(tokens[:, :12], output_attentions=True).attentions[1].shape == (2, 4, 12, 12)
    assert model(tokens).attentions is None


@torch.no_grad()
def test_model_takes_embeddings_in_place_of_tokens(tokens: torch.Tensor) -> None:
    for family in FOUND:
        model = entmax_model(family)
        embeddings = model.get_input_embeddings()(tokens)
        assert torch.equal(model(inputs_embeds=embeddings).logits, model(tokens).logits)


# Training


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize(("positions", "query_scaling", "alpha_learned"), SETTINGS)
def test_model_trains_in_every_setting(
    family: str, positions: str, query_scaling: str, alpha_learned: bool, tokens: torch.Tensor
) -> None:
    """A step from the start reaches every parameter; random scales under padding give finite gradients."""
    settings = {"positions": positions, "query_scaling": query_scaling, "alpha_learned": alpha_learned}
    model = patch_model(native_model(family), **settings).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)  # at 1e-2 OLMo 2 overshoots, its softmax original too
    first = model(tokens, labels=tokens).loss
    first.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    zero = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not zero, zero
    optimizer.step()
    optimizer.zero_grad()
    assert model(tokens, labels=tokens).loss < first
    randomize_scale(model)(**padded(tokens)).loss.backward()
    bad = [name for name, parameter in model.named_parameters() if not parameter.grad.isfinite().all()]
    assert not bad


@pytest.mark.parametrize("family", FOUND)
def test_model_padding_changes_no_gradient(family: str, tokens: torch.Tensor) -> None:
    model = entmax_model(family, alpha_learned=True)
    batch = padded(tokens[:1])
    model(**batch).loss.backward()
    with_padding = gradients(model)
    model(tokens[:1, 5:], labels=tokens[:1, 5:]).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(with_padding[name], grad, **CLOSE, msg=name)


def test_model_gradients_survive_wild_scales_under_padding(tokens: torch.Tensor) -> None:
    model = patch_model(native_model("llama"), alpha_learned=True)
    for name, parameter in model.named_parameters():
        if ".query_scale." in name:
            nn.init.normal_(parameter, std=30.0)
    for name, bias in model.named_parameters():
        if name.endswith("gamma.bias"):
            bias.data.copy_(torch.tensor([-90.0, 90.0, -90.0, 90.0]))
    batch = padded(tokens)
    batch["attention_mask"][1] = 0  # a row of padding only
    batch["attention_mask"][0, :12] = 0  # and one of a single token
    output = model(**batch)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("logit", [-60.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_learned_alpha_stays_within_its_range(logit: float, dtype: torch.dtype, tokens: torch.Tensor) -> None:
    model = entmax_model(alpha_learned=True).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("alpha_logit"):
            nn.init.constant_(parameter, logit)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    fixed = {name: x for name, x in model.state_dict().items() if not name.endswith("alpha_logit")}
    same = entmax_model(alpha=2.0 if logit > 0 else 1.01).to(dtype)
    same.load_state_dict(fixed)
    close = {torch.float32: CLOSE, torch.bfloat16: {"rtol": 0.05, "atol": 0.01}}[dtype]
    torch.testing.assert_close(same(tokens).logits, output.logits, **close)


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_model_gradient_checkpointing_changes_no_gradient(
    family: str, use_reentrant: bool, tokens: torch.Tensor
) -> None:
    model = entmax_model(family, WINDOWS.get(family), alpha_learned=True).train()
    model(**padded(tokens), use_cache=False).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(**padded(tokens), use_cache=False).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_runs_in_16_bits(family: str, dtype: torch.dtype, tokens: torch.Tensor) -> None:
    model = entmax_model(family, alpha_learned=True).to(dtype)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention_modules(model)[0].query_scale.register_forward_hook(lambda m, args, out: seen.append(out))
    output = model(**padded(tokens))
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert output.logits.isfinite().all()
    assert {x.dtype for x in seen[0]} == {torch.float32}
    assert all(grad.isfinite().all() for grad in gradients(model).values())
    again = model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)
    assert again.shape[0] == 2


@pytest.mark.parametrize("family", FOUND)
def test_model_trains_under_autocast(family: str, tokens: torch.Tensor) -> None:
    model = entmax_model(family, alpha_learned=True)
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("family", FOUND)
def test_model_generates_under_autocast_with_attention_in_16_bits(
    family: str, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a cache too, which takes its dtype from the float32 keys: in float32 a GPU's kernels are slower by far."""
    model, seen = entmax_model(family).eval(), []
    attend = hf_asentmax.attention.attention_from_intervals

    def watched(*tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        seen.append((tensors[0].shape[2], *(x.dtype for x in tensors[:3])))
        return attend(*tensors, **settings)

    monkeypatch.setattr(hf_asentmax.attention, "attention_from_intervals", watched)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert set(seen) == {(length, *[torch.bfloat16] * 3) for length in (tokens.shape[1], 1)}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model.double()(tokens)
    assert set(seen) == {(tokens.shape[1], *[torch.float64] * 3)}


@torch.no_grad()
def test_model_without_rotary_caches_16_bits_under_autocast(tokens: torch.Tensor) -> None:
    model = entmax_model("llama", positions="nape").eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens)
    assert {x.dtype for layer in output.past_key_values.layers for x in (layer.keys, layer.values)} == {torch.bfloat16}


# Compiling


def test_model_compiles_whole_under_autocast(tokens: torch.Tensor) -> None:
    model, counter = entmax_model("llama"), CompileCounter()
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens, use_cache=False).logits
        logits = torch.compile(model, fullgraph=True, backend=counter)(tokens, use_cache=False).logits
    assert counter.frame_count == 1
    torch.testing.assert_close(logits, expected)


# Attention's differences between families are among the others.
SLOW = ("granite", "olmo2", "phi3", "qwen2", "smollm3")


@pytest.mark.parametrize("family", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in FOUND])
def test_model_compiles_whole(family: str, tokens: torch.Tensor) -> None:
    """One graph, the same loss and gradients; through aot_eager, which also traces the backward of the operators."""
    model = entmax_model(family, {**WINDOWS.get(family, {}), "max_window_layers": 0, "num_hidden_layers": 1})
    batch = padded(tokens)
    expected = model(**batch, use_cache=False)
    expected.loss.backward()
    plain = gradients(model)
    torch.compiler.reset()
    output = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(**batch, use_cache=False)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, plain[name], **CLOSE, msg=name)


@pytest.mark.slow
def test_model_compiled_by_the_default_backend_trains_as_in_eager_mode(tokens: torch.Tensor) -> None:
    """All layers in one graph, forward and backward, through three steps of an optimizer."""
    losses = []
    for compiles in (False, True):
        model = entmax_model(alpha_learned=True, positions="nape").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.compiler.reset()
        step = torch.compile(model, fullgraph=True) if compiles else model
        for _ in range(3):
            loss = step(**padded(tokens), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[3:], losses[:3], **CLOSE)
    assert losses[2] < losses[0]


def test_model_compiles_once_for_a_schedule_of_alpha(tokens: torch.Tensor) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    model = entmax_model(config={"num_hidden_layers": 1})
    set_alpha(model, 1.0, as_tensor=True)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for step in range(12):
        alpha = 1.0 + step / 20
        set_alpha(model, alpha, as_tensor=True)
        logits = compiled(tokens, use_cache=False).logits
        assert model.config.entmax_alpha == alpha
    assert counter.frame_count == 1
    set_alpha(model, alpha)
    torch.testing.assert_close(model(tokens).logits, logits, **CLOSE)


def test_layers_compiled_by_themselves_share_a_graph(tokens: torch.Tensor) -> None:
    """Accelerate's regional compilation; ten layers are more than the graphs that a function may have."""
    frames = []
    for layers in (1, 10):
        model, counter = entmax_model(config={"num_hidden_layers": layers}).train(), CompileCounter()
        expected = model(tokens, use_cache=False).logits
        torch.compiler.reset()
        compiled = compile_regions(model, fullgraph=True, backend=counter)
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, **CLOSE)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


@pytest.mark.parametrize("name", ["rope", "nape", "window"])
@torch.no_grad()
def test_model_exports_for_every_batch_and_length(name: str) -> None:
    """One exported program, padded on either side or not, against the model in eager mode."""
    settings: dict[str, Any] = {"positions": "nape", "alpha_learned": True} if name == "nape" else {}
    family = "mistral" if name == "window" else "llama"
    model = entmax_model(family, {"num_hidden_layers": 1}, **settings)
    shape = {0: Dim("batch"), 1: Dim("length", min=2, max=512)}
    tokens = random_tokens(2, 9)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    shapes = {"input_ids": shape, "attention_mask": shape, "use_cache": None}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for batch, length in ((1, 2), (3, 21), (2, 64)):
        tokens = random_tokens(batch, length, seed=length)
        mask = torch.ones_like(tokens)
        mask[0, : length // 2] = 0
        mask[-1, -(length // 4) or length :] = 0
        for attention_mask in (mask, torch.ones_like(mask)):
            inputs = {"input_ids": tokens, "attention_mask": attention_mask, "use_cache": False}
            torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, **CLOSE)


# Declarations


@pytest.mark.parametrize("family", FOUND)
def test_model_declares_no_other_attention(family: str) -> None:
    """An engine that reads these would put its own softmax in."""
    model = patch_model(native_model(family))
    for part in (model, model.model, *(auto.from_config(model.config) for auto in auto_classes(family))):
        assert part.config._attn_implementation == "asentmax"
        for flag in ("sdpa", "flash_attn", "flex_attn", "attention_backend"):
            assert getattr(part, f"_supports_{flag}") is False, flag
    assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)


def test_model_short_names_are_the_llama_classes() -> None:
    model = patch_model(native_model("llama"))
    assert type(model) is ASEntmaxForCausalLM is hf_asentmax.ASEntmaxLlamaForCausalLM
    assert hf_asentmax.ASEntmaxConfig is type(model.config)
    assert hf_asentmax.ASEntmaxModel is type(model.model)
    fresh = ASEntmaxForCausalLM(hf_asentmax.ASEntmaxConfig(**_sizes()))
    assert fresh.config.query_scale_delta == 1.0
    assert fresh(random_tokens(1, 4)).logits.isfinite().all()


def _sizes() -> dict[str, Any]:
    return {name: value for name, value in tiny_config("llama").to_dict().items() if name != "model_type"}
