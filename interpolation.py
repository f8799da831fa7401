"""Mixtures of a model's starting and fine-tuned weights, chosen on validation (WiSE-FT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from errors import LabError

SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(11))


def mixture(start: dict[str, Tensor], best: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - share) of the start and `share` of the best; whole numbers, such as counters, are the best's."""
    return {
        name: torch.lerp(start[name].to(value), value, share) if value.is_floating_point() else value
        for name, value in best.items()
    }


def mix_weights(
    model: nn.Module,
    start: dict[str, Tensor],
    best: dict[str, Tensor],
    score: Callable[[], float],
    shares: Sequence[float] = SHARES,
) -> tuple[float, pd.DataFrame]:
    """Load the mixture of two sets of weights that scores best; of equals the one nearest the start.

    Args:
        model: takes the mixtures; holds the winner afterwards.
        start, best: state dictionaries of the same names and shapes.
        score: of the model as it stands, on validation data; more is better.
        shares: of `best`, each in [0, 1]; 0 is the start itself.
    Returns: the winner's share, and a table of `share` and `score`.
    Raises: LabError if the two are not of one model, a share is outside [0, 1], or a score is nan.
    Source: Wortsman et al. 2022, section 3, with the share chosen on validation.
    """
    _check(start, best, shares)
    rows: list[dict[str, float]] = []
    for share in tqdm(shares, desc="mixing weights", unit="mixture", delay=2, leave=False):
        model.load_state_dict(mixture(start, best, share))
        rows.append({"share": float(share), "score": score()})
        if math.isnan(rows[-1]["score"]):
            raise LabError(f"the mixture with share {share} scores nan; choose another best_metric.")
    table = pd.DataFrame(rows).sort_values("share", ignore_index=True)
    winner = float(table["share"].iloc[table["score"].argmax()])
    model.load_state_dict(mixture(start, best, winner))
    return winner, table


def _check(start: dict[str, Tensor], best: dict[str, Tensor], shares: Sequence[float]) -> None:
    other = sorted(set(start) ^ set(best))
    other += [name for name in best if name in start and start[name].shape != best[name].shape]
    if other:
        raise LabError(
            f"starting and fine-tuned weights are not of one model (such as {other[0]!r}); mix a run's weights "
            "with those it started from."
        )
    if not len(shares) or not all(0 <= share <= 1 for share in shares):
        raise LabError(f"shares of the fine-tuned weights lie between 0 and 1, not {list(shares)}.")
