"""Captures with generated answers: activations equal a forward pass over prompt and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clt.capture.answers import GenerationSettings
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.capture.planning import CaptureConfig, plan_capture
from clt.capture.reading.open_store import open_store
from clt.capture.run import capture_store
from clt.capture.sources.examples import JsonlSource, SourceSettings
from clt.config import parse_config
from clt.errors import ConfigError

PROMPTS = ("the cat sat", "what is this ?", "a", "the cat sat on a mat", "blue", "is this the cat ?", "red mat")


def job(tmp_path: Path, model: Path, records: list[dict[str, Any]], **changes: Any) -> CaptureConfig:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings: dict[str, Any] = {"store_dtype": "float32", "rows_per_unit": 64, "batch_size": 3}
    settings["generate"] = GenerationSettings(max_new_tokens=5)
    source = SourceSettings(jsonl=JsonlSource(file=file))
    return CaptureConfig(
        **{"model": str(model), "output": str(tmp_path / "store"), "source": source, **settings, **changes}
    )


def texts(tmp_path: Path, model: Path, **changes: Any) -> CaptureConfig:
    return job(tmp_path, model, [{"prompt": prompt, "answer": "ignored"} for prompt in PROMPTS], **changes)


def check(config: CaptureConfig, adapter: ModelAdapter) -> None:
    """Answers each prompt alone, runs prompt and answer alone, and compares what the store holds."""
    store = open_store(config.output)
    views = [view for unit in store.units for view in store.samples(unit.unit, store.sites)]
    planned = plan_capture(config, adapter)
    assert planned.answers is not None and len(views) == len(planned.answers)
    for sample, (view, answer) in enumerate(zip(views, planned.answers, strict=True)):
        example = planned.source.load(sample)
        alone = adapter.prepare(example.prompt, example.images)
        assert [answer] == [tuple(ids) for ids in adapter.generate(alone, 5)]
        n_prompt = alone.tokens.token_id.shape[1]
        assert torch.equal(view.tokens.token_id[:n_prompt], alone.tokens.token_id[0])
        assert tuple(view.tokens.token_id[n_prompt:].tolist()) == answer
        assert view.answer_tokens == len(answer)
        with torch.no_grad(), attach(adapter, store.sites) as recorded:
            adapter.forward(adapter.prepare(example.prompt, example.images, answer))
        expected = torch.stack([recorded[site][0] for site in store.sites])
        # float32; padding and batching change the order of summation
        torch.testing.assert_close(view.acts, expected, atol=1e-5, rtol=1e-5)


def test_prompt_and_generated_answer_are_captured(tmp_path: Path, llama_folder: Path) -> None:
    config = texts(tmp_path, llama_folder)
    capture_store(config)
    check(config, ModelAdapter.from_pretrained(llama_folder))


def test_answers_about_images_are_captured(tmp_path: Path, llava_folder: Path) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (20, 30), name).save(tmp_path / f"{name}.png")
    records = [{"prompt": "what is <image> ?", "image": "red.png"}, {"prompt": "a <image>", "image": "blue.png"}]
    config = job(tmp_path, llava_folder, records)
    capture_store(config)
    check(config, ModelAdapter.from_pretrained(llava_folder))


def test_answers_are_generated_once_and_a_stopped_job_resumes(
    tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = texts(tmp_path, llama_folder)
    adapter, asked = ModelAdapter.from_pretrained(llama_folder), []
    generate = ModelAdapter.generate

    def counted(self: ModelAdapter, inputs: Any, max_new_tokens: int) -> list[list[int]]:
        if len(asked) == 2 and None not in asked:
            asked.append(None)
            raise KeyboardInterrupt
        asked.append(inputs.prompts)
        return generate(self, inputs, max_new_tokens)

    monkeypatch.setattr(ModelAdapter, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        capture_store(config, adapter=adapter)
    resumed = capture_store(config, adapter=adapter)
    batches = [prompts for prompts in asked if prompts is not None]
    assert sorted(prompt for prompts in batches for prompt in prompts) == sorted(PROMPTS)
    assert capture_store(config, adapter=adapter) == resumed and len(batches) == 3
    whole = texts(tmp_path, llama_folder, output=str(tmp_path / "whole"))
    assert capture_store(whole, adapter=adapter) == resumed


def test_a_plan_without_answers_bounds_the_real_one(tmp_path: Path, llama_folder: Path) -> None:
    config = texts(tmp_path, llama_folder)
    adapter = ModelAdapter.from_pretrained(llama_folder)
    bound = plan_capture(config, adapter, longest_answers=True)
    assert not (tmp_path / "store.answers").exists(), "nothing was generated"
    real = plan_capture(config, adapter)
    prompts = [adapter.count_tokens(prompt) for prompt in PROMPTS]
    assert list(bound.lengths) == [length + 5 for length in prompts]
    assert all(a < b <= c for a, b, c in zip(prompts, real.lengths, bound.lengths, strict=True))


def test_other_answers_are_another_store(tmp_path: Path, llama_folder: Path) -> None:
    adapter = ModelAdapter.from_pretrained(llama_folder)
    jobs = [texts(tmp_path, llama_folder, generate=GenerationSettings(max_new_tokens=n)) for n in (2, 5)]
    jobs.append(texts(tmp_path, llama_folder, generate=None))
    assert len({plan_capture(config, adapter).spec.source for config in jobs}) == 3
    with pytest.raises(ConfigError, match="max_new_tokens"):
        parse_config(GenerationSettings, {"max_new_tokens": 0}, "job.yaml")
