"""Checkpoints of a training job: written atomically, one set of files per layer, so that any mesh can resume them.

docs/training.md lists the files. A checkpoint is written under a temporary name and renamed when complete, then
`latest` is replaced: a job killed at any moment leaves only good checkpoints and temporary names. Training draws no
random numbers after the initial weights, so that no generator state is saved. All ranks need a common file system.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clt.checkpoint.columns import join_columns, own_columns
from clt.checkpoint.manifest import (
    Checksums,
    latest_folder,
    prune,
    publish,
    read_manifest,
    remove_temporary,
    save_tensors,
    temporary_name,
    verify_file,
    write_manifest,
    write_text,
)
from clt.checkpoint.training_output import PROGRESS_FILE
from clt.checkpoint.weights import (
    CARD_FILE,
    SCALING_FILE,
    average_file,
    card,
    layer_buffers,
    layer_file,
    layer_tensors,
    read_card,
    read_into,
    read_tensors,
)
from clt.config import config_to_tree, config_to_yaml, load_config
from clt.distributed.mesh import Mesh, deal_layers, layers_of_rank
from clt.errors import CheckpointError
from clt.training.engine import Engine
from clt.training.settings import TrainConfig
from clt.training.weight_average import WeightAverage
from clt.transcoder.dead_features import FiringTracker
from clt.transcoder.model import CrossLayerTranscoder

CONFIG_FILE = "config.yaml"
FIRING_KEY = "tokens_since_fired"
STEP_PATTERN = "step_*"

#: Keys that may change when a job is resumed; the store is compared by its id.
MAY_CHANGE = ("store", "output", "mesh", "kernels", "evaluation", "log_every", "checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a job.

    Attributes:
        step: steps done, skipped ones included.
        tokens: tokens seen, over all ranks.
        adam_steps: optimizer steps taken.
        skipped_steps: steps not taken because loss or gradients were not finite.
        skipped_in_a_row: number of consecutive ones at the end.
        batches: position in the store, from the batch source's `state_dict`; plain values.
    """

    step: int = 0
    tokens: int = 0
    adam_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    batches: Mapping[str, Any]


class Checkpoints:
    """Saves and resumes one job.

    Args:
        config: the job.
        transcoder: this rank's share, as trained.
        engine: with its optimizer.
        tracker: tokens since each feature of the own sources fired.
        mesh: the processes.
        average: EMA weights, if kept.
    """

    def __init__(
        self,
        config: TrainConfig,
        transcoder: CrossLayerTranscoder,
        engine: Engine,
        tracker: FiringTracker,
        mesh: Mesh,
        average: WeightAverage | None = None,
    ) -> None:
        self._config = config
        self._transcoder = transcoder
        self._engine = engine
        self._tracker = tracker
        self._mesh = mesh
        self._average = average
        self._layers = layers_of_rank(deal_layers(transcoder.config, mesh.layer_size, mesh.column_size), mesh)

    def save(self, progress: Progress) -> Path:
        """Writes a checkpoint and removes the oldest beyond `keep_checkpoints`; all ranks must call it.

        Args:
            progress: of the job.

        Returns:
            Its folder.

        Raises:
            CheckpointError: a file cannot be written; the same on all ranks.
        """
        output, name = self._config.output, step_folder(progress.step)
        temporary = output / temporary_name(name)
        try:
            with self._mesh.together(CheckpointError):
                if self._mesh.is_first:
                    output.mkdir(parents=True, exist_ok=True)
                    remove_temporary(output, STEP_PATTERN)
                    temporary.mkdir()
            failure = self._write_layers(temporary)
            with self._mesh.together(CheckpointError):
                if failure is not None:
                    raise failure
            with self._mesh.together(CheckpointError):
                if self._mesh.is_first:
                    self._write_job(temporary, progress)
                    publish(temporary, output / name)
                    prune(output, STEP_PATTERN, self._config.keep_checkpoints)
        except CheckpointError as error:
            if self._mesh.is_first:
                # On a full disk, an incomplete checkpoint would only take space.
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{error}; {self._last_good()}") from None
        return output / name

    def _last_good(self) -> str:
        folder = latest_folder(self._config.output)
        if folder is None:
            return "there is no earlier checkpoint; make it writable and start the job again"
        return f"{folder.name} is kept; make the folder writable, with free space, and start the job again"

    def resume(self) -> Progress | None:
        """Restores weights, optimizer and counters from the newest checkpoint of the output folder.

        Returns:
            Progress of that job, or None when there is no checkpoint; all ranks must call it.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another job; names the file and key.
        """
        progress = None
        with self._mesh.together(CheckpointError):
            folder = latest_folder(self._config.output)
            if folder is not None:
                progress = self._restore(folder)
                if self._mesh.is_first:
                    # A run killed after it named its last checkpoint has not pruned the old ones.
                    prune(self._config.output, STEP_PATTERN, self._config.keep_checkpoints)
        return progress

    def _write_layers(self, folder: Path) -> CheckpointError | None:
        """Writes the layers of this layer rank and returns its first failure; all ranks take part even after one."""
        failure = None
        checksums: Checksums = {}
        for row, layer in enumerate(self._layers):
            for name, tensors in self._files_of(layer):
                whole = join_columns(tensors, self._mesh) if self._mesh.data_rank == 0 else None
                if whole is None or failure is not None:
                    continue
                try:
                    save_tensors(folder / name, whole, checksums)
                    if name == optimizer_file(layer) and row == len(self._layers) - 1:
                        write_text(folder / f"files_{self._mesh.layer_rank}.json", json.dumps(checksums), {})
                except CheckpointError as error:
                    failure = error
        return failure

    def _files_of(self, layer: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Names and tensors of a layer's files, as far as they are owned here."""
        parameters = layer_tensors(self._transcoder, layer)
        buffers = layer_buffers(self._transcoder, layer)
        yield layer_file(layer), {key: self._engine.weights(p) for key, p in parameters.items()} | buffers
        if self._average is not None:
            yield average_file(layer), {key: self._average.of(p) for key, p in parameters.items()} | buffers
        states = {key: self._engine.optimizer_state(p) for key, p in parameters.items()}
        named = {f"{kind}.{key}": tensor for key, state in states.items() for kind, tensor in state.items()}
        yield optimizer_file(layer), named | self._firing(layer)

    def _write_job(self, folder: Path, progress: Progress) -> None:
        checksums: Checksums = {}
        for rank in range(self._mesh.layer_size):
            part = folder / f"files_{rank}.json"
            checksums |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        save_tensors(folder / SCALING_FILE, self._transcoder.scaling.tensors(), checksums)
        write_text(folder / CARD_FILE, json.dumps(card(self._transcoder), indent=1) + "\n", checksums)
        write_text(folder / PROGRESS_FILE, json.dumps(asdict(progress), indent=1) + "\n", checksums)
        write_text(folder / CONFIG_FILE, config_to_yaml(self._config), checksums)
        write_manifest(folder, checksums)

    def _restore(self, folder: Path) -> Progress:
        manifest = read_manifest(folder)
        own = [name for layer in self._layers for name in (layer_file(layer), optimizer_file(layer))]
        own += [average_file(layer) for layer in self._layers if self._average is not None]
        for name in (CONFIG_FILE, CARD_FILE, PROGRESS_FILE, *own):
            verify_file(folder, name, manifest)
        self._check_same_job(folder)
        progress = Progress(**json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")))
        for layer in self._layers:
            self._restore_layer(folder, layer)
        self._engine.adam_steps = progress.adam_steps
        return progress

    def _restore_layer(self, folder: Path, layer: int) -> None:
        parameters, columns = layer_tensors(self._transcoder, layer), self._transcoder.share.columns
        values = {key: self._engine.weights(parameter).clone() for key, parameter in parameters.items()}
        read_into(values | layer_buffers(self._transcoder, layer), folder / layer_file(layer), columns)
        state = read_tensors(folder / optimizer_file(layer))
        for key, parameter in parameters.items():
            names = {name.removesuffix(f".{key}"): name for name in state if name.endswith(f".{key}")}
            own = {kind: own_columns(name, state[name], columns) for kind, name in names.items()}
            try:
                self._engine.restore(parameter, values[key], own)
            except KeyError as error:
                missing = f"{error.args[0]}.{key}"
                raise CheckpointError(f"{folder / optimizer_file(layer)}: key '{missing}' is missing") from None
        if self._average is not None:
            means = {key: self._average.of(parameter) for key, parameter in parameters.items()}
            read_into(means, folder / average_file(layer), columns)
        for key, silent_F in self._firing(layer).items():
            silent_F.copy_(state[key])

    def _firing(self, layer: int) -> dict[str, Tensor]:
        sources = self._transcoder.share.sources
        return {FIRING_KEY: self._tracker.silent_LF[sources.index(layer)]} if layer in sources else {}

    def _check_same_job(self, folder: Path) -> None:
        """Raises CheckpointError naming the first key in which the checkpoint's job differs from this one."""
        saved_card, own_card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8")), card(self._transcoder)
        # Parsed and dumped again: settings that a checkpoint of an earlier version lacks have their defaults.
        saved_card["config"] = config_to_tree(read_card(folder / CARD_FILE)[0])
        for key in ("store", "model", "config"):
            _compare(folder / CARD_FILE, key, saved_card.get(key), own_card[key])
        saved_job = config_to_tree(load_config(type(self._config), folder / CONFIG_FILE))
        for key, value in config_to_tree(self._config).items():
            if key not in MAY_CHANGE:
                _compare(folder / CONFIG_FILE, key, saved_job.get(key), value)


def step_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step_{step:08d}"


def optimizer_file(layer: int) -> str:
    """Name of the file with the optimizer state of one layer."""
    return f"optimizer_{layer:02d}.safetensors"


def _compare(path: Path, key: str, saved: Any, current: Any) -> None:
    for name, old, new in _differences(key, saved, current):
        raise CheckpointError(
            f"{path}: key '{name}' is {old!r} in the checkpoint and {new!r} in this job; "
            "restore the value or choose another output folder"
        )


def _differences(key: str, saved: Any, current: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in sorted({*saved, *current}):
            yield from _differences(f"{key}.{name}", saved.get(name), current.get(name))
    elif saved != current:
        yield key, saved, current
