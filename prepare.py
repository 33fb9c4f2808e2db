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
import shutil
import signal
from collections import Counter
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
FIELDS = ("tokenizer", "vocab_size", "eot", "source", "checksum", *SPLITS)  # of meta.json
# how GPT-2 cuts text before it merges bytes: words with their leading space, numbers, white space
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
STORIES_PER_JOB = 128  # what a worker process tokenizes at a time, about 0.1 MB of TinyStories
LONG_SPACE = 100_000  # characters of white space in a row; tiktoken fails at a million
# file ending: loader of the datasets package
KINDS = {"txt": "text", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
ASSETS = Path(__file__).resolve().parent / "assets"
MAIN_PROCESS = os.getpid()


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message, one line, without a traceback."""


@contextmanager
def locked(folder):
    """Makes a folder and keeps other processes out while the block runs. Raises UserError.

    The system releases the lock when its process ends in any way.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another --out")
    if fcntl is None:  # Windows
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
    """meta.json of a prepared folder. Raises UserError if it is missing or damaged.

    {"tokenizer": {"name": "gpt2"} or {"name": "words", "pieces": [str, ...]}, "vocab_size": int,
     "eot": int, the id of the end-of-text token, "source": dict, "checksum": str, of all tokens,
     "train", "val": {"tokens", "stories", "bytes": int, UTF-8 bytes of text, "sha256": str}}
    """
    path = Path(folder) / "meta.json"
    if not os.path.isfile(path):
        raise UserError(f"no prepared data in {folder} (no meta.json): name the folder that has it "
                        "with --data, or make some, see python prepare.py --help")
    try:
        meta = json.loads(path.read_bytes())
        return {name: meta[name] for name in FIELDS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: run prepare.py again with --force") from error


def load_tokens(folder, split):
    """The tokens of "train" or "val": uint16 (tokens,), read-only, mapped from disk, not loaded.

    Reads the file once, a second a gigabyte. Raises UserError if it is not the one in meta.json.
    """
    path, expected = Path(folder) / f"{split}.bin", load_meta(folder)[split]
    digest = None
    if path.is_file():
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected["sha256"]:
        raise UserError(f"{path} is damaged or missing: run prepare.py again with --force")
    return np.memmap(path, dtype="<u2", mode="r")


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
    return {name: " ".join(rows).split() for name, rows in read_asset("words.txt").items()}


def read_asset(name):
    """{slot: [text, ...]} of a file with rows "slot text|text": ¶ is a new line, # a comment."""
    texts = {}
    for row in (ASSETS / name).read_text(encoding="utf-8").splitlines():
        if row.strip() and not row.startswith("#"):
            slot, text = row.split(maxsplit=1)
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


def read_files(paths, column):
    """The texts of local files. Raises UserError if a file cannot be read."""
    for path in paths:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        try:
            if kind == "txt":
                yield from read_txt(path)
                continue
            from datasets import load_dataset

            options = {}
            if kind == "csv":  # numbers and "NA" are text, too
                options = {"keep_default_na": False, "converters": {column: str}}
            pattern = glob.escape(str(path))
            rows = load_dataset(KINDS[kind], data_files=pattern, streaming=True, **options)
            yield from texts_in(rows["train"].iter(1000), column, path)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            marks = (b"\xff\xfe", b"\xfe\xff")  # how a file in UTF-16 begins
            encoding = "utf-16" if error.object.startswith(marks) else "latin1"
            raise UserError(f"{path} is not UTF-8: convert it, for example with "
                            f"iconv -f {encoding} -t utf-8") from error
        except (OSError, EOFError, ValueError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot read {path}: {reason}") from error


def read_txt(path):
    """The stories of a .txt file. Holds one story at a time, and a block of 1 MB."""
    parts, end = [], ""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        while block := file.read(2**20):
            *stories, end = (end + block).split(EOT)
            for story in stories:
                yield "".join([*parts, story])
                parts = []
            parts.append(end[: 1 - len(EOT)])
            end = end[1 - len(EOT) :]  # a separator may begin here and end in the next block
    yield "".join([*parts, end])


def load_hub(name, config, column):
    """{split: texts}. Raises UserError if the dataset cannot be loaded or has no train split."""
    from datasets import load_dataset

    try:
        data = load_dataset(name, config)
        splits = {"train": data["train"]}
    except Exception as error:  # many kinds of exceptions, the same advice
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load the dataset {name!r}: {reason}. Without a network: "
                        "python prepare.py --train FILE or python prepare.py toy") from error
    if "validation" in data:
        splits["val"] = data["validation"]
    return {split: texts_in(splits[split].iter(1000), column, name) for split in splits}


def texts_in(batches, column, where):
    """The texts of batches {column: [value, ...]}. Raises UserError if there are none."""
    for batch in batches:
        values = batch.get(column, [0])  # 0 is no text: a missing column is reported
        if not all(isinstance(value, str | None) for value in values):
            raise UserError(f"{where} has no column {column!r} of texts, its columns are "
                            f"{', '.join(batch)}: name the column of texts with --text_column")
        yield from filter(None, values)


def stories_of(texts, args, notes):
    """Yields (split, story). Without "val" in texts a share of train is held out for it."""
    if "val" not in texts:
        yield from split_off(clean(texts["train"], notes), args.val_share, args.seed)
        return
    for split in SPLITS:
        for story in clean(texts[split], notes):
            yield split, story


def clean(texts, notes):
    """Yields the stories that are not empty. Counts line ends and inner separators in notes."""
    for text in texts:
        story = text.strip()
        while story.startswith(EOT) or story.endswith(EOT):
            story = story.removeprefix(EOT).removesuffix(EOT).strip()
        notes["separators"] += story.count(EOT)
        notes["line_ends"] += story.count("\r")
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


def write_stories(path, stories):
    """Writes an Arrow file. A row has STORIES_PER_JOB stories, {"train": [...], "val": [...]}.

    -> (Dataset, {split: {"stories": int, "bytes": int}}). Raises UserError if a split is empty.
    """
    import datasets
    import pyarrow

    facts = {split: {"stories": 0, "bytes": 0} for split in SPLITS}
    schema = pyarrow.schema({split: pyarrow.list_(pyarrow.string()) for split in SPLITS})
    stories = iter(tqdm(stories, desc="reading", unit=" stories", unit_scale=True))
    with pyarrow.ipc.new_stream(path, schema) as file:
        while batch := list(itertools.islice(stories, STORIES_PER_JOB)):
            job = {"train": [], "val": []}
            for split, story in batch:
                job[split].append(story)
                facts[split]["stories"] += 1
                facts[split]["bytes"] += len(story.encode())
            file.write_batch(pyarrow.RecordBatch.from_pylist([job], schema))
    for split in SPLITS:
        if not facts[split]["stories"]:
            raise UserError(f"no story for the {split} split: give files with text in them, or at "
                            f"least two different stories; in .txt files {EOT} separates them")
    return datasets.Dataset.from_file(str(path)), facts


def on_all_cores(jobs, work, workers, path, **arguments):
    """The Dataset of work(job, **arguments) for every job, in order, as Arrow files at path."""
    from multiprocess import TimeoutError

    processes = min(workers, len(jobs))
    try:
        return jobs.map(work, fn_kwargs=arguments, remove_columns=jobs.column_names, desc=path.stem,
                        num_proc=processes if processes > 1 else None, writer_batch_size=16,
                        cache_file_name=str(path), new_fingerprint=path.stem)
    except TimeoutError as error:  # what Ctrl-C becomes inside of map
        raise KeyboardInterrupt from error


def count_pieces(job):
    counts = Counter()
    for story in job["train"]:
        counts.update(regex.findall(PIECE, story))
    return {"counts": json.dumps(counts)}


def frequent_pieces(rows, count):
    """The `count` most frequent pieces longer than a byte, the most frequent first."""
    counts = Counter()
    for row in rows:
        counts.update(json.loads(row["counts"]))
    pieces = [piece for piece in counts if len(piece.encode()) > 1]
    return sorted(pieces, key=lambda piece: (-counts[piece], piece))[:count]


def encode_job(job, encoding):
    return {split: encode(job[split], encoding).astype("<u2").tobytes() for split in SPLITS}


def encode(stories, encoding):
    """The tokens of stories, each with end-of-text after it: (tokens,)."""
    if all(len(story) < LONG_SPACE and EOT not in story for story in stories):
        # one call for all stories: 8 % faster
        return encoding.encode_to_numpy("".join(s + EOT for s in stories), allowed_special="all")
    tokens = []
    for story in stories:
        # PIECE ends a piece before the last character of white space: a cut there changes no token
        spaces = regex.finditer(rf"(?<!\s)\s{{{LONG_SPACE},}}", story)
        cuts = [0, *(space.end() - 1 for space in spaces), len(story)]
        for start, end in itertools.pairwise(cuts):
            tokens.append(encoding.encode_to_numpy(story[start:end], disallowed_special=()))
        tokens.append([encoding.eot_token])
    return np.concatenate(tokens)


def write_tokens(folder, rows, facts):
    """Writes train.bin and val.bin. Adds "tokens" and "sha256" to the facts of each split."""
    for split in SPLITS:
        digest = hashlib.sha256()
        with open(folder / f"{split}.bin", "wb") as file:
            for row in rows.select_columns([split]):
                file.write(row[split])
                digest.update(row[split])
            tokens = file.tell() // 2
        facts[split] = {"tokens": tokens, **facts[split], "sha256": digest.hexdigest()}


def parse_arguments(argv):
    """The command line. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("toy", nargs="?", choices=["toy"], help="write stories from the grammar in assets/toy.txt")
    add("--stories", type=int, default=50_000, help="toy: stories in both splits (50000)")
    add("--dataset", default="roneneldan/TinyStories", help="name on the hub, or a folder")
    add("--config", help="configuration of the dataset, where it has several")
    add("--train", nargs="+", type=Path, metavar="FILE",
        help="txt, jsonl or csv, each also .gz, or parquet")
    add("--val", nargs="+", type=Path, metavar="FILE", help="validation files (a share of --train)")
    add("--text_column", default="text", help="column or JSON field that holds the text (text)")
    add("--val_share", type=float, default=0.01, help="share for val if it has no files (0.01)")
    add("--seed", type=int, default=0, help="of the toy stories and of the share for val (0)")
    add("--tokenizer", choices=["gpt2", "words"], help="(gpt2; words for toy)")
    add("--vocab_size", type=int, default=10_000, help="words: bytes and end-of-text too (10000)")
    add("--out", type=Path, help="folder to write (data/<name of the source>)")
    add("--force", action="store_true", help="replace existing data, once the new are complete")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    args = parser.parse_args(argv)
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    if (args.val and not args.train) or (args.toy and args.train):
        raise UserError("--val goes with --train, and toy with neither: see --help")
    if not 258 <= args.vocab_size <= 65_536:  # at least a word; a token is a uint16
        raise UserError(f"--vocab_size must be between 258 and 65,536, not {args.vocab_size:,}")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val_share must be between 0 and 1, not {args.val_share}: try 0.01")
    files = (args.train or []) + (args.val or [])
    for path in files:
        if not path.is_file():
            raise UserError(f"no file {path}: check the path after --train or --val")
        if path.name.removesuffix(".gz").rpartition(".")[2] not in KINDS:
            raise UserError(f"{path}: unknown kind of file, known are {', '.join(KINDS)}")
    name = args.toy or [*files, Path(args.dataset.lower())][0].name.split(".")[0]
    args.out = (args.out or Path("data", name)).absolute()
    return args


def write_data(args, folder, notes):
    """Writes the three files into folder. -> meta"""
    if args.toy:
        texts = {"train": toy_texts(args.stories, args.seed)}
    elif args.train:
        files = {"train": args.train, "val": args.val}
        texts = {split: read_files(paths, args.text_column)
                 for split, paths in files.items() if paths}
    else:
        texts = load_hub(args.dataset, args.config, args.text_column)
    jobs, facts = write_stories(folder / "stories.arrow", stories_of(texts, args, notes))
    spec = {"name": args.tokenizer}
    if args.tokenizer == "words":
        rows = on_all_cores(jobs, count_pieces, args.workers, folder / "counting.arrow")
        spec["pieces"] = frequent_pieces(rows, args.vocab_size - 257)
    encoding = load_tokenizer(spec)
    rows = on_all_cores(jobs, encode_job, args.workers, folder / "tokenizing.arrow",
                        encoding=encoding)
    write_tokens(folder, rows, facts)
    identity = json.dumps([spec, facts["train"]["sha256"], facts["val"]["sha256"]])
    source = {name: value for name, value in vars(args).items()
              if value is not None and name not in ("out", "force", "workers")}
    meta = {"tokenizer": spec, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, **facts,
            "source": source, "checksum": hashlib.sha256(identity.encode()).hexdigest()[:16]}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
    return meta


def main(argv=None):
    args, notes = parse_arguments(argv), Counter()
    if args.tokenizer == "gpt2":
        load_tokenizer({"name": "gpt2"})  # a failed download is reported before the text is read
    folder = args.out / "unfinished"
    if args.out == Path.cwd():
        raise UserError("--out must name a folder of its own, such as data/mine")
    if not args.force and (args.out / "meta.json").exists():
        raise UserError(f"{args.out} already holds data: add --force or choose another --out")
    with locked(args.out):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed run
            folder.mkdir()
            meta = write_data(args, folder, notes)
            (args.out / "meta.json").unlink(missing_ok=True)  # a reader never finds a mixture
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(folder / name, args.out / name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if notes["line_ends"]:
        print(f"{notes['line_ends']:,} line ends CRLF or CR became LF")
    if notes["separators"]:
        print(f"warning: {notes['separators']:,} times {EOT} stands inside a text; there it is "
              "ordinary text and separates nothing")
    for split in SPLITS:
        line = "{0:6}{stories:,} stories, {tokens:,} tokens, {bytes:,} bytes of text"
        print(line.format(split, **meta[split]))
    print(f"vocabulary of {meta['vocab_size']:,} ({args.tokenizer}), checksum {meta['checksum']}, "
          f"in {args.out}")


def stop(number, frame):
    """Ctrl-C ends the program. Worker processes inherit this and end without a word."""
    if os.getpid() != MAIN_PROCESS:
        os._exit(1)
    raise KeyboardInterrupt


if __name__ == "__main__":
    logging.disable()  # libraries log in many lines what we report in one
    signal.signal(signal.SIGINT, stop)
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
