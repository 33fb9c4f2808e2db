"""What all experiments share: a result file beside the checkpoint, going on after a stop, refusing to mix.

A result NAME.json holds everything it takes to make it again. While it is unfinished, NAME.resume.pt
holds what is done; the same command again goes on from there. For out/x they lie in out/x, for
out/x/last.pt they are called out/x/last.NAME.json.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import load_torch, replace_file
from prepare import UserError

ROOT = Path(__file__).resolve().parent.parent


def git(*words):
    """What a git command in this project prints; nothing outside a git checkout or without git."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def environment(device):
    """By which code and on what a figure was made: a dict of commit ("unknown" without git), device, torch."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return {"device": name, "torch": torch.__version__, "commit": commit}


def fingerprint(model):
    """16 hex digits that name the clean stream's weights: a run that goes on makes its results stale."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.clean_state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def result_path(run, name):
    """out/x -> out/x/acdc.json and out/x/last.pt -> out/x/last.acdc.json for the name acdc.json."""
    run = Path(run)
    return run / name if run.is_dir() else run.with_suffix(f".{name}")


# ------------------------------------------------------------------------------------------- the files


def write_text(path, text):
    """Atomically: the file is whole or the old one."""
    with replace_file(path) as file:
        file.write(text.encode())


def write_json(path, result):
    write_text(path, json.dumps(result, indent=1))


def read_result(path):
    """A result file as a dict. Raises UserError when it is none."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = isinstance(result["settings"], dict) and isinstance(result["checkpoint"], str)
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: delete it, and make it again")
    return result


def difference(ours, theirs):
    """The first setting in which two dicts of them differ, in words, or None."""
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            return f"{name}={theirs.get(name)}, not {ours.get(name)}"
    return None


def refuse_mixed(settings_of):
    """{run: the settings of its result}: raises UserError, with the first that differs, unless all are alike."""
    (first, expected), *others = settings_of.items()
    for run, settings in others:
        other = difference(settings, expected)
        if other:
            raise UserError(f"{first} was measured with {other} as {run}: "
                            f"make them alike, then tabulate them")


# ---------------------------------------------------------------------------------- one run, many runs


class Job:
    """One experiment on one run: what there is already of NAME.json, and where to go on.

    run: an eval.Run. settings: everything beside the weights that decides the numbers, as JSON
    holds it. files: what else belongs to a finished result, such as ".pt" for NAME.pt.
    Raises UserError where a result made otherwise is in the way and force does not replace it.
    """

    def __init__(self, run, name, settings, files=(), force=False):
        self.run, self.name, self.settings, self.force = run, name, settings, force
        self.checkpoint = fingerprint(run.model)
        folder = self.path(".json").parent
        if not os.access(folder, os.W_OK):
            raise UserError(f"results go beside the checkpoint, and {folder} cannot be written: "
                            f"copy the run to another folder")
        self.state = None  # what an interrupted job gave to save
        unfinished = self.earlier(".resume.pt", load_torch)
        if unfinished:
            self.state = unfinished["state"]
        self.result = self.earlier(".json", read_result)
        if not all(self.path(suffix).exists() for suffix in files):
            self.result = None

    def path(self, suffix):
        """The file NAME + suffix beside the checkpoint."""
        return result_path(self.run.path, f"{self.name}{suffix}")

    def earlier(self, suffix, read):
        """A file of an earlier call, read, or None where there is none or where it is to be replaced."""
        path = self.path(suffix)
        if not path.exists():
            return None
        try:
            found = read(path)
            other = difference(self.settings, found["settings"])
            if found["checkpoint"] != self.checkpoint:
                other = "weights that this run no longer has"
        except (ValueError, KeyError, TypeError, AttributeError):
            if self.force:
                return None
            raise UserError(f"{path} is damaged: delete it, or add --force") from None
        if other and not self.force:
            raise UserError(f"{path} was made with {other}: --force replaces it")
        return None if other else found

    def save(self, state):
        """Keep what is done, anything that torch.load takes with weights_only=True, for the same command."""
        with replace_file(self.path(".resume.pt")) as file:
            torch.save({"checkpoint": self.checkpoint, "settings": self.settings, "state": state}, file)

    def finish(self, facts, device):
        """Write NAME.json, after everything that belongs to it: these facts and all it takes to find them again."""
        self.result = {
            "run": str(self.run.path), "checkpoint": self.checkpoint, "step": self.run.step,
            "settings": self.settings, "command": shlex.join(sys.argv),
            "date": time.strftime("%Y-%m-%d %H:%M"), **environment(device), **facts}
        write_json(self.path(".json"), self.result)
        self.path(".resume.pt").unlink(missing_ok=True)


def results_of(jobs, measure, device):
    """The result of every job, a dict each: the one that is there, or else measure(job, title) -> its facts.

    Raises UserError, before the first one is measured, when their settings differ.
    """
    refuse_mixed({job.run.path: job.settings for job in jobs})
    for number, job in enumerate(jobs, 1):
        if job.result:
            print(f"{job.path('.json')} of {job.result['date']} has it already", file=sys.stderr)
            job.result["run"] = str(job.run.path)  # the folder may have been renamed since
        else:
            job.finish(measure(job, f"[{number}/{len(jobs)}] {job.run.path}"), device)
    return [job.result for job in jobs]
