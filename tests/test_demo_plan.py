"""demo_plan.py: defaults by size and device, the commands that the demo runs, and what they take."""

import os

import pytest
import torch

import cost
import demo
import demo_plan
import evaluation
from hf_config import extend
from model import LLaMA, LLaMAConfig
from train_flags import SHIPPED_BASE

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def settled(config, device, *flags):
    """The flags of demo.py as they are settled for a base."""
    args = demo.parse(list(flags))
    demo_plan.settle(args, config, device)
    return args


# ---- the defaults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, device, expected",
    [
        ("tiny", CPU, (4, 256, [25, 50, 100, 200], 16, 10, 16, 128, None, False)),
        ("tiny", GPU, (4, 256, [25, 50, 100, 200], 16, 10, 16, 128, None, False)),
        ("smollm2-135m", CPU, (2, 1024, [10, 20, 40], 4, 1, 1, 4096, 5, True)),
        ("smollm2-135m", GPU, (2, 2048, [50, 100, 200], 8, 5, 8, 4096, 20, True)),
        ("tinyllama-1.1b", GPU, (2, 2048, [50, 100, 200], 8, 5, 8, 1024, 20, True)),
    ],
)
def test_the_defaults_go_by_size_and_device(preset, device, expected):
    args = settled(LLaMAConfig.preset(preset), device)
    names = "scale row_tokens steps distances tries documents stride warmup_iters skip".split()
    assert tuple(getattr(args, name) for name in names) == expected


def test_rows_are_no_longer_than_the_original_window_unless_it_is_asked():
    config = LLaMAConfig.preset("smollm2-135m", block_size=512, original_window=512)
    assert settled(config, CPU).row_tokens == 512
    args = settled(config, CPU, "--row_tokens", "700", "--steps", "4", "--scale", "3")
    assert (args.row_tokens, args.steps, args.scale, args.tries) == (700, [4], 3, 1)


@pytest.mark.parametrize("cores, processes", [(1, 1), (2, 2), (3, 2), (16, 4)])
def test_a_tiny_model_is_trained_by_several_processes_a_larger_one_by_one(
    monkeypatch, cores, processes
):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert settled(LLaMAConfig.preset("tiny"), CPU).processes == processes
    assert settled(LLaMAConfig.preset("tiny"), GPU).processes == 1
    assert settled(LLaMAConfig.preset("smollm2-135m"), CPU).processes == 1


def test_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "25,50,100,200; above 20 M parameters 10,20,40 on a CPU, 50,100,200 on a GPU" in text
    assert "default: 4; above 20 M parameters 2 on a CPU, 2 on a GPU" in text
    assert "the original window; above 20 M parameters 1024 on a CPU, 2048 on a GPU" in text


# ---- the commands --------------------------------------------------------------------------------


def test_the_commands_of_the_tiny_base():
    """Those that made the table in the README: no flag more, and in this order."""
    args = settled(LLaMAConfig.preset("tiny"), CPU)
    assert demo_plan.fine_tuning_flags(args, 0, "linear") == [
        "--seed", "0", "--device", "auto", "--init", str(SHIPPED_BASE), "--scale", "4",
        "--max_iters", "200", "--save_at", "25,50,100,200", "--row_tokens", "256", "--no_skip",
        "--rope", "linear",
    ]
    args = settled(
        LLaMAConfig.preset("tiny"), CPU, "--scratch", "--base_steps", "7", "--data", "hf:a", "hf:b",
        "--row_tokens", "128",
    )
    common = ["--seed", "3", "--device", "auto", "--data", "hf:a", "hf:b"]
    assert demo_plan.pretraining_flags(args, 3) == common + [
        "--init", "scratch", "--max_iters", "7"
    ]
    assert demo_plan.fine_tuning_flags(args, 3, "none") == common + [
        "--init", "out/demo/seed-3/base", "--scale", "4", "--max_iters", "200",
        "--save_at", "25,50,100,200", "--row_tokens", "128", "--no_skip", "--rope", "none",
    ]


def test_the_command_of_a_larger_model():
    args = settled(LLaMAConfig.preset("smollm2-135m"), CPU, "--init", "folder")
    assert demo_plan.fine_tuning_flags(args, 0, "none") == [
        "--seed", "0", "--device", "auto", "--init", "folder", "--scale", "2",
        "--max_iters", "40", "--save_at", "10,20,40", "--row_tokens", "1024",
        "--warmup_iters", "5", "--rope", "none",
    ]


# ---- the plan ------------------------------------------------------------------------------------


def training(config, *flags):
    """The fine-tune that the demo plans for a base, and its own flags."""
    args = settled(config, CPU, *flags)
    run = demo_plan.planned_training(
        demo_plan.fine_tuning_flags(args, 0, "linear"), extend(config, args.scale, "linear"),
        args.processes, CPU, torch.float32,
    )
    return args, run


def test_the_plan_of_a_larger_model(monkeypatch):
    config = LLaMAConfig.preset("smollm2-135m")
    args, run = training(config, "--seeds", "0,1")
    long = extend(config, 2, "linear")
    tuning = 2 * 40 * 4 * 1024 * cost.flops_per_token(long, 1024)
    reading = 8 * demo_plan.evaluation_flops(args, long)
    monkeypatch.setattr(cost, "measured_flops", lambda *shape: (tuning + reading) / 3600)
    text = demo_plan.plan_text(args, run, None, CPU)
    lines = text.splitlines()
    assert lines[0].startswith("plan: 134.5 M parameters, window 8,192 -> 16,384, on cpu")
    assert lines[0].endswith("for each of 2 seeds:")
    rows = "40 steps of 4 x 1,024 tokens (positions skip through 16,384)"
    assert lines[1].strip() == f"PI and direct, each {rows}, {tuning:.1e} FLOPs together"
    assert f"8 evaluations (--documents 1 --distances 4 --tries 1), {reading:.1e}" in lines[2]
    assert "memory: about" in lines[3]
    assert "(4 x 1,024 tokens at a time" in lines[3]
    assert "at least 2.0 h at " in lines[4]
    # On a CPU the demo of such a model should take hours and not days, at 60 GFLOP/s of one core
    assert (tuning + reading) / 60e9 < 6 * 3600


def test_the_plan_of_a_tiny_model_from_scratch(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(cost, "measured_flops", lambda *shape: 1e12)
    base = LLaMAConfig.preset("tiny")
    args, run = training(base, "--scratch", "--all")
    flags = demo_plan.pretraining_flags(args, 0)
    pretraining = demo_plan.planned_training(flags, base, 2, CPU, torch.float32)
    text = demo_plan.plan_text(args, run, pretraining, CPU)
    assert "the base: 2,200 steps of 16 x 256 tokens, " in text
    assert (
        "PI and direct and NTK and YaRN, each 200 steps of 16 x 256 tokens "
        "and 16 x 256 tokens, "
    ) in text
    assert "18 evaluations (" in text
    assert "memory" not in text  # train.py says it, for each process


def test_rows_beyond_the_extended_window_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="--row_tokens 20000: the window has 16384 tokens"):
        training(LLaMAConfig.preset("smollm2-135m"), "--row_tokens", "20000")


@pytest.mark.parametrize("max_tokens", [1, 1500])
def test_an_evaluation_takes_what_was_planned(tmp_path, monkeypatch, max_tokens):
    """FLOPs by the lengths of all rows that the model really reads; BOS takes a place in each."""
    monkeypatch.chdir(tmp_path)
    words = (SHIPPED_BASE.parent.parent / "REFERENCE.md").read_text(encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / f"texts/{i}.txt").write_text(words[1000 * i : 1000 * i + 9000])
    flags = ["--data", "texts", "--documents", "2", "--max_tokens", str(max_tokens)]
    args = settled(LLaMAConfig.preset("tiny"), CPU, *flags, "--distances", "3", "--tries", "2")
    model, tokenizer = evaluation.load_model(SHIPPED_BASE, {"scale": 4.0, "rope": "none"}, "cpu")

    counted = []
    nll = LLaMA.nll
    next_token_logits = LLaMA.next_token_logits

    def count(ids):
        length = ids.size(1)
        if length > 1:  # not the tokens of an answer
            flops = cost.flops_per_token(model.config, length, training=False)
            counted.append(ids.numel() * flops)

    def counted_nll(self, ids, targets):
        count(ids)
        return nll(self, ids, targets)

    def counted_logits(self, ids, cache):
        count(ids)
        return next_token_logits(self, ids, cache)

    monkeypatch.setattr(LLaMA, "nll", counted_nll)
    monkeypatch.setattr(LLaMA, "next_token_logits", counted_logits)
    demo.evaluate(model, tokenizer, args, 0, "test")
    assert sum(counted) == pytest.approx(demo_plan.evaluation_flops(args, model.config), rel=0.02)
