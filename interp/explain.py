"""Explanation scores: how well a short explanation predicts where a neuron fires (paper: Figure 2).

    python -m interp.explain out/baseline out/local_k2     every MLP neuron, explained by a table
    python -m interp.explain out/* --plot scores.png       histograms of all runs, means by layer
    python -m interp.explain out/local_k2 --model NAME --base_url http://localhost:8000/v1 \\
        --neurons 50 --dry_run      the cost of a language model; without --dry_run, its scores

The method is that of Bills et al. 2023, on the clean stream. A record is a window of 64 tokens
within one story, read alone. The score is the Pearson correlation of true and simulated activations
over 5 of a neuron's 20 strongest records and 5 random ones, of the validation split. An undefined
score is null with its reason, never 0. Means are over neurons with a score.

The explanation is a table of the neuron's mean activation at each token of the training split. With
--model it is a sentence by a language model behind any API like OpenAI's, from 5 other strong
records; the key is in OPENAI_API_KEY. The table's score on the same text is reported too. The
control is a model with random weights, because much of a score needs no learning.

Writes explain.json, explain_neurons.json and explain.png beside the checkpoint; with --model, the
same with explain_openai in place of explain. Answers are added to explain_openai_answers.jsonl as
they arrive, so none is paid for twice. The same command continues after an interruption.
B windows of T tokens; U neurons at a time; V vocabulary; M neurons of a layer; n tokens of a batch.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import re
import statistics
from collections import Counter, defaultdict, namedtuple
from functools import cache, partial
from itertools import groupby

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import config as knobs
from eval import open_runs, plain, print_table, run_parser, save_figure
from interp.activations import (
    Site, Snippet, Strongest, Text, read_sites, token_text, untrained, windows_at)
from interp.results import Result, measure_all
from model import GPTNeoConfig
from prepare import UserError, load_tokenizer, load_tokens

TOP, RANDOM = 20, 15  # records of a neuron
# Bills et al. give the strongest to train, calibration, valid and test in turn, the random ones to
# the last three. Calibration and test are not used here.
TRAIN, VALID, RANDOM_VALID = slice(0, TOP, 4), slice(2, TOP, 4), slice(1, RANDOM, 3)
FIVE = 5  # records in each of TRAIN, VALID and RANDOM_VALID
LEVELS = 10  # a language model sees and gives activations as whole numbers from 0 to this
NEURONS_AT_ONCE = 2048  # held in memory; the state is saved after each of these groups
RETRIES = 8  # of a question, after rate limits, server errors and timeouts
OFTEN = 5  # tokens that occur less often in the text are not shown: their means are noise
BINS = np.linspace(-1, 1, 41)  # edges of the histogram of scores
GEOMETRY = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "attention_layers",
            "window_size", "embd_std")  # what the control shares with a run
# peak: the largest activation. Lists of Snippets: train, to explain the neuron from, and scored, to
# score the explanation on, FIVE strong ones and FIVE random ones
Neuron = namedtuple("Neuron", "layer neuron peak train scored")
in_quotes = partial(json.dumps, ensure_ascii=False)  # a token with its spaces, such as " cat"

# -------------------------------------------------------------------------------------- the records


def story_windows(tokens, eot, T):
    """Windows of T tokens that each lie within one story and do not overlap: where they begin, and
    the numbers of their stories, both rising."""
    ends = np.flatnonzero(tokens == eot)
    begins = np.concatenate(([0], ends + 1))[:-1]
    counts, rest = np.divmod(ends + 1 - begins, T)  # an end-of-text belongs to its story
    stories = np.arange(len(ends))
    # tokens that fill no window are left out: at the beginning of every second story, else the end
    firsts = begins + rest * (stories % 2)
    which = np.repeat(stories, counts)
    places = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return firsts[which] + T * places, which


def choose_texts(train, val, eot, settings, device):
    """What is read for every neuron: the Text for the table; the Text that is searched for the
    strongest records; where the random records, from other stories, begin. Raises UserError."""
    T = settings["window"]

    def some_of(windows):
        """Some of these windows, evenly spread: at most settings["tokens"] tokens."""
        count = min(max(TOP, settings["tokens"] // T), len(windows))
        return windows[np.linspace(0, len(windows), count, endpoint=False).astype(np.int64)]

    starts, stories = story_windows(val, eot, T)
    rng, there = np.random.default_rng(settings["seed"]), np.unique(stories)
    chosen = rng.choice(there, min(RANDOM, len(there)), replace=False)
    at_random = [rng.choice(starts[stories == story]) for story in chosen]
    others = some_of(np.flatnonzero(~np.isin(stories, chosen)))
    if len(np.unique(stories[others])) < TOP:
        raise UserError(f"fewer than {TOP + RANDOM} stories of {T} tokens: choose other --data, a "
                        f"smaller --window or more --tokens")
    search = Text(val, eot, T, device, starts=starts[others])
    corpus = Text(train, eot, T, device, starts=some_of(story_windows(train, eot, T)[0]))
    return corpus, search, at_random[RANDOM_VALID]


def find_records(activate, units, search, random_starts, title):
    """Yields the Neurons of these units. activate: idx (B, T) -> (B, T, U), those U units."""
    best, T = Strongest(TOP), search.T
    for x, positions, stories in search.read(activate, f"{title}: strongest windows"):
        best.add(x, positions, stories)
    values, positions = best.found()  # each (U, TOP)
    used = np.concatenate((positions[:, TRAIN], positions[:, VALID]), 1)  # (U, 10)
    # a window lies within one story, so T - 1 tokens on both sides give exactly this window
    strong = search.snippets(activate, used, T - 1, T - 1)
    idx = windows_at(search.tokens, random_starts, T, search.device)  # (5, T)
    at_random = activate(idx).permute(2, 0, 1).cpu().numpy()  # (U, 5, T)
    for unit, peak, top, others in zip(units, values[:, 0].tolist(), strong, at_random):
        pairs = zip(idx.tolist(), others)
        scored = top[FIVE:] + [Snippet(*pair, peak=0) for pair in pairs]  # these have no peak
        yield Neuron(*unit, peak, top[:FIVE], scored)


# ------------------------------------------------------------------------- scores, tables of tokens


def discretise(values, largest):
    """Activations as whole numbers from 0 to LEVELS: min(10, floor(10 relu(a) / largest))."""
    scaled = LEVELS * np.maximum(values, 0) / largest
    return np.minimum(LEVELS, np.floor(scaled)).astype(int)


def correlation(real, simulated):
    """Pearson's correlation of two lists of sequences, concatenated, since that of a single one is
    often undefined -> (score, None), or (None, why there is none)."""
    real, simulated = np.concatenate(real).astype(float), np.concatenate(simulated).astype(float)
    if np.ptp(real) == 0:
        return None, "its activations are constant"
    if np.ptp(simulated) == 0:
        return None, "its simulation is constant"
    real, simulated = real - real.mean(), simulated - simulated.mean()
    score = (real / np.linalg.norm(real)) @ (simulated / np.linalg.norm(simulated))
    return float(np.clip(score, -1, 1)), None  # rounding can lead outside this range


def entry_of(neuron, explanation, simulated, unreadable=0):
    """The entry of a Neuron in explain_neurons.json. simulated: a sequence for each scored record.
    Unreadable answers leave it without a score: that of the others would not be comparable."""
    score = random_score = None
    if unreadable:
        reason = f"{unreadable} answers about it could not be read"
    elif neuron.peak <= 0:
        reason = "it never fires"
    else:
        real = [record.values for record in neuron.scored]
        score, reason = correlation(real, simulated)
        random_score, of_random = correlation(real[FIVE:], simulated[FIVE:])
        reason = reason or (of_random and f"in random text {of_random}")
    return {"layer": neuron.layer, "neuron": neuron.neuron, "score": score,
            "random_score": random_score, "reason": reason, "explanation": explanation}


def lookup_table(batches, V, U):
    """The mean activation of U neurons at each token (Bills et al. 2023, token lookup), (V, U), and
    how often each token occurs (V). A token that does not occur has the mean over all tokens.
    batches: tokens (n) and activations (n, U)."""
    sums, counts = torch.zeros(V, U).double(), np.zeros(V, dtype=int)
    for tokens, x in batches:
        sums.index_add_(0, torch.from_numpy(tokens), x.cpu().double())
        counts += np.bincount(tokens, minlength=V)
    values = sums.numpy()
    mean = values.sum(0) / counts.sum()  # (U)
    values /= np.maximum(counts, 1)[:, None]  # in place: it is the largest thing here
    values[counts == 0] = mean
    return values, counts


def explain_by_table(neuron, values, counts, word):
    """The entry of a Neuron. values (V): its column of lookup_table. The explanation: the ten
    tokens with the largest values above 0."""
    often = np.flatnonzero(counts >= OFTEN)
    order = often[np.argsort(-values[often], kind="stable")[:10]]
    explanation = ", ".join(f"{in_quotes(word(int(token)))} {values[token]:.2g}"
                            for token in order if values[token] > 0)
    return entry_of(neuron, explanation, [values[record.tokens] for record in neuron.scored])


# -------------------------------------------------- a language model: its questions and its answers

EXPLAIN = """\
You study one neuron of a small language model. Below are excerpts of text in which it fires. Each \
line is one token, in JSON quotes, then a tab, then how strongly the neuron fires at that token: \
from 0, not at all, to 10, as strongly as it ever does. The model reads from top to bottom, so a \
number depends on this token and those before it, never on later ones.

Find what the tokens with high numbers, or what comes right before them, have in common that other \
tokens lack. Answer with one phrase of at most 20 words that begins with "fires on", and with \
nothing else."""
SIMULATE = """\
A neuron of a small language model is described so: {}

You get an excerpt of text. Each line is the number of a token, then a tab, then the token in JSON \
quotes. Going by the description alone, predict how strongly the neuron fires at each token, as a \
whole number from 0, not at all, to 10, as strongly as it can. """
FORMS = {"sparse": """\
Most tokens get 0: leave these out. Write one line for each of the others, in order: the token's \
number, a tab, your prediction. Nothing else. If every token gets 0, write the word none.""",
         "full": """\
Write one line for each token, in order, none left out: the token's number, a tab, your \
prediction. Nothing else."""}
PROMPTS = hashlib.sha256(repr((EXPLAIN, SIMULATE, FORMS)).encode()).hexdigest()[:8]
LONGEST = 500  # characters of an explanation; longer answers are not a phrase
# a line of a simulation: number of the token, maybe the token in quotes, level
GAP = r"(?:[ \t:,|=]|-+>|=>|→)+"
LINE = re.compile(rf'^[ \t]*(?:[-*|] *)?(\d{{1,6}}){GAP}(?:"(?:\\.|[^"\\\n])*"{GAP})?'
                  r"(\d{1,2})(?:\.0*)?[ \t\r|]*$", re.MULTILINE)


def explain_question(neuron, word):
    """The two messages that ask for an explanation of a Neuron: EXPLAIN, its training records."""
    excerpts = []
    for place, record in enumerate(neuron.train, 1):
        pairs = zip(record.tokens, discretise(record.values, neuron.peak))
        lines = [f"{in_quotes(word(token))}\t{level}" for token, level in pairs]
        excerpts.append("\n".join([f"Excerpt {place}", *lines]))
    return EXPLAIN, "\n\n".join(excerpts)


def simulate_question(explanation, tokens, word, form):
    """The two messages that ask what such a neuron does at these tokens. form: one of FORMS."""
    lines = [f"{place}\t{in_quotes(word(token))}" for place, token in enumerate(tokens, 1)]
    return SIMULATE.format(explanation) + FORMS[form], "\n".join(lines)


def read_explanation(text, logprobs):
    """-> (the phrase in an answer or None, 0 unclear lines)."""
    answer = text.rpartition("</think>")[2]
    text = re.sub(r"^\s*```\w*$", "", answer, flags=re.MULTILINE)
    text = re.sub(r"\A\W*explanation[\s*]*:[\s*]*", "", text, flags=re.IGNORECASE)
    phrase = " ".join(text.strip().partition("\n\n")[0].split())
    phrase = phrase.encode(errors="replace").decode()  # half a surrogate pair cannot be sent on
    return (phrase if 0 < len(phrase) <= LONGEST else None), 0


def read_simulation(text, logprobs, T, form):
    """-> (simulated activations, a list of T, or None if most lines are unclear; how many lines
    with digits, or in the full form how many tokens, are unclear)."""
    written, levels, answer = {}, {}, text.rpartition("</think>")[2]
    unclear = len(re.findall(r"^.*\d.*$", answer, re.MULTILINE))
    for match in LINE.finditer(text, len(text) - len(answer)):
        place, level = int(match[1]), int(match[2])
        in_range = 1 <= place <= T and level <= LEVELS
        if in_range and written.setdefault(place, level) == level:
            unclear -= 1
            levels[place] = expected_level(logprobs, match.start(2), level)
    if form == "full":
        unclear = max(unclear, T - len(levels))
    says_none = form == "sparse" and re.search(r"^\W*none\W*$", answer, re.I | re.M)
    if unclear > len(levels) or not (levels or says_none):
        return None, unclear
    return [levels.get(place, 0) for place in range(1, T + 1)], unclear


def expected_level(logprobs, at, written):
    """The expected_value of the token at this character of an answer, or the written level where
    the server gives no usable logprobs (the API's list)."""
    try:
        ends = np.cumsum([len(one["token"]) for one in logprobs])
        one = logprobs[np.searchsorted(ends, at, side="right")]
        tops = {top["token"]: top["logprob"] for top in [one, *one["top_logprobs"]]}
        # where a server's 10 is two tokens, the first of them counts as 10
        return expected_value((text if text != one["token"] else str(written), logprob)
                              for text, logprob in tops.items())
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return written


def expected_value(logprobs):
    """The mean level of a distribution over tokens, (text, log probability) pairs. Only whole
    numbers up to LEVELS count (Bills et al. 2023); ZeroDivisionError if there is none."""
    weights = Counter()
    for text, logprob in logprobs:
        if text.strip().isdecimal() and int(text) <= LEVELS and logprob <= 0:  # nor NaN
            weights[int(text)] += math.exp(logprob)
    return sum(level * weight for level, weight in weights.items()) / sum(weights.values())


def api_key():
    """The key. A local server may need none, but the openai package does."""
    return os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"


def without_secrets(text):
    """A text on one line, without the key; addresses without user, password and query."""
    text = re.sub(r"(?<=//)\S*@|\?\S*", "", str(text).replace(api_key(), "KEY"))
    return " ".join(text.split())[:200]


class Answers:
    """A language model's answers about one run. Each is paid for once, and saved as it arrives."""

    def __init__(self, args, path):
        self.args, self.path = args, path
        self.kept = {}  # hash of a request: what is kept of its answer
        self.calls = self.tokens = 0  # of questions in a dry run
        for line in path.read_text().split("\n") if path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                self.kept |= json.loads(line)
        if not re.fullmatch("[!-~]+", api_key()):
            raise UserError("OPENAI_API_KEY has characters that no key has")
        try:
            self.connect()  # before any work
        except Exception as error:  # many kinds: wrong proxy or certificates
            raise UserError(f"no connection can be opened, see the proxy and certificate variables "
                            f"of the environment: {without_secrets(error)}") from None

    def connect(self):
        """An openai.AsyncOpenAI. It retries automatically, and the bar shows why it waits."""
        import openai  # not needed for tables

        async def show(message):  # a request, or its response
            request = getattr(message, "request", message)
            self.bar.set_postfix(retry=request.headers.get("x-stainless-retry-count"),
                                 status=getattr(message, "status_code", "waiting"))

        http = openai.DefaultAsyncHttpxClient(
            event_hooks={"request": [show], "response": [show]})
        return openai.AsyncOpenAI(api_key=api_key(), base_url=self.args.base_url, http_client=http,
                                  timeout=self.args.timeout, max_retries=RETRIES)

    async def explain_all(self, neurons, word, title):
        self.free, self.locks = asyncio.Semaphore(self.args.concurrency), defaultdict(asyncio.Lock)
        with tqdm(total=len(neurons), desc=f"{title}: asking", leave=False) as self.bar:
            async with self.connect() as self.client:
                return await asyncio.gather(*(self.explain(one, word) for one in neurons))

    async def explain(self, neuron, word):
        """The entry of a Neuron, whose explanation and simulation are the model's."""
        used, form, explanation, simulated = Counter(), self.args.simulation, "", []
        if neuron.peak > 0:
            question = explain_question(neuron, word)
            explanation = await self.ask(question, read_explanation, used) or ""
        for record in neuron.scored if explanation else ():
            question = simulate_question(explanation, record.tokens, word, form)
            read = partial(read_simulation, T=len(record.tokens), form=form)
            simulated.append(await self.ask(question, read, used))
        self.bar.update()
        entry = entry_of(neuron, explanation, simulated, used["unreadable"])
        return entry | {"answers": dict(used)}

    async def ask(self, question, read, used):
        """What read(text, logprobs) finds in an answer, or None. Its cost is added to `used`."""
        args, (system, user) = self.args, question
        request = {"model": args.model, "temperature": args.temperature, "messages": [
            {"role": "system", "content": system}, {"role": "user", "content": user}],
            "max_completion_tokens": args.answer_tokens}
        if args.simulation == "full":
            request |= {"logprobs": True, "top_logprobs": 15}
        key = hashlib.sha256(json.dumps([args.base_url, request]).encode()).hexdigest()
        async with self.locks[key]:  # of two equal questions only one is asked
            if key not in self.kept and args.dry_run:
                self.calls += 1
                self.tokens += len(re.findall(r"\w+|[^\w ]", system + user))  # about
                used.update(unreadable=1)  # so that nothing is scored
                return read("1\t0", None)[0]
            if key not in self.kept:
                self.kept[key] = await self.pay(request, read)
                with open(self.path, "a") as file:
                    file.write("\n" + json.dumps({key: self.kept[key]}))
        used.update(self.kept[key]["used"])
        return self.kept[key]["value"]

    async def pay(self, request, read):
        """Ask the server. -> what is kept of the answer: {"text", "value", "used": counts}."""
        await self.free.acquire()
        try:  # the client's own timeout does not end if bytes trickle
            async with asyncio.timeout(self.args.timeout * (RETRIES + 1)):
                response = await self.client.chat.completions.with_raw_response.create(**request)
            found = json.loads(response.text)
            choice, usage = found["choices"][0], found.get("usage") or {}
            text = choice["message"].get("content") or ""  # null for a refusal
            logprobs = (choice.get("logprobs") or {}).get("content")
            value, unclear = read(text, logprobs)
        except Exception as error:  # many kinds: the network, or not a chat completion
            kind, said = type(error).__name__, without_secrets(error.__cause__ or error)
            raise UserError(f"no answer from {self.args.server} ({kind} {said} {self.bar.postfix}):"
                            f" the same command continues, and keeps all answers so far") from None
        self.free.release()  # not after an error: waiting questions are cancelled
        value = None if choice.get("finish_reason") == "length" else value
        return {"text": text, "value": value, "used": {
            "prompt_tokens": usage.get("prompt_tokens") or 0,
            "answer_tokens": usage.get("completion_tokens") or 0,
            "requests": 1, "unreadable": int(value is None), "unclear_lines": unclear,
            "without_logprobs": int("logprobs" in request and not logprobs)}}


# --------------------------------------------------------------------------------- one run's models


def sample_units(config, settings):
    """The (layer, neuron) pairs to measure, sorted: settings["neurons"] of every layer."""
    M, rng = 4 * config.n_embd, np.random.default_rng(settings["seed"])
    count = min(settings["neurons"] or M, M)
    return [(layer, neuron) for layer in range(config.n_layer)
            for neuron in np.sort(rng.choice(M, count, replace=False)).tolist()]


def reader_of(model, units):
    """A function of idx (B, T) -> the activations (B, T, U) of these (layer, neuron) pairs."""
    layers = sorted({layer for layer, _ in units})
    sites = [Site(model, layer, "mlp_act") for layer in layers]
    places = [layers.index(layer) * sites[0].d + neuron for layer, neuron in units]
    return lambda idx: read_sites(sites, idx)[..., places]


def explain_units(model, units, texts, word, answers, title):
    """The entries of explain_neurons.json of these (layer, neuron) pairs."""
    corpus, search, random_starts = texts
    activate = reader_of(model, units)
    batches = ((corpus.tokens[positions].astype(np.int64), x)
               for x, positions, _ in corpus.read(activate, f"{title}: means by token"))
    values, counts = lookup_table(batches, model.config.vocab_size, len(units))
    neurons = [*find_records(activate, units, search, random_starts, title)]
    tables = [explain_by_table(neuron, of_unit, counts, word)
              for neuron, of_unit in zip(neurons, values.T)]
    if not answers:
        return tables
    entries = asyncio.run(answers.explain_all(neurons, word, title))
    return [entry | {"lookup": table} for entry, table in zip(entries, tables)]


def explain_run(result, title, results, args, device):
    """The facts of a Result. Of all results, those with the same geometry share a control."""
    run, settings = result.run, result.key["settings"]
    answers = Answers(args, result.path("_answers.jsonl")) if args.model else None
    state = result.state or {"model": [], "control": []}
    train, val = load_tokens(run.folder, "train"), load_tokens(run.folder, "val")
    texts = choose_texts(train, val, run.meta["eot"], settings, device)
    word = cache(partial(token_text, load_tokenizer(run.tokenizer)))

    def explain(model, part, title):
        units, entries = sample_units(model.config, settings), state[part]
        for first in range(len(entries), len(units), NEURONS_AT_ONCE):
            entries += explain_units(model.to(device), units[first : first + NEURONS_AT_ONCE],
                                     texts, word, answers, title)
            if not args.dry_run:
                result.save(state)
        facts = facts_of(entries)
        if answers:
            facts["lookup"] = facts_of([entry["lookup"] for entry in entries])
            facts["answers"] = pd.DataFrame([entry["answers"] for entry in entries]).sum().to_dict()
        return facts

    facts = explain(run.model, "model", title)
    geometry = {name: getattr(run.model.config, name) for name in GEOMETRY}
    controls = [other.facts["control"] for other in results if other.facts]
    controls = [control for control in controls if control and control["geometry"] == geometry]
    if settings["control"] and not controls:
        model = untrained(GPTNeoConfig(**geometry, ablation="none"), settings["seed"])
        controls = [explain(model, "control", f"{title}, random weights") | {"geometry": geometry}]
    facts["control"] = controls[0] if controls else None
    if args.dry_run:
        return facts | {"asked": [answers.calls, answers.tokens]}
    result.write("_neurons.json", neurons=state["model"])
    draw_scores(result.path(".png"), [{"run": run.path, **facts}])
    return facts


def summary(entries):
    """{name: number or list} of dicts with "score", "random_score" and, with None, "reason"."""
    row = {"neurons": len(entries)}
    for name in ("random_", ""):  # "" last: its values make the histogram
        scores = (entry[f"{name}score"] for entry in entries)
        values = [score for score in scores if score is not None]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        mean = statistics.fmean(values) if values else None
        row |= {f"{name}scored": len(values), f"{name}mean": mean, f"{name}se": error}
    reasons = Counter(entry["reason"] for entry in entries if entry["score"] is None)
    return row | {"undefined": reasons.total(), "reasons": dict(reasons.most_common()),
                  "histogram": np.histogram(values, BINS)[0].tolist()}


def facts_of(entries):
    """{"layers": a summary of every layer, "all": of all}."""
    groups = groupby(entries, lambda entry: entry["layer"])
    layers = [{"layer": layer, **summary([*group])} for layer, group in groups]
    return {"layers": layers, "all": summary(entries)}


def models_of(results):
    """[(name, facts)] of the runs, then of their controls, each once."""
    controls = {str(one["control"]): one["control"] for one in results if one["control"]}
    runs = [(one["run"], one) for one in results]
    return runs + [("random weights", control) for control in controls.values()]


def print_scores(results):
    """A row for each model and control; with --model, a second row for the table."""
    rows, explainer = [], results[0]["settings"]["model"] or "table"
    for name, facts in models_of(results):
        row = {"run": name, "explained by": explainer}
        rows.append(row | facts["all"] | facts.get("answers", {}))
        if "lookup" in facts:
            rows.append(row | {"explained by": "table"} | facts["lookup"]["all"])
    columns = {"mean": "score", "se": "score_se", "random_mean": "random"}
    print_table(pd.DataFrame(rows).rename(columns=columns), COLUMNS)
    print("± is the standard error over neurons; random: score of the random records alone")


def draw_scores(path, results):
    """Figure 2, right: histograms of scores over each other with their means; means by layer."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    scores, layers = figure.subplots(1, 2)
    models = models_of(results)
    for place, (name, facts) in enumerate(models):
        table = pd.DataFrame(facts["layers"])[["layer", "mean", "se"]].astype(float)  # None is NaN
        look = {"color": f"C{place}", "ls": "-" if place < len(results) else "--"}
        shares = np.array(facts["all"]["histogram"]) / max(1, facts["all"]["scored"])
        scores.stairs(shares, BINS, label=plain(name), **look)
        scores.axvline(facts["all"]["mean"] or 0, **look)
        layers.errorbar(table["layer"], table["mean"], table["se"], marker="o", **look)
    used = np.any([facts["all"]["histogram"] for _, facts in models], 0)
    scores.set(xlabel="explanation score", ylabel="share of neurons", title="lines: means",
               xlim=(min([0, *BINS[:-1][used]]), 1))
    layers.set(xlabel="layer", ylabel="mean score", title="bars: standard errors over neurons")
    layers.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = scores.get_legend_handles_labels()
    figure.legend(handles[:6], labels[:6], loc="outside lower center", ncols=2)
    save_figure(path, figure)


# --------------------------------------------------------------------------------- the command line

SETTINGS = ("window", "tokens", "neurons", "seed", "control", "model", "base_url",
            "simulation", "temperature", "answer_tokens")
COLUMNS = {"run": "", "explained by": "", "neurons": ",", "scored": ",", "score": ".3f",
           "random": ".3f", **dict.fromkeys(("requests", "unreadable", "unclear_lines",
           "without_logprobs", "prompt_tokens", "answer_tokens"), ",.0f")}


def main():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--tokens", type=knobs.positive, default=500_000, help="read from each split (500000)")
    add("--window", type=knobs.positive, default=64, help="tokens of a record (default 64)")
    add("--neurons", type=knobs.positive, help="measure this many in each layer (default all)")
    add("--seed", type=int, default=0, help="of the sample, the random records and the control")
    add("--no_control", dest="control", action="store_false", help="no model with random weights")
    add("--plot", type=knobs.picture, metavar="FILE", help="one picture of all these runs")
    add("--force", action="store_true", help="replace results of other settings or weights")
    add = parser.add_argument_group("a language model explains and simulates").add_argument
    add("--model", help="its name at the API")
    need_model = [
        add("--base_url", default="https://api.openai.com/v1", help="address of the API"),
        add("--simulation", choices=[*FORMS], default="sparse", help="full: uses logprobs"),
        add("--temperature", type=float, default=0.0, help="some models take only 1"),
        add("--answer_tokens", type=knobs.positive, default=1000, help="longest answer"),
        add("--concurrency", type=knobs.positive, default=4, help="requests at a time"),
        add("--timeout", type=knobs.positive, default=120,
            help="seconds of silence before a retry; after 9 times this a question fails"),
        add("--dry_run", action="store_true", help="ask nothing, print the calls and tokens")]
    args = parser.parse_args()
    for flag in need_model if args.model is None else ():
        if getattr(args, flag.dest) != flag.default:
            parser.error(f"--{flag.dest} needs --model")
        setattr(args, flag.dest, None)
    if args.model and not re.match("https?://[^/]", args.base_url):
        parser.error("--base_url begins with http:// or https://")
    args.server = args.base_url and without_secrets(args.base_url)

    device, runs = knobs.pick_device(args.device), open_runs(args.runs, args.data)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"prompts": PROMPTS if args.model else None, "base_url": args.server}
    results = []
    for run in runs:
        block_size = run.model.config.block_size
        if args.window > block_size:
            raise UserError(f"--window={args.window}: {run.path} reads at most {block_size} tokens")
        results.append(Result(
            run, "explain_openai" if args.model else "explain",
            {"data": run.meta["checksum"], **settings}, args.force, ["_neurons.json", ".png"]))
    measure = partial(explain_run, results=results, args=args, device=device)
    if args.dry_run:
        total = np.zeros(2, int)
        for result in results:
            if not result.facts:
                result.facts = measure(result, result.run.path)  # they share controls
            total += result.facts.get("asked", 0)
        return print("{:,} calls with about {:,} tokens; their answers have up to {:,} each".format(
            *total, args.answer_tokens))
    found = measure_all(results, measure, device)
    print_scores(found)
    if args.plot:
        draw_scores(args.plot, found)


if __name__ == "__main__":
    knobs.cli(main)
