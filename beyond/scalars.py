"""What moves the data: 27 numbers for the OV circuits and MLPs (section 6 of the article, README.md).

    python -m beyond --fig 22 --fig 24 --fig 25     # the figures here; --all for all of beyond/

Between data coordinates (model.data_ov_circuit) every head is nearly a multiple of I. Give it that number,
and every MLP one for its slope; take attention patterns and LayerNorm scales from the model.
"""

import collections

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import pinv

import data
from analyze import (
    GREY,
    LAYERS,
    SCALE,
    TRUTH,
    Finding,
    Study,
    grid,
    heat,
    identity_cosine,
    kept,
    pick,
    regress,
    verdict,
    write_values,
)
from beyond.filter import FILTER, claim, figure, scaled
from beyond.symmetry import (
    CLOSED_FORM,
    KINDS,
    LENGTHS,
    OF_A_KIND,
    WHERE_IT_ERRS,
    Shares,
    compared,
    kinds,
    know_less,
    shares,
)
from data import FIRST_POSITION, explained
from interventions import join, record
from model import data_basis, data_ov_circuit

SCALARS = "tab:red"
SHUFFLES = 40  # permutations of the traces
FOR_MEANS = 500  # sequences over which patterns are averaged


# ---------- The scalar transformer ----------
def patterns_and_scales(study: Study, x: Tensor) -> dict:
    """What the scalar transformer takes from the model on inputs x, by hook name; and the stream before each
    layer and the "output"."""
    names = [SCALE]
    for l in study.layers:
        points = ("hook_resid_pre", "attn.hook_pattern", "ln1.hook_scale", "ln2.hook_scale")
        names += [f"blocks.{l}.{point}" for point in points]
    return study.record(x, *names)


def traces(study: Study) -> Tensor:
    """kappa [n_layers, n_heads], the multiple of I nearest to each head's OV between data coordinates."""
    ov = torch.stack([data_ov_circuit(study.model, l) for l in study.layers])
    return ov.diagonal(dim1=-2, dim2=-1).mean(-1)


@kept
def mlp_slopes(study: Study) -> Tensor:
    """The slope of what each MLP writes on what it reads, [n_layers], in W_U's coordinates, less the mean at
    the position, population, n >= 2."""
    W_U = study.model.unembed.W_U
    slopes = []
    for l in study.layers:
        resid = study.activations[f"blocks.{l}.hook_resid_mid"]
        written = study.activations[f"blocks.{l}.hook_mlp_out"][:, FIRST_POSITION:] @ W_U
        # The folded model's ln2 has no weights.
        normalised = F.layer_norm(resid, resid.shape[-1:], eps=study.model.config.eps)
        read = normalised[:, FIRST_POSITION:] @ W_U
        (slope,), _ = regress(written - written.mean(0), read - read.mean(0))
        slopes.append(slope)
    return torch.tensor(slopes)


def data_steps(taken: dict, kappa: Tensor, slopes: Tensor) -> dict:
    """What is held after every step, {step: [batch, dest, src]}: the factor of a_s at position n, when each
    head moves data by its kappa and each MLP adds its slope times what it reads, with the patterns and scales
    `taken`."""
    steps = {}
    for l in range(len(kappa)):
        pattern = taken[f"blocks.{l}.attn.hook_pattern"]  # [batch, n_heads, dest, src]
        ln1 = taken[f"blocks.{l}.ln1.hook_scale"]  # [batch, pos, 1]
        ln2 = taken[f"blocks.{l}.ln2.hook_scale"]
        moved = torch.einsum("h,bhqk->bqk", kappa[l], pattern)
        # What comes in is read once, by layer 0; later layers read what it wrote.
        if l == 0:
            held = moved / ln1.transpose(1, 2)
        else:
            held = held + moved @ (held / ln1)
        steps[f"after layer {l}'s heads"] = held
        held = held + slopes[l] * held / ln2
        steps[f"after MLP {l}"] = held

    steps["divided by ln_final"] = held / taken[SCALE]
    return steps


def source_factors(taken: dict, kappa: Tensor, slopes: Tensor) -> Tensor:
    """The weight of each source in the prediction of the 27 numbers, [batch, dest, src]: prediction = factors
    @ x."""
    return data_steps(taken, kappa, slopes)["divided by ln_final"]


@kept
def means_on_recurrences(study: Study, length: int) -> tuple[dict, Tensor]:
    """Mean patterns by hook name, and mean source factors, over recurrences of so many inputs."""
    sample = study.sample(FOR_MEANS, study.generator(f"mean {length}"), length)
    taken = patterns_and_scales(study, sample.inputs)
    patterns = {name: value.mean(0) for name, value in taken.items() if "pattern" in name}
    factors = source_factors(taken, traces(study), mlp_slopes(study))
    return patterns, factors.mean(0)


RIVALS = (
    "the truth",
    "mean trace",
    "shuffled",
    "without layer 2",
    "mean patterns",
    "constant weights",
    "fixed filter",
    "filter fitted to the model",
)


@kept
def scores(study: Study, kind: str) -> dict[str, Shares]:
    """What the 27 numbers, and those who know less, explain of the model's output and of its error; of 40
    shuffles the mean."""
    sequences = kinds(study)[kind]
    x = sequences.x
    taken = patterns_and_scales(study, x)
    mean_patterns, mean_factors = means_on_recurrences(study, x.shape[1])
    kappa = traces(study)
    slopes = mlp_slopes(study)

    def predict(kappa):
        return source_factors(taken, kappa, slopes) @ x

    patterns = {name: mean.expand_as(taken[name]) for name, mean in mean_patterns.items()}
    predictions = know_less(study, kind) | {
        "scalar transformer": predict(kappa),
        "mean trace": predict(kappa.mean(1, keepdim=True).expand_as(kappa)),
        "mean patterns": source_factors(taken | patterns, kappa, slopes) @ x,
        "constant weights": mean_factors @ x,
    }
    without_layer_2 = kappa.clone()
    without_layer_2[2] = 0.0
    predictions["without layer 2"] = predict(without_layer_2)
    explained_by = {name: shares(prediction, sequences) for name, prediction in predictions.items()}

    orders = torch.rand(SHUFFLES, *kappa.shape, generator=study.generator("shuffles")).argsort(-1)
    of_shuffles = [shares(predict(kappa.gather(1, order)), sequences) for order in orders]
    explained_by["shuffled"] = Shares(*torch.tensor(of_shuffles).mean(0).tolist())
    return explained_by


@claim("27 numbers predict the model, above all where it errs", None, 22, 3)
def claim_scalar_transformer(study: Study) -> Finding:
    """Shares, by predictor, of the model's output, 1 - |p - model|^2 / |model|^2, and of its error, 1 - |p -
    model|^2 / |model - truth|^2. A kind on which the model errs (not recurrences, 4 inputs) is evidence if
    the scalar transformer has 0.97 of the one and 0.9 of the other and all that know less leave at least
    four times as much of the output: the truth, each layer's mean trace, traces shuffled (as a mean), none in
    layer 2, mean patterns, constant weights, the fixed filter, one fitted to the model's own output on this
    kind. Two such kinds, white noise among them; partly with one. Measured: its output share there.
    """
    values = {}
    evidence = []
    for kind in KINDS:
        by_predictor = scores(study, kind)
        ours = by_predictor["scalar transformer"]
        best = max(RIVALS, key=lambda name: by_predictor[name].output)
        times = (1 - by_predictor[best].output) / (1 - ours.output)
        if kind in WHERE_IT_ERRS and ours.output >= 0.97 and ours.error >= 0.9 and times >= 4:
            evidence.append(kind)
        values[f"{kind}: of the output"] = ours.output
        values[f"{kind}: of the error"] = ours.error
        values[f"{kind}: the best rival ({best}) leaves, times as much"] = times
        for name in RIVALS:
            values[f"{kind}: {name}"] = by_predictor[name].output

    values["kinds that are evidence"] = len(evidence)
    values["kappa"] = traces(study)
    values["slopes of the MLPs"] = mlp_slopes(study)
    outcome = verdict("white noise" in evidence and len(evidence) >= 2, evidence)
    return Finding(scores(study, "white noise")["scalar transformer"].output, outcome, values)


# ---------- Put into the real model ----------
def put_scalars(study: Study, layer: int, kappa: Tensor) -> dict:
    """Hooks that make every head of a layer move data by kappa [n_heads] times I: hook_attn_out gets the
    difference, in what W_U reads, and all that comes later reacts."""
    model = study.model
    circuits = data_ov_circuit(model, layer)  # [n_heads, d_vocab, d_vocab]
    change = kappa[:, None, None] * torch.eye(circuits.shape[-1]).to(kappa) - circuits
    normalised_name = f"blocks.{layer}.ln1.hook_normalized"
    pattern_name = f"blocks.{layer}.attn.hook_pattern"
    seen = {}

    def heads(out):
        x = seen[normalised_name] @ pinv(data_basis(model, layer))  # [batch, pos, d_vocab]
        moved = torch.einsum("bhqk,bkv,hvw->bqw", seen[pattern_name], x, change)
        return out + moved @ pinv(model.unembed.W_U)

    keep = record([normalised_name, pattern_name], seen)
    return join(keep, {f"blocks.{layer}.hook_attn_out": heads})


def stream_after_layer_0(study: Study, x: Tensor, taken: dict, kappa: Tensor) -> Tensor:
    """The stream after layer 0 on inputs x, changed so that W_U reads from it the data of kappa [n_heads] and
    MLP 0's slope; taken: of `patterns_and_scales`."""
    W_U = study.model.unembed.W_U
    steps = data_steps(taken, kappa[None], mlp_slopes(study)[:1])
    held = steps["after MLP 0"] @ x

    resid = taken["blocks.1.hook_resid_pre"]
    off = held - resid @ W_U
    off = off - off.mean(0)  # the mean over sequences is position, not data
    return resid + off @ pinv(W_U)


@kept
def put_in(study: Study) -> dict[str, list]:
    """MSE, relative to the unchanged model's, by LENGTHS, with the scalars in place of a layer's heads, or of
    layer 0 as a whole, beside kappa = 0 and kappa shuffled."""
    generator = study.generator("put in")
    by_arm = collections.defaultdict(list)
    for length in LENGTHS:
        sample = study.sample(scaled(study, OF_A_KIND), generator, length)
        taken = patterns_and_scales(study, sample.inputs)
        clean = data.mse(taken["output"], sample.targets)
        for l, kappa in enumerate(traces(study)):
            order = torch.randperm(len(kappa), generator=generator)
            variants = {"": kappa, ", 0": 0 * kappa, ", shuffled": kappa[order]}
            for suffix, changed in variants.items():
                hooks = put_scalars(study, l, changed)
                output = study.model.run_from(l, taken[f"blocks.{l}.hook_resid_pre"], hooks)
                by_arm[f"layer {l}'s heads{suffix}"].append(data.mse(output, sample.targets) / clean)
                if l == 0:
                    resid = stream_after_layer_0(study, sample.inputs, taken, changed)
                    output = study.model.run_from(1, resid)
                    by_arm[f"layer 0 as a whole{suffix}"].append(data.mse(output, sample.targets) / clean)
    return dict(by_arm)


@claim("the real model does not mind multiples of I in the place of its maps", None, 24, 3)
def claim_put_in(study: Study) -> Finding:
    """The MSE with kappa I in the place of what all heads of a layer move from data to data, everything after
    them reacting, relative to the unchanged model's, with 4, 8 and 14 inputs. Layers 1 and 2 at most 1.05
    times, with kappa = 0 in layer 2 at least 5 times, layer 0 as a whole, its MLP included, at most 2 times;
    partly the first two. Measured: [layer 0 as a whole, layer 1, layer 2][4, 8, 14 inputs]."""
    by_arm = put_in(study)
    layer_0 = by_arm["layer 0 as a whole"]
    layer_1 = by_arm["layer 1's heads"]
    layer_2 = by_arm["layer 2's heads"]
    layer_2_at_0 = by_arm["layer 2's heads, 0"]
    later_do_not_mind = max(*layer_1, *layer_2) <= 1.05
    layer_2_is_needed = min(layer_2_at_0) >= 5
    first_does_not_mind = max(layer_0) <= 2
    part = later_do_not_mind and layer_2_is_needed
    values = {f"times the MSE: {arm}": times for arm, times in by_arm.items()}
    return Finding([layer_0, layer_1, layer_2], verdict(part and first_does_not_mind, part), values)


# ---------- Figures ----------
@figure(22, "what each predictor leaves of the model's output, kind by kind", 3)
def figure_left_of_the_output(study: Study):
    canvas, panels = grid(1, 1, 9, 4.6, "What each predictor leaves of the model's output")
    axes = panels[0, 0]
    least = 5e-4
    most = 2.0
    arrows = {least: "<", most: ">"}
    colors = {
        "the truth": TRUTH,
        "fixed filter": FILTER,
        "filter fitted to the model": "yellowgreen",
        "scalar transformer": SCALARS,
        "closed form": CLOSED_FORM,
    }
    for row, kind in enumerate(KINDS):
        field = compared(study, kind)
        predictors = scores(study, kind) | {"closed form": shares(field.prediction, field.sequences)}
        for name, color in colors.items():
            left = 1 - predictors[name].output
            x = min(max(left, least), most)
            marker = arrows.get(x, "o")
            axes.plot(x, row, marker, ms=8, color=color, label=name if row == 0 else None)
    axes.set(
        xscale="log",
        xlim=(0.8 * least, 1.25 * most),
        xlabel="share of the output that is left",
        title="further left is nearer to the model, an arrow off the axis; closed form: of fewer sequences",
    )
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.invert_yaxis()
    axes.grid(axis="y", color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


@figure(24, "the 27 numbers, and maps that they stand for", 3)
def figure_scalars(study: Study):
    title = "27 numbers, and a 40 x 40 map of each layer that one stands for"
    canvas, panels = grid(1, 4, 13, 3.4, title)
    kappa = traces(study)
    axes = panels[0, 0]
    numbers = torch.cat([kappa, mlp_slopes(study)[:, None]], 1)  # [n_layers, n_heads + 1]
    bars = np.arange(numbers.shape[1])
    for l in study.layers:
        axes.bar(bars + l * (len(bars) + 1), numbers[l], color=LAYERS[l % 3], label=f"layer {l}")
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_yscale("symlog", linthresh=0.2)  # MLP 0's slope is much larger than any kappa
    axes.set(
        title="$\\kappa$ of each head, slope of the MLP",
        xticks=[],
        ylabel="factor",
        xlabel="heads in order, then the MLP",
    )
    axes.legend()

    for l in study.layers[:3]:
        axes = panels[0, 1 + l]
        head = int(kappa[l].abs().argmax())
        matrix = data_ov_circuit(study.model, l)[head]
        title = f"head {l}.{head}: cosine with I {identity_cosine(matrix):.2f}"
        heat(axes, matrix, title, "written dimension", "read dimension")
        axes.set(xticks=[], yticks=[], aspect="equal")
    return canvas


@figure(25, "a worked forward pass: what one position holds of each vector", 3)
def figure_worked_pass(study: Study):
    i = pick(study.test, -1.2)
    n = 8
    x = study.test.inputs[i : i + 1, : n + 1]
    taken = patterns_and_scales(study, x)
    steps = data_steps(taken, traces(study), mlp_slopes(study))
    matrix = torch.stack([held[0, n] for held in steps.values()])  # [step, src]
    share = explained(matrix[-1] @ x[0], taken["output"][0, n])

    title = f"the last row times $a_s$, summed: {share:.1%} of the output"
    canvas, panels = grid(1, 1, 9, 4.6, f"What position {n} holds of each source: c = {study.test.c[i]:.2f}")
    heat(panels[0, 0], matrix, title, "source s", bar="factor")
    write_values(panels[0, 0], matrix)
    panels[0, 0].set_yticks(range(len(steps)), steps)
    return canvas
