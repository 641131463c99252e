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
    os.environ["MPLBACKEND"] = "agg"  # nothing is shown here, and one that is not installed would end it

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
from model import (Transformer, data_ov_circuit, data_qk_circuit, fold, load_weights, ov_circuit,
                   qk_circuit, save, settings_beside)
from train import command_line, from_settings, progress, say

HERE = os.path.dirname(os.path.abspath(__file__))
POPULATION = 1000  # sequences of 14 inputs, as in the paper (section 4.5)
UNTRAINED = 50  # sequences for an untrained model
HELD_OUT_PER_LENGTH = 840  # 10,080 sequences over the 12 lengths
EXAMPLES = 200  # sequences of one kind: alternating ones for the attention of layer 2
FEW = 100  # test sequences for interventions in single heads and for those that are only controls
QK_DRAWS = 5  # random matrices for each arm of the pseudoinverse test
RESAMPLES = 400  # of each bootstrap
SCALE = "ln_final.hook_scale"


# ---------- Claims, figures and the Study ----------
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
        return lambda find: self.enter(self.claims, find.__name__.removeprefix("claim_"),
                                       Entry(find, text, layers, paper, figure))

    def figure(self, number: int, title: str, layers: int = 1) -> Callable:
        """Enters a function figure_NAME(study) -> Figure, which is drawn to figNN_NAME.png."""
        return lambda draw: self.enter(self.figures, number, Entry(draw, title, layers))

    def enter(self, entries: dict, key, entry: Entry) -> Callable:
        if entries.setdefault(key, entry) is not entry:
            raise ValueError(f"{key} is taken by: {entries[key].text}")
        return entry.function

    def file(self, number: int) -> str:
        return f"fig{number:02d}_{self.figures[number].function.__name__.removeprefix('figure_')}.png"


PAPER = Catalogue()
claim, figure = PAPER.claim, PAPER.figure


def verdict(full, part=False) -> str:
    return "reproduced" if full else "partly" if part else "not reproduced"


class Study:
    """A trained model and what is measured on it more than once, when it is asked for. size: sequences in the
    population and in the test set. log: the run's log.csv. settings: its config.json."""

    def __init__(self, transformer: Transformer, size: int, log: dict[str, np.ndarray], settings: dict):
        self.model = fold(transformer).requires_grad_(False)
        self.size, self.log, self.settings, self.meta = size, log, settings, {}
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
        return Study(fresh, UNTRAINED, {}, self.settings)

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
    def clean(self) -> dict[str, Tensor]:
        """The residual stream on the test sequences before each layer and after the last, [size, pos,
        d_model], where interventions start from, and ln_final's scale."""
        names = [f"blocks.{l}.hook_resid_pre" for l in self.layers]
        return self.record(self.test.a[:, :-1], *names, f"blocks.{self.layers[-1]}.hook_resid_post", SCALE)

    def errors(self, layer: int, hooks: dict[str, Hook], count: int | None = None,
               model: Transformer | None = None, scale: Tensor | None = None) -> Tensor:
        """MSE of each of the first `count` test sequences under an intervention that changes nothing before
        `layer`; `scale` [size, pos, 1] takes the place of ln_final's."""
        resid, errors = list(self.clean.values())[layer][:count], []
        for i in range(0, len(resid), 100):  # the activations of so many stay in the processor's cache
            part = slice(i, min(i + 100, len(resid)))
            held = {} if scale is None else interventions.hold({SCALE: scale[part]})
            output = (model or self.model).run_from(layer, resid[part], interventions.join(hooks, held))
            errors.append(squared_errors(output, self.test.a[part, 1:]))
        return torch.cat(errors)

    @functools.cached_property
    def baseline(self) -> Tensor:
        """MSE of each test sequence without any intervention, [size]."""
        return squared_errors(self.clean["output"], self.test.a[:, 1:])

    def factor(self, errors: Tensor) -> Tensor:
        """The MSE of an arm, relative to the unchanged model's on the same sequences."""
        return errors.mean() / self.baseline[: len(errors)].mean()


def open_study(run: str, step: int | None = None) -> Study:
    """The study of a run folder, at its last step or one in steps/. FileNotFoundError or ValueError unless it
    is as train.py writes it, of affine recurrences."""
    if not os.path.isdir(run):
        raise FileNotFoundError(f"there is no run folder {run}: give one with weights.pt and log.csv")
    file = "weights.pt" if step is None else f"steps/{step:08d}.pt"
    path = os.path.join(run, file)
    settings = settings_beside(path)
    if settings.get("task", "affine") != "affine":
        raise ValueError(f"{run} learnt {settings['task']}, not affine: see python -m beyond.recurrences")
    from_settings(settings)  # refuses values out of their range
    transformer, log = load_weights(path), read_log(os.path.join(run, "log.csv"))
    rows = max(1, (log["step"] <= (torch.inf if step is None else step)).sum())  # up to these weights
    study = Study(transformer, POPULATION, {name: v[:rows] for name, v in log.items()}, settings)
    samples = {"population": POPULATION, "held out, per length": HELD_OUT_PER_LENGTH, "few": FEW}
    versions = {module.__name__: module.__version__ for module in (torch, np, matplotlib)}
    study.meta = {"weights": f"{os.path.basename(os.path.abspath(run))}/{file}", "sha256": study.model.sha256,
                  "step": int(study.log["step"][-1]) if step is None else step, "config": settings,
                  "samples": samples,
                  "versions": {"python": platform.python_version()} | versions}
    return study


def read_log(path: str) -> dict[str, np.ndarray]:
    """The columns of log.csv by name. ValueError unless there is one, of finite numbers."""
    with contextlib.suppress(OSError, ValueError):  # no file; no rows, ragged ones, or words in them
        with open(path, errors="replace") as f:
            names, *rows = (line.split(",") for line in f.read().split())
        columns = dict(zip(names, np.array(rows, dtype=float).T, strict=True))
        if names[:3] == ["step", "loss", "eval_mse"] and np.isfinite(list(columns.values())).all():
            return columns
    raise ValueError(f"{path} is no training log: expected columns step,loss,eval_mse,.. and rows of numbers")


# ---------- Statistics ----------
def fit_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, intercept and R^2 of the least squares line through (x_d, y_d), d over the last dimension."""
    dx, dy = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    xx, yy, xy = (dx * dx).sum(-1), (dy * dy).sum(-1), (dx * dy).sum(-1)
    return xy / xx, y.mean(-1) - xy / xx * x.mean(-1), xy**2 / (xx * yy)


def regress(y: Tensor, *xs: Tensor) -> tuple[list[float], float]:
    """Coefficients of the least squares fit y ~ sum_i coefficient_i x_i over all elements, without a
    constant, and the share of y that it explains."""
    X, y = torch.stack([x.double().flatten() for x in xs], 1), y.double().flatten()
    coefficients = torch.linalg.solve(X.T @ X, X.T @ y)
    return coefficients.tolist(), explained(X @ coefficients, y)


def quantiles(values: Tensor, *shares: float) -> list[float]:
    """Those of the values that are not nan."""
    return values.flatten().double().nanquantile(torch.tensor(shares).double()).tolist()


def interval(*values: Tensor, of: Callable = torch.mean) -> list[float]:
    """95% interval of the statistic `of(*values)`, resampled over the first dimension, that of sequences."""
    count = len(values[0])
    draws = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    return quantiles(torch.tensor([of(*(v[picks] for v in values)) for picks in draws]), 0.025, 0.975)


def pick(sample: data.Sample, c: float) -> int:
    """Index of the sequence whose c is nearest to `c`."""
    return int((sample.c - c).abs().argmin())


# ---------- Drawing

TRUTH, MODEL, LENS, OTHER = "tab:blue", "tab:orange", "tab:red", "tab:green"  # for one thing everywhere
LAYER_COLORS = (TRUTH, OTHER, LENS)
STYLE = {"figure.dpi": 130, "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 11,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "image.interpolation": "nearest", "image.aspect": "auto"}


def grid(rows: int, columns: int, width: float, height: float, title: str, shared=False, squeeze=True,
         width_ratios=None, height_ratios=None):
    """A figure of `rows` x `columns` axes, in inches, and the axes, as Figure.subplots has them. It is made
    without pyplot, so that no notebook's backend changes."""
    canvas = Figure(figsize=(width, height), layout="constrained")
    canvas.suptitle(title)
    return canvas, canvas.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=squeeze,
                                   width_ratios=width_ratios, height_ratios=height_ratios)


def heat(axes, matrix: Tensor, title: str, limit: float | None = None, xlabel: str = "", ylabel: str = "",
         bar: str = "", most: float = 1.0):
    """A heat map: diverging about 0 with the range [-limit, limit], blue positive as in the paper, or
    attention from 0 to `most` where `limit` is None, the future blank; with a colour bar if that has a label.
    Values are written in where they are few."""
    low, high, colors = (0, most, "Blues") if limit is None else (-limit, limit, "RdBu")
    values = matrix.numpy()
    if limit is None:
        values = np.where(np.tri(*values.shape, dtype=bool), values, np.nan)
    image = axes.imshow(values, cmap=colors, vmin=low, vmax=high)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    for (row, column), value in np.ndenumerate(values) if values.size <= 70 else ():
        text = f"{value:.{2 if high >= 0.05 else 3}f}" if np.isfinite(value) else ""
        color = "white" if abs(value) > 0.6 * high else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    if bar:
        axes.figure.colorbar(image, ax=axes, label=bar)
    return image


# ---------- 3.1 Data sampling ----------
@figure(1, "types of affine recurrences")
def figure_sequences(study: Study):
    canvas, panels = grid(1, 3, 10, 3, "Types of affine recurrences: 8 of the dimensions, one colour each")
    for axes, c, kind in zip(panels, (-0.9, 0.6, 1.3), ("oscillating", "decaying", "growing")):
        i = pick(study.population, c)
        axes.plot(study.population.a[i, :, :8], marker=".")
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=f"{kind}: c = {study.population.c[i]:.2f}", xlabel="n", xticks=range(0, 15, 2))
    panels[0].set_ylabel("component of $a_n$")
    return canvas


# ---------- 3.2 Model architecture, 4.1 Model results ----------
@functools.cache
def mse_summary(study: Study) -> dict[str, object]:
    """The MSE over the training distribution, the lengths 3 .. 14 equally often: its mean, interval, by
    length, on how many sequences, and its range at the end of the log."""
    seed, d_vocab = study.generator("held out").initial_seed(), study.model.config.d_vocab
    per_length, errors = max(1, HELD_OUT_PER_LENGTH * study.size // POPULATION), []
    for sample in data.held_out(per_length, seed, d_vocab=d_vocab):
        left = torch.cat([study.model(x) for x in sample.a[:, :-1].split(100)]) - sample.a[:, 1:]
        errors.append(left[:, FIRST_POSITION:].pow(2).mean(-1))  # [per_length, length - 2]
    of_length = torch.stack([e.mean(1) for e in errors], 1)  # [per_length, lengths]
    found = {"mse": of_length.mean(), "interval": interval(of_length), "sequences": of_length.numel(),
             "by length, 3 to 14": of_length.mean(0)}
    last = study.log.get("eval_mse", np.empty(0))[-20:]
    return found | ({"last 20 evaluations, range": [last.min(), last.max()]} if len(last) else {})


@claim("MSE after training", 1e-4, 2)
def claim_mse(study: Study) -> Finding:
    """Mean over the lengths 3 to 14 of the MSE over the predictions of a_3 and later, weights of the last
    step, new sequences. At most 2e-4, twice the paper's value, since with a constant learning rate the MSE
    wanders by such a factor between evaluations; partly up to 1e-3."""
    found, target = mse_summary(study), study.population.a[:, 1:]
    mse, fourteen = found["mse"], squared_errors(study.activations["output"], target)
    solved = data.solve_recurrence(study.population.a[:, :-1]) - target[:, FIRST_POSITION:]
    values = {"14 inputs": fourteen.mean(), "14 inputs, interval": interval(fourteen),
              "14 inputs, predicting 0": squared_errors(0 * target, target).mean(),
              "14 inputs, exact solver": solved.pow(2).mean()}
    values |= {name: value for name, value in found.items() if name not in ("mse", "interval")}
    return Finding(mse, verdict(mse <= 2e-4, mse <= 1e-3), values, found["interval"])


@figure(2, "loss against step")
def figure_loss(study: Study):
    canvas, axes = grid(1, 1, 8, 4, "Loss as a function of steps")
    log, found, last = study.log, mse_summary(study), study.log["eval_mse"][-20:]
    axes.semilogy(log["step"], log["loss"], color="0.6", label="training loss, mean since the row before")
    held_out = f"held-out MSE; in the last 20 rows {last.min():.1e} to {last.max():.1e}"
    axes.semilogy(log["step"], log["eval_mse"], color=MODEL, label=held_out)
    axes.plot(log["step"][-1], found["mse"], "ko", ms=4, label=f"the claim's MSE: {found['mse']:.2e}")
    axes.axhline(1e-4, color=TRUTH, ls="--", label="paper: 0.0001")
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


def alternation(pattern: Tensor) -> dict[str, Tensor]:
    """How far attention alternates from source to source, rows n >= 6, sources 2..n, {..: [n_heads]}: "share"
    of a row's variance along (-1)^s; that amplitude, mean over rows, "by distance", with (-1)^(n-s), as where
    similar vectors attend to each other."""
    rows = []
    for n in range(6, pattern.shape[-1]):
        row = pattern[:, :, n, 2 : n + 1]  # [batch, n_heads, src]
        row = row - row.mean(-1, keepdim=True)
        sign = (-1.0) ** torch.arange(2, n + 1)
        sign = sign - sign.mean()
        along, size = row @ sign, sign.pow(2).sum()
        share = along**2 / (row.pow(2).sum(-1) * size).clamp_min(1e-30)
        rows.append(torch.stack([share, (-1) ** n * along / size]))  # [2, batch, n_heads]
    return dict(zip(("share", "by distance"), torch.stack(rows).mean((0, 2))))


@claim("layer 0 heads, all but one, attend to the previous vector", "7 of 8 heads", 3)
def claim_l0_prev_token(study: Study) -> Finding:
    """Attention from positions 1 to 13 to the one before, by head. More than half of the attention in all
    heads but at most one; partly in more than half of the heads."""
    score, half = previous_token_score(study.activations["blocks.0.attn.hook_pattern"]), len(study.heads) / 2
    heads = int((score > 0.5).sum())
    return Finding(score, verdict(heads >= max(2 * half - 1, 1), heads > half), {"heads that do": heads})


@claim("most layer 1 heads attend to the second vector", "most", 4, 2)
def claim_l1_second_token(study: Study) -> Finding:
    """Attention from positions 3 to 13 to position 1, by head. In more than half of the heads the most
    attended position, with at least twice what uniform attention gives; partly in more than a quarter."""
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    score, favourite = second_token_score(pattern), pattern[:, :, 3:].mean((0, 2)).argmax(-1)
    uniform, half = (1 / torch.arange(4.0, 1 + MAX_LENGTH)).mean(), len(study.heads) / 2
    heads = int(((favourite == 1) & (score >= 2 * uniform)).sum())
    values = {"heads that do": heads, "most attended position": favourite, "uniform attention": uniform}
    return Finding(score, verdict(heads > half, heads > half / 2), values)


@claim("a checkerboard in layer 2 on alternating sequences, not on others", "yes", 5, 3)
def claim_l2_checkerboard(study: Study) -> Finding:
    """Share of a row's variance over the sources 2..n that alternates from source to source, rows 6 to 13,
    mean over sequences with c in [-1.1, -0.9], by head. A head shows a checkerboard if that is at least one
    half, and none on others if it is at most half as much for c in [0.9, 1.1]. Both in more than half of the
    heads; partly if the first is so in more than half of them, or both in at least two."""
    name, n_heads = "blocks.2.attn.hook_pattern", len(study.heads)
    here, there = (alternation(study.record(study.near(c).a[:, :-1], name)[name]) for c in (-1, 1))
    shows = here["share"] >= 0.5
    both = int((shows & (there["share"] <= here["share"] / 2)).sum())
    values = {"heads that do": both, "heads with a checkerboard": int(shows.sum()),
              "c near 1": there["share"], "amplitude by distance (similar vectors)": here["by distance"]}
    return Finding(here["share"], verdict(both > n_heads / 2, shows.sum() > n_heads / 2 or both >= 2), values)


def draw_patterns(patterns: Tensor, title: str, labels: list[str], most: float = 1.0):
    """The attention patterns of a layer, [n_heads, dest, src], a panel with a label each."""
    rows = -(-len(patterns) // 4)
    canvas, panels = grid(rows, 4, 10, 0.5 + 2.4 * rows, title, shared=True, squeeze=False)
    for head, (axes, pattern) in enumerate(zip(panels.flat, patterns)):
        image = heat(axes, pattern, f"head {head}: {labels[head]}", most=most)
    canvas.supxlabel("source position", fontsize=9)
    canvas.supylabel("destination position", fontsize=9)
    canvas.colorbar(image, ax=panels, label="attention", extend="max" if most < 1 else "neither")
    return canvas


def draw_mean_patterns(study: Study, layer: int, score: Callable, what: str):
    pattern = study.activations[f"blocks.{layer}.attn.hook_pattern"]
    title = f"Layer {layer} attention patterns, mean over {study.size:,} sequences"
    return draw_patterns(pattern.mean(0), title, [f"{value:.2f} {what}" for value in score(pattern)])


@figure(3, "layer 0 attention patterns")
def figure_attention_layer_0(study: Study):
    return draw_mean_patterns(study, 0, previous_token_score, "to the previous")


@figure(4, "layer 1 attention patterns", 2)
def figure_attention_layer_1(study: Study):
    return draw_mean_patterns(study, 1, second_token_score, "to the second")


def draw_layer_2(study: Study, c: int, kind: str):
    i, name = pick(study.near(c), c), "blocks.2.attn.hook_pattern"
    pattern = study.record(study.near(c).a[i : i + 1, :-1], name)[name]
    title = (f"Layer 2 attention patterns on one {kind} sequence, c = {study.near(c).c[i]:.2f}\n"
             "and which part of a row's variance alternates from source to source, rows 6 to 13")
    labels = [f"{share:.0%} alternates" for share in alternation(pattern)["share"]]
    return draw_patterns(pattern[0], title, labels, most=0.4)


@figure(5, "layer 2 attention patterns, alternating sequence", 3)
def figure_attention_layer_2_alternating(study: Study):
    return draw_layer_2(study, -1, "alternating")


@figure(6, "layer 2 attention patterns, non-alternating sequence", 3)
def figure_attention_layer_2_other(study: Study):
    return draw_layer_2(study, 1, "non-alternating")


@figure(18, "an attention pattern")
def figure_attention_example(study: Study):
    pattern = study.activations["blocks.0.attn.hook_pattern"][:1, :, :8, :8]
    head = int(previous_token_score(pattern).argmax())
    canvas, axes = grid(1, 1, 5.4, 4.4, f"An attention pattern: layer 0, head {head}, one sequence")
    labels = "each row sums to 1; the future is masked", None, "source position", "destination position"
    heat(axes, pattern[0, head], *labels, "attention")
    return canvas


# ---------- 4.3 Direct logit attributions ----------
def direct_attribution(model: Transformer, component: Tensor, target: Tensor,
                       scale: Tensor | None = None) -> Tensor:
    """Direct logit attribution: <ln_final(component) W_U, target>, [batch, pos, ...], of what something adds
    to the residual stream, [batch, pos, ..., d_model]; target [batch, pos, d_vocab].

    scale None is the paper's text: ln_final on the component alone, which forgets its size. The field's
    standard is ln_final.hook_scale: all components and ln_final.b W_U + b_U add up to the output's."""
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
    ..., pos]}: the paper's and the standard one, to the next vector and to the step a_{m+1} - a_m; and the
    standard one as a share of the target's squared length at that position."""
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
    """Mean over positions 2 to 13, ln_final on the head's output alone (the paper's reading), targets a_{m+1}
    and a_{m+1} - a_m. As a mean over heads layer 0 is positive, layer 2 negative and layer 1 at most a
    quarter of the largest, for both targets, which correlate over the heads by at least 0.9 ("nearly
    identical results"). Partly if layer 0 is positive and layer 2 negative for both."""
    by_head = {name: value[..., FIRST_POSITION:].mean(-1)
               for name, value in attributions(study, "attn.hook_result").items()}
    values = {f"{name}, by layer": value.mean(1) for name, value in by_head.items()}
    goals = torch.stack([by_head["paper, next"], by_head["paper, step"]])  # [goal, layer, head]
    layers, same = goals.mean(2), torch.corrcoef(goals.flatten(1))[0, 1]
    signs = (layers[:, 0] > 0).all() and (layers[:, 2] < 0).all()
    silent = (layers[:, 1].abs() <= 0.25 * layers.abs().amax(1)).all()
    values["correlation of the two targets over the heads"] = same
    return Finding(by_head["paper, next"], verdict(signs and silent and same >= 0.9, signs), values)


@claim("layer 1's heads write to the orthogonal complement of the embedding space", "yes", 7, 2)
def claim_l1_orthogonal(study: Study) -> Finding:
    """Mean share of the norm of what layer 1's heads write outside the span of W_E. At least 0.95; partly if
    that of what they write outside the span of W_U is, which makes their effects "less apparent"."""
    written, x = study.activations["blocks.1.attn.hook_result"].sum(2), random_vectors(study)
    W_E, W_U = study.model.embed.W_E, study.model.unembed.W_U.T
    outside, outside_W_U = outside_share(written, W_E), outside_share(written, W_U).mean()
    values, measured = {"outside W_U": outside_W_U, "random": outside_share(x, W_E).mean()}, outside.mean()
    return Finding(measured, verdict(measured >= 0.95, outside_W_U >= 0.95), values, interval(outside))


@figure(7, "direct logit attribution of the heads")
def figure_head_attribution(study: Study):
    title = "Direct logit attribution of the heads to the next vector"
    canvas, panels = grid(2, 2, 9, 7.5, title, height_ratios=[1, 2.6])
    found = attributions(study, "attn.hook_result")
    # By position (b) is a share of the target: the last ones are longest and would wash out the rest.
    shown = (("(a) the paper's: ln_final on the head alone", "paper, next", "paper, next", "dot product"),
             ("(b) standard: the stream's scale", "standard, next", "share, next", "share of the target"))
    for (top, bottom), (title, name, by_position, unit) in zip(panels.T, shown):
        mean, rows = found[name][..., FIRST_POSITION:].mean(-1), found[by_position].flatten(0, 1)
        title += "\nmean over positions 2 to 13"
        heat(top, mean, title, mean.abs().max(), "head", "layer", "dot product")
        limit = rows[:, FIRST_POSITION:].abs().max()
        heat(bottom, rows, "by position", limit, "position", "layer.head", unit)
        names = [f"{l}.{h}" for l in study.layers for h in study.heads]
        bottom.set_yticks(range(len(rows)), names, fontsize=7)
    return canvas


# ---------- 4.4 Zeroth layer OV circuits ----------
def outside_share(x: Tensor, W: Tensor) -> Tensor:
    """Share of the norm of x [..., d_model] outside the span of the rows of W, in [0, 1] (4.4)."""
    projection = torch.linalg.pinv(W, rtol=1e-5) @ W  # also when the rows are dependent
    return (x - x @ projection).norm(dim=-1) / x.norm(dim=-1)


def random_vectors(study: Study) -> Tensor:
    """Gaussian vectors, as many as the population has residual stream vectors, [size, 14, d_model]."""
    generator = study.generator("random vectors")
    return torch.randn(study.size, MAX_LENGTH, study.model.config.d_model, generator=generator)


def read_and_written(study: Study, resid: Tensor) -> tuple[Tensor, Tensor]:
    """What layer 0's heads read and all of them would write: residual stream vectors [..., d_model] -> their
    data coordinates x W_E^+ and ln1(x) OV W_U, each [..., d_vocab]."""
    model, normalised = study.model, F.layer_norm(resid, resid.shape[-1:], eps=study.model.config.eps)
    written = normalised @ ov_circuit(model, 0).sum(0) @ model.unembed.W_U
    return resid @ torch.linalg.pinv(model.embed.W_E), written


@functools.cache
def ov_fits(study: Study) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Slope, intercept and R^2 of what the OV circuits of layer 0 make of vectors, a line a vector, {reading:
    three tensors [batch, pos]}. The measured reading, "data vectors", is the points (a_d, (ln1(x) OV W_U)_d);
    "head h" is its part. Both are nan for vectors shorter than 1, which after ln1 are mostly position
    embedding."""
    model, a, resid = study.model, study.population.a[:, :-1], study.activations["blocks.0.hook_resid_pre"]
    ov, W_U = ov_circuit(model, 0), model.unembed.W_U
    normalised = study.activations["blocks.0.ln1.hook_normalized"]

    def fit_large(vectors: Tensor, written: Tensor) -> tuple[Tensor, ...]:
        large = vectors.norm(dim=-1) >= 1
        return tuple(part.where(large, torch.nan) for part in fit_line(vectors, written))

    _, written = read_and_written(study, resid)
    fits = {"data vectors": fit_large(a, written),
            "random vectors": fit_line(*read_and_written(study, random_vectors(study))),
            "d_model coordinates": fit_line(resid, resid @ ov.sum(0))}
    return fits | {f"head {h}": fit_large(a, normalised @ ov[h] @ W_U) for h in study.heads}


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


@claim("its slope", "2.1 to 2.5", 8)
def claim_l0_ov_slope(study: Study) -> Finding:
    """Median slope over the same vectors. Within 2.1 to 2.5; partly within a factor of two of that."""
    return ov_finding(study, 0, lambda slope: verdict(2.1 <= slope <= 2.5, 1.05 <= slope <= 5))


@claim("its intercept", "near 0", 8)
def claim_l0_ov_intercept(study: Study) -> Finding:
    """Intercepts over the same vectors, relative to the root mean square of (ln1(x) OV W_U)_d. At most a
    tenth in 95% of the vectors; partly if so on average. (In d_model coordinates it is 0 by construction.)"""
    intercept = ov_fits(study)["data vectors"][1]
    written = read_and_written(study, study.activations["blocks.0.hook_resid_pre"])[1][~intercept.isnan()]
    intercept = intercept / written.pow(2).mean().sqrt()
    (widest,), mean = quantiles(intercept.abs(), 0.95), intercept.abs().nanmean()
    ci = interval(intercept, of=torch.nanmedian)
    return Finding(intercept.nanmedian(), verdict(widest <= 0.1, mean <= 0.1), {"95% within": widest}, ci)


@claim("the same R^2 on random vectors, lower", 0.598, 10)
def claim_l0_ov_r2_random(study: Study) -> Finding:
    """Median R^2 of (x W_E^+, ln1(x) OV W_U) over Gaussian vectors x in R^d_model. Lower than of residual
    stream vectors by at least 0.1, yet at least 0.25, which can be seen; partly if only one of the two."""
    r2, resid = ov_fits(study)["random vectors"][2], ov_fits(study)["data vectors"][2].nanmedian()
    lower, visible = resid - r2.median() >= 0.1, r2.median() >= 0.25
    how, ci = verdict(lower and visible, lower or visible), interval(r2, of=torch.median)
    return Finding(r2.median(), how, {"residual stream": resid}, ci)


@claim("share of the norm of layer 0's OV x outside the span of W_E", 0.8415, 9)
def claim_l0_orthogonal(study: Study) -> Finding:
    """Mean over residual stream vectors, OV summed over heads. At least 0.8415 less 0.05 and above a random
    direction's, below which the circuit would prefer the embedding space; partly if only the first."""
    W_E, resid = study.model.embed.W_E, study.activations["blocks.0.hook_resid_pre"]
    ov, x = ov_circuit(study.model, 0).sum(0), random_vectors(study)
    x = x - x.mean(-1, keepdim=True)  # as all that a folded model writes
    share, chance = outside_share(resid @ ov, W_E), outside_share(x, W_E).mean()
    values = {"random direction": chance, "OV of random vectors": outside_share(x @ ov, W_E).mean()}
    enough, more = share.mean() >= 0.8415 - 0.05, share.mean() > chance
    return Finding(share.mean(), verdict(enough and more, enough), values, interval(share))


def scatter_fit(axes, x: Tensor, y: Tensor, title: str, xlabel: str, ylabel: str):
    """The points (x_d, y_d) of one vector with their least squares line."""
    slope, intercept, r2 = (value.item() for value in fit_line(x, y))
    ends = torch.stack([x.min(), x.max()])
    axes.scatter(x, y, s=9, color=TRUTH, alpha=0.7, lw=0)
    label = f"slope {slope:.2f}, intercept {intercept:.3f}, $R^2$ {r2:.2f}"
    axes.plot(ends, intercept + slope * ends, color="black", lw=1, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(1.1 * y.min(), 1.5 * y.max()))
    axes.legend(loc="upper left", handlelength=1, borderpad=0)


@figure(8, "OV of layer 0 on residual stream vectors")
def figure_ov_layer_0_resid(study: Study):
    """The vector of median slope in two readings, and the slopes of all in the first, see `ov_fits`."""
    slope = ov_fits(study)["data vectors"][0]
    resid = study.activations["blocks.0.hook_resid_pre"][slope == slope.nanmedian()][0]
    canvas, panels = grid(1, 3, 11, 3.6, "OV of layer 0 on residual stream vectors, heads summed")
    scatter_fit(panels[0], *read_and_written(study, resid), "between data coordinates; the vector of\n"
                "median slope", "$(x\\,W_E^+)_d$", "$(\\ln_1(x)\\;OV\\;W_U)_d$")
    scatter_fit(panels[1], resid, resid @ ov_circuit(study.model, 0).sum(0), "the same without $\\ln_1$,\n"
                f"in the paper's {len(resid)} coordinates", "$x_d$", "$(OV\\,x)_d$")
    slope = slope[~slope.isnan()]
    panels[2].hist(slope, bins=60, color=TRUTH)
    panels[2].axvspan(2.1, 2.5, color="0.85", zorder=0, label="paper: 2.1 to 2.5")
    panels[2].set(title=f"all {len(slope):,} vectors of norm at least 1", xlabel="slope", ylabel="vectors")
    panels[2].legend()
    return canvas


@figure(9, "sum of the OV circuits of layer 0")
def figure_ov_layer_0_sum(study: Study):
    canvas, panels = grid(1, 2, 10, 4.6, "Sum of the OV circuits over all heads of layer 0")
    for axes, title, name, circuit in (
            (panels[0], "$W_V W_O$, as in the paper", "residual stream", ov_circuit),
            (panels[1], "$W_E W_V W_O W_U$, between data vectors", "data", data_ov_circuit)):
        matrix = circuit(study.model, 0).sum(0)
        heat(axes, matrix, f"{title}: cosine with I {identity_cosine(matrix):.2f}", matrix.abs().max(),
             f"written {name} dimension", f"read {name} dimension", "weight")
    return canvas


@figure(10, "OV of layer 0 on a random vector")
def figure_ov_layer_0_random(study: Study):
    canvas, panels = grid(1, 2, 10, 3.8, "OV of layer 0 (heads summed) on a random vector")
    x, resid = random_vectors(study)[0, 0], study.activations["blocks.0.hook_resid_pre"]
    size = resid[study.population.a[:, :-1].norm(dim=-1) >= 1].std(-1).mean()
    title = f"one of them; the slope is small since ln1 divides\nit by {x.std():.1f}, data by {size:.2f}"
    labels = "$(x\\,W_E^+)_d$", "$(\\ln_1(x)\\;OV\\;W_U)_d$"
    scatter_fit(panels[0], *read_and_written(study, x), title, *labels)
    for name, color, paper in (("random vectors", OTHER, 0.598), ("data vectors", TRUTH, 0.83)):
        r2, bins = ov_fits(study)[name][2], np.linspace(0, 1, 101)
        label = f"{name}, median {r2.nanmedian():.2f} (paper: {paper})"
        panels[1].hist(r2[~r2.isnan()], bins, density=True, color=color, alpha=0.7, label=label)
    panels[1].set(title="all vectors", xlabel="$R^2$ of the line", ylabel="density")
    panels[1].legend(loc="upper left")
    return canvas


# ---------- 4.5 First layer ----------
@functools.cache
def ablations(study: Study) -> dict[str, Tensor]:
    """MSE of test sequences with a part of the model at its mean at each position of the population, {part:
    [size] or [FEW]}, the parts being "layer 1 heads", "layer 1 MLP", "head 1.0" and so on."""
    means, found = interventions.mean_outputs(study.activations), {}
    for l in study.layers:
        parts = {f"layer {l} heads": (interventions.layer_heads(study.model, l), []),
                 f"layer {l} MLP": ([], [l])}
        parts |= {f"head {l}.{h}": ([(l, h)], []) for h in study.heads if l == 1}
        for part, chosen in parts.items():
            count = study.size if part.endswith("heads") else FEW
            found[part] = study.errors(l, interventions.replace_outputs(means, *chosen), count)
    return found


@claim("MSE with all layer 1 heads mean-ablated, from 1e-4", 2e-4, 4, 2)
def claim_l1_mean_ablation(study: Study) -> Finding:
    """Means at each position over the population, MSE on other sequences. All heads of layer 1 at once
    multiply it by at most 4 (the paper's factor is 2); partly if only every head by itself does, or all at
    once with ln_final's scale held at its clean value."""
    errors, means = ablations(study)["layer 1 heads"], interventions.mean_outputs(study.activations)
    heads = interventions.layer_heads(study.model, 1)
    held = study.errors(1, interventions.replace_outputs(means, heads), scale=study.clean[SCALE])
    times = {part: study.factor(arm) for part, arm in ablations(study).items()}
    by_head = [times[f"head 1.{h}"] for h in study.heads]
    values = {"times the unchanged MSE": study.factor(errors), "times, clean scale": study.factor(held),
              "times, each head": by_head, "unchanged": study.baseline.mean(),
              "difference, interval": interval(errors - study.baseline)}
    values |= {f"times, {part} by layer": [times[f"layer {l} {part}"] for l in study.layers]
               for part in ("heads", "MLP")}
    how = verdict(study.factor(errors) <= 4, study.factor(held) <= 4 or max(by_head) <= 4)
    return Finding(errors.mean(), how, values, interval(errors))


def effective_rank(matrix: Tensor) -> Tensor:
    """Participation ratio of the singular values, (sum s)^2 / sum s^2, of matrices [..., m, n]: 1 for rank
    one, n for an n x n rotation."""
    s = torch.linalg.svdvals(matrix.double())
    return (s.sum(-1) ** 2 / (s**2).sum(-1)).float()


@claim("OV of layer 1 head 0 has low effective rank", "low", 11, 2)
def claim_l1_ov_effective_rank(study: Study) -> Finding:
    """Participation ratio of the singular values. At most half of what an untrained head has; partly if at
    least a tenth less."""
    ranks = torch.stack([effective_rank(ov_circuit(study.model, l)) for l in study.layers])
    share = ranks[1, 0] / effective_rank(ov_circuit(study.untrained.model, 1)).mean()
    values = {"all heads": ranks, "share of an untrained head's": share}
    return Finding(ranks[1, 0], verdict(share <= 0.5, share <= 0.9), values)


CIRCUITS = {"OV": (ov_circuit, data_ov_circuit, "read", "written"),
            "QK": (qk_circuit, data_qk_circuit, "destination", "source")}


def draw_circuits(study: Study, layer: int, kind: str):
    """Circuits of a layer: head 0 as the paper draws it, and every head between data coordinates."""
    circuit, between_data, ylabel, xlabel = CIRCUITS[kind]
    shown = {"head 0, residual stream": circuit(study.model, layer)[0]}
    shown |= {f"head {h}, data": matrix for h, matrix in enumerate(between_data(study.model, layer))}
    title = f"{kind} circuits of layer {layer}: cosine with I. Blue is positive; each panel has its own range"
    canvas, panels = grid(-(-len(shown) // 3), 3, 9, 8.6, title, squeeze=False)
    for axes, (name, matrix) in zip(panels.flat, shown.items()):
        heat(axes, matrix, f"{name}: {identity_cosine(matrix):.2f}", matrix.abs().max())
        axes.set(aspect="equal", xticks=[], yticks=[])
    panels[0, 0].set(xlabel=f"{xlabel} dimension", ylabel=f"{ylabel} dimension")
    return canvas


@figure(11, "OV of layer 1 head 0", 2)
def figure_ov_layer_1(study: Study):
    return draw_circuits(study, 1, "OV")


# ---------- 4.6 Second layer QK/OV circuits ----------
def identity_cosine(matrix: Tensor) -> Tensor:
    """Cosine between square matrices [..., n, n] and I: trace / (Frobenius norm * sqrt(n)), in [-1, 1]."""
    n = matrix.shape[-1]
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / (matrix.norm(dim=(-2, -1)) * n**0.5)


def eigenvalue_score(circuit: Tensor) -> Tensor:
    """sum(lambda) / sum(|lambda|) of square matrices [..., n, n], in [-1, 1]: 1 copies, -1 copies negatively
    (4.6). For a product of thin factors A B pass B A, which has the same eigenvalues but for zeros."""
    eigenvalues = torch.linalg.eigvals(circuit.double())
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).float()


def identity_finding(study: Study, kind: str, sign: int) -> Finding:
    (circuit, between_data, *_), n_heads = CIRCUITS[kind], len(study.heads)
    cosines = {f"layer {l}": identity_cosine(between_data(study.model, l)) for l in study.layers}
    measured = cosines.pop("layer 2")
    heads = sign * measured >= 0.5
    values = {"heads that do": int(heads.sum()), **cosines,
              "d_model, by layer": [identity_cosine(circuit(study.model, l)).mean() for l in study.layers]}
    return Finding(measured, verdict(heads.all(), heads.sum() > n_heads / 2), values)


@claim("OV is like -I in every layer 2 head", "yes", 12, 3)
def claim_l2_ov_identity(study: Study) -> Finding:
    """Cosine between W_U^+ W_V W_O W_U, OV between data coordinates, and I, by head. A head is like -I from
    -0.5 on (a random circuit has 0.03): every head; partly more than half of them."""
    return identity_finding(study, "OV", -1)


@claim("QK is like +I in every layer 2 head", "yes", 13, 3)
def claim_l2_qk_identity(study: Study) -> Finding:
    """Cosine between W_U^+ W_Q W_K^T W_U^+^T, QK between data coordinates, and I, by head. A head is like I
    from 0.5 on: every head; partly more than half of them."""
    return identity_finding(study, "QK", +1)


@claim("QK circuits of layer 2 find vectors that are similar to the destination's", "yes", 13, 3)
def claim_l2_similarity(study: Study) -> Finding:
    """Correlation, over the pairs of a source and a later destination from 6 to 13, of attention scores with
    the cosine between what the two carry in W_U's coordinates, sequences with c in [-1.1, -0.9], each by
    itself, mean, by head. At least 0.5 in every head; partly in more than half of them."""
    n_heads, correlation = len(study.heads), {}
    names = ("blocks.2.attn.hook_attn_scores", "blocks.2.hook_resid_pre")
    pairs = torch.ones(MAX_LENGTH, MAX_LENGTH).tril(-1).bool() & (torch.arange(MAX_LENGTH) >= 6)[:, None]
    for c in (-1, 1):
        kept = study.record(study.near(c).a[:, :-1], *names)
        scores, resid = (kept[name] for name in names)
        carried = F.normalize(resid @ study.model.unembed.W_U, dim=-1)
        similar = (carried @ carried.transpose(1, 2))[:, pairs][:, None]  # [batch, 1, pair]
        slope, _, r2 = fit_line(similar, scores[:, :, pairs])
        correlation[c] = (slope.sign() * r2.sqrt()).mean(0)
    heads = int((correlation[-1] >= 0.5).sum())
    values = {"heads that do": heads, "c near 1": correlation[1]}
    return Finding(correlation[-1], verdict(heads == n_heads, heads > n_heads / 2), values)


@figure(12, "OV of layer 2", 3)
def figure_ov_layer_2(study: Study):
    return draw_circuits(study, 2, "OV")


@figure(13, "QK of layer 2", 3)
def figure_qk_layer_2(study: Study):
    return draw_circuits(study, 2, "QK")


def lens(study: Study, hook: str, own_scale: bool = False) -> Tensor:
    """Residual stream at a hook point of the population, unembedded (logit lens), [size, pos, d_vocab]: with
    the scale that ln_final has at the end, so that parts add up, or with the stream's own."""
    held = interventions.hold({} if own_scale else {SCALE: study.activations[SCALE]})
    return study.model.run_from(len(study.layers), study.activations[hook], held)


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
    end. Fair: at least nine tenths of what the best fixed linear predictor from a_n and a_{n-1} explains;
    partly if, times the best constant, it explains at least half: the right shape in the wrong size."""
    hook, target = "blocks.0.hook_resid_post", study.population.a[:, FIRST_POSITION + 1 :]
    share, constant, rescaled = lens_share(study, hook)
    coefficients, linear = regress(*neighbours(study.population.a))
    ci = interval(lens(study, hook)[:, FIRST_POSITION:], target, of=explained)
    values = {"best constant, and rescaled by it": [constant, rescaled],
              "own scale: share, best constant, and rescaled": lens_share(study, hook, own_scale=True),
              "best fixed linear predictor of two vectors": linear, "its coefficients": coefficients,
              "the model": explained(study.activations["output"][:, FIRST_POSITION:], target)}
    return Finding(share, verdict(share >= 0.9 * linear, rescaled >= 0.5), values, ci)


@claim("after layer 0 an overestimate, which layer 2's heads refine", "yes", 14, 3)
def claim_refinement(study: Study) -> Finding:
    """Explained shares of the next vector, positions 2 to 13, unembedded with the final scale. After layer 0
    at least one half; it is an overestimate: the best constant is at most 0.95; and layer 2's heads leave at
    most half of what is unexplained before them. Partly if only the overestimate is missing."""
    stages = {"after layer 0": "blocks.0.hook_resid_post", "before layer 2": "blocks.1.hook_resid_post",
              "after its heads": "blocks.2.hook_resid_mid"}
    values = {}
    for stage, hook in stages.items():
        values[stage], values[f"{stage}, best constant"], _ = lens_share(study, hook)
    estimate, over = values["after layer 0"], values["after layer 0, best constant"] <= 0.95
    refined = estimate >= 0.5 and 1 - values["after its heads"] <= (1 - values["before layer 2"]) / 2
    return Finding(estimate, verdict(over and refined, refined), values)


@figure(14, "residual stream after layer 0 against the true output")
def figure_lens_after_layer_0(study: Study):
    title = "Residual stream after layer 0, unembedded with the final scale, against the true next vector"
    canvas, panels = grid(1, 3, 10.5, 3.6, title)
    after, output = lens(study, "blocks.0.hook_resid_post"), study.activations["output"]
    for axes, c in zip(panels, (-1.0, 0.6, 1.2)):
        i = pick(study.population, c)
        truth = study.population.a[i, 1:]
        dimension = int(truth.std(0).argmax())  # one that moves
        for label, y, look in (("true next vector", truth, {"color": TRUTH, "marker": "o", "ms": 4}),
                               ("after layer 0", after[i], {"color": LENS, "marker": "."}),
                               ("model's output", output[i], {"color": MODEL, "ls": "--", "marker": "."})):
            axes.plot(range(FIRST_POSITION, MAX_LENGTH), y[FIRST_POSITION:, dimension], label=label, **look)
        axes.axhline(0, color="0.9", zorder=0)
        axes.set(title=f"c = {study.population.c[i]:.2f}, dimension {dimension}", xlabel="position")
    panels[0].set_ylabel("component")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas


@functools.cache
def ov_eigenvalue_scores(study: Study) -> dict[str, Tensor]:
    """Eigenvalue scores of the OV circuits by layer and head, {reading: [n_layers, n_heads]}: between data
    coordinates, and of W_V W_O from the d_head x d_head product W_O W_V."""
    model = study.model
    circuits = {"data": [data_ov_circuit(model, l) for l in study.layers],
                "d_model": [block.attn.W_O @ block.attn.W_V for block in model.blocks]}
    return {name: eigenvalue_score(torch.stack(layers)) for name, layers in circuits.items()}


@claim("OV eigenvalue scores: layer 2 copies negatively", "layer 2 negative", 15, 3)
def claim_eigenvalue_score(study: Study) -> Finding:
    """sum(lambda) / sum(|lambda|) of OV between data coordinates, by layer and head. At most -0.5 in every
    head of layer 2; partly in more than half of them."""
    readings = ov_eigenvalue_scores(study)
    negative = readings["data"][2] <= -0.5
    values = {"d_model": readings["d_model"]}
    return Finding(readings["data"], verdict(negative.all(), negative.sum() > len(study.heads) / 2), values)


@figure(15, "OV eigenvalue scores")
def figure_eigenvalue_scores(study: Study):
    canvas, panels = grid(1, 2, 10, 2.8, "Eigenvalue scores of the OV circuits")
    titles = "between data coordinates", "$W_V W_O$, as in the paper"
    for axes, name, title in zip(panels, ("data", "d_model"), titles):
        image = heat(axes, ov_eigenvalue_scores(study)[name], title, 1.0, "head", "layer")
    canvas.colorbar(image, ax=panels, label="score: 1 copies, -1 negates")
    return canvas


@claim("MSE with QK of the layer 2 heads that are like I a random pseudoinverse", 1e-4, 13, 3)
def claim_l2_qk_pinv(study: Study) -> Finding:
    """W_Q random and W_K^T its pseudoinverse, no b_Q and b_K, mean over W_Q, in the five heads whose QK is
    most like I at once (the numbers 0 to 4 mean nothing in another model). At most 1.5 times the unchanged
    MSE (the paper prints 0.0001 for both), and uniform attention and random W_Q and W_K of the trained norm
    do more harm (the interval of the difference is above 0); partly if only that, or if each of the five
    stays within 1.5 by itself."""
    model, pinv = study.model, interventions.pseudoinverse_qk
    likest = identity_cosine(data_qk_circuit(model, 2)).argsort(descending=True)[:5].tolist()

    def replaced(change: Callable, heads: Iterable[int], count: int | None = None) -> Tensor:
        """MSE of each sequence, mean over random matrices."""
        generator = study.generator(f"{change.__name__} {list(heads)}")
        models = (change(model, 2, heads, generator) for _ in range(QK_DRAWS))
        return torch.stack([study.errors(2, {}, count, changed) for changed in models]).mean(0)

    measured, random_qk = replaced(pinv, likest), replaced(interventions.random_qk, likest)
    uniform = study.errors(2, {}, model=interventions.replace_qk(model, 2, likest, 0.0, 0.0))
    gaps, times = [interval(arm - measured) for arm in (uniform, random_qk)], study.factor(measured)
    single = torch.stack([study.factor(replaced(pinv, [h], FEW)) for h in study.heads])
    values = {"heads": likest, "times": times, "times, uniform": study.factor(uniform),
              "times, random": study.factor(random_qk),
              "uniform and random less pseudoinverse": gaps, "times, each head by itself": single,
              "times, heads 0 to 4": study.factor(replaced(pinv, study.heads[:5], FEW))}
    unchanged, telling = times <= 1.5, gaps[0][0] > 0 and gaps[1][0] > 0
    how = verdict(unchanged and telling, telling or single[likest].max() <= 1.5)
    return Finding(measured.mean(), how, values, interval(measured))


# ---------- 4.7 Analysis of MLPs ----------
@functools.cache
def mlp_cosines(study: Study) -> Tensor:
    """Cosine of what each MLP writes, unembedded, with the next vector, mean over the population, [n_layers,
    pos]: the attribution without the length of the target, which is longest at the end."""
    target = F.normalize(study.population.a[:, 1:], dim=-1)
    written = [study.activations[f"blocks.{l}.hook_mlp_out"] @ study.model.unembed.W_U for l in study.layers]
    return torch.stack([(F.normalize(w, dim=-1) * target).sum(-1).mean(0) for w in written])


@claim("the MLPs push in the right direction mainly at the last positions", "Figure 16", 16)
def claim_mlp_dla(study: Study) -> Finding:
    """Cosine of what each MLP writes, unembedded, with the next vector, [layer][position]. Mean over layers
    positive at positions 11 to 13 and more than twice that at 2 to 10; partly if positive and larger."""
    cosines = mlp_cosines(study)
    mean, paper = cosines.mean(0), attributions(study, "hook_mlp_out")["paper, next"]
    late, early = mean[-3:].mean(), mean[FIRST_POSITION:-3].mean()
    length = study.population.a[:, 1:].norm(dim=-1).mean(0)
    values = {"positions 11 to 13": late, "positions 2 to 10": early, "dot product (the paper's)": paper,
              "length of the targets, late / early": length[-3:].mean() / length[FIRST_POSITION:-3].mean()}
    return Finding(cosines, verdict(mean[-3:].min() > 0 and late > 2 * early, late > max(early, 0)), values)


@figure(16, "direct logit attribution of the MLPs")
def figure_mlp_attribution(study: Study):
    canvas, panels = grid(1, 3, 11, 3.6, "Direct logit attribution of the MLPs to the next vector")
    found, unit = attributions(study, "hook_mlp_out"), "dot product"
    shown = (("(a) the paper's: ln_final on the MLP alone", found["paper, next"], unit),
             ("(b) standard: the whole stream's scale", found["standard, next"], unit),
             ("direction alone", mlp_cosines(study), "cosine with the next vector"))
    for axes, (title, values, unit) in zip(panels, shown):
        for layer, line in enumerate(values):
            axes.plot(line, marker="o", ms=4, color=LAYER_COLORS[layer % 3], label=f"MLP of layer {layer}")
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=title, xlabel="position (from 2 on determined)", ylabel=unit)
    panels[0].legend()
    return canvas


# ---------- 4.8 Conjectures on model functionality ----------
@claim("the residual stream after layer 0 is about a_n + alpha a_{n-1}", 2.3, 17)
def claim_alpha(study: Study) -> Finding:
    """Least squares of the residual stream after layer 0, unembedded with ln_final, on a_n + alpha a_{n-1},
    positions 2 to 13. alpha within 2.1 to 2.5, R^2 at least 0.5, and a_n really there: read through W_E^+, by
    a factor between 0.5 and 1.5. Partly if, both free, that of a_{n-1} is positive and R^2 at least 0.5."""
    truth, a_n, before = neighbours(study.population.a)
    after = "blocks.0.hook_resid_post"
    stream = lens(study, after, own_scale=True)[:, FIRST_POSITION:]
    through_W_E = (study.activations[after] @ torch.linalg.pinv(study.model.embed.W_E))[:, FIRST_POSITION:]
    (beta, free), free_r2 = regress(stream, a_n, before)
    (alpha,), _ = regress(stream - a_n, before)
    r2 = explained(a_n + alpha * before, stream)
    (survives, _), _ = regress(through_W_E, a_n, before)
    values = {"both free: a_n, a_n-1, R2": [beta, free, free_r2], "a_n at 1: a_n-1, R2": [alpha, r2],
              "through W_E^+: a_n": survives,
              "a_n + 2.3 a_n-1 explains of the true next vector": explained(a_n + 2.3 * before, truth)}
    how = verdict(2.1 <= alpha <= 2.5 and r2 >= 0.5 and 0.5 <= survives <= 1.5, free > 0 and free_r2 >= 0.5)
    return Finding(alpha, how, values)


@figure(17, "before and after layer 0, a_n + 2.3 a_{n-1}, and the truth")
def figure_estimate(study: Study):
    i = pick(study.population, -0.9)
    dimension = int(study.population.a[i].std(0).argmax())  # one that moves
    a, where = study.population.a[i, :, dimension], f"c = {study.population.c[i]:.2f}, dimension {dimension}"
    canvas, axes = grid(1, 1, 8, 4, f"What layer 0 does to one alternating sequence: {where}")
    before, after = (lens(study, f"blocks.0.hook_resid_{when}", own_scale=True)[i, 1:, dimension]
                     for when in ("pre", "post"))
    estimate = "$a_n + 2.3\\,a_{n-1}$ (the paper's $\\alpha$)", a[1:-1] + 2.3 * a[:-2], OTHER
    for label, y, color in (("before layer 0, unembedded", before, "goldenrod"), estimate,
                            ("after layer 0, unembedded", after, "purple"), ("the truth", a[2:], TRUTH)):
        axes.plot(range(1, MAX_LENGTH), y, marker=".", color=color, label=label)
    axes.axhline(0, color="0.9", zorder=0)
    axes.set(xlabel="position n", ylabel="component",
             title="ln_final gives every unembedded vector nearly the same length: compare shapes")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


# ---------- The report and the command line ----------
def plain(value):
    """Tensors and nested containers as JSON has them, numbers to four significant digits."""
    text = json.dumps(value, default=lambda tensor: tensor.tolist())
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))


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


def markdown(catalogue: Catalogue, results: dict) -> str:
    """The report: a table of the claims, then each with its rule and its picture (once)."""
    rows, details = [], []
    layers, figures = results["meta"]["config"].get("n_layers", 3), sorted(catalogue.figures.items())
    pictures = {n: f"![{entry.text}]({catalogue.file(n)})" for n, entry in figures if entry.layers <= layers}
    for name, found in results["claims"].items():
        ends = " to ".join(map(short, found["interval"] or ()))
        rows.append([f"[`{name}`](#{name}) {found['claim']}", short(found["paper"] or "(ours)"),
                     short(found["measured"]), ends, found["verdict"]])
        verdicts = f"**{found['verdict']}** (untrained: {found['untrained']})"
        details += [f"\n## {name}\n\n{found['claim']}: {verdicts}.\n\nRule: {found['why']}\n",
                    pictures.pop(catalogue.claims[name].figure, "") + "\n"]
    about = [f"{key}: {value}  " for key, value in results["meta"].items()]
    rows = table(["claim", "paper", "measured", "95% interval", "verdict"], rows)
    return "\n".join(["# Claims\n", *about, "", *rows, *details, "\n## Others\n", *pictures.values(), ""])


def draw(entry: Entry, study: Study, path: str):
    """Write a figure to a PNG: in matplotlib's default style, whatever the user's is, and ours."""
    buffer = io.BytesIO()
    with matplotlib.style.context(["default", STYLE]):
        entry.function(study).savefig(buffer, format="png")
    save(buffer.getvalue(), path)


def measure(entry: Entry, study: Study) -> dict:
    """A claim as results.json has it, with the untrained model's verdict."""
    found, fresh = entry.function(study), entry.function(study.untrained)
    return plain({"claim": entry.text, "paper": entry.paper, "measured": found.measured,
                  "interval": found.interval, "values": found.values, "verdict": found.verdict,
                  "why": " ".join((entry.function.__doc__ or "").split()), "untrained": fresh.verdict})


def analyse(catalogue: Catalogue, study: Study, out: str, wanted: list[int] | None, name: str):
    """Draw the figures `wanted` into `out`; for None all, and measure every claim, with the reports NAME.json
    and NAME.md. Says in a line what has no meaning for this run."""
    jobs = [("figure", number) for number in sorted(wanted or catalogue.figures)]
    jobs += [("claim", key) for key in catalogue.claims if not wanted]
    left_out, claims, start = [], {}, time.perf_counter()
    os.makedirs(out, exist_ok=True)
    for done, (kind, key) in enumerate(jobs):
        rate = done / (time.perf_counter() - start)
        left = f" ({rate:.1f} a second, {(len(jobs) - done) / rate:.0f} s left)" if done else ""
        progress(f"{done / len(jobs):4.0%} {kind} {key}{left}")
        entry = catalogue.figures[key] if kind == "figure" else catalogue.claims[key]
        fits = entry.layers <= len(study.layers)
        if fits and kind == "figure":
            draw(entry, study, os.path.join(out, catalogue.file(key)))
        elif fits:
            claims[key] = measure(entry, study)
        else:
            left_out.append(f"{kind} {key}")
    if not wanted:
        results = {"meta": study.meta, "claims": claims}
        save(results, os.path.join(out, f"{name}.json"))
        save(markdown(catalogue, results), os.path.join(out, f"{name}.md"))
    progress("")
    if left_out:
        say(f"left out, without a meaning for this run: {', '.join(left_out)}")
    for key, found in claims.items():
        measured, paper = short(found["measured"]).replace("<br>", " / "), short(found["paper"] or "(ours)")
        say(f"{key:20}  {paper:16}  {measured[:50]:50}  {found['verdict']}")
    say(f"written to {out} in {time.perf_counter() - start:.0f} s")


def run_command(catalogue: Catalogue, doc: str, name: str, default_out: str):
    """The command line of a catalogue: parse, open the run, write figures and the reports NAME.json, .md."""
    parser = command_line(doc)
    what, option = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    what("--all", action="store_true", help=f"every figure and claim, {name}.json and {name}.md")
    what("--fig", type=int, action="append", metavar="N", help="figure N; also several times")
    what("--list", action="store_true", help="list the figures and claims")
    option("--run", metavar="DIR", help="run folder with weights.pt and log.csv (default: weights)")
    option("--step", type=int, metavar="N", help="the weights that the run kept at step N")
    option("--out", metavar="DIR", help="where to write (default: figures, or figures in --run)")
    given = vars(parser.parse_args())
    if missing := set(given.get("fig", [])) - set(catalogue.figures):
        parser.error(f"there is no figure {min(missing)}; --list names those that there are")
    if "list" in given:
        for number, entry in sorted(catalogue.figures.items()):
            say(f"figure {number:2}  {entry.text}")
        for key, entry in catalogue.claims.items():
            say(f"claim  {key}: {entry.text} (paper: {entry.paper or 'ours'}; figure {entry.figure})")
        return
    run, step = given.get("run", os.path.join(HERE, "weights")), given.get("step")
    out = os.path.join(run, "figures") if "run" in given else default_out
    out = given.get("out", out if step is None else os.path.join(out, f"step_{step}"))
    torch.set_num_threads(1)  # with two, programs that share two cores slow one another ten times
    try:
        study = open_study(run, step)
        analyse(catalogue, study, out, given.get("fig"), name)
    except (OSError, ValueError) as error:
        progress("")
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run_command(PAPER, __doc__, "results", os.path.join(HERE, "figures"))
