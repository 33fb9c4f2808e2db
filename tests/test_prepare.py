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
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
import prepare

SHARED = ROOT.parent / "shared" / "tiktoken"
if "TIKTOKEN_CACHE_DIR" not in os.environ and SHARED.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED)
HAS_GPT2 = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere")).is_dir()
TOKENIZERS = ["words"] + ["gpt2"] * HAS_GPT2
FILES = {"train.bin", "val.bin", "meta.json"}
EOT = "<|endoftext|>"
# the pattern as OpenAI published it with GPT-2; prepare.py has tiktoken's equivalent
PUBLISHED = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

LETTERS = [code for code in range(1, 0x3000) if not 0xD800 <= code < 0xE000]
HARD = [  # texts with which tokenizers have trouble
    "Once upon a time, there was a cat. The cat's name was Tom.\nHe didn't sleep.",
    "\u201cLook!\u201d said Zo\u00eb \u2014 \u2018caf\u00e9\u2019 na\u00efve \u00e2\u20ac\u0153mis-"
    "encoded\u00e2\u20ac\u009d \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "line one\r\nline two\r\n\r\n\ttabs  and   spaces\u00a0\u3000end",
    f"a story that says {EOT} in the middle of a line, and <|endof",
    "".join(map(chr, random.Random(0).choices(LETTERS, k=400))).strip(),
    "\u4f60\u597d\uff0c\u4e16\u754c 12345 3.14 x_y a" + "b" * 300,
]
ANIMALS = "dog cat bird frog fox".split() * 8
STORIES = [story.replace("\r", "").replace(EOT, "<|endof") for story in HARD]  # as they come back
STORIES += [f"Story {i}: the {word} saw the {word} and ran." for i, word in enumerate(ANIMALS)]
VAL = ["A held-out story about a dog.", "Another one, with an unseen word: zygote \U0001f40d."]


def write_input(path, stories):
    """The same stories as any kind of file, by suffix. Adds padding, empty stories and None."""
    import pandas

    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "txt":
        data = "".join(f"\n {story} \n{EOT}\n" for story in stories) + f" \n{EOT}\n"
        data = data.encode()
    elif kind == "jsonl":
        padded = [f" {story}\n" for story in stories]
        rows = [json.dumps({"id": 1, "text": text}) for text in [*padded, "", None]]
        data = "\n\n".join(rows).encode()
    elif kind == "csv":
        data = pandas.DataFrame({"id": 1, "text": [*stories, ""]}).to_csv().encode()
    else:
        data = pandas.DataFrame({"id": 1, "text": [*stories, None]}).to_parquet()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return str(path)


def make(tmp_path, *more, out="out", train=STORIES, val=VAL, tokenizer="words", kind="txt"):
    files = ["--train", write_input(tmp_path / f"a.{kind}", train)]
    files += ["--val", write_input(tmp_path / f"b.{kind}", val)] if val else []
    prepare.main([*files, "--tokenizer", tokenizer, "--out", str(tmp_path / out), *more])
    return tmp_path / out


def make_raw(tmp_path, name, data):
    """Prepares one file with exactly these bytes, and the same ones as validation text."""
    (tmp_path / name).write_bytes(data)
    file = str(tmp_path / name)
    prepare.main(["--train", file, "--val", file, "--tokenizer", "words",
                  "--out", str(tmp_path / "out"), "--force"])
    return stories_in(tmp_path / "out", "train")


def stories_in(folder, split):
    """The stories of a split, decoded: the inverse of prepare.py."""
    meta, tokens = prepare.load_meta(folder), prepare.load_tokens(folder, split)
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    parts = np.split(tokens, np.flatnonzero(tokens == meta["eot"]) + 1)
    assert len(parts.pop()) == 0  # end-of-text is the last token
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def check_complete(folder):
    """Every fact of meta.json, recomputed."""
    meta = prepare.load_meta(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert not (folder / "unfinished").exists()
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    assert (meta["vocab_size"], meta["eot"]) == (tokenizer.n_vocab, tokenizer.eot_token)
    for split in "train", "val":
        raw, stories = (folder / f"{split}.bin").read_bytes(), stories_in(folder, split)
        size = sum(len(story.encode()) for story in stories)
        assert meta[split] == {"tokens": len(raw) // 2, "stories": len(stories), "bytes": size,
                               "sha256": hashlib.sha256(raw).hexdigest()}
    return meta


def script(*args, **env):
    command = [sys.executable, ROOT / "prepare.py", *map(str, args)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


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


def reference(stories, train, tokenizer, vocab_size=10_000):
    """The tokens of `stories`, without prepare.py: one story after the other."""
    if tokenizer == "gpt2":
        encoding = tiktoken.get_encoding("gpt2")
        parts = [[*encoding.encode_ordinary(story), 50256] for story in stories]
        return sum(parts, [])
    counts = collections.Counter()
    for story in train:
        counts.update(piece.encode() for piece in PUBLISHED.findall(story))
    pieces = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p], p))
    tokens = [bytes([byte]) for byte in range(256)] + pieces[: vocab_size - 257]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return sum([[*brute_force(story, ranks), len(ranks)] for story in stories], [])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", "txt txt.gz jsonl jsonl.gz csv csv.gz parquet".split())
def test_every_input_gives_the_reference_tokens(tmp_path, kind, tokenizer):
    size = ["--vocab_size", "270"] if (kind, tokenizer) == ("txt", "words") else []
    out = make(tmp_path, "--workers", "1", *size, tokenizer=tokenizer, kind=kind)
    vocab_size = check_complete(out)["vocab_size"]
    assert not size or vocab_size == 270
    for split, stories in ("train", STORIES), ("val", VAL):
        tokens = prepare.load_tokens(out, split)
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert tokens.tolist() == reference(stories, STORIES, tokenizer, vocab_size)
        assert stories_in(out, split) == stories  # lossless


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_number_of_processes_does_not_matter(tmp_path, tokenizer, monkeypatch):
    options = {"train": STORIES * 8, "val": None, "tokenizer": tokenizer}
    one = make(tmp_path, "--workers", "1", out="one", **options)
    assert read_all(make(tmp_path, "--workers", "2", out="two", **options)) == read_all(one)
    monkeypatch.setattr(prepare, "STORIES_PER_JOB", 3)
    assert read_all(make(tmp_path, "--workers", "1", out="three", **options)) == read_all(one)


def test_toy_stories_are_those_that_models_were_trained_on(tmp_path):
    prepare.main(["toy", "--stories", "2000", "--workers", "1", "--out", str(tmp_path / "toy")])
    meta = check_complete(tmp_path / "toy")
    assert meta["checksum"] == "5e786cf2da43a281"  # from commit 30f8be2
    assert (meta["train"]["stories"], meta["val"]["stories"]) == (1988, 12)
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    for name in "girls", "boys", "places", "objects":
        for word in prepare.word_lists()[name]:
            assert len(tokenizer.encode_ordinary(" " + word)) == 1, word
    assert not re.search(r"[{}|\u00b6]", "".join(stories_in(tmp_path / "toy", "train")))


def test_held_out_share_is_seeded_complete_and_about_right():
    stories = [f"story {i}" for i in range(5000)]
    split = list(prepare.split_off(stories, 0.1, 0))
    assert [story for _, story in split] == stories
    assert split == list(prepare.split_off(iter(stories), 0.1, 0))
    assert split != list(prepare.split_off(stories, 0.1, 1))
    assert 400 < sum(chosen == "val" for chosen, _ in split) < 600
    for seed in range(30):
        for share in 0.001, 0.5, 0.999:  # no empty split, and no story in both
            split = set(prepare.split_off(["a", "a", *map(str, range(5))] * 2, share, seed))
            assert len(split) == 6 and {chosen for chosen, _ in split} == {"train", "val"}


def test_separators_end_stories_wherever_they_stand(tmp_path, capsys):
    text = f"one{EOT}two\r{EOT}\rthree\n{EOT}{EOT} four {EOT}\nfi<|endof"
    assert make_raw(tmp_path, "a.txt", text.encode()) == "one two three four fi<|endof".split()
    for start in range(2**20 - 20, 2**20 + 5):  # across the blocks that are read
        file = tmp_path / "long.txt"
        file.write_text("x" * start + EOT + "y")
        assert list(prepare.read_txt(file)) == ["x" * start, "y"]
    rows = [f"one{EOT}", f"{EOT}\ntwo {EOT} {EOT}", f"three {EOT} four{EOT}five", EOT]
    data = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    assert "warning" not in capsys.readouterr().out
    kept = ["one", "two", f"three {EOT} four{EOT}five"]  # inside a text it is ordinary text
    assert make_raw(tmp_path, "a.jsonl", data) == kept
    assert f"warning: 4 times {EOT} stands inside a text" in capsys.readouterr().out


def test_digits_and_NA_in_a_csv_are_text(tmp_path):
    data = b'text,id\n12,1\nNA,2\n"two\nlines, ""quoted""",3\n'
    assert make_raw(tmp_path, "a[1].csv", data) == ["12", "NA", 'two\nlines, "quoted"']


def test_line_ends_are_normalised(tmp_path, capsys):
    data = b"\xef\xbb\xbfone\r\ntwo\rthree\r\n\r\nfour\n\r\n<|endoftext|>\r\nfive"
    assert make_raw(tmp_path, "a.txt", data) == ["one\ntwo\nthree\n\nfour", "five"]
    assert "8 line ends CRLF or CR became LF" in capsys.readouterr().out  # both splits
    assert make_raw(tmp_path, "a.jsonl", b'{"text": "one\\r\\ntwo"}\r\n') == ["one\ntwo"]
    data = b'{"text": "\\ud83d\\ude00"}\n{"text": null}'
    assert make_raw(tmp_path, "a.jsonl", data) == ["\U0001f600"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_very_long_runs_are_encoded_exactly(tokenizer, monkeypatch):
    spec = {"name": "words", "pieces": ["  ", "\n\n", " the", "aa"]}
    encoding = prepare.load_tokenizer(spec if tokenizer == "words" else {"name": "gpt2"})
    for space in " ", "\n", "\u3000":
        story = "a" + space * 1_000_005 + "the end"
        with pytest.raises(BaseException, match="(?i)stack"):
            encoding.encode_to_numpy(story)
        expected = [*encoding.encode_ordinary("a" + space * 1_000_004),
                    *encoding.encode_ordinary(space + "the end"), encoding.eot_token]
        assert prepare.encode([story], encoding).tolist() == expected
    for letter in "a7.\u4f60":  # other classes
        tokens = prepare.encode([letter * 1_100_000], encoding)
        assert encoding.decode_bytes(tokens[:-1].tolist()).decode() == letter * 1_100_000
    # small limits, against the definition
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    monkeypatch.setattr(prepare, "LONG_SPACE", 3)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(" \n\t\u00a0\x1caa.1'") * rng.randint(1, 9) for _ in range(12))
        story = "x" + text + "x"
        assert prepare.encode([story], encoding).tolist()[:-1] == brute_force(story, ranks), story
    for letter in "a.\u00e9":  # tiktoken merges pieces over 100 bytes with another algorithm
        text = letter * 333
        assert prepare.encode([text], encoding).tolist()[:-1] == brute_force(text, ranks)


TEXT = b"one story<|endoftext|>and two"
MISTAKES = [  # command line, bytes of the file that it names, what the message says
    ("--train absent.txt", None, "no file absent.txt"),
    ("--train a.txt --val absent.txt", TEXT, "no file absent.txt"),
    ("--train a.doc", b"x", "unknown kind of file, known are txt, jsonl"),
    ("--val a.txt", TEXT, "--val goes with --train"),
    ("toy --train a.txt", TEXT, "--val goes with --train, and toy with neither"),
    ("toy --vocab_size 65537", None, "between 258 and 65,536"),
    ("toy --val_share 1", None, "--val_share must be between 0 and 1"),
    ("--train a.txt", b" \n<|endoftext|>\n\r\n", "no story for the train split"),
    ("--train a.txt", b"one story", "no story for the val split"),
    ("--train a.txt", b"bad \xff line", "a.txt is not UTF-8.*iconv -f latin1"),
    ("--train a.jsonl", b'{"text": "\xe9"}', "a.jsonl is not UTF-8.*latin1"),
    ("--train a.txt", "x".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
    ("--train a.csv", "text\nx".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
    ("--train a.jsonl", b'{"text": \n', "cannot read"),
    ("--train a.jsonl", b'{"b": "x", "n": 1}', "no column 'text' of texts, its columns are b, n"),
    ("--train a.jsonl", b'{"text": ["x"]}', "no column 'text' of texts.*--text_column"),
    ("--train a.parquet", b"no parquet", "cannot read a.parquet"),
    ("--train a.txt.gz", b"no gzip", "cannot read a.txt.gz"),
    ("--train a.txt.gz", gzip.compress(b"cut off " * 999, mtime=0)[:-9], "cannot read a.txt.gz"),
]


@pytest.mark.parametrize("line, data, message", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, monkeypatch, line, data, message):
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path(re.search(r"a\.\S+", line)[0]).write_bytes(data)
    line = line if "--tokenizer" in line else f"{line} --tokenizer words"
    with pytest.raises(prepare.UserError, match=f"^[^\n]*{message}[^\n]*$"):
        prepare.main([*line.split(), "--out", "out"])
    assert len(list(tmp_path.iterdir())) == (data is not None)


def test_no_network_is_one_line(tmp_path):
    dead = "http://127.0.0.1:9"  # no proxy there: the download fails where there is a network, too
    done = script("toy", "--tokenizer", "gpt2", "--out", tmp_path / "out", HTTPS_PROXY=dead,
                  https_proxy=dead, NO_PROXY="", TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"))
    assert done.returncode == 1
    assert re.fullmatch("error: .*TIKTOKEN_CACHE_DIR.*--tokenizer words.*\n", done.stderr)
    done = script("--dataset", "nobody/nothing", "--tokenizer", "words", "--out", tmp_path / "out",
                  HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and re.fullmatch(
        "error: cannot load the dataset 'nobody/nothing'.*--train FILE.*toy\n", done.stderr)


def test_dataset_folder_with_and_without_validation(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "MySet"
    folder.mkdir()
    write_input(folder / "train.parquet", STORIES)
    write_input(folder / "validation.parquet", VAL)
    argv = ["--dataset", str(folder), "--tokenizer", "words", "--workers", "1", "--out"]
    prepare.main([*argv, str(tmp_path / "one")])
    assert check_complete(tmp_path / "one")["source"]["dataset"] == str(folder)
    assert [stories_in(tmp_path / "one", split) for split in ("train", "val")] == [STORIES, VAL]
    (folder / "validation.parquet").unlink()
    prepare.main([*argv, str(tmp_path / "two")])
    both = stories_in(tmp_path / "two", "train") + stories_in(tmp_path / "two", "val")
    assert sorted(both) == sorted(STORIES)
    with pytest.raises(prepare.UserError, match="'body' of texts, its columns are id, text: "):
        prepare.main([*argv, str(tmp_path / "three"), "--text_column", "body"])


def test_help_imports_no_slow_package():
    code = ("import sys, prepare\ntry: prepare.main(['--help'])\nexcept SystemExit: pass\n"
            "sys.exit([m for m in ('datasets', 'pyarrow', 'torch', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--train" in done.stdout and done.stderr == "[]\n"


def test_existing_data_need_force_and_survive_a_failure(tmp_path):
    out = make(tmp_path)
    before = read_all(out)
    with pytest.raises(prepare.UserError, match="already holds data: add --force"):
        make(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"fine\n<|endoftext|>\n\xff")
    with pytest.raises(prepare.UserError, match="bad.txt"):
        prepare.main(["--train", str(tmp_path / "bad.txt"), "--force", "--out", str(out),
                      "--tokenizer", "words"])
    assert read_all(out) == before
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


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 1)])
def test_a_stopped_run_leaves_the_old_data(tmp_path, number, code):
    out = make(tmp_path)
    before = read_all(out)
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "toy", "--stories", "30000",
                                "--workers", "2", "--out", out, "--force"], start_new_session=True,
                               stderr=subprocess.PIPE, text=True)
    while "counting" not in process.stderr.readline():  # \r ends a line here, too
        assert process.poll() is None
    os.killpg(process.pid, number)
    *_, last = [line for line in process.stderr if line.strip()]
    assert process.wait() == code and read_all(out) == before
    if number == signal.SIGINT:
        assert last.strip() == "stopped" and not (out / "unfinished").exists()
    make(tmp_path, "--force", train=VAL)
    check_complete(out)


def test_one_process_at_a_time_has_a_folder(tmp_path):
    with prepare.locked(tmp_path / "run"):
        with pytest.raises(prepare.UserError, match="another process is writing"):
            prepare.locked(tmp_path / "run").__enter__()
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()  # only an empty folder is removed
    with pytest.raises(prepare.UserError, match="cannot make the folder"):
        prepare.locked(tmp_path / "run" / "file").__enter__()


def test_readers_refuse_damaged_files(tmp_path):
    out = make(tmp_path)
    raw = (out / "train.bin").read_bytes()
    flipped = bytes([raw[0] ^ 1]) + raw[1:]
    for damaged in raw[:-2], raw[:-1], raw + b"\0\0", b"", flipped:
        (out / "train.bin").write_bytes(damaged)
        with pytest.raises(prepare.UserError, match="train.bin is damaged.* --force"):
            prepare.load_tokens(out, "train")
    for damaged in "{", "[]", '{"eot": 1}':
        (out / "meta.json").write_text(damaged)
        with pytest.raises(prepare.UserError, match="meta.json is damaged.*--force"):
            prepare.load_meta(out)
    (out / "meta.json").unlink()
    with pytest.raises(prepare.UserError, match="no prepared data in .*--data.*--help"):
        prepare.load_meta(out)
