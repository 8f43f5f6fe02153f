"""A pass has its model to itself: in other threads, in itself, whatever interrupts it, and after a fork.

Threads are stopped inside by hooks, not met by luck.
"""

import copy
import ctypes
import functools
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hangs import HANG_S
from small_models import GATED, SPEC, build, pad, samples, state_of

import gvendi_fast.sketching.gradients.sketcher as sketcher_module
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients import layer_ops
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

BATCH = pad(samples())
OTHER = SketchSpec(dim=128, seed=9)
WAIT_S = HANG_S


@contextmanager
def stopped_inside(model, sketcher):
    """A thread that stands inside a pass of `sketcher` at the model's last block while the body runs."""
    inside, go = threading.Event(), threading.Event()

    def stop(module, args, output):
        if threading.get_ident() == thread[0]:
            inside.set()
            assert go.wait(WAIT_S)

    thread = [0]
    handle = model.model.layers[-1].mlp.register_forward_hook(stop)

    def run():
        thread[0] = threading.get_ident()
        return sketcher(*BATCH)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run)
        assert inside.wait(WAIT_S)
        try:
            yield result
        finally:
            go.set()
            handle.remove()


def double(weight):
    weight.mul_(2.0)


class Whole(torch.nn.Module):
    """Another model object around the same layers, as an adapter's base is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, use_cache=False):
        return self.inner(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache
        )


def sharing(kind):
    """Two models that have layers in common, the first of them `model`."""
    model = build("qwen2_tied").requires_grad_(True)
    if kind == "the same":
        return model, model
    if kind == "a wrapper":
        return model, Whole(model)
    other = build("qwen2_tied").requires_grad_(True)
    if kind == "one block":
        other.model.layers[0] = model.model.layers[0]
    else:
        other.model.norm.weight = model.model.norm.weight
    return model, other


@pytest.mark.parametrize("kind", ["the same", "a wrapper", "one block", "one parameter"])
def test_a_pass_over_layers_that_another_thread_sketches_waits(kind):
    model, other = sharing(kind)
    first, second = GradientSketcher(model, SPEC), GradientSketcher(other, OTHER)
    wanted, before = (first(*BATCH), second(*BATCH)), (state_of(model), state_of(other))
    with ThreadPoolExecutor(1) as pool:
        with stopped_inside(model, first) as result:
            late = pool.submit(second, *BATCH)
            # A pass takes a hundredth of this.
            assert not late.done()
            with pytest.raises(TimeoutError):
                late.result(0.3)
        assert torch.equal(result.result(WAIT_S), wanted[0])
        assert torch.equal(late.result(WAIT_S), wanted[1])
    assert (state_of(model), state_of(other)) == before


def test_passes_over_models_without_common_layers_do_not_wait():
    model, other = build("qwen2_tied"), build("llama_untied")
    first, second = GradientSketcher(model, SPEC), GradientSketcher(other, SPEC)
    wanted = first(*BATCH), second(*BATCH)
    with stopped_inside(model, first) as result:
        assert torch.equal(second(*BATCH), wanted[1])
    assert torch.equal(result.result(WAIT_S), wanted[0])


@pytest.mark.parametrize("other", ["itself", "another sketcher", "a new sketcher"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_inside_a_pass_of_the_same_model_is_refused_and_the_model_restored(other, where):
    model = build("qwen2_tied").requires_grad_(True).train()
    sketcher = GradientSketcher(model, SPEC)
    made = GradientSketcher(model, OTHER)
    second = {
        "itself": lambda: sketcher(*BATCH),
        "another sketcher": lambda: made(*BATCH),
        "a new sketcher": lambda: GradientSketcher(model, OTHER),
    }[other]
    wanted, before = sketcher(*BATCH), state_of(model)

    def again(module, args, output):
        if where == "forward":
            second()
        else:
            output.register_hook(lambda gradient: second())

    handle = model.model.layers[0].mlp.register_forward_hook(again)
    with pytest.raises(GvendiError, match="inside a pass"):
        sketcher(*BATCH)
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(sketcher(*BATCH), wanted)


def test_a_pass_inside_the_pass_of_another_model_does_not_wait_for_a_third_thread():
    """Two threads, each inside one model's pass and asking for the other's, would wait for one another."""
    model, other = build("qwen2_tied"), build("llama_untied")
    first, second = GradientSketcher(model, SPEC), GradientSketcher(other, SPEC)
    wanted = first(*BATCH)
    with stopped_inside(other, second) as result:
        handle = model.model.layers[0].register_forward_hook(lambda m, a, o: [second(*BATCH), None][1])
        with pytest.raises(GvendiError, match="in use"):
            first(*BATCH)
        handle.remove()
        assert torch.equal(first(*BATCH), wanted)
    result.result(WAIT_S)
    # Free again, it may run inside.
    handle = model.model.layers[0].register_forward_hook(lambda m, a, o: [second(*BATCH), None][1])
    assert torch.equal(first(*BATCH), wanted)
    handle.remove()


USES = {
    "forward": lambda model: model(input_ids=BATCH[0]),
    "training step": lambda model: model(input_ids=BATCH[0], labels=BATCH[1]).loss.backward(),
    "one layer": lambda model: model.model.layers[0].mlp(torch.zeros(1, 3, 32)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_that_another_thread_sketches_refuses_to_be_run(use):
    model = build("qwen2_tied").requires_grad_(True).train()
    sketcher = GradientSketcher(model, SPEC)
    wanted, before = sketcher(*BATCH), state_of(model)
    with (
        stopped_inside(model, sketcher) as result,
        pytest.raises(GvendiError, match="another thread sketches"),
    ):
        use(model)
    assert torch.equal(result.result(WAIT_S), wanted)
    assert state_of(model) == before
    model(input_ids=BATCH[0], labels=BATCH[1]).loss.backward()
    assert model.model.norm.weight.grad is not None


@pytest.mark.parametrize(
    "layer", ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.input_layernorm"]
)
@pytest.mark.parametrize("who", ["another thread", "a hook"])
def test_weights_that_change_under_a_pass_are_an_error(layer, who):
    model = build("llama_untied").requires_grad_(True)
    sketcher, changed = GradientSketcher(model, SPEC), model.get_submodule(layer).weight
    before = state_of(model)
    if who == "another thread":
        with stopped_inside(model, sketcher) as result, torch.no_grad():
            double(changed)
    else:
        hook = model.model.layers[-1].register_forward_hook(lambda m, a, o: double(changed))
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(sketcher, *BATCH)
        hook.remove()
    with pytest.raises(GvendiError, match="weights of the model changed"):
        result.result(WAIT_S)
    assert state_of(model) == before
    sketcher(*BATCH)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError, SystemExit])
@pytest.mark.parametrize("place", ["before a layer", "after a layer", "backward", "a layer", "the head"])
def test_whatever_a_pass_meets_leaves_the_model_as_it_was(error, place, monkeypatch):
    model = build("llama_untied").requires_grad_(True).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    sketcher = GradientSketcher(model, SPEC)
    wanted, before = sketcher(*BATCH), state_of(model)
    masking = sys.modules["transformers.masking_utils"].find_packed_sequence_indices

    def fail(*args, **kwargs):
        raise error("here")

    layer = model.model.layers[-1].mlp
    if place == "before a layer":
        undo = layer.register_forward_pre_hook(fail).remove
    elif place == "after a layer":
        undo = layer.register_forward_hook(fail).remove
    elif place == "backward":
        undo = layer.register_forward_hook(lambda m, a, o: o.register_hook(fail) and None).remove
    elif place == "a layer":
        layer.act_fn.forward = fail
        undo = functools.partial(delattr, layer.act_fn, "forward")
    else:
        monkeypatch.setattr(sketcher_module.HeadLoss, "apply", fail)
        undo = monkeypatch.undo
    with pytest.raises(error, match="here"):
        sketcher(*BATCH)
    undo()
    assert state_of(model) == before
    assert sys.modules["transformers.masking_utils"].find_packed_sequence_indices is masking
    assert torch.equal(sketcher(*BATCH), wanted)


def interrupted_at(call, number, files):
    """Runs `call`; KeyboardInterrupt comes where Python looks for signals for the number-th time in these files.

    Returns whether it came: Python looks when a function begins and when one of C's returns.
    """
    count = 0

    def look(frame, event, argument):
        nonlocal count
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
            count += 1
            if count == number:
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return count >= number


def test_an_interrupt_at_any_point_leaves_the_model_as_it_was():
    small = {"one": ("LlamaConfig", {**GATED, "num_hidden_layers": 1, "tie_word_embeddings": False})}
    model = build("one", small).requires_grad_(True).train()
    sketcher = GradientSketcher(model, SPEC)
    batch = pad(samples()[2:3])
    wanted, before = sketcher(*batch), state_of(model)
    masking = sys.modules["transformers.masking_utils"]
    own = masking.find_packed_sequence_indices
    files = ("sketcher.py", "attention.py", "undoing.py", "in_use.py", "forward.py")
    number, came = 1, True
    while came:
        came = interrupted_at(lambda: sketcher(*batch), number, files)
        assert state_of(model) == before, number
        assert masking.find_packed_sequence_indices is own, number
        number += 1
    assert number > 100
    assert torch.equal(sketcher(*batch), wanted)
    assert sketcher._probed.thread is None


def test_a_model_is_free_again_after_an_interrupted_wait():
    model = build("qwen2_tied")
    sketcher = GradientSketcher(model, SPEC)
    wanted = sketcher(*BATCH)
    started, thread = threading.Event(), [0]

    def wait():
        thread[0] = threading.get_ident()
        started.set()
        return sketcher(*BATCH)

    with ThreadPoolExecutor(1) as pool:
        with stopped_inside(model, sketcher) as result:
            late = pool.submit(wait)
            assert started.wait(WAIT_S)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread[0]), ctypes.py_object(KeyboardInterrupt)
            )
        with pytest.raises(KeyboardInterrupt):
            late.result(WAIT_S)
        assert torch.equal(result.result(WAIT_S), wanted)
    assert torch.equal(sketcher(*BATCH), wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.usefixtures("one_thread")
def test_a_process_forked_inside_a_pass_refuses_the_half_changed_model_and_sketches_others():
    model, other = build("qwen2_tied"), build("llama_untied")
    sketcher, free = GradientSketcher(model, SPEC), GradientSketcher(other, SPEC)
    wanted = free(*BATCH)
    with stopped_inside(model, sketcher) as result:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for use in (lambda: sketcher(*BATCH), lambda: model(input_ids=BATCH[0])):
                    try:
                        use()
                        code = 2
                        break
                    except GvendiError as error:
                        if "fork" not in str(error):
                            code = 3
                            break
                else:
                    code = 0 if torch.equal(free(*BATCH), wanted) else 4
            finally:
                os._exit(code)
    result.result(WAIT_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_refused_inside_a_pass_and_free_of_it_afterwards(copied):
    model = build("qwen2_tied")
    sketcher = GradientSketcher(model, SPEC)
    wanted = sketcher(*BATCH)
    with stopped_inside(model, sketcher) as result, pytest.raises(GvendiError, match="cannot be copied"):
        copied(sketcher)
    result.result(WAIT_S)
    made = copied(sketcher)
    with stopped_inside(model, sketcher):
        assert torch.equal(made(*BATCH), wanted)


def test_a_hook_that_keeps_the_forward_of_a_pass_runs_the_models_own_afterwards():
    model = build("llama_untied")
    sketcher = GradientSketcher(model, SPEC)
    layer, ids = model.model.layers[0].mlp.down_proj, BATCH[0]
    wanted = model(input_ids=ids).logits

    def wrap(module, args, output):
        inner = module.forward
        module.forward = lambda x: inner(x)

    handle = layer.register_forward_hook(wrap)
    sketcher(*BATCH)
    handle.remove()
    assert torch.equal(model(input_ids=ids).logits, wanted)


def test_two_threads_that_meet_new_parameters_give_each_its_own_number():
    """The number is the length of a list that both append to: a thread that stops between would take the other's."""
    names = [(f"thread-{side}.{i}.weight", None) for i in range(400) for side in ("a", "b")]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            keys = list(pool.map(lambda pair: layer_ops.layer_key(*pair), names))
    finally:
        sys.setswitchinterval(interval)
    assert [layer_ops.names_of(key) for key in keys] == [(weight, "") for weight, _ in names]
