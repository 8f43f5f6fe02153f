"""A callback for Lightning (`lightning` and `pytorch_lightning`), around a causal LM inside a LightningModule.

A step is a training batch in which the optimizer steps, with the batches accumulated before it. Lightning's own loop
decides that, in automatic and in manual optimisation alike, so it is read off `trainer.global_step`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.measuring import PREFIX, TrainingDiversity
from gvendi_fast.integrations.meter import DiversityMeter
from gvendi_fast.integrations.sources import SourceNames
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.load import Proxy

# The two names that Lightning goes by; a trainer of either takes a callback of the other.
_NAMES = ("lightning", "pytorch_lightning")
_there = [name for name in _NAMES if find_spec(name) is not None]
if not _there:
    raise GvendiError(
        "the Lightning callback needs Lightning, which is not installed: pip install 'lightning>=2.4'"
    )
_Callback: Any = importlib.import_module(
    "lightning.pytorch" if _there[0] == "lightning" else "pytorch_lightning"
).Callback


class GvendiLightningCallback(_Callback):
    """Measures the diversity of what a LightningModule trains on, from the training step's own backward pass.

    Every N-th step is tapped: the figures of its samples' gradients, and of a window of those before, are logged by the
    module's `log_dict` at the steps at which the trainer logs, and so reach every logger. Validation, test and
    prediction are not measured. The weights that are trained are the same to the bit with and without it.

        trainer = L.Trainer(callbacks=[GvendiLightningCallback(every=10)])

    every, layers, dim, window, sources, save_to, sketcher, proxy, prefix, meter: as `GvendiCallback` has them.
    source: a key of the batch, a dict, that has each row's source: a list of strings or integers [B], or an int64
        tensor [B], or [B, T] where rows are packed. The model under the module is not given it.
    module: the path of the causal LM in the LightningModule, such as "student.model"; None: its attribute `model`, or
        the only causal LM that it has.
    tokenizer: of the trained model, for a proxy with another one; None: the LightningModule's attribute `tokenizer`.
    Raises GvendiError as `GvendiCallback` does, and where the causal LM is not found.
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
        module: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.diversity = TrainingDiversity(
            every=every, layers=layers, dim=dim, window=window, source=source, sources=sources, save_to=save_to,
            sketcher=sketcher, proxy=proxy, prefix=prefix, meter=meter,
        )  # fmt: skip
        self.module, self.tokenizer = module, tokenizer
        # What was last logged, or would have been.
        self.figures: dict[str, float] = {}
        self._steps = self._counted = 0
        self._is_open = self._is_resumed = False
        self._tags: torch.Tensor | None = None
        self._model: nn.Module | None = None
        self._handle: Any = None

    @property
    def meter(self) -> DiversityMeter:
        """The meter that the measured samples go to."""
        return self.diversity.meter

    @property
    def state_key(self) -> str:
        """Of its state in a checkpoint: one a prefix, so that a trainer may have two."""
        name = type(self).__qualname__
        return name if self.diversity.prefix == PREFIX else f"{name}[{self.diversity.prefix}]"

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Batches of validation have sources too, and come before training does."""
        self._keep_from(pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """As in validation."""
        self._keep_from(pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """As in validation."""
        self._keep_from(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the model as it was."""
        self._leave()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the sketcher; a checkpoint has been read by now."""
        model = find_causal_lm(pl_module, self.module)
        if not (self._is_resumed or self.diversity.is_of(trainer)):
            self._steps, self.figures = 0, {}
        self.diversity.begin(
            model,
            tokenizer=self.tokenizer or getattr(pl_module, "tokenizer", None),
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            is_resumed=self._is_resumed,
            training={"trainer": type(pl_module).__name__},
            run=trainer,
            # -1 where epochs end it.
            steps=trainer.max_steps if trainer.max_steps > 0 else None,
        )
        self._model = model
        self._keep_from(pl_module, anew=True)
        self._is_open, self._is_resumed, self._counted = False, False, trainer.global_step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first batch of a step, and before each one that is accumulated with it."""
        if not self._is_open and self.diversity.is_due(self._steps + 1):
            self.diversity.open()
            self._is_open = True
            # Ahead of what reads the tags.
            self._keep_from(pl_module, anew=True)
        names = self.diversity.names
        self._tags = _tags(batch, names) if names is not None and self._is_open else None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind a batch, which may have been the last of its step."""
        self._tags = None
        if trainer.global_step == self._counted:
            return
        self._counted = trainer.global_step
        self._steps += 1
        if self._is_open:
            self.diversity.close(self._steps)
            self._is_open = False
        # 0 where nothing is ever logged, as in barebones mode.
        between = trainer.log_every_n_steps
        if self.diversity.is_fresh and between and self._steps % between == 0:
            self.figures = self.diversity.figures(trainer.world_size > 1)
            pl_module.log_dict(self.figures, on_step=True, on_epoch=False, rank_zero_only=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the model as it was, with the last figures in `figures`."""
        if self.diversity.is_fresh:
            self.figures = self.diversity.figures(trainer.world_size > 1)
        self._leave()
        self.diversity.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the model as it was."""
        self._leave()
        self.diversity.stop()

    def state_dict(self) -> dict[str, Any]:
        """Of every rank, as the first one's is what a checkpoint keeps; so all have to ask for it together."""
        own = self.diversity.state_dict() | {"steps": self._steps}
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [own]}
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        is_one = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        rank = 0 if is_one else torch.distributed.get_rank()
        ranks = state_dict["ranks"]
        self.diversity.load_state_dict(ranks[rank % len(ranks)])
        self._steps, self._is_resumed = ranks[0]["steps"], True

    def _keep_from(self, pl_module: Any, anew: bool = False) -> None:
        """Keep the sources from the model, however a step calls it, and give it tags where they are wanted."""
        if self.diversity.names is None or (self._handle is not None and not anew):
            return
        model = self._model or find_causal_lm(pl_module, self.module)
        self._leave_model()
        self._handle = model.register_forward_pre_hook(self._give_tags, prepend=True, with_kwargs=True)

    def _leave_model(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _leave(self) -> None:
        self._leave_model()
        self._tags = self._model = None

    def _give_tags(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        kwargs = {key: value for key, value in kwargs.items() if key != self.diversity.names.column}
        if self._tags is not None and torch.is_grad_enabled():
            kwargs[self.diversity.tag] = self._tags
        return args, kwargs


def find_causal_lm(pl_module: Any, path: str | None = None) -> nn.Module:
    """The causal LM in a LightningModule: at a path, its attribute `model`, or the only one. GvendiError without."""
    if path is not None:
        try:
            return pl_module.get_submodule(path)
        except AttributeError as error:
            raise GvendiError(
                f"module is {path!r}, which {type(pl_module).__name__} has not ({error}); give its causal LM"
            ) from error
    found: dict[str, nn.Module] = {}
    for name, part in pl_module.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not is_inside and _is_causal_lm(part):
            found[name] = part
    if "model" in found or len(found) == 1:
        return found.get("model", next(iter(found.values())))
    what = f"has several causal LMs ({', '.join(found)})" if found else "has no causal LM of transformers"
    raise GvendiError(f"{type(pl_module).__name__} {what}; give module='...', the path of the one to measure")


def _is_causal_lm(part: nn.Module) -> bool:
    # A model without a head says that its head is None.
    get = getattr(part, "get_output_embeddings", None)
    return hasattr(part, "get_input_embeddings") and callable(get) and get() is not None


def _tags(batch: Any, names: SourceNames) -> torch.Tensor:
    """The sources of a batch as numbers, int64 [B] or [B, T]."""
    if not isinstance(batch, Mapping) or names.column not in batch:
        what = (
            f"has {', '.join(map(repr, batch))}"
            if isinstance(batch, Mapping)
            else f"is a {type(batch).__name__}"
        )
        raise GvendiError(
            f"source is {names.column!r}, but the batch {what}; let the data loader give dicts with the sources of "
            "their rows under this key"
        )
    values = batch[names.column]
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().to(torch.int64)
    return torch.tensor([names.number_of(value) for value in values], dtype=torch.int64)
