"""An OpenAI-compatible server for one machine: requests from a network, decoded together in one running batch."""
