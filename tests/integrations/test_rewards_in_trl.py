"""Rewards inside a real GRPOTrainer: what it passes, what it logs, and groups that two processes share."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from gvendi_fast import GroupDiversityReward, load_proxy

pytestmark = pytest.mark.soak
trl = pytest.importorskip("trl", reason="needs trl, whose trainer calls the reward")
datasets = pytest.importorskip("datasets", reason="needs datasets, which trl's trainer reads")

SETTINGS = {
    "max_completion_length": 8,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def half_right(completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


def trainer_of(reward, folder: Path, prompts: list, **settings):
    tiny = load_proxy("tiny", device="cpu", dtype="float32")
    rows = datasets.Dataset.from_list([{"prompt": prompt, "answer": "6"} for prompt in prompts])
    return trl.GRPOTrainer(
        model=tiny.model,
        processing_class=tiny.tokenizer,
        reward_funcs=reward,
        train_dataset=rows,
        eval_dataset=rows,
        args=trl.GRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
    )


@pytest.mark.parametrize("form", ["texts", "messages"])
def test_what_the_trainer_passes_and_logs(form, tmp_path):
    prompts = [f"What is {i} + 2?" for i in range(4)]
    if form == "messages":
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    reward = GroupDiversityReward(half_right, device="cpu")
    calls = []

    def seen(prompts, completions, completion_ids, **kwargs):
        given = reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        calls.append((prompts, completions, completion_ids, kwargs, given))
        return given

    trainer = trainer_of(
        seen, tmp_path, prompts, per_device_train_batch_size=8, num_generations=4, num_generations_eval=2
    )
    trainer.train()
    trainer.evaluate()
    [trained, *evaluated] = calls
    # As the daily test's stand-in passes them.
    assert set(trained[3]) == {"answer", "trainer_state", "log_extra", "log_metric"}
    assert trained[3]["log_metric"].__self__ is trainer
    assert [trained[0][0] == prompt for prompt in trained[0]] == [True] * 4 + [False] * 4
    assert len(trained[0]) == len(trained[1]) == len(trained[2]) == len(trained[4]) == 8
    assert trained[4][::2] == [0.0] * 4
    assert all(1 <= value <= 1.5 for value in trained[4][1::2])
    # In groups of two of the evaluation the prompt changes after every second rollout.
    assert evaluated
    assert evaluated[0][0][0] == evaluated[0][0][1] != evaluated[0][0][2]
    logged, in_evaluation = trainer.state.log_history[0], trainer.state.log_history[-1]
    assert 1 <= logged["gvendi/group"] <= 4
    assert 0 < logged["gvendi/novelty_correct"] <= 1
    assert logged["gvendi/left_out"] == 0
    assert 1 <= in_evaluation["eval_gvendi/group"] <= 2


def test_another_trainer_of_groups(tmp_path):
    tiny = load_proxy("tiny", device="cpu", dtype="float32")
    trainer = trl.RLOOTrainer(
        model=tiny.model,
        processing_class=tiny.tokenizer,
        reward_funcs=GroupDiversityReward(half_right, device="cpu"),
        train_dataset=datasets.Dataset.from_list([{"prompt": "[2, 4, "}, {"prompt": "[1, 3, "}]),
        args=trl.RLOOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, **SETTINGS
        ),
    )
    trainer.train()
    assert 1 <= trainer.state.log_history[0]["gvendi/group"] <= 4


def test_a_data_set_with_one_prompt_twice(tmp_path):
    reward = GroupDiversityReward(half_right, device="cpu")
    trainer = trainer_of(reward, tmp_path, ["[2, 4, "] * 2, per_device_train_batch_size=8, num_generations=4)
    trainer.train()
    assert 1 <= trainer.state.log_history[0]["gvendi/group"] <= 4


def test_the_example_runs():
    main = runpy.run_path(str(ROOT / "docs" / "examples" / "grpo.py"))["main"]
    logged = main(2)
    assert [entry["step"] for entry in logged] == [1, 2]
    assert all(0 <= entry["reward"] <= 1.5 for entry in logged)
    assert all(1 <= entry["G-Vendi of a group"] <= 8 for entry in logged)


SHARED_GROUPS = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests/integrations")
import test_rewards_in_trl as room
from gvendi_fast import GroupDiversityReward

folder = Path(sys.argv[1])
gather = sys.argv[2] == "gather"
reward = GroupDiversityReward(room.half_right, device="cpu", gather=gather)
prompts = [f"What is {i} + 2?" for i in range(4)]
# Each process has half of every group.
trainer = room.trainer_of(reward, folder, prompts, per_device_train_batch_size=2, num_generations=4)
trainer.train()
if trainer.accelerator.is_main_process:
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history[0]))
"""


@pytest.mark.parametrize("gather", ["gather", "apart"])
def test_groups_larger_than_a_process_s_batch(gather, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "run.py").write_text(SHARED_GROUPS)
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tmp_path), gather],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    if gather == "apart":
        assert done.returncode != 0
        assert "the 2 rollouts of this call are no whole number of groups of 4" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    logged = json.loads((tmp_path / "log.json").read_text())
    # Of one group of four, half of which each process has; each alone would give two at most.
    assert 2.5 < logged["gvendi/group"] <= 4
    assert logged["gvendi/left_out"] == 0
