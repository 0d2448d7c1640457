"""summarize.py: a tiny model that knows its reports by heart, ROUGE against the library itself, runs that resume."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import sequences
import summarize
from conftest import english
from model import LLaMA, LLaMAConfig

pytest.importorskip("rouge_score")
ROOT = Path(__file__).resolve().parent.parent
WINDOW = 160
REPORTS = [
    (english(20 + 12 * i, seed=i), summary)
    for i, summary in enumerate([
        "The key is 417 and the sky is blue.\nIt was the worst of times.",
        "Grass is green; there and back again.",
        "Find the hidden info, memorize it, and I will quiz you.",
        "The sun is yellow.\nHere we go again.",
        "Irrelevant text. Lots of it, 90210 times.",
    ])
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tok, tmp_path_factory):
    """A checkpoint that was trained on REPORTS until it knew their summaries, and reports.jsonl beside it."""
    place = tmp_path_factory.mktemp("summaries")
    torch.manual_seed(0)
    ends = dict(bos_id=tok.bos_id, eos_id=tok.eos_id)
    model = LLaMA(LLaMAConfig(vocab_size=tok.vocab_size, n_layer=2, n_head=4, n_embd=64, intermediate_size=128,
                              block_size=WINDOW, **ends))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        x, y = sequences.sample_reports(REPORTS, tok, WINDOW, step, range(5), batch_size=5, seed=0, max_input=60)
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    checkpoint.save(model, place / "model", tok)
    write_reports(place / "reports.jsonl", REPORTS)
    return place


def write_reports(path, reports):
    path.write_text("".join(json.dumps({"document": d, "summary": s}) + "\n" for d, s in reports))


def run(folder, out, *more):
    """summarize.main on the reports; the lines of its texts."""
    summarize.main([
        "--init", str(folder / "model"), "--data", str(folder / "reports.jsonl"), "--max_input", "60",
        "--max_new_tokens", "50", "--device", "cpu", "--out", str(out), "--json", str(out.with_suffix(".json")), *more,
    ])  # fmt: skip
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_summaries_known_by_heart_and_rouge_as_the_library_has_it(folder, tmp_path, capsys):
    from rouge_score import rouge_scorer

    lines = sorted(run(folder, tmp_path / "a.jsonl", "--temperature", "0.1"), key=lambda line: line["index"])
    assert [line["index"] for line in lines] == list(range(5))
    assert [line["reference"] for line in lines] == [summary for _, summary in REPORTS]
    assert all(document.startswith(line["document"]) for line, (document, _) in zip(lines, REPORTS))
    assert sum(line["summary"] == line["reference"] for line in lines) >= 4

    result = json.loads((tmp_path / "a.json").read_text())
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]  # some of the references have lines
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(line["reference"], line["summary"]) for line in lines]
    assert list(result["rouge"]) == kinds and result["documents"] == 5
    for kind in kinds:
        mean = 100 * np.mean([score[kind].fmeasure for score in scores])
        assert result["rouge"][kind]["f"] == pytest.approx(mean) and mean > 80
        assert result["rouge"][kind]["low"] <= mean <= result["rouge"][kind]["high"]
    printed = capsys.readouterr().out
    assert "the paper's figure" in printed and "60.0" in printed and "28.0" in printed and "29.5" in printed
    assert f"{result['rouge']['rouge2']['f']:.1f} [" in printed


def test_an_interrupted_run_goes_on_with_the_same_texts(folder, tmp_path, monkeypatch):
    options = ("--temperature", "4", "--top_p", "1", "--batch_size", "2")  # as random as can be
    whole = tmp_path / "whole.jsonl"
    lines = run(folder, whole, *options)
    assert len({line["summary"] for line in lines}) == 5
    write, calls = summarize.write, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(summarize, "write", interrupted)
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, *options)
    found = out.read_bytes()
    assert 0 < len(found) < len(whole.read_bytes()) and whole.read_bytes().startswith(found)
    out.write_bytes(found + b'{"index": 3, "docum')  # and killed while it wrote
    run(folder, out, *options)
    assert out.read_bytes() == whole.read_bytes()
    n = len(calls)
    run(folder, out, *options)  # nothing to do
    assert len(calls) == n and out.read_bytes() == whole.read_bytes()
    out.write_bytes(b"".join(found.splitlines(keepends=True)[:1]))  # a batch that is half there
    run(folder, out, *options)
    assert out.read_bytes() == whole.read_bytes()
    prompts = [args[1].tolist() for args in calls]
    assert prompts[n:] == prompts[:2] + prompts[3:n]  # whole batches again: rounding depends on them


def test_other_settings_are_refused(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    first = run(folder, out)
    for change in (("--temperature", "0.7"), ("--seed", "1"), ("--max_input", "50"), ("--summary_field", "document")):
        with pytest.raises(ValueError, match=r"out\.jsonl was not made with this checkpoint.*--overwrite"):
            run(folder, out, *change)
    assert run(folder, out) == first
    assert run(folder, out, "--seed", "1", "--overwrite") != first
    for other in ("a page of something else", "{}\n", '{"index": 0}\n', "[1]\n"):
        out.write_text(other)
        with pytest.raises(ValueError, match="was not made with"):
            run(folder, out)
        assert out.read_text() == other
    # other weights of the same shape
    model = checkpoint.load(folder / "model")
    settings = summarize.fingerprint(model, 1)
    model.layers[1].mlp.up_proj.weight.data += 1e-4
    assert summarize.fingerprint(model, 1) != settings == summarize.fingerprint(checkpoint.load(folder / "model"), 1)


def test_texts_depend_on_seed_and_document_alone(folder, tmp_path):
    random = ("--temperature", "4", "--top_p", "1")
    texts = {}
    for size in ("1", "2", "5"):
        lines = run(folder, tmp_path / f"{size}.jsonl", *random, "--batch_size", size)
        texts[size] = {line["index"]: line["summary"] for line in lines}
    assert texts["1"] == texts["2"] == texts["5"] and len(set(texts["1"].values())) == 5
    few = run(folder, tmp_path / "few.jsonl", *random, "--max_documents", "2")
    assert len(few) == 2 and all(texts["1"][line["index"]] == line["summary"] for line in few)
    more = run(folder, tmp_path / "few.jsonl", *random)  # the others are added
    assert more[:2] == few and {line["index"]: line["summary"] for line in more} == texts["1"]
    other = run(folder, tmp_path / "other.jsonl", *random, "--seed", "1")
    assert all(texts["1"][line["index"]] != line["summary"] for line in other)


def test_batches_have_prompts_of_one_length():
    prompts = {i: [0] * n for i, n in enumerate([5, 7, 7, 3, 7, 5, 7])}
    assert summarize.batches(prompts, 2, 10) == [[1, 2], [4, 6], [0, 5], [3]]
    assert summarize.batches(prompts, None, 10) == [[1, 2, 4, 6], [0, 5], [3]]
    assert summarize.batches(prompts, None, 16377) == [[1], [2], [4], [6], [0], [5], [3]]


class Speaker:
    """In place of a model: says its lines whatever it is asked, row by row."""

    def __init__(self, *lines):
        self.config = LLaMAConfig(vocab_size=10, n_layer=1, n_head=1, n_embd=8)
        self.lines, self.asked = torch.tensor(lines), []
        self.lm_head = lambda steps: 1e4 * torch.nn.functional.one_hot(steps, 10).float()
        self.lm_head.weight = torch.zeros(1)

    def hidden(self, ids, cache, last):
        self.asked.append(ids.tolist())
        return self.lines[:, len(self.asked) - 1 : len(self.asked)]


@pytest.mark.parametrize("stop, expected, steps", [
    ({2}, [[3, 4, 5], [6], [9, 9, 9, 9, 9, 9]], 6),
    ({2, 9}, [[3, 4, 5], [6], []], 4),  # several ends of a text; all have met one
    ({None}, [[3, 4, 5, 2, 7, 7], [6, 2, 8, 8, 8, 8], [9] * 6], 6),
])  # fmt: skip
def test_texts_end_at_any_of_the_stops(stop, expected, steps):
    model = Speaker([3, 4, 5, 2, 7, 7], [6, 2, 8, 8, 8, 8], [9] * 6)
    prompts = torch.tensor([[1, 1], [1, 2], [1, 3]])
    assert summarize.write(model, prompts, [0, 1, 2], 6, 0.5, 0.95, stop) == expected
    assert model.asked[:2] == [prompts.tolist(), [[3], [6], [9]]] and len(model.asked) == steps


def test_generation_with_the_cache_equals_the_models_own(folder):
    model, stop = checkpoint.load(folder / "model").eval(), {checkpoint.read_config(folder / "model").eos_id}
    prompts = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(0))
    texts = summarize.write(model, prompts, [0, 0, 0], 30, 0.0, 1.0, set())
    assert texts == model.generate(prompts, 30)[:, 20:].tolist()
    one = torch.Generator().manual_seed(7)
    expected = model.generate(prompts[1:2], 30, temperature=1.0, top_p=0.9, generator=one)[0, 20:].tolist()
    assert summarize.write(model, prompts, [5, 7, 9], 30, 1.0, 0.9, set())[1] == expected
    assert all(not stop & set(text) for text in summarize.write(model, prompts, [1, 2, 3], 30, 1.0, 1.0, stop))


def test_words_are_stemmed():
    lines = [{"reference": "The keys were hidden", "summary": "the key was hidden"}]
    assert summarize.rouge(lines, ["rouge1"], 0, "")["rouge1"]["f"] == pytest.approx(75)  # key is keys


def test_intervals():
    scores = np.random.default_rng(0).normal([50, 10], [10, 1], (400, 2))
    low, high = summarize.intervals(scores, 0)
    error = 1.96 * scores.std(axis=0) / 20
    assert np.allclose(high - low, 2 * error, rtol=0.1) and np.allclose((high + low) / 2, scores.mean(0), atol=0.2)
    assert np.array_equal(summarize.intervals(scores, 0), [low, high])


def test_one_document_without_lines(folder, tmp_path, capsys):
    write_reports(tmp_path / "one.jsonl", REPORTS[1:2])
    run(folder, tmp_path / "a.jsonl", "--data", str(tmp_path / "one.jsonl"), "--temperature", "0")
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["rouge"]) == ["rouge1", "rouge2", "rougeL"]
    assert result["rouge"]["rouge1"] == {"f": pytest.approx(100), "low": None, "high": None}
    assert "bootstrap" not in capsys.readouterr().out


def test_two_checkpoints_a_hub_data_set_and_the_default_places(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "govreport").mkdir()
    write_reports(tmp_path / "govreport" / "test.jsonl", REPORTS)
    model = checkpoint.load(folder / "model")
    for name in ("a", "b"):
        checkpoint.save(model, name, checkpoint.load_tokenizer(folder / "model", model.config))
    data = "hf:govreport,split=test,take=3"
    summarize.main(["--init", "a", "b", "--data", data, "--max_new_tokens", "40", "--device", "cpu"])
    results = json.loads((tmp_path / "rouge.json").read_text())
    assert [result["init"] for result in results] == ["a", "b"] and results[0]["rouge"] == results[1]["rouge"]
    # all that the window leaves
    frame = sequences.report_frame_tokens(checkpoint.load_tokenizer("a", model.config))
    assert results[0]["max_input"] == WINDOW - 40 - frame
    texts = [Path(name, "summaries.jsonl").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1] and texts[0].count("\n") == 3
    assert data in capsys.readouterr().out


@pytest.mark.parametrize("line, message", [
    ('{"document": "x"}', 'reports.jsonl, line 2: expected a JSON object with a field "document" and a field'),
    ('{"document": "x", "summary": " \\n"}', "reports.jsonl, row 2: its field `summary` is empty"),
    ('{"document": "", "summary": "y"}', "reports.jsonl, row 2: its field `document` is empty"),
    ('{"document": 3, "summary": "y"}', "reports.jsonl, row 2: its field `document` is not text"),
])  # fmt: skip
def test_bad_reports(folder, tmp_path, line, message):
    (tmp_path / "reports.jsonl").write_text('{"document": "x", "summary": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        run(folder, tmp_path / "out.jsonl", "--data", str(tmp_path / "reports.jsonl"))
    assert "\n" not in str(error.value) and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("flags, message", [
    (("--max_input", "150"), r"document, prompt and --max_new_tokens: \d+ is beyond the window of .*, 160: --scale 2"),
    (("--max_new_tokens", "1000"), r"document, prompt and --max_new_tokens: \d+ is beyond the window"),
    (("--max_input", "0"), "--max_input must be at least 1"),
    (("--max_new_tokens", "0"), "--max_new_tokens must be at least 1"),
    (("--max_documents", "0"), "--max_documents must be at least 1"),
    (("--batch_size", "0"), "--batch_size must be at least 1"),
    (("--temperature", "nan"), "--temperature must be at least 0"),
    (("--top_p", "0"), "--top_p above 0"),
    (("--seed", "-1"), "--seed must be at least 0"),
    (("--init", "x,y"), "x is neither a folder"),
    (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
])  # fmt: skip
def test_bad_flags(folder, tmp_path, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(folder, tmp_path / "out.jsonl", *flags)
    assert not (tmp_path / "out.jsonl").exists()


def test_several_checkpoints_have_several_texts(folder, tmp_path):
    with pytest.raises(ValueError, match="--out takes the texts of one checkpoint"):
        run(folder, tmp_path / "out.jsonl", "--init", f"{folder / 'model'},{folder / 'model'}")


def test_without_the_optional_libraries(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rouge_score", None)
        patch.delitem(sys.modules, "rouge_score.rouge_scorer", raising=False)
        with pytest.raises(ValueError, match=r'ROUGE needs the library rouge_score: pip install -e "\.\[summaries\]"'):
            run(folder, tmp_path / "out.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'hf:a/b needs the library datasets: pip install -e "\.\[hub\]"'):
        run(folder, tmp_path / "out.jsonl", "--data", "hf:a/b")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_line_says_it_in_one_line(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"document": "x", "summary": ""}\n')
    for flags, message in (
        (["--data", str(tmp_path / "a.jsonl")], "a.jsonl, row 1: its field `summary` is empty"),
        ([], "the following arguments are required: --data"),
    ):
        command = [sys.executable, ROOT / "summarize.py", "--init", folder / "model", "--max_new_tokens", "20", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
        assert done.stderr.startswith("summarize.py: error: ") and message in done.stderr
