"""One run on many processes: who holds which part, and states that any number can resume.

    model = sharded(config, weights, device, torch.bfloat16)   # FSDP2: each process keeps a part
    save_state(out, step, model, optimizers, args)             # all processes write together
    step = load_state(newest_state(out), model, optimizers)    # on any number of processes

A state is a folder OUT/trainer/step-N with the files of torch.distributed.checkpoint and args.json,
the run's flags. It is written under a hidden name and renamed when it is whole, so that every
folder with such a name can be resumed from, whatever happened.
"""

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from cli import device_and_dtype, first_line, format_bytes, report_error, write_json
from model import LLaMA, LLaMAConfig
from tokenizer import Tokenizer

# ---- one process among several -------------------------------------------------------------------

# How long a process waits while another one reports an error. torchrun ends the waiting one as soon
# as the other one has exited.
REPORT_SECONDS = 30


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if any; yield the name of this process's device.

    Where another process is lost, the block ends with one line and exit code 1. Where bad input
    ends the block, the first process that meets it reports it. The others, which meet it too or
    lose their connection to that process, say nothing.
    """
    if "RANK" not in os.environ:
        yield device
        return
    # Each process takes the GPU of its number, before it opens any other
    wants_gpu = device == "auto" or device.startswith("cuda")
    if wants_gpu and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    device_and_dtype(device)  # refuses a device that is not there, in one line
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
    # The store that torchrun keeps for its processes, where the first one to fail leaves a mark
    store, number, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=number, world_size=world)
    try:
        yield device
        dist.barrier()  # gloo may abort when one process leaves while another still communicates
    except (ValueError, OSError):
        if store.add("failures", 1) > 1:
            time.sleep(REPORT_SECONDS)
        raise
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost or processes() == 1:
            raise
        if store.add("failures", 1) > 1:
            time.sleep(REPORT_SECONDS)
            sys.exit(1)
        report_error(
            f"process {rank()} lost another one; start all again, with --resume, to go on from "
            f"the last checkpoint ({first_line(error)})"
        )
        sys.exit(1)
    finally:
        dist.destroy_process_group()


@contextmanager
def process_0_first() -> Iterator[None]:
    """Process 0 runs the block first, and the others then find what it left in a cache."""
    if not dist.is_initialized():
        yield
        return
    # A group of its own, because process 0 may tokenize for hours while the others wait
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    if rank() > 0:
        dist.barrier(patient)
    yield
    if rank() == 0:
        dist.barrier(patient)


def mean_over_processes(x: Tensor) -> Tensor:
    """x averaged over the processes, in place; on the CPU (gloo) or this process's GPU (NCCL)."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def least_over_processes(x: float) -> float:
    """The least x of all processes, so that all decide alike."""
    least = torch.tensor(x, dtype=torch.float64)  # on the CPU, and so reduced by gloo
    if dist.is_initialized():
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return least.item()


# ---- who holds which part ------------------------------------------------------------------------


def choose_dist(config: LLaMAConfig, available: float) -> tuple[str, str]:
    """The engine for a device of so many bytes, and the reason.

    "ddp" where weights, gradients and optimizer fit with room for activations, else "fsdp".
    """
    needed = 16 * config.n_params  # float32 weight, gradient and two moments
    choice = "fsdp"
    if needed < 0.6 * available:  # the rest is for activations
        choice = "ddp"
    reason = f"weights, gradients and optimizer take {format_bytes(needed)}, "
    reason += f"a device has {format_bytes(available)}"
    return choice, reason


def sharded(
    config: LLaMAConfig, weights: Iterable[tuple[str, Tensor]], device: torch.device,
    dtype: torch.dtype
) -> LLaMA:
    """The model cut into a part for each process (FSDP2). A block is gathered when its turn comes.

    weights: name and tensor of each weight, on every process. A tensor that is mapped from a file
    costs only what is read of it, and each process reads its own rows.
    dtype: what is gathered and computed with. Weights and optimizer moments are float32, and
    gradients are summed in float32.
    """
    with torch.device("meta"):  # shapes alone, so that no process holds the whole model
        model = LLaMA(config)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # because cos and sin must stay float32
    )
    # The mesh names the device type; by default FSDP takes a GPU wherever the machine has one
    mesh = init_device_mesh(device.type, (processes(),))
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights:
            # FSDP cuts along the first dimension as `chunk` does; there may be fewer parts than
            # processes
            parts = tensor.chunk(processes())
            if rank() < len(parts):
                parameters[name].to_local().copy_(parts[rank()])
    return model


def save_weights(
    model: torch.nn.Module, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype | None = None,
    max_shard_size: float | str = "5GB"
) -> None:
    """Write the weights as a Hugging Face folder, by process 0. All processes call it.

    dtype: of the files; None: as in the model.  max_shard_size: of each file, as in
    checkpoint.save; process 0 holds one file's weights at a time.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    gather = None
    if isinstance(model, FSDPModule):
        gather = DTensor.full_tensor
        # After a forward pass without a backward pass, FSDP still holds embedding and head gathered
        model.reshard()
    if rank() == 0:
        checkpoint.save(
            model, folder, tokenizer, dtype=dtype, max_shard_size=max_shard_size, gather=gather
        )
    elif gather is not None:
        # A weight is whole only where all processes bring their parts together, in the same order
        for weight in checkpoint.saving_order(model, dtype, max_shard_size):
            gather(weight)


# ---- states on disk ------------------------------------------------------------------------------


def states(out: Path) -> list[Path]:
    """The states of a run, the newest last."""
    return sorted(out.glob("trainer/step-*"), key=step_of)


def step_of(state: Path) -> int:
    return int(state.name.removeprefix("step-"))


def newest_state(out: Path) -> Path:
    """The state to resume from. Raises ValueError where there is none."""
    found = states(out)
    if not found:
        raise ValueError(
            f"--resume: {out} holds no run (no trainer/step-N): leave --resume out to start one"
        )
    return found[-1]


def save_state(
    out: Path, step: int, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer],
    args: dict
) -> None:
    """Save weights, optimizer moments, the step and the flags; the last two states are kept.

    All processes call it. Raises OSError if the state can't be written; what was saved before is
    then still there, whole.
    """
    final = out / f"trainer/step-{step}"
    temporary = out / f"trainer/.step-{step}.tmp"
    if final.exists():  # the run was just resumed from it
        return
    if rank() == 0:
        remove_unfinished_states(out)
        temporary.mkdir(parents=True)
    barrier()
    weights, moments = get_state_dict(model, optimizers)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    except dcp.api.CheckpointException as error:
        # It is no Exception, and its message has many lines: report the first process's cause
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0]
        number = getattr(cause, "errno", None) or errno.EIO
        message = f"can't be saved ({cause}); what was saved before is whole"
        raise OSError(number, message, str(final)) from None
    if rank() == 0:
        write_json(temporary / "args.json", args)
        temporary.rename(final)
        for old in states(out)[:-2]:
            # Rename before deleting, so that an interrupted delete cannot leave a broken state
            # under a valid name
            hidden = old.with_name(f".{old.name}.tmp")
            old.rename(hidden)
            shutil.rmtree(hidden)
    barrier()


def remove_unfinished_states(out: Path) -> None:
    """Remove what killed runs left behind while they wrote a state."""
    for unfinished in out.glob("trainer/.step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def load_state(
    state: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Put a state into model and optimizers; returns the step it was saved at.

    The number of processes may differ from the one that saved it. Raises ValueError if the state is
    of another model.
    """
    weights, moments = get_state_dict(model, optimizers)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=state)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[-300:]
        raise ValueError(
            f"{state} does not hold this model and optimizer ({reason}): is --init another model?"
        ) from None
    set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
    step = step_of(state)
    if step == 0:
        # get_state_dict made these moments by a step of its own, which AdamW would count
        for optimizer in optimizers:
            optimizer.state.clear()
    return step
