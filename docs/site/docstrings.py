"""Docstrings of this library as Markdown, for the reference of the web site.

Their sections (Args, Returns, Raises and so on) describe several names on one line and go on in
indented lines; here each entry becomes an item of a list.
"""

import re

import griffe

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example|Source): ?(.*)")
ENTRY = re.compile(r"( *)((?:[\w*]+,\s)*[\w*]+):\s(.*)")


class Markdown(griffe.Extension):
    """Rewrite every docstring before it is rendered."""

    def on_object(self, *, obj, **kwargs):
        """Called for every module, class, function and attribute that has been read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring with its sections as bold words and their entries as lists."""
    lines = []
    inside = False
    for line in text.splitlines():
        section = SECTION.fullmatch(line)
        if section:
            inside = section.group(1) in ("Args", "Attributes")
            lines += ["", f"**{section.group(1)}:** {section.group(2)}".rstrip(), ""]
        elif inside and line.startswith("  "):
            lines.append(_entry(line))
        else:
            # Other text: an indented line goes on with the one before it.
            lines.append(line if "`" in line or not line.startswith("  ") else line.strip())
    return "\n".join(lines)


def _entry(line: str) -> str:
    """A line of Args: `  names: text` begins an item, a deeper one goes on with it."""
    entry = ENTRY.fullmatch(line)
    if entry and len(entry.group(1)) == 2:
        return f"- `{entry.group(2)}`: {entry.group(3)}"
    return "  " + line.strip()
