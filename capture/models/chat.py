"""Formats plain questions as prompts: by the chat template of the model or, without one, in its own notation.

Text that has an image placeholder, special tokens or the ending of the template is taken as formatted and returned
unchanged. docs/models.md has an example.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clt.capture.models.prompts import PromptEncoder, quoted
from clt.errors import InputError

log = logging.getLogger(__name__)

#: Origin of a prompt: the chat template, the plain notation of the model, or the caller.
PromptFormat = Literal["chat_template", "plain", "as_given"]


@dataclass(frozen=True, kw_only=True)
class PromptFormatter:
    """Formats the prompts of one model.

    Attributes:
        encoder: the model's prompt encoder.
        chat_template: Jinja template of the processor or the tokenizer, or several by name, of which "default" is used;
            None for a model without.
    """

    encoder: PromptEncoder
    chat_template: str | Mapping[str, str] | None

    def apply(self, question: str, n_images: int) -> str:
        """The prompt of a question; see `ModelAdapter.format_prompt`."""
        if n_images:
            self.encoder.image_tokens(question, n_images)
        prompt_format, prompt = self._formatted(question, n_images)
        self.encoder.split(prompt, n_images)
        log.info("prompt_format=%s images=%d", prompt_format, n_images)
        return prompt

    def _formatted(self, question: str, n_images: int) -> tuple[PromptFormat, str]:
        template = self.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        if self._has_special_token(question):
            return "as_given", question
        if template is None:
            return "plain", self._plain(question, n_images)
        prompt = self._render(template, question, n_images)
        ending = prompt[prompt.rfind(question.strip()) + len(question.strip()) :].strip()
        if ending and question.rstrip().endswith(ending):
            return "as_given", question
        return "chat_template", prompt

    def _has_special_token(self, question: str) -> bool:
        special = {token.content for token in self.encoder.tokenizer.added_tokens_decoder.values() if token.special}
        if self.encoder.images is not None:
            special.add(self.encoder.images.placeholder)
        return any(token in question for token in special)

    def _plain(self, question: str, n_images: int) -> str:
        """The images in front of the text, a line each."""
        images = self.encoder.images
        return question if images is None else f"{images.written}\n" * n_images + question

    def _render(self, template: str, question: str, n_images: int) -> str:
        """The chat template's text of a single turn; some templates take text only, others only lists of parts."""
        from jinja2 import TemplateError

        parts = [*({"type": "image"} for _ in range(n_images)), {"type": "text", "text": question}]
        text = self._plain(question, n_images)
        reason = "its text lacks the question or an image"
        for content in (parts, text) if n_images else (text, parts):
            turn: list[dict[str, Any]] = [{"role": "user", "content": content}]
            try:
                prompt = self.encoder.tokenizer.apply_chat_template(
                    turn, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            except (TemplateError, TypeError) as error:
                reason = " ".join(str(error).split())
                continue
            images = self.encoder.images
            if question.strip() in prompt and (images is None or prompt.count(images.placeholder) == n_images):
                return prompt
        raise InputError(
            f"{self.encoder.model_name}: the chat template does not fit {quoted(question)} with {n_images} images "
            f"({reason}); write the prompt in the model's own notation"
        )
