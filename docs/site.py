"""mkdocs' hooks: pages at the repository's root are pages of the site, packages are shown by their public names."""

from __future__ import annotations

import posixpath
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages of the site that are files of the repository's root.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# A line that asks for the public names of a package: ::: tinyexperts.layers
_PACKAGE = re.compile(r"^::: (tinyexperts\.[a-z]+)$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, with links as from docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, name in PAGES.items():
            text = text.replace(f"]({name})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write packages as their public names, and a link to a file outside of docs/ as its text and its path."""
    markdown = _PACKAGE.sub(lambda match: _public_names(match[1]), markdown)
    folder = posixpath.dirname(page.file.src_uri)

    def text_of(match: re.Match[str]) -> str:
        target = match[2].partition("#")[0]
        if "://" in target or not target or target.startswith("mailto:"):
            return match[0]
        found = posixpath.normpath(posixpath.join(folder, target))
        if not found.startswith("..") and (files.get_file_from_path(found) or (ROOT / "docs" / found).is_dir()):
            return match[0] if files.get_file_from_path(found) else match[1]
        outside = found.removeprefix("../")
        for page_name, source in PAGES.items():
            if outside == source:
                up = "../" * folder.count("/") + ("../" if folder else "")
                return f"[{match[1]}]({up}{page_name})"
        if not (ROOT / outside).exists():
            return match[0]
        return f"`{outside}`" if match[1].strip("`") == outside else f"{match[1]} (`{outside}`)"

    return _LINK.sub(text_of, markdown)


def _public_names(package_name: str) -> str:
    """Return the docstring of a package, and a line of mkdocstrings for each name of its `__all__`."""
    package = import_module(package_name)
    assert package.__doc__
    lines = [package.__doc__]
    for name in package.__all__:
        path = f"{package_name}.{name}"
        if path in sys.modules:  # mkdocstrings would show the module of that name
            path = f"{getattr(package, name).__module__}.{name}"
        lines.append(f"::: {path}")
    return "\n\n".join(lines)
