"""Sources of documents, and the rows that they are packed into."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path

import datasets
import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from training_setup import tiny_texts, tiny_tokenizer, write_texts
from transformers import default_data_collator

from hf_asentmax import patch_model
from hf_asentmax.data import DataArguments, load_documents, load_packed, long_documents
from hf_asentmax.packing import CompletionDataset, PackedDataset, PackedStream, token_lists

TEXTS = tiny_texts(12)


def write_gzip(folder: Path) -> str:
    plain = write_texts(folder / "plain.tmp", TEXTS)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return str(folder / "a.jsonl.gz")


def write_glob(folder: Path) -> str:
    write_texts(folder / "a-1.jsonl", TEXTS[:5])
    write_texts(folder / "a-2.jsonl", TEXTS[5:])
    return str(folder / "a-*.jsonl")


def write_text_folder(folder: Path) -> str:
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def write_saved(folder: Path, *, splits: bool = False) -> str:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    (datasets.DatasetDict(train=rows) if splits else rows).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def write_table(folder: Path, kind: str) -> str:
    path = str(folder / f"a.{kind}")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    {"parquet": rows.to_parquet, "csv": rows.to_csv}[kind](path)
    return path


SOURCES: dict[str, Callable[[Path], str]] = {
    "jsonl": lambda folder: str(write_texts(folder / "a.jsonl", TEXTS)),
    "jsonl.gz": write_gzip,
    "parquet": lambda folder: write_table(folder, "parquet"),
    "csv": lambda folder: write_table(folder, "csv"),
    "glob": write_glob,
    "folder": lambda folder: str(write_texts(folder / "a.jsonl", TEXTS).parent),
    "folder of texts": write_text_folder,
    "saved dataset": write_saved,
    "saved splits": lambda folder: write_saved(folder, splits=True),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", SOURCES)
def test_data_source_gives_its_documents(kind: str, streaming: bool, tmp_path: Path) -> None:
    documents = load_documents(SOURCES[kind](tmp_path), streaming=streaming)
    assert isinstance(documents, datasets.IterableDataset) == streaming
    assert [row["text"] for row in documents] == TEXTS


def test_data_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree", encoding="utf-8")
    assert [row["text"] for row in load_documents(str(tmp_path / "a.txt"))] == ["one\ntwo\n\nthree"]


@pytest.mark.parametrize("source", ["missing.jsonl", "missing/", "./missing", "missing-*.jsonl", "owner/missing"])
def test_data_missing_source_names_path_and_remedy(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be an existing file.*got '.*missing.*check the path"):
        load_documents(source)


def test_data_wrong_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"end in one of .*\.parquet.*got '\.xyz'"):
        load_documents(str(tmp_path / "a.xyz"))
    write_texts(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match="one kind"):
        load_documents(str(tmp_path / "a.*"))
    with pytest.raises(ValueError, match=r"must be one of \['text'\], got 'body'; set --text_column"):
        load_documents(str(tmp_path / "a.jsonl"), column="body")
    with pytest.raises(ValueError, match="'validation'; set --data_split"):
        load_documents(write_saved(tmp_path, splits=True), split="validation")
    (tmp_path / "empty.csv").write_text("text\n", encoding="utf-8")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"must hold documents, got .*empty\.csv"):
            load_documents(str(tmp_path / "empty.csv"), streaming=streaming)


def test_data_held_out_path_is_checked_before_anything_is_tokenised(tmp_path: Path) -> None:
    class NeverCalled:
        eos_token_id = 1

    data = DataArguments(data=str(write_texts(tmp_path / "a.jsonl", TEXTS)), eval_data=str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_packed(data, NeverCalled(), seed=0)  # type: ignore[arg-type]


def test_data_long_documents_are_as_they_are_whatever_follows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    source = str(write_texts(tmp_path / "a.jsonl", TEXTS))
    expected = [ids for ids in tokenizer(TEXTS)["input_ids"] if len(ids) >= 4]
    assert long_documents(source, [str(tmp_path)], 4) == (len(TEXTS), expected)
    assert not any(tokenizer.eos_token_id in ids for ids in expected)


def test_data_documents_end_with_one_end_token() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{"text": "ab"}, {"text": ""}, {"text": None}, {"text": "b</s>"}]
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert list(token_lists(rows, tokenizer, "text")) == [[a, b, 1], [b, 1]]
    assert list(token_lists(rows, tokenizer, "text", closed=False)) == [[a, b], [b, 1]]
    rows = [{"input_ids": [4, 5]}, {"input_ids": []}]
    assert [list(ids) for ids in token_lists(rows, tokenizer, "text")] == [[4, 5]]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence token"):
        list(token_lists(rows, tokenizer, "text"))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    length=st.integers(2, 17),
    max_rows=st.none() | st.integers(1, 4),
)
def test_packing_keeps_tokens_and_boundaries(lengths: list[int], length: int, max_rows: int | None) -> None:
    documents = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    tokens = [token for document in documents for token in document]
    count = len(tokens) // length if max_rows is None else min(len(tokens) // length, max_rows)
    if count == 0:
        with pytest.raises(ValueError, match="at least one row"):
            PackedDataset(documents, length, max_rows=max_rows)
        return
    packed = PackedDataset(documents, length, max_rows=max_rows)
    assert len(packed) == count
    rows = [packed[i] for i in range(count)]
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == tokens[: count * length]
    for row in rows:
        assert set(row) == {"input_ids", "labels", "position_ids"}
        positions = row["position_ids"].tolist()
        for i, (token, position) in enumerate(zip(row["input_ids"].tolist(), positions, strict=True)):
            begins = i == 0 or token % 100 == 0
            assert position == (0 if begins else positions[i - 1] + 1)
            assert row["labels"][i] == (-100 if begins else token)
    with pytest.raises(IndexError):
        packed[count]


def test_packing_refuses_rows_without_a_prediction() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        PackedDataset([[1, 2]], 1)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        PackedStream([], tiny_tokenizer(), 1)


@pytest.mark.parametrize("attention", ["softmax", "asentmax"])
def test_packed_batch_equals_separate_documents(attention: str) -> None:
    model = tiny_model("llama")
    if attention == "asentmax":
        patch_model(model, query_scaling="static")
        for name, parameter in model.named_parameters():
            if ".query_scale." in name:
                torch.nn.init.normal_(parameter)
    documents = [[5 + (7 * i + j) % 50 for j in range(n)] for i, n in enumerate([5, 1, 9, 20, 3])]
    packed = PackedDataset(documents, 16)
    batch = default_data_collator([packed[0], packed[1]])
    pieces = [documents[0], documents[1], documents[2], documents[3][:1], documents[3][1:17]]
    output = model(**batch, use_cache=False)
    expected = torch.cat([model(torch.tensor([piece])).logits[0] for piece in pieces])
    torch.testing.assert_close(output.logits.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    ends = [torch.tensor([piece]) for piece in pieces if len(piece) > 1]
    losses = torch.stack([model(piece, labels=piece).loss * (piece.shape[1] - 1) for piece in ends])
    predictions = sum(piece.shape[1] - 1 for piece in ends)
    torch.testing.assert_close(output.loss, losses.sum() / predictions, rtol=1e-4, atol=1e-5)


def stream(source: str, **options: int) -> PackedStream:
    return PackedStream(load_documents(source, streaming=True), tiny_tokenizer(), 16, **options)


def take(rows: PackedStream, count: int) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in islice(rows, count)]


def test_stream_without_shuffling_gives_the_rows_of_the_dataset_and_then_begins_again(tmp_path: Path) -> None:
    source = str(write_texts(tmp_path / "a.jsonl", TEXTS))
    tokens = [token for ids in token_lists(load_documents(source), tiny_tokenizer(), "text") for token in ids]
    twice = PackedDataset([tokens, tokens], 16)
    assert take(stream(source, buffer=0), len(twice)) == [twice[i]["input_ids"].tolist() for i in range(len(twice))]


def test_stream_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    source = str(write_texts(tmp_path / "a.jsonl", TEXTS))
    count = 3 * sum(len(text) + 1 for text in TEXTS) // 16
    rows = take(stream(source, seed=1, buffer=5), count)
    assert rows == take(stream(source, seed=1, buffer=5), count)
    assert rows != take(stream(source, seed=2, buffer=5), count)
    flat = [token for row in rows for token in row]
    one_pass = sum(len(text) + 1 for text in TEXTS)
    assert sorted(flat[:one_pass]) == sorted(flat[one_pass : 2 * one_pass])
    assert flat[:one_pass] != flat[one_pass : 2 * one_pass]


@pytest.mark.parametrize(("letters", "workers"), [("ab", 0), ("ab", 2), ("a", 2)])
def test_stream_workers_share_the_files(letters: str, workers: int, tmp_path: Path) -> None:
    for letter in letters:
        write_texts(tmp_path / f"{letter}.jsonl", [letter * 15])
    loader = torch.utils.data.DataLoader(stream(str(tmp_path / "*.jsonl"), buffer=0), num_workers=workers)
    seen = [batch["input_ids"][0, 0].item() for batch in islice(loader, 8)]
    ids = tiny_tokenizer().convert_tokens_to_ids(list(letters))
    assert sorted(seen) == sorted(ids * (8 // len(ids)))


def test_load_packed_follows_its_arguments(tmp_path: Path) -> None:
    source = str(write_texts(tmp_path / "a.jsonl", TEXTS, column="body"))
    options = {"data": source, "text_column": "body", "sequence_length": 16}
    train, held_out = load_packed(DataArguments(**options), tiny_tokenizer(), seed=0)
    assert isinstance(train, PackedDataset)
    assert held_out is None
    streamed, held_out = load_packed(
        DataArguments(**options, streaming=True, shuffle_buffer=0, eval_data=source, max_eval_rows=2),
        tiny_tokenizer(),
        seed=0,
    )
    assert isinstance(streamed, PackedStream)
    assert held_out is not None
    assert len(held_out) == 2
    pairs = takewhile(lambda pair: pair[0] < len(train), enumerate(streamed))
    assert all(torch.equal(row["labels"], train[i]["labels"]) for i, row in pairs)


SAMPLES = [
    {"prompt": "ab", "completion": "cde"},
    {"prompt": "a", "completion": "f"},
    {"prompt": "ab c", "completion": "de"},
]


def test_completions_get_a_row_each_and_the_loss() -> None:
    rows = CompletionDataset(SAMPLES, tiny_tokenizer(), 7)
    end, letter = 1, {name: 4 + i for i, name in enumerate("abcdef")}
    assert len(rows) == 3
    for row, sample in zip(rows, SAMPLES, strict=True):
        prompt, completion = (tiny_tokenizer()(sample[name])["input_ids"] for name in ("prompt", "completion"))
        own = [*prompt, *completion, end]
        rest = 7 - len(own)
        assert row["input_ids"].tolist() == own + [end] * rest
        assert row["labels"].tolist() == [-100] * len(prompt) + [*completion, end] + [-100] * rest
        assert row["position_ids"].tolist() == [*range(len(own)), *range(rest)]
    assert rows[1]["labels"].tolist() == [-100, letter["f"], end, -100, -100, -100, -100]
    assert {row["input_ids"].dtype for row in rows} == {torch.int64}


def test_completion_loss_is_that_of_the_sample_alone() -> None:
    model = patch_model(tiny_model("llama"))
    batch = default_data_collator([*CompletionDataset(SAMPLES, tiny_tokenizer(), 12)])
    with torch.no_grad():
        together = model(**batch).loss
        losses = []
        for sample in SAMPLES:
            prompt, completion = (tiny_tokenizer()(sample[name])["input_ids"] for name in ("prompt", "completion"))
            ids = torch.tensor([[*prompt, *completion, 1]])
            scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            losses.append(-scores[len(prompt) - 1 :])
    torch.testing.assert_close(together, torch.cat(losses).mean(), rtol=1e-5, atol=1e-5)


def test_completions_are_loaded_as_rows(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    datasets.Dataset.from_list(SAMPLES).to_json(path)
    args = DataArguments(str(path), sequence_length=8, eval_data=str(path), max_eval_rows=2)
    train, evaluation = load_packed(args, tiny_tokenizer(), seed=0)
    assert isinstance(train, CompletionDataset)
    assert isinstance(evaluation, CompletionDataset)
    assert (len(train), len(evaluation)) == (3, 2)
    with pytest.raises(ValueError, match="samples must fit into a row of 6 tokens, got 7 in sample 2; raise"):
        load_packed(DataArguments(str(path), sequence_length=6), tiny_tokenizer(), seed=0)
    with pytest.raises(ValueError, match="streaming must be off for samples with completions"):
        load_packed(DataArguments(str(path), streaming=True), tiny_tokenizer(), seed=0)
    with pytest.raises(ValueError, match="text column of .* must be one of"):
        load_documents(str(path))  # which perplexity is evaluated on
