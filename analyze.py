"""Every figure and every number of the paper, from the weights of one run (section 4).

    python analyze.py --all                                     # everything, on the weights that ship with the repo, into figures/
    python analyze.py --list                                    # what there is
    python analyze.py --fig 8 --fig 10                          # some figures
    python analyze.py --all --run runs/paper --out runs/paper/figures
    python analyze.py --seeds runs/seeds --out runs/seeds/figures   # every claim on every run in runs/seeds/seed_*/

Three parts: functions that measure (tensors in, tensors out), then one function a claim and one a figure, each from a
Study (the model and the sequences it is studied on), and at the end the tables that name them all. The command line,
the reports and the tests read these tables; a figure or a claim of your own is one function and one line there.

Circuits are those of the folded model, and act from the right: x @ W_V @ W_O.
"""

import functools
import glob
import hashlib
import json
import os
import platform
import random
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

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
from model import Transformer, fold, load_weights, replacing
from train import CommandLine, whole_number

POPULATION = 1000  # sequences of 14 inputs, as in the paper (section 4.5)
HELD_OUT_PER_LENGTH = 840  # 10,080 sequences over the 12 lengths
HEAD_ABLATION = 500  # test sequences for the 48 ablations of single heads
EXAMPLES = 200  # alternating and other sequences for the attention of layer 2
C_BIN = 0.25  # width of the ranges of c in which errors are averaged
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # factors that all vectors are multiplied by
NOISES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # standard deviations of the noise on each component of the inputs
QK_DRAWS = 5  # random matrices for each arm of the pseudoinverse test
RESAMPLES = 1000  # of each bootstrap


# ---------------------------------------------------------------------------------------------------------------------
# Measures: tensors in, tensors out


def ov_circuit(model: Transformer, layer: int) -> Tensor:
    """W_V W_O of each head, [n_heads, d_model, d_model]: a source vector x adds x @ OV to the destination (section 4.4)."""
    attn = model.blocks[layer].attn
    return attn.W_V @ attn.W_O


def qk_circuit(model: Transformer, layer: int) -> Tensor:
    """W_Q W_K^T of each head, [n_heads, d_model, d_model]: the score before / sqrt(d_head) is
    x_destination @ QK @ x_source (section 4.6)."""
    attn = model.blocks[layer].attn
    return attn.W_Q @ attn.W_K.transpose(1, 2)


def full_ov_circuit(model: Transformer, layer: int) -> Tensor:
    """W_E W_V W_O W_U of each head, [n_heads, d_vocab, d_vocab]: the same map between data vectors, LayerNorm left out."""
    return model.embed.W_E @ ov_circuit(model, layer) @ model.unembed.W_U


def full_qk_circuit(model: Transformer, layer: int) -> Tensor:
    """W_E W_Q W_K^T W_E^T of each head, [n_heads, d_vocab, d_vocab]: the score between two data vectors, LayerNorm left out."""
    return model.embed.W_E @ qk_circuit(model, layer) @ model.embed.W_E.T


def eigenvalue_score(circuit: Tensor) -> Tensor:
    """sum(lambda) / sum(|lambda|) of square matrices [..., n, n], in [-1, 1]: 1 copies, -1 copies negatively (section 4.6).

    For a product of thin factors A B pass B A, which has the same eigenvalues but for zeros.
    """
    eigenvalues = torch.linalg.eigvals(circuit.double().cpu())  # faster there than on a GPU for matrices of this size
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).float()


def ov_eigenvalue_scores(model: Transformer) -> Tensor:
    """Eigenvalue score of W_V W_O, [n_layers, n_heads] (Figure 15), from the d_head x d_head product W_O W_V."""
    return torch.stack([eigenvalue_score(block.attn.W_O @ block.attn.W_V) for block in model.blocks])


def effective_rank(matrix: Tensor) -> Tensor:
    """Participation ratio of the singular values, (sum s)^2 / sum s^2, of matrices [..., m, n]: 1 for rank one, n for an n x n rotation."""
    s = torch.linalg.svdvals(matrix.double())
    return (s.sum(-1) ** 2 / (s**2).sum(-1)).float()


def identity_cosine(matrix: Tensor) -> Tensor:
    """Cosine between square matrices [..., n, n] and I: trace / (Frobenius norm * sqrt(n)), in [-1, 1]. At most sqrt(r / n) for rank r."""
    n = matrix.shape[-1]
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / (matrix.norm(dim=(-2, -1)) * n**0.5)


def outside_share(x: Tensor, W_E: Tensor) -> Tensor:
    """Share of the norm of x [..., d_model] that lies outside the span of the rows of W_E [d_vocab, d_model], in [0, 1] (section 4.4)."""
    _, s, V_T = torch.linalg.svd(W_E, full_matrices=False)
    V_T = V_T[s > s[0] * 1e-5]  # a basis of the span, also when the rows are dependent
    return (x - x @ V_T.T @ V_T).norm(dim=-1) / x.norm(dim=-1)


def fit_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, intercept and R^2 of the least squares line through the points (x_d, y_d), d over the last dimension."""
    x_mean, y_mean = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    xx, yy, xy = ((u * v).sum(-1) for u, v in ((x - x_mean, x - x_mean), (y - y_mean, y - y_mean), (x - x_mean, y - y_mean)))
    slope = xy / xx
    return slope, y_mean[..., 0] - slope * x_mean[..., 0], xy**2 / (xx * yy)


def regress(y: Tensor, *xs: Tensor) -> tuple[list[float], float]:
    """Coefficients of the least squares fit y ~ sum_i coefficient_i x_i over all elements, without a constant, and its
    R^2 = 1 - |residual|^2 / |y|^2."""
    X = torch.stack([x.double().flatten() for x in xs], 1)
    y = y.double().flatten()
    coefficients = torch.linalg.solve(X.T @ X, X.T @ y)
    return coefficients.tolist(), 1 - ((y - X @ coefficients) ** 2).sum().item() / (y**2).sum().item()


def previous_token_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 1.. to the one before, by head: [batch, n_heads, dest, src] -> [n_heads]."""
    return pattern.diagonal(-1, dim1=-2, dim2=-1).mean((0, 2))


def second_token_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 3.. to position 1, by head: [batch, n_heads, dest, src] -> [n_heads]."""
    return pattern[:, :, 3:, 1].mean((0, 2))


def same_parity_score(pattern: Tensor) -> Tensor:
    """Mean attention from positions 3.. to positions an even distance away, themselves included, by head:
    [batch, n_heads, dest, src] -> [n_heads]."""
    p = torch.arange(pattern.shape[-1])
    even = (p[:, None] - p) % 2 == 0
    return (pattern * even).sum(-1)[:, :, 3:].mean((0, 2))


def uniform_pattern(positions: int) -> Tensor:
    """Attention spread evenly over all sources, [1, 1, positions, positions]: what the scores are measured against."""
    ones = torch.ones(positions, positions).tril()
    return (ones / ones.sum(-1, keepdim=True))[None, None]


def direct_attribution(model: Transformer, component: Tensor, target: Tensor, scale: Tensor | None = None) -> Tensor:
    """Direct logit attribution: <ln_final(component) W_U, target> (section 4.3).

    component: what something adds to the residual stream, [batch, pos, ..., d_model]; target [batch, pos, d_vocab].
    scale None is the paper's text: ln_final normalises the component by itself, and so forgets how large it is. With
    scale = ln_final.hook_scale [batch, pos, 1] the component is divided as the residual stream as a whole is: the
    field's standard, in which all components and the biases ln_final.b W_U + b_U add up to <output, target>.
    Returns [batch, pos, ...].
    """
    ln = model.ln_final
    if scale is None:
        normalised = F.layer_norm(component, ln.w.shape, ln.w, None, ln.eps)
    else:
        extra = component.dim() - scale.dim()
        scale = scale.reshape(*scale.shape[:-1], *([1] * extra), 1)
        normalised = (component - component.mean(-1, keepdim=True)) / scale * ln.w
    direction = target @ model.unembed.W_U.T  # [batch, pos, d_model]
    return torch.einsum("bp...d,bpd->bp...", normalised, direction)


def snapshot(transformer: Transformer, sample: data.Sample) -> dict[str, Tensor]:
    """The claims that need no large population, from one forward pass over few sequences; train.py keeps them as training goes on.

    mse and l0_orthogonal (share of layer 0's OV x outside the span of W_E) are numbers, the others [n_layers, n_heads]:
    prev_token, second_token (attention, `previous_token_score` and `second_token_score`), eigenvalue_score, ov_identity,
    qk_identity, and dla_paper and dla_standard, the mean direct logit attribution to the next vector over the predictable
    positions in its two readings. The model is folded first, so that these are what `--all` measures.
    Raises FloatingPointError for a model whose output is not finite.
    """
    model = fold(transformer).requires_grad_(False)
    layers, inputs, targets = range(model.config.n_layers), sample.a[:, :-1], sample.a[:, 1:]
    kept: dict[str, Tensor] = {}
    names = [f"blocks.{l}.attn.{name}" for l in layers for name in ("hook_pattern", "hook_result")]
    output = model(inputs, hooks=interventions.record([*names, "blocks.0.hook_resid_pre", "ln_final.hook_scale"], kept))
    mse = data.mse(output, targets)
    if not mse.isfinite():
        raise FloatingPointError(f"the MSE on sequences of {inputs.shape[1]} inputs is {mse.item()}")

    def each_layer(measure: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([measure(l) for l in layers])

    def attribution(scale: Tensor | None) -> Tensor:
        return each_layer(
            lambda l: direct_attribution(model, kept[f"blocks.{l}.attn.hook_result"], targets, scale)[:, FIRST_POSITION:].mean((0, 1))
        )

    return {
        "mse": mse,
        "l0_orthogonal": outside_share(kept["blocks.0.hook_resid_pre"] @ ov_circuit(model, 0).sum(0), model.embed.W_E).mean(),
        "prev_token": each_layer(lambda l: previous_token_score(kept[f"blocks.{l}.attn.hook_pattern"])),
        "second_token": each_layer(lambda l: second_token_score(kept[f"blocks.{l}.attn.hook_pattern"])),
        "eigenvalue_score": ov_eigenvalue_scores(model),
        "ov_identity": each_layer(lambda l: identity_cosine(ov_circuit(model, l))),
        "qk_identity": each_layer(lambda l: identity_cosine(qk_circuit(model, l))),
        "dla_paper": attribution(None),
        "dla_standard": attribution(kept["ln_final.hook_scale"]),
    }


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """MSE of each sequence over the predictable positions: [batch, pos, d_vocab] -> [batch]. Its mean is `data.mse`."""
    return ((prediction - target)[:, FIRST_POSITION:] ** 2).mean((1, 2))


def solve_recurrence(x: Tensor) -> Tensor:
    """The exact answer from three known vectors: x [batch, pos, d_vocab] -> the next vector after x_2, x_3, .., [batch, pos - 2, d_vocab].

    Least squares for c and d in a_n = c a_{n-1} + d and a_{n-1} = c a_{n-2} + d: c is the ratio of the two steps, d the mean
    of what the two equations leave. A sequence that stands still, of which any c is true, goes on standing still.
    """
    first, second, third = x[:, :-2], x[:, 1:-1], x[:, 2:]
    step, next_step = second - first, third - second
    squared = (step**2).sum(-1, keepdim=True)
    c = torch.where(squared > 0, (step * next_step).sum(-1, keepdim=True) / squared, 0.0)
    d = (third - c * second + second - c * first) / 2
    return c * third + d


def recent(x: Tensor, lag: int) -> Tensor:
    """a_{n-lag} for the predictable positions n = 2 .., of inputs x [batch, pos, d_vocab]: [batch, pos - 2, d_vocab]."""
    return x[:, FIRST_POSITION - lag : x.shape[1] - lag]


def in_batches(function: Callable, *tensors: Tensor) -> Tensor:
    """function(*tensors), 100 sequences at a time: activations of so many stay in the processor's cache."""
    return torch.cat([function(*parts) for parts in zip(*(t.split(100) for t in tensors))])


def bootstrap(values: Tensor, generator: torch.Generator) -> list[float]:
    """95% interval of the mean of `values` [n] or [groups, n], resampled over n in each group."""
    means = torch.zeros(RESAMPLES, dtype=torch.double)
    rows = values.double().reshape(-1, values.shape[-1])
    for row in rows:
        picks = torch.randint(len(row), (RESAMPLES, len(row)), generator=generator)
        means += row[picks].mean(1) / len(rows)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# The model and the sequences it is studied on


class Study:
    """A trained model and what is measured on it more than once. Nothing is computed before it is asked for.

    Raises FileNotFoundError or ValueError if the folder `run` has no weights.pt and log.csv as train.py writes them.
    """

    def __init__(self, run: str, seed: int):
        if not os.path.isdir(run):
            raise FileNotFoundError(
                f"there is no run folder {run}: --run needs one with weights.pt and log.csv, such as the shipped weights"
            )
        self.weights_file, self.seed = os.path.join(run, "weights.pt"), seed
        self.model = fold(load_weights(self.weights_file)).requires_grad_(False)
        self.log = read_log(os.path.join(run, "log.csv"))

    def generator(self, purpose: str) -> torch.Generator:
        """A random stream of its own for each purpose, so that a number does not depend on what else is computed."""
        return torch.Generator().manual_seed(random.Random(f"{self.seed} {purpose}").getrandbits(62))

    @functools.cached_property
    def untrained(self) -> Transformer:
        """A freshly initialised model: what a measure gives without any training."""
        return fold(Transformer(self.model.config, self.generator("untrained"))).requires_grad_(False)

    @functools.cached_property
    def population(self) -> data.Sample:
        """The sequences on which activations are averaged."""
        return data.sample(POPULATION, MAX_LENGTH, self.generator("population"))

    @functools.cached_property
    def test(self) -> data.Sample:
        """Other sequences, on which interventions are judged."""
        return data.sample(POPULATION, MAX_LENGTH, self.generator("test"))

    @functools.cached_property
    def predictors(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The model and what to compare it with: inputs x [batch, pos, d_vocab] -> a_{n+1} for n = 2 .., [batch, pos - 2, d_vocab].

        The linear ones have one fixed coefficient for each recent vector, fitted to the population.
        """

        def linear(lags: range) -> Callable[[Tensor], Tensor]:
            a = self.population.a
            coefficients, _ = regress(a[:, FIRST_POSITION + 1 :], *(recent(a[:, :-1], lag) for lag in lags))
            return lambda x: sum(coefficient * recent(x, lag) for coefficient, lag in zip(coefficients, lags))

        return {
            "predict_zero": lambda x: torch.zeros_like(recent(x, 0)),
            "predict_last_vector": lambda x: recent(x, 0),
            "best_linear_of_2": linear(range(2)),
            "best_linear_of_3": linear(range(3)),
            "exact_solver": solve_recurrence,
            "model": lambda x: in_batches(self.model, x)[:, FIRST_POSITION:],
        }

    def predictor_errors(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Squared error of every predictor, mean over d_vocab: inputs and targets [batch, pos, d_vocab] -> {name: [batch, pos - 2]}."""
        return {name: ((predict(x) - targets[:, FIRST_POSITION:]) ** 2).mean(-1) for name, predict in self.predictors.items()}

    @functools.cached_property
    def test_errors(self) -> dict[str, Tensor]:
        """`predictor_errors` on the test sequences."""
        return self.predictor_errors(self.test.a[:, :-1], self.test.a[:, 1:])

    @functools.cached_property
    def errors_by_c(self) -> dict[str, Tensor]:
        """Mean of `test_errors` over the sequences in each range of c, of width C_BIN from -2 to 2: {name: [ranges]}."""
        bins = ((self.test.c + 2) / C_BIN).long()
        return {name: torch.stack([e[bins == b].mean() for b in range(round(4 / C_BIN))]) for name, e in self.test_errors.items()}

    @functools.cached_property
    def out_of_distribution(self) -> dict[str, dict[float, dict[str, Tensor]]]:
        """`predictor_errors` where training never went: {what is varied: {its value: errors}}. All of 14 inputs but for "length"."""
        g = self.generator("out of distribution")
        a = data.sample(EXAMPLES, MAX_LENGTH, g).a
        noise = torch.randn(a[:, :-1].shape, generator=g)
        samples = {length: data.sample(EXAMPLES // 2, length, g).a for length in range(MIN_LENGTH, data.N_CTX + 1)}
        c_ranges = {low + C_BIN / 2: (low, low + C_BIN) for low in np.arange(-3, 3, C_BIN).tolist()}
        wide = {c: data.sample(EXAMPLES // 4, MAX_LENGTH, g, c_range=c_range).a for c, c_range in c_ranges.items()}
        return {
            "length": {length: self.predictor_errors(s[:, :-1], s[:, 1:]) for length, s in samples.items()},
            "c": {c: self.predictor_errors(s[:, :-1], s[:, 1:]) for c, s in wide.items()},
            "scale": {k: self.predictor_errors(k * a[:, :-1], k * a[:, 1:]) for k in SCALES},
            "noise": {sigma: self.predictor_errors(a[:, :-1] + sigma * noise, a[:, 1:]) for sigma in NOISES},
        }

    @functools.cached_property
    def alternating(self) -> data.Sample:
        return data.sample(EXAMPLES, MAX_LENGTH, self.generator("alternating"), c_range=(-1.1, -0.9))

    @functools.cached_property
    def steady(self) -> data.Sample:
        """The counterpart of the alternating sequences: equally long, with c near 1."""
        return data.sample(EXAMPLES, MAX_LENGTH, self.generator("steady"), c_range=(0.9, 1.1))

    @functools.cached_property
    def activations(self) -> dict[str, Tensor]:
        """The one plain forward pass over the population that claims and figures share; its output is under "output"."""
        once = ("blocks.0.hook_resid_pre", "blocks.0.ln1.hook_normalized", "blocks.0.hook_resid_mid", "ln_final.hook_scale")
        each = ("attn.hook_pattern", "attn.hook_z", "attn.hook_result", "hook_mlp_out", "hook_resid_post")
        names = [*once, *(f"blocks.{l}.{name}" for l in range(self.model.config.n_layers) for name in each)]
        kept: dict[str, Tensor] = {}
        kept["output"] = self.model(self.population.a[:, :-1], hooks=interventions.record(names, kept))
        return kept

    def patterns(self, model: Transformer, x: Tensor, layer: int) -> Tensor:
        """Attention patterns of a layer on other sequences, [batch, n_heads, dest, src]."""
        kept: dict[str, Tensor] = {}
        name = f"blocks.{layer}.attn.hook_pattern"
        model(x, hooks=interventions.record([name], kept))
        return kept[name]

    @functools.cached_property
    def head_attribution(self) -> dict[str, Tensor]:
        """Mean direct logit attribution of every head by position, {reading: [n_layers, n_heads, pos]}; see `attribution`."""
        return self.attribution("attn.hook_result")

    @functools.cached_property
    def mlp_attribution(self) -> dict[str, Tensor]:
        """The same of every MLP, {reading: [n_layers, pos]}."""
        return self.attribution("hook_mlp_out")

    def attribution(self, hook: str) -> dict[str, Tensor]:
        """Population mean of `direct_attribution` in both readings, each to the next vector a_{m+1} and to the step a_{m+1} - a_m."""
        a, kept = self.population.a, self.activations
        targets = {"next": a[:, 1:], "step": a[:, 1:] - a[:, :-1]}
        scales = {"paper": None, "standard": kept["ln_final.hook_scale"]}

        def mean(scale, target):
            layers = [
                direct_attribution(self.model, kept[f"blocks.{l}.{hook}"], target, scale).mean(0) for l in range(self.model.config.n_layers)
            ]
            return torch.stack(layers).movedim(1, -1)

        return {f"{reading}_{goal}": mean(scale, target) for reading, scale in scales.items() for goal, target in targets.items()}

    @functools.cached_property
    def layer_0_fits(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Slope, intercept and R^2 of (x_d, (x OV)_d) for every residual stream vector before layer 0, in the readings of section 4.4."""
        raw, normalised = (
            self.activations[f"blocks.0.{name}"] for name in ("hook_resid_pre", "ln1.hook_normalized")
        )  # [batch, pos, d_model]
        ov, a = ov_circuit(self.model, 0), self.population.a[:, :-1]
        return {
            "raw": fit_line(raw, raw @ ov.sum(0)),
            "normalised": fit_line(normalised, normalised @ ov.sum(0)),
            "raw_to_what_is_added": fit_line(raw, normalised @ ov.sum(0)),
            "data_coordinates": fit_line(a, a @ full_ov_circuit(self.model, 0).sum(0)),
            "each_head": fit_line(raw, torch.einsum("bpd,hdD->hbpD", raw, ov)),
        }

    @functools.cached_property
    def test_resid_pre(self) -> list[Tensor]:
        """Residual stream before every layer on the test sequences, from which interventions in that layer start."""
        kept: dict[str, Tensor] = {}
        names = [f"blocks.{l}.hook_resid_pre" for l in range(self.model.config.n_layers)]
        self.model(self.test.a[:, :-1], hooks=interventions.record(names, kept))
        return [kept[name] for name in names]

    def errors(self, layer: int = 0, hooks: dict | None = None, model: Transformer | None = None, count: int = POPULATION) -> Tensor:
        """MSE of each of the first `count` test sequences, [count], under an intervention that changes nothing before `layer`."""
        model = model or self.model
        return in_batches(
            lambda resid, target: squared_errors(model.run_from(layer, resid, hooks), target),
            self.test_resid_pre[layer][:count],
            self.test.a[:count, 1:],
        )

    @functools.cached_property
    def baseline(self) -> Tensor:
        """MSE of each test sequence without any intervention, [POPULATION]."""
        return self.errors()

    def compare(self, errors: Tensor) -> dict:
        """MSE of an arm and its difference from the unchanged model on the same sequences, with the interval of the difference."""
        difference = errors - self.baseline[: len(errors)]
        return {"mse": errors.mean(), "difference": difference.mean(), "interval": bootstrap(difference, self.generator("compare"))}


def read_table(path: str, columns: tuple[str, ...], what: str) -> np.ndarray:
    """A CSV file of train.py as a structured array. FileNotFoundError or ValueError unless it holds finite numbers and begins with `columns`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {what} at {path}")
    with warnings.catch_warnings(), open(path, errors="replace") as f:
        warnings.simplefilter("ignore")  # an empty file is reported below
        lines = f.read().splitlines()
        rows = np.atleast_1d(np.genfromtxt(lines, delimiter=",", names=True, invalid_raise=False)) if lines else np.empty(0)
    names = rows.dtype.names or ()
    if names[: len(columns)] != columns or not len(rows) or not all(np.isfinite(rows[name]).all() for name in names):
        raise ValueError(f"{path} is no {what}: expected columns that begin with {','.join(columns)} and at least one row of numbers")
    return rows


def read_log(path: str) -> np.ndarray:
    """log.csv of a run, with step, loss, eval_mse and seconds."""
    return read_table(path, ("step", "loss", "eval_mse"), "training log")


def read_snapshots(path: str) -> dict[str, np.ndarray]:
    """snapshots.csv of a run: {name: [rows]}, and {name: [rows, n_layers, n_heads]} of what is measured by head.

    Raises FileNotFoundError or ValueError if it is none or lacks a measure.
    """
    rows = read_table(path, ("step", "mse"), "table of snapshots")
    layers: dict[str, dict[str, list]] = {}  # {name: {layer: columns of its heads}}
    for column in rows.dtype.names:
        name, layer = re.fullmatch(r"(\w+?)(?:_l(\d+)h\d+)?", column).groups()
        layers.setdefault(name, {}).setdefault(layer, []).append(rows[column])
    if missing := SNAPSHOTS.keys() - layers.keys():
        raise ValueError(f"{path} is no table of snapshots: it lacks {sorted(missing)[0]}")
    return {name: heads[None][0] if None in heads else np.array(list(heads.values())).transpose(2, 0, 1) for name, heads in layers.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Claims: each a function from a study to a finding. The rule for the verdict stands in `why`.


@dataclass(frozen=True)
class Finding:
    measured: object  # a number, a list by head or position, or [layer][head]
    interval: list[float] | None  # 95% bootstrap interval, where the claim is one number
    control: dict
    verdict: str
    why: str


def verdict(full: bool, part: bool) -> str:
    return "reproduced" if full else "partly" if part else "not reproduced"


def outside_training(study: Study) -> dict[str, dict[str, Tensor]]:
    """MSE of every predictor where training never went, {what is different: {predictor: MSE}}."""
    chosen = {
        "14_inputs_as_in_training": ("scale", lambda value: value == 1),
        "15_to_32_inputs": ("length", lambda value: value > MAX_LENGTH),
        "c_from_2_to_3": ("c", lambda value: value > 2),
        "c_from_-3_to_-2": ("c", lambda value: value < -2),
        "vectors_times_0.1": ("scale", lambda value: value == 0.1),
        "vectors_times_10": ("scale", lambda value: value == 10),
        "inputs_with_noise_of_0.01": ("noise", lambda value: value == 1e-2),
    }
    return {
        name: {
            predictor: torch.stack(
                [errors[predictor].mean() for value, errors in study.out_of_distribution[what].items() if belongs(value)]
            ).mean()
            for predictor in study.predictors
        }
        for name, (what, belongs) in chosen.items()
    }


def claim_mse(study: Study) -> Finding:
    samples = data.held_out(HELD_OUT_PER_LENGTH, seed=study.generator("held out").initial_seed())
    by_length = [study.predictor_errors(s.a[:, :-1], s.a[:, 1:]) for s in samples]
    means = {name: torch.stack([errors[name].mean() for errors in by_length]).mean() for name in by_length[0]}
    errors = torch.stack([errors["model"].mean(1) for errors in by_length])  # [lengths, sequences]
    prediction, target = study.activations["output"], study.population.a[:, 1:]
    measured, last = errors.mean().item(), study.log["eval_mse"][-20:]
    full = measured <= 2e-4
    return Finding(
        measured=measured,
        interval=bootstrap(errors, study.generator("mse")),
        control={
            "by_length_3_to_14": errors.mean(1),
            "length_14": squared_errors(prediction, target).mean(),
            "length_14_interval": bootstrap(squared_errors(prediction, target), study.generator("mse 14")),
            "length_14_by_position_0_to_13": ((prediction - target) ** 2).mean((0, 2)),
            **{name: value for name, value in means.items() if name != "model"},
            "model_by_c_from_-2_to_2": study.errors_by_c["model"],
            "predict_last_vector_by_c_from_-2_to_2": study.errors_by_c["predict_last_vector"],
            **outside_training(study),
            "training_log_last_20_evaluations": {"lowest": last.min(), "highest": last.max()},
        },
        verdict=verdict(full, measured <= 1e-3),
        why=(
            "Rule: at most 2e-4, twice the paper's value, since with a constant learning rate the MSE wanders between "
            f"evaluations (over the last {len(last)} of the log by a factor of {last.max() / last.min():.1f}); partly up to "
            "1e-3. Weights of the last step."
        ),
    )


def claim_l0_prev_token(study: Study) -> Finding:
    score = previous_token_score(study.activations["blocks.0.attn.hook_pattern"])
    heads = int((score > 0.5).sum())
    return Finding(
        measured=score,
        interval=None,
        control={
            "uniform_attention": previous_token_score(uniform_pattern(MAX_LENGTH)),
            "untrained": previous_token_score(study.patterns(study.untrained, study.population.a[:EXAMPLES, :-1], 0)),
        },
        verdict=verdict(heads >= 7, heads >= 4),
        why=(
            "Rule: more than half of the attention goes to the previous vector in at least 7 heads; partly in at least 4. It "
            f"does in {heads}."
        ),
    )


def claim_l1_second_token(study: Study) -> Finding:
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    score = second_token_score(pattern)
    heads = int((score > 0.5).sum())
    favourite = pattern[:, :, 3:].mean((0, 2)).argmax(-1)
    second = int((favourite == 1).sum())
    return Finding(
        measured=score,
        interval=None,
        control={
            "uniform_attention": second_token_score(uniform_pattern(MAX_LENGTH)),
            "untrained": second_token_score(study.patterns(study.untrained, study.population.a[:EXAMPLES, :-1], 1)),
            "most_attended_position": favourite,
        },
        verdict=verdict(heads >= 5, second >= 5),
        why=(
            "Rule: more than half of the attention from positions 3 to 13 goes to position 1 in at least 5 of 8 heads; partly "
            f"if position 1 is at least the most attended one in 5. It gets more than half in {heads} and most in {second}."
        ),
    )


def claim_l2_checkerboard(study: Study) -> Finding:
    alternating = same_parity_score(study.patterns(study.model, study.alternating.a[:, :-1], 2))
    steady = same_parity_score(study.patterns(study.model, study.steady.a[:, :-1], 2))
    heads = int(((alternating >= 0.75) & (alternating - steady >= 0.1)).sum())
    return Finding(
        measured=alternating,
        interval=None,
        control={
            "c_near_1": steady,
            "uniform_attention": same_parity_score(uniform_pattern(MAX_LENGTH)),
            "untrained": same_parity_score(study.patterns(study.untrained, study.alternating.a[:, :-1], 2)),
        },
        verdict=verdict(heads == len(alternating), heads >= len(alternating) / 2),
        why=(
            "Measured: share of the attention from positions 3 to 13 that goes to positions of the same parity, itself "
            "included, for c in [-1.1, -0.9]. Rule: at least 0.75, and 0.1 more than for c in [0.9, 1.1], in every head; partly "
            f"in half of them. So it is in {heads}."
        ),
    )


def claim_dla_sign(study: Study) -> Finding:
    by_head = {name: value[..., FIRST_POSITION:].mean(-1) for name, value in study.head_attribution.items()}  # [layer, head]
    by_layer = {name: value.mean(1) for name, value in by_head.items()}

    def as_claimed(layers: Tensor) -> bool:
        return bool(layers[0] > 0 > layers[2] and layers[1].abs() <= 0.25 * layers.abs().max())

    holds = [name for name, layers in by_layer.items() if as_claimed(layers)]
    signs = [name for name, layers in by_layer.items() if layers[0] > 0 > layers[2]]
    return Finding(
        measured=by_head["paper_next"],
        interval=None,
        control={f"{name}_by_layer": layers for name, layers in by_layer.items()}
        | {f"{name}_by_head": heads for name, heads in by_head.items() if name != "paper_next"},
        verdict=verdict(len(holds) == 4, len(signs) == 4 or "paper_next" in holds),
        why=(
            "Measured: mean over positions 2 to 13, ln_final on the head alone, target a_{m+1}. Rule: averaged over the heads, "
            "layer 0 is positive, layer 2 negative and layer 1 at most a quarter of the largest, in both readings (paper, standard) "
            "with both targets (next a_{m+1}, step a_{m+1} - a_m); partly if all four have the signs of layers 0 and 2, or the "
            f"paper's own reading has the whole pattern. Pattern: {', '.join(holds) or 'none'}; signs: {', '.join(signs) or 'none'}."
        ),
    )


def random_vectors(study: Study) -> Tensor:
    """Gaussian vectors, as many as there are residual stream vectors in the population, [POPULATION, 14, d_model]."""
    return torch.randn(POPULATION, MAX_LENGTH, study.model.config.d_model, generator=study.generator("random vectors"))


def claim_l0_ov_r2(study: Study) -> Finding:
    fits = study.layer_0_fits
    r2 = fits["raw"][2].mean(1)  # by sequence
    x, ov = random_vectors(study), ov_circuit(study.model, 0).sum(0)
    chance = fit_line(x, x @ ov)[2].mean()
    untrained = study.activations["blocks.0.hook_resid_pre"] @ ov_circuit(study.untrained, 0).sum(0)
    measured = r2.mean()
    return Finding(
        measured=measured,
        interval=bootstrap(r2, study.generator("r2")),
        control={
            "random_vectors": chance,
            "untrained_ov": fit_line(study.activations["blocks.0.hook_resid_pre"], untrained)[2].mean(),
            "normalised": fits["normalised"][2].mean(),
            "data_coordinates": fits["data_coordinates"][2].mean(),
            "each_head": fits["each_head"][2].mean((1, 2)),
        },
        verdict=verdict(bool((measured - 0.83).abs() <= 0.1), bool(measured >= 0.5)),
        why=(
            "Measured: mean R^2 over the raw residual stream vectors before layer 0, OV summed over heads, 128 coordinates. "
            "Rule: within 0.1 of 0.83; partly if at least 0.5."
        ),
    )


def claim_l0_ov_slope(study: Study) -> Finding:
    fits = study.layer_0_fits
    slope = fits["raw"][0]
    measured = slope.mean()
    return Finding(
        measured=measured,
        interval=bootstrap(slope.mean(1), study.generator("slope")),
        control={
            "percentiles_5_95_over_vectors": slope.flatten().quantile(torch.tensor([0.05, 0.95])),
            "raw_to_what_is_added": fits["raw_to_what_is_added"][0].mean(),
            "data_coordinates": fits["data_coordinates"][0].mean(),
            "each_head": fits["each_head"][0].mean((1, 2)),
        },
        verdict=verdict(bool(2.1 <= measured <= 2.5), bool(2.1 / 2 <= measured <= 2.5 * 2)),
        why=(
            "Measured: mean slope over the raw residual stream vectors. Rule: within the paper's 2.1 to 2.5; partly within a "
            "factor of two of that. The OV circuit reads the normalised vector; raw_to_what_is_added is the slope of what it "
            "then adds against the raw vector."
        ),
    )


def claim_l0_ov_intercept(study: Study) -> Finding:
    fits = study.layer_0_fits
    intercept = fits["raw"][1]
    size = (study.activations["blocks.0.hook_resid_pre"] @ ov_circuit(study.model, 0).sum(0)).pow(2).mean().sqrt()
    measured = intercept.mean()
    return Finding(
        measured=measured,
        interval=bootstrap(intercept.mean(1), study.generator("intercept")),
        control={
            "root_mean_square_of_OV_x": size,
            "largest_over_vectors": intercept.abs().max(),
            "data_coordinates": fits["data_coordinates"][1].mean(),
        },
        verdict=verdict(bool(intercept.abs().max() <= 0.1 * size), bool(measured.abs() <= 0.1 * size)),
        why=(
            "Rule: for every vector at most a tenth of the root mean square of OV x; partly if so on average. On a folded model "
            "this had to come out: both x and OV x have mean 0 over d_model by construction, so the intercept is 0 to rounding "
            "and says nothing about the circuit. data_coordinates is free of that."
        ),
    )


def claim_l0_ov_r2_random(study: Study) -> Finding:
    x = random_vectors(study)
    r2 = fit_line(x, x @ ov_circuit(study.model, 0).sum(0))[2].mean(1)
    resid = study.layer_0_fits["raw"][2].mean()
    measured = r2.mean()
    return Finding(
        measured=measured,
        interval=bootstrap(r2, study.generator("r2 random")),
        control={
            "residual_stream_vectors": resid,
            "untrained_ov": fit_line(x, x @ ov_circuit(study.untrained, 0).sum(0))[2].mean(),
        },
        verdict=verdict(bool((measured - 0.598).abs() <= 0.1 and resid - measured >= 0.1), bool(resid - measured >= 0.1)),
        why="Rule: within 0.1 of 0.598 and at least 0.1 below that of residual stream vectors; partly if only the latter.",
    )


def claim_l0_orthogonal(study: Study) -> Finding:
    W_E, d_model, d_vocab = study.model.embed.W_E, study.model.config.d_model, study.model.config.d_vocab
    resid, ov = study.activations["blocks.0.hook_resid_pre"], ov_circuit(study.model, 0)
    share = outside_share(resid @ ov.sum(0), W_E).mean(1)
    x = random_vectors(study)
    chance = outside_share(x, W_E).mean()
    low, high = bootstrap(share, study.generator("outside"))
    measured = share.mean()
    near = bool((measured - 0.8415).abs() <= 0.05)
    return Finding(
        measured=measured,
        interval=[low, high],
        control={
            "random_directions": chance,
            "expected_of_a_random_direction": (1 - d_vocab / d_model) ** 0.5,
            "residual_stream_vectors_themselves": outside_share(resid, W_E).mean(),
            "OV_of_random_vectors": outside_share(x @ ov.sum(0), W_E).mean(),
            "untrained_ov": outside_share(resid @ ov_circuit(study.untrained, 0).sum(0), W_E).mean(),
            "each_head": outside_share(torch.einsum("bpd,hdD->hbpD", resid, ov), W_E).mean((1, 2)),
        },
        verdict=verdict(near and low > chance, near),
        why=(
            "Rule: within 0.05 of 0.8415 and above what a random direction has; partly if only the number agrees. A random "
            f"direction of R^{d_model} has {chance:.3f} of its norm outside a {d_vocab}-dimensional subspace, so a share below "
            "that means that the circuit writes into the embedding space more than chance does, not less."
        ),
    )


def claim_l1_mean_ablation(study: Study) -> Finding:
    model, layers, heads = study.model, range(study.model.config.n_layers), range(study.model.config.n_heads)
    values = {
        "zero": interventions.zero_outputs(model),
        "mean": interventions.mean_outputs(study.activations),
        "mean_over_positions": interventions.mean_outputs(study.activations, over_positions=True),
    }

    def errors(kind: str, layer: int, heads=(), mlps=(), count=POPULATION) -> Tensor:
        hooks = interventions.replace_outputs(values[kind], [(layer, head) for head in heads], mlps)
        return study.errors(layer, hooks, count=count)

    arms = {f"layer_{l}_attention_{kind}": errors(kind, l, heads=heads) for l in layers for kind in values}
    arms |= {f"layer_{l}_mlp_{kind}": errors(kind, l, mlps=[l]) for l in layers for kind in values}
    whole = {name: study.compare(arm) for name, arm in arms.items()}
    single = {
        f"each_head_{kind}": [[study.compare(errors(kind, l, heads=[h], count=HEAD_ABLATION)) for h in heads] for l in layers]
        for kind in ("zero", "mean")
    }
    by_head = {
        f"{name}_{key}": [[arm[key] for arm in row] for row in rows]
        for name, rows in single.items()
        for key in ("mse", "difference", "interval")
    }
    mse = {l: whole[f"layer_{l}_attention_mean"]["mse"] for l in layers}
    measured, before = mse[1], study.baseline.mean()
    return Finding(
        measured=measured,
        interval=bootstrap(arms["layer_1_attention_mean"], study.generator("mean ablation")),
        control={"unchanged": before, **whole, **by_head},
        verdict=verdict(measured <= 4 * before, measured < min(mse[0], mse[2])),
        why=(
            f"Means at each position over {POPULATION:,} sequences, MSE on {POPULATION:,} others. Rule: at most 4 times the "
            "unchanged MSE (the paper's factor is 2); partly if layer 1 is the layer whose attention can best be spared. "
            f"Factors: layer 0 {mse[0] / before:.1f}, layer 1 {mse[1] / before:.1f}, layer 2 {mse[2] / before:.1f}. zero leaves "
            "b_O, which holds the folded value biases."
        ),
    )


def claim_l1_ov_effective_rank(study: Study) -> Finding:
    ranks = torch.stack([effective_rank(ov_circuit(study.model, l)) for l in range(study.model.config.n_layers)])
    untrained = effective_rank(ov_circuit(study.untrained, 1)).mean()
    s = torch.linalg.svdvals(ov_circuit(study.model, 1)[0])
    measured = ranks[1, 0]
    return Finding(
        measured=measured,
        interval=None,
        control={
            "untrained": untrained,
            "all_heads": ranks,
            "largest_possible": min(study.model.config.d_head, study.model.config.d_model),
            "share_of_squared_norm_in_the_first_direction": s[0] ** 2 / (s**2).sum(),
        },
        verdict=verdict(measured <= 0.5 * untrained, measured <= 0.9 * untrained and measured < ranks[2].mean()),
        why=(
            "Participation ratio of the singular values, (sum s)^2 / sum s^2, of layer 1 head 0. Rule: at most half of what an "
            "untrained head has; partly if at least a tenth less than that and less than the mean of layer 2."
        ),
    )


def identity_finding(study: Study, circuit: Callable, full_circuit: Callable, sign: int) -> Finding:
    cosines = identity_cosine(circuit(study.model, 2))
    heads = int((sign * cosines >= 0.25).sum())
    config = study.model.config
    return Finding(
        measured=cosines,
        interval=None,
        control={
            "untrained": identity_cosine(circuit(study.untrained, 2)),
            "largest_possible_at_this_rank": min(1.0, (config.d_head / config.d_model) ** 0.5),
            "between_data_vectors": identity_cosine(full_circuit(study.model, 2)),
            "layer_0": identity_cosine(circuit(study.model, 0)),
            "layer_1": identity_cosine(circuit(study.model, 1)),
        },
        verdict=verdict(heads == len(cosines), heads > len(cosines) / 2),
        why=(
            f"Cosine between the circuit and I. Rule: {'at least 0.25' if sign > 0 else 'at most -0.25'} in every head, which is "
            "where the diagonal of a 128 x 128 matrix stands three standard deviations out from the other entries; partly in "
            f"more than half of them. So it is in {heads}."
        ),
    )


def claim_l2_ov_identity(study: Study) -> Finding:
    return identity_finding(study, ov_circuit, full_ov_circuit, -1)


def claim_l2_qk_identity(study: Study) -> Finding:
    return identity_finding(study, qk_circuit, full_qk_circuit, +1)


def neighbours(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_{n+1}, a_n and a_{n-1} for n = 2 .., each [batch, pos - 2, d_vocab], of sequences a [batch, pos + 1, d_vocab]."""
    return a[:, FIRST_POSITION + 1 :], recent(a[:, :-1], 0), recent(a[:, :-1], 1)


def lens(study: Study, hook: str) -> Tensor:
    """Residual stream at a hook point, unembedded as if it were the last (logit lens), [batch, pos, d_vocab]."""
    return study.model.run_from(study.model.config.n_layers, study.activations[hook])


def claim_lens_after_l0(study: Study) -> Finding:
    target = study.population.a[:, 1:]
    nothing = squared_errors(torch.zeros_like(target), target).mean()

    def explained(prediction: Tensor) -> Tensor:
        return 1 - squared_errors(prediction, target).mean() / nothing

    errors = squared_errors(lens(study, "blocks.0.hook_resid_post"), target)
    low, high = bootstrap(errors, study.generator("lens"))
    coefficients, linear = regress(*neighbours(study.population.a))
    (factor,), rescaled = regress(target[:, FIRST_POSITION:], lens(study, "blocks.0.hook_resid_post")[:, FIRST_POSITION:])
    measured = 1 - errors.mean() / nothing
    return Finding(
        measured=measured,
        interval=[1 - high / nothing.item(), 1 - low / nothing.item()],
        control={
            "best_fixed_linear_predictor_from_a_n_and_a_n-1": linear,
            "its_coefficients": coefficients,
            "predict_last_vector": explained(study.population.a[:, :-1]),
            "multiplied_by_the_best_constant": rescaled,
            "that_constant": factor,
            "before_layer_0": explained(lens(study, "blocks.0.hook_resid_pre")),
            "after_layer_0_attention": explained(lens(study, "blocks.0.hook_resid_mid")),
            "after_layer_1": explained(lens(study, "blocks.1.hook_resid_post")),
            "model": explained(study.activations["output"]),
            "cosine_with_the_truth": F.cosine_similarity(lens(study, "blocks.0.hook_resid_post"), target, dim=-1)[
                :, FIRST_POSITION:
            ].mean(),
        },
        verdict=verdict(bool(measured >= 0.9 * linear), bool(rescaled >= 0.5)),
        why=(
            "Measured: 1 - MSE / MSE of predicting 0, positions 2 to 13. Rule: at least nine tenths of what the best fixed "
            "linear predictor from a_n and a_{n-1} explains; partly if, multiplied by the best constant, it explains at least "
            "half: the right shape in the wrong size."
        ),
    )


def claim_eigenvalue_score(study: Study) -> Finding:
    scores = ov_eigenvalue_scores(study.model)
    full = torch.stack([eigenvalue_score(full_ov_circuit(study.model, l)) for l in range(study.model.config.n_layers)])
    negative = int((scores[2] < 0).sum())
    return Finding(
        measured=scores,
        interval=None,
        control={
            "full_circuit_through_W_E_and_W_U": full,
            "untrained_range": [ov_eigenvalue_scores(study.untrained).min(), ov_eigenvalue_scores(study.untrained).max()],
        },
        verdict=verdict(bool((scores[2] <= -0.5).all()), scores[2].mean() < 0 and negative >= 5),
        why=(
            "Rule: at most -0.5 in every head of layer 2; partly if the mean of layer 2 is negative and at least 5 of its heads "
            f"are. Negative: {negative}; mean by layer: {', '.join(f'{m:.2f}' for m in scores.mean(1).tolist())}."
        ),
    )


def claim_l2_qk_pinv(study: Study) -> Finding:
    model, n_heads = study.model, study.model.config.n_heads
    paper_heads = list(range(5))
    best_heads = sorted(identity_cosine(qk_circuit(model, 2)).topk(5).indices.tolist())

    def replaced(change: Callable, heads: list[int], generator: torch.Generator) -> Tensor:
        """Errors for each random draw, [draws, batch]."""
        return torch.stack([study.errors(2, model=change(model, 2, heads, generator)) for _ in range(QK_DRAWS)])

    def arm(errors: Tensor) -> dict:
        return study.compare(errors.mean(0)) | {"mse_of_each_draw": errors.mean(1)}

    def inverse(heads: list[int]) -> Tensor:
        return replaced(interventions.pseudoinverse_qk, heads, study.generator(f"pinv {heads}"))

    means, zeros = interventions.mean_outputs(study.activations), interventions.zero_outputs(model)
    errors = inverse(paper_heads)
    random_errors = replaced(interventions.random_qk, paper_heads, study.generator("random qk"))
    uniform_errors = study.errors(2, model=interventions.replace_qk(model, 2, paper_heads, 0.0, 0.0))
    ignorant = {"random_qk_of_equal_norm": random_errors.mean(0), "uniform_attention": uniform_errors}
    control = {
        "pseudoinverse": arm(errors),
        f"pseudoinverse_in_the_heads_most_like_I_{best_heads}": arm(inverse(best_heads)),
        "pseudoinverse_in_all_heads": arm(inverse(list(range(n_heads)))),
        "random_qk_of_equal_norm": arm(random_errors),
        "uniform_attention": study.compare(uniform_errors),
        "mean_ablation": study.compare(study.errors(2, interventions.replace_outputs(means, [(2, h) for h in paper_heads]))),
        "zero_ablation": study.compare(study.errors(2, interventions.replace_outputs(zeros, [(2, h) for h in paper_heads]))),
    }
    for name, rival in ignorant.items():
        control[f"{name}_minus_pseudoinverse"] = {
            "difference": (rival - errors.mean(0)).mean(),
            "interval": bootstrap(rival - errors.mean(0), study.generator("compare")),
        }
    before, measured = study.baseline.mean(), errors.mean()
    unchanged, telling = measured <= 1.5 * before, all(control[f"{name}_minus_pseudoinverse"]["interval"][0] > 0 for name in ignorant)
    return Finding(
        measured=measured,
        interval=bootstrap(errors.mean(0), study.generator("pinv")),
        control={"unchanged": before, **control},
        verdict=verdict(bool(unchanged and telling), bool(unchanged or telling)),
        why=(
            f"Mean over {QK_DRAWS} random W_Q, in heads 0 to 4, b_Q and b_K set to 0. Rule: at most 1.5 times the unchanged MSE "
            "(the paper's 1e-4 stays 1e-4), and attention that knows nothing, uniform or of random W_Q and W_K, does more "
            "harm (the interval of the difference is above 0), without which the first would say nothing about QK; partly if "
            "only one of the two holds. Factors: "
        )
        + ", ".join(
            f"{name.replace('_', ' ')} {control[name]['mse'] / before:.2f}"
            for name in ("pseudoinverse", *ignorant, "mean_ablation", "zero_ablation")
        )
        + ".",
    )


def claim_mlp_dla(study: Study) -> Finding:
    paper, standard = study.mlp_attribution["paper_next"], study.mlp_attribution["standard_next"]  # [layer, pos]
    total = paper.sum(0)
    late, early = total[-3:].mean(), total[FIRST_POSITION:-3].mean()
    heads = study.head_attribution["standard_next"].sum(1)
    ordered = total[-3:].min() > 0 and late > 2 * early
    return Finding(
        measured=paper,
        interval=None,
        control={
            "mean_of_the_sum_at_positions_11_to_13": late,
            "mean_of_the_sum_at_positions_2_to_10": early,
            "standard_reading": standard,
            "standard_reading_heads_of_each_layer": heads,
            "standard_reading_mean_over_positions_2_to_13": {
                "mlps": standard[:, FIRST_POSITION:].mean(1),
                "heads": heads[:, FIRST_POSITION:].mean(1),
            },
        },
        verdict=verdict(bool(ordered), bool(late > 0 and late > early)),
        why=(
            f"Measured: [layer][position], ln_final on the MLP's output alone, target a_{{m+1}}. Rule: summed over layers "
            "positive at positions 11, 12 and 13 and there on average more than twice as large as at positions 2 to 10; partly "
            f"if positive and larger. {late:.1f} against {early:.1f}."
        ),
    )


def claim_alpha(study: Study) -> Finding:
    truth, a_n, before = neighbours(study.population.a)

    def fits(y: Tensor) -> dict:
        (beta, alpha), r2 = regress(y, a_n, before)
        (held,), _ = regress(y - a_n, before)
        held_r2 = 1 - ((y - a_n - held * before) ** 2).sum() / (y**2).sum()
        return {"a_n": beta, "a_n-1": alpha, "R2": r2, "alpha_with_a_n_at_1": held, "R2_with_a_n_at_1": held_r2}

    def unembedded(hook: str) -> Tensor:  # without ln_final
        return (study.activations[hook] @ study.model.unembed.W_U)[:, FIRST_POSITION:]

    after = fits(lens(study, "blocks.0.hook_resid_post")[:, FIRST_POSITION:])
    y = lens(study, "blocks.0.hook_resid_post")[:, FIRST_POSITION:] - a_n
    alphas = (y * before).sum((1, 2)) / (before**2).sum((1, 2)).mean()  # their mean over sequences is the fitted alpha
    measured = after["alpha_with_a_n_at_1"]
    return Finding(
        measured=measured,
        interval=bootstrap(alphas, study.generator("alpha")),
        control={
            "after_layer_0": after,
            "after_layer_0_attention": fits(lens(study, "blocks.0.hook_resid_mid")[:, FIRST_POSITION:]),
            "after_layer_0_without_ln_final": fits(unembedded("blocks.0.hook_resid_post")),
            "after_layer_0_attention_without_ln_final": fits(unembedded("blocks.0.hook_resid_mid")),
            "before_layer_0": fits(lens(study, "blocks.0.hook_resid_pre")[:, FIRST_POSITION:]),
            "true_next_vector": fits(truth),
        },
        verdict=verdict(
            bool(2.1 <= measured <= 2.5 and after["R2_with_a_n_at_1"] >= 0.5 and 0.5 <= after["a_n"] <= 1.5),
            after["a_n-1"] > 0 and after["R2"] >= 0.5,
        ),
        why=(
            f"Measured: least squares of the unembedded residual stream after layer 0 on a_n + alpha a_{{n-1}}, positions 2 to "
            "13. Rule: alpha within 2.1 to 2.5 and R^2 at least 0.5, and with both coefficients free that of a_n between 0.5 "
            f"and 1.5, so that it really is a_n plus something; partly if with both free that of a_{{n-1}} is positive and R^2 "
            f"at least 0.5. Both free: {after['a_n']:.2f} a_n + {after['a_n-1']:.2f} a_{{n-1}}. true_next_vector is what the "
            "best fixed linear predictor would be."
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures: each a function from a study to a matplotlib figure

TRUTH, MODEL, LENS, OTHER = "tab:blue", "tab:orange", "tab:red", "tab:green"  # one colour for one thing in all figures
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


def grid(rows: int, columns: int, width: float, height: float, title: str, **options):
    """A figure of `rows` x `columns` axes, laid out without overlaps, in inches."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)
    figure.suptitle(title)
    return figure, axes


def heat(axes, matrix: Tensor, limit: float | None = None):
    """A heat map, with the values written in where they are few: diverging about 0 with the range [-limit, limit],
    blue positive as in the paper, or attention from 0 to 1 where `limit` is None."""
    options = {"cmap": "Blues", "vmin": 0, "vmax": 1} if limit is None else {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    image = axes.imshow(matrix.numpy(), **options)
    axes.spines[:].set_visible(True)
    if matrix.numel() <= 64:
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            color = "white" if abs(value) > 0.6 * options["vmax"] else "black"
            axes.text(
                column, row, f"{value:.2f}" if options["vmax"] >= 0.1 else f"{value:.3f}", ha="center", va="center", fontsize=7, color=color
            )
    return image


def integer_ticks(axes, x: int | None = None, y: int | None = None, step: int = 1):
    if x:
        axes.set_xticks(range(0, x, step))
    if y:
        axes.set_yticks(range(0, y, step))


def pick(sample: data.Sample, c: float) -> int:
    """Index of the sequence whose c is nearest to `c`."""
    return int((sample.c - c).abs().argmin())


def figure_sequences(study: Study):
    figure, panels = grid(1, 3, 10, 3, "Types of affine recurrences: 8 of the 40 dimensions, one colour each")
    for axes, c, kind in zip(panels, (-0.9, 0.6, 1.3), ("oscillating", "decaying", "growing")):
        i = pick(study.population, c)
        axes.plot(study.population.a[i, :, :8], marker=".")
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=f"{kind}: c = {study.population.c[i]:.2f}", xlabel="n")
        integer_ticks(axes, MAX_LENGTH + 1, step=2)
    panels[0].set_ylabel("component of $a_n$")
    return figure


def figure_loss(study: Study):
    figure, axes = grid(1, 1, 8, 4, "Loss as a function of steps")
    log = study.log
    axes.semilogy(log["step"], log["loss"], color="0.6", label="training loss, mean since the row before")
    axes.semilogy(log["step"], log["eval_mse"], color=MODEL, label="held-out MSE")
    axes.axhline(1e-4, color=TRUTH, ls="--", label="paper: 0.0001")
    axes.set_ylim(bottom=5e-5)
    axes.set(
        xlabel="step",
        ylabel="mean squared error",
        title=f"at the last step, {log['step'][-1]:,.0f}: held-out MSE {log['eval_mse'][-1]:.2e}",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    return figure


def draw_patterns(patterns: Tensor, title: str, labels: list[str]):
    """The attention patterns of a layer, [n_heads, dest, src], a panel each."""
    figure, panels = grid(2, 4, 10, 5.2, title, sharex=True, sharey=True)
    for head, (axes, pattern) in enumerate(zip(panels.flat, patterns)):
        image = heat(axes, pattern)
        axes.set_title(f"head {head}{labels[head]}")
        integer_ticks(axes, pattern.shape[1], pattern.shape[0], step=2)
    for axes in panels[1]:
        axes.set_xlabel("source position")
    for axes in panels[:, 0]:
        axes.set_ylabel("destination position")
    figure.colorbar(image, ax=panels, label="attention", shrink=0.8)
    return figure


def figure_layer_0_attention(study: Study):
    pattern = study.activations["blocks.0.attn.hook_pattern"]
    labels = [f": {score:.2f} to the previous" for score in previous_token_score(pattern)]
    return draw_patterns(pattern.mean(0), f"Layer 0 attention patterns, mean over {POPULATION:,} sequences", labels)


def figure_layer_1_attention(study: Study):
    pattern = study.activations["blocks.1.attn.hook_pattern"]
    labels = [f": {score:.2f} to the second" for score in second_token_score(pattern)]
    return draw_patterns(pattern.mean(0), f"Layer 1 attention patterns, mean over {POPULATION:,} sequences", labels)


def figure_layer_2_attention(study: Study, sample: data.Sample, c: float, kind: str):
    i = pick(sample, c)
    pattern = study.patterns(study.model, sample.a[i : i + 1, :-1], 2)
    labels = [f": {score:.2f} to the same parity" for score in same_parity_score(pattern)]
    return draw_patterns(pattern[0], f"Layer 2 attention patterns on one {kind} sequence, c = {sample.c[i]:.2f}", labels)


def figure_layer_2_alternating(study: Study):
    return figure_layer_2_attention(study, study.alternating, -1.0, "alternating")


def figure_layer_2_steady(study: Study):
    return figure_layer_2_attention(study, study.steady, 1.0, "non-alternating")


def figure_head_attribution(study: Study):
    figure, panels = grid(2, 2, 10, 7.5, "Direct logit attribution of the heads to the next vector", height_ratios=[1, 2.6])
    n_layers, n_heads = study.model.config.n_layers, study.model.config.n_heads
    readings = {
        "paper_next": "(a) the paper's: ln_final on the head alone",
        "standard_next": "(b) standard: the scale of the whole residual stream",
    }
    for (top, bottom), (name, title) in zip(panels.T, readings.items()):
        by_position = study.head_attribution[name]  # [layer, head, pos]
        mean = by_position[..., FIRST_POSITION:].mean(-1)
        figure.colorbar(heat(top, mean, mean.abs().max()), ax=top, label="dot product")
        top.set(title=f"{title}\nmean over positions {FIRST_POSITION} to {MAX_LENGTH - 1}", xlabel="head", ylabel="layer")
        integer_ticks(top, n_heads, n_layers)
        rows = by_position.flatten(0, 1)
        figure.colorbar(heat(bottom, rows, rows.abs().max()), ax=bottom, label="dot product")
        bottom.set(title="by position", xlabel="position", ylabel="layer.head")
        bottom.set_yticks(range(len(rows)), [f"{l}.{h}" for l in range(n_layers) for h in range(n_heads)], fontsize=7)
        bottom.hlines([n_heads * l - 0.5 for l in range(1, n_layers)], -0.5, MAX_LENGTH - 0.5, color="black", lw=0.8)
        integer_ticks(bottom, MAX_LENGTH)
    return figure


def scatter_fit(axes, x: Tensor, y: Tensor, color: str = TRUTH):
    """The points (x_d, y_d) of one vector with their least squares line."""
    slope, intercept, r2 = (value.item() for value in fit_line(x, y))
    ends = torch.stack([x.min(), x.max()])
    axes.scatter(x, y, s=9, color=color, alpha=0.7, lw=0)
    axes.plot(ends, intercept + slope * ends, color="black", lw=1, label=f"slope {slope:.2f}, intercept {intercept:.3f}, $R^2$ {r2:.2f}")
    axes.set_ylim(y.min().item() * 1.1, y.max().item() * 1.5)  # room for the legend
    axes.legend(loc="upper left", handlelength=1, borderpad=0)


def figure_ov_resid(study: Study):
    fits = study.layer_0_fits
    batch, position = pick(study.population, 1.1), 6
    raw, normalised = (study.activations[f"blocks.0.{name}"][batch, position] for name in ("hook_resid_pre", "ln1.hook_normalized"))
    ov, a = ov_circuit(study.model, 0), study.population.a[batch, position]
    figure, panels = grid(2, 3, 10.5, 6.6, "OV of layer 0 on residual stream vectors (all heads summed unless said otherwise)")
    shown = [
        ("raw", raw, raw @ ov.sum(0), "raw residual stream vector $x$", "(OV $x$)$_d$"),
        ("normalised", normalised, normalised @ ov.sum(0), "normalised vector, as OV reads it", "(OV $\\ln x$)$_d$"),
        ("raw_to_what_is_added", raw, normalised @ ov.sum(0), "raw vector against what is added to it", "(OV $\\ln x$)$_d$"),
        (
            "data_coordinates",
            a,
            a @ full_ov_circuit(study.model, 0).sum(0),
            "data vector through $W_E$ OV $W_U$",
            "component of $a\\,W_E$ OV $W_U$",
        ),
    ]
    for axes, (name, x, y, title, ylabel) in zip(panels.flat, shown):
        scatter_fit(axes, x, y)
        slope, _, r2 = fits[name]
        axes.set(
            title=f"{title}\nall vectors: slope {slope.mean():.2f}, $R^2$ {r2.mean():.2f}",
            xlabel="$a_d$" if name == "data_coordinates" else "$x_d$",
            ylabel=ylabel,
        )
    slope, _, r2 = fits["raw"]
    panels[1, 1].hist(slope.flatten(), bins=60, color=TRUTH)
    panels[1, 1].axvspan(2.1, 2.5, color="0.85", zorder=0, label="paper: 2.1 to 2.5")
    panels[1, 1].set(title="slope, raw vectors, all of the population", xlabel="slope", ylabel="vectors")
    panels[1, 1].legend(loc="upper left")
    panels[1, 1].margins(y=0.2)
    heads = fits["each_head"]
    panels[1, 2].bar(range(len(ov)), heads[2].mean((1, 2)).numpy(), color=TRUTH)
    panels[1, 2].set(title="each head alone, raw vectors: mean $R^2$", xlabel="head", ylabel="$R^2$", ylim=(0, 1))
    integer_ticks(panels[1, 2], len(ov))
    return figure


def figure_ov_sum(study: Study):
    total, full = ov_circuit(study.model, 0).sum(0), full_ov_circuit(study.model, 0).sum(0)
    figure, panels = grid(1, 2, 10, 4.6, "Sum of the OV circuits over all heads of layer 0")
    for axes, matrix, title, name in zip(
        panels,
        (total, full),
        ("$W_V W_O$, as in the paper", "$W_E W_V W_O W_U$, between data vectors"),
        ("residual stream dimension", "data dimension"),
    ):
        figure.colorbar(heat(axes, matrix, matrix.abs().max()), ax=axes, label="weight")
        axes.set(title=f"{title}: cosine with I {identity_cosine(matrix):.2f}", xlabel=f"written {name}", ylabel=f"read {name}")
    return figure


def figure_ov_random(study: Study):
    x, ov = random_vectors(study), ov_circuit(study.model, 0).sum(0)
    resid = study.layer_0_fits["raw"][2].flatten()
    chance = fit_line(x, x @ ov)[2].flatten()
    figure, panels = grid(1, 2, 10, 3.8, "OV of layer 0 (heads summed) on a random vector")
    scatter_fit(panels[0], x[0, 0], x[0, 0] @ ov)
    panels[0].set(title="one Gaussian vector", xlabel="$x_d$", ylabel="(OV $x$)$_d$")
    bins = np.linspace(0, 1, 101)
    panels[1].hist(chance, bins, color=OTHER, alpha=0.7, label=f"random vectors, mean {chance.mean():.2f} (paper: 0.598)")
    panels[1].hist(resid, bins, color=TRUTH, alpha=0.7, label=f"residual stream vectors, mean {resid.mean():.2f} (paper: 0.83)")
    panels[1].set(title=f"{len(chance):,} vectors of each kind", xlabel="$R^2$ of the line", ylabel="vectors")
    panels[1].set_ylim(0, panels[1].get_ylim()[1] * 1.3)
    panels[1].legend(loc="upper left")
    return figure


def draw_circuit(circuits: Tensor, title: str, xlabel: str, ylabel: str):
    """The circuits of a layer, [n_heads, d_model, d_model]: head 0 large, the others small beside it, on one colour scale."""
    figure = plt.figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title)
    names = [["0", "0", "1", "2", "3", "4"], ["0", "0", "5", "6", "7", "."]]
    panels = figure.subplot_mosaic(names)
    limit = circuits.abs().flatten().double().quantile(0.9995).item()
    for name, axes in panels.items():
        image = heat(axes, circuits[int(name)], limit)
        axes.set_aspect("equal")
        axes.set_title(f"head {name}: {identity_cosine(circuits[int(name)]):.2f}")
        if name != "0":
            axes.set(xticks=[], yticks=[])
    panels["0"].set(title=f"head 0: cosine with I {identity_cosine(circuits[0]):.2f}", xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=list(panels.values()), label="weight (ends of the scale: 99.95th percentile)", shrink=0.8)
    return figure


def figure_ov_1(study: Study):
    return draw_circuit(
        ov_circuit(study.model, 1),
        f"OV circuits of layer 1; head 0 has effective rank {effective_rank(ov_circuit(study.model, 1)[0]):.1f} of "
        f"{study.model.config.d_head}",
        "written residual stream dimension",
        "read residual stream dimension",
    )


def figure_ov_2(study: Study):
    return draw_circuit(
        ov_circuit(study.model, 2), "OV circuits of layer 2", "written residual stream dimension", "read residual stream dimension"
    )


def figure_qk_2(study: Study):
    return draw_circuit(
        qk_circuit(study.model, 2), "QK circuits of layer 2", "source residual stream dimension", "destination residual stream dimension"
    )


def figure_lens(study: Study):
    figure, panels = grid(2, 3, 10.5, 5.4, "Residual stream after layer 0, unembedded, against the true next vector", sharex=True)
    predictions = {"after layer 0": (lens(study, "blocks.0.hook_resid_post"), LENS), "model's output": (study.activations["output"], MODEL)}
    a, positions = study.population.a, range(FIRST_POSITION, MAX_LENGTH)
    (beta, alpha), _ = regress(*neighbours(a))
    for column, c in enumerate((-1.0, 0.6, 1.2)):
        i = pick(study.population, c)
        for row, dimension in enumerate((0, 1)):
            axes = panels[row, column]
            axes.plot(positions, a[i, FIRST_POSITION + 1 :, dimension], color=TRUTH, marker="o", ms=4, label="true next vector")
            for name, (prediction, color) in predictions.items():
                axes.plot(
                    positions,
                    prediction[i, FIRST_POSITION:, dimension],
                    color=color,
                    ls="--" if color == MODEL else "-",
                    marker=".",
                    label=name,
                )
            linear = beta * a[i, FIRST_POSITION:-1, dimension] + alpha * a[i, FIRST_POSITION - 1 : -2, dimension]
            axes.plot(
                positions, linear, color="0.6", lw=1, label=f"{beta:.2f} $a_n$ + {alpha:.2f} $a_{{n-1}}$, the best\nfixed linear predictor"
            )
            axes.axhline(0, color="0.9", zorder=0)
            axes.set_title(f"c = {study.population.c[i]:.2f}, dimension {dimension}")
        panels[1, column].set_xlabel("position")
    for axes in panels[:, 0]:
        axes.set_ylabel("component")
    integer_ticks(panels[1, 0], MAX_LENGTH, step=2)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def figure_eigenvalues(study: Study):
    n_layers, n_heads = study.model.config.n_layers, study.model.config.n_heads
    full = torch.stack([eigenvalue_score(full_ov_circuit(study.model, l)) for l in range(n_layers)])
    figure, panels = grid(1, 2, 10, 2.8, "Eigenvalue scores of the OV circuits")
    for axes, scores, title in zip(
        panels, (ov_eigenvalue_scores(study.model), full), ("$W_V W_O$, as in the paper", "$W_E W_V W_O W_U$, the full circuit")
    ):
        image = heat(axes, scores, 1.0)
        axes.set(title=title, xlabel="head", ylabel="layer")
        integer_ticks(axes, n_heads, n_layers)
    figure.colorbar(image, ax=panels, label="score: 1 copies, -1 negates")
    return figure


def figure_mlp_attribution(study: Study):
    figure, panels = grid(1, 2, 10, 3.8, "Direct logit attribution of the MLPs to the next vector, by position")
    readings = {
        "paper_next": "(a) the paper's: ln_final on the MLP alone",
        "standard_next": "(b) standard: the scale of the whole residual stream",
    }
    for axes, (name, title) in zip(panels, readings.items()):
        for layer, values in enumerate(study.mlp_attribution[name]):
            axes.plot(values, marker="o", ms=4, color=(TRUTH, OTHER, LENS)[layer % 3], label=f"MLP of layer {layer}")
        if name == "standard_next":
            axes.plot(study.head_attribution[name].sum((0, 1)), color="0.6", ls="--", label="all heads together")
        axes.axhline(0, color="0.8", zorder=0)
        axes.axvspan(-0.5, FIRST_POSITION - 0.5, color="0.95", zorder=0)
        axes.set(
            title=title, xlabel="position (grey: the next vector cannot be known yet)", ylabel="dot product", xlim=(-0.5, MAX_LENGTH - 0.5)
        )
        integer_ticks(axes, MAX_LENGTH)
        axes.legend()
    return figure


def figure_estimate(study: Study):
    """The paper's axis shows positions of one sequence in one dimension."""
    i, dimension = pick(study.population, -0.9), 0
    a = study.population.a[i, :, dimension]
    positions = range(1, MAX_LENGTH)
    figure, axes = grid(
        1, 1, 8, 4, f"What layer 0 does to one alternating sequence: c = {study.population.c[i]:.2f}, dimension {dimension}"
    )
    axes.plot(
        positions,
        lens(study, "blocks.0.hook_resid_pre")[i, 1:, dimension],
        color="goldenrod",
        marker=".",
        label="before layer 0, unembedded",
    )
    axes.plot(
        positions, lens(study, "blocks.0.hook_resid_post")[i, 1:, dimension], color="purple", marker=".", label="after layer 0, unembedded"
    )
    axes.plot(positions, a[1:-1] + 2.3 * a[:-2], color=OTHER, marker=".", label="$a_n + 2.3\\,a_{n-1}$ (the paper's $\\alpha$)")
    axes.plot(positions, a[2:], color=TRUTH, marker="o", ms=4, label="$a_{n+1}$, the truth")
    axes.axhline(0, color="0.9", zorder=0)
    axes.set(xlabel="position n", ylabel="component")
    integer_ticks(axes, MAX_LENGTH)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


PREDICTORS = {  # label and line of each of `Study.predictors`
    "predict_zero": ("predicting 0", {"color": "0.75"}),
    "predict_last_vector": ("repeating the last vector", {"color": "0.5"}),
    "best_linear_of_2": ("best fixed linear predictor from 2 vectors", {"color": OTHER}),
    "best_linear_of_3": ("the same from 3 vectors", {"color": OTHER, "ls": ":"}),
    "exact_solver": ("exact solver on the last 3 vectors, float32", {"color": TRUTH}),
    "model": ("model", {"color": MODEL, "lw": 2}),
}


def draw_errors(axes, x, errors: dict[str, Tensor], **options):
    """A line for each predictor, on a logarithmic axis."""
    for name, (label, line) in PREDICTORS.items():
        axes.semilogy(x, errors[name], label=label, **line, **options)


def figure_errors_by_position(study: Study):
    figure, axes = grid(1, 1, 9, 4, f"Error against what is possible, by position ({POPULATION:,} sequences)")
    errors = {name: e.mean(0) for name, e in study.test_errors.items()}
    draw_errors(axes, range(FIRST_POSITION, MAX_LENGTH), errors, marker=".")
    axes.set(xlabel="position n, at which the next vector is predicted", ylabel="mean squared error")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def figure_errors_by_c(study: Study):
    figure, axes = grid(1, 1, 9, 4, f"Error against what is possible, by c ({POPULATION:,} sequences)")
    draw_errors(axes, np.arange(-2, 2, C_BIN) + C_BIN / 2, study.errors_by_c, marker=".")
    axes.set(xlabel=f"c, in ranges of {C_BIN}", ylabel="mean squared error")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def figure_out_of_distribution(study: Study):
    figure, panels = grid(2, 2, 10, 7, "Where training never went (white: where it did)", sharey=True)
    shown = {
        "length": ("inputs", (MIN_LENGTH, MAX_LENGTH)),
        "c": ("c", (-2, 2)),
        "scale": ("factor on all vectors", (0.95, 1.05)),
        "noise": ("standard deviation of the noise on the inputs", None),
    }
    for axes, (what, (xlabel, trained)) in zip(panels.flat, shown.items()):
        settings = study.out_of_distribution[what]
        relative = {
            name: torch.stack([errors[name].mean() / errors["predict_zero"].mean() for errors in settings.values()])
            for name in study.predictors
        }
        draw_errors(axes, list(settings), relative)
        if what in ("scale", "noise"):
            axes.set_xscale("log")
        low, high = min(settings), max(settings)
        axes.axvspan(low, trained[0] if trained else high, color="0.95", zorder=0)
        if trained:
            axes.axvspan(trained[1], high, color="0.95", zorder=0)
        axes.set(xlabel=xlabel, xlim=(low, high))
    for axes in panels[:, 0]:
        axes.set_ylabel("MSE / MSE of predicting 0")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def figure_example(study: Study):
    positions = 8
    i = pick(study.alternating, -1.0)
    pattern = study.patterns(study.model, study.alternating.a[i : i + 1, :positions], 0)[0]
    head = int(previous_token_score(pattern[None]).argmax())
    figure, axes = grid(1, 1, 5.4, 4.4, f"An attention pattern: layer 0, head {head}, one sequence")
    figure.colorbar(heat(axes, pattern[head]), ax=axes, label="attention")
    axes.set(title="each row sums to 1; nothing above the diagonal", xlabel="source position", ylabel="destination position")
    integer_ticks(axes, positions, positions)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The tables. Everything else reads them.


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    draw: Callable[[Study], plt.Figure]


@dataclass(frozen=True)
class Summary:
    """A claim in a few numbers, to compare seeds by; `find` says what the places mean. Which head does what differs from
    seed to seed, so measurements by head are averaged over them."""

    quantity: str
    values: dict[str, str]  # label: place
    controls: dict[str, str]
    paper: tuple[float, float] | None = None  # the paper's value in this quantity as a range, where it is a number
    relative_to: str | None = None  # place of what all are divided by
    log: bool = False


@dataclass(frozen=True)
class Claim:
    claim: str
    paper: object  # the paper's value
    figure: int
    measure: Callable[[Study], Finding]


FIGURES = {
    1: Figure("sequences", "types of affine recurrences", figure_sequences),
    2: Figure("loss", "loss against step", figure_loss),
    3: Figure("attention_layer_0", "layer 0 attention patterns", figure_layer_0_attention),
    4: Figure("attention_layer_1", "layer 1 attention patterns", figure_layer_1_attention),
    5: Figure("attention_layer_2_alternating", "layer 2 attention patterns, alternating sequence", figure_layer_2_alternating),
    6: Figure("attention_layer_2_other", "layer 2 attention patterns, non-alternating sequence", figure_layer_2_steady),
    7: Figure("head_attribution", "direct logit attribution of the heads", figure_head_attribution),
    8: Figure("ov_layer_0_resid", "OV of layer 0 on residual stream vectors", figure_ov_resid),
    9: Figure("ov_layer_0_sum", "sum of the OV circuits of layer 0", figure_ov_sum),
    10: Figure("ov_layer_0_random", "OV of layer 0 on a random vector", figure_ov_random),
    11: Figure("ov_layer_1", "OV of layer 1 head 0", figure_ov_1),
    12: Figure("ov_layer_2", "OV of layer 2 head 0", figure_ov_2),
    13: Figure("qk_layer_2", "QK of layer 2 head 0", figure_qk_2),
    14: Figure("lens_after_layer_0", "residual stream after layer 0 against the true output", figure_lens),
    15: Figure("eigenvalue_scores", "OV eigenvalue scores", figure_eigenvalues),
    16: Figure("mlp_attribution", "direct logit attribution of the MLPs", figure_mlp_attribution),
    17: Figure("estimate", "before and after layer 0, a_n + 2.3 a_{n-1}, and the truth", figure_estimate),
    18: Figure("attention_example", "an attention pattern", figure_example),
    # not in the paper
    19: Figure("errors_by_position", "error by position, against what is possible", figure_errors_by_position),
    20: Figure("errors_by_c", "error by c, against what is possible", figure_errors_by_c),
    21: Figure("out_of_distribution", "error on longer, wilder, larger, smaller and noisy sequences", figure_out_of_distribution),
}


LAYERS = ("layer 0", "layer 1", "layer 2")
ATTENTION = Summary("attention", {"heads": "measured"}, {"untrained": "untrained", "uniform": "uniform_attention"})
LIKENESS_TO_I = Summary("cosine with I", {"heads": "measured"}, {"untrained": "untrained", "layer 0": "layer_0", "layer 1": "layer_1"})
SUMMARIES = {
    "mse": Summary(
        "MSE",
        {"model": "measured"},
        {"best linear": "best_linear_of_2", "last vector": "predict_last_vector"},
        paper=(1e-4, 1e-4),
        log=True,
    ),
    "l0_prev_token": ATTENTION,
    "l1_second_token": ATTENTION,
    "l2_checkerboard": Summary(
        "attention", {"heads, c near -1": "measured"}, {"heads, c near 1": "c_near_1", "uniform": "uniform_attention"}
    ),
    "dla_sign": Summary(
        "dot product",
        {layer: f"measured/{l}" for l, layer in enumerate(LAYERS)},
        {f"(b) {layer}": f"standard_next_by_layer/{l}" for l, layer in enumerate(LAYERS)},
    ),
    "l0_ov_r2": Summary(
        "R^2",
        {"residual stream": "measured"},
        {"random vectors": "random_vectors", "data vectors": "data_coordinates"},
        paper=(0.83, 0.83),
    ),
    "l0_ov_slope": Summary(
        "slope",
        {"residual stream": "measured"},
        {"to what is added": "raw_to_what_is_added", "data vectors": "data_coordinates"},
        paper=(2.1, 2.5),
    ),
    "l0_ov_intercept": Summary("intercept", {"residual stream": "measured"}, {"data vectors": "data_coordinates"}, paper=(0, 0)),
    "l0_ov_r2_random": Summary(
        "R^2",
        {"random vectors": "measured"},
        {"residual stream": "residual_stream_vectors", "untrained": "untrained_ov"},
        paper=(0.598, 0.598),
    ),
    "l0_orthogonal": Summary(
        "share of the norm",
        {"OV x": "measured"},
        {"random direction": "random_directions", "untrained": "untrained_ov"},
        paper=(0.8415, 0.8415),
    ),
    "l1_mean_ablation": Summary(
        "MSE / unchanged",
        {"layer 1": "measured"},
        {"layer 0": "layer_0_attention_mean/mse", "layer 2": "layer_2_attention_mean/mse"},
        paper=(2, 2),
        relative_to="unchanged",
        log=True,
    ),
    "l1_ov_effective_rank": Summary(
        "effective rank", {"head 0": "measured", "all heads": "all_heads/1"}, {"untrained": "untrained", "layer 2": "all_heads/2"}
    ),
    "l2_ov_identity": LIKENESS_TO_I,
    "l2_qk_identity": LIKENESS_TO_I,
    "lens_after_l0": Summary(
        "explained",
        {"as it is": "measured"},
        {"rescaled": "multiplied_by_the_best_constant", "best linear": "best_fixed_linear_predictor_from_a_n_and_a_n-1"},
    ),
    "eigenvalue_score": Summary(
        "score",
        {layer: f"measured/{l}" for l, layer in enumerate(LAYERS)},
        {f"full, {layer}": f"full_circuit_through_W_E_and_W_U/{l}" for l, layer in enumerate(LAYERS)},
    ),
    "l2_qk_pinv": Summary(
        "MSE / unchanged",
        {"pseudo-inverse": "measured"},
        {"uniform": "uniform_attention/mse", "random": "random_qk_of_equal_norm/mse", "mean ablation": "mean_ablation/mse"},
        paper=(1, 1),
        relative_to="unchanged",
        log=True,
    ),
    "mlp_dla": Summary(
        "dot product",
        {"positions 11-13": "mean_of_the_sum_at_positions_11_to_13"},
        {"positions 2-10": "mean_of_the_sum_at_positions_2_to_10"},
    ),
    "alpha": Summary(
        "coefficient",
        {"alpha": "measured"},
        {"free: a_n": "after_layer_0/a_n", "free: a_n-1": "after_layer_0/a_n-1"},
        paper=(2.3, 2.3),
    ),
}

CLAIMS = {
    "mse": Claim("MSE after training", 1e-4, 2, claim_mse),
    "l0_prev_token": Claim("layer 0 heads, all but one, attend to the previous vector", "7 of 8 heads", 3, claim_l0_prev_token),
    "l1_second_token": Claim("most layer 1 heads attend to the second vector", "most", 4, claim_l1_second_token),
    "l2_checkerboard": Claim(
        "layer 2 attends to same-parity positions on alternating sequences and not on others", "yes", 5, claim_l2_checkerboard
    ),
    "dla_sign": Claim("direct logit attribution: layer 0 positive, layer 1 near 0, layer 2 negative", "+, 0, -", 7, claim_dla_sign),
    "l0_ov_r2": Claim("layer 0 OV is linear on residual stream vectors: R^2", 0.83, 8, claim_l0_ov_r2),
    "l0_ov_slope": Claim("its slope", "2.1 to 2.5", 8, claim_l0_ov_slope),
    "l0_ov_intercept": Claim("its intercept", "near 0", 8, claim_l0_ov_intercept),
    "l0_ov_r2_random": Claim("the same R^2 on random vectors", 0.598, 10, claim_l0_ov_r2_random),
    "l0_orthogonal": Claim("share of the norm of layer 0's OV x outside the span of W_E", 0.8415, 9, claim_l0_orthogonal),
    "l1_mean_ablation": Claim("MSE with all layer 1 heads mean-ablated, from 1e-4", 2e-4, 4, claim_l1_mean_ablation),
    "l1_ov_effective_rank": Claim("OV of layer 1 head 0 has low effective rank", "low", 11, claim_l1_ov_effective_rank),
    "l2_ov_identity": Claim("OV is like -I in every layer 2 head", "yes", 12, claim_l2_ov_identity),
    "l2_qk_identity": Claim("QK is like +I in every layer 2 head", "yes", 13, claim_l2_qk_identity),
    "lens_after_l0": Claim(
        "the residual stream after layer 0, unembedded, is already a fair estimate of the output", "Figure 14", 14, claim_lens_after_l0
    ),
    "eigenvalue_score": Claim("OV eigenvalue scores: layer 2 copies negatively", "layer 2 negative", 15, claim_eigenvalue_score),
    "l2_qk_pinv": Claim("MSE with W_Q random and W_K^T its pseudoinverse in layer 2 heads 0-4: unchanged", 1e-4, 13, claim_l2_qk_pinv),
    "mlp_dla": Claim("the MLPs push in the right direction mainly at the last positions", "Figure 16", 16, claim_mlp_dla),
    "alpha": Claim("the residual stream after layer 0 is about a_n + alpha a_{n-1}", 2.3, 17, claim_alpha),
}


# ---------------------------------------------------------------------------------------------------------------------
# Several seeds

MARKS = {"reproduced": ("o", TRUTH), "partly": ("s", MODEL), "not reproduced": ("X", LENS)}  # one for each verdict
SNAPSHOTS = {  # title of each measure of snapshots.csv
    "mse": "MSE on 14 inputs",
    "prev_token": "attention to the previous vector",
    "second_token": "attention to the second vector",
    "eigenvalue_score": "OV eigenvalue score",
    "ov_identity": "OV: cosine with I",
    "qk_identity": "QK: cosine with I",
    "dla_paper": "attribution of the heads, paper's reading",
    "dla_standard": "attribution of the heads, standard",
    "l0_orthogonal": "layer 0: share of OV x outside span of W_E",
}


def find(result: dict, place: str) -> float:
    """A number of a claim as results.json has it: "measured", or the keys and indices of a control, "all_heads/1"; a list as its mean."""
    value = {"measured": result["measured"], **result["control"]}
    for key in place.split("/"):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return float(np.mean(value))


def summarise(name: str, result: dict) -> dict[str, dict[str, float]]:
    """The numbers that `SUMMARIES` names for a claim, {"values": {label: number}, "controls": {label: number}}."""
    summary = SUMMARIES[name]
    unit = find(result, summary.relative_to) if summary.relative_to else 1.0
    groups = {"values": summary.values, "controls": summary.controls}
    return plain({kind: {label: find(result, place) / unit for label, place in places.items()} for kind, places in groups.items()})


def spread(values: list[float]) -> dict:
    """The value of each seed, their mean, sample standard deviation (0 for a single one) and range."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return plain({"seeds": values, "mean": float(np.mean(values)), "sd": sd, "lowest": min(values), "highest": max(values)})


def over_seeds(seeds: dict[str, dict]) -> dict[str, dict]:
    """What each claim comes to, from {seed: {claim: {"verdict": .., "values": {..}, "controls": {..}}}}."""
    claims = {}
    for name, claim in CLAIMS.items():
        each = [found[name] for found in seeds.values()]
        claims[name] = {
            "claim": claim.claim,
            "paper": claim.paper,
            "quantity": SUMMARIES[name].quantity,
            "verdicts": {verdict: sum(found["verdict"] == verdict for found in each) for verdict in MARKS},
        }
        for kind in ("values", "controls"):
            claims[name][kind] = {label: spread([found[kind][label] for found in each]) for label in each[0][kind]}
    return claims


def course(step: np.ndarray, values: np.ndarray) -> dict:
    """How a measure got from its first value to the mean of its last ten: {"start", "end", "halfway": the first step at which
    half of the way was done, None if it led nowhere, "peak": the value farthest from the start, "peak_step"}."""
    start, end = float(values[0]), float(values[-10:].mean())
    gone = (values - start) * np.sign(end - start) >= abs(end - start) / 2
    peak = np.argmax(np.abs(values - start))
    return plain(
        {
            "start": start,
            "end": end,
            "halfway": int(step[np.argmax(gone)]) if end != start else None,
            "peak": values[peak],
            "peak_step": int(step[peak]),
        }
    )


def order_of_events(snapshots: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict]]:
    """`course` of what the snapshots hold, {what: {seed: ..}}: measures by head as the mean of each layer, attention also as
    the number of heads that give more than half of theirs, the MSE as its logarithm."""
    events: dict[str, dict] = {}
    for seed, series in snapshots.items():
        followed = {"log10 of the MSE": np.log10(series["mse"]), "l0_orthogonal": series["l0_orthogonal"]}
        for name, values in series.items():
            for l, heads in enumerate(values.transpose(1, 0, 2) if values.ndim == 3 else []):  # [rows, n_heads]
                followed[f"{name} layer {l}"] = heads.mean(1)
                if name in ("prev_token", "second_token"):
                    followed[f"{name} layer {l}: heads above one half"] = (heads > 0.5).sum(1)
        for name, values in followed.items():
            events.setdefault(name, {})[seed] = course(series["step"], values)
    return events


def figure_seeds(results: dict):
    """A panel for each claim: a mark for each seed, in the same order everywhere, and a bar at their mean."""
    columns = 4
    rows = -(-(len(CLAIMS) + 1) // columns)
    figure, panels = grid(rows, columns, 11, 2.5 * rows, f"The claims over {len(results['seeds'])} seeds")
    for axes, (name, claim) in zip(panels.flat, results["claims"].items()):
        summary, verdicts = SUMMARIES[name], [found[name]["verdict"] for found in results["seeds"].values()]
        groups = [(label, group, True) for label, group in claim["values"].items()]
        groups += [(label, group, False) for label, group in claim["controls"].items()]
        for x, (label, group, measured) in enumerate(groups):
            xs = x + np.linspace(-0.25, 0.25, len(verdicts)) if len(verdicts) > 1 else [x]
            for i, value in enumerate(group["seeds"]):
                marker, color = MARKS[verdicts[i]] if measured else (".", "0.6")
                axes.plot(xs[i], value, marker=marker, color=color, ms=5, mec="none", ls="")
            axes.plot([x - 0.35, x + 0.35], [group["mean"]] * 2, color="black", lw=1)
        if summary.paper:
            low, high = summary.paper
            axes.axhspan(low, high, color=OTHER, alpha=0.3, lw=0) if low < high else axes.axhline(low, color=OTHER, ls="--", lw=1)
        axes.set_yscale("log" if summary.log else "linear")
        labels = [textwrap.fill(label, 9 if len(groups) < 4 else 6, break_long_words=False) for label, _, _ in groups]
        axes.set_xticks(range(len(groups)), labels, fontsize=7)
        axes.set(xlim=(-0.6, len(groups) - 0.4), ylabel=summary.quantity)
        axes.set_title(f"{name}: {claim['verdicts']['reproduced']} of {len(verdicts)}\npaper: {short(claim['paper'])}", fontsize=8)
    legend, *unused = panels.flat[len(CLAIMS) :]
    for axes in (legend, *unused):
        axes.axis("off")
    handles = [legend.plot([], [], marker=marker, color=color, ls="", label=verdict)[0] for verdict, (marker, color) in MARKS.items()]
    handles.append(legend.plot([], [], marker=".", color="0.6", ls="", label="control")[0])
    handles.append(legend.plot([], [], color="black", lw=1, label="mean over seeds")[0])
    handles.append(legend.plot([], [], color=OTHER, ls="--", lw=1, label="paper")[0])
    legend.legend(handles=handles, loc="center")
    return figure


def figure_snapshots(snapshots: dict[str, dict[str, np.ndarray]]):
    """A panel for each measure: a line for each seed, by layer where it has layers."""
    figure, panels = grid(3, 3, 11, 8.5, "When it forms: means over the heads of a layer, a line for each seed", sharex=True)
    for axes, (name, title) in zip(panels.flat, SNAPSHOTS.items()):
        for series in snapshots.values():
            values = series[name].mean(2).T if series[name].ndim == 3 else [series[name]]
            for layer, line in enumerate(values):
                color = "black" if series[name].ndim == 1 else (TRUTH, OTHER, LENS)[layer % 3]
                axes.plot(series["step"], line, color=color, lw=1, alpha=0.8)
        axes.set_title(title)
        if name == "mse":
            axes.set_yscale("log")
        elif "token" not in name and name != "l0_orthogonal":
            axes.axhline(0, color="0.8", zorder=0)
        axes.set_xscale("symlog", linthresh=max(1.0, series["step"][-1] / 400))  # logarithmic, but with a place for 0
    for axes in panels[-1]:
        axes.set_xlabel("step")
    layers = next(iter(snapshots.values()))["prev_token"].shape[1]
    handles = [panels[0, 0].plot([], [], color=(TRUTH, OTHER, LENS)[l % 3], label=f"layer {l}")[0] for l in range(layers)]
    figure.legend(handles=handles, loc="outside lower center", ncols=layers)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The report and the command line


def plain(value):
    """Tensors and nested containers as JSON has them, numbers to six significant digits."""
    if isinstance(value, (Tensor, np.generic)):
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
        return ("<br>" if value and isinstance(value[0], list) else " ").join(short(item) for item in value)
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.3g}"
    return str(value)


def figure_file(number: int) -> str:
    return f"fig{number:02d}_{FIGURES[number].name}.png"


def meta(study: Study) -> dict:
    """What the numbers were computed from, and with."""
    with open(study.weights_file, "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    return {
        "weights": study.weights_file,
        "sha256": digest,
        "step": int(study.log["step"][-1]),
        "seed": study.seed,
        "samples": {
            "held_out": HELD_OUT_PER_LENGTH * len(data.LENGTHS),
            "population": POPULATION,
            "test": POPULATION,
            "single_head_ablation": HEAD_ABLATION,
            "alternating": EXAMPLES,
            "qk_draws": QK_DRAWS,
            "bootstrap": RESAMPLES,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "matplotlib": matplotlib.__version__,
        },
    }


def markdown(results: dict) -> str:
    """results.md: a table with a row for each claim, then the rule and the controls of each."""
    lines = [
        "# What the paper claims and what this model shows",
        "",
        "Written by `python analyze.py --all`; all numbers, with more digits, are in `results.json`.",
        "",
    ]
    lines += [f"{key}: {short(value)}  " for key, value in results["meta"].items()]
    lines += ["", "| claim | figure | paper | measured | 95% interval | verdict |", "| --- | --- | --- | --- | --- | --- |"]
    for name, claim in results["claims"].items():
        number = CLAIMS[name].figure
        interval = " to ".join(short(end) for end in claim["interval"]) if claim["interval"] else ""
        lines.append(
            f"| [`{name}`](#{name}) {claim['claim']} | [{number}]({figure_file(number)}) | {short(claim['paper'])} | "
            f"{short(claim['measured'])} | {interval} | {claim['verdict']} |"
        )
    for name, claim in results["claims"].items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{claim['claim'].replace('|', '')}: **{claim['verdict']}**. {claim['why']}",
            "",
            "| control | value |",
            "| --- | --- |",
        ]
        # The 48 intervals of the single heads stay in results.json.
        shown = {key: value for key, value in claim["control"].items() if not (key.startswith("each_head") and key.endswith("interval"))}
        lines += [f"| {key.replace('_', ' ')} | {short(value)} |" for key, value in shown.items()]
    return "\n".join(lines) + "\n"


def seeds_markdown(results: dict) -> str:
    """seeds.md: what each claim comes to over the seeds, the verdict of each, and in which order things formed."""
    seeds, claims = list(results["seeds"]), results["claims"]

    def lines_of(groups: dict, text: Callable[[dict], str]) -> str:
        return "<br>".join(f"{label}: {text(group)}" if len(groups) > 1 else text(group) for label, group in groups.items())

    lines = [
        f"# The claims over {len(seeds)} seeds",
        "",
        "Written by `python analyze.py --seeds DIR`; more digits and the measurements by head are in `seeds.json`, the rules for the",
        "verdicts in `results.md`. A mean over heads, as this table has it, is not what a rule about single heads reads.",
        "",
    ]
    lines += [f"{key}: {short(value)}  " for key, value in results["meta"].items()]
    lines += [
        "",
        "| claim | paper | quantity | each seed | mean (standard deviation) | controls, mean over seeds | reproduced | partly | not |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, claim in claims.items():
        each = lines_of(claim["values"], lambda group: " ".join(short(value) for value in group["seeds"]))
        average = lines_of(claim["values"], lambda group: f"{short(group['mean'])} ({short(group['sd'])})")
        controls = "<br>".join(f"{label}: {short(group['mean'])}" for label, group in claim["controls"].items())
        cells = [f"[`{name}`](results.md#{name}) {claim['claim']}", short(claim["paper"]), claim["quantity"], each, average, controls]
        lines.append(f"| {' | '.join([*cells, *map(str, claim['verdicts'].values())])} |")
    lines += ["", "## Verdict of each seed", "", f"| claim | {' | '.join(seeds)} |", "| --- |" + " --- |" * len(seeds)]
    lines += [f"| `{name}` | {' | '.join(results['seeds'][seed][name]['verdict'] for seed in seeds)} |" for name in claims]
    if results["when"]:
        followed = list(next(iter(results["when"].values())))
        lines += [
            "",
            "## When",
            "",
            "Means over the heads of a layer: the value before training, the one farthest from it and when, the mean of the last ten",
            "snapshots, and the first snapshot at which half of the way from the first to the last was done.",
            "",
            f"| measure | {' | '.join(f'{seed}: start, peak (step), end' for seed in followed)} | halfway at step |",
            "| --- |" + " --- |" * len(followed) + " --- |",
        ]
        for name, events in sorted(results["when"].items(), key=lambda item: np.mean([e["halfway"] or 0 for e in item[1].values()])):
            if all(e["peak"] == e["start"] for e in events.values()):
                continue  # nothing happened
            cells = [f"{short(e['start'])}, {short(e['peak'])} ({e['peak_step']:,}), {short(e['end'])}" for e in events.values()]
            steps = ", ".join("-" if e["halfway"] is None else f"{e['halfway']:,}" for e in events.values())
            lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} | {steps} |")
    return "\n".join(lines) + "\n"


def table(results: dict) -> str:
    """The claims as lines for a terminal."""
    rows = [
        (name, short(claim["paper"]), short(claim["measured"]).replace("<br>", " / "), claim["verdict"])
        for name, claim in results["claims"].items()
    ]
    rows = [(name, paper, measured if len(measured) <= 50 else measured[:47] + "...", verdict) for name, paper, measured, verdict in rows]
    rows = [("claim", "paper", "measured", "verdict"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


class Progress:
    """A line on the terminal that names what is being made, with the time taken and, after the first, the time left."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def next(self, what: str):
        elapsed = time.perf_counter() - self.start
        left = f", about {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        self.done += 1
        line = f"[{self.done}/{self.total}] {what} ({elapsed:.0f} s{left})"
        print(f"\r{line}\x1b[K" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    def skip(self, number: int):
        """Leave out what is already there, for the time left too."""
        self.total -= number

    def finish(self):
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def write_text(out: str, name: str, text: str):
    with replacing(os.path.join(out, name)) as f:
        f.write(text.encode())


def draw(figure_of: Callable, what, path: str):
    """Write the figure that `figure_of` makes of `what` to a PNG."""
    with plt.rc_context(STYLE):
        figure = figure_of(what)
        with replacing(path) as f:
            figure.savefig(f, format="png")
        plt.close(figure)


def measure(study: Study, claims: Iterable[str], progress: Progress, prefix: str = "") -> dict[str, dict]:
    """The `claims` as results.json has them."""
    results = {}
    for name in claims:
        progress.next(f"{prefix}claim {name}")
        claim = CLAIMS[name]
        results[name] = plain({"claim": claim.claim, "paper": claim.paper, **asdict(claim.measure(study))})
    return results


def run(study: Study, out: str, figures: list[int], claims: list[str]):
    """Draw `figures` into `out`; with `claims` measure them, write results.json and results.md and print the table."""
    os.makedirs(out, exist_ok=True)
    progress = Progress(len(figures) + len(claims))
    for number in figures:
        progress.next(f"figure {number}: {FIGURES[number].title}")
        draw(FIGURES[number].draw, study, os.path.join(out, figure_file(number)))
    results = {"meta": meta(study), "claims": measure(study, claims, progress)}
    progress.finish()
    if claims:
        write_text(out, "results.json", json.dumps(results, indent=1) + "\n")
        write_text(out, "results.md", markdown(results))
        print(table(results))
    print(
        f"{len(figures)} figures{' and results.json, results.md' if claims else ''} in {out}, {time.perf_counter() - progress.start:.0f} s"
    )


def open_seeds(folder: str, seed: int) -> tuple[dict[str, str], dict[str, dict[str, np.ndarray]]]:
    """The runs in `folder`/seed_*/, {name: path}, and the snapshots of those that have some, {name: series}.

    Raises FileNotFoundError if there is none, and FileNotFoundError or ValueError for one that cannot be read or is at another step.
    """
    runs = {os.path.basename(path): path for path in sorted(glob.glob(os.path.join(glob.escape(folder), "seed_*"))) if os.path.isdir(path)}
    if not runs:
        raise FileNotFoundError(f"there is no run in {os.path.join(folder, 'seed_*')}: train some with train.py --seeds 0-3 --out {folder}")
    steps = {name: int(Study(path, seed).log["step"][-1]) for name, path in runs.items()}
    for name, step in steps.items():
        if step < max(steps.values()):
            raise ValueError(
                f"{runs[name]} is at step {step:,}, another seed at {max(steps.values()):,}: "
                "go on with train.py --seeds .. --resume, or move it elsewhere"
            )
    tables = {name: os.path.join(path, "snapshots.csv") for name, path in runs.items()}
    return runs, {name: read_snapshots(path) for name, path in tables.items() if os.path.exists(path)}


def run_seeds(folder: str, seed: int, out: str):
    """Measure every claim on every run in `folder`/seed_*/; write seeds.json, seeds.md, seeds.png and snapshots.png to `out`.

    What is measured is kept in seeds.partial.json until all is, so that after an interruption only the rest is measured.
    """
    runs, snapshots = open_seeds(folder, seed)
    os.makedirs(out, exist_ok=True)
    partial = os.path.join(out, "seeds.partial.json")
    code = hashlib.sha256()
    for name in ("data.py", "model.py", "interventions.py", "analyze.py"):
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), "rb") as f:
            code.update(f.read())

    def description(study: Study) -> dict:
        return {key: value for key, value in meta(study).items() if key != "weights"} | {"code": code.hexdigest()}

    try:
        with open(partial) as f:
            kept = dict(json.load(f))
    except (OSError, ValueError, TypeError):  # there is none, or none that this program wrote
        kept = {}
    progress = Progress(len(runs) * len(CLAIMS))
    for name, path in runs.items():
        study = Study(path, seed)
        if kept.get(name, {}).get("meta") == description(study):
            progress.skip(len(CLAIMS))
            continue
        claims = measure(study, CLAIMS, progress, f"{name} ")
        for claim, found in claims.items():
            found |= summarise(claim, found)
            del found["control"]
        kept[name] = {"meta": description(study), "claims": claims}
        write_text(out, "seeds.partial.json", json.dumps(kept))
    progress.finish()

    seeds = {name: kept[name]["claims"] for name in runs}
    common = {key: value for key, value in meta(study).items() if key != "weights"}
    results = {
        "meta": common | {"sha256": {name: kept[name]["meta"]["sha256"] for name in runs}},
        "claims": over_seeds(seeds),
        "when": order_of_events(snapshots),
        "seeds": seeds,
    }
    draw(figure_seeds, results, os.path.join(out, "seeds.png"))
    if snapshots:
        draw(figure_snapshots, snapshots, os.path.join(out, "snapshots.png"))
    write_text(out, "seeds.json", json.dumps(results, indent=1) + "\n")
    write_text(out, "seeds.md", seeds_markdown(results))
    os.remove(partial)
    for name, claim in results["claims"].items():
        print(f"{name:22}" + "  ".join(f"{count} {verdict}" for verdict, count in claim["verdicts"].items() if count))
    files = ["seeds.json", "seeds.md", "seeds.png", *(["snapshots.png"] if snapshots else [])]
    print(f"{len(runs)} seeds: {', '.join(files)} in {out}, {time.perf_counter() - progress.start:.0f} s")
    if without := [name for name in runs if name not in snapshots]:
        print(
            f"no snapshots.csv in {', '.join(without)}: nothing is shown of how these formed (train.py --snapshot-every 0, or an older one)"
        )


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--all", action="store_true", help="draw every figure, measure every claim, write results.json and results.md")
    parser.add_argument("--list", action="store_true", help="list the figures and claims")
    parser.add_argument(
        "--fig", type=whole_number(1), action="append", default=[], metavar="N", help="draw figure N; may be given several times"
    )
    parser.add_argument("--seeds", metavar="DIR", help="measure every claim on every run in DIR/seed_*/ and compare them")
    parser.add_argument("--run", default="weights", metavar="DIR", help="folder with weights.pt and log.csv (default: weights)")
    parser.add_argument("--out", default="figures", metavar="DIR", help="folder for the figures and results (default: figures)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the sequences and random matrices (default: 0)")
    arguments = parser.parse_args()
    for number in arguments.fig:
        if number not in FIGURES:
            parser.error(f"there is no figure {number}; figures are 1 to {max(FIGURES)}, see --list")
    if not (arguments.all or arguments.list or arguments.fig or arguments.seeds):
        parser.error("nothing to do: give --all, --fig N, --seeds DIR or --list")
    if arguments.seeds and (arguments.all or arguments.fig or arguments.run != parser.get_default("run")):
        parser.error("--seeds DIR is about other runs than --all, --fig and --run: give it by itself")

    try:
        if arguments.list:
            print("\n".join(f"figure {number:2}  {figure.title}" for number, figure in FIGURES.items()))
            print(
                "\n".join(
                    f"claim  {name}: {claim.claim} (paper: {short(claim.paper)}; figure {claim.figure})" for name, claim in CLAIMS.items()
                )
            )
        if arguments.all or arguments.fig:
            study = Study(arguments.run, arguments.seed)
            run(study, arguments.out, list(FIGURES) if arguments.all else sorted(set(arguments.fig)), list(CLAIMS) if arguments.all else [])
        if arguments.seeds:
            run_seeds(arguments.seeds, arguments.seed, arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
