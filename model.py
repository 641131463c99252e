"""The paper's three-layer transformer in plain PyTorch (3.2, A.1): hooks, folding, circuits, weights files.

    import torch, data, model
    transformer, cache = model.load_weights("weights/weights.pt"), {}
    x = data.sample(8, 14, torch.Generator().manual_seed(0)).a[:, :-1]    # [8, 14, 40]
    y = transformer(x, cache=cache)                   # [8, 14, 40], y[:, n] predicts a_{n+1}
    pattern = cache["blocks.0.attn.hook_pattern"]     # every activation, by name
    transformer(x, hooks={"blocks.1.hook_attn_out": torch.zeros_like})    # replace one

Names and shapes of parameters and hook points are TransformerLens':

    x [batch, pos, d_vocab]
    | hook_embed [batch, pos, d_model] = x @ W_E, + hook_pos_embed [batch, pos, d_model]
    v for l = 0, 1, 2; the names below follow "blocks.{l}."
    hook_resid_pre [batch, pos, d_model]
    +--> ln1.hook_scale [batch, pos, 1], what the LayerNorm divides by; ln1.hook_normalized [.., d_model]
    |    +--> attn.hook_q, hook_k [batch, pos, head, d_head]
    |    |    attn.hook_attn_scores, hook_pattern [batch, head, dest, src]: q . k / sqrt(d_head), softmax
    |    +--> attn.hook_v [batch, pos, head, d_head]
    |         attn.hook_z [batch, pos, head, d_head] = pattern @ v
    |         attn.hook_result [batch, pos, head, d_model] = z @ W_O; made only when hooked or cached
    + hook_attn_out [batch, pos, d_model], summed over heads, + b_O
    hook_resid_mid [batch, pos, d_model]
    +--> ln2.hook_scale, ln2.hook_normalized
    |    mlp.hook_pre, mlp.hook_post [batch, pos, d_mlp], before and after act_fn
    + hook_mlp_out [batch, pos, d_model]
    hook_resid_post [batch, pos, d_model]
    | after the last block
    v ln_final.hook_scale [batch, pos, 1], ln_final.hook_normalized [batch, pos, d_model]
    prediction of the next vector [batch, pos, d_vocab] = normalized @ W_U + b_U

Vectors are rows and matrices act from the right: x @ W_E, as in the paper. Index letters in every einsum of
the project: b batch, p position (q destination, k source, s one that is moved), h head, d d_model, e d_head,
m d_mlp, v d_vocab, r row or coordinate (beyond/); D, w, t a second d_model, d_vocab, position.
"""

import contextlib
import copy
import difflib
import hashlib
import io
import json
import math
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import data

ACTIVATIONS = {"relu": F.relu, "gelu_new": partial(F.gelu, approximate="tanh")}


def setting(default, help: str, least: float | None = None, choices: tuple[str, ...] = ()):
    """A field of settings with its help text; numbers are at least `least` (1, or 1e-12 of a fraction, if
    nothing is said), texts one of `choices`. `check_settings` sees to it."""
    if least is None:
        least = 1e-12 if isinstance(default, float) else 1
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


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
    act_fn: str = setting("relu", "of the MLPs: relu (A.1) or gelu_new", choices=tuple(ACTIVATIONS))
    initializer_range: float = setting(0.02, "standard deviation of the initial weight matrices")


# ---------- Hooks ----------
class Hooks:
    """What one forward pass is asked to show or to change. Every activation goes through `at(name, value)`.

    A hook gets a copy and a cache keeps one: what is written into them changes nothing else. What costs
    something to show, a LayerNorm's scale and each head's output, is only made where somebody `watches`.
    """

    def __init__(
        self, hooks: dict[str, Callable] | None, cache: dict[str, Tensor] | None, names: list[str]
    ):
        self.hooks = hooks or {}
        self.cache = cache
        for name in self.hooks:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0)
                raise KeyError(f"no hook point {name!r}; near it: {', '.join(near)}")

    def watches(self, name: str) -> bool:
        return self.cache is not None or name in self.hooks

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self.hooks:
            new = self.hooks[name](value.clone())
            if describe(new) != describe(value):
                raise ValueError(
                    f"the hook at {name} must return {describe(value)}, not {describe(new)}"
                )
            value = new

        if self.cache is not None:
            # The pass goes on with the copy that is kept, so that gradients reach it.
            value = value.clone()
            self.cache[name] = value
        return value


def describe(value) -> str:
    """What a hook has to keep of an activation."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"


# ---------- The transformer ----------
def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x W + b over the last dimension, as one matrix product: [batch, pos, i] x [i, o] -> [batch, pos, o]."""
    return torch.addmm(b, x.flatten(0, -2), W).unflatten(0, x.shape[:-1])


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * w + b; as in TransformerLens hook_normalized comes after w, b.

    Two ways to the same: PyTorch's own, which training takes, and the formula, where somebody watches the
    scale. They agree to rounding, so that outputs with a cache differ from those without by up to 1e-6.
    """

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.eps = config.eps
        self.name = name
        self.w = nn.Parameter(torch.ones(config.d_model))
        self.b = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model]
        if at.watches(f"{self.name}.hook_scale"):
            x = x - x.mean(-1, keepdim=True)
            scale = (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
            scale = at(f"{self.name}.hook_scale", scale)  # [batch, pos, 1]
            normalized = x / scale * self.w + self.b
        else:
            normalized = F.layer_norm(x, self.w.shape, self.w, self.b, self.eps)
        return at(f"{self.name}.hook_normalized", normalized)  # [batch, pos, d_model]


class Attention(nn.Module):
    """The heads of a layer. A head's QK circuit decides where it reads, its OV circuit what it writes."""

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.name = name
        self.d_head = config.d_head
        n_heads, d_model, d_head = config.n_heads, config.d_model, config.d_head

        def projection() -> nn.Parameter:
            # Shaped [n_heads, d_model, d_head] but laid out in memory as [d_model, n_heads, d_head], so that
            # a projection for all heads is one product without a copy.
            return nn.Parameter(torch.empty(d_model, n_heads, d_head).transpose(0, 1))

        self.W_Q = projection()
        self.W_K = projection()
        self.W_V = projection()
        self.b_Q = nn.Parameter(torch.zeros(n_heads, d_head))
        self.b_K = nn.Parameter(torch.zeros(n_heads, d_head))
        self.b_V = nn.Parameter(torch.zeros(n_heads, d_head))
        self.W_O = nn.Parameter(torch.empty(n_heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model], normalised
        def heads(W: Tensor, b: Tensor) -> Tensor:  # [batch, pos, n_heads, d_head]
            side_by_side = W.transpose(0, 1).flatten(1)  # [d_model, n_heads * d_head]
            return linear(x, side_by_side, b.flatten()).unflatten(-1, b.shape)

        q = at(f"{self.name}.hook_q", heads(self.W_Q, self.b_Q))
        k = at(f"{self.name}.hook_k", heads(self.W_K, self.b_K))
        v = at(f"{self.name}.hook_v", heads(self.W_V, self.b_V))

        # q . k / sqrt(d_head), and -inf in the future. An einsum would say it more plainly, with other bits.
        Q = q.transpose(1, 2).flatten(0, 1)  # [batch * n_heads, dest, d_head]
        K = k.transpose(1, 2).flatten(0, 1)  # [batch * n_heads, src, d_head]
        future = q.new_full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        scores = torch.baddbmm(future, Q, K.transpose(1, 2), alpha=self.d_head**-0.5)
        scores = scores.unflatten(0, (len(x), -1))  # [batch, n_heads, dest, src]
        scores = at(f"{self.name}.hook_attn_scores", scores)

        pattern = at(f"{self.name}.hook_pattern", scores.softmax(-1))  # [batch, n_heads, dest, src]
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        z = at(f"{self.name}.hook_z", z)  # [batch, pos, n_heads, d_head]

        if at.watches(f"{self.name}.hook_result"):
            result = torch.einsum("bqhe,hed->bqhd", z, self.W_O)
            result = at(f"{self.name}.hook_result", result)  # [batch, pos, n_heads, d_model]
            return result.sum(2) + self.b_O  # [batch, pos, d_model]
        # The same in one product, without an output for each head.
        W_O = self.W_O.flatten(0, 1)  # [n_heads * d_head, d_model]
        return linear(z.flatten(2), W_O, self.b_O)  # [batch, pos, d_model]


class MLP(nn.Module):
    """act_fn(x W_in + b_in) W_out + b_out, at each position by itself (A.1)."""

    def __init__(self, config: Config, name: str):
        super().__init__()
        self.name = name
        self.act = ACTIVATIONS[config.act_fn]
        self.W_in = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.b_in = nn.Parameter(torch.zeros(config.d_mlp))
        self.W_out = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        self.b_out = nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, at: Hooks) -> Tensor:  # [batch, pos, d_model], normalised
        pre = at(f"{self.name}.hook_pre", linear(x, self.W_in, self.b_in))  # [batch, pos, d_mlp]
        post = at(f"{self.name}.hook_post", self.act(pre))  # [batch, pos, d_mlp]
        return linear(post, self.W_out, self.b_out)  # [batch, pos, d_model]


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
        attn_out = self.attn(self.ln1(resid, at), at)
        resid = resid + at(f"{self.name}.hook_attn_out", attn_out)

        resid = at(f"{self.name}.hook_resid_mid", resid)
        mlp_out = self.mlp(self.ln2(resid, at), at)
        resid = resid + at(f"{self.name}.hook_mlp_out", mlp_out)
        return at(f"{self.name}.hook_resid_post", resid)


class Transformer(nn.Module):
    """Maps vectors to the next one at each position. Weight matrices start as N(0, initializer_range), drawn
    from `generator` (torch's default one if None), biases as 0. `hook_names`: all hook points, in order.
    """

    hook_names: list[str] = []
    sha256: str | None = None  # of the file that `load_weights` read

    def __init__(self, config: Config = Config(), generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embed = nn.ParameterDict({"W_E": torch.empty(config.d_vocab, config.d_model)})
        self.pos_embed = nn.ParameterDict({"W_pos": torch.empty(config.n_ctx, config.d_model)})
        self.blocks = nn.ModuleList(Block(config, f"blocks.{l}") for l in range(config.n_layers))
        self.ln_final = LayerNorm(config, "ln_final")
        self.unembed = nn.ParameterDict()
        self.unembed["W_U"] = torch.empty(config.d_model, config.d_vocab)
        self.unembed["b_U"] = torch.zeros(config.d_vocab)

        for name, parameter in self.named_parameters():
            if name.split(".")[-1].startswith("W_"):
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)

        # A pass meets every hook point: that is the list of them.
        cache: dict[str, Tensor] = {}
        with torch.no_grad():
            self(torch.zeros(1, 1, config.d_vocab), cache=cache)
        self.hook_names = list(cache)

    def check(self, name: str, value: Tensor, width: str):
        """ValueError unless `value` is [batch, pos, config.width], in the weights' dtype and device."""
        size = getattr(self.config, width)
        n_ctx = self.config.n_ctx
        if value.dim() != 3 or value.shape[-1] != size or not 1 <= value.shape[1] <= n_ctx:
            wanted = f"[batch, pos, {width} = {size}] with 1 to n_ctx = {n_ctx} positions"
            raise ValueError(f"{name} must be {wanted}, not {list(value.shape)}")

        weight = self.embed.W_E
        if value.dtype != weight.dtype or value.device != weight.device:
            wanted = f"{weight.dtype} on {weight.device}, as the weights are"
            raise ValueError(f"{name} must be {wanted}, not {value.dtype} on {value.device}")

    def forward(
        self,
        x: Tensor,
        hooks: dict[str, Callable] | None = None,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict a_1 .. a_n from x = a_0 .. a_{n-1}: [batch, pos, d_vocab] -> [batch, pos, d_vocab].

        hooks: {hook name: fn}; fn(activation) returns what takes its place, a tensor like it. Two hook dicts
        become one with interventions.join; `|` would drop one of two hooks at the same point.
        cache: a dict that is filled with every activation under its hook name, after the hooks have had their
        turn. With it the same numbers come out to rounding (1e-6), see LayerNorm.

        Raises ValueError for an x of another shape, dtype or device or of more than n_ctx positions, and for
        a hook that returns another shape, dtype or device; KeyError for an unknown hook name.
        """
        self.check("x", x, "d_vocab")
        at = Hooks(hooks, cache, self.hook_names)
        embed = at("hook_embed", x @ self.embed.W_E)  # [batch, pos, d_model]
        pos_embed = self.pos_embed.W_pos[: x.shape[1]].expand_as(embed)
        pos_embed = at("hook_pos_embed", pos_embed)  # [batch, pos, d_model]
        return self.run_from(0, embed + pos_embed, hooks, cache)

    def run_from(
        self,
        layer: int,
        resid: Tensor,
        hooks: dict[str, Callable] | None = None,
        cache: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The rest of the forward pass, from blocks.{layer}.hook_resid_pre on: resid [batch, pos, d_model] ->
        [batch, pos, d_vocab]; with layer = n_layers only ln_final and the unembedding, the logit lens. Hooks
        before `layer` do nothing. ValueError for a layer outside 0 .. n_layers, else as `forward`.
        """
        self.check("resid", resid, "d_model")
        n_layers = self.config.n_layers
        if not 0 <= layer <= n_layers:
            raise ValueError(f"layer must be between 0 and n_layers = {n_layers}, not {layer}")
        at = Hooks(hooks, cache, self.hook_names)
        for block in self.blocks[layer:]:
            resid = block(resid, at)
        normalized = self.ln_final(resid, at)
        return linear(normalized, self.unembed.W_U, self.unembed.b_U)  # [batch, pos, d_vocab]


# ---------- Folding ----------
@torch.no_grad()
def fold(transformer: Transformer) -> Transformer:
    """A new model with the same outputs, in which every circuit can be read off the weights (section 4.1).

    LayerNorm weights and biases go into the matrices that read the normalised vector and their biases, value
    biases then into b_O. A normalised vector has mean 0, so the mean of a reading matrix over d_model has no
    effect and is removed; a LayerNorm ignores the mean of what it reads, so that of what is written to the
    residual stream is removed as well. Leaves ln.w = 1, ln.b = 0 and b_V = 0. TransformerLens' center_unembed
    is left out: it changes every output by a constant, which only a softmax would ignore.
    """
    model = copy.deepcopy(transformer)

    def fold_into(ln: LayerNorm, W: Tensor, b: Tensor):  # W [..., d_model, out], b [..., out]
        b += ln.b @ W
        W *= ln.w[:, None]
        W -= W.mean(-2, keepdim=True)

    for block in model.blocks:
        attn = block.attn
        fold_into(block.ln1, attn.W_Q, attn.b_Q)
        fold_into(block.ln1, attn.W_K, attn.b_K)
        fold_into(block.ln1, attn.W_V, attn.b_V)
        fold_into(block.ln2, block.mlp.W_in, block.mlp.b_in)
        # A row of attention sums to 1, so a head adds b_V W_O to every position whatever it attends to.
        attn.b_O += torch.einsum("he,hed->d", attn.b_V, attn.W_O)
        attn.b_V.zero_()
    fold_into(model.ln_final, model.unembed.W_U, model.unembed.b_U)

    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.w.fill_(1)
            module.b.zero_()

    writers = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")
    for name, parameter in model.named_parameters():
        if name.endswith(writers):
            parameter -= parameter.mean(-1, keepdim=True)
    return model


# ---------- Circuits ----------
# Products of weights, best of a folded model. They act from the right, x @ W_V @ W_O.


def ov_circuit(model: Transformer, layer: int) -> Tensor:
    """W_V W_O of each head, [n_heads, d_model, d_model]: a source vector x adds x @ OV to the destination."""
    attn = model.blocks[layer].attn
    return attn.W_V @ attn.W_O


def qk_circuit(model: Transformer, layer: int) -> Tensor:
    """W_Q W_K^T of each head, [n_heads, d_model, d_model]: without biases the score is x_destination @ QK
    @ x_source / sqrt(d_head) (section 4.6)."""
    attn = model.blocks[layer].attn
    return attn.W_Q @ attn.W_K.transpose(1, 2)


def data_basis(model: Transformer, layer: int) -> Tensor:
    """Where a layer finds the data, [d_vocab, d_model]: a data vector y stands in the stream as y @ basis.
    Layer 0 reads what comes in, W_E; later layers what layer 0 wrote, the pseudoinverse of W_U."""
    return model.embed.W_E if layer == 0 else torch.linalg.pinv(model.unembed.W_U)


def data_ov_circuit(model: Transformer, layer: int) -> Tensor:
    """OV between data coordinates, [n_heads, d_vocab, d_vocab], read (rows) through `data_basis` and written
    (columns) to W_U: -I is a head that takes off what it attends to."""
    return data_basis(model, layer) @ ov_circuit(model, layer) @ model.unembed.W_U


def data_qk_circuit(model: Transformer, layer: int) -> Tensor:
    """QK between data coordinates, [n_heads, d_vocab (destination), d_vocab (source)]: with I a head attends
    to vectors that are like the destination's."""
    basis = data_basis(model, layer)
    return basis @ qk_circuit(model, layer) @ basis.T


# ---------- Settings and files ----------
def check_settings(settings):
    """ValueError unless every value of a settings dataclass is in its range, see `setting`."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        least = f.metadata["least"]
        choices = f.metadata["choices"]
        if f.type is int:
            fits = type(value) is int and least <= value < 2**62
            wanted = f"a whole number of at least {least}"
        elif f.type is float:
            fits = type(value) in (int, float) and least <= value < math.inf
            wanted = f"a finite number of at least {least}"
        else:
            fits = not choices or value in choices
            wanted = f"one of {', '.join(choices)}"
        if not fits:
            raise ValueError(f"{f.name} must be {wanted}, not {value!r}")


def save(value, path: str):
    """Write bytes, text, a .json or what torch.save takes (.pt) to `path`, whole or not at all, whoever else
    writes it. OSError, with the path, if it cannot be written; ValueError for a .json with a NaN in it.
    """
    if path.endswith(".pt"):
        buffer = io.BytesIO()  # in memory: torch's own writer does not name the file on a full disk
        torch.save(value, buffer)
        value = buffer.getvalue()
    elif path.endswith(".json"):
        value = json.dumps(value, indent=1, allow_nan=False) + "\n"

    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(value.encode() if isinstance(value, str) else value)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def load_file(path: str, what: str) -> tuple[dict, str]:
    """The dict in a .json file or one of torch.save, tensors on the CPU, and the sha256 of the bytes read;
    `what` names the file in messages. FileNotFoundError if there is none, ValueError if it is damaged.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {what} at {path}")
    try:
        with open(path, "rb") as f:
            content = f.read()
        if str(path).endswith(".json"):
            value = json.loads(content)
        else:
            value = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # torch.load has no common type for what a damaged file makes it raise
        message = (
            f"{path} is damaged or is no {what} as train.py writes it ({type(error).__name__})"
        )
        raise ValueError(message) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no {what}: it holds a {type(value).__name__}, not a dict")
    return value, hashlib.sha256(content).hexdigest()


def settings_beside(path: str) -> dict:
    """What config.json says, beside a weights file or, of one in steps/, in the folder above; {} without."""
    folder = Path(path).absolute().parent
    config = folder / "config.json"
    if not config.exists() and folder.name == "steps":
        config = folder.parent / "config.json"
    if not config.exists():
        return {}
    settings, _ = load_file(str(config), "config")
    return settings


def plain_names(state: dict) -> dict:
    """A state dict without the prefixes of torch.compile and DDP and the constants of TransformerLens 2.x.
    ValueError for a mask that lets a position see the future: the same names, but another function.
    """
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(str(name).startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    weights = {}
    for name, value in state.items():
        if str(name).endswith(".mask"):
            if not torch.equal(value.bool(), torch.ones_like(value).tril().bool()):
                raise ValueError(f"{name} is not causal: here every position sees the past alone")
        elif not str(name).endswith(".IGNORE"):
            weights[name] = value
    return weights


# Fields of TransformerLens' config under which the same names and shapes would compute something else.
TRANSFORMER_LENS = {
    "use_attn_scale": True,
    "attn_only": False,
    "attention_dir": "causal",
    "parallel_attn_mlp": False,
}


def load_weights(path: str) -> Transformer:
    """The model whose state dict train.py or TransformerLens wrote to `path`, built as its config.json says
    (defaults without). Raises FileNotFoundError if there is no such file; ValueError if it or config.json
    cannot be read or says what this model does not do, if names or shapes are not those of the config, or a
    value is not finite."""
    state, sha256 = load_file(path, "weights file")
    settings = settings_beside(path)
    for name, ours in TRANSFORMER_LENS.items():
        if settings.get(name, ours) != ours:
            raise ValueError(
                f"config.json says {name} {settings[name]!r}: here it is always {ours!r}"
            )
    config = Config(**{f.name: settings[f.name] for f in fields(Config) if f.name in settings})
    check_settings(config)

    model = Transformer(config)
    try:
        model.load_state_dict(plain_names(state))
    except (RuntimeError, TypeError, AttributeError) as error:
        trouble = textwrap.shorten(str(error).split("\n\t", 1)[-1], 150)
        raise ValueError(
            f"{path} is of another model than its config.json says: {trouble}"
        ) from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{path} holds values in {name} that are not finite")
    model.sha256 = sha256
    return model
