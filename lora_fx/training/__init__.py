"""What a training run did: losses and ‖ΔW‖ by layer over its steps.  In the order in which the files need each other:

history    a run as data, and what can be said of it
lines      the lines of its file, written and read back
curves     fewer points, smoothing, curves as text
picture    the run as picture and page
record     the run with its text, picture and page, read from a file; no torch up to here
norms      ‖ΔW‖ of every adapter of a model
recorder   writes the file while a model is trained
"""
