"""Items as tokens: a stock Hugging Face tokenizer whose words are raw item ids.

Id 0 is padding, id 1 stands for an unknown item, and the catalogue follows from ``FIRST_ITEM`` on
in the order given. A catalogue that grows is therefore appended to
(:func:`~sce_lm.recsys.append_items`), and the rows of a trained model keep their meaning. There is
no beginning-of-sequence token: as in SASRec, the first item of a history is context only.

One item id is one word, spaces included, since nothing splits the text. ``tokenizer(ids,
is_split_into_words=True)`` encodes a history with its attention mask; ``convert_tokens_to_ids`` and
``convert_ids_to_tokens`` map lists of ids to tokens and back.

A tokenizer may carry how often each item occurs in the training data (:func:`count_items`), and is
saved and loaded with it.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sce_lm.recsys.ids import id_text

PAD = "[PAD]"
UNKNOWN = "[UNK]"
UNKNOWN_ITEM = 1
"""Token id of every item that the tokenizer does not know."""
FIRST_ITEM = 2
"""Token id of the catalogue's first item."""
_COUNTS = "item_counts"
"""Field of tokenizer_config.json: the counts of all items in order, in one line of text."""


def build_item_tokenizer(items: Iterable[object]) -> PreTrainedTokenizerFast:
    """A tokenizer over a catalogue; save and load it as any other.

    Args:
        items: distinct item ids of any type, taken as text (7.0 is "7"); item i becomes token
            ``FIRST_ITEM + i``.

    Returns:
        A tokenizer that pads on the right and knows ``input_ids`` and ``attention_mask`` as a
        model's inputs.

    Raises:
        ValueError: no items, an id given twice, a missing or empty id, or one that contains a
            special token.
    """
    names = []
    for item in items:
        name = id_text(item)
        if name is None or PAD in name or UNKNOWN in name:
            raise ValueError(
                f"Item id {item!r} cannot be a token: ids must not be empty and must not contain "
                f"the special tokens {PAD} and {UNKNOWN}; rename the item."
            )
        names.append(name)
    if not names:
        raise ValueError("An item tokenizer needs at least one item, but the catalogue is empty.")
    vocabulary = {PAD: 0, UNKNOWN: UNKNOWN_ITEM}
    vocabulary.update((name, FIRST_ITEM + index) for index, name in enumerate(names))
    if len(vocabulary) < FIRST_ITEM + len(names):
        raise ValueError(
            f"The catalogue names {len(names)} items but {len(vocabulary) - FIRST_ITEM} distinct "
            "ids; give each item once (ids are compared as text, so 1 and '1' are the same)."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN)),
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, items: Iterable[object]
) -> PreTrainedTokenizerFast:
    """A tokenizer that also knows new items; those it knew keep their tokens and counts.

    Raises:
        ValueError: an id that cannot be a token.
    """
    known = tokenizer.convert_ids_to_tokens(list(item_tokens(tokenizer)))
    extended = build_item_tokenizer(dict.fromkeys((*known, *(id_text(item) for item in items))))
    counts = item_counts(tokenizer)
    if counts is not None:
        _set_counts(extended, np.pad(counts, (0, len(item_tokens(extended)) - len(counts))))
    return extended


def is_item_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is one of :func:`build_item_tokenizer`."""
    return set(tokenizer.all_special_tokens) == {PAD, UNKNOWN}


def item_tokens(tokenizer: PreTrainedTokenizerBase) -> range:
    """Token ids of the catalogue, which is what evaluation ranks: everything after the special
    tokens."""
    return range(FIRST_ITEM, len(tokenizer))


def count_items(tokenizer: PreTrainedTokenizerBase, sequences: pl.DataFrame) -> None:
    """Note in the tokenizer how often each item occurs; it saves and loads the counts with itself.

    :func:`~sce_lm.recsys.recommend` falls back to them for users of whom it knows no item.

    Args:
        tokenizer: an item tokenizer; counts of before are replaced.
        sequences: frame with a column ``items`` of its tokens, such as ``split.train``.
    """
    items = item_tokens(tokenizer)
    tokens = sequences["items"].explode().drop_nulls().to_numpy()
    _set_counts(tokenizer, np.bincount(tokens, minlength=items.stop)[items.start :])


def item_counts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """int64 [items], how often each item occurs in the training data, as :func:`count_items` noted
    it; None if nobody did.

    Raises:
        ValueError: the counts are not those of the tokenizer's items.
    """
    text = tokenizer.init_kwargs.get(_COUNTS)
    if text is None:
        return None
    counts = str(text).split()
    if len(counts) != len(item_tokens(tokenizer)) or not all(map(str.isdecimal, counts)):
        raise ValueError(
            f"The tokenizer has {len(item_tokens(tokenizer))} items, and the {_COUNTS} saved with "
            f"it are not as many numbers; take {_COUNTS} out of tokenizer_config.json, or count "
            "anew by count_items."
        )
    return np.array(counts, dtype=np.int64)


def _set_counts(tokenizer: PreTrainedTokenizerBase, counts: np.ndarray) -> None:
    tokenizer.init_kwargs[_COUNTS] = " ".join(map(str, counts.tolist()))
