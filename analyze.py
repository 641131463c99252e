"""Every figure and every number of the paper, and what the model really computes, from one run's weights.

    python analyze.py --all                         # everything, on the weights that ship, into figures/
    python analyze.py --list                        # what there is
    python analyze.py --fig 8 --fig 10              # some figures
    python analyze.py --all --run runs/paper        # of another run, into runs/paper/figures
    python analyze.py --seeds runs/seeds runs/gelu --out figures     # all runs in these folders, compared
    python analyze.py --tasks runs/tasks --out figures               # other recurrences
    python analyze.py --depths runs/depths --out figures             # models of one, two and three layers

In order: helpers and the Study (a model and the sequences it is studied on); the paper, section by section,
each with its measures, claims and figures; what the model computes (ours); runs compared; the report and the
command line. A claim is a function from a Study to a Finding under @claim; its docstring is its rule, which
the report prints. A figure is a function from a Study to a matplotlib figure under @figure. One of your own
needs nothing else than to stand above the command line:

    @figure(28, "norms of the population", tasks="any")
    def figure_norms(study: Study):
        canvas, axes = grid(1, 1, 6, 4, "Norm of a_n")
        axes.plot(study.population.a.norm(dim=-1).T)    # population.a: [1000, 15, 40]
        return canvas
"""

import ast
import copy
import functools
import hashlib
import os
import platform
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import interventions
from data import FIRST_POSITION, MAX_LENGTH, MIN_LENGTH
from interventions import off_plane, source_weights, strides
from model import (Config, Transformer, direct_attribution, effective_rank, eigenvalue_score, fold,
                   full_ov_circuit, identity_cosine, load_file, load_weights, ov_circuit, qk_circuit,
                   replacing, save_json, settings_beside)
from train import CommandLine, Line, Options, from_settings

POPULATION = 1000  # sequences of 14 inputs, as in the paper (section 4.5)
SMALL = 100  # sequences for the steps of a run, and half as many for an untrained model
HELD_OUT_PER_LENGTH = 840  # 10,080 sequences over the 12 lengths
EXAMPLES = 200  # sequences of one kind: alternating ones for the attention of layer 2, noisy ones, ..
FEW = 250  # test sequences for interventions in single heads and for those that are only controls
QK_DRAWS = 5  # random matrices for each arm of the pseudoinverse test
RESAMPLES = 400  # of each bootstrap
PER_C = 3  # sequences for each c at which source weights are read
WHOLE = 40  # and where c is not chosen
SAMPLES = "POPULATION SMALL HELD_OUT_PER_LENGTH EXAMPLES FEW QK_DRAWS RESAMPLES PER_C WHOLE".split()
SCALE = "ln_final.hook_scale"

# ------------------------------------------------------------------------------------------------------------
# Helpers


@dataclass(frozen=True)
class Finding:
    """What a claim comes to on one model."""

    measured: object  # a number, a list by head or position, or [layer][head]
    verdict: str  # "reproduced", "partly" or "not reproduced", by the rule in the claim's docstring
    values: dict[str, float]  # labelled numbers by which runs are compared, lists by head as their mean
    control: dict = field(default_factory=dict)  # {label: number, list or dict}: what it takes to judge them
    interval: list[float] | None = None  # 95% confidence interval, where the claim is one number


class Entry(NamedTuple):
    """A claim or a figure."""

    function: Callable  # Study -> Finding, or -> matplotlib figure
    text: str
    layers: int  # that a model must have for it
    tasks: str  # for which it has a meaning: affine, rotating (those of sequences that may be rotated) or any
    paper: object = None  # the paper's value of a claim, None for one of ours
    figure: int = 0  # the nearest to a claim
    unit: str = ""  # of a claim's values

    def paper_text(self) -> str:
        if self.paper is None:
            return "(ours)"
        return f"{self.paper[0]} to {self.paper[1]}" if isinstance(self.paper, list) else short(self.paper)


CLAIMS: dict[str, Entry] = {}
FIGURES: dict[int, Entry] = {}


def claim(text: str, paper, figure: int, unit: str, layers: int = 1, tasks: str = "affine") -> Callable:
    """Puts a function claim_NAME(study) -> Finding into CLAIMS as NAME."""

    def register(find: Callable) -> Callable:
        CLAIMS[find.__name__.removeprefix("claim_")] = Entry(find, text, layers, tasks, paper, figure, unit)
        return find

    return register


def figure(number: int, title: str, layers: int = 1, tasks: str = "affine") -> Callable:
    """Puts a function figure_NAME(study) -> matplotlib figure into FIGURES; it is drawn to figNN_NAME.png.
    ValueError for a number that is taken."""

    def register(draw: Callable) -> Callable:
        if number in FIGURES:
            raise ValueError(f"figure {number} is already: {FIGURES[number].text}")
        FIGURES[number] = Entry(draw, title, layers, tasks)
        return draw

    return register


def verdict(full, part=False) -> str:
    return "reproduced" if full else "partly" if part else "not reproduced"


def once(measure: Callable) -> Callable:
    """Makes a function of a study and plain arguments compute each of its results once for each study."""

    @functools.wraps(measure)
    def kept(study: "Study", *arguments):
        key = (measure.__name__, *arguments)
        if key not in study.kept:
            study.kept[key] = measure(study, *arguments)
        return study.kept[key]

    return kept


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
    return coefficients.tolist(), 1 - ((y - X @ coefficients) ** 2).sum().item() / (y**2).sum().item()


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


def neighbours(a: Tensor, first: int = FIRST_POSITION, count: int = 2) -> list[Tensor]:
    """a_{n+1} and the `count` vectors a_n, a_{n-1}, .. for n = first .., of sequences a: [batch, pos, v] ->
    [batch, pos - first - 1, v] each."""
    return [a[:, first - lag : a.shape[1] - 1 - lag] for lag in range(-1, count)]


class Study:
    """A trained model and what is measured on it more than once. Nothing is measured before it is asked for.

    size: sequences in the population and in the test set, 0 for POPULATION. log: the run's log.csv. task: the
    name of what it was trained on.
    """

    def __init__(self, transformer: Transformer, seed: int, size: int = 0,
                 log: dict[str, np.ndarray] | None = None, task: str = "affine"):
        self.model = fold(transformer).requires_grad_(False)
        self.seed, self.size, self.log = seed, size or POPULATION, log
        self.task_name, self.task = task, data.find_task(task)
        self.layers, self.heads = range(self.model.config.n_layers), range(self.model.config.n_heads)
        self.longest = min(self.model.config.n_ctx, data.N_CTX)  # inputs that there are positions for
        self.kept: dict[tuple, object] = {}  # what functions under @once found
        self.population = self.draw("population")  # the sequences on which activations are averaged
        self.test = self.draw("test")  # other sequences, on which interventions are judged

    def has(self, entry: Entry) -> bool:
        """Whether a claim or figure has a meaning for so many layers and this task."""
        tasks = {"any": True, "rotating": self.task.rotates, "affine": self.task_name == "affine"}
        return entry.layers <= len(self.layers) and tasks[entry.tasks]

    def generator(self, purpose: str) -> torch.Generator:
        """A random stream for each purpose, so that a number does not depend on what else is computed."""
        return torch.Generator().manual_seed(random.Random(f"{self.seed} {purpose}").getrandbits(62))

    def sample(self, count: int, length: int, generator: torch.Generator, c_range=(-2.0, 2.0),
               dtype=torch.float32) -> data.Sample:
        d_vocab = self.model.config.d_vocab
        return data.sample(count, length, generator, d_vocab, c_range, self.task_name, dtype)

    def draw(self, purpose: str, size: int = 0, c_range: tuple[float, float] = (-2.0, 2.0)) -> data.Sample:
        return self.sample(min(size or self.size, self.size), MAX_LENGTH, self.generator(purpose), c_range)

    @once
    def near(self, c: int) -> data.Sample:
        """Sequences that alternate, c near -1, or their counterpart, c near 1, whose vectors are as long."""
        return self.draw("alternating" if c < 0 else "steady", EXAMPLES, (c - 0.1, c + 0.1))

    @functools.cached_property
    def untrained(self) -> "Study":
        """The same study of a freshly initialised model, on fewer sequences."""
        fresh = Transformer(self.model.config, self.generator("untrained"))
        return Study(fresh, self.seed, SMALL // 2, self.log, self.task_name)

    @functools.cached_property
    def exact(self) -> Transformer:
        """The model in float64, for derivatives."""
        return copy.deepcopy(self.model).double()

    def record(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """Activations on inputs x; the output is under "output"."""
        kept: dict[str, Tensor] = {}
        output = self.model(x, hooks=interventions.record(names, kept))
        return kept | {"output": output}

    @functools.cached_property
    def activations(self) -> dict[str, Tensor]:
        """The one plain forward pass over the population that claims and figures share."""
        first = ("blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized", "blocks.0.hook_resid_mid", SCALE)
        each = ("attn.hook_pattern", "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_mlp_out")
        names = [f"blocks.{l}.{name}" for l in self.layers for name in (*each, "hook_resid_post")]
        return self.record(self.population.a[:, :-1], *first, *names)

    @functools.cached_property
    def streams(self) -> list[Tensor]:
        """The residual stream on the test sequences before each layer and after the last, [size, pos,
        d_model] each: where interventions start from."""
        names = [f"blocks.{l}.hook_resid_pre" for l in self.layers]
        names.append(f"blocks.{self.layers[-1]}.hook_resid_post")
        kept = self.record(self.test.a[:, :-1], *names)
        return [kept[name] for name in names]

    def final_stream(self, layer: int, hooks: dict[str, Callable] | None = None, count: int | None = None,
                     model: Transformer | None = None) -> Tensor:
        """The residual stream after the last layer on the first `count` test sequences, [count, pos,
        d_model], under an intervention that changes nothing before `layer`. 100 sequences at a time: the
        activations of so many stay in the processor's cache."""
        name, parts = f"blocks.{self.layers[-1]}.hook_resid_post", []
        for resid in self.streams[layer][:count].split(100):
            kept: dict[str, Tensor] = {}
            (model or self.model).run_from(layer, resid, (hooks or {}) | interventions.record([name], kept))
            parts.append(kept[name])
        return torch.cat(parts)

    def read_out(self, stream: Tensor, scale_of: Tensor | None = None) -> Tensor:
        """MSE of each of the first test sequences whose final residual stream this is, [count, pos, d_model]
        -> [count]; ln_final gets the scale that another stream has, if one is given."""
        kept: dict[str, Tensor] = {}
        if scale_of is not None:
            self.model.run_from(len(self.layers), scale_of, interventions.record([SCALE], kept))
        output = self.model.run_from(len(self.layers), stream, interventions.hold(kept))
        return squared_errors(output, self.test.a[: len(stream), 1:], self.task.first)

    def errors(self, layer: int, hooks: dict[str, Callable] | None = None, count: int | None = None,
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


def open_study(run: str, seed: int) -> Study:
    """The study of a run folder. FileNotFoundError or ValueError unless it is as train.py writes it."""
    if not os.path.isdir(run):
        wanted = "give one with weights.pt and log.csv, such as weights"
        raise FileNotFoundError(f"there is no run folder {run}: {wanted}")
    weights = os.path.join(run, "weights.pt")
    options, _ = from_settings(settings_beside(weights))  # which knows every name that config.json may hold
    return Study(load_weights(weights), seed, log=read_log(os.path.join(run, "log.csv")), task=options.task)


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


# Drawing

TRUTH, MODEL, LENS, OTHER = "tab:blue", "tab:orange", "tab:red", "tab:green"  # for one thing everywhere
LAYER_COLORS = (TRUTH, OTHER, LENS)
C_BIN = 0.25  # width of the ranges of c in which errors are averaged
SIZE_RANGES = np.arange(0, 2, C_BIN) + C_BIN / 2  # the middles of those of |c|
STYLE = {"figure.dpi": 130, "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "image.interpolation": "nearest", "image.aspect": "auto"}


def grid(rows: int, columns: int, width: float, height: float, title: str, sharex=False, sharey=False,
         squeeze=True, width_ratios=None, height_ratios=None):
    """A figure of `rows` x `columns` axes, laid out without overlaps, in inches; the rest as plt.subplots."""
    canvas, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", sharex=sharex,
                                sharey=sharey, squeeze=squeeze, width_ratios=width_ratios,
                                height_ratios=height_ratios)
    canvas.suptitle(title)
    return canvas, axes


def curves(axes, x, lines: dict[str, tuple]):
    """A line for each {label: (y, how it looks)}."""
    for label, (y, look) in lines.items():
        axes.plot(x, y, label=label, **look)


def heat(axes, matrix: Tensor, title: str, limit: float | None = None, xlabel: str = "", ylabel: str = "",
         bar: str = "", digits: int | None = None):
    """A heat map: diverging about 0 with the range [-limit, limit], blue positive as in the paper, or
    attention from 0 to 1 where `limit` is None; with a colour bar if that has a label. Values are written in
    where they are few, or else those that do not vanish at so many `digits`."""
    low, high = (0, 1) if limit is None else (-limit, limit)
    image = axes.imshow(matrix.numpy(), cmap="Blues" if limit is None else "RdBu", vmin=low, vmax=high)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for (row, column), value in np.ndenumerate(matrix.numpy()) if digits or matrix.numel() <= 64 else ():
        text = f"{value:.{digits or (2 if high >= 0.1 else 3)}f}"
        if not digits or float(text):
            axes.text(column, row, text, ha="center", va="center", fontsize=6 if digits else 7,
                      color="white" if abs(value) > 0.6 * high else "black")
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar)
    return image


def by_size(c: Tensor, values: Tensor) -> Tensor:
    """Means of values [batch, ...] over the sequences in each range of |c|, [8, ...]; see SIZE_RANGES."""
    bins = (c.abs() / C_BIN).long()
    return torch.stack([values[bins == b].mean(0) for b in range(len(SIZE_RANGES))])


def pick(sample: data.Sample, c: float) -> int:
    """Index of the sequence whose c is nearest to `c`."""
    return int((sample.c - c).abs().argmin())


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
# 4.1 Model results, and the error against what is possible

PREDICTORS = {  # label and line of each of `predictor_errors`
    "zero": ("predicting 0", {"color": "0.75"}),
    "last vector": ("repeating the last vector", {"color": "0.5"}),
    "best linear": ("best fixed linear predictor", {"color": OTHER}),
    "exact solver": ("exact solver on the last vectors, float32", {"color": TRUTH}),
    "two-step rule": ("two-step rule, which knows $c^2$ only", {"color": LENS, "ls": ":"}),
    "model": ("model", {"color": MODEL, "lw": 2}),
}


@once
def best_linear(study: Study, count: int) -> list[float]:
    """Coefficients of the best fixed linear predictor from the last `count` vectors, on the population."""
    return regress(*neighbours(study.population.a, study.task.first, count))[0]


def predictions(study: Study, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The targets of sequences a [batch, pos + 1, d_vocab] from the first that is determined on, and what the
    model and others predict there, {name: [batch, pos - first, d_vocab]}. The best linear predictor uses as
    many vectors as determine the next one."""
    first, task = study.task.first, study.task
    target, *known = neighbours(a, first, first + 1)
    found = {"zero": torch.zeros_like(target), "last vector": known[0],
             "best linear": sum(factor * x for factor, x in zip(best_linear(study, first + 1), known)),
             "exact solver": task.solve(a[:, :-1]), "two-step rule": task.rule and task.rule(a[:, :-1]),
             "model": torch.cat([study.model(x) for x in a[:, :-1].split(100)])[:, first:]}
    return target, {name: value for name, value in found.items() if value is not None}


def predictor_errors(study: Study, a: Tensor) -> dict[str, Tensor]:
    """Squared errors of `predictions`, mean over d_vocab: {name: [batch, pos - first]}."""
    target, found = predictions(study, a)
    return {name: ((prediction - target) ** 2).mean(-1) for name, prediction in found.items()}


@claim("MSE after training", 1e-4, 2, "MSE", tasks="any")
def claim_mse(study: Study) -> Finding:
    """Mean over the lengths 3 to 14 of the MSE over the predictions of a_3 and later, weights of the last
    step, new sequences. At most 2e-4, twice the paper's value, since with a constant learning rate the MSE
    wanders by such a factor between evaluations; partly up to 1e-3."""
    per_length = max(1, HELD_OUT_PER_LENGTH * study.size // POPULATION)
    seed, d_vocab = study.generator("held out").initial_seed(), study.model.config.d_vocab
    samples = data.held_out(per_length, seed, d_vocab=d_vocab, task=study.task_name)
    by_length = [predictor_errors(study, s.a) for s in samples]
    errors = torch.stack([each.pop("model").mean(1) for each in by_length], 1)  # [sequences, lengths]
    fourteen = squared_errors(study.activations["output"], study.population.a[:, 1:], study.task.first)
    control = {f"by length, {study.task.lengths[0]} to {study.task.lengths[-1]}": errors.mean(0),
               "14 inputs, interval": interval(fourteen)}
    control |= {name: torch.stack([each[name].mean() for each in by_length]).mean() for name in by_length[0]}
    if study.log is not None:
        last = study.log["eval_mse"][-20:]
        control["last 20 evaluations of the log, lowest and highest"] = [last.min(), last.max()]
    mse, values = errors.mean(), {"all lengths": errors.mean(), "14 inputs": fourteen.mean()}
    return Finding(mse, verdict(mse <= 2e-4, mse <= 1e-3), values, control, interval(errors))


@figure(2, "loss against step", tasks="any")
def figure_loss(study: Study):
    canvas, axes = grid(1, 1, 8, 4, "Loss as a function of steps")
    log = study.log
    axes.semilogy(log["step"], log["loss"], color="0.6", label="training loss, mean since the row before")
    axes.semilogy(log["step"], log["eval_mse"], color=MODEL, label="held-out MSE")
    axes.axhline(1e-4, color=TRUTH, ls="--", label="paper: 0.0001")
    axes.set_ylim(bottom=5e-5)
    last = f"at the last step, {log['step'][-1]:,.0f}: held-out MSE {log['eval_mse'][-1]:.2e}"
    axes.set(xlabel="step", ylabel="mean squared error", title=last)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    return canvas


def draw_errors(axes, x, errors: dict[str, Tensor], marker: str = "."):
    """A line for each predictor, on a logarithmic axis."""
    for name, values in errors.items():
        label, line = PREDICTORS[name]
        axes.semilogy(x, values, label=label, marker=marker, **line)


def draw_test_errors(study: Study, what: str, xlabel: str, x, reduce: Callable):
    canvas, axes = grid(1, 1, 9, 4, f"Error against what is possible, by {what} ({study.size:,} sequences)")
    errors = predictor_errors(study, study.test.a)
    draw_errors(axes, x, {name: reduce(e) for name, e in errors.items()})
    axes.set(xlabel=xlabel, ylabel="mean squared error")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


@figure(19, "error by position, against what is possible (not in the paper)", tasks="any")
def figure_errors_by_position(study: Study):
    xlabel = "position n, at which the next vector is predicted"
    positions = range(study.task.first, MAX_LENGTH)
    return draw_test_errors(study, "position", xlabel, positions, lambda e: e.mean(0))


@figure(20, "error by c, against what is possible (not in the paper)")
def figure_errors_by_c(study: Study):
    bins, starts = ((study.test.c + 2) / C_BIN).long(), np.arange(-2, 2, C_BIN)
    means = lambda e: torch.stack([e[bins == b].mean() for b in range(len(starts))])
    return draw_test_errors(study, "c", f"c, in ranges of {C_BIN}", starts + C_BIN / 2, means)


@figure(21, "error on longer, wilder, larger, smaller and noisy sequences (not in the paper)")
def figure_out_of_distribution(study: Study):
    canvas, panels = grid(2, 2, 10, 7, "Where training never went (white: where it did)", sharey=True)
    g = study.generator("out of distribution")
    a = study.sample(100, MAX_LENGTH, g).a
    noise = torch.randn(a.shape, generator=g)
    noise[:, -1] = 0  # the last vector is the target
    lows, lengths = np.arange(-3, 3, C_BIN).tolist(), range(MIN_LENGTH, study.longest + 1)
    shown = {  # {xlabel: (where training went, {x: sequences})}
        "inputs": ((MIN_LENGTH, MAX_LENGTH), {n: study.sample(50, n, g).a for n in lengths}),
        "c": ((-2, 2), {x + C_BIN / 2: study.sample(50, MAX_LENGTH, g, (x, x + C_BIN)).a for x in lows}),
        "factor on all vectors": ((0.95, 1.05), {k: k * a for k in (0.1, 0.2, 0.5, 1, 2, 5, 10)}),
        "standard deviation of noise on the inputs; last prediction": (  # which alone has a target
            None, {s: a + s * noise for s in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}),
    }
    for axes, (xlabel, (inside, settings)) in zip(panels.flat, shown.items()):
        part, low, high = slice(None if inside else -1, None), min(settings), max(settings)
        means = [{name: e[:, part].mean() for name, e in predictor_errors(study, x).items()}
                 for x in settings.values()]
        shares = {name: [mean[name] / mean["zero"] for mean in means] for name in means[0]}
        draw_errors(axes, list(settings), shares, marker="")
        axes.set(xlabel=xlabel, xlim=(low, high), xscale="log" if high / low > 20 else "linear")
        for left, right in ((low, inside[0]), (inside[1], high)) if inside else ((low, high),):
            axes.axvspan(left, right, color="0.95", zorder=0)
    for axes in panels[:, 0]:
        axes.set_ylabel("MSE / MSE of predicting 0")
    canvas.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
    named = {"share": [], "by distance": [], "by source": []}
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


@claim("layer 0 heads, all but one, attend to the previous vector", "7 of 8 heads", 3, "attention",
       tasks="any")
def claim_l0_prev_token(study: Study) -> Finding:
    """Attention from positions 1 to 13 to the one before, by head. More than half of the attention in all
    heads but at most one; partly in more than half of the heads."""
    score = previous_token_score(study.activations["blocks.0.attn.hook_pattern"])
    heads, n_heads = int((score > 0.5).sum()), len(study.heads)
    how = verdict(heads >= n_heads - 1, heads > n_heads / 2)
    return Finding(score, how, {"heads": score.mean()}, {"heads that do": heads})


@claim("most layer 1 heads attend to the second vector", "most", 4, "attention", 2, tasks="any")
def claim_l1_second_token(study: Study) -> Finding:
    """Attention from positions 3 to 13 to position 1, by head. In more than half of the heads it is the most
    attended position, with at least twice what uniform attention gives; partly in more than a quarter of
    them."""
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    score, favourite = second_token_score(pattern), pattern[:, :, 3:].mean((0, 2)).argmax(-1)
    uniform, n_heads = (1 / torch.arange(4.0, 1 + MAX_LENGTH)).mean(), len(study.heads)
    heads = int(((favourite == 1) & (score >= 2 * uniform)).sum())
    control = {"heads that do": heads, "most attended position": favourite, "uniform attention": uniform}
    return Finding(score, verdict(heads > n_heads / 2, heads > n_heads / 4), {"heads": score.mean()}, control)


@claim("a checkerboard in layer 2 on alternating sequences, not on others", "yes", 5, "share", 3)
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
    control = {"heads that do": both, "c near 1": there["share"],
               "amplitude by distance (similar vectors attend to each other)": here["by distance"],
               "amplitude by source (all rows prefer the same columns)": here["by source"]}
    values = {"c near -1": here["share"].mean(), "c near 1": there["share"].mean()}
    how = verdict(both > n_heads / 2, shows.sum() > n_heads / 2 or both >= 2)
    return Finding(here["share"], how, values, control)


def draw_patterns(patterns: Tensor, title: str, scores: Tensor, what: str):
    """The attention patterns of a layer, [n_heads, dest, src], a panel each, with a score of each."""
    rows = -(-len(patterns) // 4)
    canvas, panels = grid(rows, 4, 10, 0.4 + 2.4 * rows, title, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(patterns) :]:
        axes.axis("off")
    for head, (axes, pattern, score) in enumerate(zip(panels.flat, patterns, scores)):
        image = heat(axes, pattern, f"head {head}: {score:.2f} {what}")
    canvas.supxlabel("source position", fontsize=9)
    canvas.supylabel("destination position", fontsize=9)
    canvas.colorbar(image, ax=panels, label="attention", shrink=0.8)
    return canvas


def draw_mean_patterns(study: Study, layer: int, score: Callable, what: str):
    pattern = study.activations[f"blocks.{layer}.attn.hook_pattern"]
    title = f"Layer {layer} attention patterns, mean over {study.size:,} sequences"
    return draw_patterns(pattern.mean(0), title, score(pattern), what)


def one_pattern(study: Study, layer: int, c: int) -> tuple[Tensor, str]:
    """The attention pattern on the sequence with c nearest to -1 or 1, [1, n_heads, dest, src], and its c."""
    sample, name = study.near(c), f"blocks.{layer}.attn.hook_pattern"
    i = pick(sample, c)
    return study.record(sample.a[i : i + 1, :-1], name)[name], f"c = {sample.c[i]:.2f}"


def draw_layer_2(study: Study, c: int, kind: str):
    pattern, its_c = one_pattern(study, 2, c)
    title = f"Layer 2 attention patterns on one {kind} sequence, {its_c}"
    return draw_patterns(pattern[0], title, alternation(pattern)["share"], "alternates")


@figure(3, "layer 0 attention patterns", tasks="any")
def figure_attention_layer_0(study: Study):
    return draw_mean_patterns(study, 0, previous_token_score, "to the previous")


@figure(4, "layer 1 attention patterns", layers=2, tasks="any")
def figure_attention_layer_1(study: Study):
    return draw_mean_patterns(study, 1, second_token_score, "to the second")


@figure(5, "layer 2 attention patterns, alternating sequence", layers=3)
def figure_attention_layer_2_alternating(study: Study):
    return draw_layer_2(study, -1, "alternating")


@figure(6, "layer 2 attention patterns, non-alternating sequence", layers=3)
def figure_attention_layer_2_other(study: Study):
    return draw_layer_2(study, 1, "non-alternating")


@figure(18, "an attention pattern")
def figure_attention_example(study: Study):
    pattern = one_pattern(study, 0, -1)[0][..., :8, :8]
    head = int(previous_token_score(pattern).argmax())
    canvas, axes = grid(1, 1, 5.4, 4.4, f"An attention pattern: layer 0, head {head}, one sequence")
    title = "each row sums to 1; nothing above the diagonal"
    heat(axes, pattern[0, head], title, None, "source position", "destination position", "attention")
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.3 Direct logit attributions

READINGS = {"paper, next": "(a) the paper's: ln_final on the component alone",
            "standard, next": "(b) standard: the scale of the whole residual stream"}


@once
def attributions(study: Study, hook: str) -> dict[str, Tensor]:
    """Population mean of `direct_attribution` of what is at a hook point of each layer, {reading: [n_layers,
    ..., pos]}: the paper's reading and the standard one, each to the next vector a_{m+1} and to the step
    a_{m+1} - a_m."""
    a, kept = study.population.a, study.activations
    targets, found = {"next": a[:, 1:], "step": a[:, 1:] - a[:, :-1]}, {}
    for name, scale in {"paper": None, "standard": kept[SCALE]}.items():
        for goal, target in targets.items():
            each = (direct_attribution(study.model, kept[f"blocks.{l}.{hook}"], target, scale)
                    for l in study.layers)
            found[f"{name}, {goal}"] = torch.stack([layer.mean(0) for layer in each]).movedim(1, -1)
    return found


@claim("direct attribution: layer 0 > 0, layer 1 near 0, layer 2 < 0", "+, 0, -", 7, "dot product", 3,
       tasks="any")
def claim_dla_sign(study: Study) -> Finding:
    """Mean over positions 2 to 13, ln_final on the head's output alone (the paper's reading), target a_{m+1};
    then the same for a_{m+1} - a_m. Averaged over the heads layer 0 is positive, layer 2 negative and layer 1
    at most a quarter of the largest, for both targets; partly if layer 0 is positive and layer 2 negative for
    both."""
    by_head = {name: value[..., study.task.first :].mean(-1)
               for name, value in attributions(study, "attn.hook_result").items()}
    by_layer = {name: value.mean(1) for name, value in by_head.items()}
    goals = [by_layer["paper, next"], by_layer["paper, step"]]
    signs = all(layers[0] > 0 > layers[2] for layers in goals)
    silent = all(layers[1].abs() <= 0.25 * layers.abs().max() for layers in goals)
    values = {f"layer {l}": goals[0][l] for l in study.layers}
    control = {f"{name}, by layer": layers for name, layers in by_layer.items()}
    return Finding(by_head["paper, next"], verdict(signs and silent, signs), values, control)


@figure(7, "direct logit attribution of the heads", tasks="any")
def figure_head_attribution(study: Study):
    title = "Direct logit attribution of the heads to the next vector"
    canvas, panels = grid(2, 2, 10, 7.5, title, height_ratios=[1, 2.6])
    found, first = attributions(study, "attn.hook_result"), study.task.first
    for (top, bottom), (name, title) in zip(panels.T, READINGS.items()):
        mean, rows = found[name][..., first:].mean(-1), found[name].flatten(0, 1)  # [layer.head, pos]
        title += f"\nmean over positions {first} to {MAX_LENGTH - 1}"
        heat(top, mean, title, mean.abs().max(), "head", "layer", "dot product")
        heat(bottom, rows, "by position", rows.abs().max(), "position", "layer.head", "dot product")
        names = [f"{l}.{h}" for l in study.layers for h in study.heads]
        bottom.set_yticks(range(len(rows)), names, fontsize=7)
        for layer in study.layers[1:]:
            bottom.axhline(len(study.heads) * layer - 0.5, color="black", lw=0.8)
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.4 Zeroth layer OV circuits


def outside_share(x: Tensor, W_E: Tensor) -> Tensor:
    """Share of the norm of x [..., d_model] outside the span of the rows of W_E, in [0, 1]."""
    projection = torch.linalg.pinv(W_E, rtol=1e-5) @ W_E  # also when the rows are dependent
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


@once
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
            "weights alone, without ln1 and position": fit_line(a, a @ full_ov_circuit(model, 0).sum(0)),
            "d_model coordinates": fit_line(resid, resid @ ov.sum(0)),
            "all of layer 0": layer_0_adds(a, study.activations),
            "all of layer 0, vectors of different recurrences":
                layer_0_adds(mixed, study.record(mixed, "blocks.0.hook_resid_post"))}
    return fits | {f"head {h}": fit_large(a, normalised @ ov[h] @ model.unembed.W_U) for h in study.heads}


def ov_finding(study: Study, part: int, compared: str, rule: Callable[[Tensor], str]) -> Finding:
    """Of one number of the fits (0 slope, 2 R^2): its median, beside that of the `compared` reading."""
    medians = {name: fit[part].nanmedian() for name, fit in ov_fits(study).items()}
    values, measured = ov_fits(study)["data vectors"][part], medians["data vectors"]
    control = {"5%, 50%, 95% of the vectors": quantiles(values, 0.05, 0.5, 0.95)} | medians
    return Finding(measured, rule(measured), {name: medians[name] for name in ("data vectors", compared)},
                   control, interval(values, of=torch.nanmedian))


@claim("layer 0 OV is linear on residual stream vectors: R^2", 0.83, 8, "R^2", tasks="any")
def claim_l0_ov_r2(study: Study) -> Finding:
    """Median over vectors of norm at least 1 of the R^2 of (a_d, (ln1(x) OV W_U)_d), OV summed over heads.
    Nearly linear: at least the paper's value less 0.1; partly if at least 0.5."""
    return ov_finding(study, 2, "d_model coordinates", lambda r2: verdict(r2 >= 0.73, r2 >= 0.5))


@claim("its slope", [2.1, 2.5], 8, "slope", tasks="any")
def claim_l0_ov_slope(study: Study) -> Finding:
    """Median slope over the same vectors. Within 2.1 to 2.5; partly within a factor of two of that."""
    return ov_finding(study, 0, "all of layer 0",
                      lambda slope: verdict(2.1 <= slope <= 2.5, 1.05 <= slope <= 5))


@claim("its intercept", "near 0", 8, "intercept / root mean square", tasks="any")
def claim_l0_ov_intercept(study: Study) -> Finding:
    """Intercepts over the same vectors, relative to the root mean square of (ln1(x) OV W_U)_d. At most a
    tenth in 95% of the vectors; partly if so on average. (In d_model coordinates it is 0 by construction on a
    folded model.)"""
    intercept = ov_fits(study)["data vectors"][1]
    written = read_and_written(study, study.activations["blocks.0.hook_resid_pre"])[1][~intercept.isnan()]
    intercept = intercept / written.pow(2).mean().sqrt()
    measured, (widest,) = intercept.nanmedian(), quantiles(intercept.abs(), 0.95)
    how = verdict(widest <= 0.1, intercept.abs().nanmean() <= 0.1)
    values, ci = {"median": measured, "95% within": widest}, interval(intercept, of=torch.nanmedian)
    return Finding(measured, how, values, interval=ci)


@claim("the same R^2 on random vectors, lower", 0.598, 10, "R^2", tasks="any")
def claim_l0_ov_r2_random(study: Study) -> Finding:
    """Median R^2 of (x W_E^+, ln1(x) OV W_U) over Gaussian vectors x in R^d_model. Lower than that of
    residual stream vectors by at least 0.1, and still at least 0.25, a visible correlation; partly if only
    one of the two."""
    r2, resid = (ov_fits(study)[name][2] for name in ("random vectors", "data vectors"))
    measured, resid = r2.median(), resid.nanmedian()
    lower, visible = resid - measured >= 0.1, measured >= 0.25
    values, ci = {"random vectors": measured, "residual stream": resid}, interval(r2, of=torch.median)
    return Finding(measured, verdict(lower and visible, lower or visible), values, interval=ci)


@claim("share of the norm of layer 0's OV x outside the span of W_E", 0.8415, 9, "share of the norm",
       tasks="any")
def claim_l0_orthogonal(study: Study) -> Finding:
    """Mean over residual stream vectors, OV summed over heads. Within 0.05 of 0.8415, and above what a random
    direction has, since a share below that would say that the circuit prefers the embedding space; partly if
    only the number agrees."""
    W_E, resid = study.model.embed.W_E, study.activations["blocks.0.hook_resid_pre"]
    ov, x = ov_circuit(study.model, 0).sum(0), random_vectors(study)
    x = x - x.mean(-1, keepdim=True)  # as all that a folded model writes
    share, chance = outside_share(resid @ ov, W_E), outside_share(x, W_E).mean()
    measured = share.mean()
    near = abs(measured - 0.8415) <= 0.05
    values = {"OV x": measured, "random direction": chance}
    control = {"OV of random vectors": outside_share(x @ ov, W_E).mean()}
    return Finding(measured, verdict(near and measured > chance, near), values, control, interval(share))


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


@figure(8, "OV of layer 0 on residual stream vectors", tasks="any")
def figure_ov_layer_0_resid(study: Study):
    """One vector in two readings, and below the lines of all vectors in the first of them, see `ov_fits`."""
    position = MAX_LENGTH - 1
    batch = int(study.population.a[:, position].norm(dim=-1).argmax())  # the longest vector: a clear example
    resid = study.activations["blocks.0.hook_resid_pre"][batch, position]
    canvas, panels = grid(2, 2, 9, 6.6, "OV of layer 0 on residual stream vectors, heads summed")
    scatter_fit(panels[0, 0], study.population.a[batch, position], read_and_written(study, resid)[1],
                "one vector, between data vectors", "$a_d$", "$(\\ln_1(x)\\;OV\\;W_U)_d$")
    scatter_fit(panels[0, 1], resid, resid @ ov_circuit(study.model, 0).sum(0),
                f"without $\\ln_1$, in the {len(resid)} coordinates that the paper names", "$x_d$",
                "$(OV\\,x)_d$")
    slope, _, r2 = (part[~part.isnan()] for part in ov_fits(study)["data vectors"])
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


@figure(9, "sum of the OV circuits of layer 0", tasks="any")
def figure_ov_layer_0_sum(study: Study):
    canvas, panels = grid(1, 2, 10, 4.6, "Sum of the OV circuits over all heads of layer 0")
    shown = (("$W_V W_O$, as in the paper", "residual stream", ov_circuit),
             ("$W_E W_V W_O W_U$, between data vectors", "data", full_ov_circuit))
    for axes, (title, name, circuit) in zip(panels, shown):
        matrix = circuit(study.model, 0).sum(0)
        heat(axes, matrix, f"{title}: cosine with I {identity_cosine(matrix):.2f}", matrix.abs().max(),
             f"written {name} dimension", f"read {name} dimension", "weight")
    return canvas


@figure(10, "OV of layer 0 on a random vector", tasks="any")
def figure_ov_layer_0_random(study: Study):
    canvas, panels = grid(1, 2, 10, 3.8, "OV of layer 0 (heads summed) on a random vector")
    scatter_fit(panels[0], *read_and_written(study, random_vectors(study)[0, 0]),
                "one Gaussian vector, between data coordinates", "$(x\\,W_E^+)_d$",
                "$(\\ln_1(x)\\;OV\\;W_U)_d$")
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


@once
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


@claim("MSE with all layer 1 heads mean-ablated, from 1e-4", 2e-4, 4, "MSE / unchanged", 2, tasks="any")
def claim_l1_mean_ablation(study: Study) -> Finding:
    """Means at each position over the population, MSE on other sequences. All heads of layer 1 at once
    multiply it by at most 4 (the paper's factor is 2); partly if only in one of the two other readings, every
    head by itself, or all at once with ln_final's scale held at its clean value."""
    errors, found = ablations(study)["layer 1 heads"]["mean"], factors(study)
    together, held = (found["layer 1 heads"][kind] for kind in ("mean", "mean, clean scale"))
    worst = max(found[f"head 1.{h}"]["mean"] for h in study.heads)
    values = {"all heads": together, "clean scale": held, "worst single head": worst}
    values |= {f"layer {l}": found[f"layer {l} heads"]["mean"] for l in study.layers if l != 1}
    control = {"unchanged": study.baseline.mean(), "all heads, difference": interval(errors - study.baseline)}
    control |= {f"factors, {part}": kinds for part, kinds in found.items() if part.startswith("layer")}
    for kind in ("mean", "zero"):
        by_head = [[found[f"head {l}.{h}"][kind] for h in study.heads] for l in study.layers]
        control[f"factors, each head, {kind}"] = by_head
    return Finding(errors.mean(), verdict(together <= 4, held <= 4 or worst <= 4), values, control,
                   interval(errors))


@claim("OV of layer 1 head 0 has low effective rank", "low", 11, "effective rank", 2, tasks="any")
def claim_l1_ov_effective_rank(study: Study) -> Finding:
    """Participation ratio of the singular values. At most half of what an untrained head has; partly if at
    least a tenth less than that and less than the mean of the last layer."""
    ranks = torch.stack([effective_rank(ov_circuit(study.model, l)) for l in study.layers])
    untrained = effective_rank(ov_circuit(study.untrained.model, 1)).mean()
    measured = ranks[1, 0]
    how = verdict(measured <= 0.5 * untrained, measured <= 0.9 * untrained and measured < ranks[-1].mean())
    values = {"head 0": measured, "layer 1": ranks[1].mean(), "last layer": ranks[-1].mean()}
    return Finding(measured, how, values, {"all heads": ranks})


def draw_circuit(circuits: Tensor, title: str, xlabel="written residual stream dimension",
                 ylabel="read residual stream dimension"):
    """The circuits of a layer, [n_heads, d_model, d_model]: head 0 large, the others beside it."""
    canvas, width = plt.figure(figsize=(11, 4.6), layout="constrained"), len(circuits) // 2
    canvas.suptitle(title)
    others = [str(head) for head in range(1, len(circuits))] + ["."] * 2
    panels = canvas.subplot_mosaic([["0", "0", *others[:width]], ["0", "0", *others[width : 2 * width]]])
    limit = circuits.abs().flatten().double().quantile(0.9995).item()
    for name, axes in panels.items():
        about = "cosine with I " if name == "0" else ""
        title = f"head {name}: {about}{identity_cosine(circuits[int(name)]):.2f}"
        image = heat(axes, circuits[int(name)], title, limit)
        axes.set_aspect("equal")
        if name != "0":
            axes.set(xticks=[], yticks=[])
    panels["0"].set(xlabel=xlabel, ylabel=ylabel)
    label = "weight (ends of the scale: 99.95th percentile)"
    canvas.colorbar(image, ax=list(panels.values()), label=label, shrink=0.8)
    return canvas


@figure(11, "OV of layer 1 head 0", layers=2, tasks="any")
def figure_ov_layer_1(study: Study):
    ov = ov_circuit(study.model, 1)
    title = f"OV circuits of layer 1; head 0 has effective rank {effective_rank(ov[0]):.1f}"
    return draw_circuit(ov, f"{title} of {study.model.config.d_head}")


# ------------------------------------------------------------------------------------------------------------
# 4.6 Second layer QK/OV circuits


def identity_finding(study: Study, circuit: Callable, sign: int) -> Finding:
    cosines = [identity_cosine(circuit(study.model, l)) for l in study.layers]
    heads, n_heads = int((sign * cosines[2] >= 0.25).sum()), len(study.heads)
    values = {f"layer {l}": cosines[l].mean() for l in (2, 1, 0)}
    how = verdict(heads == n_heads, heads > n_heads / 2)
    return Finding(cosines[2], how, values, {"heads that do": heads})


@claim("OV is like -I in every layer 2 head", "yes", 12, "cosine with I", 3, tasks="any")
def claim_l2_ov_identity(study: Study) -> Finding:
    """Cosine between W_V W_O and I. At most -0.25 in every head, which is where the diagonal of a 128 x 128
    matrix stands three standard deviations out from the other entries, a stripe; partly in more than half of
    them."""
    return identity_finding(study, ov_circuit, -1)


@claim("QK is like +I in every layer 2 head", "yes", 13, "cosine with I", 3, tasks="any")
def claim_l2_qk_identity(study: Study) -> Finding:
    """Cosine between W_Q W_K^T and I. At least 0.25 in every head, where the diagonal is a stripe; partly in
    more than half of them."""
    return identity_finding(study, qk_circuit, +1)


@figure(12, "OV of layer 2 head 0", layers=3, tasks="any")
def figure_ov_layer_2(study: Study):
    return draw_circuit(ov_circuit(study.model, 2), "OV circuits of layer 2")


@figure(13, "QK of layer 2 head 0", layers=3, tasks="any")
def figure_qk_layer_2(study: Study):
    return draw_circuit(qk_circuit(study.model, 2), "QK circuits of layer 2",
                        "source residual stream dimension", "destination residual stream dimension")


def lens(study: Study, hook: str) -> Tensor:
    """Residual stream at a hook point, unembedded with ln_final, as if it were the last (logit lens)."""
    return study.model.run_from(len(study.layers), study.activations[hook])


@claim("the residual stream after layer 0, unembedded, is a fair estimate", "Figure 14", 14,
       "explained share")
def claim_lens_after_l0(study: Study) -> Finding:
    """Unembedded as the model does it, with ln_final. 1 - MSE / MSE of predicting 0, positions 2 to 13. Fair:
    at least nine tenths of what the best fixed linear predictor from a_n and a_{n-1} explains; partly if,
    multiplied by the best constant, it explains at least half: the right shape in the wrong size."""
    target, after = study.population.a[:, 1:], lens(study, "blocks.0.hook_resid_post")
    nothing, left = (squared_errors(x, target) for x in (torch.zeros_like(target), after))
    coefficients, linear = regress(*neighbours(study.population.a))
    (factor,), rescaled = regress(target[:, FIRST_POSITION:], after[:, FIRST_POSITION:])
    explained = lambda left, nothing: 1 - ratio(left, nothing)
    measured, ci = explained(left, nothing), interval(left, nothing, of=explained)
    values = {"as it is": measured, "rescaled": rescaled, "best linear": linear}
    control = {"coefficients of the best linear predictor": coefficients, "the best constant": factor,
               "the model": explained(squared_errors(study.activations["output"], target), nothing)}
    return Finding(measured, verdict(measured >= 0.9 * linear, rescaled >= 0.5), values, control, ci)


@figure(14, "residual stream after layer 0 against the true output")
def figure_lens_after_layer_0(study: Study):
    title = "Residual stream after layer 0, unembedded, against the true next vector"
    canvas, panels = grid(2, 3, 10.5, 5.4, title, sharex=True)
    truth, last, before = neighbours(study.population.a)
    beta, alpha = best_linear(study, 2)
    best = f"{beta:.2f} $a_n$ + {alpha:.2f} $a_{{n-1}}$, the best\nfixed linear predictor"
    after, output = lens(study, "blocks.0.hook_resid_post"), study.activations["output"]
    lines = {"true next vector": (truth, {"color": TRUTH, "marker": "o", "ms": 4}),
             "after layer 0": (after[:, FIRST_POSITION:], {"color": LENS, "marker": "."}),
             "model's output": (output[:, FIRST_POSITION:], {"color": MODEL, "ls": "--", "marker": "."}),
             best: (beta * last + alpha * before, {"color": "0.6", "lw": 1})}
    for column, c in enumerate((-1.0, 0.6, 1.2)):
        i = pick(study.population, c)
        for dimension, axes in enumerate(panels[:, column]):
            curves(axes, range(FIRST_POSITION, MAX_LENGTH),
                   {label: (y[i, :, dimension], look) for label, (y, look) in lines.items()})
            axes.axhline(0, color="0.9", zorder=0)
            axes.set_title(f"c = {study.population.c[i]:.2f}, dimension {dimension}")
        panels[1, column].set_xlabel("position")
    canvas.supylabel("component", fontsize=9)
    canvas.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return canvas


def ov_eigenvalue_scores(model: Transformer) -> list[Tensor]:
    """Eigenvalue scores, [n_layers, n_heads], of W_V W_O, from the d_head x d_head product W_O W_V, and of
    the full circuit W_E W_V W_O W_U."""
    layers = enumerate(model.blocks)
    scores = [(eigenvalue_score(block.attn.W_O @ block.attn.W_V), eigenvalue_score(full_ov_circuit(model, l)))
              for l, block in layers]
    return [torch.stack(each) for each in zip(*scores)]


@claim("OV eigenvalue scores: layer 2 copies negatively", "layer 2 negative", 15, "score", 3, tasks="any")
def claim_eigenvalue_score(study: Study) -> Finding:
    """sum(lambda) / sum(|lambda|) of W_V W_O, by layer and head. At most -0.5 in every head of layer 2;
    partly if the mean of layer 2 is negative and more than half of its heads are."""
    scores, full = ov_eigenvalue_scores(study.model)
    most = scores[2].mean() < 0 and (scores[2] < 0).sum() > len(study.heads) / 2
    values = {f"layer {l}": scores[l].mean() for l in study.layers}
    control = {"full circuit, through W_E and W_U": full}
    return Finding(scores, verdict((scores[2] <= -0.5).all(), most), values, control)


@figure(15, "OV eigenvalue scores", tasks="any")
def figure_eigenvalue_scores(study: Study):
    canvas, panels = grid(1, 2, 10, 2.8, "Eigenvalue scores of the OV circuits")
    titles = "$W_V W_O$, as in the paper", "$W_E W_V W_O W_U$, the full circuit"
    for axes, title, scores in zip(panels, titles, ov_eigenvalue_scores(study.model)):
        image = heat(axes, scores, title, 1.0, "head", "layer")
    canvas.colorbar(image, ax=panels, label="score: 1 copies, -1 negates")
    return canvas


@claim("MSE with QK of layer 2 heads 0-4 a random pseudoinverse", 1e-4, 13, "MSE / unchanged", 3, tasks="any")
def claim_l2_qk_pinv(study: Study) -> Finding:
    """W_Q random and W_K^T its pseudoinverse, b_Q and b_K 0, mean over random W_Q. At most 1.5 times the
    unchanged MSE (the paper's 1e-4 stays 1e-4), and attention that knows nothing, uniform or of random W_Q
    and W_K of the trained norm, both do more harm (the interval of the difference is above 0), without which
    the first would say nothing about QK; partly if only one of the two holds."""
    model, heads = study.model, list(study.heads)[:5]

    def replaced(change: Callable, purpose: str) -> Tensor:  # mean over random matrices, [size]
        generator = study.generator(purpose)
        draws = (study.errors(2, model=change(model, 2, heads, generator)) for _ in range(QK_DRAWS))
        return torch.stack(list(draws)).mean(0)

    mean = interventions.mean_outputs(study.activations)
    arms = {"pseudoinverse": replaced(interventions.pseudoinverse_qk, f"pinv {heads}"),
            "uniform": study.errors(2, model=interventions.replace_qk(model, 2, heads, 0.0, 0.0)),
            "random": replaced(interventions.random_qk, "random qk"),
            "mean ablation": study.errors(2, interventions.replace_outputs(mean, [(2, h) for h in heads]))}
    gaps = {name: interval(arms[name] - arms["pseudoinverse"]) for name in ("uniform", "random")}
    values = {name: study.factor(errors) for name, errors in arms.items()}
    control = {f"{name}, difference": interval(errors - study.baseline) for name, errors in arms.items()}
    control |= {f"{name} less pseudoinverse": gap for name, gap in gaps.items()}
    unchanged, telling = values["pseudoinverse"] <= 1.5, all(low > 0 for low, _ in gaps.values())
    how = verdict(unchanged and telling, unchanged or telling)
    return Finding(arms["pseudoinverse"].mean(), how, values, control, interval(arms["pseudoinverse"]))


# ------------------------------------------------------------------------------------------------------------
# 4.7 Analysis of MLPs


@claim("the MLPs push in the right direction mainly at the last positions", "Figure 16", 16, "dot product",
       tasks="any")
def claim_mlp_dla(study: Study) -> Finding:
    """[layer][position], ln_final on the MLP's output alone, target a_{m+1}. Summed over layers positive at
    positions 11, 12 and 13 and there on average more than twice as large as at positions 2 to 10; partly if
    positive and larger."""
    found, first = attributions(study, "hook_mlp_out"), study.task.first
    total, length = found["paper, next"].sum(0), study.population.a[:, 1:].norm(dim=-1).mean(0)
    late, early = total[-3:].mean(), total[first:-3].mean()
    values = {"positions 11-13": late, f"positions {first}-10": early}
    control = {"standard reading, by layer": found["standard, next"][:, first:].mean(1),
               "length of the targets, late / early": length[-3:].mean() / length[first:-3].mean()}
    how = verdict(total[-3:].min() > 0 and late > 2 * early, late > 0 and late > early)
    return Finding(found["paper, next"], how, values, control)


@figure(16, "direct logit attribution of the MLPs", tasks="any")
def figure_mlp_attribution(study: Study):
    title = "Direct logit attribution of the MLPs to the next vector, by position"
    canvas, panels = grid(1, 2, 10, 3.8, title)
    mlps, heads = attributions(study, "hook_mlp_out"), attributions(study, "attn.hook_result")
    for axes, (name, title) in zip(panels, READINGS.items()):
        for layer, values in enumerate(mlps[name]):
            axes.plot(values, marker="o", ms=4, color=LAYER_COLORS[layer % 3], label=f"MLP of layer {layer}")
        if name == "standard, next":
            axes.plot(heads[name].sum((0, 1)), color="0.6", ls="--", label="all heads together")
        axes.axhline(0, color="0.8", zorder=0)
        axes.axvspan(-0.5, study.task.first - 0.5, color="0.95", zorder=0)
        axes.set(title=title, xlabel="position (grey: the next vector cannot be known yet)",
                 ylabel="dot product", xlim=(-0.5, MAX_LENGTH - 0.5))
        axes.legend()
    return canvas


# ------------------------------------------------------------------------------------------------------------
# 4.8 Conjectures on model functionality


@claim("the residual stream after layer 0 is about a_n + alpha a_{n-1}", 2.3, 17, "coefficient")
def claim_alpha(study: Study) -> Finding:
    """Least squares of the residual stream after layer 0, unembedded with ln_final, on a_n + alpha a_{n-1},
    positions 2 to 13. alpha within 2.1 to 2.5 and R^2 at least 0.5, and with both coefficients free that of
    a_n between 0.5 and 1.5, so that it really is a_n plus something; partly if with both free that of a_{n-1}
    is positive and R^2 at least 0.5."""
    truth, a_n, before = neighbours(study.population.a)

    def fits(y: Tensor) -> dict:
        (beta, alpha), r2 = regress(y, a_n, before)
        (held,), _ = regress(y - a_n, before)
        held_r2 = 1 - ((y - a_n - held * before) ** 2).sum() / (y**2).sum()
        return {"a_n": beta, "a_n-1": alpha, "R2": r2, "alpha, a_n at 1": held, "R2, a_n at 1": held_r2}

    y, middle = (lens(study, f"blocks.0.hook_resid_{when}")[:, FIRST_POSITION:] for when in ("post", "mid"))
    after = fits(y)
    measured, r2 = after["alpha, a_n at 1"], after["R2, a_n at 1"]
    how = verdict(2.1 <= measured <= 2.5 and r2 >= 0.5 and 0.5 <= after["a_n"] <= 1.5,
                  after["a_n-1"] > 0 and after["R2"] >= 0.5)
    values = {"alpha": measured, "free: a_n": after["a_n"], "free: a_n-1": after["a_n-1"]}
    control = {"after layer 0": after, "after layer 0's attention": fits(middle),
               "the true next vector: the best fixed linear predictor": fits(truth)}
    ci = interval(((y - a_n) * before).sum((1, 2)), (before**2).sum((1, 2)), of=ratio)
    return Finding(measured, how, values, control, ci)


@figure(17, "before and after layer 0, a_n + 2.3 a_{n-1}, and the truth")
def figure_estimate(study: Study):
    """The paper's axis shows positions of one sequence in one dimension."""
    i, n = pick(study.population, -0.9), range(1, MAX_LENGTH)
    a = study.population.a[i, :, 0]
    title = f"What layer 0 does to one alternating sequence: c = {study.population.c[i]:.2f}, dimension 0"
    canvas, axes = grid(1, 1, 8, 4, title)
    before, after = (lens(study, f"blocks.0.hook_resid_{when}")[i, 1:, 0] for when in ("pre", "post"))
    curves(axes, n, {"before layer 0, unembedded": (before, {"color": "goldenrod", "marker": "."}),
                     "after layer 0, unembedded": (after, {"color": "purple", "marker": "."}),
                     "$a_n + 2.3\\,a_{n-1}$ (the paper's $\\alpha$)":
                         (a[1:-1] + 2.3 * a[:-2], {"color": OTHER, "marker": "."}),
                     "$a_{n+1}$, the truth": (a[2:], {"color": TRUTH, "marker": "."})})
    axes.axhline(0, color="0.9", zorder=0)
    axes.set(xlabel="position n", ylabel="component")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


# ------------------------------------------------------------------------------------------------------------
# What the model computes (ours): weights of the sources, see `interventions.source_weights`

SIZES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.1, 1.2, 1.35, 1.5, 1.65, 1.8, 2.0)  # |c| at which weights are read
CS = sorted([*SIZES, *(-size for size in SIZES)])
TAKEN_AT = (1.2, 1.5, 1.8)  # and at which each component's are
KINDS = ("recurrence", "interleaved", "two fixed points", "two growths")  # of `data.interleaved`


class Weights(NamedTuple):
    """Source weights of some sequences with one c."""

    sample: data.Sample  # in float64
    w: Tensor  # [batch, dest, src]
    spread: float  # standard deviation of the first one's over directions, relative: 0 if equivariant
    explained: float  # share of the squared output that sum_s w_s a_s explains, from the first position on


@once
def read_weights(study: Study, c: float | None = None, length: int = MAX_LENGTH,
                 count: int = 0) -> Weights:
    """Source weights of `count` sequences, 0 for PER_C (fewer in a small study), at one c, or drawn as in
    training; c and -c get the same a_0 and d, but for their normalisation."""
    generator = study.generator(f"weights {abs(c or 0)}")
    count = max(1, (count or PER_C) * study.size // POPULATION)
    c_range = (-2.0, 2.0) if c is None else (c, c)
    sample = study.sample(count, length, generator, c_range, torch.float64)
    x, first, twice = sample.a[:, :-1], study.task.first, [*range(count), 0]  # the first in two directions
    *w, again = source_weights(study.exact, x[twice], off_plane(x[twice], generator))
    spread = ((w[0] - again).pow(2).mean() / (w[0].pow(2) + again.pow(2)).mean()).sqrt()
    w, output = torch.stack(w), study.exact(x)[:, first:]
    left = output - (w @ x)[:, first:]
    return Weights(sample, w, spread.item(), 1 - ratio(left.pow(2), output.pow(2)).item())


def weights_by_c(study: Study) -> tuple[Tensor, Tensor, Tensor]:
    """For every c in CS the source weights, [sequence, c, dest, src], and the share of the output that they
    explain, [c]; and their mean spread."""
    found = [read_weights(study, c) for c in CS]
    explained, spread = torch.tensor([(each.explained, each.spread) for each in found]).T
    return torch.stack([each.w for each in found], 1), explained, spread.mean()


@claim("the output is sum_s w_s a_s, with weights read off the model", None, 22, "explained share")
def claim_source_weights(study: Study) -> Finding:
    """1 - |output - sum_s w_s a_s|^2 / |output|^2 over positions 2 to 13, by |c|, mean over both signs. At
    least 0.95 at every |c| up to 1.5; partly at least 0.8."""
    _, explained, spread = weights_by_c(study)
    explained = (explained + explained.flip(0))[len(SIZES) :] / 2
    usual = explained[torch.tensor(SIZES) <= 1.5]
    values = {"mean, |c| up to 1.5": usual.mean(), "lowest": usual.min()}
    control = {"|c|": SIZES, "how far w differs between directions v, relative": spread}
    return Finding(explained, verdict(usual.min() >= 0.95, usual.min() >= 0.8), values, control)


def strong_strides(study: Study) -> tuple[Tensor, Tensor, Tensor]:
    """Where |c| is 0.9 to 2: A / c^2, B / c and the sum of all weights, [sequence, c, dest] each."""
    c = torch.tensor(CS, dtype=torch.double)
    w = weights_by_c(study)[0][:, c.abs() >= 0.9]
    return *strides(w, c[c.abs() >= 0.9]), w.sum(-1)


@claim("two steps at once: A is c^2 and B is 0 for |c| from 0.9 to 2", None, 22,
       "share of a_{n+1} - a*, or weight")
def claim_two_steps(study: Study) -> Finding:
    """A / c^2 and B / c (see `strides`), mean over |c| from 0.9 to 2, both signs and positions 5 to 13. A /
    c^2 differs from 1 on average, in absolute value, by at most 0.15 and B / c from 0 too; partly if at most
    0.3 each. A one-step rule has 0 and 1."""
    each = strong_strides(study)
    A, B, total = (part.mean(0) for part in each)  # [c, dest]
    off_A, off_B = (A[:, 5:] - 1).abs().mean(), B[:, 5:].abs().mean()
    values, worst = {"A / c^2": A[:, 5:].mean(), "B / c": B[:, 5:].mean()}, max(off_A, off_B)
    values |= {f"w_8 at n = 9, c = {c}": read_weights(study, c).w[:, 9, 8].mean() for c in (1.5, 0.5)}
    control = {"mean |A / c^2 - 1|": off_A, "mean |B / c|": off_B,
               "A / c^2, position 2 to 13": A[:, 2:].mean(0), "B / c, position 2 to 13": B[:, 2:].mean(0),
               "sum of all weights": total[:, 5:].mean()}
    for inputs in (4, MAX_LENGTH):
        early = [strides(read_weights(study, c, inputs).w, c)[0][:, 3].mean() for c in (1.5, -1.5)]
        control[f"A / c^2 at position 3 of {inputs} inputs, c = 1.5 and -1.5"] = early
    how = verdict(worst <= 0.15, worst <= 0.3)
    both_signs = (each[0] + each[0].flip(1))[:, : len(each[0][0]) // 2, 5:] / 2
    ci = interval(both_signs.flatten(0, 1))  # over sequences and |c|: those of c and -c are alike
    return Finding(values["A / c^2"], how, values, control, ci)


@claim("the weights for c and -c are the same: the model uses |c|, not c", None, 22, "ratio")
def claim_blind_to_sign(study: Study) -> Finding:
    """Half the difference of the mean weights w(c) and w(-c), against how far their mean differs from its
    mean over |c|, both as root mean squares over |c|, positions 3 to 13 and sources, where the weights
    explain the output (`source_weights` at least partly). At most a quarter; partly at most a half. A
    one-step rule, w_n = 1 + c and w_{n-1} = -c, has no part that is even but the constant."""
    w = weights_by_c(study)[0].mean(0)[:, 3:]  # [c, dest, src]
    w = [each[len(SIZES) :] for each in (w, w.flip(0))]  # of c and of -c, by |c|

    def by_c(plus: Tensor, minus: Tensor) -> Tensor:  # [|c|, dest, src] -> [|c|]
        even, odd = (plus + minus) / 2, (plus - minus) / 2
        return odd.pow(2).mean((1, 2)).sqrt() / (even - even.mean(0)).pow(2).mean().sqrt()

    whole = lambda *w: by_c(*w).pow(2).mean().sqrt()
    measured, explains = whole(*w), claim_source_weights(study).verdict != "not reproduced"
    how = verdict(measured <= 0.25 and explains, measured <= 0.5 and explains)
    control = {"|c|": SIZES, "by |c|": by_c(*w)}
    return Finding(measured, how, {"ratio": measured}, control, interval(*w, of=whole))  # over |c|


@figure(22, "the weight of each source against c (ours)")
def figure_source_weights(study: Study):
    title = "What the model computes: the prediction at n is $\\Sigma_s\\,w_s\\,a_s$"
    canvas, panels = grid(1, 2, 10.5, 4.6, title, sharey=True)
    squares = torch.tensor(CS) ** 2
    for axes, n in zip(panels, (6, 10)):
        w = weights_by_c(study)[0].mean(0)[:, n, : n + 1]  # [c, src]
        axes.plot(CS, squares, color="black", ls="--", lw=1, label="two-step rule: $c^2$ on $a_{n-1}$")
        axes.plot(CS, 1 - squares, color="black", ls=":", lw=1, label="and $1 - c^2$ on the rest together")
        axes.plot(CS, w[:, n - 1], color=MODEL, marker=".", lw=2, label="$a_{n-1}$")
        axes.plot(CS, w.sum(1) - w[:, n - 1], color=LENS, marker=".", lw=2, label="all others together")
        axes.plot(CS, w[:, n], color=TRUTH, marker=".", label="$a_n$")
        for s in range(n - 1):
            label = {0: "$a_0$", n - 2: "$a_{n-2}$"}.get(s)
            axes.plot(CS, w[:, s], color=plt.get_cmap("viridis")(s / (n - 1)), lw=0.8, label=label)
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=f"position n = {n}", xlabel="c")
    panels[0].set_ylabel("weight $w_s$")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return canvas


@figure(27, "how large the weight of each source is (ours)", tasks="rotating")
def figure_weight_sizes(study: Study):
    weights = read_weights(study, None, MAX_LENGTH, WHOLE // 5)
    title = f"which explain {weights.explained:.1%} of the output"
    canvas, panels = grid(1, 2, 10, 4.2, f"Source weights of {study.task_name} sequences, {title}")
    size, mean = weights.w.pow(2).mean(0).sqrt(), weights.w.mean(0)
    limit = size[study.task.first :].max().item()  # the rows above it are of vectors that cannot be known yet
    for axes, matrix, name in zip(panels, (size, mean), ("root mean square", "mean")):
        title = f"{name} over {len(weights.w)} sequences"
        heat(axes, matrix, title, limit, "source s", "position n", "weight $w_s$")
    return canvas


@once
def component_weights(study: Study, c: float) -> tuple[dict[str, Tensor], Tensor]:
    """Source weights of everything that adds to the residual stream, at one c, through the clean final scale:
    {component: [sequence, dest, src]}, and those of the output, to which they add up but for what moving a
    source does to the scale (to first order nothing, in a model that is equivariant)."""
    model, whole, kept = study.exact, read_weights(study, c), {}
    x = whole.sample.a[:2, :-1]
    model(x, hooks=interventions.record([SCALE], kept))
    hooks, names = ["hook_embed"], ["embedding"]
    for l in study.layers:
        hooks += [f"blocks.{l}.attn.hook_result", f"blocks.{l}.hook_mlp_out"]
        names += [*(f"head {l}.{h}" for h in study.heads), f"MLP {l}"]

    def contributions(x: Tensor) -> Tensor:  # [batch, pos, d_vocab] -> [batch, pos, component, d_vocab]
        written: dict[str, Tensor] = {}
        model(x, hooks=interventions.record(hooks, written))
        parts = [value if value.dim() == 4 else value[:, :, None] for value in written.values()]
        return torch.cat(parts, 2) / kept[SCALE][:, :, None] @ model.unembed.W_U

    v = off_plane(x, study.generator(f"components {c}"))
    return dict(zip(names, source_weights(contributions, x, v).unbind(-1))), whole.w[:2]


@once
def factors_by_component(study: Study) -> dict[str, Tensor]:
    """What the heads of each layer, and everything else, do to a* and to the growing part of a sequence,
    {component: [2, |c| in TAKEN_AT]}, mean over both signs and positions 5 to 13: factors on a*, the sum of
    the component's weights, and shares of the growing part, A / c^2 + B / c of them alone."""
    groups = {f"heads of layer {l}": f"head {l}." for l in study.layers} | {"MLPs and embedding": ("M", "e")}
    found = torch.zeros(len(groups), 2, len(TAKEN_AT), dtype=torch.double)
    for i, c in enumerate(sign * size for size in TAKEN_AT for sign in (1, -1)):
        weights = component_weights(study, c)[0]
        for group, start in zip(found, groups.values()):
            w = sum(part for name, part in weights.items() if name.startswith(start))
            for of, change in zip(group, (w.sum(-1), sum(strides(w, c)))):
                of[i // 2] += change[:, 5:].mean() / 2
    return dict(zip(groups, found.unbind()))


@claim("layer 2's heads take off what is too much of the fixed point", None, 23, "factor on a*", 3)
def claim_subtraction(study: Study) -> Finding:
    """The sum of all weights is the factor on a*, and must be 1; the two-step rule has c^2 from a_{n-1} and
    needs 1 - c^2 from other sources. Mean over positions 5 to 13 and both signs, |c| = 1.2, 1.5, 1.8. At each
    |c| layer 2's heads have a negative sum between half and twice 1 - c^2, and remove at least half of the
    excess over 1 that the rest leaves; partly if only the second. Beside it what they take off the growing
    part, (A / c^2 + B / c) of their weights alone: 0 if they take off the fixed point only."""
    found = factors_by_component(study)
    heads, total = found["heads of layer 2"][0], sum(fixed for fixed, _ in found.values())
    rest, needed = total - heads, 1 - torch.tensor(TAKEN_AT).double() ** 2
    removes = (heads < 0).all() and ((rest + heads - 1).abs() <= 0.5 * (rest - 1).abs()).all()
    right_size = ((heads / needed >= 0.5) & (heads / needed <= 2)).all()
    control = {"needed, 1 - c^2": needed, "everything: should be 1": total}
    for name, (fixed, growing) in found.items():
        control |= {f"{name}: factor on a*": fixed, f"{name}: share of the growing part": growing}
    values = {f"|c| = {size}": value for size, value in zip(TAKEN_AT, heads)}
    return Finding(heads, verdict(removes and right_size, removes), values, control)


@figure(23, "which component brings which vector (ours)")
def figure_component_weights(study: Study):
    n, title = 6, "Weight of each source by component, at position 6; the rows add up to the first"
    canvas, panels = grid(1, 4, 11, 1 + 0.18 * len(study.layers) * (len(study.heads) + 1), title, sharey=True)
    for axes, c in zip(panels, (-1.5, 1.5, -0.6, 0.6)):
        weights, whole = component_weights(study, c)
        rows = {"total": whole} | weights
        shown = torch.stack([w.mean(0)[n, : n + 1] for w in rows.values()])
        image = heat(axes, shown, f"c = {c}", 2.0, "source s", digits=1)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        for y, name in enumerate(rows):
            if not name.startswith("head"):
                axes.axhline(y + 0.5, color="black", lw=0.6)
    canvas.colorbar(image, ax=panels, label="weight $w_s$")
    return canvas


# What the model computes (ours): layer 1 as a gain control


@claim("layer 1's heads are a gain control, by way of ln_final's scale", None, 24, "share of the damage", 3)
def claim_gain_control(study: Study) -> Finding:
    """Mean-ablation raises the MSE: the damage. "Goes" is the share of it that goes away when ln_final is
    given its clean scale, one number a position; "comes back" the share that the scale of the ablated model
    alone does to an unchanged one. For layer 1's heads goes at least 0.8 and comes back at least 0.5, and for
    those of layers 0 and 2 both are below 0.5; partly if so for layer 1 only."""
    shares = {}  # {part: (goes, comes back)}
    for part, arms in factors(study).items():
        damage, held, alone = (arms[kind] - 1 for kind in ("mean", "mean, clean scale", "scale alone"))
        shares[part] = (1 - held / damage, alone / damage)
    goes, back = shares["layer 1 heads"]
    gain, others = goes >= 0.8 and back >= 0.5, [max(shares[f"layer {l} heads"]) for l in (0, 2)]
    values = {"layer 1: goes": goes, "comes back": back}
    values |= {f"layer {l}: goes": shares[f"layer {l} heads"][0] for l in (0, 2)}
    control = {f"{part}: goes, comes back": both for part, both in shares.items() if part[0] == "l"}
    control["each head of layer 1: goes"] = [shares[f"head 1.{h}"][0] for h in study.heads]
    arms = ablations(study)["layer 1 heads"]
    left, damage = (arms[kind] - study.baseline for kind in ("mean, clean scale", "mean"))
    ci = interval(left, damage, of=lambda left, damage: 1 - ratio(left, damage))
    return Finding(goes, verdict(gain and max(others) < 0.5, gain), values, control, ci)


@figure(24, "layer 1 as a gain control (ours)", layers=2)
def figure_gain(study: Study):
    arms, target, c = ablations(study)["layer 1 heads"], study.test.a[:, 1:], study.test.c
    shown = {"clean": (study.baseline, {"color": "black"}),
             "layer 1's heads mean-ablated": (arms["mean"], {"color": LENS}),
             "the same, ln_final with its clean scale": (arms["mean, clean scale"], {"color": OTHER}),
             "clean, ln_final with the ablated scale": (arms["scale alone"], {"color": MODEL, "ls": "--"})}
    title = "Layer 1 is a gain control: what it does goes through one number a position"
    canvas, panels = grid(1, 2, 10.5, 4.2, title)
    power = by_size(c, squared_errors(torch.zeros_like(target), target))
    curves(panels[0], SIZE_RANGES, {label: (by_size(c, errors) / power, look | {"marker": "."})
                                    for label, (errors, look) in shown.items()})
    panels[0].set(title="the damage, and what mends it", xlabel="|c|", yscale="log",
                  ylabel="unexplained share of the next vector")
    panels[0].legend(fontsize=7)
    scale = by_size(study.population.c, study.activations[SCALE][..., 0])  # [8, pos]
    for n, color in zip((3, 6, 9, 12), plt.get_cmap("viridis")(np.linspace(0, 0.85, 4))):
        panels[1].plot(SIZE_RANGES, scale[:, n], marker=".", color=color, label=f"position {n}")
    panels[1].set(title="what the residual stream is divided by", xlabel="|c|", ylabel=SCALE)
    panels[1].set_ylim(0, None)
    panels[1].legend()
    return canvas


@once
def main_directions(study: Study, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """How what a layer's heads write varies over the population: its mean at each position [pos, d_model],
    the principal directions [d_model, d_model], the first one first, and the share of the variance along
    each."""
    written = study.activations[f"blocks.{layer}.hook_attn_out"]
    mean = written.mean(0)
    varying = (written - mean).flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(varying.T @ varying)
    return mean, directions.T.flip(0).float(), variances.flip(0) / variances.sum()


@claim("of all that layer 1's heads write one number a position is enough", None, 24, "MSE / unchanged", 3)
def claim_one_knob(study: Study) -> Finding:
    """What all heads of layer 1 write is reduced to its mean at each position and one number along one
    direction, the first principal one, found on other sequences. The MSE grows by a factor of at most 2,
    without that number by at least 10, and with one number only for layers 0 and 2 it grows by more than 2;
    partly if it grows by at most 4 and is at least 5 times as large without that number."""

    def errors(layer: int, change: Callable, k: int, count: int | None = FEW) -> Tensor:
        mean, directions, _ = main_directions(study, layer)
        return study.errors(layer, change(f"blocks.{layer}.hook_attn_out", mean, directions[:k]), count)

    keep, remove = interventions.keep_directions, interventions.remove_directions
    kept = errors(1, keep, 1, None)
    values = {"layer 1: 1 kept": study.factor(kept), "1 removed": study.factor(errors(1, remove, 1, None)),
              "layer 0: 1 kept": study.factor(errors(0, keep, 1)),
              "layer 2: 1 kept": study.factor(errors(2, keep, 1))}
    one, without, *others = values.values()
    control = {f"{k} kept": study.factor(errors(1, keep, k)) for k in (2, 3)}
    span, sizes = torch.linalg.qr(study.model.unembed.W_U).Q, study.model.config
    for l in study.layers:
        _, directions, shares = main_directions(study, l)
        control |= {f"layer {l}: share of the variance along each": shares[:3],
                    f"layer {l}: cosine of the first with what W_U reads": (directions[0] @ span).norm()}
    control["that cosine by chance"] = (sizes.d_vocab / sizes.d_model) ** 0.5
    how = verdict(one <= 2 and without >= 10 and min(others) > 2, one <= 4 and without >= 5 * one)
    return Finding(one, how, values, control, interval(kept, study.baseline, of=ratio))


L1_K, L1_V, L1_PATTERN, L1_Z = (f"blocks.1.attn.hook_{name}" for name in ("k", "v", "pattern", "z"))
DECAYING, GROWING = (0.2, 0.7), (1.5, 2.0)  # ranges of |c|


@once
def knob_sequences(study: Study, sizes: tuple[float, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs with |c| in a range, half of them with c < 0, and what layer 1 makes of them."""
    count, (low, high), names = max(10, study.size // 20), sizes, (L1_K, L1_V, L1_PATTERN, L1_Z)
    generator = study.generator(f"knob {low}")
    x = [study.sample(count, MAX_LENGTH, generator, c).a[:, :-1] for c in ((low, high), (-high, -low))]
    return torch.cat(x), study.record(torch.cat(x), *names, "blocks.1.hook_resid_pre", SCALE)


def favourite_source(study: Study) -> int:
    """The position that layer 1 attends to most, from positions 4 to 13, mean over heads and sequences."""
    return int(study.activations[L1_PATTERN][:, :, 4:].mean((0, 1, 2)).argmax())


def patches(study: Study) -> dict[str, tuple[list[str], Iterable[int], list[int]]]:
    """What layer 1 may be given of other sequences, {name: (activations, at which positions, of which
    vectors the size)}, see `follows`.

    "z" is all that the heads read; "pattern" and "values" one of its two factors; "position s" key and value
    of one source position; "size up to s" those of position s of the same sequence with a_0 to a_s as long as
    in the other, for s = 1 and the position that layer 1 attends to most; "size of a_0" and "size of a_1"
    those of position 1 with only one vector so long.
    """
    favourite, both = favourite_source(study), [L1_K, L1_V]
    found = {"z": ([L1_Z], [], []), "pattern": ([L1_PATTERN], [], []), "values": ([L1_V], [], [])}
    found |= {f"position {s}": (both, [s], []) for s in sorted({0, 1, 2, 3, 4, favourite})}
    found |= {"positions 5 to 13": (both, range(5, MAX_LENGTH), []),
              "position 1, key": ([L1_K], [1], []), "position 1, value": ([L1_V], [1], [])}
    found |= {f"size up to {s}": (both, [s], list(range(s + 1))) for s in sorted({1, favourite})}
    return found | {"size of a_0": (both, [1], [0]), "size of a_1": (both, [1], [1])}


def follows(study: Study, names: list[str], positions: Iterable[int], resized: list[int], low=DECAYING,
            high=GROWING) -> list[float]:
    """Share of the change of ln_final's log scale that follows a patch, for sequences with |c| in the range
    `low` given something of those in `high`, and the other way round; mean over positions 4 to 13.

    They are given the activations `names` at `positions` (of all if there are none): the others', or their
    own with the `resized` vectors as long as the others'."""
    both, shares = [knob_sequences(study, sizes) for sizes in (low, high)], []
    for (x, here), (y, there) in (both, both[::-1]):
        source, kept = there, {}
        if resized:
            x = x.clone()
            x[:, resized] *= (y.norm(dim=-1) / x.norm(dim=-1))[:, resized, None]
            source = study.record(x, *names)
        values = {name: source[name] for name in names}
        hooks = interventions.patch_positions(values, positions) if positions else interventions.hold(values)
        hooks |= interventions.record([SCALE], kept)
        study.model.run_from(1, here["blocks.1.hook_resid_pre"], hooks)
        moved, goal = ((scales[SCALE] / here[SCALE]).log()[:, 4:] for scales in (kept, there))
        shares.append(ratio(moved * goal, goal**2).item())
    return shares


@once
def knob_shares(study: Study) -> dict[str, list[float]]:
    """What turns the knob: {what layer 1 is given, see `patches`: the shares that follow}, [decaying
    sequences given something of growing ones, the other way round]."""
    return {name: follows(study, *patch) for name, patch in patches(study).items()}


def knob_finding(study: Study, position: int, labels: tuple[str, str]) -> Finding:
    """Whether the knob follows what layer 1 reads at a position, and the sizes up to it."""
    shares = knob_shares(study)
    read, size = shares[f"position {position}"], shares[f"size up to {position}"]
    places = [*(f"position {s}" for s in range(5) if s != position), "positions 5 to 13"]
    first = all(read[i] >= max(0.5, *(shares[name][i] for name in places)) for i in (0, 1))
    values = {f"{label}, to {kind}": share[i] for label, share in zip(labels, (read, size))
              for i, kind in enumerate(("growing", "decaying"))}
    return Finding(read, verdict(first and min(size) >= 0.5, first), values, shares)


@claim("what turns the knob is the size of the first two vectors", None, 26, "share that follows", 2)
def claim_knob(study: Study) -> Finding:
    """See `knob_shares`. In both directions at least half of the change of the log scale follows layer 1's
    key and value of source position 1 alone, and more than those of any other position; and at least half
    follows the size of the first two vectors, seen through position 1 alone. Partly if only the first."""
    return knob_finding(study, 1, ("position 1", "size"))


@claim("what turns the knob is the size of the vectors up to layer 1's favourite position", None, 26,
       "share that follows", 2)
def claim_knob_favourite(study: Study) -> Finding:
    """See `knob_shares`; the favourite is the position that layer 1 attends to most. In both directions at
    least half of the change of the log scale follows layer 1's key and value of it alone, and more than those
    of any other of positions 0 to 4, or of 5 to 13 together; and at least half follows the size of the
    vectors up to it, seen through it alone. Partly if only the first."""
    s = favourite_source(study)
    found, each = knob_finding(study, s, ("favourite", "favourite, size")), patches(study)
    control = {f"|c| 1.1 to 1.3 given of 1.7 to 2, and back: {name}":
               follows(study, *each[name], (1.1, 1.3), (1.7, 2.0))
               for name in ("z", f"position {s}", f"size up to {s}", "positions 5 to 13")}
    return replace(found, values={"its position": s} | found.values, control=control)


@figure(26, "what turns the knob (ours)", layers=2)
def figure_knob(study: Study):
    title = "What turns the knob: layer 1 is given something of other sequences"
    canvas, panels = grid(1, 2, 10.5, 4.6, title, width_ratios=[1.5, 1])
    shares, favourite = knob_shares(study), favourite_source(study)
    y = np.arange(len(shares))
    for i, (label, color) in enumerate((("decaying, given of growing", LENS),
                                        ("growing, given of decaying", TRUTH))):
        panels[0].barh(y + 0.4 * i, [share[i] for share in shares.values()], 0.38, color=color, label=label)
    panels[0].set_yticks(y + 0.2, list(shares))
    panels[0].invert_yaxis()
    for x, color in ((0, "black"), (1, "0.7")):
        panels[0].axvline(x, color=color, lw=0.8)
    panels[0].set_xlabel("share of the change of ln_final's log scale that follows")
    panels[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    attention = study.activations[L1_PATTERN][:, :, -1, favourite].mean(1)
    size, c = study.population.a[:, favourite].norm(dim=-1), study.population.c.abs()
    canvas.colorbar(panels[1].scatter(size, attention, c=c, s=6, cmap="viridis"), ax=panels[1], label="|c|")
    panels[1].set(title="from the last position, mean over heads, a dot a sequence",
                  xlabel=f"norm of $a_{{{favourite}}}$",
                  ylabel=f"attention of layer 1 to position {favourite}")
    return canvas


# What the model computes (ours): sequences that tell one rule from another


@once
def interleaved_errors(study: Study, low: float, high: float) -> dict[str, dict[str, Tensor]]:
    """Squared error of each sequence, positions 4 to 13, on sequences that tell one rule from another, |c|
    from `low` to `high` and both signs: {kind: {predictor: [batch]}}; "zero" is that of predicting 0."""
    generator, count = study.generator(f"interleaved {low}"), max(10, study.size // 5)
    c = data.uniform(generator, low, high, count) * (1 - 2 * (torch.arange(count) % 2))
    found = {}
    for kind, a in data.interleaved(MAX_LENGTH, c, generator, study.model.config.d_vocab).items():
        x, target, before = a[:, :-1], a[:, 5:], a[:, 3:-2]
        (factor,), _ = regress(target, before)
        predictions = {"zero": torch.zeros_like(target), "model": study.model(x)[:, 4:],
                       "affine solver": data.solve_recurrence(x)[:, 2:],
                       "two-step solver": data.solve_two_steps(x), "fixed multiple": factor * before}
        found[kind] = {name: (p - target).pow(2).sum((1, 2)) for name, p in predictions.items()}
    return found


def unexplained(errors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The same as shares of what predicting 0 leaves."""
    return {kind: {name: ratio(e, each["zero"]).item() for name, e in each.items() if name != "zero"}
            for kind, each in errors.items()}


@claim("it follows interleaved sequences, as a two-step rule does", None, 25, "unexplained share")
def claim_interleaved(study: Study) -> Finding:
    """|c| from 1.2 to 2, positions 4 to 13. On interleaved sequences, which are no affine recurrence, the
    model leaves at most a quarter unexplained of what the exact affine solver leaves, and of what the best
    fixed multiple of a_{n-1} leaves; where odd and even vectors grow differently at least four times what it
    leaves on interleaved ones. Partly if all but the last."""
    errors = interleaved_errors(study, 1.2, 2.0)
    found, near_1 = unexplained(errors), unexplained(interleaved_errors(study, 0.9, 1.2))
    model, rivals = {kind: found[kind]["model"] for kind in KINDS}, found["interleaved"]
    follows = model["interleaved"] <= min(rivals["affine solver"], rivals["fixed multiple"]) / 4
    fails = model["two growths"] >= 4 * model["interleaved"]
    values = {kind: model[kind] for kind in ("recurrence", "interleaved", "two growths")}
    values |= {name: rivals[name] for name in ("affine solver", "fixed multiple")}
    control = {f"|c| 1.2 to 2, {kind}": shares for kind, shares in found.items()}
    control |= {f"|c| 0.9 to 1.2, {kind}": shares for kind, shares in near_1.items()}
    how, each = verdict(follows and fails, follows), errors["interleaved"]
    ci = interval(each["model"], each["zero"], of=ratio)
    return Finding(model["interleaved"], how, values, control, ci)


@claim("where the two-step rule errs the model errs alike", None, 21, "share of the model's squared error")
def claim_rule_errors(study: Study) -> Finding:
    """1 - |model - rule|^2 / |model - truth|^2, the share of the model's error that `data.two_step_rule`
    makes too, positions 4 to 13. On recurrences, longer, larger and smaller ones too, the rule is exact and
    predicts no error. It errs with noise on the inputs (standard deviation 0.01, the last prediction only),
    on two fixed points and on two growths, |c| from 1.2 to 2. At least half on all three; partly on two."""
    g, count = study.generator("rule"), min(EXAMPLES, study.size)
    a, longest = study.sample(count, MAX_LENGTH, g).a, min(2 * MAX_LENGTH, study.longest)
    c = data.uniform(g, 1.2, 2, count) * (1 - 2 * (torch.arange(count) % 2))
    noise = 0.01 * torch.randn(a.shape, generator=g)
    noise[:, -1] = 0  # the last vector is the target
    shown = {"recurrences": a, f"of {longest} inputs": study.sample(count, longest, g).a,
             "half as large": a / 2, "twice as large": 2 * a, "noise": a + noise}
    control, shares = {}, {}
    for name, x in (shown | data.interleaved(MAX_LENGTH, c, g, study.model.config.d_vocab)).items():
        target, found = predictions(study, x)
        part = slice(-1 if name == "noise" else 4 - study.task.first, None)
        off = lambda one, other: (one - other)[:, part].pow(2).sum()
        model, rule, zero = (found[who] for who in ("model", "two-step rule", "zero"))
        shares[name] = 1 - off(model, rule) / off(model, target)
        control[f"{name}: unexplained by model and rule, share of the error"] = [
            off(model, target) / off(zero, target), off(rule, target) / off(zero, target), shares[name]]
    values = {name: shares[name] for name in ("noise", "two fixed points", "two growths")}
    alike = sum(share >= 0.5 for share in values.values())
    return Finding(list(values.values()), verdict(alike == 3, alike == 2), values, control)


@figure(25, "interleaved sequences (ours)")
def figure_interleaved(study: Study):
    title = "Interleaved sequences: two recurrences with one fixed point and one $c^2$"
    canvas, panels = grid(1, 2, 10.5, 4.2, title)
    c, g, first = torch.tensor([-1.25]), study.generator("interleaved example"), FIRST_POSITION
    a = data.interleaved(MAX_LENGTH, c, g, study.model.config.d_vocab)["interleaved"]
    x = a[:, :-1]
    curves(panels[0], range(first, MAX_LENGTH), {
        "the next vector": (a[0, first + 1 :, 0], {"color": TRUTH, "marker": "o", "ms": 4}),
        "model": (study.model(x)[0, first:, 0], {"color": MODEL, "marker": ".", "ls": "--"}),
        "exact affine solver": (data.solve_recurrence(x)[0, :, 0], {"color": "0.6", "marker": "."})})
    panels[0].axhline(0, color="0.9", zorder=0)
    panels[0].set(title=f"one sequence, $c^2$ = {c.item() ** 2:.2f}, dimension 0", xlabel="position n",
                  ylabel="component")
    panels[0].legend()
    found, bottom = unexplained(interleaved_errors(study, 1.2, 2.0)), 1e-5
    bars = (("model", MODEL), ("affine solver", "0.6"), ("two-step solver", OTHER))
    for i, (name, color) in enumerate(bars):
        heights = [max(found[kind][name], bottom) for kind in KINDS]
        panels[1].bar(np.arange(4) + 0.27 * (i - 1), heights, 0.25, color=color, label=name)
    panels[1].set(yscale="log", ylim=(bottom, 100), title="all, |c| from 1.2 to 2",
                  ylabel="unexplained share (bars start at $10^{-5}$)")
    panels[1].set_xticks(range(4), [textwrap.fill(kind, 11) for kind in KINDS])
    panels[1].legend(ncols=3, loc="upper left")
    return canvas


# ------------------------------------------------------------------------------------------------------------
# Runs compared: seeds and settings, when it forms, other recurrences, one to three layers

MARKS = {"reproduced": ("o", TRUTH), "partly": ("s", MODEL), "not reproduced": ("X", LENS)}  # by verdict


def seed_results(study: Study, run: str, progress: "Progress") -> dict:
    """Every claim on a run and, as its course, at the steps that it kept, without steps 1 to 63, in which
    nothing happens: from RUN/claims.json if that is of these weights, this code and seed, else anew."""
    path, name = os.path.join(run, "claims.json"), os.path.basename(run)
    kept = {int(weights.stem): str(weights) for weights in sorted(Path(run).glob("steps/[0-9]*.pt"))}
    steps = {step: weights for step, weights in kept.items() if not 0 < step < 64}
    described = plain(meta(study, run) | {"steps": list(steps)})
    try:
        found = load_file(path, "claims")
    except (FileNotFoundError, ValueError):  # there is none that this program wrote
        found = {}
    if found.get("meta") == described:
        progress.total -= 1
        return found
    chosen, course = [name for name, entry in CLAIMS.items() if study.has(entry)], {}
    part = 1 / (len(chosen) + len(steps))
    claims = measure(study, chosen, progress, f"{name} ", part)
    for step, weights in steps.items():
        progress.next(f"{name} step {step:,}", part)
        small = Study(load_weights(weights), study.seed, SMALL, study.log, study.task_name)
        each = {claim: CLAIMS[claim].function(small) for claim in chosen}
        course[str(step)] = {claim: {"verdict": f.verdict, "values": f.values} for claim, f in each.items()}
    found = {"meta": described, "claims": claims, "course": plain(course)}
    try:
        save_json(found, path)
    except OSError:  # of a run that others own
        pass
    return found


def by_setting(runs: dict[str, dict]) -> dict[str, list[dict]]:
    """The runs of `seed_results` by activation, initialisation and what else of model, task and steps is
    unlike the paper; the setting of most runs first."""
    usual, groups = asdict(Config()) | {"task": Options.task, "step": Options.steps}, {}
    for found in runs.values():
        config = found["meta"]["config"] | {name: found["meta"][name] for name in ("task", "step")}
        parts = [config.pop("act_fn"), f"{config.pop('initializer_range'):.3g}"]
        parts += [f"{name} {value}" for name, value in config.items() if value != usual[name]]
        groups.setdefault(", ".join(parts), []).append(found)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def count_verdicts(runs: Iterable[dict], name: str) -> list[int]:
    """In how many runs a claim is reproduced, partly, and not."""
    verdicts = [found["claims"][name]["verdict"] for found in runs]
    return [verdicts.count(verdict) for verdict in MARKS]


def over_runs(runs: Iterable[dict], name: str) -> dict[str, np.ndarray]:
    """The values of a claim by label, [runs]."""
    values = [found["claims"][name]["values"] for found in runs]
    return {label: np.array([each[label] for each in values]) for label in values[0]}


def panel_each(names: Iterable[str], title: str):
    """A panel for each claim, with its unit and the paper's value, and one more: canvas, {name: axes},
    axes."""
    names = list(names)
    rows = len(names) // 4 + 1
    canvas, panels = grid(rows, 4, 11, 2.4 * rows, title)
    for axes, name in zip(panels.flat, names):
        paper, unit = CLAIMS[name].paper, CLAIMS[name].unit
        if unit != "MSE / unchanged" and isinstance(paper, (float, list)):
            for value in np.ravel(paper):
                axes.axhline(value, color=OTHER, ls="--", lw=1)
        axes.set_yscale("log" if "MSE" in unit or unit == "unexplained share" else "linear")
        axes.set_ylabel(textwrap.fill(unit, 24), fontsize=7)
        axes.set_title(name, fontsize=8)
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    return canvas, dict(zip(names, panels.flat)), panels.flat[len(names)]


def figure_seeds(runs: dict[str, dict]):
    """A panel for each claim on the runs of the first setting: a mark for each, in one order, a bar at their
    mean."""
    setting, seeds = next(iter(by_setting(runs).items()))
    title = f"The claims over {len(seeds)} seeds ({setting})"
    canvas, panels, legend = panel_each(seeds[0]["claims"], title)
    for name, axes in panels.items():
        values, fresh = over_runs(seeds, name), seeds[0]["claims"][name]["untrained"]["values"]
        for x, (label, group) in enumerate(values.items()):
            places = np.linspace(-0.25, 0.25, len(seeds)) * (len(seeds) > 1)
            for at, value, found in zip(places, group, seeds):
                marker, color = MARKS[found["claims"][name]["verdict"]]
                axes.plot(x + at, value, marker=marker, color=color, ms=5, mec="none", ls="")
            axes.plot([x - 0.35, x + 0.35], [group.mean()] * 2, color="black", lw=1)
            axes.plot(x, fresh[label], marker="_", color="0.5", ms=14)
        slanted = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(values) > 3 else {}
        labels = [textwrap.fill(label, 16 if slanted else 12, break_long_words=False) for label in values]
        axes.set_xticks(range(len(values)), labels, fontsize=6, **slanted)
        axes.set_xlim(-0.6, len(values) - 0.4)
        paper = "" if CLAIMS[name].paper is None else "paper: "
        count = f"{count_verdicts(seeds, name)[0]} of {len(seeds)}"
        axes.set_title(f"{name}: {count}\n{paper}{CLAIMS[name].paper_text()}", fontsize=8)
    for label, (marker, color) in MARKS.items():
        legend.plot([], [], marker=marker, color=color, ls="", label=label)
    legend.plot([], [], color="black", lw=1, label="mean over seeds")
    legend.plot([], [], marker="_", color="0.5", ls="", ms=14, label="untrained")
    legend.plot([], [], color=OTHER, ls="--", lw=1, label="paper")
    legend.legend(loc="center")
    return canvas


def figure_course(runs: dict[str, dict]):
    """A panel for each claim against the step, a line a value and run of the first setting; and how many
    claims hold. Ranges are those from step 512 on: shares of nothing, before, may be of any size."""
    courses = [found["course"] for found in next(iter(by_setting(runs).values())) if found["course"]]
    title = f"When it forms: the values of the claims against the step, {len(courses)} seeds"
    canvas, panels, last = panel_each(next(iter(courses[0].values())), title)
    last.axis("on")
    last.set(title="claims that hold", ylabel="number of claims")
    late = {name: [line.get_ydata()[0] for line in axes.lines] for name, axes in panels.items()}
    for i, steps in enumerate(courses):
        x = np.array(list(map(int, steps)))
        for name, axes in panels.items():
            for j, label in enumerate(next(iter(steps.values()))[name]["values"]):
                y = np.array([claims[name]["values"][label] for claims in steps.values()])
                axes.plot(x, y, color=f"C{j}", lw=0.8, label=None if i else textwrap.fill(label, 28))
                late[name] += y[x >= min(512, x[-1])].tolist()
        for ours, color, label in ((False, TRUTH, "the paper's"), (True, LENS, "ours")):
            y = [sum(found["verdict"] == "reproduced" for name, found in claims.items()
                     if (CLAIMS[name].paper is None) == ours) for claims in steps.values()]
            last.plot(x, y, color=color, lw=0.8, label=None if i else label)
    for name, axes in panels.items():
        if axes.get_yscale() == "linear":
            margin = 0.05 * (max(late[name]) - min(late[name])) + 1e-9
            axes.set_ylim(min(late[name]) - margin, max(late[name]) + margin)
    for axes in (*panels.values(), last):
        axes.set_xscale("symlog", linthresh=100)  # logarithmic, but with a place for 0
        axes.set_xticks([0, 1000, 100_000], ["0", "1,000", "100,000"])
        axes.set_xlim(0, max(1, *(int(step) for steps in courses for step in steps)))
        axes.legend(fontsize=5.5, frameon=True, framealpha=0.7, edgecolor="none")
    canvas.supxlabel("step", fontsize=9)
    return canvas


def seeds_markdown(runs: dict[str, dict]) -> str:
    """seeds.md: verdicts and values of each claim, a column for each setting."""
    columns, fresh = {}, {}
    for setting, group in by_setting(runs).items():
        for name, found in group[0]["claims"].items():
            column, entry = columns.setdefault(setting, {}), CLAIMS[name]
            paper = "ours" if entry.paper is None else f"paper: {entry.paper_text()}"
            title = f"[**{name}**](results.md#{name}), {paper}; {entry.unit}"
            column[title] = f"**{' / '.join(map(str, count_verdicts(group, name)))}**"
            fresh.setdefault(title, "")
            for label, each in over_runs(group, name).items():
                spread = f" ({short(each.std(ddof=1))}): {short(each.tolist())}" if len(each) > 1 else ""
                column[f"{name}: {label}"] = short(each.mean()) + spread
                fresh.setdefault(f"{name}: {label}", found["untrained"]["values"][label])
    intro = """A setting is the activation, the standard deviation of the initial weights and what else is
        unlike the paper. In bold: in how many runs a claim is reproduced / partly / not. Values: mean over
        runs (standard deviation): each run, in the order of `seeds.json`. Rules: `results.md`."""
    return side_by_side("seeds", columns | {"untrained": fresh}, " ".join(intro.split()))


def root_strides(weights: Weights) -> dict[str, float]:
    """Whether a linear recurrence is continued from its last steps or in strides of two: {..: mean}, or {}.

    a_s = a* + sum_i z_i^s u_i over the roots z_i of the characteristic polynomial. For the largest one, where
    it is 1.1 or more, A / z^2 of `strides` is 1 if the model goes in strides of two, and the sum of c_i z^-i
    over even i if it uses a_n, a_{n-1}, .. as the recurrence does. Positions 6 to 13.
    """
    c = weights.sample.c.reshape(len(weights.w), -1)
    below = torch.eye(c.shape[1], dtype=c.dtype)[:-1].expand(len(c), -1, -1)
    roots = torch.linalg.eigvals(torch.cat([c[:, None], below], 1))
    z = roots.gather(1, roots.abs().argmax(1, keepdim=True))[:, 0]
    grows = z.abs() >= 1.1
    if not grows.any():
        return {}
    z, A, B = z[grows], *(part[:, 6:] for part in strides(weights.w[grows], z[grows]))
    powers = z[:, None] ** -torch.arange(1.0, c.shape[1] + 1)
    last = (c[grows] * powers)[:, 1::2].sum(1, keepdim=True)
    found = {"A / z^2": A.real, "B / z": B.real, "A / z^2 + B / z (right: 1)": (A + B).real,
             "A / z^2 is off strides of two by": (A - 1).abs(),
             "A / z^2 is off the last steps by": (A - last).abs(),
             "these two differ by": (last - 1).abs()}
    return {name: value.mean() for name, value in found.items()}


def task_results(study: Study, run: str, progress: "Progress") -> dict:
    """How well a task is learnt, and by which weights. It is learnt with an error of at most a tenth of what
    repeating the last vector or predicting 0 leaves, whichever is less, and partly with less than that."""
    progress.next(os.path.basename(run))
    errors = predictor_errors(study, study.test.a)
    mean = {name: e.mean() for name, e in errors.items()}
    simple = min(mean["zero"], mean["last vector"])
    learnt = "yes" if mean["model"] <= simple / 10 else "partly" if mean["model"] < simple else "no"
    found = {"task": study.task_name, "first position": study.task.first, "learnt": learnt}
    found |= {f"MSE, {name}": value for name, value in mean.items()}
    if study.task.rotates:
        weights = read_weights(study, None, MAX_LENGTH, WHOLE)
        found["explained by source weights"] = weights.explained
        found["how far they differ between directions, relative"] = weights.spread
        found |= root_strides(weights) if study.task.linear else {}
    found["by position"] = {name: e.mean(0) for name, e in errors.items()}
    return plain(found | {"meta": meta(study, run)})


def figure_tasks(runs: dict[str, dict]):
    """Error by position, a panel for each of `task_results`."""
    rows = -(-len(runs) // 4)
    columns = -(-len(runs) // rows)
    title = "Other recurrences: error by position n, at which the next vector is predicted"
    canvas, panels = grid(rows, columns, 11, 0.8 + 2.5 * rows, title, sharey=True, squeeze=False)
    lines = {}
    for axes, found in zip(panels.flat, runs.values()):
        draw_errors(axes, range(found["first position"], MAX_LENGTH), found["by position"])
        share = found["MSE, model"] / found["MSE, zero"]
        axes.set(title=f"{found['task']}: {share:.1%} unexplained", ylim=(1e-18, 10),
                 xlim=(0.5, MAX_LENGTH), xticks=range(2, MAX_LENGTH, 2))
        lines |= {line.get_label(): line for line in axes.lines}
    for axes in panels.flat[len(runs) :]:
        axes.axis("off")
    canvas.supylabel("mean squared error", fontsize=9)
    canvas.legend(handles=list(lines.values()), loc="outside lower center", ncols=3)
    return canvas


def depth_results(study: Study, run: str, progress: "Progress") -> dict:
    """Which parts a model of any depth has: copy (A and B), gain (what a clean final scale mends of an
    ablation), subtraction (factors on a*); and its error."""
    progress.next(os.path.basename(run))
    errors, (A, B, _) = predictor_errors(study, study.test.a), strong_strides(study)
    found = {"layers": len(study.layers), "MSE, all lengths": claim_mse(study).measured,
             "MSE, 14 inputs": errors["model"].mean(), "A / c^2": A[..., 5:].mean(),
             "B / c": B[..., 5:].mean(),
             "explained, |c| up to 1.5": claim_source_weights(study).values["mean, |c| up to 1.5"],
             "interleaved: unexplained share": claim_interleaved(study).measured}
    for part, arms in factors(study).items():
        if part.startswith("layer"):
            both = [arms["mean"], arms["mean, clean scale"]]
            found[f"{part} ablated, and with the clean scale: MSE / unchanged"] = both
    for name, (fixed, _) in factors_by_component(study).items():
        found[f"{name}: factor on a* at |c| = {', '.join(map(str, TAKEN_AT))}"] = fixed
    found["by position"] = errors["model"].mean(0)
    found["by |c|"] = by_size(study.test.c, errors["model"].mean(1))
    return plain(found | {"meta": meta(study, run)})


def figure_depths(runs: dict[str, dict]):
    """Errors and ablations, a line for each of `depth_results`."""
    canvas, panels = grid(1, 3, 11, 3.8, "How much transformer does it take?")
    deepest = max(found["layers"] for found in runs.values())
    names = [f"layer {l} {what}" for l in range(deepest) for what in ("heads", "MLP")]
    for i, found in enumerate(runs.values()):
        layers, color = found["layers"], LAYER_COLORS[i % 3]
        line = {"color": color, "marker": ".", "label": f"{layers} layer{'s' * (layers > 1)}"}
        panels[0].semilogy(range(FIRST_POSITION, MAX_LENGTH), found["by position"], **line)
        panels[1].semilogy(SIZE_RANGES, found["by |c|"], **line)
        for y, name in enumerate(names[: 2 * layers]):
            ends = found[f"{name} ablated, and with the clean scale: MSE / unchanged"]
            panels[2].plot(ends, [y + 0.2 * i] * 2, color=color, lw=1)
            for x, fill in zip(ends, (color, "white")):
                panels[2].plot(x, y + 0.2 * i, "o", color=color, ms=5, mfc=fill)
    panels[2].set_yticks(np.arange(len(names)) + 0.2, names)
    panels[2].set(xscale="log", xlabel="MSE / unchanged", title="mean-ablated; hollow: with the clean scale")
    panels[2].invert_yaxis()
    panels[0].set(xlabel="position", ylabel="mean squared error", title="error by position")
    panels[1].set(xlabel="|c|", title="error by |c|")
    panels[0].legend()
    return canvas


def side_by_side(kind: str, columns: dict[str, dict], intro: str = "") -> str:
    """KIND.md: a column for each run or setting, a row for each label."""
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    labels = (label for label in labels if label != "meta" and not label.startswith("by "))
    rows = ([label, *(short(column.get(label, "-")) for column in columns.values())] for label in labels)
    lines = [f"# {kind.capitalize()}", "", f"Written by `python analyze.py --{kind}`. {intro}".strip(), ""]
    return "\n".join([*lines, *table([kind, *columns], rows), ""])


COMPARISONS = {  # what measures a run, and what draws and tells of all
    "seeds": (seed_results, figure_seeds, seeds_markdown),
    "tasks": (task_results, figure_tasks, functools.partial(side_by_side, "tasks")),
    "depths": (depth_results, figure_depths, functools.partial(side_by_side, "depths")),
}


def compare(kind: str, folders: list[str], seed: int, out: str):
    """Measure every run in FOLDER/*/ of the `folders` and set them beside one another: KIND.json, KIND.md and
    KIND.png in `out`, and steps.png of seeds that kept weights on the way. FileNotFoundError where there is
    no run, ValueError for depths of another task, and what `open_study` raises."""
    measure_one, figure_of, text_of = COMPARISONS[kind]
    studies, folders = {}, [os.path.abspath(folder) for folder in folders]
    for folder in folders:
        found = sorted(str(weights.parent) for weights in Path(folder).glob("*/weights.pt"))
        if not found:
            where = os.path.join(folder, "*", "weights.pt")
            raise FileNotFoundError(f"there is no run in {where}: train some with train.py")
        studies |= {run: open_study(run, seed) for run in found}
    if kind == "depths":
        studies = dict(sorted(studies.items(), key=lambda each: len(each[1].layers)))
        for run, study in studies.items():
            if study.task_name != "affine":
                raise ValueError(f"--depths is about affine recurrences, but {run} learnt {study.task_name}")
    os.makedirs(out, exist_ok=True)
    progress, above, runs = Progress(len(studies)), os.path.commonpath(folders), {}
    for run in list(studies):
        runs[os.path.relpath(run, above)] = measure_one(studies.pop(run), run, progress)
    progress.finish()
    save_json(runs, os.path.join(out, f"{kind}.json"))
    write_text(out, f"{kind}.md", text_of(runs))
    draw(figure_of, runs, os.path.join(out, f"{kind}.png"))
    if kind == "seeds" and any(found["course"] for found in next(iter(by_setting(runs).values()))):
        draw(figure_course, runs, os.path.join(out, "steps.png"))
    print(f"{kind}.json, {kind}.md and pictures of {len(runs)} runs in {out}, {progress.elapsed():.0f} s")


# ------------------------------------------------------------------------------------------------------------
# The report and the command line


def plain(value):
    """Tensors and nested containers as JSON has them, numbers to six significant digits."""
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def short(value) -> str:
    """A measured value in a table cell: lists by head in one line, a line for each layer."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(item)}" for key, item in value.items())
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


def figure_file(number: int) -> str:
    return f"fig{number:02d}_{FIGURES[number].function.__name__.removeprefix('figure_')}.png"


def code_of_numbers() -> str:
    """The code that numbers depend on: functions and constants, but for those that draw."""
    parts = []
    for name in ("data", "model", "interventions", "analyze"):
        text = Path(__file__).with_name(f"{name}.py").read_text()
        lines = text.splitlines()
        parts += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in ast.parse(text).body
                  if not isinstance(node, ast.Expr)
                  and not getattr(node, "name", "").startswith(("figure_", "draw"))]
    return "\n".join(parts)


def meta(study: Study, run: str) -> dict:
    """What the numbers were computed from, and with."""
    digest = lambda content: hashlib.sha256(content).hexdigest()
    versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)}
    return {"sha256": digest((Path(run) / "weights.pt").read_bytes()),
            "code": digest(code_of_numbers().encode()), "step": int(study.log["step"][-1]),
            "task": study.task_name, "config": asdict(study.model.config), "seed": study.seed,
            "samples": {name.lower(): globals()[name] for name in SAMPLES},
            "versions": {"python": platform.python_version()} | versions}


RESULTS_INTRO = """\
# What the paper claims and what this model shows

Written by `python analyze.py --all`; all numbers, with more digits, are in `results.json`. Claims without a
value of the paper are ours; "reproduced" then says that they hold. Untrained: the same measured on fresh
weights.
"""


def markdown(results: dict) -> str:
    """results.md: a row for each claim, then the rule, the values and the controls of each."""
    rows, details = [], []
    for name, found in results["claims"].items():
        fresh, number = found["untrained"], CLAIMS[name].figure
        rows.append([f"[`{name}`](#{name}) {found['claim']}", f"[{number}]({figure_file(number)})",
                     CLAIMS[name].paper_text(), short(found["measured"]),
                     " to ".join(map(short, found["interval"] or ())), found["verdict"]])
        verdicts = f"**{found['verdict']}** (untrained: {fresh['verdict']})"
        details += ["", f"## {name}", "", f"{found['claim']}: {verdicts}.", "", f"Rule: {found['why']}", ""]
        values = ([key, short(value), short(fresh["values"][key])] for key, value in found["values"].items())
        details += [*table([CLAIMS[name].unit, "value", "untrained"], values), ""]
        if found["control"]:
            details += table(["control", "value"], ([k, short(v)] for k, v in found["control"].items()))
    header = ["claim", "figure", "paper", "measured", "95% interval", "verdict"]
    lines = [RESULTS_INTRO, *(f"{key}: {short(value)}  " for key, value in results["meta"].items()), ""]
    return "\n".join([*lines, *table(header, rows), *details, ""])


class Progress:
    """A line on the terminal that names what is being made, with the time taken and the time left."""

    def __init__(self, total: int):
        self.total, self.done, self.start, self.line = total, 0.0, time.perf_counter(), Line(sys.stderr)
        self.finish = self.line.clear

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def next(self, what: str, part: float = 1.0):
        spent = self.elapsed()
        left = f", about {spent * (self.total / self.done - 1):.0f} s left" if self.done else ""
        self.line.show(f"{self.done / self.total:4.0%} {what} ({spent:.0f} s{left})")
        self.done += part


def write_text(out: str, name: str, text: str):
    with replacing(os.path.join(out, name)) as f:
        f.write(text.encode())


def draw(figure_of: Callable, what, path: str):
    """Write the figure that `figure_of` makes of `what` to a PNG."""
    with plt.rc_context(STYLE), replacing(path) as f:
        canvas = figure_of(what)
        canvas.savefig(f, format="png")
        plt.close(canvas)


def measure(study: Study, names: Iterable[str], progress: Progress, prefix: str = "",
            part: float = 1.0) -> dict[str, dict]:
    """Claims as results.json has them, but for their text, each also on the untrained model."""
    results = {}
    for name in names:
        progress.next(f"{prefix}claim {name}", part)
        found, fresh = (CLAIMS[name].function(each) for each in (study, study.untrained))
        untrained = {"verdict": fresh.verdict, "values": fresh.values}
        results[name] = plain(asdict(found) | {"untrained": untrained})
    return results


def analyse(run: str, seed: int, out: str, wanted: list[int] | None):
    """Draw the figures `wanted` of a run into `out`; for None all, and measure every claim, with the
    reports. Says in a line what has no meaning for this run."""
    study = open_study(run, seed)
    entries = {f"figure {number}": FIGURES[number] for number in wanted or FIGURES}
    entries |= {} if wanted else CLAIMS
    if left := [name for name, entry in entries.items() if not study.has(entry)]:
        about = f"a model of {len(study.layers)} layers that learnt {study.task_name} sequences"
        print(f"left out, without a meaning for {about}: {', '.join(left)}")
    figures = [number for number in sorted(set(wanted or FIGURES)) if study.has(FIGURES[number])]
    names = [name for name, entry in CLAIMS.items() if study.has(entry) and not wanted]
    os.makedirs(out, exist_ok=True)
    progress = Progress(len(figures) + len(names))
    for number in figures:
        progress.next(f"figure {number}: {FIGURES[number].text}")
        draw(FIGURES[number].function, study, os.path.join(out, figure_file(number)))
    claims = measure(study, names, progress)
    progress.finish()
    if not wanted:
        for name, found in claims.items():
            rule = " ".join(CLAIMS[name].function.__doc__.split())
            claims[name] = {"claim": CLAIMS[name].text, "paper": CLAIMS[name].paper, "why": rule} | found
            measured = short(found["measured"]).replace("<br>", " / ")[:50]
            print(f"{name:20}  {CLAIMS[name].paper_text():16}  {measured:50}  {found['verdict']}")
        results = {"meta": {"weights": run} | meta(study, run), "claims": claims}
        save_json(results, os.path.join(out, "results.json"))
        write_text(out, "results.md", markdown(results))
    files = f"{len(figures)} figures{'' if wanted else ' and results.json, results.md'}"
    print(f"{files} in {out}, {progress.elapsed():.0f} s")


def main():
    parser = CommandLine(__doc__)
    what, option = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    what("--all", action="store_true", help="every figure and claim, results.json and results.md")
    what("--fig", type=int, action="append", metavar="N", help="figure N; also several times")
    what("--list", action="store_true", help="list the figures and claims")
    what("--seeds", nargs="+", metavar="DIR", help="compare the claims on every run in DIR/*/")
    what("--tasks", nargs=1, metavar="DIR", help="compare what the runs in DIR/*/ have learnt")
    what("--depths", nargs=1, metavar="DIR", help="compare models of one, two and three layers in DIR/*/")
    option("--run", metavar="DIR", help="run folder with weights.pt and log.csv (default: weights)")
    option("--out", metavar="DIR", help="folder of what is written (default: figures, or figures in --run)")
    option("--seed", type=int, help="of the sequences and random matrices (default: 0)")
    given = vars(parser.parse_args())
    for number in given.get("fig", []):
        if number not in FIGURES:
            parser.error(f"there is no figure {number}; figures are 1 to {max(FIGURES)}, see --list")
    kind = next((kind for kind in COMPARISONS if kind in given), None)
    if kind and "run" in given:
        parser.error(f"--{kind} DIR is about the runs in DIR: leave out --run")
    run, seed = given.get("run", "weights"), given.get("seed", 0)
    out = given.get("out", os.path.join(run, "figures") if "run" in given else "figures")

    try:
        if kind:
            compare(kind, given[kind], seed, out)
        elif "list" in given:
            for number in sorted(FIGURES):
                print(f"figure {number:2}  {FIGURES[number].text}")
            for name, entry in CLAIMS.items():
                print(f"claim  {name}: {entry.text} (paper: {entry.paper_text()}; figure {entry.figure})")
        else:
            analyse(run, seed, out, given.get("fig"))
    except (OSError, ValueError) as error:
        Line(sys.stderr).clear()  # of progress
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
