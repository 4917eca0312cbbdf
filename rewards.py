"""A finished response and its boxes -> numbers; nothing here knows a model or a token.

A part of a reward is any function `(response, reference) -> float`; a preset is a tuple of weighted parts, each
logged by itself. The examples below share these two (the crop shows the right half of the bird):

>>> from response_format import parse_response
>>> calls = (ToolCall("[50, 0, 100, 100]", 8, "exact", Box(50, 0, 100, 100)),)
>>> text = "<think>\\n<tool_call>[50, 0, 100, 100]</tool_call>I see a bird.\\n</think>\\n<answer>a bird</answer>"
>>> response = parse_response(text, calls)
>>> reference = Reference("bird", (Box(0, 0, 100, 100),), image_size=(400, 300))

Your own reward works like the built-in ones:

>>> def brief(response, reference):
...     return float(len(response.answer_content) < 20)
>>> scores = score(response, reference, (RewardPart("accuracy", accuracy_reward), RewardPart("brief", brief, 0.5)))
>>> scores
{'accuracy': 1.0, 'brief': 1.0}
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from crop_tool import CALL_PATTERN, Box, ToolCall
from response_format import ParsedResponse

MAX_ANSWER_LENGTH = 1000  # characters; from here on an answer scores 0, as in DeepEyes
CORRECT_AT = 0.8  # where a paper says "the answer is right": exact kinds give 1 or 0, a slip of the pen is forgiven
NUMBER_TOLERANCE = 0.01  # relative, where the expected number has decimals
WORD_SIMILARITY, PHRASE_SIMILARITY = 0.8, 0.5  # ANLS below these is 0; 0.5 is the metric's own threshold
MAX_PHRASE_WORDS = 6  # a longer expected answer is a sentence
REPEATED_IOU, WHOLE_IMAGE_SHARE = 0.9, 0.9


@dataclass(frozen=True)
class Reference:
    """What a response is held against.

    answer: the expected answer.
    boxes: annotated regions in pixels of the ORIGINAL image, as `crop_tool.resolve_box` makes them (a raw
        annotation smaller than a crop can be would keep the right call from an IoU of 1); may be empty.
    image_size: (width, height) of the original image.
    """

    answer: str
    boxes: tuple[Box, ...]
    image_size: tuple[int, int]


@dataclass(frozen=True)
class RewardPart:
    """One summand of a reward: `weight * function(response, reference)`, logged under `name`."""

    name: str
    function: Callable[[ParsedResponse, Reference], float]
    weight: float = 1.0


# ---------------------------------------------------------------------------------------- answers: reading

_ARTICLES = ("a", "an", "the")
_NUMBER_WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9}
_SYMBOLS = {"%": " percent ", "$": " dollar ", "€": " euro ", "£": " pound ", "¥": " yen "}
_LETTER_LEADS = {"answer", "option", "choice", "choose", "is", "or", "and", "maybe", "perhaps"}
_VAGUE = {"about", "approximately", "around", "exactly", "only", "roughly"}

_LEAD = re.compile(
    r"^(?:(?:the )?(?:final |correct |right )?answer(?: is\b|:)"
    r"|(?:it|this|that|they|these|there) (?:is|are)\b|(?:it|that|there)'s\b)[\s:]*",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n't\b|\bno\b(?!\s*[.,])", re.IGNORECASE)
_TOKEN = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_SILENT = re.compile(r"['.](?![0-9])")  # D.C. is dc, 3.5 stays
_SEPARATING = re.compile(r"(?<![0-9])[^\w\s+#%]|[^\w\s+#%](?![0-9])|_")  # 10:30 and 1/2 stay
# A capital letter or a word with digits right behind makes it a code (12B, 4x4), a dot or comma a part of more.
_NUMBER = re.compile(
    r"(?<![\w.])(?<![0-9],)[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?![.,]?[0-9]|[A-Z]\b|[A-Za-z]+[0-9])"
)
_CHOICE = re.compile(r"\(?([A-Za-z])\)?[.:]?|\(?([A-H])[).:]+\s+(.+)")
_YES_NO = re.compile(r"(yes|no)(?:$|[.,!;]|\s+(?:it|he|she|they|there|the)\b)", re.IGNORECASE)


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").replace("\u2212", "-")
    return " ".join(text.split())


def _words(text: str) -> list[str]:
    """Words without case, punctuation, articles and a lead like "the answer is"."""
    text = _SILENT.sub("", _LEAD.sub("", text.casefold()))
    return [word for word in _SEPARATING.sub(" ", text).split() if word not in _ARTICLES]


def _letters(answer: str) -> set[str]:
    """Choice letters that an answer names: alone, listed, marked as in "(B)" or "B.", or behind "answer is"."""
    tokens = _TOKEN.findall(answer.lower())
    found = set()
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        if token in ("not", "never", "neither", "nor") or token.endswith("n't"):
            break  # what follows is denied
        introduced = not before[:1].isalnum() or before in _LETTER_LEADS
        # In "A cat" and "the answer is a cat" a word follows: an article, or no choice at all.
        closed = not after[:1].isalnum() or after in ("or", "and", "because")
        if re.fullmatch("[a-z]", token) and introduced and closed:
            found.add(token)
    return found


def _items(text: str) -> set[str]:
    return {" ".join(_words(item)) for item in re.split(r"[,;]|\band\b", _LEAD.sub("", text))} - {""}


def _quantity(text: str) -> tuple[float, set[str]] | None:
    """The one number of a text and the words beside it (the unit); None where there is no number, or two."""
    values = {float(match.replace(",", "")) for match in _NUMBER.findall(text)}
    rest = _NUMBER.sub(" ", text)
    for symbol, name in _SYMBOLS.items():
        rest = rest.replace(symbol, name)
    words = _words(rest.replace("per cent", "percent"))
    values |= {float(_NUMBER_WORDS.index(word)) for word in words if word in _NUMBER_WORDS}
    if len(values) != 1:
        return None
    scale = math.prod({_SCALES[word] for word in words if word in _SCALES})
    unit = {word.removesuffix("s") if len(word) > 2 else word for word in words}
    return values.pop() * scale, unit - {*_NUMBER_WORDS, *_SCALES, *_VAGUE}


def _starts_with_number(text: str) -> bool:
    text = text.lstrip("$€£¥~ ")
    return bool(_NUMBER.match(text)) or text.split(" ")[0].casefold() in _NUMBER_WORDS


# ------------------------------------------------------------------------------------------ answers: rules


def answer_kind(expected: str) -> str:
    """The kind of an expected answer, which decides the rule in `answer_accuracy`."""
    text = _clean(expected)
    if _CHOICE.fullmatch(text):
        return "choice"
    if _YES_NO.match(text):
        return "yes_no"
    if _starts_with_number(text) and (quantity := _quantity(text)) and len(quantity[1]) <= 2:
        return "number"
    items = _items(text)
    if len(items) >= 2 and all(len(item.split()) <= 3 for item in items):
        return "list"
    return "sentence" if len(_words(text)) > MAX_PHRASE_WORDS else "phrase"


def answer_accuracy(answer: str, expected: str) -> float:
    """How right an answer is, 0 to 1, by the rule for the kind of the expected one.

    | kind | expected, e.g. | scores |
    |---|---|---|
    | choice | `B`, `(B)`, `B. cat` | 1 if B is the only letter named, or the option's text is given |
    | yes_no | `yes`, `No, it is red.` | 1 if the first word agrees and no clause says the opposite |
    | number | `1,200`, `3 dogs`, `two` | 1 if the only number agrees, and the unit where both have one |
    | list | `red, blue and green` | 1 if the same set is named, in any order |
    | phrase | up to 6 words | ANLS from 0.5 up (one word: from 0.8 up), 0 with a word exchanged or denied |
    | sentence | more words | F1 of the words |

    Numbers agree exactly (counts, years), or within 1% where the expected one has decimals.
    Case, punctuation, articles, Unicode forms and leads like "the answer is" do not count. Naming several
    alternatives earns 0 wherever one was asked for, and so do answers of 1000 characters and more (DeepEyes).

    >>> answer_accuracy("The answer is (B).", "B. cat"), answer_accuracy("A cat", "A")
    (1.0, 0.0)
    >>> answer_accuracy("rising", "falling"), answer_accuracy("3 dogs", "three")
    (0.0, 1.0)
    """
    if not answer.strip() or len(answer) >= MAX_ANSWER_LENGTH:
        return 0.0
    return _RULES[answer_kind(expected)](_clean(answer), _clean(expected))


def _choice_accuracy(answer: str, expected: str) -> float:
    single, marked, option = _CHOICE.fullmatch(expected).groups()
    if option and _words(answer) and _words(answer) in (_words(option), _words(expected)):
        return 1.0
    return float(_letters(answer) == {(single or marked).lower()})


def _yes_no_accuracy(answer: str, expected: str) -> float:
    wanted = _YES_NO.match(expected).group(1).lower()
    opposite = "no" if wanted == "yes" else "yes"
    tokens = _TOKEN.findall(_LEAD.sub("", answer.lower()))
    words = [token for token in tokens if token[0].isalnum()]
    if words[:1] != [wanted]:
        return 0.0
    # "Yes, there is no car" is a yes, "yes, no", "yes or no" and "yes it is no" are not.
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        heads_clause = not before[:1].isalnum() or before in ("or", "and", "but", wanted)
        if token == opposite and (heads_clause or not after):
            return 0.0
    return 1.0


def _number_accuracy(answer: str, expected: str) -> float:
    given, (wanted, unit) = _quantity(answer), _quantity(expected)
    if given is None or _NEGATION.search(answer):
        return 0.0
    if given[1] and not unit <= given[1]:  # a bare number passes, another unit does not
        return 0.0
    tolerance = 0.0 if wanted.is_integer() else NUMBER_TOLERANCE * abs(wanted)
    return float(given[0] == wanted or abs(given[0] - wanted) <= tolerance)


def _list_accuracy(answer: str, expected: str) -> float:
    return float(_items(answer) == _items(expected))


def _phrase_accuracy(answer: str, expected: str) -> float:
    given, wanted = _words(answer), _words(expected)
    if not wanted:  # nothing but punctuation or articles: there is no word to compare
        return float(answer.casefold() == expected.casefold())
    if "".join(given) == "".join(wanted):
        return 1.0
    missing = any(not any(_is_same_word(word, other) for other in given) for word in wanted)
    surplus = any(not any(_is_same_word(word, other) for other in wanted) for word in given)
    if (missing and surplus) or bool(_NEGATION.search(answer)) != bool(_NEGATION.search(expected)):
        return 0.0
    similarity = Levenshtein.normalized_similarity(" ".join(given), " ".join(wanted))
    return similarity if similarity >= (WORD_SIMILARITY if len(wanted) == 1 else PHRASE_SIMILARITY) else 0.0


def _is_same_word(word: str, other: str) -> bool:
    """Equal but for a slip. A digit is never one, nor the first letter (possible, impossible)."""
    if word == other:
        return True
    if word[0] != other[0] or any(letter.isdigit() for letter in word + other):
        return False
    return Levenshtein.normalized_similarity(word, other) >= WORD_SIMILARITY


def _sentence_accuracy(answer: str, expected: str) -> float:
    given, wanted = Counter(_words(answer)), Counter(_words(expected))
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


_RULES = {
    "choice": _choice_accuracy,
    "yes_no": _yes_no_accuracy,
    "number": _number_accuracy,
    "list": _list_accuracy,
    "phrase": _phrase_accuracy,
    "sentence": _sentence_accuracy,
}


# ---------------------------------------------------------------------------------------- parts: the answer


def accuracy_reward(response: ParsedResponse, reference: Reference) -> float:
    """Accuracy of the answer by rules, 0 to 1; see `answer_accuracy`.

    >>> accuracy_reward(response, reference)
    1.0
    """
    return answer_accuracy(response.answer_content, reference.answer)


def correctness_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 for a right answer, else 0 (the accuracy of VLM-R3 and DeepEyes, who ask a judge): accuracy >= 0.8.

    >>> correctness_reward(response, reference)
    1.0
    """
    return float(accuracy_reward(response, reference) >= CORRECT_AT)


def format_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 for one non-empty think part and then one non-empty answer part, else 0 (VLM-R3, section R-GRPO).

    >>> format_reward(response, reference), format_reward(parse_response("a bird"), reference)
    (1.0, 0.0)
    """
    return float(response.is_well_formed and bool(response.think_content) and bool(response.answer_content))


def format_penalty(response: ParsedResponse, reference: Reference) -> float:
    """0 for the right format, -1 for a broken one (DeepEyes).

    >>> format_penalty(response, reference), format_penalty(parse_response("a bird"), reference)
    (0.0, -1.0)
    """
    return format_reward(response, reference) - 1.0


def length_reward(response: ParsedResponse, reference: Reference) -> float:
    """Characters of reasoning without the calls, 0 to 1 at 250 (VLM-R3: 0.001 for each, up to 0.25).

    >>> length_reward(response, reference)  # "I see a bird."
    0.052
    """
    characters = sum(len(segment.strip()) for segment in _segments(response.think_content))
    return min(1.0, characters / 250)


def segment_length_reward(response: ParsedResponse, reference: Reference) -> float:
    """Characters of the shortest stretch of reasoning, 0 to 1 at 10 (VLM-R3's code: 0.01 for each, up to 0.10).

    Stretches are what calls leave before the answer; an empty one between two calls is passed over, one at
    either end is not.

    >>> segment_length_reward(response, reference)  # it opens with a call
    0.0
    """
    reasoning = re.sub(r"</?think>", "", response.text[: response.answer_start])
    first, *middle = (len(" ".join(segment.split())) for segment in _segments(reasoning))
    inner, last = middle[:-1], middle[-1:]
    return min(1.0, min([first, *filter(None, inner), *last]) / 10)


def _segments(text: str) -> list[str]:
    return CALL_PATTERN.split(text)[::2]  # every second item is the inside of a call


# ---------------------------------------------------------------------------------------- parts: the region


def region_validity_reward(response: ParsedResponse, reference: Reference) -> float:
    """Share of the calls whose region exists, 0 to 1; 0 without calls.

    >>> region_validity_reward(response, reference)
    1.0
    """
    calls = response.tool_calls
    return sum(call.is_valid for call in calls) / len(calls) if calls else 0.0


def grounding_reward(response: ParsedResponse, reference: Reference) -> float:
    """Overlap of the calls with the annotated boxes, 0 to 1: total IoU of the best one-to-one matching,
    divided by the number of calls or of boxes, whichever is larger.

    Only crops that were shown before the answer can match, but every call counts in the divisor. So of several
    guesses that are equally good, one is worth as much as all together, and any useless call costs. Without
    annotated boxes it is 0 for every response.

    >>> grounding_reward(response, reference)
    0.5
    """
    if not response.tool_calls or not reference.boxes:
        return 0.0
    return _matched_iou(response, reference) / max(len(response.tool_calls), len(reference.boxes))


def crop_use_reward(response: ParsedResponse, reference: Reference) -> float:
    """Share of useful calls, 0 to 1; 0 without calls, and a useless one can only lower it.

    Useless are calls without a crop, after the answer began, of the whole image (90% of its area), and those
    that repeat an earlier crop (IoU of 0.9).

    >>> crop_use_reward(response, reference)
    1.0
    """
    verdicts = _verdicts(response, reference)
    return verdicts.count("useful") / len(verdicts) if verdicts else 0.0


def region_if_correct_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 if a call is valid and the answer right, else 0 (VLM-R3: 0.5 for each valid box up to 0.5, times [acc = 1]).

    >>> region_if_correct_reward(response, reference)
    1.0
    """
    return float(any(call.is_valid for call in response.tool_calls)) * correctness_reward(response, reference)


def parsed_region_if_correct_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 if there are calls, all of them parse, and the answer is right, else 0 (VLM-R3's code; bounds unchecked).

    >>> parsed_region_if_correct_reward(response, reference)
    1.0
    """
    calls = response.tool_calls
    parsed = bool(calls) and all(call.outcome != "malformed" for call in calls)
    return float(parsed) * correctness_reward(response, reference)


def crop_if_correct_reward(response: ParsedResponse, reference: Reference) -> float:
    """1 if a crop was shown before the answer and the answer is right, else 0 (DeepEyes).

    >>> crop_if_correct_reward(response, reference)
    1.0
    """
    return float(bool(_crops_before_answer(response))) * correctness_reward(response, reference)


def call_statistics(response: ParsedResponse, reference: Reference) -> dict[str, float]:
    """Counts to watch in training, for one response; mean over responses tells how often the tool is abused.

    calls: all; executed: crops shown; then each call that is not useful under the first reason that applies:
    invalid (no region, or never held against an image), over_limit, after_answer, whole_image, repeated.
    no_call: 1 without calls. iou: matched IoU per annotated box (surplus calls cost nothing here), nan without.

    >>> call_statistics(response, reference)["iou"]
    0.5
    """
    counts = Counter(_verdicts(response, reference))
    boxes = len(reference.boxes)
    return {
        "calls": float(len(response.tool_calls)),
        "executed": float(sum(call.is_executed for call in response.tool_calls)),
        **{name: float(counts[name]) for name in ("invalid", "over_limit", "after_answer", "whole_image", "repeated")},
        "no_call": float(not response.tool_calls),
        "iou": _matched_iou(response, reference) / boxes if boxes else math.nan,
    }


def _crops_before_answer(response: ParsedResponse) -> list[Box]:
    return [call.box for call in response.tool_calls if call.is_executed and call.start < response.answer_start]


def _verdicts(response: ParsedResponse, reference: Reference) -> list[str]:
    """For each call `useful`, or the first reason why it is not."""
    earlier: list[Box] = []
    verdicts = []
    for call in response.tool_calls:
        verdicts.append(_verdict(call, earlier, response.answer_start, reference.image_size))
        if verdicts[-1] == "useful":
            earlier.append(call.box)
    return verdicts


def _verdict(call: ToolCall, earlier: list[Box], answer_start: int, image_size: tuple[int, int]) -> str:
    if not call.is_executed:
        return "over_limit" if call.is_valid else "invalid"
    if call.start >= answer_start:
        return "after_answer"
    if call.box.area >= WHOLE_IMAGE_SHARE * image_size[0] * image_size[1]:
        return "whole_image"
    return "repeated" if any(call.box.iou(box) >= REPEATED_IOU for box in earlier) else "useful"


def _matched_iou(response: ParsedResponse, reference: Reference) -> float:
    rows, columns = sorted((_crops_before_answer(response), reference.boxes), key=len)
    return _largest_assignment([[row.iou(column) for column in columns] for row in rows])


def _largest_assignment(gains: list[list[float]]) -> float:
    """Largest sum of gains with each row and each column used at most once, for no more rows than columns.

    The Hungarian method: rows are placed one by one, each along the cheapest path of re-placements, where prices
    keep every reduced cost at zero or above. Exact, rows^2 * columns steps.
    """
    columns = len(gains[0]) if gains else 0
    row_price, column_price = [max(row) for row in gains], [0.0] * columns
    owner: list[int | None] = [None] * columns
    for start in range(len(gains)):
        distance, came_from = [math.inf] * columns, [start] * columns
        parent: list[int | None] = [None] * columns
        settled: dict[int, float] = {}
        row, reached, last = start, 0.0, None
        while row is not None:
            for column in range(columns):
                cost = reached + row_price[row] + column_price[column] - gains[row][column]
                if column not in settled and cost < distance[column]:
                    distance[column], came_from[column], parent[column] = cost, row, last
            last = min((column for column in range(columns) if column not in settled), key=distance.__getitem__)
            reached = settled[last] = distance[last]
            row = owner[last]
        row_price[start] -= reached
        for column, when in settled.items():
            if owner[column] is not None:
                row_price[owner[column]] -= reached - when
            column_price[column] += reached - when
        while last is not None:
            owner[last], last = came_from[last], parent[last]
    return sum(gains[row][column] for column, row in enumerate(owner) if row is not None)


# ------------------------------------------------------------------------------------------------ presets


def _balanced(global_weight: float, region_weight: float) -> tuple[RewardPart, ...]:
    return (
        RewardPart("accuracy", accuracy_reward, global_weight),
        RewardPart("format", format_reward, 0.2 * global_weight),
        RewardPart("grounding", grounding_reward, region_weight),
        RewardPart("crop_use", crop_use_reward, 0.1 * region_weight),
    )


# Each part lies in 0 to 1 (DeepEyes' format in -1 to 0), so the weights are the sizes that the papers give.
PRESETS: dict[str, tuple[RewardPart, ...]] = {
    "balanced": _balanced(1.0, 1.0),
    # VLM-R3, arXiv 2505.16192: r_acc + r_format + r_length + r_region * [r_acc = 1]
    "vlm_r3_paper": (
        RewardPart("accuracy", correctness_reward, 1.0),
        RewardPart("format", format_reward, 1.0),
        RewardPart("length", length_reward, 0.25),
        RewardPart("region", region_if_correct_reward, 0.5),
    ),
    # Its released code, which asks of the format only that the response ends with an answer.
    "vlm_r3_code": (
        RewardPart("accuracy", correctness_reward, 1.0),
        RewardPart("format", format_reward, 0.5),
        RewardPart("length", segment_length_reward, 0.10),
        RewardPart("region", parsed_region_if_correct_reward, 0.5),
    ),
    # DeepEyes, arXiv 2505.14362: 0.8 acc + 0.2 format + 1.2 [tool used and acc]
    "deepeyes": (
        RewardPart("accuracy", correctness_reward, 0.8),
        RewardPart("format", format_penalty, 0.2),
        RewardPart("crop_use", crop_if_correct_reward, 1.2),
    ),
}


def reward_parts(
    preset: str = "balanced", global_weight: float = 1.0, region_weight: float = 1.0
) -> tuple[RewardPart, ...]:
    """The parts of a preset; the weights scale the global (answer, format) and regional part of `balanced`.

    >>> [(part.name, part.weight) for part in reward_parts("balanced", region_weight=2.0)]
    [('accuracy', 1.0), ('format', 0.2), ('grounding', 2.0), ('crop_use', 0.2)]

    Raises:
        ValueError: for an unknown preset, or weights for a preset that has its paper's own.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no reward preset {preset!r}; did you mean {near!r}? All: {', '.join(PRESETS)}")
    if preset == "balanced":
        return _balanced(global_weight, region_weight)
    if (global_weight, region_weight) != (1.0, 1.0):
        raise ValueError(
            f"the reward preset {preset!r} has its paper's weights, so global_weight={global_weight} and "
            f"region_weight={region_weight} would not be read: leave them at 1.0, or use 'balanced'"
        )
    return PRESETS[preset]


def score(response: ParsedResponse, reference: Reference, parts: tuple[RewardPart, ...]) -> dict[str, float]:
    """Each part's unweighted value by its name.

    >>> score(response, reference, reward_parts("balanced"))
    {'accuracy': 1.0, 'format': 1.0, 'grounding': 0.5, 'crop_use': 1.0}
    """
    return {part.name: float(part.function(response, reference)) for part in parts}


def total(scores: dict[str, float], parts: tuple[RewardPart, ...]) -> float:
    """The reward: the weighted sum of `score`'s values.

    >>> parts = reward_parts("balanced")
    >>> round(total(score(response, reference, parts), parts), 3)
    1.8
    """
    return sum(part.weight * scores[part.name] for part in parts)
