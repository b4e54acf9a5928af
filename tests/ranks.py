"""Several processes' shares of a work, done one after the other."""

from headwise.models.processes import Processes


class Rank(Processes):
    """One of several: what it would sum with the others is noted, and how often it waits for them."""

    def __init__(self, rank, number):
        self.rank, self.number, self.summed, self.waits = rank, number, [], 0

    def sum(self, tensor):
        self.summed.append(tensor.detach().clone())
        return tensor

    def wait(self):
        self.waits += 1
