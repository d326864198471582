"""Prepare and check data.

python tools/prepare_data.py simulate --out data/sim --preset demo
python tools/prepare_data.py check --data-root data/sim
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

if importlib.util.find_spec("pointcept_kd") is None:  # not installed: run from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from pointcept_kd.host import InputError


def add_simulate(commands: argparse._SubParsersAction) -> None:
    """Options of `simulate`."""
    parser = commands.add_parser(
        "simulate",
        help="simulated streets in SemanticKITTI's or nuScenes' layout",
        description="Ray-cast LiDAR drives through procedural streets.\n\n"
        "--layout kitti writes OUT/dataset/sequences/SS/{velodyne,labels,calib.txt,poses.txt,times.txt}; with\n"
        "--cameras kitti also {image_2,weak_labels,superpixels}/NNNNNN.png. --layout nuscenes writes OUT/raw: tables\n"
        "(v1.0-sim), LiDAR of 32 beams, six cameras, lidarseg, boxes, weak labels (camseg), superpixels.\n\n"
        "Sequences 08 (validation) and 11-21 (test) are laid out differently from the others. Complete files are\n"
        "kept, so an interrupted run goes on where it stopped, and --cameras kitti can be added to a folder of scans.",
        epilog="examples:\n"
        "  python tools/prepare_data.py simulate --out data/sim --preset demo\n"
        "  python tools/prepare_data.py simulate --out data/sim --preset demo --cameras kitti\n"
        "  python tools/prepare_data.py simulate --out data/sim_hard --difficulty hard --sequences 00,08 --scans 10\n"
        "  python tools/prepare_data.py simulate --out data/sim_nus --layout nuscenes --image-width 800\n"
        "  python tools/prepare_data.py nuscenes-info --data-root data/sim_nus/raw --version v1.0-sim \\\n"
        "      --with-camera --out data/sim_nus",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--layout", default="kitti", choices=("kitti", "nuscenes"), help="default: kitti"
    )
    parser.add_argument(
        "--preset",
        default="demo",
        help="kitti: demo is 32 beams x 512 columns, sequences 00-05 and 08, 144 scans (default), standard "
        "64 x 2048, 00-07, 09, 10 and 08, 1650 scans. nuscenes: demo is 5 scenes of 6 key frames, 32 x 512, "
        "standard 11 scenes of 40, 32 x 1090",
    )
    parser.add_argument("--sequences", help="comma-separated, such as 00,01,08; scenes of nuscenes")
    parser.add_argument("--scans", type=int, help="scans of each sequence; key frames of a scene")
    parser.add_argument("--beams", type=int, help="64 like an HDL-64E, 32, or another number")
    parser.add_argument("--columns", type=int, help="azimuth steps of a turn")
    parser.add_argument("--spacing", type=float, help="metres between scans or key frames")
    parser.add_argument("--max-range", type=float, help="metres (default 50)")
    parser.add_argument("--seed", type=int, help="another seed is another town (default 0)")
    parser.add_argument(
        "--difficulty",
        help="easy: little noise, half of the parking places empty; normal (default); hard: more noise and "
        "dropout, rain, ghosts behind glass, crowded pavements",
    )
    parser.add_argument(
        "--cameras",
        choices=("none", "kitti"),
        help="kitti: camera 2 with weak labels and superpixels (default: none; nuscenes has its six)",
    )
    parser.add_argument(
        "--image-width", type=int, help="pixels (default: 621; nuscenes: 400, standard 800)"
    )
    parser.add_argument(
        "--superpixels", type=int, help="the most segments of an image (default 150)"
    )
    parser.add_argument(
        "--confusion",
        type=float,
        help="share of things and regions that weak labels give a similar class (default 0.08)",
    )
    parser.add_argument(
        "--sweeps",
        type=int,
        help="nuscenes: turns per key frame, 10 is 20 Hz (default: 4, standard 10)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.set_defaults(run=simulate)


def simulate(args: argparse.Namespace) -> int:
    """Write simulated drives and say how fast it went and what is in them."""
    from pointcept_kd.data import synthetic
    from pointcept_kd.data.streets import cameras as photos
    from pointcept_kd.data.streets import nuscenes_layout

    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers: {args.workers}; use 1 or more")
    rig = args.layout == "nuscenes"
    plan = synthetic.plan_from(
        args.preset,
        args.sequences.split(",") if args.sequences is not None else None,
        args.scans,
        nuscenes_layout.PRESETS if rig else synthetic.PRESETS,
        beams=args.beams,
        columns=args.columns,
        spacing=args.spacing,
        max_range=args.max_range,
        seed=args.seed,
        difficulty=args.difficulty,
    )
    note = {"preset": args.preset, "command": shlex.join(["python", *sys.argv])}
    images = {
        "width": args.image_width,
        "segments": args.superpixels,
        "confusion": args.confusion,
    }
    images = {key: value for key, value in images.items() if value is not None}
    if rig:
        if args.cameras is not None:
            raise InputError("--cameras belongs to --layout kitti; nuscenes always has its six")
        settings = {
            "sweeps": nuscenes_layout.SWEEPS[args.preset],
            "width": nuscenes_layout.WIDTHS[args.preset],
        } | images
        if args.sweeps is not None:
            settings["sweeps"] = args.sweeps
        return simulate_rig(args, plan, nuscenes_layout.RigPlan(**settings), note)
    if args.sweeps is not None:
        raise InputError("--sweeps belongs to --layout nuscenes; with kitti every scan is a turn")
    if images and args.cameras != "kitti":
        option = {"width": "--image-width", "segments": "--superpixels"}
        first = next(iter(images))
        raise InputError(f"{option.get(first, '--' + first)} needs --cameras kitti")
    cameras = photos.CameraPlan(**images)
    cameras.check()
    report = synthetic.simulate(args.out, plan, args.workers, note)
    if report.written:
        print(
            f"{report.written} scans, {report.points / 1e6:.2f} M points in {report.seconds:.1f} s"
            f" ({report.written / report.seconds:.1f} scans/s,"
            f" {report.points / report.seconds / 1e6:.2f} M points/s)"
            + (f"; {report.kept} kept" if report.kept else "")
        )
    else:
        print(f"nothing to do: all {report.kept} scans are there")
    print("share of points: " + class_line(report.shares))
    if args.cameras == "kitti":
        made = photos.simulate_cameras(args.out, plan, cameras, args.workers)
        print(
            f"{made.written} images of {cameras.width} x {cameras.height} in {made.seconds:.1f} s"
            f" ({made.written / made.seconds:.2f} images/s); {made.kept} kept"
        )
    return 0


def simulate_rig(args: argparse.Namespace, plan, rig, note: dict) -> int:
    """Write scenes in nuScenes' layout and say what to do next."""
    from pointcept_kd.data.streets.nuscenes_layout import VERSION, simulate_nuscenes

    report = simulate_nuscenes(args.out, plan, rig, args.workers, note)
    print(
        f"{report.written} key frames with {report.images} images of {rig.width} x {rig.height} in"
        f" {report.seconds:.1f} s ({report.images / report.seconds:.2f} images/s); {report.kept} kept"
    )
    shares = ", ".join(f"{name} {100 * share:.2f} %" for name, share in report.shares.items())
    print(f"share of points: {shares}")
    print(
        f"next: python tools/prepare_data.py nuscenes-info --data-root {args.out}/raw"
        f" --version {VERSION} --with-camera --out {args.out}"
    )
    return 0


def add_preview(commands: argparse._SubParsersAction) -> None:
    """Options of `preview`."""
    parser = commands.add_parser(
        "preview",
        help="a picture of a scan and its cameras",
        description="Draw a scan from above coloured by class, its camera images, the points of the LiDAR on them "
        "coloured by depth, and weak labels and superpixels where there are any. For SemanticKITTI with image_2, "
        "nuScenes with info files, and KITTI detection.",
        epilog="example: python tools/prepare_data.py preview --data-root data/sim --scan 08_000003 "
        "--out scan.png",
    )
    parser.add_argument("--data-root", required=True, type=Path, help="what a config names so")
    parser.add_argument(
        "--scan", help="SS_NNNNNN, NNNNNN, or a token or its beginning (default: the first scan)"
    )
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    parser.add_argument("--width", type=int, default=1600, help="the most pixels (default 1600)")
    parser.add_argument(
        "--half", type=float, default=25.0, help="half the side seen from above, m (default 25)"
    )
    parser.add_argument(
        "--panels", type=int, default=4, choices=(1, 2, 3, 4), help="1 leaves out all but the images, "
        "2 adds points, 3 weak labels, 4 superpixels (default)",
    )  # fmt: skip
    parser.set_defaults(run=preview)


def preview(args: argparse.Namespace) -> int:
    """Draw a scan."""
    from pointcept_kd.data.preview import write_preview

    shot = write_preview(args.data_root, args.out, args.scan, args.width, args.half, args.panels)
    print(f"{args.out}: {shot.name}, {len(shot.coord)} points, {len(shot.cameras)} cameras")
    return 0


def class_line(shares: dict[int, float]) -> str:
    """Shares of the raw class ids as shares of the 19 classes, in one line."""
    from pointcept_kd.data.semantic_kitti import CLASS_NAMES, LEARNING_MAP

    totals = dict.fromkeys(range(-1, len(CLASS_NAMES)), 0.0)
    for raw, share in shares.items():
        totals[LEARNING_MAP[raw]] += share
    names = {-1: "ignored", **dict(enumerate(CLASS_NAMES))}
    return ", ".join(f"{names[i]} {100 * totals[i]:.2f} %" for i in (*range(len(CLASS_NAMES)), -1))


def add_check(commands: argparse._SubParsersAction) -> None:
    """Options of `check`."""
    parser = commands.add_parser(
        "check",
        help="read all of a data set and report what is wrong",
        description="Read every file of a data set (SemanticKITTI, nuScenes, Waymo, or folders of .npy) and print a "
        "line for each that is broken: what is wrong, what was expected, what to do. Lines that begin with hint are "
        "worth a look; the data can be used. Exit code 1 if there are problems.",
        epilog="example: python tools/prepare_data.py check --data-root data/semantic_kitti",
    )
    parser.add_argument("--data-root", required=True, type=Path, help="what a config names so")
    parser.add_argument(
        "--kind",
        default="auto",
        choices=("auto", "semantic_kitti", "nuscenes", "waymo", "folders"),
        help="the layout (default: seen from the folders)",
    )
    parser.add_argument("--workers", type=int, help="threads that read (default: one per core)")
    parser.add_argument(
        "--num-classes", type=int, help="folders of .npy: labels from 0 to this, exclusive"
    )
    parser.add_argument(
        "--ignore-index",
        type=int,
        default=-1,
        help="folders of .npy: label of points without one (default -1)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the list there")
    parser.set_defaults(run=check)


def check(args: argparse.Namespace) -> int:
    """Report the problems of a data set."""
    from pointcept_kd.data import check as checks

    with tqdm(unit="file", desc="check") as bar:

        def passing():
            for entry in checks.check(
                args.data_root, args.kind, args.workers, args.num_classes, args.ignore_index
            ):
                bar.update()
                yield entry

        scans, found = checks.survey(
            passing(), lambda line: bar.write(f"hint: {line}" if line.hint else line)
        )
    if args.json is not None:
        checks.write_report(args.json, scans, found)
    print(checks.summary(scans, found))
    return 0 if all(entry["hint"] for entry in found) else 1


def add_nuscenes_info(commands: argparse._SubParsersAction) -> None:
    """Options of `nuscenes-info`."""
    parser = commands.add_parser(
        "nuscenes-info",
        help="info files of nuScenes from its tables",
        description="Join nuScenes' JSON tables into OUT/info/nuscenes_infos_{SWEEPS}sweeps_{split}.pkl, "
        "as readers expect them, and link OUT/raw to the data where it is missing. v1.0-mini gives "
        "train and val of the mini splits. A version of your own is all train, unless a "
        "splits.json beside its tables maps train, val, test to lists of scene names.",
        epilog="example: python tools/prepare_data.py nuscenes-info --data-root /data/nuscenes "
        "--version v1.0-trainval --with-camera --out data/nuscenes",
    )
    parser.add_argument(
        "--data-root", required=True, type=Path, help="holds samples, sweeps, v1.0-*, lidarseg"
    )
    parser.add_argument(
        "--version",
        required=True,
        help="v1.0-trainval, v1.0-mini, v1.0-test, or your own such as v1.0-sim",
    )
    parser.add_argument(
        "--sweeps", type=int, default=10, help="key frame and the scans before it (default 10)"
    )
    parser.add_argument("--with-camera", action="store_true", help="add the six cameras")
    parser.add_argument("--out", required=True, type=Path, help="the data_root of your configs")
    parser.set_defaults(run=nuscenes_info)


def nuscenes_info(args: argparse.Namespace) -> int:
    """Write info files and say how many key frames are in them."""
    from pointcept_kd.data.nuscenes_info import write_infos

    report = write_infos(args.data_root, args.version, args.out, args.sweeps, args.with_camera)
    for path, entries in report.files.items():
        print(f"{path}: {entries} key frames")
    for note in report.notes:
        print(f"note: {note}")
    return 0


def add_waymo(commands: argparse._SubParsersAction) -> None:
    """Options of `waymo`."""
    parser = commands.add_parser(
        "waymo",
        help="Waymo segments (*.tfrecord) to folders of arrays",
        description="Read the official segments of the perception data set v1.x and write "
        "OUT/SPLIT/SEGMENT/TIMESTAMP/{coord,strength,segment,pose}.npy, which WaymoDataset reads. Needs no "
        "TensorFlow. Complete frames are kept, so an interrupted run goes on where it stopped; a damaged file is "
        "reported and does not stop the others (exit code 2).",
        epilog="example: python tools/prepare_data.py waymo --raw waymo/training --out data/waymo "
        "--split training --labelled-only",
    )
    parser.add_argument(
        "--raw",
        required=True,
        type=Path,
        help="folder of *.tfrecord, or one above SPLIT/*.tfrecord",
    )
    parser.add_argument("--out", required=True, type=Path, help="data_root to write to")
    parser.add_argument("--split", required=True, help="training, validation or testing")
    parser.add_argument("--shard", help="i/n, i from 1 to n: only this part of the files")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--labelled-only", action="store_true", help="only frames with segmentation labels"
    )
    parser.add_argument(
        "--frames", type=Path, help="only frames listed in this file, lines of context,timestamp"
    )
    parser.set_defaults(run=waymo)


def waymo(args: argparse.Namespace) -> int:
    """Convert segments; say how many frames, how fast, and which files are damaged."""
    from pointcept_kd.data import waymo_convert
    from pointcept_kd.data.workers import usable_cores

    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers: {args.workers}; use 1 or more")
    listed = waymo_convert.read_frame_list(args.frames) if args.frames is not None else None
    report = waymo_convert.convert(
        args.raw,
        args.out,
        waymo_convert.Plan(args.split, args.labelled_only, listed),
        args.shard,
        args.workers or usable_cores(),
        tell=lambda line: print(f"error: {line}", file=sys.stderr),
    )
    print(
        f"{report.files} files: {report.written} frames written, {report.kept} kept, "
        f"{report.points / 1e6:.2f} M points in {report.seconds:.1f} s; "
        f"{len(report.problems) or 'no'} files with problems"
    )
    return 2 if report.problems else 0


def add_maps(commands: argparse._SubParsersAction) -> None:
    """Options of `maps`."""
    parser = commands.add_parser(
        "maps",
        help="ground-truth maps for scene completion, from labelled drives",
        description="Join the static points of every labelled drive in SemanticKITTI's layout, one point per cell,\n"
        "and write OUT/dataset/sequences/SS/map_tiles, which CompletionDataset reads.\n\n"
        "Finished maps are kept and stale ones made anew, so an interrupted run goes on with the sequence where it\n"
        "stopped. A sequence with a damaged file is reported and does not stop the others (exit code 2).",
        epilog="examples:\n"
        "  python tools/prepare_data.py maps --data-root data/semantic_kitti\n"
        "  python tools/prepare_data.py maps --data-root data/semantic_kitti --shard 1/4 --workers 2\n"
        "  python tools/prepare_data.py maps --data-root data/semantic_kitti --from-plain",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", required=True, type=Path, help="holds dataset/sequences/SS")
    parser.add_argument(
        "--out", type=Path, help="data root to write the maps to (default: beside the scans)"
    )
    parser.add_argument(
        "--sequences", help="comma-separated, such as 00,08 (default: all with labels)"
    )
    parser.add_argument("--shard", help="i/n, i from 1 to n: only this part of the sequences")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--cell", type=float, default=0.1, help="metres (default 0.1)")
    parser.add_argument(
        "--near", type=float, default=3.5, help="metres around the sensor left out (default 3.5)"
    )
    parser.add_argument("--labels", action="store_true", help="also store the class of each point")
    parser.add_argument(
        "--incomplete", action="store_true", help="allow fewer scans than poses, as in an excerpt"
    )
    parser.add_argument(
        "--nonfinite",
        default="error",
        choices=("error", "drop"),
        help="such points (default: error)",
    )
    parser.add_argument(
        "--from-plain",
        action="store_true",
        help="do not build; put the map_clean.npy of each sequence into tiles, which are read faster",
    )
    parser.set_defaults(run=maps)


def maps(args: argparse.Namespace) -> int:
    """Build maps; say how many, how fast, and which sequences cannot be used."""
    from pointcept_kd.data import maps as building

    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers: {args.workers}; use 1 or more")
    report = building.build_maps(
        args.data_root,
        args.out,
        building.Plan(
            cell=args.cell,
            near=args.near,
            labels=args.labels,
            incomplete=args.incomplete,
            nonfinite=args.nonfinite,
            source="plain" if args.from_plain else "scans",
        ),
        args.sequences.split(",") if args.sequences is not None else None,
        args.shard,
        args.workers,
        tell=lambda line: print(f"error: {line}", file=sys.stderr),
    )
    print(
        f"{report.built} maps built from {report.scans} scans ({report.read / 1e6:.2f} M points), {report.kept} kept, "
        f"{report.points / 1e6:.2f} M points in them, {report.seconds:.1f} s; "
        f"{len(report.problems) or 'no'} sequence{'s' if len(report.problems) != 1 else ''} with problems"
    )
    return 2 if report.problems else 0


def add_image_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Options of commands that write a PNG for every camera image."""
    parser.add_argument("--data-root", required=True, type=Path, help="what a config names so")
    parser.add_argument(
        "--layout",
        choices=("kitti", "kitti_object", "nuscenes"),
        help="default: seen from the folders",
    )
    parser.add_argument(
        "--parts",
        help="comma-separated: sequences such as 00,08; train,val,test (nuscenes); training,testing (kitti_object); "
        "default: all with images",
    )
    parser.add_argument("--shard", help="i/n, i from 1 to n: only this part of the images")
    parser.add_argument("--out-name", help=f"folder of the files (default: {name})")


def image_options(args: argparse.Namespace) -> dict:
    """What `add_image_options` asked for."""
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers: {args.workers}; use 1 or more")
    return {
        "layout": args.layout,
        "parts": args.parts.split(",") if args.parts is not None else None,
        "shard": args.shard,
        "name": args.out_name,
        "workers": args.workers,
    }


def tell_images(report) -> int:
    """Print what was done to the images; 2 if there were problems."""
    for line in report.problems[:50]:
        print(f"error: {line}", file=sys.stderr)
    if len(report.problems) > 50:
        print(f"error: and {len(report.problems) - 50} more", file=sys.stderr)
    print(
        f"{report.written} images in {report.seconds:.1f} s, {report.kept} kept; "
        f"{len(report.problems) or 'no'} image{'s' if len(report.problems) != 1 else ''} with problems"
    )
    return 2 if report.problems else 0


def add_superpixels(commands: argparse._SubParsersAction) -> None:
    """Options of `superpixels`."""
    parser = commands.add_parser(
        "superpixels",
        help="superpixels of camera images",
        description="Cut every camera image into at most --segments connected pieces (SLIC) and write ids as PNG:\n"
        "SS/superpixels/NNNNNN.png or training/superpixels/NNNNNN.png (two bytes) for KITTI's layouts,\n"
        "raw/superpixels_slic/TOKEN.png (one byte) for nuScenes. settings.json beside them holds the parameters; a\n"
        "folder made with others is refused. Complete files are kept, so an interrupted run goes on where it stopped.\n"
        "An image that cannot be read is reported and does not stop the others (exit code 2).",
        epilog="examples:\n"
        "  python tools/prepare_data.py superpixels --data-root data/semantic_kitti --workers 16\n"
        "  python tools/prepare_data.py superpixels --data-root data/nuscenes --parts train --segments 30",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_options(parser, "superpixels; nuscenes: superpixels_slic, of 30 segments _slic_30")
    parser.add_argument("--segments", type=int, default=150, help="the most (default 150)")
    parser.add_argument(
        "--compactness", type=float, default=6.0, help="place beside colour (default 6)"
    )
    parser.add_argument(
        "--sigma", type=float, help="smoothing before, pixels (default: 3 for 1600 wide images, others in proportion)"
    )  # fmt: skip
    parser.add_argument("--method", default="slic", choices=("slic",), help="default: slic")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.set_defaults(run=write_superpixels)


def write_superpixels(args: argparse.Namespace) -> int:
    """Write superpixels and say how many."""
    from pointcept_kd.data.label_images import SuperpixelMaker
    from pointcept_kd.data.label_images import write_superpixels as write

    maker = SuperpixelMaker(args.segments, args.compactness, args.sigma, args.method)
    report = write(args.data_root, maker, **image_options(args))
    if report.written:
        print(f"{report.counts['segments'] / report.written:.1f} segments per image")
    return tell_images(report)


def add_weak_labels(commands: argparse._SubParsersAction) -> None:
    """Options of `weak-labels`."""
    parser = commands.add_parser(
        "weak-labels",
        help="class masks of camera images without human labels",
        description="Write a class per pixel of every camera image, one byte: 0 none, 1..K; classes.json names them.\n"
        "SS/weak_labels/NNNNNN.png or training/weak_labels/NNNNNN.png for KITTI's layouts, raw/camseg/CAM_*/*.png for\n"
        "nuScenes. Complete files are kept, so an interrupted run goes on where it stopped; a folder made otherwise\n"
        "is refused. An image that cannot be used is reported and does not stop the others (exit code 2).\n\n"
        "--producer grounded_sam: Grounding DINO and SAM through transformers (extra `weak-labels`), weights from\n"
        "folders of yours, nothing is downloaded. png: files of another program. lidarseg: the true classes of LiDAR\n"
        "points where they appear, the best that labels can do.",
        epilog="examples:\n"
        "  python tools/prepare_data.py weak-labels --data-root data/nuscenes --parts train \\\n"
        "      --producer grounded_sam --detector weights/grounding-dino-tiny --segmenter weights/sam-hq-vit-huge\n"
        "  python tools/prepare_data.py weak-labels --data-root data/nuscenes --producer png --from seem --zero-based",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_options(parser, "weak_labels; nuscenes: camseg")
    parser.add_argument(
        "--producer", default="grounded_sam", choices=("grounded_sam", "png", "lidarseg"),
        help="default: grounded_sam",
    )  # fmt: skip
    parser.add_argument(
        "--classes", help="comma-separated, or one of the sets grounded_sam (13, default) and seem (16)"
    )  # fmt: skip
    parser.add_argument(
        "--alias", action="append", metavar="PHRASE=CLASS", help="another word for a class; more than once if need be"
    )  # fmt: skip
    parser.add_argument("--prompt", help="grounded_sam: what to look for (default: the classes)")
    parser.add_argument("--detector", help="grounded_sam: folder of a Grounding DINO")
    parser.add_argument("--segmenter", help="grounded_sam: folder of a SAM or HQ-SAM")
    parser.add_argument("--box-threshold", type=float, default=0.25, help="default 0.25")
    parser.add_argument("--text-threshold", type=float, default=0.25, help="default 0.25")
    parser.add_argument("--device", help="grounded_sam: default cuda where there is one, else cpu")
    parser.add_argument("--from", dest="source", help="png: the folder of the files")
    parser.add_argument(
        "--zero-based", action="store_true",
        help="png: the files say 0 for the first class, K for the background",
    )  # fmt: skip
    parser.add_argument(
        "--zero-is-first", action="store_true",
        help="png: with --zero-based, 0 is the first class, not also what has no label",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int,
        help="processes (default: one per core; grounded_sam: 1, each loads the models)",
    )  # fmt: skip
    parser.set_defaults(run=write_weak_labels)


def write_weak_labels(args: argparse.Namespace) -> int:
    """Write weak labels and say what was found."""
    from pointcept_kd.data import weak_labels

    options = image_options(args)
    if args.producer == "grounded_sam" and args.workers is None:
        options["workers"] = 1
    options["layout"] = options["layout"] or weak_labels.layout_of(args.data_root)
    maker = weak_label_maker(args, options["layout"], options["workers"])
    report = weak_labels.write_weak_labels(args.data_root, maker, **options)
    for what, number in report.counts.items():
        print(f"{number} {what}")
    if report.unknown:
        found = ", ".join(
            f"{phrase!r} {number}" for phrase, number in report.unknown.most_common(20)
        )
        print(f"{report.unknown.total()} with unknown phrases, left without a label: {found}")
    return tell_images(report)


def weak_label_maker(args: argparse.Namespace, layout: str, workers: int | None):
    """What the options ask for; InputError for those that another producer has."""
    from pointcept_kd.data import weak_labels

    own = {
        "grounded_sam": ("classes", "alias", "prompt", "detector", "segmenter", "device"),
        "png": ("classes", "alias", "source", "zero_based", "zero_is_first"),
        "lidarseg": (),
    }
    for key in dict.fromkeys(key for keys in own.values() for key in keys):
        if getattr(args, key) not in (None, False) and key not in own[args.producer]:
            option = "from" if key == "source" else key.replace("_", "-")
            raise InputError(f"--{option} is not for --producer {args.producer}")
    if args.producer == "lidarseg":
        return weak_labels.PointLabels(str(args.data_root), layout)
    default = weak_labels.SEEM_CLASSES if args.zero_based else weak_labels.CLASSES
    classes = weak_labels.class_names(args.classes, default)
    aliases = tuple(weak_labels.aliases_of(args.alias, classes).items())
    needed = ("source",) if args.producer == "png" else ("detector", "segmenter")
    for key in needed:
        if getattr(args, key) is None:
            option = "from" if key == "source" else key
            raise InputError(f"--producer {args.producer} needs --{option} DIR")
    if args.producer == "png":
        return weak_labels.PngLabels(
            args.source, classes, aliases, args.zero_based, args.zero_is_first
        )
    import torch

    from pointcept_kd.data.workers import usable_cores

    return weak_labels.GroundedSam(
        classes,
        aliases,
        weak_labels.prompt_of(classes, args.prompt),
        args.detector,
        args.segmenter,
        args.box_threshold,
        args.text_threshold,
        args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        max(1, usable_cores() // workers) if workers > 1 else 0,
    )


def add_instances(commands: argparse._SubParsersAction) -> None:
    """Options of `instances`."""
    parser = commands.add_parser(
        "instances",
        help="a database of labelled objects, for filling up training scans (kd.PasteInstances)",
        description="Cut every labelled object out of the training scans (SemanticKITTI, nuScenes, or Waymo with\n"
        "instance.npy beside segment.npy) and write DATA_ROOT/instances/{index.json,CLASS/SCAN_ID.bin}: x, y, z,\n"
        "strength as float32. An object is what has one class and one instance id; nuScenes without panoptic labels\n"
        "(raw/panoptic) takes its boxes instead. A second run leaves everything as it is.\n\n"
        "--image-patches, for data with cameras, also writes CLASS/SCAN_ID.npz, the object's picture, where one\n"
        "camera sees 90 % of its points and at most 10 % are behind others, for kd.PasteInstances(image='patch').",
        epilog="examples:\n"
        "  python tools/prepare_data.py instances --data-root data/semantic_kitti\n"
        "  python tools/prepare_data.py instances --data-root data/sim --min-points 20 --picture pasted.png\n"
        "  python tools/prepare_data.py instances --data-root data/sim_nus --image-patches",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-root", required=True, type=Path, help="what a config names so")
    parser.add_argument(
        "--layout",
        default="auto",
        choices=("auto", "semantic_kitti", "nuscenes", "waymo"),
        help="default: seen from the folders",
    )
    parser.add_argument(
        "--split", help="comma-separated, such as train (default) or 00,02; training scans alone"
    )
    parser.add_argument(
        "--min-points",
        type=int,
        help="of an object (default: SemanticKITTI 40, nuScenes 10, Waymo 50)",
    )
    parser.add_argument("--out", type=Path, help="default: DATA_ROOT/instances")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--image-patches", action="store_true", help="also cut out the objects' pictures"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="also draw a scan before and after pasting"
    )
    parser.set_defaults(run=instances)


def instances(args: argparse.Namespace) -> int:
    """Cut objects out and say how many of each class."""
    from pointcept_kd.data import instances as objects

    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers: {args.workers}; use 1 or more")
    out = args.out or args.data_root / objects.FOLDER
    splits = args.split.split(",") if args.split is not None else None
    counts = objects.build(
        args.data_root, args.layout, splits, out, args.min_points, args.workers, patches=args.image_patches
    )  # fmt: skip
    print(f"{out}: {sum(counts.values())} objects")
    if args.image_patches:
        print(f"{int(objects.InstanceDatabase(out).patches.sum())} of them with a picture")
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    if args.picture is not None:
        from pointcept_kd.data.pasting import draw_pasting

        name, pasted = draw_pasting(args.data_root, out, args.picture, splits)
        print(f"{args.picture}: {name} without and with {pasted} pasted points")
    return 0


def add_check_submission(commands: argparse._SubParsersAction) -> None:
    """Options of `check-submission`."""
    parser = commands.add_parser(
        "check-submission",
        help="what a leaderboard's server would refuse in a test's result/submit",
        description="Check a submission against the rules of its server: files of all scans, one "
        "label per point, classes that exist, nothing that belongs to no scan. With --zip also pack "
        "it, if it has no problem. Exit code 1 if there is one.",
        epilog="example: python tools/prepare_data.py check-submission --kind semantic_kitti "
        "--folder exp/NAME/result/submit --data-root data/semantic_kitti --zip submission.zip",
    )
    parser.add_argument("--kind", required=True, choices=("semantic_kitti", "nuscenes"))
    parser.add_argument("--folder", required=True, type=Path, help="result/submit, or a zip of it")
    parser.add_argument(
        "--data-root",
        type=Path,
        help="of the data set; without it points and scans are not counted",
    )
    parser.add_argument(
        "--split", default="test", help="test (default), or the one that was predicted, such as val"
    )
    parser.add_argument("--zip", type=Path, metavar="OUT.zip", help="pack the folder into this")
    parser.add_argument("--description", help="text of the zip's description.txt (SemanticKITTI)")
    parser.set_defaults(run=check_submission)


def check_submission(args: argparse.Namespace) -> int:
    """Report what a server would refuse, and pack what it would take."""
    from pointcept_kd.data import submissions

    found = submissions.check(args.kind, args.folder, args.data_root, args.split)
    for line in found:
        print(line)
    print(f"{args.folder}: {len(found) or 'no'} problem{'s' if len(found) != 1 else ''}")
    if args.data_root is None:
        print("scans and points were not counted; give --data-root for that")
    if args.zip is not None and not found:
        print(f"wrote {submissions.zip_submission(args.folder, args.zip, args.description)}")
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands; 2 and one line on stderr for bad input."""
    parser = argparse.ArgumentParser(
        description="Prepare and check data.",
        epilog="example: python tools/prepare_data.py simulate --out data/sim --preset demo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_simulate,
        add_preview,
        add_check,
        add_nuscenes_info,
        add_waymo,
        add_maps,
        add_superpixels,
        add_weak_labels,
        add_instances,
        add_check_submission,
    ):
        add(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
