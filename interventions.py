"""Everything that changes what the model computes: ablation, patching, other QK circuits (sections 4.5, 4.6).

    import torch, data, model, interventions
    transformer = model.fold(model.load_weights("weights/weights.pt"))
    x = data.sample(1000, 14, torch.Generator().manual_seed(0)).a[:, :-1]

    cache = {}
    transformer(x, cache=cache)
    means = interventions.mean_outputs(cache)
    one = interventions.replace_outputs(means, heads=[(1, 0)])      # head 0 of layer 1, mean-ablated
    transformer(x, hooks=one)

    two = interventions.replace_outputs(means, heads=[(1, 3)])
    transformer(x, hooks=interventions.join(one, two))              # both; one | two would drop the first

    generator = torch.Generator().manual_seed(0)
    changed = interventions.pseudoinverse_qk(transformer, layer=2, heads=[0, 1, 2, 3, 4], generator=generator)
    changed(x)                                                      # the paper's replacement of W_Q and W_K

An intervention on activations is a hook dict, one on weights a changed copy: the model passed in stays as it
is and nothing has to be undone. Head outputs are replaced at hook_z, before W_O. Since W_O is linear this is
the same as replacing what each head writes, without materialising it; b_O stays, and on a folded model b_O
holds the value biases.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from model import Transformer

Head = tuple[int, int]  # (layer, head), both from 0
Hook = Callable[[Tensor], Tensor]


def join(*hook_dicts: dict[str, Hook]) -> dict[str, Hook]:
    """One hook dict that does what all of them do: where several hooks stand at one point, each gets what the
    one before it returned, in the order given."""
    joined: dict[str, Hook] = {}
    for hooks in hook_dicts:
        for name, hook in hooks.items():
            joined[name] = after(joined[name], hook) if name in joined else hook
    return joined


def after(first: Hook, second: Hook) -> Hook:
    return lambda value: second(first(value))


def record(names: Iterable[str], into: dict[str, Tensor]) -> dict[str, Hook]:
    """Hooks that change nothing and keep the activations `names` in `into`; a cache would keep them all."""

    def keep(name: str) -> Hook:
        def hook(value: Tensor) -> Tensor:
            into[name] = value.clone()  # the next hook at this point may write into it
            return value

        return hook

    return {name: keep(name) for name in names}


def as_lists(indices: Iterable) -> list:
    """Indices of heads, layers or positions as plain numbers: rows of `mask.nonzero()` and elements of arrays
    are no keys of a dict, since two that are equal are two keys."""
    return [index.tolist() if hasattr(index, "tolist") else index for index in indices]


def layer_heads(model: Transformer, layer: int) -> list[Head]:
    """All heads of one layer."""
    return [(layer, head) for head in range(model.config.n_heads)]


def mean_outputs(cache: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean output of every head and MLP at each position over a population, for mean ablation (section 4.5).

    cache: activations of a pass over the population. Returns {hook name: mean}, blocks.{l}.attn.hook_z [pos,
    n_heads, d_head] and blocks.{l}.hook_mlp_out [pos, d_model].
    """
    ends = (".hook_z", ".hook_mlp_out")
    return {name: value.mean(0) for name, value in cache.items() if name.endswith(ends)}


def zero_outputs(model: Transformer) -> dict[str, Tensor]:
    """Zeros for zero ablation, to be used like `mean_outputs`."""
    zeros = {}
    for layer in range(model.config.n_layers):
        zeros[f"blocks.{layer}.attn.hook_z"] = torch.zeros(())
        zeros[f"blocks.{layer}.hook_mlp_out"] = torch.zeros(())
    return zeros


def replace_outputs(
    values: dict[str, Tensor], heads: Iterable[Head] = (), mlps: Iterable[int] = ()
) -> dict[str, Hook]:
    """Hooks that replace the outputs of `heads` and of the MLPs of layers `mlps` by `values`.

    values: {hook name: tensor that broadcasts to that activation}. From `zero_outputs` this is zero ablation,
    from `mean_outputs` mean ablation, and from the cache of another forward pass it is activation patching.
    Raises KeyError if `values` lacks a hook point that is to be replaced; the hooks raise ValueError if a
    value does not broadcast.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in as_lists(heads):
        by_layer.setdefault(layer, []).append(head)

    def swap_heads(new: Tensor, chosen: list[int]) -> Hook:
        def swap(z: Tensor) -> Tensor:  # [batch, pos, n_heads, d_head], a copy that may be written into
            z[:, :, chosen] = broadcast(new, z)[:, :, chosen]
            return z

        return swap

    hooks: dict[str, Hook] = {}
    for layer, chosen in by_layer.items():
        name = f"blocks.{layer}.attn.hook_z"
        hooks[name] = swap_heads(values[name], chosen)
    names = [f"blocks.{layer}.hook_mlp_out" for layer in as_lists(mlps)]
    return hooks | hold({name: values[name] for name in names})


def broadcast(new: Tensor, value: Tensor) -> Tensor:
    """`new` in the shape, dtype and device of an activation. ValueError if it does not broadcast to it."""
    try:
        return new.to(value).expand_as(value)
    except RuntimeError as error:
        wanted = f"broadcast to an activation of shape {tuple(value.shape)}"
        raise ValueError(f"a value of shape {tuple(new.shape)} does not {wanted}") from error


def hold(values: dict[str, Tensor]) -> dict[str, Hook]:
    """Hooks that give activations the `values` they had in another pass, {hook name: tensor that broadcasts
    to it}; ValueError, when they run, if one does not."""
    return {name: lambda value, new=new: broadcast(new, value) for name, new in values.items()}


def patch_positions(values: dict[str, Tensor], positions: Iterable[int]) -> dict[str, Hook]:
    """Hooks that give activations the `values` of another pass at some positions only.

    values: {hook name: [batch, pos, ...]}, from a batch as large; positions: at least one, from 0. Raises
    ValueError for a position outside them and for hook_attn_scores and hook_pattern, which have no position
    in the second place.
    """
    positions = as_lists(positions)
    for name, new in values.items():
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            raise ValueError(
                f"{name} is [batch, head, dest, src]: only [batch, pos, ...] has positions"
            )
        if not positions or min(positions) < 0 or max(positions) >= new.shape[1]:
            raise ValueError(f"positions must be some of 0 to {new.shape[1] - 1}, not {positions}")

    def patch(new: Tensor) -> Hook:
        def hook(value: Tensor) -> Tensor:
            value[:, positions] = broadcast(new, value)[:, positions]
            return value

        return hook

    return {name: patch(new) for name, new in values.items()}


@torch.no_grad()
def replace_qk(
    model: Transformer, layer: int, heads: Iterable[int], W_Q: Tensor, W_K: Tensor
) -> Transformer:
    """A copy of the model in which `heads` of `layer` have other W_Q and W_K, each [len(heads), d_model,
    d_head], and no b_Q and b_K, which mean nothing in other coordinates. W_Q = W_K = 0: uniform attention.
    """
    changed = copy.deepcopy(model)
    attn = changed.blocks[layer].attn
    heads = as_lists(heads)
    attn.W_Q[heads] = W_Q
    attn.W_K[heads] = W_K
    attn.b_Q[heads] = 0.0
    attn.b_K[heads] = 0.0
    return changed


def random_matrices(model: Transformer, heads: list[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of the heads' W_Q, [len(heads), d_model, d_head]."""
    shape = (len(heads), model.config.d_model, model.config.d_head)
    return torch.randn(shape, generator=generator).to(model.embed.W_E)


@torch.no_grad()
def pseudoinverse_qk(
    model: Transformer, layer: int, heads: Iterable[int], generator: torch.Generator
) -> Transformer:
    """The paper's test of QK = I (section 4.6): W_Q is random, W_K^T its Moore-Penrose pseudoinverse.

    W_Q W_K^T is then the orthogonal projection onto a random d_head-dimensional subspace of R^d_model, the
    identity as nearly as rank d_head allows. Its scale does not depend on that of W_Q.
    """
    heads = as_lists(heads)
    W_Q = random_matrices(model, heads, generator)
    W_K = torch.linalg.pinv(W_Q).transpose(1, 2)  # [len(heads), d_model, d_head]
    return replace_qk(model, layer, heads, W_Q, W_K)


@torch.no_grad()
def random_qk(
    model: Transformer, layer: int, heads: Iterable[int], generator: torch.Generator
) -> Transformer:
    """The control to `pseudoinverse_qk`: W_Q and W_K independent and random, their product as large
    (Frobenius) as the trained one."""
    heads = as_lists(heads)
    W_Q = random_matrices(model, heads, generator)
    W_K = random_matrices(model, heads, generator)
    attn = model.blocks[layer].attn
    trained = circuit_norms(attn.W_Q[heads], attn.W_K[heads])
    W_Q = W_Q * trained / circuit_norms(W_Q, W_K)
    return replace_qk(model, layer, heads, W_Q, W_K)


def circuit_norms(W_Q: Tensor, W_K: Tensor) -> Tensor:
    """Frobenius norms of W_Q W_K^T, [heads, 1, 1]."""
    return (W_Q @ W_K.transpose(1, 2)).norm(dim=(1, 2), keepdim=True)
