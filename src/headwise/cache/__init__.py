"""The ragged KV cache: its layers, how prefill fills and cuts them, and how it is saved."""
