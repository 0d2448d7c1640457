"""The paper in one command, on a laptop: extend the window of a small LLaMA, and measure it.

    python demo.py                         # extend the base in assets/base; results in out/demo
    python demo.py --scratch               # pre-train that base first
    python demo.py --all                   # fine-tune with NTK and YaRN too
    python demo.py --scratch --seeds 0,1,2           # mean and spread over three seeds
    python demo.py --init FOLDER --data novels/      # the same for a real LLaMA, in hours on a CPU

Each stage is one of the repo's scripts: train.py makes the base and extends it, eval_ppl.py
measures perplexity, and passkey.py measures how far a checkpoint finds keys. What will be done, and
how long its arithmetic takes, is said first; demo_plan.py has the defaults. A finished stage is
kept as long as its settings stay the same; after a change of the code, give another --out. Ctrl-C
during training saves, and the same command goes on from there.
"""

import argparse
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import cli
import data
import demo_plan
import eval_ppl
import passkey
import plots
import train
from demo_plan import (
    METHODS, base_folder, by_size, fine_tuning_flags, methods, planned_training, pretraining_flags
)
from evaluation import METHOD_NAMES, Curve, load_model
from hf_config import extend
from model import LLaMA
from parallel import states
from tokenizer import Tokenizer


class Row(NamedTuple):
    """What was measured of one checkpoint: a row of the table."""

    name: str  # "base", or a name of METHODS
    rope: str
    steps: int  # of fine-tuning
    ppl: dict[str, float]  # {window: perplexity}; the window is a string as in JSON
    k_max: int
    found: dict[str, float]  # a passkey.Share: keys found beyond the original window
    losses: dict[str, list[dict]]  # {window: "by_document" of eval_ppl.perplexity}
    points: list[dict]  # keys found by distance, as passkey.retrieve returns them
    positions: list[float]  # mean loss by position in the extended window
    own_keys: dict[str, float] | None = None  # the base's passkey.Share in its own window


# ---- the command line ----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    count = cli.at_least(1)
    add("--init", help=f"extend {cli.CHECKPOINT_FORMS}; default: the tiny base in assets/base")
    add("--scratch", action="store_true", help="pre-train a tiny base, and extend that")
    add("--data", nargs="+", type=cli.data_path,
        help=f"{cli.DATA_FORMS}; default: Python's standard library")
    add("--out", default="out/demo", help="the folder for everything")
    add("--scale", type=float,
        help="the extended window over the original one, L'/L; " + by_size("scale"))
    add("--row_tokens", type=cli.at_least(2),
        help="tokens of a training row of text; " + by_size("row_tokens")
        + ", or the original window if that is less. In shorter rows than the extended window "
        "positions skip through it, but not in those of a tiny model")
    add("--base_steps", type=count,
        help="with --scratch: pre-training steps; default: as train.py has it")
    add("--steps", nargs="+", action=cli.WholeNumbers, const=1,
        help="measure each fine-tune after these steps; it ends with the last of them; "
        + by_size("steps"))
    add("--all", action="store_true", help="fine-tune with NTK and YaRN too")
    add("--distances", type=count,
        help="passkeys: number of distances k; " + by_size("distances"))
    add("--tries", type=count, help="passkeys: prompts for each k; " + by_size("tries"))
    add("--documents", type=count,
        help="perplexity: validation documents; " + by_size("documents"))
    add("--max_tokens", type=count, default=2048,
        help="perplexity: tokens of each document, or as many as fill the extended window")
    add("--seeds", nargs="+", action=cli.WholeNumbers, const=0, default=[0],
        help="do all of it once for each seed, as 0,1,2; several give mean and spread")
    add("--device", default="auto", help="cpu, cuda, mps; auto: a GPU where there is one")
    args = parser.parse_args(argv)
    if args.scale is not None and not args.scale > 1:
        parser.error(f"--scale must be above 1, got {args.scale:g}: the demo extends the window")
    if args.init and args.scratch:
        parser.error("--init and --scratch are two bases: give one of them")
    if args.base_steps and not args.scratch:
        parser.error("--base_steps is about pre-training: give --scratch too")
    return args


# ---- the stages ----------------------------------------------------------------------------------


def run_seed(args: argparse.Namespace, seed: int, long: int) -> list[Row]:
    """Run all stages for one seed. long: the extended window."""
    out = Path(args.out) / f"seed-{seed}"

    # The base
    base = base_folder(args, seed)
    base_settings = {"init": str(base)}
    if args.scratch:
        flags = pretraining_flags(args, seed)
        base_settings = train_stage(base, flags, {}, "pre-training the base", args.processes)

    # The base without fine-tuning: extrapolated (rope "none") and interpolated (rope "linear")
    rows = []
    for name, rope in (("base", "none"), ("PI", "linear")):
        extension = {"scale": args.scale, "rope": rope}
        file = out / f"{name}-0.json"
        measures = evaluate_stage(file, base, extension, base_settings, args, seed)
        rows.append(Row(name, rope, 0, **measures))
    own_keys = own_keys_stage(out / "base-keys.json", base, base_settings, args, seed)
    rows[0] = rows[0]._replace(own_keys=own_keys)

    # The fine-tunes by each method, measured after every number of steps in --steps
    for name, rope in methods(args).items():
        folder = out / name
        title = f"{name}: fine-tuning for {long} tokens with rope {rope!r}"
        flags = fine_tuning_flags(args, seed, rope)
        settings = train_stage(folder, flags, base_settings, title, args.processes)
        for steps in args.steps:
            file = out / f"{name}-{steps}.json"
            measures = evaluate_stage(file, folder / f"step-{steps}", {}, settings, args, seed)
            rows.append(Row(name, rope, steps, **measures))
    return rows


def stage(file: Path, settings: dict, work: Callable[[], dict]) -> dict:
    """The result of work(), taken from `file` if it was made with the same settings before."""
    if file.exists():
        earlier = cli.read_json(file)
        if earlier.get("settings") == settings:
            print(f"{file}: kept from an earlier run", file=sys.stderr)
            return earlier["result"]
        print(f"{file}: its settings have changed, so it is made anew", file=sys.stderr)
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    cli.write_json(file, {"settings": settings, "result": result, "seconds": seconds})
    return result


def train_stage(folder: Path, flags: list[str], parent: dict, title: str, processes: int) -> dict:
    """Run train.py with some flags into a folder. Returns the settings of the run.

    parent: the settings that made the checkpoint which is fine-tuned; empty for the base.
    """
    settings = {"flags": flags, "parent": parent}

    def work() -> dict:
        print(f"\n== {title}", file=sys.stderr)
        # An interrupted run with the same settings goes on; a run with other settings is replaced
        begun = folder / "settings.json"
        same = begun.exists() and cli.read_json(begun) == settings
        cli.write_json(begun, settings)
        start = "--overwrite"
        if same and states(folder):
            start = "--resume"
        run_train(flags + ["--out", str(folder), start], processes)
        return {}

    stage(folder.with_suffix(".json"), settings, work)
    return settings


def run_train(flags: list[str], processes: int) -> None:
    """Run train.py, in this process or in several, which share each batch.

    If the training fails, the demo ends with the exit code of train.py.
    """
    if processes == 1:
        train.main(flags)
        gc.collect()  # frees the model and its optimizer, because the next stage needs the memory
        return
    # What torchrun does, without its long reports of a failure and of Ctrl-C
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="demo",
        shutdown_timeout=600,  # by default a process has 30 s after Ctrl-C to save
        signals_to_handle="SIGINT",
    )
    os.environ["OMP_NUM_THREADS"] = str(demo_plan.threads_of_process(processes))
    handler = signal.getsignal(signal.SIGINT)  # the launcher leaves its own in place
    try:
        elastic_launch(launch, sys.executable)(train.__file__, *flags)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        print("demo.py: error: training failed, see the first message above", file=sys.stderr)
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode)
    finally:
        signal.signal(signal.SIGINT, handler)


def evaluate_stage(
    file: Path, folder: Path, extension: dict, parent: dict, args: argparse.Namespace, seed: int
) -> dict:
    """What `evaluate` measures of a checkpoint, kept in a file.

    extension: the scale and rope that checkpoint.load is told; empty for an extended checkpoint.
    parent: the settings that made the checkpoint.
    """
    settings = {"parent": parent, "extension": extension, "data": args.data}
    for name in ("distances", "tries", "documents", "max_tokens", "stride"):
        settings[name] = getattr(args, name)

    def work() -> dict:
        model, tokenizer = load_model(folder, extension, args.device)
        measures = evaluate(model, tokenizer, args, seed, file.stem)
        # The table comes at the end, maybe after hours
        ppl = [f"{ppl:.2f} at {window}" for window, ppl in measures["ppl"].items()]
        found = f"{measures['found']['found']:.0%} of the far keys"
        print(f"{file.stem}: perplexity {', '.join(ppl)}; {found}", file=sys.stderr)
        return measures

    return stage(file, settings, work)


def own_keys_stage(
    file: Path, base: Path, parent: dict, args: argparse.Namespace, seed: int
) -> dict | None:
    """The passkey.Share of keys that the base finds in its own window, kept in a file.

    None if a prompt has no room there.  parent: the settings that made the base.
    """
    settings = {"parent": parent, "distances": args.distances, "tries": args.tries}

    def work() -> dict | None:
        model, tokenizer = load_model(base, {}, args.device)
        window = model.config.original_window
        ks = passkey.distances(window, args.distances)
        desc = "base, passkeys in its own window"
        points = passkey.retrieve(model, tokenizer, window, ks, args.tries, seed, desc=desc)
        share = passkey.share_found(points, beyond=0)
        if share is None:
            return None
        return share._asdict()

    return stage(file, settings, work)


def evaluate(
    model: LLaMA, tokenizer: Tokenizer, args: argparse.Namespace, seed: int, title: str
) -> dict:
    """What is measured of a model in its extended window: the fields of a Row from ppl on."""
    bos_id = tokenizer.bos_id
    long = model.config.block_size

    # All windows score the same documents, those that fill the extended window (with BOS)
    corpus = data.load_corpus(args.data, tokenizer, "val")
    max_tokens = max(args.max_tokens, long - len(tokenizer.bos_ids))
    documents, _ = eval_ppl.choose_documents(corpus.documents(), long, max_tokens, args.documents)
    if not documents:
        raise ValueError(
            f"--data: no validation document fills the extended window, {long}: give longer ones"
        )

    # Perplexity at the original window and at its doublings
    ppl = {}
    losses = {}
    for window in eval_ppl.doublings(model.config):
        desc = f"{title}, window {window}"
        measured = eval_ppl.perplexity(model, documents, window, args.stride, bos_id, desc=desc)
        ppl[str(window)] = measured["ppl"]
        losses[str(window)] = measured["by_document"]

    # The loss by position and the passkeys, both in the extended window
    desc = f"{title}, by position"
    positions = eval_ppl.position_nll(model, documents, long, bos_id, desc=desc)
    ks = passkey.distances(long, args.distances)
    desc = f"{title}, passkeys"
    points = passkey.retrieve(model, tokenizer, long, ks, args.tries, seed, desc=desc)
    if not points:
        raise ValueError(f"{long} tokens are too few for a passkey prompt: give a larger --scale")
    return {
        "ppl": ppl,
        "k_max": passkey.k_max(points),
        "found": passkey.share_found(points, model.config.original_window)._asdict(),
        "losses": losses,
        "points": points,
        "positions": positions.tolist(),
    }


# ---- the results as text -------------------------------------------------------------------------


def summary(rows: list[Row], window: int, long: int, trained_on: str) -> list[str]:
    """Sentences on what the rows show, whatever they show.

    rows: the base first, then PI without fine-tuning, then the fine-tunes.
    trained_on: a sentence on the passkeys of the fine-tunes, from `passkeys_in_training`.
    """
    last = last_rows(rows)
    sentences = [
        breakdown_sentence(rows[0], rows[1], window, long),
        perplexity_sentence(rows[0], last["PI"], window, long),
    ]
    # PI beside direct fine-tuning, early and late
    looks = sorted({row.steps for row in rows if row.name == "direct"})
    for steps in sorted({looks[0], looks[-1]}):
        pi = find(rows, "PI", steps)
        direct = find(rows, "direct", steps)
        sentences.append(difference_sentence(pi, direct, long))
    if rows[0].own_keys is not None:
        sentences.append(own_keys_sentence(rows[0].own_keys))
    return sentences + passkey_sentences(last["PI"], last["direct"], window, trained_on)


def last_rows(rows: list[Row]) -> dict[str, Row]:
    """The row of each name with the most steps."""
    return {row.name: row for row in rows}


def find(rows: list[Row], name: str, steps: int) -> Row:
    for row in rows:
        if row.name == name and row.steps == steps:
            return row
    raise KeyError(f"{name}, {steps} steps")


def breakdown_sentence(base: Row, untuned: Row, window: int, long: int) -> str:
    """How the base fares beyond its window, without fine-tuning."""
    at_home = base.ppl[str(window)]
    extrapolated = base.ppl[str(long)]
    interpolated = untuned.ppl[str(long)]
    text = f"Read at {long / window:g} times its window, the base's perplexity "
    if extrapolated > 1.2 * at_home:
        text += f"blows up {extrapolated / at_home:.1f}-fold, "
        text += f"from {at_home:.1f} to {extrapolated:.1f}"
    else:
        text += f"does not blow up ({at_home:.1f} at {window}, {extrapolated:.1f} at {long})"
    text += f"; Position Interpolation without fine-tuning has {interpolated:.1f} there, "
    if interpolated < extrapolated:
        return text + "better than extrapolating."
    return text + "no better than extrapolating."


def perplexity_sentence(base: Row, pi: Row, window: int, long: int) -> str:
    """How PI fares after the fine-tune: beside the base, and over the window."""
    at_home = base.ppl[str(window)]
    tuned = pi.ppl[str(long)]
    text = f"After {pi.steps} steps PI has {tuned:.1f} at {long}, "
    if tuned <= at_home:
        text += f"at or below the base at {window}; "
    else:
        text += f"{tuned / at_home - 1:.0%} above the base at {window}; "
    text += f"from {window} to {long} its loss changes by "
    difference = paired(pi.losses[str(window)], pi.losses[str(long)])
    return text + f"{in_words(*difference)}."


def difference_sentence(pi: Row, direct: Row, long: int) -> str:
    """PI beside direct fine-tuning after the same steps, over the same documents."""
    difference, stderr = paired(direct.losses[str(long)], pi.losses[str(long)])
    text = f"After {pi.steps} steps the loss of PI at {long} minus that of direct fine-tuning is "
    text += in_words(difference, stderr)
    if stderr is not None and abs(difference) < 2 * stderr:
        return text + ": they are as good."
    if difference < 0:
        return text + ": PI reads better."
    return text + ": direct fine-tuning reads better."


def paired(first: list[dict], second: list[dict]) -> tuple[float, float | None]:
    """eval_ppl.paired_difference of two rows' losses."""
    return eval_ppl.paired_difference({"by_document": first}, {"by_document": second})


def in_words(difference: float, stderr: float | None) -> str:
    """A difference of losses with its standard error over documents."""
    if stderr is None:
        return f"{difference:+.4f} (one document)"
    return f"{difference:+.4f} ± {stderr:.4f}"


def own_keys_sentence(share: dict[str, float]) -> str:
    """Whether the base has learned to find keys at all."""
    text = f"In its own window the base finds {share_in_words(share)} of the keys"
    if share["found"] < 0.5:
        return text + ": it has not learned it well, so what a fine-tune finds says little."
    return text + "."


def passkeys_in_training(training: argparse.Namespace, window: int) -> str:
    """How far passkeys are from their questions in a fine-tune.

    training: the flags of train.py.  window: the original one, which rows with passkeys fill.
    """
    if training.mix == "text":
        return "The fine-tune is on text alone, without passkeys."
    rows = f"In the fine-tune no passkey lies more than {window} tokens before its question"
    if not training.no_skip:
        return rows + ", though positions skip through the extended window."
    if training.row_tokens <= window:
        return rows + f", and no text is longer than {training.row_tokens}."
    return rows + "."


def passkey_sentences(pi: Row, direct: Row, window: int, trained_on: str) -> list[str]:
    share = (
        f"{trained_on} PI finds {share_in_words(pi.found)} of the keys beyond the original window "
        f"after {pi.steps} steps, direct fine-tuning {share_in_words(direct.found)}."
    )
    reach = (
        f"k_max ends before the first distance at which fewer than {passkey.THRESHOLD:.0%} are "
        f"found: it is {k_max_in_words(pi, window)} for PI and {k_max_in_words(direct, window)} "
        "for direct fine-tuning, so PI reaches "
    )
    if pi.k_max > direct.k_max:
        reach += "further."
    elif pi.k_max < direct.k_max:
        reach += "less far."
    else:
        reach += "as far."
    return [share, reach]


def share_in_words(share: dict[str, float]) -> str:
    """A passkey.Share with its 95% interval."""
    return f"{share['found']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def k_max_in_words(row: Row, window: int) -> str:
    longest = max(point["k"] for point in row.points)
    if row.k_max >= longest:
        return f"{row.k_max} (the whole window)"
    if row.k_max > window:
        return f"{row.k_max} of {longest} (beyond the original window)"
    return f"{row.k_max} of {longest} (within the original window)"


def table(runs: list[list[Row]]) -> str:
    """The rows as text; of several runs, one for each seed, mean and standard deviation."""
    windows = list(runs[0][0].ppl)
    header = ["", "rope", "steps"] + [f"ppl at {window}" for window in windows]
    header += ["far keys", "k_max"]
    if len(runs) > 1:
        header.append("k_max of each seed")
    lines = []
    for same_row in zip(*runs):
        first = same_row[0]
        line = [first.name, first.rope, first.steps]
        for window in windows:
            line.append(mean_and_spread([row.ppl[window] for row in same_row], ".2f"))
        line.append(mean_and_spread([row.found["found"] for row in same_row], ".0%"))
        k_max = [row.k_max for row in same_row]
        line.append(mean_and_spread(k_max, ".0f"))
        if len(runs) > 1:
            line.append(", ".join(str(k) for k in k_max))
        lines.append(line)
    return cli.text_table(header, lines)


def mean_and_spread(values: list[float], digits: str) -> str:
    """A value, or the mean of several and their standard deviation."""
    text = format(statistics.mean(values), digits)
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{digits}}"
    return text


# ---- the results as pictures ---------------------------------------------------------------------


def draw(rows: list[Row], window: int, path: Path) -> None:
    """Draw perplexity over the window, loss over the position and passkeys over the distance."""
    lines = {"base, extrapolated": rows[0], "PI, no fine-tuning": rows[1]}
    methods = ["extrapolated", "PI" + plots.UNTUNED]
    for name, row in last_rows(rows).items():
        if row.steps > 0:
            lines[f"{name}, {row.steps} steps"] = row
            methods.append(METHOD_NAMES[row.rope])

    # What plots.py takes: results in the form of eval_ppl.py's and passkey.py's
    results = []
    for (label, row), method in zip(lines.items(), methods):
        result = {
            "label": label,
            "method": method,
            "original_window": window,
            "windows": [{"window": int(size), "ppl": ppl} for size, ppl in row.ppl.items()],
            "positions": {"nll": row.positions},
            "points": row.points,
            "k_max": row.k_max,
        }
        results.append(result)
    figure, (left, middle, right) = plots.new_figure(3, 5.0)
    plots.draw_perplexity(left, results)
    plots.draw_positions(middle, results)
    plots.draw_passkeys(right, results, passkey.THRESHOLD)
    plots.save_figure(figure, path)


def draw_steps(rows: list[Row], window: int, long: int, path: Path) -> None:
    """Draw perplexity, far keys and k_max over fine-tuning steps (the paper's tables 3 and 4)."""
    ppl_curves = []
    found_curves = []
    reach_curves = []
    for name in METHODS:
        method = METHOD_NAMES[METHODS[name]]
        curve = [row for row in rows if row.name == name]
        if name == "direct":
            # Before the first step it is the extrapolated base
            curve.append(rows[0])
        if len(curve) > 1:
            ppl = {row.steps: row.ppl[str(long)] for row in curve}
            found = {row.steps: row.found["found"] for row in curve}
            reach = {row.steps: row.k_max for row in curve}
            ppl_curves.append(Curve(name, long, ppl, method))
            found_curves.append(Curve(name, long, found, method))
            reach_curves.append(Curve(name, long, reach, method))

    figure, (left, middle, right) = plots.new_figure(3, 5.0)
    plots.draw_perplexity_over_steps(left, ppl_curves)
    plots.draw_found_over_steps(middle, found_curves, window)
    plots.draw_reach_over_steps(right, reach_curves, [{"original_window": window}])
    plots.save_figure(figure, path)


# ---- the run -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.perf_counter()

    # Refuse bad input in one line, before torchrun would add a report of its own
    device, dtype = cli.device_and_dtype(args.device)
    if args.data:
        next(data.read_documents(args.data, "train"))
    base = demo_plan.base_config(args)
    demo_plan.settle(args, base, device)
    extended = extend(base, args.scale, "linear")
    window = base.original_window
    long = extended.block_size
    if long <= window:
        raise ValueError(f"--scale {args.scale:g} leaves the window at {window}: give a larger one")

    # Say what will be done, before the hours that it may take
    flags = fine_tuning_flags(args, args.seeds[0], "linear")
    fine_tune = planned_training(flags, extended, args.processes, device, dtype)
    pretraining = None
    if args.scratch:
        flags = pretraining_flags(args, args.seeds[0])
        pretraining = planned_training(flags, base, args.processes, device, dtype)
    print(demo_plan.plan_text(args, fine_tune, pretraining, device), file=sys.stderr)

    out = Path(args.out)
    runs = []
    for seed in args.seeds:
        rows = run_seed(args, seed, long)
        runs.append(rows)

        # Report: JSON, pictures, a table and sentences. The first seed's files go beside the stages
        folder = out
        if seed != args.seeds[0]:
            folder = out / f"seed-{seed}"
        trained_on = passkeys_in_training(fine_tune.args, window)
        sentences = summary(rows, window, long, trained_on)
        result = {
            "seed": seed,
            "window": window,
            "long": long,
            "rows": [row._asdict() for row in rows],
            "summary": sentences,
            "seconds": time.perf_counter() - started,
        }
        cli.write_json(folder / "demo.json", result)
        draw(rows, window, folder / "demo.png")
        draw_steps(rows, window, long, folder / "demo_steps.png")
        print(f"\nseed {seed}: window {window}, extended to {long}\n\n{table([rows])}\n")
        print("\n".join(sentences))
        print(f"\nwritten: demo.json, demo.png and demo_steps.png in {folder}")

    if len(runs) > 1:
        text = table(runs)
        seeds = ", ".join(str(seed) for seed in args.seeds)
        print(f"\nmean ± standard deviation over seeds {seeds}\n\n{text}")
        with cli.replacing(out / "seeds.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - started:,.0f} s", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, after_interrupt="stopped; the same command goes on from here")
