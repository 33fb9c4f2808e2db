"""What the programs of interp/ share: the runs of a table, means over seeds, printing, flags."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

import config as knobs
from eval import DEFAULTS, Run, describe_run, evaluate_run, find_data, open_run, run_paths
from model import replace_file
from prepare import UserError, load_tokens

# what the runs of a group have in common, and what is averaged over them
SHARED = ("recipe", "ablation", "gate", "attn_unit", "k_attn", "k_mlp", "ramp_start", "ramp_end",
          "data", "checksum", "tokens", "stories")
AVERAGED = (
    "step", "loss_clean", "ppl_clean", "bits_per_byte_clean",
    "loss_ablated", "ppl_ablated", "bits_per_byte_ablated",
    "attn_ever", "attn_per_story", "mlp_ever", "mlp_per_story", "l1", "l1_all", "l1_blocks")


class Task(NamedTuple):
    """A run and the text to measure it on."""

    run: Run
    data: str  # the folder of the text
    meta: dict  # its meta.json
    tokens: np.ndarray  # its validation split, uint16 (n,)


def open_tasks(paths, data=None):
    """All of the runs and their data, checked: before the first takes its minutes."""
    tasks = []
    for path in run_paths(paths):
        run = open_run(path)
        folder, meta = find_data(run, data)
        tasks.append(Task(run, folder, meta, load_tokens(folder, "val")))
    return tasks


def describe_task(task):
    """Its row before anything is measured: see eval.describe_run."""
    return describe_run(task.run, task.data, task.meta)


def evaluate_task(task, batch_size, device):
    """Its row with everything that eval.py measures: a dict."""
    return evaluate_run(task.run, task.data, task.meta, batch_size, device)


def group_seeds(tasks):
    """Lists of places in tasks, of the runs that differ only in the seed.

    Raises UserError where a seed comes twice.
    """
    groups = {}  # what the runs have in common, as text -> {seed: place}
    for place, task in enumerate(tasks):
        row = describe_task(task)
        own = {name: row.pop(name) for name in ("run", "step", "seed", "data")}
        group = groups.setdefault(json.dumps(row, sort_keys=True), {})
        if own["seed"] in group:
            other = tasks[group[own["seed"]]].run
            raise UserError(f"{other.path} and {task.run.path} are the same run with the same "
                            f"seed: give one of them")
        group[own["seed"]] = place
    return [list(group.values()) for group in groups.values()]


def averages(rows, names):
    """{name: the mean of this number over the rows}, and NAME_sd, its sample standard deviation.

    Where only some of the rows have a number, the mean is over those, and NAME_n says how many.
    The spread of a single one is None.
    """
    means = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            continue  # the baseline has no ablated stream
        means[name] = np.mean(values)
        means[f"{name}_sd"] = np.std(values, ddof=1) if len(values) > 1 else None
        if len(values) < len(rows):
            means[f"{name}_n"] = len(values)
    return means


def join_seeds(rows, groups, averaged=AVERAGED):
    """One row for every group, a list of places in rows: see averages."""
    table = []
    for places in groups:
        group = [rows[place] for place in places]
        paths = [row["run"] for row in group]
        joined = {"run": os.path.commonprefix(paths) + "*" if len(group) > 1 else paths[0]}
        joined |= {"n": len(group), "seeds": [row["seed"] for row in group]}
        joined |= {name: group[0][name] for name in SHARED if name in group[0]}
        table.append(joined | averages(group, averaged) | {"rows": group})
    return table


def column(name, form=""):
    """A column of this entry of a row, printed in this format."""
    def show(row):
        return format(row[name], form)
    return show


def number(name, form):
    """A column of this number, ± its spread over seeds or standard error where it has one."""
    def show(row):
        text = format(row[name], form)
        spread = row.get(f"{name}_sd", row.get(f"{name}_se"))
        if spread is not None:
            text += f" ± {spread:{form}}"
        if f"{name}_n" in row:
            text += f" ({row[f'{name}_n']} of {row['n']})"
        return text
    return show


def ablation(row):
    """What tells the models of one size apart: "none", or such as "local k=1,2, heads"."""
    if not row["k_mlp"]:
        return row["ablation"]
    text = f"{row['ablation']} k={row['k_attn']}"
    if row["k_mlp"] != row["k_attn"]:
        text += f",{row['k_mlp']}"
    if row["attn_unit"] == "head":
        text += ", heads"
    if row["gate"] != "softmax":
        text += f", {row['gate']}"
    if row["ramp_end"]:
        text += f", ramp {row['ramp_start']:g} to {row['ramp_end']:g}"
    return text


def name_recipes(rows, configs):
    """Call every row, row["recipe"], after its ablation and those of its other knobs in which rows
    differ and which are not at their default.

    configs: what the rows were trained with, see trained_with.
    """
    told = ("ablation", "k_attn", "k_mlp", "attn_unit", "gate", "ramp_start", "ramp_end",
            "seed", "eval_interval", "eval_windows")  # or not to be told
    differing = []
    for name in knobs.decisive(DEFAULTS):
        values = {config[name] for config in configs}
        if len(values) > 1 and name not in told:
            differing.append(name)
    for row, config in zip(rows, configs):
        words = [ablation(row).replace("none", "baseline")]
        words += [f"{name} {config[name]}" for name in differing if config[name] != DEFAULTS[name]]
        row["recipe"] = ", ".join(words)


def cells(rows, columns):
    """The table as text, a tuple per line, headings first.

    Missing cells, where the row lacks an entry or it is None, print -. Columns of nothing else are
    left out.
    """
    known = []
    for row in rows:
        known.append({name: value for name, value in row.items() if value is not None})
    shown = []
    for heading, show in columns:
        texts = [heading]
        for row in known:
            try:
                texts.append(show(row))
            except KeyError:  # the baseline has no ablated stream
                texts.append("-")
        if set(texts[1:]) != {"-"}:
            shown.append(texts)
    return list(zip(*shown))


def print_table(rows, columns):
    lines = cells(rows, columns)
    widths = [max(map(len, texts)) for texts in zip(*lines)]
    for first, *others in lines:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *padded]))


def save_figure(path, figure):
    """A matplotlib figure, atomically, in the format that path ends in."""
    with replace_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)


def check_writable(path):
    """Raises UserError when path cannot be written: now, before the work whose result it is."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "there is a folder of that name")
        with open(f"{path}.tmp", "wb"):
            pass
        os.remove(f"{path}.tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def run_parser(description):
    """An argparse parser for a program that works on runs: which ones, and on which device."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    parser.add_argument("--device", default="auto", help="auto takes a GPU if there is one")
    return parser


def measuring_parser(description):
    """The same for a program that evaluates runs: on which data, how fast, for whom it prints."""
    parser = run_parser(description)
    add = parser.add_argument
    add("--data", help="prepared data to measure on (default: the run's own)")
    add("--batch_size", type=int, default=8, help="windows at a time: for speed and memory only")
    add("--json", action="store_true", help="print JSON, with each unit's firing rate, and no more")
    return parser


def check_range(args, name, low, high=math.inf):
    """Raises UserError where a flag was given and is not in this range."""
    value = getattr(args, name)
    if value is not None and not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high:,}"
        raise UserError(f"--{name}={value} must be {limits}")


def check_picture(path):
    """Raises UserError when --plot names a file that cannot be written or is no picture.

    None is no picture.
    """
    if path is None:
        return
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot={path} must end in .png, .pdf or .svg")
    check_writable(path)


def parse_list(flag, text, kind):
    """"2,5,10" -> [2, 5, 10], of kind int or float. Raises UserError."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    in_range = all(0 <= value < 2**63 for value in values)
    if not values or len(set(values)) < len(values) or not in_range:
        kinds = "numbers" if kind is float else "whole numbers"
        raise UserError(f"{flag}={text} must be {kinds} from 0 on, each once, with commas between "
                        f"them, such as 2,5,10")
    return values
