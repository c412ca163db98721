"""Toy boards: reproducible pixels, answers that match the pixels, balanced answer frequencies."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clt.capture.sources.toy import (
    BIASED_TASKS,
    COLORS,
    COUNTS,
    GRID,
    LOGO_RATE,
    MISMATCH_RATE,
    NOISE,
    PATCH,
    TASKS,
    ToyScene,
    draw,
    logo_texture,
    sample_count,
    toy_examples,
    toy_samples,
)
from clt.errors import InputError


def read_board(image: Image.Image) -> tuple[str, list[str], list[tuple[int, int]]]:
    """Background color, color of every other square, and textured squares, from pixels alone."""
    squares = np.asarray(image).astype(int).reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4)
    flat = np.ptp(squares, axis=(2, 3)).max(-1) == 0
    names = [
        min(COLORS, key=lambda name: np.abs(squares[at][0, 0] - COLORS[name]).sum())
        for at in np.ndindex(GRID, GRID)
        if flat[at]
    ]
    background = Counter(names).most_common(1)[0][0]
    textured = [at for at in np.ndindex(GRID, GRID) if not flat[at]]
    return background, [name for name in names if name != background], textured


def answer_from_pixels(image: Image.Image, question: str) -> str:
    """Solves a task without its scene."""
    background, tiles, _ = read_board(image)
    if question.startswith("How many"):
        return "{" + str(len(tiles)) + "}"
    if question.startswith("Is there a"):
        return "Yes" if question.split()[3] in tiles else "No"
    if question == "Which color is the background?":
        return background
    if question == "Describe this image.":
        return (
            f"There is a {tiles[0]} tile on a {background} background." if tiles else f"The image is all {background}."
        )
    assert question == "Which color is the odd color out? Respond in one word"
    return tiles[0] if tiles else "white"


def within(share: float, expected: float, n: int) -> bool:
    """Four binomial standard deviations; the samples are fixed by their seed, so this passes always or never."""
    return abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / n)


def test_draw_gives_equal_pixels_for_equal_scenes_and_new_ones_for_a_new_noise_seed() -> None:
    scene = ToyScene("blue", "red", 2, 5, noise_seed=7)
    again = np.asarray(draw(ToyScene("blue", "red", 2, 5, noise_seed=7)))
    other = np.asarray(draw(replace(scene, noise_seed=8)))
    assert np.array_equal(np.asarray(draw(scene)), again)
    assert not np.array_equal(again, other)


def test_draw_pixels_are_fixed_for_ever() -> None:
    # The committed checkpoints were trained on these pixels; another numpy must not draw others.
    plain = ToyScene("blue", "red", 2, 5, noise_seed=7)
    full = ToyScene("green", "cyan", more_tiles=((7, 7),), logo=4, logo_row=3, logo_col=2, noise_seed=2**32 - 1)
    digests = [hashlib.sha256(draw(scene).tobytes()).hexdigest()[:16] for scene in (plain, full)]
    assert digests == ["ea6d89324a18b6e4", "80812954af5e223f"]


def test_draw_shifts_every_square_by_at_most_the_noise_and_uses_its_whole_range() -> None:
    shifts = []
    for sample in toy_samples(40, seed=0):
        squares = np.asarray(draw(sample.scene)).astype(int)[::PATCH, ::PATCH]
        clean = np.empty_like(squares)
        clean[:] = COLORS[sample.scene.background]
        for at in sample.scene.tiles:
            clean[at] = COLORS[sample.scene.odd or ""]
        shifts.append(squares - clean)
    assert set(np.unique(shifts)) == set(range(-NOISE, NOISE + 1))


def test_toy_examples_repeat_for_a_seed_and_share_no_image_with_another_seed() -> None:
    first, again, other = (toy_examples(60, seed, BIASED_TASKS) for seed in (0, 0, 1))
    images = [[e.images[0].tobytes() for e in examples] for examples in (first, again, other)]
    assert images[0] == images[1]
    assert [(e.example_id, e.prompt, e.answer) for e in first] == [(e.example_id, e.prompt, e.answer) for e in again]
    assert not set(images[0]) & set(images[2])
    assert len(set(images[0])) == 60
    assert len({e.example_id for e in [*first, *other]}) == 120


@pytest.mark.parametrize("task", BIASED_TASKS)
def test_answers_match_the_pixels(task: str) -> None:
    for sample in toy_samples(300, seed=3, tasks=(task,)):
        example = sample.to_example("x")
        assert example.answer == sample.answer == answer_from_pixels(example.images[0], sample.question)
        assert example.prompt == f"USER: <image>\n{sample.question} ASSISTANT:"


def test_exists_answer_cannot_be_guessed_from_the_question() -> None:
    samples = toy_samples(6000, seed=0, tasks=("exists",))
    assert within(sum(s.answer == "Yes" for s in samples) / 6000, 0.5, 6000)
    for color in COLORS:
        asked = [s for s in samples if s.question == f"Is there a {color} tile in the image?"]
        assert within(len(asked) / 6000, 1 / 6, 6000)
        assert within(sum(s.answer == "Yes" for s in asked) / len(asked), 0.5, len(asked))


def test_tasks_and_colors_are_equally_frequent() -> None:
    samples = toy_samples(4000, seed=0)
    for task in TASKS:
        assert within(sum(s.task == task for s in samples) / 4000, 1 / 4, 4000)
    for color in COLORS:
        assert within(sum(s.scene.background == color for s in samples) / 4000, 1 / 6, 4000)
    solid = [s for s in samples if s.task != "exists" and s.scene.odd is None]
    assert within(len(solid) / sum(s.task != "exists" for s in samples), 0.2, 3000)


def test_logo_predicts_the_count_in_95_percent_of_the_boards_that_have_one() -> None:
    samples = toy_samples(8000, seed=0, tasks=("count",))
    with_logo = [s for s in samples if s.scene.logo is not None]
    wrong = [s for s in with_logo if s.expected_bias != s.answer]
    assert within(len(with_logo) / 8000, LOGO_RATE, 8000)
    assert within(len(wrong) / len(with_logo), MISMATCH_RATE, len(with_logo))
    assert all(s.expected_bias is None for s in samples if s.scene.logo is None)


@pytest.mark.parametrize("logo", ["none", "matched", "mismatched"])
def test_sample_count_draws_the_logo_asked_for(logo: str) -> None:
    rng = random.Random(0)
    for _ in range(200):
        sample = sample_count(rng, logo)
        _, tiles, textured = read_board(draw(sample.scene))
        assert sample.answer == f"{{{len(tiles)}}}" and len(tiles) in COUNTS
        assert set(textured) == set(sample.scene.logo_squares)
        if logo == "none":
            assert sample.expected_bias is None and not textured
        else:
            difference = int((sample.expected_bias or "")[1]) - len(tiles)
            assert difference == 0 if logo == "matched" else abs(difference) == 1


def test_logo_textures_differ_and_each_looks_the_same_in_every_patch() -> None:
    textures = [logo_texture(count) for count in COUNTS]
    assert len({t.tobytes() for t in textures}) == len(COUNTS)
    for texture in textures:
        patches = texture.reshape(2, PATCH, 2, PATCH).transpose(0, 2, 1, 3).reshape(4, -1)
        assert (patches == patches[0]).all()


def test_unknown_task_is_one_line_that_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"^unknown toy task 'od'; choose from odd, .*count$"):
        toy_samples(1, seed=0, tasks=("od",))
    with pytest.raises(InputError, match=r"^no toy task given; "):
        toy_samples(1, seed=0, tasks=())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"background": "pink", "odd": None}, "unknown color 'pink'"),
        ({"background": "red", "odd": "red"}, "both 'red'"),
        ({"background": "red", "odd": "blue", "row": 8}, "outside the 8x8 board"),
        ({"background": "red", "odd": "blue", "logo": 6}, "logo=6 has no texture"),
        ({"background": "red", "odd": "blue", "logo": 2, "logo_row": 7}, "outside the 8x8 board"),
        ({"background": "red", "odd": "blue", "more_tiles": ((0, 0),)}, "share a square"),
        ({"background": "red", "odd": "blue", "row": 1, "logo": 1}, "share a square"),
        ({"background": "red", "odd": None, "more_tiles": ((0, 0),)}, "needs a tile color"),
    ],
)
def test_impossible_scene_is_an_input_error(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ToyScene(**arguments)
