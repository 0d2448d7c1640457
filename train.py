"""Pre-train a small LLaMA, or extend the window of any LLaMA by fine-tuning at the longer length.

    python train.py                           # pre-train the tiny base, into out/base
    python train.py --scale 8                 # extend the newest base in out/ by PI
    python train.py --scale 8 --rope none     # the paper's baseline: direct fine-tuning
    python train.py --scale 8 --row_tokens 256                # short rows with skipped positions
    python train.py --resume --out out/linear-8               # go on where a run stopped, exactly
    torchrun --nproc_per_node 8 train.py --init FOLDER --scale 16       # any LLaMA, on eight GPUs
    python train.py --plan --preset llama-7b --scale 16 --world_size 8 --device_memory 80

Position Interpolation needs nothing of its own here. --scale S makes the config's window S times
the original one (hf_config.extend), and rope.py does the rest. recipe.py says what a step is made
of: text alone as in the paper, or for a tiny model text and passkeys. Each row of a step's global
batch is a pure function of (seed, step, the row's index), and each process makes its share of the
rows. So with the same --batch_size any number of processes sees the same batches, and a resumed run
sees the batches that it would have seen. All flags are declared in train_flags.py.
"""

import argparse
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import cli
import cost
import data
import plan
from cli import device_and_dtype, extension
from loss import IGNORED
from model import LLaMA, LLaMAConfig
from parallel import (
    barrier, load_state, mean_over_processes, newest_state, process_0_first, process_group,
    processes, rank, save_state, save_weights, sharded
)
from recipe import batch_parts, lr_at
from tokenizer import Tokenizer, train_tokenizer
from train_flags import base_notes, parse, settle_flags
from trainlog import Log, StopSignal, prepare_folder, run_folder
from trainset import Batch, ReportData, TextData, prefetch, share_of_batch

# PyTorch warns when one process saves alone, which is what a run on one process does
warnings.filterwarnings("ignore", module="torch.distributed", message=".*single process.*")

# ---- the model -----------------------------------------------------------------------------------


def read_model_config(args: argparse.Namespace) -> tuple[LLaMAConfig, Tokenizer]:
    """The config to train, and its tokenizer, which a run from scratch trains first."""
    if args.init != "scratch":
        config = checkpoint.read_config(args.init, **extension(args))
        return config, checkpoint.load_tokenizer(args.init, config)
    config = LLaMAConfig.preset(args.preset)
    if args.theta is not None:
        config = replace(config, rope_theta=args.theta)
    texts = (text for _, text in data.read_documents(args.data, "train"))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    return replace(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id), tokenizer


def read_data(
    args: argparse.Namespace, config: LLaMAConfig, tokenizer: Tokenizer
) -> TextData | ReportData:
    """What the rows are made of."""
    if args.summary_field:
        return ReportData(args, config, tokenizer)
    return TextData(args, config, tokenizer)


def prepare(args: argparse.Namespace) -> None:
    """Download --init and --data and tokenize, so that a run with the same flags finds it all."""
    config, tokenizer = read_model_config(args)
    # What is tokenized is the same on any machine, so that the CPU may stand for the GPUs
    machine = plan.machine_here(torch.device("cpu"), torch.float32)
    settle_flags(args, config, world=1, machine=machine)
    read_data(args, config, tokenizer)
    print("all is ready: now the same flags without --prepare", file=sys.stderr)


def dtype_to_save(args: argparse.Namespace) -> torch.dtype:
    """What --save_dtype means: for "auto" 16 bits where --init has them, else float32."""
    if args.save_dtype != "auto":
        return getattr(torch, args.save_dtype)
    if args.init != "scratch":
        dtype = checkpoint.stored_dtype(args.init)
        if dtype in (torch.bfloat16, torch.float16):
            return dtype
    return torch.float32


def build_model(
    args: argparse.Namespace, config: LLaMAConfig, engine: str, device: torch.device,
    dtype: torch.dtype
) -> nn.Module:
    """The model with float32 weights on this process: whole, or its part of it (engine "fsdp")."""
    if args.init == "scratch":
        model = LLaMA(config)  # from the seed, so the same on every process
        if engine == "fsdp":
            model = sharded(config, model.named_parameters(), device, dtype)
        model = model.to(device)
    elif engine == "fsdp":
        weights = checkpoint.stored_weights(args.init, **extension(args))
        model = sharded(config, weights, device, dtype)
    else:
        model = checkpoint.load(args.init, **extension(args), device=device, dtype=torch.float32)
    model.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        # DDP would split a compiled graph for its buckets, but blocks are compiled one by one
        # already
        torch._dynamo.config.optimize_ddp = False
        for block in model.layers:
            block.compile()
    if engine == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model.train()


def build_optimizers(args: argparse.Namespace, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The paper's AdamW (§3.1) for all weights, or for a base from scratch Muon for the matrices.

    Muon makes all directions of a matrix's update equally large. So a small model learns rare
    things, such as to copy a key, in fewer steps than with AdamW. Embedding, head and norms have
    AdamW in both cases.
    """
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        if args.optimizer == "muon" and "layers." in name and weight.ndim == 2:
            matrices.append(weight)
        else:
            others.append(weight)
    adamw = torch.optim.AdamW(
        others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay,
        fused=True
    )
    if not matrices:
        return [adamw]
    # "match_rms_adamw" makes updates as large as those of AdamW, so both have one learning rate
    muon = torch.optim.Muon(
        matrices, lr=args.learning_rate, weight_decay=args.weight_decay,
        adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


# ---- one step ------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training run works with, on this process."""

    out: Path
    config: LLaMAConfig
    tokenizer: Tokenizer
    source: TextData | ReportData
    device: torch.device
    model: nn.Module
    autocast: AbstractContextManager
    optimizers: list[torch.optim.Optimizer]
    step: int  # steps that are done
    save_dtype: torch.dtype  # of the weights that are kept


def train_step(
    run: Run, args: argparse.Namespace, batch: Batch, lr: float, stop: StopSignal
) -> Tensor | None:
    """Do one step: set the learning rate, add up gradients, update the weights.

    Returns the loss as `accumulate_gradients` does; None if a signal came: nothing has changed.
    """
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    loss = accumulate_gradients(run, batch, stop)
    if loss is None:
        return None
    if args.grad_clip > 0:
        nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip)
    for optimizer in run.optimizers:
        optimizer.step()
    clear_gradients(run)
    run.step += 1
    return loss


def accumulate_gradients(run: Run, batch: Batch, stop: StopSignal) -> Tensor | None:
    """Add up the gradients of this process's micro batches.

    Returns a loss, on the device, whose mean over the processes is the loss of the step; None where
    a signal came before the last micro batch: all processes then give the step up.

    The loss of a step is the sum over all scored tokens of the global batch, divided by their
    number N. DDP and FSDP average gradients over the P processes. So a micro batch must give (its
    sum) / (N / P) = (its mean) * (its scored tokens) / (N / P).
    """
    scored = [(rows.targets != IGNORED).sum().item() for rows in batch]
    scored_here = torch.tensor(float(sum(scored)), dtype=torch.float64)
    mean_scored = mean_over_processes(scored_here).item()  # N / P
    total = torch.zeros((), device=run.device)
    for i, rows in enumerate(batch):
        if stop.on_any_process():
            # A state that is saved before the first step must find no gradients
            run.model.zero_grad(set_to_none=True)
            return None
        # DDP averages gradients over the processes once, with the last micro batch. FSDP does so
        # with each, because no process could hold the gradients of the whole model in between.
        sync = nullcontext()
        if isinstance(run.model, DistributedDataParallel) and i < len(batch) - 1:
            sync = run.model.no_sync()
        rows = rows.to(run.device)
        with sync:
            with run.autocast:
                loss = run.model(rows.ids, rows.targets, positions=rows.positions)
                loss = loss * (scored[i] / mean_scored)
            loss.backward()
        total += loss.detach()
    return total


def clear_gradients(run: Run) -> None:
    """Forget the gradients of the step that is done."""
    # With DDP they are views of its buckets: set to zero in place, they need no second memory
    in_buckets = isinstance(run.model, DistributedDataParallel)
    run.model.zero_grad(set_to_none=not in_buckets)


@torch.no_grad()
def validation_loss(run: Run, windows: int, stop: StopSignal) -> float | None:
    """The mean loss over held-out rows: the same ones each time, of text or reports alone.

    Returns None where a signal came before the last window.
    """
    run.model.eval()
    total = torch.zeros((), device=run.device)
    # Each process takes every n-th window. With FSDP all processes must call the model equally
    # often, so in the last round some may repeat a window without counting it.
    rounds = range(0, windows, processes())
    for first in tqdm(rounds, "validation", leave=False, delay=1, disable=rank() > 0):
        if stop.on_any_process():
            run.model.train()
            return None
        index = first + rank()
        rows = run.source.held_out(min(index, windows - 1)).to(run.device)
        with run.autocast:
            loss = run.model(rows.ids, rows.targets, positions=rows.positions)
        if index < windows:
            total += loss * processes() / windows  # the mean below divides by processes()
    run.model.train()
    return mean_over_processes(total).item()


# ---- the run -------------------------------------------------------------------------------------


def set_up(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Run:
    """What the loop works with; the run's folder is made, and what is about to run is printed."""
    # What to train, into which folder, on which data
    torch.manual_seed(args.seed)
    with process_0_first():
        config, tokenizer = read_model_config(args)
    machine = plan.machine_here(device, dtype)
    notes = settle_flags(args, config, processes(), machine)
    out = run_folder(args, config)
    save_dtype = dtype_to_save(args)
    if not args.force:
        plan.check_room(args, config, out, machine, save_dtype)
    with process_0_first():
        source = read_data(args, config, tokenizer)

    # The model and its optimizers
    engine, _ = plan.choose_engine(args, config, processes(), machine.free)
    model = build_model(args, config, engine, device, dtype)
    autocast = cli.autocast(device, dtype)
    if engine == "fsdp":
        autocast = nullcontext()  # FSDP casts the weights itself
    optimizers = build_optimizers(args, model)

    # Where an earlier run stopped
    step = 0
    if args.resume:
        step = load_state(newest_state(out), model, optimizers)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["weight_decay"] = args.weight_decay  # as other flags, it may be given anew
    if rank() == 0:
        prepare_folder(args, out)
        notes += base_notes(args.init)
        plan.announce(args, config, out, device, machine, save_dtype, notes, step)
    return Run(
        out, config, tokenizer, source, device, model, autocast, optimizers, step, save_dtype
    )


def content_of(args: argparse.Namespace) -> str:
    """What the training loss is over, for the log."""
    if args.summary_field:
        return "summaries"
    if args.mix == "retrieval":
        return "text and keys"
    return "text"


def train(args: argparse.Namespace, run: Run) -> int:
    """The training loop; returns the exit code: 0, or that of the signal that stopped it."""
    parts = batch_parts(args, run.config)  # lengths and rows are those of every step
    log = Log(
        run.out, first_step=run.step, max_iters=args.max_iters, content=content_of(args),
        tokens=sum(part.rows * part.length for part in parts),
        flops=cost.step_flops(run.config, parts), peak_flops=cost.peak_flops(run.device)
    )
    if run.step == 0 and 0 in args.save_at:
        with log.paused():
            save_weights(run.model, run.out / "step-0", run.tokenizer, run.save_dtype)

    def make_batch(step: int) -> Batch:
        step_parts = batch_parts(args, run.config, step)
        pin = run.device.type == "cuda"
        return share_of_batch(run.source, step, step_parts, args.micro_batch_size, pin)

    with StopSignal() as stop:
        for batch in prefetch(make_batch, first=run.step, last=args.max_iters):
            # one step, or none if a signal came: what counts then is the last whole step
            lr = lr_at(run.step, args)
            loss = train_step(run, args, batch, lr, stop)
            if loss is None:
                break
            log.add(run.step, lr, loss)

            # every --eval_every steps: the validation loss
            if run.step % args.eval_every == 0 or run.step == args.max_iters:
                with log.paused():
                    val_loss = validation_loss(run, args.eval_windows, stop)
                if val_loss is not None:
                    log.add_validation(val_loss)

            # every few steps, and before anything is saved: write the losses to the log, which ends
            # the run if one of them is not finite
            save_due = run.step % args.save_every == 0
            keep_due = run.step in args.save_at
            if save_due or keep_due or log.flush_due(run.step):
                log.flush()

            # at --save_at: weights to keep; every --save_every steps: a state to resume from, which
            # comes last, because a resumed run does not repeat this step. The log's clock stands
            # still, because saving is not training time.
            with log.paused():
                if keep_due:
                    folder = run.out / f"step-{run.step}"
                    save_weights(run.model, folder, run.tokenizer, run.save_dtype)
                if save_due:
                    save_run(run, args)

        # at the end, or after a signal: save everything
        log.flush()
        log.close()
        save_run(run, args)
        save_weights(run.model, run.out, run.tokenizer, run.save_dtype)
        # torchrun kills the other processes when one exits, and process 0 may still be writing
        barrier()

    finished = run.step >= args.max_iters
    if rank() == 0:
        print(plan.closing_line(args, run.out, run.step, finished, run.device), file=sys.stderr)
    if finished:
        return 0
    return stop.exit_code


def save_run(run: Run, args: argparse.Namespace) -> None:
    """Save a state to resume from: weights, optimizer, step and flags."""
    flags = dict(vars(args))
    for name in ("resume", "overwrite", "force"):  # they are about a start, not about the run
        del flags[name]
    save_state(run.out, run.step, run.model, run.optimizers, flags)


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    if args.plan:
        world = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
        config = plan.planned_config(args)
        machine = plan.planned_machine(args)
        notes = settle_flags(args, config, world, machine)
        text = plan.plan(args, config, world, machine)
        print("\n".join([text, *notes]))
        return
    if args.prepare:
        prepare(args)
        return
    with process_group(args.device) as device_name:
        device, dtype = device_and_dtype(device_name, args.dtype)
        try:
            exit_code = train(args, set_up(args, device, dtype))
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{device} is out of memory: give a smaller --micro_batch_size, "
                "--checkpoint_activations selective or --dist fsdp; --plan says what is needed"
            ) from None
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    cli.run(main)
