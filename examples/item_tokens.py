"""A recommender whose tokens are items: from an interaction log to lists for users.

    python examples/item_tokens.py LOG.parquet [--user user_id --item item_id --time timestamp]
    python examples/item_tokens.py                # API calls of the standard library: functions
                                                  # are users, the names they call are items

Reads the log, builds a tokenizer whose words are item ids, holds out each user's last items, trains
a small Llama on the sequences with SCE, and ranks the whole catalogue for the held-out items.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sce_lm import SCEConfig, apply_sce, recsys
from sce_lm.hf import SCECallback, remove_sce
from sce_lm.training.embedded.api_calls import embedded_interactions

LENGTH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description="A recommender whose tokens are items.")
    parser.add_argument("log", nargs="?", type=Path, help="csv, parquet or JSON lines")
    parser.add_argument("--user", default="user_id")
    parser.add_argument("--item", default="item_id")
    parser.add_argument("--time", default="timestamp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("runs/item_tokens"))
    options = parser.parse_args()
    if options.log is None:
        options.log = embedded_interactions(options.output / "data", packages=("stdlib",)).path
    set_seed(0)

    # Data: item ids become tokens, users become sequences of tokens.
    log = recsys.read_interactions(
        options.log, user=options.user, item=options.item, time=options.time
    )
    tokenizer = recsys.build_item_tokenizer(recsys.catalogue(log))
    sequences = recsys.user_sequences(log, tokenizer)
    print(json.dumps(recsys.statistics(sequences)))
    split = recsys.leave_one_out(sequences)

    # Model: any causal language model, its vocabulary the catalogue.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    model = apply_sce(AutoModelForCausalLM.from_config(config), SCEConfig())
    trainer = Trainer(
        model,
        TrainingArguments(
            str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=recsys.training_dataset(split.train, LENGTH),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[SCECallback()],
    )
    trainer.train()

    # Evaluation: the whole catalogue, seen items masked.
    report = recsys.evaluate_items(
        model,
        split.test["history"].to_list()[:2000],
        split.test["target"].to_list()[:2000],
        items=recsys.item_tokens(tokenizer),
        max_length=LENGTH,
    )
    print(json.dumps(report, indent=2))

    # What is saved is a stock model and tokenizer, which need no sce_lm.
    remove_sce(model).save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")
    model = AutoModelForCausalLM.from_pretrained(options.output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(options.output / "model")

    # Lists for raw histories, of new users too.
    history = tokenizer.convert_ids_to_tokens(split.test["history"].to_list()[0])
    found = recsys.recommend(model, tokenizer, [history], k=5, max_length=LENGTH)
    print(f"after {history[-5:]}: {found.items[0]}")


if __name__ == "__main__":
    main()
