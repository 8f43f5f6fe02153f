"""GainSampler: the choice against plain determinants, epochs, ranks, resuming, and where sketches come from."""

import copy
import functools
import math
import operator
import pickle

import numpy as np
import pytest
import torch
from small_models import SPEC, build, pad, samples
from torch.utils.data import DataLoader

from gvendi_fast.base.draws import order, stream
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.integrations.candidates import ProxySketches
from gvendi_fast.integrations.sampler import MOST_WINDOW, GainSampler
from gvendi_fast.selection import select
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.vendi.state import VendiState

N, K, B = 90, 16, 6


def rows(n: int = N, seed: int = 0) -> torch.Tensor:
    """Unlike rows, the second third copies of one row."""
    z = torch.randn(n, K, generator=torch.Generator().manual_seed(seed))
    z[n // 3 : 2 * n // 3] = z[n // 3]
    return z


def line(seed: int, epoch: int = 0, n: int = N) -> list[int]:
    return order(stream("gain sampler", seed, epoch), n).tolist()


def by_determinants(z: torch.Tensor, seed: int, m: int, window: int, eps: float) -> list[list[int]]:
    """The batches as the definition says: a gain is a difference of two log-determinants of the rows as they are."""
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    waiting, lately, batches = line(seed), [], []

    def volume(chosen: list[int]) -> float:
        return float(torch.logdet(torch.eye(K) + unit[chosen].T @ unit[chosen] / eps))

    while waiting:
        looked, waiting = waiting[: m * B], waiting[m * B :]
        batch: list[int] = []
        while looked and len(batch) < B:
            before = volume(lately + batch)
            gains = [volume([*lately, *batch, i]) - before for i in looked]
            batch.append(looked.pop(next(k for k, g in enumerate(gains) if g >= max(gains) - 1e-5)))
        waiting += looked
        lately = (lately + batch)[-window:] if window else []
        batches.append(batch)
    return batches


@pytest.mark.parametrize("window", [0, 10, 1024])
def test_choice_is_greedy_by_log_determinants(window):
    z = rows()
    assert list(GainSampler(z, B, m=3, window=window, seed=4)) == by_determinants(z, 4, 3, window, 0.1)


def test_vendi_picks_what_select_picks_beside_the_window():
    z, seen, waiting = rows(), [], line(2)
    for batch in list(GainSampler(z, B, m=3, objective="vendi", seed=2))[:6]:
        looked, waiting = waiting[: 3 * B], waiting[3 * B :]
        given = VendiState(K).update(z[seen])
        assert batch == [looked[i] for i in select(z[looked], B, must_include=given, draws=1).rows]
        waiting += [i for i in looked if i not in batch]
        seen += batch


def test_m_1_is_random_sampling_and_reads_no_sketch():
    def never(numbers):
        raise AssertionError(numbers)

    batches = list(GainSampler(never, B, m=1, rows=N, seed=9))
    assert batches == [line(9)[i : i + B] for i in range(0, N, B)]
    bad = rows()
    bad[3] = math.nan
    assert list(GainSampler(bad, B, m=1, seed=9)) == batches


def test_an_epoch_is_a_permutation_and_copies_come_last():
    sampler = GainSampler(rows(), B, m=3)
    batches = list(sampler)
    assert [len(b) for b in batches] == [B] * (N // B)
    assert len(sampler) == len(batches)
    assert sorted(functools.reduce(operator.iadd, batches, [])) == list(range(N))
    copies = [sum(N // 3 <= i < 2 * N // 3 for i in batch) for batch in batches]
    assert sum(copies[: N // (3 * B)]) <= 2
    assert copies[-4:] == [B] * 4
    # The next epoch is another one by itself, and is known by its number alone.
    again = list(sampler)
    assert sampler.epoch == 2
    assert again != batches
    other = GainSampler(rows(), B, m=3)
    other.set_epoch(1)
    assert list(other) == again


def test_steps_are_a_budget_in_which_every_row_is_looked_at_once():
    sampler = GainSampler(rows(), B, m=3, steps=N // (3 * B))
    seen: list[int] = []
    take = sampler.candidates.take
    sampler.candidates.take = lambda numbers: (seen.extend(numbers.tolist()), take(numbers))[1]
    assert len(list(sampler)) == len(sampler) == N // (3 * B)
    assert sorted(seen) == list(range(N))


@pytest.mark.parametrize("m", [2, 100])
def test_rows_without_a_direction_are_replaced_and_come_last(m):
    z = rows()
    z[5], z[6], z[7] = 0, math.inf, math.nan
    flat = functools.reduce(operator.iadd, GainSampler(z, B, m=m), [])
    assert sorted(flat) == list(range(N))
    assert set(flat[-3:]) == {5, 6, 7}
    assert sorted(functools.reduce(operator.iadd, GainSampler(torch.zeros(7, K), 2), [])) == list(range(7))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [89, 92, 95])
def test_ranks_share_one_choice(count, drop_last):
    z = rows(count)
    whole = list(GainSampler(z, 2 * 3, m=2, drop_last=drop_last))
    ranks = [list(GainSampler(z, 2, m=2, rank=r, world=3, drop_last=drop_last)) for r in range(3)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert len({len(part) for part in parts}) == 1
        together = [parts[i % 3][i // 3] for i in range(3 * len(parts[0]))]
        assert together[: len(batch)] == batch
        assert together[len(batch) :] == batch[: len(together) - len(batch)]
    assert (sum(map(len, whole)) == count - count % 6) if drop_last else (sum(map(len, whole)) == count)


@pytest.mark.parametrize("at", [0, 1, 7, N // B])
def test_resuming_goes_on_to_the_bit(at):
    z = rows()
    z[5] = 0
    sampler = GainSampler(z, B, m=3, window=20, seed=1)
    sampler.set_epoch(3)
    epoch = iter(sampler)
    for _ in range(at):
        next(epoch)
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    rest = list(epoch)
    other = GainSampler(z, B, m=3, window=20, seed=1)
    other.load_state_dict(state)
    assert other.epoch == 3
    assert other.state_dict()["step"] == at
    resumed = iter(other)
    moment = copy.deepcopy(resumed._moment)
    assert list(resumed) == rest
    assert list(other) == list(sampler)
    # Rows have come to the sum and left it; the other one was added up from those of the window alone.
    checked = GainSampler(z, B, m=3, window=20, seed=1)
    checked.set_epoch(3)
    begun = iter(checked)
    for _ in range(at):
        next(begun)
    assert (begun._moment is None and moment is None) or torch.equal(begun._moment, moment)
    # accelerate sets the epoch it is in, which changes nothing; another one begins anew.
    other.load_state_dict(state)
    other.set_epoch(3)
    assert list(other) == rest
    other.load_state_dict(state)
    other.set_epoch(4)
    assert sorted(functools.reduce(operator.iadd, other, [])) == list(range(N))


def test_a_state_of_other_settings_is_refused():
    state = GainSampler(rows(), B, seed=1).state_dict()
    with pytest.raises(GvendiError, match=r"taken with seed = 1, and this sampler has 2"):
        GainSampler(rows(), B, seed=2).load_state_dict(state)
    with pytest.raises(GvendiError, match=r"batch_size x world = 6, and this sampler has 3"):
        GainSampler(rows(), 3, seed=1).load_state_dict(state)
    with pytest.raises(GvendiError, match=r"state is not one of a GainSampler"):
        GainSampler(rows(), B).load_state_dict({"epoch": 0})
    # As many ranks as it was, or others with the same rows a batch.
    GainSampler(rows(), 2, seed=1, rank=2, world=3).load_state_dict(state)


def test_every_form_of_sketches_gives_one_choice(tmp_path):
    z = rows()
    z[11] = 0
    np.save(tmp_path / "z.npy", z.numpy())
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    forms = [z, z.numpy()[::-1][::-1], mapped, z.double(), (3 * z).requires_grad_()]
    wanted = list(GainSampler(z, B, m=3))
    for form in forms:
        assert list(GainSampler(form, B, m=3)) == wanted
    # A run directory has no sketch of a row that it rejected.
    run = RunDirectory.open(tmp_path / "run", {"sketch": {"dim": K}, "format": 2})
    for unit in range(2):
        there = np.array([i for i in range(45 * unit, 45 * unit + 45) if i != 11])
        ones = {name: np.ones(len(there)) for name in ("tokens", "length", "loss", "gradient_norm")}
        ids = [f"r{i}" for i in there]
        run.write_part(Part(unit, ids, [""] * len(ids), there, z[there].numpy(), **ones))
    run.finish()
    assert list(GainSampler(str(tmp_path / "run"), B, m=3, rows=N)) == wanted
    assert list(GainSampler(lambda i: z[i], B, m=3, rows=N)) == wanted
    assert list(GainSampler(z, B, m=3, dim=8)) == list(GainSampler(z[:, :8], B, m=3)) != wanted
    with pytest.raises(GvendiError, match=r"does not hold the rows that it rejected; give rows=len\(data\)"):
        GainSampler(tmp_path / "run", B)
    with pytest.raises(GvendiError, match=r"rows is 80, but the run directory has a sketch of row 89"):
        GainSampler(tmp_path / "run", B, rows=80)
    run.spec["training"] = {"by": "tap"}
    with pytest.raises(GvendiError, match=r"has the sketches of a training run: .* sketch the data set"):
        GainSampler(run, B, rows=N)
    with pytest.raises(GvendiError, match="sketches has no rows; give one sketch for each row"):
        GainSampler(z[:0], B)
    # Nor does torch's default dtype change a choice.
    torch.set_default_dtype(torch.float64)
    try:
        assert list(GainSampler(z, B, m=3)) == wanted
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("keep", [False, True])
def test_a_proxy_sketches_candidates_when_they_come(keep):
    data = samples()
    data.append((data[0][0], torch.full_like(data[0][1], -100)))
    sketcher = GradientSketcher(build("llama_untied"), SPEC)

    def encode(chosen):
        ids, labels, mask = pad(chosen)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    ask = ProxySketches(sketcher, data, encode, at_once=4, keep=keep)
    z = ask(range(6))
    assert torch.equal(z[5], torch.zeros(SPEC.dim))
    assert torch.equal(z[:4], sketcher(*pad(data[:4])))
    sampler = GainSampler(ProxySketches(sketcher, data, encode, keep=keep), 1, m=2)
    batches = list(sampler)
    assert batches == list(GainSampler(z, 1, m=2))
    assert batches[-1] == [5]
    passes = []
    ask.encode = lambda chosen: (passes.append(len(chosen)), encode(chosen))[1]
    ask([2, 3])
    assert passes == ([] if keep else [2])


def test_a_loader_takes_it():
    data = [{"number": i} for i in range(N)]
    sampler = GainSampler(rows(), B, m=3)
    loader = DataLoader(data, batch_sampler=sampler)
    wanted = list(copy.deepcopy(sampler))
    assert [batch["number"].tolist() for batch in loader] == wanted
    assert len(loader) == len(wanted)
    assert sampler.epoch == 1


def test_accelerate_shares_out_its_batches():
    data_loader = pytest.importorskip(
        "accelerate.data_loader", reason="needs accelerate: pip install accelerate"
    )
    sampler = GainSampler(rows(), B, m=3)
    shards = [data_loader.BatchSamplerShard(GainSampler(rows(), B, m=3), 2, rank) for rank in range(2)]
    whole, (first, second) = list(sampler), map(list, shards)
    assert first == [*whole[0::2]]
    assert second[: len(whole[1::2])] == whole[1::2]
    # What DataLoaderShard.set_epoch looks for.
    shards[0].batch_sampler.sampler.set_epoch(5)
    assert shards[0].batch_sampler.epoch == 5


def test_a_trainer_trains_on_its_batches(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install accelerate")
    from transformers import Trainer, TrainingArguments

    z, seen = rows(24), []

    def collate(chosen):
        seen.append([row["number"] for row in chosen])
        ids = torch.stack([row["input_ids"] for row in chosen])
        return {"input_ids": ids, "labels": ids}

    class GainTrainer(Trainer):
        def get_train_dataloader(self):
            sampler = GainSampler(z, 4, m=2, steps=3, seed=7)
            return self.accelerator.prepare(
                DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=collate)
            )

    data = [{"input_ids": torch.randint(3, 61, (5,)), "number": i} for i in range(24)]
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    trainer = GainTrainer(model=build("llama_untied"), args=arguments, train_dataset=data)
    assert trainer.train().global_step == 6
    wanted = GainSampler(z, 4, m=2, steps=3, seed=7)
    assert seen == [*wanted, *wanted]


def test_torchdata_resumes_it():
    module = pytest.importorskip(
        "torchdata.stateful_dataloader", reason="needs torchdata: pip install torchdata"
    )

    def made():
        return module.StatefulDataLoader(range(N), batch_sampler=GainSampler(rows(), B, m=3))

    loader = made()
    first = [batch.tolist() for batch in loader]
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state, rest = loader.state_dict(), [batch.tolist() for batch in batches]
    other = made()
    other.load_state_dict(state)
    assert [batch.tolist() for batch in other] == rest != first[4:]
    assert [batch.tolist() for batch in other] == [batch.tolist() for batch in loader]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"m": 1.5}, "m is 1.5"),
        ({"m": 0}, "m is 0"),
        ({"steps": 16}, r"steps is 16; wanted at most 15: 90 rows give"),
        ({"window": MOST_WINDOW + 1}, "window is 8193; wanted at most 8192"),
        ({"objective": "facility"}, "objective is 'facility'; wanted one of logdet, vendi"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"rank": 2, "world": 2}, "rank is 2; wanted 0 to 1, as world is 2"),
        ({"batch_size": 91, "drop_last": True}, "an epoch has no batch; lower batch_size"),
        ({"rows": 80}, "rows is 80, but there are 90 sketches"),
        ({"dim": 17}, "dim is 17; wanted at most 16"),
        ({"sketches": rows().long()}, "rows has dtype torch.int64"),
        ({"sketches": lambda i: rows()[i]}, "rows is None, and a function does not say how many"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_are_refused_by_name(arguments, said):
    with pytest.raises(GvendiError, match=said):
        GainSampler(**{"sketches": rows(), "batch_size": B, **arguments})


def test_what_a_function_or_encode_gives_is_checked():
    with pytest.raises(GvendiError, match="sketches gave 3 rows for 18 numbers"):
        next(iter(GainSampler(lambda i: rows()[:3], B, m=3, rows=N)))
    with pytest.raises(GvendiError, match="encode is 3; wanted a function"):
        ProxySketches(None, [], 3)
    with pytest.raises(GvendiError, match=r"encode gave \['text'\]; wanted input_ids, labels"):
        ProxySketches(None, ["a"], lambda chosen: {"text": chosen})([0])
    with pytest.raises(GvendiError, match="encode gave 2 rows of 1"):
        ProxySketches(None, ["a"], lambda chosen: {"input_ids": 0, "labels": torch.zeros(2, 3)})([0])
