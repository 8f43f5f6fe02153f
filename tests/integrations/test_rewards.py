"""Rewards of rollouts: the formula, groups as TRL cuts them, and what a rollout's sketch is of."""

import asyncio
import copy
import math
import multiprocessing
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from small_models import GATED

from gvendi_fast import GroupDiversityReward, SketchSpec, group_diversity_rewards, group_gains
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.rollouts import RolloutSketcher, sketch_tokens
from gvendi_fast.sketching.proxy.load import Proxy, load_tokenizer

SPEC = SketchSpec(dim=64, seed=3)
PROMPTS = ["[2, 4, 6, ", "What is 4 + 2?"]
ANSWERS = ["8, 10]", "8, 10]", "the sum is six", "x = 6\nprint(x)"]


@pytest.fixture(scope="module")
def proxy():
    """One random layer behind the package's own tokenizer."""
    tokenizer = load_tokenizer("tiny").tokenizer
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **{**GATED, "vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 96}
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return Proxy(model, tokenizer, "small", "sha256:0", torch.float32, torch.device("cpu"), 0)


@pytest.fixture(scope="module")
def sketcher(proxy):
    return RolloutSketcher(proxy, SPEC)


class Trainer:
    """What a reward function sees of TRL's trainer."""

    def __init__(self, size: int, size_eval: int | None = None) -> None:
        self.num_generations, self.num_generations_eval = size, size_eval or size
        self.model = SimpleNamespace(training=True)
        self.metrics: dict[str, float] = {}
        self.columns: dict[str, list] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = value

    def log_extra(self, column: str, values: list) -> None:
        self.columns[column] = values

    def call(self, reward, prompts, completions, **columns):
        """As `GRPOTrainer._calculate_rewards` of TRL 1.16 calls."""
        return reward(
            prompts=prompts,
            completions=completions,
            completion_ids=[[3, 4]] * len(prompts),
            trainer_state=SimpleNamespace(global_step=0),
            log_extra=self.log_extra,
            log_metric=self.log_metric,
            **columns,
        )


def all_right(completions, **kwargs):
    return [1.0] * len(completions)


def batch(prompts=PROMPTS, answers=ANSWERS):
    """Rollouts as TRL orders them: each prompt with all its answers."""
    return [p for p in prompts for _ in answers], [a for _ in prompts for a in answers]


def talk(words: str, role: str) -> list[dict]:
    return [{"role": role, "content": words}]


def test_the_formula_by_hand():
    # Groups a: two twins and an orthogonal row; b: orthogonal rows; labels interleaved.
    rows = np.array([[1, 0, 0], [0, 1, 0], [5, 0, 0], [0, 0, 2], [0, 3, 0.0]])
    groups = ["a", "b", "a", "b", "a"]
    correct = [True, False, 0.5, None, 1]
    twin = (math.log(3) - 2 / 3 * math.log(2) - 2 / 3 * math.log(2)) / (math.log(3) - 2 / 3 * math.log(2))
    got = group_diversity_rewards(correct, groups, rows, weight=0.4)
    assert got[3] is None
    assert got[:3] + got[4:] == pytest.approx([1 + 0.4 * twin, 0, 0.5 * (1 + 0.4 * twin), 1.4], abs=1e-6)
    clipped = group_diversity_rewards(correct, groups, rows, weight=0.4, ceiling=0.5, threshold=0.5)
    assert clipped[:3] + clipped[4:] == pytest.approx([1 + 0.4 * twin, 0, 0.5, 1.2], abs=1e-6)
    assert group_diversity_rewards(torch.tensor([1, 0]), torch.tensor([7, 7]), np.zeros((2, 3))) == [1, 0]


def test_wrong_rollouts_and_rollouts_without_a_gradient_get_no_bonus():
    rows = np.random.default_rng(0).standard_normal((8, 16))
    rows[2], rows[3, 1] = 0, math.nan
    got = group_diversity_rewards([0, 1, 1, 1, 0, 1, -1, 1], [0] * 8, rows)
    assert [got[0], got[4], got[6]] == [0, 0, -1]
    assert got[2] == got[3] == 1
    assert min(got[1], got[5], got[7]) > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": -1}, "weight is -1; wanted 0 or more"),
        ({"ceiling": 0}, "ceiling is 0; wanted a novelty"),
        ({"threshold": -0.5}, "threshold is -0.5; wanted 0 or more"),
        ({"group_size": 3}, "group 'a' has 2 rollouts where group_size is 3"),
        ({"correct": [1]}, "correct has 1 entries for 4 rollouts"),
        ({"correct": [1, "6", 0, 0]}, "correct holds '6' for rollout 1; wanted numbers"),
        ({"sketches": None}, "give sketches .*, or prompt_ids, completion_ids and sketcher"),
    ],
    ids=["weight", "ceiling", "threshold", "size", "correct", "texts", "no sketches"],
)
def test_wrong_arguments_get_one_sentence(given, message):
    plain = {"correct": [1] * 4, "groups": ["a", "a", "b", "b"], "sketches": np.eye(4)}
    with pytest.raises(GvendiError, match=message) as error:
        group_diversity_rewards(**{**plain, **given})
    assert "\n" not in str(error.value)


def test_token_ids_are_sketched_with_the_prompt_unsupervised(proxy, sketcher):
    ids = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13]]
    z = sketch_tokens(sketcher.sketcher, *ids)
    for i, (prompt, completion) in enumerate(zip(*ids, strict=True)):
        row = torch.tensor([prompt + completion])
        labels = row.clone()
        labels[0, : len(prompt)] = -100
        torch.testing.assert_close(z[i], sketcher.sketcher(row, labels)[0], rtol=1e-4, atol=1e-5)
    for sketches in (sketcher, sketcher.sketcher):
        got = group_diversity_rewards(
            [1, 1], [0, 0], prompt_ids=ids[0], completion_ids=ids[1], sketcher=sketches
        )
        assert got == pytest.approx(group_diversity_rewards([1, 1], [0, 0], z))
    with pytest.raises(
        GvendiError, match=r"rollout 1 holds token 9999, and the proxy has the tokens 0\.\.2047"
    ):
        sketcher.of_tokens([[3], [3]], [[4], [9999]])


def test_ids_of_another_tokenizer_are_read_as_text(proxy, sketcher):
    other = copy.deepcopy(proxy.tokenizer)
    given = [[other(text)["input_ids"] for text in side] for side in batch(PROMPTS[:1])]
    wanted = sketcher(*batch(PROMPTS[:1]))
    torch.testing.assert_close(sketcher.of_tokens(*given, tokenizer=other), wanted)


def test_texts_and_messages_give_one_sketch_and_images_none(sketcher):
    prompts, answers = batch(PROMPTS[1:])
    plain = sketcher(prompts, answers)
    said = sketcher([talk(p, "user") for p in prompts], [talk(a, "assistant") for a in answers])
    torch.testing.assert_close(said, plain)
    seen = [
        [{"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": p}]}]
        for p in prompts
    ]
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": a}]}] for a in answers]
    torch.testing.assert_close(sketcher(seen, parts), plain)


def test_only_the_completions_assistant_is_supervised(sketcher):
    prompt = [*talk("hi", "user"), *talk("yes?", "assistant"), *talk("add 1 and 2", "user")]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
    }
    answer = [call, {"role": "tool", "name": "add", "content": "3"}, *talk("3", "assistant")]
    [sample] = sketcher._encoder.stream([sketcher._row(0, prompt, answer, None)])
    words = sketcher.proxy.tokenizer.decode(sample.input_ids[sample.labels >= 0])
    assert "yes?" not in words
    assert "3" in words
    assert bool(sketcher([prompt], [answer]).any())


def test_a_long_rollout_keeps_the_start_of_its_completion(proxy):
    short = RolloutSketcher(proxy, SPEC, max_tokens=16)
    prompt, answer = list(range(5, 45)), list(range(50, 90))
    cut = short.of_tokens([prompt, prompt, prompt[:3]], [answer, answer[:2], answer])
    whole = sketch_tokens(
        short.sketcher, [prompt[-4:], prompt[-14:], prompt[:3]], [answer[:12], answer[:2], answer[:13]]
    )
    torch.testing.assert_close(cut, whole)
    with pytest.raises(GvendiError, match="max_tokens is 500; wanted at least 4, and at most the 96 tokens"):
        RolloutSketcher(proxy, SPEC, max_tokens=500)


def test_an_empty_completion_adds_nothing(sketcher):
    z = sketcher(["a", "a", "a"], ["", "b", " \n"])
    assert z.any(dim=1).tolist() == [False, True, False]
    assert not sketcher.of_tokens([[5]], [[]]).any()
    assert not sketcher.of_tokens([[]], [[5]]).any()


def test_what_is_written_twice_is_sketched_once(sketcher, monkeypatch):
    seen = []
    plain = sketcher.sketcher.sketch
    monkeypatch.setattr(
        sketcher.sketcher, "sketch", lambda ids, *more: seen.append(len(ids)) or plain(ids, *more)
    )
    z = sketcher(["a", "a", "b", "a"], ["1 2", "3", "1 2", "1 2"])
    assert sum(seen) == 3
    assert torch.equal(z[0], z[3])
    assert not torch.equal(z[0], z[2])


def test_messages_need_a_chat_template(proxy):
    bare = copy.deepcopy(proxy.tokenizer)
    bare.chat_template = None
    one = RolloutSketcher(Proxy(proxy.model, bare, "bare", "", torch.float32, proxy.device, 0), SPEC)
    assert one(["2 + 2 ="], [" 4"]).any()
    with pytest.raises(GvendiError, match="proxy 'bare' has no chat template"):
        one([talk("hi", "user")], [talk("ho", "assistant")])


def test_called_as_trl_calls(sketcher):
    trainer = Trainer(4)
    reward = GroupDiversityReward(all_right, sketcher)
    prompts, answers = batch()
    got = trainer.call(reward, prompts, answers, answer=["6"] * 8)
    found = group_gains(sketcher(prompts, answers), boundaries=[0, 4, 8])
    assert got == pytest.approx(1 + 0.5 * found.novelty)
    # Two of four say the same.
    assert max(got[0], got[1]) < min(got[2], got[3])
    assert reward.__name__ == "group_diversity_reward"
    assert trainer.metrics["gvendi/group"] == pytest.approx(found.gvendi.mean())
    assert trainer.metrics["gvendi/novelty_correct"] == pytest.approx(found.novelty.mean())
    assert trainer.metrics["gvendi/left_out"] == 0
    assert trainer.columns["novelty"] == pytest.approx(found.novelty.tolist())


def test_two_groups_of_one_prompt_stay_two(sketcher):
    prompts, answers = batch([PROMPTS[0]] * 2)
    apart = Trainer(4).call(GroupDiversityReward(all_right, sketcher), prompts, answers)
    assert apart[:4] == pytest.approx(apart[4:], abs=1e-5)
    together = Trainer(8).call(GroupDiversityReward(all_right, sketcher), prompts, answers)
    # In one group each has a twin more.
    assert max(together) < max(apart)


def test_evaluation_has_groups_of_its_own_size(sketcher):
    trainer = Trainer(4, 2)
    trainer.model.training = False
    reward = GroupDiversityReward(all_right, sketcher)
    got = trainer.call(reward, *batch(answers=ANSWERS[:2]))
    # Twins alone differ in nothing.
    assert got == pytest.approx([1] * 4, abs=1e-4)
    with pytest.raises(
        GvendiError, match="rollouts 0 to 3 of this call should be the 4 of one prompt and are of 2"
    ):
        trainer.call(GroupDiversityReward(all_right, sketcher, group_size=4), *batch(answers=ANSWERS[:2]))


def test_correctness_by_a_column_by_a_coroutine_and_none(sketcher):
    prompts, answers = batch(PROMPTS[:1])

    async def judged(completions, **kwargs):
        await asyncio.sleep(0)
        return [None, 0.0, 1.0, 1.0]

    async def from_a_notebook():
        return Trainer(4).call(reward, prompts, answers)

    reward = GroupDiversityReward(judged, sketcher)
    got = Trainer(4).call(reward, prompts, answers)
    assert got[:2] == [None, 0]
    assert got[2] > 1
    assert asyncio.run(from_a_notebook()) == got
    column = GroupDiversityReward("right", sketcher)
    assert Trainer(4).call(column, prompts, answers, right=[None, 0.0, True, 1.0]) == got
    with pytest.raises(
        GvendiError, match=r"no such column \(it passes log_extra, log_metric, trainer_state\); name one"
    ):
        Trainer(4).call(column, prompts, answers)


def test_incomplete_groups_and_unknown_sizes_get_one_sentence(sketcher):
    prompts, answers = batch()
    reward = GroupDiversityReward(all_right, sketcher)
    wrong = {
        "the 6 rollouts of this call are no whole number of groups of 4": (prompts[:6], answers[:6]),
        "rollouts 0 to 3 of this call should be the 4 of one prompt and are of 2": (
            prompts[1:5],
            answers[1:5],
        ),
    }
    for message, given in wrong.items():
        with pytest.raises(GvendiError, match=message) as error:
            Trainer(4).call(reward, *given)
        assert "incomplete" in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(GvendiError, match="give group_size, the trainer's num_generations"):
        reward(prompts=prompts, completions=answers)
    assert len(GroupDiversityReward(all_right, sketcher, group_size=4)(prompts, answers)) == 8
    # An environment may write another observation behind each copy of a prompt.
    assert Trainer(4).call(reward, prompts[1:5], answers[1:5], environments=[None] * 4)


def test_wrong_settings_get_one_sentence(sketcher):
    with pytest.raises(GvendiError, match="correct is 3; wanted a reward function in TRL's signature"):
        GroupDiversityReward(3, sketcher)
    with pytest.raises(GvendiError, match="group_size is 1; wanted at least 2"):
        GroupDiversityReward(all_right, sketcher, group_size=1)
    with pytest.raises(GvendiError, match=r"weight is '0\.5', a str; wanted a number"):
        GroupDiversityReward(all_right, sketcher, weight="0.5")
    with pytest.raises(GvendiError, match="correct gives 1 values for 4 rollouts"):
        Trainer(4).call(GroupDiversityReward(lambda **k: [1], sketcher), *batch(PROMPTS[:1]))


META = torch.ones(2, device="meta")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"correct": 1.0}, "correct is 1.0; wanted numbers, booleans or None, one for each rollout"),
        ({"correct": "ab"}, "correct is 'ab'; wanted"),
        ({"correct": META}, "correct is on the meta device"),
        ({"correct": [[1.0], [1.0]]}, r"correct holds \[1.0\] for rollout 0; wanted numbers"),
        ({"correct": [1.0, np.str_("x")]}, r"correct holds np.str_\('x'\) for rollout 1; wanted numbers"),
        ({"correct": [np.ones(2)] * 2}, "correct holds array.* for rollout 0; wanted numbers"),
        ({"correct": [torch.ones(2)] * 2}, "correct holds tensor.* for rollout 0; wanted numbers"),
        ({"groups": None}, "groups is None; wanted one label for each rollout"),
        ({"groups": 0}, "groups is 0; wanted one label"),
        ({"groups": META}, "groups is on the meta device"),
        ({"groups": [[0], [0]]}, r"groups holds \[0\] for rollout 0; wanted a label that can be hashed"),
        ({"groups": [0]}, "groups has 1 labels for 2 rollouts"),
        ({"sketches": [[1.0], [2.0]]}, "sketches is a list; wanted Sketches, or a tensor"),
        ({"sketches": META[:, None]}, "on the meta device; wanted a dense tensor"),
        ({"group_size": "2"}, "group_size is '2'; wanted how many rollouts"),
        ({"weight": "0.5"}, "weight is '0.5', a str; wanted a number"),
        ({"ceiling": None}, "ceiling is None, a NoneType; wanted a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_other_kinds_are_refused_by_name(given, said):
    arguments = {"correct": [1.0, 1.0], "groups": [0, 0], "sketches": torch.eye(2)}
    with pytest.raises(GvendiError, match=said):
        group_diversity_rewards(**{**arguments, **given})


def test_numbers_of_every_kind_are_rewards():
    z = torch.eye(2)
    for one in (True, 1, np.float32(1), np.bool_(True), torch.tensor(1.0), torch.ones(1), np.ones(1)):
        assert group_diversity_rewards([one, one], ["g", "g"], z) == pytest.approx([1.5, 1.5])


def test_a_pickled_reward_gives_the_same(sketcher):
    reward = GroupDiversityReward(all_right, sketcher)
    again = pickle.loads(pickle.dumps(reward))
    assert Trainer(4).call(again, *batch()) == Trainer(4).call(reward, *batch())


def _rank(rank: int, path: str, reward, slices, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    trainer = Trainer(4)
    try:
        results.put((rank, trainer.call(reward, *slices[rank]), trainer.metrics))
        trainer.call(reward, *(side[:1] for side in slices[rank]))
    except GvendiError as error:
        results.put((rank, str(error), {}))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_groups_that_two_processes_share(sketcher, tmp_path, one_thread):
    reward = GroupDiversityReward(all_right, sketcher)
    prompts, answers = batch()
    alone = Trainer(4)
    wanted = alone.call(reward, prompts, answers)
    # Uneven slices, the first of which ends inside a group.
    slices = [(prompts[:3], answers[:3]), (prompts[3:], answers[3:])]
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    ranks = [
        fork.Process(target=_rank, args=(rank, tmp_path / "store", reward, slices, results))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = [results.get() for _ in range(4)]
    for process in ranks:
        process.join()
    given = {rank: (values, metrics) for rank, values, metrics in found if metrics}
    assert given[0][0] + given[1][0] == pytest.approx(wanted, abs=1e-5)
    assert given[0][1] == given[1][1] == pytest.approx(alone.metrics, abs=1e-4)
    refused = {values for _, values, metrics in found if not metrics}
    assert len(refused) == 1
    assert refused.pop().startswith("the 2 rollouts over 2 processes are no whole number of groups of 4")


def test_no_process_group_is_asked_where_calls_hold_whole_groups(sketcher, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    reward = GroupDiversityReward(all_right, sketcher, gather=False)
    assert len(Trainer(4).call(reward, *batch())) == 8


def test_random_numbers_and_autocast_of_the_trainer_are_left_alone(sketcher):
    reward = GroupDiversityReward(all_right, sketcher)
    state = torch.get_rng_state()
    plain = Trainer(4).call(reward, *batch())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert Trainer(4).call(reward, *batch()) == plain


def test_each_process_of_a_machine_takes_its_gpu(monkeypatch):
    from gvendi_fast.integrations.rollouts import _own_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _own_device("auto") == torch.device("cuda", 1)
    assert _own_device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert _own_device("auto") == "auto"
