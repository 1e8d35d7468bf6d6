"""
The record of a deep model made from that of four layers, storage by storage, since the layers in the middle are alike.

    deeper(record.chunks, 40)                # -> the chunks of 40 layers; NotUniform where they are not alike
"""

from memory.record import Chunk


class NotUniform(Exception):
    """The layers in the middle of a record differ, so none of them can stand for more."""


LAST = 3  # of the four layers that are traced, 0 to 3


class Sweeps:
    """The record of four layers as sweeps: forward, backward and each walk of the optimizer go through the layers one
    by one, up or down; CoLM's choice leaves out the last. Layers 1 and 2 must do the same in a sweep, to the byte; else
    NotUniform is raised.

    layers: a dict for each sweep, layer -> index of its chunk. of: index of a chunk -> index of its sweep."""

    def __init__(self, chunks):
        self.chunks, self.layers, self.of = chunks, [], {}
        expected = None
        for i, chunk in enumerate(chunks):
            if chunk.layer is None:
                expected = None
                continue
            if chunk.layer != expected:
                if chunk.layer not in (0, LAST):
                    raise NotUniform(f'a sweep begins in layer {chunk.layer}')
                self.layers.append({})
                step = 1 if chunk.layer == 0 else -1
            self.layers[-1][chunk.layer] = i
            self.of[i] = len(self.layers) - 1
            expected = chunk.layer + step if 0 <= chunk.layer + step <= LAST else None
        for layers in self.layers:
            if list(layers) not in ([0], [LAST], [0, 1, 2], [0, 1, 2, LAST], [LAST, 2, 1, 0]):
                raise NotUniform('a sweep leaves layers out')
            if len(layers) > 1 and not self.alike(layers):
                raise NotUniform('layers 1 and 2 differ')

    def alike(self, layers):
        """Do layers 1 and 2 make the same, and drop what the same sweep made in the same neighbour?"""
        one, two = (self.chunks[layers[layer]].events for layer in (1, 2))

        def seen(event, layer):
            return event[:4] if event[0] == '+' else self.origin(event, layer)[:2]

        return len(one) == len(two) and all(seen(a, 1) == seen(b, 2) for a, b in zip(one, two))

    def handed_on(self, event):
        """Does each layer drop what the one before made in this place, so that only the last one's is dropped here?"""
        layers = self.layers[self.of[event[1]]]
        return layers.get(2) == event[1] and ('-', layers.get(1), event[2]) in self.chunks[event[1]].events

    def origin(self, event, layer):
        """Where a storage that this layer drops was made: the sweep, how many layers up, and its place there."""
        _, i, at = event
        if i not in self.of:
            raise NotUniform('a layer drops what no layer made')
        distance = self.chunks[i].layer - layer
        if abs(distance) > 1:
            raise NotUniform('a layer drops what a distant one made')
        return self.of[i], distance, at


def deeper(chunks, n_layer):
    """The record of a model of n_layer layers from one of 4, exactly: what layer 2 does is done n_layer - 3 times.

    A storage is known by its sweep, its layer and its place there, and is dropped by the same layer of a later sweep,
    by a neighbour, or after all layers. Raises NotUniform where that does not hold."""
    sweeps, new = Sweeps(chunks), []
    where = {}  # (sweep, deep layer), or the index of a chunk of no layer -> index among the new ones

    def copies(layer):
        """The layers of the deep model that a traced one stands for."""
        return range(2, n_layer - 1) if layer == 2 else [layer if layer < 2 else n_layer - 1]

    def outside(events):
        """The events of a chunk of no layer; what was made in layer 2 is dropped in all its copies."""
        for event in events:
            if event[0] == '+':
                yield event
            elif event[1] not in sweeps.of:
                yield '-', where[event[1]], event[2]
            else:
                s, layer = sweeps.of[event[1]], chunks[event[1]].layer
                alive = copies(layer)[-1:] if sweeps.handed_on(event) else copies(layer)
                yield from (('-', where[s, j], event[2]) for j in alive)

    def inside(s, j):
        """The events of deep layer j in sweep s."""
        layers, old = sweeps.layers[s], j if j < 2 else LAST if j == n_layer - 1 else 2
        of_layer_1 = chunks[layers.get(1, layers[old])].events
        for k, event in enumerate(chunks[layers[old]].events):
            if event[0] == '+':
                yield event
            elif event[1] not in sweeps.of:  # made outside, dropped by the first or the last layer
                yield '-', where[event[1]], event[2]
            else:
                # The neighbour above a copy is another copy, as for layer 1, and not the last layer, as for layer 2.
                below_a_copy = old == 2 and j < n_layer - 2 and sweeps.origin(of_layer_1[k], 1)[1] == 1
                sweep, up, at = sweeps.origin(of_layer_1[k], 1) if below_a_copy else sweeps.origin(event, old)
                yield '-', where[sweep, j + up], at

    for i, chunk in enumerate(chunks):
        if chunk.layer is None:
            where[i] = len(new)
            new.append(Chunk(None, list(outside(chunk.events))))
            continue
        s = sweeps.of[i]
        upwards = next(iter(sweeps.layers[s])) == 0
        for j in copies(chunk.layer) if upwards else reversed(copies(chunk.layer)):
            where[s, j] = len(new)
            new.append(Chunk(j, list(inside(s, j))))
    return new
