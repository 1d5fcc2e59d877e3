"""One loop for every method. Layout, log-probabilities, devices and ranks are the engine's business; no method has
a name here."""
