"""Runs, checkpoints, and durable writing of files."""
