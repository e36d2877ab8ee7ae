"""What stands in the simulated beam: the housing of the demo, and random scenes for training and evaluation.

All lengths are in mm. `random_scene` draws from five families, because a network trained on one kind of scene learns
that kind: castings (plates with holes, bosses, pores and cracks), clutter (anything through anything), fine structure
(wires, line pairs, solder balls, gear teeth), round bodies (smooth gradients), and foams.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from xrk.simulate import Placing, Scene, Solid, rotation

__all__ = ["baggage", "housing", "random_scene"]


def housing(seed: int = 7) -> Scene:
    """An aluminium housing of 150 x 110 mm with a ball bearing, a brass-like gear, bolts, pores, cracks and wires."""
    rng = np.random.default_rng(seed)
    scene = Scene()
    at = Placing(rotation(x=0.12, y=0.10))
    plate = at.box([0, 0, 0], [150, 110, 14])
    boss = at.cylinder([-25, 0, -12], 34, 14)
    bore = at.cylinder([-25, 0, -4], 22, 40)
    scene.add("aluminium", plate)
    scene.add("aluminium", boss)
    scene.cut("aluminium", boss, plate)
    scene.cut("aluminium", plate, bore)
    scene.cut("aluminium", boss, bore)
    _bearing(scene, at, centre=(-25, 0, -6))
    for x in (-65, 65):
        for y in (-45, 45):
            scene.cut("aluminium", plate, at.cylinder([x, y, 0], 4.4, 20))
            if (x, y) != (65, 45):  # one hole stays empty
                scene.add("iron", at.cylinder([x, y, 2], 3.9, 26))
                scene.add("iron", at.cylinder([x, y, -15.5], 6.5, 5))
    _gear(scene, at, "copper", centre=(35, 5, -10), radius=20, thickness=6, teeth=24)
    scene.add("polyethylene", at.box([0, 0, 11], [140, 100, 3]))
    for _ in range(140):  # casting porosity
        centre = [rng.uniform(-72, 72), rng.uniform(-52, 52), rng.uniform(-5.5, 5.5)]
        scene.cut("aluminium", plate, at.ball(centre, float(np.clip(rng.lognormal(-0.9, 0.6), 0.12, 1.8))))
    for index, (width, depth) in enumerate([(0.25, 2), (0.4, 3), (0.6, 4)]):  # cracks
        centre = [5 + 6 * index, -35, 7 - depth / 2]
        scene.cut("aluminium", plate, at.box(centre, [width, 18, depth], rotation(z=0.2)))
    for index, diameter in enumerate((0.8, 0.63, 0.5, 0.4, 0.32, 0.25, 0.2)):  # wire gauge, ISO 19232-1
        centre = [-5 + 4 * index, 38, -7 - diameter / 2]
        scene.add("iron", at.cylinder(centre, diameter / 2, 24, rotation(x=np.pi / 2)))
    return scene


def baggage(seed: int = 3) -> Scene:
    """A packed case of 420 x 300 mm: clothes and bottles (polyethylene), a laptop, a knife, cans, keys and wires."""
    rng = np.random.default_rng(seed)
    scene, at = Scene(), Placing(rotation(x=0.05, y=-0.04))
    shell = at.box([0, 0, 0], [420, 300, 180])
    scene.add("polyethylene", shell)
    scene.cut("polyethylene", shell, at.box([0, 0, 0], [412, 292, 174]))
    for _ in range(14):  # rolled clothes: organic, of all thicknesses
        half = rng.uniform([25, 15, 5], [90, 60, 22])
        scene.add("polyethylene", at.ellipsoid(rng.uniform([-150, -100, -60], [150, 100, 60]), half))
    for x, y in ((-120, 60), (60, -80)):  # bottles with metal caps
        scene.add("polyethylene", at.cylinder([x, y, 10], 32, 110, rotation(y=1.2)))
        scene.add("aluminium", at.cylinder([x + 58, y, 32], 14, 14, rotation(y=1.2)))
    board = at.box([60, 50, -40], [230, 160, 3])
    scene.add("aluminium", board)
    for _ in range(60):  # chips, coils and screws on the laptop's board
        place = [60 + rng.uniform(-105, 105), 50 + rng.uniform(-72, 72), -37]
        chip = at.box(place, [*rng.uniform(2, 16, 2), rng.uniform(0.2, 1.5)])
        scene.add(str(rng.choice(["copper", "tin", "iron"])), chip)
    scene.add("iron", at.box([-70, -60, 20], [150, 22, 2.2], rotation(z=0.5)))  # a knife's blade, and its handle
    scene.add("polyethylene", at.box([-150, -103, 20], [90, 26, 14], rotation(z=0.5)))
    for index in range(4):  # keys
        turn = rotation(z=0.4 * index)
        scene.add("copper", at.box([150 - 8 * index, -100, 30 + 3 * index], [46, 8, 2], turn))
    for index, diameter in enumerate((0.8, 0.5, 0.32, 0.2)):
        scene.add("copper", at.cylinder([-180 + 12 * index, 0, 0], diameter / 2, 240, rotation(x=np.pi / 2)))
    return scene


def _bearing(scene: Scene, at: Placing, centre: tuple[float, float, float], balls: int = 9) -> None:
    x, y, z = centre
    for outer, inner in ((21.9, 18.5), (13.5, 9.5)):
        ring = at.cylinder([x, y, z], outer, 12)
        scene.add("iron", ring)
        scene.cut("iron", ring, at.cylinder([x, y, z], inner, 13))
    for angle in np.arange(balls) * (2 * np.pi / balls):
        scene.add("iron", at.ball([x + 16 * np.cos(angle), y + 16 * np.sin(angle), z], 2.4))
    scene.add("iron", at.cylinder([x, y, z], 9.4, 60))


def _gear(
    scene: Scene,
    at: Placing,
    material: str,
    centre: tuple[float, float, float],
    radius: float,
    thickness: float,
    teeth: int,
) -> None:
    x, y, z = centre
    disc = at.cylinder([x, y, z], radius, thickness)
    scene.add(material, disc)
    scene.cut(material, disc, at.cylinder([x, y, z], radius / 4, 2 * thickness))
    pitch = 2 * np.pi * radius / teeth
    for angle in np.arange(teeth) * (2 * np.pi / teeth):
        place = [x + 1.065 * radius * np.cos(angle), y + 1.065 * radius * np.sin(angle), z]
        tooth = at.box(place, [0.23 * radius, pitch / 2, thickness], rotation(z=angle))
        scene.add(material, tooth)
        scene.cut(material, tooth, disc)


# How much of each material is a good deal of absorption: the sizes of random parts scale with it.
_DEPTH = {"polyethylene": 60.0, "aluminium": 25.0, "titanium": 8.0, "iron": 4.0, "copper": 2.5, "tin": 2.0}


def random_scene(seed: int, field: float) -> Scene:
    """A random scene for a field of view of ``field`` mm; the same seed gives the same scene."""
    rng = np.random.default_rng(seed)
    scene = Scene()
    families = (_casting, _clutter, _fine_structure, _round_bodies, _foam)
    for _ in range(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])):
        families[rng.choice(len(families), p=[0.3, 0.25, 0.25, 0.1, 0.1])](scene, rng, field)
    return scene


def _placing(rng: Generator, field: float, tilt: float = 0.2) -> Placing:
    turn = rotation(rng.normal(0, tilt), rng.normal(0, tilt), rng.uniform(0, 2 * np.pi))
    return Placing(turn, [*rng.uniform(-0.3, 0.3, 2) * field, rng.uniform(-50, 50)])


def _material(rng: Generator) -> str:
    return str(rng.choice(list(_DEPTH), p=[0.15, 0.35, 0.1, 0.2, 0.15, 0.05]))


def _thickness(rng: Generator, material: str) -> float:
    return _DEPTH[material] * float(np.exp(rng.uniform(np.log(0.05), np.log(1.2))))


def _casting(scene: Scene, rng: Generator, field: float) -> None:
    at, material = _placing(rng, field), _material(rng)
    depth = _thickness(rng, material)
    if rng.random() < 0.6:
        body: Solid = at.box([0, 0, 0], [*rng.uniform(0.3, 1.4, 2) * field, depth])
    else:
        body = at.cylinder([0, 0, 0], rng.uniform(0.2, 0.8) * field, depth)
    scene.add(material, body)
    for _ in range(rng.integers(0, 4)):  # bosses and ribs
        place = [*rng.uniform(-0.5, 0.5, 2) * field, -depth]
        height = depth * rng.uniform(0.3, 1.5)
        if rng.random() < 0.5:
            scene.add(material, at.cylinder(place, rng.uniform(0.03, 0.3) * field, height))
        else:
            scene.add(material, at.box(place, [*rng.uniform(0.02, 0.5, 2) * field, height]))
    for _ in range(rng.integers(0, 12)):  # holes, some with bolts
        place = [*rng.uniform(-0.5, 0.5, 2) * field, 0]
        radius = float(np.exp(rng.uniform(np.log(0.008), np.log(0.15)))) * field
        scene.cut(material, body, at.cylinder(place, radius, 3 * depth))
        if rng.random() < 0.4:
            other = _material(rng)
            scene.add(other, at.cylinder(place, 0.9 * radius, _thickness(rng, other)))
    for _ in range(int(rng.choice([0, 5, 30, 80]))):  # pores
        place = [*rng.uniform(-0.5, 0.5, 2) * field, rng.uniform(-0.4, 0.4) * depth]
        radius = min(float(rng.lognormal(np.log(0.006), 0.7)) * field, 0.45 * depth)
        scene.cut(material, body, at.ball(place, radius))
    for _ in range(rng.integers(0, 5)):  # cracks
        place = [*rng.uniform(-0.5, 0.5, 2) * field, rng.uniform(-0.3, 0.3) * depth]
        size = [rng.uniform(0.001, 0.01) * field, rng.uniform(0.05, 0.3) * field, rng.uniform(0.05, 0.6) * depth]
        scene.cut(material, body, at.box(place, size, rotation(z=rng.uniform(0, np.pi))))


def _clutter(scene: Scene, rng: Generator, field: float) -> None:
    for _ in range(int(rng.choice([5, 12, 30, 50]))):
        at, material = _placing(rng, field, tilt=1.0), _material(rng)
        size = float(np.exp(rng.uniform(np.log(0.02), np.log(0.4)))) * field
        depth = min(_thickness(rng, material), 2 * size)
        place = [*rng.uniform(-0.35, 0.35, 2) * field, 0]
        kind = rng.integers(4)
        if kind == 0:
            scene.add(material, at.box(place, [size, size * rng.uniform(0.2, 1), depth]))
        elif kind == 1:
            scene.add(material, at.ellipsoid(place, [size / 2, size * rng.uniform(0.2, 0.5), depth / 2]))
        else:
            body = at.cylinder(place, size / 2, depth)
            scene.add(material, body)
            if kind == 3:  # a ring or tube
                scene.cut(material, body, at.cylinder(place, size / 2 * rng.uniform(0.5, 0.95), 2 * depth))


def _fine_structure(scene: Scene, rng: Generator, field: float) -> None:
    at, material = _placing(rng, field), _material(rng)
    kind = rng.integers(4)
    if kind == 0:  # wires
        for _ in range(rng.integers(3, 20)):
            place = [*rng.uniform(-0.5, 0.5, 2) * field, rng.uniform(-5, 5)]
            radius = float(np.exp(rng.uniform(np.log(0.0006), np.log(0.008)))) * field
            turn = rotation(x=np.pi / 2, z=rng.uniform(0, np.pi))
            scene.add(material, at.cylinder(place, radius, rng.uniform(0.2, 1.5) * field, turn))
    elif kind == 1:  # line pairs of decreasing width
        x, width = -0.4 * field, rng.uniform(0.01, 0.03) * field
        depth = _thickness(rng, material) / 3
        while width > 0.001 * field and x < 0.5 * field:
            scene.add(material, at.box([x, 0, 0], [width, rng.uniform(0.2, 0.6) * field, depth]))
            x, width = x + 2 * width, width * rng.uniform(0.85, 1.0)
    elif kind == 2:  # an array of solder balls on pads
        pitch = rng.uniform(0.03, 0.1) * field
        radius = pitch * rng.uniform(0.15, 0.45)
        count = rng.integers(3, 9)
        for i in range(count):
            for j in range(count):
                place = [(i - count / 2) * pitch, (j - count / 2) * pitch, 0]
                scene.add("tin", at.ellipsoid(place, [radius, radius, min(radius, _DEPTH["tin"] / 3)]))
    else:
        radius = rng.uniform(0.1, 0.35) * field
        _gear(scene, at, material, (0, 0, 0), radius, _thickness(rng, material), int(rng.integers(10, 40)))


def _round_bodies(scene: Scene, rng: Generator, field: float) -> None:
    for _ in range(rng.integers(1, 7)):
        at = _placing(rng, field, tilt=1.0)
        material = str(rng.choice(["polyethylene", "aluminium", "titanium"]))
        half = rng.uniform(0.1, 0.6, 3) * field
        half *= _thickness(rng, material) / (2 * half.mean())
        half[:2] = np.maximum(half[:2], rng.uniform(0.05, 0.5, 2) * field)
        body = at.ellipsoid([0, 0, 0], half)
        scene.add(material, body)
        if rng.random() < 0.5:
            scene.cut(material, body, at.ellipsoid([0, 0, 0], half * rng.uniform(0.3, 0.95)))


def _foam(scene: Scene, rng: Generator, field: float) -> None:
    at, material = _placing(rng, field), _material(rng)
    depth = _thickness(rng, material)
    body = at.box([0, 0, 0], [*rng.uniform(0.6, 1.4, 2) * field, depth])
    scene.add(material, body)
    count = int(rng.choice([60, 150, 300]))
    mean = rng.uniform(0.005, 0.03) * field
    for _ in range(count):
        place = [*rng.uniform(-0.6, 0.6, 2) * field, rng.uniform(-0.5, 0.5) * depth]
        scene.cut(material, body, at.ball(place, min(float(rng.gamma(3, mean / 3)), 0.5 * depth)))
