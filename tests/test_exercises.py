"""Lab 5's checks: the solutions pass, and every mistake is named."""

import numpy as np
import pytest
import torch

from labs import exercises, solutions
from labs.exercises import EXERCISES, check, mistakes
from retrieval.statistics import bootstrap_ends


def verdict(capsys, name, function, **options):
    points = check({name: function}, name, **options)
    return points, capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_correct(name, capsys):
    points, sentence = verdict(capsys, name, getattr(solutions, name))
    assert (points, sentence) == (EXERCISES[name].points, f"{name} is correct.")


@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name in EXERCISES for mistake in mistakes(name)]
)
def test_every_mistake_is_named(name, mistake, capsys):
    assert verdict(capsys, name, mistakes(name)[mistake]) == (0, f"{name} {mistake}")


def test_every_exercise_knows_five_mistakes():
    assert min(len(mistakes(name)) for name in EXERCISES) >= 5


def forever(*arguments):
    while True:
        pass


def empty(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (None, "is not defined: write it in the cell above and run that cell."),
        (empty, "is still empty: write it in the cell above."),
        (lambda *a: 1 / 0, "stopped with ZeroDivisionError: division by zero"),
        (forever, "did not end within 0.2 s: look for a loop without an end."),
        (lambda *a: None, "returns a NoneType: return a tensor."),
        (lambda *a: torch.zeros(4), "returns the shape (4,), but the result has the shape (5, 3)."),
        (
            lambda *a: solutions.zero_shot(*a).T,
            "returns the shape (3, 5), but the result has the shape (5, 3); a transpose is missing.",
        ),
        (
            lambda *a: solutions.zero_shot(*a) / 0,
            "returns NaN or infinite numbers: look for a division by zero or log(0).",
        ),
        (lambda *a: -solutions.zero_shot(*a), "has the wrong sign."),
        (
            lambda *a: solutions.zero_shot(*a) + torch.eye(5, 3),
            "returns 1.888 at position [2, 2], but 0.888 is right.",
        ),
    ],
)
def test_what_else_may_be_wrong_is_one_sentence(function, sentence, capsys):
    points, said = verdict(capsys, "zero_shot", function, seconds=0.2)
    assert points == 0
    assert said.startswith(f"zero_shot {sentence}")
    assert "\n" not in said


def test_a_step_over_the_whole_batch_or_over_single_pieces_is_refused(capsys):
    def whole(encoder, loss, images, piece_size):
        loss(encoder(images)).backward()

    def pieces(encoder, loss, images, piece_size):
        for piece in images.split(piece_size):
            loss(encoder(piece)).backward()

    assert verdict(capsys, "two_passes", whole)[1].endswith(
        "encodes 7 images at once with gradients: encode at most 3, the piece size."
    )
    assert "compares the features of all 7 images, not of 3" in verdict(capsys, "two_passes", pieces)[1]


def test_the_interval_is_the_labs_own():
    hits, image_id, _ = EXERCISES["interval_over_images"].cases()[0]
    draws = torch.randint(30, (20_000, 30), generator=torch.Generator().manual_seed(1))
    sums, counts = (np.bincount(image_id, weights=values) for values in (hits, np.ones(len(hits))))
    low, high = bootstrap_ends(30, lambda drawn: drawn @ sums / (drawn @ counts), samples=20_000)
    assert solutions.interval_over_images(hits, image_id, draws).tolist() == pytest.approx(
        [low, high], abs=0.01
    )


def test_ctrl_c_is_not_taken_for_a_loop_without_an_end():
    def stopped(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check({"zero_shot": stopped}, "zero_shot")
    assert exercises.SECONDS == 20
