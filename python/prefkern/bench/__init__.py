"""Benchmarks: `prefkern bench`, and what is needed to measure something else in the same way.

timing     several calls against each other in one process
shapes     ops, shapes and types that can be measured
peers      adapters of the libraries compared with
workloads  inputs, floors and errors of each op, one module per room
suites     every workload by every peer
report     JSON, tables, plots
"""
