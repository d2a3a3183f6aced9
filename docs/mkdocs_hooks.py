"""What the documentation site needs beyond its pages: a hook of MkDocs and an extension of Griffe (see mkdocs.yml).

The README is the first page, and the changelog and the model cards are pages, each written once, where GitHub shows it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    readme = re.sub(r"\]\((model_cards/[\w-]+)\)", r"](\1/README.md)", readme)
    files.append(File.generated(config, "index.md", content=readme))
    errors = re.search(r"^## (Errors and what to do\n.*?)^## ", readme, re.M | re.S)
    if errors is None:
        raise ValueError("README.md must have a section 'Errors and what to do'; correct its name here too")
    files.append(File.generated(config, "errors.md", content=f"# {errors[1]}"))
    for path in (ROOT / "CHANGELOG.md", *ROOT.glob("model_cards/*/README.md"), *ROOT.glob("model_cards/*/*.png")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(text: str, **kwargs: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(formula, text)


class Roles(Extension):
    """Reads :func:`name` and the like in docstrings as links, where the site has what they name."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            module = obj if obj.is_module else obj.module

            def link(match: re.Match[str]) -> str:
                name = match[1]
                target = name if name.startswith("hf_asentmax") else f"{module.path}.{name}"
                return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'

            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
