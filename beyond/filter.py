"""The yardstick: the best fixed linear filter, which infers nothing (section 1 of the article, README.md).

    python -m beyond --fig 20                       # the claim and the figure here; --all for all of beyond/

For each position one set of coefficients for all vectors so far, the same for every sequence.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import analyze
import data
from analyze import MODEL, Catalogue, Finding, Study, grid, kept, verdict
from data import FIRST_POSITION, MAX_LENGTH

FILTER = "tab:green"
FITTED = 2000  # sequences of each length on which the filter is fitted
TESTED = 300  # and on which it is tested, beside the model
POSITIONS = range(FIRST_POSITION, MAX_LENGTH)  # at which the next vector is determined

OURS = Catalogue()
claim = OURS.claim
figure = OURS.figure


@functools.cache
def fixed_filter(d_vocab: int, task: str) -> Tensor:
    """The best fixed linear filter, prediction_n = sum over s <= n of K[n, s] a_s: K [14, 14], float64, least
    squares on the training distribution, for each n from the first determined one (2) on all lengths in which
    it occurs."""
    generator = torch.Generator().manual_seed(1)
    filters = torch.zeros(MAX_LENGTH, MAX_LENGTH).double()
    # Sums of <a_s, a_t> over lengths > n.
    grams = torch.zeros(MAX_LENGTH + 1, MAX_LENGTH + 1).double()

    for n in reversed(range(data.find_task(task).first, MAX_LENGTH)):
        a = data.sample(FITTED, n + 1, generator, d_vocab, task=task, dtype=torch.double).a
        vectors = slice(n + 2)
        known = slice(n + 1)
        grams[vectors, vectors] += torch.einsum("bsv,btv->st", a, a)
        wanted = grams[known, n + 1]
        filters[n, known] = torch.linalg.solve(grams[known, known], wanted)
    return filters


def filtered(x: Tensor, task: str = "affine") -> Tensor:
    """The filter's prediction at each position, [batch, pos, d_vocab] -> the same."""
    positions = slice(x.shape[1])
    K = fixed_filter(x.shape[-1], task)[positions, positions]
    predicted = K @ x.double()
    return predicted.to(x)


def fit(x: Tensor, output: Tensor) -> Tensor:
    """The filter K [pos, pos], float64, whose predictions K @ x come nearest to a model's output, [batch,
    pos, d_vocab] each."""
    columns = x.transpose(1, 2).flatten(0, 1).double()  # [batch * d_vocab, src]
    wanted = output.transpose(1, 2).flatten(0, 1).double()  # [batch * d_vocab, dest]

    K = torch.zeros(x.shape[1], x.shape[1]).double()
    for n in range(len(K)):
        known = slice(n + 1)
        # The driver for dependent columns.
        fitted = torch.linalg.lstsq(columns[:, known], wanted[:, [n]], driver="gelsd")
        K[n, known] = fitted.solution[:, 0]
    return K


def fitted_filter(x: Tensor, output: Tensor) -> Tensor:
    """Predictions of the filter fitted to a model's output, [batch, pos, d_vocab] each: for each half of the
    sequences that of the other half."""
    half = len(x) // 2
    first = fit(x[:half], output[:half])
    second = fit(x[half:], output[half:])
    x = x.double()
    predicted = torch.cat([second @ x[:half], first @ x[half:]])
    return predicted.to(output)


class Errors(NamedTuple):
    """Squared errors on new training sequences of all lengths, one for each position from 2 on, in one row
    each."""

    model: Tensor
    filter: Tensor
    position: Tensor
    c: Tensor


@kept
def errors(study: Study) -> Errors:
    seed = study.generator("mechanism").initial_seed()
    count = max(2, TESTED * study.size // analyze.POPULATION)
    by_length = []
    for sample in data.held_out(count, seed, d_vocab=study.model.config.d_vocab):
        off = study.model(sample.inputs) - sample.targets
        model = off.pow(2).mean(-1)  # [batch, pos]
        off = filtered(sample.inputs) - sample.targets
        fixed = off.pow(2).mean(-1)
        position = torch.arange(model.shape[1]).expand_as(model)
        c = sample.c[:, None].expand_as(model)
        parts = torch.stack([model, fixed, position, c])
        by_length.append(parts[:, :, FIRST_POSITION:].flatten(1))
    return Errors(*torch.cat(by_length, 1))


def by_position(study: Study, squared: Tensor) -> Tensor:
    """Means at the positions 2 .. 13 of one of the Errors."""
    position = errors(study).position
    return torch.stack([squared[position == n].mean() for n in POSITIONS])


@claim("early the model beats the best fixed filter, late the filter beats the model", None, 20)
def claim_fixed_filter(study: Study) -> Finding:
    """MSE by position over the training distribution. The model's is at most half of the filter's at 2 to 6,
    where it must infer something, and at least twice it at 12 and 13; partly if only the first. Measured:
    filter / model by position."""
    model = by_position(study, errors(study).model)
    fixed = by_position(study, errors(study).filter)
    early = (model[:5] <= fixed[:5] / 2).all()
    late = (model[-2:] >= 2 * fixed[-2:]).all()
    values = {
        "MSE of the model, positions 2 to 13": model,
        "MSE of the filter, positions 2 to 13": fixed,
    }

    K = fixed_filter(study.model.config.d_vocab, "affine")
    for n in (6, 13):
        values[f"coefficients at {n}, a_n first"] = K[n, : n + 1].flip(0)
    return Finding(fixed / model, verdict(early and late, early), values)


@figure(20, "errors by position and by c, beside the fixed filter")
def figure_errors(study: Study):
    title = "Error on new training sequences of all lengths (the exact solver's is below $10^{-6}$)"
    canvas, panels = grid(1, 2, 10.5, 4, title)
    squared = errors(study)
    model = {"color": MODEL, "label": "model"}
    fixed = {"color": FILTER, "label": "best fixed filter"}
    axes = panels[0, 0]
    axes.semilogy(POSITIONS, by_position(study, squared.model), ".-", **model)
    axes.semilogy(POSITIONS, by_position(study, squared.filter), ".-", **fixed)
    axes.set(xlabel="position n, at which $a_{n+1}$ is predicted", ylabel="mean squared error")
    axes.legend()

    axes = panels[0, 1]
    edges = np.arange(-2, 2, 0.25)
    in_range = [(squared.c >= edge) & (squared.c < edge + 0.25) for edge in edges]
    of_model = [squared.model[i].mean() for i in in_range]
    of_filter = [squared.filter[i].mean() for i in in_range]
    axes.semilogy(edges + 0.125, of_model, ".-", **model)
    axes.semilogy(edges + 0.125, of_filter, ".-", **fixed)
    axes.set(xlabel="c, in ranges of 0.25", ylabel="mean squared error")
    return canvas
