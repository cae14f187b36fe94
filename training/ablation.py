"""What int8 costs, and which choice costs how much: a table of quantizations of one network, as Markdown and CSV.

    python training/ablation.py --textures TRAIN.npz --validation-textures VALIDATION.npz
    python training/ablation.py --pairs 4 --calibration-pairs 4 --rows float shipped groups       # a quick look
    python training/ablation.py --qat out/quantize/qpwc_fast/best.weights.h5 -o docs/results

Every row but those of the groups is a .tflite file, run as the robot runs it. The rows of the groups are the shipped
recipe's file computed in float with only some of its tensors rounded (qpwc_core/quantization/bisection.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from qpwc_core.ending import end_with
from qpwc_core.training.tables import write_table

ROWS = ("float", "plain", "calibration", "shipped", "16x8", "groups", "flow", "qat", "quantizer")
FIELDS = ("row", "epe", "ratio", "worst_ratio", "difference", "size_mb", "note")


class Skipped(Exception):
    """A row that cannot be made here, and why."""


class Ablation:
    """Makes the rows; what several of them need is made once.

    Attributes:
        rows: what has been measured, as CSV rows.
    """

    def __init__(self, options: argparse.Namespace, directory: Path):
        from qpwc_core.data.pipeline import validation_samples
        from qpwc_core.geometry import choose_size
        from qpwc_core.model.config import network_config
        from qpwc_core.quantization.pipeline import QuantizeConfig, calibration_images, find_weights

        self._directory = directory
        self._qat = options.qat
        self.config = QuantizeConfig(
            network=options.network,
            weights=options.weights,
            textures=options.textures,
            validation_textures=options.validation_textures,
            calibration_pairs=options.calibration_pairs,
        )
        point = network_config(options.network)
        # All pairs are of one size, so one input is enough to export.
        height, width = choose_size(*self.config.validation_size, point.input_sizes)
        self.point = dataclasses.replace(point, height=height, width=width, sizes=())
        if options.context is not None:
            self.point = dataclasses.replace(self.point, context=tuple(filter(None, options.context)))
        self.weights = find_weights(self.config)
        self.images = calibration_images(self.config)
        self.samples = validation_samples(*self.config.validation_size, options.pairs, options.validation_textures)
        self.rows: list[dict[str, str]] = []
        self._reference: list[np.ndarray] | None = None

    # --- Files ---------------------------------------------------------------------------------------------

    def float_file(self, equalized: bool = False) -> Path:
        """The float network; ``equalized``: the same function, with the kernels that the equalized int8 files round."""
        from qpwc_core.quantization.export import export_network

        path = self._directory / f"float32{'_equalized' if equalized else ''}.tflite"
        if not path.exists():
            export_network(self.point, self._float_weights(equalized), path, quantized=False)
        return path

    def _float_weights(self, equalized: bool) -> Path:
        """What is calibrated."""
        from qpwc_core.quantization.equalization import equalize
        from qpwc_core.training.run_files import save_weights

        if not equalized:
            return self.weights
        path = self._directory / "equalized.weights.h5"
        if not path.exists():
            network = self._network(self.weights)
            equalize(network, self.images)
            save_weights(network, path)
        return path

    def _network(self, weights: Path):
        from qpwc_core.model.network import build_network

        network = build_network(self.point, self.config.height, self.config.width)
        network.load_weights(weights)
        return network

    def calibrated_file(self, method: str, equalized: bool) -> Path:
        """Our export, with ranges chosen by ``method``."""
        from qpwc_core.quantization.export import export_network
        from qpwc_core.quantization.pipeline import calibrated_network
        from qpwc_core.training.run_files import save_weights

        path = self._directory / f"{method}{'_equalized' if equalized else ''}.tflite"
        if path.exists():
            return path
        # Equalized, if at all, once for all methods.
        config = dataclasses.replace(self.config, method=method, equalize=0, fine_range=1.0)
        weights = self._directory / f"{path.stem}.weights.h5"
        save_weights(calibrated_network(config, self.point, self._float_weights(equalized), self.images), weights)
        export_network(self.point, weights, path, quantized=True)
        return path

    def shipped_file(self) -> Path:
        return self.calibrated_file(self.config.method, bool(self.config.equalize))

    def post_training_file(self, activations: int) -> Path:
        """The plain converter's, from the float network and a representative data set."""
        import tensorflow as tf

        from qpwc_core.quantization.export import export_network

        path = self._directory / f"plain_{activations}x8.tflite"

        def prepare(converter: tf.lite.TFLiteConverter, signature: str) -> None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ((signature, inputs) for inputs in self._inputs(signature))
            if activations == 16:
                sets = tf.lite.OpsSet
                converter.target_spec.supported_ops = [
                    sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8, sets.TFLITE_BUILTINS
                ]  # fmt: skip

        export_network(self.point, self.weights, path, quantized=False, prepare=prepare)
        return path

    def _inputs(self, signature: str) -> Iterator[dict[str, np.ndarray]]:
        """What the float file's signature gets for the calibration pairs."""
        import cv2

        from qpwc_core.runtime.estimator import FlowEstimator

        estimator = FlowEstimator.load(self.float_file())
        for batch in self.images:
            count = len(batch) // 2
            size = (self.point.width, self.point.height)
            frames = [cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) for frame in batch]
            for prev, next_ in zip(frames[:count], frames[count:]):
                if signature == "encode":
                    yield {"image": prev[None]}
                    continue
                sides = {"prev_": estimator.encode(prev), "next_": estimator.encode(next_)}
                yield {
                    f"{side}{name}": array
                    for side, features in sides.items()
                    for name, array in features._arrays.items()
                    if side == "prev_" or name.startswith("match")
                }

    # --- Rows ----------------------------------------------------------------------------------------------

    def reference(self) -> list[np.ndarray]:
        """The float model's flows."""
        from qpwc_core.quantization.parity import flows_of
        from qpwc_core.runtime.estimator import FlowEstimator

        if self._reference is None:
            self._reference = flows_of(FlowEstimator.load(self.float_file()), self.samples)
        return self._reference

    def add(self, name: str, estimate: Callable, path: Path | None = None, note: str = "") -> None:
        from qpwc_core.quantization.parity import flows_of, score

        result = score(flows_of(estimate, self.samples), self.reference(), self.samples)
        row = {field: f"{value:.3f}" for field, value in dataclasses.asdict(result).items()}
        size = f"{path.stat().st_size / 1e6:.2f}" if path else ""
        self.rows.append({"row": name, **row, "size_mb": size, "note": note})
        print("  ".join(self.rows[-1].values()), flush=True)

    def add_file(self, name: str, path: Path, note: str = "") -> None:
        from qpwc_core.runtime.estimator import FlowEstimator

        self.add(name, FlowEstimator.load(path), path, note)

    def make(self, kind: str) -> None:
        """Measures the rows of one kind; what cannot be made is a row with its reason."""
        self._attempt(kind, getattr(self, f"_{kind.replace('16x8', 'wide')}_rows"))

    def _attempt(self, title: str, measure: Callable[[], None]) -> None:
        try:
            measure()
        except Skipped as error:
            reason = str(error)
        # The converter and optional packages fail in ways of their own, and one row is not worth the table.
        except Exception as error:  # noqa: BLE001
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            return
        print(f"{title}: skipped, {reason}", file=sys.stderr)
        self.rows.append({**dict.fromkeys(FIELDS, ""), "row": title, "note": f"skipped: {reason}"})

    def _float_rows(self) -> None:
        self.add_file("float32", self.float_file())

    def _plain_rows(self) -> None:
        self.add_file(
            "post-training int8 by the plain converter", self.post_training_file(8), "flow in int8, features leave in float"
        )

    def _wide_rows(self) -> None:
        self.add_file("post-training 16x8 by the plain converter", self.post_training_file(16), "int16 activations")

    def _calibration_rows(self) -> None:
        from qpwc_core.quantization.calibration import METHODS

        for method in METHODS:
            self.add_file(f"ours, ranges by {method}", self.calibrated_file(method, False), "without equal channels")
        for method in METHODS:
            self.add_file(f"ours, ranges by {method}, equal channels", self.calibrated_file(method, True))

    def _shipped_rows(self) -> None:
        self.add_file("ours as shipped, without QAT", self.shipped_file())

    def _groups_rows(self) -> None:
        from qpwc_core.quantization import bisection

        for equalized in (False, True):
            file = self.calibrated_file(self.config.method, equalized)
            which = "equal channels" if equalized else "channels as trained"
            loosened = bisection.Loosened(file, self.float_file(equalized))
            path = self._directory / "variant.tflite"
            kinds: list[tuple[str, Callable, Callable | None]] = [
                ("everything int8, simulated", lambda name: 8, None),
                ("kernels int8 alone", lambda name: 0, lambda layer: 8),
                ("activations int8 alone", lambda name: 8, lambda layer: 0),
                ("activations 16 bits", lambda name: 16, lambda layer: 8),
            ]
            present = {bisection.group_of(layer) for layer in loosened.tensors.values()}
            for group in bisection.GROUPS:
                if group in present:
                    kinds.append((f"{group} in float", bisection.bits_of_groups(loosened, [group], 0, 8), None))
                    kinds.append((f"{group} int8 alone", bisection.bits_of_groups(loosened, [group], 8, 0), None))
            for name, bits, kernel_bits in kinds:
                self.add(f"{name} ({which})", loosened.variant(path, bits, kernel_bits))

    def _flow_rows(self) -> None:
        """Each flow tensor in int8, over a range that just holds the longest motion of the validation pairs."""
        from qpwc_core.quantization import bisection

        loosened = bisection.Loosened(self.shipped_file(), self.float_file())
        height, width = self.config.validation_size
        enlarged = max(self.point.height / height, self.point.width / width)
        longest = enlarged * max(float(np.abs(sample.flow).max()) for sample in self.samples)
        ranges = {}
        for name in loosened.float_tensors("flow path"):
            level = int(name.split("/")[0].rpartition("_")[2])
            ranges[name] = (-longest / 2**level, longest / 2**level)
        for bits in (8, 16):
            self.add(
                f"and the flow path in int{bits}",
                loosened.variant(self._directory / "variant.tflite", lambda name: bits if name in ranges else 8, None, ranges),
                note=f"flow over ±{longest:.0f} px",
            )

    def _qat_rows(self) -> None:
        from qpwc_core.quantization.export import export_network

        if self._qat is None:
            raise Skipped("no --qat")
        path = self._qat
        if path.suffix != ".tflite":
            path = self._directory / "qat.tflite"
            export_network(self.point, self._qat, path, quantized=True)
        self.add_file("ours, fine-tuned with rounding (QAT)", path)

    def _quantizer_rows(self) -> None:
        """ai-edge-quantizer's recipes, on the float file."""
        try:
            quantizer, recipe = (
                importlib.import_module(f"ai_edge_quantizer.{name}") for name in ("quantizer", "recipe")
            )
        except ImportError as error:
            raise Skipped(f"ai-edge-quantizer cannot be imported ({error})") from error

        source = self._uniquely_named(self.float_file())

        def measure(title: str, name: str) -> None:
            path = self._directory / f"{name}.tflite"
            tool = quantizer.Quantizer(str(source), getattr(recipe, name)())
            ranges = None
            if tool.need_calibration:
                ranges = tool.calibrate({key: list(self._inputs(key)) for key in ("encode", "match")}, num_threads=1)
            tool.quantize(ranges).export_model(str(path), overwrite=True)
            self._restore_interface(path)
            self.add_file(title, path)

        for name in ("dynamic_wi8_afp32", "weight_only_wi8_afp32", "static_wi8_ai8", "static_wi8_ai16"):
            title = f"ai-edge-quantizer, {name}"
            self._attempt(title, functools.partial(measure, title, name))

    def _uniquely_named(self, path: Path) -> Path:
        """The same model, no two of whose tensors share a name, as ai-edge-quantizer needs it."""
        from tensorflow.lite.tools import flatbuffer_utils

        from qpwc_core.quantization import flatbuffer

        model = flatbuffer_utils.read_model(str(path))
        names: set[str] = set()
        for number, subgraph in enumerate(model.subgraphs):
            for index, tensor in enumerate(subgraph.tensors):
                name = flatbuffer.text(tensor.name)
                tensor.name = name if name not in names else f"{name};{number};{index}"
                names.add(tensor.name)
        renamed = self._directory / f"{path.stem}_uniquely_named.tflite"
        flatbuffer.write(model, renamed)
        return renamed

    def _restore_interface(self, path: Path) -> None:
        """What another tool dropped, and the runtime refuses the file without: our metadata, the flow in float, and
        features that enter ``match`` rounded as they leave ``encode``."""
        from tensorflow.lite.tools import flatbuffer_utils

        from qpwc_core.quantization import flatbuffer

        model = flatbuffer_utils.read_model(str(path))
        if not flatbuffer.get_metadata(model):
            source = flatbuffer_utils.read_model(str(self.float_file()))
            flatbuffer.set_metadata(model, flatbuffer.get_metadata(source))
        flatbuffer.float_output(model, "flow")
        flatbuffer.requantize_inputs(model, "encode", "match")
        flatbuffer.write(model, path)


def write(rows: list[dict[str, str]], directory: Path, network: str, command: str, pairs: int) -> list[Path]:
    """The table as ``ablation_NETWORK.csv`` and ``.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# What int8 costs: {network}", "",
        f"`{command}`", "",
        f"On {pairs} synthetic validation pairs: mean endpoint error in pixels, its ratio to float32's, the largest ratio of",
        "a single pair, and the mean distance between the row's flow and float32's, in pixels.", "",
        "| | EPE | of float32 | worst pair | distance | MB | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(row[field] for field in FIELDS) + " |" for row in rows]
    return write_table(directory / f"ablation_{network}", FIELDS, rows, lines)


def main(arguments: list[str] | None = None) -> int:
    import tempfile

    from qpwc_core.cli.common import positive_int
    from qpwc_core.model.config import network_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="qpwc_fast", help="operating point (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="float weights (default: those quantize.py would take)")
    parser.add_argument("--context", type=int, nargs="+", metavar="N", help="channels of the context network; 0: none")
    parser.add_argument("--textures", metavar="FILE", help="archive for calibration (default: patterns)")
    parser.add_argument("--validation-textures", metavar="FILE", help="archive for validation (default: patterns)")
    parser.add_argument("--pairs", type=positive_int, default=64, metavar="N", help="validation pairs (default: 64)")
    parser.add_argument(
        "--calibration-pairs", type=positive_int, default=64, metavar="N", help="default: 64"
    )
    parser.add_argument("--qat", type=Path, metavar="FILE", help="weights of a QAT run, or its .tflite")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the files made, and use those found, here")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"), help="default: %(default)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            directory = options.work or Path(temporary)
            directory.mkdir(parents=True, exist_ok=True)
            ablation = Ablation(options, directory)
            for kind in options.rows:
                ablation.make(kind)
                # After each, so that what took an hour is not lost with the next.
                command = shlex.join(["python", "training/ablation.py", *arguments])
                paths = write(ablation.rows, options.output, network_name(options.network), command, options.pairs)
    except (ValueError, OSError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    end_with(main)
