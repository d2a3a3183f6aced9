"""Documents held out of a corpus: nothing of a long one is trained on, and the choice stays what it is."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_asentmax.data import load_documents
from hf_asentmax.holding_out import BETWEEN, HeldOut, hold_out

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "hold_out.py"
Rows = list[tuple[str | None, int, str]]  # group, place in it, text


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Rows], str]:
    folder = tmp_path_factory.mktemp("corpus")

    def write(rows: Rows) -> str:
        path = str(folder / f"{len(list(folder.iterdir()))}.parquet")
        columns = {name: [row[i] for row in rows] for i, name in enumerate(("group", "path", "text"))}
        datasets.Dataset.from_dict(columns).to_parquet(path)
        return path

    return write


def corpus(groups: int, files: int, size: int = 10) -> Rows:
    """Groups of files whose texts say which they are, the last file of a group first."""
    return [(f"g{g}", f, f"[{g}.{f}]".ljust(size, ".")) for g in range(groups) for f in reversed(range(files))]


def held_out(sources: list[str], **changes: Any) -> HeldOut:
    given: dict[str, Any] = {"long": 2, "long_chars": (30, 35), "short": 3}
    return hold_out(sources, **given | {"group_column": "group", "order_column": "path"} | changes)


def test_long_documents_are_whole_groups_in_order_and_nothing_of_them_is_left(write: Callable[[Rows], str]) -> None:
    rows = corpus(groups=200, files=3)
    parts = held_out([write(rows)])
    assert len(parts.long) == 2
    for row in parts.long:
        number = row["group"][1:]
        assert row["text"] == BETWEEN.join(f"[{number}.{f}]".ljust(10, ".") for f in range(3))[:35]
    outside = {*parts.train["group"], *parts.short["group"]}
    assert not outside & set(parts.long["group"])
    assert len(parts.short) == 3
    assert len(parts.train) == len(rows) - 2 * 3 - 3
    assert {*parts.train["text"]}.isdisjoint(parts.short["text"])


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=101, max_size=110),
    long=st.integers(0, 2),
    short=st.integers(0, 3),
    seed=st.integers(0, 3),
)
def test_every_document_is_in_one_part(
    write: Callable[[Rows], str], sizes: list[list[int]], long: int, short: int, seed: int
) -> None:
    rows = [(f"g{g}", f, f"{g}.{f} ".ljust(n, "x")[:n]) for g, files in enumerate(sizes) for f, n in enumerate(files)]
    rows += [(f"full{i}", 0, f"full {i}".ljust(35, "x")) for i in range(5)]  # so that there are always enough
    parts = held_out([write(rows)], long=long, long_chars=(30, 35), short=short, seed=seed)
    assert (len(parts.long), len(parts.short)) == (long, short)
    train, single = ([(x["group"], x["path"], x["text"]) for x in part] for part in (parts.train, parts.short))
    texts = {row[2] for row in single}
    assert len(texts) == short
    gone = [row for row in rows if row[0] in parts.long["group"]]
    texts |= {row[2] for row in gone if row[2]}
    copies = [row for row in rows if row[2] in texts and row not in gone]
    assert sorted(train + gone + copies) == sorted(rows)
    assert {*single} <= {*copies}
    total = sum(len(row[2]) for row in rows)
    for name in parts.long["group"]:
        assert 30 <= sum(len(row[2]) for row in rows if row[0] == name) <= max(35, total / 100)


def test_choice_follows_from_the_documents_and_the_seed_alone(write: Callable[[Rows], str]) -> None:
    rows = corpus(groups=200, files=3)
    first = held_out([write(rows)])
    again = held_out([write(rows[300:][::-1]), write(rows[:300])])  # in another order, from two files
    assert first.long.to_list() == again.long.to_list()
    assert first.short.to_list() == again.short.to_list()
    assert held_out([write(rows)], seed=1).long["group"] != first.long["group"]
    more = held_out([write([*rows, ("new", 0, "too short to be chosen as long")])])
    assert more.long["group"] == first.long["group"]


def test_a_group_that_is_much_of_the_corpus_stays_in_training(write: Callable[[Rows], str]) -> None:
    rows = [*corpus(groups=20, files=1, size=32), ("book", 0, "y" * 400)]
    parts = held_out([write(rows)], long=20, short=0)
    assert "book" not in parts.long["group"]
    assert parts.train["group"] == ["book"]
    with pytest.raises(ValueError, match=r"at most 20, the number of groups that have 30 to 35 characters, got 21"):
        held_out([write([*corpus(groups=20, files=1, size=32), ("book", 0, "y" * 400)])], long=21)


def test_without_groups_each_document_is_one_and_its_copies_leave_with_it(write: Callable[[Rows], str]) -> None:
    texts = 2 * [("", 0, f"{i}".ljust(20 + i, ".")) for i in range(30)]
    parts = held_out([write(texts)], long_chars=(30, 40), group_column=None, order_column=None)
    assert parts.long.column_names == ["text"]
    assert all(30 <= len(text) <= 40 for text in parts.long["text"])
    assert {*parts.train["text"]}.isdisjoint([*parts.long["text"], *parts.short["text"]])
    assert len(parts.train) == len(texts) - 2 * (2 + 3)
    moved = held_out([write(texts[7:] + texts[:7])], long_chars=(30, 40), group_column=None, order_column=None)
    assert moved.long.to_list() == parts.long.to_list()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_chars": (35, 30)}, "1 <= fewest <= most"),
        ({"short": -1}, "counts, 0 or more"),
        ({"short": 10_000}, "short must be at most the 594 documents that are left, got 10000"),
        ({"group_column": "folder"}, r"column must be one of \['group', 'path', 'text'\], got 'folder'"),
        ({"order_column": "page"}, "got 'page'"),
    ],
)
def test_what_cannot_be_held_out_is_refused(
    write: Callable[[Rows], str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        held_out([write(corpus(groups=200, files=3))], **changes)


def test_script_writes_three_files_and_refuses_a_folder_in_use(
    write: Callable[[Rows], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    words = f"--data {write(corpus(200, 3))} --group_column group --order_column path --long 2 --long_chars 30 35"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words.split(), "--short", "3", "--output_dir", str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "long.parquet: 2 documents, 68 characters" in capsys.readouterr().out
    counts = [len(load_documents(str(folder / f"{name}.parquet"))) for name in ("train", "long", "short")]
    assert counts == [591, 2, 3]
    with pytest.raises(ValueError, match="output_dir must be a new or an empty folder"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_documents_without_a_group_are_no_group(write: Callable[[Rows], str]) -> None:
    texts = [f"{i}".ljust(32, ".") for i in range(40)]
    rows = [(None, 0, text) for text in texts] + [("book", i, f"page {i}".ljust(16, ".")) for i in range(2)]
    parts = held_out([write(rows)], long=41, short=0)
    assert sorted(parts.long["text"])[: len(texts)] == sorted(texts)
