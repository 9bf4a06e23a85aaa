"""Put the units of networks into correspondence: how alike they are, and which belong together."""
