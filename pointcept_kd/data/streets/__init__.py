"""What simulated streets are made of, and how LiDARs and cameras see them.

`street` lays a street out (`ground`, `plots`, `things`, `scenery`, made of `shapes`); `lidar` casts beams at it;
`colors` and `render` photograph it, for `cameras` (one beside the LiDAR, with `weak_masks`) and for `rig` (six as in
nuScenes, which `nuscenes_layout` writes). `pointcept_kd.data.synthetic` drives through it.
"""
