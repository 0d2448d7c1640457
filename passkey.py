"""How far does a model see: passkey retrieval and k_max, the effective window (the paper's §3.3).

    python passkey.py --init out/linear-8                       # the key at 32 distances
    python passkey.py --init out/base --scale 8                 # interpolated, not fine-tuned
    python passkey.py --init out/none-8 out/linear-8            # side by side
    python passkey.py --init out/linear-8/step-*                # over fine-tuning steps: table 4
    python passkey.py --init out/linear-8 --lengths 256,512,1024,2048           # a heat map
    python passkey.py --init FOLDER --lengths 4096 --distances 8 --tries 2      # a quick look

A five-digit key is hidden in a text of filler and asked for at its end:

    There is an important info hidden inside a lot of irrelevant text. Find it and ...
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ...
    The pass key is 12345. Remember it. 12345 is the pass key.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ...
    What is the pass key? The pass key is

The distance k is the number of tokens from the first token of the key's line to the end of the
prompt. We request k = i/32 of the window for i = 1 ... 32. The actual k of a prompt is the nearest
one that is possible: filler comes in whole sentences, the first line comes before the key, and the
window must hold the answer too. So in a small window several of the largest k may be the same
prompt. The results have both numbers (k and k_actual); k_max goes by the requested k, as in the
paper.
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import end_ids
from cli import WholeNumbers, at_least, run, write_json
from evaluation import (
    BATCH_TOKENS, batch_tokens, batches_of_equal_length, check_window, choose_outputs,
    evaluation_parser, model_facts, one_or_all, open_checkpoint, read_configs
)
from model import LLaMA
from prompts import PasskeyPrompt, passkey_prompt, random_key
from results import draw_passkey_results, passkey_tables
from tokenizer import Tokenizer

ANSWER_TOKENS = 10  # room for a space and five digits, in whatever tokens the vocabulary has
THRESHOLD = 0.2  # the success rate from which a distance counts as seen (§3.3)

# ---- the measure ---------------------------------------------------------------------------------


def k_max(points: Sequence[dict]) -> int:
    """The largest k such that every k' <= k has a success rate of at least THRESHOLD; 0 if none.

    points: {"k", "success"} in any order. A k that was not tested does not count against it.
    """
    largest = 0
    for point in sorted(points, key=lambda point: point["k"]):
        if point["success"] < THRESHOLD:
            break
        largest = point["k"]
    return largest


class Share(NamedTuple):
    """The share of keys that were found, and its 95% interval, each from 0 to 1."""

    found: float
    low: float
    high: float


def share_found(points: Sequence[dict], beyond: float) -> Share | None:
    """The share of keys found at the distances k > beyond; None if none was tested.

    points: {"k", "hits", "tries"}. Unlike k_max it does not hang on a single distance. The interval
    is Wilson's for a share of hits among independent tries.
    """
    far = [point for point in points if point["k"] > beyond]
    if not far:
        return None
    hits = sum(point["hits"] for point in far)
    tries = sum(point["tries"] for point in far)
    share = hits / tries
    z = 1.96  # standard deviations: 95% of a normal distribution lie within
    middle = (share + z**2 / (2 * tries)) / (1 + z**2 / tries)
    spread = math.sqrt(share * (1 - share) / tries + z**2 / (4 * tries**2))
    spread *= z / (1 + z**2 / tries)
    return Share(share, max(0.0, middle - spread), min(1.0, middle + spread))


def distances(length: int, n: int = 32) -> list[int]:
    """The distances k to test: i * length / n for i = 1 ... n, each once and none of them 0."""
    return sorted({round(i * length / n) for i in range(1, n + 1)} - {0})


def retrieve(
    model: LLaMA, tokenizer: Tokenizer, length: int, ks: Sequence[int], tries: int = 10,
    seed: int = 0, *, batch_tokens: int = BATCH_TOKENS, desc: str = ""
) -> list[dict]:
    """Success by distance: {"k", "success", "hits", "tries", "k_actual", "length"} for each k.

    length: tokens of prompt and answer together.
    ks: distances from the key to the prompt's end, in tokens.
    tries: prompts for each k, each with a new random key.

    The keys depend on (seed, length, k) alone, so they are the same whatever else is tested.
    k_actual and length (of the prompt alone) are means over the prompts. A k that is below what the
    key's line and the question take is left out, and so is every k if the length has no room for a
    prompt.
    """
    # Make the prompts of each k, from a seed of their own
    prompts = {}
    for k in ks:
        made = prompts_at(
            tokenizer, length - ANSWER_TOKENS, k, tries, np.random.default_rng([seed, length, k])
        )
        if made is not None:
            prompts[k] = made

    # Ask the model; prompts of equal length go through it together
    questions = [(k, prompt) for k, made in prompts.items() for prompt in made]
    hits = dict.fromkeys(prompts, 0)
    device = model.embed_tokens.weight.device
    desc = desc or f"passkeys, length {length}"
    total = len(questions)
    with tqdm(total=total, desc=desc, unit="prompt", leave=False, disable=total == 0) as bar:
        for batch in batches_of_equal_length(questions, lambda item: item[1].length, batch_tokens):
            ids = torch.tensor([prompt.ids for _, prompt in batch], device=device)  # (B, T)
            texts = answers(model, tokenizer, ids)
            for (k, prompt), text in zip(batch, texts):
                if is_right(text, prompt.key):
                    hits[k] += 1
            bar.update(len(batch))

    # Sum up each k
    points = []
    for k, made in prompts.items():
        points.append(
            {
                "k": k,
                "success": hits[k] / tries,
                "hits": hits[k],
                "tries": tries,
                "k_actual": float(np.mean([prompt.k for prompt in made])),
                "length": float(np.mean([prompt.length for prompt in made])),
            }
        )
    return points


def prompts_at(
    tokenizer: Tokenizer, length: int, k: int, tries: int, rng: np.random.Generator
) -> list[PasskeyPrompt] | None:
    """Prompts of up to `length` tokens, their keys at distance k; None where there is no room."""
    prompts = []
    for _ in range(tries):
        prompt = passkey_prompt(tokenizer, length, k, random_key(rng))
        if prompt is None:
            return None
        prompts.append(prompt)
    return prompts


@torch.inference_mode()
def answers(model: LLaMA, tokenizer: Tokenizer, prompts: torch.Tensor) -> list[str]:
    """What the model says greedily after each of the prompts (B, T): up to ANSWER_TOKENS tokens."""
    ids: list[list[int]] = [[] for _ in prompts]  # the tokens of each answer so far
    texts = [""] * len(prompts)
    eos_id = end_ids(model.config, tokenizer)
    for tokens in model.stream(prompts, ANSWER_TOKENS, eos_id=eos_id):
        for row, token in zip(ids, tokens.tolist()):
            row.append(token)
        texts = [tokenizer.decode(row) for row in ids]
        # An answer is open while it has nothing but white space and up to four digits
        still_open = any(re.fullmatch(r"\s*[0-9]{0,4}", text) for text in texts)
        if not still_open:
            break
    return texts


def is_right(answer: str, key: str) -> bool:
    """Whether the answer begins with the key; only white space may come before it."""
    found = re.match(r"\s*([0-9]{5})", answer)
    return found is not None and found[1] == key


# ---- the command line ----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--lengths", nargs="+", action=WholeNumbers, const=1,
        help="tokens of prompt and answer, as 512,1024; default: the window in force")
    add("--distances", type=at_least(1), default=32,
        help="values of k: i/N of the length for i = 1 ... N")
    add("--tries", type=at_least(1), default=10, help="prompts for each k, each with a new key")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace, name: str) -> dict:
    """The result of one checkpoint, as it goes into the JSON file."""
    model, tokenizer = open_checkpoint(args, name)
    config = model.config
    runs = []
    for length in args.lengths or [config.block_size]:
        ks = distances(length, args.distances)
        points = retrieve(
            model, tokenizer, length, ks, args.tries, args.seed,
            batch_tokens=batch_tokens(args, length), desc=f"{name}, length {length}"
        )
        if not points:
            raise ValueError(
                f"{name}: {length} tokens are too few for prompt and answer: give longer --lengths"
            )
        # Say which distances are too short to be tested
        skipped = sorted(set(ks) - {point["k"] for point in points})
        if skipped:
            print(
                f"{name}, length {length}: k = {', '.join(map(str, skipped))} left out: "
                "the key's line and the question alone take more", file=sys.stderr
            )
        run = {"length": length, "points": points, "k_max": k_max(points), "skipped": skipped}
        beyond = share_found(points, config.original_window)
        if beyond is not None:
            run["beyond"] = beyond._asdict()
        runs.append(run)
    last = runs[-1]  # the longest; its numbers stand at the top level too
    result = model_facts(args, name, config)
    result |= {
        "window": last["length"],
        "tries": args.tries,
        "points": last["points"],
        "k_max": last["k_max"],
        "skipped": last["skipped"],
        "distances": args.distances,
        "seed": args.seed,
        "lengths": runs,
    }
    return result


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    # Refuse what can't be done before the work begins
    steps = choose_outputs(args, "passkey")
    for name, config in zip(args.init, read_configs(args)):
        for length in args.lengths or []:
            check_window(name, config, length, "--lengths")

    # Evaluate one checkpoint after the other, so that one model at a time is in memory
    results = []
    for i, name in enumerate(args.init):
        result = evaluate(args, name)
        if steps:
            result["steps"] = steps[i]
        results.append(result)

    # Print tables, and write JSON and a picture
    print(
        f"passkeys found, {args.tries} tries for each distance k; "
        f"k_max is the largest k such that this and all smaller k have {THRESHOLD:.0%} or more"
    )
    print(passkey_tables(results, over_steps=bool(steps)))
    write_json(args.json, one_or_all(results))
    draw_passkey_results(results, bool(steps), THRESHOLD, args.plot)
    print(f"written: {args.json}, {args.plot}")


if __name__ == "__main__":
    run(main)
