"""What does it cost, how alike are maps?"""

from mapreuse.measure._latency import Latency, time_interleaved
from mapreuse.measure._machine import machine
from mapreuse.measure._similarity import Similarity, similarity

__all__ = ["Latency", "Similarity", "machine", "similarity", "time_interleaved"]
