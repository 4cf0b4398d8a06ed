"""The formats of rows: columns become prompt and answer, these a text, the text tokens and labels.

Three pure steps: `to_conversation` reads the columns, `render` writes them as one text and marks the answers as
character spans, `tokenize` turns text and spans into token ids and labels. Working on character spans, and not on two
tokenized halves, keeps the labels right for tokenizers that merge across the border of the halves.
"""

import re
from dataclasses import dataclass
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from heterofusion.runtime.errors import UserError

IGNORE_INDEX = -100  # what torch's cross entropy skips

Message = dict[str, str]
Part = str | list[Message]

# In the order of precedence: the first format whose columns are all there is taken.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
KNOWN_COLUMNS = "`messages`, `prompt` and `completion`, `instruction` and `output` (`input`, `history`), or `text`"
_PLACEHOLDER = "x"  # an answer where there is none: a word, as most answers begin


@dataclass(frozen=True)
class Rendered:
    """One example as text."""

    text: str
    spans: list[tuple[int, int]]  # the character ranges that get loss, none where there is no answer
    templated: bool  # whether a chat template wrote all special tokens; then none are added


@dataclass(frozen=True)
class Prompt:
    """One example as it is asked: the text before the answer."""

    text: str
    templated: bool
    reference: str  # the right answer, empty without one


def detect_format(columns: Any) -> str | None:
    """Name of the first of `FORMATS` whose columns are all among `columns`."""
    return next((name for name, needed in FORMATS.items() if all(column in columns for column in needed)), None)


# ---- columns -> prompt and answer --------------------------------------------------------------------------------


def to_conversation(record: dict[str, Any], format: str) -> tuple[Part, Part]:
    """Split a row into its prompt and its answer, both strings or both lists of messages.

    Only the answer gets loss, and of a list of messages only its assistant turns: `messages` comes back as
    `([], messages)`, `text` as `("", text)`, alpaca as messages.
    """
    for column in FORMATS[format]:
        if column not in record:
            found = ", ".join(record) or "none"
            raise UserError(f"the column `{column}` is missing (found: {found}), but the first record has it: add it")
    if format == "text":
        return "", check_string(record["text"], "text")
    if format == "messages":
        return [], _messages(record["messages"], "messages")
    if format == "alpaca":
        return _alpaca(record)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) != isinstance(completion, list) and None not in (prompt, completion):
        found = f"{type_name(prompt)} and {type_name(completion)}"
        raise UserError(f"`prompt` and `completion` are {found}: make both strings or both lists of messages")
    read = _messages if isinstance(prompt, list) and isinstance(completion, list) else check_string
    return read(prompt, "prompt"), read(completion, "completion")


def _alpaca(record: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    prompt, output = check_string(record["instruction"], "instruction"), check_string(record["output"], "output")
    # `input` and `history` are optional columns: tables hold null where a row has none.
    extra = check_string(record["input"], "input") if record.get("input") is not None else ""
    if extra.strip() and extra not in prompt:
        prompt = f"{prompt}\n{extra}"
    turns: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"`history` is {str(history)[:60]!r}: make it a list of [prompt, answer] pairs")
    for i, pair in enumerate(history):
        for j, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": check_string(pair[j], f"history[{i}][{j}]")})
    return [*turns, {"role": "user", "content": prompt}], [{"role": "assistant", "content": output}]


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"`{field}` is {type_name(value)}: make it a list of messages with `role` and `content`")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise UserError(f"`{field}[{i}]` is {str(message)[:60]!r}: make it an object with `role` and `content`")
        for key in ("role", "content"):
            check_string(message[key], f"{field}[{i}].{key}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def check_string(value: Any, field: str) -> str:
    """Give back a string that a tokenizer can read; `field` names it in messages."""
    if not isinstance(value, str):
        raise UserError(f"`{field}` is {type_name(value)}: make it a string or leave the record out")
    if half := re.search(r"[\ud800-\udfff]", value):
        raise UserError(f"`{field}` holds half a surrogate pair at character {half.start()}: remove it")
    return value


def type_name(value: Any) -> str:
    """Type of a value for a message: `null`, or `of type str`."""
    return "null" if value is None else f"of type {type(value).__name__}"


# ---- prompt and answer -> text -----------------------------------------------------------------------------------


def render(prompt: Part, answer: Part, format: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write what `to_conversation` gave as a text with its answers marked; no spans if all of them are blank.

    Strings are concatenated as they are. Messages go through the chat template; alpaca turns without one become lines.
    """
    if isinstance(prompt, str) or isinstance(answer, str):
        prompt, answer = cast(str, prompt), cast(str, answer)
        spans = [(len(prompt), len(prompt) + len(answer))] if answer.strip() else []
        return Rendered(prompt + answer, spans, templated=False)
    messages = [*prompt, *answer]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [i for i in answers if i >= len(prompt) and messages[i]["content"].strip()]
    if not wanted:
        return Rendered("", [], templated=False)
    if format == "alpaca" and tokenizer.chat_template is None:
        return _render_plain_turns(messages)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the columns {' and '.join(FORMATS[format])} hold a conversation, which needs a chat template, and this "
            "tokenizer has none: use `prompt` and `completion` strings or alpaca columns, or set its chat_template"
        )
    if format == "alpaca":  # the template brings its own white space around a turn
        messages = [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
    try:
        return _render_chat(messages, answers, wanted, tokenizer)
    except TemplateError as error:
        text = f"the tokenizer's chat template refuses the conversation ({error}): change its roles"
        raise UserError(text) from error


def _render_plain_turns(messages: list[Message]) -> Rendered:
    """Alpaca turns without a chat template: `prompt answer` lines; the last answer is the one with loss."""
    lines = []
    for asked, answered in zip(messages[::2], messages[1::2], strict=True):
        prompt, answer = asked["content"], answered["content"]
        bare = bool(prompt and answer) and not prompt[-1].isspace() and not answer[0].isspace()
        lines.append(prompt + (" " if bare else "") + answer)
    text = "\n".join(lines)
    return Rendered(text, [(len(text) - len(answer), len(text))], templated=False)


def _render_chat(
    messages: list[Message], answers: list[int], wanted: list[int], tokenizer: PreTrainedTokenizerBase
) -> Rendered:
    """Apply the chat template and find those of the assistant turns `answers` that are `wanted` in what it wrote."""
    template = tokenizer.get_chat_template()
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        names: dict[str, Any] = dict(tokenizer.special_tokens_map)
        # Annotated as returning a string, it returns the texts and, per text, the character ranges of the marks.
        written: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **names
        )
        [text], [marks] = written
        marked = [(start, end) for start, end in marks]
        if len(marked) == len(answers):
            return Rendered(text, [marked[answers.index(i)] for i in wanted], templated=True)
        if answers == wanted:  # several marks in one turn, say reasoning and answer: all of them are wanted
            return Rendered(text, marked, templated=True)

    def write(part: list[Message], add_generation_prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=add_generation_prompt))

    text, spans = write(messages), []
    for i in wanted:
        if i == 0:
            raise UserError("the conversation starts with an assistant turn: start with the user's")
        before, upto = write(messages[:i], add_generation_prompt=True), write(messages[: i + 1])
        if not (upto.startswith(before) and text.startswith(upto)):
            raise UserError(
                f"the tokenizer's chat template writes message {i + 1} differently inside the conversation than at "
                "its end: mark answers with {% generation %} in it, or give the last turn alone as `completion`"
            )
        spans.append((len(before), len(upto)))
    return Rendered(text, spans, templated=True)


# ---- text -> tokens and labels -----------------------------------------------------------------------------------


def tokenize(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of an example, not truncated; `IGNORE_INDEX` where there is no loss.

    A plain text gets the special tokens that the tokenizer adds itself (as at inference) and one EOS with loss; a
    templated one has all its special tokens already. The first token never gets loss: nothing comes before it.
    """
    special = not rendered.templated
    encoding = tokenizer(
        rendered.text, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast, verbose=False
    )
    ids: list[int] = list(encoding["input_ids"])
    if tokenizer.is_fast:
        # A token that the tokenizer added around the text belongs to no sequence.
        in_text = [sequence is not None for sequence in encoding.sequence_ids(0)]
        loss = [
            inside and _overlaps(start, end, rendered.spans)
            for inside, (start, end) in zip(in_text, encoding["offset_mapping"], strict=True)
        ]
    else:
        in_text, loss = [True] * len(ids), _loss_by_prefix(rendered, tokenizer, ids)

    if special:
        if len(ids) > 1 and not in_text[0] and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids, loss, in_text = ids[1:], loss[1:], in_text[1:]  # the text brought its own BOS
        if len(ids) > 1 and not in_text[-1] and ids[-1] == ids[-2] == tokenizer.eos_token_id:
            ids, loss = ids[:-1], loss[:-1]  # the text brought its own EOS
        if tokenizer.eos_token_id is not None:
            if not ids or ids[-1] != tokenizer.eos_token_id:
                ids, loss = [*ids, tokenizer.eos_token_id], [*loss, True]
            loss[-1] = True
    labels = [token if keep and i > 0 else IGNORE_INDEX for i, (token, keep) in enumerate(zip(ids, loss, strict=True))]
    return ids, labels


def _overlaps(start: int, end: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a token with the characters [start, end) holds characters of a span."""
    if start == end:
        # Byte-level tokenizers trim white space off their offsets: a token of nothing but white space is an empty
        # range at its own end. It stands for the character before it (for the first one, at the start of a text).
        end = max(end, 1)
        start = end - 1
    return any(start < span_end and end > span_start for span_start, span_end in spans)


def _loss_by_prefix(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bool]:
    """For tokenizers without offsets: the text up to each border of an answer is tokenized again and compared."""

    def common_prefix(border: int) -> tuple[int, bool]:
        part = tokenizer(rendered.text[:border], add_special_tokens=not rendered.templated, verbose=False)["input_ids"]
        common = next((i for i, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))
        return common, common == len(part)

    loss = [False] * len(ids)
    for start, end in rendered.spans:
        first, (last, exact) = common_prefix(start)[0], common_prefix(end)
        for i in range(first, min(last + (not exact), len(ids))):  # a token across the end holds some of the answer
            loss[i] = True
    return loss


# ---- prompts for models that answer ------------------------------------------------------------------------------


def render_prompt(prompt: Part, answer: Part, format: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Write an example as training writes it, up to its (last) answer, which may be empty; not of the format `text`.

    A space before the answer stays with the prompt only where training puts it into a token of its own: most
    tokenizers join it with the answer's first word, which the model then expects to write itself. Turns after the last
    assistant turn are left out.
    """
    if isinstance(answer, str):
        reference = answer
        rendered = render(prompt, answer if answer.strip() else _PLACEHOLDER, format, tokenizer)
    else:
        last = next((i for i in reversed(range(len(answer))) if answer[i]["role"] == "assistant"), None)
        if last is None:
            raise UserError("the conversation has no assistant turn: end it with one that holds the right answer")
        reference = answer[last]["content"]
        filled = answer[last] if reference.strip() else {**answer[last], "content": _PLACEHOLDER}
        rendered = render([*cast(list[Message], prompt), *answer[:last]], [filled], format, tokenizer)
    (start, _), end = rendered.spans[0], rendered.spans[-1][1]
    text = rendered.text[:start]
    if text.endswith(" "):
        ids, labels = tokenize(Rendered(rendered.text[:end], [(start, end)], rendered.templated), tokenizer)
        first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
        without = Prompt(text[:-1], rendered.templated, reference)
        if tokenize_prompt(without, tokenizer) == ids[:first]:
            return without
    return Prompt(text, rendered.templated, reference)


def tokenize_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt: those that `tokenize` gives the whole example, before the first label."""
    ids, _ = tokenize(Rendered(prompt.text, [], prompt.templated), tokenizer)
    if not prompt.templated and tokenizer.eos_token_id is not None and not prompt.text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # `tokenize` sees to it that a plain text ends with one
    return ids
