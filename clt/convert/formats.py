"""All formats by name, and the conversion of a folder from one to another."""

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
from clt.convert.kokosdev import load_kokosdev
from clt.convert.seed_files import save_seed_files
from clt.convert.sparsify import load_sparsify, save_sparsify
from clt.convert.thresholds import REPORT_FILE, to_jumprelu
from clt.errors import ConfigError
from clt.records import ActivationBatch
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder

#: Raw activations of all layers for a transcoder of these dimensions and this read site.
Calibration = Callable[[CLTConfig], Sequence[ActivationBatch]]

_READERS: dict[Format, Callable[..., CrossLayerTranscoder]] = {
    "native": lambda folder: load_transcoder(folder),
    "circuit_tracer": load_circuit_tracer,
    "sparsify": load_sparsify,
    "crosslayer_coding": load_crosslayer_coding,
    "kokosdev": load_kokosdev,
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
        folder: where it lies.
        choices: what the format's files do not say, as its reader takes it; None is absent.

    Returns:
        The transcoder, without gradients.

    Raises:
        ConfigError: the reader has no such choice, or cannot take this value.
        CheckpointError: a file is missing, damaged, or says what no transcoder of ours can be; names file and key.
    """
    reader = _READERS[name]
    given = {key: value for key, value in choices.items() if value is not None}
    for key in given:
        if key not in inspect.signature(reader).parameters:
            raise ConfigError(f"{key}={given[key]}: files of the format {name} leave no choice here; leave it out")
    return reader(folder, **given)


def convert(
    source: Path,
    target: Path,
    read_as: Format,
    write_as: Format,
    calibration: Calibration | None = None,
    **choices: Any,
) -> Path:
    """Reads a transcoder in one format and writes it in another; nothing half written gets the target's name.

    Args:
        source: folder of the transcoder.
        target: new or empty folder.
        read_as: format of the one.
        write_as: format of the other.
        calibration: gives the tokens on which every feature gets a threshold (formats that know thresholds; FVU and L0
            before and after are written as conversion.json), or on which the seed's mapping is measured (kokosdev).
        choices: as for `load_format`.

    Returns:
        The target.

    Raises:
        ConfigError: the format has no place for what the transcoder is, or no use for calibration.
        CheckpointError: a file cannot be read or written; names file and key.
        StoreError: there are no tokens, or they do not fit.
    """
    with new_folder(target) as folder:
        transcoder = load_format(read_as, source, **choices)
        if write_as == "kokosdev":
            if calibration is None:
                raise ConfigError("--calibrate is missing: the seed's mapping is a mean over tokens; name a store")
            save_seed_files(transcoder, folder, calibration(transcoder.config))
            return target
        report = None
        if calibration is not None:
            if write_as == "sparsify":
                raise ConfigError("--calibrate: sparsify has no thresholds, nor any other use for tokens; leave it out")
            transcoder, report = to_jumprelu(transcoder, calibration(transcoder.config))
        _WRITERS[write_as](transcoder, folder)
        if report is not None:
            (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return target
