"""Parameters: what they mean, what they may be, and how they are declared to ROS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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

    An integer given for a floating-point parameter in a YAML file is taken as the number it is, where rclpy
    would end the program.

    Raises:
        ParameterError: the value given at start has another type, is out of range or is no choice.
    """
    from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException

    if node.has_parameter(spec.name):
        return
    try:
        try:
            node.declare_parameter(spec.name, spec.default, _descriptor(spec))
        except InvalidParameterTypeException:
            given = _given_value(node, spec)
            if not (isinstance(spec.default, float) and type(given) is int):
                kind = type(spec.default).__name__
                raise ParameterError(f"parameter {spec.name}: {given!r} is no {kind}") from None
            node.declare_parameter(spec.name, float(given), _descriptor(spec), ignore_override=True)
    except InvalidParameterValueException:
        given = _given_value(node, spec)
        allowed = f"{spec.minimum:g} to {spec.maximum:g}"
        raise ParameterError(f"parameter {spec.name}: {given!r} is not in the range {allowed}") from None
    refusal = spec.refusal(node.get_parameter(spec.name).value)
    if refusal:
        raise ParameterError(f"parameter {refusal}")


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
