"""cost.py: FLOPs as PyTorch counts them, memory as a process needs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
from model import LLaMA, LLaMAConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}, {"tie_embeddings": True}, {"head_dim": 16}])
def test_flops_are_those_that_pytorch_counts(changes):
    """Its counter takes attention whole, the masked half too."""
    config, T = LLaMAConfig.preset("tiny", **changes), 128
    ids = torch.zeros(1, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        LLaMA(config)(ids)
    attention = 4 * config.n_layer * config.n_head * config.head_dim * T  # a token's, over all T keys
    masked = attention * (T - 1) / (2 * T)
    ours = T * (cost.flops_per_token(config, T, training=False) + masked)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert cost.flops_per_token(config, T) == 3 * cost.flops_per_token(config, T, training=False)


PROBE = """
import re, sys
sys.path.insert(0, ROOT)
import torch
from model import LLaMA, LLaMAConfig

def status(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

ids = torch.zeros(1, 8, dtype=torch.int64)
warm = LLaMA(LLaMAConfig())
warm(ids, ids).backward()  # threads and libraries are there
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
DEEP = dict(n_layer=6, n_embd=256, n_head=4, intermediate_size=704, vocab_size=4000)
WIDE = dict(n_layer=3, n_embd=640, n_head=10, n_kv_head=5, intermediate_size=1792, vocab_size=16000)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("shape, batch, tokens, activations, bf16", [
    (DEEP, 1, 2048, "none", False), (DEEP, 2, 2048, "full", False), (DEEP, 2, 2048, "selective", False),
    (WIDE, 1, 512, "none", False), (WIDE, 1, 1024, "none", True),
], ids=["activations", "full", "selective", "weights", "autocast"])  # fmt: skip
def test_the_planned_peak_is_within_30_percent_of_the_measured_one(shape, batch, tokens, activations, bf16):
    probe = f"ROOT, SHAPE, BATCH, TOKENS, ACTIVATIONS, BF16 = {(str(ROOT), shape, batch, tokens, activations, bf16)}"
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed goes back at once: no gaps
    done = subprocess.run([sys.executable, "-c", probe + PROBE], env=env, capture_output=True, text=True, check=True)
    planned = cost.memory(LLaMAConfig(**shape), batch * tokens, dtype=torch.bfloat16 if bf16 else torch.float32,
                          checkpoint_activations=activations)  # fmt: skip
    print({name: cost.size(number) for name, number in planned.items()}, "measured", cost.size(int(done.stdout)))
    assert planned["peak"] == pytest.approx(int(done.stdout), rel=0.3)


def test_fsdp_shares_out_and_checkpointing_saves():
    config, T = LLaMAConfig.preset("llama-7b"), 65536

    def peak(**how) -> float:
        return cost.memory(config, T, dtype=torch.bfloat16, **how)["peak"]

    assert peak() > peak(dist="fsdp", processes=8) > peak(dist="fsdp", processes=8, checkpoint_activations="selective")
    assert peak(checkpoint_activations="full") < peak(checkpoint_activations="selective") < peak()
    alone, shared = (cost.memory(config, T, dist="fsdp", processes=n) for n in (1, 8))
    assert alone["optimizer"] == 8 * shared["optimizer"] == 8 * config.n_params
