"""Turns text into tokens: writes and reads data/<name>/{train.bin, val.bin, meta.json}.

python prepare.py                                            # TinyStories from the Hugging Face hub
python prepare.py --tokenizer words --vocab_size 10000       # the same, with whole words as tokens
python prepare.py --dataset Skylion007/openwebtext           # another hub dataset, or a folder
python prepare.py --train a.txt b.jsonl.gz --val c.parquet   # local files
python prepare.py toy                                        # stories from assets/toy.txt, offline

In a .txt file, <|endoftext|> separates stories. In other sources every row is one story. Line ends
CRLF and CR become LF, and white space around a story is removed. A .bin file holds little-endian
uint16 tokens, and an end-of-text token follows every story. meta.json is written last: a folder
that has one is complete.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val")
# the pattern by which GPT-2 cuts text into pieces before it merges bytes: words with their leading
# space, numbers, punctuation, white space
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
JOB = 128  # stories that a worker process tokenizes in one call
LONG_SPACE = 100_000  # characters of white space in a row; tiktoken fails at a million
MAX_PIECES = 4_000_000  # different pieces counted before the rarest are dropped: about 0.5 GB
BUILDERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}  # the library datasets reads them
KINDS = (".txt", ".jsonl", ".json", ".csv", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
ASSETS = Path(__file__).resolve().parent / "assets"
MAIN_PROCESS = os.getpid()


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message as one line, without a traceback."""


# ------------------------------------------------------------------ what the other programs import


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
    fields = {"tokenizer", "vocab_size", "eot", "source", "checksum", *SPLITS}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or not fields <= meta.keys():
        raise UserError(f"{path} is damaged: run prepare.py again with --out {folder} --force")
    return meta


def load_tokens(folder, split):
    """The tokens of "train" or "val": uint16 (tokens,), read-only, mapped from disk, not loaded.

    Reads the file once, about a second per gigabyte. Raises UserError if its size or its sha256 is
    not that of meta.json.
    """
    path, expected = Path(folder) / f"{split}.bin", load_meta(folder)[split]
    advice = f"run prepare.py again with --out {folder} --force"
    size = path.stat().st_size if path.exists() else 0
    if size != 2 * expected["tokens"]:
        raise UserError(f"{path} has {size:,} bytes where meta.json promises "
                        f"{2 * expected['tokens']:,}: {advice}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected["sha256"]:
        raise UserError(f"{path} is damaged, its sha256 is not that of meta.json: {advice}")
    return np.memmap(path, dtype="<u2", mode="r")


def load_tokenizer(spec):
    """The tiktoken.Encoding of meta["tokenizer"], or of a checkpoint's copy of it.

    Raises UserError if the name is unknown, or if the files of GPT-2's tokenizer cannot be loaded.
    """
    if spec["name"] == "words":
        # Ids: the 256 bytes, then the pieces, the most frequent first, then end-of-text. tiktoken
        # looks up a whole piece first. If it is not there, it merges bytes, lowest id first, so
        # every text can be encoded.
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [piece.encode() for piece in spec["pieces"]]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("words", pat_str=PIECE, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)})
    if spec["name"] != "gpt2":
        raise UserError(f"unknown tokenizer {spec['name']!r}: "
                        "run prepare.py with --tokenizer gpt2 or words")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a proxy's error page, a damaged cache: one advice
        raise UserError(f"cannot load the GPT-2 tokenizer ({type(error).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder with its two files, or use "
                        "--tokenizer words, which needs no download") from error


def word_lists():
    """The lists of assets/words.txt, {name: [word, ...]}."""
    return {name: " ".join(rows).split() for name, rows in read_asset("words.txt").items()}


def read_asset(name):
    """{slot: [text, ...]} of a file in which every row has a slot and a text for it.

    A # begins a comment, | separates two texts, ¶ is a new line.
    """
    texts = {}
    for row in (ASSETS / name).read_text(encoding="utf-8").splitlines():
        if row.strip() and not row.startswith("#"):
            slot, text = row.split(maxsplit=1)
            texts.setdefault(slot, []).extend(text.replace("¶", "\n").split("|"))
    return texts


# -------------------------------------------------------------- sources: generators of texts (str)


def read_files(paths, column):
    """The texts of local files. Raises UserError if a file cannot be read."""
    for path in paths:
        kind = Path(path.name.removesuffix(".gz")).suffix
        try:
            if kind == ".txt":
                yield from read_txt(path)
            elif kind == ".jsonl":
                yield from read_jsonl(path, column)
            else:
                yield from read_table(path, BUILDERS[kind], column)
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error
        except (OSError, EOFError, ValueError, zlib.error) as error:  # what the libraries raise
            raise UserError(f"cannot read {path}: {first_line(error)}") from error


def open_file(path, mode, **options):
    return (gzip.open if path.suffix == ".gz" else open)(path, mode, **options)


def read_txt(path):
    """The stories of a .txt file: what stands between two separators, wherever these are."""
    parts, end = [], ""
    with open_file(path, "rt", encoding="utf-8-sig", newline="") as file:
        while block := file.read(2**20):
            *stories, end = (end + block).split(EOT)
            for story in stories:
                yield "".join([*parts, story])
                parts = []
            cut = max(0, len(end) - len(EOT) + 1)  # a separator may begin in the last characters
            parts.append(end[:cut])
            end = end[cut:]
    yield "".join([*parts, end])


def read_jsonl(path, column):
    """Python's own JSON, since the one in `datasets` refuses half of a surrogate pair."""
    with open_file(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {first_line(error)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object: write one "
                                f'{{"{column}": "..."}} a line')
            yield from texts_in({name: [value] for name, value in row.items()}, column, where)


def read_table(path, builder, column):
    load = quiet_datasets().load_dataset
    options = {"keep_default_na": False} if builder == "csv" else {}  # "NA" and "null" are texts
    rows = load(builder, data_files=str(path), split="train", streaming=True, **options)
    for batch in rows.iter(1000):
        yield from texts_in(batch, column, path)


def read_hub(rows, column, where):
    for batch in rows.iter(1000):
        yield from texts_in(batch, column, where)


def load_hub(name, config, column):
    """{split: generator of texts}. `datasets` downloads them and keeps them in its own cache.

    Raises UserError if the dataset cannot be loaded or has no split called train.
    """
    try:
        data = quiet_datasets().load_dataset(name, config)
    except Exception as error:  # a dozen kinds from four libraries, one advice
        raise UserError(f"cannot load the dataset {name!r}: {first_line(error)}. "
                        "Without a network: python prepare.py --train FILE or "
                        "python prepare.py toy") from error
    if "train" not in data:
        raise UserError(f"{name} has no train split, only {', '.join(data)}: "
                        "give files with --train FILE instead")
    pairs = [("train", "train"), ("val", "validation")]
    return {split: read_hub(data[key], column, name) for split, key in pairs if key in data}


def quiet_datasets():
    """The library `datasets`. It takes a second to import, and it logs what we report ourselves."""
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity(logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    return datasets


def texts_in(batch, column, where):
    """The texts of a batch {column: [value, ...]}, without None. Raises UserError."""
    if column not in batch:
        raise UserError(f"{where} has no column {column!r}, only {', '.join(batch)}: "
                        "name the column of the texts with --text_column")
    for value in batch[column]:
        if not isinstance(value, str | None):
            raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text: "
                            "name the column of the texts with --text_column")
        if value:
            yield value


def not_utf8(path, error):
    """The UserError for a file in another encoding. A byte order mark says which."""
    with open_file(path, "rb") as file:
        head = file.read(4)
    encoding = "latin1"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        encoding = "utf-32"
    text = error.object[max(0, error.start - 20) : error.start + 4]
    return UserError(f"{path} is not UTF-8, see {text}: convert it, for example with "
                     f"iconv -f {encoding} -t utf-8 {path} > utf8.txt")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class Story(dict):
    """{slot: text} of one toy story. Slots of the grammar are filled when they are asked for."""

    def __init__(self, rng, grammar, words):
        """Draws who, where and what. Giver and first name are drawn apart: only names tell."""
        self.rng, self.grammar = rng, grammar
        friends = rng.sample(words["girls"] + words["boys"], 2)
        cast = friends + rng.sample(friends, 2) + rng.sample(friends, 2)
        cast.append(rng.choice(["mom", "grandma", "dad", "grandpa"]))
        female = {*words["girls"], "mom", "grandma"}
        for slot, name in zip("ABXYGRM", cast):
            self[slot] = name
            for he, she in (("he", "she"), ("him", "her"), ("his", "her"), ("boy", "girl")):
                word = she if name in female else he
                self[f"{slot}_{he}"], self[f"{slot}_{he.title()}"] = word, word.title()
        self["place"], self["other_place"] = rng.sample(words["places"], 2)
        self["gift"], self["toy"] = rng.sample(words["objects"], 2)
        self["spot"], self["other_spot"] = rng.sample(grammar["spot"], 2)

    def __missing__(self, slot):  # str.format_map asks here for every slot that has no value yet
        self[slot] = self.rng.choice(self.grammar[slot]).format_map(self)
        return self[slot]


def toy_texts(count, seed):
    rng, grammar, words = random.Random(seed), read_asset("toy.txt"), word_lists()
    for _ in range(count):
        yield Story(rng, grammar, words)["story"]


# -------------------------------------------------------------------- texts to stories in two splits


def stories_of(texts, share, seed, notes):
    """Yields (split, story). Without a "val" in texts, a share of train is held out for it."""
    if "val" not in texts:
        yield from split_off(cleaned(texts["train"], notes), share, seed)
        return
    for split in SPLITS:
        for story in cleaned(texts[split], notes):
            yield split, story


def cleaned(texts, notes):
    """Yields the stories that are not empty. Counts in notes what a user may not expect."""
    for text in texts:
        story = text.strip()
        while story.startswith(EOT) or story.endswith(EOT):
            story = story.removeprefix(EOT).removesuffix(EOT).strip()
        notes["separators"] += story.count(EOT)
        if "\r" in story:
            notes["line ends"] += story.count("\r")
            story = story.replace("\r\n", "\n").replace("\r", "\n")
        # half of a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD
        if story:
            yield story.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_off(stories, share, seed):
    """Yields (split, story), a share of them "val".

    The hash of a story decides, so equal stories go to the same split and no list is kept. But the
    first story always trains and the next different one always validates: no split is empty.
    """
    first = second = None
    for story in stories:
        digest = hashlib.blake2b(story.encode(), digest_size=8, key=str(seed).encode()).digest()
        if first is None:
            first = digest
        elif second is None and digest != first:
            second = digest
        drawn = int.from_bytes(digest, "little") < share * 2**64
        yield "val" if digest == second or (drawn and digest != first) else "train", story


def write_jobs(path, stories):
    """Writes an arrow file with up to JOB stories a row. -> (datasets.Dataset of it, facts)

    A row is {"train": [story, ...], "val": [story, ...]}, facts is
    {split: {"stories": int, "bytes": int}}. Raises UserError if a split has no stories.
    """
    import pyarrow

    facts = {split: Counter(stories=0, bytes=0) for split in SPLITS}
    schema = pyarrow.schema({split: pyarrow.list_(pyarrow.string()) for split in SPLITS})
    stories = iter(tqdm(stories, desc="reading", unit=" stories", unit_scale=True))
    with pyarrow.ipc.new_stream(path, schema) as writer:
        while job := list(itertools.islice(stories, JOB)):
            row = {split: [story for chosen, story in job if chosen == split] for split in SPLITS}
            for split in SPLITS:
                facts[split]["stories"] += len(row[split])
                facts[split]["bytes"] += sum(len(story.encode()) for story in row[split])
            writer.write_batch(pyarrow.RecordBatch.from_pylist([row], schema))
    for split in SPLITS:
        if not facts[split]["stories"]:
            raise UserError(f"no story for the {split} split: give --train and --val files with "
                            "text in them, or at least two different stories; in .txt files "
                            f"{EOT} separates them")
    return quiet_datasets().Dataset.from_file(str(path)), facts


# --------------------------------------------- stories to tokens: datasets.map runs these functions


def count_pieces(row):
    """{"counts": JSON of {piece: how often the training stories of a row have it}}"""
    counts = Counter()
    for story in row["train"]:
        counts.update(regex.findall(PIECE, story))
    return {"counts": json.dumps(counts)}


def encode_job(row, encoding):
    """{split: the uint16 tokens of its stories, as bytes}"""
    return {split: encode(row[split], encoding).astype("<u2").tobytes() for split in SPLITS}


def encode(stories, encoding):
    """The tokens of stories, each with end-of-text behind it: (tokens,)."""
    if all(len(story) < LONG_SPACE and EOT not in story for story in stories):
        # one call for all stories takes three quarters of the time of one call each
        return encoding.encode_to_numpy("".join(s + EOT for s in stories), allowed_special="all")
    end = np.array([encoding.eot_token])
    parts = []
    for story in stories:
        parts += [encoding.encode_to_numpy(part, disallowed_special=()) for part in cut(story)]
        parts.append(end)
    return np.concatenate(parts)


def cut(story):
    """Cuts a story in very long runs of white space, on which tiktoken fails.

    PIECE ends a piece before the last character of a run that has text behind it, so that the
    tokens stay the same. Behind every run there is text: stories are stripped.
    """
    runs = regex.finditer(r"\s{2,}", story)
    ends = [run.end() - 1 for run in runs if run.end() - run.start() >= LONG_SPACE]
    return [story[start:end] for start, end in itertools.pairwise([0, *ends, len(story)])]


def on_all_cores(jobs, work, workers, path, **arguments):
    """work(row, **arguments) of every row, in the order of the rows: a Dataset, cached at path."""
    import multiprocess  # what datasets uses

    processes = min(workers, len(jobs))
    try:
        return jobs.map(work, fn_kwargs=arguments, remove_columns=jobs.column_names,
                        num_proc=processes if processes > 1 else None, desc=path.stem,
                        cache_file_name=str(path), new_fingerprint=path.stem, writer_batch_size=16)
    except multiprocess.TimeoutError as error:  # map turns Ctrl-C into this one
        raise KeyboardInterrupt from error


def frequent_pieces(rows, count):
    """The `count` most frequent pieces longer than a byte, the most frequent first."""
    counts, rare = Counter(), 0
    for row in rows:
        counts.update(json.loads(row["counts"]))
        while len(counts) > MAX_PIECES:
            rare += 1
            counts = Counter({piece: n for piece, n in counts.items() if n > rare})
    pieces = [piece for piece in counts if len(piece.encode()) > 1]
    return sorted(pieces, key=lambda piece: (-counts[piece], piece))[:count]


def write_tokens(folder, rows):
    """Writes train.bin and val.bin. -> {split: {"tokens": int, "sha256": str}}"""
    facts = {}
    for split in SPLITS:
        digest, size = hashlib.sha256(), 0
        with open(folder / f"{split}.bin", "wb") as file:
            for row in rows.select_columns([split]):
                file.write(row[split])
                digest.update(row[split])
                size += len(row[split])
        facts[split] = {"tokens": size // 2, "sha256": digest.hexdigest()}
    return facts


# ------------------------------------------------------------------------------- the command line


def main(argv=None):
    args = parse_arguments(argv)
    if args.tokenizer == "gpt2":
        load_tokenizer({"name": "gpt2"})  # a failed download is reported before the text is read
    notes = Counter()
    with unfinished(args.out) as folder:
        stories = stories_of(texts_of(args), args.val_share, args.seed, notes)
        jobs, facts = write_jobs(folder / "stories.arrow", stories)
        spec = {"name": args.tokenizer}
        if args.tokenizer == "words":
            rows = on_all_cores(jobs, count_pieces, args.workers, folder / "counting.arrow")
            spec["pieces"] = frequent_pieces(rows, args.vocab_size - 257)
        encoding = load_tokenizer(spec)
        rows = on_all_cores(jobs, encode_job, args.workers, folder / "tokenizing.arrow",
                            encoding=encoding)
        tokens = write_tokens(folder, rows)
        meta = {"tokenizer": spec, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token}
        for split in SPLITS:
            meta[split] = {"tokens": tokens[split]["tokens"], **facts[split],
                           "sha256": tokens[split]["sha256"]}
        identity = json.dumps([spec, meta["train"]["sha256"], meta["val"]["sha256"]])
        knobs = (*KNOBS[args.source], "val_share", "seed")
        source = {"kind": args.source, **{name: getattr(args, name) for name in knobs}}
        checksum = hashlib.sha256(identity.encode()).hexdigest()[:16]
        meta |= {"source": source, "checksum": checksum}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
        publish(folder, args.out)
    print_summary(meta, args, notes)


@contextmanager
def unfinished(out):
    """A folder beside out for what is not complete. It is removed at the end, and so is one that a
    killed run left."""
    folder = out.with_name(out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder, out):
    """Moves the three files. A reader finds the old data, or none, or the new data."""
    out.mkdir(exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(folder / name, out / name)


# the flags that have an effect for each kind of source
KNOBS = {"toy": ("stories",), "files": ("train", "val", "text_column"),
         "dataset": ("dataset", "config", "text_column")}


def parse_arguments(argv):
    """The command line, and in args.source the kind of source it asks for. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    add = parser.add_argument
    add("toy", nargs="?", choices=["toy"], help="write stories from the grammar in assets/toy.txt")
    add("--stories", type=int, default=50_000, help="toy: stories in both splits (50000)")
    add("--dataset", default="roneneldan/TinyStories", help="name on the Hugging Face hub, or folder")
    add("--config", help="configuration of the dataset, where it has several")
    add("--train", nargs="+", type=Path, metavar="FILE", help=", ".join(KINDS))
    add("--val", nargs="+", type=Path, metavar="FILE", help="validation files (a share of --train)")
    add("--text_column", default="text", help="column or JSON field that holds the text (text)")
    add("--val_share", type=float, default=0.01, help="share held out if there is no val (0.01)")
    add("--seed", type=int, default=0, help="of the toy stories and of the held-out share (0)")
    add("--tokenizer", choices=["gpt2", "words"], help="(gpt2; words for toy)")
    add("--vocab_size", type=int, default=10_000, help="words: bytes and end-of-text count (10000)")
    add("--out", help="folder to write (data/<name of the source>)")
    add("--force", action="store_true", help="replace existing data, once the new data are complete")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    args = parser.parse_args(argv)
    args.source = "files" if args.train else "dataset"
    if args.toy:
        args.source = "toy"
    for flag in itertools.chain(*KNOBS.values()):
        if getattr(args, flag) != parser.get_default(flag) and flag not in KNOBS[args.source]:
            raise UserError(f"--{flag} has no effect here: drop it, or see python prepare.py --help")
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    check_values(args)
    args.out = output_folder(args)
    return args


def usage_error(message):
    raise UserError(f"{message}: see python prepare.py --help")


def check_values(args):
    ranges = {"stories": (2, 10**12), "workers": (1, 1024), "vocab_size": (258, 65_536)}
    for flag, (low, high) in ranges.items():  # a token is a uint16
        value = getattr(args, flag)
        if not low <= value <= high:
            raise UserError(f"--{flag} must be between {low:,} and {high:,}, not {value:,}")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val_share must be between 0 and 1, not {args.val_share}: try 0.01")
    for path in (args.train or []) + (args.val or []):
        if not os.path.isfile(path):
            raise UserError(f"no file {path}: check the path after --train or --val")
        if not path.name.endswith(KINDS):
            raise UserError(f"{path}: unknown kind of file. Known are {', '.join(KINDS)}")


def output_folder(args):
    """The folder to write. Raises UserError if it is a file or holds data."""
    names = {"toy": "toy", "dataset": Path(os.path.abspath(args.dataset)).name.lower()}
    if args.source == "files":
        names["files"] = args.train[0].name.split(".")[0] or "files"
    out = Path(os.path.abspath(args.out or Path("data", names[args.source])))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    # token files without meta.json belong to another program, unless a killed run was moving them
    killed = out.with_name(out.name + ".tmp").exists()
    has_tokens = (out / "train.bin").exists() and not killed
    if not args.force and (has_tokens or (out / "meta.json").exists()):
        raise UserError(f"{out} already holds data: add --force to replace it or choose another "
                        "--out")
    return out


def texts_of(args):
    """{split: generator of texts}. Without a "val", a share of train is held out."""
    if args.source == "toy":
        return {"train": toy_texts(args.stories, args.seed)}
    if args.source == "dataset":
        return load_hub(args.dataset, args.config, args.text_column)
    files = {"train": args.train, "val": args.val}
    return {split: read_files(paths, args.text_column) for split, paths in files.items() if paths}


def print_summary(meta, args, notes):
    if args.tokenizer == "words" and meta["vocab_size"] < args.vocab_size:
        print(f"the text has only {meta['vocab_size'] - 257:,} different words and marks: "
              "a smaller vocabulary than asked for")
    if notes["line ends"]:
        print(f"{notes['line ends']:,} line ends CRLF or CR became LF")
    if notes["separators"]:
        print(f"warning: {notes['separators']:,} times {EOT} stands inside a text. It was kept as "
              "ordinary text and separates nothing")
    for split in SPLITS:
        form = "{0:6}{stories:,} stories, {tokens:,} tokens, {bytes:,} bytes of text"
        print(form.format(split, **meta[split]))
    print(f"vocabulary of {meta['vocab_size']:,} ({args.tokenizer}), checksum {meta['checksum']}, "
          f"in {args.out}")


def stop(number, frame):
    """Ctrl-C and SIGTERM stop the program. Its worker processes inherit this and end in silence."""
    if os.getpid() != MAIN_PROCESS:
        os._exit(1)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
