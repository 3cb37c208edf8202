"""One store of maps, from its manifest to the Hub."""
