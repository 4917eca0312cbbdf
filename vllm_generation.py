"""The engine's contract on vLLM: inside this process, or on a `vllm serve` that runs elsewhere.

    pip install -r requirements-vllm.txt     # in an environment of its own; a client of a server needs no vLLM

A response runs until `</tool_call>`; then its request ends, the crop is cut, and all tokens and images so far are
sent as a new request, whose beginning vLLM finds in its prefix cache. Tokens go in and tokens come out on both ways:
vLLM's `/inference/v1/generate` takes them with images, which its OpenAI-compatible `/v1/completions` does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from config import GRPOStageConfig, InferenceConfig, SettingsError, is_main_process
from conversation import IMAGE_PAD, Prompt, Renderer, check_image_tokens
from model_utils import LoadedModel, base_model_of, inference_dtype, is_adapter, load_for_inference, load_processor
from patience import shared_outage
from rollouts import Response, Rollout, RolloutWriter, SamplingParams
from vllm_server import Answer, Completion, Request, VLLMServer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FORBIDDEN = -1e9  # added to the logit of a token that must never be sampled; JSON has no infinity


class Backend(Protocol):
    """Where vLLM runs. rows: responses side by side. max_length: tokens, image tokens included, that a sequence may
    have. is_shared: whether all processes use the same one."""

    rows: int
    max_length: int
    is_shared: bool

    def run(self, requests: Sequence[Request], answers: Sequence[Answer], temperature: float) -> None:
        """Complete all requests; each answer gets its request's completion and returns the next request or None."""

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replace weights, and forget what was computed with the old ones."""


class VLLMEngine:
    """Generates with crops on vLLM; results are those of `CropEngine`.

    model: where it trains, `sync_weights` brings its weights to vLLM; an adapter is merged on the way.
    gathered: a context in which the model's weights are whole, where training cuts them up.
    """

    gathered: Callable[[], AbstractContextManager] = nullcontext

    def __init__(
        self,
        backend: Backend,
        renderer: Renderer,
        config: Any,
        generation_config: Any,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.backend, self.renderer, self.model = backend, renderer, model
        self.writer = RolloutWriter(renderer, config, generation_config, lambda tokens: tokens <= backend.max_length)

    @property
    def batch_size(self) -> int:
        return self.backend.rows

    def sync_weights(self) -> None:
        """Bring the model's present weights to vLLM; to be called on every process. TRL does before each rollout."""
        with self.gathered(), shared_outage():  # in which all wait for the first
            if is_main_process() or not self.backend.is_shared:
                self.backend.load(trained_weights(self.model))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        counts: int | Sequence[int] = 1,
        forced: Sequence[Sequence[int]] | None = None,
        on_finish: Callable[[int], None] | None = None,
        keep_features: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """`counts` rollouts of each prompt, in order, prompt by prompt; see `CropEngine.generate`.

        keep_features: vLLM keeps the images' features to itself, so there are none to keep.
        """
        import torch

        if sampling.seed is None:  # vLLM's own seed would be the same on every process
            sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
        counts = [counts] * len(prompts) if isinstance(counts, int) else list(counts)
        owners = [number for number, count in enumerate(counts) for _ in range(count)]
        rows = []
        for place, (owner, number) in enumerate(zip(owners, numbers or range(len(owners)), strict=True)):
            prompt = prompts[owner]
            check_image_tokens(prompt.ids, prompt.images, self.renderer, f"prompt {owner}")
            rows.append(_Row(prompt, sampling.max_new_tokens, forced[place] if forced else (), number))
        requests = [self._first_request(row, sampling) for row in rows]
        answers = [partial(self._answer, row, sampling, on_finish) for row in rows]
        self.backend.run(requests, answers, sampling.temperature)
        return [self.writer.rollout(row) for row in rows]

    def stream(self, prompt: Prompt, sampling: SamplingParams, forced: Sequence[int] = ()) -> Iterator[Response]:
        """One response to one prompt, given out at each of its calls and at its end; see `CropEngine.stream`."""
        import torch

        if sampling.seed is None:
            sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
        check_image_tokens(prompt.ids, prompt.images, self.renderer, "the prompt")
        row = _Row(prompt, sampling.max_new_tokens, forced)
        request = self._first_request(row, sampling)
        while request is not None:
            following: list[Request | None] = []

            def write(completion: Completion, following: list = following) -> None:
                following.append(self._answer(row, sampling, None, completion))

            self.backend.run([request], [write], sampling.temperature)
            request = following[0]
            yield row

    def _first_request(self, row: _Row, sampling: SamplingParams) -> Request:
        """The prompt and, without a step of decoding, the forced tokens behind it with the crops that they call for."""
        for token in row.forced:
            if row.finish_reason:
                break
            self.writer.take(row, token, 0.0, sampling)
            if row.crop is not None:
                row.show(self.renderer.image_block(row.crop.size))
        row.unscored = bool(row.ids)
        return self._request(row, sampling)

    def _request(self, row: _Row, sampling: SamplingParams) -> Request:
        ids = row.prompt.ids + row.ids
        if len(ids) >= self.backend.max_length:
            raise SettingsError(
                f"a prompt has {len(ids)} tokens, but vLLM was started for {self.backend.max_length}: raise its "
                "max_model_len"
            )
        values: dict[str, Any] = {
            # A finished row comes here to have its forced tokens scored; what is sampled behind them is dropped.
            "max_tokens": 1 if row.finish_reason else row.budget - row.sampled,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "logprobs": 0,  # of the sampled token alone
            "stop_token_ids": sorted({*self.writer.stop_ids, self.writer.call_close}),
            "logit_bias": dict.fromkeys(self.writer.suppressed, FORBIDDEN),
            "detokenize": False,
            # A request that goes on must not draw the same numbers again.
            "seed": (sampling.seed + 0x9E3779B97F4A7C15 * (row.index + 1) + row.sampled) % 2**63,
        }
        if row.unscored:
            values["prompt_logprobs"] = 0
        return Request(collapse(ids, self.renderer.ids[IMAGE_PAD]), row.images, len(ids), values)

    def _answer(self, row: _Row, sampling: SamplingParams, on_finish, completion: Completion) -> Request | None:
        """Write what vLLM sampled; returns the request that goes on behind a call."""
        expected = len(row.prompt.ids) + len(row.ids)
        if completion.prompt_length != expected:
            raise RuntimeError(
                f"vLLM read {completion.prompt_length} tokens where the conversation has {expected}: its image "
                "processor has other size limits, or images were expanded twice"
            )
        if row.unscored:
            scores = completion.prompt_logprobs[len(row.prompt.ids) - 1 :]
            row.logprobs = [score * own for score, own in zip(scores, row.mask, strict=True)]
            row.unscored = False
        if not row.finish_reason:
            self._write(row, completion, sampling)
        if row.finish_reason:
            if on_finish:
                on_finish(1)
            return None
        return self._request(row, sampling)

    def _write(self, row: _Row, completion: Completion, sampling: SamplingParams) -> None:
        for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
            self.writer.take(row, token, logprob, sampling)
        if row.crop is not None:
            row.show(self.renderer.image_block(row.crop.size))
        full = len(row.prompt.ids) + len(row.ids) >= self.backend.max_length
        if not row.finish_reason and (full or completion.ids[-1] != self.writer.call_close):
            row.finish_reason = "length"  # vLLM stopped at the longest sequence that it was started for


def training_engine(loaded: LoadedModel, renderer: Renderer, config: GRPOStageConfig, start: str) -> VLLMEngine:
    """The engine for rollouts of a model in training; `start` is what it was loaded from."""
    rows = config.rollout_batch_size
    if config.vllm_server is not None:
        folder = config.vllm_sync_dir or Path(config.output_dir, "vllm_weights")
        backend = VLLMServer(config.vllm_server, rows, folder, config.vllm_patience)
    else:
        base = base_model_of(start) if is_adapter(start) else start
        dtype = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
        backend = LocalVLLM(base, renderer, dtype, rows, config.vllm_gpu_memory_utilization)
    model = loaded.model
    return VLLMEngine(backend, renderer, model.config, model.generation_config, model)


def inference_engine(config: InferenceConfig) -> VLLMEngine:
    """The engine for the answers of a trained model; an adapter is merged, as it is without vLLM."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    path = base_model_of(config.model_path) if is_adapter(config.model_path) else config.model_path
    processor, contract = load_processor(config.model_path)
    renderer = Renderer(processor, contract)
    if config.vllm_server is not None:
        backend = VLLMServer(config.vllm_server, config.batch_size)
    else:
        dtype = inference_dtype(config, "cuda" if torch.cuda.is_available() else "cpu")
        backend = LocalVLLM(path, renderer, str(dtype).removeprefix("torch."), config.batch_size)
        if path != config.model_path:
            merged = load_for_inference(replace(config, backend="engine", device="cpu")).model
            backend.load(iter(merged.state_dict().items()))
    return VLLMEngine(
        backend,
        renderer,
        AutoConfig.from_pretrained(path, trust_remote_code=False),
        GenerationConfig.from_pretrained(path),
    )


@dataclass(eq=False)
class _Row(Response):
    """A response on vLLM; `unscored` until the log-probs of its forced tokens are known."""

    unscored: bool = False


def collapse(ids: Sequence[int], pad: int) -> list[int]:
    """One image pad an image: vLLM writes as many as the image takes."""
    return [token for at, token in enumerate(ids) if token != pad or at == 0 or ids[at - 1] != pad]


def trained_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the weights that training changes, an adapter merged in; the model stays as it is.

    A tower (vision, language) comes whole or not at all: vLLM fuses layers, and loads a fused one whole. Merging in
    place and back again, as is usual, would round the base's weights a little further at every step.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    trained = {is_visual(name) for name, value in model.named_parameters() if value.requires_grad}
    layers = {name: layer for name, layer in base.named_modules() if hasattr(layer, "base_layer")}
    with torch.no_grad():
        for name, value in base.named_parameters():  # FSDP's `state_dict` would cut up again what was made whole
            owner, _, kind = name.rpartition(".")
            is_tied = name == "lm_head.weight" and base.config.tie_word_embeddings
            if is_visual(name) not in trained or "lora_" in name or is_tied:
                continue
            if hasattr(value, "quant_state"):  # 4 bits
                value = dequantize_module_weight(base.get_submodule(owner))
            layer = layers.get(owner.removesuffix(".base_layer"))
            if layer is not None and kind == "weight":
                for adapter in layer.active_adapters:
                    value = value + layer.get_delta_weight(adapter)
            yield name.replace(".base_layer.", "."), value


def is_visual(name: str) -> bool:
    return ".visual." in f".{name}"


# ------------------------------------------------------------------------------------------ in this process


class LocalVLLM:
    """vLLM inside this process, on this process's GPU.

    It stands on vLLM's own engine loop (`LLM.llm_engine`), so that a response whose crop is cut goes on at once
    instead of when all others have come to a call.
    """

    is_shared = False

    def __init__(self, path: str, renderer: Renderer, dtype: str, rows: int, memory: float = 0.9) -> None:
        """path: full weights. rows: responses side by side. memory: share of the GPU's memory."""
        vllm = import_vllm()
        import torch

        self.rows = rows
        on_gpu = torch.cuda.is_available()
        on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
        self.sampling_params = vllm.SamplingParams
        self.llm = vllm.LLM(
            path,
            dtype=dtype,
            max_model_len=-1,  # the longest sequence that the model knows and the memory holds
            max_num_seqs=rows,
            limit_mm_per_prompt={"image": 999, "video": 0},
            mm_processor_kwargs={"size": dict(renderer.processor.image_processor.size)},
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            trust_remote_code=False,
            # One vLLM a process: several processes are not one vLLM on several GPUs.
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            **({"gpu_memory_utilization": memory} if on_gpu else on_cpu),
        )
        self.max_length = self.llm.llm_engine.model_config.max_model_len
        self.started = 0

    def run(self, requests: Sequence[Request], answers: Sequence[Answer], temperature: float) -> None:
        # Raw log-probs are those of the logits as the model makes them, so the model divides by the temperature.
        self.llm.apply_model(partial(_scale_logits, 1 / temperature if temperature > 0 else 1.0))
        engine, running = self.llm.llm_engine, {}

        def add(request: Request, answer: Answer) -> None:
            self.started += 1
            running[str(self.started)] = answer
            prompt = {"prompt_token_ids": request.ids, "multi_modal_data": {"image": list(request.images)}}
            values = request.sampling | {"temperature": 1.0 if temperature > 0 else 0.0}
            engine.add_request(str(self.started), prompt, self.sampling_params(**values))

        try:
            for request, answer in zip(requests, answers, strict=True):
                add(request, answer)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        answer = running.pop(output.request_id)
                        following = answer(_completion(output))
                        if following is not None:
                            add(following, answer)
        finally:
            engine.abort_request(list(running))

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()


def import_vllm() -> Any:
    # The engine must run in this process, where the weights are; vLLM reads these when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise SettingsError(
            f"vLLM cannot be imported ({error}): pip install -r requirements-vllm.txt, in an environment of its own, "
            "or name a running server (--vllm_server URL), which needs no vLLM here"
        ) from None
    return vllm


def _scale_logits(scale: float, model: Any) -> None:
    model.language_model.logits_processor.scale = scale


def _completion(output: Any) -> Completion:
    done = output.outputs[0]
    return Completion(
        ids=list(done.token_ids),
        logprobs=[values[token].logprob for token, values in zip(done.token_ids, done.logprobs, strict=True)],
        prompt_logprobs=[
            values[token].logprob
            for token, values in zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
        ],
        prompt_length=len(output.prompt_token_ids),
    )
