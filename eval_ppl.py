"""How well does a model read: sliding-window perplexity at any list of windows (the paper's §3.2).

    python eval_ppl.py --init out/linear-8               # at the original window, twice that, ...
    python eval_ppl.py --init out/base --scale 8                # interpolated, not fine-tuned
    python eval_ppl.py --init out/base --scale 8 --rope none    # extrapolated
    python eval_ppl.py --init out/none-8 out/linear-8 --windows 256,512,1024    # side by side
    python eval_ppl.py --init out/linear-8/step-*               # over fine-tuning steps: table 3
    python eval_ppl.py --init FOLDER --data novel.txt --windows 2048,8192 --max_tokens 20000

Perplexity is exp of the mean loss per token. Every token of a chosen document is scored once, with
as many tokens before it as window and stride allow, and never with tokens of another document. All
windows of a call score the same documents, those at least as long as the largest window
(--min_tokens): a model that reads more then meets the same text, not an easier one.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
from cli import DATA_FORMS, WholeNumbers, at_least, data_path, run, text_table, write_json
from evaluation import (
    BATCH_TOKENS, batch_tokens, batches_of_equal_length, check_window, choose_outputs,
    evaluation_parser, model_facts, one_or_all, open_checkpoint, read_configs
)
from loss import IGNORED
from model import LLaMA, LLaMAConfig
from results import draw_perplexity_results, perplexity_table

# ---- the measure ---------------------------------------------------------------------------------


def perplexity(
    model: LLaMA, documents: Sequence[Sequence[int]], window: int, stride: int,
    bos_id: int | None = None, *, batch_tokens: int = BATCH_TOKENS, desc: str = ""
) -> dict:
    """Sliding-window perplexity: {"window", "ppl", "nll", "stderr", "tokens", "by_document"}.

    documents: the token ids of each document, without BOS and EOS.
    window: tokens of a row, BOS included. The model reads all but the last one, which is a target.
    stride: tokens that each window after the first one scores, less than `window`.
    batch_tokens: tokens that go through the model at a time.

    nll is the mean loss per token in nats, and ppl = exp(nll). stderr is the standard error of nll
    over documents, None where there is only one; that of ppl is about ppl * stderr. by_document has
    {"loss", "tokens"} of each document, the loss summed over its tokens.
    Raises ValueError if there is nothing to score.
    """
    if window < 2:
        raise ValueError(f"a window must have at least 2 tokens, got {window}")
    if not 1 <= stride < window:
        raise ValueError(
            f"stride {stride} must be at least 1 and below the window, {window}: "
            "the other tokens of a window are context"
        )
    # Cut each document into spans that score each of its tokens once
    spans = []
    for i, tokens in enumerate(documents):
        spans += sliding_spans(i, len(tokens), window, stride, bos_id is not None)

    # Add up losses and tokens for each document
    loss_sums = np.zeros(len(documents))
    token_counts = np.zeros(len(documents))
    desc = desc or f"window {window}"
    for batch, losses in span_losses(model, documents, spans, bos_id, batch_tokens, desc):
        for span, row in zip(batch, losses):
            loss_sums[span.document] += row.sum()  # context has the loss 0
            token_counts[span.document] += span.scored

    # Every token counts alike, so a long document counts for more than a short one
    tokens = int(token_counts.sum())
    if tokens == 0:
        raise ValueError(
            "there is nothing to score: no document has a token with another before it"
        )
    nll = float(loss_sums.sum() / tokens)
    if not math.isfinite(nll) or nll > 700:  # exp(710) is too large for a float
        raise ValueError(
            f"the loss at window {window} is {nll}: damaged weights, or --dtype float32 is needed"
        )
    return {
        "window": window,
        "ppl": math.exp(nll),
        "nll": nll,
        "stderr": standard_error(loss_sums, token_counts),
        "tokens": tokens,
        "by_document": [
            {"loss": float(loss), "tokens": int(count)}
            for loss, count in zip(loss_sums, token_counts)
        ],
    }


class Span(NamedTuple):
    """Tokens start ... end - 1 of a document, of which the last `scored` are scored."""

    document: int
    start: int
    end: int
    scored: int


def sliding_spans(
    document: int, length: int, window: int, stride: int, has_bos: bool
) -> Iterator[Span]:
    """Yield the windows over a document of `length` tokens; they score each token exactly once.

    The first window is as full as it can be and scores all its tokens. Each later one ends `stride`
    tokens further and scores those alone; the tokens before them are context. The last one scores
    what is left. With window 4, stride 2 and no BOS ("s" is scored, "c" is context):

        token      0 1 2 3 4 5 6
        window 1   c s s s
        window 2       c c s s
        window 3         c c c s

    BOS takes one place in every window. Without BOS, the first token of a document has nothing
    before it and is not scored.
    """
    room = window - has_bos
    unscored = 0 if has_bos else 1
    end = min(length, room)
    if end > unscored:
        yield Span(document, 0, end, end - unscored)
    while end < length:
        scored = min(stride, length - end)
        end += scored
        yield Span(document, end - room, end, scored)


def span_losses(
    model: LLaMA, documents: Sequence[Sequence[int]], spans: list[Span], bos_id: int | None,
    batch_tokens: int, desc: str
) -> Iterator[tuple[list[Span], np.ndarray]]:
    """Yield batches of spans and the losses of their tokens: (B, T) nats, 0 where not scored.

    BOS is put before each span. Raises ValueError for a token id beyond the model's vocabulary.
    """
    check_vocabulary(model.config, documents, spans, bos_id)
    device = model.embed_tokens.weight.device
    bos = [] if bos_id is None else [bos_id]

    def row_length(span: Span) -> int:
        return len(bos) + span.end - span.start

    total = sum(span.scored for span in spans)
    with tqdm(total=total, desc=desc, unit="token", unit_scale=True, leave=False) as bar:
        for batch in batches_of_equal_length(spans, row_length, batch_tokens):
            rows = []
            for span in batch:
                text = documents[span.document][span.start : span.end]
                rows.append(np.concatenate([bos, text]))
            # int64, because without BOS the empty list makes the rows float
            ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)  # (B, T + 1)

            # Each token is the target of the one before it; context is read but not scored
            targets = ids[:, 1:].clone()  # (B, T)
            for row, span in zip(targets, batch):
                row[: len(row) - span.scored] = IGNORED
            losses = model.nll(ids[:, :-1], targets)  # (B, T)
            yield batch, losses.cpu().double().numpy()
            bar.update(sum(span.scored for span in batch))


def check_vocabulary(
    config: LLaMAConfig, documents: Sequence[Sequence[int]], spans: list[Span], bos_id: int | None
) -> None:
    """Raise ValueError if a document that is to be read has a token beyond the vocabulary."""
    largest = bos_id or 0
    for i in {span.document for span in spans}:
        largest = max(largest, int(np.max(documents[i])))
    if largest >= config.vocab_size:
        raise ValueError(
            f"token id {largest} is out of range: the model's vocabulary has "
            f"{config.vocab_size} tokens"
        )


def standard_error(loss_sums: np.ndarray, token_counts: np.ndarray) -> float | None:
    """The standard error of the mean loss per token, with documents as the sample; None for one.

    The tokens of one document depend on each other, documents do not. For a ratio estimator over n
    documents (a mean of clusters of unequal size) the squared standard error is
    n / (n - 1) * sum_d (loss_sum_d - nll * token_count_d)^2 / tokens^2.
    """
    n = int((token_counts > 0).sum())
    if n < 2:
        return None
    tokens = token_counts.sum()
    nll = loss_sums.sum() / tokens
    residuals = loss_sums - nll * token_counts
    return math.sqrt(n / (n - 1) * (residuals**2).sum()) / int(tokens)


def paired_difference(first: dict, second: dict) -> tuple[float, float | None]:
    """The nll of `second` minus that of `first`, and its standard error over documents.

    first, second: results of `perplexity` for the same documents, with the same BOS.

    How hard a document is counts in both and cancels, so the difference is far more certain than
    either of the two. The standard error is None where there is only one document.
    """
    pairs = list(zip(first["by_document"], second["by_document"], strict=True))
    differences = np.array([b["loss"] - a["loss"] for a, b in pairs])
    token_counts = np.array([a["tokens"] for a, _ in pairs])
    mean = float(differences.sum() / token_counts.sum())
    return mean, standard_error(differences, token_counts)


def position_nll(
    model: LLaMA, documents: Sequence[Sequence[int]], window: int, bos_id: int | None = None, *,
    batch_tokens: int = BATCH_TOKENS, desc: str = ""
) -> np.ndarray:
    """The mean loss by position, (window - 1,) nats; entry i is of tokens with i + 1 before them.

    The documents are cut into windows side by side; what does not fill one is left out. BOS counts
    among the tokens before. Raises ValueError if no document fills a window.
    """
    # Each span scores all its tokens that have one before them: window - 1 with BOS or without
    has_bos = bos_id is not None
    size = window - has_bos  # tokens of the document
    spans = []
    for i, tokens in enumerate(documents):
        for start in range(0, len(tokens) - size + 1, size):
            spans.append(Span(i, start, start + size, window - 1))
    if not spans:
        raise ValueError(f"no document fills a window of {window} tokens")
    total = np.zeros(window - 1)
    desc = desc or f"by position, window {window}"
    for _, losses in span_losses(model, documents, spans, bos_id, batch_tokens, desc):
        total += losses.sum(axis=0)
    return total / len(spans)


def choose_documents(
    documents: Sequence[Sequence[int]], min_tokens: int, max_tokens: int | None = None,
    max_documents: int | None = None, seed: int = 0
) -> tuple[list, int]:
    """The documents of at least min_tokens tokens, and how many were shorter.

    max_tokens: each document is cut to its first max_tokens tokens.
    max_documents: so many documents are drawn by seed and kept in their order (the paper draws 128
    documents of Proof-pile).
    """
    chosen = [tokens for tokens in documents if len(tokens) >= min_tokens]
    too_short = len(documents) - len(chosen)
    if max_documents is not None and max_documents < len(chosen):
        # Draw the numbers of documents, and put them back into the documents' order
        numbers = random.Random(seed).sample(range(len(chosen)), max_documents)
        chosen = [chosen[i] for i in sorted(numbers)]
    return [tokens[:max_tokens] for tokens in chosen], too_short


# ---- the command line ----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", type=data_path,
        help=f"{DATA_FORMS}; default: Python's standard library")
    add("--split", choices=("train", "val", "all"),
        help="which documents; val: those that train.py holds out; "
        "default: all of --data, val of Python's library")
    add("--windows", nargs="+", action=WholeNumbers, const=2,
        help="tokens, as 256,512,1024; default: the original window and its doublings")
    add("--stride", type=at_least(1),
        help="tokens that a window scores; default: 256, or half the smallest window if less")
    add("--max_tokens", type=at_least(1), help="cut each document to its first N tokens")
    add("--max_documents", type=at_least(1), help="take N documents, drawn by --seed")
    add("--min_tokens", type=at_least(1),
        help="take documents of at least N tokens; default: the largest window")
    add("--by_position", action="store_true",
        help="also the loss by position, in each checkpoint's largest window")
    return parser.parse_args(argv)


def doublings(config: LLaMAConfig) -> list[int]:
    """The original window, twice that, and so on up to the window in force."""
    windows = []
    window = min(config.original_window, config.block_size)
    while window < config.block_size:
        windows.append(window)
        window *= 2
    windows.append(config.block_size)
    return windows


def settle_flags(args: argparse.Namespace, smallest: int, largest: int) -> None:
    """Fill in the defaults that depend on the windows, and refuse what contradicts them."""
    if args.stride is None:
        args.stride = min(256, smallest // 2)
    if args.stride >= smallest:
        raise ValueError(f"--stride {args.stride} must be below the smallest window, {smallest}")
    if args.min_tokens is None:
        if args.max_tokens is not None and args.max_tokens < largest:
            raise ValueError(
                f"--max_tokens {args.max_tokens} is below the window {largest}: raise it, "
                "take smaller --windows, or give --min_tokens too"
            )
        args.min_tokens = largest
    if args.split is None:
        args.split = "val" if args.data is None else "all"


def evaluate(args: argparse.Namespace, name: str, windows: list[int]) -> tuple[dict, str]:
    """The result of one checkpoint, for the JSON file, and its tokenizer's fingerprint."""
    # Open the checkpoint and choose the documents
    model, tokenizer = open_checkpoint(args, name)
    corpus = data.load_corpus(args.data, tokenizer, args.split)
    all_documents = corpus.documents()
    documents, too_short = choose_documents(
        all_documents, args.min_tokens, args.max_tokens, args.max_documents, args.seed
    )
    if not documents:
        longest = max((len(tokens) for tokens in all_documents), default=0)
        raise ValueError(
            f"{corpus.name}, {args.split}: no document of at least {args.min_tokens} tokens, the "
            f"longest has {longest}: give smaller --windows or --min_tokens, or other --data"
        )

    # Score them at each window
    rows = []  # one for each window
    for window in windows:
        row = perplexity(
            model, documents, window, args.stride, tokenizer.bos_id,
            batch_tokens=batch_tokens(args, window), desc=f"{name}, window {window}"
        )
        rows.append(row)
    result = model_facts(args, name, model.config)
    result |= {
        "stride": args.stride,
        "documents": len(documents),
        "windows": rows,
        "data": corpus.name,
        "split": args.split,
        "min_tokens": args.min_tokens,
        "max_tokens": args.max_tokens,
        "left_out": too_short,
        "long_enough": len(all_documents) - too_short,
        "seed": args.seed,
    }
    # The loss by position, in one window
    if args.by_position:
        window = windows[-1]  # the largest
        nll = position_nll(
            model, documents, window, tokenizer.bos_id,
            batch_tokens=batch_tokens(args, window), desc=f"{name}, by position"
        )
        result["positions"] = {"window": window, "nll": nll.round(5).tolist()}
    return result, tokenizer.fingerprint


def difference_table(results: list[dict], windows: list[int]) -> str:
    """The loss of each checkpoint minus that of the first, a column for each window, in nats."""
    first = {row["window"]: row for row in results[0]["windows"]}
    lines = []
    for result in results[1:]:
        line = [result["init"]]
        rows = {row["window"]: row for row in result["windows"]}
        for window in windows:
            if window not in rows or window not in first:
                line.append("-")
                continue
            difference, stderr = paired_difference(first[window], rows[window])
            cell = f"{difference:+.4f}"
            if stderr is not None:
                cell += f" ± {stderr:.4f}"
            line.append(cell)
        lines.append(line)
    header = [f"loss minus that of {results[0]['init']}, in nats"]
    return text_table(header + windows, lines)


def headline(args: argparse.Namespace, result: dict) -> str:
    """What was scored, in one line."""
    line = f"perplexity by window: {result['data']}, {args.split}; {result['documents']} "
    if args.max_documents:
        line += f"of {result['long_enough']} "
    line += f"documents of at least {args.min_tokens} tokens"
    if args.max_tokens:
        line += f", cut to {args.max_tokens}"
    return f"{line} ({result['left_out']} shorter ones left out), stride {args.stride}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)

    # Refuse what can't be done before the work begins
    steps = choose_outputs(args, "ppl")
    windows = []
    for name, config in zip(args.init, read_configs(args)):
        for window in args.windows or []:
            check_window(name, config, window, "--windows")
        windows.append(args.windows or doublings(config))
    columns = sorted({window for one in windows for window in one})
    settle_flags(args, smallest=columns[0], largest=columns[-1])

    # Evaluate one checkpoint after the other, so that one model at a time is in memory
    results = []
    fingerprints = set()
    for i, name in enumerate(args.init):
        result, fingerprint = evaluate(args, name, windows[i])
        if steps:
            result["steps"] = steps[i]
        results.append(result)
        fingerprints.add(fingerprint)

    # Print a table, and write JSON and a picture
    print(headline(args, results[0]))
    print(perplexity_table(results, columns, over_steps=bool(steps)))
    comparable = len(fingerprints) == 1
    if results[0]["documents"] > 1:
        print("± one standard error over documents")
        if len(results) > 1 and comparable and not steps:
            print(f"\n{difference_table(results, columns)}")
    if not comparable:
        print(
            "the tokenizers differ: these perplexities are of different tokens, don't compare them",
            file=sys.stderr,
        )
    write_json(args.json, one_or_all(results))
    draw_perplexity_results(results, bool(steps), args.by_position, args.plot)
    print(f"written: {args.json}, {args.plot}")


if __name__ == "__main__":
    run(main)
