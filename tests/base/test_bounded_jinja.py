"""Templates are bounded in steps and characters, and write what Jinja's sandbox writes."""

import threading
import tracemalloc

import pytest
from hangs import HANG_S
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from template_attacks import BROKEN, ENDLESS, RAISING

from gvendi_fast.base.bounded_jinja import (
    BoundedEnvironment,
    Budget,
    TooMuchError,
    budget_for,
    counting,
)

VALUES = {
    "messages": [{"role": "user", "content": "Häuser & <b>42</b>"}, {"role": "assistant", "content": "no"}]
}


def render(source, values=VALUES, budget=None):
    template = BoundedEnvironment().from_string(source)
    with counting(budget or budget_for(values)):
        return template.render(**values)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_an_endless_template_is_refused(source):
    # A tenth of what a template has: it ends by what it takes, whatever the bound.
    whole = budget_for(VALUES)
    budget = Budget(whole.most_steps // 10, whole.most_characters // 10)
    # RecursionError and OverflowError are Python's own bounds.
    with pytest.raises(
        (TemplateError, RecursionError, OverflowError, MemoryError, ValueError, TypeError)
    ) as error:
        render(source, budget=budget)
    if isinstance(error.value, MemoryError):
        pytest.fail("bounded by the memory of the machine")


@pytest.mark.parametrize("name", ["doubling by ~", "'a' * 4000000000", "nested lists as JSON", "own text"])
def test_an_endless_template_takes_little_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(TooMuchError):
            render(ENDLESS[name])
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", [*RAISING.values()], ids=RAISING)
def test_what_a_template_raises_comes_through(source):
    with pytest.raises(Exception) as error:  # noqa: PT011
        render(source)
    assert not isinstance(error.value, TooMuchError)


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_source_that_cannot_be_compiled_raises(source):
    with pytest.raises(Exception):  # noqa: B017, PT011
        render(source)


SAME = [
    "{{ 1 + 2 }} {{ 'a' + 'b' }} {{ [1] + [2] }} {{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 7 % 3 }}"
    " {{ '%03d|%s' % (7, 'x') }}",
    "{{ 'a' ~ 1 ~ none ~ [1, {'b': 2}] }} {{ 1 < 2 <= 2 != 3 }} {{ 'a' in 'cat' }} {{ 2 in [1, 2] }}",
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m.role|upper }}: {{ m['content'] }}"
    "{% if not loop.last %}, {% endif %}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    "{{ messages[1:][0].role }}{{ 'abc'[::-1] }}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% macro f(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}"
    "{% call f(3, y=4) %}!{% endcall %}",
    "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}",
    "{{ messages|map(attribute='role')|join(', ') }} {{ messages|selectattr('role', 'eq', 'user')|list|length }}",
    "{{ messages|tojson }} {{ messages|tojson(indent=2) }} {{ messages|length }} {{ range(5)|list }}"
    " {{ range(3)|sum }}",
    "{{ '{:>8}|{:.3f}|{a}'.format('x', 1.5, a=2) }} {{ '{a}'.format_map({'a': 1}) }} {{ '%s-%s'|format(1, 'b') }}",
    "{{ ' a '.strip() }} {{ 'a,b'.split(',') }} {{ 'abc'.replace('b', 'xx') }} {{ 'abc'|replace('b', 'y') }}",
    "{{ 'a'|center(9) }}| {{ 'a\\nb'|indent(2, true) }} {{ 'a b c d'|wordwrap(3) }} {{ [3, 1, 2]|sort|reverse|list }}",
    "{{ [1, 2, 3, 4]|batch(3, 0)|list }} {{ [1, 2, 3]|slice(2)|list }} {{ 2.567|round(1) }}"
    " {{ [1, 1, 2]|unique|list }}",
    "{{ messages|groupby('role') }} {{ {'b': 1, 'a': 2}|dictsort }} {{ '<a>'|escape }} {{ '<a>'|e|string|length }}",
    "{{ nothing|default('d') }} {{ nothing is defined }} {{ 5 is odd }} {{ 'a' is in ['a'] }} {{ 3 is eq 3 }}",
    "{% filter upper %}abc{{ 1 }}{% endfilter %}{% set b %}x{{ 2 }}y{% endset %}{{ b }}{% raw %}{{ x }}{% endraw %}",
    "{{ {'a': 1}.items()|list }} {{ dict(a=1) }} {{ cycler('a', 'b').next() }} {{ (1, 2)[0] }} {{ messages[-1].role }}",
    "{{ 'a' if 1 > 2 }}{{ not true }}{{ -3 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ 'x'.join(['a', 'b']) }}{{ 'a'.ljust(3) }}|",
    "{% block a %}block {{ 1 }}{% endblock %}{{ self.a() }}{{ 'é'.encode()|length }}{{ 'a\tb'.expandtabs(4) }}",
    "{{ messages|map('attr', 'x')|list|length }}{{ [[1, 2], [3]]|sum(start=[]) }}{{ 'abc'|first }}{{ [1, 2]|last }}",
]


@pytest.mark.parametrize("source", SAME)
def test_a_template_writes_what_the_sandbox_writes(source):
    assert render(source) == ImmutableSandboxedEnvironment().from_string(source).render(**VALUES)


def test_a_count_is_exact_and_the_same_each_time():
    source = "{% for m in messages %}{{ m.role }}{{ 'x' * 10 }}{% endfor %}"
    taken = set()
    for _ in range(3):
        budget = budget_for(VALUES)
        render(source, budget=budget)
        taken.add((budget.most_steps - budget.steps, budget.most_characters - budget.characters))
    ((steps, characters),) = taken
    render(source, budget=Budget(steps, characters))
    with pytest.raises(TooMuchError, match=f"more than {steps - 1} steps"):
        render(source, budget=Budget(steps - 1, characters))
    with pytest.raises(TooMuchError, match=f"more than {characters - 1} characters"):
        render(source, budget=Budget(steps, characters - 1))


def test_a_larger_value_may_take_more():
    source = "{% for m in messages %}{% for n in messages %}{{ n.content|trim }}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 50} for _ in range(100)]
    assert len(render(source, {"messages": messages})) == 100 * 100 * 50


def test_threads_count_for_themselves():
    """One thread stands inside its rendering while another one takes all of its own budget."""
    inside, go = threading.Event(), threading.Event()
    results = []

    def wait():
        inside.set()
        assert go.wait(HANG_S)
        return "waited"

    def other():
        results.append(render("{{ wait() }}", {"wait": wait}, Budget(10, 100)))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(HANG_S)
    with pytest.raises(TooMuchError):
        render("{% for a in range(20) %}{% endfor %}", budget=Budget(10, 100))
    go.set()
    thread.join()
    assert results == ["waited"]


def test_outside_of_a_budget_nothing_that_counts_is_done():
    with pytest.raises(TooMuchError, match="outside"):
        BoundedEnvironment().from_string("{{ 'a' * 2 }}").render()
