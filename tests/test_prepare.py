"""prepare.py against independent references: every kind of input, mistakes, and a killed run.

    python -m pytest tests/test_prepare.py

Offline. GPT-2's tokenizer takes part where ../shared/tiktoken or $TIKTOKEN_CACHE_DIR has its files.
"""

import collections
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas
import pytest
import regex
import tiktoken
from conftest import ROOT, contents

import prepare

SHARED = ROOT.parent / "shared" / "tiktoken"
if "TIKTOKEN_CACHE_DIR" not in os.environ and SHARED.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED)
HAS_GPT2 = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere")).is_dir()
TOKENIZERS = ["words"] + ["gpt2"] * HAS_GPT2
EOT = "<|endoftext|>"
# the pattern as OpenAI published it with GPT-2; prepare.py has tiktoken's equivalent
PUBLISHED = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

LETTERS = [code for code in range(1, 0x3000) if code != 13]
HARD = [  # texts with which tokenizers have trouble
    "Once upon a time, there was a cat. The cat's name was Tom.\nHe didn't sleep.",
    "\u201cLook!\u201d said Zo\u00eb \u2014 \u2018caf\u00e9\u2019 \U0001f468\u200d\U0001f469\u200d",
    "line one\n\n\ttabs  and   spaces\u00a0\u3000end, \u4f60\u597d\uff0c 12345 3.14 x_y <|endof",
    "".join(map(chr, random.Random(0).choices(LETTERS, k=400))).strip(),
    "a" + "b" * 300,
]
ANIMALS = "dog cat bird frog fox".split() * 8
STORIES = HARD + [f"Story {i}: the {word} saw the {word}." for i, word in enumerate(ANIMALS)]
VAL = ["A held-out story about a dog.", "Another one, with an unseen word: zygote \U0001f40d."]


def write_input(path, stories):
    """The same stories as any kind of file, by suffix. Adds padding, empty stories and None."""
    table = pandas.DataFrame({"id": 1, "text": [*(f" {story}\n" for story in stories), "", None]})
    text = "".join(f"\n {story} \n{EOT}\n" for story in [*stories, ""])
    data = {".txt": text.encode(), ".csv": table.to_csv().encode(), ".parquet": table.to_parquet(),
            ".jsonl": table.to_json(orient="records", lines=True).encode()}[path.suffixes[0]]
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def make(folder, *more, train=STORIES, val=VAL, tokenizer="words", kind="txt"):
    """Prepares these stories in folder / "out"."""
    write_input(folder / f"a.{kind}", train)
    write_input(folder / f"b.{kind}", val)
    prepare.main(["--train", f"{folder}/a.{kind}", "--val", f"{folder}/b.{kind}", "--tokenizer",
                  tokenizer, "--out", f"{folder}/out", *more])
    return folder / "out"


def make_raw(folder, name, data):
    """Prepares one file with exactly these bytes, and the same ones as validation text."""
    (folder / name).write_bytes(data)
    prepare.main(["--train", f"{folder}/{name}", "--val", f"{folder}/{name}", "--tokenizer",
                  "words", "--out", f"{folder}/out", "--force"])
    return stories_in(folder / "out", "train")


def stories_in(folder, split):
    """The stories of a split, decoded: the inverse of prepare.py."""
    meta, tokens = prepare.load_meta(folder), prepare.load_tokens(folder, split)
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    parts = np.split(tokens, np.flatnonzero(tokens == meta["eot"]) + 1)
    assert len(parts.pop()) == 0  # end-of-text is the last token
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


def check_complete(folder):
    """Every fact of meta.json, recomputed."""
    meta = prepare.load_meta(folder)
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    assert (meta["vocab_size"], meta["eot"]) == (tokenizer.n_vocab, tokenizer.eot_token)
    for split in "train", "val":
        raw, stories = (folder / f"{split}.bin").read_bytes(), stories_in(folder, split)
        size = sum(len(story.encode()) for story in stories)
        assert meta[split] == {"tokens": len(raw) // 2, "stories": len(stories), "bytes": size,
                               "sha256": hashlib.sha256(raw).hexdigest()}
    return meta


def merged(word, ranks):
    """Byte-pair encoding from its definition: join the known pair of lowest rank, while any is."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        known = [(rank, i) for rank, i in pairs if rank is not None]
        if not known:
            return [ranks[part] for part in parts]
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def brute_force(text, ranks):
    return [token for piece in PUBLISHED.findall(text) for token in merged(piece.encode(), ranks)]


def most_frequent(stories, count):
    counts = collections.Counter()
    for story in stories:
        counts.update(piece for piece in PUBLISHED.findall(story) if len(piece.encode()) > 1)
    return sorted(counts, key=lambda piece: (-counts[piece], piece))[:count]


def reference(stories, train, tokenizer, vocab_size):
    """The tokens of `stories`, without prepare.py: one story after the other."""
    if tokenizer == "gpt2":
        encoding = tiktoken.get_encoding("gpt2")
        return sum([[*encoding.encode_ordinary(story), 50256] for story in stories], [])
    pieces = [piece.encode() for piece in most_frequent(train, vocab_size - 257)]
    tokens = [bytes([byte]) for byte in range(256)] + pieces
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return sum([[*brute_force(story, ranks), len(ranks)] for story in stories], [])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", "txt txt.gz jsonl jsonl.gz csv parquet".split())
def test_every_input_gives_the_reference_tokens(tmp_path, kind, tokenizer):
    size = ["--vocab_size", "270"] if (kind, tokenizer) == ("txt", "words") else []
    out = make(tmp_path, *size, tokenizer=tokenizer, kind=kind)
    vocab_size = check_complete(out)["vocab_size"]
    assert not size or vocab_size == 270
    for split, stories in ("train", STORIES), ("val", VAL):
        tokens = prepare.load_tokens(out, split)
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert tokens.tolist() == reference(stories, STORIES, tokenizer, vocab_size)
        assert stories_in(out, split) == stories  # lossless


def test_threads_keep_the_order_of_many_stories(tmp_path):
    stories = [f"Story {i}." for i in range(20_000)]
    out = make(tmp_path, train=stories)
    check_complete(out)
    assert stories_in(out, "train") == stories


def test_toy_stories_are_those_that_models_were_trained_on(tmp_path):
    prepare.main(["toy", "--stories", "2000", "--out", str(tmp_path / "toy")])
    meta = check_complete(tmp_path / "toy")
    assert meta["checksum"] == "5e786cf2da43a281"  # from commit 30f8be2
    assert (meta["train"]["stories"], meta["val"]["stories"]) == (1988, 12)
    tokenizer, words = prepare.load_tokenizer(meta["tokenizer"]), prepare.word_lists()
    for word in words["girls"] + words["boys"] + words["places"] + words["objects"]:
        assert len(tokenizer.encode_ordinary(" " + word)) == 1, word


def test_held_out_share_is_seeded_complete_and_about_right(monkeypatch):
    def split_off(stories, share, seed):
        monkeypatch.setattr(prepare, "texts_of", lambda args: [(None, story) for story in stories])
        args = Namespace(val_share=share, seed=seed)
        return list(prepare.stories_of(args, collections.Counter()))

    stories = [f"story {i}" for i in range(5000)]
    split = split_off(stories, 0.1, 0)
    assert [story for _, story in split] == stories and split == split_off(stories, 0.1, 0)
    assert split != split_off(stories, 0.1, 1)
    assert 400 < sum(chosen == "val" for chosen, _ in split) < 600
    for seed in range(30):
        for share in 0.001, 0.5, 0.999:  # no empty split, and no story in both
            split = set(split_off(["a", "a", *map(str, range(5))] * 2, share, seed))
            assert len(split) == 6 and {chosen for chosen, _ in split} == {"train", "val"}


def test_separators_and_line_ends_wherever_they_stand(tmp_path, capsys):
    text = f"\ufeffone{EOT}two\r{EOT}\rthree\n{EOT}{EOT} four {EOT}\r\nfi\r\nve\rsix<|endof"
    stories = ["one", "two", "three", "four", "fi\nve\nsix<|endof"]
    assert make_raw(tmp_path, "a.txt", text.encode()) == stories
    printed = capsys.readouterr().out
    assert "4 line ends CRLF or CR became LF" in printed and "inside" not in printed  # both splits
    rows = [f"one{EOT}", f"{EOT}\ntwo {EOT} {EOT}", f"three {EOT} four{EOT}five", EOT]
    data = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    kept = ["one", "two", f"three {EOT} four{EOT}five"]  # inside a text it is ordinary text
    assert make_raw(tmp_path, "a.jsonl", data) == kept
    assert f"warning: 4 times {EOT} stands inside a text" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_very_long_runs_and_all_white_space_are_encoded_exactly(tokenizer, monkeypatch):
    spec = {"name": "words", "pieces": ["  ", "\n\n", " the", "aa"]}
    encoding = prepare.load_tokenizer(spec if tokenizer == "words" else {"name": "gpt2"})
    story = "a" + "\u3000" * 1_000_005 + "the end"
    with pytest.raises(BaseException, match="(?i)stack"):
        encoding.encode_to_numpy(story)
    expected = [*encoding.encode_ordinary("a" + "\u3000" * 1_000_004),
                *encoding.encode_ordinary("\u3000the end"), encoding.eot_token]
    assert prepare.encode([("train", story)], encoding)[0].tolist() == expected
    # small limits, against the definition
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    monkeypatch.setattr(prepare, "LONG_SPACE", 3)
    rng, batch = random.Random(0), []
    for _ in range(300):
        text = "".join(rng.choice(" \n\t\u00a0\x1caa.1'") * rng.randint(1, 9) for _ in range(12))
        batch.append(("train", f"x{text}x"))
    for (_, story), tokens in zip(batch, prepare.encode(batch, encoding)):
        assert tokens.tolist() == [*brute_force(story, ranks), encoding.eot_token], story
    expected = most_frequent([story for _, story in batch], 10**6)
    assert prepare.frequent_pieces(batch, 10**6) == expected


TEXT = b"one story<|endoftext|>and two"
MISTAKES = [  # command line, bytes of the file that it names, what the message says
    ("--train a.txt --val absent.txt", TEXT, "no file absent.txt"),
    ("toy --train a.txt", TEXT, "not allowed with argument toy"),
    ("toy --vocab_size 65537", None, "between 258 and 65,536"),
    ("--train a.txt", b"one story", "no story for val: give two"),
    ("--train a.txt", "x".encode("utf-16"), "cannot read a.txt.* not UTF-8"),
    ("--train a.jsonl", b'{"text": \n', "cannot read a.jsonl"),
    ("--train a.jsonl", b'{"b": "x", "n": 1}', "cannot read a.jsonl .*'text'.*--text_column"),
    ("--train a.parquet", b"no parquet", "cannot read a.parquet"),
    ("--train a.txt.gz", gzip.compress(b"cut off " * 999, mtime=0)[:-9], "cannot read a.txt.gz"),
]


@pytest.mark.parametrize("line, data, expected", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, line, data, expected):
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path(re.search(r"a\.\S+", line)[0]).write_bytes(data)
    with pytest.raises(prepare.UserError, match=f"^[^\n]*{expected}[^\n]*$"):
        prepare.main([*line.split(), "--tokenizer", "words", "--out", "out"])
    assert len(list(tmp_path.iterdir())) == (data is not None)


def test_no_network_is_one_line(tmp_path, monkeypatch):
    dead = "http://127.0.0.1:9"  # no proxy there: the download fails where there is a network, too
    for name, value in (("HTTPS_PROXY", dead), ("https_proxy", dead), ("HF_HUB_OFFLINE", "1"),
                        ("TIKTOKEN_CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    for words, message in (("toy --tokenizer gpt2", "cannot load the .* --tokenizer words"),
                           ("--dataset nobody/nothing --tokenizer words",
                            "cannot read nobody/nothing .*--train FILE or toy")):
        command = [sys.executable, ROOT / "prepare.py", *words.split(), "--out", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert re.match(f"error: {message}", done.stderr.splitlines()[-1])


def test_dataset_folder_with_and_without_validation(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "MySet"
    folder.mkdir()
    write_input(folder / "train.parquet", STORIES)
    write_input(folder / "validation.parquet", VAL)
    for left in [STORIES, VAL], [STORIES]:
        prepare.main(["--dataset", str(folder), "--tokenizer", "words", "--force",
                      "--out", str(tmp_path / "out")])
        check_complete(tmp_path / "out")
        splits = [stories_in(tmp_path / "out", split) for split in ("train", "val")]
        assert sorted(sum(splits, [])) == sorted(sum(left, []))
        assert (splits == left) == (len(left) == 2)
        (folder / "validation.parquet").unlink(missing_ok=True)


def test_help_imports_no_slow_package():
    code = ("import sys, prepare\ntry: prepare.main(['--help'])\nexcept SystemExit: pass\n"
            "sys.exit([m for m in ('datasets', 'pyarrow', 'torch', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--train" in done.stdout and done.stderr == "[]\n"


def test_existing_data_need_force_and_survive_a_failure(tmp_path):
    out = make(tmp_path)
    before = contents(out)
    with pytest.raises(prepare.UserError, match="already holds data: add --force"):
        make(tmp_path)
    with pytest.raises(prepare.UserError, match="not UTF-8"):
        make_raw(tmp_path, "bad.txt", b"fine\n<|endoftext|>\n\xff")
    assert contents(out) == before
    assert stories_in(make(tmp_path, "--force", train=VAL), "train") == VAL


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_run_killed_between_the_last_moves_leaves_no_mixture(tmp_path, moves):
    out = make(tmp_path)
    code = f"""
import os, prepare
real, left = os.replace, [0] * {moves}
os.replace = lambda *paths: (left.pop(), real(*paths)) if left else os._exit(9)  # as kill -9 then
prepare.main(["toy", "--stories", "50", "--out", {str(out)!r}, "--force"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 9
    with pytest.raises(prepare.UserError, match="no prepared data"):
        prepare.load_tokens(out, "train")
    make(tmp_path, train=VAL)  # without --force: what the killed run left is no data
    check_complete(out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_the_old_data(tmp_path, number):
    out = make(tmp_path)
    before = contents(out)
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "toy", "--stories", "99999",
                                "--out", out, "--force"], stderr=subprocess.PIPE, text=True)
    while not (out / "unfinished").exists():
        assert process.poll() is None
    process.send_signal(number)
    printed = process.communicate()[1]
    assert contents(out) == before
    if number != signal.SIGKILL:
        assert process.returncode == 1 and printed.endswith("stopped\n")
        assert not (out / "unfinished").exists()
    make(tmp_path, "--force", train=VAL)
    check_complete(out)


def test_one_process_at_a_time_has_a_folder(tmp_path):
    with prepare.locked(tmp_path / "run"):
        with pytest.raises(prepare.UserError, match="another process is writing"):
            prepare.locked(tmp_path / "run").__enter__()
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()  # only an empty folder is removed
    with pytest.raises(prepare.UserError, match="cannot lock .*file"):
        prepare.locked(tmp_path / "run" / "file").__enter__()


def test_readers_refuse_damaged_files(tmp_path):
    out = make(tmp_path)
    raw = (out / "train.bin").read_bytes()
    flipped = bytes([raw[0] ^ 1]) + raw[1:]
    for damaged in raw[:-2], raw[:-1], raw + b"\0\0", b"", flipped:
        (out / "train.bin").write_bytes(damaged)
        with pytest.raises(prepare.UserError, match="train.bin is damaged.* --force"):
            prepare.load_tokens(out, "train")
    (out / "meta.json").unlink()
    with pytest.raises(prepare.UserError, match="no prepared data in .*--data.*--help"):
        prepare.load_meta(out)
