"""GvendiCallback in transformers' Trainer: what it measures, where its figures go, and that training is unchanged."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from places import ROOT
from trainers import PLAIN, Reporter, Seen, rows, same, small_model, weights
from typer.testing import CliRunner

datasets = pytest.importorskip("datasets", reason="needs datasets, which the Trainer reads")
pytest.importorskip("accelerate", reason="needs accelerate, by which the Trainer runs")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from gvendi_fast import (  # noqa: E402
    DiversityMeter,
    GradientSketcher,
    GvendiCallback,
    GvendiError,
    SketchSpec,
    gvendi,
)
from gvendi_fast.cli import app  # noqa: E402
from gvendi_fast.data.run_directory import RunDirectory  # noqa: E402
from gvendi_fast.integrations.measuring import UnmeasuredWarning  # noqa: E402
from gvendi_fast.integrations.sources import SourceCollator, SourceNames  # noqa: E402

WINDOW = "diversity/gvendi/window"


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """A trainer has Python look for garbage before it begins, which takes longer than these trainings."""
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda *args: 0)


def data(**settings):
    return datasets.Dataset.from_list(rows(**settings))


def trainer_of(tmp_path, *callbacks, train=None, model=None, model_init=None, kind=Trainer, **settings):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), **{**PLAIN, **settings})
    train = data() if train is None else train
    model = (model or small_model()) if model_init is None else None
    return kind(
        model,
        args,
        train_dataset=train,
        eval_dataset=data(),
        model_init=model_init,
        callbacks=list(callbacks),
    )


def test_figures_reach_the_history_and_every_reporter_and_training_is_unchanged(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    dropout = {"attention_dropout": 0.1}
    plain = trainer_of(tmp_path, model=small_model(**dropout), **settings)
    plain.train()
    before, behind = Reporter(), Reporter()
    callback = GvendiCallback(every=2, dim=64)
    trainer = trainer_of(tmp_path, before, callback, behind, model=small_model(**dropout), **settings)
    trainer.train()
    assert same(weights(plain.model), weights(trainer.model))
    history = trainer.state.log_history
    measured = [log for log in history if WINDOW in log]
    assert [log["step"] for log in measured] == [2, 4]
    assert [log["diversity/samples/window"] for log in measured] == [4, 8]
    assert all("loss" in log for log in measured)
    assert not any(WINDOW in log for log in history if "eval_loss" in log)
    # Whatever their place in the list, and to the digit.
    for reporter in (before, behind):
        found = [log for log in reporter.logs if WINDOW in log]
        assert [log[WINDOW] for log in found] == [log[WINDOW] for log in measured]
    assert not trainer.model._forward_pre_hooks


def test_the_samples_are_those_of_the_step_at_its_own_weights(tmp_path):
    callback = GvendiCallback(every=2, dim=64, source="source")
    trainer = trainer_of(tmp_path, callback, gradient_accumulation_steps=2)
    seen = Seen(callback.meter, trainer.model)
    trainer.train()
    # Two measured steps of the four, of two batches each; the sketcher's own passes come first.
    assert len(seen.updates) == 2
    for (sketches, sources), step in zip(seen.updates, (1, 3), strict=True):
        batches = seen.batches[-8:][2 * step : 2 * step + 2]
        frozen = small_model()
        frozen.load_state_dict(seen.models[-8:][2 * step])
        ids = torch.cat([batch["input_ids"] for batch in batches])
        wanted = GradientSketcher(frozen, SketchSpec(dim=64))(ids, ids)
        cosine = torch.nn.functional.cosine_similarity(wanted, sketches.z, dim=1)
        assert cosine.min() > 1 - 1e-5
        assert sources == ["abc"[(number - 1) % 3] for number in ids[:, 0].tolist()]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


@pytest.mark.parametrize(
    "kind",
    [
        "torch, iterable",
        "kept columns",
        pytest.param("datasets, iterable", marks=pytest.mark.soak),
        pytest.param("torch", marks=pytest.mark.soak),
    ],
)
def test_sources_come_from_every_kind_of_data_set(kind, tmp_path):
    train = {
        "datasets, iterable": lambda: data().to_iterable_dataset(),
        "torch, iterable": Stream,
        "torch": rows,
        "kept columns": data,
    }[kind]()
    callback = GvendiCallback(every=1, dim=64, source="source")
    kept = {"remove_unused_columns": kind != "kept columns"}
    trainer = trainer_of(tmp_path, callback, train=train, max_steps=3, **kept)
    trainer.data_collator = _ids_alone
    trainer.train()
    last = [log for log in trainer.state.log_history if WINDOW in log][-1]
    found = {name: last[f"diversity/samples/source/{name}"] for name in "abc"}
    assert sum(found.values()) == 6
    if "iterable" in kind:
        assert found == {"a": 2, "b": 2, "c": 2}


def _ids_alone(batch):
    ids = torch.tensor([row["input_ids"] for row in batch])
    return {"input_ids": ids, "labels": ids}


def test_a_resumed_run_goes_on_with_meter_and_parts(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    path = tmp_path / "sketches"

    def begin(checkpoint=None):
        callback = GvendiCallback(every=1, dim=64, source="source", save_to=path)
        trainer = trainer_of(tmp_path, callback, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        log = next(log for log in trainer.state.log_history if log["step"] == 4)
        return callback, {name: value for name, value in log.items() if name.startswith("diversity/")}

    _, whole = begin()
    parts = {part.name: part.read_bytes() for part in (path / "parts").iterdir()}
    assert len(parts) == 4
    # As a kill after the checkpoint of step 2 would have it: the part of later steps is there and comes again.
    again, resumed = begin(str(tmp_path / "out" / "checkpoint-2"))
    assert resumed == whole
    assert {part.name: part.read_bytes() for part in (path / "parts").iterdir()} == parts
    run = RunDirectory.load(path)
    sketches = torch.cat([torch.tensor(part.sketches) for part in run.iterate()])
    assert len(sketches) == 8
    assert gvendi(sketches) == pytest.approx(again.meter.compute()["gvendi/window"], rel=1e-6)
    assert run.spec["training"] == {"by": "tap", "every": 1, "source": "source", "trainer": "Trainer"}
    # The command scores it, by source too.
    done = CliRunner().invoke(app.app, ["score", str(path), "--by", "source", "--json"])
    assert done.exit_code == 0, done.output
    assert f"{gvendi(sketches):.6g}"[:6] in done.output
    shutil.copytree(path, tmp_path / "other")
    compared = CliRunner().invoke(app.app, ["compare", str(path), str(tmp_path / "other")])
    assert "keeps no texts, and this needs them" in f"{compared.exception}"
    with pytest.raises(GvendiError, match=r"save_to is .* begins anew; give another folder"):
        begin()


def test_a_frozen_proxy_scores_the_same_batches(tmp_path):
    frozen = small_model(hidden_size=16)
    from gvendi_fast.sketching.proxy.load import Proxy

    proxy = Proxy(frozen, None, "small", "sha256:0", torch.float32, torch.device("cpu"), 1)
    callback = GvendiCallback(every=2, dim=64, proxy=proxy, source="source", save_to=tmp_path / "kept")
    trainer = trainer_of(tmp_path, callback, gradient_accumulation_steps=2)
    seen = Seen(callback.meter, trainer.model)
    trainer.train()
    sketches, sources = seen.updates[-1]
    ids = torch.cat([batch["input_ids"] for batch in seen.batches[-2:]])
    wanted = GradientSketcher(frozen, SketchSpec(dim=64))(ids, ids)
    assert torch.nn.functional.cosine_similarity(wanted, sketches.z, dim=1).min() > 1 - 1e-6
    assert sources == ["abc"[(number - 1) % 3] for number in ids[:, 0].tolist()]
    assert RunDirectory.load(tmp_path / "kept").spec["training"]["by"] == "proxy"


def test_added_later_attached_and_a_sketcher_and_meter_of_ones_own(tmp_path):
    trainer = trainer_of(tmp_path)
    meter = DiversityMeter(window=3)
    sketcher = GradientSketcher(trainer.model, SketchSpec(dim=128), layers="no-embedding")
    kept = tmp_path / "kept"
    callback = GvendiCallback(
        every=1, sketcher=sketcher, meter=meter, source="source", prefix="train-", save_to=kept
    )
    assert callback.attach_to(trainer) is callback
    trainer.train()
    last = trainer.state.log_history[-2]
    assert last["train-samples/window"] == 3
    assert meter.dim == 128
    # A second training of the same model goes on with the meter and in the folder.
    trainer.train()
    assert meter.compute()["samples/seen"] == 16
    assert sum(len(part.rows) for part in RunDirectory.load(kept).iterate(["row"])) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; wanted a number of steps"),
        ({"sources": ["a"]}, "sources names the values of a column, but source does not say of which"),
        ({"meter": DiversityMeter(), "window": 3}, "a meter has a window of its own"),
        ({"source": "s", "sources": ["a", "a"]}, "with one name twice"),
    ],
    ids=["every", "sources", "meter", "twice"],
)
def test_options_that_exclude_one_another(options, message):
    with pytest.raises(GvendiError, match=message):
        GvendiCallback(**options)


def test_wrong_use_is_one_sentence(tmp_path):
    other = GradientSketcher(small_model(), SketchSpec(dim=64))
    with pytest.raises(GvendiError, match="not the one that is trained"):
        trainer_of(tmp_path, GvendiCallback(sketcher=other)).train()
    with pytest.raises(GvendiError, match="source is 'topic', but a row of the data set has 'input_ids'"):
        trainer_of(tmp_path, GvendiCallback(source="topic")).train()
    with pytest.raises(GvendiError, match="the collator's batch is a list, without 'input_ids'"):
        SourceCollator(list, SourceNames("source"))(rows(2))
    closed = SourceCollator(_ids_alone, SourceNames("source", ["a"]))
    with pytest.raises(GvendiError, match="the source 'b', which is none of 'a'; give sources"):
        closed(rows(2))
    with pytest.raises(GvendiError, match="the names in column 'source' were numbered by another process"):
        SourceNames("source").name_of(SourceNames("source").number_of("a"))
    with pytest.raises(GvendiError, match="no Trainer calls this callback"):
        GvendiCallback().on_train_begin(None, None, None)
    with pytest.warns(UnmeasuredWarning, match="no step was measured: every is 9"):
        trainer_of(tmp_path, GvendiCallback(every=9, dim=64)).train()


def test_a_step_that_fails_leaves_the_model_as_it_was(tmp_path):
    class Stops(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    callback = GvendiCallback(every=1, dim=64, source="source")
    trainer = trainer_of(tmp_path, Stops(), callback)
    # Ahead of the callback, so that the tap is still there.
    trainer.callback_handler.callbacks.insert(0, trainer.callback_handler.callbacks.pop(2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.callback_handler.callbacks.pop(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmeasuredWarning)
        trainer.train()
    assert not trainer.model._forward_pre_hooks


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_receives_the_figures(tmp_path):
    folder = tmp_path / "board"
    trainer = trainer_of(
        tmp_path, GvendiCallback(every=1, dim=64), report_to=["tensorboard"], logging_dir=str(folder)
    )
    trainer.train()
    written = b"".join((folder / name).read_bytes() for name in os.listdir(folder))
    assert b"gvendi/window" in written


TWO_RANKS = """
import json, os, sys
from pathlib import Path
sys.path[:0] = ["tests/integrations", "tests"]
import test_trainer_callback as room
from trainers import PLAIN, Reporter, rows, same, small_model, weights
from transformers import Trainer, TrainingArguments

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])


def trained(*callbacks, checkpoint=None):
    settings = {**PLAIN, "save_strategy": "steps", "save_steps": 2, "output_dir": str(folder / "out")}
    trainer = Trainer(
        small_model(), TrainingArguments(**settings), train_dataset=room.data(), callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def callback():
    return room.GvendiCallback(every=2, dim=64, source="source", save_to=folder / "kept")


plain = trained()
measured = trained(callback())
again = trained(callback(), checkpoint=str(folder / "out" / "checkpoint-2"))
figures = [
    {name: value for name, value in trainer.state.log_history[3].items() if name.startswith("diversity/")}
    for trainer in (measured, again)
]
result = {"same": same(weights(plain.model), weights(measured.model)), "figures": figures}
(folder / f"rank-{rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.soak
def test_two_ranks_log_what_both_have_seen_and_go_on_from_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "two.py").write_text(TWO_RANKS)
    done = subprocess.run(
        [*command, str(tmp_path / "two.py"), str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["same"]
    whole, resumed = first["figures"]
    assert whole == resumed
    # Two measured steps of two rows on two ranks.
    assert whole["diversity/samples/window"] == 8
    kept = RunDirectory.load(tmp_path / "kept")
    z = torch.cat([torch.tensor(part.sketches) for part in kept.iterate()])
    assert len(z) == 8
    assert gvendi(z) == pytest.approx(whole["diversity/gvendi/window"], rel=1e-6)
    assert {i.split("-sample")[0] for part in kept.iterate(["id"]) for i in part.ids} == {
        f"step-{step}-rank-{rank}" for step in (2, 4) for rank in (0, 1)
    }
