"""Every parameter of node `flow`: what ROS says of it, and that what it cannot be is refused with a reason."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters
from rclpy.parameter import Parameter, parameter_value_to_python
from ros_harness import NodeProcess

from qpwc_ros.nodes.flow import PARAMETERS
from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.plugins import registry
from qpwc_ros.plugins.base import Estimator, Output
from qpwc_ros.plugins.builtin import ENTRY_POINTS, ESTIMATORS, OUTPUTS

#: Of another type than any parameter that has the key's.
OTHER_TYPES = {bool: 1, int: "one", float: "one", str: 1.5, list: "flow"}


def all_specs() -> dict[str, ParameterSpec]:
    estimators, outputs = (tuple(ENTRY_POINTS[group]) for group in (ESTIMATORS, OUTPUTS))
    specs = [
        *PARAMETERS,
        ParameterSpec("estimator", "tflite", "", choices=estimators),
        ParameterSpec("outputs", list(outputs), "", choices=outputs),
    ]
    for group, base in ((ESTIMATORS, Estimator), (OUTPUTS, Output)):
        for name in ENTRY_POINTS[group]:
            specs += registry.load(group, name, base).parameters
    return {spec.name: spec for spec in specs}


SPECS = all_specs()


class Parameters:
    """The running node's parameters, several at a time."""

    def __init__(self, client):
        self._client = client

    def names(self):
        request = ListParameters.Request()
        return self._client.call(ListParameters, "/flow/list_parameters", request).result.names

    def descriptors(self, names):
        request = DescribeParameters.Request(names=names)
        answer = self._client.call(DescribeParameters, "/flow/describe_parameters", request)
        return dict(zip(names, answer.descriptors))

    def values(self):
        request = GetParameters.Request(names=list(SPECS))
        answer = self._client.call(GetParameters, "/flow/get_parameters", request)
        return dict(zip(SPECS, map(parameter_value_to_python, answer.values)))

    def try_all(self, tries):
        """Set each (name, value) by itself; the reason for each refusal, None where it was accepted."""
        request = SetParameters.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in tries]
        results = self._client.call(SetParameters, "/flow/set_parameters", request).results
        return [None if result.successful else result.reason for result in results]


@pytest.fixture(scope="module")
def parameters(client, tmp_path_factory):
    with NodeProcess(tmp_path_factory.mktemp("node"), autostart=False) as node:
        yield Parameters(client)
        assert "Traceback" not in node.log


def impossible_values(spec):
    """(value, a part of the reason) for what this parameter cannot be."""
    yield OTHER_TYPES[type(spec.default)], "type"
    if spec.choices:
        wrong = "no_such_thing"
        yield [wrong] if isinstance(spec.default, list) else wrong, f"'{wrong}' is not one of {spec.choices[0]}"
    if spec.minimum is not None:
        step = 1 if isinstance(spec.default, int) else 1e-3 * max(1.0, abs(spec.minimum))
        yield spec.minimum - step, "range"
        yield spec.maximum + max(step, 1e-3 * spec.maximum if isinstance(step, float) else 1), "range"
    if isinstance(spec.default, float):
        for value in (math.nan, math.inf, -math.inf):
            yield value, "range"


def test_ros_knows_what_each_parameter_is(parameters):
    own = [n for n in parameters.names() if n in SPECS or not n.startswith(("qos_overrides.", "use_sim", "start_"))]
    assert set(own) == set(SPECS)
    for name, descriptor in parameters.descriptors(list(SPECS)).items():
        spec = SPECS[name]
        assert len(descriptor.description) > 10 and descriptor.read_only == spec.read_only, name
        spans = [*descriptor.integer_range, *descriptor.floating_point_range]
        if isinstance(spec.default, (int, float)) and not isinstance(spec.default, bool):
            assert [(span.from_value, span.to_value) for span in spans] == [(spec.minimum, spec.maximum)], name
            kinds = (descriptor.integer_range, descriptor.floating_point_range)
            assert kinds[isinstance(spec.default, float)], name
        else:
            assert not spans
        assert all(choice in descriptor.additional_constraints for choice in spec.choices), name


def test_whatever_cannot_be_is_refused_with_the_reason_and_changes_nothing(parameters):
    before = parameters.values()
    tries = [
        (spec.name, value, reason)
        for spec in SPECS.values()
        if not spec.read_only
        for value, reason in impossible_values(spec)
    ]
    assert len(tries) > 50
    reasons = parameters.try_all([(name, value) for name, value, _ in tries])
    for (name, value, expected), reason in zip(tries, reasons):
        assert reason is not None, f"{name} = {value!r} was accepted"
        # Type and range are rclpy's to refuse, in its own words.
        assert name in reason or expected in ("type", "range"), (name, value, reason)
        assert expected in reason, (name, value, reason)
    assert parameters.values() == before


def test_read_only_parameters_stay_as_they_were_given(parameters):
    before = parameters.values()
    fixed = [spec for spec in SPECS.values() if spec.read_only]
    assert {spec.name for spec in fixed} == {"autostart", "delegate", "delegate_options"}
    new = {bool: True, str: "libother.so", list: ["a=b"]}
    reasons = parameters.try_all([(spec.name, new[type(spec.default)]) for spec in fixed])
    assert all(reason and "read-only" in reason for reason in reasons), reasons
    assert parameters.values() == before


def test_both_ends_of_each_range_and_each_choice_are_accepted(parameters):
    before = parameters.values()
    # Beside the widest max_interval, any min_interval goes, and the other way round.
    tries = [("max_interval", 3600.0)]
    for spec in SPECS.values():
        if spec.read_only or spec.name == "max_interval":
            continue
        if spec.minimum is not None:
            tries += [(spec.name, spec.maximum), (spec.name, spec.minimum)]
        for choice in spec.choices:
            tries.append((spec.name, [choice] if isinstance(spec.default, list) else choice))
    tries += [("max_interval", 0.001), *((name, before[name]) for name in before if not SPECS[name].read_only)]
    reasons = parameters.try_all(tries)
    assert not [pair for pair in zip(tries, reasons) if pair[1] is not None]
    assert parameters.values() == before


def test_intervals_that_leave_no_pair_are_refused_together(parameters):
    reasons = parameters.try_all([("min_interval", 1.5), ("max_interval", 0.5), ("min_interval", 0.75)])
    assert "min_interval 1.5 would be over max_interval 1" in reasons[0]
    assert reasons[1] is None and "0.75 would be over max_interval 0.5" in reasons[2]
    assert parameters.try_all([("max_interval", 1.0)]) == [None]
