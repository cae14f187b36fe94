"""Compares trained networks: parameters, work, time in int8, and error, as Markdown and CSV.

    python training/train.py -o out/networks/match_16 --network config/networks/match_16.yaml --steps 3000
    python training/train.py -o out/networks/qpwc_fast --network qpwc_fast --steps 3000
    python training/compare_networks.py out/networks/qpwc_fast out/networks/match_16

Takes directories of train.py. The networks are exported in int8, with ranges measured on rendered pairs and no
fine-tuning, and timed by turns on frames of --size; times are in units of the first one's. Errors and pairs seen are
those of the runs' last validation. What is compared has to have seen as much: runs whose options differ in anything but
the network and the seed are refused.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.training.tables import write_table

FIELDS = ("network", "parameters", "multiply_adds", "time", "pairs", "train_epe", "epe_half_way", "epe", "ratio")
# Of a run's options, those that the page tells.
NEEDED = ("batch", "height", "width", "motion", "textures", "validation_count", "validation_size")
# And those that name the network or may differ without changing what is compared: one network with several seeds shows how
# much is chance.
_OWN = ("network", "seed", "workers")


@dataclasses.dataclass(frozen=True)
class Run:
    """A directory of train.py.

    Attributes:
        options: the run's, as in its config.json.
        network: its ``NetworkConfig``.
        steps, errors: of its validations.
        train_error: over the pairs between the last two of them.
    """

    directory: Path
    options: dict
    network: object
    steps: list[int]
    errors: list[float]
    train_error: float

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def weights(self) -> Path:
        return self.directory / "last.weights.h5"

    @property
    def half_way(self) -> float:
        """The error at the validation nearest to half of the steps."""
        return min(zip(self.steps, self.errors), key=lambda row: abs(row[0] - self.steps[-1] / 2))[1]


def read_run(directory: Path) -> Run:
    """Reads a directory of train.py.

    Raises:
        ValueError: it is none, or its run has not come to its end.
    """
    from qpwc_core.model.config import NetworkConfig

    try:
        config = json.loads((directory / "config.json").read_text())
        with (directory / "history.csv").open(newline="") as file:
            columns = ("step", "skipped", "validation_epe", "train_epe")
            steps, skipped, errors, train_errors = zip(
                *([float(row[name]) for name in columns] for row in csv.DictReader(file))
            )
        options, network = config["run"], NetworkConfig.from_mapping(config["network"])
        # A step that was skipped is one of the run's, but not of the optimizer's.
        ended = steps[-1] + skipped[-1] >= options["steps"]
        missing = [name for name in NEEDED if name not in options]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}: no directory of a training run ({error})") from error
    run = Run(directory, options, network, [int(step) for step in steps], list(errors), train_errors[-1])
    if not ended or not run.weights.is_file():
        raise ValueError(f"{directory}: its run has not come to its end")
    return run


def check_alike(runs: list[Run]) -> None:
    """Refuses runs that have not seen the same pairs.

    Raises:
        ValueError: naming the option that differs.
    """
    first = runs[0]
    for run in runs[1:]:
        for name in sorted({*first.options, *run.options} - set(_OWN)):
            values = [r.options.get(name) for r in (first, run)]
            if values[0] != values[1]:
                raise ValueError(f"{name} is {values[0]} in {first.directory} and {values[1]} in {run.directory}")


def export(run: Run, size: tuple[int, int], config, images, path: Path) -> None:
    """Writes the run's network in int8, for images of (height, width) alone.

    Args:
        config, images: what ranges are measured by, and on; see ``quantization.pipeline.calibrated_network``.
    """
    from qpwc_core.quantization.export import export_network
    from qpwc_core.quantization.pipeline import calibrated_network
    from qpwc_core.training.run_files import save_weights

    point = dataclasses.replace(run.network, height=size[0], width=size[1], sizes=(), refine=False)
    weights = path.with_suffix(".weights.h5")
    save_weights(calibrated_network(config, point, run.weights, images), weights)
    export_network(point, weights, path, quantized=True)


def measure(runs: list[Run], size: tuple[int, int], repeats: int, calibration_pairs: int) -> list[dict]:
    """The table's rows."""
    from tqdm import tqdm

    from qpwc_core.model.network import build_network
    from qpwc_core.model.work import multiply_adds
    from qpwc_core.quantization.pipeline import QuantizeConfig, calibration_images
    from qpwc_core.runtime.estimator import FlowEstimator
    from qpwc_core.timing import Contestant, moving_frames, streaming, time_by_turns, turns

    height, width = size
    # Ranges of all are measured on the same pairs, those of the first run's textures, which are everyone's.
    config = QuantizeConfig(textures=runs[0].options["textures"], calibration_pairs=calibration_pairs)
    images = calibration_images(config)
    contestants = []
    with tempfile.TemporaryDirectory() as directory:
        for index, run in enumerate(tqdm(runs, desc="exporting", unit="network")):
            path = Path(directory) / f"{index}.tflite"
            export(run, size, config, images, path)
            step = streaming(FlowEstimator.load(str(path)))
            contestants.append(Contestant(run.name, f"{width}x{height}", step))
        with tqdm(total=turns(repeats), desc="timing", unit="frame") as bar:
            time_by_turns(contestants, moving_frames(width, height), repeats, bar.update)
    rows = []
    for run, contestant in zip(runs, contestants):
        network = build_network(run.network, height, width)
        values = (
            run.name,
            network.count_params(),
            multiply_adds(network),
            round(contestant.ratio(contestants[0]), 3),
            run.steps[-1] * run.options["batch"],
            run.train_error,
            run.half_way,
            run.errors[-1],
            round(run.errors[-1] / runs[0].errors[-1], 4),
        )
        rows.append(dict(zip(FIELDS, values)))
    return rows


def cells(row: dict) -> list[str]:
    """A row as it is read best."""
    return [
        row["network"],
        f"{row['parameters']:,}",
        f"{row['multiply_adds'] / 1e6:,.0f}",
        f"{row['time']:.2f}",
        f"{row['pairs']:,}",
        f"{row['train_epe']:.2f}",
        f"{row['epe_half_way']:.2f}",
        f"{row['epe']:.2f}",
        f"{row['ratio']:.3f}",
    ]


def write(rows: list[dict], runs: list[Run], directory: Path, command: str, size: tuple[int, int]) -> list[Path]:
    """The table as ``networks.csv`` and ``networks.md``."""
    from qpwc_core.machine import describe_machine

    options = runs[0].options
    machine = "; ".join(f"{name} {value}" for name, value in describe_machine().items())
    lines = [
        "# Networks compared", "",
        f"`{command}`", "",
        f"Each was trained for {options['steps']:,} steps of {options['batch']} pairs of {options['height']}x{options['width']} "
        f"with motion of {options['motion'][0]:g} to {options['motion'][1]:g} px, and validated on {options['validation_count']} "
        f"pairs of {options['validation_size'][0]}x{options['validation_size'][1]}: mean endpoint error in pixels, half way "
        "and at the end, and the latter's ratio to the first row's. The training error is that of the last pairs, which with "
        "one seed are the same for all. Time: a frame of a stream of "
        f"{size[1]}x{size[0]} in int8, without refinement, its median ratio to the first row's in the same turn, two threads. "
        f"Work: million multiply-adds of convolutions and cost volumes for it. Machine: {machine}.", "",
        "| | parameters | work | time | pairs seen | training EPE | EPE half way | EPE | of the first |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return write_table(directory / "networks", FIELDS, rows, lines)


def main(arguments: list[str] | None = None) -> int:
    from qpwc_core.cli.common import positive_int

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directories of train.py; the first is what others are compared with")
    parser.add_argument("--size", type=positive_int, nargs=2, metavar=("H", "W"), default=(480, 640), help="default: 480 640")
    parser.add_argument("--repeats", type=positive_int, default=50, metavar="N", help="frames timed (default: 50)")
    parser.add_argument("--calibration-pairs", type=positive_int, default=16, metavar="N", help="default: 16")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"), help="default: %(default)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)  # before the work
        runs = [read_run(directory) for directory in options.runs]
        check_alike(runs)
        size = tuple(options.size)
        rows = measure(runs, size, options.repeats, options.calibration_pairs)
        command = shlex.join(["python", "training/compare_networks.py", *arguments])
        paths = write(rows, runs, options.output, command, size)
    except (ValueError, OSError, QpwcError) as error:
        print(f"compare_networks: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    end_with(main)
