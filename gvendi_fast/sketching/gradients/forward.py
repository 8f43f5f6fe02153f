"""What replaces a module's forward while a pass runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.in_use import InUse

# A pass changes its model for as long as it runs, so another thread's pass over any of the same layers waits.
MODELS = InUse("model", "sketches")


class Forward:
    """Takes the place of a module's forward, in the module's own attribute, where others may have put theirs.

    A bound method of one class for all modules of a kind, so that a compiler takes them for one; state is read from the
    object, and what differs between layers alone (paths, taps, which torch 2.11 compares whole) for messages only. What
    a module runs comes after its forward: hooks of others see what they would see without it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own = self._of_class = self.inner = None

    def attach(self) -> None:
        """Put `stands` in the module's place for its forward, which `inner` then is."""
        own, of_class = self.module.__dict__.get("forward"), type(self.module).forward
        # The same method as last time, so that a compiler knows it again.
        if self.inner is None or own != self._own or of_class is not self._of_class:
            self._own, self._of_class, self.inner = own, of_class, self.module.forward
        self.module.forward = self.stands

    @property
    def stands(self) -> Callable[..., Any]:
        """What is put into the module's place for its forward: a bound method, the same one every time."""
        return self.run

    def remove(self) -> None:
        """Put back what was there, if `stands` is in its place: an interrupt may come before it is."""
        if self.module.__dict__.get("forward") != self.stands:
            return
        if self._own is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.forward = self._own

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward is while this is attached."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused while a model holds it, whose copy would run the sketches of this one; a sketcher's own may go."""
        if self.module.__dict__.get("forward") == self.run:
            raise GvendiError(
                "the model cannot be copied or pickled whole while sketches are taken of it, for its layers' forwards "
                "are replaced; detach the tap first (tap.detach()), or copy its state_dict()"
            )
        return super().__reduce_ex__(protocol)
