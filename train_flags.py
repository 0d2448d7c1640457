"""The flags of train.py, in groups; what is not given is settled by model, machine and recipe."""

import argparse
import math
from pathlib import Path

import cost
import plan
from cli import (
    CHECKPOINT_FORMS, DATA_FORMS, Parser, WholeNumbers, add_model_flags, at_least, data_path,
    read_json
)
from model import PRESETS, LLaMAConfig
from parallel import newest_state, states, step_of
from prompts import PAPER_INPUT
from recipe import batch_parts, cpu_recipe, default_recipe
from trainset import Part

# Where --eval_windows is not given: validation takes at most this part of the training between two
# looks, but at least one row, and at most so many rows and tokens
EVAL_SHARE = 0.05
EVAL_WINDOWS = 64
EVAL_TOKENS = 65536

SHIPPED_BASE = Path(__file__).parent / "assets" / "base"
BY_SIZE = "; default: by the model's size, see recipe.py"


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
        "default: scratch, or with --scale or --rope the newest base in out/, else assets/base")
    add("--preset", default="tiny", choices=PRESETS, help="the shape, when --init is scratch")
    add("--theta", type=at_least(1.0),
        help="RoPE's base, when --init is scratch; default: the preset's")
    add_model_flags(parser)

    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", type=data_path,
        help=f"{DATA_FORMS}; default: Python's standard library")
    add("--mix", choices=("text", "retrieval"),
        help="text alone, as in the paper, or text and passkeys" + BY_SIZE)
    add("--min_tokens", type=at_least(1),
        help="train on documents of at least so many tokens, with BOS and EOS, and let each row of "
        "text be of one document if it is long enough")
    add("--row_tokens", type=at_least(2),
        help="tokens of a row of text, at most the window's; shorter rows have skipped positions "
        "that reach through the window (PoSE); --batch_size counts these rows; default: the window")
    add("--no_skip", action="store_true",
        help="positions 0, 1, 2, ... in short rows too (--row_tokens, --mix retrieval), to compare")
    add("--summary_field",
        help="learn to write summaries: rows of --data (.jsonl, .parquet) have a document in "
        "--document_field and its summary here; the loss is on the summary alone")
    add("--document_field", default="document", help="with --summary_field")
    add("--max_input", type=at_least(1), default=PAPER_INPUT,
        help="with --summary_field: cut documents to so many tokens, or to what the window holds")

    add = parser.add_argument_group("recipe").add_argument
    add("--max_iters", type=at_least(1), help="steps" + BY_SIZE)
    add("--batch_size", type=at_least(1),
        help="rows of --row_tokens tokens in a step, over all processes" + BY_SIZE)
    add("--learning_rate", type=at_least(0.0), help="the peak" + BY_SIZE)
    add("--warmup_iters", type=at_least(0), help="steps from 10%% of the peak to it" + BY_SIZE)
    add("--decay", choices=("constant", "linear"),
        help="after the warm-up: linear goes to 5%% of the peak" + BY_SIZE)
    add("--optimizer", choices=("adamw", "muon"),
        help="adamw, as in the paper; muon has the matrices of the blocks by Muon, the rest by "
        "AdamW; default: muon from scratch, else adamw")
    add("--weight_decay", type=at_least(0.0), default=0.0, help="the optimizer's")
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
    add("--eval_windows", type=at_least(1),
        help="windows of a look; default: so many that looks take 5%% of the time, "
        "64 or 65,536 tokens at most")

    add = parser.add_argument_group("devices").add_argument
    add("--micro_batch_size", type=at_least(1),
        help="rows at a time; default: some 16,384 tokens, or as many as fit")
    add("--dist", choices=("ddp", "fsdp"),
        help="under torchrun: each process holds all the weights, or a part; "
        "default: ddp where weights, gradients and optimizer fit one device")
    add("--checkpoint_activations", choices=cost.ACTIVATIONS,
        help="recompute activations in the backward pass: slower, far less memory; "
        "default: none where they fit, else selective, else full")
    add("--compile", action="store_true", help="torch.compile, block by block")
    add("--force", action="store_true", help="run even if memory or disk seem too small")

    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true",
        help="print what the run takes (memory, tokens, FLOPs) and stop")
    add("--prepare", action="store_true",
        help="download and tokenize, with one process and without a GPU, and stop")
    add("--world_size", type=at_least(1), help="number of processes; default: torchrun's, or 1")
    add("--device_memory", type=at_least(0.0), help="GB of a GPU; default: what is free here")


def choose_init(parser: Parser, args: argparse.Namespace) -> None:
    """Set --init where it is not given: the base to extend, or scratch."""
    extends = args.scale is not None or args.rope is not None
    if args.plan:  # the preset stands for a checkpoint of its shape
        args.init = args.init or "scratch"
        return
    if args.init is None and extends:
        bases = find_bases() or [SHIPPED_BASE]
        args.init = str(bases[-1])
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


def base_notes(init: str) -> list[str]:
    """What to know of the folder that --init names: one of several bases, or one unfinished."""
    notes = []
    bases = [str(base) for base in find_bases()]
    if len(bases) > 1 and init == bases[-1]:
        notes.append(f"--init {init}: the newest of the {len(bases)} bases that are here")
    if init == str(SHIPPED_BASE):
        notes.append(f"--init {init}: the tiny base that comes with the code")
    found = states(Path(init))
    if found:
        step = step_of(found[-1])
        planned = read_json(found[-1] / "args.json").get("max_iters", step)
        if step < planned:
            notes.append(
                f"--init {init}: its run stopped at step {step:,} of {planned:,}, and it is taken "
                f"as it is; finish it first by `python train.py --resume --out {init}`"
            )
    return notes


def settle_flags(
    args: argparse.Namespace, config: LLaMAConfig, world: int, machine: plan.Machine
) -> list[str]:
    """Give the flags that are missing their values, and refuse what can't be run.

    Returns notes for the user on what was chosen.
    """
    notes = []
    # --plan may combine --preset with --scale: it then plans to extend a model of that shape
    scratch = args.init == "scratch" and args.scale is None
    if args.row_tokens is None:
        args.row_tokens = config.block_size
    defaults = default_recipe(config, scratch, args.row_tokens)
    if defaults.mix == "retrieval":
        # Round the batch up to a multiple of 2 * world: when extending, half of the rows are text
        # and half are retrieval, and each half is shared among the processes
        groups = math.ceil(defaults.batch_size / (2 * world))
        defaults = defaults._replace(batch_size=2 * world * groups)
    elif machine.device_type == "cpu":
        gpus = f"{defaults.max_iters:,} of {defaults.batch_size}"
        defaults = cpu_recipe(defaults, args.row_tokens, world)
        if args.max_iters is None or args.batch_size is None:
            notes.append(
                f"on a CPU the default is {defaults.max_iters} steps of {defaults.batch_size} rows,"
                f" where GPUs take {gpus}: --max_iters and --batch_size change it"
            )
    for name, value in defaults._asdict().items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    check_flags(args, config)
    check_parts(args, batch_parts(args, config), world)
    plan.choose_micro_batch(args, config, world, machine)
    if args.eval_every is None:
        args.eval_every = max(1, args.max_iters // 10)
    if args.eval_windows is None:
        args.eval_windows = validation_windows(args, config)
    return notes


def validation_windows(args: argparse.Namespace, config: LLaMAConfig) -> int:
    """The rows of a look at the validation loss, so that nobody waits for it."""
    length = args.row_tokens
    steps = min(args.eval_every, args.max_iters)
    training = steps * cost.step_flops(config, batch_parts(args, config))
    reading = length * cost.flops_per_token(config, length, training=False)
    affordable = int(EVAL_SHARE * training / reading)
    return max(1, min(affordable, EVAL_WINDOWS, EVAL_TOKENS // length))


def check_flags(args: argparse.Namespace, config: LLaMAConfig) -> None:
    """Refuse flags that contradict each other or the model. Raises ValueError."""
    if args.summary_field and not args.data:
        raise ValueError("--summary_field needs --data, files with documents and summaries")
    if args.summary_field and args.init == "scratch":
        raise ValueError("--summary_field fine-tunes a model that reads already: give --init")
    if args.summary_field and args.min_tokens:
        raise ValueError("--min_tokens chooses texts: with --summary_field leave it out")
    if args.theta is not None and args.init != "scratch":
        raise ValueError(
            f"--theta {args.theta:g}: the model in --init was trained with {config.rope_theta:g}; "
            "--theta is for a model from scratch"
        )
    # --plan may be about a run within the window
    if args.scale is not None and args.scale <= 1 and not args.plan:
        raise ValueError(
            f"--scale {args.scale:g} extends nothing: give more than 1, or leave --scale and --rope "
            "out to train within the window"
        )
    check_row_tokens(args, config)
    if config.rope == "dynamic":
        raise ValueError(
            "--rope dynamic changes with the length and is not trained: use it to evaluate, "
            "or train another method"
        )


def check_row_tokens(args: argparse.Namespace, config: LLaMAConfig) -> None:
    """Refuse --row_tokens and --no_skip where they don't fit. Raises ValueError."""
    window = config.block_size
    if args.row_tokens > window:
        raise ValueError(
            f"--row_tokens {args.row_tokens}: the window has {window} tokens: give at most that"
        )
    if args.row_tokens < window and config.original_window >= window:
        raise ValueError(
            f"--row_tokens {args.row_tokens}: short rows are for extending a window: give --scale"
        )
    if args.row_tokens < window and args.summary_field:
        raise ValueError(
            f"--row_tokens {args.row_tokens}: with --summary_field a row is a whole report: leave "
            "--row_tokens out"
        )
    extends = config.original_window < window
    short_rows = args.row_tokens < window or (args.mix == "retrieval" and extends)
    if args.no_skip and not short_rows:
        raise ValueError("--no_skip is about short rows: give --row_tokens below the window too")


def check_parts(args: argparse.Namespace, parts: list[Part], world: int) -> None:
    """Refuse a batch that can't be shared among so many processes. Raises ValueError."""
    for part in parts:
        if part.rows == 0:
            least = 2 * max(1, math.ceil(parts[-1].length / parts[0].length))
            raise ValueError(
                f"--batch_size {args.batch_size} is too small for --mix retrieval: "
                f"give at least {least}"
            )
        if part.rows % world:
            raise ValueError(
                f"--batch_size {args.batch_size}: its {part.rows} rows of {part.length} tokens "
                f"can't be shared among {world} processes"
            )
