"""GvendiCallback in TRL's trainers: packing, preference pairs, adapters, and the loss that stands in the head's place."""

import copy

import pytest
import torch
from trainers import Seen, same, weights

trl = pytest.importorskip("trl", reason="needs trl, whose trainers these are")
datasets = pytest.importorskip("datasets", reason="needs datasets, which trl's trainers read")

from gvendi_fast import (  # noqa: E402
    GradientSketcher,
    GvendiCallback,
    GvendiError,
    SketchSpec,
    load_proxy,
    pack_with_sources,
)

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 3,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "bf16": False,
}
PACKED = {"packing": True, "max_length": 32, "dataset_kwargs": {"skip_prepare_dataset": True}}


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """A trainer has Python look for garbage before it begins, which takes longer than these trainings."""
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda *args: 0)


@pytest.fixture(scope="module")
def tiny():
    return load_proxy("tiny", device="cpu", dtype="float32")


def tokens(tiny, count: int = 18) -> datasets.Dataset:
    """Rows whose length says their source: an odd number of tokens is of "odd"."""
    found = []
    for number in range(count):
        ids = tiny.tokenizer(f"The square of {number} is {number**2}." + " Yes!" * (number % 4))["input_ids"]
        found.append({"input_ids": ids, "labels": ids, "source": "odd" if len(ids) % 2 else "even"})
    return datasets.Dataset.from_list(found)


def sft(tiny, folder, train, *callbacks, **settings):
    args = trl.SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    model = copy.deepcopy(tiny.model)
    return trl.SFTTrainer(
        model, args, train_dataset=train, processing_class=tiny.tokenizer, callbacks=list(callbacks)
    )


def own_sketches(tiny, seen: Seen, step: int, labels_of) -> tuple[torch.Tensor, list[int]]:
    """The sketches of the samples of a step by a pass of its own each, and their lengths."""
    model = copy.deepcopy(tiny.model)
    model.load_state_dict(seen.models[step])
    sketcher, batch = GradientSketcher(model, SketchSpec(dim=128)), seen.batches[step]
    ids, labels = batch["input_ids"], labels_of(batch)
    places = [(row, 0, int(mask.sum())) for row, mask in enumerate(batch.get("attention_mask", ()))]
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        places = [(0, a, b) for a, b in zip(starts, [*starts[1:], ids.shape[1]], strict=True)]
    z = [sketcher(ids[r : r + 1, a:b], labels[r : r + 1, a:b]) for r, a, b in places]
    return torch.cat(z), [b - a for _, a, b in places]


STRATEGIES = [
    "bfd",
    pytest.param("bfd_split", marks=pytest.mark.soak),
    pytest.param("wrapped", marks=pytest.mark.soak),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_samples_keep_their_sources_and_their_own_gradients(strategy, tiny, tmp_path):
    packed = pack_with_sources(tokens(tiny), 32, strategy=strategy)
    callback = GvendiCallback(every=1, dim=128, source="source")
    trainer = sft(tiny, tmp_path, packed, callback, packing_strategy=strategy, **PACKED)
    seen = Seen(callback.meter, trainer.model)
    trainer.train()
    for step, (sketches, sources) in enumerate(seen.updates):
        wanted, lengths = own_sketches(tiny, seen, step - len(seen.updates), lambda batch: batch["labels"])
        cosine = torch.nn.functional.cosine_similarity(wanted, sketches.z, dim=1)
        assert cosine.min() > 1 - 1e-5
        if strategy == "bfd":
            # More samples than rows.
            assert len(lengths) > 3
            assert sources == ["odd" if length % 2 else "even" for length in lengths]


@pytest.mark.soak
@pytest.mark.parametrize("case", ["adapters", "padding-free", "as SFTConfig has it", "label smoothing"])
def test_training_by_sft_is_unchanged(case, tiny, tmp_path):
    settings = {
        "adapters": {},
        "padding-free": {"padding_free": True, "max_length": None},
        "as SFTConfig has it": {"bf16": True},
        "label smoothing": {"label_smoothing_factor": 0.1},
    }[case]
    ended = []
    for callbacks in ([], [GvendiCallback(every=1, dim=128, source="source")]):
        args = trl.SFTConfig(output_dir=str(tmp_path), **{**SETTINGS, **settings})
        trainer = trl.SFTTrainer(
            copy.deepcopy(tiny.model), args, train_dataset=tokens(tiny), processing_class=tiny.tokenizer,
            callbacks=callbacks, peft_config=lora() if case == "adapters" else None,
        )  # fmt: skip
        trainer.train()
        ended.append(weights(trainer.model))
    assert same(*ended)
    figures = trainer.state.log_history[1]
    assert figures["diversity/samples/window"] == 6
    assert figures["diversity/samples/zero"] == 0
    assert 1 < figures["diversity/gvendi/window"] <= 6


def lora():
    peft = pytest.importorskip("peft", reason="needs peft, whose adapters these are")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def pairs(count: int = 12) -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {"prompt": f"Is {n} even?", "chosen": " Yes.", "rejected": f" No, {n}.", "source": f"{n % 2}"}
            for n in range(count)
        ]
    )


@pytest.mark.soak
@pytest.mark.parametrize("case", ["separate", "precomputed", "adapters"])
def test_each_answer_of_a_preference_pair_is_a_sample(case, tiny, tmp_path):
    def trainer_of(*callbacks):
        model, reference = copy.deepcopy(tiny.model), copy.deepcopy(tiny.model)
        args = trl.DPOConfig(
            output_dir=str(tmp_path), precompute_ref_log_probs=case == "precomputed", **SETTINGS
        )
        return trl.DPOTrainer(
            model, None if case == "adapters" else reference, args, train_dataset=pairs(),
            processing_class=tiny.tokenizer, callbacks=list(callbacks),
            peft_config=lora() if case == "adapters" else None,
        )  # fmt: skip

    callback = GvendiCallback(every=1, dim=128, source="source")
    trainer = trainer_of(callback)
    seen = Seen(callback.meter, None if case == "adapters" else trainer.model)
    trainer.train()
    if case != "separate":
        plain = trainer_of()
        plain.train()
        assert same(weights(plain.model), weights(trainer.model))
    for step, (sketches, sources) in enumerate(seen.updates):
        assert len(sketches.z) == 6
        assert sources[:3] == sources[3:]
        if case == "adapters":
            continue
        # The loss's gradient by an answer is a number times that of its log-probability: less for a chosen one.
        wanted, _ = own_sketches(tiny, seen, step - len(seen.updates), lambda batch: batch["labels"])
        cosine = torch.nn.functional.cosine_similarity(wanted, sketches.z, dim=1)
        assert cosine[:3].min() > 1 - 1e-5
        assert cosine[3:].max() < -1 + 1e-5


def test_packing_that_drops_sources_is_an_error_with_the_remedy(tiny, tmp_path):
    trainer = sft(tiny, tmp_path, tokens(tiny), GvendiCallback(source="source"), packing=True, max_length=32)
    with pytest.raises(GvendiError, match=r"SFTTrainer drops all other columns .* pack_with_sources"):
        trainer.train()
    with pytest.raises(GvendiError, match="dataset has no column 'input_ids' .* tokenise it first"):
        pack_with_sources(pairs(), 32)
