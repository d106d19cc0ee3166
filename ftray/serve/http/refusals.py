"""Refusals in the words and codes that OpenAI's clients know."""

from fastapi import HTTPException

from ftray.serve.protocol import Failed


class Refused(HTTPException):
    """`code` and `param`: what OpenAI's API calls the reason and the parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers=headers)
        self.param, self.code = param, code


def refusal_of(failed: Failed) -> Refused:
    return Refused(failed.status, failed.message, param=failed.param, code=failed.code)
