import numpy as np
import pytest

from qpwc_core.flow_color import color_wheel, flow_to_color


def at(dx, dy, **options):
    return flow_to_color(np.array([[[dx, dy]]], np.float32), **options)[0, 0].tolist()


def test_wheel_has_middleburys_hues():
    wheel = color_wheel()
    assert wheel.shape == (55, 3)
    primaries = {
        0: (255, 0, 0),
        15: (255, 255, 0),
        21: (0, 255, 0),
        25: (0, 255, 255),
        36: (0, 0, 255),
        49: (255, 0, 255),
    }
    for index, color in primaries.items():
        assert tuple(wheel[index]) == color
    assert tuple(wheel[1]) == (255, 17, 0) and tuple(wheel[16]) == (255 - 42, 255, 0)


def test_directions_have_their_hues():
    """Computed by hand from Middlebury's colorwheel: position = angle / 2π · 54."""
    assert at(1, 0) == [255, 0, 0]
    assert at(0, 1) == [255, 229, 0]  # position 13.5: between (255, 221, 0) and (255, 238, 0)
    assert at(-1, 0) == [0, 209, 255]  # position 27: 2 of 11 steps from cyan to blue
    assert at(0, -1)[0] in range(80, 110) and at(0, -1)[2] == 255


def test_magnitude_is_saturation():
    assert at(0, 0) == [255, 255, 255]
    assert at(5, 0, max_flow=10) == [255, 127, 127]
    assert at(20, 0, max_flow=10) == [191, 0, 0]
    flow = np.zeros((1, 2, 2), np.float32)
    flow[0, 1] = (3, 4)
    np.testing.assert_array_equal(flow_to_color(flow), flow_to_color(flow, max_flow=5))


def test_every_angle_is_painted_without_a_jump():
    angle = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    colors = flow_to_color(np.dstack([np.cos(angle), np.sin(angle)]), max_flow=1).astype(int)[0]
    closing = np.abs(np.diff(colors, axis=0, append=colors[:1]))
    assert closing.max() <= 45  # the wheel's last step, between its 55th hue and its first


def test_unknown_is_black_and_does_not_set_the_scale():
    flow = np.array([[[1, 0], [np.nan, 0], [1e10, 0], [0, -np.inf]]], np.float32)
    assert flow_to_color(flow).tolist()[0] == [[255, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(4, 4, 3\)"):
        flow_to_color(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="max_flow"):
        at(1, 0, max_flow=0)
    with pytest.raises(ValueError, match="max_flow"):
        at(1, 0, max_flow=float("nan"))
