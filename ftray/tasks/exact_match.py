"""The answer is the expected one, character for character, white space around it aside."""

from ftray.tasks.protocol import Question, Task


def judge(question: Question, answer: str) -> dict[str, float]:
    return {"exact_match": float(answer.strip() == question.expected.strip())}


EXACT_MATCH = Task(judge, score="exact_match")
