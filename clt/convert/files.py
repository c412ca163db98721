"""Safe reading of other projects' files: no code in them runs, and errors are one line with file and key."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import Tensor

from clt.checkpoint.weights import read_tensors
from clt.errors import CheckpointError
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling


class ForeignFile:
    """Tensors of one file, read by name; `end` refuses a file with tensors that were not read.

    Args:
        path: the file, for messages.
        tensors: by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path, self._tensors, self._taken = path, dict(tensors), set[str]()

    @classmethod
    def safetensors(cls, path: Path) -> ForeignFile:
        """Reads a safetensors file; CheckpointError if it is missing or damaged."""
        return cls(path, read_tensors(path))

    def has(self, key: str) -> bool:
        """True if the file has a tensor of this name."""
        return key in self._tensors

    def is_not_zero(self, pattern: str) -> bool:
        """True if a tensor whose whole name matches the regular expression has a nonzero entry."""
        tensors = (tensor for key, tensor in self._tensors.items() if re.fullmatch(pattern, key))
        return any(isinstance(tensor, Tensor) and bool(tensor.any()) for tensor in tensors)

    def matrix(self, key: str) -> tuple[int, int, torch.dtype]:
        """Shape of a matrix and the dtype in which `take` returns it; CheckpointError if it is missing."""
        tensor = self._tensors.get(key)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{self.path}: key '{key}' is missing; the checkpoint is incomplete")
        if tensor.dim() != 2 or not tensor.numel():
            raise CheckpointError(f"{self.path}: key '{key}' has shape {tuple(tensor.shape)}, expected a matrix")
        return tensor.shape[0], tensor.shape[1], torch.promote_types(tensor.dtype, torch.float32)

    def take(self, key: str, *shape: int | None) -> Tensor:
        """Reads a floating-point tensor, in float32 or wider.

        Args:
            key: its name.
            shape: expected shape; None for a dimension of any size.

        Raises:
            CheckpointError: it is missing, of another shape or dtype, or has NaN.
        """
        if key not in self._tensors:
            raise CheckpointError(f"{self.path}: key '{key}' is missing; the checkpoint is incomplete")
        tensor = self._tensors[key]
        self._taken.add(key)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{self.path}: key '{key}' is {kind}, not a tensor of floating-point numbers")
        pairs = zip(shape, tensor.shape, strict=False)
        if len(shape) != tensor.dim() or any(want not in (None, size) for want, size in pairs):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{self.path}: key '{key}' has shape {tuple(tensor.shape)}, expected ({wanted}); wrong model?"
            )
        if bool(tensor.isnan().any()):
            raise CheckpointError(f"{self.path}: key '{key}' has NaN; use another checkpoint")
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def take_zeros(self, key: str, why: str, *shape: int | None) -> None:
        """Reads a tensor that is not supported unless it is all zeros.

        Args:
            key: its name.
            why: reason, for the message.
            shape: as for `take`.

        Raises:
            CheckpointError: it is not zero, or as for `take`.
        """
        if bool(self.take(key, *shape).any()):
            raise CheckpointError(f"{self.path}: key '{key}' is not zero, {why}")

    def end(self) -> None:
        """CheckpointError if the file has a tensor that was not read."""
        for key in self._tensors:
            if key not in self._taken:
                raise CheckpointError(f"{self.path}: key '{key}' is not supported and would be lost")


def read_pickled(path: Path) -> dict[str, Any]:
    """Reads a dict of plain values and tensors written by `torch.save`; other objects are refused, not executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds objects.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing; the checkpoint is incomplete") from None
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: contains more than tensors, or is damaged; nothing was run ({reason})"
        ) from None
    except Exception as error:
        # A damaged pickle can raise any error: IndexError, KeyError, struct.error, ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable torch file ({reason})") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: contains {type(tree).__name__}, expected a dict")
    return tree


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; CheckpointError if the file is missing or something else."""
    return _mapping(path, json.loads)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping of plain values; CheckpointError if the file is missing or something else."""
    return _mapping(path, yaml.safe_load)


def whole_number(path: Path, tree: Mapping[str, Any], key: str, least: int = 1) -> int:
    """Integer of a settings file.

    Args:
        path: the file, for the message.
        tree: its contents.
        key: the entry.
        least: smallest accepted value.

    Raises:
        CheckpointError: the entry is not an integer of at least `least`.
    """
    value = tree.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"{path}: key '{key}' is {value!r}, expected an integer >= {least}")
    return value


def refuse(path: Path, key: str, value: Any, why: str) -> NoReturn:
    """Raises CheckpointError for an unsupported entry of a settings file.

    Args:
        path: the file.
        key: the entry.
        value: its value.
        why: reason and remedy.
    """
    raise CheckpointError(f"{path}: {key}={value!r}: {why}")


def numbered(folder: Path, pattern: str) -> list[Path]:
    """Files or folders of layers 0, 1, ... in order.

    Args:
        folder: parent folder.
        pattern: regular expression of the whole name; its first group is the layer.

    Raises:
        CheckpointError: none matches, or a layer is missing or occurs twice.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a checkpoint")
    matches = ((re.fullmatch(pattern, path.name), path) for path in sorted(folder.iterdir()))
    return in_order(folder, [(int(match[1]), path) for match, path in matches if match], f"no file like '{pattern}'")


def in_order(folder: Path, layers: Iterable[tuple[int, Path]], missing: str) -> list[Path]:
    """Files or folders of layers 0, 1, ... in order.

    Args:
        folder: parent folder.
        layers: number and path of each.
        missing: description of a missing entry, for the message.

    Raises:
        CheckpointError: there are none, or a layer is missing or occurs twice.
    """
    found: dict[int, Path] = {}
    for layer, path in layers:
        if layer in found:
            raise CheckpointError(f"{path}: layer {layer} occurs twice, also as {found[layer].name}; remove one")
        found[layer] = path
    if not found:
        raise CheckpointError(f"{folder}: {missing}; is it a checkpoint of this format?")
    for layer in range(max(found)):
        if layer not in found:
            raise CheckpointError(f"{folder}: layer {layer} is missing, {missing}; download all files")
    return [found[layer] for layer in range(len(found))]


def empty_transcoder(
    config: CLTConfig, dtype: torch.dtype = torch.float32, scaling: Scaling | None = None
) -> CrossLayerTranscoder:
    """An uninitialised transcoder for weights of another project.

    Args:
        config: architecture.
        dtype: dtype of the weights.
        scaling: default: none, raw inputs and outputs.
    """
    scaling = scaling or Scaling.identity(config.n_layers, config.d_model)
    return CrossLayerTranscoder(config, scaling).to(dtype).requires_grad_(False).eval()


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: contains {type(tree).__name__}, expected a mapping")
    return tree
