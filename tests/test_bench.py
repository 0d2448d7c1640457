"""bench.py: both sides are the same model in every task, and what is printed is what was measured, however fast."""

import json
import math
import os
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import checkpoint

TINY = ["--vocab_size", "300", "--n_layer", "2", "--n_head", "4", "--n_kv_head", "2", "--n_embd", "32",
        "--intermediate_size", "48", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def both(tmp_path):
    """A function that opens both sides of one model."""

    def open_both(task, *flags):
        settings = bench.settings_of(bench.parse([*TINY, "--windows", "48", "--new_tokens", "16", *flags]))
        bench.save_random(settings.config, str(tmp_path))
        return [Side(str(tmp_path), task, settings) for Side in bench.SIDES.values()], settings

    return open_both


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run from the command line's flags to the files: its JSON, standard output and folder."""
    out, patch = tmp_path_factory.mktemp("bench"), pytest.MonkeyPatch()
    printed = []
    with patch.context() as p:
        p.setattr("builtins.print", lambda *args, **_: printed.append(" ".join(map(str, args))))
        bench.main([*TINY, "--tasks", "train,decode", "--windows", "48", "--new_tokens", "8", "--repeats", "3",
                    "--out", str(out)])  # fmt: skip
    return json.loads((out / "bench.json").read_text()), "\n".join(printed), out


def test_the_json_holds_finite_positive_figures(finished):
    result, _, out = finished
    rows = [(row["task"], row["window"], row["tokens"]) for row in result["rows"]]
    assert rows == [("train", 48, 48), ("decode", 48, 8)]
    for row in result["rows"]:
        for side in bench.SIDES:
            figures = row[side]
            values = [figures[name] for name in ("tokens_per_second", "min", "max", "memory")] + figures["seconds"]
            if row["task"] == "train":
                values += [figures["rope_share"], figures["loss_share"]]
            assert all(math.isfinite(x) and x > 0 for x in values) and len(figures["seconds"]) == 3
            assert figures["min"] <= figures["tokens_per_second"] <= figures["max"]
    assert {"device", "threads", "torch", "transformers"} <= result["machine"].keys()
    assert result["dtype"] == "float32" and result["logits_differ_by"] < 1e-4
    assert (out / "bench.png").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


def test_ratios_are_the_quotients_of_what_is_printed(finished):
    result, printed, _ = finished
    for row in result["rows"]:
        ours, theirs = row["ours"], row["transformers"]
        for side in (ours, theirs):
            assert side["tokens_per_second"] == pytest.approx(row["tokens"] / statistics.median(side["seconds"]))
        assert row["speed_ratio"] == ours["tokens_per_second"] / theirs["tokens_per_second"]
        assert row["memory_ratio"] == ours["memory"] / theirs["memory"]
        line = next(line for line in printed.splitlines() if line.startswith(row["task"]))
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        assert cells[:2] == [row["task"], "48"]
        for cell, side in ((cells[2], ours), (cells[3], theirs)):
            assert cell.split()[0] == f"{side['tokens_per_second']:,.1f}"
        assert cells[4].split()[0] == f"{row['speed_ratio']:.2f}" and cells[-1] == f"{row['memory_ratio']:.2f}"
    assert "RoPE" in printed and result["machine"]["transformers"] in printed


def die(*args):
    os._exit(9)


def test_a_child_that_dies_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", die)  # as of a lack of memory
    with pytest.raises(ValueError, match="transformers, train at 48.*memory"):
        bench.in_a_process_of_its_own("transformers", "", "train", 48, None)


# The same model, the same task

FLAGS = [[], ["--batch_size", "3"], ["--checkpoint_activations", "full"]]


@pytest.mark.parametrize("flags", FLAGS)
def test_a_training_step_does_the_same_on_both_sides(both, flags):
    sides, settings = both("train", *flags)
    before = [p.detach().clone() for p in sides[0].model.parameters()]
    losses = [side.loss(settings.ids(48)) for side in sides]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for side, loss in zip(sides, losses):
        loss.backward()
    theirs = dict(sides[1].model.named_parameters())
    for name, p in sides[0].model.named_parameters():
        other = theirs[name if name.startswith("lm_head") else f"model.{name}"]
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-3, atol=1e-6)
    for side in sides:
        side.model.zero_grad()
        bench.prepare(side, "train", 48, settings)()
        assert all(p.grad is None for p in side.model.parameters())
    for p, old in zip(sides[0].model.parameters(), before):
        assert (p - old).abs().max() > 0  # the optimizer moved all of it
    full = "--checkpoint_activations" in flags
    assert sides[1].model.is_gradient_checkpointing == full
    assert sides[0].model.checkpoint_activations == ("full" if full else "none")


def test_prefill_and_decoding_give_the_same_tokens_on_both_sides(both):
    sides, settings = both("decode", "--batch_size", "2")
    assert bench.difference(*sides, settings) < 1e-4
    for side in sides:
        side.tokens = keep = []
        side.decode = lambda *args, keep=keep, decode=side.decode: keep.append(decode(*args)) or keep[-1]
    calls = [bench.prepare(side, "decode", 48, settings) for side in sides]
    for call in calls:
        call(), call()  # the second goes on from the same point as the first
    ours, theirs = (torch.cat(side.tokens, 1) for side in sides)
    assert torch.equal(ours, theirs) and ours.shape == (2, 1 + 2 * 16)
    assert torch.equal(ours[:, 1:17], ours[:, 17:])
    full = sides[0].model.generate(settings.ids(32), 17)[:, 32:]
    assert torch.equal(ours[:, :17], full)
    assert [bench.prepare(side, "prefill", 48, settings)() is not None for side in sides] == [True, True]


def test_the_parts_are_those_of_the_model(both):
    sides, settings = both("train")
    q, k = torch.randn(1, 4, 48, 8), torch.randn(1, 2, 48, 8)
    for a, b in zip(*(side.rope(q, k, 2) for side in sides)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    ids = settings.ids(48)
    ours, theirs = (side.head_loss(torch.ones(1, 48, 32), ids) for side in sides)
    torch.testing.assert_close(ours / 47, theirs)  # a sum and a mean
    for side in sides:
        assert {"rope", "loss"} == {name for name, call in bench.parts(side, 48, settings).items() if call() is None}


def test_another_model_is_refused(both):
    sides, settings = both("prefill")
    sides[1].model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="not the same model"):
        bench.difference(*sides, settings)


def test_bfloat16_is_the_same_model_too(both):
    sides, settings = both("decode", "--dtype", "bfloat16")
    assert {p.dtype for side in sides for p in side.model.parameters()} == {torch.bfloat16}
    assert 0 < bench.difference(*sides, settings) < 0.2
    sides, settings = both("train", "--dtype", "bfloat16")  # float32 weights, computed with in bfloat16
    assert {p.dtype for side in sides for p in side.model.parameters()} == {torch.float32}
    for side in sides:
        bench.prepare(side, "train", 48, settings)()
        for call in bench.parts(side, 48, settings).values():
            call()


def test_the_sides_take_turns():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in bench.SIDES}
    times = bench.time_both(calls, 3, torch.device("cpu"), SimpleNamespace(update=lambda: None))
    a, b = bench.SIDES
    assert seen == [a, b, b, a, a, b, b, a] and {len(values) for values in times.values()} == {3}  # one doesn't count


# The command line

BAD = [
    (["--windows", "0"], "--windows"),
    (["--windows", "many"], "--windows"),
    (["--tasks", "train,sing"], "--tasks"),
    (["--repeats", "0"], "--repeats"),
    (["--batch_size", "-1"], "--batch_size"),
    (["--windows", "32", "--new_tokens", "32"], "--new_tokens"),
    (["--n_embd", "33"], "n_embd 33"),
    (["--n_layer", "0"], "n_layer"),
    (["--preset", "llama-8b"], "--preset"),
    (["--device", "abacus"], "--device abacus"),
    (["--plot", "bench.txt"], "--plot bench.txt"),
    (["--checkpoint_activations", "some"], "--checkpoint_activations"),
]


def fails(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        checkpoint.run(lambda: bench.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "error: " in error
    return error


@pytest.mark.parametrize("flags, named", BAD)
def test_bad_input_is_one_line(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(bench, "save_random", None)  # nothing is begun
    assert named in fails([*TINY, *flags], capsys)


def test_a_missing_transformers_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed: pip install" in fails(TINY, capsys)


def test_presets_and_shape_flags():
    config = bench.settings_of(bench.parse(["--preset", "llama-7b", "--n_layer", "2", "--windows", "8192"])).config
    assert (config.n_layer, config.n_embd, config.vocab_size, config.block_size) == (2, 4096, 32000, 8192)
    config = bench.settings_of(bench.parse([])).config
    assert 30e6 < config.n_params < 40e6 and config.head_dim == 64 and config.vocab_size == 32000
