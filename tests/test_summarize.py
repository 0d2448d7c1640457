"""summarize.py: a tiny model that knows its reports, ROUGE beside the library, runs that resume."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import prompts
import summarize
from batches import sample_reports
from conftest import english
from model import LLaMA, LLaMAConfig

pytest.importorskip("rouge_score")
ROOT = Path(__file__).resolve().parent.parent
WINDOW = 160
SUMMARIES = [
    "The key is 417 and the sky is blue.\nIt was the worst of times.",
    "Grass is green; there and back again.",
    "Find the hidden info, memorize it, and I will quiz you.",
    "The sun is yellow.\nHere we go again.",
    "Irrelevant text. Lots of it, 90210 times.",
]
REPORTS = [(english(20 + 12 * i, seed=i), summary) for i, summary in enumerate(SUMMARIES)]
RANDOM = ("--temperature", "4", "--top_p", "1")  # texts that differ wherever they can


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory) -> Path:
    """model: trained on REPORTS until it knows their summaries.  reports.jsonl: the reports."""
    folder = tmp_path_factory.mktemp("summaries")
    torch.manual_seed(0)
    config = LLaMAConfig(
        vocab_size=tok.vocab_size,
        n_layer=2,
        n_embd=64,
        intermediate_size=128,
        block_size=WINDOW,
        bos_id=tok.bos_id,
        eos_id=tok.eos_id,
    )
    model = LLaMA(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    options = dict(batch_size=5, seed=0, max_input=60)
    for step in range(120):
        x, y = sample_reports(REPORTS, tok, WINDOW, step, range(5), **options)
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    checkpoint.save(model, folder / "model", tok)
    write_reports(folder / "reports.jsonl", REPORTS)
    return folder


def write_reports(path: Path, reports: list[tuple[str, str]]) -> None:
    rows = [{"document": document, "summary": summary} for document, summary in reports]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, out: Path, *flags: str) -> list[dict]:
    """Run the script on the reports; returns the lines of its file of summaries."""
    argv = ["--init", str(folder / "model"), "--data", str(folder / "reports.jsonl")]
    argv += ["--max_input", "60", "--max_new_tokens", "50", "--device", "cpu"]
    argv += ["--out", str(out), "--json", str(out.with_suffix(".json"))]
    argv += flags
    summarize.main(argv)
    return read_lines(out)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summaries(lines: list[dict]) -> dict[int, str]:
    return {line["index"]: line["summary"] for line in lines}


# ---- the summaries -------------------------------------------------------------------------------


def test_summaries_known_by_heart_and_rouge_as_the_library_has_it(folder, tmp_path, capsys):
    from rouge_score import rouge_scorer

    lines = run(folder, tmp_path / "a.jsonl", "--temperature", "0.1")
    lines.sort(key=lambda line: line["index"])
    assert [line["index"] for line in lines] == list(range(5))
    assert [line["reference"] for line in lines] == SUMMARIES
    for line, (document, _) in zip(lines, REPORTS):
        assert document.startswith(line["document"])
    assert sum(line["summary"] == line["reference"] for line in lines) >= 4

    result = json.loads((tmp_path / "a.json").read_text())
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]  # some of the references have two lines
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(line["reference"], line["summary"]) for line in lines]
    assert list(result["rouge"]) == kinds
    assert result["documents"] == 5
    for kind in kinds:
        mean = 100 * np.mean([score[kind].fmeasure for score in scores])
        assert mean > 80
        assert result["rouge"][kind]["f"] == pytest.approx(mean)
        assert result["rouge"][kind]["low"] <= mean <= result["rouge"][kind]["high"]
    printed = capsys.readouterr().out
    for text in ("5 documents cut to 60 tokens", "the paper's figure", "60.0", "28.0", "29.5"):
        assert text in printed
    assert f"{result['rouge']['rouge2']['f']:.1f} [" in printed


def test_summaries_depend_on_seed_and_document_alone(folder, tmp_path):
    first = summaries(run(folder, tmp_path / "1.jsonl", *RANDOM, "--batch_size", "1"))
    assert len(set(first.values())) == 5
    for size in ("2", "5"):
        lines = run(folder, tmp_path / f"{size}.jsonl", *RANDOM, "--batch_size", size)
        assert summaries(lines) == first

    few = run(folder, tmp_path / "few.jsonl", *RANDOM, "--max_documents", "2")
    assert len(few) == 2
    assert summaries(few).items() <= first.items()
    # Without the limit the others are added to the same file
    lines = run(folder, tmp_path / "few.jsonl", *RANDOM)
    assert lines[:2] == few
    assert summaries(lines) == first

    other = summaries(run(folder, tmp_path / "other.jsonl", *RANDOM, "--seed", "1"))
    assert all(other[number] != first[number] for number in first)


@pytest.fixture
def model_and_tokenizer(folder):
    model = checkpoint.load(folder / "model").eval()
    return model, checkpoint.load_tokenizer(folder / "model", model.config)


def test_generation_is_the_models_own(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    tokenizer = replace(tokenizer, eos_id=None)  # so that the only end is a token that never comes
    model.config.eos_id = 499
    ids = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(0))

    greedy = summarize.Settings(60, 30, temperature=0.0, top_p=1.0, seed=0)
    texts = summarize.write(model, tokenizer, ids, [0, 1, 2], greedy)
    expected = model.generate(ids, 30)[:, 20:].tolist()
    assert texts == [tokenizer.decode(row).strip() for row in expected]

    # A row is drawn with a seed made of --seed and the number of its document
    sampled = summarize.Settings(60, 30, temperature=1.0, top_p=0.9, seed=3)
    texts = summarize.write(model, tokenizer, ids, [5, 7, 9], sampled)
    seed = int(np.random.SeedSequence([3, 7]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(seed)
    row = model.generate(ids[1:2], 30, temperature=1.0, top_p=0.9, generator=generator)[0, 20:]
    assert texts[1] == tokenizer.decode(row.tolist()).strip()


class Speaker(LLaMA):
    """A model that says the tokens of `lines`, one column a step, whatever it reads."""

    lines = torch.tensor([[30, 40, 50, 2, 70, 70], [60, 2, 80, 80, 80, 80], [90] * 6])

    def __init__(self, eos_id: int | tuple[int, ...] | None) -> None:
        super().__init__(LLaMAConfig(vocab_size=100, n_layer=1, n_embd=8, eos_id=eos_id))
        self.steps = 0

    def next_token_logits(self, ids, cache):
        self.steps += 1
        return 1e4 * torch.nn.functional.one_hot(self.lines[:, self.steps - 1], 100)


@pytest.mark.parametrize(
    "eos_id, lengths, steps",
    [
        (2, [3, 1, 6], 6),
        ((2, 90), [3, 1, 0], 4),  # several ends; after four steps every text has met one
        (None, [6, 6, 6], 6),
    ],
)
def test_summaries_end_before_the_first_end_token(eos_id, lengths, steps, tok):
    model = Speaker(eos_id)
    settings = summarize.Settings(60, 6, temperature=0.5, top_p=0.95, seed=0)
    tokenizer = replace(tok, eos_id=None)
    ids = torch.ones(3, 2, dtype=torch.int64)
    texts = summarize.write(model, tokenizer, ids, [0, 1, 2], settings)
    expected = [line[:length] for line, length in zip(model.lines.tolist(), lengths)]
    assert texts == [tok.decode(tokens).strip() for tokens in expected]
    assert model.steps == steps


@pytest.mark.parametrize(
    "batch_size, expected",
    [
        (None, [[3], [0, 5], [1, 2, 4, 6]]),
        (1, [[3], [0], [5], [1], [2], [4], [6]]),
        (2, [[3], [0, 5], [1, 2], [4, 6]]),
    ],
)
def test_batches_have_prompts_of_one_length_the_longest_first(
    model_and_tokenizer, tmp_path, monkeypatch, batch_size, expected
):
    model, tokenizer = model_and_tokenizer
    batches = []

    def write(model, tokenizer, ids, numbers, settings):
        batches.append(numbers)
        return ["text"] * len(numbers)

    monkeypatch.setattr(summarize, "write", write)
    reports = [("key " * n, "summary") for n in (5, 7, 7, 3, 7, 5, 7)]
    settings = summarize.Settings(60, 10, temperature=0.0, top_p=1.0, seed=0)
    path = tmp_path / "a.jsonl"
    summarize.summarize(model, tokenizer, reports, range(7), settings, path, batch_size)
    assert batches == expected[::-1]


# ---- the file of summaries -----------------------------------------------------------------------


def test_an_interrupted_run_makes_the_missing_summaries(folder, tmp_path, monkeypatch):
    flags = RANDOM + ("--batch_size", "2")
    whole = run(folder, tmp_path / "whole.jsonl", *flags)
    out = tmp_path / "out.jsonl"
    write = summarize.write
    batches = []  # the numbers of the documents of each call

    def interrupted(model, tokenizer, ids, numbers, settings):
        batches.append(numbers)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return write(model, tokenizer, ids, numbers, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(summarize, "write", interrupted)
        run(folder, out, *flags)
    lines = read_lines(out)
    assert 0 < len(lines) < 5
    assert lines == whole[: len(lines)]

    def recorded(model, tokenizer, ids, numbers, settings):
        batches.append(numbers)
        return write(model, tokenizer, ids, numbers, settings)

    # The run may also have been ended in the middle of a line, or of a character
    monkeypatch.setattr(summarize, "write", recorded)
    finished = out.read_bytes()
    out.write_bytes(finished + '{"index": 3, "document": "é'.encode()[:-1])
    batches.clear()
    assert summaries(run(folder, out, *flags)) == summaries(whole)
    complete = out.read_bytes()
    assert complete.startswith(finished)
    made = sorted(itertools.chain(*batches))
    assert made == sorted(set(range(5)) - summaries(lines).keys())

    # Nothing is left to do
    batches.clear()
    run(folder, out, *flags)
    assert batches == []
    assert out.read_bytes() == complete


def test_other_settings_are_refused(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    first = run(folder, out)
    for change in (
        ("--temperature", "0.7"),
        ("--seed", "1"),
        ("--max_input", "50"),
        ("--summary_field", "document"),
    ):
        with pytest.raises(ValueError, match=r"out\.jsonl was not made with this.*--overwrite"):
            run(folder, out, *change)
    assert run(folder, out) == first
    assert run(folder, out, "--seed", "1", "--overwrite") != first


@pytest.mark.parametrize("text", ["a page of something else", "{}\n", '{"index": 0}\n', "[1]\n"])
def test_a_file_of_something_else_is_refused_and_kept(folder, tmp_path, text):
    out = tmp_path / "out.jsonl"
    out.write_text(text)
    with pytest.raises(ValueError, match="was not made with") as error:
        run(folder, out)
    assert "\n" not in str(error.value)
    assert out.read_text() == text


def test_the_fingerprint_is_of_settings_and_weights(folder):
    model = checkpoint.load(folder / "model")
    first = summarize.fingerprint(model, 1)
    assert summarize.fingerprint(checkpoint.load(folder / "model"), 1) == first
    assert summarize.fingerprint(model, 2) != first
    model.layers[1].mlp.up_proj.weight.data += 1e-4
    assert summarize.fingerprint(model, 1) != first


# ---- ROUGE ---------------------------------------------------------------------------------------


def test_words_are_stemmed():
    lines = [{"reference": "The keys were hidden", "summary": "the key was hidden"}]
    assert summarize.rouge(lines, ["rouge1"], 0, "")["rouge1"]["f"] == pytest.approx(75)


def test_intervals():
    scores = np.random.default_rng(0).normal([50, 10], [10, 1], (400, 2))
    low, high = summarize.intervals(scores, 0)
    error = 1.96 * scores.std(axis=0) / 20
    assert np.allclose(high - low, 2 * error, rtol=0.1)
    assert np.allclose((high + low) / 2, scores.mean(axis=0), atol=0.2)
    assert np.array_equal(summarize.intervals(scores, 0), [low, high])


def test_one_document_without_lines(folder, tmp_path, capsys):
    path = tmp_path / "one.jsonl"
    write_reports(path, REPORTS[1:2])
    run(folder, tmp_path / "a.jsonl", "--data", str(path), "--temperature", "0")
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["rouge"]) == ["rouge1", "rouge2", "rougeL"]
    assert result["rouge"]["rouge1"] == {"f": pytest.approx(100), "low": None, "high": None}
    assert "bootstrap" not in capsys.readouterr().out


# ---- the command line ----------------------------------------------------------------------------


def test_two_checkpoints_a_hub_data_set_and_the_default_places(
    folder, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "govreport").mkdir()
    write_reports(tmp_path / "govreport" / "test.jsonl", REPORTS)
    model = checkpoint.load(folder / "model")
    tokenizer = checkpoint.load_tokenizer(folder / "model", model.config)
    for name in ("a", "b"):
        checkpoint.save(model, name, tokenizer)

    data = "hf:govreport,split=test,take=3"
    argv = ["--init", "a", "b", "--data", data, "--max_new_tokens", "40", "--device", "cpu"]
    summarize.main(argv)
    results = json.loads((tmp_path / "rouge.json").read_text())
    assert [result["init"] for result in results] == ["a", "b"]
    assert results[0]["rouge"] == results[1]["rouge"]
    # A document takes all that the window leaves
    assert results[0]["max_input"] == WINDOW - 40 - prompts.report_frame_tokens(tokenizer)
    texts = Path("a", "summaries.jsonl").read_text()
    assert texts == Path("b", "summaries.jsonl").read_text()
    assert texts.count("\n") == 3
    assert data in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, message",
    [
        (
            '{"document": "x"}',
            'reports.jsonl, row 2 has no field `summary`',
        ),
        (
            '{"document": "x", "summary": " \\n"}',
            "reports.jsonl, row 2: its field `summary` is empty",
        ),
        (
            '{"document": "", "summary": "y"}',
            "reports.jsonl, row 2: its field `document` is empty",
        ),
        (
            '{"document": 3, "summary": "y"}',
            "reports.jsonl, row 2: its field `document` is not text",
        ),
    ],
)
def test_bad_reports(folder, tmp_path, line, message):
    path = tmp_path / "reports.jsonl"
    path.write_text('{"document": "x", "summary": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        run(folder, tmp_path / "out.jsonl", "--data", str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--max_input", "0", "must be a whole number of at least 1"),
        ("--max_new_tokens", "0", "must be a whole number of at least 1"),
        ("--max_documents", "0", "must be a whole number of at least 1"),
        ("--batch_size", "0", "must be a whole number of at least 1"),
        ("--temperature", "nan", "must be a number of at least 0"),
        ("--top_p", "0", "must be above 0 and at most 1"),
        ("--seed", "-1", "must be a whole number of at least 0"),
        ("--out", "texts.json", "must end in .jsonl"),
    ],
)
def test_bad_values_of_flags(folder, tmp_path, capsys, flag, value, message):
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out.jsonl", flag, value)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {flag}: " in error
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--max_input", "150"),
            r"--max_new_tokens: \d+ is beyond the window of .*, 160: --scale 2",
        ),
        (
            ("--max_new_tokens", "1000"),
            r"document, prompt and --max_new_tokens: \d+ is beyond the window",
        ),
        (("--init", "x"), "x is neither a folder"),
        (("--init", "x", "y"), "--out is for one checkpoint"),
    ],
)
def test_flags_that_do_not_go_together(folder, tmp_path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(folder, tmp_path / "out.jsonl", *flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_without_the_optional_libraries(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rouge_score", None)
        patch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
        message = r'ROUGE needs the library rouge_score: pip install -e "\.\[summaries\]"'
        with pytest.raises(ValueError, match=message):
            run(folder, out)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r'hf:a/b needs the library datasets: pip install -e "\.\[hub\]"'
    with pytest.raises(ValueError, match=message):
        run(folder, out, "--data", "hf:a/b")
    assert not out.exists()


def test_errors_are_one_line(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"document": "x", "summary": ""}\n')
    flags = ["--init", folder / "model", "--max_new_tokens", "20", "--data", path]
    command = [sys.executable, ROOT / "summarize.py"] + flags
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    message = f"summarize.py: error: {path}, row 1: its field `summary` is empty"
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
