"""The task: affine recurrences a_k = c a_{k-1} + d in R^40 (sections 2.2 and 3.1 of the paper), the error
measured on them, what solves them exactly, and sequences that are built to tell one solution from another.

    import torch, data
    s = data.sample(batch=16, length=14, generator=torch.Generator().manual_seed(0))
    inputs, targets = s.a[:, :-1], s.a[:, 1:]          # both [16, 14, 40]

The model sees a_0 .. a_{n-1} and must predict a_1 .. a_n; nobody tells it c or d. Two differences of known
vectors determine c, so the first vector that can be predicted is a_3, from a_0, a_1 and a_2.

The paper's future work, other recurrences, are other tasks: data.sample(16, 14, generator, task="linear-2").
A task is an entry of TASKS: how to draw its sequences, from where on they are determined, and what solves
them. One of your own needs nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

D_VOCAB = 40  # dim(a_n): the paper keeps the name from token models, although there is no vocabulary
N_CTX = 32  # positions the model has embeddings for
MIN_LENGTH, MAX_LENGTH = 3, 14  # inputs in a training sequence, both ends included
FIRST_POSITION = 2  # output position 2 predicts a_3, the first vector that its inputs determine


class Sample(NamedTuple):
    """A batch of sequences, scaled so that the largest input norm lies in [1, 2]."""

    a: Tensor  # [batch, length + 1, d_vocab]; inputs are a[:, :-1], targets a[:, 1:]
    c: Tensor  # [batch] in the affine task, in which a[:, k] = c a[:, k - 1] + d; else [batch, scalars]
    d: Tensor  # [batch, d_vocab], scaled like a


# ------------------------------------------------------------------------------------------------------------
# Drawing sequences


def uniform(generator: torch.Generator, low: float, high: float, *shape: int, dtype=torch.float32) -> Tensor:
    """Numbers from U[low, high], on the generator's device."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device, dtype=dtype)


def normalise(a: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences a [batch, length + 1, d_vocab] divided by m / r, with m the largest norm among a_0 ..
    a_{length-1}, and the factors r / m, [batch] (section 3.1)."""
    scale = r / a[:, :-1].norm(dim=-1).amax(1)  # [batch]
    return a * scale[:, None, None], scale


def draw_affine(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple) -> Sample:
    """a_k = c a_{k-1} + d (section 3.1): c ~ U[c_range], a_0 and d ~ U[-2, 2]^d_vocab."""
    c = draw(*c_range, batch)
    a_0 = draw(-2, 2, batch, d_vocab)
    d = draw(-2, 2, batch, d_vocab)
    r = draw(1, 2, batch)

    # Solved in closed form, without a loop over k: a_k = c^k a_0 + (1 + c + ... + c^{k-1}) d.
    powers = c[:, None] ** torch.arange(length + 1, device=c.device)  # [batch, length + 1]
    sums = powers.cumsum(1) - powers
    a = powers[..., None] * a_0[:, None] + sums[..., None] * d[:, None]  # [batch, length + 1, d_vocab]
    a, scale = normalise(a, r)
    return Sample(a, c, d * scale[:, None])


def draw_linear(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple, order: int) -> Sample:
    """a_n = c_1 a_{n-1} + ... + c_K a_{n-K} + d, with a_0 .. a_{K-1} and d ~ U[-2, 2]^d_vocab; c [batch, K].

    The roots of z^K - c_1 z^{K-1} - ... - c_K are real, from U[c_range], so that K = 1 is the paper's task;
    but each two of them are, in half of the cases, a pair x e^{+-i angle} with x from the same range.
    """
    d, a = draw(-2, 2, batch, d_vocab), list(draw(-2, 2, order, batch, d_vocab))
    polynomial = torch.ones_like(d[:, :1])  # its coefficients, the highest power first
    for _ in range(order // 2):
        x, y = draw(*c_range, 2, batch, 1)
        angle, is_complex = draw(0, math.pi, batch, 1), draw(0, 1, batch, 1) < 0.5
        total = torch.where(is_complex, 2 * x * angle.cos(), x + y)  # of the two roots
        product = torch.where(is_complex, x * x, x * y)
        by_one, by_two = F.pad(polynomial, (1, 1)), F.pad(polynomial, (2, 0))
        polynomial = F.pad(polynomial, (0, 2)) - total * by_one + product * by_two
    if order % 2:
        root = draw(*c_range, batch, 1)
        polynomial = F.pad(polynomial, (0, 1)) - root * F.pad(polynomial, (1, 0))
    c = -polynomial[:, 1:]  # [batch, order]
    while len(a) <= length:
        a.append(sum(c[:, i, None] * a[-1 - i] for i in range(order)) + d)
    a, scale = normalise(torch.stack(a, 1), draw(1, 2, batch))
    return Sample(a, c, d * scale[:, None])


def draw_polynomial(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple,
                    order: int) -> Sample:
    """a_n = v_0 + v_1 n + ... + v_K n^K, v_i ~ U[-2, 2]^d_vocab; c_range has no part in it. It is a
    recurrence of draw_linear, with d = K! v_K and the c, [batch, K], that make every root 1."""
    v = draw(-2, 2, order + 1, batch, 1, d_vocab)
    n = torch.arange(length + 1, device=v.device, dtype=v.dtype)[:, None]
    a, scale = normalise(sum(v[i] * n**i for i in range(order + 1)), draw(1, 2, batch))
    c = torch.stack([torch.full_like(scale, (-1) ** i * math.comb(order, i + 1)) for i in range(order)], 1)
    return Sample(a, c, math.factorial(order) * v[-1, :, 0] * scale[:, None])


def draw_quadratic(draw: Callable, batch: int, length: int, d_vocab: int, c_range: tuple) -> Sample:
    """a_n = b a_{n-1}^2 + c a_{n-1} + d in each dimension, bounded; c ~ U[c_range]. Sample.c has b and c.

    With x = b a + c / 2 it reads x_n = x_{n-1}^2 + k, which stays within [-x*, x*], x* = (1 + sqrt(1 - 4 k))
    / 2, for k from -2 to 1/4: fixed points, cycles and chaos. So k and x_0 are drawn, from a little less than
    that because of rounding, and d follows. b is 1 or -1 at first: how large it is only sets the unit of a.
    """
    c, b = draw(*c_range, batch, 1), torch.where(draw(0, 1, batch, 1) < 0.5, -1.0, 1.0)
    k, x = draw(-1.9, 0.25, batch, d_vocab), draw(-0.95, 0.95, batch, d_vocab)
    d = (k + c**2 / 4 - c / 2) / b
    a = [(x * (1 + (1 - 4 * k).sqrt()) / 2 - c / 2) / b]
    for _ in range(length):
        a.append((b * a[-1] + c) * a[-1] + d)
    a, scale = normalise(torch.stack(a, 1), draw(1, 2, batch))
    return Sample(a, torch.cat([b / scale[:, None], c], 1), d * scale[:, None])


def sample(batch: int, length: int, generator: torch.Generator, d_vocab: int = D_VOCAB,
           c_range: tuple[float, float] = (-2.0, 2.0), task: str = "affine",
           dtype: torch.dtype = torch.float32) -> Sample:
    """Draw `batch` sequences with `length` inputs each, on the generator's device (section 3.1).

    c ~ U[c_range] is one scalar per sequence; a_0 and d ~ U[-2, 2]^d_vocab. All vectors and d are then
    divided by m / r, where m is the largest norm among the inputs a_0 .. a_{length-1} and r ~ U[1, 2]. Other
    tasks: see their functions draw_*.

    Raises ValueError for a task that there is not, for a length that leaves nothing to predict (3 vectors are
    needed in the affine task) or is above n_ctx (32), and unless batch >= 1 and d_vocab >= 1.
    """
    kind = find_task(task)
    if not kind.first < length <= N_CTX:
        needed = f"{kind.first + 1}, which determine the next vector, and n_ctx = {N_CTX}"
        raise ValueError(f"the length of a sequence of {task} must be between {needed}, not {length}")
    if batch < 1 or d_vocab < 1:
        raise ValueError(f"batch and d_vocab must be at least 1, not {batch} and {d_vocab}")
    return kind.draw(partial(uniform, generator, dtype=dtype), batch, length, d_vocab, c_range)


def interleaved(length: int, c: Tensor, generator: torch.Generator,
                d_vocab: int = D_VOCAB) -> dict[str, Tensor]:
    """Sequences that tell a rule of two steps from a rule of one, {kind: [batch, length + 1, d_vocab]}, c
    [batch].

    "recurrence" is affine: a_n = a* + c^n u, with a* and u ~ U[-2, 2]^d_vocab. "interleaved" has another u in
    its odd vectors: no affine recurrence, but a_{n+1} = a* + c^2 (a_{n-1} - a*) still holds. "two fixed
    points" has another a* in its odd vectors, "two growths" another c, that of another sequence: no single a*
    and c^2 fit these two. Normalised as in section 3.1.
    """
    u, other_u, fixed, other_fixed = (uniform(generator, -2, 2, len(c), 1, d_vocab) for _ in range(4))
    n = torch.arange(length + 1, device=c.device)
    powers, odd = (c[:, None] ** n)[..., None], (n % 2 == 1)[:, None]
    kinds = {"recurrence": fixed + powers * u, "interleaved": fixed + powers * torch.where(odd, other_u, u),
             "two fixed points": torch.where(odd, other_fixed, fixed) + powers * u,
             "two growths": fixed + torch.where(odd, powers.flip(0), powers) * u}
    r = uniform(generator, 1, 2, len(c))
    return {kind: normalise(a, r)[0] for kind, a in kinds.items()}


# ------------------------------------------------------------------------------------------------------------
# Solving them


def solve_recurrence(x: Tensor) -> Tensor:
    """The exact answer from three known vectors: x [batch, pos, d_vocab] -> the vector after x_2, x_3, ..,
    [batch, pos - 2, d_vocab].

    Least squares for c and d in a_n = c a_{n-1} + d and a_{n-1} = c a_{n-2} + d: c is the ratio of the two
    steps, d the mean of what the two equations leave. A sequence that stands still, of which any c is true,
    goes on standing still.
    """
    first, second, third = x[:, :-2], x[:, 1:-1], x[:, 2:]
    c = ratio(second - first, third - second)
    d = (third - c * second + second - c * first) / 2
    return c * third + d


def solve_two_steps(x: Tensor) -> Tensor:
    """The two-step rule a_{n+1} = c^2 a_{n-1} + (1 - c^2) a*, from five known vectors: x [batch, pos,
    d_vocab] -> the vector after x_4, x_5, .., [batch, pos - 4, d_vocab].

    c^2 is the ratio of the last two steps of a_n, a_{n-2}, a_{n-4}, and (1 - c^2) a* = a_n - c^2 a_{n-2}.
    """
    first, second, before, last = x[:, :-4], x[:, 2:-2], x[:, 3:-1], x[:, 4:]
    squared = ratio(second - first, last - second)
    return squared * before + last - squared * second


def ratio(step: Tensor, next_step: Tensor) -> Tensor:
    """The factor from one step to the next (least squares), [..., d_vocab] -> [..., 1]; 0 without a step."""
    squared = (step**2).sum(-1, keepdim=True)
    return torch.where(squared > 0, (step * next_step).sum(-1, keepdim=True) / squared, 0.0)


def two_step_rule(x: Tensor) -> Tensor:
    """What the model approximates where |c| >= 0.9: a_{n+1} = c^2 a_{n-1} + (1 - c^2) a*, from vectors x
    [batch, pos, d_vocab] -> the vector after x_2, x_3, .., [batch, pos - 2, d_vocab].

    c^2 is the ratio of two squared steps, which does not know the sign of c, and (1 - c^2) a* = a_{s+2} - c^2
    a_s. All three are read where the sequence is nearest to a*: s = 0 if it grows, n - 2 if it decays.
    """
    steps = x.diff(dim=1).pow(2).sum(-1, keepdim=True)
    squares = torch.where(steps[:, :-1] > 0, steps[:, 1:] / steps[:, :-1], 0.0)  # c^2 at n = 2, 3, ..
    grows = squares > 1
    c2 = torch.where(grows, squares[:, :1], squares)
    rest = torch.where(grows, x[:, 2:3] - c2 * x[:, :1], x[:, 2:] - c2 * x[:, :-2])
    return c2 * x[:, 1:-1] + rest


def solve_scalars(x: Tensor, features: Callable) -> Tensor:
    """The exact answer where a_{n+1} = sum_i c_i f_i(a_n, a_{n-1}, ..) + d with unknown scalars c_i and a
    vector d: x [batch, pos, d_vocab] -> the next vector at each position at which it is determined.

    features: x -> f [batch, .., i, d_vocab]. In the difference of two equations there is no d: its d_vocab
    rows give the c_i by least squares, the shortest ones if they leave a choice; the next difference then
    gives the next vector.
    """
    changes = features(x).diff(dim=1)
    known, now = changes[:, :-1], changes[:, 1:]  # [batch, .., i, d_vocab]
    begin = x.shape[1] - known.shape[1]
    steps = x.diff(dim=1)[:, begin - 1 :]
    rows = known.transpose(-1, -2).cpu()  # where least squares knows the driver for dependent columns
    c = torch.linalg.lstsq(rows, steps[..., None].cpu(), driver="gelsd").solution.to(x)  # [batch, .., i, 1]
    return x[:, begin:] + (c * now).sum(-2)


def solve_linear(x: Tensor, order: int) -> Tensor:
    """`solve_scalars` of draw_linear: the vector after x_{K+1}, .., [batch, pos - K - 1, d_vocab]."""
    lags = lambda x: torch.stack([x[:, order - 1 - i : x.shape[1] - i] for i in range(order)], 2)
    return solve_scalars(x, lags)


def solve_quadratic(x: Tensor) -> Tensor:
    """`solve_scalars` of draw_quadratic: the vector after x_2, x_3, .., [batch, pos - 2, d_vocab]."""
    return solve_scalars(x, lambda x: torch.stack([x**2, x], 2))


def solve_polynomial(x: Tensor, order: int) -> Tensor:
    """The exact answer for draw_polynomial, whose differences of order K + 1 are 0: the vector after x_K,
    x_{K+1}, .., [batch, pos - K, d_vocab]."""
    lags = range(order + 1)
    return sum((-1) ** i * math.comb(order + 1, i + 1) * x[:, order - i : x.shape[1] - i] for i in lags)


# ------------------------------------------------------------------------------------------------------------
# The tasks, and the error


@dataclass(frozen=True)
class Task:
    """A kind of sequence to learn. To add one, write functions like draw_quadratic, which may ignore c_range,
    and solve_quadratic, and enter them below."""

    first: int  # output positions from here on predict a vector that the inputs determine
    draw: Callable  # (draw, batch, length, d_vocab, c_range) -> Sample; draw(low, high, *shape) is uniform
    solve: Callable  # x [batch, pos, d_vocab] -> the vector after x_first, .., [batch, pos - first, d_vocab]
    rule: Callable | None = None  # what the model was found to approximate, like `solve`
    rotates: bool = True  # whether a @ Q is such a sequence if a is one, for every orthogonal Q
    linear: bool = False  # whether Sample.c holds c_1 .. c_K of a linear recurrence

    @property
    def lengths(self) -> range:
        """The numbers of inputs of training sequences."""
        return range(max(MIN_LENGTH, self.first + 1), MAX_LENGTH + 1)


def linear(K: int) -> Task:
    """linear-K: K unknown scalars take one equation in R^d_vocab between differences, of K + 2 vectors."""
    return Task(K + 1, partial(draw_linear, order=K), partial(solve_linear, order=K), linear=True)


def polynomial(K: int) -> Task:
    """polynomial-K: K + 1 vectors determine it."""
    return Task(K, partial(draw_polynomial, order=K), partial(solve_polynomial, order=K), linear=True)


TASKS = {"affine": Task(FIRST_POSITION, draw_affine, solve_recurrence, two_step_rule, linear=True),
         "quadratic": Task(2, draw_quadratic, solve_quadratic, rotates=False),
         "linear-K": linear, "polynomial-K": polynomial}  # a function of K for names such as linear-2


def find_task(name: str) -> Task:
    """The task of a name such as affine or linear-2. ValueError if there is none, or if its sequences would
    have to be longer than those of training to determine a vector."""
    family, _, order = str(name).rpartition("-")
    kind = TASKS.get(name)
    if order.isdecimal() and order == str(int(order)) != "0" and f"{family}-K" in TASKS:
        kind = TASKS[f"{family}-K"](int(order))
    if not isinstance(kind, Task):
        raise ValueError(f"task must be one of {', '.join(TASKS)}, with K of at least 1, not {name!r}")
    if not kind.lengths:
        why = f"the next vector takes {kind.first + 1} inputs to determine, and sequences have {MAX_LENGTH}"
        raise ValueError(f"task {name} is too long: {why}")
    return kind


def held_out(per_length: int, seed: int = 20_241_024, device: torch.device | str = "cpu",
             d_vocab: int = D_VOCAB, task: str = "affine") -> list[Sample]:
    """A fixed evaluation set from the training distribution: `per_length` sequences of each length, 3 .. 14
    in the affine task.

    It is drawn on the CPU whatever the device, so that every machine measures on the same sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = find_task(task).lengths
    samples = [sample(per_length, length, generator, d_vocab, task=task) for length in lengths]
    return [Sample(*(t.to(device) for t in s)) for s in samples]


def mse(prediction: Tensor, target: Tensor, first: int = FIRST_POSITION) -> Tensor:
    """Mean squared error over batch, dimensions and the predictable positions, from `first` on: in the affine
    task 2 .. n-1, those of a_3 .. a_n (3.2).

    Both [batch, pos, d_vocab] with pos > first. This is the training loss, and what "MSE" means in this
    project. Raises ValueError for other shapes.
    """
    if prediction.shape != target.shape or prediction.shape[-2] <= first:
        raise ValueError(f"prediction and target must have one shape with at least {first + 1} positions, "
                         f"not {tuple(prediction.shape)} and {tuple(target.shape)}")
    return F.mse_loss(prediction[..., first:, :], target[..., first:, :])


@torch.no_grad()
def evaluate(model, samples: list[Sample], first: int = FIRST_POSITION) -> float:
    """Held-out MSE: the mean over lengths of the MSE at each length, so that every length counts the same."""
    return torch.stack([mse(model(s.a[:, :-1]), s.a[:, 1:], first) for s in samples]).mean().item()
