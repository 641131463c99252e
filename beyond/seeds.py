"""Sets the results of several runs beside one another: seeds, and settings as columns.

    python analyze.py --all --run RUN && python -m beyond.mechanism --all --run RUN     # for each run, first
    python -m beyond.seeds weights runs/relu_1 runs/relu_2 runs/gelu_0 --out runs/compared

It reads RUN/figures/results.json and, where it is there, RUN/figures/mechanism.json, nothing else, and writes
seeds.json (all claims of all runs), seeds.md and a picture each of the paper's claims and ours. The run that
ships is given as `weights`: its results lie in figures/ and beyond/figures/.
"""

import os

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"

import io
import sys
from pathlib import Path

import matplotlib.style
import numpy as np

from analyze import LENS, MODEL, STYLE, TRUTH, grid, plain, short, table
from model import load_file, save
from train import command_line, say

HERE = Path(__file__).resolve().parent
VERDICTS = {"reproduced": TRUTH, "partly": MODEL, "not reproduced": LENS}  # and their colours


def read_run(run: str) -> dict:
    """{"meta", "claims"} of a run, of both files. FileNotFoundError without results.json, ValueError for a
    damaged one or two of unlike weights."""
    folders = [Path(run) / "figures"] * 2
    if Path(run).resolve() == HERE.parent / "weights":
        folders = [HERE.parent / "figures", HERE / "figures"]
    found, _ = load_file(str(folders[0] / "results.json"), f"result of analyze.py --all --run {run}")
    if "meta" not in found or "claims" not in found:
        raise ValueError(f"{folders[0] / 'results.json'} is not as analyze.py --all writes it")
    ours = folders[1] / "mechanism.json"
    if ours.exists():
        more = load_file(str(ours), "mechanism.json")[0]
        if more["meta"]["sha256"] != found["meta"]["sha256"]:
            raise ValueError(f"{ours} is of other weights than results.json: run both commands again")
        found["claims"] |= more["claims"]
    return found


def setting(found: dict) -> str:
    """Activation, initialisation and what else of a run is unlike the paper's."""
    meta = found["meta"]
    config = {"act_fn": "relu", "initializer_range": 0.02} | meta["config"]
    name = f"{config['act_fn']}, N(0, {config['initializer_range']:.3g})"
    sizes = {"n_layers": 3, "d_mlp": 3072, "loss_from": 2}
    unlike = [f"{key} {config[key]}" for key, usual in sizes.items() if config.get(key, usual) != usual]
    unlike += [f"step {meta['step']:,}"] if meta["step"] != 100_000 else []
    return ", ".join([name, *unlike])


def by_setting(runs: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """{setting: {name: run}}, in the order of their first runs."""
    groups: dict[str, dict[str, dict]] = {}
    for name, found in runs.items():
        groups.setdefault(setting(found), {})[name] = found
    return groups


def claim_names(runs: dict[str, dict], of_paper: bool) -> list[str]:
    """The names of the claims that any run has, of the paper or ours, in the order of the first."""
    names = dict.fromkeys(name for found in runs.values() for name in found["claims"])
    return [name for name in names if (any_run(runs, name)["paper"] is not None) == of_paper]


def any_run(runs: dict[str, dict], name: str) -> dict:
    """A claim of the first run that has it."""
    return next(found["claims"][name] for found in runs.values() if name in found["claims"])


def draw_claims(runs: dict[str, dict], of_paper: bool):
    """A panel for each claim: what was measured, a column of dots a run, coloured by verdict."""
    names, groups = claim_names(runs, of_paper), by_setting(runs)
    columns = 5 if of_paper else 4
    rows = -(-(len(names) + 1) // columns)
    title = ("The paper's" if of_paper else "Our") + " claims: what was measured, a column a run"
    canvas, panels = grid(rows, columns, 13, 2.3 * rows, title, squeeze=False)
    for axes, name in zip(panels.flat, names):
        x = 0
        for group in groups.values():
            begin = x
            for found in group.values():
                if name in found["claims"]:
                    claim = found["claims"][name]
                    y, color = np.ravel(claim["measured"]), VERDICTS[claim["verdict"]]
                    axes.plot([x] * len(y), y, "o", ms=3.5, mec="none", alpha=0.8, color=color)
                    if isinstance(claim["paper"], float):
                        axes.axhline(claim["paper"], color="0.6", ls="--", lw=0.8, zorder=0)
                x += 1
            axes.axvspan(begin - 0.5, x - 0.5, color="0.95" if begin else "white", zorder=-1)
            x += 0.5
        if "MSE" in any_run(runs, name)["claim"]:
            axes.set_yscale("log")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7, bottom=False, labelbottom=False)
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    legend = panels.flat[len(names)]
    for verdict, color in VERDICTS.items():
        legend.plot([], [], "o", color=color, label=verdict)
    legend.plot([], [], ls="--", color="0.6", label="paper")
    runs_named = "\n".join("\n    ".join([f"{setting}:", *group]) for setting, group in groups.items())
    legend.legend(loc="center", title=f"left to right\n{runs_named}", fontsize=7, title_fontsize=6)
    return canvas


def cell(group: dict[str, dict], name: str) -> str:
    """What was measured in a table cell, the range over the runs, or in how many heads a claim holds."""
    found = [run["claims"][name] for run in group.values() if name in run["claims"]]
    of = " of 8" if found and "heads that do" in found[0]["values"] else ""
    numbers = [claim["values"]["heads that do"] if of else claim["measured"] for claim in found]
    numbers = sorted(number for number in numbers if isinstance(number, int | float))
    ends = dict.fromkeys(f"{number:.3g}" for number in numbers[:1] + numbers[-1:])
    return " to ".join(ends) + of or "-"


def words(group: dict[str, dict], name: str) -> str:
    """In how many of a setting's runs a claim holds, or in a word where they agree."""
    verdicts = [run["claims"][name]["verdict"] for run in group.values() if name in run["claims"]]
    short_words = {"reproduced": "yes", "partly": "partly", "not reproduced": "no"}
    counts = {word: verdicts.count(verdict) for verdict, word in short_words.items() if verdict in verdicts}
    return ", ".join(counts if len(counts) == 1 else [f"{n} {word}" for word, n in counts.items()]) or "-"


def markdown(runs: dict[str, dict]) -> str:
    """seeds.md: verdicts by setting, then what was measured, run by run (a mean, where it is by head)."""
    groups = by_setting(runs)
    lines = ["# Runs beside one another", "", "Written by `python -m beyond.seeds`; values: `seeds.json`.",
             "Does a claim hold, in how many runs?", ""]
    for of_paper, title in ((True, "The paper's claims"), (False, "Ours")):
        names = claim_names(runs, of_paper)
        rows = []
        for name in names:
            first = any_run(runs, name)
            cells = [words(group, name) for group in groups.values()]
            rows.append([f"`{name}` {first['claim']}", short(first["paper"] or "-"), *cells])
        lines += [f"## {title}", "", *table(["claim", "paper", *groups], rows), ""]
        rows = []
        for name in names:
            means = [np.mean(found["claims"][name]["measured"]) if name in found["claims"] else "-"
                     for found in runs.values()]
            rows.append([f"`{name}`", *(short(plain(mean)) for mean in means)])
        lines += ["Measured, means where it is by head or position:", "", *table(["claim", *runs], rows), ""]
    return "\n".join(lines)


def main():
    parser = command_line(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder with figures/results.json")
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write")
    given = parser.parse_args()
    try:
        runs = {os.path.join(*Path(run).parts[-2:]): read_run(run) for run in given.runs}
        text = markdown(runs)  # before anything is written
        os.makedirs(given.out, exist_ok=True)
        save({"runs": runs}, os.path.join(given.out, "seeds.json"))
        save(text, os.path.join(given.out, "seeds.md"))
        for of_paper, name in ((True, "seeds_paper.png"), (False, "seeds_ours.png")):
            if claim_names(runs, of_paper):
                buffer = io.BytesIO()
                with matplotlib.style.context(["default", STYLE]):
                    draw_claims(runs, of_paper).savefig(buffer, format="png")
                save(buffer.getvalue(), os.path.join(given.out, name))
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        sys.exit(f"{parser.prog}: error: a file is not as the two commands write it: {error!r}")
    say(f"{len(runs)} runs beside one another in {given.out}")


if __name__ == "__main__":
    main()
