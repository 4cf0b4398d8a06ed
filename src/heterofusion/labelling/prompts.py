"""Inputs that an expert invents, for users without unlabelled text.

The prompts of a task are a template around an input: what all of its replay prompts begin with, and what all of them
end with. The beginning is continued by sampling; where that reaches the end, what stands between is an input.

The source's base writes them: an expert that was trained on answers alone tends to answer at once. Whether an input
makes sense is not checked, only its lines: where all inputs of the replay have as many lines, and a line of all of
them begins alike, those of an invented one must, too.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heterofusion.data.files import Records
from heterofusion.data.formats import Message, Part, Prompt, render_prompt, tokenize_prompt
from heterofusion.evaluation.datasets import EvalSet
from heterofusion.experts.generation import Answer
from heterofusion.labelling.tasks import conversation, prompt_set
from heterofusion.runtime.errors import UserError

_HERE = "\ue000"  # a private character, where the input stands


@dataclass(frozen=True)
class Template:
    """What surrounds the inputs of a task."""

    turns: list[Message] | None  # earlier turns of a conversation; None where prompts are strings
    beginning: str  # common beginning of the prompts, or of their last turns, without a space at its end
    end: str  # their common end; may be empty in a conversation
    known: frozenset[str]  # the replay's prompts, or last turns, white space collapsed
    lines: list[str] | None  # what each line of the inputs begins with; None where their number differs

    def head(self, format: str, tokenizer: Any) -> list[int]:
        """Token ids of everything before an input, in a tokenizer and its chat template."""
        whole = self.beginning + _HERE + self.end
        prompt: Part = whole
        answer: Part = ""
        if self.turns is not None:
            prompt, answer = [*self.turns, {"role": "user", "content": whole}], [{"role": "assistant", "content": ""}]
        rendered = render_prompt(prompt, answer, format, tokenizer)
        before, found, _ = rendered.text.partition(_HERE)
        if not found:
            raise UserError("the chat template leaves out part of the prompt; give --prompts")
        return tokenize_prompt(Prompt(before, rendered.templated, ""), tokenizer)

    def input_of(self, label: Answer) -> str | None:
        """The prompt, or last turn, that a continuation makes; None where it leaves the template."""
        text, found, _ = label.text.partition(self.end) if self.end else (label.text, label.ended, "")
        lines, wanted = text.split("\n"), self.lines
        fits = wanted is None or (len(lines) == len(wanted) and all(map(str.startswith, lines, wanted)))
        return self.beginning + text + self.end if found and text.strip() and fits else None


def find_template(replay: EvalSet, prompts: EvalSet) -> Template:
    """The template of a task's replay prompts, which `asked` gave without their answers."""
    where = f"--self_prompt: the prompts of {replay.records.label}"
    turns: list[Message] | None = None
    contents: list[str] = []
    for example in prompts.examples:
        if isinstance(example[0], str):
            contents.append(example[0])
            continue
        *earlier, last = conversation(example)
        contents.append(last["content"])
        if turns is not None and earlier != turns:
            raise UserError(f"{where} differ in turns before the last, so they have no template; give --prompts")
        turns = earlier
    distinct = sorted(set(contents))
    if len(distinct) < 2:
        raise UserError(f"{where} are all the same, so nothing tells what is input; give more, or --prompts")
    beginning = _whole_words(_common_beginning(distinct))
    if not beginning.strip():
        raise UserError(f"{where} have no common beginning to continue; give --prompts")
    end = _from_line(_common_beginning([text[len(beginning) :][::-1] for text in distinct])[::-1])
    if not end.strip() and turns is None:
        raise UserError(f"{where} have no common end that tells where an input is over; give --prompts")
    inputs = [text[len(beginning) : len(text) - len(end)].split("\n") for text in distinct]
    lines = None
    if len({len(rows) for rows in inputs}) == 1:
        lines = [_whole_words(_common_beginning(column)) for column in zip(*inputs, strict=True)]
    return Template(turns, beginning, end, frozenset(map(_collapsed, contents)), lines)


def _common_beginning(texts: Sequence[str]) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071  # by characters is meant


def _whole_words(text: str) -> str:
    """Up to the last white space: the word after it may be part of the inputs. Spaces go to the model."""
    return text[: max(text.rfind(" "), text.rfind("\n")) + 1].rstrip(" ")


def _from_line(text: str) -> str:
    """From the first line break on or, where there is none, from the first space: what is before may be of inputs."""
    mark = "\n" if "\n" in text else " "
    return mark + text.partition(mark)[2] if mark in text else ""


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def invented_prompts(
    name: str, template: Template, format: str, drawn: Sequence[Answer]
) -> tuple[EvalSet | None, dict[str, int]]:
    """Prompts from continuations of a template, None where no one survives; and counts of what became of them."""
    counts: Counter[str] = Counter(drawn=len(drawn), kept=0, off_template=0, repeated=0, replay=0)
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for label in drawn:
        text = template.input_of(label)
        if text is None:
            counts["off_template"] += 1
        elif (known := _collapsed(text)) in template.known or known in seen:
            counts["replay" if known in template.known else "repeated"] += 1
        else:
            seen.add(known)
            counts["kept"] += 1
            rows.append(_row(template, format, text))
    if not rows:
        return None, dict(counts)
    return prompt_set(name, Records(f"invented prompts of {name}", rows), [*range(len(rows))]), dict(counts)


def _row(template: Template, format: str, text: str) -> dict[str, Any]:
    if template.turns is None:
        return {"prompt": text}
    if format == "alpaca":
        said = [turn["content"] for turn in template.turns]
        history = [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
        return {"instruction": text, "history": history}
    turns = [*template.turns, {"role": "user", "content": text}]
    return {"messages": turns} if format == "messages" else {"prompt": turns}
