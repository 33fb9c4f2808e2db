"""bench/: the tools run, their arithmetic is the blueprint's, and what they compare computes the same.

    python -m pytest tests/test_bench.py
"""

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import against
import alternatives
import check
import config as knobs
import prepare
import same
import speed
import temperature
import train
from model import gate
from test_train import make_data

TINY = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]


@pytest.fixture
def bench(monkeypatch, capsys):
    """A function that runs a tool in this process and returns what it prints on stdout."""
    def run(tool, *words):
        monkeypatch.setattr(sys, "argv", [tool.__file__, *words])
        knobs.cli(tool.main)
        return capsys.readouterr().out
    return run


@pytest.fixture
def no_memory(monkeypatch):
    """Without the process that each row's memory is measured in."""
    monkeypatch.setattr(speed, "memory_in_new_process", lambda row: 10**6)


@pytest.fixture
def no_ceilings(monkeypatch):
    """Without large matrix products and copies."""
    monkeypatch.setattr(speed, "ceilings", lambda device, dtype: (1e9, 1e9))


def commit_of(folder):
    """Make a folder a git repository, with all that lies in it as its one commit."""
    for words in ("init", "add .", "-c user.name=t -c user.email=t commit -m t"):
        subprocess.run(["git", *words.split()], cwd=folder, check=True, capture_output=True)


def test_the_arithmetic_is_that_of_the_blueprint():
    """Both streams of the paper's step are 0.634 TFLOP, and two streams with gates 2.08 times the baseline at 1,024 tokens."""
    step = {variant: speed.Row(variant, ["--device=cpu"], 50257).flops() for variant in ("baseline", "local", "global")}
    assert step["local"] == step["global"] == pytest.approx(0.634e12, rel=1e-3)
    assert step["local"] / step["baseline"] == pytest.approx(2.08, abs=0.005)


def test_a_step_is_timed(bench, no_memory):
    out = json.loads(bench(speed, *TINY, "--vocab_size=300", "--batch_size=2", "--variants=baseline,local",
                           "--rounds=2", "--parts", "--json"))
    rows = {row["variant"]: row for row in out["rows"]}
    assert rows.keys() == {"baseline", "local"}
    for row in rows.values():
        assert row["batch"] == "2 x 16" and 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["memory_mb"] > 0
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["ms"])
        assert row["hours_400k"] == pytest.approx(row["ms"] / 9)
        assert row["ratio"] == pytest.approx(row["ms"] / rows["baseline"]["ms"])
    rates = out["ceilings"]["float32"]
    assert rates["gflops"] > 0 and rates["copy_gb_per_s"] > 0
    assert out["environment"]["torch"] == torch.__version__ and len(out["environment"]["commit"]) >= 7
    assert out["parts_ms"].keys() == {"baseline", "local"}
    assert out["parts_ms"]["baseline"].keys() < out["parts_ms"]["local"].keys()


def test_a_step_has_a_peak_memory():
    row = speed.Row("local", TINY, 300)
    assert 10**5 < speed.memory_in_new_process(row) < 10**9


def test_every_combination_is_timed_and_the_references_once(bench, no_memory, no_ceilings):
    out = bench(speed, *TINY, "--vocab_size=300,400", "--batch_size=1,2", "--compile=False,auto",
                "--variants=plain,local", "--rounds=1", "--json")
    rows = [(row["variant"], row["vocab_size"], row["batch"]) for row in json.loads(out)["rows"]]
    for V in (300, 400):
        for B in (1, 2):
            assert rows.count(("local", V, f"{B} x 16")) == 2 and rows.count(("plain", V, f"{B} x 16")) == 1
    assert len(rows) == 12


def test_the_table_shows_every_column_and_the_largest_vocabulary(bench, no_memory, no_ceilings):
    """65,536 is what uint16 tokens can hold."""
    out = bench(speed, *TINY, "--vocab_size=65536", "--batch_size=1", "--variants=local", "--rounds=1")
    machine, ceiling, headings, row = out.splitlines()
    assert "median of 1 rounds" in machine and ceiling.startswith("float32: a large product")
    headings = re.split("  +", headings.strip())
    assert headings == ["variant", "dtype", "compile", "vocabulary", "batch", "ms/step", "min", "max", "tokens/s",
                        "GFLOP/s", "of floor", "peak MB", "h / 400,000"]  # without a baseline nothing to divide by
    assert len(re.split("  +", row.strip())) == len(headings) and "65,536" in row


def test_a_step_is_compared_with_that_of_another_commit(bench, tmp_path, monkeypatch):
    """The commit is this tree itself, and takes about as long."""
    for name in ("bench", "config", "interp"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    commit_of(tmp_path)
    monkeypatch.setattr(same, "ROOT", tmp_path)
    words = [*TINY, "--vocab_size=300", "--batch_size=2", "--against=HEAD", "--rounds=3", "--steps=2"]
    out = json.loads(bench(speed, *words, "--json"))
    assert [row["variant"] for row in out["rows"]] == ["baseline", "local", "global"]
    assert (out["against"], out["rounds"], out["steps"]) == ("HEAD", 3, 2) and "commit" in out["environment"]
    for row in out["rows"]:
        assert row["ratio"] == pytest.approx(row["ms"] / row["ms_there"])
        assert 0.05 < row["ratio_min"] <= row["ratio_by_round"] <= row["ratio_max"] < 20


@pytest.mark.parametrize("its_speed, message", [
    ("def Row(*words): raise ValueError('there is no knob')", "HEAD cannot take these steps: there is no knob"),
    ("raise SystemExit(3)", "the process that takes the steps of HEAD has ended")])
def test_a_commit_that_cannot_take_the_steps_is_one_line(its_speed, message, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "speed.py").write_text(its_speed)
    with against.Tree("HEAD", tmp_path, [speed.Row("local", TINY, 300)]) as tree:
        with pytest.raises(prepare.UserError, match=f"^{message}[^\n]*$"):
            tree.time(0, 1)


@pytest.mark.parametrize("reference, variant", [("plain", "baseline"), ("whole", "local")])
def test_the_references_are_the_same_step(reference, variant):
    """What baseline and local are compared with computes what they compute."""
    results = []
    for name in (reference, variant):
        row = speed.Row(name, TINY, 300).build()
        for _ in range(2):
            row.step()
        results.append(torch.cat([p.detach().flatten() for p in row.model.parameters()]))
    assert (results[0] - results[1]).abs().max() < 1e-4  # two updates of 1.4e-3 each; near-ties may fall the other way
    assert (results[0] - results[1]).abs().mean() < 1e-6


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of FlexAttention's import
def test_alternatives_compute_the_same(bench):
    out = bench(alternatives, "--device=cpu", "--batch_size=2", "--tokens=48", "--vocab_size=300", "--rounds=1")
    lines = [line for line in out.splitlines() if "error" in line and not line.startswith("  (")]  # another function
    assert len(lines) >= 9
    assert all(float(re.search(r"error (\S+)", line)[1]) < 1e-4 for line in lines), out


def test_the_device_check_passes_here(bench):
    assert bench(check, "--device=cpu", "--compile=False").count("ok  ") == 12


ROUNDING = """
def head_losses(streams, weight, *others, exact=head_losses):
    return exact(streams, weight / 3 * 3, *others)
"""
A_MILLIONTH = """
def gate(scores, *others, exact=gate):
    mask = exact(scores, *others)
    return mask.detach() + 1.000001 * (mask - mask.detach())
"""


@pytest.mark.parametrize("change, code", [(ROUNDING, None), (A_MILLIONTH, "more than rounding")])
def test_a_changed_step_is_told_from_rounding(change, code, tmp_path, monkeypatch, bench, capsys):
    """The commit's model.py is this one, but for the rounding of the head, or for a gate's gradient off by a millionth."""
    (tmp_path / "model.py").write_text((ROOT / "model.py").read_text() + change)
    commit_of(tmp_path)
    prepare.main(["toy", "--stories", "60", "--out", str(tmp_path / "data")])
    capsys.readouterr()
    words = [*TINY, "--batch_size=2", f"--data={tmp_path / 'data'}", "--updates=2", "--precision=float64"]
    monkeypatch.setattr(same, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=code) if code else contextlib.nullcontext():
        assert bench(same, "HEAD", *words).count("\n") == 2
    if code:
        assert capsys.readouterr().out.count("\n") == 2
    with pytest.raises(SystemExit, match="^error: git knows no model.py at 'nocommit'[^\n]*$"):
        bench(same, "nocommit", *words)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="^error: git cannot be asked for model.py at 'HEAD'[^\n]*$"):
        bench(same, "HEAD", *words)


# ---- temperature.py


def gradient_of(function, scores, weights, *others):
    """Of sum(weights * function(scores)), and the function's value."""
    scores = scores.clone().requires_grad_()
    value = function(scores, *others)
    return torch.autograd.grad((weights * value).sum(), scores)[0], value.detach()


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(5, 3, 7, dtype=torch.float64)


@pytest.mark.parametrize("form, name", [("eq3", "softmax"), ("1", "constant")])
def test_two_forms_of_the_gate_are_the_models(form, name, scores):
    weights = torch.randn_like(scores)
    wanted, mask = gradient_of(gate, scores, weights, 2, name)
    ours, same_mask = gradient_of(temperature.make_gate(form), scores, weights, 2, "sigmoid")
    assert torch.equal(mask, same_mask)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["gap", "mean", "0.25", "4"])
def test_the_other_forms_divide_by_a_number(form, scores):
    """By each row's gap, by the mean of all rows' gaps, or by the form itself."""
    weights, k = torch.randn_like(scores), 3
    ordered = scores.sort(-1, descending=True).values
    gaps = ordered[..., k - 1 : k] - ordered[..., k:k + 1]
    T = {"gap": gaps, "mean": gaps.mean()}.get(form) if form in temperature.NAMED else float(form)
    wanted, _ = gradient_of(lambda x: (x / T).softmax(-1), scores, weights)
    ours, mask = gradient_of(temperature.make_gate(form), scores, weights, k, "softmax")
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-14)
    assert torch.equal(mask, (scores >= ordered[..., k - 1 : k]).double())


def test_a_running_gap_is_a_mean_of_gates_of_one_size():
    running = temperature.RunningGap()
    assert running(torch.tensor([[5.0, 3.0, 0.0], [1.0, 0.0, 9.0]]), 1).item() == 5.0  # gaps 2 and 8
    assert running(torch.tensor([[1.0, 0.0]]), 1).item() == 1.0  # of another size
    assert running(torch.tensor([[0.0, 7.0, 106.0]]), 1).item() == pytest.approx(0.99 * 5 + 0.01 * 99)
    assert running(torch.zeros(1, 3), 2).item() == pytest.approx(0.99 * (0.99 * 5 + 0.01 * 99) + 0.01 * 1e-6)


def test_a_run_is_that_of_train_py():
    """Form "1" beside a model with gate="constant": losses, gradient norms and weights; also with a ramp and in parts."""
    words = [*TINY, "--batch_size=4", "--grad_accum=2", "--max_iters=4", "--ramp_start=0.25", "--ramp_end=0.75"]
    config = knobs.load([*words, "--gate=sigmoid"])
    run = temperature.Run("1", config, "float64")
    model = same.build(temperature.model_file, knobs.load([*words, "--gate=constant"]), torch.float64)
    optimizer = train.make_optimizer(model, config, torch.device("cpu"))
    for step in range(4):
        torch.manual_seed(step)
        rows, now = torch.randint(config.vocab_size, (4, config.block_size + 1)), config.at(step)
        coeff = now.ablated_coeff
        loss = model(rows[:, :-1], rows[:, 1:], coeff).loss
        gates = [p for name, p in model.named_parameters() if "_gate." in name]
        grads = torch.autograd.grad(loss, gates, allow_unused=True) if coeff else []
        gate_norm = torch.cat([grad.flatten() for grad in grads]).norm().item() if coeff else 0.0
        assert (gate_norm > 0) == (step > 1)
        train.set_learning_rate(optimizer, now.learning_rate)
        norm = train.update(model, optimizer, rows, config, train.Machine().autocast, now)[3].item()
        ours = run.update(rows, step)
        assert ours == pytest.approx((loss.item(), norm, gate_norm), rel=1e-12 if coeff else 1e-6)
    for ours, theirs in zip(run.model.parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.get_default_dtype() == torch.float32 and temperature.model_file.gate is gate


def test_a_run_with_a_frozen_base_trains_gates_alone():
    config = knobs.load([*TINY, "--freeze=base"])
    run = temperature.Run("1", config, "float32")
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.update(torch.arange(2 * (config.block_size + 1)).view(2, -1) % config.vocab_size, 1)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) == ("_gate." not in name), name


class Scripted:
    """In place of temperature.Run: losses as written, and winners that update 2 of 4 changes in one of two sets."""
    losses = None

    def __init__(self, *_):
        self.losses = next(Scripted.losses)
        self.model, self.step = None, 0

    def update(self, rows, step):
        assert step == self.step
        self.step += 1
        return self.losses[step], 10.0 * step, 1.0 + step

    def winners(self, idx):
        mask = torch.zeros(1, 1, 2, 4)  # two layers
        mask[..., 0, 1 if self.step < 2 else 3] = 1
        mask[..., 1, 2] = 1
        return {"attn": mask, "mlp": torch.ones(1, 1, 2, 4)}


def test_what_is_measured_of_a_run(monkeypatch, tmp_path):
    """Scripted: the twin parts at updates 2 and 4, is not asked a fifth time, and four gradients have these norms."""
    make_data(tmp_path / "data")
    config = knobs.load([*TINY, f"--data={tmp_path / 'data'}", "--batch_size=2"])
    tokens = [train.load_split(config, split, torch.device("cpu")) for split in ("train", "val")]
    Scripted.losses = iter([[2.0] * 5, [2.0, 2 + 4e-7, 2.0, 2 - 4e-3]])
    monkeypatch.setattr(temperature, "Run", Scripted)
    monkeypatch.setattr(temperature, "validation_losses", lambda *_: (3.0, 4.0))
    monkeypatch.setattr(temperature, "SHARES", {"40": 0.4, "100": 1.0})
    args = temperature.argparse.Namespace(updates=5, precision="float32")
    assert temperature.measure("4", config, *tokens, args) == {
        "form": "4", "gate_norm_median": 3, "gate_norm_max": 5, "norm_median": 20, "norm_max": 40,
        "parts_1e-9": 2, "parts_1e-6": 4, "parts_1e-3": 4, "largest_difference": pytest.approx(2e-3),
        "attn_changed_40": 0.5, "mlp_changed_40": 0, "attn_changed_100": 0, "mlp_changed_100": 0,
        "val_clean": 3, "val_ablated": 4}


def test_temperatures_are_compared(bench, tmp_path):
    make_data(tmp_path / "data")
    words = [*TINY, f"--data={tmp_path / 'data'}", "--batch_size=4", "--updates=4", "--eval_windows=4", "--forms=eq3,mean,4",
             "--precision=float64"]
    out = json.loads(bench(temperature, *words, "--json"))
    assert [row["form"] for row in out["rows"]] == ["eq3", "mean", "4"]
    assert (out["updates"], out["precision"]) == (4, "float64") and "commit" in out["environment"]
    for row in out["rows"]:
        assert 0 < row["gate_norm_median"] <= row["gate_norm_max"] <= row["norm_max"]
        assert 0 < row["largest_difference"] < 1e-6 and row["parts_1e-3"] is None
        assert 0 <= row["mlp_changed_100"] <= 1 and 5 < row["val_clean"] < 5.71  # a little below ln 300
    assert out["rows"][0]["gate_norm_median"] > 10 * out["rows"][2]["gate_norm_median"]
    table = bench(temperature, *words)
    assert len(table.splitlines()) == 9 and table.count("never") == 9 and "attn, 10 %" in table


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gpu_script_runs_every_part_and_goes_on_after_a_failure(tmp_path, device):
    """With a stand-in for python that fails in one part: what the parts do is tested above and in test_train.py."""
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\ncase $* in *check.py*) exit 3;; esac\n")
    (tmp_path / "python").chmod(0o700 | stat.S_IRUSR)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(out), "DATA": str(tmp_path)}

    def gpu(*words):
        command = ["bash", "bench/gpu.sh", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)

    ended = gpu("--device", device)
    assert ended.returncode == 1 and "!!! check: exit code 3" in ended.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    if device == "cuda":  # is there one?
        assert "is_available" in calls.pop(0)
    assert [re.search(r"(\w+\.py)", call)[1] for call in calls] == [
        "prepare.py", "check.py", "speed.py", "speed.py", "train.py", "eval.py", "train.py", "train.py",
        "alternatives.py", "alternatives.py"]
    assert all(f"--device={device}" in call for call in calls[1:])
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "none").mkdir()
    environment["OUT"] = str(tmp_path / "none")
    assert "finds no torch or no GPU here" in gpu().stderr and not list((tmp_path / "none").iterdir())
    environment["OUT"] = str(out)
    (out / "local_k2").mkdir()
    again = gpu()
    assert again.returncode == 1 and "OUT=" in again.stderr  # results are never overwritten
    for words in (["cpu"], ["--device"], ["--device", "gpu"]):
        ended = gpu(*words)
        assert ended.returncode == 1 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
