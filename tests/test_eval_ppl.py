"""eval_ppl.py: perplexity beside one forward pass for each scored token, and the command line."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import eval_ppl
from conftest import assert_refused, random_model
from tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 16
# No multiple of a stride; shorter than a window; one window; one token more; a single token
LENGTHS = (37, 5, 16, 17, 1)


def random_documents(lengths=LENGTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 300, size=n).astype(np.uint16) for n in lengths]


@torch.no_grad()
def brute_force(model, document, window: int, stride: int, bos_id: int | None) -> list[float]:
    """The loss of every scored token, each from a forward pass over what may come before it."""
    bos = [] if bos_id is None else [bos_id]
    room = window - len(bos)
    n = len(document)
    losses = []
    for t in range(n):
        if t < room:
            start = 0
        else:
            # The window ends where this token's group of `stride` tokens ends, or with the document
            group = (t - room) // stride
            end = min(n, room + (group + 1) * stride)
            start = end - room
        context = bos + document[start:t].tolist()
        if context:
            assert len(context) <= window - 1
            logits = model(torch.tensor([context]))[0, -1]
            losses.append(-logits.log_softmax(-1)[int(document[t])].item())
    return losses


class Recorder:
    """In place of a model: records what it is asked, and answers with a loss for each token id."""

    def __init__(self, loss: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like) -> None:
        self.config = SimpleNamespace(vocab_size=10**6)
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))
        self.loss = loss
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def nll(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls.append((ids, targets))
        return torch.where(targets == -100, 0.0, self.loss(targets).float())


def quarter_of_id(ids: torch.Tensor) -> torch.Tensor:
    return ids / 4


# ---- perplexity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("stride", [1, 5, 8, WINDOW - 1])
def test_perplexity_equals_brute_force(stride, bos_id):
    model = random_model()
    losses = []
    scored_documents = 0
    for document in random_documents():
        found = brute_force(model, document, WINDOW, stride, bos_id)
        losses += found
        scored_documents += bool(found)
    result = eval_ppl.perplexity(model, random_documents(), WINDOW, stride, bos_id)
    unscored = len(LENGTHS) if bos_id is None else 0
    assert result["tokens"] == len(losses) == sum(LENGTHS) - unscored
    assert result["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert sum(one["tokens"] > 0 for one in result["by_document"]) == scored_documents
    assert result["window"] == WINDOW


def test_window_and_stride_change_the_result():
    """The brute force above would not notice if all windows gave the same."""
    model = random_model()
    documents = random_documents()
    values = set()
    for window, stride in ((16, 1), (16, 15), (8, 1), (32, 8)):
        nll = eval_ppl.perplexity(model, documents, window, stride, 1)["nll"]
        values.add(round(nll, 4))
    assert len(values) == 4


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("window, stride", [(16, 1), (16, 7), (16, 15), (2, 1), (64, 16)])
def test_every_token_is_scored_once_after_its_own_document(window, stride, bos_id):
    # No token comes twice in all the documents, so that each tells where it is from
    documents = []
    first = 2
    for length in LENGTHS:
        documents.append(range(first, first + length))
        first += length
    model = Recorder()
    eval_ppl.perplexity(model, documents, window, stride, bos_id, batch_tokens=3 * window)

    has_bos = bos_id is not None
    scored = []
    for ids, targets in model.calls:
        assert ids.size(1) <= window - 1
        for row, wanted in zip(ids.tolist(), targets.tolist()):
            document = next(d for d in documents if wanted[-1] in d)
            if has_bos:
                assert row[0] == bos_id
            assert set(row) - {bos_id} <= set(document)
            for i, token in enumerate(wanted):
                if token == -100:
                    continue
                scored.append(token)
                before = token - document[0] + has_bos
                assert min(before, window - stride) <= i + 1 <= window - 1
                if i > 0 or not has_bos:
                    assert row[i] == token - 1
    expected = [token for document in documents for token in document]
    if not has_bos:
        expected = [token for document in documents for token in document[1:]]
    assert sorted(scored) == expected


def test_targets_are_asked_for_only_where_scored():
    model = Recorder()
    eval_ppl.perplexity(model, [np.arange(2, 102)], window=32, stride=4, bos_id=1)
    counts = []
    for _, targets in model.calls:
        counts += (targets != -100).sum(1).tolist()
    # The first window scores 31 tokens, seventeen more score the stride, the last what is left
    assert sorted(counts) == [1] + [4] * 17 + [31]


def test_the_mean_is_over_tokens_and_the_error_over_documents():
    losses = np.array([0.5, 2.0, 1.0])
    counts = np.array([100, 10, 40])
    documents = [np.full(n, int(4 * loss)) for n, loss in zip(counts, losses)]
    result = eval_ppl.perplexity(Recorder(quarter_of_id), documents, 32, 8, 1)
    mean = (losses * counts).sum() / 150
    assert result["nll"] == pytest.approx(mean)
    assert abs(mean - losses.mean()) > 0.3  # the mean over documents would be another
    squares = ((counts * (losses - mean)) ** 2).sum()
    assert result["stderr"] == pytest.approx(math.sqrt(3 / 2 * squares) / 150)


def test_the_difference_of_two_models_is_paired():
    """Documents of very different difficulty: the difference is the same in each, and certain."""
    documents = [np.full(21, 4 * i) for i in range(1, 5)]  # 20 scored tokens each, and losses i
    first = eval_ppl.perplexity(Recorder(quarter_of_id), documents, 32, 8)
    worse = Recorder(lambda ids: 1.5 + quarter_of_id(ids))
    second = eval_ppl.perplexity(worse, documents, 32, 8)
    assert first["stderr"] > 0.5
    assert eval_ppl.paired_difference(first, second) == pytest.approx((1.5, 0.0), abs=1e-6)
    # Where it differs by document, its error is the textbook one of the four differences
    steeper = eval_ppl.perplexity(Recorder(lambda ids: 2 * quarter_of_id(ids)), documents, 32, 8)
    difference, stderr = eval_ppl.paired_difference(first, steeper)
    assert difference == pytest.approx(2.5)
    assert stderr == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / math.sqrt(4))
    with pytest.raises(ValueError):
        eval_ppl.paired_difference(first, eval_ppl.perplexity(Recorder(), documents[:3], 32, 8))


def test_the_error_of_equally_long_documents_is_the_textbook_one():
    values = [2, 8, 4, 5]
    documents = [np.full(20, value) for value in values]
    assert eval_ppl.perplexity(Recorder(), documents, 32, 8, 1)["stderr"] == 0
    result = eval_ppl.perplexity(Recorder(quarter_of_id), documents, 32, 8, 1)
    assert result["stderr"] == pytest.approx(np.std(values, ddof=1) / 4 / math.sqrt(4))
    assert eval_ppl.perplexity(Recorder(), documents[:1], 32, 8, 1)["stderr"] is None


@pytest.mark.parametrize("batch_tokens", [1, 40, 10**6])
def test_batches_change_nothing(batch_tokens):
    model = random_model()
    documents = random_documents((50, 50, 23, 9, 70))
    one = eval_ppl.perplexity(model, documents, WINDOW, 6, 1, batch_tokens=WINDOW)
    other = eval_ppl.perplexity(model, documents, WINDOW, 6, 1, batch_tokens=batch_tokens)
    assert other["nll"] == pytest.approx(one["nll"], rel=1e-6)
    assert other["stderr"] == pytest.approx(one["stderr"], rel=1e-5)
    assert other["tokens"] == one["tokens"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"stride": 16}, "stride 16"),
        ({"stride": 0}, "stride 0"),
        ({"window": 1}, "window"),
        ({"documents": []}, "nothing to score"),
        ({"documents": [np.array([3])], "bos_id": None}, "nothing to score"),
        ({"documents": [np.array([3, 320])]}, "token id 320 is out of range"),
        ({"bos_id": 320}, "token id 320 is out of range"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, says):
    call = {"documents": random_documents(), "window": WINDOW, "stride": 8, "bos_id": 1}
    with pytest.raises(ValueError, match=says):
        eval_ppl.perplexity(random_model(), **call | change)


def test_a_loss_that_is_not_a_number_is_refused():
    model = Recorder(lambda ids: ids * math.nan)
    with pytest.raises(ValueError, match="nan"):
        eval_ppl.perplexity(model, random_documents(), WINDOW, 8, 1)


# ---- the loss by position, the choice of documents -----------------------------------------------


@pytest.mark.parametrize("bos_id", [None, 1])
def test_loss_by_position_equals_brute_force(bos_id):
    model = random_model()
    documents = random_documents()
    size = WINDOW - (bos_id is not None)
    losses = []
    for document in documents:
        for start in range(0, len(document) - size + 1, size):
            part = document[start : start + size]
            losses.append(brute_force(model, part, WINDOW, 1, bos_id))
    assert len(losses) == 4  # 2 + 0 + 1 + 1 + 0 windows
    found = eval_ppl.position_nll(model, documents, WINDOW, bos_id, batch_tokens=40)
    assert found.shape == (WINDOW - 1,)
    assert np.allclose(found, np.mean(losses, axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match="no document fills a window of 64 tokens"):
        eval_ppl.position_nll(model, documents, 64, bos_id)


def test_documents_are_chosen_by_length_and_cut():
    documents = random_documents((10, 20, 30, 40, 50))
    chosen, too_short = eval_ppl.choose_documents(documents, min_tokens=20, max_tokens=25)
    assert [len(tokens) for tokens in chosen] == [20, 25, 25, 25]
    assert too_short == 1
    assert chosen[1].tolist() == documents[2][:25].tolist()


def test_documents_are_drawn_by_seed_and_keep_their_order():
    documents = random_documents((10, 20, 30, 40, 50))

    def drawn(seed: int) -> list[int]:
        chosen, too_short = eval_ppl.choose_documents(documents, 1, max_documents=3, seed=seed)
        assert too_short == 0
        return [len(tokens) for tokens in chosen]

    assert drawn(0) == drawn(0) == sorted(drawn(0))
    assert len(drawn(0)) == 3
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1
    everything, _ = eval_ppl.choose_documents(documents, 1, max_documents=5)
    assert [len(tokens) for tokens in everything] == [10, 20, 30, 40, 50]


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, `base` and `pi` (its window extended twofold), and text/."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    words = "window position angle interpolates the a of 12345 between two keys.".split()
    texts = []
    for i, n in enumerate((300, 150, 220, 20)):
        text = " ".join(rng.choice(words, size=n))
        (folder / f"text/{i}.txt").write_text(text)
        texts.append(text)
    tokenizer = train_tokenizer(texts, 300)
    base = random_model(vocab_size=300, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    checkpoint.save(base, folder / "base", tokenizer)
    checkpoint.save(checkpoint.load(folder / "base", scale=2), folder / "pi", tokenizer)
    return folder


@pytest.fixture
def run(folder, monkeypatch, command, tmp_path):
    """run(*flags) runs the script in `folder`, with its results in tmp_path."""
    monkeypatch.chdir(folder)

    def call(*flags: object):
        outputs = ["--json", tmp_path / "p.json", "--plot", tmp_path / "p.png"]
        return command(eval_ppl.main, "--device", "cpu", *outputs, *flags)

    return call


def table(text: str) -> list[list[str]]:
    """The cells of a printed table, which have two spaces or more between them."""
    return [re.split("  +", line) for line in text.splitlines()]


TEXT = ["--data", "text", "--windows"]


def test_the_script_from_end_to_end(folder):
    line = [sys.executable, ROOT / "eval_ppl.py", "--init", "base", "--data", "text"]
    line += ["--windows", "16,32,64", "--stride", "8", "--by_position"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "base/ppl.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "base/ppl.json").read_text())
    expected = {"init": "base", "rope": "none", "scale": 1, "stride": 8}
    expected |= {"documents": 3, "left_out": 1, "seed": 0, "split": "all"}
    assert expected.items() <= result.items()
    assert [row["window"] for row in result["windows"]] == [16, 32, 64]
    for row in result["windows"]:
        assert set(row) == {"window", "ppl", "nll", "stderr", "tokens", "by_document"}
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
        assert f"{row['ppl']:.2f} ±" in done.stdout
    assert len({row["tokens"] for row in result["windows"]}) == 1  # all windows score the same text
    assert result["positions"]["window"] == 64
    assert len(result["positions"]["nll"]) == 63


@pytest.mark.parametrize(
    "flags",
    [["--scale", "4"], ["--scale", "4", "--rope", "none"], ["--scale", "2", "--rope", "yarn"]],
    ids=" ".join,
)
def test_results_are_those_of_the_functions(run, folder, tmp_path, flags):
    """The flags extend a checkpoint as loading does, and no command line is needed."""
    arguments = [*TEXT, "128", "--stride", "32", "--max_tokens", "200"]
    assert run("--init", "base", *flags, *arguments).code == 0
    result = json.loads((tmp_path / "p.json").read_text())

    rope = flags[3] if len(flags) > 2 else "linear"
    model = checkpoint.load(folder / "base", scale=float(flags[1]), rope=rope)
    tokenizer = load_tokenizer(folder / "base")
    documents = []
    for path in sorted(folder.glob("text/*")):
        tokens = tokenizer.encode(path.read_text())[:200]
        if len(tokens) >= 128:
            documents.append(tokens)
    expected = eval_ppl.perplexity(model, documents, 128, 32, tokenizer.bos_id)
    assert result["windows"][0]["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert result["windows"][0]["tokens"] == expected["tokens"]
    assert result["rope"] == model.config.rope
    assert result["scale"] == model.config.scale


def test_several_checkpoints_side_by_side(run, tmp_path):
    ended = run("--init", "base", "pi", "--data", "text")
    assert ended.code == 0, ended.error
    base, pi = json.loads((tmp_path / "p.json").read_text())
    # By default: the original window and its doublings, up to the window in force
    assert [row["window"] for row in base["windows"]] == [64]
    assert [row["window"] for row in pi["windows"]] == [64, 128]
    # Both score the same text, though the windows of one are more than those of the other
    assert base["documents"] == pi["documents"]
    assert base["stride"] == pi["stride"] == 32
    assert base["windows"][0]["tokens"] == pi["windows"][0]["tokens"]
    rows = [row for row in table(ended.out) if row[0] in ("base", "pi")]
    assert [row[:3] for row in rows[:2]] == [["base", "not extended", "1"], ["pi", "PI", "2"]]
    assert rows[0][-1] == "-"
    assert run("--init", "base", "pi", "--data", "text", "--batch_size", "1").out == ended.out
    # The difference of the two, paired by document, at the window that both have
    expected, stderr = eval_ppl.paired_difference(base["windows"][0], pi["windows"][0])
    assert rows[2] == ["pi", f"{expected:+.4f} ± {stderr:.4f}", "-"]


def test_windows_may_be_written_with_commas_or_spaces(run):
    flags = ["--init", "base", "--data", "text", "--stride", "15"]
    assert run(*flags, "--windows", "16", "32").out == run(*flags, "--windows", "32,16").out


@pytest.fixture
def runs(folder, tmp_path):
    """Checkpoints as train.py --save_at keeps them, of two runs, PI and direct."""
    tokenizer = load_tokenizer(folder / "base")
    for run, rope, kept in (("PI", "linear", (0, 9, 10)), ("direct", "none", (0, 10))):
        for steps in kept:
            model = checkpoint.load(folder / "base", scale=2, rope=rope)
            with torch.no_grad():
                model.lm_head.weight.mul_(1 - steps / 20)  # another perplexity at each step
            checkpoint.save(model, tmp_path / f"{run}/step-{steps}", tokenizer)
    return tmp_path


def test_over_steps(run, runs, tmp_path):
    """The table has a row for each run and window, and a column for each step in numeric order."""
    init = []
    for name in ("PI", "direct"):
        init += sorted(str(path) for path in runs.glob(f"{name}/step-*"))
    assert [Path(name).name for name in init[:3]] == ["step-0", "step-10", "step-9"]
    flags = [*TEXT, "64,128", "--stride", "32", "--max_documents", "1"]
    ended = run("--init", *init, *flags)
    assert ended.code == 0, ended.error

    # The results are in the order of --init, each with its steps
    results = json.loads((tmp_path / "p.json").read_text())
    assert [result["init"] for result in results] == init
    assert [(result["rope"], result["steps"]) for result in results] == [
        ("linear", 0),
        ("linear", 10),
        ("linear", 9),
        ("none", 0),
        ("none", 10),
    ]
    ppl = {}
    for result in results:
        for row in result["windows"]:
            ppl[result["rope"], result["steps"], row["window"]] = f"{row['ppl']:.2f}"
    assert len(set(ppl.values())) == 10

    rows = table(ended.out)
    assert ["run", "window", "step 0", "step 9", "step 10"] in rows
    for name, rope, method in (("PI", "linear", "PI"), ("direct", "none", "direct fine-tuning")):
        for window in (64, 128):
            row = [f"{runs}/{name} ({method}, scale 2)", str(window)]
            row += [ppl.get((rope, steps, window), "-") for steps in (0, 9, 10)]
            assert row in rows

    # One of them alone gives the same figures, and is no result over steps
    alone = run("--init", init[1], *flags)
    assert ppl["linear", 10, 64] in alone.out
    assert ppl["linear", 10, 128] in alone.out
    assert "step 10" not in alone.out
    assert "steps" not in json.loads((tmp_path / "p.json").read_text())


def test_one_step_of_several_runs_is_a_comparison_like_any(run, runs, tmp_path):
    init = [f"{runs}/PI/step-10", f"{runs}/direct/step-10"]
    ended = run("--init", *init, *TEXT, "64", "--stride", "32")
    assert ended.code == 0, ended.error
    rows = [row[:3] for row in table(ended.out)]
    assert [init[0], "PI", "2"] in rows
    assert [init[1], "direct fine-tuning", "2"] in rows
    for result in json.loads((tmp_path / "p.json").read_text()):
        assert "steps" not in result


def test_the_default_text_is_what_training_holds_out(run, tmp_path):
    flags = ["--windows", "64", "--stride", "63", "--max_documents", "1", "--max_tokens", "64"]
    ended = run("--init", "base", *flags)
    assert ended.code == 0, ended.error
    # The first line tells how many documents one was drawn from
    assert re.match(
        r"perplexity by window: the standard library's sources, val; 1 of \d+ documents of at "
        r"least 64 tokens, cut to 64 \(\d+ shorter ones left out\), stride 63\n",
        ended.out,
    )
    assert json.loads((tmp_path / "p.json").read_text())["split"] == "val"


def test_different_tokenizers_are_told(run, folder, tmp_path):
    other = train_tokenizer(["other words, and so other tokens " * 9], 290)
    model = random_model(vocab_size=300, bos_id=other.bos_id, eos_id=other.eos_id)
    checkpoint.save(model, tmp_path / "other", other)
    flags = [*TEXT, "64", "--stride", "32"]
    assert "the tokenizers differ" in run("--init", "base", tmp_path / "other", *flags).error
    assert "the tokenizers differ" not in run("--init", "base", "pi", *flags).error


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--init", "nowhere"], "nowhere"),
        (["--init", "text"], "config.json"),
        (["--init", "base", "nowhere"], "nowhere"),
        (["--init", "base,pi"], "base,pi"),  # several are given with spaces
        (["--init", ""], "config.json"),
        (["--windows", "128"], "--windows 128 is beyond the window of base, 64: --scale 2 interp"),
        (["--init", "pi", "--windows", "200"], "--scale 4 allows it"),
        (["--windows", "64", "--stride", "64"], "--stride 64 must be below the smallest window"),
        (["--windows", "16", "64", "--stride", "16"], "--stride 16 must be below the smallest"),
        (["--stride", "0"], "argument --stride: must be a whole number of at least 1, got 0"),
        (["--windows", "1"], "--windows takes whole numbers of at least 2, got '1'"),
        (["--windows", "16,many"], "--windows takes whole numbers of at least 2, got 'many'"),
        (["--windows", "1.5"], "--windows takes whole numbers of at least 2, got '1.5'"),
        (["--scale", "0"], "scale"),
        (["--scale", "nan"], "scale"),
        (["--scale", "inf"], "scale"),
        (["--scale", "0.5"], "at least 1"),
        (["--rope", "alibi"], "alibi"),
        (["--init", "pi", "--rope", "none"], "pi"),
        (["--max_tokens", "32", "--windows", "64"], "--max_tokens 32 is below the window 64"),
        (["--max_tokens", "0"], "argument --max_tokens: must be a whole number of at least 1"),
        (["--max_documents", "0"], "argument --max_documents: must be a whole number"),
        (["--min_tokens", "-1"], "argument --min_tokens: must be a whole number of at least 1"),
        (["--batch_size", "0"], "argument --batch_size: must be a whole number of at least 1"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--split", "test"], "argument --split"),
        (["--plot", "p.jpeg2"], "argument --plot: p.jpeg2 must end in .png or .svg or .pdf"),
        (["--json", "."], "argument --json: . must end in .json"),
        (["--json", "text/0.txt/p.json"], "argument --json: text/0.txt/p.json can't be written"),
        (["--device", "abacus"], "--device abacus can't be used here"),
        (["--no_such_flag"], "--no_such_flag"),
    ],
)
def test_bad_input_is_refused(folder, monkeypatch, command, arguments, says):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    given = ["--device", "cpu", "--init", "base", "--data", "text"]
    assert_refused(command(eval_ppl.main, *given, *arguments), "eval_ppl.py", says)
    assert sorted(folder.rglob("*")) == before  # nothing is written


def test_text_that_is_too_short_is_refused(run, tmp_path):
    ended = run("--init", "base", *TEXT, "64", "--min_tokens", "5000")
    assert ended.code == 2
    assert ended.out == ""
    assert "text, all: no document of at least 5000 tokens" in ended.error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.txt").write_text(" \n")
    ended = run("--init", "base", "--data", tmp_path / "empty.txt")
    assert_refused(ended, "eval_ppl.py", "no text")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(run, folder, tmp_path):
    small = random_model(vocab_size=200)
    checkpoint.save(small, tmp_path / "small", load_tokenizer(folder / "base"))
    ended = run("--init", tmp_path / "small", "--data", "text")
    assert_refused(ended, "eval_ppl.py", "300 tokens")
    assert "200" in ended.error
    assert not (tmp_path / "p.json").exists()
