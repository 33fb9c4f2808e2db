"""README.md is true: its commands are ones the programs take, its code is the code, its figures are of this tree."""

import contextlib
import glob
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "bench", "interp")]
import config
import sweep
from model import GPTNeo, GPTNeoConfig, save_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ELSEWHERE = README.split("## Use it elsewhere")[1].split("\n## ")[0]  # its python runs in test_hf.py and test_lens.py
PYTHON = re.findall(r"```python\n(.*?)```", README.replace(ELSEWHERE, ""), re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() if line.strip()]


def flags(script):
    """What its --help lists."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [script, "--help"])
        importlib.import_module(Path(script).stem).main()
    return set(re.findall(r"--\w+", text.getvalue()))


def test_every_command_is_one_that_works(monkeypatch):
    assert len(COMMANDS) > 15
    for command in COMMANDS:
        (program, *words), processes = shlex.split(command), 1
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            continue
        if program in ("pip", "python3"):
            assert command in ("pip install -r requirements.txt", "python3 -m venv .venv && . .venv/bin/activate"), command
            continue
        if program == "torchrun":  # its own parser
            known = torch.distributed.run.parse_args(words)
            words, processes = [known.training_script, *known.training_script_args], int(known.nnodes.split(":")[-1]) * int(known.nproc_per_node)
        script, *words = words
        assert (ROOT / script).is_file(), command
        if script == "train.py":
            settings = config.load([word if "=" in word else str(ROOT / word) for word in words])
            assert settings.batch_size % (processes * settings.grad_accum) == 0, command
        elif script == "bench/sweep.py":
            words = [path for word in words for path in glob.glob(word, root_dir=ROOT) or [word]]
            monkeypatch.chdir(ROOT)
            runs, _ = sweep.plan(words)
            assert len(runs) >= 2 and all(isinstance(settings, config.Config) for _, settings in runs), command
        elif program == "bash":
            assert (script, words) in [("bench/gpu.sh", []), ("bench/gpu.sh", ["--device", "cpu"])], command
        else:
            knobs = {f"--{name}" for name in config.FIELDS} if script in ("bench/speed.py", "bench/same.py", "bench/temperature.py") else set()
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= flags(script) | knobs, command


def test_quoted_code_is_the_code():
    """What the method section shows of model.py stands there word for word."""
    for block in PYTHON[:1]:
        assert block in (ROOT / "model.py").read_text()


def test_python_examples_run(tmp_path, monkeypatch):
    """The examples as they stand, in a folder where out/local_k2 is a run."""
    pieces = ["Once", " upon", " a", " time"]
    model = GPTNeo(GPTNeoConfig(vocab_size=256 + len(pieces) + 1, block_size=64, n_layer=2, n_head=2, n_embd=8))
    (tmp_path / "out" / "local_k2").mkdir(parents=True)
    save_checkpoint(tmp_path / "out" / "local_k2" / "best.pt", model.config, model.state_dict(), step=0, tokenizer={"name": "words", "pieces": pieces})
    monkeypatch.chdir(tmp_path)
    for block in PYTHON[1:]:
        exec(compile(block, "README.md", "exec"), {})


def test_nothing_is_left_to_be_filled_in():
    for text in (README, (ROOT / "RESULTS.md").read_text()):
        assert not re.findall(r"@[A-Z_]+@|TODO", text)


def test_links_and_line_counts_are_of_this_tree():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target
    for name, count in re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, re.MULTILINE):
        lines = len((ROOT / name).read_text().splitlines())  # roughly: changing a line must not break a test
        assert abs(lines - int(count)) <= 0.1 * lines, f"{name} has {lines} lines, README says {count}"
