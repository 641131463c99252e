"""Every figure and every number of the paper, from one run's weights.

    python analyze.py --all                         # everything, on the weights that ship, into figures/
    python analyze.py --list                        # what there is
    python analyze.py --fig 8 --fig 10              # some figures
    python analyze.py --all --run runs/paper        # of another run, into runs/paper/figures
    python analyze.py --all --run runs/paper --step 1000       # at a step that train.py --keep-steps kept

In order: claims, figures and the Study (a model and the sequences it is studied on); statistics and drawing;
the paper, section by section, each with its measures, claims and figures; the report and the command line. A
claim is a function from a Study to a Finding under @claim; its docstring is its rule, which the report
prints. A figure is a function from a Study to a matplotlib Figure under @figure. One of your own needs
nothing else than to stand above the command line:

    @figure(28, "norms of the population")
    def figure_norms(study: Study):
        canvas, axes = grid(1, 1, 6, 4, "Norm of a_n")
        axes.plot(study.population.a.norm(dim=-1).T)    # population.a: [1000, 15, 40]
        return canvas
"""

import os

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # nothing is shown here, and one that is not installed would end it

import functools
import io
import platform
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import data
import interventions
from data import FIRST_POSITION, MAX_LENGTH
from interventions import Hook
from model import (Transformer, data_ov_circuit, data_qk_circuit, fold, load_file, load_weights, ov_circuit,
                   qk_circuit, save, settings_beside)
from train import command_line, from_settings, progress, say

HERE = os.path.dirname(os.path.abspath(__file__))
POPULATION = 1000  # sequences of 14 inputs, as in the paper (section 4.5)
UNTRAINED = 50  # sequences for an untrained model
HELD_OUT_PER_LENGTH = 840  # 10,080 sequences over the 12 lengths
EXAMPLES = 200  # sequences of one kind: alternating ones for the attention of layer 2
FEW = 250  # test sequences for interventions in single heads and for those that are only controls
QK_DRAWS = 5  # random matrices for each arm of the pseudoinverse test
RESAMPLES = 400  # of each bootstrap
SCALE = "ln_final.hook_scale"

# ------------------------------------------------------------------------------------------------------------
# Claims, figures and the Study


@dataclass(frozen=True)
class Finding:
    """What a claim comes to on one model."""

    measured: object  # a number, a list by head or position, or [layer][head]
    verdict: str  # "reproduced", "partly" or "not reproduced", by the rule in the claim's docstring
    values: dict[str, object]  # the numbers it is judged by and its controls, a short label each
    interval: list[float] | None = None  # 95% confidence interval, where the claim is one number


class Entry(NamedTuple):
    """A claim or a figure."""

    function: Callable  # Study -> Finding, or -> Figure
    text: str
    layers: int  # that a model must have for it
    paper: object = None  # the paper's value of a claim, None for one of ours
    figure: int = 0  # the nearest to a claim

    def paper_text(self) -> str:
        if self.paper is None:
            return "(ours)"
        return f"{self.paper[0]} to {self.paper[1]}" if isinstance(self.paper, list) else short(self.paper)


class Catalogue:
    """The claims and figures of a command. Each enters itself where it stands, and the command line, the
    report and the tests read them here."""

    def __init__(self):
        self.claims: dict[str, Entry] = {}
        self.figures: dict[int, Entry] = {}

    def claim(self, text: str, paper, figure: int, layers: int = 1) -> Callable:
        """Enters a function claim_NAME(study) -> Finding as NAME."""

        def enter(find: Callable) -> Callable:
            self.claims[find.__name__.removeprefix("claim_")] = Entry(find, text, layers, paper, figure)
            return find

        return enter

    def figure(self, number: int, title: str, layers: int = 1) -> Callable:
        """Enters a function figure_NAME(study) -> Figure, which is drawn to figNN_NAME.png. ValueError for a
        number that is taken."""
        if number in self.figures:
            raise ValueError(f"figure {number} is already: {self.figures[number].text}")

        def enter(draw: Callable) -> Callable:
            self.figures[number] = Entry(draw, title, layers)
            return draw

        return enter

    def file(self, number: int) -> str:
        return f"fig{number:02d}_{self.figures[number].function.__name__.removeprefix('figure_')}.png"


PAPER = Catalogue()
claim, figure = PAPER.claim, PAPER.figure


def verdict(full, part=False) -> str:
    return "reproduced" if full else "partly" if part else "not reproduced"


class Study:
    """A trained model and what is measured on it more than once. Nothing is measured before it is asked for.

    size: sequences in the population and in the test set. log: the run's log.csv. settings: its config.json.
    """

    def __init__(self, transformer: Transformer, size: int = 0, log: dict[str, np.ndarray] | None = None,
                 settings: dict | None = None):
        self.model = fold(transformer).requires_grad_(False)
        self.size, self.log, self.settings = size or POPULATION, log, settings or {}
        self.layers, self.heads = range(self.model.config.n_layers), range(self.model.config.n_heads)
        self.population = self.draw("population")  # the sequences on which activations are averaged
        self.test = self.draw("test")  # other sequences, on which interventions are judged

    def generator(self, purpose: str) -> torch.Generator:
        """A random stream for each purpose, so that a number does not depend on what else is computed."""
        return torch.Generator().manual_seed(random.Random(f"0 {purpose}").getrandbits(62))

    def draw(self, purpose: str, size: int = 0, c_range: tuple[float, float] = (-2.0, 2.0)) -> data.Sample:
        """`size` sequences of 14 inputs, but no more than the population has."""
        count, d_vocab = min(size or self.size, self.size), self.model.config.d_vocab
        return data.sample(count, MAX_LENGTH, self.generator(purpose), d_vocab, c_range)

    @functools.cache
    def near(self, c: int) -> data.Sample:
        """Sequences that alternate, c near -1, or their counterpart, c near 1, whose vectors are as long."""
        return self.draw("alternating" if c < 0 else "steady", EXAMPLES, (c - 0.1, c + 0.1))

    @functools.cached_property
    def untrained(self) -> "Study":
        """The same study of a freshly initialised model, on fewer sequences."""
        fresh = Transformer(self.model.config, self.generator("untrained"))
        return Study(fresh, UNTRAINED, self.log, self.settings)

    def record(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """Activations on inputs x; the output is under "output"."""
        kept: dict[str, Tensor] = {}
        output = self.model(x, hooks=interventions.record(names, kept))
        return kept | {"output": output}

    @functools.cached_property
    def activations(self) -> dict[str, Tensor]:
        """The one plain forward pass over the population that claims and figures share."""
        names = ["blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized", SCALE]
        of_layer = ("attn.hook_pattern", "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid",
                    "hook_mlp_out", "hook_resid_post")
        for l in self.layers:
            names += [f"blocks.{l}.{name}" for name in of_layer]
        return self.record(self.population.a[:, :-1], *names)

    @functools.cached_property
    def streams(self) -> list[Tensor]:
        """The residual stream on the test sequences before each layer and after the last, [size, pos,
        d_model] each: where interventions start from."""
        names = [f"blocks.{l}.hook_resid_pre" for l in self.layers]
        names.append(f"blocks.{self.layers[-1]}.hook_resid_post")
        kept = self.record(self.test.a[:, :-1], *names)
        return [kept[name] for name in names]

    def final_stream(self, layer: int, hooks: dict[str, Hook] | None = None, count: int | None = None,
                     model: Transformer | None = None) -> Tensor:
        """The residual stream after the last layer on the first `count` test sequences, [count, pos,
        d_model], under an intervention that changes nothing before `layer`. 100 sequences at a time: the
        activations of so many stay in the processor's cache."""
        name, parts = f"blocks.{self.layers[-1]}.hook_resid_post", []
        for resid in self.streams[layer][:count].split(100):
            kept: dict[str, Tensor] = {}
            joined = interventions.join(hooks or {}, interventions.record([name], kept))
            (model or self.model).run_from(layer, resid, joined)
            parts.append(kept[name])
        return torch.cat(parts)

    def read_out(self, stream: Tensor, scale_of: Tensor | None = None) -> Tensor:
        """MSE of each of the first test sequences whose final residual stream this is, [count, pos, d_model]
        -> [count]; ln_final gets the scale that another stream has, if one is given."""
        kept: dict[str, Tensor] = {}
        if scale_of is not None:
            self.model.run_from(len(self.layers), scale_of, interventions.record([SCALE], kept))
        output = self.model.run_from(len(self.layers), stream, interventions.hold(kept))
        return squared_errors(output, self.test.a[: len(stream), 1:])

    def errors(self, layer: int, hooks: dict[str, Hook] | None = None, count: int | None = None,
               model: Transformer | None = None) -> Tensor:
        """MSE of each of the first `count` test sequences under an intervention, see `final_stream`."""
        return self.read_out(self.final_stream(layer, hooks, count, model))

    @functools.cached_property
    def baseline(self) -> Tensor:
        """MSE of each test sequence without any intervention, [size]."""
        return self.read_out(self.streams[-1])

    def factor(self, errors: Tensor) -> Tensor:
        """The MSE of an arm, relative to the unchanged model's on the same sequences."""
        return errors.mean() / self.baseline[: len(errors)].mean()


def open_study(run: str, step: int | None = None) -> Study:
    """The study of a run folder, with the weights of the last step or of one in steps/. FileNotFoundError or
    ValueError unless it is as train.py writes it, of affine recurrences."""
    if not os.path.isdir(run):
        wanted = "give one with weights.pt and log.csv, such as weights"
        raise FileNotFoundError(f"there is no run folder {run}: {wanted}")
    path = os.path.join(run, "weights.pt" if step is None else os.path.join("steps", f"{step:08d}.pt"))
    settings = settings_beside(path)
    if settings.get("task", "affine") != "affine":
        raise ValueError(f"{run} learnt {settings['task']}, not affine: see python -m beyond.recurrences")
    from_settings(settings)  # refuses values out of their range
    return Study(load_weights(path), 0, read_log(os.path.join(run, "log.csv")), settings)


def read_log(path: str) -> dict[str, np.ndarray]:
    """The columns of log.csv by name. ValueError unless there is one, of finite numbers."""
    try:
        names, *rows = (line.split(",") for line in Path(path).read_text(errors="replace").split())
        columns = dict(zip(names, np.array(rows, dtype=float).T, strict=True))
        if names[:3] == ["step", "loss", "eval_mse"] and np.isfinite(list(columns.values())).all():
            return columns
    except (OSError, ValueError):  # no file; no rows, ragged ones, or words in them
        pass
    raise ValueError(f"{path} is no training log: expected columns step,loss,eval_mse,.. and rows of numbers")


# ------------------------------------------------------------------------------------------------------------
# Statistics


def fit_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, intercept and R^2 of the least squares line through (x_d, y_d), d over the last dimension."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    xx, yy, xy = (dx * dx).sum(-1), (dy * dy).sum(-1), (dx * dy).sum(-1)
    return xy / xx, y.mean(-1) - xy / xx * x.mean(-1), xy**2 / (xx * yy)


def regress(y: Tensor, *xs: Tensor) -> tuple[list[float], float]:
    """Coefficients of the least squares fit y ~ sum_i coefficient_i x_i over all elements, without a
    constant, and its R^2 = 1 - |residual|^2 / |y|^2."""
    X, y = torch.stack([x.double().flatten() for x in xs], 1), y.double().flatten()
    coefficients = torch.linalg.solve(X.T @ X, X.T @ y)
    return coefficients.tolist(), explained(X @ coefficients, y)


def explained(prediction: Tensor, target: Tensor) -> float:
    """1 - |prediction - target|^2 / |target|^2 over all elements."""
    return 1 - ((prediction - target) ** 2).sum().item() / (target**2).sum().item()


def quantiles(values: Tensor, *shares: float) -> list[float]:
    """Those of the values that are not nan."""
    return values.flatten().double().nanquantile(torch.tensor(shares).double()).tolist()


def interval(*values: Tensor, of: Callable[..., Tensor] = torch.mean) -> list[float]:
    """95% interval of the statistic `of(*values)`, resampled over the first dimension, that of sequences."""
    count = len(values[0])
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    return quantiles(torch.stack([of(*(v[picks] for v in values)) for picks in draws]), 0.025, 0.975)


def ratio(numerators: Tensor, denominators: Tensor) -> Tensor:
    return numerators.sum() / denominators.sum()


def squared_errors(prediction: Tensor, target: Tensor, first: int = FIRST_POSITION) -> Tensor:
    """MSE of each sequence over the predictable positions, [batch, pos, d_vocab] -> [batch]: see data.mse."""
    return ((prediction - target)[:, first:] ** 2).mean((1, 2))


def neighbours(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_{n+1}, a_n and a_{n-1} for n = 2 .., of sequences a: [batch, pos - 2, d_vocab] each."""
    return a[:, FIRST_POSITION + 1 :], a[:, FIRST_POSITION:-1], a[:, FIRST_POSITION - 1 : -2]


def pick(sample: data.Sample, c: float) -> int:
    """Index of the sequence whose c is nearest to `c`."""
    return int((sample.c - c).abs().argmin())


# ------------------------------------------------------------------------------------------------------------
# Drawing

TRUTH, MODEL, LENS, OTHER = "tab:blue", "tab:orange", "tab:red", "tab:green"  # for one thing everywhere
LAYER_COLORS = (TRUTH, OTHER, LENS)
STYLE = {"figure.dpi": 130, "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "image.interpolation": "nearest", "image.aspect": "auto"}


def grid(rows: int, columns: int, width: float, height: float, title: str, sharex=False, sharey=False,
         squeeze=True, width_ratios=None, height_ratios=None):
    """A figure of `rows` x `columns` axes, laid out without overlaps, in inches; the rest as Figure.subplots.
    It is made without pyplot, so that no notebook's backend changes."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    canvas.suptitle(title)
    return canvas, canvas.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=squeeze,
                                   width_ratios=width_ratios, height_ratios=height_ratios)


def curves(axes, x, lines: dict[str, tuple]):
    """A line for each {label: (y, how it looks)}."""
    for label, (y, look) in lines.items():
        axes.plot(x, y, label=label, **look)


def heat(axes, matrix: Tensor, title: str, limit: float | None = None, xlabel: str = "", ylabel: str = "",
         bar: str = "", most: float = 1.0):
    """A heat map: diverging about 0 with the range [-limit, limit], blue positive as in the paper, or
    attention from 0 to `most` where `limit` is None, the future blank; with a colour bar if that has a label.
    Values are written in where they are few."""
    low, high = (0, most) if limit is None else (-limit, limit)
    values = matrix.numpy()
    if limit is None:
        values = np.where(np.tri(*values.shape, dtype=bool), values, np.nan)
    image = axes.imshow(values, cmap="Blues" if limit is None else "RdBu", vmin=low, vmax=high)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if values.size <= 64:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                axes.text(column, row, f"{value:.{2 if high >= 0.1 else 3}f}", ha="center", va="center",
                          fontsize=7, color="white" if abs(value) > 0.6 * high else "black")
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar)
    return image


# ------------------------------------------------------------------------------------------------------------
# 3.1 Data sampling


@figure(1, "types of affine recurrences")
def figure_sequences(study: Study):
    title = f"8 of the {study.model.config.d_vocab} dimensions, one colour each"
    canvas, panels = grid(1, 3, 10, 3, f"Types of affine recurrences: {title}")
    for axes, c, kind in zip(panels, (-0.9, 0.6, 1.3), ("oscillating", "decaying", "growing")):
        i = pick(study.population, c)
        axes.plot(study.population.a[i, :, :8], marker=".")
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=f"{kind}: c = {study.population.c[i]:.2f}", xlabel="n", xticks=range(0, 15, 2))
    panels[0].set_ylabel("component of $a_n$")
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 3.2 Model architecture, 4.1 Model results


@functools.cache
def held_out_errors(study: Study) -> list[Tensor]:
    """Squared errors over the training distribution, for each length 3 .. 14: [sequences, length - 2]."""
    seed, d_vocab = study.generator("held out").initial_seed(), study.model.config.d_vocab
    per_length = max(1, HELD_OUT_PER_LENGTH * study.size // POPULATION)
    errors = []
    for sample in data.held_out(per_length, seed, d_vocab=d_vocab):
        output = torch.cat([study.model(x) for x in sample.a[:, :-1].split(100)])
        errors.append(((output - sample.a[:, 1:])[:, FIRST_POSITION:] ** 2).mean(-1))
    return errors


def mse_summary(study: Study) -> dict[str, object]:
    """The MSE over the training distribution, its interval, by length, by position and at the end of the
    log."""
    errors = held_out_errors(study)
    of_length = torch.stack([e.mean(1) for e in errors], 1)  # [sequences, lengths]
    by_position = [torch.cat([e[:, n] for e in errors if n < e.shape[1]]).mean() for n in range(12)]
    last = study.log["eval_mse"][-20:]
    return {"mse": of_length.mean(), "interval": interval(of_length), "by length, 3 to 14": of_length.mean(0),
            "by position, 2 to 13": by_position, "last 20 evaluations, mean": last.mean(),
            "last 20 evaluations, lowest and highest": [last.min(), last.max()]}


@claim("MSE after training", 1e-4, 2)
def claim_mse(study: Study) -> Finding:
    """Mean over the lengths 3 to 14 of the MSE over the predictions of a_3 and later, weights of the last
    step, new sequences. At most 2e-4, twice the paper's value, since with a constant learning rate the MSE
    wanders by such a factor between evaluations; partly up to 1e-3."""
    values = mse_summary(study)
    mse, mse_interval = values.pop("mse"), values.pop("interval")
    target = study.population.a[:, 1:]
    fourteen = squared_errors(study.activations["output"], target)
    solved = data.solve_recurrence(study.population.a[:, :-1]) - target[:, FIRST_POSITION:]
    values |= {"14 inputs": fourteen.mean(), "14 inputs, interval": interval(fourteen),
               "14 inputs, predicting 0": squared_errors(torch.zeros_like(target), target).mean(),
               "14 inputs, exact solver": solved.pow(2).mean()}
    return Finding(mse, verdict(mse <= 2e-4, mse <= 1e-3), values, mse_interval)


LOSS_FROM_0 = os.path.join(HERE, "figures", "loss_from_0.json")  # written by --all of such a run


@claim("a loss over all vector pairs does worse than one from a_3 on", "worse", 2)
def claim_all_positions(study: Study) -> Finding | None:
    """MSE over the predictions of a_3 and later of a run with --loss-from 0 against that of this run, of the
    same seed and settings. Worse: its MSE at the last step lies above this run's interval, and so does its
    mean over the last 20 evaluations above this run's mean; partly if only one of the two. Left out where
    there is no such run."""
    if not os.path.exists(LOSS_FROM_0):
        return None
    other, ours = load_file(LOSS_FROM_0, "results of a run with --loss-from 0")[0], mse_summary(study)
    names = ("seed", "act_fn", "initializer_range", "steps", "batch_size", "lr", "n_layers", "d_mlp")
    if any(other["config"].get(name) != study.settings.get(name) for name in names):
        return None
    at_end = other["mse"] > ours["interval"][1]
    late = other["last 20 evaluations, mean"] > ours["last 20 evaluations, mean"]
    labels = ("mse", "last 20 evaluations, mean", "by position, 2 to 13")
    values = {f"all pairs: {label}": other[label] for label in labels}
    values |= {f"from a_3: {label}": ours[label] for label in labels}
    return Finding(other["mse"], verdict(at_end and late, at_end or late), values, other["interval"])


@figure(2, "loss against step")
def figure_loss(study: Study):
    canvas, axes = grid(1, 1, 8, 4, "Loss as a function of steps")
    log, mse = study.log, mse_summary(study)["mse"]
    axes.semilogy(log["step"], log["loss"], color="0.6", label="training loss, mean since the row before")
    axes.semilogy(log["step"], log["eval_mse"], color=MODEL, label="MSE on 1,536 held-out sequences")
    axes.plot(log["step"][-1], mse, "o", color="black", ms=4,
              label=f"MSE of the last step on {sum(map(len, held_out_errors(study))):,} others: {mse:.2e}")
    axes.axhline(1e-4, color=TRUTH, ls="--", label="paper: 0.0001")
    axes.set_ylim(bottom=5e-5)
    last = f"last row: MSE {log['eval_mse'][-1]:.2e}; it goes up and down by a factor of two"
    axes.set(xlabel="step", ylabel="mean squared error", title=last)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.2 Attention patterns


def previous_token_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 1.. to the one before: [batch, n_heads, dest, src] -> [n_heads]."""
    return pattern.diagonal(-1, dim1=-2, dim2=-1).mean((0, 2))


def second_token_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 3.. to position 1: [batch, n_heads, dest, src] -> [n_heads]."""
    return pattern[:, :, 3:, 1].mean((0, 2))


def alternation(pattern: Tensor) -> dict[str, Tensor]:
    """How far attention alternates from source to source, in rows n >= 6 over the sources 2..n, by head: {..:
    [n_heads]}.

    "share": of the row's variance, what lies along (-1)^s. "by distance" and "by source": that amplitude in
    units of attention, mean over rows, with the sign (-1)^(n-s), the same in all rows if similar vectors
    attend to each other, and with (-1)^s, the same if all rows prefer the same columns.
    """
    named: dict[str, list[Tensor]] = {"share": [], "by distance": [], "by source": []}
    for n in range(6, pattern.shape[-1]):
        row = pattern[:, :, n, 2 : n + 1]  # [batch, n_heads, src]
        row = row - row.mean(-1, keepdim=True)
        sign = (-1.0) ** torch.arange(2, n + 1)
        sign = sign - sign.mean()
        along, size = row @ sign, sign.pow(2).sum()
        named["share"].append(along**2 / (row.pow(2).sum(-1) * size).clamp_min(1e-30))
        named["by distance"].append((-1) ** n * along / size)
        named["by source"].append(along / size)
    return {name: torch.stack(values).mean((0, 1)) for name, values in named.items()}


@claim("layer 0 heads, all but one, attend to the previous vector", "7 of 8 heads", 3)
def claim_l0_prev_token(study: Study) -> Finding:
    """Attention from positions 1 to 13 to the one before, by head. More than half of the attention in all
    heads but at most one; partly in more than half of the heads."""
    score = previous_token_score(study.activations["blocks.0.attn.hook_pattern"])
    heads, n_heads = int((score > 0.5).sum()), len(study.heads)
    return Finding(score, verdict(heads >= n_heads - 1, heads > n_heads / 2), {"heads that do": heads})


@claim("most layer 1 heads attend to the second vector", "most", 4, 2)
def claim_l1_second_token(study: Study) -> Finding:
    """Attention from positions 3 to 13 to position 1, by head. In more than half of the heads it is the most
    attended position, with at least twice what uniform attention gives; partly in more than a quarter of
    them."""
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    score, favourite = second_token_score(pattern), pattern[:, :, 3:].mean((0, 2)).argmax(-1)
    uniform, n_heads = (1 / torch.arange(4.0, 1 + MAX_LENGTH)).mean(), len(study.heads)
    heads = int(((favourite == 1) & (score >= 2 * uniform)).sum())
    values = {"heads that do": heads, "most attended position": favourite, "uniform attention": uniform}
    return Finding(score, verdict(heads > n_heads / 2, heads > n_heads / 4), values)


@claim("a checkerboard in layer 2 on alternating sequences, not on others", "yes", 5, 3)
def claim_l2_checkerboard(study: Study) -> Finding:
    """Share of a row's variance over the sources 2..n that alternates from source to source, rows 6 to 13,
    mean over sequences with c in [-1.1, -0.9], by head. A head shows a checkerboard if that is at least one
    half, and none on others if it is at most half as much for c in [0.9, 1.1]; how strong it is and of which
    kind does not enter. Both in more than half of the heads; partly if the first is so in more than half of
    them, or both in at least two."""
    name, n_heads = "blocks.2.attn.hook_pattern", len(study.heads)
    here, there = (alternation(study.record(study.near(c).a[:, :-1], name)[name]) for c in (-1, 1))
    shows = here["share"] >= 0.5
    both = int((shows & (there["share"] <= here["share"] / 2)).sum())
    values = {"heads that do": both, "heads with a checkerboard": int(shows.sum()),
              "c near 1": there["share"],
              "amplitude by distance (similar vectors attend to each other)": here["by distance"],
              "amplitude by source (all rows prefer the same columns)": here["by source"]}
    return Finding(here["share"], verdict(both > n_heads / 2, shows.sum() > n_heads / 2 or both >= 2), values)


def draw_patterns(patterns: Tensor, title: str, labels: list[str], most: float = 1.0):
    """The attention patterns of a layer, [n_heads, dest, src], a panel with a label each."""
    rows = -(-len(patterns) // 4)
    canvas, panels = grid(rows, 4, 10, 0.5 + 2.4 * rows, title, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(patterns) :]:
        axes.axis("off")
    for head, (axes, pattern) in enumerate(zip(panels.flat, patterns)):
        image = heat(axes, pattern, f"head {head}: {labels[head]}", most=most)
    canvas.supxlabel("source position", fontsize=9)
    canvas.supylabel("destination position", fontsize=9)
    ends = "max" if patterns.max() > most else "neither"
    canvas.colorbar(image, ax=panels, label="attention", shrink=0.8, extend=ends)
    return canvas


def draw_mean_patterns(study: Study, layer: int, score: Callable, what: str):
    pattern = study.activations[f"blocks.{layer}.attn.hook_pattern"]
    title = f"Layer {layer} attention patterns, mean over {study.size:,} sequences"
    return draw_patterns(pattern.mean(0), title, [f"{value:.2f} {what}" for value in score(pattern)])


def one_pattern(study: Study, layer: int, c: int) -> tuple[Tensor, str]:
    """The attention pattern on the sequence with c nearest to -1 or 1, [1, n_heads, dest, src], and its c."""
    sample, name = study.near(c), f"blocks.{layer}.attn.hook_pattern"
    i = pick(sample, c)
    return study.record(sample.a[i : i + 1, :-1], name)[name], f"c = {sample.c[i]:.2f}"


def draw_layer_2(study: Study, c: int, kind: str):
    pattern, its_c = one_pattern(study, 2, c)
    title = f"Layer 2 attention patterns on one {kind} sequence, {its_c}"
    title += "\nand which part of a row's variance alternates from source to source, rows 6 to 13"
    labels = [f"{share:.0%} alternates" for share in alternation(pattern)["share"]]
    return draw_patterns(pattern[0], title, labels, most=0.4)


@figure(3, "layer 0 attention patterns")
def figure_attention_layer_0(study: Study):
    return draw_mean_patterns(study, 0, previous_token_score, "to the previous")


@figure(4, "layer 1 attention patterns", 2)
def figure_attention_layer_1(study: Study):
    return draw_mean_patterns(study, 1, second_token_score, "to the second")


@figure(5, "layer 2 attention patterns, alternating sequence", 3)
def figure_attention_layer_2_alternating(study: Study):
    return draw_layer_2(study, -1, "alternating")


@figure(6, "layer 2 attention patterns, non-alternating sequence", 3)
def figure_attention_layer_2_other(study: Study):
    return draw_layer_2(study, 1, "non-alternating")


@figure(18, "an attention pattern")
def figure_attention_example(study: Study):
    pattern = one_pattern(study, 0, -1)[0][..., :8, :8]
    head = int(previous_token_score(pattern).argmax())
    canvas, axes = grid(1, 1, 5.4, 4.4, f"An attention pattern: layer 0, head {head}, one sequence")
    title = "each row sums to 1; the future is masked"
    heat(axes, pattern[0, head], title, None, "source position", "destination position", "attention")
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.3 Direct logit attributions


def direct_attribution(model: Transformer, component: Tensor, target: Tensor,
                       scale: Tensor | None = None) -> Tensor:
    """Direct logit attribution: <ln_final(component) W_U, target>, [batch, pos, ...], of what something adds
    to the residual stream, [batch, pos, ..., d_model]; target [batch, pos, d_vocab].

    scale None is the paper's text: ln_final normalises the component by itself, and so forgets how large it
    is. With scale = ln_final.hook_scale [batch, pos, 1] the component is divided as the residual stream as a
    whole is: the field's standard, in which all components and ln_final.b W_U + b_U add up to the output's.
    """
    ln = model.ln_final
    if scale is None:
        normalised = F.layer_norm(component, ln.w.shape, ln.w, None, ln.eps)
    else:
        scale = scale.reshape(*scale.shape[:2], *[1] * (component.dim() - 2))
        normalised = (component - component.mean(-1, keepdim=True)) / scale * ln.w
    return torch.einsum("bp...d,bpd->bp...", normalised, target @ model.unembed.W_U.T)


@functools.cache
def attributions(study: Study, hook: str) -> dict[str, Tensor]:
    """Population mean of `direct_attribution` of what is at a hook point of each layer, {reading: [n_layers,
    ..., pos]}: the paper's reading and the standard one, each to the next vector a_{m+1} and to the step
    a_{m+1} - a_m; and the standard one as a share of the target's squared length at that position."""
    a, kept, found = study.population.a, study.activations, {}
    for goal, target in {"next": a[:, 1:], "step": a[:, 1:] - a[:, :-1]}.items():
        for name, scale in {"paper": None, "standard": kept[SCALE]}.items():
            layers = [direct_attribution(study.model, kept[f"blocks.{l}.{hook}"], target, scale).mean(0)
                      for l in study.layers]
            found[f"{name}, {goal}"] = torch.stack(layers).movedim(1, -1)
        found[f"share, {goal}"] = found[f"standard, {goal}"] / target.pow(2).sum(-1).mean(0)
    return found


@claim("direct attribution: layer 0 > 0, layer 1 near 0, layer 2 < 0", "+, 0, -", 7, 3)
def claim_dla_sign(study: Study) -> Finding:
    """Mean over positions 2 to 13, ln_final on the head's output alone (the paper's reading), target a_{m+1};
    then the same for a_{m+1} - a_m. Averaged over the heads layer 0 is positive, layer 2 negative and layer 1
    at most a quarter of the largest, for both targets, which give "nearly identical results": a correlation
    over the heads of at least 0.9. Partly if layer 0 is positive and layer 2 negative for both."""
    by_head = {name: value[..., FIRST_POSITION:].mean(-1)
               for name, value in attributions(study, "attn.hook_result").items()}
    by_layer = {name: value.mean(1) for name, value in by_head.items()}
    goals = [by_layer["paper, next"], by_layer["paper, step"]]
    signs = all(layers[0] > 0 > layers[2] for layers in goals)
    silent = all(layers[1].abs() <= 0.25 * layers.abs().max() for layers in goals)
    both = torch.stack([by_head["paper, next"].flatten(), by_head["paper, step"].flatten()])
    same = torch.corrcoef(both)[0, 1]
    values = {f"{name}, by layer": layers for name, layers in by_layer.items()}
    values["correlation of the two targets over the heads"] = same
    return Finding(by_head["paper, next"], verdict(signs and silent and same >= 0.9, signs), values)


@claim("layer 1's heads write to the orthogonal complement of the embedding space", "yes", 7, 2)
def claim_l1_orthogonal(study: Study) -> Finding:
    """Share of the norm of what layer 1's heads write together that lies outside the span of W_E, mean over
    the population. At least 0.95, far beyond a random direction's; partly if that holds outside the span of
    W_U instead, which is what makes direct effects "less apparent"."""
    written = study.activations["blocks.1.attn.hook_result"].sum(2)
    x = random_vectors(study)
    W_E, W_U = study.model.embed.W_E, study.model.unembed.W_U.T
    outside = outside_share(written, W_E)
    shares = {"outside W_E": outside.mean(), "outside W_U": outside_share(written, W_U).mean(),
              "random direction, outside W_E": outside_share(x, W_E).mean(),
              "random direction, outside W_U": outside_share(x, W_U).mean()}
    how = verdict(shares["outside W_E"] >= 0.95, shares["outside W_U"] >= 0.95)
    return Finding(outside.mean(), how, shares, interval(outside))


@figure(7, "direct logit attribution of the heads")
def figure_head_attribution(study: Study):
    title = "Direct logit attribution of the heads to the next vector and to the step to it"
    canvas, panels = grid(2, 3, 11, 7.5, title, height_ratios=[1, 2.6])
    found = attributions(study, "attn.hook_result")
    shown = {"paper, next": "(a) the paper's: ln_final on the head alone",
             "standard, next": "(b) standard: the whole stream's scale", "standard, step": "(b), to the step"}
    for (top, bottom), (name, title) in zip(panels.T, shown.items()):
        mean = found[name][..., FIRST_POSITION:].mean(-1)
        heat(top, mean, f"{title}\nmean over positions 2 to 13", mean.abs().max(), "head", "layer", "dot product")
        rows, unit = found[name].flatten(0, 1), "dot product"  # [layer.head, pos]
        if name.startswith("standard"):  # the last targets are the longest and would wash out the rest
            rows, unit = found[name.replace("standard", "share")].flatten(0, 1), "share of the target"
        limit = rows[:, FIRST_POSITION:].abs().max()
        heat(bottom, rows, "by position", limit, "position", "layer.head", unit)
        names = [f"{l}.{h}" for l in study.layers for h in study.heads]
        bottom.set_yticks(range(len(rows)), names, fontsize=7)
        for layer in study.layers[1:]:
            bottom.axhline(len(study.heads) * layer - 0.5, color="black", lw=0.8)
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.4 Zeroth layer OV circuits


def outside_share(x: Tensor, W: Tensor) -> Tensor:
    """Share of the norm of x [..., d_model] outside the span of the rows of W, in [0, 1] (4.4)."""
    projection = torch.linalg.pinv(W, rtol=1e-5) @ W  # also when the rows are dependent
    return (x - x @ projection).norm(dim=-1) / x.norm(dim=-1)


def random_vectors(study: Study) -> Tensor:
    """Gaussian vectors, as many as the population has residual stream vectors, [size, 14, d_model]."""
    shape = (study.size, MAX_LENGTH, study.model.config.d_model)
    return torch.randn(shape, generator=study.generator("random vectors"))


def read_and_written(study: Study, resid: Tensor) -> tuple[Tensor, Tensor]:
    """What layer 0's heads read and what all of them would write, between data vectors: residual stream
    vectors [..., d_model] -> their data coordinates x W_E^+ and ln1(x) OV W_U, each [..., d_vocab]."""
    model = study.model
    normalised = F.layer_norm(resid, resid.shape[-1:], eps=model.config.eps)
    written = normalised @ ov_circuit(model, 0).sum(0) @ model.unembed.W_U
    return resid @ torch.linalg.pinv(model.embed.W_E), written


@functools.cache
def ov_fits(study: Study) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Slope, intercept and R^2 of what the OV circuits of layer 0 make of vectors, a line a vector, {reading:
    three tensors [batch, pos], of all of layer 0 [batch, pos - 2]}.

    The measured reading, "data vectors", is the points (a_d, (ln1(x) OV W_U)_d) over the data dimensions; it
    is nan for vectors shorter than 1, which after ln1 are mostly position embedding, and so are "head h" and
    "all of layer 0".
    """
    model, a, resid = study.model, study.population.a[:, :-1], study.activations["blocks.0.hook_resid_pre"]
    ov, normalised = ov_circuit(model, 0), study.activations["blocks.0.ln1.hook_normalized"]

    def fit_large(vectors: Tensor, written: Tensor) -> tuple[Tensor, ...]:
        large = vectors.norm(dim=-1) >= 1
        return tuple(part.where(large, torch.nan) for part in fit_line(vectors, written))

    def layer_0_adds(x: Tensor, kept: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Unembedded, without ln_final, against a_{n-1}, for n >= 2."""
        return fit_large(x[:, 1:-1], (kept["blocks.0.hook_resid_post"] @ model.unembed.W_U)[:, 2:])

    mixed = torch.stack([vectors.roll(p, 0) for p, vectors in enumerate(a.unbind(1))], 1)
    written = read_and_written(study, resid)[1]
    fits = {"data vectors": fit_large(a, written), "data vectors of any norm": fit_line(a, written),
            "random vectors": fit_line(*read_and_written(study, random_vectors(study))),
            "weights alone, without ln1 and position":
                fit_line(a, a @ data_ov_circuit(model, 0).sum(0)),
            "d_model coordinates": fit_line(resid, resid @ ov.sum(0)),
            "all of layer 0": layer_0_adds(a, study.activations),
            "all of layer 0, vectors of different recurrences":
                layer_0_adds(mixed, study.record(mixed, "blocks.0.hook_resid_post"))}
    return fits | {f"head {h}": fit_large(a, normalised @ ov[h] @ model.unembed.W_U) for h in study.heads}


def ov_finding(study: Study, part: int, rule: Callable[[Tensor], str]) -> Finding:
    """Of one number of the fits (0 slope, 2 R^2): its median, beside that of the other readings."""
    values = {name: fit[part].nanmedian() for name, fit in ov_fits(study).items()}
    vectors, measured = ov_fits(study)["data vectors"][part], values.pop("data vectors")
    values = {"5%, 50%, 95% of the vectors": quantiles(vectors, 0.05, 0.5, 0.95)} | values
    return Finding(measured, rule(measured), values, interval(vectors, of=torch.nanmedian))


@claim("layer 0 OV is linear on residual stream vectors: R^2", 0.83, 8)
def claim_l0_ov_r2(study: Study) -> Finding:
    """Median over vectors of norm at least 1 of the R^2 of (a_d, (ln1(x) OV W_U)_d), OV summed over heads.
    Nearly linear: at least the paper's value less 0.1; partly if at least 0.5."""
    return ov_finding(study, 2, lambda r2: verdict(r2 >= 0.73, r2 >= 0.5))


@claim("its slope", [2.1, 2.5], 8)
def claim_l0_ov_slope(study: Study) -> Finding:
    """Median slope over the same vectors. Within 2.1 to 2.5; partly within a factor of two of that."""
    return ov_finding(study, 0, lambda slope: verdict(2.1 <= slope <= 2.5, 1.05 <= slope <= 5))


@claim("its intercept", "near 0", 8)
def claim_l0_ov_intercept(study: Study) -> Finding:
    """Intercepts over the same vectors, relative to the root mean square of (ln1(x) OV W_U)_d. At most a
    tenth in 95% of the vectors; partly if so on average. (In d_model coordinates it is 0 by construction on a
    folded model.)"""
    intercept = ov_fits(study)["data vectors"][1]
    written = read_and_written(study, study.activations["blocks.0.hook_resid_pre"])[1][~intercept.isnan()]
    intercept = intercept / written.pow(2).mean().sqrt()
    widest, mean = quantiles(intercept.abs(), 0.95)[0], intercept.abs().nanmean()
    values, ci = {"95% within": widest, "mean size": mean}, interval(intercept, of=torch.nanmedian)
    return Finding(intercept.nanmedian(), verdict(widest <= 0.1, mean <= 0.1), values, ci)


@claim("the same R^2 on random vectors, lower", 0.598, 10)
def claim_l0_ov_r2_random(study: Study) -> Finding:
    """Median R^2 of (x W_E^+, ln1(x) OV W_U) over Gaussian vectors x in R^d_model. Lower than that of
    residual stream vectors by at least 0.1, and still at least 0.25, a visible correlation; partly if only
    one of the two."""
    r2, resid = (ov_fits(study)[name][2] for name in ("random vectors", "data vectors"))
    measured, resid = r2.median(), resid.nanmedian()
    lower, visible = resid - measured >= 0.1, measured >= 0.25
    ci = interval(r2, of=torch.median)
    return Finding(measured, verdict(lower and visible, lower or visible), {"residual stream": resid}, ci)


@claim("share of the norm of layer 0's OV x outside the span of W_E", 0.8415, 9)
def claim_l0_orthogonal(study: Study) -> Finding:
    """Mean over residual stream vectors, OV summed over heads. At least 0.8415 less 0.05 (more is further in
    the paper's own direction), and above what a random direction has, since a share below that would say that
    the circuit prefers the embedding space; partly if only the number agrees."""
    W_E, resid = study.model.embed.W_E, study.activations["blocks.0.hook_resid_pre"]
    ov, x = ov_circuit(study.model, 0).sum(0), random_vectors(study)
    x = x - x.mean(-1, keepdim=True)  # as all that a folded model writes
    share, chance = outside_share(resid @ ov, W_E), outside_share(x, W_E).mean()
    measured = share.mean()
    values = {"random direction": chance, "OV of random vectors": outside_share(x @ ov, W_E).mean()}
    enough = measured >= 0.8415 - 0.05
    return Finding(measured, verdict(enough and measured > chance, enough), values, interval(share))


def scatter_fit(axes, x: Tensor, y: Tensor, title: str, xlabel: str, ylabel: str):
    """The points (x_d, y_d) of one vector with their least squares line."""
    slope, intercept, r2 = (value.item() for value in fit_line(x, y))
    ends = torch.stack([x.min(), x.max()])
    axes.scatter(x, y, s=9, color=TRUTH, alpha=0.7, lw=0)
    label = f"slope {slope:.2f}, intercept {intercept:.3f}, $R^2$ {r2:.2f}"
    axes.plot(ends, intercept + slope * ends, color="black", lw=1, label=label)
    ylim = (y.min().item() * 1.1, y.max().item() * 1.5)  # room for the legend
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=ylim)
    axes.legend(loc="upper left", handlelength=1, borderpad=0)


@figure(8, "OV of layer 0 on residual stream vectors")
def figure_ov_layer_0_resid(study: Study):
    """The vector of median slope in two readings, and below the lines of all in the first, see `ov_fits`."""
    slope, _, r2 = ov_fits(study)["data vectors"]
    distance = (slope - slope.nanmedian()).abs().nan_to_num(torch.inf)
    batch, position = np.unravel_index(int(distance.argmin()), distance.shape)
    resid = study.activations["blocks.0.hook_resid_pre"][batch, position]
    canvas, panels = grid(2, 2, 9, 6.6, "OV of layer 0 on residual stream vectors, heads summed")
    scatter_fit(panels[0, 0], study.population.a[batch, position], read_and_written(study, resid)[1],
                "the vector of median slope, between data vectors", "$a_d$", "$(\\ln_1(x)\\;OV\\;W_U)_d$")
    scatter_fit(panels[0, 1], resid, resid @ ov_circuit(study.model, 0).sum(0),
                f"without $\\ln_1$, in the {len(resid)} coordinates that the paper names", "$x_d$",
                "$(OV\\,x)_d$")
    slope, r2 = slope[~slope.isnan()], r2[~r2.isnan()]
    panels[1, 0].hist(slope, bins=60, color=TRUTH)
    panels[1, 0].axvspan(2.1, 2.5, color="0.85", zorder=0, label="paper: 2.1 to 2.5")
    panels[1, 0].set(title=f"slope, {len(slope):,} vectors of norm at least 1", xlabel="slope")
    panels[1, 1].hist(r2, bins=np.linspace(0, 1, 61), color=TRUTH)
    panels[1, 1].axvline(0.83, color="0.6", ls="--", label="paper: 0.83")
    panels[1, 1].set(title=f"$R^2$, median {r2.median():.2f}", xlabel="$R^2$ of the line")
    for axes, where in zip(panels[1], ("upper right", "upper left")):
        axes.set_ylabel("vectors")
        axes.legend(loc=where)
    return canvas


@figure(9, "sum of the OV circuits of layer 0")
def figure_ov_layer_0_sum(study: Study):
    canvas, panels = grid(1, 2, 10, 4.6, "Sum of the OV circuits over all heads of layer 0")
    shown = (("$W_V W_O$, as in the paper", "residual stream", ov_circuit),
             ("$W_E W_V W_O W_U$, between data vectors", "data", data_ov_circuit))
    for axes, (title, name, circuit) in zip(panels, shown):
        matrix = circuit(study.model, 0).sum(0)
        heat(axes, matrix, f"{title}: cosine with I {identity_cosine(matrix):.2f}", matrix.abs().max(),
             f"written {name} dimension", f"read {name} dimension", "weight")
    return canvas


@figure(10, "OV of layer 0 on a random vector")
def figure_ov_layer_0_random(study: Study):
    canvas, panels = grid(1, 2, 10, 3.8, "OV of layer 0 (heads summed) on a random vector")
    x, resid = random_vectors(study)[0, 0], study.activations["blocks.0.hook_resid_pre"]
    long = resid[study.population.a[:, :-1].norm(dim=-1) >= 1]
    sizes = f"the slope is small because ln1 divides\nit by {x.std():.1f}, data vectors by {long.std(-1).mean():.2f}"
    scatter_fit(panels[0], *read_and_written(study, x), f"one Gaussian vector: {sizes}",
                "$(x\\,W_E^+)_d$", "$(\\ln_1(x)\\;OV\\;W_U)_d$")
    for name, color, paper in (("random vectors", OTHER, 0.598), ("data vectors", TRUTH, 0.83)):
        r2 = ov_fits(study)[name][2]
        label = f"{name}, median {r2.nanmedian():.2f} (paper: {paper})"
        panels[1].hist(r2[~r2.isnan()], np.linspace(0, 1, 101), density=True, color=color, alpha=0.7,
                       label=label)
    panels[1].set(title="all vectors", xlabel="$R^2$ of the line", ylabel="density")
    panels[1].set_ylim(0, panels[1].get_ylim()[1] * 1.3)
    panels[1].legend(loc="upper left")
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.5 First layer


@functools.cache
def ablations(study: Study) -> dict[str, dict[str, Tensor]]:
    """MSE of test sequences with a part of the model ablated, {part: {kind: [size] or [FEW]}}. The parts are
    all heads of a layer, "layer 1 heads", its MLP, "layer 1 MLP", and "head 1.0", FEW sequences for that.

    "mean" is at each position, "mean over positions" one vector for all (not for single heads), "zero" leaves
    b_O (with the folded value biases); these two on FEW sequences. "mean, clean scale" gives ln_final the
    scale it has without the ablation; "scale alone" is the unchanged model with the scale of the ablated one.
    """
    means = interventions.mean_outputs(study.activations)
    values = {"mean": means, "mean over positions": {name: mean.mean(0) for name, mean in means.items()},
              "zero": interventions.zero_outputs(study.model)}
    clean, found = study.streams[-1], {}
    for l in study.layers:
        heads = interventions.layer_heads(study.model, l)
        parts = {f"layer {l} heads": (heads, []), f"layer {l} MLP": ([], [l])}
        for part, chosen in (parts | {f"head {l}.{h}": ([(l, h)], []) for l, h in heads}).items():
            arms = found[part] = {}
            for kind, value in values.items():
                if kind == "mean over positions" and part not in parts:
                    continue
                count = study.size if part in parts and kind == "mean" else FEW
                stream = study.final_stream(l, interventions.replace_outputs(value, *chosen), count)
                arms[kind] = study.read_out(stream)
                if kind == "mean":
                    arms["mean, clean scale"] = study.read_out(stream, clean[:count])
                    arms["scale alone"] = study.read_out(clean[:count], stream)
    return found


def factors(study: Study) -> dict[str, dict[str, Tensor]]:
    """The MSE under each of the `ablations`, relative to the unchanged model on the same sequences."""
    return {part: {kind: study.factor(errors) for kind, errors in arms.items()}
            for part, arms in ablations(study).items()}


@claim("MSE with all layer 1 heads mean-ablated, from 1e-4", 2e-4, 4, 2)
def claim_l1_mean_ablation(study: Study) -> Finding:
    """Means at each position over the population, MSE on other sequences. All heads of layer 1 at once
    multiply it by at most 4 (the paper's factor is 2); partly if only in one of the two other readings, every
    head by itself, or all at once with ln_final's scale held at its clean value."""
    errors, times = ablations(study)["layer 1 heads"]["mean"], factors(study)
    together, held = (times["layer 1 heads"][kind] for kind in ("mean", "mean, clean scale"))
    worst = max(times[f"head 1.{h}"]["mean"] for h in study.heads)
    values = {"times the unchanged MSE": together, "times, clean scale": held,
              "times, worst single head": worst, "unchanged": study.baseline.mean(),
              "difference, interval": interval(errors - study.baseline)}
    values |= {f"times, {part}: {kind}": times[part][kind] for part in times if part.startswith("layer")
               for kind in times[part]}
    for kind in ("mean", "zero"):
        by_head = [[times[f"head {l}.{h}"][kind] for h in study.heads] for l in study.layers]
        values[f"times, each head, {kind}"] = by_head
    return Finding(errors.mean(), verdict(together <= 4, held <= 4 or worst <= 4), values, interval(errors))


def effective_rank(matrix: Tensor) -> Tensor:
    """Participation ratio of the singular values, (sum s)^2 / sum s^2, of matrices [..., m, n]: 1 for rank
    one, n for an n x n rotation."""
    s = torch.linalg.svdvals(matrix.double())
    return (s.sum(-1) ** 2 / (s**2).sum(-1)).float()


@claim("OV of layer 1 head 0 has low effective rank", "low", 11, 2)
def claim_l1_ov_effective_rank(study: Study) -> Finding:
    """Participation ratio of the singular values. At most half of what an untrained head has; partly if at
    least a tenth less than that and less than the mean of the last layer."""
    ranks = torch.stack([effective_rank(ov_circuit(study.model, l)) for l in study.layers])
    untrained = effective_rank(ov_circuit(study.untrained.model, 1)).mean()
    measured = ranks[1, 0]
    how = verdict(measured <= 0.5 * untrained, measured <= 0.9 * untrained and measured < ranks[-1].mean())
    return Finding(measured, how, {"all heads": ranks, "untrained head": untrained})


def draw_circuits(title: str, shown: dict[str, Tensor], sides: tuple[str, str]):
    """Circuits of a layer, {label: matrix}, each with a colour range of its own: the first large."""
    canvas, width = Figure(figsize=(11, 4.6), layout="constrained"), (len(shown) + 1) // 2
    canvas.suptitle(f"{title}\nnumbers: cosine with I; each panel has its own range, from - to + its largest weight")
    labels, small = list(shown), [str(i) for i in range(1, len(shown))] + ["."]
    rows = [["0", "0", *small[: width - 1]], ["0", "0", *small[width - 1 : 2 * (width - 1)]]]
    for name, axes in canvas.subplot_mosaic([[str(x) for x in row] for row in rows]).items():
        label = labels[int(name)]
        matrix = shown[label]
        limit = matrix.abs().flatten().double().quantile(0.9995).item()
        heat(axes, matrix, f"{label}: {identity_cosine(matrix):.2f}", limit)
        axes.set_aspect("equal")
        if name == "0":
            axes.set(xlabel=f"{sides[1]} dimension", ylabel=f"{sides[0]} dimension")
        else:
            axes.set(xticks=[], yticks=[])
    return canvas


def draw_layer_circuits(study: Study, layer: int, kind: str):
    """Head 0 as the paper draws it, and every head between data coordinates."""
    circuit, between_data = {"OV": (ov_circuit, data_ov_circuit), "QK": (qk_circuit, data_qk_circuit)}[kind]
    shown = {"head 0, residual stream": circuit(study.model, layer)[0]}
    shown |= {f"{h}, data": matrix for h, matrix in enumerate(between_data(study.model, layer))}
    sides = {"OV": ("read", "written"), "QK": ("destination", "source")}[kind]
    return draw_circuits(f"{kind} circuits of layer {layer}", shown, sides)


@figure(11, "OV of layer 1 head 0", 2)
def figure_ov_layer_1(study: Study):
    return draw_layer_circuits(study, 1, "OV")


# ------------------------------------------------------------------------------------------------------------
# 4.6 Second layer QK/OV circuits


def identity_cosine(matrix: Tensor) -> Tensor:
    """Cosine between square matrices [..., n, n] and I: trace / (Frobenius norm * sqrt(n)), in [-1, 1]."""
    n = matrix.shape[-1]
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / (matrix.norm(dim=(-2, -1)) * n**0.5)


def eigenvalue_score(circuit: Tensor) -> Tensor:
    """sum(lambda) / sum(|lambda|) of square matrices [..., n, n], in [-1, 1]: 1 copies, -1 copies negatively
    (4.6). For a product of thin factors A B pass B A, which has the same eigenvalues but for zeros."""
    eigenvalues = torch.linalg.eigvals(circuit.double())
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).float()


@functools.cache
def measured_basis(study: Study) -> tuple[Tensor, float]:
    """The check of `data_basis` for layer 2, without weights: the linear map D [d_vocab, d_model] from a_{n-1}
    to layer 2's ln1.hook_normalized, least squares on a_n and a_{n-1}, n >= 2, all less their mean at the
    position; and the R^2 of the fit."""
    name, a = "blocks.2.ln1.hook_normalized", study.population.a[:, :-1]
    y = study.record(a, name)[name][:, FIRST_POSITION:]
    x = torch.cat([a[:, FIRST_POSITION:], a[:, FIRST_POSITION - 1 : -1]], -1)
    x, y = ((v - v.mean(0)).flatten(0, 1).double() for v in (x, y))
    maps = torch.linalg.lstsq(x, y).solution
    return maps[a.shape[-1] :].float(), explained(x @ maps, y)


def identity_finding(study: Study, circuit: Callable, between_data: Callable, sign: int) -> Finding:
    """Of one kind of circuit of layer 2, `sign` times the identity."""
    cosines = {f"layer {l}": identity_cosine(between_data(study.model, l)) for l in study.layers}
    measured, n_heads = cosines.pop("layer 2"), len(study.heads)
    heads = int((sign * measured >= 0.5).sum())
    (D, r2), W_U, each = measured_basis(study), study.model.unembed.W_U, circuit(study.model, 2)
    through_D = D @ each @ W_U if circuit is ov_circuit else D @ each @ D.T
    in_stream = torch.stack([identity_cosine(circuit(study.model, l)).mean() for l in study.layers])
    values = {"heads that do": heads, **cosines, "d_model": in_stream,
              "through the measured basis": identity_cosine(through_D), "R2 of that basis": r2,
              "cosine of that basis with W_U": identity_cosine(D @ W_U)}
    return Finding(measured, verdict(heads == n_heads, heads > n_heads / 2), values)


@claim("OV is like -I in every layer 2 head", "yes", 12, 3)
def claim_l2_ov_identity(study: Study) -> Finding:
    """Cosine between W_U^+ W_V W_O W_U, OV between data coordinates, and I, by head. A head is like -I from
    -0.5 on (a random circuit has 0.03): every head; partly more than half of them."""
    return identity_finding(study, ov_circuit, data_ov_circuit, -1)


@claim("QK is like +I in every layer 2 head", "yes", 13, 3)
def claim_l2_qk_identity(study: Study) -> Finding:
    """Cosine between W_U^+ W_Q W_K^T W_U^+^T, QK between data coordinates, and I, by head. A head is like I
    from 0.5 on: every head; partly more than half of them."""
    return identity_finding(study, qk_circuit, data_qk_circuit, +1)


@claim("QK circuits of layer 2 find vectors that are similar to the destination's", "yes", 13, 3)
def claim_l2_similarity(study: Study) -> Finding:
    """Correlation, over the pairs of a source and a later destination from 6 to 13, of attention scores with
    the cosine between what the two carry in W_U's coordinates, sequences with c in [-1.1, -0.9], each by
    itself, mean, by head. At least 0.5 in every head; partly in more than half of them."""
    n_heads, by_c = len(study.heads), {}
    pairs = torch.tril(torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool), -1)
    pairs[:6] = False
    for c in (-1, 1):
        names = ("blocks.2.attn.hook_attn_scores", "blocks.2.hook_resid_pre")
        kept = study.record(study.near(c).a[:, :-1], *names)
        carried = F.normalize(kept[names[1]] @ study.model.unembed.W_U, dim=-1)
        similar = (carried @ carried.transpose(1, 2))[:, pairs][:, None]  # [batch, 1, pair]
        by_c[c] = fit_line(similar, kept[names[0]][:, :, pairs])
    correlation = {c: (slope.sign() * r2.sqrt()).mean(0) for c, (slope, _, r2) in by_c.items()}
    heads = int((correlation[-1] >= 0.5).sum())
    values = {"heads that do": heads, "c near 1": correlation[1]}
    return Finding(correlation[-1], verdict(heads == n_heads, heads > n_heads / 2), values)


@figure(12, "OV of layer 2", 3)
def figure_ov_layer_2(study: Study):
    return draw_layer_circuits(study, 2, "OV")


@figure(13, "QK of layer 2", 3)
def figure_qk_layer_2(study: Study):
    return draw_layer_circuits(study, 2, "QK")


def lens(study: Study, hook: str, own_scale: bool = False) -> Tensor:
    """Residual stream at a hook point of the population, unembedded (logit lens), [size, pos, d_vocab]: with
    the scale that ln_final has at the end, so that parts add up, or with the stream's own."""
    held = {} if own_scale else {SCALE: study.activations[SCALE]}
    return study.model.run_from(len(study.layers), study.activations[hook], interventions.hold(held))


def lens_share(study: Study, hook: str, own_scale: bool = False) -> tuple[float, float, float]:
    """Of the next vector at positions 2 to 13, the share that the lens at a hook point explains, the constant
    by which it does best, and the share explained then."""
    target = study.population.a[:, FIRST_POSITION + 1 :]
    seen = lens(study, hook, own_scale)[:, FIRST_POSITION:]
    (constant,), rescaled = regress(target, seen)
    return explained(seen, target), constant, rescaled


@claim("the residual stream after layer 0, unembedded, is a fair estimate", "Figure 14", 14)
def claim_lens_after_l0(study: Study) -> Finding:
    """1 - MSE / MSE of predicting 0, positions 2 to 13, unembedded with the scale that ln_final has at the
    end. Fair: at least nine tenths of what the best fixed linear predictor from a_n and a_{n-1}, which knows
    nothing of the sequence, explains; partly if, multiplied by the best constant, it explains at least half:
    the right shape in the wrong size."""
    hook, target = "blocks.0.hook_resid_post", study.population.a[:, FIRST_POSITION + 1 :]
    share, constant, rescaled = lens_share(study, hook)
    own, own_constant, own_rescaled = lens_share(study, hook, own_scale=True)
    coefficients, linear = regress(*neighbours(study.population.a))
    errors = (lens(study, hook)[:, FIRST_POSITION:] - target).pow(2).sum((1, 2))
    ci = interval(errors, target.pow(2).sum((1, 2)), of=lambda left, whole: 1 - ratio(left, whole))
    values = {"best constant": constant, "rescaled": rescaled, "own scale": own,
              "own scale, best constant": own_constant, "own scale, rescaled": own_rescaled,
              "best fixed linear predictor of two vectors": linear, "its coefficients": coefficients,
              "the model": explained(study.activations["output"][:, FIRST_POSITION:], target)}
    return Finding(share, verdict(share >= 0.9 * linear, rescaled >= 0.5), values, ci)


@claim("after layer 0 an overestimate, which layer 2's heads refine", "yes", 14, 3)
def claim_refinement(study: Study) -> Finding:
    """Explained shares of the next vector, positions 2 to 13, unembedded with the scale that ln_final has at
    the end. After layer 0 at least one half is explained; it is an overestimate: the best constant is at most
    0.95; and layer 2's heads leave at most half of what is unexplained before them. Partly if only the
    overestimate is missing."""
    stages = {"after layer 0's heads": "blocks.0.hook_resid_mid", "after layer 0": "blocks.0.hook_resid_post",
              "before layer 2": "blocks.1.hook_resid_post", "after layer 2's heads": "blocks.2.hook_resid_mid",
              "after layer 2": "blocks.2.hook_resid_post"}
    shares = {stage: lens_share(study, hook) for stage, hook in stages.items()}
    values = {stage: share for stage, (share, _, _) in shares.items()}
    values |= {f"{stage}, best constant": constant for stage, (_, constant, _) in shares.items()}
    values["after layer 0, own scale"] = lens_share(study, stages["after layer 0"], own_scale=True)[0]
    estimate, over = values["after layer 0"] >= 0.5, values["after layer 0, best constant"] <= 0.95
    refined = 1 - values["after layer 2's heads"] <= (1 - values["before layer 2"]) / 2
    return Finding(values["after layer 0"], verdict(estimate and over and refined, estimate and refined), values)


@figure(14, "residual stream after layer 0 against the true output")
def figure_lens_after_layer_0(study: Study):
    title = "Residual stream after layer 0, unembedded with the final scale, against the true next vector"
    canvas, panels = grid(2, 3, 10.5, 5.4, title, sharex=True)
    truth, last, before = neighbours(study.population.a)
    (beta, alpha), _ = regress(truth, last, before)
    best = f"{beta:.2f} $a_n$ + {alpha:.2f} $a_{{n-1}}$, the best\nfixed predictor of two vectors"
    after, output = lens(study, "blocks.0.hook_resid_post"), study.activations["output"]
    lines = {"true next vector": (truth, {"color": TRUTH, "marker": "o", "ms": 4}),
             "after layer 0": (after[:, FIRST_POSITION:], {"color": LENS, "marker": "."}),
             "model's output": (output[:, FIRST_POSITION:], {"color": MODEL, "ls": "--", "marker": "."}),
             best: (beta * last + alpha * before, {"color": "0.6", "lw": 1})}
    for column, c in enumerate((-1.0, 0.6, 1.2)):
        i = pick(study.population, c)
        moving = truth[i].std(0).argsort(descending=True)[:2]  # the two dimensions that move most
        for dimension, axes in zip(moving.tolist(), panels[:, column]):
            curves(axes, range(FIRST_POSITION, MAX_LENGTH),
                   {label: (y[i, :, dimension], look) for label, (y, look) in lines.items()})
            axes.axhline(0, color="0.9", zorder=0)
            axes.set_title(f"c = {study.population.c[i]:.2f}, dimension {dimension}")
        panels[1, column].set_xlabel("position")
    canvas.supylabel("component", fontsize=9)
    canvas.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return canvas


@functools.cache
def ov_eigenvalue_scores(study: Study) -> dict[str, Tensor]:
    """Eigenvalue scores of the OV circuits by layer and head, {reading: [n_layers, n_heads]}: between data
    coordinates, of W_V W_O from the d_head x d_head product W_O W_V, and of W_E W_V W_O W_U."""
    model = study.model
    data_scores = [eigenvalue_score(data_ov_circuit(model, l)) for l in study.layers]
    stream = [eigenvalue_score(block.attn.W_O @ block.attn.W_V) for block in model.blocks]
    through = [eigenvalue_score(model.embed.W_E @ ov_circuit(model, l) @ model.unembed.W_U) for l in study.layers]
    return {"data": torch.stack(data_scores), "d_model": torch.stack(stream), "W_E": torch.stack(through)}


@claim("OV eigenvalue scores: layer 2 copies negatively", "layer 2 negative", 15, 3)
def claim_eigenvalue_score(study: Study) -> Finding:
    """sum(lambda) / sum(|lambda|) of OV between data coordinates, by layer and head. At most -0.5 in every
    head of layer 2; partly if the mean of layer 2 is negative and more than half of its heads are."""
    readings = ov_eigenvalue_scores(study)
    layer_2 = readings["data"][2]
    most = layer_2.mean() < 0 and (layer_2 < 0).sum() > len(study.heads) / 2
    values = {"d_model": readings["d_model"], "entering through W_E": readings["W_E"]}
    return Finding(readings["data"], verdict((layer_2 <= -0.5).all(), most), values)


@figure(15, "OV eigenvalue scores")
def figure_eigenvalue_scores(study: Study):
    canvas, panels = grid(1, 2, 10, 2.8, "Eigenvalue scores of the OV circuits")
    titles = {"data": "between data coordinates", "d_model": "$W_V W_O$, as in the paper"}
    for axes, (name, title) in zip(panels, titles.items()):
        image = heat(axes, ov_eigenvalue_scores(study)[name], title, 1.0, "head", "layer")
    canvas.colorbar(image, ax=panels, label="score: 1 copies, -1 negates")
    return canvas


@claim("MSE with QK of the layer 2 heads that are like I a random pseudoinverse", 1e-4, 13, 3)
def claim_l2_qk_pinv(study: Study) -> Finding:
    """W_Q random and W_K^T its pseudoinverse, b_Q and b_K 0, mean over random W_Q, in the five heads whose QK
    is most like I at once (the paper's were 0 to 4, but a head's number means nothing in another model). At
    most 1.5 times the unchanged MSE (the paper prints 0.0001 for both), and attention that knows nothing,
    uniform or of random W_Q and W_K of the trained norm, does more harm (the interval of the difference is
    above 0); partly if only the second holds, or each of the five stays within 1.5 by itself."""
    model, n_heads = study.model, len(study.heads)
    likest = identity_cosine(data_qk_circuit(model, 2)).argsort(descending=True)[:5].tolist()

    def replaced(change: Callable, heads: list[int], count: int | None = None) -> Tensor:
        """MSE of each sequence, mean over random matrices."""
        generator = study.generator(f"{change.__name__} {heads}")
        draws = [study.errors(2, count=count, model=change(model, 2, heads, generator)) for _ in range(QK_DRAWS)]
        return torch.stack(draws).mean(0)

    pinv, mean = interventions.pseudoinverse_qk, interventions.mean_outputs(study.activations)
    ablate = interventions.replace_outputs(mean, [(2, h) for h in likest])
    arms = {"pseudoinverse": replaced(pinv, likest), "random": replaced(interventions.random_qk, likest),
            "uniform": study.errors(2, model=interventions.replace_qk(model, 2, likest, 0.0, 0.0)),
            "mean ablation": study.errors(2, ablate)}
    gaps = {name: interval(arms[name] - arms["pseudoinverse"]) for name in ("uniform", "random")}
    times = {f"times: {name}": study.factor(errors) for name, errors in arms.items()}
    single = [study.factor(replaced(pinv, [h], FEW)) for h in study.heads]
    values = {"heads": likest} | times | {f"{name} less pseudoinverse": gap for name, gap in gaps.items()}
    values |= {"times: each head by itself": single, "times: heads 0 to 4": study.factor(replaced(pinv, [0, 1, 2, 3, 4][:n_heads], FEW)),
               "times: all heads": study.factor(replaced(pinv, list(study.heads), FEW))}
    unchanged, telling = times["times: pseudoinverse"] <= 1.5, all(low > 0 for low, _ in gaps.values())
    how = verdict(unchanged and telling, telling or max(single[h] for h in likest) <= 1.5)
    return Finding(arms["pseudoinverse"].mean(), how, values, interval(arms["pseudoinverse"]))


# ------------------------------------------------------------------------------------------------------------
# 4.7 Analysis of MLPs


@functools.cache
def mlp_cosines(study: Study) -> Tensor:
    """Cosine of what each MLP writes, unembedded, with the next vector, mean over the population, [n_layers,
    pos]: the attribution without the length of the target, which is 1.8 times as long at the end."""
    target = F.normalize(study.population.a[:, 1:], dim=-1)
    written = [study.activations[f"blocks.{l}.hook_mlp_out"] @ study.model.unembed.W_U for l in study.layers]
    return torch.stack([(F.normalize(w, dim=-1) * target).sum(-1).mean(0) for w in written])


@claim("the MLPs push in the right direction mainly at the last positions", "Figure 16", 16)
def claim_mlp_dla(study: Study) -> Finding:
    """Cosine of what each MLP writes, unembedded, with the next vector, [layer][position]. Averaged over the
    layers positive at positions 11, 12 and 13 and there more than twice as large as at positions 2 to 10;
    partly if positive and larger."""
    cosines = mlp_cosines(study)
    mean, paper = cosines.mean(0), attributions(study, "hook_mlp_out")["paper, next"]
    late, early = mean[-3:].mean(), mean[FIRST_POSITION:-3].mean()
    length = study.population.a[:, 1:].norm(dim=-1).mean(0)
    values = {"positions 11 to 13": late, "positions 2 to 10": early, "dot product (the paper's)": paper,
              "length of the targets, late / early": length[-3:].mean() / length[FIRST_POSITION:-3].mean()}
    how = verdict(mean[-3:].min() > 0 and late > 2 * early, late > 0 and late > early)
    return Finding(cosines, how, values)


@figure(16, "direct logit attribution of the MLPs")
def figure_mlp_attribution(study: Study):
    canvas, panels = grid(1, 3, 11, 3.6, "Direct logit attribution of the MLPs to the next vector, by position")
    found = attributions(study, "hook_mlp_out")
    shown = {"(a) the paper's: ln_final on the MLP alone": (found["paper, next"], "dot product"),
             "(b) standard: the whole stream's scale": (found["standard, next"], "dot product"),
             "direction alone": (mlp_cosines(study), "cosine with the next vector")}
    for axes, (title, (values, unit)) in zip(panels, shown.items()):
        for layer, line in enumerate(values):
            axes.plot(line, marker="o", ms=4, color=LAYER_COLORS[layer % 3], label=f"MLP of layer {layer}")
        axes.axhline(0, color="0.8", zorder=0)
        axes.axvspan(-0.5, FIRST_POSITION - 0.5, color="0.95", zorder=0)
        axes.set(title=title, xlabel="position (grey: not determined yet)", ylabel=unit,
                 xlim=(-0.5, MAX_LENGTH - 0.5))
    panels[0].legend()
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.8 Conjectures on model functionality


@claim("the residual stream after layer 0 is about a_n + alpha a_{n-1}", 2.3, 17)
def claim_alpha(study: Study) -> Finding:
    """Least squares of the residual stream after layer 0, unembedded with ln_final, on a_n + alpha a_{n-1},
    positions 2 to 13. alpha within 2.1 to 2.5 with R^2 of at least 0.5, and a_n really there: read through
    W_E^+, where it came in, with a factor between 0.5 and 1.5. Partly if with both coefficients free that of
    a_{n-1} is positive and R^2 at least 0.5."""
    truth, a_n, before = neighbours(study.population.a)

    def fits(name: str, y: Tensor) -> dict[str, object]:
        (beta, alpha), r2 = regress(y, a_n, before)
        (held,), _ = regress(y - a_n, before)
        return {f"{name}: a_n, a_n-1, R2": [beta, alpha, r2],
                f"{name}: a_n-1, R2 with a_n held at 1": [held, explained(a_n + held * before, y)]}

    y = lens(study, "blocks.0.hook_resid_post", own_scale=True)[:, FIRST_POSITION:]
    came_in = study.activations["blocks.0.hook_resid_post"] @ torch.linalg.pinv(study.model.embed.W_E)
    values = fits("after layer 0", y)
    alpha, r2 = values["after layer 0: a_n-1, R2 with a_n held at 1"]
    values |= fits("after layer 0, through W_E^+", came_in[:, FIRST_POSITION:])
    middle = lens(study, "blocks.0.hook_resid_mid", own_scale=True)[:, FIRST_POSITION:]
    values |= fits("after layer 0's heads", middle) | fits("the true next vector", truth)
    values |= fits("after layer 0, final scale", lens(study, "blocks.0.hook_resid_post")[:, FIRST_POSITION:])
    values["a_n + 2.3 a_n-1 explains of the true next vector"] = explained(a_n + 2.3 * before, truth)
    survives = 0.5 <= values["after layer 0, through W_E^+: a_n, a_n-1, R2"][0] <= 1.5
    _, free_alpha, free_r2 = values["after layer 0: a_n, a_n-1, R2"]
    how = verdict(2.1 <= alpha <= 2.5 and r2 >= 0.5 and survives, free_alpha > 0 and free_r2 >= 0.5)
    ci = interval(((y - a_n) * before).sum((1, 2)), (before**2).sum((1, 2)), of=ratio)
    return Finding(alpha, how, values, ci)


@figure(17, "before and after layer 0, a_n + 2.3 a_{n-1}, and the truth")
def figure_estimate(study: Study):
    """The paper's axis shows positions of one sequence in one dimension."""
    i, n = pick(study.population, -0.9), range(1, MAX_LENGTH)
    dimension = int(study.population.a[i].std(0).argmax())  # one that moves
    a, where = study.population.a[i, :, dimension], f"c = {study.population.c[i]:.2f}, dimension {dimension}"
    canvas, axes = grid(1, 1, 8, 4, f"What layer 0 does to one alternating sequence: {where}")
    before, after = (lens(study, f"blocks.0.hook_resid_{when}", own_scale=True)[i, 1:, dimension]
                     for when in ("pre", "post"))
    curves(axes, n, {"before layer 0, unembedded": (before, {"color": "goldenrod", "marker": "."}),
                     "after layer 0, unembedded": (after, {"color": "purple", "marker": "."}),
                     "$a_n + 2.3\\,a_{n-1}$ (the paper's $\\alpha$)":
                         (a[1:-1] + 2.3 * a[:-2], {"color": OTHER, "marker": "."}),
                     "$a_{n+1}$, the truth": (a[2:], {"color": TRUTH, "marker": "."})})
    axes.axhline(0, color="0.9", zorder=0)
    axes.set(xlabel="position n", ylabel="component",
             title="ln_final gives every unembedded vector nearly the same length: compare shapes")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


# ------------------------------------------------------------------------------------------------------------
# The report and the command line


def plain(value):
    """Tensors and nested containers as JSON has them, numbers to four significant digits."""
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def short(value) -> str:
    """A measured value in a table cell: lists by head in one line, a line for each layer."""
    if isinstance(value, list):
        return ("<br>" if value and isinstance(value[0], list) else " ").join(map(short, value))
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.3g}"
    return str(value)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a markdown table."""
    header = list(header)
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    return [f"| {lines[0]} |", "| --- " * len(header) + "|", *(f"| {line} |" for line in lines[1:])]


def meta(study: Study, run: str, step: int | None) -> dict:
    """What the numbers were computed from, and with."""
    file = "weights.pt" if step is None else f"steps/{step:08d}.pt"
    last = int(study.log["step"][-1]) if step is None else step
    names = ("POPULATION", "HELD_OUT_PER_LENGTH", "EXAMPLES", "FEW", "QK_DRAWS", "RESAMPLES")
    versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)}
    return {"weights": f"{os.path.basename(os.path.abspath(run))}/{file}", "sha256": study.model.sha256,
            "step": last, "config": study.settings, "samples": {name.lower(): globals()[name] for name in names},
            "versions": {"python": platform.python_version()} | versions}


def markdown(catalogue: Catalogue, results: dict, command: str) -> str:
    """The report: a table of the claims, then each with its rule, its picture and its values."""
    rows, details, drawn = [], [], set()
    for name, found in results["claims"].items():
        fresh, entry = found["untrained"], catalogue.claims[name]
        rows.append([f"[`{name}`](#{name}) {found['claim']}", entry.paper_text(), short(found["measured"]),
                     " to ".join(map(short, found["interval"] or ())), found["verdict"]])
        details += ["", f"## {name}", "", f"{found['claim']}: **{found['verdict']}** (untrained weights: "
                    f"{fresh['verdict']}).", "", f"Rule: {found['why']}", ""]
        if entry.figure not in drawn:
            details += [f"![{catalogue.figures[entry.figure].text}]({catalogue.file(entry.figure)})", ""]
            drawn.add(entry.figure)
        values = {"measured": found["measured"]} | found["values"]
        details += table(["value", "trained", "untrained"],
                         ([key, short(value), short(fresh["values"].get(key, "-"))] for key, value in values.items()))
    intro = f"Written by `python {command} --all`; untrained: the same of fresh weights."
    about = [f"{key}: {value}  " for key, value in results["meta"].items()]
    head = ["claim", "paper", "measured", "95% interval", "verdict"]
    others = [f"![{entry.text}]({catalogue.file(number)})" for number, entry in sorted(catalogue.figures.items())
              if number not in drawn]
    return "\n".join(["# Claims", "", intro, "", *about, "", *table(head, rows), *details, "",
                      "## The other figures", "", *others, ""])


def draw(entry: Entry, study: Study, path: str):
    """Write a figure to a PNG: in matplotlib's default style, whatever the user's is, and ours."""
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        entry.function(study).savefig(buffer, format="png")
    save(buffer.getvalue(), path)


def measure(catalogue: Catalogue, name: str, study: Study) -> dict | None:
    """A claim as results.json has it, also on the untrained model; None where it cannot be measured."""
    entry = catalogue.claims[name]
    found, fresh = entry.function(study), entry.function(study.untrained)
    if found is None or fresh is None:
        return None
    untrained = {"verdict": fresh.verdict, "values": {"measured": fresh.measured} | fresh.values}
    return plain({"claim": entry.text, "paper": entry.paper, "measured": found.measured,
                  "interval": found.interval, "values": found.values, "verdict": found.verdict,
                  "why": " ".join(entry.function.__doc__.split()), "untrained": untrained})


def analyse(catalogue: Catalogue, study: Study, out: str, wanted: list[int] | None, about: dict, names: tuple[str, str]):
    """Draw the figures `wanted` into `out`; for None all, and measure every claim, with the reports NAME.json
    and NAME.md for names (NAME, command). Says in a line what has no meaning for this run."""
    figures = [number for number in sorted(set(wanted or catalogue.figures))]
    jobs = [("figure", number) for number in figures] + [("claim", name) for name in catalogue.claims if not wanted]
    left_out, claims, start = [], {}, time.perf_counter()
    os.makedirs(out, exist_ok=True)
    for done, (kind, key) in enumerate(jobs):
        spent = time.perf_counter() - start
        left = f", about {spent * (len(jobs) / done - 1):.0f} s left" if done else ""
        progress(f"{done / len(jobs):4.0%} {kind} {key} ({done / max(spent, 0.1):.1f} a second{left})")
        entry = (catalogue.figures if kind == "figure" else catalogue.claims)[key]
        found = None
        if entry.layers <= len(study.layers) and kind == "figure":
            draw(entry, study, os.path.join(out, catalogue.file(key)))
            continue
        if entry.layers <= len(study.layers):
            found = measure(catalogue, key, study)
        if found:
            claims[key] = found
        else:
            left_out.append(f"{kind} {key}")
    if not wanted:
        results = {"meta": about, "claims": claims}
        save(results, os.path.join(out, f"{names[0]}.json"))
        save(markdown(catalogue, results, names[1]), os.path.join(out, f"{names[0]}.md"))
    progress("")
    if left_out:
        say(f"left out, without a meaning for this run: {', '.join(left_out)}")
    for name, found in claims.items():
        measured = short(found["measured"]).replace("<br>", " / ")[:50]
        say(f"{name:20}  {catalogue.claims[name].paper_text():16}  {measured:50}  {found['verdict']}")
    say(f"{len(figures)} figures{'' if wanted else f', {names[0]}.json and .md'} in {out}, "
        f"{time.perf_counter() - start:.0f} s")


def run_command(catalogue: Catalogue, doc: str, names: tuple[str, str], default_out: str):
    """The command line of a catalogue: parse, open the run, analyse. names: see `analyse`."""
    parser = command_line(doc)
    what, option = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    what("--all", action="store_true", help=f"every figure and claim, {names[0]}.json and {names[0]}.md")
    what("--fig", type=int, action="append", metavar="N", help="figure N; also several times")
    what("--list", action="store_true", help="list the figures and claims")
    option("--run", metavar="DIR", help="run folder with weights.pt and log.csv (default: the shipped weights)")
    option("--step", type=int, metavar="N", help="the weights that the run kept at step N")
    option("--out", metavar="DIR", help="where to write (default: figures, or figures in --run)")
    given = vars(parser.parse_args())
    for number in given.get("fig", []):
        if number not in catalogue.figures:
            there = f"{min(catalogue.figures)} to {max(catalogue.figures)}"
            parser.error(f"there is no figure {number}; figures are {there}, see --list")
    if "list" in given:
        for number, entry in sorted(catalogue.figures.items()):
            say(f"figure {number:2}  {entry.text}")
        for name, entry in catalogue.claims.items():
            say(f"claim  {name}: {entry.text} (paper: {entry.paper_text()}; figure {entry.figure})")
        return
    run, step = given.get("run", os.path.join(HERE, "weights")), given.get("step")
    out = default_out if "run" not in given else os.path.join(run, "figures")
    out = given.get("out", out if step is None else os.path.join(run, "figures", f"step_{step}"))
    torch.set_num_threads(1)  # with two, programs that share two cores slow one another ten times
    try:
        study = open_study(run, step)
        analyse(catalogue, study, out, given.get("fig"), meta(study, run, step), names)
        first = study.settings.get("loss_from", FIRST_POSITION)
        if "all" in given and catalogue is PAPER and first != FIRST_POSITION:
            found = plain(mse_summary(study) | {"config": study.settings, "sha256": study.model.sha256})
            save(found, os.path.join(out, f"loss_from_{first}.json"))
    except (OSError, ValueError) as error:
        progress("")
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    run_command(PAPER, __doc__, ("results", "analyze.py"), os.path.join(HERE, "figures"))


if __name__ == "__main__":
    main()
