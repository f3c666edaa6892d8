"""Docstrings of this library as Markdown, for the reference of the web site.

Their sections (Args, Returns, Raises and so on) describe several names on one line and go on in
indented lines; here each entry becomes an item of a list.
"""

import re

import griffe

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example|Source): ?(.*)")
ENTRY = re.compile(r"((?:\*{0,2}\w+, )*\*{0,2}\w+): (.*)")


class Markdown(griffe.Extension):
    """Rewrite every docstring before it is rendered."""

    def on_object(self, *, obj, **kwargs):
        """Called for every module, class, function and attribute that has been read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with its sections as bold words, and entries of Args and Attributes as lists."""
    lines = []
    entries = None  # of the section of entries that the lines belong to
    for line in text.splitlines():
        section = SECTION.fullmatch(line)
        if section or (entries is not None and line and not line.startswith("  ")):
            lines += _listed(entries or [])
            entries = None
        if section:
            name, rest = section.groups()
            lines += ["", f"**{name}:** {rest}".rstrip()]
            entries = [] if name in ("Args", "Attributes") and not rest else None
        elif entries is None:
            # An indented line goes on with the one before it, unless it is code.
            lines.append(line if line.startswith("    ") else line.strip())
        elif re.match(r"  \S", line):
            entries.append(line.strip())
        elif line.strip() and entries:
            entries[-1] += f" {line.strip()}"
    markdown = "\n".join([*lines, *_listed(entries or [])])
    # <name> in a text is no tag; in code it is right as it stands.
    pieces = re.split(r"(`[^`]*`)", markdown)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in pieces)


def _listed(entries: list[str]) -> list[str]:
    """`names: text` of each entry as an item of a list."""
    items = [ENTRY.sub(r"- `\1`: \2", entry, count=1) for entry in entries]
    return ["", *items, ""] if items else []
