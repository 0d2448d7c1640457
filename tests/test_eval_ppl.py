"""eval_ppl.py against a brute-force evaluation, one forward pass for each scored token, and its command line."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import data
import eval_ppl
from model import LLaMA, LLaMAConfig

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 16
LENGTHS = (37, 5, 16, 17, 1)  # no multiple of a stride, shorter than a window, one window, one token more, a single one


def make(**changes):
    """A small model with random weights everywhere (a new one's head is zero)."""
    torch.manual_seed(0)
    shape = dict(vocab_size=300, n_layer=2, n_head=2, n_embd=32, intermediate_size=48, block_size=64)
    model = LLaMA(LLaMAConfig(**shape | changes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def make_documents(lengths=LENGTHS, vocab_size=300):
    rng = np.random.default_rng(0)
    return [rng.integers(2, vocab_size, size=n).astype(np.uint16) for n in lengths]


@torch.no_grad()
def brute_force(model, document, window, stride, bos_id):
    """The loss of every scored token of a document, each from a forward pass over what may come before it."""
    bos = [] if bos_id is None else [bos_id]
    room, n, losses = window - len(bos), len(document), []
    for t in range(n):
        if t < room:
            start = 0  # the first window
        else:  # the window that ends where this token's group of `stride` does, or with the document
            start = min(n, room + ((t - room) // stride + 1) * stride) - room
        context = [*bos, *map(int, document[start:t])]
        if context:
            assert len(context) <= window - 1
            losses.append(-model(torch.tensor([context]))[0, -1].log_softmax(-1)[int(document[t])].item())
    return losses


class Recorder:
    """In place of a model: keeps what it is asked, and answers with a loss for each token id."""

    def __init__(self, loss=lambda ids: torch.zeros(ids.shape), vocab_size=10**6):
        self.config, self.loss, self.calls = SimpleNamespace(vocab_size=vocab_size), loss, []
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))

    def nll(self, ids, targets):
        self.calls.append((ids, targets))
        return torch.where(targets == -100, 0.0, self.loss(targets).float())


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("stride", [1, 5, 8, WINDOW - 1])
def test_perplexity_equals_brute_force(stride, bos_id):
    model, documents = make(), make_documents()
    losses = [brute_force(model, document, WINDOW, stride, bos_id) for document in documents]
    result = eval_ppl.perplexity(model, documents, WINDOW, stride, bos_id)
    everything = [x for document in losses for x in document]
    assert result["tokens"] == len(everything) == sum(LENGTHS) - (0 if bos_id else len(LENGTHS))
    assert result["nll"] == pytest.approx(np.mean(everything), rel=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(np.mean(everything)), rel=1e-4)
    assert result["documents"] == sum(map(bool, losses)) and result["window"] == WINDOW


def test_more_context_is_read_where_it_is_allowed():
    """The brute force above would not notice if all windows gave the same: they don't."""
    model, documents = make(), make_documents()
    settings = ((16, 1), (16, 15), (8, 1), (32, 8))
    values = [eval_ppl.perplexity(model, documents, window, stride, 1)["nll"] for window, stride in settings]
    assert len({round(value, 4) for value in values}) == 4


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("window, stride", [(16, 1), (16, 7), (16, 15), (2, 1), (64, 16)])
def test_every_token_is_scored_once(window, stride, bos_id):
    model = Recorder()
    ends = np.cumsum([0, *LENGTHS]) + 2
    documents = [np.arange(a, b) for a, b in zip(ends, ends[1:])]  # every token of every document is another one
    eval_ppl.perplexity(model, documents, window, stride, bos_id, batch_tokens=3 * window)
    scored = []
    for ids, targets in model.calls:
        assert ids.size(1) <= window - 1 and (bos_id is None or (ids[:, 0] == bos_id).all())
        for row, wanted in zip(ids.tolist(), targets.tolist()):
            document = next(d for d in documents if row[-1] in d or wanted[-1] in d)
            assert set(row) - {bos_id} <= set(document.tolist())  # never across documents
            for i, token in enumerate(wanted):
                if token != -100:
                    scored.append(token)
                    before = token - document[0] + (bos_id is not None)  # what there is; i + 1 of it is read
                    assert min(before, window - stride) <= i + 1 <= window - 1
                    assert row[i] == (token - 1 if i or bos_id is None else bos_id)
    firsts = set() if bos_id else {int(d[0]) for d in documents}
    assert sorted(scored) == sorted({int(t) for d in documents for t in d} - firsts)


def test_logits_are_asked_for_only_where_scored():
    model = Recorder()
    eval_ppl.perplexity(model, [np.arange(2, 102)], 32, 4, 1)
    counts = torch.cat([(targets != -100).sum(1) for _, targets in model.calls]).tolist()
    assert sorted(counts) == [1] + [4] * 17 + [31]  # the first window's 31, seventeen times the stride, what is left


def test_the_mean_is_over_tokens_and_the_error_over_documents():
    documents = [np.full(n, value) for n, value in ((100, 2), (10, 8), (40, 4))]
    result = eval_ppl.perplexity(Recorder(lambda ids: ids / 4), documents, 32, 8, 1)
    losses, counts = np.array([2, 8, 4]) / 4, np.array([100, 10, 40])
    mean = (losses * counts).sum() / 150
    assert result["nll"] == pytest.approx(mean) and abs(mean - losses.mean()) > 0.3  # the unweighted mean is another
    squares = sum((count * (loss - mean)) ** 2 for loss, count in zip(losses, counts))
    assert result["stderr"] == pytest.approx(math.sqrt(3 / 2 * squares) / 150)


def test_the_error_of_equal_documents_is_the_textbook_one():
    values = [2, 8, 4, 5]
    result = eval_ppl.perplexity(Recorder(), [np.full(20, v) for v in values], 32, 8, 1)
    assert result["stderr"] == 0
    result = eval_ppl.perplexity(Recorder(lambda ids: ids / 1.0), [np.full(20, v) for v in values], 32, 8, 1)
    assert result["stderr"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert eval_ppl.perplexity(Recorder(), [np.full(20, 2)], 32, 8, 1)["stderr"] is None


@pytest.mark.parametrize("batch_tokens", [1, 40, 10**6])
def test_batches_change_nothing(batch_tokens):
    model, documents = make(), make_documents((50, 50, 23, 9, 70))
    one = eval_ppl.perplexity(model, documents, WINDOW, 6, 1, batch_tokens=WINDOW)
    other = eval_ppl.perplexity(model, documents, WINDOW, 6, 1, batch_tokens=batch_tokens)
    assert other["nll"] == pytest.approx(one["nll"], rel=1e-6)
    assert other["stderr"] == pytest.approx(one["stderr"], rel=1e-5)
    assert other["tokens"] == one["tokens"]


@pytest.mark.parametrize("bos_id", [None, 1])
def test_loss_by_position_equals_brute_force(bos_id):
    model, documents = make(), make_documents()
    size = WINDOW - (bos_id is not None)
    full = [d[i : i + size] for d in documents for i in range(0, len(d) - size + 1, size)]
    assert len(full) == 4  # 2 + 0 + 1 + 1 + 0
    expected = np.mean([brute_force(model, part, WINDOW, 1, bos_id) for part in full], axis=0)
    found = eval_ppl.position_nll(model, documents, WINDOW, bos_id, batch_tokens=40)
    assert found.shape == (WINDOW - 1,) and np.allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="fills"):
        eval_ppl.position_nll(model, documents, 64, bos_id)


def test_documents_are_chosen_by_length_cut_and_drawn_by_seed():
    documents = make_documents((10, 20, 30, 40, 50))
    chosen, short = eval_ppl.choose_documents(documents, 20, 25)
    assert [len(d) for d in chosen] == [20, 25, 25, 25] and short == 1
    drawn = [eval_ppl.choose_documents(documents, 1, None, 3, seed)[0] for seed in (0, 0, 1, 2, 3)]
    lengths = [[len(d) for d in chosen] for chosen in drawn]
    assert lengths[0] == lengths[1] == sorted(lengths[0]) and len({tuple(x) for x in lengths}) > 1


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(stride=16), "stride 16"),
        (dict(stride=0), "stride 0"),
        (dict(window=1), "window"),
        (dict(documents=[]), "nothing to score"),
        (dict(documents=[np.array([3])], bos_id=None), "nothing to score"),
        (dict(documents=[np.array([3, 300])]), "token id 300 is out of range"),
        (dict(bos_id=300), "token id 300 is out of range"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, says):
    call = dict(documents=make_documents(), window=WINDOW, stride=8, bos_id=1) | change
    with pytest.raises(ValueError, match=says):
        eval_ppl.perplexity(make(), **call)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        eval_ppl.perplexity(Recorder(lambda ids: ids * float("nan")), make_documents(), WINDOW, 8, 1)


# ---- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, `base` and `pi` (its window extended twofold), and text/."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    words = ["window", "position", "angle", "interpolates", "the", "a", "of", "12345", "between", "two", "keys."]
    for i, n in enumerate((300, 150, 220, 20)):
        (folder / f"text/{i}.txt").write_text(" ".join(rng.choice(words, size=n)))
    tokenizer = data.train_tokenizer([p.read_text() for p in sorted(folder.glob("text/*"))], 300)
    checkpoint.save(make(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id), folder / "base", tokenizer)
    checkpoint.save(checkpoint.load(folder / "base", scale=2), folder / "pi", tokenizer)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys, tmp_path):
    """Run the script in this process, with results in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eval_ppl.py"])

    def run(*args, outputs=True):
        where = ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")] if outputs else []
        try:
            checkpoint.run(lambda: eval_ppl.main(["--device", "cpu", *args, *where]))
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


TEXT = ["--data", "text", "--windows"]


def test_the_script_from_end_to_end(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "eval_ppl.py", "--init", "base", *TEXT, "16,32,64", "--stride", "8", "--by_position"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "base/ppl.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "base/ppl.json").read_text())
    expected = {"init": "base", "rope": "none", "scale": 1, "stride": 8, "documents": 3, "left_out": 1}
    assert expected.items() <= result.items()
    assert [row["window"] for row in result["windows"]] == [16, 32, 64]
    for row in result["windows"]:
        assert set(row) == {"window", "ppl", "nll", "stderr", "tokens"}
        assert row["ppl"] == pytest.approx(math.exp(row["nll"])) and f"{row['ppl']:.2f} ±" in done.stdout
    assert len({row["tokens"] for row in result["windows"]}) == 1  # every window scores the same text
    assert len(result["positions"]["nll"]) == 63 and result["positions"]["window"] == 64


@pytest.mark.parametrize(
    "flags", [["--scale", "4"], ["--scale", "4", "--rope", "none"], ["--scale", "2", "--rope", "yarn"]], ids=" ".join
)
def test_flags_extend_as_loading_does(run, folder, tmp_path, flags):
    """And the figures are those of the library functions, which need no command line."""
    code, out, _ = run("--init", "base", *flags, *TEXT, "128", "--stride", "32", "--max_tokens", "200")
    assert code == 0
    model = checkpoint.load(folder / "base", scale=float(flags[1]), rope=flags[3] if len(flags) > 2 else "linear")
    tokenizer = data.load_tokenizer(folder / "base")
    documents = [tokenizer.encode(p.read_text())[:200] for p in sorted(folder.glob("text/*"))]
    expected = eval_ppl.perplexity(model, [d for d in documents if len(d) >= 128], 128, 32, tokenizer.bos_id)
    result = json.loads((tmp_path / "p.json").read_text())
    assert result["windows"][0]["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert result["windows"][0]["tokens"] == expected["tokens"]
    assert (result["rope"], result["scale"]) == (model.config.rope, model.config.scale)


def test_several_checkpoints_side_by_side(run, tmp_path):
    code, out, _ = run("--init", "base", "pi", "--data", "text")
    assert code == 0
    base, pi = json.loads((tmp_path / "p.json").read_text())
    assert [row["window"] for row in base["windows"]] == [64]  # the window in force
    assert [row["window"] for row in pi["windows"]] == [64, 128]  # the original one and its doublings
    assert base["documents"] == pi["documents"] and base["stride"] == pi["stride"] == 32
    assert base["windows"][0]["tokens"] == pi["windows"][0]["tokens"]  # the same text, whatever the other windows are
    lines = [line.split() for line in out.splitlines() if line.startswith(("base", "pi"))]
    assert [line[:3] for line in lines] == [["base", "none", "1"], ["pi", "linear", "2"]] and lines[0][-1] == "-"
    same = run("--init", "base,pi", "--data", "text", "--batch_size", "1")
    assert same[1] == out


@pytest.fixture
def runs(folder, tmp_path):
    """As train.py --save_at leaves them: PI after 0, 9 and 10 steps, direct fine-tuning after 0 and 10."""
    tokenizer = data.load_tokenizer(folder / "base")
    for run, method, kept in (("PI", "linear", (0, 9, 10)), ("direct", "none", (0, 10))):
        for steps in kept:
            model = checkpoint.load(folder / "base", scale=2, rope=method)
            with torch.no_grad():
                model.lm_head.weight.mul_(1 - steps / 20)  # another perplexity at each step
            checkpoint.save(model, tmp_path / f"{run}/step-{steps}", tokenizer)
    return tmp_path


def test_over_steps(run, runs, tmp_path):
    """A row for each run and window, a column for each step in the order of numbers; figures as those of each alone."""
    init = [str(path) for name in ("PI", "direct") for path in sorted(runs.glob(f"{name}/step-*"))]
    assert [Path(name).name for name in init[:3]] == ["step-0", "step-10", "step-9"]  # as the shell has them
    code, out, err = run("--init", *init, *TEXT, "64,128", "--stride", "32", "--max_documents", "1")
    assert code == 0, err
    results = json.loads((tmp_path / "p.json").read_text())
    places = [(Path(r["init"]).parent.name, Path(r["init"]).name, r["steps"], r["rope"]) for r in results]
    assert places == [
        *(("PI", f"step-{n}", n, "linear") for n in (0, 10, 9)), *(("direct", f"step-{n}", n, "none") for n in (0, 10)),
    ]  # fmt: skip
    ppl = {(r["rope"], r["steps"], w["window"]): f"{w['ppl']:.2f}" for r in results for w in r["windows"]}
    assert len(set(ppl.values())) == 10
    lines = [re.split("  +", line) for line in out.splitlines()]
    assert ["run", "window", "step 0", "step 9", "step 10"] in lines
    for name, method in (("PI", "linear"), ("direct", "none")):
        for window in (64, 128):
            row = [f"{runs}/{name} ({method}, scale 2)", str(window)]
            assert [*row, *(ppl.get((method, steps, window), "-") for steps in (0, 9, 10))] in lines
    alone = run("--init", init[1], *TEXT, "64,128", "--stride", "32", "--max_documents", "1")
    assert ppl["linear", 10, 64] in alone[1] and ppl["linear", 10, 128] in alone[1]
    assert "steps" not in json.loads((tmp_path / "p.json").read_text()) and "step 10" not in alone[1]


def test_one_step_of_several_runs_is_a_comparison_as_any(run, runs, tmp_path):
    init = [f"{runs}/PI/step-10", f"{runs}/direct/step-10"]
    code, out, _ = run("--init", *init, *TEXT, "64", "--stride", "32")
    assert code == 0 and all(re.search(rf"^{name} +\w+ +2 ", out, re.M) for name in init)
    assert not any("steps" in r for r in json.loads((tmp_path / "p.json").read_text()))


@pytest.mark.parametrize(
    "names, steps",
    [
        (["a/step-0", "a/step-200", "b/step-1000/"], [0, 200, 1000]),
        (["a/step-0", "a"], []),
        (["a/step-0", "a/step-last"], []),
        (["a/step-0", "a/step-1.5"], []),
        (["a/step-5"], []),
        (["a/step-5", "b/step-5"], []),
    ],
)
def test_what_is_taken_for_a_run_over_steps(names, steps):
    assert eval_ppl.steps_of(names) == steps


def test_the_picture_over_steps():
    """A line for each run and window; its points in the order of steps, a missing one left out."""
    rows = [
        ("PI", 64, {0: 9.0, 200: 7.0, 1000: 6.5}),
        ("PI", 128, {0: 60.0, 1000: 6.0}),
        ("direct", 64, {200: 8.0, 0: 9.5}),
    ]
    _, (axis,) = eval_ppl.new_figure(1)
    eval_ppl.draw_over_steps(axis, rows)
    drawn = {line.get_label(): [list(map(float, values)) for values in line.get_data()] for line in axis.lines}
    assert drawn == {
        "PI, 64 tokens": [[0, 200, 1000], [9, 7, 6.5]],
        "PI, 128 tokens": [[0, 1000], [60, 6]],
        "direct, 64 tokens": [[0, 200], [9.5, 8]],
    }
    assert axis.get_xscale() == "linear" and axis.get_yscale() == "log"
    looks = [(line.get_color(), line.get_marker()) for line in axis.lines]
    assert looks[0][0] == looks[1][0] != looks[2][0] and looks[0][1] == looks[2][1] != looks[1][1]
    _, (axis,) = eval_ppl.new_figure(1)
    eval_ppl.draw_over_steps(axis, [("PI", 64, dict.fromkeys((0, 200, 400, 600, 800, 1000, 10000), 7.0))])
    assert list(axis.get_xticks()) == [10000, 1000, 600, 200, 0]  # no two of them in each other's way
    assert axis.get_ylabel() == "perplexity at 64 tokens" and axis.lines[0].get_label() == "PI"


def test_the_default_text_is_what_training_holds_out(run, tmp_path):
    cut = ("--max_documents", "1", "--max_tokens", "64")
    code, out, _ = run("--init", "base", "--windows", "64", "--stride", "63", *cut)
    assert code == 0 and "the standard library's sources, val; 1 of " in out
    assert json.loads((tmp_path / "p.json").read_text())["split"] == "val"


@pytest.mark.parametrize(
    "args, says",
    [
        (["--init", "nowhere"], "nowhere"),
        (["--init", "text"], "config.json"),
        (["--init", "base", "nowhere"], "nowhere"),
        (["--windows", "128"], "--scale 2 interpolates to it, --scale 2 --rope none extrapolates"),
        (["--init", "pi", "--windows", "200"], "--scale 4 allows it"),
        (["--windows", "64", "--stride", "64"], "--stride 64"),
        (["--stride", "0"], "--stride 0"),
        (["--windows", "1"], "--windows"),
        (["--windows", "16,many"], "many"),
        (["--windows", "1.5"], "--windows"),
        (["--scale", "0"], "scale"),
        (["--scale", "nan"], "scale"),
        (["--scale", "inf"], "scale"),
        (["--scale", "0.5"], "at least 1"),
        (["--rope", "alibi"], "alibi"),
        (["--init", "pi", "--rope", "none"], "pi"),
        (["--max_tokens", "32", "--windows", "64"], "--max_tokens 32"),
        (["--max_documents", "0"], "--max_documents"),
        (["--min_tokens", "-1"], "--min_tokens"),
        (["--batch_size", "0"], "--batch_size"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--plot", "p.jpeg2"], ".png"),
        (["--json", "."], "--json"),
        (["--json", "text/0.txt/p.json"], "--json"),
        (["--device", "abacus"], "abacus"),
        (["--no_such_flag"], "--no_such_flag"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, folder, args, says):
    given = ["--init", "base", "--data", "text"]
    before = sorted(folder.rglob("*"))
    try:
        code, out, err = run(*given, *args, outputs=False)
    finally:
        assert sorted(folder.rglob("*")) == before  # nothing is written
    assert code == 2 and out == ""
    assert err.startswith("eval_ppl.py: error: ") and err.count("\n") == 1 and says in err


def test_text_that_is_too_short_is_refused(run, folder, tmp_path):
    code, out, err = run("--init", "base", "--data", "text/3.txt", "--windows", "64", "--min_tokens", "5000")
    assert code == 2 and out == "" and not list(tmp_path.iterdir())
    assert "no document of at least 5000 tokens" in err.splitlines()[-1]
    (tmp_path / "empty.txt").write_text(" \n")
    code, out, err = run("--init", "base", "--data", str(tmp_path / "empty.txt"))
    assert code == 2 and out == "" and err.count("\n") == 1 and "no text" in err


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(run, folder, tmp_path):
    tokenizer = data.load_tokenizer(folder / "base")
    checkpoint.save(make(vocab_size=200), tmp_path / "small", tokenizer)
    code, out, err = run("--init", str(tmp_path / "small"), "--data", "text")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "300 tokens" in err and "200" in err and not (tmp_path / "p.json").exists()


def test_results_go_beside_the_checkpoint(folder, tmp_path, monkeypatch):
    """For a hub id, whose files lie in a cache, into out/NAME."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "read_config", lambda name, *_, **__: None)

    def place(*init):
        args = eval_ppl.parse(["--init", *init, "--device", "cpu"])
        eval_ppl.prepare(args, "ppl")
        return str(args.json), str(args.plot)

    assert place(f"{folder}/base") == (f"{folder}/base/ppl.json", f"{folder}/base/ppl.png")
    for name in ("a/step-0", "a/step-10", "out/a/step-0", "out/b/step-10"):
        (tmp_path / name).mkdir(parents=True)
    assert place("a/step-0", "a/step-10") == ("a/ppl_steps.json", "a/ppl_steps.png")  # a/ppl.json is a's own
    assert place("out/a/step-0", "out/b/step-10") == ("out/ppl_steps.json", "out/ppl_steps.png")
    assert place(f"{folder}/base", f"{folder}/pi") == (f"{folder}/ppl.json", f"{folder}/ppl.png")
    assert place("owner/Name-7b@main") == ("out/Name-7b/ppl.json", "out/Name-7b/ppl.png")
    assert place("owner/Name-7b", f"{folder}/pi") == ("out/ppl.json", "out/ppl.png")
