"""How far does it see: passkey retrieval and k_max, the effective window (the paper's §3.3).

Read sequences.py (the prompt) and eval_ppl.py (the command line) first. Then here: `k_max`, `retrieve`, `main`.

    python passkey.py --init out/linear-8                                   # at its window, the key at 32 distances
    python passkey.py --init out/base --scale 8                             # Position Interpolation, not fine-tuned
    python passkey.py --init out/none-8 out/linear-8                        # side by side
    python passkey.py --init out/linear-8/step-* out/none-8/step-*          # over fine-tuning steps: paper's table 4
    python passkey.py --init out/linear-8 --lengths 256,512,1024,2048       # a heat map, distance against length
    python passkey.py --init FOLDER --lengths 4096 --distances 8 --tries 2  # a look at a large model

A five-digit key is hidden in a text of filler and asked for at its end. k is the distance: tokens from the first of
the line with the key to the end of the prompt, i/32 of the window for i = 1 ... 32. Filler comes in whole sentences,
so the k that a prompt has is not quite the k that was asked for: the results give both, and k_max goes by the asked.
The prompt leaves room for the answer, so that both together stay within the window.
"""

import argparse
import re
import sys
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from eval_ppl import (
    BATCH_TOKENS, check_window, evaluation_parser, label, legend_below, lines_over_steps, mark_original, new_figure,
    open_checkpoint, over_steps, prepare, save_figure, style, table, table_over_steps, whole_numbers,
)  # fmt: skip
from model import LLaMA
from sequences import PasskeyPrompt, passkey_prompt, random_key
from tokenizer import Tokenizer

ANSWER_TOKENS = 10  # tokens that an answer may take: a space and five digits, in whatever tokens the vocabulary has
THRESHOLD = 0.2  # the success rate that counts as seeing

# ---- the measure -------------------------------------------------------------------------------------------------


def k_max(points: Sequence[dict]) -> int:
    """The paper's: the largest k such that every k' <= k has a success rate of at least 20%; 0 if the smallest fails.

    points: {"k", "success"} in any order. A k that was skipped is not among them, and stands in nobody's way.
    """
    best = 0
    for point in sorted(points, key=lambda point: point["k"]):
        if point["success"] < THRESHOLD:
            break
        best = point["k"]
    return best


def distances(length: int, n: int = 32) -> list[int]:
    """The k to test: i * length / n for i = 1 ... n."""
    return sorted({round(i * length / n) for i in range(1, n + 1)} - {0})


def is_right(answer: str, key: str) -> bool:
    """Whether the answer's first five digits are the key; white space may come before them, and nothing else."""
    found = re.match(r"\s*([0-9]{5})", answer)
    return found is not None and found[1] == key


@torch.inference_mode()
def answers(model: LLaMA, tokenizer: Tokenizer, prompts: torch.Tensor) -> list[str]:
    """What the model says, greedily, after each of the prompts (B, T): up to ANSWER_TOKENS tokens, as text."""
    new, texts = [], []
    for token in model.stream(prompts, ANSWER_TOKENS, eos_id=model.config.eos_id):
        new.append(token.tolist())
        texts = [tokenizer.decode(ids) for ids in zip(*new)]
        if not any(re.fullmatch(r"\s*[0-9]{0,4}", text) for text in texts):  # all have five digits, or never will
            break
    return texts


def retrieve(
    model: LLaMA, tokenizer: Tokenizer, length: int, ks: Sequence[int], tries: int = 10, seed: int = 0, *,
    batch_tokens: int = BATCH_TOKENS, desc: str = "",
) -> list[dict]:  # fmt: skip
    """Success by distance, a point for each k: [{"k", "success", "hits", "tries", "k_actual", "length"}, ...].

    length: tokens of prompt and answer together.  ks: distances of the key from the prompt's end, in tokens.
    tries: prompts for each k, each with a key of its own, from (seed, length, k): the same whatever else is tested.
    k_actual and length (of the prompt alone) are means over a point's prompts. A k below what the key's line and the
    question take is left out, and so is every k if the length has no room for a prompt. Prompts of equal length go
    through the model together.
    """
    prompts: list[tuple[int, PasskeyPrompt]] = []
    for k in ks:
        rng = np.random.default_rng([seed, length, k])
        made = [passkey_prompt(tokenizer, length - ANSWER_TOKENS, k, random_key(rng)) for _ in range(tries)]
        if None not in made:
            prompts += [(k, prompt) for prompt in made]
    hits = dict.fromkeys((k for k, _ in prompts), 0)
    device, left = model.embed_tokens.weight.device, sorted(prompts, key=lambda item: item[1].length)
    desc = desc or f"passkeys, length {length}"
    with tqdm(total=len(prompts), desc=desc, unit="prompt", leave=False, disable=not prompts) as bar:
        while left:
            size = left[0][1].length
            batch = [item for item in left[: max(1, batch_tokens // length)] if item[1].length == size]
            left = left[len(batch) :]
            texts = answers(model, tokenizer, torch.tensor([prompt.ids for _, prompt in batch], device=device))
            for (k, prompt), text in zip(batch, texts):
                hits[k] += is_right(text, prompt.key)
            bar.update(len(batch))

    points = []
    for k, found in hits.items():
        of = [prompt for asked, prompt in prompts if asked == k]
        means = {"k_actual": float(np.mean([p.k for p in of])), "length": float(np.mean([p.length for p in of]))}
        points.append({"k": k, "success": found / tries, "hits": found, "tries": tries, **means})
    return points


# ---- plots -------------------------------------------------------------------------------------------------------


def draw_curves(axis, results: list[dict]) -> None:
    """Success over distance, a line for each checkpoint, k_max in its legend and ringed."""
    for i, result in enumerate(results):
        points = result["points"]
        best = result["k_max"]
        axis.plot([p["k"] for p in points], [p["success"] for p in points],
                  label=f"{label(result)}: k_max {best:,}", **style(i) | dict(markersize=4.5))  # fmt: skip
        if best:
            axis.plot([p["k"] for p in points if p["k"] == best], [p["success"] for p in points if p["k"] == best],
                      "o", markersize=12, fillstyle="none", color=style(i)["color"], clip_on=False)  # fmt: skip
    mark_original(axis, results)
    axis.axhline(THRESHOLD, color="0.55", linewidth=1, zorder=0)
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0%", "20%", "40%", "60%", "80%", "100%"])
    axis.set(xlim=(0, None), ylim=(-0.04, 1.5), title="Passkey retrieval (ring: k_max)")
    axis.set(xlabel="k: tokens from the key to the prompt's end", ylabel="keys found")
    axis.grid(color="0.92")
    axis.legend(fontsize=8, loc="upper right")  # above the lines


def draw_over_steps(
    axis, rows: list[tuple[str, int, dict]], results: list[dict] = (), first_style: int = 0
) -> None:
    """k_max over fine-tuning steps, a line for each row of `over_steps`; a line at the original window of results."""
    lines_over_steps(axis, rows, "k_max", first_style)
    mark_original(axis, results, upright=False)
    longest = max(length for _, length, _ in rows)
    axis.set(ylim=(-0.02 * longest, 1.05 * longest), title="Passkey reach over steps (paper: table 4)")
    legend_below(axis)


def draw_heat_map(axis, result: dict):
    """Success by length (across) and distance (up), light where keys are found; the picture, for a colour bar.

    Lines across a column: k_max, whole, and the original window, dotted. Hatched: no such prompt.
    """
    runs, n = result["lengths"], result["distances"]
    grid = np.full((n, len(runs)), np.nan)
    for column, run in enumerate(runs):
        for p in run["points"]:
            grid[round(p["k"] * n / run["length"]) - 1, column] = p["success"]
    picture = axis.imshow(grid, cmap="Greys_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest", origin="lower",
                          extent=(-0.5, len(runs) - 0.5, 0.5 / n, 1 + 0.5 / n))  # fmt: skip
    axis.patch.set(facecolor="white", hatch="///", edgecolor="0.6")
    best = dict(color="#d55e00", linewidth=3, solid_capstyle="butt", clip_on=False)
    original = dict(color="#0072b2", linestyle=":", linewidth=2)
    for column, run in enumerate(runs):
        sides, length = [column - 0.5, column + 0.5], run["length"]
        if run["k_max"]:
            axis.plot(sides, [run["k_max"] / length + 0.5 / n] * 2, **best)  # the upper edge of its cell
        if result["original_window"] <= length:
            axis.plot(sides, [result["original_window"] / length] * 2, **original)
    axis.plot([], [], label="k_max", **best)
    axis.plot([], [], label="k = original window", **original)
    axis.set_xticks(range(len(runs)), [f"{run['length']:,}\n{run['k_max']:,}" for run in runs])
    axis.set_yticks([0.25, 0.5, 0.75, 1], ["25%", "50%", "75%", "100%"])
    axis.set(xlabel="length (prompt and answer, in tokens), and k_max", ylabel="k, in % of the length")
    axis.set_title(label(result), fontsize=10)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    return picture


# ---- main --------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--lengths", nargs="+", help="tokens of prompt and answer, as 512,1024; default: the window in force")
    add("--distances", type=int, default=32, help="values of k: i/N of the length for i = 1 ... N")
    add("--tries", type=int, default=10, help="prompts for each k, each with a new key")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    configs = prepare(args, "passkey")
    asked = whole_numbers(args.lengths, "--lengths", 1)
    for flag in ("distances", "tries"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    for name, config in zip(args.init, configs):
        for length in asked or []:
            check_window(name, config, length, "--lengths")

    results = []
    for name, config in zip(args.init, configs):
        model, tokenizer = open_checkpoint(args, name)
        runs = []
        for length in asked or [config.block_size]:
            ks = distances(length, args.distances)
            how = dict(batch_tokens=(args.batch_size or 0) * length or BATCH_TOKENS, desc=f"{name}, length {length}")
            points = retrieve(model, tokenizer, length, ks, args.tries, args.seed, **how)
            skipped = sorted(set(ks) - {point["k"] for point in points})
            if not points:
                raise ValueError(f"{name}: {length} tokens are too few for prompt and answer: give longer --lengths")
            if skipped:
                print(f"{name}, length {length}: k = {', '.join(map(str, skipped))} left out: the key's line and "
                      "the question alone take more", file=sys.stderr)  # fmt: skip
            runs.append({"length": length, "points": points, "k_max": k_max(points), "skipped": skipped})
        last = runs[-1]
        results.append({
            "init": name, "rope": config.rope, "scale": config.scale, "window": last["length"], "tries": args.tries,
            "points": last["points"], "k_max": last["k_max"], "skipped": last["skipped"],
            "original_window": config.original_window, "distances": args.distances, "seed": args.seed, "lengths": runs,
        })  # fmt: skip
        del model  # before the next one comes

    for result, steps in zip(results, args.steps):
        result["steps"] = steps
    rows = args.steps and over_steps(results, lambda r: {run["length"]: run["k_max"] for run in r["lengths"]})
    print(f"passkeys found, {args.tries} tries for each distance k; k_max is the largest k with 20% or more up to it")
    curves = all(len(result["lengths"]) == 1 for result in results)
    if curves and not args.steps:
        by_k = [{p["k"]: f"{p['success']:.0%}" for p in r["points"]} for r in results]
        ks = sorted({k for column in by_k for k in column})
        cells = [[k, *(column.get(k, "-") for column in by_k)] for k in ks]
        print(table(["k", *(f"{r['init']} ({r['rope']} {r['scale']:g})" for r in results)], cells) + "\n")
    if args.steps:
        print(table_over_steps(rows, "length"))
    else:
        print(table(["checkpoint", "rope", "scale", "original window", "length", "found", "k_max"], [
            [r["init"], r["rope"], f"{r['scale']:g}", r["original_window"], run["length"],
             f"{np.mean([p['success'] for p in run['points']]):.1%}", run["k_max"]]
            for r in results for run in r["lengths"]
        ]))  # fmt: skip
    checkpoint.write_json(args.json, results[0] if len(results) == 1 else results)
    if args.steps:
        figure, axes = new_figure(1)
        draw_over_steps(axes[0], rows, results)
    elif curves:
        figure, axes = new_figure(1, width=7.5)
        draw_curves(axes[0], results)
    else:
        figure, axes = new_figure(len(results), width=5.2)
        for axis, result in zip(axes, results):
            picture = draw_heat_map(axis, result)
        figure.colorbar(picture, ax=axes, label="keys found")
    save_figure(figure, args.plot)
    print(f"written: {args.json}, {args.plot}")


if __name__ == "__main__":
    checkpoint.run(main)
