"""Agreement measures against hand-computed numbers and against one prompt at a time in plain float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from clt.attribution.evaluation.agreement import (
    Comparison,
    Part,
    evaluate_replacement,
    kl_divergence,
    partial_replacements,
    same_top1,
    text_mask,
)
from clt.attribution.replacement.replacement_model import ReplacementModel
from clt.capture.models.adapter import ModelAdapter
from clt.capture.models.hooks import attach
from clt.capture.sources.toy import toy_examples
from clt.errors import CheckpointError, InputError, NonFiniteError
from clt.records import Modality
from clt.transcoder.architecture import CLTConfig
from clt.transcoder.model import CrossLayerTranscoder, Provenance
from clt.transcoder.scaling import Scaling


def prepared(adapter, count, answers=True):
    return [adapter.prepare(e.prompt, e.images, e.answer if answers else None) for e in toy_examples(count, 21)]


def test_kl_divergence_gives_hand_computed_nats():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    # 1/2 ln 2 + 0 - 1/4 ln 2; a constant added to the logits changes nothing.
    found = kl_divergence(torch.stack([p.log() + 3, p.log()]), torch.stack([q.log() - 5, p.log() + 7]))
    assert found.dtype == torch.float64
    torch.testing.assert_close(
        found, torch.tensor([0.25 * math.log(2), 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


def test_kl_divergence_is_directed_from_the_model_to_the_replacement():
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)


def test_kl_divergence_of_nearby_float32_logits_keeps_its_digits():
    logits = torch.tensor([[20.0, 0.0, -20.0]])
    moved = logits + torch.tensor([[0.0, 2.0**-10, 0.0]])
    p = logits.double().softmax(-1)
    # Second order: half the variance of the change under the model, here about 1e-15; float32 would give noise of 1e-8.
    expected = 0.5 * (p[0, 1] * (1 - p[0, 1])) * 2.0**-20
    assert float(kl_divergence(logits, moved)) == pytest.approx(float(expected), rel=1e-2)


def test_same_top1_compares_the_likeliest_token():
    original = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 0.0]])
    replaced = torch.tensor([[0.0, 0.1, 0.0], [1.0, 5.0, 0.0]])
    assert same_top1(original, replaced).tolist() == [True, False]


def test_report_equals_one_prompt_at_a_time_in_float64(toy_adapter, make_random_clt):
    transcoder, inputs = make_random_clt(toy_adapter), prepared(toy_adapter, 7)
    model = ReplacementModel(toy_adapter, transcoder)
    kl, top1, demeaned, missed, text_kl, text_top1, gap = [], [], [], [], [], [], []
    for prompt in inputs:
        original, replaced = toy_adapter.forward(prompt)[0].double(), model.forward(prompt)[0].double()
        length, start = len(original), int(prompt.answer_start[0])
        modality = prompt.tokens.modality[0].tolist()
        for position in range(length - 1):
            log_p, log_q = original[position].log_softmax(0), replaced[position].log_softmax(0)
            divergence = float((log_p.exp() * (log_p - log_q)).sum())
            same = int(original[position].argmax()) == int(replaced[position].argmax())
            if modality[position] == Modality.TEXT:
                text_kl.append(divergence)
                text_top1.append(same)
            if position >= start - 1:
                kl.append(divergence)
                top1.append(same)
                answer_token = int(prompt.model_inputs["input_ids"][0, position + 1])
                gap.append(float(log_p[answer_token] - log_q[answer_token]))
                demeaned.append(original[position] - original[position].mean())
                missed.append(demeaned[-1] - replaced[position] + replaced[position].mean())
    variation = (torch.stack(demeaned) - torch.stack(demeaned).mean(0)).square().sum()
    report = evaluate_replacement(toy_adapter, transcoder, inputs, batch_size=3)
    assert (report.num_prompts, report.num_answer_positions) == (7, len(kl))
    assert report.num_text_positions == len(text_kl)
    assert report.top1_agreement == sum(top1) / len(top1)
    assert report.text_top1_agreement == sum(text_top1) / len(text_top1)
    # Padding changes float32 logits in their last digits.
    assert report.kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert report.text_kl == pytest.approx(sum(text_kl) / len(text_kl), rel=1e-4)
    assert report.ce_gap == pytest.approx(sum(gap) / len(gap), rel=1e-4)
    assert report.parts == {}
    assert report.fvu_logits == pytest.approx(float(torch.stack(missed).square().sum() / variation), rel=1e-4)
    assert report.kl > 0.01


def test_report_does_not_depend_on_the_batch_size(toy_adapter, make_random_clt):
    transcoder, inputs = make_random_clt(toy_adapter), prepared(toy_adapter, 5)
    one, all_together = (
        evaluate_replacement(toy_adapter, transcoder, iter(inputs), batch_size=size) for size in (1, 8)
    )
    assert one.top1_agreement == all_together.top1_agreement
    assert one.num_text_positions == all_together.num_text_positions
    for name in ("kl", "fvu_logits", "text_kl"):
        # Padding changes float32 logits in their last digits.
        assert getattr(one, name) == pytest.approx(getattr(all_together, name), rel=1e-4)


def test_a_transcoder_that_is_exact_agrees_exactly(toy_adapter):
    model = copy.deepcopy(toy_adapter.model)
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.weight.zero_()
    silent = ModelAdapter(model, toy_adapter)
    config = CLTConfig(n_features=8, k=2, n_layers=silent.n_layers, d_model=silent.d_model)
    transcoder = CrossLayerTranscoder(config, Scaling.identity(config.n_layers, config.d_model))
    report = evaluate_replacement(silent, transcoder, prepared(silent, 3))
    assert (report.top1_agreement, report.kl, report.fvu_logits, report.ce_gap) == (1.0, 0.0, 0.0, 0.0)
    assert (report.text_top1_agreement, report.text_kl) == (1.0, 0.0)


def test_text_positions_are_text_tokens_that_a_token_follows(toy_adapter):
    with_answer, without = prepared(toy_adapter, 1)[0], prepared(toy_adapter, 1, answers=False)[0]
    for inputs, last_counts in ((with_answer, False), (without, True)):
        mask, is_text = text_mask(inputs)[0], inputs.tokens.modality[0] == Modality.TEXT
        assert torch.equal(mask[:-1], is_text[:-1])
        assert bool(mask[-1]) == last_counts
    assert not text_mask(with_answer)[with_answer.tokens.modality == Modality.BOS].any()
    # The mask is the caller's own: the prompt keeps its tokens.
    assert int(with_answer.tokens.modality[0, -1]) == Modality.TEXT


def test_prompts_without_answers_and_empty_inputs_are_refused(toy_adapter, make_random_clt):
    transcoder = make_random_clt(toy_adapter)
    mixed = [*prepared(toy_adapter, 1), *prepared(toy_adapter, 1, answers=False)]
    with pytest.raises(InputError, match="no answer"):
        evaluate_replacement(toy_adapter, transcoder, mixed)
    with pytest.raises(InputError, match="no prompts"):
        evaluate_replacement(toy_adapter, transcoder, [])


def test_logits_that_are_not_finite_are_refused(toy_adapter, make_random_clt):
    transcoder = make_random_clt(toy_adapter)
    with torch.no_grad():
        transcoder.b_dec["3"][0] = torch.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        evaluate_replacement(toy_adapter, transcoder, prepared(toy_adapter, 1))


def test_a_transcoder_of_another_model_is_refused(toy_adapter, make_random_clt):
    transcoder = make_random_clt(toy_adapter)
    transcoder.provenance = Provenance(model=replace(toy_adapter.identity, fingerprint="f" * 64))
    with pytest.raises(CheckpointError, match="trained on"):
        evaluate_replacement(toy_adapter, transcoder, prepared(toy_adapter, 1))


def test_parts_divide_target_layers_evenly_and_know_modalities():
    config = CLTConfig(n_features=8, k=2, n_layers=9, d_model=4, first_offset=1)
    parts = partial_replacements(config, layer_ranges=3, has_images=True)
    names = ["only_layers_01_02", "only_layers_03_05", "only_layers_06_08", "only_text", "only_image"]
    assert [part.name for part in parts] == names
    assert [layer for part in parts[:3] for layer in part.targets] == list(range(1, 9))
    assert partial_replacements(config, layer_ranges=1, has_images=False) == ()
    assert len(partial_replacements(config, layer_ranges=99, has_images=False)) == 8


def test_partial_replacement_changes_the_chosen_layers_and_tokens_only(toy_adapter, make_random_clt):
    model = ReplacementModel(toy_adapter, make_random_clt(toy_adapter, skip=True))
    inputs = toy_adapter.collate(prepared(toy_adapter, 3))
    image = inputs.tokens.modality == Modality.IMAGE
    read, codes = {}, {}

    def reader(layer):
        def read_site(x_NSD):
            read[layer] = x_NSD.flatten(0, 1)
            codes[layer] = model.transcoder.encode_layer(layer, read[layer])
            return x_NSD

        return read_site

    def write(own_NSD):
        values, indices = (torch.stack(part) for part in zip(codes[0], codes[1], strict=True))
        found = model.transcoder.decode_layer(1, values, indices, read[1]).reshape(own_NSD.shape)
        return torch.where(image[..., None], found, own_NSD)

    edits = {f"lm.{layer}.resid_mid": reader(layer) for layer in (0, 1)} | {"lm.1.mlp_out": write}
    with torch.no_grad(), attach(toy_adapter, edit=edits):
        expected = toy_adapter.forward(inputs)
    assert torch.equal(model.forward_partly(inputs, targets=(1,), modalities=(Modality.IMAGE,)), expected)
    assert torch.equal(model.forward_partly(inputs), model.forward(inputs))
    with torch.no_grad():
        assert torch.equal(model.forward_partly(inputs, modalities=(Modality.PAD,)), toy_adapter.forward(inputs))


def test_parts_are_compared_at_answer_positions(toy_adapter, make_random_clt):
    transcoder, inputs = make_random_clt(toy_adapter), prepared(toy_adapter, 4)
    whole = tuple(range(toy_adapter.n_layers))
    comparison = Comparison(
        ReplacementModel(toy_adapter, transcoder),
        (Part(name="all", targets=whole), Part(name="none", modalities=(Modality.PAD,))),
    )
    comparison.add(toy_adapter.collate(inputs))
    report = comparison.report()
    everything, nothing = report.parts["all"], report.parts["none"]
    assert (everything.top1_agreement, everything.kl, everything.ce_gap) == (
        report.top1_agreement,
        report.kl,
        report.ce_gap,
    )
    assert (nothing.top1_agreement, nothing.kl, nothing.ce_gap) == (1.0, 0.0, 0.0)
