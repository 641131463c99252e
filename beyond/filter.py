"""The yardstick: the best fixed linear filter, which infers nothing (section 1 of the article, README.md).

    python -m beyond --fig 20                       # the claim and the figure here; --all for all of beyond/

For each position one set of coefficients for all vectors so far, the same for every sequence.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


def scaled(study: Study, count: int) -> int:
    """`count` sequences; of a smaller study, that of an untrained model, the same share, at least 1."""
    return max(1, count * study.size // analyze.POPULATION)


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
    """Squared errors on new training sequences of all lengths, at positions 2 to 13, nan behind the end."""

    model: Tensor  # [sequence, pos]
    filter: Tensor  # [sequence, pos]
    c: Tensor  # [sequence]


@kept
def errors(study: Study) -> Errors:
    seed = study.generator("mechanism").initial_seed()
    squared = []
    c = []
    for sample in data.held_out(scaled(study, TESTED), seed, d_vocab=study.model.config.d_vocab):
        predictions = torch.stack([study.record(sample.inputs)["output"], filtered(sample.inputs)])
        of_length = (predictions - sample.targets).pow(2).mean(-1)  # [2, batch, pos]
        squared.append(F.pad(of_length, (0, MAX_LENGTH - of_length.shape[-1]), value=torch.nan))
        c.append(sample.c)

    model, fixed = torch.cat(squared, 1)[:, :, FIRST_POSITION:]
    return Errors(model, fixed, torch.cat(c))


def by_c(c: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The middles [range] of ranges of c, 0.25 wide, and the means [range, ...] of values [batch, ...] over
    the sequences in each; empty ranges are left out."""
    ranges = c // 0.25
    not_empty = ranges.unique()

    means = torch.stack([values[ranges == i].mean(0) for i in not_empty])
    return 0.25 * not_empty + 0.125, means


@claim("early the model beats the best fixed filter, late the filter beats the model", None, 20)
def claim_fixed_filter(study: Study) -> Finding:
    """MSE by position over the training distribution. The model's is at most half of the filter's at 2 to 6,
    where it must infer something, and at least twice it at 12 and 13; partly if only the first. Measured:
    filter / model by position."""
    model = errors(study).model.nanmean(0)
    fixed = errors(study).filter.nanmean(0)
    early = (model[:5] <= fixed[:5] / 2).all()
    late = (model[-2:] >= 2 * fixed[-2:]).all()

    values = {
        "MSE of the model, positions 2 to 13": model,
        "MSE of the filter, positions 2 to 13": fixed,
        "coefficients at 13, a_n first": fixed_filter(study.model.config.d_vocab, "affine")[13].flip(0),
    }
    return Finding(fixed / model, verdict(early and late, early), values)


@figure(20, "errors by position and by c, beside the fixed filter")
def figure_errors(study: Study):
    title = "Error on new training sequences of all lengths (the exact solver's is below $10^{-6}$)"
    canvas, panels = grid(1, 2, 10.5, 4, title)
    squared = errors(study)
    styles = {
        "model": (squared.model, MODEL),
        "best fixed filter": (squared.filter, FILTER),
    }
    for label, (of_sequences, color) in styles.items():
        panels[0, 0].semilogy(POSITIONS, of_sequences.nanmean(0), ".-", color=color, label=label)
        # The MSE of each sequence first, so that every length counts the same.
        c, by_range = by_c(squared.c, of_sequences.nanmean(1))
        panels[0, 1].semilogy(c, by_range, ".-", color=color, label=label)
    panels[0, 0].set(xlabel="position n, at which $a_{n+1}$ is predicted", ylabel="mean squared error")
    panels[0, 0].legend()
    panels[0, 1].set(xlabel="c, in ranges of 0.25", ylabel="mean squared error")
    return canvas
