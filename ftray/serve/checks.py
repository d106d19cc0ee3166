"""What of an endpoint can be known before Ray starts."""

from pathlib import Path

from ftray.child_process import in_child_process
from ftray.config import ServeConfig
from ftray.infer.engines import check_served
from ftray.model.base import check_base_name, load_tokenizer, prepare_base
from ftray.model.families import check_layers
from ftray.registry import Registry
from ftray.serve.http.ports import check_port


def check_endpoint(config: ServeConfig, *, in_session: bool = False) -> None:
    """Base, its architecture, port, chat template, preloaded adapters. `in_session`: the caller's Ray has started.
    Raises `UserError`."""
    check_base_name(config.base_model)
    check_port(config.host, config.port, in_session=in_session)
    if config.engine.type == "torch" and (Path(config.base_model) / "config.json").is_file():
        in_child_process(check_architecture, config.base_model, log=lambda text: None)
    if config.chat is None and not config.adapters.preload:
        return
    base = prepare_base(config.base_model, chat=config.chat)
    if config.chat is not None:
        load_tokenizer(base)
    if config.adapters.preload:
        from ftray.serve.replica.versions import check_preloaded  # torch

        check_preloaded(config.adapters, Registry(config.adapters.registry), base)


def check_architecture(base_model: str, **_: object) -> None:
    """Raises `UserError`."""
    base = prepare_base(base_model)
    check_layers(base)
    check_served(base)
