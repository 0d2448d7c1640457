"""train_flags.py: what is extended where --init is not given, and a run's own flags on --resume."""

import json
import os

import pytest

import checkpoint
from train_flags import SHIPPED_BASE, base_notes, find_bases, parse


def make_base(folder, age):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))


def test_the_newest_base_is_extended(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "out/demo/seed-0/base", age=50)
    assert parse("", ["--scale", "2"]).init == "out/demo/seed-0/base"
    assert base_notes("out/demo/seed-0/base") == []
    make_base(tmp_path / "out/base", age=100)
    make_base(tmp_path / "out/demo/seed-1/base", age=20)
    assert [str(base) for base in find_bases()] == [
        "out/base", "out/demo/seed-0/base", "out/demo/seed-1/base"
    ]
    assert parse("", ["--scale", "2"]).init == "out/demo/seed-1/base"
    assert parse("", ["--rope", "none"]).init == "out/demo/seed-1/base"
    assert parse("", ["--scale", "2", "--init", "out/base"]).init == "out/base"
    assert base_notes("out/base") == []
    [note] = base_notes("out/demo/seed-1/base")
    assert "the newest of the 3 bases" in note
    # What is bad input must be the first line, so nothing is printed before the run begins
    assert capsys.readouterr() == ("", "")


def test_an_unfinished_base_is_noted(tmp_path):
    for step, planned in ((55, 2200), (60, 2200)):
        state = tmp_path / f"trainer/step-{step}"
        state.mkdir(parents=True)
        (state / "args.json").write_text(json.dumps({"max_iters": planned}))
    [note] = base_notes(str(tmp_path))
    assert "stopped at step 60 of 2,200" in note
    assert f"`python train.py --resume --out {tmp_path}`" in note
    (state / "args.json").write_text(json.dumps({"max_iters": 60}))
    assert base_notes(str(tmp_path)) == []
    assert base_notes("owner/name") == []


def test_where_no_base_was_made_the_one_that_comes_with_the_code_is_extended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init = parse("", ["--scale", "2"]).init
    assert init == str(SHIPPED_BASE)
    assert checkpoint.read_config(init).block_size == 256
    [note] = base_notes(init)
    assert "the tiny base that comes with the code" in note
    assert parse("", []).init == "scratch"
    with pytest.raises(SystemExit):
        parse("", ["--scale", "2", "--init", "scratch"])


def test_a_resumed_run_has_its_flags_unless_they_are_given_anew(tmp_path):
    state = tmp_path / "trainer/step-4"
    state.mkdir(parents=True)
    kept = {"init": "a", "scale": 2.0, "max_iters": 8, "learning_rate": 0.5, "device": "auto", "out": str(tmp_path)}
    (state / "args.json").write_text(json.dumps(kept))
    args = parse("", ["--resume", "--out", str(tmp_path), "--max_iters", "9"])
    assert (args.init, args.scale, args.learning_rate, args.max_iters) == ("a", 2.0, 0.5, 9)


def test_a_run_of_another_version_is_not_resumed(tmp_path):
    state = tmp_path / "trainer/step-4"
    state.mkdir(parents=True)
    (state / "args.json").write_text(json.dumps({"init": "scratch", "short_share": 0.5}))
    with pytest.raises(ValueError, match="args.json has flags that are unknown here .short_share."):
        parse("", ["--resume", "--out", str(tmp_path)])


def test_a_resumed_base_is_not_extended_in_silence(tmp_path, capsys):
    state = tmp_path / "trainer/step-4"
    state.mkdir(parents=True)
    (state / "args.json").write_text(json.dumps({"init": "scratch"}))
    with pytest.raises(SystemExit):
        parse("", ["--resume", "--out", str(tmp_path), "--scale", "2"])
    assert "extend a model that is trained already" in capsys.readouterr().err
