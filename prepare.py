"""Turns text into tokens: writes and reads data/<name>/{train.bin, val.bin, meta.json}.

python prepare.py                                            # TinyStories from the Hugging Face hub
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
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
# how GPT-2 cuts text before it merges bytes: words with their leading space, numbers, white space
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
LONG_SPACE = 100_000  # characters of white space in a row; tiktoken fails at a million
HE, SHE = "he him his boy He Him His Boy".split(), "she her her girl She Her Her Girl".split()


class UserError(ValueError):
    """A mistake that the user can fix. Scripts print its message, one line, without a traceback."""


def cli(main, errors=(UserError,)):
    """Run a script's main(). What the user can fix, one of errors, is one line on stderr and exit
    code 1; every other exception is a bug and keeps its traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: files are removed
    try:
        main()
    except errors as error:
        raise SystemExit(f"error: {error}") from None
    except ModuleNotFoundError as error:  # an optional package, such as wandb or transformers
        raise SystemExit(f"error: {error}: pip install {error.name}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


@contextmanager
def locked(folder):
    """Makes a folder and keeps other processes out while the block runs. Raises UserError."""
    with ExitStack() as stack:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if os.name != "nt":  # Windows has no such lock
                import fcntl
                stack.callback(os.close, handle := os.open(folder, os.O_RDONLY))
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"cannot lock {folder}, maybe another process is writing it: {error}")
        stack.callback(lambda: os.listdir(folder) or os.rmdir(folder))  # no empty folder is left
        yield


def load_meta(folder):
    """meta.json of a prepared folder. Raises UserError if there is none.

    {"tokenizer": {"name": "gpt2"} or {"name": "words", "pieces": [str, ...]}, "vocab_size": int,
     "eot": int, the id of the end-of-text token, "source": dict, "checksum": str, of all tokens,
     "train", "val": {"tokens", "stories", "bytes" (UTF-8, of text): int, "sha256": str}}
    """
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"no prepared data in {folder}: set --data, or see prepare.py --help")
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged: run prepare.py again with --force")


def load_tokens(folder, split):
    """The tokens of "train" or "val": uint16 (tokens,), mapped from disk. Raises UserError."""
    path, expected = Path(folder) / f"{split}.bin", load_meta(folder)[split]["sha256"]
    with suppress(OSError, ValueError):  # no file, or not a whole number of tokens
        tokens = np.memmap(path, dtype="<u2", mode="r")
        if hashlib.sha256(tokens).hexdigest() == expected:  # a second per gigabyte
            return tokens
    raise UserError(f"{path} is damaged or missing: run prepare.py again with --force")


def load_tokenizer(spec):
    """The tiktoken.Encoding of meta["tokenizer"]. Raises UserError."""
    if spec["name"] == "words":
        # Ids: the 256 bytes, the pieces from frequent to rare, end-of-text. tiktoken looks up the
        # whole piece, or else merges its bytes, lowest id first: every text can be encoded.
        tokens = [bytes([byte]) for byte in range(256)] + [p.encode() for p in spec["pieces"]]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("words", pat_str=PIECE, mergeable_ranks=ranks,
                                 special_tokens={EOT: len(ranks)})
    try:
        return tiktoken.get_encoding(spec["name"])
    except Exception as error:  # no network, a proxy's error page, a damaged cache: same advice
        raise UserError(f"cannot load the tokenizer {spec['name']} ({type(error).__name__}): use "
                        "--tokenizer words or set TIKTOKEN_CACHE_DIR to a folder with its files")


def require_tokenizer(name, vocab_size, folder):
    """Raises UserError unless a model of Hugging Face with this vocabulary has the tokenizer of
    prepared data: both write all tokens alike, and encode that text and some of the data alike."""
    from transformers import AutoTokenizer

    meta = load_meta(folder)
    ours = load_tokenizer(meta["tokenizer"])
    ids = [*range(ours.eot_token), *load_tokens(folder, "val")[:10_000].tolist()]
    text = ours.decode(ids)
    try:
        theirs = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged file can raise almost any exception
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load the tokenizer of {name}: {reason}") from None
    same = (vocab_size == meta["vocab_size"]
            and theirs.decode(ids, clean_up_tokenization_spaces=False) == text
            and theirs.encode(text, verbose=False) == ours.encode(text, allowed_special="all"))
    if not same:
        raise UserError(f"{name} has no tokenizer, or another one than {folder}: give data of its "
                        f"tokenizer with --data")


def word_lists():
    """The lists of assets/words.txt, {name: [word, ...]}."""
    return {name: " ".join(lines).split() for name, lines in read_asset("words.txt").items()}


def read_asset(name):
    """{slot: [text, ...]} of a file with lines "slot text|text": ¶ is a new line, # a comment."""
    texts = {}
    for line in (Path(__file__).with_name("assets") / name).read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            slot, text = line.split(maxsplit=1)
            texts.setdefault(slot, []).extend(text.replace("¶", "\n").split("|"))
    return texts


class Story(dict):
    """{slot: text} of one toy story. Slots of the grammar are filled when they are asked for."""

    def __init__(self, rng, grammar, words):  # assets/toy.txt explains the slots
        self.rng, self.grammar = rng, grammar
        friends = rng.sample(words["girls"] + words["boys"], 2)
        cast = friends + rng.sample(friends, 2) + rng.sample(friends, 2)
        cast.append(rng.choice(["mom", "grandma", "dad", "grandpa"]))
        for slot, name in zip("ABXYGRM", cast):
            pronouns = SHE if name in [*words["girls"], "mom", "grandma"] else HE
            self[slot] = name
            self.update((f"{slot}_{he}", word) for he, word in zip(HE, pronouns))
        self["place"], self["other_place"] = rng.sample(words["places"], 2)
        self["gift"], self["toy"] = rng.sample(words["objects"], 2)
        self["spot"], self["other_spot"] = rng.sample(grammar["spot"], 2)

    def __missing__(self, slot):  # str.format_map asks here for every slot that has no value yet
        self[slot] = self.rng.choice(self.grammar[slot]).format_map(self)
        return self[slot]


def read_txt(path):
    """The texts of a file between separators."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    text = ""
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        while characters := file.read(2**22):
            *texts, text = (text + characters).split(EOT)
            yield from texts
    yield text


def texts_in(source, column):
    """The texts of a path, of a table of the datasets package, or of a generator of texts."""
    if isinstance(source, Path):
        kind = Path(source.name.lower().removesuffix(".gz")).suffix[1:]
        kind = {"jsonl": "json", "ndjson": "json"}.get(kind, kind)
        if kind not in ("json", "csv", "parquet"):
            return read_txt(source)
        from datasets import load_dataset
        options = {"split": "train", "streaming": True}
        if kind == "csv":  # numbers and "NA" are text, too
            options |= {"keep_default_na": False, "converters": {column: str}}
        source = load_dataset(kind, data_files=glob.escape(str(source)), **options)
    batches = source.iter(1000) if hasattr(source, "iter") else [{column: source}]
    return (text for batch in batches for text in batch[column] if text)


def texts_of(args):
    """Yields (split, text). split is None if a share of train is for val. Raises UserError."""
    source, train, val = args.dataset, args.train, args.val
    try:
        if args.toy:
            rng, grammar, words = random.Random(args.seed), read_asset("toy.txt"), word_lists()
            train = [(Story(rng, grammar, words)["story"] for _ in range(args.stories))]
        elif not train:
            from datasets import load_dataset
            data = load_dataset(args.dataset, args.config)
            train = [data["train"]]
            val = val or [data[name] for name in data if name == "validation"]
        for split, sources in ("train" if val else None, train), ("val", val):
            for source in sources:
                for text in texts_in(source, args.text_column):
                    yield split, text.strip()
    except Exception as error:  # datasets and the readers of files have many
        hints = {KeyError: "no such split or column, see --text_column",
                 AttributeError: "a row holds no text, see --text_column",
                 UnicodeDecodeError: "not UTF-8, convert it with iconv",
                 ConnectionError: "without a network try --train FILE or toy"}
        reason = " ".join(f"{source} ({type(error).__name__}: {error.__cause__ or error})".split())
        raise UserError(f"cannot read {reason}: {hints.get(type(error), 'see --help')}")


def stories_of(args, warnings):
    """Yields (split, story). Counts in warnings what the user should know, {message: count}.
    The hash of a story decides if it is held out, so equal stories go to the same split. But the
    first story always trains and the next different one always validates: no split is empty."""
    key, limit = str(args.seed).encode(), args.val_share * 2**64
    fixed = {}  # {digest: split}
    for split, story in tqdm(texts_of(args), unit=" texts", unit_scale=True):
        while story.startswith(EOT) or story.endswith(EOT):
            story = story.removeprefix(EOT).removesuffix(EOT).strip()
        warnings[f"times {EOT} stands inside a text; there it is ordinary text"] += story.count(EOT)
        warnings["line ends CRLF or CR became LF"] += story.count("\r")
        story = story.replace("\r\n", "\n").replace("\r", "\n")
        digest = hashlib.blake2b(story.encode(), digest_size=8, key=key).digest()
        drawn = "val" if int.from_bytes(digest, "little") < limit else "train"
        if story:
            if len(fixed) < 2:
                fixed.setdefault(digest, "val" if fixed else "train")
            yield split or fixed.get(digest, drawn), story


def frequent_pieces(stories, count):
    """The `count` most frequent pieces longer than a byte, the most frequent first."""
    pieces = Counter()
    for split, story in stories:
        if split == "train":
            pieces.update(regex.findall(PIECE, story))
    longer = [piece for piece in pieces if len(piece.encode()) > 1]
    return sorted(longer, key=lambda piece: (-pieces[piece], piece))[:count]


def encode(batch, encoding):
    """[(split, story), ...] -> the tokens of each story. A separator inside it is ordinary text."""
    stories = [story for split, story in batch]
    text = EOT.join([*stories, ""])
    if text.count(EOT) == len(stories) and max(map(len, stories)) < LONG_SPACE:
        # one call for all: the threads wait less for each other
        tokens = encoding.encode_to_numpy(text, allowed_special="all").astype("<u2")
        return np.split(tokens, np.flatnonzero(tokens == encoding.eot_token)[:-1] + 1)
    # PIECE ends a piece before the last character of white space: a cut there changes no token
    cut, done = rf"(?=\s\S)(?<=\s{{{LONG_SPACE}}})", []
    for story in stories:
        tokens = sum(map(encoding.encode_ordinary, regex.split(cut, story)), [])
        done.append(np.array([*tokens, encoding.eot_token], "<u2"))
    return done


def write_tokens(folder, stories, encoding):
    """Writes train.bin and val.bin. -> {split: its entry in meta.json}. Raises UserError."""
    batches = iter(lambda: list(itertools.islice(stories, 128)), [])
    facts = {"train": Counter(), "val": Counter()}
    with (open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val,
          ThreadPoolExecutor(os.cpu_count()) as pool):  # tiktoken releases the GIL
        jobs = ((batch, pool.submit(encode, batch, encoding)) for batch in batches)
        waiting = list(itertools.islice(jobs, 64))  # memory is limited
        while waiting:
            batch, job = waiting.pop(0)
            for (split, story), tokens in zip(batch, job.result()):
                (train if split == "train" else val).write(tokens)
                facts[split].update(tokens=len(tokens), stories=1, bytes=len(story.encode()))
            waiting += itertools.islice(jobs, 1)
    for split, counts in facts.items():
        if not counts["stories"]:
            raise UserError(f"no story for {split}: give two different ones, separated by {EOT}")
        tokens = np.memmap(folder / f"{split}.bin", mode="r")
        counts["sha256"] = hashlib.sha256(tokens).hexdigest()
    return facts


class Parser(argparse.ArgumentParser):
    """An argparse parser of this project: a mistake is one line, flags cannot be abbreviated."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)

    def error(self, message):
        raise UserError(message)


def parse_arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("toy", nargs="?", choices=["toy"], help="write stories from the grammar in assets/toy.txt")
    add("--dataset", default="roneneldan/TinyStories", help="name on the hub, or a folder")
    add("--train", nargs="+", type=Path, metavar="FILE", default=[], help="local files, also .gz")
    add = parser.add_argument
    add("--val", nargs="+", type=Path, metavar="FILE", default=[], help="else a share of --train")
    add("--val_share", type=float, default=0.01, help="share to validate on without --val (0.01)")
    add("--stories", type=int, default=50_000, help="toy: stories in both splits (50000)")
    add("--config", help="configuration of the dataset, where it has several")
    add("--text_column", default="text", help="column or JSON field that holds the text (text)")
    add("--seed", type=int, default=0, help="of the toy stories and of the share for val (0)")
    add("--tokenizer", choices=["gpt2", "words"], help="(gpt2; for toy: words)")
    add("--vocab_size", type=int, default=10_000, help="for words: total, with all bytes (10000)")
    add("--out", type=Path, help="folder to write (data/<name of the source>)")
    add("--force", action="store_true", help="replace existing data, once the new are complete")
    args = parser.parse_args(argv)
    if not 258 <= args.vocab_size <= 65_536:  # at least a word; a token is a uint16
        parser.error("--vocab_size must be between 258 and 65,536")
    if not 0 <= args.val_share < 1:
        parser.error("--val_share must be a share: at least 0 and below 1")
    for path in args.train + args.val:
        if not path.is_file():
            parser.error(f"no file {path}")
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    source = args.toy or [*args.train, args.dataset.lower()][0]
    args.out = args.out or Path("data", Path(source).name.split(".")[0])
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if not args.force and (args.out / "meta.json").exists():
        raise UserError(f"{args.out} already holds data: add --force or choose another --out")
    spec, warnings = {"name": args.tokenizer}, Counter()
    with locked(args.out), tempfile.TemporaryDirectory(dir=args.out, prefix="unfinished") as folder:
        for stale in {*args.out.glob("unfinished*")} - {Path(folder)}:  # of a killed run
            shutil.rmtree(stale)
        if args.tokenizer == "words":
            spec["pieces"] = frequent_pieces(stories_of(args, Counter()), args.vocab_size - 257)
        encoding = load_tokenizer(spec)
        meta = {"tokenizer": spec, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                **write_tokens(Path(folder), stories_of(args, warnings), encoding)}
        identity = [spec, meta["train"]["sha256"], meta["val"]["sha256"]]
        checksum = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        meta |= {"source": vars(args), "checksum": checksum}
        Path(folder, "meta.json").write_text(json.dumps(meta, indent=1, default=str))
        (args.out / "meta.json").unlink(missing_ok=True)  # a reader never finds a mixture
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(Path(folder, name), args.out / name)
    for message, count in warnings.items():
        if count:
            print(f"warning: {count:,} {message}")
    for split in ("train", "val"):
        print("{0:6}{stories:,} stories, {tokens:,} tokens".format(split, **meta[split]))
    print("vocabulary of {vocab_size:,}, checksum {checksum}, in {0}".format(args.out, **meta))


if __name__ == "__main__":
    cli(main)
