"""Devices: sharding over a mesh, processes of several hosts, device memory."""
