"""The task: affine recurrences a_k = c a_{k-1} + d in R^40 (sections 2.2 and 3.1 of the paper), the error
measured on them, what solves them exactly, and sequences that are built to tell one solution from another.

    import torch, data
    s = data.sample(batch=16, length=14, generator=torch.Generator().manual_seed(0))
    inputs, targets = s.a[:, :-1], s.a[:, 1:]          # both [16, 14, 40]

The model sees a_0 .. a_{n-1} and must predict a_1 .. a_n; nobody tells it c or d. Two differences of known
vectors determine c, so the first vector that can be predicted is a_3, from a_0, a_1 and a_2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

D_VOCAB = 40  # dim(a_n): the paper keeps the name from token models, although there is no vocabulary
N_CTX = 32  # positions the model has embeddings for
MIN_LENGTH, MAX_LENGTH = 3, 14  # inputs in a training sequence, both ends included
LENGTHS = range(MIN_LENGTH, MAX_LENGTH + 1)
FIRST_POSITION = 2  # output position 2 predicts a_3, the first vector that its inputs determine


class Sample(NamedTuple):
    """A batch of sequences, scaled so that the largest input norm lies in [1, 2]."""

    a: Tensor  # [batch, length + 1, d_vocab]; inputs are a[:, :-1], targets a[:, 1:]
    c: Tensor  # [batch]
    d: Tensor  # [batch, d_vocab], scaled like a, so that a[:, k] = c a[:, k - 1] + d still holds


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Numbers from U[low, high], on the generator's device."""
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def normalise(a: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences a [batch, length + 1, d_vocab] divided by m / r, with m the largest norm among a_0 ..
    a_{length-1}, and the factors r / m, [batch] (section 3.1)."""
    scale = r / a[:, :-1].norm(dim=-1).amax(1)  # [batch]
    return a * scale[:, None, None], scale


def sample(
    batch: int,
    length: int,
    generator: torch.Generator,
    d_vocab: int = D_VOCAB,
    c_range: tuple[float, float] = (-2.0, 2.0),
) -> Sample:
    """Draw `batch` recurrences with `length` inputs each, on the generator's device (section 3.1).

    c ~ U[c_range] is one scalar per sequence; a_0 and d ~ U[-2, 2]^d_vocab. All vectors and d are then
    divided by m / r, where m is the largest norm among the inputs a_0 .. a_{length-1} and r ~ U[1, 2].

    Raises ValueError unless 1 <= length <= n_ctx (32), batch >= 1 and d_vocab >= 1.
    """
    if not 1 <= length <= N_CTX:
        raise ValueError(f"length must be between 1 and n_ctx = {N_CTX}, not {length}")
    if batch < 1 or d_vocab < 1:
        raise ValueError(f"batch and d_vocab must be at least 1, not {batch} and {d_vocab}")
    c = uniform(generator, *c_range, batch)
    a_0 = uniform(generator, -2, 2, batch, d_vocab)
    d = uniform(generator, -2, 2, batch, d_vocab)
    r = uniform(generator, 1, 2, batch)

    # Solved in closed form, without a loop over k: a_k = c^k a_0 + (1 + c + ... + c^{k-1}) d.
    powers = c[:, None] ** torch.arange(length + 1, device=c.device)  # [batch, length + 1]
    sums = powers.cumsum(1) - powers
    a = powers[..., None] * a_0[:, None] + sums[..., None] * d[:, None]  # [batch, length + 1, d_vocab]
    a, scale = normalise(a, r)
    return Sample(a, c, d * scale[:, None])


def interleaved(
    length: int, c: Tensor, generator: torch.Generator, d_vocab: int = D_VOCAB
) -> dict[str, Tensor]:
    """Sequences that tell a rule of two steps from a rule of one, {kind: [batch, length + 1, d_vocab]}, c
    [batch].

    "recurrence" is affine: a_n = a* + c^n u, with a* and u ~ U[-2, 2]^40. "interleaved" has another u in its
    odd vectors: no affine recurrence, but a_{n+1} = a* + c^2 (a_{n-1} - a*) still holds. "two fixed points"
    has another a* in its odd vectors instead, and "two growths" another c, that of another sequence: this
    holds for no single a* or c^2 then. Normalised as in section 3.1.
    """
    u, other_u, fixed, other_fixed = (uniform(generator, -2, 2, len(c), 1, d_vocab) for _ in range(4))
    n = torch.arange(length + 1, device=c.device)
    powers, odd = (c[:, None] ** n)[..., None], (n % 2 == 1)[:, None]
    kinds = {
        "recurrence": fixed + powers * u,
        "interleaved": fixed + powers * torch.where(odd, other_u, u),
        "two fixed points": torch.where(odd, other_fixed, fixed) + powers * u,
        "two growths": fixed + torch.where(odd, powers.flip(0), powers) * u,
    }
    r = uniform(generator, 1, 2, len(c))
    return {kind: normalise(a, r)[0] for kind, a in kinds.items()}


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


def held_out(
    per_length: int, seed: int = 20_241_024, device: torch.device | str = "cpu", d_vocab: int = D_VOCAB
) -> list[Sample]:
    """A fixed evaluation set from the training distribution: `per_length` sequences of each length 3 .. 14.

    It is drawn on the CPU whatever the device, so that every machine measures on the same sequences, and its
    seed lies outside those that training uses.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [sample(per_length, length, generator, d_vocab) for length in LENGTHS]
    return [Sample(*(t.to(device) for t in s)) for s in samples]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over batch, dimensions and the predictable positions 2 .. n-1, those of a_3 .. a_n
    (3.2).

    Both [batch, pos, d_vocab] with pos >= 3. This is the training loss, and what "MSE" means in this project.
    """
    if prediction.shape != target.shape or prediction.shape[-2] <= FIRST_POSITION:
        raise ValueError(
            f"prediction and target must have one shape with at least {FIRST_POSITION + 1} positions, "
            f"not {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    return F.mse_loss(prediction[..., FIRST_POSITION:, :], target[..., FIRST_POSITION:, :])


@torch.no_grad()
def evaluate(model, samples: list[Sample]) -> float:
    """Held-out MSE: the mean over lengths of the MSE at each length, so that every length counts the same."""
    return torch.stack([mse(model(s.a[:, :-1]), s.a[:, 1:]) for s in samples]).mean().item()
