"""Dense optical flow between two images."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qpwc_core.errors import ModelError
from qpwc_core.geometry import NetworkFit, check_enlarge, resize_flow
from qpwc_core.images import as_rgb, as_rgb_pair
from qpwc_core.machine import default_threads
from qpwc_core.runtime import models
from qpwc_core.runtime.engine import Delegate, Engine, TensorSpec
from qpwc_core.runtime.models import InputSize, ModelInfo
from qpwc_core.runtime.precision import choose
from qpwc_core.runtime.refinement import refine, refinement_images

_IMAGE = "image"
_FLOW = "flow"
_PREV, _NEXT = "prev_", "next_"


@dataclass(frozen=True, eq=False)
class Features:
    """What an estimator keeps of one image; opaque, and only for the model that made it.

    Attributes:
      height, width: The image, in pixels.
      size: The network's input that the image was given to.
    """

    height: int
    width: int
    size: InputSize
    _arrays: Mapping[str, np.ndarray]
    _info: ModelInfo
    _images: tuple[np.ndarray, np.ndarray] | None


class FlowEstimator:
    """Estimates where each pixel of one image is seen in the next.

    Each image goes to the one of the model's input sizes that suits it best (`ModelInfo.size_for`); where it
    is of another size, it is scaled there, and the flow back. May be shared between threads, with images of
    different sizes too; the network runs for one of them at a time.

    Attributes:
      info: What the model says of itself.
      threads: Threads that run the network; OpenCV's, which refine its flow, are `cv2.setNumThreads`'s affair.
      refines: Whether its flow is refined on the images (`qpwc_core.runtime.refinement`).
      runtime: Name and version of the TFLite runtime.
    """

    def __init__(
        self,
        info: ModelInfo,
        *,
        threads: int | None = None,
        xnnpack: bool = True,
        delegate: Delegate | None = None,
        refine: bool | None = None,
        enlarge: float | None = None,
    ) -> None:
        """As `load`, for a model whose description is already read."""
        if enlarge is not None:
            check_enlarge(enlarge)
            info = replace(info, enlarge=float(enlarge))
        if refine not in (None, True, False):  # "never", which the node's parameter may be, would count as true
            raise ValueError(f"refine must be True, False or None, got {refine!r}")
        self.info = info
        self.refines = info.refine if refine is None else refine
        self.threads = default_threads() if threads is None else threads
        self._engine = Engine(info.path, threads=self.threads, xnnpack=xnnpack, delegate=delegate)
        self._match_inputs = {size: _check_interface(info, size, self._engine) for size in info.sizes}

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = models.DEFAULT_PRECISION,
        threads: int | None = None,
        xnnpack: bool = True,
        delegate: Delegate | None = None,
        refine: bool | None = None,
        enlarge: float | None = None,
    ) -> FlowEstimator:
        """Loads a model.

        Args:
          model: A bundled model's name or the path of a .tflite file; by default "qpwc", or
            "qpwc_fast" where that is the only one bundled.
          precision: Of a bundled model: "int8", "float32", or "auto" for int8 where the processor has
            dot-product instructions for it, and elsewhere what a measurement of half a second finds faster.
          threads: Threads that run the network; by default 2, or 1 on a single processor.
          xnnpack: Whether the runtime's fast kernels may be used; without them the flow is the same up
            to rounding, which in int8 is as far from it as the float32 flow is.
          delegate: An accelerator's library, which is offered every operation first.
          refine: Whether the network's flow is refined on the images, which makes it more accurate by fractions
            of a pixel and at the edges of what moves, for a sixth (the iterations of "qpwc_fast") to a quarter (of "qpwc")
            of OpenCV DIS medium's time; by default as the model says, and both do.
          enlarge: How much larger than the image the network's input should be, as long as it is none larger than
            the default one, 640x480. That makes the flow of small images more accurate, for up to the time of one of
            640x480; by default as the model says, 1.3 for both. With 1 small images are fast.

        Raises:
          ModelError: The model is missing, damaged, or not one of this project's.
          QpwcError: No TFLite runtime is installed, or the delegate cannot be loaded.
          ValueError: Unknown precision, threads out of 1 to 256, `enlarge` is no number from 1 up, or `refine` or
            `delegate` is something else.
        """
        model = models.default_model() if model is None else model

        @functools.cache  # what was measured is not loaded once more
        def make(precision: str) -> FlowEstimator:
            info = models.read_model_info(models.find_model(model, precision))
            return cls(
                info, threads=threads, xnnpack=xnnpack, delegate=delegate, refine=refine, enlarge=enlarge
            )

        if precision != models.AUTO_PRECISION:
            return make(precision)
        if models.is_path(model):
            return make(models.DEFAULT_PRECISION)  # the file is what it is
        available = models.available_precisions(model)
        if len(available) == 1:
            return make(available[0])
        return make(choose(lambda candidate: make(candidate)._run_once))

    def _run_once(self) -> None:
        size = self.info.sizes[0]
        blank = np.zeros((size.height, size.width, 3), np.uint8)
        features = self.encode(blank)
        self.match(features, features)

    @property
    def runtime(self) -> str:
        """Name and version of the TFLite runtime in use."""
        return self._engine.name

    def __call__(self, prev: np.ndarray, next: np.ndarray) -> np.ndarray:
        """Flow from `prev` to `next`.

        Args:
          prev, next: uint8 (H, W, 3) RGB, or grey (H, W) or (H, W, 1), of one size; H, W ≥ 32.

        Returns:
          float32 (H, W, 2): (dx, dy) in pixels, so that `prev[y, x]` is seen at
          `next[y + dy, x + dx]`. A new array.

        Raises:
          ValueError: Naming the shape or dtype that is wrong.
        """
        prev, next = as_rgb_pair(prev, next)
        return self.match(self.encode(prev), self.encode(next))

    def stream(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Flow between consecutive frames, from the second frame on, encoding each frame once.

        The result is bit for bit that of calling the estimator on each pair.

        Raises:
          ValueError: As `__call__`; also where a frame's size differs from the one before.
        """
        prev: Features | None = None
        for frame in frames:
            features = self.encode(frame)
            if prev is not None:
                yield self.match(prev, features)
            prev = features

    def bidirectional(
        self, prev: np.ndarray | Features, next: np.ndarray | Features
    ) -> tuple[np.ndarray, np.ndarray]:
        """Flow prev → next and flow next → prev, encoding each image once.

        Takes images as `__call__` does, or features of them.
        """
        prev, next = self._features(prev, "prev"), self._features(next, "next")
        return self.match(prev, next), self.match(next, prev)

    def encode(self, image: np.ndarray) -> Features:
        """Computes what `match` needs of one image (as in `__call__`)."""
        return self._features(image, "image")

    def match(self, prev: Features, next: Features) -> np.ndarray:
        """Flow between two encoded images of one size: float32 (H, W, 2), as `__call__`.

        Raises:
          ValueError: The images differ in size, another model or one that does not refine encoded them, or none did.
        """
        for name, features in (("prev", prev), ("next", next)):
            if not isinstance(features, Features):
                raise ValueError(f"{name} must be what `encode` makes of an image, got {type(features).__name__}")
            if replace(features._info, enlarge=self.info.enlarge) != self.info:
                raise ValueError(f"{name} was encoded by {features._info.path}, not by {self.info.path}")
            if features._info != self.info:
                raise ValueError(
                    f"{name} was encoded with enlarge={features._info.enlarge:g}, here it is {self.info.enlarge:g}"
                )
            if self.refines and features._images is None:
                raise ValueError(f"{name} was encoded by an estimator that does not refine, as this one does")
        if (prev.height, prev.width) != (next.height, next.width):
            raise ValueError(
                f"prev and next differ in size: {(prev.height, prev.width)} and {(next.height, next.width)}"
            )
        sides = {_PREV: prev._arrays, _NEXT: next._arrays}
        inputs = {side + name: sides[side][name] for side, name in self._match_inputs[prev.size]}
        flow = self._engine.run(prev.size.match, inputs)[_FLOW][0]
        fit = self._fit(prev.height, prev.width, prev.size)
        if not self.refines:
            return fit.to_image(flow)
        refined = refine(
            functools.partial(fit.to_image, flow), prev._images, next._images, self.info.refine_iterations
        )
        return resize_flow(refined, prev.height, prev.width)

    def _features(self, image: np.ndarray | Features, name: str) -> Features:
        if isinstance(image, Features):
            return image
        rgb = as_rgb(image, name)
        height, width = rgb.shape[:2]
        size = self.info.size_for(height, width)
        fit = self._fit(height, width, size)
        arrays = self._engine.run(size.encode, {_IMAGE: fit.to_network(rgb)[None]})
        greys = refinement_images(rgb) if self.refines else None
        return Features(height, width, size, arrays, self.info, greys)

    def _fit(self, height: int, width: int, size: InputSize) -> NetworkFit:
        return NetworkFit(height, width, size.height, size.width, self.info.flow_stride)


def _check_interface(info: ModelInfo, size: InputSize, engine: Engine) -> list[tuple[str, str]]:
    """Checks that a size's signatures are what the metadata promises and fit each other.

    Returns:
      The inputs of `match`, each as ("prev_" or "next_", name of an output of `encode`).

    Raises:
      ModelError: They do not.
    """

    for signature in (size.encode, size.match):
        if signature not in engine.signatures:
            raise ModelError(f"{info.path}: lacks the signature {signature!r}")
    _require(info, engine.inputs(size.encode), _IMAGE, (1, size.height, size.width, 3), np.uint8)
    grid = (size.height // info.flow_stride, size.width // info.flow_stride)
    _require(info, engine.outputs(size.match), _FLOW, (1, *grid, 2), np.float32)

    features = engine.outputs(size.encode)
    wanted = []
    for name, spec in engine.inputs(size.match).items():
        side, source = name[: len(_PREV)], name[len(_PREV) :]
        if side not in (_PREV, _NEXT) or source not in features:
            raise ModelError(f"{info.path}: nothing in {size.encode!r} gives the input {name!r}")
        if features[source] != spec:
            raise ModelError(f"{info.path}: input {name!r} is {spec}, but it is given {features[source]}")
        wanted.append((side, source))
    return wanted


def _require(
    info: ModelInfo, specs: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...], dtype: type
) -> None:
    if name not in specs:
        raise ModelError(f"{info.path}: lacks the tensor {name!r}")
    spec = specs[name]
    if spec.shape != shape or spec.dtype != dtype:
        raise ModelError(
            f"{info.path}: tensor {name!r} is {spec.dtype} {spec.shape}, expected {np.dtype(dtype)} {shape}"
        )
