"""LLaMA from scratch: its sizes, attention with RoPE, the KV cache, the forward pass, generation.

    model = LLaMA(LLaMAConfig.preset("tiny"))
    logits = model(ids)                # ids (B, T) -> (B, T, vocab_size)
    loss = model(ids, targets)         # the mean cross-entropy
    ids = model.generate(ids, 100)     # greedy; temperature and top_p for sampling

Parameters have the names of Hugging Face's LLaMA, so that checkpoint.py has nothing to rename.
Shapes: B sequences, T new tokens, S cached and new tokens, C = n_embd, H heads, K key/value heads,
D = head_dim, V = vocab_size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from loss import IGNORED, ChunkedCrossEntropy, token_losses
from rope import apply_rope, rope_cos_sin, rope_frequencies

# ---- the sizes -----------------------------------------------------------------------------------


@dataclass
class LLaMAConfig:
    """The sizes of a LLaMA and its RoPE settings. Raises ValueError for sizes that don't fit.

    original_window: L, the window of pre-training.
    block_size: L', the window that the model now has; hf_config.extend makes it scale * L.
        Nothing here limits the input to it.
    rope: a method of rope.METHODS.  scale: the method's factor.
    rope_extra: further arguments of rope_frequencies (yarn's and llama3's).
    """

    vocab_size: int = 1024
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 0  # 0: as many as n_head
    n_embd: int = 128
    head_dim: int = 0  # 0: n_embd / n_head
    intermediate_size: int = 352
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    block_size: int = 256
    rope: str = "none"
    scale: float = 1.0
    original_window: int = 0  # 0: block_size
    rope_extra: dict[str, float] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None  # Llama 3's instruct models end at any of several

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_kv_head or self.n_head
        self.original_window = self.original_window or self.block_size
        for name in (
            "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size",
            "block_size"
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a small positive number, got {self.norm_eps}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: give head_dim"
            )
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        self.rope_frequencies()  # raises ValueError if a value is out of range

    def rope_frequencies(
        self, length: int | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, float]:
        """rope.rope_frequencies of this config. Only the method "dynamic" depends on the length."""
        if self.rope != "dynamic":
            length = None  # so that calls of different lengths share one cached result
        return rope_frequencies(
            self.head_dim, self.rope_theta, self.rope, self.scale, self.original_window,
            length=length, device=device, **self.rope_extra
        )

    @property
    def first_eos_id(self) -> int | None:
        """The token that ends a document in training data."""
        if isinstance(self.eos_id, tuple):
            return self.eos_id[0]
        return self.eos_id

    @property
    def n_params(self) -> int:
        """The number of parameters; an embedding that is tied to the head counts once."""
        attention = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        mlp = 3 * self.n_embd * self.intermediate_size
        block = attention + mlp + 2 * self.n_embd
        embedding = self.vocab_size * self.n_embd
        head = 0 if self.tie_embeddings else embedding
        return embedding + self.n_layer * block + self.n_embd + head

    @classmethod
    def preset(cls, name: str, **changes) -> "LLaMAConfig":
        """One of PRESETS, with some fields changed. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
        shape = PRESETS[name]
        # A larger block_size in `changes` leaves original_window as the preset has it
        original_window = cls(**shape).block_size
        return cls(**{**shape, "original_window": original_window, **changes})


def _shape(n_layer: int, n_head: int, n_embd: int, intermediate_size: int, **fields) -> dict:
    return dict(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, intermediate_size=intermediate_size, **fields
    )


_LLAMA1 = dict(vocab_size=32000, block_size=2048, norm_eps=1e-6, bos_id=1, eos_id=2)
_LLAMA1_65B = dict(vocab_size=32000, block_size=2048, norm_eps=1e-5, bos_id=1, eos_id=2)
_LLAMA2 = dict(vocab_size=32000, block_size=4096, bos_id=1, eos_id=2)
_LLAMA3 = dict(
    vocab_size=128256, block_size=8192, rope_theta=5e5, n_kv_head=8, bos_id=128000, eos_id=128001
)
_TINYLLAMA = dict(vocab_size=32000, block_size=2048, n_kv_head=4, bos_id=1, eos_id=2)
_SMOLLM2 = dict(
    vocab_size=49152, block_size=8192, rope_theta=1e5, n_kv_head=3, tie_embeddings=True, bos_id=1,
    eos_id=2
)
# The positional arguments: n_layer, n_head, n_embd, intermediate_size
PRESETS = {
    # Learns to read and to retrieve in minutes on a CPU. With this theta the mean score of like
    # tokens first falls below 0 near the length of the window (bounds.first_zero), as LLaMA's does.
    "tiny": _shape(3, 2, 128, 352, rope_theta=2000.0),
    "llama-7b": _shape(32, 32, 4096, 11008, **_LLAMA1),
    "llama-13b": _shape(40, 40, 5120, 13824, **_LLAMA1),
    "llama-33b": _shape(60, 52, 6656, 17920, **_LLAMA1),
    "llama-65b": _shape(80, 64, 8192, 22016, **_LLAMA1_65B),
    "llama2-7b": _shape(32, 32, 4096, 11008, **_LLAMA2),
    "llama2-13b": _shape(40, 40, 5120, 13824, **_LLAMA2),
    "llama2-70b": _shape(80, 64, 8192, 28672, n_kv_head=8, **_LLAMA2),
    "llama3-8b": _shape(32, 32, 4096, 14336, **_LLAMA3),
    "llama3-70b": _shape(80, 64, 8192, 28672, **_LLAMA3),
    "tinyllama-1.1b": _shape(22, 32, 2048, 5632, **_TINYLLAMA),
    "smollm2-135m": _shape(30, 9, 576, 1536, **_SMOLLM2),
}

# ---- the parts of a block ------------------------------------------------------------------------


class KVCache:
    """Keys (already turned by RoPE) and values of all tokens so far, in memory allocated once."""

    def __init__(
        self, config: LLaMAConfig, batch: int, max_length: int, device: torch.device,
        dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch, config.n_kv_head, max_length, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens of earlier calls
        self.max_length = max_length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) of new tokens; return those of all tokens, (B, K, S, D).

        The model moves `length` on after the last layer, because all layers write at the same
        place.
        """
        end = self.length + k.size(2)
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, {end} are needed")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # Under autocast y is float32. Without this cast, each nn.Linear that reads y would make its
        # own copy in bfloat16, and all of them would be kept for the backward pass.
        device = x.device.type
        if torch.is_autocast_enabled(device):
            y = y.to(torch.get_autocast_dtype(device))
        return y


def shares_key_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether a fast kernel lets several query heads share a key head on q's device.

    On CUDA that is flash attention alone. It takes 16 bits, from compute capability 8 (A100) on,
    and no mask. Otherwise PyTorch would fall back to the plain kernel, which holds all T x S
    scores.
    """
    if q.device.type != "cuda":
        return True
    if mask is not None or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_properties(q.device).major >= 8


class Attention(nn.Module):
    """Causal attention. With n_kv_head < n_head, H / K query heads share a key head (GQA)."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        self.head_dim = D
        self.group = config.n_head // config.n_kv_head  # query heads that share a key head
        self.q_proj = nn.Linear(C, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """x (B, T, C), cos and sin (T, D/2) or (B, T, D/2) -> (B, T, C).

        With a cache, x follows what is in it.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)

        # All heads of a token turn by the same angles
        cos = cos.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
        sin = sin.unsqueeze(-2)
        q = apply_rope(q, cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = apply_rope(k, cos, sin).transpose(1, 2)  # (B, K, T, D)
        v = v.transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, S, D)

        # A token attends to itself and to all tokens before it. There are three cases:
        #   T == S      nothing was cached: is_causal says so
        #   T == 1      a single new token may see everything: no mask
        #   1 < T < S   new token i may see all cached tokens, and new ones up to i: a mask
        S = k.size(2)
        mask = None
        if 1 < T < S:
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        causal = T > 1 and mask is None  # in this order it is a plain bool under torch.compile too
        y = self.attend(q, k, v, mask, causal)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))

    def last_token(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, layer: int) -> Tensor:
        """What `forward` returns for the last token alone, (B, 1, C); the cache is filled as there.

        For speed, in a model's last block: only the last token needs a query, while keys and values
        come from all tokens.
        """
        B, T, _ = x.shape
        q = self.q_proj(x[:, -1:]).view(B, 1, -1, self.head_dim)  # (B, 1, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        cos = cos.unsqueeze(-2)  # (T, 1, D/2)
        sin = sin.unsqueeze(-2)
        q = apply_rope(q, cos[-1:], sin[-1:]).transpose(1, 2)  # (B, H, 1, D)
        k = apply_rope(k, cos, sin).transpose(1, 2)  # (B, K, T, D)
        k, v = cache.append(layer, k, v.transpose(1, 2))  # (B, K, S, D)
        y = self.attend(q, k, v)  # (B, H, 1, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, 1, -1))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """softmax(q k / sqrt(D)) v: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
        gqa = self.group > 1
        if gqa and not shares_key_heads(q, mask):
            k = k.repeat_interleave(self.group, dim=1)  # (B, H, S, D)
            v = v.repeat_interleave(self.group, dim=1)  # (B, H, S, D)
            gqa = False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
        )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))

    def last_token(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, layer: int) -> Tensor:
        """What `forward` returns for the last token alone, (B, 1, C)."""
        attended = self.self_attn.last_token(self.input_layernorm(x), cos, sin, cache, layer)
        x = x[:, -1:] + attended
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- the model -----------------------------------------------------------------------------------

# The fused attention kernels. Selective checkpointing keeps their results and recomputes the rest.
ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


class LLaMA(nn.Module):
    """The model: ids (B, T) -> logits (B, T, V), or with targets (B, T) the mean loss."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = "none"  # or "full", "selective": see `run_block`
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights from torch's global seed.

        Output projections start at zero, so each block starts as the identity and an untied head
        predicts all tokens alike: with that the tiny base trains at a rate of 4e-3.
        """
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
            elif name.startswith("embed_tokens"):
                nn.init.normal_(weight, std=0.02 if self.config.tie_embeddings else 0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight")) or name == "lm_head.weight":
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=0.7 / math.sqrt(weight.size(1)))

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
        positions: Tensor | None = None
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V). With targets (B, T), the mean cross-entropy.

        A token whose target is -100 is not scored. With a cache, ids follow what is in it.
        positions (B, T): what RoPE turns each token by; default: 0 ... T - 1, or what follows the
            cache. Whatever they are, a token attends to itself and to those before it in ids.
        """
        x = self.hidden(ids, cache, positions)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)
        # The summed loss, in chunks, so that the logits of a long window are never held at once
        loss = ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return loss / (targets != IGNORED).sum().clamp(min=1)

    def hidden(
        self, ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The normed hidden states (B, T, C) that the head reads."""
        cos, sin = self.rope_cos_sin(ids, cache, positions)
        x = self.embed_tokens(ids)
        for layer, block in enumerate(self.layers):
            x = self.run_block(block, x, cos, sin, cache, layer)
        if cache is not None:
            cache.length += ids.size(1)
        return self.norm(x)

    def rope_cos_sin(
        self, ids: Tensor, cache: KVCache | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions of ids, float32: (T, D/2), or (B, T, D/2) of given ones.

        The method "dynamic" goes by the number of tokens, whatever their positions.
        Recomputed in each forward pass and not stored, so that there is no buffer that a
        meta-device init could leave as garbage or `.to(bfloat16)` could round.
        """
        T = ids.size(1)
        start = 0
        length = T
        if cache is not None:
            start = cache.length
            # The cached keys are turned already, so "dynamic" must not change its angles while the
            # cache grows: it takes the final length
            length = cache.max_length
        if positions is None:
            positions = torch.arange(start, start + T, device=ids.device)
        inv_freq, attention_factor = self.config.rope_frequencies(length, ids.device)
        return rope_cos_sin(positions, inv_freq, attention_factor)

    def run_block(self, block: nn.Module, x: Tensor, *args) -> Tensor:
        """block(x, *args), its activations kept or recomputed as `checkpoint_activations` says.

        "none" keeps all activations for the backward pass. "full" keeps the block's input and
        recomputes the rest. "selective" also keeps attention's output, which costs O(T^2) to make
        and O(T) to keep.
        """
        if self.checkpoint_activations == "none" or not torch.is_grad_enabled():
            return block(x, *args)
        options = {"preserve_rng_state": False}  # nothing in a block is random
        if self.checkpoint_activations == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_OPS)
        return checkpoint(block, x, *args, use_reentrant=False, **options)

    @torch.no_grad()
    def nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) in nats: ids and targets (B, T) -> (B, T) float32; 0 for target -100."""
        x = self.hidden(ids)  # (B, T, C)
        scored = targets != IGNORED
        losses = torch.zeros(targets.shape, device=x.device)
        losses[scored] = token_losses(x[scored], self.lm_head.weight, targets[scored])
        return losses

    # ---- generation ----

    def generate(self, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
        """ids (B, T) and up to max_new_tokens more, (B, T + n). Options as in `stream`."""
        columns = [ids]
        for token in self.stream(ids, max_new_tokens, **options):
            columns.append(token[:, None])
        return torch.cat(columns, dim=1)

    @torch.inference_mode()
    def stream(
        self, ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        eos_id: int | tuple[int, ...] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Iterator[Tensor]:
        """Yield the next tokens (B,) of ids (B, T), one step at a time.

        temperature: 0 is greedy.  top_p: draw among the likeliest tokens that make up this
        probability.
        eos_id: a sequence ends at this token, or at any of several, and is then filled with the
        first.
        generator: one for all sequences, or one for each; then its draws don't depend on the
        others.
        """
        cache = KVCache(
            self.config, len(ids), ids.size(1) + max_new_tokens, ids.device,
            self.lm_head.weight.dtype
        )
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        stop = None
        if eos_id is not None:
            stop = torch.tensor(eos_id, device=ids.device).reshape(-1)
        for _ in range(max_new_tokens):
            logits = self.next_token_logits(ids, cache).float()
            token = sample(logits, temperature, top_p, generator)
            if stop is not None:
                token = torch.where(ended, stop[0], token)
                ended |= torch.isin(token, stop)
            yield token
            if stop is not None and ended.all():
                return
            ids = token[:, None]

    # ---- speed ----

    def next_token_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """self(ids, cache=cache)[:, -1] (B, V); the last block is computed for that token alone."""
        cos, sin = self.rope_cos_sin(ids, cache)
        x = self.embed_tokens(ids)
        for layer, block in enumerate(self.layers[:-1]):
            x = block(x, cos, sin, cache, layer)
        x = self.layers[-1].last_token(x, cos, sin, cache, len(self.layers) - 1)  # (B, 1, C)
        cache.length += ids.size(1)
        return self.lm_head(self.norm(x)[:, 0])

    @torch.no_grad()
    def lay_out_for_decoding(self) -> "LLaMA":
        """Store float32 matrices on a CPU column by column; returns self. Only for evaluation.

        On a CPU the product with a single token then takes about half the time (measured with MKL).
        Names, shapes and values stay. The embedding stays too, because it is read by rows.
        """
        for weight in self.parameters():
            if weight.device.type != "cpu" or weight.dtype != torch.float32:
                continue
            if weight.dim() == 2 and weight is not self.embed_tokens.weight:
                weight.data = weight.data.T.contiguous().T  # the same values, column by column
            else:
                # Copied too, so that the file that checkpoint.load mapped into memory can be
                # released
                weight.data = weight.data.clone()
        return self


def sample(
    logits: Tensor, temperature: float, top_p: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """One token for each row of logits: (B, V) -> (B,). The arguments are those of LLaMA.stream."""
    if temperature == 0:
        return logits.argmax(-1)
    if isinstance(generator, Sequence):
        rows = [sample(row[None], temperature, top_p, own) for row, own in zip(logits, generator)]
        return torch.cat(rows)
    probs = (logits / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        # Always keep the likeliest token; drop those after the total has passed top_p
        ordered, order = probs.sort(descending=True)  # (B, V) each
        total_before = ordered.cumsum(-1) - ordered
        dropped = total_before >= top_p
        dropped[:, 0] = False
        probs = probs.masked_fill(dropped.scatter(1, order, dropped), 0)
    # Drawn in the vocabulary's order. Another batch size rounds otherwise, and in the sorted order
    # two equally likely tokens would then change places: the same seed would draw the other one.
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
