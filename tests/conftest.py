"""What the tests share: a tiny model, a run folder with its data, a script called as a user would.

import conftest in a test file for the constants and functions; fixtures need no import.
"""

import hashlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import config as knobs
from model import GPTNeo, GPTNeoConfig, save_checkpoint

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


def make_data(folder, train=525, val=100):
    """Write data as prepare.py does: this many tokens in each split. -> its meta.json as a dict."""
    folder.mkdir(parents=True)
    meta = {"tokenizer": {"name": "words", "pieces": PIECES}, "vocab_size": V, "eot": EOT,
            "checksum": f"{folder.name}-{train}-{val}", "source": {}}
    for seed, (split, count) in enumerate({"train": train, "val": val}.items()):
        tokens = letters(count, seed)
        tokens.tofile(folder / f"{split}.bin")
        meta[split] = {"tokens": count, "stories": int((tokens == EOT).sum()), "bytes": count,
                       "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def make_run(out, data, model, step=7, **train_config):
    """Write a run folder as train.py does, trained on the data in a folder. -> the run folder."""
    out.mkdir(parents=True)
    meta = json.loads((data / "meta.json").read_text())
    save_checkpoint(out / "best.pt", model.config, model.state_dict(), step=step,
                    tokenizer=meta["tokenizer"], data=meta["checksum"],
                    train_config={"data": str(data), "seed": 5, **train_config})
    return out


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


def contents(folder):
    """{path: bytes} of every file in it."""
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}
