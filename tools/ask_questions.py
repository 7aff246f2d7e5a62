"""Count how many simple factual questions GGUF files of an instruct model answer right, through the runtime's chat.

Every question of factual_questions.json starts a conversation of its own, at temperature 0. An answer counts as right
if one of the expected phrases occurs in it (`is_right`); a long answer that names everything can be right by chance.
The first file is the original: of the others it is also printed how many of its right answers they keep.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from d2q_edge.errors import D2QError
from d2q_edge.evaluation.compare import short_names
from d2q_edge.runtime.chat import Conversation
from d2q_edge.utils.progress import Progress

QUESTIONS = Path(__file__).with_name("factual_questions.json")
CONTEXT = 1024
"""Tokens of a question, its answer and the template's system message."""
MARKUP = re.compile(r"[*_`$]|^[ \t]*\d+[.)][ \t]+(?=\S)", re.MULTILINE)
"""What Markdown and LaTeX put into answers (H_2O, **Paris**), and the numbers of a list's items."""


def ask(path: Path, questions: Sequence[str], max_tokens: int) -> dict[str, str]:
    """Return a file's answers of at most `max_tokens` tokens at temperature 0, by question.

    Raises:
        D2QError: the file has no chat template or can't be loaded, or the runtime isn't installed.
    """
    answers = {}
    with (
        Conversation(path, context=CONTEXT, max_tokens=max_tokens, temperature=0) as conversation,
        Progress(f"Asking {path.name}", len(questions), "question") as progress,
    ):
        for question in questions:
            conversation.reset()
            answers[question] = "".join(conversation.answer(question)).strip()
            progress.update()
    return answers


def is_right(reply: str, answers: Sequence[str]) -> bool:
    """Return whether one of the phrases occurs in a reply: in any case, as whole words, perhaps with a plural s.

    A number must be the whole number: 8 isn't in 1,848 or 8.5.
    """
    words = " ".join(MARKUP.sub("", reply).casefold().split())
    phrases = "|".join(re.escape(answer.casefold()) + ("s?" if len(answer) > 2 else "") for answer in answers)
    return re.search(rf"(?<!\w)(?<!\d[.,])(?:{phrases})(?!\w)(?![.,]\d)", words) is not None


def line(name: str, right: set[str], first: set[str], count: int) -> str:
    """Format a file's line from the questions that it and the first file answer right, and the number of all."""
    kept = len(right & first)
    share = f" {kept / len(first):5.0%}" if first else ""
    return f"{name} {len(right):3} of {count}   {kept:3} of the first file's {len(first)}{share}"


@click.command()
@click.argument("files", metavar="FILE...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--questions", type=click.Path(path_type=Path), default=QUESTIONS, help="Other ones, in the same form.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of an answer.")
@click.option("--json", "target", type=click.Path(path_type=Path), metavar="FILE", help="Write all answers to a file.")
def main(files: tuple[Path, ...], questions: Path, max_tokens: int, target: Path | None) -> None:
    """Ask GGUF files all questions; the first is the original. Prints a line for each."""
    asked = {entry["question"]: entry["answers"] for entry in json.loads(questions.read_text("utf-8"))}
    first: set[str] | None = None
    results: list[dict[str, Any]] = []
    names = short_names(files)
    width = max(map(len, names.values()))
    try:
        for path, name in names.items():
            replies = ask(path, list(asked), max_tokens)
            right = {question for question, reply in replies.items() if is_right(reply, asked[question])}
            first = right if first is None else first
            click.echo(line(name.ljust(width), right, first, len(asked)))
            rows = [{"question": q, "reply": reply, "right": q in right} for q, reply in replies.items()]
            results.append({"file": str(path), "right": len(right), "kept": len(right & first), "replies": rows})
            if target is not None:  # after every file: a later one may fail
                target.write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
    except D2QError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
