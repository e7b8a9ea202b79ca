"""The generator behind `synthvideo` and `synthimage`: what happens (`scene`), pixels (`render`), files (`encode`), questions.

Everything follows from an integer seed. Seeds below `scene.TEST_SEED` are for training, the rest for testing.
"""
