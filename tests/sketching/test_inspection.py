"""The look at a few rows: each warning fires on the corpus that it is there for, and none on real data."""

import gzip
import json
import re
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from made_rows import (
    ASKS,
    CALLS,
    CHATML,
    LINE,
    NO_END,
    REASONS,
    ROLES_ALONE,
    TWO_ROLES,
    chats,
    pairs,
    with_message,
    words,
)
from places import PACKAGE
from transformers import AutoTokenizer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import index_corpus
from gvendi_fast.sketching import inspection
from gvendi_fast.sketching.inspection import Inspection, look
from gvendi_fast.sketching.proxy.encode import Encoder
from gvendi_fast.sketching.proxy.load import load_tokenizer

DATA = {
    "GSM8K": "gsm8k/train.jsonl",
    "BBH": "bbh_cot/bbh_cot.jsonl.gz",
    "e-SNLI": "esnli/dev.jsonl.gz",
    "AQuA-RAT": "aqua_rat/dev.jsonl",
    "MED": "med/med.jsonl.gz",
}


def encoder(template: str | None = CHATML, **more) -> Encoder:
    tokenizer = load_tokenizer("tiny").tokenizer
    tokenizer.chat_template = template
    for name in [name for name in more if name.endswith("_token")]:
        setattr(tokenizer, name, more.pop(name))
    return Encoder(tokenizer, **{"max_tokens": 2048, "vocabulary": 2048, **more})


def looked(folder: Path, given: list[dict], of: Encoder | None = None, **more) -> Inspection:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return look(index_corpus(path), of or encoder(), **more)


def without_answers(rows: list[dict], every: int) -> list[dict]:
    for row in rows[::every]:
        row["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": ""}]
    return rows


def call(**function) -> list[dict]:
    return [{"type": "function", "function": function}]


def long_prompts() -> list[dict]:
    return [{**row, "prompt": row["prompt"] * 40} for row in pairs()]


# {kind of fault: (rows, encoder, rows that have it, words of the warning, the same without the fault)}
CASES = {
    "content dropped": lambda: (
        with_message(chats(), "system", "Count in the manner of {n} sailors."),
        encoder(TWO_ROLES),
        40,
        "(system; rows.jsonl:1 is the first",
        encoder(CHATML),
    ),
    "same tokens": lambda: (
        chats(),
        encoder(ROLES_ALONE),
        40,
        "G-Vendi of exactly 1.00",
        encoder(CHATML),
    ),
    "reasoning dropped": lambda: (
        chats(reasoning_content="I count {w} and find {n}."),
        encoder(CHATML),
        40,
        "reasoning_content",
        encoder(REASONS),
    ),
    "tool calls dropped": lambda: (
        chats(tool_calls=call(name="count_fruit", arguments={"of": "ripe ones", "how_many": 3})),
        encoder(CHATML),
        40,
        "lose tool calls",
        encoder(CALLS),
    ),
    "same supervised tokens": lambda: (
        pairs(completion="It is so."),
        encoder(),
        40,
        "'It is so.<|im_end|>'",
        pairs(),
    ),
    "shared text": lambda: (
        pairs(completion="<think>\n\n</think>\n\nIt is {w}, {n} of them."),
        encoder(),
        40,
        r"'<think>\n\n</think>\n\n",
        pairs(),
    ),
    "no end": lambda: (chats(), encoder(NO_END, eos_token=None), 40, "without an end", encoder(CHATML)),
    "double BOS": lambda: (
        [{"text": f"<|endoftext|><|endoftext|>{words(n)}"} for n in range(40)],
        encoder(bos_token="<|endoftext|>"),
        40,
        "'<|endoftext|>' twice",
        [{"text": f"<|endoftext|>{words(n)}"} for n in range(40)],
    ),
    "truncated prompts": lambda: (long_prompts(), encoder(max_tokens=64), 40, "64 tokens", encoder()),
    "too long": lambda: (
        [{**row, "completion": row["completion"] * 40} for row in pairs()],
        encoder(max_tokens=64),
        40,
        "raise --max-tokens",
        encoder(),
    ),
    "tokens outside the embedding": lambda: (
        pairs(prompt="{w} in the United States?"),
        encoder(vocabulary=2000),
        None,
        "embedding of 2,000",
        encoder(),
    ),
    "empty answers": lambda: (
        without_answers(chats(), every=5),
        encoder(),
        8,
        "rows.jsonl:1 is the first",
        chats(),
    ),
    "answers equal prompts": lambda: (
        [{**row, "prompt": row["completion"]} for row in pairs()],
        encoder(),
        40,
        "the prompt again",
        pairs(),
    ),
    "copies": lambda: ([*pairs(30), *pairs(10)], encoder(), 10, "rows.jsonl:31 is the first", pairs(40)),
    "conversations as text": lambda: (
        [{"text": f"<|im_start|>user\n{words(n)}<|im_end|>\n"} for n in range(40)],
        encoder(),
        40,
        "<|im_start|>",
        [{"text": words(n)} for n in range(40)],
    ),
    "prompts in texts": lambda: (
        [{"text": f"Below.\n\n### Instruction:\n{words(n)}\n\n### Response:\n{n}"} for n in range(40)],
        encoder(),
        40,
        "'### Instruction:' and '### Response:'",
        [{"text": f"{words(n)}\n\nThe Response: {n}"} for n in range(40)],
    ),
    "refused rows": lambda: (
        [{"question": "?"} if n % 4 == 0 else row for n, row in enumerate(pairs())],
        encoder(),
        10,
        "missing fields",
        pairs(),
    ),
}

# What goes with a fault by its nature: rows of which nothing is read have lost all, and share what is left.
ALSO = {"same tokens": ("content dropped", "same supervised tokens")}


@pytest.mark.parametrize("kind", CASES)
def test_a_warning_fires_on_its_case_and_not_without_it(tmp_path, kind):
    rows, of, count, said, healthy = CASES[kind]()
    found = {fault.kind: fault for fault in looked(tmp_path, rows, of).faults}
    assert set(found) == {kind, *ALSO.get(kind, ())}
    fault = found[kind]
    assert fault.of == len(rows)
    assert fault.count == count or count is None
    assert said in str(fault)
    assert str(fault).startswith(f"{fault.count} of {fault.of} rows ")
    assert fault.remedy
    again = looked(tmp_path, rows, healthy) if isinstance(healthy, Encoder) else looked(tmp_path, healthy, of)
    assert kind not in {fault.kind for fault in again.faults}


def test_reasoning_inside_the_content_is_missed(tmp_path):
    """As templates of reasoning models take it out."""
    cuts = LINE.replace("m['content']", "m['content'].split('</think>')[-1]")
    rows = chats()
    for n, row in enumerate(rows):
        row["messages"][1]["content"] = f"<think>{words(n + 999)}</think>{row['messages'][1]['content']}"
        row["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": words(n)}]
    template = "{% for m in messages %}" + cuts + "{% endfor %}" + ASKS
    (fault,) = looked(tmp_path, rows, encoder(template)).faults
    assert (fault.kind, fault.count) == ("reasoning dropped", 40)
    assert "(<think>; rows.jsonl:1 is the first)" in str(fault)
    assert looked(tmp_path, rows).faults == ()


def test_a_template_may_trim_indent_reorder_and_write_arguments_as_it_likes(tmp_path):
    """The system text goes into the question; arguments are a string or an object, with quotes and newlines."""
    merges = (
        "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.index == 1 %}{{ messages[0]['content'] | trim + '\n\n' }}{% endif %}{{ m['content'] | trim }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | string }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
    )
    given = {"of": 'a "ripe"\none', "nested": [{"deep": "<b>é</b>"}]}
    for arguments in (given, json.dumps(given)):
        for template in (merges, merges.replace("arguments | string", "arguments | tojson")):
            rows = with_message(chats(), "system", "  Sailor {n}. ")
            for row in rows:
                row["messages"][-1]["tool_calls"] = call(name="count", arguments=arguments)
            # The same call in all rows is a text that they share, and no text that is lost.
            kinds = [fault.kind for fault in looked(tmp_path, rows, encoder(template)).faults]
            assert kinds == ["shared text"], (arguments, template)


@pytest.mark.parametrize(
    "proxy",
    [
        "qwen2",
        "tiny",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("stories260K", "no template")),
    ],
)
@pytest.mark.parametrize("name", DATA)
def test_no_warning_fires_on_real_data(shared, name, proxy):
    """Answers that have natural parts in common, such as "The answer is" and a label, are no fault."""
    of = {
        "qwen2": lambda: Encoder(AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2"), 4096),
        "tiny": encoder,
        "stories260K": lambda: Encoder(load_tokenizer(shared / "models" / "stories260K").tokenizer, 4096),
        "no template": lambda: encoder(None),
    }[proxy]()
    found = look(index_corpus(shared / DATA[name], rows_per_unit=512), of)
    assert found.faults == ()
    assert (found.looked_at, found.passed_over, found.cut) == (64, 0, 0)
    assert found.summary().endswith("; nothing to warn of")


@pytest.mark.parametrize("path", ["/tmp/smollm2", pytest.param("/tmp/models/gemma3", marks=pytest.mark.soak)])
def test_no_warning_fires_on_real_data_with_real_models(shared, path):
    if not Path(path).is_dir():
        pytest.skip(f"needs the model in {path}")
    of = load_tokenizer(path)
    encodes = Encoder(of.tokenizer, 4096, vocabulary=of.vocabulary)
    for name in ("GSM8K", "BBH", "e-SNLI"):
        assert look(index_corpus(shared / DATA[name], rows_per_unit=512), encodes).faults == (), name


def test_a_task_whose_answers_all_begin_alike_is_told_by_how_much(shared, tmp_path):
    """One of BBH's tasks explains the order of adjectives in every answer."""
    with gzip.open(shared / DATA["BBH"], "rt") as stream:
        rows = [json.loads(line) for line in stream]
    of = Encoder(AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2"), 4096)
    told = {}
    for task in ("hyperbaton", "word_sorting", "movie_recommendation"):
        found = looked(tmp_path, [row for row in rows if row["meta"]["task"] == task], of)
        told[task] = [fault.kind for fault in found.faults]
        if task == "hyperbaton":
            assert re.search(
                r"with the same 71 tokens of the rows' own, .* 2\d % of all", str(found.faults[0])
            )
    assert told == {"hyperbaton": ["shared text"], "word_sorting": [], "movie_recommendation": []}


def test_what_a_template_adds_to_answers_is_told_apart_from_the_rows_own(tmp_path, monkeypatch):
    """Three tokens are enough there, as no row can help it."""
    of = encoder()
    preview = of.preview

    def widened(row):
        found = preview(row)
        # As a template would have it whose marks of what is generated take in the header.
        start = found.text.index("<|im_start|>assistant") if found.text.count("assistant") else 0
        found.spans = [(start, end) for _, end in found.spans]
        first = [i for i, token in enumerate(found.ids) if token == 1][-1]
        found.labels[first:] = found.ids[first:]
        return found

    monkeypatch.setattr(of, "preview", widened)
    (fault,) = looked(tmp_path, pairs(completion="{w} and {n}"), of).faults
    assert fault.kind == "shared text"
    assert "that the chat template adds, '<|im_start|>assistant\\n'" in str(fault)


def test_a_prompt_among_the_supervised_tokens_is_told(tmp_path, monkeypatch):
    of = encoder()
    preview = of.preview

    def all_of_it(row):
        found = preview(row)
        found.spans, found.labels = [(0, len(found.text))], found.ids.copy()
        found.labels[0] = -100
        return found

    rows = pairs(prompt="How many {w} are there?")
    assert looked(tmp_path, rows, of).faults == ()
    monkeypatch.setattr(of, "preview", all_of_it)
    assert "prompt supervised" in {fault.kind for fault in looked(tmp_path, rows, of).faults}
    # An answer that repeats the question is no fault.
    repeats = [{**row, "completion": f"{row['prompt']} {row['completion']}"} for row in rows]
    assert "prompt supervised" not in {fault.kind for fault in looked(tmp_path, repeats, of).faults}


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "no template"])
@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("### Instruction:\n{w}\n\n### Response:\nIt is {n}.", ["prompts in texts"]),
        ("### Human: {w} ### Assistant: It is {n}.", ["prompts in texts"]),
        ("<s>[INST] {w} [/INST] {n}</s>", ["prompts in texts"]),
        ("User: {w}\nAssistant: {n}", ["prompts in texts"]),
        ("Be brief. \nUSER: {w} ASSISTANT: {n}", ["prompts in texts"]),
        ("Q: {w}\nA: {n}", ["prompts in texts"]),
        ("<start_of_turn>user\n{w}<end_of_turn>\n<start_of_turn>model\n{n}", ["prompts in texts"]),
        ("def f(x):\n    return x + {n}", ["shared text"]),
        # Each word begins with the same byte, which is half a character.
        ("你好，你好，你好{c}", ["shared text"]),
        ("{w} and the User: said {n}", []),
        ("{w} is the Answer: of {n}, then [INST] {w}", []),
    ],
)
def test_the_words_of_a_text_are_its_own_and_no_template_is_blamed(tmp_path, text, kinds, template):
    rows = [{"text": text.format(w=words(n), n=n, c=chr(0x4E00 + n))} for n in range(40)]
    found = looked(tmp_path, rows, encoder(template)).faults
    assert [fault.kind for fault in found] == kinds
    assert "template" not in "".join(map(str, found))


def test_the_first_token_of_all_is_no_sign_of_a_template(tmp_path):
    """It is never supervised, so that what all answers share begins in the midst of their words."""
    rows = pairs(prompt="", completion="### It is now so that {n} {w}")
    (fault,) = looked(tmp_path, rows, encoder(None)).faults
    assert "of the rows' own" in str(fault)
    # Half a character at the end of what they share, behind a prompt.
    rows = [{**row, "completion": f"你好，你好，你好{chr(0x4E00 + n)}"} for n, row in enumerate(pairs())]
    (fault,) = looked(tmp_path, rows).faults
    assert "of the rows' own" in str(fault)


def test_an_empty_turn_is_not_joined_with_the_next(tmp_path):
    """As of calls that a template leaves out: the end of its turn stands before the words of the other one."""
    rows = chats()
    for n, row in enumerate(rows):
        ask, _ = row["messages"]
        silent = {
            "role": "assistant",
            "content": "",
            "tool_calls": call(name="count_fruit", arguments={"of": n}),
        }
        told = {"role": "tool", "content": f"{n}"}
        row["messages"] = [ask, silent, told, {"role": "assistant", "content": f"It is {n} of {words(n)}."}]
    assert [fault.kind for fault in looked(tmp_path, rows).faults] == ["tool calls dropped"]


def test_marks_are_looked_for_in_time(tmp_path):
    """A mark that comes again and again, without the one that would end the search."""
    rows = [{"text": "User: a\n" * 6000 + f"{n}"} for n in range(8)]
    began = time.process_time()
    assert looked(tmp_path, rows).looked_at == 8
    assert time.process_time() - began < 3


def test_few_rows_and_rare_faults_are_no_warning(tmp_path):
    assert looked(tmp_path, pairs(1)).faults == ()
    assert looked(tmp_path, pairs(4, completion="<think></think> {w}")).faults == ()
    once = [*pairs(39), {"prompt": "same", "completion": "same"}]
    assert looked(tmp_path, once).faults == ()
    # Labels that most rows share, with another one beside them.
    labels = [{**row, "completion": "yes" if n % 4 else "no"} for n, row in enumerate(pairs())]
    assert looked(tmp_path, labels).faults == ()


def test_rows_are_spread_over_the_corpus_and_always_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(3000)))
    manifest = index_corpus(path, rows_per_unit=100)
    lines = [item.line for item in inspection._sample(manifest, 64)]
    assert len(lines) == len(set(lines)) == 64
    assert lines == sorted(lines)
    assert [sum(300 * k < line <= 300 * (k + 1) for line in lines) for k in range(10)] == pytest.approx(
        [6] * 10, abs=4
    )
    assert lines == [item.line for item in inspection._sample(manifest, 64)]
    # All of a small corpus; no more than asked for.
    assert [item.line for item in inspection._sample(index_corpus(path, limit=5), 64)] == [1, 2, 3, 4, 5]
    assert len(list(inspection._sample(index_corpus(path, limit=5), 2))) == 2


@pytest.mark.parametrize("limit", [65, 70, 100, 200, 513])
def test_of_long_rows_as_many_are_looked_at(tmp_path, limit):
    """Of rows that are long, or a few of a long file, only the first are reached, each of them once."""
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "p", "completion": "c " * 20_000})
    path.write_text(f"{row}\n" * 600)
    found = list(inspection._sample(index_corpus(path, limit=limit, rows_per_unit=256), 64))
    assert len({item.line for item in found}) == len(found) == 64


def test_the_reader_is_not_led_far_into_an_archive_or_a_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_ARCHIVE_BYTES", 40_000)
    monkeypatch.setattr(inspection, "_GROUP_ROWS", 50)
    rows = pairs(3000)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as stream:
        stream.write(text)
    packed = index_corpus(tmp_path / "rows.jsonl.gz", rows_per_unit=20)
    lines = [item.line for item in inspection._sample(packed, 64)]
    assert len(set(lines)) == 64
    assert text[:60_000].count("\n") > lines[-1] > 100
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1000
    )
    grouped = index_corpus(tmp_path / "rows.parquet", rows_per_unit=20)
    lines = [item.line for item in inspection._sample(grouped, 64)]
    assert {(line - 1) // 1000 for line in lines} == {0, 1, 2}
    assert all((line - 1) % 1000 < 80 for line in lines)


def test_long_rows_cost_little_and_are_counted(tmp_path):
    """Of megabytes only as much is tokenised as the look allows, and the rest of the rows is still looked at."""
    long = {"prompt": "p", "completion": "word " * 300_000}
    rows = [long if n % 8 == 0 else row for n, row in enumerate(pairs(32))]
    of = encoder()
    began = time.process_time()
    found = looked(tmp_path, rows, of, characters=100_000)
    assert time.process_time() - began < 2
    assert (found.looked_at, found.passed_over, sum(found.forms.values())) == (32, 4, 28)
    assert "4 too long for a look" in found.summary()
    # Rows that would fit alone share the allowance, and those that are taken are spread.
    found = looked(
        tmp_path, [{**row, "prompt": "p " * 5000} for row in pairs(32)], of, characters=60_000, shown=9
    )
    assert found.passed_over == 32 - 5
    assert [example.line for example in found.examples] == [1, 9, 17, 25, 26] or len(found.examples) == 5
    assert looked(tmp_path, [long], of, characters=1000).tokens is None


def test_what_is_shown_keeps_every_boundary(tmp_path):
    prompt, answer = f"BEGIN {'p ' * 2000}END", f"FIRST {'q ' * 2000}LAST"
    (example,) = looked(tmp_path, [{"prompt": prompt, "completion": answer}]).examples
    before, supervised, after = example.parts
    assert (before.is_supervised, supervised.is_supervised, after.is_supervised) == (False, True, False)
    assert before.text.startswith("<|im_start|>user\nBEGIN")
    assert before.tail.endswith("END<|im_end|>\n<|im_start|>assistant\n")
    assert supervised.text.startswith("FIRST")
    assert supervised.tail.endswith("LAST<|im_end|>")
    whole = len(supervised.text) + supervised.skipped + len(supervised.tail)
    assert whole == len(answer) + len("<|im_end|>")
    assert example.last == "'<|im_end|>'"
    many = {
        "messages": [{"role": r, "content": f"{r} {n}"} for n in range(30) for r in ("user", "assistant")]
    }
    (example,) = looked(tmp_path, [many]).examples
    assert (len(example.parts), example.skipped, example.after) == (9, 52, 4)
    assert "user 0" in example.parts[0].text
    assert "assistant 29" in example.parts[-2].text


def test_refused_rows_have_their_own_words_and_remedies(tmp_path):
    rows = chats(8)
    for n, row in enumerate(rows):
        row["messages"][0]["role"] = f"narrator{n}"
    (fault,) = looked(tmp_path, [*rows, *({**row, "tools": 3} for row in chats(2))]).faults
    assert "a message of unknown role (8; rows.jsonl:1: message 1: unknown role 'narrator0'; wanted" in str(
        fault
    )
    assert "field 'tools' is not a list of objects (int) (2; rows.jsonl:9 is the first)" in str(fault)
    assert (
        fault.remedy
        == "name the roles system, user, assistant and tool; mend this field, or name another one"
    )


def test_rows_in_are_rows_looked_at_and_refused(tmp_path):
    rows = [*pairs(10), {"prompt": "p"}, {"completion": "c"}, {"text": ""}, {"messages": []}]
    found = looked(tmp_path, rows)
    assert found.looked_at == 14
    assert sum(found.forms.values()) + sum(found.refused.values()) == 14
    assert found.refused["missing field 'completion'"] == 1
    assert json.loads(json.dumps(found.to_dict()))["faults"][0]["kind"] == "refused rows"
    for name in ("rows", "characters"):
        with pytest.raises(GvendiError, match=f"{name} is 0; wanted at least 1"):
            look(index_corpus(tmp_path / "rows.jsonl"), encoder(), **{name: 0})


@pytest.mark.parametrize("name", ["tiny", "/tmp/smollm2"])
def test_a_tokenizer_is_loaded_as_with_its_model_and_needs_no_weights(name, tmp_path, monkeypatch):
    from gvendi_fast.sketching.proxy import load

    if name != "tiny" and not Path(name).is_dir():
        pytest.skip(f"needs the model in {name}")
    folder = PACKAGE / "assets" / "tiny" if name == "tiny" else Path(name)
    for file in folder.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = load_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (found.vocabulary, found.positions) == (config["vocab_size"], config["max_position_embeddings"])
    with pytest.raises(GvendiError, match="lacks weights"):
        load.load_proxy(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(GvendiError, match=r"lacks config\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(GvendiError, match="revisions belong to hub names"):
        load_tokenizer(tmp_path, revision="main")


def test_a_note_of_the_encoder_without_a_check_of_its_own_is_told(tmp_path, monkeypatch):
    of = encoder()
    preview = of.preview

    def noted(row):
        found = preview(row)
        found.notes = ("pictures dropped",) if row.line % 2 else ()
        return found

    monkeypatch.setattr(of, "preview", noted)
    (fault,) = looked(tmp_path, pairs(), of).faults
    assert str(fault).startswith(
        "20 of 40 rows are rendered with a loss: pictures dropped (rows.jsonl:1 is the first)"
    )


def test_a_truncated_archive_is_told_though_the_look_does_not_reach_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_ARCHIVE_BYTES", 10_000)
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in pairs(3000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = look(
        index_corpus([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"], rows_per_unit=20), encoder()
    )
    (fault,) = (fault for fault in found.faults if fault.kind != "copies")
    assert (fault.kind, fault.count, fault.of) == ("damaged files", 1, 2)
    assert "b.jsonl.gz' is a damaged archive: it ends too early" in str(fault)
    assert look(index_corpus(tmp_path / "a.jsonl.gz", rows_per_unit=20), encoder()).faults == ()
    assert found.refused == {}


@pytest.mark.parametrize("kind", ["csv", "json", "csv.gz", "arrow"])
def test_every_kind_of_file_is_looked_at_near_where_it_can_be_read(tmp_path, monkeypatch, kind):
    import pyarrow
    import pyarrow.feather

    monkeypatch.setattr(inspection, "_ARCHIVE_BYTES", 60_000)
    monkeypatch.setattr(inspection, "_GROUP_ROWS", 500)
    rows, path = pairs(3000), tmp_path / f"rows.{kind}"
    table = pyarrow.Table.from_pylist(rows)
    if kind == "arrow":
        pyarrow.feather.write_feather(table, path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        text = "prompt,completion\n" + "".join(f'"{r["prompt"]}","{r["completion"]}"\n' for r in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    manifest = index_corpus(path, rows_per_unit=20)
    assert manifest.rows == 3000
    found = look(manifest, encoder())
    assert (found.looked_at, found.refused, found.faults) == (64, {}, ())
    lines = [example.line for example in look(manifest, encoder(), shown=64).examples]
    assert 100 < max(lines) < 2000


def test_odd_rows_are_looked_at_or_refused_and_every_one_is_counted(tmp_path):
    """Values of every kind where tools, calls, arguments and reasoning are expected."""
    odd = [
        None,
        0,
        2.5,
        True,
        "",
        "x",
        "{",
        "[1",
        '{"a": "\\ud800"}',
        [],
        {},
        [[]],
        [None],
        {"name": 3},
        ["x"] * 3,
    ]
    odd += [
        {"function": "f"},
        [{"function": {"name": "f", "arguments": [{"deep": ["y", None]}]}}],
        {"role": "user"},
    ]
    rows = []
    for n, value in enumerate(odd):
        (user, answer), other = chats(1)[0]["messages"], odd[(7 * n + 3) % len(odd)]
        rows += [
            {"messages": [user, {**answer, "tool_calls": value, "reasoning": other}], "tools": other},
            {"messages": [user, {**answer, "tool_calls": [value, {"function": value}]}]},
            {
                "messages": [
                    user,
                    {**answer, "tool_calls": [{"function": {"name": other, "arguments": value}}]},
                ]
            },
            {"messages": [{**user, "content": value}, answer], "tools": [value, {"function": other}]},
            {"messages": [user, {**answer, "role": value, "weight": other, "train": value}]},
            {"prompt": value, "completion": other},
        ]
    for template in (CHATML, CALLS, REASONS):
        found = looked(tmp_path, rows, encoder(template), rows=len(rows))
        assert found.looked_at == len(rows) == sum(found.forms.values()) + sum(found.refused.values())
        assert json.loads(json.dumps(found.to_dict()))["looked_at"] == len(rows)
        # Arguments as a string are read where the template wants an object.
        is_read = "invalid Unicode: lone surrogate in the rendered conversation" in found.refused
        assert is_read == (template == CALLS)
