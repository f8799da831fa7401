"""The documentation: its links lead somewhere, its names, files and commands exist, its code runs."""

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import ROOT, write_coco

import losses
import models
import utils
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
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert linked.is_relative_to(ROOT)
        if place:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), f"{page.name}: {target}"


README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_lines(text: str) -> list[str]:
    """The indented lines of a page, without their indentation, and what stands between backticks."""
    return re.findall(r"^ {4}(.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)


def test_the_tree_names_every_python_file():
    tree = README.split("## What to read")[1].split("\nEach name in this list")[0]
    folder, names = "", []
    for indent, name in re.findall(r"^ {4}( *)(\S+)", tree, re.MULTILINE):
        folder = folder if indent else ""
        names.append(folder + name)
        folder = name if name.endswith("/") else folder
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    outside = ("tests/", "benchmarks/")
    files = [name for name in tracked if not name.startswith(outside) and not name.endswith("__init__.py")]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(files)
    assert all((ROOT / name).exists() for name in names)


@functools.cache
def help_of(*command: str) -> str:
    """What a command prints with --help."""
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


VERBS = "fetch check split run compare search export".split()
COMMAND = re.compile(
    r"^(?:python|accelerate launch|torchrun|\.venv\S+python)\b.*?(?: -m (\S+)|(\w+)\.py)(.*)$"
)


def test_every_command_of_the_readme_exists():
    targets = " ".join(
        re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    ).split()
    checked = 0
    for line in code_lines(README):
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        elif command := COMMAND.match(line):
            module, script, arguments = command.groups()
            if module in ("venv", "benchmarks"):
                continue
            file = ROOT / (f"{script}.py" if script else f"{module.replace('.', '/')}.py")
            assert file.is_file(), line
            verb = [word for word in arguments.split()[:1] if word in VERBS]
            if not verb and script == "evaluate" and arguments:
                verb = ["run"]
            flags = re.findall(r"--\w+", arguments)
            text = help_of(*(["-m", module] if module else [file.name]), *verb) if flags or verb else ""
            assert all(f"{flag} " in text or f"{flag}\n" in text for flag in flags), line
            files = [
                word for word in arguments.split() if re.match(r"(configs|notebooks)/|main\.ipynb", word)
            ]
            assert all((ROOT / name).is_file() for name in files), line
            checked += 1
    assert checked >= 15


def test_the_architecture_page_names_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py): (\w+)`", text)
    assert 5 < len({file for file, _ in named}) <= 14
    for file, name in named:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        assert name in {getattr(node, "name", "") for node in body}, f"{file} has no {name}"
    assert all((ROOT / path).exists() for path in re.findall(r"`([\w/]+(?:\.py|/))`", text))


def test_the_architecture_page_explains_each_line_of_the_loop():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    lines = [line.split("  #")[0].strip() for line in inspect.getsource(utils.train_epoch).splitlines()]
    first = lines.index(explained[0])
    loop = [line for line in lines[first:] if line != "if scheduler is not None:" and line[:6] != "return"]
    assert explained == loop


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
    *"DATA_DIR FAST_RUN KAGGLE_USERNAME KAGGLE_KEY KAGGLEHUB_CACHE TEXT_TOWERS".split(),
    *"image_id text_id image_features text_features logit_scale".split(),
)


OWN_PAGES = [page for page in PAGES[1:] if page.parent.name != "coming_from"]  # those name what others have


@pytest.mark.parametrize("page", OWN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
                assert re.search(r"measured|estimated|not practical", cell), f"{page.name}: {cell}"


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
    """The images of a small set with their captions as lines of a table."""
    write_coco(home / "my_images", {"train": 16, "val": 8})
    lines = []
    for split in ("train", "val"):
        annotations = json.loads((home / f"my_images/annotations/captions_{split}2014.json").read_text())
        names = {image["id"]: image["file_name"] for image in annotations["images"]}
        lines += [
            f"{split}2014/{names[a['image_id']]}\t{split}\t{a['caption']}" for a in annotations["annotations"]
        ]
    (home / "my_images" / "captions.tsv").write_text("\n".join(lines))


def test_the_extensions_train_together(tmp_path):
    write_tsv(tmp_path)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks()) + CHECK
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (result["tower"], result["width"], result["head"]) == ("Conv2d", 64, "DeepHead")
    assert (result["loss"], result["finished"]) == ("TextToImageLoss", True)
    assert 0 <= result["recall"][0] <= 1
