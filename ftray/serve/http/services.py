"""What routes are made of: the services behind them, and what a handler gets of the request."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from ftray.serve.http.context import RequestContext
from ftray.serve.http.embeddings import Embeddings
from ftray.serve.http.ingress import Ingress
from ftray.serve.http.playground import Overview


@dataclass(frozen=True)
class Services:
    ingress: Ingress
    embeddings: Embeddings
    overview: Overview


def context_of(request: Request) -> RequestContext:
    return request.state.context


Context = Annotated[RequestContext, Depends(context_of)]
