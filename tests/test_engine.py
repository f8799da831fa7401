"""The step: pieces equal the whole, memory that runs out, negatives beyond the batch, several processes."""

import math
import operator
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_data import ROOT
from torch import nn
from torch.utils.data import DataLoader

from config import make_config
from core.errors import LabError
from losses import InfoNCELoss, SigmoidLoss
from models import CLIPModel, HeadOptions
from towers import base
from train import fit, fit_in_processes
from training.engine import Engine, encode_batch, is_out_of_memory, split_batch
from training.negatives import BankNegatives, QueueNegatives, build_negatives
from utils import Run, load_run, train_epoch

# Equalities are shown in float64. A gradient here is a sum of fewer than 10^5 terms below 10^2, so that two orders
# of summation differ by less than 10^5 * 10^2 * 2.2e-16 = 2.2e-9, and in practice by some 1e-14.
SAME = {"rtol": 1e-9, "atol": 2.2e-9}


class ConvTower(nn.Module):
    """Two convolutions, small enough for double precision by hand."""

    width = 6

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, 2),
            nn.BatchNorm2d(5) if norm else nn.GELU(),
            nn.Dropout(0.2),
            nn.Conv2d(5, 6, 3, 2),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean(dim=(2, 3))


def make_model(norm: bool = False, **options) -> CLIPModel:
    torch.manual_seed(0)
    return CLIPModel(
        base.CachedTower(7), ConvTower(norm), text_head="mlp", image_head="mlp", embed_dim=4, frozen=(),
        head_options=HeadOptions(hidden_dim=8, dropout=0.1), learn_temperature=True, **options,
    ).double()  # fmt: skip


def make_batch(images: int = 10, captions: int = 3) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(images) + 50
    return {
        "image": torch.randn(images, 3, 16, 16, generator=generator, dtype=torch.float64),
        "text": torch.randn(images * captions, 7, generator=generator, dtype=torch.float64),
        "image_id": ids,
        "text_id": ids.repeat_interleave(captions),
    }


def engine_of(model: CLIPModel, criterion=None, negatives=None, **fields) -> Engine:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = make_config("flickr8k", max_grad_norm=1e9, **fields)
    return Engine(model, criterion or InfoNCELoss(), optimizer, config=config, negatives=negatives)


def gradients(engine: Engine, batch: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    engine.gradients(batch)
    return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}


def still(model: CLIPModel) -> CLIPModel:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


@pytest.mark.parametrize("criterion", [InfoNCELoss(), SigmoidLoss()])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_pieces_give_the_gradients_of_the_whole_batch(criterion, size):
    bias = -2.0 if isinstance(criterion, SigmoidLoss) else None
    whole = gradients(engine_of(still(make_model(logit_bias=bias)), criterion), make_batch())
    pieces = gradients(
        engine_of(still(make_model(logit_bias=bias)), criterion, micro_batch_size=size), make_batch()
    )
    assert whole.keys() == pieces.keys()
    assert "logit_scale" in whole
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, **SAME)


def test_the_whole_batch_is_what_autograd_gives():
    model, batch = still(make_model()), make_batch()
    found = gradients(engine_of(model), batch)
    model.zero_grad()
    ids = {"image_id": batch["image_id"], "text_id": batch["text_id"]}
    InfoNCELoss()(**model(batch["image"], batch["text"]), **ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **SAME)


@pytest.mark.parametrize("size", [None, 2])
def test_the_plain_loop_and_the_engine_give_equal_weights(size):
    batches, models = [make_batch(count, 2) for count in (4, 3, 5)], []
    for engine_takes_the_step in (False, True):
        model = still(make_model(logit_bias=-1.0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        parts = model, SigmoidLoss(), optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        config = make_config("flickr8k", max_grad_norm=0.1, micro_batch_size=size)
        engine = Engine(*parts, config)
        for epoch in range(2):
            if engine_takes_the_step:
                losses = [engine.step(batch).item() for batch in batches]
            else:
                row = train_epoch(model, DataLoader(batches, None), *parts[1:], epoch, config, show=False)
        models.append(model.state_dict())
    assert row["train_loss"] == pytest.approx(sum(map(operator.mul, losses, (4, 3, 5))) / 12, rel=1e-9)
    assert row["learning_rate"] == pytest.approx(0.01 * 0.9**6)
    for name, weights in models[0].items():
        torch.testing.assert_close(models[1][name], weights, **SAME)


def test_the_plain_loop_explains_what_it_cannot_train():
    model = make_model()
    model.image_encoder = Greedy().double()
    parts = (
        model,
        DataLoader([make_batch()], None),
        InfoNCELoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    with pytest.raises(
        LabError, match="memory ran out .CUDA out of memory.*`train.fit` divides a batch into pieces"
    ):
        train_epoch(*parts, show=False)
    model.image_encoder.limit = 99
    model.image_head[0].weight.data.fill_(math.nan)
    with pytest.raises(LabError, match=r"the loss is nan at epoch 1, step 1 \(image ids \[50, 51"):
        train_epoch(*parts, show=False)


def test_pieces_drop_the_same_units_in_both_passes():
    model, batch = make_model(), make_batch()
    seen = []
    model.image_encoder.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    gradients(engine_of(model, micro_batch_size=4), batch)
    first, second = seen[:3], seen[3:]
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_norm_moves_its_statistics_once_and_frozen_ones_are_exact():
    batch = make_batch()
    model = still(make_model(norm=True))
    gradients(engine_of(model, micro_batch_size=5), batch)
    by_hand = still(make_model(norm=True))
    for rows in batch["image"].split(5):
        by_hand.encode_image(rows)
    torch.testing.assert_close(
        model.image_encoder.body[1].running_mean, by_hand.image_encoder.body[1].running_mean
    )
    frozen = {"norm": True, "freeze_batch_norm": True}
    whole = gradients(engine_of(still(make_model(**frozen))), batch)
    pieces = gradients(engine_of(still(make_model(**frozen)), micro_batch_size=3), batch)
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, **SAME)


def test_heads_see_the_whole_batch_with_its_batch_norm():
    options = {"norm": True, "freeze_batch_norm": True, "use_batch_norm": True}
    losses, means, found = [], [], []
    for size in (None, 3):
        engine = engine_of(still(make_model(**options)), micro_batch_size=size)
        found.append(gradients(engine, make_batch()))
        losses.append(engine.gradients(make_batch()).item())
        means.append(engine.model.image_head[1].running_mean.clone())
    assert losses[1] == pytest.approx(
        losses[0], rel=1e-9
    )  # in pieces of their own they differ by a hundredth
    torch.testing.assert_close(means[1], means[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **SAME)


def test_batch_norm_that_trains_takes_two_images_at_least():
    batch = make_batch(11)
    pieces = split_batch(batch, 2, least=2)
    assert [len(piece["image"]) for piece in pieces] == [2, 2, 2, 2, 3]
    engine_of(make_model(use_batch_norm=True), micro_batch_size=1).step(batch)  # only a head's: fine
    engine_of(make_model(norm=True, freeze_batch_norm=True), micro_batch_size=1).step(batch)
    with pytest.raises(LabError, match="micro_batch_size 1 leaves the image tower's BatchNorm one image"):
        engine_of(make_model(norm=True), micro_batch_size=1).step(batch)
    with pytest.raises(
        LabError, match="BatchNorm needs at least two images while it trains, and this batch has one"
    ):
        engine_of(make_model(use_batch_norm=True)).step(make_batch(1))


def test_pieces_hold_every_image_and_caption_once():
    batch = make_batch(10, 2)
    pieces = split_batch(batch, 4)
    assert [len(piece["image"]) for piece in pieces] == [3, 3, 4]
    assert torch.equal(torch.cat([piece["text"] for piece in pieces]), batch["text"])
    words = {**batch, "text": [f"caption {n}" for n in range(20)]}
    assert sum((piece["text"] for piece in split_batch(words, 4)), []) == words["text"]  # noqa: RUF017


class Greedy(ConvTower):
    """Runs out of memory above some images at once."""

    limit = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.limit:
            torch.rand(3)  # draws before it fails, as dropout would
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)


class Limit(nn.Module):
    """Runs out of memory above some images at once, after the layers before it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.limit:
            raise MemoryError
        return images


def test_out_of_memory_halves_the_pieces_and_repeats_the_step(capsys):
    def trained(tower: nn.Module, size: int | None) -> tuple[torch.Tensor, Engine]:
        model = make_model()
        model.image_encoder = tower.double()
        tower.load_state_dict(make_model().image_encoder.state_dict())
        engine = engine_of(model, micro_batch_size=size)
        torch.manual_seed(3)
        engine.step(make_batch())
        return model.image_head[0].weight.detach(), engine

    greedy, engine = trained(Greedy(), None)
    assert engine.micro_batch_size == 3  # 10 -> 5 -> 3
    assert "continuing with micro_batch_size 3; the batch stays 10" in capsys.readouterr().out
    torch.testing.assert_close(greedy, trained(ConvTower(), 3)[0], **SAME)


def test_out_of_memory_on_one_image_says_so():
    model = make_model()
    model.image_encoder = Greedy().double()
    model.image_encoder.limit = 0
    with pytest.raises(LabError, match="memory ran out on a single image"):
        engine_of(model).step(make_batch())


def test_memory_that_runs_out_keeps_two_images_for_batch_norm(capsys):
    model = make_model(norm=True)
    model.image_encoder = Greedy(norm=True).double().train()
    model.image_encoder.limit = 2
    engine = engine_of(model)
    engine.step(make_batch())
    assert engine.micro_batch_size == 2  # 10 -> 5 -> 3 -> 2
    model.image_encoder.limit = 1
    with pytest.raises(LabError, match="memory ran out on two images, the fewest that BatchNorm takes"):
        engine.step(make_batch())


def test_a_step_taken_again_moves_batch_norm_once(capsys):
    def trained(limit: int, size: int | None) -> dict[str, torch.Tensor]:
        model = make_model(norm=True)
        model.image_encoder.body.append(Limit(limit))
        torch.manual_seed(3)
        engine_of(model, micro_batch_size=size).step(make_batch())
        return model.state_dict()

    found, expected = trained(5, None), trained(99, 5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_evaluation_that_runs_out_of_memory_takes_halves():
    model, batch = make_model().eval(), make_batch()
    whole = encode_batch(model, batch, make_config("flickr8k"))
    model.image_encoder.body.append(Limit(3))
    halves = encode_batch(model, batch, make_config("flickr8k"))
    assert whole.keys() == halves.keys()
    for name in whole:
        torch.testing.assert_close(halves[name], whole[name])


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), True), (RuntimeError("could not create a primitive"), True), (RuntimeError("bad_alloc"), True),
     (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
     (RuntimeError("expected scalar type Float"), False), (ValueError("out of memory"), False)],
)  # fmt: skip
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


LITTLE_MEMORY = """
import sys; sys.path.insert(0, {root!r})
import os
import resource
from config import load_config
from core.errors import LabError
from train import fit, fit_in_processes
config = load_config(sys.argv[1] + "/config.yaml")
fit(config.updated(image_tower_mode="cached"), show=False)  # encodes the captions
for megabytes in (0, 150):
    if os.fork() == 0:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit = used + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            run = fit(config.updated(runs_dir=config.runs_dir / str(megabytes)), show=False)
            print("result", megabytes, "finished" if run.finished else "stopped", run.training["micro_batch_size"])
        except LabError as error:
            print("result", megabytes, "sentence:", error)
        sys.stdout.flush()
        os._exit(0)
    print("status", os.wait()[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as on Linux")
def test_memory_that_really_runs_out(coco, tmp_path):
    """Unlimited, the step needs 400 MB."""
    config = make_config(
        "quickstart", data_dir=coco, cache_dir=tmp_path / "cache", runs_dir=tmp_path / "runs", image_size=112,
        num_epochs=1, batch_size=24, warmup_steps=2, device="cpu", test_splits=("val",),
    )  # fmt: skip
    config.save(tmp_path / "config.yaml")
    command = [sys.executable, "-c", LITTLE_MEMORY.format(root=str(ROOT)), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    results = [line.split(" ", 2)[2] for line in done.stdout.splitlines() if line.startswith("result")]
    assert done.stdout.count("status 0") == len(results) == 2, done.stderr[-2000:]
    assert results[0].startswith(("sentence: memory ran out", "finished"))
    assert results[1].startswith("finished")
    assert int(results[1].split()[1]) < 24


def test_other_errors_pass():
    model = make_model()
    with pytest.raises(RuntimeError, match="channels"):
        engine_of(model).step({**make_batch(), "image": torch.zeros(10, 4, 16, 16, dtype=torch.float64)})


# --- negatives ---


def test_a_queue_holds_recent_rows_and_sets_aside_the_batch():
    model, batch = make_model().eval(), make_batch(6, 1)
    queue = QueueNegatives(size=4)
    features = model(batch["image"], batch["text"])

    def galleries(rows: slice) -> list[dict[str, torch.Tensor]]:
        fresh = {kind: values[rows] for kind, values in features.items() if values.ndim}
        given = queue.comparisons(fresh, batch["image_id"][rows], batch["text_id"][rows])
        queue.after_step()
        return given

    first = galleries(slice(0, 3))
    assert [some["image_id"].tolist() for some in first] == [[50, 51, 52]] * 3  # nothing older yet
    _, images, texts = galleries(slice(3, 5))
    assert (images["image_id"].tolist(), images["text_id"].tolist()) == ([53, 54, -1, -1, -1], [53, 54])
    assert (texts["image_id"].tolist(), texts["text_id"].tolist()) == ([53, 54], [53, 54, -1, -1, -1])
    *_, texts = galleries(slice(4, 6))
    assert texts["text_id"].tolist() == [54, 55, -1, -1, -1]  # 53, 50, 51 are kept; 52 fell out; 54 is here
    torch.testing.assert_close(texts["text_features"], features["text_features"][[4, 5, 3, 0, 1]])
    again = QueueNegatives(size=4)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.rows["text_features"], queue.rows["text_features"])


def test_a_gallery_beyond_the_batch_has_no_gradients_at_all():
    """Gradients for the batch's part alone would draw it to its matches with nothing that pushes back."""
    model, batch = make_model().eval(), make_batch(4, 1)
    features = model(batch["image"], batch["text"])

    def sides(negatives) -> list[tuple[bool, bool]]:
        found = negatives.comparisons(features, batch["image_id"], batch["text_id"])
        return [(some["image_features"].requires_grad, some["text_features"].requires_grad) for some in found]

    assert sides(QueueNegatives(size=4)) == [(True, True), (False, True), (True, False)]
    assert sides(BankNegatives(model, batch["text"], batch["text_id"], 1)) == [(True, True), (True, False)]


def test_a_bank_by_hand():
    model, batch = still(make_model()).eval(), make_batch(4, 2)
    texts = torch.cat([batch["text"], torch.randn(6, 7, dtype=torch.float64)])
    ids = torch.cat([batch["text_id"], torch.tensor([90, 90, 91, 91, 92, 92])])
    bank = BankNegatives(model, texts, ids, refresh_steps=2)
    engine = engine_of(model, negatives=bank)
    loss = engine.gradients(batch)
    features = model(batch["image"], texts)
    logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T  # (4, 14)
    own = [[2 * k, 2 * k + 1] for k in range(4)]
    columns = logits[:, :8].log_softmax(dim=0)  # of both comparisons: the bank's other captions ask nothing
    to_image = -torch.stack([columns[k // 2, k] for k in range(8)]).mean()
    to_text = [
        -torch.stack([rows[k, own[k]].mean() for k in range(4)]).mean()
        for rows in (logits[:, :8].log_softmax(dim=1), logits.log_softmax(dim=1))
    ]
    torch.testing.assert_close(loss, ((sum(to_text) / 2 + to_image) / 2).detach())
    assert engine.chance == pytest.approx((math.log(4) + (math.log(8) + math.log(14)) / 2) / 2)


def test_a_bank_is_encoded_again_and_tells_how_stale_it_was():
    model, batch = still(make_model()), make_batch(4, 2)
    bank = BankNegatives(model, batch["text"], batch["text_id"], refresh_steps=2)
    engine = engine_of(model, negatives=bank)
    for step in range(4):
        before = None if bank.features is None else bank.features.clone()
        engine.step(batch)
        assert (before is None or not torch.equal(before, bank.features)) == (step % 2 == 0)
    assert 0 < bank.log()["bank_staleness"] < 1
    assert model.training
    again = BankNegatives(model, batch["text"], batch["text_id"], refresh_steps=2)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.features, bank.features)


def test_a_bank_needs_cached_captions():
    config = make_config("quickstart", negatives="bank")
    with pytest.raises(LabError, match="set text_tower_mode to 'cached', or negatives to 'queue'"):
        build_negatives(config, make_model(), type("Captions", (), {"text_features": None}))


def test_a_large_gallery_passes_in_pieces(monkeypatch):
    batch = make_batch()
    whole = gradients(
        engine_of(still(make_model()), InfoNCELoss(label_smoothing=0.1, focal_gamma=1.5)), batch
    )
    monkeypatch.setattr("losses.SCORES_AT_ONCE", 40)
    pieces = gradients(
        engine_of(still(make_model()), InfoNCELoss(label_smoothing=0.1, focal_gamma=1.5)), batch
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, **SAME)


def test_nothing_to_train_says_so():
    model = make_model().requires_grad_(False)
    with pytest.raises(LabError, match="no feature depends on a trainable part"):
        Engine(model, InfoNCELoss(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)).gradients(
            make_batch()
        )


# --- several processes ---

TWO_PROCESSES = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
import torch
from training.distributed import join_group, rank, sum_gradients, world_size
from test_engine import engine_of, make_batch, make_model, still
join_group(torch.device("cpu"))
assert world_size() == 2
batch = make_batch(11, 3)
cut = slice(0, 6) if rank() == 0 else slice(6, 11)  # unlike shares
texts = slice(3 * cut.start, 3 * cut.stop)
mine = {{"image": batch["image"][cut], "image_id": batch["image_id"][cut], "text": batch["text"][texts],
        "text_id": batch["text_id"][texts]}}
for size in (None, 2):
    model = still(make_model())
    engine_of(model, micro_batch_size=size).gradients(mine)
    sum_gradients(model.parameters())
    torch.save({{n: p.grad for n, p in model.named_parameters()}}, f"{{sys.argv[1]}}/{{rank()}}_{{size}}.pt")
from config import load_config
from train import fit, fit_in_processes
fit(load_config(sys.argv[1] + "/config.yaml"), show=False)
"""


def run_of_two(script: str, folder: Path, *launcher: str) -> Run:
    """The run that a script's two processes trained by folder/config.yaml."""
    path = folder / "two.py"
    path.write_text(script.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, *launcher, str(path), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_run(next((folder / "two").iterdir()))


def assert_same_run(together: Run, alone: Run) -> None:
    assert together.training["processes"] == 2
    columns = ["train_loss", "val_loss", "i2t_recall@1", "t2i_recall@1", "learning_rate", "queue_rows"]
    # float32: 9 steps, each of whose sums over 30 captions x 12 queued rows may be off by 360 * 1.2e-7 relative
    pd.testing.assert_frame_equal(together.history[columns], alone.history[columns], rtol=9 * 360 * 1.2e-7)


def test_two_processes_give_the_gradients_and_the_run_of_one(coco, tmp_path):
    config = make_config(
        "quickstart", data_dir=coco, cache_dir=tmp_path / "cache", runs_dir=tmp_path / "two", image_tower_mode="cached",
        image_size=32, num_epochs=3, batch_size=10, warmup_steps=2, device="cpu", negatives="queue", queue_size=12,
        precision="fp32",
    )  # fmt: skip
    alone = fit(config.updated(runs_dir=tmp_path / "one"), show=False)
    config.save(tmp_path / "config.yaml")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert_same_run(run_of_two(TWO_PROCESSES, tmp_path, *launcher), alone)
    one = gradients(engine_of(still(make_model())), make_batch(11, 3))
    for process in range(2):
        for size in (None, 2):
            found = torch.load(tmp_path / f"{process}_{size}.pt", weights_only=True)
            for name, gradient in one.items():
                torch.testing.assert_close(found[name], gradient, **SAME)
    shutil.rmtree(tmp_path / "two")
    assert_same_run(fit_in_processes(config.updated(test_splits=("val",)), 2), alone)  # as from a notebook
