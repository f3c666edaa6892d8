"""The notebooks of docs/: each runs from top to bottom, and shows what is stored in it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def cells_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of(cell):
    """What a cell shows: names of streams and MIME types, progress on stderr aside."""
    found = []
    for output in cell.outputs:
        if output.output_type == "stream":
            found += [output.name] if output.name != "stderr" else []
        else:
            found += sorted(output.get("data", {"error": None}))
    return sorted(set(found))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = cells_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for kind in kinds_of(cell)]
    assert "error" not in kinds and "stdout" in kinds and "image/png" in kinds


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    """In a kernel of its own; a cell that fails raises."""
    monkeypatch.setenv("LTSM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    stored = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    folder = tmp_path / "work"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    for before, after in zip(cells_of(stored), cells_of(notebook), strict=True):
        assert kinds_of(after) == kinds_of(before), before.source


def test_there_are_three():
    assert len(NOTEBOOKS) == 3
