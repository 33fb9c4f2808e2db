"""train.py: updates, batches, validation; runs stopped, killed, resumed, spread and refused.

Models are tiny. Most runs are calls of train.main() in this process. Where a process has to die or
to talk to another, it is forked from this one (`fork`). Runs compared up to the order of a
summation are in float64 (`double`): in float32 rounding can pick another winner of a near-tie.
"""

import contextlib
import functools
import json
import math
import multiprocessing
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
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import PIECES, ROOT, V, identical, make_data

import config as knobs
import train
from interp import hf
from model import GPTNeo, Losses, load_checkpoint
from prepare import UserError, load_tokenizer, load_tokens

TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, max_iters=12,
            eval_interval=5, eval_windows=8, log_interval=4, device="cpu")
# of 12 updates, 0 to 3 have no ablated loss, then its coefficient is 2 * 1/6, 2 * 2/6, ... 2
RAMP = dict(ramp_start=0.25, ramp_end=0.75, ablated_coeff=2.0)
PATIENCE = 300  # seconds to wait for another process before calling it hung
STOPS = (signal.SIGINT, signal.SIGTERM)
CPU = torch.device("cpu")
draw_losses = train.draw_losses


def words(data, out, **changes):
    """The command line of a tiny run."""
    values = {"data": data, "out": out, **TINY, **changes}
    return [f"--{name}={value}" for name, value in values.items()]


def start(data, out, **changes):
    """`python train.py ...` in this process -> out; SystemExit as there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words(data, out, **changes)])
        knobs.cli(train.main)
    return out


def refused(data, out, **changes):
    """The one line that a user gets instead of a run; it goes to stderr, and the exit code is 1."""
    with pytest.raises(SystemExit) as ended:
        start(data, out, **changes)
    message = ended.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message


def metrics(out):
    """metrics.jsonl without the one field that a clock decides. Strict JSON: no NaN."""
    lines = [json.loads(line, parse_constant=pytest.fail)
             for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def state(out, name="last.pt"):
    """What a checkpoint says of the computation, and not of where or how fast it ran."""
    checkpoint = load_checkpoint(out / name)
    del checkpoint["seconds"], checkpoint["train_config"], checkpoint["metrics"]
    return checkpoint


def assert_same_run(a, b):
    """Bit for bit."""
    assert metrics(a) == metrics(b)
    assert identical(state(a), state(b)) and identical(state(a, "best.pt"), state(b, "best.pt"))


def assert_close_run(a, b, tolerance=1e-9):
    """Up to the order of summation."""
    for ours, theirs in zip(metrics(a), metrics(b), strict=True):
        assert ours == {name: value if value is None else pytest.approx(value, rel=tolerance)
                        for name, value in theirs.items()}


def at_update(number, call):
    """From now on, an update begins with a call. Undone by the caller, or by the process's end."""
    batch_at = train.batch_at

    def calling(tokens, step, *rest):
        if step == number - 1:
            call()
        return batch_at(tokens, step, *rest)

    train.batch_at = calling


@contextlib.contextmanager
def signals(number, at):
    """A signal to this process during the update that follows step `at`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch_at", train.batch_at)
        if at is not None:
            at_update(at + 1, lambda: os.kill(os.getpid(), number))
        yield


def fork(out, data, before=lambda: None, environment=None, **changes):
    """train.main() in a process of its own that calls before() first. It prints to OUT.log. The
    process, whose exit code is minus the signal if it is killed."""
    def run():
        signal.alarm(PATIENCE)
        sys.stdout = sys.stderr = open(f"{out}.log", "a", buffering=1)  # noqa: SIM115
        os.environ.update(environment or {})
        sys.argv = ["train.py", *words(data, out, **changes)]
        before()
        knobs.cli(train.main)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def several(world, data, out, during=lambda: None, **changes):
    """Run `world` processes, as torchrun does, to their end; each calls during() in update 7."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        fork(out, data, lambda: at_update(7, during),
             {**common, "RANK": rank, "LOCAL_RANK": rank}, **changes)
        for rank in map(str, range(world))]
    for process in processes:
        process.join()
    printed = Path(f"{out}.log").read_text()
    assert [process.exitcode for process in processes] == [0] * world, printed
    return printed


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, which is fastest for models this small, and no picture at every evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda *_: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data(folder, 3000, 400)
    return folder


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
    return knobs.Config(**{**TINY, "vocab_size": V, **changes})


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return GPTNeo(config.model)


def batch_at(tokens, step, config, rank=0, world=1):
    return train.batch_at(tokens, step, config, rank, world, CPU)


def validate(model, tokens, config, rank=0, world=1):
    return train.validate(model, tokens, config, contextlib.nullcontext(), rank, world, CPU)


# ---- updates


@pytest.mark.parametrize("changes", [
    dict(ablation="none", grad_clip=0), dict(ablation="none", weight_decay=0.3, grad_clip=0.5),
    dict(ablation="local", weight_decay=0.3, **RAMP), dict(ablation="global", grad_clip=0.5),
    dict(ablation="global", gate="constant", **RAMP)], ids=str)
def test_a_run_is_the_textbooks_updates(data, tmp_path, double, changes):
    """Written out: batch, both cross-entropies, clipping by the norm of the whole gradient, AdamW,
    which counts a gate's updates from its first gradient on. And the means in metrics.jsonl."""
    chosen = dict(beta1=0.8, beta2=0.95, learning_rate=0.02, warmup_iters=2, seed=5, **changes)
    config, out = configured(**chosen), start(data, tmp_path / "run", **chosen)
    model, rows = model_of(config, seed=5), []
    tokens = torch.from_numpy(np.fromfile(data / "train.bin", "<u2").astype(np.int64))
    first, second, counts, clip = {}, {}, {}, config.grad_clip or math.inf
    for step in range(12):
        starts = np.random.default_rng((5, step)).integers(0, 3000 - 16, 4)
        batch = torch.stack([tokens[at : at + 17] for at in starts])
        idx, targets = batch[:, :-1], batch[:, 1:].flatten()
        clean = loss = F.cross_entropy(model(idx).flatten(0, 1), targets)
        coeff = config.ablated_coeff if config.ablation != "none" else 0.0
        if config.ramp_end:
            coeff *= min(1, max(0, (step - 3) / 6))
        if coeff:
            ablated = F.cross_entropy(model.ablated(idx).logits_ablated.flatten(0, 1), targets)
            loss = loss + coeff * ablated
        model.zero_grad()
        loss.backward()
        given = {name: p for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum((p.grad**2).sum() for p in given.values()))
        rows.append((loss.item(), clean.item(), norm))
        rate = [0.01, 0.02, *(0.01 * (1 + math.cos(math.pi * n / 10)) for n in range(10))][step]
        with torch.no_grad():
            for name, p in given.items():
                gradient = p.grad * min(1, clip / (norm + 1e-6))  # as torch's
                counts[name] = counts.get(name, 0) + 1
                first[name] = 0.8 * first.get(name, 0) + 0.2 * gradient
                second[name] = 0.95 * second.get(name, 0) + 0.05 * gradient**2
                mean = first[name] / (1 - 0.8 ** counts[name])
                deviation = (second[name] / (1 - 0.95 ** counts[name])).sqrt()
                p *= 1 - rate * (config.weight_decay if p.dim() == 2 else 0)
                p -= rate * mean / (deviation + 1e-8)
    trained = load_checkpoint(out / "last.pt")["model"]
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p.detach(), rtol=1e-7, atol=1e-8, msg=name)
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 5, 10, 12]
    assert lines[0]["loss"] is None
    for line, part in zip(lines[1:], (rows[:5], rows[5:10], rows[10:])):
        found = (line["loss"], line["loss_clean"], line["grad_norm"])
        assert found == pytest.approx(np.mean(part, 0), rel=1e-7)


def test_a_compiled_run_is_the_same_and_compiled_once(data, tmp_path, monkeypatch):
    """Up to Inductor's C++, which takes long (test_gate.py has it). Three graphs: an evaluation, an
    update of the clean stream, one of both; none for each coefficient."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, dynamic: compile_module(
        self, backend=counter, fullgraph=True, dynamic=dynamic))
    out = start(data, tmp_path / "run", n_layer=1, compile=True, **RAMP)
    torch._dynamo.reset()
    assert counter.frame_count == 3
    plain = start(data, tmp_path / "plain", n_layer=1, **RAMP)
    for ours, theirs in zip(metrics(out), metrics(plain), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
    assert state(out)["model"].keys() == state(plain)["model"].keys()  # no "_orig_mod."


# ---- batches and validation


def test_a_batch_depends_on_seed_and_step_alone():
    tokens, config = np.arange(5000, dtype=np.uint16), configured()
    batch = batch_at(tokens, 7, config)
    np.random.seed(3), torch.manual_seed(3), batch_at(tokens, 8, config)
    assert torch.equal(batch_at(tokens, 7, config), batch)
    # rows are stretches of the file, which counts up, with one token more for the targets
    assert batch.dtype == torch.int64 and len(batch[:, 0].unique()) == 4
    assert torch.equal(batch, batch[:, :1] + torch.arange(17))
    for world in (2, 4):  # the rows of all processes together are the batch
        parts = [batch_at(tokens, 7, config, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {4 // world}
        assert torch.equal(torch.cat(parts), batch)
    short = torch.cat([batch_at(tokens[:20], step, config) for step in range(100)])
    assert set(short[:, 0].tolist()) == {0, 1, 2, 3} and short.max() == 19  # from end to end
    # seed 1 is not seed 0 a few steps later
    drawn = {batch_at(tokens, step, configured(seed=seed)).sum().item()
             for seed in (0, 1) for step in range(40)}
    assert len(drawn) > 75


def test_validation_is_the_plain_mean_over_the_windows(data):
    """400 tokens hold 24 windows of 16 with their targets. The same number for any batch size, any
    number of processes, and when more windows are asked for than there are."""
    model, tokens = model_of(configured()), load_tokens(data, "val")
    rows = torch.from_numpy(np.stack([tokens[at : at + 17] for at in range(0, 384, 16)])).long()
    streams, expected = model.ablated(rows[:, :-1]), []
    for logits in (streams.logits_clean, streams.logits_ablated):
        expected.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item())
    for batch_size, world in ((1, 1), (7, 1), (100, 1), (4, 2), (6, 3)):
        config, sums = configured(eval_windows=10_000, batch_size=batch_size), np.zeros(2)
        for rank in range(world):  # each one's part of the sum
            sums += validate(model, tokens, config, rank, world)
        assert sums == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [1, 5, 23])
def test_fewer_windows_are_spread_evenly_over_the_split(count):
    seen = []

    def spy(idx, targets):
        assert torch.equal(targets, idx + 1)  # the file counts up
        seen.extend(idx[:, 0].tolist())
        return Losses(torch.zeros(()), torch.zeros(()), None)

    validate(spy, np.arange(400, dtype=np.uint16), configured(eval_windows=count))
    gaps = np.diff([*seen, 384])
    assert len(seen) == count and seen[0] == 0 and not np.any(np.array(seen) % 16)
    assert gaps.min() >= 16 and gaps.max() - gaps.min() <= 16


# ---- what a run leaves behind


def test_metrics_and_checkpoints_say_what_was_computed(data, tmp_path, capsys):
    changes = dict(clean_coeff=0.5, eval_interval=4, log_interval=2, **RAMP)
    out, config = start(data, tmp_path / "run", **changes), configured(**changes)
    for line in metrics(out):
        assert line["tokens"] == line["step"] * 4 * 16
        assert line["lr"] == config.schedule(line["step"])[0]
        assert line["val_loss"] == pytest.approx(0.5 * line["val_clean"] + 2 * line["val_ablated"])
    # an ablated training loss is there where every update since the last line had one
    assert [each["loss_ablated"] is None for each in metrics(out)] == [True, True, False, False]
    spoken = [text for text in capsys.readouterr().out.splitlines() if "grad norm" in text]
    assert ["ablated" in text for text in spoken] == [False] * 2 + [True] * 4
    meta = json.loads((data / "meta.json").read_text())
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(out / name, weights_only=True)
        assert checkpoint["train_config"] == {**vars(config), "data": str(data), "out": str(out)}
        assert checkpoint["tokenizer"] == meta["tokenizer"]
        assert checkpoint["data"] == meta["checksum"]
    model = GPTNeo.from_checkpoint(out / "last.pt")
    losses = validate(model, load_tokens(data, "val"), config)
    assert [line["val_clean"], line["val_ablated"]] == losses


def test_best_is_the_lowest_validation_loss_also_after_resuming(data, tmp_path, monkeypatch):
    """The sum counts: 4 + 4 is better than 3 + 6, whose clean loss alone is the lowest of all."""
    losses = iter([(5, 5), (4, 4), (3, 6), (4, 5), (4, 4)])
    monkeypatch.setattr(train, "validate", lambda *_: list(next(losses)))
    with signals(signal.SIGTERM, at=4):
        out = start(data, tmp_path / "run", max_iters=8, eval_interval=2)
    start(data, out, max_iters=8, eval_interval=2, resume=True)
    assert load_checkpoint(out / "best.pt")["step"] == 2
    assert load_checkpoint(out / "last.pt")["step"] == 8


def test_the_picture_is_whole_whatever_the_runs_name(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_losses", draw_losses)
    out = start(data, tmp_path / "_a $x_$ 1%", max_iters=1)
    content = (out / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert sorted(path.name for path in out.iterdir()) == [
        "best.pt", "last.pt", "loss.png", "metrics.jsonl"]


def test_weights_and_biases_continue_one_run(data, tmp_path, monkeypatch):
    begun, logged = [], []

    def init(**about):
        begun.append((about["id"], about["config"]["seed"]))
        return types.SimpleNamespace(id=about["id"] or "abc")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=init, finish=lambda: None,
        log=lambda line, step: logged.append((step, line["val_clean"]))))
    with signals(signal.SIGTERM, at=6):
        out = start(data, tmp_path / "run", wandb=True)
    start(data, out, wandb=True, resume=True)
    assert begun == [(None, 1337), ("abc", 1337)]
    assert logged == [(line["step"], line["val_clean"]) for line in metrics(out)]


# ---- stopped and resumed


@pytest.mark.parametrize("changes", [
    dict(ablation="global", gate="constant", **RAMP),
    dict(grad_accum=2, weight_decay=0.1, warmup_iters=9, **RAMP)], ids=str)
def test_a_run_stopped_after_every_update_is_the_undisturbed_one(data, tmp_path, capsys, changes):
    """So also just before an evaluation, in the last update, and right before, at and after the
    first update in which AdamW meets the gates. Resumed when finished, nothing changes."""
    out = tmp_path / "run"
    for step in range(12):
        with signals(STOPS[step % 2], at=step):
            start(data, out, **changes, resume=step > 0)  # comes back, which is exit code 0
        assert load_checkpoint(out / "last.pt")["step"] == step + 1
    said = capsys.readouterr().out
    assert "stopped after 11 updates; the same command with --resume=True goes on" in said
    start(data, out, **changes, resume=True)
    assert_same_run(out, start(data, tmp_path / "whole", **changes))


class Killed(BaseException):
    """Stands for the end of the process: nobody may catch it."""


def has_checkpoint(out):
    return any(out.glob("*.pt"))


def test_a_crash_between_any_two_files_loses_nothing(data, tmp_path, monkeypatch):
    """All that a run changes on disk it changes by renaming a finished file. So a crash leaves one
    of the states before each rename: metrics and no checkpoint yet, best.pt and no last.pt, a new
    best.pt and an old last.pt."""
    replace, renamed, short = os.replace, [], dict(max_iters=5, eval_interval=3)
    undisturbed = start(data, tmp_path / "whole", **short)

    def crash_at(count, source, target):
        if len(renamed) == count:
            raise Killed
        renamed.append(Path(target).name)
        replace(source, target)

    for count in range(9):
        out = tmp_path / str(count)
        renamed.clear()
        monkeypatch.setattr(os, "replace", functools.partial(crash_at, count))
        with pytest.raises(Killed):
            start(data, out, **short)
        monkeypatch.setattr(os, "replace", replace)
        start(data, out, **short, resume=has_checkpoint(out))
        assert_same_run(out, undisturbed)
    assert renamed == ["metrics.jsonl", "best.pt", "last.pt"] * 2 + ["metrics.jsonl", "best.pt"]


def test_a_run_killed_again_and_again_equals_the_undisturbed_one(data, tmp_path):
    """Real processes and real kill -9 at random moments of the updates, evaluations and saves."""
    rng, out, log = random.Random(0), tmp_path / "run", tmp_path / "run.log"
    chosen = dict(eval_interval=1, max_iters=16, n_layer=1)

    def seen():
        return len(re.findall("parameters, |: validation", log.read_text())) if log.exists() else 0

    def before():  # on a fast machine, too, a kill comes before the end
        at_update(16, lambda: time.sleep(PATIENCE))

    for lines in (1, 2, 2, 1, 3):
        lines += seen()
        process = fork(out, data, before, **chosen, resume=has_checkpoint(out))
        while seen() < lines and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        (out / "last.pt.1.tmp").write_bytes(b"left over from a killed run")
    start(data, out, **chosen, resume=has_checkpoint(out))
    assert not [*out.glob("*.tmp")]
    assert_same_run(out, start(data, tmp_path / "whole", **chosen))


# ---- several processes


@pytest.mark.parametrize("world, changes", [
    (2, dict(ablation="global", grad_accum=2, gate="constant", **RAMP)), (3, RAMP)], ids=str)
def test_several_processes_train_like_one(data, tmp_path, double, world, changes):
    """Seven windows to evaluate: one of three processes has fewer rows than the others."""
    chosen = dict(batch_size=12, eval_windows=7, **changes)
    said = several(world, data, tmp_path / "run", **chosen)
    assert said.count("step 12: validation") == 1  # rank 0 speaks and writes
    one = start(data, tmp_path / "one", **{**chosen, "grad_accum": 1})
    assert_close_run(tmp_path / "run", one)
    assert state(tmp_path / "run")["model"].keys() == state(one)["model"].keys()  # no "module."


def test_all_processes_stop_when_one_is_asked_to_and_the_run_goes_on_in_another_number(
        data, tmp_path, double):
    """Asked twice, as when a scheduler signals all processes and torchrun passes it on."""
    def during():
        for _ in range(2 if os.environ["RANK"] == "1" else 0):
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = dict(RAMP, log_interval=1000, batch_size=12)
    several(3, data, tmp_path / "run", during, **chosen)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 7
    (tmp_path / "run" / "metrics.jsonl").unlink()  # last.pt knows the metrics
    same = shutil.copytree(tmp_path / "run", tmp_path / "same")
    several(2, data, tmp_path / "run", **chosen, grad_accum=3, resume=True)
    assert_close_run(tmp_path / "run", start(data, tmp_path / "one", **chosen))
    several(3, data, same, **chosen, resume=True)
    several(3, data, tmp_path / "whole", **chosen)
    assert_same_run(same, tmp_path / "whole")  # in the same number: bit for bit


def test_torchrun_itself(data, tmp_path):
    chosen = dict(ablation="none")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train.py", *words(data, tmp_path / "run", **chosen)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, env=environment, timeout=PATIENCE, check=True)
    assert_close_run(tmp_path / "run", start(data, tmp_path / "one", **chosen), 1e-4)


@pytest.mark.parametrize("world, changes, mode", [
    (1, {}, "reduce-overhead"), (1, {"grad_accum": 2}, "default"), (2, {}, "default"),
    (1, {"compile": "False"}, None), (1, {"compile": "True"}, "default")], ids=str)
def test_auto_compiles_with_cuda_graphs_where_these_are_right(monkeypatch, world, changes, mode):
    device, precision = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precision.append)
    assert train.pick_precision(configured(**changes), device, world) == (True, mode)
    assert precision == ["high"]
    if mode == "default" and "compile" not in changes:
        with pytest.raises(UserError, match="take --compile=True"):
            changes = {**changes, "compile": "reduce-overhead"}
            train.pick_precision(configured(**changes), device, world)


# ---- a run that begins with the weights of another


def first_weights(data, out, **changes):
    """The weights that a run begins with: its one step has length 0."""
    return state(start(data, out, max_iters=1, learning_rate=0, **changes))["model"]


@pytest.mark.parametrize("changes", [
    {"ablation": "none"}, {"k_attn": 8, "k_mlp": 8, "gate": "constant"}, {"ablation": "global"},
    {"attn_unit": "head", "k_attn": 1}, {"block_size": 8}], ids=str)
def test_a_run_begins_with_another_one_and_gates_that_fit(data, tmp_path, whole, changes):
    theirs = state(whole, "best.pt")["model"]
    fresh = model_of(configured(**changes), seed=7).state_dict()
    ours = first_weights(data, tmp_path / "run", init_from=whole, seed=7, **changes)
    for name, weight in ours.items():
        if name == "transformer.wpe.weight":
            assert torch.equal(weight, theirs[name][: len(weight)])
        elif name in theirs and theirs[name].shape == weight.shape:
            assert torch.equal(weight, theirs[name]), name
        else:  # gates that do not fit are those of the seed
            assert "_gate." in name and torch.equal(weight, fresh[name]), name


def test_a_run_begins_with_a_model_of_hugging_face(data, tmp_path):
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(
        vocab_size=V, max_position_embeddings=32, hidden_size=16, num_layers=2, num_heads=2,
        window_size=3, attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0))
    theirs.save_pretrained(tmp_path / "theirs")
    same, other = (load_tokenizer({"name": "words", "pieces": p}) for p in (PIECES, PIECES[::-1]))
    changes = dict(init_from=tmp_path / "theirs")
    assert "no tokenizer, or another" in refused(data, tmp_path / "run", **changes)
    hf.write_tokenizer(tmp_path / "theirs", same, block_size=32)
    advice = "another geometry: add --attention_layers=global,local --window_size=3"
    assert advice in refused(data, tmp_path / "run", **changes)
    changes |= dict(attention_layers="global,local", window_size=3)
    ours, theirs = first_weights(data, tmp_path / "run", **changes), theirs.state_dict()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight[: len(ours[name])]), name
    hf.write_tokenizer(tmp_path / "theirs", other, block_size=32)
    assert "no tokenizer, or another" in refused(data, tmp_path / "other", **changes)


# ---- refused, in one line


def test_a_run_goes_on_with_its_own_knobs_only(data, tmp_path, whole):
    """A new knob may not change on the way, unless it is named here."""
    free = knobs.FIELDS.keys() - knobs.decisive(knobs.FIELDS).keys()
    assert free == {"resume", "data", "out", "device", "dtype", "compile", "grad_accum",
                    "log_interval", "wandb"}
    with signals(signal.SIGTERM, at=6):
        out = start(data, tmp_path / "run")
    message = refused(data, out, resume=True, learning_rate=0.5, k_mlp=3)
    assert "--n_layer" not in message
    advice = dict(word[2:].split("=") for word in message.split() if word.startswith("--"))
    start(data, out, resume=True, **{"learning_rate": 0.5, "k_mlp": 3, **advice})
    assert_same_run(out, whole)


@pytest.mark.parametrize("update, stop_at", [(1, None), (6, 6), (12, 11)])
def test_a_loss_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch, update, stop_at):
    """It is found before the next line of output, also where a request to stop comes first."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken(*arguments):
        calls.append(clip(*arguments))
        return torch.tensor(math.inf) if len(calls) == update else calls[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    with signals(signal.SIGTERM, at=stop_at):
        message = refused(data, tmp_path / "run")
    known = {1: 4, 6: 7, 12: 12}[update]
    assert f"finite by update {known}:" in message and "--learning_rate" in message
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == (update - 1) // 5 * 5


@pytest.mark.parametrize("interval", [1, 5])
def test_weights_that_broke_in_a_finite_update_are_not_saved(data, tmp_path, interval):
    refused(data, tmp_path / "run", learning_rate=1e30, eval_interval=interval)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 0
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")], ids=str)
def test_too_little_memory_is_one_line(data, tmp_path, monkeypatch, error):
    monkeypatch.setattr(train, "update", unittest.mock.Mock(side_effect=error))
    assert "out of memory: raise --grad_accum" in refused(data, tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_must_fill_a_window(tmp_path, split):
    make_data(tmp_path / "short", **{"train": 17, "val": 17, split: 16})
    assert "has too few tokens for block_size=16" in refused(tmp_path / "short", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    make_data(tmp_path / "enough", train=17, val=17)
    start(tmp_path / "enough", tmp_path / "run")
