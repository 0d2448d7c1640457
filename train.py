"""Pre-train a small LLaMA, or extend the window of any LLaMA by fine-tuning it at the longer length (the paper's §3).

    python train.py                                      # pre-train the tiny base on text, into out/base
    python train.py --scale 8                            # extend it by Position Interpolation, into out/linear-8
    python train.py --scale 8 --rope none                # the paper's baseline: direct fine-tuning at that length
    torchrun --nproc_per_node 8 train.py --init FOLDER --scale 16     # any LLaMA, on eight GPUs
    python train.py --plan --preset llama-7b --scale 16 --world_size 8 --device_memory 80     # will it fit?
    python train.py --resume --out out/linear-8          # go on where a run stopped, exactly

Read rope.py, model.py, checkpoint.py, data.py, sequences.py and parallel.py first; then this file: the recipe, the
flags, what a batch is made of, and `train`, the loop. A batch is a pure function of (seed, step, index in the global
batch) and each process takes its slice of it, so that any number of processes sees the same batches, and a resumed
run the ones that it would have seen.
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
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import cost
import data
import sequences
from model import PRESETS, LLaMA, LLaMAConfig
from parallel import (
    barrier, choose_dist, load_state, mean_over_processes, newest_state, processes, rank, save_state, save_weights,
    sharded, states,
)  # fmt: skip

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
    by_size = "; default: by the model's size, see `recipe`"
    add("--preset", default="tiny", choices=PRESETS, help="the shape, when --init is scratch (or with --plan)")
    add("--data", nargs="+",
        help="files or folders of .txt/.md/.py, .jsonl or .parquet, hub data sets as hf:owner/name,split=train,take=N; "
        "default: Python's standard library")
    add("--summary_field", help="learn to write summaries: rows of --data (.jsonl, .parquet) have a document in "
        "--document_field, its summary here, and the loss is on the summary alone; every twentieth is for validation")
    add("--document_field", default="document", help="with --summary_field")
    add("--max_input", type=int, default=sequences.PAPER_INPUT,
        help="with --summary_field: cut documents to so many tokens, and further where the window needs it")
    add("--out", help="the folder to write; default: out/base, or out/METHOD-SCALE when extending")
    add("--resume", action="store_true", help="go on with the run in --out, with its flags unless given anew")
    add("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    add("--max_iters", type=int, help="steps" + by_size)
    add("--batch_size", type=int, help="sequences a step, over all processes" + by_size)
    add("--micro_batch_size", type=int, help="sequences at a time on one process; default: about 16,384 tokens")
    add("--learning_rate", type=float, help="the peak" + by_size)
    add("--warmup_iters", type=int, help="steps from 10%% of the peak to it" + by_size)
    add("--decay", choices=("constant", "linear"), help="after the warm-up: linear goes to 5%% of the peak" + by_size)
    add("--weight_decay", type=float, default=0.0, help="AdamW's")
    add("--grad_clip", type=float, default=1.0, help="the largest norm of the gradient; 0: no clipping")
    add("--short_share", type=float,
        help="when extending: tokens in sequences of the original length; the longer are plain text" + by_size)
    add("--passkey_share", type=float, help="sequences of the original length with passkeys" + by_size)
    add("--repeat_share", type=float, help="sequences of the original length made of repeated segments" + by_size)
    add("--save_every", type=int, default=200, help="steps between two checkpoints to resume from")
    add("--save_at", default="",
        help="steps, as 0,200,400, whose weights are kept in OUT/step-N (the paper's tables over steps)")
    add("--eval_every", type=int,
        help="steps between two looks at the validation loss; default: a tenth of --max_iters")
    add("--dist", choices=("ddp", "fsdp"), help="under torchrun: each process holds all the weights, or a part; "
        "default: ddp where weights, gradients and optimizer fit one device")
    add("--checkpoint_activations", default="none", choices=("none", "full", "selective"),
        help="recompute activations in the backward pass: slower, far less memory")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--plan", action="store_true", help="say what the run takes (memory, tokens, FLOPs) and stop")
    add("--world_size", type=int, help="with --plan: the number of processes; default: torchrun's, or 1")
    add("--device_memory", type=float, help="with --plan: GB of a GPU that isn't here; default: this device's")
    args = parser.parse_args(argv)
    extends = args.scale is not None or args.rope is not None
    if args.resume:
        if not args.out:
            parser.error("--resume needs --out, the folder of the run to go on with")
        newest = newest_state(Path(args.out))
        parser.set_defaults(**checkpoint.read_json(newest / "args.json"))
        args = parser.parse_args(argv)
        args.newest = newest
    elif args.init is None:
        args.init = "out/base" if extends and not args.plan else "scratch"
        if args.init == "out/base" and not Path("out/base").exists():
            parser.error("--scale and --rope extend a model, and out/base isn't there: make it with "
                         "`python train.py`, or give --init")
    if args.init == "scratch" and extends and not args.plan:
        parser.error("--scale and --rope extend a model that is trained already: first `python train.py`, then "
                     "--init out/base")
    return args  # fmt: skip


def check(args: argparse.Namespace, config: LLaMAConfig, world: int) -> None:
    """Fill in the recipe, and refuse what can't be run."""
    for name, value in recipe(config, args.init == "scratch" and not args.scale).items():
        if getattr(args, name) is None:
            if name == "batch_size" and config.n_params <= 20e6:  # as many of both parts for each process
                value = -(-value // (2 * world)) * 2 * world
            setattr(args, name, value)
    if args.micro_batch_size is None:
        args.micro_batch_size = max(1, 16384 // config.block_size)
    if args.eval_every is None:
        args.eval_every = max(1, args.max_iters // 10)
    for name in ("max_iters", "batch_size", "save_every", "micro_batch_size", "eval_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    shares = ("short_share", "passkey_share", "repeat_share")
    for name in ("learning_rate", "warmup_iters", "weight_decay", "grad_clip", *shares):
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
        if n % world:
            raise ValueError(
                f"--batch_size {args.batch_size}: its {n} sequences of {length} tokens can't be shared among "
                f"{world} processes"
            )
    try:
        args.keep = {int(step) for step in args.save_at.split(",") if step}
    except ValueError:
        raise ValueError(f"--save_at takes whole numbers with commas between, got {args.save_at!r}") from None
    if args.summary_field and not args.data:
        raise ValueError("--summary_field needs --data, files with documents and summaries")
    if args.summary_field and args.init == "scratch":
        raise ValueError("--summary_field fine-tunes a model that reads already: give --init")
    if args.max_input < 1:
        raise ValueError(f"--max_input must be at least 1, got {args.max_input}")
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
    if T == L or args.summary_field:
        return [(T, args.batch_size, sequences.Mix(**shares))]
    short = round(args.batch_size * args.short_share)  # counted as sequences of T tokens
    parts = [
        (T, args.batch_size - short, sequences.Mix()),
        (L, short * (T // L), sequences.Mix(**shares, dense=0.0, alone=1.0)),
    ]
    return [part for part in parts if part[1]]


# ---- --plan ------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> str:
    """What the run takes, before any weight is read: steps, tokens, FLOPs, and each device's memory."""
    if args.init == "scratch":  # the preset stands for a checkpoint of its shape
        config = checkpoint.extend(LLaMAConfig.preset(args.preset), args.scale, args.rope)
    else:
        config = checkpoint.read_config(args.init, **checkpoint.extension(args))
    world = args.world_size or int(os.environ.get("WORLD_SIZE", 1))
    check(args, config, world)
    device, dtype = checkpoint.device_and_dtype(args)
    there, kind = cost.device_memory(device), device.type
    if args.device_memory:
        there, kind = args.device_memory * 1e9, "cuda"
        dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    engine = args.dist or (choose_dist(config, there)[0] if world > 1 else "ddp")
    T = config.block_size
    micro, items = memory(args, config, world, engine, dtype, kind)
    flops = args.max_iters * step_flops(args, config)
    rope = f", by rope {config.rope!r} at scale {config.scale:g}" if config.rope != "none" else ""
    hours = ", ".join(f"{flops / (0.4 * cost.PEAK_FLOPS[name]) / 3600:,.1f} {name} hours" for name in ("A100", "H100"))
    lines = [
        f"{config.n_params / 1e6:,.1f} M parameters, window {config.original_window:,} -> {T:,}{rope}",
        f"{args.max_iters:,} steps of {args.batch_size} x {T:,}: {args.max_iters * args.batch_size * T:,} tokens",
        f"{flops:.2e} FLOPs: {hours}, if 40% of the data sheet's FLOP/s are reached",
        f"each of {world} devices: {engine if world > 1 else 'alone'}, {str(dtype).removeprefix('torch.')}, "
        f"{micro} x {T:,} tokens at a time, activations recomputed: {args.checkpoint_activations}",
        *(f"  {name:12}{cost.size(number):>12}" for name, number in items.items()),
        f"  {'of':12}{cost.size(there):>12}  {cost.verdict(items['peak'], there)}",
    ]
    return "\n".join(lines)


def memory(
    args: argparse.Namespace, config: LLaMAConfig, world: int, engine: str, dtype: torch.dtype, device_type: str
) -> tuple[int, dict[str, float]]:
    """Sequences at a time on a process, and the bytes that they take (cost.memory)."""
    share = args.batch_size // world
    micro = min(args.micro_batch_size, share)
    return micro, cost.memory(
        config, micro * config.block_size, processes=world, dist=engine, dtype=dtype, device_type=device_type,
        checkpoint_activations=args.checkpoint_activations, micro_batches=-(-share // micro),
    )  # fmt: skip


def step_flops(args: argparse.Namespace, config: LLaMAConfig) -> float:
    """FLOPs of a step, over all processes."""
    return sum(n * length * cost.flops_per_token(config, length) for length, n, _ in batch_parts(args, config))


# ---- the run -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.plan:
        print(plan(args))
        return
    if "RANK" in os.environ and args.device in ("auto", "cuda") and torch.cuda.is_available():  # torchrun
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)  # first, or every process would open the first GPU too
    device, dtype = checkpoint.device_and_dtype(args)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device, dtype)
        barrier()  # gloo may abort when one process leaves while another still talks
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{device} is out of memory: give a smaller --micro_batch_size, --checkpoint_activations selective or "
            "--dist fsdp; --plan says what is needed"
        ) from None
    except RuntimeError as error:
        if not (processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))):
            raise
        print(f"train.py: error: process {rank()} lost another one; start all again, with --resume, to go on from the "
              f"last checkpoint ({str(error).splitlines()[0]})", file=sys.stderr)  # fmt: skip
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def prepare(args: argparse.Namespace) -> tuple[LLaMAConfig, data.Tokenizer]:
    """What to train: its config and its tokenizer."""
    if args.init != "scratch":
        config = checkpoint.read_config(args.init, **checkpoint.extension(args))
        return config, checkpoint.load_tokenizer(args.init, config)
    config = LLaMAConfig.preset(args.preset)
    texts = (text for _, text in data.read_documents(args.data, "train"))
    tokenizer = data.train_tokenizer(texts, config.vocab_size)
    return replace(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id), tokenizer


def build(args: argparse.Namespace, config: LLaMAConfig, device: torch.device, dtype: torch.dtype) -> LLaMA:
    """The model with its weights, float32, on this process: whole, or its part of it (--dist fsdp)."""
    flags = checkpoint.extension(args)
    whole = LLaMA(config) if args.init == "scratch" else None  # from one seed, the same on every process
    if processes() > 1 and args.dist == "fsdp":
        weights = whole.named_parameters() if whole else checkpoint.stored_weights(args.init, **flags)
        model = sharded(config, weights, device, dtype)
    else:
        model = whole.to(device) if whole else checkpoint.load(args.init, **flags, device=device, dtype=torch.float32)
    model.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        for block in model.layers:
            block.compile()
    return model


def open_data(args: argparse.Namespace, config: LLaMAConfig, tokenizer: data.Tokenizer) -> tuple[Callable, Callable]:
    """Two functions that make ids and targets, (B, T) each: rows(step, length, mix, indices) some rows of a step's
    global batch, and held_out(index) a row of validation data. ValueError where there is too little data."""
    T = config.block_size
    if args.summary_field:
        reports = data.read_reports(args.data, args.document_field, args.summary_field)
        sequences.check_reports(reports, tokenizer, T)
        learned = held = reports  # few are not worth a split
        if len(reports) > 20:
            learned, held = [report for i, report in enumerate(reports) if i % 20], reports[::20]

        def summaries(of: list, step: int, indices: range, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
            return sequences.sample_reports(of, tokenizer, T, step, indices, batch_size=batch_size, seed=seed,
                                            max_input=args.max_input)  # fmt: skip

        return (lambda step, length, mix, indices: summaries(learned, step, indices, args.batch_size, args.seed),
                lambda index: summaries(held, index, range(1), 1, 0))  # fmt: skip

    corpora = [data.load_corpus(args.data, tokenizer, split) for split in ("train", "val")]
    for corpus in corpora:  # said before anything is written
        sequences.sample_batch(corpus, tokenizer, T, 0, [0], seed=0)

    def rows(step: int, length: int, mix: sequences.Mix, indices: range) -> tuple[Tensor, Tensor]:
        return sequences.sample_batch(corpora[0], tokenizer, length, step, indices, seed=args.seed, mix=mix)

    return rows, lambda index: sequences.sample_batch(corpora[1], tokenizer, T, 0, [index], seed=0)


def train(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(args.seed)
    world = processes()
    config, tokenizer = prepare(args)
    check(args, config, world)
    out = Path(args.out or ("out/base" if args.init == "scratch" else f"out/{config.rope}-{config.scale:g}"))
    if states(out) and not args.resume and not args.overwrite:
        raise ValueError(
            f"--out {out} holds a run: --resume to go on with it, --overwrite to start anew, or another --out"
        )
    if rank() > 0:  # process 0 fetches and tokenizes, the others find its cache
        barrier()
    rows, held_out = open_data(args, config, tokenizer)
    if rank() == 0:
        barrier()
    T = config.block_size
    there = cost.device_memory(device) / (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1)
    why = ""
    if args.dist is None:
        args.dist, why = choose_dist(config, there) if world > 1 else ("ddp", "")
    fsdp = world > 1 and args.dist == "fsdp"

    # FSDP's policy casts the weights themselves
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 and not fsdp else nullcontext()
    model = build(args, config, device, dtype)
    if world > 1 and not fsdp:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )
    start = load_state(args.newest, model, optimizer) if args.resume else 0
    kept = {name: v for name, v in vars(args).items() if name not in ("resume", "overwrite", "newest", "keep")}
    log_file = out / "log.jsonl"
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
        _, needs = memory(args, config, world, args.dist, dtype, device.type)
        window = f"window {config.original_window} -> {T} by rope {config.rope!r}"
        print(
            f"{args.init} -> {out}: {config.n_params / 1e6:,.2f} M parameters, "
            f"{window if args.init != 'scratch' else f'window {T}'}; {args.max_iters} steps of {args.batch_size} x {T} "
            f"tokens on {world} x {device}{f' ({args.dist})' * (world > 1)}, {str(dtype).removeprefix('torch.')}"
            + f"\n--dist {args.dist}: {why}" * bool(why)
            + f"\nmemory: about {cost.size(needs['peak'])} of {cost.size(there)} a process, "
            f"{cost.verdict(needs['peak'], there)}",
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

    def batches(step: int) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a step's global batch, in micro batches."""
        made, first = [], 0
        for length, n, mix in batch_parts(args, config, step):
            share, size = n // world, args.micro_batch_size * (T // length)
            mine = range(first + rank() * share, first + (rank() + 1) * share)
            made += [rows(step, length, mix, mine[i : i + size]) for i in range(0, share, size)]
            first += n
        return [(x.pin_memory(), y.pin_memory()) for x, y in made] if device.type == "cuda" else made

    @torch.no_grad()
    def validate() -> float:
        """The mean loss over up to 64 windows of validation data, the same at every look of a number of processes."""
        n = max(1, min(64, 65536 // T) // world)
        model.eval()
        total = torch.zeros((), device=device)
        for index in range(rank() * n, (rank() + 1) * n):
            x, y = held_out(index)
            with autocast:
                total += model(x.to(device), y.to(device)) / n
        model.train()
        return mean_over_processes(total).item()

    model.train()
    log: list[dict] = []  # lines of steps not yet in the file
    losses: list[Tensor] = []  # theirs, still on the device
    since = time.perf_counter()
    flops, peak = step_flops(args, config), cost.peak_flops(device)

    def flush(bar: tqdm) -> None:
        """Bring the losses of the last steps to the log: the one place where the CPU waits for the device."""
        nonlocal since
        if not losses:
            return
        values = mean_over_processes(torch.stack(losses)).tolist()
        seconds = (time.perf_counter() - since) / len(values)  # a step
        speed = {"tokens_per_second": round(args.batch_size * T / seconds, 1), "tflops": flops / seconds / 1e12}
        if peak:
            speed["mfu"] = flops / seconds / (peak * world)
        if rank() == 0:
            with open(log_file, "a") as file:
                file.writelines(json.dumps(line | {"loss": loss} | speed) + "\n" for line, loss in zip(log, values))
        if not all(map(math.isfinite, values)):
            bad = next(line["iter"] for line, loss in zip(log, values) if not math.isfinite(loss))
            raise ValueError(
                f"the loss at step {bad} is not finite: lower --learning_rate; {out} keeps the checkpoint before it"
            )
        mfu = f", {speed['mfu']:.0%} MFU" if peak else ""
        bar.set_postfix_str(f"loss {values[-1]:.3f}, {speed['tokens_per_second']:,.0f} tokens/s{mfu}")
        log.clear()
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
        while step < args.max_iters:
            made, upcoming = upcoming.result(), ahead.submit(batches, step + 1)  # the next is made while this one runs
            asked = [(y != -100).sum().item() for _, y in made]  # tokens that count in the loss
            # all processes agree on the step to stop at; on the CPU, so that no GPU is waited for
            stopping, share = mean_over_processes(torch.tensor([len(stop), sum(asked)], dtype=torch.float64)).tolist()
            if stopping:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args)
            total = torch.zeros((), device=device)
            for i, (x, y) in enumerate(made):
                # DDP sums gradients over the processes once, with the last micro batch; FSDP with each, so that every
                # process goes on holding its part of them alone
                last = i == len(made) - 1
                with model.no_sync() if world > 1 and not fsdp and not last else nullcontext(), autocast:
                    loss = model(x.to(device, non_blocking=True), y.to(device, non_blocking=True)) * (asked[i] / share)
                    loss.backward()
                total += loss.detach()
            if args.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(total)
            log.append({"iter": step, "lr": optimizer.param_groups[0]["lr"], "tokens": step * args.batch_size * T})
            bar.update()
            if step % args.eval_every == 0 or step == args.max_iters:
                paused = time.perf_counter()
                log[-1]["val_loss"] = loss = validate()
                if rank() == 0:
                    ppl = math.exp(min(loss, 700))
                    bar.write(f"step {step}: validation loss {loss:.4f}, perplexity {ppl:.2f}", sys.stderr)
                since += time.perf_counter() - paused
            if step % LOG_EVERY == 0 or step % args.save_every == 0 or step in args.keep:
                flush(bar)
            if step % args.save_every == 0:
                save_state(out, step, model, optimizer, kept)
                saved = step
            if step in args.keep:
                save_weights(model, out / f"step-{step}", tokenizer)
            if not losses:  # just brought to the log: what was saved since is no step's time
                since = time.perf_counter()
        flush(bar)
        if saved != step:
            save_state(out, step, model, optimizer, kept)
    save_weights(model, out, tokenizer)
    barrier()  # who ends first would have the others ended, process 0 while it writes
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if step < args.max_iters:
        if rank() == 0:
            print(f"stopped at step {step}, saved; go on with: python train.py --resume --out {out}", file=sys.stderr)
        sys.exit(128 + (stop or [signal.SIGTERM])[0])
    if rank() == 0:
        measures = ("summarize.py",) if args.summary_field else ("eval_ppl.py", "passkey.py")
        held = f", {cost.size(torch.cuda.max_memory_allocated(device))} at most" if device.type == "cuda" else ""
        print(
            f"{out}: done, {step} steps{held}; next: {'; '.join(f'python {name} --init {out}' for name in measures)}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    checkpoint.run(main)
