"""Fine-tune with LoRA on the backbone and SCE as the loss.

    python examples/peft_lora.py
    python examples/peft_lora.py --model HuggingFaceTB/SmolLM2-135M --steps 200

Without --model a small Qwen 3 with random weights stands in for a pretrained one. The text is the
standard library's documentation, so no download is needed. Only the adapters are saved.
"""

import argparse
import json

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Qwen3Config,
    Trainer,
    TrainingArguments,
)

from sce_lm import SCEConfig
from sce_lm.hf import SCECallback, apply_sce
from sce_lm.training.embedded.text import embedded_text

parser = argparse.ArgumentParser(description="Fine-tune with LoRA and SCE.")
parser.add_argument("--model", help="hub id or folder; a small random Qwen 3 without it")
parser.add_argument("--output_dir", default="runs/example_peft_lora")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=128, help="most tokens in a sequence")
args = parser.parse_args()

text = embedded_text(
    f"{args.output_dir}/data", packages=["stdlib"], max_bytes=600_000, vocab_size=8192
)
tokenizer = AutoTokenizer.from_pretrained(args.model or text.tokenizer)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokenized(path):
    """The beginning of each document; the collator pads them and ignores the padding."""
    with open(path) as lines:
        documents = [json.loads(line)["text"] for line in lines]
    ids = tokenizer(documents, truncation=True, max_length=args.length)["input_ids"]
    return Dataset.from_dict({"input_ids": ids})


if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    model = AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

# Before or after get_peft_model makes no difference. The head is frozen here, so the loss builds
# no gradient for its weight.
model = get_peft_model(
    model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
)
apply_sce(model, SCEConfig())
model.print_trainable_parameters()

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=5e-3 if args.model is None else 2e-4,
        logging_steps=5,
        save_steps=args.steps,
        report_to="none",
    ),
    train_dataset=tokenized(text.train),
    eval_dataset=tokenized(text.heldout),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[SCECallback()],  # keeps the objective's state beside each checkpoint
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
saved = f"{args.output_dir}/adapter"
trainer.save_model(saved)
print(f"held-out exact loss: {before:.3f} before, {after:.3f} after; saved in {saved}")
