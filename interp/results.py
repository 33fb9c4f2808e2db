"""One result file for each experiment and run, and all of them as one pandas DataFrame.

NAME.json lies beside the checkpoint: out/x/NAME.json for out/x, out/x/last.NAME.json for
out/x/last.pt. It holds the settings, digests of the weights, and what was found. Until it is
finished, NAME.resume.pt keeps what is done so far, and the same command continues from there.

    results = [Result(run, "acdc", settings, args.force) for run in runs]
    facts = measure_all(results, measure, device)

    def measure(result, title):    continue from result.state; call result.save(state) now and then
        return facts               a dict for NAME.json

In a notebook, frame(glob("out/*/acdc.json")) has one row for each file. Columns of nested facts
have names such as settings.tau or all.mean.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import load_checkpoint, load_torch, replace_file
from prepare import UserError

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------- what a result depends on


def digest(weights):
    """16 hex digits that identify these weights, {name: tensor}."""
    sha = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        sha.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def digests(weights):
    """{"checkpoint": digest of the clean stream, "gates": of the gates} of a state dict."""
    gates = {name: weight for name, weight in weights.items() if "_gate." in name}
    clean = {name: weight for name, weight in weights.items() if name not in gates}
    return {"checkpoint": digest(clean), "gates": digest(gates)}


def environment(device):
    """{name: text}: the device, torch and commit that a result was made with."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    git = "git describe --always --exclude=* --dirty=+changes 2>/dev/null"
    commit = subprocess.run(git, cwd=ROOT, shell=True, capture_output=True, text=True).stdout
    return {"device": name, "torch": torch.__version__, "commit": commit.strip() or "unknown"}


def difference(ours, theirs):
    """The first entry in which two dicts differ, as text; empty when there is none."""
    for name in {**theirs, **ours}:
        if ours.get(name) != theirs.get(name):
            return f"{name}={theirs.get(name)}, not {ours.get(name)}"
    return ""


# --------------------------------------------------------------------------------------- the files


def result_path(run, name):
    """out/x -> out/x/acdc.json and out/x/last.pt -> out/x/last.acdc.json, for name acdc.json."""
    run = Path(run)
    return run / name if run.is_dir() else run.with_suffix(f".{name}")


def common_folder(runs):
    """The deepest folder that holds all these run folders and .pt files; of one, the run's own."""
    runs = [Path(run).absolute() for run in runs]
    folders = [run if run.is_dir() else run.parent for run in runs]
    return Path(os.path.commonpath(folders))


def run_of(path):
    """The run that a result file lies beside: the inverse of result_path."""
    *stem, _, _ = Path(path).name.split(".")
    return Path(path).parent / f"{'.'.join(stem)}.pt" if stem else Path(path).parent


def write_text(path, text):
    """Write a whole file; if that fails, an existing file stays as it is."""
    with replace_file(path) as file:
        file.write(text.encode(errors="replace"))  # the name of a run may not be UTF-8


def write_json(path, content, **options):
    write_text(path, json.dumps(content, **options))


def read_json(path):
    """What Result.finish or Result.write wrote: a dict. Raises UserError if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged: delete it and measure again") from None


class Result:
    """One experiment on one run (an eval.Run).

    settings: what decides the numbers besides the weights, in JSON's types (lists, no tuples), with
    the checksum of the data if they are read. files: endings of the other files of a finished
    result, such as ".pt" or "_neurons.json"; measure writes them. facts: the finished result, a
    dict, or None. state: what an interrupted call saved, or None. force: measure again, and replace
    results of other settings or weights; without it these raise UserError.
    """

    def __init__(self, run, name, settings, force=False, files=()):
        self.run, self.name, self.force = run, name, force
        self.key = {"settings": settings, **digests(run.model.state_dict())}
        # every file must be of this measurement: a kill may have left a new one beside an old one
        found = [self.existing(ending) for ending in (".json", *files)]
        self.facts = found[0] if all(found) and not force else None
        unfinished = None if self.facts else self.existing(".resume.pt")
        self.state = unfinished["state"] if unfinished else None

    def path(self, ending):
        """The file NAME + ending beside the checkpoint."""
        return result_path(self.run.path, self.name + ending)

    def existing(self, ending):
        """The content of a file; None or False if there is none, or if force replaces it."""
        path = self.path(ending)
        if not path.exists() or ending.endswith(".png"):
            return path.exists()
        found = load_torch(path) if ending.endswith(".pt") else read_json(path)
        other = difference(self.key["settings"], found["settings"])
        other = other or difference(self.key, {name: found.get(name) for name in self.key})
        if other and not self.force:
            raise UserError(f"{path} was made with {other}: --force replaces it")
        return None if other else found

    def save(self, state):
        """Keep what is done so far; state: tensors in lists and dicts, numbers and texts."""
        with replace_file(self.path(".resume.pt")) as file:
            torch.save({**self.key, "state": state}, file)

    def write(self, ending, **content):
        """Write NAME + ending, a JSON file of these settings and weights with this content."""
        write_json(self.path(ending), {**self.key, **content}, separators=(",", ":"))

    def finish(self, facts, device):
        """Write NAME.json: these facts, and what is needed to repeat the measurement. Raises
        UserError if another process has finished one with other settings."""
        self.existing(".json")
        self.facts = {
            "run": self.run.path, "step": self.run.step, **self.key,
            "command": shlex.join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M"),
            **environment(device), **facts}
        write_json(self.path(".json"), self.facts, indent=1)
        self.path(".resume.pt").unlink(missing_ok=True)


def measure_all(results, measure, device):
    """The facts of every Result, a list of dicts. measure(result, title) returns those that are
    not there yet. Raises UserError if settings differ between runs."""
    for result in results:
        other = difference(result.key["settings"], results[0].key["settings"])
        if other:
            raise UserError(f"{results[0].run.path} has {other} as {result.run.path}: "
                            f"measure them in separate calls")
    for number, result in enumerate(results, 1):
        title = f"[{number}/{len(results)}] {result.run.path}"
        if result.facts:
            print(f"{title}: {result.path('.json')} of {result.facts['date']}", file=sys.stderr)
        else:
            result.finish(measure(result, title), device)
    return [result.facts for result in results]


def list_of(kind):
    """For argparse: different numbers from 0 on, int or float, such as 2,5,10."""
    def numbers(text):
        values = [kind(word) for word in text.split(",")]
        names = {format(value, "d" if kind is int else "g") for value in values}
        if len(names) < len(values) or not all(0 <= value < math.inf for value in values):
            raise argparse.ArgumentTypeError(f"{text} must be different numbers from 0 on")
        return values
    return numbers


# ------------------------------------------------------------------------------------- as one table


def read_results(paths):
    """Result files of one experiment as a list of dicts; "run" is the run beside the file. Raises
    UserError if settings differ, or if the weights of a run have changed since."""
    results = []
    for path in paths:
        result = read_json(path) | {"run": str(run_of(path))}
        now = digests(load_checkpoint(result["run"])["model"])
        changed = difference(now, {name: result.get(name) for name in now})
        if changed:
            raise UserError(f"{path} is of other weights than {result['run']} has now ({changed}): "
                            f"make it again with --force")
        results.append(result)
        other = difference(result["settings"], results[0]["settings"])
        if other:
            raise UserError(f"{paths[0]} was made with {other} as in {path}: make both again with "
                            f"the same settings")
    return results


def frame(paths):
    """A DataFrame with a row for each result file; lists stay lists. See read_results."""
    import pandas as pd
    return pd.json_normalize(read_results([*paths]))
