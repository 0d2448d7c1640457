"""What every command line here needs: flags, one-line errors, devices, files, tables.

Nobody has to read this file to follow the method. It imports nothing else of this repo.
"""

import argparse
import difflib
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import torch

CHECKPOINT_FORMS = (
    "a Hugging Face LLaMA folder, a hub id owner/name[@revision], or a folder as Meta publishes it"
)
DATA_FORMS = (
    "files or folders of .txt/.md/.py, .jsonl or .parquet, "
    "hub data sets as hf:owner/name,split=test"
)
PICTURES = (".png", ".svg", ".pdf")

# ---- errors: one line, exit code 2 ---------------------------------------------------------------


def run(main: Callable[[], None], after_interrupt: str = "") -> None:
    """Run a script's main function, and report what the user can mend in one line.

    ValueError (bad input) and OSError (a file that can't be read or written) end the program with
    exit code 2. An interrupt ends it with 130, after a line that says after_interrupt. Any other
    exception is a bug and keeps its traceback.
    """
    try:
        main()
    except OSError as error:
        message = str(error)
        if error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        wait_for_process_0()
        sys.exit(report_error(message))
    except ValueError as error:
        wait_for_process_0()
        sys.exit(report_error(str(error)))
    except KeyboardInterrupt:
        if after_interrupt:
            print(f"{Path(sys.argv[0]).name}: {after_interrupt}", file=sys.stderr)
        sys.exit(130)


def report_error(message: str) -> int:
    """Print one line on standard error and return the exit code for bad input."""
    script = Path(sys.argv[0]).name
    line = " ".join(message.split())
    print(f"{script}: error: {line}", file=sys.stderr)
    return 2


def wait_for_process_0() -> None:
    """Under torchrun: let process 0 report bad input first.

    torchrun then ends the waiting processes, which mostly have the same error to report.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has no message."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def import_extra(module: str, extra: str, purpose: object) -> ModuleType:
    """A module that comes with an extra of pyproject.toml.

    purpose: what needs it, as the message should begin.
    Raises ValueError with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.split(".")[0]
        raise ValueError(
            f'{purpose} needs the library {library}: pip install -e ".[{extra}]"'
        ) from None


# ---- flags ---------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show each default in --help. A default of None is described by the help text itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults in --help and reports bad input in one line.

    doc: the script's docstring. Its first paragraph is the description.
    """

    def __init__(self, doc: str) -> None:
        description = doc.split("\n\n")[0]
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        # A flag that is not there: name the one that was probably meant
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            if near:
                message += f"; did you mean {near[0]}?"
        wait_for_process_0()
        sys.exit(report_error(message))


def at_least(least: int | float) -> Callable[[str], int | float]:
    """An argparse type: a whole number from `least` on, or any finite one if that is a float."""
    kind = type(least)
    name = "a whole number" if kind is int else "a number"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {name} of at least {least:g}, got {text}")
        return value

    return parse


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def file_name(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: a path that ends in one of the suffixes and that can be written."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(suffixes)}")
        if not can_be_written(path):
            raise argparse.ArgumentTypeError(
                f"{text} can't be written: give a file in a folder that can"
            )
        return path

    return parse


def can_be_written(path: Path) -> bool:
    """Whether a file may be written at path, its missing folders being made first."""
    existing = path.absolute().parent
    while not existing.exists():
        existing = existing.parent
    return existing.is_dir() and os.access(existing, os.W_OK) and not path.is_dir()


def data_path(text: str) -> str:
    """An argparse type: a file or folder that is there, or a data set of the hub (hf:owner/name)."""
    if text.startswith("hf:") or Path(text).exists():
        return text
    message = f"{text}: no such file or folder, and a data set of the hub begins with hf:"
    folder = Path(text).parent
    if folder.is_dir():
        near = difflib.get_close_matches(Path(text).name, os.listdir(folder))
        if near:
            message += f"; near it: {', '.join(str(folder / name) for name in near)}"
    raise argparse.ArgumentTypeError(message)


class WholeNumbers(argparse.Action):
    """Whole numbers, written `256,512` or `256 512`: stored as a sorted list, each number once.

    Give it as action=WholeNumbers with nargs="+" and, in `const`, the least number that is allowed.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        numbers = parse_whole_numbers(",".join(values), option_string, self.const)
        setattr(namespace, self.dest, numbers)


def parse_whole_numbers(text: str, flag: str, least: int) -> list[int]:
    """The numbers of "256,512", sorted, each once. Raises ValueError naming the flag."""
    numbers = set()
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        if not part.isdecimal() or int(part) < least:
            raise ValueError(f"{flag} takes whole numbers of at least {least}, got {part!r}")
        numbers.add(int(part))
    if not numbers:
        raise ValueError(f"{flag} takes whole numbers, as 256,512, got {text!r}")
    return sorted(numbers)


def add_extension_flags(parser: argparse.ArgumentParser) -> None:
    """Add --scale, --rope and --original_window."""
    add = parser.add_argument
    add("--scale", type=float,
        help="the window over the original one, L'/L; default: as the checkpoint is")
    add("--rope",
        help="what positions do: none, linear (Position Interpolation), ntk, dynamic, yarn, "
        "llama3; default: as the checkpoint is, or linear where --scale extends it")
    add("--original_window", type=at_least(1),
        help="the window of pre-training, where the checkpoint doesn't tell")


def extension(args: argparse.Namespace) -> dict:
    """The values of `add_extension_flags`, as checkpoint.load and read_config take them."""
    return {
        "scale": args.scale,
        "rope": args.rope,
        "original_window": args.original_window,
    }


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add --scale, --rope, --original_window, --device, --dtype and --seed."""
    add_extension_flags(parser)
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: a GPU where there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where the GPU has it")
    add("--seed", type=at_least(0), default=0, help="the seed of everything random")


def device_and_dtype(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean on this machine.

    Raises ValueError for a device that is not there.
    """
    name = device
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} can't be used here: {first_line(error)}") from None
    if dtype != "auto":
        return found, getattr(torch, dtype)
    if found.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return found, torch.bfloat16
    return found, torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """A context in which float32 weights are computed with in dtype."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


# ---- files ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` if the block succeeds, and is removed if not.

    A reader of `path` therefore finds the old file or the new one, never half of it. The umask
    decides who may read it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            # Some libraries let nobody but the owner read their files, such as safetensors
            umask = os.umask(0)  # it can only be read by setting it
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        # The error of a full disk does not say which file could not be written
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError naming the file if it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): is the file truncated?") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def json_text(value: object) -> str:
    """A value as indented JSON with a line break at its end."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON; the file is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


# ---- text for people -----------------------------------------------------------------------------


def text_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table as text. Columns of words are set flush left, columns of numbers flush right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    columns = []
    for column in zip(*lines):
        width = max(len(cell) for cell in column)
        numeric = any(cell == "-" or cell[:1].isdigit() for cell in column[1:])
        if numeric:
            cells = [cell.rjust(width) for cell in column]
        else:
            cells = [cell.ljust(width) for cell in column]
        cells.insert(1, "-" * width)
        columns.append(cells)
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns))


def format_bytes(number: float) -> str:
    """Format a number of bytes."""
    if number >= 1e8:
        return f"{number / 1e9:,.1f} GB"
    return f"{number / 1e6:,.1f} MB"
