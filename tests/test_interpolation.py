"""Mixtures of weights by hand, and the one that is kept."""

import pytest
import torch
from torch import nn

from core.errors import LabError
from training.optim import mix_weights, mixture


def parts() -> tuple[nn.Module, dict, dict]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    start = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    best = {name: torch.ones_like(value) * 4 for name, value in model.state_dict().items()}
    return model, start, best


def test_a_mixture_is_linear_and_exact_at_its_ends():
    _, start, best = parts()
    noise = {n: v + torch.randn(v.shape) if v.is_floating_point() else v for n, v in best.items()}
    weights = [name for name, value in best.items() if value.is_floating_point()]
    assert all(torch.equal(mixture(start, noise, 1.0)[name], noise[name]) for name in weights)
    assert all(torch.equal(mixture(noise, best, 0.0)[name], noise[name]) for name in weights)
    mixed = mixture(start, best, 0.25)
    assert torch.equal(mixed["0.weight"], torch.ones(2, 2))
    assert torch.equal(mixed["1.running_mean"], torch.ones(2))
    assert mixed["1.num_batches_tracked"] == 4  # a counter is the best's


def test_the_best_mixture_stays_in_the_model():
    model, start, best = parts()

    def score() -> float:
        return -abs(model[0].weight[0, 0].item() - 1.3)  # best at a share of 0.325

    share, table = mix_weights(model, start, best, score)
    assert share == 0.3
    assert table["share"].tolist() == pytest.approx([n / 10 for n in range(11)])
    assert table["score"].iloc[0] == pytest.approx(-1.3)
    assert model[0].weight[0, 0].item() == pytest.approx(1.2)
    assert table["score"].max() == pytest.approx(score())


def test_of_equals_the_nearest_to_the_start_is_kept():
    model, start, best = parts()
    share, _ = mix_weights(model, start, best, lambda: 1.0, shares=(1.0, 0.5, 0.2))
    assert share == 0.2
    assert model[0].weight[0, 0].item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), "not of one model .such as '0.bias'"),
        (lambda s: s.update({"0.weight": torch.zeros(3, 2)}), "such as '0.weight'"),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    model, start, best = parts()
    change(start)
    with pytest.raises(LabError, match=message):
        mix_weights(model, start, best, lambda: 0.0)


def test_shares_and_scores_that_cannot_be():
    model, start, best = parts()
    with pytest.raises(LabError, match="lie between 0 and 1, not .1.5."):
        mix_weights(model, start, best, lambda: 0.0, shares=(1.5,))
    with pytest.raises(LabError, match="scores nan"):
        mix_weights(model, start, best, lambda: float("nan"))
