"""The paper's three-layer transformer in plain PyTorch (3.2, A.1): hooks, folding, circuits, weights files.

    import torch, data, model
    transformer = model.load_weights("weights/weights.pt")
    x = data.sample(8, 14, torch.Generator().manual_seed(0)).a[:, :-1]    # [8, 14, 40]
    y = transformer(x)                                # [8, 14, 40], y[:, n] predicts a_{n+1}

    cache = {}
    transformer(x, cache=cache)                       # every activation, by name
    pattern = cache["blocks.0.attn.hook_pattern"]     # [batch, head, dest, src]
    transformer(x, hooks={"blocks.1.hook_attn_out": torch.zeros_like})    # replace one

Names and shapes of parameters and hook points are TransformerLens'. Vectors are rows and matrices act from
the right: x @ W_E, as in the paper. Index letters in every einsum of the project:

    b batch   p position (q destination, k source)   h head
    d d_model   e d_head   m d_mlp   v d_vocab   s a source that is moved   D, w a second d_model, d_vocab
"""

import contextlib
import copy
import difflib
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data


ACTIVATIONS = {"relu": F.relu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}


def setting(default, help: str, zero: bool = False, choices: tuple[str, ...] = ()):
    """A field of settings, with what `check_settings` and the command line of train.py need to know."""
    return field(default=default, metadata={"help": help, "zero": zero, "choices": choices})


def check_settings(settings):
    """ValueError unless whole numbers are at least 1, others finite and above 0 (or 0, where that is
    allowed), and texts one of the choices."""
    for f in fields(settings):
        value, zero, choices = getattr(settings, f.name), f.metadata["zero"], f.metadata["choices"]
        if f.type is int and (not isinstance(value, int) or value < 1 - zero):
            raise ValueError(f"{f.name} must be a whole number of at least {1 - zero}, not {value!r}")
        if f.type is float and not (isinstance(value, (int, float)) and 0 <= value < math.inf
                                    and (value or zero)):
            least = "of at least 0" if zero else "above 0"
            raise ValueError(f"{f.name} must be a finite number {least}, not {value!r}")
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True)
class Config:
    """The paper's model (section 3.2). A toy model of your own is `Config(n_layers=1, d_mlp=512)`."""

    d_vocab: int = setting(data.D_VOCAB, "dimensions of the vectors of a sequence")
    d_model: int = setting(128, "dimensions of the residual stream")
    d_head: int = setting(64, "dimensions of a head's queries, keys and values")
    d_mlp: int = setting(3072, "hidden units of an MLP")
    n_heads: int = setting(8, "attention heads in a layer")
    n_layers: int = setting(3, "layers, each attention and MLP")
    n_ctx: int = setting(data.N_CTX, "positions that the model has embeddings for")
    eps: float = setting(1e-5, "added to the variance in a LayerNorm")
    act_fn: str = setting("relu", "activation of the MLPs: relu (A.1) or gelu_new",
                          choices=tuple(ACTIVATIONS))
    initializer_range: float = setting(0.02, "standard deviation of the initial weight matrices")

    __post_init__ = check_settings


class Hooks:
    """What one forward pass is asked to show or to change. Every activation goes through `at(name, value)`.

    The few values that cost something to show, a LayerNorm's scale and the output of each head by itself, are
    only made where somebody `watches` them; otherwise one kernel computes the same result without them.
    """

    def __init__(self, hooks: dict[str, Callable] | None, cache: dict[str, Tensor] | None):
        self.hooks = hooks or {}
        self.cache = cache

    def watches(self, *names: str) -> bool:
        return self.cache is not None or any(name in self.hooks for name in names)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self.hooks:
            new = self.hooks[name](value)
            if not isinstance(new, Tensor) or new.shape != value.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                wanted = f"a tensor of shape {tuple(value.shape)}"
                raise ValueError(f"the hook at {name} must return {wanted}, not {got}")
            value = new
        if self.cache is not None:
            self.cache[name] = value
        return value


def affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x W + b over the last dimension, as one matrix product: [batch, pos, i] x [i, o] -> [batch, pos, o]."""
    return torch.addmm(b, x.flatten(0, -2), W).unflatten(0, x.shape[:-1])


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * w + b; as in TransformerLens hook_normalized comes after w, b."""

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.eps, self.name = config.eps, name
        self.w = nn.Parameter(torch.ones(config.d_model))
        self.b = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model]
        if not at.watches(f"{self.name}.hook_scale"):
            return at(f"{self.name}.hook_normalized", F.layer_norm(x, self.w.shape, self.w, self.b, self.eps))
        x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        scale = at(f"{self.name}.hook_scale", scale)  # [batch, pos, 1]
        return at(f"{self.name}.hook_normalized", x / scale * self.w + self.b)  # [batch, pos, d_model]


class Attention(nn.Module):
    """The heads of a layer. A head's QK circuit decides where it reads, its OV circuit what it writes."""

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.name = name
        h, d, e = config.n_heads, config.d_model, config.d_head
        # Shaped [n_heads, d_model, d_head] but laid out in memory as [d_model, n_heads, d_head], so that all
        # heads together are one [d_model, n_heads * d_head] matrix and a projection is one product without a
        # copy.
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.empty(d, h, e).transpose(0, 1)) for _ in range(3))
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(h, e)) for _ in range(3))
        self.W_O = nn.Parameter(torch.empty(h, e, d))
        self.b_O = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model], normalised
        def heads(W: Tensor, b: Tensor) -> Tensor:  # [batch, pos, n_heads, d_head]
            return affine(x, W.transpose(0, 1).flatten(1), b.flatten()).unflatten(-1, b.shape)

        q = at(f"{self.name}.hook_q", heads(self.W_Q, self.b_Q))
        k = at(f"{self.name}.hook_k", heads(self.W_K, self.b_K))
        v = at(f"{self.name}.hook_v", heads(self.W_V, self.b_V))

        # The mask goes in as the matrix that the product is added to; heads are folded into the batch.
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=q.dtype, device=x.device).triu(1)
        Q, K, V = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # [batch * n_heads, pos, d_head]
        scores = torch.baddbmm(mask, Q, K.transpose(1, 2),
                               alpha=Q.shape[-1] ** -0.5).unflatten(0, (len(x), q.shape[2]))
        scores = at(f"{self.name}.hook_attn_scores", scores)  # [batch, n_heads, dest, src]
        pattern = at(f"{self.name}.hook_pattern", scores.softmax(-1))  # [batch, n_heads, dest, src]
        z = (pattern.flatten(0, 1) @ V).unflatten(0, (len(x), q.shape[2])).transpose(1, 2)
        z = at(f"{self.name}.hook_z", z)  # [batch, pos, n_heads, d_head]

        if at.watches(f"{self.name}.hook_result"):
            result = at(f"{self.name}.hook_result", torch.einsum("bqhe,hed->bqhd", z, self.W_O))
            return result.sum(2) + self.b_O  # [batch, pos, d_model]
        return affine(z.flatten(2), self.W_O.flatten(0, 1), self.b_O)  # [batch, pos, d_model]


class MLP(nn.Module):
    """act_fn(x W_in + b_in) W_out + b_out, at each position by itself (A.1)."""

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.name, self.act = name, ACTIVATIONS[config.act_fn]
        self.W_in = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(config.d_mlp))
        self.W_out = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        self.b_out = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model], normalised
        pre = at(f"{self.name}.hook_pre", affine(x, self.W_in, self.b_in))  # [batch, pos, d_mlp]
        post = at(f"{self.name}.hook_post", self.act(pre))
        return affine(post, self.W_out, self.b_out)  # [batch, pos, d_model]


class Block(nn.Module):
    """Attention, then MLP: each reads the normalised residual stream and adds to it (A.1)."""

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.name = name
        self.ln1 = LayerNorm(config, f"{name}.ln1")
        self.attn = Attention(config, f"{name}.attn")
        self.ln2 = LayerNorm(config, f"{name}.ln2")
        self.mlp = MLP(config, f"{name}.mlp")

    def forward(self, resid: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model]
        resid = at(f"{self.name}.hook_resid_pre", resid)
        resid = resid + at(f"{self.name}.hook_attn_out", self.attn(self.ln1(resid, at), at))
        resid = at(f"{self.name}.hook_resid_mid", resid)
        resid = resid + at(f"{self.name}.hook_mlp_out", self.mlp(self.ln2(resid, at), at))
        return at(f"{self.name}.hook_resid_post", resid)


class Transformer(nn.Module):
    """Maps vectors to vectors: x [batch, pos, d_vocab] -> prediction of the next vector at each position,
    same shape.

    Weight matrices start as N(0, initializer_range), biases as 0, LayerNorms as 1 and 0, drawn from
    `generator` (torch's default one if None). `hook_names` lists all hook points.
    """

    def __init__(self, config: Config = Config(), generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embed = nn.ParameterDict({"W_E": torch.empty(config.d_vocab, config.d_model)})
        self.pos_embed = nn.ParameterDict({"W_pos": torch.empty(config.n_ctx, config.d_model)})
        self.blocks = nn.ModuleList(Block(config, f"blocks.{l}") for l in range(config.n_layers))
        self.ln_final = LayerNorm(config, "ln_final")
        self.unembed = nn.ParameterDict({"W_U": torch.empty(config.d_model, config.d_vocab),
                                         "b_U": torch.zeros(config.d_vocab)})
        for name, parameter in self.named_parameters():
            if name.split(".")[-1].startswith("W_"):
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)

        ln = ["hook_scale", "hook_normalized"]
        attn = ["hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z", "hook_result"]
        block = ["hook_resid_pre", *(f"ln1.{n}" for n in ln), *(f"attn.{n}" for n in attn), "hook_attn_out",
                 "hook_resid_mid"]
        block += [*(f"ln2.{n}" for n in ln), "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out",
                  "hook_resid_post"]
        self.hook_names = ["hook_embed", "hook_pos_embed"]
        self.hook_names += [f"blocks.{l}.{name}" for l in range(config.n_layers) for name in block]
        self.hook_names += [f"ln_final.{name}" for name in ln]

    def watch(self, hooks: dict[str, Callable] | None, cache: dict[str, Tensor] | None) -> Hooks:
        """The hooks and the cache of one pass, their names checked."""
        for name in hooks or {}:
            if name not in self.hook_names:
                near = difflib.get_close_matches(name, self.hook_names, n=3, cutoff=0)
                raise KeyError(f"no hook point {name!r}; near it: {', '.join(near)}")
        return Hooks(hooks, cache)

    def forward(self, x: Tensor, hooks: dict[str, Callable] | None = None,
                cache: dict[str, Tensor] | None = None) -> Tensor:
        """Predict a_1 .. a_n from x = a_0 .. a_{n-1}: [batch, pos, d_vocab] -> [batch, pos, d_vocab].

        hooks: {hook name: fn}; fn(activation) returns what takes its place, a tensor of the same shape.
        cache: a dict that is filled with every activation under its hook name, after the hooks have had their
        turn.

        Raises ValueError for an x of another shape, of more than n_ctx positions or of integers, and for a
        hook that returns another shape; KeyError for an unknown hook name.
        """
        config = self.config
        if x.dim() != 3 or x.shape[-1] != config.d_vocab or not 1 <= x.shape[1] <= config.n_ctx:
            wanted = f"[batch, pos, d_vocab = {config.d_vocab}] with 1 to n_ctx = {config.n_ctx} positions"
            raise ValueError(f"x must be {wanted}, not {list(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must hold floating point vectors, not {x.dtype}: this model has no tokens")
        at = self.watch(hooks, cache)
        embed = at("hook_embed", x @ self.embed.W_E)  # [batch, pos, d_model]
        pos_embed = at("hook_pos_embed", self.pos_embed.W_pos[: x.shape[1]].expand_as(embed))
        return self.run_from(0, embed + pos_embed, hooks, cache)

    def run_from(self, layer: int, resid: Tensor, hooks: dict[str, Callable] | None = None,
                 cache: dict[str, Tensor] | None = None) -> Tensor:
        """The rest of the forward pass, from blocks.{layer}.hook_resid_pre on: resid [batch, pos, d_model] ->
        [batch, pos, d_vocab].

        An intervention in one layer leaves everything before it as it was, and need not compute it again.
        With layer = n_layers only ln_final and the unembedding are left: the logit lens. Hooks before `layer`
        do nothing. Raises ValueError for a layer outside 0 .. n_layers, else as `forward` does.
        """
        at = self.watch(hooks, cache)
        if not 0 <= layer <= len(self.blocks):
            raise ValueError(f"layer must be between 0 and n_layers = {len(self.blocks)}, not {layer}")
        for block in self.blocks[layer:]:
            resid = block(resid, at)
        return affine(self.ln_final(resid, at), self.unembed.W_U, self.unembed.b_U)  # [batch, pos, d_vocab]


@torch.no_grad()
def fold(transformer: Transformer) -> Transformer:
    """A new model with the same outputs, in which every circuit can be read off the weights (section 4.1).

    LayerNorm weights and biases go into the matrices that read the normalised vector and their biases, value
    biases then into b_O. A normalised vector has mean 0 over d_model, so the mean of a reading matrix over
    d_model has no effect and is removed; a LayerNorm ignores the mean of what it reads, so the mean of what
    is written to the residual stream is removed as well. Leaves ln.w = 1, ln.b = 0 and b_V = 0.
    TransformerLens' center_unembed is left out on purpose: it changes every output by a constant, which only
    a softmax would ignore.
    """
    model = copy.deepcopy(transformer)

    def fold_into(ln: LayerNorm, W: Tensor, b: Tensor):  # W [..., d_model, out], b [..., out]
        b += ln.b @ W
        W *= ln.w[:, None]
        W -= W.mean(-2, keepdim=True)

    def reset(ln: LayerNorm):
        ln.w.fill_(1)
        ln.b.zero_()

    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V)):
            fold_into(block.ln1, W, b)
        fold_into(block.ln2, mlp.W_in, mlp.b_in)
        reset(block.ln1)
        reset(block.ln2)
        # A row of attention sums to 1, so a head adds b_V W_O to every position whatever it attends to.
        attn.b_O += torch.einsum("he,hed->d", attn.b_V, attn.W_O)
        attn.b_V.zero_()
    fold_into(model.ln_final, model.unembed.W_U, model.unembed.b_U)
    reset(model.ln_final)

    writers = [model.embed.W_E, model.pos_embed.W_pos]
    writers += [p for block in model.blocks for p in (block.attn.W_O, block.attn.b_O, block.mlp.W_out,
                                                      block.mlp.b_out)]
    for parameter in writers:
        parameter -= parameter.mean(-1, keepdim=True)
    return model


# Circuits: products of weights, best of a folded model. They act from the right, x @ W_V @ W_O.


def ov_circuit(model: Transformer, layer: int) -> Tensor:
    """W_V W_O of each head, [n_heads, d_model, d_model]: a source vector x adds x @ OV to the destination."""
    attn = model.blocks[layer].attn
    return attn.W_V @ attn.W_O


def qk_circuit(model: Transformer, layer: int) -> Tensor:
    """W_Q W_K^T of each head, [n_heads, d_model, d_model]: without biases the score before
    / sqrt(d_head) is x_destination @ QK @ x_source (section 4.6)."""
    attn = model.blocks[layer].attn
    return attn.W_Q @ attn.W_K.transpose(1, 2)


def full_ov_circuit(model: Transformer, layer: int) -> Tensor:
    """W_E W_V W_O W_U of each head, [n_heads, d_vocab, d_vocab]: between data vectors, no LayerNorm."""
    return model.embed.W_E @ ov_circuit(model, layer) @ model.unembed.W_U


def identity_cosine(matrix: Tensor) -> Tensor:
    """Cosine between square matrices [..., n, n] and I: trace / (Frobenius norm * sqrt(n)), in [-1, 1]; at
    most sqrt(r / n) for rank r."""
    n = matrix.shape[-1]
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / (matrix.norm(dim=(-2, -1)) * n**0.5)


def eigenvalue_score(circuit: Tensor) -> Tensor:
    """sum(lambda) / sum(|lambda|) of square matrices [..., n, n], in [-1, 1]: 1 copies, -1 copies negatively.

    For a product of thin factors A B pass B A, which has the same eigenvalues but for zeros.
    """
    eigenvalues = torch.linalg.eigvals(circuit.double().cpu())  # there matrices of this size are faster
    return (eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)).float()


def effective_rank(matrix: Tensor) -> Tensor:
    """Participation ratio of the singular values, (sum s)^2 / sum s^2, of matrices [..., m, n]: 1 for rank
    one, n for an n x n rotation."""
    s = torch.linalg.svdvals(matrix.double())
    return (s.sum(-1) ** 2 / (s**2).sum(-1)).float()


def direct_attribution(model: Transformer, component: Tensor, target: Tensor,
                       scale: Tensor | None = None) -> Tensor:
    """Direct logit attribution: <ln_final(component) W_U, target>, [batch, pos, ...], of what something adds
    to the residual stream, [batch, pos, ..., d_model]; target [batch, pos, d_vocab].

    scale None is the paper's text: ln_final normalises the component by itself, and so forgets how large it
    is. With scale = ln_final.hook_scale [batch, pos, 1] the component is divided as the residual stream as a
    whole is: the field's standard, in which all components and ln_final.b W_U + b_U add up to the output's.
    """
    ln = model.ln_final
    if scale is None:
        normalised = F.layer_norm(component, ln.w.shape, ln.w, None, ln.eps)
    else:
        scale = scale.reshape(*scale.shape[:2], *[1] * (component.dim() - 2))
        normalised = (component - component.mean(-1, keepdim=True)) / scale * ln.w
    return torch.einsum("bp...d,bpd->bp...", normalised, target @ model.unembed.W_U.T)


# Files


@contextlib.contextmanager
def replacing(path: str):
    """A binary file to write, which takes the place of `path` once it is complete: a kill or an error before
    that leaves the old one. OSError, with the path, if it cannot be written."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            yield f
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def save_file(value, path: str):
    """torch.save to `path`, whole or not at all. By way of memory, since torch's own writer turns a full disk
    into a RuntimeError that does not name the file."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with replacing(path) as f:
        f.write(buffer.getbuffer())


def save_json(value, path: str):
    """`value` as JSON to `path`, whole or not at all."""
    with replacing(path) as f:
        f.write((json.dumps(value, indent=1) + "\n").encode())


def load_file(path: str, what: str) -> dict:
    """The dict that `save_file` (on the CPU) or `save_json` wrote; `what` names the file in messages.

    Raises FileNotFoundError if there is none and ValueError if it cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {what} at {path}")
    try:
        if path.endswith(".json"):
            with open(path) as f:
                value = json.load(f)
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common type for what a damaged file makes it raise
        message = f"{path} is damaged or is no {what} as train.py writes it ({type(error).__name__})"
        raise ValueError(message) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no {what}: it holds a {type(value).__name__}, not a dict")
    return value


def settings_beside(path: str) -> dict:
    """What the config.json of a run says, given one of its weights files (in steps/ too); {} without one."""
    folder = os.path.dirname(path)
    if os.path.basename(folder) == "steps":
        folder = os.path.dirname(folder)
    config = os.path.join(folder, "config.json")
    return load_file(config, "config") if os.path.exists(config) else {}


def load_weights(path: str) -> Transformer:
    """The model whose state dict `train.py` wrote to `path`, built as the config.json beside it says
    (defaults without).

    Raises FileNotFoundError if there is no such file; ValueError if it or config.json cannot be read, its
    names or shapes are not those of the config, or a value is not finite.
    """
    state, settings = load_file(path, "weights file"), settings_beside(path)
    model = Transformer(Config(**{f.name: settings[f.name] for f in fields(Config) if f.name in settings}))
    expected = model.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        more = f" and {len(missing) - 1} more parameters" if missing[1:] else ""
        raise ValueError(f"{path} lacks {missing[0]}{more}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"{path} holds {unknown[0]}, which this model does not have")
    for name, value in expected.items():
        if not isinstance(state[name], Tensor) or state[name].shape != value.shape:
            shape = list(getattr(state[name], "shape", []))
            raise ValueError(f"{path} is of another model: {name} is {shape}, expected {list(value.shape)}")
        if not state[name].isfinite().all():
            raise ValueError(f"{path} holds values in {name} that are not finite")
    model.load_state_dict(state)
    return model
