"""The cloze set: which last words are asked for, and that the passages don't overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_asentmax.cloze import cloze_items, write_cloze

BEFORE = "Far away the lantern burned. " + "So they walked through the rain on and on. " * 5  # 5 + 45 words


def test_cloze_asks_for_a_last_word_that_stands_before() -> None:
    (item,) = cloze_items(BEFORE + "At last somebody saw the\n  lantern! And then?")
    assert item == {"context": BEFORE + "At last somebody saw the", "word": "lantern"}


@pytest.mark.parametrize(
    "last",
    [
        "At last somebody saw the lamplight.",  # never said before
        "At last somebody saw the lan.",
        "At last somebody saw the burn.",  # a part of a word only
        "At last somebody saw the far.",  # three letters
        "At last somebody saw the Lantern.",
        "At last somebody saw the lantern, then",
        "They saw the lantern.",  # four words
        "The lantern shone, and it was a lantern.",  # twice in the sentence
        "It was " + "very " * 46 + "near the lantern.",  # 51 words
    ],
)
def test_cloze_leaves_out_what_the_passage_does_not_tell(last: str) -> None:
    assert list(cloze_items(BEFORE + last)) == []


def test_cloze_context_holds_50_to_150_words() -> None:
    last = "At last somebody saw the lantern."
    few = "Far away the lantern burned. " + "So they walked through the rain on and on. " * 4
    assert list(cloze_items(few + last)) == []  # 41 words
    assert len(list(cloze_items(few + "So they walked on and then it was up. " + last))) == 1  # 50
    assert list(cloze_items("The lantern " + "and " * 149 + "end. " + last)) == []  # 152
    (item,) = cloze_items("Once upon a time there was nothing at all. " + BEFORE + last)
    assert item["context"].startswith("Far away")  # no more sentences than needed


def test_cloze_passages_do_not_overlap() -> None:
    one = BEFORE + "At last somebody saw the lantern. "
    items = list(cloze_items(one * 3 + "Later nobody saw the lantern."))
    assert [item["word"] for item in items] == ["lantern"] * 3
    assert "".join(item["context"] + " lantern. " for item in items) == one * 3


def test_cloze_task_is_written_with_so_many_passages(tmp_path: Path) -> None:
    texts = [BEFORE + f"Then number {number} saw the lantern." for number in range(8)]
    folder = tmp_path / "new" / "prose"
    assert write_cloze(texts, folder, samples=3, seed=1) == 3
    items = [json.loads(line) for line in (folder / "prose.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({item["context"] for item in items}) == 3
    assert write_cloze(texts, folder, samples=3, seed=1) == 3
    assert [json.loads(line) for line in (folder / "prose.jsonl").read_text(encoding="utf-8").splitlines()] == items
    task = (folder / "prose.yaml").read_text(encoding="utf-8")
    assert task.startswith('task: "prose"\n')
    assert f'test: "{folder / "prose.jsonl"}"' in task
    assert 'doc_to_text: "{{context}}"' in task
    with pytest.raises(ValueError, match="samples must be between 1 and the 8 passages that the texts have, got 9"):
        write_cloze(texts, folder, samples=9)
    with pytest.raises(ValueError, match="the 0 passages that the texts have, got 0; give more texts"):
        write_cloze(["Nothing."], folder)
