"""The quickstart: small real networks on real handwritten digits, taken through the whole job once."""
