"""When the chunked head stands for the model's own: decided in float32, alike in every dtype, or left to autograd."""

import copy

import pytest
import torch
import transformers
from small_models import CONFIGS, FP32_RELATIVE, GATED, SPEC, autograd_sketch, build, pad, samples, state_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.head import find_head
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.gradients.taps import find_taps

MORE = {
    "cohere": ("CohereConfig", {**GATED, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**GATED, "head_dim": 8, "logit_scale": 0.3, "sliding_window": 5}),
    "gemma2_uncapped": ("Gemma2Config", {**GATED, "head_dim": 8, "final_logit_softcapping": None}),
    "gemma2_wide_cap": ("Gemma2Config", {**GATED, "head_dim": 8, "final_logit_softcapping": 30.0}),
    "granite_unscaled": ("GraniteConfig", {**GATED, "logits_scaling": 1.0}),
}
FORMS = {
    "gemma2": (3.0, 1.0),
    "gemma2_wide_cap": (30.0, 1.0),
    "granite_scaled": (None, 1 / 3.0),
    "cohere": (None, 0.25),
    "cohere2": (None, 0.3),
    "phi_biased_head": None,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def form_of(model):
    """(softcap, scale) of the head that is found, None where it is left to autograd."""
    model.requires_grad_(False)
    layout = find_taps(model)
    head = find_head(model, layout.taps, layout.names)
    return head and (head.softcap, head.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_head_is_recognised_alike_in_every_dtype(name, dtype):
    model = build(name, {**CONFIGS, **MORE}).to(dtype)
    assert form_of(model) == FORMS.get(name, (None, 1.0))


def planted(change, prepare=lambda hidden: hidden, **config):
    """A Llama whose head computes change(W prepare(h)), with further settings in its configuration."""

    class Planted(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            hidden = self.model(**inputs).last_hidden_state
            logits = change(self.lm_head(prepare(hidden)))
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    torch.manual_seed(1)
    values = {**GATED, **config}
    return Planted(transformers.LlamaConfig(**values, tie_word_embeddings=False)).eval()


def cap(logits):
    return 30 * torch.tanh(logits / 30)


FOREIGN = {
    "cap": cap,
    "scale": lambda logits: 0.745 * logits,
    "scale near one": lambda logits: 1.004 * logits,
    "sum": lambda logits: logits + 1e-3 * logits.mean(-1, keepdim=True),
    "mask of one word": lambda logits: logits.index_fill(-1, torch.tensor([60]), -100.0),
    "clamp": lambda logits: logits.clamp(-1000, 1000),
    "fewer words": lambda logits: logits[..., :-3],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.02, 1.0, 20.0])
@pytest.mark.parametrize("name", FOREIGN)
def test_head_that_the_configuration_does_not_name_is_left_to_autograd(name, size, dtype):
    model = planted(FOREIGN[name])
    with torch.no_grad():
        # From logits that a cap of 30 does not bend, to logits that are all cap.
        model.lm_head.weight.normal_().mul_(size)
    assert form_of(model.to(dtype)) is None


def test_sketch_of_a_head_left_to_autograd_is_that_of_the_model():
    model = planted(cap)
    with torch.no_grad():
        model.lm_head.weight.normal_().mul_(3)
    sketcher = GradientSketcher(model, SPEC)
    rows = samples()
    got = sketcher(*pad(rows)).double()
    for i, row in enumerate(rows):
        wanted, _ = autograd_sketch(model, sketcher, *row)
        assert (got[i] - wanted).norm() <= FP32_RELATIVE * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model", "form"),
    [
        (lambda: planted(cap, logits_soft_cap=30.0), (30.0, 1.0)),
        (lambda: planted(lambda x: cap(x / 7), final_logit_softcapping=30, logits_scaling=7), (30.0, 1 / 7)),
        (lambda: planted(lambda x: x * 7, logits_scaling=7), (None, 7.0)),
        # MiniCPM divides the hidden states, in the model's dtype.
        (lambda: planted(lambda x: x, lambda h: h / (32 / 12), dim_model_base=12), (None, 12 / 32)),
        # Settings that the head does not use.
        (lambda: planted(lambda x: x, logits_scaling=8, final_logit_softcapping=5.0), (None, 1.0)),
        # Mamba casts hidden states to the head's dtype, and logits to float32.
        (lambda: planted(lambda x: x.float(), lambda h: h.to(h.new_empty(0).dtype)), (None, 1.0)),
    ],
)
def test_cap_and_scale_that_the_configuration_names_are_found(model, form, dtype):
    assert form_of(model().to(dtype)) == form


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_set_on_the_model_itself_is_found(dtype):
    model = build("cohere", MORE).to(dtype)
    model.logit_scale = 0.4
    assert form_of(model) == (None, 0.4)


def test_parameters_above_the_base_leave_the_head_to_autograd():
    model = planted(lambda x: x)
    assert form_of(model) == (None, 1.0)
    model.temperature = torch.nn.Parameter(torch.ones(()))
    layout = find_taps(model, exclude=["temperature"])
    assert find_head(model, layout.taps, layout.names) is None


def test_head_of_zeros_has_no_form():
    model = planted(lambda x: x)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert form_of(model) is None


def test_logits_that_are_not_finite_are_an_error():
    model = planted(lambda x: x)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(GvendiError, match="logits are not finite"):
        form_of(model)


def test_model_is_left_as_it_was_found():
    calls = []

    def fail_late(logits):
        calls.append(logits)
        return logits if len(calls) == 1 else 1 / 0

    model = planted(fail_late).requires_grad_(False)

    def own(x):
        return torch.nn.functional.linear(x, model.lm_head.weight)

    # As a device map's hook does it, which leaves the layer what it is.
    model.lm_head.forward, model.lm_head._hf_hook = own, object()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        form_of(model)
    assert len(calls) == 2
    assert state_of(model) == before
    assert model.lm_head.forward is own


class Largest(TorchDispatchMode):
    """The largest float32 tensor that an operation gives, in bytes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        sizes = [4 * x.numel() for x in tensors if x.dtype == torch.float32]
        self.size = max(self.size, *sizes, 0)
        return out


def test_no_float32_copy_of_the_head_is_made():
    model = build("wide", {"wide": ("LlamaConfig", {**GATED, "vocab_size": 40000, "hidden_size": 128})})
    model = model.bfloat16().requires_grad_(False)
    layout = find_taps(model)
    with Largest() as largest:
        assert find_head(model, layout.taps, layout.names) is not None
    # The copy would be 20.5 MB; 8192 rows of it are 4.2 MB, and the trial's logits 2.6 MB.
    assert largest.size <= 8192 * 128 * 4 < 40000 * 128 * 4


@pytest.mark.soak
def test_compiled_model_has_the_head_of_the_plain_one():
    model = build("gemma2")
    wanted = form_of(copy.deepcopy(model))
    model.compile(backend="eager")
    assert form_of(model) == wanted


def test_a_model_that_changes_what_its_base_reads_is_left_to_autograd():
    model = build("llama_untied")

    class Scaled(type(model)):
        def forward(self, input_ids=None, inputs_embeds=None, **rest):
            return super().forward(inputs_embeds=3 * self.model.embed_tokens(input_ids), **rest)

    model.__class__ = Scaled
    layout = find_taps(model)
    assert find_head(model, layout.taps, layout.names) is None
