"""Turns text into tokens; the one writer and reader of data/<name>/{train.bin, val.bin, meta.json}.

python prepare.py                                            # TinyStories from the Hugging Face hub
python prepare.py --tokenizer words --vocab_size 10000       # the same with whole words as tokens
python prepare.py --dataset Skylion007/openwebtext           # another hub dataset, or a folder
python prepare.py --train a.txt b.jsonl.gz --val c.parquet   # local files; --val or a share of them
python prepare.py toy                                        # stories by assets/toy.txt, no network

In a .txt file lines that say <|endoftext|> separate the stories. A .bin file is flat little-endian
uint16, every story followed by the end-of-text token. meta.json is written last: where it is, the
data are complete.
"""

import signal

if __name__ == "__main__":  # until script() takes over Ctrl-C just ends: nothing to tidy up yet
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there two of these programs writing one folder are not kept apart
    fcntl = None

import numpy as np
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
SPLITS = ("train", "val")
JOB = 128  # stories: 0.1 MB of TinyStories, 0.6 MB of web pages; sending that costs next to nothing
MAX_PIECES = 4_000_000  # different pieces counted before the rarest are forgotten: about half a GB
# how GPT-2 cuts text before merging: contractions, words with their leading space, numbers, ...
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
ASSETS = Path(__file__).resolve().parent / "assets"
STOPS = (signal.SIGINT, signal.SIGTERM)


class UserError(ValueError):
    """Something that the user can mend: scripts print its message, one line, and no traceback.

    It stands here because prepare.py needs it too, and must not wait for torch in every worker.
    """


def one_line(error):
    """An exception's reason; without a path, where the system gives one: our messages name it."""
    reason = getattr(error, "strerror", None) or str(error)
    return " ".join(reason.split())[:300] or type(error).__name__


# ------------------------------------------------------------------ what every other program uses


def load_meta(folder):
    """meta.json of a prepared folder, every field there and of its type. Raises UserError.

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
        complete = has_all_fields(meta)
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except (ValueError, RecursionError, KeyError, TypeError):  # no JSON, or other JSON than ours
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: run prepare.py again with --out {folder} --force")
    return meta


def has_all_fields(meta):
    """Whether all fields hold what `write` puts there; KeyError or TypeError: they do not."""
    spec, size = meta["tokenizer"], 50_257  # GPT-2's; end-of-text is always the last token
    texts, counts = [spec["name"], meta["checksum"]], []
    if spec["name"] == "words":  # the 256 bytes, the pieces, end-of-text
        size = 257 + len(spec["pieces"])
        texts += spec["pieces"]
    for split in SPLITS:
        texts.append(meta[split]["sha256"])
        counts += [meta[split][name] for name in ("tokens", "stories", "bytes")]
    counts += [meta["vocab_size"], meta["eot"]]
    return (spec["name"] in ("gpt2", "words") and isinstance(meta["source"], dict)
            and counts[-2:] == [size, size - 1] and size <= 65_536
            and all(isinstance(text, str) for text in texts)
            and all(type(count) is int and 0 < count < 2**63 for count in counts))  # no bool


def load_tokens(folder, split):
    """The tokens of "train" or "val": uint16 (tokens,), read-only, mapped from disk, not loaded.

    Reads the file once, a second a gigabyte. Raises UserError if it is not the one in meta.json.
    """
    path, promised = Path(folder) / f"{split}.bin", load_meta(folder)[split]
    advice = f"run prepare.py again with --out {folder} --force"
    try:
        size, expected = path.stat().st_size if path.exists() else 0, 2 * promised["tokens"]
        if size != expected:
            raise UserError(f"{path} has {size:,} bytes where meta.json promises {expected:,}: "
                            f"{advice}")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != promised["sha256"]:
            raise UserError(f"{path} is damaged, its sha256 is not that of meta.json: {advice}")
        return np.memmap(path, dtype="<u2", mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def load_tokenizer(spec):
    """The tiktoken.Encoding of a spec: meta["tokenizer"], or a checkpoint's copy of it.

    Raises UserError if it is no such spec, or if the files of GPT-2's tokenizer cannot be had.
    """
    name = spec.get("name") if isinstance(spec, dict) else None
    if name == "words":
        # ids: the 256 bytes, then the pieces from frequent to rare, then end-of-text. tiktoken
        # looks a piece up whole and otherwise merges its bytes into what there is, lowest id first,
        # so that any text can be written.
        try:
            tokens = [bytes([byte]) for byte in range(256)]
            tokens += [piece.encode() for piece in spec["pieces"]]
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
            raise UserError(f"the words of the tokenizer are damaged: {one_line(error)}") from error
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("words", pat_str=PIECE, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)})
    if name != "gpt2":
        raise UserError(f"unknown tokenizer {name!r}: "
                        "run prepare.py with --tokenizer gpt2 or words")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a proxy's error page, a damaged cache: one advice
        raise UserError(f"cannot get the GPT-2 tokenizer ({type(error).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder with its two BPE files, or use "
                        "--tokenizer words, which needs no download") from error


def word_lists():
    """The lists of assets/words.txt, {name: [word, ...]}. Raises UserError if one is missing."""
    lists = {name: " ".join(rows).split() for name, rows in read_asset("words.txt").items()}
    for name in ("girls", "boys", "more_girls", "more_boys", "places", "objects"):
        if name not in lists:
            raise UserError(f"{ASSETS / 'words.txt'} is damaged: it has no {name}")
    return lists


def read_asset(name):
    """{slot: [ways to write it]} of a file that has a slot and a way to write it in every row.

    A # begins a comment, | separates two ways, ¶ is a new line. Raises UserError.
    """
    path, ways = ASSETS / name, {}
    try:
        for row in path.read_text(encoding="utf-8-sig").splitlines():
            if row.strip() and not row.startswith("#"):
                slot, text = row.split(maxsplit=1)
                ways.setdefault(slot, []).extend(text.replace("¶", "\n").split("|"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {one_line(error)}") from error
    return ways


def lock_folder(folder, busy):
    """Makes a folder, parents too, and locks it. -> file descriptor, or None on Windows.

    The system releases the lock when the descriptor is closed, or when its owner dies. Raises
    UserError(busy) if another process holds it, and UserError if the folder cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)  # it is there after a run that was killed
        if fcntl is None:
            return None
        lock = os.open(folder, os.O_RDONLY)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"cannot write {folder} ({one_line(error)}): "
                        "choose another --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(busy) from None
    except OSError:
        pass  # some network file systems cannot lock: there nobody is kept apart
    return lock


# ------------- where texts come from: every source yields (where it stands, text) and keeps nothing


def read_files(paths, column):
    """.txt, .jsonl and .parquet files, each also .gz. Raises UserError on what cannot be read."""
    for path in paths:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                if kind == "parquet":
                    yield from read_parquet(file, path, column)
                elif kind == "jsonl":
                    yield from read_jsonl(file, path, column)
                else:
                    yield from read_txt(file, path)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {one_line(error)}") from error


def read_txt(file, path):
    story = []
    for number, line in read_lines(file, path):
        if line.strip() == EOT:
            yield f"{path}: line {number}", "".join(story)
            story = []
        else:
            story.append(line)
    yield f"{path}: its end", "".join(story)


def read_jsonl(file, path, column):
    for number, line in read_lines(file, path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, 6,000 digits, 200,000 brackets
            raise UserError(f"{where} is not a JSON object that can be read ({one_line(error)}): "
                            "mend it or take it out") from error
        if not isinstance(row, dict) or column not in row:
            raise UserError(f"{where} is not a JSON object with {column!r} in it: "
                            "name the field of the text with --text_column")
        yield where, row[column]


def read_lines(file, path):
    """Yields (number, line). Decodes bytes: line ends stay, and a bad byte can be located."""
    offset = 0
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, number, offset + error.start) from error
        yield number, line
        offset += len(raw)


def read_parquet(file, path, column):
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        check_column(path, column, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            for number, value in enumerate(batch.column(0), number + 1):
                yield f"{path}: row {number}", value.as_py()
    except UnicodeDecodeError as error:
        raise not_utf8(path, number, error.start) from error
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def not_utf8(path, number, byte):
    return UserError(f"{path}: line or row {number} is not UTF-8 (byte {byte:,}): convert the "
                     "file, for example with iconv -f latin1 -t utf-8")


def load_hub(dataset, config, column):
    """{split: function that starts an iterator over its texts}; `datasets` keeps them on disk.

    Raises UserError if the dataset cannot be had, or has no train split or no such column.
    """
    import datasets
    import huggingface_hub

    datasets.logging.set_verbosity_error()  # a failed download is one line, not one line a retry
    huggingface_hub.logging.set_verbosity_error()
    try:
        data = datasets.load_dataset(dataset, config)
    except Exception as error:  # a dozen kinds from four libraries; the advice is the same
        raise UserError(f"cannot load the dataset {dataset!r}: {one_line(error)}. "
                        "Without a network: python prepare.py --train FILE or "
                        "python prepare.py toy") from error
    if "train" not in data:
        raise UserError(f"{dataset} has no train split, only {', '.join(data)}: "
                        "give files with --train FILE instead")
    texts = {}
    for split, name in (("train", "train"), ("val", "validation")):
        if name in data:
            check_column(dataset, column, data[name].column_names)
            rows = data[name].select_columns([column])
            texts[split] = partial(read_hub, rows, column, f"{dataset}, split {name}")
    return texts


def read_hub(rows, column, where):
    number = 0
    for batch in rows.iter(1000):
        for number, value in enumerate(batch[column], number + 1):
            yield f"{where}: row {number}", value


def check_column(where, column, names):
    if column not in names:
        raise UserError(f"{where} has no column {column!r}, only {', '.join(names)}: "
                        "name the text with --text_column")


def stories_of(texts, val_share, seed):
    """Yields (split, story). If val has no texts of its own, it gets a share of train's."""
    if "val" not in texts:
        yield from split_off(cleaned(texts["train"]()), val_share, seed)
        return
    for split in texts:
        for story in cleaned(texts[split]()):
            yield split, story


def cleaned(texts):
    """(where, text) -> stories: stripped, UTF-8, not empty. Raises UserError if a text is none."""
    for where, text in texts:
        if not isinstance(text, str | None):
            raise UserError(f"{where}: {type(text).__name__} where text should be: "
                            "name the column of texts with --text_column")
        # half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD
        pairs = (text or "").strip().encode("utf-16", "surrogatepass")
        story = pairs.decode("utf-16", "replace")
        if story:
            yield story


def split_off(stories, share, seed):
    """Yields (split, story), a share of them "val".

    A story's own hash decides, so its duplicates go the same way and no list is kept; but the first
    always trains and the next that differs always validates, so that neither side is ever empty.
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


class Story(dict):
    """{slot: text} of one toy story. Slots of the grammar are filled when they are asked for."""

    def __init__(self, rng, grammar, words):
        """Casts who, where, what. Who comes first and who gives are drawn apart: the names tell."""
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
    """Stories of assets/toy.txt. Raises UserError if that file or assets/words.txt is damaged."""
    rng, grammar, words = random.Random(seed), read_asset("toy.txt"), word_lists()
    for number in range(1, count + 1):
        try:
            text = Story(rng, grammar, words)["story"]
        except (ValueError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"{ASSETS / 'toy.txt'} or words.txt is damaged: "
                            f"{type(error).__name__}: {one_line(error)}") from error
        yield f"toy story {number}", text


# ------- stories -> jobs -> all cores -> results in the order of the jobs, however many workers


def start_worker(spec):
    global encoding
    encoding = spec and load_tokenizer(spec)
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, and stops its workers
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A parent that was killed cannot stop its workers: they wait for its end themselves."""
    multiprocessing.parent_process().join()
    os._exit(1)


def count_pieces(job):
    """[(split, story), ...] -> Counter of the pieces of its training stories."""
    import regex

    pattern, counts = regex.compile(PIECE), Counter()
    for split, story in job:
        if split == "train":
            counts.update(pattern.findall(story))
    return counts


def encode_stories(job):
    """[(split, story), ...] -> {split: (uint16 tokens as bytes, stories, UTF-8 bytes of text)}."""
    encoded = {}
    for split in SPLITS:
        stories = [story for chosen, story in job if chosen == split]
        text = "".join(story + EOT for story in stories)
        if text.count(EOT) == len(stories):  # one call for all: a quarter faster, the same tokens
            tokens = encoding.encode_to_numpy(text, allowed_special="all")
        else:  # a story that itself says <|endoftext|>: there it is ordinary text
            parts = [[*encoding.encode_ordinary(story), encoding.eot_token] for story in stories]
            tokens = np.concatenate(parts)
        size = len(text.encode()) - len(EOT) * len(stories)
        encoded[split] = tokens.astype("<u2").tobytes(), len(stories), size
    return encoded


def on_all_cores(work, corpus, spec, workers, title):
    """Yields work(job) in order. Reads a few jobs ahead; Pool.imap would read the whole corpus.

    Whoever stops early must close it, then its workers end. Raises UserError if one is killed.
    """
    with tqdm(corpus(), desc=title, unit=" stories", unit_scale=True) as bar:
        stories = iter(bar)
        jobs = iter(lambda: list(itertools.islice(stories, JOB)), [])
        first = list(itertools.islice(jobs, 2))
        jobs = itertools.chain(first, jobs)
        if workers == 1 or len(first) < 2:  # not worth starting processes
            start_worker(spec)
            yield from map(work, jobs)
            return
        # "spawn": a fork copies whatever locks the threads of pyarrow and tqdm hold at that moment
        spawn = multiprocessing.get_context("spawn")
        pool, waiting = ProcessPoolExecutor(workers, spawn, start_worker, (spec,)), deque()
        try:
            for job in jobs:
                with uninterrupted():  # the first ones start the processes
                    waiting.append(pool.submit(work, job))
                if len(waiting) == 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker process was killed, probably for lack of memory: "
                            f"use fewer, for example --workers {workers // 2}") from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def uninterrupted():
    """A stop signal that comes in this block takes effect after it, and no process that is started
    in it gets a Ctrl-C."""
    came, handlers = [], [signal.getsignal(number) for number in STOPS]
    for number in STOPS:
        signal.signal(number, lambda number, frame: came.append(number))
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if masks:  # for new processes, which inherit it; in this one another thread may take the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(STOPS, handlers):
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def frequent_pieces(corpus, count, workers):
    """The `count` most frequent pieces of train longer than a byte, the most frequent first."""
    counts, rare = Counter(), 0
    with closing(on_all_cores(count_pieces, corpus, None, workers, "counting words")) as results:
        for found in results:
            counts.update(found)
            while len(counts) > MAX_PIECES:
                rare += 1
                counts = Counter({piece: n for piece, n in counts.items() if n > rare})
    pieces = [piece for piece in counts if len(piece.encode()) > 1]
    return sorted(pieces, key=lambda piece: (-counts[piece], piece))[:count]


@contextmanager
def unfinished(out):
    """A folder beside out, of this process alone, for what is not complete. It is removed again."""
    folder = out.with_name(out.name + ".tmp")
    busy = f"another prepare.py is at work in {folder}: wait for it or choose another --out"
    lock = lock_folder(folder, busy)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def write(folder, out, corpus, spec, workers, source):
    """Writes the three files into folder and, when all are complete, moves them to out. -> meta

    Raises UserError if a split has no stories, and if the disk takes no more.
    """
    tokenizer = load_tokenizer(spec)
    meta = {"tokenizer": spec, "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token}
    try:
        meta |= write_tokens(folder, corpus, spec, workers)
        identity = json.dumps([spec, meta["train"]["sha256"], meta["val"]["sha256"]])
        checksum = hashlib.sha256(identity.encode()).hexdigest()[:16]
        meta |= {"source": source, "checksum": checksum}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
        with uninterrupted():
            out.mkdir(exist_ok=True)
            (out / "meta.json").unlink(missing_ok=True)  # a reader shall find nothing, no mixture
            for name in ("train.bin", "val.bin", "meta.json"):
                os.replace(folder / name, out / name)
    except OSError as error:
        raise UserError(f"cannot write {out}: {one_line(error)}: "
                        "free some space or choose another --out") from error
    return meta


def write_tokens(folder, corpus, spec, workers):
    """Writes train.bin and val.bin. -> {split: {"tokens", "stories", "bytes", "sha256"}}"""
    facts = {split: {"tokens": 0, "stories": 0, "bytes": 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    with (open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val,
          closing(on_all_cores(encode_stories, corpus, spec, workers, "tokenizing")) as results):
        for encoded in results:
            for split, file in (("train", train), ("val", val)):
                tokens, stories, size = encoded[split]
                file.write(tokens)
                digests[split].update(tokens)
                facts[split]["tokens"] += len(tokens) // 2
                facts[split]["stories"] += stories
                facts[split]["bytes"] += size
    for split in SPLITS:
        if not facts[split]["stories"]:
            raise UserError(f"no story for the {split} split: give --train and --val files with "
                            "text in them, or at least two different stories; in .txt files lines "
                            f"that say {EOT} separate them")
        facts[split]["sha256"] = digests[split].hexdigest()
    return facts


# --------------------------------------------------------------------------------- the command line

KNOBS = {"toy": ("stories",), "files": ("train", "val", "text_column"),
         "dataset": ("dataset", "config", "text_column")}  # flags that fit each kind of source


def main(argv=None):
    args = parse_arguments(argv)
    out = output_folder(args)
    if args.tokenizer == "gpt2":
        load_tokenizer({"name": "gpt2"})  # if this download fails, then before that of the text

    with unfinished(out) as folder:
        # called, it gives a fresh iterator over (split, story): the words tokenizer needs two
        corpus = partial(stories_of, texts_of(args), args.val_share, args.seed)
        spec = {"name": args.tokenizer}
        if args.tokenizer == "words":
            spec["pieces"] = frequent_pieces(corpus, args.vocab_size - 257, args.workers)
        knobs = (*KNOBS[args.source], "val_share", "seed")
        source = {"kind": args.source, **{name: getattr(args, name) for name in knobs}}
        meta = write(folder, out, corpus, spec, args.workers, source)
    print_summary(meta, out, args)


def parse_arguments(argv):
    """The command line, and in args.source which kind of source it asks for. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    add = parser.add_argument
    add("toy", nargs="?", choices=["toy"], help="write stories from the grammar in assets/toy.txt")
    add("--stories", type=int, default=50_000, help="toy: how many, those of val included (50000)")
    add("--dataset", default="roneneldan/TinyStories", help="on the Hugging Face hub, or a folder")
    add("--config", help="configuration of the dataset, where it has several")
    add("--train", nargs="+", type=Path, metavar="FILE", help=".txt, .jsonl, .parquet, also .gz")
    add("--val", nargs="+", type=Path, metavar="FILE", help="validation files (a share of --train)")
    add("--text_column", default="text", help="column or JSON field that holds the text (text)")
    add("--val_share", type=float, default=0.01, help="share for val if it has no files (0.01)")
    add("--seed", type=int, default=0, help="of the toy stories and of the share for val (0)")
    add("--tokenizer", choices=["gpt2", "words"], help="(gpt2; words for toy)")
    add("--vocab_size", type=int, default=10_000, help="words: with 256 bytes, end-of-text (10000)")
    add("--out", help="folder to write (data/<name of the source>)")
    add("--force", action="store_true", help="replace what is there, once the new is complete")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (one per core)")
    args = parser.parse_args(argv)

    args.source = "files" if args.train else "dataset"
    if args.toy:
        args.source = "toy"
    for flag in itertools.chain.from_iterable(KNOBS.values()):
        if getattr(args, flag) != parser.get_default(flag) and flag not in KNOBS[args.source]:
            raise UserError(f"--{flag} has no effect here: drop it, or see what goes together with "
                            "python prepare.py --help")
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    if args.tokenizer == "gpt2" and args.vocab_size != parser.get_default("vocab_size"):
        raise UserError("--vocab_size has no effect on the GPT-2 tokenizer: "
                        "drop it or add --tokenizer words")
    check_values(args)
    return args


def usage_error(message):
    raise UserError(f"{message}: see python prepare.py --help")


def check_values(args):
    ranges = {"stories": (2, 10**12), "seed": (-2**63, 2**63 - 1), "workers": (1, 1024),
              "vocab_size": (258, 65_536)}  # ids are uint16
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if not low <= value <= high:
            raise UserError(f"--{flag} must lie between {low:,} and {high:,}, not {value:,}")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val_share must lie between 0 and 1, not {args.val_share}: try 0.01")
    for path in (args.train or []) + (args.val or []):
        if not os.path.isfile(path):
            raise UserError(f"no file {path}: check the path after --train or --val")
        if Path(path.name.removesuffix(".gz")).suffix not in (".txt", ".jsonl", ".parquet"):
            raise UserError(f"{path}: unknown kind of file: rename it to .txt, .jsonl or .parquet, "
                            "each also with .gz")


def output_folder(args):
    """The folder to write, absolute. Raises UserError if there is none or it holds data already."""
    name = args.source  # of the default folder
    if args.source == "files":
        name = args.train[0].name.split(".")[0] or name
    if args.source == "dataset":
        name = Path(os.path.abspath(args.dataset)).name.lower() or name
    chosen = os.path.join("data", name) if args.out is None else args.out
    out = Path(os.path.abspath(chosen))
    here = Path.cwd()
    if not chosen or out in (here, *here.parents):  # the files would lie among others
        raise UserError(f"--out {chosen!r} names no folder of its own: "
                        "choose one, such as data/mine")
    if os.path.exists(out) and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    # token files without meta.json are somebody else's, unless a run of ours was killed moving them
    killed = os.path.exists(out.with_name(out.name + ".tmp"))
    has_tokens = os.path.exists(out / "train.bin") and not killed
    if not args.force and (has_tokens or os.path.exists(out / "meta.json")):
        raise UserError(f"{out} already holds data: "
                        "add --force to replace it or choose another --out")
    return out


def texts_of(args):
    """{split: function that starts an iterator over its texts}; no "val" means a share of train."""
    if args.source == "toy":
        return {"train": partial(toy_texts, args.stories, args.seed)}
    if args.source == "dataset":
        return load_hub(args.dataset, args.config, args.text_column)
    texts = {"train": partial(read_files, args.train, args.text_column)}
    if args.val:
        texts["val"] = partial(read_files, args.val, args.text_column)
    return texts


def print_summary(meta, out, args):
    lines = []
    if args.tokenizer == "words" and meta["vocab_size"] < args.vocab_size:
        lines.append(f"the text has only {meta['vocab_size'] - 257:,} different words and marks: "
                     "a smaller vocabulary than asked for")
    form = "{0:6}{stories:,} stories, {tokens:,} tokens, {bytes:,} bytes of text"
    lines += [form.format(split, **meta[split]) for split in SPLITS]
    lines.append(f"vocabulary of {meta['vocab_size']:,} ({args.tokenizer}), "
                 f"checksum {meta['checksum']}, in {out}")
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:  # a closed pipe, a full disk; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"cannot write the output ({one_line(error)}), but the data in {out} are "
                        "complete") from error


def script():
    """`python prepare.py`: as config.cli, without torch. A mistake is one line and exit code 1."""
    for number in STOPS:
        signal.signal(number, interrupt)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may not be ASCII
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: what was not complete is removed") from None


def interrupt(number, frame):
    """Ctrl-C and SIGTERM end in the same way; a second one kills at once."""
    for either in STOPS:
        signal.signal(either, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    script()
