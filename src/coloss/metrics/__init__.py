"""Evaluation: classification, calibration, probes, retrieval, embedding meters, paired statistics.

Metrics of tensors return scalar tensors; results with several numbers (`retrieval_metrics`, probes,
`evaluate_*`, statistics) return plain floats that go into JSON as they are.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
