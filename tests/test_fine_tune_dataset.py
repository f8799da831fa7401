"""Data sets under the names of other labs, used as their pages use them."""

import json
import shutil

import pytest
from small_data import write_coco

from config import make_config
from core.errors import LabError
from labs.fine_tune_dataset import CLIPFineTuneDataset
from losses import TripletLoss
from train import fit

SNIPPETS = {
    "hard negatives": """
from fine_tune_dataset import CLIPHardNegativeDataset

dataset = CLIPHardNegativeDataset(
    data_path="data/train",
    negative_mining_strategy="semantic",
    num_negatives=3,
    temperature=0.07
)
""",
    "triplets": """
from fine_tune_dataset import CLIPTripletDataset

dataset = CLIPTripletDataset(
    data_path="data/train",
    triplet_strategy="hardest",  # "hardest" or "semi_hard"
    margin=0.5
)
""",
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """`data/train` and `data/val`: images with a text file each."""
    coco = write_coco(tmp_path / "coco", {"train": 12, "val": 6})
    for split in ("train", "val"):
        content = json.loads((coco / "annotations" / f"captions_{split}2014.json").read_text())
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for image in content["images"]:
            shutil.copy(coco / f"{split}2014" / image["file_name"], folder)
            lines = [a["caption"] for a in content["annotations"] if a["image_id"] == image["id"]]
            (folder / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return make_config(
        "quickstart", data_dir=tmp_path / "data", reader="sidecar", image_size=32, num_epochs=1, batch_size=6,
        warmup_steps=1, test_splits=(), device="cpu", text_tower_mode="frozen", image_tower_mode="frozen",
    )  # fmt: skip


@pytest.mark.parametrize("name", SNIPPETS)
def test_documented_data_sets_train(name, data):
    scope: dict = {}
    exec(SNIPPETS[name].replace("from fine_tune", "from labs.fine_tune"), scope)
    dataset = scope["dataset"]
    assert len(dataset) == 12
    criterion = getattr(dataset, "criterion", None)
    assert fit(data, train_set=dataset, criterion=criterion, show=False).finished
    if name == "hard negatives":
        assert dataset.mined.shape == (12, 3)
        assert len(dataset.mined_captions(0)) == 3
    else:
        assert isinstance(criterion, TripletLoss)
        assert criterion.margin == 0.5


def test_a_subclass_counts(data):
    class CustomDataset(CLIPFineTuneDataset):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = 0

        def __getitem__(self, item):
            self.calls += 1
            return super().__getitem__(item)

    dataset = CustomDataset("data/train")
    fit(data, train_set=dataset, show=False)
    assert dataset.calls == 12
    with pytest.raises(LabError, match="elsewhere"):
        CLIPFineTuneDataset("elsewhere/train")
