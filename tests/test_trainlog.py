"""trainlog.py: a line for each step and none twice, and a signal that ends a run after the step at hand."""

import json
import os
import signal
import time

import pytest
import torch

from trainlog import Log, StopSignal


def open_log(out, first_step=0, peak_flops=None):
    return Log(out, first_step=first_step, max_iters=9, tokens=100, flops=1e9, peak_flops=peak_flops)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_losses_are_written_when_they_are_flushed(tmp_path):
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


def test_a_later_signal_interrupts(monkeypatch):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        stop.time -= 4
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
