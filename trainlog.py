"""What train.py shows and records: its folder, log.jsonl, the progress bar, Ctrl-C."""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cli import replacing
from model import LLaMAConfig
from parallel import mean_over_processes, processes, rank, states, step_of

# Steps between two looks at the losses, because a look makes the CPU wait for the GPU
FLUSH_EVERY = 10
# The first looks come after so many steps: the first step alone, because it takes longer than the
# others where kernels are compiled, and then enough steps to tell how long the run will take
FIRST_FLUSHES = (1, 3)


class Log:
    """OUT/log.jsonl, one JSON object for each step, and the progress bar on standard error.

    out: the run's folder.  first_step: the steps that are done already.  max_iters: the last step.
    content: what the training loss is over, "text", "text and keys" or "summaries".
    tokens: tokens of a step.  flops: FLOPs of a step.  peak_flops: those of one device per second
    by its data sheet, None where they are not known.

    All processes call it, because losses are averaged over them; process 0 writes. The losses stay
    on the device until `flush`, which is the one place where the CPU waits for the device.
    """

    def __init__(
        self, out: Path, *, first_step: int, max_iters: int, content: str, tokens: int,
        flops: float, peak_flops: float | None
    ) -> None:
        self.path = out / "log.jsonl"
        self.first_step = first_step
        self.max_iters = max_iters
        self.content = content
        self.estimated = False  # whether the time of the run has been said
        self.tokens = tokens
        self.flops = flops
        self.peak_flops = peak_flops
        self.pending: list[dict] = []  # lines of steps that are not in the file yet
        self.losses: list[Tensor] = []  # their losses, on the device
        self.clock = time.perf_counter()  # when the first pending step began
        if rank() == 0:
            self._drop_lines_after(first_step)
        self.bar = tqdm(total=max_iters, initial=first_step, unit="step", disable=rank() > 0)

    def _drop_lines_after(self, step: int) -> None:
        """Keep the lines up to a step: a resumed run writes the later ones again."""
        kept = []
        if step > 0 and self.path.exists():
            for line in self.path.read_text().splitlines(keepends=True):
                # A killed run may have left half a line
                if line.endswith("\n") and json.loads(line)["iter"] <= step:
                    kept.append(line)
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept))

    def add(self, step: int, lr: float, loss: Tensor) -> None:
        """Record a step that is done; loss is this process's, on the device."""
        self.pending.append({"iter": step, "lr": lr, "tokens": step * self.tokens})
        self.losses.append(loss)
        self.bar.update()

    def add_validation(self, loss: float) -> None:
        """Record the validation loss of the step that was added last."""
        step = self.pending[-1]["iter"]
        self.pending[-1]["val_loss"] = loss
        perplexity = math.exp(min(loss, 700))
        held_out = self.content.removesuffix(" and keys")
        if rank() == 0:
            message = f"step {step}: validation loss {loss:.4f} ({held_out} alone), "
            self.bar.write(message + f"perplexity {perplexity:.2f}", sys.stderr)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: the time spent here is not training time."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def flush_due(self, step: int) -> bool:
        """Whether the losses should be looked at after a step."""
        return step % FLUSH_EVERY == 0 or step - self.first_step in FIRST_FLUSHES

    def flush(self) -> None:
        """Bring the pending steps to the file. Raises ValueError if a loss is not finite."""
        if not self.pending:
            return
        losses = mean_over_processes(torch.stack(self.losses)).tolist()
        seconds = (time.perf_counter() - self.clock) / len(losses)  # of one step
        speed = {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "tflops": self.flops / seconds / 1e12,
        }
        if self.peak_flops:
            speed["mfu"] = self.flops / seconds / (self.peak_flops * processes())
        if rank() == 0:
            with open(self.path, "a") as file:
                for line, loss in zip(self.pending, losses):
                    file.write(json.dumps(line | {"loss": loss} | speed) + "\n")
        for line, loss in zip(self.pending, losses):
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss at step {line['iter']} is not finite: lower --learning_rate; "
                    f"what was saved before it stays in {self.path.parent}"
                )

        text = f"loss {losses[-1]:.3f} ({self.content}), {speed['tokens_per_second']:,.0f} tokens/s"
        if self.peak_flops:
            text += f", {speed['mfu']:.0%} MFU"
        self.bar.set_postfix_str(text)
        self._say_how_long(self.pending[-1]["iter"], seconds)
        self.pending = []
        self.losses = []
        self.clock = time.perf_counter()

    def _say_how_long(self, step: int, seconds: float) -> None:
        """Once, after the first few steps: how long the run will take, if beyond a minute."""
        if self.estimated or (step - self.first_step < max(FIRST_FLUSHES) and seconds < 20):
            return
        self.estimated = True
        steps = self.max_iters - self.first_step
        if steps * seconds > 60 and rank() == 0:
            left = timedelta(seconds=(self.max_iters - step) * seconds)
            message = f"about {duration(steps * seconds)} for {steps:,} steps, till "
            self.bar.write(message + clock(datetime.now(), left), sys.stderr)

    def close(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Format a time in minutes, hours or days."""
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def clock(now: datetime, left: timedelta) -> str:
    """The time of day when `left` has passed, with the date where that is another day."""
    end = now + left
    if end.date() == now.date():
        return f"{end:%H:%M}"
    return f"{end:%Y-%m-%d %H:%M}"


def run_folder(args: argparse.Namespace, config: LLaMAConfig) -> Path:
    """The run's folder. Raises ValueError if it holds another run, or a checkpoint of no run."""
    name = args.out
    if name is None and args.init == "scratch":
        name = "out/base"
    elif name is None:
        name = f"out/{config.rope}-{config.scale:g}"
    out = Path(name)
    found = states(out)
    if found and not args.resume and not args.overwrite:
        raise ValueError(
            f"--out {out} holds a run at step {step_of(found[-1]):,}: --resume to go on with it, "
            "--overwrite to start anew, or another --out"
        )
    if out.is_file():
        raise ValueError(f"--out {out} is a file: give a folder")
    # A run's folder has a log. Any other checkpoint would be lost at the end of this run.
    if (out / "config.json").exists() and not (out / "log.jsonl").exists():
        raise ValueError(f"--out {out} holds a checkpoint that is not a run's: give another folder")
    return out


def prepare_folder(args: argparse.Namespace, out: Path) -> None:
    """Make the run's folder; with --overwrite remove what an earlier run left in it."""
    out.mkdir(parents=True, exist_ok=True)
    if args.overwrite and not args.resume:
        for old in (out / "trainer", *out.glob("step-*")):
            shutil.rmtree(old, ignore_errors=True)


class StopSignal:
    """Catches Ctrl-C and SIGTERM, so that a run ends after the micro batch at hand and saves.

    A signal more than three seconds after the first one interrupts at once. An earlier one may be
    torchrun's, which passes the terminal's signal on to processes that have it already.
    """

    def __init__(self) -> None:
        self.number = 0  # the signal that came first, 0 while there is none
        self.time = 0.0
        self.handlers = {}
        self.pipe = -1  # where Python writes the number of a signal

    def __enter__(self) -> "StopSignal":
        # Python calls _catch between two of its own instructions, and a backward pass is a single
        # one, which may take a minute. But it writes the signal's number to a pipe at once, so a
        # thread that reads from the pipe can answer the user.
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)  # as set_wakeup_fd wants it
        signal.set_wakeup_fd(self.pipe)
        self.thread = threading.Thread(target=self._answer, args=(reader,), daemon=True)
        self.thread.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self.pipe)  # which ends the thread
        self.thread.join()

    def _answer(self, reader: int) -> None:
        """Say that a signal has come, when it comes. reader: the pipe's end to read from."""
        first = os.read(reader, 1)  # empty if the pipe is closed before any signal
        if first and rank() == 0:
            message = "stopping after this micro batch, then saving"
            after = "(a second Ctrl-C, after three seconds, stops at once)"
            print(f"\n{message} {after} ...", file=sys.stderr)
        # A signal that finds no reader would make Python warn
        while os.read(reader, 64):
            pass
        os.close(reader)

    def _catch(self, number: int, frame: object) -> None:
        if self.number and time.monotonic() > self.time + 3:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            self.time = time.monotonic()

    def on_any_process(self) -> bool:
        """Whether a signal has reached any process; all processes get the same answer."""
        caught = torch.tensor([float(self.number > 0)])  # on the CPU, so that no GPU is waited for
        return mean_over_processes(caught).item() > 0

    @property
    def exit_code(self) -> int:
        """128 plus the signal, as shells have it; SIGTERM where another process caught it."""
        return 128 + (self.number or signal.SIGTERM)
