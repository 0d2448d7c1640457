"""One run on many processes: who holds which part of the model, and states on disk that any number can take up.

Read model.py and checkpoint.py first. train.py calls this file's functions; none of them knows of its loop.

    model = sharded(config, weights, device, torch.bfloat16)     # FSDP2: each process reads and keeps its part
    save_state(out, step, model, optimizer, args)                # all processes write, all or nothing appears
    step = load_state(newest_state(out), model, optimizer)       # on any number of processes

A state is a folder OUT/trainer/step-N of torch.distributed.checkpoint's files and args.json, the flags. It is written
under a hidden name and renamed when whole, so that what bears its name can be resumed from, whatever happened.
"""

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict,
)  # fmt: skip
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import cost
from model import LLaMA, LLaMAConfig

# ---- one process among several -----------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(x: Tensor) -> Tensor:
    """x averaged over the processes, in place; x is on the CPU (gloo) or this process's GPU (NCCL)."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


# ---- who holds what ----------------------------------------------------------------------------------------------


def choose_dist(config: LLaMAConfig, there: float) -> tuple[str, str]:
    """"ddp" where weights, gradients and optimizer fit a device of so many bytes, else "fsdp"; and why."""
    needed = 16 * config.n_params  # float32 weight, gradient and two moments
    choice = "ddp" if needed < 0.6 * there else "fsdp"  # the rest is for activations
    return choice, f"weights, gradients and optimizer take {cost.size(needed)}, a device has {cost.size(there)}"


def sharded(
    config: LLaMAConfig, weights: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> LLaMA:
    """The model cut into shards, one a process (FSDP2): each block is gathered when its turn comes and dropped after.

    weights: name and tensor of each, on every process. Mapped from a file, a tensor costs what is read of it, and
    each process reads its rows alone. Weights and moments are float32; what is gathered is dtype, gradients are
    summed in float32. Blocks take their inputs as they are: the embedding's output is dtype, cos and sin are float32.
    """
    with torch.device("meta"):
        model = LLaMA(config)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*model.layers, model):
        fully_shard(part, mp_policy=policy)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, whole in weights:
            rows = whole.chunk(processes())  # FSDP's own cut, along the first dimension; there may be fewer
            if rank() < len(rows):
                parameters[name].to_local().copy_(rows[rank()])
    return model


def save_weights(model: torch.nn.Module, folder: Path, tokenizer) -> None:
    """The weights as a Hugging Face folder, written by process 0, from wherever they are."""
    raw = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(raw, FSDPModule):  # all processes bring their shards together in process 0's memory
        weights = get_model_state_dict(raw, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        config = raw.config
        with torch.device("meta"):
            raw = LLaMA(config)
        if rank() == 0:
            raw.load_state_dict(weights, assign=True)
            if config.tie_embeddings:  # assigned one by one, the two are no longer one
                raw.lm_head.weight = raw.embed_tokens.weight
    if rank() == 0:
        checkpoint.save(raw, folder, tokenizer)


# ---- states on disk: OUT/trainer/step-N, whole or not there ------------------------------------------------------


def states(out: Path) -> list[Path]:
    """The states of a run, the newest last."""
    return sorted(out.glob("trainer/step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest_state(out: Path) -> Path:
    """The state to resume from. ValueError where there is none."""
    if not states(out):
        raise ValueError(f"--resume: {out} holds no run (no trainer/step-N): leave --resume out to start one")
    return states(out)[-1]


def save_state(out: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, args: dict) -> None:
    """Everything that a resumed run needs: weights, moments, the step and args, the flags; the last two are kept.

    All processes call it. OSError if it can't be written: then what was there before is still there, whole.
    """
    final, temporary = out / f"trainer/step-{step}", out / f"trainer/.step-{step}.tmp"
    if final.exists():
        return  # just resumed from it
    if rank() == 0:
        remove_half_written(out)
        temporary.mkdir(parents=True)
    barrier()
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    except dcp.api.CheckpointException as error:  # no Exception, and many lines
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0]
        number = getattr(cause, "errno", None) or errno.EIO
        raise OSError(number, f"can't be saved ({cause}); what was saved before is whole", str(final)) from None
    if rank() == 0:
        checkpoint.write_json(temporary / "args.json", args)
        temporary.rename(final)
        for old in states(out)[:-2]:
            hidden = old.with_name(f".{old.name}.tmp")  # renamed first: half a state never bears a state's name
            old.rename(hidden)
            shutil.rmtree(hidden)
    barrier()


def remove_half_written(out: Path) -> None:
    """Remove what killed runs left of states."""
    for left in out.glob("trainer/.step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def load_state(state: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a state into model and optimizer, on any number of processes; the step it was saved at.
    ValueError if it is another model's."""
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=state)
    except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[-300:]
        raise ValueError(
            f"{state} does not hold this model and optimizer ({reason}): is --init another model?"
        ) from None
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(state.name.removeprefix("step-"))
