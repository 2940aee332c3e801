"""Every class of some tasks of the installed transformers, made from a small configuration, and a batch for it."""

import re

import torch
import transformers
from transformers import PreTrainedConfig, set_seed
from transformers.models.auto import modeling_auto

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}
WORDS, WIDTH, ROWS, LENGTH, CLASSES = 64, 32, 2, 8, 3
END = 1  # every special token: the last of a row, and what padding would be
LARGEST = 5_000_000  # parameters: more means that the configuration did not become small

# The first pattern that a setting's whole name fits gives its small value.
SIZES = (
    (r"\w*vocab_size\w*|vocabulary_size", WORDS),
    (r"\w*(head_dim|head_size|d_head)|d_kv", WIDTH // 4),
    (r"\w*heads?(_kv)?", 4),
    (r"\w*(num_hidden_layers|num_layers|n_layers?|num_blocks)|(en|de)coder_layers", 2),
    (r"hidden_size|d_model|n_embd|dim|emb_dim|embedding_size|embed_dim|\w*hidden_dim", WIDTH),
    (r"\w*intermediate_size|\w*ffn_dim|d_ff|ffn_hidden_size|n_inner|dim_ff", WIDTH),
    (r"(num|n)(_\w+)?_experts|num_local_experts", 4),
    (r"num_experts_per_tok|top_k_experts|moe_topk", 2),
    (r"n_group|topk_group", 1),
    (r"rotary_dim|attention_window|coordinate_size", 4),
    (r"shape_size", 8),
    (r"(pad|bos|eos|sep|cls|mask|decoder_start)_token_id", END),
    (r"max_position_embeddings|n_positions|max_seq_len\w*|\w*max_\w*positions?\w*", WORDS),
)
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "vocab_size")
OTHERS = {
    "axial_pos_embds_dim": (8, 24),  # Reformer
    "axial_pos_shape": (2, 4),
    "attention_types": [[["global", "local"], 1]],  # GPT-Neo
    "default_language": "en_XX",  # X-MOD
}


def class_names(task):
    """Return the names of a task's classes."""
    listed = ((names,) if isinstance(names, str) else names for names in TASKS[task].values())
    return sorted({name for names in listed for name in names})


def small_config(kind):
    """Return a small configuration of a class, those inside it too."""
    default = kind()
    values = default.to_dict()
    small = {}
    for name, value in values.items():
        size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        is_missing = value is None and (name.endswith("token_id") or name in NEEDED)
        if size is not None and (is_number or is_missing):
            small[name] = size
        if name in LAYER_KINDS and isinstance(value, list):
            small[name] = [value[0], next((v for v in value if v != value[0]), value[0])]
    small.update({name: value for name, value in OTHERS.items() if name in values})
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            small[name] = small_config(type(inner)).to_dict()
    return kind(**small)


def small_model(name):
    """Return a small model of a class, the same at every call.

    Raises:
        ValueError: If the configuration does not become small.
    """
    kind = getattr(transformers, name)
    config = small_config(kind.config_class)
    config.num_labels = 2 if "QuestionAnswering" in name else CLASSES
    if name.endswith("WithLMHead") or "CausalLM" in name:
        config.is_decoder = True
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = END
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(config).parameters())
    if count > LARGEST:
        raise ValueError(f"the smallest has {count:,} parameters")
    set_seed(0)
    return kind(config)


def small_batch(task):
    """Return a batch for a task: rows of tokens that end alike, and labels."""
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, CLASSES, LENGTH) if task == "choice" else (ROWS, LENGTH)
    tokens = torch.randint(5, WORDS, shape, generator=generator)
    tokens[..., -1] = END
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task == "question":
        places = {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 5])}
        return {**batch, **places}
    if task in {"sequence", "choice"}:
        labels = torch.tensor([0, 2])
    elif task == "token":
        labels = tokens % CLASSES
    else:
        labels = tokens.masked_fill(torch.arange(LENGTH) < torch.tensor([[1], [3]]), -100)
    return {**batch, "labels": labels}
