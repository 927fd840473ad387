"""Requests that come and go: continuous batching."""
