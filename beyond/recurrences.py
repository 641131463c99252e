"""The paper's future work: other recurrences, learnt by the same model in the same training.

    python -m beyond.recurrences train linear-2 --steps 20000 --out runs/linear-2    # options as train.py's
    python -m beyond.recurrences compare runs/linear-2 runs/quadratic    # into beyond/figures/

linear-K: a_n = c_1 a_{n-1} + ... + c_K a_{n-K} + d with unknown scalars c_i, K = 2, 3. polynomial-K: a_n =
v_0 + v_1 n + ... + v_K n^K, K = 1, 2, 3. quadratic: a_n = b a_{n-1}^2 + c a_{n-1} + d in each dimension. All
are normalised as in section 3.1; the loss starts where the next vector is determined, and the exact solver is
the yardstick. A task of your own is an entry of data.TASKS: how to draw it, from where on it is
determined, and what solves it.
"""

import os

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"

import argparse
import io
import math
import sys
from collections.abc import Callable
from functools import partial

import matplotlib.style
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import train
from analyze import MODEL, STYLE, TRUTH, grid, plain, short, table
from data import MAX_LENGTH, Sample, Task
from model import load_weights, save, settings_beside

HERE = os.path.dirname(os.path.abspath(__file__))
TESTED = 500  # sequences of 14 inputs


# ---------- Drawing them ----------
def draw_linear(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple, order: int) -> Sample:
    """a_n = c_1 a_{n-1} + ... + c_K a_{n-K} + d, with a_0 .. a_{K-1} and d ~ U[-2, 2]^d_vocab; c [batch, K].

    The roots of z^K - c_1 z^{K-1} - ... - c_K are real, from U[c_range], so that K = 1 is the paper's task;
    but each two of them are, in half of the cases, a pair x e^{+-i angle} with x from the same range.
    """
    d, a = draw(-2, 2, batch, d_vocab), list(draw(-2, 2, order, batch, d_vocab))
    polynomial = torch.ones_like(d[:, :1])  # its coefficients, the highest power first
    for _ in range(order // 2):
        x, y = draw(*c_range, 2, batch, 1)
        angle, is_complex = draw(0, math.pi, batch, 1), draw(0, 1, batch, 1) < 0.5
        total = torch.where(is_complex, 2 * x * angle.cos(), x + y)  # of the two roots
        product = torch.where(is_complex, x * x, x * y)
        by_one, by_two = F.pad(polynomial, (1, 1)), F.pad(polynomial, (2, 0))
        polynomial = F.pad(polynomial, (0, 2)) - total * by_one + product * by_two
    if order % 2:
        root = draw(*c_range, batch, 1)
        polynomial = F.pad(polynomial, (0, 1)) - root * F.pad(polynomial, (1, 0))
    c = -polynomial[:, 1:]  # [batch, order]
    while len(a) <= length:
        a.append(sum(c[:, i, None] * a[-1 - i] for i in range(order)) + d)
    a, scale = data.normalise(torch.stack(a, 1), draw(1, 2, batch))
    return Sample(a, c, d * scale[:, None])


def draw_polynomial(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple,
                    order: int) -> Sample:
    """a_n = v_0 + v_1 n + ... + v_K n^K, v_i ~ U[-2, 2]^d_vocab; c_range has no part in it. It is a
    recurrence of draw_linear, with d = K! v_K and the c, [batch, K], that make every root 1."""
    v = draw(-2, 2, order + 1, batch, 1, d_vocab)
    n = torch.arange(length + 1, device=v.device, dtype=v.dtype)[:, None]
    a, scale = data.normalise(sum(v[i] * n**i for i in range(order + 1)), draw(1, 2, batch))
    c = torch.stack([torch.full_like(scale, (-1) ** i * math.comb(order, i + 1)) for i in range(order)], 1)
    return Sample(a, c, math.factorial(order) * v[-1, :, 0] * scale[:, None])


def draw_quadratic(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple) -> Sample:
    """a_n = b a_{n-1}^2 + c a_{n-1} + d in each dimension, bounded; c ~ U[c_range]. Sample.c has b and c.

    With x = b a + c / 2 it reads x_n = x_{n-1}^2 + k, which stays within [-x*, x*], x* = (1 + sqrt(1 - 4 k))
    / 2, for k from -2 to 1/4: fixed points, cycles and chaos. So k and x_0 are drawn, from a little less than
    that because of rounding, and d follows. b is 1 or -1 at first: how large it is only sets the unit of a.
    """
    c, b = draw(*c_range, batch, 1), torch.where(draw(0, 1, batch, 1) < 0.5, -1.0, 1.0)
    k, x = draw(-1.9, 0.25, batch, d_vocab), draw(-0.95, 0.95, batch, d_vocab)
    d = (k + c**2 / 4 - c / 2) / b
    a = [(x * (1 + (1 - 4 * k).sqrt()) / 2 - c / 2) / b]
    for _ in range(length):
        a.append((b * a[-1] + c) * a[-1] + d)
    a, scale = data.normalise(torch.stack(a, 1), draw(1, 2, batch))
    return Sample(a, torch.cat([b / scale[:, None], c], 1), d * scale[:, None])


# ---------- Solving them ----------
def solve_scalars(x: Tensor, features: Callable) -> Tensor:
    """The exact answer where a_{n+1} = sum_i c_i f_i(a_n, a_{n-1}, ..) + d with unknown scalars c_i and a
    vector d: x [batch, pos, d_vocab] -> the next vector at each position at which it is determined.

    features: x -> f [batch, .., i, d_vocab]. In the difference of two equations there is no d: its d_vocab
    rows give the c_i by least squares, the shortest ones if they leave a choice; the next difference then
    gives the next vector.
    """
    changes = features(x).diff(dim=1)
    known, now = changes[:, :-1], changes[:, 1:]  # [batch, .., i, d_vocab]
    begin = x.shape[1] - known.shape[1]
    steps = x.diff(dim=1)[:, begin - 1 :]
    rows = known.transpose(-1, -2).cpu()  # where least squares knows the driver for dependent columns
    c = torch.linalg.lstsq(rows, steps[..., None].cpu(), driver="gelsd").solution.to(x)  # [batch, .., i, 1]
    return x[:, begin:] + (c * now).sum(-2)


def solve_linear(x: Tensor, order: int) -> Tensor:
    """`solve_scalars` of draw_linear: the vector after x_{K+1}, .., [batch, pos - K - 1, d_vocab]."""
    lags = lambda x: torch.stack([x[:, order - 1 - i : x.shape[1] - i] for i in range(order)], 2)
    return solve_scalars(x, lags)


def solve_quadratic(x: Tensor) -> Tensor:
    """`solve_scalars` of draw_quadratic: the vector after x_2, x_3, .., [batch, pos - 2, d_vocab]."""
    return solve_scalars(x, lambda x: torch.stack([x**2, x], 2))


def solve_polynomial(x: Tensor, order: int) -> Tensor:
    """The exact answer for draw_polynomial, whose differences of order K + 1 are 0: the vector after x_K,
    x_{K+1}, .., [batch, pos - K, d_vocab]."""
    lags = range(order + 1)
    return sum((-1) ** i * math.comb(order + 1, i + 1) * x[:, order - i : x.shape[1] - i] for i in lags)


for K in (2, 3):  # K scalars take one equation in R^d_vocab between differences, of K + 2 vectors
    data.TASKS[f"linear-{K}"] = Task(K + 1, partial(draw_linear, order=K), partial(solve_linear, order=K))
for K in (1, 2, 3):  # K + 1 vectors determine it
    solve = partial(solve_polynomial, order=K)
    data.TASKS[f"polynomial-{K}"] = Task(K, partial(draw_polynomial, order=K), solve)
data.TASKS["quadratic"] = Task(2, draw_quadratic, solve_quadratic)


# ---------- Comparing runs ----------
@torch.no_grad()
def measure(run: str) -> dict:
    """Mean squared errors of a run's model and of simple predictors on 500 sequences of 14 inputs of its
    task, from the first determined vector on. It is learnt with at most a tenth of what predicting 0 or
    repeating the last vector leaves, whichever is less, and partly with less than that."""
    path = os.path.join(run, "weights.pt")
    model, name = load_weights(path), settings_beside(path).get("task", "affine")
    task, generator = data.find_task(name), torch.Generator().manual_seed(0)
    a = data.sample(TESTED, MAX_LENGTH, generator, model.config.d_vocab, task=name).a
    x, target = a[:, :-1], a[:, task.first + 1 :]
    predictions = {"model": model(x)[:, task.first :], "zero": torch.zeros_like(target),
                   "last vector": x[:, task.first :], "exact solver": task.solve(x.double()).float()}
    errors = {who: (p - target).pow(2).mean((0, 2)) for who, p in predictions.items()}  # [pos] each
    mean = {who: e.mean().item() for who, e in errors.items()}
    simple = min(mean["zero"], mean["last vector"])
    learnt = "yes" if mean["model"] <= simple / 10 else "partly" if mean["model"] < simple else "no"
    found = {"task": name, "learnt": learnt, "unexplained share": mean["model"] / mean["zero"],
             "first determined position": task.first}
    found |= {f"MSE, {who}": value for who, value in mean.items()}
    return plain(found | {"by position: model / zero": errors["model"] / errors["zero"]})


def compare(runs: list[str], out: str):
    """recurrences.json, .md and .png of runs, in `out`."""
    found = {os.path.join(*os.path.normpath(run).split(os.sep)[-2:]): measure(run) for run in runs}
    labels = [label for label in next(iter(found.values())) if not label.startswith("by ")]
    rows = [[label, *(short(values[label]) for values in found.values())] for label in labels]
    canvas, axes = grid(1, 1, 8, 4, "Other recurrences: unexplained share by position")
    for name, values in found.items():
        y = values["by position: model / zero"]
        color = MODEL if values["task"] == "affine" else None
        axes.semilogy(range(MAX_LENGTH - len(y), MAX_LENGTH), y, marker=".", label=name, color=color)
    axes.axhline(1, color=TRUTH, ls="--", lw=0.8, label="predicting 0")
    axes.set(xlabel="position", ylabel="MSE / MSE of predicting 0")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    picture = io.BytesIO()
    canvas.savefig(picture, format="png", dpi=STYLE["figure.dpi"])
    os.makedirs(out, exist_ok=True)
    save(found, os.path.join(out, "recurrences.json"))
    text = "\n".join(["# Other recurrences", "", *table(["", *found], rows), ""])
    save(text, os.path.join(out, "recurrences.md"))
    save(picture.getvalue(), os.path.join(out, "recurrences.png"))


def main():
    parser = train.command_line(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", prog="train", add_help=False, usage=argparse.SUPPRESS)
    training.add_argument("task", choices=list(data.TASKS))
    comparing = commands.add_parser("compare", prog="compare", usage=argparse.SUPPRESS)
    comparing.add_argument("runs", nargs="+", metavar="RUN")
    comparing.add_argument("--out", default=os.path.join(HERE, "figures"), metavar="DIR")
    given, rest = parser.parse_known_args()
    if given.command == "train":
        first = str(data.find_task(given.task).first)
        return train.main(["--loss-from", first, *rest], given.task)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with matplotlib.style.context(["default", STYLE]):
            compare(given.runs, given.out)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    train.say(f"{len(given.runs)} runs in {given.out}")


if __name__ == "__main__":
    main()
