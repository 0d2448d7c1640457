"""Every notebook runs from top to bottom in a folder that is not the repo's, and is committed as it ran."""

import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ["attention_bounds.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path, monkeypatch):
    shutil.copy(ROOT / "notebooks" / name, tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel's: the copy lies outside the repo
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(tmp_path / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    # raises on the first cell that fails; seconds a cell, of which a busy machine needs some
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    assert plots(notebook) == plots(nbformat.read(ROOT / "notebooks" / name, as_version=4))
    assert [p.name for p in tmp_path.iterdir()] == [name]  # it wrote nothing


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_executed(name):
    path = ROOT / "notebooks" / name
    assert path.stat().st_size < 2 * 2**20
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
    assert plots(notebook) > 0


def plots(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
