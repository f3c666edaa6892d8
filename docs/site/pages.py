"""Pages of the web site that lie elsewhere in the repository, and links between all of them.

A document has one place: README.md is the front page of the repository and of the site. Links in
a document are those of the repository; the site has them as its own.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Documents of the top folder: their file, and the page they become.
DOCUMENTS = {
    "README.md": "index.md",
    "RESULTS.md": "results.md",
    "TPU.md": "tpu.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Add the documents of the top folder."""
    for document, page in DOCUMENTS.items():
        text = (ROOT / document).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a document into those of the site."""
    documents = {page: document for document, page in DOCUMENTS.items()}
    source = documents.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return linked(markdown, source)


def linked(markdown: str, source: str) -> str:
    """The text of a document with the site's links; code is left as it is.

    source: the document's path in the repository.
    """
    parts = []
    end = 0
    for code in CODE.finditer(markdown):
        parts += [_links(markdown[end : code.start()], source), code.group()]
        end = code.end()
    parts.append(_links(markdown[end:], source))
    return "".join(parts)


def _links(text: str, source: str) -> str:
    return LINK.sub(lambda match: _link(match, source), text)


def _link(match: re.Match, source: str) -> str:
    picture, text, target = match.groups()
    if re.match(r"[a-z]+:|#", target):
        return match.group()
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(os.path.dirname(source), path))
    if path in DOCUMENTS:
        path = DOCUMENTS[path]
    elif path.startswith("docs/") and (ROOT / path).is_file():
        path = path.removeprefix("docs/")
    elif (ROOT / path).exists():
        return text  # a file of the repository that the site does not have
    # All documents are in the top folder of the site.
    return f"{picture}[{text}]({path}{'#' + anchor if anchor else ''})"
