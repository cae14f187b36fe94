"""Streams a pair of frames, back and forth, through the estimator as a robot does: scaling, network, refinement.

    python stream.py MODEL FRAMES.npz COUNT

FRAMES.npz as guest.py has it; COUNT flows are computed. Needs qpwc_core and what it needs to run.
"""

import itertools
import sys

import cv2
import numpy as np

from qpwc_core import FlowEstimator


def main(model, frames, count):
    cv2.setNumThreads(1)
    with np.load(frames) as pair:
        images = itertools.cycle([pair["prev"], pair["next"]])
        estimator = FlowEstimator.load(model, threads=1)
        for _ in estimator.stream(itertools.islice(images, int(count) + 1)):
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
