"""Shows what a pretrained network makes of triplets it has not seen: one PNG per example, and PSNRs.

    python training/pre_train_test.py                           # the best weights of out/pre_train/qpwc_fast
    python training/pre_train_test.py out/pre_train/qpwc_fast --videos one.mp4

Each picture: previous frame, next frame, true middle frame; predicted middle frame, the two frames' average
overlaid with the flow in colours, and the prediction's error (mid-grey: none, doubled).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.flow_color import flow_to_color
from qpwc_core.images import write_image
from qpwc_core.metrics import psnr

_CAPTION = 18  # pixels


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """The image under a line of text."""
    bar = np.full((_CAPTION, image.shape[1], 3), 255, np.uint8)
    cv2.putText(bar, text, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, image])


def grid(example: dict[str, np.ndarray], predicted: np.ndarray, flow: np.ndarray, average: np.ndarray) -> np.ndarray:
    """The picture of one example, uint8 RGB."""
    middle = example["middle"]
    overlay = cv2.addWeighted(average, 0.5, flow_to_color(flow), 0.5, 0)
    error = np.clip(128 + 2 * (predicted.astype(np.int16) - middle), 0, 255).astype(np.uint8)
    longest = float(np.hypot(flow[..., 0], flow[..., 1]).max())
    rows = (
        ((example["prev"], "prev"), (example["next"], "next"), (middle, "truth")),
        (
            (predicted, f"predicted {psnr(predicted, middle):.1f} dB"),
            (overlay, f"average {psnr(average, middle):.1f} dB, flow <= {longest:.1f} px"),
            (error, "error"),
        ),
    )
    return np.concatenate([np.concatenate([captioned(*cell) for cell in row], axis=1) for row in rows])


def show(run: Path, weights: Path | None, output: Path, videos: list[Path], count: int, seed: int) -> None:
    """Writes the pictures and prints a table.

    Raises:
        ValueError, OSError, FormatError: the run, the weights or a video is missing or not what it should be.
    """
    import tensorflow as tf

    from qpwc_core.data.triplets import video_batches
    from qpwc_core.model.interpolator import Interpolator
    from qpwc_core.model.layers import normalize
    from qpwc_core.model.network import build_network, full_flow
    from qpwc_core.training.interpolation import plain_average, read_config, to_pixels, validation_triplets

    config, network_config = read_config(run)
    config = dataclasses.replace(config, validation_count=count)
    if weights is None:
        saved = [path for name in ("best", "last") if (path := run / f"{name}.weights.h5").exists()]
        if not saved:
            raise ValueError(f"{run}: no weights yet; train for an epoch first")
        weights = saved[0]
    elif not weights.exists():
        raise FileNotFoundError(f"{weights}: no such file")
    network = build_network(network_config, config.height, config.width)
    try:
        network.load_weights(weights)
    except ValueError as error:
        raise ValueError(f"{weights}: no weights of this run's network ({error})") from error
    interpolator = Interpolator(network, network_config)
    if videos:
        triplets = next(video_batches(videos, dataclasses.replace(config.video(), batch=count), seed))
    else:
        triplets = validation_triplets(config, seed)

    output.mkdir(parents=True, exist_ok=True)
    finest = f"flow_{network_config.finest_level}"
    scores = []
    print("example  prediction  average   (PSNR, dB)")
    for index in range(count):
        example = {name: images[index] for name, images in triplets.items()}
        pair = {name: tf.constant(example[name][np.newaxis]) for name in ("prev", "next")}
        predicted = np.rint(to_pixels(interpolator(pair)["img_0"])[0].numpy()).astype(np.uint8)
        forward, _ = interpolator.flows(normalize(pair["prev"]), normalize(pair["next"]))
        flow = full_flow(forward[finest], config.height, config.width)[0].numpy()
        average = plain_average(example["prev"], example["next"])
        scores.append((psnr(predicted, example["middle"]), psnr(average, example["middle"])))
        write_image(output / f"{index:03d}.png", grid(example, predicted, flow, average))
        print(f"{index:7d}  {scores[-1][0]:10.2f}  {scores[-1][1]:7.2f}")
    mean = np.mean(scores, axis=0)
    print(f"{'mean':>7}  {mean[0]:10.2f}  {mean[1]:7.2f}")
    print(f"pictures: {output}{os.sep}*.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("out/pre_train/qpwc_fast"), help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, help="directory for the pictures (default: RUN/pictures)")
    parser.add_argument("--weights", type=Path, help="default: RUN/best.weights.h5")
    parser.add_argument("--videos", nargs="+", type=Path, metavar="FILE", default=[], help="default: rendered scenes")
    parser.add_argument("--count", type=int, default=8, help="default: %(default)s")
    # Not the run's own validation triplets, by which its weights were chosen.
    parser.add_argument("--seed", type=int, default=40_000, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error(f"--count must be at least 1, got {args.count}")
    try:
        show(args.run, args.weights, args.output or args.run / "pictures", args.videos, args.count, args.seed)
    except (ValueError, OSError, QpwcError) as error:
        print(f"pre_train_test: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with(main)
