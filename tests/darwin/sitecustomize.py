"""Python imports this first in every process of make test-darwin, children included: see darwin_shape."""

import darwin_shape

darwin_shape.install()
