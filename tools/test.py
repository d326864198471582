"""Score a trained network on the test or validation split and write its predictions.

    python tools/test.py --config-file configs/kd/ptv3_to_student.py --options weight=exp/student/model/model_best.pth
    python tools/test.py --config-file configs/kd/ptv3_to_student.py --options weight=... test.mode=fragments

For a distillation config the student alone is built and tested. Results are in save_path/result.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# At the top of the file: processes started by this one import it again and so know every registered name.
import pointcept_kd  # noqa: F401
from pointcept_kd.host import TESTERS
from pointcept_kd.host.config import Config, build_parser
from pointcept_kd.host.dialect import run_custom_imports
from pointcept_kd.host.log import get_root_logger
from pointcept_kd.host.runtime import complete, launch, read_config, run_tool


def run_tester(cfg: Config) -> None:
    """One process of one test."""
    run_custom_imports(cfg.get("custom_imports"), cfg.filename or "config")
    TESTERS.build({**cfg["test"], "cfg": cfg}).test()


def main() -> None:
    """Read the command line and test."""
    summary, _, examples = __doc__.partition("\n\n")
    parser = build_parser(summary, f"examples:\n{examples}")
    parser.add_argument("--data-root", help="folder of the data set, for all splits")
    args = parser.parse_args()
    cfg = read_config(args.config_file, args.options, args.data_root)
    best = Path(cfg["save_path"]) / "model" / "model_best.pth"
    if cfg["weight"] is None and best.is_file():
        cfg["weight"] = str(best)
        get_root_logger().info(f"No weight given: testing {best}")
    launch(run_tester, args.num_gpus, complete(cfg))


if __name__ == "__main__":
    sys.exit(run_tool(main))
