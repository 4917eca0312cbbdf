"""Qwen's real vocabulary: the tool tokens' ids, and our renderer's ids on it.

The vocabulary comes with the package `dashscope` (development only), which is not imported.
"""

import base64
import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

import demo_model
from conversation import IGNORED, IMAGE_PAD, VISION_END, VISION_START, Example, Renderer
from crop_tool import CropContract, image_token_count

RESPONSE = (
    "<think>\nLinks oben: żółw, 龍 🙂 {Crop turtle 1 [0.00, 141.43, 79.23, 480.00]}\n\n  Then "
    "<Crop [300, 20, 640, 90.5]> and {Crop again [0, 0, 10, 10]}{Crop at once [600, 400, 640, 480]}\n</think>\n\n"
    "<answer>it's 3.14 %</answer>"
)
QUESTION = "What's there?  <Two spaces>\n¿Y aquí?"


def read_ranks() -> dict[bytes, int]:
    package = Path(importlib.util.find_spec("dashscope").origin).parent
    lines = (package / "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


def last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two tokens from which byte-pair encoding makes `token`: merge its bytes by rank until two are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in printable else next(hidden)) for byte in range(256)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    ranks, letters = read_ranks(), byte_letters()
    assert len(ranks) == 151_643

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(written, last_merge(ranks, token))) for token in ranks if len(token) > 1]
    vocab = {written(token): rank for token, rank in ranks.items()}
    for token in (*demo_model.SPECIAL_TOKENS, *demo_model.TOOL_TOKENS):
        vocab[token] = len(vocab)
    special = [AddedToken(token, special=True, normalized=False) for token in demo_model.SPECIAL_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in demo_model.TOOL_TOKENS])
    return tokenizer


@pytest.fixture(scope="module")
def real_renderer(tokenizer):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=demo_model.CHAT_TEMPLATE,
    )
    return Renderer(processor, CropContract())


@pytest.fixture(scope="module")
def encoded(real_renderer):
    return real_renderer.encode(Example(1, 0, "", QUESTION, RESPONSE), Image.new("RGB", (640, 480)))


@pytest.fixture(scope="module")
def rendered(real_renderer, encoded):
    """The conversation as the chat template writes it, one pad an image; the last line break is the template's."""
    # 640 x 480 is shown as 588 x 448: the final grid counts, not the 597 x 448 that the shorter side alone gives.
    calls = ["[0, 132, 73, 448]", "[276, 19, 588, 84]", "[0, 0, 9, 9]", "[551, 373, 588, 448]"]
    first, second, third, fourth = (f"<tool_call>{call}</tool_call>" for call in calls)
    texts = [f"<think>\nLinks oben: żółw, 龍 🙂 {first}", f"\n\n  Then {second}", f" and {third}", fourth]
    parts = [part for text in texts for part in ({"type": "text", "text": text}, {"type": "image"})]
    parts.append({"type": "text", "text": "\n</think>\n\n<answer>it's 3.14 %</answer>"})
    messages = [*real_renderer.messages(QUESTION), {"role": "assistant", "content": parts}]
    return real_renderer.processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")


def test_the_tool_tokens_are_in_the_vocabulary_already(tokenizer):
    ids = {"<tool_call>": 151657, "</tool_call>": 151658, "<|im_end|>": 151645, "<|image_pad|>": 151655}
    ids |= {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|vision_start|>": 151652, "<|vision_end|>": 151653}
    assert {token: tokenizer(token).input_ids for token in ids} == {token: [id_] for token, id_ in ids.items()}
    assert len(tokenizer) == 151_659


def test_known_texts_have_qwens_ids(tokenizer):
    """Ids as Qwen2.5's published tokenizer gives them: were the merges wrong, these would be other pieces."""
    assert tokenizer("Hello, world!").input_ids == [9707, 11, 1879, 0]
    assert tokenizer("system\nYou are a helpful assistant.").input_ids == [8948, 198, 2610, 525, 264, 10950, 17847, 13]
    assert tokenizer.tokenize("[280, 19]") == ["[", "2", "8", "0", ",", "Ġ", "1", "9", "]"]


def test_our_ids_read_back_as_the_text_of_the_chat_template(tokenizer, real_renderer, encoded, rendered):
    pad, collapsed = real_renderer.ids[IMAGE_PAD], []
    for token in encoded.input_ids:
        if token != pad or collapsed[-1:] != [pad]:
            collapsed.append(token)
    assert tokenizer.decode(collapsed) == rendered
    assert encoded.input_ids.count(pad) == 21 * 16 + sum(
        image_token_count(*image.size, real_renderer.contract) for image in encoded.images[1:]
    )
    assert len(encoded.images) == 5


def test_segment_by_segment_gives_the_ids_of_the_whole_text(tokenizer, real_renderer, encoded, rendered):
    block = VISION_START + IMAGE_PAD + VISION_END
    for image in encoded.images:
        pads = IMAGE_PAD * image_token_count(*image.size, real_renderer.contract)
        rendered = rendered.replace(block, VISION_START + "\0" + pads + VISION_END, 1)
    assert tokenizer(rendered.replace("\0", "")).input_ids == encoded.input_ids


def test_the_models_own_text_reads_back_from_the_labels(tokenizer, encoded, rendered):
    own = tokenizer.decode([label for label in encoded.labels if label != IGNORED])
    answer = rendered.partition("<|im_start|>assistant\n")[2]
    assert own == answer.replace(VISION_START + IMAGE_PAD + VISION_END, "")


def test_the_processors_of_both_sides_agree_on_every_image(real_renderer, encoded):
    processor = real_renderer.processor.image_processor
    processor.size = {"shortest_edge": 28**2, "longest_edge": 1280 * 28**2}
    grids = processor(images=list(encoded.images), return_tensors="pt")["image_grid_thw"].tolist()
    assert [(28 * w // 2, 28 * h // 2) for _, h, w in grids] == [image.size for image in encoded.images]
