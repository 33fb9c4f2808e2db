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
import subprocess
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


def config_says(**changes):
    """Fields of the model's config in best.pt of out/run, which fit its weights all the same."""
    def damage(folder):
        found = torch.load(folder / "out" / "run" / "best.pt", weights_only=True)
        checkpoint("best.pt", config={**found["config"], **changes})(folder)
    return damage


def text(name, content):
    """A file of this content."""
    return lambda folder: (folder / name).write_text(content)


def autoencoders(*damage):
    """Autoencoders in out/run, and then this damage."""
    def spoil(folder):
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            sae = importlib.import_module("sae")
            patch.setattr(sae, "draw_saes", lambda *_: None)
            assert typed(SAE_WORDS) is None
        for change in damage:
            change(folder)
    return spoil


def unfinished(folder):
    """The autoencoders of out/run as a stop would leave them."""
    done = folder / "out" / "run" / "sae.pt"
    torch.save({**torch.load(done, weights_only=True), "state": {"rows": [], "current": None}}, done.with_name("sae.resume.pt"))
    done.with_name("sae.json").unlink()


def circuits(*damage):
    """A circuit in out/run, and then this damage."""
    def spoil(folder):
        pair()(folder)
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module("acdc"), "draw_circuit", lambda *_: None)
            assert typed(PAIRS) is None
        for change in damage:
            change(folder)
    return spoil


def graphs(*damage):
    """Graphs of neurons in out/run, and then this damage."""
    def spoil(folder):
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module("n2g"), "draw_layers", lambda *_: None)
            assert typed("n2g.py out/run --device=cpu") is None
        for change in damage:
            change(folder)
    return spoil


def unfinished_graphs(folder):
    """The graphs of out/run as a stop would leave them."""
    done = folder / "out" / "run" / "n2g.json"
    found = json.loads(done.read_text())
    head = {name: found[name] for name in ("checkpoint", "settings")}
    state = {"values": torch.zeros(2, 2), "positions": torch.zeros(2, 2), "layers": [], "seconds": 0.0}
    torch.save({**head, "state": state}, done.with_name("n2g.resume.pt"))
    done.unlink()


def says(name, path, value):
    """An entry of a JSON file, or of a file of torch, such as "circuits 0 edges"; None takes it out."""
    def damage(folder):
        binary = name.endswith(".pt")
        content = torch.load(folder / name, weights_only=True) if binary else json.loads((folder / name).read_text())
        *outer, last = [int(key) if key.isdecimal() else key for key in path.split()]
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
        torch.save(content, folder / name) if binary else (folder / name).write_text(json.dumps(content))
    return damage


def unfinished_circuits(folder):
    """The circuit of out/run as a stop would leave it."""
    done = folder / "out" / "run" / "acdc.json"
    found = json.loads(done.read_text())
    head = {name: found[name] for name in ("checkpoint", "settings")}
    torch.save({**head, "state": {"circuits": [], "sweep": None}}, done.with_name("acdc.resume.pt"))
    done.unlink()


def explained(*damage):
    """Explained neurons in out/run, and then this damage."""
    def spoil(folder):
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module("explain"), "draw_scores", lambda *_: None)
            assert typed(EXPLAIN_WORDS) is None
        for change in damage:
            change(folder)
    return spoil


def exported(*damage):
    """out/run as the Hugging Face folder hub, and then this damage."""
    def spoil(folder):
        with contextlib.chdir(folder):
            assert typed("hf.py export out/run hub --no_figures") is None
        for change in damage:
            change(folder)
    return spoil


def unfinished_explanations(folder):
    """The neurons of out/run as a stop would leave them."""
    done = folder / "out" / "run" / "explain.json"
    found = json.loads(done.read_text())
    state = {"model": [], "control": [], "seconds": {"model": 0.0, "control": 0.0}}
    torch.save({**{name: found[name] for name in ("checkpoint", "settings")}, "state": state}, done.with_name("explain.resume.pt"))
    done.unlink()


def without(name):
    return lambda folder: (folder / name).unlink()


def folder_named(name):
    return lambda folder: (folder / name).mkdir(parents=True)


PAIR = {"clean": "abc", "corrupt": "abd", "answer": "a", "wrong": "b"}  # bytes, which all are tokens


def pair(**changes):
    """pairs.json, a --prompts file: this one prompt with some of its texts changed."""
    return text("pairs.json", json.dumps([{**PAIR, **changes}]))


def binary(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def diverged(folder):
    """out/run as it is when its training has diverged: weights that are not finite."""
    path = folder / "out" / "run" / "best.pt"
    fields = torch.load(path, weights_only=True)
    fields["model"]["transformer.ln_f.weight"].fill_(float("nan"))
    torch.save(fields, path)


def changed_knobs(**changes):
    """Knobs that last.pt says it was trained with; None takes one out."""
    def damage(folder):
        knobs_of = torch.load(folder / "out" / "run" / "last.pt", weights_only=True)["train_config"] | changes
        checkpoint("last.pt", train_config={name: value for name, value in knobs_of.items() if value is not None})(folder)
    return damage


def optimizer_entry(name, change):
    """One entry of AdamW's state in last.pt, changed."""
    def damage(folder):
        path = folder / "out" / "run" / "last.pt"
        fields = torch.load(path, weights_only=True)
        moments = next(iter(fields["optimizer"]["state"].values()))
        moments[name] = change(moments[name])
        torch.save(fields, path)
    return damage


BY_NUMBER = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"params": [0]}]}  # torch's own state_dict
OTHER_WORDS = {"name": "words", "pieces": [f" other{i}" for i in range(43)]}
RESUME = "train.py config.py --out=out/run --resume"

TRAIN = [
    ("train.py config.py --seed=18446744073709551616", "seed=18446744073709551616 must be a whole number from 0 to"),
    ("train.py config.py --clean_coeff=0 --ablated_coeff=0", "would train nothing"),
    ("train.py config.py --clean_coeff=0 --ramp_start=0.3 --ramp_end=0.8", "would train nothing, or nothing at first"),
    ("train.py config.py --ramp_start=0.3", "ramp_start=0.3 and ramp_end=0.0 must be shares of the run, and the end not before the start"),
    ("train.py config.py --ramp_start=30 --ramp_end=80", "must be shares of the run"),
    ("train.py config.py --ramp_end=nan", "must be shares of the run"),
    ("train.py config.py --gate=constnat", "gate=constnat is not one of softmax, sigmoid, constant"),
    ("train.py config.py --embd_std=-1", "embd_std=-1.0 must be above 0"),
    ("train.py config.py --anneal_end=1.5", "anneal_end=1.5 must be a share of the run, not before ramp_start=0.0"),
    ("train.py config.py --ramp_start=0.5 --ramp_end=0.6 --anneal_end=0.4", "not before ramp_start=0.5"),
    ("train.py config.py --freeze=base --ablation=none", "freeze=base and no ablated loss in the first update"),
    ("train.py config.py --freeze=base --ramp_start=0.2 --ramp_end=0.3", "nothing at first: add --ramp_start=0 --ramp_end=0"),
    ("train.py config.py --freeze=gates", "freeze=gates is not one of none, base"),
    ("train.py config.py --init_from=out/run --n_layer=3 --n_head=1", "out/run has another geometry: add --n_layer=2 --n_head=2"),
    ("train.py config.py --init_from=out/run --block_size=64", "out/run has another geometry: add --block_size="),
    ("train.py config.py --init_from=out/run", "out/run has another tokenizer than data", checkpoint("best.pt", tokenizer=OTHER_WORDS)),
    ("train.py config.py --init_from=out/run/last.pt", "last.pt is damaged", flip("out/run/last.pt")),
    ("train.py config.py --init_from=out/no/run", "there is no folder out/no/run, and the Hugging Face hub does not give it"),
    ("train.py config.py --init_from=data", "data is no folder of Hugging Face's"),
    (f"train.py config.py --out={'a' * 300}", "File name too long"),
    (f"train.py config.py --resume --out={'a' * 300}", "leave it out to start this run"),
    (f"train.py config.py --init_from={'a' * 300}", "and the Hugging Face hub does not give it"),
    ("train.py config.py --clean_coeff=1e308", "clean_coeff=1e+308 must be a number from 0 to 1e38"),
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
    (RESUME, "to continue it add --seed=x", changed_knobs(seed="x")),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", since=[1.0])),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", since=[None] * 5)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", step=-1)),
    (RESUME, "its progress, weights or optimizer are not those", optimizer_entry("exp_avg", torch.Tensor.long)),
    (RESUME, "its progress, weights or optimizer are not those", optimizer_entry("step", lambda step: step + 1)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", since=["a"] * 5)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", metrics=[{"step": 0}])),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", step=5)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", optimizer={})),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", optimizer=BY_NUMBER)),
    (RESUME, "its progress, weights or optimizer are not those", checkpoint("last.pt", model={"a": torch.zeros(2)})),
]

TOY = "prepare.py toy --stories=20 --workers=1 --out="
FILES = "prepare.py --tokenizer=words --workers=1 --out=new --train "
GOOD_ROW = '{"text": "a"}\n'

PREPARE = [
    (TOY, "--out '' names no folder"),
    (f"{TOY}/", "--out '/' names no folder"),
    (f"{TOY}.", "--out '.' names no folder"),
    (f"{TOY}..", "--out '..' names no folder"),
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
    (f"{FILES}a.jsonl", "a.jsonl: line 2: int where text should be", text("a.jsonl", GOOD_ROW + '{"text": 1}')),
    (f"{FILES}config.py a.jsonl", "config.py: unknown kind of file", text("a.jsonl", GOOD_ROW)),
    (f"{FILES}a.jsonl b.jsonl", "b.jsonl: line 1: dict where", text("a.jsonl", GOOD_ROW), text("b.jsonl", '{"text": {}}')),
]

NO_DATA = "no prepared data in nowhere (no meta.json): name the folder that has it with --data"
MISFIT = "out/run: the checkpoint's config and weights do not fit"
OTHER_TOKENS = "val.bin is damaged, its sha256 is not that of meta.json"

EVAL = [
    ("eval.py", "the following arguments are required: runs"),
    ("eval.py out/nowhere", "no checkpoint at out/nowhere"),
    ("eval.py ''", "the name of a run is empty: give a run folder"),
    (f"eval.py {'a' * 300}", "no checkpoint at aaa"),
    ("eval.py out", "no checkpoint at out/best.pt"),
    ("eval.py config.py", "config.py is damaged, or no file of this project"),
    ("eval.py out/run --data=nowhere", NO_DATA),
    ("eval.py out/run --data=", "no prepared data in"),
    ("eval.py out/run --data=data/val.bin", "no prepared data in data/val.bin"),
    (f"eval.py out/run --data={'a' * 300}", "no prepared data in aaa"),
    ("eval.py out/run --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("eval.py out/run --batch_size=0", "--batch_size=0 must be at least 1"),
    ("eval.py out/run --sample=a --seed=18446744073709551616", "--seed=18446744073709551616 must be from 0 to"),
    ("eval.py out/run --sample=a --top_k=0", "--top_k=0 must be at least 1"),
    ("eval.py out/run --sample=a --top_p=2", "--top_p=2.0 must be from 1e-06 to 1"),
    ("eval.py out/run --sample=a --temperature=1e-320", "--temperature=1e-320 must be at least 1e-06, or 0: greedy"),
    ("eval.py out/run --sample=a --max_new_tokens=-1", "--max_new_tokens=-1 must be at least 1"),
    ("eval.py out/run --plot=/proc/a.png", "cannot write /proc/a.png: No such file or directory"),
    ("eval.py out/run --plot=new/a.png", "cannot write new/a.png: No such file or directory"),
    ("eval.py out/run --plot=a.png", "cannot write a.png: there is a folder of that name", folder_named("a.png")),
    ("eval.py out/run --plot=a.png", "cannot write a.png: Is a directory", folder_named("a.png.tmp")),
    ("eval.py out/run --plot=a", "--plot=a must end in .png, .pdf or .svg"),
    ("eval.py out/run --plot=a.png", "metrics.jsonl is damaged", text("out/run/metrics.jsonl", '{"step": 2, "va')),
    ("eval.py out/run out/run/last.pt --over_seeds", "out/run and out/run/last.pt are the same run with the same seed"),
    ("eval.py out/run", "out/run/best.pt is damaged", flip("out/run/best.pt")),
    ("eval.py out/run out/run/last.pt", "out/run/last.pt is damaged", flip("out/run/last.pt")),
    ("eval.py out/run", "out/run/best.pt is damaged", text("out/run/best.pt", "")),
    ("eval.py out/run", "out/run was not written by train.py: it has no 'step'", checkpoint("best.pt", step=None)),
    ("eval.py out/run", "it has no 'train_config'", checkpoint("best.pt", train_config=[])),
    ("eval.py out/run", "it has no 'seed'", checkpoint("best.pt", train_config={"data": "data"})),
    ("eval.py out/run", "it has no 'tokenizer'", checkpoint("best.pt", tokenizer="gpt2")),
    ("eval.py out/run", MISFIT, checkpoint("best.pt", model={})),
    ("eval.py out/run", "out/run: ", checkpoint("best.pt", config={"n_layer": "two"})),
    ("eval.py out/run", OTHER_TOKENS, flip("data/val.bin")),
    ("eval.py out/run", "val.bin has 3 bytes where meta.json promises 800", text("data/val.bin", "abc")),
    ("eval.py out/run", "data/meta.json is damaged", text("data/meta.json", "{")),
    ("eval.py out/run", "data/meta.json is damaged", meta(eot=3)),
    ("eval.py out/run", "data has another tokenizer than the one out/run", meta(tokenizer=OTHER_WORDS)),
    ("eval.py out/run", "data has changed since out/run was trained on it (checksum def, not ", meta(checksum="def")),
    ("eval.py out/run", "out/run is damaged: its config says k_mlp=5, its training config 2", config_says(k_mlp=5)),
]

TABLE1 = [
    ("table1.py out/nowhere", "no checkpoint at out/nowhere"),
    ("table1.py out/run --batch_size=0", "--batch_size=0 must be at least 1"),
    ("table1.py out/run --data=nowhere", NO_DATA),
    ("table1.py out/run out/run/last.pt", "out/run and out/run/last.pt are the same run with the same seed"),
    ("table1.py out/run", "table1.md: there is a folder of that name", folder_named("out/table1.md")),
    ("table1.py out/run", "table1.csv: there is a folder of that name", folder_named("out/table1.csv")),
    ("table1.py out/run", "table1.png: there is a folder of that name", folder_named("out/table1.png")),
    ("table1.py out/run", "bargain.png: there is a folder of that name", folder_named("out/bargain.png")),
    ("table1.py out/run", "out/run/acdc.json is damaged: delete it", text("out/run/acdc.json", '{"run": "out/run", "checkp')),
    ("table1.py out/run", "out/run/sae.json is damaged: delete it", text("out/run/sae.json", "[" * 200_000)),
    ("table1.py out/run", "out/run/best.pt is damaged", flip("out/run/best.pt")),
    ("table1.py out/run", OTHER_TOKENS, flip("data/val.bin")),
]

WRONG_GRAPHS = [("layers", None), ("layers", []), ("layers 0 pool", 5), ("layers 0 density_mean_all", "x"), ("all", None), ("all f1", "x"),
                ("seconds", None)]
WRONG_STATES_OF_GRAPHS = [("state", 5), ("state layers", 5), ("state layers", [5]), ("state values", None), ("state seconds", "x")]

PAIRS = "acdc.py out/run --prompts=pairs.json"

ACDC_RESULT = "out/run/acdc.json"
WRONG_CIRCUITS = [("circuits", None), ("circuits", []), ("circuits", 5), ("circuits 0", 5), ("circuits 0 edges", "x"),
                  ("circuits 0 kinds", None), ("warnings", None), ("warnings", 5), ("ioi_exact", "x"),
                  ("ablated_exact", "x"), ("ablated_right", None)]
WRONG_STATES = [("state", 5), ("state", {}), ("state circuits", 5), ("state circuits", [5]), ("state sweep", {})]

ACDC = [
    ("acdc.py", "the following arguments are required: runs"),
    ("acdc.py out/run", "only 0 of our names, 0 places and 0 objects are single tokens of this tokenizer"),
    ("acdc.py out/run --nonsense", "unrecognized arguments: --nonsense"),
    ("acdc.py nowhere", "no checkpoint at nowhere"),
    ("acdc.py nowhere.pt", "no checkpoint at nowhere.pt"),
    ("acdc.py foreign.pt", "foreign.pt was not written by train.py",
     lambda folder: torch.save({"config": {}, "model": {}}, folder / "foreign.pt")),
    ("acdc.py out/run", "best.pt is damaged", flip("out/run/best.pt")),
    ("acdc.py out/run --tau=a", "--tau=a must be numbers from 0 on, each once"),
    ("acdc.py out/run --tau=", "--tau= must be numbers from 0 on, each once"),
    ("acdc.py out/run --tau=0.1,", "--tau=0.1, must be numbers from 0 on, each once"),
    ("acdc.py out/run --tau=-1", "--tau=-1 must be numbers from 0 on, each once"),
    ("acdc.py out/run --tau=inf", "--tau=inf must be numbers from 0 on, each once"),
    ("acdc.py out/run --tau=0.1,nan", "--tau=0.1,nan must be numbers from 0 on, each once"),
    ("acdc.py out/run --tau=0.1,0.10", "--tau=0.1,0.10 must be numbers from 0 on, each once"),
    ("acdc.py out/run --count=0", "--count=0 must be from 1 to 10,000"),
    ("acdc.py out/run --count=10001", "--count=10001 must be from 1 to 10,000"),
    ("acdc.py out/run --orders=-1", "--orders=-1 must be from 0 to 1,000"),
    ("acdc.py out/run --orders=1001", "--orders=1001 must be from 0 to 1,000"),
    ("acdc.py out/run --seed=-1", "--seed=-1 must be from 0 to 9,223,372,036,854,775,807"),
    ("acdc.py out/run --seed=9223372036854775808", "--seed=9223372036854775808 must be from 0 to"),
    ("acdc.py out/run --seed=1.5", "argument --seed: invalid int value: '1.5'"),
    ("acdc.py out/run --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("acdc.py out/run --dtype=float16", "argument --dtype: invalid choice: 'float16'"),
    ("acdc.py out/run --plot=all.gif", "--plot=all.gif must end in .png, .pdf or .svg"),
    ("acdc.py out/run --plot=nowhere/all.png", "cannot write nowhere/all.png"),
    ("acdc.py out/run --plot=all.png", "cannot write all.png: there is a folder of that name", folder_named("all.png")),
    (PAIRS, "cannot read prompts from pairs.json: No such file"),
    (PAIRS, "cannot read prompts from pairs.json: Is a directory", folder_named("pairs.json")),
    (f"{PAIRS}{'n' * 300}", "File name too long"),
    (PAIRS, "cannot read prompts from pairs.json: Expecting value", text("pairs.json", "not json")),
    (PAIRS, "cannot read prompts from pairs.json", binary("pairs.json", b"\xff\xfe")),
    (PAIRS, "cannot read prompts from pairs.json", text("pairs.json", "[" * 200_000)),
    (PAIRS, "cannot read prompts from pairs.json", text("pairs.json", "[1" + "0" * 6_000 + "]")),
    (PAIRS, "pairs.json must be a list of", text("pairs.json", "[]")),
    (PAIRS, "pairs.json must be a list of", text("pairs.json", "{}")),
    (PAIRS, "pairs.json must be a list of", text("pairs.json", "[1]")),
    (PAIRS, "pairs.json must be a list of", text("pairs.json", '[{"clean": "a"}]')),
    (PAIRS, "pairs.json must be a list of", pair(wrong=None)),
    (PAIRS, "both must be equally long", pair(corrupt="ab")),
    (PAIRS, "the corrupt prompt must differ", pair(corrupt=PAIR["clean"])),
    (PAIRS, "the corrupt prompt must differ", pair(clean="", corrupt="")),
    (PAIRS, "the wrong answer from the right one", pair(wrong=PAIR["answer"])),
    (PAIRS, "has 17 tokens, the model takes 16", pair(clean="a" * 17, corrupt="b" * 17)),
    (PAIRS, "'ab' is 2 tokens of this tokenizer", pair(answer="ab")),
    (PAIRS, "'' is 0 tokens of this tokenizer", pair(wrong="")),
    (PAIRS, "out/run/acdc.json is damaged, or of an earlier version: delete it, or add --force", pair(), text("out/run/acdc.json", "{")),
    (PAIRS, "out/run/acdc.resume.pt is damaged, or of an earlier version: delete it, or add --force", pair(), text("out/run/acdc.resume.pt", "{")),
    *((PAIRS, f"{ACDC_RESULT} is damaged, or of an earlier version: delete it, or add --force",
       circuits(says(ACDC_RESULT, *change))) for change in WRONG_CIRCUITS),
    *((PAIRS, "acdc.resume.pt is damaged, or of an earlier version: delete it, or add --force",
       circuits(unfinished_circuits, says("out/run/acdc.resume.pt", *change))) for change in WRONG_STATES),
    (PAIRS, "cannot write out/run/acdc.png: there is a folder of that name", pair(), folder_named("out/run/acdc.png")),
    (PAIRS, "out/run has weights that are not finite: its training has diverged", pair(), diverged),
]

SAE_WORDS = "sae.py out/run --steps=4 --batch_size=64 --expansion=30 --device=cpu"

SAE_RESULT, SAE_STATE = "out/run/sae.json", "out/run/sae.resume.pt"
WRONG_SAES = [("saes", None), ("saes", []), ("saes 0 layer", None), ("saes 0 site", 1), ("saes 0 l0", "x"), ("saes 0 l1", None), ("saes 0 history", {}),
              ("warnings", None)]
WRONG_STATES_OF_SAES = [("state", 5), ("state rows", 5), ("state rows", [{}]), ("state current", {})]

SAE = [
    ("sae.py out/run --l1=", "--l1= must be numbers from 0 on"),
    ("sae.py out/run --l1=5,,2", "--l1=5,,2 must be numbers"),
    ("sae.py out/run --l1=5,5.0", "--l1=5,5.0 must be numbers from 0 on, each once"),
    ("sae.py out/run --l1=-1", "--l1=-1 must be numbers from 0 on"),
    ("sae.py out/run --l1=inf", "--l1=inf must be numbers"),
    ("sae.py out/run --layer=", "--layer= must be whole numbers from 0 on, each once"),
    ("sae.py out/run --layer=0,0", "--layer=0,0 must be whole numbers from 0 on, each once"),
    ("sae.py out/run --layer=0,9", "--layer=9: the blocks of this model are 0 to"),
    ("sae.py out/run --site=", "--site= must be of mlp_out, attn_out, resid, mlp_act, attn_act, each once"),
    ("sae.py out/run --site=resid,resid", "--site=resid,resid must be of mlp_out"),
    ("sae.py out/run --site=resid,block_out", "--site=resid,block_out must be of mlp_out, attn_out, resid, mlp_act, attn_act"),
    ("sae.py out/run --places --layer=9", "--layer=9: the blocks of this model are 0 to"),
    ("sae.py out/run --places --plot=all.png", "--plot has no effect with --places: drop it"),
    ("sae.py out/run --places --features=3", "--features has no effect with --places: drop it"),
    ("sae.py out/run --places --force", "--force has no effect with --places: drop it"),
    ("sae.py out/run out/nowhere --places", "no checkpoint at"),
    ("sae.py out/run --places", "data/val.bin is damaged", flip("data/val.bin")),
    ("sae.py out/run --seeds=1,1", "--seeds=1,1 must be whole numbers from 0 on, each once"),
    ("sae.py out/run --seeds=1.5", "--seeds=1.5 must be whole numbers"),
    ("sae.py out/run --seeds=-1", "--seeds=-1 must be whole numbers"),
    ("sae.py out/run --seeds=18446744073709551616", "--seeds=18446744073709551616 must be whole numbers"),
    ("sae.py out/run --activation=topk --k=1,x", "--k=1,x must be whole numbers"),
    ("sae.py out/run --steps=1000000000000000000000", "--steps=1000000000000000000000 must be from 1 to 9,223,372,036,854,775,807"),
    (f"{SAE_WORDS} --expansion=100000000", "give a smaller --expansion, --batch_size or --buffer"),
    (f"{SAE_WORDS} --expansion=1000000000000", "features in each of 1, batches of 64 and a buffer of 2,992 need"),
    (f"{SAE_WORDS} --batch_size=100000", "too few for batches of 100,000"),
    (f"{SAE_WORDS} --plot=/proc/all.png", "cannot write /proc/all.png"),
    (f"{SAE_WORDS} --plot=nowhere/all.png", "cannot write nowhere/all.png"),
    (f"{SAE_WORDS} --plot=all.png", "cannot write all.png", folder_named("all.png")),
    (f"{SAE_WORDS}", "out/run/sae.png", folder_named("out/run/sae.png")),
    (f"{SAE_WORDS} --features=3", "out/run/sae_features.html", folder_named("out/run/sae_features.html")),
    (f"{SAE_WORDS} --features=3", "out/run/sae_features.html", autoencoders(), folder_named("out/run/sae_features.html")),
    (f"{SAE_WORDS}", "best.pt is damaged", flip("out/run/best.pt")),
    (f"{SAE_WORDS}", "data/val.bin is damaged", flip("data/val.bin")),
    (f"{SAE_WORDS}", "data/train.bin is damaged", flip("data/train.bin")),
    (f"{SAE_WORDS}", "sae.json is damaged, or of an earlier version: delete it", text("out/run/sae.json", "{")),
    (f"{SAE_WORDS}", "sae.resume.pt is damaged, or of an earlier version: delete it", text("out/run/sae.resume.pt", "PK")),
    (f"{SAE_WORDS}", "sae.resume.pt is damaged, or of an earlier version: delete it", autoencoders(),
     unfinished, flip("out/run/sae.resume.pt")),
    (f"{SAE_WORDS}", "sae.pt is damaged, or of an earlier version: delete it, or add --force", autoencoders(flip("out/run/sae.pt"))),
    (f"{SAE_WORDS} --features=3", "sae.pt is damaged, or of an earlier version: delete it, or add --force", autoencoders(text("out/run/sae.pt", ""))),
    *((SAE_WORDS, f"{SAE_RESULT} is damaged, or of an earlier version: delete it, or add --force",
       autoencoders(says(SAE_RESULT, *change))) for change in WRONG_SAES),
    *((SAE_WORDS, f"{SAE_STATE} is damaged, or of an earlier version: delete it, or add --force",
       autoencoders(unfinished, says(SAE_STATE, *change))) for change in WRONG_STATES_OF_SAES),
    (f"{SAE_WORDS} --layer=0,1", "sae.json was made with layer=[0], not [0, 1]: --force replaces it", autoencoders()),
    (f"{SAE_WORDS} --lr=0.1", "sae.json was made with lr=1e-05, not 0.1: --force replaces it", autoencoders()),
]

EXPLAIN_WORDS = "explain.py out/run --window=1 --neurons=2 --no_control"
ASK = "explain.py out/run --window=1 --neurons=2 --no_control --explainer=openai --model=m --base_url=http://127.0.0.1:9/v1"
EXPLAIN_RESULT, EXPLAIN_NEURONS, EXPLAIN_STATE = (f"out/run/explain{end}" for end in (".json", "_neurons.json", ".resume.pt"))
WRONG_RESULTS_OF_EXPLAIN = [("layers", None), ("layers 0", 5), ("layers 0 mean", "x"), ("all", None), ("all histogram", 5),
                            ("seconds", None), ("control", None)]
WRONG_STATES_OF_EXPLAIN = [("state", 5), ("state", {}), ("state model", 5), ("state model", [5]), ("state seconds", {})]

EXPLAIN = [
    ("explain.py", "the following arguments are required: runs"),
    ("explain.py nowhere", "no checkpoint at nowhere"),
    ("explain.py out/run", "--window=64: out/run reads at most 16 tokens, lower it"),
    ("explain.py out/run --window=0", "--window=0 must be from 1 to"),
    ("explain.py out/run --tokens=0", "--tokens=0 must be from 1 to"),
    ("explain.py out/run --neurons=0", "--neurons=0 must be from 1 to"),
    ("explain.py out/run --seed=-1", "--seed=-1 must be from 0 to"),
    ("explain.py out/run --explainer=gpt", "invalid choice: 'gpt'"),
    ("explain.py out/run --lookup=none", "invalid choice: 'none'"),
    ("explain.py out/run --window=16", "stories of the validation text have 16 tokens, and 35 are needed: choose other --data"),
    (EXPLAIN_WORDS, "out/run/best.pt is damaged", flip("out/run/best.pt")),
    (EXPLAIN_WORDS, "data/val.bin is damaged", flip("data/val.bin")),
    (EXPLAIN_WORDS, "data/train.bin is damaged", flip("data/train.bin")),
    (EXPLAIN_WORDS, "out/run has weights that are not finite: its training has diverged", diverged),
    (f"{EXPLAIN_WORDS} --data=nowhere", NO_DATA),
    ("explain.py out/run out/run/../run --window=1", "out/run/../run is given twice: give it once"),
    (f"{EXPLAIN_WORDS} --plot=all.txt", "--plot=all.txt must end in .png, .pdf or .svg"),
    (f"{EXPLAIN_WORDS} --plot=nowhere/all.png", "cannot write nowhere/all.png"),
    (EXPLAIN_WORDS, "out/run/explain.png", folder_named("out/run/explain.png")),
    (f"{EXPLAIN_WORDS} --dry_run", "--dry_run has no effect without --explainer=openai: add that or drop it"),
    (f"{EXPLAIN_WORDS} --model=m", "--model has no effect without --explainer=openai"),
    (f"{EXPLAIN_WORDS} --concurrency=4", "--concurrency has no effect without --explainer=openai"),
    (f"{EXPLAIN_WORDS} --seed=1", "explain.json was made with seed=0, not 1: --force replaces it", explained()),
    (EXPLAIN_WORDS, f"{EXPLAIN_NEURONS} is damaged, or of an earlier version: delete it", explained(text(EXPLAIN_NEURONS, "{"))),
    (EXPLAIN_WORDS, f"{EXPLAIN_NEURONS} is damaged, or of an earlier version: delete it", explained(text(EXPLAIN_NEURONS, "[" * 100000))),
    (EXPLAIN_WORDS, f"{EXPLAIN_NEURONS} is damaged, or of an earlier version: delete it",
     explained(says(EXPLAIN_NEURONS, "neurons 0 layer", "x"))),
    *((EXPLAIN_WORDS, f"{EXPLAIN_RESULT} is damaged, or of an earlier version: delete it, or add --force",
       explained(says(EXPLAIN_RESULT, *change))) for change in WRONG_RESULTS_OF_EXPLAIN),
    *((EXPLAIN_WORDS, f"{EXPLAIN_STATE} is damaged, or of an earlier version: delete it, or add --force",
       explained(unfinished_explanations, says(EXPLAIN_STATE, *change))) for change in WRONG_STATES_OF_EXPLAIN),
    ("explain.py out/run --window=1 --explainer=openai", "--explainer=openai needs --model: the name of a model"),
    (f"{ASK} --base_url=localhost:8000", "--base_url=localhost:8000 must be an address such as http://localhost:8000/v1"),
    (f"{ASK} --base_url=http://me:key@host/v1", "without a name or key in it"),
    (f"{ASK} --simulation=all", "--simulation=all must be sparse or full"),
    (f"{ASK} --temperature=3", "--temperature=3.0 must be from 0 to 2"),
    (f"{ASK} --concurrency=0", "--concurrency=0 must be from 1 to"),
    (f"{ASK} --retries=-1", "--retries=-1 must be from 0 to"),
    (f"{ASK} --timeout=0", "--timeout=0.0 must be from 0.1 to"),
    (f"{ASK} --answer_tokens=0", "--answer_tokens=0 must be from 1 to"),
    (f"{ASK} --max_tokens_total=0", "--max_tokens_total=0 must be at least 1"),
    (f"{ASK} --dry_run --price_in=1", "--price_in and --price_out go together: give both"),
    (f"{ASK} --price_in=-1 --price_out=1", "--price_in=-1.0 must be from 0 to"),
    (f"{ASK} --cache=config.py", "cannot write config.py: File exists"),
    (f"{ASK} --cache=/proc/answers", "cannot write /proc/answers"),
    (f"{ASK} --cache=''", "--cache= must name a folder"),
]

N2G = [
    ("n2g.py", "the following arguments are required: runs"),
    ("n2g.py out/nowhere", "no checkpoint at out/nowhere"),
    ("n2g.py out/run --data=nowhere", NO_DATA),
    ("n2g.py out/run --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("n2g.py out/run --tokens=0", "--tokens=0 must be at least 1"),
    ("n2g.py out/run --tokens=5", "5 tokens are fewer than a window of 16"),
    ("n2g.py out/run --snippets=1", "--snippets=1 must be from 2 to 1,000"),
    ("n2g.py out/run --threshold=0", "--threshold=0.0 must be from 0.001 to 1"),
    ("n2g.py out/run --threshold=nan", "--threshold=nan must be from 0.001 to 1"),
    ("n2g.py out/run --importance=2", "--importance=2.0 must be from 0.001 to 1"),
    ("n2g.py out/run --layer=", "--layer= must be whole numbers from 0 on, each once"),
    ("n2g.py out/run --layer=0,0", "--layer=0,0 must be whole numbers from 0 on, each once"),
    ("n2g.py out/run --layer=0,9", "--layer=9: the blocks of this model are 0 to"),
    ("n2g.py out/run --mask_token=ab", "--mask_token='ab' is 2 tokens of this tokenizer: give one that is a single token"),
    ("n2g.py out/run --mask_token=", "--mask_token='' is 0 tokens of this tokenizer"),
    ("n2g.py out/run --substitutes=bert", "argument --substitutes: invalid choice: 'bert'"),
    ("n2g.py out/run --fill_mask=a", "--fill_mask has no effect without --substitutes=distilbert: drop it"),
    ("n2g.py out/run --draw=", "--draw= must name neurons as block.neuron, with commas between them, such as 3.17,5.2"),
    ("n2g.py out/run --draw=1,2", "--draw=1,2 must name neurons"),
    ("n2g.py out/run --draw=0.1,0.-1", "--draw=0.1,0.-1 must name neurons"),
    ("n2g.py out/run --draw=9.0", "--draw=9.0: out/run has blocks 0"),
    ("n2g.py out/run --draw=0.9999", "--draw=0.9999: out/run has blocks 0"),
    ("n2g.py out/run --layer=0 --draw=1.0", "--draw=1.0: out/run has blocks 0 here"),
    ("n2g.py out/run --draw=0.0", "out/run/n2g_graphs.png: there is a folder of that name", folder_named("out/run/n2g_graphs.png")),
    ("n2g.py out/run --plot=all.gif", "--plot=all.gif must end in .png, .pdf or .svg"),
    ("n2g.py out/run --plot=nowhere/all.png", "cannot write nowhere/all.png"),
    ("n2g.py out/run", "cannot write out/run/n2g.png: there is a folder of that name", folder_named("out/run/n2g.png")),
    ("n2g.py out/run", "cannot write out/run/n2g_neurons.json: there is a folder of that name", folder_named("out/run/n2g_neurons.json")),
    ("n2g.py out/run", "best.pt is damaged", flip("out/run/best.pt")),
    ("n2g.py out/run", "data/train.bin is damaged", flip("data/train.bin")),
    ("n2g.py out/run", "out/run has weights that are not finite: its training has diverged", diverged),
    ("n2g.py out/run", "n2g.json is damaged, or of an earlier version: delete it, or add --force", text("out/run/n2g.json", "{")),
    ("n2g.py out/run", "n2g.resume.pt is damaged, or of an earlier version: delete it", text("out/run/n2g.resume.pt", "PK")),
    ("n2g.py out/run", "n2g_neurons.json is damaged, or of an earlier version: delete it", graphs(text("out/run/n2g_neurons.json", "{}"))),
    ("n2g.py out/run --importance=0.4", "n2g.json was made with importance=0.5, not 0.4: --force replaces it", graphs()),
    *(("n2g.py out/run", "out/run/n2g.json is damaged, or of an earlier version: delete it, or add --force",
       graphs(says("out/run/n2g.json", *change))) for change in WRONG_GRAPHS),
    *(("n2g.py out/run", "out/run/n2g.resume.pt is damaged, or of an earlier version: delete it, or add --force",
       graphs(unfinished_graphs, says("out/run/n2g.resume.pt", *change))) for change in WRONG_STATES_OF_GRAPHS),
]

def use_of_units(*damage):
    """The use of units in out/run, and then this damage."""
    def spoil(folder):
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module("units"), "draw_units", lambda *_: None)
            assert typed("units.py out/run --against=out/run/last.pt") is None
        for change in damage:
            change(folder)
    return spoil


def without_gate(folder):
    """out/run as a plain GPT-Neo."""
    path = folder / "out" / "run" / "best.pt"
    fields = torch.load(path, weights_only=True)
    for knob_set in (fields["config"], fields["train_config"]):
        knob_set["ablation"] = "none"
    fields["model"] = {name: weight for name, weight in fields["model"].items() if "_gate." not in name}
    torch.save(fields, path)


UNITS_RESULT, OVERLAP_RESULT = "out/run/units.json", "out/run/units_overlap.json"
WRONG_USES = [("kinds", None), ("kinds mlp", {}), ("kinds attn rate", [0.5]), ("kinds attn dead", "x"),
              ("untrained", None), ("warnings", None), ("kinds mlp stability", ["x"])]

UNITS = [
    ("units.py", "the following arguments are required: runs"),
    ("units.py nowhere", "no checkpoint at nowhere"),
    ("units.py out/run --windows=0", "--windows=0 must be from 1 to"),
    ("units.py out/run --windows=a", "argument --windows: invalid int value: 'a'"),
    ("units.py out/run --seed=-1", "--seed=-1 must be from 0 to"),
    ("units.py out/run --data=nowhere", NO_DATA),
    ("units.py out/run --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("units.py out/run --plot=a", "--plot=a must end in .png, .pdf or .svg"),
    ("units.py out/run --plot=nowhere/a.png", "cannot write nowhere/a.png"),
    ("units.py out/run --against=nowhere", "no checkpoint at nowhere"),
    ("units.py out/run --against=", "the name of a run is empty"),
    ("units.py out/run", "out/run has weights that are not finite: its training has diverged", diverged),
    ("units.py out/run", "out/run has ablation=none, so there is no gate: give runs with", without_gate),
    ("units.py out/run/last.pt --against=out/run", "--against=out/run has ablation=none, out/run/last.pt ablation=local", without_gate),
    ("units.py out/run out/run/../run", "is given twice: give it once"),
    ("units.py out/run", OTHER_TOKENS, flip("data/val.bin")),
    ("units.py out/run", "best.pt is damaged", flip("out/run/best.pt")),
    ("units.py out/run", "cannot write out/run/units.png: there is a folder of that name", folder_named("out/run/units.png")),
    ("units.py out/run --against=out/run/last.pt", "cannot write out/run/units_overlap.json: Is a directory",
     folder_named("out/run/units_overlap.json.tmp")),
    ("units.py out/run", f"{UNITS_RESULT} is damaged, or of an earlier version: delete it, or add --force", text(UNITS_RESULT, "{")),
    ("units.py out/run --windows=3", f"{UNITS_RESULT} was made with windows=1024, not 3: --force replaces it", use_of_units()),
    *(("units.py out/run", f"{UNITS_RESULT} is damaged, or of an earlier version: delete it, or add --force",
       use_of_units(says(UNITS_RESULT, *change))) for change in WRONG_USES),
    ("units.py out/run --against=out/run/last.pt", f"{OVERLAP_RESULT} is damaged, or of an earlier version",
     use_of_units(says(OVERLAP_RESULT, "kinds mlp chance", None))),
]

TABLE2 = [
    ("table2.py out/nowhere", "no checkpoint at out/nowhere"),
    ("table2.py out/run", "no experiment has looked at any of these runs: first do so with interp/n2g.py"),
    ("table2.py out/run --data=nowhere", NO_DATA),
    ("table2.py out/run --nonsense", "unrecognized arguments: --nonsense"),
    ("table2.py out/run out/run/last.pt", "out/run and out/run/last.pt are the same run with the same seed"),
    ("table2.py out/run", "table2.md: there is a folder of that name", folder_named("out/table2.md")),
    ("table2.py out/run --layers", "table2_layers.png: there is a folder of that name", folder_named("out/table2_layers.png")),
    ("table2.py out/run", "out/run/n2g.json is damaged: delete it", text("out/run/n2g.json", "[" * 200_000)),
    ("table2.py out/run", "out/run/explain.json is damaged: delete it", text("out/run/explain.json", '{"run": "out/run", "checkp')),
    ("table2.py out/run", "units.json is damaged, or of an earlier version: delete it, and make it again",
     use_of_units(says(UNITS_RESULT, "kinds mlp stability", 5))),
    ("table2.py out/run", "out/run/best.pt is damaged", flip("out/run/best.pt")),
    ("table2.py out/run", OTHER_TOKENS, flip("data/val.bin")),
]

BROWSE_WORDS = "browse.py out/run --device=cpu"
NO_PAGE = "is there and no page of this program: delete it, or name another with --page"

BROWSE = [
    ("browse.py", "the following arguments are required: runs"),
    ("browse.py out/nowhere", "no checkpoint at out/nowhere"),
    (f"{BROWSE_WORDS} --windows=0", "--windows=0 must be from 1 to 100,000"),
    (f"{BROWSE_WORDS} --snippets=0", "--snippets=0 must be from 1 to 100"),
    (f"{BROWSE_WORDS} --stories=0", "--stories=0 must be from 1 to 1,000"),
    (f"{BROWSE_WORDS} --page=page.pdf", "--page=page.pdf must end in .html"),
    (f"{BROWSE_WORDS} --page=nowhere/page.html", "cannot write nowhere/page.html: No such file"),
    (f"{BROWSE_WORDS} --page=page.html", "cannot write page.html: there is a folder of that name", folder_named("page.html")),
    (f"{BROWSE_WORDS} --page=page.html", f"page.html {NO_PAGE}", text("page.html", "my notes")),
    (f"{BROWSE_WORDS}", f"out/run/browse.html {NO_PAGE}", text("out/run/browse.html", "")),
    (f"{BROWSE_WORDS} --data=nowhere", NO_DATA),
    ("browse.py out/run out/run --device=cpu", "out/run is given twice: give it once"),
    (f"{BROWSE_WORDS} --page={'a' * 300}.html", "a.html: File name too long"),
    (f"{BROWSE_WORDS}", "out/run/best.pt is damaged", flip("out/run/best.pt")),
    (f"{BROWSE_WORDS}", "data/val.bin is damaged", flip("data/val.bin")),
    (f"{BROWSE_WORDS}", "out/run has weights that are not finite: its training has diverged", diverged),
    (f"{BROWSE_WORDS}", "n2g_neurons.json is damaged: delete it, and make it again", text("out/run/n2g_neurons.json", "{")),
    (f"{BROWSE_WORDS}", "explain_neurons.json is damaged: delete it", text("out/run/explain_neurons.json", '{"checkpoint": "a", "neurons": [1]}')),
    (f"{BROWSE_WORDS}", "units.json is damaged: delete it", text("out/run/units.json", '{"checkpoint": "a", "kinds": {"mlp": 1}}')),
]

BENCH = [
    ("speed.py --device=cpu --variants=locale", "--variants=locale must be"),
    ("speed.py --device=cpu --vocab_size=70000", "--vocab_size=70000"),
    ("speed.py --device=cpu --vocab_size=65537", "from 2 to 65,536"),
    ("speed.py --device=cpu --vocab_size=\u00b2", "must be whole numbers"),
    ("speed.py --device=cpu --n_head=3", "n_embd=128 is not divisible"),
    ("speed.py --device=cpu --batchsize=3", "did you mean 'batch_size'"),
    ("speed.py --device=cpu --batch_size=", "batch_size= is not a whole number"),
    ("speed.py --device=cpu --dtype=half", "dtype=half is not one of"),
    ("speed.py --device=cpu --rounds=0", "--rounds=0"),
    ("speed.py --device=cpu --steps=0", "--steps=0"),
    ("speed.py --device=cpu --fsdp=True", "--fsdp=False"),
    ("speed.py --device=cpu --grad_accum=5", "multiple of grad_accum=5"),
    ("speed.py --device=cpu --compile=reduce-overhead --grad_accum=2", "take --compile=True"),
    ("speed.py --device=cpu --variants=local --freeze=base", "a step that trains all: --freeze=none"),
    ("speed.py --device=nowhere", "--device=nowhere cannot be used"),
    ("speed.py --device=cpu --n_embd=4000000", "this run needs more than"),
    ("speed.py --device=cpu --against=", "git knows no tree at ''"),
    ("speed.py --device=cpu --against= --parts", "leave out --parts"),
    ("speed.py --device=cpu --against=nocommit", "git knows no tree at 'nocommit'"),
    ("speed.py --device=cpu --against=HEAD --parts", "leave out --parts"),
    ("alternatives.py --device=cpu --rounds=0", "--rounds=0 must be"),
    ("alternatives.py --device=cpu --what=all", "--what=all must be some of"),
    ("check.py --device=cpu --compile=yes", "--compile=yes must be"),
    ("same.py nocommit config.py", "git knows no model.py at 'nocommit'"),
    ("same.py --updates=2 config.py --data=nowhere", "nowhere"),
    ("same.py HEAD config.py --n_embd=4000000", "this run needs more than"),
    ("same.py HEAD config.py --updates=0", "--updates=0 must be at least 1"),
    ("same.py HEAD config.py --block_size=100000", "too few for block_size=100000"),
    ("temperature.py config.py --forms=softmax", "--forms=softmax must be some of eq3, gap, mean and numbers from 1e-06"),
    ("temperature.py config.py --forms=1,0", "--forms=0 must be some of"),
    ("temperature.py config.py --forms=nan", "--forms=nan must be some of"),
    ("temperature.py config.py --updates=0", "--updates=0 must be from 1 to max_iters=4"),
    ("temperature.py config.py --updates=5", "--updates=5 must be from 1 to max_iters=4"),
    ("temperature.py config.py --updates=2 --ablation=none", "ablation=none has no gates"),
    ("temperature.py config.py --updates=2 --batch_size=1", "batch_size=1 must be at least 2"),
    ("temperature.py config.py --updates=2 --grad_accum=3", "a multiple of grad_accum=3"),
    ("temperature.py config.py --updates=2 --data=nowhere", "nowhere"),
    ("temperature.py config.py --updates=2 --n_embd=4000000", "this run needs more than"),
    ("temperature.py config.py --updates=2 --block_size=1000", "too few for block_size=1000"),
]


IMPORT = "hf.py import hub new"
FOREIGN = without("hub/training.json")

HF = [
    ("hf.py", "the following arguments are required: what, source, out"),
    ("hf.py convert out/run new", "argument what: invalid choice: 'convert'"),
    ("hf.py export out/nowhere new", "no checkpoint at out/nowhere"),
    ("hf.py export out/run data", "data is there already: choose another name, or delete it"),
    ("hf.py export out/run config.py", "config.py is there already"),
    ("hf.py export out/run ''", "the name of the folder to write is empty"),
    ("hf.py export out/run config.py/new --no_figures", "cannot write config.py/new: Not a directory"),
    (f"hf.py export out/run {'x' * 300} --no_figures", "x: File name too long"),
    ("hf.py export out/run new --batch_size=0", "--batch_size=0 must be at least 1"),
    ("hf.py export out/run new --device=cpu:9", "--device=cpu:9 cannot be used"),
    ("hf.py export out/run new --data=nowhere", NO_DATA),
    ("hf.py export out/run new", "or leave figures out with --no_figures", meta(checksum="def")),
    ("hf.py export out/run new --no_figures", "unknown tokenizer 'bytes'", checkpoint("best.pt", tokenizer={"name": "bytes"})),
    ("hf.py sae out/run new", "no out/run/sae.pt: make it with python interp/sae.py out/run"),
    ("hf.py sae out/run new --data=data", "--data has no effect on sae: drop it"),
    ("hf.py sae out/run new", "out/run/sae.pt is damaged", autoencoders(flip("out/run/sae.pt"))),
    ("hf.py sae out/run new", "out/run/sae.pt is damaged, or of another version", autoencoders(says("out/run/sae.pt", "saes", [{}]))),
    ("hf.py sae out/run new", "made with weights that this run no longer has", autoencoders(says("out/run/sae.pt", "checkpoint", "0"))),
    (f"{IMPORT} --no_figures", "--no_figures has no effect on import"),
    ("hf.py import a/b/c new", "there is no folder a/b/c, and the Hugging Face hub does not give it either"),
    ("hf.py import out new", "out is no folder of Hugging Face's, which has a config.json"),
    ("hf.py import hub out", "out is there already", exported()),
    (IMPORT, "hub/config.json is damaged: it holds no JSON object", exported(text("hub/config.json", "["))),
    (IMPORT, "describes a model of type 'llama'", exported(says("hub/config.json", "model_type", "llama"))),
    (IMPORT, "has layer_norm_epsilon=0.1", exported(says("hub/config.json", "layer_norm_epsilon", 0.1))),
    (IMPORT, "lm_head.weight is 300 x 16, not 301 x 16", exported(says("hub/config.json", "vocab_size", 301))),
    (IMPORT, "hub has neither model.safetensors nor pytorch_model.bin", exported(without("hub/model.safetensors"))),
    (IMPORT, "cannot read hub/model.safetensors: SafetensorError", exported(text("hub/model.safetensors", "{"))),
    (IMPORT, "have changed since they were exported", exported(flip("hub/model.safetensors"))),
    (IMPORT, "have changed since they were exported", exported(flip("hub/gates.safetensors"))),
    (IMPORT, "cannot read hub/gates.safetensors: FileNotFoundError", exported(without("hub/gates.safetensors"))),
    (IMPORT, "hub/training.json is damaged", exported(says("hub/training.json", "step", "x"))),
    (IMPORT, "config and weights do not fit", exported(says("hub/training.json", "config n_embd", 8))),
    (f"{IMPORT} --data=data", "--data has no effect here: hub says itself", exported()),
    (IMPORT, "hub is no exported run: say with --data", exported(FOREIGN)),
    (f"{IMPORT} --data=nowhere", NO_DATA, exported(FOREIGN)),
    (f"{IMPORT} --data=data", "hub has a vocabulary of 300 tokens and data one of 300, which is another", exported(FOREIGN), meta(tokenizer=OTHER_WORDS)),
]


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


SCRIPTS = [path.relative_to(ROOT) for path in [ROOT / "eval.py", *ROOT.glob("interp/*.py"), *ROOT.glob("bench/*.py")]
           if "signal.SIG_DFL)" in path.read_text()]


@pytest.mark.parametrize("name", SCRIPTS, ids=str)
def test_ctrl_c_while_torch_is_imported_just_ends_the_script(name, tmp_path):
    """A stand-in for torch that is interrupted as it is imported, and would go on for a minute."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, ROOT / name], env=environment, text=True, capture_output=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_in_main_is_one_line():
    """Also where Ctrl-C just ended the script while it imported."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="^stopped$"):
            knobs.cli(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("row", [
    *TRAIN, *PREPARE, *EVAL, *TABLE1, *ACDC, *SAE, *EXPLAIN, *N2G, *UNITS, *TABLE2, *BROWSE, *HF, *BENCH], ids=lambda row: row[0][:80])
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
