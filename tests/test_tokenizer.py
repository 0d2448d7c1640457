"""tokenizer.py: each format gives the same tokens as its library, and what is saved opens again."""

import base64
import io
import json
import random
import subprocess
import sys

import pytest

from conftest import FORMS, TEXTS, english
from tokenizer import has_tokenizer, load_tokenizer, train_tokenizer

# As Meta publishes it, in one piece
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---- each format beside its library --------------------------------------------------------------


def test_byte_level_bpe_equals_the_library(bpe, tok):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(bpe / "tokenizer.json"))
    for text in TEXTS:
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        assert 0 not in ids and 1 not in ids  # "<s>" and "</s>" within a text are text
        if "<s>" not in text:
            assert [0] + ids == theirs.encode(text).ids  # other programs put BOS first
    assert tok.encode_batch(TEXTS) == [tok.encode(text) for text in TEXTS]
    assert (tok.vocab_size, tok.bos_id, tok.eos_id) == (500, 0, 1)
    assert len(tok.encode("00417")) == 5
    assert len({tok.encode(str(digit))[0] for digit in range(10)}) == 10


def test_sentencepiece_equals_the_library(sentencepiece_folder, tokenizers_by_form):
    import sentencepiece

    file = str(sentencepiece_folder / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(model_file=file)
    ours = tokenizers_by_form["sentencepiece"]
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text
        assert not {0, 1, 2} & set(ids)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (420, 1, 2)
    assert len(ours.encode("00417")) == 6  # the space in front, and five digits


def tiktoken_encoding(folder):
    """tiktoken's own object for the ranks in a folder."""
    import tiktoken

    ranks = {}
    for line in (folder / "tokenizer.model").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        "theirs", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )


def test_tiktoken_ranks_equal_the_library(tiktoken_folder, tokenizers_by_form):
    theirs = tiktoken_encoding(tiktoken_folder)
    ours = tokenizers_by_form["tiktoken"]
    n_ranks = ours.vocab_size - 256
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text
        assert max(ids) < n_ranks
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert n_ranks == theirs.max_token_value + 1
    assert (ours.bos_id, ours.eos_id) == (n_ranks, n_ranks + 1)
    assert ours.decode([ours.bos_id, *ours.encode("a"), ours.eos_id]) == "a"
    assert len(ours.encode("00417")) == 3  # digits by three: "004" is a rank, "17" is none


def test_llama_json_equals_the_library_with_special_tokens_as_text(
    llama_json_folder, tokenizers_by_form
):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(llama_json_folder / "tokenizer.json"))
    ours = tokenizers_by_form["llama_json"]

    # The library puts BOS in front of a text, and makes another one of "<s>" within it
    assert theirs.encode("<s> a <extra>").ids.count(1) == 2
    special = {theirs.token_to_id(token) for token in ("<s>", "</s>", "<extra>")}
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not special & set(ids)
        if not any(token in text for token in ("<s>", "</s>", "<extra>", "<unk>")):
            assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert (ours.bos_id, ours.eos_id) == (1, 2)


# ---- Meta's files as tokenizer.json --------------------------------------------------------------

LOOK_ALIKES = ["<|eot_id |>", "<|eot_id", "eot_id|>", "<|EOT_ID|>", "< s>", "<s", "</s >", "<unk >"]


def mixtures(alphabet, n=2000):
    """n random texts of up to 40 parts."""
    rng = random.Random(0)
    return ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(n)]


@pytest.mark.parametrize("form", ["sentencepiece", "tiktoken"])
def test_converted_tokenizers_give_the_ids_of_metas_own(
    form, sentencepiece_folder, tiktoken_folder, tokenizers_by_form
):
    import tokenizers

    ours = tokenizers_by_form[form]
    converted = tokenizers.Tokenizer.from_str(ours.files["tokenizer.json"].decode())
    converted.encode_special_tokens = True
    if form == "tiktoken":
        encode = tiktoken_encoding(tiktoken_folder).encode_ordinary
    else:
        encode = ours.encode  # sentencepiece's own
    words = english(30).split(" ") + [word[:3] for word in english(30).split(" ")]
    alphabet = [*words, *"ab 0123456789.,'\n\t\u00a0\u2028é日🙂▁", "  ", "'s", "'LL", *LOOK_ALIKES]
    for text in mixtures(alphabet) + mixtures("the ") + TEXTS + ["", "x" + " " * 5000 + "y"]:
        ids = encode(text)
        assert converted.encode(text).ids == [ours.bos_id, *ids]
        assert ours.encode(text) == ids


def test_special_tokens_of_llama_3(tokenizers_by_form, tiktoken_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizers_by_form["tiktoken"]
    n_ranks = ours.text_vocab_size
    assert n_ranks == len((tiktoken_folder / "tokenizer.model").read_bytes().splitlines())
    ours.save(tmp_path)
    # A converter that finds a tokenizer.model takes it for one of sentencepiece
    assert not (tmp_path / "tokenizer.model").exists()

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == n_ranks + 256
    names = theirs.convert_ids_to_tokens(range(n_ranks, n_ranks + 256))
    assert len(set(names)) == 256
    for name, place in (
        ("<|begin_of_text|>", 0),
        ("<|start_header_id|>", 6),
        ("<|eot_id|>", 9),
        ("<|python_tag|>", 10),
        ("<|reserved_special_token_247|>", 255),
    ):
        assert names[place] == name
        assert theirs(f"a{name}", add_special_tokens=False).input_ids[1:] == [n_ranks + place]
        assert max(ours.encode(name)) < n_ranks  # here it is text
    assert ours.stop_ids == (n_ranks + 8, n_ranks + 9)


def test_a_million_blanks_are_tokenized(tokenizers_by_form):
    """tiktoken itself panics at such a text."""
    ours = tokenizers_by_form["tiktoken"]
    text = "x" + " " * 1_000_000 + "y"
    assert ours.decode(ours.encode(text)) == text


def test_other_kinds_of_sentencepiece_models_are_not_converted(tmp_path):
    import sentencepiece

    for name, options in (
        ("unigram", {"model_type": "unigram", "normalization_rule_name": "identity"}),
        ("normalized", {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}),
        ("no_prefix", {"model_type": "bpe", "add_dummy_prefix": False}),
    ):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(english().splitlines()),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        files = load_tokenizer(folder).files
        assert list(files) == ["tokenizer.model", "tokenizer_config.json"], name


# ---- loading and saving --------------------------------------------------------------------------


def copy(source, folder, **files):
    """A copy of a folder's tokenizer.json or tokenizer.model, with JSON files beside it."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def test_bos_and_eos_of_the_checkpoint_count_where_the_tokenizer_names_none(
    bpe, sentencepiece_folder, tmp_path
):
    """First what the companion files name, then the format's own, then the config's."""
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    named = load_tokenizer(copy(bpe, tmp_path / "a", tokenizer_config=names), bos_id=7, eos_id=9)
    assert (named.bos_ids, named.eos_ids) == ([0], [1])
    unnamed = load_tokenizer(copy(bpe, tmp_path / "b"), bos_id=7, eos_id=9)
    assert (unnamed.bos_ids, unnamed.eos_ids) == ([7], [9])
    usual = load_tokenizer(tmp_path / "b")
    assert (usual.bos_ids, usual.eos_ids) == ([0], [1])
    assert unnamed.fingerprint != usual.fingerprint
    with pytest.raises(ValueError, match="500 tokens, EOS is 500"):
        load_tokenizer(tmp_path / "b", eos_id=500)

    # LLaMA 1's first folders: config.json numbers the tokens differently, and no names are given
    empty = {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": ""}
    folder = copy(sentencepiece_folder, tmp_path / "c", tokenizer_config=empty)
    llama1 = load_tokenizer(folder, bos_id=0, eos_id=1)
    assert (llama1.bos_id, llama1.eos_id) == (1, 2)


def test_no_bos_where_transformers_puts_none(sentencepiece_folder, llama_json_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    names["unk_token"] = "<unk>"
    no_template = copy(llama_json_folder, tmp_path / "no_template")
    content = json.loads((no_template / "tokenizer.json").read_text())
    (no_template / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    for name, source, flag, expected in (
        ("model", sentencepiece_folder, True, [1]),
        ("model_false", sentencepiece_folder, False, []),
        ("json_false", llama_json_folder, False, [1]),  # the post-processor of tokenizer.json wins
        ("other", no_template, None, []),
    ):
        config = names | {"add_bos_token": flag}
        if source == no_template:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if flag is None:
            del config["add_bos_token"]  # as in SmolLM2's folder
        folder = copy(source, tmp_path / name, tokenizer_config=config)
        ours = load_tokenizer(folder, bos_id=1)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.bos_ids == expected
        assert theirs("It was").input_ids == expected + ours.encode("It was")


def test_bos_where_tokenizer_json_puts_none_before_a_text(llama_json_folder, tmp_path):
    import tokenizers

    def bos_ids(name, template, **config):
        folder = copy(llama_json_folder, tmp_path / name, tokenizer_config=config)
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("</s>", 2)]
        )
        library.save(str(folder / "tokenizer.json"))
        return load_tokenizer(folder, bos_id=1).bos_ids

    # A LLaMA was trained with BOS
    assert bos_ids("a", "$A", tokenizer_class="LlamaTokenizer") == [1]
    assert bos_ids("b", "$A", tokenizer_class="LlamaTokenizer", add_bos_token=False) == []
    assert bos_ids("c", "$A", tokenizer_class="GPT2Tokenizer") == []
    # One token is both BOS and EOS, and stands behind the text
    assert bos_ids("d", "$A </s>", tokenizer_class="GPT2Tokenizer", bos_token="</s>") == []


def test_tokens_added_in_tokenizer_config(sentencepiece_folder, tmp_path):
    """A chat model of Llama 2: its end token is in added_tokens_decoder alone."""
    transformers = pytest.importorskip("transformers")
    token = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "420": token | {"content": "<|im_end|>"},
            "421": token | {"content": "<|im_start|>"},
        },
    }
    folder = copy(sentencepiece_folder, tmp_path / "chat", tokenizer_config=config)
    ours = load_tokenizer(folder, bos_id=1, eos_id=420)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.text_vocab_size) == (422, 420)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id)
    assert "tokenizer.json" not in ours.files


def test_limits_follow_the_window(bpe, tmp_path):
    folder = copy(
        bpe,
        tmp_path / "a",
        tokenizer_config={"model_max_length": 64, "chat_template": "é"},
        generation_config={"max_length": 64, "max_new_tokens": 9, "eos_token_id": 0, "top_p": 0.9},
    )
    library = json.loads((folder / "tokenizer.json").read_text())
    library["truncation"] = {
        "direction": "Right",
        "max_length": 64,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(library))

    tokenizer = load_tokenizer(folder)
    files = tokenizer.for_model(window=256, bos_id=0, eos_id=(1, 5)).files
    saved = {name: json.loads(content) for name, content in files.items()}
    assert saved["tokenizer.json"]["truncation"] is None
    assert saved["tokenizer_config.json"] == {"model_max_length": 256, "chat_template": "é"}
    assert saved["generation_config.json"] == {
        "max_length": 256,
        "max_new_tokens": 9,
        "eos_token_id": [1, 5],
        "top_p": 0.9,
    }

    # Nothing is changed that agrees with the model already
    unchanged = tokenizer.for_model(window=32, bos_id=0, eos_id=0)
    assert unchanged.files == tokenizer.files
    assert unchanged.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_saved_tokenizers_open_here_and_in_transformers(form, tokenizers_by_form, tmp_path):
    ours = tokenizers_by_form[form]
    folder = tmp_path / "new" / "folder"
    ours.save(folder)
    again = load_tokenizer(folder)
    assert again.fingerprint == ours.fingerprint
    assert again.files == ours.files
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert not list(tmp_path.rglob("*.tmp"))

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in ("two  blanks", *TEXTS):
        # transformers makes special tokens of "<s>" within a text, and puts BOS first
        if "<s>" not in text:
            assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]


def test_companion_files_are_copied_as_they_are(sentencepiece_folder, tmp_path):
    source = tmp_path / "a"
    source.mkdir()
    model = (sentencepiece_folder / "tokenizer.model").read_bytes()
    (source / "tokenizer.model").write_bytes(model)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (source / name).write_text('{ "odd":   "spacing"}')
    (source / "added_tokens.json").write_text('{"<|im_end|>": 421}')
    (source / "model.safetensors").write_text("not the tokenizer's")

    tokenizer = load_tokenizer(source)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (422, 2)
    assert tokenizer.decode([*tokenizer.encode("a 7"), 421]) == "a 7"

    target = tmp_path / "b"
    tokenizer.save(target)
    (source / "model.safetensors").unlink()
    saved = {path.name: path.read_bytes() for path in target.iterdir()}
    assert saved == {path.name: path.read_bytes() for path in source.iterdir()}


def test_tokenizer_json_is_read_first(bpe, sentencepiece_folder, tmp_path):
    for folder, name in ((bpe, "tokenizer.json"), (sentencepiece_folder, "tokenizer.model")):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.fingerprint == load_tokenizer(bpe).fingerprint
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").is_file()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[1, 2"),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\n\x10garbage"),
        ("tokenizer.model", b"QQ== 0\nQg== x\n"),
        ("tokenizer.model", b"QQ== 0\nQg== 5\n"),
        ("tokenizer.model", b"QQ== 0\nQ 1\n"),
        ("tokenizer.model", b"QQ== 0\nQg== 1\n"),
        ("tokenizer.model", "truncated"),
    ],
)
def test_broken_tokenizers_are_one_line(name, content, tmp_path, sentencepiece_folder):
    if content == "truncated":
        content = (sentencepiece_folder / name).read_bytes()[:1500]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} can't be read as a tokenizer: .") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_no_tokenizer(bpe, tmp_path):
    assert has_tokenizer(bpe)
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer: put its tokenizer.json"):
        load_tokenizer(tmp_path)


# ---- training ------------------------------------------------------------------------------------


def test_training_a_tokenizer_is_deterministic():
    program = (
        "import sys, tokenizer\n"
        "texts = sys.stdin.read().split('|')\n"
        "print(tokenizer.train_tokenizer(texts, 300).fingerprint)\n"
    )
    command = [sys.executable, "-c", program]
    text = english(2000)
    other = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    here = train_tokenizer(text.split("|"), 300)
    assert other.stdout.strip() == here.fingerprint
    assert here.vocab_size == 300
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        train_tokenizer(["a"], 100)
