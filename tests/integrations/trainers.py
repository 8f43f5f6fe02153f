"""Small models, data sets and trainers that the callbacks' tests share."""

import copy

import torch
import transformers

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Nothing beside the training itself.
PLAIN = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "seed": 3,
}


def small_model(**settings):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **settings}))


def rows(count: int = 24, length: int = 10, sources: str = "abc"):
    """Rows whose first token says their number, and so their source."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        ids = [1 + number, *torch.randint(30, 61, (length - 1,), generator=draw).tolist()]
        found.append({"input_ids": ids, "labels": ids, "source": sources[number % len(sources)]})
    return found


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Seen:
    """What a meter is given: (sketches, sources) of every update, and the batches of the forward passes before it."""

    def __init__(self, meter, model=None) -> None:
        self.updates, self.batches, self.models = [], [], []
        own = meter.update

        def update(sketches, group=None):
            self.updates.append((sketches, group))
            return own(sketches, group)

        meter.update = update
        if model is not None:
            model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, model, args, kwargs) -> None:
        if model.training and torch.is_grad_enabled():
            held = {name: x.clone() for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
            self.batches.append(held)
            self.models.append(copy.deepcopy(model.state_dict()))


class Reporter(transformers.TrainerCallback):
    """Stands for W&B, MLflow and the like: keeps what it is told to log."""

    def __init__(self) -> None:
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))
