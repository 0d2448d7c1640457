"""The table "What fits where" of REFERENCE.md: what --plan says of each model, window and machine.

    python tests/what_fits.py

Each cell has the mode of --checkpoint_activations that recomputes the least and fits.
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


def lightest_mode(model: str, window: int, memory: int, gpus: int) -> str:
    """The mode that recomputes the least and fits, as train.py chooses it; a dash if none does."""
    scale = window / PRESETS[model]["block_size"]
    flags = ["--plan", "--preset", model, "--scale", f"{scale:g}", "--micro_batch_size", "1"]
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
                cells.append(lightest_mode(model, window, memory, gpus))
            lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
