"""The conformance suite on the shared-memory ring and on in-process slots."""

from colospec.ring.local import LocalChannel
from tests.ring.conformance import Conformance
from tests.ring.samples import open_ring


class TestSharedMemoryRing(Conformance):
    def open(self, spec, **options):
        return open_ring(spec, **options)


class TestLocalChannel(Conformance):
    def open(self, spec, **options):
        channel = LocalChannel(spec, **options)
        return channel.writer, channel.reader
