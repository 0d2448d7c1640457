"""parallel.py: DDP and FSDP equal one process; whatever happens to a run costs the steps since it saved, no more."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import parallel
import train
from conftest import log
from model import LLaMA, LLaMAConfig
from processes import run_on_several
from tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("workplace")
ROOT = Path(__file__).parent.parent
TEXT = [str(ROOT / name) for name in ("rope.py", "model.py", "checkpoint.py", "data.py", "eval_ppl.py")]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
QUICK = ["--data", *TEXT, "--batch_size", "6", "--micro_batch_size", "1", "--eval_every", "100", "--device", "cpu",
         "--decay", "constant", "--mix", "text", "--learning_rate", "1e-3"]


def losses(out: Path) -> list[float]:
    rows = log(out)
    assert [row["iter"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def train_on(processes: int, *flags: str) -> None:
    """Run train.py to its end on so many processes."""
    if processes == 1:
        train.main([*flags])
        return
    done = run_on_several(processes, ROOT / "train.py", *flags)
    assert done.returncode == 0, done.stderr


def torchrun(processes: int, script: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run a script by torchrun."""
    command = [*TORCHRUN, str(processes), str(script), *flags]
    return subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def inits(workplace) -> dict[bool, str]:
    """A random model, its head tied to the embedding or not."""
    tokenizer = train_tokenizer([Path(name).read_text() for name in TEXT], 1024)
    for tied in (False, True):
        torch.manual_seed(1)
        config = LLaMAConfig.preset("tiny", tie_embeddings=tied, n_kv_head=1, bos_id=0, eos_id=1)
        checkpoint.save(LLaMA(config), f"init-{tied}", tokenizer)
    return {tied: str(Path(f"init-{tied}").resolve()) for tied in (False, True)}


@pytest.fixture(scope="module")
def alone(inits) -> dict[bool, Path]:
    """Ten steps of each by one process."""
    outs = {tied: Path(f"alone-{tied}").resolve() for tied in inits}
    for tied, out in outs.items():
        train.main([*QUICK, "--init", inits[tied], "--max_iters", "10", "--out", str(out)])
    return outs


def assert_equal_weights(ours: Path, theirs: Path, largest: float) -> None:
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert a.keys() == b.keys() and max((a[name] - b[name]).abs().max().item() for name in a) <= largest


@pytest.mark.parametrize("engine, processes, activations, tied", [
    ("ddp", 2, "none", True), ("ddp", 3, "selective", False), ("fsdp", 2, "full", True), ("fsdp", 3, "none", False),
])  # fmt: skip
def test_several_processes_equal_one(inits, alone, engine, processes, activations, tied):
    out = Path(f"{engine}-{processes}").resolve()
    flags = [*QUICK, "--init", inits[tied], "--max_iters", "10", "--dist", engine]
    train_on(processes, *flags, "--checkpoint_activations", activations, "--out", str(out))
    assert losses(out) == pytest.approx(losses(alone[tied]), abs=5e-5)
    # The windows of validation do not depend on the number of processes
    assert log(out)[-1]["val_loss"] == pytest.approx(log(alone[tied])[-1]["val_loss"], abs=5e-4)
    # AdamW divides a gradient by its own size: rounding of the tiniest ones shows, by a few steps' worth at most
    assert_equal_weights(out, alone[tied], 5e-3)


def test_skipped_positions_on_two_processes(inits):
    flags = [*QUICK, "--init", inits[False], "--scale", "2", "--row_tokens", "64", "--max_iters", "5"]
    train.main([*flags, "--out", "skipped-alone"])
    for engine in ("ddp", "fsdp"):
        out = Path(f"skipped-{engine}").resolve()
        train_on(2, *flags, "--dist", engine, "--out", str(out))
        assert losses(out) == pytest.approx(losses(Path("skipped-alone")), abs=5e-5)


def test_summaries_weigh_by_their_tokens_however_the_batch_is_cut(inits):
    """Summaries of unequal length: a mean of the micro batches' means would differ."""
    reports = [("the cat sat on the mat. " * (i % 4 + 1), "cat " * (3 * i % 11 + 1)) for i in range(12)]
    lines = [json.dumps({"document": document, "summary": summary}) + "\n" for document, summary in reports]
    Path("reports.jsonl").write_text("".join(lines))
    flags = ["--init", inits[False], "--data", str(Path("reports.jsonl").resolve()), "--summary_field", "summary",
             "--batch_size", "6", "--max_iters", "5", "--eval_every", "100", "--device", "cpu"]  # fmt: skip
    train.main([*flags, "--micro_batch_size", "6", "--out", "summaries-whole"])
    train.main([*flags, "--micro_batch_size", "1", "--out", "summaries-cut"])
    train_on(2, *flags, "--micro_batch_size", "2", "--out", "summaries-two")
    whole = losses(Path("summaries-whole"))
    assert whole[-1] < whole[0] - 0.05
    for cut in ("summaries-cut", "summaries-two"):
        assert losses(Path(cut)) == pytest.approx(whole, abs=5e-5)


def test_a_run_on_two_processes_goes_on_with_one_and_with_three(inits, alone):
    out = Path("two").resolve()
    flags = [*QUICK, "--init", inits[False], "--max_iters", "5", "--dist", "fsdp"]
    train_on(2, *flags, "--out", str(out))
    state = out / "trainer/step-5"
    for processes in (1, 3):
        again = Path(f"then-{processes}").resolve()
        (again / "trainer").mkdir(parents=True)
        (again / "trainer/step-5").symlink_to(state)
        (again / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes())
        train_on(processes, "--resume", "--out", str(again), "--max_iters", "10")
        assert losses(again) == pytest.approx(losses(alone[False]), abs=5e-5)
        assert_equal_weights(again, alone[False], 5e-3)


def test_muon_on_two_processes_and_resumed_equals_one_without_a_stop(inits):
    """Muon's update is of a whole matrix, of which FSDP's processes each hold a part."""
    flags = [*QUICK, "--init", inits[False], "--optimizer", "muon"]
    whole = Path("muon").resolve()
    train.main([*flags, "--max_iters", "10", "--out", str(whole)])
    for engine in ("ddp", "fsdp"):
        out = Path(f"muon-{engine}").resolve()
        train_on(2, *flags, "--max_iters", "10", "--dist", engine, "--out", str(out))
        assert losses(out) == pytest.approx(losses(whole), abs=2e-4)
    # On one process a resumed run is equal bit for bit, so Muon's momentum was saved too
    again = Path("muon-again")
    train.main([*flags, "--max_iters", "5", "--out", str(again)])
    train.main(["--resume", "--max_iters", "10", "--out", str(again)])
    assert losses(again) == losses(whole)
    assert_equal_weights(again, whole, 0)


def test_each_process_reads_its_rows_alone(tmp_path, monkeypatch):
    """Two processes, a file of 100 MB: each maps about half of it, and holds half of the model."""
    config = LLaMAConfig(vocab_size=20000, n_layer=4, n_embd=512, n_head=8, intermediate_size=1376)
    checkpoint.save(LLaMA(config), tmp_path / "model")
    (tmp_path / "probe.py").write_text(f"""
import json, os, re, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
import checkpoint, parallel

def held(kind):
    return 1024 * int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

dist.init_process_group("gloo")
config = checkpoint.read_config("model")
files, own = held("RssFile"), held("RssAnon")
model = parallel.sharded(config, checkpoint.stored_weights("model"), torch.device("cpu"), torch.float32)
result = {{"files": held("RssFile") - files, "own": held("RssAnon") - own}}
whole = checkpoint.load("model")
result["equal"] = all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), whole.parameters()))
open(f"rank-{{dist.get_rank()}}.json", "w").write(json.dumps(result))
dist.barrier()
dist.destroy_process_group()
""")
    monkeypatch.chdir(tmp_path)
    done = run_on_several(2, Path("probe.py"))
    assert done.returncode == 0, done.stderr
    weights = 4 * config.n_params
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["equal"]
        assert 0.4 * weights < found["own"] < 0.9 * weights, found
        assert found["files"] < 0.9 * weights, found


def test_two_processes_write_the_files_of_one(inits, tmp_path, monkeypatch):
    """And of what they gather, process 0 holds a file's weights at most, the other one nothing."""
    cases = [(True, None, "5GB"), (False, "float32", "300KB"), (False, "bfloat16", "200KB")]
    (tmp_path / "probe.py").write_text(f"""
import json, sys, weakref
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
import checkpoint, parallel

gathered = []  # a weak reference to each whole weight, and its bytes
held = []  # the bytes of those that are alive, whenever one more has been gathered
full_tensor = DTensor.full_tensor

def gather(weight):
    whole = full_tensor(weight)
    gathered.append((weakref.ref(whole), whole.nbytes))
    held.append(sum(n for reference, n in gathered if reference() is not None))
    return whole

DTensor.full_tensor = gather
dist.init_process_group("gloo")
rank = dist.get_rank()
results = []
for i, (tied, dtype, size) in enumerate({cases}):
    init = {inits}[tied]
    dtype = dtype and getattr(torch, dtype)
    config = checkpoint.read_config(init)
    tokenizer = checkpoint.load_tokenizer(init, config)
    if rank == 0:
        checkpoint.save(checkpoint.load(init), f"alone-{{i}}", tokenizer, dtype=dtype, max_shard_size=size)
    weights = checkpoint.stored_weights(init)
    model = parallel.sharded(config, weights, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))  # FSDP keeps the embedding gathered after it
    gathered.clear()
    held.clear()
    parallel.save_weights(model, Path(f"shared-{{i}}"), tokenizer, dtype, size)
    largest = max(n for _, n in gathered)
    n_weights = len(list(model.parameters()))
    results.append(dict(most=max(held), largest=largest, gathered=len(gathered), weights=n_weights))
Path(f"rank-{{rank}}.json").write_text(json.dumps(results))
dist.barrier()
dist.destroy_process_group()
""")
    monkeypatch.chdir(tmp_path)
    done = run_on_several(2, Path("probe.py"))
    assert done.returncode == 0, done.stderr
    process_0, process_1 = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    for i, (_, dtype, size) in enumerate(cases):
        files = {path.name: path.read_bytes() for path in (tmp_path / f"alone-{i}").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / f"shared-{i}").iterdir()} == files
        assert (len([name for name in files if name.endswith(".safetensors")]) == 1) == (size == "5GB")
        assert process_0[i]["gathered"] == process_1[i]["gathered"] == process_1[i]["weights"]
        assert process_1[i]["most"] == process_1[i]["largest"]
        if dtype == "bfloat16":  # a file holds copies, and what was gathered is gone
            assert process_0[i]["most"] == process_0[i]["largest"]
        elif size != "5GB":
            assert process_0[i]["most"] <= max(300_000, process_0[i]["largest"])


def test_ddp_keeps_accumulated_gradients_in_its_buckets(tmp_path, monkeypatch):
    """Gradients of their own beside the buckets would take 4 bytes a parameter more."""
    (tmp_path / "probe.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from contextlib import nullcontext
from types import SimpleNamespace
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import train
from model import LLaMA, LLaMAConfig
from trainlog import StopSignal
from trainset import MicroBatch

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(LLaMA(LLaMAConfig.preset("tiny")), gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(model.parameters())
stop = StopSignal()
run = SimpleNamespace(model=model, optimizers=[optimizer], device=torch.device("cpu"), autocast=nullcontext())
ids = torch.randint(1024, (2, 16))
for step in range(3):
    train.accumulate_gradients(run, [MicroBatch(ids, ids), MicroBatch(ids, ids)], stop)
    largest = max(p.grad.abs().max().item() for p in model.parameters())
    assert largest > 0
    optimizer.step()
    train.clear_gradients(run)
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    shared = [p.grad.untyped_storage().nbytes() > p.grad.nbytes for p in model.parameters()]
    assert all(shared), (step, sum(shared), len(shared))
dist.barrier()
dist.destroy_process_group()
""")
    monkeypatch.chdir(tmp_path)
    done = run_on_several(2, Path("probe.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["auto", "cuda", "cuda:0"])
def test_each_process_takes_the_gpu_of_its_number(flag, monkeypatch):
    """Also where --resume finds another process's GPU among the run's flags."""
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(parallel, "device_and_dtype", calls.append)
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, **keywords: None)
    monkeypatch.setattr(parallel, "rendezvous", lambda url: iter([(None, 11, 12)]))
    with parallel.process_group(flag) as device:
        assert device == "cuda:3"
    assert calls == ["cuda:3", "cuda:3"]


def test_compiled_blocks_leave_ddp_whole(inits, monkeypatch):
    """Dynamo's own splitting for DDP crashes with selective activation checkpointing."""
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    args = train.parse(train.__doc__, ["--init", inits[False], "--compile", "--device", "cpu"])
    config = checkpoint.read_config(args.init)
    train.build_model(args, config, "alone", torch.device("cpu"), torch.float32)
    assert not torch._dynamo.config.optimize_ddp


# ---- what can happen to a run ------------------------------------------------------------------------------------


def one_line(done: subprocess.CompletedProcess, words: str = "error") -> str:
    """The one line with these words, below the bar and what else the run says."""
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if words in line.lower()]
    assert len(lines) == 1 and "Traceback" not in done.stderr.split("elastic")[0], done.stderr
    return lines[0]


def test_any_process_reports_what_it_alone_meets(tmp_path):
    (tmp_path / "probe.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import cli, parallel

def main():
    with parallel.process_group("cpu"):
        parallel.barrier()  # until then gloo says more where one leaves
        if parallel.rank() == 2:
            raise ValueError("the text is too short")
        parallel.barrier()

cli.run(main)
""")
    done = torchrun(3, tmp_path / "probe.py")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "probe.py: error: the text is too short"
    assert one_line(done, "probe.py: error")


@pytest.mark.parametrize(
    "flags", [["--max_iters", "ten"], ["--init", "nowhere"], ["--batch_size", "7"]]
)
def test_bad_input_of_several_processes_is_one_line_and_the_first(inits, flags):
    """Both meet it before they know of each other; process 0 meets it alone; both meet it."""
    start = ["--init", inits[False]]
    if "--init" in flags:
        start = []
    done = torchrun(2, ROOT / "train.py", "--device", "cpu", "--data", *TEXT, *start, *flags)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == one_line(done, "train.py: error")


def test_a_signal_to_one_process_is_answered_by_all_within_a_micro_batch(inits, alone):
    """Process 1 gets it in the second of three micro batches of the first step: both leave."""
    out = Path("one-stopped").resolve()
    Path("stopped.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import cli, train
from model import LLaMA

calls = []
real = LLaMA.forward

def forward(self, *arguments, **keywords):
    calls.append(0)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, *arguments, **keywords)

LLaMA.forward = forward
try:
    cli.run(train.main)
finally:
    print("calls", len(calls))
""")
    flags = [*QUICK, "--init", inits[False], "--max_iters", "4", "--out", str(out)]
    done = run_on_several(2, Path("stopped.py"), *flags)
    assert done.stdout.split() == ["calls", "2"] * 2, done.stderr
    assert [state.name for state in parallel.states(out)] == ["step-0"]
    train_on(2, "--resume", "--out", str(out))
    assert losses(out) == pytest.approx(losses(alone[False])[:4], abs=5e-5)


def test_a_full_disk_leaves_what_was_saved(inits, alone):
    out = Path("full").resolve()
    train.main([*QUICK, "--init", inits[False], "--max_iters", "4", "--out", str(out)])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "log.jsonl"}

    def small_files() -> None:  # writing beyond that fails as on a full disk, for root too
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    command = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(out)]
    done = subprocess.run([*command, "--max_iters", "6"], env=ONE_THREAD, capture_output=True,
                          text=True, preexec_fn=small_files)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "step-6" in one_line(done) and "can't be saved" in one_line(done)
    assert {path: path.read_bytes() for path in before} == before
    assert [state.name for state in parallel.states(out)] == ["step-4"]
    assert not list(out.rglob("*.tmp"))
    train.main(["--resume", "--out", str(out), "--max_iters", "10"])
    assert losses(out) == losses(alone[False])


def test_a_lost_process_ends_the_run_and_the_last_state_stands(inits, alone):
    out = Path("lost").resolve()
    flags = [*QUICK, "--init", inits[False], "--max_iters", "4000", "--save_every", "4", "--out", str(out)]
    run = subprocess.Popen([*TORCHRUN, "2", str(ROOT / "train.py"), *flags], env=ONE_THREAD, stderr=subprocess.PIPE,
                           text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not parallel.states(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[1], signal.SIGKILL)
        _, errors = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode != 0
    assert "process 0 lost another one" in errors and "--resume" in errors
    assert "Traceback" not in errors.split("torch/distributed/run.py")[0].split("elastic")[0], errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)  # all have ended
    train.main(["--resume", "--out", str(out), "--max_iters", "10"])
    assert losses(out)[:10] == pytest.approx(losses(alone[False]), abs=5e-5)


@pytest.mark.slow
def test_thirty_kills_at_random_moments(inits):
    """kill -9, thirty times, half of them while a state is written: the run goes on as if nothing had been."""
    out, straight = Path("killed").resolve(), Path("straight").resolve()
    flags = [*QUICK, "--init", inits[False], "--save_every", "3"]
    rng, writing = random.Random(0), 0
    for kill in range(30):
        go_on = ["--resume"] if parallel.states(out) else ["--overwrite"]
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--max_iters", "100000", "--out", str(out), *go_on]
        run = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE)
        before = parallel.states(out)[-1:]
        while run.poll() is None and parallel.states(out)[-1:] == before:  # it has come a state further
            time.sleep(0.002)
        if kill % 2:
            while run.poll() is None and not list(out.glob("trainer/.step-*.tmp/*")):
                time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.005) if kill % 2 else rng.uniform(0, 1))
        run.kill()
        _, errors = run.communicate()
        assert run.returncode == -signal.SIGKILL, errors.decode()
        writing += bool(list(out.glob("trainer/.step-*.tmp")))
    last = int(parallel.newest_state(out).name.removeprefix("step-")) + 5
    train.main(["--resume", "--out", str(out), "--max_iters", str(last)])
    print(f"30 kills, {writing} of them while a state was written; {last} steps")
    assert writing >= 5
    train.main([*flags, "--max_iters", str(last), "--out", str(straight)])
    assert losses(out) == losses(straight)
    assert_equal_weights(out, straight, 0)
