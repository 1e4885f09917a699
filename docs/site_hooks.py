"""Puts pages that live elsewhere in the repository into the site, with the pictures they show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("NUMERICS.md", "CONVENTIONS.md", "CONTRIBUTING.md")
FOLDERS = ("benchmarks/*.md", "benchmarks/results/plots/*.png")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add them under the path that they have in the repository."""
    found = [ROOT / page for page in PAGES]
    found += [path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))]
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links of the repository at the site; what is no page of it becomes plain text."""
    source = page.file.src_uri
    here = (ROOT if (ROOT / source).is_file() else ROOT / "docs") / source

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        place = (here.parent / target).resolve()
        if not place.is_relative_to(ROOT):
            return match.group(0)
        name = place.relative_to(ROOT).as_posix()
        name = "index.md" if name == "README.md" else name.removeprefix("docs/")
        file = files.get_file_from_path(name)
        if file is None or file.inclusion.is_excluded():
            return text
        up = "../" * source.count("/")
        return f"[{text}]({up}{name}{anchor or ''})"

    return _LINK.sub(link, markdown)
