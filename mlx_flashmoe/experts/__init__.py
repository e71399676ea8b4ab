"""The experts of a model: on disk, in the arena, and as a layer."""

from mlx_flashmoe.experts.ahead import ReadAhead
from mlx_flashmoe.experts.arena import SlotArena
from mlx_flashmoe.experts.decode import Decode
from mlx_flashmoe.experts.store import ExpertStore
from mlx_flashmoe.experts.streamed import StreamedExperts, StreamedOutputs

__all__ = ["Decode", "ExpertStore", "ReadAhead", "SlotArena", "StreamedExperts", "StreamedOutputs"]
