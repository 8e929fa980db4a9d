"""What measures and checks, as `python -m bench.NAME`, and what these commands share."""
