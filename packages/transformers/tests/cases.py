"""Small models made from a configuration, and rows for them: nothing is downloaded."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
    set_seed,
)

WORDS = 32
SIZES = {
    **{
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
    },
    **{"num_hidden_layers": 1, "num_attention_heads": 2},
}
SETTINGS = {
    **{
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
    },
    **{"use_cpu": True, "disable_tqdm": True},
}


def language_model():
    set_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def unnamed_language_model():
    """A model for which transformers has no loss type, and which shifts labels all the same."""
    set_seed(0)
    sizes = {"n_embd": 16, "n_positions": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, bos_token_id=1, eos_token_id=1, **sizes))


def aligned():
    """A causal model without a loss type whose loss compares each position with its own label."""
    set_seed(0)
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "d_head": 8}
    return XLNetLMHeadModel(XLNetConfig(vocab_size=WORDS, **sizes))


def classifier():
    set_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=5, hidden_dropout_prob=0.0))


def sentences(count=24):
    """Rows of eight words; up to four of the first labels do not count, so that micro-batches count differently."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(WORDS, (count, 8), generator=generator)
    silent = torch.randint(5, (count, 1), generator=generator)
    labels = rows.masked_fill(torch.arange(8) < silent, -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def topics(count=24):
    """Rows of eight words and the class of each."""
    return [
        {"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 5}
        for row in sentences(count)
    ]
