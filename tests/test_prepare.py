"""prepare.py against independent references: every kind of input, mistakes, and a killed run.

GPT-2's tokenizer takes part where ../shared/tiktoken or $TIKTOKEN_CACHE_DIR has its files.
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
TOKENIZERS = ["words"] + ["gpt2"] * os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", ""))
EOT = "<|endoftext|>"
# the pattern as OpenAI published it with GPT-2; prepare.py has tiktoken's equivalent
PUBLISHED = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

HARD = [  # texts with which tokenizers have trouble
    "Once upon a time, there was a cat. The cat's name was Tom.\nHe didn't sleep.",
    "\u201cLook!\u201d said Zo\u00eb \u2014 \u2018caf\u00e9\u2019 \U0001f468\u200d\U0001f469\u200d",
    "line one\n\n\ttabs  and   spaces\u00a0\u3000end, \u4f60\u597d\uff0c 12345 3.14 x_y <|endof",
    "".join(map(chr, random.Random(0).choices(range(14, 0x2000), k=300))).strip(),
    "a" + "b" * 300,
]
STORIES = HARD + [f"Story {i}: the {animal} saw the {animal}."
                  for i, animal in enumerate("dog cat bird frog fox".split() * 8)]
VAL = ["A held-out story about a dog.", "Another one, with an unseen word: zygote \U0001f40d."]


def write_input(path, stories):
    """The same stories as any kind of file, by suffix. Adds padding, empty stories and None."""
    table = pandas.DataFrame({"id": 1, "text": [*(f" {story}\n" for story in stories), "", None]})
    text = "".join(f"\n {story} \n{EOT}\n" for story in [*stories, ""])
    lines = table.to_json(orient="records", lines=True).encode()
    data = {".txt": text.encode(), ".csv": table.to_csv().encode(), ".parquet": table.to_parquet(),
            ".jsonl": lines, ".ndjson": lines}[path.suffixes[0].lower()]
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix.lower() == ".gz" else data)


def make(folder, *more, train=STORIES, val=VAL, tokenizer="words", kind="txt"):
    """Prepares these stories, or a training file with these bytes, in folder / "out"."""
    for name, stories in ("train", train), ("val", val):
        write = Path.write_bytes if isinstance(stories, bytes) else write_input
        write(folder / f"{name}.{kind}", stories)
    prepare.main(["--train", f"{folder}/train.{kind}", "--val", f"{folder}/val.{kind}",
                  "--tokenizer", tokenizer, "--out", f"{folder}/out", *more])
    return folder / "out"


def stories_in(folder, split):
    """The stories of a split, decoded: the inverse of prepare.py."""
    meta, tokens = prepare.load_meta(folder), prepare.load_tokens(folder, split)
    tokenizer = prepare.load_tokenizer(meta["tokenizer"])
    parts = np.split(tokens, np.flatnonzero(tokens == meta["eot"]) + 1)
    assert len(parts.pop()) == 0  # end-of-text is the last token
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


def check_complete(folder):
    """Every fact of meta.json about the splits, recomputed. -> meta"""
    meta = prepare.load_meta(folder)
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    for split in "train", "val":
        raw, stories = (folder / f"{split}.bin").read_bytes(), stories_in(folder, split)
        assert meta[split] == {"tokens": len(raw) // 2, "stories": len(stories),
                               "bytes": len("".join(stories).encode()),
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


def reference(stories, tokenizer):
    """The tokens of stories, without prepare.py. words: the 200 most frequent ones of STORIES."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [piece.encode() for piece in most_frequent(STORIES, 200)]
    if tokenizer == "gpt2":
        tokens = list(map(tiktoken.get_encoding("gpt2").decode_single_token_bytes, range(50256)))
    ranks = {token: i for i, token in enumerate(tokens)}
    return sum([[*brute_force(story, ranks), len(ranks)] for story in stories], [])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", "txt TXT.GZ ndjson JSONL.gz csv parquet".split())
def test_every_input_gives_the_reference_tokens(tmp_path, kind, tokenizer):
    out = make(tmp_path, "--vocab_size", "457", tokenizer=tokenizer, kind=kind)
    meta = check_complete(out)
    assert meta["vocab_size"] == meta["eot"] + 1 == {"words": 457, "gpt2": 50257}[tokenizer]
    for split, stories in ("train", STORIES), ("val", VAL):
        tokens = prepare.load_tokens(out, split)
        assert tokens.dtype == np.uint16 and not tokens.flags.writeable
        assert tokens.tolist() == reference(stories, tokenizer)
        assert stories_in(out, split) == stories  # lossless


def test_toy_stories_are_those_that_models_were_trained_on(tmp_path):
    prepare.main(["toy", "--stories", "10000", "--out", str(tmp_path / "toy")])
    meta = check_complete(tmp_path / "toy")
    assert meta["checksum"] == "98eb9d1fb17f30d4"  # from commit 30f8be2
    tokenizer, words = prepare.load_tokenizer(meta["tokenizer"]), prepare.word_lists()
    for word in words["girls"] + words["boys"] + words["places"] + words["objects"]:
        assert len(tokenizer.encode_ordinary(" " + word)) == 1, word


def test_held_out_share_is_seeded_and_no_split_is_empty(monkeypatch):
    def split_off(texts, share, seed):
        monkeypatch.setattr(prepare, "texts_of", lambda args: [(None, text) for text in texts])
        args = Namespace(val_share=share, seed=seed)
        return list(prepare.stories_of(args, collections.Counter()))

    texts = [f"story {i}" for i in range(5000)]
    split = split_off(texts, 0.1, 0)
    assert [story for _, story in split] == texts and split != split_off(texts, 0.1, 1)
    assert 400 < sum(chosen == "val" for chosen, _ in split) < 600
    for seed in range(30):
        for share in 0.001, 0.5, 0.999:  # no story is in both
            split = set(split_off(["a", "a", *"01234"] * 2, share, seed))
            assert len(split) == 6 and {chosen for chosen, _ in split} == {"train", "val"}


def test_digits_and_NA_in_a_csv_are_text(tmp_path):
    out = make(tmp_path, train=b'text,id\n12,1\nNA,2\n"two\nlines, ""quoted""",3\n', kind="csv")
    assert stories_in(out, "train") == ["12", "NA", 'two\nlines, "quoted"']


def test_separators_and_line_ends_wherever_they_stand(tmp_path, capsys):
    text = f"\ufeffone{EOT}two\r{EOT}\rthree\n{EOT}{EOT} four {EOT}\r\nfi\r\nve\rsix<|endof"
    out = make(tmp_path, train=text.encode())
    assert stories_in(out, "train") == ["one", "two", "three", "four", "fi\nve\nsix<|endof"]
    printed = capsys.readouterr().out
    assert "warning: 2 line ends CRLF or CR became LF" in printed and "inside" not in printed
    rows = [f"one{EOT}", f"{EOT}\ntwo {EOT} {EOT}", f"three {EOT} four{EOT}five", EOT]
    data = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    out = make(tmp_path, "--force", train=data, kind="jsonl")
    assert stories_in(out, "train") == ["one", "two", f"three {EOT} four{EOT}five"]
    assert f"warning: 2 times {EOT} stands inside a text" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_very_long_runs_and_all_white_space_are_encoded_exactly(tokenizer, monkeypatch):
    spec = {"name": "words", "pieces": ["  ", "\n\n", " the", "aa"]}
    encoding = prepare.load_tokenizer(spec if tokenizer == "words" else {"name": "gpt2"})
    story = "a" + "\u3000" * 1_000_005 + "the end"
    expected = [*encoding.encode_ordinary("a" + "\u3000" * 1_000_004),
                *encoding.encode_ordinary("\u3000the end"), encoding.eot_token]
    assert prepare.encode([("train", story)], encoding)[0].tolist() == expected
    # small limits, against the definition
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    monkeypatch.setattr(prepare, "LONG_SPACE", 3)
    rng, batch = random.Random(0), []
    for _ in range(300):
        parts = [rng.choice(" \n\t\u00a0\x1caa.1'") * rng.randint(1, 9) for _ in range(12)]
        batch.append(("train", "".join(["x", *parts, "x"])))
    for (_, story), tokens in zip(batch, prepare.encode(batch, encoding)):
        assert tokens.tolist() == [*brute_force(story, ranks), encoding.eot_token], story
    expected = most_frequent([story for _, story in batch], 10**6)
    assert prepare.frequent_pieces(batch, 10**6) == expected


@pytest.mark.parametrize("words, message", [
    ("toy --tokenizer gpt2", "cannot load the tokenizer gpt2 .* --tokenizer words"),
    ("--dataset nobody/nothing --tokenizer words", "cannot read nobody/nothing .*--train FILE")])
def test_no_network_is_one_line(tmp_path, words, message):
    env = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}  # there is no proxy
    done = subprocess.run([sys.executable, ROOT / "prepare.py", *words.split(), "--out", tmp_path],
                          env={**os.environ, **env, "TIKTOKEN_CACHE_DIR": str(tmp_path / "none")},
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(f"error: {message}", done.stderr.splitlines()[-1])


def test_dataset_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write_input(tmp_path / "set" / "train.parquet", STORIES)
    write_input(tmp_path / "set" / "validation.parquet", VAL)
    monkeypatch.chdir(tmp_path)
    prepare.main(["--dataset", "set", "--tokenizer", "words", "--out", "out"])
    assert [stories_in("out", split) for split in ("train", "val")] == [STORIES, VAL]


def test_importing_prepare_imports_no_slow_package():
    code = "import prepare, sys; sys.exit(bool({'datasets', 'torch', 'pandas'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_run_killed_between_the_last_moves_leaves_no_mixture(tmp_path):
    out = make(tmp_path)
    code = f"""
import os, prepare
real, left = os.replace, [1]
os.replace = lambda *paths: (left.pop(), real(*paths)) if left else os._exit(9)  # as kill -9 then
prepare.main(["toy", "--stories", "50", "--out", {str(out)!r}, "--force"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 9
    with pytest.raises(prepare.UserError, match="no prepared data"):
        prepare.load_tokens(out, "train")
    make(tmp_path)  # without --force: what the killed run left is no data
    assert stories_in(out, "train") == STORIES


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_leaves_the_old_data(tmp_path, number):
    out = make(tmp_path)
    before = contents(out)
    process = subprocess.Popen([sys.executable, ROOT / "prepare.py", "toy", "--stories", "99999",
                                "--out", out, "--force"], stderr=subprocess.PIPE, text=True)
    while not list(out.glob("unfinished*")):
        assert process.poll() is None
    process.send_signal(number)
    printed = process.communicate()[1]
    assert contents(out).items() >= before.items()
    if number == signal.SIGTERM:
        assert process.returncode == 1 and "stopped\n" in printed and "Traceback" not in printed
        assert contents(out) == before


def test_one_process_at_a_time_has_a_folder(tmp_path):
    with prepare.locked(tmp_path / "run"):
        with pytest.raises(prepare.UserError, match="another process is writing"):
            prepare.locked(tmp_path / "run").__enter__()
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run").exists()  # only an empty folder is removed


def test_readers_refuse_damaged_files(tmp_path):
    out = make(tmp_path)
    raw = (out / "train.bin").read_bytes()
    for damaged in raw[:-2], raw[:-1], raw + b"\0\0", b"", bytes([raw[0] ^ 1]) + raw[1:]:
        (out / "train.bin").write_bytes(damaged)
        with pytest.raises(prepare.UserError, match="train.bin is damaged.* --force"):
            prepare.load_tokens(out, "train")
