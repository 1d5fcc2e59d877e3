from prefopt_example.method import ExampleMethod

from prefopt.testing import conformance

test_conformance = conformance(ExampleMethod)
