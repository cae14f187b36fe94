"""Names of the topics that belong to an image: its compressed form, and its camera's calibration."""

from __future__ import annotations

from typing import Any


def compressed_topic(node: Any) -> str:
    """Where the compressed form of `image` is: below it, as in image_transport, unless it is remapped itself."""
    return _unless_remapped(node, "image/compressed", node.resolve_topic_name("image") + "/compressed")


def camera_info_topic(node: Any) -> str:
    """Where the calibration of `image` is: beside it, as with every camera driver, unless it is remapped itself."""
    beside = node.resolve_topic_name("image").rpartition("/")[0] + "/camera_info"
    return _unless_remapped(node, "camera_info", beside)


def _unless_remapped(node: Any, name: str, otherwise: str) -> str:
    resolved = node.resolve_topic_name(name)
    return resolved if resolved != node.resolve_topic_name(name, only_expand=True) else otherwise
