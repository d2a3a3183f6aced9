"""Documents to evaluate on, taken out of a corpus before anything is trained on it.

Perplexity beyond the training length needs documents that really are long, and corpora of manuals and code have few
such files, but folders whose files read on from one another. So a long document here is a whole group (a folder, a
package): its files one after the other. The group then leaves the training data altogether.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .data import load_documents

LARGEST_SHARE = 0.01  # of the corpus's characters: a group with more stays in the training data
BETWEEN = "\n\n"  # the files of a long document


class HeldOut(NamedTuple):
    """Three `datasets.Dataset` with no document in common."""

    train: Any
    long: Any
    short: Any


def hold_out(
    sources: Sequence[str],
    *,
    long: int,
    long_chars: tuple[int, int],
    short: int,
    column: str = "text",
    group_column: str | None = None,
    order_column: str | None = None,
    seed: int = 0,
) -> HeldOut:
    """Split documents into what to train on and what to evaluate on, by hashes: their order does not matter.

    Args:
        sources: as :func:`hf_asentmax.data.load_documents` takes them; all have the same columns.
        long: long documents to take: groups of at least ``long_chars[0]`` characters together and at most
            ``LARGEST_SHARE`` of all. None of a group's documents, and no copy of one, is trained on.
        long_chars: (fewest, most); what a group has beyond the most is left out.
        short: single documents to take of what is left; others of their group are trained on, copies of them are not.
        column: the column with the text.
        group_column: the column whose value documents of one group share; None: each document is a group.
        order_column: the column that orders a group's documents; None: as they come.
        seed: of the choice.

    Returns:
        ``train`` and ``short`` with the columns of the sources; ``long`` with the text and, where there are groups,
        their names as ``group``.

    Raises:
        ValueError: a column is missing, a number is off, or the sources hold fewer such documents than asked for.
    """
    import datasets

    fewest, most = long_chars
    if min(long, short) < 0 or not 1 <= fewest <= most:
        raise ValueError(
            f"long, short and long_chars must be counts, 0 or more, and 1 <= fewest <= most, got {long}, {short} and "
            f"{tuple(long_chars)}; correct them"
        )
    documents = datasets.concatenate_datasets([load_documents(source, column=column) for source in sources])
    for name in (column, group_column, order_column):
        if name is not None and name not in documents.column_names:
            raise ValueError(f"column must be one of {documents.column_names}, got {name!r}; name another")

    texts = documents[column]
    sizes, prints = [], []
    for text in texts:
        sizes.append(len(text or ""))
        prints.append(hashlib.sha256((text or "").encode()).hexdigest())
    total = len(sizes)
    # A document by itself, or without a group, is known by its text, as its place changes with those before it.
    names = prints
    if group_column is not None:
        names = [own if name is None else str(name) for own, name in zip(prints, documents[group_column], strict=True)]
    places = range(total) if order_column is None else documents[order_column]
    groups: dict[str, list[int]] = {}
    for i in sorted(range(total), key=lambda i: (names[i], places[i] is not None, places[i])):
        members = groups.setdefault(names[i], [])
        if names[i] != prints[i] or not members:  # else a copy, which leaves with it
            members.append(i)

    def rank(identity: str) -> bytes:
        return hashlib.sha256(repr((seed, identity)).encode()).digest()

    limit = max(LARGEST_SHARE * sum(sizes), most)
    chars = {name: sum(sizes[i] for i in members) for name, members in groups.items()}
    able = [name for name in groups if fewest <= chars[name] <= limit]
    if len(able) < long:
        raise ValueError(
            f"long must be at most {len(able)}, the number of groups that have {fewest} to {limit:.0f} characters, "
            f"got {long}; lower it or the fewest characters, or name another group column"
        )
    chosen = sorted(able, key=rank)[:long]
    gone = set(chosen)
    copies = {prints[i] for i in range(total) if names[i] in gone and sizes[i]}
    left = {
        prints[i]: i for i in reversed(range(total)) if names[i] not in gone and prints[i] not in copies and sizes[i]
    }
    if len(left) < short:
        raise ValueError(f"short must be at most the {len(left)} documents that are left, got {short}; lower it")
    single = sorted(left, key=rank)[:short]
    copies.update(single)
    rows: dict[str, list[str]] = {column: [BETWEEN.join(texts[i] or "" for i in groups[x])[:most] for x in chosen]}
    if group_column is not None:
        rows["group"] = chosen
    return HeldOut(
        documents.select([i for i in range(total) if names[i] not in gone and prints[i] not in copies]),
        datasets.Dataset.from_dict(rows, features=datasets.Features({x: datasets.Value("string") for x in rows})),
        documents.select([left[x] for x in single]),
    )
