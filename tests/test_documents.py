"""README.md and the pages of docs/: their code runs as printed, and what they list is complete.

The stage `wheel` of .ci/run runs some of them from an installed wheel too; `make docs` finds broken
links and anchors.
"""

import inspect
import re

import document_blocks
import pytest
import yaml

import ltsm_jax
from ltsm_jax import flags
from ltsm_jax.cli import COMMANDS
from ltsm_jax.models import FAMILIES

ROOT = document_blocks.ROOT
DOCS = ROOT / "docs"
README = ROOT / "README.md"
WITH_CODE = [
    document
    for document in document_blocks.DOCUMENTS
    if any(block.runs for block in document_blocks.blocks(document))
]
# These do not tune.
QUICK = ("converting.md", "scaling.md")


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(d, id=d.name, marks=() if d.name in QUICK else pytest.mark.slow)
        for d in WITH_CODE
    ],
)
def test_code_runs(document, tmp_path, monkeypatch):
    document_blocks.write_tables(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "cache"))
    for block in document_blocks.blocks(document):
        if block.runs:
            document_blocks.run(block)


def test_there_is_code_to_run():
    names = {document.name for document in WITH_CODE}
    assert names >= {"README.md", "quick-start.md", "own-data.md", "methods.md", "research.md"}
    running = [block for block in document_blocks.blocks(README) if block.runs]
    assert {block.language for block in running} == {"python", "sh"} and len(running) >= 3


def test_every_block_is_run_or_says_why_not():
    for document in document_blocks.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        found = document_blocks.blocks(document)
        assert 2 * len(found) == len(re.findall(r"^```", text, re.MULTILINE)), document
        assert text.count("<!-- not run:") == sum(b.reason is not None for b in found), document
        for block in found:
            assert block.language in ("", "python", "sh"), block.name


def test_commands_that_are_not_run_are_read():
    """Those of the experiments are read in tests/experiments/test_flags.py."""
    read = 0
    for document in document_blocks.DOCUMENTS:
        for block in document_blocks.blocks(document):
            if block.language != "sh" or block.runs:
                continue
            for words in document_blocks.commands(block):
                if words[0] == "ltsm":
                    command = COMMANDS[words[1]]
                    flags.parse(command, words[2:], inspect.cleandoc(command.__doc__ or ""))
                    read += 1
    assert read >= 4


def test_a_block_that_says_something_else_would_be_found():
    wrong = document_blocks.Block("here", "python", "print((1, 2))  # (1, 3)\n", None)
    with pytest.raises(AssertionError, match="print"):
        document_blocks.run(wrong)
    for text in ("curl address\n", "ltsm models no-such-model\n"):
        with pytest.raises((AssertionError, ValueError), match=text.split()[0]):
            document_blocks.run(document_blocks.Block("here", "sh", text, None))


# --- the README


def test_the_readme_is_short():
    """All of it, as `wc -w` counts: code, tables and signs too."""
    assert len(README.read_text(encoding="utf-8").split()) < 1200


def test_the_readme_has_its_order():
    headings = re.findall(r"^## (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [
        "Install",
        "Forecast your CSV",
        "SFF in one figure and one formula",
        "Does it help?",
        "Models",
        "Where things are",
    ]


def families_in_the_table_of(document):
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)


def test_every_family_is_in_the_tables():
    readme, page = families_in_the_table_of(README), families_in_the_table_of(DOCS / "models.md")
    assert readme.keys() == page.keys() == set(FAMILIES)
    for family, row in readme.items():
        assert re.search(r"\| \d+\.\d %", row), f"{family}: no parity"
        assert ("*" in row) == ("non-commercial" in page[family]), family


# --- the site


def pages_of(entries):
    """Files that the navigation names."""
    found = []
    for entry in entries:
        for value in entry.values():
            found += [value] if isinstance(value, str) else pages_of(value)
    return found


def test_every_page_and_notebook_is_in_the_navigation():
    named = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    written = {path.name for path in DOCS.glob("*.md")}
    written |= {f"notebooks/{path.name}" for path in (DOCS / "notebooks").glob("*.ipynb")}
    elsewhere = {"index.md", "results.md", "tpu.md", "contributing.md", "changelog.md"}
    assert set(named) == written | elsewhere and len(named) == len(set(named))


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: [\w.]*?(\w+)$", text, re.MULTILINE))
    assert not set(ltsm_jax.__all__) - shown


def test_pictures_are_small():
    large = [
        path.name
        for path in DOCS.rglob("*")
        if path.suffix in (".png", ".svg", ".jpg") and path.stat().st_size > 200_000
    ]
    assert not large
