"""Speed and peak memory of this model beside transformers' LlamaForCausalLM, in one run.

    python bench.py                 # 35 M parameters at 1,024 to 4,096 tokens: minutes on a CPU
    python bench.py --tasks decode --windows 1024 --repeats 9
    python bench.py --preset llama-7b --n_layer 4 --windows 8192,32768 --compile

Both sides open the same checkpoint with the same dtype, optimizer and activation checkpointing, and
their logits must agree before anything is timed. There are three tasks:

    train    one step: forward, loss, backward and AdamW
    prefill  read a window into a KV cache and compute the last token's logits
    decode   add --new_tokens tokens to a KV cache, greedily, up to the window

The two sides take turns, so that whatever else the machine does slows both. Speed is the median of
the repeats, and a ratio is ours over transformers'.
"""

import argparse
import gc
import inspect
import itertools
import math
import multiprocessing
import platform
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cli
import cost
import plots
from loss import IGNORED
from model import PRESETS, KVCache, LLaMA, LLaMAConfig

TASKS = ("train", "prefill", "decode")
# The shape where no --preset is given: 35 M parameters, with heads of 64 as in many larger models
SHAPE = dict(vocab_size=32000, n_layer=6, n_head=6, n_embd=384, intermediate_size=1024)
SHAPE_FLAGS = (*SHAPE, "n_kv_head")

# ---- the two sides -------------------------------------------------------------------------------


@dataclass
class Settings:
    """What both sides share."""

    config: LLaMAConfig
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    new_tokens: int
    checkpoint_activations: str
    compile: bool

    def weight_dtype(self, task: str) -> torch.dtype:
        """Training keeps the weights in float32 and computes in dtype by autocast."""
        return torch.float32 if task == "train" else self.dtype

    @property
    def warm_ups(self) -> int:
        """Calls of a task that do not count.

        The first compiles, and it allocates the optimizer's moments. In the second, decoding goes
        back in the cache, which transformers is compiled for once more.
        """
        return 2 if self.compile else 1

    def ids(self, length: int) -> Tensor:
        """Random tokens (B, length), the same in each call."""
        shape = (self.batch_size, length)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, shape, generator=generator)
        return ids.to(self.device)


class Ours:
    """This repo's model, with the methods that are measured."""

    def __init__(self, folder: str, task: str, settings: Settings) -> None:
        dtype = settings.weight_dtype(task)
        self.model = checkpoint.load(folder, device=settings.device, dtype=dtype)
        self.model.checkpoint_activations = settings.checkpoint_activations
        if task != "train":
            self.model.lay_out_for_decoding()  # as generate.py does
        if settings.compile:
            # Block by block, as train.py does: compiling the whole model takes longer
            for block in self.model.layers:
                block.compile()
            # A block's compile() is about its `forward`, but `next_token_logits` calls this method
            last = self.model.layers[-1]
            last.last_token = torch.compile(last.last_token)

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, ids: Tensor) -> Tensor:
        targets = F.pad(ids[:, 1:], (0, 1), value=IGNORED)  # the next token of each
        return self.model(ids, targets)

    def prefill(self, ids: Tensor, window: int) -> tuple[Tensor, KVCache]:
        """Read ids (B, T). Returns the likeliest next token (B, 1), and a cache for the window."""
        weight = self.model.lm_head.weight
        cache = KVCache(self.model.config, len(ids), window, weight.device, weight.dtype)
        return self.decode(ids, cache), cache

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        """The likeliest token (B, 1) after the cache's tokens and ids (B, T)."""
        return self.model.next_token_logits(ids, cache).argmax(-1, keepdim=True)

    def rewind(self, cache: KVCache, length: int) -> None:
        """Keep only the first `length` tokens of the cache."""
        cache.length = length


class Transformers:
    """transformers' model, with the methods of `Ours`."""

    def __init__(self, folder: str, task: str, settings: Settings) -> None:
        transformers = import_transformers()
        transformers.utils.logging.disable_progress_bar()
        options = {"attn_implementation": "sdpa", "dtype": settings.weight_dtype(task)}
        model = transformers.LlamaForCausalLM.from_pretrained(folder, **options)
        self.model = model.to(settings.device).train(task == "train")
        # The argument has one of these names, by the release of transformers 5
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        if settings.checkpoint_activations == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if settings.compile:
            model.compile()

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def prefill(self, ids: Tensor, window: int) -> tuple[Tensor, object]:
        cache = import_transformers().DynamicCache(config=self.model.config)
        return self.decode(ids, cache), cache

    def decode(self, ids: Tensor, cache: object) -> Tensor:
        inputs = {"input_ids": ids, self.cache_name: cache}
        return self.model(**inputs, logits_to_keep=1).logits.argmax(-1)

    def rewind(self, cache: object, length: int) -> None:
        surplus = cache.get_seq_length() - length
        if surplus > 0:
            cache.crop(-surplus)  # a negative number of tokens is removed from the end


SIDES = {"ours": Ours, "transformers": Transformers}


def import_transformers() -> ModuleType:
    return cli.import_extra("transformers", "test", "bench.py")


def save_random(config: LLaMAConfig, folder: str) -> None:
    """Save a model with random weights."""
    torch.manual_seed(0)
    model = LLaMA(config)
    # With these weights attention is far from uniform and no logit is zero, so that a difference
    # between the two sides anywhere in the model shows in the logits
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.size(1)))
    checkpoint.save(model, folder)


@torch.inference_mode()
def logit_difference(ours: Ours, theirs: Transformers, settings: Settings) -> float:
    """The largest difference between logits, in standard deviations of all logits.

    Raises ValueError if rounding does not explain it.
    """
    ids = settings.ids(64)
    with cli.autocast(settings.device, settings.dtype):
        a = ours.logits(ids).float()  # (B, T, V)
        b = theirs.logits(ids).float()
    difference = ((a - b).abs().max() / b.std()).item()
    allowed = 1e-3 if settings.dtype == torch.float32 else 0.2
    if not difference < allowed:  # written so that nan raises too
        raise ValueError(
            "the two sides are not the same model: "
            f"their logits differ by {difference:.2g} standard deviations"
        )
    return difference


# ---- what is measured ----------------------------------------------------------------------------


def prepare(
    side: Ours | Transformers, task: str, window: int, settings: Settings
) -> Callable[[], object]:
    """A function that does the task each time it is called. It needs `Settings.warm_ups` first."""
    if task == "train":
        ids = settings.ids(window)
        optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            with cli.autocast(settings.device, settings.dtype):
                loss = side.loss(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    if task == "prefill":
        ids = settings.ids(window)

        @torch.inference_mode()
        def prefill() -> None:
            side.prefill(ids, window)

        return prefill

    # decode: fill the cache but for the last new_tokens of the window, which are then added
    start = window - settings.new_tokens
    with torch.inference_mode():
        first, cache = side.prefill(settings.ids(start), window)

    @torch.inference_mode()
    def decode() -> Tensor:
        side.rewind(cache, start)  # to where the call before began
        tokens = [first]
        for _ in range(settings.new_tokens):
            tokens.append(side.decode(tokens[-1], cache))
        return torch.cat(tokens, dim=1)  # (B, 1 + new_tokens)

    return decode


def peak_memory(name: str, folder: str, task: str, window: int, settings: Settings) -> int:
    """Peak bytes of a task, with weights, optimizer and cache. To be called in a new process.

    On a GPU they are what PyTorch's allocator handed out. On a CPU they are what the process has
    grown by since everything was imported.
    """
    import_transformers().LlamaForCausalLM  # the first use of this name imports a large module
    before = process_memory("VmRSS")
    call = prepare(SIDES[name](folder, task, settings), task, window, settings)
    for _ in range(settings.warm_ups):
        call()
    # Reset the peak, because loading or compiling may have taken more than the task does
    cuda = settings.device.type == "cuda"
    reset = Path("/proc/self/clear_refs")
    if cuda:
        torch.cuda.reset_peak_memory_stats(settings.device)
    elif reset.exists():
        reset.write_text("5")
    call()
    if cuda:
        return torch.cuda.max_memory_allocated(settings.device)
    return process_memory("VmHWM") - before


def process_memory(name: str) -> int:
    """Bytes of memory that this process has now ("VmRSS") or has had at most ("VmHWM").

    macOS tells the most alone, and so its figures hold what loading and compiling took.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])


def in_new_process(function: Callable, *args) -> object:
    """function(*args), called in a process that has allocated nothing yet."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def enough_memory(task: str, window: int) -> Iterator[None]:
    """Report a lack of memory in one line."""
    try:
        yield
    # The pool breaks when Linux kills a process that takes too much
    except (torch.OutOfMemoryError, BrokenProcessPool):
        message = f"{task} at {window}: not enough memory: give fewer --n_layer"
        raise ValueError(message) from None


def measure_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The wall-clock time of a call, the device's work included."""
    gc.collect()  # now, so that it is not done during the call
    # Wait for the GPU, because PyTorch itself does not wait until it has finished
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def take_turns(
    calls: dict[str, Callable[[], object]], repeats: int, warm_ups: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each of the repeats, after so many rounds of warm-up."""
    seconds = {name: [] for name in calls}
    order = list(calls)
    for _ in range(warm_ups + repeats):
        for name in order:
            seconds[name].append(measure_seconds(calls[name], device))
        order.reverse()  # whoever came last comes first in the next round
    return {name: values[warm_ups:] for name, values in seconds.items()}


def measure_speed(
    task: str, window: int, repeats: int, folder: str, settings: Settings
) -> tuple[dict[str, list[float]], float]:
    """Seconds of a task on each side, and the difference of their logits."""
    gc.collect()  # frees the models of the measurement before, which may be part of cycles
    ours = Ours(folder, task, settings)
    theirs = Transformers(folder, task, settings)
    difference = logit_difference(ours, theirs, settings)
    # Forget the code that was compiled for another length. PyTorch would go on with slower code for
    # any length, and after 8 versions of it uncompiled, with no more than a warning.
    if settings.compile:
        torch._dynamo.reset()
    calls = {
        "ours": prepare(ours, task, window, settings),
        "transformers": prepare(theirs, task, window, settings),
    }
    return take_turns(calls, repeats, settings.warm_ups, settings.device), difference


# ---- the results ---------------------------------------------------------------------------------


def compare(
    task: str, window: int, seconds: dict[str, list], memory: dict[str, int], settings: Settings
) -> dict:
    """A row of the results: the figures of each side, and the ratios of ours to theirs."""
    length = settings.new_tokens if task == "decode" else window
    tokens = settings.batch_size * length
    row = {"task": task, "window": window, "tokens": tokens}
    peak = cost.peak_flops(settings.device)
    for name in SIDES:
        speed = tokens / statistics.median(seconds[name])
        figures = {"tokens_per_second": speed, "seconds": seconds[name], "memory": memory[name]}
        # MFU says little about the other tasks: prefill skips parts of the model, and decoding
        # waits for memory rather than for arithmetic
        if task == "train" and peak is not None:
            figures["mfu"] = speed * cost.flops_per_token(settings.config, window) / peak
        if task == "decode":
            figures["bytes_per_second"] = speed / settings.batch_size * decoded_bytes(settings)
        row[name] = figures
    if task == "train":
        needs = cost.memory(
            settings.config, tokens, dtype=settings.dtype, device_type=settings.device.type,
            checkpoint_activations=settings.checkpoint_activations
        )
        row["planned_memory"] = needs["peak"]

    # The two sides' calls of one round are neighbors in time, so their ratios show the noise
    ours = row["ours"]
    theirs = row["transformers"]
    round_ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"])]
    row["speed_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    row["speed_ratio_min"] = min(round_ratios)
    row["speed_ratio_max"] = max(round_ratios)
    row["memory_ratio"] = ours["memory"] / theirs["memory"]
    return row


def decoded_bytes(settings: Settings) -> int:
    """Bytes of the weights that a decoding step reads. An untied embedding is not read whole."""
    config = settings.config
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.n_embd
    return settings.dtype.itemsize * (config.n_params - embedding)


def results_table(rows: list[dict]) -> str:
    """The rows as text."""
    header = ["task", "window"]
    header += ["ours: tokens/s", "transformers: tokens/s", "ratio (lowest..highest)"]
    header += ["ours: MB", "by --plan", "transformers: MB", "ratio"]
    lines = []
    for row in rows:
        cells = [row["task"], row["window"]]
        for name in SIDES:
            cell = f"{row[name]['tokens_per_second']:,.1f}"
            if "mfu" in row[name]:
                cell += f" (MFU {row[name]['mfu']:.1%})"
            cells.append(cell)
        spread = f"{row['speed_ratio_min']:.2f}..{row['speed_ratio_max']:.2f}"
        cells.append(f"{row['speed_ratio']:.2f} ({spread})")
        planned = "-"
        if "planned_memory" in row:
            planned = megabytes(row["planned_memory"])
        cells += [megabytes(row["ours"]["memory"]), planned]
        cells += [megabytes(row["transformers"]["memory"]), f"{row['memory_ratio']:.2f}"]
        lines.append(cells)
    return cli.text_table(header, lines)


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.0f}"


def machine(device: torch.device) -> dict:
    """The device and the software."""
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": import_transformers().__version__,
    }


# ---- the command line ----------------------------------------------------------------------------


def task_names(text: str) -> list[str]:
    """An argparse type: names of TASKS with commas between."""
    names = text.split(",")
    if not set(names) <= set(TASKS):
        raise argparse.ArgumentTypeError(f"takes any of {','.join(TASKS)}, got {text}")
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    one = cli.at_least(1)
    windows = [1024, 2048, 4096]
    dtypes = ("auto", "float32", "bfloat16")
    add("--preset", choices=PRESETS, help="the model's shape; default: 35 M parameters, 6 layers")
    for name in SHAPE_FLAGS:
        add(f"--{name}", type=one, help="in place of the preset's")
    add("--windows", nargs="+", action=cli.WholeNumbers, const=2, default=windows, help="tokens")
    add("--tasks", type=task_names, default=",".join(TASKS), help="any of them, with commas")
    add("--batch_size", type=one, default=1, help="sequences at a time")
    add("--new_tokens", type=one, default=32, help="that decoding adds; the window holds them")
    add("--repeats", type=one, default=5, help="of each task on each side")
    add("--checkpoint_activations", default="none", choices=("none", "full"),
        help="in training; full: each block is computed again in the backward pass")
    add("--compile", action="store_true", help="torch.compile, on both sides")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one")
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 where the GPU has it")
    add("--out", default="out/bench", help="the folder of bench.json and bench.png")
    args = parser.parse_args(argv)

    if not args.windows:
        raise ValueError("--windows is empty: give at least one")
    if "decode" in args.tasks and args.new_tokens >= args.windows[0]:
        raise ValueError(f"--new_tokens must be below the smallest window, {args.windows[0]}")
    if not cli.can_be_written(Path(args.out) / "bench.json"):
        raise ValueError(f"{args.out} can't be written into: give another --out")
    return args


def choose_settings(args: argparse.Namespace) -> Settings:
    """What the flags ask for."""
    shape = dict(SHAPE)
    if args.preset:
        shape = dict(PRESETS[args.preset])
    for name in SHAPE_FLAGS:
        if getattr(args, name) is not None:
            shape[name] = getattr(args, name)
    shape["block_size"] = args.windows[-1]
    device, dtype = cli.device_and_dtype(args.device, args.dtype)
    return Settings(
        LLaMAConfig(**shape), device, dtype, args.batch_size, args.new_tokens,
        args.checkpoint_activations, args.compile
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = choose_settings(args)
    result = {
        "machine": machine(settings.device),
        "parameters": settings.config.n_params,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "preset": args.preset,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "new_tokens": args.new_tokens,
        "checkpoint_activations": args.checkpoint_activations,
        "compile": args.compile,
    }

    # Measure each task at each window: the peak memory, then the speed
    cases = list(itertools.product(args.tasks, args.windows))
    memory = {}
    rows = []
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        save_random(settings.config, folder)
        # Memory first: while this process holds nothing, the processes measured have all of a GPU
        for task, window in tqdm(cases, desc="memory"):
            with enough_memory(task, window):
                for name in SIDES:
                    peak = in_new_process(peak_memory, name, folder, task, window, settings)
                    memory[task, window, name] = peak
        for task, window in tqdm(cases, desc="speed"):
            with enough_memory(task, window):
                seconds, difference = measure_speed(task, window, args.repeats, folder, settings)
            peaks = {name: memory[task, window, name] for name in SIDES}
            rows.append(compare(task, window, seconds, peaks, settings))
            differences.append(difference)
    result["logits_differ_by"] = max(differences)
    result["rows"] = rows

    # The results: as text, as JSON and as a picture
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print(
        f"{settings.config.n_params / 1e6:,.1f} M parameters, {result['dtype']}, "
        f"batch {args.batch_size}, activations recomputed: {args.checkpoint_activations}, "
        f"compiled: {args.compile}; medians of {args.repeats}"
    )
    print(f"the same model: logits differ by at most {max(differences):.1g} standard deviations\n")
    print(results_table(rows))
    out = Path(args.out)
    cli.write_json(out / "bench.json", result)
    figure, axes = plots.new_figure(2)
    plots.draw_speed_ratios(axes, rows)
    plots.save_figure(figure, out / "bench.png")
    print(f"written: {out / 'bench.json'}, {out / 'bench.png'}")


if __name__ == "__main__":
    cli.run(main)
