"""Benchmarks: `prefkern bench`, and what is needed to measure something else in the same way.

timing   several calls against each other in one process
shapes   ops, shapes and types that can be measured
peers    adapters of the libraries compared with
suites   inputs, floors and errors of each op
report   JSON, tables, plots
"""
