"""Builds zoos: attacked classifiers beside clean ones, for `guard evaluate`."""
