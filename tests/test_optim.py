"""The optimizer and its schedules, precision, averages and mixtures of weights; warnings about a run."""

import math
import warnings

import pytest
import torch
from torch import nn

from config import Config, make_config
from core.errors import LabError
from models import MAX_LOGIT_SCALE, CLIPModel
from retrieval.figures import feature_spread
from towers import base, image
from training.monitor import TrainingMonitor, TrainingWarning
from training.optim import (
    EMA,
    SCHEDULES,
    build_optimizer,
    build_scheduler,
    choose_precision,
    mix_weights,
    mixture,
)


def test_norms_and_biases_have_no_decay_and_towers_their_own_rate():
    config = make_config("quickstart", image_tower_learning_rate=1e-5)
    tower = image.efficientnet_lite0("random")
    model = CLIPModel(
        base.CachedTower(4), tower, text_head="linear", use_batch_norm=True, learn_temperature=True
    )
    groups = build_optimizer(model, config).param_groups
    assert sorted((g["lr"], g["weight_decay"]) for g in groups) == [
        (1e-5, 0.0),
        (1e-5, 0.01),
        (1e-3, 0.0),
        (1e-3, 0.01),
    ]
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"])
    with pytest.raises(LabError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), config)


# --- schedules ---


CURVES = {  # share of the peak rate by the share of the run after warm-up, written out
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "linear": lambda x: 1 - x,
    "constant": lambda x: 1.0,
    "step": lambda x: 0.1 ** min(int(3 * x), 2),
    "restarts": lambda x: 0.5 * (1 + math.cos(math.pi * (3 * x % 1))) if x < 1 else 0.0,
}


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_their_curves_to_float_precision(name, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    config = Config(schedule=name, warmup_steps=warmup, num_epochs=10)
    scheduler = build_scheduler(optimizer, config, steps_per_epoch=8)
    for step in range(81):
        share = (step + 1) / warmup if step < warmup else CURVES[name]((step - warmup) / (80 - warmup))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * share, rel=1e-13, abs=1e-16)
        optimizer.step()
        scheduler.step()


def test_warm_up_in_epochs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = build_scheduler(optimizer, Config(warmup_epochs=2.0, num_epochs=4), steps_per_epoch=5)
    assert [scheduler.lr_lambdas[0](step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


# --- precision and averages ---


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [("cpu", False, "fp32"), ("mps", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")],
)
def test_automatic_precision_follows_from_the_device_alone(device, has_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_precision(Config(), torch.device(device)) == expected
    assert choose_precision(Config(precision="bf16"), torch.device(device)) == "bf16"


def test_ema_follows_and_gives_back():
    model = torch.nn.Linear(2, 1, bias=False)
    ema = EMA(model, 0.9)
    with torch.no_grad():
        start = model.weight.clone()
        model.weight.add_(1.0)
    ema.update(model)
    decay = 2 / 11
    with ema.applied(model):
        assert torch.allclose(model.weight, start + 1 - decay)
    assert torch.allclose(model.weight, start + 1)


def test_ema_averages_batch_norm_statistics_with_the_weights():
    model = torch.nn.BatchNorm1d(1)
    ema = EMA(model, 0.9)
    means = []
    for value in (10.0, 20.0):
        model(torch.full((4, 1), value))
        means.append(model.running_mean.item())
        ema.update(model)
    assert means == pytest.approx([1.0, 2.9])  # momentum 0.1
    by_hand = (1 - 2 / 11) * means[0]
    by_hand += (1 - 3 / 12) * (means[1] - by_hand)
    with ema.applied(model):
        assert model.running_mean.item() == pytest.approx(by_hand)
        assert model.num_batches_tracked == 2  # a counter has no average
    assert model.running_mean.item() == pytest.approx(means[1])
    again = EMA(model, 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.step == 2
    with pytest.raises(LabError, match="lacks 'running_mean': it was written before"):
        again.load_state_dict({"step": 1, "average": dict.fromkeys(("weight", "bias", "running_var"))})


# --- mixtures ---


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


def test_of_equal_mixtures_the_nearest_to_the_start_is_kept_and_nan_is_refused():
    model, start, best = parts()
    assert mix_weights(model, start, best, lambda: 1.0)[0] == 0
    assert model[0].weight[0, 0].item() == 0
    with pytest.raises(LabError, match="scores nan"):
        mix_weights(model, start, best, lambda: float("nan"))


# --- warnings ---


class Model:
    def __init__(self, scale: float) -> None:
        self.logit_scale = torch.tensor(scale)


def test_a_loss_that_stays_uniform_warns_once():
    monitor = TrainingMonitor(make_config("quickstart"))
    monitor.after_epoch(Model(1.0), 4.99, 5.0, 49)  # too early to tell
    with pytest.warns(TrainingWarning, match=r"stays at its chance level; see whether .* 128 images"):
        monitor.after_epoch(Model(1.0), 4.99, 5.0, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.after_epoch(Model(1.0), 4.99, 5.0, 51)
        TrainingMonitor(make_config("quickstart")).after_epoch(Model(1.0), 4.0, 5.0, 51)
        TrainingMonitor(make_config("quickstart")).after_epoch(
            Model(1.0), 4.99, float("nan"), 51
        )  # no chance level


def test_a_temperature_at_its_clamp_warns():
    with pytest.warns(TrainingWarning, match="at its clamp of 0.01; .*more dropout"):
        TrainingMonitor(make_config("quickstart", learn_temperature=True)).after_epoch(
            Model(MAX_LOGIT_SCALE), 1.0, 5.0, 9
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrainingMonitor(make_config("quickstart")).after_epoch(Model(MAX_LOGIT_SCALE), 1.0, 5.0, 9)


def test_collapsed_features_warn():
    spread = torch.eye(8)
    assert feature_spread(spread) == pytest.approx(1 - 1 / 8)
    assert feature_spread(spread[:1].expand(8, 8)) == pytest.approx(0, abs=1e-6)
    monitor, found = TrainingMonitor(make_config("quickstart")), {"image_spread": 0.5, "text_spread": 0.001}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.after_validation(found, 49)  # randomly initialized encoders start there
    with pytest.warns(
        TrainingWarning, match="the text features have collapsed into one point; lower"
    ) as told:
        monitor.after_validation(found, 50)
    assert (told[0].filename, told[0].lineno) == ("quickstart_s0", 50)
