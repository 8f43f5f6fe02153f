"""A model without its wrappers, and the canonical names of its parameters.

The sketch matrix is keyed by a parameter's name, so what torch.compile, an activation checkpoint, a data-parallel
wrapper or PEFT put into a name would give another matrix, and silently another sketch. A canonical name is the one that
the parameter has in the plain model. It is told by the classes of the modules on its path: a module of one's own that
is called `module` or `base_layer` keeps its name.

For as long as a pass runs, wrappers that hand their arguments on are taken out of the tree (`as_plain`): no parameter
requires a gradient then, so there is nothing that they could reduce, recompute or compile. Weights that fully_shard
has sharded are gathered. What would change the numbers is refused.
"""

from __future__ import annotations

import fnmatch
import glob
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing

# (file, class, attribute of the module inside) of wrappers that hand their arguments on. Of a file that nobody has
# imported there is no object, so none is imported for this.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("peft.peft_model", "PeftModel", "base_model"),
    ("peft.mixed_model", "PeftMixedModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
)
# Modules that stay in the tree, and whose child of this name is the module that they were put around.
_AROUND = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "base_layer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", "original_module"),
    ("peft.utils.other", "ModulesToSaveWrapper", "original_module"),
)
# Its weights have no names of their own.
_FSDP1 = ("torch.distributed.fsdp", "FullyShardedDataParallel", "")
# What `_wrapped_as` has found.
_known: weakref.WeakKeyDictionary[type, tuple[tuple[str, str, str], ...]] = weakref.WeakKeyDictionary()
# What a name alone tells: nobody calls a module of their own so.
_PREFIXES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# AdaLoRA's adds a term to a loss that transformers computes, which no pass asks for.
_TUNERS_AS_BASE = ("AdaLoraModel",)
# Where the hooks of fully_shard are written.
_SHARDING = "torch.distributed.fsdp"


def plain_model(model: nn.Module, stays: bool = False) -> nn.Module:
    """The model inside its outer wrappers, or itself. Raises GvendiError for one whose numbers are not the model's.

    stays: the wrappers will run, so that hooks of theirs are nothing to refuse.
    """
    while (inner := _inside(model, stays)) is not None:
        model = inner
    return model


def check_trained(model: nn.Module) -> None:
    """Raises GvendiError for a model whose own training step does not run its layers here, each by its whole weight."""
    for path, module in model.named_modules():
        _check_flat(module)
        if is_a(module, "torch.nn.parallel.data_parallel", "DataParallel"):
            raise GvendiError(
                "the model is wrapped in DataParallel, whose threads run copies of its layers; start one process for "
                "each GPU (torchrun) and wrap it in DistributedDataParallel"
            )
        _check_weights(module)
        _check_parallel(path, module)


def canonical_name(name: str) -> str:
    """The canonical name by the spelling of a name (or of a pattern of names) alone, without its model.

    `module.` and `base_model.model.` are dropped where the name begins so, since a model may have modules of these
    names further down.

        canonical_name("module._orig_mod.model.norm.weight")            # "model.norm.weight"
        canonical_name("base_model.model.lm_head.base_layer.weight")    # "lm_head.weight"
    """
    parts = name.split(".")
    while True:
        if parts[:1] == ["module"] and len(parts) > 1:
            parts = parts[1:]
        elif parts[:2] == ["base_model", "model"] and len(parts) > 2:
            parts = parts[2:]
        elif parts[0] in _PREFIXES and len(parts) > 1:
            parts = parts[1:]
        else:
            break
    kept = [part for part in parts if part not in (*_PREFIXES, "base_layer", "original_module")]
    if len(kept) > 3 and kept[-3] == "parametrizations" and kept[-1] == "original":
        kept[-3:] = [kept[-2]]
    return ".".join(kept)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical path, module) of every module, once, in the order of `model.named_modules()`."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        passed = _passed_by(module)
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(path if name in passed else _joined(path, name), child)

    return walk("", model)


def named_parameters(
    model: nn.Module, stored: Mapping[int, tuple[Tensor, Mapping[str, Tensor]]] | None = None
) -> dict[str, Tensor]:
    """{canonical name: parameter}, in the order of `model.named_parameters()`; a tied one under its first name.

    stored: of layers whose weight is in a code, {id of the module: (the tensor that stands for its weight, all tensors
        of the code)}.
    Raises GvendiError where two parameters have one canonical name.
    """
    found: dict[str, Tensor] = {}
    raw: dict[str, str] = {}
    own_paths = {id(module): path for path, module in model.named_modules()}
    seen: set[int] = set()
    for path, module in named_modules(model):
        own: dict[str, Tensor | None] = dict(module._parameters)
        if stored and id(module) in stored:
            weight, parts = stored[id(module)]
            own = {"weight": weight, **{local: p for local, p in own.items() if local not in parts}}
        for local, parameter in own.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = _of_parameter(path, module, local)
            written = _joined(own_paths[id(module)], local)
            if name in found:
                raise GvendiError(
                    f"the parameters {raw[name]!r} and {written!r} both have the canonical name {name!r}, which tells "
                    "them apart in no sketch; rename one, or give the model without the wrapper between them"
                )
            found[name], raw[name] = parameter, written
    return found


def written_names(written: Sequence[tuple[str, nn.Module]], plain: nn.Module) -> dict[str, str]:
    """{name as the model writes it: canonical name}.

    written: `named_modules()` of the model as it was given, with its wrappers. plain: the model inside `as_plain`.
    """
    canonical = {id(module): path for path, module in named_modules(plain)}
    return {
        _joined(path, local): _of_parameter(canonical[id(module)], module, local)
        for path, module in written
        if id(module) in canonical
        for local, parameter in module._parameters.items()
        if parameter is not None
    }


def by_canonical_name(patterns: Sequence[str], written: Mapping[str, str]) -> list[str]:
    """Shell patterns of parameter names as patterns of canonical names.

    written: {name as the model writes it: canonical name}. One that matches a canonical name stays as it is, and so
    does one that matches nothing at all, which is an error elsewhere; one that matches names as the model writes them,
    or that wrappers would have written, becomes the names of those parameters.
    """
    found: list[str] = []
    for pattern in patterns:
        plain = list(dict.fromkeys(written.values()))
        if not fnmatch.filter(plain, pattern):
            names = [written[name] for name in fnmatch.filter(written, pattern)]
            names = names or fnmatch.filter(plain, canonical_name(pattern))
            if names:
                found += [glob.escape(name) for name in dict.fromkeys(names)]
                continue
        found.append(pattern)
    return found


@contextmanager
def as_plain(model: nn.Module, stands_in: bool = True) -> Iterator[None]:
    """The plain model's tree inside, as it was outside: no wrappers, nothing compiled by others, whole weights.

    model: as `plain_model` gives it. stands_in: whether a model on the meta device has values inside.
    Raises GvendiError where its numbers would not be those of the plain model.
    """
    with undoing() as undo:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is not None and (inner := plain_model(child)) is not child:
                    undo.append(partial(parent._modules.__setitem__, name, child))
                    parent._modules[name] = inner
        for module in list(model.modules()):
            _check_weights(module)
            _uncompile(module, undo)
        _gather(model, undo)
        if stands_in:
            _stand_in(model, undo)
        with ExitStack() as stack:
            # Mixed precision around the call would be another model's, as that of a forward is.
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield


def check_causal_lm(model: nn.Module) -> None:
    """Raises GvendiError for what is no causal LM of transformers, such as a wrapper that is not known."""
    if not callable(getattr(model, "get_input_embeddings", None)):
        inside = [name for name, child in model.named_children() if hasattr(child, "get_input_embeddings")]
        remedy = f"give the model inside, model.{inside[0]}" if inside else "give the causal LM itself"
        raise GvendiError(
            f"model is a {type(model).__name__}, which has no get_input_embeddings() as the causal LMs of transformers "
            f"have; {remedy}"
        )


def is_a(module: nn.Module, file: str, name: str) -> bool:
    """Whether a module is of a class of a file that need not have been imported."""
    kind = _class(file, name)
    return kind is not None and isinstance(module, kind)


def _inside(module: nn.Module, stays: bool = False) -> nn.Module | None:
    """The module that a wrapper was put around; None for what is no wrapper."""
    kinds = _wrapped_as(type(module))
    if not kinds:
        return None
    _check_flat(module)
    for kind in _WRAPPERS:
        if kind in kinds:
            _, name, attribute = kind
            _check_wrapper(module, name, stays)
            return getattr(module, attribute)
    return None


def _check_flat(module: nn.Module) -> None:
    if _FSDP1 in _wrapped_as(type(module)):
        raise GvendiError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which keeps its weights as parts of flat "
            "vectors, without names and shapes of their own; shard it with torch.distributed.fsdp.fully_shard, which "
            "is sketched as the plain model, or load its checkpoint into a model without the wrapper"
        )


def _check_wrapper(module: nn.Module, name: str, stays: bool) -> None:
    """Raises GvendiError for a wrapper that does more than to hand its arguments on."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if not stays and not all(_is_of(hook, _SHARDING) for hook in hooks):
        raise GvendiError(
            f"the wrapper {name} has forward hooks of its own, and a pass takes the wrapper off; register them on the "
            "module inside it, or remove them while sketches are taken"
        )
    if name in ("PeftModel", "PeftMixedModel"):
        _check_adapters(module)


def _check_adapters(model: nn.Module) -> None:
    tuner = model.base_model
    kind = type(tuner).__name__
    base = _class("peft.tuners.tuners_utils", "BaseTuner")
    forwards = type(tuner).forward is getattr(base, "forward", None) or kind in _TUNERS_AS_BASE
    if base is None or not isinstance(tuner, base) or not forwards:
        raise GvendiError(
            f"the PEFT model's {kind} changes what its model reads (virtual tokens, a pass of its own), so samples are "
            "not told apart as in the plain model; merge the adapter (merge_and_unload()) or give the base model "
            "(get_base_model())"
        )
    for adapter, config in model.peft_config.items():
        if getattr(config, "alora_invocation_tokens", None):
            raise GvendiError(
                f"the PEFT adapter {adapter!r} is an activated LoRA, which works from its invocation tokens on alone; "
                "give the base model (get_base_model())"
            )


def _check_weights(module: nn.Module) -> None:
    """Raises GvendiError for a module whose weights are not there, or give no gradient to its input."""
    where = f"the {type(module).__name__} of the model"
    if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        raise GvendiError(
            f"{where} is quantised by torch.ao, whose kernels hand no gradient on; give the model that was quantised"
        )
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if parameter.is_meta and hasattr(module, "_hf_hook"):
            raise GvendiError(
                f"{where} has its {name} offloaded by accelerate, which gives it values for its own forward alone; "
                "load the model whole onto one device, or dispatch it without offloading"
            )
        if hasattr(parameter, "ds_id"):
            raise GvendiError(
                f"{where} has its {name} partitioned by DeepSpeed (ZeRO stage 3); load the checkpoint into a model "
                "without it, or shard the model with torch.distributed.fsdp.fully_shard"
            )


def _uncompile(module: nn.Module, undo: list[Callable[[], object]]) -> None:
    """What `module.compile()`, a compiled or an autocast forward put into a module's own attributes is put aside."""
    own = module.__dict__
    if own.get("_compiled_call_impl") is not None:
        undo.append(partial(own.__setitem__, "_compiled_call_impl", own["_compiled_call_impl"]))
        own["_compiled_call_impl"] = None
    forward = own.get("forward")
    # Of accelerate's mixed precision, then of torch.compile(module.forward).
    before = own.get("_original_forward") or getattr(forward, "_torchdynamo_orig_callable", None)
    if forward is None or before is None:
        return
    undo.append(partial(own.__setitem__, "forward", forward))
    is_own = getattr(before, "__self__", None) is module and before.__func__ is type(module).forward
    if is_own:
        del own["forward"]
    else:
        own["forward"] = before


def _gather(model: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Weights that are sharded are whole inside, on every rank, and fully_shard's hooks are put aside.

    With the hooks go the casts of its mixed precision: the weights are those of the plain model.
    """
    kind = _class("torch.distributed.tensor", "DTensor")
    if kind is None:
        return
    whole: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        _check_parallel(path, module)
        for place in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, place)
            others = [item for item in hooks.items() if not _is_of(item[1], _SHARDING)]
            if len(others) < len(hooks):
                undo.append(partial(module.__dict__.__setitem__, place, hooks))
                module.__dict__[place] = OrderedDict(others)
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, kind):
                continue
            undo.append(partial(module._parameters.__setitem__, name, parameter))
            if id(parameter) not in whole:
                if parameter.is_meta:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                else:
                    values = parameter.detach().full_tensor()
                whole[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]


def _stand_in(model: nn.Module, undo: list[Callable[[], object]]) -> None:
    """The tensors of a model on the meta device have values inside, by which it can be looked at: one a shape."""
    if not all(x.is_meta for x in model.parameters()):
        return
    values: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
    inside: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def of(x: Tensor) -> Tensor:
        key = x.shape, x.dtype
        if key not in values:
            drawn = torch.rand(x.shape, generator=generator).add_(0.5)
            values[key] = (drawn / x.shape[-1] if x.dim() > 1 else drawn).to(x.dtype)
        return values[key]

    for module in list(model.modules()):
        for table in (module._parameters, module._buffers):
            for name, x in table.items():
                if x is None or not x.is_meta:
                    continue
                undo.append(partial(table.__setitem__, name, x))
                if id(x) not in inside:
                    is_parameter = isinstance(x, nn.Parameter)
                    inside[id(x)] = nn.Parameter(of(x), x.requires_grad) if is_parameter else of(x)
                table[name] = inside[id(x)]


def _check_parallel(path: str, module: nn.Module) -> None:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    own = module.__dict__.get("forward")
    if any(_is_of(hook, "torch.distributed.tensor") for hook in hooks) or _is_of(
        own, "transformers.distributed"
    ):
        where = f"the {type(module).__name__} {canonical_name(path)!r} of the model"
        raise GvendiError(
            f"{where} is split over devices (tensor parallel), where no rank has a layer's whole input and output; "
            "load the model without a tp_plan"
        )


def _passed_by(module: nn.Module) -> set[str]:
    """The names of a module's children whose place in a path does not count."""
    return {attribute for *_, attribute in _wrapped_as(type(module)) if attribute in module._modules}


def _of_parameter(path: str, module: nn.Module, local: str) -> str:
    """The canonical name of a module's own parameter."""
    listed = isinstance(module, parametrize.ParametrizationList) and local == "original"
    if listed and all(type(step) is nn.Identity for step in module):
        # X.parametrizations.weight.original is X.weight itself.
        head, _, weight = path.rpartition(".parametrizations.")
        return _joined(head, weight)
    return _joined(path, local)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_of(hook: Any, package: str) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(package)


def _wrapped_as(kind: type) -> tuple[tuple[str, str, str], ...]:
    """Of the wrappers above those that modules of this class are.

    Kept by class: a pass asks for it of every module, several times. A class comes after those that it is made of, so
    no later import changes the answer.
    """
    found = _known.get(kind)
    if found is None:
        classes = [(wrapper, _class(*wrapper[:2])) for wrapper in (*_WRAPPERS, *_AROUND, _FSDP1)]
        found = _known[kind] = tuple(w for w, base in classes if base is not None and issubclass(kind, base))
    return found


def _class(file: str, name: str) -> type | None:
    return getattr(sys.modules.get(file), name, None)
