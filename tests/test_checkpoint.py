"""Checkpoint files: written whole or not at all, and every kind of broken one refused in one line.

    python -m pytest tests/test_checkpoint.py
"""

import contextlib
import errno
import io
import os
import pickle
import random
import resource
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPTNeo, GPTNeoConfig, ModelError, load_checkpoint, load_torch, replace_file, save_checkpoint

TINY = dict(vocab_size=11, block_size=4, n_layer=2, n_head=2, n_embd=4, k_attn=1, k_mlp=1)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPTNeo(GPTNeoConfig(**{**TINY, **changes}))


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "best.pt", tiny().config, tiny().state_dict(), step=3)
    return tmp_path / "best.pt"


def refused(call, *arguments):
    """The message of the ModelError that a user must get: one line, and never another exception."""
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
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
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", disk_full)
    message = refused(save_checkpoint, saved, tiny(seed=1).config, tiny(seed=1).state_dict())
    assert message == f"cannot write {saved}: No space left on device"
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


@contextlib.contextmanager
def largest_file(size):
    """Whoever writes past this many bytes gets an error from the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 5_000, 12_000, 100_000, 215_000])
def test_a_full_disk_while_saving_is_one_line_and_keeps_the_old_checkpoint(saved, size):
    """At some of these sizes the error is the file's, at others a RuntimeError of torch's zip writer hides it."""
    before, model = saved.read_bytes(), tiny(seed=1)
    with largest_file(size):
        message = refused(lambda: save_checkpoint(saved, model.config, model.state_dict(), more=torch.ones(50_000)))
    assert message == f"cannot write {saved}: File too large"
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_is_found_out_before_the_old_file_is_gone(tmp_path):
    """What fits the file's buffer only fails when it is flushed."""
    def write(path):
        with replace_file(path) as file:
            file.write(b"new")

    write(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"old")
    with largest_file(1):
        assert "File too large" in refused(write, tmp_path / "b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"old"}


def test_what_else_goes_wrong_while_writing_stays_what_it_was(tmp_path):
    """A bug keeps its exception, Ctrl-C stays Ctrl-C, and neither leaves a file."""
    for error in (RuntimeError("a bug"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)) as caught, replace_file(tmp_path / "a") as file:
            file.write(b"half")
            raise error
        assert caught.value is error and list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    model = tiny()
    (tmp_path / "folder").mkdir()
    for path, why in ((tmp_path / "folder", "Is a directory"), (tmp_path / "none" / "a.pt", "No such file or directory")):
        assert refused(save_checkpoint, path, model.config, model.state_dict()) == f"cannot write {path}: {why}"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_name(saved, monkeypatch):
    """Otherwise a power cut can leave the name with nothing behind it. The moment of fsync is the moment to look."""
    before, events = saved.read_bytes(), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", saved.read_bytes() == before)), fsync(fd)))

    def replaced(a, b):
        events.append(("replace", torch.load(a, weights_only=True)["step"]))
        replace(a, b)

    monkeypatch.setattr(os, "replace", replaced)
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


def equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_one_flipped_bit_is_refused_or_changes_nothing(saved):
    """Anywhere in the file: its data, the description, and the zip's structure, which no CRC covers."""
    whole, expected = saved.read_bytes(), load_checkpoint(saved)
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None  # torch writes CRCs that are right
        directory, members = archive.start_dir, archive.infolist()
        places = {(at, at % 8) for at in range(0, len(whole), 47)}
        places |= {(at, bit) for at in range(directory, directory + 60, 2) for bit in range(0, 8, 3)}  # first of the directory
        places |= {(at, at % 8) for at in range(len(whole) - 98, len(whole))}  # its end, zip64's included
        for member in members[::9]:  # the header before a tensor
            places |= {(at, at % 7) for at in range(member.header_offset, member.header_offset + 30, 3)}
    entry = directory
    for member in members:  # marked as a folder, a tensor would come back as whatever was in memory
        places.add((entry + 38, 4))
        entry += 46 + len(member.filename) + len(member.extra) + len(member.comment)
    refusals = 0
    for at, bit in sorted(places):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        saved.write_bytes(damaged)
        try:
            assert equal(load_checkpoint(saved), expected), (at, bit)
        except ModelError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > len(places) / 2


def test_a_file_of_torchs_old_format_is_refused(saved):
    """It is no zip, so that it has no CRCs."""
    torch.save(load_checkpoint(saved), saved, _use_new_zipfile_serialization=False)
    assert torch.load(saved, weights_only=True)["step"] == 3
    assert str(saved) in refused(load_checkpoint, saved) and str(saved) in refused(load_torch, saved)


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


CONFIG = asdict(GPTNeoConfig(**TINY))


def config_without(name):
    return {key: value for key, value in CONFIG.items() if key != name}


def weights_without(name):
    return {key: value for key, value in tiny().state_dict().items() if key != name}


@pytest.mark.parametrize("damage, word", [
    ({"model": weights_without("transformer.ln_f.bias")}, "transformer.ln_f.bias"),
    ({"model": {**tiny().state_dict(), "extra.weight": torch.zeros(1)}}, "extra.weight"),
    ({"model": {**tiny().state_dict(), "transformer.ln_f.bias": torch.zeros(5)}}, "transformer.ln_f.bias"),
    ({"model": {**tiny().state_dict(), "transformer.ln_f.bias": "text"}}, "transformer.ln_f.bias"),
    ({"model": [1, 2]}, "fit"),
    ({"model": None}, "fit"),
    ({"model": {**tiny().state_dict(), 7: torch.zeros(1)}}, "fit"),
    ({"config": {**CONFIG, "dropout": 0.1}}, "dropout"),
    ({"config": {**CONFIG, 7: 7}}, "fit"),
    ({"config": config_without("n_layer")}, "fit"),  # a knob that is missing has its default
    ({"config": {}}, "fit"),
    ({"config": {**CONFIG, "n_layer": 3}}, "transformer.h.2"),
    ({"config": {**CONFIG, "ablation": "global"}}, "attn_gate"),
    ({"config": {**CONFIG, "ablation": "sometimes"}}, "ablation='sometimes'"),
    ({"config": {**CONFIG, "ablation": ["local"]}}, "ablation=['local']"),
    ({"config": {**CONFIG, "k_mlp": 16}}, "k_mlp=16"),
    ({"config": {**CONFIG, "n_head": 3}}, "n_head=3"),
    ({"config": {**CONFIG, "n_embd": 0}}, "n_embd=0"),
    ({"config": {**CONFIG, "n_layer": "2"}}, "n_layer='2'"),
    ({"config": {**CONFIG, "n_layer": None}}, "n_layer=None"),
    ({"config": {**CONFIG, "vocab_size": 11.5}}, "vocab_size=11.5"),
    ({"config": {**CONFIG, "attention_layers": 1}}, "attention_layers=1"),
    ({"config": {**CONFIG, "clean_coeff": "1"}}, "clean_coeff='1'"),
    ({"config": [1]}, "fit"),
    ({"config": None}, "fit"),
])
def test_config_and_weights_that_do_not_fit_are_refused(tmp_path, damage, word):
    whole = {"config": CONFIG, "model": tiny().state_dict()}
    torch.save(whole, tmp_path / "a.pt")
    GPTNeo.from_checkpoint(tmp_path / "a.pt")
    torch.save({**whole, **damage}, tmp_path / "a.pt")
    assert word in refused(GPTNeo.from_checkpoint, tmp_path / "a.pt")
