"""How samples lie to each other, student against teacher: the algebra of relation knowledge.

Student and teacher may be of any width. Each loss is a mean, over pairs or what stands for them, so that its size, between 0 and about 1, and what
a weight means do not depend on the number of samples. Gradients are finite also where samples are equal to each other, or far from the origin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss, pad, pdist

#: added to the squared length of a vector, as a share of the largest: without it, vectors near 0 would have gradients without bound
SOFT = 1e-8
#: added to what a logarithm is taken of
LEAST = 1e-6
#: of the Gaussian kernel of `correlation`
GAMMA = 0.4
#: frames that a frame is compared with, to either side
BAND = 100
#: samples from which on a class is compared
SEEN = 2


def directions(vectors: Tensor) -> Tensor:
    """The vectors [..., vectors, width], of length 1; those of length 0 stay 0."""
    squares = vectors.square().sum(-1, keepdim=True)
    least = SOFT * squares.detach().amax(-2, keepdim=True) + LEAST**4
    return vectors * (squares + least).rsqrt()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving (Tung and Mori 2019, arXiv 1907.09682): each sample's inner products with all, as a vector of length 1.

    The squared error of that vector, a mean over samples. Published is a mean over pairs, with weight 3000: that is 3000 / samples here.
    """
    mine, theirs = (directions(vectors @ vectors.T) for vectors in (student, teacher))
    return (mine - theirs).square().sum(1).mean()


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances between samples, in units of the mean one (RKD-D, Park et al. 2019, arXiv 1904.05068).

    The Huber loss, a mean over pairs. Public weights are 1 and 25; they mean nearly the same here, where no sample is paired with itself.
    """
    return huber_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(vectors: Tensor) -> Tensor:
    apart = pdist(
        vectors
    )  # of differences, not of squares less products: exact far from the origin; its gradient at 0 is 0
    mean = apart.sum() / (apart > 0).sum().clamp_min(1)
    return apart / torch.where(mean > 0, mean, 1.0)


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Angles at each sample between any two others (RKD-A, Park et al. 2019, arXiv 1904.05068).

    The Huber loss of their cosines, a mean over triplets; a leg between two equal samples is at right angles to all others. Public weights are 2
    and 50; they mean nearly the same here, where no triplet has a sample twice. Takes memory for the cube of the samples.
    """
    samples = len(student)
    same = torch.eye(samples, dtype=torch.bool, device=student.device)  # legs to the corner itself are 0 on both sides
    error = huber_loss(_angles(student), _angles(teacher), reduction="none").masked_fill(same, 0.0)
    return error.sum() / max(samples * (samples - 1) * (samples - 2), 1)


def _angles(vectors: Tensor) -> Tensor:
    legs = directions(vectors[None] - vectors[:, None])
    return legs @ legs.mT


def probability(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic transfer (PKT, Passalis and Tefas 2018, arXiv 1803.10837): each sample's cosines with the others as a distribution.

    The KL divergence from the teacher's, nat, a mean over samples. Public code takes a mean over pairs, with weight 30,000 (and
    pairs a sample with itself): that is about 30,000 / samples here.
    """
    mine, theirs = (_nearness(vectors) for vectors in (student, teacher))
    return (theirs * (theirs.log() - mine.log())).sum(1).mean()


def _nearness(vectors: Tensor) -> Tensor:
    near = (_cosines(vectors) + 1) / 2 + LEAST
    return near / near.sum(1, keepdim=True)


def correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Correlation congruence (Peng et al. 2019, arXiv 1904.01802): a Gaussian kernel of directions, by its Taylor series of order 2.

    The squared error, a mean over pairs. Public code has the root of the sum over pairs, divided by their number, with weight 0.003; no weight
    stands for it here, and the root has no gradient where the two agree.
    """
    return mse_loss(_kernel(_cosines(student)), _kernel(_cosines(teacher)))


def _kernel(cosines: Tensor) -> Tensor:
    """exp(-γ‖a-b‖²) of a and b of length 1, which is exp(-2γ) exp(2γ a·b), with the latter to the second order."""
    steep = 2 * GAMMA * cosines
    return math.exp(-2 * GAMMA) * (1 + steep + steep.square() / 2)


def _cosines(vectors: Tensor) -> Tensor:
    """[samples, samples - 1], of each sample with the others."""
    along = directions(vectors)
    others = ~torch.eye(len(along), dtype=torch.bool, device=along.device)
    return (along @ along.T)[others].view(len(along), len(along) - 1)


def classes(student: Tensor, teacher: Tensor, unit: Tensor) -> Tensor:
    """A graph of confusions: for each unit, the mean distribution of its samples, if there are at least `SEEN`. The form is our own.

    The KL divergence from the teacher's, nat, a mean over these units.

    Args:
        student: float [samples, units], of the student, each adding up to 1.
        teacher: float [samples, units], of the teacher.
        unit: int64 [samples], the unit that the teacher says.
    """
    which, number, counts = unit.unique(return_inverse=True, return_counts=True)
    often = counts >= SEEN
    means = [
        rows.new_zeros(len(which), rows.shape[1]).index_add(0, number, rows)[often] / counts[often, None]
        for rows in (student, teacher)
    ]
    mine, theirs = (mean + LEAST for mean in means)
    return (theirs * (theirs.log() - mine.log())).sum() / often.sum().clamp_min(1)


def gram(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Cosines between the frames of an utterance that are at most `BAND` apart, after an idea of STaR (arXiv 2312.09040).

    The squared error, a weighted mean over pairs; the weight of a pair is the product of those of its frames. Where all of them add up to less
    than 1, the mean is smaller by that factor: silence teaches little. The form is our own.

    Args:
        student: float [batch, frames, width].
        teacher: float [batch, frames, width of the teacher].
        weights: float [batch, frames], 0 to 1; 0 for padding.

    Returns:
        float [batch].
    """
    size = min(BAND, student.shape[1])
    mine, theirs = (_banded(directions(vectors), size) for vectors in (student, teacher))
    both = _banded(weights[..., None], size)
    here = torch.arange(size, device=student.device)
    ahead = torch.arange(2 * size, device=student.device)[None] - here[:, None]
    both = torch.where((ahead > 0) & (ahead <= BAND), both, 0.0)
    error = (both * (mine - theirs).square()).sum((1, 2, 3))
    return error / both.sum((1, 2, 3)).clamp_min(1.0)


def _banded(rows: Tensor, size: int) -> Tensor:
    """Products of rows [batch, frames, width] in blocks: [batch, blocks, size, 2 × size], each block's with itself and the next."""
    blocks = pad(rows, (0, 0, 0, -rows.shape[1] % size + size)).unflatten(1, (-1, size))
    return blocks[:, :-1] @ torch.cat([blocks[:, :-1], blocks[:, 1:]], 2).mT


def flow(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], sizes: Tensor) -> Tensor:
    """Flow between two layers (FSP, Yim et al. 2017): products of any element of the one with any of the other, a mean over frames.

    The squared error, a mean over products. It does not ask when, so neither how late the student is. The public weight is 50.

    Args:
        student: float [batch, frames, width] of two layers, 0 in padding.
        teacher: of the same widths.
        sizes: [batch], number of frames of each utterance.

    Returns:
        float [batch].
    """
    mine, theirs = (first.mT @ second / sizes.clamp_min(1)[:, None, None] for first, second in (student, teacher))
    return (mine - theirs).square().mean((1, 2))


def attention(student: Tensor, teacher: Tensor, inside: Tensor, heads: int) -> Tensor:
    """Attention relations (MiniLMv2, arXiv 2012.15828): how queries attend to queries, keys to keys, and values to values.

    The KL divergence from the teacher's, nat, a mean over the three, heads and frames.

    Args:
        student: float [batch, frames, 3 × width], queries, keys and values.
        teacher: the same of another width.
        inside: bool [batch, frames], which frames are no padding.
        heads: parts that each width is split into, not those of the network.

    Returns:
        float [batch].
    """
    mine, theirs = (_relations(vectors, inside, heads) for vectors in (student, teacher))
    divergence = (theirs.exp() * (theirs - mine)).sum(-1).mean((1, 2))
    return (divergence * inside).sum(1) / inside.sum(1).clamp_min(1)


def _relations(vectors: Tensor, inside: Tensor, heads: int) -> Tensor:
    """Log-probabilities [batch, 3, heads, frames, frames]."""
    parts = vectors.unflatten(2, (3, heads, -1)).permute(0, 2, 3, 1, 4)
    scores = parts @ parts.mT / math.sqrt(parts.shape[-1])
    # finite, so that what is not there has no part in the gradient, also where nothing is there
    return scores.masked_fill(~inside[:, None, None, None], torch.finfo(scores.dtype).min).log_softmax(-1)
