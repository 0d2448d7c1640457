"""Processes as torchrun starts them, but forked from one that has imported everything already.

So they start in a moment. What torchrun itself does is tested with torchrun, in test_parallel.py.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "bench", "transformers.models.llama.modeling_llama"])


def run_on_several(processes: int, script: Path, *flags: str) -> CompletedProcess:
    """Run a script on so many processes of one thread each.

    The exit code is the first one that is not 0. The outputs are joined, those of process 0 first.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # process 0 opens no store of its own
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with TemporaryDirectory() as folder:
        workers = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (script, flags, Path.cwd(), variables | ranks, f"{folder}/{rank}")
            worker = FORKS.Process(target=work, args=arguments, daemon=True)
            worker.start()
            workers.append(worker)

        running = workers
        timeout = 300
        while running and wait([worker.sentinel for worker in running], timeout):
            running = [worker for worker in running if worker.exitcode is None]
            if any(worker.exitcode for worker in workers):
                timeout = 10  # the others may be about to end too
        for worker in running:
            worker.kill()
            worker.join()

        texts = []
        for name in ("out", "error"):
            files = [Path(f"{folder}/{rank}.{name}") for rank in range(processes)]
            texts.append("".join(file.read_text() for file in files))
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    return CompletedProcess([script, *flags], codes[0] if codes else 0, *texts)


def work(
    script: Path, flags: tuple[str, ...], folder: Path, variables: dict[str, str], outputs: str
) -> None:
    """What one process does. Its outputs go to files whose names begin with `outputs`."""
    for number, name in ((1, "out"), (2, "error")):
        with open(f"{outputs}.{name}", "w") as file:
            os.dup2(file.fileno(), number)
    os.environ |= variables
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
