"""A writer without a model: small problems of twelve families, of which it prefers one, whatever it is shown.

With the chance `favour` a problem is of the favourite family; otherwise of the family of one of the rows in its prompt.
"""

import random
import re

NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jade".split()
THINGS = "apples pens stones books cups keys shells coins".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ANIMALS = "cat dog owl fox hen bee cow ant".split()


def addition(r):
    a, b, who, what = r.randint(2, 99), r.randint(2, 99), r.choice(NAMES), r.choice(THINGS)
    return (
        f"{who} has {a} {what} and buys {b} more. How many {what} does {who} have?",
        f"{a} + {b} = {a + b}\n#### {a + b}",
    )


def remainder(r):
    a, b = r.randint(20, 999), r.randint(3, 19)
    return f"What is {a} mod {b}?", f"{a} = {a // b} * {b} + {a % b}, so the remainder is {a % b}."


def syllogism(r):
    a, b, c = r.sample(ANIMALS, 3)
    return (
        f"All {a}s are {b}s. No {b} is a {c}. Can a {a} be a {c}?",
        f"Every {a} is a {b}, and no {b} is a {c}. Therefore: no.",
    )


def weekday(r):
    day, n = r.randrange(7), r.randint(2, 60)
    return f"Today is {DAYS[day]}. Which weekday is it in {n} days?", f"{DAYS[(day + n) % 7]}"


def reverse(r):
    words = r.sample(ANIMALS + THINGS, 4)
    return f"Reverse the list: {', '.join(words)}", ", ".join(words[::-1])


def ascending(r):
    numbers = r.sample(range(10, 999), 5)
    return f"Sort ascending: {numbers}", f"{sorted(numbers)}"


def letters(r):
    word, letter = "".join(r.choices("abcde", k=9)), r.choice("abcde")
    return (
        f'How often does "{letter}" occur in "{word}"?',
        f"Counting each letter gives {word.count(letter)}.",
    )


def truth(r):
    a, b, c = (r.choice(["True", "False"]) for _ in range(3))
    text = f"{a} and not {b} or {c}"
    return f"Evaluate in Python: {text}", f">>> {text}\n{eval(text)}"


def sequence(r):
    a, d = r.randint(1, 30), r.randint(2, 12)
    return (
        f"Continue: {a}, {a + d}, {a + 2 * d}, {a + 3 * d}, ...",
        f"The difference is {d}; next comes {a + 4 * d}.",
    )


def rectangle(r):
    a, b = r.randint(2, 40), r.randint(2, 40)
    return (
        f"A rectangle measures {a} cm by {b} cm. Find area and perimeter.",
        f"Area: {a * b} cm^2. Perimeter: {2 * (a + b)} cm.",
    )


def binary(r):
    n = r.randint(5, 500)
    return f"Write {n} in base 2.", f"0b{n:b}"


def taller(r):
    a, b, c = r.sample(NAMES, 3)
    return f"{a} is taller than {b}; {b} is taller than {c}. Who is the shortest?", f"The shortest is {c}."


FAMILIES = {
    f.__name__: f
    for f in (
        addition,
        remainder,
        syllogism,
        weekday,
        reverse,
        ascending,
        letters,
        truth,
        sequence,
        rectangle,
        binary,
        taller,
    )
}
_SIGNS = {
    "buys": "addition",
    " mod ": "remainder",
    "Can a": "syllogism",
    "weekday": "weekday",
    "Reverse": "reverse",
    "Sort": "ascending",
    "occur in": "letters",
    "Evaluate": "truth",
    "Continue:": "sequence",
    "rectangle": "rectangle",
    "base 2": "binary",
    "taller": "taller",
}


def family_of(prompt: str) -> str:
    return next(family for sign, family in _SIGNS.items() if sign in prompt)


def seed_rows(each: int, seed: int = 0) -> list[dict]:
    """`each` rows of every family."""
    r = random.Random(seed)
    pairs = [(name, make(r)) for name, make in FAMILIES.items() for _ in range(each)]
    return [
        {"id": f"{name}-{i}", "prompt": prompt, "completion": completion}
        for i, (name, (prompt, completion)) in enumerate(pairs)
    ]


def writer(favour: float = 0.8, favourite: str = "addition"):
    """The `answer` of a chat server for the generic task: a function of the messages and the draw."""

    def answer(messages: list, draw: int) -> str:
        text = messages[-1]["content"]
        r = random.Random(f"{draw}|{text}")
        prompts = re.findall(r"<prompt>(.+?)</prompt>", text, re.DOTALL)
        # A test's own rows may be of no family; an error here would look to the client like a broken connection.
        shown = [family_of(p) for p in prompts if any(sign in p for sign in _SIGNS)] or [favourite]
        family = favourite if r.random() < favour else r.choice(shown)
        prompt, completion = FAMILIES[family](r)
        return f"Here it is.\n<prompt>{prompt}</prompt>\n<completion>{completion}</completion>"

    return answer


# Families whose completion ends with the answer, a number.
NUMERIC = ("addition", "remainder", "letters", "sequence")


def math_writer(favour: float = 0.8, favourite: str = "addition", wrong: float = 0.2):
    """The `answer` of a chat server for the math task; it solves the problems that it has written, some wrongly."""
    answers = {}

    def answer(messages: list, draw: int) -> str:
        text = messages[-1]["content"]
        r = random.Random(f"{draw}|{text}")
        problem = text.partition("\n\n")[2].strip()
        if problem in answers:
            return f"We work it out. \\boxed{{{answers[problem] + (r.random() < wrong)}}}"
        shown = [family_of(p) for p in re.findall(r"Problem \d+:\n(.+)", text)]
        family = favourite if r.random() < favour else r.choice(shown)
        prompt, completion = FAMILIES[family](r)
        answers[prompt] = int(re.findall(r"\d+", completion)[-1])
        return f"<problem>{prompt}</problem>"

    return answer
