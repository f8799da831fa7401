"""`fit(config)` trains, checkpoints and resumes a run; `python train.py` is the same from a shell."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from cli import run_command
from config import Config, make_config, run_name
from distributed import is_main
from effects import check, check_metric
from engine import explained_memory_errors
from errors import LabError, StoppedAtOnceError, nearest
from open_data import open_dataset
from paired_evaluation import report_pairs, save_curves
from run_report import report_run
from runs import Run, alone, load_run, reopened, stop_after_step
from trainer import OnEpoch, Trainer

__all__ = ["Trainer", "alone", "fit", "overfit", "stop_after_step"]


@explained_memory_errors()
def fit(
    config: Config,
    *,
    resume: str = "auto",
    criterion: nn.Module | None = None,
    train_set: Any = None,
    val_set: Any = None,
    show: bool = True,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Train a configuration, or continue or reuse its run; the same call every time.

    Args:
        resume: `auto` continues an unfinished run and returns a finished one; `never` starts over; else the
            path of a checkpoint.
        criterion: a loss of your own, called as every loss of losses.py.
        train_set, val_set: data of your own, batches as of dataset.COCOClipDataset.
        show: progress bars.
        on_epoch: called with the history so far after each epoch, to draw live curves.
    Returns: the run. Interrupted (Ctrl-C, or the notebook's stop button), it finishes the step, saves and
        returns the unfinished run; the next call continues it. Interrupted twice, it ends at once with a sentence
        that says what is saved.
    Raises: LabError if memory runs out for good, or if the run's folder holds another data set's or another
        configuration's run, a setting has no effect, or `resume` is no checkpoint.
    """
    check(config)
    if val_set is None:
        check_metric(config)
    resume = _checkpoint(resume)
    trainer = Trainer(config, criterion=criterion, train_set=train_set, val_set=val_set, show=show)
    if resume == "auto" and not trainer.is_known:
        print(
            f"{trainer.folder.name}: what was given cannot be compared with an earlier run's; it is trained again."
        )
        resume = "never"
    if resume != "auto" or not trainer.finished():
        lock = alone(trainer.folder) if is_main() else contextlib.nullcontext()
        with lock, stop_after_step() as stop:
            if resume == "never":
                trainer.clear()
            try:
                trainer.prepare(resume)
                trainer.run(stop, on_epoch)
            except KeyboardInterrupt:
                raise StoppedAtOnceError(trainer.saved()) from None
    return load_run(trainer.folder, **reopened(config))


def _checkpoint(resume: str) -> str:
    """`auto`, `never` or the path of a checkpoint, looked for before anything is computed."""
    path = Path(resume).expanduser()
    if resume in ("auto", "never"):
        return resume
    if path.suffix == ".safetensors":
        raise LabError(
            f"{path} holds an epoch's weights alone; resume takes a checkpoint, checkpoints/step_*.pt, or 'auto'. To "
            "start a new run from a run's best weights, set start_from to its folder."
        )
    if not path.is_file():
        hint = nearest(resume, ["auto", "never"]) or "."
        raise LabError(f"resume is 'auto', 'never' or a checkpoint, but {path} does not exist{hint}")
    return str(path)


def overfit(config: Config, images: int = 128, *, steps: int = 300, show: bool = True) -> pd.DataFrame:
    """The first question to ask of any change: does the model learn a few images by heart?

    Trains on `images` pictures with nothing that hinders (no augmentation, dropout, decay or smoothing) and looks
    them up among themselves.

    Returns: one row: images, steps, the last loss, and `accuracy`, the best mean of both Recall@1 in [0, 1].
        Under 0.95 something is broken, or the learning rate is off.
    """
    still = {name: Config()[name] for name in Config.model_fields if name.startswith("augment_")}
    batch = min(images, config.batch_size)
    few = config.updated(
        **still,
        max_caption_variations=1,
        max_samples=images,
        test_splits=(),
        batch_size=batch,
        num_epochs=max(1, steps * batch // images),
        eval_every=max(1, steps * batch // images // 10),
        head_dropout=0.0,
        image_dropout=0.0,
        text_dropout=0.0,
        label_smoothing=0.0,
        weight_decay=0.0,
        patience=None,
        runs_dir=config.runs_dir / "overfit",
    )
    same = open_dataset(few, few.train_splits, progress=show)
    history = fit(few, val_set=same, resume="never", show=show).history
    recalls = history[["i2t_recall@1", "t2i_recall@1"]].mean(axis=1)
    row = {
        "images": images,
        "steps": steps,
        "loss": history["train_loss"].iloc[-1],
        "accuracy": recalls.max(),
    }
    return pd.DataFrame([row]).set_index("images")


def main(
    config: Config,
    resume: str = "auto",
    overfit_: int = 0,
    eval_only: bool = False,
    comprehensive: bool = False,
    output_file: str = "",
    no_plotting: bool = False,
) -> None:
    """Train, evaluate on the test splits once, and say where everything lies.

    `--overfit N` asks whether N images are learned by heart instead; `--eval_only` reports on the finished run;
    `--no_plotting` draws no curves while it trains.
    """
    if overfit_:
        print(overfit(config, overfit_).to_string())
        return
    folder = config.runs_dir / run_name(config)

    def draw(history: pd.DataFrame) -> None:
        save_curves(folder, history)

    if eval_only:
        places = reopened(config)
        if config.data_dir == make_config(config.preset).data_dir:
            del places["data_dir"]  # none was named: the run's own
        run = load_run(folder, **places)
    else:
        run = fit(config, resume=resume, on_epoch=None if no_plotting else draw)
    if run.finished and is_main():
        copy = output_file or None
        if config.reader == "paired_cifar":
            report_pairs(run, comprehensive=comprehensive, output_file=copy, no_plotting=no_plotting)
        else:
            report_run(run, comprehensive=comprehensive, output_file=copy)
        print(f"{run.folder}: " + ", ".join(sorted(path.name for path in run.folder.iterdir())))


if __name__ == "__main__":
    run_command(main, __doc__)
