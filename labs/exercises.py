"""Lab 5: checks that compare a student's function with the lab's own implementation on small numbers.

`check(globals(), "info_nce")` calls the notebook's function on a few examples. A wrong result is compared with the
results of typical mistakes, so that the message names the mistake and not only the difference.
"""

from __future__ import annotations

import _thread
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from core.errors import LabError, choose
from labs import solutions
from losses import InfoNCELoss
from metrics import retrieval_metrics
from models import AttentionPooling, HeadOptions, mlp_head
from retrieval.index import nearest_rows

SECONDS = 20.0  # until a function counts as one that does not end; the slowest solution takes 0.1 s
TOLERANCE = 1e-4
MISTAKES = Path(__file__).with_name("mistakes.yaml")

Case = tuple[Any, ...]


class WrongAnswerError(LabError):
    """What is wrong with a student's function: a sentence that continues the function's name."""


@dataclass(frozen=True)
class Exercise:
    """A function to write.

    Args:
        points: what a correct function earns.
        expected: the right result for a case's arguments, from the lab's own implementation.
        cases: makes the arguments of each call; the same on every machine.
        run: calls a function where its result is not simply `function(*case)`.
    """

    points: int
    expected: Callable[..., Any]
    cases: Callable[[], list[Case]]
    run: Callable[..., Any] = lambda function, *case: function(*case)


def check(names: Mapping[str, Any], name: str, seconds: float = SECONDS) -> int:
    """Check the function `name` among a notebook's `names` (`globals()`), and print one sentence.

    Returns: the points earned, which nbgrader reads from the cell's output; 0 where something is wrong.
    """
    exercise = choose(EXERCISES, name, "exercise")
    try:
        if not callable(names.get(name)):
            raise WrongAnswerError("is not defined: write it in the cell above and run that cell.")
        for case in exercise.cases():
            _check_case(name, names[name], case, seconds)
    except WrongAnswerError as error:
        print(f"{name} {error}")
        return 0
    print(f"{name} is correct.")
    return exercise.points


def _check_case(name: str, function: Callable[..., Any], case: Case, seconds: float) -> None:
    """Raises: WrongAnswerError if the function's result is not the expected one."""
    exercise = EXERCISES[name]
    expected = torch.as_tensor(exercise.expected(*case))
    result = _call(exercise.run, function, case, seconds)
    if isinstance(result, (bool, int, float)):
        result = torch.tensor(result)
    if not isinstance(result, Tensor):
        raise WrongAnswerError(f"returns a {type(result).__name__}: return a tensor.")
    if result.shape != expected.shape:
        hint = "; a transpose is missing" if result.shape == expected.mT.shape else ""
        shapes = f"{tuple(result.shape)}, but the result has the shape {tuple(expected.shape)}"
        raise WrongAnswerError(f"returns the shape {shapes}{hint}.")
    result = result.detach().to(expected.dtype)
    if not result.isfinite().all():
        raise WrongAnswerError("returns NaN or infinite numbers: look for a division by zero or log(0).")
    if _equal(result, expected):
        return
    for sentence, wrong in mistakes(name).items():
        if _equal(result, exercise.run(wrong, *case)):
            raise WrongAnswerError(sentence)
    raise WrongAnswerError(_difference(result, expected))


def _call(run: Callable[..., Any], function: Callable[..., Any], case: Case, seconds: float) -> Any:
    try:
        with time_limit(seconds):
            return run(function, *case)
    except WrongAnswerError:
        raise
    except TimeoutError:
        raise WrongAnswerError(f"did not end within {seconds:g} s: look for a loop without an end.") from None
    except NotImplementedError:
        raise WrongAnswerError("is still empty: write it in the cell above.") from None
    except Exception as error:  # whatever a student's code raises
        raise WrongAnswerError(f"stopped with {type(error).__name__}: {error}") from error


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within, code that takes longer is interrupted as by Ctrl-C. Raises: TimeoutError."""
    late = threading.Event()

    def interrupt() -> None:
        late.set()
        _thread.interrupt_main()

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not late.is_set():
            raise
        raise TimeoutError from None
    finally:
        timer.cancel()


def mistakes(name: str) -> dict[str, Callable[..., Any]]:
    """Functions with a typical mistake each, by the sentence that explains it."""
    source = inspect.getsource(getattr(solutions, name))
    functions = {}
    for mistake in yaml.safe_load(MISTAKES.read_text())[name]:
        namespace = dict(vars(solutions))
        exec(source.replace(mistake["right"], mistake["wrong"]), namespace)
        functions[mistake["says"]] = namespace[name]
    return functions


def _equal(result: Tensor, other: Tensor) -> bool:
    return result.shape == other.shape and torch.allclose(
        result, other.to(result), rtol=TOLERANCE, atol=TOLERANCE
    )


def _difference(result: Tensor, expected: Tensor) -> str:
    if _equal(result, -expected):
        return "has the wrong sign."
    place = (result - expected).abs().double().argmax()
    index = [int(number) for number in torch.unravel_index(place, expected.shape)]
    yours, right = (values[tuple(index)].item() for values in (result, expected))
    return f"returns {yours:.4g}{f' at position {index}' if index else ''}, but {right:.4g} is right."


# --- Arguments and expected results ---


def _unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _fill(module: nn.Module) -> nn.Module:
    """The module with weights that are the same on every machine."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(_unit(*parameter.shape, seed=number))
    return module


ONE, SEVERAL = torch.arange(4), torch.tensor([2, 0, 1, 1, 0, 2, 2])


def _batches(*more: Any) -> list[Case]:
    """Features and ids of one caption per image, then of several in another order than the images."""
    one = (_unit(4, 6), _unit(4, 6, seed=1), ONE, ONE, *more)
    return [one, (_unit(3, 6), _unit(7, 6, seed=1), ONE[:3], SEVERAL, *more)]


def _attention_cases() -> list[Case]:
    return [(4 * _unit(2, 16, 3, 4), _fill(AttentionPooling(16).score))]


def _attention(feature_map: Tensor, score: nn.Module) -> Tensor:
    pooling = AttentionPooling(feature_map.shape[1])
    pooling.score = score  # type: ignore[assignment]
    return pooling(feature_map)


def _own_head(width: int, hidden_dim: int, embed_dim: int) -> nn.Module:
    return mlp_head(width, embed_dim, HeadOptions(hidden_dim=hidden_dim, batch_norm=True))


def _run_head(build: Callable[..., Any], *widths: int) -> Tensor:
    """(2, 5, embed_dim) output in training, then in evaluation, with fixed weights."""
    own, head = _own_head(*widths), build(*widths)
    if not isinstance(head, nn.Module):
        raise WrongAnswerError(f"returns a {type(head).__name__}: return an nn.Module such as nn.Sequential.")
    ours, theirs = ([tuple(p.shape) for p in module.parameters()] for module in (own, head))
    if ours != theirs:
        norms = sum(isinstance(part, nn.BatchNorm1d) for part in head.modules())
        counts = "" if norms == 2 else f"; it has {norms} BatchNorm1d, not 2, one after each linear layer"
        raise WrongAnswerError(f"has parameters of the shapes {theirs}, but {ours} are right{counts}.")
    rows = 3 * _unit(5, widths[0], seed=9) + 1
    return torch.stack([_fill(head).train()(rows), head.eval()(rows)])


def _info_nce(images: Tensor, texts: Tensor, image_id: Tensor, text_id: Tensor) -> Tensor:
    return InfoNCELoss()(images, texts, torch.tensor(5.0), image_id=image_id, text_id=text_id)


def _run_info_nce(function: Callable[..., Any], images: Tensor, texts: Tensor, *ids: Tensor) -> Any:
    return function(images, texts, 5.0, *ids)


def _hard_negatives(images: Tensor, texts: Tensor, image_id: Tensor, text_id: Tensor, k: int) -> Tensor:
    return nearest_rows(images, texts, k, image_id, text_id)[1]


def _recall_cases() -> list[Case]:
    collapsed = torch.ones(4, 2) / 2**0.5  # every score is equal
    return [*_batches(1), *_batches(2), (collapsed, collapsed, ONE, ONE, 2)]


def _recall(images: Tensor, texts: Tensor, image_id: Tensor, text_id: Tensor, k: int) -> float:
    return retrieval_metrics(images, texts, image_id, text_id, ks=(k,))[f"t2i_recall@{k}"]


def _zero_shot(images: Tensor, prompts: Tensor, scale: float) -> Tensor:
    return torch.softmax(scale * F.cosine_similarity(images[:, None], prompts.mean(1)[None], dim=2), 1)


def _encoder() -> nn.Module:
    return _fill(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)))


def _loss_over(texts: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(image_features: Tensor) -> Tensor:
        if len(image_features) != len(texts):
            raise ValueError(
                f"the loss compares the features of all {len(texts)} images, not of {len(image_features)}; "
                "encode all pieces before it."
            )
        return InfoNCELoss()(F.normalize(image_features, dim=1), texts, torch.tensor(5.0))

    return loss


def _two_passes(images: Tensor, texts: Tensor, size: int) -> Tensor:
    encoder = _encoder()
    _loss_over(texts)(encoder(images)).backward()
    return _gradients(encoder)


def _run_two_passes(step: Callable[..., Any], images: Tensor, texts: Tensor, size: int) -> Tensor:
    """The encoder's gradients after a step, in one row."""
    encoder, sizes = _encoder(), [0]
    encoder.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]) * torch.is_grad_enabled())
    )
    step(encoder, _loss_over(texts), images, size)
    if max(sizes) > size:
        raise WrongAnswerError(
            f"encodes {max(sizes)} images at once with gradients: encode at most {size}, the piece size."
        )
    if any(parameter.grad is None for parameter in encoder.parameters()):
        raise WrongAnswerError("leaves the encoder without gradients: call backward for every piece.")
    return _gradients(encoder)


def _gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None])


def _interval_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    image_id = torch.arange(30).repeat_interleave(torch.arange(30) % 3 + 1)  # one to three captions per image
    hits = torch.rand(len(image_id), generator=generator) < torch.rand(30, generator=generator)[image_id]
    return [(hits.float(), image_id, torch.randint(30, (400, 30), generator=generator))]


def _interval(hits: Tensor, image_id: Tensor, draws: Tensor) -> np.ndarray:
    groups = [hits[image_id == image].numpy() for image in range(draws.shape[1])]
    recalls = [np.concatenate([groups[image] for image in draw]).mean() for draw in draws.tolist()]
    return np.percentile(recalls, [2.5, 97.5])


EXERCISES: dict[str, Exercise] = {
    "attention_pooling": Exercise(2, _attention, _attention_cases),
    "projection_head": Exercise(
        2, lambda *widths: _run_head(_own_head, *widths), lambda: [(6, 8, 4)], _run_head
    ),
    "info_nce": Exercise(3, _info_nce, _batches, _run_info_nce),
    "hard_negatives": Exercise(2, _hard_negatives, lambda: _batches(2)),
    "recall_at_k": Exercise(3, _recall, _recall_cases),
    "zero_shot": Exercise(2, _zero_shot, lambda: [(_unit(5, 6), _unit(3, 4, 6, seed=1), 10.0)]),
    "two_passes": Exercise(3, _two_passes, lambda: [(_unit(7, 5), _unit(7, 4, seed=1), 3)], _run_two_passes),
    "interval_over_images": Exercise(3, _interval, _interval_cases),
}
"""What there is to write, by the function's name; notebooks/5_write_it_yourself.ipynb has the tasks."""
