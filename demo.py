"""The paper in one command, on a laptop: pre-train a small LLaMA, extend its window, measure, and see.

    python demo.py                                       # about 15 minutes on two CPU cores, everything into out/demo
    python demo.py --all                                 # NTK and YaRN too, with the same fine-tune
    python demo.py --seeds 0,1,2                         # mean and spread over seeds, each from nothing (hours)
    python demo.py --init FOLDER --data novels/ --scale 2 --steps 200      # the same questions to a real LLaMA

Its stages are the repo's own scripts: train.py makes a base and extends it, eval_ppl.py's measure says how well
each checkpoint reads, passkey.py's how far it sees. A finished stage is kept and not repeated unless its settings,
or the code that made it, changed. Ctrl-C saves; the same command goes on.
"""

import argparse
import hashlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint
import data
import eval_ppl
import model
import parallel
import passkey
import rope
import sequences
import tokenizer
import train

MODEL_CODE = (rope, model)
DATA_CODE = (data, sequences, tokenizer, checkpoint)
METHODS = {"PI": "linear", "direct": "none", "NTK": "ntk", "YaRN": "yarn"}  # name in the table: --rope


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = checkpoint.Parser(__doc__)
    add = parser.add_argument
    add("--init", help="a checkpoint to extend; default: pre-train the tiny base")
    add("--data", nargs="+", help="files or folders of text; default: Python's standard library")
    add("--out", default="out/demo", help="the folder for everything")
    add("--scale", type=float, default=2.0, help="L'/L: the window asked for over the original one")
    add("--base_steps", type=int, help="pre-training steps; default: train.py's default")
    add("--steps", default="100,200,400", help="look at the fine-tunes after these steps; the last one ends them")
    add("--all", action="store_true", help="fine-tune with NTK and YaRN too")
    add("--distances", type=int, default=32, help="passkey: values of k")
    add("--tries", type=int, default=10, help="passkey: prompts for each k")
    add("--documents", type=int, default=16, help="perplexity: validation documents")
    add("--max_tokens", type=int, default=2048, help="perplexity: tokens of each document")
    add("--seeds", default="0", help="seeds, each a run of its own from the base on; several give mean and spread")
    add("--device", default="auto", help="cpu, cuda, mps; auto: a GPU where there is one")
    args = parser.parse_args(argv)
    args.steps = eval_ppl.whole_numbers([args.steps], "--steps", 1)
    args.seeds = eval_ppl.whole_numbers([args.seeds], "--seeds", 0)
    if not args.scale > 1:
        parser.error(f"--scale must be above 1, got {args.scale:g}: it is the window asked for over the original one")
    return args


# ---- stages --------------------------------------------------------------------------------------------------------


def code_of(*modules) -> str:
    """A hash of the source of some modules: a stage that other code made is not ours."""
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()[:16]


def stage(file: Path, settings: dict, work: Callable[[], dict]) -> dict:
    """What `work` returns, from `file` if it was made with the same settings before."""
    if file.exists() and (kept := checkpoint.read_json(file)).get("settings") == settings:
        print(f"{file}: kept from an earlier run", file=sys.stderr)
        return kept["result"]
    started = time.perf_counter()
    result = work() | {"seconds": 0.0}
    result["seconds"] = time.perf_counter() - started
    checkpoint.write_json(file, {"settings": settings, "result": result})
    return result


def launch(flags: list[str], device: str) -> None:
    """train.py with some flags: here, or on the CPU as up to four processes that share each batch (DDP). A model this
    small gives two threads too little to do, and two processes enough. What interrupts it ends the demo too."""
    on_cpu = checkpoint.device_and_dtype(argparse.Namespace(device=device, dtype="auto"))[0].type == "cpu"
    processes = max(n for n in (1, 2, 4) if n == 1 or on_cpu and n <= os.cpu_count())
    if processes == 1:
        return train.main(flags)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": os.cpu_count() // processes}
    workers = []
    for rank in range(processes):  # what torchrun does, without its tracebacks when Ctrl-C ends it
        env = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        quiet = subprocess.DEVNULL if rank else None  # all meet the same errors: one says them
        workers.append(subprocess.Popen([sys.executable, train.__file__, *flags], env=os.environ | env, stderr=quiet))
    try:
        while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
            time.sleep(0.2)
    except KeyboardInterrupt:  # the workers got it too, and are saving
        for worker in workers:
            worker.wait()
        raise
    for worker in workers:
        if any(codes):  # one failed: the others would wait for it
            worker.terminate()
        worker.wait()
    if any(codes):
        sys.exit(next(code for code in codes if code))


def trained(folder: Path, flags: list[str], parent: dict, title: str, device: str) -> dict:
    """A run of train.py into folder: the settings that made it. An interrupted one goes on, a stale one is redone."""
    settings = {"flags": flags, "parent": parent, "code": code_of(train, parallel, *DATA_CODE, *MODEL_CODE)}
    begun = folder / "settings.json"  # says whose half-finished run this is

    def work() -> dict:
        print(f"\n== {title}", file=sys.stderr)
        same = begun.exists() and checkpoint.read_json(begun) == settings
        checkpoint.write_json(begun, settings)
        go_on = ["--resume"] if same and train.states(folder) else ["--overwrite"]
        launch([*flags, "--out", str(folder), *go_on], device)
        return {}

    stage(folder.with_suffix(".json"), settings, work)
    return settings


def evaluated(
    file: Path, folder: Path, extend: dict, parent: dict, long: int, args: argparse.Namespace, seed: int
) -> dict:
    """Both measures of a checkpoint, looked at with its window extended as `extend` says."""
    measure = {
        "distances": args.distances,
        "tries": args.tries,
        "documents": args.documents,
        "max_tokens": args.max_tokens,
    }
    settings = {
        "parent": parent,
        "extend": extend,
        **measure,
        "data": args.data,
        "code": code_of(eval_ppl, passkey, *DATA_CODE, *MODEL_CODE),
    }

    def work() -> dict:
        device, dtype = checkpoint.device_and_dtype(argparse.Namespace(device=args.device, dtype="auto"))
        llama = checkpoint.load(folder, **extend, device=device, dtype=dtype).eval()
        tokenizer = checkpoint.load_tokenizer(folder, llama.config)
        documents, _ = eval_ppl.choose_documents(
            data.load_corpus(args.data, tokenizer, "val").documents(), long, args.max_tokens, args.documents
        )
        if not documents:
            raise ValueError(f"--data: no validation document has {long} tokens, the extended window: give longer ones")
        windows, window = [], llama.config.original_window // 2  # where the base is at home, too
        while window < long:
            windows.append(window)
            window *= 2
        return {
            "ppl": {
                str(w): eval_ppl.perplexity(
                    llama, documents, w, min(256, w // 2), tokenizer.bos_id, desc=f"{file.stem}, window {w}"
                )
                for w in [*windows, long]
            },
            "positions": eval_ppl.position_nll(
                llama, documents, long, tokenizer.bos_id, desc=f"{file.stem}, by position"
            ).tolist(),
            "points": passkey.retrieve(
                llama,
                tokenizer,
                long,
                passkey.distances(long, args.distances),
                args.tries,
                seed,
                desc=f"{file.stem}, passkeys",
            ),
        }

    return stage(file, settings, work)


def run_seed(args: argparse.Namespace, seed: int) -> tuple[list[dict], model.LLaMAConfig]:
    """All stages of one seed: the rows of the table, and the base's config."""
    out = Path(args.out) / f"seed-{seed}"
    common = ["--seed", str(seed), "--device", args.device, *(["--data", *args.data] if args.data else [])]
    base, parent = Path(args.init or out / "base"), {"init": args.init}
    if not args.init:
        more = ["--max_iters", str(args.base_steps)] if args.base_steps else []
        parent = trained(base, [*common, *more], {}, "the base, pre-trained at its own window", args.device)
    config = checkpoint.read_config(base)
    long = checkpoint.extend(config, args.scale, "linear").block_size

    def row(name: str, rope: str, steps: int, file: str, folder: Path, extend: dict, parent: dict) -> dict:
        result = evaluated(out / f"{file}.json", folder, extend, parent, long, args, seed)
        ppl = {window: measured["ppl"] for window, measured in result["ppl"].items()}
        best = passkey.k_max(result["points"])
        return {"name": name, "rope": rope, "steps": steps, "ppl": ppl, "k_max": best,
                "points": result["points"], "positions": result["positions"]}  # fmt: skip

    rows = [
        row("base", "none", 0, "base-extrapolated", base, {"scale": args.scale, "rope": "none"}, parent),
        row("PI", "linear", 0, "PI-0", base, {"scale": args.scale, "rope": "linear"}, parent),
    ]
    for name, method in METHODS.items():
        if name not in ("PI", "direct") and not args.all:
            continue
        folder = out / name
        flags = ["--init", str(base), "--scale", f"{args.scale:g}", "--rope", method, *common]
        flags += ["--max_iters", str(args.steps[-1]), "--save_at", ",".join(map(str, args.steps))]
        made = trained(folder, flags, parent, f"{name}: fine-tuned at {long} tokens, rope {method!r}", args.device)
        for steps in args.steps:
            rows.append(row(name, method, steps, f"{name}-{steps}", folder / f"step-{steps}", {}, made))
    return rows, config


# ---- what came out -------------------------------------------------------------------------------------------------


def find(rows: list[dict], name: str, steps: int | None = None) -> dict:
    """The row of a name after so many steps (None: the last)."""
    return [row for row in rows if row["name"] == name and steps in (None, row["steps"])][-1]


def summary(rows: list[dict], window: int, long: int) -> list[str]:
    """Two sentences on what the rows show, whatever they show: on perplexity, and on passkeys."""
    base, untuned, pi, direct = find(rows, "base"), find(rows, "PI", 0), find(rows, "PI"), find(rows, "direct")
    own, far = base["ppl"][str(window)], str(long)
    curve = [ppl for size, ppl in pi["ppl"].items() if int(size) >= window]
    at = {name: row["ppl"][far] for name, row in (("base", base), ("untuned", untuned), ("pi", pi), ("direct", direct))}
    blow_up = f"does not blow up ({own:.1f} at {window}, {at['base']:.1f} at {long})"
    if at["base"] > 1.2 * own:
        blow_up = f"blows up {at['base'] / own:.1f}-fold, from {own:.1f} to {at['base']:.1f}"
    beside = "at or below" if at["pi"] <= own else f"{at['pi'] / own - 1:.0%} above"
    slope = "falling" if all(b < a for a, b in zip(curve, curve[1:])) else "not falling"
    first = (
        f"Read {long / window:g} times beyond its window, the base's perplexity {blow_up}; Position Interpolation "
        f"without fine-tuning has {at['untuned']:.1f} there, {'better' if at['untuned'] < at['base'] else 'no better'} "
        f"than extrapolating, and after {pi['steps']} steps {at['pi']:.1f}, {beside} the base at its own window, "
        f"{slope} as the window grows; direct fine-tuning has {at['direct']:.1f}."
    )

    def reach(row: dict) -> str:
        tested = max(point["k"] for point in row["points"])
        if row["k_max"] >= tested:
            return f"over the whole window (k_max {row['k_max']})"
        if row["k_max"] > window:
            return f"beyond the original window, though not to the end (k_max {row['k_max']} of {tested})"
        return f"no further than the original window (k_max {row['k_max']} of {tested})"

    further = pi["k_max"] - direct["k_max"]
    verdict = "further than" if further > 0 else "less far than" if further < 0 else "as far as"
    second = (
        f"With no passkey beyond {window} tokens in the fine-tune, PI finds keys {reach(pi)} after {pi['steps']} "
        f"steps, {verdict} direct fine-tuning, which finds them {reach(direct)}."
    )
    return [first, second]


def as_table(rows: list[dict]) -> str:
    windows = list(rows[0]["ppl"])
    cells = [
        [row["name"], row["rope"], row["steps"], *(f"{row['ppl'][w]:.2f}" for w in windows), row["k_max"]]
        for row in rows
    ]
    return eval_ppl.table(["", "rope", "steps", *(f"ppl at {w}" for w in windows), "k_max"], cells)


def spread(runs: list[list[dict]]) -> str:
    """The table over seeds: mean and standard deviation, for each row."""

    def cell(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    cells = []
    for same in zip(*runs):
        ppl = [cell([row["ppl"][w] for row in same], 2) for w in same[0]["ppl"]]
        each = ", ".join(str(row["k_max"]) for row in same)
        cells.append(
            [same[0]["name"], same[0]["rope"], same[0]["steps"], *ppl, cell([row["k_max"] for row in same], 0), each]
        )
    windows = [f"ppl at {w}" for w in runs[0][0]["ppl"]]
    return eval_ppl.table(["", "rope", "steps", *windows, "k_max", "k_max of each seed"], cells)


def draw(rows: list[dict], window: int, file: Path) -> None:
    """Three panels: perplexity over the window, loss over the position, passkeys over the distance."""
    chosen = [("base, extrapolated", find(rows, "base")), ("PI, no fine-tuning", find(rows, "PI", 0))]
    for name in METHODS:
        if any(row["name"] == name and row["steps"] for row in rows):
            chosen.append((f"{name}, {find(rows, name)['steps']} steps", find(rows, name)))
    shared = [{"label": label, "original_window": window} for label, _ in chosen]
    figure, (left, middle, right) = eval_ppl.new_figure(3, 5.0)
    ppl = [
        s | {"windows": [{"window": int(w), "ppl": p} for w, p in row["ppl"].items()]}
        for s, (_, row) in zip(shared, chosen)
    ]
    eval_ppl.draw(left, ppl)
    eval_ppl.draw_positions(
        middle, [s | {"positions": {"nll": row["positions"]}} for s, (_, row) in zip(shared, chosen)]
    )
    passkey.draw_curves(
        right, [s | {"points": row["points"], "k_max": row["k_max"]} for s, (_, row) in zip(shared, chosen)]
    )
    eval_ppl.save_figure(figure, file)


def draw_steps(rows: list[dict], window: int, long: int, file: Path) -> None:
    """Two panels over fine-tuning steps, as the paper's tables 3 and 4: perplexity at the long window, and k_max."""
    figure, (left, right) = eval_ppl.new_figure(2, 5.0)
    curves = {
        name: {row["steps"]: row for row in rows if row["name"] == name or row["name"] == "base" and name == "direct"}
        for name in METHODS
    }
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    ppl = [(name, long, {n: row["ppl"][str(long)] for n, row in curve.items()}) for name, curve in curves.items()]
    reach = [(name, long, {n: row["k_max"] for n, row in curve.items()}) for name, curve in curves.items()]
    # in the colours of `draw`, where two other lines come first
    eval_ppl.draw_over_steps(left, ppl, first_style=2)
    passkey.draw_over_steps(right, reach, [{"original_window": window}], first_style=2)
    eval_ppl.save_figure(figure, file)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.perf_counter()
    out = Path(args.out)
    runs = []
    for seed in args.seeds:
        rows, config = run_seed(args, seed)
        runs.append(rows)
        window, long = config.original_window, checkpoint.extend(config, args.scale, "linear").block_size
        folder = out if seed == args.seeds[0] else out / f"seed-{seed}"
        draw(rows, window, folder / "demo.png")
        draw_steps(rows, window, long, folder / "demo_steps.png")
        sentences = summary(rows, window, long)
        checkpoint.write_json(folder / "demo.json", {
            "seed": seed, "window": window, "long": long, "rows": rows, "summary": sentences,
            "seconds": time.perf_counter() - started,
        })  # fmt: skip
        print(f"\nseed {seed}: window {window}, extended to {long}\n\n{as_table(rows)}\n")
        print("\n".join(sentences) + f"\n\n{folder / 'demo.json'}, {folder / 'demo.png'}, {folder / 'demo_steps.png'}")
    if len(runs) > 1:
        text = spread(runs)
        print(f"\nmean ± standard deviation over seeds {', '.join(map(str, args.seeds))}\n\n{text}")
        with checkpoint.replacing(out / "seeds.txt") as temporary:
            temporary.write_text(text + "\n")
    print(f"{time.perf_counter() - started:,.0f} s", file=sys.stderr)


if __name__ == "__main__":
    checkpoint.run(main)
