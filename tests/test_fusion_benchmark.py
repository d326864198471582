"""The opponents of benchmarks/windows.py and benchmarks/fusion.py compute what their tables say they compute."""

import pytest
import torch

from benchmarks import fusion, windows


@pytest.fixture(scope="module")
def points():
    g = torch.Generator().manual_seed(0)
    return torch.randn(600, 3, generator=g) * torch.tensor([12.0, 12.0, 1.0])


def test_rows_of_the_windows_tables(points):
    rows = windows.time_partition(points / 10, 0)
    assert [row["windows"] for row in rows] == ["cubic", "spherical"]
    for row in rows:
        assert 1 < row["number"] < row["tokens"] == 600
        assert row["unique / ours"] == pytest.approx(row["unique rows ms"] / row["ours ms"])
    rows = windows.time_attention(points / 10, 0, True)
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"] * 2
    assert all(row["difference"] < 1e-5 for row in rows)
    assert all(row["pairs"] >= row["tokens"] for row in rows)


def test_the_edge_list_is_the_formula():
    """Two tokens of one window, worked by hand for one head of width 1; see the attention's own test."""
    divided = windows.windows(
        torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0]]), torch.zeros(3).long(), (0.3,) * 3
    )
    tables = [torch.zeros(47, 3, 1, 1) for _ in range(3)]
    apart = int(divided.cells[0, 0] - divided.cells[1, 0])
    tables[0][23 + apart, 0], tables[1][23 - apart, 0], tables[2][23 + apart, 0] = 0.5, -1.0, 2.0
    q, k, v = (torch.tensor(x).reshape(3, 1, 1) for x in ([1.0, 1, 1], [0.0, 1, 1], [0.0, 10, 7]))
    parts = list(windows.edges(divided, 100))
    (out,) = windows.edge_list([q, k, v, *tables], divided, None, parts, None)
    assert out.flatten().tolist() == pytest.approx([9.810893, 7.310586, 7.0])


def test_parts_of_the_edge_list_hold_every_pair(points):
    divided = windows.windows(points, torch.zeros(600).long(), (4.0, 4.0, 4.0))
    for most in (1, 50, 10**6):
        pairs = torch.cat([torch.stack([i, j]) for _, _, j, i in windows.edges(divided, most)], 1)
        assert pairs.shape[1] == int((divided.sizes**2).sum())
        assert len(pairs.unique(dim=1).t()) == pairs.shape[1]


def test_routes_of_the_fusion_tables_agree(points, monkeypatch):
    views, places, seen = fusion.setting(points, 400)
    assert 200 < len(views.visible) < 400
    assert (seen.sum(0) > 1).any(), "some points are in two images"
    levels = [(c, h // 10, w // 10, n // 8) for c, h, w, n in fusion.LEVELS[:3]]
    monkeypatch.setattr(fusion, "LEVELS", levels)
    for row in (
        *fusion.time_gather(views, places, seen, 0),
        *fusion.time_scatter(views, places, seen, 0),
    ):
        assert row["difference"] < 1e-5
        assert row["forward ratio"] > 0
        assert row["both ratio"] > 0


def test_reading_everywhere_is_reading_point_by_point(points):
    _, places, seen = fusion.setting(points, 40)
    maps = torch.randn(6, 3, 5, 7)
    out = fusion.gather_everywhere(maps, places, seen)
    for point in range(40):
        wanted = torch.zeros(3)
        for camera in range(6):
            if seen[camera, point]:
                x, y = ((places[camera, point] + 1) / 2 * torch.tensor([6.0, 4.0])).tolist()
                i, j = min(int(y), 3), min(int(x), 5)
                a, b = y - i, x - j
                m = maps[camera]
                wanted = (1 - a) * ((1 - b) * m[:, i, j] + b * m[:, i, j + 1]) + a * (
                    (1 - b) * m[:, i + 1, j] + b * m[:, i + 1, j + 1]
                )
        torch.testing.assert_close(out[point], wanted, rtol=1e-4, atol=1e-4)
