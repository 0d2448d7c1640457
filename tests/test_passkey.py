"""passkey.py: k_max, retrieval by a model whose reach is known, and the command line."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import passkey
import prompts
from conftest import assert_refused, random_model
from tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = 10**6  # a reach beyond any prompt


@pytest.fixture(scope="module")
def tokenizer():
    texts = [prompts.passkey_text(f"{7919 * i % 100000:05d}", i, i) for i in range(12)]
    return train_tokenizer(texts, 320)


def in_a_sentence(key: str) -> str:
    return f" {key}.\nThe grass"


class Reader:
    """In place of a model: tells the key at up to `reach` tokens from the end, else another one.

    answer: the text that it says for a key.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reach: int = EVERYTHING,
        answer: Callable[[str], str] = in_a_sentence,
    ) -> None:
        self.tokenizer = tokenizer
        self.reach = reach
        self.answer = answer
        self.config = SimpleNamespace(eos_id=tokenizer.eos_id)
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))
        self.lengths: list[int] = []  # of the prompts that it has read
        self.keys: list[str] = []
        self.ks: list[int] = []
        self.steps = 0  # tokens that it has said to its last prompts

    def read(self, ids: list[int]) -> str:
        """The key that it tells after one prompt."""
        text = self.tokenizer.decode(ids)
        assert text.startswith(prompts.TASK)
        assert text.endswith(prompts.QUESTION)
        line = r"The pass key is ([0-9]{5})\. Remember it\. \1 is the pass key\."
        found = re.search(line, text)
        key = found[1]
        before = self.tokenizer.encode(text[: found.start()])
        k = len(ids) - 1 - len(before)
        self.lengths.append(len(ids))
        self.keys.append(key)
        self.ks.append(k)
        if k <= self.reach:
            return key
        return f"{(int(key) + 1) % 100000:05d}"

    def stream(
        self, ids: torch.Tensor, n: int, eos_id: int | None = None
    ) -> Iterator[torch.Tensor]:
        assert ids[:, 0].eq(self.tokenizer.bos_id).all()
        assert eos_id == self.tokenizer.eos_id
        rows = []
        for row in ids.tolist():
            said = self.tokenizer.encode(self.answer(self.read(row)))[:n]
            rows.append(said + [eos_id] * (n - len(said)))
        self.steps = 0
        for tokens in zip(*rows):
            self.steps += 1
            yield torch.tensor(tokens)


def small_model(tokenizer: Tokenizer):
    return random_model(block_size=256, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


# ---- k_max and the distances ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "table, expected",
    [
        ({}, 0),
        ({32: 1.0, 64: 1.0, 96: 1.0}, 96),
        ({32: 0.0, 64: 0.0, 96: 0.0}, 0),
        ({32: 0.0, 64: 1.0, 96: 1.0}, 0),  # every k' <= k: the smallest fails
        ({32: 1.0, 64: 0.1, 96: 1.0, 128: 1.0}, 32),  # a dip in the middle ends it
        ({32: 1.0, 64: 0.2, 96: 0.3, 128: 0.1}, 96),  # 20% is enough
        ({32: 0.19, 64: 0.9}, 0),
        ({96: 0.9, 128: 0.9, 160: 0.0}, 128),  # 32 and 64 were skipped
        ({128: 0.0, 32: 1.0, 96: 0.5, 64: 0.4}, 96),  # in any order
    ],
)
def test_k_max(table, expected):
    points = [{"k": k, "success": success} for k, success in table.items()]
    assert passkey.k_max(points) == expected


@pytest.mark.parametrize("tries", [5, 10, 15, 20, 25, 30, 35, 50])
def test_one_in_five_is_enough_in_any_number_of_tries(tries):
    enough = tries // 5
    points = [{"k": 1, "success": enough / tries}, {"k": 2, "success": (enough - 1) / tries}]
    assert passkey.k_max(points) == 1


@pytest.mark.parametrize("hits, tries", [(0, 20), (1, 20), (87, 160), (20, 20)])
def test_the_share_of_far_keys_has_wilsons_interval(hits, tries):
    near = {"k": 256, "hits": 5, "tries": 10}  # not beyond 256, so it does not count
    far = [{"k": 257, "hits": hits, "tries": tries}, {"k": 512, "hits": 0, "tries": tries}]
    share = passkey.share_found([near, *far], 256)
    assert share.found == hits / (2 * tries)
    # By definition, its ends are the true shares from which `found` is 1.96 standard errors away
    for end in (share.low, share.high):
        if 0 < end < 1:
            error = math.sqrt(end * (1 - end) / (2 * tries))
            assert abs(share.found - end) == pytest.approx(1.96 * error)
    assert 0 <= share.low <= share.found <= share.high <= 1
    assert passkey.share_found([near], 256) is None


def test_distances():
    assert passkey.distances(8192) == list(range(256, 8193, 256))  # the paper's
    assert passkey.distances(100, 3) == [33, 67, 100]
    assert passkey.distances(4, 8) == [1, 2, 3, 4]


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, right",
    [
        (" 00417", True),
        ("00417", True),
        (" 00417. Remember it.", True),
        ("\n00417", True),
        (" 417", False),  # zeros count
        (" 00418", False),
        (" 0041", False),
        (" 0041 7", False),
        (" key 00417", False),
        ("", False),
        (" ٠٠٤١٧", False),
    ],
)
def test_an_answer_is_right_by_its_first_five_digits(answer, right):
    assert passkey.is_right(answer, "00417") is right


def test_answers_are_those_of_greedy_generation(tokenizer):
    """They may end sooner, because decoding stops when no answer can change any more."""
    model = small_model(tokenizer)
    ids = torch.randint(2, 300, (6, 40), generator=torch.Generator().manual_seed(0))
    texts = passkey.answers(model, tokenizer, ids)
    for row, text in zip(ids, texts, strict=True):
        whole = model.generate(row[None], passkey.ANSWER_TOKENS, eos_id=tokenizer.eos_id)
        new = whole[0, 40:].tolist()
        if tokenizer.eos_id in new:
            new = new[: new.index(tokenizer.eos_id)]
        assert tokenizer.decode(new).startswith(text)


def test_decoding_stops_when_all_have_answered(tokenizer):
    model = Reader(tokenizer)
    prompt = prompts.passkey_prompt(tokenizer, 200, 100, "00417")
    assert passkey.answers(model, tokenizer, torch.tensor([prompt.ids])) == [" 00417"]
    assert model.steps == len(tokenizer.encode(" 00417"))


# ---- retrieval -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [0, 130, 180, EVERYTHING])
def test_success_is_the_models_reach(tokenizer, reach):
    model = Reader(tokenizer, reach)
    ks = passkey.distances(256, 16)
    points = passkey.retrieve(model, tokenizer, 256, ks, tries=4)
    assert [point["k"] for point in points] == [k for k in ks if k >= points[0]["k"]]
    assert len(model.keys) == 4 * len(points)
    inside = []
    for point in points:
        assert point["success"] == (point["k_actual"] <= reach)
        assert point["hits"] == 4 * point["success"]
        assert point["tries"] == 4
        assert point["length"] <= 256 - passkey.ANSWER_TOKENS
        if point["success"]:
            inside.append(point["k"])
    assert passkey.k_max(points) == max(inside, default=0)


def test_prompt_and_answer_fill_the_window_and_no_more(tokenizer):
    model = Reader(tokenizer)
    points = passkey.retrieve(model, tokenizer, 300, [100, 150, 200, 300], tries=3)
    assert 300 - 30 < min(model.lengths)
    assert max(model.lengths) <= 300 - passkey.ANSWER_TOKENS
    # Filler comes in whole sentences, so k may be off by one; the results tell the k of the prompts
    sentences = re.split(r"(?<=\.) ", prompts.FILLER)
    longest = max(len(tokenizer.encode(" " + sentence)) for sentence in sentences)
    for point in points[:3]:
        assert abs(point["k"] - point["k_actual"]) <= longest
    assert {float(k) for k in model.ks} == {point["k_actual"] for point in points}


def test_keys_come_from_seed_length_and_k(tokenizer):
    def asked(ks, seed=0, length=256, batch_tokens=10**6) -> tuple[list[dict], set[str]]:
        model = Reader(tokenizer, reach=150)
        points = passkey.retrieve(model, tokenizer, length, ks, 5, seed, batch_tokens=batch_tokens)
        return points, set(model.keys)

    both = asked([100, 200])
    assert both == asked([100, 200]) == asked([100, 200], batch_tokens=1)
    assert len(both[1]) == 10  # each prompt has its own key
    # Whatever else is tested, the keys of a distance stay
    points, keys = asked([100])
    assert points == both[0][:1]
    assert keys < both[1]
    assert not keys & asked([100], seed=1)[1]
    assert not keys & asked([100], length=300)[1]


@pytest.mark.parametrize(
    "answer, success",
    [
        (lambda key: key, 1),
        (lambda key: f" {key} 00008", 1),
        (lambda key: f" 00008 {key}", 0),
        (lambda key: f" {key[:4]}", 0),
        (lambda key: "", 0),
    ],
)
def test_the_answer_must_begin_with_the_key(tokenizer, answer, success):
    model = Reader(tokenizer, answer=answer)
    [point] = passkey.retrieve(model, tokenizer, 200, [120], tries=2)
    assert point["success"] == success


def test_zeros_at_the_front_belong_to_the_key(tokenizer):
    model = Reader(tokenizer, answer=lambda key: f" {int(key)}.")
    [point] = passkey.retrieve(model, tokenizer, 200, [120], tries=60)
    with_zeros = [key for key in model.keys if key.startswith("0")]
    assert 0 < len(with_zeros) < 60
    assert point["hits"] == 60 - len(with_zeros)


def test_a_k_that_is_too_small_is_left_out(tokenizer):
    model = Reader(tokenizer)
    points = passkey.retrieve(model, tokenizer, 256, [1, 8, 128], tries=2)
    assert [point["k"] for point in points] == [128]
    assert passkey.k_max(points) == 128
    assert passkey.retrieve(model, tokenizer, 20, [5, 20], tries=2) == []


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Two checkpoints: `base`, and `pi`, its window extended twofold."""
    folder = tmp_path_factory.mktemp("passkey")
    checkpoint.save(small_model(tokenizer), folder / "base", tokenizer)
    checkpoint.save(checkpoint.load(folder / "base", scale=2), folder / "pi", tokenizer)
    return folder


@pytest.fixture
def run(folder, monkeypatch, command, tmp_path):
    """run(*flags) runs the script in `folder`, with its results in tmp_path."""
    monkeypatch.chdir(folder)

    def call(*flags: object):
        outputs = ["--json", tmp_path / "k.json", "--plot", tmp_path / "k.png"]
        return command(passkey.main, "--device", "cpu", *outputs, *flags)

    return call


def test_the_script_from_end_to_end(folder):
    line = [sys.executable, ROOT / "passkey.py", "--init", "base"]
    line += ["--distances", "8", "--tries", "2"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "base/passkey.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "base/passkey.json").read_text())
    expected = {"init": "base", "rope": "none", "scale": 1, "window": 256, "tries": 2, "k_max": 0}
    assert expected.items() <= result.items()
    assert result["skipped"] == [32]
    assert "k = 32 left out" in done.stderr
    assert [point["k"] for point in result["points"]] == list(range(64, 257, 32))
    for point in result["points"]:
        assert {"k", "success", "k_actual", "length"} <= set(point)
        assert 0 <= point["success"] <= 1
        assert re.search(rf"^ *{point['k']} +0%$", done.stdout, re.M)


def test_a_model_that_knows_is_seen_to_know(run, tmp_path, tokenizer, monkeypatch):
    """The script reports the reach of a model that takes the place of the checkpoint's."""
    reader = Reader(tokenizer, reach=300)
    reader.config = checkpoint.read_config("base", scale=2)
    monkeypatch.setattr(passkey, "open_checkpoint", lambda args, name: (reader, tokenizer))
    ended = run("--init", "base", "--scale", "2", "--tries", "2")
    assert ended.code == 0, ended.error
    result = json.loads((tmp_path / "k.json").read_text())
    assert (result["rope"], result["scale"], result["window"]) == ("linear", 2, 512)
    inside = [point["k"] for point in result["points"] if point["k_actual"] <= 300]
    assert result["k_max"] == max(inside)
    assert abs(result["k_max"] - 300) < 40
    table_row = ended.out.splitlines()[-2]
    assert table_row.split()[-1] == str(result["k_max"])


@pytest.mark.parametrize("init", [["base"], ["base", "pi"]])
@pytest.mark.parametrize("lengths", [[], ["160,256"], ["256", "160"]])
def test_one_length_or_several_side_by_side(run, tmp_path, init, lengths):
    flags = ["--init", *init, "--distances", "4", "--tries", "1"]
    if lengths:
        flags += ["--lengths", *lengths]
    ended = run(*flags)
    assert ended.code == 0, ended.error
    assert (tmp_path / "k.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "k.json").read_text())
    if len(init) == 1:
        results = [results]
    assert [result["init"] for result in results] == init
    for result in results:
        tested = [at_length["length"] for at_length in result["lengths"]]
        if lengths:
            assert tested == [160, 256]
        else:  # the window in force
            assert tested == [{"base": 256, "pi": 512}[result["init"]]]
        # The figures of the longest stand at the top level
        assert result["window"] == tested[-1]
        assert result["points"] == result["lengths"][-1]["points"]
        assert result["k_max"] == result["lengths"][-1]["k_max"]
        rows = re.findall(rf"^{result['init']} ", ended.out, re.M)
        assert len(rows) == len(tested)


@pytest.mark.parametrize("lengths", [[512], [256, 512]])
def test_over_steps(run, folder, tmp_path, tokenizer, monkeypatch, lengths):
    """The paper's table 4: a row for each run and length, a column for each step, k_max in it."""
    reach = {"PI/step-0": 0, "PI/step-9": 300, "PI/step-10": EVERYTHING, "direct/step-9": 200}
    known = {}
    for name, k in reach.items():
        rope = "none" if "direct" in name else "linear"
        model = checkpoint.load(folder / "base", scale=2, rope=rope)
        checkpoint.save(model, tmp_path / name, tokenizer)
        reader = Reader(tokenizer, reach=k)
        reader.config = model.config
        known[f"{tmp_path}/{name}"] = (reader, tokenizer)
    monkeypatch.setattr(passkey, "open_checkpoint", lambda args, name: known[name])
    init = sorted(known)
    flags = ["--distances", "16", "--tries", "2"]
    if len(lengths) > 1:
        flags += ["--lengths", *lengths]
    ended = run("--init", *init, *flags)
    assert ended.code == 0, ended.error

    # The results are in the order of --init: step-10 before step-9
    results = json.loads((tmp_path / "k.json").read_text())
    assert [result["init"] for result in results] == init
    assert [result["steps"] for result in results] == [0, 10, 9, 9]
    best = {}
    for result in results:
        for at_length in result["lengths"]:
            best[result["rope"], result["steps"], at_length["length"]] = at_length["k_max"]
    assert best["linear", 0, 512] == 0
    assert best["linear", 10, 512] == 512
    assert 0 < best["none", 9, 512] < best["linear", 9, 512] < 512

    rows = [re.split("  +", line) for line in ended.out.splitlines()]
    assert ["run", "length", "step 0", "step 9", "step 10"] in rows
    for length in lengths:
        row = [f"{tmp_path}/PI (PI, scale 2)", str(length)]
        row += [str(best["linear", steps, length]) for steps in (0, 9, 10)]
        assert row in rows
        row = [f"{tmp_path}/direct (direct fine-tuning, scale 2)", str(length)]
        row += ["-", str(best["none", 9, length]), "-"]
        assert row in rows
    # Below it the same table with the share of keys found beyond the window of 256
    after = ended.out.split("found beyond the original window")[1]
    if lengths == [512]:
        assert re.search(r"PI, scale 2\) +512 +0.0% \(0% to 19%\) .* 100.0% \(81% to 100%\)", after)
    assert (tmp_path / "k.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--init", "nowhere"], "nowhere"),
        (["--init", "base", "nowhere"], "nowhere"),
        (["--init", "base,pi"], "base,pi"),  # several are given with spaces
        (["--lengths", "512"], "--lengths 512 is beyond the window of base, 256: --scale 2 interp"),
        (["--init", "pi", "--lengths", "256,1024"], "--scale 4 allows it"),
        (["--lengths", "0"], "--lengths takes whole numbers of at least 1, got '0'"),
        (["--lengths", "half"], "--lengths takes whole numbers of at least 1, got 'half'"),
        (["--tries", "0"], "argument --tries: must be a whole number of at least 1, got 0"),
        (["--distances", "0"], "argument --distances: must be a whole number of at least 1, got 0"),
        (["--scale", "-1"], "scale"),
        (["--rope", "alibi"], "alibi"),
        (["--batch_size", "0"], "argument --batch_size: must be a whole number of at least 1"),
        (["--plot", "k"], "argument --plot: k must end in .png or .svg or .pdf"),
        (["--json", "base"], "argument --json: base must end in .json"),
        (["--lengths", "40"], "base: 40 tokens are too few for prompt and answer"),
    ],
)
def test_bad_input_is_refused(folder, monkeypatch, command, arguments, says):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    ended = command(passkey.main, "--device", "cpu", "--init", "base", *arguments)
    assert_refused(ended, "passkey.py", says)
    assert sorted(folder.rglob("*")) == before  # nothing is written
