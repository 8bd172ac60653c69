"""The study: methods x data sets x seeds at equal gradients, settings tuned alike; behind ``pyro-sam study``."""
