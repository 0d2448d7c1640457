"""bench.py: both sides are the same model in every task, and what is printed was measured."""

import gc
import json
import math
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import bench
import cost
from conftest import assert_refused
from model import LLaMA
from processes import FORKS

TINY = ["--vocab_size", "300", "--n_layer", "2", "--n_head", "4", "--n_kv_head", "2"]
TINY += ["--n_embd", "32", "--intermediate_size", "48", "--device", "cpu"]


class Both(NamedTuple):
    ours: bench.Ours
    theirs: bench.Transformers
    settings: bench.Settings


@pytest.fixture
def open_both(tmp_path):
    """open_both(task, *flags) opens one model on both sides."""

    def open_both(task: str, *flags: str) -> Both:
        args = bench.parse([*TINY, "--windows", "48", "--new_tokens", "16", *flags])
        settings = bench.choose_settings(args)
        folder = str(tmp_path)
        bench.save_random(settings.config, folder)
        ours = bench.Ours(folder, task, settings)
        theirs = bench.Transformers(folder, task, settings)
        return Both(ours, theirs, settings)

    return open_both


@pytest.fixture(scope="module", autouse=True)
def quick_processes():
    """Fork bench.py's new processes from one that has imported everything: they start at once."""

    def get_context(method: str):
        assert method == "spawn"  # which is as new a process, but imports everything again
        return FORKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "multiprocessing", SimpleNamespace(get_context=get_context))
        yield


@pytest.fixture(autouse=True)
def quick_collection():
    """Let the garbage collection before each measurement pass over what is older than the test."""
    gc.freeze()
    yield
    gc.unfreeze()


# ---- a whole run ---------------------------------------------------------------------------------


class Finished(NamedTuple):
    result: dict
    printed: str
    out: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    out = tmp_path_factory.mktemp("bench")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *values: printed.append(" ".join(values)))
        flags = ["--tasks", "train,decode", "--windows", "48", "--new_tokens", "8"]
        bench.main([*TINY, *flags, "--repeats", "3", "--out", str(out)])
    result = json.loads((out / "bench.json").read_text())
    return Finished(result, "\n".join(printed), out)


def test_the_json_holds_finite_positive_figures(finished):
    result = finished.result
    rows = [(row["task"], row["window"], row["tokens"]) for row in result["rows"]]
    assert rows == [("train", 48, 48), ("decode", 48, 8)]
    for row in result["rows"]:
        values = [row["speed_ratio"], row["memory_ratio"]]
        for name in bench.SIDES:
            figures = row[name]
            values += [figures["tokens_per_second"], figures["memory"], *figures["seconds"]]
            assert len(figures["seconds"]) == 3
        assert all(math.isfinite(value) and value > 0 for value in values)
        assert row["speed_ratio_min"] <= row["speed_ratio_max"]
    assert {"device", "threads", "torch", "transformers"} <= result["machine"].keys()
    assert result["dtype"] == "float32"
    assert result["batch_size"] == 1
    assert result["logits_differ_by"] < 1e-4


def test_the_folder_has_the_json_and_the_picture_alone(finished):
    assert sorted(path.name for path in finished.out.iterdir()) == ["bench.json", "bench.png"]
    assert (finished.out / "bench.png").read_bytes()[1:4] == b"PNG"


def test_ratios_are_the_quotients_of_what_is_printed(finished):
    lines = finished.printed.splitlines()
    for row in finished.result["rows"]:
        ours = row["ours"]
        theirs = row["transformers"]
        for side in (ours, theirs):
            speed = row["tokens"] / statistics.median(side["seconds"])
            assert side["tokens_per_second"] == pytest.approx(speed)
        assert row["speed_ratio"] == ours["tokens_per_second"] / theirs["tokens_per_second"]
        assert row["memory_ratio"] == ours["memory"] / theirs["memory"]

        line = next(line for line in lines if line.startswith(row["task"]))
        task, window, speed, their_speed, ratio, _, _, _, _, memory_ratio = line.split()
        assert (task, window) == (row["task"], "48")
        assert speed == f"{ours['tokens_per_second']:,.1f}"
        assert their_speed == f"{theirs['tokens_per_second']:,.1f}"
        assert ratio == f"{row['speed_ratio']:.2f}"
        assert memory_ratio == f"{row['memory_ratio']:.2f}"


def test_what_the_plan_says_stands_beside_what_was_measured(finished):
    train, decode = finished.result["rows"]
    flags = [*TINY, "--windows", "48", "--new_tokens", "8"]
    config = bench.choose_settings(bench.parse(flags)).config
    assert train["planned_memory"] == cost.memory(config, 48)["peak"]
    assert "planned_memory" not in decode
    # Decoding a token reads every weight but the embedding, in float32
    read = 4 * sum(weight.numel() for weight in LLaMA(config).parameters()) - 4 * 300 * 32
    for name in bench.SIDES:
        speed = decode[name]["tokens_per_second"]
        assert decode[name]["bytes_per_second"] == pytest.approx(speed * read)


# ---- the same model, the same task ---------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--batch_size", "3"], ["--checkpoint_activations", "full"]])
def test_a_training_step_does_the_same_on_both_sides(open_both, flags):
    ours, theirs, settings = open_both("train", *flags)
    before = [weight.detach().clone() for weight in ours.model.parameters()]
    ids = settings.ids(48)
    our_loss = ours.loss(ids)
    their_loss = theirs.loss(ids)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)

    our_loss.backward()
    their_loss.backward()
    their_weights = dict(theirs.model.named_parameters())
    for name, weight in ours.model.named_parameters():
        if not name.startswith("lm_head"):
            name = f"model.{name}"
        torch.testing.assert_close(weight.grad, their_weights[name].grad, rtol=1e-3, atol=1e-6)

    for side in (ours, theirs):
        side.model.zero_grad()
        step = bench.prepare(side, "train", 48, settings)
        step()
        assert all(weight.grad is None for weight in side.model.parameters())
    for weight, old in zip(ours.model.parameters(), before):
        assert (weight - old).abs().max() > 0  # the optimizer has changed it
    full = "full" in flags
    assert theirs.model.is_gradient_checkpointing == full
    assert ours.model.checkpoint_activations == ("full" if full else "none")


def test_prefill_and_decoding_give_the_same_tokens_on_both_sides(open_both):
    ours, theirs, settings = open_both("decode", "--batch_size", "2")
    assert bench.logit_difference(ours, theirs, settings) < 1e-4
    decode = bench.prepare(ours, "decode", 48, settings)
    their_decode = bench.prepare(theirs, "decode", 48, settings)
    tokens = decode()  # (2, 1 + 16): the one after the first 32, and 16 new ones
    assert torch.equal(tokens, ours.model.generate(settings.ids(32), 17)[:, 32:])
    assert torch.equal(tokens, their_decode())
    # A second call begins where the first did
    assert torch.equal(tokens, decode())
    assert torch.equal(tokens, their_decode())

    token, _ = ours.prefill(settings.ids(32), 48)
    their_token, _ = theirs.prefill(settings.ids(32), 48)
    assert torch.equal(token, tokens[:, :1])
    assert torch.equal(their_token, tokens[:, :1])
    for side in (ours, theirs):
        bench.prepare(side, "prefill", 48, settings)()


def test_another_model_is_refused(open_both):
    ours, theirs, settings = open_both("prefill")
    theirs.model.model.layers[0].self_attn.q_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="not the same model"):
        bench.logit_difference(ours, theirs, settings)


def test_bfloat16_is_the_same_model_too(open_both):
    ours, theirs, settings = open_both("decode", "--dtype", "bfloat16")
    for side in (ours, theirs):
        assert {weight.dtype for weight in side.model.parameters()} == {torch.bfloat16}
    assert 0 < bench.logit_difference(ours, theirs, settings) < 0.2


def test_bfloat16_training_keeps_float32_weights(open_both):
    ours, theirs, settings = open_both("train", "--dtype", "bfloat16")
    for side in (ours, theirs):
        assert {weight.dtype for weight in side.model.parameters()} == {torch.float32}
        bench.prepare(side, "train", 48, settings)()
    assert 0 < bench.logit_difference(ours, theirs, settings) < 0.2


# ---- how it is measured --------------------------------------------------------------------------


def test_the_sides_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = bench.take_turns(calls, 3, 1, torch.device("cpu"))
    assert "".join(order) == "abbaabba"
    assert len(seconds["a"]) == len(seconds["b"]) == 3  # the first round does not count


@pytest.fixture
def compile_settings(tmp_path, monkeypatch) -> bench.Settings:
    """Settings with --compile, of which only the fast part is done: that of dynamo."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compile(call, backend="eager"))

    def compile_module(module: torch.nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    flags = ["--n_layer", "1", "--windows", "32,48", "--new_tokens", "8", "--compile"]
    settings = bench.choose_settings(bench.parse([*TINY, *flags]))
    bench.save_random(settings.config, str(tmp_path))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield settings
    torch._dynamo.reset()


def graphs() -> int:
    """The number of graphs that dynamo has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_each_window_is_compiled_anew(compile_settings, tmp_path):
    """As often as the first one: not for any length, and not hindered by dynamo's limit."""
    counts = []
    for window in (32, 48):
        before = graphs()
        bench.measure_speed("decode", window, 1, str(tmp_path), compile_settings)
        counts.append(graphs() - before)
    assert counts[0] == counts[1] > 0


def test_nothing_is_compiled_after_the_warm_up(compile_settings, tmp_path):
    for Side in bench.SIDES.values():
        side = Side(str(tmp_path), "decode", compile_settings)
        decode = bench.prepare(side, "decode", 48, compile_settings)
        for _ in range(compile_settings.warm_ups):
            decode()
        before = graphs()
        decode()
        assert graphs() == before


def exit_at_once() -> None:
    os._exit(9)


def test_a_process_that_is_ended_is_reported_in_one_line():
    with pytest.raises(ValueError, match="train at 48: not enough memory"):
        with bench.enough_memory("train", 48):
            bench.in_new_process(exit_at_once)


def test_peak_memory_grows_with_the_window(tmp_path):
    flags = ["--windows", "64,4096", "--tasks", "prefill"]
    settings = bench.choose_settings(bench.parse([*TINY, *flags]))
    bench.save_random(settings.config, str(tmp_path))
    peaks = []
    for window in (64, 4096):
        arguments = ("ours", str(tmp_path), "prefill", window, settings)
        peaks.append(bench.in_new_process(bench.peak_memory, *arguments))
    # At least the MLP's three results of one block, in float32
    assert peaks[1] - peaks[0] > 3 * 48 * 4096 * 4


# ---- the command line ----------------------------------------------------------------------------

BAD_FLAGS = [
    (["--windows", "0"], "--windows"),
    (["--windows", "many"], "--windows"),
    (["--windows", ","], "--windows"),
    (["--tasks", "train,sing"], "--tasks"),
    (["--repeats", "0"], "--repeats"),
    (["--batch_size", "-1"], "--batch_size"),
    (["--windows", "32", "--new_tokens", "32"], "--new_tokens"),
    (["--n_embd", "33"], "n_embd 33"),
    (["--n_layer", "0"], "n_layer"),
    (["--preset", "llama-8b"], "--preset"),
    (["--device", "abacus"], "--device abacus"),
    (["--checkpoint_activations", "some"], "--checkpoint_activations"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_input_is_one_line(flags, words, command, monkeypatch):
    monkeypatch.setattr(bench, "save_random", None)  # nothing is begun
    assert_refused(command(bench.main, *TINY, *flags), "bench.py", words)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(command, tmp_path):
    (tmp_path / "file").write_text("")
    ended = command(bench.main, *TINY, "--out", tmp_path / "file")
    assert_refused(ended, "bench.py", "--out")


def test_a_missing_transformers_is_one_line(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    words = "needs the library transformers: pip install"
    assert_refused(command(bench.main, *TINY), "bench.py", words)


def test_presets_and_shape_flags():
    args = bench.parse(["--preset", "llama-7b", "--n_layer", "2", "--windows", "8192"])
    config = bench.choose_settings(args).config
    assert (config.n_layer, config.n_embd, config.vocab_size) == (2, 4096, 32000)
    assert config.block_size == 8192
    config = bench.choose_settings(bench.parse([])).config
    assert 30e6 < config.n_params < 40e6
    assert config.head_dim == 64
    assert config.vocab_size == 32000
