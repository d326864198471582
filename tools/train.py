"""Train a network, or distil one into another.

    python tools/train.py --config-file configs/kd/ptv3_to_student.py --options epoch=10 eval_epoch=10
    python tools/train.py --config-file configs/kd/ptv3_to_student.py --resume
    python tools/train.py --config-file configs/semantic_kitti/semseg-pt-v3m1-1-student.py --data-root path/to/kitti
    python tools/train.py --config-file configs/kd/ptv3_to_student.py --num-gpus 2
    torchrun --nproc-per-node 2 tools/train.py --config-file configs/kd/ptv3_to_student.py

A teacher with `train_if_missing=True` is trained first, from its own config, where its weight does not exist.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# At the top of the file: processes started by this one import it again and so know every registered name.
import pointcept_kd  # noqa: F401
from pointcept_kd.host import TRAINERS, InputError
from pointcept_kd.host.config import Config, build_parser
from pointcept_kd.host.dialect import run_custom_imports
from pointcept_kd.host.log import get_root_logger
from pointcept_kd.host.runtime import complete, launch, placement, read_config, run_tool


def run_trainer(cfg: Config) -> None:
    """One process of one training run."""
    # A config's imports ran in the process that read it; one that was started for training still lacks them.
    run_custom_imports(cfg.get("custom_imports"), cfg.filename or "config")
    TRAINERS.build({**cfg["train"], "cfg": cfg}).train()


def continue_run(cfg: Config) -> None:
    """Point the config at the run's last checkpoint; a run killed before its first one starts again, with its seed."""
    folder = Path(cfg["save_path"])
    last, dumped = folder / "model" / "model_last.pth", folder / "config.py"
    if cfg["seed"] is None and dumped.is_file():
        cfg["seed"] = Config.fromfile(dumped).get("seed")
    if last.is_file():
        cfg["weight"], cfg["resume"] = str(last), True
    else:
        get_root_logger().info(f"--resume: there is no {last} yet; starting from the beginning")


def teachers_of(model: Any) -> dict[str, Mapping[str, Any]]:
    """The teacher entries of a distiller's config by name; none for a plain network."""
    teacher = model.get("teacher") if isinstance(model, Mapping) else None
    if not isinstance(teacher, Mapping):
        return {}
    if any(key in teacher for key in ("model", "weight", "config", "type")):
        return {"teacher": teacher}
    return {name: entry for name, entry in teacher.items() if isinstance(entry, Mapping)}


def provide_teachers(
    cfg: Config,
    place: Mapping[str, Any],
    above: tuple[Path, ...] = (),
    data_root: str | None = None,
) -> None:
    """Train every missing teacher that asks for it, on the same data.

    Raises:
        InputError: for a missing weight that nobody trains, or that its config writes elsewhere.
    """
    for name, entry in teachers_of(cfg.get("model")).items():
        weight, source = entry.get("weight"), entry.get("config")
        if weight in (None, "random") or Path(weight).is_file():
            continue
        command = f"python tools/train.py --config-file {source or 'THE_CONFIG_OF_THE_TEACHER'}"
        missing = f"the weight of {name}, {weight}, does not exist"
        if not entry.get("train_if_missing") or source is None:
            raise InputError(
                f"{missing}: train it with `{command}`, set train_if_missing=True and config= beside it, or correct "
                "the path"
            )
        teacher = read_config(source, data_root=data_root)
        path = Path(teacher.filename).resolve()
        if path in above:
            raise InputError(f"{source}: this config is a teacher of itself; correct model.teacher")
        teacher["device"] = cfg["device"]
        if (Path(teacher["save_path"]) / "model" / "model_last.pth").is_file():
            continue_run(teacher)  # a teacher that was killed goes on
        get_root_logger().info(f"{missing}: training it first, from {source}")
        train(teacher, place, (*above, path), data_root)
        if not Path(weight).is_file():
            raise InputError(
                f"{source} is trained, but {weight} still does not exist: it saves below {teacher['save_path']}; "
                f"correct the weight of {name}"
            )


def train(
    cfg: Config,
    place: Mapping[str, Any],
    above: tuple[Path, ...] = (),
    data_root: str | None = None,
) -> None:
    """Train the missing teachers, then the config's own model; `place` is where, see `launch`."""
    complete(cfg)
    provide_teachers(cfg, place, above, data_root)
    launch(run_trainer, cfg=cfg, **place)


def main() -> None:
    """Read the command line and train."""
    summary, _, examples = __doc__.partition("\n\n")
    parser = build_parser(summary, f"examples:\n{examples}")
    parser.add_argument(
        "--resume", action="store_true", help="go on from save_path/model/model_last.pth"
    )
    parser.add_argument(
        "--data-root",
        help="folder of the data set, for all splits and for teachers that are trained first",
    )
    args = parser.parse_args()
    cfg = read_config(args.config_file, args.options, args.data_root)
    if args.resume:
        continue_run(cfg)
    train(cfg, placement(args), (Path(cfg.filename).resolve(),), args.data_root)


if __name__ == "__main__":
    sys.exit(run_tool(main))
