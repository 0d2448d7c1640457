"""Pre-train a small LLaMA, or extend the window of any LLaMA by fine-tuning it at the longer length (the paper's §3).

    python train.py                                      # pre-train the tiny base on text, into out/base
    python train.py --scale 8                            # extend it by Position Interpolation, into out/linear-8
    python train.py --scale 8 --rope none                # the paper's baseline: direct fine-tuning at that length
    torchrun --nproc_per_node 8 train.py --init FOLDER --scale 16     # any LLaMA, on eight GPUs
    python train.py --resume --out out/linear-8          # go on where a run stopped, exactly

Read rope.py, model.py, checkpoint.py, data.py and sequences.py first; then this file from the bottom: `train` is the
loop.
A batch is a pure function of (seed, step, index in the global batch) and each process takes its slice of it, so
that any number of processes sees the same batches, and a resumed run the ones that it would have seen.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict,
)  # fmt: skip
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import sequences
from model import PRESETS, LLaMA, LLaMAConfig

# PyTorch's own remarks on saving from one process, which is what we mean to do
warnings.filterwarnings("ignore", module="torch.distributed")

LOG_EVERY = 10  # steps between two looks at the loss: reading it makes the CPU wait for the GPU


def recipe(config: LLaMAConfig, scratch: bool) -> dict:
    """What the command line leaves out, by what is trained: three regimes, told by the parameters."""
    if scratch:  # a mix of text and retrieval: on text alone a model this small learns no retrieval in minutes
        return dict(max_iters=2200, batch_size=16, learning_rate=4e-3, warmup_iters=50, decay="linear",
                    short_share=0.0, passkey_share=0.4, repeat_share=0.3)  # fmt: skip
    paper = dict(max_iters=1000, batch_size=64, learning_rate=2e-5, warmup_iters=20, decay="constant",
                 short_share=0.0, passkey_share=0.0, repeat_share=0.0)  # fmt: skip
    if config.n_params > 25e9:  # §3.1: a lower rate from 33B on
        return paper | dict(learning_rate=1e-5)
    if config.n_params > 1e9:
        return paper
    if config.n_params > 20e6:  # between: smaller models are pre-trained, and so fine-tuned, at higher rates
        return paper | dict(learning_rate=1e-4)
    # A model this small forgets in tens of steps what its data don't ask for: half of its tokens keep the skill of
    # retrieval alive, in sequences no longer than those of its pre-training. It sees no passkey beyond its old window.
    return paper | dict(max_iters=200, batch_size=max(2, 8192 // config.block_size), learning_rate=1e-3, decay="linear",
                        short_share=0.5, passkey_share=0.8, repeat_share=0.2)  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = checkpoint.Parser(__doc__)
    checkpoint.add_model_flags(parser)
    add = parser.add_argument
    add("--preset", default="tiny", choices=PRESETS, help="the shape, when --init is scratch")
    add(
        "--data",
        nargs="+",
        help="files or folders of .txt/.md/.py, .jsonl or .parquet; default: Python's standard library",
    )
    add("--out", help="the folder to write; default: out/base, or out/METHOD-SCALE when extending")
    add("--resume", action="store_true", help="go on with the run in --out, with its flags unless given anew")
    add("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    by_size = "; default: by the model's size, see `recipe`"
    add("--max_iters", type=int, help="steps" + by_size)
    add("--batch_size", type=int, help="sequences a step, over all processes" + by_size)
    add("--micro_batch_size", type=int, help="sequences at a time on one process; default: about 16,384 tokens")
    add("--learning_rate", type=float, help="the peak" + by_size)
    add("--warmup_iters", type=int, help="steps from 10%% of the peak to it" + by_size)
    add("--decay", choices=("constant", "linear"), help="after the warm-up: linear goes to 5%% of the peak" + by_size)
    add("--weight_decay", type=float, default=0.0, help="AdamW's")
    add("--grad_clip", type=float, default=1.0, help="the largest norm of the gradient; 0: no clipping")
    add("--short_share", type=float, help="when extending: tokens in sequences of the original length; "
        "the longer are plain text" + by_size)  # fmt: skip
    add("--passkey_share", type=float, help="sequences of the original length with passkeys" + by_size)
    add("--repeat_share", type=float, help="sequences of the original length made of repeated segments" + by_size)
    add("--save_every", type=int, default=200, help="steps between two checkpoints to resume from")
    add(
        "--save_at",
        default="",
        help="steps, as 0,200,400, whose weights are kept in OUT/step-N (the paper's tables over steps)",
    )
    add(
        "--eval_every", type=int, help="steps between two looks at the validation loss; default: a tenth of --max_iters"
    )
    add("--dist", choices=("ddp", "fsdp"), help="under torchrun: each process holds all the weights, or a part; "
        "default: ddp where weights, gradients and optimizer fit one device")  # fmt: skip
    add("--checkpoint_activations", default="none", choices=("none", "full", "selective"),
        help="recompute activations in the backward pass: slower, far less memory")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile, block by block")
    args = parser.parse_args(argv)
    if args.resume:
        newest = newest_state(
            Path(args.out or parser.error("--resume needs --out, the folder of the run to go on with"))
        )
        parser.set_defaults(**checkpoint.read_json(newest / "args.json"))
        args = parser.parse_args(argv)
        args.newest = newest
    elif args.init is None:
        args.init = "out/base" if args.scale or args.rope else "scratch"
        if args.init == "out/base" and not Path("out/base").exists():
            parser.error(
                "--scale and --rope extend a model, and out/base isn't there: make it with `python train.py`, or "
                "give --init"
            )
    if args.init == "scratch" and (args.scale or args.rope):
        parser.error(
            "--scale and --rope extend a model that is trained already: first `python train.py`, then --init out/base"
        )
    return args


def check(args: argparse.Namespace, config: LLaMAConfig, processes: int) -> None:
    """Fill in the recipe, and refuse what can't be run."""
    for name, value in recipe(config, args.init == "scratch").items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("max_iters", "batch_size", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in (
        "learning_rate",
        "warmup_iters",
        "weight_decay",
        "grad_clip",
        "short_share",
        "passkey_share",
        "repeat_share",
    ):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be a finite number of at least 0, got {getattr(args, name)}")
    if args.passkey_share + args.repeat_share > 1:
        raise ValueError(
            f"--passkey_share {args.passkey_share} and --repeat_share {args.repeat_share} add up to more than 1"
        )
    if args.short_share >= 1:
        raise ValueError(
            f"--short_share {args.short_share} leaves no sequence at the extended window: give less than 1"
        )
    for length, n, _ in batch_parts(args, config):
        if n % processes:
            raise ValueError(
                f"--batch_size {args.batch_size}: its {n} sequences of {length} tokens can't be shared among "
                f"{processes} processes"
            )
    if args.micro_batch_size is None:
        args.micro_batch_size = max(1, 16384 // config.block_size)
    if args.micro_batch_size < 1:
        raise ValueError(f"--micro_batch_size must be at least 1, got {args.micro_batch_size}")
    try:
        args.keep = {int(step) for step in args.save_at.split(",") if step}
    except ValueError:
        raise ValueError(f"--save_at takes whole numbers with commas between, got {args.save_at!r}") from None
    if args.eval_every is None:
        args.eval_every = max(1, args.max_iters // 10)
    if config.rope == "dynamic":
        raise ValueError(
            "--rope dynamic changes with the length and is not trained: use it to evaluate, or train another method"
        )


def lr_at(step: int, args: argparse.Namespace) -> float:
    """The learning rate of one step: linear from 10% over the warm-up (§3.1), then constant or linear to 5%."""
    warm = min(1.0, 0.1 + 0.9 * (step + 1) / max(1, args.warmup_iters))
    return args.learning_rate * warm * (1 - 0.95 * step / args.max_iters if args.decay == "linear" else 1)


def batch_parts(args: argparse.Namespace, config: LLaMAConfig, step: int = 0) -> list[tuple[int, int, sequences.Mix]]:
    """What a batch is made of: (length, sequences, mix) of each part.

    Pre-training: the mix of text and retrieval, at the window. Its last fifth has a third of the retrieval: by then
    the skill is there, and text is what it reads worse. Extending: plain text at the long window, and (short_share)
    retrieval at the original one. There each row holds one key: a row with several, asked for the latest one, would
    teach to look no further than that, and shorter rows would rehearse near keys alone.
    """
    cut = 1 / 3 if args.init == "scratch" and step >= 0.8 * args.max_iters else 1.0
    shares = dict(passkey=args.passkey_share * cut, repeat=args.repeat_share * cut)
    T, L = config.block_size, min(config.block_size, config.original_window)
    if T == L:
        return [(T, args.batch_size, sequences.Mix(**shares, alone=0.75))]
    short = round(args.batch_size * args.short_share)  # counted as sequences of T tokens
    parts = [
        (T, args.batch_size - short, sequences.Mix()),
        (L, short * (T // L), sequences.Mix(**shares, dense=0.0, alone=1.0)),
    ]
    return [part for part in parts if part[1]]


# ---- state on disk: OUT/trainer/step-N, whole or not there ---------------------------------------------------------


def states(out: Path) -> list[Path]:
    """The states of a run, the newest last."""
    return sorted(out.glob("trainer/step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest_state(out: Path) -> Path:
    if not states(out):
        raise ValueError(f"--resume: {out} holds no run (no trainer/step-N): leave --resume out to start one")
    return states(out)[-1]


def save_state(
    out: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> None:
    """Everything that a resumed run needs, written beside and renamed; the last two are kept."""
    final, temporary = out / f"trainer/step-{step}", out / f"trainer/.step-{step}.tmp"
    if final.exists():
        return  # just resumed from it
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary, no_dist=not dist.is_initialized())
    if rank() == 0:
        kept = {
            name: value for name, value in vars(args).items() if name not in ("resume", "overwrite", "newest", "keep")
        }
        checkpoint.write_json(temporary / "args.json", kept)
        temporary.rename(final)
        for old in states(out)[:-2]:
            shutil.rmtree(old)
    barrier()


def load_state(state: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a state into model and optimizer, on any number of processes; the step it was saved at."""
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=state, no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[-300:]
        raise ValueError(
            f"{state} does not hold this model and optimizer ({reason}): is --init another model?"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(state.name.removeprefix("step-"))


# ---- one process among several -------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def choose_dist(args: argparse.Namespace, config: LLaMAConfig, device: torch.device) -> str:
    """--dist, or what suits: 16 bytes a parameter (float32 weight, gradient, two moments) against a device's memory."""
    if args.dist or device.type != "cuda":
        return args.dist or "ddp"
    needed, there = 16 * config.n_params, torch.cuda.get_device_properties(device).total_memory
    choice = "ddp" if needed < 0.6 * there else "fsdp"  # the rest is for activations
    if rank() == 0:
        print(
            f"--dist {choice}: weights and optimizer take {needed / 1e9:.0f} GB, a device has {there / 1e9:.0f}",
            file=sys.stderr,
        )
    return choice


def sharded(
    source: LLaMA | None, config: LLaMAConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> LLaMA:
    """The model cut into shards, one a process (FSDP2): each block is gathered when its turn comes and dropped after.

    source: the weights, on process 0 alone. Weights and moments are float32; what is gathered is dtype, gradients are
    summed in float32. Blocks take their inputs as they are: the embedding's output is dtype, cos and sin are float32.
    """
    with torch.device("meta"):
        model = LLaMA(config)
    if compiled:
        for block in model.layers:
            block.compile()
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.layers, model):
        fully_shard(part, mp_policy=policy)
    model.to_empty(device=device)
    weights = source.state_dict() if source is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)
    return model


def save_weights(model: torch.nn.Module, folder: Path, tokenizer: data.Tokenizer) -> None:
    """The weights as a Hugging Face folder, written by process 0, from wherever they are."""
    raw = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(raw, FSDPModule):  # all processes bring their shards together in process 0's memory
        weights = get_model_state_dict(raw, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        config = raw.config
        with torch.device("meta"):
            raw = LLaMA(config)
        if rank() == 0:
            raw.load_state_dict(weights, assign=True)
    if rank() == 0:
        checkpoint.save(raw, folder, tokenizer)


# ---- the run -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, dtype = checkpoint.device_and_dtype(args)
    if "RANK" in os.environ:  # torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device, dtype)
    finally:
        if dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.barrier()  # gloo may abort when one process leaves while another still talks
            dist.destroy_process_group()


def prepare(args: argparse.Namespace) -> tuple[LLaMAConfig, data.Tokenizer, Callable[[], LLaMA]]:
    """What to train: its config, its tokenizer, and a function that brings its weights, in float32."""
    if args.init == "scratch":
        config = LLaMAConfig.preset(args.preset)
        tokenizer = data.train_tokenizer(
            (text for _, text in data.read_documents(args.data, "train")), config.vocab_size
        )
        config = replace(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        return config, tokenizer, lambda: LLaMA(config)
    flags = dict(scale=args.scale, rope=args.rope, original_window=args.original_window)
    config = checkpoint.read_config(args.init, **flags)
    tokenizer = checkpoint.load_tokenizer(args.init, config)
    return config, tokenizer, lambda: checkpoint.load(args.init, **flags, dtype=torch.float32)


def train(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    processes = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(args.seed)
    config, tokenizer, weights = prepare(args)
    check(args, config, processes)
    out = Path(args.out or ("out/base" if args.init == "scratch" else f"out/{config.rope}-{config.scale:g}"))
    if states(out) and not args.resume and not args.overwrite:
        raise ValueError(
            f"--out {out} holds a run: --resume to go on with it, --overwrite to start anew, or another --out"
        )
    corpus = data.load_corpus(args.data, tokenizer, "train")
    held_out = data.load_corpus(args.data, tokenizer, "val")
    T = config.block_size
    for text in (corpus, held_out):  # too short a text is said before anything is written
        sequences.sample_batch(text, tokenizer, T, 0, [0], seed=0)

    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    if dist.is_initialized() and choose_dist(args, config, device) == "fsdp":
        model = raw = sharded(weights() if rank() == 0 else None, config, device, dtype, args.compile)
        autocast = nullcontext()  # FSDP's policy casts the weights themselves
    else:
        model = raw = weights().to(device)
        if args.compile:
            for block in raw.layers:
                block.compile()
        if dist.is_initialized():
            model = DistributedDataParallel(raw, gradient_as_bucket_view=True)
    raw.checkpoint_activations = args.checkpoint_activations
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )

    start = 0
    log_file = out / "log.jsonl"
    if args.resume:
        start = load_state(args.newest, model, optimizer)
    if rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        if args.overwrite and not args.resume:
            for old in (out / "trainer", *out.glob("step-*")):
                shutil.rmtree(old, ignore_errors=True)
        lines = log_file.read_text().splitlines(keepends=True) if args.resume and log_file.exists() else []
        # lines after the state that we resume from are written again, and a killed run may have left half a line
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["iter"] <= start]
        with checkpoint.replacing(log_file) as temporary:
            temporary.write_text("".join(lines))
        window = (
            f"window {config.original_window} -> {T} by rope {config.rope!r}"
            if args.init != "scratch"
            else f"window {T}"
        )
        print(
            f"{args.init} -> {out}: {config.n_params / 1e6:,.2f} M parameters, {window}; {args.max_iters} steps of "
            f"{args.batch_size} x {T} tokens on {processes} x {device}, {str(dtype).removeprefix('torch.')}",
            file=sys.stderr,
        )

    stop, first = [], 0.0  # signals met; the first one ends the run after the step at hand

    def on_signal(number: int, frame: object) -> None:
        nonlocal first
        stop.append(number)
        first = first or time.monotonic()
        if time.monotonic() > first + 3:  # the user means it; an earlier one is torchrun's, which passes signals on
            raise KeyboardInterrupt

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def stopping() -> bool:
        """Whether any process was told to stop: all agree on the step, on the CPU, so that no GPU is waited for."""
        return bool(mean_over_processes(torch.tensor(float(len(stop)))))

    def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This process's share of a step's global batch, in micro batches."""
        made, first = [], 0
        for length, n, mix in batch_parts(args, config, step):
            share, size = n // processes, args.micro_batch_size * (T // length)
            mine = range(first + rank() * share, first + (rank() + 1) * share)
            for i in range(0, share, size):
                rows = mine[i : i + size]
                made.append(sequences.sample_batch(corpus, tokenizer, length, step, rows, seed=args.seed, mix=mix))
            first += n
        return [(x.pin_memory(), y.pin_memory()) for x, y in made] if device.type == "cuda" else made

    @torch.no_grad()
    def validate() -> float:
        """The mean loss over 64 windows of validation text, always the same ones."""
        n = max(1, min(64, 65536 // T) // processes)
        model.eval()
        total = torch.zeros((), device=device)
        for index in range(rank() * n, (rank() + 1) * n):
            x, y = sequences.sample_batch(held_out, tokenizer, T, 0, [index], seed=0)
            with autocast:
                total += model(x.to(device), y.to(device)) / n
        model.train()
        return mean_over_processes(total).item()

    model.train()
    rows: list[dict] = []  # steps not yet in the log
    losses: list[torch.Tensor] = []  # theirs, still on the device
    since = time.perf_counter()

    def flush(bar: tqdm) -> None:
        """Bring the losses of the last steps to the log: the one place where the CPU waits for the device."""
        nonlocal since
        if not losses:
            return
        values = mean_over_processes(torch.stack(losses)).tolist()
        speed = args.batch_size * T * len(values) / (time.perf_counter() - since)
        for row, value in zip(rows, values):
            row |= {"loss": value, "tokens_per_second": round(speed, 1)}
        if rank() == 0:
            with open(log_file, "a") as log:
                log.writelines(json.dumps(row) + "\n" for row in rows)
        if not all(map(math.isfinite, values)):
            bad = next(row["iter"] for row, value in zip(rows, values) if not math.isfinite(value))
            raise ValueError(
                f"the loss at step {bad} is not finite: lower --learning_rate; {out} keeps the checkpoint before it"
            )
        bar.set_postfix_str(f"loss {values[-1]:.3f}, {speed:,.0f} tokens/s")
        rows.clear()
        losses.clear()
        since = time.perf_counter()

    step, saved = start, start if args.resume else -1
    with (
        ThreadPoolExecutor(1) as ahead,
        tqdm(total=args.max_iters, initial=start, unit="step", disable=rank() > 0) as bar,
    ):
        upcoming = ahead.submit(batches, start)
        if start == 0 and 0 in args.keep:
            save_weights(model, out / "step-0", tokenizer)
        while step < args.max_iters and not stopping():
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args)
            made, upcoming = (
                upcoming.result(),
                ahead.submit(batches, step + 1),
            )  # the next batch is made while this one runs
            total, tokens = torch.zeros((), device=device), sum(x.numel() for x, _ in made)
            for i, (x, y) in enumerate(made):
                last = i == len(made) - 1  # gradients are summed over processes once, with the last micro batch
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
                with (
                    model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext(),
                    autocast,
                ):
                    loss = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) * (
                        x.numel() / tokens
                    )
                    loss.backward()
                total += loss.detach()
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(total)
            rows.append({"iter": step, "lr": optimizer.param_groups[0]["lr"], "tokens": step * args.batch_size * T})
            bar.update()
            if step % args.eval_every == 0 or step == args.max_iters:
                paused = time.perf_counter()
                rows[-1]["val_loss"] = held_out_loss = validate()
                bar.write(
                    f"step {step}: validation loss {held_out_loss:.4f}, perplexity {math.exp(held_out_loss):.2f}",
                    sys.stderr,
                )
                since += time.perf_counter() - paused
            if step % LOG_EVERY == 0 or step % args.save_every == 0 or step in args.keep:
                flush(bar)
            if step % args.save_every == 0:
                save_state(out, step, model, optimizer, args)
                saved = step
            if step in args.keep:
                save_weights(model, out / f"step-{step}", tokenizer)
        flush(bar)
        if saved != step:
            save_state(out, step, model, optimizer, args)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    save_weights(model, out, tokenizer)
    if step < args.max_iters:
        if rank() == 0:
            print(f"stopped at step {step}, saved; go on with: python train.py --resume --out {out}", file=sys.stderr)
        sys.exit(128 + (stop or [signal.SIGTERM])[0])
    if rank() == 0:
        print(
            f"{out}: done, {step} steps; next: python eval_ppl.py --init {out}; python passkey.py --init {out}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    checkpoint.run(main)
