"""
A traced plan as a picture: what lives on the device while the model is built and takes three steps.
"""

from collections import Counter

from memory.trace import WHAT

SAMPLES = 1500  # points of the curves, each the fullest moment of its stretch of the record
COLOURS = {  # from below: what stays, then what comes and goes
    'weights': '#4c72b0',
    'states': '#8172b3',
    'bases': '#64b5cd',
    'gradients': '#dd8452',
    'forward': '#55a868',
    'forward again': '#a1d99b',
    'loss': '#ccb974',
    'backward': '#da8bc3',
    'update': '#c44e52',
    'data': '#8c8c8c',
    'setup': '#bbbbbb',
}
STEPS = 'the first step', 'an ordinary step', 'a step with a new basis or a merge'
COARSE = {'setup': 'building', 'data': 'forward', 'forward': 'forward', 'update': 'update'}  # all else: backward


def levels(chunks):
    """Yield (bytes alive, phase, Counter of them by what they are) when a storage is made; the Counter stays one."""
    alive, kinds, now = {}, Counter(), 0
    for c, chunk in enumerate(chunks):
        i = 0
        for event in chunk.events:
            if event[0] == '-':
                size, what = alive.pop(event[1:])
                kinds[what] -= size
                now -= size
                continue
            _, size, what, *_, phase = event
            alive[c, i] = size, what
            kinds[what] += size
            now += size
            yield now, phase, kinds
            i += 1


def stretches(levels):
    """-> [(phase, bytes by what they are)], the fullest moment of each stretch, and the bounds of what the axis names:
    [(first stretch, name of a phase or step)] of phases and of steps."""
    moments, phases, steps = [], [], []
    points = [(now, phase, dict(kinds)) for now, phase, kinds in thinned(levels)]
    for i, (_, phase, kinds) in enumerate(points):
        coarse = COARSE.get(phase, 'backward')
        if phase == 'data' and (not i or points[i - 1][1] != 'data'):
            steps.append((i, STEPS[min(len(steps), 2)]))
        if not phases or phases[-1][1] != coarse:
            phases.append((i, coarse))
        moments.append((phase, kinds))
    return moments, joined(phases), steps


def thinned(levels):
    """At most SAMPLES of the points, the fullest of each stretch; but every phase has one."""
    levels = [(now, phase, dict(kinds)) for now, phase, kinds in levels]
    every, at = max(len(levels) // SAMPLES, 1), 0
    while at < len(levels):
        end = at + 1
        while end < min(at + every, len(levels)) and levels[end][1] == levels[at][1]:
            end += 1
        yield max(levels[at:end], key=lambda point: point[0])
        at = end


def joined(phases):
    """Without the updates inside a backward: per layer they are part of it."""
    kept = []
    for k, (i, name) in enumerate(phases):
        inside = name == 'update' and k + 1 < len(phases) and phases[k + 1][1] == 'backward'
        if not inside and (not kept or kept[-1][1] != name):
            kept.append((i, name))
    return kept


def draw(plan, png, title, card=0):
    """Write the picture of a traced plan to a file. title: the run, for a person; card: its bytes, 0 for none."""
    import matplotlib

    matplotlib.use('Agg')  # a file, no window
    import matplotlib.pyplot as plt

    moments, phases, steps = stretches(levels(plan.peak.chunks))
    x, names = range(len(moments)), [name for name in COLOURS if visible(name, moments, plan.total)]
    figure, axes = plt.subplots(figsize=(12, 7))
    figure.subplots_adjust(left=0.07, right=0.7, top=0.92, bottom=0.2)
    rows = [[kinds.get(name, 0) / 1e9 for _, kinds in moments] for name in names]
    axes.stackplot(x, rows, colors=[COLOURS[name] for name in names], step='mid', linewidth=0)
    totals = [sum(kinds.values()) / 1e9 for _, kinds in moments]
    at = max(x, key=totals.__getitem__)
    top = 1.08 * max(plan.total / 1e9, card / 1e9 if card < 2e9 + 1.6 * plan.total else 0)
    axes.set(xlim=(0, len(moments) - 1), ylim=(0, top), ylabel='GB alive', xticks=[])
    axes.plot([at], [totals[at]], 'v', color='black', ms=7, clip_on=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in reversed(names)]
    figure.legend(handles, [WHAT[name] for name in reversed(names)], loc='upper left', bbox_to_anchor=(0.71, 0.93),
                  frameon=False, fontsize=9)  # fmt: skip
    text = [f'▼ the peak: {plan.total / 1e9:.2f} GB', f'   in {plan.moment}', '', 'its five largest tensors:']
    for size, shape, operation, layer, what in plan.peak.largest:
        of = f', layer {layer}' if layer is not None else ''
        text += [f'   {size / 1e6:,.0f} MB  {" x ".join(map(str, shape))}', f'      {WHAT[what]}{of} ({operation})']
    if card > top * 1e9:
        text += ['', f'the card: {card / 1e9:.1f} GB, far above']
    elif card:
        text += ['', f'- - -  the card: {card / 1e9:.1f} GB, of which', '   CUDA and gaps take a part, too']
        axes.axhline(card / 1e9, color='black', lw=1.2, ls='--')
    figure.text(0.715, 0.1, '\n'.join(text), fontsize=8.5, va='bottom', family='DejaVu Sans')
    name_phases(axes, phases, steps, len(moments))
    figure.suptitle(title, x=0.07, ha='left', fontsize=12)
    figure.savefig(png, dpi=120)
    plt.close(figure)


def visible(name, moments, peak):
    return max(kinds.get(name, 0) for _, kinds in moments) > 0.002 * peak


def name_phases(axes, phases, steps, n):
    """Under the axis: phases, upright where they are narrow, and the steps below."""
    under = axes.get_xaxis_transform()
    for bounds, y, size in ((phases, -0.02, 8), (steps, -0.17, 9)):
        for (a, name), (b, _) in zip(bounds, [*bounds[1:], (n, '')]):
            narrow = bounds is phases and b - a < 0.018 * len(name) * n
            axes.text((a + b) / 2, y, name, transform=under, ha='center', va='top', fontsize=size,
                      rotation=90 if narrow else 0)  # fmt: skip
            if a and bounds is steps:
                axes.axvline(a, color='black', lw=0.6, alpha=0.6)
            elif a:
                axes.axvline(a, color='black', lw=0.4, alpha=0.25)
