"""LLaMA from scratch: config, blocks, KV cache, a loss that never holds all the logits, generation.

Read rope.py first, then this from top to bottom; the forward pass is the order of the file.

    model = LLaMA(LLaMAConfig.preset("tiny"))
    logits = model(ids)                # ids (B, T) -> (B, T, vocab_size)
    loss = model(ids, targets)         # the mean cross-entropy, the head met in chunks
    ids = model.generate(ids, 100)     # greedy; temperature and top_p for sampling

    python model.py --init FOLDER --prompt "Once upon a time"     # continues it, word by word

Parameters bear the names of Hugging Face's LLaMA, so that checkpoint.py has nothing to rename.
Shapes: B sequences, T tokens, C = n_embd, H heads, K key/value heads, D = head_dim, V = vocab_size.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rope import apply_rope, rope_cos_sin, rope_frequencies


@dataclass
class LLaMAConfig:
    """The shape of a LLaMA, and what its positions do. ValueError for a shape that can't be.

    block_size is the window in force; original_window the one that the model was pre-trained with;
    scale the factor that `rope` (a method of rope.METHODS) works with. rope_extra goes to
    rope_frequencies as it is (yarn's and llama3's ramps).
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
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "intermediate_size", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a small positive number, got {self.norm_eps}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: give head_dim")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        self.rope_frequencies()  # the method and its values are right, or this raises

    def rope_frequencies(
        self, length: int | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, float]:
        """rope.rope_frequencies of this config; `length` matters to the method "dynamic" alone."""
        return rope_frequencies(
            self.head_dim, self.rope_theta, self.rope, self.scale, self.original_window,
            length=length if self.rope == "dynamic" else None, device=device, **self.rope_extra,
        )  # fmt: skip

    @property
    def first_eos_id(self) -> int | None:
        return self.eos_id[0] if isinstance(self.eos_id, tuple) else self.eos_id

    @property
    def n_params(self) -> int:
        """Parameters, the embedding counted once where it is tied to the head."""
        attention = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        block = attention + 3 * self.n_embd * self.intermediate_size + 2 * self.n_embd
        return self.n_layer * block + self.n_embd + self.vocab_size * self.n_embd * (1 if self.tie_embeddings else 2)

    @classmethod
    def preset(cls, name: str, **changes) -> "LLaMAConfig":
        """One of PRESETS, with some fields changed. ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
        fields = PRESETS[name]  # derived ones (head_dim, n_kv_head) follow the changes, the original window does not
        return cls(**{**fields, "original_window": cls(**fields).block_size, **changes})


def _shape(n_layer: int, n_head: int, n_embd: int, intermediate_size: int, **more) -> dict:
    return dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, intermediate_size=intermediate_size, **more)


_LLAMA1 = dict(vocab_size=32000, block_size=2048, norm_eps=1e-6, bos_id=1, eos_id=2)
_LLAMA2 = dict(vocab_size=32000, block_size=4096, bos_id=1, eos_id=2)
_LLAMA3 = dict(vocab_size=128256, block_size=8192, rope_theta=500000.0, n_kv_head=8, bos_id=128000, eos_id=128001)
PRESETS = {
    "tiny": _shape(3, 4, 128, 352),  # learns to read and to retrieve in minutes on a CPU
    "llama-7b": _shape(32, 32, 4096, 11008, **_LLAMA1),
    "llama-13b": _shape(40, 40, 5120, 13824, **_LLAMA1),
    "llama-33b": _shape(60, 52, 6656, 17920, **_LLAMA1),
    "llama-65b": _shape(80, 64, 8192, 22016, **_LLAMA1 | dict(norm_eps=1e-5)),
    "llama2-7b": _shape(32, 32, 4096, 11008, **_LLAMA2),
    "llama2-13b": _shape(40, 40, 5120, 13824, **_LLAMA2),
    "llama2-70b": _shape(80, 64, 8192, 28672, n_kv_head=8, **_LLAMA2),
    "llama3-8b": _shape(32, 32, 4096, 14336, **_LLAMA3),
    "llama3-70b": _shape(80, 64, 8192, 28672, **_LLAMA3),
    "smollm2-135m": _shape(
        30, 9, 576, 1536, vocab_size=49152, n_kv_head=3, block_size=8192,
        rope_theta=100000.0, tie_embeddings=True, bos_id=1, eos_id=2,
    ),  # fmt: skip
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; PyTorch's fused kernel."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        device = x.device.type  # under autocast: cast once here, not kept once by each of the matrices that read it
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


class KVCache:
    """Keys (already turned by RoPE) and values of the tokens seen so far, in memory allocated once."""

    def __init__(
        self, config: LLaMAConfig, batch: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, batch, config.n_kv_head, max_length, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length, self.max_length = 0, max_length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, D) after what is there; all keys and values of that layer (B, K, S, D)."""
        end = self.length + k.size(2)
        if end > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens, {end} are needed")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    """Causal attention; n_kv_head < n_head shares each key and value among n_head / n_kv_head queries (GQA)."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.head_dim, self.gqa = D, config.n_kv_head < config.n_head
        self.q_proj = nn.Linear(C, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0, last: bool = False
    ) -> Tensor:
        asked = x[:, -1:] if last else x  # the tokens that ask; all of them answer
        B, T, _ = asked.shape
        q, k, v = (
            proj(y).view(B, y.size(1), -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
            for proj, y in ((self.q_proj, asked), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = apply_rope(q, cos[-T:], sin[-T:]), apply_rope(k, cos, sin)
        mask = None
        if cache is not None:
            k, v = cache.append(layer, k, v)
            if 1 < T < k.size(2):  # several new tokens after some old ones: causal from the lower right corner
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=self.gqa
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); with `last` for the last token alone."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, layer: int = 0, last: bool = False
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cache, layer, last)
        x = (x[:, -1:] if last else x) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaMA(nn.Module):
    """The model. Called on ids (B, T) it returns logits (B, T, V); with targets (B, T), the mean loss."""

    def __init__(self, config: LLaMAConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = "none"  # or "full", "selective": see `_run_block`
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights, from torch's global seed: every block starts as the identity, and an untied head at zero."""
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(weight)
            elif name.startswith("embed_tokens"):
                nn.init.normal_(weight, std=0.02 if self.config.tie_embeddings else 0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight")) or name == "lm_head.weight":
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=0.7 / math.sqrt(weight.size(1)))

    def rope_cos_sin(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2), float32. Made anew in each forward pass, from the config's frequencies: no buffer
        that a meta-device init could leave as garbage or `.to(bfloat16)` could round, and none in a checkpoint."""
        inv_freq, attention_factor = self.config.rope_frequencies(length, positions.device)
        return rope_cos_sin(positions, inv_freq, attention_factor)

    def hidden(self, ids: Tensor, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """The normed hidden states (B, T, C) that the head reads. With a cache, ids follow what is in it. `last`: only
        the last token's (B, 1, C); of the others the last layer then makes keys and values, which is all that is read
        of them."""
        T, start = ids.size(1), cache.length if cache else 0
        positions = torch.arange(start, start + T, device=ids.device)
        # "dynamic" fixes its frequencies for a whole call: with a cache, by the length that it was made for
        cos, sin = self.rope_cos_sin(positions, cache.max_length if cache else T)
        x = self.embed_tokens(ids)
        for layer, block in enumerate(self.layers):
            x = self._run_block(block, x, cos, sin, cache, layer, last and block is self.layers[-1])
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def _run_block(self, block: nn.Module, x: Tensor, *args) -> Tensor:
        """The block, its activations kept ("none"), recomputed in the backward pass ("full"), or recomputed but for
        the attention's output, which costs O(T^2) to make and O(T) to keep ("selective")."""
        if self.checkpoint_activations == "none" or not torch.is_grad_enabled():
            return block(x, *args)
        context = {}
        if self.checkpoint_activations == "selective":
            context["context_fn"] = lambda: create_selective_checkpoint_contexts(_keep_attention)
        return checkpoint(block, x, *args, use_reentrant=False, **context)

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V). With targets (B, T), -100 where nothing is asked, the mean cross-entropy."""
        x = self.hidden(ids, cache)
        if targets is None:
            return self.lm_head(x)
        total = ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return total / (targets != -100).sum().clamp(min=1)

    @torch.no_grad()
    def nll(self, ids: Tensor, targets: Tensor) -> Tensor:
        """-log p(targets) per token, in nats: ids and targets (B, T) -> (B, T) float32, 0 where targets is -100.
        Logits are made only where they are scored, a chunk at a time."""
        x, scored = self.hidden(ids), targets != -100
        losses = torch.zeros(targets.shape, device=x.device)
        weight, rows, wanted = self.lm_head.weight, x[scored], targets[scored]
        size = _chunk_size(weight)
        losses[scored] = torch.cat([
            F.cross_entropy((h @ weight.T).float(), t, reduction="none")
            for h, t in zip(rows.split(size), wanted.split(size))
        ] or [losses.new_zeros(0)])  # fmt: skip
        return losses

    @torch.no_grad()
    def lay_out_for_decoding(self) -> "LLaMA":
        """Store float32 matrices on a CPU column by column: there a product with a single token then takes about half
        the time (MKL; others were not measured). Names, shapes and values stay, but not an optimizer's state: not for
        training. A tied head stays too, since embeddings are read by rows. Returns self."""
        for weight in self.parameters():
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                by_columns = weight.dim() == 2 and weight is not self.embed_tokens.weight
                # the others are copied so that nothing holds on to the file that `checkpoint.load` mapped into memory
                weight.data = weight.data.T.contiguous().T if by_columns else weight.data.clone()
        return self

    @torch.inference_mode()
    def stream(
        self, ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        eos_id: int | tuple[int, ...] | None = None, generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the next tokens (B,) of ids (B, T), one step at a time, until max_new_tokens or until every sequence
        has met eos_id (one, or any of several); one that has met it gets it again. temperature 0 is greedy; otherwise
        one of the likeliest tokens that make up top_p of the probability is drawn."""
        cache = KVCache(self.config, len(ids), ids.size(1) + max_new_tokens, ids.device, self.lm_head.weight.dtype)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        stop = None if eos_id is None else torch.tensor(eos_id, device=ids.device).reshape(-1)
        for _ in range(max_new_tokens):
            logits = self.lm_head(self.hidden(ids, cache, last=True)[:, 0]).float()
            token = sample(logits, temperature, top_p, generator)
            if stop is not None:
                token = torch.where(done, stop[0], token)
                done |= torch.isin(token, stop)
            yield token
            if stop is not None and done.all():
                return
            ids = token[:, None]

    def generate(self, ids: Tensor, max_new_tokens: int, **options) -> Tensor:
        """ids (B, T) and up to max_new_tokens more: (B, T + n). The options are those of `stream`."""
        return torch.cat([ids, *(token[:, None] for token in self.stream(ids, max_new_tokens, **options))], dim=1)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """One token for each row of logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(descending=True)
    if top_p < 1:
        probs[:, 1:][(probs.cumsum(-1) - probs)[:, 1:] >= top_p] = 0  # the first stays, and the one that crosses top_p
    return order.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


_ATTENTION_OPS = {
    getattr(torch.ops.aten, name).default
    for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
                 "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
}  # fmt: skip


def _keep_attention(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _chunk_size(weight: Tensor) -> int:
    """Rows of logits at a time, whatever the vocabulary: 2^24 logits, 64 MiB in float32. A GPU, which would spend
    its time fetching the head's weight for so few rows, takes 2^27, 512 MiB."""
    return max(1, (2**27 if weight.is_cuda else 2**24) // weight.size(0))


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of hidden (N, C) against targets (N,) through the head's weight (V, C).

    A window of 32,768 tokens has 32,768 x V logits: 4 GiB in float32 for LLaMA, 16 for Llama 3, and as much again
    for their gradient. Here a chunk's logits meet the loss, give their gradients at once (softmax - one-hot, times
    the weight and the hidden states) and are gone: no logits are kept, and none are computed twice. All chunks use
    one buffer, and all steps between the matrix products work in place: fresh memory costs more than the arithmetic.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        w = weight.to(dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), device=hidden.device)
        size = _chunk_size(weight)
        buffer = torch.empty(min(size, len(hidden)), len(weight), device=hidden.device, dtype=dtype)
        for start in range(0, len(hidden), size):
            h, t = hidden[start : start + size].to(dtype), targets[start : start + size, None]
            asked = t != -100
            t = t.clamp(min=0)
            logits = torch.mm(h, w.T, out=buffer[: len(h)]).float()
            logits -= logits.amax(-1, keepdim=True)  # so that exp can't overflow
            wanted = logits.gather(1, t)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += ((sums.log() - wanted) * asked).sum()
            if wants_hidden or wants_weight:
                grad = logits.mul_(asked / sums)  # softmax - one-hot, where something is asked
                grad = grad.scatter_add_(1, t, -asked.to(grad.dtype)).to(dtype)
                if wants_hidden:
                    grad_hidden[start : start + size] = grad @ w
                if wants_weight and dtype == torch.float32:
                    grad_weight.addmm_(grad.T, h)
                elif wants_weight:
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = (None if g is None else g * grad_total for g in (grad_hidden, grad_weight))
        return *scaled, None


# ---- python model.py --init FOLDER --prompt "..." ---------------------------------------------------------------


def text_pieces(tokens: Iterable[int], decode: Callable[[list[int]], str], before: list[int]) -> Iterator[str]:
    """The text of tokens as they come; `before` are the last tokens of the prompt.

    A token can be half a character, or a word whose space shows only after another word, so each piece is what a
    token adds to the text of the ones before it, and waits until its last character is whole.
    """
    ids, known = list(before), len(before)
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(decode(ids[:known])) :]
            ids, known = ids[known:], len(ids) - known
    yield decode(ids)[len(decode(ids[:known])) :]


def main() -> None:
    from checkpoint import Parser, add_model_flags, load_from_flags, load_tokenizer  # they build on this file

    parser = Parser("Continue a text with a checkpoint, token by token.")
    add_model_flags(parser, init="out/base")
    add = parser.add_argument
    add("--prompt", default="def main(", help="the text to continue, or a file that holds it")
    add("--max_new_tokens", type=int, default=200, help="how many tokens at most")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token; 1: drawn as the model says")
    add("--top_p", type=float, default=1.0, help="draw among the likeliest tokens that make up this probability")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or not args.temperature >= 0 or not 0 < args.top_p <= 1:
        raise ValueError("--max_new_tokens must be at least 1, --temperature at least 0, --top_p above 0 and at most 1")
    text = args.prompt
    if os.path.isfile(text):
        with open(text, encoding="utf-8", errors="replace") as file:
            text = file.read()
    model = load_from_flags(args).lay_out_for_decoding()
    config, device, tokenizer = model.config, model.lm_head.weight.device, load_tokenizer(args.init, model.config)
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    total = len(ids) + args.max_new_tokens
    if not ids or total > config.block_size:
        raise ValueError(
            f"--prompt and --max_new_tokens are {len(ids)} + {args.max_new_tokens} tokens, the window is "
            f"{config.block_size}: give fewer (but at least one) or --scale {math.ceil(total / config.original_window)}"
        )
    options = dict(
        temperature=args.temperature, top_p=args.top_p, generator=torch.Generator(device).manual_seed(args.seed)
    )
    options["eos_id"] = tokenizer.eos_id if config.eos_id is None else config.eos_id
    start, times = time.perf_counter(), []

    def tokens() -> Iterator[int]:
        for token in model.stream(torch.tensor([ids], device=device), args.max_new_tokens, **options):
            token = token.item()  # waits for the device
            times.append(time.perf_counter())
            yield token

    for piece in text_pieces(tokens(), tokenizer.decode, ids[-8:]):
        print(piece, end="", flush=True)
    print(flush=True)
    prefill, decoding = times[0] - start, max(times[-1] - times[0], 1e-9)
    print(
        f"prefill: {len(ids)} tokens, {len(ids) / prefill:,.0f} tokens/s; decoding: {len(times)} tokens, "
        f"{(len(times) - 1) / decoding:,.1f} tokens/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    from checkpoint import run

    run(main)
