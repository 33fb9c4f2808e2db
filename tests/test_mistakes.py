"""Every mistake gets one clear line and leaves nothing behind: a table of commands and of what they must say.

    python -m pytest tests/test_mistakes.py

Each row is typed in a folder that holds data/ (tokens), out/run (a finished tiny run of train.py) and config.py
(its knobs). A row: the command, a part of its one line, and, where the mistake lies in the files, a function that
makes it. The next one is a line to add.
"""

import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "interp"), str(ROOT / "bench")]
import config as knobs
import train
from test_train import TINY, make_data

# ---- what can be wrong with the files: functions of the folder that the command is typed in


def flip(name, at=-1):
    """One bit of a file: of the byte in its middle, or at this place."""
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2 if at < 0 else at] ^= 1
        (folder / name).write_bytes(bytes(content))
    return damage


def meta(**changes):
    """Fields of data/meta.json; None takes one out."""
    def damage(folder):
        path = folder / "data" / "meta.json"
        fields = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return damage


def checkpoint(name, **changes):
    """Fields of a checkpoint of out/run; None takes one out."""
    def damage(folder):
        path = folder / "out" / "run" / name
        fields = {**torch.load(path, weights_only=True), **changes}
        torch.save({name: value for name, value in fields.items() if value is not None}, path)
    return damage


def text(name, content):
    """A file of this content."""
    return lambda folder: (folder / name).write_text(content)


def folder_named(name):
    return lambda folder: (folder / name).mkdir(parents=True)


RESUME = "train.py config.py --out=out/run --resume"

TRAIN = [
    ("train.py config.py --seed=18446744073709551616", "seed=18446744073709551616 must be a whole number from 0 to"),
    ("train.py config.py --clean_coeff=0 --ablated_coeff=0", "would train nothing"),
    ("train.py config.py --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("train.py raises.py", "config file raises.py does not run: ValueError: two lines", text("raises.py", "raise ValueError('''two\nlines''')")),
    ("train.py leaves.py", "config file leaves.py does not run: SystemExit: 3", text("leaves.py", "import sys; sys.exit(3)")),
]

TOY = "prepare.py toy --stories=20 --workers=1 --out="
FILES = "prepare.py --tokenizer=words --workers=1 --out=new --train "
GOOD_ROW = '{"text": "a"}\n'

PREPARE = [
    (TOY, "--out '' names no folder"),
    (f"{TOY}/", "--out '/' names no folder"),
    (TOY + "x" * 300, ".tmp (File name too long): choose another --out"),
    (f"{TOY}a\0b", ".tmp (embedded null byte): choose another --out"),
    (f"{TOY}config.py", "config.py is a file: choose another --out"),
    (f"{TOY}config.py/new", "new.tmp (Not a directory): choose another --out"),
    (f"{TOY}data", "already holds data: add --force"),
    (f"{TOY}new --seed=" + "9" * 70, "--seed must lie between"),
    (FILES + "x" * 300 + ".txt", "check the path after --train or --val"),
    (f"{FILES}a\0b.txt", "check the path after --train or --val"),
    (f"{FILES}a.jsonl", "line 2 is not a JSON object that can be read (Exceeds", text("a.jsonl", GOOD_ROW + "1" * 6000)),
    (f"{FILES}a.jsonl", "line 1 is not a JSON object that can be read (maximum", text("a.jsonl", "[" * 200_000)),
    (f"{FILES}a.jsonl", "a.jsonl: line 2: a int where text should be", text("a.jsonl", GOOD_ROW + '{"text": 1}')),
    (f"{FILES}config.py a.jsonl", "config.py: unknown kind of file", text("a.jsonl", GOOD_ROW)),
    (f"{FILES}a.jsonl b.jsonl", "b.jsonl: line 1: a dict where", text("a.jsonl", GOOD_ROW), text("b.jsonl", '{"text": {}}')),
]

EVAL = []

TABLE1 = []

ACDC = []

SAE = []

BENCH = []


# ---- how they are checked


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    make_data(folder / "data")
    lines = {**TINY, "max_iters": 4, "eval_interval": 2, "data": "data", "ablation": "local"}
    (folder / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in lines.items()))
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda *_: None)
        assert typed("train.py config.py --out=out/run") is None
    return folder


def typed(command):
    """What a script, called in this process, says as it leaves; None when all went well."""
    script, *words = shlex.split(command)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        try:
            knobs.cli(importlib.import_module(Path(script).stem).main)
        except SystemExit as ended:
            return ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("row", [*TRAIN, *PREPARE, *EVAL, *TABLE1, *ACDC, *SAE, *BENCH], ids=lambda row: row[0][:80])
def test_a_mistake_is_one_line_and_changes_nothing(row, template, tmp_path, monkeypatch):
    command, expected, *damage = row
    folder = shutil.copytree(template, tmp_path / "work")
    for spoil in damage:
        spoil(folder)
    before = contents(folder)
    monkeypatch.chdir(folder)
    message = typed(command)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert expected in message and len(message) < 600 + len(str(folder)) * 3
    assert contents(folder) == before
