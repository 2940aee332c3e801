"""Hugging Face Trainer: one callback; the criterion is corrected inside of the model.

    python docs/examples/hf_trainer.py

Needs regrad-transformers, regrad-xgrad, regrad-powergrad and regrad-clipping. Takes
seconds, downloads nothing.
"""

import tempfile

import torch
from regrad_transformers import RegradCallback
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

set_seed(0)
sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=32, **sizes))
starts = torch.randint(64, (128, 1))
sentences = (starts + torch.arange(16)) % 64  # every word follows from the one before
rows = [{"input_ids": words, "labels": words} for words in sentences]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        num_train_epochs=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=6,
        save_steps=12,
    )
    callback = RegradCallback(["xgrad", "powergrad", "agc"])
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()

print(callback.attachment)
for name, value in callback.attachment.metrics().items():
    print(f"{name}: {value:.4g}")
logged = [log["step"] for log in trainer.state.log_history if "loss" in log]
print(f"the Trainer's history has these at steps {logged}")
