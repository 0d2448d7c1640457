"""Folders of ours in EleutherAI's lm-evaluation-harness, as they are: its log-likelihoods are our model's.

    pip install -e .[harness,test]
    python -m pytest tests/test_harness.py -m harness

What the harness must be told: max_length, since the max_position_embeddings that it goes by is the original window
beside `linear`, and add_bos_token=True, since the tiny tokenizer's file doesn't say that a text begins with BOS. Its
own perplexity tasks are the exception: they put BOS first themselves, and with the flag would score a second one.
"""

import json

import pytest
import torch

import checkpoint
import eval_ppl
from conftest import TEXTS, english
from model import LLaMA, LLaMAConfig
from tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.harness
ORIGINAL, WINDOW = 64, 128

# questions on a text, in the form of RACE, and texts alone, in that of WikiText
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "Article: {{{{article}}}}\\n\\nQuestion: {{{{question}}}}\\nAnswer:"
doc_to_choice: options
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
OPTIONS = ["the best of times", "a pass key", "12345", "grass"]
# the last two don't fit the original window, the last not the extended one either: it loses its beginning
QUESTIONS = [
    {"article": english(words, seed), "question": "What was it?", "options": OPTIONS, "answer": "ABCD"[seed]}
    for seed, words in enumerate((5, 8, 25, 90))
]
DOCUMENTS = [{"text": english(words, seed)} for seed, words in enumerate((9, 30))]


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval isn't installed: pip install -e .[harness]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as this repo writes one, base/, and the tasks beside it."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer([english(), *TEXTS], 500)
    torch.manual_seed(0)
    model = LLaMA(LLaMAConfig(vocab_size=500, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, intermediate_size=96,
                              block_size=ORIGINAL, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id))  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(model, folder / "base", tokenizer)
    for name, task, documents in (("choice", CHOICE, QUESTIONS), ("text", TEXT, DOCUMENTS)):
        (folder / f"tiny_{name}.yaml").write_text(task.format(folder=folder))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


def harness(lm_eval, folder, name: str, task: str, flags: str) -> tuple[dict, list[list[float]]]:
    """The harness's own entry point on one of the folders: a task's metrics, and each document's log-likelihoods."""
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder / name},{flags}", tasks=[task], batch_size=2, device="cpu",
        log_samples=True, bootstrap_iters=0, task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return results["results"][task], [[resp[0] for resp in sample["resps"]] for sample in samples]


def loglikelihood(model, tokenizer, context: str, continuation: str, window: int) -> float:
    """Ours: -nll of the continuation's tokens, with as much before them, BOS first, as the window leaves room for."""
    before = len(tokenizer.encode(context))
    ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    n, ids = len(ids) - 1 - before, torch.tensor([ids[-window - 1 :]])
    targets = ids[:, 1:].clone()
    targets[:, :-n] = -100
    return -model.nll(ids[:, :-1], targets).sum().item()


@pytest.mark.parametrize("method", ["linear", "none", "ntk", "yarn", "llama3"])
def test_the_harness_sees_our_log_likelihoods(lm_eval, folder, method):
    tokenizer = load_tokenizer(folder / "base")
    model = checkpoint.load(folder / "base", scale=2, rope=method)
    checkpoint.save(model, folder / method, tokenizer)
    flags = f"max_length={WINDOW},add_bos_token=True,dtype=float32"
    metrics, theirs = harness(lm_eval, folder, method, "tiny_choice", flags)
    theirs = [[value for value, _ in values] for values in theirs]  # beside each: whether it is the likeliest
    asked = [f"Article: {q['article']}\n\nQuestion: {q['question']}\nAnswer:" for q in QUESTIONS]
    sizes = [len(tokenizer.encode(text)) for text in asked]
    assert sizes[1] < ORIGINAL - 9 and ORIGINAL < sizes[2] < WINDOW - 9 and WINDOW < sizes[3]
    ours = [[loglikelihood(model, tokenizer, text, f" {option}", WINDOW) for option in OPTIONS] for text in asked]
    assert torch.tensor(theirs) == pytest.approx(torch.tensor(ours), abs=1e-3)
    right = [values.index(max(values)) == i for i, values in enumerate(ours)]
    assert metrics["acc,none"] == sum(right) / 4


def test_its_perplexity_is_ours(lm_eval, folder):
    tokenizer = load_tokenizer(folder / "base")
    model = checkpoint.load(folder / "base", scale=2)
    checkpoint.save(model, folder / "linear", tokenizer)
    _, theirs = harness(lm_eval, folder, "linear", "tiny_text", f"max_length={WINDOW},dtype=float32")
    for document, values in zip(DOCUMENTS, theirs, strict=True):
        ids = tokenizer.encode(document["text"])
        ours = eval_ppl.perplexity(model, [ids], WINDOW, WINDOW - 1, tokenizer.bos_id)
        assert ours["tokens"] == len(ids) < WINDOW
        assert values == [pytest.approx(-ours["nll"] * len(ids), abs=1e-3)]


def test_left_to_itself_the_harness_stops_at_the_original_window(lm_eval, folder):
    """Why max_length is given: the harness goes by max_position_embeddings. Should it learn of the factor, this fails,
    and the README can drop the flag."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(folder / "base")
    found = {}
    for method in ("linear", "yarn"):
        checkpoint.save(checkpoint.load(folder / "base", scale=2, rope=method), folder / method, tokenizer)
        found[method] = HFLM(pretrained=str(folder / method), device="cpu").max_length
    assert found == {"linear": ORIGINAL, "yarn": WINDOW}
    model = checkpoint.load(folder / "linear")
    text = f"Article: {QUESTIONS[2]['article']}\n\nQuestion: {QUESTIONS[2]['question']}\nAnswer:"
    short, long = (loglikelihood(model, tokenizer, text, f" {OPTIONS[0]}", window) for window in (ORIGINAL, WINDOW))
    assert abs(short - long) > 0.1  # not a matter of rounding
