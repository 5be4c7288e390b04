"""A text in two forms: Markdown with its figures beside it, and one HTML file that holds them.

Both are written from the same calls. Making the HTML from the Markdown with the `markdown` package would take more code: it leaves
tables inside <details> as text, shows the backslash of escapes it does not know (\\$, \\~, \\|) and passes on any HTML.
"""

import base64
import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data import printable
from study.markup import literal, no_block, to_html, to_markdown


@dataclass
class Page:
    """A report under construction: headings, paragraphs, lists, tables and figures, for Markdown and HTML alike.

    Paragraphs, items and cells may hold **bold** and `code`; all other text is shown as it is, see `markup`.
    """

    out: Path
    picture: str = "png"  # the format of the figures that are shown, png or svg

    def __post_init__(self) -> None:
        self.markdown: list[str] = []
        self.html: list[str] = []

    def heading(self, level: int, text: str) -> None:
        self.markdown.append(f"{'#' * level} {to_markdown(literal(text))}")
        self.html.append(f"<h{level}>{html.escape(printable(text))}</h{level}>")

    def text(self, text: str) -> None:
        self.markdown.append(no_block(to_markdown(text)))
        self.html.append(f"<p>{to_html(text)}</p>")

    def bullets(self, items: list[str]) -> None:
        self.markdown.append("\n".join(f"- {no_block(to_markdown(item))}" for item in items))
        self.html.append("<ul>" + "".join(f"<li>{to_html(item)}</li>" for item in items) + "</ul>")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        lines = [header, ["---"] * len(header), *rows]
        self.markdown.append("\n".join("| " + " | ".join(to_markdown(cell) for cell in line) + " |" for line in lines))
        head, *body = (
            "".join(f"<{t}>{to_html(cell)}</{t}>" for cell in line)
            for t, line in [("th", header), *(("td", r) for r in rows)]
        )
        self.html.append(f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in body) + "</table>")

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """What is added inside is hidden behind one line until the reader opens it."""
        for lines in (self.markdown, self.html):
            lines.append(f"<details><summary>{html.escape(printable(summary), quote=False)}</summary>")
        yield
        for lines in (self.markdown, self.html):
            lines.append("</details>")

    def figure(self, stem: str, caption: str) -> None:
        """A figure that `styled` has saved as STEM.png or STEM.svg."""
        name = f"{stem}.{self.picture}"
        kind = {"png": "image/png", "svg": "image/svg+xml"}[self.picture]
        image = base64.b64encode((self.out / name).read_bytes()).decode()
        self.markdown.append(f"![{to_markdown(literal(caption))}]({name})")
        self.html.append(f'<p><img alt="{html.escape(printable(caption))}" src="data:{kind};base64,{image}"></p>')

    def write(self, title: str) -> None:
        style = (
            "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}img{max-width:100%}"
            "table{border-collapse:collapse;font-size:13px}td,th{border:1px solid #ccc;padding:.25em .6em;text-align:left}"
        )
        (self.out / "report.md").write_text("\n\n".join(self.markdown) + "\n", encoding="utf-8")
        (self.out / "report.html").write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(printable(title))}</title>'
            f"<style>{style}</style>\n" + "\n".join(self.html) + "\n</html>\n",
            encoding="utf-8",
        )
