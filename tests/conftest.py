"""What the tests share: a tiny model, a run folder with its data, a script called as a user would.

    python -m pytest tests/test_train.py        one file, offline, on a CPU; `make test` runs all

Constants and functions are imported from conftest; fixtures need no import.
"""

import hashlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import config as knobs
from model import GPTNeo, GPTNeoConfig, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
ORACLES = ROOT.parent / "shared" / "oracles" / "interp"  # may not exist
PIECES = ["ab", "<b>"]
EOT, V, T = 258, 259, 8  # of the tokenizer: two pieces, 256 bytes, end-of-text
SIZE = dict(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=8, k_attn=2, k_mlp=2)


def tiny_model(ablation="local", **changes):
    """A model in which biases, LayerNorms and gates all matter."""
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(**{**SIZE, "ablation": ablation, **changes}))
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def letters(count, seed=0):
    """Tokens of stories: letters, the first ones of the alphabet most often, and end-of-text."""
    rng = np.random.default_rng(seed)
    tokens = rng.zipf(1.5, count).clip(1, 26) + 96
    tokens[rng.random(count) < 0.1] = EOT
    return tokens.astype("<u2")


def make_data(folder, train=525, val=100, pieces=PIECES):
    """Write data as prepare.py does. train and val: tokens, or a number of letters to draw."""
    folder.mkdir(parents=True)
    eot = 256 + len(pieces)
    meta = {"tokenizer": {"name": "words", "pieces": pieces}, "vocab_size": eot + 1, "eot": eot,
            "source": {}}
    for seed, (split, tokens) in enumerate({"train": train, "val": val}.items()):
        tokens = np.array(letters(tokens, seed) if np.ndim(tokens) == 0 else tokens, "<u2")
        tokens.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": len(tokens), "stories": int((tokens == eot).sum()),
                       "bytes": len(tokens), "sha256": hashlib.sha256(tokens).hexdigest()}
    meta["checksum"] = f"{folder.name}-{meta['train']['tokens']}-{meta['val']['tokens']}"
    (folder / "meta.json").write_text(json.dumps(meta))


def make_run(folder, data, model, step=7, **train_config):
    """Write a run folder as train.py does, trained on the data in a folder. -> the run's folder."""
    folder.mkdir(parents=True)
    meta = json.loads((data / "meta.json").read_text())
    save_checkpoint(folder / "best.pt", model.config, model.state_dict(), step=step,
                    tokenizer=meta["tokenizer"], data=meta["checksum"],
                    train_config={"data": str(data), "seed": 5, **train_config})
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run of tiny_model() and its data: 65 training windows, 12 held-out ones."""
    make_data(tmp_path / "data")
    return make_run(tmp_path / "out" / "tiny", tmp_path / "data", tiny_model())


@pytest.fixture(autouse=True)
def python_handlers():
    """Scripts called in this process leave their own; a background job begins without SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(main, *words): a script's main() with these words -> its error message (None: all went
    well) and what it printed."""
    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        message = None
        try:
            knobs.cli(main)
        except SystemExit as ended:
            message = ended.code
        return message, capsys.readouterr().out

    return call


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(owner, name, *numbers): Ctrl-C comes in these calls of owner.name, counted from 1.
    -> a list that grows by the arguments of each call"""
    def patch(owner, name, *numbers):
        function, calls = getattr(owner, name), []

        def counted(*args):
            calls.append(args)
            if len(calls) in numbers:
                raise KeyboardInterrupt
            return function(*args)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return patch


def contents(folder):
    """{path: bytes} of every file in it, and {path: False} of every folder."""
    return {path.relative_to(folder): path.is_file() and path.read_bytes()
            for path in folder.rglob("*")}


def identical(a, b):
    """Bit for bit: two tensors, or values, dicts and lists that may hold some."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b
