"""The generator behind the `synth…` suites: what happens (`scene`), pixels (`render`), files (`encode`), questions.

`captions` is the text between the frames that `synthmixed` adds.

Everything follows from an integer seed. Seeds below `scene.TEST_SEED` are for training, the rest for testing.
"""
