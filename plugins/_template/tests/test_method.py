from prefopt.testing import conformance
from prefopt_example.method import ExampleMethod

test_conformance = conformance(ExampleMethod)
