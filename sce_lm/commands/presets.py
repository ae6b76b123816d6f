"""Where a configuration starts: models from scratch on data that are on every machine."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "lm": {
        "task": "lm",
        "output_dir": "runs/lm",
        "model_config": {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        "data": "embedded",
        "sequence_length": 256,
        "objective": "sce",
        "max_steps": 1000,
        "per_device_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "eval_every": 200,
        "eval_batches": 8,
        "log_every": 10,
    },
    "items": {
        "task": "items",
        "output_dir": "runs/items",
        "model_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 50,
            "tie_word_embeddings": True,
        },
        "data": "embedded",
        "sequence_length": 50,
        "objective": "sce",
        "max_steps": 2000,
        "per_device_batch_size": 128,
        "learning_rate": 3e-3,
        "weight_decay": 0.0,
        "betas": [0.9, 0.98],
        "warmup_steps": 100,
        "eval_every": 500,
        "eval_users": 2000,
        "log_every": 20,
    },
}
"""Fields of a TrainConfig by task; the same as examples/configs/{lm,items}_embedded.yaml."""
