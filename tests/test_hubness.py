"""Scoring rules against loops written out in float64, planted hubs, and parameters chosen on validation data."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from evaluated import config_of, write_home, write_run

import evaluate
from core.errors import LabError
from metrics import metrics_table
from reports import hubs
from retrieval.figures import summarise
from retrieval.hubness import (
    RULES,
    choose_parameters,
    corrected_ranks,
    corrections,
    hub_skewness,
    nnn,
    qb_norm,
    times_retrieved,
)
from retrieval.ranks import Ranks, match_ranks
from utils import load_run

CAPTIONS, WIDTH = 3, 12


def split(images, seed, noise=0.6):
    """Images, captions near them, and their ids."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(images, WIDTH, generator=generator))
    text = image.repeat_interleave(CAPTIONS, 0)
    text = F.normalize(text + noise * torch.randn(text.shape, generator=generator))
    ids = torch.arange(images) + 1000 * seed
    return {
        "image_features": image,
        "text_features": text,
        "image_id": ids,
        "text_id": ids.repeat_interleave(CAPTIONS),
    }


def features_of(data):
    return {name: data[name] for name in ("image_features", "text_features")}


def rows(features):
    return features.double().numpy().tolist()


def dot(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True))


def looped_nnn(queries, gallery, bank, k, alpha):
    """(Q, N) corrected scores."""
    bias = []
    for item in rows(gallery):
        nearest = sorted((dot(item, reference) for reference in rows(bank)), reverse=True)[:k]
        bias.append(alpha * sum(nearest) / len(nearest))
    return [
        [dot(query, item) - b for item, b in zip(rows(gallery), bias, strict=True)] for query in rows(queries)
    ]


def looped_qb_norm(queries, gallery, bank, beta):
    """(Q, N) probabilities of QB-Norm's dynamic inverted softmax, or similarities for queries that it leaves alone."""
    items, references = rows(gallery), rows(bank)
    active = {max(range(len(items)), key=lambda n: dot(reference, items[n])) for reference in references}
    sums = [sum(np.exp(beta * dot(reference, item)) for reference in references) for item in items]
    scores = []
    for query in rows(queries):
        similarities = [dot(query, item) for item in items]
        if int(np.argmax(similarities)) in active:
            similarities = [np.exp(beta * s) / total for s, total in zip(similarities, sums, strict=True)]
        scores.append(similarities)
    return scores


def looped_ranks(scores, query_ids, gallery_ids):
    """Rank of each query's nearest match, its rivals that score as much counted before it."""
    ranks = []
    for own, query_id in zip(scores, query_ids.tolist(), strict=True):
        matches = [s for s, ident in zip(own, gallery_ids.tolist(), strict=True) if ident == query_id]
        rivals = [s for s, ident in zip(own, gallery_ids.tolist(), strict=True) if ident != query_id]
        ranks.append(1 + sum(rival >= max(matches) for rival in rivals))
    return ranks


LOOPED = {"nnn": (looped_nnn, {"k": 5, "alpha": 0.8}), "qb_norm": (looped_qb_norm, {"beta": 15})}


@pytest.mark.parametrize("rule", LOOPED)
def test_ranks_are_those_of_loops_in_float64(rule):
    looped, parameters = LOOPED[rule]
    data, bank = split(40, 1), split(25, 2)
    both = {"i2t": parameters, "t2i": parameters}
    made = corrections(rule, both, features_of(bank), **features_of(data))
    images, texts = data["image_features"], data["text_features"]
    expected = {
        "i2t": looped_ranks(
            looped(images, texts, bank["image_features"], **parameters), data["image_id"], data["text_id"]
        ),
        "t2i": looped_ranks(
            looped(texts, images, bank["text_features"], **parameters), data["text_id"], data["image_id"]
        ),
    }
    plain = match_ranks(**data)
    for way in ("i2t", "t2i"):
        assert corrected_ranks(way, made[way], **data).best.tolist() == expected[way]
        assert getattr(plain, way).best.tolist() != expected[way]


def test_qb_norm_leaves_queries_alone_that_no_bank_query_is_like():
    gallery = torch.eye(3)
    (correction,) = qb_norm(gallery, torch.tensor([[1.0, 0.0, 0.0]]), [{"beta": 10}])
    assert correction.hubs.tolist() == [True, False, False]
    queries, _ = correction.extended(torch.eye(3), gallery)
    assert queries[:, -1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_equal_items_tie_after_correction(rule):
    """A caption's image ranks one place lower where the gallery has its features twice, under two ids."""
    data, bank = split(700, 3), split(900, 4)
    parameters = RULES[rule].settings(100)[0]
    both = {"i2t": parameters, "t2i": parameters}
    alone = corrected_ranks("t2i", corrections(rule, both, bank, **features_of(data))["t2i"], **data)
    data["image_features"] = torch.cat([data["image_features"], data["image_features"][3:4]])
    data["image_id"] = torch.cat([data["image_id"], torch.tensor([9999])])
    twin = corrections(rule, both, bank, **features_of(data))["t2i"]
    assert twin.bias[700] == twin.bias[3]
    own = slice(3 * CAPTIONS, 4 * CAPTIONS)
    assert corrected_ranks("t2i", twin, **data).best[own].tolist() == (alone.best[own] + 1).tolist()


def planted(seed):
    """A split with one more image, without a caption, that is nearest to nearly every caption."""
    data = split(60, seed)
    shift = F.normalize(torch.ones(1, WIDTH))
    data["text_features"] = F.normalize(data["text_features"] + 2 * shift)
    data["image_features"] = torch.cat([data["image_features"], shift])
    data["image_id"] = torch.cat([data["image_id"], torch.tensor([-1])])
    return data


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_hub_disappears(rule):
    test, dev, bank = planted(5), planted(6), planted(7)
    chosen = choose_parameters(rule, features_of(bank), **dev)
    made = corrections(rule, chosen, features_of(bank), **features_of(test))["t2i"]
    queries, gallery = test["text_features"], test["image_features"]
    before = times_retrieved(queries, gallery, 1)
    after = times_retrieved(*made.extended(queries, gallery), 1)
    assert before[-1] > 0.9 * len(queries)
    assert after[-1] < 0.02 * len(queries)
    assert hub_skewness(after) < hub_skewness(before)
    assert (corrected_ranks("t2i", made, **test).best == 1).mean() > 0.15
    assert (match_ranks(**test).t2i.best == 1).mean() < 0.05


def test_parameters_are_the_best_of_the_grid_on_validation_data():
    dev, bank = split(50, 8), split(30, 9)
    chosen = choose_parameters("nnn", features_of(bank), **dev)
    for way in ("i2t", "t2i"):
        quality = {}
        for parameters in RULES["nnn"].settings(30 if way == "i2t" else 90):
            made = corrections(
                "nnn", {"i2t": parameters, "t2i": parameters}, features_of(bank), **features_of(dev)
            )
            best = corrected_ranks(way, made[way], **dev).best
            quality[tuple(parameters.values())] = ((best == 1).mean(), (1 / best).mean())
        assert quality[tuple(chosen[way].values())] == max(quality.values())


def test_k_is_never_larger_than_the_bank():
    assert {each["k"] for each in RULES["nnn"].settings(20)} == {1, 4, 16}


def test_occurrences_and_their_skewness():
    gallery = torch.eye(4)
    queries = gallery[[0, 0, 0, 2]]
    assert times_retrieved(queries, gallery, 1).tolist() == [3, 0, 1, 0]
    assert hub_skewness(np.array([3, 0, 1, 0])) == pytest.approx(scipy.stats.skew([3, 0, 1, 0]))
    with pytest.raises(LabError, match="not all retrieved equally often"):
        hub_skewness(np.array([2, 2, 2]))


def test_an_unknown_rule_is_named():
    with pytest.raises(LabError, match="scoring rule"):
        choose_parameters("nn", features_of(split(4, 1)), **split(4, 2))


def test_nnn_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    bias = nnn(torch.eye(2), bank, [{"k": 2, "alpha": 0.5}])[0].bias
    assert bias.tolist() == pytest.approx([0.4, 0.2])


# --- in an evaluation ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(config_of(write_home(tmp_path_factory.mktemp("lab")), test_splits=("test",)))


def test_rules_have_rows_of_their_own_and_the_plain_figures_stay(run):
    plain = dict(evaluate.measure_run(run, show=False)["test"])
    gallery = evaluate.open_gallery(run, "test", show=False)
    evaluate.measure_scorings(gallery, show=False)
    saved = load_run(run.folder).metrics["test"]
    scorings = saved.pop("scorings")
    assert saved == plain
    rows = metrics_table(run.metrics).index.get_level_values("").tolist()
    assert rows == ["model, cosine", "model, NNN", "model, QB-Norm", "chance"]
    train = evaluate.open_gallery(run, "train", show=False)
    dev = evaluate.open_gallery(run, "val", show=False)
    bank = features_of(train.features)
    for name, rule in RULES.items():
        chosen = choose_parameters(name, bank, **dev.features)
        made = corrections(name, chosen, bank, **features_of(gallery.features))
        ranks = Ranks(*(corrected_ranks(way, made[way], **gallery.features) for way in ("i2t", "t2i")))
        assert scorings[rule.label]["parameters"] == chosen
        assert scorings[rule.label] | summarise(ranks, gallery.recall_ks) == scorings[rule.label]


def test_the_bank_is_the_training_split_and_parameters_are_chosen_on_the_validation_split(run, monkeypatch):
    opened = []
    real = hubs.open_dataset
    monkeypatch.setattr(
        hubs,
        "open_dataset",
        lambda config, splits, **more: opened.append(splits) or real(config, splits, **more),
    )
    seen = {}
    monkeypatch.setattr(
        hubs,
        "choose_parameters",
        lambda rule, bank, **dev: seen.update(bank=bank, dev=dev) or choose_parameters(rule, bank, **dev),
    )
    again = load_run(run.folder)
    again.metrics = {}
    hubs.split_corrections(evaluate.open_gallery(again, "test", show=False), ["nnn"], show=False)
    assert opened == [("train",), ("val",)]
    for name in ("image", "text"):
        train = evaluate.open_gallery(run, "train", show=False).features[f"{name}_features"]
        dev = evaluate.open_gallery(run, "val", show=False).features
        assert torch.equal(seen["bank"][f"{name}_features"], train)
        assert torch.equal(seen["dev"][f"{name}_id"], dev[f"{name}_id"])


def test_a_search_orders_images_by_corrected_scores(run):
    gallery = evaluate.open_gallery(run, "test", show=False)
    parameters, _ = hubs.split_corrections(gallery, ["nnn"], show=False)["nnn"]
    search = evaluate.open_search(run, scoring="nnn", show=False)
    caption = gallery.captions[7]
    result = search.by_text([caption], k=20)[0]
    bank = evaluate.open_gallery(run, "train", show=False).text_features
    arguments = {"k": int(parameters["t2i"]["k"]), "alpha": parameters["t2i"]["alpha"]}
    query = gallery.text_features[7:8]  # encoded in a batch: not to the last bit what one caption alone gives
    scores = looped_nnn(query, gallery.image_features, bank, **arguments)[0]
    assert result.scores == pytest.approx(sorted(scores, reverse=True), abs=2e-4)
    files = gallery.dataset.image_files(range(20))
    by_file = dict(zip(files, scores, strict=True))
    assert [by_file[file] for file in result.images] == pytest.approx(result.scores, abs=2e-4)
    with pytest.raises(LabError, match="for texts alone"):
        search.by_image([0])


def test_an_unknown_scoring_is_refused_before_the_data_are_opened(run):
    with pytest.raises(LabError, match="scoring"):
        evaluate.open_search(run, "nowhere", scoring="nnm")


def test_a_corrected_search_has_its_rule_in_the_name_of_its_file(run, tmp_path):
    path = evaluate.search_command(run, "a red square", k=2, folder=tmp_path, scoring="qb_norm")
    assert path.name == "a-red-square-qb-norm.png"
    assert path.is_file()
