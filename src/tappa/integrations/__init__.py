"""Other libraries' KV cache compression with ours; each module needs its library installed."""
