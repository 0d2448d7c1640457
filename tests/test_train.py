"""train.py: the same losses however the work is cut, interrupted or resumed; the paper's recipe; bad input.

Several processes, and what can happen to a run: test_parallel.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import batches
import checkpoint
import cost
import hf_config
import plan
import train
from conftest import log
from parallel import states
from tokenizer import load_tokenizer
from model import PRESETS, LLaMA, LLaMAConfig
from recipe import Recipe, batch_parts, default_recipe, lr_at
from train_flags import parse, settle_flags
from trainset import TextData

pytestmark = pytest.mark.usefixtures("workplace")
ROOT = Path(__file__).parent.parent
TEXT = [str(ROOT / name) for name in ("rope.py", "model.py", "checkpoint.py", "data.py", "eval_ppl.py")]
QUICK = [
    "--mix",
    "text",
    "--data",
    *TEXT,
    "--batch_size",
    "6",
    "--micro_batch_size",
    "2",
    "--eval_every",
    "100",
    "--device",
    "cpu",
]


def run(out: Path, *flags: str) -> list[dict]:
    """A run in this process; its log."""
    train.main([*QUICK, "--out", str(out), *flags])
    return log(out)


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def base(workplace) -> Path:
    run(Path("base"), "--max_iters", "8", "--save_every", "100")
    return Path("base").resolve()


def test_the_log_has_every_step(base):
    rows = log(base)
    assert [row["iter"] for row in rows] == list(range(1, 9))
    assert [row["tokens"] for row in rows] == [6 * 256 * i for i in range(1, 9)]
    assert all({"loss", "lr", "tokens_per_second"} <= set(row) for row in rows)
    assert "val_loss" in rows[-1]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05  # it learns


def test_micro_batches_only_cut_the_work(base):
    whole = run(Path("whole"), "--max_iters", "8", "--micro_batch_size", "6")
    assert losses(whole) == pytest.approx(losses(log(base)), abs=2e-5)  # the sums are taken in another order


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(base, mode):
    rows = run(Path(f"checkpointed-{mode}"), "--max_iters", "8", "--checkpoint_activations", mode)
    assert losses(rows) == losses(log(base))


def signal_in_forward(monkeypatch, number: int, training: bool, call: int) -> list[bool]:
    """Send a signal while the model reads; returns a list that gets one item for each such call.

    call: the number of the call, counting those in training or those in validation.
    """
    calls = []
    real = LLaMA.forward

    def forward(self, *arguments, **keywords):
        if self.training == training:
            calls.append(training)
            if len(calls) == call:
                os.kill(os.getpid(), number)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(LLaMA, "forward", forward)
    return calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_bit_for_bit(base, monkeypatch, capsys, number):
    out = Path(f"interrupted-{number.name}")
    # A step has three micro batches: this is the second one of the fourth step
    calls = signal_in_forward(monkeypatch, number, training=True, call=11)
    with pytest.raises(SystemExit) as stop:
        run(out, "--max_iters", "8")
    assert stop.value.code == 128 + number
    assert len(calls) == 11  # no micro batch was begun after the signal
    assert len(log(out)) == 3  # the step at hand was given up
    assert [state.name for state in states(out)] == ["step-3"]
    assert f"python train.py --resume --out {out}" in capsys.readouterr().err
    monkeypatch.undo()
    train.main(["--resume", "--out", str(out)])
    assert losses(log(out)) == losses(log(base))
    ours, theirs = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_in_validation_ends_it(base, monkeypatch):
    out = Path("interrupted-validation")
    calls = signal_in_forward(monkeypatch, signal.SIGTERM, training=False, call=2)
    with pytest.raises(SystemExit):
        run(out, "--max_iters", "8", "--eval_every", "4", "--eval_windows", "9")
    assert len(calls) == 2
    assert len(log(out)) == 4 and "val_loss" not in log(out)[-1]
    monkeypatch.undo()
    train.main(["--resume", "--out", str(out)])
    assert losses(log(out)) == losses(log(base))


def test_validation_takes_5_percent_of_the_training(base, monkeypatch):
    drawn = []
    real = train.TextData.held_out

    def held_out(self, index):
        drawn.append(index)
        return real(self, index)

    monkeypatch.setattr(train.TextData, "held_out", held_out)
    # Four steps of 6 windows, each three times the cost of reading it: 72, of which 5% are 3.6
    first = log_of_validation(run(Path("looks"), "--max_iters", "8", "--eval_every", "4"))
    assert drawn == [0, 1, 2] * 2 and len(first) == 2
    drawn.clear()
    run(Path("one-window"), "--max_iters", "1", "--eval_every", "1")
    assert drawn == [0]
    drawn.clear()
    run(Path("given"), "--max_iters", "1", "--eval_windows", "70")
    assert drawn == list(range(70))


def log_of_validation(rows: list[dict]) -> list[float]:
    return [row["val_loss"] for row in rows if "val_loss" in row]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_that_memory_cannot_hold_is_one_line_unless_forced(base, monkeypatch):
    out = Path("too-large")
    flags = ["--init", str(base), "--scale", "4", "--max_iters", "1"]
    monkeypatch.setattr(cost, "free_memory", lambda device: 20e6)
    words = "needs about .* of memory, and 20.0 MB are free: give .*--checkpoint_activations full"
    with pytest.raises(ValueError, match=words) as refused:
        run(out, *flags, "--checkpoint_activations", "none")
    assert "--micro_batch_size 1" in str(refused.value) and "--force" in str(refused.value)
    assert not out.exists()
    run(out, *flags, "--force")
    assert len(log(out)) == 1


def test_a_run_that_the_disk_cannot_hold_is_one_line_unless_forced(base, monkeypatch):
    out = Path("too-long")
    flags = ["--max_iters", "6", "--save_every", "2", "--save_at", "1,2", "--optimizer", "adamw"]
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    with pytest.raises(ValueError, match="writes about .* to too-long, and 1.0 MB are free"):
        run(out, *flags)
    assert not out.exists()
    run(out, *flags, "--force")
    # What is there at the end: two states of three, the weights and those of --save_at
    args = SimpleNamespace(max_iters=6, save_every=2, save_at=[1, 2])
    config = checkpoint.read_config(out)
    elsewhere = plan.disk_needed(args, config, Path("elsewhere"), torch.float32)
    written = bytes_in(out) + bytes_in(states(out)[-1])
    assert elsewhere == pytest.approx(written, rel=0.05)
    # Resumed, it has two states and the weights of --save_at already
    here = plan.disk_needed(args, config, out, torch.float32)
    assert here == elsewhere - 2 * 12 * config.n_params - 2 * 4 * config.n_params


def test_micro_batches_are_cut_until_they_fit(base):
    config = checkpoint.read_config(base)
    args = SimpleNamespace(
        batch_size=64, dist=None, mix="text", row_tokens=256, no_skip=False, min_tokens=None
    )
    chosen = []
    for free in (1e12, 400e6, 60e6, 48e6, 1e6):
        args.micro_batch_size = None
        args.checkpoint_activations = None
        machine = plan.Machine("cpu", torch.float32, free)
        plan.choose_micro_batch(args, config, 1, machine)
        chosen.append((args.micro_batch_size, args.checkpoint_activations))
        needed = plan.memory_needed(args, config, 1, machine)
        assert needed < 0.9 * free or chosen[-1] == (1, "full")
    assert chosen[0] == (64, "none") and chosen[-1] == (1, "full")
    assert 1 <= chosen[1][0] < 64 and chosen[1][1] == "none"
    args.micro_batch_size = 3
    args.checkpoint_activations = "selective"  # what is given stays
    plan.choose_micro_batch(args, config, 1, machine)
    assert (args.micro_batch_size, args.checkpoint_activations) == (3, "selective")


def test_a_real_model_has_a_small_recipe_on_a_cpu_and_the_papers_on_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(cost, "free_memory", lambda device: 24.3e9)
    monkeypatch.setattr(cost, "measured_flops", lambda *shape: 60e9)
    shape = ["--plan", "--preset", "smollm2-135m", "--scale", "2"]
    train.main([*shape, "--device", "cpu"])
    text = capsys.readouterr().out
    config = hf_config.extend(LLaMAConfig.preset("smollm2-135m"), 2)
    hours = 100 * 16384 * cost.flops_per_token(config, 16384) / 60e9 / 3600
    assert f"time: at least {hours:.1f} h at 60 GFLOP/s" in text
    assert "100 steps of 1 x 16,384" in text and "24.3 GB  fits" in text
    assert "on a CPU the default is 100 steps of 1 rows, where GPUs take 1,000 of 64" in text
    train.main([*shape, "--device", "cpu", "--world_size", "3"])
    assert "100 steps of 3 x 16,384" in capsys.readouterr().out
    train.main([*shape, "--device_memory", "80"])
    text = capsys.readouterr().out
    assert "1,000 steps of 64 x 16,384" in text and "on a CPU" not in text
    assert "GFLOP/s" not in text  # of this machine
    train.main(["--plan", "--device", "cpu"])  # the tiny model's recipe is the same everywhere
    assert "2,200 steps of 16 x 256" in capsys.readouterr().out


def test_only_a_run_of_long_steps_is_measured_beforehand(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "measured_flops", lambda *shape: 60e9)
    args = parse("", ["--init", str(base), "--scale", "2", "--device", "cpu"])
    config = checkpoint.read_config(base, scale=2)
    cpu = torch.device("cpu")
    machine = plan.machine_here(cpu, torch.float32)
    settle_flags(args, config, 1, machine)
    plan.announce(args, config, tmp_path, cpu, machine, torch.float32, [])
    assert "GFLOP/s" not in capsys.readouterr().err

    larger = hf_config.extend(LLaMAConfig.preset("smollm2-135m"), 2)
    args.row_tokens = 1024
    plan.announce(args, larger, tmp_path, cpu, machine, torch.float32, [])
    said = capsys.readouterr().err
    assert "time: at least " in said and "fewer --max_iters" in said


def test_processes_on_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(cost, "measured_flops", lambda *shape: 1e9)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    args = parse("", ["--plan", "--device", "cpu"])
    config = LLaMAConfig.preset("tiny")
    settle_flags(args, config, 16, plan.Machine("cpu", torch.float32, 1e12))
    said = [plan.time_on_cpu(args, config, world, torch.float32, 9) for world in (1, 3, 16)]
    assert [line.split(" at ")[1].split()[0] for line in said] == ["1", "3", "4"]


def test_a_run_stopped_before_its_first_step_resumes_bit_for_bit(base, monkeypatch):
    out = Path("stopped-at-0")
    real = train.share_of_batch

    def signal_at_once(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "share_of_batch", signal_at_once)
    with pytest.raises(SystemExit):
        run(out, "--max_iters", "8")
    monkeypatch.undo()
    assert [state.name for state in states(out)] == ["step-0"] and log(out) == []
    train.main(["--resume", "--out", str(out)])
    assert losses(log(out)) == losses(log(base))


def test_a_finished_run_is_finished_for_fewer_steps_too(base, capsys):
    out = Path("finished")
    run(out, "--max_iters", "2")
    train.main(["--resume", "--out", str(out), "--max_iters", "1"])
    assert "done, 2 steps" in capsys.readouterr().err


def test_a_killed_run_resumes_from_its_last_whole_state(base):
    out = Path("killed")
    run(out, "--max_iters", "8", "--save_every", "2")
    assert [state.name for state in states(out)] == ["step-6", "step-8"]  # the last two are kept
    # as if the process had died while it wrote the newest one: a temporary folder, and a log that runs ahead
    states(out)[-1].rename(out / "trainer/.step-8.tmp")
    train.main(["--resume", "--out", str(out)])
    assert losses(log(out)) == losses(log(base))


def test_a_longer_schedule_is_resumed_with_the_new_flags(base):
    out = Path("longer")
    run(out, "--max_iters", "4", "--decay", "constant")
    train.main(["--resume", "--out", str(out), "--max_iters", "8"])
    straight = run(Path("straight"), "--max_iters", "8", "--decay", "constant")
    assert losses(log(out)) == losses(straight)


def test_extension_is_written_where_every_tool_reads_it(base):
    out = Path("linear-2")
    run(out, "--init", str(base), "--scale", "2", "--max_iters", "2", "--save_at", "0,1")
    raw = json.loads((out / "config.json").read_text())
    assert raw["rope_scaling"]["rope_type"] == "linear" and raw["rope_scaling"]["factor"] == 2
    ours, theirs = checkpoint.load(out).eval(), AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer.encode(Path(TEXT[0]).read_text(), add_special_tokens=False)[:500]])  # beyond 256
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    kept = load_file(out / "step-0/model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in load_file(base / "model.safetensors").items())
    assert checkpoint.load(out / "step-1").config.block_size == 512


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_written_in_the_dtype_of_the_source(base, stored, capsys):
    source = Path(f"source-{stored}")
    checkpoint.save(checkpoint.load(base), source, load_tokenizer(base), dtype=stored)
    out = Path(f"out-{stored}")
    run(out, "--init", str(source), "--scale", "2", "--max_iters", "2", "--save_at", "0,1")
    for folder in (out, out / "step-0", out / "step-1"):
        weights = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {stored}
    said = f"--save_dtype auto: weights are written in {str(stored).removeprefix('torch.')}"
    assert (said in capsys.readouterr().err) == (stored != torch.float32)

    # A run that goes on may change it. Between steps weights are float32 all the same.
    train.main(["--resume", "--out", str(out), "--max_iters", "3", "--save_dtype", "float32"])
    assert checkpoint.stored_dtype(out) == torch.float32
    lost = checkpoint.load(out).norm.weight
    assert not torch.equal(lost, lost.bfloat16().float())


def test_direct_fine_tuning_leaves_positions_alone(base):
    out = Path("none-2")
    run(out, "--init", str(base), "--scale", "2", "--rope", "none", "--max_iters", "1")
    config = checkpoint.load(out).config
    assert (config.rope, config.block_size, config.original_window) == ("none", 512, 256)


def test_no_passkey_beyond_the_original_window_in_fine_tuning(base, monkeypatch):
    drawn = []
    real = batches.sample_batch

    def spy(corpus, tokenizer, length, step, indices, *, seed, mix=batches.Mix()):
        ids, targets = real(corpus, tokenizer, length, step, indices, seed=seed, mix=mix)
        drawn.append((length, len(ids), any("pass key" in tokenizer.decode(row.tolist()) for row in ids)))
        return ids, targets

    monkeypatch.setattr(batches, "sample_batch", spy)
    train.main(["--data", *TEXT, "--device", "cpu", "--init", str(base), "--scale", "2", "--out", "mix",
                "--max_iters", "2", "--micro_batch_size", "2", "--eval_every", "9"])  # fmt: skip
    short = [found for length, _, found in drawn if length <= 256]
    long = [found for length, _, found in drawn if length == 512]
    assert any(short) and long and not any(long)
    # half of the tokens of each batch; validation reads at 512 too
    tokens = {size: sum(length * n for length, n, _ in drawn if (length <= 256) == size) for size in (True, False)}
    assert tokens[True] == 2 * 8 * 512 and tokens[False] >= 2 * 8 * 512


EXTEND = ["--scale", "2", "--max_iters", "4", "--learning_rate", "1e-3", "--decay", "constant"]


def test_rows_of_the_window_are_the_usual_ones(base):
    extend = ["--init", str(base), *EXTEND]
    usual = run(Path("usual"), *extend)
    whole = run(Path("whole-rows"), *extend, "--row_tokens", "512")
    assert [row["loss"] for row in whole] == [row["loss"] for row in usual]
    ours, theirs = load_file("whole-rows/model.safetensors"), load_file("usual/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_short_rows_with_skipped_positions(base, monkeypatch, capsys):
    """The model gets the positions; the log counts the tokens of short rows; resuming is exact."""
    seen = []
    real = LLaMA.rope_cos_sin

    def spy(self, ids, cache=None, positions=None):
        seen.append((ids.shape, positions))
        return real(self, ids, cache, positions)

    monkeypatch.setattr(LLaMA, "rope_cos_sin", spy)
    extend = ["--init", str(base), *EXTEND]
    rows = run(Path("short"), *extend, "--row_tokens", "64")
    assert "4 steps of 6 x 64 tokens with skipped positions" in capsys.readouterr().err
    assert [row["tokens"] for row in rows] == [6 * 64 * i for i in range(1, 5)]
    given = [positions for shape, positions in seen if shape == (2, 64)]
    assert len(given) == 4 * 3 and max(positions.max() for positions in given) > 400
    assert all(positions.max() < 512 for positions in given)
    # Validation reads rows of the same form
    shape, positions = seen[-1]
    assert shape == (1, 64) and positions.max() > 63

    run(Path("cut"), *extend, "--row_tokens", "64", "--max_iters", "2")
    train.main(["--resume", "--out", "cut", "--max_iters", "4"])
    assert losses(log(Path("cut"))) == losses(rows)

    # The control has the same rows, but its text and its positions go on
    seen.clear()
    control = run(Path("no-skip"), *extend, "--row_tokens", "64", "--no_skip")
    assert all(positions is None for _, positions in seen)
    assert all(a != b for a, b in zip(losses(control), losses(rows)))


def test_short_documents_are_left_out(base, capsys):
    """Rows that no short document can be part of; the line that says what is left out."""
    Path("texts").mkdir()
    for i in range(12):  # 9.txt is for validation
        Path(f"texts/{i}.txt").write_text("short " * 9 if i % 3 else "a long line of text\n" * 400)
    flags = ["--init", str(base), *EXTEND, "--data", "texts", "--min_tokens", "200"]
    train.main([*QUICK, "--out", "long-documents", *flags])
    error = capsys.readouterr().err
    assert re.search(r"--min_tokens 200: 8 of 11 documents, with \d% of the tokens", error), error
    tokenizer = load_tokenizer(base)
    args = train.parse("", flags)
    config = checkpoint.read_config(base, scale=2)
    settle_flags(args, config, 1, plan.Machine("cpu", torch.float32, 8e9))
    part = batch_parts(args, config)[0]
    rows = TextData(args, config, tokenizer).rows(0, part, range(20))
    texts = [tokenizer.decode(row.tolist()) for row in rows.ids]
    assert all("long" in text and "short" not in text for text in texts)
    assert (rows.ids == config.bos_id).sum(dim=1).max() <= 1  # no row has parts of two documents


@pytest.mark.parametrize("row_tokens, lengths, rows", [
    (None, [1024, 256], [4, 16]), (512, [512, 256], [8, 16]), (256, [256, 256], [16, 16]),
    (64, [64, 256], [64, 16]),
])  # fmt: skip
def test_a_small_models_batch_stays_half_text_and_half_retrieval(row_tokens, lengths, rows):
    config = LLaMAConfig.preset("tiny", block_size=1024, rope="linear", scale=4)
    args = train.parse("", ["--init", "base", "--scale", "4"])
    args.row_tokens = row_tokens
    settle_flags(args, config, 1, plan.Machine("cpu", torch.float32, 8e9))
    parts = batch_parts(args, config)
    assert [part.length for part in parts] == lengths and [part.rows for part in parts] == rows
    assert [part.reach for part in parts] == [1024 if row_tokens else 0, 1024]
    assert args.micro_batch_size == 16384 // max(lengths)
    args.no_skip = True
    assert [part.reach for part in batch_parts(args, config)] == [0, 0]
    args.min_tokens = 10
    assert batch_parts(args, config)[0].reach == lengths[0]


def test_a_stopped_run_says_how_to_go_on_with_as_many_processes(monkeypatch):
    line = plan.closing_line(None, Path("out/x"), 12, False, torch.device("cpu"))
    assert line.endswith("go on with: python train.py --resume --out out/x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = plan.closing_line(None, Path("out/x"), 12, False, torch.device("cpu"))
    assert line.endswith("torchrun --nproc_per_node 2 train.py --resume --out out/x")


def test_a_base_from_scratch_has_muon_for_the_matrices_of_its_blocks():
    args = parse("", ["--init", "scratch"])
    config = LLaMAConfig.preset(args.preset)
    settle_flags(args, config, world=1, machine=plan.machine_here(torch.device("cpu"), torch.float32))
    model = LLaMA(config)
    adamw, muon = train.build_optimizers(args, model)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    by_muon = {id(weight) for group in muon.param_groups for weight in group["params"]}
    by_adamw = {id(weight) for group in adamw.param_groups for weight in group["params"]}
    assert by_muon == {id(weight) for block in model.layers for weight in block.parameters() if weight.ndim == 2}
    assert not by_muon & by_adamw
    assert by_muon | by_adamw == {id(weight) for weight in model.parameters()}
    assert default_recipe(config, scratch=False).optimizer == "adamw"


def test_theta_of_a_base_from_scratch(base):
    run(Path("theta"), "--init", "scratch", "--theta", "500", "--max_iters", "1")
    assert checkpoint.read_config("theta").rope_theta == 500


def test_the_papers_recipe_from_7b_on():
    seven = default_recipe(LLaMAConfig.preset("llama-7b"), scratch=False)
    assert seven == Recipe(1000, 64, 2e-5, 20, decay="constant", mix="text")
    thirty = default_recipe(LLaMAConfig.preset("llama-33b"), scratch=False)
    assert thirty == seven._replace(learning_rate=1e-5)
    assert default_recipe(LLaMAConfig.preset("llama3-8b"), scratch=False) == seven


def test_warm_up_starts_at_ten_percent_and_ends_at_the_peak():
    args = SimpleNamespace()
    args.learning_rate, args.warmup_iters, args.max_iters, args.decay = 2e-5, 20, 1000, "constant"
    rates = [lr_at(step, args) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5 * (0.1 + 0.9 / 20))
    assert rates[19:] == [2e-5] * 981
    assert all(a < b for a, b in zip(rates[:19], rates[1:20]))


def test_a_loss_that_is_not_finite_stops_before_anything_is_overwritten(base):
    out = Path("diverged")
    run(out, "--max_iters", "2")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        train.main(["--resume", "--out", str(out), "--max_iters", "30", "--learning_rate", "1e18", "--grad_clip", "0"])
    assert (out / "model.safetensors").read_bytes() == before
    assert [state.name for state in states(out)] == ["step-2"]


@pytest.mark.parametrize("flags, words", [
    (["--init", "scratch", "--scale", "8"], ["--scale", "python train.py"]),
    (["--init", "nowhere"], ["nowhere", "hub"]),
    (["--init", "BASE", "--scale", "2", "--theta", "500"], ["--theta 500", "scratch"]),
    (["--resume"], ["--resume", "--out"]),
    (["--resume", "--out", "nothing-here"], ["nothing-here", "--resume"]),
    (["--micro_batch_size", "0"], ["--micro_batch_size", "0"]),
    (["--init", "BASE", "--scale", "2", "--batch_size", "1", "--mix", "retrieval"], ["--batch_size 1", "at least 2"]),
    (["--init", "BASE", "--mix", "verse"], ["--mix", "retrieval"]),
    (["--batch_size", "0"], ["--batch_size", "0"]),
    (["--max_iters", "ten"], ["--max_iters", "ten"]),
    (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
    (["--save_at", "1,b"], ["--save_at", "'b'"]),
    (["--init", "BASE", "--scale", "2", "--out", "BASE"], ["--out", "holds"]),
    (["--device", "warp"], ["--device warp"]),
    (["--data", "missing.txt"], ["missing.txt"]),
    (["--init", "BASE", "--scale", "2", "--row_tokens", "1"], ["--row_tokens", "at least 2"]),
    (["--init", "BASE", "--scale", "2", "--row_tokens", "513"], ["--row_tokens 513", "512"]),
    (["--row_tokens", "64"], ["--row_tokens 64", "--scale"]),
    (["--min_tokens", "90000"], ["(for training)", "90,000", "--min_tokens"]),
    (["--init", "BASE", "--scale", "2", "--no_skip", "--mix", "text"], ["--no_skip", "--row_tokens"]),
    (["--init", "BASE", "--scale", "2", "--row_tokens", "64", "--mix", "retrieval", "--batch_size", "4"],
     ["--batch_size 4", "at least 8"]),
    (["--init", "BASE", "--scale", "-2"], ["scale", "-2"]),
    (["--init", "BASE", "--scale", "inf"], ["scale", "inf"]),
    (["--init", "BASE", "--scale", "0.5"], ["scale", "0.5"]),
    (["--init", "BASE", "--scale", "2", "--rope", "spiral"], ["spiral", "yarn"]),
    (["--init", "BASE", "--scale", "2", "--rope", "dynamic"], ["--rope dynamic", "another"]),
    (["--init", "BASE", "--scale", "1"], ["--scale 1 extends nothing"]),
    (["--init", "BASE", "--scale", "512"], ["ratio of two windows", "give --scale 2"]),
    (["--init", "BASE", "--data", "BASE/confg.json"], ["--data", "no such file", "BASE/config.json"]),
    (["--init", "BASE", "--out", "BASE"], ["holds a run at step", "--resume", "--overwrite"]),
    (["--init", "BASE", "--scale", "100", "--data", TEXT[0]], ["rope.py (for training)", "tokens", "don't fill"]),
    (["--out", "BASE/config.json/under"], ["config.json"]),
    (["--init", "BASE", "--summary_field", "summary", "--data", TEXT[0]], [".jsonl"]),
    (["--summary_field", "summary"], ["--summary_field", "--init"]),
    (["--plan", "--world_size", "3", "--batch_size", "4"], ["--batch_size 4", "3 processes"]),
])  # fmt: skip
def test_bad_input_is_one_line(base, tmp_path, monkeypatch, command, flags, words):
    flags = [flag.replace("BASE", str(base)) for flag in flags]
    words = [word.replace("BASE", str(base)) for word in words]
    if "--data" not in flags:
        flags += ["--data", *TEXT]
    if "--device" not in flags:
        flags += ["--device", "cpu"]
    before = sorted(base.rglob("*"))
    monkeypatch.chdir(tmp_path)
    ended = command(train.main, *flags)
    assert ended.code == 2, ended.error
    lines = [line for line in ended.error.splitlines() if line.strip()]
    lines = [line for line in lines if "tokenizing" not in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), ended.error
    assert all(word in lines[0] for word in words), lines[0]
    assert not ended.out and sorted(base.rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out"} and not list(
        tmp_path.glob("out/[!c]*")
    )  # but for the cache


def test_the_script_itself_says_no_more_than_this_line(base, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--init", base, "--scale", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("train.py: error: ")
    assert done.stderr.count("\n") == 1, done.stderr


def test_resuming_another_model_is_refused(base, monkeypatch):
    out = Path("other")
    run(out, "--max_iters", "1")
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["tiny"] | {"n_embd": 64})
    with pytest.raises(ValueError, match="does not hold this model"):
        train.main(["--resume", "--out", str(out), "--max_iters", "2"])


def test_a_tokenizer_that_is_too_large_is_refused(base, tmp_path):
    tokenizer = load_tokenizer(base)
    checkpoint.save(LLaMA(LLaMAConfig.preset("tiny", vocab_size=1000)), tmp_path / "small", tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has 1024 tokens, the model 1000"):
        run(tmp_path / "out", "--init", str(tmp_path / "small"), "--scale", "2")
    assert not (tmp_path / "out").exists()


def test_the_plan_reads_no_weights(capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", None)
    shape = ["--plan", "--preset", "llama-7b", "--scale", "16", "--world_size", "8", "--device_memory", "80"]
    train.main([*shape, "--checkpoint_activations", "selective"])
    text = capsys.readouterr().out
    for words in ("window 2,048 -> 32,768, by rope 'linear' at scale 16", "64 x 32,768: 2,097,152,000 tokens",
                  "each of 8 devices: fsdp, bfloat16, 1 x 32,768", "80.0 GB  fits"):  # fmt: skip
        assert words in text, text
    train.main(shape)  # what must be recomputed is chosen where it is not given
    assert "activations recomputed: selective" in capsys.readouterr().out
    train.main([*shape, "--checkpoint_activations", "none"])
    assert "does not fit" in capsys.readouterr().out
    train.main([*shape, "--row_tokens", "2048"])
    text = capsys.readouterr().out
    for words in ("64 x 2,048: 131,072,000 tokens", "4 x 2,048 tokens at a time, activations recomputed: none"):
        assert words in text, text
