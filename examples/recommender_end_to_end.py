"""A recommender from a csv of raw ids to lists in production, in one file.

    python examples/recommender_end_to_end.py LOG.csv [--user U --item I --time T]
    python examples/recommender_end_to_end.py    # API calls of the standard library: functions are
                                                 # users, the names they call are items

Reads the log, holds out each user's last items, trains a SASRec with SCE, reports it beside
popularity, a Markov chain and item-kNN, saves and reloads it, writes lists for every user of the
log, and exports the items as vectors and as an index.
"""

import argparse
import importlib.util
from pathlib import Path

import polars as pl
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sce_lm import SCEConfig, apply_sce, recsys
from sce_lm.hf import remove_sce
from sce_lm.training.embedded.api_calls import embedded_interactions

LENGTH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description="A recommender from log to lists.")
    parser.add_argument("log", nargs="?", type=Path, help="csv of raw ids")
    parser.add_argument("--user", default="user_id")
    parser.add_argument("--item", default="item_id")
    parser.add_argument("--time", default="timestamp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/recommender_end_to_end"))
    options = parser.parse_args()
    output, columns = options.output, {"user": options.user, "item": options.item}
    output.mkdir(parents=True, exist_ok=True)
    if options.log is None:
        made = embedded_interactions(output / "data", packages=("stdlib",))
        options.log = output / "log.csv"
        pl.read_parquet(made.path).write_csv(options.log)
    set_seed(0)

    # 1. The log: ids become tokens, rare ones are left out, each user's last two items held out.
    log = recsys.read_interactions(options.log, **columns, time=options.time)
    events = recsys.filter_interactions(log, min_user_events=3, min_item_events=3)
    tokenizer = recsys.build_item_tokenizer(recsys.catalogue(events))
    split = recsys.leave_one_out(recsys.user_sequences(events, tokenizer))
    # What is popular, for users of whom nothing is known.
    recsys.count_items(tokenizer, split.train)
    items = recsys.item_tokens(tokenizer)

    # 2. The model: SASRec, trained by the ordinary Trainer with SCE in place of cross-entropy.
    config = recsys.SASRecConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = apply_sce(AutoModelForCausalLM.from_config(config), SCEConfig())
    training = TrainingArguments(
        str(output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    data, collator = recsys.training_dataset(split.train, LENGTH), DataCollatorForSeq2Seq(tokenizer)
    Trainer(model, training, train_dataset=data, data_collator=collator).train()

    # 3. The report: exact ranks over the whole catalogue, beside three baselines.
    questions = split.test["history"].to_list(), split.test["target"].to_list()
    past = split.before_test()
    scorers = {
        "popularity": recsys.popularity_scorer(past, items),
        "Markov chain": recsys.markov_scorer(past, items),
        "item-kNN": recsys.item_knn_scorer(past, items),
        "model": model,
    }
    for name, scorer in scorers.items():
        limit = LENGTH if scorer is model else None
        report = recsys.evaluate_items(scorer, *questions, items=items, max_length=limit)
        print(f"{name:<13} NDCG@10 {report['ndcg@10']:.4f}  HR@10 {report['hr@10']:.4f}")

    # 4. Save: a model and a tokenizer as of any other Hugging Face model.
    remove_sce(model).save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")

    # 5. Reload, and write the lists of all users of the log.
    model = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    histories = recsys.read_histories(options.log, **columns, time=options.time)
    counts = recsys.recommend_file(model, tokenizer, histories, output / "lists.parquet", k=10)
    print(f"lists of {counts['users']} users in {output / 'lists.parquet'}")

    # 6. Export the items: vectors whose inner products rank as the model does, and an index.
    card = recsys.export(model, tokenizer, output / "vectors", "parquet")
    print(f"{card['items']} vectors of {card['dimension']} numbers in {output / 'vectors'}")
    index = None
    if importlib.util.find_spec("faiss"):
        card = recsys.export(model, tokenizer, output / "index", "faiss")
        index = recsys.load_index(output / "index", tokenizer)
        print(f"the index finds {card['recall']:.0%} of {card['recall_of']}")
    history = histories["history"][0].to_list()
    found = recsys.recommend(model, tokenizer, [history], k=5, index=index)
    print(f"after {history[-5:]}: {found.items[0]}")


if __name__ == "__main__":
    main()
