"""The demo: real models that install as packages, answered with and without a drafter."""
