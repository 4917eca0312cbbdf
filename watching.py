"""R-GRPO under watch: the crop gain on fixed questions, warnings where a reward is hacked, rollouts kept to look at.

Nothing here touches the training: the fixed questions are answered greedily with a seed of their own, and what a
resumed run must know again is read from its log.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from benchmark_data import Question, question_of, read_questions
from checkpoints import full_disk_reported
from config import DataConfig, GRPOStageConfig
from crop_tool import CropContract
from data_check import as_example
from evaluate import ask
from judge import Judge
from measures import Answer, crop_gain, measure
from patience import OutageError, shared_outage
from rollout_pages import KEPT_GROUPS, ScoredRollout, groups_of, keep_rollouts
from rollouts import SamplingParams
from trackers import send_rollouts

if TYPE_CHECKING:
    from row_index import SoundRows
    from trainers import CropGRPOTrainer

# ---------------------------------------------------------------------------------------------- warnings

WINDOW, LEAST = 5, 3  # log lines that a figure is averaged over: so many of the last, and no fewer
SHORT_ANSWER = 20  # characters; that a shorter answer has doubled says nothing


@dataclass(frozen=True)
class Alarm:
    """A figure of the log, its limit, and where it counts as recovered (over the limit: a figure that must not fall).

    words: what it means, after the figure. advice: what to do. grows: it is held against its own first log lines.
    """

    figure: str
    limit: float
    recovered: float
    words: str
    advice: str
    grows: bool = False

    def value(self, recent: Sequence[float], first: Sequence[float]) -> float:
        mean = statistics.fmean(recent)
        return mean / max(statistics.fmean(first), SHORT_ANSWER) if self.grows else mean

    def is_past(self, value: float, bound: float) -> bool:
        return value > bound if self.limit > self.recovered else value < bound

    def shown(self, value: float) -> str:
        return f"{value:.1f} times" if self.grows else f"{value:.0%}"


PLAIN_REWARD = "a reward that does not pay for such calls (balanced), or a larger region_reward_weight"
ALARMS = (
    Alarm(
        "crops/no_call", 0.8, 0.6, "of the rollouts call no crop: the model no longer looks",
        "a larger region_reward_weight, a preset that pays for crops (deepeyes), or more SFT first",
    ),
    Alarm(
        "crops/invalid", 0.3, 0.2, "of the calls name no region that exists",
        "is coordinate_space that of the SFT data (data_utils.py --check)? else more SFT, or a lower learning rate",
    ),
    Alarm("crops/whole_image", 0.5, 0.35, "of the calls take the whole image: made for the reward", PLAIN_REWARD),
    Alarm("crops/repeated", 0.3, 0.2, "of the calls repeat a crop of the same rollout", PLAIN_REWARD),
    Alarm(
        "crops/after_answer", 0.1, 0.05, "of the calls come after the answer began: they cannot help it", PLAIN_REWARD
    ),
    Alarm(
        "answer/characters", 2.0, 1.5, "as long are the answers as at first: grown to please the reward?",
        "look at the kept rollouts; a judge can be pleased with words: a reward for brevity, or rules in its place",
        grows=True,
    ),
    Alarm(
        "frac_reward_zero_std", 0.7, 0.5, "of the groups have equal rewards, and teach nothing",
        "a higher temperature, larger groups (num_generations), or prompts that are neither too easy nor too hard",
    ),
    Alarm(
        "completions/clipped_ratio", 0.5, 0.3, "of the rollouts are cut off before they end",
        "a larger max_completion_length, or a reward without pay for length",
    ),
    Alarm(
        "watch/crop_gain", 0.03, 0.06, "accuracy is all that real crops gain over grey ones",
        "a look at the kept rollouts: either the crops are not read, or the questions need none",
    ),
)  # fmt: skip


class Alarms(TrainerCallback):
    """Says once when the mean of a figure over the last log lines passes its limit, and again only after a recovery.

    say: what gets the warnings; the first process alone speaks.
    """

    def __init__(self, say: Callable[[str], Any] = tqdm.write) -> None:
        self.say = say
        self.first: dict[str, list[float]] = defaultdict(list)
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self.active: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for logs in state.log_history:  # of a resumed run: what was said is not said again
            self.feed(logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        for warning in self.feed(logs):
            if state.is_world_process_zero:
                self.say(f"WARNING at step {state.global_step}: {warning}")

    def feed(self, logs: dict[str, Any]) -> list[str]:
        """The warnings that a log line gives rise to."""
        warnings = []
        for alarm in ALARMS:
            value = logs.get(alarm.figure)
            if value is None:
                continue
            first, recent = self.first[alarm.figure], self.recent[alarm.figure]
            if alarm.grows and len(first) < WINDOW:
                first.append(value)
                continue
            recent.append(value)
            if len(recent) < LEAST:
                continue
            mean = alarm.value(recent, first)
            if alarm.figure in self.active:
                if not alarm.is_past(mean, alarm.recovered):
                    self.active.remove(alarm.figure)
            elif alarm.is_past(mean, alarm.limit):
                self.active.add(alarm.figure)
                warnings.append(
                    f"{alarm.shown(mean)} {alarm.words} ({alarm.figure}, limit {alarm.shown(alarm.limit)}, mean of the "
                    f"last {len(recent)} values). What may help: {alarm.advice}"
                )
        return warnings


# --------------------------------------------------------------------------------------------- crop gain


def fixed_questions(config: GRPOStageConfig, data: DataConfig, rows: SoundRows) -> tuple[Question, ...]:
    """`watch_samples` questions, drawn evenly from the validation data, else from the training data.

    Raises:
        SettingsError: for validation data in which no question can be read.
    """
    if data.val_data is not None:
        known = read_questions(data.val_data, data.image_base_path, data.answer_key)
        return known.limited(config.watch_samples).questions
    table, count = rows.table, min(config.watch_samples, len(rows.table))
    drawn, _ = rows([table[place * len(table) // count] for place in range(count)])
    examples = dict.fromkeys(as_example(row) for row in drawn)  # one that stands for a faulty row comes once
    return tuple(question_of(example, data.image_base_path) for example in examples)


def gain_figures(
    questions: Sequence[Question], answers: Sequence[Answer], contract: CropContract, judge: Judge | None
) -> dict[str, float]:
    """Accuracy with real and with grey crops, and the gain with its 95% interval; empty without answers."""
    measured = measure({question.name: question for question in questions}, answers, contract, judge)
    real, blank = ([item for item in measured if item.answer.crops == crops] for crops in ("real", "blank"))
    if not real:
        return {}
    gain = crop_gain(real, blank)
    figures = {"watch/crop_gain": gain["gain"], "watch/questions": gain["questions"]}
    for name, items in (("accuracy", real), ("accuracy_blank", blank)):
        figures[f"watch/{name}"] = statistics.fmean(item.figures["accuracy"] for item in items)
    if gain["gain_ci"] is not None:
        figures |= dict(zip(("watch/crop_gain_low", "watch/crop_gain_high"), gain["gain_ci"], strict=True))
    return figures


class CropGain(TrainerCallback):
    """Answers the fixed questions greedily every `every` steps and at both ends, with real and with grey crops.

    It does so before a step, or after the last, and logs the figures in a line of their own. Every process answers its
    share; the first one measures.
    """

    def __init__(self, trainer: CropGRPOTrainer, questions: Sequence[Question], every: int) -> None:
        self.trainer, self.questions, self.every = trainer, questions, every
        self.sampling = replace(trainer.sampling, temperature=0.0, top_p=1.0, top_k=0, seed=0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            try:
                self.measure()
            except OutageError as outage:
                self.trainer.stop_before_this_step(str(outage))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            wanted = control.should_log
            try:
                self.measure()
            except OutageError as outage:  # the training itself is complete
                if state.is_world_process_zero:
                    print(f"the crop gain at the end was not measured: {outage}", flush=True)
            control.should_log = wanted  # transformers takes any line for the one of this step

    def measure(self) -> None:
        history, step = self.trainer.state.log_history, self.trainer.state.global_step
        if any("watch/seconds" in logs and logs["step"] == step for logs in history):
            return  # a run that goes on past its former end
        started = time.perf_counter()
        share = self.questions[self.trainer.args.process_index :: self.trainer.args.world_size]
        faults: list[str] = []  # known since the data check
        self._bring_weights()
        with shared_outage(), self.trainer.weights_for_rollouts(), self.trainer.accelerator.autocast():
            answers = [
                answer.to_json()
                for crops in ("real", "blank")
                for answer in ask(self.trainer.engine, share, self._with(crops), faults=faults)
            ]
        everyone = [Answer.from_json(answer) for answer in gather_object(answers)]
        figures = [{}]
        with shared_outage():
            if self.trainer.is_world_process_zero():
                contract = self.trainer.engine.renderer.contract
                figures = [gain_figures(self.questions, everyone, contract, self.trainer.judge)]
                figures[0]["watch/seconds"] = time.perf_counter() - started
        broadcast_object_list(figures)
        # TRL's own `log` would also write, and forget, the figures of the log interval that is under way.
        Trainer.log(self.trainer, figures[0])

    def _with(self, crops: str) -> SamplingParams:
        return replace(self.sampling, crops=crops)

    def _bring_weights(self) -> None:
        trainer = self.trainer
        if trainer.use_vllm and trainer.state.global_step != trainer._last_loaded_step:
            trainer.vllm_generation.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step


# ---------------------------------------------------------------------------------------------- rollouts


class RolloutKeeper:
    """Keeps rollouts of the first step and of every `every` steps, as a page, as JSONL, and for the trackers.

    model: what the training began from. `trainer` calls it on every process with the steps that train on the rollouts.
    """

    def __init__(self, every: int, image_base: str, model: str) -> None:
        self.every, self.image_base, self.model = every, image_base, model

    def __call__(self, trainer: CropGRPOTrainer, steps: range, rollouts: Sequence[ScoredRollout]) -> None:
        step = next((step for step in steps if step == 1 or step % self.every == 0), None)
        if step is None or not trainer.is_world_process_zero():
            return
        groups = groups_of(rollouts)
        shown, output = groups[:KEPT_GROUPS], Path(trainer.args.output_dir)
        contract = trainer.engine.renderer.contract
        with full_disk_reported(output, f"rollouts of step {step}"):
            keep_rollouts(output / "rollouts", step, shown, len(groups), self.image_base, self.model, contract)
        send_rollouts(trainer.args.report_to, trainer.callback_handler.callbacks, step, shown, self.image_base)
