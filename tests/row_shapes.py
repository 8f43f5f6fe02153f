"""A row of each shape that people have, and what is read of it."""

import json


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def earlier(text):
    return answer(text, train=False)


SHARED = [user("Q"), answer("first"), user("more")]
# {case: (format, row, what is read)}.
CASES = {
    "pair": ("auto", {"prompt": "Q", "completion": "A"}, ("Q", "A")),
    "messages": ("auto", {"messages": [user("Q"), answer("A")]}, [user("Q"), answer("A")]),
    "messages as JSON": (
        "auto",
        {"messages": json.dumps([user("Q"), answer("A")])},
        [user("Q"), answer("A")],
    ),
    "text": ("auto", {"text": "T"}, "T"),
    "TRL": (
        "auto",
        {"prompt": SHARED, "completion": [answer("A")]},
        [user("Q"), earlier("first"), user("more"), answer("A")],
    ),
    "TRL, text prompt": ("auto", {"prompt": "Q", "completion": [answer("A")]}, [user("Q"), answer("A")]),
    "TRL, text completion": (
        "auto",
        {"prompt": SHARED, "completion": "A"},
        [user("Q"), earlier("first"), user("more"), answer("A")],
    ),
    "ShareGPT": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        [user("Q"), answer("A")],
    ),
    "ShareGPT, system": (
        "sharegpt",
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        [system("S"), user("Q"), answer("A")],
    ),
    "ShareGPT, two systems": (
        "sharegpt",
        {"system": "S", "conversations": [system("own"), user("Q"), answer("A")]},
        [system("own"), user("Q"), answer("A")],
    ),
    "conversations with roles": (
        "sharegpt",
        {"conversations": [user("Q"), answer("A")]},
        [user("Q"), answer("A")],
    ),
    "conversation": ("sharegpt", {"conversation": [user("Q"), answer("A")]}, [user("Q"), answer("A")]),
    "dialog": ("sharegpt", {"dialog": [user("Q"), answer("A")]}, [user("Q"), answer("A")]),
    "conversations as JSON": (
        "sharegpt",
        {"conversations": json.dumps([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])},
        [user("Q"), answer("A")],
    ),
    "columns of datasets": (
        "sharegpt",
        {"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}},
        [user("Q"), answer("A")],
    ),
    "Alpaca": ("alpaca", {"instruction": "Do", "input": "this", "output": "A"}, ("Do\nthis", "A")),
    "Alpaca, no input": ("alpaca", {"instruction": "Do", "input": "", "output": "A"}, ("Do", "A")),
    "Alpaca, null input": ("alpaca", {"instruction": "Do", "input": None, "output": "A"}, ("Do", "A")),
    "Alpaca, input alone": ("alpaca", {"instruction": "", "input": "this", "output": "A"}, ("this", "A")),
    "Alpaca, system and history": (
        "alpaca",
        {"instruction": "Do", "output": "A", "system": "S", "history": [["q", "a"]]},
        [system("S"), user("q"), answer("a"), user("Do"), answer("A")],
    ),
    "Alpaca, empty history": (
        "alpaca",
        {"instruction": "Do", "output": "A", "system": "", "history": []},
        ("Do", "A"),
    ),
    "Dolly": ("dolly", {"instruction": "Do", "context": "this", "response": "A"}, ("Do\nthis", "A")),
    "instruction and response": ("dolly", {"instruction": "Do", "response": "A"}, ("Do", "A")),
    "OpenOrca": (
        "openorca",
        {"system_prompt": "S", "question": "Q", "response": "A"},
        [system("S"), user("Q"), answer("A")],
    ),
    "OpenOrca, no system": ("openorca", {"system_prompt": "", "question": "Q", "response": "A"}, ("Q", "A")),
    "question and response": ("question-response", {"question": "Q", "response": "A"}, ("Q", "A")),
    "question and answer": ("question-answer", {"question": "Q", "answer": "A"}, ("Q", "A")),
    "problem and solution": (
        "problem-solution",
        {"problem": "Q", "solution": "A", "answer": "4"},
        ("Q", "A"),
    ),
    "query and response": ("query-response", {"query": "Q", "response": "A", "type": "x"}, ("Q", "A")),
    "prompt and response": ("prompt-response", {"prompt": "Q", "response": "A"}, ("Q", "A")),
    "input and output": ("input-output", {"input": "Q", "output": "A"}, ("Q", "A")),
    "preference": ("preference", {"prompt": "Q", "chosen": "A", "rejected": "B"}, ("Q", "A")),
    "preference, messages": (
        "preference",
        {"prompt": SHARED, "chosen": [answer("A")], "rejected": [answer("B")]},
        [user("Q"), earlier("first"), user("more"), answer("A")],
    ),
    "preference, whole conversations": (
        "preference",
        {"chosen": [*SHARED, answer("A")], "rejected": [*SHARED, answer("B")]},
        [user("Q"), earlier("first"), user("more"), answer("A")],
    ),
    "preference, prompt repeated": (
        "preference",
        {"prompt": "Q", "chosen": [user("Q"), answer("A")], "rejected": [user("Q"), answer("B")]},
        [user("Q"), answer("A")],
    ),
    "preference, text prompt": (
        "preference",
        {"prompt": "Q", "chosen": [answer("A")], "rejected": [answer("B")]},
        [user("Q"), answer("A")],
    ),
    "preference, list prompt and texts": (
        "preference",
        {"prompt": [user("Q")], "chosen": "A", "rejected": "B"},
        [user("Q"), answer("A")],
    ),
    "preference, texts of turns": (
        "preference",
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: first\n\nHuman: more\n\nAssistant: A",
            "rejected": "\n\nHuman: Q\n\nAssistant: first\n\nHuman: more\n\nAssistant: B",
        },
        [user("Q"), earlier("first"), user("more"), answer("A")],
    ),
    "preference, texts": (
        "preference",
        {"chosen": "Two and two is 45.", "rejected": "Two and two is 44."},
        ("Two and two is ", "45."),
    ),
    "KTO": ("kto", {"prompt": "Q", "completion": "A", "label": True}, ("Q", "A")),
    "KTO, messages": (
        "kto",
        {"prompt": [user("Q")], "completion": [answer("A")], "label": True},
        [user("Q"), answer("A")],
    ),
    "KTO, undesired": (
        "kto",
        {"prompt": "Q", "completion": "A", "label": False},
        "an undesired completion (label is false)",
    ),
    "content": ("content", {"content": "T", "url": "x"}, "T"),
}
