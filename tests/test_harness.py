"""Our folders in EleutherAI's lm-evaluation-harness: its log-likelihoods are our model's.

    pip install -e .[harness,test]
    python -m pytest tests/test_harness.py -m harness

The harness needs two flags. max_length, because it goes by max_position_embeddings, which is the
original window where the method is `linear`. add_bos_token=True, because the file of the tiny
tokenizer doesn't say that a text begins with BOS. The harness's perplexity tasks are the exception:
they put BOS first themselves, and with the flag they would score a second one.
"""

import json
from pathlib import Path

import pytest
import torch

import checkpoint
import eval_ppl
from conftest import TEXTS, english, random_model
from model import LLaMA
from tokenizer import Tokenizer, load_tokenizer, train_tokenizer

pytestmark = pytest.mark.harness
ORIGINAL = 64
WINDOW = 128

# A task with questions on a text, in the form of RACE
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
# A task with texts alone, in the form of WikiText
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


def question(words: int, answer: str, seed: int) -> dict:
    article = english(words, seed)
    return {"article": article, "question": "What was it?", "options": OPTIONS, "answer": answer}


# The last two don't fit the original window. The last doesn't fit the extended one either: it is
# cut at its beginning.
QUESTIONS = [question(5, "A", 0), question(8, "B", 1), question(25, "C", 2), question(90, "D", 3)]
DOCUMENTS = [{"text": english(9, seed=0)}, {"text": english(30, seed=1)}]


def asked(document: dict) -> str:
    """The text that comes before the answer, as CHOICE writes it."""
    return f"Article: {document['article']}\n\nQuestion: {document['question']}\nAnswer:"


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval isn't there: pip install -e .[harness]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as this repo writes one, base/, and the tasks beside it."""
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = train_tokenizer([english(), *TEXTS], 500)
    model = random_model(
        vocab_size=500,
        n_head=4,
        n_kv_head=2,
        n_embd=64,
        intermediate_size=96,
        block_size=ORIGINAL,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    checkpoint.save(model, folder / "base", tokenizer)
    for name, task, documents in (("choice", CHOICE, QUESTIONS), ("text", TEXT, DOCUMENTS)):
        lines = [json.dumps(document) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        (folder / f"tiny_{name}.yaml").write_text(task.format(folder=folder))
    return folder


def harness(lm_eval, folder: Path, name: str, task: str, flags: str) -> tuple[dict, list[list]]:
    """A task's metrics for one of the folders, and the harness's answers for each document."""
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder / name},{flags}",
        tasks=[task],
        batch_size=2,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    answers = []
    for sample in samples:
        answers.append([response[0] for response in sample["resps"]])
    return results["results"][task], answers


def loglikelihood(
    model: LLaMA, tokenizer: Tokenizer, context: str, continuation: str, window: int
) -> float:
    """The log-likelihood of the continuation by our model.

    BOS and the context come before it, as much of them as the window leaves room for.
    """
    before = len(tokenizer.encode(context))
    tokens = tokenizer.encode(context + continuation)
    scored = len(tokens) - before
    ids = torch.tensor([[tokenizer.bos_id, *tokens][-window - 1 :]])
    targets = ids[:, 1:].clone()
    targets[:, :-scored] = -100
    return -model.nll(ids[:, :-1], targets).sum().item()


@pytest.mark.parametrize("method", ["linear", "none", "ntk", "yarn", "llama3"])
def test_the_harness_sees_our_log_likelihoods(lm_eval, folder, method):
    tokenizer = load_tokenizer(folder / "base")
    model = checkpoint.load(folder / "base", scale=2, rope=method)
    checkpoint.save(model, folder / method, tokenizer)
    sizes = [len(tokenizer.encode(asked(document))) for document in QUESTIONS]
    assert sizes[1] < ORIGINAL - 9
    assert ORIGINAL < sizes[2] < WINDOW - 9
    assert WINDOW < sizes[3]

    flags = f"max_length={WINDOW},add_bos_token=True,dtype=float32"
    metrics, answers = harness(lm_eval, folder, method, "tiny_choice", flags)
    right = 0
    for document, theirs in zip(QUESTIONS, answers, strict=True):
        ours = []
        for option in OPTIONS:
            text = asked(document)
            ours.append(loglikelihood(model, tokenizer, text, f" {option}", WINDOW))
        # Each answer is a log-likelihood, and whether the option is what greedy decoding says
        assert [value for value, _ in theirs] == pytest.approx(ours, abs=1e-3)
        likeliest = ours.index(max(ours))
        right += "ABCD"[likeliest] == document["answer"]
    assert metrics["acc,none"] == right / 4


def test_its_perplexity_is_ours(lm_eval, folder):
    tokenizer = load_tokenizer(folder / "base")
    model = checkpoint.load(folder / "base", scale=2)
    checkpoint.save(model, folder / "linear", tokenizer)
    flags = f"max_length={WINDOW},dtype=float32"
    _, answers = harness(lm_eval, folder, "linear", "tiny_text", flags)
    for document, theirs in zip(DOCUMENTS, answers, strict=True):
        ids = tokenizer.encode(document["text"])
        ours = eval_ppl.perplexity(model, [ids], WINDOW, WINDOW - 1, tokenizer.bos_id)
        assert ours["tokens"] == len(ids) < WINDOW
        assert theirs == [pytest.approx(-ours["nll"] * len(ids), abs=1e-3)]


def test_without_max_length_the_harness_stops_at_the_original_window(lm_eval, folder):
    """The harness goes by max_position_embeddings.

    If it learns of the factor one day, this test fails, and the docs can drop the flag.
    """
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(folder / "base")
    found = {}
    for method in ("linear", "yarn"):
        model = checkpoint.load(folder / "base", scale=2, rope=method)
        checkpoint.save(model, folder / method, tokenizer)
        found[method] = HFLM(pretrained=str(folder / method), device="cpu").max_length
    assert found == {"linear": ORIGINAL, "yarn": WINDOW}

    # The difference is not a matter of rounding
    model = checkpoint.load(folder / "linear")
    text = asked(QUESTIONS[2])
    short = loglikelihood(model, tokenizer, text, f" {OPTIONS[0]}", ORIGINAL)
    long = loglikelihood(model, tokenizer, text, f" {OPTIONS[0]}", WINDOW)
    assert abs(short - long) > 0.1
