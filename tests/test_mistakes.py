"""First-hour mistakes: each gets one clear line and exit code 1, and leaves nothing behind.

A row is typed in a folder that holds data/ (tokens), out/run (a finished tiny run) and config.py
(its knobs): the command, a part of its one line and, where the mistake lies in the files, a
function of the folder that makes it.
"""

import contextlib
import gzip
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch

from conftest import ROOT, contents, make_data
from test_train import TINY, start

import eval
from bench import sweep


def flip(name):
    """One bit in the middle of a file."""
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))
    return damage


def checkpoint(**changes):
    """Fields of best.pt."""
    def damage(folder):
        path = folder / "out" / "run" / "best.pt"
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return damage


def diverged(value):
    """Weights of best.pt that are not finite."""
    def damage(folder):
        path = folder / "out" / "run" / "best.pt"
        fields = torch.load(path, weights_only=True)
        fields["model"][BROKEN].fill_(value)
        torch.save(fields, path)
    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def meta(**changes):
    def damage(folder):
        path = folder / "data" / "meta.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return damage


OTHER_WORDS = {"name": "words", "pieces": [f" other{i}" for i in range(2)]}
AGAIN = "train.py config.py --out=out/run"
RESUME = f"{AGAIN} --resume"
PREPARE = "prepare.py --tokenizer=words --out=new --train"
BROKEN = "transformer.ln_f.weight"

CORE = [
    ("train.py nowhere.py", "there is no config file nowhere.py"),
    ("train.py config.py --data=nowhere", "no prepared data in nowhere"),
    ("train.py config.py", "meta.json is damaged", write("data/meta.json", b"{")),
    ("train.py config.py", "val.bin", flip("data/val.bin")),
    ("train.py config.py --batchsize=4", "did you mean --batch_size?"),
    ("train.py config.py --k_mlp=64", "k_mlp=64 must be from 1 to 63"),
    ("train.py config.py --grad_accum=3", "batch_size=4 must be a multiple of"),
    (AGAIN, "already holds a run: --resume=True continues it, --out="),
    (AGAIN, "out/run already holds a run", remove("out/run/last.pt")),
    (f"{AGAIN} --init_from=out/run", "out/run already holds a run", remove("out/run/best.pt")),
    ("train.py config.py --resume", "out/config has no checkpoint"),
    ("train.py config.py --device=gpu", "--device=gpu"),
    ("train.py config.py --block_size=400", "too few tokens for block_size=400"),
    (f"{RESUME} --seed=1", "add --seed=1337"),
    (RESUME, "last.pt is damaged", flip("out/run/last.pt")),
    (RESUME, "train.bin", flip("data/train.bin")),
    (RESUME, "data is not the data that", meta(checksum="0" * 16)),
    ("train.py config.py --init_from=out/none", "no checkpoint at out/none"),
    ("train.py config.py --init_from=nobody/nothing", "as a folder or from the hub"),
    ("train.py config.py --init_from=data", "no checkpoint at data/best.pt"),
    ("train.py config.py --init_from=out/run --n_layer=3", "add --n_layer=2"),
    ("train.py config.py --init_from=out/run --block_size=64", "add --block_size=16"),
    ("train.py config.py --init_from=out/run", "another tokenizer than data",
     checkpoint(tokenizer=OTHER_WORDS)),
    ("train.py config.py --init_from=out/run", f"{BROKEN} holds", diverged(torch.inf)),
    ("train.py config.py --wandb", "pip install wandb"),
    ("eval.py out/nowhere", "no checkpoint at out/nowhere"),
    ("eval.py out/run --data=nowhere", "no prepared data in nowhere"),
    ("eval.py out/run", "best.pt is damaged", flip("out/run/best.pt")),
    ("eval.py out/run --top_k=3", "--top_k needs --sample"),
    ("prepare.py --tokenizer=words --out=new --train a.jsonl", "a row holds no text",
     write("a.jsonl", b'{"text": 5}')),
    ("eval.py out/run", BROKEN, diverged(torch.nan)),
    ("eval.py out/run", "val.bin", flip("data/val.bin")),
    ("eval.py out/run", "another tokenizer", meta(tokenizer=OTHER_WORDS)),
    ("eval.py out/run", "has changed since", meta(checksum="0" * 16)),
    ("eval.py out/run out/run/best.pt --over_seeds", "best.pt are the same run with the same seed"),
    ("prepare.py toy --stories=20 --out=data", "already holds data: add --force"),
    ("prepare.py --tokenizer=words --out=data --force --train a.txt", "not UTF-8",
     write("a.txt", b"fine\n<|endoftext|>\n\xff")),
    (f"{PREPARE} a.txt --val nowhere.txt", "no file nowhere.txt", write("a.txt", b"one story")),
    (f"{PREPARE} a.txt", "no story for val: give two", write("a.txt", b"one story")),
    (f"{PREPARE} a.txt", "not UTF-8", write("a.txt", "Once".encode("utf-16"))),
    (f"{PREPARE} a.jsonl", "cannot read a.jsonl", write("a.jsonl", b'{"text": \n')),
    (f"{PREPARE} a.jsonl", "'text'): no such split or column, see --text_column",
     write("a.jsonl", b'{"b": "x", "n": 1}')),
    (f"{PREPARE} a.txt.gz", "cannot read a.txt.gz",
     write("a.txt.gz", gzip.compress(b"cut off " * 999, mtime=0)[:-9])),
    ("-m bench.speed --device=cpu --variants=locale", "--variants=locale must be"),
    ("-m bench.check --device=cpu --compile=yes", "--compile=yes must be"),
    ("-m bench.sweep", "config files"),
    ("-m bench.sweep config.py --seeds=01,1", "config_seed1: give each config and seed once"),
    ("-m bench.sweep config.py --seeds=1,two", "--seeds=1,two must be whole numbers"),
    ("-m bench.sweep config.py --seed=5", "leave out --seed and --resume"),
    ("-m bench.sweep config.py --resume=True", "leave out --seed and --resume"),
    ("-m bench.sweep config.py --per_gpu=0", "--per_gpu=1 or more"),
    ("-m bench.sweep config.py --data=nowhere", "no prepared data in nowhere"),
]

NEED_A_RUN = ["circuits {}", "unlearn {}", "sae {}", "n2g {}", "explain --window=1 {}", "units {}",
              "browse {}", "tables {}", "hf export {} new"]
INTERP = [
    *((f"-m interp.{words}".format("out/nowhere"), "no checkpoint at out/nowhere")
      for words in NEED_A_RUN),
    *((f"-m interp.{words}".format("out/run"), "best.pt is damaged", flip("out/run/best.pt"))
      for words in NEED_A_RUN),
    ("-m interp.circuits out/run", "too few names"),  # these data have none
    ("-m interp.circuits out/run --method=eap --tau=0.1", "--tau and --orders are for acdc"),
    ("-m interp.circuits out/run --level=units", "--level and --title are for eap: add"),
    ("-m interp.circuits out/run --tau=a", "argument --tau"),
    ("-m interp.circuits out/run --prompts=pairs.json", "cannot read prompts from pairs.json"),
    ("-m interp.sae out/run --layer=9", "--layer=9: the blocks of this model are 0 to 1"),
    ("-m interp.sae out/run --batch_size=100000", "too few for batches of 100,000"),
    ("-m interp.sae out/run --l1=abc", "--l1"),
    *((f"-m interp.sae out/run {words}", "different numbers")
      for words in ("--l1=2,2.0000001", "--l1=nan", "--seeds=01,1")),
    ("-m interp.sae out/run --site=mlp", "must be of mlp_out, attn_out"),
    ("-m interp.sae out/run --steps=40 --batch_size=32 --lr=1e30", "smaller --lr"),
    ("-m interp.n2g out/run --layer=9", "--layer=9: the blocks of this model are 0 to 1"),
    ("-m interp.n2g out/run", "train.bin", flip("data/train.bin")),
    ("-m interp.n2g out/run --tokens=3", "3 tokens are fewer than a window of 16"),
    ("-m interp.n2g out/run --substitutes=nowhere/at/all", "--substitutes=nowhere/at/all is"),
    ("-m interp.explain out/run", "--window=64: out/run reads at most 16 tokens"),
    ("-m interp.explain out/run --window=1 --timeout=9", "--timeout needs --model"),
    ("-m interp.units out/run --windows=0", "argument --windows: 0 is not at least 1"),
    ("-m interp.units out/run", "val.bin", flip("data/val.bin")),
    ("-m interp.units out/run", "units.json is damaged", write("out/run/units.json", b"{")),
    ("-m interp.unlearn out/run --save dog out/run", "--save needs exactly one run, and a FOLDER"),
    ("-m interp.browse out/run --data=nowhere", "no prepared data in nowhere"),
    ("-m interp.hf export out/run data", "data is there already"),
    ("-m interp.hf sae out/run new", "sae.pt"),
    ("-m interp.hf import out new", "out"),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    make_data(folder / "data", 3000, 400)
    lines = {**TINY, "max_iters": 4, "eval_interval": 2, "data": "data", "ablation": "local"}
    (folder / "config.py").write_text("".join(f"{name} = {value!r}\n"
                                              for name, value in lines.items()))
    with contextlib.chdir(folder):
        start("data", "out/run", max_iters=4, eval_interval=2)
    return folder


@pytest.mark.parametrize("row", [*CORE, *INTERP], ids=lambda row: row[0])
def test_a_mistake_is_one_line_and_changes_nothing(row, template, tmp_path, typed, monkeypatch):
    command, expected, *damage = row
    folder = shutil.copytree(template, tmp_path / "work")
    for spoil in damage:
        spoil(folder)
    before = contents(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "wandb", None)  # whether or not it is installed here
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(eval, "measure_split", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("too late"))
    script, *words = shlex.split(command.removeprefix("-m "))
    message, _ = typed(importlib.import_module(script.removesuffix(".py")).main, *words)
    assert isinstance(message, str) and message.startswith("error: ")
    assert expected in message and "\n" not in message
    assert contents(folder) == before


def test_the_commands_themselves_print_the_line_and_exit_with_1(template):
    for script, message in (("train.py", "error: out/run"), ("eval.py", "error: ")):
        words = ["config.py", "--out=out/run"] if script == "train.py" else ["out/nowhere"]
        ended = subprocess.run([sys.executable, ROOT / script, *words], cwd=template, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith(message) and ended.stderr.count("\n") == 1
