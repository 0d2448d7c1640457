"""How fast and how lean: this model beside transformers' LlamaForCausalLM, in one run.

Read model.py and checkpoint.py first. Then here: `Ours` and `Theirs` (two sides with the same methods), `prepare`
(the three tasks), `peak_memory`, `time_both`, and `main`.

    python bench.py                                     # 35 M parameters at 1,024 to 4,096 tokens: minutes on a CPU
    python bench.py --tasks decode --windows 1024 --repeats 9
    python bench.py --preset llama-7b --n_layer 4 --windows 8192,32768 --checkpoint_activations full --compile

Both sides open the same folder, with PyTorch's scaled_dot_product_attention and the same dtype, optimizer, activation
checkpointing and compilation; their logits must agree before anything is timed. They take turns, so that whatever
else the machine does meets both. A training step is forward, loss, backward and AdamW; prefill reads a window into
a KV cache and makes the last token's logits; decoding adds tokens to a cache, greedily, up to the window.
Each figure is the median of the repeats (lowest..highest); a ratio is ours over transformers'.
"""

import argparse
import gc
import inspect
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import cost
import eval_ppl
from model import PRESETS, ChunkedCrossEntropy, KVCache, LLaMA, LLaMAConfig
from rope import apply_rope

TASKS = ("train", "prefill", "decode")
SHAPE = dict(vocab_size=32000, n_layer=6, n_head=6, n_embd=384, intermediate_size=1024)  # 35 M, heads of 64
SHAPE_FLAGS = (*SHAPE, "n_kv_head")

# ---- the two sides -----------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What both sides share. dtype: of the weights; in training that of autocast, the weights being float32."""

    config: LLaMAConfig
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    new_tokens: int
    checkpoint_activations: str
    compile: bool

    def weights(self, task: str) -> torch.dtype:
        return torch.float32 if task == "train" else self.dtype

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def ids(self, window: int) -> Tensor:
        """Random tokens (B, window), the same on both sides."""
        shape, generator = (self.batch_size, window), torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device)


def next_tokens(ids: Tensor) -> Tensor:
    """The target of each token (B, T): the one after it, and none for the last."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


class Ours:
    def __init__(self, folder: str, task: str, settings: Settings) -> None:
        self.model = checkpoint.load(folder, device=settings.device, dtype=settings.weights(task))
        self.model.checkpoint_activations = settings.checkpoint_activations
        if task != "train":
            self.model.lay_out_for_decoding()  # as python model.py does
        if settings.compile:
            for block in self.model.layers:
                block.compile()

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(ids, next_tokens(ids))

    def prefill(self, ids: Tensor, window: int) -> tuple[Tensor, KVCache]:
        weight = self.model.lm_head.weight
        cache = KVCache(self.model.config, len(ids), window, weight.device, weight.dtype)
        return self.decode(ids, cache), cache

    def decode(self, ids: Tensor, cache: KVCache) -> Tensor:
        return self.model.lm_head(self.model.hidden(ids, cache, last=True)).argmax(-1)

    def rewind(self, cache: KVCache, length: int) -> None:
        cache.length = length

    def rope(self, q: Tensor, k: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        T = q.size(2)
        cos, sin = self.model.rope_cos_sin(torch.arange(T, device=q.device), T)
        for _ in range(layers):
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k

    def head_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), self.model.lm_head.weight, next_tokens(ids).flatten())


class Theirs:
    def __init__(self, folder: str, task: str, settings: Settings) -> None:
        transformers = import_transformers()
        transformers.utils.logging.disable_progress_bar()
        options = dict(attn_implementation="sdpa", dtype=settings.weights(task))
        model = transformers.LlamaForCausalLM.from_pretrained(folder, **options).to(settings.device)
        self.model = model.train(task == "train")
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # it was renamed in version 5
        if settings.checkpoint_activations == "full":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.compile:
            self.model.compile()

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def prefill(self, ids: Tensor, window: int) -> tuple[Tensor, object]:
        cache = import_transformers().DynamicCache(config=self.model.config)
        return self.decode(ids, cache), cache

    def decode(self, ids: Tensor, cache) -> Tensor:
        return self.model(input_ids=ids, **{self.cache_name: cache}, logits_to_keep=1).logits.argmax(-1)

    def rewind(self, cache, length: int) -> None:
        if cache.get_seq_length() > length:
            cache.crop(length - cache.get_seq_length())

    def rope(self, q: Tensor, k: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = self.model.model.rotary_emb(q, torch.arange(q.size(2), device=q.device)[None])
        for _ in range(layers):
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k

    def head_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        vocab_size = self.model.config.vocab_size
        return self.model.loss_function(logits=self.model.lm_head(hidden), labels=ids, vocab_size=vocab_size)


def import_transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError('transformers is not installed: pip install -e ".[test]"') from None
    return transformers


SIDES = {"ours": Ours, "transformers": Theirs}


def save_random(config: LLaMAConfig, folder: str) -> None:
    """A model with random weights under which attention is far from uniform and logits are of order 1."""
    torch.manual_seed(0)
    model = LLaMA(config)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1 / math.sqrt(weight.size(1)))
    checkpoint.save(model, folder)


@torch.inference_mode()
def difference(ours: Ours, theirs: Theirs, settings: Settings) -> float:
    """The largest difference of a logit, in standard deviations of all logits. ValueError if that is no rounding."""
    with settings.autocast():
        a, b = (side.logits(settings.ids(64)).float() for side in (ours, theirs))
    off = ((a - b).abs().max() / b.std()).item()
    if not off < (1e-3 if settings.dtype == torch.float32 else 0.2):
        raise ValueError(f"the two sides are not the same model: their logits differ by {off:.2g} standard deviations")
    return off


# ---- what is measured --------------------------------------------------------------------------------------------


def prepare(side: Ours | Theirs, task: str, window: int, settings: Settings) -> Callable[[], None]:
    """All that comes before the task, done once; calling what is returned does the task."""
    if task == "train":
        optimizer = torch.optim.AdamW(side.model.parameters(), lr=1e-5, fused=True)

        def step(ids: Tensor) -> None:
            with settings.autocast():
                loss = side.loss(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step(settings.ids(2))  # AdamW's moments are there from the second step on
        ids = settings.ids(window)
        return lambda: step(ids)

    if task == "prefill":
        ids = settings.ids(window)
        return torch.inference_mode()(lambda: side.prefill(ids, window))

    start = window - settings.new_tokens
    with torch.inference_mode():
        first, cache = side.prefill(settings.ids(start), window)

    @torch.inference_mode()
    def decode() -> None:
        side.rewind(cache, start)
        token = first
        for _ in range(settings.new_tokens):
            token = side.decode(token, cache)

    return decode


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The wall-clock time of a call, the device's work included."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def resident(peak: bool = False) -> int:
    """Bytes of memory that this process has, or the most that it had."""
    if sys.platform != "linux":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = "VmHWM:" if peak else "VmRSS:"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(name))


def peak_memory(side: str, folder: str, task: str, window: int, settings: Settings) -> int:
    """Peak bytes of the task, weights, optimizer and cache included: what the GPU's allocator handed out, or how much
    larger this process grew than it was with everything imported (and so by the compiler, with --compile on a CPU).
    For a process of its own."""
    import_transformers().LlamaForCausalLM  # the attribute imports the model's file: into the baseline, on both sides
    before = resident()
    call = prepare(SIDES[side](folder, task, settings), task, window, settings)
    if settings.compile:
        call()  # the compiler's own memory is not the task's
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
        call()
        return torch.cuda.max_memory_allocated(settings.device)
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far, that of loading, is forgotten
    call()
    return resident(peak=True) - before


def in_a_process_of_its_own(*args) -> int:
    """`peak_memory(*args)` where nothing was allocated before."""
    side, _, task, window, _ = args
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peak_memory, *args).result()
        except (torch.OutOfMemoryError, BrokenProcessPool):
            raise ValueError(f"{side}, {task} at {window}: not enough memory: give fewer --n_layer") from None


def parts(side: Ours | Theirs, window: int, settings: Settings) -> dict[str, Callable[[], object]]:
    """RoPE, and head with loss, as in a training step: forward and backward by themselves, in the same shapes."""
    config, B, device = settings.config, settings.batch_size, settings.device

    def heads(n: int) -> Tensor:  # as the projections leave them
        x = torch.randn(B, window, n, config.head_dim, device=device, dtype=settings.dtype)
        return x.transpose(1, 2).requires_grad_()

    qk, ids = (heads(config.n_head), heads(config.n_kv_head)), settings.ids(window)
    hidden = torch.randn(B, window, config.n_embd, device=device, dtype=settings.dtype, requires_grad=True)

    def rope() -> None:
        turned = side.rope(*qk, config.n_layer)
        torch.autograd.grad(turned, qk, turned)

    def loss() -> None:
        with settings.autocast():
            value = side.head_loss(hidden, ids)
        torch.autograd.grad(value, (hidden, side.model.lm_head.weight))

    return {"rope": rope, "loss": loss}


def time_both(calls: dict[str, Callable], repeats: int, device: torch.device, bar: tqdm) -> dict[str, list[float]]:
    """Seconds of each call, by turns, whoever came last coming first; one round before does not count."""
    times, order = {name: [] for name in calls}, list(calls)
    for _ in range(repeats + 1):
        for name in order:
            times[name].append(seconds(calls[name], device))
            bar.update()
        order.reverse()
    return {name: values[1:] for name, values in times.items()}


def measure_speed(
    task: str, args: argparse.Namespace, settings: Settings, folder: str, memory: dict, bar: tqdm
) -> tuple[list[dict], float]:
    """The rows of a task, and by how much the two sides' logits differ."""
    sides = {name: Side(folder, task, settings) for name, Side in SIDES.items()}
    off, rows = difference(*sides.values(), settings), []
    for window in args.windows:
        bar.set_description(f"{task} at {window:,}, speed")
        calls = {name: prepare(side, task, window, settings) for name, side in sides.items()}
        times = time_both(calls, args.repeats, settings.device, bar)
        rows.append(compare(task, window, times, memory[task, window], settings))
        for name, side in sides.items() if task == "train" else ():
            for part, call in parts(side, window, settings).items():
                alone = statistics.median([seconds(call, settings.device) for _ in range(4)][1:])
                rows[-1][name][f"{part}_share"] = alone / statistics.median(times[name])
        del calls  # and with them the optimizers, before the next ones come
    return rows, off


def compare(task: str, window: int, times: dict, memory: dict[str, int], settings: Settings) -> dict:
    """A row of the results: each side's figures, and ours over theirs."""
    tokens = settings.batch_size * (settings.new_tokens if task == "decode" else window)
    peak = cost.peak_flops(settings.device)
    row = {"task": task, "window": window, "tokens": tokens}
    for side in SIDES:
        speed = tokens / statistics.median(times[side])
        span = dict(min=tokens / max(times[side]), max=tokens / min(times[side]))
        row[side] = {"tokens_per_second": speed, **span, "memory": memory[side], "seconds": times[side]}
        if peak and task == "train":  # prefill leaves parts out, decoding waits for memory, not for arithmetic
            flops = cost.flops_per_token(settings.config, window)
            row[side]["mfu"] = flops * speed / peak
    ours, theirs = (row[side] for side in SIDES)
    pairs = [b / a for a, b in zip(ours["seconds"], theirs["seconds"])]
    row["speed_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
    row |= {"speed_ratio_min": min(pairs), "speed_ratio_max": max(pairs)}
    row["memory_ratio"] = ours["memory"] / theirs["memory"]
    return row


def machine(device: torch.device) -> dict:
    """What it ran on, and with what."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else names[0] if names else platform.processor()
    return {
        "device": name or platform.machine(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": import_transformers().__version__,
    }  # fmt: skip


# ---- the command line --------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked; windows and tasks as lists."""
    parser = checkpoint.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the model's shape; default: 35 M parameters, 6 layers, heads of 64")
    for name in SHAPE_FLAGS:
        add(f"--{name}", type=int, help="in place of the preset's")
    add("--windows", nargs="+", default=["1024,2048,4096"], help="tokens of a sequence")
    add("--tasks", default=",".join(TASKS), help="any of them, with commas")
    add("--batch_size", type=int, default=1, help="sequences at a time")
    add("--new_tokens", type=int, default=32, help="decoded in each repeat; the window holds them")
    add("--repeats", type=int, default=5, help="of each task on each side, after one that doesn't count")
    add("--checkpoint_activations", default="none", choices=("none", "full"),
        help="in training; full: each block is computed again in the backward pass, on both sides")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile, on both sides")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where the GPU has it")
    add("--out", default="out/bench", help="the folder of bench.json and bench.png")
    add("--json", help="the results; default: in --out")
    add("--plot", help="the picture, .png, .svg or .pdf; default: in --out")
    args = parser.parse_args(argv)
    args.windows, args.tasks = eval_ppl.whole_numbers(args.windows, "--windows", 2), args.tasks.split(",")
    if not args.windows or set(args.tasks) - set(TASKS):
        raise ValueError(f"--windows takes whole numbers, --tasks any of {', '.join(TASKS)} with commas between")
    for flag in ("batch_size", "new_tokens", "repeats"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if "decode" in args.tasks and args.new_tokens >= args.windows[0]:
        raise ValueError(f"--new_tokens {args.new_tokens} leaves nothing of the smallest window, {args.windows[0]}")
    args.json, args.plot = args.json or f"{args.out}/bench.json", args.plot or f"{args.out}/bench.png"
    if Path(args.plot).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {args.plot} must end in .png, .svg or .pdf")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    changes = {name: getattr(args, name) for name in SHAPE_FLAGS if getattr(args, name) is not None}
    fields = (PRESETS[args.preset] if args.preset else SHAPE) | changes | {"block_size": args.windows[-1]}
    how = (args.batch_size, args.new_tokens, args.checkpoint_activations, args.compile)
    return Settings(LLaMAConfig(**fields), *checkpoint.device_and_dtype(args), *how)


def draw(figure_axes: list, rows: list[dict]) -> None:
    """Both ratios over the window, a line for each task."""
    for i, task in enumerate(dict.fromkeys(row["task"] for row in rows)):
        mine = [row for row in rows if row["task"] == task]
        windows, ratios = [row["window"] for row in mine], [row["speed_ratio"] for row in mine]
        spread = [[abs(row[f"speed_ratio_{end}"] - row["speed_ratio"]) for row in mine] for end in ("min", "max")]
        figure_axes[0].errorbar(windows, ratios, spread, capsize=3, label=task, **eval_ppl.style(i))
        figure_axes[1].plot(windows, [row["memory_ratio"] for row in mine], label=task, **eval_ppl.style(i))
    for axis, what in zip(figure_axes, ("tokens per second", "peak memory")):
        axis.axhline(1, color="0.55", linestyle=(0, (2, 2)), linewidth=1.2, zorder=0)
        axis.set_xscale("log", base=2)
        windows = sorted({row["window"] for row in rows})
        axis.set_xticks(windows, [f"{w:,}" for w in windows])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
        axis.set(xlabel="window (tokens)", ylabel="ours / transformers", title=f"Ratio of {what}")
        axis.legend(fontsize=8)


def show(rows: list[dict]) -> None:
    """The results as tables on standard output."""

    def speed(row: dict, side: str) -> str:
        figures = row[side]
        mfu = f", MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
        return f"{figures['tokens_per_second']:,.1f} ({figures['min']:,.1f}..{figures['max']:,.1f}){mfu}"

    header = ["task", "window", *(f"{s}: tokens/s" for s in SIDES), "ratio", *(f"{s}: MB" for s in SIDES), "ratio"]
    print(eval_ppl.table(header, [
        [row["task"], row["window"], *(speed(row, side) for side in SIDES),
         f"{row['speed_ratio']:.2f} ({row['speed_ratio_min']:.2f}..{row['speed_ratio_max']:.2f})",
         *(f"{row[side]['memory'] / 1e6:,.0f}" for side in SIDES), f"{row['memory_ratio']:.2f}"]
        for row in rows
    ]))  # fmt: skip
    training = [row for row in rows if row["task"] == "train"]
    if training:
        print("\nshare of the training step, each part timed by itself, forward and backward in the same shapes")
        names = [(side, part) for part in ("rope", "loss") for side in SIDES]
        header = ["window", *(f"{side}: {'RoPE' if part == 'rope' else 'head and loss'}" for side, part in names)]
        shares = [[row["window"], *(f"{row[s][f'{part}_share']:.1%}" for s, part in names)] for row in training]
        print(eval_ppl.table(header, shares))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import_transformers()
    settings = settings_of(args)
    grid = [(task, window) for task in args.tasks for window in args.windows]
    memory, rows, off = {}, [], 0.0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(grid) * (args.repeats + 2), unit="call") as bar:
        save_random(settings.config, folder)
        for task, window in grid:  # before this process holds anything: all of a GPU is then theirs
            bar.set_description(f"{task} at {window:,}, memory")
            memory[task, window] = {}
            for side in SIDES:
                memory[task, window][side] = in_a_process_of_its_own(side, folder, task, window, settings)
                bar.update()
        for task in args.tasks:
            try:
                more, differ = measure_speed(task, args, settings, folder, memory, bar)
            except torch.OutOfMemoryError:
                raise ValueError(f"{task}: not enough memory for both sides at a time: give fewer --n_layer") from None
            rows, off = rows + more, max(off, differ)

    names = ("preset", "batch_size", "repeats", "new_tokens", "checkpoint_activations", "compile")
    dtype, n_params = str(settings.dtype).removeprefix("torch."), settings.config.n_params
    result = {"machine": machine(settings.device), "parameters": n_params, "dtype": dtype,
              **{name: getattr(args, name) for name in names}, "logits_differ_by": off, "rows": rows}  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print(f"{n_params / 1e6:,.1f} M parameters, {dtype}, batch {args.batch_size}, activations recomputed: "
          f"{args.checkpoint_activations}, compiled: {'yes' if args.compile else 'no'}; medians of {args.repeats} "
          f"(lowest..highest)")  # fmt: skip
    print(f"the same model: logits differ by at most {off:.1g} of their standard deviation\n")
    show(rows)
    checkpoint.write_json(args.json, result)
    figure, axes = eval_ppl.new_figure(2)
    draw(axes, rows)
    eval_ppl.save_figure(figure, args.plot)
    print(f"written: {args.json}, {args.plot}")


if __name__ == "__main__":
    checkpoint.run(main)
