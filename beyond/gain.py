"""Layer 1 is a gain control (section 7 of the article, README.md).

    python -m beyond --fig 26                       # the figure here; --all for all of beyond/

The gain at a position is one over ln_final's scale there. Clean is without an intervention, and damage is how
much an ablation raises the MSE.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import interventions
from analyze import LAYERS, MODEL, SCALE, Finding, Study, grid, interval, kept, mean_ablation, verdict
from beyond.filter import by_c, claim, figure
from beyond.symmetry import Directions, principal_directions
from data import squared_errors

TESTED = 200  # test sequences


# ---------- The scale is what the layer does ----------
class Arms(NamedTuple):
    """MSE of test sequences, [TESTED] each."""

    clean: Tensor
    ablated: Tensor  # a layer's heads at their mean
    clean_scale: Tensor  # the same with ln_final's clean scale
    scale_alone: Tensor  # the unchanged model with the scale of the ablated one


@kept
def arms(study: Study, layer: int) -> Arms:
    """Of mean-ablating the heads of a layer."""
    ablation = mean_ablation(study, heads=interventions.layer_heads(study.model, layer))
    resid = study.clean[f"blocks.{layer}.hook_resid_pre"][:TESTED]
    activations = {}
    record = interventions.record([SCALE], activations)
    study.model.run_from(layer, resid, interventions.join(ablation, record))

    ablated = study.errors(layer, ablation, TESTED)
    clean_scale = study.errors(layer, ablation, TESTED, scale=study.clean[SCALE])
    scale_alone = study.errors(layer, {}, TESTED, scale=activations[SCALE])
    return Arms(study.baseline[:TESTED], ablated, clean_scale, scale_alone)


def mended(arms: Arms) -> Tensor:
    """The share of the damage that goes away with the clean scale."""
    return (arms.ablated - arms.clean_scale).mean() / (arms.ablated - arms.clean).mean()


def comes_back(arms: Arms) -> Tensor:
    """The share of the damage that the ablated model's scale alone does."""
    return (arms.scale_alone - arms.clean).mean() / (arms.ablated - arms.clean).mean()


@claim("layer 1's heads are a gain control, by way of ln_final's scale", None, 26, 3)
def claim_gain_control(study: Study) -> Finding:
    """Of the damage of mean-ablation, "goes" is the share that goes away with ln_final's clean scale, one
    number a position, and "comes back" what the scale of the ablated model alone does to an unchanged one.
    For layer 1's heads goes at least 0.8 and comes back at least 0.5, and for those of layers 0 and 2 both
    are below 0.5; partly if so for layer 1 only. Measured: what goes, of layer 1."""
    values = {}
    goes = []
    comes = []
    for l in study.layers:
        of_layer = arms(study, l)
        goes.append(mended(of_layer))
        comes.append(comes_back(of_layer))
        values[f"layer {l}: goes, comes back"] = [goes[l], comes[l]]

    is_gain = goes[1] >= 0.8 and comes[1] >= 0.5
    others_are_not = all(share < 0.5 for share in (goes[0], comes[0], goes[2], comes[2]))
    ci = interval(*arms(study, 1), of=lambda *resampled: mended(Arms(*resampled)))
    return Finding(goes[1], verdict(is_gain and others_are_not, is_gain), values, ci)


# ---------- One number a position ----------
@kept
def written_by_heads(study: Study, layer: int) -> Directions:
    """What a layer's heads write, over the population."""
    return principal_directions(study.activations[f"blocks.{layer}.hook_attn_out"])


def along(value: Tensor, written: Directions) -> Tensor:
    """The part of an activation [batch, pos, d_model], less its mean, along the first principal direction."""
    direction = written.directions[0]
    number = (value - written.mean) @ direction  # [batch, pos]
    return number[..., None] * direction


@claim("of all that layer 1's heads write one number a position is enough", None, 26, 3)
def claim_one_knob(study: Study) -> Finding:
    """What all heads of layer 1 write is reduced to its mean at each position and one number along the first
    principal direction (of other sequences). The MSE grows at most twofold, without that number at least
    tenfold, with only one for layers 0 and 2 more than twofold; partly at most fourfold and, without that
    number, at least five times as much as with it. Measured: times the MSE with it."""

    def times(layer, change):
        written = written_by_heads(study, layer)
        hooks = {f"blocks.{layer}.hook_attn_out": lambda value: change(value, written)}
        return study.factor(study.errors(layer, hooks))

    def keep_it(value, written):
        return written.mean + along(value, written)

    def remove_it(value, written):
        return value - along(value, written)

    one = times(1, keep_it)
    without = times(1, remove_it)
    others = [times(0, keep_it), times(2, keep_it)]
    values = {"times the MSE without it": without, "times, layers 0 and 2": others}
    enough = one <= 2 and without >= 10 and min(others) > 2
    nearly = one <= 4 and without >= 5 * one
    return Finding(one, verdict(enough, nearly), values)


# ---------- Figure ----------
@figure(26, "layer 1 as a gain control", 3)
def figure_gain(study: Study):
    title = "Layer 1 and one number a position, ln_final's scale"
    canvas, panels = grid(1, 2, 10.5, 4, title)
    axes = panels[0, 0]
    target = study.test.targets[:TESTED]
    power = squared_errors(0 * target, target)
    of_sequences = torch.stack([power, *arms(study, 1)], 1)  # [TESTED, 5]
    x, by_range = by_c(study.test.c[:TESTED].abs(), of_sequences)
    shares = by_range[:, 1:] / by_range[:, :1]
    clean, ablated, clean_scale, alone = shares.T
    blue = LAYERS[1]
    axes.semilogy(x, ablated, "o-", color=blue, label="layer 1's heads at their mean")
    label = "scale alone: intact, but divided by that model's scale"
    axes.semilogy(x, alone, "s:", color=blue, label=label)
    label = "clean scale: at their mean, but divided by the intact scale"
    axes.semilogy(x, clean_scale, "^--", color=blue, label=label)
    axes.semilogy(x, clean, "o-", color=MODEL, label="the intact model")
    axes.set(title="the damage, and what mends it", xlabel="|c|", ylabel="unexplained share", ylim=(None, 10))
    axes.legend(fontsize=7, loc="upper left")

    axes = panels[0, 1]
    x, scale = by_c(study.population.c.abs(), study.activations[SCALE][..., 0])  # [range, pos]
    for n, style in zip((3, 6, 9, 12), (":", "-.", "--", "-")):
        axes.plot(x, scale[:, n], ls=style, marker=".", color=MODEL, label=f"position {n}")
    axes.set(title="what the stream is divided by", xlabel="|c|", ylabel="scale of ln_final", ylim=(0, None))
    axes.legend()
    return canvas
