"""Writes a Llama and a byte-level tokenizer as a GGUF file, laid out as llama.cpp lays them out."""

from pathlib import Path

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""A layer's tensors: their names in Transformers, and in a GGUF file."""

TOKENS = [*sorted(ByteLevel.alphabet()), "th"]
"""The vocabulary: a token for every byte, and one that is merged from two."""


def write_gguf(model: LlamaForCausalLM, file: Path, family: str = "llama") -> None:
    """Writes the model, whose vocabulary must be `TOKENS`, in fp32; its header says that it is of the `family`."""
    config = model.config
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(TOKENS))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for name, tensor in _tensors(model):
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: LlamaForCausalLM) -> list[tuple[str, torch.Tensor]]:
    weights = model.state_dict()
    found = [
        ("token_embd.weight", weights["model.embed_tokens.weight"]),
        ("output_norm.weight", weights["model.norm.weight"]),
        ("output.weight", weights["lm_head.weight"]),
    ]
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for name, short in _TENSORS.items():
            tensor = weights[f"model.layers.{layer}.{name}.weight"]
            if short in heads:  # rotary pairs are adjacent there, half a head apart here
                halves = tensor.unflatten(0, (heads[short], 2, -1))
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            found.append((f"blk.{layer}.{short}.weight", tensor))
    return found
