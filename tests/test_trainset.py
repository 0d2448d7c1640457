"""trainset.py: each process's share of a batch, batches that are made ahead, reports that are held out."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainset
from batches import Mix, sample_positions
from data import Corpus
from tokenizer import train_tokenizer
from trainset import MicroBatch, Part, prefetch, share_of_batch


TEXT = "".join(f"line {i}: the sky is {i % 7} times blue\n" for i in range(300))


class CountingRows:
    """Rows that say which step, length and index they are of."""

    def rows(self, step, part, indices):
        ids = torch.tensor([[step, part.length, index] for index in indices])
        return MicroBatch(ids, ids + 1)


PARTS = [Part(512, 6, Mix()), Part(256, 12, Mix(passkey=1.0))]


def drawn(batch):
    return [tuple(row.tolist()) for rows in batch for row in rows.ids]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_shares_of_the_processes_make_up_the_global_batch(monkeypatch, world):
    monkeypatch.setattr(trainset, "processes", lambda: world)
    rows = []
    for rank in range(world):
        monkeypatch.setattr(trainset, "rank", lambda rank=rank: rank)
        share = share_of_batch(CountingRows(), 7, PARTS, micro_batch_size=2, pin=False)
        assert len(drawn(share)) == 18 // world
        # Micro batches of the shorter rows have as many tokens, and so more rows
        assert all(len(rows.ids) <= 2 * 512 // rows.ids[0, 1] for rows in share)
        rows += drawn(share)
    # Indices go on from one part to the next, so that no two rows of a step share one
    expected = [(7, 512, i) for i in range(6)] + [(7, 256, i) for i in range(6, 18)]
    assert sorted(rows) == sorted(expected)


def test_rows_of_a_mix_keep_their_tokens_where_positions_are_skipped():
    """The positions of retrieval rows are those of the row's index, and change nothing else."""
    source = trainset.TextData.__new__(trainset.TextData)
    tokenizer = train_tokenizer([TEXT], 300)
    source.seed = 1
    source.tokenizer = tokenizer
    tokens = np.array(tokenizer.encode(TEXT))
    source.train = Corpus(tokens, np.array([0, len(tokens)]), "text", False, False)
    mix = Mix(passkey=0.5, repeat=0.3)
    plain = source.rows(4, Part(64, 8, mix), range(8))
    skipped = source.rows(4, Part(64, 8, mix, reach=256), range(8))
    assert torch.equal(plain.ids, skipped.ids) and torch.equal(plain.targets, skipped.targets)
    assert plain.positions is None
    expected = sample_positions(64, 256, 4, range(8), seed=1)
    assert torch.equal(skipped.positions, expected) and expected.max() > 63


def test_prefetch_gives_each_step_once_and_makes_the_next_one_meanwhile():
    began = {step: threading.Event() for step in range(3, 7)}

    def make(step):
        began[step].set()
        return step

    for step, batch in enumerate(prefetch(make, first=3, last=7), 3):
        assert batch == step
        if step < 6:
            assert began[step + 1].wait(timeout=10)
    assert step == 6


def test_an_error_in_the_thread_reaches_the_loop():
    def make(step):
        if step == 1:
            raise ValueError("no such row")
        return step

    steps = []
    with pytest.raises(ValueError, match="no such row"):
        for batch in prefetch(make, first=0, last=4):
            steps.append(batch)
    assert steps == [0]


def test_every_twentieth_report_is_held_out(monkeypatch):
    reports = [(f"document {i}", f"summary {i}") for i in range(45)]
    monkeypatch.setattr(trainset.data, "read_reports", lambda *names: reports)
    monkeypatch.setattr(trainset.batches, "check_reports", lambda *arguments: None)
    args = SimpleNamespace(data=["x"], document_field="d", summary_field="s")
    source = trainset.ReportData(args, SimpleNamespace(block_size=64), None)
    assert source.val == [reports[0], reports[20], reports[40]]
    assert sorted(source.train + source.val) == sorted(reports)
