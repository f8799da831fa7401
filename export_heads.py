"""Heads as the plain layers that other libraries know."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errors import LabError

PLAIN = (nn.Linear, nn.LayerNorm, nn.GELU)


def plain_layers(head: nn.Module) -> list[nn.Module]:
    """A head in evaluation as linear layers, LayerNorms and GELUs: no dropout, BatchNorm folded in.

    Raises: LabError if it holds anything else.
    """
    layers: list[nn.Module] = []
    for layer in _leaves(head):
        if isinstance(layer, (nn.Dropout, nn.Identity)):
            continue
        if isinstance(layer, nn.BatchNorm1d) and layers and isinstance(layers[-1], nn.Linear):
            layers[-1] = fold_batch_norm(layers[-1], layer)
        elif isinstance(layer, PLAIN):
            layers.append(layer)
        else:
            raise LabError(
                f"a head with {type(layer).__name__} is no chain of linear layers; heads 'identity', 'linear', "
                "'projection', 'mlp', 'siglip' and 'clip' are."
            )
    return layers


def _leaves(head: nn.Module) -> list[nn.Module]:
    if isinstance(head, nn.Sequential):
        return [leaf for part in head for leaf in _leaves(part)]
    return [head]


@torch.no_grad()
def fold_batch_norm(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """One linear layer that does what `linear` and then `norm` in evaluation do."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = 0.0 if linear.bias is None else linear.bias.double()
    folded = nn.Linear(linear.in_features, linear.out_features)
    folded.weight.copy_(gain[:, None] * linear.weight.double())
    folded.bias.copy_(gain * (bias - norm.running_mean.double()) + norm.bias.double())
    return folded


def linear_map(head: nn.Module, width: int) -> Tensor:
    """(D, width): the matrix of a head that is one linear map without bias.

    Raises: LabError if it is not.
    """
    layers = plain_layers(head)
    if not layers:
        return torch.eye(width)
    if len(layers) > 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is not None:
        raise LabError(
            "CLIP's projections are linear maps without bias; train with heads 'projection' or 'identity'."
        )
    return layers[0].weight.detach().cpu()
