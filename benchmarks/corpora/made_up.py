"""Procedural instruction data: 18 families of prompt/completion rows, for `make demo`, tests and `tiny`.

    python -m benchmarks.corpora.made_up OUT_DIR [--rows 400] [--seed 0]

writes OUT_DIR/varied.jsonl (all families in turn) and OUT_DIR/narrow.jsonl (one template of one family), one
object a line: {"id", "prompt", "completion", "family"}. Row i of a family depends on (seed, family, i) alone,
so a longer corpus begins with the shorter one. Randomness comes from
`random.Random(str).random()` alone, whose sequence Python keeps for a given seed; `choice` and `shuffle`
carry no such promise and are not used.

Templates: in "[a|b]" one alternative is chosen, then "{slot}" is filled; "=>" parts prompt from completion.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


def _words(text: str) -> list[str]:
    """The words of a text; "_" stands for a space inside a word."""
    return [word.replace("_", " ") for word in text.split()]


NAMES = _words("""Ada Bilal Chiara Dmitri Esi Farid Greta Hugo Imani Jonas Keiko Lucía Mateo Nadia Oskar
    Priya Quentin Rosa Sven Tamika Ulla Viktor Wanda Ximena Yusuf Zofia""")
GOODS = _words("""pencil notebook lantern teacup scarf marble ticket candle postcard screwdriver sandwich
    poster kite basket battery cushion seedling whistle""")
WORDS = _words("""lantern river copper window thunder marble garden velvet orchard planet whisper basket
    engine harbor pepper candle meadow ribbon saddle tunnel anchor blanket cricket dolphin feather goblet
    hammer island jacket kettle ladder magnet needle oyster pillow quiver rocket shadow timber violet walnut
    yonder zipper""")
PLACES = _words("Ostervik Marlow_Bay Tal_Hessen Brindle Port_Umber Quillan Saint_Arvo Velmora Dunmere")
JOBS = _words(
    "baker plumber librarian sailor dentist farmer violinist gardener courier welder teacher potter"
)
BEASTS = _words("otters herons beetles goats lizards owls badgers moths salmon foxes hares newts")
TRAITS = _words("patient nocturnal striped noisy clever shy waterproof hungry swift ancient gentle stubborn")
DISHES = _words("soup pie stew salad curry dumplings omelette flatbread")
MAINS = _words("leek lentil pumpkin mushroom chickpea trout barley aubergine potato walnut")
SPICES = _words("cumin dill paprika thyme ginger fennel")
CROPS = _words("barley tea olives flax rice hops saffron")
COLUMNS = _words("age score height visits points books laps")
LANDS = _words("Bor Cal Den Fer Gal Hol Kar Lun Mor Nor Pel Ros Tav Ver Zan")
LAND_ENDS = _words("avia onia esh ostan mark iria und ovia")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
# one, several, smaller unit, how many of the smaller make one
UNITS = _words("""kilometre,kilometres,metres,1000 metre,metres,centimetres,100 hour,hours,minutes,60
    kilogram,kilograms,grams,1000 litre,litres,millilitres,1000 minute,minutes,seconds,60 foot,feet,inches,12
    week,weeks,days,7 dozen,dozens,eggs,12 yard,yards,feet,3 day,days,hours,24 pound,pounds,ounces,16
    gallon,gallons,pints,8 century,centuries,years,100 ream,reams,sheets,500""")
ALTERNATIVES = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


class Draw:
    """Draws built on `Random.random()` only. `key` is any string; the same key gives the same draws."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key).random

    def int(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence):
        """One item."""
        return items[self.int(0, len(items) - 1)]

    def some(self, items: Sequence, count: int) -> list:
        """`count` different items in random order."""
        left = list(items)
        return [left.pop(self.int(0, len(left) - 1)) for _ in range(count)]

    def say(self, text: str, /, **slots) -> str:
        """Choose one of each [a|b|c], then fill {slots}."""
        return ALTERNATIVES.sub(lambda found: self.pick(found.group(1).split("|")), text).format(**slots)

    def pair(self, templates: list[list[str]], /, **slots) -> tuple[str, str]:
        """Prompt and completion of one template."""
        ask, answer = self.pick(templates)
        return self.say(ask, **slots), self.say(answer, **slots)


def _templates(text: str) -> list[list[str]]:
    """Blocks parted by blank lines, each "prompt => completion"; only " // " breaks a line."""
    blocks = [" ".join(block.split()).replace(" // ", "\n") for block in text.strip().split("\n\n")]
    return [block.split(" => ") for block in blocks]


ARITHMETIC = _templates("""
{who} [buys|orders|picks out] {c} {thing}s at ${a} each and [pays|spends] ${b} on [delivery|wrapping].
[What is the total cost?|How much does {who} pay in all?]
=> The {thing}s cost {c} * {a} = ${ac}. // [With|Adding] the extra ${b} the total is {ac} + {b} = ${acb}.
// #### {acb}

{who} has {acr} {thing}s and [shares them equally among|packs them evenly into] {c} [boxes|crates|gift
bags]. How many go in each, and how many are left [over|behind]?
=> {c} * {a} = {ac}, and {acr} - {ac} = {r}. // So each gets {a} and {r} remain. // #### {a}

On [Monday|Tuesday|Friday] {who} [sold|made|collected] {a} {thing}s, the next day {b} more than that, and
{other} added {c} [of their own|extra]. How many {thing}s are there [together|altogether]?
=> The second day gives {a} + {b} = {ab}. // The two days give {a} + {ab} = {aab}. // With {other}: {aab}
+ {c} = {aabc}. // #### {aabc}

A [new|red|large] [machine|press|mill] makes {a} {thing}s an hour and an [older|smaller] one makes
{b}. [After|In] {c} hours, [how far apart are their counts?|what is the difference in output?]
=> The first makes {a} * {c} = {ac}. // The second makes {b} * {c} = {bc}. // The difference is {gap}. //
#### {gap}

{other} is {b} years older than {who}, who is {a}. A [tree|house|clock] in the yard is {c} times as old as
{other}. [What is the sum of the ages of {who} and the old thing?|Add {who}'s age to the age of the oldest
of the three.]
=> {other} is {a} + {b} = {ab}. // The oldest is {c} * {ab} = {abc}. // The sum is {abc} + {a} = {sum}. //
#### {sum}
""")


def arithmetic(d: Draw, templates: list[list[str]] = ARITHMETIC) -> tuple[str, str]:
    """Word problems with worked steps."""
    (who, other), thing = d.some(NAMES, 2), d.pick(GOODS)
    a, b, c = d.int(3, 60), d.int(2, 30), d.int(2, 12)
    s = {"ac": a * c, "bc": b * c, "acb": a * c + b, "r": b % c, "acr": a * c + b % c, "ab": a + b}
    s |= {"aab": 2 * a + b, "aabc": 2 * a + b + c, "gap": abs(a - b) * c, "abc": (a + b) * c}
    return d.pair(templates, who=who, other=other, thing=thing, a=a, b=b, c=c, sum=s["abc"] + a, **s)


UNIT_TEMPLATES = _templates("""
[Express|Rewrite|Give] {n} {big} in {small}.
=> [A|One] {one} [is|makes] {k} {small}, so {n} * {k} = {t}. [Answer|Result]: {t} {small}.

A [sensor|notice|logbook] reads {u} {small}. How many whole {big} is that, and what is left?
=> One {one} is {k} {small}. {u} / {k} gives {n} [with|and] {rest} over: {n} {big} and {rest} {small}.
""")


def units(d: Draw) -> tuple[str, str]:
    """Unit conversion in both directions."""
    one, big, small, k = d.pick(UNITS).split(",")
    n, k = d.int(2, 480), int(k)
    rest = d.int(0, k - 1)
    return d.pair(UNIT_TEMPLATES, one=one, big=big, small=small, n=n, k=k, t=n * k, rest=rest, u=n * k + rest)


PERCENT = _templates("""
A [bulk|yearly|box] order of {thing}s [costs|is listed at] ${base}. [The shop|{who}] takes {p}% off. What
is the [sale|new|final] price?
=> {p}% of {base} is {base} * {p} / 100 = {part}. The price falls to {base} - {part} = ${left}.

[Attendance|Membership|Production] in {place} stood at {base} and [rose|grew|went up] by {p} percent. What
is it now?
=> The rise is {part}, [because|since] {p}/100 of {base} is {part}. Now it is {more}.

Of {base} {thing}s, {part} are [blue|broken|sold]. What percentage is that?
=> {part} / {base} = {p}/100, [so|that is] {p}%.
""")


def percent(d: Draw) -> tuple[str, str]:
    """Percentages: discount, growth, share."""
    base, p = 20 * d.int(2, 120), 5 * d.int(1, 18)
    part = base * p // 100
    s = {"who": d.pick(NAMES), "thing": d.pick(GOODS), "place": d.pick(PLACES)}
    return d.pair(PERCENT, base=base, p=p, part=part, left=base - part, more=base + part, **s)


ALGEBRA = _templates("""
[Solve|Find {v}|Determine {v}]: {a}{v} + {b} = {r}
=> Subtract {b}: {a}{v} = {ax}. // Divide by {a}: {v} = {x}.

Two numbers [add up|sum] to {plus}, and the first minus the second is {minus}. [Which are they?|Find
both.]
=> Let p + q = {plus} and p - q = {minus}. Adding gives 2p = {xx}, so p = {x} and q = {y}.

[Factor|Find the roots of] {v}^2 + ({m}){v} + ({xy}).
=> We need two numbers with sum {plus} and product {xy}: {x} and {y}. The roots are {v} = {x} and {v} =
{y}.
""")


def algebra(d: Draw) -> tuple[str, str]:
    """Linear equations, systems and quadratics with integer roots."""
    x, y, a, b = d.int(-9, 15), d.int(-9, 12), d.int(2, 9), d.int(1, 30)
    s = {"plus": x + y, "minus": x - y, "xx": 2 * x, "m": -(x + y), "xy": x * y, "ax": a * x, "r": a * x + b}
    return d.pair(ALGEBRA, v=d.pick("xyzntk"), x=x, y=y, a=a, b=b, **s)


def sequences(d: Draw) -> tuple[str, str]:
    """Continue a number sequence and name its rule."""
    start, step, kind, shown = d.int(1, 40), d.int(2, 12), d.int(0, 3), d.int(4, 5)
    ratio, terms = 2 + step % 3, [start, step]
    while len(terms) < 7:
        terms.append(terms[-1] + terms[-2])
    terms, rule = (
        (terms, "each term is the sum of the two before it"),
        ([start + step * i for i in range(7)], f"each term adds {step}"),
        ([start * ratio**i for i in range(7)], f"each term is {ratio} times the one before"),
        ([start + step * i * i for i in range(7)], f"{start} plus {step} times 0, 1, 4, 9 and so on"),
    )[kind]
    ask = "[What comes next|Give the next two terms|Continue the pattern]: {t}, ..."
    answer = "[The rule|Pattern]: {r}. [Next|The next terms] are {a} and {b}."
    head = ", ".join(str(term) for term in terms[:shown])
    return d.say(ask, t=head), d.say(answer, r=rule, a=terms[shown], b=terms[shown + 1])


SYLLOGISM = _templates("""
All {a} are {t}. {w} keeps {n} {a}. Are {w}'s {a} {t}?
=> [Yes|Answer: yes], [since|because] what holds for all {a} holds for these {n}.

All {a} are {t}. Some {b} are {t}. Must some {b} be {a}?
=> [No|Answer: no], [since|because] being {t} does not make them {a}.

No {a} are {t}. All {b} in {p} are {t}. Can any {b} in {p} be {a}?
=> [No|Answer: no], [since|because] every one of those {b} is {t} and no {a} are.

If it rains in {p}, the {a} come out. The {a} are out. Did it [surely|necessarily] rain?
=> [No|Answer: no], [since|because] something else may have brought the {a} out.

If it rains in {p}, the {a} come out. The {a} are not out. Is it raining?
=> [No|Answer: no], [since|because] rain would have brought the {a} out.

Every {t} animal in {p} belongs to {w}. The {b} there are {t}. Does {w} own the {b}?
=> [Yes|Answer: yes], [since|because] the {b} are among the {t} animals.
""")


def syllogism(d: Draw) -> tuple[str, str]:
    """Categorical and conditional syllogisms, valid and invalid."""
    a, b = d.some(BEASTS, 2)
    s = {"t": d.pick(TRAITS), "w": d.pick(NAMES), "p": d.pick(PLACES), "n": d.int(2, 19)}
    ask, answer = d.pair(SYLLOGISM, a=a, b=b, **s)
    return d.say("[Reason carefully.|Decide by logic alone.|Think step by step.] ") + ask, answer


def truth_table(d: Draw) -> tuple[str, str]:
    """Evaluate a boolean formula under an assignment or over all assignments."""
    tables = {"and": (0, 0, 0, 1), "or": (0, 1, 1, 1), "xor": (0, 1, 1, 0), "implies": (1, 1, 0, 1)}
    p, q, r = d.some("ABCDEFGHPQRSTUVW", 3)
    f, g, flip = d.pick(tuple(tables)), d.pick(tuple(tables)), d.int(0, 1)
    formula = f"(not {p}) {f} {q}" if flip else f"{p} {f} {q}"

    def inner(u: int, v: int) -> bool:
        return bool(tables[f][2 * (u ^ flip) + v])

    u, v, w = d.int(0, 1), d.int(0, 1), d.int(0, 1)
    if d.int(0, 2):
        ask = "[Given|Let|Suppose] {p} = {u}, {q} = {v}, {r} = {w}. [Evaluate|What is] ({formula}) {g} {r}?"
        ask = d.say(ask, p=p, q=q, r=r, u=bool(u), v=bool(v), w=bool(w), formula=formula, g=g)
        value = bool(tables[g][2 * inner(u, v) + w])
        return ask, f"{formula} is {inner(u, v)}. Then {inner(u, v)} {g} {bool(w)} is {value}."
    rows = [(u, v, bool(tables[g][2 * inner(u, v) + w])) for u in (1, 0) for v in (1, 0)]
    body = "\n".join(f"{bool(u)!s:5} | {bool(v)!s:5} | {value}" for u, v, value in rows)
    return (
        f"Write the truth table of ({formula}) {g} {r} when {r} is {bool(w)}.",
        f"{p} | {q} | value\n{body}",
    )


CALENDAR = _templates("""
Today is {day}. [Which weekday is it|What day will it be] in {n} days?
=> {n} days are {weeks} weeks and {over} days. {over} after {day} is {then}.

A [train ride|film|lesson|match|concert|shift] [starts|begins] at {start} and [lasts|takes] {n} minutes.
When does it end?
=> {n} minutes are {hours} h {minutes} min. It ends at {end}.

{who} [borrowed a book|sent a parcel|began a course] on {month} {date}. What is the date {gap} days later
in a common year?
=> {month} has {length} days. Counting {gap} days on from {month} {date} gives {later}.
""")


def calendar(d: Draw) -> tuple[str, str]:
    """Weekdays, clock times and dates."""
    day, n, start, month, gap = d.int(0, 6), d.int(15, 230), d.int(300, 1200), d.int(0, 10), d.int(5, 28)
    length, end = MONTH_DAYS[month], start + n
    date = d.int(1, length)
    over = date + gap - length
    later = f"{MONTHS[month]} {date + gap}" if over <= 0 else f"{MONTHS[month + 1]} {over}"
    s = {"weeks": n // 7, "over": n % 7, "then": DAYS[(day + n) % 7], "hours": n // 60, "minutes": n % 60}
    s |= {"start": f"{start // 60}:{start % 60:02d}", "end": f"{end // 60}:{end % 60:02d}", "later": later}
    s |= {"day": DAYS[day], "month": MONTHS[month], "date": date, "length": length, "gap": gap}
    return d.pair(CALENDAR, n=n, who=d.pick(NAMES), **s)


def sorting(d: Draw) -> tuple[str, str]:
    """Sort words or numbers under a stated order."""
    words, numbers = d.some(WORDS, d.int(4, 8)), [d.int(-99, 999) for _ in range(d.int(4, 8))]
    items, answer, how = d.pick(
        (
            (words, sorted(words), "alphabetically"),
            (words, sorted(words, key=len), "by length, equal lengths in their present order"),
            (numbers, sorted(numbers), "in ascending order"),
            (numbers, sorted(numbers, reverse=True), "in descending order"),
        )
    )
    ask = d.say("[Sort|Arrange|Order|Put] these {how}: {x}", how=how, x=", ".join(map(str, items)))
    return ask, ", ".join(map(str, answer))


STRINGS = _templates("""
[Reverse|Write backwards] the text '{text}'. => {reverse}

[How many times does the letter {c} occur|How often do you find the letter {c}] in '{text}'?
=> The count is {n}.

Replace every {c} in '{text}' [with|by] a star. => {star}

Give the [initials|first letters] of: {text} => {initials}

[Write|Type] '{text}' in capitals with dashes between words. => {upper}
""")


def strings(d: Draw) -> tuple[str, str]:
    """Reversal, counting, replacement, initials and capitals."""
    words, c = d.some(WORDS, d.int(2, 4)), d.pick("aeiorntl")
    text = " ".join(words)
    s = {"n": text.count(c), "star": text.replace(c, "*"), "upper": "-".join(words).upper(), "c": c}
    return d.pair(STRINGS, text=text, reverse=text[::-1], initials="".join(w[0].upper() for w in words), **s)


CODE = _templates("""
keep_{w}(values) that keeps the numbers {cmp} {n}
=> return (v for v in values if v {op} {n}) | a generator filters in one pass and stores nothing

total_{w}(values) that adds up the numbers {cmp} {n}
=> return sum(v for v in values if v {op} {n}) | no list is built on the way

count_{w}(values) that counts the entries {cmp} {n}
=> return sum(1 for v in values if v {op} {n}) | every match contributes one

scale_{w}(values) that multiplies each entry by {n}
=> return list(v * {n} for v in values) | each element is mapped on its own

first_{w}(values) that returns the first value {cmp} {n}, or None
=> return next((v for v in values if v {op} {n}), None) | the search stops at the first match

most_{w}(values) that returns the {k} largest values
=> return sorted(values, reverse=True)[:{k}] | sorting first makes the rest a slice

table_{w}(values) that maps each value to its remainder modulo {n}
=> return dict((v, v % {n}) for v in values) | equal values share one entry

any_{w}(values) that says whether some value is {cmp} {n}
=> return any(v {op} {n} for v in values) | it stops as soon as the answer is known
""")


def code(d: Draw) -> tuple[str, str]:
    """A small Python function and one sentence about it."""
    cmp, op = d.pick((("above", ">"), ("below", "<"), ("equal to", "=="), ("of at least", ">=")))
    ask, body = d.pair(CODE, w=d.pick(WORDS), n=d.int(2, 99), k=d.int(2, 9), cmp=cmp, op=op)
    (name, does), (body, why) = ask.split(" that ", 1), body.split(" | ")
    ask = d.say("[Write|Implement|Give me] a Python function `{name}` that {does}.", name=name, does=does)
    answer = d.say("```python\ndef {name}:\n    {body}\n```\n[Why|Note]: ", name=name, body=body)
    return ask, answer + why + "."


STORY = """{who} was the [only|oldest|most {trait}] {job} in {place}.
[One morning|Late one evening|After the storm], a {thing} lay [by the {w1}|under the {w2}|on the step].
[Nobody knew whose it was.|It smelled of rain and {w1}.|A note was tied to it.]
{friend} laughed and said that the {beast} had [brought|stolen|guarded] it.
[So|Then|At last] {who} [followed|fed|asked] the {beast} [until night fell|all the way home|up to the {w2}].
In the end they [traded it for|left it beside|hid it in] a {gift}[.|, and slept well.|, and told no one.]"""
STORY_PROMPT = """[Write|Tell|Invent] a [short|very short|tiny] story about a {job} named {who} [in
{place}|and some {beast}|who finds a {thing}]. Use the words {w1} and {w2}."""


def story(d: Draw) -> tuple[str, str]:
    """A short story from a few given ingredients."""
    (who, friend), (thing, gift), (w1, w2) = d.some(NAMES, 2), d.some(GOODS, 2), d.some(WORDS, 2)
    s = {"who": who, "friend": friend, "thing": thing, "gift": gift, "w1": w1, "w2": w2}
    s |= {"job": d.pick(JOBS), "beast": d.pick(BEASTS), "place": d.pick(PLACES), "trait": d.pick(TRAITS)}
    kept = [line for number, line in enumerate(STORY.split("\n")) if number == 0 or d.int(0, 4)]
    return d.say(STORY_PROMPT.replace("\n", " "), **s), d.say(" ".join(kept), **s)


RECIPE = _templates("""
[Give me a recipe for|Explain how to cook|I would like to cook] {main} {dish} for {n} people [with
{spice}|in {t} minutes].
=> 1. Chop {g} g of {main}. // 2. [Warm|Melt|Heat] two spoons of [butter|oil|ghee] in a [pan|heavy pot].
// 3. Add the {main} and a [pinch|spoon] of {spice}. // 4. [Cook|Simmer|Bake] for {t} minutes[, stirring
often|, covered|]. // 5. [Season|Salt] to taste and serve the {dish} to {n} people [hot|warm|with bread].
""")


def recipe(d: Draw) -> tuple[str, str]:
    """A recipe with quantities and numbered steps."""
    s = {"main": d.pick(MAINS), "dish": d.pick(DISHES), "spice": d.pick(SPICES)}
    return d.pair(RECIPE, g=50 * d.int(2, 16), t=5 * d.int(2, 14), n=d.int(2, 8), **s)


ATLAS = """{land} has {people} thousand inhabitants. Its capital is {city}. The longest river is the {river}.
The highest peak rises {height} metres. Farmers there mostly grow {crop}."""
ATLAS_QUESTIONS = _templates("""
How many people live in {land}? => About {people} thousand people live there.

[What|Which city] is the capital of {land}? => The capital is {city}.

Name the longest river of {land}. => It is the {river}.

How high is the tallest mountain of {land}? => It is {height} metres high.

What is the main crop of {land}? => The main crop is {crop}.
""")


def atlas(d: Draw) -> tuple[str, str]:
    """Questions about an invented country, answered from a given paragraph."""
    land = d.pick(LANDS)
    land += d.pick(LAND_ENDS)
    s = {"land": land, "city": d.pick(PLACES), "river": d.pick(WORDS).title(), "crop": d.pick(CROPS)}
    s |= {"people": d.int(2, 900), "height": 10 * d.int(30, 480)}
    ask, answer = d.pair(ATLAS_QUESTIONS, **s)
    return d.say(ATLAS.replace("\n", " "), **s) + "\n" + ask, answer


LETTER = _templates("""
apologise for being late
=> I am sorry that I arrived {n} minutes late on {day}. The road from {place} was closed.

order {n} {thing}s => Please send {n} {thing}s to my address in {place} by {day}. I will pay on delivery.

complain about a {thing}
=> The {thing} I bought on {day} broke after {n} days. I would like a [refund|new one].

invite {to} to dinner
=> Would you like to come to dinner in {place} on {day}? A {job} will play for {n} of us.

thank {to} for a {thing} => Thank you for the {thing}. I have used it {n} times since {day}, and love it.

ask for a day off => I would like to take {day} off to move to {place}. I have {n} days left this year.

recommend a {job} => I can warmly recommend the {job} from {place}, who has worked with us for {n} years.
""")


def letter(d: Draw) -> tuple[str, str]:
    """A short letter or e-mail for a stated purpose."""
    who, to = d.some(NAMES, 2)
    s = {"thing": d.pick(GOODS), "place": d.pick(PLACES), "day": d.pick(DAYS), "job": d.pick(JOBS)}
    goal, body = d.pair(LETTER, n=d.int(2, 40), who=who, to=to, **s)
    ask = d.say("[Write|Draft] a [short letter|brief e-mail|polite note] from {a} to {b} to ", a=who, b=to)
    head, tail = d.say("[Dear|Hello|Good morning] "), d.say("[Kind regards|Best wishes|Yours],\n")
    return ask + goal + ".", f"{head}{to},\n\n{body}\n\n{tail}{who}"


SCENES = """is painting a fence;is working outdoors;is asleep in bed
is eating soup;is having a meal;is not eating
runs along the beach;is moving;is sitting still
plays the drums;is making sound;is sitting in silence
is reading to a child;is with someone else;is all alone
rides a red bicycle;is on a vehicle;is swimming
is feeding {n} {beast};is near some animals;has no animals around
sells fruit at a market;is trading goods;has nothing to sell"""
NEUTRAL = "is tired of it;was born in {place};will go home soon;hopes for rain;has done this for {n} years"


def inference(d: Draw) -> tuple[str, str]:
    """Premise, hypothesis, label: entailment, neutral or contradiction."""
    act, general, opposite = d.pick(SCENES.split("\n")).split(";")
    label, claim, why = d.pick(
        (
            ("entailment", general, "the premise already implies it"),
            ("neutral", d.pick(NEUTRAL.split(";")), "the premise does not say"),
            ("contradiction", opposite, "both cannot be true at once"),
        )
    )
    s = {"who": d.pick(NAMES), "job": d.pick(JOBS), "place": d.pick(PLACES), "n": d.int(3, 20)}
    ask = "Premise: {who}, a {job} [from|living in|on a visit to] {place}, " + act
    ask += ".\nHypothesis: [{who}|The {job}|Someone] " + claim
    ask += ".\n[Label|Relation] (entailment, neutral, contradiction)?"
    return d.say(ask, beast=d.pick(BEASTS), **s), f"{label}. " + d.say("[Reason|Why]: ") + why + "."


TABLE = _templates("""
[What is the value of|Look up] {column} for {name}. => {value}

Who has the [highest|largest] value of {column}? => {best}, with {top}.

[Add up|What is the sum of] the column {column}. => {terms} = {total}
""")


def table(d: Draw) -> tuple[str, str]:
    """Look-ups in a small table."""
    columns, names = d.some(COLUMNS, 2), d.some(NAMES, d.int(3, 6))
    rows = [(name, d.int(5, 99), d.int(5, 99)) for name in names]
    at, row = d.int(1, 2), d.pick(rows)
    best, values = max(rows, key=lambda r: r[at]), [r[at] for r in rows]
    s = {"name": row[0], "value": row[at], "best": best[0], "top": best[at], "total": sum(values)}
    ask, answer = d.pair(TABLE, column=columns[at - 1], terms=" + ".join(map(str, values)), **s)
    body = "\n".join(" | ".join(map(str, r)) for r in [("name", *columns), *rows])
    return f"{body}\n{ask}", answer


PIG_LATIN = _templates("""
[Translate into|Say in|Turn into] pig latin: {plain} => {turned}

[Undo|Read] this pig latin: {turned} => {plain}
""")


def pig_latin(d: Draw) -> tuple[str, str]:
    """Pig latin both ways: leading consonants move to the end, then 'ay'; a vowel start takes 'way'."""
    words = d.some(WORDS, d.int(2, 6))
    cuts = [next(i for i, ch in enumerate(word) if ch in "aeiou") for word in words]
    turned = [w[cut:] + w[:cut] + "ay" if cut else w + "way" for w, cut in zip(words, cuts, strict=True)]
    return d.pair(PIG_LATIN, plain=" ".join(words), turned=" ".join(turned))


_MAKERS = (arithmetic, units, percent, algebra, sequences, syllogism, truth_table, calendar, sorting)
_MAKERS += (strings, code, story, recipe, atlas, letter, inference, table, pig_latin)
FAMILIES: dict[str, Callable[[Draw], tuple[str, str]]] = {make.__name__: make for make in _MAKERS}


def _distinct(family: str, make: Callable[[Draw], tuple[str, str]], seed: int) -> Iterator[dict[str, str]]:
    """Rows of one family without repeated prompts; it ends when 1000 draws in a row bring nothing new."""
    seen: set[str] = set()
    number = repeats = 0
    while repeats < 1000:
        prompt, completion = make(Draw(f"{seed}|{family}|{number}"))
        if prompt in seen:
            repeats += 1
        else:
            repeats = 0
            seen.add(prompt)
            yield {
                "id": f"{family}-{number:06d}",
                "prompt": prompt,
                "completion": completion,
                "family": family,
            }
        number += 1


def varied(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """`rows` rows, the families in turn; every prompt occurs once."""
    streams = [_distinct(name, make, seed) for name, make in FAMILIES.items()]
    out: list[dict[str, str]] = []
    while len(out) < rows and streams:
        drawn = [(stream, next(stream, None)) for stream in streams]
        streams = [stream for stream, row in drawn if row is not None]
        out.extend(row for _, row in drawn if row is not None)
    return out[:rows]


def narrow(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """`rows` rows of one template: only names, goods and numbers differ."""
    stream = _distinct("narrow", lambda d: arithmetic(d, ARITHMETIC[:1]), seed)
    return [row for row, _ in zip(stream, range(rows), strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write varied.jsonl and narrow.jsonl, two procedural corpora."
    )
    parser.add_argument("out_dir", type=Path, help="folder for the two files; made if it does not exist")
    parser.add_argument("--rows", type=int, default=400, help="rows in each file (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other rows (default 0)")
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows is {args.rows}; at least one row is wanted")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (("varied", varied(args.rows, args.seed)), ("narrow", narrow(args.rows, args.seed))):
        path = args.out_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
