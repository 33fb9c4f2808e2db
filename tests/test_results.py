"""interp/results.py: what a result file holds, which results are refused, how a job continues."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, contents, make_run, tiny_model

from eval import open_run
from interp.results import Result, digests, frame, measure_all, result_path, run_of
from model import load_checkpoint
from prepare import UserError

CPU = torch.device("cpu")
SETTINGS = {"data": "abc", "tau": [0.03, 0.1], "orders": None}


def result_of(run, settings=SETTINGS, **options):
    return Result(open_run(run), "toy", dict(settings), **options)


def refused(run, words, **options):
    """It is refused with one line that holds these words, and its files stay as they are."""
    before = contents(run)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        result_of(run, **options)
    assert contents(run) == before and "\n" not in str(error.value)


def train_on(run):
    """Other weights in the same folder."""
    checkpoint = load_checkpoint(run)
    checkpoint["model"]["transformer.ln_f.bias"] += 1
    torch.save(checkpoint, run / "best.pt")


def test_results_lie_beside_their_checkpoint(tmp_path):
    for run, path in (("run", "run/sae.json"), ("run/last.pt", "run/last.sae.json"),
                      ("run/a.b.pt", "run/a.b.sae.json")):
        (tmp_path / "run").mkdir(exist_ok=True)
        assert result_path(tmp_path / run, "sae.json") == tmp_path / path
        assert run_of(tmp_path / path) == tmp_path / run


def test_digests_tell_clean_weights_and_gates_apart():
    """The bytes of a state dict, in the order of the names, as in results of earlier commits."""
    model = tiny_model()
    before = digests(model.state_dict())
    sha = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if "_gate." not in name:
            sha.update(name.encode() + weight.numpy().tobytes())
    assert before["checkpoint"] == sha.hexdigest()[:16]
    with torch.no_grad():
        model.transformer["h"][0].mlp_gate.weight += 1
    after = digests(model.state_dict())
    assert after["checkpoint"] == before["checkpoint"] and after["gates"] != before["gates"]


def test_a_result_says_all_it_takes_to_make_it_again(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["interp/toy.py", "a folder", "--tau=1"])
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    new = result_of(run)
    assert (new.facts, new.state) == (None, None)
    new.finish({"found": 3}, CPU)
    facts = json.loads((run / "toy.json").read_text())
    assert facts == new.facts == result_of(run).facts
    assert (facts["run"], facts["step"], facts["settings"]) == (str(run), 7, SETTINGS)
    assert (facts["command"], facts["commit"]) == ("interp/toy.py 'a folder' --tau=1", "unknown")
    assert facts["found"] == 3 and {"date", "device", "torch", "checkpoint", "gates"} < set(facts)
    assert result_of(run.rename(run.parent / "moved")).facts == facts


def test_without_its_other_files_a_result_is_measured_again(run):
    files = (".pt", "_neurons.json")
    first = result_of(run, files=files)
    first.finish({}, CPU)
    assert result_of(run, files=files).facts is None
    first.write("_neurons.json", neurons=[1, 2])
    torch.save(first.key, run / "toy.pt")
    assert result_of(run, files=files).facts
    assert json.loads((run / "toy_neurons.json").read_text()) == {**first.key, "neurons": [1, 2]}
    torch.save({**first.key, "settings": {"tau": [0.5]}}, run / "toy.pt")  # of a killed --force
    refused(run, "toy.pt was made with tau=[0.5]", files=files)


def test_a_result_that_another_process_has_finished_is_not_replaced(run):
    first, second = result_of(run), result_of(run, {**SETTINGS, "tau": [0.5]})
    second.finish({"n": 2}, CPU)
    with pytest.raises(UserError, match="was made with tau"):
        first.finish({"n": 1}, CPU)
    assert json.loads((run / "toy.json").read_text())["n"] == 2


@pytest.mark.parametrize("name", ["toy.json", "toy.resume.pt"])
def test_results_of_other_settings_or_weights_are_refused_and_force_replaces_them(run, name):
    first = result_of(run)
    if name == "toy.json":
        first.finish({}, CPU)
    else:
        first.save("half")
    other = {**SETTINGS, "tau": [0.5]}
    refused(run, f"{name} was made with tau=[0.03, 0.1], not [0.5]: --force", settings=other)
    assert result_of(run, other, force=True).state is None
    again = result_of(run, force=True)  # a finished one is made again, an unfinished one goes on
    assert (again.facts, again.state) == (None, None if name == "toy.json" else "half")
    train_on(run)
    refused(run, f"{name} was made with checkpoint=")
    forced = result_of(run, force=True)
    forced.save("new")
    assert result_of(run, force=True).state == "new"
    forced.finish({"found": 2}, CPU)
    assert result_of(run).facts["found"] == 2 and not (run / "toy.resume.pt").exists()


JOB = """
import os, signal, sys, torch
from eval import open_run
from interp.results import Result, measure_all

def measure(result, title):
    done = result.state or []
    while len(done) < 4:
        done.append(sys.argv[1])
        result.save(done)
        if result.run.path == sys.argv[3] and done == ["kill", "kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"done": done}

jobs = [Result(open_run(run), "toy", {}) for run in sys.argv[2:]]
measure_all(jobs, measure, torch.device("cpu"))
"""


def test_a_killed_job_goes_on_where_it_was(run, tmp_path):
    second = shutil.copytree(run, tmp_path / "second")

    def job(word):
        return subprocess.run([sys.executable, "-c", JOB, word, run, second], cwd=ROOT,
                              capture_output=True, text=True)

    assert job("kill").returncode == -signal.SIGKILL
    before = (run / "toy.json").read_bytes()
    done = job("again")
    assert done.returncode == 0 and f"[1/2] {run}: {run}/toy.json of " in done.stderr
    assert (run / "toy.json").read_bytes() == before  # it was not measured again
    table = frame([run / "toy.json", second / "toy.json"])
    assert table["done"].tolist() == [["kill"] * 4, ["kill", "kill", "again", "again"]]


def test_mixed_settings_are_refused_before_anything_is_measured(run):
    with pytest.raises(UserError, match=f"{run} has orders=None, not 3 as {run}"):
        measure_all([result_of(run), result_of(run, {**SETTINGS, "orders": 3})], None, CPU)


def test_a_frame_has_a_row_for_each_result_and_refuses_what_does_not_belong(run, tmp_path):
    second = make_run(tmp_path / "out" / "second", tmp_path / "data", tiny_model("none"))
    for number, path in enumerate((run, second)):
        result_of(path).finish({"all": {"mean": number}}, CPU)
    moved = second.rename(tmp_path / "moved")
    table = frame(path / "toy.json" for path in (run, moved))
    assert table["run"].tolist() == [str(run), str(moved)]
    assert table["all.mean"].tolist() == [0, 1] and table["settings.tau"][0] == [0.03, 0.1]
    result_of(moved, {"data": "other"}, force=True).finish({}, CPU)
    with pytest.raises(UserError, match="data=abc, not other as in .*: make both again"):
        frame([run / "toy.json", moved / "toy.json"])
    train_on(run)
    with pytest.raises(UserError, match="of other weights than .* make it again with --force"):
        frame([run / "toy.json"])
