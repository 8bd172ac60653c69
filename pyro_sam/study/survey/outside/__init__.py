"""Methods from outside the library, on a plain network without Pyro, for the study to compare with.

Each is a class called with a :class:`~pyro_sam.study.survey.outside.start.Start`. Its ``step(x, y)`` costs a gradient;
in ``with run.sampled():`` the network is at a sample of the posterior, in ``with run.centred():`` at its mean.
"""
