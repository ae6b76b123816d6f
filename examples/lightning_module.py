"""Train a causal language model with SCE through Lightning.

    pip install lightning
    python examples/lightning_module.py [--steps 20]

A small Llama from scratch on the standard library's documentation. What is trained is SCE; the
validation loss is exact cross-entropy. Lightning's checkpoints hold the objective's state too.
"""

import argparse
import json

import lightning  # pyright: ignore[reportMissingImports]
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sce_lm import SCEConfig, apply_sce
from sce_lm.objectives import SCE
from sce_lm.training.embedded.text import embedded_text


class LanguageModel(lightning.LightningModule):
    """Any model of transformers; only the line with `apply_sce` is ours."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.save_hyperparameters()
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        self.objective = SCE(SCEConfig())
        self.model = apply_sce(LlamaForCausalLM(config), self.objective)

    def training_step(self, batch, index):
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        (ids,) = batch
        loss = self.model(input_ids=ids, labels=ids).loss  # exact: the model is in eval mode
        self.log("held_out", loss, prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["sce_state"] = self.objective.state.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.objective.state.load_state_dict(checkpoint["sce_state"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a causal language model with SCE.")
    parser.add_argument("--output_dir", default="runs/example_lightning")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    arguments = parser.parse_args()

    text = embedded_text(
        f"{arguments.output_dir}/data", packages=["stdlib"], max_bytes=600_000, vocab_size=8192
    )
    tokenizer = AutoTokenizer.from_pretrained(text.tokenizer)

    def batches(path, shuffle):
        """Documents one after another, cut into sequences of one length."""
        with open(path) as lines:
            documents = [json.loads(line)["text"] + tokenizer.eos_token for line in lines]
        ids = torch.tensor([i for one in tokenizer(documents)["input_ids"] for i in one])
        rows = ids[: len(ids) // arguments.length * arguments.length].view(-1, arguments.length)
        return DataLoader(TensorDataset(rows), batch_size=8, shuffle=shuffle)

    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_steps=arguments.steps, default_root_dir=arguments.output_dir, logger=False
    )
    module = LanguageModel(len(tokenizer))
    held_out = batches(text.heldout, shuffle=False)
    before = trainer.validate(module, held_out, verbose=False)[0]["held_out"]
    trainer.fit(module, batches(text.train, shuffle=True))
    after = trainer.validate(module, held_out, verbose=False)[0]["held_out"]
    saved = f"{arguments.output_dir}/final"
    module.model.save_pretrained(saved)  # a stock model
    print(f"held-out exact loss: {before:.3f} before, {after:.3f} after; saved in {saved}")


if __name__ == "__main__":
    main()
