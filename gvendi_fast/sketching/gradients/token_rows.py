"""Which sample a row of an activation belongs to, where tokens are picked, sorted, repeated and put together anew.

The batch has B samples of T positions. A tensor is *natural* if its first axis has B entries (one a sample) or B T (the
flattened batch): so is nearly everything in a model, and nothing is kept of it. Of a tensor that is not, or only by
chance, what is known is kept with it: the axis along which samples run, or a number of the sample for every row. It is
found by doing to the numbers what the model does to the rows (index, split, repeat, reshape, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_ROWS, _STILL = "_gvendi_rows", "_gvendi_still"


@dataclass(frozen=True)
class Along:
    """Samples run along one axis, `each` entries a sample. in_order: a sample's tokens are in the batch's order."""

    axis: int
    each: int
    in_order: bool = True


@dataclass(frozen=True, eq=False)
class Numbers:
    """The sample of every entry: int64, of the tensor's axes, with size 1 along those on which it does not depend."""

    samples: Tensor


# Of a tensor of which nothing is known.
UNKNOWN = object()


class TokenRows:
    """The rows of all activations of a pass over B samples of T positions.

    trusts_functions: an autograd function of a model's own is taken to leave the flattened batch's rows at their
    places, as a trial does that looks at the order of tokens by itself.
    has_parameters: parameters require a gradient, as in a training step, so that not all that does is an activation.
    owners: int64 [rows, T], the sample of every token where a row of the batch may hold several, B for one of none.
        What is natural then has both axes, or the flattened one.
    """

    def __init__(
        self,
        samples: int,
        length: int,
        trusts_functions: bool = False,
        has_parameters: bool = False,
        owners: Tensor | None = None,
    ) -> None:
        self.samples_count, self.length = samples, length
        self.tokens = samples * length if owners is None else owners.numel()
        self._owners = {} if owners is None else {owners.device: owners}
        self._mark, self._trusts_functions = object(), trusts_functions
        self._has_parameters = has_parameters

    def moves(self, x: Tensor) -> bool:
        """Whether x is an activation: it has a gradient, and is no parameter nor computed from them alone."""
        if not x.requires_grad or not self._has_parameters:
            return x.requires_grad
        return not isinstance(x, nn.Parameter) and x.__dict__.get(_STILL) is not self._mark

    def keep_still(self, x: Tensor) -> None:
        """x was computed from parameters alone."""
        if x.requires_grad:
            x.__dict__[_STILL] = self._mark

    def of(self, x: Tensor) -> Along | Numbers | object:
        """What is known of a tensor."""
        if self._is_noted(x):
            return x.__dict__[_ROWS][1]
        return self._natural(x)

    @property
    def is_packed(self) -> bool:
        """Whether a row of the batch may hold several samples."""
        return bool(self._owners)

    def is_natural(self, x: Tensor) -> bool:
        """Whether x has the rows of its samples one after the other along its first axis, in the batch's order."""
        found = self.of(x)
        if self.is_packed:
            return isinstance(found, Numbers) and not self._is_noted(x)
        return isinstance(found, Along) and found.axis == 0 and found.in_order

    def samples(self, x: Tensor, feature: int = -1) -> Tensor | None:
        """The sample of each row of x, int64 [R] on its device; None if unknown. Axis `feature` is no rows'."""
        shape = list(x.shape)
        feature %= len(shape)
        del shape[feature]
        if self.samples_count == 1 and not self.is_packed:
            return torch.zeros(math.prod(shape), dtype=torch.int64, device=x.device)
        numbers = self._numbers(x, self.of(x))
        if numbers is None or numbers.shape[feature] != 1:
            return None
        return numbers.squeeze(feature).expand(shape).reshape(-1)

    def carry(self, x: Tensor, y: Tensor) -> None:
        """What is known of the rows of x is known of those of y, which an operation out of sight made of them."""
        note = x.__dict__.get(_ROWS)
        if note is not None:
            y.__dict__[_ROWS] = note

    def follow(self, function: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Keep what is known of the rows of what an operation gave."""
        rule = _RULES.get(function)
        if rule is not None:
            rule(self, function, args, kwargs, out)
        else:
            self._same_rows(args, kwargs, out)

    def _natural(self, x: Tensor) -> Along | Numbers | object:
        shape = x.shape
        if self.is_packed:
            owners = self._owners.get(x.device)
            if owners is None:
                owners = self._owners[x.device] = next(iter(self._owners.values())).to(x.device)
            for axes in ((owners.numel(),), tuple(owners.shape)):
                if tuple(shape[: len(axes)]) == axes:
                    return Numbers(owners.view(*axes, *[1] * (len(shape) - len(axes))))
            return UNKNOWN
        if len(shape) and shape[0] == self.samples_count * self.length:
            return Along(0, self.length)
        if len(shape) and shape[0] == self.samples_count:
            return Along(0, 1)
        return UNKNOWN

    def _is_noted(self, x: Tensor) -> bool:
        note = x.__dict__.get(_ROWS)
        if note is not None and note[0] is self._mark:
            return True
        # No mode sees inside such a function, which may sort the tokens of the batch.
        if not self._trusts_functions and _is_of_own_function(x) and self._is_flattened(x):
            x.__dict__[_ROWS] = self._mark, UNKNOWN
            return True
        return False

    def _is_flattened(self, x: Tensor) -> bool:
        """Whether x has the rows of the flattened batch, or as many by chance."""
        if self.is_packed:
            # Attention kernels of packed samples leave their tokens at their places.
            return x.dim() > 0 and x.shape[0] == self.tokens and not _is_attention(x)
        return x.dim() > 0 and self.samples_count > 1 and self._natural(x) == Along(0, self.length)

    def _keep(self, x: Any, known: Along | Numbers | object) -> None:
        if not isinstance(x, Tensor):
            return
        natural = self._natural(x)
        if self.is_packed and isinstance(known, Numbers):
            if not self._fits(known, known.samples, x):
                known = UNKNOWN
            elif isinstance(natural, Numbers) and _is_equal(known.samples, natural.samples):
                known = natural
        if known == natural:
            x.__dict__.pop(_ROWS, None)
        else:
            x.__dict__[_ROWS] = self._mark, known

    def _numbers(self, x: Tensor, known: Along | Numbers | object) -> Tensor | None:
        if isinstance(known, Numbers):
            return known.samples
        if not isinstance(known, Along):
            return None
        shape = [1] * x.dim()
        shape[known.axis] = x.shape[known.axis]
        return (torch.arange(x.shape[known.axis], device=x.device) // known.each).view(shape)

    def _simplest(self, x: Tensor, numbers: Tensor) -> Along | Numbers:
        """What is known of x by numbers: less, where samples are one after the other again.

        That is looked at on a CPU, and elsewhere only where nothing else helps, for the look waits for the GPU.
        """
        known = self._natural(x)
        if isinstance(known, Along) and (numbers.device.type == "cpu" or numbers.shape[-1] > 1):
            wanted = (torch.arange(x.shape[0], device=numbers.device) // known.each).view(
                -1, *[1] * (x.dim() - 1)
            )
            if torch.equal(numbers, wanted.expand(numbers.shape) if numbers.shape[0] > 1 else wanted):
                # The samples are; whether their tokens are too is not known.
                return replace(known, in_order=False)
        return Numbers(numbers)

    def _same_rows(self, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """The rule of an operation whose output has the rows of its input: arithmetic, activations, products."""
        inputs = [x for x in _flat((args, tuple(kwargs.values()))) if x.is_floating_point()]
        noted = [x for x in inputs if self._is_noted(x)]
        if not noted:
            return
        for y in _flat(out):
            if not y.requires_grad or any(y is x for x in noted):
                continue
            # What is natural stays so: a residual to which experts' outputs are added.
            plain = any(self.moves(x) and x.shape == y.shape and not self._is_noted(x) for x in inputs)
            if plain and self._natural(y) is not UNKNOWN:
                y.__dict__.pop(_ROWS, None)
                continue
            # A factor whose rows do not show in the product leaves it to the other, which is natural.
            candidates = [*noted, *(x for x in inputs if self.moves(x) and not self._is_noted(x))]
            fitting = [self.of(x) for x in candidates if self._fits(self.of(x), x, y)]
            known = next((k for k in fitting if k is not UNKNOWN), UNKNOWN)
            self._keep(y, known)

    @staticmethod
    def _fits(known: Along | Numbers | object, x: Tensor, y: Tensor) -> bool:
        if x.dim() != y.dim():
            return False
        if isinstance(known, Along):
            return x.shape[known.axis] == y.shape[known.axis]
        if isinstance(known, Numbers):
            return all(n in (1, size) for n, size in zip(known.samples.shape, y.shape, strict=True))
        return True


def _is_of_own_function(x: Tensor) -> bool:
    """Whether a torch.autograd.Function that is neither torch's nor of this package gave x."""
    of = getattr(x.grad_fn, "_forward_cls", None)
    return of is not None and of.__module__.partition(".")[0] not in ("torch", "gvendi_fast")


def _is_attention(x: Tensor) -> bool:
    """Whether a library of attention kernels gave x."""
    name = x.grad_fn._forward_cls.__module__
    return "flash" in name and "attn" in name


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether numbers are the same; on a GPU, for which nothing waits here, whether they are one tensor."""
    if one.shape != other.shape:
        return False
    if one.device.type == "cpu":
        return torch.equal(one, other)
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [x for value in values for x in _flat(value)]
    return []


def _reshaped(rows: TokenRows, function, args, kwargs, out) -> None:
    """view, reshape, flatten, squeeze, unsqueeze: axes are split and merged, and entries stay in order."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not isinstance(out, Tensor) or not x.is_floating_point():
        return
    known = rows.of(x)
    if known is UNKNOWN:
        return rows._keep(out, UNKNOWN) if rows._is_noted(x) else None
    if x.numel() == 0:
        return rows._keep(out, Numbers(torch.zeros([1] * out.dim(), dtype=torch.int64, device=x.device)))
    for old, new in _segments(x.shape, out.shape):
        if isinstance(known, Along) and known.axis in old:
            inner = math.prod(x.shape[a] for a in old if a > known.axis)
            outer = math.prod(x.shape[a] for a in old if a < known.axis)
            sizes = [(a, out.shape[a], math.prod(out.shape[b] for b in new if b > a)) for a in new]
            if outer == 1:
                # Entry i of axis a begins at i * rest of the merged axis, of which each * inner are a sample's.
                each = known.each * inner
                for axis, size, rest in sizes:
                    if size * rest == x.shape[known.axis] * inner and each % rest == 0:
                        return rows._keep(out, replace(known, axis=axis, each=each // rest))
    numbers = rows._numbers(x, known)
    sizes_before, sizes_after = list(numbers.shape), [1] * out.dim()
    for old, new in _segments(x.shape, out.shape):
        if any(numbers.shape[a] != 1 for a in old):
            for a in old:
                sizes_before[a] = x.shape[a]
            for a in new:
                sizes_after[a] = out.shape[a]
    rows._keep(out, rows._simplest(out, numbers.expand(sizes_before).reshape(sizes_after)))
    return None


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of both shapes that hold the same entries."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right, a, b = [], [], 1, 1
        while True:
            if a <= b and i < len(old) and (a < b or not left):
                a *= old[i]
                left.append(i)
                i += 1
            elif j < len(new) and (b < a or not right):
                b *= new[j]
                right.append(j)
                j += 1
            else:
                break
            if a == b and left and right:
                break
        if not left and not right:
            break
        found.append((left, right))
    return found


def _permuted(rows: TokenRows, function, args, kwargs, out) -> None:
    """transpose, permute, movedim, T."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return
    known = rows.of(x)
    if isinstance(known, Along):
        # Sizes that differ show where an axis goes.
        marker = torch.empty(tuple(range(2, 2 + x.dim())), device="meta")
        moved = function(marker, *args[1:], **{n: v for n, v in kwargs.items() if n != "input"})
        rows._keep(out, replace(known, axis=list(moved.shape).index(2 + known.axis)))
    elif isinstance(known, Numbers):
        rows._keep(out, Numbers(function(known.samples, *args[1:], **kwargs)))
    elif rows._is_noted(x):
        rows._keep(out, UNKNOWN)


def _moved(rows: TokenRows, function, args, kwargs, out) -> None:
    """index, select, split, expand, repeat, gather, ...: done to the numbers of the rows as to the rows."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.is_floating_point() or not any(y.requires_grad for y in _flat(out)):
        return
    known = rows.of(x)
    if known is UNKNOWN:
        if rows._is_noted(x):
            for y in _flat(out):
                rows._keep(y, UNKNOWN)
        return
    if isinstance(known, Along):
        if function in _GATHERS:
            # Along the other axes an entry stays at its place.
            dim = kwargs.get(
                "dim", args[2] if function in _TAKES and len(args) > 2 else args[1] if len(args) > 1 else 0
            )
            is_other = isinstance(dim, int) and dim % x.dim() != known.axis
            if is_other and out.dim() == x.dim() and out.shape[known.axis] == x.shape[known.axis]:
                return rows._keep(out, known)
        if _keeps_first(function, args, kwargs, known, x, out):
            for y in _flat(out):
                rows._keep(y, known)
            return
        places = _axes_after(function, args, kwargs, known, x, out)
        if places is not None:
            for y, place in zip(_flat(out), places, strict=True):
                rows._keep(y, place)
            return
    numbers, others, named = rows._numbers(x, known), args[1:], dict(kwargs)
    named.pop("input", None)
    whole = list(x.shape)
    if numbers.shape[-1] == 1 and x.dim() > 1 and _leaves_last(function, others, named, x.dim()):
        # The numbers of a row, not those of its every feature.
        whole[-1] = 1
        if function in _GATHERS:
            others, named = _cut_index(others, named)
    moved = function(numbers.expand(whole), *others, **named)
    for y, m in zip(_flat(out), _flat(moved), strict=True):
        rows._keep(y, Numbers(_narrowed(m)))


def _narrowed(numbers: Tensor) -> Tensor:
    for axis, stride in enumerate(numbers.stride()):
        if stride == 0 and numbers.shape[axis] > 1:
            numbers = numbers.narrow(axis, 0, 1)
    return numbers


def _axes_after(function, args, kwargs, known: Along, x: Tensor, out: Any) -> list[Along] | None:
    """Where the samples' axis is in the parts that a function gives, each with all of it; None if that is not clear.

    A view is made of a tensor that has a step along that axis alone, so that the step shows where the axis goes.
    """
    size, others = x.shape[known.axis], args[1:]
    if function in _INTERLEAVES or function in (torch.index_select, Tensor.index_select):
        dim = kwargs.get("dim", others[0] if function not in _INTERLEAVES and others else None)
        if function in _INTERLEAVES and len(others) > 1:
            dim = others[1]
        return (
            [known] if isinstance(dim, int) and dim % x.dim() != known.axis and out.dim() == x.dim() else None
        )
    if function is Tensor.__getitem__:
        others = (_with_slice(others[0], size),)
    if _indexes_by_tensor(function, others):
        return None
    steps = [0] * x.dim()
    steps[known.axis] = 1
    marker = torch.empty(size).as_strided(x.shape, steps)
    places = []
    for y in _flat(function(marker, *others, **{n: v for n, v in kwargs.items() if n != "input"})):
        axes = [a for a, step in enumerate(y.stride()) if step and y.shape[a] > 1]
        is_view = y.untyped_storage()._cdata == marker.untyped_storage()._cdata
        if not is_view or len(axes) != 1 or y.shape[axes[0]] != size or y.stride(axes[0]) != 1:
            return None
        places.append(Along(axes[0], known.each))
    return places


def _with_slice(key: Any, size: int) -> Any:
    """An index in which a list of integers, if it is the only one, is a slice of as many: a view has the same axes.

    Not where there are as many as samples' entries, for that list may mean their axis.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    lists = [i for i, k in enumerate(keys) if isinstance(k, list)]
    if len(lists) != 1 or any(isinstance(k, Tensor) for k in keys):
        return key
    numbers = keys[lists[0]]
    if all(type(n) is int for n in numbers) and len(numbers) != size:
        keys[lists[0]] = slice(0, len(numbers))
    return tuple(keys)


def _indexes_by_tensor(function, others: tuple) -> bool:
    if function is Tensor.__getitem__:
        key = others[0] if isinstance(others[0], tuple) else (others[0],)
        return any(isinstance(k, (Tensor, list)) for k in key)
    return any(isinstance(x, Tensor) for x in others) or function not in (_SPLITS | _EXPANDS | _VIEWS)


def _keeps_first(function, args, kwargs, known: Along, x: Tensor, out: Any) -> bool:
    """Whether samples plainly still run along the first axis as they did, so that there is nothing to count."""
    if known.axis != 0 or any(y.dim() == 0 or y.shape[0] != x.shape[0] for y in _flat(out)):
        return False
    if function is Tensor.__getitem__:
        key = args[1] if isinstance(args[1], tuple) else (args[1],)
        plain = all(k is None or k is Ellipsis or isinstance(k, (slice, int)) for k in key)
        taken = sum(k is not None and k is not Ellipsis for k in key)
        first = key[0] is Ellipsis or (isinstance(key[0], slice) and key[0] == slice(None))
        return plain and first and taken < x.dim() + (key[0] is not Ellipsis)
    return function in _SPLITS or (function in _EXPANDS and all(y.dim() == x.dim() for y in _flat(out)))


def _leaves_last(function, others: tuple, named: dict[str, Any], dims: int) -> bool:
    """Whether an operation does not touch the last axis."""
    if function is Tensor.__getitem__:
        key = others[0] if isinstance(others[0], tuple) else (others[0],)
        if any(k is Ellipsis or isinstance(k, list) for k in key):
            return False
        masks = [k.dim() for k in key if isinstance(k, Tensor) and k.dtype == torch.bool]
        return sum(k is not None for k in key) - len(masks) + sum(masks) < dims
    if function is Tensor.repeat:
        sizes = others[0] if len(others) == 1 and isinstance(others[0], (tuple, list, torch.Size)) else others
        return sizes[-1] == 1
    place = 1 if function in _SPLITS else 0
    dim = named.get("dim")
    if dim is None:
        if function in _INTERLEAVES:
            place = 1
        if len(others) > place and isinstance(others[place], int):
            dim = others[place]
        elif function in _SPLITS:
            dim = 0
    return isinstance(dim, int) and dim % dims != dims - 1


def _cut_index(others: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def cut(value: Any) -> Any:
        return value[..., :1] if isinstance(value, Tensor) else value

    return tuple(map(cut, others)), {name: cut(value) for name, value in named.items()}


def _joined(rows: TokenRows, function, args, kwargs, out) -> None:
    """cat."""
    parts = [x for x in _flat(args[0] if args else kwargs.get("tensors")) if x.numel() or x.dim() > 1]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if (
        not parts
        or not isinstance(dim, int)
        or not out.requires_grad
        or any(x.dim() != out.dim() for x in parts)
    ):
        return
    dim %= out.dim()
    known = [rows.of(x) for x in parts]
    runs = [k.axis if isinstance(k, Along) else None for k in known]
    if dim != 0 and all(run == 0 for run in runs):
        return
    if any(k is UNKNOWN for k in known):
        # A constant joined to activations along another axis than that of the rows.
        left = [(x, k) for x, k in zip(parts, known, strict=True) if k is not UNKNOWN and rows.moves(x)]
        if dim == 0 or not left:
            return rows._keep(out, UNKNOWN)
        return rows._keep(out, left[0][1])
    numbers = [rows._numbers(x, k) for x, k in zip(parts, known, strict=True)]
    if all(n.shape[dim] == 1 for n in numbers) and dim != 0:
        return rows._keep(out, known[0])
    whole = []
    for x, n in zip(parts, numbers, strict=True):
        sizes = [
            1 if a != dim and all(m.shape[a] == 1 for m in numbers) else x.shape[a] for a in range(x.dim())
        ]
        whole.append(n.expand(sizes))
    return rows._keep(out, Numbers(torch.cat(whole, dim)))


def _stacked(rows: TokenRows, function, args, kwargs, out) -> None:
    """stack: a new axis, before or behind that of the samples."""
    parts = _flat(args[0] if args else kwargs.get("tensors"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not out.requires_grad or not isinstance(dim, int):
        return
    dim %= out.dim()
    moving = [x for x in parts if rows.moves(x)]
    known = [rows.of(x) for x in moving]
    first = known[0] if known else UNKNOWN
    if isinstance(first, Along) and all(k == first for k in known):
        return rows._keep(out, Along(first.axis + (dim <= first.axis), first.each))
    numbers = [rows._numbers(x, k) for x, k in zip(moving, known, strict=True)]
    if numbers and all(n is not None and torch.equal(n, numbers[0]) for n in numbers):
        return rows._keep(out, Numbers(numbers[0].unsqueeze(dim)))
    return rows._keep(out, UNKNOWN)


def _reduced(rows: TokenRows, function, args, kwargs, out) -> None:
    """sum, mean, ...: over axes along which all rows are of one sample."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not rows._is_noted(x):
        return
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    axes = [] if dim is None else [a % x.dim() for a in ([dim] if isinstance(dim, int) else dim)]
    known, left = rows.of(x), rows._numbers(x, rows.of(x))
    # A token's rows at its experts, which the model adds up, are of one sample; over all rows a sum mixes samples.
    is_mixed = left is None or not axes or any(left.shape[a] != 1 for a in axes if a == 0)
    if isinstance(known, Along):
        is_mixed = is_mixed or known.axis in axes
    if rows.is_packed and not is_mixed:
        # A token's rows at its experts again; a sum over tokens may mix samples.
        is_mixed = any(
            left.shape[a] != 1 and not torch.equal(left, left.narrow(a, 0, 1).expand_as(left)) for a in axes
        )
    for y in _flat(out):
        if not y.requires_grad:
            continue
        if is_mixed:
            rows._keep(y, UNKNOWN)
            continue
        kept = left
        for axis in sorted(axes, reverse=True):
            kept = kept.narrow(axis, 0, 1)
            if y.dim() < x.dim():
                kept = kept.squeeze(axis)
        along = [axis for axis, size in enumerate(kept.shape) if size != 1]
        is_along = isinstance(known, Along) and len(along) == 1
        rows._keep(y, replace(known, axis=along[0]) if is_along else rows._simplest(y, kept))


def _written(rows: TokenRows, function, args, kwargs, out) -> None:
    """x[key] = y: the rows of y come to x."""
    x, key, y = args
    if not isinstance(y, Tensor) or not rows.moves(y):
        return
    is_noted = rows._is_noted(y)
    # A whole slice along the samples' axis writes each to its own.
    first = key[0] if isinstance(key, tuple) and key else key
    if not is_noted and not isinstance(first, (int, Tensor)):
        return
    numbers, own = rows._numbers(y, rows.of(y)), rows._numbers(x, rows.of(x))
    by_row = x.dim() > 1 and _leaves_last(Tensor.__getitem__, (key,), {}, x.dim())
    is_clear = by_row and numbers is not None and numbers.shape[-1] == 1
    if not is_noted and (not is_clear or own is None):
        return
    if not is_clear:
        rows._keep(x, UNKNOWN)
        return
    shape = (*x.shape[:-1], 1)
    before = torch.zeros(shape, dtype=torch.int64, device=x.device) if own is None else own.expand(shape)
    after = before.clone()
    after[key] = numbers.expand(*y.shape[:-1], 1)
    if is_noted or not torch.equal(before, after):
        rows._keep(x, Numbers(after))


def _of_first(rows: TokenRows, function, args, kwargs, out) -> None:
    """index_add and the like: rows are put to their places in what is there, which keeps its own where it has any."""
    x = args[0]
    if not isinstance(out, Tensor):
        return
    if out is not x:
        rows.carry(x, out)
    named = dict(zip(("dim", "index", "source"), args[1:4], strict=False))
    named |= {name: kwargs[name] for name in ("dim", "index", "source", "src", "tensor") if name in kwargs}
    y = named.get("source", named.get("src", named.get("tensor")))
    if function not in _PUTS or not isinstance(y, Tensor):
        return
    known, numbers = rows.of(out), rows._numbers(y, rows.of(y))
    if rows.is_packed and isinstance(known, Numbers):
        dim, own = named["dim"] % x.dim(), known.samples
        if numbers is None or any(n != 1 for k in (own, numbers) for a, n in enumerate(k.shape) if a != dim):
            return rows._keep(out, UNKNOWN)
        sizes = [n if axis == dim else 1 for axis, n in enumerate(y.shape)]
        whole = own.expand([n if axis == dim else 1 for axis, n in enumerate(x.shape)])
        return rows._keep(out, Numbers(whole.index_copy(dim, named["index"], numbers.expand(sizes))))
    if known is not UNKNOWN:
        # The rows of the whole batch come back in an order of their own; an expert's own rows are picked, and noted.
        if known == Along(0, rows.length) and rows.of(y) == known and named["dim"] % x.dim() == 0:
            before = torch.arange(len(x), device=x.device) // known.each
            after = before.index_copy(0, named["index"], before)
            if not torch.equal(before, after):
                rows._keep(out, Numbers(after.view(-1, *[1] * (x.dim() - 1))))
        return
    dim = named["dim"] % x.dim()
    if numbers is not None and all(size == 1 for axis, size in enumerate(numbers.shape) if axis != dim):
        shape = [n if axis == dim else 1 for axis, n in enumerate(x.shape)]
        own = torch.zeros(shape, dtype=torch.int64, device=x.device)
        whole = [n if axis == dim else 1 for axis, n in enumerate(y.shape)]
        rows._keep(out, Numbers(own.index_copy(dim, named["index"], numbers.expand(whole))))


def _looked_up(rows: TokenRows, function, args, kwargs, out) -> None:
    """F.embedding of activations: x[ids]."""
    ids, x = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("input", "weight")))
    _moved(rows, Tensor.__getitem__, (x, ids), {}, out)


def _along_axis(rows: TokenRows, function, args, kwargs, out) -> None:
    """sort, cumsum, ...: along another axis than that of the samples every entry stays with its sample."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return
    place, usual = _AXES[function]
    dim = kwargs.get("dim", kwargs.get("dimension", args[place] if len(args) > place else usual))
    known = rows.of(x)
    if isinstance(dim, int) and x.dim():
        dim %= x.dim()
        is_kept = (isinstance(known, Along) and known.axis != dim) or (
            isinstance(known, Numbers) and known.samples.shape[dim] == 1
        )
    else:
        is_kept = False
    for y in _flat(out):
        if y.requires_grad:
            is_same = isinstance(known, Along) or (is_kept and y.dim() == x.dim())
            rows._keep(y, known if is_kept and is_same else UNKNOWN)


def _mixed(rows: TokenRows, function, args, kwargs, out) -> None:
    """Operations whose rows are not followed."""
    for y in _flat(out):
        if y.requires_grad:
            rows._keep(y, UNKNOWN)


def _multiplied(rows: TokenRows, function, args, kwargs, out) -> None:
    """Products of matrices: rows of the left factor; a constant's product with rows on the right adds rows up."""
    left, right = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    if isinstance(right, Tensor) and not rows.moves(left) and rows.moves(right) and right.dim() > 1:
        known = rows.of(right)
        if isinstance(known, Along) and known.axis == right.dim() - 2:
            return rows._keep(out, UNKNOWN)
        if rows.is_packed:
            is_by_column = (
                isinstance(known, Numbers) and known.samples.shape[-2] == 1 and right.dim() == out.dim()
            )
            return rows._keep(out, known if is_by_column else UNKNOWN)
    if rows.is_packed and rows.moves(left):
        # Of queries by keys, and of weights by values, rows are the left factor's.
        known = rows.of(left)
        is_by_row = isinstance(known, Numbers) and known.samples.shape[-1] == 1 and left.dim() == out.dim()
        return rows._keep(out, known if is_by_row else UNKNOWN)
    return rows._same_rows(args, kwargs, out)


def _einsum(rows: TokenRows, function, args, kwargs, out) -> None:
    """einsum: the samples' letter tells the axis of the output along which they run."""
    equation, *factors = args
    if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = list(factors[0])
    plain = isinstance(equation, str) and "->" in equation and "." not in equation
    if rows.is_packed:
        return rows._keep(out, _of_einsum(rows, equation, factors) if plain else UNKNOWN)
    moving = [(i, x) for i, x in enumerate(factors) if isinstance(x, Tensor) and rows.moves(x)]
    known = [rows.of(x) for _, x in moving]
    if not plain or any(isinstance(k, Numbers) for k in known):
        return rows._same_rows(args, kwargs, out)
    given, _, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    found = [
        (rows._is_noted(x), Along(result.index(letter), k.each, k.in_order))
        for (i, x), k in zip(moving, known, strict=True)
        if isinstance(k, Along) and (letter := terms[i][k.axis]) in result
    ]
    # What is noted is known; another may have as many entries by chance, and then has them first as a rule.
    found.sort(key=lambda entry: (not entry[0], entry[1].axis))
    if found:
        return rows._keep(out, found[0][1])
    return rows._keep(out, UNKNOWN) if out.requires_grad else None


def _of_einsum(rows: TokenRows, equation: str, factors: Sequence[Tensor]) -> Numbers | object:
    """Of packed samples: the numbers of the first factor that is known, if its tokens' letters are the output's."""
    given, _, result = equation.replace(" ", "").partition("->")
    for letters, x in zip(given.split(","), factors, strict=True):
        known = rows.of(x) if isinstance(x, Tensor) and rows.moves(x) else UNKNOWN
        if isinstance(known, Numbers):
            moving = [c for c, n in zip(letters, known.samples.shape, strict=True) if n != 1]
            if not set(moving) <= set(result):
                return UNKNOWN
            numbers = torch.einsum(f"{letters}->{''.join(moving)}", known.samples)
            order = sorted(moving, key=result.index)
            numbers = numbers.permute([moving.index(c) for c in order])
            sizes = dict(zip(order, numbers.shape, strict=True))
            return Numbers(numbers.reshape([sizes.get(c, 1) for c in result]))
    return UNKNOWN


def _both(*names: str) -> list[Any]:
    """The functions of these names, of torch and of tensors."""
    return [getattr(place, name) for name in names for place in (torch, Tensor) if hasattr(place, name)]


_SPLITS = set(_both("split", "chunk", "tensor_split", "split_with_sizes"))
_PUTS = set(_both("index_add", "index_add_", "index_copy", "index_copy_"))
_EXPANDS = set(_both("expand", "expand_as"))
_GATHERS = set(_both("gather", "take_along_dim"))
_TAKES = set(_both("take_along_dim"))
_VIEWS = set(_both("select", "narrow", "unbind"))
_INTERLEAVES = set(_both("repeat_interleave"))
# Of functions along an axis: where it is among the arguments, and which it is if it is not given.
_AXES = {
    **dict.fromkeys(_both("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"), (1, None)),
    **dict.fromkeys(_both("sort"), (1, -1)),
    **dict.fromkeys(_both("topk", "kthvalue"), (2, -1)),
    **dict.fromkeys(_both("msort", "flipud"), (99, 0)),
    **dict.fromkeys(_both("unfold"), (1, None)),
}
_RULES: dict[Any, Callable] = {
    **dict.fromkeys(_AXES, _along_axis),
    **dict.fromkeys(_both("take", "put", "put_", "as_strided", "rot90", "kron", "block_diag"), _mixed),
    **dict.fromkeys([*_both("matmul", "mm", "bmm"), Tensor.__matmul__], _multiplied),
    torch.einsum: _einsum,
    torch.nn.functional.embedding: _looked_up,
    **dict.fromkeys(
        _both("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"), _reshaped
    ),
    **dict.fromkeys(
        [
            *_both("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t"),
            *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
        ],
        _permuted,
    ),
    **dict.fromkeys(
        [
            Tensor.__getitem__,
            *_SPLITS,
            *_EXPANDS,
            *_GATHERS,
            *_INTERLEAVES,
            *_both("index_select", "select", "narrow", "unbind", "repeat", "tile", "flip", "roll", "masked_select"),
        ],
        _moved,
    ),
    **dict.fromkeys(_both("cat", "concat", "concatenate"), _joined),
    **dict.fromkeys(_both("stack"), _stacked),
    **dict.fromkeys(_both("sum", "mean", "amax", "amin", "logsumexp", "prod"), _reduced),
    Tensor.__setitem__: _written,
    **dict.fromkeys(
        _both(
            "index_add", "index_add_", "index_copy", "index_copy_", "scatter_add", "scatter_add_", "scatter",
            "scatter_", "scatter_reduce", "scatter_reduce_", "index_put", "index_put_", "masked_scatter",
            "masked_scatter_",
        ),
        _of_first,
    ),
}  # fmt: skip
