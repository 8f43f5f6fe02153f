"""A tap's sketches are the sketcher's own of the same samples, and the training step is the same to the bit."""

import copy
import gc
import pickle
import warnings
import weakref

import peft
import pytest
import torch
from exactness import off
from small_models import CONFIGS, SPEC, build

from gvendi_fast import GradientSketcher, GvendiError
from gvendi_fast.sketching.gradients.boundaries import find_samples
from gvendi_fast.sketching.gradients.training_tap import IncompleteWarning, PackingWarning

# Shared key and value heads, norms of heads before and after they change places, capped logits, transposed weights and
# learned positions, parallel layers with a biased head, a width above K.
NAMES = ["qwen3", "gemma3", "gemma2", "gpt2", "phi_biased_head", "llama_wide"]
LENGTHS = [9, 6, 11, 4]
ARCHITECTURES = pytest.mark.parametrize("name", NAMES)


def batch(seed=0):
    """Four samples, padded on the right: ids, labels and mask [4, 11]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.where(mask != 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(given, rows=((0, 1, 2, 3),), pad=0):
    """The samples of a batch put into rows one after the other, with positions; rows are filled up by `pad` or more."""
    parts = [[slice(0, LENGTHS[i]) for i in row] for row in rows]
    width = max(sum(LENGTHS[i] for i in row) for row in rows) + pad
    out = {name: torch.full((len(rows), width), fill) for name, fill in FILLS.items()}
    for place, row in enumerate(rows):
        at = 0
        for i, part in zip(row, parts[place], strict=True):
            n = LENGTHS[i]
            out["input_ids"][place, at : at + n] = given["input_ids"][i, part]
            out["labels"][place, at : at + n] = given["labels"][i, part]
            out["position_ids"][place, at : at + n] = torch.arange(n)
            at += n
    return {**out, "use_cache": False}


FILLS = {"input_ids": 0, "labels": -100, "position_ids": 0}


def deterministic(model):
    """In train mode without dropout, so that it can be compared with a pass in eval mode."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(scope="module")
def made():
    """{name: (model in train mode, its sketcher, the sketcher's own sketches of `batch()`)}, made when asked for."""
    kept = {}

    def get(name):
        if name not in kept:
            model = build(name)
            if name == "gpt2":
                model.config.attn_pdrop = 0.0
            sketcher = GradientSketcher(model, SPEC)
            given = batch()
            wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
            kept[name] = deterministic(model), sketcher, wanted
        model, sketcher, wanted = kept[name]
        model.zero_grad()
        model.gradient_checkpointing_disable()
        return model, sketcher, wanted

    return get


def micro_batches(given):
    return [{name: x[i : i + 1] for name, x in given.items()} for i in range(len(LENGTHS))]


@ARCHITECTURES
def test_padded_rows(made, name):
    model, sketcher, wanted = made(name)
    given = batch()
    with sketcher.tap(model) as tap:
        model(**given).loss.backward()
        found = tap.take()
    assert off(found.z, wanted) < 1e-5
    assert found.tokens.tolist() == [n - 2 for n in LENGTHS]
    assert (found.loss, found.tags) == (None, None)


@ARCHITECTURES
def test_rows_padded_on_the_left(made, name):
    model, sketcher, _ = made(name)
    given = {
        key: torch.stack([x.roll(max(LENGTHS) - n) for x, n in zip(v, LENGTHS, strict=True)])
        for key, v in batch().items()
    }
    # As generate() numbers them: padding has a position of a token's.
    positions = (given["attention_mask"].cumsum(1) - 1).masked_fill(given["attention_mask"] == 0, 1)
    wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
    with sketcher.tap(model) as tap:
        model(**given, position_ids=positions).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5


@ARCHITECTURES
def test_packed_rows(made, name):
    model, sketcher, wanted = made(name)
    with sketcher.tap(model) as tap, warnings.catch_warnings():
        warnings.simplefilter("error", PackingWarning)
        for pad in (0, 3):
            model(**packed(batch(), pad=pad)).loss.backward()
            found = tap.take()
            assert off(found.z, wanted) < 1e-5
            assert found.tokens.tolist() == [n - 2 for n in LENGTHS]


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_several_rows_of_packed_samples(made, name):
    model, sketcher, wanted = made(name)
    rows = ((2, 3), (0, 1))
    with sketcher.tap(model, tag="source") as tap:
        given = packed(batch(), rows)
        tags = torch.arange(given["input_ids"].numel()).view(given["input_ids"].shape)
        model(**given, source=tags).loss.backward()
        found = tap.take()
    assert off(found.z, wanted[[2, 3, 0, 1]]) < 1e-5
    assert found.tags.tolist() == [0, 11, 15, 24]


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "mask", "seq_idx", "function"])
def test_samples_of_a_row_by_other_arguments(made, how):
    model, sketcher, wanted = made("qwen3")
    given = packed(batch())
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    arguments = {
        "cu_seq_lens_q": {"cu_seq_lens_q": ends.int()},
        "mask": {},
        "seq_idx": {"seq_idx": numbers.int()},
        "function": {},
    }[how]
    chosen = {"function": lambda batch: torch.stack([ends[:-1], ends[1:]], dim=1)}.get(how)
    with sketcher.tap(model, samples=chosen) as tap:
        if how == "mask":
            # The model would take numbers of samples for a plain mask: attention crosses, which is said.
            with pytest.warns(PackingWarning, match="crosses samples"):
                model(**{**given, "attention_mask": numbers + 1}).loss.backward()
        else:
            model(**given, **arguments).loss.backward()
        found = tap.take()
    assert len(found.z) == len(LENGTHS)
    if how != "mask":
        assert off(found.z, wanted) < 1e-5


@ARCHITECTURES
def test_accumulated_over_four_micro_batches(made, name):
    model, sketcher, wanted = made(name)
    with sketcher.tap(model) as tap:
        for part in micro_batches(batch()):
            (model(**part).loss / 4).backward()
        assert off(tap.take().z, wanted) < 1e-5
        # Several forward passes before one backward pass, the last one not a part of it.
        losses = [model(**part).loss for part in micro_batches(batch())]
        sum(losses[:3]).backward()
        assert off(tap.take().z, wanted[:3]) < 1e-5
        losses[3].backward()
        assert off(tap.take().z, wanted[3:]) < 1e-5


@ARCHITECTURES
def test_autocast_and_a_gradient_scaler(made, name):
    model, sketcher, wanted = made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with sketcher.tap(model) as tap, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
        scaler.scale(loss).backward()
        assert off(tap.take().z, wanted) < 1e-3


@ARCHITECTURES
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_activation_checkpoints(made, name, reentrant):
    model, sketcher, wanted = made(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with sketcher.tap(model) as tap:
        model(**batch()).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5
        # A part that is run again belongs to its own forward pass.
        sum(model(**part).loss for part in micro_batches(batch())).backward()
        assert off(tap.take().z, wanted) < 1e-5
    if reentrant:
        model.disable_input_require_grads()


def trained(name, tapped, steps=20):
    """The weights after some steps with dropout, clipping and checkpoints, with a tap or without."""
    model = build(name).train()
    sketcher = GradientSketcher(model, SPEC) if tapped else None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if tapped:
        tap = sketcher.tap(model).attach()
    for step in range(steps):
        given = batch(step) if step % 2 else packed(batch(step))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 3 == 0):
            model(**given).loss.backward()
        if tapped:
            assert tap.take().z.isfinite().all()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_the_trained_weights_are_the_same_to_the_bit(name):
    assert all(torch.equal(a, b) for a, b in zip(trained(name, True), trained(name, False), strict=True))


def test_other_losses_and_heads_that_see_some_tokens(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()
    labels = given.pop("labels")
    with sketcher.tap(model) as tap:
        # A loss of one's own: by sample, weighted, the head seeing the last tokens alone.
        logits = model(**given, logits_to_keep=max(LENGTHS) - 1).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 2:], reduction="none").sum(
            1
        )
        (loss * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        z = tap.take().z
        assert off(z * torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None], wanted) < 1e-5
        # The base and the head by themselves.
        hidden = model.model(**given).last_hidden_state
        torch.nn.functional.cross_entropy(
            model.lm_head(hidden)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum"
        ).backward()
        assert off(tap.take().z, wanted) < 1e-5
        # Label smoothing, against autograd's gradient of every sample.
        smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
        smoothed(model(**given).logits[:, :-1].transpose(1, 2), labels[:, 1:]).backward()
        z = tap.take().z
    apart = []
    for i in range(len(LENGTHS)):
        with sketcher.tap(model) as tap:
            one = model(**{name: x[i : i + 1] for name, x in given.items()}).logits[:, :-1].transpose(1, 2)
            smoothed(one, labels[i : i + 1, 1:]).backward()
            apart.append(tap.take().z)
    assert off(z, torch.cat(apart)) < 1e-5


def test_groups_of_parameters_and_the_last_blocks(made):
    model, _, _ = made("llama_wide")
    given = batch()
    arguments = given["input_ids"], given["labels"], given["attention_mask"]
    for options in ({"groups": "kind"}, {"layers": "last-1"}, {"exclude": ["*embed_tokens*", "lm_head*"]}):
        sketcher = GradientSketcher(model, SPEC, **options)
        wanted = sketcher.sketch(*arguments)
        with sketcher.tap() as tap:
            model(**given).loss.backward()
            found = tap.take()
        assert off(found.z, wanted.z) < 1e-5
        if "groups" in options:
            assert off(found.by_group.flatten(0, 1), wanted.by_group.flatten(0, 1)) < 1e-5
        if "layers" in options:
            assert [".layers.1." in name for name in sketcher.parameters] == [True] * 9


@pytest.mark.parametrize("parameters", ["adapters", "base"])
def test_adapters_and_the_frozen_weights_under_them(parameters):
    model = peft.get_peft_model(build("qwen3"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(3))
    sketcher = GradientSketcher(model, SPEC, parameters=parameters)
    given = batch()
    wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.train()
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**given).loss.backward()
        plain = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        with sketcher.tap(model) as tap:
            model(**given).loss.backward()
            assert off(tap.take().z, wanted) < 1e-5
        tapped = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        model.zero_grad()


def test_a_detached_tap_leaves_the_model_as_it_was(made):
    model, sketcher, _ = made("qwen3")
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    tap = sketcher.tap(model)
    for _ in range(3):
        with tap:
            model(**batch()).loss.backward()
            tap.take()
    assert {path: set(vars(m)) for path, m in model.named_modules()} == {p: set(v) for p, v in before.items()}
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(not p._backward_hooks for p in model.parameters())
    copy.deepcopy(model)


def test_passes_without_gradients_are_left_alone(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()
    with sketcher.tap(model, tag="source") as tap:
        loss = model(**given, source=torch.arange(4)).loss
        with torch.no_grad():
            model(**given, source=torch.arange(4))
            model.generate(given["input_ids"][:1, :4], max_new_tokens=2)
        # A pass of the sketcher itself over the model that is tapped.
        assert off(sketcher(given["input_ids"], given["labels"], given["attention_mask"]), wanted) < 1e-5
        loss.backward()
        found = tap.take()
    assert off(found.z, wanted) < 1e-5
    assert found.tags.tolist() == [0, 1, 2, 3]


def test_a_step_that_fails_leaves_no_trace(made):
    model, sketcher, wanted = made("gpt2")
    with sketcher.tap(model) as tap:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 5), 1000))
        model(**batch()).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5


def test_a_forward_pass_that_is_not_used_is_forgotten_with_its_graph(made):
    model, sketcher, wanted = made("qwen3")
    with sketcher.tap(model) as tap:
        unused = model(**batch()).logits
        gone = weakref.ref(unused)
        model(**batch()).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5
        del unused
        gc.collect()
        assert gone() is None


def test_a_second_backward_pass_over_a_graph_is_added_as_weights_add_it(made):
    model, sketcher, _ = made("qwen3")
    with sketcher.tap(model) as tap:
        loss = model(**batch()).loss
        loss.backward(retain_graph=True)
        first = tap.take().z
        loss.backward(retain_graph=True)
        loss.backward()
        assert torch.allclose(tap.take().z, 2 * first)


def kept_bytes(run):
    """Bytes that autograd keeps from a forward to its backward pass, each storage once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    del out
    return sum(kept.values())


def test_what_is_kept_is_at_most_k_numbers_a_token_and_input(made):
    model, sketcher, _ = made("llama_wide")
    given = batch()
    tokens = given["input_ids"].numel()
    plain = kept_bytes(lambda: model(**given).loss)
    with sketcher.tap(model) as tap:
        tapped = kept_bytes(lambda: model(**given).loss)
        wide = [group for group in tap._tapped.groups if group.transform]
        # The inputs of the two down projections, 300 wide, are kept as K = 128 numbers; others are there anyway.
        assert [group.path.rpartition(".")[2] for group in wide] == ["down_proj", "down_proj"]
        small = 65536
        assert tapped - plain <= len(wide) * tokens * 4 * SPEC.dim + small
        assert tapped - plain >= len(wide) * tokens * 4 * SPEC.dim


def said(call, error=GvendiError):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_wrong_use_is_said_in_a_sentence(made):
    model, sketcher, _ = made("qwen3")
    given = batch()
    tap = sketcher.tap(model)
    assert "not attached" in said(tap.take)
    with tap:
        assert "attached already" in said(tap.attach)
        assert "has a tap attached already" in said(sketcher.tap(model).attach)
        assert "no forward pass" in said(tap.take)
        loss = model(**given).loss
        assert "call loss.backward() before take()" in said(tap.take)
        torch.autograd.grad(loss, model.lm_head.weight)
        assert "reaches weights alone" in said(lambda: (model(**given), tap.take()))
        assert "without input_ids" in said(lambda: model.model(inputs_embeds=None))
        assert "detach the tap first" in said(lambda: copy.deepcopy(model))
        assert "detach the tap first" in said(lambda: pickle.dumps(model))
        assert "cannot be copied" in said(lambda: copy.deepcopy(tap))
        ids = given["input_ids"].clone()
        loss = model(input_ids=ids, labels=given["labels"]).loss
        ids[0, 0] += 1
        assert "changed in place" in said(loss.backward)
        # The layer that another model takes for its own.
        other = torch.nn.Sequential(model.model.layers[0].mlp)
        assert "another model that shares it" in said(lambda: other(torch.randn(1, 4, 32)))
        with torch.no_grad():
            other(torch.randn(1, 4, 32))
    with sketcher.tap(model, tag="source"):
        assert "'source', the tag of the batch" in said(
            lambda: model(**given, source=torch.zeros(3, dtype=torch.int64))
        )
    with sketcher.tap(model, samples=lambda batch: [[0, 5], [3, 9]]):
        assert "in order and apart" in said(lambda: model(**given))
    assert "not of the sketcher's kind" in said(lambda: sketcher.tap(build("gpt2")))


def test_weights_that_are_frozen_or_thawed_after_the_sketcher_was_made():
    model = build("qwen3")
    sketcher = GradientSketcher(model, SPEC)
    model.model.embed_tokens.weight.requires_grad_(False)
    assert "is frozen in the tapped model" in said(sketcher.tap(model).attach)
    sketcher = GradientSketcher(model, SPEC)
    model.model.embed_tokens.weight.requires_grad_(True)
    assert "was frozen when the sketcher was made" in said(sketcher.tap(model).attach)


def test_a_loss_that_takes_the_heads_weight_itself_is_not_missed_in_silence(made):
    model, sketcher, _ = made("qwen3")
    given = batch()
    with sketcher.tap(model) as tap:
        hidden = model.model(input_ids=given["input_ids"]).last_hidden_state
        (hidden @ model.lm_head.weight.T).logsumexp(-1).sum().backward()
        assert "'lm_head.weight' is trained without running its layer" in said(tap.take)
        # Without the head in the loss nothing is missing.
        hidden = model.model(input_ids=given["input_ids"]).last_hidden_state
        hidden.square().sum().backward()
        assert tap.take().z.shape == (4, SPEC.dim)


def test_another_model_of_the_kind_is_tapped(made):
    _, sketcher, wanted = made("gemma2")
    other = deterministic(build("gemma2"))
    with sketcher.tap(other) as tap:
        other(**batch()).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5
    assert set(NAMES) <= set(CONFIGS)


@pytest.mark.parametrize("name", ["qwen2_tied", "gemma2"])
def test_the_fused_head_of_trl(name):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    model = deterministic(build(name))
    sketcher = GradientSketcher(model, SPEC)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    given = batch()
    weights = torch.linspace(0.5, 2, max(LENGTHS) - 1)
    targets = given["labels"][:, 1:]
    kept = (targets != -100) * weights
    with sketcher.tap(model) as tap:
        out = model(**given, fused_lm_head=True)
        (-(out.log_probs * kept).sum() - 0.1 * (out.entropy * kept).sum()).backward()
        fused = tap.take().z
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
        log_p = (logits / 0.7).log_softmax(-1)
        of_target = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        (-(of_target * kept).sum() - 0.1 * (entropy * kept).sum()).backward()
        assert off(fused, tap.take().z) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_tokens_that_are_looked_up_outside_of_the_model_are_refused(made, name):
    model, sketcher, _ = made(name)
    with sketcher.tap(model):
        assert "outside of a forward pass" in said(lambda: model.get_input_embeddings()(batch()["input_ids"]))


def test_a_gradient_of_a_gradient_is_refused_and_a_graph_of_it_alone_is_not(made):
    model, sketcher, wanted = made("qwen3")
    with sketcher.tap(model) as tap:
        model(**batch()).loss.backward(create_graph=True)
        assert off(tap.take().z, wanted) < 1e-5
        model.zero_grad()
        out = model(**batch(), output_hidden_states=True)
        (slope,) = torch.autograd.grad(out.loss, out.hidden_states[0], create_graph=True)
        assert "is itself differentiated" in said((out.loss + slope.square().sum()).backward)


def test_a_head_for_metrics_and_a_loss_that_takes_its_weight(made):
    model, sketcher, _ = made("qwen3")
    given = batch()
    with sketcher.tap(model) as tap:
        hidden = model.model(input_ids=given["input_ids"]).last_hidden_state
        with torch.no_grad():
            model.lm_head(hidden)
        (hidden @ model.lm_head.weight.T).logsumexp(-1).sum().backward()
        assert "without running its layer" in said(tap.take)


def test_two_results_of_the_base_and_then_their_heads(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()
    with sketcher.tap(model) as tap:
        parts = [{"input_ids": given["input_ids"][i : i + 2]} for i in (0, 2)]
        results = [model.model(**part).last_hidden_state for part in parts]
        logits = torch.cat([model.lm_head(result) for result in results])
        torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), given["labels"][:, 1:], reduction="sum"
        ).backward()
        assert off(tap.take().z, wanted) < 1e-5


def test_layers_that_are_dropped_at_random_under_accumulation():
    model = build("opt")
    sketcher = GradientSketcher(model, SPEC)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.5
    torch.manual_seed(0)
    with sketcher.tap(model) as tap:
        for _ in range(4):
            for part in micro_batches(batch()):
                model(**part).loss.backward()
            assert tap.take().z.isfinite().all()


def test_a_tied_head_that_the_loss_does_without():
    model = deterministic(build("qwen2_tied"))
    sketcher = GradientSketcher(model, SPEC)
    with sketcher.tap(model) as tap:
        model.model(input_ids=batch()["input_ids"]).last_hidden_state.square().sum().backward()
        assert tap.take().z.shape == (4, SPEC.dim)
        # Where the model itself takes the weight, its graph shows it.
        own = model.forward
        model.forward = lambda **given: {
            "logits": model.model(**given).last_hidden_state @ model.lm_head.weight.T
        }
        model(input_ids=batch()["input_ids"])["logits"].square().sum().backward()
        assert "without running its layer 'lm_head'" in said(tap.take)
        model.forward = own


class Interrupted(BaseException):
    """Stands for a KeyboardInterrupt."""


def test_a_forward_pass_that_is_interrupted(made):
    model, sketcher, wanted = made("qwen3")

    def interrupt(*_):
        raise Interrupted

    with sketcher.tap(model, tag="source") as tap:
        for entry in (model, model.model):
            hook = model.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(Interrupted):
                entry(input_ids=batch()["input_ids"][:1], source=torch.arange(1))
            hook.remove()
            model(**batch(), source=torch.arange(4)).loss.backward()
            found = tap.take()
            assert off(found.z, wanted) < 1e-5
            assert found.tags.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("positions", ["clamped", "masked"])
def test_padding_on_the_left_without_a_mask_is_no_sample(positions):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    numbers = mask.cumsum(1) - 1
    given = {
        "clamped": {"position_ids": numbers.clamp(min=0)},
        "masked": {"position_ids": numbers.masked_fill(mask == 0, 1), "attention_mask": mask},
    }[positions]
    found = find_samples(given, 2, 6)
    assert len(found) == 2
    assert found.at_first_tokens(torch.tensor([7, 8])).tolist() == [7, 8]


def test_a_norm_of_the_flattened_packed_batch():
    class Block(torch.nn.Module):
        def __init__(self, own, width):
            super().__init__()
            self.own, self.norm = own, torch.nn.LayerNorm(width)

        def forward(self, x):
            return self.own(self.norm(x.reshape(-1, x.shape[-1])).reshape(x.shape))

    model = build("qwen3")
    model.model.layers[0].mlp = Block(model.model.layers[0].mlp, 32)
    sketcher = GradientSketcher(deterministic(model), SPEC)
    given = batch()
    wanted = sketcher(given["input_ids"], given["labels"], given["attention_mask"])
    with sketcher.tap(model) as tap:
        model(**packed(given)).loss.backward()
        assert off(tap.take().z, wanted) < 1e-5


@pytest.mark.parametrize("keep", [7, torch.arange(3, 30, 2)], ids=["last", "some"])
def test_a_head_that_is_asked_for_some_tokens_of_packed_rows(made, keep):
    model, sketcher, _ = made("qwen3")
    given = packed(batch())
    del given["labels"]
    whole = torch.zeros(30)
    places = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    whole[places] = torch.linspace(1, 2, len(whole[places]))
    with sketcher.tap(model) as tap:
        logits = model(**given, logits_to_keep=keep).logits
        weights = whole[whole != 0]
        (logits.logsumexp(-1)[0] * weights).sum().backward()
        found = tap.take().z
        (model(**given).logits.logsumexp(-1)[0] * whole).sum().backward()
        wanted = tap.take().z
    live = wanted.norm(dim=1) > 0
    assert int(live.sum()) >= 2
    assert off(found[live], wanted[live]) < 1e-5
    assert torch.equal(found[~live], wanted[~live])


def test_what_is_trained_changes_while_the_tap_is_attached():
    model = build("qwen3")
    model.model.embed_tokens.weight.requires_grad_(False)
    with GradientSketcher(model, SPEC).tap(model) as tap:
        model(**batch()).loss.backward()
        assert tap.take().z.isfinite().all()
        model.model.embed_tokens.weight.requires_grad_(True)
        assert "was frozen when the sketcher was made" in said(lambda: model(**batch()))


def test_a_checkpoint_around_the_whole_model(made):
    model, sketcher, wanted = made("qwen3")

    def whole(reentrant, i=None):
        given = packed(batch()) if i is None else batch(i)
        # The batch needs a gradient itself for a re-entrant checkpoint to have one.
        return torch.utils.checkpoint.checkpoint(
            lambda _: model(**given).loss, torch.zeros((), requires_grad=True), use_reentrant=reentrant
        )

    with sketcher.tap(model) as tap:
        for reentrant in (False, True):
            whole(reentrant).backward()
            assert off(tap.take().z, wanted) < 1e-5
            for i in (1, 0):
                whole(reentrant, i).backward()
            assert off(tap.take().z[4:], wanted) < 1e-5
        # Two micro-batches and one backward pass.
        (whole(False, 1) + whole(False)).backward()
        assert off(tap.take().z[4:], wanted) < 1e-5


def test_a_head_on_a_cut_graph(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()

    def cut(i):
        hidden = model.model(input_ids=given["input_ids"][i : i + 2]).last_hidden_state
        return hidden, hidden.detach().requires_grad_(), given["labels"][i : i + 2, 1:]

    def back(hidden, apart, labels):
        logits = model.lm_head(apart)[:, :-1].transpose(1, 2)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        hidden.backward(apart.grad)

    with sketcher.tap(model) as tap:
        for i in (0, 2):
            back(*cut(i))
        assert off(tap.take().z, wanted) < 1e-5
        first, _ = cut(0), cut(2)
        assert "of which of 2 forward passes is not known" in said(lambda: back(*first))


def test_a_checkpointed_head_of_two_passes(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()

    def loss(i, reentrant):
        hidden = model.model(input_ids=given["input_ids"][i : i + 2]).last_hidden_state

        def head(x):
            logits = model.lm_head(x)[:, :-1].transpose(1, 2)
            return torch.nn.functional.cross_entropy(logits, given["labels"][i : i + 2, 1:], reduction="sum")

        return torch.utils.checkpoint.checkpoint(head, hidden, use_reentrant=reentrant)

    with sketcher.tap(model) as tap:
        for reentrant in (False, True):
            losses = [loss(0, reentrant), loss(2, reentrant)]
            if reentrant:
                assert "which of 2 forward passes is not known" in said(losses[0].backward)
                continue
            for one in losses:
                one.backward()
            assert off(tap.take().z, wanted) < 1e-5


def test_transforms_of_functions_are_refused(made):
    model, sketcher, _ = made("qwen3")
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, kwargs=batch()).loss

    with sketcher.tap(model):
        assert "transform of torch.func" in said(lambda: torch.func.grad(loss)(weights))


def test_a_sketcher_is_made_of_a_tapped_model(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()
    with sketcher.tap(model) as tap:
        loss = model(**given).loss
        # Between the forward and the backward pass, where the head by itself would be of the pass before.
        own = GradientSketcher(model, SPEC)(given["input_ids"], given["labels"], given["attention_mask"])
        loss.backward()
        assert off(tap.take().z, wanted) < 1e-5
        assert off(own, wanted) < 1e-5


def test_a_head_by_itself_on_slices_in_order_and_on_nothing_else(made):
    model, sketcher, wanted = made("qwen3")
    given = batch()
    flat = given["labels"][:, 1:].reshape(-1)
    with sketcher.tap(model) as tap:
        hidden = model.model(input_ids=given["input_ids"]).last_hidden_state
        logits = model.lm_head(hidden[:, :-1].reshape(-1, hidden.shape[-1]))
        torch.nn.functional.cross_entropy(logits, flat, reduction="sum").backward()
        assert off(tap.take().z, wanted) < 1e-5
        hidden = model.model(input_ids=given["input_ids"]).last_hidden_state
        for other in (
            hidden[torch.tensor([3, 1, 0, 2])],
            hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]),
            hidden[:2],
            hidden[given["labels"] != -100],
        ):
            assert "on tokens that are not told apart" in said(lambda other=other: model.lm_head(other))


def test_a_part_of_the_gradient_that_goes_past_the_layers_is_told_once(made):
    model, sketcher, _ = made("qwen2_tied")

    def step():
        (model(**batch()).loss + model.model.embed_tokens.weight.square().sum()).backward()

    with sketcher.tap(model) as tap:
        step()
        with pytest.warns(IncompleteWarning, match=r"do not add up to the sketch of its gradient: [0-9.]+%"):
            tap.take()
        step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tap.take()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_groups_of_two_passes_under_checkpoints(made, reentrant):
    model, _, _ = made("llama_wide")
    sketcher = GradientSketcher(model, SPEC, groups="kind")
    given = batch()
    wanted = sketcher.sketch(given["input_ids"], given["labels"], given["attention_mask"]).by_group
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with sketcher.tap(model) as tap:
        sum(model(**part).loss for part in micro_batches(given)).backward()
        found = tap.take().by_group
    if reentrant:
        model.disable_input_require_grads()
    assert off(found.flatten(0, 1), wanted.flatten(0, 1)) < 1e-5
