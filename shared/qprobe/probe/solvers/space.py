"""The rows' own space: rows as they stand to each other, in as many dimensions as the smaller of rows and columns.

A solution of a loss with L2 lies in the span of the rows, so that it can be found in coordinates along the principal axes of
the rows (or of their differences within prompts), where L2 is L2 still and the axes are the eigenvectors of one Gram matrix.
Blocks of columns are scaled by themselves; a relative weight of a block multiplies its part of the Gram matrix, which is made
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # as in `smooth`
from numpy.typing import DTypeLike, NDArray

from qprobe.probe.solvers.rows import VALUES_AT_A_TIME, Array, Floats, Integers, Rows, Scale

# Axes whose variance is below this share of the largest are rounding.
LEAST_SHARE = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 1e-6}
# Rows are decomposed where they are at most so many times the columns: it is the more exact of the two where these are close.
ROWS_PREFERRED = 1.1
# Decompositions of more rows (and columns) than this are made in float32: a third of the time at 3,000, and scores agree to 1e-3.
MOST_IN_FLOAT64 = 2048


class Contrasts:
    """Rows of a prompt without their weighted mean, in one row less: an orthonormal basis of what differs within prompts.

    Sums of squares of contrasts are those of deviations from the prompt's mean, and the rows that are no degrees of freedom
    are gone.

    Args:
        groups: (N,) int, ascending or at least with equal ids next to each other.
        weights: (N,) float > 0.

    The basis of a prompt is the Householder reflection that takes the roots of the weights to the first axis, less that axis.
    """

    def __init__(self, groups: Integers, weights: Floats) -> None:
        self.starts = np.flatnonzero(np.r_[True, np.diff(groups) != 0])
        sizes = np.diff(np.r_[self.starts, len(groups)])
        self.of_row = np.repeat(np.arange(len(sizes)), sizes)
        root = np.sqrt(weights)
        norms = np.sqrt(np.add.reduceat(weights, self.starts))
        unit = root / norms[self.of_row]
        reflector = unit.copy()
        reflector[self.starts] += 1.0  # all roots are positive: no cancellation
        norm = np.sqrt(np.add.reduceat(np.square(reflector), self.starts))
        self.reflector = reflector / norm[self.of_row]
        self.kept = np.ones(len(groups), dtype=bool)
        self.kept[self.starts] = False

    def of(self, values: Array, rows: slice = slice(None)) -> Array:
        """(M, ...) contrasts of values (n, ...), which are multiplied by the roots of the weights already.

        Args:
            rows: which of the rows they are; whole prompts.
        """
        return np.asarray(self._reflect(values, rows)[self.kept[rows]])

    def back(self, contrasts: Array) -> Array:
        """(N, ...) values without their prompts' weighted means, times the roots of the weights, from all contrasts."""
        values = np.zeros((len(self.kept), *contrasts.shape[1:]), dtype=contrasts.dtype)
        values[self.kept] = contrasts
        return self._reflect(values, slice(None))

    def _reflect(self, values: Array, rows: slice) -> Array:
        first, last, _ = rows.indices(len(self.kept))
        reflector = self.reflector[rows].astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        starts = self.starts[(self.starts >= first) & (self.starts < last)] - first
        sums = np.add.reduceat(reflector * values, starts, axis=0)
        return np.asarray(values - 2 * reflector * sums[self.of_row[rows] - self.of_row[first]])


class Design:
    """Rows, sorted by cluster and prompt, ready for solvers: scaled, weighted, centred by the table's mean or within prompts.

    Args:
        rows: what is fitted.
        within: whether rows are read without their prompt's mean.
        row_weights: (N,) float > 0, what a row counts in the loss, in the order of `rows`.
        dtype: of the large products; None chooses by their size.
    """

    def __init__(self, rows: Rows, *, within: bool, row_weights: Floats, dtype: DTypeLike | None = None) -> None:
        self.rows, self.within, self.order = rows, within, rows.order
        self.weights = row_weights[self.order] / row_weights.sum()
        self.groups, self.clusters = rows.groups[self.order], rows.clusters[self.order]
        self.root = np.sqrt(self.weights)
        self.contrasts = Contrasts(self.groups, self.weights) if within else None
        self.scales = {name: Scale.of(block, row_weights) for name, block in rows.blocks.items()}
        # The cluster of each row of the design, and where its rows are.
        self.cluster_of = self.clusters if self.contrasts is None else self.clusters[self.contrasts.kept]
        self.size = len(self.cluster_of)
        self.width = sum(block.shape[1] for block in rows.blocks.values())
        narrow = min(self.size, self.width) > MOST_IN_FLOAT64
        self.dtype = np.dtype(dtype) if dtype is not None else np.dtype(np.float32 if narrow else np.float64)
        self._last: OwnSpace | None = None
        self._row_grams: dict[str, Array] = {}
        self._column_grams: dict[tuple[str, ...], Array] = {}

    def column(self, values: Floats) -> Floats:
        """A column of numbers (N,), in the order of the rows, as the design has it: (M,) float64, weighted, not centred.

        Within prompts, contrasts take the mean away.
        """
        own = values[self.order] * self.root
        return own if self.contrasts is None else self.contrasts.of(own)

    def plain(self, values: Array) -> Array:
        """Values (M, ...) of the design as rows (N, ...) in its order, without weights; within prompts, less their mean."""
        own = values if self.contrasts is None else self.contrasts.back(values)
        return np.asarray(own / self.root.astype(own.dtype).reshape(-1, *[1] * (own.ndim - 1)))

    def unordered(self, values: Array) -> Array:
        """Values (N, ...) in the order of the design, in that of the rows."""
        result = np.empty_like(values)
        result[self.order] = values
        return result

    def part(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Array:
        """(m, d) of the design: some rows (whole prompts, in its order) and columns of a block."""
        scale = self.scales[name]
        values = self.rows.blocks[name][self.order[rows], columns].astype(self.dtype)
        values -= scale.mean[columns].astype(self.dtype)
        values *= scale.factor[columns].astype(self.dtype)
        values *= self.root[rows, None].astype(self.dtype)
        return values if self.contrasts is None else self.contrasts.of(values, rows)

    def row_pieces(self) -> Iterator[tuple[slice, slice]]:
        """Slices of rows that hold whole prompts, and of the design's rows that these make."""
        step = max(1, VALUES_AT_A_TIME // max(1, self.width))
        starts = np.flatnonzero(np.r_[True, np.diff(self.groups) != 0])
        kept = np.ones(len(self.groups), dtype=bool) if self.contrasts is None else self.contrasts.kept
        counted = np.r_[0, kept.cumsum()]
        first = 0
        while first < len(self.groups):
            ends = np.r_[starts[starts > first], len(self.groups)]
            end = int(ends[max(0, np.searchsorted(ends, first + step, side="right") - 1)])
            yield slice(first, end), slice(int(counted[first]), int(counted[end]))
            first = end

    def columns_pieces(self, name: str) -> Iterator[slice]:
        """Slices of a block's columns that are converted at a time."""
        width = self.rows.blocks[name].shape[1]
        step = max(1, VALUES_AT_A_TIME // max(1, len(self.groups)))
        return (slice(start, min(start + step, width)) for start in range(0, width, step))

    def space(self, weighting: Mapping[str, float]) -> OwnSpace:
        """The rows' own space with blocks at relative weights >= 0; a block that is not named has none."""
        used = {name: float(weight) for name, weight in weighting.items() if weight > 0}
        if self._last is not None and self._last.weighting == used:
            return self._last  # that of the last candidates is often the chosen one
        if unknown := sorted(set(weighting) - set(self.rows.blocks)):
            raise ValueError(f"There is no block {', '.join(unknown)}: they are {', '.join(self.rows.blocks)}.")
        width = sum(self.rows.blocks[name].shape[1] for name in used)
        self._last = None  # before another is made: each may be as large as the rows
        self._last = self._by_rows(used) if self.size <= ROWS_PREFERRED * width else self._by_columns(used)
        return self._last

    def _by_rows(self, weighting: Mapping[str, float]) -> OwnSpace:
        for name in weighting:
            if name not in self._row_grams:
                gram = np.zeros((self.size, self.size), dtype=self.dtype, order="F")
                for columns in self.columns_pieces(name):
                    _add_square(gram, self.part(name, columns=columns))
                self._row_grams[name] = gram
        total = np.zeros((self.size, self.size), dtype=self.dtype, order="F")
        for name, weight in weighting.items():
            total += weight**2 * self._row_grams[name]
        values, vectors = _eigh(total)
        values[~_kept(values, weighting)] = 0.0
        return OwnSpace(self, dict(weighting), values.astype(np.float64), vectors * np.sqrt(values), vectors, None)

    def _by_columns(self, weighting: Mapping[str, float]) -> OwnSpace:
        names = tuple(weighting)
        if names not in self._column_grams:
            width = sum(self.rows.blocks[name].shape[1] for name in names)
            gram = np.zeros((width, width), dtype=self.dtype, order="F")
            for rows, _ in self.row_pieces():
                _add_square(gram, np.concatenate([self.part(name, rows) for name in names], axis=1).T)
            self._column_grams[names] = gram
        factor = np.concatenate([np.full(self.rows.blocks[n].shape[1], w) for n, w in weighting.items()])
        factor = factor.astype(self.dtype)
        values, axes = _eigh(self._column_grams[names] * factor * factor[:, None])
        kept = _kept(values, weighting)
        values, axes = values[kept], axes[:, kept] * factor[:, None]
        coordinates = np.empty((self.size, len(values)), dtype=self.dtype)
        for rows, own in self.row_pieces():
            coordinates[own] = np.concatenate([self.part(name, rows) for name in names], axis=1) @ axes
        return OwnSpace(self, dict(weighting), values.astype(np.float64), coordinates, None, axes)


@dataclass(frozen=True)
class OwnSpace:
    """Coordinates of the design's rows along their principal axes.

    Args:
        design: what they are rows of.
        weighting: the blocks that are in it, with their relative weights.
        variances: (R,) float64 >= 0, ascending: the sum of squares along each axis.
        coordinates: (M, R).
        vectors: (M, M) orthonormal, the coordinates over the roots of the variances, where the rows were the smaller side.
        axes: (D, R), the axes in scaled columns, where the columns were.
    """

    design: Design
    weighting: dict[str, float]
    variances: Floats
    coordinates: Array
    vectors: Array | None
    axes: Array | None

    @property
    def largest(self) -> float:
        """The largest variance; 0 where the blocks differ nowhere."""
        return float(self.variances[-1]) if len(self.variances) else 0.0

    def columns(self, direction: Floats) -> dict[str, Floats]:
        """Coefficients (D_b,) of every block's plain columns, from a direction (R,) of this space."""
        design, found = self.design, {}
        used = list(self.weighting)
        if self.axes is not None:
            whole = self.axes @ direction.astype(self.axes.dtype)
            ends = np.cumsum([design.rows.blocks[name].shape[1] for name in used])[:-1]
            parts = dict(zip(used, np.split(whole, ends), strict=True))
        else:
            assert self.vectors is not None
            root = np.sqrt(self.variances)
            along = np.divide(direction, root, out=np.zeros_like(direction), where=root > 0)
            dual = self.vectors @ along.astype(self.vectors.dtype)
            parts = {}
            for name in used:
                pieces = [design.part(name, columns=c).T @ dual for c in design.columns_pieces(name)]
                parts[name] = np.concatenate(pieces) * self.weighting[name] ** 2
        for name, block in design.rows.blocks.items():
            own = parts[name].astype(np.float64) * design.scales[name].factor if name in parts else None
            found[name] = np.zeros(block.shape[1]) if own is None else own
        return found


def _add_square(gram: Array, values: Array) -> None:
    """gram += values @ values.T, the lower half alone, in place."""
    blas = scipy.linalg.blas
    syrk = blas.ssyrk if gram.dtype == np.float32 else blas.dsyrk
    if values.flags.f_contiguous:
        syrk(1.0, values, beta=1.0, c=gram, lower=1, overwrite_c=1)
    else:  # as LAPACK reads it, it is its own transpose
        syrk(1.0, values.T, beta=1.0, c=gram, trans=1, lower=1, overwrite_c=1)


def _eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, of which the lower half is read and none may be kept.

    numpy's lets other threads go on, which solve other folds (`qprobe.evaluation.auto`); scipy's needs one copy less.
    """
    if len(matrix) <= MOST_IN_FLOAT64:
        values, vectors = np.linalg.eigh(matrix)
    else:
        values, vectors = scipy.linalg.eigh(matrix, overwrite_a=True, lower=True, driver="evd", check_finite=False)
    return values, vectors


def _kept(values: Array, weighting: Mapping[str, float]) -> NDArray[np.bool_]:
    """(R,) bool, the axes that are more than rounding: of the largest, and of numbers of variance 1 where nothing differs."""
    rounding = (10 * np.finfo(values.dtype).eps) ** 2 * sum(weight**2 for weight in weighting.values())
    return np.asarray(values > max(LEAST_SHARE[values.dtype] * float(values[-1]), rounding))


def block_weightings(names: Sequence[str]) -> list[dict[str, float]]:
    """The relative weights that are compared: each block alone, all alike, and each at three times the others' weight."""
    if len(names) == 1:
        return [{names[0]: 1.0}]
    alone = [{name: 1.0} for name in names]
    stressed = [{other: 3.0 if other == name else 1.0 for other in names} for name in names]
    return [*alone, dict.fromkeys(names, 1.0), *stressed]
