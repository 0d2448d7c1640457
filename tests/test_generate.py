"""generate.py: the text as it streams, and its command line."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoint
import cli
import generate
from model import LLaMA, LLaMAConfig
from tokenizer import train_tokenizer

ROOT = Path(generate.__file__).parent
WINDOW = 64
PROMPT = "def f(x): naïve"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights, so large that the likeliest token changes at each step."""
    folder = tmp_path_factory.mktemp("generate")
    texts = ["def f(x): return x + 1\n" * 50, "naïve café 🎉\n" * 20]
    tokenizer = train_tokenizer(texts, 300)
    config = LLaMAConfig(
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_embd=64,
        intermediate_size=112,
        block_size=WINDOW,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    torch.manual_seed(0)
    model = LLaMA(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.15)
    checkpoint.save(model, folder, tokenizer)
    return folder


@pytest.fixture
def command(folder, capsys, monkeypatch):
    """command(*flags) runs the script: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["generate.py"])

    def call(*flags: object) -> tuple[int, str, str]:
        first = ["--init", str(folder), "--device", "cpu", "--max_new_tokens", "12"]
        argv = first + [str(flag) for flag in flags]
        code = 0
        try:
            cli.run(lambda: generate.main(argv))
        except SystemExit as stop:
            code = stop.code
        out, error = capsys.readouterr()
        return code, out, error

    return call


def greedy_tokens(folder: Path, eos_id: int | None) -> list[int]:
    """The 12 tokens that the model gives after PROMPT, or fewer if it meets eos_id."""
    model = checkpoint.load(folder)
    tokenizer = checkpoint.load_tokenizer(folder, model.config)
    ids = torch.tensor([[tokenizer.bos_id] + tokenizer.encode(PROMPT)])
    return model.generate(ids, 12, eos_id=eos_id)[0, ids.size(1) :].tolist()


def test_the_text_is_the_models(folder, command):
    config = checkpoint.read_config(folder)
    tokenizer = checkpoint.load_tokenizer(folder, config)
    code, out, error = command("--prompt", PROMPT)
    assert code == 0
    assert out == tokenizer.decode(greedy_tokens(folder, config.eos_id)) + "\n"
    speed = r"prefill: \d+ tokens, [\d,]+ tokens/s; decoding: \d+ tokens, [\d,.]+ tokens/s\n"
    assert re.fullmatch(speed, error)


def test_a_prompt_in_a_file(command, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    assert command("--prompt", path)[1] == command("--prompt", PROMPT)[1]


@pytest.mark.parametrize(
    "given, content, message",
    [
        ("story.txt", None, "there is no such file"),
        ("my story.md", None, "there is no such file"),
        ("prompts/story", None, "there is no such file"),
        ("empty.txt", b" \n", "is an empty file"),
        ("model.txt", b"\x00\x01", "is no text file in UTF-8"),
    ],
)
def test_what_looks_like_a_file_and_is_no_prompt(
    given, content, message, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(given).write_bytes(content)
    code, out, error = command("--prompt", given)
    assert (code, out) == (2, "")
    assert error.startswith(f"generate.py: error: --prompt {given}")
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["either and/or both", "https://example.com/", "the file x.txt\nthe file y.txt", "e.g."]
)
def test_other_texts_are_prompts(text):
    assert generate.read_prompt(text) == text


def test_an_untuned_model_is_told_what_serves_better(command):
    _, _, error = command("--prompt", PROMPT, "--scale", 2)
    assert "PI, no fine-tuning at scale 2" in error and "--rope yarn" in error
    _, _, error = command("--prompt", PROMPT, "--scale", 2, "--rope", "yarn")
    assert error.count("\n") == 1  # the speed


def test_sampling_depends_on_the_seed(command):
    def sampled(seed: int) -> str:
        return command("--temperature", 2, "--top_p", 0.9, "--seed", seed)[1]

    first = sampled(0)
    assert sampled(0) == first
    assert sampled(1) != first


@pytest.mark.parametrize("several", [False, True])
def test_the_text_ends_at_the_checkpoints_end_tokens(folder, command, several):
    free = greedy_tokens(folder, None)
    assert 200 not in free
    end = free[4]
    path = folder / "config.json"
    original = path.read_text()
    config = json.loads(original)
    config["eos_token_id"] = [200, end] if several else end
    path.write_text(json.dumps(config))
    try:
        _, _, error = command("--prompt", PROMPT)
    finally:
        path.write_text(original)
    assert f"decoding: {free.index(end) + 1} tokens" in error


def test_scale_makes_room_for_a_long_prompt(command):
    code, out, error = command("--prompt", "x" * 200)
    assert (code, out) == (2, "")
    assert re.search(
        r"--prompt and --max_new_tokens: \d+ is beyond the window of .*--scale 4", error
    )
    assert error.count("\n") == 1
    assert command("--prompt", "x" * 200, "--scale", 4)[0] == 0


def test_a_prompt_that_is_longer_than_any_file_name(command):
    code, _, error = command("--prompt", "x" * 9000)
    assert code == 2
    assert "is beyond the window" in error


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--max_new_tokens", 0, "must be a whole number of at least 1"),
        ("--temperature", -1, "must be a number of at least 0"),
        ("--temperature", "nan", "must be a number of at least 0"),
        ("--top_p", 0, "must be above 0 and at most 1"),
        ("--device", "toaster", "can't be used here"),
        ("--init", "nowhere", "nowhere"),
    ],
)
def test_bad_flags_are_refused_in_one_line(command, flag, value, message):
    code, out, error = command(flag, value)
    assert (code, out) == (2, "")
    assert error.startswith("generate.py: error: ")
    assert error.count("\n") == 1
    assert flag in error or message == value
    assert message in error


def test_an_empty_prompt_needs_a_bos(command, monkeypatch):
    assert command("--prompt", "")[0] == 0
    load_tokenizer = checkpoint.load_tokenizer

    def without_bos(*args):
        return replace(load_tokenizer(*args), bos_id=None)

    monkeypatch.setattr(checkpoint, "load_tokenizer", without_bos)
    code, out, error = command("--prompt", "")
    assert (code, out) == (2, "")
    assert "--prompt is empty" in error


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


def test_pieces_of_bytes_are_whole_characters():
    text = "naïve café 🎉🎉 end"
    pieces = list(generate.text_pieces(iter(text.encode()), decode_bytes, list(b"so ")))
    assert "".join(pieces) == text
    assert "🎉" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_keep_the_space_that_the_decoder_drops_from_the_first_word():
    words = ["▁one", "▁two", "three", "▁four"]

    def decode(ids: list[int]) -> str:
        text = "".join(words[i] for i in ids)
        return text.replace("▁", " ")[1:]

    pieces = list(generate.text_pieces([1, 2, 3], decode, [0]))
    assert pieces[:3] == [" two", "three", " four"]


def test_a_character_that_never_becomes_whole_is_shown_at_the_end():
    half = "🎉".encode()[:3]
    assert list(generate.text_pieces(half, decode_bytes, [65])) == ["\ufffd"]


def test_generate_as_it_is_run(folder):
    flags = ["--init", folder, "--prompt", "def", "--max_new_tokens", "3", "--device", "cpu"]
    command = [sys.executable, ROOT / "generate.py"] + flags
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr.startswith("prefill: ")
