"""`circuits serve`: prompts, graphs, interventions and feature pages in a browser, by a server on this machine.

    work       jobs that wait for the one model, their progress, and how they are stopped
    shelf      the folder of saved graphs
    asked      what a browser may ask for, checked
    studio     what is done with model, shelf and feature pages
    guard      which requests are answered at all, and the headers of every answer
    app        addresses and answers
    running    the server's life, from the socket to a clean stop

Nothing here is imported by the rest of `circuits` but by the command.
"""
