"""Measure trained models: perplexity, bits per byte, L1, how often units are used; samples; a plot.

    python eval.py out/local_k2                        a run folder (its best.pt) or a .pt file
    python eval.py out/sweep/*/ --over_seeds           one row for runs that differ only in the seed
    python eval.py out/local_k2 --json > runs.json     every number, with each unit's firing rate
    python eval.py out/local_k2 --sample "Once upon"   a story from each of the two streams
    python eval.py out/* --plot runs.png               loss curves, firing rate of every unit

The ± of a perplexity is its standard error over windows of block_size tokens. With --over_seeds
every ± is the sample standard deviation over the runs of a row.
"""

import json
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

import config as knobs
from model import GPTNeo, load_checkpoint, replace_file
from prepare import EOT, UserError, load_meta, load_tokenizer, load_tokens

DEFAULTS = {name: field.default for name, field in knobs.FIELDS.items()}
# what runs of one recipe share: the knobs that decide the result, and the data
RECIPE = [*knobs.decisive(DEFAULTS), "removed_knobs", "checksum", "trained_on"]
RECIPE.remove("seed")
COLUMNS = {  # of the table: entry of a row, its format
    "run": "", "data": "", "step": ",.0f",
    "ablation": "", "k_attn": "", "k_mlp": "", "differs": "", "n": "",
    "ppl_clean": ".3f", "ppl_ablated": ".3f",
    "bits_per_byte_clean": ".4f", "bits_per_byte_ablated": ".4f",
    "l1": ".4f", "l1_all": ".4f", "l1_blocks": ".4f",
    "attn_ever": ".1%", "mlp_ever": ".1%", "attn_per_story": ".1f", "mlp_per_story": ".1f",
}

# ------------------------------------------------------------------------------------ measurements


def loss_numbers(stream, losses, is_end, T, text_bytes):
    """{name: number} of one stream over a split with text_bytes UTF-8 bytes of text.
    losses (n,): nats per token. is_end (n,): end-of-text tokens, which have no bytes."""
    starts = np.arange(0, len(losses), T)
    sums = np.add.reduceat(losses.numpy(), starts)  # nats of each window
    sizes = np.diff(starts, append=len(losses))  # tokens of each window
    loss = sums.sum() / sizes.sum()
    # windows vary independently, tokens do not: standard error of a ratio of sums over windows
    deviation = (sums - loss * sizes).std(ddof=1) if len(sums) > 1 else 0.0
    error = deviation * math.sqrt(len(sums)) / sizes.sum()
    bits = losses[~is_end].sum().item() / math.log(2)
    ppl = math.exp(loss)
    return {
        f"loss_{stream}": loss,
        f"ppl_{stream}": ppl,
        f"ppl_{stream}_se": ppl * error,
        f"bits_per_byte_{stream}": bits / text_bytes}


@torch.no_grad()
def measure_split(model, tokens, eot, text_bytes, batch_size=8, device="cpu"):
    """{name: number or list}: the losses of each stream over a split, and the use of units.
    tokens: uint16 (n,), stories that each end in eot, with text_bytes UTF-8 bytes in all.
    A unit is used at a token when its mask is 1 there."""
    n = len(tokens)
    T = model.config.block_size
    gated = model.config.ablation != "none"
    # the text begins after an end-of-text, as if another story came before
    text = torch.from_numpy(np.concatenate(([eot], tokens)))  # (n + 1)
    inputs, targets = text[:-1], text[1:]  # (n)
    is_end = targets == eot  # (n)
    story = (inputs == eot).cumsum(0) - 1  # (n): the story of each target, counted from 0
    losses = defaultdict(list)  # nats per token
    counts = defaultdict(int)  # tokens at which each unit is used (L, N)
    seen = {}  # whether it is used in a story (stories, L, N): a byte each, as there may be many
    whole = n // T * T  # tokens in windows of full length
    windows = [*torch.arange(whole).view(-1, T).split(batch_size)]  # (B, T) each
    windows.append(torch.arange(whole, n)[None])  # (1, n - whole): the shorter rest
    for at in filter(torch.numel, windows):
        idx = inputs[at].to(device)
        answers = targets[at].flatten().to(device)  # (B * T)
        outputs = model.ablated(idx) if gated else [model(idx)]
        for stream, logits in zip(("clean", "ablated"), outputs):  # (B, T, V)
            rows = logits.flatten(0, 1).float()  # (B * T, V)
            nats = F.cross_entropy(rows, answers, reduction="none")  # (B * T)
            losses[stream].append(nats.cpu().double())
        for kind, mask in zip(("attn", "mlp"), outputs[2:]):  # (B, T, L, N) of zeros and ones
            used = mask.flatten(0, 1).bool().cpu()  # (B * T, L, N)
            if kind not in seen:
                seen[kind] = used.new_zeros(story[-1] + 1, *used.shape[1:])
            counts[kind] += used.sum(0)
            token, *unit = used.nonzero(as_tuple=True)
            seen[kind][story[at].flatten()[token], *unit] = True

    numbers = {"tokens": n, "stories": int(is_end.sum())}
    for stream, nats in losses.items():
        numbers |= loss_numbers(stream, torch.cat(nats), is_end, T, text_bytes)
    for kind, count in counts.items():
        rate = count.numpy() / n  # (L, N)
        numbers[f"{kind}_ever"] = (rate > 0).mean()
        numbers[f"{kind}_per_story"] = seen[kind].sum((1, 2)).numpy().mean()
        numbers[f"{kind}_rate"] = rate.tolist()
    return numbers


def centred(weight, dim):
    return weight - weight.mean(dim, keepdim=True)


def l1_norms(model):
    """Mean absolute weight of the clean stream. Gates do not count.

    l1: of the weights as TransformerLens stores them, which the paper used: embedding and
        unembedding apart, zero biases of q, k, v and unembedding, weights that write to the
        residual stream centred over channels, the unembedding over the vocabulary.
    l1_all, l1_blocks: of the model's own weights, with and without the two embeddings.
    """
    weights = {name: w.cpu().double() for name, w in model.clean_state_dict().items()}
    weights.pop("lm_head.weight")  # tied: it is the token embedding
    wte = weights.pop("transformer.wte.weight")  # (V, C)
    wpe = weights.pop("transformer.wpe.weight")  # (block_size, C)
    biases = len(wte) + 3 * model.config.n_embd * model.config.n_layer  # b_U; b_Q, b_K, b_V
    lens = [centred(wte, -1), centred(wpe, -1), centred(wte, 0)]  # W_E, W_pos, W_U
    lens.append(wte.new_zeros(biases))
    for name, w in weights.items():
        writes = "out_proj" in name or "c_proj" in name
        lens.append(centred(w, 0) if writes else w)
    blocks = list(weights.values())
    counted = {"l1": lens, "l1_blocks": blocks, "l1_all": [wte, wpe, *blocks]}
    return {name: parameters_to_vector(ws).abs().mean().item() for name, ws in counted.items()}


# ------------------------------------------------------------------------------------ runs as rows


class Run(NamedTuple):
    path: str  # as the user typed it
    model: GPTNeo
    step: int  # updates done
    knobs: dict  # {name: value} that it was trained with
    tokenizer: dict  # for load_tokenizer
    checksum: str  # of the data that it was trained on
    folder: Path | None = None  # data to measure it on, and their meta.json: see with_data
    meta: dict | None = None


def open_run(path):
    """The Run of a folder's best.pt or of a .pt file. Raises ModelError."""
    found = load_checkpoint(path)
    model = GPTNeo.from_checkpoint(found).eval()
    trained = DEFAULTS | found["train_config"] | vars(model.config)
    return Run(str(path), model, found["step"], trained, found["tokenizer"], found["data"])


def with_data(run, data=None):
    """The Run with the data to measure it on: this folder, or its training data, which are searched
    for in the current folder and in every folder above the run. Raises UserError."""
    name = data or run.knobs["data"]
    places = [Path()]
    if not data:
        places += Path(run.path).absolute().parents
    folders = [place / name for place in places if (place / name / "meta.json").is_file()]
    for folder in folders or [name]:
        meta = load_meta(folder)
        if meta["tokenizer"] == run.tokenizer and (data or meta["checksum"] == run.checksum):
            return run._replace(folder=Path(folder), meta=meta)
    raise UserError(f"{folder} has another tokenizer than {run.path}, or has changed since "
                    f"training: give data of the same tokenizer with --data")


def run_paths(paths):
    """The run folders and .pt files among paths, so that out/* works; all paths if none is one."""
    found = []
    for path in paths:
        if path.endswith(".pt") or Path(path, "best.pt").exists() or not os.path.exists(path):
            found.append(path)
        else:
            print(f"{path} has no best.pt: skipped", file=sys.stderr)
    return found or paths


def open_runs(paths, data=None):
    """The Runs of run_paths, with data: see with_data. Raises ModelError or UserError."""
    return [with_data(open_run(path), data) for path in run_paths(paths)]


def describe_run(run):
    """The row of a run before it is measured: a dict with every knob that decides the result."""
    trained = knobs.decisive(run.knobs)
    removed = {name: value for name, value in trained.items() if name not in DEFAULTS}
    row = {"run": run.path, "step": run.step, "data": run.folder.name,
           "checksum": run.meta["checksum"], "trained_on": run.checksum,
           **{name: trained[name] for name in knobs.decisive(DEFAULTS)},
           "removed_knobs": str(removed or "")}  # of older code and interp/unlearn.py
    if row["ablation"] == "none":
        row |= {"k_attn": 0, "k_mlp": 0}
    # bench/sweep.py fine-tunes each seed from the run of the same seed
    row["init_from"] = re.sub(rf"seed{row['seed']}(?!\d)", "seed{seed}", row["init_from"])
    return row


def measure_run(run, batch_size, device):
    """The row of a run: a dict. device: a torch.device."""
    model = run.model.to(device)
    tokens = load_tokens(run.folder, "val")
    text_bytes = run.meta["val"]["bytes"]
    numbers = measure_split(model, tokens, run.meta["eot"], text_bytes, batch_size, device)
    return describe_run(run) | numbers | l1_norms(model)


# ------------------------------------------------------------------------------------------ tables


def over_seeds(frame):
    """One row for the runs that differ only in the seed. Raises UserError where a seed repeats.
    Every number x becomes its mean x, its sample standard deviation x_sd, and x_n, the number of
    runs that have it."""
    shared = [*frame.filter([*RECIPE, "layer"])]
    repeated = frame["run"][frame.duplicated([*shared, "seed"], keep=False)]
    if len(repeated):
        raise UserError(f"{' and '.join(repeated)} are the same run with the same seed: "
                        f"give one of them")
    groups = frame.groupby(shared, sort=False)
    table = groups.agg(run=("run", lambda runs: os.path.commonprefix([*runs])),
                       n=("seed", "size"), seeds=("seed", list), data=("data", "first"))
    table["run"] += np.where(table["n"] > 1, "*", "")
    names = frame.select_dtypes("number").columns.difference([*shared, "seed"], sort=False)
    table = table.join(spread(groups, names))
    return table.copy().reset_index()  # a copy: pandas warns of scattered columns


def spread(groups, names):
    """For each group of a grouped DataFrame the mean of each number x, its sample standard
    deviation x_sd, and x_n, how many rows have it."""
    numbers = groups[[*names]].agg(["mean", "std", "count"])
    numbers.columns = [name + end for name in names for end in ("", "_sd", "_n")]
    return numbers


def differences(frame):
    """One text per row: the knobs in which rows differ, where they are not at their default.
    ablation and k have columns of their own."""
    shared = frame.filter(["seed", *RECIPE])
    shared = shared.drop(columns=["ablation", "k_attn", "k_mlp", "checksum"])
    texts = frame["run"].str[:0]  # empty ones
    for name, values in shared.loc[:, shared.nunique() > 1].items():
        words = f" {name}=" + values.map(str)
        texts += words.where(values != DEFAULTS.get(name, ""), "")
    return texts.str.strip()


def cell(row, name, form):
    """An entry of a row as text, ± its deviation or error; - where the row lacks it."""
    if row.get(name) is None:
        return "-"
    text = format(row[name], form)
    error = row.get(f"{name}_sd", row.get(f"{name}_se"))
    if error is not None:
        text += f" ± {error:{form}}"
    have, runs = row.get(f"{name}_n"), row.get("n")
    if have not in (None, runs):
        text += f" ({have} of {runs})"
    return text


def records(frame):
    """The rows of a DataFrame as dicts, with None for what a row lacks."""
    filled = frame.astype(object).where(frame.notna(), None)
    return filled.to_dict("records")


def text_table(frame, columns):
    """A DataFrame of texts, without the columns in which no row has anything. columns: {name of an
    entry: its format}."""
    table = frame[[]].copy()  # the index alone
    for name, form in columns.items():
        table[name] = [cell(row, name, form) for row in records(frame)]
    return table.loc[:, ~table.isin(["-", ""]).all()]


def print_table(frame, columns):
    """text_table on the terminal, the runs aligned to the left."""
    table = text_table(frame, columns).set_index("run").rename_axis(index=None, columns="run")
    print(table.to_string())


# ---------------------------------------------------------------- samples, plots, command line


def print_samples(run, args):
    """Continue the prompt once from each stream, with the same random numbers, to its end."""
    tokenizer = load_tokenizer(run.tokenizer)
    eot = tokenizer.eot_token
    prompt = tokenizer.encode_ordinary(args.sample) or [eot]
    idx = torch.tensor([prompt], device=run.model.lm_head.weight.device)  # (1, T)
    gated = run.model.config.ablation != "none"
    for stream in ("clean", "ablated") if gated else ("clean",):
        torch.manual_seed(args.seed)
        story = run.model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, stream)
        tokens = story[0].tolist()
        end = [*tokens, eot].index(eot, len(prompt))  # the first one that the model wrote
        text = tokenizer.decode(tokens[:end]).removeprefix(EOT)
        print(f"\n--- {run.path}, {stream} stream\n{text}")


def plain(text):
    """Text as matplotlib needs it: $ would begin a formula, and a leading _ hides a label."""
    return re.sub("^_", " _", str(text).replace("$", r"\$"))


def save_figure(path, figure):
    """Save a matplotlib figure in the format of path's ending. A failed call writes no file."""
    with replace_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)


def draw_runs(path, rows):
    """Three panels: validation loss; firing rate of the attention units, and of the neurons."""
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss, *panels = figure.subplots(1, 3)
    loss.set(title="validation loss, nats per token (dashed: ablated)", xlabel="updates")
    loss.set_prop_cycle(linestyle=["-", "--"])
    for place, row in enumerate(rows):
        color = f"C{place}"
        run = Path(row["run"])
        folder = run if run.is_dir() else run.parent
        metrics = folder / "metrics.jsonl"
        if metrics.exists():
            lines = pd.read_json(metrics, lines=True)[1:]  # without step 0, whose loss is far above
            losses = lines[["val_clean", "val_ablated"]]
            loss.plot(lines["step"], losses, color=color, label=plain(row["run"]))
        for axes, kind in zip(panels, ("attn", "mlp")):
            rates = np.array(row.get(f"{kind}_rate", []))  # (L, N)
            axes.semilogy(-np.sort(-rates).T, color=color)
            axes.set(title=f"firing rate of {kind} units in each layer", xlabel="rank of the unit")
    loss.legend(handles=loss.lines[:12:2])  # six names at most
    save_figure(path, figure)


def run_parser(description):
    """An argparse parser with the flags of every program that works on runs."""
    parser = knobs.Parser(description=description)
    add = parser.add_argument
    add("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    add("--device", default="auto", help="auto takes a GPU if there is one")
    add("--data", help="prepared data to measure on (default: the run's own)")
    return parser


def main():
    parser = run_parser(__doc__)
    add = parser.add_argument
    add_one_of = parser.add_mutually_exclusive_group().add_argument
    add("--batch_size", type=knobs.positive, default=8, help="windows at a time")
    add("--over_seeds", action="store_true", help="one row for runs that differ only in the seed")
    add("--plot", type=knobs.picture, metavar="FILE", help="plot loss curves and unit use")
    add_one_of("--json", action="store_true", help="print JSON and nothing else")
    add_one_of("--csv", action="store_true", help="print CSV and nothing else")
    add_one_of("--sample", metavar="PROMPT", help="continue this text with each stream")
    add("--max_new_tokens", type=knobs.positive, default=200)
    add("--temperature", type=float, default=0.8, help="0 or less takes the likeliest token")
    add("--top_k", type=knobs.positive, help="sample from the k likeliest tokens only")
    add("--seed", type=int, default=1337, help="of the samples")
    args = parser.parse_args()
    for name in ("max_new_tokens", "temperature", "top_k", "seed"):
        if args.sample is None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --sample")
    import pandas as pd  # takes a third of a second

    device = knobs.pick_device(args.device)
    runs = open_runs(args.runs, args.data)
    if args.over_seeds:
        over_seeds(pd.DataFrame(map(describe_run, runs)))  # refuses a repeated seed at once
    rows = [measure_run(run, args.batch_size, device) for run in runs]
    frame = pd.DataFrame(rows)
    if args.over_seeds:
        frame = over_seeds(frame)
    frame["differs"] = differences(frame)
    if args.json:
        print(json.dumps(records(frame), indent=1))  # with every digit
    elif args.csv:
        numbers = frame.drop(columns=["attn_rate", "mlp_rate"], errors="ignore")
        print(numbers.to_csv(index=False), end="")
    else:
        print_table(frame, COLUMNS)
        if args.over_seeds and frame["n"].max() > 1:
            print("± is the sample standard deviation over the seeds of a row")
    if args.sample is not None:
        for run in runs:
            print_samples(run, args)
    if args.plot:
        draw_runs(args.plot, rows)


if __name__ == "__main__":
    knobs.cli(main)
