"""bench/sweep.py: every config with every seed, stopped, continued and into one table; who runs where; what goes wrong.

    python -m pytest tests/test_sweep.py

The runs of `swept` are real ones of tiny models; elsewhere a few lines stand in for train.py.
"""

import collections
import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import config as knobs
import eval as evaluation
import sweep
from test_train import ENVIRONMENT, PATIENCE, TINY, identical, make_data, metrics, quick, start, state  # noqa: F401
from model import load_checkpoint

# In train.py, and where the environment says so, the updates of a config that ends in this take their time.
CRAWL = """
import os, sys, time
_train = sys.modules["__main__"]
if os.environ.get("CRAWL") and hasattr(_train, "batch_at"):
    _batch_at = _train.batch_at
    _train.batch_at = lambda *words: (time.sleep(0.2), _batch_at(*words))[1]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data and the config files plain.py and gated.py."""
    work = tmp_path_factory.mktemp("sweep")
    make_data(work / "data")
    for name, ablation in (("plain", "none"), ("gated", "local")):
        lines = {**TINY, "max_iters": 60, "eval_interval": 30, "ablation": ablation, "data": str(work / "data")}
        (work / f"{name}.py").write_text("".join(f"{key} = {value!r}\n" for key, value in lines.items()) + CRAWL)
    return work


def configs(work):
    return [str(work / "plain.py"), str(work / "gated.py")]


def call(capsys, *words):
    """`python bench/sweep.py ...` in this process -> what it says as it leaves (None: all went well), lines printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    message = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench/sweep.py", *map(str, words)])
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            knobs.cli(sweep.main)
        except SystemExit as ended:
            message = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return message, capsys.readouterr().out.splitlines()


def wait_for(condition):
    for _ in range(PATIENCE * 10):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("hung")


# ---- real runs


@pytest.fixture(scope="module")
def stopped(work):
    """Two configs with two seeds on a CPU, two at a time, stopped by SIGTERM while the first two train. -> its words, log"""
    words = [*configs(work), "--seeds=1,2", "--per_gpu=2", f"--out={work / 'out'}"]
    first = subprocess.Popen([sys.executable, "bench/sweep.py", *words], cwd=ROOT, env={**ENVIRONMENT, "CRAWL": "1"},
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    logs = [work / "out" / f"{name}_seed1.log" for name in ("plain", "gated")]
    wait_for(lambda: first.poll() is not None or all(log.exists() and "step 4:" in log.read_text() for log in logs))
    first.terminate()
    return words, first.communicate(timeout=PATIENCE)[0], first.returncode


def test_sigterm_stops_every_run_after_saving_it(work, stopped):
    words, printed, code = stopped
    assert code == 1 and printed.splitlines()[-1] == "stopped: the same command again goes on from here"
    for name in ("plain", "gated"):
        step = load_checkpoint(work / "out" / f"{name}_seed1" / "last.pt")["step"]
        assert 4 <= step < 60
        assert f"{name}_seed1: stopped | stopped after {step} updates" in printed
    assert sorted(path.name for path in (work / "out").iterdir() if path.is_dir()) == ["gated_seed1", "plain_seed1"]


@pytest.fixture(scope="module")
def swept(work, stopped):
    """The same command again. -> what it printed"""
    words, *_ = stopped
    done = subprocess.run([sys.executable, "bench/sweep.py", *words], cwd=ROOT, env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_the_same_command_goes_on(work, swept, tmp_path):
    out = work / "out"
    assert swept[0].startswith("4 runs, 0 of them finished already; 2 at a time")
    assert swept[1:3] == [f"{out}/plain_seed1: continued", f"{out}/gated_seed1: continued"]
    assert {f"{out}/plain_seed2: started", f"{out}/gated_seed2: started"} < set(swept[3:])
    assert sum("_seed" in line and ": done, " in line and "| step 60: validation clean" in line for line in swept) == 4
    # bit for bit what an undisturbed run is, of these knobs and this seed
    for name, seed, ablation in (("gated", 1, "local"), ("plain", 2, "none")):
        whole = start(work / "data", tmp_path / name, max_iters=60, eval_interval=30, ablation=ablation, seed=seed)
        assert metrics(whole) == metrics(out / f"{name}_seed{seed}")
        assert identical(state(whole), state(out / f"{name}_seed{seed}"))


def test_what_is_finished_is_skipped(stopped, swept, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a run"))
    message, lines = call(capsys, *stopped[0])
    assert message is None and lines[0].startswith("4 runs, 4 of them finished already")
    assert lines[-1] == swept[-1]


@pytest.mark.parametrize("changes, same", [({}, True), ({"device": "auto", "log_interval": 1}, True),
                                           ({"learning_rate": 1e-3}, False), ({"max_iters": 61}, False)])
def test_finished_means_this_run_and_not_another(work, swept, changes, same):
    config = knobs.load([str(work / "gated.py"), "--seed=2", f"--out={work / 'out' / 'gated_seed2'}"])
    assert sweep.finished(dataclasses.replace(config, **changes)) == same


def test_finished_means_on_these_data(work, swept, tmp_path):
    config = knobs.load([str(work / "gated.py"), "--seed=2", f"--out={work / 'out' / 'gated_seed2'}"])
    assert not sweep.finished(dataclasses.replace(config, data=str(make_data(tmp_path / "other", seed=1))))


def test_its_last_line_makes_the_table(work, swept, capsys, monkeypatch):
    """Mean and spread against numpy, over the four rows of the same runs."""
    program, script, *words = shlex.split(swept[-1])
    assert [program, script, words[-1]] == ["python", "eval.py", "--over_seeds"]
    tables = []
    for more in (["--json"], []), (words[-1:], ["--json"]), (words[-1:], []):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", *words[:-1], *more[0], *more[1]])
        knobs.cli(evaluation.main)
        tables.append(capsys.readouterr().out)
    rows, merged, text = json.loads(tables[0]), json.loads(tables[1]), tables[2].splitlines()
    assert [(row["ablation"], row["seed"]) for row in rows] == [(a, s) for s in (1, 2) for a in ("none", "local")]
    assert [(row["ablation"], row["n"], row["seeds"]) for row in merged] == [("none", 2, [1, 2]), ("local", 2, [1, 2])]
    for row, name, line in zip(merged, ("plain", "gated"), text[1:]):
        runs = [one for one in rows if one["ablation"] == row["ablation"]]
        for number in ("ppl_clean", "bits_per_byte_clean", "l1", *(("mlp_per_story",) if name == "gated" else ())):
            values = [run[number] for run in runs]
            assert values[0] != values[1]
            assert (row[number], row[f"{number}_sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        ppl = [run["ppl_clean"] for run in runs]
        assert line.startswith(f"{work}/out/{name}_seed*") and f"{np.mean(ppl):.3f} ± {np.std(ppl, ddof=1):.3f}" in line
    assert len(text) == 4 and "over the seeds" in text[3]


def test_a_damaged_checkpoint_fails_alone(work, swept, tmp_path, capsys):
    """Of seed 2, one run is damaged and the other one gone: the first is refused with its reason, the second is trained."""
    out = tmp_path / "out"
    shutil.copytree(work / "out" / "gated_seed2", out / "gated_seed2")
    last = out / "gated_seed2" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    message, lines = call(capsys, *configs(work), "--seeds=2", "--per_gpu=2", f"--out={out}")
    assert message == "1 of 2 runs failed: the same command again tries them once more"
    assert lines[0].startswith("2 runs, 0 of them finished already")
    failure, = [line for line in lines if "FAILED" in line]
    assert failure.startswith(f"{out}/gated_seed2: FAILED, exit code 1,") and f"error: {last} is damaged" in failure
    assert lines[-1] == f"python eval.py {out / 'plain_seed2'} --over_seeds"


# ---- who runs where, and what goes wrong

STAND_IN = """
import os, sys
from pathlib import Path
out = Path(dict(word[2:].split("=") for word in sys.argv[2:])["out"])
print(os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"], *sys.argv[2:])
if out.name == "plain_seed2":
    sys.exit("error: it broke\\n")
if out.name != "gated_seed3":  # which ends as a run does that somebody stopped
    Path(f"{out}.done").touch()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "finished", lambda config: Path(f"{config.out}.done").exists())


@pytest.mark.parametrize("listed, count, names", [
    (None, 0, []), (None, 2, ["0", "1"]), ("", 0, []), ("5,3", 2, ["5", "3"]), ("5, 3,9", 2, ["5", "3"]),
    ("GPU-ab", 1, ["GPU-ab"])])
def test_gpus_are_those_that_are_visible(monkeypatch, listed, count, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert sweep.visible_gpus() == names


def test_every_gpu_is_used_and_none_by_too_many(work, tmp_path, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    words = *configs(work), "--seeds=11,12,13,14,15", "--per_gpu=2", "--device=auto", f"--out={tmp_path / 'out'}"
    message, lines = call(capsys, *words)
    assert message is None
    assert [re.search("on GPU (.)", line)[1] for line in lines[1:5]] == ["5", "3", "5", "3"]
    place, running = {}, collections.Counter()
    for line in lines[1:-2]:
        name = line.split(":")[0]
        if " on GPU " in line:
            place[name] = line[-1]
        running[place[name]] += 1 if " on GPU " in line else -1
        assert max(running.values()) <= 2
        assert (tmp_path / "out" / f"{name}.log").read_text().split()[0] == place[name]  # what the run itself sees
    assert len(place) == 10 and set(running.values()) == {0}


def test_on_a_cpu_runs_share_the_cores_and_get_the_knobs(work, tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sweep.py", configs(work)[0], "--learning_rate=0.5", "--per_gpu=3", f"--out={out}"])
    sweep.main()
    assert (out / "plain_seed1337.log").read_text().split() == [
        "2", "--learning_rate=0.5", "--seed=1337", f"--out={out / 'plain_seed1337'}", "--resume=False"]


def test_a_word_may_name_the_seed(work):
    runs, _ = sweep.plan([configs(work)[0], "--seeds=3,5", "--init_from=out/base_seed{seed}"])
    assert [(config.seed, config.init_from) for _, config in runs] == [(3, "out/base_seed3"), (5, "out/base_seed5")]
    assert all(f"--init_from={config.init_from}" in words for words, config in runs)


def test_a_failing_run_is_reported_and_stops_no_other(work, tmp_path, stand_in, capsys):
    message, lines = call(capsys, *configs(work), "--seeds=1,2,3", f"--out={tmp_path}")
    assert message == "2 of 6 runs failed: the same command again tries them once more"  # as text: exit code 1
    ends = "\n".join(lines)
    assert re.search(rf"^{tmp_path}/plain_seed2: FAILED, exit code 1, \d to go \| error: it broke$", ends, re.MULTILINE)
    assert re.search(rf"^{tmp_path}/gated_seed3: FAILED, exit code 0, ", ends, re.MULTILINE)
    assert sum(": done, " in line for line in lines) == 4
    names = ["plain_seed1", "gated_seed1", "gated_seed2", "plain_seed3"]
    assert lines[-1] == f"python eval.py {' '.join(str(tmp_path / name) for name in names)} --over_seeds"


def test_nothing_is_left_running_when_the_sweep_breaks(work, tmp_path, stand_in, capsys, monkeypatch):
    (tmp_path / "train.py").write_text("import time; time.sleep(600)")
    started, Popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(Popen(*a, **k)) or started[-1])
    monkeypatch.setattr(sweep.time, "sleep", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(capsys, *configs(work), "--per_gpu=2", f"--out={tmp_path}")
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2


def test_mistakes_are_one_line_before_anything_starts(work, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a run"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (tmp_path / "file").write_text("")
    out, good = f"--out={tmp_path / 'out'}", configs(work)
    for words, expected in [
        ([], "at least one config file"), ([*good, str(work / "nowhere.py")], "there is no config file"),
        ([*good, "--max_itres=5"], "did you mean 'max_iters'"), ([*good, "--seeds=1,two"], "seed=two is not a whole number"),
        ([*good, "--seeds="], "seed= is not"), ([*good, "--seeds=1,2,1"], "plain_seed1"),
        ([*good, good[0]], "plain_seed1337"), ([*good, "--seed=5"], "--seeds"),
        ([*good, "--resume=True"], "--resume"), ([*good, "--per_gpu=0"], "--per_gpu=0"),
        ([*good, "--per_gpu=two"], "--per_gpu"), ([*good, "--fsdp=True"], "--fsdp=False"),
        ([*good, "--out="], "--out="), ([*good, "--device=gpu"], "--device=gpu"),
        ([*good, "--data=nowhere"], "nowhere"), ([*good, f"--out={tmp_path / 'file' / 'out'}"], "choose another --out"),
    ]:
        message, lines = call(capsys, *([] if any("--out=" in word for word in words) else [out]), *words)
        assert str(message).startswith("error: ") and expected in message and "\n" not in message, words
        assert lines == [] and not (tmp_path / "out").exists()
