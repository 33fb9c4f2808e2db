"""Circuits: what a model needs for one task, as edges (paper: Table 1) or as units.

    python -m interp.circuits out/local_k2                          ACDC, tau 0.03, 64 prompts
    python -m interp.circuits out/*_seed? --tau 0.03,0.01,0.1,0.3   several models at equal KL
    python -m interp.circuits out/local_k2 --orders 8               8 random orders of edges too
    python -m interp.circuits out/*_seed? --method eap              edges and units by attribution
    python -m interp.circuits out/local_k2 --prompts mine.json      a JSON list of prompts like
               {"clean": TEXT, "corrupt": TEXT, "answer": " Tom", "wrong": " Sue"}

Task "names": "Then, Tom and Sue went to the park. Sue gave a ball to" -> " Tom". Its corrupt prompt
has other names; assets/tasks.txt has all tasks. What is in a circuit is computed; everything else
carries the values of the corrupt prompt. A model that prefers the right answer in fewer than 90 %
of the prompts does not know the task: eap gives it no circuit, and what acdc lists means nothing.

acdc (Conmy et al. 2023), as the paper ran it, removes edges one by one, in a fixed order; --orders
adds random ones. One tau gives two models circuits of different quality, so compare models at equal
KL: edges_at_kl, interpolated between several taus.

eap (EAP-IG: Hanna et al. 2024) scores all edges and units by gradients, and keeps the n with the
largest absolute scores. d is the logit of the right answer minus that of the wrong one, on prompts
that were not scored. Each number is the mean over three sets of prompts (one with --prompts):
    f           (d of the circuit - d of the corrupt prompt) / (d of the model - d of the corrupt
                prompt): 0 without any edge, 1 for the whole model
    size        the first n of a grid (steps of 10 %) with f >= 0.8; f_random: f of n random ones
    cpr, cmd    area below f and between f and 1, over the share that is kept (the MIB benchmark)
    jaccard     overlap of the best tenths of two halves of the prompts; 0.05 by chance

Writes acdc.json and acdc.png, or eap.json, beside the checkpoint, and eap.png for all runs of one
call, in the folder that holds them: the next call replaces it. An interrupted call continues.
Shape letters: see interp/graph.py.
"""

import json
import math
import random
import statistics
from collections import defaultdict
from functools import partial
from itertools import cycle, groupby, islice, product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import config as knobs
from eval import open_run, plain, print_table, run_paths, save_figure, spread
from interp.graph import Circuit, Dest, Edge, PatchedModel
from interp.results import Result, common_folder, digest, list_of, measure_all
from prepare import UserError, load_tokenizer, read_asset, word_lists

TASKS = ("names", "pronouns", "objects")
KNOWS = 0.9  # a model that prefers the right answer in fewer of the prompts has no circuit
# ACDC
WINDOW = 16  # edges tried in one batch; a larger one wastes more work when an edge is put back
RANDOM = 10  # random circuits of the same size that a circuit's KL is compared with
AT_KL = ("0.1", "0.3", "1")  # nats, at which models are compared
LEAST_KL = 1e-6  # a smaller KL is rounding in float32; 0 has no logarithm
# attribution
PATH = (0.1, 0.3, 0.5, 0.7, 0.9)  # from the corrupt (0) to the clean (1) embeddings
SETS = 3  # of prompts, over which all numbers are means
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # sizes for CPR and CMD
FAITHFUL = 0.8  # the f of a circuit that counts as large enough
LEAST_EFFECT = 0.5  # logits: with a smaller effect of the corrupt prompts f is a ratio of noise

# ----------------------------------------------------------------------------------------- the task


class Prompt(NamedTuple):
    clean: str
    corrupt: str  # as long, but the answer does not follow from it
    answer: str  # the right one, a single token with its space
    wrong: str  # the one that it is compared with


class Tokens(NamedTuple):
    """Prompts as int64 tokens, padded on the left to the longest."""
    clean: torch.Tensor  # (B, T)
    corrupt: torch.Tensor  # (B, T)
    lengths: torch.Tensor  # (B), without padding
    answers: torch.Tensor  # (B)
    wrong: torch.Tensor  # (B)

    def rows(self, start, stop):
        return Tokens(*(tensor[start:stop] for tensor in self))


def fill(template, slots, girls):
    """A template of assets/tasks.txt as text."""
    pronouns = {f"{friend}_He": "She" if slots[friend] in girls else "He" for friend in "GR"}
    return template.format(**slots, **pronouns)


def corrupt_slots(task, slots, ending, girls, boys, objects, rng):
    """The slots of a corrupt prompt: see assets/tasks.txt."""
    if task == "objects":
        others = [word for word in objects if word != slots["object"]]
        return slots | {"object": rng.choice(others)}
    friends = slots["A"], slots["B"]
    if task == "names":  # each drawn independently of the other two
        others = [name for name in girls + boys if name not in friends]
        return slots | {slot: rng.choice(others) for slot in "ABG"}
    friend = slots[ending.rpartition("{")[2][0]]  # the one whom the pronoun at the end means
    names = boys if friend in girls else girls
    other = rng.choice([name for name in names if name not in friends])
    return slots | {slot: other for slot in "ABGR" if slots[slot] == friend}


def make_prompts(tokenizer, task, openings, count, seed):
    """Distinct Prompts of a task; the giver is named first in half of them. Raises UserError."""
    rng = random.Random(seed)
    lists = {}
    for kind, words in word_lists().items():  # those that are single tokens
        lists[kind] = [word for word in words if len(tokenizer.encode_ordinary(f" {word}")) == 1]
    girls = lists["girls"] + lists["more_girls"]
    boys = lists["boys"] + lists["more_boys"]
    places, objects = lists["places"], lists["objects"]
    if min(map(len, (girls, boys, places, objects))) < 2:
        raise UserError("too few names, places and objects of assets/words.txt are single tokens "
                        "of this tokenizer: give prompts of its own with --prompts FILE")
    prompts = {}  # by the clean text
    turns = cycle(product(read_asset("tasks.txt")[task], (False, True), openings))
    for ending, first_gives, opening in islice(turns, 100 * count):
        template = f"{opening} {ending}"
        A, B = rng.sample(girls + boys, 2)
        giver, receiver = (A, B) if first_gives else (B, A)
        slots = {"A": A, "B": B, "G": giver, "R": receiver,
                 "place": rng.choice(places), "object": rng.choice(objects)}
        clean, _, answer = fill(template, slots, girls).rpartition(" ")
        if clean in prompts:
            continue
        slots = corrupt_slots(task, slots, ending, girls, boys, objects, rng)
        corrupt, _, wrong = fill(template, slots, girls).rpartition(" ")
        wrong = giver if task == "names" else wrong
        prompts[clean] = Prompt(clean, corrupt, f" {answer}", f" {wrong}")
        if len(prompts) == count:
            return list(prompts.values())
    raise UserError(f"assets/words.txt makes fewer than {count} different prompts: lower --count")


def read_prompts(path):
    """The Prompts of a --prompts file. Raises UserError."""
    try:
        prompts = [Prompt(**row) for row in json.loads(Path(path).read_text(encoding="utf-8"))]
        if not prompts or not all(isinstance(text, str) for row in prompts for text in row):
            raise ValueError("no prompts, or a text is missing")
        return prompts
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read prompts from {path}, a JSON list of objects with "
                        f"{', '.join(Prompt._fields)}: {error}") from None


def tokenize(prompts, tokenizer, block_size):
    """Prompts -> Tokens. Raises UserError if clean and corrupt positions do not correspond."""
    rows = []
    for prompt in prompts:
        tokens = [torch.tensor(tokenizer.encode_ordinary(text)) for text in prompt]
        length, corrupt, *answers = map(len, tokens)
        if not 0 < length == corrupt <= block_size or answers != [1, 1]:
            raise UserError(
                f"{prompt.clean!r} has {length} tokens, its corrupt prompt {corrupt}, its answers "
                f"{answers}: texts must be equally long, of {block_size} tokens at most, and "
                f"answers single tokens, as a rule with a space in front")
        rows.append(tokens)
    clean, corrupt, answers, wrong = zip(*rows)
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    lengths = torch.tensor([*map(len, clean)])
    return Tokens(pad(clean), pad(corrupt), lengths, torch.cat(answers), torch.cat(wrong))


def logit_difference(model, residual, tokens):
    """What Resid End reads, (B, T or 1, C) -> logit of the right answer - of the wrong one, (B)."""
    embeddings = model.unembed.T  # (V, C)
    direction = embeddings[tokens.answers] - embeddings[tokens.wrong]  # (B, C)
    return (model.read_out(residual) * direction).sum(-1)


def accuracy(circuit, tokens):
    """The share of prompts in which the right answer is the likeliest token, and in which it is
    likelier than the wrong one."""
    model, residual = circuit.model, circuit.input_of(circuit.end_input)  # (B, 1, C)
    logits = model.read_out(residual) @ model.unembed  # (B, V)
    exact = logits.argmax(-1) == tokens.answers.to(logits.device)  # (B)
    right = logit_difference(model, residual, tokens) > 0  # (B)
    return torch.stack([exact, right]).double().mean(-1).tolist()


# ---------------------------------------------------------------------------------------- the sweep
#
# All of ACDC, one edge at a time:
#
#     kl = 0
#     for edge in order:
#         rise = KL(clean model || circuit without edge) - kl
#         if rise < tau:         the edge stays removed, and kl += rise, even if rise is negative
#         else:                  the edge is put back, kl stays


def sweep_order(graph, rng=None):
    """Every edge, stage by stage from the end: heads ascending, Q, K, V, and the sources of each
    descending, as in ACDC. rng, a random.Random, shuffles the edges of every stage instead."""
    edges = []
    for stage in reversed(graph.stages):
        stage_edges = []
        for node in stage:
            for dest in graph.dests(node):
                stage_edges += [Edge(source, dest) for source in reversed(graph.sources(node))]
        if rng is not None:
            rng.shuffle(stage_edges)
        edges += stage_edges
    return edges


def decide(circuit, edges, kl, tau):
    """The rule for the next edges, all tried in one batch, up to the first that is put back.

    -> a decision for each, [whether it is kept, by how much its removal raised KL], and the new KL.
    """
    kls, inputs, outputs = circuit.attempt(edges)
    decisions, removed = [], 0
    for kl_without in kls:
        rise = kl_without - kl
        kept = not rise < tau
        decisions.append([kept, rise])
        if kept:
            break
        kl, removed = kl_without, removed + 1
    if removed:  # what was tried after the edge that is put back is not used
        circuit.commit(edges[:removed], inputs, outputs)
    return decisions, kl


def discover(circuit, edges, tau, state=None, save=lambda state: None, title="ACDC"):
    """ACDC's sweep over these edges, in this order -> the state it ends in, a dict of plain values.

    decided: the decisions so far. kl: of what is left of the model, in nats. margin: how close a
    rise of KL came to tau. Every stage is saved. A given state is continued.
    """
    state = state or {"decided": [], "kl": 0.0, "margin": math.inf}
    decided = state["decided"]
    stages = groupby(edges[len(decided) :], lambda edge: circuit.graph.stage[edge.dest.node])
    smallest, largest = 1, WINDOW
    if circuit.current.device.type == "cuda":  # where a batch takes as long as one edge
        smallest = largest = 2 * WINDOW
    with tqdm(total=len(edges), initial=len(decided), unit=" edges",
              desc=f"{title} tau {tau:g}", mininterval=1) as bar:
        for _, stage in stages:
            # computed anew for every stage, so that a sweep that is continued is bit-equal
            circuit.set_removed([edge for edge, (kept, _) in zip(edges, decided) if not kept])
            # All edges out of these nodes are decided. A node that keeps none has no effect, so
            # removing an edge into it raises KL by exactly 0 and need not be tried.
            decisions = {edge: [not 0.0 < tau, 0.0] for edge in stage}
            untried = [edge for edge in decisions if edge.dest.node in circuit.live]
            size = smallest
            bar.update(len(decisions) - len(untried))
            while untried:
                found, state["kl"] = decide(circuit, untried[:size], state["kl"], tau)
                decisions.update(zip(untried, found))
                state["margin"] = min(state["margin"], *(abs(rise - tau) for _, rise in found))
                put_back, _ = found[-1]
                size = smallest if put_back else min(2 * size, largest)
                untried = untried[len(found) :]
                bar.update(len(found))
            decided += decisions.values()
            save(state)
    return state


# ---------------------------------------------------------------------------------- attribution


def record(model, x):
    """A run from the embeddings x (B, T, C): {Dest: what this input reads, (B, T, C); node: its
    units, (B, T, D or 4C)}."""
    found = {}

    def note(site, value):
        found[site] = value.view_as(value)  # no copy, but a tensor of its own for autograd
        return found[site]

    model.run(x, note, note)
    return found


def attribute(model, tokens, path=PATH):
    """{level: {Edge or (node, unit): score}}: to first order, by how much the logit difference
    rises when this edge or unit carries the corrupt prompt's value (Hanna et al. 2024). A score is
    change x gradient, summed over prompts and positions. Change: of the edge's source, or of the
    unit, corrupt minus clean. Gradient: at the edge's end, or at the unit, as the mean over a path
    between the embeddings of both prompts (integrated gradients)."""
    slopes = defaultdict(float)  # {site, as in record: this gradient}
    for share in path:
        x = torch.lerp(model.corrupt[0], model.clean[0], share)
        sites = record(model, x.requires_grad_())
        values = [*sites.values()]  # the last one is what Resid End reads
        metric = logit_difference(model, values[-1], tokens).mean()
        for site, slope in zip(sites, torch.autograd.grad(metric, values)):
            slopes[site] = slopes[site] + slope / len(path)
    scores = {"edges": {}, "units": {}}
    clean = record(model, model.clean[0])
    corrupt = record(model, model.corrupt[0])
    for site, slope in slopes.items():
        if isinstance(site, Dest):
            sources = model.graph.sources(site.node)  # the first so many of all
            products = model.change[: len(sources)].flatten(1) @ slope.flatten()  # (sources)
            names = [Edge(source, site) for source in sources]
            scores["edges"] |= zip(names, products.tolist())
        else:
            products = ((corrupt[site] - clean[site]) * slope).sum((0, 1))  # (D or 4C)
            names = [(site, unit) for unit in range(len(products))]
            scores["units"] |= zip(names, products.tolist())
    return scores


def edge_circuits(model):
    """A function that maps a set of edges to what Resid End reads in their circuit, (B, 1, C)."""
    circuit, edges = Circuit(model), sweep_order(model.graph)

    def residual_of(kept):
        circuit.set_removed([edge for edge in edges if edge not in kept])
        return circuit.input_of(circuit.end_input)
    return residual_of


def unit_circuits(model):
    """The same for a set of units (node, unit): all others have the corrupt prompt's values."""
    corrupt = record(model, model.corrupt[0])

    def residual_of(kept):
        def edit(node, units):
            mask = [(node, unit) in kept for unit in range(units.size(-1))]
            mask = torch.tensor(mask, device=units.device)  # (D or 4C)
            return torch.where(mask, units, corrupt[node])
        return model.run(model.clean[0], edit=edit)[1][-1]
    return residual_of


CIRCUITS = {"edges": edge_circuits, "units": unit_circuits}


def faithfulness(f, total):
    """f: number of edges or units -> f of that circuit. -> the areas, and f of all SHARES."""
    sizes = sorted({max(1, round(share * total)) for share in SHARES})
    heights = [f(size) for size in sizes]
    shares = torch.tensor([0, *sizes], dtype=torch.float64) / total
    curve = torch.tensor([0, *heights], dtype=torch.float64)  # f of nothing is 0
    return {"cpr": torch.trapezoid(curve, shares).item(),
            "cmd": torch.trapezoid((1 - curve).abs(), shares).item(), "curve": [sizes, heights]}


def sufficient_size(f, total):
    """The first size of a fine grid with f(size) >= FAITHFUL. f(total) is 1."""
    size = 1
    while size < total and f(size) < FAITHFUL:
        size = min(total, max(size + 1, round(1.1 * size)))
    return size


def overlap(first, second):
    """Jaccard: the intersection over the union of the best tenths of two rankings."""
    count = max(1, round(len(first) / 10))
    first = set(first[:count])
    second = set(second[:count])
    return len(first & second) / len(first | second)


def best_first(scores):
    """The edges or units, those with the largest absolute score first."""
    return sorted(scores, key=lambda name: -abs(scores[name]))


def measure_level(model, tokens, level, halves, rng):
    """A dict: circuits of edges or units on prompts that were not scored. halves: {edge or unit:
    score} of each half of the scored ones."""
    first, second = halves
    residual_of = CIRCUITS[level](model)
    total = len(first)

    def metric(residual):
        return logit_difference(model, residual, tokens).mean().item()
    corrupt, clean = metric(model.corrupt_residual[-1]), metric(model.clean_residual[-1])

    def f_of(order):
        return lambda size: (metric(residual_of({*order[:size]})) - corrupt) / (clean - corrupt)
    both = {name: first[name] + second[name] for name in first}
    best = f_of(best_first(both))
    chance = f_of(rng.sample([*both], total))
    size = sufficient_size(best, total)
    return faithfulness(best, total) | {
        "total": total, "size": size, "f_random": chance(size),
        "jaccard": overlap(best_first(first), best_first(second)),
        **{f"{name}_random": value for name, value in faithfulness(chance, total).items()}}


# --------------------------------------------------------------------------------------- the result


def describe_circuit(circuits, edges, decided, tokens, seed):
    """What a result says about the circuit that a sweep of these edges found, a dict."""
    graph = circuits[""].graph
    kept, removed = {}, {}  # {edge: by how much its removal raised KL}
    for edge, (put_back, rise) in zip(edges, decided):
        (kept if put_back else removed)[edge] = rise
    connected = graph.connected(kept)
    heads = {edge.source for edge in connected if graph.block_and_head(edge.source)[1] is not None}
    facts = {"connected": len(connected), "heads": len(heads)}
    for suffix, circuit in circuits.items():
        facts[f"kl{suffix}"] = circuit.kl_without(removed)
        kls, rng = [], random.Random(seed)  # of random circuits of the same size
        for _ in range(RANDOM):
            chosen = set(rng.sample(edges, len(kept)))
            kls.append(circuit.kl_without([edge for edge in edges if edge not in chosen]))
        facts[f"kl_random{suffix}"] = statistics.mean(kls)
        facts[f"kl_random{suffix}_sd"] = statistics.stdev(kls)
    circuits[""].set_removed(removed)
    facts["circuit_exact"], facts["circuit_right"] = accuracy(circuits[""], tokens)
    for name, rises in (("circuit", kept), ("removed", removed)):
        facts[name] = {graph.edge_name(edge): rise for edge, rise in rises.items()}
    return facts


def load_prompts(run, task, args):
    """A run's prompts, a list of Tokens. Those of ACDC are one set; those of EAP are SETS, and each
    half of the scored ones has its own openings. Raises UserError."""
    tokenizer = load_tokenizer(run.tokenizer)
    tasks = read_asset("tasks.txt")
    first, second = tasks["openings1"], tasks["openings2"]
    make = partial(make_prompts, tokenizer, task)
    count, half = args.count, args.count // 2
    sets = []
    if args.prompts:
        sets.append(read_prompts(args.prompts))
    elif args.method == "acdc":
        sets.append(make(first + second, 2 * count, args.seed))
    else:
        for number in range(SETS):
            seed = SETS * args.seed + number
            ours = make(first, count, seed)
            others = make(second, count, seed)
            sets.append(ours[:half] + others[:half] + ours[half:] + others[half:])
    block_size = run.model.config.block_size
    return [tokenize(prompts, tokenizer, block_size) for prompts in sets]


def open_result(path, args):
    """The Result of a run. Raises UserError or ModelError."""
    run, digests = open_run(path), {}
    for task in args.task:
        sets = load_prompts(run, task, args)
        flat = [torch.cat([*map(torch.flatten, tokens)]) for tokens in sets]
        digests[task] = digest({str(number): tokens for number, tokens in enumerate(flat)})
    total = len(sets[0].clean)
    if args.method == "eap" and total <= args.count:
        raise UserError(f"{args.prompts} has {total} prompts, and --count={args.count} of them are "
                        f"scored: lower --count or add prompts, so that some are held out")
    settings = {
        "task": args.task, "count": min(args.count, total), "heldout": max(0, total - args.count),
        "seed": args.seed, "dtype": args.dtype,
        "prompts": f"{args.prompts or 'templates'}, tokens {digests}"}
    if args.method == "eap":
        return Result(run, "eap", settings | {"level": args.level}, args.force)
    settings |= {"tau": args.tau, "orders": args.orders}
    return Result(run, "acdc", settings, args.force, files=[".png"])


def patch(model, tokens, dtype):
    """A PatchedModel of a GPTNeo on these prompts. dtype: its name, such as float32."""
    config, device = model.config, model.lm_head.weight.device
    clean, corrupt, lengths = (tensor.to(device) for tensor in tokens[:3])
    return PatchedModel(model.clean_state_dict(), config.n_head, config.windows, clean, corrupt,
                        lengths, getattr(torch, dtype))


def find_circuits(result, title, args, device):
    """Find the circuits of one run by ACDC, or continue -> the facts of acdc.json."""
    model = result.run.model.to(device)
    tokens, = load_prompts(result.run, args.task[0], args)
    found_on = tokens.rows(0, args.count)
    circuits = {}  # {suffix of names: Circuit}
    for suffix, part in {"": found_on, "_heldout": tokens.rows(args.count, None)}.items():
        if len(part.clean):
            circuits[suffix] = Circuit(patch(model, part, args.dtype))
    graph = circuits[""].graph
    everything = sweep_order(graph)
    exact, right = accuracy(circuits[""], found_on)
    facts = {"total": len(everything), "exact": exact, "right": right,
             "verdict": "does not know" if right < KNOWS else ""}
    for suffix, circuit in circuits.items():
        facts[f"kl_corrupt{suffix}"] = circuit.kl_without(everything)
    state = result.state or {"circuits": [], "sweep": None}  # finished ones, the one in progress
    rows, sweep = state["circuits"], state["sweep"]
    orders = ["descending", *range(args.orders)]  # a number is that of a random order
    for tau, order in [*product(args.tau, orders)][len(rows) :]:
        rng = None if order == "descending" else random.Random(f"{args.seed} {order}")
        edges = sweep_order(graph, rng)
        sweep = discover(circuits[""], edges, tau, sweep, title=title,
                         save=lambda sweep: result.save({"circuits": rows, "sweep": sweep}))
        number = sum(put_back for put_back, _ in sweep["decided"])
        row = {"tau": tau, "order": order, "edges": number, "margin": sweep["margin"]}
        if rng is None:
            row |= describe_circuit(circuits, edges, sweep["decided"], found_on, args.seed)
        rows.append(row)
        sweep = None
    facts |= {"circuits": rows, "edges_at_kl": edges_at_kl(facts, rows)}
    draw_circuit(result.path(".png"), result.run.path, facts, graph)
    return facts


def attribute_run(result, title, args, device):
    """The circuits by attribution of one run: {"rows": a dict for each task and level}."""
    patched = partial(patch, result.run.model.to(device), dtype=args.dtype)
    half, count = args.count // 2, args.count
    rows = result.state or []
    for task in args.task[len(rows) // len(args.level) :]:
        sets = load_prompts(result.run, task, args)
        shares, effects = [], []
        for heldout in [tokens.rows(count, None) for tokens in sets]:
            model = patched(heldout)
            clean = logit_difference(model, model.clean_residual[-1], heldout)  # (B)
            corrupt = logit_difference(model, model.corrupt_residual[-1], heldout)
            shares.append((clean > 0).double().mean().item())
            effects.append((clean - corrupt).mean().item())
        right, effect = statistics.mean(shares), statistics.mean(effects)
        verdict = ""
        if right < KNOWS:
            verdict = "does not know"
        elif effect < LEAST_EFFECT:
            verdict = "no effect"
        if verdict:
            sets = []  # no circuit
        rng = random.Random(args.seed)
        found = {level: [] for level in args.level}
        for tokens in tqdm(sets, f"{title} {task}", unit=" sets of prompts"):
            scores = []
            for part in (tokens.rows(0, half), tokens.rows(half, count)):
                scores.append(attribute(patched(part), part))
            heldout = tokens.rows(count, None)
            model = patched(heldout)
            for level in args.level:
                halves = [one[level] for one in scores]
                found[level].append(measure_level(model, heldout, level, halves, rng))
        for level in args.level:
            row = {"task": task, "level": level, "right": right, "effect": effect,
                   "verdict": verdict}
            measured = pd.DataFrame(found[level])
            for name in measured:  # a mean over the sets; of a list, entry by entry
                row[name] = torch.tensor([*measured[name]], dtype=torch.float64).mean(0).tolist()
            rows.append(row)
        result.save(rows)
    return {"rows": rows}


def edges_for_kl(points, kl):
    """How many edges are needed for a KL of at most kl; None outside the measured range. log KL is
    linear between neighbours of those points (edges, KL) that no smaller circuit beats."""
    frontier = []
    for point in sorted(points):
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
    for (fewer, high), (more, low) in zip(frontier, frontier[1:]):
        if low <= kl <= high:
            return fewer + (more - fewer) * math.log(high / kl) / math.log(high / low)
    return 0.0 if kl >= frontier[0][1] else None


def edges_at_kl(facts, rows):
    """{"0.1": edges_for_kl, ...} for every AT_KL, on held-out prompts if there are any. None for a
    single tau, and for a model that does not know the task."""
    suffix = "_heldout" if "kl_corrupt_heldout" in facts else ""
    points = [(0, facts[f"kl_corrupt{suffix}"])]  # without edges, then of every tau
    for row in rows:
        if row["order"] == "descending":
            points.append((row["edges"], max(row[f"kl{suffix}"], LEAST_KL)))
    if len(points) < 3 or facts["verdict"]:
        return dict.fromkeys(AT_KL)
    return {kl: edges_for_kl(points, float(kl)) for kl in AT_KL}


# ------------------------------------------------------------------- pictures, the command line

PARTS = {"Q": ("tab:red", "queries"), "K": ("tab:blue", "keys"), "V": ("tab:green", "values"),
         "": ("0.35", "an MLP or the end")}


def spot(graph, node, part=""):
    """Where a node or its input is drawn, (x, y): blocks bottom to top, heads left, MLPs right."""
    if node in (0, graph.end):
        return graph.n_head / 2, 2 * graph.n_layer + 1.5 if node else -0.5
    block, head = graph.block_and_head(node)
    if head is None:
        return graph.n_head + 0.5, 2 * block + 1.4
    shift = {"Q": -0.15, "V": 0.15}.get(part, 0)  # a head's three inputs are side by side
    return head + shift, 2 * block + 0.6


def draw_circuit(path, title, facts, graph):
    """The first circuit of a result. A thicker edge costs more KL when it is removed."""
    from matplotlib.figure import Figure  # here, because it is slow to import
    row = facts["circuits"][0]
    edges = {graph.edge_name(edge): edge for edge in sweep_order(graph)}
    rises = {edges[name]: rise for name, rise in row["circuit"].items()}
    connected = set(graph.connected(rises))
    top = max(rises.values(), default=1)
    figure = Figure(figsize=(graph.n_head / 2 + 5, graph.n_layer + 3), layout="constrained")
    axes = figure.subplots()
    for edge, rise in rises.items():
        color, _ = PARTS[edge.dest.part]
        ends = spot(graph, edge.source), spot(graph, *edge.dest)
        axes.plot(*zip(*ends), "-" if edge in connected else ":", color=color, alpha=0.65,
                  lw=0.6 + 4 * math.sqrt(max(rise, 0) / top))
    for node in {node for edge in rises for node in (edge.source, edge.dest.node)}:
        axes.text(*spot(graph, node), graph.name(node), ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round", "fc": "white"})
    for color, label in PARTS.values():
        axes.plot([], [], color=color, label=f"into {label}")
    axes.plot([], [], ":", color="0.35", label="dangling: on no path from start to end")
    figure.legend(loc="outside right upper", fontsize=8)
    axes.axis("off")
    axes.set_title(f"{plain(title)}\n{row['edges']} of {facts['total']:,} edges have KL "
                   f"{row['kl']:.2f}, answer exact {row['circuit_exact']:.0%}")
    save_figure(path, figure)


def draw_attribution(path, rows, title):
    """f over the share that is kept: a panel for each level and task; a line and a band for each
    group of runs: mean and range over seeds."""
    from matplotlib.figure import Figure
    known = rows[rows["verdict"] == ""]
    if known.empty:
        path.unlink(missing_ok=True)
        return print(f"no {path.name}: no run knows a task")
    tasks, levels, names = (rows[name].unique().tolist() for name in ("task", "level", "run"))
    figure = Figure((3.6 * len(tasks) + 1, 2.8 * len(levels) + 1), layout="constrained")
    figure.suptitle(title, parse_math=False)
    figure.supylabel("f: share of the effect")
    panels = figure.subplots(len(levels), len(tasks), squeeze=False, sharey=True)
    lines = {}  # {name: what its legend shows}
    for axes, (level, task) in zip(panels.flat, product(levels, tasks)):
        here = known.query("level == @level and task == @task")
        for (name, total), seeds in here.groupby(["run", "total"], sort=False):
            color = f"C{names.index(name)}"
            sizes, f = torch.tensor([*seeds["curve"]]).unbind(1)  # (seeds, sizes) each
            _, f_random = torch.tensor([*seeds["curve_random"]]).unbind(1)
            shares = sizes[0] / total
            chance, = axes.plot(shares, f_random.mean(0), ":", color="0.6", lw=1)
            line, = axes.plot(shares, f.mean(0), color=color)
            axes.fill_between(shares, f.amin(0), f.amax(0), color=color, alpha=0.15, lw=0)
            lines |= {"random order": chance, plain(name): line}
        axes.axhline(FAITHFUL, color="0.8", lw=0.8)
        axes.set(title=task, xlabel=f"share of {level}", xscale="log", ylim=(-0.25, 1.25))
    shown = [*lines][:6]  # more are hard to distinguish
    figure.legend([lines[name] for name in shown], shown, loc="outside lower center", ncols=3)
    save_figure(path, figure)


MODEL_COLUMNS = {  # entry of acdc.json: its format
    "run": "", "total": ",", "exact": ".0%", "right": ".0%", "verdict": "", "kl_corrupt": ".3f",
    "kl_corrupt_heldout": ".3f", **{f"edges_at_kl.{kl}": ".1f" for kl in AT_KL}}
CIRCUIT_COLUMNS = {
    "run": "", "tau": "g", "edges": ",", "random_orders": ".1f", "connected": ",", "heads": "",
    "kl": ".3f", "kl_random": ".3f", "kl_heldout": ".3f", "kl_random_heldout": ".3f",
    "circuit_exact": ".0%", "circuit_right": ".0%"}
EAP_NUMBERS = {
    "right": ".0%", "effect": ".1f", "size": ".1f", "f_random": ".2f", "cpr": ".3f",
    "cpr_random": ".3f", "cmd": ".3f", "cmd_random": ".3f", "jaccard": ".2f"}
EAP_COLUMNS = {"run": "", "task": "", "level": "", "total": ",.0f", "verdict": "", **EAP_NUMBERS}


def print_circuits(results):
    """A table of the models, and one of their circuits: a row for each tau."""
    rows = []
    for result in results:
        for tau in result["settings"]["tau"]:
            first, *others = [row for row in result["circuits"] if row["tau"] == tau]
            edges = pd.Series([row["edges"] for row in others], dtype=float)
            rows.append({"run": result["run"], **first, "random_orders": edges.mean(),
                         "random_orders_sd": edges.std()})
    for frame, columns in ((pd.json_normalize(results), MODEL_COLUMNS),
                           (pd.DataFrame(rows), CIRCUIT_COLUMNS)):
        print()
        print_table(frame, columns)
    print("± is the sample standard deviation over random orders or random circuits\n"
          "edges_at_kl: interpolated between taus; -: out of range, or of a model that does not "
          "know the task")


def print_attribution(results, title):
    """A row for each task, level and group of runs that differ in the seed; and eap.png."""
    rows = pd.DataFrame([{"run": one["run"], **row} for one in results for row in one["rows"]])
    rows = rows.reindex(columns=[*EAP_COLUMNS, "curve", "curve_random"])  # also without any circuit
    name = rows["run"].str.replace(r"seed\d+", "seed*", regex=True)
    alone = rows.groupby(name)["run"].transform("nunique") == 1
    rows["run"] = rows["run"].where(alone, name)

    def texts(verdicts):
        return ", ".join(sorted({*verdicts} - {""}))
    groups = rows.groupby(["run", "task", "level"], sort=False)
    table = groups.agg(n=("run", "size"), total=("total", "first"), verdict=("verdict", texts))
    table = table.join(spread(groups, EAP_NUMBERS)).reset_index()
    print_table(table, EAP_COLUMNS)
    print("± is the sample standard deviation over seeds; (1 of 3): one of 3 seeds has it\n"
          "verdict: why a run has no circuit; random: a random order of the edges or units")
    draw_attribution(common_folder(one["run"] for one in results) / "eap.png", rows, title)


def main():
    parser = knobs.Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default %(default)s); not mps, which lacks float64")
    add("--method", choices=("acdc", "eap"), default="acdc", help="default acdc, the paper's")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--task", choices=TASKS, help="default: names for acdc, all three for eap")
    one_of.add_argument("--prompts", metavar="FILE", help="your own prompts")
    add("--count", type=knobs.positive, default=64, help="prompts to find circuits on (64); as "
        "many more, or the rest of a file, are held out")
    add("--seed", type=int, default=0, help="of prompts and of everything random (0)")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--force", action="store_true", help="replace a result of other settings")
    add("--tau", type=list_of(float), help="acdc: an edge stays removed if that raises KL by "
        "less, nats (0.03); a list: 0.03,0.1")
    add("--orders", type=knobs.positive, default=0, help="acdc: how many random orders to add (0)")
    add("--level", choices=CIRCUITS, help="eap: edges or units only (default: both)")
    add("--title", default="", help="eap: of eap.png")
    args = parser.parse_args()
    acdc = args.method == "acdc"
    if acdc and (args.level or args.title):
        parser.error("--level and --title are for eap: add --method eap")
    if not acdc and (args.tau or args.orders):
        parser.error("--tau and --orders are for acdc: leave out --method eap")
    if args.count % 2 and not acdc:
        parser.error("--count must be even for eap: prompts are scored in two halves")
    args.tau = args.tau or [0.03]
    args.level = [args.level] if args.level else [*CIRCUITS]
    chosen = args.prompts or args.task or ("names" if acdc else None)
    args.task = [chosen] if chosen else [*TASKS]
    device = knobs.pick_device(args.device)
    results = [open_result(path, args) for path in run_paths(args.runs)]
    measure = partial(find_circuits if acdc else attribute_run, args=args, device=device)
    found = measure_all(results, measure, device)
    if acdc:
        print_circuits(found)
    else:
        print_attribution(found, args.title)


if __name__ == "__main__":
    knobs.cli(main)
