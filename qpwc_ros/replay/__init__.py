"""Replay evaluation: a bag in; figures, pictures, a video and a bag of results out.

A run has two steps. First the frames go through the estimator (`offline`: in this process; `live`: through
the node `flow` over DDS) and everything it answers is written to the results bag. Then the results bag alone
is measured (`evaluate`) and shown (`pictures`, `report`). So the memory needed does not grow with the bag,
and both kinds of run are judged by the same code.
"""
