"""What every metric asks of answers before it scores them."""

from collections.abc import Sequence

from heterofusion.runtime.errors import UserError


def check_answers(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Refuse answers that cannot be scored.

    Args:
        predictions: The generated answers.
        references: The right answers, as many.

    Raises:
        ValueError: If the two differ in length or are empty, or if one of them holds something else than strings.
    """
    if len(predictions) != len(references):
        raise UserError(f"got {len(predictions)} predictions for {len(references)} references; give one for each")
    if not predictions:
        raise UserError("no predictions to score")
    for name, answers in (("predictions", predictions), ("references", references)):
        for index, answer in enumerate(answers):
            if not isinstance(answer, str):
                raise UserError(f"{name}[{index}] is {answer!r}; give a string, '' where there is no answer")
