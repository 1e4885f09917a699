"""One self-contained HTML page: text, tables and pictures, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.lead { color: #555; margin-top: 0; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.92rem; }
img { max-width: 100%; height: auto; } .cards { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1.2rem 0; }
.card { border: 1px solid #ddd; border-radius: 8px; padding: 0.6rem 1rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.5rem; color: #0b6e99; } .card span { color: #555; font-size: 0.88rem; }
table { border-collapse: collapse; font-size: 0.92rem; } .wide { overflow-x: auto; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #e4e4e4; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #555; font-weight: 600; }
"""


class HtmlReport:
    """Collects parts in order, then writes one file (and each picture beside it as PNG).

    Args:
        title: heading.
        lead: one paragraph below it.
    """

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']
        self._pictures: dict[str, bytes] = {}

    def cards(self, cards: Sequence[tuple[str, str]]) -> None:
        """Figures in large type: (value, what it is)."""
        inside = "".join(
            f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'
            for value, what in cards
        )
        self._parts.append(f'<div class="cards">{inside}</div>')

    def section(self, title: str, text: str = "") -> None:
        """A heading and, below it, a paragraph."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self._parts.append(f"<p>{html.escape(text)}</p>")

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """A picture; `name` is its file name without the suffix."""
        self._pictures[name] = png
        data = base64.b64encode(png).decode("ascii")
        self._parts.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of text."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def write(self, path: str | os.PathLike[str], plots: str = "plots") -> Path:
        """Write the page, and the pictures into a folder beside it."""
        path = Path(path)
        folder = path.parent / plots
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in self._pictures.items():
            (folder / f"{name}.png").write_bytes(png)
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self._title)}</title><style>{_CSS}</style></head><body>"
            + "\n".join(self._parts)
            + "</body></html>\n"
        )
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
        return path
