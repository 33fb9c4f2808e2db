"""train.py: the schedule, the optimizer, the batches, and runs that are stopped, killed, resumed and spread over processes.

    python -m pytest tests/test_train.py

Models are tiny and data are made here. Most runs are calls of train.main() in this process; where a process has to
die or to talk to another, it is a forked one that has imported torch already (see Launcher), or a real command.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as knobs
import model as model_file
import train
from model import GPTNeo, GPTNeoConfig, Losses, load_checkpoint, save_checkpoint
from prepare import UserError, load_tokens, lock_folder

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, max_iters=12, eval_interval=5, eval_windows=8,
            log_interval=4, device="cpu")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
               "GLOO_SOCKET_IFNAME": "lo"}
PATIENCE = 300  # seconds to wait for another process before calling it hung; nothing else here looks at a clock
draw_losses = train.draw_losses


# ---- tools


def make_data(folder, seed=0, tokens={"train": 3000, "val": 400}):
    """A data folder in the format that prepare.py documents, made without it: 300 tokens, the frequent ones first."""
    folder.mkdir(parents=True)
    rng, digest = np.random.default_rng(seed), hashlib.sha256()
    meta = {"tokenizer": {"name": "words", "pieces": [f" word{i}" for i in range(43)]}, "vocab_size": 300, "eot": 299,
            "source": {"kind": "test"}}
    for split, count in tokens.items():
        content = (rng.zipf(1.3, count).clip(1, 300) - 1).astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(content)
        digest.update(content)
        meta[split] = {"tokens": count, "stories": 1, "bytes": 3 * count, "sha256": hashlib.sha256(content).hexdigest()}
    meta["checksum"] = digest.hexdigest()[:16]
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def words(data, out, **changes):
    """The command line of a tiny run."""
    return [f"--{name}={value}" for name, value in {"data": data, "out": out, **TINY, **changes}.items()]


def start(data, out, **changes):
    """`python train.py ...` in this process; SystemExit as there, and out when all went well."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words(data, out, **changes)])
        try:
            knobs.cli(train.main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return out


def refused(data, out, **changes):
    """The one line that a user gets instead of a run."""
    with pytest.raises(SystemExit) as ended:
        start(data, out, **changes)
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code  # printed to stderr, with exit code 1
    assert len(ended.value.code) < 800  # paths included
    return ended.value.code


def metrics(out):
    """metrics.jsonl without the one field that a clock decides. Strict JSON: no NaN."""
    text = (out / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


def state(out, name="last.pt"):
    """What a checkpoint says about the run's computation, and not about where or how fast it ran."""
    checkpoint = load_checkpoint(out / name)
    del checkpoint["seconds"], checkpoint["train_config"], checkpoint["metrics"]  # which `metrics` above looks at
    return checkpoint


def assert_same_run(a, b):
    """Bit for bit."""
    assert metrics(a) == metrics(b)
    assert identical(state(a), state(b)) and identical(state(a, "best.pt"), state(b, "best.pt"))


def assert_close_run(a, b):
    """Up to the order of summation. For runs in float64 only (fixture `double`): in float32 rounding picks another winner
    of a near-tie every few hundred gates, and from then on two runs differ in the fifth digit for no fault of theirs."""
    for ours, theirs in zip(metrics(a), metrics(b), strict=True):
        assert ours == {name: value if value is None else pytest.approx(value, rel=1e-9) for name, value in theirs.items()}


@contextlib.contextmanager
def signals(number, at):
    """A signal to this process during the update that follows step `at`, as a user or a scheduler sends one."""
    batch_at = train.batch_at

    def and_signal(tokens, step, *rest):
        if step == at:
            os.kill(os.getpid(), number)
        return batch_at(tokens, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch_at", and_signal)
        yield


class Killed(BaseException):
    """Stands for the end of the process: nobody may catch it."""


class Launcher:
    """Starts `python train.py` many times for the price of one import of torch: a process that has imported it, and
    computed nothing yet, forks a child for each run. The children die for real."""

    CODE = f"""if True:
        import gc, json, os, runpy, signal, sys
        import matplotlib.figure, train, torch._dynamo.backends.debugging  # torch's own would come at the first update
        import functorch.compile, torch.distributed.run, torch.distributed.launcher.api
        gc.collect()
        gc.freeze()  # else every child goes through all these objects as it ends, and copies them: a second each
        for line in sys.stdin:
            pids = []
            for job in json.loads(line):
                pids.append(os.fork())
                if pids[-1] == 0:
                    signal.alarm({PATIENCE})  # ends it even where it hangs in C++
                    for descriptor in (1, 2):
                        os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
                    os.environ.update(job["environment"])
                    sys.argv = ["train.py", *job["words"]]
                    runpy.run_path(job["script"], run_name="__main__")
                    sys.exit()
            print(*pids, flush=True)
            print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids), flush=True)
    """

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE], cwd=ROOT, env=ENVIRONMENT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, *jobs, log, script="train.py"):
        """Each job is (words, environment variables) of one process. -> process ids"""
        jobs = [{"words": words, "environment": more, "log": str(log), "script": str(script)} for words, more in jobs]
        print(json.dumps(jobs), file=self.process.stdin, flush=True)
        return [int(pid) for pid in self.process.stdout.readline().split()]

    def wait(self):
        """-> exit codes; a killed process has minus the signal"""
        return [int(code) for code in self.process.stdout.readline().split()]


def ranks(world=2):
    """What torchrun would put into the environment of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)} for rank in range(world)]


@pytest.fixture(scope="module")
def launcher():
    launcher = Launcher()
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait(PATIENCE)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, which is fastest for models this small, and no picture after every evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda *_: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nothing disturbed."""
    return start(data, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def configured(**changes):
    return knobs.Config(**{**TINY, **changes})


def model_of(config, seed=0):
    torch.manual_seed(seed)
    shared = {field.name for field in dataclasses.fields(GPTNeoConfig)} - {"vocab_size"}
    return GPTNeo(GPTNeoConfig(vocab_size=300, **{name: getattr(config, name) for name in shared}))


# ---- the learning rate


def test_without_warm_up_the_schedule_is_torchs_cosine_annealing():
    config = configured(max_iters=50, learning_rate=1.4e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.max_iters)
    for step in range(config.max_iters):
        assert config.at(step).learning_rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert config.at(config.max_iters).learning_rate == optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("warmup", [1, 2, 7])
def test_warm_up_climbs_in_equal_steps_to_the_top_and_hands_over_to_the_cosine(warmup):
    """Against torch: its LinearLR reaches the full rate in update `warmup`, then CosineAnnealingLR starts at its top."""
    config = configured(max_iters=30, warmup_iters=warmup, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
             torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.max_iters - warmup)]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[warmup])
    for step in range(config.max_iters):
        assert config.at(step).learning_rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()
    climb = [config.at(step).learning_rate for step in range(warmup)]
    assert climb == pytest.approx([0.5 * (i + 1) / warmup for i in range(warmup)])


# ---- the optimizer


@pytest.mark.parametrize("ablation", ["none", "local", "global"])
def test_the_optimizer_has_every_parameter_once_and_every_parameter_gets_a_gradient(ablation):
    config = configured(ablation=ablation, weight_decay=0.1)
    model = model_of(config)
    optimizer = train.make_optimizer(model, config, torch.device("cpu"))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))  # so the tied embedding is there once
    tokens = torch.randint(300, (4, 17))
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_adamw_gets_its_knobs_and_decays_matrices_only():
    config = configured(weight_decay=0.1, beta1=0.8, beta2=0.95, adam_eps=1e-7, learning_rate=0.003)
    optimizer = train.make_optimizer(model_of(config), config, torch.device("cpu"))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"], group["amsgrad"]) == ((0.8, 0.95), 1e-7, 0.003, False)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0)


@pytest.mark.parametrize("grad_clip", [0, 0.5])
def test_a_run_is_the_textbooks_updates(data, tmp_path, grad_clip):
    """Three updates written out: batch, cross-entropy, clipping by the norm of the whole gradient, AdamW. The large
    adam_eps makes the size of a gradient matter, which Adam otherwise divides away, clipping included."""
    chosen = dict(ablation="none", max_iters=3, eval_interval=2, grad_clip=grad_clip, weight_decay=0.3, beta1=0.8,
                  beta2=0.95, adam_eps=0.1, learning_rate=0.2, warmup_iters=1, seed=5)
    out = start(data, tmp_path / "run", **chosen)

    model = model_of(configured(**chosen), seed=5)
    tokens = torch.from_numpy(np.fromfile(data / "train.bin", "<u2").astype(np.int64))
    first = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    second = copy.deepcopy(first)
    losses, norms = [], []
    for step, rate in enumerate([0.2, 0.2, 0.1]):  # one update of warm-up, then half a cosine over two
        starts = np.random.default_rng((5, step)).integers(0, 3000 - 16, 4)
        batch = torch.stack([tokens[start : start + 17] for start in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norm = sum((parameter.grad**2).sum() for parameter in model.parameters()) ** 0.5
        losses.append(loss.item())
        norms.append(norm.item())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad * min(1, grad_clip / norm if grad_clip else 1)
                first[name] = 0.8 * first[name] + 0.2 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                mean, variance = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                decay = 0.3 if parameter.dim() == 2 else 0.0
                parameter.copy_(parameter * (1 - rate * decay) - rate * mean / (variance**0.5 + 0.1))

    assert norms[0] > 0.5  # so that there is something to clip
    trained = load_checkpoint(out / "last.pt")["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=2e-5, atol=2e-6, msg=name)
    # and the lines of metrics.jsonl are means over the updates since the line before
    assert [line["loss"] for line in metrics(out)] == [None, pytest.approx(np.mean(losses[:2])), pytest.approx(losses[2])]
    assert [line["grad_norm"] for line in metrics(out)] == [None, pytest.approx(np.mean(norms[:2]), rel=1e-5),
                                                             pytest.approx(norms[2], rel=1e-5)]


@pytest.mark.parametrize("max_iters, eval_interval", [(12, 5), (10, 5), (3, 100), (1, 1)])
def test_there_are_exactly_max_iters_updates_at_the_scheduled_rates(data, tmp_path, monkeypatch, max_iters, eval_interval):
    make_optimizer, rates, steps, batch_at = train.make_optimizer, [], [], train.batch_at

    def counted(*arguments):
        optimizer = make_optimizer(*arguments)
        optimizer.register_step_post_hook(lambda used, *_: rates.append({group["lr"] for group in used.param_groups}))
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", counted)
    monkeypatch.setattr(train, "batch_at", lambda tokens, step, *rest: (steps.append(step), batch_at(tokens, step, *rest))[1])
    out = start(data, tmp_path / "run", max_iters=max_iters, eval_interval=eval_interval)
    config = configured(max_iters=max_iters)
    assert rates == [{config.at(step).learning_rate} for step in range(max_iters)]
    assert steps == list(range(max_iters))
    # evaluation before the first update, every eval_interval, and once after the last
    assert [line["step"] for line in metrics(out)] == sorted({*range(0, max_iters, eval_interval), max_iters})
    last = load_checkpoint(out / "last.pt")
    assert last["step"] == max_iters
    assert {float(entry["step"]) for entry in last["optimizer"]["state"].values()} == {max_iters}


# ---- the batches


def test_a_batch_depends_on_seed_and_step_alone():
    tokens, config = np.arange(1000, dtype=np.uint16), configured()
    batch = train.batch_at(tokens, 7, config)
    np.random.seed(3), torch.manual_seed(3), train.batch_at(tokens, 8, config)  # neither other generators nor other calls matter
    assert torch.equal(train.batch_at(tokens, 7, config), batch)
    assert not torch.equal(train.batch_at(tokens, 8, config), batch)
    assert not torch.equal(train.batch_at(tokens, 7, configured(seed=1)), batch)
    # so seed 7 is not seed 1337 a few steps later
    streams = [[train.batch_at(tokens, step, configured(seed=seed)).sum().item() for step in range(40)]
               for seed in (0, 1)]
    assert len({*streams[0], *streams[1]}) > 70


def test_a_batchs_rows_are_stretches_of_the_file_with_one_token_more_for_the_targets():
    tokens, config = np.arange(5000, dtype=np.uint16), configured(batch_size=6)
    batch = train.batch_at(tokens, 0, config)
    assert batch.shape == (6, 17) and batch.dtype == torch.int64
    assert torch.equal(batch, batch[:, :1] + torch.arange(17))  # the file counts up, so must every row
    assert len(batch[:, 0].unique()) > 1


def test_what_the_model_is_given_are_inputs_and_the_same_shifted_by_one(data, tmp_path, monkeypatch):
    forward, seen = GPTNeo.forward, []

    def spy(self, idx, targets=None, *schedule):
        seen.append((idx, targets))
        return forward(self, idx, targets, *schedule)

    monkeypatch.setattr(GPTNeo, "forward", spy)
    start(data, tmp_path / "run", max_iters=1)
    for idx, targets in seen:
        assert idx.shape == targets.shape and torch.equal(idx[:, 1:], targets[:, :-1])


def test_offsets_reach_both_ends_of_the_file_and_nothing_beyond():
    tokens, config = np.arange(20, dtype=np.uint16), configured()
    rows = torch.cat([train.batch_at(tokens, step, config) for step in range(100)])
    assert set(rows[:, 0].tolist()) == {0, 1, 2, 3} and rows.max() == 19
    assert torch.equal(train.batch_at(tokens[:17], 0, config), torch.arange(17).repeat(4, 1))  # just long enough


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_rows_put_together_are_the_batch_of_one_process(world):
    tokens, config = np.arange(1000, dtype=np.uint16), configured(batch_size=12)
    parts = [train.batch_at(tokens, 5, config, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {12 // world}
    assert torch.equal(torch.cat(parts), train.batch_at(tokens, 5, config))


def test_tokens_that_lie_on_the_device_give_the_same_rows():
    """There they are the bits of uint16 as int16: the upper half of GPT-2's vocabulary must not come out negative."""
    tokens, config = np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16), configured(block_size=30)
    on_device = torch.from_numpy(tokens.view(np.int16))
    assert tokens.max() > 2**15 > tokens.min()
    assert torch.equal(train.batch_at(on_device, 3, config), train.batch_at(tokens, 3, config))
    assert train.place_tokens(tokens, torch.device("cpu")) is tokens  # memory-mapped they stay


# ---- validation


def evaluate(model, tokens, **changes):
    return train.validation_losses(model, tokens, configured(**changes), train.Machine())


def test_evaluation_is_the_plain_mean_over_the_windows(data):
    """400 tokens hold 24 windows of 16 with their targets."""
    model, tokens = model_of(configured()), load_tokens(data, "val")
    clean, ablated = [], []
    for start in range(0, 24 * 16, 16):
        window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))[None]
        streams = model.ablated(window[:, :-1])
        clean.append(F.cross_entropy(streams.logits_clean[0], window[0, 1:]).item())
        ablated.append(F.cross_entropy(streams.logits_ablated[0], window[0, 1:]).item())
    expected = pytest.approx([np.mean(clean), np.mean(ablated)], rel=1e-6)
    assert evaluate(model, tokens, eval_windows=24) == expected
    assert evaluate(model, tokens, eval_windows=10_000) == expected  # more than there are: all of them, once
    for changes in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 1000}, {"batch_size": 8, "grad_accum": 4}):
        assert evaluate(model, tokens, eval_windows=24, **changes) == expected


@pytest.mark.parametrize("count", [1, 2, 5, 8, 23, 24, 50])
def test_the_windows_are_different_ones_spread_over_the_whole_split(count):
    tokens, seen = np.arange(400, dtype=np.uint16), []

    def spy(idx, targets):
        assert torch.equal(targets, idx + 1)
        seen.extend(idx[:, 0].tolist())
        return Losses(torch.zeros(()), torch.zeros(()), None)

    evaluate(spy, tokens, eval_windows=count)
    gaps = np.diff([*seen, 24 * 16])
    assert len(seen) == min(count, 24) and seen[0] == 0
    assert all(start % 16 == 0 for start in seen)  # aligned, so no two overlap
    assert gaps.min() >= 16 and gaps.max() - gaps.min() <= 16  # evenly, to within one window


def test_evaluating_more_often_or_on_more_windows_does_not_change_the_weights(data, tmp_path, whole):
    often = start(data, tmp_path / "often", eval_interval=1, eval_windows=24)
    assert len(metrics(often)) == 13
    for part in ("model", "optimizer"):
        assert identical(state(often)[part], state(whole)[part])


# ---- the ramp of the ablated coefficient


RAMP = dict(ramp_start=0.25, ramp_end=0.75, ablated_coeff=2.0)  # of 12 updates: 3 without, then 2 * 1/6, 2 * 2/6, ...


def test_the_coefficient_rises_in_a_line_between_two_shares_of_the_run():
    config = configured(**RAMP)
    assert [config.at(step).ablated_coeff for step in range(13)] == pytest.approx(
        [0, 0, 0, 0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 2, 2, 2])
    assert {configured().at(step).ablated_coeff for step in range(13)} == {1.0}  # the paper
    assert {configured(ablation="none").at(step).ablated_coeff for step in range(13)} == {0.0}
    jump = configured(ramp_start=0.5, ramp_end=0.5)
    assert [jump.at(step).ablated_coeff for step in (0, 5, 6, 12)] == [0, 0, 1, 1]


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_updates_weigh_the_ablated_loss_by_the_ramp_and_leave_it_out_at_0(data, tmp_path, monkeypatch, ablation):
    """The last weights are those of plain updates written out: Adam counts a gate's updates from its first gradient."""
    passes, ablated_pass = [], GPTNeo.ablated_pass
    monkeypatch.setattr(GPTNeo, "ablated_pass", lambda self, *given: (
        passes.append(torch.is_grad_enabled()), ablated_pass(self, *given))[1])
    chosen = dict(ablation=ablation, **RAMP, adam_eps=0.1, eval_interval=12)
    out = start(data, tmp_path / "run", **chosen)
    assert passes.count(True) == 8  # 12 updates less the 4 whose coefficient is 0
    assert passes.count(False) == 4  # validation always has both streams: 2 x 8 windows in batches of 4
    config = configured(**chosen)
    model = model_of(config, seed=1337)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, weight_decay=0, eps=0.1)
    tokens = load_tokens(data, "train")
    for step in range(12):
        rows = train.batch_at(tokens, step, config)
        streams = model.ablated(rows[:, :-1])
        loss = F.cross_entropy(streams.logits_clean.flatten(0, 1), rows[:, 1:].flatten())
        if step > 3:
            ablated = F.cross_entropy(streams.logits_ablated.flatten(0, 1), rows[:, 1:].flatten())
            loss = loss + 2 * min(1, (step - 3) / 6) * ablated
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.at(step).learning_rate
        optimizer.step()
    trained = load_checkpoint(out / "last.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained["model"][name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)
        assert trained["optimizer"]["state"][name]["step"] == (8 if "_gate." in name else 12)


def test_a_line_of_metrics_has_an_ablated_loss_where_every_update_had_one(data, tmp_path, capsys):
    lines = metrics(start(data, tmp_path / "run", **RAMP, eval_interval=4, log_interval=2))
    assert [line["loss_ablated"] is None for line in lines] == [True, True, False, False]
    assert [line["ablated_coeff"] for line in lines] == pytest.approx([0, 1 / 3, 5 / 3, 2])
    assert all(line["val_ablated"] for line in lines)
    assert all(line["val_loss"] == pytest.approx(line["val_clean"] + 2 * line["val_ablated"]) for line in lines)
    spoken = [line.split("|")[0] for line in capsys.readouterr().out.splitlines() if "grad norm" in line]
    assert ["ablated" in line for line in spoken] == [False, False, True, True, True, True]


# ---- k falls, gates learn alone or at their own rate


def test_k_falls_from_all_units_but_one_in_equal_factors(data, tmp_path, monkeypatch):
    config = configured(ramp_start=0.25, ramp_end=0.5, anneal_end=0.75, k_mlp=4)
    ks = [config.at(step).k for step in range(13)]
    attn, mlp = config.n_embd, 4 * config.n_embd
    assert ks[:4] == [(attn - 1, mlp - 1)] * 4 and ks[9:] == [(2, 4)] * 4
    for step in range(3, 10):
        done = (step - 3) / 6
        assert ks[step] == (round(2 * ((attn - 1) / 2) ** (1 - done)), round(4 * ((mlp - 1) / 4) ** (1 - done)))
    assert {configured().at(step).k for step in range(13)} == {(2, 2)}  # the paper
    assert {configured(ablation="none").at(step).k for step in range(13)} == {(0, 0)}


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_updates_have_their_own_k_and_evaluations_the_last_one(data, tmp_path, monkeypatch, capsys, ablation):
    seen, gate = {True: [], False: []}, model_file.gate
    monkeypatch.setattr(model_file, "gate", lambda scores, k, form: (
        seen[torch.is_grad_enabled()].append(k), gate(scores, k, form))[1])
    start(data, tmp_path / "run", ablation=ablation, anneal_end=0.5, n_layer=1)
    spoken = [line for line in capsys.readouterr().out.splitlines() if "grad norm" in line]
    assert spoken and all(re.search(r" \| k \d+, \d+ \| grad norm", line) for line in spoken)
    config = configured(ablation=ablation, anneal_end=0.5)
    assert seen[True] == [k for step in range(12) for k in config.at(step).k]
    assert set(seen[False]) == {2}


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_k_given_is_k_configured(ablation):
    config = configured(ablation=ablation)
    model = model_of(config)
    other = model_of(dataclasses.replace(config, k_attn=5, k_mlp=9))
    idx = torch.arange(34).view(2, 17)
    assert model(idx[:, :-1], idx[:, 1:], None, (5, 9)).loss == other(idx[:, :-1], idx[:, 1:]).loss
    assert model(idx[:, :-1], idx[:, 1:]).loss != other(idx[:, :-1], idx[:, 1:]).loss


@pytest.mark.parametrize("ablation", ["local", "global"])
def test_a_frozen_base_stays_to_the_bit_and_its_gates_learn(data, tmp_path, ablation):
    out = start(data, tmp_path / "run", ablation=ablation, freeze="base")
    before, after = model_of(configured(ablation=ablation), seed=1337).state_dict(), load_checkpoint(out / "last.pt")
    for name, weight in after["model"].items():
        assert torch.equal(weight, before[name]) == ("_gate." not in name), name
    assert after["optimizer"]["state"].keys() == {name for name in before if "_gate." in name}
    lines = metrics(out)
    assert lines[0]["val_clean"] == lines[-1]["val_clean"] and lines[0]["val_ablated"] != lines[-1]["val_ablated"]


def test_gates_learn_at_their_own_rate(data, tmp_path):
    """One AdamW of torch's own a group, at its own rate; 0 leaves the gates as they were."""
    before = model_of(configured(), seed=1337)
    still = load_checkpoint(start(data, tmp_path / "still", gate_lr_multiplier=0) / "last.pt")["model"]
    assert all(torch.equal(still[name], p) == ("_gate." in name) for name, p in before.state_dict().items())
    changes = dict(gate_lr_multiplier=3, max_iters=1, eval_interval=1, learning_rate=1e-3)
    thrice = load_checkpoint(start(data, tmp_path / "thrice", **changes) / "last.pt")["model"]
    once = load_checkpoint(start(data, tmp_path / "once", **{**changes, "gate_lr_multiplier": 1}) / "last.pt")["model"]
    for name, p in before.state_dict().items():
        factor = 3 if "_gate." in name else 1
        torch.testing.assert_close(thrice[name] - p, factor * (once[name] - p), rtol=1e-3, atol=1e-7, msg=name)


# ---- a run that begins with the weights of another


def first_weights(data, out, **changes):
    """The weights that a run begins with: it is evaluated, and takes one step of length 0."""
    return load_checkpoint(start(data, out, max_iters=1, learning_rate=0, **changes) / "last.pt")["model"]


def test_a_run_begins_with_another_one_and_gates_that_fit(data, tmp_path, capsys):
    source = start(data, tmp_path / "source", ablation="local")
    theirs, fresh = load_checkpoint(source / "best.pt")["model"], model_of(configured(), seed=7).state_dict()
    assert "parameters, new weights |" in capsys.readouterr().out
    for number, (changes, kept, told) in enumerate([
            ({"ablation": "none"}, False, ""),
            ({"ablation": "local", "k_attn": 8, "k_mlp": 8, "gate": "constant"}, True, ", its gates"),
            ({"ablation": "global"}, False, ", new gates"),
            ({"ablation": "local", "attn_unit": "head", "k_attn": 1}, False, ", some of its gates")]):
        ours = first_weights(data, tmp_path / str(number), init_from=source, seed=7, **changes)
        assert f"parameters, the weights of {source}{told} |" in capsys.readouterr().out
        for name, weight in ours.items():
            if "_gate." not in name or kept:
                assert torch.equal(weight, theirs[name]), name
        gates = [name for name in ours if "_gate.weight" in name and "attn" in name]
        assert bool(gates) == (changes["ablation"] != "none")
        for name in gates:
            assert (name in theirs and torch.equal(ours[name], theirs[name])) == kept
            if name in fresh and not kept and fresh[name].shape == ours[name].shape:
                assert torch.equal(ours[name], fresh[name])  # those of the seed
    shorter = first_weights(data, tmp_path / "shorter", init_from=source / "last.pt", block_size=8)
    whole = load_checkpoint(source / "last.pt")["model"]["transformer.wpe.weight"]
    assert torch.equal(shorter["transformer.wpe.weight"], whole[:8])


def test_a_run_that_began_with_another_goes_on_without_it(data, tmp_path):
    source, changes = start(data, tmp_path / "source", ablation="none"), {"init_from": tmp_path / "source"}
    undisturbed = start(data, tmp_path / "whole", **changes)
    with signals(signal.SIGTERM, at=6):
        out = start(data, tmp_path / "run", **changes)
    shutil.rmtree(source)
    start(data, out, **changes, resume=True)
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("kinds", ["global", "global,local"])
def test_a_run_begins_with_a_model_of_hugging_face(data, tmp_path, kinds):
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(
        vocab_size=300, max_position_embeddings=32, hidden_size=8, num_layers=4, num_heads=2, window_size=3,
        attention_types=[[kinds.split(","), 4 // len(kinds.split(","))]], resid_dropout=0, embed_dropout=0,
        attention_dropout=0, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")  # in several files
    changes = dict(init_from=tmp_path / "theirs", n_layer=4, n_embd=8, n_head=2, block_size=32)
    if "local" in kinds:
        advice = "another geometry: add --attention_layers=global,local --window_size=3"
        assert advice in refused(data, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()
        changes |= dict(attention_layers=kinds, window_size=3)
    out = start(data, tmp_path / "run", **changes, max_iters=1, learning_rate=0)
    idx = torch.randint(300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(GPTNeo.from_checkpoint(out)(idx), theirs(idx).logits, rtol=0, atol=1e-5)
    theirs.config.activation_function = "relu"
    theirs.config.save_pretrained(tmp_path / "theirs")
    message = refused(data, tmp_path / "other", **changes)
    assert "activation_function='relu': a model of ours has" in message
    transformers.GPT2Config().save_pretrained(tmp_path / "theirs")
    assert "describes a model of type 'gpt2': only gpt_neo is one of ours" in refused(data, tmp_path / "other", **changes)
    assert not (tmp_path / "other").exists()


# ---- what a run leaves behind


@pytest.mark.parametrize("ablation", ["none", "local"])
def test_a_line_of_metrics_says_all_and_agrees_with_the_checkpoint(data, tmp_path, ablation):
    out = start(data, tmp_path / "run", ablation=ablation, clean_coeff=0.5, ablated_coeff=2.0)
    lines = metrics(out)
    assert all(line.keys() == {"step", "loss", "loss_clean", "loss_ablated", "val_loss", "val_clean", "val_ablated",
                               "grad_norm", "lr", "ablated_coeff", "k_attn", "k_mlp", "tokens"} for line in lines)
    seconds = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds) and seconds[0] == 0
    for line in lines:
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["lr"] == configured().at(line["step"]).learning_rate
        assert line["ablated_coeff"] == (0 if ablation == "none" else 2)
        assert (line["k_attn"], line["k_mlp"]) == ((0, 0) if ablation == "none" else (2, 2))
        if ablation == "none":
            assert line["val_ablated"] is None and line["loss_ablated"] is None
            assert line["val_loss"] == pytest.approx(0.5 * line["val_clean"])
        else:
            assert line["val_loss"] == pytest.approx(0.5 * line["val_clean"] + 2 * line["val_ablated"])
            if line["step"]:
                assert line["loss"] == pytest.approx(0.5 * line["loss_clean"] + 2 * line["loss_ablated"], rel=1e-6)
    losses = evaluate(GPTNeo.from_checkpoint(out / "last.pt"), load_tokens(data, "val"))
    assert lines[-1]["val_clean"] == losses[0] and lines[-1]["val_ablated"] in (losses[1], None)


@pytest.mark.parametrize("ablation", ["none", "local", "global"])
def test_a_checkpoint_holds_what_is_needed_to_use_it_and_to_go_on(data, tmp_path, ablation):
    out = start(data, tmp_path / "run", ablation=ablation)
    meta = json.loads((data / "meta.json").read_text())
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(out / name, weights_only=True)
        assert checkpoint["config"]["ablation"] == ablation and checkpoint["config"]["vocab_size"] == 300
        assert checkpoint["train_config"] == {
            **dataclasses.asdict(configured(ablation=ablation)), "data": str(data), "out": str(out), "vocab_size": 300}
        assert (checkpoint["tokenizer"], checkpoint["data"]) == (meta["tokenizer"], meta["checksum"])
        assert {"step", "optimizer"} <= checkpoint.keys()
        assert checkpoint["model"].keys() == model_of(configured(ablation=ablation)).state_dict().keys()
        model = GPTNeo.from_checkpoint(out / name)
        assert model(torch.arange(16)[None]).shape == (1, 16, 300)


def test_training_lowers_both_losses(data, tmp_path):
    """The only test that asks whether it learns: 5.70 is the logarithm of 300, the loss of knowing nothing."""
    first, *_, last = metrics(start(data, tmp_path / "run", max_iters=100, eval_interval=100, learning_rate=1e-2))
    for stream in ("val_clean", "val_ablated"):
        assert first[stream] == pytest.approx(np.log(300), abs=0.1) and last[stream] < 4.9


def scripted(values):
    """Evaluations that return these (clean, ablated) losses one after the other."""
    values = iter(values)
    return lambda *_: list(next(values))


def test_best_is_the_lowest_validation_loss_and_worse_ones_leave_it_alone(data, tmp_path, monkeypatch):
    """The loss is the sum: 4 + 4 is better than 3 + 6, whose clean loss alone is the lowest of all."""
    monkeypatch.setattr(train, "validation_losses", scripted([(5, 5), (4, 4), (3, 6), (4, 5), (4, 4)]))
    out = start(data, tmp_path / "run", max_iters=8, eval_interval=2)
    assert load_checkpoint(out / "best.pt")["step"] == 2
    assert load_checkpoint(out / "last.pt")["step"] == 8
    assert not identical(state(out)["model"], state(out, "best.pt")["model"])


def test_a_resumed_run_remembers_its_best(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validation_losses", scripted([(5, 5), (1, 1), (4, 4), (3, 3)]))
    with signals(signal.SIGTERM, at=3):
        out = start(data, tmp_path / "run", max_iters=6, eval_interval=2)
    start(data, out, max_iters=6, eval_interval=2, resume=True)
    assert [line["val_clean"] for line in metrics(out)] == [5, 1, 4, 3]
    assert load_checkpoint(out / "best.pt")["step"] == 2


@pytest.mark.parametrize("ablation", ["none", "local"])
@pytest.mark.parametrize("lines", [1, 3])  # after the evaluation at step 0 there is no training loss yet
def test_the_picture_is_a_whole_png(data, tmp_path, ablation, lines):
    out = start(data, tmp_path / "run", ablation=ablation)
    draw_losses(out / "loss.png", metrics(out)[:lines], "local_k2 $ % _")
    content = (out / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds = 8, []
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        kind_and_body, check = content[at + 4 : at + 8 + size], content[at + 8 + size : at + 12 + size]
        assert zlib.crc32(kind_and_body) == int.from_bytes(check, "big")
        kinds.append(kind_and_body[:4])
        at += 12 + size
    assert kinds[0] == b"IHDR" and b"IDAT" in kinds and kinds[-1] == b"IEND"
    assert not list(out.glob("*.tmp"))


def test_weights_and_biases_get_the_lines_of_metrics(data, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **about: logged.append(about["config"]["seed"]),
        log=lambda line, step: logged.append((step, line["val_clean"])), finish=lambda: logged.append("finished")))
    out = start(data, tmp_path / "run", wandb=True)
    assert logged == [1337, *((line["step"], line["val_clean"]) for line in metrics(out)), "finished"]


# ---- stopped and resumed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 4, 6, 11])  # in the first update, just before an evaluation, between two, in the last
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(data, tmp_path, whole, capsys, number, at):
    with signals(number, at):
        out = start(data, tmp_path / "run")  # comes back, which is exit code 0
    stopped = load_checkpoint(out / "last.pt")
    assert stopped["step"] == at + 1
    assert stopped["since"][-1] == at % 5 + 1  # updates whose mean the next line of metrics still has to tell
    assert f"stopped after {at + 1} updates" in capsys.readouterr().out.splitlines()[-1]
    start(data, out, resume=True)
    assert_same_run(out, whole)


def test_the_parting_words_say_how_to_go_on(data, tmp_path, capsys):
    with signals(signal.SIGINT, at=2):
        start(data, tmp_path / "run")
    assert "--resume=True" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("changes", [
    {"ablation": "none"}, {"ablation": "global", "gate": "sigmoid", "attn_unit": "head", "k_attn": 1},
    {"grad_accum": 2, "warmup_iters": 9, "weight_decay": 0.1}, {"gate": "constant", **RAMP},
    {"freeze": "base", "anneal_end": 0.7, "gate_lr_multiplier": 3}], ids=str)
def test_a_run_stopped_after_every_update_equals_the_uninterrupted_one(data, tmp_path, changes):
    undisturbed = start(data, tmp_path / "whole", **changes)
    out = tmp_path / "run"
    for step in range(12):
        with signals(signal.SIGTERM, at=step):
            start(data, out, **changes, resume=step > 0)
    start(data, out, **changes, resume=True)
    assert_same_run(out, undisturbed)


def test_resuming_a_finished_run_changes_nothing(data, tmp_path, whole, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    start(data, out, resume=True)
    said = capsys.readouterr().out
    assert f"goes on from {out} |" in said and f"this run was finished at step {TINY['max_iters']}: " in said
    assert_same_run(out, whole)


def test_how_often_the_console_is_written_to_changes_nothing(data, tmp_path, whole):
    assert_same_run(start(data, tmp_path / "run", log_interval=1), whole)


def test_a_run_may_go_on_elsewhere_and_with_less_memory(data, tmp_path, double):
    with signals(signal.SIGTERM, at=6):
        start(data, tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.copytree(data, tmp_path / "copy")
    out = start(tmp_path / "copy", tmp_path / "there", grad_accum=2, log_interval=1, resume=True)
    assert_close_run(out, start(data, tmp_path / "whole"))


# ---- killed


def assert_sound(out):
    """What must hold after a crash at any moment."""
    for name in ("last.pt", "best.pt"):
        if (out / name).exists():
            GPTNeo.from_checkpoint(out / name)
    if (out / "metrics.jsonl").exists():
        metrics(out)


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """An undisturbed run of three evaluations."""
    return start(data, tmp_path_factory.mktemp("short") / "run", **SHORT)


SHORT = dict(max_iters=5, eval_interval=3)


def test_a_crash_before_any_change_on_disk_loses_nothing(data, tmp_path, short, monkeypatch):
    """All that a run changes, it changes by renaming a finished file: so the states in which a crash can leave the folder
    are those before each rename. Metrics written and no checkpoint, best.pt written and last.pt old: all are here."""
    replace, renamed = os.replace, []

    def crash_at(count):
        def counted(source, target):
            if len(renamed) == count:
                raise Killed
            renamed.append(Path(target).name)
            replace(source, target)
        return counted

    for count in range(100):
        out = tmp_path / str(count)
        renamed.clear()
        monkeypatch.setattr(os, "replace", crash_at(count))
        try:
            start(data, out, **SHORT)
            break
        except Killed:
            monkeypatch.setattr(os, "replace", replace)
        assert_sound(out)
        start(data, out, **SHORT, resume=(out / "last.pt").exists())  # without last.pt it is no run yet, and starts anew
        assert_same_run(out, short)
    assert renamed == ["metrics.jsonl", *["metrics.jsonl", "best.pt", "last.pt"] * 3]  # every loss here is the best so far


def test_a_crash_in_the_middle_of_writing_a_checkpoint_loses_nothing(data, tmp_path, short, monkeypatch):
    save, calls = torch.save, []

    def crash_at(count):
        def counted(content, file):
            calls.append(file.name)
            if len(calls) == count:
                file.write(b"half a checkpoint")
                file.flush()
                raise Killed
            save(content, file)
        return counted

    for count in range(1, 7):
        out = tmp_path / str(count)
        calls.clear()
        monkeypatch.setattr(torch, "save", crash_at(count))
        with pytest.raises(Killed):
            start(data, out, **SHORT)
        monkeypatch.setattr(torch, "save", save)
        assert Path(calls[-1]).read_bytes() == b"half a checkpoint"  # under its temporary name
        assert_sound(out)
        start(data, out, **SHORT, resume=(out / "last.pt").exists())
        assert_same_run(out, short)


def test_a_run_killed_again_and_again_equals_the_undisturbed_one(data, tmp_path, launcher):
    """Real processes and real kill -9, at random moments. However slow the machine, what was finished stays finished."""
    rng, out, codes = random.Random(0), tmp_path / "run", []
    chosen = dict(eval_interval=1, max_iters=16, n_layer=1)
    for _ in range(8):
        pid, = launcher.start((words(data, out, **chosen, resume=(out / "last.pt").exists()), {}), log=tmp_path / "log")
        time.sleep(rng.uniform(0.05, 0.9))
        with contextlib.suppress(ProcessLookupError):  # it had come to its end
            os.kill(pid, signal.SIGKILL)
        codes += launcher.wait()
        assert_sound(out)
        for name in ("last.pt.tmp", "best.pt.tmp", "metrics.jsonl.tmp", "loss.png.tmp"):
            if out.exists():
                (out / name).write_bytes(b"left over from a killed run")
    assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 0}, (tmp_path / "log").read_text()
    launcher.start((words(data, out, **chosen, resume=(out / "last.pt").exists()), {}), log=tmp_path / "log")
    assert launcher.wait() == [0], (tmp_path / "log").read_text()
    assert_same_run(out, start(data, tmp_path / "whole", **chosen))


def test_ctrl_c_on_the_real_command_saves_and_exits_with_0(data, tmp_path):
    command = words(data, tmp_path / "run", max_iters=10**6, eval_interval=10**6, log_interval=1)
    process = subprocess.Popen([sys.executable, "train.py", *command], cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:  # which also shows that lines come while it runs
        if line.startswith("step 2:"):
            process.send_signal(signal.SIGINT)
            break
    printed, complaints = process.communicate(timeout=PATIENCE)
    assert (process.returncode, complaints) == (0, "\nstopping where it can go on; once more: at once\n")
    step = load_checkpoint(tmp_path / "run" / "last.pt")["step"]
    assert step >= 2
    assert printed.splitlines()[-1] == f"stopped after {step:,} updates; the same command with --resume=True goes on from there"
    assert (tmp_path / "run" / "loss.png").exists()


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    """A stand-in for torch that is interrupted as it is imported, and would go on for a minute."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "train.py"], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "stopped\n")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(data, tmp_path, launcher, double):
    """Instead of a full disk, a limit on the size of a file, from the seventh update on. It is in the way of best.pt."""
    out, log = tmp_path / "run", tmp_path / "log"
    limited = script(tmp_path, send="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))")
    launcher.start((words(data, out), *ranks(1)), log=log, script=limited)
    assert launcher.wait() == [1]
    complaint = log.read_text().splitlines()[-1]
    assert complaint.startswith("error: cannot write") and "File too large" in complaint
    assert "last.pt, of step 5, is intact" in complaint and "Traceback" not in log.read_text()
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "metrics.jsonl"]
    start(data, out, resume=True)
    assert_close_run(out, start(data, tmp_path / "whole"))


# ---- a loss that is no longer finite


@pytest.mark.parametrize("interval", [1, 5])
def test_a_learning_rate_that_breaks_the_weights_is_noticed_before_they_are_saved(data, tmp_path, interval):
    """Update 1 is finite and leaves ruined weights: no evaluation in between may put them into last.pt."""
    message = refused(data, tmp_path / "run", learning_rate=1e30, eval_interval=interval)
    assert "update 2;" in message and "--learning_rate" in message and str(tmp_path / "run") in message
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0]
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["step"] == 0
    assert all(value.isfinite().all() for value in last["model"].values())


@pytest.mark.parametrize("update", [1, 4, 5, 6, 9, 12])
@pytest.mark.parametrize("stop_at", [None, 8])  # a request to stop comes first: it must not save what is broken either
def test_the_message_has_the_update_at_which_it_happened(data, tmp_path, monkeypatch, update, stop_at):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(*arguments):
        calls.append(clip(*arguments))
        return torch.tensor(float("inf")) if len(calls) == update else calls[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with signals(signal.SIGTERM, at=stop_at):
        if stop_at is not None and stop_at + 1 < update:  # it ended before
            start(data, tmp_path / "run")
            assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == stop_at + 1
            return
        assert f"update {update};" in refused(data, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == (update - 1) // 5 * 5
    assert len(metrics(tmp_path / "run")) == (update - 1) // 5 + 1


# ---- several processes


def script(folder, send="pass", patience=0, victim=0):
    """train.py in float64. Rank `victim` does `send` during its seventh update, after which every update takes `patience`
    seconds, so that a signal can make its way."""
    (folder / "script.py").write_text(f"""if True:
        import os, signal, sys, time
        import config, torch, train
        torch.set_default_dtype(torch.float64)
        train.draw_losses = lambda *_: None
        batch_at, compile_module = train.batch_at, torch.nn.Module.compile
        torch.nn.Module.compile = lambda self, mode: compile_module(self, backend="aot_eager")
        def and_signal(tokens, step, *rest):
            if step == 6 and os.environ["RANK"] == "{victim}":
                {send}
            time.sleep({patience} if step > 6 else 0)
            return batch_at(tokens, step, *rest)
        train.batch_at = and_signal
        config.cli(train.main)
    """)
    return str(folder / "script.py")


def several(launcher, world, folder, data, out, **changes):
    """Run `world` processes to their end."""
    jobs = ((words(data, out, **changes), rank) for rank in ranks(world))
    launcher.start(*jobs, log=folder / "log", script=script(folder))
    assert launcher.wait() == [0] * world, (folder / "log").read_text()
    return out


@pytest.mark.parametrize("changes", [{"ablation": "local"}, {"ablation": "global", "grad_accum": 2},
                                     {"gate": "constant", **RAMP}, {"ablation": "global", "grad_accum": 2, **RAMP},
                                     {"freeze": "base", "gate": "constant", "anneal_end": 0.7, "grad_accum": 2}], ids=str)
def test_two_processes_train_like_one(data, tmp_path, launcher, changes, double):
    """Each rank is told another folder, so that it shows who writes: only rank 0 does."""
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    jobs = ((words(data, out, **changes), rank) for out, rank in zip(folders, ranks()))
    launcher.start(*jobs, log=tmp_path / "log", script=script(tmp_path))
    assert launcher.wait() == [0, 0], (tmp_path / "log").read_text()
    assert not folders[1].exists()
    assert (tmp_path / "log").read_text().count("step 12: validation") == 1
    assert state(folders[0])["model"].keys() == model_of(configured(**changes)).state_dict().keys()  # no "module."
    assert_close_run(folders[0], start(data, tmp_path / "one", **{**changes, "grad_accum": 1}))


@pytest.mark.parametrize("fsdp", [False, True])
def test_four_processes_train_like_one(data, tmp_path, launcher, double, fsdp):
    """Seven windows to evaluate: one process has none left and must neither count one nor keep the others waiting."""
    out = several(launcher, 4, tmp_path, data, tmp_path / "four", fsdp=fsdp, eval_windows=7)
    assert_close_run(out, start(data, tmp_path / "one", eval_windows=7))


@pytest.mark.parametrize("changes", [
    {"ablation": "none"}, {"grad_accum": 2}, {"attention_layers": "global,local", "window_size": 4},
    {"ablation": "global", "compile": True, "n_layer": 1, "max_iters": 2}, RAMP, {"ablation": "global", **RAMP},
    {"freeze": "base", "gate": "constant", "anneal_end": 0.7, "gate_lr_multiplier": 3},
    {"freeze": "base", "gate": "constant", "ablation": "global"}], ids=str)
def test_sharded_processes_train_like_one(data, tmp_path, launcher, double, changes):
    """compile: all but its last part, as in the compiled run below."""
    out = several(launcher, 2, tmp_path, data, tmp_path / "sharded", **changes, fsdp=True)
    one = start(data, tmp_path / "one", **{**changes, "grad_accum": 1, "compile": False})
    assert_close_run(out, one)
    for name in ("last.pt", "best.pt"):  # whole, and plain tensors
        ours, theirs = state(out, name)["model"], state(one, name)["model"]
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-7, atol=1e-9)
    GPTNeo.from_checkpoint(out)


@pytest.mark.parametrize("before, after", [((2, True), (1, False)), ((1, False), (2, True)), ((2, True), (4, True)),
                                           ((2, False), (1, True))], ids=str)
def test_a_run_goes_on_in_other_processes_sharded_or_not(data, tmp_path, launcher, double, before, after):
    """Each is (processes, fsdp). Stopped after update 7, between two evaluations. One checkpoint holds whole
    tensors, whoever wrote it, and is what one process alone would have written."""
    out, log = tmp_path / "run", tmp_path / "log"
    told = script(tmp_path, send="os.kill(os.getpid(), signal.SIGTERM)")
    world, fsdp = before
    launcher.start(*((words(data, out, fsdp=fsdp), rank) for rank in ranks(world)), log=log, script=told)
    assert launcher.wait() == [0] * world, log.read_text()
    with signals(signal.SIGTERM, at=6):
        alone = start(data, tmp_path / "alone")
    ours, theirs = load_checkpoint(out / "last.pt"), load_checkpoint(alone / "last.pt")
    assert ours["step"] == theirs["step"] == 7
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()  # names of parameters
    for name, entry in theirs["optimizer"]["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(ours["optimizer"]["state"][name][key], value, rtol=1e-7, atol=1e-12)
    world, fsdp = after
    several(launcher, world, tmp_path, data, out, fsdp=fsdp, resume=True)
    assert sorted(path.name for path in out.iterdir()) == ["best.pt", "last.pt", "metrics.jsonl"]
    assert_close_run(out, start(data, alone, resume=True))
    assert_close_run(out, start(data, tmp_path / "whole"))


def test_processes_whose_run_diverges_say_so_and_wait_for_nobody(data, tmp_path, launcher):
    jobs = ((words(data, tmp_path / "run", learning_rate=1e30), rank) for rank in ranks())
    launcher.start(*jobs, log=tmp_path / "log", script=script(tmp_path))
    assert launcher.wait() == [1, 1]
    assert (tmp_path / "log").read_text().count("no longer finite at update 2;") == 2


def test_sharding_without_processes_is_refused(data, tmp_path):
    assert "torchrun" in refused(data, tmp_path / "run", fsdp=True)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_the_same_update(data, tmp_path, double, parts):
    assert_close_run(start(data, tmp_path / "run", grad_accum=parts), start(data, tmp_path / "whole"))


def test_all_ranks_stop_together_when_one_is_asked_to(data, tmp_path, launcher, double):
    """Twice, as when a scheduler signals torchrun and its children and torchrun passes it on: once more is no emergency."""
    out, log = tmp_path / "run", tmp_path / "log"
    twice = script(tmp_path, send="[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]")
    jobs = ((words(data, out, log_interval=1000), rank) for rank in ranks())
    launcher.start(*jobs, log=log, script=twice)
    assert launcher.wait() == [0, 0], log.read_text()
    assert load_checkpoint(out / "last.pt")["step"] == 7
    jobs = ((words(data, out, resume=True), rank) for rank in ranks())  # both read the checkpoint
    launcher.start(*jobs, log=log, script=script(tmp_path))
    assert launcher.wait() == [0, 0], log.read_text()
    assert_close_run(out, start(data, tmp_path / "whole"))


def torchrun(launcher, folder, *words):
    """The real torchrun, but for its import of torch, with two real processes. -> exit code, what all of them printed"""
    (folder / "torchrun.py").write_text("import sys, torch.distributed.run as run; run.main(sys.argv[1:])")
    launcher.start((["--standalone", "--nproc_per_node=2", *words], {}), log=folder / "torchrun.log", script=folder / "torchrun.py")
    code, = launcher.wait()
    return code, (folder / "torchrun.log").read_text()


def test_a_run_of_torchrun_that_is_told_to_stop_goes_on_in_one_process(data, tmp_path, launcher, double):
    """The scheduler signals torchrun, which tells its processes and kills them 30 seconds later: they must not wait for
    the next line on the console to agree."""
    chosen = dict(max_iters=60, eval_interval=50, log_interval=1000)
    told = script(tmp_path, send="os.kill(os.getppid(), signal.SIGTERM)", patience=0.5)
    _, said = torchrun(launcher, tmp_path, told, *words(data, tmp_path / "run", **chosen))
    assert "--resume=True goes on" in said, said
    assert 7 <= load_checkpoint(tmp_path / "run" / "last.pt")["step"] < 60
    start(data, tmp_path / "run", **chosen, resume=True)
    assert_close_run(tmp_path / "run", start(data, tmp_path / "one", **chosen))


@pytest.mark.parametrize("changes", [{}, {"fsdp": True}], ids=str)
def test_the_death_of_one_process_ends_all_and_the_run_goes_on(data, tmp_path, launcher, double, changes):
    """kill -9, as when memory runs out. torchrun would kill the others after 30 seconds, but they notice by themselves."""
    chosen, out = dict(eval_interval=3, log_interval=1000, **changes), tmp_path / "run"
    begun = time.monotonic()
    killed = script(tmp_path, send="os.kill(os.getpid(), signal.SIGKILL)", victim=1)
    code, said = torchrun(launcher, tmp_path, killed, *words(data, out, **chosen))
    assert time.monotonic() - begun < PATIENCE / 2  # not timed, but it must not hang
    assert code != 0 and "SIGKILL" in said
    if not changes:  # a sharded process may be told by torchrun before it notices
        assert "error: this run has lost one of its processes" in said and f"from {out / 'last.pt'}" in said
        assert "Error: [" not in said  # gloo's own words, with its traceback
    assert load_checkpoint(out / "last.pt")["step"] == 6
    several(launcher, 2, tmp_path, data, out, **chosen, resume=True)
    assert_close_run(out, start(data, tmp_path / "one", **{**chosen, "fsdp": False}))


def test_a_mistake_ends_all_processes_with_the_message(data, tmp_path, launcher):
    launcher.start(*((words(data, tmp_path / "run", grad_accum=4), rank) for rank in ranks()), log=tmp_path / "log")
    assert launcher.wait() == [1, 1]
    assert (tmp_path / "log").read_text().count(
        "error: batch_size=4 must be a multiple of processes x grad_accum = 2 x 4\n") == 2
    assert not (tmp_path / "run").exists()


# ---- compiled, and in bfloat16


def test_bfloat16_computes_in_half_the_digits_and_saves_all_of_them(data, tmp_path, whole):
    out = start(data, tmp_path / "run", dtype="bfloat16")
    for ours, theirs in zip(metrics(out), metrics(whole), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-2) and ours["val_loss"] != theirs["val_loss"]
    assert {value.dtype for value in state(out)["model"].values()} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, RAMP], ids=str)
def test_a_compiled_run_gives_the_same_losses_and_plain_names(data, tmp_path, monkeypatch, double, changes):
    """The whole way through torch.compile but for its last part, which turns graphs into C++ and takes minutes."""
    compile_module, compiled, chosen = torch.nn.Module.compile, [], dict(n_layer=1, max_iters=3, **changes)

    def without_cpp(self, mode):
        compiled.append(self)
        compile_module(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_cpp)
    out = start(data, tmp_path / "run", **chosen, compile=True)
    torch._dynamo.reset()
    assert len(compiled) == 1 and compiled[0]._compiled_call_impl is not None
    plain = start(data, tmp_path / "plain", **chosen)
    assert_close_run(out, plain)
    assert state(out)["model"].keys() == state(plain)["model"].keys()
    start(data, out, **chosen, compile=False, resume=True)  # and goes on where there is no compiler


@pytest.mark.parametrize("changes, count", [(RAMP, 3), ({"anneal_end": 1.0}, 3)], ids=str)
def test_a_compiled_run_is_not_compiled_anew_for_every_coefficient_and_k(data, tmp_path, monkeypatch, changes, count):
    from torch._dynamo.testing import CompileCounterWithBackend

    compile_module = torch.nn.Module.compile
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compile_module(self, backend=graphs))
    start(data, tmp_path / "run", n_layer=1, **changes, compile=True)
    torch._dynamo.reset()
    # an evaluation, an update of one stream, of both; or an evaluation, the first k, any other k
    assert graphs.frame_count == count


# ---- refused, in one line


def test_cuda_graphs_are_refused_where_they_lose_gradients(data, tmp_path):
    for changes in ({"grad_accum": 2}, {"fsdp": True}, {"anneal_end": 0.5}):
        assert "--compile=True" in refused(data, tmp_path / "run", compile="reduce-overhead", **changes)


def test_a_new_run_never_overwrites_an_old_one(data, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    message = refused(data, whole)
    assert str(whole) in message and "--resume=True" in message and "--out=" in message
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_new_run_never_overwrites_an_imported_model(data, tmp_path):
    """Which interp/hf.py writes: a best.pt without an optimizer."""
    out, model = tmp_path / "run", model_of(configured())
    out.mkdir()
    save_checkpoint(out / "best.pt", model.config, model.state_dict(), step=7)
    before = (out / "best.pt").read_bytes()
    message = refused(data, out)
    assert f"--init_from={out}" in message and "another --out" in message and [*out.iterdir()] == [out / "best.pt"]
    assert (out / "best.pt").read_bytes() == before


def test_resuming_what_is_not_there_is_refused(data, tmp_path):
    message = refused(data, tmp_path / "run", resume=True)
    assert str(tmp_path / "run" / "last.pt") in message
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_knobs_is_refused_with_the_words_to_add(data, tmp_path, whole):
    with signals(signal.SIGTERM, at=6):
        out = start(data, tmp_path / "run")
    message = refused(data, out, resume=True, learning_rate=0.5, k_mlp=3)
    assert "--learning_rate=0.0014" in message and "--k_mlp=2" in message and "--n_layer" not in message
    advice = dict(word[2:].split("=") for word in message.split() if word.startswith("--"))
    start(data, out, resume=True, **{"learning_rate": 0.5, "k_mlp": 3, **advice})  # and the advice is good
    assert_same_run(out, whole)


# where a run computes and what it prints may change on the way; a knob added later may not, unless it is named here
FREE = {"resume", "data", "out", "device", "dtype", "compile", "fsdp", "grad_accum", "log_interval", "wandb"}


@pytest.mark.parametrize("name", [name for name in knobs.FIELDS if name not in FREE])
def test_no_knob_that_changes_the_computation_can_change_on_the_way(name, data, whole):
    field = knobs.FIELDS[name]
    choices = [choice for choice in getattr(field.type, "__args__", ()) if choice != field.default]
    other = choices[0] if choices else "local" if field.type is str else TINY.get(name, field.default) + 1
    other = {"beta1": 0.5, "beta2": 0.5, "n_head": 4, "n_embd": 32}.get(name, other)
    allowed = {"attn_unit": {"k_attn": 1}, "ramp_start": {"ramp_end": 1.0}}.get(name, {})  # what it needs beside it
    assert f"--{name}=" in refused(data, whole, resume=True, **{name: other, **allowed})


def test_a_run_goes_on_without_its_metrics_file(data, tmp_path, whole):
    """last.pt holds what metrics.jsonl said; weights alone are not enough to go on from."""
    with signals(signal.SIGTERM, at=6):
        out = start(data, tmp_path / "run")
    (out / "metrics.jsonl").unlink()
    start(data, out, resume=True)
    assert_same_run(out, whole)
    model = GPTNeo.from_checkpoint(out / "last.pt")
    save_checkpoint(out / "last.pt", model.config, model.state_dict())
    assert "no training state" in refused(data, out, resume=True)


def test_two_runs_in_one_folder_at_a_time_are_refused(data, tmp_path):
    lock = lock_folder(tmp_path / "run", "")
    assert "another train.py is at work" in refused(data, tmp_path / "run")
    os.close(lock)
    with signals(signal.SIGTERM, at=2):
        start(data, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:  # and one that fails lets go of its folder
        patch.setattr(train, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(data, tmp_path / "run", resume=True)
    os.close(lock_folder(tmp_path / "run", "still locked"))


@pytest.mark.parametrize("name, value", [("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "-1"), ("RANK", "1")])
def test_what_torchrun_would_never_say_is_refused(data, tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    message = refused(data, tmp_path / "run")
    assert ("torchrun" in message) and (f"{name}={value} is not a whole number" in message or value == "1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ablation", ["none", "local", "global"])
def test_a_run_is_refused_beforehand_only_where_no_swap_could_hold_it(monkeypatch, ablation):
    config = configured(ablation=ablation)
    held = 16 * sum(p.numel() for p in model_of(config).parameters()) + 2 * 2 * 4 * 16 * 16  # 2 bytes of L x B x T x C
    config = dataclasses.replace(config, vocab_size=300)
    for memory in (held / 2, float("inf")):
        monkeypatch.setattr(knobs, "device_memory", lambda device: memory)
        train.check_memory(config, train.Machine())
    monkeypatch.setattr(knobs, "device_memory", lambda device: 0.4 * held)
    with pytest.raises(UserError, match="this run needs more than 0 GB of memory, and cpu has 0"):
        train.check_memory(config, train.Machine())
    if ablation != "none":  # what is frozen has neither a gradient nor moments
        gates = sum(p.numel() for name, p in model_of(config).named_parameters() if "_gate." in name)
        of_base = held - 2 * 2 * 4 * 16 * 16 - 16 * gates
        frozen = dataclasses.replace(config, freeze="base")
        monkeypatch.setattr(knobs, "device_memory", lambda device: (held - of_base * 3 / 4) / 2)
        train.check_memory(frozen, train.Machine())
        with pytest.raises(UserError, match="this run needs more than"):
            train.check_memory(config, train.Machine())


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")], ids=str)
def test_too_little_memory_is_one_line(data, tmp_path, monkeypatch, error):
    def exhausted(*_):
        raise error

    monkeypatch.setattr(train, "update", exhausted)
    message = refused(data, tmp_path / "run")
    assert "out of memory" in message and all(f"--{name}" in message for name in ("batch_size", "grad_accum", "n_embd"))


def test_a_run_folder_that_cannot_be_made_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"cannot write {tmp_path}/file/run (Not a directory)" in refused(data, tmp_path / "file" / "run")


def test_resuming_with_other_data_is_refused(tmp_path, whole):
    other = make_data(tmp_path / "other", seed=1)
    message = refused(other, whole, resume=True)
    assert str(other) in message and "--data=" in message
    for folder in (other, Path(state_data(whole))):
        assert json.loads((folder / "meta.json").read_text())["checksum"] in message


def state_data(out):
    return load_checkpoint(out / "last.pt")["train_config"]["data"]


def test_a_damaged_last_checkpoint_is_refused(data, tmp_path, whole):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    assert str(out / "last.pt") in refused(data, out, resume=True)


def test_missing_and_truncated_data_are_refused(data, tmp_path):
    assert str(tmp_path / "none") in refused(tmp_path / "none", tmp_path / "run")
    for split in ("train", "val"):
        copy_of = shutil.copytree(data, tmp_path / f"short {split}")
        (copy_of / f"{split}.bin").write_bytes((data / f"{split}.bin").read_bytes()[:-2])
        assert f"{split}.bin" in refused(copy_of, tmp_path / "run")
        (copy_of / f"{split}.bin").unlink()
        assert f"{split}.bin" in refused(copy_of, tmp_path / "run")
    (copy_of / "meta.json").write_text("{")
    assert "meta.json" in refused(copy_of, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_do_not_fill_one_window_are_refused(tmp_path, split):
    short = make_data(tmp_path / "data", tokens={"train": 100, "val": 100, split: 16})
    message = refused(short, tmp_path / "run")
    assert split in message and "16 tokens" in message and "block_size=16" in message
    start(make_data(tmp_path / "enough", tokens={"train": 100, "val": 100, split: 17}), tmp_path / "run", max_iters=1)


@pytest.mark.parametrize("changes, expected", [
    ({"batch_size": 6, "grad_accum": 4}, "batch_size=6 must be a multiple"),
    ({"device": "gpu"}, "--device=gpu cannot be used"),
    ({"device": "vulkan"}, "--device=vulkan cannot be used"),  # torch's own explanation has 1,500 letters
    ({"device": "hpu"}, "--device=hpu cannot be used"),
    ({"device": "cuda:99"}, "--device=cuda:99 cannot be used"),
    ({"device": ""}, "--device= cannot be used"),
    ({"k_attn": 0}, "k_attn=0 must be from 1 to 15"),
    ({"k_attn": 2, "attn_unit": "head"}, "k_attn=2 must be from 1 to 1"),
    ({"k_mlp": 64}, "k_mlp=64 must be from 1 to 63"),
    ({"n_embd": 15}, "n_embd=15 is not divisible by n_head=2"),
    ({"n_layer": 0}, "n_layer=0 must be at least 1"),
    ({"n_head": 0}, "n_head=0 must be at least 1"),
    ({"block_size": 0}, "block_size=0 must be at least 1"),
    ({"attention_layers": "globl"}, "attention_layers='globl'"),
    ({"attention_layers": "global,local,local"}, "attention_layers="),
    ({"batchsize": 4}, "did you mean 'batch_size'?"),
    ({"n_layer": "two"}, "n_layer=two is not a whole number"),
    ({"eval_windows": 0}, "eval_windows=0 must be at least 1"),
], ids=str)
def test_a_mistake_gets_one_clear_line_and_leaves_no_folder(data, tmp_path, changes, expected):
    assert expected in refused(data, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_without_the_package_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # whether or not it is installed here
    assert "pip install wandb" in refused(data, tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


def test_the_command_itself_shows_one_line_and_no_traceback(data, tmp_path, launcher):
    launcher.start((words(data, tmp_path / "run", k_attn=0), {}), log=tmp_path / "log")
    assert launcher.wait() == [1]
    assert (tmp_path / "log").read_text() == (
        "error: k_attn=0 must be from 1 to 15: a layer has 16 units and at least one must lose\n")
