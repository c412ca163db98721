"""Loads a model, its tokenizer and its image processor from a folder or the hub, and computes its fingerprint.

Used by `ModelAdapter.from_pretrained` only. Weights are read from safetensors, never from pickles; every failure that
a user can cause is a one-line `ModelError`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from clt.capture.models.architectures import attention_of, find_architecture
from clt.errors import ModelError
from clt.records import ModelIdentity

log = logging.getLogger(__name__)

DeviceMap = Literal["auto", "balanced", "sequential"]
Quantization = Literal["8bit", "4bit"]

_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Tokenizer and image processor of a vision-language model.

    Attributes:
        tokenizer: Hugging Face tokenizer.
        image_processor: Hugging Face image processor.
        chat_template: Jinja template of the model's processor, or several by name; None: the tokenizer's, if any.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices and quantisation of the weights of a model.

    Attributes:
        device: torch device of all weights.
        device_map: instead of `device`, strategy for spreading them over all GPUs.
        quantization: type of quantised weights of linear layers.
    """

    device: str
    device_map: DeviceMap | None = None
    quantization: Quantization | None = None

    def check(self, path: str) -> None:
        """ModelError if the device cannot be used or a package is missing."""
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device '{self.device}' cannot be used ({_first_line(error)}); choose another") from None
        needed = {"bitsandbytes": self.quantization, "accelerate": self.quantization or self.device_map}
        for package, reason in needed.items():
            if reason is not None and find_spec(package) is None:
                key = "quantization" if reason == self.quantization else "device_map"
                raise ModelError(
                    f"{path}: {key}: {reason} needs the package '{package}'; pip install {package}, or remove the key"
                )

    def arguments(self, dtype: str) -> dict[str, Any]:
        """Arguments of `from_pretrained` in transformers."""
        from transformers import BitsAndBytesConfig

        if self.device_map is None and self.quantization is None:
            return {}
        arguments: dict[str, Any] = {"device_map": self.device_map or {"": self.device}}
        if self.quantization == "8bit":
            arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        elif self.quantization == "4bit":
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
            )
        return arguments

    def put(self, model: Any, path: str) -> Any:
        """Moves the model to its device; ModelError if a weight fits on no device."""
        if self.device_map is None and self.quantization is None:
            return model.to(self.device)
        unplaced = next((name for name, weight in model.named_parameters() if weight.device.type == "meta"), None)
        if unplaced is not None:
            raise ModelError(
                f"{path}: the model does not fit the devices, first weight without one: {unplaced}; use more GPUs, a "
                f"narrower dtype or quantization"
            )
        return model


def load_model(path: str, revision: str | None, dtype: str, placement: Placement) -> tuple[Any, Any]:
    """Loads a model and its processor.

    Args:
        path: folder or hub name.
        revision: hub revision; for a folder ignored with a warning.
        dtype: float32, bfloat16, float16 or float64.
        placement: devices and quantisation.

    Returns:
        The model; its `Processor`, or its tokenizer for a text model.

    Raises:
        ModelError: a file is missing or damaged, or the class, dtype or device is not supported.
    """
    _check_folder(path)
    if revision is not None and Path(path).is_dir():
        log.warning("revision=%s is ignored: %s is a folder, which has no revisions", revision, path)
    if dtype not in _DTYPES:
        raise ModelError(f"dtype '{dtype}': expected one of {', '.join(_DTYPES)}")
    placement.check(path)
    from safetensors import SafetensorError

    try:
        with _quiet_transformers():
            return _load(path, revision, dtype, placement)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{path}: the model cannot be loaded ({_first_line(error)}); check its files") from error


def _load(path: str, revision: str | None, dtype: str, placement: Placement) -> tuple[Any, Any]:
    import transformers

    # Older versions guard the top-level name with torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    try:
        find_architecture(architecture)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        version = transformers.__version__
        raise ModelError(f"{path}: transformers {version} has no {architecture}; call ModelAdapter with a loaded model")
    model, report = model_class.from_pretrained(
        path,
        revision=revision,
        dtype=getattr(torch, dtype),
        attn_implementation=attention_of(model_class),
        use_safetensors=True,
        output_loading_info=True,
        **placement.arguments(dtype),
    )
    # transformers initialises these at random and only warns.
    missing = sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]])
    if missing:
        raise ModelError(f"{path}: weights are missing or have another shape, first {missing[0]}; check its files")
    model = placement.put(model, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision)
    if getattr(config, "vision_config", None) is None:
        return model, tokenizer
    # The PIL backend gives the same pixels with and without torchvision installed.
    images = AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
    # Reads processor_config.json and the files of chat templates, without the processor's class: some need torchvision.
    settings, _ = transformers.ProcessorMixin.get_processor_dict(path, revision=revision)
    return model, Processor(tokenizer=tokenizer, image_processor=images, chat_template=settings.get("chat_template"))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disables progress bars and load reports of transformers: errors are raised as a `ModelError`."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_folder(path: str) -> None:
    folder = Path(path)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file():
            raise ModelError(f"{path}: the folder has no config.json; give the folder of a saved model")
        try:
            json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{config}: not valid JSON ({_first_line(error)}); save the model again") from None
        return
    hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) is not None
    # A name below an existing folder is a mistyped path, not a hub name.
    if folder.exists() or not hub_name or (len(folder.parts) > 1 and folder.parent.is_dir()):
        raise ModelError(f"{path}: no such model folder; check the path")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def identify(model: nn.Module, name: str, revision: str) -> ModelIdentity:
    """Name, size and fingerprint of a model.

    Args:
        model: a supported Hugging Face model.
        name: path or hub name as given by the user.
        revision: hub revision, or "local".

    Returns:
        Its identity. The fingerprint is a SHA-256 over shape and a strided sample of every weight, without parameter
        names and dtypes, so that a lossless cast or a renaming between library versions keeps it.
    """
    digests = []
    for tensor in model.state_dict().values():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float32).contiguous()
        digests.append(hashlib.sha256(repr(tuple(tensor.shape)).encode() + sample.numpy().tobytes()).digest())
    text = cast(Any, model).config.get_text_config()
    return ModelIdentity(
        name=name,
        revision=revision,
        architecture=type(model).__name__,
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        fingerprint=hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
    )
