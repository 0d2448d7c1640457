"""demo.py: sentences that follow the numbers, stages that are kept or redone, a very small demo."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import cli
import data
import demo
import demo_plan
import eval_ppl
import recipe
import train
from parallel import states
from passkey import distances, k_max, retrieve, share_found
from train_flags import SHIPPED_BASE

ROOT = Path(__file__).parent.parent
DISTANCES = [128, 256, 384, 512]


def row(name: str, steps: int, near: float, far: float, found: list[float]) -> demo.Row:
    """A row with perplexities at 256 and 512, and the share of keys found at each of DISTANCES."""
    points = []
    for k, share in zip(DISTANCES, found):
        points.append({"k": k, "success": share, "hits": round(share * 10), "tries": 10})
    losses = {}
    spread = 0.001 if name == "PI" else 0.002
    for window, ppl in (("256", near), ("512", far)):
        # Two documents, of which the second is a little easier
        losses[window] = [
            {"loss": 100 * (math.log(ppl) + spread), "tokens": 100},
            {"loss": 100 * (math.log(ppl) - spread), "tokens": 100},
        ]
    return demo.Row(
        name, demo.METHODS.get(name, "none"), steps, {"256": near, "512": far}, k_max(points),
        share_found(points, 256)._asdict(), losses, points, []
    )


def rows(**changed) -> list[demo.Row]:
    """What the paper lets us expect, but for the rows that are changed."""
    expected = {
        "base": row("base", 0, 16.0, 42.0, [0, 0, 0, 0]),
        "untuned": row("PI", 0, 20.0, 20.5, [0, 0, 0, 0]),
        "pi": row("PI", 200, 15.8, 15.6, [1, 1, 1, 0.8]),
        "direct": row("direct", 200, 15.9, 16.4, [1, 0.1, 0.6, 0.2]),
    }
    return list((expected | changed).values())


# ---- the summary ---------------------------------------------------------------------------------


def test_the_sentences_of_a_success():
    breakdown, perplexity, difference, share, reach = demo.summary(rows(), 256, 512, "No far keys.")
    assert "blows up 2.6-fold, from 16.0 to 42.0" in breakdown
    assert "20.5 there, better than" in breakdown
    assert "After 200 steps PI has 15.6 at 512, at or below the base" in perplexity
    assert f"from 256 to 512 its loss changes by {math.log(15.6 / 15.8):+.4f} ± 0.0000" in perplexity
    assert f"minus that of direct fine-tuning is {math.log(15.6 / 16.4):+.4f}" in difference
    assert difference.endswith("PI reads better.")
    assert "PI finds 90% (70% to 97%) of the keys beyond the original window after 200" in share
    assert "direct fine-tuning 40% (22% to 61%)" in share
    assert "512 (the whole window) for PI" in reach
    assert "128 of 512 (within the original window) for direct" in reach
    assert reach.endswith("PI reaches further.")


@pytest.mark.parametrize(
    "changed, sentence, expected",
    [
        (
            {"base": row("base", 0, 16.0, 16.5, [0, 0, 0, 0])},
            0,
            "does not blow up (16.0 at 256, 16.5 at 512)",
        ),
        ({"untuned": row("PI", 0, 60.0, 61.0, [0, 0, 0, 0])}, 0, "61.0 there, no better than"),
        ({"pi": row("PI", 200, 17.0, 17.6, [1, 1, 1, 1])}, 1, "17.6 at 512, 10% above the base"),
        ({"pi": row("PI", 200, 15.8, 16.6, [1, 1, 1, 1])}, 2, "direct fine-tuning reads better."),
        ({"pi": row("PI", 200, 15.8, 16.4, [1, 1, 1, 1])}, 2, "they are as good."),
        ({"pi": row("PI", 200, 15.8, 15.6, [1, 0, 0, 0])}, 3, "PI finds 0% (0% to 16%) of the"),
        (
            {"pi": row("PI", 200, 15.8, 15.6, [1, 1, 1, 0])},
            4,
            "384 of 512 (beyond the original window) for PI",
        ),
        ({"pi": row("PI", 200, 15.8, 15.6, [1, 0, 0, 0])}, 4, "PI reaches as far."),
        ({"pi": row("PI", 200, 15.8, 15.6, [0, 1, 1, 1])}, 4, "PI reaches less far."),
    ],
)
def test_the_sentences_follow_the_numbers(changed, sentence, expected):
    assert expected in demo.summary(rows(**changed), 256, 512, "No far keys.")[sentence]
    assert expected not in demo.summary(rows(), 256, 512, "No far keys.")[sentence]


def test_the_passkeys_of_the_fine_tune_are_said():
    share = demo.summary(rows(), 256, 512, "No far keys.")[3]
    assert share.startswith("No far keys. PI finds 90% (70% to 97%) of the keys")
    expected = [
        ("text", False, 256, "on text alone, without passkeys."),
        ("retrieval", True, 512, "no passkey lies more than 256 tokens before its question."),
        ("retrieval", True, 200, "its question, and no text is longer than 200."),
        ("retrieval", False, 256, "its question, though positions skip through the extended window."),
    ]
    for mix, no_skip, row_tokens, words in expected:
        training = SimpleNamespace(mix=mix, no_skip=no_skip, row_tokens=row_tokens)
        assert demo.passkeys_in_training(training, 256).endswith(words)


def test_a_base_that_has_not_learned_retrieval_is_called_so():
    weak, able = ({"found": found, "low": found, "high": found} for found in (0.1, 0.9))
    base = rows()[0]
    said = demo.summary(rows(base=base._replace(own_keys=weak)), 256, 512, "No far keys.")
    assert "its own window the base finds 10% (10% to 10%) of the keys: it has not" in said[3]
    said = demo.summary(rows(base=base._replace(own_keys=able)), 256, 512, "No far keys.")
    assert said[3] == "In its own window the base finds 90% (90% to 90%) of the keys."


def test_a_difference_over_one_document_says_so():
    one = {name: row._replace(losses={w: d[:1] for w, d in row.losses.items()})
        for name, row in zip(("base", "untuned", "pi", "direct"), rows())}
    sentence = demo.summary(rows(**one), 256, 512, "text")[2]
    assert f"{math.log(15.6 / 16.4) - 0.001:+.4f} (one document): PI reads better." in sentence


def test_the_table_of_one_run_and_of_several():
    first = rows()
    second = rows(pi=row("PI", 200, 16.8, 16.6, [1, 1, 0, 0]))
    line = demo.table([first]).splitlines()[4]
    assert line.split() == ["PI", "linear", "200", "15.80", "15.60", "90%", "512"]
    line = demo.table([first, second]).splitlines()[4]
    assert "16.30 ± 0.71" in line
    assert "16.10 ± 0.71" in line
    assert "45% ± 64%" in line
    assert "384 ± 181" in line
    assert "512, 256" in line


# ---- the base that comes with the code -----------------------------------------------------------


def test_the_base_is_what_the_experiments_say(tmp_path):
    """A perplexity of 17.8 and 99% of the keys in its window; the text depends on Python's version."""
    base = checkpoint.load(SHIPPED_BASE, dtype=torch.float32).eval()
    tokenizer = checkpoint.load_tokenizer(SHIPPED_BASE, base.config)
    assert base.config.original_window == base.config.block_size == 256
    corpus = data.load_corpus(None, tokenizer, "val", cache=tmp_path)
    documents, _ = eval_ppl.choose_documents(corpus.documents(), 1024, 2048, 16)
    ppl = {}
    for window in (256, 1024):
        measured = eval_ppl.perplexity(base, documents, window, 128, tokenizer.bos_id)
        ppl[window] = measured["ppl"]
    assert 14 < ppl[256] < 22
    assert ppl[1024] > 2 * ppl[256]
    points = retrieve(base, tokenizer, 256, distances(256, 16), tries=5)
    assert share_found(points, 0).found > 0.9


# ---- the stages ----------------------------------------------------------------------------------


def test_a_stage_is_kept_until_its_settings_change(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"value": len(calls)}

    file = tmp_path / "stage.json"
    assert demo.stage(file, {"steps": 1}, work)["value"] == 1
    assert demo.stage(file, {"steps": 1}, work)["value"] == 1
    assert demo.stage(file, {"steps": 2}, work)["value"] == 2
    assert demo.stage(file, {"steps": 1}, work)["value"] == 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--scale", "1"], ["--scale", "above 1"]),
        (["--steps", "ten"], ["--steps", "ten"]),
        (["--seeds", "-1"], ["--seeds", "-1"]),
        (["--tries", "0"], ["--tries", "at least 1"]),
        (["--init", "nowhere"], ["nowhere"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--row_tokens", "1"], ["--row_tokens", "at least 2"]),
        (["--row_tokens", "2000"], ["--row_tokens 2000", "the window has 1024"]),
        (["--base_steps", "5"], ["--base_steps", "--scratch"]),
        (["--init", "nowhere", "--scratch"], ["--init", "--scratch"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: demo.main(flags))
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message
    assert not list(tmp_path.iterdir())


TRAIN = ["--data", str(ROOT / "rope.py"), "--init", "scratch", "--max_iters", "1", "--out", "run"]


def test_several_processes_train(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    demo.run_train(TRAIN, processes=2)
    assert "on 2 x cpu" in capfd.readouterr().err
    assert [state.name for state in states(Path("run"))] == ["step-1"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_training_ends_the_demo(tmp_path, monkeypatch, capfd, processes):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: demo.run_train(TRAIN + ["--grad_clip", "-1"], processes))
    assert end.value.code == 2
    errors = capfd.readouterr().err
    assert "--grad_clip: must be" in errors
    assert "Traceback" not in errors


def test_the_memory_of_a_training_is_freed_after_it(monkeypatch):
    """A model and its optimizer refer to each other, so that they would stay until Python cleans up."""
    models = []

    def make_circle(flags):
        model = torch.nn.Linear(1, 1)
        model.owner = [model]
        models.append(weakref.ref(model))

    monkeypatch.setattr(train, "main", make_circle)
    gc.disable()
    try:
        demo.run_train([], processes=1)
    finally:
        gc.enable()
    assert models[0]() is None


def interrupt(command: list[str], folder: Path, steps: int) -> str:
    """Start the demo, press Ctrl-C after so many steps of the base. Returns standard error."""
    log = folder / "out/demo/seed-0/base/log.jsonl"

    def hear_ctrl_c() -> None:  # it is ignored where the tests were started in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear_ctrl_c
    )
    deadline = time.monotonic() + 300
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    return errors


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "demo.py"), "--data", str(ROOT / "rope.py")]
    command += ["--scratch", "--base_steps", "5000", "--device", "cpu"]
    base = tmp_path / "out/demo/seed-0/base"
    saved = [0]
    for _ in range(2):
        errors = interrupt(command, tmp_path, saved[-1] + 1)
        assert "stopped at step" in errors
        assert "the same command goes on" in errors
        assert "Traceback" not in errors
        saved.append(int(states(base)[-1].name.removeprefix("step-")))
    assert 0 < saved[1] < saved[2] < 5000
    log = [json.loads(line)["iter"] for line in (base / "log.jsonl").read_text().splitlines()]
    assert log == list(range(1, saved[2] + 1))


def test_the_whole_demo_very_small(tmp_path, monkeypatch, capsys):
    """In this process, as on a machine with one core."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    names = ("model.py", "checkpoint.py", "data.py", "train.py", "eval_ppl.py", "rope.py")
    flags = ["--data"] + [str(ROOT / name) for name in names]
    flags += ["--scratch", "--base_steps", "4", "--scale", "2", "--steps", "1,2"]
    flags += ["--distances", "2", "--tries", "1"]
    flags += ["--documents", "1", "--max_tokens", "600", "--device", "cpu"]
    demo.main(flags)
    first = capsys.readouterr()

    out = tmp_path / "out/demo"
    result = json.loads((out / "demo.json").read_text())
    assert [(row["name"], row["rope"], row["steps"]) for row in result["rows"]] == [
        ("base", "none", 0),
        ("PI", "linear", 0),
        ("PI", "linear", 1),
        ("PI", "linear", 2),
        ("direct", "none", 1),
        ("direct", "none", 2),
    ]
    for row in result["rows"]:
        assert set(row["ppl"]) == set(row["losses"]) == {"256", "512"}
        assert row["k_max"] == 0
    assert result["rows"][0]["own_keys"]["found"] == 0
    assert result["seconds"] > 0
    assert all(sentence in first.out for sentence in result["summary"])
    for picture in ("demo.png", "demo_steps.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    # The same command again keeps every stage and says the same
    demo.main(flags)
    again = capsys.readouterr()
    assert again.err.count("kept from an earlier run") == 10, again.err
    assert again.out == first.out


def test_the_whole_demo_of_a_larger_model(tmp_path, monkeypatch, capfd):
    """One that the recipe takes for larger; it is the tiny base, because a larger one is slow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "TINY_PARAMS", 0)
    monkeypatch.setattr(demo_plan, "TINY_PARAMS", 0)
    names = ("model.py", "checkpoint.py", "data.py", "train.py", "eval_ppl.py", "rope.py")
    command = ["--data", *[str(ROOT / name) for name in names]]
    command += ["--init", str(SHIPPED_BASE), "--steps", "1,2", "--distances", "2"]
    command += ["--device", "cpu"]
    demo.main(command)
    first = capfd.readouterr()

    # The plan comes before all stages
    assert first.err.startswith("plan: 0.9 M parameters, window 256 -> 512, on cpu\n")
    assert "6 evaluations (--documents 1 --distances 2 --tries 1)" in first.err
    assert "GFLOP/s" in first.err[: first.err.index("== PI")]

    # Rows of text as long as the original window, 4,096 tokens in a step
    out = tmp_path / "out/demo"
    for name, rope in (("PI", "linear"), ("direct", "none")):
        flags = json.loads((out / f"seed-0/{name}/trainer/step-2/args.json").read_text())
        assert (flags["row_tokens"], flags["batch_size"], flags["mix"]) == (256, 16, "text")
        assert (flags["rope"], flags["warmup_iters"], flags["scale"]) == (rope, 0, 2)
    result = json.loads((out / "demo.json").read_text())
    assert "without passkeys" in first.out
    assert [(row["name"], row["steps"]) for row in result["rows"]] == [
        ("base", 0), ("PI", 0), ("PI", 1), ("PI", 2), ("direct", 1), ("direct", 2)
    ]
    assert len(result["rows"][0]["losses"]["512"]) == 1

    # The same command keeps all stages. With other rows the fine-tunes are trained and measured
    # anew; with another stride all is measured anew. (To save time nothing is really measured.)
    demo.main(command)
    again = capfd.readouterr()
    assert again.err.count("kept from an earlier run") == 9
    assert again.out == first.out
    measures = {name: result["rows"][0][name] for name in demo.Row._fields[3:-1]}
    monkeypatch.setattr(demo, "evaluate", lambda *_: measures)
    demo.main([*command, "--row_tokens", "128"])
    other_rows = capfd.readouterr().err
    assert other_rows.count("kept from an earlier run") == 3
    assert "each 2 steps of 32 x 128 tokens (positions skip through 512)" in other_rows
    settle = demo_plan.settle

    def settle_another_stride(args, config, device):
        settle(args, config, device)
        args.stride = 64

    monkeypatch.setattr(demo_plan, "settle", settle_another_stride)
    demo.main([*command, "--row_tokens", "128"])
    assert capfd.readouterr().err.count("kept from an earlier run") == 3
