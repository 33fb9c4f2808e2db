"""Checkpoint files: written whole or not at all; every damaged one is refused in one line."""

import os
import pickle
import random
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SIZE, identical, tiny_model

from model import GPTNeo, ModelError, load_checkpoint, replace_file, save_checkpoint


@pytest.fixture
def saved(run):
    return run / "best.pt"


def refused(path):
    """The message of the ModelError that a user must get, and never another exception."""
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_what_comes_back(tmp_path):
    model = tiny_model(ablation="global")
    save_checkpoint(tmp_path / "best.pt", model.config, model.state_dict(), note=[1, 2.5])
    checkpoint = torch.load(tmp_path / "best.pt", weights_only=True)  # by plain torch
    assert (checkpoint["config"], checkpoint["note"]) == (asdict(model.config), [1, 2.5])
    for source in (tmp_path, str(tmp_path / "best.pt"), checkpoint):
        again = GPTNeo.from_checkpoint(source)
        assert again.config == model.config and identical(again.state_dict(), model.state_dict())
        assert again.lm_head.weight is again.transformer["wte"].weight  # tied again


def test_a_checkpoint_of_30f8be2_is_readable(tmp_path):
    """Its model's config has the same fields. Its training config has knobs that are gone."""
    model, gone = tiny_model(), dict(freeze="none", anneal_end=0.0, adam_eps=1e-8, fsdp=False)
    fields = dict(SIZE, attention_layers="global", window_size=256, ablation="local", embd_std=0.02,
                  gate="softmax", attn_unit="dim", clean_coeff=1.0, ablated_coeff=1.0)
    torch.save({"config": fields, "model": model.state_dict(), "step": 12, "optimizer": {},
                "train_config": {**fields, **gone}, "since": [0.0] * 5}, tmp_path / "best.pt")
    again = GPTNeo.from_checkpoint(tmp_path)
    assert again.config == model.config and identical(again.state_dict(), model.state_dict())


def test_a_failure_while_writing_keeps_the_old_file(saved):
    before = saved.read_bytes()
    for error in (OSError("disk full"), KeyboardInterrupt(), RuntimeError("a bug")):
        with pytest.raises(type(error)) as caught, replace_file(saved) as file:
            file.write(b"half a checkpoint")
            raise error
        assert caught.value is error
        assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_name(saved, monkeypatch):
    """Otherwise a power cut can leave the name with nothing behind it."""
    before, events, fsync, replace = saved.read_bytes(), [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(saved.read_bytes()) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("replace") or replace(*paths))
    save_checkpoint(saved, tiny_model().config, tiny_model().state_dict(), step=4)
    assert events == [before, "replace"] and load_checkpoint(saved)["step"] == 4


def test_a_missing_or_cut_file_or_one_of_another_program_is_refused(saved, tmp_path):
    whole = saved.read_bytes()
    for length in (*range(0, 64, 7), *range(64, len(whole), 1711), len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved)
    for content in ([1, 2], {"config": SIZE}, {"model": {}}, torch.zeros(3), None):
        torch.save(content, saved)
        refused(saved)
    torch.save({"config": SIZE, "model": {}}, saved, _use_new_zipfile_serialization=False)
    refused(saved)  # torch's old format has no checksums
    saved.unlink()
    assert "no checkpoint at" in refused(saved)


def test_one_flipped_bit_is_refused_or_changes_nothing(saved):
    """Anywhere in the file: tensors, their description, and the zip's own structure."""
    whole, expected, rng = saved.read_bytes(), load_checkpoint(saved), random.Random(0)
    with zipfile.ZipFile(saved) as archive:
        at, members = archive.start_dir, archive.infolist()
    places = [(rng.randrange(len(whole)), rng.randrange(8)) for _ in range(400)]
    places += [(place, place % 8) for place in range(len(whole) - 98, len(whole))]
    for member in members:  # marked as folders, these tensors would come back as noise
        places += [(place, place % 8) for place in range(at, at + 4)] + [(at + 38, 4)]
        at += 46 + len(member.filename) + len(member.extra) + len(member.comment)
    refusals = 0
    for place, bit in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        saved.write_bytes(damaged)
        try:
            assert identical(load_checkpoint(saved), expected), (place, bit)
        except ModelError as error:
            refusals += str(saved) in str(error) and "\n" not in str(error)
    assert refusals > len(places) / 2


class Evil:
    """Unpickled, it makes a folder; it might as well send your keys away."""

    def __reduce__(self):
        return os.mkdir, ("it ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": SIZE, "model": Evil()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps({"config": SIZE, "model": Evil()}))
    refused(Path("a.pt")), refused(Path("b.pt"))
    assert not Path("it ran").exists()
    torch.load("a.pt", weights_only=False)
    assert Path("it ran").exists()  # so the file was dangerous indeed
