"""GvendiLightningCallback: the steps of Lightning's loops, loggers and checkpoints; training is unchanged."""

import importlib
import importlib.util

import pytest
import torch
from trainers import rows, same, small_model, weights

NAMES = ("lightning.pytorch", "pytorch_lightning")
pytest.importorskip("lightning", reason="needs lightning, whose callback this is")

from gvendi_fast import GvendiError, GvendiLightningCallback  # noqa: E402
from gvendi_fast.integrations.lightning import find_causal_lm  # noqa: E402

WINDOW = "diversity/gvendi/window"


def parts_of(name: str):
    """(LightningModule around a causal LM, Trainer, Logger) of one of Lightning's names."""
    pl = importlib.import_module(name)

    class Module(pl.LightningModule):
        def __init__(self, manual=False):
            super().__init__()
            self.model = small_model(attention_dropout=0.1)
            self.automatic_optimization = not manual

        def _loss(self, batch):
            return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

        def training_step(self, batch, index):
            loss = self._loss(batch)
            if self.automatic_optimization:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def validation_step(self, batch, index):
            self.log("val", self._loss(batch), batch_size=2)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    class Kept(importlib.import_module(f"{name}.loggers").Logger):
        name = version = "kept"

        def __init__(self):
            super().__init__()
            self.logs = []

        def log_hyperparams(self, *args, **kwargs):
            return None

        def log_metrics(self, metrics, step=None):
            self.logs.append((step, metrics))

    return Module, pl.Trainer, Kept


def loader(count: int = 24):
    found = [{"input_ids": torch.tensor(row["input_ids"]), "source": row["source"]} for row in rows(count)]
    return torch.utils.data.DataLoader(found, batch_size=2)


def fit(folder, *callbacks, name=NAMES[0], manual=False, checkpoint=None, validates=False, **settings):
    make, trainer_of, logger_of = parts_of(name)
    torch.manual_seed(5)
    module, logger = make(manual), logger_of()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    usual = {"logger": logger, "log_every_n_steps": 2, "default_root_dir": str(folder)}
    if settings.get("barebones"):
        usual = {}
    trainer = trainer_of(
        accelerator="cpu", callbacks=list(callbacks), **{"max_steps": 4, **quiet, **usual, **settings}
    )
    trainer.fit(module, loader(), loader(2) if validates else None, ckpt_path=checkpoint)
    return trainer, module, logger.logs


CASES = {
    "accumulated": {"accumulate_grad_batches": 2},
    "manual": {"manual": True},
    "validation between": {"validates": True, "val_check_interval": 1},
    "autocast": {"precision": "bf16-mixed"},
    "barebones": {"barebones": True},
    "the other name": {"name": NAMES[1]},
}
OFTEN = ("accumulated", "manual")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in OFTEN else pytest.mark.soak) for case in CASES]
)
def test_figures_are_logged_and_training_is_unchanged(case, tmp_path):
    if importlib.util.find_spec(CASES[case].get("name", NAMES[0]).partition(".")[0]) is None:
        pytest.skip("needs pytorch_lightning, Lightning's other name")
    _, plain, _ = fit(tmp_path, **CASES[case])
    callback = GvendiLightningCallback(every=2, dim=64, source="source")
    _, module, logs = fit(tmp_path, callback, **CASES[case])
    assert same(weights(plain), weights(module))
    batches = 2 if case == "accumulated" else 1
    measured = [(step, log) for step, log in logs if WINDOW in log]
    if case == "barebones":
        assert not logs
    else:
        assert [log["diversity/samples/window"] for _, log in measured] == [2 * batches, 4 * batches]
        assert measured[-1][1][WINDOW] == pytest.approx(callback.figures[WINDOW], rel=1e-6)
    # The second and the fourth step's rows, by their order.
    numbers = [2, 3, 6, 7] if batches == 1 else [4, 5, 6, 7, 12, 13, 14, 15]
    found = {name: callback.figures[f"diversity/samples/source/{name}"] for name in "abc"}
    assert found == {name: sum("abc"[n % 3] == name for n in numbers) for name in "abc"}
    assert not module.model._forward_pre_hooks


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_with_meter_and_parts(tmp_path):
    def go_on(checkpoint=None, steps=4):
        callback = GvendiLightningCallback(every=1, dim=64, save_to=tmp_path / "kept")
        # Every step sees other rows, whatever the loader begins with.
        trainer, *_ = fit(tmp_path, callback, checkpoint=checkpoint, max_steps=steps)
        return trainer, callback

    trainer, _ = go_on(steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, first = go_on(tmp_path / "two.ckpt")
    parts = {part.name: part.read_bytes() for part in (tmp_path / "kept" / "parts").iterdir()}
    # Again from there, as a kill behind the checkpoint would have it.
    _, second = go_on(tmp_path / "two.ckpt")
    assert first.figures["diversity/samples/seen"] == 8
    assert second.figures == first.figures
    assert {part.name: part.read_bytes() for part in (tmp_path / "kept" / "parts").iterdir()} == parts
    with pytest.raises(GvendiError, match=r"save_to is .* begins anew"):
        go_on()


@pytest.mark.filterwarnings("ignore")
def test_the_causal_lm_is_found_or_named_and_sources_are_asked_for(tmp_path):
    make, *_ = parts_of(NAMES[0])
    module = make()
    assert find_causal_lm(module) is module.model
    module.reference = small_model()
    assert find_causal_lm(module) is module.model
    assert find_causal_lm(module, "reference") is module.reference
    module.student, module.model = module.model, torch.nn.Identity()
    with pytest.raises(GvendiError, match=r"several causal LMs \(reference, student\); give module"):
        find_causal_lm(module)
    with pytest.raises(GvendiError, match="module is 'teacher'"):
        find_causal_lm(module, "teacher")
    with pytest.raises(GvendiError, match="has no causal LM of transformers"):
        find_causal_lm(torch.nn.Linear(2, 2))
    with pytest.raises(GvendiError, match="source is 'topic', but the batch has 'input_ids', 'source'"):
        fit(tmp_path, GvendiLightningCallback(every=1, dim=64, source="topic"))


@pytest.mark.filterwarnings("ignore")
def test_tap_and_proxy_side_by_side_and_sources_in_every_batch(tmp_path):
    from gvendi_fast.sketching.proxy.load import Proxy

    class Whole(parts_of(NAMES[0])[0]):
        """Gives the model whatever the batch has."""

        def _loss(self, batch):
            return self.model(**batch, labels=batch["input_ids"]).loss

    frozen = Proxy(
        small_model(hidden_size=16), None, "small", "sha256:0", torch.float32, torch.device("cpu"), 1
    )
    tap = GvendiLightningCallback(every=2, dim=64, source="source")
    proxy = GvendiLightningCallback(every=2, dim=64, source="source", proxy=frozen, prefix="proxy/")
    _, trainer_of, _ = parts_of(NAMES[0])
    trainer = trainer_of(
        accelerator="cpu", callbacks=[tap, proxy], max_steps=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1, log_every_n_steps=2,
    )  # fmt: skip
    module = Whole()
    trainer.fit(module, loader(), loader(2))
    wanted = {name: sum("abc"[n % 3] == name for n in (2, 3, 6, 7)) for name in "abc"}
    for callback in (tap, proxy):
        prefix = callback.diversity.prefix
        assert {n: callback.figures[f"{prefix}samples/source/{n}"] for n in "abc"} == wanted
    trainer.validate(module, loader(2))
    assert not module.model._forward_pre_hooks
    # Another trainer's steps are counted from one, into an empty meter.
    fit(tmp_path, tap, max_steps=3)
    assert tap.meter.compute()["samples/seen"] == 2
    assert {tap.state_key, proxy.state_key} == {
        "GvendiLightningCallback",
        "GvendiLightningCallback[proxy/]",
    }
