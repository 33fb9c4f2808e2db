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


def changed_knobs(**changes):
    """Knobs that last.pt says it was trained with; None takes one out."""
    def damage(folder):
        knobs_of = torch.load(folder / "out" / "run" / "last.pt", weights_only=True)["train_config"] | changes
        checkpoint("last.pt", train_config={name: value for name, value in knobs_of.items() if value is not None})(folder)
    return damage


BY_NUMBER = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"params": [0]}]}  # torch's own state_dict
RESUME = "train.py config.py --out=out/run --resume"

TRAIN = [
    ("train.py config.py --seed=18446744073709551616", "seed=18446744073709551616 must be a whole number from 0 to"),
    ("train.py config.py --clean_coeff=0 --ablated_coeff=0", "would train nothing"),
    ("train.py config.py --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("train.py raises.py", "config file raises.py does not run: ValueError: two lines", text("raises.py", "raise ValueError('''two\nlines''')")),
    ("train.py leaves.py", "config file leaves.py does not run: SystemExit: 3", text("leaves.py", "import sys; sys.exit(3)")),
    ("train.py config.py --n_embd=4000000", "GB of memory, and cpu has"),
    ("train.py config.py --n_embd=400000000000", "no machine can hold such a model"),
    ("train.py config.py --n_layer=1000000000", "GB of memory, and cpu has"),
    ("train.py config.py --batch_size=100000000000", "GB of memory, and cpu has"),
    (RESUME, "last.pt is damaged", flip("out/run/last.pt")),
    (RESUME, "no training state to go on from (since missing", checkpoint("last.pt", since=None)),
    (RESUME, "no training state to go on from (step missing or of a wrong type)", checkpoint("last.pt", step="3")),
    (RESUME, "no training state to go on from (metrics missing", checkpoint("last.pt", metrics="none")),
    (RESUME, "no training state to go on from (train_config, data missing", checkpoint("last.pt", train_config=3, data=None)),
    (RESUME, "with other knobs (seed)", changed_knobs(seed=None)),
    (RESUME, "with other knobs (vocab_size): it can be evaluated, but not continued", changed_knobs(vocab_size=None)),  # earlier
    (RESUME, "to continue it add --seed=x", changed_knobs(seed="x")),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", since=[1.0])),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", since=["a"] * 5)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", metrics=[{"step": 0}])),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", step=5)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", optimizer={})),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", optimizer=BY_NUMBER)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", model={"a": torch.zeros(2)})),
]

PREPARE = []

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
