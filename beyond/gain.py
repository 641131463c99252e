"""Layer 1 is a gain control; the scalars put into the real model; and who computes the scales and patterns.
Its claims and figures join those of mechanism.py: `python -m beyond.mechanism --all`, --fig 25, --fig 26. The
gain at a position is one over ln_final's scale there. Clean is without an intervention, and damage is how
much an ablation raises the MSE.
"""

import functools

import numpy as np
import torch
from torch import Tensor

import data
import interventions
from analyze import (LENS, MODEL, OTHER, SCALE, TRUTH, Finding, Study, grid, heat, interval,
                     squared_errors, verdict)
from beyond.mechanism import OF_A_KIND, claim, figure, look, read_weights, scalars, source_factors
from data import FIRST_POSITION, MAX_LENGTH
from model import data_basis, data_ov_circuit, ov_circuit, qk_circuit

FEW = 200  # test sequences for ablations
SIZE_BINS = np.arange(0, 2, 0.25)  # ranges of |c|, their lower ends


# ---------- The gain ----------
@functools.cache
def ablations(study: Study) -> dict[str, dict[str, Tensor]]:
    """MSE of test sequences, {"layer 1 heads": {kind: [FEW]}}: "ablated" (mean); "clean scale", the same with
    ln_final's clean scale; "scale alone", the unchanged model with the ablated one's; "clean"."""
    means, count, found = interventions.mean_outputs(study.activations), min(FEW, study.size), {}
    clean, target = study.clean[SCALE][:count], study.test.a[:count, 1:]
    for l in study.layers:
        resid = study.clean[f"blocks.{l}.hook_resid_pre"][:count]
        for part, chosen in (("heads", (interventions.layer_heads(study.model, l), [])), ("MLP", ([], [l]))):
            hooks, kept = interventions.replace_outputs(means, *chosen), {}
            run = functools.partial(study.model.run_from, l, resid)
            outputs = {"ablated": run(interventions.join(hooks, interventions.record([SCALE], kept)))}
            outputs["clean scale"] = run(interventions.join(hooks, interventions.hold({SCALE: clean})))
            outputs["scale alone"] = run(interventions.hold(kept))
            outputs["clean"] = study.clean["output"][:count]
            found[f"layer {l} {part}"] = {kind: squared_errors(y, target) for kind, y in outputs.items()}
    return found


def constancy(study: Study) -> dict[str, list[Tensor]]:
    """w_{n-1}(n) times layer 0's ln1 scale at n - 1 and ln_final's at n, lowest and highest over c; and the
    log ratios of w_{n-1} and of one over these from c = 0.6 to 1.75."""
    weights, found = read_weights(study), {}
    for n in (6, 10, 13):
        w, ln1, final = weights.model[:, :, n, n - 1], weights.ln1[:, :, n - 1], weights.final[:, :, n]
        product = (w * ln1 * final).mean(1)
        found[f"w ln1 ln_final at n = {n}, lowest and highest over c"] = [product.min(), product.max()]
        near = [int((weights.c - c).abs().argmin()) for c in (0.6, 1.75)]
        logs = [-(part[near[1]].log().mean() - part[near[0]].log().mean()) for part in (1 / w, ln1, final)]
        found[f"log ratio of w at n = {n} from c = 0.6 to 1.75; of 1 / ln1, of 1 / ln_final"] = logs
    return found


@claim("layer 1's heads are a gain control, by way of ln_final's scale", None, 25, 3)
def claim_gain_control(study: Study) -> Finding:
    """Of the damage of mean-ablation, "goes" is the share that goes away with ln_final's clean scale, one
    number a position, and "comes back" what the scale of the ablated model alone does to an unchanged one.
    For layer 1's heads goes at least 0.8 and comes back at least 0.5, and for those of layers 0 and 2 both
    are below 0.5; partly if so for layer 1 only."""
    shares, times = {}, {}
    for part, arms in ablations(study).items():
        mse = {kind: errors.mean() for kind, errors in arms.items()}
        damage, mended = mse["ablated"] - mse["clean"], mse["ablated"] - mse["clean scale"]
        shares[part] = [mended / damage, (mse["scale alone"] - mse["clean"]) / damage]
        times[part] = [mse["ablated"] / mse["clean"], mse["clean scale"] / mse["clean"]]
    goes, back = shares["layer 1 heads"]
    gain, others = goes >= 0.8 and back >= 0.5, [max(shares[f"layer {l} heads"]) for l in (0, 2)]
    values = {f"{part}: goes, comes back": both for part, both in shares.items()}
    values |= {f"{part}: times the MSE, and with the clean scale": both for part, both in times.items()}
    arms = ablations(study)["layer 1 heads"]
    mended, damage = arms["ablated"] - arms["clean scale"], arms["ablated"] - arms["clean"]
    ci = interval(mended, damage, of=lambda mended, damage: mended.sum() / damage.sum())
    return Finding(goes, verdict(gain and max(others) < 0.5, gain), values | constancy(study), ci)


def by_size(c: Tensor, values: Tensor) -> Tensor:
    """Means of values [batch, ...] over the sequences in each range of |c|, [8, ...]."""
    return torch.stack([values[(c.abs() >= low) & (c.abs() < low + 0.25)].mean(0) for low in SIZE_BINS])


@figure(25, "layer 1 as a gain control, and where the factor on a_{n-1} comes from", 3)
def figure_gain(study: Study):
    canvas, panels = grid(1, 3, 11.5, 3.9, "Layer 1 is a gain control: one number a position is what it does")
    arms, count = ablations(study)["layer 1 heads"], min(FEW, study.size)
    c, target = study.test.c[:count], study.test.a[:count, 1:]
    power = by_size(c, squared_errors(torch.zeros_like(target), target))
    for kind, color in zip(("clean", "ablated", "clean scale", "scale alone"), ("black", LENS, OTHER, MODEL)):
        share = by_size(c, arms[kind]) / power
        panels[0].semilogy(SIZE_BINS + 0.125, share, ".-", color=color, label=kind)
    panels[0].set(title="the damage, and what mends it", xlabel="|c|", ylabel="unexplained share")
    panels[0].legend(fontsize=7)
    scale = by_size(study.population.c, study.activations[SCALE][..., 0])  # [8, pos]
    for n, color in zip((3, 6, 9, 12), ("#440154", "#31688e", "#35b779", "#b8a800")):
        panels[1].plot(SIZE_BINS + 0.125, scale[:, n], marker=".", color=color, label=f"position {n}")
    panels[1].set(title="what the residual stream is divided by", xlabel="|c|", ylabel=SCALE, ylim=(0, None))
    panels[1].legend()
    weights, n = read_weights(study), 10
    for label, values, color in (("$w_{n-1}$, read off the model", weights.model[:, :, n, n - 1], "black"),
                                 ("1 / ln1's scale at n - 1", 1 / weights.ln1[:, :, n - 1], TRUTH),
                                 ("1 / ln_final's scale at n", 1 / weights.final[:, :, n], LENS)):
        logs = values[weights.c >= 0.6].log().mean(1)
        panels[2].plot(weights.c[weights.c >= 0.6], logs - logs[0], ".-", color=color, label=label)
    panels[2].set(title="the factor on $a_{n-1}$ at n = 10: black is the sum", xlabel="c",
                  ylabel="log, relative to c = 0.6")
    panels[2].legend()
    return canvas


@functools.cache
def main_directions(study: Study, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of what a layer's heads write, over the population: the mean at each position [pos, d_model], the
    principal directions [d_model, d_model], first one first, and their shares of the variance."""
    written = study.activations[f"blocks.{layer}.hook_attn_out"]
    mean = written.mean(0)
    varying = (written - mean).flatten(0, 1).double()
    variances, directions = torch.linalg.eigh(varying.T @ varying)
    return mean, directions.T.flip(0).float(), variances.flip(0) / variances.sum()


def keep_directions(name: str, mean: Tensor, directions: Tensor) -> dict[str, interventions.Hook]:
    """A hook that leaves of an activation its mean and what varies along orthonormal directions [k, d_model]:
    with k = 1, one number at each position."""
    return {name: lambda value: mean + (value - mean) @ directions.T @ directions}


def remove_directions(name: str, mean: Tensor, directions: Tensor) -> dict[str, interventions.Hook]:
    """The opposite of `keep_directions`."""
    return {name: lambda value: value - (value - mean) @ directions.T @ directions}


@claim("of all that layer 1's heads write one number a position is enough", None, 25, 3)
def claim_one_knob(study: Study) -> Finding:
    """What all heads of layer 1 write is reduced to its mean at each position and one number along the first
    principal direction (of other sequences). The MSE grows at most twofold, without that number at least
    tenfold, with only one for layers 0 and 2 more than twofold; partly at most fourfold and, without it, at
    least five times as much."""

    def errors(layer: int, change, count: int | None = None) -> Tensor:
        mean, directions, _ = main_directions(study, layer)
        return study.errors(layer, change(f"blocks.{layer}.hook_attn_out", mean, directions[:1]), count)

    kept = errors(1, keep_directions)
    one, without = study.factor(kept), study.factor(errors(1, remove_directions))
    others = [study.factor(errors(l, keep_directions, FEW)) for l in (0, 2)]
    values = {"times the MSE without it": without, "times, layers 0 and 2": others}
    Q = torch.linalg.qr(study.model.unembed.W_U).Q
    for l in study.layers:
        _, directions, shares = main_directions(study, l)
        values |= {f"layer {l}: shares of the variance": shares[:3],
                   f"layer {l}: cosine of the first with what W_U reads": (directions[0] @ Q).norm()}
    how = verdict(one <= 2 and without >= 10 and min(others) > 2, one <= 4 and without >= 5 * one)
    return Finding(one, how, values)


# ---------- What turns the knob ----------
L1_K, L1_V, L1_Z = (f"blocks.1.attn.hook_{name}" for name in "kvz")
RANGES = {"decaying and growing": ((0.2, 0.7), (1.5, 2.0)), "slow and fast growth": ((1.1, 1.3), (1.7, 2.0))}


@functools.cache
def knob_sequences(study: Study, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs with |c| from low to high, half of them with c < 0, and what layer 1 makes of them."""
    count, d_vocab, g = max(10, study.size // 20), study.model.config.d_vocab, study.generator(f"knob {low}")
    x = [data.sample(count, MAX_LENGTH, g, d_vocab, c).a[:, :-1] for c in ((low, high), (-high, -low))]
    return torch.cat(x), study.record(torch.cat(x), L1_K, L1_V, L1_Z, "blocks.1.hook_resid_pre", SCALE)


def favourite_source(study: Study) -> int:
    """The position that layer 1 attends to most, from positions 4 to 13, mean over heads and sequences."""
    return int(study.activations["blocks.1.attn.hook_pattern"][:, :, 4:].mean((0, 1, 2)).argmax())


def follows(study: Study, names: list[str], positions: list[int], resized: list[int], low: tuple,
            high: tuple) -> list[float]:
    """Share of the change of ln_final's log scale that follows a patch, for sequences with |c| in the range
    `low` given something of those in `high`, and the other way round; positions 4 to 13. They are given the
    activations `names` at `positions`: the others', or their own with `resized` vectors as long as those."""
    pair, shares = [knob_sequences(study, *low), knob_sequences(study, *high)], []
    for (x, here), (y, there) in (pair, pair[::-1]):
        source, kept = there, {}
        if resized:
            x = x.clone()
            x[:, resized] *= (y.norm(dim=-1) / x.norm(dim=-1))[:, resized, None]
            source = study.record(x, *names)
        hooks = interventions.patch_positions({name: source[name] for name in names}, positions)
        hooks = interventions.join(hooks, interventions.record([SCALE], kept))
        study.model.run_from(1, here["blocks.1.hook_resid_pre"], hooks)
        moved, goal = ((scales[SCALE] / here[SCALE]).log()[:, 4:] for scales in (kept, there))
        shares.append(((moved * goal).sum() / goal.pow(2).sum()).item())
    return shares


@functools.cache
def knob_shares(study: Study, ranges: str) -> dict[str, list[float]]:
    """What turns the knob, {what layer 1 is given of the other sequences: the shares that follow}."""
    favourite, both, last = favourite_source(study), [L1_K, L1_V], list(range(5, MAX_LENGTH))
    patches = {"all that its heads read": ([L1_Z], list(range(MAX_LENGTH)), [])}
    patches |= {f"key and value of position {s}": (both, [s], []) for s in sorted({0, 1, 2, 3, 4, favourite})}
    patches |= {"key and value of positions 5 to 13": (both, [s for s in last if s != favourite], []),
                f"sizes of $a_0$ to $a_{favourite}$ there": (both, [favourite], list(range(favourite + 1)))}
    return {name: follows(study, *patch, *RANGES[ranges]) for name, patch in patches.items()}


@claim("the knob is turned by the sizes of the vectors up to layer 1's favourite position", None, 26, 3)
def claim_knob(study: Study) -> Finding:
    """The favourite is the position that layer 1 attends to most. Between decaying and growing sequences, in
    both directions, at least half of the change of the log scale follows layer 1's key and value of it alone,
    and more than those of any other of positions 0 to 4, or of 5 to 13 together; and at least half follows
    the sizes of the vectors up to it, seen through it alone (measured). Partly if only the first."""
    s, shares = favourite_source(study), knob_shares(study, "decaying and growing")
    own, sizes = f"key and value of position {s}", f"sizes of $a_0$ to $a_{s}$ there"
    read, size = shares[own], shares[sizes]
    rivals = [both for name, both in shares.items() if name.startswith("key") and name != own]
    first = all(read[i] >= max(0.5, *(rival[i] for rival in rivals)) for i in (0, 1))
    values = {"favourite position": s}
    for ranges in RANGES:
        shares = knob_shares(study, ranges)
        values |= {f"{ranges}: {name.replace('$', '')}": both for name, both in shares.items()}
        pairs = zip(shares[sizes], shares["all that its heads read"])
        values[f"{ranges}: sizes, share of all that the heads read"] = [part / whole for part, whole in pairs]
    return Finding(size, verdict(first and min(size) >= 0.5, first), values | left(study) | put_in(study))


# ---------- The scalars put into the real model ----------
def put_scalars(study: Study, layer: int, kappa: Tensor) -> dict[str, interventions.Hook]:
    """Hooks that make every head of a layer move data by kappa [n_heads] times I: hook_attn_out gets the
    difference, in what W_U reads, and all that comes later reacts."""
    model, kept, W_U = study.model, {}, study.model.unembed.W_U
    read = torch.linalg.pinv(data_basis(model, layer))  # [d_model, d_vocab]; from layer 1 on this is W_U
    change = kappa[:, None, None] * torch.eye(W_U.shape[1]) - data_ov_circuit(model, layer)
    names = [f"blocks.{layer}.ln1.hook_normalized", f"blocks.{layer}.attn.hook_pattern"]

    def heads(out: Tensor) -> Tensor:
        moved = torch.einsum("bhqk,bkv,hvw->bqw", kept[names[1]], kept[names[0]] @ read, change)
        return out + moved @ torch.linalg.pinv(W_U)

    return interventions.join(interventions.record(names, kept), {f"blocks.{layer}.hook_attn_out": heads})


def put_layer_0(study: Study, x: Tensor, kappa: Tensor) -> dict[str, interventions.Hook]:
    """A hook that leaves after layer 0, in what W_U reads, the data of kappa [n_heads] and MLP 0's slope."""
    cache, (_, slopes), W_U = look(study, x), scalars(study), study.model.unembed.W_U
    held = (source_factors(cache, kappa[None], slopes[:1]) * cache[SCALE]) @ x

    def replace(resid: Tensor) -> Tensor:
        off = held - resid @ W_U
        return resid + (off - off.mean(0)) @ torch.linalg.pinv(W_U)

    return {"blocks.0.hook_resid_post": replace}


@functools.cache
def put_in(study: Study) -> dict[str, list[Tensor]]:
    """MSE, relative to the unchanged model's, on sequences of 4, 8 and 14 inputs with the scalars in place of
    a layer's heads, or of layer 0 as a whole, beside kappa = 0 and kappa shuffled."""
    found, kappa, g = {}, scalars(study)[0], study.generator("put in")
    for length in (4, 8, 14):
        a = data.sample(min(OF_A_KIND, study.size), length, g, study.model.config.d_vocab).a
        x, target, arms = a[:, :-1], a[:, 1:], {}
        for l in study.layers:
            order = torch.randperm(len(kappa[l]), generator=g)
            for name, numbers in {"": kappa[l], ", 0": 0 * kappa[l], ", shuffled": kappa[l][order]}.items():
                arms[f"layer {l}'s heads{name}"] = put_scalars(study, l, numbers)
                if l == 0:
                    arms[f"layer 0 as a whole{name}"] = put_layer_0(study, x, numbers)
        clean = data.mse(study.model(x), target)
        for arm, hooks in arms.items():
            times = data.mse(study.model(x, hooks=hooks), target) / clean
            found.setdefault(f"put in, times the MSE: {arm}", []).append(times)
    return found


# ---------- What is left ----------
def predicted_by_sizes(study: Study, values: Tensor, test: Tensor) -> float:
    """Share of the variance of activations [batch, pos, ...] over sequences that a linear function of the log
    norms of the vectors so far predicts on other sequences, from position 2 on."""
    left_over = whole = 0.0
    for n in range(FIRST_POSITION, MAX_LENGTH):
        sizes = [s.a[:, : n + 1].norm(dim=-1).log() for s in (study.population, study.test)]
        X, X_test = (torch.cat([size, torch.ones(len(size), 1)], 1).double() for size in sizes)
        y, y_test = (v[:, n].flatten(1).double() for v in (values, test))
        fitted = X_test @ torch.linalg.lstsq(X, y, driver="gelsd").solution
        left_over += (y_test - fitted).pow(2).sum().item()
        whole += (y_test - y.mean(0)).pow(2).sum().item()
    return 1 - left_over / whole


@functools.cache
def left(study: Study) -> dict[str, object]:
    """How well sizes predict what the scalar transformer takes from the model; and, of each head of layer 0,
    how far what it writes is data (in what W_U reads) and how far sizes predict the rest."""
    population, test = (look(study, s.a[:, :-1]) for s in (study.population, study.test))
    del population["output"]
    found = {}
    for name, value in population.items():  # scales, or patterns -> [batch, dest, head, src]
        prepare = Tensor.log if "scale" in name else lambda pattern: pattern.transpose(1, 2)
        found[f"sizes predict {name}"] = predicted_by_sizes(study, prepare(value), prepare(test[name]))
    name, Q = "blocks.0.attn.hook_result", torch.linalg.qr(study.model.unembed.W_U).Q
    written, other = study.activations[name], study.record(study.test.a[:, :-1], name)[name]
    varying = written - written.mean(0)
    in_data = (varying @ Q).pow(2).sum((0, 1, 3)) / varying.pow(2).sum((0, 1, 3))
    rest, rest_other = (v - v @ Q @ Q.T for v in (written, other))
    by_sizes = [predicted_by_sizes(study, rest[:, :, h], rest_other[:, :, h]) for h in study.heads]
    return found | {"share of what each head of layer 0 writes that W_U reads": in_data,
                    "sizes predict the rest": by_sizes}


def composition(study: Study) -> dict[str, Tensor]:
    """Composition scores (Elhage et al., 2021) of layer 0's heads with the Q, K and V sides of the heads of
    layers 1 and 2, mean over these, less an untrained model's, {side: [head of layer 0, layer 1 or 2]}."""

    def raw(model) -> Tensor:  # [side, layer, head of layer 0]
        ov, layers = ov_circuit(model, 0)[:, None], []
        norm = lambda matrix: matrix.norm(dim=(-2, -1))
        for l in (1, 2):
            sides = (qk_circuit(model, l), qk_circuit(model, l).transpose(1, 2), ov_circuit(model, l))
            layers.append(torch.stack([(norm(ov @ side) / norm(ov) / norm(side)).mean(1) for side in sides]))
        return torch.stack(layers, 1)

    scores = raw(study.model) - raw(study.untrained.model).mean(-1, keepdim=True)
    return {side: scores[i].T for i, side in enumerate("QKV")}


@figure(26, "what turns the knob, and what is left", 3)
def figure_knob(study: Study):
    canvas, panels = grid(1, 3, 12, 4.4, "What turns the knob, and what is left", width_ratios=[1.3, 1, 1])
    shares = knob_shares(study, "decaying and growing")
    y = np.arange(len(shares))
    for i, (label, color) in enumerate((("decaying, given growth", LENS), ("growing, given decay", TRUTH))):
        panels[0].barh(y + 0.4 * i, [both[i] for both in shares.values()], 0.38, color=color, label=label)
    panels[0].set_yticks(y + 0.2, list(shares))
    panels[0].invert_yaxis()
    panels[0].set(xlabel="share of the change of the log scale", title="layer 1 is given of others:")
    panels[0].legend(fontsize=7)
    predicted = {name: max(value, 0) for name, value in left(study).items() if "hook" in name}
    names = [name.split()[-1].removeprefix("blocks.").replace("hook_", "") for name in predicted]
    panels[1].barh(names, predicted.values(), color=OTHER)
    panels[1].invert_yaxis()
    panels[1].set(xlim=(0, 1), xlabel="share of the variance", title="predicted by sizes alone")
    scores = composition(study)
    matrix = torch.cat([scores[side] for side in "QKV"], 1)
    heat(panels[2], matrix, "composition with layers 1 and 2, less chance", matrix.abs().max(),
         ylabel="head of layer 0", bar="score")
    panels[2].set_xticks(range(6), [f"{side}, {l}" for side in "QKV" for l in (1, 2)])
    return canvas
