"""Parameters: what they mean, what they may be, and how they are declared to ROS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


#: The policies of a topic that `qos_overrides` parameters may change: those of rclpy's `with_default_policies`.
OVERRIDABLE = ("history", "depth", "reliability")


class ParameterError(ValueError):
    """A parameter given at start has an impossible value; the text is one line that names it."""


@dataclass(frozen=True)
class ParameterSpec:
    """One ROS parameter.

    Attributes:
        name: as users write it.
        default: its type (bool, int, float, str, list of str) is the parameter's type.
        description: one sentence with the unit.
        minimum, maximum: inclusive range of a number.
        choices: the only strings allowed; for a list of strings, its only elements.
        read_only: fixed when the node starts.
    """

    name: str
    default: Any
    description: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    read_only: bool = False

    def refusal(self, value: Any) -> str | None:
        """Why `value` (of the right type and in range) cannot be taken, or None if it can."""
        if not self.choices:
            return None
        given = value if isinstance(value, (list, tuple)) else [value]
        wrong = [item for item in given if item not in self.choices]
        if wrong:
            return f"{self.name}: {wrong[0]!r} is not one of {', '.join(self.choices)}"
        return None


def declare(node: Any, spec: ParameterSpec) -> None:
    """Declare a parameter on an rclpy node, unless it is declared already.

    An integer given for a floating-point parameter is taken as the number it is, and one given for text as that
    text (a video device, source:=1), where rclpy would end the program.

    Raises:
        ParameterError: the value given at start has another type, is empty, is out of range or is no choice.
    """
    from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException

    if node.has_parameter(spec.name):
        return
    try:
        try:
            node.declare_parameter(spec.name, spec.default, _descriptor(spec))
        except InvalidParameterTypeException:
            given = _given_value(node, spec)
            kind = type(spec.default)
            if not (kind in (float, str) and type(given) is int):
                # A user who writes refine:=off gives ROS a bool, and wants to know the words, not the type.
                named = spec.choices and kind is str
                what = f"not one of {', '.join(spec.choices)}" if named else f"no {kind.__name__}"
                raise ParameterError(f"parameter {spec.name}: {given!r} is {what}") from None
            node.declare_parameter(spec.name, kind(given), _descriptor(spec), ignore_override=True)
    except InvalidParameterValueException:
        given = _given_value(node, spec)
        allowed = f"{spec.minimum:g} to {spec.maximum:g}"
        raise ParameterError(f"parameter {spec.name}: {given!r} is not in the range {allowed}") from None
    value = node.get_parameter_or(spec.name).value
    if value is None:  # [] has no type in ROS, which takes it for no value at all
        raise ParameterError(f"parameter {spec.name}: an empty list is given, which ROS has no type for")
    refusal = spec.refusal(value)
    if refusal:
        raise ParameterError(f"parameter {refusal}")


def check_qos_overrides(node: Any) -> None:
    """Check what is given at start for quality of service, of which rclpy only sees what a topic needs it for.

    Raises:
        ParameterError: a value that cannot be.
    """
    from rclpy.qos import HistoryPolicy, ReliabilityPolicy

    names = {"history": HistoryPolicy, "reliability": ReliabilityPolicy}
    for name, parameter in _given(node).items():
        policy = _overridden_policy(name)
        if policy in names:
            choices = [item.name.lower() for item in names[policy] if item.name != "UNKNOWN"]
            if str(parameter.value).lower() not in choices:
                raise ParameterError(
                    f"parameter {name}: {parameter.value!r} is not one of {', '.join(choices)}"
                )
        elif policy and not (type(parameter.value) is int and parameter.value >= 0):
            raise ParameterError(f"parameter {name}: {parameter.value!r} is no number of messages")


def unknown_parameters(node: Any) -> list[str]:
    """Names given at start that mean nothing to the node: rclpy keeps silent about them, misspelt ones too."""
    return sorted(
        name for name in _given(node) if not node.has_parameter(name) and not _overridden_policy(name)
    )


def _given(node: Any) -> dict[str, Any]:
    """What the command line and parameter files give a node, by name, be it declared or not."""
    # rclpy has no public name for it, and that may change.
    return getattr(node, "_parameter_overrides", {})


def _overridden_policy(name: str) -> str:
    """Which policy of a topic a parameter overrides, "" for any other parameter."""
    if not name.startswith("qos_overrides."):
        return ""
    *_, entity, policy = name.split(".")
    return policy if entity in ("publisher", "subscription") and policy in OVERRIDABLE else ""


def _given_value(node: Any, spec: ParameterSpec) -> Any:
    from rcl_interfaces.msg import ParameterDescriptor

    value = node.declare_parameter(spec.name, spec.default, ParameterDescriptor(dynamic_typing=True)).value
    node.undeclare_parameter(spec.name)
    return value


def _descriptor(spec: ParameterSpec) -> Any:
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    descriptor = ParameterDescriptor(description=spec.description, read_only=spec.read_only)
    if spec.choices:
        descriptor.additional_constraints = "one of: " + ", ".join(spec.choices)
    if spec.minimum is not None and spec.maximum is not None:
        if isinstance(spec.default, float):
            span = FloatingPointRange(from_value=float(spec.minimum), to_value=float(spec.maximum), step=0.0)
            descriptor.floating_point_range = [span]
        else:
            descriptor.integer_range = [
                IntegerRange(from_value=int(spec.minimum), to_value=int(spec.maximum), step=1)
            ]
    return descriptor
