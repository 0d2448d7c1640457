"""cost.py: FLOPs as PyTorch counts them, memory as a process needs it, and the text of the plan."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
from cli import format_bytes
from model import LLaMA, LLaMAConfig
from what_fits import table, table_of_rows

ROOT = Path(__file__).parent.parent

# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 2}, {"tie_embeddings": True}, {"head_dim": 16}]
)
def test_flops_are_those_that_pytorch_counts(changes):
    config = LLaMAConfig.preset("tiny", **changes)
    T = 128
    ids = torch.zeros(1, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        LLaMA(config)(ids)
    # PyTorch's counter also counts the masked half of attention: per token, over all T keys
    whole_attention = 4 * config.n_layer * config.n_head * config.head_dim * T
    masked = whole_attention * (T - 1) / (2 * T)
    ours = T * (cost.flops_per_token(config, T, training=False) + masked)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert cost.flops_per_token(config, T) == 3 * cost.flops_per_token(config, T, training=False)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_block_params_are_those_of_a_block(tie_embeddings):
    config = LLaMAConfig.preset("tiny", n_kv_head=2, tie_embeddings=tie_embeddings)
    block = LLaMA(config).layers[0]
    assert cost.block_params(config) == sum(weight.numel() for weight in block.parameters())


def test_step_flops_adds_up_the_parts_of_the_batch():
    config = LLaMAConfig.preset("tiny")
    long = SimpleNamespace(length=512, rows=2)
    short = SimpleNamespace(length=256, rows=3)
    expected = 2 * 512 * cost.flops_per_token(config, 512)
    expected += 3 * 256 * cost.flops_per_token(config, 256)
    assert cost.step_flops(config, [long, short]) == expected


def test_peak_flops_are_found_by_the_name(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "Something else": None,
    }
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        assert cost.peak_flops(torch.device("cuda")) == flops
    assert cost.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("activations", cost.ACTIVATIONS)
def test_the_measured_speed_is_flops_over_seconds(monkeypatch, activations):
    """By a clock that a look moves on by 0.2 s, so that three steps take the 0.5 s that are asked."""
    config = LLaMAConfig.preset("tiny", n_layer=7, vocab_size=5000, rope="linear", scale=2.0)
    block = replace(config, n_layer=1, vocab_size=1024)
    ticks = iter(range(100))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: 0.2 * next(ticks))
    steps = []
    forward = LLaMA.forward

    def counted(self, ids, targets):
        steps.append((self.config, tuple(ids.shape), self.checkpoint_activations))
        return forward(self, ids, targets)

    monkeypatch.setattr(LLaMA, "forward", counted)
    cpu = torch.device("cpu")
    rate = cost.measured_flops(config, 2, 64, activations, cpu, torch.float32)
    assert steps == 4 * [(block, (2, 64), activations)]  # the first one is not timed
    assert rate == pytest.approx(3 * 2 * 64 * cost.flops_per_token(block, 64) / 0.6)


# ---- memory --------------------------------------------------------------------------------------

PROBE = """
import re, sys
sys.path.insert(0, ROOT)
import torch
from model import LLaMA, LLaMAConfig

def status(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

# a small model first, so that threads and libraries are there
ids = torch.zeros(1, 8, dtype=torch.int64)
warm = LLaMA(LLaMAConfig())
warm(ids, ids).backward()
torch.optim.AdamW(warm.parameters(), fused=True).step()
del warm
before = status("VmRSS")
model = LLaMA(LLaMAConfig(**SHAPE))
model.checkpoint_activations = ACTIVATIONS
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS))
for _ in range(2):
    with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
        model(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(status("VmHWM") - before)
"""
DEEP = {"n_layer": 6, "n_embd": 256, "n_head": 4, "intermediate_size": 704, "vocab_size": 4000}
WIDE = {"n_layer": 3, "n_embd": 640, "n_head": 10, "n_kv_head": 5, "intermediate_size": 1792}
WIDE["vocab_size"] = 16000


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"
)
@pytest.mark.parametrize(
    "shape, batch, tokens, activations, bf16",
    [
        pytest.param(DEEP, 1, 2048, "none", False, id="activations"),
        pytest.param(DEEP, 2, 1024, "full", False, id="full"),
        pytest.param(DEEP, 2, 1024, "selective", False, id="selective"),
        pytest.param(WIDE, 1, 512, "none", False, id="weights"),
        pytest.param(WIDE | {"vocab_size": 4000}, 1, 256, "none", True, id="autocast"),
    ],
)
def test_the_planned_peak_is_within_30_percent_of_the_measured_one(
    shape, batch, tokens, activations, bf16
):
    values = (str(ROOT), shape, batch, tokens, activations, bf16)
    probe = f"ROOT, SHAPE, BATCH, TOKENS, ACTIVATIONS, BF16 = {values}" + PROBE
    # What is freed goes back to the system at once, so that the allocator leaves no gaps
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=True
    )
    measured = int(done.stdout)
    planned = cost.memory(
        LLaMAConfig(**shape),
        batch * tokens,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        checkpoint_activations=activations,
    )
    print({name: format_bytes(number) for name, number in planned.items()})
    print("measured", format_bytes(measured))
    assert planned["peak"] == pytest.approx(measured, rel=0.3)


# Gigabytes that PyTorch's FSDPMemTracker found for a step in bf16 at 32,768 tokens, with CUDA's
# kernels (fake tensors in a fake process group, PyTorch 2.13)
TRACKED = [
    # preset, processes, micro batches, activations, peak
    ("llama-7b", 8, 1, "full", 27.79),
    ("llama-7b", 8, 2, "full", 31.06),
    ("llama-7b", 8, 2, "selective", 39.24),
    ("llama-7b", 8, 2, "none", 187.2),
    ("llama-65b", 64, 1, "full", 76.6),
]


@pytest.mark.parametrize("preset, processes, micro_batches, activations, peak", TRACKED)
def test_the_planned_peak_under_fsdp_is_within_5_percent_of_the_tracked_one(
    preset, processes, micro_batches, activations, peak
):
    planned = cost.memory(
        LLaMAConfig.preset(preset),
        32768,
        processes=processes,
        dist="fsdp",
        dtype=torch.bfloat16,
        checkpoint_activations=activations,
        device_type="cuda",
        micro_batches=micro_batches,
    )
    assert planned["peak"] == pytest.approx(peak * 1e9, rel=0.05)


TRACKER = """
import gc, json, sys
sys.path.insert(0, ROOT)
import torch, torch.distributed as dist, torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
import parallel
from model import LLaMAConfig

class CudaNorm(torch.autograd.Function):
    # saves what CUDA's kernel saves: the CPU's saves every step of the arithmetic
    @staticmethod
    def forward(ctx, x, weight):
        scale = torch.empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)

F.rms_norm = lambda x, shape, weight, eps: CudaNorm.apply(x, weight)
dist.init_process_group("fake", rank=0, world_size=PROCESSES, store=FakeStore())
mesh = init_device_mesh("cpu", (PROCESSES,))  # FakeTensorMode can't make one
parallel.init_device_mesh = lambda device_type, shape: mesh
gc.disable()  # so that it runs at the same places each time
peaks = {}
with FakeTensorMode():
    for activations in ("none", "selective", "full"):
        config = LLaMAConfig(**SHAPE)
        model = parallel.sharded(config, [], torch.device("cpu"), torch.bfloat16)
        model.checkpoint_activations = activations
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((ids, ids))
        with tracker:
            for step in range(2):  # the first one makes the optimizer's moments
                model(ids, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
                gc.collect(1)
                if step == 0:
                    tracker.reset_mod_stats()
        peaks[activations] = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
print(json.dumps(peaks))
"""


def test_the_planned_peak_under_fsdp_is_that_of_pytorchs_tracker():
    """Tensors without memory, in a process group that is one process alone."""
    shape = {"n_layer": 3, "n_embd": 1024, "n_head": 8, "intermediate_size": 2752}
    shape["vocab_size"] = 8000
    tokens = 8192
    values = (str(ROOT), shape, tokens, 8)
    probe = f"ROOT, SHAPE, TOKENS, PROCESSES = {values}" + TRACKER
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    for activations, peak in peaks.items():
        planned = cost.memory(
            LLaMAConfig(**shape), tokens, processes=8, dist="fsdp", dtype=torch.bfloat16,
            checkpoint_activations=activations
        )
        print(f"{activations}: tracked {format_bytes(peak)}, planned {planned['peak'] / peak:.3f}")
        assert 0.85 < planned["peak"] / peak < 1.2  # too much is the lesser evil
    assert peaks["none"] > 1.5 * peaks["selective"] > 1.5 * peaks["full"]


def test_fsdp_shares_out_and_checkpointing_saves():
    config = LLaMAConfig.preset("llama-7b")

    def peak(**options) -> float:
        return cost.memory(config, 65536, dtype=torch.bfloat16, **options)["peak"]

    fsdp = dict(dist="fsdp", processes=8)
    assert peak() > peak(**fsdp) > peak(**fsdp, checkpoint_activations="selective")
    selective = peak(checkpoint_activations="selective")
    assert peak(checkpoint_activations="full") < selective < peak()
    alone = cost.memory(config, 65536, dist="fsdp", processes=1)
    shared = cost.memory(config, 65536, dist="fsdp", processes=8)
    assert alone["optimizer"] == 8 * shared["optimizer"] == 8 * config.n_params


def test_the_verdict():
    assert cost.verdict(80e9, 79e9).startswith("does not fit")
    assert cost.verdict(79e9, 80e9).startswith("may not fit")
    assert cost.verdict(60e9, 80e9) == "fits"


# ---- the memory that is free ---------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_free_memory_is_what_linux_and_the_container_leave(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n")
    assert cost.free_cpu_memory(tmp_path) == 5000 * 1024

    # Version 2 of control groups: the process is in /a/b, and the limit is that of /a
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.max", "max\n")
    group = tmp_path / "sys/fs/cgroup/a"
    write(group / "memory.max", "3000000\n")
    write(group / "memory.current", "1000000\n")
    write(group / "memory.stat", "anon 5\ninactive_file 200000\nactive_file 7\n")
    assert cost.free_cpu_memory(tmp_path) == 3000000 - 1000000 + 200000

    # Version 1, where a container sees its own group as the topmost folder
    write(tmp_path / "proc/self/cgroup", "5:cpu:/docker/x\n4:memory:/docker/x\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    write(group / "memory.limit_in_bytes", "4000000\n")
    write(group / "memory.usage_in_bytes", "1000000\n")
    write(group / "memory.stat", "inactive_file 3\ntotal_inactive_file 50000\n")
    assert cost.free_cpu_memory(tmp_path) == 4000000 - 1000000 + 50000
    write(group / "memory.limit_in_bytes", "9223372036854771712\n")  # as where there is no limit
    assert cost.free_cpu_memory(tmp_path) == 5000 * 1024


def test_memory_of_a_gpu_that_this_process_has_freed_is_free(monkeypatch):
    free = [3]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 8))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 4))
    assert cost.free_memory(torch.device("cuda")) == 7


def test_free_memory_of_this_machine():
    free = cost.free_memory(torch.device("cpu"))
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- the plan ------------------------------------------------------------------------------------


def test_the_expected_mfu_falls_with_the_window():
    assert cost.expected_mfu(2048) == cost.expected_mfu(256) == cost.PUBLISHED_MFU[2048]
    assert cost.expected_mfu(8192) == cost.PUBLISHED_MFU[8192]
    assert cost.expected_mfu(32768) == cost.expected_mfu(131072) == cost.PUBLISHED_MFU[32768]
    assert cost.expected_mfu(4096).expected == pytest.approx((0.40 + 0.33) / 2)
    for window in (1024, 4096, 16384):
        mfu = cost.expected_mfu(window)
        assert mfu.low < mfu.expected < mfu.high


def test_the_report():
    config = LLaMAConfig.preset("llama-7b", rope="linear", scale=16, block_size=32768)
    hour = 3600 * cost.PEAK_FLOPS["A100"]
    text = cost.report(
        config,
        steps=1000,
        batch_size=64,
        micro_batch_size=1,
        micro_batches=8,
        flops=100 * hour,
        processes=8,
        dist="fsdp",
        dtype=torch.bfloat16,
        device_type="cuda",
        checkpoint_activations="selective",
        available=80e9,
    )
    lines = text.splitlines()
    window = "window 2,048 -> 32,768, by rope 'linear' at scale 16"
    assert lines[0] == f"6,738.4 M parameters, {window}"
    assert lines[1] == "1,000 steps of 64 x 32,768: 2,097,152,000 tokens"
    assert "400.0 A100 hours (285.7 to 454.5)" in lines[2]
    assert lines[2].endswith("if 25% (35% to 22%) of the data sheet's FLOP/s are reached")
    assert lines[3].startswith("each of 8 devices: fsdp, bfloat16, 1 x 32,768 tokens at a time")
    assert lines[3].endswith("activations recomputed: selective")
    names = [line.split()[0] for line in lines[4:]]
    assert names == ["weights", "optimizer", "gradients", "activations", "loss", "peak", "of"]
    assert lines[-1].split() == ["of", "80.0", "GB", "fits"]


def test_the_report_of_one_process_that_extends_nothing():
    text = cost.report(
        LLaMAConfig.preset("tiny"),
        steps=10,
        batch_size=4,
        micro_batch_size=4,
        micro_batches=1,
        flops=1e15,
        processes=1,
        dist="ddp",
        dtype=torch.float32,
        device_type="cpu",
        checkpoint_activations="none",
        available=1e6,
    )
    assert "by rope" not in text
    assert "each of 1 devices: alone, float32, 4 x 256 tokens at a time" in text
    assert "does not fit" in text.splitlines()[-1]


def test_the_tables_of_the_reference_are_those_of_the_plan():
    """If they are not: python tests/what_fits.py prints the new ones."""
    reference = (ROOT / "REFERENCE.md").read_text(encoding="utf-8")
    assert table() in reference
    assert table_of_rows() in reference
