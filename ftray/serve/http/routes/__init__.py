"""The endpoint's routes: a module each, a function from services to a router. One more is a line in ROUTES."""

from collections.abc import Callable

from fastapi import APIRouter

from ftray.serve.http.routes.adapters import adapter_routes
from ftray.serve.http.routes.answers import answer_routes
from ftray.serve.http.routes.embeddings import embedding_routes
from ftray.serve.http.routes.models import model_routes
from ftray.serve.http.routes.page import page_routes
from ftray.serve.http.services import Services

Routes = Callable[[Services], APIRouter]
ROUTES: tuple[Routes, ...] = (answer_routes, embedding_routes, model_routes, adapter_routes, page_routes)
