"""The tables "What fits where" of REFERENCE.md: what --plan says of each model, window and machine.

    python tests/what_fits.py

The first one has rows of the whole window. The second one compares them with rows of 2,048 tokens,
also on smaller GPUs. Each cell has the mode of --checkpoint_activations that recomputes the least and fits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cost
import plan
import train
from model import PRESETS
from train_flags import parse, settle_flags

MODELS = ("tinyllama-1.1b", "llama-7b", "llama3-8b")
WINDOWS = (8192, 16384, 32768)
MEMORIES = (24, 48, 80)  # GB of one GPU
GPUS = (1, 4, 8)

# Of the second table: model, window and row; GPUs and GB of each
ROWS = (
    ("smollm2-135m", 16384, 16384),
    ("smollm2-135m", 16384, 2048),
    ("tinyllama-1.1b", 16384, 16384),
    ("tinyllama-1.1b", 16384, 2048),
    ("llama-7b", 16384, 16384),
    ("llama-7b", 16384, 2048),
)
SMALLER = ((1, 8), (1, 16), (1, 24), (1, 48), (1, 80), (4, 8), (4, 16), (4, 24), (4, 48))


def lightest_mode(model: str, window: int, row: int, memory: int, gpus: int) -> str:
    """The mode that recomputes the least and fits, as train.py chooses it; a dash if none does."""
    scale = window / PRESETS[model]["block_size"]
    flags = ["--plan", "--preset", model, "--scale", f"{scale:g}", "--micro_batch_size", "1"]
    flags += ["--row_tokens", str(row)]
    flags += ["--world_size", str(gpus), "--device_memory", str(memory), "--dist", "fsdp"]
    args = parse(train.__doc__, flags)
    config = plan.planned_config(args)
    machine = plan.planned_machine(args)
    settle_flags(args, config, gpus, machine)
    needed = plan.memory_needed(args, config, gpus, machine)
    if cost.verdict(needed, machine.free) == "fits":
        return args.checkpoint_activations
    return "–"


def table() -> str:
    """The table as Markdown, a row for each model and window."""
    machines = [(gpus, memory) for memory in MEMORIES for gpus in GPUS]
    header = ["model", "window"]
    for gpus, memory in machines:
        header.append(f"{gpus} x {memory} GB")
    lines = [_row(header), "|---" * len(header) + "|"]
    for model in MODELS:
        for window in WINDOWS:
            cells = [model, f"{window:,}"]
            for gpus, memory in machines:
                cells.append(lightest_mode(model, window, window, memory, gpus))
            lines.append(_row(cells))
    return "\n".join(lines)


def table_of_rows() -> str:
    """The second table as Markdown, a row for each length of the rows."""
    header = ["model", "window", "rows of"]
    for gpus, memory in SMALLER:
        header.append(f"{gpus} x {memory} GB")
    lines = [_row(header), "|---" * len(header) + "|"]
    for model, window, row in ROWS:
        cells = [model, f"{window:,}", f"{row:,}"]
        for gpus, memory in SMALLER:
            cells.append(lightest_mode(model, window, row, memory, gpus))
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
    print()
    print(table_of_rows())
