r"""Score a trained network on the test or validation split and write its predictions.

    python tools/test.py --config-file configs/kd/ptv3_to_student.py --options weight=exp/student/model/model_best.pth
    python tools/test.py --config-file configs/kd/ptv3_to_student.py --mode tta --options test.tta=turns
    python tools/test.py --config-file configs/semantic_kitti/semseg-pt-v3m1-1-student.py --mode tta \
        --options data.test.split=test batch_size_test=4
    python tools/test.py --config-file configs/kd/ptv3_to_student.py --options test.reuse=True
    python tools/test.py --config-file configs/completion/teacher_to_score_student.py \
        --options test.steps=[8,4,1] test.seeds=[0,1,2] test.refine=weights/refiner.pth

For a distillation config the student alone is built and tested. Results are in save_path/result; `metrics.json` there
says by which protocol the numbers came about.

options of the tester (--options KEY=VALUE):
  test.mode=single|fragments|tta   one pass per scan, as in validation (single); the config's fragment voting, needs
                                   data.test with test_mode=True (fragments); test-time augmentation (tta)
  test.tta=NAME or LIST            turns (4 passes), turns_flips (8, default), scales_flips (10), or one list of
                                   transforms per pass
  batch_size_test=N                scans (single), fragments or augmented passes in one forward
  test.reuse=True                  go on with an interrupted test: take over what the same weights and settings made
  test.save_predictions=False      no result/NAME_pred.npy
  test.save_probabilities=True     also result/NAME_prob.npy, float16, for ensembles
  test.save_submission=True|False  insist on result/submit, or write none; by default written where the data set can

options of the tester of completions (configs/completion), which has the mode single alone and writes one row per scan
into result/scans.csv:
  test.steps=8 or [50,8,1]         solver steps, one row of the table for each; by default the model's
  test.guidance=3.5                scale of the guidance; by default the model's
  test.seeds=[0,1,2]               noise seeds; the table has mean and standard deviation over them
  test.refine=WEIGHT               refine the completions by this refiner, and score what comes out
  test.save_predictions=True       result/NAME.npy, the scored points; with one number of steps and one seed
  test.folder=FOLDER               score finished clouds, NAME.npy, .bin or .ply, instead; needs no weight
  test.legacy=True                 also the IoU of older papers
  test.emd_points=2048             also the earth mover's distance, of so many points
  test.threads=8 or None           CPU threads instead of one; the last digits of the points then depend on them
  test.warmup=3                    scans whose seconds do not count
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from numpy.typing import NDArray

# At the top of the file: processes started by this one import it again and so know every registered name.
import pointcept_kd  # noqa: F401
from pointcept_kd.completion.evaluator import READERS
from pointcept_kd.data.clouds import read_points
from pointcept_kd.host import TESTERS
from pointcept_kd.host.config import Config, build_parser
from pointcept_kd.host.dialect import run_custom_imports
from pointcept_kd.host.log import get_root_logger
from pointcept_kd.host.runtime import complete, launch, placement, read_config, run_tool


def read_ply(path: Path) -> NDArray:
    """Points (n, 3)."""
    return read_points(path)["coord"]


def run_tester(cfg: Config) -> None:
    """One process of one test."""
    run_custom_imports(cfg.get("custom_imports"), cfg.filename or "config")
    # Finished clouds as `tools/complete.py` writes them; the tester's own room does not know that of files.
    READERS.setdefault(".ply", read_ply)
    TESTERS.build({**cfg["test"], "cfg": cfg}).test()


def main() -> None:
    """Read the command line and test."""
    summary, _, examples = __doc__.partition("\n\n")
    parser = build_parser(summary, f"examples:\n{examples}")
    parser.add_argument("--data-root", help="folder of the data set, for all splits")
    parser.add_argument(
        "--mode",
        help="single, fragments or tta (of completions single alone); the same as --options test.mode=MODE",
    )
    args = parser.parse_args()
    cfg = read_config(args.config_file, args.options, args.data_root)
    if args.mode is not None:
        cfg.merge_from_dict({"test.mode": args.mode})
    best = Path(cfg["save_path"]) / "model" / "model_best.pth"
    if cfg["weight"] is None and best.is_file():
        cfg["weight"] = str(best)
        get_root_logger().info(f"No weight given: testing {best}")
    if cfg["seed"] is None:
        cfg["seed"] = 0  # a drawn one would give every test other points per voxel
    launch(run_tester, cfg=complete(cfg), **placement(args))


if __name__ == "__main__":
    sys.exit(run_tool(main))
