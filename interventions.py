"""Everything that changes what the model computes: ablation, patching, other QK circuits (sections 4.5, 4.6);
and source weights, which show what the output does when an input moves.

    import torch, data, model, interventions
    transformer = model.fold(model.load_weights("weights/weights.pt"))
    x = data.sample(1000, 14, torch.Generator().manual_seed(0)).a[:, :-1]

    cache = {}
    transformer(x, cache=cache)
    means = interventions.mean_outputs(cache)
    hooks = interventions.replace_outputs(means, heads=interventions.layer_heads(transformer, 1))
    transformer(x, hooks=hooks)                                     # every head of layer 1 mean-ablated

    generator = torch.Generator().manual_seed(0)
    changed = interventions.pseudoinverse_qk(transformer, layer=2, heads=[0, 1, 2, 3, 4], generator=generator)
    changed(x)                                                      # the paper's replacement of W_Q and W_K

An intervention on activations is a hook dict, one on weights a changed copy: the model passed in stays as it
is and nothing has to be undone. Head outputs are replaced at hook_z, before W_O. Since W_O is linear this is
the same as replacing what each head writes, without materialising it; b_O stays, and on a folded model b_O
holds the value biases.

Parts, in order: hooks that record and replace activations; copies with another QK circuit; source weights.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer

Head = tuple[int, int]  # (layer, head), both from 0


def layer_heads(model: Transformer, layer: int) -> list[Head]:
    """All heads of one layer."""
    return [(layer, head) for head in range(model.config.n_heads)]


def record(names: Iterable[str], into: dict[str, Tensor]) -> dict[str, Callable]:
    """Hooks that change nothing and keep the activations `names` in `into`; a cache would keep them all."""

    def keep(name: str) -> Callable:
        def hook(value: Tensor) -> Tensor:
            into[name] = value
            return value

        return hook

    return {name: keep(name) for name in names}


def mean_outputs(cache: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean output of every head and MLP at each position over a population, for mean ablation (section 4.5).

    cache: activations of a forward pass over the population, with those that are to be replaced. Returns
    {hook name: mean}, blocks.{l}.attn.hook_z [pos, n_heads, d_head] and blocks.{l}.hook_mlp_out [pos,
    d_model]; their mean over positions is another choice, which forgets what a head does at each.
    """
    return {name: value.mean(0) for name, value in cache.items()
            if name.endswith((".hook_z", ".hook_mlp_out"))}


def zero_outputs(model: Transformer) -> dict[str, Tensor]:
    """Zeros for zero ablation, to be used like `mean_outputs`."""
    return {f"blocks.{l}.{name}": torch.zeros(()) for l in range(model.config.n_layers)
            for name in ("attn.hook_z", "hook_mlp_out")}


def replace_outputs(values: dict[str, Tensor], heads: Iterable[Head] = (),
                    mlps: Iterable[int] = ()) -> dict[str, Callable]:
    """Hooks that replace the outputs of `heads` and of the MLPs of layers `mlps` by `values`.

    values: {hook name: tensor that broadcasts to that activation}. From `zero_outputs` this is zero ablation,
    from `mean_outputs` mean ablation, and from the cache of another forward pass it is activation patching.
    Raises KeyError if `values` lacks a hook point that is to be replaced.
    """
    hooks: dict[str, Callable] = {}
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def swap_heads(new: Tensor, chosen: list[int]) -> Callable:
        def swap(z: Tensor) -> Tensor:  # [batch, pos, n_heads, d_head]
            z = z.clone()
            z[:, :, chosen] = new.to(z).expand_as(z)[:, :, chosen]
            return z

        return swap

    for layer, chosen in by_layer.items():
        name = f"blocks.{layer}.attn.hook_z"
        hooks[name] = swap_heads(values[name], chosen)
    return hooks | hold({name: values[name] for name in (f"blocks.{layer}.hook_mlp_out" for layer in mlps)})


def hold(values: dict[str, Tensor]) -> dict[str, Callable]:
    """Hooks that give activations the `values` they had in another pass, {hook name: tensor}."""
    return {name: lambda value, new=new: new.to(value).expand_as(value) for name, new in values.items()}


def patch_positions(values: dict[str, Tensor], positions: Iterable[int]) -> dict[str, Callable]:
    """Hooks that give activations [batch, pos, ...] the `values` of another pass at some positions only."""
    positions = list(positions)

    def patch(new: Tensor) -> Callable:
        return lambda value: value.index_copy(1, torch.tensor(positions), new[:, positions].to(value))

    return {name: patch(new) for name, new in values.items()}


def keep_directions(name: str, mean: Tensor, directions: Tensor) -> dict[str, Callable]:
    """A hook that leaves of an activation its mean [..., d_model] and what varies along `directions` [k,
    d_model], which are orthonormal: with k = 1, one number at each position."""
    return {name: lambda value: mean + (value - mean) @ directions.T @ directions}


def remove_directions(name: str, mean: Tensor, directions: Tensor) -> dict[str, Callable]:
    """The opposite of `keep_directions`: what varies along `directions` is taken away."""
    return {name: lambda value: value - (value - mean) @ directions.T @ directions}


@torch.no_grad()
def replace_qk(model: Transformer, layer: int, heads: Iterable[int], W_Q: Tensor, W_K: Tensor) -> Transformer:
    """A copy of the model in which `heads` of `layer` have other W_Q and W_K, each [len(heads), d_model,
    d_head], and no b_Q and b_K.

    The old biases are vectors in the old head's coordinates, which mean nothing in the new ones. W_Q = W_K =
    0 makes attention uniform.
    """
    changed = copy.deepcopy(model)
    attn = changed.blocks[layer].attn
    heads = list(heads)
    attn.W_Q[heads], attn.W_K[heads] = W_Q, W_K
    attn.b_Q[heads], attn.b_K[heads] = 0.0, 0.0
    return changed


@torch.no_grad()
def pseudoinverse_qk(model: Transformer, layer: int, heads: Iterable[int],
                     generator: torch.Generator) -> Transformer:
    """The paper's test of QK = I (section 4.6): W_Q is random, W_K^T its Moore-Penrose pseudoinverse.

    W_Q W_K^T is then the orthogonal projection onto a random d_head-dimensional subspace of R^d_model, the
    identity as nearly as rank d_head allows. Its scale does not depend on that of W_Q.
    """
    heads = list(heads)
    W_Q = torch.randn(len(heads), model.config.d_model, model.config.d_head,
                      generator=generator).to(model.embed.W_E)
    W_K = torch.linalg.pinv(W_Q).transpose(1, 2)  # [len(heads), d_model, d_head]
    return replace_qk(model, layer, heads, W_Q, W_K)


@torch.no_grad()
def random_qk(model: Transformer, layer: int, heads: Iterable[int],
              generator: torch.Generator) -> Transformer:
    """The control to `pseudoinverse_qk`: W_Q and W_K independent and random, their product as large
    (Frobenius) as the trained one."""
    heads = list(heads)
    shape = (len(heads), model.config.d_model, model.config.d_head)
    W_Q, W_K = (torch.randn(shape, generator=generator).to(model.embed.W_E) for _ in range(2))
    attn = model.blocks[layer].attn
    trained = (attn.W_Q[heads] @ attn.W_K[heads].transpose(1, 2)).norm(dim=(1, 2), keepdim=True)
    return replace_qk(model, layer, heads,
                      W_Q * trained / (W_Q @ W_K.transpose(1, 2)).norm(dim=(1, 2), keepdim=True), W_K)


# Source weights (ours)
#
# If a is an affine recurrence so is a Q for every orthogonal Q. A predictor that commutes with such rotations
# is prediction_n = sum over s <= n of w_s a_s, its weights functions of inner products only. Moving one a_s
# by a small v orthogonal to the plane of the sequence changes no inner product to first order: the prediction
# moves by w_s v.


def off_plane(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random unit vectors orthogonal to all vectors of each sequence x [batch, pos, d_vocab]: [batch,
    d_vocab]. The sequences must span less than d_vocab dimensions; an affine recurrence spans two."""
    projection = torch.linalg.pinv(x, rtol=1e-6) @ x  # [batch, d_vocab, d_vocab]
    v = torch.randn(len(x), x.shape[-1], generator=generator, dtype=x.dtype)
    return F.normalize(v - torch.einsum("bv,bvw->bw", v, projection), dim=-1)


def source_weights(predict: Callable, x: Tensor, v: Tensor) -> Tensor:
    """w_s = <v, d prediction_n / d a_s . v>, one forward-mode derivative for each source s.

    predict: [batch, pos, d_vocab] -> [batch, dest, ..., d_vocab]; x [batch, pos, d_vocab], in float64; v
    [batch, d_vocab] from `off_plane`. Returns [batch, dest, src, ...]: each component of what `predict`
    returns has weights.
    """
    moves = torch.eye(x.shape[1], dtype=x.dtype)[:, None, :, None] * v[:, None]  # [src, batch, pos, d_vocab]
    move = lambda tangent: torch.func.jvp(predict, (x,), (tangent,))[1]
    moved = torch.vmap(move, chunk_size=max(2, 35 // len(x)))(moves)  # so much stays in the processor's cache
    return torch.einsum("sbp...v,bv->bps...", moved, v)


def strides(w: Tensor, c: float | Tensor) -> tuple[Tensor, Tensor]:
    """With a_s = a* + c^s u the prediction holds (A c^{n-1} + B c^n) u, A from the sources at the parity of n
    - 1 and B from those at the parity of n; c^{n+1} is right. w [..., dest, src] -> A / c^2 and B / c, [...,
    dest]: a two-step rule has 1 and 0, a one-step rule 0 and 1. c: one for all, or a tensor [...], which may
    be complex: where a_s = a* + sum_i c_i^s u_i, each root c_i has its own A and B."""
    n = torch.arange(w.shape[-1], dtype=w.dtype)
    c = c[..., None, None] if isinstance(c, Tensor) else float(c)
    parts = w * c ** (n - n[:, None] - 1)
    other_parity = (n[:, None] - n) % 2 == 1
    return (parts * other_parity).sum(-1), (parts * ~other_parity).sum(-1)
