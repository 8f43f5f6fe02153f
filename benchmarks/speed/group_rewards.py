"""Group rewards on a CPU: what a diversity reward adds to GRPO's step, and thousands of small groups against a loop.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.group_rewards [--rounds 10] [--out FILE]

Steps: TRL's GRPOTrainer writes, scores and learns from one group of 16 rollouts of 64 tokens a step; the reward's time
is taken inside the step, and its share is over the rest of the same step. The proxy is the package's tiny model; the
policy is that model too, so that proxy and policy cost the same a token, or a Qwen2 of the same vocabulary and 12 times
its parameters. All rollouts are right, and all are sketched.
Groups: gains of all rows by `group_gains` beside the definition, which takes the eigenvalues of every leave-one-out
group one by one, on some of the groups; in turns, seconds a group. What is timed is first compared with the definition.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.environment import ROOT, describe_machine
from benchmarks.speed.experts import quantiles
from gvendi_fast import GroupDiversityReward, group_gains, load_proxy
from gvendi_fast.kernels import reference

GROUP, TOKENS, WEIGHT, WARM_UP = 16, 64, 0.5, 2
# {name in the table: what differs from the tiny model's configuration, None for that model itself}.
POLICIES: dict[str, dict[str, int] | None] = {
    "the tiny model, which is the proxy too": None,
    "a Qwen2 of 15 M parameters": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
}
# (groups of a call, rows of a group, groups that the definition takes): its cost grows with the fourth power of rows.
SHAPES = ((4000, 4, 200), (2000, 16, 40), (500, 64, 4))
DIM = 1024
# Of a gain, to the definition's; see `group_gains`.
MOST_ERROR = 6e-7


def all_right(completions: list[Any], **kwargs: Any) -> list[float]:
    """A correctness reward that costs nothing."""
    return [1.0] * len(completions)


class TimedSteps(transformers.TrainerCallback):
    """Calls the reward for the trainer; seconds of every step, and of the reward in it."""

    def __init__(self, reward: GroupDiversityReward) -> None:
        self.reward, self.steps, self.rewards, self.errors = reward, [], [], []

    def score(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        began = time.perf_counter()
        given = self.reward(prompts=prompts, completions=completions, **kwargs)
        self.rewards.append(time.perf_counter() - began)
        if len(self.errors) < WARM_UP:
            z = self.reward.sketcher(prompts, completions).cpu()
            self.errors.append(float(np.abs(np.array(given) - self.by_definition(z)).max()))
        return given

    @staticmethod
    def by_definition(z: torch.Tensor) -> np.ndarray:
        """Rewards of one group of right rollouts [m, K]."""
        m = len(z)
        whole = float(reference.group_entropies(z, torch.tensor([0, m])))
        without = whole - reference.group_gains(z, torch.tensor([0, m])).numpy()
        most = reference.entropy(torch.tensor([1 / m, 1 - 1 / m]))
        return 1 + WEIGHT * (whole - (1 - 1 / m) * without) / most

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.began)


def measure_steps(settings: dict[str, int] | None, rounds: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Quantiles of seconds of the reward and of the rest of a step, and of their ratio, for one policy."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tiny = load_proxy("tiny", device="cpu", dtype="float32")
    policy = tiny.model
    if settings is not None:
        config = transformers.Qwen2Config(**{**policy.config.to_dict(), **settings, "layer_types": None})
        policy = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    timed = TimedSteps(GroupDiversityReward(all_right, "tiny", device="cpu", weight=WEIGHT))
    prompts = [
        {"prompt": [{"role": "user", "content": f"What is {i} + {i * i}?"}]} for i in range(rounds + WARM_UP)
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=policy,
            processing_class=tiny.tokenizer,
            reward_funcs=timed.score,
            train_dataset=Dataset.from_list(prompts),
            callbacks=[timed],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=GROUP,
                num_generations=GROUP,
                max_completion_length=tokens,
                generation_kwargs={"min_new_tokens": tokens},
                max_steps=rounds + WARM_UP,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
        )
        trainer.train()
    if not max(timed.errors) <= 1e-5:
        raise SystemExit(f"a reward is {max(timed.errors)} from the definition's; it is not timed")
    steps, rewards = timed.steps[WARM_UP:], timed.rewards[WARM_UP:]
    rest = [step - reward for step, reward in zip(steps, rewards, strict=True)]
    return {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "proxy parameters": timed.reward.sketcher.proxy.parameters,
        "proxy dtype": str(timed.reward.sketcher.proxy.dtype).removeprefix("torch."),
        "error": max(timed.errors),
        "seconds": {"reward": quantiles(rewards), "rest of the step": quantiles(rest)},
        "reward to the rest of the step": quantiles([a / b for a, b in zip(rewards, rest, strict=True)]),
    }


def measure_groups(groups: int, size: int, by_definition: int, rounds: int, dim: int = DIM) -> dict[str, Any]:
    """Quantiles of seconds a group of `group_gains` and of the definition, and of their ratio."""
    rows = torch.randn(groups * size, dim, generator=torch.Generator().manual_seed(0))
    labels = np.repeat(np.arange(groups), size)
    few, bounds = rows[: by_definition * size], torch.arange(by_definition + 1) * size
    wanted = reference.group_gains(few, bounds).numpy()
    error = float(np.abs(group_gains(rows, labels).gain[: len(few)] - wanted).max())
    if not error <= MOST_ERROR:
        raise SystemExit(f"a gain is {error} from the definition's; it is not timed")
    fast, slow = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        group_gains(rows, labels)
        between = time.perf_counter()
        reference.group_gains(few, bounds)
        fast.append((between - began) / groups)
        slow.append((time.perf_counter() - between) / by_definition)
    return {
        "groups": groups,
        "rows": size,
        "error": error,
        "seconds a group": {"group_gains": quantiles(fast), "definition": quantiles(slow)},
        "definition to group_gains": quantiles([b / a for a, b in zip(fast, slow, strict=True)]),
    }


def main() -> None:
    """Measure policies and shapes and write one JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.group_rewards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "group_rewards.json")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": {"group": GROUP, "tokens": TOKENS, "dim": DIM, "rounds": args.rounds, "seed": 0},
        "steps": {},
        "groups": [],
    }
    for shape in SHAPES:
        results["groups"].append(measure_groups(*shape, rounds=args.rounds))
        print(json.dumps(results["groups"][-1]), flush=True)
    for name, settings in POLICIES.items():
        results["steps"][name] = measure_steps(settings, args.rounds)
        print(name, json.dumps(results["steps"][name]), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
