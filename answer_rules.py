"""Is this answer right? Rules for choices, yes/no, numbers, lists, phrases and sentences; no model is asked."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter

from rapidfuzz.distance import Levenshtein

MAX_ANSWER_LENGTH = 1000  # characters; from here on an answer scores 0, as in DeepEyes
NUMBER_TOLERANCE = 0.01  # relative, where the expected number has decimals
WORD_SIMILARITY, PHRASE_SIMILARITY = 0.8, 0.5  # ANLS below these is 0; 0.5 is the metric's own threshold
MAX_PHRASE_WORDS = 6  # a longer expected answer is a sentence

# ---------------------------------------------------------------------------------------------- reading

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


# ------------------------------------------------------------------------------------------------ rules


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
