"""prefopt: train language models from preferences, and find out which method is best for you.

Importing this package loads no tensor library. Plugin authors need `prefopt.api` and `prefopt.maths`, and in tests
`prefopt.testing`; everything else may change between versions.
"""

__version__ = "0.1.0"
