"""Stage 2: R-GRPO, reinforcement learning of where to look (VLM-R3, arXiv 2505.16192), on TRL's GRPOTrainer.

    python train_grpo.py --sft_checkpoint outputs/sft/final_model --train_data data/train.jsonl \\
        --image_base_path data/images --beta 0.1 --bf16

What differs from TRL: rollouts come from our engine, in one assistant turn with crops on the live cache; the
images of a row are the main image and its crops; inserted crop tokens carry no loss. What differs from the paper:
the default reward (`balanced`) has a grounding term, and the KL to the SFT model is on (`beta`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import parse_training
from config import GRPOStageConfig, TrainingSettings, is_main_process, use_one_gpu

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from trl import GRPOConfig

    from conversation import Renderer
    from generation import CropEngine
    from model_utils import LoadedModel
    from rewards import RewardPart
    from trainers import CropGRPOTrainer
    from vllm_generation import VLLMEngine


def grpo_arguments(config: GRPOStageConfig, reward_weights: list[float]) -> GRPOConfig:
    """TRL's arguments for the stage; a field given by name in the stage's settings wins over what is set here."""
    from trl import GRPOConfig

    from training import common_arguments

    values = common_arguments(config)
    names = ["beta", "num_generations", "temperature", "max_completion_length"]
    values |= {name: getattr(config, name) for name in names}
    values |= {
        "reward_weights": reward_weights,
        "scale_rewards": "group",
        "remove_unused_columns": False,
        "log_multimodal": False,
        # TRL scores in training mode: with LoRA's dropout the log-probs would not be those of the rollout.
        "disable_dropout": True,
    }
    return GRPOConfig(**(values | config.trl))


def as_reward_functions(parts: tuple[RewardPart, ...]) -> list[Callable[..., list[float]]]:
    """Each reward part as a function that TRL calls, so that TRL logs each by itself."""
    from response_format import parse_response

    def function(part: RewardPart) -> Callable[..., list[float]]:
        def reward(rollout: list, reference: list, **_: Any) -> list[float]:
            responses = [parse_response(item.text, item.tool_calls) for item in rollout]
            return [part.function(*pair) for pair in zip(responses, reference, strict=True)]

        reward.__name__ = part.name
        return reward

    return [function(part) for part in parts]


def build_trainer(
    loaded: LoadedModel,
    settings: TrainingSettings,
    parts: tuple[RewardPart, ...] | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> CropGRPOTrainer:
    """The trainer of stage 2 on the prompts of `settings.data`; `parts` replaces the preset's reward."""
    from conversation import Renderer
    from data_check import Checker
    from generation import SamplingParams
    from judge import Judge
    from model_utils import save_companions
    from rewards import reward_parts
    from row_index import FaultLog, SoundRows, load_training_rows
    from trainers import CropGRPOTrainer
    from watching import Alarms, CropGain, RolloutKeeper, fixed_questions

    config, data = settings.grpo, settings.data
    renderer = Renderer(loaded.processor, loaded.contract)
    bad_rows = data.bad_rows_file or f"{config.output_dir}/bad_rows.jsonl"
    table = load_training_rows(data, renderer, bad_rows)
    rows = SoundRows(table, Checker(data, renderer.contract, renderer))
    if parts is None:
        parts = reward_parts(config.reward_preset, config.global_reward_weight, config.region_reward_weight)
    keep, start = config.keep_rollouts_every, config.sft_checkpoint or settings.model.model_name
    trainer = CropGRPOTrainer(
        model=loaded.model,
        args=grpo_arguments(config, [part.weight for part in parts]),
        reward_funcs=as_reward_functions(parts),
        train_dataset=table,
        processing_class=loaded.processor,
        callbacks=[*(callbacks or []), Alarms()],
        companions=partial(save_companions, processor=loaded.processor, contract=loaded.contract, settings=settings),
        engine=build_engine(loaded, renderer, settings),
        sampling=SamplingParams(
            config.max_completion_length,
            config.temperature,
            top_p=config.trl.get("top_p", 1.0),
            top_k=config.trl.get("top_k", 0),
            max_crops=config.max_crops,
        ),
        rows=rows,
        fault_logs={"train": FaultLog(data.train_data, bad_rows, names=is_main_process())},
        judge=Judge(config) if config.judge_url else None,
        on_rollouts=RolloutKeeper(keep, data.image_base_path, start) if keep else None,
    )
    if config.watch_every:
        trainer.add_callback(CropGain(trainer, fixed_questions(config, data, rows), config.watch_every))
    return trainer


def build_engine(loaded: LoadedModel, renderer: Renderer, settings: TrainingSettings) -> CropEngine | VLLMEngine:
    """What samples the rollouts: our engine on the model that trains, or vLLM with its weights."""
    config = settings.grpo
    if config.rollout_backend == "vllm":
        from vllm_generation import training_engine

        return training_engine(loaded, renderer, config, config.sft_checkpoint or settings.model.model_name)
    from generation import CropEngine

    return CropEngine(loaded.model, renderer, config.rollout_batch_size, config.max_batch_tokens, config.cuda_graphs)


def run_grpo(settings: TrainingSettings) -> Path:
    """Train stage 2; returns the folder of the final model."""
    from checkpoints import claimed
    from model_utils import load_for_training
    from training import begin, explained_out_of_memory, finish, train

    config = settings.grpo
    with claimed(config.output_dir):
        final = begin("stage 2: R-GRPO", settings, "grpo")
        if final is not None:
            return final
        start = config.sft_checkpoint or settings.model.model_name
        loaded = load_for_training(settings.model, settings.data, config, start)
        with explained_out_of_memory(settings, "grpo", loaded.model):
            trainer = build_trainer(loaded, settings)
        train(trainer, settings, "grpo")
        return finish(trainer, loaded, settings, "grpo", config.output_dir)


def main(argv: list[str] | None = None) -> None:
    use_one_gpu()
    settings = parse_training(argv, (__doc__ or "").split("\n")[0], stages=("grpo",))
    settings.show()
    from training import exit_with_message

    with exit_with_message("train_grpo.py"):
        run_grpo(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
