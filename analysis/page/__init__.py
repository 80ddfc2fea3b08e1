"""One page to see and compare runs. `python -m analysis.page`: __main__.py."""
