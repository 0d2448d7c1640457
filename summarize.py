"""Write summaries of long documents and score them by ROUGE, as the paper does on GovReport.

This is section 3.5 of the paper. First train on reports and their summaries, then summarize:

    python train.py --init out/linear-8 --data reports.jsonl --summary_field summary --out out/gov
    python summarize.py --init out/gov --data reports.jsonl
    python summarize.py --init out/gov --data hf:ccdv/govreport-summarization,split=test \\
        --document_field report
    python summarize.py --init out/gov --data reports.jsonl --max_documents 20 --temperature 0

Each document is cut to its first --max_input tokens and put into the prompt of the training. The
summaries go to the file --out as they are made. The same command goes on with an interrupted run:
it makes only the summaries that the file lacks.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import cli
import data
import evaluation
from model import LLaMA, LLaMAConfig
from prompts import PAPER_INPUT, REPORT_PROMPT, report_frame_tokens, report_prompt
from tokenizer import Tokenizer

# The paper's result (table 6) as a row of our table: checkpoint, method, scale, documents, scores
PAPER = ["the paper's figure: LLaMA 7B to 16384, GovReport", "PI", "8", "972"]
PAPER_ROUGE = {"rouge1": "60.0", "rouge2": "28.0", "rougeL": "29.5"}


class Settings(NamedTuple):
    """What decides the summaries, beside the checkpoint and the data."""

    max_input: int  # tokens that a document is cut to
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


# ---- the summaries -------------------------------------------------------------------------------


def write(
    model: LLaMA, tokenizer: Tokenizer, prompts: torch.Tensor, numbers: list[int],
    settings: Settings
) -> list[str]:
    """The text that follows each of the prompts (B, T); row i is for document numbers[i].

    A text is drawn with a seed made of --seed and the document's number, so that it does not depend
    on the rest of the batch.
    """
    generators = []
    for number in numbers:
        seed = np.random.SeedSequence([settings.seed, number]).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator(prompts.device).manual_seed(int(seed)))
    eos_id = checkpoint.end_ids(model.config, tokenizer)
    ids = model.generate(
        prompts,
        settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        eos_id=eos_id,
        generator=generators,
    )  # (B, T + n)

    # A text ends before its first end token. After that, its row is filled with end tokens.
    ends = checkpoint.id_list(eos_id)
    texts = []
    for row in ids[:, prompts.size(1) :].tolist():
        tokens = list(takewhile(lambda token: token not in ends, row))
        texts.append(tokenizer.decode(tokens).strip())
    return texts


def summarize(
    model: LLaMA, tokenizer: Tokenizer, reports: Sequence[tuple[str, str]], numbers: Sequence[int],
    settings: Settings, path: Path, batch_size: int | None = None
) -> list[dict]:
    """The summaries of the documents `numbers`; those that the file lacks are made and added to it.

    reports: all documents, each with its reference summary.
    path: a file of JSON objects, one a line, as made at the end of this function.
    batch_size: of the longest documents, so many at a time; None: as many as make BATCH_TOKENS.
    Raises ValueError if the file was made with other settings.
    """
    # Keep the finished lines. Writing them back removes a line that was interrupted, and shows
    # before hours of work whether the file can be written.
    settings_hash = fingerprint(model, settings, tokenizer.fingerprint, REPORT_PROMPT, reports)
    lines = finished_lines(path, settings_hash)
    with cli.replacing(path) as temporary:
        temporary.write_text("".join(map(json_line, lines.values())), encoding="utf-8")

    # Put the missing documents into batches. The longest come first, so that the run fails at once
    # if there is too little memory.
    prompts = {}
    for number in numbers:
        if number not in lines:
            prompts[number] = report_prompt(tokenizer, reports[number][0], settings.max_input)
    # The length of a document is that of its prompt and its summary together
    lengths = {number: len(ids) + settings.max_new_tokens for number, ids in prompts.items()}
    batch_tokens = evaluation.BATCH_TOKENS
    if batch_size is not None:
        batch_tokens = batch_size * max(lengths.values(), default=0)
    batches = list(evaluation.batches_of_equal_length(list(lengths), lengths.get, batch_tokens))
    batches.reverse()

    # Write the summaries. Those of a batch are on disk before the next batch begins.
    device = model.embed_tokens.weight.device
    finished = len(numbers) - len(prompts)
    with tqdm(total=len(numbers), initial=finished, desc=str(path), unit="document") as bar:
        for batch in batches:
            ids = torch.tensor([prompts[number] for number in batch], device=device)  # (B, T)
            texts = write(model, tokenizer, ids, batch, settings)
            with open(path, "a", encoding="utf-8") as file:
                for number, text in zip(batch, texts):
                    document, reference = reports[number]
                    lines[number] = {
                        "index": number,
                        "document": document.strip()[:80],  # so that people recognize it
                        "summary": text,
                        "reference": reference,
                        "settings": settings_hash,
                    }
                    file.write(json_line(lines[number]))
            bar.update(len(batch))
    return [lines[number] for number in numbers]


# ---- the file of summaries -----------------------------------------------------------------------

LINE_START = '{"index": '  # of every line


def json_line(line: dict) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def fingerprint(model: LLaMA, *settings: object) -> str:
    """A hash of the settings, of the model's config and of the first values of each weight."""
    digest = hashlib.sha256(repr((asdict(model.config), *settings)).encode("utf-8"))
    for weight in model.parameters():
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def finished_lines(path: Path, settings_hash: str) -> dict[int, dict]:
    """The whole lines of the file by number of document; none if there is no file.

    Raises ValueError if the file was made with other settings, or is no file of summaries.
    """
    if not path.is_file():
        return {}
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rest = texts.pop()  # empty, or the beginning of a line that was interrupted
    lines = {}
    try:
        for text in texts:
            line = json.loads(text)
            lines[line["index"]] = line
        same = all(line["settings"] == settings_hash for line in lines.values())
    except (ValueError, TypeError, KeyError):
        same = False  # the file holds something else than our lines
    if not same or not LINE_START.startswith(rest[: len(LINE_START)]):
        raise ValueError(
            f"{path} was not made with this checkpoint, these --data and settings: "
            "give another --out, or --overwrite"
        )
    return lines


# ---- ROUGE ---------------------------------------------------------------------------------------


def load_rouge() -> ModuleType:
    """The module that scores. Raises ValueError if it is not installed."""
    return cli.import_extra("rouge_score.rouge_scorer", "summaries", "ROUGE")


def rouge_kinds(references: Sequence[str]) -> list[str]:
    """The kinds of ROUGE to compute.

    ROUGE-L takes a text as one sentence, ROUGE-Lsum each of its lines. They differ only where a
    text has several lines.
    """
    kinds = ["rouge1", "rouge2", "rougeL"]
    if any("\n" in reference.strip() for reference in references):
        kinds.append("rougeLsum")
    return kinds


def rouge(lines: Sequence[dict], kinds: Sequence[str], seed: int, desc: str) -> dict[str, dict]:
    """F-measures in percent: {kind: {"f": the mean over documents, "low", "high": its interval}}.

    For a single document low and high are None.
    """
    scorer = load_rouge().RougeScorer(list(kinds), use_stemmer=True)
    rows = []
    for line in tqdm(lines, desc=desc, unit="document", leave=False):
        scores_by_kind = scorer.score(line["reference"], line["summary"])
        rows.append([100 * scores_by_kind[kind].fmeasure for kind in kinds])
    scores = np.array(rows)  # (documents, kinds)

    means = scores.mean(axis=0).tolist()
    results = {kind: {"f": mean, "low": None, "high": None} for kind, mean in zip(kinds, means)}
    if len(rows) > 1:
        low, high = intervals(scores, seed).tolist()
        for column, kind in enumerate(kinds):
            results[kind]["low"] = low[column]
            results[kind]["high"] = high[column]
    return results


def intervals(scores: np.ndarray, seed: int, resamples: int = 1000) -> np.ndarray:
    """95% bootstrap intervals of the mean over documents: (n, k) -> (2, k), low and high ends."""
    # rouge_score has a BootstrapAggregator, but it draws from NumPy's global random state, and
    # seeding that would change the draws of all other code that uses it.
    rng = np.random.default_rng(seed)
    n = len(scores)
    means = [scores[rng.integers(n, size=n)].mean(axis=0) for _ in range(resamples)]
    return np.percentile(means, [2.5, 97.5], axis=0)


# ---- the command line ----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation.evaluation_parser(__doc__, plot=False)
    add = parser.add_argument
    add("--data", nargs="+", required=True, type=cli.data_path,
        help=".jsonl or .parquet files, folders of them, or hub data sets hf:...")
    add("--document_field", default="document", help="the field of --data with the documents")
    add("--summary_field", default="summary", help="the field of --data with the summaries")
    add("--max_input", type=cli.at_least(1),
        help="cut each document to its first N tokens; default: what prompt and --max_new_tokens "
        f"leave of the window, at most {PAPER_INPUT}")
    add("--max_new_tokens", type=cli.at_least(1), default=1000, help="write at most N tokens")
    add("--temperature", type=cli.at_least(0.0), default=0.5,
        help="0: always the likeliest token; 1: drawn as the model says")
    add("--top_p", type=cli.fraction, default=0.95,
        help="draw among the likeliest tokens that make up this probability")
    add("--max_documents", type=cli.at_least(1), help="take N documents, drawn by --seed")
    add("--out", type=cli.file_name(".jsonl"),
        help="the summaries, where an interrupted run goes on; default: summaries.jsonl in the "
        "checkpoint's folder (out/NAME for one from the hub)")
    add("--overwrite", action="store_true", help="make all summaries anew")
    args = parser.parse_args(argv)
    if args.out and len(args.init) > 1:
        raise ValueError("--out is for one checkpoint, --init names several: leave --out away")
    return args


def input_tokens(name: str, config: LLaMAConfig, args: argparse.Namespace) -> int:
    """Tokens that a document is cut to. Raises ValueError if they don't fit into the window."""
    tokenizer = checkpoint.load_tokenizer(name, config)
    other_tokens = report_frame_tokens(tokenizer) + args.max_new_tokens
    max_input = args.max_input
    if max_input is None:
        max_input = min(PAPER_INPUT, max(1, config.block_size - other_tokens))
    parts = "document, prompt and --max_new_tokens:"
    evaluation.check_window(name, config, max_input + other_tokens, parts)
    return max_input


def results_table(results: Sequence[dict], kinds: Sequence[str]) -> str:
    """A row for each checkpoint and one for the paper."""
    header = ["checkpoint", "method", "scale", "documents"]
    header += [kind.replace("rouge", "ROUGE-") for kind in kinds]
    rows = []
    for result in results:
        row = [result["init"], result["method"], f"{result['scale']:g}", result["documents"]]
        for score in result["rouge"].values():
            cell = f"{score['f']:.1f}"
            if score["low"] is not None:
                cell += f" [{score['low']:.1f}, {score['high']:.1f}]"
            row.append(cell)
        rows.append(row)
    rows.append(PAPER + [PAPER_ROUGE.get(kind, "-") for kind in kinds])
    return cli.text_table(header, rows)


def main(argv: list[str] | None = None) -> None:
    # Find wrong flags and missing libraries before the work begins
    args = parse(argv)
    evaluation.choose_outputs(args, "rouge")
    configs = evaluation.read_configs(args)
    load_rouge()
    inputs = [input_tokens(name, config, args) for name, config in zip(args.init, configs)]

    # Draw the documents to summarize
    corpus = data.corpus_name(args.data)
    reports = data.read_reports(args.data, args.document_field, args.summary_field)
    numbers = list(range(len(reports)))
    documents = f"{len(reports)} documents"
    if args.max_documents is not None:
        count = min(args.max_documents, len(reports))
        numbers = sorted(random.Random(args.seed).sample(numbers, count))
        documents = f"{count} of {documents}"
    kinds = rouge_kinds([reports[number][1] for number in numbers])

    # Summarize and score with each checkpoint
    results = []
    for name, max_input in zip(args.init, inputs):
        settings = Settings(max_input, args.max_new_tokens, args.temperature, args.top_p, args.seed)
        path = args.out or evaluation.results_folder(name) / "summaries.jsonl"
        model, tokenizer = evaluation.open_checkpoint(args, name)
        model.lay_out_for_decoding()
        if args.overwrite:
            path.unlink(missing_ok=True)
        lines = summarize(model, tokenizer, reports, numbers, settings, path, args.batch_size)
        result = evaluation.model_facts(args, name, model.config)
        result |= {"data": corpus, "documents": len(numbers)}
        result |= settings._asdict()
        result["texts"] = str(path)
        result["rouge"] = rouge(lines, kinds, args.seed, f"{name}, ROUGE")
        results.append(result)
        del model  # frees its memory for the next one

    # Print and write what came out
    cuts = ", ".join(str(max_input) for max_input in sorted(set(inputs)))
    print(f"ROUGE F-measures in percent (rouge-score, stemmed): {corpus}, {documents}", end=" ")
    print(f"cut to {cuts} tokens")
    print(results_table(results, kinds))
    if len(numbers) > 1:
        print("[ ]: 95% bootstrap interval over documents")
    cli.write_json(args.json, evaluation.one_or_all(results))
    texts = ", ".join(result["texts"] for result in results)
    print(f"written: {args.json}, {texts}")


if __name__ == "__main__":
    cli.run(main)
