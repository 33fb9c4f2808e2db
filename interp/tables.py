"""What table1.py and table2.py share: results of experiments, joined over seeds, as one table.

    runs = open_runs(TABLE, paths, data)                         every mistake shows here
    found, notes = read_experiments(EXPERIMENTS, runs)           or here
    rows = [describe_task(task) for task in runs.tasks]        or evaluate_task, which takes longer
    publish(TABLE, over_seeds(runs, rows, found), notes, runs.folder)

Runs that differ only in the seed are one row: the mean ± the sample standard deviation. What an
experiment has not looked at prints -. The table is printed, and saved as NAME.md, NAME.csv and
pictures, all of them or none.
"""

import csv
import io
import json
import os
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

from eval import trained_with
from interp.common import (
    AVERAGED, cells, check_writable, column, group_seeds, join_seeds, name_recipes, open_tasks,
    print_table)
from interp.results import is_of, read_result, refuse_mixed, result_path
from model import replace_file
from prepare import UserError


class Experiment(NamedTuple):
    """What a table takes from the NAME.json of an experiment."""

    numbers: Callable  # result -> {name: number}, without what the result lacks
    reading: str  # how they were read, for the notes


class Table(NamedTuple):
    """How a table is printed, and as what it is saved."""

    name: str  # of its files
    parts: list  # of what is printed and of NAME.md: lists of columns (heading, row -> text)
    spreadsheet: list  # (heading, row -> a number or a text or None), of NAME.csv, with every digit
    pictures: dict  # {file name: rows -> its bytes, or None where there is nothing to draw}
    notes: tuple  # printed below it


# ----------------------------------------------------------------------- what the experiments found


def read_experiment(name, numbers_of, run):
    """(result, numbers): what NAME.json beside the run's checkpoint says; None where there is none.

    Raises UserError when it is damaged or of other weights.
    """
    path = result_path(run.path, f"{name}.json")
    if not path.exists():
        return None
    result = read_result(path)
    if not is_of(result, run.model):
        raise UserError(f"{path} is not of the checkpoint that {run.path} has now: make it again "
                        f"with --force; it came from python {result['command']}")
    try:
        numbers = numbers_of(result)
        result["warnings"] = [str(warning) for warning in result.get("warnings", [])]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"{path} is damaged, or of an earlier version: delete it, "
                        f"and make it again") from None
    return result, numbers


def read_experiments(experiments, runs):
    """A dict of numbers for every run, and notes: how they were found, and what is wrong with them.

    experiments: {name: Experiment}. Raises UserError on results that do not belong in one table.
    """
    opened = [task.run for task in runs.tasks]
    found, notes = [{} for _ in opened], []
    for name, (numbers_of, reading) in experiments.items():
        settings_of, warnings = {}, []
        for run, numbers_of_run in zip(opened, found):
            experiment = read_experiment(name, numbers_of, run)
            if experiment is None:
                continue
            result, numbers = experiment
            numbers_of_run |= numbers
            settings_of[run.path] = result["settings"]
            warnings += [f"warning: {run.path}: {warning}" for warning in result["warnings"]]
        if settings_of:
            refuse_mixed(settings_of)
            settings = next(iter(settings_of.values())).items()
            words = [f"{knob} {value}" for knob, value in settings if value is not None]
            notes.append(f"{name}: {', '.join(words)}; {reading}")
        notes += warnings
    return found, notes


def refuse_other_texts(tasks):
    """Raises UserError when two runs would be measured on different data."""
    first = tasks[0]
    for task in tasks[1:]:
        if task.meta["checksum"] != first.meta["checksum"]:
            raise UserError(f"{first.run.path} is measured on {first.data}, {task.run.path} on "
                            f"{task.data}, which are other texts: tabulate them apart")


# ----------------------------------------------------------------------------------- runs as rows


class Runs(NamedTuple):
    """The runs of a table, all checked before the first is measured."""

    tasks: list  # eval.Tasks
    groups: list  # lists of places in tasks: the runs that differ only in the seed
    folder: Path  # that holds them all, where the table is saved


def open_runs(table, paths, data=None):
    """The Runs of these paths. Raises UserError where they or the folder allow no such Table."""
    tasks = open_tasks(paths, data)
    refuse_other_texts(tasks)
    groups = group_seeds(tasks)
    parents = [Path(task.run.path).absolute().parent for task in tasks]
    folder = Path(os.path.commonpath(parents))
    for name in (f"{table.name}.md", f"{table.name}.csv", *table.pictures):
        check_writable(folder / name)
    return Runs(tasks, groups, folder)


def over_seeds(runs, rows, found):
    """A row for every group of runs, called after its recipe; see eval.join_seeds.

    rows: of every run what describe_task says, and what was measured; found: what experiments
    found.
    """
    rows = [row | numbers for row, numbers in zip(rows, found)]
    name_recipes(rows, [trained_with(task.run) for task in runs.tasks])
    names = dict.fromkeys(chain(AVERAGED, *found))
    return join_seeds(rows, runs.groups, names)


# -------------------------------------------------------------------------------- print, draw, save


HEAD = [("run", column("run")), ("recipe", column("recipe")), ("layer", column("layer")),
        ("seeds", column("n"))]


def shown_parts(table, rows):
    """Those parts of a Table in which a row has something, each with the columns it begins with."""
    return [HEAD + columns for columns in table.parts if cells(rows, columns)]


def markdown(part, rows):
    """One part of a table as text."""
    heading, *lines = cells(rows, part)
    texts = [f"| {' | '.join(line)} |\n" for line in (heading, ["---"] * len(heading), *lines)]
    return "".join(texts)


def entry(name):
    """What a spreadsheet has of a row, None where the row lacks it."""
    def value(row):
        return row.get(name)
    return value


def seeds_entries(names):
    """Of a spreadsheet: what a row is, then these numbers and their deviations over its seeds."""
    entries = [(name, entry(name)) for name in ("run", "recipe", "ablation", "k_attn", "k_mlp")]
    entries.append(("seeds", entry("n")))
    for name in names:
        entries += [(name, entry(name)), (f"{name}_sd", entry(f"{name}_sd"))]
    return entries


def as_csv(rows, entries):
    """The table as text, entries (heading, row -> value)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([heading for heading, _ in entries])
    for row in rows:
        writer.writerow([value(row) for _, value in entries])
    return text.getvalue()


def as_png(figure):
    """The bytes of a .png of a matplotlib figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def draw_seeds(axes, rows, name):
    """A dot for every seed of a row that has this number, and a bar for their mean, row by row."""
    for x, row in enumerate(rows):
        values = [one[name] for one in row["rows"] if name in one]
        axes.plot([x] * len(values), values, "o", color="tab:blue", alpha=0.5)
        if name in row:
            axes.plot([x - 0.3, x + 0.3], [row[name]] * 2, color="tab:blue")


def save_together(contents):
    """{path: bytes}. Where one of them finds no room, none takes its place: they are one result."""
    with ExitStack() as stack:
        for path, content in contents.items():
            file = stack.enter_context(replace_file(path))
            file.write(content)
            file.flush()  # a full disk shows here, when nothing has been replaced yet


def publish(table, rows, notes, folder, as_json=False):
    """Print the rows of a Table, as JSON or else with all notes, and save it. Raises ModelError."""
    parts = shown_parts(table, rows)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        for place, part in enumerate(parts):
            if place:
                print()
            print_table(rows, part)
        print(*table.notes, *notes, sep="\n")
    texts = [markdown(part, rows) for part in parts] + [f"{note}\n" for note in notes]
    contents = {
        f"{table.name}.md": "\n".join(texts).encode(errors="replace"),
        f"{table.name}.csv": as_csv(rows, table.spreadsheet).encode(errors="replace")}
    for name, draw in table.pictures.items():
        contents[name] = draw(rows)
    saved = {folder / name: content for name, content in contents.items() if content}
    save_together(saved)
    if not as_json:
        print(f"saved in {folder}: {', '.join(path.name for path in saved)}")
