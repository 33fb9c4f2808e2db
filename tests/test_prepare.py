"""prepare.py against independent references, on every kind of input, every mistake, and killed half-way.

    python -m pytest tests/test_prepare.py

Nothing here needs a network. The GPT-2 tokenizer takes part where its two files lie in ../shared/tiktoken or in
$TIKTOKEN_CACHE_DIR; every property is always checked with the `words` tokenizer.
"""
import collections
import errno
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import regex

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare
from config import cli

SHARED = ROOT.parent / "shared" / "tiktoken"
if "TIKTOKEN_CACHE_DIR" not in os.environ and SHARED.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED)
TOKENIZERS = ["words"] + ["gpt2"] * Path(os.environ.get("TIKTOKEN_CACHE_DIR", "/nowhere")).is_dir()
FILES = {"train.bin", "val.bin", "meta.json"}
EOT = "<|endoftext|>"
# the pattern as OpenAI published it with GPT-2; prepare.py has tiktoken's equivalent
PUBLISHED = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

HARD = [
    "Once upon a time, there was a cat. The cat's name was Tom.\nHe didn't sleep.",
    "\u201cLook!\u201d said Zo\u00eb \u2014 \u2018caf\u00e9\u2019 na\u00efve \u00e2\u20ac\u0153mis-encoded\u00e2\u20ac\u009d \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "line one\r\nline two\r\n\r\n\ttabs  and   spaces\u00a0\u3000end",
    f"a story that says {EOT} in the middle of a line, and <|endof",
    "".join(map(chr, random.Random(0).choices([c for c in range(1, 0x3000) if not 0xD800 <= c < 0xE000], k=400))).strip(),
    "\u4f60\u597d\uff0c\u4e16\u754c 12345 3.14 x_y a" + "b" * 300,
]
STORIES = HARD + [f"Story {i}: the {w} saw the {w} and ran. The end." for i, w in enumerate("dog cat bird frog fox".split() * 8)]
STORIES = [re.sub("[\r\n]\\s*" + re.escape(EOT) + "\\s*[\r\n]", " ", s).strip() for s in STORIES]
VAL = ["A held-out story about a dog.", "Another one, with an unseen word: zygote \U0001f40d."]


def text_of(stories):
    return "".join(f"\n {story} \n{EOT}\n" for story in stories) + f" \r\n{EOT}\n"  # padding and an empty story to drop


def write_input(path, stories):
    """The same stories as any kind of file, by suffix."""
    import pyarrow, pyarrow.parquet
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "txt":
        data = text_of(stories).encode()
    elif kind == "jsonl":
        data = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in [*(f" {s}\n" for s in stories), "", None]).encode()
    else:
        sink = io.BytesIO()
        table = pyarrow.table({"id": list(range(len(stories) + 1)), "text": [*stories, None]})
        pyarrow.parquet.write_table(table, sink, row_group_size=10)
        data = sink.getvalue()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return str(path)


def make(tmp_path, *more, out="out", train=STORIES, val=VAL, tokenizer="words"):
    files = ["--train", write_input(tmp_path / "a.txt", train)]
    files += ["--val", write_input(tmp_path / "b.txt", val)] if val else []
    prepare.main([*files, "--tokenizer", tokenizer, "--out", str(tmp_path / out), *more])
    return tmp_path / out


def stories_in(folder, split):
    """The stories of a split, decoded; the inverse of prepare.py."""
    meta = prepare.load_meta(folder)
    tokenizer, tokens = prepare.load_tokenizer(meta["tokenizer"]), prepare.load_tokens(folder, split)
    ends = np.flatnonzero(tokens == meta["eot"])
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in np.split(tokens, ends[:-1] + 1)]


def check_complete(folder):
    """Every fact of meta.json, recomputed."""
    meta = prepare.load_meta(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert not folder.with_name(folder.name + ".tmp").exists()
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    assert (meta["vocab_size"], meta["eot"]) == (tokenizer.n_vocab, tokenizer.eot_token)
    for split in "train", "val":
        raw = (folder / f"{split}.bin").read_bytes()
        stories = stories_in(folder, split)
        assert meta[split] == {"tokens": len(raw) // 2, "stories": len(stories),
                               "bytes": sum(len(s.encode()) for s in stories), "sha256": hashlib.sha256(raw).hexdigest()}
    return meta


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def script(*args, **kwargs):
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, ROOT / "prepare.py", *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, env=env, **kwargs)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A prepared folder, to copy from."""
    return make(tmp_path_factory.mktemp("template"))


ABSENT = object()


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """refused(*argv) runs the script as its __main__ does, and returns its one line of complaint."""
    def refuse(*argv, leaves=()):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            cli(prepare.main)
        message = stop.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        left = {path.name for path in tmp_path.rglob("*") if path.name in FILES or path.name.endswith(".tmp")}
        assert left == set(leaves)
        return message
    return refuse

# ---- content ----------------------------------------------------------------------------------------------------

def merged(word, ranks):
    """Byte-pair encoding from its definition: join the adjacent pair of lowest rank until none is known."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not known:
            return [ranks[part] for part in parts]
        _, i = min(known)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def reference(stories, train, tokenizer, vocab_size=10_000):
    """The tokens of `stories`, without prepare.py."""
    if tokenizer == "gpt2":
        import tiktoken
        encoding = tiktoken.get_encoding("gpt2")
        return [t for story in stories for t in [*encoding.encode_ordinary(story), 50256]]
    counts = collections.Counter(p.encode() for story in train for p in PUBLISHED.findall(story))
    pieces = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p], p))[:vocab_size - 257]
    ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + pieces)}
    return [t for story in stories
            for t in [*(t for p in PUBLISHED.findall(story) for t in merged(p.encode(), ranks)), len(ranks)]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "parquet.gz"])
def test_every_input_gives_the_reference_tokens(tmp_path, kind, tokenizer):
    out = tmp_path / "out"
    prepare.main(["--train", write_input(tmp_path / f"a.{kind}", STORIES), "--val", write_input(tmp_path / f"b.{kind}", VAL),
                  "--tokenizer", tokenizer, "--out", str(out)])
    check_complete(out)
    for split, stories in ("train", STORIES), ("val", VAL):
        assert prepare.load_tokens(out, split).tolist() == reference(stories, STORIES, tokenizer)
        assert stories_in(out, split) == stories  # lossless


def test_small_vocabulary_is_the_most_frequent_pieces_and_lossless(tmp_path):
    out = make(tmp_path, "--vocab_size", "270")
    meta = check_complete(out)
    assert (meta["vocab_size"], meta["eot"], len(meta["tokenizer"]["pieces"])) == (270, 269, 13)
    assert prepare.load_tokens(out, "train").tolist() == reference(STORIES, STORIES, "words", 270)
    assert stories_in(out, "val") == VAL


def test_smaller_vocabulary_than_asked_for_is_said(tmp_path, capsys):
    out = make(tmp_path, "--vocab_size", "60000")
    assert "smaller vocabulary" in capsys.readouterr().out
    assert prepare.load_meta(out)["vocab_size"] < 1000


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_tokenizer_is_rebuilt_from_the_spec_alone(tmp_path, tokenizer):
    spec = json.loads(json.dumps(prepare.load_meta(make(tmp_path, tokenizer=tokenizer))["tokenizer"]))
    rebuilt = prepare.load_tokenizer(spec)
    for text in [*HARD, "", " ", "\x00\xff", EOT]:
        assert rebuilt.decode(rebuilt.encode_ordinary(text)) == text
        assert rebuilt.eot_token not in rebuilt.encode_ordinary(text)


def test_several_files_are_read_in_order_and_columns_have_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"story": "one"}\n\n{"story": "two \\ud83d half"}\n')
    (tmp_path / "b.jsonl").write_text('{"story": "three"}\n')
    prepare.main(["--train", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--val", str(tmp_path / "b.jsonl"),
                  "--text_column", "story", "--tokenizer", "words", "--out", str(tmp_path / "out")])
    assert stories_in(tmp_path / "out", "train") == ["one", "two \ufffd half", "three"]


def test_text_files_keep_line_ends_and_lose_the_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n<|endoftext|>\r\nthree")
    prepare.main(["--train", str(tmp_path / "a.txt"), "--val", str(tmp_path / "a.txt"), "--tokenizer", "words",
                  "--out", str(tmp_path / "out")])
    assert stories_in(tmp_path / "out", "train") == ["one\r\ntwo", "three"]


def test_forgetting_rare_pieces_keeps_the_frequent_ones(tmp_path, monkeypatch):
    stories = [f"the dog saw the cat and w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600)]
    monkeypatch.setattr(prepare, "MAX_PIECES", 100)  # far fewer than the text has
    pieces = prepare.load_meta(make(tmp_path, train=stories))["tokenizer"]["pieces"]
    assert len(pieces) <= 100 and {"the", " dog", " saw", " the", " cat", " and"} <= set(pieces)

# ---- the same output, however it is computed ---------------------------------------------------------------------

@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_workers_and_job_size_do_not_matter(tmp_path, tokenizer, monkeypatch):
    expected = contents(make(tmp_path, "--workers", "1", out="one", train=STORIES * 8, val=None, tokenizer=tokenizer))
    two = make(tmp_path, "--workers", "2", out="two", train=STORIES * 8, val=None, tokenizer=tokenizer)
    assert contents(two) == expected
    monkeypatch.setattr(prepare, "JOB", 3)
    three = make(tmp_path, "--workers", "1", out="three", train=STORIES * 8, val=None, tokenizer=tokenizer)
    assert contents(three) == expected


def test_checksum_names_tokens_and_tokenizer(tmp_path):
    checksums = [prepare.load_meta(make(tmp_path, *more, out=f"out{i}", val=val))["checksum"] for i, (more, val) in
                 enumerate([((), VAL), ((), VAL), (("--vocab_size", "270"), VAL), ((), VAL[:1])])]
    assert checksums[0] == checksums[1] and len(set(checksums)) == 3

# ---- the held-out share -------------------------------------------------------------------------------------------

def test_held_out_share_is_seeded_complete_and_about_right():
    stories = [f"story {i}" for i in range(5000)]
    split = list(prepare.split_off(stories, 0.1, 0))
    assert [story for _, story in split] == stories
    assert split == list(prepare.split_off(iter(stories), 0.1, 0)) != list(prepare.split_off(stories, 0.1, 1))
    assert 400 < sum(chosen == "val" for chosen, _ in split) < 600


def test_held_out_share_never_empties_a_side_and_never_splits_duplicates():
    for seed in range(30):
        for share in 0.001, 0.5, 0.999:
            assert {chosen for chosen, _ in prepare.split_off(["a", "a", "b"], share, seed)} == {"train", "val"}
            split = list(prepare.split_off([f"story {i % 40}" for i in range(200)], share, seed))
            sides = {chosen: {story for side, story in split if side == chosen} for chosen in ("train", "val")}
            assert sides["train"] and sides["val"] and not sides["train"] & sides["val"]


def test_local_files_without_val_hold_a_share_out(tmp_path):
    out = make(tmp_path, "--val_share", "0.3", val=None)
    check_complete(out)
    train, val = stories_in(out, "train"), stories_in(out, "val")
    assert sorted(train + val) == sorted(STORIES) and train and val
    # the vocabulary must not have seen the held-out stories
    pieces = {p for story in train for p in PUBLISHED.findall(story) if len(p.encode()) > 1}
    assert set(prepare.load_meta(out)["tokenizer"]["pieces"]) == pieces

# ---- hub datasets: the real code path, on a local dataset folder ------------------------------------------------

def test_dataset_folder_with_and_without_validation(tmp_path):
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    folder = tmp_path / "MySet"
    (folder / "data").mkdir(parents=True)
    write_input(folder / "data" / "train-00000.parquet", STORIES)
    write_input(folder / "data" / "validation-00000.parquet", VAL)
    words = ["--dataset", str(folder), "--tokenizer", "words", "--out"]
    code = f"""
import os, sys, prepare
prepare.main({words!r} + ["{tmp_path}/out"])
os.remove("{folder}/data/validation-00000.parquet")
prepare.main({words!r} + ["{tmp_path}/out2"])
sys.argv = ["prepare.py", "--text_column", "body", *{words!r}, "{tmp_path}/out3"]
prepare.script()"""  # one process for all three: the packages take seconds to import
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert check_complete(tmp_path / "out")["source"]["dataset"] == str(folder), done.stderr
    assert (stories_in(tmp_path / "out", "train"), stories_in(tmp_path / "out", "val")) == (STORIES, VAL)
    assert sorted(stories_in(tmp_path / "out2", "train") + stories_in(tmp_path / "out2", "val")) == sorted(STORIES)
    complaint(done, "no column 'body', only id, text", "--text_column")
    assert not (tmp_path / "out3").exists()


def test_a_row_of_a_dataset_that_is_no_text_is_named():
    class Rows:  # as a dataset hands out its rows
        def iter(self, size):
            return [{"text": ["a", "b"]}, {"text": ["c", 4.5]}]

    rows = prepare.read_hub(Rows(), "text", "some/set, split train")
    with pytest.raises(prepare.UserError, match="some/set, split train: row 4: float where text"):
        list(prepare.cleaned(rows))


def complaint(done, *words):
    """A finished script that failed as it should: exit code 1, one line beside the progress bars, no traceback."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    bars = ("tokenizing", "counting words", "Generating", "Downloading", "Resolving")
    lines = [line for line in re.split("[\r\n]+", done.stderr) if line.strip() and not line.strip().startswith(bars)]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0]


def test_no_network_for_the_dataset(tmp_path):
    done = script("--dataset", "nobody/nothing", "--tokenizer", "words", "--out", tmp_path / "out",
                  env={"HF_HOME": str(tmp_path / "hf")})
    complaint(done, "cannot load the dataset 'nobody/nothing'", "prepare.py --train FILE", "prepare.py toy")
    assert not list(tmp_path.glob("out*"))


def test_no_network_for_the_gpt2_tokenizer(tmp_path):
    dead = "http://127.0.0.1:9"  # no proxy there: the download fails even where there is a network
    done = script("toy", "--tokenizer", "gpt2", "--out", tmp_path / "out",
                  env={"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": dead, "https_proxy": dead, "NO_PROXY": ""})
    complaint(done, "TIKTOKEN_CACHE_DIR", "--tokenizer words")
    assert not list(tmp_path.glob("out*"))

# ---- mistakes ---------------------------------------------------------------------------------------------------

def test_bad_flags(refused, tmp_path):
    good = write_input(tmp_path / "good.txt", STORIES)
    for argv, words in [
        (["--train", "absent.txt"], ["no file absent.txt"]),
        (["--train", tmp_path], ["no file"]),
        (["--train", good, "--val", "absent.txt"], ["no file absent.txt"]),
        (["--val", good], ["--val has no effect"]),
        (["--train", good, "--dataset", "x"], ["--dataset has no effect"]),
        (["--train", good, "--stories", "9"], ["--stories has no effect"]),
        (["toy", "--train", good], ["--train has no effect"]),
        (["toy", "--text_column", "x"], ["--text_column has no effect"]),
        (["toy", "--tokenizer", "gpt2", "--vocab_size", "300"], ["--vocab_size", "--tokenizer words"]),
        (["toy", "--vocab_size", "257"], ["258", "65,536"]),
        (["toy", "--vocab_size", "65537"], ["258", "65,536"]),
        (["toy", "--stories", "1"], ["--stories"]),
        (["toy", "--stories", "many"], ["--stories", "--help"]),
        (["toy", "--workers", "0"], ["--workers"]),
        (["toy", "--val_share", "1"], ["--val_share"]),
        (["toy", "--tokenizer", "bpe"], ["gpt2", "words"]),
        (["tyo"], ["toy", "--help"]),
        (["toy", "--nonsense", "1"], ["--nonsense", "--help"]),
        (["toy", "--out", good], ["is a file", "--out"]),
    ]:
        message = refused(*argv)
        for word in words:
            assert word in message, (argv, message)


@pytest.mark.parametrize("name, data, words", [
    ("a.csv", b"text\nhello\n", ["a.csv", ".jsonl"]),
    ("a.gz", b"text\nhello\n", ["a.gz", ".jsonl"]),
    ("a.txt", b"", ["no story for the train split"]),
    ("a.txt", b" \n<|endoftext|>\n\r\n", ["no story"]),
    ("a.txt", b"just one story", ["no story for the val split", EOT]),
    ("a.txt", b"good line\nbad \xff line\n", ["line or row 2 is not UTF-8", "byte 14", "a.txt"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["line or row 2 is not UTF-8", "byte 24"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2 is not a JSON object"]),
    ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', ["line 2", "'text'", "--text_column"]),
    ("a.jsonl", b'["a"]\n', ["line 1 is not a JSON object"]),
    ("a.jsonl", b'{"text": 7}\n', ["int where text should be"]),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": ["b"]}', ["a.jsonl: line 3: list where text should be"]),
    ("a.parquet", b"no parquet", ["cannot read", "a.parquet"]),
    ("a.txt.gz", b"no gzip", ["cannot read", "a.txt.gz"]),
    ("a.txt.gz", gzip.compress(b"cut off " * 999, mtime=0)[:-30], ["cannot read", "a.txt.gz"]),
])
def test_bad_files(refused, tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    message = refused("--train", tmp_path / name, "--tokenizer", "words", "--out", "out")
    for word in words:
        assert word in message


def test_bad_parquet_columns(refused, tmp_path):
    import pyarrow, pyarrow.parquet
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), path)
    assert "no column 'text', only body, n" in refused("--train", path, "--tokenizer", "words")
    message = refused("--train", path, "--tokenizer", "words", "--text_column", "n")
    assert "a.parquet: row 1: int where text should be" in message
    broken = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(np.array([0, 1, 3], np.int32)), pyarrow.py_buffer(b"ab\xff"))
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), path)
    assert "row 2 is not UTF-8 (byte 1)" in refused("--train", path, "--tokenizer", "words")


def test_unreadable_words_in_the_second_file_leave_nothing(refused, tmp_path):
    good, bad = write_input(tmp_path / "good.txt", STORIES * 20), tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    assert "bad.txt" in refused("--train", good, bad, "--tokenizer", "words", "--workers", "1")
    assert "bad.txt" in refused("--train", good, "--val", bad, "--tokenizer", TOKENIZERS[-1], "--workers", "1")


def test_existing_output_needs_force_and_survives_a_failure(refused, tmp_path):
    out = make(tmp_path)
    before = contents(out)
    assert "--force" in refused("--train", tmp_path / "a.txt", "--tokenizer", "words", "--out", out, leaves=FILES)
    (tmp_path / "bad.txt").write_bytes(b"fine\n<|endoftext|>\n\xff")
    refused("--train", tmp_path / "bad.txt", "--tokenizer", "words", "--out", out, "--force", leaves=FILES)
    assert contents(out) == before
    (out / "notes.md").write_text("mine")
    make(tmp_path, "--force", train=VAL)
    assert (out / "notes.md").read_text() == "mine"
    (out / "notes.md").unlink()
    check_complete(out)
    assert stories_in(out, "train") == VAL


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(tmp_path, workers):
    # a file size limit makes write() fail in the kernel, as a full disk does
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    done = script("toy", "--stories", "2000", "--workers", workers, "--out", tmp_path / "out", preexec_fn=limit)
    complaint(done, "cannot write", "free some space")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("toy", "--stories", "9", "--out", tmp_path / "file" / "out")


def test_reader_refuses_what_is_not_complete(tmp_path):
    out = make(tmp_path)
    assert prepare.load_tokens(out, "val").dtype == np.uint16
    with pytest.raises(ValueError):
        prepare.load_tokens(out, "val")[0] = 1  # read-only
    raw = (out / "train.bin").read_bytes()
    for damaged in raw[:-2], raw[:-1], raw + b"\0\0", b"":
        (out / "train.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match="meta.json promises .* prepare.py .*--force"):
            prepare.load_tokens(out, "train")
    (out / "train.bin").unlink()
    with pytest.raises(ValueError, match="promises"):
        prepare.load_tokens(out, "train")
    wrong_type = json.dumps(json.loads((out / "meta.json").read_text()) | {"train": 5})
    for damaged in "{", "[]", "{}", '{"tokenizer": 1', wrong_type:
        (out / "meta.json").write_text(damaged)
        with pytest.raises(ValueError, match="damaged.*--force"):
            prepare.load_meta(out)
    (out / "meta.json").unlink()
    for folder in out, tmp_path / "absent":
        with pytest.raises(ValueError, match="no prepared data.*--data.*prepare.py --help"):
            prepare.load_meta(folder)
    for spec in {"name": "bert"}, {}, None, "words", ["gpt2"]:
        with pytest.raises(ValueError, match="unknown tokenizer"):
            prepare.load_tokenizer(spec)
    for pieces in None, 7, ["a", 7], ["\ud800"]:
        with pytest.raises(prepare.UserError, match="words of the tokenizer are damaged"):
            prepare.load_tokenizer({"name": "words", "pieces": pieces})
    with pytest.raises(prepare.UserError, match="words of the tokenizer are damaged"):
        prepare.load_tokenizer({"name": "words"})


def test_reader_refuses_other_bytes_of_the_same_length(tmp_path):
    out = make(tmp_path)
    for split in "train", "val":
        raw = bytearray((out / f"{split}.bin").read_bytes())
        raw[len(raw) // 2] ^= 1
        (out / f"{split}.bin").write_bytes(raw)
        with pytest.raises(prepare.UserError, match=rf"{split}\.bin is damaged.*sha256.* --force"):
            prepare.load_tokens(out, split)


COUNTS = [f"{split}.{name}" for split in ("train", "val") for name in ("tokens", "stories", "bytes", "sha256")]


@pytest.mark.parametrize("field", [
    "tokenizer", "tokenizer.name", "tokenizer.pieces", "vocab_size", "eot", "checksum", "source",
    "train", "val", *COUNTS,
])
def test_reader_refuses_a_missing_or_mistyped_field(tmp_path, template, field):
    """None of these values is right anywhere, and none may end in another exception than ours."""
    *outer, name = field.split(".")
    for wrong in ABSENT, None, True, -1, 1.5, 2**64, float("nan"), [7], [[]], {7: 7}:
        if name == "source" and wrong == {7: 7}:
            continue
        meta = json.loads((template / "meta.json").read_text())
        place = meta[outer[0]] if outer else meta
        place[name] = wrong
        if wrong is ABSENT:
            del place[name]
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(prepare.UserError, match="meta.json is damaged.*--force"):
            prepare.load_meta(tmp_path)


def test_reader_refuses_ids_beyond_the_vocabulary(tmp_path, template):
    meta = json.loads((template / "meta.json").read_text())
    size = meta["vocab_size"]
    for changes in {"eot": size}, {"vocab_size": size + 1}, {"vocab_size": 65_537, "tokenizer": {"name": "gpt2"}}:
        (tmp_path / "meta.json").write_text(json.dumps(meta | changes))
        with pytest.raises(prepare.UserError, match="meta.json is damaged"):
            prepare.load_meta(tmp_path)
    (tmp_path / "meta.json").write_text("[" * 200_000)
    with pytest.raises(prepare.UserError, match="meta.json is damaged"):
        prepare.load_meta(tmp_path)


def test_reading_needs_none_of_the_heavy_packages():
    code = "import sys, prepare; print([m for m in ('datasets', 'pyarrow', 'torch', 'requests') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"

def test_workers_need_none_of_the_heavy_packages(tmp_path):
    """A torch that cannot be imported bothers neither prepare.py nor its workers."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = script("toy", "--stories", "300", "--workers", "2", "--out", tmp_path / "out",
                  env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    check_complete(tmp_path / "out")


@pytest.mark.parametrize("stdout, code", [("closed pipe", 1), ("full disk", 1), ("no stdout", 0)])
def test_an_output_that_takes_nothing(tmp_path, stdout, code):
    """The data are complete and the one line says so; where there is no stdout at all, nobody asked."""
    shell = {"closed pipe": "{ %s; echo $? >&2; } | true", "full disk": "%s >/dev/full; echo $? >&2",
             "no stdout": "%s >&-; echo $? >&2"}
    run = f"{sys.executable} {ROOT / 'prepare.py'} toy --stories 20 --out {tmp_path / 'out'}"
    command = f"sleep 0.2; {run}"  # until `true` has ended
    done = subprocess.run(["bash", "-c", shell[stdout] % command], capture_output=True, text=True)
    *_, message, status = done.stderr.splitlines()
    assert int(status) == code
    assert ("error: cannot write the output" in message and "complete" in message) == (code == 1)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    check_complete(tmp_path / "out")

# ---- interruption -----------------------------------------------------------------------------------------------

def begin(folder, until=None):
    """A run that would take minutes, in a process group of its own, once both its workers are busy."""
    command = [sys.executable, ROOT / "prepare.py", "toy", "--stories", "1000000", "--workers", "2"]
    process = subprocess.Popen([*command, "--out", folder / "out"], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    # the progress bar counts in thousands once it has read more than the first jobs
    while not (until() if until else "k stories" in process.stderr.readline()):
        assert process.poll() is None
    return process


def last_line(process):
    """What it says after the progress bar, when it and its workers have ended."""
    lines = [line.strip() for line in process.stderr if line.strip()]  # \r ends a line here, too
    assert process.wait() == 1
    *bars, line = lines
    assert all(bar.startswith("counting words") for bar in bars), lines
    wait_until_gone(process.pid)
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # to the program alone, or as a terminal does
def test_stop_signals_end_in_one_line(tmp_path, number, send):
    process = begin(tmp_path)
    send(process.pid, number)
    assert last_line(process).startswith("stopped: ")
    assert list(tmp_path.iterdir()) == []


def test_stop_signals_at_any_moment(tmp_path):
    """Also while workers start, which are in the terminal's group and get its Ctrl-C themselves."""
    for delay in 0, 0.1, 0.2, 0.3:
        process = begin(tmp_path, until=lambda: (tmp_path / "out.tmp").exists())
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        assert last_line(process).startswith("stopped: ")
        assert list(tmp_path.iterdir()) == []


def test_stop_signal_between_the_last_moves_waits_for_them(tmp_path):
    out = make(tmp_path)
    code = f"""
import os, signal, prepare
real, left = os.replace, [signal.SIGINT, signal.SIGTERM]
os.replace = lambda *paths: (real(*paths), left and os.kill(os.getpid(), left.pop()))
prepare.main(["toy", "--stories", "50", "--out", {str(out)!r}, "--force"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGTERM  # what it does without a handler, after the last move
    check_complete_files(out)


def test_a_killed_worker_is_one_line(tmp_path):
    process = begin(tmp_path)
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "ppid=,pid=,args="], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    children = {int(pid): args for parent, pid, args in rows if parent == str(process.pid)}
    workers = [pid for pid, args in children.items() if "spawn_main" in args]
    os.kill(workers[0], signal.SIGKILL)  # as the kernel does when memory is short
    line = last_line(process)
    assert line.startswith("error: a worker process was killed") and "memory" in line and "--workers 1" in line
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_moment(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "prepare.py", "toy", "--stories", "1500", "--workers", "2", "--out", out]
    groups = []
    for delay in random.Random(0).sample([0.4, 0.8, 1.2, 1.6, 2.0, 2.4], 3):
        process = subprocess.Popen([*command, "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        groups.append(process.pid)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "meta.json").exists():
            check_complete_files(out)
        else:
            assert not out.exists()
    (tmp_path / "out.tmp").mkdir(exist_ok=True)
    (tmp_path / "out.tmp" / "train.bin").write_bytes(b"half")
    assert subprocess.run([*command, "--force"], capture_output=True).returncode == 0
    check_complete(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for group in groups:
        wait_until_gone(group)


def check_complete_files(folder):
    meta = prepare.load_meta(folder)
    for split in "train", "val":
        assert hashlib.sha256(prepare.load_tokens(folder, split)).hexdigest() == meta[split]["sha256"]


def wait_until_gone(group):
    """The workers of a killed parent must end by themselves."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive a killed parent")


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_between_the_last_moves(tmp_path, moves):
    """With --force the old data are replaced file by file: a reader must never get a mixture."""
    out = make(tmp_path)
    code = f"""
import os, prepare
real, left = os.replace, [0] * {moves}
os.replace = lambda *paths: (left.pop(), real(*paths)) if left else os._exit(9)  # as kill -9 would at that moment
prepare.main(["toy", "--stories", "50", "--out", {str(out)!r}, "--force"])"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 9
    with pytest.raises(ValueError, match="no prepared data"):
        prepare.load_tokens(out, "train")
    make(tmp_path, train=VAL)  # without --force: what the killed run left are not data
    check_complete(out)


def test_token_files_of_somebody_else_are_safe(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"precious")
    assert "--force" in refused("toy", "--stories", "9", "--out", "out", leaves={"train.bin"})
    assert (tmp_path / "out" / "train.bin").read_bytes() == b"precious"

# ---- the toy corpus ---------------------------------------------------------------------------------------------

def test_word_lists_are_read_when_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lists = prepare.word_lists()
    names = [lists[name] for name in ("girls", "more_girls", "boys", "more_boys")]
    assert [len(part) for part in names] == [12, 36, 12, 39]
    assert [part[0] for part in names] == ["Lily", "Mia", "Tom", "John"]
    assert [part[-1] for part in names] == ["Rose", "Meg", "Paul", "Chris"]
    assert len(set(sum(names, []))) == 99
    monkeypatch.setattr(prepare, "ASSETS", tmp_path)
    with pytest.raises(prepare.UserError, match="words.txt is missing or damaged: No such file"):
        prepare.word_lists()
    (tmp_path / "words.txt").write_text("girls Lily\nboys Tom\n")
    with pytest.raises(prepare.UserError, match="words.txt is damaged: it has no more_girls"):
        prepare.word_lists()


@pytest.mark.parametrize("damage, words", [
    (None, "toy.txt is missing or damaged: No such file"),
    (b"story \xff", "toy.txt is missing or damaged"),
    (b"story", "toy.txt is missing or damaged"),
    (b"", "damaged: KeyError: 'spot'"),
    (b"spot a|b", "damaged: KeyError: 'story'"),
    (b"spot a|b\nstory {A} {absent}", "KeyError: 'absent'"),
    (b"spot a|b\nstory {A", "damaged: ValueError"),
    (b"spot a|b\nstory {}", "damaged: ValueError"),
    (b"spot a|b\nstory {story}", "damaged: RecursionError"),
    (b"spot a|b\nstory {A.b}", "damaged: AttributeError"),
    (b"spot a\nstory {A}", "damaged: ValueError"),
])
def test_a_damaged_grammar_is_one_line(refused, tmp_path, monkeypatch, damage, words):
    (tmp_path / "words.txt").write_bytes((prepare.ASSETS / "words.txt").read_bytes())
    if damage is not None:
        (tmp_path / "toy.txt").write_bytes(damage)
    monkeypatch.setattr(prepare, "ASSETS", tmp_path)
    message = refused("toy", "--stories", "5", "--out", "out")
    assert "toy.txt" in message and words in message


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "toy"
    prepare.main(["toy", "--stories", "2000", "--workers", "1", "--out", str(out)])
    return out


def test_toy_gives_as_many_stories_as_asked_and_is_seeded(toy, tmp_path):
    meta = check_complete(toy)
    assert meta["checksum"] == "5e786cf2da43a281"  # trained models and their figures rest on this corpus
    assert meta["train"]["stories"] + meta["val"]["stories"] == 2000 and meta["val"]["stories"] > 10
    for seed, same in ("0", True), ("1", False):
        prepare.main(["toy", "--stories", "2000", "--seed", seed, "--workers", "1", "--out", str(tmp_path / seed)])
        assert (contents(tmp_path / seed) == contents(toy)) == same


def test_toy_splits_share_no_story(toy):
    train, val = stories_in(toy, "train"), stories_in(toy, "val")
    assert not set(train) & set(val)
    assert len(set(train)) > 0.99 * len(train)


def test_toy_tells_who_gave_what_to_whom_in_both_orders(toy):
    pattern = r"(\w+) and (\w+) (?:went|had|got|were|found)[^.]*?(?:\.|,|, and) (\w+) (?:gave|handed|showed|brought) (?:a|the) \w+ to (\w+)\."
    found = collections.Counter()
    for story in stories_in(toy, "train"):
        for first, second, giver, receiver in re.findall(pattern, story):
            assert {giver, receiver} == {first, second} and first != second
            found[giver == first] += 1
    assert sum(found.values()) > 1500 and min(found.values()) > 0.45 * sum(found.values())
    text = "\n".join(stories_in(toy, "train"))
    assert re.search(r"Then, (\w+) and (\w+) went to the \w+\. \2 gave a \w+ to \1\.", text)
    assert re.search(r"Then, (\w+) and (\w+) went to the \w+\. \1 gave a \w+ to \2\.", text)


def test_toy_names_places_and_objects_are_single_tokens(toy):
    meta = prepare.load_meta(toy)
    assert meta["vocab_size"] < 800
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    lists = prepare.word_lists()
    words = lists["girls"] + lists["boys"] + lists["places"] + lists["objects"]
    assert len(set(words)) == len(words)
    assert (len(lists["places"]), len(lists["objects"])) >= (10, 15)
    assert len(lists["girls"] + lists["boys"]) >= 20
    for word in words:
        assert len(tokenizer.encode_ordinary(" " + word)) == 1, word


def test_toy_grammar_is_used_up_and_reads_well(toy):
    text = "\n\n".join(stories_in(toy, "train"))
    assert not re.search(r"[{}|\u00b6]", text)  # every slot was filled
    assert not re.search(r" a [aeiou]|  |[.!?] [a-z]", text.replace('!" ', '!", ').replace('?" ', '?", '))
    assert not re.search(r"(?m)^[a-z]| $", text)
    for lines in prepare.read_asset("toy.txt").values():  # every way to write a slot turns up
        for line in lines:
            parts = [re.escape(part) for part in re.split(r"{\w+}", line)]
            assert re.search(".+?".join(parts), text, re.S), line
    for names, wrong in ("boys", "girl"), ("girls", "boy"):  # pronouns fit
        assert not re.search(rf"{wrong} named ({'|'.join(prepare.word_lists()[names])})\b", text)


def test_two_at_once_into_one_folder_are_kept_apart(tmp_path):
    """The second is refused while the first works, and the first one's data are whole."""
    import fcntl
    (tmp_path / "out.tmp").mkdir()
    lock = os.open(tmp_path / "out.tmp", os.O_RDONLY)  # as the first holds it
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another prepare.py is at work"):
        prepare.main(["toy", "--stories", "20", "--workers", "1", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out.tmp").exists() and not (tmp_path / "out").exists()
    os.close(lock)
    prepare.main(["toy", "--stories", "20", "--workers", "1", "--out", str(tmp_path / "out")])
    assert len(prepare.load_tokens(tmp_path / "out", "train"))


def test_a_folder_is_locked_until_its_owner_is_done(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    lock = prepare.lock_folder(folder, "busy")
    assert folder.is_dir()
    for _ in range(3):
        with pytest.raises(prepare.UserError, match="^busy$"):
            prepare.lock_folder(folder, "busy")
    os.close(lock)
    os.close(prepare.lock_folder(str(folder), "busy"))
    (tmp_path / "file").write_text("")
    for name in tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("x" * 300), tmp_path / "a\0b", "/proc/x":
        with pytest.raises(prepare.UserError, match="cannot write .*: choose another --out"):
            prepare.lock_folder(name, "busy")

    def unable(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(prepare.fcntl, "flock", unable)  # a file system without locks: nobody is kept apart
    os.close(prepare.lock_folder(folder, "busy"))
    monkeypatch.setattr(prepare, "fcntl", None)  # Windows
    assert prepare.lock_folder(folder, "busy") is None
