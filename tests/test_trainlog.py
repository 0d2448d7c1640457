"""trainlog.py: a line for each step and none twice, and a signal that ends a run after the micro batch at hand."""

import json
import os
import signal
import time
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch

from model import LLaMAConfig
from trainlog import Log, StopSignal, clock, duration, run_folder


def open_log(out, first_step=0, peak_flops=None):
    return Log(
        out, first_step=first_step, max_iters=9, content="text and keys", tokens=100, flops=1e9,
        peak_flops=peak_flops
    )


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_losses_are_written_when_they_are_flushed(tmp_path, capsys):
    log = open_log(tmp_path, peak_flops=1e12)
    log.add(1, 0.1, torch.tensor(5.0))
    log.add(2, 0.2, torch.tensor(4.0))
    log.add_validation(4.5)
    assert lines(tmp_path) == []
    log.flush()
    first, second = lines(tmp_path)
    assert (first["iter"], first["loss"], first["lr"], first["tokens"]) == (1, 5.0, 0.1, 100)
    assert (second["iter"], second["loss"], second["tokens"], second["val_loss"]) == (2, 4.0, 200, 4.5)
    assert "val_loss" not in first
    # The two losses are of different things, which is said beside each
    shown = capsys.readouterr().err
    assert "step 2: validation loss 4.5000 (text alone), perplexity 90.02" in shown
    assert "loss 4.000 (text and keys)" in shown
    assert second["mfu"] == pytest.approx(second["tflops"])  # of 1e12 FLOP/s


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path):
    log = open_log(tmp_path)
    for step in range(1, 5):
        log.add(step, 0.1, torch.tensor(1.0))
    log.flush()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"iter": 5, "lo')  # a killed run's last line
    open_log(tmp_path, first_step=2)
    assert [line["iter"] for line in lines(tmp_path)] == [1, 2]
    open_log(tmp_path, first_step=0)
    assert lines(tmp_path) == []


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    log = open_log(tmp_path)
    log.add(1, 0.1, torch.tensor(1.0))
    log.add(2, 0.1, torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="the loss at step 2 is not finite: lower --learning_rate"):
        log.flush()


def test_paused_time_is_no_training_time(tmp_path):
    log = open_log(tmp_path)
    with log.paused():
        time.sleep(0.3)
    log.add(1, 0.1, torch.tensor(1.0))
    log.flush()
    assert lines(tmp_path)[0]["tokens_per_second"] > 100 / 0.3


def test_the_time_of_the_run_is_said_once_after_the_first_steps(tmp_path, capsys):
    log = Log(
        tmp_path, first_step=10, max_iters=1010, content="text", tokens=1, flops=1e9,
        peak_flops=None
    )
    assert [step for step in range(11, 35) if log.flush_due(step)] == [11, 13, 20, 30]
    for first, last, seconds in ((11, 11, 19), (12, 13, 14.4), (14, 20, 70)):
        for step in range(first, last + 1):
            log.add(step, 0.1, torch.tensor(1.0))
        log.clock -= seconds
        log.flush()
    # The first step took 19 seconds, but the two after it 7.2 each
    said = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert len(said) == 1 and "about 2.0 h for 1,000 steps, till " in said[0]


def test_a_short_run_says_no_time_and_a_slow_first_step_is_enough(tmp_path, capsys):
    log = open_log(tmp_path)
    log.clock -= 6.5  # nine steps take less than a minute
    log.add(1, 0.1, torch.tensor(1.0))
    log.flush()
    log.add(2, 0.1, torch.tensor(1.0))
    log.add(3, 0.1, torch.tensor(1.0))
    log.clock -= 13
    log.flush()
    assert "about" not in capsys.readouterr().err
    log = open_log(tmp_path)
    log.clock -= 60
    log.add(1, 0.1, torch.tensor(1.0))
    log.flush()
    assert "about 9 min for 9 steps, till " in capsys.readouterr().err


def test_times_as_people_read_them():
    assert [duration(s) for s in (89 * 60, 7560, 200000)] == ["89 min", "2.1 h", "2.3 days"]
    evening = datetime(2026, 2, 28, 22, 30)
    assert clock(evening, timedelta(minutes=80)) == "23:50"
    assert clock(evening, timedelta(hours=2)) == "2026-03-01 00:30"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.on_any_process()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once, as torchrun does: it does not interrupt
        assert stop.on_any_process()
    assert stop.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_is_answered_before_python_comes_to_handle_it(capsys):
    """As in a backward pass, which is a single instruction of Python's."""
    with StopSignal() as stop:
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # in the place of _catch
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        said = ""
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            said = capsys.readouterr().err
            time.sleep(0.01)
        assert said.startswith("\nstopping after this micro batch, then saving (a second Ctrl-C")
        assert stop.number == 0
    assert capsys.readouterr().err == ""


def test_a_later_signal_interrupts(monkeypatch):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.time -= 4
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_checkpoint_that_no_run_wrote_is_not_overwritten(tmp_path):
    config = LLaMAConfig.preset("tiny")
    args = SimpleNamespace(out=str(tmp_path / "model"), init="scratch", resume=False, overwrite=True)
    folder = tmp_path / "model"
    assert run_folder(args, config) == folder
    folder.mkdir()
    (folder / "notes.txt").write_text("not touched by a run")
    assert run_folder(args, config) == folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--out .*model holds a checkpoint that is not a run's"):
        run_folder(args, config)
    (folder / "log.jsonl").touch()
    assert run_folder(args, config) == folder
    args.out = str(folder / "notes.txt")
    with pytest.raises(ValueError, match="notes.txt is a file"):
        run_folder(args, config)
