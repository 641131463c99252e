"""Sets the results of several runs beside one another: seeds, and settings as columns.

    python analyze.py --all --run RUN && python -m beyond --all --run RUN     # for each run, first
    python -m beyond.seeds weights runs/relu_1 runs/gelu_0 --out runs/compared

It reads RUN/figures/results.json and, where it is there, RUN/figures/mechanism.json, and writes seeds.json
(all claims of all runs), seeds.md and a grid of verdicts each for the paper's claims and ours. The run that
ships is given as `weights`: its results lie in figures/ and beyond/figures/.
"""

import os

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"

import hashlib
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from analyze import plain, short, table, to_png
from model import load_file, save
from train import command_line, from_settings, say, to_settings

HERE = Path(__file__).resolve().parent
# And their colours.
VERDICTS = {"reproduced": "#a8d5a2", "partly": "#f6e3a1", "not reproduced": "#eeb4ac"}
WORDS = {"reproduced": "yes", "partly": "partly", "not reproduced": "no"}


# ---------- Reading ----------
def read_run(run: Path) -> dict:
    """{"meta", "claims"} of a run, of both files. FileNotFoundError without results.json, ValueError for a
    damaged one or for results of other weights than lie in the folder now."""
    paper = run / "figures" / "results.json"
    ours = run / "figures" / "mechanism.json"
    if run == HERE.parent / "weights":
        paper = HERE.parent / "figures" / "results.json"
        ours = HERE / "figures" / "mechanism.json"
    results = read_results(paper, run)
    if ours.exists():
        results["claims"] |= read_results(ours, run)["claims"]
    return results


def read_results(path: Path, run: Path) -> dict:
    results, _ = load_file(str(path), "result of analyze.py --all or python -m beyond --all")
    try:
        file = results["meta"]["weights"].split("/", 1)[1]  # after the run's name
        measured = results["meta"]["sha256"]
        to_settings(*from_settings(results["meta"]["config"]))
        verdicts = [claim["verdict"] for claim in results["claims"].values()]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not as the two commands write it: {error!r}") from error
    if set(verdicts) - set(VERDICTS):
        raise ValueError(f"{path} has a verdict that is none of {', '.join(VERDICTS)}")

    weights = run / file
    if not weights.exists() or hashlib.sha256(weights.read_bytes()).hexdigest() != measured:
        raise ValueError(
            f"{path} was measured on other weights than {weights}: run the commands again"
        )
    return plain(results)


def heading(run: dict) -> str:
    """The settings of a run but for its seed: the activation, and what else is unlike the paper's."""
    meta = run["meta"]
    usual = to_settings(*from_settings({}))
    settings = to_settings(*from_settings(meta["config"])) | {"steps": meta["step"]}
    unlike = [
        f"{name} {value}"
        for name, value in settings.items()
        if value != usual[name] and name not in ("seed", "act_fn")
    ]
    return ", ".join([settings["act_fn"], *unlike])


def read_runs(paths: list[str]) -> dict[str, dict]:
    """The runs by name, as much of the end of a path as tells it from the others, in the order of their
    headings. ValueError for one that is given twice or was measured by other rules."""
    folders = [Path(path).resolve() for path in paths]
    runs = {}
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"{folder} is given twice")
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
            length += 1
        runs["/".join(folder.parts[-length:])] = read_run(folder)

    rules: dict = {}
    for name, run in runs.items():
        for claim, of_run in run["claims"].items():
            if rules.setdefault(claim, of_run.get("why")) != of_run.get("why"):
                raise ValueError(
                    f"{claim} of {name} was measured by another rule: run the commands again"
                )

    order = list(dict.fromkeys(heading(run) for run in runs.values()))
    names = sorted(runs, key=lambda name: order.index(heading(runs[name])))
    return {name: runs[name] for name in names}


# ---------- Beside one another ----------
def claims_of(runs: dict[str, dict], of_paper: bool) -> dict[str, dict]:
    """A claim each of those that any run has, the paper's or ours, in the order of the first."""
    claims: dict[str, dict] = {}
    for run in runs.values():
        for name, claim in run["claims"].items():
            if (claim["paper"] is not None) == of_paper:
                claims.setdefault(name, claim)
    return claims


def cell(claim: dict) -> str:
    """What was measured, where it is one number or a count of heads."""
    heads = claim["values"].get("heads that do")
    if heads is not None:
        return f"{heads} of {len(claim['measured'])}"
    return "" if isinstance(claim["measured"], list) else short(claim["measured"])


def over_runs(claims: list[dict]) -> list[str]:
    """One claim over several runs: what was measured, from the lowest to the highest, and its verdicts."""
    cells = [cell(claim) for claim in claims]
    measured = "-"
    if cells and all(cells):
        cells.sort(key=lambda text: float(text.split()[0]))
        low, high = cells[0], cells[-1]
        measured = high if low == high else f"{low.split()[0]} to {high}"

    verdicts = [WORDS[claim["verdict"]] for claim in claims]
    counts = [f"{verdicts.count(word)} {word}" for word in WORDS.values() if word in verdicts]
    if len(counts) == 1:
        return [measured, verdicts[0]]
    return [measured, ", ".join(counts)]


def by_heading(runs: dict[str, dict]) -> list[str]:
    """A table with a row a claim: `over_runs` of the runs under each heading."""
    groups: dict = {}
    for run in runs.values():
        groups.setdefault(heading(run), []).append(run["claims"])

    rows = []
    for name in claims_of(runs, of_paper=True) | claims_of(runs, of_paper=False):
        row = [f"`{name}`"]
        for group in groups.values():
            row += over_runs([claims[name] for claims in group if name in claims])
        rows.append(row)

    header = ["claim"]
    for text, group in groups.items():
        header += [f"{text} ({len(group)})", "holds"]
    return table(header, rows)


def markdown(runs: dict[str, dict]) -> str:
    """seeds.md: a column a run, verdicts and what was measured."""
    lines = [
        "# Runs beside one another",
        "",
        "Written by `python -m beyond.seeds`; all values: `seeds.json`.",
        "",
    ]
    lines += table(
        ["run", "settings unlike the paper's", "seed"],
        (
            [name, heading(run), str(run["meta"]["config"].get("seed", 0))]
            for name, run in runs.items()
        ),
    )

    for of_paper, title in ((True, "The paper's claims"), (False, "Ours")):
        rows = []
        for name, claim in claims_of(runs, of_paper).items():
            row = [f"`{name}` {claim['claim']}"]
            if of_paper:
                row.append(short(claim["paper"]))
            for run in runs.values():
                of_run = run["claims"].get(name)
                row.append(f"{WORDS[of_run['verdict']]} {cell(of_run)}" if of_run else "-")
            rows.append(row)
        paper = ["paper"] if of_paper else []
        lines += ["", f"## {title}", "", *table(["claim", *paper, *runs], rows)]
    lines += ["", "## By setting (number of runs)", "", *by_heading(runs)]
    return "\n".join([*lines, ""])


def draw_grid(runs: dict[str, dict], of_paper: bool) -> Figure:
    """Claims as rows, runs as columns, verdicts as colours, what was measured in the cells."""
    claims = claims_of(runs, of_paper)
    canvas = Figure(figsize=(4 + 0.62 * len(runs), 2 + 0.27 * len(claims)), layout="constrained")
    axes = canvas.subplots()

    verdicts = list(VERDICTS)
    grid = np.full((len(claims), len(runs)), np.nan)
    for row, name in enumerate(claims):
        for column, run in enumerate(runs.values()):
            if name in run["claims"]:
                claim = run["claims"][name]
                grid[row, column] = verdicts.index(claim["verdict"])
                axes.text(column, row, cell(claim), ha="center", va="center", fontsize=6.5)
    axes.imshow(grid, cmap=ListedColormap(list(VERDICTS.values())), vmin=-0.5, vmax=2.5)

    # Labels are text: a run may be called _old or $5_x$.
    labels = [
        f"{name}: {short(claim['paper'])}" if of_paper else name for name, claim in claims.items()
    ]
    axes.set_yticks(range(len(claims)), labels, fontsize=7.5)
    axes.set_xticks(range(len(runs)), runs, rotation=90, fontsize=7.5, parse_math=False)
    headings = [heading(run) for run in runs.values()]
    for text in dict.fromkeys(headings):
        first = headings.index(text)
        axes.axvline(first - 0.5, color="black", lw=1)
        lines = text.replace(", ", "\n")
        axes.text(first - 0.4, -0.7, lines, fontsize=6.5, va="bottom", parse_math=False)

    for verdict, color in VERDICTS.items():
        axes.bar(0, 0, color=color, label=verdict)
    axes.set(xlim=(-0.5, len(runs) - 0.5), ylim=(len(claims) - 0.5, -0.5))
    canvas.legend(loc="outside lower center", ncols=3)
    canvas.suptitle(
        "The paper's claims, with the paper's value, in every run"
        if of_paper
        else "Our claims in every run"
    )
    return canvas


def main():
    parser = command_line(__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder with figures/results.json"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write")
    given = parser.parse_args()
    try:
        runs = read_runs(given.runs)
        os.makedirs(given.out, exist_ok=True)
        save({"runs": runs}, os.path.join(given.out, "seeds.json"))
        save(markdown(runs), os.path.join(given.out, "seeds.md"))
        for name, of_paper in (("seeds_paper.png", True), ("seeds_ours.png", False)):
            if claims_of(runs, of_paper):
                save(to_png(lambda: draw_grid(runs, of_paper)), os.path.join(given.out, name))
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    say(f"{len(runs)} runs beside one another in {given.out}")


if __name__ == "__main__":
    main()
