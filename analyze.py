"""Every figure and every number of the paper, from one run's weights.

    python analyze.py --all                         # everything, on the weights that ship, into figures/
    python analyze.py --list                        # what there is
    python analyze.py --fig 8 --fig 10              # some figures
    python analyze.py --all --run runs/paper        # of another run, into runs/paper/figures
    python analyze.py --all --run runs/paper --step 1000       # at a step that train.py --keep-steps kept

A claim is a function from a Study (a model and the sequences it is studied on) to a Finding, under @claim;
its docstring is its rule. A figure is one from a Study to a matplotlib Figure, under @figure. One of your own
needs nothing else than to stand among them, which are in the order of the paper.
"""

import os

if __name__ == "__main__":
    # Nothing is shown here, and what a user has chosen may not be installed.
    os.environ["MPLBACKEND"] = "agg"

import contextlib
import functools
import io
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
from data import FIRST_POSITION, MAX_LENGTH, explained, neighbours, squared_errors
from interventions import Hook
from model import (
    Transformer,
    data_ov_circuit,
    data_qk_circuit,
    fold,
    load_weights,
    ov_circuit,
    qk_circuit,
    save,
    settings_beside,
)
from train import command_line, from_settings, progress, say

HERE = os.path.dirname(os.path.abspath(__file__))
POPULATION = 1000  # sequences of 14 inputs, as in the paper (section 4.5)
UNTRAINED = 50  # sequences for an untrained model
HELD_OUT_PER_LENGTH = 840  # 10,080 sequences over the 12 lengths
EXAMPLES = 200  # sequences of one kind: alternating ones for the attention of layer 2
FEW = 100  # test sequences for interventions in single heads and for those that are only controls
CHUNK = 100  # sequences in a pass: few enough for activations to stay in the processor's cache
QK_DRAWS = 5  # random matrices for each arm of the pseudoinverse test
RESAMPLES = 400  # of each bootstrap
SEED = 0  # of all random streams of a study
SCALE = "ln_final.hook_scale"


# ---------- Claims and figures ----------
@dataclass(frozen=True)
class Finding:
    """What a claim comes to on one model."""

    measured: object  # a number, a list by head or position, or [layer][head]
    verdict: str  # "reproduced", "partly" or "not reproduced", by the rule in the claim's docstring
    values: dict[str, object]  # the numbers it is judged by and its controls, a short label each
    interval: list[float] | None = None  # 95% confidence interval, where the claim is one number


@dataclass(frozen=True)
class Entry:
    """A claim or a figure."""

    function: Callable  # Study -> Finding, or -> Figure
    text: str
    layers: int  # that a model must have for it
    paper: object = None  # the paper's value of a claim, a number or a text; None for one of ours
    figure: int = 0  # the nearest to a claim


class Catalogue:
    """The claims and figures of a command, which enter themselves; all that lists them reads this."""

    def __init__(self):
        self.claims: dict[str, Entry] = {}
        self.figures: dict[int, Entry] = {}

    def claim(self, text: str, paper, figure: int, layers: int = 1) -> Callable:
        """Enters a function claim_NAME(study) -> Finding as NAME."""

        def enter(function: Callable) -> Callable:
            name = function.__name__.removeprefix("claim_")
            return self.enter(self.claims, name, Entry(function, text, layers, paper, figure))

        return enter

    def figure(self, number: int, title: str, layers: int = 1) -> Callable:
        """Enters a function figure_NAME(study) -> Figure, which is drawn to figNN_NAME.png."""
        return lambda function: self.enter(self.figures, number, Entry(function, title, layers))

    def enter(self, entries: dict, key, entry: Entry) -> Callable:
        if key in entries:
            raise ValueError(f"{key} is taken by: {entries[key].text}")
        entries[key] = entry
        return entry.function

    def file(self, number: int) -> str:
        name = self.figures[number].function.__name__.removeprefix("figure_")
        return f"fig{number:02d}_{name}.png"


PAPER = Catalogue()
claim = PAPER.claim
figure = PAPER.figure


def verdict(full, part=False) -> str:
    if full:
        return "reproduced"
    return "partly" if part else "not reproduced"


# ---------- The Study ----------
def kept(measure: Callable) -> Callable:
    """A measure whose results are kept in its study: they go when it goes, and when its model is changed."""

    @functools.wraps(measure)
    def get(study: "Study", *arguments):
        # PyTorch counts the changes of every tensor in place.
        version = [(id(p), p._version) for p in study.model.parameters()]
        if version != study.version:
            study.results.clear()
            study.version = version
        key = (measure, *arguments)
        if key not in study.results:
            study.results[key] = measure(study, *arguments)
        return study.results[key]

    return get


class Study:
    """A trained model and what is measured on it more than once, when it is asked for. size: sequences in the
    population and in the test set. log: the run's log.csv. settings: its config.json."""

    def __init__(
        self, transformer: Transformer, size: int, log: dict[str, np.ndarray], settings: dict
    ):
        self.model = fold(transformer).requires_grad_(False)
        self.size = size
        self.log = log
        self.settings = settings
        self.meta: dict = {}
        self.layers = range(self.model.config.n_layers)
        self.heads = range(self.model.config.n_heads)
        self.results: dict = {}  # of functions under @kept
        self.version: list = []  # of the model that they belong to
        # The sequences on which activations are averaged, and those on which interventions are judged.
        self.population = self.sample(POPULATION, self.generator("population"))
        self.test = self.sample(POPULATION, self.generator("test"))

    def generator(self, purpose: str) -> torch.Generator:
        """A random stream for each purpose, so that a number does not depend on what else is computed."""
        seed = random.Random(f"{SEED} {purpose}").getrandbits(62)
        return torch.Generator().manual_seed(seed)

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        length: int = MAX_LENGTH,
        c_range: tuple = (-2.0, 2.0),
    ) -> data.Sample:
        """`count` sequences, but no more than the population has."""
        d_vocab = self.model.config.d_vocab
        return data.sample(min(count, self.size), length, generator, d_vocab, c_range)

    @kept
    def near(self, c: int) -> data.Sample:
        """Sequences that alternate, c near -1, or their counterpart that does not, c near 1."""
        purpose = "alternating" if c < 0 else "steady"
        c_range = (c - 0.1, c + 0.1)
        return self.sample(EXAMPLES, self.generator(purpose), c_range=c_range)

    @property
    @kept
    def untrained(self) -> "Study":
        """The same study of a freshly initialised model, on fewer sequences."""
        fresh = Transformer(self.model.config, self.generator("untrained"))
        return Study(fresh, UNTRAINED, {}, self.settings)

    def record(self, x: Tensor, *names: str) -> dict[str, Tensor]:
        """Activations on inputs x; the output is under "output"."""
        parts = []
        for part in x.split(CHUNK):
            activations = {}
            activations["output"] = self.model(part, hooks=interventions.record(names, activations))
            parts.append(activations)
        return {name: torch.cat([activations[name] for activations in parts]) for name in parts[0]}

    @property
    @kept
    def activations(self) -> dict[str, Tensor]:
        """On the population, without interventions, once for all claims and figures."""
        names = ["blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized", SCALE]
        of_layer = (
            "attn.hook_pattern",
            "attn.hook_z",
            "attn.hook_result",
            "hook_attn_out",
            "hook_resid_mid",
            "hook_mlp_out",
            "hook_resid_post",
        )
        for l in self.layers:
            names += [f"blocks.{l}.{name}" for name in of_layer]
        return self.record(self.population.inputs, *names)

    @property
    @kept
    def clean(self) -> dict[str, Tensor]:
        """The residual stream on the test sequences before each layer, [size, pos, d_model], where
        interventions start from, and ln_final's scale."""
        names = [f"blocks.{l}.hook_resid_pre" for l in self.layers]
        return self.record(self.test.inputs, *names, SCALE)

    def errors(
        self,
        layer: int,
        hooks: dict[str, Hook],
        count: int | None = None,
        model: Transformer | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """MSE of each of the first `count` test sequences under an intervention that changes nothing before
        `layer`; `scale` [size, pos, 1] takes the place of ln_final's."""
        resid = self.clean[f"blocks.{layer}.hook_resid_pre"][:count]
        errors = []
        for part in torch.arange(len(resid)).split(CHUNK):  # indices of sequences
            part_hooks = hooks
            if scale is not None:
                part_hooks = interventions.join(hooks, interventions.hold({SCALE: scale[part]}))
            output = (model or self.model).run_from(layer, resid[part], part_hooks)
            errors.append(squared_errors(output, self.test.a[part, 1:]))
        return torch.cat(errors)

    @property
    @kept
    def baseline(self) -> Tensor:
        """MSE of each test sequence without any intervention, [size]."""
        return squared_errors(self.clean["output"], self.test.targets)

    def factor(self, errors: Tensor) -> Tensor:
        """The MSE of an arm, relative to the unchanged model's on the same sequences."""
        return errors.mean() / self.baseline[: len(errors)].mean()


def open_study(run: str, step: int | None = None) -> Study:
    """The study of a run folder, at its last step or one in steps/. FileNotFoundError or ValueError unless it
    is as train.py writes it, of affine recurrences."""
    if not os.path.isdir(run):
        raise FileNotFoundError(
            f"there is no run folder {run}: give one with weights.pt and log.csv"
        )
    file = "weights.pt" if step is None else f"steps/{step:08d}.pt"
    path = os.path.join(run, file)
    settings = settings_beside(path)
    if settings.get("task", "affine") != "affine":
        raise ValueError(
            f"{run} learnt {settings['task']}, not affine: see python -m beyond.recurrences"
        )
    from_settings(settings)  # refuses values out of their range
    transformer = load_weights(path)

    # The log up to these weights.
    log = read_log(os.path.join(run, "log.csv"))
    if step is not None:
        rows = max(1, (log["step"] <= step).sum())
        log = {name: column[:rows] for name, column in log.items()}

    study = Study(transformer, POPULATION, log, settings)
    study.meta = {
        "weights": f"{os.path.basename(os.path.abspath(run))}/{file}",
        "sha256": transformer.sha256,
        "step": int(log["step"][-1]) if step is None else step,
        "config": settings,
        "samples": {
            "population": POPULATION,
            "held out, per length": HELD_OUT_PER_LENGTH,
            "few": FEW,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }
    return study


def read_log(path: str) -> dict[str, np.ndarray]:
    """The columns of log.csv by name. ValueError unless there is one, of finite numbers."""
    # No file; no rows, ragged ones, or words in them.
    with contextlib.suppress(OSError, ValueError):
        with open(path, errors="replace") as f:
            lines = [line.split(",") for line in f.read().split()]
        names = lines[0] if lines else []
        columns = dict(zip(names, np.array(lines[1:], dtype=float).T, strict=True))
        if names[:3] == ["step", "loss", "eval_mse"] and np.isfinite(list(columns.values())).all():
            return columns
    raise ValueError(
        f"{path} is no training log: expected columns step,loss,eval_mse,.. and rows of numbers"
    )


# ---------- Statistics ----------
class Line(NamedTuple):
    """Least squares lines, a number of each for every fit."""

    slope: Tensor
    intercept: Tensor
    r2: Tensor


def fit_line(x: Tensor, y: Tensor) -> Line:
    """The least squares line through (x_d, y_d), d over the last dimension."""
    dx = x - x.mean(-1, keepdim=True)
    dy = y - y.mean(-1, keepdim=True)
    xx = (dx * dx).sum(-1)
    yy = (dy * dy).sum(-1)
    xy = (dx * dy).sum(-1)
    slope = xy / xx
    intercept = y.mean(-1) - slope * x.mean(-1)
    return Line(slope, intercept, xy**2 / (xx * yy))


def regress(y: Tensor, *xs: Tensor) -> tuple[list[float], float]:
    """Coefficients of the least squares fit y ~ sum_i coefficient_i x_i over all elements, without a
    constant, and the share of y that it explains."""
    X = torch.stack([x.double().flatten() for x in xs], 1)
    y = y.double().flatten()
    coefficients = torch.linalg.solve(X.T @ X, X.T @ y)
    return coefficients.tolist(), explained(X @ coefficients, y)


def quantiles(values: Tensor, *shares: float) -> list[float]:
    """Those of the values that are not nan."""
    return values.flatten().double().nanquantile(torch.tensor(shares).double()).tolist()


def interval(*values: Tensor, of: Callable = torch.mean) -> list[float]:
    """95% interval of the statistic `of(*values)`, resampled over the first dimension, that of sequences."""
    count = len(values[0])
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    resampled = [of(*(v[picks] for v in values)) for picks in draws]
    return quantiles(torch.tensor(resampled), 0.025, 0.975)


def pick(sample: data.Sample, c: float) -> int:
    """Index of the sequence whose c is nearest to `c`."""
    return int((sample.c - c).abs().argmin())


def moving_dimension(a: Tensor) -> int:
    """The dimension in which a sequence [pos, d_vocab] moves most."""
    return int(a.std(0).argmax())


# ---------- Drawing ----------
# One colour, one thing, in all figures.
TRUTH = "black"
MODEL = "tab:orange"
LAYERS = ("#6baed6", "#2171b5", "#08306b")
PAPERS = "crimson"  # a value that the paper gives
GREY = "0.6"
STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "image.aspect": "auto",
}


def grid(
    rows: int,
    columns: int,
    width: float,
    height: float,
    title: str,
    shared=False,
    height_ratios=None,
):
    """A figure of `rows` x `columns` axes, in inches, and the axes, an array [rows, columns]. It is made
    without pyplot, so that no notebook's backend changes."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    canvas.suptitle(title)
    panels = canvas.subplots(
        rows, columns, sharex=shared, sharey=shared, squeeze=False, height_ratios=height_ratios
    )
    return canvas, panels


def frame(axes, title: str, xlabel: str, ylabel: str):
    """Title and labels of a map, positions and heads as whole numbers, all four sides drawn."""
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def heat(axes, matrix: Tensor, title: str, xlabel: str = "", ylabel: str = "", bar: str = ""):
    """A heat map that diverges about 0, blue positive as in the paper, with a colour bar if that has a label.
    Returns its image."""
    limit = matrix.abs().max().item()
    image = axes.imshow(matrix.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    frame(axes, title, xlabel, ylabel)
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar)
    return image


def attention_map(axes, pattern: Tensor, title: str, xlabel: str = "", ylabel: str = ""):
    """An attention pattern [dest, src], from 0 to 1, the future blank, and its image."""
    past = np.tri(*pattern.shape, dtype=bool)
    image = axes.imshow(np.where(past, pattern.numpy(), np.nan), cmap="Blues", vmin=0, vmax=1)
    frame(axes, title, xlabel, ylabel)
    return image


def write_values(axes, matrix: Tensor):
    """The values of a heat map, written into its cells."""
    largest = matrix.abs().max()
    for (row, column), value in np.ndenumerate(matrix.numpy()):
        text = f"{value:.2f}".replace("-0.00", "0.00")
        color = "white" if abs(value) > 0.6 * largest else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


# ---------- 3.1 Data sampling ----------
@figure(1, "types of affine recurrences")
def figure_sequences(study: Study):
    canvas, panels = grid(
        1, 3, 10, 3, "Types of affine recurrences: 8 of the dimensions, one colour each"
    )
    kinds = {"oscillating": -0.9, "decaying": 0.6, "growing": 1.3}
    for axes, (kind, c) in zip(panels.flat, kinds.items()):
        i = pick(study.population, c)
        axes.plot(study.population.a[i, :, :8], marker=".")
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(
            title=f"{kind}: c = {study.population.c[i]:.2f}", xlabel="n", xticks=range(0, 15, 2)
        )
    panels[0, 0].set_ylabel("component of $a_n$")
    return canvas


# ---------- 3.2 Model architecture, 4.1 Model results ----------
@kept
def held_out_errors(study: Study) -> Tensor:
    """MSE of each sequence of an evaluation set, the lengths 3 .. 14 equally often, [per_length, lengths]."""
    seed = study.generator("held out").initial_seed()
    per_length = HELD_OUT_PER_LENGTH * study.size // POPULATION
    errors = []
    for sample in data.held_out(per_length, seed, d_vocab=study.model.config.d_vocab):
        output = study.record(sample.inputs)["output"]
        errors.append(squared_errors(output, sample.targets))
    return torch.stack(errors, 1)


@claim("MSE after training", 1e-4, 2)
def claim_mse(study: Study) -> Finding:
    """Mean over the lengths 3 to 14 of the MSE over the predictions of a_3 and later, weights of the last
    step, new sequences. At most 2e-4, twice the paper's value, since with a constant learning rate the MSE
    wanders by such a factor between evaluations; partly up to 1e-3."""
    errors = held_out_errors(study)
    mse = errors.mean()

    # The paper's length, beside predicting 0 and the exact solver.
    target = study.population.targets
    fourteen = squared_errors(study.activations["output"], target)
    zero = squared_errors(torch.zeros_like(target), target)
    solved = data.solve_recurrence(study.population.inputs)
    solver = (solved - target[:, FIRST_POSITION:]).pow(2).mean()

    values = {
        "14 inputs": fourteen.mean(),
        "14 inputs, predicting 0": zero.mean(),
        "14 inputs, exact solver": solver,
        "by length, 3 to 14": errors.mean(0),
    }
    if study.log:
        last = study.log["eval_mse"][-20:]
        values["last 20 evaluations, range"] = [last.min(), last.max()]
    return Finding(mse, verdict(mse <= 2e-4, mse <= 1e-3), values, interval(errors))


@figure(2, "loss against step")
def figure_loss(study: Study):
    canvas, panels = grid(1, 1, 8, 4, "Loss as a function of steps")
    axes = panels[0, 0]
    log = study.log
    last = log["eval_mse"][-20:]
    mse = held_out_errors(study).mean()

    axes.semilogy(
        log["step"], log["loss"], color=GREY, label="training loss, mean since the row before"
    )
    held_out = f"held-out MSE; in the last 20 rows {last.min():.1e} to {last.max():.1e}"
    axes.semilogy(log["step"], log["eval_mse"], color=MODEL, label=held_out)
    axes.plot(log["step"][-1], mse, "o", color="black", ms=4, label=f"the claim's MSE: {mse:.2e}")
    axes.axhline(1e-4, color=PAPERS, ls="--", label="paper: 0.0001")
    axes.set(xlabel="step", ylabel="mean squared error")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    return canvas


# ---------- 4.2 Attention patterns ----------
def previous_token_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 1.. to the one before: [batch, n_heads, dest, src] -> [n_heads]."""
    return pattern.diagonal(-1, dim1=-2, dim2=-1).mean((0, 2))


def second_token_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 3.. to position 1: [batch, n_heads, dest, src] -> [n_heads]."""
    return pattern[:, :, 3:, 1].mean((0, 2))


class Alternation(NamedTuple):
    """How far attention alternates from source to source, by head."""

    share: Tensor  # [n_heads]: of a row's variance, that along (-1)^s
    by_distance: (
        Tensor  # [n_heads]: amplitude along (-1)^(n-s), > 0 if similar vectors attend to each other
    )


def alternation(pattern: Tensor) -> Alternation:
    """Over the rows n >= 6 and their sources 2..n, of patterns [batch, n_heads, dest, src]."""
    shares = []
    amplitudes = []
    for n in range(6, pattern.shape[-1]):
        row = pattern[:, :, n, 2 : n + 1]  # [batch, n_heads, src]
        row = row - row.mean(-1, keepdim=True)
        sign = (-1.0) ** torch.arange(2, n + 1)
        sign = sign - sign.mean()
        size = sign.pow(2).sum()
        along = row @ sign  # [batch, n_heads]
        variance = row.pow(2).sum(-1)
        shares.append(along**2 / (variance * size).clamp_min(1e-30))
        amplitudes.append((-1) ** n * along / size)

    share = torch.stack(shares).mean((0, 1))
    amplitude = torch.stack(amplitudes).mean((0, 1))
    return Alternation(share, amplitude)


def layer_2_patterns(study: Study, x: Tensor) -> Tensor:
    """[batch, n_heads, dest, src] on inputs x."""
    name = "blocks.2.attn.hook_pattern"
    return study.record(x, name)[name]


@claim("layer 0 heads, all but one, attend to the previous vector", "7 of 8 heads", 3)
def claim_l0_prev_token(study: Study) -> Finding:
    """Attention from positions 1 to 13 to the one before, by head. More than half of the attention in all
    heads but at most one; partly in more than half of the heads."""
    score = previous_token_score(study.activations["blocks.0.attn.hook_pattern"])
    heads = int((score > 0.5).sum())
    n_heads = len(study.heads)
    all_but_one = heads >= max(n_heads - 1, 1)
    return Finding(score, verdict(all_but_one, heads > n_heads / 2), {"heads that do": heads})


@claim("most layer 1 heads attend to the second vector", "most", 4, 2)
def claim_l1_second_token(study: Study) -> Finding:
    """Attention from positions 3 to 13 to position 1, by head. In more than half of the heads the most
    attended position, with at least twice what uniform attention gives; partly in more than a quarter.
    """
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    score = second_token_score(pattern)
    favourite = pattern[:, :, 3:].mean((0, 2)).argmax(-1)
    sources = torch.arange(3, MAX_LENGTH) + 1  # that positions 3.. see
    uniform = (1 / sources).mean()
    heads = int(((favourite == 1) & (score >= 2 * uniform)).sum())
    values = {
        "heads that do": heads,
        "most attended position": favourite,
        "uniform attention": uniform,
    }
    n_heads = len(study.heads)
    return Finding(score, verdict(heads > n_heads / 2, heads > n_heads / 4), values)


@claim("a checkerboard in layer 2 on alternating sequences, not on others", "yes", 5, 3)
def claim_l2_checkerboard(study: Study) -> Finding:
    """Share of a row's variance over the sources 2..n that alternates from source to source, rows 6 to 13,
    mean over sequences with c in [-1.1, -0.9], by head. A head shows a checkerboard if that is at least one
    half, and none on others if it is at most half as much for c in [0.9, 1.1]. Both in more than half of the
    heads; partly if the first is so in more than half of them, or both in at least two."""
    alternating = alternation(layer_2_patterns(study, study.near(-1).inputs))
    steady = alternation(layer_2_patterns(study, study.near(1).inputs))

    shows = alternating.share >= 0.5
    loses = steady.share <= alternating.share / 2
    showing = int(shows.sum())
    heads = int((shows & loses).sum())
    values = {
        "heads that do": heads,
        "heads with a checkerboard": showing,
        "c near 1": steady.share,
        "amplitude by distance (similar vectors)": alternating.by_distance,
    }
    half = len(study.heads) / 2
    return Finding(alternating.share, verdict(heads > half, showing > half or heads >= 2), values)


def draw_patterns(patterns: Tensor, title: str, labels: list[str]):
    """The attention patterns of a layer, [n_heads, dest, src], a panel with a label each."""
    rows = -(-len(patterns) // 4)
    canvas, panels = grid(rows, 4, 10, 0.5 + 2.4 * rows, title, shared=True)
    for head, (axes, pattern) in enumerate(zip(panels.flat, patterns)):
        image = attention_map(axes, pattern, f"head {head}: {labels[head]}")
    canvas.supxlabel("source position", fontsize=9)
    canvas.supylabel("destination position", fontsize=9)
    canvas.colorbar(image, ax=panels, label="attention")
    return canvas


@figure(3, "layer 0 attention patterns")
def figure_attention_layer_0(study: Study):
    pattern = study.activations["blocks.0.attn.hook_pattern"]
    title = f"Layer 0 attention patterns, mean over {study.size:,} sequences"
    labels = [f"{score:.2f} to the previous" for score in previous_token_score(pattern)]
    return draw_patterns(pattern.mean(0), title, labels)


@figure(4, "layer 1 attention patterns", 2)
def figure_attention_layer_1(study: Study):
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    title = f"Layer 1 attention patterns, mean over {study.size:,} sequences"
    labels = [f"{score:.2f} to the second" for score in second_token_score(pattern)]
    return draw_patterns(pattern.mean(0), title, labels)


def draw_layer_2(study: Study, c: int, kind: str):
    """Layer 2's patterns on the sequence whose c is nearest to `c`."""
    sample = study.near(c)
    i = pick(sample, c)
    pattern = layer_2_patterns(study, sample.inputs[i : i + 1])
    title = f"Layer 2 attention patterns on one {kind} sequence, c = {sample.c[i]:.2f}"
    note = "In the titles: how much of a row is a checkerboard, 100% if it alternates from source to source"
    labels = [f"{share:.0%} checkerboard" for share in alternation(pattern).share]
    return draw_patterns(pattern[0], f"{title}\n{note}", labels)


@figure(5, "layer 2 attention patterns, alternating sequence", 3)
def figure_attention_layer_2_alternating(study: Study):
    return draw_layer_2(study, -1, "alternating")


@figure(6, "layer 2 attention patterns, non-alternating sequence", 3)
def figure_attention_layer_2_other(study: Study):
    return draw_layer_2(study, 1, "non-alternating")


@figure(18, "an attention pattern")
def figure_attention_example(study: Study):
    patterns = study.activations["blocks.0.attn.hook_pattern"][:1, :, :8, :8]
    head = int(previous_token_score(patterns).argmax())
    pattern = patterns[0, head]
    canvas, panels = grid(
        1, 1, 5.4, 4.4, f"An attention pattern: layer 0, head {head}, one sequence"
    )
    axes = panels[0, 0]
    title = "each row sums to 1; the future is masked"
    image = attention_map(axes, pattern, title, "source position", "destination position")
    canvas.colorbar(image, ax=axes, label="attention")
    return canvas


# ---------- 4.3 Direct logit attributions ----------
def direct_attribution(
    model: Transformer, component: Tensor, target: Tensor, scale: Tensor | None = None
) -> Tensor:
    """Direct logit attribution: <ln_final(component) W_U, target>, [batch, pos, ...], of what something adds
    to the residual stream, [batch, pos, ..., d_model]; target [batch, pos, d_vocab].

    scale None is the paper's text: ln_final on the component alone, which forgets its size. The field's
    standard is ln_final.hook_scale: all components and ln_final.b W_U + b_U add up to the output's.
    """
    ln = model.ln_final
    if scale is None:
        normalised = F.layer_norm(component, ln.w.shape, ln.w, None, ln.eps)
    else:
        between = [1] * (component.dim() - 2)
        scale = scale.reshape(*scale.shape[:2], *between)
        normalised = (component - component.mean(-1, keepdim=True)) / scale * ln.w
    return torch.einsum("bp...d,bpd->bp...", normalised, target @ model.unembed.W_U.T)


@kept
def attributions(study: Study, hook: str, reading: str, goal: str) -> Tensor:
    """Population mean of `direct_attribution` of what is at a hook point of each layer, [n_layers, ..., pos];
    reading "paper" or "standard", to the "next" vector a_{m+1} or to the "step" a_{m+1} - a_m."""
    target = study.population.targets
    if goal == "step":
        target = target - study.population.inputs
    scale = study.activations[SCALE] if reading == "standard" else None
    by_layer = []
    for l in study.layers:
        written = study.activations[f"blocks.{l}.{hook}"]
        attributed = direct_attribution(study.model, written, target, scale)  # [batch, pos, ...]
        by_layer.append(attributed.mean(0))
    return torch.stack(by_layer).movedim(1, -1)


def head_attribution(study: Study, reading: str, goal: str) -> Tensor:
    """Mean over positions 2 to 13 of what each head's output attributes, [n_layers, n_heads]."""
    return attributions(study, "attn.hook_result", reading, goal)[..., FIRST_POSITION:].mean(-1)


@claim("direct attribution: layer 0 > 0, layer 1 near 0, layer 2 < 0", "+, 0, -", 7, 3)
def claim_dla_sign(study: Study) -> Finding:
    """Mean over positions 2 to 13, ln_final on the head's output alone (the paper's reading), targets a_{m+1}
    and a_{m+1} - a_m. As a mean over heads layer 0 is positive, layer 2 negative and layer 1 at most a
    quarter of the largest, for both targets, which correlate over the heads by at least 0.9 ("nearly
    identical results"). Partly if layer 0 is positive and layer 2 negative for both."""
    by_head = head_attribution(study, "paper", "next")
    goals = torch.stack([by_head, head_attribution(study, "paper", "step")])  # [goal, layer, head]
    layers = goals.mean(2)  # [goal, layer]
    correlation = torch.corrcoef(goals.flatten(1))[0, 1]

    layer_0, layer_1, layer_2 = layers.T[:3]  # [goal] each
    signs = layer_0.min() > 0 and layer_2.max() < 0
    largest = layers.abs().amax(1)
    silent = (layer_1.abs() <= 0.25 * largest).all()
    same = correlation >= 0.9

    values = {"correlation of the two targets over the heads": correlation}
    for reading in ("paper", "standard"):
        for goal in ("next", "step"):
            values[f"{reading}, {goal}, by layer"] = head_attribution(study, reading, goal).mean(1)
    return Finding(by_head, verdict(signs and silent and same, signs), values)


@claim("layer 1's heads write to the orthogonal complement of the embedding space", "yes", 7, 2)
def claim_l1_orthogonal(study: Study) -> Finding:
    """Mean share of the norm of what layer 1's heads write outside the span of W_E. At least 0.95; partly if
    that of what they write outside the span of W_U is, which makes their effects "less apparent".
    """
    written = study.activations["blocks.1.attn.hook_result"].sum(2)
    W_E = study.model.embed.W_E
    outside_W_E = outside_share(written, W_E)
    outside_W_U = outside_share(written, study.model.unembed.W_U.T).mean()
    chance = outside_share(random_vectors(study), W_E).mean()

    measured = outside_W_E.mean()
    values = {"outside W_U": outside_W_U, "random": chance}
    outcome = verdict(measured >= 0.95, outside_W_U >= 0.95)
    return Finding(measured, outcome, values, interval(outside_W_E))


def draw_attribution(
    panels, study: Study, title: str, mean: Tensor, by_position: Tensor, unit: str
):
    """A column of figure 7: the mean [layer, head] above what it is at each position [layer, head, pos]."""
    heat(panels[0], mean, f"{title}\nmean over positions 2 to 13", "head", "layer", "dot product")
    write_values(panels[0], mean)

    # From position 2 on, the first at which the next vector is determined.
    rows = by_position.flatten(0, 1)[:, FIRST_POSITION:]
    heat(panels[1], rows, "by position", "position", "layer.head", unit)
    names = [f"{l}.{h}" for l in study.layers for h in study.heads]
    panels[1].set_yticks(range(len(names)), names, fontsize=7)
    panels[1].set_xticks(
        range(0, MAX_LENGTH - FIRST_POSITION, 2), range(FIRST_POSITION, MAX_LENGTH, 2)
    )


@figure(7, "direct logit attribution of the heads")
def figure_head_attribution(study: Study):
    title = "Direct logit attribution of the heads to the next vector"
    canvas, panels = grid(2, 2, 9.5, 8, title, height_ratios=[1, 2.6])
    mean = head_attribution(study, "paper", "next")
    by_position = attributions(study, "attn.hook_result", "paper", "next")
    title = "(a) the paper's: ln_final on the head alone"
    draw_attribution(panels[:, 0], study, title, mean, by_position, "dot product")

    # As a share of the target: the last ones are longest and would wash out the rest.
    mean = head_attribution(study, "standard", "next")
    squared_length = study.population.targets.pow(2).sum(-1).mean(0)  # [pos]
    share = attributions(study, "attn.hook_result", "standard", "next") / squared_length
    title = "(b) standard: the whole stream's scale"
    draw_attribution(panels[:, 1], study, title, mean, share, "share of the target")
    return canvas


# ---------- 4.4 Zeroth layer OV circuits ----------
def outside_share(x: Tensor, W: Tensor) -> Tensor:
    """Share of the norm of x [..., d_model] outside the span of the rows of W, in [0, 1] (4.4)."""
    projection = torch.linalg.pinv(W, rtol=1e-5) @ W  # also when the rows are dependent
    outside = x - x @ projection
    return outside.norm(dim=-1) / x.norm(dim=-1)


def random_vectors(study: Study) -> Tensor:
    """Gaussian vectors, as many as the population has residual stream vectors, [size, 14, d_model]."""
    shape = (study.size, MAX_LENGTH, study.model.config.d_model)
    return torch.randn(shape, generator=study.generator("random vectors"))


def read_by_layer_0(study: Study, resid: Tensor) -> Tensor:
    """The data coordinates of residual stream vectors: [..., d_model] -> x W_E^+, [..., d_vocab]."""
    return resid @ torch.linalg.pinv(study.model.embed.W_E)


def written_by_layer_0(study: Study, resid: Tensor) -> Tensor:
    """What all of layer 0's heads make of residual stream vectors: [..., d_model] -> ln1(x) OV W_U,
    [..., d_vocab]."""
    normalised = F.layer_norm(resid, resid.shape[-1:], eps=study.model.config.eps)
    return normalised @ ov_circuit(study.model, 0).sum(0) @ study.model.unembed.W_U


@kept
def ov_fits(study: Study) -> dict[str, Line]:
    """What the OV circuits of layer 0 make of vectors, a line a vector, {reading: lines [batch, pos]}. The
    measured reading, "data vectors", is the points (a_d, (ln1(x) OV W_U)_d); "head h" is its part. Both are
    nan for vectors shorter than 1, which after ln1 are mostly position embedding."""
    a = study.population.inputs
    resid = study.activations["blocks.0.hook_resid_pre"]
    ov = ov_circuit(study.model, 0)
    large = a.norm(dim=-1) >= 1

    def fit_large(written: Tensor) -> Line:
        line = fit_line(a, written)
        return Line(*(number.where(large, torch.nan) for number in line))

    x = random_vectors(study)
    fits = {
        "data vectors": fit_large(written_by_layer_0(study, resid)),
        "random vectors": fit_line(read_by_layer_0(study, x), written_by_layer_0(study, x)),
        "d_model coordinates": fit_line(resid, resid @ ov.sum(0)),
    }
    normalised = study.activations["blocks.0.ln1.hook_normalized"]
    for h in study.heads:
        fits[f"head {h}"] = fit_large(normalised @ ov[h] @ study.model.unembed.W_U)
    return fits


def ov_values(study: Study, number: str) -> dict[str, object]:
    """Of one number of the lines, "slope" or "r2": its spread over the data vectors, and the median of every
    other reading."""
    medians = {name: getattr(line, number).nanmedian() for name, line in ov_fits(study).items()}
    del medians["data vectors"]
    spread = quantiles(getattr(ov_fits(study)["data vectors"], number), 0.05, 0.5, 0.95)
    return {"5%, 50%, 95% of the vectors": spread} | medians


@claim("layer 0 OV is linear on residual stream vectors: R^2", 0.83, 8)
def claim_l0_ov_r2(study: Study) -> Finding:
    """Median over vectors of norm at least 1 of the R^2 of (a_d, (ln1(x) OV W_U)_d), OV summed over heads.
    Nearly linear: at least the paper's value less 0.1; partly if at least 0.5."""
    r2 = ov_fits(study)["data vectors"].r2
    median = r2.nanmedian()
    outcome = verdict(median >= 0.73, median >= 0.5)
    return Finding(median, outcome, ov_values(study, "r2"), interval(r2, of=torch.nanmedian))


@claim("its slope", "2.1 to 2.5", 8)
def claim_l0_ov_slope(study: Study) -> Finding:
    """Median slope over the same vectors. Within 2.1 to 2.5; partly within a factor of two of that."""
    slope = ov_fits(study)["data vectors"].slope
    median = slope.nanmedian()
    outcome = verdict(2.1 <= median <= 2.5, 1.05 <= median <= 5)
    return Finding(median, outcome, ov_values(study, "slope"), interval(slope, of=torch.nanmedian))


@claim("its intercept", "near 0", 8)
def claim_l0_ov_intercept(study: Study) -> Finding:
    """Intercepts over the same vectors, relative to the root mean square of (ln1(x) OV W_U)_d. At most a
    tenth in 95% of the vectors; partly if so on average. (In d_model coordinates it is 0 by construction.)
    """
    intercept = ov_fits(study)["data vectors"].intercept
    written = written_by_layer_0(study, study.activations["blocks.0.hook_resid_pre"])
    unit = written[~intercept.isnan()].pow(2).mean().sqrt()
    relative = intercept / unit

    widest = quantiles(relative.abs(), 0.95)[0]
    mean = relative.abs().nanmean()
    outcome = verdict(widest <= 0.1, mean <= 0.1)
    return Finding(
        relative.nanmedian(), outcome, {"95% within": widest}, interval(relative, of=torch.nanmedian)
    )


@claim("the same R^2 on random vectors, lower", 0.598, 10)
def claim_l0_ov_r2_random(study: Study) -> Finding:
    """Median R^2 of (x W_E^+, ln1(x) OV W_U) over Gaussian vectors x in R^d_model. Lower than of residual
    stream vectors by at least 0.1, yet at least 0.25, which can be seen; partly if only one of the two.
    """
    r2 = ov_fits(study)["random vectors"].r2
    median = r2.median()
    residual_stream = ov_fits(study)["data vectors"].r2.nanmedian()
    lower = residual_stream - median >= 0.1
    visible = median >= 0.25
    outcome = verdict(lower and visible, lower or visible)
    return Finding(median, outcome, {"residual stream": residual_stream}, interval(r2, of=torch.median))


@claim("share of the norm of layer 0's OV x outside the span of W_E", 0.8415, 9)
def claim_l0_orthogonal(study: Study) -> Finding:
    """Mean over residual stream vectors, OV summed over heads. At least 0.8415 less 0.05 and above a random
    direction's, below which the circuit would prefer the embedding space; partly if only the first.
    """
    W_E = study.model.embed.W_E
    ov = ov_circuit(study.model, 0).sum(0)
    share = outside_share(study.activations["blocks.0.hook_resid_pre"] @ ov, W_E)
    x = random_vectors(study)
    x = x - x.mean(-1, keepdim=True)  # as all that a folded model writes
    chance = outside_share(x, W_E).mean()

    enough = share.mean() >= 0.8415 - 0.05
    more = share.mean() > chance
    values = {"random direction": chance, "OV of random vectors": outside_share(x @ ov, W_E).mean()}
    return Finding(share.mean(), verdict(enough and more, enough), values, interval(share))


def scatter_fit(axes, x: Tensor, y: Tensor, title: str, xlabel: str, ylabel: str):
    """The points (x_d, y_d) of one vector with their least squares line."""
    line = fit_line(x, y)
    ends = torch.stack([x.min(), x.max()])
    axes.scatter(x, y, s=9, color=LAYERS[0], lw=0)
    label = f"slope {line.slope:.2f}, intercept {line.intercept:.3f}, $R^2$ {line.r2:.2f}"
    axes.plot(ends, line.intercept + line.slope * ends, color="black", lw=1, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(1.1 * y.min(), 1.5 * y.max()))
    axes.legend(loc="upper left", handlelength=1, borderpad=0)


@figure(8, "OV of layer 0 on residual stream vectors")
def figure_ov_layer_0_resid(study: Study):
    """The vector of median slope in two readings, and the slopes of all in the second, see `ov_fits`."""
    slope = ov_fits(study)["data vectors"].slope
    finite = slope[~slope.isnan()]
    if not len(finite):
        raise FloatingPointError("no vector has a slope")
    median = slope == slope.nanmedian()  # torch's median is one of the elements
    resid = study.activations["blocks.0.hook_resid_pre"][median][0]
    canvas, panels = grid(1, 3, 11, 3.6, "OV of layer 0 on residual stream vectors, heads summed")

    ov = ov_circuit(study.model, 0).sum(0)
    title = f"the paper's: all {len(resid)} coordinates of the\nresidual stream, one vector"
    scatter_fit(panels[0, 0], resid, resid @ ov, title, "$x_d$", "$(OV\\,x)_d$")

    vector = study.population.inputs[median][0]
    title = "the same vector between data coordinates,\nwith $\\ln_1$"
    scatter_fit(
        panels[0, 1],
        vector,
        written_by_layer_0(study, resid),
        title,
        "$a_d$",
        "$(\\ln_1(x)\\;OV\\;W_U)_d$",
    )

    axes = panels[0, 2]
    axes.hist(finite, bins=60, color=LAYERS[0])
    axes.axvspan(2.1, 2.5, color=PAPERS, alpha=0.25, lw=0, zorder=0, label="paper: 2.1 to 2.5")
    title = f"between data coordinates,\nall {len(finite):,} vectors of norm at least 1"
    axes.set(title=title, xlabel="slope", ylabel="vectors")
    axes.legend()
    return canvas


@figure(9, "sum of the OV circuits of layer 0")
def figure_ov_layer_0_sum(study: Study):
    canvas, panels = grid(1, 2, 10, 4.6, "Sum of the OV circuits over all heads of layer 0")
    paper = ov_circuit(study.model, 0).sum(0)
    title = f"the paper's, $W_V W_O$: cosine with I {identity_cosine(paper):.2f}"
    xlabel = "written residual stream dimension"
    heat(panels[0, 0], paper, title, xlabel, "read residual stream dimension", "weight")

    between_data = data_ov_circuit(study.model, 0).sum(0)
    cosine = identity_cosine(between_data)
    title = f"between data coordinates, $W_E W_V W_O W_U$: cosine with I {cosine:.2f}"
    heat(
        panels[0, 1], between_data, title, "written data dimension", "read data dimension", "weight"
    )
    return canvas


@figure(10, "OV of layer 0 on a random vector")
def figure_ov_layer_0_random(study: Study):
    canvas, panels = grid(1, 2, 10, 3.8, "OV of layer 0 (heads summed) on random vectors")
    x = random_vectors(study)[0, 0]
    title = (
        f"one of them; the slope is small since ln1 divides\nit by {x.std():.1f}, data by much less"
    )
    scatter_fit(
        panels[0, 0],
        read_by_layer_0(study, x),
        written_by_layer_0(study, x),
        title,
        "$(x\\,W_E^+)_d$",
        "$(\\ln_1(x)\\;OV\\;W_U)_d$",
    )

    axes = panels[0, 1]
    bins = np.linspace(0.5, 1, 101)
    random_r2 = ov_fits(study)["random vectors"].r2
    label = f"random vectors, median {random_r2.nanmedian():.2f}"
    axes.hist(random_r2[~random_r2.isnan()], bins, density=True, color=GREY, label=label)
    data_r2 = ov_fits(study)["data vectors"].r2
    label = f"data vectors, median {data_r2.nanmedian():.2f}"
    axes.hist(
        data_r2[~data_r2.isnan()], bins, density=True, color=LAYERS[0], alpha=0.7, label=label
    )
    axes.axvline(0.598, color=PAPERS, ls=":", label="paper, random vectors: 0.598")
    axes.axvline(0.83, color=PAPERS, ls="--", label="paper, data vectors: 0.83")
    axes.set(title="all vectors", xlabel="$R^2$ of the line", ylabel="density", xlim=(0.5, 1))
    axes.legend(
        loc="upper left", bbox_to_anchor=(0.22, 1), frameon=True, framealpha=1, edgecolor="white"
    )
    return canvas


# ---------- 4.5 First layer ----------
def mean_ablation(study: Study, heads: Iterable = (), mlps: Iterable = ()) -> dict[str, Hook]:
    """Hooks that hold heads and MLPs at their mean at each position of the population."""
    means = interventions.mean_outputs(study.activations)
    return interventions.replace_outputs(means, heads, mlps)


@claim("MSE with all layer 1 heads mean-ablated, from 1e-4", 2e-4, 4, 2)
def claim_l1_mean_ablation(study: Study) -> Finding:
    """Means at each position over the population, MSE on other sequences. All heads of layer 1 at once
    multiply it by at most 4 (the paper's factor is 2); partly if only every head by itself does, or all at
    once with ln_final's scale held at its clean value."""
    # The heads of each layer; those of layers 0 and 2 and the MLPs to compare.
    ablations = [mean_ablation(study, interventions.layer_heads(study.model, l)) for l in study.layers]
    by_layer = [study.errors(l, ablation) for l, ablation in enumerate(ablations)]
    by_mlp = [
        study.factor(study.errors(l, mean_ablation(study, mlps=[l]), FEW)) for l in study.layers
    ]
    by_head = [
        study.factor(study.errors(1, mean_ablation(study, [(1, h)]), FEW)) for h in study.heads
    ]
    errors = by_layer[1]
    times = study.factor(errors)
    times_held = study.factor(study.errors(1, ablations[1], scale=study.clean[SCALE]))

    values = {
        "times the unchanged MSE": times,
        "times, clean scale": times_held,
        "times, each head": by_head,
        "times, heads by layer": [study.factor(errors) for errors in by_layer],
        "times, MLP by layer": by_mlp,
        "unchanged": study.baseline.mean(),
        "difference, interval": interval(errors - study.baseline),
    }
    outcome = verdict(times <= 4, times_held <= 4 or max(by_head) <= 4)
    return Finding(errors.mean(), outcome, values, interval(errors))


def effective_rank(matrix: Tensor) -> Tensor:
    """Participation ratio of the singular values, (sum s)^2 / sum s^2, of matrices [..., m, n]: 1 for rank
    one, n for an n x n rotation."""
    s = torch.linalg.svdvals(matrix.double())
    ratio = s.sum(-1) ** 2 / (s**2).sum(-1)
    return ratio.float()


@claim("OV of layer 1 head 0 has low effective rank", "low", 11, 2)
def claim_l1_ov_effective_rank(study: Study) -> Finding:
    """Participation ratio of the singular values. At most half of what an untrained head has; partly if at
    least a tenth less."""
    ranks = torch.stack([effective_rank(ov_circuit(study.model, l)) for l in study.layers])
    untrained = effective_rank(ov_circuit(study.untrained.model, 1)).mean()
    measured = ranks[1, 0]
    share = measured / untrained
    values = {"all heads": ranks, "share of an untrained head's": share}
    return Finding(measured, verdict(share <= 0.5, share <= 0.9), values)


@figure(11, "OV of layer 1: head 0 and the ranks of all heads", 2)
def figure_ov_layer_1(study: Study):
    canvas, panels = grid(
        1, 2, 10, 4.4, "OV circuits of layer 1: a few directions carry what is written"
    )
    ov = ov_circuit(study.model, 1)
    title = "head 0 as in the paper, $W_V W_O$"
    xlabel = "written residual stream dimension"
    heat(panels[0, 0], ov[0], title, xlabel, "read residual stream dimension", "weight")

    # Relative to the first, so that the shape is compared and not the size.
    axes = panels[0, 1]
    d_head = study.model.config.d_head  # the rank of a head at most
    untrained = torch.linalg.svdvals(ov_circuit(study.untrained.model, 1))[:, :d_head]
    axes.plot((untrained / untrained[:, :1]).T, color=GREY, lw=1)
    trained = torch.linalg.svdvals(ov)[:, :d_head]
    axes.plot((trained / trained[:, :1]).T, color=LAYERS[1], lw=1)
    axes.plot(trained[0] / trained[0, 0], color=LAYERS[1], lw=2.5)
    axes.plot([], [], color=LAYERS[1], label="the heads of layer 1 (thick: head 0)")
    axes.plot([], [], color=GREY, label="untrained heads")
    axes.set(
        title="singular values", xlabel="number", ylabel="relative to the largest", ylim=(0, None)
    )
    axes.legend()
    return canvas


# ---------- 4.6 Second layer QK/OV circuits ----------
def identity_cosine(matrix: Tensor) -> Tensor:
    """Cosine between square matrices [..., n, n] and I: trace / (Frobenius norm * sqrt(n)), in [-1, 1]."""
    n = matrix.shape[-1]
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace / (matrix.norm(dim=(-2, -1)) * n**0.5)


def eigenvalue_score(circuit: Tensor) -> Tensor:
    """sum(lambda) / sum(|lambda|) of square matrices [..., n, n], in [-1, 1]: 1 copies, -1 copies negatively
    (4.6). For a product of thin factors A B pass B A, which has the same eigenvalues but for zeros.
    """
    eigenvalues = torch.linalg.eigvals(circuit.double())
    score = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)
    return score.float()


def identity_finding(study: Study, circuit: Callable, data_circuit: Callable, sign: int) -> Finding:
    """How far the circuits of layer 2 are like `sign` times I; circuit and data_circuit are functions of a
    model and a layer."""
    cosines = [identity_cosine(data_circuit(study.model, l)) for l in study.layers]
    in_d_model = [identity_cosine(circuit(study.model, l)).mean() for l in study.layers]
    like = sign * cosines[2] >= 0.5
    heads = int(like.sum())
    values = {
        "heads that do": heads,
        "layer 0": cosines[0],
        "layer 1": cosines[1],
        "d_model, by layer": in_d_model,
    }
    return Finding(cosines[2], verdict(like.all(), heads > len(study.heads) / 2), values)


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


def similarity_correlation(study: Study, x: Tensor) -> Tensor:
    """Correlation of layer 2's scores with the cosine between what destination and source carry in W_U's
    coordinates, over pairs of a source and a later destination from 6 on, of each sequence by itself, inputs
    x [batch, pos, d_vocab]: mean, [n_heads]."""
    scores_name = "blocks.2.attn.hook_attn_scores"
    resid_name = "blocks.2.hook_resid_pre"
    activations = study.record(x, scores_name, resid_name)
    position = torch.arange(x.shape[1])
    pairs = (position[:, None] > position) & (position >= 6)[:, None]  # [dest, src]

    carried = F.normalize(activations[resid_name] @ study.model.unembed.W_U, dim=-1)
    cosine = carried @ carried.transpose(1, 2)
    cosine = cosine[:, None, pairs]  # [batch, 1, pair]
    scores = activations[scores_name][:, :, pairs]  # [batch, n_heads, pair]
    line = fit_line(cosine, scores)
    correlation = line.slope.sign() * line.r2.sqrt()
    return correlation.mean(0)


@claim("QK circuits of layer 2 find vectors that are similar to the destination's", "yes", 13, 3)
def claim_l2_similarity(study: Study) -> Finding:
    """Correlation, over the pairs of a source and a later destination from 6 to 13, of attention scores with
    the cosine between what the two carry in W_U's coordinates, sequences with c in [-1.1, -0.9], each by
    itself, mean, by head. At least 0.5 in every head; partly in more than half of them."""
    alternating = similarity_correlation(study, study.near(-1).inputs)
    steady = similarity_correlation(study, study.near(1).inputs)
    heads = int((alternating >= 0.5).sum())
    n_heads = len(study.heads)
    values = {"heads that do": heads, "c near 1": steady}
    return Finding(alternating, verdict(heads == n_heads, heads > n_heads / 2), values)


def draw_circuits(circuit: Tensor, between_data: Tensor, title: str, xlabel: str, ylabel: str):
    """Circuits of a layer: head 0 as the paper draws it, and every head between data coordinates."""
    title += " circuits of layer 2: cosine with I. Blue is positive; each panel has its own range"
    canvas, panels = grid(-(-(len(between_data) + 1) // 3), 3, 9, 8.6, title)
    cosine = identity_cosine(circuit[0])
    heat(
        panels.flat[0],
        circuit[0],
        f"head 0, the paper's {len(circuit[0])} coordinates: {cosine:.2f}",
    )
    for head, (axes, matrix) in enumerate(zip(panels.flat[1:], between_data)):
        heat(axes, matrix, f"head {head}, data coordinates: {identity_cosine(matrix):.2f}")
    for axes in panels.flat:
        axes.set(aspect="equal", xticks=[], yticks=[])
    panels[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    return canvas


@figure(12, "OV of layer 2", 3)
def figure_ov_layer_2(study: Study):
    circuit = ov_circuit(study.model, 2)
    between_data = data_ov_circuit(study.model, 2)
    return draw_circuits(circuit, between_data, "OV", "written dimension", "read dimension")


@figure(13, "QK of layer 2", 3)
def figure_qk_layer_2(study: Study):
    circuit = qk_circuit(study.model, 2)
    between_data = data_qk_circuit(study.model, 2)
    return draw_circuits(circuit, between_data, "QK", "source dimension", "destination dimension")


def lens(study: Study, hook: str, own_scale: bool = False) -> Tensor:
    """Residual stream at a hook point of the population, unembedded (logit lens), [size, pos, d_vocab]: with
    the scale that ln_final has at the end, so that parts add up, or with the stream's own."""
    hooks = {} if own_scale else interventions.hold({SCALE: study.activations[SCALE]})
    return study.model.run_from(len(study.layers), study.activations[hook], hooks)


class LensShare(NamedTuple):
    """How much of the next vector the lens at a hook point explains, positions 2 to 13."""

    share: float
    constant: float  # by which it does best
    rescaled: float  # the share then


def lens_share(study: Study, hook: str, own_scale: bool = False) -> LensShare:
    target = study.population.targets[:, FIRST_POSITION:]
    unembedded = lens(study, hook, own_scale)[:, FIRST_POSITION:]
    (constant,), rescaled = regress(target, unembedded)
    return LensShare(explained(unembedded, target), constant, rescaled)


@claim("the residual stream after layer 0, unembedded, is a fair estimate", "Figure 14", 14)
def claim_lens_after_l0(study: Study) -> Finding:
    """1 - MSE / MSE of predicting 0, positions 2 to 13, unembedded with the scale that ln_final has at the
    end. Fair: at least nine tenths of what the best fixed linear predictor from a_n and a_{n-1} explains;
    partly if, times the best constant, it explains at least half: the right shape in the wrong size.
    """
    hook = "blocks.0.hook_resid_post"
    after = lens_share(study, hook)
    truth, a_n, before = neighbours(study.population.a)
    coefficients, linear = regress(truth, a_n, before)

    values = {
        "best constant, and rescaled by it": [after.constant, after.rescaled],
        "own scale: share, best constant, and rescaled": lens_share(study, hook, own_scale=True),
        "best fixed linear predictor of two vectors": linear,
        "its coefficients": coefficients,
        "the model": explained(study.activations["output"][:, FIRST_POSITION:], truth),
    }
    outcome = verdict(after.share >= 0.9 * linear, after.rescaled >= 0.5)
    error = lens(study, hook)[:, FIRST_POSITION:] - truth
    left = error.pow(2).sum((1, 2))
    size = truth.pow(2).sum((1, 2))
    ci = interval(left, size, of=lambda left, size: 1 - left.sum() / size.sum())
    return Finding(after.share, outcome, values, ci)


@claim("after layer 0 an overestimate, which layer 2's heads refine", "yes", 14, 3)
def claim_refinement(study: Study) -> Finding:
    """Explained shares of the next vector, positions 2 to 13, unembedded with the final scale. After layer 0
    at least one half; it is an overestimate: the best constant is at most 0.95; and layer 2's heads leave at
    most half of what is unexplained before them. Partly if only the overestimate is missing."""
    after_layer_0 = lens_share(study, "blocks.0.hook_resid_post")
    before_layer_2 = lens_share(study, "blocks.1.hook_resid_post")
    after_its_heads = lens_share(study, "blocks.2.hook_resid_mid")

    overestimate = after_layer_0.constant <= 0.95
    left_before = 1 - before_layer_2.share
    left_after = 1 - after_its_heads.share
    refined = after_layer_0.share >= 0.5 and left_after <= left_before / 2

    values = {
        "after layer 0: share, best constant, rescaled": after_layer_0,
        "before layer 2": before_layer_2.share,
        "after its heads": after_its_heads.share,
    }
    return Finding(after_layer_0.share, verdict(overestimate and refined, refined), values)


@figure(14, "residual stream after layer 0 against the true output")
def figure_lens_after_layer_0(study: Study):
    title = "Residual stream after layer 0, unembedded with the final scale, against the true next vector"
    canvas, panels = grid(1, 3, 10.5, 3.6, title)
    after = lens(study, "blocks.0.hook_resid_post")
    output = study.activations["output"]
    positions = range(FIRST_POSITION, MAX_LENGTH)
    for axes, c in zip(panels.flat, (-1.0, 0.6, 1.2)):
        i = pick(study.population, c)
        truth = study.population.a[i, 1:]
        dimension = moving_dimension(truth)
        shown = (slice(FIRST_POSITION, None), dimension)

        axes.plot(positions, truth[shown], color=TRUTH, marker="o", ms=4, label="true next vector")
        axes.plot(positions, after[i][shown], color=LAYERS[0], marker=".", label="after layer 0")
        axes.plot(
            positions, output[i][shown], color=MODEL, ls="--", marker=".", label="model's output"
        )
        axes.axhline(0, color="0.9", zorder=0)
        axes.set(title=f"c = {study.population.c[i]:.2f}, dimension {dimension}", xlabel="position")
    panels[0, 0].set_ylabel("component")
    canvas.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas


def data_eigenvalue_scores(study: Study) -> Tensor:
    """Eigenvalue scores of OV between data coordinates, [n_layers, n_heads]."""
    return torch.stack([eigenvalue_score(data_ov_circuit(study.model, l)) for l in study.layers])


def d_model_eigenvalue_scores(study: Study) -> Tensor:
    """Those of W_V W_O, as in the paper, from the d_head x d_head product W_O W_V, [n_layers, n_heads]."""
    return torch.stack(
        [eigenvalue_score(block.attn.W_O @ block.attn.W_V) for block in study.model.blocks]
    )


@claim("OV eigenvalue scores: layer 2 copies negatively", "layer 2 negative", 15, 3)
def claim_eigenvalue_score(study: Study) -> Finding:
    """sum(lambda) / sum(|lambda|) of OV between data coordinates, by layer and head. At most -0.5 in every
    head of layer 2; partly in more than half of them."""
    scores = data_eigenvalue_scores(study)
    negative = scores[2] <= -0.5
    outcome = verdict(negative.all(), negative.sum() > len(study.heads) / 2)
    return Finding(scores, outcome, {"d_model": d_model_eigenvalue_scores(study)})


@figure(15, "OV eigenvalue scores")
def figure_eigenvalue_scores(study: Study):
    title = "Eigenvalue scores of the OV circuits: 1 copies, -1 copies negatively"
    canvas, panels = grid(1, 2, 10, 2.8, title)
    readings = {
        "the paper's: of $W_V W_O$": d_model_eigenvalue_scores(study),
        "between data coordinates": data_eigenvalue_scores(study),
    }
    for axes, (title, scores) in zip(panels.flat, readings.items()):
        image = heat(axes, scores, title, "head", "layer")
        image.set_clim(-1, 1)
        write_values(axes, scores)
    canvas.colorbar(image, ax=panels, label="score")
    return canvas


@claim("MSE with QK of the layer 2 heads that are like I a random pseudoinverse", 1e-4, 13, 3)
def claim_l2_qk_pinv(study: Study) -> Finding:
    """W_Q random and W_K^T its pseudoinverse, no b_Q and b_K, mean over W_Q, in the five heads whose QK is
    most like I at once (the numbers 0 to 4 mean nothing in another model). At most 1.5 times the unchanged
    MSE (the paper prints 0.0001 for both), and uniform attention and random W_Q and W_K of the trained norm
    do more harm (the interval of the difference is above 0); partly if only that, or if each of the five
    stays within 1.5 by itself."""
    pinv_qk = interventions.pseudoinverse_qk
    likest = identity_cosine(data_qk_circuit(study.model, 2)).argsort(descending=True)[:5].tolist()

    def replaced(change: Callable, heads: list[int], count: int | None = None) -> Tensor:
        """MSE of each sequence, mean over random matrices."""
        generator = study.generator(f"{change.__name__} {heads}")
        arms = []
        for _ in range(QK_DRAWS):
            changed = change(study.model, 2, heads, generator)
            arms.append(study.errors(2, {}, count, changed))
        return torch.stack(arms).mean(0)

    pinv = replaced(pinv_qk, likest)
    random_qk = replaced(interventions.random_qk, likest)
    uniform = study.errors(2, {}, model=interventions.replace_qk(study.model, 2, likest, 0.0, 0.0))
    single = torch.stack([study.factor(replaced(pinv_qk, [h], FEW)) for h in study.heads])

    times = study.factor(pinv)
    uniform_gap = interval(uniform - pinv)
    random_gap = interval(random_qk - pinv)
    unchanged = times <= 1.5
    telling = uniform_gap[0] > 0 and random_gap[0] > 0
    each_unchanged = single[likest].max() <= 1.5

    values = {
        "heads": likest,
        "times": times,
        "times, uniform": study.factor(uniform),
        "times, random": study.factor(random_qk),
        "uniform and random less pseudoinverse": [uniform_gap, random_gap],
        "times, each head by itself": single,
        "times, heads 0 to 4": study.factor(replaced(pinv_qk, list(study.heads[:5]), FEW)),
    }
    outcome = verdict(unchanged and telling, telling or each_unchanged)
    return Finding(pinv.mean(), outcome, values, interval(pinv))


# ---------- 4.7 Analysis of MLPs ----------
@kept
def mlp_cosines(study: Study) -> Tensor:
    """Cosine of what each MLP writes, unembedded, with the next vector, mean over the population, [n_layers,
    pos]: the attribution without the length of the target, which is longest at the end."""
    target = study.population.targets
    by_layer = []
    for l in study.layers:
        written = study.activations[f"blocks.{l}.hook_mlp_out"] @ study.model.unembed.W_U
        by_layer.append(F.cosine_similarity(written, target, dim=-1).mean(0))
    return torch.stack(by_layer)


@claim("the MLPs push in the right direction mainly at the last positions", "Figure 16", 16)
def claim_mlp_dla(study: Study) -> Finding:
    """Cosine of what each MLP writes, unembedded, with the next vector, [layer][position]. Mean over layers
    positive at positions 11 to 13 and more than twice that at 2 to 10; partly if positive and larger.
    """
    cosines = mlp_cosines(study)
    mean = cosines.mean(0)
    late = mean[-3:].mean()
    early = mean[FIRST_POSITION:-3].mean()
    length = study.population.targets.norm(dim=-1).mean(0)

    values = {
        "positions 11 to 13": late,
        "positions 2 to 10": early,
        "dot product (the paper's)": attributions(study, "hook_mlp_out", "paper", "next"),
        "length of the targets, late / early": length[-3:].mean()
        / length[FIRST_POSITION:-3].mean(),
    }
    mainly = mean[-3:].min() > 0 and late > 2 * early
    return Finding(cosines, verdict(mainly, late > max(early, 0)), values)


@figure(16, "direct logit attribution of the MLPs")
def figure_mlp_attribution(study: Study):
    canvas, panels = grid(1, 3, 11, 3.6, "Direct logit attribution of the MLPs to the next vector")
    for l in study.layers:
        style = {"marker": "o", "ms": 4, "color": LAYERS[l % 3], "label": f"MLP of layer {l}"}
        panels[0, 0].plot(attributions(study, "hook_mlp_out", "paper", "next")[l], **style)
        panels[0, 1].plot(attributions(study, "hook_mlp_out", "standard", "next")[l], **style)
        panels[0, 2].plot(mlp_cosines(study)[l], **style)
    panels[0, 0].set(title="(a) the paper's: ln_final on the MLP alone", ylabel="dot product")
    panels[0, 1].set(title="(b) standard: the whole stream's scale", ylabel="dot product")
    panels[0, 2].set(title="direction alone", ylabel="cosine with the next vector")
    for axes in panels.flat:
        axes.axhline(0, color="0.8", zorder=0)
        axes.set_xlabel("position (from 2 on determined)")
    panels[0, 0].legend()
    return canvas


# ---------- 4.8 Conjectures on model functionality ----------
@claim("the residual stream after layer 0 is about a_n + alpha a_{n-1}", 2.3, 17)
def claim_alpha(study: Study) -> Finding:
    """Least squares of the residual stream after layer 0, unembedded with ln_final, on a_n + alpha a_{n-1},
    positions 2 to 13. alpha within 2.1 to 2.5, R^2 at least 0.5, and a_n really there: read through W_E^+, by
    a factor between 0.5 and 1.5. Partly if, both free, that of a_{n-1} is positive and R^2 at least 0.5.
    """
    truth, a_n, before = neighbours(study.population.a)
    hook = "blocks.0.hook_resid_post"
    unembedded = lens(study, hook, own_scale=True)[:, FIRST_POSITION:]
    (beta, free_alpha), free_r2 = regress(unembedded, a_n, before)

    # With the factor of a_n held at 1.
    (alpha,), _ = regress(unembedded - a_n, before)
    r2 = explained(a_n + alpha * before, unembedded)

    # a_n lives where W_U does not read.
    through_W_E = read_by_layer_0(study, study.activations[hook])[:, FIRST_POSITION:]
    (survives, _), _ = regress(through_W_E, a_n, before)

    as_conjectured = 2.1 <= alpha <= 2.5 and r2 >= 0.5 and 0.5 <= survives <= 1.5
    copies = free_alpha > 0 and free_r2 >= 0.5
    values = {
        "both free: a_n, a_n-1, R2": [beta, free_alpha, free_r2],
        "a_n at 1: a_n-1, R2": [alpha, r2],
        "through W_E^+: a_n": survives,
        "a_n + 2.3 a_n-1 explains of the true next vector": explained(a_n + 2.3 * before, truth),
    }
    return Finding(alpha, verdict(as_conjectured, copies), values)


@figure(17, "before and after layer 0, a_n + 2.3 a_{n-1}, and the truth")
def figure_estimate(study: Study):
    i = pick(study.population, -0.9)
    a = study.population.a[i]
    dimension = moving_dimension(a)
    before = lens(study, "blocks.0.hook_resid_pre", own_scale=True)[i, 1:, dimension]
    after = lens(study, "blocks.0.hook_resid_post", own_scale=True)[i, 1:, dimension]
    a = a[:, dimension]

    c = study.population.c[i]
    title = f"What layer 0 does to one alternating sequence: c = {c:.2f}, dimension {dimension}"
    canvas, panels = grid(1, 1, 8, 4, title)
    axes = panels[0, 0]
    positions = range(1, MAX_LENGTH)
    conjecture = a[1:-1] + 2.3 * a[:-2]
    axes.plot(positions, a[2:], marker="o", ms=4, color=TRUTH, label="the truth")
    axes.plot(positions, after, marker=".", color=LAYERS[0], label="after layer 0, unembedded")
    axes.plot(positions, before, marker=".", color=GREY, label="before layer 0, unembedded")
    axes.plot(
        positions, conjecture, marker=".", color=PAPERS, label="the paper: $a_n + 2.3\\,a_{n-1}$"
    )
    axes.axhline(0, color="0.9", zorder=0)
    title = "ln_final gives every unembedded vector nearly the same length: compare shapes"
    axes.set(title=title, xlabel="position n", ylabel="component")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


# ---------- The report ----------
def plain(value):
    """Tensors and nested containers as JSON has them, numbers to four significant digits, null for those that
    are not finite."""
    text = json.dumps(value, default=lambda tensor: tensor.tolist())
    return json.loads(
        text,
        parse_float=lambda number: float(f"{float(number):.4g}"),
        parse_constant=lambda name: None,
    )


def short(value) -> str:
    """A measured value in a table cell: lists by head in one line, a line for each layer."""
    if isinstance(value, list):
        nested = value and isinstance(value[0], list)
        return ("<br>" if nested else " ").join(short(part) for part in value)
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"
    return str(value)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a markdown table."""
    header = list(header)
    lines = []
    for row in (header, *rows):
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return [lines[0], "| --- " * len(header) + "|", *lines[1:]]


def markdown(catalogue: Catalogue, results: dict) -> str:
    """The report: a table of the claims, then each with its rule and its picture (once)."""
    layers = results["meta"]["config"].get("n_layers", 3)
    pictures = {}
    for number, entry in sorted(catalogue.figures.items()):
        if entry.layers <= layers:
            pictures[number] = f"![{entry.text}]({catalogue.file(number)})"

    rows = []
    details = []
    for name, found in results["claims"].items():
        paper = "(ours)" if found["paper"] is None else short(found["paper"])
        ends = " to ".join(short(end) for end in found["interval"] or [])
        title = f"[`{name}`](#{name}) {found['claim']}"
        rows.append([title, paper, short(found["measured"]), ends, found["verdict"]])
        verdicts = f"**{found['verdict']}** (untrained: {found['untrained']})"
        picture = pictures.pop(catalogue.claims[name].figure, "")
        details += [f"\n## {name}\n", f"{found['claim']}: {verdicts}.\n"]
        details += [f"Rule: {found['why']}\n", picture]

    about = [f"{key}: {value}  " for key, value in results["meta"].items()]
    rows = table(["claim", "paper", "measured", "95% interval", "verdict"], rows)
    return "\n".join(
        ["# Claims\n", *about, "", *rows, *details, "\n## Others\n", *pictures.values(), ""]
    )


def to_png(draw: Callable[[], Figure]) -> bytes:
    """A figure as a PNG: in matplotlib's default style, whatever the user's is, and ours."""
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        draw().savefig(buffer, format="png")
    return buffer.getvalue()


def measure(entry: Entry, study: Study) -> dict:
    """A claim as results.json has it, with the untrained model's verdict. FloatingPointError where what it
    measures is no finite number."""
    found = entry.function(study)
    if not np.isfinite(np.array(plain(found.measured), dtype=float)).all():
        raise FloatingPointError("what it measures is not finite")

    return plain(
        {
            "claim": entry.text,
            "paper": entry.paper,
            "measured": found.measured,
            "interval": found.interval,
            "values": found.values,
            "verdict": found.verdict,
            "why": " ".join((entry.function.__doc__ or "").split()),
            "untrained": entry.function(study.untrained).verdict,
        }
    )


# ---------- The command ----------
# A singular matrix, a number that is none.
UNMEASURABLE = (torch.linalg.LinAlgError, FloatingPointError)


def analyse(catalogue: Catalogue, study: Study, out: str, wanted: list[int], name: str):
    """Draw the figures `wanted` into `out`; for none all, and measure every claim, with the reports NAME.json
    and NAME.md. Says in a line each what has no meaning for this run and what cannot be measured on it.
    """
    jobs = [
        ("figure", number, catalogue.figures[number])
        for number in sorted(wanted or catalogue.figures)
    ]
    if not wanted:
        jobs += [("claim", key, entry) for key, entry in catalogue.claims.items()]
    os.makedirs(out, exist_ok=True)

    claims = {}
    left_out = []
    start = time.perf_counter()
    for done, (kind, key, entry) in enumerate(jobs):
        if done:
            rate = done / (time.perf_counter() - start)
            left = (len(jobs) - done) / rate
            progress(
                f"{done / len(jobs):4.0%} {kind} {key} ({rate:.1f} a second, {left:.0f} s left)"
            )
        if entry.layers > len(study.layers):
            left_out.append(f"{kind} {key}")
            continue
        try:
            if kind == "figure":
                save(to_png(lambda: entry.function(study)), os.path.join(out, catalogue.file(key)))
            else:
                claims[key] = measure(entry, study)
        except UNMEASURABLE as error:
            progress("")
            say(f"{kind} {key} cannot be had of this model: {str(error).splitlines()[0]}")

    progress("")
    if left_out:
        say(f"left out, without a meaning for this run: {', '.join(left_out)}")
    if not wanted:
        results = {"meta": study.meta, "claims": claims}
        save(results, os.path.join(out, f"{name}.json"))
        save(markdown(catalogue, results), os.path.join(out, f"{name}.md"))
    for key, found in claims.items():
        measured = short(found["measured"]).replace("<br>", " / ")
        paper = "(ours)" if found["paper"] is None else short(found["paper"])
        say(f"{key:20}  {paper:16}  {measured[:50]:50}  {found['verdict']}")
    say(f"written to {out} in {time.perf_counter() - start:.0f} s")


def list_entries(catalogue: Catalogue):
    for number, entry in sorted(catalogue.figures.items()):
        say(f"figure {number:2}  {entry.text}")
    for key, entry in catalogue.claims.items():
        say(f"claim  {key}: {entry.text} (paper: {entry.paper or 'ours'}; figure {entry.figure})")


def run_command(catalogue: Catalogue, doc: str, name: str, default_out: str):
    """The command line of a catalogue: parse, open the run, write figures and the reports NAME.json, .md."""
    parser = command_line(doc)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--all", action="store_true", help=f"every figure and claim, {name}.json and {name}.md"
    )
    what.add_argument(
        "--fig", type=int, action="append", metavar="N", help="figure N; also several times"
    )
    what.add_argument("--list", action="store_true", help="list the figures and claims")
    parser.add_argument(
        "--run", metavar="DIR", help="run folder with weights.pt and log.csv (default: weights)"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="the weights that the run kept at step N"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (default: figures, or figures in --run)"
    )
    given = vars(parser.parse_args())

    wanted = given.get("fig", [])
    missing = set(wanted) - set(catalogue.figures)
    if missing:
        parser.error(f"there is no figure {min(missing)}; --list names those that there are")
    if "list" in given:
        return list_entries(catalogue)

    run = given.get("run", os.path.join(HERE, "weights"))
    step = given.get("step")
    out = os.path.join(run, "figures") if "run" in given else default_out
    if step is not None:
        out = os.path.join(out, f"step_{step}")
    torch.set_num_threads(1)  # with two, programs that share two cores slow one another ten times
    try:
        study = open_study(run, step)
        analyse(catalogue, study, given.get("out", out), wanted, name)
    except (OSError, ValueError) as error:
        progress("")
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_command(PAPER, __doc__, "results", os.path.join(HERE, "figures"))
