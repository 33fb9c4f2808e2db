"""interp/results.py: what stands in a result file, which earlier ones count, and how a job goes on.

    python -m pytest tests/test_results.py
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import open_run
from interp.results import (
    Job, difference, environment, fingerprint, fits, read_result, refuse_mixed, result_path, results_of,
    write_json, write_text, write_torch)
from model import load_checkpoint, load_torch
from prepare import UserError
from test_eval import run, seeds  # noqa: F401

CPU = torch.device("cpu")
SETTINGS = {"data": "abc", "taus": [0.03, 0.1], "orders": None}
FILES = {".pt": load_torch}


def job(run, settings=SETTINGS, **changes):
    return Job(open_run(run), "toy", dict(settings), **changes)


def refused(run, *words, **changes):
    """The message with which a job is refused; its files stay as they are."""
    before = contents(run)
    with pytest.raises(UserError) as error:
        job(run, **changes)
    assert contents(run) == before and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_on(run):
    """Other weights in the same folder."""
    checkpoint = load_checkpoint(run)
    checkpoint["model"]["transformer.ln_f.bias"] += 1
    torch.save(checkpoint, run / "best.pt")


# ---- the parts


def test_results_lie_beside_their_checkpoint(tmp_path):
    (tmp_path / "run").mkdir()
    assert result_path(tmp_path / "run", "sae.json") == tmp_path / "run" / "sae.json"
    assert result_path(tmp_path / "run" / "last.pt", "sae.json") == tmp_path / "run" / "last.sae.json"


def test_results_need_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment(CPU)["commit"] == "unknown"


def test_a_fingerprint_is_of_the_clean_weights(run):
    model = open_run(run).model
    before = fingerprint(model)
    with torch.no_grad():
        model.transformer["h"][0].mlp_gate.weight += 1
        assert fingerprint(model) == before and len(before) == 16
        model.transformer["ln_f"].bias += 1e-6
        assert fingerprint(model) != before


def test_a_fingerprint_is_that_of_earlier_results(run):
    """Names and bytes of the checkpoint's weights, gates aside, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(load_checkpoint(run)["model"].items()):
        if "_gate." not in name:
            digest.update(name.encode() + weight.numpy().tobytes())
    assert fingerprint(open_run(run).model) == digest.hexdigest()[:16]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"a": 2})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    write_text(tmp_path / "a.json", "± \udcff")
    assert (tmp_path / "a.json").read_bytes() == "± ?".encode()


def test_a_difference_is_the_first_one():
    assert difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None
    assert difference({"a": 1, "b": None}, {"a": 1}) is None
    assert difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "c": 6}) == "b=5, not 2"
    assert difference({"a": 1, "new": 2}, {"a": 1}) == "new=None, not 2"


def test_alike_settings_are_not_refused():
    refuse_mixed({"one": {"a": 1}, "two": {"a": 1}})
    with pytest.raises(UserError, match="one was measured with a=1, not 2 as three: make them alike"):
        refuse_mixed({"one": {"a": 1}, "two": {"a": 1}, "three": {"a": 2}})


# ---- one job


def test_a_result_says_all_it_takes_to_make_it_again(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["interp/toy.py", "a folder", "--tau=1"])
    new = job(run)
    assert new.state is None and new.result is None
    new.finish({"found": 3}, CPU)
    result = json.loads((run / "toy.json").read_text())
    assert result == new.result == read_result(run / "toy.json")
    assert result["command"] == "interp/toy.py 'a folder' --tau=1" and result["step"] == 7
    assert result["run"] == str(run) and result["settings"] == SETTINGS and result["found"] == 3
    assert result["checkpoint"] == fingerprint(open_run(run).model)
    assert {"date", "device", "torch", "commit"} < result.keys()
    assert job(run).result == result


def test_a_job_goes_on_from_what_it_saved(run):
    state = {"done": [1, 2], "weights": torch.arange(3.0)}
    job(run).save(state)
    going_on = job(run)
    assert going_on.result is None and going_on.state["done"] == [1, 2]
    assert torch.equal(going_on.state["weights"], state["weights"])
    going_on.finish({}, CPU)
    assert not (run / "toy.resume.pt").exists() and job(run).state is None


def test_a_checkpoint_of_its_own_has_results_of_its_own(run):
    job(run).finish({"found": 1}, CPU)
    shutil.copy(run / "best.pt", run / "last.pt")
    alone = job(run / "last.pt")
    assert alone.result is None
    alone.save(1)
    alone.finish({"found": 2}, CPU)
    assert (run / "last.toy.json").exists() and not (run / "last.toy.resume.pt").exists()
    assert job(run).result["found"] == 1 and job(run / "last.pt").result["found"] == 2


def test_a_renamed_folder_keeps_its_result(run):
    job(run).finish({}, CPU)
    moved = run.rename(run.parent / "moved")
    assert job(moved).result["run"] == str(moved)


def test_a_result_without_its_other_files_is_measured_again(run):
    first = job(run, files=FILES)
    write_torch(run / "toy.pt", {"checkpoint": first.checkpoint, "settings": SETTINGS})
    first.finish({}, CPU)
    assert job(run, files=FILES).result
    write_torch(run / "toy.pt", {"checkpoint": first.checkpoint, "settings": {**SETTINGS, "taus": [2]}})
    refused(run, "toy.pt was made with taus=[2], not [0.03, 0.1]", files=FILES)
    (run / "toy.pt").write_bytes(b"")
    refused(run, "toy.pt is damaged", "delete it, or add --force", files=FILES)
    assert job(run, files=FILES, force=True).result is None
    (run / "toy.pt").unlink()
    assert job(run, files=FILES).result is None


@pytest.mark.parametrize("unfinished", [False, True])
def test_results_of_other_settings_or_weights_are_not_lost(run, unfinished):
    """Neither finished nor unfinished ones, but force replaces them."""
    name = "toy.resume.pt" if unfinished else "toy.json"
    first = job(run)
    first.save("state") if unfinished else first.finish({}, CPU)
    other = {**SETTINGS, "taus": [0.5]}
    refused(run, f"{name} was made with taus=[0.03, 0.1], not [0.5]: --force replaces it", settings=other)
    forced = job(run, other, force=True)
    assert forced.state is None and forced.result is None
    again = job(run, force=True)  # nothing to replace
    assert again.state == ("state" if unfinished else None) and bool(again.result) != unfinished
    train_on(run)
    refused(run, f"{name} was made with weights that this run no longer has: --force replaces it")
    forced = job(run, force=True)
    assert forced.state is None and forced.result is None
    forced.save(1)
    forced.finish({}, CPU)
    assert job(run).result


HEAD = {"run": "r", "checkpoint": "c", "step": 1, "settings": {}, "command": "c", "date": "d"}


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", "null", '"text"', "[" * 100_000, "9" * 6000, "\xff", json.dumps(HEAD)[:-9],
    *(json.dumps({key: value for key, value in HEAD.items() if key != name}) for name in HEAD),
    json.dumps({**HEAD, "checkpoint": 1}), json.dumps({**HEAD, "found": float("nan")}), json.dumps({**HEAD, "settings": []})], ids=lambda text: text[:20])
def test_a_damaged_result_is_refused_and_can_be_replaced(run, text):
    (run / "toy.json").write_text(text, encoding="latin1")
    with pytest.raises(UserError, match="toy.json is damaged: delete it, and make it again"):
        read_result(run / "toy.json")
    refused(run, "toy.json is damaged", "delete it, or add --force")
    forced = job(run, force=True)
    assert forced.result is None
    forced.finish({}, CPU)
    assert job(run).result


def test_a_result_or_state_that_the_experiment_does_not_know_is_refused_and_can_be_replaced(run):
    known = {"is_result": lambda result: "found" in result, "is_state": lambda state: state == "half"}
    job(run).save(5)
    refused(run, "toy.resume.pt is damaged, or of an earlier version: delete it, or add --force", **known)
    job(run).finish({}, CPU)
    refused(run, "toy.json is damaged, or of an earlier version: delete it, or add --force", **known)
    forced = job(run, force=True, **known)
    assert forced.result is None and forced.state is None
    forced.save("half")
    (run / "toy.json").unlink()
    assert job(run, **known).state == "half"
    forced.finish({"found": 1}, CPU)
    assert job(run, **known).result["found"] == 1


@pytest.mark.parametrize("found, form, good", [
    (1, int, True), ("1", int, False), (1.5, (int, float), True), ([], [int], True), ([1, "1"], [int], False), (5, [int], False),
    ({"a": 1, "b": 2}, {"a": int}, True), ({"b": 2}, {"a": int}, False), ([{"a": [1]}], [{"a": [int]}], True),
    ([{"a": [None]}], [{"a": [int]}], False), ([], {}, False), (None, {"a": int}, False)])
def test_a_form_is_fitted_entry_by_entry(found, form, good):
    assert fits(found, form) == good


def as_earlier_sae(run, path):
    """sae.resume.pt as it was before there was interp/results.py."""
    head = {"run": str(run), "settings": SETTINGS, "checkpoint": fingerprint(open_run(run).model)}
    torch.save({**head, "rows": [], "current": None}, path)


def cut_short(run, path):
    job(run).save({"done": [1]})
    path.write_bytes(path.read_bytes()[:-40])


def bit_flipped(run, path):
    job(run).save({"weights": torch.ones(100)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_types(run, path):
    torch.save({"checkpoint": 1, "settings": [], "state": None}, path)


def a_list(run, path):
    torch.save([1], path)


def a_run(run, path):
    shutil.copy(run / "best.pt", path)


def empty(run, path):
    path.touch()


@pytest.mark.parametrize("damage", [as_earlier_sae, cut_short, bit_flipped, other_types, a_list, a_run, empty])
def test_a_damaged_unfinished_file_is_refused_and_can_be_replaced(run, damage):
    damage(run, run / "toy.resume.pt")
    refused(run, "toy.resume.pt is damaged, or of an earlier version: delete it, or add --force")
    forced = job(run, force=True)
    assert forced.state is None
    forced.save("new")
    assert job(run).state == "new"


def test_an_unfinished_file_of_another_name_is_left_alone(run):
    """acdc.resume.json was the name before there was interp/results.py."""
    (run / "toy.resume.json").write_text("{}")
    new = job(run)
    assert new.state is None and new.result is None
    new.finish({}, CPU)
    assert (run / "toy.resume.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["toy.json", "toy.resume.pt", "toy.pt"])
def test_what_cannot_be_written_is_found_out_at_once(run, name, monkeypatch):
    """A folder of that name; one in the way of the file that is written first; a read-only folder."""
    (run / f"{name}.tmp").mkdir()
    refused(run, f"cannot write {run / name}: Is a directory", files=FILES)
    (run / f"{name}.tmp").rmdir()
    (run / name).mkdir()
    refused(run, str(run / name), files=FILES)  # damaged, as a result
    with pytest.raises(UserError, match=f"cannot write {run / name}: there is a folder of that name"):
        job(run, files=FILES, force=True)
    (run / name).rmdir()

    def read_only(path, mode="r", *words, **more):
        if "w" in mode and Path(path).parent == run:
            raise PermissionError(13, "Permission denied")
        return open(path, mode, *words, **more)

    monkeypatch.setattr(sys.modules["interp.common"], "open", read_only, raising=False)
    refused(run, f"cannot write {run}/toy.", "Permission denied", files=FILES)


def test_a_finished_result_needs_no_writing(run):
    job(run).finish({}, CPU)
    (run / "toy.json.tmp").mkdir()
    assert job(run).result


# ---- many jobs


def test_results_come_in_order_and_only_what_is_missing_is_measured(run, capsys):
    paths = list(seeds(run))
    job(paths[1]).finish({"found": 1}, CPU)
    called = []

    def measure(one, title):
        called.append(title)
        assert not one.path(".json").exists()
        return {"found": 10 * len(called)}

    results = results_of([job(path) for path in paths], measure, CPU)
    assert called == [f"[1/3] {paths[0]}", f"[3/3] {paths[2]}"]
    assert [result["run"] for result in results] == [str(path) for path in paths]
    assert [result["found"] for result in results] == [10, 1, 20]
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [f"{paths[1] / 'toy.json'} of {results[1]['date']} has it already"]
    assert results_of([job(path) for path in paths], None, CPU) == results


def test_a_job_that_fails_leaves_the_results_before_it(run):
    first, second = seeds(run, of=(1, 2))

    def measure(one, title):
        one.save("half")
        if one.run.path == second:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        results_of([job(first), job(second)], measure, CPU)
    assert job(first).result and job(first).state is None
    assert job(second).result is None and job(second).state == "half"


def test_mixed_or_repeated_runs_are_refused_before_the_first_is_measured(run):
    first, second = seeds(run, of=(1, 2))

    def measure(one, title):
        pytest.fail("too late")

    jobs = [job(first), job(second, {**SETTINGS, "orders": 3})]
    with pytest.raises(UserError, match=f"{first} was measured with orders=None, not 3 as {second}"):
        results_of(jobs, measure, CPU)
    with pytest.raises(UserError, match=f"{first}/ is given twice"):
        results_of([job(first), job(second), job(f"{first}/")], measure, CPU)
