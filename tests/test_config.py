"""The knobs: defaults < config file < command line, the schedule, and how scripts end."""

import re
from dataclasses import asdict, replace
from unittest.mock import Mock

import pytest

from conftest import ROOT

import config as knobs
from config import Config, load
from model import GPTNeoConfig, ModelError
from prepare import UserError

FILES = sorted(path for path in (ROOT / "config").glob("*.py") if path.stem != "__init__")


def refused(*words):
    with pytest.raises(UserError) as caught:
        load(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def mine(tmp_path):
    """A function that writes a config file mine.py and returns its path."""
    path = tmp_path / "mine.py"
    return lambda text: path.write_text(text) and str(path)


def test_defaults_are_the_papers_and_the_models():
    paper = dict(n_layer=8, n_head=16, n_embd=128, block_size=256, batch_size=24,
                 max_iters=400_000, learning_rate=1.4e-3, warmup_iters=0, weight_decay=0.0,
                 grad_clip=1.0, clean_coeff=1.0, ablated_coeff=1.0, gate="softmax")
    assert asdict(load([])).items() >= paper.items() and Config().model == GPTNeoConfig()
    changed = replace(load(["--n_layer=2", "--k_mlp=5"]), vocab_size=300)
    assert changed.model == GPTNeoConfig(vocab_size=300, n_layer=2, k_mlp=5)


def test_the_command_line_beats_the_file_and_the_file_beats_the_defaults(mine):
    path = mine("import math\n_half = 3\nk_mlp = 5\nbatch_size = 2 * _half\nlearning_rate = 1\n")
    config = load([path, "--batch_size=7"])
    assert (config.k_mlp, config.batch_size, config.n_layer) == (5, 7, 8)
    assert type(config.learning_rate) is float
    assert load(["--batch_size", "7", path]) == config
    assert config.out == "out/mine"
    assert load([mine("out = 'elsewhere'")]).out == "elsewhere"
    assert load([mine("out = 'elsewhere'"), "--out=there"]).out == "there"


def test_every_knob_can_be_set_both_ways(mine):
    others = {str: "a=b", bool: True, int: 1, float: 0.25, "n_embd": 256, "grad_accum": 2,
              "attention_layers": "global,local"}
    for name, field in knobs.FIELDS.items():
        choices = [choice for choice in getattr(field.type, "__args__", ())
                   if choice != field.default]
        value = choices[-1] if choices else others.get(name, others.get(field.type))
        also = {"ramp_end": 0.5} if name == "ramp_start" else {}  # what it needs
        expected = replace(Config(), **{name: value, **also})
        words = [f"--{other}={needed}" for other, needed in also.items()]
        assert load([f"--{name}={value}", *words]) == expected
        words += [f"--out={expected.out}"]
        assert load([mine(f"{name} = {value!r}"), *words]) == expected
        assert type(getattr(expected, name)) is type(field.default)
    assert load(["--resume"]).resume is load(["--resume=true"]).resume is True
    assert load(["--resume=False"]).resume is False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_files_load_and_say_no_more_than_their_name(path):
    config = load([str(path)])
    assert config.out == f"out/{path.stem}" and len(path.read_text().splitlines()) < 15
    if row := re.fullmatch(r"(baseline|local|global)(?:_k(\d))?", path.stem):  # of Table 1
        kind, k = row.groups()
        changes = dict(ablation=kind, k_attn=int(k), k_mlp=int(k)) if k else dict(ablation="none")
        assert config == Config(out=config.out, **changes)


def test_the_schedule_at_points_computed_by_hand():
    config = Config(max_iters=110, warmup_iters=10, learning_rate=0.4, ablated_coeff=2.0,
                    ramp_start=0.2, ramp_end=0.6)
    rates = {0: 0.04, 4: 0.2, 9: 0.4, 10: 0.4, 60: 0.2, 110: 0.0}
    rates |= {35: 0.2 * (1 + 0.5**0.5), 85: 0.2 * (1 - 0.5**0.5)}  # an eighth, three eighths
    assert {step: config.schedule(step)[0] for step in rates} == pytest.approx(rates)
    coeffs = {0: 0.0, 22: 0.0, 33: 0.5, 44: 1.0, 66: 2.0, 110: 2.0}
    assert {step: config.schedule(step)[1] for step in coeffs} == pytest.approx(coeffs)
    assert {Config(ablation="none").schedule(step)[1] for step in (0, 99)} == {0.0}
    assert Config().schedule(0) == (1.4e-3, 1.0)  # the paper: the whole coefficient at once
    jump = Config(max_iters=10, ramp_start=0.5, ramp_end=0.5)
    assert [jump.schedule(step)[1] for step in (4, 5)] == [0.0, 1.0]


# ---- mistakes, help, and the end of a script


@pytest.mark.parametrize("words, message", [
    ("--batchsize=4", "no knob batchsize: did you mean --batch_size?"), ("--xyzzy=1", "--help"),
    ("--learning-rate=4", "did you mean --learning_rate?"), ("--warmup=1", "no knob warmup"),
    ("--vocab_size=300", "no knob vocab_size"), ("n_layer=2", "no config file n_layer=2"),
    ("--n_layer=two", "--n_layer: invalid int value: 'two'"), ("--n_layer=2.0", "--n_layer"),
    ("--learning_rate=fast", "--learning_rate: invalid float"), ("--resume=yes", "--resume"),
    ("--ablation=globl", "--ablation: invalid choice: 'globl'"), ("--n_layer", "--n_layer"),
    ("--k_attn=0", "k_attn=0 must be from 1 to 127"), ("--k_mlp=512", "must be from 1 to 511"),
    ("--attn_unit=head --k_attn=16", "k_attn=16 must be from 1 to 15"),
    ("--n_head=3", "n_embd=128 is not divisible by n_head=3"),
    ("--warmup_iters=9 --max_iters=9", "must be below max_iters=9"), ("--ramp_start=30", "shares"),
    ("--attention_layers=global,local,local", "attention_layers=global,local,local must"),
    ("--attention_layers=globl", "attention_layers=globl must")])
def test_a_mistake_is_one_line_that_names_it(words, message):
    assert message in refused(*words.split(" "))


@pytest.mark.parametrize("text, message", [
    ("batchsize = 4", "did you mean --batch_size?"), ("n_layer = 8.0", "invalid int value: '8.0'"),
    ("resume = 1", "--resume"), ("betas = (0.9, 0.95)", "no knob betas"),
    ("def helper(): pass", "no knob helper"), ("init_form = 'a b'", "did you mean --init_from?")])
def test_a_mistake_in_a_config_file_is_one_too(text, message, mine):
    assert message in refused(mine(text))


def test_help_lists_every_knob_with_default_and_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # a terminal so wide that no comment is broken
    with pytest.raises(SystemExit) as ended:
        load(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    source = (ROOT / "model.py").read_text() + (ROOT / "config" / "__init__.py").read_text()
    for name in knobs.FIELDS:
        comment = re.search(rf"^    {name}: .*?  # (.*)$", source, re.MULTILINE)
        note = f"{comment[1] if comment else ''} (default {getattr(Config, name)})".lstrip()
        assert re.search(rf"--{name} \S+ {re.escape(note)}", shown), name
    assert ended.value.code == 0


def test_errors_for_users_are_one_line_and_bugs_keep_their_traceback():
    for kind in (UserError, ModelError):
        with pytest.raises(SystemExit) as ended:
            knobs.cli(Mock(side_effect=kind("three blind mice")))
        assert ended.value.code == "error: three blind mice"  # to stderr, with exit code 1
    for kind in (ValueError, KeyError, OSError, RuntimeError):
        with pytest.raises(kind, match="a bug"):
            knobs.cli(Mock(side_effect=kind("a bug")))
