"""Checks, repairs, statistics and exports of a store."""
