"""The table of supported model families, as the README shows it: made from this package's classes and files."""

from __future__ import annotations

from importlib import import_module

from .configuration_asentmax import CONFIG_CLASSES

_CLASSIFIERS = {"AutoModelForSequenceClassification": "sequences", "AutoModelForTokenClassification": "tokens"}


def family_table() -> str:
    """A Markdown table, one row a family: models, model type, names of the classes, classifiers, and what is special.

    Models and notes are the docstring of the family's file in ``patches/``: what stands before and after its colon.
    """
    lines = ["| family | `model_type` | classes | classifiers of | notes |", "|---|---|---|---|---|"]
    for family, config in CONFIG_CLASSES.items():
        models, _, notes = str(import_module(f"{__package__}.patches.{family}").__doc__).partition(": ")
        names = f"`{config.__name__.removesuffix('Config')}...`"
        classifiers = ", ".join(kind for auto, kind in _CLASSIFIERS.items() if auto in config.class_names())
        cells = (models, f"`{family}`", names, classifiers or "none in Transformers", notes.removesuffix("."))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
