"""What the evaluations share: flags, checks before the work, batches, results over steps.

eval_ppl.py, passkey.py, summarize.py and generate.py build on it.
"""

import argparse
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

import checkpoint
from cli import (
    CHECKPOINT_FORMS, PICTURES, Parser, add_model_flags, at_least, can_be_written, device_and_dtype,
    extension, file_name, text_table
)
from model import LLaMA, LLaMAConfig
from plots import UNTUNED, label
from tokenizer import Tokenizer

BATCH_TOKENS = 16384  # tokens that go through the model at a time, where --batch_size is not given

# The names of the methods in tables and pictures. plots.LOOKS has the look of each.
METHOD_NAMES = {
    "none": "direct fine-tuning",
    "linear": "PI",
    "ntk": "NTK",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "llama3": "Llama 3",
}

Item = TypeVar("Item")

# ---- the command line ----------------------------------------------------------------------------


def evaluation_parser(doc: str, plot: bool = True) -> Parser:
    """A parser with the flags of every evaluation: the model's, the batch size and the outputs."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--init", nargs="+", default=["out/base"], metavar="CHECKPOINT",
        help=f"{CHECKPOINT_FORMS}; several go side by side, and RUN/step-N over the steps N")
    add_model_flags(parser)
    add("--batch_size", type=at_least(1),
        help=f"sequences at a time; default: as many as make {BATCH_TOKENS} tokens")
    place = (
        "default: in the checkpoint's folder (out/NAME for one from the hub), "
        "or beside the first of several"
    )
    add("--json", type=file_name(".json"), help=f"the results; {place}")
    if plot:
        add("--plot", type=file_name(*PICTURES), help=f"the picture, .png, .svg or .pdf; {place}")
    return parser


def read_configs(args: argparse.Namespace) -> list[LLaMAConfig]:
    """The config of each checkpoint of --init, so that a wrong flag is refused before the work."""
    device_and_dtype(args.device, args.dtype)  # only to refuse a device that is not there
    configs = []
    for name in args.init:
        try:
            # What had to be assumed is said once, when the weights are loaded
            with redirect_stderr(io.StringIO()):
                config = checkpoint.read_config(name, **extension(args))
        except ValueError as error:
            message = str(error)
            if name not in message:
                message = f"{name}: {message}"
            raise ValueError(message) from None
        configs.append(config)
    return configs


def method_name(args: argparse.Namespace, name: str, config: LLaMAConfig) -> str:
    """What was done to the positions of a model, in words: "PI", "extrapolated", ...

    config: the model's, as the flags extend the checkpoint `name`. A model that is extended by the
    flags and not by its own config.json has had no fine-tuning at that scale, and the name says so.
    """
    if config.block_size == config.original_window and config.scale == 1:
        return "not extended"
    with redirect_stderr(io.StringIO()):
        stored = checkpoint.read_config(name, args.original_window)
    method = METHOD_NAMES[config.rope]
    if config.rope == "dynamic" or config == stored:  # dynamic NTK is never fine-tuned
        return method
    if config.rope == "none":
        return "extrapolated"
    return method + UNTUNED


def model_facts(args: argparse.Namespace, name: str, config: LLaMAConfig) -> dict:
    """What the result of an evaluation says of its model: the first entries of the JSON object."""
    return {
        "init": name,
        "method": method_name(args, name, config),
        "rope": config.rope,
        "scale": config.scale,
        "original_window": config.original_window,
    }


def check_window(name: str, config: LLaMAConfig, window: int, flag: str) -> None:
    """Refuse a window beyond what checkpoint and scale allow, and say which flag allows it."""
    if window <= config.block_size:
        return
    scale = math.ceil(window / config.original_window)
    extended = config.rope != "none" or config.block_size != config.original_window
    if extended:
        remedy = f"--scale {scale} allows it"
    else:
        remedy = f"--scale {scale} interpolates to it, --scale {scale} --rope none extrapolates"
    raise ValueError(
        f"{flag} {window} is beyond the window of {name}, {config.block_size}: {remedy}"
    )


def open_checkpoint(args: argparse.Namespace, name: str) -> tuple[LLaMA, Tokenizer]:
    """One of the checkpoints of --init, ready to evaluate, and its tokenizer."""
    return load_model(name, extension(args), args.device, args.dtype)


def load_model(
    name: str | Path, extended: dict, device: str, dtype: str = "auto"
) -> tuple[LLaMA, Tokenizer]:
    """A checkpoint, ready to evaluate, and its tokenizer.

    extended: the scale, rope and original_window that checkpoint.load is told; empty for none.
    device, dtype: as the flags have them.
    """
    # cuDNN's attention plans anew for each length of the keys, and so for each generated token. On
    # some GPUs its greedy text is wrong for models with few key/value heads (pytorch #193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch_device, torch_dtype = device_and_dtype(device, dtype)
    model = checkpoint.load(name, **extended, device=torch_device, dtype=torch_dtype).eval()
    return model, checkpoint.load_tokenizer(name, model.config)


# ---- where results go ----------------------------------------------------------------------------


def results_folder(name: str) -> Path:
    """The folder for a checkpoint's results: its own, or out/NAME for a hub id."""
    if Path(name).is_dir():
        return Path(name)
    return Path("out", Path(name).name.split("@")[0])


def choose_outputs(args: argparse.Namespace, stem: str) -> list[int]:
    """Set --json and --plot where they are not given: STEM.json and STEM.png beside the checkpoint.

    Returns the steps N where all of --init are RUN/step-N, else an empty list.
    Raises ValueError for files that can't be written, or that hold something else than earlier
    results, which are replaced.
    """
    key = RESULT_KEYS[stem]
    steps = steps_of(args.init)
    folder = results_folder(args.init[0])
    if len(args.init) > 1:
        folder = folder.parent
    if steps:
        # The results over steps go into RUN, whose own results have another name
        stem += "_steps"
        runs = {Path(name).parent for name in args.init}
        if len(runs) > 1:
            folder = folder.parent
    for flag, suffix in (("json", ".json"), ("plot", ".png")):
        if getattr(args, flag, None) is not None:
            continue
        path = folder / (stem + suffix)
        if not can_be_written(path):
            raise ValueError(f"{path} can't be written: give --{flag}, a file in a folder that can")
        setattr(args, flag, path)
    refuse_other_results(args.json, key)
    if getattr(args, "plot", None) is not None:
        refuse_other_picture(args.plot)
    return steps


# What the results of each script have that the others' have not, by the stem of their file
RESULT_KEYS = {"ppl": "windows", "passkey": "points", "rouge": "rouge"}


def refuse_other_results(path: Path, key: str) -> None:
    """Raise ValueError if a file exists and is not JSON of results that have the key."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    results = found if isinstance(found, list) else [found]
    if not all(isinstance(result, dict) and key in result for result in results):
        raise ValueError(
            f"--json {path} holds something else than earlier results of this script: give another "
            "name, or remove it"
        )


def refuse_other_picture(path: Path) -> None:
    """Raise ValueError if a file exists and is not a picture of Matplotlib, which names itself."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    if b"atplotlib" not in path.read_bytes():
        raise ValueError(
            f"--plot {path} holds something else than an earlier picture of this script: give "
            "another name, or remove it"
        )


def one_or_all(results: list[dict]) -> dict | list[dict]:
    """What goes into the JSON file: the result of one checkpoint, or a list of several."""
    if len(results) == 1:
        return results[0]
    return results


# ---- results over fine-tuning steps --------------------------------------------------------------


class Curve(NamedTuple):
    """One measure of one run over its fine-tuning steps, at one window."""

    run: str
    window: int
    values: dict[int, object]  # steps: value
    method: str = ""  # a key of plots.LOOKS


def steps_of(names: list[str]) -> list[int]:
    """The N of checkpoints RUN/step-N, as train.py --save_at keeps them.

    Returns an empty list if a name has another form, or if N is the same for all.
    """
    steps = []
    for name in names:
        found = re.fullmatch(r"step-(\d+)", Path(name).name)
        if found is None:
            return []
        steps.append(int(found[1]))
    if len(set(steps)) == 1:
        return []
    return steps


def curves_over_steps(results: list[dict], values: Callable[[dict], dict]) -> list[Curve]:
    """The results of RUN/step-N as curves. values(result) gives {window: value}."""
    curves = {}
    for result in results:
        run = label(result | {"init": str(Path(result["init"]).parent)})
        for window, value in values(result).items():
            new_curve = Curve(run, window, {}, result["method"])
            curve = curves.setdefault((run, window), new_curve)
            curve.values[result["steps"]] = value
    return list(curves.values())


def table_over_steps(curves: list[Curve], window_name: str) -> str:
    """Curves as a table with a column for each step. window_name: the heading for the windows."""
    steps = sorted({step for curve in curves for step in curve.values})
    header = ["run", window_name]
    header += [f"step {step}" for step in steps]
    rows = []
    for curve in curves:
        row = [curve.run, curve.window]
        row += [curve.values.get(step, "-") for step in steps]
        rows.append(row)
    return text_table(header, rows)


# ---- batches -------------------------------------------------------------------------------------


def batch_tokens(args: argparse.Namespace, length: int) -> int:
    """Tokens through the model at a time: --batch_size rows of a length, or BATCH_TOKENS."""
    if args.batch_size is None:
        return BATCH_TOKENS
    return args.batch_size * length


def batches_of_equal_length(
    items: Sequence[Item], length: Callable[[Item], int], batch_tokens: int
) -> Iterator[list[Item]]:
    """Yield the items in batches of equal length, so that no padding is needed; the shortest first.

    batch_tokens: tokens of a batch at most, but a batch has at least one item.
    """
    batch: list[Item] = []
    for item in sorted(items, key=length):
        full = (len(batch) + 1) * length(item) > batch_tokens
        if batch and (full or length(item) != length(batch[0])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
