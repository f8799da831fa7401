"""The generated scenes: what captions say is true, differs between images, and is what is drawn."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import LabError
from sources import drawing, scenes
from sources.drawing import write_scenes
from sources.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, Scene, SceneObject, describe, swap_captions

SMALL = {"num_train": 70, "num_val": 5, "num_test": 6, "num_novel": 7, "image_size": 64}


# ---- a reader of captions, written without the generator's tables ----

NOUN = re.compile(
    r"(?:(small|little|large|big) )?(?:(plain|striped|dotted|spotted) )?"
    r"(red|orange|yellow|green|turquoise|blue|purple|pink|black) "
    r"(circle|square|triangle|star|heart|cross|ring|crescent|diamond)\b"
)
SAME = {"little": "small", "big": "large", "spotted": "dotted", "under": "below"}
LONE = re.compile(r"\b(just one|single|on its own|nothing but|lone|nothing else|alone|only|with one)\b")
GROUND = re.compile(
    r"(plain|cloudy)? ?(cream|grey|light blue|light green|lilac) (background|gradient|grid|checkerboard)"
)


@dataclass
class Claims:
    """What a caption says: attributes by pair, (pair, where, pair), the background, a lone object's place."""

    things: dict[tuple[str, str], dict[str, str]]
    relations: list[tuple[tuple[str, str], str, tuple[str, str]]]
    tint: str | None
    kind: str | None
    place: str | None
    lone: bool


def read(caption: str) -> Claims:
    text = caption.lower().rstrip(".")
    nouns = list(NOUN.finditer(text))
    pairs = [(noun[3], noun[4]) for noun in nouns]
    things: dict[tuple[str, str], dict[str, str]] = {}
    for noun, pair in zip(nouns, pairs, strict=True):
        said = {"size": noun[1], "surface": noun[2]}
        things.setdefault(pair, {}).update({k: SAME.get(v, v) for k, v in said.items() if v})
    relations = []
    for k, noun in enumerate(nouns):
        rest = text[noun.end() : nouns[k + 1].start() if k + 1 < len(nouns) else len(text)]
        if found := re.match(r" to its (left|right)| (above|below) it", rest):
            relations.append((pairs[k], found[1] or found[2], pairs[k - 1]))
        elif k + 1 < len(nouns) and (found := re.search(r"(left|right) of |(above|below|under) ", rest)):
            where = found[1] or found[2]
            relations.append((pairs[k], SAME.get(where, where), pairs[k + 1]))
    ground = GROUND.search(text)
    kind = None
    if ground:
        named = {"gradient": "gradient", "grid": "grid", "checkerboard": "checked"}
        kind = ground[1] or named.get(ground[3])
    spot = re.search(r"(?:at the|on the|in the) (top left|top right|bottom left|bottom right|top|bottom"
                     r"|left side|right side|middle)", text)  # fmt: skip
    lone = LONE.search(text) is not None
    return Claims(things, relations, ground[2] if ground else None, kind, spot[1] if spot else None, lone)


def place_of(thing: SceneObject) -> str:
    column = {0: "left", 1: "", 2: "right"}[int(np.digitize(thing.x, [0.39, 0.61]))]
    row = {0: "top", 1: "", 2: "bottom"}[int(np.digitize(thing.y, [0.39, 0.61]))]
    return f"{row} {column}".strip() if row else f"{column} side" if column else "middle"


def fits(claims: Claims, scene: Scene, closed: bool) -> bool:
    """Whether every claim is true; `closed` also takes what is not claimed to be absent."""
    by_pair = {thing.pair: thing for thing in scene.objects}
    if not claims.things.keys() <= by_pair.keys():
        return False
    if len(scene.objects) != len(claims.things) and (closed or claims.lone):
        return False
    for pair, said in claims.things.items():
        if any(getattr(by_pair[pair], name) != value for name, value in said.items()):
            return False
    for a, where, b in claims.relations:
        dx, dy = by_pair[a].x - by_pair[b].x, by_pair[a].y - by_pair[b].y
        sure = {"left": -dx > abs(dy), "right": dx > abs(dy), "above": -dy > abs(dx), "below": dy > abs(dx)}
        if not sure[where]:
            return False
    if claims.tint not in (None, scene.tint) or claims.kind not in (None, scene.background):
        return False
    return claims.place is None or claims.place == place_of(scene.objects[0])


def planned(split: str, count: int, seed: int = 0) -> list[tuple[Scene, list[str]]]:
    plan = scenes.plan_split(split, count, seed)
    return [(scene, describe(scene, random.Random(k))) for k, scene in enumerate(plan)]


# ---- captions ----


def test_reader_on_captions_written_by_hand():
    claims = read(
        "An orange star with a small spotted red ring to its left, and a blue cross is under the red ring."
    )
    star, ring, cross = ("orange", "star"), ("red", "ring"), ("blue", "cross")
    assert claims.things == {star: {}, ring: {"size": "small", "surface": "dotted"}, cross: {}}
    assert claims.relations == [(ring, "left", star), (cross, "below", ring)]
    claims = read(
        "A single big plain pink heart at the top left of the picture; behind it is a cloudy grey background."
    )
    assert (claims.place, claims.kind, claims.tint, claims.lone) == ("top left", "cloudy", "grey", True)


@pytest.mark.parametrize("split", ["train", "novel"])
def test_every_caption_is_true_and_names_every_object(split):
    for scene, captions in planned(split, 400):
        for caption in captions:
            assert fits(read(caption), scene, closed=True), (caption, scene)


def test_captions_are_five_distinct_sentences_of_right_english():
    articles: Counter[str] = Counter()
    for _, captions in planned("test", 400):
        assert len(set(captions)) == 5
        for caption in captions:
            assert re.fullmatch(r"[A-Z][a-z ,;:.]*( [A-Z][a-z ]*)?\.", caption) or ". Behind" in caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,|\{|\}", caption.lower()), caption
            articles.update(re.findall(r"\b(an?) orange", caption.lower()))
    assert articles["a"] == 0
    assert articles["an"] > 50


def test_last_caption_tells_everything():
    for scene, captions in planned("test", 200):
        claims = read(captions[-1])
        assert (claims.tint, claims.kind) == (scene.tint, scene.background)
        assert claims.things == {o.pair: {"size": o.size, "surface": o.surface} for o in scene.objects}
        assert len(claims.relations) == len(scene.objects) - 1


@pytest.mark.parametrize(("split", "count"), [("val", 200), ("test", 500), ("novel", 500)])
def test_a_perfect_reader_finds_the_image(split, count):
    plan = planned(split, count)
    shown = [frozenset(thing.pair for thing in scene.objects) for scene, _ in plan]
    only: Counter[bool] = Counter()
    for _, captions in plan:
        for claims in map(read, captions):
            near = [
                scene for (scene, _), pairs in zip(plan, shown, strict=True) if claims.things.keys() <= pairs
            ]
            for closed in (True, False):
                only[closed] += sum(fits(claims, scene, closed) for scene in near) == 1
    print(f"{split}, of {5 * count} captions fit one image: {only[True]} closed, {only[False]} open world")
    assert only[True] == 5 * count
    assert only[False] >= 0.99 * 5 * count


def test_crowded_split_still_has_distinct_full_descriptions():
    plan = scenes.plan_split("novel", 2500, 0)
    assert len({scenes.wording(scene) for scene in plan}) == 2500


def test_swaps_are_true_and_false():
    kinds: Counter[str] = Counter()
    for scene, _ in planned("novel", 150) + planned("test", 150):
        swaps = swap_captions(scene)
        assert len(swaps) == 0 or len(scene.objects) > 1
        for swap in swaps:
            kinds[swap.kind] += 1
            assert fits(read(swap.right), scene, closed=False)
            assert not fits(read(swap.wrong), scene, closed=False)
            if swap.kind == "colour":
                assert not set(read(swap.wrong).things) & set(HELD_OUT_PAIRS)
                assert sorted(re.findall(r"\w+", swap.right.lower().replace("an ", "a "))) == sorted(
                    re.findall(r"\w+", swap.wrong.lower().replace("an ", "a "))
                )
    assert kinds["relation"] > 200
    assert kinds["colour"] > 60


# ---- splits and layout ----


def test_held_out_pairs_are_seen_in_novel_alone():
    assert len(set(HELD_OUT_PAIRS)) == 18
    assert set(Counter(colour for colour, _ in HELD_OUT_PAIRS).values()) == {2}
    assert set(Counter(shape for _, shape in HELD_OUT_PAIRS).values()) == {2}
    shown = {
        split: [{o.pair for o in scene.objects} for scene in scenes.plan_split(split, 500, 0)]
        for split in scenes.SPLITS
    }
    for split in ("train", "val", "test"):
        assert not set().union(*shown[split]) & set(HELD_OUT_PAIRS)
    assert all(pairs & set(HELD_OUT_PAIRS) for pairs in shown["novel"])
    assert set().union(*shown["train"]) == set(scenes.KNOWN_PAIRS)
    assert set().union(*shown["novel"]) >= set(HELD_OUT_PAIRS)


def test_objects_lie_inside_and_apart():
    for scene in scenes.plan_split("train", 500, 0):
        assert 1 <= len(scene.objects) <= 3
        for o in scene.objects:
            assert o.radius <= min(o.x, o.y, 1 - o.x, 1 - o.y)
        for a, b in combinations(scene.objects, 2):
            assert a.pair != b.pair
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_a_longer_split_begins_with_the_shorter_one():
    assert scenes.plan_split("test", 40, 3) == scenes.plan_split("test", 80, 3)[:40]
    assert scenes.plan_split("test", 40, 3) != scenes.plan_split("test", 40, 4)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "set", **SMALL, num_workers=1)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout_is_cocos(written):
    image_ids, caption_ids = [], []
    for split, count in zip(scenes.SPLITS, (70, 5, 6, 7), strict=True):
        captions = json.loads((written / "annotations" / f"captions_{split}2014.json").read_text())
        assert captions.keys() == {"info", "licenses", "images", "annotations"}
        assert len(captions["images"]) == count
        for image in captions["images"]:
            assert image["file_name"] == f"COCO_{split}2014_{image['id']:012d}.jpg"
            with Image.open(written / f"{split}2014" / image["file_name"]) as image_file:
                assert (image_file.format, image_file.mode, image_file.size) == ("JPEG", "RGB", (64, 64))
            assert (image["height"], image["width"]) == (64, 64)
        per_image = Counter(row["image_id"] for row in captions["annotations"])
        assert per_image == {image["id"]: 5 for image in captions["images"]}
        image_ids += [image["id"] for image in captions["images"]]
        caption_ids += [row["id"] for row in captions["annotations"]]
    assert len(set(image_ids)) == len(image_ids) == 88
    assert len(set(caption_ids)) == len(caption_ids) == 440


def test_saved_scenes_are_those_that_were_drawn(written):
    assert list(drawing.load_scenes(written, "train").values()) == scenes.plan_split("train", 70, 0)


def test_same_bytes_whatever_the_number_of_workers(written, tmp_path):
    assert digests(write_scenes(tmp_path / "two", **SMALL, num_workers=2)) == digests(written)
    other = digests(write_scenes(tmp_path / "seed", **SMALL, seed=1, num_workers=1))
    same_name = next(name for name in other if name.endswith("1000000.jpg"))
    assert other[same_name] != digests(written)[same_name]


def test_a_finished_set_is_left_alone_and_others_refused(written):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert write_scenes(written, **SMALL) == written
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before
    with pytest.raises(LabError, match=r"other settings \(seed 0, not 7\); choose another folder or delete"):
        write_scenes(written, **SMALL, seed=7)


def test_an_unfinished_set_is_written_again(written, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    monkeypatch.setattr(drawing, "in_processes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_scenes(folder, **(SMALL | {"num_train": 90}))
    assert not folder.exists()
    monkeypatch.undo()
    assert digests(write_scenes(folder, **SMALL, num_workers=1)) == digests(written)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_foreign_files_are_never_overwritten(tmp_path):
    (tmp_path / "train2014").mkdir()
    with pytest.raises(LabError, match="was not made by write_scenes; choose another folder"):
        write_scenes(tmp_path, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="choose another folder"):
        write_scenes(tmp_path / "file", **SMALL)


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(LabError, match="num_val is 0; set it between 1 and"):
        write_scenes(tmp_path, num_val=0)
    with pytest.raises(LabError, match="image_size is 8; set it between 48 and 1024"):
        write_scenes(tmp_path, image_size=8)
    with pytest.raises(LabError, match="make the set with write_scenes"):
        drawing.load_scenes(tmp_path, "train")


# ---- images ----


def make(shape: str, colour: str = "blue", surface: str = "plain", background: str = "plain") -> Scene:
    return Scene(background, "cream", (SceneObject(shape, colour, "large", surface, 0.45, 0.55, 0.2, 7.0),))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_where_the_scene_says(shape):
    scene = make(shape)
    with_it = np.asarray(drawing.render(scene, random.Random(0), 224)).astype(int)
    without = np.asarray(drawing.render(replace(scene, objects=()), random.Random(0), 224)).astype(int)
    ys, xs = np.nonzero(np.abs(with_it - without).max(axis=-1) > 110)
    thing, turn = scene.objects[0], np.radians(scene.objects[0].angle)
    outline = np.array(scenes.OUTLINES[shape]) @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    corners = (outline * thing.radius + [thing.x, thing.y]) * 224
    drawn = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert drawn == pytest.approx((*corners.min(axis=0), *corners.max(axis=0)), abs=2.5)


@pytest.mark.parametrize("colour", COLOURS)
def test_middle_of_a_plain_square_has_its_colour(colour):
    image = np.asarray(drawing.render(make("square", colour), random.Random(0)))
    distances = {c: np.linalg.norm(image[61, 50] - np.array(rgb)) for c, rgb in scenes.PAINTS.items()}
    assert min(distances, key=lambda c: distances[c]) == colour


def test_surfaces_and_backgrounds_look_different():
    squares = {
        s: np.asarray(drawing.render(make("square", surface=s), random.Random(0))) for s in scenes.SURFACES
    }
    spread = {surface: image[50:73, 40:61].std(axis=(0, 1)).max() for surface, image in squares.items()}
    assert spread["plain"] == 0
    assert min(spread["striped"], spread["dotted"]) > 40
    images = [
        drawing.render(make("star", background=b), random.Random(0)).tobytes() for b in scenes.BACKGROUNDS
    ]
    assert len(set(images)) == len(scenes.BACKGROUNDS)
