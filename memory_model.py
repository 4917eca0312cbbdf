"""Bytes that a run takes on one GPU, from the architecture: weights, gradients, optimizer, activations, KV cache.

Counted are the tensors that live at the peak of each phase (update, rollout), as torch allocates them; what torch
itself and fragmentation take on top is `RESERVE_BYTES` and `FRAGMENTATION`. tests/test_memory_model.py holds the counts
against measured peaks. Sources: the forward of transformers' Qwen2.5-VL, TRL's fused output head, PEFT's LoRA layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from architecture import Architecture
from config import TrainingSettings

GIB = 2**30
RESERVE_BYTES = GIB  # CUDA context, cuBLAS workspaces, NCCL
FRAGMENTATION = 0.05  # of what is allocated
HEAD_TILE = (4096, 32768)  # tokens x vocabulary that TRL's fused head multiplies at a time
PREFILL_TOKENS = 8192  # of one forward in a rollout (decoding.FORWARD_TOKENS)
ZERO_BUCKET = 5 * 10**8  # elements of DeepSpeed's reduce and gather buffers
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # nf4 in blocks of 64, whose scales are 8-bit in blocks of 256

Method = Literal["lora", "qlora", "full"]
Sharding = Literal["ddp", "zero2", "zero3", "fsdp2"]


@dataclass(frozen=True)
class Run:
    """What is trained and how, on each GPU; lengths in tokens."""

    method: Method = "lora"
    lora_r: int = 64
    lora_dropout: float = 0.1  # SFT's; R-GRPO trains without
    half: bool = True  # --bf16 or --fp16: the forward in half precision
    half_weights: bool = False  # --dtype bfloat16 with all weights trained
    freeze_vision: bool = True
    gradient_checkpointing: bool = True
    sharding: Sharding = "ddp"
    num_gpus: int = 1
    batch_size: int = 4  # rows of a micro-batch
    gradient_accumulation_steps: int = 8
    prompt_tokens: int = 550  # the image's among them
    image_tokens: int = 450
    crops: int = 2
    crop_tokens: int = 150
    answer_tokens: int = 300  # of an annotated answer, crops not counted
    max_completion_length: int = 1024
    rollout_batch_size: int = 64
    max_batch_tokens: int = 0
    num_generations: int = 8
    beta: float = 0.04

    @property
    def base_bytes(self) -> int:
        """Bytes of a weight that is neither quantized nor an adapter's."""
        return 2 if (self.half and self.method != "full") or self.half_weights else 4

    @property
    def compute_bytes(self) -> int:
        return 2 if self.half else self.base_bytes

    @property
    def sft_row(self) -> int:
        return self.prompt_tokens + self.answer_tokens + self.crops * self.crop_tokens

    @property
    def rollout_row(self) -> int:
        """The longest rollout, prompt and crops included."""
        return self.prompt_tokens + self.max_completion_length + self.crops * self.crop_tokens

    @property
    def rollouts(self) -> int:
        """Rollouts that a GPU decodes side by side: all of an optimizer step, or as many as it may."""
        return min(self.rollout_batch_size, self.batch_size * self.gradient_accumulation_steps)


# ------------------------------------------------------------------------------------------------ state


def trained_parameters(model: Architecture, run: Run) -> int:
    """With adapters on the vision tower too (`--freeze_vision false`) a few more than counted here."""
    if run.method != "full":
        return model.lora_parameters(run.lora_r)
    return model.language_parameters + (0 if run.freeze_vision else model.vision_parameters)


def weight_bytes(model: Architecture, run: Run) -> int:
    """All weights, whole, without adapters."""
    if run.method != "qlora":
        return model.parameters * run.base_bytes
    linears = model.num_hidden_layers * sum(inner * outer for inner, outer in model.layer_linears)
    return round(linears * FOUR_BIT) + (model.parameters - linears) * run.base_bytes


def state_bytes(model: Architecture, run: Run) -> dict[str, int]:
    """What stays on the GPU between two steps: weights, adapter and optimizer; and the gradients."""
    trained, gpus = trained_parameters(model, run), run.num_gpus
    weights = weight_bytes(model, run)
    master = run.base_bytes if run.method == "full" else 4  # adapters stay float32
    whole_per_gpu = 1 if run.sharding in ("ddp", "zero2") else gpus
    deepspeed_half = run.sharding in ("zero2", "zero3") and run.half
    if deepspeed_half:  # bfloat16 weights and gradients; float32 copies with the optimizer
        weights = weight_bytes(model, replace(run, half_weights=True))
        parts = {
            "weights": weights // whole_per_gpu,
            "adapter": 0 if run.method == "full" else 2 * trained // whole_per_gpu,
            "optimizer": 12 * trained // gpus,
            "gradients": 2 * trained // gpus,
        }
    else:
        cut = gpus if run.sharding != "ddp" else 1
        parts = {
            "weights": weights // whole_per_gpu,
            "adapter": 0 if run.method == "full" else 4 * trained // whole_per_gpu,
            "optimizer": 2 * master * trained // cut,
            "gradients": master * trained // cut,
        }
    parts["buffers"] = _buffer_bytes(model, run, trained)
    return {name: value for name, value in parts.items() if value}


def _buffer_bytes(model: Architecture, run: Run, trained: int) -> int:
    """What the exchange between GPUs holds: gradient buckets, and weights gathered for the layer at work."""
    if run.sharding == "fsdp2":
        largest = max(2 * model.layer_parameters, model.embedding_parameters)
        return 2 * largest * run.compute_bytes
    if run.sharding == "ddp":
        return trained * (run.base_bytes if run.method == "full" else 4) if run.num_gpus > 1 else 0
    gathered = 2 * min(10**9, model.parameters) if run.sharding == "zero3" else 0
    return 2 * 2 * min(ZERO_BUCKET, trained) + gathered


# ------------------------------------------------------------------------------------------ activations


def layer_token_bytes(model: Architecture, run: Run, dropout: float, row: int) -> int:
    """What the backward pass of one decoder layer needs of each token, in rows of `row` tokens."""
    hidden, mlp = model.hidden_size, model.intermediate_size
    compute, stream = run.compute_bytes, run.base_bytes
    trains_weights, is_cast = run.method == "full", run.compute_bytes < run.base_bytes or run.method != "full"
    norms = 2 * (4 + stream * trains_weights) * hidden
    if trains_weights:  # q, k, v and gate, up share their input, but for a cast each
        inputs = (5 if is_cast else 2) * compute * hidden + compute * mlp
    elif dropout or compute == 2:  # an adapter casts, and drops out (a mask of bytes), an input of its own
        each = compute + (dropout > 0)
        inputs = 6 * each * hidden + each * mlp
    else:
        inputs = 2 * compute * hidden + compute * mlp
    ranks = 0 if trains_weights else 7 * compute * run.lora_r
    # A mask makes torch repeat keys and values for each query head, and turn it into numbers.
    attention = 4 * compute * hidden + 4 * model.num_attention_heads + compute * row
    return norms + inputs + ranks + attention + 3 * compute * mlp


def update_bytes(
    model: Architecture, run: Run, dropout: float, tokens: int, row: int, scored: int, repeated: int = 0
) -> dict[str, int]:
    """Activations at the peak of one forward and backward pass of `tokens` tokens, `scored` of them in the loss.

    row: tokens of a row, which a token sees at most. repeated: tokens of prompts that are joined to each of their rows.
    """
    stream, compute = run.base_bytes, run.compute_bytes
    hidden, mlp = model.hidden_size, model.intermediate_size
    joined = 2 * compute * hidden * repeated  # their keys and values
    layer = layer_token_bytes(model, run, dropout, row) + joined // tokens
    head_dim = hidden // model.num_attention_heads
    last_norm = (4 + stream * (run.method == "full")) * hidden
    kept = tokens * (2 * head_dim * stream + row + last_norm) + scored * hidden * stream
    copies = _cast_copies(model, run)
    tile = min(scored, HEAD_TILE[0]) * HEAD_TILE[1] * compute
    head = tile + scored * hidden * 4 + (model.embedding_parameters * 4 if run.method == "full" else 0)
    backward = tokens * (stream * hidden + 3 * compute * mlp)
    if run.method == "qlora":  # a layer's largest weight, unpacked
        backward += 2 * hidden * mlp
    if run.gradient_checkpointing:
        kept += model.num_hidden_layers * tokens * stream * hidden
        work = max(copies, head, tokens * layer + backward + copies // model.num_hidden_layers)
    else:
        kept += model.num_hidden_layers * tokens * layer + copies
        work = max(head, backward)
    return {"activations": kept, "working memory": work}


def _cast_copies(model: Architecture, run: Run) -> int:
    """Half-precision copies that autocast makes of the float32 weights that train."""
    if not run.half or run.half_weights or run.sharding != "ddp":
        return 0
    if run.method == "full":
        return 2 * model.num_hidden_layers * model.layer_parameters
    return 2 * model.lora_parameters(run.lora_r)


def vision_bytes(model: Architecture, run: Run, image_tokens: int) -> int:
    """One pass of the vision tower over images of so many tokens together: at its widest, or kept where it trains."""
    patches = image_tokens * model.spatial_merge_size**2
    hidden, mlp = model.vision_hidden_size, model.vision_intermediate_size
    compute, stream = run.compute_bytes, run.base_bytes
    pixels = patches * model.patch_values * (4 + stream)
    widest = patches * (2 * stream * hidden + max((3 * compute + 16) * hidden, 3 * compute * mlp))
    if run.freeze_vision:
        return pixels + widest
    block = patches * ((8 + 2 * stream + 8 * compute) * hidden + 4 * compute * mlp)
    return pixels + (model.vision_depth * patches * stream * hidden + block if run.gradient_checkpointing else
                     model.vision_depth * block)  # fmt: skip


# --------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a phase, by what holds them."""

    phase: str
    parts: dict[str, int]

    @property
    def allocated(self) -> int:
        return sum(self.parts.values())

    @property
    def reserve(self) -> int:
        """On top of what is allocated: fragmentation, and what torch itself takes."""
        return round(self.allocated * FRAGMENTATION) + RESERVE_BYTES

    @property
    def needed(self) -> int:
        """What the GPU must have."""
        return self.allocated + self.reserve


def sft_memory(model: Architecture, run: Run) -> Memory:
    """The update of stage 1, on micro-batches of the longest rows."""
    scored = run.batch_size * run.answer_tokens
    parts = update_bytes(model, run, run.lora_dropout, run.batch_size * run.sft_row, run.sft_row, scored)
    images = run.batch_size * (run.image_tokens + run.crops * run.crop_tokens)
    vision = vision_bytes(model, run, images)
    if run.freeze_vision:  # its pass is over before the language model's begins
        parts["working memory"] = max(parts["working memory"], vision - parts["activations"])
    else:
        parts["vision"] = vision
    return Memory("SFT", state_bytes(model, run) | parts)


def update_memory(model: Architecture, run: Run) -> Memory:
    """The update of stage 2: rollouts behind the prompt that they share (scoring.py)."""
    groups = -(-run.batch_size // run.num_generations)
    completions = run.batch_size * (run.rollout_row - run.prompt_tokens + 1)
    tokens, repeated = groups * run.prompt_tokens + completions, run.batch_size * run.prompt_tokens
    scored = run.batch_size * run.max_completion_length
    parts = update_bytes(model, run, 0.0, tokens, run.rollout_row, scored, repeated)
    if not run.freeze_vision:
        images = run.batch_size * (run.image_tokens + run.crops * run.crop_tokens)
        parts["vision"] = vision_bytes(model, run, images)
    return Memory("R-GRPO update", state_bytes(model, run) | _grpo_extras(model, run) | parts)


def cache_bytes(model: Architecture, run: Run, tokens: int) -> int:
    """Keys and values of so many slots."""
    return 2 * model.num_hidden_layers * model.kv_size * run.compute_bytes * tokens


def rollout_memory(model: Architecture, run: Run) -> Memory:
    """Rollouts of stage 2: no gradients, but the KV cache and the sampling, and whole weights where they are cut up."""
    slots = run.rollouts * run.rollout_row
    if run.max_batch_tokens:
        slots = min(slots, run.max_batch_tokens)
    parts = state_bytes(model, run) | _grpo_extras(model, run)
    parts.pop("gradients", None)
    if run.sharding in ("zero3", "fsdp2"):
        parts["gathered weights"] = weight_bytes(model, run) * run.compute_bytes // run.base_bytes
        parts.pop("buffers", None)
    prompts = min(PREFILL_TOKENS, run.rollouts * run.prompt_tokens)
    widest = run.compute_bytes * (3 * model.intermediate_size + 4 * model.hidden_size) + 8 * model.hidden_size
    sampling = 36 * run.rollouts * model.vocab_size  # logits, and probabilities in double precision
    vision = vision_bytes(model, replace(run, freeze_vision=True), prompts * run.image_tokens // run.prompt_tokens)
    parts |= {
        "KV cache": cache_bytes(model, run, slots),
        "working memory": max(prompts * widest, vision, sampling) + _cast_copies(model, run),
    }
    return Memory("R-GRPO rollouts", parts)


def _grpo_extras(model: Architecture, run: Run) -> dict[str, int]:
    """The reference of the KL divergence, and the features that a frozen vision tower keeps of a step's images."""
    extras = {}
    if run.beta:
        reference = (
            weight_bytes(model, run) // (run.num_gpus if run.sharding in ("zero3", "fsdp2") else 1)
            if run.method == "full"
            else 4 * model.lora_parameters(run.lora_r)
        )
        extras["reference"] = reference
    if run.freeze_vision:
        per_rollout = run.crops * run.crop_tokens + run.image_tokens
        step = run.batch_size * run.gradient_accumulation_steps
        extras["image features"] = step * per_rollout * model.hidden_size * run.base_bytes
    return extras


def phases(model: Architecture, run: Run, stages: tuple[str, ...] = ("sft", "grpo")) -> list[Memory]:
    """The peaks of the stages that run."""
    found = [sft_memory(model, run)] if "sft" in stages else []
    return found + ([rollout_memory(model, run), update_memory(model, run)] if "grpo" in stages else [])


def peak(model: Architecture, run: Run, stages: tuple[str, ...] = ("sft", "grpo")) -> Memory:
    return max(phases(model, run, stages), key=lambda memory: memory.allocated)


# --------------------------------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the host. What torch's allocator has no part in is reported in words only."""
    import torch

    words = ("out of memory", "can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def run_of(settings: TrainingSettings, stage: str, num_gpus: int, sharding: Sharding, longest: int | None) -> Run:
    """What a stage's settings are to the memory model; `longest` is the longest row of SFT, in tokens, where known."""
    config, model = getattr(settings, stage), settings.model
    half, full = config.bf16 or config.fp16, not config.use_lora
    method: Method = "full" if full else "qlora" if model.load_in_4bit else "lora"
    run = Run(
        method=method,
        lora_r=config.lora_r,
        lora_dropout=config.lora_dropout,
        half=half or model.dtype in ("bfloat16", "float16"),
        half_weights=full and model.dtype in ("bfloat16", "float16"),
        freeze_vision=model.freeze_vision,
        gradient_checkpointing=config.gradient_checkpointing,
        sharding=sharding,
        num_gpus=num_gpus,
        batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    if stage == "sft":
        if longest is None:
            return run
        prompt = longest // 2
        return replace(run, prompt_tokens=prompt, image_tokens=prompt // 2, answer_tokens=longest - prompt, crops=0)
    names = ("max_completion_length", "rollout_batch_size", "max_batch_tokens", "beta", "num_generations")
    return replace(run, **{name: getattr(config, name) for name in names})


SKIPS = "(skips rows)"


def savings(model: Architecture, run: Run, stage: str, on_gpu: bool = True) -> list[tuple[str, int]]:
    """(flags, bytes saved) of the changes that make the stage's peak smaller, the greatest first."""
    tokens = run.rollouts * run.rollout_row
    slots = min(run.max_batch_tokens or tokens, tokens) // 2
    batch, steps = run.batch_size // 2, 2 * run.gradient_accumulation_steps
    halved = replace(run, batch_size=batch, gradient_accumulation_steps=steps)
    is_full, is_grpo = run.method == "full", stage == "grpo"
    changes = [
        (f"--batch_size {batch} --gradient_accumulation_steps {steps}", halved, batch >= 1),
        ("--gradient_checkpointing true", replace(run, gradient_checkpointing=True), not run.gradient_checkpointing),
        ("--use_lora", replace(run, method="lora", half_weights=False), is_full),
        ("--use_lora --load_in_4bit", replace(run, method="qlora", half_weights=False), is_full),
        ("--load_in_4bit", replace(run, method="qlora"), run.method == "lora"),
        (f"--lora_r {run.lora_r // 2}", replace(run, lora_r=run.lora_r // 2), not is_full and run.lora_r >= 8),
        ("--bf16", replace(run, half=True), on_gpu and not run.half),
        (
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml",
            replace(run, sharding="fsdp2"),
            is_full and run.num_gpus > 1 and run.sharding == "ddp",
        ),
        (f"--max_batch_tokens {slots}", replace(run, max_batch_tokens=slots), is_grpo and slots >= run.rollout_row),
        ("--beta 0", replace(run, beta=0.0), is_grpo and run.beta > 0),
        (
            f"--max_completion_length {run.max_completion_length // 2}",
            replace(run, max_completion_length=run.max_completion_length // 2),
            is_grpo,
        ),
        (f"--max_length {run.sft_row // 2} {SKIPS}", _shorter(run), not is_grpo),
    ]

    def size(other: Run) -> tuple[int, int]:
        found = [memory.allocated for memory in phases(model, other, (stage,))]
        return max(found), sum(found)

    before = size(run)
    after = [(flags, *size(other)) for flags, other, applies in changes if applies]
    # The peak first; of a stage with two phases also what helps in the one that is not the peak. What costs rows is the
    # last resort, where the batch can still be halved.
    after.sort(key=lambda item: (SKIPS in item[0] and batch >= 1, item[1], item[2]))
    return [(flags, max(before[0] - top, 0)) for flags, top, total in after if (top, total) < before]


def _shorter(run: Run) -> Run:
    return replace(run, prompt_tokens=run.prompt_tokens // 2, answer_tokens=run.answer_tokens // 2)


def out_of_memory_message(model: Architecture, run: Run, stage: str, on_gpu: bool = True) -> str:
    """Where memory went, and the three settings that would help most."""
    largest = peak(model, run, (stage,))
    parts = sorted(largest.parts.items(), key=lambda part: -part[1])[:3]
    held = ", ".join(f"{name} {amount(value)}" for name, value in parts)
    taken = amount(largest.allocated) + (" a GPU" if on_gpu else "")
    lines = [f"out of memory. {largest.phase} takes about {taken} here, most of it {held}."]
    lines += ["What would help most, by the memory model:"]
    lines += [f"  {flags:<55} saves about {amount(value)}" for flags, value in savings(model, run, stage, on_gpu)[:3]]
    return "\n".join(lines)


def amount(value: int) -> str:
    return f"{value / GIB:.1f} GB" if value >= GIB / 10 else f"{value / 2**20:.1f} MB"
