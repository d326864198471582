"""The real key frame of nuScenes among the samples, as an info file that the reader takes."""

import pickle

import numpy as np


def write_real_info(samples, folder, split="val", sweeps=10):
    """What the samples' own file holds, by this format's names, below `folder`; the images stay where they are."""
    source = samples / "nuscenes"
    content = pickle.loads(next(source.glob("*.pkl")).read_bytes())
    frame = content["data_list"][0]
    scan = f"samples/LIDAR_TOP/{frame['lidar_points']['lidar_path']}"
    cams = {}
    for name, view in frame["images"].items():
        back = np.linalg.inv(view["lidar2cam"])
        cams[name] = {
            "data_path": f"samples/{name}/{view['img_path']}",
            "sensor2lidar_rotation": back[:3, :3],
            "sensor2lidar_translation": back[:3, 3],
            "camera_intrinsics": np.array(view["cam2img"]),
        }
    objects = frame["instances"]
    names = [*content["metainfo"]["categories"], "ignore"]
    boxes = np.array([[*o["bbox_3d"], *o["velocity"]] for o in objects])
    info = {
        "lidar_path": scan,
        "lidar_token": frame["token"],
        "sweeps": [],
        "cams": cams,
        "ref_from_car": np.linalg.inv(frame["lidar_points"]["lidar2ego"]),
        "car_from_global": np.linalg.inv(frame["ego2global"]),
        "gt_boxes": boxes,
        "gt_boxes_velocity": np.c_[boxes[:, 7:], np.zeros(len(boxes))],
        "gt_names": np.array([names[o["bbox_label_3d"]] for o in objects]),
        "num_lidar_pts": np.array([o["num_lidar_pts"] for o in objects]),
    }
    (folder / "info").mkdir()
    path = folder / "info" / f"nuscenes_infos_{sweeps}sweeps_{split}.pkl"
    path.write_bytes(pickle.dumps([info]))
    (folder / "raw").symlink_to(source)
