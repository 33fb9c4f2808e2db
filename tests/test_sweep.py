"""bench/sweep.py: every config with every seed; stopped, continued, skipped; who runs where.

The runs of the first test are real; elsewhere a few lines stand in for train.py.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT, make_data
from test_train import TINY, metrics

import config as knobs
import train
from bench import sweep
from model import load_checkpoint

# in a config file: where the environment says so, every update of train.py takes its time
CRAWL = """
import os as _os, sys as _sys, time as _time
_train = _sys.modules["__main__"]
if _os.environ.get("CRAWL") and hasattr(_train, "batch_at"):
    _batch_at = _train.batch_at
    _train.batch_at = lambda *words: (_time.sleep(0.2), _batch_at(*words))[1]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data and two config files."""
    work = tmp_path_factory.mktemp("sweep")
    make_data(work / "data", 3000, 400)
    for name, ablation in (("plain", "none"), ("gated", "local")):
        values = {**TINY, "max_iters": 60, "eval_interval": 30, "ablation": ablation,
                  "data": str(work / "data")}
        lines = [f"{key} = {value!r}\n" for key, value in values.items()]
        (work / f"{name}.py").write_text("".join(lines) + CRAWL)
    return work


def words(work, *more):
    return ["bench/sweep.py", str(work / "gated.py"), str(work / "plain.py"), *more]


def test_a_sweep_stopped_by_sigterm_goes_on_where_it_was(work, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, command = work / "out", words(work, "--seeds=1", f"--out={work}/out")
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.sweep", *command[1:]], cwd=ROOT, text=True,
        env={**os.environ, "CRAWL": "1"}, stdout=subprocess.PIPE)
    log = out / "gated_seed1.log"
    while process.poll() is None and not (log.exists() and "step 4:" in log.read_text()):
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 1
    step = load_checkpoint(out / "gated_seed1" / "last.pt")["step"]
    assert 4 <= step < 60 and f"stopped after {step} updates" in log.read_text()
    assert not (out / "plain_seed1").exists()

    # the same command again continues one run, starts the other
    monkeypatch.setattr(sys, "argv", command)
    sweep.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["2 runs, 2 to go, 1 at a time", f"{out}/gated_seed1: continued"]
    for name in ("gated_seed1", "plain_seed1"):
        assert f"{out}/{name}: done" in lines
        assert any(line.startswith(f"{out}/{name}: step 60: validation clean") for line in lines)
    assert lines[-1] == f"python eval.py {out}/gated_seed1 {out}/plain_seed1 --over_seeds"
    train.train(knobs.load([str(work / "gated.py"), "--seed=1", f"--out={work}/whole"]))
    assert metrics(out / "gated_seed1") == metrics(work / "whole")

    # once more: nothing is left to do; but another run is not a finished one
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("started a run"))
    capsys.readouterr()
    sweep.main()
    assert capsys.readouterr().out.splitlines() == ["2 runs, 0 to go, 1 at a time", lines[-1]]
    run = knobs.load([str(work / "gated.py"), "--seed=1", f"--out={out}/gated_seed1"])
    assert sweep.finished(replace(run, log_interval=1))
    for change in ({"learning_rate": 1e-3}, {"max_iters": 61}, {"out": "nowhere"}):
        assert not sweep.finished(replace(run, **change))


STAND_IN = """
import os, sys
from pathlib import Path
print(os.environ["OMP_NUM_THREADS"], *sys.argv[2:])
out = Path([word for word in sys.argv if word.startswith("--out=")][0][6:])
if out.name == "plain_seed2":
    sys.exit("error: it broke")
if out.name != "gated_seed3":  # it ends as a run does that somebody stopped
    Path(f"{out}.done").touch()
"""


def test_two_gpus_are_shared_and_a_failing_run_stops_no_other(work, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "finished", lambda config: Path(f"{config.out}.done").exists())
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(sweep.torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sys, "argv", words(work, "--seeds=1,2,3", "--device=auto",
                                           f"--out={tmp_path}", "--beta1=0.{seed}"))
    with pytest.raises(SystemExit, match="2 of 6 runs failed"):
        sweep.main()
    lines = capsys.readouterr().out.splitlines()
    assert f"{tmp_path}/plain_seed2: FAILED, exit code 1 | error: it broke" in lines
    assert any(line.startswith(f"{tmp_path}/gated_seed3: FAILED, exit code 0") for line in lines)
    assert sum(line.endswith(": done") for line in lines) == 4
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert set(re.findall("--device=cuda:(.)", logs)) == {"0", "1"}
    assert logs.count("4 --device=auto --beta1=0.") == 6  # half of the threads each
    assert "--beta1=0.3 --seed=3" in logs
