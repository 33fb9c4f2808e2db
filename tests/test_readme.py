"""README.md is true: its commands are ones the programs take, its code is the code, links exist.

    python -m pytest tests/test_readme.py
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch.distributed.run

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "interp")]
import config
from model import GPTNeo, GPTNeoConfig, save_checkpoint

README = (ROOT / "README.md").read_text()
# what stands there for other libraries runs in test_hf.py and test_lens.py
ELSEWHERE = re.search(r"\n## Use it elsewhere\n.*?(?=\n## |\Z)", README, re.DOTALL)
OWN = README.replace(ELSEWHERE[0], "") if ELSEWHERE else README
QUOTED, *EXAMPLES = re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)
SHELL = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.split("  #")[0].strip() for line in SHELL.splitlines() if line.strip()]
KNOBS = {f"--{name}" for name in config.FIELDS}


def flags(script):
    """What its --help lists."""
    name = Path(script).stem
    with (pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit),
          contextlib.redirect_stdout(io.StringIO()) as text):
        patch.setattr(sys, "argv", [script, "--help"])
        importlib.import_module(name).main()
    shown = set(re.findall(r"--\w+", text.getvalue()))
    return shown | KNOBS if name in ("speed", "sweep") else shown


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_works(command):
    (program, *words), processes = shlex.split(command), 1
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program in ("pip", "python3"):
        assert command in ("pip install -r requirements.txt",
                           "python3 -m venv .venv && . .venv/bin/activate")
    else:
        if program == "torchrun":  # its own parser
            known = torch.distributed.run.parse_args(words)
            words = [known.training_script, *known.training_script_args]
            processes = int(known.nnodes.split(":")[-1]) * int(known.nproc_per_node)
        elif words[0] == "-m":
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        script, *words = words
        assert (ROOT / script).is_file()
        if script == "train.py":
            run = config.load([word if "=" in word else str(ROOT / word) for word in words])
            assert run.batch_size % (processes * run.grad_accum) == 0
        elif program != "bash":
            given = {word.split("=")[0] for word in words if word.startswith("--")}
            assert given <= flags(script)


def test_quoted_code_is_the_code():
    """What the method section shows of model.py stands there word for word."""
    assert QUOTED in (ROOT / "model.py").read_text()


def test_python_examples_run(tmp_path, monkeypatch):
    """As they stand, in a folder where out/local_k2 is a run."""
    pieces = ["Once", " upon", " a", " time"]
    shape = dict(vocab_size=261, block_size=64, n_layer=2, n_head=2, n_embd=8)
    model, folder = GPTNeo(GPTNeoConfig(**shape)), tmp_path / "out" / "local_k2"
    folder.mkdir(parents=True)
    save_checkpoint(folder / "best.pt", model.config, model.state_dict(), step=0,
                    tokenizer={"name": "words", "pieces": pieces})
    monkeypatch.chdir(tmp_path)
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), {})


def test_links_and_line_counts_are_of_this_tree():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target
    for name, count in re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, re.MULTILINE):
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - int(count)) <= 0.1 * lines, f"{name} has {lines} lines"
    for text in (README, (ROOT / "RESULTS.md").read_text()):
        assert not re.findall(r"@[A-Z_]+@|TODO", text)
