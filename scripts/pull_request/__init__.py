"""The parts of scripts/make_pr.py."""
