"""Hyperparameters of the flow network: one frozen dataclass and the shipped operating points."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Mapping

import yaml

from qpwc_core.geometry import check_enlarge
from qpwc_core.runtime.refinement import DEFAULT_ITERATIONS


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """What it takes to build the network.

    Attributes:
        name: the model's name, also its file name.
        height, width: the exported network's default input in pixels, multiples of the coarsest stride.
        sizes: (height, width) of further inputs that it is exported for, with the same weights. Which one an image
            gets: ``qpwc_core.geometry.choose_size``.
        enlarge: how much larger than the image its input should be, as long as it is none larger than the default one;
            1 or more.
        refine: whether the exported model asks for its flow to be refined on the images, see
            ``qpwc_core.runtime.refinement``.
        refine_iterations: of that, on its coarse and on its fine grid.
        pyramid: channels of pyramid levels 1, 2, …; level l has stride 2**l.
        extra_convs: number of stride-1 3x3 convolutions after the strided one, per pyramid level.
        finest_level: the level of the final flow. Decoding starts at the last pyramid level.
        match_channels: channels of the features that are warped and correlated.
        radii: search radius of the cost volume per decoded level, coarse to fine, in that level's pixels.
        sharpness: factor on the cosines in the cost volume, whose softmax the decoder also sees.
        decoder: channels of each decoder: the first is a sum of 1x1 projections of its inputs, the others
            are 3x3 convolutions.
        finest_decoder: the same of the finest level, which has the most cells; empty: as the others.
        context: channels of the 3x3 convolutions that see the coarsest decoder's output and add to its flow, as
            PWC-Net's context network does to the finest. On the coarsest grid they cost little and reach across
            the image; empty: none.
        vote_gain: at the coarsest level the costs of all cells are averaged, multiplied by this to begin with, and
            their softmax is shown to every cell: how likely each shift is for the image as a whole. Plain surfaces
            follow the camera, and only together have their cells evidence of it. 0: no vote.
        flow_input_range: flow, in level pixels, that saturates the decoder's flow input. The decoder sees
            the flow only as context; the flow it adds to is kept in full precision beside it.
    """

    name: str = "qpwc_fast"
    height: int = 480
    width: int = 640
    sizes: tuple[tuple[int, int], ...] = ()
    enlarge: float = 1.0
    refine: bool = False
    refine_iterations: tuple[int, int] = DEFAULT_ITERATIONS
    pyramid: tuple[int, ...] = (16, 24, 48, 64, 96)
    extra_convs: tuple[int, ...] = (0, 1, 1, 1, 1)
    finest_level: int = 3
    match_channels: int = 32
    radii: tuple[int, ...] = (6, 4, 3)
    sharpness: float = 10.0
    decoder: tuple[int, ...] = (64, 64, 48, 32)
    finest_decoder: tuple[int, ...] = ()
    context: tuple[int, ...] = ()
    vote_gain: float = 0.0
    flow_input_range: float = 16.0

    def __post_init__(self) -> None:
        for field in ("pyramid", "extra_convs", "radii", "decoder", "finest_decoder", "context", "refine_iterations"):
            object.__setattr__(self, field, tuple(int(v) for v in getattr(self, field)))
        object.__setattr__(self, "sizes", tuple((int(height), int(width)) for height, width in self.sizes))
        for field, least in (("pyramid", 1), ("extra_convs", 0), ("radii", 1), ("decoder", 1)):
            if min(getattr(self, field), default=0) < least:
                raise ValueError(f"{field} needs numbers of at least {least}, got {getattr(self, field)}")
        check_enlarge(self.enlarge)
        if len(self.refine_iterations) != 2 or min(self.refine_iterations) < 0:
            raise ValueError(f"refine_iterations needs two numbers from 0 up, got {self.refine_iterations}")
        if self.match_channels < 1:
            raise ValueError(f"match_channels must be at least 1, got {self.match_channels}")
        for field in ("sharpness", "flow_input_range"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive, got {getattr(self, field)}")
        if len(self.extra_convs) != len(self.pyramid):
            raise ValueError(f"extra_convs needs {len(self.pyramid)} entries, got {len(self.extra_convs)}")
        if not 1 <= self.finest_level <= len(self.pyramid):
            raise ValueError(f"finest_level must be 1..{len(self.pyramid)}, got {self.finest_level}")
        if len(self.radii) != len(self.levels):
            raise ValueError(f"radii needs {len(self.levels)} entries (levels {self.levels}), got {len(self.radii)}")
        if len(self.decoder) < 2:
            raise ValueError("decoder needs at least two entries")
        if self.finest_decoder and (len(self.finest_decoder) < 2 or min(self.finest_decoder) < 1):
            raise ValueError(f"finest_decoder needs at least two positive entries, or none, got {self.finest_decoder}")
        if self.vote_gain < 0:
            raise ValueError(f"vote_gain must not be negative, got {self.vote_gain}")
        if min(self.context, default=1) < 1:
            raise ValueError(f"context needs positive numbers, or none, got {self.context}")
        for height, width in self.input_sizes:
            if height < 1 or width < 1 or height % self.stride or width % self.stride:
                raise ValueError(f"{height}x{width} is not a multiple of the stride {self.stride}")
        if len(set(self.input_sizes)) != len(self.input_sizes):
            raise ValueError(f"sizes name one size twice: {self.input_sizes}")

    @property
    def input_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every input that the network is exported for, the default first."""
        return ((self.height, self.width), *self.sizes)

    @property
    def levels(self) -> tuple[int, ...]:
        """Decoded levels, coarse to fine."""
        return tuple(range(len(self.pyramid), self.finest_level - 1, -1))

    def decoder_of(self, level: int) -> tuple[int, ...]:
        """Channels of a level's decoder."""
        return self.finest_decoder if self.finest_decoder and level == self.finest_level else self.decoder

    @property
    def stride(self) -> int:
        """Image sizes must be multiples of this."""
        return 2 ** len(self.pyramid)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """Builds a config from parsed JSON.

        Raises:
            ValueError: an unknown key (a misspelling must not silently become a default).
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown network option(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)


# The first for 640x480; then 16:9, smaller images, 3:2, larger 16:9, wide ones such as films and cars have.
# None has more pixels than the first, so that every image is as fast.
_FAST_SIZES = (
    (352, 640), (384, 512), (256, 320), (448, 672), (416, 736), (352, 832), (288, 960)
)  # fmt: skip

# As large as the images of usual cameras and data sets, in this order: 640x480, 640x360, 512x384, 320x240, 3:2, RealSense's
# 848x480, 960x540; then films (Sintel) and cars (KITTI), and large 16:9 and 4:3, as large as time allows.
_ACCURATE_SIZES = (
    (352, 640), (384, 512), (256, 320), (512, 768), (480, 832), (544, 960), (448, 1024), (384, 1248), (640, 1120), (832, 1088)
)  # fmt: skip

OPERATING_POINTS: Mapping[str, NetworkConfig] = {
    "qpwc_fast": NetworkConfig(
        sizes=_FAST_SIZES, refine=True, refine_iterations=(4, 0), context=(48, 48, 48, 48), vote_gain=30.0, enlarge=1.3
    ),
    # About two and a half times the work of qpwc_fast on the same image: wider, and one level more.
    "qpwc": NetworkConfig(
        name="qpwc",
        sizes=_ACCURATE_SIZES,
        refine=True,
        enlarge=1.3,
        pyramid=(24, 32, 64, 96, 128),
        finest_level=2,
        radii=(6, 4, 3, 2),
        decoder=(96, 96, 64, 48),
        finest_decoder=(48, 48, 32),
        context=(64, 64, 64, 64),
        vote_gain=30.0,
    ),
}


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def network_name(name: str) -> str:
    """What :func:`network_config` of the same ``name`` is called in file names."""
    return Path(name).stem if _is_file(name) else name


def network_config(name: str) -> NetworkConfig:
    """The operating point called ``name``, or the one that a YAML file describes.

    Args:
        name: of an operating point, or the path of a ``.yaml`` file: ``base``, an operating point's name, and whatever
            of ``NetworkConfig`` is different, such as ``radii: [4, 4, 3]``. Its ``name`` is the file's, without ending.

    Raises:
        ValueError: there is none, or the file does not say a network.
        OSError: the file cannot be read.
    """
    if not _is_file(name):
        if name not in OPERATING_POINTS:
            raise ValueError(
                f"unknown network {name!r}; known: {', '.join(OPERATING_POINTS)}, and .yaml files that describe one"
            )
        return OPERATING_POINTS[name]
    try:
        values = yaml.safe_load(Path(name).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or values.get("base") not in OPERATING_POINTS:
        raise ValueError(f"{name}: needs base, one of {', '.join(OPERATING_POINTS)}")
    base = dataclasses.asdict(OPERATING_POINTS[values.pop("base")])
    try:
        return NetworkConfig.from_mapping({**base, "name": Path(name).stem, **values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
