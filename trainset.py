"""What the training loop reads: rows of text or of reports, and each process's share of a batch.

Rows are a pure function of (seed, step, index in the global batch); batches.py makes them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

import batches
import data
from model import LLaMAConfig
from parallel import processes, rank
from tokenizer import Tokenizer


class Part(NamedTuple):
    """One part of a global batch: so many rows of one length, made of one mix."""

    length: int
    rows: int
    mix: batches.Mix
    reach: int = 0  # positions are random ones below it; 0: they are 0, 1, 2, ...


def text_part(args: argparse.Namespace, config: LLaMAConfig, rows: int) -> Part:
    """So many rows of text, as --row_tokens, --no_skip and --min_tokens have them."""
    # Rows have the window's length, or are shorter. Short rows have skipped positions, so that the
    # model sees all distances of the window all the same. Positions lie below `reach`; if it is 0,
    # they are 0, 1, 2, ..., and the text is cut anywhere, between documents too.
    reach = 0
    if args.row_tokens < config.block_size and not args.no_skip:
        reach = config.block_size
    elif args.min_tokens:
        reach = args.row_tokens
    return Part(args.row_tokens, rows, batches.Mix(), reach)


class MicroBatch(NamedTuple):
    """Some rows that are computed at once, (B, T) each."""

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None  # None: 0 ... T - 1

    def to(self, device: torch.device) -> "MicroBatch":
        """The same rows on a device. From pinned memory the copy is not waited for."""
        positions = self.positions
        if positions is not None:
            positions = positions.to(device, non_blocking=True)
        ids = self.ids.to(device, non_blocking=True)
        return MicroBatch(ids, self.targets.to(device, non_blocking=True), positions)


Batch = list[MicroBatch]


class TextData:
    """Rows of text, with the retrieval rows of a mix. Raises ValueError for too little text."""

    def __init__(self, args: argparse.Namespace, config: LLaMAConfig, tokenizer: Tokenizer) -> None:
        self.seed = args.seed
        self.tokenizer = tokenizer
        self.held_out_part = text_part(args, config, 1)
        self.train = data.load_corpus(args.data, tokenizer, "train")
        self.val = data.load_corpus(args.data, tokenizer, "val")
        self.train.name += " (for training)"
        self.val.name += " (for validation, about a tenth)"
        if args.min_tokens:
            self.leave_out_short_documents(args.min_tokens)
        # Too little data is found before anything is written
        longest = args.row_tokens
        if args.mix == "retrieval":  # its rows have the original length
            longest = max(longest, min(config.block_size, config.original_window))
        batches.check_length(self.train, longest)
        batches.check_length(self.val, args.row_tokens)

    def leave_out_short_documents(self, least: int) -> None:
        """Train on documents of at least so many tokens, and say how many are left out."""
        chosen = batches.long_documents(self.train, least)
        documents = len(self.train.starts) - 1
        left_out = documents - (len(chosen.starts) - 1)
        share = 1 - len(chosen) / len(self.train)
        if rank() == 0:
            line = f"--min_tokens {least:,}: {left_out:,} of {documents:,} documents, with "
            print(line + f"{share:.0%} of the tokens, are left out of training", file=sys.stderr)
        self.train = chosen

    def rows(self, step: int, part: Part, indices: range) -> MicroBatch:
        """Some rows of a step's global batch."""
        return self._sample(self.train, step, part, indices, self.seed)

    def held_out(self, index: int) -> MicroBatch:
        """A row of validation text, of the same form as those of training."""
        return self._sample(self.val, 0, self.held_out_part, range(index, index + 1), 0)

    def _sample(
        self, corpus: data.Corpus, step: int, part: Part, indices: range, seed: int
    ) -> MicroBatch:
        # Text with skipped positions is skipped as well: it goes on later in its document
        if part.reach and part.mix == batches.Mix():
            return MicroBatch(
                *batches.sample_text(corpus, part.length, part.reach, step, indices, seed=seed)
            )
        ids, targets = batches.sample_batch(
            corpus, self.tokenizer, part.length, step, indices, seed=seed, mix=part.mix
        )
        positions = None
        if part.reach:
            positions = batches.sample_positions(
                part.length, part.reach, step, indices, seed=seed
            )
        return MicroBatch(ids, targets, positions)


class ReportData:
    """Reports with their summaries; every twentieth is held out where there are more than 20."""

    def __init__(self, args: argparse.Namespace, config: LLaMAConfig, tokenizer: Tokenizer) -> None:
        self.args = args
        self.window = config.block_size
        self.tokenizer = tokenizer
        reports = data.read_reports(args.data, args.document_field, args.summary_field)
        batches.check_reports(reports, tokenizer, self.window)
        self.train = reports
        self.val = reports
        if len(reports) > 20:
            self.val = reports[::20]
            self.train = [report for i, report in enumerate(reports) if i % 20]

    def rows(self, step: int, part: Part, indices: range) -> MicroBatch:
        return self._sample(self.train, step, indices, self.args.batch_size, self.args.seed)

    def held_out(self, index: int) -> MicroBatch:
        return self._sample(self.val, index, range(1), 1, 0)

    def _sample(
        self, reports: list, step: int, indices: range, batch_size: int, seed: int
    ) -> MicroBatch:
        ids, targets = batches.sample_reports(
            reports, self.tokenizer, self.window, step, indices, batch_size=batch_size, seed=seed,
            max_input=self.args.max_input
        )
        return MicroBatch(ids, targets)


def share_of_batch(
    source: TextData | ReportData, step: int, parts: list[Part], micro_batch_size: int, pin: bool
) -> Batch:
    """This process's share of a step's global batch, in micro batches of about equally many tokens.

    micro_batch_size: rows at a time of the longest part.  pin: put them in pinned memory, from
    which a copy to the GPU need not be waited for.
    """
    made = []
    longest = max(part.length for part in parts)
    first = 0  # the index in the global batch where the part begins
    for part in parts:
        share = part.rows // processes()
        start = first + rank() * share
        size = micro_batch_size * (longest // part.length)
        for i in range(start, start + share, size):
            indices = range(i, min(i + size, start + share))
            ids, targets, positions = source.rows(step, part, indices)
            if pin:
                ids = ids.pin_memory()
                targets = targets.pin_memory()
                if positions is not None:
                    positions = positions.pin_memory()
            made.append(MicroBatch(ids, targets, positions))
        first += part.rows
    return made


def prefetch(make: Callable[[int], Batch], first: int, last: int) -> Iterator[Batch]:
    """Yield make(step) for first ... last - 1, each made in a thread while the step before runs."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(make, first)
        for step in range(first, last):
            batch = upcoming.result()
            if step + 1 < last:
                upcoming = thread.submit(make, step + 1)
            yield batch
