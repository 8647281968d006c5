"""Squared error with L2: the whole path of strengths, and what every cluster's rows would score had it been left out.

With rows X (weighted by the roots of their weights), K = X X^T and G = (K + l I)^-1, the residuals of the rows of cluster c
under the fit that never saw them are e_c = G_cc^-1 (G r)_c. Columns F that L2 does not touch (an intercept, the anchor's
score) put Q = G - G F (F^T G F)^-1 F^T G in the place of G. In the rows' own space l G = I - Z diag(1 / (w + l)) Z^T, so that
one decomposition serves all strengths and anchors. Where the rows are the smaller side their eigenvectors U are complete, and
l G = U diag(l / (w + l)) U^T needs no difference of nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qprobe.probe.solvers.rows import Array, Floats
from qprobe.probe.solvers.space import OwnSpace

# Values of a cluster's blocks that are held at a time, 32 MB of float64.
VALUES_AT_A_TIME = 2**22


@dataclass(frozen=True)
class RidgeFit:
    """A solution in the rows' own space.

    Args:
        direction: (R,) float64, the coefficients along its axes.
        free: (q,) float64, the coefficients of the columns without L2.
    """

    direction: Floats
    free: Floats


class Ridge:
    """min over theta, a of |r - Z theta - F a|^2 + l |theta|^2.

    Args:
        space: the rows' own space, Z.
        target: (M,) float64, r, as `Design.column` makes it.
    """

    def __init__(self, space: OwnSpace, target: Floats) -> None:
        self.space, self.target = space, target
        self._complete = space.vectors is not None
        self._axes = space.coordinates if space.vectors is None else space.vectors
        self._blocks = _equal_clusters(space.design.cluster_of)

    def fit(self, strength: float, free: Floats) -> RidgeFit:
        """The solution on all rows.

        Args:
            strength: l > 0, in units of the variances; infinity is the end of the path: without an anchor the difference of
                means (the gradient at 0, as long as fits the target best), with one the columns without L2 alone.
            free: (M, q) float64, F; q may be 0.
        """
        z = self.space.coordinates
        if np.isinf(strength):
            only = _least_squares(free, self.target)
            direction = _product(z.T, self.target - free @ only)
            along = _product(z, direction)
            length = along @ self.target / max(float(along @ along), np.finfo(float).tiny)
            return RidgeFit(direction * length, only)
        (left,) = self._left(np.column_stack([self.target, free]), self._shares(strength)[None])
        coefficients = _solve(free.T @ left[:, 1:], free.T @ left[:, 0])
        along = _product(z.T, self.target - free @ coefficients)
        return RidgeFit(along / (self.space.variances + strength), coefficients)

    def fitted(self, fit: RidgeFit, free: Floats) -> Floats:
        """(M,) what a solution says of its own rows."""
        return _product(self.space.coordinates, fit.direction) + free @ fit.free

    def left_out(self, strengths: Sequence[float], frees: Sequence[Floats]) -> Floats:
        """What each row would score, had its cluster been left out.

        Args:
            strengths: S values of l > 0; infinity gives the columns without L2 alone (`ends` gives the difference of means).
            frees: A choices of F, each (M, q).

        Returns: (A, S, M) float64, weighted as the target is.
        """
        found = np.empty((len(frees), len(strengths), len(self.target)))
        every = [self._shares(strength) for strength in strengths]
        # All strengths and choices of F in two products: the axes are read twice, and not twice for each of them.
        left = self._left(np.column_stack([self.target, *frees]), np.stack(every))
        ends = np.cumsum([1, *(free.shape[1] for free in frees)])
        for s, shares in enumerate(every):
            parts = []
            for free, start in zip(frees, ends[:-1], strict=True):
                of_free = left[s, :, start : start + free.shape[1]]
                inverse = np.linalg.pinv(free.T @ of_free, hermitian=True)
                residual = left[s, :, 0] - of_free @ (inverse @ (free.T @ left[s, :, 0]))
                parts.append((residual, of_free, inverse))
            axes, narrow = self._axes, shares.astype(self._axes.dtype)
            for rows in self._blocks:
                size = rows.shape[1]
                for some in np.array_split(rows, max(1, rows.size * max(size, axes.shape[1]) // VALUES_AT_A_TIME)):
                    own = axes[some]
                    plain = ((own * narrow) @ own.transpose(0, 2, 1)).astype(np.float64)
                    plain = plain if self._complete else np.eye(size) + plain
                    for a, (residual, of_free, inverse) in enumerate(parts):
                        taken = of_free[some]
                        matrix = plain - taken @ inverse @ taken.transpose(0, 2, 1)
                        found[a, s, some] = self.target[some] - _solved(matrix, residual[some])
        return found

    def ends(self, free: Floats) -> Floats:
        """The difference of means that each row would be scored by, had its cluster been left out.

        Args:
            free: (M, q) float64, an intercept at most.

        Returns: (M,) float64; all clusters are scored on one scale, that of `fit(inf)`.
        """
        z = self.space.coordinates
        found = np.empty_like(self.target)
        whole_z, whole_r = _product(z.T, self.target), self.target
        moments = free.T @ np.column_stack([free, whole_r])
        for rows in self._blocks:
            for own in rows:
                own_z, own_free, own_r = z[own].astype(np.float64), free[own], whole_r[own]
                direction = whole_z - own_z.T @ own_r
                if free.shape[1]:
                    rest = moments - own_free.T @ np.column_stack([own_free, own_r])
                    means = _solve(rest[:, :-1], rest[:, -1])
                    # Along the axes the rows have the mean 0, so that those left in have minus the mean of those left out.
                    direction = direction + own_z.T @ (own_free @ means)
                found[own] = own_z @ direction
        only = _least_squares(free, self.target)
        whole = _product(z.T, self.target - free @ only)
        along = _product(z, whole)
        return found * (along @ self.target / max(float(along @ along), np.finfo(float).tiny))

    def freedom(self, strength: float) -> float:
        """Effective degrees of freedom of the coefficients that L2 touches: sum of w / (w + l)."""
        variances = self.space.variances
        return 0.0 if np.isinf(strength) else float((variances / (variances + strength)).sum())

    def _shares(self, strength: float) -> Floats:
        """(R,) what l G does along each axis: the whole of it, or less the identity where the axes are not complete."""
        variances = self.space.variances
        if np.isinf(strength):
            return np.full_like(variances, 1.0 if self._complete else 0.0)
        return (strength if self._complete else -1.0) / (variances + strength)

    def _left(self, columns: Floats, shares: Floats) -> Floats:
        """l G columns (M, q), for each of the shares (S, R) of strengths: (S, M, q)."""
        along = shares[:, :, None] * _product(self._axes.T, columns)
        beside = _product(self._axes, along.transpose(1, 0, 2).reshape(len(along[0]), -1))
        left = beside.reshape(len(columns), *along.shape[::2]).transpose(1, 0, 2)
        return left if self._complete else columns + left


def _equal_clusters(clusters: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of the clusters, (C, n) for each size n; clusters are next to each other."""
    starts = np.flatnonzero(np.r_[True, np.diff(clusters) != 0])
    sizes = np.diff(np.r_[starts, len(clusters)])
    return [starts[sizes == size][:, None] + np.arange(size) for size in np.unique(sizes)]


def _product(matrix: Array, columns: Floats) -> Floats:
    """matrix @ columns, in the matrix's type: no copy of a large matrix in another."""
    return np.asarray(matrix @ columns.astype(matrix.dtype), dtype=np.float64)


def _solve(matrix: Floats, right: Floats) -> Floats:
    return np.asarray(np.linalg.pinv(matrix, hermitian=True) @ right)


def _least_squares(free: Floats, target: Floats) -> Floats:
    return _solve(free.T @ free, free.T @ target)


def _solved(matrices: Floats, right: Floats) -> Floats:
    """(C, n) solutions of C systems; one that cannot be solved (nothing is left in) gives residuals of all its own."""
    try:
        return np.asarray(np.linalg.solve(matrices, right[:, :, None])[:, :, 0])
    except np.linalg.LinAlgError:
        return np.stack([np.linalg.pinv(m, hermitian=True) @ r for m, r in zip(matrices, right, strict=True)])
