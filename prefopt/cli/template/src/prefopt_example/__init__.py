"""example_method, as a plugin of prefopt."""

from prefopt.api import hookimpl
from prefopt_example.method import ExampleMethod


@hookimpl
def prefopt_algorithms() -> list[type[ExampleMethod]]:
    return [ExampleMethod]
