"""Measure trained models: perplexity, bits per byte, L1, unit use; samples and pictures.

    python eval.py out/local_k2                        a run folder (its best.pt) or a .pt file
    python eval.py out/sweep/*/ --over_seeds           runs that differ only in the seed as one row
    python eval.py out/local_k2 --json > runs.json     the same for machines, unit by unit
    python eval.py out/local_k2 --sample "Once upon"   a story from each of the two streams
    python eval.py out/* --plot runs.png               loss curves, firing rate of every unit

Every token of the validation split is predicted once, in windows of block_size tokens that do not
overlap: the first token of a window is predicted from one token, the last from block_size.

The ± of a run is the standard error of its perplexity over those windows: how well it was measured.
With --over_seeds, ± is the sample standard deviation over the runs of a row: how much another seed
changes the result. A row of one run has none. The paper's Table 1 is made by interp/table1.py.
"""

import signal

if __name__ == "__main__":
    # torch takes seconds to import: until main() begins, Ctrl-C just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import config as knobs
from model import GPTNeo, GPTNeoConfig, ModelError, load_checkpoint, replace_file
from prepare import UserError, load_meta, load_tokenizer, load_tokens

STREAMS = ("clean", "ablated")


# --------------------------------------------------------------------------------- the measurements


class StreamLoss:
    """The cross-entropy of one stream over a whole split, in nats."""

    def __init__(self):
        self.sums, self.sizes = [], []  # nats and tokens of every window
        self.text = 0.0  # nats of all tokens but end-of-text, which has no bytes

    def add(self, logits, targets, eot):
        """logits (B, T, V), targets (B, T): B more windows."""
        rows = logits.flatten(0, 1).float()  # (B * T, V)
        losses = F.cross_entropy(rows, targets.flatten().to(rows.device), reduction="none")
        losses = losses.cpu().double().view(targets.shape)  # (B, T)
        self.sums += losses.sum(1).tolist()
        self.sizes += [targets.size(1)] * targets.size(0)
        self.text += losses[targets != eot].sum().item()

    def summary(self, stream, text_bytes):
        """{name: number} of a split whose text has so many bytes in UTF-8."""
        sums, sizes = np.array(self.sums), np.array(self.sizes)
        loss = sums.sum() / sizes.sum()
        # windows, not tokens, vary independently: standard error of a ratio of sums over windows
        variance = ((sums - loss * sizes) ** 2).sum() * len(sums) / max(1, len(sums) - 1)
        error = math.sqrt(variance) / sizes.sum()
        ppl = math.exp(loss)
        return {f"loss_{stream}": loss, f"ppl_{stream}": ppl, f"ppl_{stream}_se": ppl * error,
                f"bits_per_byte_{stream}": self.text / math.log(2) / text_bytes}


class UnitUse:
    """At how many tokens and in which stories each unit of a kind fires: those whose mask is 1."""

    def __init__(self, layers, units, stories):
        self.layers = layers
        self.tokens = torch.zeros(layers * units, dtype=torch.int64)  # (L * N)
        self.stories = torch.zeros(stories, layers * units, dtype=torch.bool)  # (stories, L * N)

    def add(self, mask, story):
        """mask (B, T, L, N) of zeros and ones; story (B, T): which story each target belongs to."""
        fired = mask.flatten(0, 1).flatten(1).bool().cpu()  # (B * T, L * N)
        self.tokens += fired.sum(0)
        token, unit = fired.nonzero(as_tuple=True)  # one entry each time a unit fires
        self.stories[story.flatten()[token], unit] = True

    def summary(self, kind, tokens):
        """{name: number or list} of a split of so many tokens."""
        rate = (self.tokens.double() / tokens).view(self.layers, -1)  # (L, N)
        return {f"{kind}_ever": (self.tokens > 0).double().mean().item(),
                f"{kind}_per_story": self.stories.sum(1).double().mean().item(),
                f"{kind}_rate": rate.tolist()}


def window_batches(count, length, batch_size):
    """The numbers 0 to count - 1 in windows: (B, length) each, then a shorter last one alone."""
    whole = count // length * length
    for start in range(0, whole, batch_size * length):
        end = min(start + batch_size * length, whole)
        yield torch.arange(start, end).view(-1, length)  # (B, length)
    if whole < count:
        yield torch.arange(whole, count)[None]  # (1, less than length)


@torch.no_grad()
def measure_split(model, tokens, eot, text_bytes, batch_size=8, device="cpu"):
    """Losses of both streams over a split, and which units fire in it -> dict of numbers and lists.

    tokens: uint16 (n,), stories that each end in eot and have text_bytes UTF-8 bytes in all.
    """
    config, gated = model.config, model.config.ablation != "none"
    # the end-of-text in front stands for the end of the story before
    text = torch.from_numpy(np.concatenate(([eot], tokens), dtype=np.int32))  # (n + 1)
    # the story that a target belongs to; masks at the position that predicts it count there
    is_end = (text[1:] == eot).int()
    story = is_end.cumsum(0) - is_end  # (n)
    losses = {stream: StreamLoss() for stream in (STREAMS if gated else STREAMS[:1])}
    use = {}
    if gated:
        stories = int(story[-1]) + 1
        use["attn"] = UnitUse(config.n_layer, config.attn_units, stories)
        use["mlp"] = UnitUse(config.n_layer, 4 * config.n_embd, stories)

    for at in window_batches(len(tokens), config.block_size, batch_size):
        inputs, targets = text[at].long(), text[at + 1].long()  # (B, T) each
        if gated:
            out = model.ablated(inputs.to(device))
            losses["clean"].add(out.logits_clean, targets, eot)
            losses["ablated"].add(out.logits_ablated, targets, eot)
            use["attn"].add(out.attn_mask, story[at])
            use["mlp"].add(out.mlp_mask, story[at])
        else:
            losses["clean"].add(model(inputs.to(device)), targets, eot)

    result = {"tokens": len(tokens), "stories": int(is_end.sum())}
    for stream, loss in losses.items():
        result |= loss.summary(stream, text_bytes)
    for kind, units in use.items():
        result |= units.summary(kind, len(tokens))
    return result


def centred(weight, dim):
    return weight - weight.mean(dim, keepdim=True)


def mean_abs(tensors):
    """The mean absolute entry of all of them together."""
    return sum(w.abs().sum().item() for w in tensors) / sum(w.numel() for w in tensors)


def l1_norms(model):
    """Mean absolute weight of the clean stream: gates are not part of the model that is used.

    l1: over the model as TransformerLens lays it out, of which the published numbers were taken:
        embedding and unembedding counted separately, zero q, k, v and unembedding biases counted,
        writing weights centred over channels, unembedding over the vocabulary, LayerNorm unfolded.
    l1_all, l1_blocks: over the model's own parameters, with and without the two embeddings.
    """
    L, C, V = model.config.n_layer, model.config.n_embd, model.config.vocab_size
    weights = {name: w.double() for name, w in model.clean_state_dict().items()}
    weights.pop("lm_head.weight")  # tied: it is the token embedding
    wte = weights.pop("transformer.wte.weight")  # (V, C)
    wpe = weights.pop("transformer.wpe.weight")  # (block_size, C)
    lens = [centred(wte, -1), centred(wpe, -1)]  # W_E, W_pos
    lens += [centred(wte, 0), wte.new_zeros(V)]  # W_U, b_U
    lens += [wte.new_zeros(3 * L * C)]  # b_Q, b_K, b_V of every layer
    for name, w in weights.items():
        # these write into the residual stream, along dimension 0
        writes = "out_proj" in name or "c_proj" in name
        lens.append(centred(w, 0) if writes else w)
    blocks = list(weights.values())
    return {"l1": mean_abs(lens), "l1_all": mean_abs([wte, wpe, *blocks]),
            "l1_blocks": mean_abs(blocks)}


# ----------------------------------------------------------------------------------------- the runs


@dataclasses.dataclass
class Run:
    """A run of train.py, opened: the model on the CPU and what its checkpoint says about it."""

    path: str  # as the user typed it
    model: GPTNeo
    step: int  # updates done
    train_config: dict  # the Config it was trained with
    tokenizer: dict  # for prepare.load_tokenizer
    data_checksum: str  # meta.json's, of the data it was trained on


class Task(NamedTuple):
    """A run and the text to measure it on."""

    run: Run
    data: str  # the folder of the text
    meta: dict  # its meta.json
    tokens: np.ndarray  # its validation split, uint16 (n,)


def run_paths(paths):
    """Those of the paths that are checkpoints or folders with one: out/* finds other things too.

    A path that does not exist stays in, and where none is a run, all stay: opening them says
    what is wrong.
    """
    runs = []
    for path in paths:
        is_run = Path(path).suffix == ".pt" or os.path.exists(Path(path, "best.pt"))
        if is_run or not os.path.exists(path):
            runs.append(path)
    for path in paths if runs else []:
        if path not in runs:
            print(f"{path} is no run: left out", file=sys.stderr)
    return runs or paths


def open_run(path):
    """The Run of a folder's best.pt or of a .pt file. Raises UserError or ModelError on others."""
    if not path:
        raise UserError("the name of a run is empty: give a run folder, such as out/local_k2, "
                        "or a .pt file")

    def entry(values, key, kind):
        if not isinstance(values.get(key), kind):
            raise UserError(f"{path} was not written by train.py: it has no {key!r}")
        return values[key]

    checkpoint = load_checkpoint(path)
    trained = entry(checkpoint, "train_config", dict)
    entry(trained, "seed", int)
    entry(trained, "data", str)
    try:
        model = GPTNeo.from_checkpoint(checkpoint).eval()
    except ModelError as error:
        raise UserError(f"{path}: {error}") from None
    for field in dataclasses.fields(GPTNeoConfig):
        name = field.name
        value = getattr(model.config, name)
        if trained.get(name, value) != value:  # earlier runs have no vocab_size there
            raise UserError(f"{path} is damaged: its config says {name}={value}, "
                            f"its training config {trained[name]}")
    return Run(path, model, entry(checkpoint, "step", int), trained,
               entry(checkpoint, "tokenizer", dict), entry(checkpoint, "data", str))


def find_data(run, data=None):
    """The data folder to measure a run on, data or else the run's own, and its meta.json.

    A relative folder is looked for here and then in the folders that the run lies in, so that
    a project can be used from elsewhere. Raises UserError where there is none, where it has
    another tokenizer than the run, or where the run's own folder has other texts by now.
    """
    name = run.train_config["data"] if data is None else data
    parents = (Path(), *Path(run.path).absolute().parents)
    places = [parent / name for parent in parents if os.path.isfile(parent / name / "meta.json")]
    folder = places[0] if places else name
    for place in places if data is None else ():  # another project's folder may have the same name
        if load_meta(place)["checksum"] == run.data_checksum:
            folder = place
            break
    meta = load_meta(folder)
    if meta["tokenizer"] != run.tokenizer:
        raise UserError(f"{folder} has another tokenizer than the one {run.path} was trained with: "
                        f"give its data with --data")
    if data is None and meta["checksum"] != run.data_checksum:
        raise UserError(f"{folder} has changed since {run.path} was trained on it (checksum "
                        f"{meta['checksum']}, not {run.data_checksum}): give the run's own data, "
                        f"or say --data={folder} to measure on it all the same")
    return str(folder), meta


def open_tasks(paths, data=None):
    """All of the runs and their data, checked: before the first takes its minutes."""
    tasks = []
    for path in run_paths(paths):
        run = open_run(path)
        folder, meta = find_data(run, data)
        tasks.append(Task(run, folder, meta, load_tokens(folder, "val")))
    return tasks


def describe_run(task):
    """What there is to say of a run before it is measured: the head of its row, a dict."""
    run, config, trained = task.run, task.run.model.config, trained_with(task.run)
    gated = config.ablation != "none"
    return {
        "run": str(run.path), "step": run.step,
        "ablation": config.ablation, "gate": config.gate, "attn_unit": config.attn_unit,
        "k_attn": config.k_attn if gated else 0, "k_mlp": config.k_mlp if gated else 0,
        "ramp_start": trained["ramp_start"], "ramp_end": trained["ramp_end"],
        "seed": trained["seed"], "data": task.data, "checksum": task.meta["checksum"]}


def evaluate_run(task, batch_size, device):
    """Everything that is measured of a run: its row, a dict."""
    model, meta = task.run.model.to(device), task.meta
    row = describe_run(task)
    row |= measure_split(model, task.tokens, meta["eot"], meta["val"]["bytes"], batch_size, device)
    return row | l1_norms(model)


# --------------------------------------------------------------------------------------- over seeds

# what the runs of a group have in common, and what is averaged over them
SHARED = ("recipe", "ablation", "gate", "attn_unit", "k_attn", "k_mlp", "ramp_start", "ramp_end",
          "data", "checksum", "tokens", "stories")
AVERAGED = (
    "step", "loss_clean", "ppl_clean", "bits_per_byte_clean",
    "loss_ablated", "ppl_ablated", "bits_per_byte_ablated",
    "attn_ever", "attn_per_story", "mlp_ever", "mlp_per_story", "l1", "l1_all", "l1_blocks")


def trained_with(run):
    """{knob: value} of a run; those that it is too old to know had the effect of their default.

    The run's own seed in init_from is written {seed}, as bench/sweep.py takes it.
    """
    values = {name: field.default for name, field in knobs.FIELDS.items()} | run.train_config
    own = rf"seed{values['seed']}(?!\d)"
    return values | {"init_from": re.sub(own, "seed{seed}", values["init_from"])}


def group_seeds(tasks):
    """Lists of places in tasks, of the runs that are the same but for seed and machine.

    Raises UserError where a seed comes twice.
    """
    groups = {}  # what the runs have in common, as text -> {seed: place}
    for place, task in enumerate(tasks):
        run = task.run
        values = knobs.decisive(trained_with(run))
        seed = values.pop("seed")
        common = [values, run.data_checksum, task.meta["checksum"]]
        group = groups.setdefault(json.dumps(common, sort_keys=True), {})
        if seed in group:
            other = tasks[group[seed]].run
            raise UserError(f"{other.path} and {run.path} are the same run with the same seed: "
                            f"give one of them")
        group[seed] = place
    return [list(group.values()) for group in groups.values()]


def averages(rows, names):
    """{name: the mean of this number over the rows}, and NAME_sd, its sample standard deviation.

    Where only some of the rows have a number, the mean is over those, and NAME_n says how many.
    The spread of a single one is None.
    """
    means = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            continue  # the baseline has no ablated stream
        means[name] = np.mean(values)
        means[f"{name}_sd"] = np.std(values, ddof=1) if len(values) > 1 else None
        if len(values) < len(rows):
            means[f"{name}_n"] = len(values)
    return means


def join_seeds(rows, groups, averaged=AVERAGED):
    """One row for every group, a list of places in rows: see averages."""
    table = []
    for places in groups:
        group = [rows[place] for place in places]
        paths = [row["run"] for row in group]
        joined = {"run": os.path.commonprefix(paths) + "*" if len(group) > 1 else paths[0]}
        joined |= {"n": len(group), "seeds": [row["seed"] for row in group]}
        joined |= {name: group[0][name] for name in SHARED if name in group[0]}
        table.append(joined | averages(group, averaged) | {"rows": group})
    return table


# ------------------------------------------------------------------------------------------- tables


def column(name, form=""):
    """A column of this entry of a row, printed in this format."""
    def show(row):
        return format(row[name], form)
    return show


def number(name, form):
    """A column of this number, ± its spread over seeds or standard error where it has one."""
    def show(row):
        text = format(row[name], form)
        spread = row.get(f"{name}_sd", row.get(f"{name}_se"))
        if spread is not None:
            text += f" ± {spread:{form}}"
        if f"{name}_n" in row:
            text += f" ({row[f'{name}_n']} of {row['n']})"
        return text
    return show


def ablation(row):
    """What tells the models of one size apart: "none", or such as "local k=1,2, heads"."""
    if not row["k_mlp"]:
        return row["ablation"]
    text = f"{row['ablation']} k={row['k_attn']}"
    if row["k_mlp"] != row["k_attn"]:
        text += f",{row['k_mlp']}"
    if row["attn_unit"] == "head":
        text += ", heads"
    if row["gate"] != "softmax":
        text += f", {row['gate']}"
    if row["ramp_end"]:
        text += f", ramp {row['ramp_start']:g} to {row['ramp_end']:g}"
    return text


def name_recipes(rows, configs):
    """Call every row, row["recipe"], after its ablation and those of its other knobs in which rows
    differ and which are not at their default.

    configs: what the rows were trained with, see trained_with.
    """
    defaults = {name: field.default for name, field in knobs.FIELDS.items()}
    told = ("ablation", "k_attn", "k_mlp", "attn_unit", "gate", "ramp_start", "ramp_end",
            "seed", "eval_interval", "eval_windows")  # or not to be told
    differing = []
    for name in knobs.decisive(defaults):
        values = {config[name] for config in configs}
        if len(values) > 1 and name not in told:
            differing.append(name)
    for row, config in zip(rows, configs):
        words = [ablation(row).replace("none", "baseline")]
        words += [f"{name} {config[name]}" for name in differing if config[name] != defaults[name]]
        row["recipe"] = ", ".join(words)


COLUMNS = [  # (heading, row -> text)
    ("run", column("run")),
    ("data", lambda row: Path(row["data"]).name),
    ("step", number("step", ",.0f")),
    ("recipe", column("recipe")),
    ("seeds", column("n")),
    ("ppl clean", number("ppl_clean", ".3f")),
    ("ppl ablated", number("ppl_ablated", ".3f")),
    ("bits/byte", number("bits_per_byte_clean", ".4f")),
    ("ablated bits", number("bits_per_byte_ablated", ".4f")),
    ("L1", number("l1", ".4f")),
    ("L1 all", number("l1_all", ".4f")),
    ("L1 blocks", number("l1_blocks", ".4f")),
    ("attn ever", number("attn_ever", ".1%")),
    ("mlp ever", number("mlp_ever", ".1%")),
    ("attn/story", number("attn_per_story", ".1f")),
    ("mlp/story", number("mlp_per_story", ".1f")),
]


def cells(rows, columns):
    """The table as text, a tuple per line, headings first.

    Missing cells, where the row lacks an entry or it is None, print -. Columns of nothing else are
    left out.
    """
    known = []
    for row in rows:
        known.append({name: value for name, value in row.items() if value is not None})
    shown = []
    for heading, show in columns:
        texts = [heading]
        for row in known:
            try:
                texts.append(show(row))
            except KeyError:  # the baseline has no ablated stream
                texts.append("-")
        if set(texts[1:]) != {"-"}:
            shown.append(texts)
    return list(zip(*shown))


def print_table(rows, columns):
    lines = cells(rows, columns)
    widths = [max(map(len, texts)) for texts in zip(*lines)]
    for first, *others in lines:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *padded]))


# ----------------------------------------------------------------------------- samples and pictures


def print_samples(run, tokenizer, args):
    """Continue the prompt once from each stream, with the same random numbers for both."""
    prompt = tokenizer.encode_ordinary(args.sample) or [tokenizer.eot_token]
    device = next(run.model.parameters()).device
    idx = torch.tensor([prompt], device=device)  # (1, T)
    for stream in STREAMS if run.model.config.ablation != "none" else STREAMS[:1]:
        generator = torch.Generator(device).manual_seed(args.seed)
        written = run.model.generate(idx, args.max_new_tokens, args.temperature, args.top_k,
                                     args.top_p, generator, stream, tokenizer.eot_token)
        tokens = written[0].tolist()
        if len(tokens) > len(prompt) and tokens[-1] == tokenizer.eot_token:
            tokens.pop()
        print(f"\n--- {run.path}, {stream} stream, "
              f"temperature {args.temperature}, seed {args.seed}")
        print(tokenizer.decode(tokens))


def check_writable(path):
    """Raises UserError when path cannot be written: now, before the work whose result it is."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(0, "there is a folder of that name")
        with open(f"{path}.tmp", "wb"):
            pass
        os.remove(f"{path}.tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def save_figure(path, figure):
    """A matplotlib figure, atomically, in the format that path ends in."""
    with replace_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)


def validation_curves(path):
    """{stream: its points (updates, loss)} from a run's metrics.jsonl; a lone .pt has none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    curves = {stream: [] for stream in STREAMS}
    if not (folder / "metrics.jsonl").exists():
        return curves
    try:
        for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            for stream in STREAMS:
                step, loss = line["step"], line[f"val_{stream}"]
                if step and loss is not None:  # the loss of step 0 would squeeze all others
                    curves[stream].append((float(step), float(loss)))
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'metrics.jsonl'} is damaged: without it --plot "
                        f"leaves out the curves of this run") from None
    return curves


def draw_runs(path, rows, curves):
    """Validation curves of all runs in one frame; below, for each run, how often its units fire."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    gated = [row for row in rows if "attn_rate" in row]
    figure = Figure(figsize=(11, 4.2 + 2.2 * len(gated)), layout="constrained")
    grid = figure.add_gridspec(1 + len(gated), 2, height_ratios=[4] + [2.2] * len(gated),
                               width_ratios=[1, 3])
    axes = figure.add_subplot(grid[0, :])
    for place, (row, streams) in enumerate(zip(rows, curves)):
        for (stream, points), style in zip(streams.items(), ("-", "--")):
            if points:
                label = f"{row['run']}, {stream}"
                axes.plot(*zip(*points), style, color=f"C{place}", label=label)
    axes.set(xlabel="updates", ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")

    for line, row in enumerate(gated, 1):
        for side, (kind, name) in enumerate((("attn", "attention units"), ("mlp", "neurons"))):
            rate = -np.sort(-np.array(row[f"{kind}_rate"]), 1)  # (L, N), the busiest first
            rate[rate == 0] = np.nan  # units that never fire stay white
            axes = figure.add_subplot(grid[line, side])
            image = axes.imshow(rate, aspect="auto", origin="lower", interpolation="nearest",
                                norm=LogNorm(1e-4, 1, clip=True))
            axes.set(xlabel="units of each layer, the busiest first", ylabel="layer",
                     yticks=range(len(rate)))
            axes.set_title(f"{row['run']}: {name}", fontsize="medium")
        figure.colorbar(image, ax=axes, label="share of tokens (white: never)")
    save_figure(path, figure)


# ------------------------------------------------------------------------------------- command line


def run_parser(description):
    """An argparse parser for a program that works on runs: which ones, and on which device."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    parser.add_argument("--device", default="auto", help="auto takes a GPU if there is one")
    return parser


def measuring_parser(description):
    """The same for a program that evaluates runs: on which data, how fast, for whom it prints."""
    parser = run_parser(description)
    add = parser.add_argument
    add("--data", help="prepared data to measure on (default: the run's own)")
    add("--batch_size", type=int, default=8, help="windows at a time: for speed and memory only")
    add("--json", action="store_true", help="print JSON, with each unit's firing rate, and no more")
    return parser


def check_range(args, name, low, high=math.inf):
    """Raises UserError where a flag was given and is not in this range."""
    value = getattr(args, name)
    if value is not None and not low <= value <= high:
        limits = f"at least {low}" if high == math.inf else f"from {low} to {high:,}"
        raise UserError(f"--{name}={value} must be {limits}")


def check_picture(path):
    """Raises UserError when --plot names a file that cannot be written or is no picture.

    None is no picture.
    """
    if path is None:
        return
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot={path} must end in .png, .pdf or .svg")
    check_writable(path)


def parse_list(flag, text, kind):
    """"2,5,10" -> [2, 5, 10], of kind int or float. Raises UserError."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    in_range = all(0 <= value < 2**63 for value in values)
    if not values or len(set(values)) < len(values) or not in_range:
        kinds = "numbers" if kind is float else "whole numbers"
        raise UserError(f"{flag}={text} must be {kinds} from 0 on, each once, with commas between "
                        f"them, such as 2,5,10")
    return values


def parse_arguments():
    """The command line. Raises UserError on what cannot work."""
    parser = measuring_parser(__doc__)
    add = parser.add_argument
    add("--over_seeds", action="store_true",
        help="one row for runs that differ only in the seed: mean ± sample standard deviation")
    add("--plot", metavar="FILE", help="save the picture of loss curves and unit use")
    add("--sample", metavar="PROMPT", help="write on from this text, from each stream")
    add("--max_new_tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top_k", type=int, help="sample from the k likeliest tokens only")
    add("--top_p", type=float, help="sample from the fewest tokens that hold this probability")
    add("--seed", type=int, default=1337, help="of the samples")
    args = parser.parse_args()
    for name in ("batch_size", "max_new_tokens", "top_k"):
        check_range(args, name, 1)
    check_range(args, "top_p", 1e-6, 1)
    check_range(args, "seed", 0, 2**63 - 1)
    if args.temperature != 0 and not args.temperature >= 1e-6:  # logits are divided by it
        raise UserError(f"--temperature={args.temperature} must be at least 1e-06, or 0: greedy")
    if args.json and args.sample is not None:
        raise UserError("--json prints numbers and nothing else: drop --sample")
    check_picture(args.plot)
    return args


def main():
    args = parse_arguments()
    device = knobs.pick_device(args.device)
    tasks = open_tasks(args.runs, args.data)
    groups = group_seeds(tasks) if args.over_seeds else []
    tokenizers, curves = [], []
    if args.sample is not None:
        tokenizers = [load_tokenizer(task.run.tokenizer) for task in tasks]
    if args.plot is not None:
        curves = [validation_curves(task.run.path) for task in tasks]

    rows = [evaluate_run(task, args.batch_size, device) for task in tasks]
    name_recipes(rows, [trained_with(task.run) for task in tasks])
    table = join_seeds(rows, groups) if args.over_seeds else rows
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print_table(table, COLUMNS)
        if args.over_seeds:
            print("± is the sample standard deviation over the seeds of a row")
        for task, tokenizer in zip(tasks, tokenizers):
            print_samples(task.run, tokenizer, args)
    if args.plot is not None:
        draw_runs(args.plot, rows, curves)


if __name__ == "__main__":
    knobs.cli(main)
