"""The paper's future work: higher-dimensional linear recurrences, learnt by the same model.

    python -m beyond.recurrences train linear-2 --steps 20000 --out runs/linear-2    # options as train.py's
    python -m beyond.recurrences compare runs/linear-2 runs/linear-3    # into beyond/figures/

linear-K: a_n = c_1 a_{n-1} + ... + c_K a_{n-K} + d with unknown scalars c_i, K = 2, 3, normalised as in
section 3.1; the loss starts where the next vector is determined. A task of your own is an entry of
data.TASKS: how to draw it, from where on it is determined, and what solves it.
"""

import os

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import data
import train
from analyze import MODEL, grid, plain, short, table, to_png
from beyond.filter import FILTER, filtered
from beyond.symmetry import Sequences, closed_forms, random_rotations, rotated, shares
from data import MAX_LENGTH, Sample, Task
from model import Transformer, fold, load_weights, save, settings_beside

HERE = os.path.dirname(os.path.abspath(__file__))
TESTED = 500  # sequences of 14 inputs
LENGTHS = (5, 8, 14)  # inputs, for the asymmetry
ROTATIONS = 16
FIELD = 24  # sequences for the closed form


# ---------- Drawing and solving them ----------
def draw_linear(
    draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple, order: int
) -> Sample:
    """a_n = c_1 a_{n-1} + ... + c_K a_{n-K} + d, with a_0 .. a_{K-1} and d ~ U[-2, 2]^d_vocab; c [batch, K].

    The roots of z^K - c_1 z^{K-1} - ... - c_K are real, from U[c_range], so that K = 1 is the paper's task;
    but each two of them are, in half of the cases, a pair x e^{+-i angle} with x from the same range.
    """
    d = draw(-2, 2, batch, d_vocab)
    a = list(draw(-2, 2, order, batch, d_vocab))
    polynomial = torch.ones_like(d[:, :1])  # its coefficients, the highest power first
    for _ in range(order // 2):
        x, y = draw(*c_range, 2, batch, 1)
        angle = draw(0, math.pi, batch, 1)
        is_complex = draw(0, 1, batch, 1) < 0.5
        total = torch.where(is_complex, 2 * x * angle.cos(), x + y)  # of the two roots
        product = torch.where(is_complex, x * x, x * y)
        by_one = F.pad(polynomial, (1, 1))
        by_two = F.pad(polynomial, (2, 0))
        polynomial = F.pad(polynomial, (0, 2)) - total * by_one + product * by_two
    if order % 2:
        root = draw(*c_range, batch, 1)
        polynomial = F.pad(polynomial, (0, 1)) - root * F.pad(polynomial, (1, 0))

    c = -polynomial[:, 1:]  # [batch, order]
    while len(a) <= length:
        a.append(sum(c[:, i, None] * a[-1 - i] for i in range(order)) + d)
    a, scale = data.normalise(torch.stack(a, 1), draw(1, 2, batch))
    return Sample(a, c, d * scale[:, None])


def solve_linear(x: Tensor, order: int) -> Tensor:
    """The exact answer for draw_linear: x [batch, pos, d_vocab] -> the vector after x_{K+1}, .., [batch,
    pos - K - 1, d_vocab].

    In the difference of two equations there is no d: its d_vocab rows give the c_i by least squares, the
    shortest ones if they leave a choice; the next difference then gives the next vector.
    """
    lags = torch.stack([x[:, order - 1 - i : x.shape[1] - i] for i in range(order)], 2)
    changes = lags.diff(dim=1)  # [batch, .., order, d_vocab]
    # Where least squares knows the driver for dependent columns.
    known = changes[:, :-1].transpose(-1, -2).cpu()
    steps = x.diff(dim=1)[:, order:, :, None].cpu()
    c = torch.linalg.lstsq(known, steps, driver="gelsd").solution.to(x)  # [batch, .., order, 1]
    return x[:, order + 1 :] + (c * changes[:, 1:]).sum(-2)


for K in (2, 3):  # K scalars take one equation in R^d_vocab between differences, of K + 2 vectors
    data.TASKS[f"linear-{K}"] = Task(
        K + 1, partial(draw_linear, order=K), partial(solve_linear, order=K)
    )


# ---------- Comparing runs ----------
def asymmetry(model: Transformer, task: str, length: int, generator: torch.Generator) -> Tensor:
    """The variance of the answers over rotations, as a share of the MSE, see beyond/symmetry.py."""
    first = data.find_task(task).first
    sample = data.sample(TESTED, length, generator, model.config.d_vocab, task=task)
    rotations = random_rotations(ROTATIONS, model.config.d_vocab, generator)
    outputs = rotated(model, sample.inputs, rotations)
    variance = outputs.var(0)[:, first:].mean()
    return variance / data.mse(model(sample.inputs), sample.targets, first)


@torch.no_grad()
def measure(run: str) -> dict:
    """Mean squared errors of a run's model, of the fixed filter and of the exact solver on 500 sequences of
    14 inputs of its task, from the first determined vector on; its asymmetry; and what the closed form of the
    mean over rotations explains of its output and of its error."""
    path = os.path.join(run, "weights.pt")
    model = fold(load_weights(path))
    name = settings_beside(path).get("task", "affine")
    task = data.find_task(name)
    generator = torch.Generator().manual_seed(0)
    sample = data.sample(TESTED, MAX_LENGTH, generator, model.config.d_vocab, task=name)
    x = sample.inputs
    target = sample.targets[:, task.first :]
    output = model(x)

    def by_position(prediction: Tensor) -> Tensor:
        return (prediction - target).pow(2).mean((0, 2))

    model_mse = by_position(output[:, task.first :])
    zero_mse = by_position(torch.zeros_like(target))
    filter_mse = by_position(filtered(x, name)[:, task.first :])
    solver_mse = by_position(task.solve(x.double()).float())

    few = Sequences(x[:FIELD], sample.targets[:FIELD], output[:FIELD], task.first)
    field = shares(closed_forms(model, few.x), few)
    return plain(
        {
            "task": name,
            "first determined position": task.first,
            "MSE, model": model_mse.mean(),
            "MSE, predicting 0": zero_mse.mean(),
            "MSE, fixed filter of all vectors": filter_mse.mean(),
            "MSE, exact solver": solver_mse.mean(),
            "unexplained share": model_mse.mean() / zero_mse.mean(),
            "asymmetry with 5, 8, 14 inputs": [
                asymmetry(model, name, length, generator) for length in LENGTHS
            ],
            "closed form: of the output": field.output,
            "closed form: of the error": field.error,
            "by position: model / 0": model_mse / zero_mse,
            "by position: filter / 0": filter_mse / zero_mse,
            "by position: solver / 0": solver_mse / zero_mse,
        }
    )


def draw_runs(by_run: dict[str, dict]) -> Figure:
    title = "Other recurrences: what is left unexplained"
    canvas, panels = grid(1, len(by_run), 1 + 3.6 * len(by_run), 3.6, title, shared=True)
    for axes, (name, values) in zip(panels[0], by_run.items()):
        positions = range(values["first determined position"], MAX_LENGTH)
        axes.semilogy(positions, values["by position: model / 0"], ".-", color=MODEL, label="model")
        axes.semilogy(
            positions, values["by position: filter / 0"], ".-", color=FILTER, label="fixed filter"
        )
        axes.set_title(name, parse_math=False)
        axes.set(xlabel="position", ylim=(0.05, 2))

    panels[0, 0].set_ylabel("MSE / MSE of predicting 0")
    panels[0, 0].legend()
    return canvas


def compare(runs: list[str], out: str):
    """recurrences.json, .md and .png of runs, in `out`."""
    by_run = {os.path.basename(os.path.abspath(run)): measure(run) for run in runs}
    if len(by_run) < len(runs):
        raise ValueError("two of the runs have one name: rename a folder")
    labels = [label for label in next(iter(by_run.values())) if not label.startswith("by ")]
    rows = [[label, *(short(values[label]) for values in by_run.values())] for label in labels]
    text = "\n".join(["# Other recurrences", "", *table(["", *by_run], rows), ""])
    os.makedirs(out, exist_ok=True)
    save(by_run, os.path.join(out, "recurrences.json"))
    save(text, os.path.join(out, "recurrences.md"))
    save(to_png(lambda: draw_runs(by_run)), os.path.join(out, "recurrences.png"))


def main():
    parser = train.command_line(__doc__)
    parser.add_argument("command", choices=("train", "compare"))
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, help="of train: the task, then options as train.py's"
    )
    given = parser.parse_args()
    if given.command == "train":
        tasks = argparse.ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, add_help=False)
        if not {"-h", "--help"} & set(given.rest):
            tasks.add_argument("task", choices=[name for name in data.TASKS if name != "affine"])
        chosen, rest = tasks.parse_known_args(given.rest)
        task = getattr(chosen, "task", "affine")
        return train.main(["--loss-from", str(data.find_task(task).first), *rest], task)

    comparing = argparse.ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS)
    comparing.add_argument("runs", nargs="+", metavar="RUN")
    comparing.add_argument("--out", default=os.path.join(HERE, "figures"), metavar="DIR")
    chosen = comparing.parse_args(given.rest)
    try:
        compare(chosen.runs, chosen.out)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    train.say(f"{len(chosen.runs)} runs in {chosen.out}")


if __name__ == "__main__":
    main()
