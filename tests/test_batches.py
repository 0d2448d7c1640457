"""batches.py: rows by their numbers, the mix of their kinds, passkeys, reports and summaries."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import prompts
from batches import (
    Mix, PasskeyWriter, check_reports, long_documents, sample_batch, sample_positions,
    sample_reports, sample_text
)
from conftest import FORMS, TEXTS, english
from data import Corpus, load_corpus
from loss import ChunkedCrossEntropy
from model import LLaMA, LLaMAConfig
from prompts import encode_line, report_prompt

# ---- rows by their numbers, kinds of rows --------------------------------------------------------


@pytest.fixture(scope="session")
def corpus(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(english(8000, seed=3))
    return load_corpus([folder], tok, "all", folder / "cache")


def whole_rows(corpus, tokenizer, length: int, n: int, mix: Mix) -> list[list[int]]:
    """n rows of length + 1 tokens: the ids and the last target."""
    ids, targets = sample_batch(corpus, tokenizer, length, 0, range(n), seed=0, mix=mix)
    return torch.cat([ids, targets[:, -1:]], dim=1).tolist()


def test_batches_are_a_pure_function_of_seed_step_and_index(corpus, tok):
    def draw(step, indices, seed=1):
        mix = Mix(passkey=0.4, repeat=0.3)
        return sample_batch(corpus, tok, 160, step, indices, seed=seed, mix=mix)

    ids, targets = draw(5, range(16))
    assert ids.shape == targets.shape == (16, 160)
    assert ids.dtype == targets.dtype == torch.int64
    assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert 0 <= int(ids.min()) <= int(ids.max()) < tok.vocab_size

    # each of several processes draws its slice of the batch
    for processes in (2, 4):
        share = 16 // processes
        slices = [draw(5, range(p * share, (p + 1) * share)) for p in range(processes)]
        assert torch.equal(torch.cat([part[0] for part in slices]), ids)
        assert torch.equal(torch.cat([part[1] for part in slices]), targets)

    # rows in any order, after other draws
    draw(9, range(7))
    order = [11, 3, 0, 15]
    assert torch.equal(draw(5, order)[0], ids[order])

    # another step, seed or index gives other rows
    for step, indices, seed in ((6, range(16), 1), (5, range(16), 2), (5, range(16, 32), 1)):
        other, _ = draw(step, indices, seed)
        assert not (other == ids).all(dim=1).any()


def kind_of(tokenizer, row: torch.Tensor) -> str:
    """The kind of a row, from its tokens."""
    text = tokenizer.decode(row.tolist())
    if text.startswith("The pass key is") or "\nThe pass key is" in text:
        return "prompt" if prompts.TASK in text else "dense"
    fours = [tuple(row[i : i + 4].tolist()) for i in range(len(row) - 3)]
    return "repeat" if len(set(fours)) < 0.75 * len(fours) else "text"


@pytest.fixture(scope="session")
def letters(tok, tmp_path_factory):
    """A corpus in which nothing comes twice."""
    folder = tmp_path_factory.mktemp("letters")
    numbers = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, 40000)
    (folder / "b.txt").write_text("".join(chr(number) for number in numbers))
    return load_corpus([folder / "b.txt"], tok, "all", folder)


def test_shares_of_the_mix(letters, tok):
    mix = Mix(passkey=0.4, repeat=0.3, dense=0.25)
    ids, _ = sample_batch(letters, tok, 200, 0, range(600), seed=0, mix=mix)
    kinds = [kind_of(tok, row) for row in ids]

    # Of all rows 0.3 are prompts. Half of these fill their row alone, and 70% of those have no task
    # line, so that they look like dense rows here.
    without_task = 0.3 * 0.5 * 0.7
    shares = {"dense": 0.1 + without_task, "prompt": 0.3 - without_task, "repeat": 0.3, "text": 0.3}
    for kind, share in shares.items():
        assert abs(kinds.count(kind) / 600 - share) < 0.06, kind


def test_the_default_is_text_alone(letters, tok):
    ids, _ = sample_batch(letters, tok, 200, 0, range(50), seed=0)
    stream = letters.tokens.tobytes()
    for row in ids.numpy().astype(letters.tokens.dtype):
        assert row.tobytes() in stream


@pytest.mark.parametrize(
    "shares", [{"passkey": 0.8, "repeat": 0.3}, {"repeat": -0.1}, {"dense": 2}]
)
def test_impossible_mixes(shares):
    with pytest.raises(ValueError, match="shares of the mix must be 0 to 1"):
        Mix(**shares)


def test_a_corpus_shorter_than_one_window(corpus, tok):
    n = len(corpus)
    message = rf"corpus.*: its {n:,} tokens don't fill one row of {n:,} \+ 1: give more"
    with pytest.raises(ValueError, match=message):
        sample_batch(corpus, tok, n, 0, [0], seed=0)
    (row,) = whole_rows(corpus, tok, n - 1, 1, Mix())
    assert row == corpus.tokens.tolist()


# ---- rows with skipped positions -----------------------------------------------------------------


def counted(*documents: int) -> Corpus:
    """A corpus of documents of so many tokens, in which each token is its own place."""
    starts = np.cumsum([0, *documents])
    tokens = np.arange(starts[-1], dtype=np.uint16)
    return Corpus(tokens, starts, "counted", has_bos=False, has_eos=False)


def test_positions_are_two_runs_that_reach_every_distance_of_the_window():
    length, window = 5, 14
    rows = range(4000)
    _, _, positions = sample_text(counted(100), length, window, 0, rows, seed=0)
    steps = positions.diff(dim=1)
    assert (positions[:, 0] == 0).all() and (steps >= 1).all()
    assert ((steps > 1).sum(dim=1) <= 1).all()  # two runs, or one where nothing is skipped

    # The last position is each of 4 ... 13 about equally often, wherever the row is cut
    last = positions[:, -1]
    shares = last.bincount(minlength=window) / len(rows)
    assert (shares[: length - 1] == 0).all() and len(shares) == window
    torch.testing.assert_close(shares[length - 1 :], torch.full((10,), 0.1), atol=0.02, rtol=0)
    cuts = steps.argmax(dim=1)[last >= length] + 1
    assert sorted(set(cuts.tolist())) == [1, 2, 3, 4]

    # A token and an earlier one are at every distance that the window has
    distances = (positions[:, :, None] - positions[:, None, :]).flatten()
    assert set(distances[distances > 0].tolist()) == set(range(1, window))


def test_the_second_chunk_is_text_from_later_in_the_document():
    long, middle, short = 1000, 60, 20
    corpus = counted(long, middle, *[short] * 50)
    length, window = 32, 300
    ids, targets, positions = sample_text(corpus, length, window, 0, range(600), seed=0)
    assert ids.dtype == targets.dtype == positions.dtype == torch.int64
    assert torch.equal(targets, ids + 1)  # the next token of the text, at the cut too
    document = np.searchsorted(corpus.starts, ids.numpy(), side="right") - 1
    of_target = np.searchsorted(corpus.starts, targets.numpy(), side="right") - 1
    seen = set()
    for row in range(len(ids)):
        text_skip = int(ids[row, -1] - ids[row, 0]) - (length - 1)
        first = document[row, 0]
        seen.add(min(first, 2))
        inside = (document[row] == first).all() and (of_target[row] == first).all()
        if first == 0 and inside:  # the text of these positions in a row of 300 tokens
            assert torch.equal(ids[row] - ids[row, 0], positions[row])
        elif first == 1 and inside:  # skipped within the document
            assert 0 <= text_skip <= middle - length - 1
            assert text_skip <= positions[row, -1] - (length - 1)
        else:  # the document is too short: nothing is left out
            assert first >= 2 and text_skip == 0
    assert seen == {0, 1, 2}
    # Rows begin at the document's first token, and end with its last one as their target
    whole = sample_text(counted(33), length, window, 0, range(5), seed=0)
    assert (whole[0] == torch.arange(length)).all()


def test_skipped_rows_are_a_pure_function_of_seed_step_and_index():
    corpus = counted(5000, 300, 700)
    rows = sample_text(corpus, 40, 400, 5, range(16), seed=1)
    parts = [sample_text(corpus, 40, 400, 5, part, seed=1) for part in ([0, 1, 2], range(3, 16))]
    for whole, *cut in zip(rows, *parts):
        assert torch.equal(torch.cat(cut), whole)
    for step, seed in ((6, 1), (5, 2)):
        other = sample_text(corpus, 40, 400, step, range(16), seed=seed)
        assert not (other[0] == rows[0]).all(dim=1).any()
        assert not torch.equal(other[2], rows[2])
    with pytest.raises(ValueError, match="counted: its 40 tokens don't fill one row of 40 "):
        sample_text(counted(40), 40, 400, 0, [0], seed=0)


# ---- long documents ------------------------------------------------------------------------------


def test_retrieval_rows_may_have_skipped_positions_of_their_own():
    positions = sample_positions(32, 128, 5, range(200), seed=3)
    assert positions.shape == (200, 32) and positions.dtype == torch.int64
    assert (positions[:, 0] == 0).all()
    assert positions.max() == 127
    steps = positions.diff(dim=1)
    assert ((steps > 1).sum(dim=1) <= 1).all() and (steps >= 1).all()
    # Each row's are its own: the same in any batch, and others in another step
    assert torch.equal(sample_positions(32, 128, 5, [7], seed=3)[0], positions[7])
    assert not torch.equal(sample_positions(32, 128, 6, range(200), seed=3), positions)


def test_long_documents_are_a_corpus_without_the_others(tok):
    corpus = counted(30, 200, 10, 300, 29, 100, 31)
    chosen = long_documents(corpus, 31)
    kept = np.concatenate([np.arange(30, 230), np.arange(240, 540), np.arange(569, 700)])
    assert len(chosen) == len(kept) and chosen.starts.tolist() == [0, 200, 500, 600, 631]
    assert np.array_equal(chosen.tokens[:], kept)
    assert np.array_equal(chosen.tokens[195:205], kept[195:205])
    places = np.array([[630, 0], [200, 199]])
    assert np.array_equal(chosen.tokens[places], kept[places])

    # Rows are those of a corpus that never had the short documents
    plain = replace(chosen, tokens=kept)
    for length, window in ((60, 60), (60, 250), (250, 250)):
        ours = sample_text(chosen, length, window, 0, range(20), seed=0)
        theirs = sample_text(plain, length, window, 0, range(20), seed=0)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    ours, theirs = (sample_batch(c, tok, 60, 0, range(20), seed=0) for c in (chosen, plain))
    assert torch.equal(ours[0], theirs[0])

    with pytest.raises(ValueError, match="counted: no document has 301 tokens, the longest has 300: "):
        long_documents(corpus, 301)
    assert len(long_documents(corpus, 300)) == 300


def test_a_row_of_text_is_of_one_document_if_that_is_long_enough():
    corpus = counted(400, 65, 300, 50, 90)
    ids, targets, positions = sample_text(corpus, 64, 64, 0, range(400), seed=0)
    assert torch.equal(positions, torch.arange(64).expand(400, 64))
    assert torch.equal(targets, ids + 1)
    first = np.searchsorted(corpus.starts, ids[:, 0].numpy(), side="right") - 1
    last = np.searchsorted(corpus.starts, targets[:, -1].numpy(), side="right") - 1
    assert (last > first)[first == 3].all() and (last == first)[first != 3].all()
    assert set(first.tolist()) == {0, 1, 2, 3, 4}
    # Drawn by their length, and from any place that holds a row
    assert abs((first == 0).mean() - 400 / 905) < 0.08
    starts = ids[:, 0][torch.from_numpy(first == 4)] - 815
    assert starts.min() <= 2 and starts.max() >= 23 and starts.max() <= 90 - 65


# ---- passkeys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_training_prompts_have_the_tokens_of_real_prompts(form, tokenizers_by_form):
    """A model trained on another tokenization of the same words would fail the evaluation."""
    tokenizer = tokenizers_by_form[form]
    writer = PasskeyWriter(tokenizer, 300)
    for i, (before, after) in enumerate([(0, 0), (1, 0), (0, 1), (5, 5), (7, 13), (40, 3)]):
        key = f"{i * 9973:05d}"
        prompt = tokenizer.encode(prompts.passkey_text(key, before, after))
        whole = tokenizer.encode(prompts.passkey_text(key, before, after) + f" {key}")
        assert whole[: len(prompt)] == prompt  # the answer's tokens are its own

        # the lines of a row, with whole sentences of filler
        lines = [writer.task_line]
        if before > 0:
            lines.append(encode_line(tokenizer, prompts.filler(before)))
        lines.append(writer.key_line(key))
        if after > 0:
            lines.append(encode_line(tokenizer, prompts.filler(after)))
        lines.append(writer.answered_question(key, end=""))
        lines.append(writer.eos)
        ids = np.concatenate(lines).tolist()
        assert ids == [tokenizer.bos_id, *whole, tokenizer.eos_id]
        if before == after == 0:
            assert writer.prompt(key).tolist() == ids


@pytest.mark.parametrize("form", FORMS)
def test_filler_of_any_number_of_tokens(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    writer = PasskeyWriter(tokenizer, 300)
    whole = prompts.filler(300)
    for n in (0, 1, 2, 17, 18, 19, 300):
        line = writer.filler_line(n).tolist()
        assert len(line) == n
        text = tokenizer.decode(line)
        assert n == 0 or text.endswith("\n")
        assert whole.startswith(text.strip())


def test_whole_prompts_end_with_the_right_answer_and_stay_within_the_window(corpus, tok):
    lengths = []
    for row in whole_rows(corpus, tok, 256, 100, Mix(passkey=1, dense=0)):
        # each BOS begins a prompt or, in the text after the prompts, a document
        starts = [i for i in range(len(row)) if row[i] == tok.bos_id]
        for start in starts:
            if tok.eos_id not in row[start:]:
                continue
            end = row.index(tok.eos_id, start) + 1
            text = tok.decode(row[start:end])
            if not text.startswith(prompts.TASK):
                continue
            lengths.append(end - start)
            key = re.search(
                r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", text
            )[1]
            assert text.endswith(f"\n{prompts.QUESTION} {key}")
    assert len(lengths) >= 80
    assert 230 < max(lengths) <= 257
    assert min(lengths) < 160


def test_keys_lie_anywhere_in_the_window(corpus, tok):
    distances = []
    for row in whole_rows(corpus, tok, 256, 400, Mix(passkey=1, dense=0)):
        text = tok.decode(row)
        answer = re.search(r"\nWhat is the pass key\? The pass key is (\d{5})$", text)
        if answer and not text.startswith(prompts.TASK):
            key_line = prompts.KEY.format(key=answer[1]) + "\n"
            distances.append(len(tok.encode(text[text.index(key_line) :])))
    assert len(distances) > 50
    assert min(distances) < 60
    assert max(distances) > 240  # the task line would leave room for far less
    quarters, _ = np.histogram(distances, bins=4, range=(40, 257))
    assert quarters.min() > 0.1 * len(distances)


@pytest.mark.parametrize("length", [64, 128, 256])
def test_a_prompt_alone_has_one_key_and_its_answer(corpus, tok, length):
    for row in whole_rows(corpus, tok, length, 50, Mix(passkey=1, dense=0, alone=1)):
        text = tok.decode(row)
        assert text.count("Remember it.") == 1
        key = re.search(r"The pass key is (\d{5})\. Remember it\. \1 is the pass key\.\n", text)[1]
        assert f"{prompts.QUESTION} {key}" in text


def test_dense_keys_are_asked_for(corpus, tok):
    asked = 0
    for row in whole_rows(corpus, tok, 400, 20, Mix(passkey=1, dense=1)):
        text = tok.decode(row)
        # a question is about the latest key
        lines = re.findall(
            r"(The pass key is|What is the pass key\? The pass key is) (\d{5})(.*)", text
        )
        latest = None
        for beginning, key, end in lines:
            if beginning.startswith("What"):
                asked += 1
                assert key == latest
            elif end == f". Remember it. {key} is the pass key.":
                latest = key
    assert asked > 60


def test_a_window_too_short_for_a_prompt_gets_dense_keys(corpus, tok):
    for row in whole_rows(corpus, tok, 40, 20, Mix(passkey=1, dense=0)):
        assert "The pass key is" in tok.decode(row)


@pytest.mark.parametrize("form", FORMS)
def test_rows_where_keys_have_different_numbers_of_tokens(form, tokenizers_by_form, tmp_path):
    """The tiktoken vocabulary joins some digits, so that not every key fits where 12345 does."""
    tokenizer = tokenizers_by_form[form]
    (tmp_path / "a.txt").write_text(english(500))
    corpus = load_corpus([tmp_path], tokenizer, "all", tmp_path / "cache")
    for length in (64, 80, 128):
        for row in whole_rows(corpus, tokenizer, length, 60, Mix(passkey=1, dense=0)):
            assert len(row) == length + 1


# ---- reports and their summaries -----------------------------------------------------------------

REPORTS = [
    (f"{i} " + english(10 + 30 * i, seed=i), f"Summary of {i}: {english(5 + i, seed=i + 50)}")
    for i in range(7)
]


def split_row(tokenizer, ids, targets) -> tuple[list[int], list[int], list[int]]:
    """The tokens of prompt, summary and padding of a row of sample_reports."""
    # the targets are one run of tokens, which ends with EOS
    places = (targets != -100).nonzero().flatten().tolist()
    start = places[0]
    end = places[-1] + 1
    assert places == list(range(start, end))
    summary = targets[start : end - 1].tolist()
    assert targets[end - 1] == tokenizer.eos_id

    # in the ids, each token stands one place after its target; EOS is a target only
    assert ids[start + 1 : end].tolist() == summary
    return ids[: start + 1].tolist(), summary, ids[end:].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_reports_have_the_prompt_of_generation_and_learn_the_summary_alone(
    form, tokenizers_by_form
):
    tokenizer = tokenizers_by_form[form]
    reports = list(REPORTS)
    for text in TEXTS:
        if text.strip():
            reports.append((text, text[::-1]))
            reports.append((text, "line\n\nline"))
    n = len(reports)
    ids, targets = sample_reports(reports, tokenizer, 1500, 0, range(n), batch_size=n, seed=3)
    assert ids.shape == targets.shape == (n, 1500)
    assert ids.dtype == targets.dtype == torch.int64

    order = np.random.default_rng([3, 0]).permutation(n)
    for row, number in enumerate(order):
        document, summary = reports[number]
        prompt_ids, summary_ids, padding = split_row(tokenizer, ids[row], targets[row])
        assert prompt_ids == report_prompt(tokenizer, document)
        prompt = prompts.REPORT_PROMPT.format(document=document.strip())
        assert tokenizer.decode(prompt_ids[1:] + summary_ids) == prompt + summary.strip()
        assert tokenizer.decode(summary_ids).strip() == summary.strip()
        assert not any(padding)


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_cut_to_the_room_that_prompt_and_summary_leave(form, tokenizers_by_form):
    tokenizer = tokenizers_by_form[form]
    document = english(600, seed=1)
    report = (document, "It was the worst.")

    def draw(**max_input):
        ids, targets = sample_reports(
            [report], tokenizer, 200, 0, [0], batch_size=1, seed=0, **max_input
        )
        return split_row(tokenizer, ids[0], targets[0])

    prompt_ids, summary_ids, padding = draw()
    room = 200 - len(summary_ids) - prompts.report_frame_tokens(tokenizer)
    assert prompt_ids == report_prompt(tokenizer, document, room)
    assert padding == []
    assert draw(max_input=30)[:2] == (report_prompt(tokenizer, document, 30), summary_ids)


def test_batches_of_reports_are_a_pure_function_and_each_epoch_has_all(tok):
    def draw(step, indices, batch_size=4, seed=1):
        return sample_reports(REPORTS, tok, 400, step, indices, batch_size=batch_size, seed=seed)

    # 7 steps of 4 rows are 4 epochs of 7 reports, each in an order of its own
    rows = []
    for step in range(7):
        for index in range(4):
            ids, targets = draw(step, [index])
            rows.append((tuple(ids[0].tolist()), tuple(targets[0].tolist())))
    epochs = [tuple(rows[i : i + 7]) for i in range(0, 28, 7)]
    for epoch in epochs:
        assert len(set(epoch)) == 7
        assert set(epoch) == set(epochs[0])
    assert len(set(epochs)) > 1

    # rows in any order, and the same rows in batches of another size; another seed gives others
    ids, targets = draw(5, range(4))
    order = [3, 0, 2]
    assert torch.equal(draw(5, order)[0], ids[order])
    assert torch.equal(draw(5, order)[1], targets[order])
    tenth, _ = draw(1, range(2), batch_size=10)
    assert torch.equal(tenth, draw(5, range(2), batch_size=2)[0])
    assert not torch.equal(draw(5, range(4), seed=2)[0], ids)


def test_a_report_without_room_is_named(tok):
    summary = REPORTS[6][1]
    answer_tokens = len(encode_line(tok, summary, end="")) + 1  # with EOS
    reports = [*REPORTS[:2], (REPORTS[0][0], summary)]

    # EOS is a target only, so that this window leaves room for one token of the document
    window = prompts.report_frame_tokens(tok) + answer_tokens
    check_reports(reports, tok, window)
    _, targets = sample_reports(reports, tok, window, 0, range(3), batch_size=3, seed=0)
    assert (targets != -100).sum(dim=1).max() == answer_tokens

    message = rf"report 3: {answer_tokens} tokens of summary.* window of {window - 1}: give"
    with pytest.raises(ValueError, match=message):
        check_reports(reports, tok, window - 1)
    with pytest.raises(ValueError, match=message):
        sample_reports(reports, tok, window - 1, 0, range(3), batch_size=3, seed=0)


def test_a_tokenizer_without_bos_and_eos(tok):
    plain = replace(tok, bos_id=None, eos_id=None)
    document, summary = REPORTS[0]
    ids, targets = sample_reports([(document, summary)], plain, 300, 0, [0], batch_size=1, seed=0)
    learned = targets[targets != -100].tolist()
    assert plain.decode(learned) == summary
    prompt = report_prompt(plain, document)
    assert prompt == report_prompt(tok, document)[1:]
    assert ids[0, : len(prompt)].tolist() == prompt


def test_no_gradient_comes_from_the_documents_tokens(tok):
    """The gradient is that of the summary's tokens, scored by hand row by row without padding."""
    torch.manual_seed(0)
    config = LLaMAConfig(
        vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=32, intermediate_size=48
    )
    model = LLaMA(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    ids, targets = sample_reports(REPORTS[:3], tok, 250, 0, range(3), batch_size=3, seed=0)
    model(ids, targets).backward()
    grads = [weight.grad.clone() for weight in model.parameters()]

    model.zero_grad()
    losses = []
    for number in np.random.default_rng([0, 0]).permutation(3):
        document, summary = REPORTS[number]
        prompt = report_prompt(tok, document)
        answer = encode_line(tok, summary, end="").tolist() + [tok.eos_id]
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        answer = torch.tensor(answer)
        losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    torch.cat(losses).mean().backward()
    for weight, grad in zip(model.parameters(), grads):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-4, atol=1e-6)

    # the hidden states of all other tokens get no gradient
    hidden = model.hidden(ids).detach().requires_grad_()
    head = model.lm_head.weight
    ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head, targets.flatten()).backward()
    assert torch.equal(hidden.grad.abs().sum(dim=-1) > 0, targets != -100)
