"""Counts the messages of a publisher that a subscription never got to see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

#: Publishers remembered; those heard of longest ago are forgotten.
MOST_PUBLISHERS = 16


def with_info(callback: Callable[..., None]) -> Callable[..., None]:
    """A subscription's `callback(msg, info)` in the form in which this release of ROS calls it.

    ROS 2 Humble tells nothing about a message: `info` is empty there. It must have no default, because later
    releases give it only to callbacks that cannot do without.
    """
    from rclpy.subscription import Subscription

    return callback if hasattr(Subscription, "CallbackType") else functools.partial(callback, info={})


class SequenceGaps:
    """Tells from publishers' running numbers how many of their messages did not come.

    The middleware reports only what it lost on the way. A message that a newer one replaced before anybody took
    it, which is what "keep last 1" is for, goes in silence, but leaves a hole in its publisher's numbers.
    """

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}

    def missed(self, info: Mapping[str, Any]) -> int | None:
        """How many messages are missing between this one and the one before, of the same publisher.

        Args:
            info: what rclpy tells about the message (its MessageInfo); empty if it tells nothing.

        Returns:
            The number, 0 for a publisher's first message; None where the middleware or this release of ROS does
            not tell both the publisher and the number.
        """
        gid, number = info.get("publisher_gid"), info.get("publication_sequence_number")
        if not gid or number is None:
            return None
        publisher = bytes(gid["data"])
        last = self._last.pop(publisher, None)
        self._last[publisher] = number
        if len(self._last) > MOST_PUBLISHERS:
            del self._last[next(iter(self._last))]
        return 0 if last is None else max(0, number - last - 1)
