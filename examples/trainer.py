"""Train a causal language model with SCE through the Trainer of transformers.

    python examples/trainer.py
    python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M --steps 200

Without --model a small Llama starts from scratch. The text is the standard library's documentation,
so no download is needed. The loss that is trained is SCE; eval_loss is exact cross-entropy; the
saved folder is an ordinary model that loads where sce_lm is not installed.
"""

import argparse
import json

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from sce_lm import SCEConfig
from sce_lm.hf import SCECallback, apply_sce
from sce_lm.training.embedded.text import embedded_text

parser = argparse.ArgumentParser(description="Train a causal language model with SCE.")
parser.add_argument("--model", help="hub id or folder; a small Llama from scratch without it")
parser.add_argument("--output_dir", default="runs/example_trainer")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
args = parser.parse_args()

text = embedded_text(
    f"{args.output_dir}/data", packages=["stdlib"], max_bytes=600_000, vocab_size=8192
)
tokenizer = AutoTokenizer.from_pretrained(args.model or text.tokenizer)


def packed(path):
    """Documents one after another, cut into sequences of one length."""
    with open(path) as lines:
        documents = [json.loads(line)["text"] + tokenizer.eos_token for line in lines]
    ids = [token for one in tokenizer(documents)["input_ids"] for token in one]
    rows = [ids[i : i + args.length] for i in range(0, len(ids) - args.length + 1, args.length)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model)
else:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

apply_sce(model, SCEConfig())

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=3e-3 if args.model is None else 5e-5,
        logging_steps=5,
        save_steps=args.steps,
        report_to="none",
    ),
    train_dataset=packed(text.train),
    eval_dataset=packed(text.heldout),
    data_collator=default_data_collator,
    processing_class=tokenizer,
    callbacks=[SCECallback()],  # keeps the objective's state beside each checkpoint
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
saved = f"{args.output_dir}/final"
trainer.save_model(saved)
print(f"held-out exact loss: {before:.3f} before, {after:.3f} after; saved in {saved}")
