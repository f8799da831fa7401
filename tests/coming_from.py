"""The pages docs/coming_from/*.md, made from their tables and core/aliases.yaml: `python -m tests.coming_from`."""

from __future__ import annotations

import csv
from pathlib import Path

from core.settings_files import layouts

PAGES = Path(__file__).resolve().parent.parent / "docs" / "coming_from"
LABS = {
    "coco": ("CLIP on COCO: a notebook, ResNet50 and frozen CLIP text", "coco_resnet50", None),
    "projection_heads": (
        "projection heads over SigLIP and E5 embeddings",
        "projection_heads",
        "projection_heads",
    ),
    "paired_cifar": (
        "a vision transformer on paired CIFAR-100 images",
        "paired_cifar_baseline",
        "paired_cifar",
    ),
    "retrieval_finetuning": ("CLIP fine-tuned for retrieval", "retrieval_finetune", "retrieval_finetune"),
    "flickr30k": ("CLIP from scratch on Flickr30k", "clip_from_scratch", "clip_from_scratch"),
}
"""Page -> what the other lab is, the preset that is nearest to it, and its layout in core/aliases.yaml."""

STATUS = {
    "same": "as there",
    "other name": "other name",
    "partly": "partly",
    "no": "not here",
}


def rows_of(lab: str) -> list[dict[str, str]]:
    """The table of a lab: feature, what to type here, status, test."""
    with open(PAGES / f"{lab}.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def meaning(target: object) -> str:
    """What a name of the alias table becomes."""
    if isinstance(target, str):
        return ", ".join(f"`{field}`" for field in target.split())
    assert isinstance(target, dict)
    if "function" in target:
        return target["function"].replace("_", " ")
    parts = []
    for value, settings in target.items():
        fields = (
            ", ".join(f"`{field}: {setting}`" for field, setting in settings.items()) or "as in the preset"
        )
        parts.append(f"{str(value).lower() if isinstance(value, bool) else value}: {fields}")
    return "; ".join(parts)


def page(lab: str) -> str:
    """A lab's page in Markdown."""
    title, preset, layout = LABS[lab]
    lines = [f"# Coming from {title}", ""]
    lines += [f"The nearest preset is `{preset}`. What that lab's pages print, and what to type here:", ""]
    lines += ["| there | here | |", "|---|---|---|"]
    lines += [
        f"| {row['feature']} | {row['what to type here']} | {STATUS[row['status']]} |" for row in rows_of(lab)
    ]
    if layout:
        presets = ", ".join(f"`{name}`" for name in layouts()[layout]["presets"])
        signs = ", ".join(f"`{name}`" for name in layouts()[layout]["signs"])
        lines += ["", "## Names of settings", ""]
        lines += [
            f"In files with one of the presets {presets}, or without a preset and with one of {signs}:",
            "",
        ]
        lines += ["| there | here |", "|---|---|"]
        lines += [f"| `{key}` | {meaning(target)} |" for key, target in layouts()[layout]["keys"].items()]
    return "\n".join(lines) + "\n"


def index() -> str:
    """The index of the pages, with counts."""
    lines = ["# Coming from another lab", ""]
    lines += [
        "Settings files, commands and snippets of these labs work here as they are, or have a counterpart.",
        "",
    ]
    lines += [f"| page | features | {' | '.join(STATUS.values())} |", f"|---|---|{'---|' * len(STATUS)}"]
    for lab, (title, *_) in LABS.items():
        statuses = [row["status"] for row in rows_of(lab)]
        counts = " | ".join(str(statuses.count(status)) for status in STATUS)
        lines.append(f"| [{title[0].upper()}{title[1:]}]({lab}.md) | {len(statuses)} | {counts} |")
    lines += [
        "",
        "Each table is a file `.tsv` beside its page, with the test of each row. [Needs](needs.md): memory",
    ]
    lines[-1] += " of each preset."
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name in LABS:
        (PAGES / f"{name}.md").write_text(page(name), encoding="utf-8")
    (PAGES / "README.md").write_text(index(), encoding="utf-8")
