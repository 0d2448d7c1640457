"""weights.py: every form of weights is read; a damaged or hostile file is an error of one line."""

import hashlib
import http.server
import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from checkpoint import INDEX, load, save
from checkpoints import (
    IDS,
    META_FAMILIES,
    Bomb,
    assert_load_refuses,
    assert_same_logits,
    edit_json,
    run_python,
    write_hugging_face,
    write_hugging_face_for_meta,
    write_meta,
)
from weights import is_meta, read_params, resolve, stored_tensors


@pytest.fixture
def folder(tmp_path) -> Path:
    write_hugging_face(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path) -> Path:
    write_hugging_face(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def write_bin(folder: Path, state: dict, n_files: int = 1) -> None:
    """Put pytorch_model.bin files, the older form, in place of the weights in folder."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    if n_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(n_files):
        file = f"pytorch_model-{number}-of-{n_files}.bin"
        part = {name: state[name] for name in list(state)[number::n_files]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_old_bin(path: Path, content: object) -> None:
    """Write a file in torch.save's format from before PyTorch 1.6, which can't be mapped."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


# ---- Hugging Face folders ------------------------------------------------------------------------


FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "bin of PyTorch 1.5"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, form):
    max_shard_size = "60KB" if form == "sharded safetensors" else "5GB"
    model = write_hugging_face(tmp_path, "linear", max_shard_size=max_shard_size)
    if "bin" in form:
        write_bin(tmp_path, model.state_dict(), n_files=2 if form == "sharded bin" else 1)
    if form == "bin of PyTorch 1.5":
        write_old_bin(tmp_path / "pytorch_model.bin", model.state_dict())
    expected = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    found = stored_tensors(tmp_path)
    assert set(found) == set(expected)
    for name, stored in found.items():
        assert stored.shape == expected[name].shape
        assert torch.equal(stored.read(), expected[name])

    # A checkpoint may be saved over the files that it is still mapped from
    loaded = load(tmp_path)
    save(loaded, tmp_path)
    assert_same_logits(loaded, tmp_path)
    assert {path.name for path in tmp_path.glob("*model*")} == {"model.safetensors"}


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert_load_refuses(folder, "no model.safetensors or pytorch_model.bin")


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_a_truncated_file(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert_load_refuses(folder, "model.safetensors", "download it again")


def test_shards_that_are_missing_damaged_or_swapped(sharded):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    contents = [first.read_bytes(), second.read_bytes()]
    first.unlink()
    assert_load_refuses(sharded, first.name, "missing")
    first.write_bytes(contents[0][:-1])
    assert_load_refuses(sharded, first.name)
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert_load_refuses(sharded, first.name, "lacks the tensor")


def test_an_index_that_is_wrong(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = "model.layers.0.mlp.up_proj.weight"
    other_file = next(file for file in weight_map.values() if file != weight_map[name])

    edit_json(sharded / INDEX, weight_map=weight_map | {name: other_file})
    assert_load_refuses(sharded, other_file, f"lacks the tensor {name}")
    rest = {key: file for key, file in weight_map.items() if key != name}
    edit_json(sharded / INDEX, weight_map=rest)
    assert_load_refuses(sharded, "mlp.up_proj.weight is missing")
    for wrong in (None, [], {name: 3}):
        edit_json(sharded / INDEX, weight_map=wrong)
        assert_load_refuses(sharded, INDEX, "weight_map")
    (sharded / INDEX).write_text("[")
    assert_load_refuses(sharded, INDEX)


@pytest.mark.parametrize(
    "where",
    ["../outside.safetensors", "/{}/outside.safetensors", "a/../../outside.safetensors", "..", "."],
)
def test_an_index_does_not_leave_its_folder(sharded, where):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    file = weight_map["lm_head.weight"]
    shutil.copy(sharded / file, sharded.parent / "outside.safetensors")
    where = where.format(str(sharded.parent).strip("/"))
    for name in weight_map:
        if weight_map[name] == file:
            weight_map[name] = where
    edit_json(sharded / INDEX, weight_map=weight_map)
    assert_load_refuses(sharded, "outside its folder", where)


def test_a_pickle_is_not_run(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    write_bin(folder, state | {"model.bomb": Bomb(tmp_path / "ran")})
    assert_load_refuses(folder, "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert_load_refuses(folder, "pytorch_model.bin")
    write_old_bin(folder / "pytorch_model.bin", state | {"model.bomb": Bomb(tmp_path / "ran")})
    assert_load_refuses(folder, "pytorch_model.bin", "GLOBAL")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model.step": 3}])
def test_a_pickle_of_something_else(folder, content):
    write_bin(folder, content)
    assert_load_refuses(folder, "dictionary of tensors")


@pytest.mark.parametrize("old", [False, True])
def test_a_truncated_pickle(folder, old):
    state = load_file(folder / "model.safetensors")
    write_bin(folder, state)
    path = folder / "pytorch_model.bin"
    if old:
        write_old_bin(path, state)
    whole = path.read_bytes()
    load(folder)
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_load_refuses(folder, "pytorch_model.bin")


PREFIXES = [
    "_orig_mod.",  # torch.compile's
    "module.",  # DistributedDataParallel's
    "base_model.model.",  # PEFT's
    "module._orig_mod.",
    "_orig_mod.module.",
]


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    """Give each tensor of model.safetensors another name."""
    state = load_file(folder / "model.safetensors")
    state = {rename(name): tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_prefix_of_a_wrapper_is_no_part_of_a_name(folder, prefix):
    names = set(stored_tensors(folder))
    rename_tensors(folder, lambda name: prefix + name)
    assert set(stored_tensors(folder)) == names
    load(folder)


def test_a_model_compiled_block_by_block(folder):
    names = set(stored_tensors(folder))
    rename_tensors(folder, lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name))
    assert set(stored_tensors(folder)) == names


@pytest.mark.parametrize("other", ["norm.weight", "module.model.norm.weight"])
def test_two_tensors_of_one_name(folder, other):
    state = load_file(folder / "model.safetensors")
    state[other] = torch.zeros(64)
    save_file(state, folder / "model.safetensors")
    assert_load_refuses(folder, "model.norm.weight", other, "one and the same")


# ---- Meta's folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", META_FAMILIES)
@pytest.mark.parametrize("n_files", [1, 2, 4])
def test_metas_form_is_read(tmp_path, family, n_files):
    model = write_hugging_face_for_meta(tmp_path / "hf", family)
    folder = tmp_path / "meta"
    write_meta(folder, model, n_files, family)
    assert is_meta(folder)
    found = stored_tensors(folder)
    assert found.pop("rope.freqs").shape == (8,)
    expected = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    assert set(found) == set(expected)
    for name, stored in found.items():
        assert stored.shape == expected[name].shape
        assert torch.equal(stored.read(), expected[name])
    with torch.no_grad():
        logits = load(folder)(IDS % 96)
        torch.testing.assert_close(logits, model(IDS % 96).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_files", [1, 2])
def test_metas_head_is_tied_if_it_equals_the_embedding(tmp_path, n_files):
    """So it is in Llama 3.2 1B and 3B. They hold it twice."""
    family = "Llama 3"
    model = write_hugging_face_for_meta(tmp_path / "hf", family, tie_word_embeddings=True)
    write_meta(tmp_path / "meta", model, n_files, family)
    ours = load(tmp_path / "meta")
    assert ours.config.tie_embeddings
    assert ours.config.n_params == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS % 96), model(IDS % 96).logits, rtol=0, atol=1e-4)
    save(ours, tmp_path / "out")
    assert_same_logits(ours, tmp_path / "out", IDS % 96)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_folder_with_config_json_is_not_metas(folder):
    """Some repositories hold both forms; params.json then belongs to files that we do not read."""
    (folder / "params.json").write_text("{}")
    assert not is_meta(folder)
    load(folder)


@pytest.fixture
def meta(tmp_path) -> Path:
    """A Llama 3 in Meta's form, in two files."""
    write_meta(
        tmp_path / "meta", write_hugging_face_for_meta(tmp_path / "hf", "Llama 3"), 2, "Llama 3"
    )
    return tmp_path / "meta"


def test_metas_files_that_are_missing_or_damaged(meta):
    second = meta / "consolidated.01.pth"
    whole = second.read_bytes()
    second.unlink()
    assert_load_refuses(meta, "has shape")  # half of every matrix
    second.write_bytes(whole[: len(whole) // 2])
    assert_load_refuses(meta, "consolidated.01.pth")
    second.rename(meta / "consolidated.02.pth")
    assert_load_refuses(meta, "consolidated.01.pth is missing")
    for path in meta.glob("*.pth"):
        path.unlink()
    assert_load_refuses(meta, "consolidated.00.pth is missing")


def test_metas_files_of_two_models(meta, tmp_path):
    second = meta / "consolidated.01.pth"
    state = torch.load(second)
    without = {name: t for name, t in state.items() if "layers.1.attention.wv" not in name}
    torch.save(without, second)
    assert_load_refuses(meta, "consolidated.01.pth", "layers.1.attention.wv")
    torch.save(state | {"layers.0.attention.wv.weight": torch.zeros(3, 64)}, second)
    assert_load_refuses(meta, "consolidated.01.pth", "layers.0.attention.wv")
    torch.save(state | {"bomb": Bomb(tmp_path / "ran")}, second)
    assert_load_refuses(meta, "consolidated.01.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["layers.0.attention.wq.bias", "something"])
def test_a_tensor_that_no_llama_has(meta, name):
    for path in meta.glob("*.pth"):
        torch.save(torch.load(path) | {name: torch.zeros(32)}, path)
    assert_load_refuses(meta, name)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"dim": None}, "dim"),
        ({"dim": "64"}, "dim"),
        ({"dim": True}, "dim"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 8.0}, "n_heads"),
        ({"ffn_dim_multiplier": "x"}, "ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of"),
    ],
)
def test_params_of_the_wrong_type(meta, change, word):
    edit_json(meta / "params.json", **change)
    with pytest.raises(ValueError, match=rf"params.json: {word}"):
        read_params(meta)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"dim": 32}, "shape"),
        ({"n_heads": 7}, "n_head"),
        ({"n_kv_heads": 3}, "n_kv_head"),
        ({"n_layers": 3}, "layers.2"),
        ({"n_layers": 1}, "layers.1"),
        ({"multiple_of": 50}, "gate_proj"),
        ({"vocab_size": 95}, "embed_tokens"),
        ({"rope_theta": 0.5}, "rope_theta"),
    ],
)
def test_params_of_another_model(meta, change, word):
    edit_json(meta / "params.json", **change)
    assert_load_refuses(meta, word)


def test_params_that_are_no_json(meta):
    (meta / "params.json").write_text("{")
    assert_load_refuses(meta, "params.json")


# ---- hub ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init",
    ["a b", "a/b/c", "/nowhere/at/all", "a/b@", "@x", "owner/na me", "-x/y z"],
)
def test_neither_a_folder_nor_a_hub_id(init):
    with pytest.raises(ValueError) as caught:
        resolve(init)
    assert str(caught.value).startswith(f"{init} is neither a folder nor a hub id")


def test_a_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    Path("owner/model").write_text("x")
    with pytest.raises(ValueError, match="^owner/model is a file: give the folder"):
        resolve("owner/model")


SHA = "0123456789abcdef0123456789abcdef01234567"
HUB_SCRIPT = """
import json, sys
from weights import resolve
for init in sys.argv[1:]:
    try:
        print(json.dumps({"folder": str(resolve(init))}))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs. Each repository has one revision, main."""

    repositories: dict[str, Path] = {}
    sent: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if "/gated" in path and "/resolve/" in path:
            # Anyone may see which files there are, but not read them
            return self.answer(403, error="GatedRepo")
        if "/broken" in path:
            return self.answer(500)
        name = next((name for name in self.repositories if f"{name}/" in f"{path}/"), None)
        if name is None:
            return self.answer(401, error="RepoNotFound")
        return self.answer_about(name, path.split(name, 1)[1].strip("/"))

    do_HEAD = do_GET

    def answer_about(self, name: str, request: str) -> None:
        folder = self.repositories[name]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if request in ("", "revision/main", f"revision/{SHA}"):
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return self.answer_json({"id": name, "sha": SHA, "siblings": siblings})
        if request.startswith(f"tree/{SHA}"):
            return self.answer_json([self.entry(folder, file) for file in files])
        if request.startswith(f"resolve/{SHA}/"):
            file = request.removeprefix(f"resolve/{SHA}/")
            self.sent.append((name, file))
            return self.answer(200, (folder / file).read_bytes())
        return self.answer(404, error="RevisionNotFound")

    def entry(self, folder: Path, file: Path) -> dict:
        return {
            "type": "file",
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            "size": file.stat().st_size,
            "path": file.relative_to(folder).as_posix(),
        }

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode())

    def answer(self, status: int, body: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


HUB_ERRORS = {
    "owner/gated": ["gated", "license", "hf auth login"],
    "owner/missing": ["neither a folder", "private"],
    "owner/model@v2": ["no revision 'v2'"],
    "owner/broken": ["can't be reached (HfHubHTTPError)"],
    "owner/nothing": ["no weights", "an adapter must be merged"],
}


def test_hub_ids(tmp_path, monkeypatch):
    """With a hub on this machine: what is downloaded, what is found again later, every failure."""
    # A repository with more than we read, one in the older form, one in Meta's, one with nothing
    source = tmp_path / "source"
    model = write_hugging_face_for_meta(source, "Llama 2")
    write_meta(tmp_path / "meta", model, 2, "Llama 2")
    for name in ("README.md", "tokenizer.model", "consolidated.safetensors", "pytorch_model.bin"):
        (source / name).write_text("x")
    for name in (
        "original/model.safetensors",
        "original/params.json",
        "model_before/model.safetensors",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    shutil.copytree(source, tmp_path / "bin")
    write_bin(tmp_path / "bin", model.state_dict())
    (tmp_path / "nothing").mkdir()
    Hub.sent = []
    Hub.repositories = {
        "owner/model": source,
        "owner/bin": tmp_path / "bin",
        "owner/meta": tmp_path / "meta",
        "owner/gated": source,
        "owner/nothing": tmp_path / "nothing",
    }

    # Ask for each, and for what can't be had, in a process that knows only this hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / "cache"
    home = {
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }
    good = ["owner/model", "owner/bin@main", "owner/meta", f"owner/model@{SHA}"]
    ended = run_python("-c", HUB_SCRIPT, *good, *HUB_ERRORS, HF_HUB_OFFLINE="0", **home)
    server.shutdown()
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(answers) == len(good) + len(HUB_ERRORS), ended

    # Only one format of each was downloaded, and it is the model
    small = {"config.json", "generation_config.json", "tokenizer.model"}
    downloaded = {
        "owner/model": small | {"model.safetensors"},
        "owner/bin": small | {"pytorch_model.bin"},
        "owner/meta": {"params.json", "consolidated.00.pth", "consolidated.01.pth"},
    }
    for name, files in downloaded.items():
        assert {file for repository, file in Hub.sent if repository == name} == files
    folders = [answer["folder"] for answer in answers[: len(good)]]
    assert folders[3] == folders[0]
    for folder in folders:
        with torch.no_grad():
            logits = load(folder)(IDS % 96)
            torch.testing.assert_close(logits, model(IDS % 96).logits, rtol=0, atol=1e-4)

    # Every failure is one line that begins with the id
    for answer, (init, words) in zip(answers[len(good) :], HUB_ERRORS.items()):
        error = answer["error"]
        assert error.startswith(init)
        assert "\n" not in error
        for word in words:
            assert word in error

    # Without the hub, what is in the cache is enough, and the rest is one line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert [str(weights.resolve(init)) for init in good] == folders
    assert_load_refuses(
        "owner/other",
        "owner/other",
        "not a folder here",
        "cache",
        "HF_HUB_OFFLINE",
        "give a folder",
    )
    assert_load_refuses("owner/model@v2", "owner/model@v2", "cache")

    # The whole way, as a user types it
    shown = run_python("checkpoint.py", "owner/meta", "--scale", 2, HF_HUB_OFFLINE="1", **home)
    assert shown.returncode == 0, shown
    assert shown.stderr.count("\n") == 1
    assert re.search(r"^window +8192$", shown.stdout, re.M)
    assert re.search(r"^method +linear$", shown.stdout, re.M)


@pytest.mark.parametrize(
    "init, message",
    [
        ("out/linear-8", "no such folder; near it: out/linear-2"),
        ("out/linear-2/x", "no such folder; near it: out/linear-2"),
        # The base of the demo has the same last name, and comes first
        ("out/base", "no such folder; near it: out/demo/seed-0/base; python train.py makes it"),
        ("runs/pj/", "no such folder; near it: runs/pi"),
        ("linear-2", "is neither a folder nor a hub id .*; near it: out/linear-2"),
        ("zzzzzzzz", "is neither a folder .*; checkpoints here: out/demo/seed-0/base, out/linear-2"),
        ("out/other/notes.txt", "is a file: give the folder that holds the checkpoint"),
    ],
)
def test_a_path_that_is_not_there_is_no_hub_id_and_is_told_its_neighbors(
    init, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("out/linear-2", "out/demo/seed-0/base", "runs/pi"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "out/other").mkdir()
    (tmp_path / "out/other/notes.txt").write_text("x")
    with pytest.raises(ValueError, match=f"^{init}:? {message}$"):
        weights.resolve(init)


def test_out_is_a_folder_even_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^out/base: no such folder; python train.py makes it$"):
        weights.resolve("out/base")
