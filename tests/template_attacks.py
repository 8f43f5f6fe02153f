"""Templates of strangers that would take for ever or all memory, and templates that raise what nobody expects."""

HUGE = "4000000000"
# {name: template}; every one is refused by its count of steps or characters, or by Jinja's sandbox.
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "a range of 10^10": "{% for a in range(10000000000) %}x{% endfor %}",
    "turns left out": "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}",
    "loop calls loop": "{% for a in [[1,2],[3,4]] recursive %}{{ loop([[1],[2]]) }}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "breadth 2^40": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "breadth by caller": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40 + "x" + "{% endcall %}" * 40,
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "map": "{% for a in range(99999) %}{{ range(99999)|map('string')|join }}{% endfor %}",
    "select": "{% for a in range(99999) %}{{ range(99999)|select('odd')|list|length }}{% endfor %}",
    "own text": "{% for a in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "join of a generator": "{{ range(99999)|map('string')|join('" + "x" * 10000 + "') }}",
    "method join of a generator": "{{ ('" + "x" * 10000 + "').join(range(99999)|map('string')) }}",
    "in": "{% set s = 'ab' * 1000000 %}{% for a in range(99999) %}{% if 'c' in s %}{% endif %}{% endfor %}",
    "find": "{% set s = 'ab' * 1000000 %}{% for a in range(99999) %}{{ s.find('c') }}{% endfor %}",
    "slices": "{% set s = range(99999)|list %}{% for a in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "slices of text": "{% set s = 'a' * 1000000 %}{% for a in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "sort": "{% set s = range(99999)|list %}{% for a in range(99999) %}{% set t = s|sort %}{% endfor %}",
    "groupby": "{% for a in range(99999) %}{% set t = messages * 1000|int %}{{ t|groupby('role')|length }}{% endfor %}",
    "accumulation": "{% set n = namespace(s=[]) %}{% for a in range(99999) %}{% set n.s = n.s + [a] %}{% endfor %}",
    "accumulated text": "{% set n = namespace(s='') %}{% for a in range(99999) %}{% set n.s = n.s ~ a %}{% endfor %}",
    "urlize": "{{ ('www.a' * 100000)|urlize }}",
    "striptags": "{{ ('<!---->' * 100000)|striptags }}",
}  # fmt: skip
DOUBLING = {
    "+": ("'xxxxxxxx'", "x + x"),
    "~": ("'xxxxxxxx'", "x ~ x"),
    "replace": ("'xxxxxxxx'", "x.replace('x', 'xx')"),
    "|replace": ("'xxxxxxxx'", "x|replace('x', 'xx')"),
    "join": ("'xxxxxxxx'", "x.join(['a', x, 'b'])"),
    "|join": ("'xxxxxxxx'", "[x, x]|join(x)"),
    "format": ("'xxxxxxxx'", "'{0}{0}'.format(x)"),
    "format_map": ("'xxxxxxxx'", "'{a}{a}'.format_map({'a': x})"),
    "%": ("'xxxxxxxx'", "'%s%s' % (x, x)"),
    "|format": ("'xxxxxxxx'", "'%s%s'|format(x, x)"),
    "translate": ("'xxxxxxxx'", "x.translate({120: 'xx'})"),
    "*": ("'xxxxxxxx'", "x * 2"),
    "lists": ("[1]", "x + x"),
    "times lists": ("[1]", "x * 2"),
    "nested lists": ("[1]", "[x, x]"),
    "nested dicts": ("{'a': 1}", "{'a': x, 'b': x}"),
    "namespaces": ("1", "namespace(a=x, b=x)"),
    "integers": ("12345678901234567890", "x * x"),
    "tojson": ("'\"'", "x|tojson"),
    "concatenated": ("'xxxxxxxx'", "[x]|list|string ~ x"),
    "expandtabs": ("'\t\t'", "x.expandtabs(64) ~ '\t\t' * 8"),
}
for _name, (_first, _next) in DOUBLING.items():
    ENDLESS[f"doubling by {_name}"] = (
        "{% set x = " + _first + " %}" + ("{% set x = " + _next + " %}") * 60 + "{{ x }}{{ x|string|length }}"
    )
_NESTED = "{% set x = [1] %}{% set y = [1] %}" + "{% set x = [x, x] %}{% set y = [y, y] %}" * 40
for _name, _use in {
    "compared": "{{ x == y }}", "in": "{{ x in [y] }}", "as JSON": "{{ x|tojson }}", "printed": "{{ x|pprint }}",
    "tested": "{{ [x]|select('eq', y)|list|length }}", "joined": "{{ x|join }}", "summed": "{{ x|sum(start=[]) }}",
    "sorted": "{{ [x, y]|sort }}", "unique": "{{ [x, y]|unique|list }}", "in a format": "{{ '%s' % [x] }}",
    "in a text format": "{{ '{}'.format(x) }}", "counted": "{{ [y].count(x) }}", "found": "{{ [y].index(x) }}",
    "views": "{{ {'a': x}.values() }}", "a loop's change": "{% for a in [x, y] %}{{ loop.changed(a) }}{% endfor %}",
}.items():  # fmt: skip
    ENDLESS[f"nested lists {_name}"] = _NESTED + _use
ENDLESS["nested tuples as a key"] = (
    "{% set x = (1,) %}" + "{% set x = (x, x) %}" * 40 + "{{ {x: 1} }}{{ {}[x] }}{{ {}.get(x) }}"
)
# One expression that makes gigabytes of nothing.
for _expression in (
    f"'a' * {HUGE}", f"{HUGE} * 'a'", f"[0] * {HUGE}", f"(0,) * {HUGE}", "'a' * 65536 * 65536", f"'a'|center({HUGE})",
    f"'a'.center({HUGE})", f"'a'.ljust({HUGE})", f"'a'.rjust({HUGE})", f"'a'.zfill({HUGE})", f"'%{HUGE}d' % 1",
    f"'%-{HUGE}s' % 'a'", f"'%.{HUGE}f' % 1.5", f"'%*d' % ({HUGE}, 1)", f"'%.*f' % ({HUGE}, 1.5)",
    f"'%(a){HUGE}d' % {{'a': 1}}", f"'%{HUGE}d'|format(1)", f"'{{:>{HUGE}}}'.format(1)",
    f"'{{:.{HUGE}f}}'.format(1.5)", f"'{{:{{}}}}'.format('a', {HUGE})", f"'{{:{{}}}}'.format('a', '>{HUGE}')",
    f"'{{a:>{HUGE}}}'.format_map({{'a': 1}})", f"'a'|indent({HUGE}, true)", "'a'|indent('x' * 4000000, true)|length",
    "('\\n' * 60000)|indent(60000)|length", "('a' * 60000)|wordwrap(1, wrapstring='x' * 60000)|length",
    f"'a'|wordwrap({HUGE})", f"[1]|batch({HUGE}, 0)|list", f"[1]|slice({HUGE})|list", f"1.5|round({HUGE})",
    f"1.5|round({HUGE}, 'ceil')", "10 ** (10 ** 10)", f"2 ** {HUGE}", f"(-3) ** {HUGE}", f"'\\t'.expandtabs({HUGE})",
    f"[1, [2]]|tojson(indent={HUGE})", f"(1).to_bytes({HUGE}, 'big')|length", f"'a'.encode().center({HUGE})",
    "('a' * 60000).replace('a', 'a' * 60000)|length", "('a' * 60000).replace('', 'a' * 60000)|length",
    "('a' * 60000)|replace('a', 'a' * 60000)|length", "('a' * 60000).join('a' * 60000)|length",
    "('a' * 60000).translate({97: 'a' * 60000})|length", f"lipsum({HUGE})", f"range({HUGE})|list",
    f"'a'.encode() * {HUGE}", f"('a'|escape) * {HUGE}", f"('%{HUGE}d'|escape) % 1", "[1]|random",
    f"'%{HUGE}d'.encode() % 1", f"'{{0:>{HUGE}}}{{0}}'.format(1)", f"dict(a='a' * {HUGE})", f"cycler('a' * {HUGE})",
    f"[-{HUGE}]|map('written text')|list|length ~ 'a' * {HUGE}",
):  # fmt: skip
    ENDLESS[_expression] = "{{ " + _expression + " }}"

# {name: template}: what they raise is of every kind.
RAISING = {
    "TypeError": "{{ 1 + 'a' }}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "OverflowError": "{{ 10.0 ** 400 }}",
    "KeyError": "{{ {}|dictsort(by='c') }}",
    "ValueError": "{{ 'a'.index('b') }}",
    "UndefinedError": "{{ nothing.at.all }}",
    "SecurityError": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "TemplateError": "{{ undefined_function() }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as y %}",
    "UnicodeError": "{{ 'é'.encode('ascii') }}",
    "LookupError": "{{ 'a'.encode('no-such-code') }}",
    "RecursionError": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "IndexError": "{{ '{3}'.format(1) }}",
}
# Sources that no compiler takes.
BROKEN = {
    "syntax": "{% if %}",
    "an open block": "{% for a in b %}",
    "an unknown filter": "{{ 1|no_such_filter }}",
    "an unknown tag": "{% frobnicate %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "an integer of too many digits": "{{ " + "1" * 5000 + " }}",
    "deep sums": "{{ " + "1 + " * 5000 + "1 }}",
}
