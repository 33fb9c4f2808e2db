"""Explanation scores: how well can one foretell where a neuron fires? (paper: Figure 2, right)

    python interp/explain.py out/baseline out/local_k2     every MLP neuron, explained by a table
    python interp/explain.py out/* --plot scores.png       histograms over each other, layer means
    python interp/explain.py out/local_k2 --explainer openai --base_url http://localhost:8000/v1 \\
        --model NAME --neurons 50 --dry_run                what a language model would cost
    (the same without --dry_run)                           its explanations and their scores

The method is that of Bills et al. 2023, on the clean stream. Records are windows of 64 tokens, each
within one story and read alone: a neuron's 20 strongest, of different stories, and 15 random ones,
which all neurons share and whose stories hold none of the 20. An explanation is made of 5 strong
ones. With it, the activations in 5 other strong and 5 random ones are simulated. The score is the
Pearson correlation of true and simulated activations, all 640 tokens together; what is undefined is
null with its reason, never 0. Half of these windows being strong ones, it is higher than in any
text; that of the random ones alone stands beside it. Means are over the neurons that have a score:
those that never fire have none, so compare how many were scored as well. Standard errors are over
neurons: that these share the random windows, and that another training run has other neurons, is
not in them.

Explainers: lookup, a table of the mean activation at each kind of token (--lookup corpus: over
training text; records: over the 5 windows), which knows nothing of context, and openai, a language
model behind any API like OpenAI's (pip install -r requirements-interp.txt; the key is taken from
OPENAI_API_KEY). Its scores stand beside the table's on the same neurons and text, and all of them
beside those of a model of the same geometry with random weights: much of a table's score needs no
learning.

Records come from the validation split and the table from the training split, so that nothing is
scored on text that its explanation was made of.

Writes explain.json, explain_neurons.json and explain.png beside the checkpoint, explain_openai...
for a language model, whose answers are kept in a folder, a file each, as they arrive: none is paid
twice. After Ctrl-C the same command goes on. Memory does not grow with the text: 1 GB for the
paper's model and 5,000 kinds of token, 16 KB for each kind more (GPT-2's 50,257: 0.7 GB).

Shape letters: B windows of T tokens, U neurons at a time, V vocabulary, n tokens of a batch.
"""

import email.utils
import hashlib
import json
import math
import os
import random
import re
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # python puts interp/ there
import config as knobs
from eval import find_data, open_run, run_paths
from interp.common import (
    check_picture, check_range, check_writable, column, number, print_table, run_parser,
    save_figure)
from interp.activations import (
    Site, Stopped, Strongest, Text, check_stop, read_sites, untrained, windows_at)
from interp.results import (
    MAYBE, NUMBER, Job, fits, read_json, read_neurons, results_of, write_json)
from model import GPTNeoConfig
from prepare import UserError, load_tokenizer, load_tokens

TOP, RANDOM = 20, 15  # windows of a neuron
# Bills et al. deal the strongest out to train, calibration, valid and test in turn, the random ones
# to the last three. What they calibrate on and test on is left alone here.
TRAIN, VALID, RANDOM_VALID = slice(0, TOP, 4), slice(2, TOP, 4), slice(1, RANDOM, 3)
SCORED_RANDOM = 5  # windows in RANDOM_VALID
LEVELS = 10  # a language model sees and gives activations as whole numbers from 0 to this
NEURONS_AT_ONCE = 2048  # memory is taken for so many, and a state saved after them
STRONGEST_TOKENS = 10  # of a table, shown as its explanation
OFTEN = 5  # a token must stand so often in the text to be shown: means of fewer are noise
BINS = 40  # of a histogram of scores, from -1 to 1


# -------------------------------------------------------------------------------------- the records


def story_windows(tokens, eot, T, device):
    """Windows of T tokens that each lie within one story and do not overlap: where they begin, and
    the numbers of their stories, both rising. Raises UserError on less than a window of text.
    """
    ends = Text(tokens, eot, T, device).ends
    begins = np.concatenate(([0], ends + 1))[:-1]
    lengths = ends + 1 - begins  # an end-of-text belongs to its story
    counts, rest = np.divmod(lengths, T)
    stories = np.arange(len(ends))
    # what fills no window is left out, of every second story at its beginning, else at its end
    firsts = begins + rest * (stories % 2)
    which = np.repeat(stories, counts)
    places = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return firsts[which] + T * places, which


def evenly(starts, count):
    """At most count of them, evenly spread."""
    places = np.linspace(0, len(starts), min(count, len(starts)), endpoint=False)
    return starts[places.astype(np.int64)]


class Texts(NamedTuple):
    """The text that is read, the same for every neuron."""

    corpus: Text  # of the training split: tables are made of it
    counts: np.ndarray  # (V), how often each token stands in it
    search: Text  # of the validation split: the strongest windows are looked for here
    random: np.ndarray  # where the random windows that are scored begin, in its other stories


def choose_texts(train, val, meta, settings, device):
    """Texts of at most settings["tokens"] tokens each. Raises UserError where stories are few."""
    T, eot = settings["window"], meta["eot"]
    count = max(1, settings["tokens"] // T)
    starts, _ = story_windows(train, eot, T, device)
    if not len(starts):
        raise UserError(f"no story of the training text has {T} tokens: "
                        f"choose other --data or a smaller --window")
    corpus = Text(train, eot, T, device, starts=evenly(starts, count))
    starts, stories = story_windows(val, eot, T, device)
    there = np.unique(stories)
    if len(there) < TOP + RANDOM:
        raise UserError(f"{len(there)} stories of the validation text have {T} tokens, and "
                        f"{TOP + RANDOM} are needed: choose other --data or a smaller --window")
    rng = np.random.default_rng(settings["seed"])
    chosen = rng.choice(there, RANDOM, replace=False)
    windows = [rng.choice(starts[stories == story]) for story in chosen]
    others = starts[~np.isin(stories, chosen)]
    search = Text(val, eot, T, device, starts=evenly(others, max(TOP, count)))
    if len(np.unique(search.stories(search.starts))) < TOP:
        raise UserError(f"--tokens={settings['tokens']} are too few: windows of {TOP} different "
                        f"stories are needed")
    return Texts(corpus, count_tokens(corpus, meta["vocab_size"]), search,
                 np.array(windows)[RANDOM_VALID])


def count_tokens(text, V):
    """How often each token stands in the windows of a Text -> (V)."""
    counts = np.zeros(V, dtype=np.int64)
    for first in range(0, len(text.starts), 2**14):
        places = text.starts[first : first + 2**14, None] + np.arange(text.T)
        counts += np.bincount(text.tokens[places].ravel(), minlength=V)
    return counts


class Record(NamedTuple):
    """A window, and what one neuron does in it."""

    tokens: np.ndarray  # (T)
    values: np.ndarray  # (T)


class Neuron(NamedTuple):
    """A neuron and its records."""

    layer: int
    neuron: int
    peak: float  # its largest activation in the text that was searched; it lies in train
    train: list  # Records to explain it from
    scored: list  # Records to score the explanation on: first the strong ones, then the random ones


def find_records(activate, units, texts, stop, title):
    """The Neurons of these units. activate: idx (B, T) -> (B, T, U), those U units."""
    best, T = Strongest(TOP), texts.search.T
    for x, positions, stories in texts.search.read(activate, stop, f"{title}: strongest windows"):
        best.add(x, positions, stories)
    values, positions = best.found()  # each (U, TOP)
    used = np.concatenate((positions[:, TRAIN], positions[:, VALID]), 1)  # (U, 10)
    # a window lies within one story, so so far to both sides lies exactly the whole of it
    snippets = texts.search.snippets(activate, used, T - 1, T - 1, stop)
    idx = windows_at(texts.search.tokens, texts.random, T, texts.search.device)  # (5, T)
    random_values = activate(idx).permute(2, 0, 1).cpu().numpy()  # (U, 5, T)
    random_tokens = idx.cpu().numpy()
    neurons = []
    for unit, peak, found, at_random in zip(units, values[:, 0].tolist(), snippets, random_values):
        strong = [Record(np.array(one.tokens), np.array(one.values)) for one in found]
        train, valid = strong[: len(strong) // 2], strong[len(strong) // 2 :]
        neurons.append(Neuron(*unit, peak, train, valid + list(
            map(Record, random_tokens, at_random))))
    return neurons


# --------------------------------------------------------------------------------------- the scores


def discretise(values, largest):
    """Activations as whole numbers from 0 to LEVELS: min(10, floor(10 relu(a) / largest))."""
    scaled = LEVELS * np.maximum(values, 0) / largest
    return np.minimum(LEVELS, np.floor(scaled)).astype(int)


def correlation(real, simulated):
    """Pearson's correlation of two sequences -> (score, None), or (None, why there is none)."""
    real, simulated = np.asarray(real, np.float64), np.asarray(simulated, np.float64)
    if np.ptp(real) == 0:
        return None, "its activations are constant"
    if np.ptp(simulated) == 0:
        return None, "its simulation is constant"
    real, simulated = real - real.mean(), simulated - simulated.mean()
    score = (real / np.linalg.norm(real)) @ (simulated / np.linalg.norm(simulated))
    return float(np.clip(score, -1, 1)), None  # rounding can lead beyond


def pooled_correlation(real, simulated):
    """The same over lists of sequences, concatenated: of a single one it is often undefined."""
    return correlation(np.concatenate(real), np.concatenate(simulated))


def undefined(reason):
    return {"score": None, "random_score": None, "reason": reason}


def score_simulation(neuron, simulated):
    """A simulated sequence for each of the neuron's scored records -> {"score", "random_score"},
    of all and of the random ones alone, and "reason" where one of them is None."""
    if neuron.peak <= 0:
        return undefined("it never fires")
    real = [record.values for record in neuron.scored]
    score, reason = pooled_correlation(real, simulated)
    random_score, random_reason = pooled_correlation(
        real[-SCORED_RANDOM:], simulated[-SCORED_RANDOM:])
    found = {"score": score, "random_score": random_score}
    if reason:
        found["reason"] = reason
    elif random_reason:
        found["reason"] = f"in random text {random_reason}"
    return found


# -------------------------------------------------------------------------- the table's explanation


class Table(NamedTuple):
    """What a neuron is said to do at each kind of token (Bills et al. 2023, token lookup)."""

    values: np.ndarray  # (V), its mean activation there
    counts: np.ndarray  # (V), at how many tokens


def lookup_table(records, V, unseen):
    """The Table of these Records; tokens that they lack get the value unseen."""
    tokens = np.concatenate([record.tokens for record in records])
    values = np.concatenate([record.values for record in records])
    counts = np.bincount(tokens, minlength=V)
    sums = np.bincount(tokens, weights=values, minlength=V)
    return Table(np.where(counts > 0, sums / np.maximum(counts, 1), unseen), counts)


class CorpusMeans:
    """The Tables of U neurons over the corpus; tokens that it lacks get a neuron's mean."""

    def __init__(self, activate, texts, U, stop, title):
        """activate: idx (B, T) -> (B, T, U). Reads the whole corpus."""
        corpus, self.counts = texts.corpus, texts.counts
        self.kinds = np.flatnonzero(self.counts)  # the tokens that are there
        row_of = np.cumsum(self.counts > 0) - 1  # (V), the place of each of them among kinds
        dtype = torch.float32 if corpus.device.type == "mps" else torch.float64  # mps has no other
        sums = torch.zeros(len(self.kinds), U, dtype=dtype, device=corpus.device)
        for x, positions, _ in corpus.read(activate, stop, f"{title}: means by token"):
            rows = torch.from_numpy(row_of[corpus.tokens[positions]])  # (n)
            sums.index_add_(0, rows.to(sums.device), x.to(dtype))
        self.by_kind = sums.cpu().numpy()  # (kinds, U)
        self.mean = self.by_kind.sum(0) / self.counts.sum()  # (U)
        self.by_kind /= self.counts[self.kinds, None]  # in place: it is the largest thing here

    def table(self, unit):
        values = np.full(len(self.counts), self.mean[unit])
        values[self.kinds] = self.by_kind[:, unit]
        return Table(values, self.counts)


def strongest_tokens(table, word):
    """[token as text, value] of those with the largest values above 0; word: the text of a token.

    Of tokens that stand OFTEN in the text, or of all where no neuron's records are so long.
    """
    often = table.counts >= OFTEN
    seen = np.flatnonzero(often if often.any() else table.counts)
    values = table.values[seen]
    order = np.argsort(-values, kind="stable")[:STRONGEST_TOKENS]
    return [[word(int(seen[i])), float(values[i])] for i in order if values[i] > 0]


def in_quotes(text):
    """A token as one visible word, such as " cat" or "\\n"."""
    return json.dumps(text, ensure_ascii=False)


def explain_by_table(neuron, table, word):
    """The entry of a Neuron, explained by its Table, in explain_neurons.json."""
    tokens = strongest_tokens(table, word)
    explanation = ", ".join(f"{in_quotes(text)} {value:.2g}" for text, value in tokens)
    simulated = [table.values[record.tokens] for record in neuron.scored]
    return {"layer": neuron.layer, "neuron": neuron.neuron, **score_simulation(neuron, simulated),
            "explanation": explanation, "tokens": tokens}


# ----------------------------------------------------------------- a language model's explanations

EXPLAIN = """\
You study one neuron of a small language model. Below are excerpts of text in which it fires. Each \
line is one token, in JSON quotes, then a tab, then how strongly the neuron fires at that token: \
from 0, not at all, to 10, as strongly as it ever does. The model reads from top to bottom, so a \
number depends on this token and those before it, never on later ones.

Find what the tokens with high numbers, or what comes right before them, have in common that other \
tokens lack. Answer with one phrase of at most 20 words that begins with "fires on", and with \
nothing else."""
SIMULATE = """\
A neuron of a small language model is described so: {explanation}

You get an excerpt of text. Each line is the number of a token, then a tab, then the token in JSON \
quotes. Going by the description alone, predict how strongly the neuron fires at each token, as a \
whole number from 0, not at all, to 10, as strongly as it can. """
SPARSE = """\
Most tokens get 0: leave these out. Write one line for each of the others, in order: the token's \
number, a tab, your prediction. Nothing else. If every token gets 0, write the word none."""
FULL = """\
Write one line for each token, in order, none left out: the token's number, a tab, your \
prediction. Nothing else."""
PROMPTS = hashlib.sha256("\0".join((EXPLAIN, SIMULATE, SPARSE, FULL)).encode()).hexdigest()[:8]
LONGEST = 500  # characters of an explanation: what is longer is no phrase
LINE = re.compile(r"\s*(\d{1,6})[\s:,|]+(\d{1,6})\s*")  # number of a token, prediction
BEGUN = re.compile(r"\s*(\d{1,6})[\s:,|]+\d")  # such a line, up to the prediction's first digit
TYPICAL = {"explain": 30, "sparse": 60}  # tokens of an answer, for --dry_run


class Unreadable(Exception):
    """An answer that is not of the form that was asked for. It is counted, and never scored."""


def messages(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def explain_messages(neuron, word):
    """The question what a Neuron fires on: its training records, as whole numbers."""
    excerpts = []
    for place, record in enumerate(neuron.train, 1):
        levels = discretise(record.values, neuron.peak).tolist()
        lines = [f"{in_quotes(word(int(token)))}\t{level}"
                 for token, level in zip(record.tokens, levels)]
        excerpts.append(f"Excerpt {place}\n" + "\n".join(lines))
    return messages(EXPLAIN, "\n\n".join(excerpts))


def simulate_messages(explanation, tokens, word, form):
    """The question what such a neuron does at these tokens. form: sparse or full."""
    wanted = SPARSE if form == "sparse" else FULL
    lines = [f"{place}\t{in_quotes(word(int(token)))}" for place, token in enumerate(tokens, 1)]
    return messages(SIMULATE.format(explanation=explanation) + wanted, "\n".join(lines))


def read_explanation(answer):
    """The phrase in an answer. Raises Unreadable."""
    phrase = " ".join(answer["text"].split())
    phrase = phrase.encode(errors="replace").decode()  # half a surrogate pair cannot be sent on
    if answer["cut"] or not phrase or len(phrase) > LONGEST:
        raise Unreadable
    return phrase


def read_lines(answer, T):
    """{number of a token: level} as an answer has them, one a line. Raises Unreadable."""
    lines = [line for line in answer["text"].splitlines() if line.strip().strip("`")]
    if answer["cut"] or not lines:
        raise Unreadable
    if [line.strip(" .`").lower() for line in lines] == ["none"]:
        return {}
    found = {}
    for line in lines:
        match = LINE.fullmatch(line)
        if not match:
            raise Unreadable
        place, level = map(int, match.groups())
        if not 1 <= place <= T or place in found or level > LEVELS:
            raise Unreadable
        found[place] = level
    return found


def read_simulation(answer, T, form):
    """An answer to simulate_messages -> the simulated activations (T). Raises Unreadable."""
    levels = read_lines(answer, T)
    if form == "full":
        if len(levels) < T:
            raise Unreadable
        levels |= expected_levels(answer["logprobs"] or [], levels)
    return np.array([levels.get(place, 0) for place in range(1, T + 1)], dtype=float)


def expected_value(logprobs):
    """The mean level of a distribution over tokens, (text, log probability) pairs, as far as these
    are whole numbers up to LEVELS; None where none is (Bills et al. 2023)."""
    weights = Counter()
    for text, logprob in logprobs:
        text = text.strip()
        if text.isascii() and text.isdecimal() and int(text) <= LEVELS:
            weights[int(text)] += math.exp(logprob)
    total = sum(weights.values())
    return sum(level * weight for level, weight in weights.items()) / total if total else None


def expected_levels(logprobs, written):
    """{number of a token: expected level} from the probabilities of an answer in --simulation full.

    logprobs: [token, {alternative: log probability}] of the whole answer; written: the levels that
    stand in it. Where a server's 10 is two tokens, the first of them counts as what is written.
    """
    line, found = "", {}
    for token, alternatives in logprobs:
        begun = BEGUN.match(line + token)
        place = int(begun[1]) if begun else None
        if place in written and place not in found:
            pairs = [(str(written[place]) if text == token else text, logprob)
                     for text, logprob in alternatives.items()]
            found[place] = expected_value(pairs)
        line = (line + token).rpartition("\n")[2]
    return {place: level for place, level in found.items() if level is not None}


def ask_about(neuron, answers, word, settings):
    """What a language model makes of a Neuron -> {"score", "random_score", "explanation",
    "answers", maybe "reason"}. answers: Answers."""
    used = Counter(requests=0, unreadable=0, without_logprobs=0, prompt_tokens=0, answer_tokens=0)
    form = settings["simulation"]

    def ask(question, read, typical, logprobs=False):
        """read(answer) of the answer to a question."""
        answer = answers.ask(question, typical, logprobs)
        used.update(requests=1, prompt_tokens=answer["prompt_tokens"],
                    answer_tokens=answer["answer_tokens"])
        if logprobs and not answer["logprobs"]:
            used["without_logprobs"] += 1
        try:
            return read(answer)
        except Unreadable:
            used["unreadable"] += 1
            return None

    def found(scores, explanation=""):
        return {**scores, "explanation": explanation, "answers": dict(used)}

    if neuron.peak <= 0:
        return found(undefined("it never fires"))
    explanation = ask(explain_messages(neuron, word), read_explanation, TYPICAL["explain"])
    if explanation is None:
        return found(undefined("its explanation could not be read"))
    simulated = []
    for record in neuron.scored:
        T = len(record.tokens)
        question = simulate_messages(explanation, record.tokens, word, form)
        read = partial(read_simulation, T=T, form=form)
        simulated.append(ask(question, read, TYPICAL.get(form, 4 * T), form == "full"))
    # on fewer records a score would not be comparable: answers fail more often on some of them
    if used["unreadable"]:
        return found(undefined(f"{used['unreadable']} of its {len(simulated)} simulations could "
                               f"not be read"), explanation)
    return found(score_simulation(neuron, simulated), explanation)


# ------------------------------------------------------------------------------------ the endpoint

LONGEST_PAUSE = 600  # seconds: who asks for a longer one has no quota left
ANSWER = {"text": str, "cut": bool, "logprobs": (list, type(None)), "prompt_tokens": int,
          "answer_tokens": int}
COMPLETION = {"choices": [{"message": dict}]}  # of a server's answer, what must be there


def estimate_tokens(question):
    """About how many tokens messages are: a word, a mark or a line break is one."""
    return sum(len(re.findall(r"\w+|[^\w ]", message["content"])) for message in question)


def pause_of(error, attempt):
    """Seconds to wait after an error before another attempt: what the server asks for, else twice
    as long each time, and not in step with others."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    wanted = headers.get("retry-after", "")
    try:
        return max(0.0, float(wanted))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(wanted).timestamp() - time.time())
    except (TypeError, ValueError):
        return min(60, 2**attempt) * random.uniform(0.5, 1)


def alternatives_of(logprob):
    """{token: log probability} of what could stand at one place of an answer, itself included."""
    tops = [logprob, *logprob["top_logprobs"]]
    return {top["token"]: float(top["logprob"]) for top in tops}


def read_completion(body, question):
    """A server's answer, as text -> ANSWER. Raises ValueError when it is none."""
    found = json.loads(body)
    if not fits(found, COMPLETION) or not found["choices"]:
        raise ValueError("not a chat completion")
    choice, usage = found["choices"][0], found.get("usage") or {}
    text = choice["message"].get("content") or ""  # null for a refusal
    if not isinstance(text, str):
        raise ValueError("its content is no text")
    logprobs = (choice.get("logprobs") or {}).get("content")
    if logprobs:
        logprobs = [[one["token"], alternatives_of(one)] for one in logprobs]
    return {"text": text, "cut": choice.get("finish_reason") == "length",
            "logprobs": logprobs or None,
            "prompt_tokens": int(usage.get("prompt_tokens") or estimate_tokens(question)),
            "answer_tokens": int(usage.get("completion_tokens") or len(text) // 3)}


class OutOfTokens(Stopped):
    """The next request might cost more than --max_tokens_total."""


class Endpoint:
    """A language model behind an API like OpenAI's. Calls may come from several threads.

    Raises UserError where the package openai or the key is missing.
    """

    def __init__(self, args, stop):
        try:
            import openai
        except ImportError:
            raise UserError("--explainer=openai needs the package openai: "
                            "pip install -r requirements-interp.txt") from None
        key = os.environ.get("OPENAI_API_KEY")
        if not key and args.base_url == MODEL_KNOBS["base_url"][0]:
            raise UserError(f"{args.base_url} needs a key: put it into the environment as "
                            f"OPENAI_API_KEY, or give another --base_url")
        self.errors, self.args, self.stop = openai, args, stop
        # another server may need no key, but the package wants one; attempts are counted here
        self.client = openai.OpenAI(api_key=key or "none", base_url=args.base_url, max_retries=0,
                                    timeout=args.timeout)
        self.lock, self.closed, self.resume_at = threading.Lock(), False, 0.0
        self.spent = self.reserved = 0  # tokens that were paid, and that open requests may cost

    def check_open(self):
        """Raises Stopped once nothing new shall be asked."""
        check_stop(self.stop)
        if self.closed:
            raise Stopped

    def answer(self, request, typical):
        """The ANSWER to the keyword arguments of a chat completion; this costs. Raises UserError
        where the server refuses or is silent for too long, and Stopped."""
        needed = estimate_tokens(request["messages"]) + request["max_completion_tokens"]
        limit = self.args.max_tokens_total
        with self.lock:
            if limit is not None and self.spent + self.reserved + needed > limit:
                raise OutOfTokens
            self.reserved += needed
        answer = None
        try:
            answer = self.attempts(request)
        finally:
            with self.lock:
                self.reserved -= needed
                if answer:
                    self.spent += answer["prompt_tokens"] + answer["answer_tokens"]
        return answer

    def attempts(self, request):
        """The same, again and again until there is an answer."""
        for attempt in range(self.args.retries + 1):
            self.wait()
            try:
                return self.attempt(request)
            except self.errors.APIConnectionError as error:  # or a timeout
                reason, pause = str(error.__cause__ or error), pause_of(error, attempt)
            except self.errors.APIStatusError as error:
                self.check_refusal(error)
                reason, pause = f"{error.status_code} {error.message}", pause_of(error, attempt)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                # such as the page of a proxy in between, or an answer that was cut off
                reason, pause = f"no chat completion: {error}", pause_of(error, attempt)
            if pause > LONGEST_PAUSE:
                break
            with self.lock:  # of all threads: they share one limit
                self.resume_at = max(self.resume_at, time.monotonic() + pause)
        raise UserError(f"{self.args.base_url} does not answer ({short(reason)}): what it has "
                        f"answered is kept, and the same command goes on from there")

    def attempt(self, request):
        completion = self.client.chat.completions.with_raw_response.create(**request)
        return read_completion(completion.text, request["messages"])

    def check_refusal(self, error):
        """Raises UserError on a status that another attempt will not change."""
        used_up = error.code == "insufficient_quota"  # it comes as 429 too
        if used_up or error.status_code < 500 and error.status_code not in (408, 409, 429):
            raise UserError(f"{self.args.base_url} refuses: {error.status_code} "
                            f"{short(error.message)}")

    def wait(self):
        """Sleep until requests are welcome again. Raises Stopped."""
        self.check_open()
        while time.monotonic() < self.resume_at:
            time.sleep(min(0.1, max(0.0, self.resume_at - time.monotonic())))
            self.check_open()


def short(text):
    """A server's words on one line."""
    return " ".join(str(text).split())[:200]


class Preview:
    """In the place of an Endpoint for --dry_run: counts what would be asked."""

    def __init__(self):
        self.lock, self.closed = threading.Lock(), False
        self.planned = Counter(calls=0, prompt_tokens=0, answer_tokens=0)

    def check_open(self):
        pass

    def answer(self, request, typical):
        tokens = estimate_tokens(request["messages"])
        with self.lock:
            self.planned.update(calls=1, prompt_tokens=tokens, answer_tokens=typical)
        return None


# what stands for the answers that nobody has paid yet: a typical explanation, no activation
PLANNED = {"text": "none", "cut": False, "logprobs": None, "prompt_tokens": 0, "answer_tokens": 0}


class Answers:
    """What a language model has said: each answer is paid once, and kept as it arrives.

    endpoint: an Endpoint or Preview. folder: of the answers, one file each, named by the hash of
    the address and the request; written whole or not at all, so a killed run loses none.
    """

    def __init__(self, endpoint, folder, settings):
        self.endpoint, self.folder, self.settings = endpoint, Path(folder), settings
        self.locks = {}  # of every request: of two alike at a time one waits for the other's answer

    def ask(self, question, typical, logprobs=False):
        """The ANSWER to messages, from the folder or else from the endpoint. typical: about how
        many tokens it has."""
        self.endpoint.check_open()
        settings = self.settings
        request = {"model": settings["model"], "messages": question,
                   "temperature": settings["temperature"],
                   "max_completion_tokens": settings["answer_tokens"]}
        if logprobs:
            request |= {"logprobs": True, "top_logprobs": 15}
        key = json.dumps([settings["base_url"], request], sort_keys=True)
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        with self.locks.setdefault(path.name, threading.Lock()):
            answer = read_answer(path)
            if answer is None:
                answer = self.endpoint.answer(request, typical)
                if answer is None:
                    return PLANNED
                write_json(path, {"base_url": settings["base_url"], "request": request,
                                  "answer": answer})
        return answer


def read_answer(path):
    """The ANSWER in a file, or None where there is none."""
    found = read_json(path)
    return found["answer"] if fits(found, {"answer": ANSWER}) else None


def ask_about_all(neurons, answers, word, settings, concurrency, title):
    """ask_about for each of the neurons, so many at a time -> a list of what it returns."""
    with ThreadPoolExecutor(concurrency) as pool:
        tasks = [pool.submit(ask_about, neuron, answers, word, settings) for neuron in neurons]
        try:
            for task in tqdm(as_completed(tasks), f"{title}: asking", len(tasks), leave=False,
                             unit=" neurons"):
                task.result()
        except BaseException:
            answers.endpoint.closed = True  # the threads end after the answers that are on the way
            pool.shutdown(cancel_futures=True)
            raise
    return [task.result() for task in tasks]


# --------------------------------------------------------------------------------- one run's models


def sample_units(config, settings):
    """The (layer, neuron) pairs that are looked at, sorted: settings["neurons"] of every layer,
    the same of every model of this size."""
    M = 4 * config.n_embd
    rng = np.random.default_rng(settings["seed"])
    units = []
    for layer in range(config.n_layer):
        chosen = range(M)
        if settings["neurons"] is not None and settings["neurons"] < M:
            chosen = np.sort(rng.choice(M, settings["neurons"], replace=False)).tolist()
        units += [(layer, neuron) for neuron in chosen]
    return units


def reader_of(model, units):
    """A function of idx (B, T) -> the activations (B, T, U) of these (layer, neuron) pairs."""
    layers = sorted({layer for layer, _ in units})
    sites = [Site(model, layer, "mlp_act") for layer in layers]
    places = [layers.index(layer) * sites[0].d + neuron for layer, neuron in units]
    columns = torch.tensor(places, device=model.lm_head.weight.device)
    if places == list(range(places[0], places[0] + len(places))):
        columns = slice(places[0], places[0] + len(places))  # a view: no 100 MB are copied

    def activate(idx):
        return read_sites(sites, idx)[..., columns]
    return activate


GEOMETRY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "attention_layers",
            "window_size", "embd_std")


def random_model(geometry, seed):
    """A model of this geometry, {name: value}, with random weights and no gates."""
    return untrained(GPTNeoConfig(**geometry, ablation="none"), seed)


class Work(NamedTuple):
    """All it takes to explain the neurons of one run's models."""

    settings: dict
    texts: Texts
    word: object  # a function: token -> its text
    answers: object  # Answers of a language model, or None
    concurrency: int
    stop: object  # a config.StopRequest


def explain_units(model, units, work, title):
    """The entries of explain_neurons.json of these (layer, neuron) pairs. Raises Stopped."""
    activate, texts, stop = reader_of(model, units), work.texts, work.stop
    means = CorpusMeans(activate, texts, len(units), stop, title)
    neurons = find_records(activate, units, texts, stop, title)
    entries = []
    for unit, neuron in enumerate(neurons):
        table = means.table(unit)
        if work.settings["lookup"] == "records":
            table = lookup_table(neuron.train, len(table.values), means.mean[unit])
        entries.append(explain_by_table(neuron, table, work.word))
    if work.answers is None:
        return entries
    found = ask_about_all(
        neurons, work.answers, work.word, work.settings, work.concurrency, title)
    for entry, by_model in zip(entries, found):
        scores = {name: entry.pop(name) for name in ("score", "random_score", "reason")
                  if name in entry}
        entry |= {**by_model, "tokens": [], "lookup": scores}
    return entries


def explain_model(model, work, title, done, save):
    """Entries of all neurons of a model are added to done, which may hold some of them already;
    save() is called after every NEURONS_AT_ONCE neurons. Raises Stopped."""
    model.to(work.texts.search.device)
    units = sample_units(model.config, work.settings)
    for first in range(len(done), len(units), NEURONS_AT_ONCE):
        part = units[first : first + NEURONS_AT_ONCE]
        layers = "layer {}" if part[0][0] == part[-1][0] else "layers {} to {}"
        layers = layers.format(part[0][0], part[-1][0])
        done += explain_units(model, part, work, f"{title}, {layers}")
        save()


# ------------------------------------------------------------------------------------ what is found


def mean_of(values):
    """(mean, standard error); None where there are too few."""
    mean = statistics.fmean(values) if values else None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return mean, error


def summary(scores):
    """{name: number or list} of dicts with "score", "random_score" and, with None, "reason"."""
    defined = [one["score"] for one in scores if one["score"] is not None]
    at_random = [one["random_score"] for one in scores if one["random_score"] is not None]
    reasons = Counter(one["reason"] for one in scores if one["score"] is None)
    row = {"neurons": len(scores), "scored": len(defined), "undefined": len(scores) - len(defined),
           "reasons": dict(reasons.most_common())}
    row["mean"], row["se"] = mean_of(defined)
    row["random_mean"], row["random_se"] = mean_of(at_random)
    row["random_scored"] = len(at_random)
    row["histogram"] = np.histogram(defined, BINS, (-1, 1))[0].tolist()
    return row


def summaries(scores):
    """{"layers": a summary of every layer, "all": of all}; scores as above, with "layer"."""
    layers = []
    for layer in sorted({one["layer"] for one in scores}):
        layers.append({"layer": layer} | summary([one for one in scores if one["layer"] == layer]))
    return {"layers": layers, "all": summary(scores)}


def facts_of(entries, with_answers):
    """What explain.json says of a model's neurons."""
    facts = summaries(entries)
    if with_answers:
        facts["lookup"] = summaries(
            [{"layer": entry["layer"], **entry["lookup"]} for entry in entries])
        used = Counter()
        for entry in entries:
            used.update(entry["answers"])
        facts["answers"] = dict(used)
    return facts


def explain_run(job, title, controls, endpoint, args, device, stop):
    """Explains and scores the neurons of one run, or goes on with it -> its facts. Raises Stopped.

    controls: {geometry: facts} of random models that are done already; it grows.
    """
    state = job.state or {"model": [], "control": [], "seconds": {"model": 0.0, "control": 0.0}}
    work = prepare_work(job, endpoint, args, device, stop)

    def explain(part, model):
        """The facts of the run's model or of its control."""
        began = time.monotonic() - state["seconds"][part]

        def save():
            state["seconds"][part] = time.monotonic() - began
            job.save(state)

        name = title if part == "model" else f"{title}, random weights"
        explain_model(model, work, name, state[part], save)
        return facts_of(state[part], work.answers) | {"seconds": state["seconds"][part]}

    facts = explain("model", job.run.model) | {"control": None}
    if job.settings["control"]:
        geometry = geometry_of(job)
        if str(geometry) not in controls:
            control = explain("control", random_model(geometry, job.settings["seed"]))
            controls[str(geometry)] = control | {"geometry": geometry}
        facts["control"] = controls[str(geometry)]
    job.save_neurons(state["model"])
    draw_scores(job.path(".png"), [{"run": str(job.run.path), "settings": job.settings, **facts}])
    return facts


def geometry_of(job):
    return {name: getattr(job.run.model.config, name) for name in GEOMETRY}


def prepare_work(job, endpoint, args, device, stop):
    """The Work of a Job with inputs (train, val, meta). Raises UserError."""
    train, val, meta = job.inputs
    texts = choose_texts(train, val, meta, job.settings, device)
    tokenizer = load_tokenizer(job.run.tokenizer)

    @cache
    def word(token):
        return tokenizer.decode_single_token_bytes(token).decode(errors="replace")

    answers = None
    if endpoint:
        folder = args.cache or job.path("_cache")
        answers = Answers(endpoint, folder, job.settings)
    return Work(job.settings, texts, word, answers, args.concurrency, stop)


def preview(jobs, controls, args, device, stop):
    """Print what the language model would be asked, and what it would cost; nothing is written."""
    rows, total = [], Counter(calls=0, prompt_tokens=0, answer_tokens=0)
    for job in jobs:
        if job.result:
            continue
        counted, endpoint = job.state or {"model": [], "control": []}, Preview()
        work = prepare_work(job, endpoint, args, device, stop)
        explain_model(job.run.model, work, str(job.run.path), counted["model"], nothing)
        geometry = geometry_of(job)
        if job.settings["control"] and str(geometry) not in controls:
            model = random_model(geometry, job.settings["seed"])
            explain_model(model, work, "random weights", counted["control"], nothing)
            controls[str(geometry)] = None  # it is counted
        rows.append({"run": str(job.run.path), **endpoint.planned})
        total.update(endpoint.planned)
    rows.append({"run": "all", **total})
    for row in rows if args.price_in is not None else ():
        row["cost"] = cost_of(row, args)
    print_table(rows, PREVIEW_COLUMNS)
    print("calls whose answers are not kept yet; tokens are estimates, those of answers rough ones")


def nothing():
    """What a preview saves."""


def cost_of(tokens, args):
    """In the currency of --price_in and --price_out."""
    paid = tokens["prompt_tokens"] * args.price_in + tokens["answer_tokens"] * args.price_out
    return paid / 1e6


# ------------------------------------------------------------------------------------- the picture


def draw_histogram(axes, facts, label, color, style="-"):
    """The shares of a model's scores, and their mean."""
    row = facts["all"]
    if row["mean"] is None:
        return
    shares, edges = np.array(row["histogram"]) / row["scored"], np.linspace(-1, 1, BINS + 1)
    first = min(np.flatnonzero(shares)[0], BINS // 2)  # below 0 only as far as there are scores
    shares, edges = shares[first:], edges[first:]
    if style == "-":
        axes.stairs(shares, edges, color=color, fill=True, alpha=0.25)
    axes.stairs(shares, edges, color=color, ls=style, label=label)
    axes.axvline(row["mean"], color=color, ls=style, lw=1.5)


def draw_layers(axes, facts, color, style="-"):
    """Means by layer with their standard errors."""
    rows = [row for row in facts["layers"] if row["mean"] is not None]
    axes.errorbar([row["layer"] for row in rows], [row["mean"] for row in rows],
                  [row["se"] or 0 for row in rows], color=color, ls=style, marker="o", ms=4,
                  capsize=2)


def draw_scores(path, results):
    """Figure 2, right: histograms of scores over each other with their means, means by layer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    scores, layers = figure.subplots(1, 2)
    colors = colormaps["tab10" if len(results) <= 10 else "tab20"].colors
    for place, result in enumerate(results):
        color = colors[place % len(colors)]
        draw_histogram(scores, result, result["run"], color)
        draw_layers(layers, result, color)
    for place, (name, control) in enumerate(controls_of(results)):
        color = str(0.4 + 0.15 * (place % 4))  # a grey
        draw_histogram(scores, control, name, color, "--")
        draw_layers(layers, control, color, "--")
    scores.set(xlabel="explanation score", ylabel="share of neurons")
    scores.set_title("a line is a mean", fontsize="medium")
    layers.set(xlabel="layer", ylabel="mean explanation score")
    layers.xaxis.get_major_locator().set_params(integer=True)
    layers.set_title("± standard error over neurons", fontsize="medium")
    for axes in (scores, layers):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small", frameon=False, ncols=2)
    figure.suptitle(explained_by(results[0]["settings"]), fontsize="medium")
    save_figure(path, figure)


def controls_of(results):
    """(name, facts) of the controls in results, each once: runs of one geometry share one."""
    seen = []
    for result in results:
        control = result["control"]
        if control is None or control["geometry"] in seen:
            continue
        seen.append(control["geometry"])
        name = "random weights"
        if len(seen) > 1:
            name += f", geometry of {result['run']}"
        yield name, control


# --------------------------------------------------------------------------------- the command line

SCORES = {"score": MAYBE, "random_score": MAYBE}
ENTRY = {"layer": int, "neuron": int, **SCORES, "explanation": str, "tokens": list}
ROW = {"neurons": int, "scored": int, "undefined": int, "mean": MAYBE, "se": MAYBE,
       "random_mean": MAYBE, "random_se": MAYBE, "histogram": list}
FACTS = {"layers": [ROW | {"layer": int}], "all": ROW, "seconds": NUMBER}
BY_MODEL = {"lookup": {"layers": [ROW], "all": ROW}, "answers": dict}  # a language model's too
STATE = {"model": [ENTRY], "control": [ENTRY],
         "seconds": {"model": NUMBER, "control": NUMBER}}

COLUMNS = [  # heading, how to print it; a column that no row has is left out
    ("run", column("run")),
    ("explained by", column("by")),
    ("neurons", column("neurons", ",")),
    ("scored", column("scored", ",")),
    ("score", number("mean", ".3f")),
    ("random text alone", number("random", ".3f")),
    ("answers", column("requests", ",")),
    ("unreadable", column("unreadable", ",")),
    ("tokens", column("paid", ",")),
    ("seconds", column("seconds", ".0f")),
]
PREVIEW_COLUMNS = [
    ("run", column("run")),
    ("calls", column("calls", ",")),
    ("tokens in", column("prompt_tokens", ",")),
    ("tokens out", column("answer_tokens", ",")),
    ("cost", column("cost", ",.2f")),
]
# what only a language model needs: default, type, meaning
MODEL_KNOBS = {
    "base_url": ("https://api.openai.com/v1", str, "address of the API"),
    "model": (None, str, "the model's name there"),
    "simulation": ("sparse", str, "sparse: the model writes the tokens that fire; full: every "
                   "token, and levels are expected ones where the server gives logprobs"),
    "temperature": (0.0, float, "some models take only 1"),
    "answer_tokens": (1000, int, "an answer is cut off there, and then unreadable"),
    "cache": (None, str, "folder of the answers, which runs can share; by default "
              "explain_openai_cache beside each result"),
    "concurrency": (4, int, "requests at a time"),
    "retries": (8, int, "attempts after a failed one: limits of rate, server errors, silence"),
    "timeout": (120.0, float, "seconds to wait for an answer"),
    "max_tokens_total": (None, int, "tokens that this command may pay, in and out; then it stops"),
    "price_in": (None, float, "for --dry_run: the price of a million tokens of questions"),
    "price_out": (None, float, "and of answers"),
}
DECISIVE = ("base_url", "model", "simulation", "temperature", "answer_tokens")


def explained_by(settings):
    """Who explained and simulated, in a few words."""
    if settings["explainer"] == "lookup":
        return f"table, {settings['lookup']}"
    return f"{settings['model']}, {settings['simulation']}"


def table_row(name, by, facts):
    """One line of the table: of a model, by one explainer."""
    row = facts["all"]
    found = {"run": name, "by": by, "neurons": row["neurons"], "scored": row["scored"],
             "mean": row["mean"], "mean_se": row["se"], "random": row["random_mean"],
             "random_se": row["random_se"], "seconds": facts.get("seconds")}
    found |= facts.get("answers", {})
    if "requests" in found:
        found["paid"] = found["prompt_tokens"] + found["answer_tokens"]
    found |= {f"layer {one['layer']}": one["mean"] for one in facts["layers"]}
    found |= {f"layer {one['layer']}_se": one["se"] for one in facts["layers"]}
    return {key: value for key, value in found.items() if value is not None}


def table_rows(results):
    """The rows of all models and controls; of a language model's, also by the table."""
    settings = results[0]["settings"]
    models = [(result["run"], result) for result in results]
    for name, facts in [*models, *controls_of(results)]:
        yield table_row(name, explained_by(settings), facts)
        if "lookup" in facts:
            yield table_row(name, f"table, {settings['lookup']}", facts["lookup"])


def print_results(results):
    rows = list(table_rows(results))
    layers = sorted({row["layer"] for result in results for row in result["layers"]})
    print()
    print_table(rows, COLUMNS)
    print()
    by_layer = [(f"layer {layer}", number(f"layer {layer}", ".3f")) for layer in layers]
    print_table(rows, [*COLUMNS[:2], *by_layer])
    print("± is the standard error over neurons")
    for result in results:
        reasons = result["all"]["reasons"]
        words = ", ".join(f"{count:,} since {reason}" for reason, count in reasons.items())
        if words:
            print(f"{result['run']}: not scored are {words}")
        without = result.get("answers", {}).get("without_logprobs")
        if without:
            print(f"warning: {result['run']}: {without:,} answers had no logprobs: levels there "
                  f"are what was written")


def is_result(result):
    """Whether a result is whole: the table and the picture are made of it."""
    form = FACTS
    if result["settings"]["explainer"] == "openai":
        form = FACTS | BY_MODEL
    control = {"control": form | {"geometry": dict}} if result["settings"]["control"] else {}
    return fits(result, form | {"control": object}) and fits(result, control)


def is_state(state):
    """Whether explain_run can go on from it."""
    return fits(state, STATE)


def make_parser():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--data", help="prepared data to use (default: the run's own)")
    add("--explainer", choices=["lookup", "openai"], default="lookup",
        help="a table, or a language model (default lookup)")
    add("--lookup", choices=["corpus", "records"], default="corpus",
        help="the table's means: over training text, or over the windows that a language model "
             "explains from (default corpus)")
    add("--tokens", type=int, default=500_000,
        help="of each split that are read at most, spread over it (default 500000)")
    add("--window", type=int, default=64, help="tokens of a record (default 64)")
    add("--neurons", type=int, metavar="N", help="a sample of N of every layer (default all)")
    add("--seed", type=int, default=0,
        help="of that sample, the random windows and the random weights (default 0)")
    add("--no_control", action="store_true", help="leave the model with random weights out")
    add("--plot", metavar="FILE", help="one picture of all these runs (.png, .pdf or .svg)")
    add("--force", action="store_true",
        help="replace results made with other settings or of other weights")
    for name, (default, kind, note) in MODEL_KNOBS.items():
        shown = "" if default is None else f" (default {default})"
        add(f"--{name}", type=kind, help=f"openai: {note}{shown}")
    add("--dry_run", action="store_true",
        help="openai: ask nothing, print calls, tokens and, with prices, the cost")
    return parser


def parse_arguments(argv):
    """Command-line words -> arguments. Raises UserError."""
    args = make_parser().parse_args(argv)
    for name in ("tokens", "window", "neurons"):
        check_range(args, name, 1, 2**62)
    check_range(args, "seed", 0, 2**63 - 1)
    if args.explainer == "openai":
        check_model_knobs(args)
    for name in (*MODEL_KNOBS, "dry_run") if args.explainer == "lookup" else ():
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name} has no effect without --explainer=openai: add that or "
                            f"drop it")
    check_picture(args.plot)
    return args


def check_model_knobs(args):
    """Fills in defaults. Raises UserError."""
    for name, (default, _, _) in MODEL_KNOBS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if not args.model:
        raise UserError("--explainer=openai needs --model: the name of a model at "
                        f"{args.base_url}")
    if not re.match("https?://[^/@]+(/[^@]*)?$", args.base_url):
        raise UserError(f"--base_url={args.base_url} must be an address such as "
                        f"http://localhost:8000/v1, without a name or key in it")
    if args.simulation not in ("sparse", "full"):
        raise UserError(f"--simulation={args.simulation} must be sparse or full")
    if args.cache == "":
        raise UserError("--cache= must name a folder")
    check_range(args, "temperature", 0, 2)
    check_range(args, "answer_tokens", 1, 10**6)
    check_range(args, "concurrency", 1, 1000)
    check_range(args, "retries", 0, 1000)
    check_range(args, "timeout", 0.1, 10**6)
    check_range(args, "max_tokens_total", 1)
    check_range(args, "price_in", 0, 10**6)
    check_range(args, "price_out", 0, 10**6)
    if (args.price_in is None) != (args.price_out is None):
        raise UserError("--price_in and --price_out go together: give both")


def open_job(path, args, load):
    """A run as a Job with its inputs (train, val, meta), looked over. Raises UserError, ModelError.

    load: load_tokens or the like.
    """
    run = open_run(path)
    folder, meta = find_data(run, args.data)
    block_size = run.model.config.block_size
    if args.window > block_size:
        raise UserError(f"--window={args.window}: {path} reads at most {block_size} tokens, "
                        f"lower it")
    settings = {"data": meta["checksum"], "explainer": args.explainer, "lookup": args.lookup,
                "window": args.window, "tokens": args.tokens, "neurons": args.neurons,
                "seed": args.seed, "control": not args.no_control, "prompts": None}
    settings |= {name: getattr(args, name) for name in DECISIVE}
    name = "explain"
    if args.explainer == "openai":
        name, settings["prompts"] = "explain_openai", PROMPTS
    job = Job(run, name, settings, {"_neurons.json": partial(read_neurons, entry=ENTRY)},
              [".png"], args.force, is_result, is_state)
    if not job.result:
        job.inputs = load(folder, "train"), load(folder, "val"), meta
    return job


def make_folder(folder):
    """The folder of the answers, which must be writable. Raises UserError."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    check_writable(Path(folder, "answer"))


def main():
    args = parse_arguments(sys.argv[1:])
    device = knobs.pick_device(args.device)
    load = cache(load_tokens)  # each split once: every byte of it is verified
    jobs = [open_job(path, args, load) for path in run_paths(args.runs)]
    stop = knobs.StopRequest()
    endpoint = None
    if args.explainer == "openai" and not args.dry_run:
        endpoint = Endpoint(args, stop)
        for job in jobs:
            make_folder(args.cache or job.path("_cache"))
    controls = {str(job.result["control"]["geometry"]): job.result["control"]
                for job in jobs if job.result and job.result["control"]}
    try:
        if args.dry_run:
            return preview(jobs, controls, args, device, stop)
        measure = partial(explain_run, controls=controls, endpoint=endpoint, args=args,
                          device=device, stop=stop)
        results = results_of(jobs, measure, device)
    except OutOfTokens:
        raise SystemExit(f"stopped: another answer might exceed --max_tokens_total="
                         f"{args.max_tokens_total} ({endpoint.spent:,} tokens are spent): the same "
                         f"command goes on from here") from None
    except Stopped:
        raise SystemExit("stopped: the same command again goes on from here") from None
    print_results(results)
    if args.plot:
        draw_scores(args.plot, results)


if __name__ == "__main__":
    knobs.cli(main)
