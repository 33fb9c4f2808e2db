"""The knobs: defaults < config file < command line, and one clear line for every mistake.

    python -m pytest tests/test_config.py
"""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
import tempfile
import tokenize
import traceback
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as knobs
from config import Config, load
from model import GPTNeo, GPTNeoConfig, ModelError
from prepare import UserError

FILES = sorted(path for path in (ROOT / "config").glob("*.py") if path.stem != "__init__")
NAMES = list(knobs.FIELDS)


def refused(*words):
    with pytest.raises(ValueError) as caught:
        load(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config_file(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


# ---- what a run gets


def test_defaults_are_the_papers():
    paper = dict(n_layer=8, n_head=16, n_embd=128, block_size=256, batch_size=24, grad_accum=1, max_iters=400_000,
                 learning_rate=1.4e-3, warmup_iters=0, weight_decay=0.0, grad_clip=1.0, clean_coeff=1.0,
                 ablated_coeff=1.0, gate="softmax", attn_unit="dim", attention_layers="global")
    given = dataclasses.asdict(load([]))
    assert {name: given[name] for name in paper} == paper


def test_a_model_made_without_train_py_has_the_same_defaults():
    assert Config().model == GPTNeoConfig()
    shared = {field.name for field in dataclasses.fields(GPTNeoConfig)}
    assert shared - set(NAMES) == {"vocab_size"}  # which the data decide: no knob
    assert "no knob 'vocab_size'" in refused("--vocab_size=300")
    config = dataclasses.replace(load(["--n_layer=2", "--k_mlp=5"]), vocab_size=300)
    assert config.model == GPTNeoConfig(vocab_size=300, n_layer=2, k_mlp=5)


def test_the_command_line_beats_the_file_and_the_file_beats_the_defaults(tmp_path):
    path = config_file(tmp_path, "k_mlp = 5\nbatch_size = 6\n")
    config = load([path, "--batch_size=7"])
    assert (config.k_mlp, config.batch_size, config.n_layer) == (5, 7, 8)
    assert load(["--batch_size=7", path]) == config  # in any order
    assert load(["--batch_size", "7", path]) == config  # with a blank for the =


def test_a_config_files_run_folder_bears_its_name_unless_told(tmp_path):
    assert load([config_file(tmp_path, "k_mlp = 5")]).out == "out/mine"
    assert load([config_file(tmp_path, "out = 'elsewhere'")]).out == "elsewhere"
    assert load([config_file(tmp_path, "out = 'elsewhere'"), "--out=there"]).out == "there"


def test_every_knob_can_be_set_both_ways(tmp_path):
    """Each knob takes the text of a value that is not its default, and the same value out of a file."""
    other = {str: "a=b", bool: True, int: 1, float: 0.25, "n_embd": 256, "attention_layers": "global,local"}
    for field in knobs.FIELDS.values():
        choices = [choice for choice in getattr(field.type, "__args__", ()) if choice != field.default]
        value = choices[-1] if choices else other.get(field.name, other.get(field.type))
        value = 2 if value == field.default else value
        beside = {"ramp_end": 0.5} if field.name == "ramp_start" else {}  # what it needs
        expected = dataclasses.replace(Config(), **{field.name: value, **beside})
        words = [f"--{name}={needed}" for name, needed in beside.items()]
        assert load([f"--{field.name}={value}", *words]) == expected
        path = config_file(tmp_path, f"{field.name} = {value!r}")
        words += [] if field.name == "out" else [f"--out={Config.out}"]
        assert load([path, *words]) == expected
        assert type(getattr(expected, field.name)) is type(field.default)


def test_config_files_may_calculate_and_import(tmp_path):
    path = config_file(tmp_path, "import math\n_tokens = 2 ** 20\nmax_iters = _tokens // (24 * 256)\nlearning_rate = 1")
    config = load([path])
    assert config.max_iters == 170
    assert type(config.learning_rate) is float


# ---- the files that come with the project


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_files_are_short_and_load(path):
    assert load([str(path)]).out == f"out/{path.stem}"
    assert len(path.read_text().splitlines()) < 15


def test_there_is_one_config_file_for_every_row_of_the_papers_table():
    rows = {"baseline", *(f"{kind}_k{k}" for kind in ("local", "global") for k in (1, 2, 4, 8))}
    assert rows <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", [path for path in FILES if re.fullmatch(r"baseline|(local|global)_k\d", path.stem)],
                         ids=lambda path: path.stem)
def test_a_files_name_says_what_it_changes_and_nothing_else_changes(path):
    kind, _, k = path.stem.partition("_k")
    changes = {"ablation": "none"} if kind == "baseline" else {"ablation": kind, "k_attn": int(k), "k_mlp": int(k)}
    assert load([str(path)]) == Config(out=f"out/{path.stem}", **changes)


@pytest.mark.parametrize("name, geometry", [
    ("gptneo_125m", dict(hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]])),
    ("gptneo_1p3b", {})])  # transformers' defaults
def test_the_big_configs_are_gpt_neos_geometries(name, geometry):
    config, expected = load([str(ROOT / "config" / f"{name}.py")]), transformers.GPTNeoConfig(**geometry)
    with torch.device("meta"):
        model = GPTNeo(config.model)
        theirs = transformers.GPTNeoForCausalLM(expected)
    ours = transformers.GPTNeoConfig(**model.hf_config())
    for name in ("hidden_size", "num_heads", "attention_layers", "max_position_embeddings", "window_size", "vocab_size"):
        assert getattr(ours, name) == getattr(expected, name)
    assert ({name: value.shape for name, value in model.clean_state_dict().items()}
            == {name: value.shape for name, value in theirs.state_dict().items()})
    assert config.batch_size % (8 * config.grad_accum) == 0  # on the eight processes of its header


# ---- mistakes


@pytest.mark.parametrize("typed, meant", [("batchsize", "batch_size"), ("k_atn", "k_attn"), ("learning-rate", "learning_rate"),
                                          ("max_iter", "max_iters"), ("evalinterval", "eval_interval")])
def test_a_misspelt_knob_gets_the_nearest_name(typed, meant, tmp_path):
    assert f"'{typed}'" in refused(f"--{typed}=4") and f"'{meant}'" in refused(f"--{typed}=4")
    assert f"'{meant}'" in refused(f"--{typed}", "4")
    if typed.isidentifier():
        message = refused(config_file(tmp_path, f"{typed} = 4"))
        assert f"'{meant}'" in message and "mine.py" in message


def test_a_name_that_is_like_none_gets_a_way_to_find_one():
    assert "--help" in refused("--xyzzy=1")
    assert "'warmup'" in refused("--warmup=1")  # a beginning is not a name: argparse's abbreviations are off


@pytest.mark.parametrize("words", ["n_layer=two", "n_layer=2.0", "n_layer=1e3", "n_layer=", "n_layer=True", "learning_rate=fast",
                                   "learning_rate=", "learning_rate=True", "resume=yes", "resume=1", "wandb=", "ablation=globl",
                                   "ablation=", "dtype=float16", "compile=1", "gate=Softmax"])
def test_a_wrong_type_on_the_command_line_names_knob_and_value(words):
    name, value = words.split("=")
    message = refused(f"--{words}")
    assert message.startswith(f"{name}={value} is not ")
    if name in ("ablation", "gate", "dtype", "compile"):
        assert all(choice in message for choice in knobs.FIELDS[name].type.__args__)


@pytest.mark.parametrize("text", ["n_layer = True", "n_layer = 8.0", "n_layer = '8 layers'", "n_layer = None", "n_layer = [8]",
                                  "learning_rate = False", "learning_rate = 'fast'", "resume = 1", "wandb = None",
                                  "data = 7", "out = None", "out = True", "ablation = 'globl'", "ablation = None",
                                  "compile = 1", "dtype = 16"])
def test_a_wrong_type_in_a_file_names_knob_and_value(text, tmp_path):
    assert refused(config_file(tmp_path, text)).startswith(text.split(" ")[0] + "=")


@pytest.mark.parametrize("text, word", [("n_layer = = 8", "SyntaxError"), ("n_layer = layers", "NameError"), ("1 / 0", "ZeroDivision"),
                                        ("import no_such_module", "ModuleNotFoundError"), ("def f(:", "SyntaxError")])
def test_a_config_file_that_does_not_run_is_refused(text, word, tmp_path):
    message = refused(config_file(tmp_path, text))
    assert "mine.py" in message and word in message


def test_a_config_file_that_is_not_there_is_named(tmp_path):
    assert "config/local_k3.py" in refused("config/local_k3.py")
    assert str(tmp_path) in refused(str(tmp_path))  # a folder is no config file either


@pytest.mark.parametrize("words", [["config/local_k2.py", "config/local_k4.py"], ["-n_layer=2"], ["n_layer=2"], ["--n_layer"],
                                   ["--batch_size"], ["--=2"], [""]])
def test_words_that_are_no_knob_are_refused_rather_than_ignored(words):
    refused(*words)


@pytest.mark.parametrize("words", ["batch_size=0", "batch_size=-4", "grad_accum=0", "max_iters=0", "eval_interval=0", "eval_windows=0",
                                   "log_interval=0", "warmup_iters=-1", "warmup_iters=400000", "learning_rate=-1",
                                   "learning_rate=nan", "weight_decay=-0.1", "adam_eps=-1e-8", "grad_clip=-1", "grad_clip=nan",
                                   "seed=-1", "seed=9223372036854775808", "learning_rate=inf", "clean_coeff=-1", "ablated_coeff=nan",
                                   "beta1=1", "beta1=-0.1", "beta2=1.5", "beta2=nan"])
def test_a_value_that_cannot_work_is_refused(words):
    name, value = words.split("=")
    message = refused(f"--{words}")
    assert message.startswith(f"{name}=") and " must " in message
    assert float(re.match(r"\w+=(\S+)", message)[1]) == pytest.approx(float(value), nan_ok=True)


def test_an_empty_folder_name_is_refused():
    """As an unset shell variable leaves it: it would mean the folder that one is in."""
    assert refused("--out=") == "out= must name a folder" and refused("--data=") == "data= must name a folder"


# ---- help


def test_help_lists_every_knob_with_default_and_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # a terminal so wide that no comment is broken
    with pytest.raises(SystemExit) as ended:
        load(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    comments = {}
    for path in ("model.py", "config/__init__.py"):
        for token in tokenize.generate_tokens(io.StringIO((ROOT / path).read_text()).readline):
            named = re.match(r"    (\w+): ", token.line)
            if token.type == tokenize.COMMENT and named and named[1] in NAMES:
                comments[named[1]] = token.string.lstrip("# ")
    assert len(comments) > 20
    for name in NAMES:
        note = " ".join(f"{comments.get(name, '')} (default {getattr(Config, name)})".split())
        assert re.search(rf"--{name} \S+ {re.escape(note)}", shown), name


def test_a_percent_sign_in_a_comment_does_not_break_help(monkeypatch, capsys):
    monkeypatch.setattr(inspect, "getsource", lambda _: "    seed: int = 1337  # 100 % random\n")
    with pytest.raises(SystemExit):
        load(["--help"])
    assert "100 % random" in capsys.readouterr().out


# ---- which errors are messages, and which are bugs


@pytest.mark.parametrize("kind", [UserError, ModelError])
def test_an_error_raised_on_purpose_becomes_one_line_and_exit_code_1(kind):
    def main():
        raise kind("three blind mice")
    with pytest.raises(SystemExit) as ended:
        knobs.cli(main)
    assert ended.value.code == "error: three blind mice"  # Python prints a text code to stderr and exits with 1


def test_a_bug_keeps_its_traceback():
    def ours():
        raise ValueError("raised here, but not for the user")
    with pytest.raises(ValueError, match="invalid literal"):
        knobs.cli(lambda: int("a bug, not a message"))
    with pytest.raises(ValueError, match="not for the user"):
        knobs.cli(ours)
    with pytest.raises(KeyError):
        knobs.cli(lambda: {}["a bug"])
    with pytest.raises(OSError, match="not of the output"):
        knobs.cli(lambda: os.stat("/nowhere/not of the output"))


def ended(main, stdout=None, encoding="utf-8"):
    """cli(main) in a forked process, which costs no import of torch -> exit code, what came out, what was complained of."""
    out, complaints = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.dup2(out.fileno() if stdout is None else stdout, 1)
        os.dup2(complaints.fileno(), 2)
        sys.stdout, sys.stderr = (open(fd, "w", encoding=encoding, closefd=False) for fd in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        code = 0
        try:
            knobs.cli(main)
        except SystemExit as left:  # as Python itself does with a text
            code = 1
            print(left.code, file=sys.stderr)
        except BaseException:
            code = 2
            traceback.print_exc()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for file in (out, complaints):
        file.seek(0)
    return code, out.read(), complaints.read().decode()


def test_a_terminal_that_lacks_letters_gets_others():
    code, printed, complaints = ended(lambda: print("5 ± 1 ‘café’"), encoding="ascii")
    assert (code, printed, complaints) == (0, b"5 +- 1 ?caf??\n", "")


@pytest.mark.parametrize("length", [1, 10**6])  # noticed at the end, noticed in between
def test_output_that_goes_nowhere_is_one_line(length):
    reading, writing = os.pipe()
    os.close(reading)
    places = {writing: "Broken pipe"}
    if os.path.exists("/dev/full"):  # on Linux
        places[os.open("/dev/full", os.O_WRONLY)] = "No space left on device"
    for place, reason in places.items():
        code, _, complaints = ended(lambda: print("x" * length), stdout=place)
        assert (code, complaints) == (1, f"error: cannot write the output: {reason}\n")
        os.close(place)


def test_ctrl_c_is_one_word():
    assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM)) == (-signal.SIGTERM, b"", "")

    def interrupted():
        raise KeyboardInterrupt
    assert ended(interrupted) == (1, b"", "stopped\n")


@pytest.mark.parametrize("patient", [False, True])
def test_a_request_to_stop_is_a_flag_and_a_second_one_kills(patient):
    def main():
        stop = knobs.StopRequest(patient)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.requested, flush=True)
    told = "\nstopping where it can go on; once more: at once\n"
    expected = (0, b"True\nTrue\n", "") if patient else (-signal.SIGTERM, b"True\n", told)
    assert ended(main) == expected


def test_the_memory_of_a_device_is_infinite_where_the_system_does_not_say(monkeypatch):
    cpu = torch.device("cpu")
    assert 2**28 < knobs.device_memory(cpu) < 2**50
    for answer in (-1, 0):  # what POSIX says of a limit that it cannot tell
        monkeypatch.setattr(os, "sysconf", lambda name: answer)
        assert knobs.device_memory(cpu) == float("inf")
    monkeypatch.delattr(os, "sysconf")  # Windows
    assert knobs.device_memory(cpu) == float("inf")
