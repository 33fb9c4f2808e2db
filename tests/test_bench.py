"""bench/: the tools run, their arithmetic is the blueprint's, and what they compare computes the same.

    python -m pytest tests/test_bench.py
"""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import alternatives
import check
import config as knobs
import prepare
import same
import speed

TINY = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]


def bench(script, *words):
    ended = subprocess.run([sys.executable, f"bench/{script}", *words], cwd=ROOT, text=True, capture_output=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_arithmetic_is_that_of_the_blueprint():
    """Both streams of the paper's step are 0.634 TFLOP, and two streams with gates 2.08 times the baseline at 1,024 tokens."""
    step = {variant: speed.Row(variant, ["--device=cpu"], 50257).flops() for variant in ("baseline", "local", "global")}
    assert step["local"] == step["global"] == pytest.approx(0.634e12, rel=1e-3)
    assert step["local"] / step["baseline"] == pytest.approx(2.08, abs=0.005)


def test_a_step_is_timed():
    out = json.loads(bench("speed.py", *TINY, "--vocab_size=300", "--batch_size=2", "--variants=baseline,local", "--rounds=2",
                           "--parts", "--json"))
    rows = {row["variant"]: row for row in out["rows"]}
    assert rows.keys() == {"baseline", "local"}
    for row in rows.values():
        assert row["batch"] == "2 x 16" and 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["memory_mb"] > 0
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["ms"]) and row["hours_400k"] == pytest.approx(row["ms"] / 9)
        assert row["ratio"] == pytest.approx(row["ms"] / rows["baseline"]["ms"])
    assert out["environment"]["torch"] == torch.__version__ and len(out["environment"]["commit"]) >= 7
    assert out["parts_ms"].keys() == {"baseline", "local"}
    assert out["parts_ms"]["baseline"].keys() < out["parts_ms"]["local"].keys()


def test_every_combination_is_timed_and_the_references_once(monkeypatch, capsys):
    """Without the process that each row's memory is measured in."""
    monkeypatch.setattr(speed, "ProcessPoolExecutor", lambda *_, **__: contextlib.nullcontext(
        types.SimpleNamespace(submit=lambda *_: types.SimpleNamespace(result=lambda: 10**6))))
    monkeypatch.setattr(sys, "argv", ["speed.py", *TINY, "--vocab_size=300,400", "--batch_size=1,2", "--compile=False,auto",
                                      "--variants=plain,local", "--rounds=1", "--json"])
    knobs.cli(speed.main)
    rows = [(row["variant"], row["vocab_size"], row["batch"]) for row in json.loads(capsys.readouterr().out)["rows"]]
    assert all(rows.count(("local", V, f"{B} x 16")) == 2 and rows.count(("plain", V, f"{B} x 16")) == 1
               for V in (300, 400) for B in (1, 2)) and len(rows) == 12


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


def test_alternatives_compute_the_same():
    out = bench("alternatives.py", "--device=cpu", "--batch_size=2", "--tokens=48", "--vocab_size=300", "--rounds=1")
    lines = [line for line in out.splitlines() if "error" in line and "(plain causal)" not in line]
    assert len(lines) >= 9
    assert all(float(re.search(r"error (\S+)", line)[1]) < 1e-4 for line in lines), out


def test_the_device_check_passes_here():
    assert bench("check.py", "--device=cpu", "--compile=False").count("ok  ") == 12


@pytest.mark.parametrize("old, new, code", [("torch.mm(grad, weight,", "torch.mm(grad, 1.0 * weight,", None),
                                            ("u.div_(T)", "u.div_(T * 1.000001)", "more than rounding")])
def test_a_changed_step_is_told_from_rounding(old, new, code, tmp_path, monkeypatch, capsys):
    """Against a commit whose model.py is this one but for a product by 1, or for a gate's gradient off by a millionth."""
    before = (ROOT / "model.py").read_text()
    assert old in before
    (tmp_path / "model.py").write_text(before.replace(old, new))
    for words in ("init", "add model.py", "-c user.name=t -c user.email=t commit -m t"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True, capture_output=True)
    prepare.main(["toy", "--stories", "60", "--out", str(tmp_path / "data")])
    capsys.readouterr()
    words = [*TINY, "--batch_size=2", f"--data={tmp_path / 'data'}", "--updates=2", "--precision=float64"]
    monkeypatch.setattr(same, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["same.py", "HEAD", *words])
    if code:
        with pytest.raises(SystemExit, match=code):
            knobs.cli(same.main)
    else:
        knobs.cli(same.main)
    assert capsys.readouterr().out.count("\n") == 2
    monkeypatch.setattr(sys, "argv", ["same.py", "nocommit", *words])
    with pytest.raises(SystemExit, match="^error: git knows no model.py at 'nocommit'"):
        knobs.cli(same.main)


@pytest.mark.parametrize("script, word, expected", [
    (speed, "--variants=locale", "--variants=locale must be"), (speed, "--vocab_size=70000", "--vocab_size=70000"),
    (speed, "--n_head=3", "n_embd=128 is not divisible"), (speed, "--batchsize=3", "did you mean 'batch_size'"),
    (speed, "--batch_size=", "batch_size= is not a whole number"), (speed, "--dtype=half", "dtype=half is not one of"),
    (speed, "--vocab_size=\u00b2", "must be whole numbers"), (speed, "--rounds=0", "--rounds=0"), (speed, "--fsdp=True", "--fsdp=False"),
    (speed, "--grad_accum=5", "multiple of grad_accum=5"), (alternatives, "--rounds=0", "--rounds=0 must be"),
    (alternatives, "--what=all", "--what=all must be some of"), (check, "--compile=yes", "--compile=yes must be")])
def test_a_mistake_is_one_line(script, word, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.__file__, "--device=cpu", word])
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(expected)}[^\n]*$"):
        knobs.cli(script.main)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gpu_script_runs_every_part_and_goes_on_after_a_failure(tmp_path, device):
    """With a stand-in for python that fails in one part: what the parts do is tested above and in test_train.py."""
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/calls\ncase $* in *check.py*) exit 3;; esac\n")
    (tmp_path / "python").chmod(0o700 | stat.S_IRUSR)
    out, environment = tmp_path / "out", {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "DATA": str(tmp_path)}
    ended = subprocess.run(["bash", "bench/gpu.sh", "--device", device], cwd=ROOT, env={**os.environ, **environment},
                           text=True, capture_output=True)
    assert ended.returncode == 1 and "!!! check: exit code 3" in ended.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [re.search(r"(\w+\.py)", call)[1] for call in calls] == [
        "prepare.py", "check.py", "speed.py", "speed.py", "train.py", "eval.py", "train.py", "alternatives.py", "alternatives.py"]
    assert all(f"--device={device}" in call for call in calls[1:])
    (out / "local_k2").mkdir()
    again = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True)
    assert again.returncode == 1 and "OUT=" in again.stderr  # results are never overwritten
    for words in (["cpu"], ["--device"], ["--device", "gpu"]):
        ended = subprocess.run(["bash", "bench/gpu.sh", *words], cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True)
        assert ended.returncode == 1 and ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
