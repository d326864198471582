"""Point cloud operations with the names and signatures of Pointcept's CUDA extension of this name.

Scans of a batch lie one behind the other, and `offset` (b) holds where each ends. Searches return
int32 rows; a missing neighbour is row -1 and counts as zeros wherever rows are used.
"""

from .aggregation import aggregation
from .attention import attention_fusion_step, attention_relation_step
from .grouping import grouping, grouping2
from .interpolation import interpolation, interpolation2
from .query import ball_query, knn_query, random_ball_query
from .sampling import farthest_point_sampling
from .subtraction import subtraction
from .utils import (
    ball_query_and_group,
    batch2offset,
    knn_query_and_group,
    offset2batch,
    query_and_group,
)

__version__ = "1.0.0"
__all__ = [
    "aggregation",
    "attention_fusion_step",
    "attention_relation_step",
    "ball_query",
    "ball_query_and_group",
    "batch2offset",
    "farthest_point_sampling",
    "grouping",
    "grouping2",
    "interpolation",
    "interpolation2",
    "knn_query",
    "knn_query_and_group",
    "offset2batch",
    "query_and_group",
    "random_ball_query",
    "subtraction",
]
