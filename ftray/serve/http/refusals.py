"""Refusals in the words and codes that OpenAI's clients know."""

from fastapi import HTTPException


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
