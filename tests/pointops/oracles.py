"""Plain loops over points and numbers, written from the descriptions, in float64."""

import math


def scan_of(row, ends):
    """Number of the scan that a row belongs to."""
    scan = 0
    while row >= ends[scan]:
        scan += 1
    return scan


def rows_of(scan, ends):
    """Rows of a scan."""
    return range(ends[scan - 1] if scan else 0, ends[scan])


def distance(a, b):
    """Euclidean distance of two points."""
    return math.sqrt(sum((float(u) - float(v)) ** 2 for u, v in zip(a, b)))


def by_distance(row, query, query_ends, support, ends):
    """(distance, row) of every support of the scan of query number `row`, sorted."""
    scan = scan_of(row, query_ends)
    return sorted((distance(query[row], support[i]), i) for i in rows_of(scan, ends))


def knn(k, support, ends, query, query_ends):
    """Rows and distances of the nearest k; missing ones -1 and 1e5."""
    idx, dist = [], []
    for row in range(len(query)):
        found = by_distance(row, query, query_ends, support, ends)[:k]
        found += [(1e5, -1)] * (k - len(found))
        idx.append([i for _, i in found])
        dist.append([d for d, _ in found])
    return idx, dist


def shell(row, low, high, query, query_ends, support, ends):
    """Candidates of a ball query, nearest first."""
    every = by_distance(row, query, query_ends, support, ends)
    return [(d, i) for d, i in every if d * d <= 1e-5 or low <= d < high]


def farthest(points, ends, new_ends):
    """Samples of every scan, the lowest row among equals."""
    picks = []
    for scan in range(len(ends)):
        rows = list(rows_of(scan, ends))
        taken = []
        for _ in rows_of(scan, new_ends):
            if not taken:
                taken.append(rows[0])
                continue
            reach = [min(distance(points[i], points[j]) for j in taken) for i in rows]
            taken.append(rows[reach.index(max(reach))])
        picks += taken
    return picks
