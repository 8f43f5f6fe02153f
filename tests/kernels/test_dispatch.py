"""Dispatch by measured speed, and what `gvendi info` says about it. All times in here are made up."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.cli.info import describe, operation_lines
from gvendi_fast.kernels import backends
from gvendi_fast.kernels.backends import measured

BUILT_IN = backends.ORDER["cuda"]
GPU = "Made-up GPU"


def made_up(**times: dict) -> dict:
    """The record of one operation on a GPU that does not exist."""
    return {"milliseconds": times, "measured": {name: {"commit": "made up"} for name in times}}


@pytest.fixture
def record(tmp_path):
    """A record of made-up times, as a file."""
    content = {
        "9.9": {
            GPU: {
                # triton: half the time on one case, an eighth on the other; by geometric mean a quarter.
                "linear_sketch": made_up(cuda={"x": 2.0, "y": 8.0, "z": 0.1}, triton={"x": 1.0, "y": 1.0}),
                "fold_hadamard": made_up(cuda={"x": 1.0}, triton={"x": 1.5}),
                "token_sketch": made_up(triton={"x": 1.0}),
                "vector_sketch": made_up(cuda={"x": 1.0}, triton={"y": 0.5}),
            },
            "A made-up sister": {
                "linear_sketch": made_up(cuda={"x": 1.0}, triton={"x": 3.0}),
                "softmax_fold": made_up(cuda={"x": 1.0}, triton={"x": 3.0}),
            },
        }
    }
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps(content))
    return measured.load(path)


@pytest.mark.parametrize(
    ("op", "first", "ratio"),
    [
        ("linear_sketch", "triton", f"triton measured 4.00 times as fast as cuda on {GPU}"),
        ("fold_hadamard", "cuda", f"cuda measured 1.50 times as fast as triton on {GPU}"),
        ("softmax_fold", "cuda", "cuda measured 3.00 times as fast as triton on A made-up sister"),
        # One backend alone, no case in common, and nothing at all.
        ("token_sketch", "cuda", None),
        ("vector_sketch", "cuda", None),
        ("dense_sketch", "cuda", None),
    ],
)
def test_faster_backend_comes_first(record, op, first, ratio):
    found = measured.order(op, BUILT_IN, GPU, "9.9", record)
    assert found.names[0] == first
    assert sorted(found.names) == sorted(BUILT_IN)
    assert found.names[-1] == "reference"
    assert found.ratio == ratio


def test_figures_of_another_capability_do_not_count(record):
    assert measured.order("linear_sketch", BUILT_IN, GPU, "8.0", record) == measured.Ranking(BUILT_IN)


def test_the_package_s_own_record_can_be_read():
    for capability, gpus in measured.load().items():
        assert float(capability) >= 8
        for operations in gpus.values():
            for op, entry in operations.items():
                assert op in backends.operations()
                assert set(entry["milliseconds"]) == set(entry["measured"]) <= set(BUILT_IN)


@pytest.fixture
def gpu(monkeypatch, record):
    """A pretended GPU with the made-up record on which both compiled backends run everything."""
    monkeypatch.delenv("GVENDI_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(measured, "load", lambda: record)
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: None)
    kernels = dict.fromkeys(backends.operations())
    modules = {n: SimpleNamespace(why_not=lambda op, *tensors: None, **kernels) for n in ("cuda", "triton")}
    own = backends.backend
    monkeypatch.setattr(backends, "backend", lambda name: modules.get(name) or own(name))
    backends.order.cache_clear()
    yield modules
    backends.order.cache_clear()


def test_resolve_takes_the_measured_order(gpu):
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    assert backends.resolve("linear_sketch", tensor) is gpu["triton"]
    assert backends.resolve("fold_hadamard", tensor) is gpu["cuda"]
    assert backends.resolve("entropy", tensor) is gpu["cuda"]
    gpu["triton"].why_not = lambda op, *tensors: "not there"
    assert backends.resolve("linear_sketch", tensor) is gpu["cuda"]


def test_an_operation_without_a_cuda_kernel_goes_to_triton_without_a_warning(gpu):
    gpu["cuda"].why_not = lambda op, *tensors: f"there is no CUDA C++ kernel for {op}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = SimpleNamespace(device=torch.device("cuda", 0))
        assert backends.resolve("expert_sketch", tensor) is gpu["triton"]


def test_the_record_is_looked_up_once_for_an_operation_and_a_device(gpu, monkeypatch):
    tensor = SimpleNamespace(device=torch.device("cuda", 0))
    backends.resolve("linear_sketch", tensor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: pytest.fail("asked again"))
    assert backends.resolve("linear_sketch", tensor) is gpu["triton"]


def test_info_on_a_gpu_names_each_operation_s_backend_and_why(gpu):
    lines = operation_lines(torch.device("cuda", 0), torch.bfloat16)
    assert lines["linear_sketch"] == f"triton (measured 4.00 times as fast as cuda on {GPU})"
    assert lines["entropy"] == "cuda (built-in order, not measured on this GPU)"
    gpu["triton"].why_not = lambda op, *tensors: "not there"
    lines = operation_lines(torch.device("cuda", 0), torch.bfloat16)
    assert lines["linear_sketch"].startswith(
        "cuda (the only compiled kernel here; triton measured 4.00 times"
    )
    gpu["cuda"].why_not = gpu["triton"].why_not
    assert operation_lines(torch.device("cuda", 0), torch.bfloat16)["entropy"].startswith("reference (")


def test_info_on_a_gpu_says_what_the_backend_asked_for_cannot_run(gpu):
    gpu["cuda"].why_not = lambda op, *tensors: "no such kernel" if op == "entropy" else None
    with backends.use_backend("cuda"):
        lines = operation_lines(torch.device("cuda", 0), torch.bfloat16)
    assert lines["linear_sketch"] == "cuda (requested)"
    assert lines["entropy"] == "cuda cannot run it: no such kernel"


@pytest.mark.skipif(torch.cuda.is_available(), reason="info of a machine without a GPU")
def test_info_on_a_cpu_groups_the_operations_by_backend():
    lines = {name: value for name, value in describe().items() if name.startswith("runs on")}
    listed = [op for value in lines.values() for op in value.split(", ")]
    assert sorted(listed) == sorted(backends.operations())
    with backends.use_backend("reference"):
        asked = operation_lines(torch.device("cpu"), torch.float32)
    assert list(asked) == ["runs on reference"]


def test_a_second_thread_cannot_ask_for_another_backend_meanwhile():
    """Blocks that overlap without nesting would leave the other thread's backend behind."""

    def inside(name):
        with backends.use_backend(name):
            return backends.requested()

    before = backends.requested()
    with ThreadPoolExecutor(1) as pool:
        with backends.use_backend("reference"):
            assert pool.submit(inside, "reference").result() == "reference"
            with pytest.raises(GvendiError, match="whole process"):
                pool.submit(inside, "cpu").result()
            with backends.use_backend("cpu"):
                assert backends.requested() == "cpu"
            assert backends.requested() == "reference"
        assert pool.submit(inside, "cpu").result() == "cpu"
    assert backends.requested() == before


def test_a_variable_that_names_no_backend_is_said_to_be_one(monkeypatch):
    monkeypatch.setenv("GVENDI_BACKEND", "gpu")
    with pytest.raises(GvendiError, match=r"GVENDI_BACKEND is 'gpu'; wanted one of cpu, cuda"):
        backends.requested()
    monkeypatch.setenv("GVENDI_BACKEND", "")
    assert backends.requested() is None
