"""What of an endpoint can be known before Ray starts."""

from pathlib import Path

from ftray.child_process import in_child_process
from ftray.config import ServeConfig
from ftray.infer.engines import SERVED, check_served
from ftray.model.base import BaseModel, check_base_name, load_tokenizer, prepare_base
from ftray.model.families import check_layers
from ftray.model.proof import is_remembered
from ftray.registry import Registry
from ftray.serve.http.ports import check_port


def check_endpoint(config: ServeConfig, *, in_session: bool = False) -> None:
    """Base, its architecture, port, chat template, preloaded adapters. `in_session`: the caller's Ray has started.
    Raises `UserError`."""
    check_base_name(config.base_model)
    check_port(config.host, config.port, in_session=in_session)
    if config.engine.type == "torch" and (Path(config.base_model) / "config.json").is_file():
        check_architecture(prepare_base(config.base_model))
    if config.chat is None and not config.adapters.preload:
        return
    base = prepare_base(config.base_model, chat=config.chat)
    if config.chat is not None:
        load_tokenizer(base)
    if config.adapters.preload:
        from ftray.serve.replica.versions import check_preloaded  # torch

        check_preloaded(config.adapters, Registry(config.adapters.registry), base)


def check_architecture(base: BaseModel) -> None:
    """Its proof is made in a process of its own, since that imports torch. Raises `UserError`."""
    if is_remembered(SERVED, base):
        check_layers(base)
    else:
        in_child_process(prove, base, log=lambda text: None)


def prove(base: BaseModel, **_: object) -> None:
    check_served(base)
