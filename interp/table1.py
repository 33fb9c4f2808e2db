"""Table 1 of the paper. NOT FINISHED: pieces of the old eval.py."""

TABLE1 = {  # column of the paper's Table 1: what it is called in a row of ours, how to print it
    "edges": ("edges", ".1f"), "SAE L0": ("l0", ".2f"), "CE score": ("ce_score", ".2f"), "ppl": ("ppl_clean", ".2f"),
    "L1": ("l1", ".3f")}
EXPERIMENTS = {"acdc": ("edges", "connected", "ioi_exact"), "sae": ("l0", "ce_score")}  # what a row takes from their results
# (ablation, k_attn, k_mlp) -> the columns of TABLE1 in the paper
PAPER = {
    ("none", 0, 0): (79, 7.22, 0.63, 5.73, 0.44),
    ("global", 8, 8): (70, 5.22, 0.65, 6.97, 0.74), ("local", 8, 8): (36, 5.0, 0.72, 6.47, 0.67),
    ("global", 4, 4): (41, 4.9, 0.67, 6.73, 0.72), ("local", 4, 4): (30, 4.01, 0.65, 6.58, 0.76),
    ("global", 2, 2): (30, 4.57, 0.71, 6.66, 0.73), ("local", 2, 2): (54, 4.9, 0.70, 6.55, 0.71),
    ("global", 1, 1): (38, 5.48, 0.66, 6.49, 0.62), ("local", 1, 1): (36, 5.33, 0.69, 6.58, 0.70),
}

TABLE1_COLUMNS = [
    *(column for column in COLUMNS if column[0] in ("run", "ablation", "seeds")),
    *(column for i, (name, (key, form)) in enumerate(TABLE1.items()) for column in (
        (name, number(key, form)), (f"paper {name}", lambda r, i=i, key=key: str(in_paper(r)[i] or "-") if key in r else "-"))),
    ("connected edges", number("connected", ".1f")),
    ("IOI answers exact", number("ioi_exact", ".0%")),
]


def in_paper(row):
    """The paper's numbers for such a model, in the order of TABLE1, or Nones."""
    other = row["ablation"] != "none" and (row["attn_unit"], row["gate"]) != ("dim", "softmax")
    return [None] * len(TABLE1) if other else PAPER.get((row["ablation"], row["k_attn"], row["k_mlp"]), [None] * len(TABLE1))



# ---- Table 1

def read_experiments(runs):
    """What interp/ has found about these runs: a dict of numbers each, and lines that say how it was found and what is wrong
    with it. Raises UserError on what does not belong in one table."""
    for path, _, data in runs[1:]:
        if load_meta(data)["checksum"] != load_meta(runs[0][2])["checksum"]:
            raise UserError(f"{runs[0][0]} is measured on {runs[0][2]}, {path} on {data}, which are other texts: "
                             f"tabulate them apart")
    found, notes = [{} for _ in runs], []
    for experiment, names in EXPERIMENTS.items():
        results = []
        for numbers, (path, checkpoint, _) in zip(found, runs):
            file = result_path(path, f"{experiment}.json")
            if file.exists():
                results.append(read_result(file) | {"run": path})
                if results[-1]["checkpoint"] != fingerprint(checkpoint):
                    raise UserError(f"{file} is not of the checkpoint that {path} has now: make it again with --force; it came from "
                                     f"python {results[-1]['command']}")
                numbers |= {name: float(results[-1][name]) for name in names if results[-1][name] is not None}
        refuse_mixed(results)
        if results:
            settings = [f"{name} {value}" for name, value in results[0]["settings"].items() if value is not None]
            notes.append(f"{experiment}: {', '.join(settings)}; of a list, the first")
        notes += [f"warning: {result['run']}: {warning}" for result in results for warning in result["warnings"]]
    return found, notes


def save_table1(table, notes):
    """table1.md, .csv and .png in the folder that holds the first run, from rows of over_seeds. -> the folder"""
    folder = Path(table[0]["rows"][0]["run"]).absolute().parent
    heading, *lines = cells(table, TABLE1_COLUMNS)
    markdown = [heading, ["---"] * len(heading), *lines]
    lines = [f"| {' | '.join(line)} |\n" for line in markdown] + [f"\n{note}\n" for note in notes]
    write_text(folder / "table1.md", "".join(lines))
    names = [name for key, _ in TABLE1.values() for name in (key, f"{key}_sd")] + ["connected", "ioi_exact"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "ablation", "k_attn", "k_mlp", "seeds", *names, *(f"paper {name}" for name in TABLE1)])
    for row in table:
        writer.writerow([*(row.get(name) for name in ("run", "ablation", "k_attn", "k_mlp", "n", *names)), *in_paper(row)])
    write_text(folder / "table1.csv", text.getvalue())
    draw_table1(folder / "table1.png", table)
    return folder


def draw_table1(path, table):
    """A column per number, ours above (a dot a seed, a bar their mean), the paper's below; each on its own scale."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(i, name, key) for i, (name, (key, _)) in enumerate(TABLE1.items()) if any(key in row for row in table)]
    figure, grid = plt.subplots(2, len(shown), figsize=(2.6 * len(shown) + 1, 5.5), layout="constrained", sharex=True, squeeze=False)
    labels = [dict(COLUMNS)["ablation"](row).replace("none", "baseline") for row in table]
    for (i, name, key), (ours, papers) in zip(shown, grid.T):
        for x, row in enumerate(table):
            values = [one[key] for one in row["rows"] if one.get(key) is not None]
            ours.plot([x] * len(values), values, "o", color="tab:blue", alpha=0.5)
            if key in row:
                ours.plot([x - 0.3, x + 0.3], [row[key]] * 2, color="tab:blue")
            papers.plot(x, in_paper(row)[i] or math.nan, "s", color="0.4")
        ours.set_title(name, fontsize="medium")
        papers.set_xticks(range(len(table)), labels, rotation=60, ha="right", fontsize="small")
    grid[0, 0].set_ylabel("here")
    grid[1, 0].set_ylabel("paper")
    figure.savefig(f"{path}.tmp", format="png", dpi=120)
    plt.close(figure)
    Path(f"{path}.tmp").replace(path)


