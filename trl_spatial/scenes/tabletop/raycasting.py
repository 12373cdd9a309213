"""Draws the things on a table by ray casting: several rays per pixel, exact surfaces, one light with shadows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..graph import COLORS, SceneGraph
from ..layout import LayoutError
from .placing import PlacedItem, place_tabletop, sample_sizes
from .things import SCENES, Item


MIN_IMAGE_SIZE = 48
SAMPLES = 2  # rays per pixel along each axis
WALL = -0.12  # z of the wall behind the table
_ATTEMPTS = 20  # attempts to find room for all things
_FAR = np.float32(1e9)
_Array = np.ndarray
# Scene → base color of the table, color of the wall, and pattern.
_LOOKS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], str]] = {
    "kitchen": ((196, 164, 124), (226, 224, 214), "planks"),
    "living room": ((128, 92, 66), (214, 206, 196), "planks"),
    "classroom": ((206, 184, 148), (198, 212, 204), "planks"),
    "study": ((112, 80, 60), (190, 186, 178), "planks"),
    "bedroom": ((186, 178, 172), (222, 214, 220), "carpet"),
    "garage": ((150, 150, 148), (178, 178, 180), "concrete"),
    "patio": ((182, 172, 160), (206, 222, 232), "tiles"),
    "bathroom": ((222, 226, 228), (196, 212, 218), "tiles"),
    "dining room": ((164, 122, 88), (228, 216, 198), "planks"),
    "greenhouse": ((158, 164, 150), (208, 222, 204), "concrete"),
}


@dataclass(frozen=True)
class Rendering:
    """
    A picture of a table, and what each of its pixels shows.

    Args:
        image (`PIL.Image.Image`):
            The picture, RGB.
        items (`list[Item]`):
            The things, in the order of the graph.
        labels (`np.ndarray` of shape `(height, width)` and type `int8`):
            Number of the thing that a ray through each pixel meets, -1 for none.
        points (`np.ndarray` of shape `(height, width, 3)`, float32):
            Where that ray ends, in units of the table: x to the right, height, z toward the viewer.
        depth (`np.ndarray` of shape `(height, width)`, float32):
            Length of the ray.
    """

    image: Image.Image
    items: list[Item]
    labels: np.ndarray
    points: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True)
class _Hit:
    """Nearest surface along each ray: its distance and its normal, both of the shape of the rays."""

    distance: _Array
    normal: tuple[_Array, _Array, _Array]


@dataclass(frozen=True)
class _Rays:
    origin: tuple[_Array, _Array, _Array]
    direction: tuple[_Array, _Array, _Array]

    def part(self, window: tuple[slice, slice]) -> "_Rays":
        """The rays of a window of the image."""
        origin, direction = (
            tuple(p[window] if np.ndim(p) else p for p in parts) for parts in (self.origin, self.direction)
        )
        return _Rays(origin, direction)  # type: ignore[arg-type]

    def at(self, distance: _Array) -> tuple[_Array, _Array, _Array]:
        return tuple(o + distance * d for o, d in zip(self.origin, self.direction, strict=True))


def _box(rays: _Rays, low: Sequence[float], high: Sequence[float]) -> _Hit:
    near, far = np.full(1, -1e9, np.float32), np.full(1, _FAR)
    axis_of = np.zeros(np.shape(rays.direction[0]), np.int8)
    for axis in range(3):
        inverse = 1 / rays.direction[axis]
        first = (np.float32(low[axis]) - rays.origin[axis]) * inverse
        second = (np.float32(high[axis]) - rays.origin[axis]) * inverse
        enter = np.minimum(first, second)
        axis_of = np.where(enter > near, np.int8(axis), axis_of)
        near = np.maximum(near, enter)
        far = np.minimum(far, np.maximum(first, second))
    distance = np.where((near <= far) & (near > 1e-4), near, _FAR)
    normal = tuple(np.where(axis_of == axis, -np.sign(rays.direction[axis]), np.float32(0)) for axis in range(3))
    return _Hit(distance, normal)  # type: ignore[arg-type]


def _sphere(rays: _Rays, middle: Sequence[float], radius: float) -> _Hit:
    offset = [o - np.float32(m) for o, m in zip(rays.origin, middle, strict=True)]
    half_b = sum(o * d for o, d in zip(offset, rays.direction, strict=True))
    c = sum(o * o for o in offset) - np.float32(radius * radius)
    root = half_b * half_b - c
    distance = -half_b - np.sqrt(np.maximum(root, 0))
    distance = np.where((root > 0) & (distance > 1e-4), distance, _FAR)
    normal = tuple((o + distance * d) / np.float32(radius) for o, d in zip(offset, rays.direction, strict=True))
    return _Hit(distance, normal)


def _round(rays: _Rays, x: float, z: float, base: float, top: float, low_radius: float, top_radius: float) -> _Hit:
    """Intersects rays with an upright cylinder or cone, including its upper cap."""
    (ox, oy, oz), (dx, dy, dz) = rays.origin, rays.direction
    ox, oz = ox - np.float32(x), oz - np.float32(z)
    slope = np.float32((top_radius - low_radius) / (top - base))
    reach = np.float32(low_radius) + slope * (oy - np.float32(base))  # radius at the height of the origin
    a = dx * dx + dz * dz - (slope * dy) ** 2
    half_b = ox * dx + oz * dz - slope * dy * reach
    root = half_b * half_b - a * (ox * ox + oz * oz - reach * reach)
    distance = (-half_b - np.sqrt(np.maximum(root, 0))) / a
    height = oy + distance * dy
    is_side = (root > 0) & (distance > 1e-4) & (height >= base) & (height <= top)
    distance = np.where(is_side, distance, _FAR)
    px, pz = ox + distance * dx, oz + distance * dz
    length = np.maximum(np.hypot(px, pz), np.float32(1e-6))
    tilt = 1 / np.sqrt(1 + slope * slope)
    normal = [px / length * tilt, np.broadcast_to(-slope * tilt, px.shape), pz / length * tilt]
    cap = (np.float32(top) - oy) / dy
    is_cap = (cap > 1e-4) & (cap < distance) & ((ox + cap * dx) ** 2 + (oz + cap * dz) ** 2 <= top_radius**2)
    distance = np.where(is_cap, cap, distance)
    normal = [np.where(is_cap, np.float32(n), part) for n, part in zip((0, 1, 0), normal, strict=True)]
    return _Hit(distance, tuple(normal))


def _bowl(rays: _Rays, placed: PlacedItem) -> _Hit:
    """Intersects rays with a low ring with a floor: its outside, its rim and, through the opening, its inside."""
    thickness, top = 0.012, placed.base + placed.height
    outer = _round(rays, placed.x, placed.z, placed.base, top, placed.radius, placed.radius)
    (ox, oy, oz), (dx, dy, dz) = rays.origin, rays.direction
    ox, oz = ox - np.float32(placed.x), oz - np.float32(placed.z)
    inside = np.float32(placed.radius - thickness)
    height, px, pz = (o + outer.distance * d for o, d in zip((oy, ox, oz), (dy, dx, dz), strict=True))
    is_opening = (np.abs(height - np.float32(top)) < 1e-4) & (px * px + pz * pz < inside * inside)
    a = dx * dx + dz * dz
    half_b = ox * dx + oz * dz
    root = np.sqrt(np.maximum(half_b * half_b - a * (ox * ox + oz * oz - inside * inside), 0))
    wall = (-half_b + root) / a
    floor = (np.float32(placed.base + 0.008) - oy) / dy
    is_floor = floor < wall
    distance = np.where(is_opening, np.where(is_floor, floor, wall), outer.distance)
    qx, qz = ox + wall * dx, oz + wall * dz
    inner_normal = (
        np.where(is_floor, np.float32(0), -qx / inside),
        np.where(is_floor, np.float32(1), np.float32(0)),
        np.where(is_floor, np.float32(0), -qz / inside),
    )
    normal = tuple(np.where(is_opening, i, o) for i, o in zip(inner_normal, outer.normal, strict=True))
    return _Hit(distance, normal)  # type: ignore[arg-type]


def _tray(rays: _Rays, placed: PlacedItem) -> _Hit:
    """Intersects rays with a floor and four walls."""
    x, z, r, wall = placed.x, placed.z, placed.radius, 0.014
    base, top = placed.base, placed.base + placed.height
    parts = [
        ((x - r, base, z - r), (x + r, base + 0.008, z + r)),
        ((x - r, base, z - r), (x - r + wall, top, z + r)),
        ((x + r - wall, base, z - r), (x + r, top, z + r)),
        ((x - r, base, z - r), (x + r, top, z - r + wall)),
        ((x - r, base, z + r - wall), (x + r, top, z + r)),
    ]
    hit = _box(rays, *parts[0])
    for low, high in parts[1:]:
        hit = _nearest(hit, _box(rays, low, high))
    return hit


def _nearest(a: _Hit, b: _Hit) -> _Hit:
    is_b = b.distance < a.distance
    normal = tuple(np.where(is_b, q, p) for p, q in zip(a.normal, b.normal, strict=True))
    return _Hit(np.where(is_b, b.distance, a.distance), normal)  # type: ignore[arg-type]


def _hit(rays: _Rays, placed: PlacedItem) -> _Hit:
    form, r = placed.item.solid.form, placed.radius
    top = placed.base + placed.height
    if form == "box":
        return _box(rays, (placed.x - r, placed.base, placed.z - r), (placed.x + r, top, placed.z + r))
    if form == "sphere":
        return _sphere(rays, (placed.x, placed.base + r, placed.z), r)
    if form == "bowl":
        return _bowl(rays, placed)
    if form == "tray":
        return _tray(rays, placed)
    return _round(rays, placed.x, placed.z, placed.base, top, r, r if form == "cylinder" else 0.04 * r)


@dataclass(frozen=True)
class _Camera:
    rays: _Rays
    axes: _Array  # right, up and back, (3, 3)
    eye: _Array
    distance: float  # from the eye to the middle of the image
    width: float  # width of the image at that distance

    def window(self, places: _Array, radius: float) -> tuple[slice, slice]:
        """Returns the window of the image that spheres of equal radius around `places` `(n, 3)` can cover."""
        number = self.rays.direction[0].shape[0]
        across, up, back = (self.axes @ (places - self.eye).T).astype(float)
        scale = self.distance / (-back - radius) / self.width
        middle = np.stack(
            [0.5 - up * self.distance / -back / self.width, 0.5 + across * self.distance / -back / self.width]
        )
        low = np.floor((middle - radius * scale).min(axis=1) * number).astype(int)
        high = np.ceil((middle + radius * scale).max(axis=1) * number).astype(int)
        rows, columns = (slice(max(a, 0), max(min(b, number), 0)) for a, b in zip(low, high, strict=True))
        return rows, columns


def _camera(rng: np.random.Generator, image_size: int) -> _Camera:
    elevation, azimuth = np.radians(rng.uniform(36, 42)), np.radians(rng.uniform(-2, 2))
    distance, width = rng.uniform(4.2, 5.2), rng.uniform(1.16, 1.22)
    target = np.array([0.5, 0.06, 0.47])
    back = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    right = np.array([np.cos(azimuth), 0.0, -np.sin(azimuth)])
    up = np.cross(back, right)
    number = SAMPLES * image_size
    centers = ((np.arange(number, dtype=np.float32) + 0.5) / number - 0.5) * np.float32(width)
    across, down = centers[None, :], -centers[:, None]
    eye = target + distance * back
    direction = [
        np.float32(r) * across + np.float32(u) * down - np.float32(distance * b)
        for r, u, b in zip(right, up, back, strict=True)
    ]
    length = np.sqrt(sum(d * d for d in direction))
    rays = _Rays(tuple(np.float32(e) for e in eye), tuple(d / length for d in direction))  # type: ignore[arg-type]
    return _Camera(rays, np.stack([right, up, back]), eye, distance, width)


def _surroundings(rays: _Rays) -> tuple[_Hit, _Array]:
    """Intersects rays with the table's plane and the wall; also returns a mask of the wall."""
    (_, oy, oz), (_, dy, dz) = rays.origin, rays.direction
    floor, wall = -oy / dy, (np.float32(WALL) - oz) / dz
    is_wall = (wall > 0) & ((wall < floor) | (dy >= 0))
    normal = (
        np.zeros(is_wall.shape, np.float32),
        np.where(is_wall, np.float32(0), np.float32(1)),
        np.where(is_wall, np.float32(1), np.float32(0)),
    )
    return _Hit(np.where(is_wall, wall, floor), normal), is_wall


def _pattern(scene: str, x: _Array, z: _Array, rng: np.random.Generator) -> _Array:
    """Returns the brightness of the table at each point, about 1."""
    kind = _LOOKS[scene][2]
    if kind == "planks":
        width = rng.uniform(0.1, 0.18)
        along = z / np.float32(width)
        plank = np.floor(along)
        shade = rng.uniform(0.92, 1.06, size=64).astype(np.float32)[plank.astype(np.intp) & 63]
        grain = np.sin(x * np.float32(rng.uniform(9, 16)) + shade * 90) * np.float32(0.015)
        seam = np.abs(along - plank - 0.5) > 0.48
        return shade + grain - seam * np.float32(0.12)
    if kind == "tiles":
        width = float(np.float32(rng.uniform(0.16, 0.24)))
        across, along = x / width, z / width
        seam = (np.abs(across - np.floor(across) - 0.5) > 0.475) | (np.abs(along - np.floor(along) - 0.5) > 0.475)
        return np.float32(1.0) - seam * np.float32(0.14)
    scale = 18 if kind == "concrete" else 160
    noise = rng.uniform(-1, 1, size=(64, 64)).astype(np.float32)
    column, row = (np.floor(place * scale).astype(np.intp) & 63 for place in (x, z))
    cells = noise.ravel()[64 * column + row]
    return 1 + np.float32(0.02 if kind == "concrete" else 0.05) * cells


def _middle(item: PlacedItem) -> _Array:
    return np.array([item.x, item.base + item.height / 2, item.z])


def _reach(item: PlacedItem) -> float:
    """Returns the radius of a sphere around the middle of a thing that contains all of it."""
    return float(np.sqrt(2 * item.radius**2 + item.height**2 / 4)) + 0.01


def render_tabletop(graph: SceneGraph, *, seed: int, scene: str, image_size: int = 128) -> Rendering:
    """
    Place and draw the things of a graph.

    Args:
        graph ([`SceneGraph`]):
            What to draw; its entities are [`Item`]s.
        seed (`int`):
            Seed of places, sizes, camera, light and colors; all but the places are the same for graphs over the same things.
        scene (`str`):
            A key of `SCENES`.
        image_size (`int`, *optional*, defaults to `128`):
            Width and height, in pixels.

    Returns:
        [`Rendering`]: the picture, in which every relation of the graph holds, with masks and depth.

    Raises:
        [`LayoutError`]: if no layout satisfies the graph.
        `ValueError`: if `image_size` is too small or the scene unknown.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size} is too small to show things; use at least {MIN_IMAGE_SIZE}.")
    if scene not in SCENES:
        raise ValueError(f"Unknown scene {scene!r}; choose one of {list(SCENES)}.")
    placed = _place(graph, seed)
    return _draw(placed, scene, np.random.default_rng([seed, 2]), image_size)


def _place(graph: SceneGraph, seed: int) -> list[PlacedItem]:
    for attempt in range(_ATTEMPTS):  # some sizes leave no room, or do not fit onto or into each other
        sizes = sample_sizes(graph.entities, np.random.default_rng([seed, 0, attempt // 2]))
        try:
            return place_tabletop(graph, sizes, np.random.default_rng([seed, 1, attempt]))
        except LayoutError:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _draw(placed: Sequence[PlacedItem], scene: str, rng: np.random.Generator, image_size: int) -> Rendering:
    camera = _camera(rng, image_size)
    rays = camera.rays
    hit, is_wall = _surroundings(rays)
    found = np.full(hit.distance.shape, -1, np.int8)
    for number, item in enumerate(placed):
        window = camera.window(_middle(item)[None], _reach(item))
        other = _hit(rays.part(window), item)
        is_nearer = other.distance < hit.distance[window]
        found[window][is_nearer] = number
        hit.distance[window][is_nearer] = other.distance[is_nearer]
        for part, normal in zip(hit.normal, other.normal, strict=True):
            part[window][is_nearer] = np.broadcast_to(normal, is_nearer.shape)[is_nearer]
    points = rays.at(hit.distance)
    palette, colors = _colors(placed, scene, found, is_wall, rng)
    brightness = np.where(found < 0, _pattern(scene, points[0], points[2], rng), np.float32(1))
    brightness[is_wall & (found < 0)] = 1
    angle, height = rng.uniform(-0.9, 0.9), rng.uniform(1.0, 1.5)
    light = np.array([np.sin(angle), height, np.cos(angle) * 0.6])
    light /= np.sqrt((light * light).sum())
    is_shaded = _shadows(placed, camera, hit, points, light)
    facing = np.maximum(sum(n * np.float32(part) for n, part in zip(hit.normal, light, strict=True)), 0)
    # ambient light, slightly brighter from above
    shade = np.float32(0.5) + np.float32(0.1) * hit.normal[1]
    shade += np.float32(0.5) * np.where(is_shaded, np.float32(0), facing)
    # only things have highlights
    shining = np.flatnonzero((found >= 0) & ~is_shaded)
    glint = _glint(rays, hit, light, shining)
    pixels = np.empty((image_size, image_size, 3), np.uint8)
    for channel, values in enumerate(palette.T):
        canvas = (values[colors] * brightness * shade).astype(np.float64)
        canvas.ravel()[shining] += glint
        np.clip(canvas, 0, 255, out=canvas)
        parts = [canvas[i::SAMPLES, j::SAMPLES] for i in range(SAMPLES) for j in range(SAMPLES)]
        pixels[..., channel] = sum(parts) / SAMPLES**2 + 0.5
    corner = (slice(None, None, SAMPLES), slice(None, None, SAMPLES))
    return Rendering(
        Image.fromarray(pixels, "RGB"),
        [item.item for item in placed],
        found[corner],
        np.stack([part[corner] for part in points], axis=-1),
        hit.distance[corner],
    )


def _colors(
    placed: Sequence[PlacedItem], scene: str, found: _Array, is_wall: _Array, rng: np.random.Generator
) -> tuple[_Array, _Array]:
    """Draws the colors `(num_items + 2, 3)` of wall, table and things; also returns the index of each ray's color."""
    table, wall, _ = _LOOKS[scene]
    shift = rng.uniform(0.93, 1.05, size=(2, 1))
    table_color, wall_color = (np.array([table, wall]) * shift + rng.uniform(-8, 8, size=(2, 3))).astype(np.float32)
    shades = {item.item: rng.uniform(0.93, 1.04) for item in sorted(placed, key=lambda item: item.item)}
    colors = [np.float32(shades[item.item]) * np.array(COLORS[item.item.color], np.float32) for item in placed]
    numbers = found.astype(np.intp) + 2
    numbers[is_wall & (found < 0)] = 0
    return np.stack([wall_color, table_color, *colors]), numbers


def _shadows(
    placed: Sequence[PlacedItem], camera: _Camera, hit: _Hit, points: tuple[_Array, _Array, _Array], light: _Array
) -> _Array:
    """Returns a mask of the rays that hit a surface in the shadow of a thing."""
    is_shaded = np.zeros(hit.distance.shape, bool)
    direction = tuple(np.float32(part) for part in light)
    for item in placed:
        # the window from the thing to the end of its shadow
        middle = _middle(item)
        window = camera.window(np.stack([middle, middle - light * (middle[1] / light[1])]), _reach(item))
        start = tuple(p[window] + np.float32(2e-3) * n[window] for p, n in zip(points, hit.normal, strict=True))
        towards = _Rays(start, direction)  # type: ignore[arg-type]
        is_shaded[window] |= _hit(towards, item).distance < 2.0
    return is_shaded


def _glint(rays: _Rays, hit: _Hit, light: _Array, where: _Array) -> _Array:
    """Returns the brightness of the light's reflection for the rays with the flat indices `where`."""
    half = [part - d.ravel()[where] for part, d in zip(light, rays.direction, strict=True)]
    length = np.sqrt(sum(h * h for h in half))
    facing = sum(n.ravel()[where] * h for n, h in zip(hit.normal, half, strict=True))
    return np.maximum(facing / length, 0) ** 40 * np.float32(55)
