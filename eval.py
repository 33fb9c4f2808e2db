"""Measure trained models: perplexity, bits per byte, L1, unit use; samples and pictures.

    python eval.py out/local_k2                           one run folder (its best.pt) or one .pt file
    python eval.py out/* --table1                         the paper's Table 1: circuits and autoencoders too, beside the paper's
    python eval.py out/sweep/*/ --over_seeds              runs that differ only in the seed as one row: mean ± spread
    python eval.py out/local_k2 --json > local_k2.json    the same for machines, unit by unit
    python eval.py out/local_k2 --sample "Once upon a time"    stories from the clean and the ablated stream
    python eval.py out/* --plot runs.png                  loss curves over each other, firing rate of every unit

Every token of the validation split is predicted once, in windows of block_size tokens that do not overlap: the first
token of a window is predicted from one token, the last from block_size.

The ± of a run is the standard error of its perplexity over those windows: how well it was measured. With --over_seeds ±
is the sample standard deviation over the runs of a row: how much another seed changes the result; a row of one run has none.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import config as knobs
from model import GPTNeo, load_checkpoint, replace_file
from prepare import UserError, load_meta, load_tokenizer, load_tokens

STREAMS = ("clean", "ablated")


@torch.no_grad()
def measure(model, tokens, eot, text_bytes, batch_size=8, device="cpu"):
    """Losses of both streams over a whole split, and which units fire in it -> dict of numbers and lists.

    tokens: uint16 (n,), stories that each end in eot, text_bytes UTF-8 bytes in all. The split is read in
    windows of block_size tokens, the first after an eot that stands for the end of the story before.
    """
    config, T = model.config, model.config.block_size
    streams = STREAMS if config.ablation != "none" else STREAMS[:1]
    units = {"attn": config.attn_units, "mlp": 4 * config.n_embd} if len(streams) == 2 else {}
    nats = {stream: [] for stream in streams}  # one sum a window
    text_nats = dict.fromkeys(streams, 0.0)  # end-of-text not counted: it has no bytes
    tokens_fired = {kind: torch.zeros(config.n_layer * n, dtype=torch.int64) for kind, n in units.items()}
    # story_of[i]: the story that token i belongs to, so masks at the position predicting it count there
    is_end = np.asarray(tokens) == eot
    story_of = torch.from_numpy(np.cumsum(is_end) - is_end)
    story_fired = {kind: torch.zeros(int(story_of[-1]) + 1, config.n_layer * n, dtype=torch.bool)
                   for kind, n in units.items()}

    starts = list(range(0, len(tokens), T))
    whole = len(tokens) // T  # the last window may be shorter, so it comes alone
    for at in (*range(0, whole, batch_size), *([whole] if whole < len(starts) else [])):
        begins = starts[at : min(at + batch_size, whole) if at < whole else None]
        targets = torch.stack([torch.from_numpy(tokens[b : b + T].astype(np.int64)) for b in begins])
        first = torch.tensor([eot if b == 0 else int(tokens[b - 1]) for b in begins])
        idx = torch.cat((first[:, None], targets[:, :-1]), 1).to(device)
        out = model.ablated(idx) if units else None
        for stream, logits in zip(streams, (out.logits_clean, out.logits_ablated) if units else (model(idx),)):
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="none")
            losses = losses.cpu().double().view(targets.shape)
            nats[stream] += losses.sum(1).tolist()
            text_nats[stream] += losses[targets != eot].sum().item()
        stories = story_of[torch.stack([torch.arange(b, b + targets.size(1)) for b in begins])].flatten()
        for kind in units:
            mask = getattr(out, f"{kind}_mask").flatten(0, 1).flatten(1).bool().cpu()  # (tokens, L * N)
            tokens_fired[kind] += mask.sum(0)
            row, unit = mask.nonzero(as_tuple=True)
            story_fired[kind][stories[row], unit] = True

    result = {"tokens": len(tokens), "stories": len(is_end.nonzero()[0])}
    sizes = np.minimum(T, len(tokens) - np.array(starts))
    for stream in streams:
        sums = np.array(nats[stream])
        loss = sums.sum() / len(tokens)
        # windows, not tokens, vary independently: standard error of a ratio of sums over windows
        error = math.sqrt(((sums - loss * sizes) ** 2).sum() * len(sums) / max(1, len(sums) - 1)) / len(tokens)
        result |= {f"loss_{stream}": loss, f"ppl_{stream}": math.exp(loss), f"ppl_{stream}_se": math.exp(loss) * error,
                   f"bits_per_byte_{stream}": text_nats[stream] / math.log(2) / text_bytes}
    for kind in units:
        result |= {f"{kind}_ever": (tokens_fired[kind] > 0).double().mean().item(),
                   f"{kind}_per_story": story_fired[kind].sum(1).double().mean().item(),
                   f"{kind}_rate": (tokens_fired[kind].double() / len(tokens)).view(config.n_layer, -1).tolist()}
    return result


def l1_norms(model):
    """Mean absolute weight of the clean stream (gates are not part of the model that is used), three ways.

    l1: over the model as TransformerLens lays it out, which is what the published numbers were taken on:
        embedding and unembedding counted separately, zero q, k, v and unembedding biases counted, writing
        weights centred over channels, unembedding centred over the vocabulary, LayerNorm not folded.
    l1_all, l1_blocks: over the model's own parameters, with and without the two embeddings.
    """
    weights = {name: w.double() for name, w in model.clean_state_dict().items() if name != "lm_head.weight"}  # tied
    embeddings = [weights["transformer.wte.weight"], weights["transformer.wpe.weight"]]
    blocks = [w for name, w in weights.items() if name.split(".")[1] not in ("wte", "wpe")]
    lens = [w - w.mean(-1, keepdim=True) for w in embeddings]
    lens += [embeddings[0] - embeddings[0].mean(0), embeddings[0].new_zeros(model.config.vocab_size)]  # W_U, b_U
    lens += [w.new_zeros(3 * model.config.n_embd) for w in [embeddings[0]] * model.config.n_layer]  # b_Q, b_K, b_V
    for name, w in weights.items():
        if "wte" not in name and "wpe" not in name:
            writes = "out_proj" in name or "c_proj" in name  # into the residual stream, along dimension 0
            lens.append(w - w.mean(0) if writes else w)

    def mean_abs(tensors):
        return sum(w.abs().sum().item() for w in tensors) / sum(w.numel() for w in tensors)

    return {"l1": mean_abs(lens), "l1_all": mean_abs(embeddings + blocks), "l1_blocks": mean_abs(blocks)}


def run_paths(paths):
    """Those of the paths that are checkpoints or folders with one: out/* finds tables and folders of other things too. A path
    that does not exist, or where none is left, stays in: opening it says what is wrong."""
    runs = [path for path in paths if not Path(path).exists() or Path(path).suffix == ".pt" or Path(path, "best.pt").exists()]
    for path in paths if runs else ():
        if path not in runs:
            print(f"{path} is no run: left out", file=sys.stderr)
    return runs or paths


@dataclass
class Run:
    """A run of train.py, opened: the model on the CPU and what its checkpoint says about it."""

    path: str  # as the user typed it
    model: GPTNeo
    step: int  # updates done
    train_config: dict  # the Config it was trained with
    tokenizer: dict  # for prepare.load_tokenizer
    data_checksum: str  # meta.json's, of the data it was trained on


def open_run(path):
    """The Run of a run folder's best.pt or of a .pt file. Raises UserError or ModelError on any other file."""
    checkpoint = load_checkpoint(path)
    for key, kind in (("train_config", dict), ("tokenizer", dict), ("step", int), ("data", str)):
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path} was not written by train.py: it has no {key!r}")
    return Run(path, GPTNeo.from_checkpoint(checkpoint).eval(), checkpoint["step"],
               checkpoint["train_config"], checkpoint["tokenizer"], checkpoint["data"])


def find_data(run, data=None):
    """The data folder to measure a run on, data or else the run's own, and its meta.json -> (folder, meta).

    A relative folder is looked for here and then in the folders that the run lies in, so that a project can be
    used from elsewhere. Raises UserError where there is none, or it has another tokenizer than the run.
    """
    data = data or run.train_config["data"]
    places = [Path(data), *(parent / data for parent in Path(run.path).absolute().parents)]
    data = next((place for place in places if (place / "meta.json").is_file()), data)
    meta = load_meta(data)
    if meta["tokenizer"] != run.tokenizer:
        raise UserError(f"{data} has another tokenizer than the one {run.path} was trained with: "
                        f"give its data with --data")
    return str(data), meta


def check_writable(path):
    """Raises UserError when no file could be written to path: now, before the minutes of work whose result it is."""
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


def evaluate(path, checkpoint, data, batch_size, device):
    """One run's row, a dict of everything measured, and its model."""
    model, meta = GPTNeo.from_checkpoint(checkpoint, device), load_meta(data)
    config = model.config
    row = {"run": str(path), "step": checkpoint["step"], "ablation": config.ablation, "gate": config.gate,
           "attn_unit": config.attn_unit, "k_attn": config.k_attn if config.ablation != "none" else 0,
           "k_mlp": config.k_mlp if config.ablation != "none" else 0,
           "seed": checkpoint["train_config"]["seed"], "data": data, "checksum": meta["checksum"]}
    row |= measure(model, load_tokens(data, "val"), meta["eot"], meta["val"]["bytes"], batch_size, device)
    return row | l1_norms(model), model


def group_seeds(runs):
    """Lists of indices into runs, of those that are the same but for seed and machine. Raises UserError on a seed twice."""
    groups = {}
    for i, (path, checkpoint, data) in enumerate(runs):
        values = knobs.decisive(checkpoint["train_config"])
        seed = values.pop("seed")
        same = json.dumps([values, checkpoint["data"], load_meta(data)["checksum"]], sort_keys=True)
        group = groups.setdefault(same, {})
        if seed in group:
            raise UserError(f"{runs[group[seed]][0]} and {path} are the same run with the same seed: give one of them")
        group[seed] = i
    return [list(group.values()) for group in groups.values()]


def over_seeds(group):
    """One row of several: every number that was measured as its mean, with its sample standard deviation as NAME_sd. What
    some of them lack is the mean of the others, NAME_n of them."""
    paths = [row["run"] for row in group]
    merged = {"run": os.path.commonprefix(paths) + "*" if len(group) > 1 else paths[0],
              "n": len(group), "seeds": [row["seed"] for row in group]}
    for name, value in {name: value for row in group for name, value in row.items()}.items():
        if name == "step" or isinstance(value, float) and not name.endswith("_se"):
            values = [row[name] for row in group if row.get(name) is not None]
            merged |= {name: np.mean(values), f"{name}_sd": np.std(values, ddof=1) if len(values) > 1 else None}
            merged |= {f"{name}_n": len(values)} if len(values) < len(group) else {}
        elif isinstance(value, (int, str)) and name not in ("run", "seed"):  # the same in all of them
            merged[name] = value
    return merged | {"rows": group}


def column(name, form=""):
    """A column of this entry of a row, printed in this format."""
    def show(row):
        return format(row[name], form)
    return show


def number(name, form):
    """A column of this number, ± its spread over seeds or its standard error over windows where the row has one."""
    def show(row):
        spread = row.get(f"{name}_sd", row.get(f"{name}_se"))
        some = f" ({row[f'{name}_n']} of {row['n']})" if f"{name}_n" in row else ""
        return f"{row[name]:{form}}" + (f" ± {spread:{form}}" if spread is not None else "") + some
    return show


COLUMNS = [  # heading, how to print it; a column that no row has is left out
    ("run", lambda r: r["run"]),
    ("data", lambda r: Path(r["data"]).name),
    ("step", number("step", ",.0f")),
    ("ablation", lambda r: r["ablation"] if not r["k_mlp"] else f"{r['ablation']} k={r['k_attn']}"
     + (f",{r['k_mlp']}" if r["k_mlp"] != r["k_attn"] else "")
     + (", heads" if r["attn_unit"] == "head" else "") + (", sigmoid" if r["gate"] == "sigmoid" else "")),
    ("seeds", lambda r: str(r["n"])),
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
    """The table as text, a list per line, headings first. - is what a row has not; columns of nothing else are left out."""
    def cell(show, row):
        try:
            return show(row)
        except KeyError:  # the baseline has no ablated stream, the paper not every k
            return "-"

    table = [[heading, *(cell(show, row) for row in rows)] for heading, show in columns]
    return list(zip(*(column for column in table if set(column[1:]) != {"-"})))


def print_table(rows, columns):
    lines = cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))]))


def print_samples(name, model, tokenizer, args):
    """Continue the prompt once from each stream, with the same random numbers."""
    prompt = tokenizer.encode_ordinary(args.sample) or [tokenizer.eot_token]
    device = next(model.parameters()).device
    for stream in STREAMS if model.config.ablation != "none" else STREAMS[:1]:
        generator = torch.Generator(device).manual_seed(args.seed)
        tokens = model.generate(torch.tensor([prompt], device=device), args.max_new_tokens, args.temperature,
                                args.top_k, args.top_p, generator, stream, tokenizer.eot_token)[0].tolist()
        ended = tokens[-1] == tokenizer.eot_token and len(tokens) > len(prompt)
        print(f"\n--- {name}, {stream} stream, temperature {args.temperature}, seed {args.seed}")
        print(tokenizer.decode(tokens[:-1] if ended else tokens))


def draw(path, rows):
    """Validation curves of all runs over each other; below, a row a run: firing rate of every unit, by layer."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    ablated = [row for row in rows if "attn_rate" in row]
    figure = plt.figure(figsize=(11, 4.2 + 2.2 * len(ablated)), layout="constrained")
    grid = figure.add_gridspec(1 + len(ablated), 2, height_ratios=[4] + [2.2] * len(ablated), width_ratios=[1, 3])
    axes = figure.add_subplot(grid[0, :])
    for number, row in enumerate(rows):
        folder = Path(row["run"]) if Path(row["run"]).is_dir() else Path(row["run"]).parent
        if not (folder / "metrics.jsonl").exists():
            continue  # a checkpoint on its own has no history
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for stream, style in zip(STREAMS, ("-", "--")):
            points = [(line["step"], line[f"val_{stream}"]) for line in metrics
                      if line["step"] and line[f"val_{stream}"] is not None]  # step 0 would squeeze all the others
            if points:
                axes.plot(*zip(*points), style, color=f"C{number}", label=f"{row['run']}, {stream}")
    axes.set(xlabel="updates", ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    for number, row in enumerate(ablated, 1):
        for column, (kind, name) in enumerate((("attn", "attention units"), ("mlp", "neurons"))):
            rate = -np.sort(-np.array(row[f"{kind}_rate"]), 1)  # (L, N), busiest units of each layer first
            rate[rate == 0] = np.nan  # units that never fire stay white
            axes = figure.add_subplot(grid[number, column])
            image = axes.imshow(rate, aspect="auto", origin="lower", interpolation="nearest",
                                norm=LogNorm(1e-4, 1, clip=True))
            axes.set(xlabel="units of each layer, its busiest first", ylabel="layer", yticks=range(len(rate)))
            axes.set_title(f"{row['run']}: {name}", fontsize="medium")
        figure.colorbar(image, ax=axes, label="share of tokens (white: never)")
    path = Path(path)
    figure.savefig(f"{path}.tmp", format=path.suffix[1:], dpi=120)
    Path(f"{path}.tmp").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = knobs.usage_error
    parser.add_argument("runs", nargs="+", help="run folders (their best.pt) or .pt files")
    parser.add_argument("--data", help="prepared data to measure on (default: the run's own)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at a time; changes speed and memory only")
    parser.add_argument("--device", default="auto", help="auto takes cuda, else mps, else cpu")
    parser.add_argument("--over_seeds", action="store_true",
                        help="one row for the runs that differ only in the seed: mean ± sample standard deviation")
    parser.add_argument("--table1", action="store_true", help="the paper's Table 1, over seeds, with what interp/ found about these "
                        "runs and the paper's numbers; saves table1.md, .csv and .png in the folder that holds the first")
    parser.add_argument("--json", action="store_true", help="print JSON, with every unit's firing rate, and nothing else")
    parser.add_argument("--plot", metavar="FILE", help="save the picture of loss curves and unit use")
    parser.add_argument("--sample", metavar="PROMPT", help="write on from this text, from each stream")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int, default=1337, help="of the samples")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} must be at least 1")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot={args.plot} must end in .png, .pdf or .svg")
    if args.plot and not os.access(Path(args.plot).absolute().parent, os.W_OK):
        raise UserError(f"--plot: there is no folder {Path(args.plot).parent} that the picture could be saved in")
    device = knobs.pick_device(args.device)

    if args.json and args.sample is not None:
        raise UserError("--json prints numbers and nothing else: drop --sample")
    if not args.temperature >= 0 or args.max_new_tokens < 1:
        raise UserError(f"--temperature={args.temperature} must be at least 0, --max_new_tokens={args.max_new_tokens} at least 1")
    args.runs = run_paths(args.runs)
    runs = [open_run(path, args.data) for path in args.runs]  # all of them, before the first takes its minutes
    tokenizers = [load_tokenizer(checkpoint["tokenizer"]) for _, checkpoint, _ in runs] if args.sample is not None else []
    groups = group_seeds(runs) if args.over_seeds or args.table1 else []

    found, notes = read_experiments(runs) if args.table1 else ([{}] * len(runs), [])
    rows, models = zip(*(evaluate(*run, args.batch_size, device) for run in runs))
    rows = [row | numbers for row, numbers in zip(rows, found)]
    table = [over_seeds([rows[i] for i in group]) for group in groups] or rows
    folder = save_table1(table, notes) if args.table1 else None
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print_table(table, TABLE1_COLUMNS if args.table1 else COLUMNS)
        if groups:
            print("± is the sample standard deviation over the seeds of a row")
        if args.table1:
            print("the paper's models are of another size and data; its ppl is per GPT-2 token", *notes, sep="\n")
            print(f"saved as {folder / 'table1.md'}, .csv, .png")
        for path, model, tokenizer in zip(args.runs, models, tokenizers):
            print_samples(path, model, tokenizer, args)
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    knobs.cli(main)
