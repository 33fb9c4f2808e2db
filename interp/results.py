"""What all experiments share: a result file beside the checkpoint, going on, refusing to mix.

A result NAME.json holds everything it takes to make it again. While it is unfinished,
NAME.resume.pt holds what is done, and the same command again goes on from there. For out/x both lie
in out/x; for out/x/last.pt they are called out/x/last.NAME.json and out/x/last.NAME.resume.pt.

    jobs = []
    for run in runs:
        job = Job(run, "acdc", settings, force=args.force)    every mistake shows here
        job.inputs = prompts                                  whatever measure needs of this run
        jobs.append(job)
    results = results_of(jobs, measure, device)

    def measure(job, title):    what is done in job.state, and saved by job.save(state)
        return facts            a dict of what was found, for NAME.json
"""

import hashlib
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from interp.common import check_writable
from model import load_torch, replace_file
from prepare import UserError

ROOT = Path(__file__).resolve().parent.parent
# what Job.finish and Job.save put into every file, beside the facts and the state
RESULT = {"run": str, "checkpoint": str, "step": int, "settings": dict, "command": str, "date": str}
UNFINISHED = {"checkpoint": str, "settings": dict, "state": object}
# in the form of an experiment's own facts; see fits
NUMBER, MAYBE = (int, float), (int, float, type(None))


def git(*words):
    """What a git command in this project prints; nothing outside a git checkout or without git."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def environment(device):
    """By which code and on what a figure was made; the commit is "unknown" without git."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return {"device": name, "torch": torch.__version__, "commit": commit}


def fingerprint(model):
    """16 hex digits that name the clean stream's weights: when training goes on, they change."""
    return digest_of(model.clean_state_dict())


def gate_fingerprint(model):
    """The same of the gates' weights, which are all that changes while the others are frozen."""
    clean, weights = model.clean_state_dict(), model.state_dict()
    return digest_of({name: weights[name] for name in weights.keys() - clean.keys()})


def digest_of(weights):
    """16 hex digits that name these weights, {name: tensor}."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def result_path(run, name):
    """out/x -> out/x/acdc.json and out/x/last.pt -> out/x/last.acdc.json for the name acdc.json."""
    run = Path(run)
    return run / name if run.is_dir() else run.with_suffix(f".{name}")


# ---------------------------------------------------------------------------------------- the files


def write_text(path, text):
    """Atomically: the file is the new one, whole, or stays the old one."""
    with replace_file(path) as file:
        file.write(text.encode(errors="replace"))  # a run's name may be no UTF-8


def write_json(path, result):
    write_text(path, json.dumps(result, indent=1))


def write_torch(path, content):
    """Tensors in lists and dicts, and whatever else torch.load takes as weights."""
    with replace_file(path) as file:
        torch.save(content, file)


def fits(found, form):
    """Whether something read has this form: a type or several, [the form of every entry of a list],
    or {name: form} of a dict that has at least these."""
    if isinstance(form, list):
        return isinstance(found, list) and all(fits(entry, form[0]) for entry in found)
    if not isinstance(form, dict):
        return isinstance(found, form)
    if not isinstance(found, dict) or not form.keys() <= found.keys():
        return False
    return all(fits(found[name], kind) for name, kind in form.items())


def is_of(result, model):
    """Whether what a result file holds was found in the weights that a model has."""
    gates = gate_fingerprint(model)
    return result["checkpoint"] == fingerprint(model) and result.get("gates", gates) == gates


def read_json(path):
    """What a file holds; None where there is none, or no JSON in it, which has no NaN."""

    def refuse(word):
        raise ValueError(word)

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except (OSError, ValueError, RecursionError):
        return None


def read_result(path):
    """A result file as a dict. Raises UserError when it is none."""
    result = read_json(path)
    if not fits(result, RESULT):
        raise UserError(f"{path} is damaged: delete it, and make it again")
    return result


def read_neurons(path, entry):
    """What Job.save_neurons wrote, a dict with an entry of this form for every neuron. Raises
    UserError when it is none."""
    found = read_json(path)
    if not fits(found, {"checkpoint": str, "settings": dict, "neurons": [entry]}):
        raise UserError(f"{path} is damaged")
    return found


def read_unfinished(path):
    """What Job.save wrote, a dict. Raises UserError or ModelError when it is none."""
    found = load_torch(path)
    if not fits(found, UNFINISHED):
        raise UserError(f"{path} is damaged, or of an earlier version")
    return found


def difference(ours, theirs):
    """The first setting in which two dicts of them differ, in words, or None."""
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            return f"{name}={theirs.get(name)}, not {ours.get(name)}"
    return None


def refuse_mixed(settings_of):
    """{run: the settings of its result}: raises UserError when one differs, and says which."""
    (first, expected), *others = settings_of.items()
    for run, settings in others:
        other = difference(settings, expected)
        if other:
            raise UserError(f"{first} was measured with {other} as {run}: "
                            f"make them alike, then tabulate them")


# ------------------------------------------------------------------------------- one run, many runs


def check_finite(run):
    """Raises UserError where a run has weights that nothing can be read from."""
    if not all(weight.isfinite().all() for weight in run.model.parameters()):
        raise UserError(f"{run.path} has weights that are not finite: its training has diverged")


def anything(found):
    """What an experiment that looks no closer takes for its own."""
    return True


class Job:
    """One experiment on one run: what there is already of NAME.json, and where to go on.

    run: an eval.Run. settings: everything beside the weights that decides the numbers, as JSON
    holds it: lists, no tuples. files: what else belongs to a finished result, {".pt": read} for a
    NAME.pt that read(path) reads: a dict with "checkpoint" and "settings", like the result's. It
    is to be written before the result. pictures: what is drawn beside it, such as ".png".
    is_result(result), is_state(state): whether what an earlier call with these settings has left
    is what this experiment writes and goes on from. gates: the gate_fingerprint of the run, where
    its numbers depend on the gates too; a result without one, of an earlier version, is taken.
    Raises UserError where a result made otherwise is in the way and force does not replace it,
    where weights are not finite, and where something could not be written.
    """

    def __init__(self, run, name, settings, files=None, pictures=(), force=False,
                 is_result=anything, is_state=anything, gates=None):
        self.run, self.name, self.settings, self.force = run, name, settings, force
        self.checkpoint, self.gates = fingerprint(run.model), gates
        self.inputs = None  # for the experiment to set: what it reads beside the model
        self.state = None  # what an interrupted call gave to save
        self.result = self.earlier(".json", read_result, is_result)
        for suffix, read in (files or {}).items():
            if self.result and not self.earlier(suffix, read):
                self.result = None
        if self.result:
            self.result["run"] = str(run.path)  # the folder may have been renamed since
            return
        check_finite(run)
        unfinished = self.earlier(".resume.pt", read_unfinished,
                                  lambda found: is_state(found["state"]))
        if unfinished:
            self.state = unfinished["state"]
        for suffix in (".resume.pt", *(files or ()), *pictures, ".json"):
            check_writable(self.path(suffix))

    def path(self, suffix):
        """The file NAME + suffix beside the checkpoint."""
        return result_path(self.run.path, f"{self.name}{suffix}")

    def earlier(self, suffix, read, is_sound=anything):
        """A file of an earlier call, read; None where there is none or force replaces it."""
        path = self.path(suffix)
        if not path.exists():
            return None
        try:
            found = read(path)
            other = difference(self.settings, found["settings"])
            if found["checkpoint"] != self.checkpoint:
                other = "weights that this run no longer has"
            elif not other and found.get("gates", self.gates) != self.gates:
                other = "gates that are no longer there"
            if not other and not is_sound(found):
                raise UserError("its head alone is right")
        except ValueError:
            if self.force:
                return None
            raise UserError(f"{path} is damaged, or of an earlier version: "
                            f"delete it, or add --force") from None
        if other and not self.force:
            raise UserError(f"{path} was made with {other}: --force replaces it")
        return None if other else found

    def save(self, state):
        """Keep what is done, for the same command: anything that write_torch takes."""
        found = {"checkpoint": self.checkpoint, "settings": self.settings, "state": state}
        write_torch(self.path(".resume.pt"), found)

    def save_neurons(self, neurons):
        """Write NAME_neurons.json, what is known of single neurons: a dict of each, with "layer"
        and "neuron", which they are sorted by."""
        content = {"checkpoint": self.checkpoint, "settings": self.settings, "neurons": neurons}
        text = json.dumps(content, separators=(",", ":"))
        write_text(self.path("_neurons.json"), text)

    def finish(self, facts, device):
        """Write NAME.json: these facts and all it takes to find them again."""
        self.result = {
            "run": str(self.run.path), "checkpoint": self.checkpoint, "step": self.run.step,
            "settings": self.settings, "command": shlex.join(sys.argv),
            "date": time.strftime("%Y-%m-%d %H:%M"), **environment(device), **facts}
        if self.gates:
            self.result["gates"] = self.gates
        write_json(self.path(".json"), self.result)
        self.path(".resume.pt").unlink(missing_ok=True)


def results_of(jobs, measure, device):
    """The result of every job, a dict each: the one that is there, or else the facts that
    measure(job, title) returns, written down.

    Raises UserError, before the first one is measured, when their settings differ or two are of
    the same files.
    """
    refuse_mixed({job.run.path: job.settings for job in jobs})
    places = set()
    for job in jobs:
        place = job.path(".json").resolve()
        if place in places:
            raise UserError(f"{job.run.path} is given twice: give it once")
        places.add(place)
    for number, job in enumerate(jobs, 1):
        if job.result:
            print(f"{job.path('.json')} of {job.result['date']} has it already", file=sys.stderr)
        else:
            job.finish(measure(job, f"[{number}/{len(jobs)}] {job.run.path}"), device)
    return [job.result for job in jobs]
