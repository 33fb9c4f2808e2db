"""bench/: check.py can fail, the arithmetic of speed.py is right, gpu.sh runs every part."""

import os
import re
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

import config as knobs
import model as model_file
from bench import check, speed

CPU = torch.device("cpu")
GATE, K_LARGEST = model_file.gate, model_file.k_largest
SMALL = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]


def zero_gradient(scores, k, form):
    """Right values without a gradient: what torch 2.11 once compiled the gate to."""
    return GATE(scores, k, form).detach()


def too_many_winners(scores, k):
    _, s_k, s_next = K_LARGEST(scores, k)
    return (scores >= s_k).to(scores.dtype), s_k, s_next


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["local", "constant"])
@pytest.mark.parametrize("used", [GATE, zero_gradient])
def test_a_wrong_gradient_of_the_gates_fails(monkeypatch, capsys, dtype, form, used):
    """The reference, in float64, keeps the right gate."""
    def gate(scores, *others):
        return (GATE if scores.dtype == torch.float64 else used)(scores, *others)

    monkeypatch.setattr(model_file, "gate", gate)
    assert check.check_step(CPU, dtype, "False", form) == (used is GATE)
    assert capsys.readouterr().out.startswith("ok" if used is GATE else "FAIL")


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("find, good", [(K_LARGEST, True), (model_file.k_largest_by_maxima, True),
                                        (too_many_winners, False)])
def test_ties_need_exactly_k_winners(monkeypatch, k, find, good):
    monkeypatch.setattr(model_file, "k_largest", find)
    assert check.check_ties(CPU, "False", k) == good


@pytest.mark.parametrize("good", [True, False])
def test_two_coefficients_must_be_one_graph(monkeypatch, capsys, good):
    def compile_quickly(self, mode, dynamic):
        torch.nn.Module.compile(self, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(check.GPTNeo, "compile", compile_quickly)
    if not good:  # numbers in place of tensors
        monkeypatch.setattr(check.torch, "full", lambda shape, value, device: value)
    assert check.check_step(CPU, "float32", "True", "constant") == good
    assert ("graphs 1" in capsys.readouterr().out) == good


def test_the_arithmetic_of_the_papers_step():
    """Both streams: 0.634 TFLOP, 2.08 times the baseline's (DESIGN.md, section 5)."""
    flops = {name: speed.Row(name, ["--device=cpu"], 50257).flops() for name in speed.VARIANTS}
    assert flops["local"] == flops["global"] == pytest.approx(0.634e12, rel=1e-3)
    assert flops["local"] / flops["baseline"] == pytest.approx(2.08, abs=0.005)


def test_the_table_of_every_combination(monkeypatch, capsys):
    monkeypatch.setattr(speed, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(speed.Path, "exists", lambda _: False)  # no memory: a process per row
    words = ["--vocab_size=300,65536", "--batch_size=1,2", "--variants=baseline,local"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *SMALL, *words, "--rounds=3"])
    knobs.cli(speed.main)
    machine, _, *lines = capsys.readouterr().out.splitlines()
    assert machine.startswith("cpu") and torch.__version__ in machine
    headings, *rows = [re.split("  +", line.strip()) for line in lines]
    rows = [dict(zip(headings, row, strict=True)) for row in rows]
    assert [(row["batch"], row["V"]) for row in rows[::2]] == [
        ("1 x 16", "300"), ("1 x 16", "65536"), ("2 x 16", "300"), ("2 x 16", "65536")]
    for baseline, local in zip(rows[::2], rows[1::2]):
        ms, tokens = float(local["ms/step"]), 16 * int(local["batch"][0])
        assert float(local["min"]) <= ms <= float(local["max"])
        assert float(local["tokens/s"].replace(",", "")) == pytest.approx(1e3 * tokens / ms, 0.02)
        ratio = ms / float(baseline["ms/step"])
        assert float(local["x baseline"]) == pytest.approx(ratio, rel=0.02, abs=0.01)
        assert float(local["h / 400,000"]) == pytest.approx(ms / 9, abs=0.051)


def test_the_gpu_script_goes_on_after_a_failure(tmp_path):
    """A stand-in for python fails in check.py, and prints what the script waits for."""
    (tmp_path / "python").write_text(
        f"#!/bin/sh\necho $* >> {tmp_path}/calls\necho step 20: finished\n"
        f"case $* in *bench.check*) exit 3;; *resume*) echo finished: 1,000 updates;;\n"
        f"*stopped*) trap 'exit 0' TERM; sleep 2 & wait;; esac\n")
    (tmp_path / "python").chmod(0o700)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"),
                   "OUT": str(tmp_path / "out"), "DATA": str(tmp_path)}

    def gpu():
        return subprocess.run(["bash", "bench/gpu.sh", "--device", "cuda"], cwd=ROOT, text=True,
                              env=environment, capture_output=True)

    assert "error: no prepared data" in gpu().stderr and not (tmp_path / "out").exists()
    (tmp_path / "meta.json").touch()
    ended = gpu()
    failures = [line for line in ended.stdout.splitlines() if line.startswith("!!!")]
    assert ended.returncode == 1 and len(failures) == 1 and "check: exit code 3" in failures[0]
    calls = (tmp_path / "calls").read_text().splitlines()[1:]  # the first: is there a GPU?
    assert [re.search(r"(bench|interp)\.\w+|\w+\.py", call)[0] for call in calls] == [
        "bench.check", "bench.speed", "train.py", "eval.py", "interp.circuits", "interp.circuits",
        "interp.unlearn", *["train.py"] * 4, "bench.speed", "bench.speed"]
    assert all("--device=cuda" in call for call in calls)
    (tmp_path / "out" / "local_k2").mkdir()
    assert "already holds results" in gpu().stderr  # they are never overwritten
