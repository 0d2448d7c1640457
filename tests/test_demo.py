"""demo.py: sentences that follow the numbers, stages that are kept or redone, the whole of it on a very small scale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import demo

ROOT = Path(__file__).parent.parent
KS = [128, 256, 384, 512]


def row(name: str, steps: int, near: float, far: float, k_max: int) -> dict:
    points = [{"k": k, "success": 1.0 if k <= k_max else 0.0} for k in KS]
    return {"name": name, "rope": demo.METHODS.get(name, "none"), "steps": steps, "ppl": {"256": near, "512": far},
            "k_max": k_max, "points": points}  # fmt: skip


def rows(**change) -> list[dict]:
    """What the paper would have us see, but for the rows that are changed."""
    made = {
        "base": row("base", 0, 16.0, 42.0, 0), "untuned": row("PI", 0, 20.0, 20.5, 0),
        "pi": row("PI", 200, 15.8, 15.6, 512), "direct": row("direct", 200, 15.9, 16.4, 128),
    } | change  # fmt: skip
    return list(made.values())


def test_the_sentences_of_a_success():
    first, second = demo.summary(rows(), 256, 512)
    for words in ("blows up 2.6-fold, from 16.0 to 42.0", "20.5 there, better than", "after 200 steps 15.6, at or below the base",
                  "falling as the window", "direct fine-tuning has 16.4"):  # fmt: skip
        assert words in first
    assert "PI finds keys over the whole window (k_max 512) after 200 steps, further than direct" in second
    assert "no further than the original window (k_max 128 of 512)" in second


@pytest.mark.parametrize("change, sentence, there, gone", [
    (dict(base=row("base", 0, 16.0, 16.5, 0)), 0, "does not blow up (16.0 at 256, 16.5 at 512)", "blows up"),
    (dict(untuned=row("PI", 0, 60.0, 61.0, 0)), 0, "61.0 there, no better than", "61.0 there, better"),
    (dict(pi=row("PI", 200, 17.0, 17.6, 512)), 0, "17.6, 10% above the base", "at or below"),
    (dict(pi=row("PI", 200, 15.0, 15.6, 512)), 0, "not falling as the window", ", falling"),
    (dict(pi=row("PI", 200, 15.8, 15.6, 384)), 1, "beyond the original window, though not to the end (k_max 384 of 512)", "whole window"),
    (dict(pi=row("PI", 200, 15.8, 15.6, 128)), 1, "as far as direct fine-tuning", "further than direct"),
    (dict(direct=row("direct", 200, 15.9, 16.4, 512), pi=row("PI", 200, 15.8, 15.6, 0)), 1, "less far than direct", "further than direct"),
])  # fmt: skip
def test_the_sentences_follow_the_numbers(change, sentence, there, gone):
    text = demo.summary(rows(**change), 256, 512)[sentence]
    assert there in text and gone not in text


def test_a_stage_is_kept_until_its_settings_change(tmp_path):
    made = []

    def work():
        made.append(1)
        return {"value": len(made)}

    file = tmp_path / "stage.json"
    assert demo.stage(file, {"steps": 1}, work)["value"] == 1
    assert demo.stage(file, {"steps": 1}, work)["value"] == 1
    assert demo.stage(file, {"steps": 2}, work)["value"] == 2
    assert demo.stage(file, {"steps": 1}, work)["value"] == 3


def test_spread_over_seeds():
    text = demo.spread([rows(), rows(pi=row("PI", 200, 16.8, 16.6, 256))])
    line = next(line for line in text.splitlines() if line.startswith("PI") and " 200 " in line)
    assert "16.30 ± 0.71" in line and "16.10 ± 0.71" in line and "384 ± 181" in line and "512, 256" in line


@pytest.mark.parametrize("flags, words", [
    (["--scale", "1"], ["--scale", "above 1"]),
    (["--steps", "ten"], ["--steps", "ten"]),
    (["--seeds", "-1"], ["--seeds", "-1"]),
    (["--init", "nowhere"], ["nowhere"]),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, flags, words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo.py"), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr
    assert not list(tmp_path.iterdir())


def test_the_whole_demo_very_small(tmp_path):
    text = [str(ROOT / name) for name in ("model.py", "checkpoint.py", "data.py", "train.py", "eval_ppl.py", "rope.py")]
    command = [sys.executable, str(ROOT / "demo.py"), "--data", *text, "--base_steps", "4", "--steps", "1,2", "--distances", "2",
               "--tries", "1", "--documents", "1", "--max_tokens", "600", "--device", "cpu"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    first = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "out/demo/demo.json").read_text())
    assert [(row["name"], row["rope"], row["steps"]) for row in result["rows"]] == [
        ("base", "none", 0), ("PI", "linear", 0), ("PI", "linear", 1), ("PI", "linear", 2), ("direct", "none", 1), ("direct", "none", 2),
    ]  # fmt: skip
    assert all(set(row["ppl"]) == {"128", "256", "512"} and row["k_max"] == 0 for row in result["rows"])
    assert result["seconds"] > 0 and all(sentence in first.stdout for sentence in result["summary"])
    for picture in ("demo.png", "demo_steps.png"):
        assert (tmp_path / "out/demo" / picture).read_bytes().startswith(b"\x89PNG")
    # again: everything is kept, and says the same
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and again.stderr.count("kept from an earlier run") == 9, again.stderr
    assert again.stdout == first.stdout
