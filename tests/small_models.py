"""Small random models for the tests of model.py and loss.py, and a recorder of the operators that they run."""

import math

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from model import LLaMA, LLaMAConfig

SHAPES = {
    "mha": dict(),
    "gqa": dict(n_kv_head=2),
    "mqa": dict(n_kv_head=1),
    "tied": dict(n_kv_head=2, tie_embeddings=True),
    "head_dim": dict(head_dim=32),  # 4 heads of 32 from 64 channels
}
WINDOW = 32  # the original one; sequences are three times as long
METHODS = {
    "none": dict(),
    "linear": dict(rope="linear", scale=4.0),
    "ntk": dict(rope="ntk", scale=4.0),
    "dynamic": dict(rope="dynamic", scale=4.0),
    "yarn": dict(rope="yarn", scale=4.0),
    "llama3": dict(rope="llama3", scale=4.0),
}


def make_config(**changes):
    small = dict(vocab_size=97, n_layer=3, n_head=4, n_embd=64, intermediate_size=96, block_size=WINDOW)
    return LLaMAConfig(**small | changes)


@torch.no_grad()
def randomize(model, seed=0):
    """Weights that keep every activation, and so the logits, of order 1, and attention far from uniform."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.normal_(mean=1, std=0.2)
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(std=gain / math.sqrt(weight.size(1)))
    return model.eval()


def make(seed=0, **changes):
    return randomize(LLaMA(make_config(**changes)), seed)


def random_ids(*shape, seed=1, vocab_size=97):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class Recorder(TorchDispatchMode):
    """Sees every operator: counts them by name, keeps the largest output, and knows what memory is still held."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest, self.made, self.storages = {}, 0, [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
                self.made.append((name, tuple(t.shape)))
                self.storages.append((StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()))
        return out

    def attentions(self):
        return sum(n for name, n in self.calls.items() if "scaled_dot" in name and "backward" not in name)

    def bytes_held(self):
        return sum({ref.cdata: size for ref, size in self.storages if not ref.expired()}.values())
