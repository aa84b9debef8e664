"""The one exception that a user of graphs has to know.

ValueError
  └── GraphError    a graph, or a file of one, that is not what it should be
"""


class GraphError(ValueError):
    """A graph or graph file is malformed, unreadable or cannot do what was asked.

    The message names the file or field, what was expected, what was found, and what to do about it.
    """
