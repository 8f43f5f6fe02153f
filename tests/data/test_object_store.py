"""A run directory in a store of S3's kind that fails: what is there is whole, and the same as on this machine."""

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from children import children
from object_store import Faults, object_store
from small_runs import MANIFEST, SPEC, make_run

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists, names_in
from gvendi_fast.base.os_errors import StoreError, sentence
from gvendi_fast.base.places import place
from gvendi_fast.data.checking import check_run
from gvendi_fast.data.index import index_corpus, read_unit
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.data.run_files import read_json

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def shop():
    with object_store() as store:
        yield store


@pytest.fixture
def bucket(shop, monkeypatch, request):
    """The URL of a bucket of the test's own, in a store that breaks nothing yet."""
    from gvendi_fast.base import urls

    monkeypatch.setattr(urls, "WAITS_S", (0.0,) * 9)
    shop.faults = Faults()
    shop.asked.clear()
    yield shop.bucket(f"b{crc32(request.node.name.encode()):010d}")
    shop.faults = Faults()


def files_of(root) -> dict[str, bytes]:
    """{path below a folder: its bytes}."""
    if isinstance(root, Path):
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return {p.path[len(root.path) + 1 :]: p.read_bytes() for p in root.find()}


def part_of(unit: int, seed: int = 0) -> Part:
    rows = np.arange(4) + 4 * unit
    ones = {name: np.ones(4) for name in ("tokens", "length", "loss", "gradient_norm")}
    sketches = np.random.default_rng((unit, seed)).standard_normal((4, 8)).astype(np.float32)
    return Part(unit, list(map(str, rows)), [""] * 4, rows, sketches, **ones)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return files_of(make_run(tmp_path_factory.mktemp("local") / "run", is_old=False))


@pytest.mark.parametrize("seed", range(4))
def test_a_run_in_a_store_that_fails_is_the_same_bytes(shop, bucket, local, seed):
    kinds = ("500", "503", "cut", "lost", "short", "lies", "slow")
    shop.faults = Faults(seed, dict.fromkeys(kinds, 0.08))
    root = place(f"{bucket}/run")
    make_run(root, is_old=False)
    assert files_of(root) == local
    assert check_run(root).findings == []
    assert sum(shop.faults.happened.values()) > 3


# A call of several requests would fail each time that it is tried again if as many lay between two faults.
@pytest.mark.parametrize(
    ("kind", "n"), [("500", 5), ("500", 7), ("503", 5), ("cut", 2), ("lost", 5), ("short", 3), ("lies", 3)]
)
def test_every_nth_request_fails(shop, bucket, local, kind, n):
    shop.faults = Faults(every={kind: n})
    root = place(f"{bucket}/run")
    make_run(root, is_old=False)
    assert files_of(root) == local
    assert [part.unit for part in RunDirectory.load(root).iterate()] == [0, 1]
    assert shop.faults.happened[kind] > 2


def test_an_upload_that_always_breaks_leaves_no_part(shop, bucket):
    root = place(f"{bucket}/run")
    run = RunDirectory.open(root, SPEC, MANIFEST)
    shop.faults = Faults(every={"cut": 1}, only="part-")
    with pytest.raises(StoreError) as caught:
        run.write_part(part_of(0))
    assert sentence(caught.value).startswith(
        f"'{root}/parts/part-000000.parquet' cannot be used: its store failed"
    )
    assert "tried 10 times" in sentence(caught.value)
    shop.faults = Faults()
    assert names_in(root / "parts") == ["rejected-000000.jsonl"]
    assert run.done() == []
    run.write_part(part_of(0))
    assert run.done() == [0]


def test_a_store_that_is_gone_is_named(shop, bucket, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    url = place(f"{bucket}/run")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError) as caught:
        exists(url)
    s3fs.S3FileSystem.clear_instance_cache()
    assert sentence(caught.value).startswith(f"'{url}' cannot be used: its store failed (Could not connect")


def test_missing_buckets_and_credentials_are_named(shop, bucket, monkeypatch, tmp_path):
    s3fs = pytest.importorskip("s3fs")
    with pytest.raises(StoreError, match="its bucket 'no-such-bucket' does not exist; make it"):
        make_run(place("s3://no-such-bucket/run"), is_old=False)
    with pytest.raises(
        GvendiError, match="'s3://no-such-bucket/run' is not a run directory: it does not exist"
    ):
        RunDirectory.load("s3://no-such-bucket/run")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError) as caught:
        make_run(place(f"{bucket}/run"), is_old=False)
    s3fs.S3FileSystem.clear_instance_cache()
    assert "there are no credentials for its store" in sentence(caught.value)


def test_the_first_of_many_writers_counts(shop, bucket):
    root = place(f"{bucket}/run")
    shop.faults = Faults(1, {"lost": 0.2, "503": 0.1})

    def write(number: int) -> bytes:
        with atomic_write(root / "spec.json", exclusive=True) as stream:
            stream.write(b'{"by": %d}' % number)
        return (root / "spec.json").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write, range(16)))
    assert len(set(seen)) == 1
    assert read_json(root / "spec.json")["by"] in range(16)


def test_only_one_of_two_specs_is_taken(shop, bucket):
    root = place(f"{bucket}/run")
    refused = Counter()

    def begin(number: int) -> None:
        try:
            RunDirectory.open(root, {**SPEC, "mask": f"{number}"}, MANIFEST)
        except GvendiError:
            refused[number] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin, range(4)))
    assert sum(refused.values()) == 3
    assert read_json(root / "spec.json")["mask"] not in map(str, refused)


def test_two_writers_of_one_unit_are_harmless_and_see_each_other(shop, bucket, local):
    root = place(f"{bucket}/run")
    runs = [RunDirectory.open(root, SPEC, MANIFEST) for _ in range(2)]
    assert runs[0].done() == []
    runs[1].write_part(part_of(1, 5))
    # Nothing that was listed before is kept.
    assert runs[0].done() == [1]
    shop.faults = Faults(2, {"lost": 0.15, "cut": 0.15, "500": 0.1})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: runs[n % 2].write_part(part_of(n // 2 % 2, 7)), range(8)))
    shop.faults = Faults()
    assert runs[0].done() == runs[1].done() == [0, 1]
    assert check_run(root).findings == []
    runs[1].remove_part(0)
    assert runs[0].done() == [1]


def test_no_temporary_file_and_no_rename(shop, bucket):
    make_run(place(f"{bucket}/run"), is_old=False)
    methods = {method for method, _ in shop.asked}
    assert methods <= {"GET", "PUT", "HEAD"}
    put = [path for method, path in shop.asked if method == "PUT"]
    assert not [path for path in put if ".tmp" in path]
    assert len(put) == len(set(put)) == 7


def test_a_large_object_is_there_with_its_last_piece(shop, bucket, monkeypatch):
    from gvendi_fast.base import urls

    monkeypatch.setattr(urls, "_AT_ONCE", 1 << 20)
    content = random.Random(0).randbytes(12 << 20)
    url = place(f"{bucket}/large")
    with atomic_write(url) as stream:
        stream.write(content)
    with url.open("rb", 1 << 17) as stream:
        assert stream.read() == content
    shop.faults = Faults(3, {"short": 0.3, "lies": 0.3, "slow": 0.1})
    with url.open("rb", 1 << 17) as stream:
        assert b"".join(iter(lambda: stream.read(100_000), b"")) == content


def test_a_corpus_in_a_store_that_fails(shop, bucket, tmp_path):
    import gzip
    import json

    lines = b"".join(
        json.dumps({"prompt": f"{i}", "completion": "x" * (i % 50)}).encode() + b"\n" for i in range(5000)
    )
    for name, content in (("a.jsonl", lines), ("b.jsonl.gz", gzip.compress(lines, mtime=0))):
        (tmp_path / name).write_bytes(content)
        with atomic_write(place(f"{bucket}/data/{name}")) as stream:
            stream.write(content)
    shop.faults = Faults(4, {"500": 0.1, "short": 0.2, "lies": 0.2})
    here, there = index_corpus(tmp_path, rows_per_unit=999), index_corpus(f"{bucket}/data", rows_per_unit=999)
    assert [unit.digest for unit in there.units] == [unit.digest for unit in here.units]
    for one, other in zip(here.units, there.units, strict=True):
        rows = [str(row).replace(str(tmp_path), f"{bucket}/data") for row in read_unit(here, one)]
        assert [str(row) for row in read_unit(there, other)] == rows


def sketch_at(data: str, out: str, environment: dict[str, str]) -> None:
    """A run for a process of its own."""
    import torch

    from gvendi_fast.base import urls
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.proxy.load import load_proxy

    os.environ.update(environment)
    torch.set_num_threads(1)
    urls.WAITS_S = (0.0,) * 9
    sketch_corpus(data, out, load_proxy("tiny", device="cpu"), Settings(unit_rows=3))


def killing(process, puts: int) -> Callable[[str, str], None]:
    """What watches requests and kills the process while it waits for the answer to its last one of so many puts."""
    left = [puts]

    def watch(method: str, path: str) -> None:
        left[0] -= method == "PUT" and "/run/" in path
        if left[0] == 0 and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)

    return watch


def test_runs_that_are_killed_while_they_write_lose_and_double_nothing(shop, bucket, loopback):
    lines = "".join(f'{{"prompt": "{i}?", "completion": "{i * i}"}}\n' for i in range(36))
    with atomic_write(place(f"{bucket}/data.jsonl")) as stream:
        stream.write(lines.encode())
    whole, run = (place(f"{bucket}/{name}") for name in ("whole", "run"))
    sketch_at(f"{bucket}/data.jsonl", str(whole), {})
    shop.faults = Faults(6, dict.fromkeys(("500", "lost", "cut"), 0.03))
    draw, context = random.Random(6), children()
    for number in range(5):
        process = context.Process(target=sketch_at, args=(f"{bucket}/data.jsonl", str(run), shop.environment))

        shop.watch = killing(process, draw.randrange(1, 9))
        process.start()
        process.join()
        shop.watch = lambda method, path: None
        done = RunDirectory(run, {}, None).done()
        assert check_run(run).findings == [] or not done, number
    shop.faults = Faults()
    sketch_at(f"{bucket}/data.jsonl", str(run), {})
    assert check_run(run).findings == []
    wanted, found = files_of(whole / "parts"), files_of(run / "parts")
    assert found == wanted
    assert len(wanted) == 24


def test_sketch_and_score_from_and_into_a_store_that_fails(shop, bucket, gvendi, tmp_path):
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.proxy.load import load_proxy

    rows = "".join(f'{{"prompt": "{i}?", "completion": "{i * i}", "source": "{i % 2}"}}\n' for i in range(24))
    (tmp_path / "data.jsonl").write_text(rows)
    with atomic_write(place(f"{bucket}/data/data.jsonl")) as stream:
        stream.write(rows.encode())
    shop.faults = Faults(5, {"500": 0.05, "lost": 0.05, "cut": 0.05, "short": 0.05, "lies": 0.05})
    settings, proxy = Settings(unit_rows=6), load_proxy("tiny", device="cpu")
    sketch_corpus(f"{bucket}/data", f"{bucket}/run", proxy, settings)
    sketch_corpus(tmp_path / "data.jsonl", tmp_path / "run", proxy, settings)
    there = place(f"{bucket}/run")
    for name in names_in(tmp_path / "run" / "parts"):
        one = RunDirectory.load(tmp_path / "run")
        assert name in names_in(there / "parts"), one
    one, other = RunDirectory.load(tmp_path / "run"), RunDirectory.load(there)
    for mine, theirs in zip(one.iterate(), other.iterate(), strict=True):
        np.testing.assert_array_equal(mine.sketches, theirs.sketches)
    shop.faults = Faults()
    code, out, err = gvendi("score", there, "--json")
    assert code == 0, err
    assert gvendi("check", there)[0] == 0
    for words in (
        ("cluster", there, "--clusters", "3", "--out", f"{bucket}/out/clusters.parquet"),
        ("select", there, "--size", "5", "--out", f"{bucket}/out/chosen.jsonl"),
        ("report", there, "--out", f"{bucket}/out/page.html"),
        ("compare", there, tmp_path / "run"),
    ):
        code, out, err = gvendi(*words)
        assert code == 0, (words, out, err)
    assert names_in(place(f"{bucket}/out")) == [
        "chosen.jsonl",
        "chosen.parquet",
        "clusters.parquet",
        "clusters.safetensors",
        "page.html",
        "page.json",
    ]
    assert len(place(f"{bucket}/out/chosen.jsonl").read_bytes().splitlines()) == 5
