"""Where a run starts from, when it is not its base alone: `adapter.init_from`."""

import json
from dataclasses import replace

from ftray.config import RunConfig
from ftray.config.chat import ChatConfig
from ftray.model.adapters.directory import check_base, local_adapter
from ftray.model.base import chat_in, kept_chat, prepare_base
from ftray.registry import Registry
from ftray.registry.reference import parse_reference
from ftray.storage import ObjectStore, verify_directory
from ftray.storage.manifest import MANIFEST
from ftray.train.prepare import PreparedRun
from ftray.train.runs.uri import run_uri


def resolve_start(prepared: PreparedRun) -> PreparedRun:
    """`adapter.init_from` as the exact version it is now, or was when the run began, and where its files are."""
    run = prepared.config
    reference = run.adapter.init_from if run.adapter is not None else None
    if run.adapter is None or reference is None:
        return prepared
    base = prepare_base(run.base_model, log=print)
    if (directory := local_adapter(reference)) is not None:
        if (directory / MANIFEST).is_file():  # a foreign PEFT directory has none
            check_base(reference, verify_directory(directory).metadata, base, here="this run's base is")
        run = with_chat_of(run, kept_chat(directory))
        return replace(prepared, config=run, init_from=reference if "://" in reference else directory.absolute())
    registry = Registry(run.registry)
    version = registry.get((None if prepared.fresh else version_begun_with(run, reference)) or reference)
    check_base(str(version), version.metadata, base, here="this run's base is")
    adapter = run.adapter.model_copy(update={"init_from": str(version)})
    registry.directory(version)  # whole
    run = with_chat_of(run.model_copy(update={"adapter": adapter}), chat_in(version.metadata))
    return replace(prepared, config=run, init_from=registry.place(version))


def with_chat_of(run: RunConfig, kept: ChatConfig | None) -> RunConfig:
    """An adapter goes on being trained on conversations as it has read them, where `chat` says nothing else."""
    if run.chat is not None or kept in (None, ChatConfig()):
        return run
    return run.model_copy(update={"chat": kept})


def version_begun_with(run: RunConfig, reference: str) -> str | None:
    """Of a run that is gone on with: an alias may have moved since."""
    content = ObjectStore(run_uri(run.runs_dir, run.name)).read("config.json")
    begun = ((json.loads(content) if content is not None else {}).get("adapter") or {}).get("init_from")
    wanted = parse_reference(reference)
    if begun is None or wanted.alias is None or "/" in begun or parse_reference(begun).name != wanted.name:
        return None
    return begun
