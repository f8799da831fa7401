"""The documentation: its links lead somewhere, its names exist, its code runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import ROOT, write_coco

import losses
import models
from config import Config
from core.presets import PRESETS
from sources import readers
from towers import image as towers_image
from towers import text as towers_text
from training import optim

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LABS = sorted((ROOT / "docs" / "labs").glob("*.md"))
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def anchor(heading: str) -> str:
    """A heading's anchor, as hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_relative_and_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            assert page.name == "README.md", f"{page.name} links outside: {target}"
            continue
        path, _, place = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert found.is_relative_to(ROOT)
        if place:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{page.name}: {target}"


WORDS = (
    *Config.model_fields,
    *PRESETS,
    *(
        name
        for table in (models.HEADS, losses.LOSSES, readers.READERS, towers_image.IMAGE_TOWERS)
        for name in table
    ),
    *(name for table in (towers_text.TEXT_TOWERS, optim.SCHEDULES) for name in table),
    *"run_grid semi_hard data_share feature_map quickstart_bn_s0 CHECKPOINT_DIR COMPARE_FLAGS".split(),
    *"KAGGLE_USERNAME KAGGLE_KEY TEXT_TOWERS".split(),
)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_the_text_exist(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`(\w+_\w+)`", text)
    assert [name for name in named if name not in WORDS] == []


def test_every_lab_page_has_its_parts():
    assert {page.stem for page in LABS} == {
        "main", "projection_heads", "paired_cifar", "retrieval_finetune", "clip_from_scratch"}  # fmt: skip
    for page in LABS:
        text = page.read_text(encoding="utf-8")
        for part in ("**Question.**", "## What to try", "## Expected results", "## Time", "T4-class"):
            assert part in text, f"{page.name} lacks {part}"
        for row in [line for line in text.split("## Time")[1].splitlines() if line.startswith("| ")][1:]:
            for cell in row.strip("| ").split("|")[1:]:
                assert re.search(r"measured|estimated|wanted|not practical", cell), f"{page.name}: {cell}"


# --- extending.md, executed ---

CHECK = """
import json
model = run.model
print(json.dumps({"tower": type(model.image_encoder.body[0]).__name__, "width": model.image_encoder.width,
    "head": type(model.image_head).__name__, "loss": type(losses.build_loss(run.config)).__name__,
    "recall": run.history["i2t_recall@1"].tolist(), "finished": run.finished}))
"""


def blocks() -> list[str]:
    return BLOCK.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))


def test_each_extension_is_short():
    assert len(blocks()) == 5
    assert all(len([line for line in block.splitlines() if line.strip()]) < 15 for block in blocks())


def write_tsv(home: Path) -> None:
    """The pictures of a small set with their captions as lines of a table."""
    write_coco(home / "my_pictures", {"train": 16, "val": 8})
    lines = []
    for split in ("train", "val"):
        told = json.loads((home / f"my_pictures/annotations/captions_{split}2014.json").read_text())
        names = {image["id"]: image["file_name"] for image in told["images"]}
        lines += [f"{split}2014/{names[a['image_id']]}\t{split}\t{a['caption']}" for a in told["annotations"]]
    (home / "my_pictures" / "captions.tsv").write_text("\n".join(lines))


def test_the_extensions_train_together(tmp_path):
    write_tsv(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks()) + CHECK
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert (found["tower"], found["width"], found["head"]) == ("Conv2d", 64, "DeepHead")
    assert (found["loss"], found["finished"]) == ("FindPicture", True)
    assert 0 <= found["recall"][0] <= 1
