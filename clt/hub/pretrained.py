"""Loading, saving and uploading of transcoders by name: a folder, or a model repository of the Hugging Face hub.

`CrossLayerTranscoder` imports this module lazily for `from_pretrained`, `save_pretrained` and `push_to_hub`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clt.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify_file
from clt.checkpoint.model_card import MODEL_CARD_FILE, model_card
from clt.checkpoint.training_output import PROGRESS_FILE, training_facts
from clt.checkpoint.weights import (
    CARD_FILE,
    SCALING_FILE,
    average_file,
    layer_file,
    load_transcoder,
    read_card,
    save_transcoder,
    share_of_layers,
    transcoder_folder,
)
from clt.errors import ConfigError, HubError
from clt.hub.transfer import cached_files, push_folder
from clt.transcoder.model import CrossLayerTranscoder


def open_pretrained(
    name: Path | str,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    averaged: bool = False,
    **how: Any,
) -> CrossLayerTranscoder:
    """Loads a transcoder from a folder or from the hub.

    Args:
        name: as for `CrossLayerTranscoder.from_pretrained`.
        layers: share to download and load; None for all.
        revision: branch, tag or commit of the repository.
        averaged: load the EMA weights.
        how: `device`, `dtype` and `lazy`, as for `clt.checkpoint.weights.load_transcoder`.

    Returns:
        The transcoder, with training facts in its provenance if the folder is that of a training job.

    Raises:
        CheckpointError, ConfigError, HubError: as for `CrossLayerTranscoder.from_pretrained`.
    """
    folder = Path(name)
    if folder.exists() or not isinstance(name, str) or not is_hub_name(name):
        if revision is not None:
            raise ConfigError(f"revision={revision}: {folder} is a folder, which has no revisions; remove it")
        folder = transcoder_folder(folder)
    else:
        try:
            folder = _fetch(name, layers, revision, averaged)
        except HubError as error:
            raise HubError(f"{error} (and no folder of this name exists)") from None
    transcoder = load_transcoder(folder, layers, averaged=averaged, **how)
    if (folder / PROGRESS_FILE).exists():
        transcoder.provenance = replace(transcoder.provenance, training=training_facts(folder))
    return transcoder


def is_hub_name(name: str) -> bool:
    """True if a string has the form OWNER/NAME or OWNER/NAME@REVISION and is no relative path."""
    owner, _, repository = name.partition("/")
    return bool(owner and repository) and "/" not in repository and owner not in (".", "..", "~")


def _fetch(name: str, layers: Sequence[int] | None, revision: str | None, averaged: bool) -> Path:
    """Downloads the files of some layers into the local cache; returns their folder."""
    repo_id, _, named = name.partition("@")
    if named and revision not in (None, named):
        raise ConfigError(f"revision={revision}: '{name}' names another revision; give one of them")
    folder = cached_files(repo_id, [CARD_FILE, SCALING_FILE], revision=revision or named or None)
    share = share_of_layers(read_card(folder / CARD_FILE)[0], layers)
    file = average_file if averaged else layer_file
    names = [file(layer) for layer in sorted({*share.sources, *share.targets})]
    # The cache folder is named after the commit: all files are of the same one.
    return cached_files(repo_id, names, revision=folder.name)


def save_pretrained(transcoder: CrossLayerTranscoder, folder: Path | str) -> None:
    """See `CrossLayerTranscoder.save_pretrained`."""
    save_transcoder(transcoder, Path(folder))


def push_transcoder(
    transcoder: CrossLayerTranscoder,
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """See `CrossLayerTranscoder.push_to_hub`."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "transcoder"
        save_transcoder(transcoder, folder)
        return _push(transcoder, folder, name, private, revision, message)


def push_pretrained(
    folder: Path,
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads the transcoder of a folder to a model repository, with a model card, without copying the weights.

    Args:
        folder: written by `save_pretrained`, or the output of a training job, of which only the newest checkpoint's
            weights are uploaded.
        name: OWNER/NAME; the repository is created if it is missing.
        private: visibility of a repository that is created.
        revision: branch, created if it is missing; default: main.
        message: summary of the commits.

    Returns:
        Id of the commit that holds all files.

    Raises:
        CheckpointError: the folder holds no transcoder, or a damaged one.
        HubError: as for `clt.hub.transfer.push_folder`.
    """
    folder = transcoder_folder(folder)
    transcoder = open_pretrained(folder, lazy=True)
    names = [SCALING_FILE, *(layer_file(layer) for layer in range(transcoder.config.n_layers))]
    if (folder / MANIFEST_FILE).exists():
        manifest = read_manifest(folder)
        for file in names:
            verify_file(folder, file, manifest)
    with TemporaryDirectory() as scratch:
        staged = Path(scratch)
        for file in names:
            (staged / file).symlink_to((folder / file).resolve())
        training = transcoder.provenance.training
        tree = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        tree["training"] = None if training is None else asdict(training)
        (staged / CARD_FILE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        (staged / MODEL_CARD_FILE).write_text(model_card(transcoder), encoding="utf-8")
        return _push(transcoder, staged, name, private, revision, message)


def _push(
    transcoder: CrossLayerTranscoder, folder: Path, name: str, private: bool, revision: str | None, message: str | None
) -> str:
    model = transcoder.provenance.model
    summary = message or f"Cross-layer transcoder{'' if model is None else f' of {model.name}'}"
    # Uploaded last: without this file an unfinished push is not read.
    last = (CARD_FILE,)
    return push_folder(folder, name, kind="model", private=private, revision=revision, last=last, message=summary)
