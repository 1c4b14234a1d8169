"""Small Hugging Face models with random weights: `python hf_models.py FOLDER`, in .venv-models.

Real configuration classes, a sentencepiece vocabulary trained on a few sentences, a ChatML template.
"""

import json
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch  # type: ignore[import-not-found]  # in .venv-models
import transformers

TOKENS = 400
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}


def vocabulary(folder: Path) -> None:
    """tokenizer.model and its configuration."""
    text = folder / "text.txt"
    sentences = (f"Sentence {n} of the random model says {n * 7919 % 1000} different things." for n in range(400))
    text.write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=TOKENS,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        pad_id=3,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    configuration = {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))


def main(target: Path) -> None:
    torch.manual_seed(1)
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
        "gemma3": transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**SIZES, sliding_window=64, query_pre_attn_scalar=64)
        ),
        "qwen3": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    }
    for name, model in models.items():
        folder = target / name
        model.to(torch.bfloat16).save_pretrained(folder)
        vocabulary(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
