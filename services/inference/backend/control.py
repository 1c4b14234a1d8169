"""Control tokens stay the template's own: text of a request that spells one is broken up before it is rendered.

llama.cpp renders the chat template to one string and tokenizes that with special tokens on, so `<|im_end|>` in a
message would end the message, and `<|im_start|>system` begin one in the operator's name. A zero-width space after the
first character of such a text keeps it what it is, text, for the model and for whoever reads it.

Which texts: the vocabulary's control and unknown tokens, and of the user-defined ones those that turn templates are
known to use (a conversion that forgot their type would open the door again).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

BREAK = "\u200b"
CONTROL_TYPES = frozenset({2, 3})  # unknown, control: tokenizer.ggml.token_type
_USER_DEFINED = 4
_TURNS = re.compile(r"<\|[^|]*\|>|</?(start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>")
# What nearly every control token looks like; a large vocabulary has thousands, too many for one pattern.
_SHAPED = re.compile(r"<[^<>\s]{1,64}>|\[[^\[\]\s]{1,64}\]")
_SHAPE = re.compile(f"(?=({_SHAPED.pattern}))")


class ControlTexts:
    """The control tokens of one vocabulary."""

    def __init__(self, texts: Iterable[str]) -> None:
        all_texts = {text for text in texts if len(text) > 1}
        self._shaped = {
            text for text in all_texts if (match := _SHAPE.match(text)) and match[match.lastindex or 0] == text
        }
        others = sorted(all_texts - self._shaped, key=len, reverse=True)
        self._others = re.compile("|".join(map(re.escape, others))) if others else None

    @staticmethod
    def of_vocabulary(metadata: Mapping[str, Any]) -> "ControlTexts":
        """From a GGUF file's metadata."""
        tokens = metadata.get("tokenizer.ggml.tokens") or []
        types = metadata.get("tokenizer.ggml.token_type") or []
        return ControlTexts(
            text
            for text, kind in zip(tokens, types, strict=False)
            if kind in CONTROL_TYPES or (kind == _USER_DEFINED and _TURNS.fullmatch(text))
        )

    def neutral(self, value: Any) -> Any:
        """The same JSON value; every text in it, keys included, that spells a control token is broken up."""
        if isinstance(value, str):
            return self._neutral_text(value)
        if isinstance(value, list):
            return [self.neutral(item) for item in value]
        if isinstance(value, dict):
            return {self._neutral_text(name): self.neutral(item) for name, item in value.items()}
        return value

    def _neutral_text(self, text: str) -> str:
        if "<" in text or "[" in text:
            cuts = [m.start() + 1 for m in _SHAPE.finditer(text) if m[1] in self._shaped]
            if cuts:
                text = BREAK.join(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
        if self._others is not None:
            text = self._others.sub(lambda match: f"{match[0][0]}{BREAK}{match[0][1:]}", text)
        return text
