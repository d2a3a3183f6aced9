"""Training data tokenised once: the BPE that is learned, the dataset that is written, and training on it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from training_setup import tiny_texts, tiny_tokenizer, write_texts
from transformers import AutoTokenizer

from hf_asentmax.data import DataArguments, load_documents, load_packed
from hf_asentmax.packing import PackedDataset, PackedStream, token_lists
from hf_asentmax.tokenization import source_texts, tokenize_sources, train_tokenizer

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TEXTS = ["the cat sat on the mat 2026\n", "def f(x):\n        return x + 10\n", "äöü € 漢字 \U0001f600 and\x00bytes"]


def tokens_of(documents: Any) -> list[list[int]]:
    return [list(map(int, ids)) for ids in documents["input_ids"]]


def write_tokens(folder: Path, rows: list[list[int]]) -> str:
    """The rows as a .parquet file with the column input_ids."""
    path = str(folder / "tokens.parquet")
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{script}.py"), *arguments])
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_bpe_gives_back_every_text_and_keeps_digits_apart() -> None:
    tokenizer = train_tokenizer(TEXTS * 3, 290)
    assert len(tokenizer) == 290
    unseen = ["İ\u2028 never met", "\ttabs\r\n", " leading and trailing  "]
    for text in TEXTS + unseen:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("2026") == ["2", "0", "2", "6"]
    assert len(tokenizer("the cat")["input_ids"]) < len("the cat")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.bos_token_id is None


def test_bpe_refuses_vocabularies_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 258.*got 257"):
        train_tokenizer(TEXTS, 257)
    with pytest.raises(ValueError, match=r"at most the \d+ tokens that the texts give, got 5000"):
        train_tokenizer(TEXTS, 5000)


def test_tokenised_sources_hold_all_documents_in_an_order_of_the_seed(tmp_path: Path) -> None:
    a, b = (str(write_texts(tmp_path / f"{name}.jsonl", tiny_texts(12, seed=i))) for i, name in enumerate("ab"))
    tokenizer = tiny_tokenizer()
    expected = [[*tokenizer(text)["input_ids"], 1] for text in tiny_texts(12, seed=0) + tiny_texts(12, seed=1)]
    tokens = tokenize_sources([a, b], tokenizer, seed=3)
    assert tokens.features["input_ids"].feature.dtype == "uint16"
    assert sorted(tokens_of(tokens)) == sorted(expected)
    assert tokens_of(tokens) != expected
    assert tokens_of(tokens) == tokens_of(tokenize_sources([a, b], tokenizer, seed=3))
    assert tokens_of(tokens) != tokens_of(tokenize_sources([a, b], tokenizer, seed=4))
    first = {tuple(ids) for ids in expected[:12]}
    numbers = [tuple(ids) in first for ids in tokens_of(tokens)]
    assert numbers not in (sorted(numbers), sorted(numbers)[::-1])  # the sources are mixed


def test_tokenised_sources_stop_at_their_limits(tmp_path: Path) -> None:
    a, b = (str(write_texts(tmp_path / f"{letter}.jsonl", [letter * 9] * 20)) for letter in "ab")
    tokenizer = tiny_tokenizer()
    rows = tokens_of(tokenize_sources([a, b], tokenizer, max_tokens=[30, 41]))
    of_a = tokenizer.convert_tokens_to_ids("a")
    assert sum(row[0] == of_a for row in rows) == 3  # of ten tokens each
    assert len(rows) == 3 + 5  # the document that reaches the limit is the last
    for limits in ([30], [30, 0]):
        with pytest.raises(ValueError, match="one number of at least 1 for each of the 2 sources"):
            tokenize_sources([a, b], tokenizer, max_tokens=limits)


def test_large_vocabularies_are_not_cut_to_16_bits(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)])
    source = str(write_texts(tmp_path / "a.jsonl", [f"a<{(1 << 16) - 1}>"]))
    tokens = tokenize_sources([source], tokenizer)
    assert tokens.features["input_ids"].feature.dtype == "int32"
    assert tokens_of(tokens)[0][1] == len(tokenizer) - 1


def test_tokens_are_not_texts_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have the column 'text' to learn from.*tokens"):
        list(source_texts([write_tokens(tmp_path, [[5, 6, 1]])]))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl"])
def test_tokens_are_packed_as_their_texts_are(kind: str, streaming: bool, tmp_path: Path) -> None:
    texts = str(write_texts(tmp_path / "a.jsonl", tiny_texts(12)))
    tokenizer = tiny_tokenizer()
    rows = [list(ids) for ids in token_lists(load_documents(texts), tokenizer, "text")]
    if kind == "parquet":
        source = write_tokens(tmp_path, rows)
    elif kind == "saved":
        source = str(tmp_path / "saved")
        column = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("uint16"))})
        datasets.Dataset.from_dict({"input_ids": rows}, features=column).save_to_disk(source)
    else:
        source = str(tmp_path / "tokens.jsonl")
        Path(source).write_text("".join(json.dumps({"input_ids": row, "n": 1}) + "\n" for row in rows), "utf-8")
    options: dict[str, Any] = {"sequence_length": 16, "streaming": streaming, "shuffle_buffer": 0}
    packed, _ = load_packed(DataArguments(data=source, **options), tokenizer, seed=0)
    expected = PackedDataset(rows, 16)
    assert isinstance(packed, PackedStream if streaming else PackedDataset)
    if isinstance(packed, PackedDataset):
        assert len(packed) == len(expected)
    for row, i in zip(packed, range(len(expected)), strict=False):
        assert all(torch.equal(row[name], value) for name, value in expected[i].items())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("token", [31, -1])
def test_tokens_outside_of_the_vocabulary_are_refused(token: int, streaming: bool, tmp_path: Path) -> None:
    assert len(tiny_tokenizer()) == 31
    data = DataArguments(data=write_tokens(tmp_path, [[5, 30, 1], [7, token, 1]]), sequence_length=4)
    data.streaming = streaming
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, 31\).*got {token}; give the tokenizer that"):
        next(iter(load_packed(data, tiny_tokenizer(), seed=0)[0]))


def test_documents_need_exactly_one_of_texts_and_tokens(tmp_path: Path) -> None:
    path = str(tmp_path / "both.parquet")
    datasets.Dataset.from_dict({"text": ["ab"], "input_ids": [[4, 5, 1]]}).to_parquet(path)
    with pytest.raises(ValueError, match="either 'text' with text or 'input_ids' with tokens, got both; set"):
        load_documents(path)
    rows = token_lists(load_documents(path, column="input_ids"), tiny_tokenizer(), "input_ids")
    assert [list(ids) for ids in rows] == [[4, 5, 1]]
    datasets.Dataset.from_dict({"body": ["ab"]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"must be one of \['body'\], got 'text'; set --text_column"):
        load_documents(path)


def test_script_writes_what_pretraining_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prose = ["the quick brown fox jumps over the lazy dog. " * n for n in range(1, 9)]
    code = [f"def f{n}(x):\n    return x + {n}\n" * n for n in range(1, 9)]
    sources = [str(write_texts(tmp_path / "prose.jsonl", prose)), str(write_texts(tmp_path / "code.jsonl", code))]
    folder = tmp_path / "tokens"
    options = ["--data", *sources, "--output_dir", str(folder)]
    run(monkeypatch, "tokenize_data", *options, "--vocab_size", "300")
    assert "16 documents" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    documents = load_documents(str(folder))
    assert all(ids[-1] == tokenizer.eos_token_id for ids in documents["input_ids"])
    texts = [tokenizer.decode(ids[:-1]) for ids in documents["input_ids"]]
    assert sorted(texts) == sorted(prose + code)

    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    inputs = ["--config", str(tmp_path / "config.json"), "--data", str(folder), "--tokenizer", str(folder)]
    steps = ["--sequence_length=16", "--max_steps=2", "--logging_steps=1", "--use_cpu=true", "--disable_tqdm=true"]
    run(monkeypatch, "pretrain", *inputs, *steps, "--output_dir", str(tmp_path / "run"))
    log = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))["log"]
    names = {"loss", "grad_norm", "tokens_per_second", "support_size", "zero_share", "entmax_alpha"}
    assert all(names <= set(line) for line in log[:2])
    assert np.isfinite([line["tokens_per_second"] for line in log[:2]]).all()

    with pytest.raises(ValueError, match="output_dir must be a new or an empty folder"):
        run(monkeypatch, "tokenize_data", *options, "--vocab_size", "300")
    for choice in ([], ["--vocab_size", "300", "--tokenizer", str(folder)]):
        with pytest.raises(ValueError, match="either tokenizer or vocab_size must be given"):
            run(monkeypatch, "tokenize_data", "--data", *sources, "--output_dir", str(tmp_path / "new"), *choice)
    again = ["--tokenizer", str(folder), "--max_tokens", "40", "20", "--output_dir", str(tmp_path / "again")]
    run(monkeypatch, "tokenize_data", "--data", *sources, *again)
    assert 60 <= sum(map(len, load_documents(str(tmp_path / "again"))["input_ids"])) < 700
