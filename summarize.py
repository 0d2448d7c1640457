"""Are long documents summarised well: GovReport-style summaries, scored by ROUGE (the paper's §3.5).

Read sequences.py (the prompt, at its end) and eval_ppl.py (the command line) first. Then here: `write` (generation),
`summarize` (what is kept, and how a run resumes), `intervals`, `main`.

    python train.py --init out/linear-8 --data reports.jsonl --summary_field summary --out out/reports   # first learn
    python summarize.py --init out/reports --data reports.jsonl             # its rows have `document` and `summary`
    python summarize.py --init FOLDER --document_field report --data hf:ccdv/govreport-summarization,split=test
    python summarize.py --init FOLDER --data reports.jsonl --max_documents 20 --temperature 0       # a quick look

Each document is cut to its first --max_input tokens and put into the prompt of the training. The texts go to OUT as
they are made, and a run that was interrupted goes on where it stopped. Every document is drawn by a generator of its
own, seeded by --seed and its number: which others are in its batch makes no difference but for rounding.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import data
import sequences
from eval_ppl import BATCH_TOKENS, Parser, check_window, open_checkpoint, prepare, results_folder, table
from model import KVCache, LLaMA, LLaMAConfig, sample
from tokenizer import Tokenizer

PAPER = ["the paper's figure: LLaMA 7B to 16384, GovReport", "linear", "8", "972"]
PAPER_ROUGE = {"rouge1": "60.0", "rouge2": "28.0", "rougeL": "29.5"}

# ---- the texts ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def write(
    model: LLaMA, prompts: torch.Tensor, seeds: Sequence[int], max_new_tokens: int, temperature: float, top_p: float,
    stop: set[int],
) -> list[list[int]]:  # fmt: skip
    """What follows each of the prompts (B, T): up to max_new_tokens tokens, without the one of `stop` that ends them.

    Row i is drawn with seeds[i]. model.stream has one generator for a batch, whose draws depend on the other rows.
    """
    device, ids = prompts.device, prompts
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    cache = KVCache(model.config, len(ids), ids.size(1) + max_new_tokens, device, model.lm_head.weight.dtype)
    texts: list[list[int]] = [[] for _ in seeds]
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(ids, cache, last=True)[:, 0]).float()
        drawn = [sample(row[None], temperature, top_p, g) for row, g in zip(logits, generators)]
        ids = torch.stack(drawn)  # (B, 1)
        for text, token in zip(texts, ids.flatten().tolist()):
            if not text or text[-1] not in stop:
                text.append(token)
        if all(text[-1] in stop for text in texts):
            break
    return [text[:-1] if text[-1] in stop else text for text in texts]


def batches(prompts: dict[int, list[int]], batch_size: int | None, max_new_tokens: int) -> list[list[int]]:
    """The numbers of the documents that go through the model together: those whose prompts are equally long, so that
    there is no padding. Documents cut at max_input are. The longest first: if memory is short, it shows at once."""
    made = []
    for length, group in groupby(sorted(prompts, key=lambda i: -len(prompts[i])), key=lambda i: len(prompts[i])):
        size = batch_size or max(1, BATCH_TOKENS // (length + max_new_tokens))
        numbers = list(group)
        made += [numbers[i : i + size] for i in range(0, len(numbers), size)]
    return made


def fingerprint(model: LLaMA, *settings: object) -> str:
    """A hash of all that decides what the texts are: some of each of the weights, and the settings."""
    digest = hashlib.sha256(repr((asdict(model.config), *settings)).encode("utf-8"))
    for weight in model.parameters():
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def kept_texts(path: Path, settings: str, overwrite: bool) -> dict[int, dict]:
    """The lines that an earlier run left in path, by number of document; the file then holds these and no half line.
    ValueError if it holds anything else."""
    kept, begin = {}, '{"index": '
    if path.is_file() and not overwrite:
        *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
        try:
            records = [json.loads(line) for line in lines]
            kept = {record["index"]: record for record in records}
            same = all(record["settings"] == settings for record in records)
        except (ValueError, TypeError, KeyError):
            same = False
        if not same or torn[: len(begin)] != begin[: len(torn)]:
            raise ValueError(f"{path} was not made with this checkpoint, these --data and settings: give another "
                             "--out, or --overwrite")  # fmt: skip
    with checkpoint.replacing(path) as temporary:
        temporary.write_text("".join(map(line_of, kept.values())), encoding="utf-8")
    return kept


def line_of(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def summarize(
    model: LLaMA, tokenizer: Tokenizer, reports: Sequence[tuple[str, str]], numbers: Sequence[int], max_input: int,
    args: argparse.Namespace, path: Path, desc: str,
) -> list[dict]:  # fmt: skip
    """The lines of path for these numbers of the reports, those that aren't there made now: {"index", "document"
    (how it begins), "summary", "reference", "settings"}. Each batch is on the disk before the next one begins."""
    how = (args.max_new_tokens, args.temperature, args.top_p)
    what = (max_input, args.seed, tokenizer.fingerprint, sequences.REPORT_PROMPT, reports)
    settings = fingerprint(model, *how, *what)
    kept = kept_texts(path, settings, args.overwrite)
    prompts = {i: sequences.report_prompt(tokenizer, reports[i][0], max_input) for i in numbers}
    eos = tokenizer.eos_id if model.config.eos_id is None else model.config.eos_id
    stop = set(eos) if isinstance(eos, tuple) else {eos}
    device = model.embed_tokens.weight.device
    missing = sum(i not in kept for i in numbers)
    with tqdm(total=len(numbers), initial=len(numbers) - missing, desc=desc, unit="document") as bar:
        # batches are of all documents, done or not, so that a resumed run rounds as the whole one does
        for batch in batches(prompts, args.batch_size, args.max_new_tokens):
            new = [i for i in batch if i not in kept]
            if not new:
                continue
            seeds = [int(np.random.SeedSequence([args.seed, i]).generate_state(1, np.uint64)[0]) for i in batch]
            texts = write(model, torch.tensor([prompts[i] for i in batch], device=device), seeds, *how, stop)
            for i, ids in zip(batch, texts):
                if i in new:
                    (document, reference), text = reports[i], tokenizer.decode(ids).strip()
                    line = {"index": i, "document": document.strip()[:80], "summary": text, "reference": reference}
                    kept[i] = line | {"settings": settings}
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(line_of(kept[i]) for i in new)
            bar.update(len(new))
    return [kept[i] for i in numbers]


# ---- the measure -------------------------------------------------------------------------------------------------


def intervals(scores: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """95% bootstrap intervals of the mean over documents: scores (n, k) -> (2, k), lower and upper ends."""
    rng, n = np.random.default_rng(seed), len(scores)
    means = [scores[rng.integers(n, size=n)].mean(axis=0) for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5], axis=0)


def rouge(lines: Sequence[dict], kinds: Sequence[str], seed: int, desc: str) -> dict[str, dict]:
    """{kind: {"f", "low", "high"}}: mean F-measures in percent and their intervals, None for a single document."""
    scorer = rouge_scorer().RougeScorer(list(kinds), use_stemmer=True)
    rows = []
    for line in tqdm(lines, desc=desc, unit="document", leave=False):
        found = scorer.score(line["reference"], line["summary"])
        rows.append([100 * found[kind].fmeasure for kind in kinds])
    scores = np.array(rows)
    low, high = intervals(scores, seed).tolist() if len(rows) > 1 else [[None] * len(kinds)] * 2
    return {k: {"f": f, "low": a, "high": b} for k, f, a, b in zip(kinds, scores.mean(axis=0).tolist(), low, high)}


def rouge_scorer():
    return data.optional("rouge_score.rouge_scorer", "summaries", "ROUGE")


# ---- main --------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    checkpoint.add_model_flags(parser)
    parser.set_defaults(plot=None)
    add = parser.add_argument
    add("--data", nargs="+", required=True, help=".jsonl or .parquet files, folders of them, or hub data sets hf:...")
    add("--document_field", default="document", help="the name that --data has for documents")
    add("--summary_field", default="summary", help="the name that --data has for summaries")
    add("--max_input", type=int, help="cut each document to its first N tokens; default: what prompt and "
        f"--max_new_tokens leave of the window, at most {sequences.PAPER_INPUT}")  # fmt: skip
    add("--max_new_tokens", type=int, default=1000, help="tokens of a summary at most")
    add("--temperature", type=float, default=0.5, help="0: always the likeliest token; 1: drawn as the model says")
    add("--top_p", type=float, default=0.95, help="draw among the likeliest tokens that make up this probability")
    add("--max_documents", type=int, help="take N documents, drawn by --seed")
    add("--batch_size", type=int, help=f"documents at a time; default: as many as make {BATCH_TOKENS} tokens")
    place = "default: in the checkpoint's folder (out/NAME for one from the hub)"
    add("--out", help=f"the texts, .jsonl, where a rerun goes on; {place}, summaries.jsonl")
    add("--overwrite", action="store_true", help="write all texts anew")
    add("--json", help=f"the results; {place}, or beside the first of several")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what can't be run."""
    for flag in ("max_input", "max_new_tokens", "max_documents"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be at least 0, --top_p above 0 and at most 1")
    if args.out and len(args.init) > 1:
        raise ValueError("--out takes the texts of one checkpoint, --init names several: leave --out away")


def input_tokens(name: str, config: LLaMAConfig, args: argparse.Namespace) -> int:
    """Tokens that a document is cut to. ValueError if they don't fit the window with the prompt and the summary."""
    rest = sequences.report_frame_tokens(checkpoint.load_tokenizer(name, config)) + args.max_new_tokens
    max_input = args.max_input or min(sequences.PAPER_INPUT, max(1, config.block_size - rest))
    check_window(name, config, max_input + rest, "document, prompt and --max_new_tokens:")
    return max_input


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    configs = prepare(args, "rouge")
    check(args)
    rouge_scorer()  # missing: said before hours of work
    inputs = [input_tokens(name, config, args) for name, config in zip(args.init, configs)]
    reports = data.read_reports(args.data, args.document_field, args.summary_field)
    numbers = list(range(len(reports)))
    if args.max_documents is not None and args.max_documents < len(numbers):
        numbers = sorted(random.Random(args.seed).sample(numbers, args.max_documents))
    # ROUGE-L reads a text as one sentence; ROUGE-Lsum takes its lines for sentences, and says nothing new without any
    lines = any("\n" in reports[i][1].strip() for i in numbers)
    kinds = ["rouge1", "rouge2", "rougeL", *["rougeLsum"] * lines]

    results = []
    for name, max_input in zip(args.init, inputs):
        path = Path(args.out or results_folder(name) / "summaries.jsonl")
        model, tokenizer = open_checkpoint(args, name)
        model.lay_out_for_decoding()
        texts = summarize(model, tokenizer, reports, numbers, max_input, args, path, desc=name)
        config = model.config
        results.append({
            "init": name, "rope": config.rope, "scale": config.scale, "original_window": config.original_window,
            "data": data.corpus_name(args.data), "documents": len(numbers), "max_input": max_input,
            "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
            "seed": args.seed, "texts": str(path), "rouge": rouge(texts, kinds, args.seed, f"{name}, ROUGE"),
        })  # fmt: skip
        del model  # before the next one comes

    def cell(score: dict) -> str:
        return f"{score['f']:.1f}" + ("" if score["low"] is None else f" [{score['low']:.1f}, {score['high']:.1f}]")

    drawn = f"{len(numbers)} of {len(reports)}" if args.max_documents else len(numbers)
    cut = ", ".join(map(str, sorted(set(inputs))))
    print(f"ROUGE F-measures in percent (rouge-score, stemmed): {data.corpus_name(args.data)}, "
          f"{drawn} documents cut to {cut} tokens")  # fmt: skip
    header = ["checkpoint", "rope", "scale", "documents", *(kind.replace("rouge", "ROUGE-") for kind in kinds)]
    rows = [
        [r["init"], r["rope"], f"{r['scale']:g}", r["documents"], *map(cell, r["rouge"].values())] for r in results
    ]
    print(table(header, [*rows, [*PAPER, *(PAPER_ROUGE.get(kind, "-") for kind in kinds)]]))
    if len(numbers) > 1:
        print("[ ]: 95% bootstrap interval over documents")
    checkpoint.write_json(args.json, results[0] if len(results) == 1 else results)
    print(f"written: {args.json}, {', '.join(r['texts'] for r in results)}")


if __name__ == "__main__":
    checkpoint.run(main)
