"""How much of a score is one direction: what a state and the mean of its rows say of the proxy.

    first share      lambda_1 of Sigma, the largest share of the squared gradients that one direction holds
    mean cosine      (n |m|^2 - 1) / (n - 1) of different rows, m the mean of the n unit rows;  |m|^2 <= lambda_1
    along the mean   m^T Sigma m / |m|^2, the share that the mean's direction holds;  |m|^2 <= it <= lambda_1
    without first    exp(H_1) of the other eigenvalues over their sum
    without mean     exp(H_1) of Sigma - m m^T over its trace
A direction of share s and a rest of score G give exp(h(s)) G^(1 - s) together, h(s) the entropy of (s, 1 - s): one
direction presses the score the more, the more diverse the rest is. Source: docs/score.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from gvendi_fast.base.one_thread import reads
from gvendi_fast.kernels.spectrum import renyi_entropy
from gvendi_fast.vendi.centered import EQUAL, RowMean, check_own, entropy_without_mean
from gvendi_fast.vendi.second_moment import SecondMoment

# From here on a direction counts as dominant. Measured: docs/score.md.
DOMINANT = 0.1
# A first direction that is no mean stands out if it holds this many times what the second one does.
STANDS_OUT = 2


@dataclass(frozen=True)
class Diagnosis:
    """What directions that rows share do to their score.

    n: rows.
    gvendi: exp(H_1), as the paper defines it.
    first_share: of the first direction, between 1 / min(n, K) and 1.
    second_share: of the second one.
    mean_squared: |m|^2, the mean cosine of all pairs, each row with itself among them.
    mean_cosine: of different rows; None for one row.
    along_mean: share of the mean's direction; 0 where the rows cancel.
    without_first: G-Vendi of the other directions; None where there is none.
    without_mean: G-Vendi of the covariance about the mean (one pass; see `centered`); None where nothing is left.
    """

    n: int
    gvendi: float
    first_share: float
    second_share: float
    mean_squared: float
    mean_cosine: float | None
    along_mean: float
    without_first: float | None
    without_mean: float | None

    @property
    def sentence(self) -> str | None:
        """What to know of one direction that dominates; None where none does."""
        if self.mean_cosine is not None and self.mean_cosine >= DOMINANT:
            return (
                f"{100 * self.along_mean:.0f} % of the squared gradients lies along the mean of the rows, and two rows "
                f"have a cosine of {self.mean_cosine:.2f} on average: a habit of the proxy on such text, or rows that "
                "have much in common, such as copies; rows less their own mean are without it"
            )
        # At least this much of the first direction stays where the mean is taken out.
        stays = self.first_share - self.mean_squared
        if stays >= DOMINANT and self.first_share >= STANDS_OUT * self.second_share:
            return (
                f"{100 * self.first_share:.0f} % of the squared gradients lies along one direction that is not the "
                "mean of the rows: a group of rows that are alike, or one direction with both signs; rows less their "
                "own mean keep it"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "sentence": self.sentence}


@reads
def diagnose(state: SecondMoment, mean: RowMean) -> Diagnosis:
    """What one direction does to the score of a state's rows; mean: of exactly these rows.

    Costs two spectra [K, K] and reads no row. Raises GvendiError for a mean of other rows and for a state without any.
    """
    spectrum = state.spectrum()
    check_own(state, mean)
    m, squared, n = mean.vector().to(state.matrix.device), mean.squared_norm, state.n
    sigma_m = state.matrix @ m / state.matrix.trace()
    # Rows that cancel leave rounding, which has no direction.
    along = float(m @ sigma_m) / squared if squared > EQUAL**2 else 0.0
    rest = spectrum[1:]
    without_mean = entropy_without_mean(state, mean)
    return Diagnosis(
        n=n,
        gvendi=state.gvendi(),
        first_share=float(spectrum[0]),
        second_share=float(rest[0]) if len(rest) else 0.0,
        mean_squared=squared,
        mean_cosine=(n * squared - 1) / (n - 1) if n > 1 else None,
        along_mean=along,
        without_first=math.exp(renyi_entropy(rest / rest.sum(), 1.0)) if float(rest.sum()) > EQUAL else None,
        without_mean=None if without_mean is None else math.exp(without_mean),
    )
