"""Continue a text with a checkpoint, token by token.

    python generate.py --init FOLDER --prompt "Once upon a time"
    python generate.py --init FOLDER --prompt story.txt --temperature 0.8 --top_p 0.95

The text goes to standard output, the speed to standard error.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from checkpoint import end_ids
from cli import CHECKPOINT_FORMS, Parser, add_model_flags, at_least, fraction, run
from evaluation import check_window, method_name, open_checkpoint
from plots import UNTUNED


def text_pieces(
    tokens: Iterable[int], decode: Callable[[list[int]], str], before: list[int]
) -> Iterator[str]:
    r"""Yield the text of the tokens in pieces, each as soon as its last character is whole.

    decode: token ids to text.  before: the last tokens of the prompt.

    A token can be a part of a character, and some decoders leave out the space before the first
    word. A piece is therefore what the new tokens add to the text of the tokens before them.
    For example, where the token 5 is "so " and 🎉 is made of the tokens 7 and 8:

        decode([5])        "so "
        decode([5, 7])     "so \ufffd"  the character is not whole: wait for the next token
        decode([5, 7, 8])  "so 🎉"      yield "🎉"
    """
    ids = list(before)
    known = len(before)  # the first `known` of ids are shown already
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if text.endswith("\ufffd"):
            continue
        yield text[len(decode(ids[:known])) :]
        # The tokens of this piece are what the next piece is compared with
        ids = ids[known:]
        known = len(ids)
    # Only a character that never became whole can be left here
    yield decode(ids)[len(decode(ids[:known])) :]


def read_prompt(given: str) -> str:
    """The text to continue: --prompt itself, or what the file of that name holds.

    Raises ValueError for a file that is not there or holds no text.
    """
    if os.path.isfile(given):  # Path.is_file would fail on a text that is too long for a file name
        text = Path(given).read_bytes().decode("utf-8", errors="replace")
        if not text.strip():
            raise ValueError(f"--prompt {given} is an empty file")
        if "\0" in text:
            raise ValueError(f"--prompt {given} is no text file in UTF-8: convert it")
        return text
    # What looks like a path is hardly meant as a text to continue
    one_word = not re.search(r"\s", given)
    is_path = one_word and "/" in given and "://" not in given
    if is_path or re.fullmatch(r".+\.(txt|md)", given):
        raise ValueError(
            f"--prompt {given}: there is no such file (if this is the text itself, put it into a "
            "file)"
        )
    return given


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--init", default="out/base", help=CHECKPOINT_FORMS)
    add("--prompt", default="def main(", help="the text to continue, or a file that holds it")
    add("--max_new_tokens", type=at_least(1), default=200, help="generate at most N tokens")
    add("--temperature", type=at_least(0.0), default=0.0,
        help="0: always the likeliest token; 1: drawn as the model says")
    add("--top_p", type=fraction, default=1.0,
        help="draw among the likeliest tokens that make up this probability")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    text = read_prompt(args.prompt)

    # Encode the prompt, which must leave room for the new tokens
    model, tokenizer = open_checkpoint(args, args.init)
    model.lay_out_for_decoding()
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id] + ids
    if not ids:
        raise ValueError("--prompt is empty, and the tokenizer has no BOS: give some text")
    window = len(ids) + args.max_new_tokens
    check_window(args.init, model.config, window, "--prompt and --max_new_tokens:")
    method = method_name(args, args.init, model.config)
    if method in ("extrapolated", "PI" + UNTUNED):
        print(
            f"{args.init}: {method} at scale {model.config.scale:g}: to write well without "
            "fine-tuning, give --rope yarn or ntk", file=sys.stderr
        )

    # Print each piece of text as soon as it is whole, and note when each token came
    device = model.lm_head.weight.device
    stream = model.stream(
        torch.tensor([ids], device=device),  # (1, T)
        args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        eos_id=end_ids(model.config, tokenizer),
        generator=torch.Generator(device).manual_seed(args.seed),
    )
    times = [time.perf_counter()]  # the start, then when each token came

    def timed_tokens() -> Iterator[int]:
        for token in stream:
            number = token.item()  # waits for the GPU
            times.append(time.perf_counter())
            yield number

    for piece in text_pieces(timed_tokens(), tokenizer.decode, ids[-8:]):
        print(piece, end="", flush=True)
    print(flush=True)

    # The first token comes from the prefill. If it is the only one, decoding took no time.
    count = len(times) - 1
    prefill = len(ids) / (times[1] - times[0])
    decoding = (count - 1) / max(times[-1] - times[1], 1e-9)
    print(
        f"prefill: {len(ids)} tokens, {prefill:,.0f} tokens/s; "
        f"decoding: {count} tokens, {decoding:,.1f} tokens/s", file=sys.stderr
    )


if __name__ == "__main__":
    run(main)
