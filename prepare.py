"""
Turns text into tokens. The only writer, and the only reader, of data/<name>/{train.bin, val.bin, meta.json}.

python prepare.py                                            # TinyStories from the Hugging Face hub, GPT-2 tokens
python prepare.py --tokenizer words --vocab_size 10000       # the same with whole words as tokens
python prepare.py --dataset Skylion007/openwebtext           # another hub dataset, or a folder with one
python prepare.py --train a.txt b.jsonl.gz --val c.parquet   # local files; without --val a share is held out
python prepare.py toy                                        # stories from the grammar below, no network

In a .txt file lines that say <|endoftext|> separate the stories. A .bin file is flat little-endian uint16, every
story followed by the end-of-text token. meta.json is written last: where it is, the data are complete.
"""
import argparse, gzip, hashlib, itertools, json, multiprocessing, os, random, shutil, signal, threading, zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there two of these programs writing one folder are not kept apart
    fcntl = None

import numpy as np
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
JOB = 128  # stories: 0.1 MB of TinyStories, 0.6 MB of web pages; sending that costs nothing beside the work on it
MAX_PIECES = 4_000_000  # different pieces counted before the rarest are forgotten: about half a GB
# how GPT-2 cuts text before merging: contractions, words with their leading space, numbers, punctuation, whitespace
PIECE = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

class UserError(ValueError):
    """Something that the user can mend: scripts print its message, one line, and no traceback.

    It stands here because prepare.py needs it too, and must not wait for torch, nor hold it in every worker.
    """


# ---- the reader: every other program uses these three ---------------------------------------------------------

def load_meta(folder):
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"no prepared data in {folder} (no meta.json): name the folder that has it with --data, "
                         "or make some, see python prepare.py --help")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        complete = {"tokenizer", "vocab_size", "eot", "checksum", "train", "val"} <= meta.keys()
        complete = complete and {"tokens", "stories", "bytes"} <= meta["train"].keys() & meta["val"].keys()
    except (ValueError, AttributeError):  # not JSON, or JSON but not objects
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: run prepare.py again with --out {folder} --force")
    return meta


def load_tokens(folder, split):
    """The tokens of "train" or "val": uint16 (tokens,), read-only, mapped from disk rather than loaded."""
    path, expected = Path(folder) / f"{split}.bin", 2 * load_meta(folder)[split]["tokens"]
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes where meta.json promises {expected:,}: "
                         f"run prepare.py again with --out {folder} --force")
    return np.memmap(path, dtype="<u2", mode="r")


def load_tokenizer(spec):
    """The tiktoken.Encoding that `spec`, meta["tokenizer"] or a checkpoint's copy of it, describes."""
    if spec["name"] == "words":
        # ids: the 256 bytes, then the pieces from frequent to rare, then end-of-text. tiktoken looks a piece up whole
        # and otherwise merges its bytes into what there is, lowest id first, so that any text can be written.
        tokens = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in spec["pieces"]]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding("words", pat_str=PIECE, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})
    if spec["name"] != "gpt2":
        raise UserError(f"unknown tokenizer {spec['name']!r}: run prepare.py again with --tokenizer gpt2 or words")
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # no network, a proxy's error page, a damaged cache: all need the same advice
        raise UserError(f"cannot get the GPT-2 tokenizer ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a folder "
                         "with the two GPT-2 BPE files, or use --tokenizer words, which needs no download") from error


# ---- where texts come from: every source yields one text after the other and keeps none -----------------------

def read_file(path, column):
    import pyarrow.parquet
    *_, kind = path.name.removesuffix(".gz").rpartition(".")
    story, number, offset = [], 0, 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if kind == "parquet":
                table = pyarrow.parquet.ParquetFile(file)
                check_column(path, column, table.schema_arrow.names)
                batches = (batch.column(0) for batch in table.iter_batches(batch_size=1000, columns=[column]))
                for number, value in enumerate(itertools.chain.from_iterable(batches), 1):
                    yield value.as_py()
                return
            for number, raw in enumerate(file, 1):  # as bytes, so that line ends stay and a bad byte can be located
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                offset += len(raw)
                if kind == "jsonl":
                    if line.strip():
                        yield json.loads(line)[column]
                elif line.strip() == EOT:
                    yield "".join(story)
                    story = []
                else:
                    story.append(line)
            yield "".join(story)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line or row {number} is not UTF-8 (byte {offset + error.start:,}): convert the file, "
                         "for example with iconv -f latin1 -t utf-8") from error
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: line {number} is not a JSON object with {column!r} in it ({one_line(error)}): name "
                         "the field that holds the text with --text_column") from error


def read_hub(dataset, config, column):
    """{split: function that starts an iterator over its texts}; `datasets` keeps them on disk, not in memory."""
    import datasets, huggingface_hub
    datasets.logging.set_verbosity_error()  # a failed download is told in one line, not once per retry
    huggingface_hub.logging.set_verbosity_error()
    try:
        data = datasets.load_dataset(dataset, config)
    except Exception as error:  # a dozen kinds from four libraries; what to do about them is the same
        raise UserError(f"cannot load the dataset {dataset!r}: {one_line(error)}. Without a network: "
                         "python prepare.py --train FILE or python prepare.py toy") from error
    if "train" not in data:
        raise UserError(f"{dataset} has no train split, only {', '.join(data)}: give files with --train FILE instead")
    texts = {}
    for split, name in ("train", "train"), ("val", "validation"):
        if name in data:
            check_column(dataset, column, data[name].column_names)
            rows = data[name].select_columns([column])
            texts[split] = lambda rows=rows: (text for batch in rows.iter(1000) for text in batch[column])
    return texts


def check_column(where, column, names):
    if column not in names:
        raise UserError(f"{where} has no column {column!r}, only {', '.join(names)}: name the text with --text_column")


def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def cleaned(texts):
    for text in texts:
        if not isinstance(text, str | None):
            raise UserError(f"a {type(text).__name__} where text should be: name the column of texts with --text_column")
        # half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes U+FFFD, as it would in tiktoken
        text = (text or "").strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            yield text


def held_out(stories, share, seed):
    """Yields (split, story). A story's own hash decides, so its duplicates go the same way and no list is kept;
    but the first always trains and the next that differs always validates, so that neither side is ever empty."""
    first = second = None
    for story in stories:
        digest = hashlib.blake2b(story.encode(), digest_size=8, key=str(seed).encode()).digest()
        first = first or digest
        second = second or (digest if digest != first else None)
        drawn = int.from_bytes(digest, "little") < share * 2**64
        yield "val" if digest == second or drawn and digest != first else "train", story


# ---- the toy corpus: a grammar, one way to write a {slot} a line; a slot keeps its first choice for a whole story.
# {A} and {B} are the friends, {X} and {Y} the same two in either order, {G} gives and {R} receives, {M} is a parent;
# {A_he}, {A_him}, {A_his} and {A_boy} become she, her, her and girl where they must.

GIRLS = "Lily Anna Sara Emma Lucy Ella Amy Jane Kate Sue Mary Rose".split()
BOYS = "Tom Ben Tim Max Sam Jack Leo Dan Bob Nick Joe Paul".split()
PLACES = "park beach farm zoo school lake river store market library hospital station".split()
OBJECTS = "ball book kite doll drum hat boat truck bell shell ring bone puzzle robot basket necklace".split()
SPOTS = ("under a bench", "behind a tree", "in the grass", "near the gate", "on a big rock", "by the road")
GRAMMAR = """
story    {opening}¶{give} {thanks}¶{middle}¶{home}
story    {opening}¶{give} {quarrel}¶{peace} {home}
middle   {play}|{animals}|{lost} {search}|{rain}|{give_back}
opening  Once upon a time, there was a {trait} {A_boy} named {A}. {A_He} had a friend named {B}. {habit}
opening  Once upon a time, there were two friends named {X} and {Y}. {habit}
opening  {A} was a {trait} {A_boy} who lived in a {size} house with {A_his} {M}. {A_His} best friend was {B}. {habit}
opening  One day, {A} woke up and felt happy. "I want to see {B} today," {A_he} said. {A_His} {M} smiled.
habit    They liked to {hobby} together.|Every day, they went out to {hobby}.|They were always kind to each other.
give     Then, {X} and {Y} went to the {place}. {G} gave a {gift} to {R}.
give     Then, {X} and {Y} had a lot of fun at the {place}. {G} gave a {gift} to {R}.
give     When {X} and {Y} got to the {place}, {G} gave a {gift} to {R}.
give     After {X} and {Y} went to the {place}, {G} handed a {gift} to {R}.
give     While {X} and {Y} were playing at the {place}, {G} showed a {gift} to {R}.
give     One day, {X} and {Y} were at the {place}, and {G} brought a {gift} to {R}.
give     {X} and {Y} found a {gift} at the {place}. {G} gave the {gift} to {R}.
thanks   "Thank you, {G}!" said {R}. "I love this {gift}." {R_He} gave {G_him} a big hug.
thanks   {R} was very happy. {R_He} smiled and said, "What a {size} {gift}! Thank you, {G}."
thanks   "Is this for me?" asked {R}. "Yes," said {G}. "You are my best friend." {R} was so happy.
play     They took turns with the {gift}. First {G} had it, and then {R} had it. They laughed a lot.
play     "Now let us {hobby}," said {X}. "Yes!" said {Y}. They did not stop until the sun went down.
animals  They saw a {animal} {spot}. It was hungry. {X} gave some {food} to the {animal}, and it ate it all.
animals  They heard a sound. A {animal} was stuck {spot}. {X} and {Y} pulled and pulled, and then it was free.
animals  A {animal} sat {spot}. It was lost and sad. {X} and {Y} walked with the {animal} until they found its mom.
lost     But then {A} could not find {A_his} {colour} {toy}. {A_He} looked {spot}, but it was not there.
lost     "Oh no! Where is my {colour} {toy}?" said {A}. {A_He} was very sad and began to cry.
search   "Do not cry, {A}," said {B}. "I will help you." Then {B} saw the {toy} {other_spot}. {B} gave the {toy} to {A}.
search   {B} looked and looked. At last, {B_he} found the {toy} {other_spot}. {A} hugged {B} and was happy again.
rain     Then it began to rain. "Run!" said {X}. They ran to a {colour} house, and {B_his} {M} gave them some {food}.
rain     Then it began to rain. {X} was sad, but {Y} had an idea. They sat under a tree and told stories.
give_back  The next day, {Y} and {X} went to the {other_place}. {R} gave a {toy} to {G}. "This is for you," said {R}.
give_back  {R} wanted to be kind too. When {X} and {Y} met at the {other_place}, {R} gave a {toy} to {G}.
quarrel  But then {G} wanted the {gift} back. "It is mine!" said {G}. "No, you gave it to me!" said {R}.
quarrel  "I do not like it," said {R}. {G} was sad. {G_He} went away and sat {spot}.
peace    {A_His} {M} saw them. "Be kind," {M_he} said. "I am sorry," said {R}. They learned that it is good to say sorry.
peace    Soon, {R} felt bad. "Let us play together," {R_he} said. {G} smiled. They learned that it is good to share.
home     Then they went home. From that day on, {X} and {Y} were best friends.
home     When {A} came home, {A_he} told {A_his} {M} about the day. "{B} is a good friend," said {A_his} {M}.
home     {X} and {Y} were tired but happy. They went home and had some {food}.
trait    kind|little|brave|happy|clever|shy|funny|quiet
size     big|small|tiny|nice|pretty|new
colour   red|blue|green|yellow|pink|white
animal   cat|dog|bird|rabbit|duck|frog|mouse|pony|fox|bear
food     bread|cake|soup|cheese|milk|pie
hobby    run and jump|sing songs|draw pictures|look at the birds|tell stories|climb trees|play games
"""
LINES = {}
for slot, text in (row.split(maxsplit=1) for row in GRAMMAR.strip().splitlines()):
    LINES.setdefault(slot, []).extend(text.replace("¶", "\n").split("|"))


class Story(dict):
    def __init__(self, rng):
        """Casts the story: who, where, what. Who comes first and who gives are drawn apart, so only the names tell."""
        self.rng, friends = rng, rng.sample(GIRLS + BOYS, 2)
        cast = friends + rng.sample(friends, 2) + rng.sample(friends, 2) + [rng.choice(["mom", "grandma", "dad", "grandpa"])]
        for slot, name in zip("ABXYGRM", cast):
            self[slot] = name
            for he, she in (("he", "she"), ("him", "her"), ("his", "her"), ("boy", "girl")):
                word = she if name in GIRLS or name in ("mom", "grandma") else he
                self[f"{slot}_{he}"], self[f"{slot}_{he.title()}"] = word, word.title()
        for slots, words in (("place", "other_place"), PLACES), (("gift", "toy"), OBJECTS), (("spot", "other_spot"), SPOTS):
            self.update(zip(slots, rng.sample(words, 2)))

    def __missing__(self, slot):  # str.format_map asks here for every slot that has no value yet
        self[slot] = self.rng.choice(LINES[slot]).format_map(self)
        return self[slot]


def toy_texts(count, seed):
    rng = random.Random(seed)
    return (Story(rng)["story"] for _ in range(count))


# ---- stories -> jobs -> all cores -> results in the order of the stories, whatever the number of workers -------

def start_worker(spec):
    global encoding
    encoding = spec and load_tokenizer(spec)
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
        # a parent that was killed cannot stop them: they wait for its end themselves
        watch = lambda: (multiprocessing.parent_process().join(), os._exit(1))
        threading.Thread(target=watch, daemon=True).start()


def count_pieces(job):
    import regex
    pattern = regex.compile(PIECE)
    return Counter(piece for split, story in job if split == "train" for piece in pattern.findall(story))


def encode(job):
    """Returns {split: (uint16 tokens as bytes, number of stories, UTF-8 bytes of their texts)}."""
    encoded = {}
    for split in "train", "val":
        stories = [story for chosen, story in job if chosen == split]
        text = "".join(story + EOT for story in stories)
        if text.count(EOT) == len(stories):  # one call for all: a quarter faster, and the same tokens
            tokens = encoding.encode_to_numpy(text, allowed_special="all")
        else:  # a story that itself says <|endoftext|>: there it is ordinary text
            tokens = np.array([t for story in stories for t in (*encoding.encode_ordinary(story), encoding.eot_token)])
        encoded[split] = tokens.astype("<u2").tobytes(), len(stories), len(text.encode()) - len(EOT) * len(stories)
    return encoded


def on_all_cores(work, corpus, spec, workers, title):
    """Yields work(job) in order and reads only a few jobs ahead, where Pool.imap would first read the whole corpus."""
    stories = iter(tqdm(corpus(), desc=title, unit=" stories", unit_scale=True))
    jobs = iter(lambda: list(itertools.islice(stories, JOB)), [])
    first = list(itertools.islice(jobs, 2))
    jobs = itertools.chain(first, jobs)
    if workers == 1 or len(first) < 2:  # not worth starting processes
        start_worker(spec)
        yield from map(work, jobs)
        return
    # "spawn", because a fork copies whatever locks the threads of pyarrow and tqdm hold at that moment
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (spec,)) as pool:
        waiting = deque(pool.submit(work, job) for job in itertools.islice(jobs, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, job) for job in itertools.islice(jobs, 1))


def frequent_pieces(corpus, count, workers):
    """The `count` most frequent pieces of the train split that are longer than a byte, from frequent to rare."""
    counts, rare = Counter(), 0
    for found in on_all_cores(count_pieces, corpus, None, workers, "counting words"):
        counts.update(found)
        while len(counts) > MAX_PIECES:
            rare += 1
            counts = Counter({piece: n for piece, n in counts.items() if n > rare})
    pieces = [piece for piece in counts if len(piece.encode()) > 1]
    return sorted(pieces, key=lambda piece: (-counts[piece], piece))[:count]


def lock_folder(folder, busy):
    """Makes a folder if there is none and locks it. -> the lock, which closing it or the end of this process lets go.

    None where the system has no such locks. Raises UserError(busy) while another process holds it, OSError.
    """
    os.makedirs(folder, exist_ok=True)
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(busy) from None
    except OSError:  # a file system without locks, such as NFS, which wants a file to be written
        os.close(lock)
        return None
    return lock


def claim(folder):
    """Makes a folder that no other prepare.py is using. -> a lock, which the system lets go of when its owner dies"""
    try:
        folder.mkdir(parents=True, exist_ok=True)  # there already after a run that was killed
        if fcntl is None:
            return None
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        raise UserError(f"another prepare.py is at work in {folder}: wait for it or choose another --out") from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {one_line(error)}: choose another --out") from error


def write(folder, corpus, spec, workers, source):
    """Writes the three files into a folder beside `folder` and moves them there when all are complete."""
    unfinished = folder.with_name(folder.name + ".tmp")
    tokenizer = load_tokenizer(spec)
    meta = {"tokenizer": spec, "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token}
    meta |= {split: {"tokens": 0, "stories": 0, "bytes": 0, "sha256": hashlib.sha256()} for split in ("train", "val")}
    lock = claim(unfinished)
    try:
        with open(unfinished / "train.bin", "wb") as train, open(unfinished / "val.bin", "wb") as val:
            for encoded in on_all_cores(encode, corpus, spec, workers, "tokenizing"):
                for split, file in ("train", train), ("val", val):
                    tokens, stories, size = encoded[split]
                    file.write(tokens)
                    meta[split]["sha256"].update(tokens)
                    meta[split]["tokens"] += len(tokens) // 2
                    meta[split]["stories"] += stories
                    meta[split]["bytes"] += size
        for split in "train", "val":
            if not meta[split]["stories"]:
                raise UserError(f"no story for the {split} split: give --train and --val files with text in them, or at "
                                 f"least two different stories, which in .txt files are separated by lines that say {EOT}")
            meta[split]["sha256"] = meta[split]["sha256"].hexdigest()
        identity = json.dumps([spec, meta["train"]["sha256"], meta["val"]["sha256"]])
        meta |= {"source": source, "checksum": hashlib.sha256(identity.encode()).hexdigest()[:16]}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1, default=str))
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)  # until the last move a reader finds nothing rather than a mixture
        for name in "train.bin", "val.bin", "meta.json":
            os.replace(unfinished / name, folder / name)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {one_line(error)}: free some space or choose another --out") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if lock is not None:
            os.close(lock)
    return meta


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toy", nargs="?", choices=["toy"], help="write stories from the grammar in this file")
    parser.add_argument("--stories", type=int, default=20_000, help="toy: how many, held-out ones included (20000)")
    parser.add_argument("--dataset", default="roneneldan/TinyStories", help="on the Hugging Face hub, or a local folder")
    parser.add_argument("--config", help="configuration of the dataset, where it has several")
    parser.add_argument("--train", nargs="+", type=Path, metavar="FILE", help=".txt, .jsonl or .parquet, each also .gz")
    parser.add_argument("--val", nargs="+", type=Path, metavar="FILE", help="validation files (a share of --train)")
    parser.add_argument("--text_column", default="text", help="column or JSON field that holds the text (text)")
    parser.add_argument("--val_share", type=float, default=0.01, help="share to hold out where no validation is given (0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the toy stories and of the held-out share (0)")
    parser.add_argument("--tokenizer", choices=["gpt2", "words"], help="(gpt2; words for toy)")
    parser.add_argument("--vocab_size", type=int, default=10_000, help="words: with 256 bytes and end-of-text (10000)")
    parser.add_argument("--out", type=Path, help="folder to write (data/<name of the source>)")
    parser.add_argument("--force", action="store_true", help="replace what is there, once the new data are complete")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    parser.error = usage_error
    args = parser.parse_args(argv)

    source = "toy" if args.toy else "files" if args.train else "dataset"
    knobs = {"toy": ["stories"], "files": ["train", "val", "text_column"], "dataset": ["dataset", "config", "text_column"]}
    for flag in itertools.chain.from_iterable(knobs.values()):
        if getattr(args, flag) != parser.get_default(flag) and flag not in knobs[source]:
            raise UserError(f"--{flag} has no effect here: drop it, or see python prepare.py --help for what goes together")
    args.tokenizer = args.tokenizer or ("words" if args.toy else "gpt2")
    if args.vocab_size != parser.get_default("vocab_size") and args.tokenizer == "gpt2":
        raise UserError("--vocab_size has no effect on the GPT-2 tokenizer: drop it or add --tokenizer words")
    for flag, low, high in ("vocab_size", 258, 65_536), ("stories", 2, 10**12), ("workers", 1, 1024):  # ids are uint16
        if not low <= getattr(args, flag) <= high:
            raise UserError(f"--{flag} must lie between {low:,} and {high:,}, not {getattr(args, flag):,}")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val_share must lie between 0 and 1, for example 0.01, not {args.val_share}")
    for path in (args.train or []) + (args.val or []):
        if not path.is_file():
            raise UserError(f"no file {path}: check the path after --train or --val")
        if Path(path.name.removesuffix(".gz")).suffix not in (".txt", ".jsonl", ".parquet"):
            raise UserError(f"{path}: unknown kind of file: rename it to .txt, .jsonl or .parquet, each also with .gz")
    name = {"toy": "toy", "files": args.train and args.train[0].name.split(".")[0], "dataset": Path(args.dataset).name.lower()}
    out = Path(os.path.abspath(args.out or Path("data") / name[source]))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    # token files without meta.json are somebody else's, unless a run of ours was killed while it moved them there
    killed = out.with_name(out.name + ".tmp").exists()
    if not args.force and ((out / "meta.json").exists() or (out / "train.bin").exists() and not killed):
        raise UserError(f"{out} already holds data: add --force to replace it, or choose another --out")
    if args.tokenizer == "gpt2":
        load_tokenizer({"name": "gpt2"})  # a download that fails should fail now, not after that of the text

    if source == "toy":
        texts = {"train": lambda: toy_texts(args.stories, args.seed)}
    elif source == "files":
        texts = {split: lambda paths=paths: (text for path in paths for text in read_file(path, args.text_column))
                 for split, paths in (("train", args.train), ("val", args.val)) if paths}
    else:
        texts = read_hub(args.dataset, args.config, args.text_column)

    def corpus():  # a fresh iterator over (split, story), because `words` needs two
        if "val" not in texts:
            return held_out(cleaned(texts["train"]()), args.val_share, args.seed)
        return ((split, story) for split in texts for story in cleaned(texts[split]()))

    spec = {"name": args.tokenizer}
    if args.tokenizer == "words":
        spec["pieces"] = frequent_pieces(corpus, args.vocab_size - 257, args.workers)
        if len(spec["pieces"]) < args.vocab_size - 257:
            print(f"the text has only {len(spec['pieces']):,} different words and marks: a smaller vocabulary than asked for")
    how = {"kind": source} | {flag: getattr(args, flag) for flag in (*knobs[source], "val_share", "seed")}
    meta = write(out, corpus, spec, args.workers, how)
    for split in "train", "val":
        print("{0:6}{stories:,} stories, {tokens:,} tokens, {bytes:,} bytes of text".format(split, **meta[split]))
    print(f"vocabulary of {meta['vocab_size']:,} ({args.tokenizer}), checksum {meta['checksum']}, in {out}")


def usage_error(message):
    raise UserError(f"{message}: see python prepare.py --help")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
