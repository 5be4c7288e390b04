"""Text for Markdown and HTML alike: bold and code as in Markdown, everything else as it stands.

Names and messages come from run folders and files that anybody may have made; none of them can begin a table cell, a link,
a tag or a line of its own. `literal` keeps a text exact; without it a pair of ** or of backticks is still a style.
"""

import html
import re
from collections.abc import Callable

from data import printable

# An escaped character, **bold**, `code`, an underscore within a word (no emphasis), a character that may mean something.
TOKEN = re.compile(
    r"\\(?P<escaped>[!-/:-@\[-`{-~])|\*\*(?P<bold>(?:[^*\\]|\\.)+)\*\*|`(?P<code>[^`\\]+)`"
    r"|(?<=[A-Za-z0-9])(?P<within>_)(?=[A-Za-z0-9])|(?P<special>[\\`*_<|~$&]|\](?=[(\[:]))"
)


def literal(text: object) -> str:
    """A text to be shown exactly as it is by the functions below: what could mean something behind a backslash."""
    characters = r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])|([\\`*_<>|~$&\[\]#])"
    return re.sub(characters, lambda m: f"\\{m[1]}" if m[1] else m[0], printable(text))


def render(text: str, plain: Callable, special: Callable, bold: Callable, code: Callable) -> str:
    """A text in some language, made of its pieces: stretches without a token, single characters, bold and code."""
    out, at, text = [], 0, printable(text)
    for m in TOKEN.finditer(text):
        out.append(plain(text[at : m.start()]))
        if m["bold"]:
            out.append(bold(render(m["bold"], plain, special, bold, code)))
        elif m["code"]:
            out.append(code(m["code"]))
        else:
            out.append(m["within"] or special(m["escaped"] or m["special"]))
        at = m.end()
    return "".join(out) + plain(text[at:])


def to_markdown(text: str) -> str:
    """As Markdown that fits into a paragraph, an item of a list and a cell of a table."""
    # as entities, for some readers take no backslash before these two
    special = lambda c: {"<": "&lt;", "&": "&amp;"}.get(c, f"\\{c}")  # noqa: E731
    return render(text, str, special, "**{}**".format, lambda code: "`" + code.replace("|", "\\|") + "`")


def to_html(text: str) -> str:
    """As HTML that fits into an element."""
    return render(text, html.escape, html.escape, "<b>{}</b>".format, lambda code: f"<code>{html.escape(code)}</code>")


def no_block(markdown: str) -> str:
    """Markdown at the beginning of a line, so that it is no heading, no list and no rule."""
    return re.sub(r"^(\d*)(?=[#+.)=-]+(\s|$))", r"\1\\", markdown)
