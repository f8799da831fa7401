"""What tells one loss or data set of a user's own from another."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_data import ROOT
from torch import nn

import losses
from losses import InfoNCELoss, LabelledLoss
from training.identity import identity

FACTOR = 2.0
PAIR = [lambda a, b: a + b, lambda a, b: a - b]


def scaled(factor):
    return lambda *features: factor * sum(features)


class Own(nn.Module):
    def __init__(self, weight=1.0, width=3):
        super().__init__()
        self.weight = weight
        self.centers = nn.Parameter(torch.randn(width))
        self.register_buffer("balance", torch.ones(2))

    def forward(self, features):
        return FACTOR * features


def edited(base):
    class Own(base):  # a class under an unchanged name
        def forward(self, features):
            return features - 1

    return Own


def uses_global(features):
    return FACTOR * features


def test_two_lambdas_are_two_losses():
    one, other = (LabelledLoss(function) for function in PAIR)  # on one line of source
    assert identity(one) != identity(other)
    assert identity(one) == identity(LabelledLoss(PAIR[0]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(1), scaled(2)),
        (functools.partial(uses_global, 1), functools.partial(uses_global, 2)),
        (Own(), Own(weight=2.0)),
        (Own(), Own(width=4)),
        (Own(), edited(nn.Module)()),
        (Own(), edited(Own)()),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (np.arange(3), np.arange(4)),
        (InfoNCELoss(label_smoothing=0.1), InfoNCELoss()),
        ({1, 2}, {1, 3}),
    ],
)
def test_what_differs_is_told_apart_and_what_is_alike_is_not(one, other):
    assert None not in (identity(one), identity(other))
    assert identity(one) != identity(other)


def test_random_parameters_and_modes_are_no_part_of_it_but_values_are():
    one, other = Own(), Own()
    assert identity(one) == identity(other.eval())
    other.balance[0] = 5
    assert identity(one) != identity(other)


def test_a_global_that_a_function_names_belongs_to_it(monkeypatch):
    before, whole = identity(uses_global), identity(Own())
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert identity(uses_global) != before
    assert identity(Own()) != whole


def test_what_cannot_be_read_has_no_identity():
    assert identity(LabelledLoss(functools.partial(print, file=sys.stderr))) is None
    assert identity(LabelledLoss(scaled(x for x in ()))) is None


def test_every_loss_of_the_project_has_one():
    made = [losses.LOSSES[name]() for name in sorted(losses.LOSSES)]
    found = [identity(loss) for loss in made]
    assert len(set(found)) == len(losses.LOSSES)
    assert None not in found


def test_another_process_finds_the_same():
    code = "import test_identity as t, core.devices; print(t.identity(t.LabelledLoss(t.PAIR[0])), t.identity(t.Own()))"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin"}
    shown = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [identity(LabelledLoss(PAIR[0])), identity(Own())]
