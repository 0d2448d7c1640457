"""How well does it read: sliding-window perplexity at any list of windows (the paper's §3.2).

Read checkpoint.py and data.py first. Then here: `windows_of` (what is scored with what before it), `perplexity`,
and `main`; passkey.py shares the command line at the end.

    python eval_ppl.py --init out/linear-8                                  # at the original window, twice that, ...
    python eval_ppl.py --init out/base --scale 8                            # Position Interpolation, not fine-tuned
    python eval_ppl.py --init out/base --scale 8 --rope none                # extrapolation
    python eval_ppl.py --init out/none-8 out/linear-8 --windows 256,512,1024,2048      # one table, one plot
    python eval_ppl.py --init out/linear-8/step-* out/none-8/step-*         # over fine-tuning steps: paper's table 3
    python eval_ppl.py --init FOLDER --data novel.txt --windows 2048,8192 --max_tokens 20000 --stride 2048

Perplexity is exp of the mean loss per token. Every token of every document counts once, with as much before it as
window and stride allow, never another document. All windows of a call score the same documents, those at least
as long as the largest window (--min_tokens): a model that reads more then meets the same text, not an easier one.
"""

import argparse
import io
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
from model import LLaMA, LLaMAConfig

BATCH_TOKENS = 16384  # tokens that go through the model at a time, where --batch_size doesn't say

# ---- the measure -------------------------------------------------------------------------------------------------

# document, start, end, scored: tokens start ... end - 1 of a document, the last `scored` of which are scored
Span = tuple[int, int, int, int]


def windows_of(n: int, window: int, stride: int, has_bos: bool) -> Iterator[tuple[int, int, int]]:
    """(start, end, scored) of the windows over a document of n tokens, which score each token exactly once.

    The first window is as full as it can be and scores all its tokens; each later one ends `stride` tokens further
    and scores those alone, with the window - stride before them that still fit. The last one scores what is left,
    and is full like the others. BOS takes a place in every window. Without one the first token of a document has
    nothing before it, and is not scored.
    """
    room = window - has_bos
    end = min(n, room)
    if end > 1 - has_bos:
        yield 0, end, end - (not has_bos)
    while end < n:
        scored = min(stride, n - end)
        end += scored
        yield end - room, end, scored


def losses_of(
    model: LLaMA, documents: Sequence, spans: list[Span], bos_id: int | None, batch_tokens: int, desc: str
) -> Iterator[tuple[list[Span], np.ndarray]]:
    """Yield some spans and the losses of their tokens (B, T) in nats, float64, 0 where not scored.

    Spans of equal length go through the model together, so that there is no padding. BOS comes first in each.
    """
    vocab_size, device = model.config.vocab_size, model.embed_tokens.weight.device
    largest = max((int(np.max(documents[i])) for i in {span[0] for span in spans}), default=0)
    if max(largest, bos_id or 0) >= vocab_size:
        largest = max(largest, bos_id or 0)
        raise ValueError(f"token id {largest} is out of range: the model's vocabulary has {vocab_size} tokens")
    bos = [] if bos_id is None else [bos_id]
    spans = sorted(spans, key=lambda span: span[2] - span[1])
    with tqdm(total=sum(span[3] for span in spans), desc=desc, unit="token", unit_scale=True, leave=False) as bar:
        while spans:
            length = spans[0][2] - spans[0][1]
            size = max(1, batch_tokens // (length + len(bos)))
            batch = [span for span in spans[:size] if span[2] - span[1] == length]
            spans = spans[len(batch) :]
            rows = np.array([[*bos, *documents[i][start:end]] for i, start, end, _ in batch], dtype=np.int64)
            ids = torch.from_numpy(rows).to(device)  # (B, T + 1)
            targets = ids[:, 1:].clone()
            for row, (_, _, _, scored) in enumerate(batch):
                targets[row, : targets.size(1) - scored] = -100  # scored before: only read, no logits made
            yield batch, model.nll(ids[:, :-1], targets).double().cpu().numpy()
            bar.update(sum(span[3] for span in batch))


def perplexity(
    model: LLaMA, documents: Sequence, window: int, stride: int, bos_id: int | None = None, *,
    batch_tokens: int = BATCH_TOKENS, desc: str = "",
) -> dict:  # fmt: skip
    """Sliding-window perplexity: {"window", "ppl", "nll", "stderr", "tokens", "documents"}.

    documents: token ids of each, without BOS and EOS.  window: tokens, the scored ones and BOS included.
    stride: tokens that a window scores, below `window`.  batch_tokens: tokens at a time.
    nll is the mean loss per token in nats, ppl = exp(nll). stderr is nll's standard error over documents, None where
    there is only one; that of ppl is about ppl * stderr. ValueError if there is nothing to score.
    """
    if window < 2:
        raise ValueError(f"a window must have at least 2 tokens, got {window}")
    if not 1 <= stride < window:
        raise ValueError(f"stride {stride} must be at least 1 and below the window, {window}: the rest is context")
    has_bos = bos_id is not None
    spans = [(i, *span) for i, ids in enumerate(documents) for span in windows_of(len(ids), window, stride, has_bos)]
    total, count = np.zeros(len(documents)), np.zeros(len(documents))  # of each document
    for batch, losses in losses_of(model, documents, spans, bos_id, batch_tokens, desc or f"window {window}"):
        of = [span[0] for span in batch]
        np.add.at(total, of, losses.sum(axis=1))
        np.add.at(count, of, [span[3] for span in batch])
    tokens, n = int(count.sum()), int((count > 0).sum())
    if not tokens:
        raise ValueError("there is nothing to score: no document has a token with another before it")
    nll = total.sum() / tokens  # every token counts alike, so long documents count for more
    if not nll < 700:
        raise ValueError(f"the loss at window {window} is {nll}: damaged weights, or --dtype float32 is needed")
    # Tokens of one document depend on each other, documents do not. For a ratio of sums over n documents (a mean of
    # clusters of unequal size) se^2 = n / (n - 1) * sum_d (total_d - nll * count_d)^2 / tokens^2.
    stderr = math.sqrt(n / (n - 1) * ((total - nll * count) ** 2).sum()) / tokens if n > 1 else None
    result = {"window": window, "ppl": math.exp(nll), "nll": float(nll), "stderr": stderr, "tokens": tokens}
    return result | {"documents": n}


def position_nll(
    model: LLaMA, documents: Sequence, window: int, bos_id: int | None = None, *,
    batch_tokens: int = BATCH_TOKENS, desc: str = "",
) -> np.ndarray:  # fmt: skip
    """The mean loss by position: (window - 1,) float64 in nats; entry i is of tokens with i + 1 before them, with BOS.

    From windows side by side that fill the documents; what doesn't fill one is left out. ValueError if none does.
    """
    has_bos = bos_id is not None
    size = window - has_bos
    spans = [
        (i, start, start + size, window - 1)
        for i, tokens in enumerate(documents) for start in range(0, len(tokens) - size + 1, size)
    ]  # fmt: skip
    if not spans:
        raise ValueError(f"no document fills a window of {window} tokens")
    batches = losses_of(model, documents, spans, bos_id, batch_tokens, desc or f"by position, window {window}")
    return sum(losses.sum(axis=0) for _, losses in batches) / len(spans)


def choose_documents(
    documents: Sequence, min_tokens: int, max_tokens: int | None = None, max_documents: int | None = None, seed: int = 0
) -> tuple[list, int]:
    """The documents of at least min_tokens tokens, each cut to its first max_tokens; and how many were too short.

    max_documents: so many of them, drawn by seed (the paper draws 128 of Proof-pile's), in their order.
    """
    long = [tokens for tokens in documents if len(tokens) >= min_tokens]
    too_short = len(documents) - len(long)
    if max_documents is not None and max_documents < len(long):
        long = [long[i] for i in sorted(random.Random(seed).sample(range(len(long)), max_documents))]
    return [tokens[:max_tokens] for tokens in long], too_short


# ---- table and plot ----------------------------------------------------------------------------------------------

# colours of different brightness, markers and dashes: each tells the lines apart without the others
STYLES = [
    dict(color=color, marker=marker, linestyle=dashes, markersize=6, linewidth=1.6)
    for color, marker, dashes in (
        ("#000000", "o", "-"), ("#0072b2", "s", "--"), ("#d55e00", "^", "-."), ("#009e73", "D", ":"),
        ("#cc79a7", "v", (0, (6, 1.5))), ("#56b4e9", "P", (0, (3, 1, 1, 1, 1, 1))), ("#8c6d00", "X", (0, (1, 1))),
    )
]  # fmt: skip


def style(i: int) -> dict:
    return STYLES[i % len(STYLES)]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns set flush: words to the left, the rest to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    words = [not any(cell == "-" or cell[:1].isdigit() for cell in column[1:]) for column in zip(*cells)]
    lines = [
        "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in zip(row, widths, words))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def label(result: dict) -> str:
    """What a legend calls a checkpoint: its "label" where it has one."""
    if "label" in result:
        return result["label"]
    method = f"{result['rope']}, scale {result['scale']:g}" if result["scale"] != 1 else result["rope"]
    return f"{result['init']} ({method})"


def over_steps(results: list[dict], values: Callable[[dict], dict]) -> list[tuple[str, int, dict]]:
    """Results of RUN/step-N as rows (RUN's label, window, {steps: value}); values: of a result, {window: value}."""
    rows = {}
    for result in results:
        name = label(result | {"init": Path(result["init"]).parent})
        for window, value in values(result).items():
            rows.setdefault((name, window), {})[result["steps"]] = value
    return [(*key, points) for key, points in rows.items()]


def table_over_steps(rows: list[tuple[str, int, dict]], window: str) -> str:
    """The rows of `over_steps`, a column for each step; window: what that is called."""
    steps = sorted({n for *_, points in rows for n in points})
    cells = [[name, size, *(points.get(n, "-") for n in steps)] for name, size, points in rows]
    return table(["run", window, *(f"step {n}" for n in steps)], cells)


def mark_original(axis, results: list[dict], upright: bool = True) -> None:
    """A line at the window of pre-training (one each, should they differ)."""
    for window in sorted({result["original_window"] for result in results}):
        how = dict(linestyle=(0, (2, 2)), linewidth=1.2, zorder=0, label=f"original window, {window:,}")
        (axis.axvline if upright else axis.axhline)(window, color="0.55", **how)


def legend_below(axis) -> None:
    """The legend under the picture, where lines at its top and its bottom leave no room within."""
    columns = 2 if all(len(name) < 40 for name in axis.get_legend_handles_labels()[1]) else 1
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False)


def scale_perplexity(axis, values: list[float]) -> None:
    """The upright axis of a plot of perplexities: logarithmic if they are far apart."""
    if max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(_ticker().StrMethodFormatter("{x:,g}"))
        axis.yaxis.set_minor_formatter(_ticker().NullFormatter())
    else:  # differences of less than a tenth are not drawn as if they filled the picture
        middle, half = (max(values) + min(values)) / 2, max(0.55 * (max(values) - min(values)), 0.05 * max(values))
        axis.set_ylim(middle - half, middle + half)


def draw(axis, results: list[dict]) -> None:
    """Perplexity over the window, a line for each checkpoint."""
    for i, result in enumerate(results):
        points = result["windows"]
        axis.plot([p["window"] for p in points], [p["ppl"] for p in points], label=label(result), **style(i))
    mark_original(axis, results)
    windows = sorted({p["window"] for result in results for p in result["windows"]})
    axis.set_xscale("log", base=2)
    axis.set_xticks(windows, [f"{w:,}" for w in windows])
    axis.minorticks_off()
    scale_perplexity(axis, [p["ppl"] for result in results for p in result["windows"]])
    axis.grid(color="0.9")
    axis.set(xlabel="evaluation window (tokens)", ylabel="perplexity", title="Sliding-window perplexity")
    axis.legend(fontsize=8)


def lines_over_steps(axis, rows: list[tuple[str, int, dict]], value: str, first_style: int = 0) -> None:
    """A line for each row of `over_steps`, a colour for each run, a marker for each window; value: what is drawn."""
    names, windows = (list(dict.fromkeys(column)) for column in list(zip(*rows))[:2])
    several = len(windows) > 1
    for name, window, points in rows:
        i, j = first_style + names.index(name), windows.index(window)
        shape = style(j if several else i)
        how = style(i if len(names) > 1 else j) | {key: shape[key] for key in ("marker", "linestyle")}
        axis.plot(*zip(*sorted(points.items())), label=f"{name}, {window:,} tokens" if several else name, **how)
    steps = sorted({n for *_, points in rows for n in points})
    first, ticks = next(filter(None, steps)), steps[-1:]
    if steps[-1] > 20 * first:  # 200 ... 1,000 and 10,000 (the paper's table 4): the first ones need room
        for n in reversed(steps):  # no two labels in each other's way
            ticks += [n] if n * 1.6 <= ticks[-1] else []
        axis.set_xscale("symlog", linthresh=first)
        axis.set_xticks(ticks)
        axis.minorticks_off()
    axis.xaxis.set_major_formatter(_ticker().StrMethodFormatter("{x:,g}"))
    axis.yaxis.set_major_formatter(_ticker().StrMethodFormatter("{x:,g}"))
    axis.set(xlabel="fine-tuning steps", ylabel=value if several else f"{value} at {windows[0]:,} tokens")
    axis.grid(color="0.92")


def draw_over_steps(axis, rows: list[tuple[str, int, dict]], first_style: int = 0) -> None:
    """Perplexity over fine-tuning steps, a line for each row of `over_steps`."""
    lines_over_steps(axis, rows, "perplexity", first_style)
    scale_perplexity(axis, [value for *_, points in rows for value in points.values()])
    axis.set_title("Perplexity over steps (paper: table 3)")
    legend_below(axis)


def draw_positions(axis, results: list[dict], points: int = 20) -> None:
    """The loss by position, averaged in `points` bins that grow with the position."""
    for i, result in enumerate(results):
        nll = np.array(result["positions"]["nll"])
        first = min(16, len(nll))  # before that the loss is far off the scale, and says nothing about the window
        edges = np.unique(np.geomspace(first, len(nll) + 1, points + 1).round().astype(int)) - 1
        means = [nll[a:b].mean() for a, b in zip(edges, edges[1:])]
        middle = np.sqrt((edges[:-1] + 1.0) * edges[1:])  # of a bin on a logarithmic axis
        axis.plot(middle, means, label=label(result), **style(i) | dict(markevery=4, markersize=5, linewidth=1.3))
    mark_original(axis, results)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(_ticker().StrMethodFormatter("{x:,.0f}"))
    axis.grid(color="0.9")
    axis.set(xlabel="position in the window (tokens before)", ylabel="loss (nats per token)", title="Loss by position")
    axis.legend(fontsize=8)


def _ticker():
    import matplotlib.ticker

    return matplotlib.ticker


def new_figure(panels: int, width: float = 6.4):
    """A figure and its axes, side by side; drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4.6), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def save_figure(figure, path: str | Path) -> None:
    """The figure as a file of path's kind, whole or not at all."""
    with checkpoint.replacing(path) as temporary:
        figure.savefig(temporary, dpi=140, format=Path(path).suffix[1:].lower())


# ---- the command line, shared with passkey.py --------------------------------------------------------------------


class Parser(checkpoint.Parser):
    """A parser whose --init takes several checkpoints."""

    def add_argument(self, *flags, **options):
        if flags == ("--init",):
            options |= dict(nargs="+", default=["out/base"], metavar="FOLDER")
            options["help"] += "; several (A B or A,B) go side by side, RUN/step-N over N"
        return super().add_argument(*flags, **options)


def evaluation_parser(doc: str) -> Parser:
    """The flags of every evaluation: those of a model, and where results go."""
    parser = Parser(doc)
    checkpoint.add_model_flags(parser)
    add = parser.add_argument
    add("--batch_size", type=int, help=f"sequences at a time; default: as many as make {BATCH_TOKENS} tokens")
    place = "default: in the checkpoint's folder (out/NAME for one from the hub), or beside the first of several"
    add("--json", help=f"the results; {place}")
    add("--plot", help=f"the picture, .png, .svg or .pdf; {place}")
    return parser


def whole_numbers(parts: Sequence[str] | None, flag: str, least: int) -> list[int] | None:
    """A list of whole numbers as the command line has it, with commas or spaces; sorted, each once."""
    if parts is None:
        return None
    numbers = set()
    for part in (p for group in parts for p in group.split(",") if p):
        if not part.strip().isdecimal() or int(part) < least:
            raise ValueError(f"{flag} takes whole numbers of at least {least}, got {part!r}")
        numbers.add(int(part))
    return sorted(numbers)


def steps_of(names: list[str]) -> list[int]:
    """The N of checkpoints RUN/step-N (train.py --save_at); none if one is no such, or N is the same for all."""
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", Path(name).name))]
    return steps if len(steps) == len(names) and len(set(steps)) > 1 else []


def results_folder(name: str) -> Path:
    """Where the results of a checkpoint go: into its folder; out/NAME for a hub id, whose files lie in a cache."""
    return Path(name) if Path(name).is_dir() else Path("out", Path(name).name.split("@")[0])


def prepare(args: argparse.Namespace, stem: str) -> list[LLaMAConfig]:
    """Split --init, choose --json and --plot, and read the configs: what can be refused is refused before the work."""
    args.init = [name for group in args.init for name in group.split(",") if name]
    args.steps = steps_of(args.init)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}")
    if not args.init:
        raise ValueError("--init names no checkpoint")
    checkpoint.device_and_dtype(args)
    configs = []
    for name in args.init:
        try:
            with redirect_stderr(io.StringIO()):  # what had to be assumed is said when the weights are loaded
                configs.append(checkpoint.read_config(name, args.original_window, scale=args.scale, rope=args.rope))
        except ValueError as error:
            raise ValueError(error if name in str(error) else f"{name}: {error}") from None  # several: which one is it
    folder = results_folder(args.init[0])
    if len(args.init) > 1:
        folder = folder.parent
    if args.steps:  # into RUN, whose own results have another name; of several runs beside the first
        folder = folder if len({Path(name).parent for name in args.init}) == 1 else folder.parent
        stem += "_steps"
    for flag, suffixes in (("json", (".json",)), ("plot", (".png", ".svg", ".pdf"))):
        given = getattr(args, flag)
        path = Path(given or folder / f"{stem}{suffixes[0]}")
        if flag == "plot" and path.suffix.lower() not in suffixes:
            raise ValueError(f"--plot {path}: give a name that ends in {', '.join(suffixes)}")
        parent = next(p for p in path.absolute().parents if p.exists())
        if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"--{flag} {path} can't be written: give a file in a folder that can")
        setattr(args, flag, path)
    return configs


def check_window(name: str, config: LLaMAConfig, window: int, flag: str) -> None:
    """Refuse a window beyond what checkpoint and scale allow; say which flag allows it."""
    if window <= config.block_size:
        return
    scale = math.ceil(window / config.original_window)
    way = f"--scale {scale} interpolates to it, --scale {scale} --rope none extrapolates"
    if config.rope != "none" or config.block_size != config.original_window:
        way = f"--scale {scale} allows it"
    raise ValueError(f"{flag} {window} is beyond the window of {name}, {config.block_size}: {way}")


def open_checkpoint(args: argparse.Namespace, name: str) -> tuple[LLaMA, data.Tokenizer]:
    """One of the checkpoints of --init and its tokenizer."""
    model = checkpoint.load_from_flags(argparse.Namespace(**vars(args) | {"init": name}))
    return model, checkpoint.load_tokenizer(name, model.config)


# ---- main --------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", help="files or folders of .txt/.md/.py, .jsonl or .parquet, hub data sets as "
        "hf:owner/name,split=test; default: Python's library")  # fmt: skip
    add("--split", choices=("train", "val", "all"), help="which documents; val: those that train.py holds out; "
        "default: all of --data, val of Python's library")  # fmt: skip
    add("--windows", nargs="+", help="tokens, as 256,512,1024; default: the original window and its doublings")
    add("--stride", type=int, help="tokens that a window scores; default: 256, or half the smallest window if less")
    add("--max_tokens", type=int, help="cut each document to its first N tokens")
    add("--max_documents", type=int, help="take N documents, drawn by --seed")
    add("--min_tokens", type=int, help="take documents of at least N tokens; default: the largest window")
    add("--by_position", action="store_true", help="also the loss by position, in each checkpoint's largest window")
    return parser.parse_args(argv)


def doublings(config: LLaMAConfig) -> list[int]:
    """The original window, twice that, ..., up to the window in force."""
    windows, window = [], min(config.original_window, config.block_size)
    while window < config.block_size:
        windows.append(window)
        window *= 2
    return [*windows, config.block_size]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    configs = prepare(args, "ppl")
    asked = whole_numbers(args.windows, "--windows", 2)
    for name, config in zip(args.init, configs):
        for window in asked or []:
            check_window(name, config, window, "--windows")
    windows = [asked or doublings(config) for config in configs]
    columns = sorted({w for ws in windows for w in ws})
    stride = min(256, columns[0] // 2) if args.stride is None else args.stride
    if not 1 <= stride < columns[0]:
        raise ValueError(f"--stride {stride} must be at least 1 and below the smallest window, {columns[0]}")
    for flag in ("max_tokens", "max_documents", "min_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    min_tokens = columns[-1] if args.min_tokens is None else args.min_tokens
    if args.min_tokens is None and args.max_tokens is not None and args.max_tokens < columns[-1]:
        cut = f"--max_tokens {args.max_tokens} is below the window {columns[-1]}"
        raise ValueError(f"{cut}: raise it, take smaller --windows, or give --min_tokens too")
    split = args.split or ("val" if args.data is None else "all")

    results, fingerprints = [], set()
    for name, ws in zip(args.init, windows):
        model, tokenizer = open_checkpoint(args, name)
        fingerprints.add(tokenizer.fingerprint)
        corpus = data.load_corpus(args.data, tokenizer, split)
        everything = corpus.documents()
        wanted = (min_tokens, args.max_tokens, args.max_documents, args.seed)
        documents, too_short = choose_documents(everything, *wanted)
        if not documents:
            longest = max(map(len, everything), default=0)
            found = f"no document of at least {min_tokens} tokens, the longest has {longest}"
            way = "give smaller --windows or --min_tokens, or other --data"
            raise ValueError(f"{corpus.name}, {split}: {found}: {way}")
        config, rows = model.config, []
        result = {
            "init": name, "rope": config.rope, "scale": config.scale, "stride": stride, "documents": len(documents),
            "windows": rows, "original_window": config.original_window, "data": corpus.name, "split": split,
            "min_tokens": min_tokens, "max_tokens": args.max_tokens, "left_out": too_short, "seed": args.seed,
        }  # fmt: skip
        for window in ws:
            how = dict(batch_tokens=(args.batch_size or 0) * window or BATCH_TOKENS, desc=f"{name}, window {window}")
            row = perplexity(model, documents, window, stride, tokenizer.bos_id, **how)
            rows.append({key: value for key, value in row.items() if key != "documents"})
        if args.by_position:
            nll = position_nll(model, documents, ws[-1], tokenizer.bos_id, **how | dict(desc=f"{name}, by position"))
            result["positions"] = {"window": ws[-1], "nll": nll.round(5).tolist()}
        results.append(result)
        del model  # before the next one comes

    for result, steps in zip(results, args.steps):
        result["steps"] = steps

    def cell(row: dict) -> str:
        return f"{row['ppl']:.2f}" + ("" if row["stderr"] is None else f" ± {row['ppl'] * row['stderr']:.2f}")

    def cells(result: dict) -> dict[int, str]:
        return {row["window"]: cell(row) for row in result["windows"]}

    drawn = f"{len(documents)} of {len(everything) - too_short}" if args.max_documents else f"{len(documents)}"
    cut = f", cut to {args.max_tokens}" if args.max_tokens else ""
    print(f"perplexity by window: {corpus.name}, {split}; {drawn} documents of at least {min_tokens} tokens{cut} "
          f"({too_short} shorter ones left out), stride {stride}")  # fmt: skip
    if args.steps:
        print(table_over_steps(over_steps(results, cells), "window"))
    else:
        print(table(["checkpoint", "rope", "scale", *map(str, columns)], [
            [r["init"], r["rope"], f"{r['scale']:g}", *(cells(r).get(w, "-") for w in columns)] for r in results
        ]))  # fmt: skip
    if len(documents) > 1:
        print("± one standard error over documents (all rows read the same ones: differences between rows are surer)")
    if len(fingerprints) > 1:
        print("the tokenizers differ: these perplexities are of different tokens, don't compare them", file=sys.stderr)
    checkpoint.write_json(args.json, results[0] if len(results) == 1 else results)
    figure, axes = new_figure(2 if args.by_position else 1)
    if args.steps:
        draw_over_steps(axes[0], over_steps(results, lambda r: {row["window"]: row["ppl"] for row in r["windows"]}))
    else:
        draw(axes[0], results)
    if args.by_position:
        draw_positions(axes[1], results)
    save_figure(figure, args.plot)
    print(f"written: {args.json}, {args.plot}")


if __name__ == "__main__":
    checkpoint.run(main)
