"""mkdocs' hooks: the pages at the root of the repository are pages of the site, and links that leave docs/ are text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages of the site that are files of the repository's root.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
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
    """Write a link to a file outside of docs/ as its text and its path."""
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
        return f"{match[1]} (`{outside}`)" if (ROOT / outside).exists() else match[0]

    return _LINK.sub(text_of, markdown)
