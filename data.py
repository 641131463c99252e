"""The task: affine recurrences a_k = c a_{k-1} + d in R^40 (sections 2.2 and 3.1 of the paper), and the error measured on them.

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


def sample(
    batch: int, length: int, generator: torch.Generator, d_vocab: int = D_VOCAB, c_range: tuple[float, float] = (-2.0, 2.0)
) -> Sample:
    """Draw `batch` recurrences with `length` inputs each, on the generator's device (section 3.1).

    c ~ U[c_range] is one scalar per sequence; a_0 and d ~ U[-2, 2]^d_vocab. All vectors and d are then divided by
    m / r, where m is the largest norm among the inputs a_0 .. a_{length-1} and r ~ U[1, 2].

    Raises ValueError unless 1 <= length <= n_ctx (32), batch >= 1 and d_vocab >= 1.
    """
    if not 1 <= length <= N_CTX:
        raise ValueError(f"length must be between 1 and n_ctx = {N_CTX}, not {length}")
    if batch < 1 or d_vocab < 1:
        raise ValueError(f"batch and d_vocab must be at least 1, not {batch} and {d_vocab}")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)

    c = uniform(*c_range, batch)
    a_0 = uniform(-2, 2, batch, d_vocab)
    d = uniform(-2, 2, batch, d_vocab)
    r = uniform(1, 2, batch)

    # Solved in closed form, without a loop over k: a_k = c^k a_0 + (1 + c + ... + c^{k-1}) d.
    powers = c[:, None] ** torch.arange(length + 1, device=c.device)  # [batch, length + 1]
    sums = powers.cumsum(1) - powers
    a = powers[..., None] * a_0[:, None] + sums[..., None] * d[:, None]  # [batch, length + 1, d_vocab]

    scale = r / a[:, :-1].norm(dim=-1).amax(1)  # [batch]
    return Sample(a * scale[:, None, None], c, d * scale[:, None])


def held_out(per_length: int, seed: int = 20_241_024, device: torch.device | str = "cpu") -> list[Sample]:
    """A fixed evaluation set from the training distribution: `per_length` sequences of each length 3 .. 14, shortest first.

    It is drawn on the CPU whatever the device, so that every machine measures on the same sequences, and its seed
    lies outside those that training uses.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [sample(per_length, length, generator) for length in LENGTHS]
    return [Sample(*(t.to(device) for t in s)) for s in samples]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over batch, dimensions and the predictable positions 2 .. n-1, those of a_3 .. a_n (section 3.2).

    Both [batch, pos, d_vocab] with pos >= 3. This is the training loss, and what "MSE" means everywhere in this project.
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
