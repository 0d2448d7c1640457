"""Small extended checkpoints, opened in other tools: the script behind tests/clients.md.

    python tests/clients.py write FOLDER  # with this repo: FOLDER/METHOD, and our own logits
    python tests/clients.py strip FOLDER  # leaves only type and factor in rope_scaling
    python tests/clients.py TOOL FOLDER   # in the tool's environment, which needs nothing of ours

A line per method says how far the tool's logits are from ours beyond the original window, and at
how many of these positions both have the same most likely token.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

METHODS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")
WINDOW, SCALE, LENGTH = 64, 4, 250  # a window of 64 becomes 256, and 250 tokens are read
PREFIXES = range(80, LENGTH + 1, 10)  # where llama.cpp is asked for the next token
TEXT = "It is read again, word by word: token 12345,  then 67890. Größe, naïve, 東京!"


# ---- with this repo ------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """A random model per method, all with the same weights, and what we make of 250 tokens."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import checkpoint
    from hf_config import extend
    from model import LLaMA, LLaMAConfig
    from tokenizer import train_tokenizer

    tokenizer = train_tokenizer([TEXT], vocab_size=280)
    small = LLaMAConfig(
        tokenizer.vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, intermediate_size=96,
        block_size=WINDOW
    )
    ids = torch.randint(2, small.vocab_size, (LENGTH,), generator=torch.manual_seed(1))
    for method in METHODS:
        config = small if method == "none" else extend(small, SCALE, method)
        torch.manual_seed(0)
        model = LLaMA(config).eval()
        with torch.no_grad():  # large enough for logits of order 1, and attention far from uniform
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
                    weight.normal_(std=gain / math.sqrt(weight.size(1)))
            logits = model(ids[None])[0]
            greedy = [int(model(ids[None, :n])[0, -1].argmax()) for n in PREFIXES]
        checkpoint.save(model, folder / method, tokenizer)
        np.savez(
            folder / f"{method}.npz", ids=ids.numpy(), logits=logits.numpy(), greedy=greedy,
            text_ids=np.array([0, *tokenizer.encode(TEXT)])
        )
        print(folder / method)


def strip(folder: Path) -> None:
    """What transformers 4.31 to 4.42 open: rope_scaling with nothing but type and factor."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        if config["rope_scaling"]:
            kept = ("type", "factor")
            config["rope_scaling"] = {key: config["rope_scaling"][key] for key in kept}
            path.write_text(json.dumps(config))


# ---- with a tool: its logits ---------------------------------------------------------------------


def in_transformers(folder: Path, ids: list[int]) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def in_peft(folder: Path, ids: list[int]) -> np.ndarray:
    """A LoRA adapter, which changes nothing before it is trained, saved and opened again."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapter = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    adapter.save_pretrained(folder / "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def in_ctranslate2(folder: Path, ids: list[int]) -> np.ndarray:
    import ctranslate2
    import transformers

    converter = ctranslate2.converters.TransformersConverter(str(folder))
    converted = converter.convert(str(folder / "ctranslate2"), force=True)
    tokens = transformers.AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)
    logits = ctranslate2.Generator(converted).forward_batch([tokens])
    return np.array(logits)[0]


def in_lm_eval(folder: Path, ids: list[int]) -> np.ndarray:
    """As it reads a list of texts, the longest first. Says what it believes of the window, too."""
    import torch
    from lm_eval.models.huggingface import HFLM

    options = dict(pretrained=str(folder), device="cpu", dtype="float32")
    model = HFLM(**options, max_length=WINDOW * SCALE)
    print(f"  {folder.name:8} max_length {HFLM(**options).max_length}, {model.max_length} if given")
    model._model_call(torch.tensor([(ids + ids)[: WINDOW * SCALE]]))
    return model._model_call(torch.tensor([ids]))[0].numpy()


def in_llama_cpp(folder: Path, ids: list[int]) -> str:
    """How many of its next tokens are ours. The path of its converter is the third argument.

    The converter does not know a tokenizer that we train, so a sentencepiece one takes its place.
    """
    import sentencepiece
    import xllamacpp

    copy = folder / "llama.cpp"
    ignored = shutil.ignore_patterns("tokenizer*", "adapter", "ctranslate2", "llama.cpp")
    shutil.copytree(folder, copy, ignore=ignored, dirs_exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba ab aab"] * 10), model_prefix=str(copy / "tokenizer"),
        model_type="bpe", byte_fallback=True, vocab_size=264, bos_id=0, eos_id=1, unk_id=2,
        minloglevel=2
    )
    file = f"{copy}/model.gguf"
    converter = [sys.executable, sys.argv[3], str(copy), "--outfile", file, "--outtype", "f32"]
    subprocess.run(converter, check=True, capture_output=True)

    def ask() -> list[int | None]:
        """The next token after each prefix; None where it is no text of its own."""
        parameters = xllamacpp.CommonParams()
        parameters.model.path = file
        parameters.n_ctx, parameters.n_parallel, parameters.verbosity = WINDOW * SCALE, 1, -1
        server, found = xllamacpp.Server(parameters), []
        for n in PREFIXES:
            prompt = {"prompt": ids[:n], "n_predict": 1, "temperature": 0, "n_probs": 1}
            answer = server.handle_completions(prompt)
            answer = json.loads(answer) if isinstance(answer, str) else answer
            if "error" in answer:
                raise ValueError(answer["error"]["message"])
            content = answer["choices"][0]["logprobs"]
            found.append(content and content["content"][0]["id"])
        return found

    said, found = "", tried(ask)
    if isinstance(found, str):
        said = f"{found}\n           with context_length {WINDOW * SCALE}: "
        key = ["llama.context_length", str(WINDOW * SCALE)]
        metadata = [sys.executable, "-m", "gguf.scripts.gguf_set_metadata", "--force", file, *key]
        subprocess.run(metadata, check=True, capture_output=True)
        found = ask()
    pairs = [pair for pair in zip(np.load(f"{folder}.npz")["greedy"], found) if pair[1] is not None]
    return f"{said}same token at {sum(a == b for a, b in pairs)} of {len(pairs)} positions"


# tool: the package whose version is said, and the function
TOOLS = {
    "transformers": ("transformers", in_transformers),
    "peft": ("peft", in_peft),
    "ctranslate2": ("ctranslate2", in_ctranslate2),
    "lm-eval": ("lm_eval", in_lm_eval),
    "llama.cpp": ("xllamacpp", in_llama_cpp),
}


def tried(function: Callable, *arguments: object) -> object:
    """What the function returns, or the first line of what the tool says when it refuses."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"refused: {type(error).__name__}: {str(error).splitlines()[0][:120]}"


def read_text(folder: Path) -> list[int]:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def compare(tool: str, folder: Path) -> None:
    package, open_in = TOOLS[tool]
    print(f"{tool} {version(package)}, transformers {version('transformers')}")
    for method in METHODS:
        ours = np.load(folder / f"{method}.npz")
        logits = tried(open_in, folder / method, ours["ids"].tolist())
        if not isinstance(logits, str):
            expected, logits = ours["logits"][WINDOW:], logits[WINDOW:]
            same = (expected.argmax(-1) == logits.argmax(-1)).sum()
            difference = np.abs(expected - logits).max()
            logits = f"difference {difference:.1e}, same token at {same} of {len(logits)} positions"
        print(f"  {method:8} {logits}")
    ids = tried(read_text, folder / METHODS[0])
    if not isinstance(ids, str):
        ids = "equal" if ids == ours["text_ids"].tolist() else "differ"
    print(f"  ids of a text: {ids}")


if __name__ == "__main__":
    name, root = sys.argv[1], Path(sys.argv[2])
    if name in ("write", "strip"):
        {"write": write, "strip": strip}[name](root)
    else:
        compare(name, root)
