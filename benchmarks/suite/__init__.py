"""`cobra bench`: every scenario of a preset, one process each, resumable, with a report.

run.py (the command), worker.py (one case in a process of its own), journal.py (what is done, line by line), results.py (JSON,
CSV and the machine), compare.py (two runs), plots.py and page.py (report.html and PNG). docs/benchmarks.md explains the files."""
