"""What the model computes: 27 numbers for its OV circuits and MLPs, beside the best fixed linear filter.

    python -m beyond.mechanism --all                    # on the weights that ship, into beyond/figures/
    python -m beyond.mechanism --fig 22                 # one figure; --list names them
    python -m beyond.mechanism --all --run runs/paper   # another run, into runs/paper/figures

The command also runs gain.py; the article is beyond/README.md. The weight of source s at position n is the
factor on a_s in the prediction of a_{n+1}; data coordinates are model.data_ov_circuit's.
"""

import os

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import analyze
import data
import interventions
from analyze import (LAYER_COLORS, LENS, MODEL, OTHER, SCALE, TRUTH, Catalogue, Finding, Study, grid, heat,
                     identity_cosine, pick, regress, verdict)
from data import FIRST_POSITION, MAX_LENGTH, explained
from model import data_ov_circuit

HERE = os.path.dirname(os.path.abspath(__file__))
FITTED = 2000  # sequences of each length on which the filter is fitted
TESTED = 300  # and on which it is tested, beside the model
OF_A_KIND = 200  # sequences of each kind on which the scalar transformer is compared with the model
SHUFFLES = 40  # permutations of the traces
SIZES, PER_C = (0.3, 0.6, 0.9, 1.1, 1.3, 1.5, 1.75, 2.0), 2  # |c| of source weights, sequences for each
PREDICTORS = {"model": ("model", {"color": MODEL, "marker": ".", "lw": 2}),
              "filter": ("best fixed linear filter", {"color": OTHER, "marker": "."}),
              "scalar transformer": ("scalar transformer, 27 numbers", {"color": LENS, "ls": ":"}),
              "solver": ("exact solver (below $10^{-6}$, cut there)", {"color": "0.6"})}

OURS = Catalogue()
claim, figure = OURS.claim, OURS.figure


# ---------- The best fixed filter ----------
@functools.cache
def fixed_filter(d_vocab: int = data.D_VOCAB) -> Tensor:
    """The best fixed linear filter, prediction_n = sum over s <= n of K[n, s] a_s: K [14, 14], float64, least
    squares on the training distribution, for each n >= 2 on all lengths in which it occurs."""
    generator, filters = torch.Generator().manual_seed(1), torch.zeros(MAX_LENGTH, MAX_LENGTH).double()
    grams = torch.zeros(MAX_LENGTH + 1, MAX_LENGTH + 1).double()  # sums of <a_s, a_t> over lengths > n
    for n in range(MAX_LENGTH - 1, FIRST_POSITION - 1, -1):
        a = data.sample(FITTED, n + 1, generator, d_vocab, dtype=torch.double).a
        grams[: n + 2, : n + 2] += torch.einsum("bsv,btv->st", a, a)
        filters[n, : n + 1] = torch.linalg.solve(grams[: n + 1, : n + 1], grams[: n + 1, n + 1])
    return filters


def filtered(x: Tensor) -> Tensor:
    """The filter's prediction at each position, [batch, pos, d_vocab] -> the same."""
    return (fixed_filter(x.shape[-1])[: x.shape[1], : x.shape[1]] @ x.double()).to(x)


def fitted_filter(x: Tensor, output: Tensor) -> Tensor:
    """Predictions of the filter that comes nearest to a model's output, [batch, pos, d_vocab] each: for each
    half of the sequences its least squares on the other half."""
    predicted, halves = torch.zeros_like(output), (slice(len(x) // 2), slice(len(x) // 2, None))
    for n in range(x.shape[1]):
        X, y = x[:, : n + 1].transpose(1, 2).double(), output[:, n, :, None].double()  # [batch, d_vocab, src]
        for fitted, tested in (halves, halves[::-1]):
            K = torch.linalg.lstsq(X[fitted].flatten(0, 1), y[fitted].flatten(0, 1), driver="gelsd").solution
            predicted[tested, n] = (X[tested] @ K)[..., 0].to(output)
    return predicted


@functools.cache
def errors(study: Study) -> dict[str, Tensor]:
    """Squared errors of the PREDICTORS, by sequence and position from 2 on; position, c and weight in MSE."""
    seed, d_vocab = study.generator("mechanism").initial_seed(), study.model.config.d_vocab
    count, columns = max(2, TESTED * study.size // analyze.POPULATION), []
    for sample in data.held_out(count, seed, d_vocab=d_vocab):
        x, target = sample.a[:, :-1], sample.a[:, 1:]
        cache, solved = look(study, x), F.pad(data.solve_recurrence(x), (0, 0, FIRST_POSITION, 0))
        predictions = (cache["output"], filtered(x), scalar_transformer(cache, *scalars(study), x), solved)
        position = torch.arange(x.shape[1]).expand(count, -1)
        entries = [(p - target).pow(2).mean(-1) for p in predictions]
        weight = torch.full(position.shape, 1 / (x.shape[1] - FIRST_POSITION))
        entries += [position, sample.c[:, None].expand_as(position), weight]
        columns.append([part[:, FIRST_POSITION:].flatten() for part in entries])
    return dict(zip((*PREDICTORS, "position", "c", "weight"), map(torch.cat, zip(*columns))))


def by_position(study: Study, predictor: str) -> Tensor:
    """MSE at the positions 2 .. 13."""
    found, positions = errors(study), range(FIRST_POSITION, MAX_LENGTH)
    return torch.stack([found[predictor][found["position"] == n].mean() for n in positions])


@claim("early the model beats the best fixed filter, late the filter beats the model", None, 20)
def claim_fixed_filter(study: Study) -> Finding:
    """MSE by position over the training distribution. The model's is at most half of the filter's at 2 to 6,
    where it must infer something, and at least twice it at 12 and 13; partly if only the first. Measured:
    filter / model by position."""
    model, fixed = by_position(study, "model"), by_position(study, "filter")
    early, late = (model[:5] <= fixed[:5] / 2).all(), (model[-2:] >= 2 * fixed[-2:]).all()
    values, K = {}, fixed_filter(study.model.config.d_vocab)
    for name in PREDICTORS:
        values[f"{name}, positions 2 to 13"] = by_position(study, name)
        values[f"{name}, MSE"] = np.average(errors(study)[name], weights=errors(study)["weight"])
    values |= {f"coefficients at {n}, a_n first": K[n, : n + 1].flip(0) for n in (6, 10, 13)}
    return Finding(fixed / model, verdict(early and late, early), values)


def draw_errors(axes, study: Study):
    for name, (label, style) in PREDICTORS.items():
        y = by_position(study, name).clamp_min(1e-6)
        axes.semilogy(range(FIRST_POSITION, MAX_LENGTH), y, label=label, **style)
    axes.set(xlabel="position n, at which $a_{n+1}$ is predicted", ylabel="mean squared error")


@figure(20, "errors by position and by c, beside the fixed filter and the scalar transformer")
def figure_errors(study: Study):
    canvas, panels = grid(1, 2, 10.5, 4, "Error on new training sequences of all lengths")
    found, edges = errors(study), np.arange(-2, 2, 0.25)
    draw_errors(panels[0], study)
    for name, (_, style) in PREDICTORS.items():
        means = [found[name][(found["c"] >= edge) & (found["c"] < edge + 0.25)].mean() for edge in edges]
        panels[1].semilogy(edges + 0.125, torch.stack(means).clamp_min(1e-6), **style)
    panels[1].set(xlabel="c, in ranges of 0.25", ylabel="mean squared error")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return canvas


# ---------- Source weights, read off the model ----------
# A predictor that commutes with rotations is a sum of w_s a_s, w_s functions of inner products. Moving a_s by
# a small v off the plane of the sequence changes none to first order: the output moves by w_s v.


def off_plane(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random unit vectors [batch, d_vocab] orthogonal to all vectors of a sequence, x [batch, pos, d_vocab]
    (which must span less than d_vocab dimensions; an affine recurrence spans two)."""
    projection = torch.linalg.pinv(x, rtol=1e-6) @ x  # [batch, d_vocab, d_vocab]
    v = torch.randn(len(x), x.shape[-1], generator=generator, dtype=x.dtype)
    return F.normalize(v - torch.einsum("bv,bvw->bw", v, projection), dim=-1)


def source_weights(predict: Callable, x: Tensor, v: Tensor) -> Tensor:
    """w_s = <v, d prediction_n / d a_s . v>, [batch, dest, src], a forward-mode derivative for each source s.
    predict: [batch, pos, d_vocab] -> the same; x in float64; v [batch, d_vocab] from `off_plane`."""
    moves = torch.eye(x.shape[1], dtype=x.dtype)[:, None, :, None] * v[:, None]  # [src, batch, pos, d_vocab]
    moved = torch.vmap(lambda move: torch.func.jvp(predict, (x,), (move,))[1])(moves)
    return torch.einsum("sbpv,bv->bps", moved, v)


def strides(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A / c^2 and B / c, what a prediction takes from sources at odd and at even distance n - s, as shares of
    what is right: of a_s = a* + c^s u it holds (A c^{n-1} + B c^n) u, and c^{n+1} u is right. w [..., dest,
    src], c [...] -> [..., dest] each."""
    n = torch.arange(w.shape[-1], dtype=w.dtype)
    parts = w * c[..., None, None] ** (n - n[:, None] - 1)
    odd = (n[:, None] - n) % 2 == 1
    return (parts * odd).sum(-1), (parts * ~odd).sum(-1)


class Weights(NamedTuple):  # of PER_C sequences of 14 inputs for each c; c and -c get the same a_0 and d
    c: Tensor  # [c]: -2 .. 2
    model: Tensor  # [c, sequence, dest, src]: source weights
    scalar: Tensor  # the scalar transformer's own
    ln1: Tensor  # [c, sequence, pos]: layer 0's ln1 scale
    final: Tensor  # [c, sequence, pos]: ln_final's
    explained: Tensor  # [c]: share of the output, from position 2 on, that sum_s w_s a_s explains


@functools.cache
def read_weights(study: Study) -> Weights:
    exact, d_vocab, rows = copy.deepcopy(study.model).double(), study.model.config.d_vocab, []
    cs = torch.tensor(SIZES, dtype=torch.double)
    cs = torch.cat([-cs.flip(0), cs])
    for c in cs.tolist():
        g = study.generator(f"weights {abs(c)}")
        x = data.sample(PER_C, MAX_LENGTH, g, d_vocab, (c, c), dtype=torch.double).a[:, :-1]
        w, output, cache = source_weights(exact, x, off_plane(x, g)), exact(x), look(study, x.float())
        share = explained((w @ x)[:, FIRST_POSITION:], output[:, FIRST_POSITION:])
        rows.append((w, source_factors(cache, *scalars(study)), cache["blocks.0.ln1.hook_scale"][..., 0],
                     cache[SCALE][..., 0], torch.tensor(share)))
    return Weights(cs, *(torch.stack(column) for column in zip(*rows)))


@claim("the output is sum_s w_s a_s, with weights read off the model", None, 23)
def claim_source_weights(study: Study) -> Finding:
    """1 - |output - sum_s w_s a_s|^2 / |output|^2 over positions 2 to 13, by c. At least 0.95 at every |c| up
    to 1.5; partly at least 0.8."""
    weights = read_weights(study)
    least = weights.explained[weights.c.abs() <= 1.5].min()
    return Finding(weights.explained, verdict(least >= 0.95, least >= 0.8), {"c": weights.c, "least": least})


@claim("two steps at once, blind to the sign of c: what a fixed filter does too", None, 23)
def claim_parity(study: Study) -> Finding:
    """A / c^2 and B / c (see `strides`) of each sequence, |c| from 0.9 to 2, positions 5 to 13: the means of
    |A / c^2 - 1| and |B / c| at most 0.15 for the filter and the model; and at each such |c| the model's
    weights for -c at most 0.15 of their norm from those for c. Partly without the latter. A one-step rule has
    A = 0 and B / c = 1. Measured: the model's mean A / c^2 and B / c."""
    weights, K = read_weights(study), fixed_filter(study.model.config.d_vocab)
    strong, off, values = weights.c.abs() >= 0.9, {}, {}
    for name, w in {"model": weights.model, "filter": K.expand_as(weights.model)}.items():
        A, B = (part[strong, :, 5:] for part in strides(w, weights.c[:, None]))
        off[name] = [(A - 1).abs().mean(), B.abs().mean()]
        values |= {f"{name}: mean A / c^2, B / c": [A.mean(), B.mean()], f"{name}: off by": off[name]}
    late = weights.model[:, :, 5:].flatten(1)
    apart = ((late - late.flip(0)).norm(dim=1) / late.norm(dim=1))[weights.c >= 0.9]
    values["weights for -c, distance from those for c; by |c| from 0.9 on"] = apart
    for kind, first in (("two growths", 4), ("noise 0.01", MAX_LENGTH - 1)):
        x, target = kinds(study)[kind]
        left = [1 - explained(p[:, first:], target[:, first:]) for p in (study.model(x), filtered(x))]
        values[f"unexplained, {kind}, from position {first} on: model, filter"] = left
    both = max(off["model"] + off["filter"]) <= 0.15
    return Finding(values["model: mean A / c^2, B / c"], verdict(both and max(apart) <= 0.15, both), values)


@figure(23, "the weight of each source against c: model, filter, scalar transformer")
def figure_source_weights(study: Study):
    canvas, panels = grid(1, 2, 10.5, 4.4, "Weights $w_s$ of the prediction $\\Sigma_s w_s a_s$", shared=True)
    weights, K = read_weights(study), fixed_filter(study.model.config.d_vocab)
    for axes, n in zip(panels, (6, 10)):
        for s, color, label in ((n - 1, MODEL, "$a_{n-1}$"), (n, TRUTH, "$a_n$"), (n - 3, LENS, "$a_{n-3}$")):
            model, scalar = (w.mean(1)[:, n, s] for w in (weights.model, weights.scalar))
            axes.plot(weights.c, model, ".-", color=color, label=f"{label}, model")
            axes.plot(weights.c, scalar, ":", color=color, label="scalar transformer")
            axes.axhline(K[n, s], color=color, lw=0.8, ls="--", label="filter")
        axes.axhline(0, color="0.8", zorder=0)
        axes.set(title=f"position n = {n}", xlabel="c", ylim=(-6, 6.5))
    panels[0].set_ylabel("weight $w_s$")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas


# ---------- The scalar transformer ----------
def look(study: Study, x: Tensor) -> dict[str, Tensor]:
    """What the scalar transformer takes from the model on inputs x, patterns and scales; and the output."""
    names = [SCALE]
    for l in study.layers:
        names += [f"blocks.{l}.{name}" for name in ("attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale")]
    return study.record(x, *names)


@functools.cache
def mlp_slopes(study: Study) -> tuple[Tensor, Tensor]:
    """The slope of what each MLP writes on what it reads, [n_layers], in W_U's coordinates, less the mean at
    the position, population, n >= 2; and the share of what it writes that this explains."""
    fits = []
    for l in study.layers:
        names = (f"blocks.{l}.ln2.hook_normalized", f"blocks.{l}.hook_mlp_out")
        kept = study.record(study.population.a[:, :-1], *names)
        read, written = (kept[name][:, FIRST_POSITION:] @ study.model.unembed.W_U for name in names)
        (slope,), share = regress(written - written.mean(0), read - read.mean(0))
        fits.append((slope, share))
    return torch.tensor(fits).unbind(1)


def scalars(study: Study) -> tuple[Tensor, Tensor]:
    """The 27 numbers: kappa [n_layers, n_heads], the multiple of I nearest to each head's OV between data
    coordinates, trace / d_vocab; and the slopes of the MLPs, [n_layers]."""
    ov = torch.stack([data_ov_circuit(study.model, l) for l in study.layers])
    return ov.diagonal(dim1=-2, dim2=-1).mean(-1), mlp_slopes(study)[0]


def source_factors(cache: dict[str, Tensor], kappa: Tensor, slopes: Tensor) -> Tensor:
    """C / ln_final's scale, [batch, dest, src]: the factor with which position n holds a_s, when each head
    moves data by its kappa and each MLP multiplies it, with the patterns and scales in `cache`."""
    for l in range(len(kappa)):
        pattern = cache[f"blocks.{l}.attn.hook_pattern"]  # [batch, head, dest, src]
        ln1, ln2 = cache[f"blocks.{l}.ln1.hook_scale"], cache[f"blocks.{l}.ln2.hook_scale"]  # [batch, pos, 1]
        moved = torch.einsum("h,bhqk->bqk", kappa[l], pattern)
        # What comes in is read once, by layer 0; later layers read what it wrote.
        held = moved / ln1.transpose(1, 2) if l == 0 else held + moved @ (held / ln1)
        held = held + slopes[l] * held / ln2
    return held / cache[SCALE]


def scalar_transformer(cache: dict[str, Tensor], kappa: Tensor, slopes: Tensor, x: Tensor) -> Tensor:
    """Predictions [batch, pos, d_vocab] of the 27 numbers on inputs x."""
    return source_factors(cache, kappa, slopes) @ x


KINDS = ("recurrences", "4 inputs", "|c| 2.5 to 3", "two growths", "noise 0.1", "white noise")


@functools.cache
def kinds(study: Study) -> dict[str, tuple[Tensor, Tensor]]:
    """Sequences of each kind: inputs and what would be right, [batch, pos, d_vocab] each."""
    count, d_vocab = min(OF_A_KIND, study.size), study.model.config.d_vocab
    g, n = study.generator("kinds"), torch.arange(MAX_LENGTH + 1)
    uniform = functools.partial(data.uniform, g)
    sample = functools.partial(data.sample, count, generator=g, d_vocab=d_vocab)
    plain, wild = sample(MAX_LENGTH).a, sample(MAX_LENGTH, c_range=(2.5, 3)).a
    found = {"recurrences": plain, "4 inputs": sample(4).a, "|c| 2.5 to 3": wild}
    sign = 1 - 2 * (torch.arange(count) % 2)[:, None]
    c = uniform(1.2, 2, count, 2) * torch.cat([sign, -sign], 1)  # of opposite signs
    fixed, u = (uniform(-2, 2, count, 1, d_vocab) for _ in range(2))
    one, other = (c[:, :, None] ** n)[..., None].unbind(1)  # powers, [batch, pos, 1] each
    built = {"two growths": fixed + torch.where((n % 2 == 0)[:, None], one, other) * u,
             "white noise": torch.randn(count, MAX_LENGTH + 1, d_vocab, generator=g)}
    found |= {kind: data.normalise(a, uniform(1, 2, count))[0] for kind, a in built.items()}
    pairs = {kind: (a[:, :-1], a[:, 1:]) for kind, a in found.items()}
    for size in (0.1, 0.01):
        noise = size * torch.randn(count, MAX_LENGTH, d_vocab, generator=g)
        pairs[f"noise {size}"] = (plain[:, :-1] + noise, plain[:, 1:])
    return pairs


@functools.cache
def mean_looks(study: Study, length: int) -> dict[str, Tensor]:
    """Means of what the scalar transformer takes, and of its "factors", on recurrences of so many inputs."""
    g, d_vocab = study.generator(f"mean {length}"), study.model.config.d_vocab
    cache = look(study, data.sample(min(500, study.size), length, g, d_vocab).a[:, :-1])
    cache["factors"] = source_factors(cache, *scalars(study))
    return {name: value.mean(0) for name, value in cache.items()}


def predictions(study: Study, kind: str) -> dict[str, Tensor]:
    """What the 27 numbers and others predict, [batch, pos, d_vocab]; "shuffled" [permutation, batch, ..]."""
    x, truth = kinds(study)[kind]
    cache, (kappa, slopes), means = look(study, x), scalars(study), mean_looks(study, x.shape[1])
    g, predict = study.generator("shuffles"), lambda kappa: scalar_transformer(cache, kappa, slopes, x)
    patterns = {name: value.expand(len(x), -1, -1, -1) for name, value in means.items() if "pattern" in name}
    layers = torch.arange(len(kappa))[:, None]
    orders = torch.rand(SHUFFLES, *kappa.shape, generator=g).argsort(-1)
    found = {"scalar transformer": predict(kappa), "the truth": truth, "fixed filter": filtered(x),
             "mean trace": predict(kappa.mean(1, keepdim=True).expand_as(kappa)),
             "mean patterns": scalar_transformer(cache | patterns, kappa, slopes, x),
             "constant weights": means["factors"] @ x,
             "filter fitted to the model": fitted_filter(x, cache["output"])}
    found |= {f"without layer {l}": predict(torch.where(layers == l, 0.0, kappa)) for l in study.layers[1:]}
    return found | {"shuffled": torch.stack([predict(kappa.gather(1, order)) for order in orders])}


@functools.cache
def scores(study: Study, kind: str) -> dict[str, list[float]]:
    """[share of the model's output, of its error] that each of `predictions` explains, from position 4 on (4
    inputs: 2); "shuffled": mean and deviation of the first; and what the model leaves of the truth."""
    (x, truth), first = kinds(study)[kind], 2 if kind == "4 inputs" else 4
    output, truth = study.model(x)[:, first:], truth[:, first:]
    found, wrong = {"the model leaves": [1 - explained(output, truth)]}, explained(truth, output)
    for name, p in predictions(study, kind).items():
        if name == "shuffled":
            shares = torch.tensor([explained(each[:, first:], output) for each in p])
            found[name] = [shares.mean().item(), shares.std().item()]
        else:
            share = explained(p[:, first:], output)
            found[name] = [share, 1 - (1 - share) / (1 - wrong)]
    return found


LESS = ("the truth", "mean trace", "shuffled", "without layer 2", "mean patterns", "constant weights",
        "fixed filter", "filter fitted to the model")


@claim("27 numbers predict the model, above all where it errs", None, 22, 3)
def claim_scalar_transformer(study: Study) -> Finding:
    """Shares, by predictor, of the model's output, 1 - |p - model|^2 / |model|^2, and of its error, 1 - |p -
    model|^2 / |model - truth|^2. A kind on which the model errs (not recurrences, 4 inputs) is evidence if
    the scalar transformer has 0.97 of the one and 0.9 of the other and all that know less leave at least
    four times as much of the output: the truth, each layer's mean trace, traces shuffled (as a mean), none in
    layer 2, mean patterns, constant weights, the fixed filter, one fitted to the model's own output on this
    kind. Two such kinds, white noise among them; partly with one. Measured: its output share there."""
    values, evidence = {}, []
    for kind in KINDS:
        found = scores(study, kind)
        output, error = found["scalar transformer"]
        rival = max(LESS, key=lambda name: found[name][0])
        times = (1 - found[rival][0]) / (1 - output)
        if kind in KINDS[2:] and output >= 0.97 and error >= 0.9 and times >= 4:
            evidence.append(kind)
        values |= {f"{kind}: of the output": output, f"{kind}: of the error": error,
                   f"{kind}: the best rival ({rival}) leaves, times as much": times}
        values |= {f"{kind}: {name}": shares for name, shares in found.items()}
    ov = torch.stack([identity_cosine(data_ov_circuit(study.model, l)) for l in study.layers])
    (kappa, slopes), (_, shares) = scalars(study), mlp_slopes(study)
    values |= {"kinds that are evidence": len(evidence), "kappa": kappa, "slopes of the MLPs": slopes,
               "cosine of each OV with I": ov, "share of each MLP that its slope explains": shares}
    how = verdict("white noise" in evidence and len(evidence) >= 2, evidence)
    return Finding(values["white noise: of the output"], how, values)


@figure(21, "the 27 numbers, and maps that they stand for")
def figure_numbers(study: Study):
    canvas, panels = grid(1, 5, 13, 3, "27 numbers, and a 40 x 40 map of each layer that one stands for")
    (kappa, slopes), across = scalars(study), np.arange(len(study.heads))
    for l in study.layers:
        panels[0].bar(len(across) * l + across, kappa[l], color=LAYER_COLORS[l % 3], label=f"layer {l}")
    panels[0].set(title="$\\kappa$ of each head", xlabel="heads by layer", xticks=[], ylabel="factor")
    panels[0].legend()
    panels[1].bar(study.layers, slopes, color=LAYER_COLORS[: len(study.layers)])
    panels[1].set(title="slope of each MLP", xlabel="layer", xticks=study.layers, ylabel="factor")
    for axes, (l, head) in zip(panels[2:], enumerate(kappa.abs().argmax(1).tolist())):
        matrix = data_ov_circuit(study.model, l)[head]
        title = f"head {l}.{head}: cosine with I {identity_cosine(matrix):.2f}"
        heat(axes, matrix, title, matrix.abs().max(), "written dimension", "read dimension")
        axes.set(xticks=[], yticks=[], aspect="equal")
    return canvas


def draw_dots(axes, study: Study, kind: str):
    """The scalar transformer's prediction against the model's, a dot a component, every tenth sequence."""
    x = kinds(study)[kind][0][::10]
    cache, first = look(study, x), 4 if x.shape[1] > 4 else FIRST_POSITION
    model = cache["output"][:, first:].flatten()
    ours = scalar_transformer(cache, *scalars(study), x)[:, first:].flatten()
    axes.scatter(model, ours, s=2, lw=0, color=LENS)
    axes.axline((0, 0), slope=1, color="0.5", lw=0.8, zorder=0)
    axes.set(xlabel="model", ylabel="scalar transformer")


@figure(22, "the scalar transformer against the model, kind by kind", 3)
def figure_scalar_transformer(study: Study):
    canvas, panels = grid(2, 5, 14, 6, "27 numbers against the model, a dot a component; what others leave")
    names = ["scalar transformer", "without layer 1", *LESS][::-1]
    bars = (("two growths", "|c| 2.5 to 3"), ("noise 0.1", "white noise"))
    for row in (0, 1):
        for axes, kind in zip(panels[row, :3], KINDS[3 * row :]):
            output, error = scores(study, kind)["scalar transformer"]
            draw_dots(axes, study, kind)
            axes.set_title(f"{kind}: {output:.3f} of the output,\n{error:.3f} of the error")
        for axes, kind in zip(panels[row, 3:], bars[row]):
            left = [1 - scores(study, kind)[name][0] for name in names]
            axes.barh(names, left, color=["0.7"] * (len(names) - 1) + [LENS])
            axes.axvline(4 * left[-1], color="0.3", ls=":")  # those that end before it speak against us
            axes.set(title=kind, xscale="log", xlim=(1e-3, 2), xlabel="left of the output")
        panels[row, 4].set_yticks([])
    return canvas


# ---------- A worked forward pass ----------
def worked_pass(cache: dict[str, Tensor], kappa: Tensor, slopes: Tensor, n: int) -> dict[str, Tensor]:
    """What position n of a sequence holds of each source after every step, {step: [pos]}."""
    layers, rows = torch.arange(len(kappa)), {}
    for l in range(len(kappa)):
        heads = torch.where(layers[:, None] <= l, kappa, 0.0)
        for step, mlps in ((f"layer {l}'s heads", layers < l), (f"MLP {l}", layers <= l)):
            rows[f"after {step}"] = (source_factors(cache, heads, slopes * mlps) * cache[SCALE])[0, n]
    return rows | {"divided by ln_final": source_factors(cache, kappa, slopes)[0, n]}


@figure(24, "a worked forward pass: what one position holds of each vector", 3)
def figure_worked_pass(study: Study):
    i, n, kept = pick(study.test, -1.2), 8, {}
    x = study.test.a[i : i + 1, : n + 1]
    cache = look(study, x)
    means = {name: mean[: n + 1] for name, mean in interventions.mean_outputs(study.activations).items()}
    ablate = interventions.replace_outputs(means, interventions.layer_heads(study.model, 1))
    study.model(x, hooks=interventions.join(ablate, interventions.record([SCALE], kept)))
    rows, model = worked_pass(cache, *scalars(study), n), cache["output"][0, n]
    share, matrix = explained(rows["divided by ln_final"] @ x[0], model), torch.stack(list(rows.values()))
    ln1, ln2 = cache["blocks.0.ln1.hook_scale"][0, n - 1, 0], cache["blocks.0.ln2.hook_scale"][0, n, 0]
    final, without = cache[SCALE][0, n, 0], kept[SCALE][0, n, 0]
    title = (f"ln1 divides $a_{{{n - 1}}}$ by {ln1:.3f}, ln2 by {ln2:.2f}, ln_final by {final:.2f} (layer 1 "
             f"at its mean: {without:.2f})\nthe last row times $a_s$, summed: {share:.1%} of the output")
    canvas, axes = grid(1, 1, 9, 4.6, f"What position {n} holds of each source: c = {study.test.c[i]:.2f}")
    heat(axes, matrix, title, matrix.abs().max(), "source s", bar="factor")
    axes.set_yticks(range(len(rows)), rows)
    return canvas


# ---------- The README's picture ----------
@figure(19, "the README's picture", 3)
def figure_summary(study: Study):
    title = "A transformer continues $a_{n+1} = c\\,a_n + d$; its attention, scales and 27 numbers predict it"
    canvas, panels = grid(1, 3, 12, 4, title)
    i = pick(study.test, -1.1)
    a, output = study.test.a[i], study.model(study.test.a[i : i + 1, :-1])[0]
    for dimension, color in zip(a.std(0).argsort(descending=True).tolist(), (TRUTH, OTHER)):
        panels[0].plot(a[:, dimension], color=color, marker="o", mfc="none", label=f"dimension {dimension}")
        panels[0].plot(range(3, MAX_LENGTH + 1), output[2:, dimension], "x", color=MODEL)
    panels[0].plot([], [], "x", color=MODEL, label="the model's prediction")
    panels[0].set(title=f"two of 40 dimensions, c = {study.test.c[i]:.2f}", xlabel="n", ylabel="$a_n$")
    panels[0].legend(loc="upper left")
    draw_errors(panels[1], study)
    panels[1].set_title("error by position, 12 lengths of sequences")
    panels[1].legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 0.12))
    draw_dots(panels[2], study, "white noise")
    output, _ = scores(study, "white noise")["scalar transformer"]
    panels[2].set_title(f"on white noise, which is no recurrence:\n{output:.1%} of the model's output")
    return canvas


def main():
    import beyond.gain  # noqa: F401, enters its claims and figures beside these

    analyze.run_command(OURS, __doc__, "mechanism", os.path.join(HERE, "figures"))


if __name__ == "__main__":
    from beyond.mechanism import main  # gain.py imports that module too, not this copy of it

    main()
