"""Callbacks that share a model: two in one run, one after the other, and after a run that failed."""

from gc import collect

import pytest
import torch
from test_trainer_callback import WINDOW, data, trainer_of
from trainers import Seen, rows, small_model

pytest.importorskip("accelerate", reason="needs accelerate, by which the Trainer runs")

from transformers import Trainer, TrainerCallback

from gvendi_fast import (
    DiversityMeter,
    GradientSketcher,
    GvendiCallback,
    GvendiError,
    SketchSpec,
    pack_with_sources,
)
from gvendi_fast.integrations.sources import TAG, SourceCollator, SourceNames, names_in
from gvendi_fast.sketching.proxy.load import Proxy


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """A trainer has Python look for garbage before it begins, which takes longer than these trainings."""
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda *args: 0)


def of(**settings):
    return GvendiCallback(**{"every": 1, "dim": 64, **settings})


def frozen():
    return Proxy(
        small_model(hidden_size=16), None, "small", "sha256:0", torch.float32, torch.device("cpu"), 1
    )


def is_clean(model) -> bool:
    parts = list(model.modules())
    return not any(part._forward_pre_hooks or "forward" in part.__dict__ for part in parts)


class Interrupts(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.stop)

    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt


def interrupted(tmp_path, *callbacks, model):
    """A trainer whose run is interrupted behind a measured step's last backward pass, the tap at its place."""
    trainer = trainer_of(tmp_path, *callbacks, model=model)
    trainer.callback_handler.callbacks.insert(0, Interrupts("on_pre_optimizer_step"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def test_an_interrupted_run_leaves_the_model_for_a_new_trainer(tmp_path):
    model = small_model()
    trainer = interrupted(tmp_path, of(source="source"), model=model)
    assert is_clean(model)
    again = of(source="source")
    trainer_of(tmp_path, again, model=model).train()
    assert again.meter.compute()["samples/seen"] == 8
    assert is_clean(model)
    # The old trainer goes on, too.
    trainer.callback_handler.callbacks.pop(0)
    trainer.train()
    assert is_clean(model)


def test_what_a_run_left_nobody_watched_goes_with_the_next_or_with_its_callback(tmp_path):
    model = small_model()

    class Fails(Trainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            raise KeyboardInterrupt

    left = of()
    trainer = trainer_of(tmp_path, model=model, kind=Fails)
    # By add_callback the run is under way before the callback knows of it.
    trainer.add_callback(left)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not is_clean(model)
    again = of(source="source")
    trainer_of(tmp_path, again, model=model).train()
    assert is_clean(model)
    assert again.meter.compute()["samples/seen"] == 8
    left.diversity.open()
    assert not is_clean(model)
    del left, trainer
    collect()
    assert is_clean(model)


PAIRS = {
    "one column": ("source", "source"),
    "two columns": ("source", "kind"),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("first", ["tap", "proxy"])
def test_tap_and_proxy_side_by_side_tell_their_own_sources(case, first, tmp_path):
    columns = PAIRS[case]
    train = [{**row, "kind": "xyz"[row["input_ids"][0] % 2]} for row in rows()]
    tap = of(source=columns[0])
    proxy = of(every=2, source=columns[1], proxy=frozen(), prefix="proxy/")
    together = [tap, proxy] if first == "tap" else [proxy, tap]
    trainer = trainer_of(tmp_path, *together, train=train)
    seen = [Seen(tap.meter, trainer.model), Seen(proxy.meter)]
    trainer.train()
    batches = [batch["input_ids"][:, 0].tolist() for batch in seen[0].batches[-4:]]
    by = {"source": lambda n: "abc"[(n - 1) % 3], "kind": lambda n: "xyz"[n % 2]}
    for of_one, column, steps in zip(seen, columns, ([0, 1, 2, 3], [1, 3]), strict=True):
        wanted = [[by[column](number) for number in batches[step]] for step in steps]
        assert [sources for _, sources in of_one.updates] == wanted
    log = trainer.state.log_history[3]
    assert log["diversity/samples/window"] == 8
    assert log["proxy/samples/window"] == 4
    # That of `Seen`.
    assert len(trainer.model._forward_pre_hooks) == 1


def test_two_taps_that_meet_and_one_prefix_twice_are_refused(tmp_path):
    with pytest.raises(
        GvendiError, match=r"two callbacks tap the model, .* and both step 4; a step has one tap"
    ):
        trainer_of(tmp_path, of(every=2), of(every=4, prefix="b/")).train()
    with pytest.raises(GvendiError, match="another GvendiCallback with the prefix 'diversity/'"):
        trainer_of(tmp_path, of(), of(proxy=frozen()))
    # They never meet in four steps.
    two = of(every=2, source="source"), of(every=3, source="source", prefix="b/")
    trainer_of(tmp_path, *two).train()
    assert [callback.meter.compute()["samples/seen"] for callback in two] == [4, 2]


def test_another_trainer_or_model_begins_a_new_meter(tmp_path):
    callback = of()
    trainer_of(tmp_path, callback).train()
    trainer = trainer_of(tmp_path, callback, model_init=lambda: small_model())
    assert trainer.model is not None
    for _ in range(2):
        trainer.train()
        assert callback.meter.compute()["samples/seen"] == 8


def test_figures_join_the_logs_of_training_alone(tmp_path):
    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.trainer.evaluate(metric_key_prefix="test")

    class Logs(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                self.log({"custom": 1.0})
            return super().compute_loss(model, inputs, *args, **kwargs)

    asks = Evaluates()
    trainer = trainer_of(tmp_path, of(), asks, kind=Logs, logging_steps=3)
    asks.trainer = trainer
    trainer.train()
    found = [log for log in trainer.state.log_history if WINDOW in log]
    assert ["loss" in log for log in found] == [True, False]
    # What was measured behind the last log is in the summary.
    assert "train_runtime" in found[1]
    assert [log["diversity/samples/window"] for log in found] == [6, 8]
    assert any("test_loss" in log for log in trainer.state.log_history)


def test_logs_by_epoch_get_figures(tmp_path):
    trainer = trainer_of(
        tmp_path, of(every=2), train=rows(4), logging_strategy="epoch", max_steps=-1, num_train_epochs=2
    )
    trainer.train()
    found = [log for log in trainer.state.log_history if WINDOW in log]
    assert [(log["step"], log["diversity/samples/window"]) for log in found] == [(2, 2), (4, 4)]


def test_wrong_sources_are_named_with_the_remedy(tmp_path):
    class Names(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

    with pytest.raises(GvendiError, match=r"called without the sources .* model\(\*\*inputs\)"):
        trainer_of(tmp_path, of(source="source"), kind=Names).train()
    late = trainer_of(tmp_path)
    late.add_callback(of(source="source"))
    with pytest.raises(GvendiError, match=r"came to the trainer by add_callback.*attach_to\(trainer\)"):
        late.train()
    with pytest.raises(GvendiError, match=r"source is 'sorce', but a row .* 'labels', 'source'"):
        trainer_of(tmp_path, of(source="sorce")).train()
    holes = data().map(lambda row: {"source": None if row["source"] == "b" else row["source"]})
    with pytest.raises(GvendiError, match="column 'source' has rows without a source"):
        trainer_of(tmp_path, of(source="source"), train=holes).train()


def test_widths_are_checked_when_the_callback_is_made():
    for options, message in (
        ({"dim": 0}, "dim must be a power of two"),
        ({"window": 0}, "window is 0; wanted"),
        ({"dim": 64, "meter": DiversityMeter(dim=128)}, "the meter is of sketches of 128 numbers, .* dim 64"),
    ):
        with pytest.raises(GvendiError, match=message):
            GvendiCallback(**options)
    assert GvendiCallback(meter=DiversityMeter(dim=128)).diversity._dim == 128
    sketcher = GradientSketcher(small_model(), SketchSpec(dim=64))
    with pytest.raises(GvendiError, match="the meter is of sketches of 128"):
        GvendiCallback(sketcher=sketcher, meter=DiversityMeter(dim=128))


def test_an_iterable_data_set_is_packed_with_the_names_of_its_sources():
    pytest.importorskip("trl", reason="needs trl, whose packing this is")
    packed = pack_with_sources(data().to_iterable_dataset(), 32, sources=["a", "b", "c"])
    row = next(iter(packed))
    numbers = [(first - 1) % 3 for first in row["input_ids"][::10]]
    assert row["source"] == [number for number in numbers for _ in range(10)]
    assert names_in(packed, "source") == ["a", "b", "c"]


def by_length(found):
    """A collator that sorts its rows, as some do before they pad, to the right."""
    found = sorted(found, key=lambda row: len(row["input_ids"]))
    most = len(found[-1]["input_ids"])
    ids = [row["input_ids"] + [0] * (most - len(row["input_ids"])) for row in found]
    mask = [[1] * len(row["input_ids"]) + [0] * (most - len(row["input_ids"])) for row in found]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_rows_in_another_order_keep_their_sources():
    found = [
        {**row, "input_ids": row["input_ids"][:length]}
        for row, length in zip(rows(6), (9, 4, 7, 4, 10, 2), strict=True)
    ]
    # One text begins another.
    found[5]["input_ids"] = found[4]["input_ids"][:2]
    names = SourceNames("source", ["a", "b", "c"])
    wanted = sorted(range(6), key=lambda n: len(found[n]["input_ids"]))
    for shape in (lambda batch: batch, lambda batch: {"input_ids": batch["input_ids"]}):
        batch = SourceCollator(lambda rows, shape=shape: shape(by_length(rows)), names)(found)
        assert batch[TAG].tolist() == [n % 3 for n in wanted]

    two = [found[4], found[5]]
    assert SourceCollator(by_length, names)(two)[TAG].tolist() == [2, 1]

    def changes(rows):
        batch = by_length(rows)
        batch["input_ids"][3] = 60
        return batch

    with pytest.raises(GvendiError, match="rows in another order than they came"):
        SourceCollator(changes, names)(found)
    # Tokens of another kind say nothing of an order.
    in_order = SourceCollator(lambda rows: {"input_ids": torch.zeros(len(rows), 4, dtype=torch.int64)}, names)
    assert in_order(found)[TAG].tolist() == [0, 1, 2, 0, 1, 2]

    def flat(rows):
        return {"input_ids": torch.tensor([[token for row in rows[::-1] for token in row["input_ids"]]])}

    with pytest.raises(GvendiError, match="rows in another order than they came"):
        SourceCollator(flat, names)(found)
    pairs = [
        {"prompt_ids": [n], "chosen_ids": [7], "rejected_ids": [8], "source": "abc"[n]} for n in range(3)
    ]

    def one_after_the_other(rows):
        both = [[*row["prompt_ids"], *row[k]] for row in rows for k in ("chosen_ids", "rejected_ids")]
        return {"input_ids": torch.tensor(both)}

    assert SourceCollator(one_after_the_other, names)(pairs)[TAG].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_collator_gets_the_column_where_the_trainer_leaves_it(tmp_path):
    seen = []

    def collate(found):
        seen.append({key for row in found for key in row})
        ids = torch.tensor([row["input_ids"] for row in found])
        return {"input_ids": ids, "labels": ids}

    both = [of(source="source"), of(source="source", proxy=frozen(), prefix="proxy/")]
    for removes in (True, False):
        trainer = trainer_of(tmp_path, *both, remove_unused_columns=removes, max_steps=1)
        trainer.data_collator = collate
        trainer.train()
        assert seen.pop() == {"input_ids", "labels"} | (set() if removes else {"source"})
        seen.clear()


def test_sources_without_names_are_asked_for_at_once():
    pytest.importorskip("trl", reason="needs trl, whose packing this is")
    with pytest.raises(GvendiError, match=r"sources of text, such as 'a', .* give sources="):
        pack_with_sources(data().to_iterable_dataset(), 32)
    with pytest.raises(GvendiError, match="sources is empty"):
        of(source="source", sources=[])
