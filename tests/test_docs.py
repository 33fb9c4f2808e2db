"""README.md and docs/ are true: commands run, code is the code, Python examples run, links exist.

Commands run in this process, in the order of the page, on tiny runs. Those of NOT_RUN need a GPU, a
hub, minutes, or processes of their own; of these only the flags are checked.
"""

import contextlib
import glob
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from conftest import ROOT

import config
import prepare

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
OF_OTHER_LIBRARIES = "elsewhere.md"  # its Python runs in test_hf.py and test_lens.py
NOT_RUN = re.compile(
    r"make |pip|python3|torchrun|bash|bench\.|prepare.py( --dataset|$)|--dry_run|gpt-neo|unlearn")
# what is added to a command, so that it takes a second
TINY = ("--data=data/toy --n_layer=2 --n_head=2 --n_embd=16 --block_size=64 --batch_size=4 "
        "--max_iters=2 --eval_windows=2 --device=cpu")
FASTER = {"train": TINY, "prepare": "--stories=1000 --val_share=0.2 --force",
          "interp.n2g": "--tokens 1000 --snippets 4", "interp.explain": "--window 16 --neurons 2",
          "interp.sae": "--steps 5 --tokens 3000 --eval_windows 2 --expansion 1"}


def commands(page):
    """The lines of its sh blocks, each once, without comments."""
    shell = "".join(re.findall(r"```sh\n(.*?)```", PAGES[page], re.DOTALL))
    lines = [line.split("  #")[0].strip() for line in shell.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))


def program(command):
    """(module, words) of a command that runs a program of this project; (None, words) of others."""
    first, *words = shlex.split(command)
    if first == "torchrun":  # its own parser
        known = torch.distributed.run.parse_args(words)
        words = [known.training_script, *known.training_script_args]
    elif first != "python":
        return None, [first, *words]
    if words[0] == "-m":
        return words[1], words[2:]
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def call(module, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *words])
        config.cli(importlib.import_module(module).main)


@pytest.mark.parametrize("page, command", [
    (page, command) for page in PAGES for command in commands(page) if NOT_RUN.search(command)])
def test_flags_of_a_command_that_is_not_run(page, command):
    module, words = program(command)
    if module in ("train", "bench.sweep"):
        own = {"--seeds", "--per_gpu"}  # of the sweep
        knobs = [word for word in words if word.startswith("--") and word[:9] not in own]
        for path in [word for word in words if not word.startswith("-")]:
            for file in ROOT.glob(path):
                config.load([str(file), *(word for word in knobs if "seeds" not in word)])
    elif module:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            call(module, [*words[:1], "--help"] if "openai" in words else ["--help"])
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given - {"--batch_size"} <= set(re.findall(r"--\w+", text.getvalue()))
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("pip", "python3")


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config").symlink_to(ROOT / "config")
    Path("stories.txt").write_text("".join(f"Story {n}.\n<|endoftext|>\n" for n in range(50)))
    prepare.main(["toy", "--stories=1000", "--val_share=0.2"])
    runs = [] if page == "README.md" else ["baseline", "global_k2", "local_k2"]
    for name in runs:  # README trains its own
        call("train", [f"config/{name}.py", *TINY.split()])
        call("train", [f"config/{name}.py", *TINY.split(), f"--out=out/sweep/{name}_seed1"])
    for command in commands(page):
        module, words = program(command)
        if module and not NOT_RUN.search(command):
            words = [found for word in words for found in sorted(glob.glob(word)) or [word]]
            call(module, [*words, *FASTER.get(module, "").split()])
    for example in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        if page != OF_OTHER_LIBRARIES and not example.startswith(" "):
            exec(compile(example, page, "exec"), {})


def test_quoted_code_is_the_code():
    (quoted,) = re.findall(r"```python\n( .*?)```", PAGES["README.md"], re.DOTALL)
    assert quoted in (ROOT / "model.py").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_are_of_this_tree(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", prose):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:interp|bench|tests|docs|assets)/[\w./]+)`", prose):
        assert (ROOT / name).exists(), name
    assert not re.findall(r"@[A-Z_]+|TODO", PAGES[page] + (ROOT / "RESULTS.md").read_text())
