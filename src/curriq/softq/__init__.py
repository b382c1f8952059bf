"""The soft Q-learner: the paper's equations as pure functions, and the critic built from them."""
