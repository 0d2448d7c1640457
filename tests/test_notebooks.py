"""Every notebook runs from top to bottom outside the repo, and is committed as it ran."""

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import passkey
import prompts
from model import LLaMA, LLaMAConfig
from tokenizer import train_tokenizer

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ["attention_bounds.ipynb", "position_interpolation.ipynb"]


def committed(name: str):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def execute(name: str, folder: Path, monkeypatch):
    """The notebook, executed in a new folder outside the repo. It must write nothing there."""
    folder.mkdir()
    shutil.copy(NOTEBOOKS / name, folder)
    # The kernel finds the repo's modules by PYTHONPATH, because the copy is outside the repo
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(folder / name, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(folder)}}
    # timeout: seconds for a cell; a busy machine needs some
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources=resources
    )
    client.execute()  # raises an error if a cell fails
    assert [path.name for path in folder.iterdir()] == [name]
    return notebook


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook) -> list:
    outputs = []
    for cell in code_cells(notebook):
        outputs += cell.outputs
    return outputs


def count_pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def text_of(notebook) -> str:
    """What the cells print as Markdown."""
    texts = []
    for output in outputs_of(notebook):
        texts.append(output.get("data", {}).get("text/markdown", ""))
    return "\n".join(texts)


# ---- the notebooks run ---------------------------------------------------------------------------


def test_attention_bounds_runs(tmp_path, monkeypatch):
    notebook = execute("attention_bounds.ipynb", tmp_path / "elsewhere", monkeypatch)
    assert count_pictures(notebook) == count_pictures(committed("attention_bounds.ipynb"))


def answers(name: str) -> list[str]:
    """The Python code of the folded answers to a notebook's exercises, one string for each."""
    codes = []
    for cell in committed(name).cells:
        if cell.cell_type == "markdown" and "<details>" in cell.source:
            folded = cell.source.split("<details>")[1].split("</details>")[0]
            codes.append("\n".join(re.findall(r"```python\n(.*?)```", folded, flags=re.DOTALL)))
    return codes


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_answers_to_the_exercises_run(name, number):
    """Each stands for itself, and asserts the numbers that its text gives."""
    codes = answers(name)
    assert len(codes) == 3
    code = codes[number - 1]
    assert code.count("assert ") >= 2
    exec(compile(code, f"answer {number}", "exec"), {})


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_ask_before_they_show(name):
    """A cell has at most 25 lines, and the text before each picture asks for a guess."""
    text = ""  # since the last picture
    shown = False
    for cell in committed(name).cells:
        if cell.cell_type == "markdown":
            if shown:
                text = ""
                shown = False
            text += cell.source
            continue
        assert len(cell.source.splitlines()) <= 25, cell.source
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            asked = " ".join(text.split())  # a line may end after "Guess:"
            assert "uess: " in asked or "uess, " in asked, cell.source
            shown = True


def random_base(folder: Path):
    """Save a random model with a window of 160 tokens. Returns its tokenizer."""
    documents = islice(data.read_documents(None, "val"), 20)
    texts = [text for _, text in documents]
    texts += [prompts.passkey_text("12345", 5, 5)] * 20
    tokenizer = train_tokenizer(texts, 512)
    torch.manual_seed(0)
    config = LLaMAConfig(
        vocab_size=512,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        intermediate_size=64,
        block_size=160,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    model = LLaMA(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    checkpoint.save(model, folder, tokenizer)
    return tokenizer


def add_fine_tunes(base: Path, tokenizer) -> None:
    """Save what demo.py leaves beside the base: checkpoints of both methods, and its results."""
    for name, rope in (("PI", "linear"), ("direct", "none")):
        model = checkpoint.load(base, scale=4, rope=rope)
        for step in (9, 10):
            checkpoint.save(model, base.parent / name / f"step-{step}", tokenizer)
    points = [{"k": k, "success": 0.5} for k in passkey.distances(640, 4)]
    rows = []
    methods = (
        ("base", "none", 0), ("PI", "linear", 0), ("PI", "linear", 9), ("PI", "linear", 10),
        ("direct", "none", 9), ("direct", "none", 10)
    )
    for name, rope, steps in methods:
        row = {"name": name, "rope": rope, "steps": steps, "ppl": {"160": 9.0, "640": 8.0}}
        rows.append(row | {"k_max": 640, "points": points})
    results = {"seed": 0, "window": 160, "long": 640, "rows": rows, "summary": ["A sentence."]}
    (base.parent.parent / "demo.json").write_text(json.dumps(results))
    (base.parent / "base-0.json").write_text(json.dumps({"settings": {"parent": {"flags": []}}}))


@pytest.mark.parametrize("tuned", [False, True], ids=["base alone", "with the demo's fine-tunes"])
def test_position_interpolation_runs(tuned, tmp_path, monkeypatch):
    """On a random model in the folders of the demo; no figure depends on training."""
    base = tmp_path / "demo" / "seed-0" / "base"
    tokenizer = random_base(base)
    if tuned:
        add_fine_tunes(base, tokenizer)
    monkeypatch.setenv("PI_NOTEBOOK_INIT", str(base))
    monkeypatch.setenv("PI_NOTEBOOK_DEMO", str(tmp_path / "demo"))
    monkeypatch.setenv("PI_NOTEBOOK_QUICK", "1")
    notebook = execute("position_interpolation.ipynb", tmp_path / "elsewhere", monkeypatch)

    assert not any(output.get("name") == "stderr" for output in outputs_of(notebook))
    text = text_of(notebook)
    assert "read the tables and the figures" in text  # the text is about another model
    assert "| 160 | 2 | 640 |" in text  # the window, two texts and their tokens
    assert "all removed (a sliding window)" in text
    assert "weight on the key's line" in text  # the windows have room for a passkey prompt
    assert "PI, 9 steps" not in text  # the last fine-tune of each method is shown, no other
    printed = "".join(output.get("text", "") for output in outputs_of(notebook))
    assert ("PI, 10 steps" in text) == tuned
    assert ("A sentence." in printed) == tuned
    if tuned:
        assert count_pictures(notebook) == 10
    else:
        assert count_pictures(notebook) == 9


# ---- the notebooks are committed as they ran -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_committed_executed(name):
    assert (NOTEBOOKS / name).stat().st_size < 2 * 2**20
    notebook = committed(name)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs_of(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert count_pictures(notebook) > 0
