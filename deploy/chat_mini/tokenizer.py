"""The byte-level BPE tokenizer, trained on the corpus; llama.cpp knows its pre-tokenizer as "gpt-2"."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import (  # type: ignore[import-not-found]  # an extra, not in the services' environment
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)

END_OF_TEXT = "<|endoftext|>"
MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, MESSAGE_START, MESSAGE_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ 'system' if message['role'] == 'developer' else message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file stores of the tokenizer: the tokens in order of their ids, and the merges in order of rank."""

    tokens: list[str]
    merges: list[str]


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A BPE tokenizer of exactly `vocabulary_size` tokens, the three control tokens first.

    Raises ValueError when the texts are too small for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary_size:
        raise ValueError(f"the corpus yields {tokenizer.get_vocab_size()} tokens, not {vocabulary_size}")
    return tokenizer


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tables of a trained tokenizer, as GGUF stores them."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    ids: dict[str, int] = model["vocab"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(tokens=sorted(ids, key=lambda token: ids[token]), merges=merges)
