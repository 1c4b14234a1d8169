"""The shape of the network, in the terms of the GGUF metadata keys of the `llama` architecture."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A Llama-style decoder with tied embeddings. Every row length is a multiple of 256, as K-quants need."""

    vocabulary_size: int = 2048
    embedding_length: int = 256
    feed_forward_length: int = 768
    block_count: int = 4
    head_count: int = 4
    head_count_kv: int = 2
    context_length: int = 1024
    rope_freq_base: float = 10_000.0
    rms_norm_epsilon: float = 1e-5

    @property
    def head_length(self) -> int:
        """Dimensions of one attention head."""
        return self.embedding_length // self.head_count

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight under its GGUF name, as (rows, row length); the output projection is the embedding."""
        width, inner = self.embedding_length, self.feed_forward_length
        kv_width = self.head_length * self.head_count_kv
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocabulary_size, width),
            "output_norm.weight": (width,),
        }
        for block in range(self.block_count):
            prefix = f"blk.{block}."
            shapes[prefix + "attn_norm.weight"] = (width,)
            shapes[prefix + "attn_q.weight"] = (width, width)
            shapes[prefix + "attn_k.weight"] = (kv_width, width)
            shapes[prefix + "attn_v.weight"] = (kv_width, width)
            shapes[prefix + "attn_output.weight"] = (width, width)
            shapes[prefix + "ffn_norm.weight"] = (width,)
            shapes[prefix + "ffn_gate.weight"] = (inner, width)
            shapes[prefix + "ffn_up.weight"] = (inner, width)
            shapes[prefix + "ffn_down.weight"] = (width, inner)
        return shapes

    def parameter_count(self) -> int:
        """Number of weights."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total
