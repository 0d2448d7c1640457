"""Every notebook runs from top to bottom in a folder that is not the repo's, and is committed as it ran."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import passkey
import sequences
from model import LLaMA, LLaMAConfig
from tokenizer import train_tokenizer

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ["attention_bounds.ipynb", "position_interpolation.ipynb"]


def run(name, folder, monkeypatch):
    """The notebook, executed in a folder that is not the repo's. It must write nothing there."""
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / name, folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel's: the copy lies outside the repo
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(folder / name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(folder)}}
    # raises on the first cell that fails; seconds a cell, of which a busy machine needs some
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    assert [p.name for p in folder.iterdir()] == [name]
    return notebook


def test_attention_bounds_runs(tmp_path, monkeypatch):
    notebook = run("attention_bounds.ipynb", tmp_path / "elsewhere", monkeypatch)
    assert plots(notebook) == plots(nbformat.read(ROOT / "notebooks" / "attention_bounds.ipynb", as_version=4))


@pytest.mark.parametrize("tuned", [False, True], ids=["base alone", "with the demo's fine-tunes"])
def test_position_interpolation_runs(tuned, tmp_path, monkeypatch):
    """On a random model that its folders show as the demo would leave them; no figure depends on training."""
    texts = [text for _, text in zip(range(20), (text for _, text in data.read_documents(None, "val")))]
    tokenizer = train_tokenizer([*texts, *[sequences.passkey_text("12345", 5, 5)] * 20], 512)
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(
        vocab_size=512, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, intermediate_size=64, block_size=160,
        bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
    ))  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    base = tmp_path / "demo" / "seed-0" / "base"
    checkpoint.save(model, base, tokenizer)
    if tuned:
        for name, rope in (("PI", "linear"), ("direct", "none")):
            for step in (9, 10):
                checkpoint.save(checkpoint.load(base, scale=2, rope=rope), base.parent / name / f"step-{step}", tokenizer)
        points = [{"k": k, "success": 0.5} for k in passkey.distances(320, 4)]
        rows = [
            {"name": name, "rope": "", "steps": steps, "ppl": {"160": 9.0, "320": 8.0}, "k_max": 320, "points": points}
            for name, steps in (("base", 0), ("PI", 0), ("PI", 9), ("PI", 10), ("direct", 9), ("direct", 10))
        ]
        demo = {"seed": 0, "window": 160, "long": 320, "rows": rows, "summary": ["A sentence."]}
        (tmp_path / "demo" / "demo.json").write_text(json.dumps(demo))
    monkeypatch.setenv("PI_NOTEBOOK_INIT", str(base))
    monkeypatch.setenv("PI_NOTEBOOK_QUICK", "1")
    notebook = run("position_interpolation.ipynb", tmp_path / "elsewhere", monkeypatch)
    assert plots(notebook) == 8 + tuned
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" for output in outputs)
    text = "\n".join(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
    assert "$L = 160$" in text and "all far tokens masked" in text and "retrieval" not in text
    assert ("PI, 10 steps" in text) == ("A sentence." in text) == tuned and "PI, 9 steps" not in text


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
