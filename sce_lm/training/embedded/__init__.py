"""Default data that needs no download, read once from the packages installed on this machine.

Each function leaves a finished folder in the cache or none. With several processes, call it in one
and let the others wait.
"""

from sce_lm.training.embedded.api_calls import EmbeddedInteractions, embedded_interactions
from sce_lm.training.embedded.text import EmbeddedText, embedded_text

__all__ = ["EmbeddedInteractions", "EmbeddedText", "embedded_interactions", "embedded_text"]
