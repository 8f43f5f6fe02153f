"""A callback for transformers' Trainer, and so for TRL's SFTTrainer, DPOTrainer and others.

A trainer tells its callbacks when a step begins, but neither gives them its batches nor itself. What a callback needs
of it is looked up once, in the call that reaches it; then the collator of the training data is wrapped, for `source`,
and the callback goes to the front of those that report, so that figures added to a log reach all of them.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.measuring import PREFIX, TrainingDiversity
from gvendi_fast.integrations.meter import DiversityMeter
from gvendi_fast.integrations.sources import SourceCollator, SourceNames, names_in
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.load import Proxy

_PACKED = "; SFTTrainer drops all other columns when it packs: pack the data set before, by pack_with_sources"


class GvendiCallback(TrainerCallback):
    """Measures the diversity of what a Trainer trains on, from the training step's own backward pass.

    Every N-th step is tapped: the figures of its samples' gradients, and of a window of those before, join the
    trainer's next log, and so its history and whatever it reports to. Evaluation, prediction and generation are not
    measured. The weights that are trained are the same to the bit with and without it.

        trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[GvendiCallback(every=10)])

    With gradient accumulation a step's samples are those of all its batches. With DPOTrainer each sequence is a sample:
    the gradient of the loss through a chosen or a rejected answer, the chosen ones first; the reference model takes no
    part.

    every: measure the steps N, 2 N, ... of the optimizer.
    layers: what of the model is sketched, "all", "last-4" or another of `layers.PRESETS`.
    dim: K, the numbers of a sketch (None: 1024).
    window: samples that the meter's window holds (None: 4096).
    source: a column of the data set, of strings or integers, that names each row's source; figures come by source too.
        It need not be one that the model takes.
    sources: the names in it, for an iterable data set that several workers read.
    save_to: a run directory that gets the sketches of every measured sample, one part after the other, for every
        command of `gvendi` that reads one. A run that is resumed goes on in it.
    sketcher: a GradientSketcher of the model that is trained, in place of `layers` and `dim`.
    proxy: "tiny", a folder, a hub name or a Proxy: a frozen model that scores the measured batches, in place of the
        tap. Its figures can be compared over time and between runs; a pass of its own is what they cost.
    prefix: put before the name of every figure.
    meter: a DiversityMeter of your own, in place of `window`.
    Raises GvendiError for options that exclude one another, when training begins for a model that cannot be sketched,
    and for a `source` that the batches do not have.
    """

    def __init__(
        self,
        *,
        every: int = 10,
        layers: str = "all",
        dim: int | None = None,
        window: int | None = None,
        source: str | None = None,
        sources: Sequence[str] | None = None,
        save_to: str | os.PathLike | None = None,
        sketcher: GradientSketcher | None = None,
        proxy: str | Proxy | None = None,
        prefix: str = PREFIX,
        meter: DiversityMeter | None = None,
    ) -> None:
        self.diversity = TrainingDiversity(
            every=every, layers=layers, dim=dim, window=window, source=source, sources=sources, save_to=save_to,
            sketcher=sketcher, proxy=proxy, prefix=prefix, meter=meter,
        )  # fmt: skip
        self._trainer: Trainer | None = None
        self._is_at_work = False
        self._figures: dict[str, float] = {}

    @property
    def meter(self) -> DiversityMeter:
        """The meter that the measured samples go to."""
        return self.diversity.meter

    def attach_to(self, trainer: Trainer) -> GvendiCallback:
        """Become a callback of this trainer, which a trainer does with the callbacks that it is made with."""
        if self._trainer is trainer:
            return self
        if self._is_at_work:
            raise GvendiError("this callback is at work in another trainer; make one for each")
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        alike = [
            other
            for other in callbacks
            if isinstance(other, GvendiCallback) and other.diversity.prefix == self.diversity.prefix
        ]
        if alike:
            raise GvendiError(
                f"the trainer has another GvendiCallback with the prefix {self.diversity.prefix!r}, and the figures of "
                "one would stand in place of the other's; give one of them a prefix=... of its own"
            )
        # Behind the one that says when to log, before those that report.
        callbacks.insert(sum(isinstance(other, DefaultFlowCallback) for other in callbacks[:1]), self)
        if self.diversity.names is not None:
            _add_sources(trainer, self.diversity.names, self.diversity.tag)
        # A tap that is left hides from the trainer which columns the model takes.
        self.diversity.clear(trainer.model, trainer)
        self._trainer = trainer
        trainer.train = self._watched(trainer.train)
        return self

    def _watched(self, train: Any) -> Any:
        """A trainer tells no callback that training failed or was interrupted, so the call itself is watched."""

        @functools.wraps(train)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._is_at_work = True
            try:
                return train(*args, **kwargs)
            finally:
                self._is_at_work = False
                self.diversity.stop()

        return watched

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer is made: find it."""
        self.attach_to(_calling()[0])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Make the sketcher, and go on from a checkpoint where the trainer does."""
        trainer, checkpoint = _calling()
        if self._trainer is not trainer and self.diversity.names is not None:
            raise GvendiError(
                f"source is {self.diversity.names.column!r}, but the callback came to the trainer by add_callback, and "
                "the data loader is made by now; give it to the trainer when that is made, callbacks=[...], or "
                "GvendiCallback(...).attach_to(trainer)"
            )
        self.attach_to(trainer)
        if args.n_gpu > 1:
            raise GvendiError(
                f"the trainer runs {args.n_gpu} GPUs in one process (DataParallel), whose replicas cannot be tapped; "
                "start one process for each by torchrun, or show it one GPU (CUDA_VISIBLE_DEVICES)"
            )
        is_resumed = checkpoint is not None and state.global_step > 0
        if is_resumed:
            self.diversity.load(checkpoint, args.process_index)
        reference = getattr(trainer, "ref_model", None)
        self.diversity.begin(
            model,
            tokenizer=kwargs.get("processing_class"),
            others=[] if reference is None else [reference],
            rank=args.process_index,
            ranks=args.world_size,
            is_resumed=is_resumed,
            training={"trainer": type(trainer).__name__},
            run=trainer,
            steps=state.max_steps,
        )
        self._figures = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first forward of a step."""
        if self.diversity.is_due(state.global_step + 1):
            self.diversity.open()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind the last backward of a step, while the weights are those that it was computed with."""
        self.diversity.close(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks come here together, so this is where they merge what is to be logged."""
        is_last = state.global_step >= state.max_steps
        if self.diversity.is_fresh and (control.should_log or is_last):
            self._figures = self.diversity.figures(args.world_size > 1)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where a trainer logs by epochs, it is now that it says so."""
        self.on_step_end(args, state, control)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the figures to what the trainer logs of training, once."""
        # Not to those of an evaluation that comes between, or of a loss that logs something of its own.
        is_own = self._trainer._globalstep_last_logged == state.global_step
        if logs is None or not (is_own or "train_runtime" in logs):
            return
        if self.diversity.is_fresh and args.world_size == 1:
            self._figures = self.diversity.figures()
        logs.update(self._figures)
        # The history got a copy before the callbacks were told.
        if state.log_history:
            state.log_history[-1].update(self._figures)
        self._figures = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put meter and parts beside the checkpoint that was written."""
        folder = self._trainer._get_output_dir(trial=getattr(self._trainer, "_trial", None))
        self.diversity.save(os.path.join(folder, f"checkpoint-{state.global_step}"), args.process_index)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self.diversity.end()


def _calling() -> tuple[Trainer, str | None]:
    """The trainer whose call this is, and the checkpoint that it goes on from.

    A trainer calls its callbacks' handler, which knows nothing of it; so it is read off the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise GvendiError(
        "no Trainer calls this callback; give it to one, callbacks=[...], or attach_to(trainer)"
    )


def _add_sources(trainer: Trainer, names: SourceNames, tag: str) -> None:
    """Let the batches of a trainer's training data, and no others, carry their sources."""
    original = trainer.get_train_dataloader

    def get_train_dataloader() -> torch.utils.data.DataLoader:
        packs = getattr(trainer.args, "packing", False)
        remedy = _PACKED if packs else ""
        # Before the trainer takes out the columns that the model does not take.
        there = getattr(trainer.train_dataset, "column_names", None)
        if there is not None and names.column not in there:
            found = ", ".join(map(repr, there))
            raise GvendiError(f"source is {names.column!r}, but a row of the data set has {found}{remedy}")
        if not names.is_closed and (known := names_in(trainer.train_dataset, names.column)) is not None:
            names.close(known)
        trainer._set_signature_columns_if_needed()
        columns, collator = trainer._signature_columns, trainer.data_collator
        # What another callback has put there the trainer would have removed, too.
        added = collator.removed() if isinstance(collator, SourceCollator) else set()
        removes = trainer.args.remove_unused_columns and names.column not in set(columns) - added
        trainer._signature_columns = [*columns, *({names.column} - set(columns))]
        trainer.data_collator = SourceCollator(collator, names, remedy, tag, removes)
        try:
            return original()
        finally:
            trainer._signature_columns, trainer.data_collator = columns, collator

    trainer.get_train_dataloader = get_train_dataloader
