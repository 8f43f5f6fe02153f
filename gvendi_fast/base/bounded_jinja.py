"""Jinja templates of strangers with a bound on their steps and on the characters they handle, the same on any machine.

A sandbox keeps a template from reading files, not from a loop of 10^10 or a text of 4 GB. Here every turn of a loop,
call and filter is counted when it happens, and what may make much of little (a width, a repetition, a replacement) is
counted before it is made. What is counted is decided by the template and its values alone, no clock is read.

Constants are not worked out while a template is compiled, for no count is kept there: outside of `counting` everything
that counts refuses, and Jinja leaves the expression to the rendering.
"""

from __future__ import annotations

import functools
import string
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# A chat template takes about 50 steps a message and handles its text some ten times.
STEPS, STEPS_A_VALUE = 200_000, 1_000
CHARACTERS, CHARACTERS_A_VALUE, CHARACTERS_A_CHARACTER = 1 << 22, 1 << 12, 64
# Characters that an entry of a list counts for: it takes as much memory, and as long to look at.
ENTRY = 16
# Widths, precisions and indents of any layout; digits of an integer (Python prints 4300).
MOST_WIDTH, MOST_BITS = 1 << 16, 1 << 14

_HANDLED, _PASSED, _WRITTEN, _ADDED = "handled value", "passed value", "written text", "added values"
_TEXT = {str}
_GROWING = frozenset({"+", "*", "**", "%"})


class TooMuchError(TemplateRuntimeError):
    """A template that takes more steps, or handles more characters, than its values account for."""


def words_of(error: Exception) -> str:
    """What a template raised: errors of templates in their own words, others with their kind."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    kind = type(error).__name__
    return (str(error) or kind) if isinstance(error, TemplateError) else f"{kind}: {error}"


class Budget:
    """What a rendering may still take: steps and characters."""

    def __init__(self, steps: int, characters: int) -> None:
        self.most_steps, self.most_characters = steps, characters
        self.steps, self.characters = steps, characters

    def fresh(self) -> Budget:
        """The same budget, of which nothing is taken."""
        return Budget(self.most_steps, self.most_characters)

    def step(self, count: int = 1) -> None:
        """Raises TooMuchError where none is left."""
        self.steps -= max(count, 0)
        if self.steps < 0:
            raise TooMuchError(f"more than {self.most_steps:,} steps")

    def take(self, count: int) -> None:
        """`count` more characters, or entries of lists; raises TooMuchError where that many are not left."""
        self.characters -= max(count, 0)
        if self.characters < 0:
            raise TooMuchError(f"more than {self.most_characters:,} characters")

    def measure(self, value: Any) -> int:
        """The characters and entries of a value, however often a list in it is repeated; they are taken."""
        kind = type(value)
        if kind is str:
            self.take(len(value))
            return len(value)
        if kind is int or kind is bool or kind is float or value is None:
            return 1
        total, waiting = 0, [value]
        while waiting:
            value = waiting.pop()
            size, inner = _parts(value)
            total += size
            self.take(size)
            waiting.extend(inner)
        return total


class _Active(threading.local):
    budget: Budget | None = None


_active = _Active()


def _parts(value: Any) -> tuple[int, Iterable[Any]]:
    """A value's own size, and the values in it."""
    if isinstance(value, str | bytes):
        return len(value), ()
    if isinstance(value, int):
        return 1 + value.bit_length() // 3, ()
    if isinstance(value, Mapping):
        return ENTRY * (1 + len(value)), (*value.keys(), *value.values())
    if isinstance(value, Namespace):
        return ENTRY, (value._Namespace__attrs,)
    if isinstance(
        value, list | tuple | set | frozenset | type({}.keys()) | type({}.values()) | type({}.items())
    ):
        return ENTRY * (1 + len(value)), tuple(value)
    # Generators, macros, loops: neither printing nor comparing them looks inside.
    return 1, ()


def budget_for(values: Any) -> Budget:
    """The budget of a rendering with these values: a constant, and more for larger ones."""
    count, characters, waiting = 0, 0, [values]
    while waiting:
        size, inner = _parts(waiting.pop())
        count, characters = count + 1, characters + size
        waiting.extend(inner)
    characters = CHARACTERS + CHARACTERS_A_VALUE * count + CHARACTERS_A_CHARACTER * characters
    return Budget(STEPS + STEPS_A_VALUE * count, characters)


@contextmanager
def counting(budget: Budget | None) -> Iterator[None]:
    """Templates that this thread renders inside take of this budget; None: nothing that counts can be done."""
    before = _active.budget
    _active.budget = budget
    try:
        yield
    finally:
        _active.budget = before


def _budget() -> Budget:
    budget = _active.budget
    if budget is None:
        raise TooMuchError("a template is rendered outside of its budget")
    return budget


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a rendering inside `counting` takes of a budget. What it writes is the same."""

    intercepted_binops = _GROWING

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bind()

    @classmethod
    def like(cls, other: ImmutableSandboxedEnvironment) -> BoundedEnvironment:
        """An environment with the filters, globals, extensions and options of another one."""
        made = object.__new__(cls)
        made.__dict__.update(other.__dict__)
        made.extensions = {name: extension.bind(made) for name, extension in other.extensions.items()}
        made.cache, made.globals, made.tests = {}, dict(other.globals), dict(other.tests)
        made._bind()
        return made

    def _bind(self) -> None:
        self.filters = {name: _counted_filter(name, one) for name, one in self.filters.items()}
        self.filters |= {_HANDLED: _handled, _PASSED: _passed, _WRITTEN: _written, _ADDED: _added}
        # Tests that compare; the others look at a type.
        comparing = (
            "==",
            "eq",
            "equalto",
            "!=",
            "ne",
            "<",
            "lt",
            "lessthan",
            "<=",
            "le",
            ">",
            "gt",
            "greaterthan",
        )
        comparing += (">=", "ge", "in")
        self.tests |= {name: _counted_test(self.tests[name]) for name in comparing if name in self.tests}
        # Draws that no seed repeats.
        self.filters["random"] = self.globals["lipsum"] = _drawn
        self.finalize = _finalized

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counted().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """See Environment; no constant that counts is worked out."""
        with counting(None):
            return super().compile(*args, **kwargs)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """See SandboxedEnvironment; counted before and after."""
        budget = _budget()
        budget.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | Mapping | int | float):
            # What a generator gives is counted as it comes.
            args = tuple(_listed(budget, value) for value in args)
            _check_method(budget, owner, __obj.__name__, args, kwargs)
        # A macro counts what it does with its values; everything else may look into them.
        if not isinstance(__obj, Macro):
            for value in (*args, *kwargs.values()):
                budget.measure(value)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | bytes | list | tuple | dict):
            budget.take(len(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See SandboxedEnvironment; counted before it is done."""
        _check_operator(_budget(), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """See SandboxedEnvironment."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__
        is_map = value.__name__ == "format_map"

        @functools.wraps(wrapped)
        def counted(*args: Any, **kwargs: Any) -> str:
            _check_format(_budget(), text, args, args[0] if is_map and args else kwargs)
            return wrapped(*args, **kwargs)

        return counted


class _Counted(NodeTransformer):
    """Puts counting into a template: a step for every turn of a loop, characters for what is copied and compared."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        if node.test is not None:
            # Turns that the test leaves out are turns.
            turn = _filter(nodes.Const(True, lineno=node.lineno), _HANDLED, node)
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return self._again(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        self.generic_visit(node)
        return self._again(node)

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

    def _again(self, node: Any) -> Any:
        """Counts what the body of a loop or a macro writes by itself, each time that it is run."""
        node.body.insert(0, _statement(sum(map(_own_text, node.body)), node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_filter(one, _HANDLED, node) for one in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        left = node.left
        # Templates put a turn together from five texts or more: one call instead of four.
        if isinstance(left, nodes.Filter) and left.name == _ADDED:
            left.args.append(node.right)
            return left
        return nodes.Filter(left, _ADDED, [node.right], [], None, None, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)
        # A comparison ends with the smaller of its values, so that one of the two is looked at, and a constant is
        # small; a text is searched for another one from end to end.
        left = node.expr
        for operand in node.ops:
            right, is_search = operand.expr, operand.op in ("in", "notin")
            if is_search and not (_is_small(right) and _is_small(left)):
                operand.expr = _filter(right, _HANDLED, node)
            if not _is_small(left) and not _is_small(right):
                node.expr = _filter(node.expr, _HANDLED, node)
                operand.expr = right if is_search else _filter(right, _HANDLED, node)
            left = right
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, _PASSED, node)
        elif not isinstance(node.arg, nodes.Const):
            node.arg = _filter(node.arg, _HANDLED, node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(node.key, _HANDLED, node)
        return node


def _is_small(node: nodes.Expr) -> bool:
    """A constant, or a list of some: as large as it stands in the template."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_small, node.items))
    return isinstance(node, nodes.Const)


def _own_text(node: nodes.Node) -> int:
    """The characters that a node writes by itself at most; loops in it count each of their turns themselves."""
    if isinstance(node, nodes.TemplateData):
        return len(node.data)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
        return sum(map(_own_text, node.else_)) if isinstance(node, nodes.For) else 0
    return sum(map(_own_text, node.iter_child_nodes()))


def _filter(value: nodes.Expr, name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=node.lineno)


def _statement(count: int, node: nodes.Node) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filter(nodes.Const(count, lineno=node.lineno), _WRITTEN, node), lineno=node.lineno)


def _handled(value: Any) -> Any:
    """A value that is compared, joined or looked up."""
    budget = _budget()
    budget.step()
    budget.measure(value)
    return value


def _listed(budget: Budget, value: Any) -> Any:
    """A generator as the list of what it gives, any other value as it is."""
    if not hasattr(type(value), "__next__"):
        return value
    values = []
    for one in value:
        budget.step()
        budget.measure(one)
        values.append(one)
    return values


def _passed(value: Any) -> Any:
    """A value of which a slice is taken."""
    budget = _budget()
    budget.step()
    budget.take(len(value) if isinstance(value, str | bytes | list | tuple) else 1)
    return value


def _written(count: int) -> None:
    """One turn, or so many characters of the template's own."""
    budget = _budget()
    budget.step()
    budget.take(count)


def _added(*values: Any) -> Any:
    """The sum of values, from left to right; texts are joined, which gives the same and handles each of them once."""
    budget = _budget()
    if {*map(type, values)} == _TEXT:
        budget.step(len(values) - 1)
        budget.take(sum(map(len, values)))
        return "".join(values)
    total = values[0]
    for value in values[1:]:
        _check_operator(budget, "+", total, value)
        total = total + value
    return total


def _finalized(value: Any) -> Any:
    """A value that is written."""
    budget = _budget()
    if type(value) is str:
        budget.characters -= len(value) + ENTRY
        if budget.characters < 0:
            budget.take(0)
        return value
    budget.take(ENTRY)
    budget.measure(value)
    return value


def _drawn(*args: Any, **kwargs: Any) -> Any:
    raise SecurityError("a template that draws at random (random, lipsum) gives other text every time")


def _width(budget: Budget, name: str, value: Any) -> int:
    """A width, precision or indent; refused beyond what any layout has."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int | float) and not -MOST_WIDTH <= value <= MOST_WIDTH:
        raise TooMuchError(f"{name} of {value if value < 10**12 else 'over 10^12'}, more than {MOST_WIDTH:,}")
    return abs(int(value)) if isinstance(value, int | float) else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    budget.step()
    if operator == "+" and type(left) is str and type(right) is str:
        budget.take(len(left) + len(right))
    elif operator == "%" and isinstance(left, str | bytes):
        _check_percent(budget, left, right)
    elif operator == "*" and (_is_sequence(left) or _is_sequence(right)):
        times = right if _is_sequence(left) else left
        whole = _length(left if _is_sequence(left) else right)
        budget.take(whole * max(times, 1) if isinstance(times, int) else whole)
    elif _is_sequence(left) or _is_sequence(right):
        budget.take(_length(left) + _length(right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = (
            left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
        )
        if bits > MOST_BITS and abs(left) > 1:
            raise TooMuchError(f"an integer of more than {MOST_BITS:,} bits")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _check_percent(budget: Budget, text: str | bytes, values: Any) -> None:
    size = budget.measure(values) + len(text)
    # Each directive may write the largest value; a width of its own, or one among the values, comes on top.
    count = text.count(b"%" if isinstance(text, bytes) else "%")
    budget.take(count * size)
    pieces = (text.decode("latin-1") if isinstance(text, bytes) else text).split("%")[1:]
    for piece in pieces:
        width = _numbers(budget, piece)
        if "*" in piece:
            width += max(
                (_width(budget, "a width", v) for v in _each(values) if isinstance(v, int)), default=0
            )
        budget.take(width)


def _check_format(budget: Budget, text: str, args: Iterable[Any], named: Any) -> None:
    values = [*args, *(named.values() if isinstance(named, Mapping) else ())]
    size = budget.measure(values) + len(text)
    widest = 0
    try:
        for _, field, spec, _ in string.Formatter().parse(text):
            if field is None:
                continue
            budget.step()
            budget.take(size + _numbers(budget, spec or ""))
            if "{" in (spec or ""):
                widest = max(
                    (_width(budget, "a width", v) for v in _each(values) if isinstance(v, int)), default=0
                )
                widest += sum(_numbers(budget, v) for v in _each(values) if isinstance(v, str))
                budget.take(widest)
    except ValueError:
        # A text that is no format: what formats it says so.
        return


def _numbers(budget: Budget, text: str) -> int:
    """The widths and precisions written in a format."""
    total, digits = 0, ""
    for letter in [*text, " "]:
        if letter.isdigit():
            digits += letter
        elif digits:
            if len(digits) > 6:
                raise TooMuchError(f"a width of {len(digits)} digits, more than {MOST_WIDTH:,}")
            total, digits = total + _width(budget, "a width", int(digits)), ""
    return total


def _each(values: Any) -> Iterable[Any]:
    flat = (
        values.values()
        if isinstance(values, Mapping)
        else values
        if isinstance(values, list | tuple)
        else (values,)
    )
    for value in flat:
        if isinstance(value, Mapping | list | tuple):
            yield from _each(value)
        else:
            yield value


def _check_method(budget: Budget, owner: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Before a method of a text, list, dict or number is called."""
    if isinstance(owner, str | bytes):
        budget.take(len(owner))
        _check_text(budget, owner, name, [*args, *kwargs.values()])
    elif isinstance(owner, int | float):
        for value in (*args, *kwargs.values()):
            budget.take(_width(budget, f"{name}()", value) if isinstance(value, int) else 0)
    elif name in ("get", "pop", "setdefault", "items", "keys", "values"):
        budget.step()
    else:
        budget.measure(owner)


def _check_text(budget: Budget, text: str | bytes, name: str, values: list[Any]) -> None:
    first = values[0] if values else None
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.take(_width(budget, f"{name}()", first))
    elif name == "expandtabs":
        tabs = text.count(b"\t" if isinstance(text, bytes) else "\t")
        budget.take(tabs * _width(budget, "expandtabs()", first if values else 8))
    elif name == "replace" and len(values) > 1:
        _check_replace(budget, text, first, values[1])
    elif name == "join" and values:
        budget.take(len(text) * (_length(first) or _count(first)))
    elif name == "translate" and isinstance(first, Mapping):
        budget.take(len(text) * max((_length(value) for value in first.values()), default=1))
    elif name in ("split", "rsplit", "splitlines", "encode", "hex"):
        # Every piece is an object of its own.
        budget.take(8 * len(text))


def _count(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    # Values of other types are refused by what replaces.
    if isinstance(old, str | bytes) and isinstance(text, str) == isinstance(old, str):
        times = text.count(old) if old else len(text) + 1
        budget.take(len(text) + times * _length(new))


def _counted_test(test: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(test)
    def counted(*args: Any) -> Any:
        budget = _budget()
        budget.step()
        for value in args:
            budget.measure(value)
        return test(*args)

    return counted


# Filters that look at a value without going through it.
_LIGHT = frozenset(
    "abs attr count d default first items last length map reject rejectattr safe select selectattr".split()
)
# Filters that take long for each character or entry, or make an object of each.
_SLOW = frozenset("dictsort groupby list sort title truncate unique urlencode wordcount".split())
# Filters whose work grows with the square of what they are given.
_SQUARE = frozenset("pprint striptags sum urlize xmlattr".split())


def _counted_filter(name: str, one: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts, with the marks by which Jinja knows what to give it."""
    leading = 1 if getattr(one, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(one)
    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        budget.step()
        value, *rest = args[leading:] or (None,)
        if name not in _LIGHT:
            value = _listed(budget, value)
            args = (*args[:leading], value, *rest) if len(args) > leading else args
        options = [*rest, *kwargs.values()]
        size = 1 if name in _LIGHT else budget.measure(value)
        for option in options:
            budget.measure(option)
        _check_filter(budget, name, value, size, rest, kwargs)
        result = one(*args, **kwargs)
        if isinstance(result, str | bytes | list | tuple | dict):
            budget.take(len(result))
        return result

    return counted


def _check_filter(
    budget: Budget, name: str, value: Any, size: int, rest: list[Any], kwargs: Mapping[str, Any]
) -> None:
    """Before a filter is called that may make more than it is given."""

    def option(position: int, key: str, default: Any = None) -> Any:
        return kwargs.get(key, rest[position] if len(rest) > position else default)

    if name in _SQUARE and not (name == "sum" and isinstance(option(1, "start", 0), int | float)):
        budget.take(size * size // 256)
    elif name in _SLOW:
        budget.take(16 * size)
    elif name == "center":
        budget.take(_width(budget, name, option(0, "width", 80)))
    elif name == "indent":
        lines = str.count(value, "\n") + 1 if isinstance(value, str) else 1
        budget.take(lines * _width(budget, name, option(0, "width", 4)))
    elif name == "wordwrap":
        width = max(_width(budget, name, option(0, "width", 79)), 1)
        budget.take(8 * size + (size // width + 1) * _length(option(2, "wrapstring", "")))
    elif name == "replace" and len(rest) + len(kwargs) > 1:
        _check_replace(budget, str(value), str(option(0, "old", "")), str(option(1, "new", "")))
    elif name == "join":
        budget.take(_count(value) * _length(option(0, "d", "")))
    elif name == "format":
        if isinstance(value, str):
            _check_percent(budget, value, dict(kwargs) if kwargs else tuple(rest))
    elif name in ("batch", "slice"):
        budget.take(_width(budget, name, option(0, "linecount" if name == "batch" else "slices", 1)))
    elif name == "round":
        if isinstance(precision := option(0, "precision", 0), int) and abs(precision) > 400:
            raise TooMuchError(f"round to {precision if abs(precision) < 10**12 else 'over 10^12'} digits")
    elif name == "tojson":
        _check_json(budget, size, value, [*rest, *kwargs.values()])


def _check_json(budget: Budget, size: int, value: Any, options: list[Any]) -> None:
    # An indent stands before every entry as often as it lies deep, separators stand once; escapes take six letters.
    wide = sum(
        _width(budget, "tojson", option) for option in options if not isinstance(option, bool | tuple | list)
    )
    wide += sum(_length(text) for option in options if isinstance(option, tuple | list) for text in option)
    budget.take(size + (size * wide * _depth(value) if wide else 0))


def _depth(value: Any) -> int:
    """How deep the lists in a value lie, of which no more than was measured."""
    depth, level = 0, [value]
    while level and depth < 1000:
        depth, level = (
            depth + 1,
            [x for one in level if isinstance(one, Mapping | list | tuple) for x in _parts(one)[1]],
        )
    return depth
