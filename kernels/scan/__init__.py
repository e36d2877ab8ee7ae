"""Selective scans: the state-space operators of the Mamba family, along one line or in four directions of an image."""
