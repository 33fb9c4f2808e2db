"""Unlearning: remove units until the model forgets a word. What else does it forget?

    python -m interp.unlearn out/local_k2                        five concepts: minutes on a CPU
    python -m interp.unlearn out/local_k2 --concept "dog dogs" "cat bird"    words, siblings
    python -m interp.unlearn out/local_k2 --save dog out/no_dog  the model without the units of dog

A concept is some words; siblings are similar words that should stay. A ranking orders the units
(attention channels and neurons) on training stories. The first n are removed: their outgoing
weights become 0. n grows until the loss on the concept's words in held-out stories has risen by 0.5
nats per token. There, interpolated in n, these other losses have risen as well:

    retain      on stories without the concept's words
    siblings    on the sibling words, in any story; mean over these words
Rankings:
    fisher      first-order effect of the removal on the loss on the words, divided by the root
                mean square of its effect on retained stories
    contrast    the same, minus the largest effect on a sibling
    direct      outgoing weights . (the words' embeddings - the mean one) x mean activation before
                the words
    activation  |mean activation before the words - in retained stories| / standard deviation there
    gate        how many times more often the gate keeps the unit before the words than in retained
                stories
    chance      three random orders, from a twentieth of all units on
    logits      a control without removal: n is subtracted from the logits of the words

relearn, for fisher: Adam updates on stories with the words until half of the gap to the intact
model, trained in the same way, is gone. Both costs of the control are below 0 in every model, so a
low cost alone does not show that few units hold the concept.

Writes unlearn.json, with the curve of each ranking. After Ctrl-C the same command continues. Shape
letters: B windows of T tokens, U units, d units of one site, V vocabulary, n positions that count.
"""

import copy
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

import config as knobs
from eval import open_runs, print_table, run_parser, spread
from interp.activations import Site, windows_at
from interp.results import Result, measure_all
from model import save_checkpoint
from prepare import UserError, load_tokenizer, load_tokens

CONCEPTS = [["dog dogs", "cat bird"], ["bird birds", "cat dog"], ["car cars", "ball box"],
            ["tree trees", "park flower"], ["mom", "dad girl"]]  # words, siblings
COSTS = ["retain", "siblings"]
COLUMNS = {"run": "", "ranking": "", "units": ".1f", "retain": ".1f", "siblings": ".1f",
           "relearn": ".1f"}
CONCEPT_TOKENS, SIBLING_TOKENS = 80, 20  # held-out ones, at least: fewer are noise
RISE = 0.5  # nats on the concept's words
SIZES = [1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 135, 200, 300, 450, 675]  # units removed
SIZES += [1000 * n for n in SIZES]
CONSTANTS = [0.5, 0.6, 0.7, 0.8, 1, 1.5, 2, 3, 4, 6, 8]  # sizes of the control logits
READ = 10_000_000  # tokens of a split that are searched for stories
HELD_OUT, TRAINING, LESSONS = 16_384, 24_576, 12_800  # tokens in windows of one kind, at most
UPDATES, LR = 64, 1e-4  # of relearning: most updates, Adam's learning rate
TOKENS = 1024  # in a forward pass

# ------------------------------------------------------------------------------- text and losses


def tokens_of(run, words):
    """The tokens of words with a space before them. Raises UserError where one is not a token."""
    tokenizer = load_tokenizer(run.tokenizer)
    try:
        return [tokenizer.encode_single_token(f" {word}") for word in words.split()]
    except KeyError as error:
        word = error.args[0].decode()
        raise UserError(f'"{word}" is not one token for {run.path}: give --concept other words')


def read_batches(run, split, ids, hold, tokens, least=1):
    """A list of batches: windows of tokens (B, T), the next ones, and the positions that count:
    those where one of ids comes next; hold=False: all of the stories without ids. Windows without
    any are left out. At most `tokens` tokens, evenly chosen. Raises UserError where fewer than
    `least` positions count."""
    text = load_tokens(run.folder, split)[:READ]
    eot, T = run.meta["eot"], run.model.config.block_size
    stories = np.split(text, np.flatnonzero(text == eot) + 1)[:-1]  # the last one is not whole
    chosen = [story for story in stories if np.isin(story, ids).any() == hold]
    stream = np.concatenate([[eot], *chosen])
    starts = np.arange(0, len(stream) - T, T)
    idx = windows_at(stream, starts, T + 1, run.model.lm_head.weight.device)  # (windows, T + 1)
    where = torch.isin(idx[:, 1:], idx.new_tensor(ids)) == hold
    rows = where.any(1).nonzero()[:, 0]
    count = min(len(rows), max(1, tokens // T))
    rows = rows[torch.linspace(0, len(rows) - 1, count).long()]
    parts = idx[rows, :-1], idx[rows, 1:], where[rows]
    n = int(where[rows].sum())
    if n < least:
        words = load_tokenizer(run.tokenizer).decode(ids).strip()
        kind = "of" if hold else "without"
        raise UserError(f'{run.folder} has {n} {split} tokens {kind} "{words}", and at least '
                        f"{least} are needed: give --concept other words")
    step = max(1, TOKENS // T)
    return [*zip(*(part.split(step) for part in parts))]


@torch.no_grad()
def mean_loss(model, batches):
    """Nats per token, over the positions that count."""
    total, n = 0.0, 0
    for x, y, where in batches:
        logits = model.lm_head(model.clean_pass(x)[0][where])  # (n, V)
        total += F.cross_entropy(logits, y[where], reduction="sum").item()
        n += len(logits)
    return total / n


def losses(model, groups):
    """-> (3): loss on the concept, on retain, mean over the siblings. groups: their batches."""
    concept, retain, *words = [mean_loss(model, batches) for batches in groups]
    return np.array([concept, retain, np.mean(words)])


# -------------------------------------------------------------------------------------- the units


def unit_sites(model):
    """The sites of all units, in the order of their numbers."""
    layers = range(model.config.n_layer)
    return [Site(model, *place) for place in product(layers, ("attn_act", "mlp_act"))]


def without(model, units):
    """A copy of the model that lacks these units."""
    model = copy.deepcopy(model)
    matrices = [site.module.weight.data for site in unit_sites(model)]  # 2L times (C, d)
    sizes = [matrix.size(1) for matrix in matrices]
    kept = matrices[0].new_ones(sum(sizes))  # (U)
    kept[units] = 0
    for matrix, part in zip(matrices, kept.split(sizes)):
        matrix.mul_(part)  # in place
    return model


def lowered(model, ids, constant):
    """A copy of the model that subtracts a constant from the logits of the tokens ids."""
    model = copy.deepcopy(model)
    bias = torch.zeros_like(model.lm_head.weight[:, 0])  # (V)
    bias[ids] = -constant
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@torch.no_grad()
def gate_masks(model, states):
    """(B, T, U), from what clean_pass returned. A head that wins keeps all its channels."""
    C, parts = model.config.n_embd, []
    for attn, mlp in model.ablated_pass(*states)[1]:
        parts += [attn.repeat_interleave(C // attn.size(-1), -1), mlp]
    return torch.cat(parts, -1)


def unit_means(model, batches):
    """{name: (U)}, means over the positions that count; "kept" only if there are gates.

    effect: what removing a unit everywhere adds to their loss, to first order: the sum over all
    positions of -activation x gradient. square: of this change at single positions. x, xx: the
    activation and its square. kept: the share of positions at which the gate keeps the unit.
    """
    total, n = 0, 0
    for x, y, where in batches:
        seen = []  # 2L times (B, T, d)
        hooks = [site.hook(seen.append) for site in unit_sites(model)]
        states = model.clean_pass(x)
        for hook in hooks:
            hook.remove()
        logits = model.lm_head(states[0][where])  # (n, V)
        loss = F.cross_entropy(logits, y[where], reduction="sum")
        gradient = torch.cat(torch.autograd.grad(loss, seen), -1)  # (B, T, U)
        act = torch.cat(seen, -1).detach()  # (B, T, U)
        change = (-act * gradient).flatten(0, 1)  # (B T, U)
        here = act[where]  # (n, U)
        sums = [change.sum(0), change.square().sum(0), here.sum(0), here.square().sum(0)]
        if model.config.ablation != "none":
            sums.append(gate_masks(model, states)[where].sum(0))
        total = total + torch.stack(sums)  # (4 or 5, U)
        n += len(here)
    return dict(zip(("effect", "square", "x", "xx", "kept"), total / n))


def rank(run, ids, siblings):
    """{ranking: all units, first those to remove}. siblings: the tokens of each, a list."""
    model = run.model

    def measured(tokens, hold=True):
        return unit_means(model, read_batches(run, "train", tokens, hold, TRAINING))

    concept, retain = measured(ids), measured(ids, hold=False)
    largest = torch.stack([measured(tokens)["effect"] for tokens in siblings]).amax(0)
    usual = retain["square"].sqrt()  # effect
    usual += usual.mean() / 10  # a unit that does nothing has 0
    std = (retain["xx"] - retain["x"] ** 2).clamp_min(1e-12).sqrt()
    wte = model.lm_head.weight.detach()  # (V, C)
    towards = wte[ids].mean(0) - wte.mean(0)  # (C)
    writes = [towards @ site.module.weight.detach() for site in unit_sites(model)]  # 2L times (d)
    scores = {
        "fisher": concept["effect"] / usual,
        "contrast": (concept["effect"] - largest) / usual,
        "direct": torch.cat(writes) * concept["x"],
        "activation": (concept["x"] - retain["x"]).abs() / std}
    if "kept" in concept:
        rare = 1e-3  # there is no ratio to a rate of 0
        scores["gate"] = (concept["kept"] + rare) / (retain["kept"] + rare)
    random = torch.Generator().manual_seed(0)
    for name in ("chance1", "chance2", "chance3"):
        scores[name] = torch.rand(len(usual), generator=random)
    return {name: score.argsort(descending=True, stable=True).cpu()
            for name, score in scores.items()}


# -------------------------------------------------------------------- forgetting, and relearning


def forget(models, groups, start):
    """The entry of a ranking in unlearn.json. models: pairs of a size n and the model, lazily.

    "curve": rows (n, three increases of losses()), until the first is RISE. "n" and the costs are
    interpolated where it is RISE; None if it never is."""
    curve = [[0.0] * 4]
    for n, model in models:
        increases = losses(model, groups) - start  # (3)
        curve.append([float(n), *increases.tolist()])
        if increases[0] >= RISE:
            break
    numbers = dict.fromkeys(["n", *COSTS])
    if increases[0] >= RISE:
        sizes, on_concept, *costs = np.array(curve[-2:]).T  # interpolate between these two
        for name, column in zip(numbers, [sizes, *costs]):
            numbers[name] = float(np.interp(RISE, on_concept, column))
    return numbers | {"curve": curve}


def relearn(models, lessons, concept):
    """The number of updates on the batches lessons after which half of the gap between the losses
    of two models on the concept is gone; None if UPDATES are too few. models: the intact one first.
    """
    models = torch.nn.ModuleList(copy.deepcopy(models))
    optimizer = torch.optim.Adam(models.parameters(), lr=LR)
    gaps = []
    for update in range(UPDATES + 1):
        intact, smaller = [mean_loss(model, concept) for model in models]
        gaps.append(smaller - intact)
        if gaps[-1] <= gaps[0] / 2:
            return update
        x, y, _ = lessons[update % len(lessons)]
        optimizer.zero_grad()
        for model in models:
            model(x, y, ablated_coeff=0).loss.backward()
        optimizer.step()
    return None


def held_out(run, words, siblings):
    """The tokens of a concept, those of each sibling, and the groups for losses(). Raises UserError
    where words do not fit."""
    if not words.split() or not siblings.split() or {*words.split()} & {*siblings.split()}:
        raise UserError(f'--concept "{words}" "{siblings}": both need words, and no word twice')
    ids, *others = [tokens_of(run, text) for text in (words, *siblings.split())]
    groups = [read_batches(run, "val", ids, True, HELD_OUT, CONCEPT_TOKENS),
              read_batches(run, "val", ids, False, HELD_OUT)]
    groups += [read_batches(run, "val", tokens, True, HELD_OUT, SIBLING_TOKENS)
               for tokens in others]
    return ids, others, groups


def measure_concept(run, words, siblings):
    """The entry of a concept in unlearn.json."""
    ids, others, groups = held_out(run, words, siblings)
    model, found = run.model, {}
    start = losses(model, groups)
    for name, order in rank(run, ids, others).items():
        U = len(order)
        sizes = sorted({min(n, U) for n in SIZES})
        if "chance" in name:
            # a few random units change little, and every second size is enough
            sizes = [n for n in sizes if n > U / 20][::2]
        models = ((n, without(model, order[:n])) for n in sizes)
        found[name] = forget(models, groups, start)
        found[name]["removed"] = order[: int(found[name]["curve"][-1][0])].tolist()
    models = ((n, lowered(model, ids, n)) for n in CONSTANTS)
    found["logits"] = forget(models, groups, start)
    fisher = found["fisher"]
    if fisher["n"]:
        pair = [model, without(model, fisher["removed"])]
        lessons = read_batches(run, "train", ids, True, LESSONS)
        fisher["relearn"] = relearn(pair, lessons, groups[0])
    loss = dict(zip(["concept", *COSTS], start.tolist()))
    tokens = sum(where.sum().item() for _, _, where in groups[0])
    return {"words": words, "siblings": siblings, "tokens": tokens, "loss": loss, "rankings": found}


def means(concepts):
    """{ranking: means over concepts, their deviations _sd, and how many concepts have them, _n}."""
    rows = []
    for concept in concepts:
        for name, entry in concept["rankings"].items():
            rows.append({"ranking": name.rstrip("123"), "units": entry["n"], **entry})
    frame = pd.DataFrame(rows, columns=["ranking", "units", *COSTS, "relearn"])
    groups = frame.set_index("ranking").astype(float).groupby(level=0, sort=False)
    table = spread(groups, frame.columns[1:]).assign(n=groups.size()).astype(object)
    return table.where(table.notna(), None).to_dict("index")


def measure(result, title, device):
    """The facts of unlearn.json of one run."""
    run, concepts = result.run, result.key["settings"]["concepts"]
    run.model.to(device)
    for texts in concepts:
        held_out(run, *texts)  # an unusable concept is refused before the others are measured
    found = result.state or []
    for texts in tqdm(concepts[len(found) :], desc=title, leave=False):
        found.append(measure_concept(run, *texts))
        result.save(found)
    return {"concepts": found, "mean": means(found)}


def save(result, word, folder):
    """Write the model without the units that fisher ranks first for a concept, as a run."""
    run = result.run
    for concept in result.facts["concepts"]:
        entry = concept["rankings"]["fisher"]
        if word in concept["words"].split() and entry["n"]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            weights = without(run.model, entry["removed"]).state_dict()
            save_checkpoint(
                Path(folder, "best.pt"), run.model.config, weights, step=run.step,
                tokenizer=run.tokenizer, data=run.checksum,
                train_config=run.knobs | {"unlearned": word})  # for tables: it is another model
            print(f"{folder}: {len(entry['removed'])} units removed, the loss on "
                  f"{concept['words']} rises by {entry['curve'][-1][1]:.2f} nats")
            return
    raise UserError(f"no number of units makes {run.path} forget {word}: nothing is saved")


def main():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--concept", nargs=2, action="append", metavar=("WORDS", "SIBLINGS"),
        help='such as --concept "dog dogs" "cat bird"; can be repeated (default: five concepts)')
    add("--save", nargs=2, metavar=("WORD", "FOLDER"), help="write the model without the units")
    add("--force", action="store_true", help="replace results of other settings or weights")
    args = parser.parse_args()
    device = knobs.pick_device(args.device)
    runs = open_runs(args.runs, args.data)
    concepts = args.concept or CONCEPTS
    if args.save and (len(runs) > 1 or Path(args.save[1]).exists()):
        raise UserError("--save needs exactly one run, and a FOLDER that does not exist yet")
    if args.save and args.save[0] not in " ".join(words for words, _ in concepts).split():
        raise UserError(f"--save {args.save[0]}: no concept has this word: give --concept")
    results = []
    for run in runs:
        settings = {"data": run.meta["checksum"], "concepts": concepts}
        results.append(Result(run, "unlearn", settings, args.force))
    facts = measure_all(results, partial(measure, device=device), device)
    rows = [{"run": result["run"], "ranking": name, **row} for result in facts
            for name, row in result["mean"].items()]
    table = pd.DataFrame(rows)
    for name in COSTS:
        table[[name, f"{name}_sd"]] *= 1000
    print_table(table, COLUMNS)
    print("costs in thousandths of a nat per token; ± is the standard deviation over the concepts, "
          "for chance over concepts and orders")
    if args.save:
        save(results[0], *args.save)


if __name__ == "__main__":
    knobs.cli(main)
