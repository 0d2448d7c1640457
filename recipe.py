"""What a run is made of: its steps and learning rates, and the rows of a step's global batch.

The numbers are the paper's for its models (section 3.1), and ours for a base from scratch and for
smaller models. The command line may change each (train_flags.py).
"""

import argparse
import math
from typing import NamedTuple

import batches
from model import LLaMAConfig
from trainset import Part, text_part

TINY_PARAMS = 20e6  # a model of at most so many parameters is trained on retrieval rows too


class Recipe(NamedTuple):
    """Settings that depend on the model; the command line may change each."""

    max_iters: int
    batch_size: int  # of rows of --row_tokens tokens, of which retrieval rows have their share
    learning_rate: float  # the peak
    warmup_iters: int
    decay: str  # "constant", or "linear" to 5% of the peak
    mix: str  # what the rows are made of: "text" or "retrieval", see `batch_parts`
    optimizer: str = "adamw"  # or "muon", see train.build_optimizers


def default_recipe(config: LLaMAConfig, scratch: bool, row_tokens: int | None = None) -> Recipe:
    """The recipe for a base from scratch, for the paper's models, and for smaller ones.

    row_tokens: tokens of a row of text; None: as many as the window has.
    """
    if scratch:
        return Recipe(2200, 16, 4e-3, 50, decay="linear", mix="retrieval", optimizer="muon")
    # On text alone so small a model forgets retrieval within tens of fine-tuning steps. Therefore
    # half of its training tokens are retrieval rows, see `batch_parts`.
    if config.n_params <= TINY_PARAMS:
        rows = max(2, 8192 // (row_tokens or config.block_size))  # 8,192 tokens a step
        return Recipe(200, rows, 1e-3, 20, decay="linear", mix="retrieval")
    # Smaller models than the paper's are pre-trained, and so fine-tuned, at a higher rate
    if config.n_params <= 1e9:
        return Recipe(1000, 64, 1e-4, 20, decay="constant", mix="text")
    # The paper (§3.1): 2e-5, and half of it from 33B on. It does not say what follows the warm-up.
    # Not copied: its batch of 128 for 65B and for windows beyond 8,192 (--batch_size 128 does
    # that).
    if config.n_params <= 25e9:
        return Recipe(1000, 64, 2e-5, 20, decay="constant", mix="text")
    return Recipe(1000, 64, 1e-5, 20, decay="constant", mix="text")


def cpu_recipe(of_gpus: Recipe, row_tokens: int, world: int) -> Recipe:
    """The recipe for a larger model on a CPU, where that of GPUs would take weeks.

    100 steps of about 4,096 tokens, as a trial that ends within hours for some 100 M parameters.
    """
    rows = max(1, 4096 // row_tokens)
    rows = world * math.ceil(rows / world)
    return of_gpus._replace(max_iters=100, batch_size=rows)


def lr_at(step: int, args: argparse.Namespace) -> float:
    """The learning rate of one step."""
    # 1) linear warm-up (§3.1): by equal steps from 10% of the peak, which comes before the first
    # step, to the peak at step warmup_iters - 1
    warmup = min(1.0, 0.1 + 0.9 * (step + 1) / max(1, args.warmup_iters))
    lr = args.learning_rate * warmup
    # 2) constant after that
    if args.decay == "constant":
        return lr
    # 3) or a linear decay to 5% of the peak. It runs from step 0 on, through the warm-up, so the
    # rate never quite reaches the peak.
    return lr * (1 - 0.95 * step / args.max_iters)


def batch_parts(args: argparse.Namespace, config: LLaMAConfig, step: int = 0) -> list[Part]:
    """The parts of a step's global batch: how many rows of which length, made of what.

    A Part's mix is the shares of each kind of row; batches.Mix explains them.
    """
    window = config.block_size
    original_window = min(window, config.original_window)

    # Text alone, as in the paper. (With --summary_field the rows are reports, and the mix is
    # ignored.)
    if args.mix == "text" or args.summary_field:
        return [text_part(args, config, args.batch_size)]

    # Pre-training. On text alone a model this small learns no retrieval in minutes. So most rows of
    # the first steps have passkeys, nearly all of them many (dense), because a row that asks for
    # many keys teaches most. Then the model has the skill, and three rows of four are text.
    if window == original_window:
        retrieval = batches.Mix(passkey=0.15, repeat=0.1)
        if step < 0.4 * args.max_iters:
            retrieval = batches.Mix(passkey=0.6, repeat=0.3, dense=0.9)
        return [Part(window, args.batch_size, retrieval)]

    # Extending: half of the tokens are text for the extended window, half are retrieval rows of the
    # original length. So no more than the original window of tokens lies between a key and its
    # question. But positions are skipped (except with --no_skip), so that in positions a key may be
    # as far away as the extended window allows: with near keys alone the model would learn that all
    # keys are near. In pre-training a passkey row often has many keys (dense) or several prompts.
    # Here each has one prompt with one key (dense 0, alone 1), because with several keys the model
    # would learn to look back only as far as the last one.
    text_rows = args.batch_size // 2
    # By whole factors, so that the rows can be shared among the processes as those of text can
    retrieval_rows = (args.batch_size - text_rows) * (window // original_window)
    if args.row_tokens < window:
        retrieval_rows = (args.batch_size - text_rows) * args.row_tokens // original_window
    retrieval = batches.Mix(passkey=0.8, repeat=0.2, dense=0.0, alone=1.0)
    retrieval_reach = 0 if args.no_skip else window
    return [
        text_part(args, config, text_rows),
        Part(original_window, retrieval_rows, retrieval, retrieval_reach)
    ]
