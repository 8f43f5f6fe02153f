"""GRPO with a reward for rollouts that are right and differ: a tiny policy on a CPU, in under two minutes.

    pip install "gvendi-fast" trl && python docs/examples/grpo.py

The task: go on with a list by a number of the right parity. Many answers are right; a policy that always writes the
same one earns less than one that writes several.
"""

from __future__ import annotations

import re
import sys
import tempfile

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from gvendi_fast import GroupDiversityReward, load_proxy

LISTS = {
    0: ["[2, 4, 6, 8, ", "[12, 14, 16, ", "[0, 2, 4, "],
    1: ["[1, 3, 5, 7, ", "[11, 13, 15, ", "[3, 5, 7, "],
}


def right_parity(completions: list[str], parity: list[int], **kwargs) -> list[float]:
    """1 where the first number of a completion has the parity of its prompt's, else 0."""
    numbers = [re.match(r"\s*(\d+)", completion) for completion in completions]
    return [float(bool(n) and int(n[1]) % 2 == p) for n, p in zip(numbers, parity, strict=True)]


def main(steps: int = 20) -> list[dict[str, float]]:
    """Train for so many steps; returns and prints the reward, and what it is made of, of each."""
    # The package's own small model, as the policy; its frozen twin scores the rollouts.
    policy = load_proxy("tiny", device="cpu", dtype="float32")
    reward = GroupDiversityReward(right_parity, proxy="tiny", device="cpu", weight=0.5)
    rows = [{"prompt": prompt, "parity": parity} for parity, prompts in LISTS.items() for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=policy.model,
            processing_class=policy.tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows * 20),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=16,
                max_steps=steps,
                learning_rate=1e-4,
                # Groups whose rollouts are all right keep the size of their differences, which is small.
                scale_rewards="batch",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
        )
        trainer.train()
    logged = [
        {
            "step": entry["step"],
            "reward": entry["reward"],
            "G-Vendi of a group": entry["gvendi/group"],
            "novelty of the right ones": entry.get("gvendi/novelty_correct", 0.0),
        }
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    for entry in logged:
        print("  ".join(f"{name} {value:.3g}" for name, value in entry.items()))
    return logged


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
