"""Thin adapters from a wire to the methods of `ensemerge_server.rpc`."""
