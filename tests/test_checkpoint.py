"""Checkpoint files: written whole or not at all, and every kind of broken one refused in one line.

    python -m pytest tests/test_checkpoint.py
"""

import io
import os
import pickle
import random
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPTNeo, GPTNeoConfig, load_checkpoint, save_checkpoint

TINY = dict(vocab_size=11, block_size=4, n_layer=2, n_head=2, n_embd=4, k_attn=1, k_mlp=1)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPTNeo(GPTNeoConfig(**{**TINY, **changes}))


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "best.pt", tiny().config, tiny().state_dict(), step=3)
    return tmp_path / "best.pt"


def refused(call, *arguments):
    """The message of the ValueError that a user must get: one line, and never another exception."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)
    return str(caught.value)


# ---- writing


@pytest.mark.parametrize("ablation", ["none", "local", "global"])
def test_what_is_saved_is_what_comes_back(tmp_path, ablation):
    model = tiny(ablation=ablation)
    save_checkpoint(tmp_path / "best.pt", model.config, model.state_dict(), step=3, note={"any": [1, 2.5, "state"]})
    checkpoint = load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["config"] == asdict(model.config)
    assert (checkpoint["step"], checkpoint["note"]) == (3, {"any": [1, 2.5, "state"]})
    for source in (tmp_path, tmp_path / "best.pt", str(tmp_path), checkpoint):  # folder, file, or what was loaded
        again = GPTNeo.from_checkpoint(source)
        assert again.config == model.config
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
        assert again.lm_head.weight is again.transformer["wte"].weight  # tied again, not two copies


def test_plain_torch_reads_the_file_without_running_code(saved):
    checkpoint = torch.load(saved, weights_only=True)
    assert {"config", "model", "step"} == checkpoint.keys()


def test_a_crash_while_writing_leaves_the_old_checkpoint(saved, monkeypatch):
    before = saved.read_bytes()

    def disk_full(state, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError):
        save_checkpoint(saved, tiny(seed=1).config, tiny(seed=1).state_dict())
    assert saved.read_bytes() == before


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_name(saved, monkeypatch):
    """Otherwise a power cut can leave the name with nothing behind it. The moment of fsync is the moment to look."""
    before, events = saved.read_bytes(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", saved.read_bytes() == before)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", torch.load(a, weights_only=True)["step"])), replace(a, b)))
    save_checkpoint(saved, tiny(seed=1).config, tiny(seed=1).state_dict(), step=4)
    assert events == [("fsync", True), ("replace", 4)]
    assert load_checkpoint(saved)["step"] == 4


def test_leftovers_of_a_killed_write_do_not_hurt(saved):
    Path(f"{saved}.tmp").write_bytes(b"leftover")
    assert load_checkpoint(saved)["step"] == 3
    save_checkpoint(saved, tiny().config, tiny().state_dict(), step=5)
    assert load_checkpoint(saved)["step"] == 5
    assert [path.name for path in saved.parent.iterdir()] == ["best.pt"]


# ---- reading what is broken


def test_a_missing_checkpoint_is_named(tmp_path):
    assert str(tmp_path / "nothing.pt") in refused(load_checkpoint, tmp_path / "nothing.pt")
    assert str(tmp_path / "best.pt") in refused(load_checkpoint, tmp_path)  # a folder without one
    assert "no checkpoint" in refused(GPTNeo.from_checkpoint, tmp_path)


def test_a_file_cut_anywhere_is_refused(saved):
    whole = saved.read_bytes()
    lengths = [*range(0, 64), *range(64, len(whole), 211), *range(len(whole) - 64, len(whole))]
    for length in lengths:
        saved.write_bytes(whole[:length])
        assert str(saved) in refused(load_checkpoint, saved)
    saved.write_bytes(whole)
    load_checkpoint(saved)


@pytest.mark.filterwarnings("ignore")  # torch comments on the pickles it is made to read
@pytest.mark.parametrize("start", [b"", b"\x80\x02", b"PK\x03\x04"])
def test_random_bytes_are_refused(tmp_path, start):
    rng, path = random.Random(0), tmp_path / "noise.pt"
    for _ in range(200):
        path.write_bytes(start + rng.randbytes(rng.randrange(200)))
        assert str(path) in refused(load_checkpoint, path)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_description_loads_or_is_refused(saved):
    """Bytes changed inside the archive's pickle raise nearly every exception there is: IndexError, TypeError,
    AssertionError, struct.error ... A user must see none of them."""
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    description = next(name for name in members if name.endswith("data.pkl"))
    rng, refusals = random.Random(0), 0
    for _ in range(250):
        damaged = bytearray(members[description])
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, bytes(damaged) if name == description else content)
        saved.write_bytes(buffer.getvalue())
        try:
            GPTNeo.from_checkpoint(saved)
        except ValueError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 100


class Evil:
    """Unpickled, it makes a folder; it might as well send your keys away."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [lambda state, path: path.write_bytes(pickle.dumps(state)), torch.save])
def test_a_malicious_pickle_does_not_run(tmp_path, write):
    path, proof = tmp_path / "evil.pt", tmp_path / "it ran"
    write({"config": TINY, "model": Evil(proof)}, path)
    refused(load_checkpoint, path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert proof.exists()  # so the file was dangerous indeed


@pytest.mark.parametrize("content", [[1, 2], {}, {"config": TINY}, {"model": {}}, torch.zeros(3), "text", 7, None])
def test_another_programs_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "other.pt" in refused(load_checkpoint, tmp_path / "other.pt")


def weights_without(name):
    return {key: value for key, value in tiny().state_dict().items() if key != name}


@pytest.mark.parametrize("damage, word", [
    ({"model": weights_without("transformer.ln_f.bias")}, "transformer.ln_f.bias"),
    ({"model": {**tiny().state_dict(), "extra.weight": torch.zeros(1)}}, "extra.weight"),
    ({"model": {**tiny().state_dict(), "transformer.ln_f.bias": torch.zeros(5)}}, "transformer.ln_f.bias"),
    ({"model": {**tiny().state_dict(), "transformer.ln_f.bias": "text"}}, "transformer.ln_f.bias"),
    ({"model": [1, 2]}, "fit"),
    ({"model": None}, "fit"),
    ({"config": {**TINY, "dropout": 0.1}}, "dropout"),
    ({"config": {**TINY, "n_layer": 3}}, "transformer.h.2"),
    ({"config": {**TINY, "ablation": "global"}}, "attn_gate"),
    ({"config": {**TINY, "ablation": "sometimes"}}, "ablation='sometimes'"),
    ({"config": {**TINY, "k_mlp": 16}}, "k_mlp=16"),
    ({"config": {**TINY, "n_head": 3}}, "n_head=3"),
    ({"config": {**TINY, "n_embd": 0}}, "n_embd=0"),
    ({"config": {**TINY, "n_layer": "2"}}, "fit"),
    ({"config": {**TINY, "n_layer": None}}, "fit"),
    ({"config": {**TINY, "vocab_size": 11.5}}, "fit"),
    ({"config": {**TINY, "attention_layers": 1}}, "fit"),
    ({"config": [1]}, "fit"),
    ({"config": None}, "fit"),
])
def test_config_and_weights_that_do_not_fit_are_refused(tmp_path, damage, word):
    whole = {"config": TINY, "model": tiny().state_dict()}
    torch.save(whole, tmp_path / "a.pt")
    GPTNeo.from_checkpoint(tmp_path / "a.pt")
    torch.save({**whole, **damage}, tmp_path / "a.pt")
    assert word in refused(GPTNeo.from_checkpoint, tmp_path / "a.pt")
