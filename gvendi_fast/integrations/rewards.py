"""Rewards that make rollouts of one prompt differ: the novelty of each in its group, multiplied into correct ones.

    reward_i = c_i (1 + weight min(novelty_i, ceiling))   where c_i > threshold,   c_i elsewhere
    novelty_i = (H - (1 - 1/m) H_{-i}) / h(1/m)           in [0, 1], see `vendi.group_gains`

c_i is what a correctness reward says of rollout i, H the entropy in nats of the m sketches of its group and H_{-i} that
without it. The factor grows with the leave-one-out gain H - H_{-i}, of which novelty is an increasing linear function
that does not depend on m: 0 for a rollout that repeats what all the others are, 1 for one that is orthogonal to each.
Why so: *multiplied*, and never below 1, so that no wrong rollout overtakes a right one and none gains by being odd;
*correct ones only*, as noise is the easiest way to differ; *the group's, not the batch's*, as GRPO compares inside a
group and prompts differ by themselves; *clipped* at `ceiling`, so that one rollout far from all does not outweigh many
that differ a little. All rollouts of the group count for H, wrong ones too.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import numbers
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix
from gvendi_fast.integrations.rollouts import Ids, RolloutSketcher, Text, sketch_tokens, words_only
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, Sketches
from gvendi_fast.sketching.proxy.load import TINY, Proxy
from gvendi_fast.vendi.group_gains import GroupGains, group_gains

Correct = Sequence[bool | float | None] | np.ndarray | torch.Tensor


@dataclass(frozen=True)
class _Rule:
    """The formula of the module; raises GvendiError for numbers with which it would punish what it is to reward."""

    weight: float
    ceiling: float
    threshold: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise GvendiError(f"{name} is {value!r}, a {type(value).__name__}; wanted a number")
        if not 0 <= self.weight < math.inf:
            raise GvendiError(
                f"weight is {self.weight}; wanted 0 or more: the most that diversity adds to a reward of 1"
            )
        if not 0 < self.ceiling <= 1:
            raise GvendiError(f"ceiling is {self.ceiling}; wanted a novelty above 0 and at most 1")
        if not 0 <= self.threshold < math.inf:
            raise GvendiError(
                f"threshold is {self.threshold}; wanted 0 or more: a negative reward times more than 1 is a punishment"
            )

    def rewards(self, correct: np.ndarray, novelty: np.ndarray) -> np.ndarray:
        """c (1 + weight min(novelty, ceiling)) of the correct ones; NaN of both stays out."""
        bonus = 1 + self.weight * np.minimum(np.nan_to_num(novelty), self.ceiling)
        return np.where(correct > self.threshold, correct * bonus, correct)


def group_diversity_rewards(
    correct: Correct,
    groups: Sequence[Hashable] | np.ndarray | torch.Tensor,
    sketches: Rows | Sketches | None = None,
    *,
    prompt_ids: Sequence[Ids] | None = None,
    completion_ids: Sequence[Ids] | None = None,
    sketcher: RolloutSketcher | GradientSketcher | None = None,
    group_size: int | None = None,
    weight: float = 0.5,
    ceiling: float = 1.0,
    threshold: float = 0.0,
) -> list[float | None]:
    """Rewards of N rollouts that were correct or not, with more for those that differ from others of their group.

    correct: [N] booleans or numbers of a correctness reward, None (or NaN) where there is none; it stays so.
    groups: [N] labels, equal where rollouts are of one prompt, in any order, such as the uid of verl.
    sketches: [N, K] as a `RolloutSketcher`, a `GradientSketcher` or a tap gives them; or, in their place,
    prompt_ids, completion_ids, sketcher: [N] token ids without padding, and what sketches them in proxy mode.
    group_size: rollouts of each group; with it, a group of any other size is an error.
    weight, ceiling, threshold: as in the module's formula: a correct rollout gets 1 to 1 + weight ceiling times what it
        had. A rollout without a gradient has no novelty.
    The groups must be whole: call it where all rollouts of a prompt are. Raises GvendiError for incomplete groups and
    for numbers of entries that do not agree.
    """
    rule = _Rule(weight, ceiling, threshold)
    values = _numbers(correct)
    if sketches is None:
        if prompt_ids is None or completion_ids is None or sketcher is None:
            raise GvendiError(
                "give sketches [N, K], or prompt_ids, completion_ids and sketcher, which sketches them"
            )
        if isinstance(sketcher, RolloutSketcher):
            sketches = sketcher.of_tokens(prompt_ids, completion_ids)
        else:
            sketches = sketch_tokens(sketcher, prompt_ids, completion_ids)
    rows = sketches.z if isinstance(sketches, Sketches) else sketches
    if not isinstance(rows, np.ndarray | torch.Tensor):
        raise GvendiError(
            f"sketches is a {type(rows).__name__}; wanted Sketches, or a tensor or array [N, K]"
        )
    check_matrix(rows)
    if len(values) != len(rows):
        raise GvendiError(f"correct has {len(values)} entries for {len(rows)} rollouts; give one for each")
    found = group_gains(rows, _labels(groups, len(rows)))
    sizes = np.bincount(found.group, minlength=len(found.names))
    if group_size is not None:
        group_size = whole(group_size, "group_size", "how many rollouts each group has, at least 1", 1)
    if group_size is not None and (wrong := np.flatnonzero(sizes != group_size)).size:
        name = found.names[wrong[0]]
        raise GvendiError(
            f"group {name!r} has {sizes[wrong[0]]} rollouts where group_size is {group_size}, so it is incomplete or "
            "two groups share its label; call this where all rollouts of a prompt are, with one label a group"
        )
    return _as_list(rule.rewards(values, found.novelty))


class GroupDiversityReward:
    """A reward function for TRL's GRPOTrainer: that of a correctness reward, with more for rollouts that differ.

        reward = GroupDiversityReward(accuracy_reward, weight=0.5)
        trainer = GRPOTrainer(model, reward_funcs=reward, ...)      # in place of accuracy_reward, not beside it

    reward_i = c_i (1 + weight min(novelty_i, ceiling)) where c_i > threshold, c_i elsewhere; the module says what
    novelty is and why. A None of the correctness reward stays None.

    correct: a reward function in TRL's signature, plain or async; or the name of a column of the data set (or of what
        a rollout function adds) that holds c_i.
    proxy, spec, layers, max_tokens, batch_tokens, device: as in `RolloutSketcher`, of the small frozen model under
        which a rollout is sketched; or a RolloutSketcher as `proxy`.
    weight, ceiling, threshold: of the formula.
    group_size: rollouts of a group; None: the num_generations (in evaluation num_generations_eval) of the trainer that
        calls. Give it where a trainer's calls do not show that, which raises an error.
    gather: TRL calls on every process, with a slice that may hold part of a group. True gathers the sketches (4 K bytes
        a rollout) over torch.distributed's default group, if there is one, so that every process must call; a process
        group does over that one; False where a call holds whole groups (TRL's AsyncGRPOTrainer).
    name: under which the trainer logs it.

    Groups are those of the trainer: runs of group_size rollouts, in the order of the ranks. So two groups of one prompt
    stay two. A run that holds two prompts, or a number of rollouts that is no multiple of group_size, is an incomplete
    group and raises GvendiError; with environments, which may change a prompt, only the number is checked.
    Logged, where the trainer takes it: gvendi/group, the mean G-Vendi of the groups, gvendi/novelty_correct, the mean
    novelty of the correct rollouts, gvendi/left_out, how many had no gradient; and a column "novelty" beside the
    completions. Random numbers, the policy and its gradients are left alone.
    """

    def __init__(
        self,
        correct: Callable[..., Any] | str,
        proxy: str | Proxy | RolloutSketcher = TINY,
        *,
        weight: float = 0.5,
        ceiling: float = 1.0,
        threshold: float = 0.0,
        group_size: int | None = None,
        spec: SketchSpec | None = None,
        layers: str = "all",
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        device: str | torch.device = "auto",
        gather: Any = True,
        name: str = "group_diversity_reward",
    ) -> None:
        if not callable(correct) and not isinstance(correct, str):
            raise GvendiError(
                f"correct is {correct!r}; wanted a reward function in TRL's signature, or the name of a column"
            )
        if group_size is not None:
            group_size = whole(group_size, "group_size", "at least 2, the trainer's num_generations", 2)
        self._rule = _Rule(weight, ceiling, threshold)
        self.correct, self.group_size, self.gather = correct, group_size, gather
        self.sketcher = (
            proxy
            if isinstance(proxy, RolloutSketcher)
            else RolloutSketcher(
                proxy, spec, layers=layers, max_tokens=max_tokens, batch_tokens=batch_tokens, device=device
            )
        )
        # What trainers call a reward function in their logs.
        self.__name__ = name
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Ids] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Rewards of this process's rollouts, called as TRL calls a reward function."""
        correct = self._correctness(prompts, completions, completion_ids, kwargs)
        z = self.sketcher(prompts, completions, kwargs.get("tools"))
        own = _Slice(_numbers(correct), z.cpu().numpy(), [_digest(prompt) for prompt in prompts])
        slices, rank = self._gathered(own)
        start = sum(len(part.correct) for part in slices[:rank])
        found = self._gains(slices, kwargs)
        mine = slice(start, start + len(prompts))
        self._log(found, np.concatenate([part.correct for part in slices]), mine, kwargs)
        return _as_list(self._rule.rewards(own.correct, found.novelty[mine]))

    def _correctness(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Ids] | None,
        kwargs: dict[str, Any],
    ) -> Correct:
        if isinstance(self.correct, str):
            if self.correct not in kwargs:
                raise GvendiError(
                    f"correct is {self.correct!r}, and the trainer passes no such column (it passes "
                    f"{', '.join(sorted(kwargs))}); name one of them, or give a reward function"
                )
            values = kwargs[self.correct]
        else:
            values = self.correct(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs
            )
            if inspect.isawaitable(values):
                values = self._awaited(values)
        values = _plain(values, "correct", "numbers, booleans or None, one for each rollout")
        if len(values) != len(prompts):
            raise GvendiError(
                f"correct gives {len(values)} values for {len(prompts)} rollouts; wanted one for each"
            )
        return values

    def _awaited(self, values: Any) -> Any:
        """The result of an async function, in a thread of its own: the caller's may run a loop, as notebooks' do."""
        if self._loop is None:
            # One loop for all calls, as clients of servers keep theirs.
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="gvendi-reward", daemon=True).start()

        async def finish() -> Any:
            return await values

        return asyncio.run_coroutine_threadsafe(finish(), self._loop).result()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loop": None}

    def _gathered(self, own: _Slice) -> tuple[list[_Slice], int]:
        """The slices of all processes in the order of their ranks, and which is this one's."""
        if self.gather is False or not (dist.is_available() and dist.is_initialized()):
            return [own], 0
        over = None if self.gather is True else self.gather
        slices: list[Any] = [None] * dist.get_world_size(over)
        if len(slices) == 1:
            return [own], 0
        dist.all_gather_object(slices, own, group=over)
        return slices, dist.get_rank(over)

    def _gains(self, slices: list[_Slice], kwargs: dict[str, Any]) -> GroupGains:
        size, digests = self._size(kwargs), [digest for part in slices for digest in part.digests]
        where = f"over {len(slices)} processes" if len(slices) > 1 else "of this call"
        if len(digests) % size:
            raise GvendiError(
                f"the {len(digests)} rollouts {where} are no whole number of groups of {size}, so a group is "
                "incomplete; let every call hold all rollouts of its prompts (gather=True, and batch sizes times "
                "processes a multiple of num_generations)"
            )
        if kwargs.get("environments") is None:
            for first in range(0, len(digests), size):
                if (count := len(set(digests[first : first + size]))) > 1:
                    raise GvendiError(
                        f"rollouts {first} to {first + size - 1} {where} should be the {size} of one prompt and are of "
                        f"{count}, so a group is incomplete; keep the trainer's own sampler, gather=True, and "
                        "group_size the trainer's num_generations"
                    )
        rows = np.concatenate([part.z for part in slices])
        return group_gains(rows, boundaries=np.arange(0, len(rows) + 1, size))

    def _size(self, kwargs: dict[str, Any]) -> int:
        if self.group_size is not None:
            return self.group_size
        # TRL passes no settings, but a method of the trainer that has them.
        trainer: Any = getattr(kwargs.get("log_metric"), "__self__", None)
        if not hasattr(trainer, "num_generations"):
            raise GvendiError(
                "how many rollouts make a group is not known from this call; give group_size, the trainer's "
                "num_generations"
            )
        is_training = trainer.model.training
        return trainer.num_generations if is_training else trainer.num_generations_eval

    def _log(self, found: GroupGains, correct: np.ndarray, mine: slice, kwargs: dict[str, Any]) -> None:
        if (log_metric := kwargs.get("log_metric")) is not None:
            # The same on every process, whose mean a trainer logs.
            log_metric("gvendi/group", float(found.gvendi.mean()))
            log_metric("gvendi/left_out", float(found.left_out))
            novel = found.novelty[(correct > self._rule.threshold) & ~np.isnan(found.novelty)]
            if len(novel):
                log_metric("gvendi/novelty_correct", float(novel.mean()))
        if (log_extra := kwargs.get("log_extra")) is not None:
            log_extra("novelty", _as_list(found.novelty[mine]))


@dataclass(frozen=True, eq=False)
class _Slice:
    """What one process has of a call: correctness float64 [n], sketches float32 [n, K], digests of the prompts [n]."""

    correct: np.ndarray
    z: np.ndarray
    digests: list[bytes]


def _digest(prompt: Text) -> bytes:
    """A prompt's words; images, which the copies of a group have in common, are compared by no one."""
    words: Any = words_only(prompt)
    if not isinstance(words, str):
        words = [(message.get("role"), message["content"]) for message in words]
    return hashlib.blake2b(repr(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _numbers(correct: Correct) -> np.ndarray:
    """float64 [N], NaN for None."""
    plain = _plain(correct, "correct", "numbers, booleans or None, one for each rollout")
    values = np.empty(len(plain), np.float64)
    for i, value in enumerate(plain):
        if isinstance(value, np.ndarray | torch.Tensor) and math.prod(value.shape) == 1:
            value = value.item()
        # A column of answers, say, whose digits would pass for rewards.
        is_other = isinstance(value, str | bytes | np.ndarray | torch.Tensor) or not hasattr(
            value, "__float__"
        )
        if value is not None and is_other:
            raise GvendiError(
                f"correct holds {value!r} for rollout {i}; wanted numbers, booleans or None, as correctness rewards "
                "give"
            )
        values[i] = math.nan if value is None else float(value)
    return values


def _labels(groups: Any, rollouts: int) -> list[Hashable]:
    """Those of the groups, as a list."""
    plain = _plain(groups, "groups", "one label for each rollout")
    if len(plain) != rollouts:
        raise GvendiError(f"groups has {len(plain)} labels for {rollouts} rollouts; give one for each")
    for i, label in enumerate(plain):
        if not isinstance(label, Hashable):
            raise GvendiError(
                f"groups holds {label!r} for rollout {i}; wanted a label that can be hashed: a string or a number"
            )
    return plain


def _plain(values: Any, argument: str, wanted: str) -> list[Any]:
    """An argument with one entry a rollout as a list."""
    if isinstance(values, torch.Tensor) and values.is_meta:
        raise GvendiError(f"{argument} is on the meta device; wanted {wanted}")
    if isinstance(values, np.ndarray | torch.Tensor) and values.ndim:
        return values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise GvendiError(f"{argument} is {values!r}; wanted {wanted}")
    return list(values)


def _as_list(values: np.ndarray) -> list[float | None]:
    """Python's floats, None for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]
