"""Formats by name, and conversion of a folder from one format to another."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clt.checkpoint.manifest import new_folder
from clt.checkpoint.weights import load_transcoder, save_transcoder
from clt.convert import Format
from clt.convert.circuit_tracer import load_circuit_tracer, save_circuit_tracer
from clt.convert.crosslayer_coding import load_crosslayer_coding, save_crosslayer_coding
from clt.convert.sparsify import load_sparsify, save_sparsify
from clt.convert.thresholds import to_jumprelu
from clt.convert.vlm_clt_training import load_vlm_clt_training, save_vlm_clt_training
from clt.errors import ConfigError
from clt.records import ActivationBatch
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder

#: Former names of formats.
_ALIASES: dict[Format, Format] = {"kokosdev": "vlm_clt_training"}

#: Raw activations of all layers for a transcoder of these dimensions and this read site.
Calibration = Callable[[CLTConfig], Sequence[ActivationBatch]]

_READERS: dict[Format, Callable[..., CrossLayerTranscoder]] = {
    "native": lambda folder: load_transcoder(folder),
    "circuit_tracer": load_circuit_tracer,
    "sparsify": load_sparsify,
    "crosslayer_coding": load_crosslayer_coding,
    "vlm_clt_training": load_vlm_clt_training,
}
_WRITERS: dict[Format, Callable[[CrossLayerTranscoder, Path], None]] = {
    "native": save_transcoder,
    "circuit_tracer": save_circuit_tracer,
    "sparsify": save_sparsify,
    "crosslayer_coding": save_crosslayer_coding,
}


def load_format(name: Format, folder: Path, **choices: Any) -> CrossLayerTranscoder:
    """Reads a transcoder.

    Args:
        name: its format.
        folder: folder of the transcoder.
        choices: keyword arguments of the format's reader that its files do not determine; None means not given.

    Returns:
        The transcoder, without gradients.

    Raises:
        ConfigError: the format has no such choice, or the value is not supported.
        CheckpointError: a file is missing, damaged or not supported; names file and key.
    """
    reader = _READERS[_ALIASES.get(name, name)]
    given = {key: value for key, value in choices.items() if value is not None}
    for key in given:
        if key not in inspect.signature(reader).parameters:
            raise ConfigError(f"{key}={given[key]}: the format {name} does not use it; remove it")
    return reader(folder, **given)


def convert(
    source: Path,
    target: Path,
    read_as: Format,
    write_as: Format,
    calibration: Calibration | None = None,
    **choices: Any,
) -> Path:
    """Reads a transcoder in one format and writes it in another; the target appears only when complete.

    Args:
        source: folder of the transcoder.
        target: new or empty folder.
        read_as: format of the source.
        write_as: format of the target.
        calibration: returns the tokens on which every feature gets a threshold (formats with thresholds; FVU and L0
            before and after are written as conversion.json), or on which mlp_to_clt_mapping is measured
            (vlm_clt_training).
        choices: as for `load_format`.

    Returns:
        The target.

    Raises:
        ConfigError: the format cannot represent the transcoder, or does not use calibration.
        CheckpointError: a file cannot be read or written; names file and key.
        StoreError: there are no tokens, or they are of a model of another size.
    """
    with new_folder(target) as folder:
        transcoder = load_format(read_as, source, **choices)
        if _ALIASES.get(write_as, write_as) == "vlm_clt_training":
            if calibration is None:
                raise ConfigError("--calibrate is missing: mlp_to_clt_mapping is a mean over tokens; name a store")
            save_vlm_clt_training(transcoder, folder, calibration(transcoder.config))
            return target
        report = None
        if calibration is not None:
            if write_as == "sparsify":
                raise ConfigError("--calibrate: the format sparsify has no thresholds; remove it")
            transcoder, report = to_jumprelu(transcoder, calibration(transcoder.config))
        _WRITERS[write_as](transcoder, folder)
        if report is not None:
            (folder / "conversion.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return target
