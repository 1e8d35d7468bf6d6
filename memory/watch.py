"""
Hooks that tell a record, all the time, in which layer and phase of a step it is, and which storages are gradients.

    watch(record, model, optimizer)          # once both are built; then the step may run
"""

import contextlib


def watch(record, model, optimizer):
    """Tell the record, all the time, which layer and phase it is in, and which storages are gradients."""

    def enter(phase, layer):
        def hook(*_):
            record.phase = phase
            record.at(layer)

        return hook

    def begin_layer(layer):
        def hook(*_):
            if record.phase == 'backward':
                record.phase = 'forward again'
            record.at(layer)

        return hook

    def end_layer(layer):
        def hook(module, inputs, x):
            x = x[0] if isinstance(x, tuple) else x  # as some of transformers' blocks return it
            if record.phase == 'forward again':
                record.phase = 'backward'
            elif x.requires_grad and record.phase == 'forward':
                x.register_hook(enter('backward', layer))
            elif record.phase == 'data' and layer >= len(model.layers) - 2:  # a choice handles the last by itself
                record.leave()

        return hook

    def start_of_layers(module, inputs):
        if inputs[0].requires_grad and record.phase == 'forward':
            inputs[0].register_hook(enter('backward', None))

    def head(module, inputs):
        if record.phase == 'forward':  # else it is the choice of a batch
            enter('loss', None)()

    def micro_batch(*_):
        record.relabel({G.untyped_storage() for G in waiting_gradients(model, optimizer)}, 'gradients')
        enter('forward', None)()

    model.register_forward_pre_hook(micro_batch)
    model.head_begins.register_forward_pre_hook(head)
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(begin_layer(i))
        layer.register_forward_hook(end_layer(i))
    model.layers[0].register_forward_pre_hook(start_of_layers)
    watch_updates(record, model, optimizer)


def watch_updates(record, model, optimizer):
    """Of the optimizer not `update` itself: a wrapper would keep its gradient alive for longer than the caller does."""
    take_gradient, moments_at_hand = optimizer.take_gradient, optimizer.moments_at_hand
    layer_of = {p: i for i, layer in enumerate(model.layers) for p in layer.parameters()}
    in_step = optimizer.grad_clip or not optimizer.per_layer
    last = optimizer.param_groups[-1]['params'][-1:] or optimizer.param_groups[0]['params'][-1:]
    last = last[0] if in_step and last else None

    def located(p):
        record.at(layer_of.get(p))
        G = take_gradient(p)
        record.relabel({G.untyped_storage()}, 'gradients')
        return G

    @contextlib.contextmanager
    def at_hand(p):
        before, record.phase = record.phase, 'update'
        record.at(layer_of.get(p))
        with moments_at_hand(p):
            yield
        record.phase = before
        if p is last:  # what follows, such as the norm, is of no layer
            record.at(None)

    step = optimizer.step

    def walk(*_):  # a new sweep, even where the first layer's backward came just before
        record.at(None)
        return step()

    optimizer.take_gradient, optimizer.moments_at_hand, optimizer.step = located, at_hand, walk


def waiting_gradients(model, optimizer):
    """Those that earlier micro-batches left: of weights, of the placeholders of projected ones, of merging layers."""
    for p in (*model.parameters(), *getattr(optimizer, 'placeholder', {}).values()):
        if p.grad is not None:
            yield p.grad
    yield from (layer.G for layer in getattr(optimizer, 'layers', {}) if getattr(layer, 'G', None) is not None)
