"""evaluation.py: what is refused before the work, where results go, results over steps, batches."""

import argparse
import random

import pytest
import torch

import checkpoint
import cli
import evaluation
import plots
from conftest import assert_refused, random_model
from evaluation import Curve
from model import LLaMAConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok):
    """Three checkpoints: `base`, and extended twofold `pi` (linear) and `direct` (none)."""
    folder = tmp_path_factory.mktemp("evaluation")
    base = random_model(vocab_size=500, bos_id=tok.bos_id, eos_id=tok.eos_id)
    checkpoint.save(base, folder / "base", tok)
    for name, rope in (("pi", "linear"), ("direct", "none")):
        extended = checkpoint.load(folder / "base", scale=2, rope=rope)
        checkpoint.save(extended, folder / name, tok)
    return folder


def parse(*arguments: object) -> argparse.Namespace:
    parser = evaluation.evaluation_parser("Evaluates.")
    return parser.parse_args(["--device", "cpu", *map(str, arguments)])


# ---- the command line ----------------------------------------------------------------------------


def test_the_flags_of_every_evaluation():
    args = parse()
    assert args.init == ["out/base"]
    assert (args.batch_size, args.json, args.plot, args.scale) == (None, None, None, None)
    args = parse("--init", "a", "b,c", "--batch_size", 3, "--json", "x.json", "--plot", "x.svg")
    assert args.init == ["a", "b,c"]  # several are given with spaces; a comma belongs to the name
    assert (args.batch_size, args.json.name, args.plot.name) == (3, "x.json", "x.svg")
    without_picture = evaluation.evaluation_parser("Evaluates.", plot=False)
    assert not hasattr(without_picture.parse_args([]), "plot")


def test_configs_are_read_as_the_flags_extend_them(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    configs = evaluation.read_configs(parse("--init", "base", "pi"))
    assert [(config.rope, config.block_size) for config in configs] == [
        ("none", 64),
        ("linear", 128),
    ]
    [config] = evaluation.read_configs(parse("--init", "base", "--scale", 4, "--rope", "yarn"))
    assert (config.rope, config.scale, config.block_size) == ("yarn", 4, 256)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--init", "base", "nowhere"], "nowhere"),
        (["--init", "base", "--scale", "0.5"], "base: "),
        (
            ["--init", "base", "pi", "--rope", "none"],
            "pi: ",
        ),  # of several, the one that can't be so
        (["--init", "base", "--rope", "alibi"], "alibi"),
        (["--init", "base", "--device", "abacus"], "--device abacus can't be used here"),
        (["--init", "base", "--batch_size", "0"], "argument --batch_size: must be a whole number"),
    ],
)
def test_wrong_flags_are_refused_before_the_work(folder, monkeypatch, command, arguments, says):
    monkeypatch.chdir(folder)

    def script() -> None:
        evaluation.read_configs(parse(*arguments))

    assert_refused(command(script), "test_evaluation.py", says)


@pytest.mark.parametrize(
    "rope, scale, window, remedy",
    [
        ("none", 1.0, 65, "--scale 2 interpolates to it, --scale 2 --rope none extrapolates"),
        ("none", 1.0, 256, "--scale 4 interpolates to it, --scale 4 --rope none extrapolates"),
        ("linear", 2.0, 200, "--scale 4 allows it"),
        ("none", 2.0, 129, "--scale 3 allows it"),
    ],
)
def test_a_window_beyond_the_checkpoints_is_refused_with_a_remedy(rope, scale, window, remedy):
    largest = int(64 * scale)
    config = LLaMAConfig(block_size=largest, original_window=64, rope=rope, scale=scale)
    evaluation.check_window("x", config, largest, "--windows")
    with pytest.raises(ValueError) as caught:
        evaluation.check_window("x", config, window, "--windows")
    expected = f"--windows {window} is beyond the window of x, {largest}: {remedy}"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "name, flags, method",
    [
        ("base", [], "not extended"),
        ("base", ["--scale", 1], "not extended"),
        ("base", ["--scale", 2, "--rope", "none"], "extrapolated"),
        ("base", ["--scale", 2], "PI, no fine-tuning"),
        ("base", ["--scale", 2, "--rope", "yarn"], "YaRN, no fine-tuning"),
        ("base", ["--scale", 2, "--rope", "dynamic"], "dynamic NTK"),
        ("pi", [], "PI"),
        ("pi", ["--scale", 2], "PI"),
        ("pi", ["--scale", 4], "PI, no fine-tuning"),
        ("direct", [], "direct fine-tuning"),
        ("direct", ["--scale", 4, "--rope", "none"], "extrapolated"),
    ],
)
def test_a_method_is_named_by_what_was_done(folder, name, flags, method):
    args = parse("--init", folder / name, *flags)
    [config] = evaluation.read_configs(args)
    facts = evaluation.model_facts(args, args.init[0], config)
    assert facts["method"] == method
    assert method.removesuffix(plots.UNTUNED) in plots.LOOKS
    assert (facts["rope"], facts["scale"]) == (config.rope, config.scale)


def test_a_checkpoint_is_opened_as_the_flags_extend_it(folder, tok):
    args = parse("--init", folder / "base", "--scale", 4, "--dtype", "bfloat16")
    model, tokenizer = evaluation.open_checkpoint(args, args.init[0])
    assert (model.config.rope, model.config.scale, model.training) == ("linear", 4, False)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert tokenizer.fingerprint == tok.fingerprint


# ---- where results go ----------------------------------------------------------------------------


def test_a_checkpoints_results_go_into_its_folder_or_beside_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pi").mkdir(parents=True)
    assert str(evaluation.results_folder("runs/pi")) == "runs/pi"
    assert str(evaluation.results_folder("owner/Name-7b")) == "out/Name-7b"
    assert str(evaluation.results_folder("owner/Name-7b@main")) == "out/Name-7b"


@pytest.mark.parametrize(
    "init, stem, steps",
    [
        (["a"], "a/ppl", []),
        (["a", "out/b"], "ppl", []),
        (["out/b", "a"], "out/ppl", []),
        (["owner/Name-7b@main"], "out/Name-7b/ppl", []),
        (["owner/Name-7b", "a"], "out/ppl", []),
        (["a/step-10"], "a/step-10/ppl", []),
        # Those over the steps of one run go into the run's folder, where ppl.json is the run's own
        (["a/step-10", "a/step-0"], "a/ppl_steps", [10, 0]),
        (["a/step-10", "out/b/step-0"], "ppl_steps", [10, 0]),
        (["out/b/step-10", "a/step-0"], "out/ppl_steps", [10, 0]),
    ],
)
def test_results_go_beside_the_checkpoint(tmp_path, monkeypatch, init, stem, steps):
    monkeypatch.chdir(tmp_path)
    for name in ("a/step-0", "a/step-10", "out/b/step-0", "out/b/step-10"):
        (tmp_path / name).mkdir(parents=True)
    args = parse("--init", *init)
    assert evaluation.choose_outputs(args, "ppl") == steps
    assert (str(args.json), str(args.plot)) == (f"{stem}.json", f"{stem}.png")


def test_outputs_that_are_given_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse("--init", "owner/name", "--plot", "here.svg")
    evaluation.choose_outputs(args, "ppl")
    assert (str(args.json), str(args.plot)) == ("out/name/ppl.json", "here.svg")


def test_a_default_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "run" / "ppl.png").mkdir(parents=True)
    args = parse("--init", tmp_path / "run")
    with pytest.raises(ValueError) as caught:
        evaluation.choose_outputs(args, "ppl")
    expected = f"{tmp_path}/run/ppl.png can't be written: give --plot, a file in a folder that can"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "flag, name, content, refused",
    [
        ("--json", "x.json", '{"windows": []}', False),
        ("--json", "x.json", '[{"windows": []}, {"windows": []}]', False),
        ("--json", "x.json", "", False),
        ("--json", "x.json", '{"points": []}', True),  # of passkey.py
        ("--json", "config.json", '{"model_type": "llama"}', True),
        ("--json", "x.json", "notes", True),
        ("--json", "x.json", "[1, 2]", True),
        ("--plot", "x.png", "a photograph", True),
    ],
)
def test_what_is_no_earlier_result_is_not_overwritten(tmp_path, flag, name, content, refused):
    path = tmp_path / name
    path.write_text(content)
    args = parse("--init", tmp_path, flag, path)
    if not refused:
        evaluation.choose_outputs(args, "ppl")
        return
    with pytest.raises(ValueError) as caught:
        evaluation.choose_outputs(args, "ppl")
    assert str(caught.value).startswith(f"{flag} {path} holds something else than")


@pytest.mark.parametrize("suffix", cli.PICTURES)
def test_an_earlier_picture_is_replaced(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    figure, _ = plots.new_figure(1)
    plots.save_figure(figure, path)
    evaluation.choose_outputs(parse("--init", tmp_path, "--plot", path), "ppl")


def test_one_result_is_written_by_itself():
    assert evaluation.one_or_all([{"a": 1}]) == {"a": 1}
    assert evaluation.one_or_all([{"a": 1}, {"a": 2}]) == [{"a": 1}, {"a": 2}]


# ---- results over fine-tuning steps --------------------------------------------------------------


@pytest.mark.parametrize(
    "names, steps",
    [
        (["a/step-0", "a/step-200", "b/step-1000/"], [0, 200, 1000]),
        (["a/step-10", "a/step-9"], [10, 9]),  # as the shell has them
        (["a/step-0", "a"], []),
        (["a/step-0", "a/step-last"], []),
        (["a/step-0", "a/step-1.5"], []),
        (["a/step-0", "a/step-1/model"], []),
        (["a/step-5"], []),
        (["a/step-5", "b/step-5"], []),
    ],
)
def test_what_is_taken_for_results_over_steps(names, steps):
    assert evaluation.steps_of(names) == steps


def result(init: str, method: str, scale: float, found: dict[int, float]) -> dict:
    steps = int(init.split("-")[1])
    return {"init": init, "method": method, "scale": scale, "steps": steps, "found": found}


RESULTS = [
    result("PI/step-0", "PI", 2, {64: 9.0, 128: 60.0}),
    result("PI/step-100", "PI", 2, {64: 6.5, 128: 6.0}),
    result("PI/step-31", "PI", 2, {64: 7.0}),
    result("no/step-31", "not extended", 1, {128: 8.0}),
]


def test_curves_are_one_for_each_run_and_window():
    curves = evaluation.curves_over_steps(RESULTS, lambda result: result["found"])
    assert curves == [
        Curve("PI (PI, scale 2)", 64, {0: 9.0, 100: 6.5, 31: 7.0}, "PI"),
        Curve("PI (PI, scale 2)", 128, {0: 60.0, 100: 6.0}, "PI"),
        Curve("no", 128, {31: 8.0}, "not extended"),
    ]
    assert RESULTS[0]["init"] == "PI/step-0"  # the results themselves stay as they are


def test_the_table_has_a_column_for_each_step_in_the_order_of_numbers():
    curves = evaluation.curves_over_steps(RESULTS, lambda result: result["found"])
    lines = evaluation.table_over_steps(curves, "window").split("\n")
    assert lines[0] == "run               window  step 0  step 31  step 100"
    assert lines[2:] == [
        "PI (PI, scale 2)      64     9.0      7.0       6.5",
        "PI (PI, scale 2)     128    60.0        -       6.0",
        "no                   128       -      8.0         -",
    ]


# ---- batches -------------------------------------------------------------------------------------


def batches_by_brute_force(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """The numbers of the items in batches: for each length, as many as the limit allows."""
    batches = []
    for length in sorted(set(lengths)):
        equal = [i for i, other in enumerate(lengths) if other == length]
        size = max(1, batch_tokens // length)
        for start in range(0, len(equal), size):
            batches.append(equal[start : start + size])
    return batches


@pytest.mark.parametrize("batch_tokens", [1, 7, 12, 40, 10**6])
@pytest.mark.parametrize("seed", range(8))
def test_batches_of_equal_length_are_those_of_brute_force(seed, batch_tokens):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 60))]
    items = list(range(len(lengths)))
    batches = list(evaluation.batches_of_equal_length(items, lengths.__getitem__, batch_tokens))
    assert batches == batches_by_brute_force(lengths, batch_tokens)

    # What the docstring promises, one by one
    assert sorted(item for batch in batches for item in batch) == items
    batch_lengths = [lengths[batch[0]] for batch in batches]
    assert batch_lengths == sorted(batch_lengths)
    for batch, length in zip(batches, batch_lengths):
        assert all(lengths[item] == length for item in batch)
        assert len(batch) == 1 or len(batch) * length <= batch_tokens


def test_no_items_are_no_batches():
    assert list(evaluation.batches_of_equal_length([], len, 100)) == []


def test_the_items_themselves_are_never_compared():
    items = [{"text": "bb"}, {"text": "a"}, {"text": "cc"}]
    batches = evaluation.batches_of_equal_length(items, lambda item: len(item["text"]), 4)
    assert list(batches) == [[items[1]], [items[0], items[2]]]


def test_cudnn_attention_is_kept_out_of_evaluation(tmp_path, tok):
    model = random_model(vocab_size=tok.vocab_size)
    checkpoint.save(model, tmp_path, tok)
    torch.backends.cuda.enable_cudnn_sdp(True)
    evaluation.open_checkpoint(parse("--init", str(tmp_path), "--device", "cpu"), str(tmp_path))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
