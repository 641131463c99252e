"""The task: affine recurrences a_k = c a_{k-1} + d in R^40 (sections 2.2 and 3.1 of the paper), the error
measured on them, and what solves them exactly.

    import torch, data
    s = data.sample(batch=16, length=14, generator=torch.Generator().manual_seed(0))
    s.inputs, s.targets                                # s.a[:, :-1] and s.a[:, 1:], both [16, 14, 40]

The model sees a_0 .. a_{n-1} and must predict a_1 .. a_n; nobody tells it c or d. Two differences of known
vectors determine c, so the first vector that can be predicted is a_3, from a_0, a_1 and a_2.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

D_VOCAB = 40  # dim(a_n): the paper keeps the name from token models, although there is no vocabulary
N_CTX = 32  # positions the model has embeddings for
MIN_LENGTH = 3  # inputs in a training sequence, both ends included
MAX_LENGTH = 14
FIRST_POSITION = 2  # output position 2 predicts a_3, the first vector that its inputs determine


class Sample(NamedTuple):
    """A batch of sequences, scaled so that the largest input norm lies in [1, 2]."""

    a: Tensor  # [batch, length + 1, d_vocab]
    c: Tensor  # [batch], with a[:, k] = c a[:, k - 1] + d
    d: Tensor  # [batch, d_vocab], scaled like a

    @property
    def inputs(self) -> Tensor:  # [batch, length, d_vocab]
        return self.a[:, :-1]

    @property
    def targets(self) -> Tensor:  # [batch, length, d_vocab]
        return self.a[:, 1:]


# ---------- Drawing sequences ----------
def uniform(
    generator: torch.Generator, low: float, high: float, *shape: int, dtype=torch.float32
) -> Tensor:
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


def solve_recurrence(x: Tensor) -> Tensor:
    """The exact answer from the last three vectors: x [batch, pos, d_vocab] -> the vector after x_2, x_3, ..,
    [batch, pos - 2, d_vocab].

    Least squares for c and d in a_n = c a_{n-1} + d and a_{n-1} = c a_{n-2} + d: c is the ratio of the two
    steps, d the mean of what the two equations leave. A sequence that stands still, of which any c is true,
    goes on standing still.
    """
    first = x[:, :-2]
    second = x[:, 1:-1]
    third = x[:, 2:]
    step = second - first
    next_step = third - second

    squared = (step**2).sum(-1, keepdim=True)
    product = (step * next_step).sum(-1, keepdim=True)
    c = torch.where(squared > 0, product / squared, 0.0)
    d = (third - c * second + second - c * first) / 2
    return c * third + d


class Task(NamedTuple):
    """A kind of sequence to learn: how it is drawn, from where on it is determined, and what solves it."""

    first: int  # output positions from here on predict a vector that the inputs determine
    draw: Callable  # (draw, batch, length, d_vocab, c_range) -> Sample; draw(low, high, *shape) is uniform
    solve: Callable  # x [batch, pos, d_vocab] -> the vector after x_first, .., [batch, pos - first, d_vocab]

    @property
    def lengths(self) -> range:
        """The numbers of inputs of training sequences."""
        return range(max(MIN_LENGTH, self.first + 1), MAX_LENGTH + 1)


# Beyond/recurrences.py adds others.
TASKS = {"affine": Task(FIRST_POSITION, draw_affine, solve_recurrence)}


def find_task(name: str) -> Task:
    """The entry of TASKS. ValueError if there is none."""
    if name not in TASKS:
        raise ValueError(
            f"task must be one of {', '.join(TASKS)}, not {name!r}; beyond.recurrences has others"
        )
    return TASKS[name]


def sample(
    batch: int,
    length: int,
    generator: torch.Generator,
    d_vocab: int = D_VOCAB,
    c_range: tuple[float, float] = (-2.0, 2.0),
    task: str = "affine",
    dtype: torch.dtype = torch.float32,
) -> Sample:
    """Draw `batch` sequences with `length` inputs each, on the generator's device (section 3.1).

    c ~ U[c_range] is one scalar per sequence; a_0 and d ~ U[-2, 2]^d_vocab. All vectors and d are then
    divided by m / r, where m is the largest norm among the inputs a_0 .. a_{length-1} and r ~ U[1, 2].

    Raises ValueError for a task that there is not, for a length that leaves nothing to predict (3 vectors are
    needed) or is above n_ctx (32), for a c with which sequences of that length leave the range of dtype, and
    unless batch >= 1 and d_vocab >= 1.
    """
    kind = find_task(task)
    needed = kind.first + 1  # vectors that determine the next one
    if not needed <= length <= N_CTX:
        raise ValueError(
            f"the length of {task} must be between {needed} and n_ctx = {N_CTX}, not {length}"
        )

    if min(batch, d_vocab) < 1:
        raise ValueError(f"batch and d_vocab must be at least 1, not {batch} and {d_vocab}")

    # The sum of the squares of a_length, about 1e5 c^(2 length), must not overflow.
    most = (torch.finfo(dtype).max / 1e6) ** (0.5 / length)
    if not all(abs(c) < most for c in c_range):
        raise ValueError(
            f"|c| must be below {most:.3g} with {length} inputs in {dtype}, not in {c_range}"
        )
    return kind.draw(partial(uniform, generator, dtype=dtype), batch, length, d_vocab, c_range)


# ---------- The evaluation set and the error ----------
def held_out(
    per_length: int,
    seed: int = 20_241_024,  # the day of the paper
    device: torch.device | str = "cpu",
    d_vocab: int = D_VOCAB,
    task: str = "affine",
) -> list[Sample]:
    """A fixed evaluation set from the training distribution: `per_length` sequences of each length, 3 .. 14.

    It is drawn on the CPU whatever the device, so that every machine measures on the same sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in find_task(task).lengths:
        drawn = sample(per_length, length, generator, d_vocab, task=task)
        samples.append(Sample(*(part.to(device) for part in drawn)))
    return samples


def mse(prediction: Tensor, target: Tensor, first: int = FIRST_POSITION) -> Tensor:
    """Mean squared error over batch, dimensions and the predictable positions, from `first` on: 2 .. n-1,
    those of a_3 .. a_n (3.2).

    Both [batch, pos, d_vocab] with pos > first. This is the training loss, and what "MSE" means in this
    project. Raises ValueError for other shapes.
    """
    if prediction.shape != target.shape or prediction.shape[-2] <= first:
        raise ValueError(
            f"prediction and target need one shape, > {first} positions, "
            f"not {prediction.shape} and {target.shape}"
        )
    return F.mse_loss(prediction[..., first:, :], target[..., first:, :])


def neighbours(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_{n+1}, a_n and a_{n-1} for n = 2 .., of sequences a: [batch, pos - 2, d_vocab] each."""
    return a[:, FIRST_POSITION + 1 :], a[:, FIRST_POSITION:-1], a[:, FIRST_POSITION - 1 : -2]


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """The MSE of each sequence, [batch, pos, d_vocab] -> [batch]."""
    return ((prediction - target)[:, FIRST_POSITION:] ** 2).mean((1, 2))


def explained(prediction: Tensor, target: Tensor) -> float:
    """1 - |prediction - target|^2 / |target|^2 over all elements; not finite for a target of zeros."""
    left = ((prediction - target) ** 2).sum().double()
    return 1 - (left / (target**2).sum()).item()


@torch.no_grad()
def evaluate(model, samples: list[Sample], first: int = FIRST_POSITION) -> float:
    """Held-out MSE: the mean over lengths of the MSE at each length, so that every length counts the same."""
    return torch.stack([mse(model(s.inputs), s.targets, first) for s in samples]).mean().item()
