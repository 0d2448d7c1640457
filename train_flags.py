"""The flags of train.py, in groups. What is not given is filled in by train.fill_in_recipe."""

import argparse
import os
import sys
from pathlib import Path

from cli import (
    CHECKPOINT_FORMS, DATA_FORMS, Parser, WholeNumbers, add_model_flags, at_least, read_json
)
from model import PRESETS, LLaMAConfig
from parallel import newest_state
from prompts import PAPER_INPUT
from trainset import Part

BY_SIZE = "; default: by the model's size, see train.recipe"


def parse(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """The flags as given. doc: train.py's docstring.

    With --resume the flags of the run in --out become the defaults.
    """
    parser = Parser(doc)
    add_training_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args(argv)
    if args.resume:
        if not args.out:
            parser.error("--resume needs --out, the folder of the run to go on with")
        # The run's own flags become the defaults
        path = newest_state(Path(args.out)) / "args.json"
        saved = read_json(path)
        unknown = sorted(set(saved) - set(vars(args)))
        if unknown:
            raise ValueError(
                f"{path} has flags that are unknown here ({', '.join(unknown)}): the run is of "
                "another version of train.py, which alone can go on with it"
            )
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
    choose_init(parser, args)
    return args


def add_training_flags(parser: Parser) -> None:
    """What is trained, on what, and how."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--init",
        help=f"{CHECKPOINT_FORMS}; or scratch; "
        "default: the newest base in out/ with --scale or --rope, else scratch")
    add("--preset", default="tiny", choices=PRESETS, help="the shape, when --init is scratch")
    add_model_flags(parser)

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help=f"{DATA_FORMS}; default: Python's standard library")
    add("--mix", choices=("text", "retrieval"),
        help="text alone, as in the paper, or text and passkeys" + BY_SIZE)
    add("--summary_field",
        help="learn to write summaries: rows of --data (.jsonl, .parquet) have a document in "
        "--document_field and its summary here; the loss is on the summary alone")
    add("--document_field", default="document", help="with --summary_field")
    add("--max_input", type=at_least(1), default=PAPER_INPUT,
        help="with --summary_field: cut documents to so many tokens, or to what the window holds")

    add = parser.add_argument_group("recipe").add_argument
    add("--max_iters", type=at_least(1), help="steps" + BY_SIZE)
    add("--batch_size", type=at_least(1), help="rows of a step, over all processes" + BY_SIZE)
    add("--learning_rate", type=at_least(0.0), help="the peak" + BY_SIZE)
    add("--warmup_iters", type=at_least(0), help="steps from 10%% of the peak to it" + BY_SIZE)
    add("--decay", choices=("constant", "linear"),
        help="after the warm-up: linear goes to 5%% of the peak" + BY_SIZE)
    add("--weight_decay", type=at_least(0.0), default=0.0, help="AdamW's")
    add("--grad_clip", type=at_least(0.0), default=1.0, help="largest norm; 0: no clipping")


def add_run_flags(parser: Parser) -> None:
    """Where results go, on what devices, and what it would take."""
    add = parser.add_argument_group("output").add_argument
    add("--out", help="the folder to write; default: out/base, or out/METHOD-SCALE when extending")
    add("--resume", action="store_true", help="go on with the run in --out, with its flags")
    add("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    add("--save_every", type=at_least(1), default=200,
        help="steps between two states to resume from")
    add("--save_at", nargs="+", action=WholeNumbers, const=0, default=[],
        help="steps, as 0,200,400, whose weights are kept in OUT/step-N (tables 3 and 4)")
    add("--save_dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights that are kept; auto: as --init has them if in 16 bits, else float32")
    add("--eval_every", type=at_least(1),
        help="steps between two looks at the validation loss; default: a tenth of --max_iters")
    add("--eval_windows", type=at_least(1), default=64,
        help="windows of a look, 65,536 tokens at most")

    add = parser.add_argument_group("devices").add_argument
    add("--micro_batch_size", type=at_least(1), help="rows at a time; default: some 16,384 tokens")
    add("--dist", choices=("ddp", "fsdp"),
        help="under torchrun: each process holds all the weights, or a part; "
        "default: ddp where weights, gradients and optimizer fit one device")
    add("--checkpoint_activations", default="none", choices=("none", "full", "selective"),
        help="recompute activations in the backward pass: slower, far less memory")
    add("--compile", action="store_true", help="torch.compile, block by block")

    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true",
        help="print what the run takes (memory, tokens, FLOPs) and stop")
    add("--prepare", action="store_true",
        help="download and tokenize, with one process and without a GPU, and stop")
    add("--world_size", type=at_least(1), help="number of processes; default: torchrun's, or 1")
    add("--device_memory", type=at_least(0.0), help="GB of a GPU; default: this machine's device")


def choose_init(parser: Parser, args: argparse.Namespace) -> None:
    """Set --init where it is not given: the base to extend, or scratch."""
    extends = args.scale is not None or args.rope is not None
    if args.plan:  # the preset stands for a checkpoint of its shape
        args.init = args.init or "scratch"
        return
    if args.init is None and extends:
        bases = find_bases()
        if not bases:
            parser.error(
                "--scale and --rope extend a model, and out/base isn't there: make it with "
                "`python train.py`, or give --init"
            )
        args.init = str(bases[-1])
        if os.environ.get("RANK", "0") == "0":
            print(f"--init {args.init}: the newest base that is here", file=sys.stderr)
    if args.init is None:
        args.init = "scratch"
    if args.init == "scratch" and extends:
        parser.error(
            "--scale and --rope extend a model that is trained already: first `python train.py`, "
            "then --init out/base"
        )


def find_bases() -> list[Path]:
    """The bases that `python train.py` and `python demo.py` have written here, the newest last."""
    configs = [*Path("out").glob("base/config.json"), *Path("out/demo").glob("*/base/config.json")]
    configs.sort(key=lambda path: path.stat().st_mtime)
    return [path.parent for path in configs]


def check_flags(args: argparse.Namespace, config: LLaMAConfig) -> None:
    """Refuse flags that contradict each other or the model. Raises ValueError."""
    if args.summary_field and not args.data:
        raise ValueError("--summary_field needs --data, files with documents and summaries")
    if args.summary_field and args.init == "scratch":
        raise ValueError("--summary_field fine-tunes a model that reads already: give --init")
    if config.rope == "dynamic":
        raise ValueError(
            "--rope dynamic changes with the length and is not trained: use it to evaluate, "
            "or train another method"
        )


def check_parts(args: argparse.Namespace, parts: list[Part], world: int) -> None:
    """Refuse a batch that can't be shared among so many processes. Raises ValueError."""
    for part in parts:
        if part.rows == 0:
            raise ValueError(
                f"--batch_size {args.batch_size} is too small for --mix retrieval: give at least 2"
            )
        if part.rows % world:
            raise ValueError(
                f"--batch_size {args.batch_size}: its {part.rows} rows of {part.length} tokens "
                f"can't be shared among {world} processes"
            )
