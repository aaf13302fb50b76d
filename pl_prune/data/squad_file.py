"""Files of SQuAD 1.1."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pl_prune.core.types import PruneError


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Args:
        id: Its name in the file.
        text: What is asked.
        context: The text that holds the answer.
        answers: Answers of people, and the characters of the context at which they start; at least one.
    """

    id: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...]


def read_squad(path: Path) -> list[Question]:
    """Read a file of SQuAD 1.1.

    Args:
        path: train-v1.1.json, dev-v1.1.json, or another of the same form.

    Returns:
        Its questions in order.

    Raises:
        PruneError: If there is no such file, it is of another form, or a question has no answer.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        questions = [
            Question(
                asked["id"],
                asked["question"].strip(),
                paragraph["context"],
                tuple((answer["text"], answer["answer_start"]) for answer in asked["answers"]),
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except OSError as error:
        raise PruneError(
            f"Expected {path.name} in {str(path.parent)!r}; found that it cannot be read ({error.strerror}). Get train-v1.1.json "
            "and dev-v1.1.json from SQuAD's authors and set data.init_args.root to their folder."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise PruneError(
            f"Expected {path} to have the form of SQuAD 1.1 (data, paragraphs, context, qas, question, answers); found "
            f"{type(error).__name__}: {error}. Get the file anew."
        ) from error
    odd = next((question.id for question in questions if not question.answers), None)
    if odd is not None or not questions:
        raise PruneError(
            f"Expected questions that all have answers in {path}; found {'none at all' if odd is None else f'none for {odd!r}'}. "
            "Use the files of SQuAD 1.1: questions without answers are of 2.0."
        )
    return questions
