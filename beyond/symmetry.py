"""What is left of the model when its inputs are turned (sections 2 to 5 of the article, README.md).

    python -m beyond --fig 21 --fig 23              # the figures here; --all for all of beyond/

Turn a sequence by an orthogonal matrix, and it is an affine recurrence still: a perfect model's answer turns
with it. `rotations`: ours does not quite, and that is half of its error. `mean_field`: the mean over all
rotations can be written down from the weights. `angles`: where vectors are compared. `numbers`: what a
position holds besides.
"""

import copy
import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

import data
from analyze import CHUNK, GREY, LAYERS, MODEL, TRUTH, Finding, Study, grid, kept, verdict
from beyond.filter import POSITIONS, claim, figure, filtered, fitted_filter, scaled
from data import FIRST_POSITION, MAX_LENGTH, MIN_LENGTH, explained
from interventions import hold, record
from model import ACTIVATIONS, Attention, Hooks, Transformer

CLOSED_FORM = "tab:purple"
LENGTHS = (4, 8, 14)  # inputs
SEQUENCES = 400  # of each length, on which rotations are averaged
ROTATIONS = 32  # on which queries and keys are averaged
FOR_VARIANCE = 16  # fewer: the first of them, for the asymmetry
PER_LENGTH = 60  # sequences for the asymmetry by position
BY_POSITION = 8  # rotations for it: more sequences tell more than more rotations
SAMPLED = 100  # rotations that stand for all, beside the closed form
RECURRENCES = 48  # for the closed form
FOR_CLOSED_FORM = 24  # sequences of another kind
FOR_NOISE = 8  # of noise, which has 14 coordinates instead of 2
OF_A_KIND = 200  # sequences of each kind
OTHERS = 60  # sequences from which the directions of t come
RESTRICTED = 24  # recurrences on which t is restricted
DIRECTIONS = (1, 2, 4, 6, 8)  # numbers that t may keep


# ---------- Half of the error is asymmetry ----------
def random_rotations(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrices [count, d, d], all alike likely (Haar)."""
    rotations = torch.empty(count, d, d)
    for Q in rotations:
        torch.nn.init.orthogonal_(Q, generator=generator)
    return rotations


def rotated(model: Transformer, x: Tensor, rotations: Tensor, hooks: dict | None = None) -> Tensor:
    """The answers to a turned sequence, turned back, f(x Q) Q^T, [count, *x.shape]; hooks as of Transformer,
    in every pass."""
    return torch.stack([model(x @ Q, hooks=hooks) @ Q.T for Q in rotations.to(x)])


def add_to(sums: dict, name: str, value: Tensor) -> Tensor:
    """A hook, once the others are given: it adds the activation to sums[name] and changes nothing."""
    sums[name] = sums[name] + value
    return value


class Turned(NamedTuple):
    """What rotations make of sequences of one length."""

    x: Tensor  # [batch, pos, d_vocab]
    target: Tensor  # [batch, pos, d_vocab]
    mse: Tensor  # the model's, unturned
    outputs: Tensor  # [FOR_VARIANCE, batch, pos, d_vocab]: f(x Q) Q^T
    means: dict  # of every layer's queries and keys over the rotations, by hook name


@kept
def turned(study: Study, length: int) -> Turned:
    generator = study.generator(f"rotations {length}")
    sample = study.sample(scaled(study, SEQUENCES), generator, length)
    rotations = random_rotations(ROTATIONS, study.model.config.d_vocab, generator)
    names = [name for name in study.model.hook_names if name.endswith(("hook_q", "hook_k"))]

    # Of the rotations after the first FOR_VARIANCE only queries and keys are wanted. They come before the
    # last MLP, which is a quarter of the work.
    without_last_mlp = copy.deepcopy(study.model)
    without_last_mlp.blocks[-1].mlp.forward = lambda read, at: 0 * read

    outputs = []
    by_part = []
    for x in sample.inputs.split(CHUNK):
        sums = dict.fromkeys(names, 0.0)
        hooks = {name: functools.partial(add_to, sums, name) for name in names}
        outputs.append(rotated(study.model, x, rotations[:FOR_VARIANCE], hooks))
        rotated(without_last_mlp, x, rotations[FOR_VARIANCE:], hooks)
        by_part.append(sums)
    means = {name: torch.cat([sums[name] for sums in by_part]) / ROTATIONS for name in names}
    mse = data.mse(study.model(sample.inputs), sample.targets)
    return Turned(sample.inputs, sample.targets, mse, torch.cat(outputs, 1), means)


@kept
def asymmetry_by_position(study: Study) -> tuple[Tensor, Tensor]:
    """MSE of f(x Q) Q^T at the positions 2 .. 13, mean over rotations Q and sequences of all lengths, and the
    same less its variance over Q."""
    generator = study.generator("rotations by position")
    by_length = []
    for length in range(MIN_LENGTH, MAX_LENGTH + 1):
        sample = study.sample(scaled(study, PER_LENGTH), generator, length)
        rotations = random_rotations(BY_POSITION, study.model.config.d_vocab, generator)
        outputs = rotated(study.model, sample.inputs, rotations)
        # The mean over rotations of the error has nearly the model's expectation and varies less.
        error = (outputs - sample.targets).pow(2).mean((0, 1, 3))  # [pos]
        variance = outputs.var(0).mean((0, 2))  # [pos]
        of_length = torch.stack([error, variance])
        # nan behind the end, which nanmean leaves out.
        by_length.append(F.pad(of_length, (0, MAX_LENGTH - length), value=torch.nan))
    mse, asymmetry = torch.stack(by_length).nanmean(0)[:, FIRST_POSITION:]
    return mse, mse - asymmetry


@claim("half of the model's error is that its answers do not quite turn with its inputs", None, 21)
def claim_rotations(study: Study) -> Finding:
    """Asymmetry: the unbiased variance of f(x Q) Q^T over 16 random rotations Q, mean over 400 sequences,
    positions from 2 on and dimensions, as a share of the model's MSE. The MSE is at most a hundredth of that
    of predicting 0, and the asymmetry at least a third of it with 4, 8 and 14 inputs; partly a fifth.
    Measured: the asymmetry at these lengths."""
    by_length = [turned(study, length) for length in LENGTHS]
    mse = torch.stack([answers.mse for answers in by_length])
    zero = torch.stack([data.mse(0 * answers.target, answers.target) for answers in by_length])
    variance = torch.stack([answers.outputs.var(0)[:, FIRST_POSITION:].mean() for answers in by_length])
    asymmetry = variance / mse

    useful = (mse <= zero / 100).all()
    third = asymmetry.min() >= 1 / 3
    fifth = asymmetry.min() >= 1 / 5
    mse_by_position, rest_by_position = asymmetry_by_position(study)
    values = {
        "MSE of the model": mse,
        "MSE of predicting 0": zero,
        "MSE less asymmetry": mse - variance,
        "MSE by position, 2 to 13": mse_by_position,
        "MSE less asymmetry by position": rest_by_position,
    }
    return Finding(asymmetry, verdict(useful and third, useful and fifth), values)


# ---------- The closed form ----------
def moments(act_fn: str, mu: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of f(mu + s z), z ~ N(0, 1), for an activation function f: its mean E[f(mu + s z)] and its mean slope
    E[f(mu + s z) z] / s (Stein's lemma), each in the shape of mu and s. ReLU exactly, others by quadrature.
    """
    s = s.clamp_min(1e-12)
    if act_fn == "relu":
        slope = torch.special.ndtr(mu / s)  # Phi(mu / s): how often the neuron is on
        density = (-0.5 * (mu / s) ** 2).exp() / (2 * torch.pi) ** 0.5
        return mu * slope + s * density, slope

    s = s.clamp_min(1e-3)  # else rounding errors are divided by it
    z, weights = torch.tensor(np.stack(hermegauss(21))).to(mu)  # [21] each
    weights = weights / weights.sum()
    values = ACTIVATIONS[act_fn](mu[..., None] + s[..., None] * z)
    return values @ weights, values @ (weights * z) / s


def coordinates(x: Tensor) -> tuple[Tensor, Tensor]:
    """A sequence [pos, d_vocab] in its own span: L [pos, R] and orthonormal e [R, d_vocab], x = L @ e. R is 2
    for an affine recurrence."""
    directions = F.normalize(x, dim=-1)  # else the longest vectors would hide the others
    _, S, V = torch.linalg.svd(directions, full_matrices=False)
    e = V[S > 1e-5 * S[0]]
    return x @ e.T, e


def layer_norm(stream: Tensor, eps: float) -> Tensor:
    """LayerNorm of a folded model, whose stream has mean 0, where positions are matrices [pos, rows,
    d_model]: the squared length of a position is the sum over all its rows."""
    squared_length = stream.pow(2).sum((1, 2), keepdim=True)
    mean_square = squared_length / stream.shape[-1]
    return stream / (mean_square + eps).sqrt()


def attend(attn: Attention, stream: Tensor, at: Hooks) -> Tensor:
    """What a layer's heads write, having read the normalised stream, both [pos, rows, d_model]. Inner
    products are sums over all rows; a bias touches the last one alone."""

    def read(W, b):
        each_row = stream.flatten(0, 1) @ W  # [n_heads, pos * rows, d_head]
        each_row = each_row.unflatten(1, stream.shape[:2])  # [n_heads, pos, rows, d_head]
        each_row[:, :, -1] += b[:, None]
        return each_row

    q = read(attn.W_Q, attn.b_Q)
    k = read(attn.W_K, attn.b_K)
    v = read(attn.W_V, attn.b_V)

    # Scores have two parts: what t says, numbers, and inner products of vectors.
    numbers = q[:, :, -1] @ k[:, :, -1].mT  # [n_heads, dest, src]
    vectors = q[:, :, :-1].flatten(2) @ k[:, :, :-1].flatten(2).mT
    parts = at(f"{attn.name}.hook_attn_scores", torch.stack([numbers, vectors]))  # [2, head, dest, src]
    scores = parts.sum(0) / attn.d_head**0.5
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(future, -torch.inf).softmax(-1)  # [n_heads, dest, src]

    z = torch.einsum("hqk,hkre->hqre", pattern, v)
    written = torch.einsum("hqre,hed->qrd", z, attn.W_O)  # [pos, rows, d_model]
    written[:, -1] += attn.b_O
    return written


def mlp_write(mlp, act_fn: str, stream: Tensor) -> Tensor:
    """What an MLP writes, having read the normalised stream, both [pos, rows, d_model].

    A neuron reads X = mu + sum_i read_i g_i with g_i nearly independent N(0, 1), that is mu + s z with s^2 =
    sum_i read_i^2. Its mean goes into t. What it passes on of g_i is E[f(X) g_i] = read_i E[f'(X)] (Stein's
    lemma), what it reads of it times the same mean slope for every row."""
    A = stream[:, :-1]
    t = stream[:, -1]
    # s depends on A^T A alone, and what is passed on is linear in the rows: of A = basis @ few, few will do.
    many = A.shape[1] > A.shape[2]
    if many:
        basis, A = torch.linalg.qr(A)
    read = A @ mlp.W_in  # [pos, rows, d_mlp]
    mu = t @ mlp.W_in + mlp.b_in  # [pos, d_mlp]
    s = read.pow(2).sum(1).sqrt()  # [pos, d_mlp]
    mean, slope = moments(act_fn, mu, s)

    # In place, since it is the largest tensor here.
    read *= slope[:, None]
    passed_on = read @ mlp.W_out  # [pos, rows, d_model]
    if many:
        passed_on = basis @ passed_on
    into_t = mean @ mlp.W_out + mlp.b_out  # [pos, d_model]
    return torch.cat([passed_on, into_t[:, None]], 1)


@torch.no_grad()
def closed_form(model: Transformer, x: Tensor, hooks: dict | None = None) -> Tensor:
    """The mean of f(x Q) Q^T over all rotations Q of a folded model f, from its weights alone: x [pos,
    d_vocab], one sequence, -> [pos, d_vocab].

    In coordinates of its own span a sequence is a_s = sum_r L[s, r] e_r, and under a random rotation the e_r
    are random orthonormal vectors of R^d_vocab, in each coordinate nearly Gaussian with variance 1 / d_vocab.
    So the stream at position n is carried as

        r_n = sum_r e_r A[n, r] + t_n        A[n, r] a d_vocab x d_model matrix, t_n in R^d_model

    of which A and t are not random. Write the A[n, r] over sqrt(d_vocab), and t_n below them: the stream at a
    position is then no vector but a matrix of d_vocab R + 1 rows, and the mean inner product of two such
    vectors is the sum over all elements of the product of their matrices. With that LayerNorm, attention and
    the unembedding act on rows as ever. Only an MLP is special, see `mlp_write`.

    Two approximations: an inner product, which fluctuates by about 1 / sqrt(d_vocab), is replaced by its mean
    within LayerNorm and softmax; and what a neuron reads is taken as Gaussian, and of what it writes only the
    mean and the part that is linear in the e_r are carried on.

    hooks: as of Transformer, at hook_resid_mid and hook_resid_post [pos, rows, d_model],
    attn.hook_attn_scores [2, n_heads, dest, src], the numbers' and the vectors' part, before the division,
    and ln_final.hook_normalized [pos, rows, d_model].
    """
    config = model.config
    points = ("hook_resid_mid", "hook_resid_post", "hook_attn_scores", "ln_final.hook_normalized")
    at = Hooks(hooks, None, [name for name in model.hook_names if name.endswith(points)])
    L, e = coordinates(x)
    A = torch.einsum("pr,vd->prvd", L, model.embed.W_E).flatten(1, 2)  # [pos, R * d_vocab, d_model]
    t = model.pos_embed.W_pos[: len(x), None]  # [pos, 1, d_model]
    # Row r * d_vocab + v is A[n, r, v] / sqrt(d_vocab), the last row t_n.
    stream = torch.cat([A / config.d_vocab**0.5, t], 1)  # [pos, rows, d_model]

    for block in model.blocks:
        stream = stream + attend(block.attn, layer_norm(stream, config.eps), at)
        stream = at(f"{block.name}.hook_resid_mid", stream)
        stream = stream + mlp_write(block.mlp, config.act_fn, layer_norm(stream, config.eps))
        stream = at(f"{block.name}.hook_resid_post", stream)
    stream = at("ln_final.hook_normalized", layer_norm(stream, config.eps))

    # The mean over Q of Q M Q^T, M = A W_U, commutes with every rotation: it is trace(M) / d_vocab times I.
    # What t and b_U say is turned back by Q^T and averages out.
    A = stream[:, :-1].unflatten(1, (-1, config.d_vocab))  # [pos, R, d_vocab, d_model], over sqrt(d_vocab)
    factors = torch.einsum("prvd,dv->pr", A, model.unembed.W_U) / config.d_vocab**0.5
    return factors @ e


def closed_forms(model: Transformer, x: Tensor, hooks: dict | None = None) -> Tensor:
    """`closed_form` of each of several sequences, [batch, pos, d_vocab]."""
    return torch.stack([closed_form(model, sequence, hooks) for sequence in x])


# ---------- Kinds of sequences ----------
KINDS = ("recurrences", "4 inputs", "|c| 2.5 to 3", "two growths", "noise 0.1", "white noise")
# On the first two the truth nearly is the model, so that little is told apart.
WHERE_IT_ERRS = KINDS[2:]


class Sequences(NamedTuple):
    """Sequences of one kind beside the model, [batch, pos, d_vocab] each."""

    x: Tensor
    truth: Tensor  # what would be right
    output: Tensor  # what the model says
    first: int  # position from which on predictions are compared


@kept
def kinds(study: Study) -> dict:
    """Of each kind OF_A_KIND sequences. In two growths even vectors have one c, odd ones another, with |c|
    from 1.2 to 2 and different signs; noise is on the inputs, not on the truth; c from 2.5 to 3 is positive.
    """
    count = scaled(study, OF_A_KIND)
    d_vocab = study.model.config.d_vocab
    g = study.generator("kinds")
    uniform = functools.partial(data.uniform, g)
    plain = study.sample(count, g).a
    fast = study.sample(count, g, c_range=(2.5, 3.0)).a
    short = study.sample(count, g, 4).a

    # f + c_1^n u at even n, f + c_2^n u at odd n, one growth of each sign.
    signs = (-1) ** (torch.arange(count)[:, None] + torch.arange(2))
    c = uniform(1.2, 2, count, 2) * signs
    fixed = uniform(-2, 2, count, 1, d_vocab)
    u = uniform(-2, 2, count, 1, d_vocab)
    n = torch.arange(MAX_LENGTH + 1)
    growth = c[:, n % 2] ** n  # [batch, pos]
    two_growths = fixed + growth[:, :, None] * u
    white = torch.randn(count, MAX_LENGTH + 1, d_vocab, generator=g)
    two_growths, _ = data.normalise(two_growths, uniform(1, 2, count))
    white, _ = data.normalise(white, uniform(1, 2, count))
    noise = 0.1 * torch.randn(count, MAX_LENGTH, d_vocab, generator=g)

    vectors = {
        "recurrences": plain,
        "4 inputs": short,
        "|c| 2.5 to 3": fast,
        "two growths": two_growths,
        "noise 0.1": plain,
        "white noise": white,
    }

    by_kind = {}
    for kind, a in vectors.items():
        x = a[:, :-1]
        if kind == "noise 0.1":
            x = x + noise
        first = FIRST_POSITION if kind == "4 inputs" else 4
        by_kind[kind] = Sequences(x, a[:, 1:], study.record(x)["output"], first)
    return by_kind


class Shares(NamedTuple):
    """How much of a model's output and of its error (output less truth) a prediction explains."""

    output: float
    error: float


def shares(prediction: Tensor, sequences: Sequences) -> Shares:
    judged = slice(sequences.first, None)
    output = sequences.output[:, judged]
    of_output = explained(prediction[:, judged], output)
    off = 1 - explained(sequences.truth[:, judged], output)  # the error, as a share of the output
    return Shares(of_output, 1 - (1 - of_output) / off)


# ---------- The model is a function of inner products ----------
class Compared(NamedTuple):
    """The closed form beside the model on sequences of one kind."""

    sequences: Sequences
    prediction: Tensor  # [batch, pos, d_vocab]
    activations: list  # by sequence: attention scores, final stream


@kept
def compared(study: Study, kind: str) -> Compared:
    counts = {"recurrences": RECURRENCES, "noise 0.1": FOR_NOISE, "white noise": FOR_NOISE}
    count = scaled(study, counts.get(kind, FOR_CLOSED_FORM))
    of_kind = kinds(study)[kind]
    x = of_kind.x[:count]
    points = ("hook_attn_scores", "ln_final.hook_normalized")
    names = [name for name in study.model.hook_names if name.endswith(points)]

    predictions = []
    activations = []
    for sequence in x:
        activations.append({})
        predictions.append(closed_form(study.model, sequence, record(names, activations[-1])))
    sequences = Sequences(x, of_kind.truth[:count], of_kind.output[:count], of_kind.first)
    return Compared(sequences, torch.stack(predictions), activations)


@kept
def know_less(study: Study, kind: str) -> dict:
    """What predictors say that know less of the model, [batch, pos, d_vocab] by name."""
    sequences = kinds(study)[kind]
    return {
        "the truth": sequences.truth,
        "fixed filter": filtered(sequences.x),
        "filter fitted to the model": fitted_filter(sequences.x, sequences.output),
    }


def rivals_leave(study: Study, kind: str) -> dict:
    """What those of `know_less` leave of the model's output on the sequences of the closed form."""
    sequences = compared(study, kind).sequences
    left = {}
    for name, prediction in know_less(study, kind).items():
        left[name] = 1 - shares(prediction[: len(sequences.x)], sequences).output
    return left


def mse_of_maps(study: Study, with_t: float) -> Tensor:
    """MSE on recurrences of the closed form with the whole maps, sum_r e_r A W_U, in the place of their
    traces; with_t: 1 with what t says, 0 without."""
    recurrences = compared(study, "recurrences")
    predictions = []
    for x, activations in zip(recurrences.sequences.x, recurrences.activations):
        _, e = coordinates(x)
        # Row r * d_vocab + v, which is over the root, counts e[r, v] times.
        weights = F.pad(e.flatten() * x.shape[-1] ** 0.5, (0, 1), value=with_t)  # [rows]
        predictions.append(weights @ activations["ln_final.hook_normalized"] @ study.model.unembed.W_U)
    predicted = torch.stack(predictions) + with_t * study.model.unembed.b_U
    return data.mse(predicted, recurrences.sequences.truth)


@claim("the mean over rotations, in closed form from the weights, is the model", None, 22)
def claim_mean_field(study: Study) -> Finding:
    """Of the model's output the closed form explains, 1 - |p - model|^2 / |model|^2, at least 0.98 on every
    kind; of its error, 1 - |p - model|^2 / |model - truth|^2, at least 0.9 on each kind but recurrences and 4
    inputs; on recurrences its MSE is within 10% of that of the mean of 100 sampled rotations, less that
    mean's sampling variance; and on white noise, noise 0.1 and two growths the truth, the fixed filter and a
    filter fitted to the model on other sequences of that kind each leave at least three times as much of the
    output. Partly: the first two on white noise. Positions from 4 on (4 inputs: 2), MSEs from 2 on. Measured:
    the share of the output by kind."""
    values = {}
    by_kind = {}
    for kind in KINDS:
        comparison = compared(study, kind)
        share = shares(comparison.prediction, comparison.sequences)
        by_kind[kind] = share
        values[f"{kind}: of the output"] = share.output
        values[f"{kind}: of the error"] = share.error
    of_output = [share.output for share in by_kind.values()]
    of_error = [by_kind[kind].error for kind in WHERE_IT_ERRS]
    white = by_kind["white noise"]

    # The closed form against what it stands for.
    recurrences = compared(study, "recurrences")
    x = recurrences.sequences.x
    truth = recurrences.sequences.truth
    rotations = random_rotations(SAMPLED, x.shape[-1], study.generator("sampled rotations"))
    sampled = rotated(study.model, x, rotations)
    sampling = sampled.var(0)[:, FIRST_POSITION:].mean() / SAMPLED
    mse_sampled = data.mse(sampled.mean(0), truth) - sampling
    mse_model = data.mse(recurrences.sequences.output, truth)
    mse_closed_form = data.mse(recurrences.prediction, truth)
    is_the_mean = abs(mse_closed_form - mse_sampled) <= 0.1 * mse_sampled

    # Against predictors that know less.
    times = []
    for kind in ("white noise", "noise 0.1", "two growths"):
        for name, left in rivals_leave(study, kind).items():
            times.append(left / (1 - by_kind[kind].output))
            values[f"{kind}: {name} leaves, times as much"] = times[-1]

    everywhere = min(of_output) >= 0.98 and min(of_error) >= 0.9
    on_white_noise = white.output >= 0.98 and white.error >= 0.9
    outcome = verdict(everywhere and is_the_mean and min(times) >= 3, on_white_noise)

    values |= {
        "MSE on recurrences: model, mean field": [mse_model, mse_closed_form],
        "MSE on recurrences, mean of all rotations (100 sampled)": mse_sampled,
        "MSE on recurrences, whole maps": mse_of_maps(study, 0.0),
        "MSE on recurrences, whole maps and t": mse_of_maps(study, 1.0),
    }
    return Finding(of_output, outcome, values)


# ---------- Where vectors are compared ----------
def score_variances(study: Study) -> Tensor:
    """Variance over sequences, in the mean field of recurrences, of the numbers' and of the vectors' part of
    the scores before the division by sqrt(d_head), less their mean over the sources of a row, which a softmax
    does not see: [2, layer]."""
    by_sequence = compared(study, "recurrences").activations
    # nan in the future, which nanmean leaves out.
    future = torch.full((MAX_LENGTH, MAX_LENGTH), torch.nan).triu(1)
    variances = []
    for l in study.layers:
        name = f"blocks.{l}.attn.hook_attn_scores"
        parts = torch.stack([seen[name] for seen in by_sequence])  # [batch, 2, n_heads, dest, src]
        parts = parts + future
        centred = parts - parts.nanmean(-1, keepdim=True)
        variances.append(centred.var(0).nanmean((1, 2, 3)))
    return torch.stack(variances, 1)


@kept
def without_directions(study: Study) -> Tensor:
    """MSE, relative to the unchanged model's, with queries and keys of a layer held at their mean over
    rotations of the inputs, so that its attention sees numbers and no directions: [layer, LENGTHS].
    """
    times = torch.zeros(len(study.layers), len(LENGTHS))
    for i, length in enumerate(LENGTHS):
        answers = turned(study, length)
        for l in study.layers:
            block = f"blocks.{l}."
            of_layer = {name: mean for name, mean in answers.means.items() if name.startswith(block)}
            held = study.model(answers.x, hooks=hold(of_layer))
            times[l, i] = data.mse(held, answers.target) / answers.mse
    return times


@claim("vectors are compared once, in layer 0", None, 23, 3)
def claim_angles(study: Study) -> Finding:
    """Queries and keys of a layer are held at their mean over 32 rotations of the inputs, by sequence,
    position and head. That multiplies the MSE on 400 sequences, in layer 0, by at least 5 with 4 and 8 inputs
    and by 2 with 14, in layers 1 and 2 by at most 1.5; partly if with 4 and 8 inputs layer 0's factor is at
    least five times each of the others. Measured: [layer][4, 8, 14 inputs]."""
    times = without_directions(study)
    short = times[:, :2]
    needed = short[0].min() >= 5 and times[0, 2] >= 2
    not_needed = times[1:].max() <= 1.5
    mostly = (short[0] >= 5 * short[1:]).all()
    numbers, vectors = score_variances(study)
    values = {
        "variance of the scores, the numbers' part, by layer": numbers,
        "variance of the scores, the vectors' part, by layer": vectors,
    }
    return Finding(times, verdict(needed and not_needed, mostly), values)


# ---------- Eight numbers a position ----------
class Directions(NamedTuple):
    """How vectors vary over sequences."""

    mean: Tensor  # [pos, d_model]
    directions: Tensor  # [d_model, d_model], the principal ones, the first one first


def principal_directions(vectors: Tensor) -> Directions:
    """Of vectors [batch, pos, d_model], less their mean at each position, all positions together."""
    mean = vectors.mean(0)
    varying = (vectors - mean).flatten(0, 1).double()
    _, directions = torch.linalg.eigh(varying.T @ varying)  # in columns, by growing variance
    return Directions(mean, directions.T.flip(0).to(mean))


@kept
def number_directions(study: Study) -> dict[str, Directions]:
    """Of t after every attention and every MLP, by hook name, over sequences that are not tested."""
    points = [name for name in study.model.hook_names if name.endswith(("resid_mid", "resid_post"))]
    by_sequence = []
    for x in study.population.inputs[: scaled(study, OTHERS)]:
        streams = {}
        closed_form(study.model, x, record(points, streams))
        by_sequence.append(streams)

    by_point = {}
    for name in points:
        t = [streams[name][:, -1] for streams in by_sequence]
        by_point[name] = principal_directions(torch.stack(t))
    return by_point


def restrict(stream: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """A hook of `closed_form`, once the others are given: t, the last row of stream [pos, rows, d_model],
    keeps its mean [pos, d_model] and its part along directions [count, d_model]. It writes into the stream.
    """
    varying = stream[:, -1] - mean
    stream[:, -1] = mean + varying @ directions.T @ directions
    return stream


def keep_numbers(study: Study, count: int) -> dict:
    """Hooks of `closed_form` that leave of t its mean and `count` numbers after every attention and MLP."""
    hooks = {}
    for name, (mean, directions) in number_directions(study).items():
        hooks[name] = functools.partial(restrict, mean=mean, directions=directions[:count])
    return hooks


class Restricted(NamedTuple):
    """MSEs on the same recurrences."""

    by_count: dict  # of the closed form, by how many numbers a position keeps
    closed_form: Tensor  # with all of them
    model: Tensor
    zero: Tensor  # of predicting 0


@kept
def restricted_mses(study: Study) -> Restricted:
    recurrences = compared(study, "recurrences")
    sequences = recurrences.sequences
    x = sequences.x[:RESTRICTED]
    truth = sequences.truth[:RESTRICTED]

    def mse(prediction):
        return data.mse(prediction[:RESTRICTED], truth)

    by_count = {}
    for count in DIRECTIONS:
        by_count[count] = mse(closed_forms(study.model, x, keep_numbers(study, count)))
    return Restricted(by_count, mse(recurrences.prediction), mse(sequences.output), mse(0 * truth))


@claim("beside multiples of the vectors a position holds eight numbers", None, 23)
def claim_numbers(study: Study) -> Finding:
    """In the closed form t, less its mean at each position, is restricted to its k first principal directions
    (of other sequences) after every attention and MLP; MSE on recurrences. Unrestricted it is at most a
    hundredth of that of predicting 0, with 8 at most 1.5 times as much, with 1 at least 3 times; partly if
    with 8 at most the model's own, and with 1 at least 3 times the unrestricted. Measured: the MSE with 8
    over the unrestricted."""
    mses = restricted_mses(study)
    with_one = mses.by_count[1]
    with_eight = mses.by_count[8]

    useful = mses.closed_form <= mses.zero / 100
    eight_suffice = with_eight <= 1.5 * mses.closed_form
    one_does_not = with_one >= 3 * mses.closed_form
    full = useful and eight_suffice and one_does_not
    part = with_eight <= mses.model and one_does_not
    values = {
        "k": DIRECTIONS,
        "MSE with k numbers": list(mses.by_count.values()),
        "MSE unrestricted": mses.closed_form,
        "MSE of the model": mses.model,
        "MSE of predicting 0": mses.zero,
    }
    return Finding(with_eight / mses.closed_form, verdict(full, part), values)


# ---------- Figures ----------
@figure(21, "how much of the error is asymmetry")
def figure_rotations(study: Study):
    title = "Answers to turned inputs, turned back and averaged: what of the error is asymmetry"
    canvas, panels = grid(1, 2, 10.5, 4, title)
    axes = panels[0, 0]
    counts = range(1, FOR_VARIANCE + 1)
    for length, marker in zip(LENGTHS, ("o", "s", "^")):
        answers = turned(study, length)
        averages = [answers.outputs[:count].mean(0) for count in counts]
        times = [data.mse(average, answers.target) / answers.mse for average in averages]
        axes.plot(counts, times, marker=marker, ms=4, color=MODEL, label=f"{length} inputs")
    recurrences = compared(study, "recurrences")
    truth = recurrences.sequences.truth
    times = data.mse(recurrences.prediction, truth) / data.mse(recurrences.sequences.output, truth)
    axes.axhline(times, color=CLOSED_FORM, ls="--", label="closed form, other sequences of 14 inputs")
    axes.set(
        title="the mean of several rotations",
        xlabel="rotations averaged",
        ylim=(0, None),
        ylabel="MSE / the model's MSE",
    )
    axes.legend()

    axes = panels[0, 1]
    mse, rest = asymmetry_by_position(study)
    # Behind the rest: what is seen of it is the asymmetry.
    axes.bar(POSITIONS, mse, color=MODEL, label="asymmetry")
    axes.bar(POSITIONS, rest, color=CLOSED_FORM, label="the rest")
    axes.set(
        title="by position, sequences of all lengths",
        ylabel="mean squared error",
        xlabel="position n, at which $a_{n+1}$ is predicted",
    )
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.legend()
    return canvas


@figure(23, "where vectors are compared, and the numbers beside them", 3)
def figure_angles(study: Study):
    title = "Where vectors are compared, and the numbers beside them"
    canvas, panels = grid(1, 3, 12, 4, title)
    axes = panels[0, 0]
    x = np.arange(len(LENGTHS))
    for l, times in enumerate(without_directions(study)):
        axes.bar(x + 0.25 * (l - 1), times, 0.23, color=LAYERS[l % 3], label=f"layer {l}")
    axes.axhline(1, color="black", lw=0.8)
    axes.set(
        title="queries and keys without directions",
        xlabel="inputs",
        yscale="log",
        ylabel="times the MSE",
    )
    axes.set_xticks(x, LENGTHS)
    axes.legend()

    axes = panels[0, 1]
    numbers, vectors = score_variances(study)
    layers = np.array(study.layers)
    axes.bar(layers - 0.2, numbers, 0.38, color=GREY, label="the numbers' part")
    axes.bar(layers + 0.2, vectors, 0.38, color=TRUTH, label="the vectors' part")
    axes.set(
        title="what attention scores consist of",
        xticks=layers,
        xlabel="layer",
        yscale="log",
        ylim=(None, 1e4),  # room for the legend
        ylabel="variance over sequences",
    )
    axes.legend()

    axes = panels[0, 2]
    mses = restricted_mses(study)
    with_k = list(mses.by_count.values())
    axes.semilogy(DIRECTIONS, with_k, "o-", color=CLOSED_FORM, label="closed form, k numbers")
    axes.axhline(mses.closed_form, color=CLOSED_FORM, ls="--", label="closed form, all")
    axes.axhline(mses.model, color=MODEL, label="the model")
    axes.set(
        title="how many numbers a position needs",
        xlabel="numbers k a position keeps",
        ylabel="mean squared error",
    )
    axes.legend()
    return canvas
