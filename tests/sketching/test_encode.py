"""Which tokens of a row are supervised, read back by decoding them; what is cut, what is refused, how rows batch."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.index import Rejected, Row
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches, collate

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<bos>", "<eos>"]
TEXT = [
    "the answer is four and the question is what two and two make",
    "user assistant system\n\n",
    "1 + 2 = 3",
]


def make_tokenizer(
    template: str | None = None, bos: bool = False, eos: bool = True
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some hundred tokens; with `bos` it begins every text with <bos>."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    # Trimmed offsets are the harder case: a token of spaces then has an empty range.
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
                ),
            ]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>" if eos else None,
        additional_special_tokens=SPECIALS[:2],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer(CHATML)


def pair(prompt: str, completion: str, row: int = 0) -> Row:
    return Row(row, f"id{row}", "g", "f.jsonl", row + 1, prompt=prompt, completion=completion)


def talk(*turns: tuple[str, str]) -> Row:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Row(0, "id0", "g", "f.jsonl", 1, messages=messages)


def encode(tokenizer, row: Row, **settings) -> Sample | Rejected:
    (result,) = Encoder(tokenizer, **settings).encode([row])
    return result


def supervised(tokenizer, sample: Sample) -> list[str]:
    """The runs of supervised tokens, decoded; every label is checked to be its own token."""
    on = sample.labels != -100
    assert np.array_equal(sample.labels[on], sample.input_ids[on])
    assert not on[0]
    assert on[-1]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(int), [0]])))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def whole(tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids)


CONTENTS = [
    "four",
    " leading and trailing  ",
    "spaces   \n\n   and é漢字🎉🎉",
    "🎉",
    "assistant\nuser the answer",
    "e\u0301 decomposed",
]


@pytest.mark.parametrize("content", CONTENTS)
def test_pair_with_template(chatml, content):
    sample = encode(chatml, pair("what is two?", content))
    assert supervised(chatml, sample) == [content.replace("e\u0301", "é") + "<|im_end|>"]
    header = "<|im_start|>user\nwhat is two?<|im_end|>\n<|im_start|>assistant\n"
    assert whole(chatml, sample).startswith(header)
    assert sample.supervised == np.count_nonzero(sample.labels[1:] != -100)
    assert sample.length == len(sample.input_ids)
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32


@pytest.mark.parametrize("content", CONTENTS)
def test_released_mask(chatml, content):
    sample = encode(chatml, pair("what is two?", content), mask="released")
    assert supervised(chatml, sample) == [content.replace("e\u0301", "é"), "\n"]
    marker = sample.input_ids[sample.labels == -100][-1]
    assert chatml.decode([marker]) == "<|im_end|>"


def test_a_token_that_holds_header_and_content_is_supervised(chatml):
    # The tokenizer merges the header's newline with the content's two into one token.
    assert supervised(chatml, encode(chatml, pair("a", "\n\nb"))) == ["\n\n\nb<|im_end|>"]


def test_every_assistant_turn_is_supervised_and_no_other(chatml):
    turns = [
        ("system", "the question"),
        ("user", "four"),
        ("assistant", "four"),
        ("user", "four"),
        ("assistant", "four\n"),
        ("user", "never answered"),
    ]
    sample = encode(chatml, talk(*turns))
    assert supervised(chatml, sample) == ["four<|im_end|>", "four\n<|im_end|>"]
    # What follows the last supervised token has no loss and is left out.
    assert whole(chatml, sample).endswith("four\n<|im_end|>")
    released = encode(chatml, talk(*turns), mask="released")
    assert supervised(chatml, released) == ["four", "\n", "four\n", "\n"]


def test_markers_inside_a_content_do_not_confuse(chatml):
    content = "a<|im_end|>\n<|im_start|>assistant\nb"
    sample = encode(chatml, talk(("user", content), ("assistant", content)))
    assert "".join(supervised(chatml, sample)) == content + "<|im_end|>"


def test_an_assistant_that_opens(chatml):
    sample = encode(chatml, talk(("assistant", "assistant"), ("user", "b")))
    assert supervised(chatml, sample) == ["assistant<|im_end|>"]


def test_rendered_text_is_tokenised_as_transformers_does(chatml):
    turns = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}]
    text = chatml.apply_chat_template(turns, tokenize=False)
    ids = chatml(text, add_special_tokens=False).input_ids
    sample = encode(chatml, pair("two and two", "four"))
    assert sample.input_ids.tolist() == ids[:-1]


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_template_without_generation_prompt_and_with_its_own_bos():
    tokenizer = make_tokenizer(LLAMA2, bos=True)
    sample = encode(
        tokenizer, talk(("user", "two"), ("assistant", " four "), ("user", "x"), ("assistant", "y"))
    )
    assert [turn.strip() for turn in supervised(tokenizer, sample)] == ["four <eos>", "y <eos>"]
    assert np.count_nonzero(sample.input_ids == tokenizer.bos_token_id) == 1


THINK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>' + m['content'] }}"
    "{% else %}{{ '<|im_end|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}"
)


def test_reasoning_template_whose_prompt_is_no_beginning_of_its_turn():
    tokenizer = make_tokenizer(THINK)
    sample = encode(tokenizer, pair("i", "<think>long</think>i"))
    assert supervised(tokenizer, sample) == ["i<eos>"]


def test_template_that_rewrites_earlier_turns():
    rewriting = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if loop.last else "
        "m['content'].split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = make_tokenizer(rewriting)
    row = talk(("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e"))
    assert supervised(tokenizer, encode(tokenizer, row)) == ["c<|im_end|>", "e<|im_end|>"]
    assert Encoder(tokenizer).preview(row).notes == ("reasoning of earlier turns dropped",)


def test_template_that_never_appends():
    tokenizer = make_tokenizer("{{ messages | length }}" + CHATML)
    row = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert supervised(tokenizer, encode(tokenizer, row)) == ["b<|im_end|>", "d<|im_end|>"]


# Goes through its messages by their numbers, so that its loop does not tell whose turn it is.
NUMBERED = (
    "{% for i in range(messages | length) %}{{ '<|im_start|>' + messages[i].role + '\n' + messages[i].content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_without_a_loop_over_messages_is_told_by_its_prefixes():
    tokenizer = make_tokenizer(NUMBERED)
    row = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert supervised(tokenizer, encode(tokenizer, row)) == ["b<|im_end|>", "d<|im_end|>"]
    assert Encoder(tokenizer).method == "prefix"
    assert Encoder(make_tokenizer(CHATML)).method == "loop"


def test_a_row_whose_turns_nothing_tells_is_refused_and_ends_no_run():
    tokenizer = make_tokenizer("{{ messages | length }}" + NUMBERED)
    rows = [
        talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        talk(("user", "a"), ("assistant", "b")),
    ]
    refused, fine = Encoder(tokenizer).encode(rows)
    assert (
        refused.reason
        == "chat template leaves out or rewrites an assistant's turn, so its supervised part cannot be found"
    )
    # The header of a single turn is what stands before a content that is known.
    assert supervised(tokenizer, fine) == ["b<|im_end|>"]


def test_template_that_refuses_a_row():
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    result = encode(make_tokenizer(strict), talk(("system", "a"), ("user", "b"), ("assistant", "c")))
    assert (result.reason, result.id) == ("chat template refused the messages: no system role", "id0")


def test_template_that_asks_for_the_date_gives_the_same_tokens_every_day():
    dated = "{{ strftime_now('%d %b %Y') + strftime_now('%Y-%m-%d') }}\n" + CHATML
    tokenizer = make_tokenizer(dated)
    sample = encode(tokenizer, pair("a", "b"))
    assert whole(tokenizer, sample).startswith("26 Jul 20242024-07-26\n<|im_start|>user")


def test_messages_need_a_template():
    refused, fine = Encoder(make_tokenizer()).encode(
        [talk(("user", "a"), ("assistant", "b")), pair("a", "b")]
    )
    assert refused.reason.startswith(
        "the tokenizer has no chat template, which messages need; set tokenizer.chat_"
    )
    assert isinstance(fine, Sample)


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("what?", "four", "what?\n|four"),
        ("what? ", "four", "what? |four"),
        ("what?", " four", "what?| four"),
        ("", "four", "|four"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_pair_without_template(prompt, completion, text, bos, eos):
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    sample = encode(tokenizer, pair(prompt, completion))
    before, after = text.split("|")
    ids = [tokenizer.bos_token_id] * bos + tokenizer.encode(before, add_special_tokens=False)
    answer = tokenizer.encode(after, add_special_tokens=False) + [tokenizer.eos_token_id] * eos
    assert sample.input_ids.tolist() == ids + answer
    on = np.concatenate([np.zeros(len(ids), bool), np.ones(len(answer), bool)])
    on[0] = False
    assert np.array_equal(sample.labels != -100, on)


def test_released_mask_without_template_leaves_eos_out():
    tokenizer = make_tokenizer()
    assert supervised(tokenizer, encode(tokenizer, pair("a", "four"), mask="released")) == ["four"]


@pytest.mark.parametrize("bos", [False, True])
def test_text_is_supervised_as_a_whole(bos):
    tokenizer = make_tokenizer(CHATML, bos=bos)
    row = Row(0, "i", "", "f", 1, text="the answer is four")
    sample = encode(tokenizer, row)
    assert sample.input_ids.tolist() == tokenizer.encode("the answer is four")
    assert np.array_equal(sample.labels[1:], sample.input_ids[1:])
    assert sample.labels[0] == -100


def test_one_token_has_nothing_to_predict():
    result = encode(make_tokenizer(), Row(0, "i", "", "f", 3, text="a"))
    assert result == Rejected("f", 3, "nothing supervised", "i")
    assert encode(make_tokenizer(eos=False), pair("", "a")).reason == "nothing supervised"


@pytest.mark.parametrize("template", [None, CHATML, "{{ bos_token }}" + CHATML])
@pytest.mark.parametrize("bos", [False, True])
def test_long_prompts_lose_their_left(template, bos):
    tokenizer = make_tokenizer(template, bos=bos)
    if template and template.startswith("{{ bos") and not bos:
        template = tokenizer.chat_template = CHATML
    row = pair("the question is what two and two make " * 20, "the answer is four")
    full = encode(tokenizer, row)
    first = int(np.flatnonzero(full.labels != -100)[0])
    answer = full.length - first
    head = int(bos and full.input_ids[0] == tokenizer.bos_token_id)
    for limit in (full.length, full.length - 1, answer + 5, answer + 1):
        cut = encode(tokenizer, row, max_tokens=limit)
        assert cut.length == min(limit, full.length)
        expected = np.concatenate([full.input_ids[:head], full.input_ids[full.length - (limit - head) :]])
        assert np.array_equal(cut.input_ids, expected)
        assert supervised(tokenizer, cut) == supervised(tokenizer, full)
    tight = encode(tokenizer, row, max_tokens=answer)
    assert tight.reason == f"too long: completion needs {answer + 1} tokens, --max-tokens is {answer}"


def test_long_messages_and_texts(chatml):
    row = talk(("user", "a " * 50), ("assistant", "four"), ("user", "b " * 50), ("assistant", "c"))
    full = encode(chatml, row)
    first = int(np.flatnonzero(full.labels != -100)[0])
    needed = full.length - first + 1
    kept = encode(chatml, row, max_tokens=needed)
    assert supervised(chatml, kept) == supervised(chatml, full) == ["four<|im_end|>", "c<|im_end|>"]
    short = encode(chatml, row, max_tokens=needed - 1)
    assert (
        short.reason == f"too long: the supervised turns need {needed} tokens, --max-tokens is {needed - 1}"
    )
    text = Row(0, "i", "", "f", 1, text="a b c d e f")
    length = encode(chatml, text).length
    assert encode(chatml, text, max_tokens=length).length == length
    assert encode(chatml, text, max_tokens=length - 1).reason == (
        f"too long: text needs {length} tokens, --max-tokens is {length - 1}"
    )


def test_truncation_saved_in_a_tokenizer_file_is_not_used(chatml):
    tokenizer = make_tokenizer(CHATML)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    row = pair("two and two", "four")
    assert encode(tokenizer, row).input_ids.tolist() == encode(chatml, row).input_ids.tolist()


def test_order_and_rejects_over_many_rows(chatml):
    rows = [
        talk(("user", "a"), ("assistant", "b")) if n % 7 else pair("a", "very " * 60, n) for n in range(600)
    ]
    for n, row in enumerate(rows):
        row.row = n
    results = Encoder(chatml, max_tokens=40).encode(rows)
    assert [n for n, result in enumerate(results) if isinstance(result, Rejected)] == list(range(0, 600, 7))
    assert [result.row for result in results if isinstance(result, Sample)] == [
        n for n in range(600) if n % 7
    ]
    assert Encoder(chatml).encode([]) == []


def test_settings_are_refused_by_name(chatml):
    with pytest.raises(GvendiError, match=r"mask is 'all'; wanted one of completion, released"):
        Encoder(chatml, mask="all")
    with pytest.raises(GvendiError, match="max_tokens is 1; wanted at least 2"):
        Encoder(chatml, max_tokens=1)

    class Slow:
        is_fast, name_or_path = False, "some/model"

    with pytest.raises(GvendiError, match="tokenizer 'some/model' is Slow; wanted a fast one"):
        Encoder(Slow())


def sample_of(length: int, row: int) -> Sample:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Sample(row, str(row), "", "f", row + 1, ids, np.where(ids > 1, ids, -100).astype(np.int32))


def test_batches_keep_to_the_budget():
    lengths = [500, *np.random.default_rng(0).integers(2, 60, 200).tolist()]
    samples = [sample_of(length, row) for row, length in enumerate(lengths)]
    made = list(batches(samples, 128))
    assert [sample.row for batch in made for sample in batch] == sorted(
        range(201), key=lambda row: (-lengths[row], row)
    )
    assert [len(batch) for batch in made if batch[0].length > 128] == [1]
    for batch, after in pairwise(made[1:]):
        assert batch[0].length * len(batch) <= 128
        # No batch stops early.
        assert batch[0].length * (len(batch) + 1) > 128
        assert batch[-1].length >= after[0].length
    again = list(batches(samples[::-1], 128))
    assert [[s.row for s in batch] for batch in again] == [[s.row for s in batch] for batch in made]
    with pytest.raises(GvendiError, match="batch_tokens is 0"):
        list(batches(samples, 0))


def test_a_long_batch_ends_before_it_is_much_padding():
    # 8 x 1024 tokens, then rows of 900: one more makes 9216 padded tokens of which 124 are padding, and so on; the
    # fifth, with 5 * 124 = 620 of 13,312, is within 1/16 = 832, the ninth, 1116 of 17,408 against 1088, is not.
    samples = [sample_of(1024 if row < 8 else 900, row) for row in range(30)]
    made = [[s.length for s in batch] for batch in batches(samples, 1 << 16)]
    assert made == [[1024] * 8 + [900] * 8, [900] * 14]
    # Below 8192 tokens the budget alone decides.
    assert [len(batch) for batch in batches(samples, 8192)] == [8, 9, 9, 4]
    short = [sample_of(length, row) for row, length in enumerate([1000, 10, 10, 10])]
    assert [len(batch) for batch in batches(short, 1 << 16)] == [4]


@pytest.mark.parametrize("budget", [2048, 16384, 65536])
def test_padding_is_bounded_whatever_the_lengths(budget):
    lengths = np.random.default_rng(3).lognormal(5, 0.7, 700).astype(int) + 2
    for batch in batches([sample_of(n, row) for row, n in enumerate(lengths.tolist())], budget):
        padded, real = batch[0].length * len(batch), sum(s.length for s in batch)
        assert padded <= max(budget, batch[0].length)
        assert padded - real <= max(padded / 16, 8192 + batch[0].length)


def test_collate_pads_on_the_right():
    input_ids, labels, attention = collate([sample_of(3, 0), sample_of(2, 1)], pad_id=9)
    assert input_ids.tolist() == [[1, 2, 3], [1, 2, 9]]
    assert labels.tolist() == [[-100, 2, 3], [-100, 2, -100]]
    assert attention.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {str(tensor.dtype) for tensor in (input_ids, labels, attention)} == {"torch.int64"}
    with pytest.raises(GvendiError, match="batch is empty"):
        collate([], 0)


def test_qwen_tokenizer_on_real_rows(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2")
    lines = (shared / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    rows = [
        pair(record["prompt"], record["completion"], n) for n, record in enumerate(map(json.loads, lines))
    ]
    for row, sample in zip(rows, Encoder(tokenizer).encode(rows), strict=True):
        assert supervised(tokenizer, sample) == [row.completion + "<|im_end|>"]
    for row, sample in zip(rows, Encoder(tokenizer, mask="released").encode(rows), strict=True):
        assert supervised(tokenizer, sample) == [row.completion, "\n"]


def test_sentencepiece_style_tokenizer(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    sample = encode(tokenizer, pair("Once upon a time", "there was a dog."))
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert supervised(tokenizer, sample)[0].strip().startswith("there was a dog.")
    assert sample.input_ids[-1] == tokenizer.eos_token_id


def test_what_others_do_with_the_shared_tokenizer_changes_no_row(monkeypatch):
    rows = [pair("two and two", f"make {n}, which is the answer " * 8, n) for n in range(300)]
    wanted = [sample.input_ids.tolist() for sample in Encoder(make_tokenizer(CHATML)).encode(rows)]
    tokenizer = make_tokenizer(CHATML)
    encoder = Encoder(tokenizer)
    own = type(tokenizer).set_truncation_and_padding

    def in_between(self, *args, **more):
        """Another thread's call comes right before the texts are encoded."""
        own(self, *args, **more)
        self.backend_tokenizer.enable_truncation(3)
        self.backend_tokenizer.enable_padding(length=99)

    monkeypatch.setattr(type(tokenizer), "set_truncation_and_padding", in_between)
    tokenizer.add_tokens(["answer"])
    assert [sample.input_ids.tolist() for sample in encoder.encode(rows)] == wanted


def test_threads_share_an_encoder_while_another_one_uses_its_tokenizer():
    tokenizer = make_tokenizer(CHATML)
    tokenizer.pad_token = "<eos>"
    encoder, done = Encoder(tokenizer), threading.Event()
    rows = [pair("two and two", f"make {n} " * 8, n) for n in range(300)]
    wanted = [sample.input_ids.tolist() for sample in encoder.encode(rows)]

    def disturb():
        while not done.is_set():
            tokenizer(["the answer is", "four"], padding=True, truncation=True, max_length=2)

    with ThreadPoolExecutor(3) as pool:
        disturbed = pool.submit(disturb)
        try:
            for result in [pool.submit(encoder.encode, rows) for _ in range(4)]:
                assert [sample.input_ids.tolist() for sample in result.result(60)] == wanted
        finally:
            done.set()
        disturbed.result(60)


def test_added_tokens_with_gaps_between_their_numbers_keep_them(tmp_path):
    path = tmp_path / "tokenizer.json"
    make_tokenizer(CHATML).backend_tokenizer.save(str(path))
    content = json.loads(path.read_text())
    last = {**content["added_tokens"][-1], "id": 1000, "content": "<last>"}
    path.write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], last]}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<eos>")
    tokenizer.backend_tokenizer.enable_truncation(3)
    text = "two <last> and two make four"
    (sample,) = Encoder(tokenizer).encode([Row(0, "id", "g", "f", 1, text=text)])
    assert sample.input_ids.tolist() == tokenizer(text).input_ids


def test_a_preview_has_the_whole_row(chatml):
    row = talk(("user", "a " * 50), ("assistant", "four"), ("user", "never answered"))
    shown = Encoder(chatml, max_tokens=12).preview(row)
    assert shown.text == chatml.apply_chat_template(row.messages, tokenize=False)
    assert [shown.text[a:b] for a, b in shown.spans] == ["four<|im_end|>"]
    assert shown.ids.tolist() == chatml(shown.text, add_special_tokens=False).input_ids
    full = encode(chatml, row)
    assert np.array_equal(shown.ids[: full.length], full.input_ids)
    assert np.array_equal(shown.labels[: full.length], full.labels)
    assert (shown.labels[full.length :] == -100).all()
    assert len(shown.ids) > full.length
    assert shown.notes == ()


@pytest.mark.parametrize("bos", [False, True])
def test_a_preview_of_a_pair_without_a_template(bos):
    tokenizer = make_tokenizer(bos=bos)
    shown, sample = (
        Encoder(tokenizer).preview(pair("what?", "four")),
        encode(tokenizer, pair("what?", "four")),
    )
    assert (shown.text, shown.spans) == ("what?\nfour", [(6, 10)])
    assert np.array_equal(shown.ids, sample.input_ids)
    assert np.array_equal(shown.labels, sample.labels)


def test_a_preview_is_refused_where_nothing_is_supervised(chatml):
    refused = Encoder(make_tokenizer()).preview(Row(0, "i", "", "f", 3, text="a"))
    assert refused == Rejected("f", 3, "nothing supervised", "i")


def test_a_template_is_given_the_tools():
    tokenizer = make_tokenizer("{{ tools | length if tools else 'none' }}" + CHATML)
    row = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert Encoder(tokenizer).preview(row).text.startswith("none<")
    row.tools = [{"type": "function", "function": {"name": "add"}}] * 3
    shown = Encoder(tokenizer).preview(row)
    assert shown.text.startswith("3<")
    assert [shown.text[a:b] for a, b in shown.spans] == ["b<|im_end|>", "d<|im_end|>"]
