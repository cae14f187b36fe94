"""What the middleware tells about subscriptions and publishers, in the words of every supported release of ROS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def subscription_events(lost: Callable[[int], None], mismatch: Callable[[str], None]) -> Any:
    """Event callbacks for a subscription.

    Args:
        lost: called with the number of messages that the middleware has newly lost.
        mismatch: called with the policy ("RELIABILITY") when a publisher offers less than the subscription asks
            for; nothing ever comes from that publisher, and no message says so.
    """
    callbacks, _ = _event_callbacks()
    return callbacks(
        message_lost=lambda event: lost(max(0, event.total_count_change)),
        incompatible_qos=lambda event: mismatch(_policy(event)),
    )


def publisher_events(mismatch: Callable[[str], None]) -> Any:
    """Event callbacks for a publisher; `mismatch` is called with the policy when a subscriber asks for more than is
    offered, and therefore gets nothing.
    """
    _, callbacks = _event_callbacks()
    return callbacks(incompatible_qos=lambda event: mismatch(_policy(event)))


def _event_callbacks() -> tuple[Any, Any]:
    try:
        from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
    except ImportError:  # ROS 2 Humble
        from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks
    return SubscriptionEventCallbacks, PublisherEventCallbacks


def _policy(event: Any) -> str:
    from rclpy.qos import qos_policy_name_from_kind

    return qos_policy_name_from_kind(event.last_policy_kind)
