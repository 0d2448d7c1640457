"""passkey.py: k_max on hand-made tables, retrieval by a model whose reach is known, and the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import data
import passkey
import sequences
from model import LLaMA, LLaMAConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer():
    texts = [sequences.passkey_text(f"{7919 * i % 100000:05d}", i, i) for i in range(12)]
    return data.train_tokenizer(texts, 320)


class Reader:
    """In place of a model: finds the key where it is at most `reach` tokens from the end, and else says another."""

    def __init__(self, tokenizer, reach, answer=" {key}.\nThe grass"):
        self.tokenizer, self.reach, self.answer = tokenizer, reach, answer
        self.config = SimpleNamespace(eos_id=tokenizer.eos_id)
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))
        self.shapes, self.keys, self.ks = [], [], []

    def stream(self, ids, n, eos_id=None):
        assert ids[:, 0].eq(self.tokenizer.bos_id).all() and eos_id == self.tokenizer.eos_id
        self.shapes.append(tuple(ids.shape))
        said = []
        for row in ids.tolist():
            text = self.tokenizer.decode(row)
            assert text.startswith(sequences.TASK) and text.endswith(sequences.QUESTION)
            key = re.search(r"The pass key is ([0-9]{5})\. Remember it\. \1 is the pass key\.", text)
            k = len(row) - 1 - len(self.tokenizer.encode(text[: key.start()]))
            self.keys.append(key[1])
            self.ks.append(k)
            answer = self.answer.format(key=key[1] if k <= self.reach else f"{(int(key[1]) + 1) % 100000:05d}")
            said.append(self.tokenizer.encode(answer)[:n])
        longest = max(map(len, said))
        for step in range(longest):
            yield torch.tensor([row[step] if step < len(row) else eos_id for row in said])


# ---- k_max


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
    assert passkey.k_max([{"k": k, "success": success} for k, success in table.items()]) == expected


@pytest.mark.parametrize("tries", [5, 10, 15, 20, 25, 30, 35, 50])
def test_one_in_five_is_enough_in_any_number_of_tries(tries):
    points = [{"k": 1, "success": tries // 5 / tries}, {"k": 2, "success": (tries // 5 - 1) / tries}]
    assert passkey.k_max(points) == 1


def test_distances():
    assert passkey.distances(8192) == list(range(256, 8193, 256))  # the paper's
    assert passkey.distances(100, 3) == [33, 67, 100] and passkey.distances(4, 8) == [1, 2, 3, 4]


# ---- answers


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
    """And stop early without changing what counts."""
    model = make(tokenizer)
    prompts = torch.randint(2, 300, (6, 40), generator=torch.Generator().manual_seed(0))
    texts = passkey.answers(model, tokenizer, prompts)
    for row, text in zip(prompts, texts):
        whole = model.generate(row[None], passkey.ANSWER_TOKENS, eos_id=tokenizer.eos_id)[0, 40:].tolist()
        whole = whole[: whole.index(tokenizer.eos_id)] if tokenizer.eos_id in whole else whole
        assert tokenizer.decode(whole).startswith(text)


def test_decoding_stops_once_all_have_answered(tokenizer):
    class Endless(Reader):
        steps = 0

        def stream(self, *args, **options):
            for token in super().stream(*args, **options):
                self.steps += 1
                yield token

    model = Endless(tokenizer, 10**6)
    prompt = sequences.passkey_prompt(tokenizer, 200, 100, "00417")
    assert passkey.answers(model, tokenizer, torch.tensor([prompt.ids])) == [" 00417"]
    assert model.steps == len(tokenizer.encode(" 00417"))


# ---- retrieval


@pytest.mark.parametrize("reach", [0, 130, 180, 10**6])
def test_success_is_the_models_reach(tokenizer, reach):
    model = Reader(tokenizer, reach)
    points = passkey.retrieve(model, tokenizer, 256, passkey.distances(256, 16), tries=4)
    assert [p["k"] for p in points] == [k for k in passkey.distances(256, 16) if k >= points[0]["k"]]
    assert len(model.keys) == 4 * len(points)
    for point in points:
        assert point["success"] == (point["k_actual"] <= reach) == point["hits"] / 4 and point["tries"] == 4
        assert point["length"] <= 256 - passkey.ANSWER_TOKENS
    inside = [p["k"] for p in points if p["k_actual"] <= reach]
    assert passkey.k_max(points) == (max(inside) if inside else 0)


def test_prompt_and_answer_fill_the_window_and_no_more(tokenizer):
    model = Reader(tokenizer, 10**6)
    points = passkey.retrieve(model, tokenizer, 300, [100, 150, 200, 300], tries=3)
    lengths = [length for batch, length in model.shapes for _ in range(batch)]
    assert 300 - 30 < min(lengths) and max(lengths) <= 300 - passkey.ANSWER_TOKENS
    sentence = max(len(tokenizer.encode(" " + s)) for s in sequences.SENTENCES)
    assert all(abs(p["k"] - p["k_actual"]) <= sentence for p in points[:3])
    assert {float(k) for k in model.ks} == {p["k_actual"] for p in points}  # as the prompts themselves say


def test_keys_come_from_seed_length_and_k(tokenizer):
    def keys(ks, seed=0, length=256, batch_tokens=10**6):
        model = Reader(tokenizer, 150)
        points = passkey.retrieve(model, tokenizer, length, ks, 5, seed, batch_tokens=batch_tokens)
        return points, set(model.keys)

    assert keys([100, 200]) == keys([100, 200]) == keys([100, 200], batch_tokens=1)
    assert len(keys([100, 200])[1]) == 10  # each prompt has its own
    assert keys([100])[1] < keys([100, 200])[1] and keys([100])[0] == keys([100, 200])[0][:1]
    assert not keys([100])[1] & keys([100], seed=1)[1] and not keys([100])[1] & keys([100], length=300)[1]


def test_zeros_in_front_belong_to_the_key(tokenizer, monkeypatch):
    monkeypatch.setattr(passkey, "random_key", lambda rng: "00007")
    answers = {" {key}": 1, " 7": 0, " 07": 0, " 0000": 0, " 00007 00008": 1, " 00008 00007": 0}
    for answer, success in answers.items():
        points = passkey.retrieve(Reader(tokenizer, 10**6, answer), tokenizer, 200, [120], tries=2)
        assert points[0]["success"] == success, answer


def test_too_small_a_k_is_left_out(tokenizer):
    model = Reader(tokenizer, 10**6)
    points = passkey.retrieve(model, tokenizer, 256, [1, 8, 128], tries=2)
    assert [p["k"] for p in points] == [128] and passkey.k_max(points) == 128
    assert passkey.retrieve(model, tokenizer, 20, [5, 20], tries=2) == []


# ---- the command line


def make(tokenizer, **changes):
    """A small model with random weights everywhere (a new one's head is zero)."""
    torch.manual_seed(0)
    shape = dict(vocab_size=320, n_layer=2, n_head=2, n_embd=32, intermediate_size=48, block_size=256)
    model = LLaMA(LLaMAConfig(**shape | changes, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Two checkpoints: `base`, and `pi`, its window extended twofold."""
    folder = tmp_path_factory.mktemp("passkey")
    checkpoint.save(make(tokenizer), folder / "base", tokenizer)
    checkpoint.save(checkpoint.load(folder / "base", scale=2), folder / "pi", tokenizer)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys, tmp_path):
    """Run the script in this process, with results in tmp_path: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["passkey.py"])

    def run(*args, outputs=True):
        where = ["--json", str(tmp_path / "k.json"), "--plot", str(tmp_path / "k.png")] if outputs else []
        try:
            checkpoint.run(lambda: passkey.main(["--device", "cpu", *args, *where]))
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_the_script_from_end_to_end(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "passkey.py", "--init", "base", "--distances", "8", "--tries", "2"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "base/passkey.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "base/passkey.json").read_text())
    assert {"init": "base", "rope": "none", "scale": 1, "window": 256, "tries": 2, "k_max": 0}.items() <= result.items()
    assert result["skipped"] == [32] and "k = 32 left out" in done.stderr
    assert [p["k"] for p in result["points"]] == list(range(64, 257, 32))
    for point in result["points"]:
        assert {"k", "success", "k_actual", "length"} <= set(point) and 0 <= point["success"] <= 1
        assert re.search(rf"^ *{point['k']} +0%$", done.stdout, re.M)


def test_a_model_that_knows_is_seen_to_know(run, tmp_path, tokenizer, monkeypatch):
    """The script's k_max with a model of known reach in place of the checkpoint's."""
    monkeypatch.setattr(passkey, "open_checkpoint", lambda args, name: (Reader(tokenizer, 300), tokenizer))
    code, out, err = run("--init", "base", "--scale", "2", "--tries", "2")
    result = json.loads((tmp_path / "k.json").read_text())
    assert code == 0 and (result["rope"], result["scale"], result["window"]) == ("linear", 2, 512)
    inside = [p["k"] for p in result["points"] if p["k_actual"] <= 300]
    assert result["k_max"] == max(inside) and abs(result["k_max"] - 300) < 40
    assert out.splitlines()[-2].split()[-1] == str(result["k_max"])


@pytest.mark.parametrize("init", [["base"], ["base", "pi"], ["base,pi"]])
@pytest.mark.parametrize("lengths", [[], ["--lengths", "160,256"]])
def test_curves_and_heat_maps_side_by_side(run, tmp_path, init, lengths):
    code, out, _ = run("--init", *init, *lengths, "--distances", "4", "--tries", "1")
    assert code == 0 and (tmp_path / "k.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "k.json").read_text())
    results = result if isinstance(result, list) else [result]
    assert [r["init"] for r in results] == ",".join(init).split(",")
    assert [r["window"] for r in results] == [256 if lengths or r["init"] == "base" else 512 for r in results]
    for r in results:
        assert [run["length"] for run in r["lengths"]] == ([160, 256] if lengths else [r["window"]])
        assert r["lengths"][-1]["points"] == r["points"]
    assert len(re.findall(r"^(?:base|pi) ", out, re.M)) == len(results) * (2 if lengths else 1)


@pytest.mark.parametrize("lengths", [[], ["--lengths", "256,512"]])
def test_over_steps(run, folder, tmp_path, tokenizer, monkeypatch, lengths):
    """The paper's table 4: a row for each run (and length), a column for each step, k_max in it."""
    reach = {"PI/step-0": 0, "PI/step-9": 300, "PI/step-10": 10**6, "direct/step-9": 200}
    init = sorted(f"{tmp_path}/{name}" for name in reach)  # step-10 before step-9
    for name in reach:
        method = "none" if "direct" in name else "linear"
        checkpoint.save(checkpoint.load(folder / "base", scale=2, rope=method), tmp_path / name, tokenizer)
    known = {f"{tmp_path}/{name}": (Reader(tokenizer, k), tokenizer) for name, k in reach.items()}
    monkeypatch.setattr(passkey, "open_checkpoint", lambda args, name: known[name])
    code, out, err = run("--init", *init, *lengths, "--distances", "16", "--tries", "2")
    assert code == 0, err
    results = json.loads((tmp_path / "k.json").read_text())
    order = [(Path(r["init"]).parent.name, r["steps"]) for r in results]
    assert order == [("PI", 0), ("PI", 10), ("PI", 9), ("direct", 9)]
    best = {(r["rope"], r["steps"], of["length"]): of["k_max"] for r in results for of in r["lengths"]}
    assert best["linear", 0, 512] == 0 and best["linear", 10, 512] == 512
    assert 0 < best["none", 9, 512] < best["linear", 9, 512] < 512
    lines = [line.replace("(linear, scale 2)", "").replace("(none, scale 2)", "").split() for line in out.splitlines()]
    for length in (256, 512) if lengths else (512,):
        row = [f"{tmp_path}/PI", str(length)]
        assert [*row, *(str(best["linear", steps, length]) for steps in (0, 9, 10))] in lines
        assert [f"{tmp_path}/direct", str(length), "-", str(best["none", 9, length]), "-"] in lines
    assert (tmp_path / "k.png").stat().st_size > 10_000


def test_the_picture_over_steps():
    _, (axis,) = passkey.new_figure(1)
    passkey.draw_over_steps(axis, [("PI", 512, {0: 0, 200: 512})], [{"original_window": 256}])
    curve, original = axis.lines
    assert [list(values) for values in curve.get_data()] == [[0, 200], [0, 512]]
    assert list(original.get_ydata()) == [256, 256]
    assert axis.get_ylim()[0] < 0 and axis.get_ylim()[1] > 512  # neither end hides a point


def test_the_heat_map_shows_the_points():
    tables = {128: (64, {64: 0.5, 96: 0.1, 128: 1.0}), 250: (188, {62: 0.25, 188: 0.75})}
    runs = [
        {"length": length, "k_max": best, "points": [{"k": k, "success": success} for k, success in found.items()]}
        for length, (best, found) in tables.items()
    ]
    result = {"init": "x", "rope": "none", "scale": 1, "original_window": 128, "distances": 4, "lengths": runs}
    figure, (axis,) = passkey.new_figure(1)
    grid = passkey.draw_heat_map(axis, result).get_array().filled(-1)
    assert grid.tolist() == [[-1, 0.25], [0.5, -1], [0.1, 0.75], [1, -1]]


@pytest.mark.parametrize(
    "args, says",
    [
        (["--init", "nowhere"], "nowhere"),
        (["--init", "base", "nowhere"], "nowhere"),
        (["--lengths", "512"], "--scale 2 interpolates to it, --scale 2 --rope none extrapolates"),
        (["--init", "pi", "--lengths", "256,1024"], "--scale 4 allows it"),
        (["--lengths", "0"], "--lengths"),
        (["--lengths", "half"], "half"),
        (["--tries", "0"], "--tries"),
        (["--distances", "0"], "--distances"),
        (["--scale", "-1"], "scale"),
        (["--rope", "alibi"], "alibi"),
        (["--batch_size", "0"], "--batch_size"),
        (["--plot", "k"], ".png"),
        (["--json", "base"], "--json"),
        (["--lengths", "40"], "40 tokens are too few"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, folder, args, says):
    before = sorted(folder.rglob("*"))
    code, out, err = run("--init", "base", *args, outputs=False)
    assert sorted(folder.rglob("*")) == before  # nothing is written
    assert code == 2 and out == ""
    assert err.startswith("passkey.py: error: ") and err.count("\n") == 1 and says in err
