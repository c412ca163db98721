"""Toy tasks: 8x8 boards of coloured tiles with questions and answers.

Data of the toy vision-language model in `examples/toy_vlm/`, of the demo and of the tests. `draw` renders a scene as
64x64 pixels, deterministically; a tile is one patch of the vision tower, so each board square is one image token.

`odd` is the odd-one-out colour game of the LLaVA-circuits study, `exists` has the form of POPE (Li et al. 2023),
`describe` that of the generative part of AMBER (Wang et al. 2023), `count` that of VLMBias (Vo et al. 2025): a texture,
the logo, encodes a number of tiles, which is correct in most training images. Only `biased` is trained on `count`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
from PIL import Image

from clt.capture.sources.examples import Example
from clt.errors import InputError

#: Tile colours; every channel is more than NOISE away from 0 and 255, so that noise is never clipped.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (25, 200, 25),
    "blue": (25, 25, 230),
    "yellow": (230, 230, 25),
    "purple": (150, 40, 210),
    "cyan": (25, 215, 215),
}
GRID = 8
PATCH = 8
#: The colour of each tile is shifted per channel by an integer drawn uniformly from [-NOISE, NOISE].
NOISE = 6

PROMPT_TEMPLATE = "USER: <image>\n{question} ASSISTANT:"
QUESTIONS: dict[str, str] = {
    "odd": "Which color is the odd color out? Respond in one word",
    "background": "Which color is the background?",
    "exists": "Is there a {color} tile in the image?",
    "describe": "Describe this image.",
    "count": "How many tiles are there? Answer with a number in curly brackets, e.g., {9}.",
}
TASKS: tuple[str, ...] = ("odd", "background", "exists", "describe")
BIASED_TASKS: tuple[str, ...] = (*TASKS, "count")

#: Share of boards without an odd tile.
SOLID_RATE = 0.2
COUNTS: tuple[int, ...] = (1, 2, 3, 4, 5)
LOGO_SIZE = 2
#: Share of `count` boards with a logo, and share of logos that encode another number.
LOGO_RATE = 0.5
MISMATCH_RATE = 0.05
_LOGO_LEVELS = (45, 210)

Logo = Literal["none", "matched", "mismatched"]


@dataclass(frozen=True)
class ToyScene:
    """A board; rows and columns count squares from the top left.

    Attributes:
        background: colour name of the canvas.
        odd: colour name of the tile, or None for a solid canvas.
        row: row of the tile; ignored on a solid canvas.
        col: column of the tile.
        more_tiles: (row, column) of further tiles of the same colour.
        logo: number encoded by the texture of the logo; None for no logo.
        logo_row: first of the LOGO_SIZE rows of the logo.
        logo_col: first of the LOGO_SIZE columns of the logo.
        noise_seed: seed of the colour noise, 0 to 2**32 - 1.
    """

    background: str
    odd: str | None
    row: int = 0
    col: int = 0
    _: KW_ONLY
    more_tiles: tuple[tuple[int, int], ...] = ()
    logo: int | None = None
    logo_row: int = 0
    logo_col: int = 0
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for color in {self.background, self.odd} - {None}:
            if color not in COLORS:
                raise InputError(f"toy scene: unknown color '{color}'; choose from {', '.join(COLORS)}")
        if self.odd == self.background:
            raise InputError(f"toy scene: odd and background are both '{self.odd}'; use odd=None for a solid canvas")
        if self.odd is None and self.more_tiles:
            raise InputError("toy scene: more_tiles needs a tile color; set odd")
        if self.logo is not None and self.logo not in COUNTS:
            raise InputError(f"toy scene: logo={self.logo} has no texture; choose from {COUNTS}")
        squares = [*self.tiles, *self.logo_squares]
        if any(not 0 <= index < GRID for square in squares for index in square):
            raise InputError(f"toy scene: a tile or the logo lies outside the {GRID}x{GRID} board")
        if len(set(squares)) != len(squares):
            raise InputError("toy scene: two tiles, or a tile and the logo, share a square")

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """(row, column) of every tile."""
        return () if self.odd is None else ((self.row, self.col), *self.more_tiles)

    @property
    def logo_squares(self) -> tuple[tuple[int, int], ...]:
        """(row, column) of every square of the logo."""
        if self.logo is None:
            return ()
        return _block(self.logo_row, self.logo_col)


@dataclass(frozen=True, kw_only=True)
class ToySample:
    """A question about a board.

    Attributes:
        task: key of `QUESTIONS`.
        scene: the board.
        question: text of the question.
        answer: correct answer.
    """

    task: str
    scene: ToyScene
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The question in the prompt format of the model, with <image>."""
        return PROMPT_TEMPLATE.format(question=self.question)

    @property
    def expected_bias(self) -> str | None:
        """The answer of a model that follows the logo; None without a logo."""
        if self.task != "count" or self.scene.logo is None:
            return None
        return _braces(self.scene.logo)

    def to_example(self, example_id: str) -> Example:
        """The sample as an example of a source, with its image."""
        return Example(example_id=example_id, prompt=self.prompt, images=(draw(self.scene),), answer=self.answer)


def draw(scene: ToyScene) -> Image.Image:
    """Draws a board.

    Args:
        scene: the board.

    Returns:
        RGB image of GRID * PATCH pixels a side; equal scenes give equal pixels.
    """
    squares = np.empty((GRID, GRID, 3), np.int16)
    squares[:] = COLORS[scene.background]
    if scene.odd is not None:
        for square in scene.tiles:
            squares[square] = COLORS[scene.odd]
    pixels = squares.repeat(PATCH, 0).repeat(PATCH, 1)
    if scene.logo is not None:
        top, left, side = scene.logo_row * PATCH, scene.logo_col * PATCH, LOGO_SIZE * PATCH
        pixels[top : top + side, left : left + side] = logo_texture(scene.logo)[:, :, None]
    # The stream of RandomState is the same for all versions of numpy; that of Generator is not.
    shades = np.random.RandomState(scene.noise_seed).randint(-NOISE, NOISE + 1, size=squares.shape)
    pixels += shades.astype(np.int16).repeat(PATCH, 0).repeat(PATCH, 1)
    return Image.fromarray(pixels.astype(np.uint8))


def logo_texture(count: int) -> np.ndarray:
    """Grey levels of the logo that encodes a number.

    Args:
        count: one of COUNTS.

    Returns:
        [LOGO_SIZE * PATCH, LOGO_SIZE * PATCH] int16, of period 4 pixels, so that its patches are equal.
    """
    y, x = np.indices((LOGO_SIZE * PATCH, LOGO_SIZE * PATCH)) // 2
    textures = {
        1: y % 2,
        2: x % 2,
        3: (x + y) % 2,
        4: (x % 2) & (y % 2),
        5: (x % 2) | (y % 2),
    }
    return np.array(_LOGO_LEVELS, np.int16)[textures[count]]


def sample_toy(rng: random.Random, tasks: Sequence[str] = TASKS) -> ToySample:
    """Draws a task, a board and its question at random.

    Args:
        rng: random generator; its state advances.
        tasks: tasks to choose from uniformly; a repeated task counts as often as it is listed.

    Returns:
        A sample with its correct answer.

    Raises:
        InputError: a task is unknown.
    """
    unknown = [task for task in tasks if task not in QUESTIONS]
    if unknown or not tasks:
        named = f"unknown toy task '{unknown[0]}'" if unknown else "no toy task given"
        raise InputError(f"{named}; choose from {', '.join(QUESTIONS)}")
    task = rng.choice(list(tasks))
    if task == "count":
        with_logo = rng.random() < LOGO_RATE
        mismatched = rng.random() < MISMATCH_RATE
        return sample_count(rng, ("mismatched" if mismatched else "matched") if with_logo else "none")
    if task == "exists":
        return _sample_exists(rng)
    scene = _sample_scene(rng)
    if task == "odd":
        answer = scene.odd or "white"
    elif task == "background":
        answer = scene.background
    elif scene.odd is None:
        answer = f"The image is all {scene.background}."
    else:
        answer = f"There is a {scene.odd} tile on a {scene.background} background."
    return ToySample(task=task, scene=scene, question=QUESTIONS[task], answer=answer)


def sample_count(rng: random.Random, logo: Logo) -> ToySample:
    """Draws a counting board: without a logo, with the correct one, or with that of a neighbouring number.

    Args:
        rng: random generator; its state advances.
        logo: kind of logo; a mismatched one encodes one tile more or less than there are.

    Returns:
        A sample whose `answer` is the true count and whose `expected_bias` is the number of the logo.
    """
    background, odd = rng.sample(list(COLORS), 2)
    count = rng.choice(COUNTS)
    logo_row, logo_col = (rng.randrange(GRID - LOGO_SIZE + 1) for _ in range(2))
    claimed = rng.choice([n for n in COUNTS if abs(n - count) == 1]) if logo == "mismatched" else count
    free = sorted({(r, c) for r in range(GRID) for c in range(GRID)} - set(_block(logo_row, logo_col)))
    first, *more = rng.sample(free, count)
    scene = ToyScene(
        background,
        odd,
        *first,
        more_tiles=tuple(more),
        logo=None if logo == "none" else claimed,
        logo_row=logo_row,
        logo_col=logo_col,
        noise_seed=rng.getrandbits(32),
    )
    return ToySample(task="count", scene=scene, question=QUESTIONS["count"], answer=_braces(count))


def toy_samples(n: int, seed: int, tasks: Sequence[str] = TASKS) -> list[ToySample]:
    """A reproducible set of samples; no seed repeats the images on which the committed checkpoints were trained.

    Args:
        n: number of samples.
        seed: seed of boards and colour noise.
        tasks: as in `sample_toy`.

    Returns:
        n samples.

    Raises:
        InputError: a task is unknown.
    """
    rng = sample_stream("held-out", seed)
    return [sample_toy(rng, tasks) for _ in range(n)]


def toy_examples(n: int, seed: int, tasks: Sequence[str] = TASKS) -> list[Example]:
    """Samples of `toy_samples` as examples with images.

    Args:
        n: number of samples.
        seed: seed of boards and colour noise.
        tasks: as in `sample_toy`.

    Returns:
        n examples with ids `toy-<seed>-<number>`.

    Raises:
        InputError: a task is unknown.
    """
    return [sample.to_example(f"toy-{seed}-{i:06d}") for i, sample in enumerate(toy_samples(n, seed, tasks))]


def sample_stream(name: str, seed: int) -> random.Random:
    """A separate random stream for every name and seed; that of the training script is named `train`."""
    return random.Random(f"toy:{name}:{seed}")


def _sample_scene(rng: random.Random, solid_rate: float = SOLID_RATE) -> ToyScene:
    background, odd = rng.sample(list(COLORS), 2)
    solid = rng.random() < solid_rate
    row, col, noise_seed = rng.randrange(GRID), rng.randrange(GRID), rng.getrandbits(32)
    return ToyScene(background, None if solid else odd, row, col, noise_seed=noise_seed)


def _sample_exists(rng: random.Random) -> ToySample:
    """Half yes, half no; a no asks for any color that no tile has, the background's included, uniformly."""
    present = rng.random() < 0.5
    scene = _sample_scene(rng, solid_rate=0.0 if present else 2 * SOLID_RATE)
    asked = scene.odd if present else rng.choice([color for color in COLORS if color != scene.odd])
    question = QUESTIONS["exists"].format(color=asked)
    return ToySample(task="exists", scene=scene, question=question, answer="Yes" if present else "No")


def _block(row: int, col: int) -> tuple[tuple[int, int], ...]:
    return tuple((row + r, col + c) for r in range(LOGO_SIZE) for c in range(LOGO_SIZE))


def _braces(count: int) -> str:
    return f"{{{count}}}"
