"""Turns text into tokens: writes and reads data/<name>/{train.bin, val.bin, meta.json}.

python prepare.py                                            # TinyStories from the Hugging Face hub
python prepare.py --tokenizer words --vocab_size 10000       # the same, with whole words as tokens
python prepare.py --dataset Skylion007/openwebtext           # another hub dataset, or a folder
python prepare.py --train a.txt b.jsonl.gz --val c.parquet   # local files
python prepare.py toy                                        # stories from assets/toy.txt, offline

A row of a jsonl, csv or parquet file is one story. In any other file <|endoftext|> separates them.
White space around a story is dropped, line ends CRLF and CR become LF. A .bin file holds uint16
tokens, end-of-text after every story. meta.json is written last: a folder that has one is complete.
"""

import argparse
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

with suppress(ImportError):  # Windows has no fcntl
    import fcntl

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val")
# how GPT-2 cuts text before it merges bytes: words with their leading space, numbers, white space
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONG_SPACE = 100_000  # characters of white space in a row; tiktoken fails at a million
ASSETS = Path(__file__).resolve().parent / "assets"


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message, one line, without a traceback."""


@contextmanager
def locked(folder):
    """Makes a folder and keeps other processes out while the block runs. Raises UserError.

    The system releases the lock when its process ends in any way. Windows has no such lock.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if os.name != "nt":
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"cannot lock the folder {folder} ({error.strerror}): choose another --out "
                        "if another process is writing it") from None
    try:
        yield
    finally:
        with suppress(OSError):  # an empty folder is not left behind
            os.rmdir(folder)
        if os.name != "nt":
            os.close(lock)


def load_meta(folder):
    """meta.json of a prepared folder. Raises UserError if there is none.

    {"tokenizer": {"name": "gpt2"} or {"name": "words", "pieces": [str, ...]}, "vocab_size": int,
     "eot": int, the id of the end-of-text token, "source": dict, "checksum": str, of all tokens,
     "train", "val": {"tokens", "stories", "bytes": int, UTF-8 bytes of text, "sha256": str}}
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"no prepared data in {folder} (no meta.json): name the folder that has it "
                        "with --data, or make some, see python prepare.py --help")
    return json.loads(path.read_bytes())


def load_tokens(folder, split):
    """The tokens of "train" or "val": uint16 (tokens,), read-only, mapped from disk, not loaded.

    Reads the file once, a second a gigabyte. Raises UserError if it is not the one in meta.json.
    """
    path, expected = Path(folder) / f"{split}.bin", load_meta(folder)[split]["sha256"]
    with suppress(OSError, ValueError):  # no file, or not a whole number of tokens
        tokens = np.memmap(path, dtype="<u2", mode="r")
        if hashlib.sha256(tokens).hexdigest() == expected:
            return tokens
    raise UserError(f"{path} is damaged or missing: run prepare.py again with --force")


def load_tokenizer(spec):
    """The tiktoken.Encoding of meta["tokenizer"]. Raises UserError if it cannot be loaded."""
    if spec["name"] == "words":
        # Ids: the 256 bytes, the pieces from frequent to rare, end-of-text. tiktoken looks up the
        # whole piece, or else merges its bytes, lowest id first: every text can be encoded.
        tokens = [bytes([byte]) for byte in range(256)] + [p.encode() for p in spec["pieces"]]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("words", pat_str=PIECE, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)})
    try:
        return tiktoken.get_encoding(spec["name"])
    except Exception as error:  # no network, a proxy's error page, a damaged cache: one advice
        raise UserError(f"cannot load the tokenizer {spec['name']} ({type(error).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder with its files, or use --tokenizer words, "
                        "which needs no download") from error


def word_lists():
    """The lists of assets/words.txt, {name: [word, ...]}."""
    return {name: " ".join(lines).split() for name, lines in read_asset("words.txt").items()}


def read_asset(name):
    """{slot: [text, ...]} of a file with lines "slot text|text": ¶ is a new line, # a comment."""
    texts = {}
    for line in (ASSETS / name).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            slot, text = line.split(maxsplit=1)
            texts.setdefault(slot, []).extend(text.replace("¶", "\n").split("|"))
    return texts


def toy_texts(count, seed):
    rng, grammar, words = random.Random(seed), read_asset("toy.txt"), word_lists()
    for _ in range(count):
        yield Story(rng, grammar, words)["story"]


class Story(dict):
    """{slot: text} of one toy story. Slots of the grammar are filled when they are asked for."""

    def __init__(self, rng, grammar, words):  # assets/toy.txt explains the slots
        self.rng, self.grammar = rng, grammar
        friends = rng.sample(words["girls"] + words["boys"], 2)
        cast = friends + rng.sample(friends, 2) + rng.sample(friends, 2)
        cast.append(rng.choice(["mom", "grandma", "dad", "grandpa"]))
        for slot, name in zip("ABXYGRM", cast):
            female = name in [*words["girls"], "mom", "grandma"]
            self[slot] = name
            for pair in ("he", "she"), ("him", "her"), ("his", "her"), ("boy", "girl"):
                self[f"{slot}_{pair[0]}"] = pair[female]
                self[f"{slot}_{pair[0].title()}"] = pair[female].title()
        self["place"], self["other_place"] = rng.sample(words["places"], 2)
        self["gift"], self["toy"] = rng.sample(words["objects"], 2)
        self["spot"], self["other_spot"] = rng.sample(grammar["spot"], 2)

    def __missing__(self, slot):  # str.format_map asks here for every slot that has no value yet
        self[slot] = self.rng.choice(self.grammar[slot]).format_map(self)
        return self[slot]


def texts_of(args):
    """{split: texts}, without "val" where a share of train is for it. Raises UserError."""
    if args.toy:
        return {"train": toy_texts(args.stories, args.seed)}
    if args.train:
        files = {"train": args.train, "val": args.val}
        return {split: read_files(files[split], args.text_column)
                for split in SPLITS if files[split]}
    from datasets import load_dataset

    try:
        data = load_dataset(args.dataset, args.config)
    except Exception as error:  # many kinds of exceptions, the same advice
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load the dataset {args.dataset!r}: {reason}. Without a network: "
                        "python prepare.py --train FILE or python prepare.py toy") from error
    names = {"train": "train", "val": "validation"}
    return {split: texts_in(data[names[split]], args.text_column)
            for split in SPLITS if names[split] in data}


def read_files(paths, column):
    """The texts of local files. Raises UserError if a file cannot be read."""
    for path in paths:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        try:
            if kind not in ("json", "jsonl", "csv", "parquet"):
                yield from read_txt(path)
                continue
            from datasets import load_dataset

            options = {"keep_default_na": False} if kind == "csv" else {}  # "NA" is text, too
            table = load_dataset(kind.rstrip("l"), data_files=glob.escape(str(path)),
                                 split="train", streaming=True, **options)
            yield from texts_in(table, column)
        except (OSError, EOFError, ValueError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot read {path}, damaged or not UTF-8: {reason}") from error


def read_txt(path):
    """The texts of a .txt file. Holds one text at a time."""
    opener, parts = gzip.open if path.suffix == ".gz" else open, []
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        for line in file:
            *ends, start = line.split(EOT)
            for end in ends:
                yield "".join([*parts, end])
                parts = []
            parts.append(start)
    yield "".join(parts)


def texts_in(table, column):
    """The texts in a table of the datasets package. Raises UserError if it has no such column."""
    for batch in table.iter(1000):
        if column not in batch:
            raise UserError(f"no column {column!r}, the columns are {', '.join(batch)}: name the "
                            "column of texts with --text_column")
        yield from filter(None, batch[column])


def stories_of(args, warnings):
    """Yields (split, story). Counts in warnings what the user should know, {message: count}."""
    stories = {split: trimmed(texts, warnings) for split, texts in texts_of(args).items()}
    if "val" not in stories:
        return split_off(stories["train"], args.val_share, args.seed)
    return ((split, story) for split in SPLITS for story in stories[split])


def trimmed(texts, warnings):
    """Yields the stories that are not empty, without separators and white space around them."""
    for text in texts:
        story = text.strip()
        while story.startswith(EOT) or story.endswith(EOT):
            story = story.removeprefix(EOT).removesuffix(EOT).strip()
        warnings[f"times {EOT} stands inside a text; there it is ordinary text"] += story.count(EOT)
        warnings["line ends CRLF or CR became LF"] += story.count("\r")
        story = story.replace("\r\n", "\n").replace("\r", "\n")
        if story:
            yield story


def split_off(stories, share, seed):
    """Yields (split, story), a share of them "val".

    The hash of a story decides, so equal stories go to the same split and no list is kept. But the
    first story always trains and the next different one always validates: no split is empty.
    """
    fixed = {}  # digest: split
    for story in stories:
        digest = hashlib.blake2b(story.encode(), digest_size=8, key=str(seed).encode()).digest()
        if len(fixed) < 2:
            fixed.setdefault(digest, SPLITS[len(fixed)])
        drawn = "val" if int.from_bytes(digest, "little") < share * 2**64 else "train"
        yield fixed.get(digest, drawn), story


def frequent_pieces(stories, count):
    """The `count` most frequent pieces longer than a byte, the most frequent first."""
    words, pieces = Counter(), Counter()
    for story in stories:
        words.update(re.split(r"(?= \S)", story))  # every piece lies in one of these parts
    for word, number in words.items():
        for piece in regex.findall(PIECE, word):
            pieces[piece] += number
    longer = [piece for piece in pieces if len(piece.encode()) > 1]
    return sorted(longer, key=lambda piece: (-pieces[piece], piece))[:count]


def encode(story, encoding):
    """The tokens of a story, and end-of-text. A separator inside the story is ordinary text."""
    parts = [story]
    if len(story) > LONG_SPACE:
        # PIECE ends a piece before the last character of white space: a cut there changes no token
        parts = regex.split(rf"(?=\s\S)(?<=\s{{{LONG_SPACE}}})", story)
    tokens = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate([*tokens, [encoding.eot_token]]).astype("<u2")


def encode_all(stories, encoding):
    """Yields (split, story, tokens), in order. A thread per core: tiktoken releases the GIL."""
    def encode_batch(batch):
        return [(split, story, encode(story, encoding)) for split, story in batch]

    stories, futures, threads = iter(stories), deque(), os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(stories, 128)):
            futures.append(pool.submit(encode_batch, batch))
            if len(futures) > 2 * threads:  # no more: a corpus may be larger than the memory
                yield from futures.popleft().result()
        for future in futures:
            yield from future.result()


def write_tokens(folder, stories, encoding):
    """Writes train.bin and val.bin. -> {split: its entry in meta.json}. Raises UserError."""
    facts = {split: {"tokens": 0, "stories": 0, "bytes": 0} for split in SPLITS}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for split, story, tokens in encode_all(stories, encoding):
            (train if split == "train" else val).write(tokens)
            facts[split]["tokens"] += len(tokens)
            facts[split]["stories"] += 1
            facts[split]["bytes"] += len(story.encode())
    for split in SPLITS:
        if not facts[split]["stories"]:
            raise UserError(f"no story for the {split} split: give files with text in them, or at "
                            f"least two different stories; in .txt files {EOT} separates them")
        tokens = np.memmap(folder / f"{split}.bin", mode="r")
        facts[split]["sha256"] = hashlib.sha256(tokens).hexdigest()
    return facts


def write_data(args, folder, warnings):
    """Writes the three files into folder. -> meta"""
    progress = dict(unit=" stories", unit_scale=True)
    spec = {"name": args.tokenizer}
    if args.tokenizer == "words":
        stories = tqdm(stories_of(args, Counter()), desc="counting words", **progress)
        train = (story for split, story in stories if split == "train")
        spec["pieces"] = frequent_pieces(train, args.vocab_size - 257)
    encoding = load_tokenizer(spec)
    stories = tqdm(stories_of(args, warnings), desc="tokenizing", **progress)
    facts = write_tokens(folder, stories, encoding)
    identity = json.dumps([spec, facts["train"]["sha256"], facts["val"]["sha256"]])
    meta = {"tokenizer": spec, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, **facts,
            "source": vars(args), "checksum": hashlib.sha256(identity.encode()).hexdigest()[:16]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
    return meta


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise UserError(message)


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_mutually_exclusive_group().add_argument
    add("toy", nargs="?", choices=["toy"], help="write stories from the grammar in assets/toy.txt")
    add("--dataset", default="roneneldan/TinyStories", help="name on the hub, or a folder")
    add("--train", nargs="+", type=Path, metavar="FILE", default=[], help="each may also be .gz")
    add = parser.add_argument
    add("--val", nargs="+", type=Path, metavar="FILE", default=[], help="(a share of --train)")
    add("--val_share", type=float, default=0.01, help="share for val if it has no files (0.01)")
    add("--stories", type=int, default=50_000, help="toy: stories in both splits (50000)")
    add("--config", help="configuration of the dataset, where it has several")
    add("--text_column", default="text", help="column or JSON field that holds the text (text)")
    add("--seed", type=int, default=0, help="of the toy stories and of the share for val (0)")
    add("--tokenizer", choices=["gpt2", "words"], help="(gpt2; words for toy)")
    add("--vocab_size", type=int, default=10_000, help="words: bytes and end-of-text too (10000)")
    add("--out", type=Path, help="folder to write (data/<name of the source>)")
    add("--force", action="store_true", help="replace existing data, once the new are complete")
    args = parser.parse_args(argv)
    if args.val and not args.train:
        parser.error("--val goes with --train")
    if not 258 <= args.vocab_size <= 65_536:  # at least a word; a token is a uint16
        parser.error("--vocab_size must be between 258 and 65,536")
    for path in args.train + args.val:
        if not path.is_file():
            parser.error(f"no file {path}")
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    name = args.toy or [*args.train, Path(args.dataset.lower())][0].name.split(".")[0]
    args.out = args.out or Path("data", name)
    return args


def main(argv=None):
    args, warnings = parse_arguments(argv), Counter()
    if not args.force and (args.out / "meta.json").exists():
        raise UserError(f"{args.out} already holds data: add --force or choose another --out")
    folder = args.out / "unfinished"
    with locked(args.out):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed run
            folder.mkdir()
            meta = write_data(args, folder, warnings)
            (args.out / "meta.json").unlink(missing_ok=True)  # a reader never finds a mixture
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(folder / name, args.out / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    for message, count in warnings.items():
        if count:
            print(f"warning: {count:,} {message}")
    for split in SPLITS:
        line = "{0:6}{stories:,} stories, {tokens:,} tokens, {bytes:,} bytes of text"
        print(line.format(split, **meta[split]))
    print(f"vocabulary of {meta['vocab_size']:,} ({args.tokenizer}), checksum {meta['checksum']}, "
          f"in {args.out}")


if __name__ == "__main__":
    logging.disable()  # libraries log in many lines what we report in one
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
