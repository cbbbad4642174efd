# SPDX-License-Identifier: Apache-2.0
"""Monte-Carlo sampling of a data set: stratified draws with importance weights, and cells by k-means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from sslkernels.backends.arithmetic import accumulation_dtype, fixed_sum
from sslkernels.backends.interface import Tiles
from sslkernels.functional import _checks as checks
from sslkernels.ops import heads
from sslkernels.ops.extremes import extremes
from sslkernels.ops.rows import accumulate_rows

_OP = "StratifiedSampler"


class StratifiedSampler(Sampler[int]):
    """Indices of a data set drawn with replacement: a cell by its probability, then one of its samples.

    The samples are divided into C cells (classes, domains, clusters of embeddings); cell c has n_c of all
    N.  Draws are independent, and sample i of cell c comes with probability q_i = p_c / n_c each time,
    so duplicates happen and an epoch need not meet every sample.  With the importance weights

        w_i = (1 / N) / q_i = n_c / (N p_c)

    the mean of w_i f(i) over the draws is an unbiased estimate of the mean of f over the data set,
    whatever the probabilities are.

    The draws of an epoch are a function of seed and epoch alone: a run that is resumed, or is started
    with another number of workers, sees the same.  Under torch.distributed every rank takes every
    W-th draw of one sequence, so together the ranks see what one process would.

    Args:
        cells: [N] integers, the cell of each sample: a tensor, an array or a sequence.
        num_samples: Draws of an epoch over all ranks; None is N.  It is rounded up to a multiple of
            the number of ranks.
        probabilities: p of each cell, in the order of ascending cells or by cell in a mapping, each > 0;
            they are divided by their sum.  None: every cell is as likely as any other.
        seed: Of the draws.
        rank: Which rank this process is; None asks torch.distributed, where it is initialised.
        world_size: How many ranks there are; None asks too.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If there are no samples, num_samples < 1, probabilities do not fit the cells or are
            not greater than 0, or the rank is not below the number of ranks.

    Reference:
        Cochran, Sampling Techniques, 3rd edition, chapters 5 and 9A (probability proportional to size).

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> labels = torch.tensor([0] * 90 + [1] * 10)
        >>> sampler = StratifiedSampler(labels, num_samples=64)
        >>> loader = DataLoader(TensorDataset(labels), batch_size=16, sampler=sampler)
        >>> len(loader), sampler.weights[0].item(), sampler.weights[99].item()
        (4, 1.8, 0.2)
    """

    cells: Tensor  # [N] int64: the place of each sample's cell among ``values``
    values: Tensor  # [C] int64: the cells, ascending
    probabilities: Tensor  # [C] float64
    weights: Tensor  # [N] float64: w_i

    def __init__(
        self,
        cells: Tensor | np.ndarray | Sequence[int],
        num_samples: int | None = None,
        probabilities: Tensor | np.ndarray | Sequence[float] | Mapping[int, float] | None = None,
        *,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """See the class."""
        given = torch.as_tensor(cells, device="cpu")
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"{_OP}: cells must be integers, got {given.dtype}")
        if given.ndim != 1 or not len(given):
            raise ValueError(
                f"{_OP}: cells must have shape [N] with N >= 1, got {list(given.shape)}"
            )
        self.values, self.cells, counts = torch.unique(
            given.long(), return_inverse=True, return_counts=True
        )
        total = len(given)
        self.num_samples: int = (
            total if num_samples is None else checks.integer(_OP, "num_samples", num_samples, 1)
        )
        self.seed: int = checks.integer(_OP, "seed", seed, 0)
        place = _place(rank, world_size)
        self.rank: int = place[0]
        self.world_size: int = place[1]
        self.probabilities = _probabilities(probabilities, self.values)
        self.weights = (counts / (total * self.probabilities))[self.cells]
        self.epoch: int = 0
        self._members = self.cells.argsort(
            stable=True
        )  # samples of the first cell, then of the next
        self._first = counts.cumsum(0) - counts
        self._counts = counts

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws come next, as with ``DistributedSampler``."""
        self.epoch = checks.integer(f"{_OP}.set_epoch", "epoch", epoch, 0)

    def draw(self, epoch: int | None = None) -> Tensor:
        """The draws of an epoch for all ranks, int64 [num_samples rounded up].

        Args:
            epoch: Which; None is the one that ``set_epoch`` chose.
        """
        epoch = self.epoch if epoch is None else checks.integer(f"{_OP}.draw", "epoch", epoch, 0)
        # Two numbers that differ in one bit must not give sequences that are alike: hashed apart.
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(state))
        count = len(self) * self.world_size
        chances = torch.rand(2, count, dtype=torch.float64, generator=generator, device="cpu")
        bounds = self.probabilities.cumsum(0)
        cell = torch.bucketize(chances[0] * bounds[-1], bounds, right=True)
        cell = cell.clamp_(max=len(self.values) - 1)
        place = (chances[1] * self._counts[cell]).long()
        return self._members[self._first[cell] + torch.minimum(place, self._counts[cell] - 1)]

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank's draws."""
        return iter(self.draw()[self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        """How many draws this rank makes in an epoch."""
        return -(-self.num_samples // self.world_size)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    known = dist.is_available() and dist.is_initialized()
    if world_size is None:
        world_size = dist.get_world_size() if known else 1
    if rank is None:
        rank = dist.get_rank() if known else 0
    world_size = checks.integer(_OP, "world_size", world_size, 1)
    rank = checks.integer(_OP, "rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"{_OP}: rank must be less than world_size {world_size}, got {rank}")
    return rank, world_size


def _probabilities(given: Any, values: Tensor) -> Tensor:
    """[C] float64 that add up to 1."""
    cells = values.tolist()
    if given is None:
        return torch.full((len(cells),), 1 / len(cells), dtype=torch.float64, device="cpu")
    if isinstance(given, Mapping):
        if set(given) != set(cells):
            different = sorted(set(given) ^ set(cells))
            raise ValueError(
                f"{_OP}: probabilities must have one entry for each cell, cell {different[0]} is in "
                "one of the two only"
            )
        given = [given[cell] for cell in cells]
    found = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    if found.shape != (len(cells),):
        raise ValueError(
            f"{_OP}: probabilities must have shape [{len(cells)}], one for each cell, "
            f"got {list(found.shape)}"
        )
    if not bool((found > 0).all() and found.isfinite().all()):
        wrong = found[~((found > 0) & found.isfinite())][0].item()
        raise ValueError(
            f"{_OP}: probabilities must be finite and greater than 0, got {wrong} (a cell that is "
            "never drawn leaves every estimate biased)"
        )
    return found / found.sum()


class KMeans(NamedTuple):
    """Cells of ``k_means``."""

    cells: Tensor  # [N] int64: the nearest centre of each row
    centres: Tensor  # [K, D], accumulation dtype
    inertia: Tensor  # 0-d: mean squared distance of a row to its centre


@torch.no_grad()
def k_means(
    x: Tensor, clusters: int, *, iterations: int = 25, normalize: bool = False, seed: int = 0
) -> KMeans:
    """Lloyd's k-means by the tile engine: nearest centres without an [N, K] matrix.

    The nearest centre is arg max_k <x_i, c_k> - |c_k|^2 / 2.  Extra memory is O((N + K) * D).  The same
    inputs give the same bits.  It starts at K random rows, stops when no row changes its centre,
    and leaves a centre without rows where it is.

    Args:
        x: [N, D] rows, any floating dtype.
        clusters: K, from 1 to N.
        iterations: Most rounds.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        seed: Of the rows that it starts at.

    Returns:
        KMeans(cells, centres, inertia); the cells fit ``StratifiedSampler``.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If x is no matrix, or clusters or iterations are out of range.

    Reference:
        Lloyd, Least squares quantization in PCM, IEEE Transactions on Information Theory 28, 1982.

    Example:
        >>> x = torch.cat((torch.zeros(5, 2), torch.ones(5, 2)))
        >>> k_means(x, 2).inertia.item()
        0.0
    """
    op = "k_means"
    checks.check_matrix(op, "x", x)
    clusters = checks.integer(op, "clusters", clusters, 1)
    iterations = checks.integer(op, "iterations", iterations, 1)
    if clusters > len(x):
        raise ValueError(f"{op}: clusters must be at most the {len(x)} rows of x, got {clusters}")
    rows = heads.unit(x, checks.flag(op, "normalize", normalize))
    rows = rows.to(accumulation_dtype(rows.dtype))
    generator = torch.Generator("cpu").manual_seed(checks.integer(op, "seed", seed, 0))
    start = torch.randperm(len(x), generator=generator, device="cpu")[:clusters].to(x.device)
    centres = rows[start].clone()
    cells = _nearest(rows, centres)
    ones = rows.new_ones(len(x), 1)
    for _ in range(iterations):
        counts = accumulate_rows(ones, cells, clusters)
        means = accumulate_rows(rows, cells, clusters) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres)
        moved = _nearest(rows, centres)
        if torch.equal(moved, cells):
            break
        cells = moved
    squared = (rows - centres[cells]).square().sum(1)
    return KMeans(cells, centres, fixed_sum(squared) / len(x))


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    one_id, one_id_of_centres = (
        torch.zeros(len(x), dtype=torch.int64, device=x.device) for x in (rows, centres)
    )
    half = centres.square().sum(1).mul_(-0.5)
    tiles = Tiles(rows, centres, rows.new_ones(()), half, one_id, one_id_of_centres)
    return extremes(tiles).max_same
