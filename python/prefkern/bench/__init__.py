"""Benchmarks: `prefkern bench`, and what is needed to measure something else in the same way.

timing     several calls against each other in one process
machine    where that is, and who else was at work there
shapes     ops, shapes and types that can be measured
peers      adapters of the libraries compared with
workloads  inputs, floors and errors of each op, one module per room
runner     every workload by every peer
suites     cases that belong together
report     JSON, tables, plots
tables     tables of documents, from results
curves     the figure of the suite "scaling"
"""
