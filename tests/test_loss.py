"""loss.py: a loss in chunks equals a loss in one, and so do its gradients; it never holds all the logits."""

import pytest
import torch
import torch.nn.functional as F

import loss as loss_module
from loss import ChunkedCrossEntropy
from small_models import Recorder, make, random_ids


def targets_for(ids, kind):
    targets = ids.roll(-1, dims=1).clone()
    if kind == "some":
        targets[0, :5] = targets[1, 3] = targets[:, -1] = -100
    elif kind == "none":
        targets[:] = -100
    return targets


def plain_loss(model, ids, targets):
    """Cross-entropy of all the logits at once; 0 where nothing is asked (F.cross_entropy would say nan)."""
    total = F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / max(1, (targets != -100).sum().item())


def loss_and_grads(model, loss):
    model.zero_grad()
    (3 * loss).backward()  # 3: what comes from above must reach the gradients
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("asked", ["all", "some", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 11, 65, 66, 1000])  # of 66 rows: 7 does not divide it, 65 leaves one
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(monkeypatch, chunk, asked, tied):
    model, ids = make(n_layer=1, tie_embeddings=tied), random_ids(3, 22)
    targets = targets_for(ids, asked)
    expected, expected_grads = loss_and_grads(model, plain_loss(model, ids, targets))
    if chunk:
        monkeypatch.setattr(loss_module, "chunk_size", lambda weight: chunk)
    loss, grads = loss_and_grads(model, model(ids, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # a mean of 66 float32 of order 5
    assert grads.keys() == expected_grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():  # float32 sums of up to 97 x 66 terms; the gradients are of order 0.01 to 1
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
    largest = max(grad.abs().max() for grad in grads.values())
    assert largest == 0 if asked == "none" else largest > 0.05


def test_the_chunked_loss_in_float64_passes_gradcheck(monkeypatch):
    """Finite differences know nothing of how the gradient was made."""
    monkeypatch.setattr(loss_module, "chunk_size", lambda weight: 3)
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 2, -100, 1])
    (ChunkedCrossEntropy.apply(hidden, weight, targets)).backward()
    for x in (hidden, weight):
        flat = x.detach().double().flatten()
        for i in range(flat.numel()):
            ends = []
            for step in (1e-4, -1e-4):
                moved = flat.clone()
                moved[i] += step
                h, w = (moved.view_as(x) if x is y else y.detach().double() for y in (hidden, weight))
                ends.append(F.cross_entropy(h @ w.T, targets, ignore_index=-100, reduction="sum").item())
            # float64 differences are right to 1e-8, our float32 gradients to some 1e-6
            assert x.grad.flatten()[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, abs=5e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_chunked_loss_under_autocast(monkeypatch, tied):
    model, ids = make(n_layer=1, tie_embeddings=tied), random_ids(3, 22)
    targets = targets_for(ids, "some")
    exact, exact_grads = loss_and_grads(model, plain_loss(model, ids, targets))
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_grads = loss_and_grads(model, plain_loss(model, ids, targets))
        monkeypatch.setattr(loss_module, "chunk_size", lambda weight: 7)
        loss, grads = loss_and_grads(model, model(ids, targets))
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-3  # the same bf16 logits, summed in float32
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        # bf16 keeps 8 bits: both are off by some 1% of the exact one, and ours by no more than twice PyTorch's own
        exact_grad = exact_grads[name]
        theirs, ours = ((g[name] - exact_grad).norm() / exact_grad.norm() for g in (expected_grads, grads))
        assert ours < max(2 * theirs, 0.02), (name, ours, theirs)


@pytest.mark.parametrize("frozen", ["head", "all but the head", "all"])
def test_the_chunked_loss_with_parts_frozen(monkeypatch, frozen):
    monkeypatch.setattr(loss_module, "chunk_size", lambda weight: 7)
    model, ids = make(n_layer=1), random_ids(3, 22)
    _, expected = loss_and_grads(model, plain_loss(model, ids, ids))
    for name, p in model.named_parameters():
        p.requires_grad = frozen != "all" and (name == "lm_head.weight") == (frozen == "all but the head")
    loss = model(ids, ids)
    if frozen == "all":
        assert not loss.requires_grad
        return
    _, grads = loss_and_grads(model, loss)
    assert set(grads) == {name for name in expected if (name == "lm_head.weight") == (frozen == "all but the head")}
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_bfloat16_model_has_bfloat16_gradients_and_a_float32_loss():
    model, ids = make(n_layer=1).bfloat16(), random_ids(3, 22)
    loss = model(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert abs(loss.item() - plain_loss(model, ids, ids).item()) < 1e-3


def test_the_loss_never_holds_all_the_logits():
    T, V = 2048, 32000
    model = make(vocab_size=V, n_layer=1, n_head=1, n_embd=8, intermediate_size=8)
    ids = random_ids(1, T, vocab_size=V)
    saved = []
    with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(ids, ids).backward()
    assert recorder.largest <= 2**24 < T * V / 3  # 64 MiB of the 250 that plain cross-entropy makes several times over
    assert max(t.numel() for t in saved) == V * 8  # and between forward and backward nothing larger than the head
    with Recorder() as recorder:  # the recorder does see plain cross-entropy's
        plain_loss(model, ids[:, :64], ids[:, :64])
    assert recorder.largest == 64 * V


@torch.no_grad()
@pytest.mark.parametrize("asked", ["all", "some", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_nll_is_per_token_and_makes_only_the_logits_that_are_scored(monkeypatch, chunk, asked):
    model, ids = make(n_kv_head=2), random_ids(3, 22)
    targets = targets_for(ids, asked)
    scored = targets != -100
    expected = -model(ids).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    if chunk:
        monkeypatch.setattr(loss_module, "chunk_size", lambda weight: chunk)
    with Recorder() as recorder:
        nll = model.nll(ids, targets)
    assert nll.shape == ids.shape and nll.dtype == torch.float32
    assert (nll[~scored] == 0).all()
    torch.testing.assert_close(nll[scored], expected[scored], rtol=1e-5, atol=1e-5)
    rows = sum(shape[0] for name, shape in recorder.made if name == "mm" and shape[-1] == 97)
    assert rows == scored.sum()
