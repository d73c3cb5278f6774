"""Attacks that go down a network by algebra, and what they stand on.

closed_form.py  γ, β and the image by linear algebra, layer by layer
wiener.py       behind a lock per element, with images of the server's own
mean_map.py     behind a private first convolution, likewise
linear_rows.py  what the first fully connected layer got, from rows of its gradient
disaggregation.py  the same for batches behind a ReLU, by its zeros
positions.py    a vision transformer's patches, with the gradient of its positions
feature_inversion.py  the image from what a convolution got, with images of the server's own

way_down.py     head, blocks, image
blind.py        the top of the way where the head is private
access.py       what these need to have observed
moments.py      γ and β as moments; what a norm hides and what it does not
convolution.py  a convolution's input by least squares
chain.py        reads a network as a chain of layers, norms and activations
activations.py  those that can be inverted
rank.py         equations against unknowns, beforehand
first_linear.py the first fully connected layer, and from its inputs to images
pixels.py       layers that get the image itself, and which input is which pixel
sgd.py          gradients out of gradients, or of weights after steps of SGD
search.py       the factor that a norm above another block lost
subspace.py     a convolution's input from its own gradient; features.py: where a network allows it
structure.py    label, head input and dead channels, without any optimization
"""
