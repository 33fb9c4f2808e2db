"""Turns text into tokens: writes and reads data/<name>/{train.bin, val.bin, meta.json}.

python prepare.py                                            # TinyStories from the Hugging Face hub
python prepare.py --tokenizer words --vocab_size 10000       # the same, with whole words as tokens
python prepare.py --dataset Skylion007/openwebtext           # another hub dataset, or a folder
python prepare.py --train a.txt b.jsonl.gz --val c.parquet   # local files
python prepare.py toy                                        # stories from assets/toy.txt, offline

In a .txt file <|endoftext|> separates stories; elsewhere each row is one story. White space around
a story is dropped, line ends CRLF and CR become LF. A .bin file holds little-endian uint16 tokens,
end-of-text after every story. meta.json is written last: a folder that has one is complete.
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
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val")
# how GPT-2 cuts text before it merges bytes: words with their leading space, numbers, white space
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONG_SPACE = 100_000  # characters of white space in a row; tiktoken fails at a million
# file ending: loader of the datasets package
KINDS = {"txt": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
BATCH = 128  # stories that a thread encodes at a time, about 0.1 MB of TinyStories
ASSETS = Path(__file__).resolve().parent / "assets"


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message, one line, without a traceback."""


# --------------------------------------------------------------------- for all other programs


@contextmanager
def locked(folder):
    """Makes a folder and keeps other processes out while the block runs. Raises UserError.

    The system releases the lock when its process ends in any way.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out")
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is writing {folder}: wait for it, stop it, or choose "
                        f"another --out") from None
    try:
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # an empty folder is not left behind
            os.rmdir(folder)


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
    if not path.is_file() or sha256(path) != expected:
        raise UserError(f"{path} is damaged or missing: run prepare.py again with --force")
    return np.memmap(path, dtype="<u2", mode="r")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# ---------------------------------------------------------------------------------- toy stories


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

    def __init__(self, rng, grammar, words):
        """Draws people, places and objects. Who is named first and who gives are independent.

        A and B are two friends, X and Y the same in the order in which they are named, G gives and
        R receives, M is a grown-up.
        """
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


# ------------------------------------------------------------------------------ text to stories


def read_txt(path):
    """The texts of a .txt file. Holds one text at a time, and a block of 1 MB."""
    parts, end = [], ""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        while block := file.read(2**20):
            *texts, end = (end + block).split(EOT)
            for text in texts:
                yield "".join([*parts, text])
                parts = []
            parts.append(end[: 1 - len(EOT)])
            end = end[1 - len(EOT) :]  # a separator may begin here and end in the next block
    yield "".join([*parts, end])


def kind_of(path):
    """The file ending without .gz, such as "jsonl"."""
    return path.name.removesuffix(".gz").rpartition(".")[2]


def read_file(path, column):
    """The texts of a local file. Raises UserError if it cannot be read."""
    try:
        if kind_of(path) == "txt":
            yield from read_txt(path)
        else:
            yield from read_table(path, column)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        marks = (b"\xff\xfe", b"\xfe\xff")  # how a file in UTF-16 begins
        encoding = "utf-16" if error.object.startswith(marks) else "latin1"
        raise UserError(f"{path} is not UTF-8: convert it, for example with "
                        f"iconv -f {encoding} -t utf-8") from error
    except (OSError, EOFError, ValueError, StopIteration) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def read_table(path, column):
    from datasets import load_dataset

    options = {}
    if kind_of(path) == "csv":  # numbers and "NA" are text, too
        options = {"keep_default_na": False, "converters": {column: str}}
    table = load_dataset(KINDS[kind_of(path)], data_files=glob.escape(str(path)), split="train",
                         streaming=True, **options)
    return texts_in(table, column, path)


def texts_in(table, column, where):
    """The texts in a table of the datasets package. Raises UserError if it has none."""
    for batch in table.iter(1000):
        values = batch.get(column, [0])  # 0 is no text: a missing column is reported
        if not all(isinstance(value, str | None) for value in values):
            raise UserError(f"{where} has no column {column!r} of texts, its columns are "
                            f"{', '.join(batch)}: name the column of texts with --text_column")
        yield from filter(None, values)


def load_hub(name, config, column):
    """{split: texts}. Raises UserError if the dataset cannot be loaded or has no train split."""
    from datasets import load_dataset

    try:
        data = load_dataset(name, config)
        tables = {"train": data["train"]}
    except Exception as error:  # many kinds of exceptions, the same advice
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load the dataset {name!r}: {reason}. Without a network: "
                        "python prepare.py --train FILE or python prepare.py toy") from error
    if "validation" in data:
        tables["val"] = data["validation"]
    return {split: texts_in(table, column, name) for split, table in tables.items()}


def stories_of(args, warnings):
    """Yields (split, story). Counts in warnings what the user should know, {message: count}."""
    if args.toy:
        texts = {"train": toy_texts(args.stories, args.seed)}
    elif args.train:
        files = {"train": args.train, "val": args.val}
        texts = {split: itertools.chain.from_iterable(read_file(p, args.text_column) for p in paths)
                 for split, paths in files.items() if paths}
    else:
        texts = load_hub(args.dataset, args.config, args.text_column)
    if "val" not in texts:
        yield from split_off(trimmed(texts["train"], warnings), args.val_share, args.seed)
        return
    for split in SPLITS:
        for story in trimmed(texts[split], warnings):
            yield split, story


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


# ---------------------------------------------------------------------------- stories to tokens


def frequent_pieces(stories, count):
    """The `count` most frequent pieces longer than a byte, the most frequent first."""
    words, pieces = Counter(), Counter()
    for story in tqdm(stories, desc="counting", unit=" stories", unit_scale=True):
        # a piece never goes on over a space before a word: a cut there changes no piece
        words.update(re.split(r"(?= \S)", story))
    for word, number in words.items():
        for piece in regex.findall(PIECE, word):
            pieces[piece] += number
    longer = [piece for piece in pieces if len(piece.encode()) > 1]
    return sorted(longer, key=lambda piece: (-pieces[piece], piece))[:count]


def encode(story, encoding):
    """The tokens of a story and end-of-text, uint16 (tokens,). A separator in it is ordinary text."""
    parts = [story]
    if len(story) > LONG_SPACE:
        # PIECE ends a piece before the last character of white space: a cut there changes no token
        parts = regex.split(rf"(?=\s\S)(?<=\s{{{LONG_SPACE}}})", story)
    tokens = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate([*tokens, [encoding.eot_token]]).astype("<u2")


def encode_all(stories, encoding):
    """Yields (split, story, tokens), in order. A thread a core: tiktoken releases Python's lock."""

    def encode_batch(batch):
        return [(split, story, encode(story, encoding)) for split, story in batch]

    threads, futures, stories = os.cpu_count() or 1, deque(), iter(stories)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(itertools.islice(stories, BATCH)):
            futures.append(pool.submit(encode_batch, batch))
            if len(futures) > 2 * threads:  # no more: the corpus may be larger than the memory
                yield from futures.popleft().result()
        for future in futures:
            yield from future.result()


def write_tokens(folder, stories, encoding):
    """Writes train.bin and val.bin. -> {split: its entry in meta.json}. Raises UserError."""
    facts = {split: {"tokens": 0, "stories": 0, "bytes": 0} for split in SPLITS}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        stories = tqdm(stories, desc="tokenizing", unit=" stories", unit_scale=True)
        for split, story, tokens in encode_all(stories, encoding):
            (train if split == "train" else val).write(tokens)
            facts[split]["tokens"] += len(tokens)
            facts[split]["stories"] += 1
            facts[split]["bytes"] += len(story.encode())
    for split in SPLITS:
        if not facts[split]["stories"]:
            raise UserError(f"no story for the {split} split: give files with text in them, or at "
                            f"least two different stories; in .txt files {EOT} separates them")
        facts[split]["sha256"] = sha256(folder / f"{split}.bin")
    return facts


# ------------------------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise UserError(message)


def text_file(text):
    """For argparse: a file that can be read here."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"no file {text}")
    if kind_of(Path(text)) not in KINDS:
        raise argparse.ArgumentTypeError(f"{text} has an unknown ending, known: {', '.join(KINDS)}")
    return Path(text)


def vocabulary(text):
    """For argparse: room for a word beside the bytes; a token is a uint16."""
    if not 258 <= int(text) <= 65_536:
        raise argparse.ArgumentTypeError(f"{text} is not between 258 and 65,536")
    return int(text)


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source, add = parser.add_mutually_exclusive_group(), parser.add_argument
    source.add_argument("toy", nargs="?", choices=["toy"],
                        help="write stories from the grammar in assets/toy.txt")
    source.add_argument("--dataset", default="roneneldan/TinyStories",
                        help="name on the hub, or a folder")
    source.add_argument("--train", nargs="+", type=text_file, metavar="FILE",
                        help="txt, jsonl or csv, each also .gz, or parquet")
    add("--val", nargs="+", type=text_file, metavar="FILE", help="(a share of --train)")
    add("--stories", type=int, default=50_000, help="toy: stories in both splits (50000)")
    add("--config", help="configuration of the dataset, where it has several")
    add("--text_column", default="text", help="column or JSON field that holds the text (text)")
    add("--val_share", type=float, default=0.01, help="share for val if it has no files (0.01)")
    add("--seed", type=int, default=0, help="of the toy stories and of the share for val (0)")
    add("--tokenizer", choices=["gpt2", "words"], help="(gpt2; words for toy)")
    add("--vocab_size", type=vocabulary, default=10_000,
        help="words: bytes and end-of-text too (10000)")
    add("--out", type=Path, help="folder to write (data/<name of the source>)")
    add("--force", action="store_true", help="replace existing data, once the new are complete")
    args = parser.parse_args(argv)
    if args.val and not args.train:
        parser.error("--val goes with --train")
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    name = args.toy or [*(args.train or []), Path(args.dataset.lower())][0].name.split(".")[0]
    args.out = args.out or Path("data", name)
    return args


def write_data(args, folder):
    """Writes the three files into folder. -> (meta, warnings)"""
    spec, warnings = {"name": args.tokenizer}, Counter()
    if args.tokenizer == "words":
        train = (story for split, story in stories_of(args, Counter()) if split == "train")
        spec["pieces"] = frequent_pieces(train, args.vocab_size - 257)
    encoding = load_tokenizer(spec)
    facts = write_tokens(folder, stories_of(args, warnings), encoding)
    identity = json.dumps([spec, facts["train"]["sha256"], facts["val"]["sha256"]])
    source = {name: value for name, value in vars(args).items()
              if value is not None and name not in ("out", "force")}
    meta = {"tokenizer": spec, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, **facts,
            "source": source, "checksum": hashlib.sha256(identity.encode()).hexdigest()[:16]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
    return meta, warnings


def main(argv=None):
    args = parse_arguments(argv)
    if not args.force and (args.out / "meta.json").exists():
        raise UserError(f"{args.out} already holds data: add --force or choose another --out")
    folder = args.out / "unfinished"
    with locked(args.out):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed run
            folder.mkdir()
            meta, warnings = write_data(args, folder)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # unfinished files are removed
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
