"""Section step: whole training steps on random batches; time, kernels, host synchronisations, busy time and memory."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable

import torch

from clt.distributed.code_exchange import CodeExchange
from clt.distributed.mesh import Mesh, deal_layers
from clt.launch.bench.device.check_report import CheckReport, DeviceCheck, Value
from clt.training.deepspeed_engine import DeepSpeedEngine, joined_job
from clt.training.engine import Engine, StepInputs
from clt.training.objective import Objective
from clt.training.row_adam_engine import RowEngine
from clt.training.settings import AuxKSettings, OptimizerSettings
from clt.transcoder.architecture import CLTConfig, TranscoderSettings
from clt.transcoder.model import CrossLayerTranscoder
from clt.transcoder.scaling import Scaling

#: Name, layers, channels, features, slots, tokens.
_SHAPES = (("toy", 4, 128, 1024, 16, 1024), ("gpt2", 12, 768, 16384, 32, 16384))
_DRY_SHAPES = (("toy", 2, 16, 32, 2, 8),)

_OPTIMIZERS = {
    "row_adam bfloat16 int8": OptimizerSettings(
        kind="row_adam", weights="bfloat16", moments="int8", gradient_clip=0, betas=(0.0, 0.999)
    ),
    "adam float32": OptimizerSettings(),
    "adam bfloat16_master": OptimizerSettings(weights="bfloat16_master"),
}
_TIMED_STEPS = 8


def time_training_steps(check: DeviceCheck, report: CheckReport) -> None:
    """Reports steps of every optimizer, without and with dead features."""
    with joined_job(600):
        for shape, n_layers, d_model, n_features, k, tokens in _DRY_SHAPES if check.dry else _SHAPES:
            for optimizer, settings in _OPTIMIZERS.items():
                with report.case(f"{shape} {optimizer}"):
                    torch.manual_seed(0)
                    config = CLTConfig.resolve(TranscoderSettings(n_features=n_features, k=k), n_layers, d_model)
                    engine = _engine(check, config, settings)
                    x, y = (check.normal(n_layers, tokens, d_model) for _ in range(2))
                    for dead in (None, torch.rand(n_layers, n_features, device=check.device) < 0.3):
                        inputs = StepInputs(x, y, k, dead, penalty_weight=0.0, weights_B=None)
                        name = f"{shape} {optimizer} dead={dead is not None}"
                        report.add(name, **_measure(check, functools.partial(_loss, engine, inputs)))
                check.release()


def _loss(engine: Engine, inputs: StepInputs) -> float:
    """Loss of one step."""
    return engine.train_step([inputs], 1e-4, False)[0].loss


def _engine(check: DeviceCheck, config: CLTConfig, settings: OptimizerSettings) -> Engine:
    mesh, dtype = Mesh.create(1), torch.float32 if settings.weights == "float32" else torch.bfloat16
    transcoder = CrossLayerTranscoder(config, Scaling.identity(config.n_layers, config.d_model))
    objective = Objective(
        transcoder.to(check.device, dtype), CodeExchange(mesh, deal_layers(config, 1)), AuxKSettings()
    )
    if settings.kind == "row_adam":
        return RowEngine(objective, mesh, settings, 0)
    return DeepSpeedEngine(objective, mesh, settings, 1 if dtype == torch.bfloat16 else 0)


def _measure(check: DeviceCheck, step: Callable[[], float]) -> dict[str, Value]:
    """Numbers of one step after warm-up; a dry check reports the loss alone."""
    start = time.perf_counter()
    loss = step()
    first_s = time.perf_counter() - start
    if check.dry:
        return {"loss": loss}
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        loss = step()
    torch.cuda.synchronize()
    step_ms = 1000 * (time.perf_counter() - start) / _TIMED_STEPS
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)[:8]:
        print(f"  {event.self_device_time_total / 1000:9.3f} ms {event.count:5d} x {event.key[:80]}", flush=True)
    return {
        "ms": step_ms,
        "first_s": first_s,
        "host_syncs": sum("synchroniz" in str(warning.message) for warning in caught),
        "kernels": len(on_device),
        "busy_ms": sum(event.device_time for event in on_device) / 1000,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
        "loss": loss,
    }
